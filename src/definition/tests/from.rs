//! `from`.

use super::*;

#[test]
fn all_spellings_of_from_are_read() {
    let top = tree();
    let name = |name: &str, owner: Option<&str>| {
        BaseSource::Image(BaseRef::Name { name: name.into(), owner: owner.map(Into::into) })
    };
    let id = |id: &str| BaseSource::Image(BaseRef::Id(ImageId(id.into())));
    let tag = |key: &str, value: &str, owner: Option<&str>| {
        BaseSource::Image(BaseRef::Tag { key: key.into(), value: value.into(), owner: owner.map(Into::into) })
    };
    let deprecated = |from| match from {
        BaseSource::Image(base) => BaseSource::Image(BaseRef::Deprecated(Box::new(base))),
        parent => parent,
    };
    let cases = [
        ("from = \"./../base\"", BaseSource::Parent(top.path().join("web/./../base"))),
        ("from = { name = \"debian-12-*\" }", name("debian-12-*", None)),
        ("from = { name = \"d?\", owner = \"136693071363\" }", name("d?", Some("136693071363"))),
        ("[from]\nname = \"d\"\nowner = \"amazon\"", name("d", Some("amazon"))),
        ("from = { ssm = \"/aws/service/x\" }", BaseSource::Image(BaseRef::Ssm("/aws/service/x".into()))),
        ("from = { id = \"ami-01234567\" }", id("ami-01234567")),
        ("from = { id = \"ami-01234567\", deprecated = true }", deprecated(id("ami-01234567"))),
        (
            "from = { name = \"d\", owner = \"amazon\", deprecated = true }",
            deprecated(name("d", Some("amazon"))),
        ),
        ("from = { name = \"d\", deprecated = false }", name("d", None)),
        ("from = { tag = { role = \"base\" } }", tag("role", "base", None)),
        (
            "from = { tag = { \"oven:name\" = \"base\" }, owner = \"self\" }",
            tag("oven:name", "base", Some("self")),
        ),
        ("[from]\ntag.\"a = b\" = \"\"", tag("a = b", "", None)),
    ];
    for (toml, expected) in cases {
        assert_eq!(load(top.path(), toml).unwrap().from, expected, "{toml}");
    }
}

#[test]
fn mistakes_of_from_show_what_it_can_be() {
    let top = tree();
    let cases: &[(&str, &str)] = &[
        ("", "1: `from` is missing: write \"ami-…\" (an image), \"../base\""),
        ("from = \"debian-12\"", "1: `from` is \"debian-12\". Allowed are: \"ami-…\" (an image)"),
        (
            "from = \"ami-xyz\"",
            "1: `from` is \"ami-xyz\": an image's id is `ami-`, followed by 17 (or 8) digits",
        ),
        ("from = \"../gone\"", "1: `from` is \"../gone\", but DIR/web/../gone does not exist"),
        ("from = \"../empty\"", "1: `from` is \"../empty\", but DIR/web/../empty has no image.toml"),
        ("from = 1", "1: `from` is an integer: it should be \"ami-…\""),
        ("from = {}", "1: `from` needs one of `id`, `name`, `ssm` or `tag`"),
        ("from = { nam = \"a\" }", "1: unknown key `nam` of `from`: did you mean `name`?"),
        (
            "from = { name = \"a:b\" }",
            "1: `name` of `from` is \"a:b\": an image's name cannot contain the character ':'",
        ),
        (
            "from = { name = \"a\", owner = 136693071363 }",
            "1: `owner` of `from` is an integer: it should be an account's 12 digits in quotes",
        ),
        ("from = { name = \"a\", owner = \"me\" }", "1: `owner` of `from` is \"me\""),
        ("from = { name = \"a\", ssm = \"/b\" }", "1: `from` has both `name` and `ssm`: remove one"),
        ("from = { ssm = \"/b\", owner = \"self\" }", "1: `owner` of `from` works only with `name` or `tag`"),
        (
            "from = { id = \"ami-01234567\", owner = \"self\" }",
            "1: `owner` of `from` works only with `name` or `tag`",
        ),
        ("from = { id = \"ami-1\" }", "1: `id` of `from` is \"ami-1\": an image's id is `ami-`"),
        ("[from]\nid = \"web\"", "2: `id` of `from` is \"web\": an image's id is `ami-`"),
        (
            "from = { name = \"a\", deprecated = 1 }",
            "1: `deprecated` of `from` is an integer: it should be `true`",
        ),
        ("from = { deprecated = true }", "1: `from` needs one of `id`, `name`, `ssm` or `tag`"),
        (
            "from = { tag = \"role=base\" }",
            "1: `tag` of `from` is a string: it should be a table of one tag, { \"role\" = \"base\" }",
        ),
        ("from = { tag = 1 }", "1: `tag` of `from` is an integer: it should be a table of one tag, such as"),
        ("from = { tag = {} }", "1: `tag` of `from` has no tag: it should be a table of one tag"),
        ("from = { tag = { a = \"b\", c = \"d\" } }", "1: `tag` of `from` has several tags: it should be"),
        (
            "from = { tag = { a = 1 } }",
            "1: `a` of `tag` of `from` is an integer: it should be a quoted string",
        ),
        ("from = { tag = { a = \"b*\" } }", "1: `a` of `tag` of `from` is \"b*\": write the whole value"),
        ("from = { tag = { \"\" = \"b\" } }", "1: `` of `tag` of `from` is empty, but every tag needs a key"),
        ("from = { tag = { a = \"b\" }, owner = \"me\" }", "1: `owner` of `from` is \"me\""),
        ("from = { ssm = \"a b\" }", "1: `ssm` of `from` is \"a b\""),
    ];
    for (toml, expected) in cases {
        let error = load(top.path(), toml).unwrap_err();
        assert!(error.starts_with(&format!("DIR/web/image.toml:{expected}")), "{toml}\ngives {error}");
    }
}

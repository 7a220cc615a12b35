//! Groups, packages by URL, `[[repository]]`, `hold`, `debconf` and `upgrade`.

use super::*;

const KEY: &str =
    "-----BEGIN PGP PUBLIC KEY BLOCK-----\nVersion: 1\n\nmQ==\n=abcd\n-----END PGP PUBLIC KEY BLOCK-----\n";
const DIGEST: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// The tree of the other tests, with valid and invalid OpenPGP keys added.
fn with_keys() -> tempfile::TempDir {
    let top = tree();
    let dir = top.path().join("web/keys");
    std::fs::create_dir(&dir).unwrap();
    let write = |name: &str, content: &[u8]| std::fs::write(dir.join(name), content).unwrap();
    write("good.asc", format!("Our key:\r\n{}\r\nbye\r\n", KEY.replace('\n', "\r\n")).as_bytes());
    write("binary.gpg", b"\x99\x01\x0d\x04");
    write("private.asc", b"-----BEGIN PGP PRIVATE KEY BLOCK-----\n");
    write("short.asc", &KEY.as_bytes()[..KEY.len() - 20]);
    write("blank.asc", KEY.replace("\n\n", "\n").as_bytes());
    write("page.asc", b"<html>404</html>\n");
    write("huge.asc", &vec![b'x'; (1 << 20) + 1]);
    top
}

#[test]
fn every_key_is_read() {
    let top = with_keys();
    let toml = format!(
        "from = \"ami-0123456789abcdef0\"\nupgrade = \"security\"\nhold = [\"jq\", \"libc6:i386\"]\n\
         debconf = [\"tzdata  tzdata/Areas\\tselect Europe\", \"a a/b string \"]\n\
         packages = [\"@development-tools\", \"@^Server with GUI\", {{ url = \"https://x.example/a.deb?v=1\", sha256 = \"{}\" }}]\n\
         [[repository]]\nname = \"tools\"\nurl = \"https://x.example/debian/\"\nkey = \"keys/good.asc\"\n\
         suite = \"bookworm\"\ncomponents = [\"main\", \"non-free\"]\n\
         [[repository]]\nname = \"flat\"\nurl = \"http://x.example/flat\"\nsigned = false\nkeep = false\npriority = 1000\n",
        DIGEST.to_uppercase()
    );
    let web = load(top.path(), &toml).unwrap();
    assert_eq!(web.upgrade, Upgrade::Security);
    assert_eq!(web.hold, ["jq", "libc6:i386"]);
    assert_eq!(web.debconf, ["tzdata tzdata/Areas select Europe", "a a/b string "]);
    let group = |name: &str| PackageRequest::Group { name: name.into() };
    let url =
        PackageRequest::Url { url: "https://x.example/a.deb?v=1".into(), sha256: DIGEST.into(), file: None };
    assert_eq!(web.packages, [group("development-tools"), group("^Server with GUI"), url]);
    let tools = Repository {
        name: "tools".into(),
        url: "https://x.example/debian".into(),
        key: Some(KEY.into()),
        suite: Some("bookworm".into()),
        components: vec!["main".into(), "non-free".into()],
        keep: true,
        priority: None,
    };
    let flat = Repository {
        name: "flat".into(),
        url: "http://x.example/flat".into(),
        key: None,
        suite: None,
        components: Vec::new(),
        keep: false,
        priority: Some(1000),
    };
    assert_eq!(web.repositories, [tools, flat]);
}

#[test]
fn a_package_of_a_suite_is_read() {
    let top = with_keys();
    for (spelt, name, suite, version) in [
        ("golang-go/bookworm-backports", "golang-go", Some("bookworm-backports"), None),
        ("golang-go/bookworm-backports=2:1.2*", "golang-go", Some("bookworm-backports"), Some("2:1.2*")),
        ("libc6:i386/trixie", "libc6:i386", Some("trixie"), None),
        ("g++/stable", "g++", Some("stable"), None),
        ("redis-server=5:7.0.*", "redis-server", None, Some("5:7.0.*")),
    ] {
        let image = load(top.path(), &format!("from = \"ami-01234567\"\npackages = [{spelt:?}]")).unwrap();
        let (suite, version) = (suite.map(Into::into), version.map(Into::into));
        assert_eq!(image.packages, [PackageRequest::Named { name: name.into(), version, suite }], "{spelt}");
        assert!(image.place_of_package(Some(name)).to_string().ends_with("image.toml:2: `packages`"));
    }
}

#[test]
fn a_mistake_of_a_package_is_placed() {
    let top = with_keys();
    let image = load(
        top.path(),
        &format!(
            "from = \"ami-0123456789abcdef0\"\nhold = [\n \"jq\",\n \"tree\"]\npackages = [\n \"jq\",\n \
             {{ url = \"https://x.example/a.deb\", sha256 = \"{DIGEST}\" }}]\n"
        ),
    )
    .unwrap();
    let place = |name: &str| {
        image.place_of_package(Some(name)).to_string().replace(top.path().to_str().unwrap(), "DIR")
    };
    assert_eq!(place("tree"), "DIR/web/image.toml:4: `hold`");
    assert_eq!(place("jq"), "DIR/web/image.toml:6: `packages`");
    assert_eq!(place("https://x.example/a.deb"), "DIR/web/image.toml:7: `packages`");
    assert_eq!(place("other"), "DIR/web/image.toml:5: `packages`");
}

#[test]
fn each_mistake_names_line_and_key_and_what_to_do() {
    let top = with_keys();
    let start = "[[repository]]\nname = \"a\"\nurl = \"https://x.example\"\n";
    let with = |more: &str| format!("{start}{more}");
    let url = |url: &str| format!("packages = [{{ url = \"{url}\", sha256 = \"{DIGEST}\" }}]");
    let key = |file: &str| with(&format!("key = \"keys/{file}\""));
    let cases = [
        ("upgrade = 1".into(), "2: `upgrade` is an integer: it should be `true`"),
        ("repositry = []".into(), "2: unknown key `repositry`: did you mean `repository`?"),
        ("packages = [\"@\"]".into(), "2: `packages` has \"@\": write a group name after `@`"),
        (
            "packages = [\"@a;b\"]".into(),
            "2: `packages` has \"@a;b\": a group name cannot contain the character ';'",
        ),
        ("packages = [\"@a\", \"@a\"]".into(), "2: `packages` has @a twice"),
        (
            "packages = [\"https://x.example/a.deb\"]".into(),
            "2: `packages` has \"https://x.example/a.deb\": write a package from a URL as { url = \"…\", sha256 = \
             \"…\" }",
        ),
        (
            "packages = [{ url = \"https://x.example/a.deb\" }]".into(),
            "2: `sha256` of `packages` is missing: 64",
        ),
        (format!("packages = [{{ sha256 = \"{DIGEST}\" }}]"), "2: `url` of `packages` is missing"),
        (
            format!("packages = [\n{{ url = \"https://x.example/a.deb\", sha265 = \"{DIGEST}\" }}]"),
            "3: unknown key `sha265` of `packages`: did you mean `sha256`?",
        ),
        (
            "packages = [{ url = \"https://x.example/a.deb\", sha256 = \"abc\" }]".into(),
            "2: `sha256` of `packages` is \"abc\": it should be 64 hexadecimal digits",
        ),
        (
            url("file:///etc/passwd"),
            "2: `url` of `packages` is \"file:///etc/passwd\", which does not begin with `http://` or \
             `https://`",
        ),
        (url("x.deb"), "2: `url` of `packages` is \"x.deb\", which does not begin with `http://`"),
        (url("https:///x.deb"), "2: `url` of `packages` is \"https:///x.deb\", which has no host"),
        (
            url("https://me:secret@x.example/a.deb"),
            "2: `url` of `packages` contains a user name or a password",
        ),
        (
            format!(
                "{},\n{}",
                url("https://x.example/a.deb").trim_end_matches(']'),
                &url("https://x.example/a.deb")[12..]
            ),
            "3: `packages` has https://x.example/a.deb twice (first on line 2)",
        ),
        ("hold = \"jq\"".into(), "2: `hold` is a string: it should be an array of packages"),
        ("hold = [\"jq=1\"]".into(), "2: `hold` has \"jq=1\": list only names here"),
        ("hold = [\"-y\"]".into(), "2: `hold` has \"-y\": a package name cannot begin with `-`"),
        ("hold = [\"jq\",\n\"jq\"]".into(), "3: `hold` has jq twice (first on line 2)"),
        (
            "debconf = [\"tzdata\"]".into(),
            "2: `debconf` has \"tzdata \": write a package, a question, a type and a value",
        ),
        (
            "debconf = [\"a b/c strnig secret\"]".into(),
            "2: `debconf` has \"a b/c\" with the type \"strnig\": the valid types are `boolean`",
        ),
        (
            "debconf = [\"a b/c string x\\ny\"]".into(),
            "2: `debconf` has \"a b/c\", whose value has a control character",
        ),
        (
            "debconf = [\"a b/c string x\\\\\"]".into(),
            "2: `debconf` has \"a b/c\", whose value has a control character",
        ),
        (
            "debconf = [\"# b/c string x\"]".into(),
            "2: `debconf` has \"# b/c\": it must begin with a package name",
        ),
        (
            "[repository]\nname = \"a\"".into(),
            "2: `repository` is a table: it should be one or more tables, each under a header [[repository]]",
        ),
        (
            "[[repository]]\nurl = \"https://x\"\nsigned = false".into(),
            "2: `name` of [[repository]] is missing",
        ),
        ("[[repository]]\nname = \"a\"\nsigned = false".into(), "2: `url` of [[repository]] is missing"),
        (with(""), "2: `key` of [[repository]] is missing: a file with the repository's OpenPGP key"),
        (with("signed = true"), "2: `key` of [[repository]] is missing"),
        (
            with("singed = false\nkey = \"keys/good.asc\""),
            "5: unknown key `singed` of [[repository]]: did you mean `signed`?",
        ),
        (
            with("signed = false\nkey = \"keys/good.asc\""),
            "5: `signed` of [[repository]] is `false`, but `key` is set",
        ),
        (
            key("gone.asc"),
            "5: `key` of [[repository]] names \"keys/gone.asc\", but DIR/web/keys/gone.asc does not exist",
        ),
        (
            with("key = \"/etc/passwd\""),
            "5: `key` of [[repository]] has \"/etc/passwd\": paths must be relative",
        ),
        (key("binary.gpg"), "5: `key` of [[repository]] is \"keys/binary.gpg\", which is a binary key"),
        (key("private.asc"), "5: `key` of [[repository]] is \"keys/private.asc\", which is a private key"),
        (key("short.asc"), "5: `key` of [[repository]] is \"keys/short.asc\", whose key is incomplete"),
        (key("blank.asc"), "5: `key` of [[repository]] is \"keys/blank.asc\", whose key has no empty line"),
        (
            key("page.asc"),
            "5: `key` of [[repository]] is \"keys/page.asc\", which contains no ASCII-armoured OpenPGP key",
        ),
        (key("huge.asc"), "5: `key` of [[repository]] is \"keys/huge.asc\", which is larger than 1 MiB"),
        (
            with("signed = false\nsuite = \"a b\""),
            "6: `suite` of [[repository]] is \"a b\": it should be a suite's name",
        ),
        (
            with("signed = false\nsuite = \"../x\""),
            "6: `suite` of [[repository]] is \"../x\": it should be a suite's name",
        ),
        (
            with("signed = false\ncomponents = [\"a b\"]"),
            "6: `components` of [[repository]] has \"a b\", which is not a valid component name",
        ),
        (
            with("signed = false\nkeep = \"no\""),
            "6: `keep` of [[repository]] is a string: it should be `true` or",
        ),
        (
            with(&format!("signed = false\n{start}signed = false")),
            "7: `name` of [[repository]] is the same as on line 3",
        ),
        (
            "[[repository]]\nname = \"a/b\"\nurl = \"https://x\"\nsigned = false".into(),
            "3: `name` of [[repository]] is \"a/b\": use at most 64 letters",
        ),
        (
            "[[repository]]\nname = \"a\"\nurl = \"file:///srv\"\nsigned = false".into(),
            "4: `url` of [[repository]] is \"file:///srv\", which does not begin with",
        ),
    ];
    for (toml, expected) in cases {
        let error = load(top.path(), &format!("from = \"ami-0123456789abcdef0\"\n{toml}\n")).unwrap_err();
        let first = error.lines().next().unwrap();
        assert!(first.starts_with(&format!("DIR/web/image.toml:{expected}")), "{toml}\ngives {error}");
        assert!(!error.contains("secret"), "the message has a password: {error}");
    }
}

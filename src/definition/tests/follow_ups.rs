//! A mistake is reported once. What only follows from it is not reported.

use super::*;

/// For each case, the texts of the only error's lines, without `DIR/web/image.toml:`.
#[test]
fn a_mistake_has_one_error() {
    let top = tree();
    std::fs::write(top.path().join("web/port.conf"), "listen {{ port }}\n").unwrap();
    std::fs::create_dir(top.path().join("web/keys")).unwrap();
    let file = "[[file]]\nsource = \"port.conf\"\ntarget = \"/etc/x\"\ntemplate = true\n";
    let tool =
        "[[file]]\nsource = \"../common/tool\"\ntarget = \"/tool\"\n[[run]]\nscript = \"../common/tool\"";
    let repository = "[[repository]]\nname = \"x\"\nurl = \"https://x/\"\n";
    let from = "from = \"ami-01234567\"\n";
    let cases = [
        // A template's variable that has a mistake itself.
        (format!("{from}{file}[vars]\nport = 80"), "7: `port` of [vars] is an integer"),
        (format!("{from}{file}[vars]\nport = \"a\\u0000\""), "7: `port` of [vars] has a NUL character"),
        (format!("{from}{file}[vars]\nPATH = \"80\""), "7: `PATH` of [vars] cannot be a variable"),
        (format!("{from}{file}[var]\nport = \"80\""), "6: unknown key `var`: did you mean `vars`?"),
        (format!("{from}vars = \"port=80\"\n{file}"), "2: `vars` is a string"),
        // A required key that is misspelt.
        ("frm = \"ami-01234567\"".to_owned(), "1: unknown key `frm`: did you mean `from`?"),
        (
            format!("{from}[[file]]\nsorce = \"port.conf\"\ntarget = \"/x\""),
            "3: unknown key `sorce` of [[file]]",
        ),
        (format!("{from}[[ansible]]\nplaybok = \"x.yml\""), "3: unknown key `playbok` of [[ansible]]"),
        (format!("{from}{repository}keyy = \"a.asc\""), "5: unknown key `keyy` of [[repository]]"),
        (format!("{from}{repository}singed = false"), "5: unknown key `singed` of [[repository]]"),
        // A key that another one needs.
        (
            format!("{from}[disk]\nkms_key = \"alias/x\"\nencryptd = true"),
            "4: unknown key `encryptd` of [disk]",
        ),
        (
            format!("{from}[disk]\nkms_key = \"alias/x\"\nencrypted = \"yes\""),
            "4: `encrypted` of [disk] is a string",
        ),
        (format!("{from}[disk]\ntype = \"io2\"\niosp = 4000"), "4: unknown key `iosp` of [disk]"),
        (format!("{from}[disk]\ntype = \"io2\"\niops = \"4000\""), "4: `iops` of [disk] is a string"),
        // Files of a directory in `inputs` that has a mistake.
        (
            format!("{from}inputs = [\"../comon\"]\n{tool}"),
            "2: `inputs` names \"../comon\", but DIR/web/../comon does",
        ),
        (format!("{from}inputs = \"../common\"\n{tool}"), "2: `inputs` is a string"),
        (format!("{from}input = [\"../common\"]\n{tool}"), "2: unknown key `input`: did you mean `inputs`?"),
        // A path is shown without `./` inside.
        (
            format!("{from}packages = [\"./x.deb\"]"),
            "2: `packages` names \"./x.deb\", but DIR/web/x.deb does not",
        ),
        (
            format!("{from}[[file]]\nsource = \"./files/./x\"\ntarget = \"/x\""),
            "3: `source` of [[file]] names \"./files/./x\", but DIR/web/files/x does not exist",
        ),
        ("from = \"./gone\"".to_owned(), "1: `from` is \"./gone\", but DIR/web/gone does not exist"),
    ];
    for (toml, expected) in cases {
        let error = load(top.path(), &toml).unwrap_err();
        let only =
            error.strip_prefix("DIR/web/image.toml:").unwrap_or_else(|| panic!("{toml}\ngives {error}"));
        assert!(only.starts_with(expected) && only.lines().count() == 1, "{toml}\ngives {error}");
        assert!(!error.contains("DIR/web/./") && !error.contains("?."), "{error}");
    }
    // A mistake that does not follow from another one is reported as well.
    let error = load(top.path(), &format!("{from}{file}[vars]\nhost = \"a\"")).unwrap_err();
    assert!(error.contains("`port` is not defined"), "{error}");
}

#[test]
fn a_directory_whose_name_is_not_utf8_is_named() {
    use std::os::unix::ffi::OsStrExt;
    let top = tempfile::tempdir().unwrap();
    for (name, shown) in
        [(&b"w\xffeb"[..], "w\\xffeb"), (&b"\xc3"[..], "\\xc3"), (&b"\xe9t\xe9"[..], "\\xe9t\\xe9")]
    {
        let dir = top.path().join(std::ffi::OsStr::from_bytes(name));
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("image.toml"), "from = \"ami-01234567\"\n").unwrap();
        let error = format!("{:#}", Definition::load(&dir).unwrap_err());
        let expected =
            format!("image.toml:1: the directory's name \"{shown}\" is not valid UTF-8; set `name`");
        assert!(error.ends_with(&expected), "{error}");
        std::fs::write(dir.join("image.toml"), "name = \"web\"\nfrom = \"ami-01234567\"\n").unwrap();
        assert_eq!(Definition::load(&dir).unwrap().name, "web");
    }
}

mod attributes;
mod clean;
mod follow_ups;
mod from;
mod limits;
mod lines;
mod project;
mod repositories;
mod run;

use super::*;
use crate::error::hint_of;
use crate::formats::package::{self, fixture};
use crate::ids::ImageId;
use std::os::unix::fs::{PermissionsExt, symlink};

const GOOD: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/definitions/whole.toml"));

/// A temporary directory with the definitions `web` and `base`, and other directories that these definitions can use.
fn tree() -> tempfile::TempDir {
    let top = tempfile::tempdir().unwrap();
    let file = |path: &str, content: &[u8], mode: u32| {
        let path = top.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    file("web/image.toml", GOOD.as_bytes(), 0o644);
    file("web/files/nginx.conf", b"events {}\n", 0o644);
    file("web/setup.sh", b"#!/bin/sh\ntrue\n", 0o755);
    file("web/bare.sh", b"true\n", 0o755);
    file("web/windows.sh", b"#!/bin/sh\r\ntrue\r\n", 0o755);
    file("web/.env", b"SECRET=1\n", 0o644);
    file("web/site.deb", &fixture::deb("Package: site\nVersion: 1.0\nArchitecture: all\n", ".gz"), 0o644);
    file("web/broken.deb", b"?", 0o644);
    file("web/site.rpm", b"\xed\xab\xee\xdb\x03\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 0o644);
    file("base/image.toml", b"from = \"ami-0123456789abcdef0\"\n", 0o644);
    file("common/tool", b"#!/bin/sh\n", 0o755);
    file("outside/script", b"#!/bin/sh\n", 0o755);
    std::fs::create_dir(top.path().join("empty")).unwrap();
    symlink("nowhere", top.path().join("web/dangling")).unwrap();
    symlink("../outside", top.path().join("web/away")).unwrap();
    symlink("../outside/script", top.path().join("web/linked.sh")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, top.path().join("web/pipe"), rustix::fs::Mode::RWXU).unwrap();
    top
}

/// Writes a new file each time. If the same file were truncated and written again, ext4 would wait for the disk.
fn rewrite(top: &Path, toml: &[u8]) {
    std::fs::remove_file(top.join("web/image.toml")).unwrap();
    std::fs::write(top.join("web/image.toml"), toml).unwrap();
}

/// Loads `web` with another image.toml. In an error, `DIR` stands for the tree's directory.
fn load(top: &Path, toml: &str) -> Result<Definition, String> {
    rewrite(top, toml.as_bytes());
    Definition::load(&top.join("web")).map_err(|e| {
        assert_eq!(Kind::of(&e), Kind::Definition, "{e:#}");
        format!("{e:#}").replace(top.to_str().unwrap(), "DIR")
    })
}

#[test]
fn a_whole_definition_is_read() {
    let top = tree();
    let dir = top.path().join("web");
    let web = Definition::load(&dir).unwrap();
    let named = |name: &str, version: Option<&str>| PackageRequest::Named {
        name: name.into(),
        version: version.map(Into::into),
        suite: None,
    };
    assert_eq!((&*web.name, &*web.description), ("web", "A web server"));
    assert_eq!(web.from, BaseSource::Parent(dir.join("../base")));
    assert_eq!(web.packages[..2], [named("nginx-light", None), named("redis-server", Some("5:7.0.*"))]);
    let PackageRequest::File { source, package } = &web.packages[2] else { panic!("{:?}", web.packages[2]) };
    assert_eq!((source, &*package.name, &*package.version), (&dir.join("./site.deb"), "site", "1.0"));
    assert_eq!(web.packages[3], named("libc6:i386", None));
    let file = |source: &str, target: &str, mode, owner: &str, group: &str| File {
        source: dir.join(source),
        target: target.into(),
        mode,
        owner: owner.into(),
        group: group.into(),
        template: false,
        after_run: false,
    };
    let nginx = file("files/nginx.conf", "/etc/nginx/nginx.conf", 0o640, "www-data", "33");
    assert_eq!(web.files, [nginx, file("../common/tool", "/usr/local/bin/tool", 0o755, "root", "root")]);
    let script = |kind, line, script: &str, network, timeout| Script {
        kind,
        line,
        program: Program::Script(script.into()),
        args: Vec::new(),
        env: BTreeMap::new(),
        secrets: Vec::new(),
        network,
        retries: 0,
        timeout,
    };
    assert_eq!(web.runs, [script(ScriptKind::Run, 23, "setup.sh", true, 60)]);
    assert_eq!(web.tests, [script(ScriptKind::Test, 28, "../common/tool", false, 3600)]);
    assert_eq!(web.size_gib, Some(8));
    let text = |text: &str| Some(text.to_owned());
    let volume = VolumeKind {
        volume_type: text("gp3"),
        iops: Some(4000),
        throughput: Some(250),
        encrypted: Some(true),
        kms_key: text("alias/images"),
    };
    assert_eq!(web.volume, volume);
    let registered = RegistrationSettings {
        boot_mode: text("uefi"),
        ena: Some(true),
        sriov: Some(text("simple")),
        tpm: Some(text("v2.0")),
        imds: Some(None),
    };
    assert_eq!(web.registered, registered);
    assert_eq!(web.tags["Team Name"], "größer");
    assert_eq!(web.keep, ["/var/log/app"]);
    assert_eq!(web.remove, ["/etc/app/*.key"]);
    assert_eq!(web.distro, None);
    assert_eq!(web.conffiles, Conffiles::Replace);
    assert_eq!(web.upgrade, Upgrade::All);
    assert!(web.recommends && web.network && web.imds);
    assert_eq!(web.directories(), [dir.clone(), dir.join("../common")]);
}

#[test]
fn the_least_definition_has_defaults() {
    let top = tree();
    let web = load(top.path(), "from = \"ami-0123456789abcdef0\"").unwrap();
    assert_eq!(web.name, "web");
    assert_eq!(web.from, BaseSource::Image(BaseRef::Id(ImageId("ami-0123456789abcdef0".into()))));
    assert_eq!(web.upgrade, Upgrade::None);
    assert_eq!((&web.repositories[..], &web.hold[..], &web.debconf[..]), (&[][..], &[][..], &[][..]));
    assert!(!(web.recommends || web.network || web.imds));
    assert_eq!((web.conffiles, web.size_gib), (Conffiles::Keep, None));
    assert_eq!((web.volume, web.registered), Default::default());
}

#[test]
fn the_name_is_that_of_the_real_directory() {
    let top = tree();
    symlink("web", top.path().join("alias")).unwrap();
    std::fs::write(top.path().join("web/image.toml"), "from = \"ami-01234567\"").unwrap();
    assert_eq!(Definition::load(&top.path().join("alias")).unwrap().name, "web");
    assert_eq!(Definition::load(&top.path().join("base/../web/.")).unwrap().name, "web");
    std::fs::rename(top.path().join("web"), top.path().join("wéb")).unwrap();
    let error = Definition::load(&top.path().join("wéb")).unwrap_err().to_string();
    assert!(error.contains("image.toml:1: the directory's name \"wéb\" has the character 'é'"), "{error}");
    assert!(error.ends_with("set `name`"), "{error}");
}

/// Each case has two texts. The first follows `from` in image.toml. The second is the error that the first causes,
/// without the prefix `DIR/web/image.toml:`.
#[test]
fn each_mistake_names_line_and_key_and_what_to_do() {
    let top = tree();
    let long = "x".repeat(107);
    let cases: &[(&str, &str)] = &[
        ("packges = []", "2: unknown key `packges`: did you mean `packages`?"),
        ("zzz = 1", "2: unknown key `zzz`: the valid keys are `ansible`, `clean`, `conffiles`,"),
        ("[disk]\nsize = 8", "3: unknown key `size` of [disk]: did you mean `size_gib`?"),
        (
            "[[run]]\nscript = \"setup.sh\"\nupgrade = true",
            "4: unknown key `upgrade` of [[run]]: it belongs above",
        ),
        ("packages = [", "2: "),
        ("name = \"a\"\nname = \"b\"", "3: not valid TOML: duplicate key"),
        ("packages = \"nginx\"", "2: `packages` is a string: it should be an array of packages"),
        ("packages = [1]", "2: `packages` has an integer: it should be an array"),
        ("packages = [\n \"a\",\n \"\"]", "4: `packages` has an empty string"),
        ("packages = [\"a b\"]", "2: `packages` has \"a b\": write each package as a separate string"),
        (
            "packages = [\"a;reboot\"]",
            "2: `packages` has \"a;reboot\": a package name cannot contain the character ';'",
        ),
        (
            "packages = [\"$(reboot)\"]",
            "2: `packages` has \"$(reboot)\": a package name cannot contain the character '$'",
        ),
        ("packages = [\"-y\"]", "2: `packages` has \"-y\": a package name cannot begin with `-`"),
        ("packages = [\"a-\"]", "2: `packages` has \"a-\": a package name cannot end with `-`"),
        ("packages = [\"a=\"]", "2: `packages` has \"a=\": write a version after `=`"),
        ("packages = [\"=1\"]", "2: `packages` has \"=1\": write a package name before `=`"),
        ("packages = [\"a=1 2\"]", "2: `packages` has \"a=1 2\": a version cannot contain the character ' '"),
        ("packages = [\"a=1/2\"]", "2: `packages` has \"a=1/2\": a version cannot contain the character '/'"),
        ("packages = [\"a=-1\"]", "2: `packages` has \"a=-1\": a version must begin with"),
        ("packages = [\"a==1\"]", "2: `packages` has \"a==1\": pin a version as"),
        ("packages = [\"a>=1\"]", "2: `packages` has \"a>=1\": pin a version as"),
        (
            "packages = [\"a/bookworm/main\"]",
            "2: `packages` has \"a/bookworm/main\": a suite cannot contain the character '/'",
        ),
        ("packages = [\"a/\"]", "2: `packages` has \"a/\": write a suite after `/`"),
        ("packages = [\"a/=1\"]", "2: `packages` has \"a/=1\": write a suite after `/`"),
        ("packages = [\"a/-x\"]", "2: `packages` has \"a/-x\": write a suite after `/`"),
        ("packages = [\"a/b=\"]", "2: `packages` has \"a/b=\": write a version after `=`"),
        ("packages = [\"/b\"]", "2: `packages` has \"/b\": paths must be relative"),
        ("packages = [\"=1\"]", "2: `packages` has \"=1\": write a package name before"),
        ("packages = [\"a\", \"a/b\"]", "2: `packages` has a twice (first on line 2)"),
        ("hold = [\"a/b\"]", "2: `hold` has \"a/b\": a package name cannot contain `/`"),
        ("packages = [\"a:\"]", "2: `packages` has \"a:\": write an architecture after `:`"),
        ("packages = [\"a\", \"a=1\"]", "2: `packages` has a twice (first on line 2)"),
        (
            "packages = [\"site.deb\"]",
            "2: `packages` has \"site.deb\": write a package file in the definition's directory as \"./site.deb\"",
        ),
        (
            "packages = [\"./gone.deb\"]",
            "2: `packages` names \"./gone.deb\", but DIR/web/gone.deb does not exist",
        ),
        (
            "packages = [\"./broken.deb\"]",
            "2: `packages` names \"./broken.deb\": it is neither a Debian nor an rpm package",
        ),
        (
            "packages = [\"./site.rpm\"]",
            "2: `packages` names \"./site.rpm\": it is not a complete rpm package: it was cut short",
        ),
        ("packages = [\"./pipe\"]", "2: `packages` is \"./pipe\", which is a FIFO: it must be a file"),
        ("packages = [\"/tmp/a.deb\"]", "2: `packages` has \"/tmp/a.deb\": paths must be relative"),
        ("name = 1", "2: `name` is an integer: it should be a name"),
        ("name = \"\"", "2: `name` is empty"),
        ("name = \"a:b\"", "2: `name` has the character ':'"),
        ("name = \" a\"", "2: `name` begins or ends with a space"),
        (&format!("name = \"{long}\""), "2: `name` has 107 characters, but at most 106 are allowed"),
        ("description = \"a\\nb\"", "2: `description` has a control character"),
        (
            "upgrade = \"yes\"",
            "2: `upgrade` is \"yes\": it should be `true` (all packages), `false` or \"security\"",
        ),
        ("distro = \"De bian\"", "2: `distro` is \"De bian\": it should be a plugin's name"),
        ("distro = \"\"", "2: `distro` is \"\""),
        ("selinux = \"off\"", "2: `selinux` is \"off\": it should be \"label\""),
        ("conffiles = \"mine\"", "2: `conffiles` is \"mine\": it should be \"keep\""),
        ("packages = [\"a\", [\"b\"]]", "2: `packages` has an array: it should be"),
        ("hold = [3]", "2: `hold` has an integer: it should be"),
        ("inputs = [true]", "2: `inputs` has a boolean: it should be"),
        (
            "[[repository]]\nname = \"a\"\nurl = \"https://x.example/\"\nsigned = false\npriority = \"high\"",
            "6: `priority` of [[repository]] is a string: it should be an integer (as apt counts), such as 600",
        ),
        ("[disk]\nsize_gib = 0", "3: `size_gib` of [disk] is 0: it should be 1 to 65536 GiB"),
        ("[disk]\nsize_gib = -1", "3: `size_gib` of [disk] is -1:"),
        (
            "[disk]\nsize_gib = \"8\"",
            "3: `size_gib` of [disk] is a string: it should be an integer (GiB), such as 8",
        ),
        ("disk = 8", "2: `disk` is an integer: it should be a table: [disk]"),
        (
            "[file]\nsource = \"a\"",
            "2: `file` is a table: it should be one or more tables, each under a header [[file]]",
        ),
        ("[[file]]\nsource = \"setup.sh\"", "2: `target` of [[file]] is missing"),
        ("[[file]]\ntarget = \"/a\"", "2: `source` of [[file]] is missing"),
        (
            "[[file]]\nsource = \"gone\"\ntarget = \"/a\"",
            "3: `source` of [[file]] names \"gone\", but DIR/web/gone does not exist",
        ),
        (
            "[[file]]\nsource = \"files\"\ntarget = \"/a\"",
            "3: `source` of [[file]] is \"files\", which is a directory",
        ),
        (
            "[[file]]\nsource = \"files/\"\ntarget = \"/a\"",
            "3: `source` of [[file]] is \"files/\": it must be a file",
        ),
        (
            "[[file]]\nsource = \"/etc/passwd\"\ntarget = \"/a\"",
            "3: `source` of [[file]] has \"/etc/passwd\": paths must be relative",
        ),
        (
            "[[file]]\nsource = \"../outside/script\"\ntarget = \"/a\"",
            "3: `source` of [[file]] is \"../outside/script\", which is outside the definition: list its directory \
             in `inputs`",
        ),
        (
            "[[file]]\nsource = \"away/script\"\ntarget = \"/a\"",
            "3: `source` of [[file]] is \"away/script\", which is outside",
        ),
        (
            "[[file]]\nsource = \"dangling\"\ntarget = \"/a\"",
            "3: `source` of [[file]] names \"dangling\", a symbolic link whose target does not exist",
        ),
        (
            "[[file]]\nsource = \"pipe\"\ntarget = \"/a\"",
            "3: `source` of [[file]] is \"pipe\", which is a FIFO",
        ),
        (
            "[[file]]\nsource = \".env\"\ntarget = \"/a\"",
            "3: `source` of [[file]] is \".env\": rename the file, because files whose names begin with a dot are not part of the checksum",
        ),
        ("[[file]]\nsource = \"\"\ntarget = \"/a\"", "3: `source` of [[file]] is empty"),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"etc/a\"",
            "4: `target` of [[file]] is \"etc/a\": a path in the image begins with `/`",
        ),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/etc/../a\"",
            "4: `target` of [[file]] is \"/etc/../a\": write the path without `..`",
        ),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/etc//a\"",
            "4: `target` of [[file]] is \"/etc//a\": replace `//` with `/`",
        ),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/etc/\"",
            "4: `target` of [[file]] is \"/etc/\": add the file's name",
        ),
        ("[[file]]\nsource = \"setup.sh\"\ntarget = \"/run/a\"", "4: `target` of [[file]] is below /run"),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/tmp/a\"",
            "4: `target` of [[file]] is below /tmp: oven empties",
        ),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/var/tmp/a/b\"",
            "4: `target` of [[file]] is below /var/tmp",
        ),
        ("[[file]]\nsource = \"setup.sh\"\ntarget = \"/\"", "4: `target` of [[file]] is the root"),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/a\"\nmode = 644",
            "5: `mode` of [[file]] is an integer: it should be octal digits in quotes",
        ),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/a\"\nmode = \"0844\"",
            "5: `mode` of [[file]] is \"0844\": it should be three or four octal",
        ),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/a\"\nmode = \"rw-\"",
            "5: `mode` of [[file]] is \"rw-\"",
        ),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/a\"\nowner = \"a:b\"",
            "5: `owner` of [[file]] is \"a:b\"",
        ),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/a\"\ngroup = \"4294967295\"",
            "5: `group` of [[file]] is \"4294967295\"",
        ),
        (
            "[[file]]\nsource = \"setup.sh\"\ntarget = \"/a\"\n[[file]]\nsource = \"setup.sh\"\ntarget = \"/a\"",
            "7: `target` of [[file]] is the same as on line 4",
        ),
        (
            "[[run]]\nscript = \"../setup.sh\"",
            "3: `script` of [[run]] is \"../setup.sh\", which is outside the definition",
        ),
        (
            "[[run]]\nscript = \"../web/../outside/script\"",
            "3: `script` of [[run]] is \"../web/../outside/script\", which is outside",
        ),
        (
            "[[run]]\nscript = \"gone.sh\"",
            "3: `script` of [[run]] names \"gone.sh\", but DIR/web/gone.sh does not exist",
        ),
        ("[[run]]\nscript = \"bare.sh\"", "3: `script` of [[run]] is \"bare.sh\", which has no `#!` line"),
        (
            "[[run]]\nscript = \"windows.sh\"",
            "3: `script` of [[run]] is \"windows.sh\", which has Windows line endings",
        ),
        (
            "[[run]]\nscript = \"setup.sh\"\ntimeout = 0",
            "4: `timeout` of [[run]] is 0: it should be 1 to 604800 seconds",
        ),
        ("[[test]]\nscrpt = \"setup.sh\"", "3: unknown key `scrpt` of [[test]]: did you mean `script`?"),
        ("inputs = [\"../gone\"]", "2: `inputs` names \"../gone\", but DIR/web/../gone does not exist"),
        ("inputs = [\"files\"]", "2: `inputs` has \"files\", which is already part of the definition"),
        ("inputs = [\"../common\", \"../common/\"]", "2: `inputs` has \"../common/\" twice"),
        (
            "inputs = [\"../common/tool\"]",
            "2: `inputs` has \"../common/tool\", which is a file: list its directory",
        ),
        ("inputs = [\"/etc\"]", "2: `inputs` has \"/etc\": paths must be relative"),
        ("[tags]\n\"oven:name\" = \"a\"", "3: `oven:name` of [tags] is a tag that oven sets itself"),
        ("[tags]\nami_config_checksum = \"a\"", "3: `ami_config_checksum` of [tags] is a tag that oven sets"),
        ("[tags]\n\"AWS:name\" = \"a\"", "3: `AWS:name` of [tags] begins with `aws:`"),
        ("[tags]\n\"\" = \"a\"", "3: `` of [tags] is empty"),
        (
            &format!("[tags]\n{} = \"a\"", "k".repeat(129)),
            "has 129 characters, but a tag's key has at most 128",
        ),
        (
            &format!("[tags]\nk = \"{}\"", "v".repeat(257)),
            "3: `k` of [tags] has 257 characters, but at most 256 are allowed",
        ),
        ("[tags]\nk = 1", "3: `k` of [tags] is an integer: it should be a quoted string"),
        (
            "[clean]\nremove = [\"/a\", \"etc/x\"]",
            "3: `remove` of [clean] is \"etc/x\": a path in the image begins",
        ),
        ("[clean]\nkeep = [\"var/log\"]", "3: `keep` of [clean] is \"var/log\": a path in the image begins"),
    ];
    for (toml, expected) in cases {
        let error = load(top.path(), &format!("from = \"ami-0123456789abcdef0\"\n{toml}\n")).unwrap_err();
        let first = error.lines().next().unwrap();
        assert!(
            first.starts_with("DIR/web/image.toml:") && error.contains(expected),
            "{toml}\ngives {error}"
        );
    }
}

#[test]
fn mistakes_of_syntax_name_line_and_column_and_quote_nothing() {
    let top = tree();
    let cases: &[(&str, &str)] = &[
        ("name = web", "2: not valid TOML: "),
        ("name = web", "; write a string in quotes\n    | name = …\n    |        ^"),
        ("  size_gib   = web", "\n    | size_gib   = …\n    |              ^"),
        ("packages = [", "\n    | packages = …\n    |            ^"),
        ("[disk", "\n    | [disk\n    |     ^"),
        (
            "mode = 0644",
            "unexpected leading zero, expected nothing; write a mode in quotes, such as \"0644\"",
        ),
        ("from = \"../x\"", "2: not valid TOML: duplicate key"),
        ("packages = [", "not valid TOML: unclosed array"),
        ("[disk", "unclosed table, expected `]`"),
        // The parser notices these mistakes only on the next line.
        (
            "[run.env]\nx = { a = 1\n\nname = 1",
            ":3: not valid TOML: `,` or `}` is missing at the end of the line\n    | x = …\n    |     ^",
        ),
        ("x = { a = 1\n[disk]", ":2: not valid TOML: `,` or `}` is missing at the end of the line"),
        (
            "hold = [\n\"a\"\n\"b\"]",
            ":3: not valid TOML in column 3: `,` or `]` is missing at the end of the line",
        ),
        ("c2VjcmV0 c2VjcmV0==", "2: not valid TOML in column "),
        ("PASSWORD: c2VjcmV0", "2: not valid TOML in column "),
        ("[c2VjcmV0", "2: not valid TOML in column "),
        ("c2VjcmV0 = c2VjcmV0", "2: not valid TOML in column "),
        ("'c2VjcmV0", "2: not valid TOML in column "),
        ("x = \"c2VjcmV0\\q\"", "2: not valid TOML: "),
        ("x.c2VjcmV0 = 1\nx.c2VjcmV0 = 2", "duplicate key"),
    ];
    for (toml, expected) in cases {
        let error = load(top.path(), &format!("from = \"ami-0123456789abcdef0\"\n{toml}\n")).unwrap_err();
        assert!(
            error.starts_with("DIR/web/image.toml:") && error.contains(expected),
            "{toml}\ngives {error}"
        );
        assert!(!error.contains("c2VjcmV0") && !error.contains("PASSWORD"), "{error}");
    }
}

#[test]
fn all_mistakes_are_reported_in_the_order_of_lines() {
    let top = tree();
    let error = load(top.path(), "upgrade = 1\nfrom = \"x\"\n[disk]\nsize_gib = 0\n").unwrap_err();
    let lines: Vec<_> = error.lines().map(|line| line.split('`').next().unwrap()).collect();
    assert_eq!(lines, ["DIR/web/image.toml:1: ", "DIR/web/image.toml:2: ", "DIR/web/image.toml:4: "]);
    let many: String = (0..30).map(|i| format!("zz{i} = 1\n")).collect();
    assert!(
        load(top.path(), &format!("from = \"ami-01234567\"\n{many}")).unwrap_err().ends_with("\nand 10 more")
    );
}

#[test]
fn tags_leave_room_for_ours() {
    let top = tree();
    let tags = |count: usize| {
        let tags: String = (0..count).map(|i| format!("t{i} = \"\"\n")).collect();
        load(top.path(), &format!("from = \"ami-01234567\"\n[tags]\n{tags}"))
    };
    assert_eq!(tags(41).unwrap().tags.len(), 41);
    let error = tags(42).unwrap_err();
    assert!(
        error.contains(
            ":2: [tags] has 42 tags, but at most 41 are allowed, because EC2 allows 50 and oven needs 9 of them"
        ),
        "{error}"
    );
}

#[test]
fn a_directory_that_is_no_definition_is_refused() {
    let top = tree();
    let error = |path: &str| {
        let error = Definition::load(&top.path().join(path)).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Definition);
        (
            format!("{error:#}").replace(top.path().to_str().unwrap(), "DIR"),
            hint_of(&error).unwrap_or_default(),
        )
    };
    assert_eq!(error("gone").0, "DIR/gone: directory not found");
    assert_eq!(error("empty").0, "DIR/empty/image.toml: file not found");
    let (message, hint) = error("web/image.toml");
    assert_eq!(message, "DIR/web/image.toml is a file, but a definition is a directory");
    assert!(hint.ends_with("/web"), "{hint}");
    std::fs::create_dir(top.path().join("empty/image.toml")).unwrap();
    assert_eq!(error("empty").0, "DIR/empty/image.toml: is a directory, not a file");
    std::fs::write(top.path().join("web/image.toml"), b"from = 1\n# \xff").unwrap();
    assert_eq!(error("web").0, "DIR/web/image.toml:2: the line is not valid UTF-8");
    std::fs::write(top.path().join("web/image.toml"), " ".repeat((1 << 20) + 1)).unwrap();
    assert!(error("web").0.contains("larger than 1 MiB"));
}

#[test]
fn a_later_failure_finds_its_line() {
    let top = tree();
    let web = Definition::load(&top.path().join("web")).unwrap();
    let place = |key, value| web.place(key, value).to_string().replace(top.path().to_str().unwrap(), "DIR");
    assert_eq!(place("from", None), "DIR/web/image.toml:3: `from`");
    assert_eq!(place("packages", Some("redis-server")), "DIR/web/image.toml:4: `packages`");
    assert_eq!(place("conffiles", Some("gone")), "DIR/web/image.toml:8: `conffiles`");
    assert_eq!(place("disk.iops", None), "DIR/web/image.toml:34: `iops` of [disk]");
    assert_eq!(place("disk.gone", None), "DIR/web/image.toml:31: `gone` of [disk]");
    assert_eq!(place("gone.gone", None), "DIR/web/image.toml: `gone` of [gone]");
    assert_eq!(place("gone", None), "DIR/web/image.toml: `gone`");
}

#[test]
fn directories_are_spelt_without_a_slash_at_the_end() {
    let cases = [("web", "web"), ("web//", "web"), (".", "."), ("/", "/"), ("//", "/"), ("./web/", "./web")];
    for (dir, spelt) in cases {
        let directories = paths::directories(Path::new(dir), &["../common".into()]);
        assert_eq!(directories[0].as_os_str(), spelt);
        assert_eq!(directories[1].as_os_str(), format!("{}/../common", spelt.trim_end_matches('/')).as_str());
    }
}

/// A small generator of pseudo-random numbers. Its numbers are always the same, so a failure can be repeated.
fn next(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 16) as usize
}

#[test]
fn no_image_toml_makes_the_parser_panic() {
    let top = tree();
    let (mut state, mut refused) = (0x9e37_79b9_7f4a_7c15, 0);
    let pieces: &[&[u8]] = &[
        b"\"",
        b"[",
        b"]]",
        b"{",
        b"=",
        b"\n",
        b"\\",
        b"\0",
        b"\xff",
        "é".as_bytes(),
        b"..",
        b"/",
        b"-1",
        b"'''",
    ];
    for _ in 0..1000 {
        let mut bytes = GOOD.as_bytes().to_vec();
        for _ in 0..=next(&mut state) % 4 {
            // With `+ 1`, bytes can also be added at the end, and the divisor is not zero if the file is empty.
            let at = next(&mut state) % (bytes.len() + 1);
            let length = (next(&mut state) % 8).min(bytes.len() - at);
            match next(&mut state) % 4 {
                0 => drop(bytes.drain(at..at + length)),
                1 if at < bytes.len() => bytes[at] = next(&mut state) as u8,
                2 => {
                    let piece = pieces[next(&mut state) % pieces.len()];
                    drop(bytes.splice(at..at + length, piece.iter().copied()));
                }
                _ => bytes.truncate(at),
            }
        }
        rewrite(top.path(), &bytes);
        if let Err(error) = Definition::load(&top.path().join("web")) {
            refused += 1;
            let text = format!("{error:#}");
            assert!(
                text.contains("image.toml:"),
                "names no place: {text}\n{}",
                String::from_utf8_lossy(&bytes)
            );
        }
    }
    assert!(
        (500..1000).contains(&refused),
        "{refused} of 1000 were refused: the mutations do not test enough"
    );
}

use super::*;
use crate::cloud::BaseRef;
use crate::definition::BaseSource;
use serde_json::json;
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

fn base() -> Base {
    Base {
        id: ImageId("ami-0123456789abcdef0".into()),
        name: "debian".into(),
        snapshot: SnapshotId("snap-0123456789abcdef0".into()),
        architecture: Architecture::X86_64,
        size_gib: 8,
        root_device: "/dev/xvda".into(),
        attributes: Default::default(),
    }
}

/// A definition `web` with these files, in a temporary directory.
fn web(files: &[(&str, &str)]) -> (tempfile::TempDir, Definition) {
    let top = tempfile::tempdir().unwrap();
    write(top.path(), "web/image.toml", "from = \"ami-0123456789abcdef0\"\n");
    files.iter().for_each(|(path, content)| write(top.path(), &format!("web/{path}"), content));
    let image = Definition::load(&top.path().join("web")).unwrap();
    (top, image)
}

fn write(top: &Path, path: &str, content: &str) {
    let path = top.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

fn inputs(image: &Definition) -> Inputs {
    Inputs::of(image, &base(), &Settings::default()).unwrap()
}

/// The explanations from the stored JSON, and from the tag.
fn explained(old: &Inputs, new: &Inputs) -> (Vec<String>, Vec<String>) {
    let json = PreviousInputs::of(Some(&old.to_json()), Some("garbage")).unwrap();
    let tag = PreviousInputs::of(None, Some(&old.digest())).unwrap();
    (explain(&json, new), explain(&tag, new))
}

#[test]
fn the_json_is_canonical() {
    let (top, image) = web(&[("setup.sh", "#!/bin/sh\n")]);
    std::fs::set_permissions(top.path().join("web/setup.sh"), Permissions::from_mode(0o755)).unwrap();
    let inputs = inputs(&image);
    // Each `sha1` is the one that `sha1sum` prints. The fingerprint is the SHA1 of this text.
    let expected = concat!(
        r#"{"architecture":"x86_64","base":{"id":"ami-0123456789abcdef0","snapshot":"snap-0123456789abcdef0"},"#,
        r#""checksum":"6888762048223e8edbf42063b22f5f65241e8a60","#,
        r#""files":{"image.toml":{"sha1":"f9a431db20c0a86b8fbc1e9ab4261ce3997ca3c4"},"#,
        r#""setup.sh":{"executable":true,"sha1":"bd971bec88149956458a10fc9c5ecb3eb99dd452"}},"format":3,"name":"web"}"#
    );
    assert_eq!(inputs.to_json(), expected);
    assert_eq!(inputs.fingerprint(), "131dd3da110c5b065f9290d2900224580ff86ddc");
    let parsed: serde_json::Value = serde_json::from_str(expected).unwrap();
    let sorted: BTreeMap<String, serde_json::Value> = serde_json::from_value(parsed).unwrap();
    assert_eq!(serde_json::to_string(&sorted).unwrap(), expected, "the fields are declared in another order");
}

/// Every key of `[[run]]` and `[[ansible]]` changes the fingerprint, because the fingerprint covers the bytes of
/// image.toml. It also covers the values of variables, both from image.toml and from the command line.
#[test]
fn provisioners_and_variables_count() {
    let top = tempfile::tempdir().unwrap();
    for file in ["a.sh", "b.sh"] {
        write(top.path(), &format!("web/{file}"), "#!/bin/sh\n");
    }
    let of = |toml: &str, given: &[(&str, &str)]| {
        let head = "from = \"ami-0123456789abcdef0\"\n";
        write(top.path(), "web/image.toml", &format!("{head}{toml}\n"));
        let given = given.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        inputs(&Definition::load_with(&top.path().join("web"), &given).unwrap())
    };
    let mut prints = std::collections::BTreeSet::new();
    let run = "[[run]]\nscript = \"a.sh\"";
    let all = [
        String::new(),
        run.into(),
        "[[run]]\nscript = \"b.sh\"".into(),
        "[[run]]\ncommand = [\"a.sh\"]".into(),
        format!("{run}\nargs = [\"x\"]"),
        format!("{run}\nenv = {{ A = \"x\" }}"),
        format!("{run}\nretries = 1"),
        format!("{run}\ntimeout = 9"),
        format!("{run}\nnetwork = true"),
        format!("{run}\nsecrets = [\"TOKEN\"]"),
        format!("{run}\nsecrets = [\"OTHER\"]"),
        "[[test]]\nbats = \"a.sh\"".into(),
        "[[ansible]]\nplaybook = \"a.sh\"".into(),
        "[[ansible]]\nplaybook = \"a.sh\"\ntags = [\"x\"]".into(),
        "[[ansible]]\nplaybook = \"a.sh\"\nvars = { x = 1 }".into(),
        "[[file]]\nsource = \"a.sh\"\ntarget = \"/a\"".into(),
        "[[file]]\nsource = \"a.sh\"\ntarget = \"/a\"\ntemplate = true".into(),
        "[vars]\nx = \"1\"".into(),
    ];
    for toml in &all {
        assert!(prints.insert(of(toml, &[]).fingerprint()), "{toml}");
    }
    let vars = "[vars]\nx = \"1\"\ny = \"2\"";
    let plain = of(vars, &[]);
    assert!(
        plain.to_json().ends_with(r#""format":3,"name":"web","vars":{"x":"1","y":"2"}}"#),
        "{}",
        plain.to_json()
    );
    assert_eq!(of(vars, &[("x", "1")]).fingerprint(), plain.fingerprint(), "the same, said twice");
    let other = of(vars, &[("x", "3")]);
    assert_ne!(other.fingerprint(), plain.fingerprint());
    assert_eq!(other.checksum(), plain.checksum(), "GumGum's knows no variables");
    assert_eq!(
        explained(&plain, &other),
        (vec![r#"the variable x changed: "1" -> "3""#.into()], vec!["the variable x changed".into()])
    );
    let (mut none, mut long) = (plain.clone(), plain.clone());
    none.vars.remove("x");
    long.vars.insert("x".into(), "z".repeat(99));
    assert_eq!(explained(&none, &plain).0, [r#"the variable x is new: "1""#]);
    assert_eq!(explained(&none, &plain).1, ["the variable x is new"]);
    assert_eq!(explained(&plain, &none).0, ["the variable x was removed"]);
    assert!(explained(&plain, &long).0[0].ends_with(&format!("\"{}\"…", "z".repeat(60))));
    // The same text, split differently between two values, gives another digest.
    let moved =
        Inputs { vars: [("x", "12"), ("y", "")].map(|(n, v)| (n.into(), v.into())).into(), ..plain.clone() };
    assert_ne!(plain.digest(), moved.digest());
}

/// If the definition sets no name, its name is the name of the directory. No file contains this name, but the
/// fingerprint depends on it.
#[test]
fn of_two_families_with_equal_files_each_has_its_own_images() {
    let (top, web) = web(&[("setup.sh", "x")]);
    for (path, content) in [("image.toml", "from = \"ami-0123456789abcdef0\"\n"), ("setup.sh", "x")] {
        write(top.path(), &format!("shop/{path}"), content);
        write(top.path(), &format!("elsewhere/web/{path}"), content);
    }
    let of = |dir: &str| inputs(&Definition::load(&top.path().join(dir)).unwrap());
    let (web, shop, same) = (inputs(&web), of("shop"), of("elsewhere/web"));
    assert_eq!(web.checksum(), shop.checksum());
    assert_ne!(web.fingerprint(), shop.fingerprint());
    assert_eq!(web.fingerprint(), same.fingerprint());
}

/// Inputs that are stored with older images can still be read.
#[test]
fn inputs_without_a_family_are_read() {
    let (_top, image) = web(&[("x", "1")]);
    let inputs = inputs(&image);
    let json = inputs.to_json().replace(r#","name":"web""#, "");
    assert!(!json.contains("web"));
    assert_eq!(explain(&PreviousInputs::of(Some(&json), None).unwrap(), &inputs), Vec::<String>::new());
}

#[test]
fn neither_the_spelling_of_the_directory_nor_its_place_counts() {
    let (top, mut image) = web(&[("a/x", "1"), ("+y", "2")]);
    write(top.path(), "common/tool", "3");
    image.inputs.push("../common".into());
    let first = inputs(&image);
    assert!(first.files.contains_key("../common/tool") && first.files.contains_key("a/x"), "{first:?}");
    for dir in ["web/", "web//", "web/../web", "./web"] {
        let other = Definition { dir: top.path().join(dir), ..image.clone() };
        assert_eq!(inputs(&other), first, "{dir}");
    }
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::rename(top.path(), elsewhere.path().join("moved")).unwrap();
    image.dir = elsewhere.path().join("moved/web");
    image.project = elsewhere.path().canonicalize().unwrap();
    assert_eq!(inputs(&image), first);
}

#[test]
fn what_can_change_an_image_changes_the_fingerprint_and_is_explained() {
    type Change = fn(&Path);
    let cases: &[(&str, Change, &[&str], &[&str])] = &[
        ("nothing", |_| (), &[], &[]),
        (
            "a byte",
            |dir| std::fs::write(dir.join("files/nginx.conf"), "other").unwrap(),
            &["files/nginx.conf changed"],
            &["files/nginx.conf changed"],
        ),
        (
            "a new file",
            |dir| std::fs::write(dir.join("setup.sh"), "").unwrap(),
            &["setup.sh is new"],
            &["setup.sh is new"],
        ),
        (
            "a file less",
            |dir| std::fs::remove_file(dir.join("files/nginx.conf")).unwrap(),
            &["files/nginx.conf was removed"],
            &["one file or directory was removed (the tag does not have its name)"],
        ),
        (
            "a renaming",
            |dir| std::fs::rename(dir.join("text"), dir.join("text2")).unwrap(),
            &["text was removed", "text2 is new"],
            &["text2 is new", "one file or directory was removed (the tag does not have its name)"],
        ),
        (
            // A link to a file has the permissions and the content of the file.
            "the executable bit",
            |dir| std::fs::set_permissions(dir.join("run"), Permissions::from_mode(0o755)).unwrap(),
            &["link is now executable", "run is now executable"],
            &["link changed", "run changed"],
        ),
        // git stores only the executable bit. The other bits can differ between two checkouts, so they must not change
        // the fingerprint.
        (
            "other bits",
            |dir| std::fs::set_permissions(dir.join("run"), Permissions::from_mode(0o600)).unwrap(),
            &[],
            &[],
        ),
        (
            "a link to the same bytes",
            |dir| {
                std::fs::remove_file(dir.join("link")).unwrap();
                symlink("files/../run", dir.join("link")).unwrap();
            },
            &["link has another target: run -> files/../run"],
            &["link changed"],
        ),
        (
            "a file instead of a link",
            |dir| {
                std::fs::remove_file(dir.join("link")).unwrap();
                std::fs::write(dir.join("link"), "run").unwrap();
            },
            &["link is no longer a link to run"],
            &["link changed"],
        ),
        (
            "a link to another directory",
            |dir| {
                std::fs::remove_file(dir.join("to-files")).unwrap();
                symlink(".", dir.join("to-files")).unwrap();
            },
            &["to-files has another target: files -> ."],
            &["to-files changed"],
        ),
    ];
    for (name, change, full, digest) in cases {
        let (top, image) = web(&[("files/nginx.conf", "conf"), ("run", "run"), ("text", "text")]);
        let dir = top.path().join("web");
        symlink("run", dir.join("link")).unwrap();
        symlink("files", dir.join("to-files")).unwrap();
        let old = inputs(&image);
        change(&dir);
        let new = inputs(&image);
        assert_eq!(old.fingerprint() == new.fingerprint(), full.is_empty(), "{name}");
        let (from_json, from_tag) = explained(&old, &new);
        assert_eq!((&from_json[..], &from_tag[..]), (&full.map_str()[..], &digest.map_str()[..]), "{name}");
    }
}

trait MapStr {
    fn map_str(&self) -> Vec<String>;
}
impl MapStr for &[&str] {
    fn map_str(&self) -> Vec<String> {
        self.iter().map(|text| (*text).into()).collect()
    }
}

#[test]
fn base_architecture_and_format_are_explained() {
    let (_top, image) = web(&[]);
    let old = inputs(&image);
    let mut new = old.clone();
    new.base.id.0 = "ami-0fedcba9876543210".into();
    new.base.snapshot.0 = "snap-0fedcba9876543210".into();
    new.architecture = Architecture::Arm64;
    new.format += 1;
    let expected = [
        "the base image changed: ami-0123456789abcdef0 -> ami-0fedcba9876543210",
        "the architecture changed: x86_64 -> arm64",
        &format!("oven's fingerprint format changed: {FORMAT} -> {}", FORMAT + 1),
    ]
    .map(String::from);
    assert_eq!(explained(&old, &new), (expected.to_vec(), expected.to_vec()));
    assert_ne!(old.fingerprint(), new.fingerprint());
    new = Inputs {
        base: InputBase { snapshot: SnapshotId("snap-1".into()), ..old.base.clone() },
        ..old.clone()
    };
    let expected =
        "the snapshot of the base image ami-0123456789abcdef0 changed: snap-0123456789abcdef0 -> snap-1";
    assert_eq!(explained(&old, &new), (vec![expected.into()], vec![expected.into()]));
}

/// Images of the previous format stay valid bases, and a new bake says why it is needed.
#[test]
fn inputs_of_the_previous_format_are_explained() {
    let (_top, image) = web(&[]);
    let now = inputs(&image);
    let json = now.to_json().replace("\"format\":3", "\"format\":2");
    let tag = now.digest().replacen("v1;3;", "v1;2;", 1);
    assert!(json != now.to_json() && tag != now.digest());
    let expected = ["oven's fingerprint format changed: 2 -> 3"];
    for old in [PreviousInputs::of(Some(&json), None), PreviousInputs::of(None, Some(&tag))] {
        assert_eq!(explain(&old.unwrap(), &now), expected);
    }
}

/// Inputs with `count` files, ten in each directory.
fn many(count: usize) -> Inputs {
    let (_top, image) = web(&[]);
    let mut inputs = inputs(&image);
    inputs.files = (0..count)
        .map(|i| {
            let file = InputFile { executable: false, link: None, sha1: Some(format!("{i:040}")) };
            (format!("../common/d{}/e/f{i}", i / 10), file)
        })
        .collect();
    inputs
}

#[test]
fn the_digest_fits_a_tag_and_coarsens_with_many_files() {
    for (count, name, letter) in [
        (1, "../common/d0/e/f0 changed", 'f'),
        (20, "../common/d0/e/f0 changed", 'f'),
        (150, "files below ../common/d0/e/ changed", '3'),
        (3000, "files below ../common/ changed", '1'),
    ] {
        let old = many(count);
        let digest = old.digest();
        assert!(digest.len() <= digest::MAX, "{} characters", digest.len());
        assert_eq!(digest.split(';').nth(5), Some(&*letter.to_string()), "{digest}");
        let mut new = old.clone();
        new.files.get_mut("../common/d0/e/f0").unwrap().executable = true;
        assert_eq!(explained(&old, &new).1, [name], "{count}");
        // The new inputs may have more files than fit into a digest.
        assert_eq!(explained(&old, &old).1, Vec::<String>::new());
    }
    let mut old = many(0);
    for i in 0..40 {
        old.files.insert(format!("f{i}"), InputFile { executable: false, link: None, sha1: None });
    }
    assert!(old.digest().contains(";w;") && old.digest().len() <= digest::MAX);
    let mut new = old.clone();
    new.files.remove("f1");
    assert_eq!(
        explained(&old, &new).1,
        [
            "the definition changed (which key is unknown, because this machine has only the tags of that image)"
        ]
    );
}

#[test]
fn a_change_of_image_toml_names_the_keys_if_they_are_known() {
    let (top, image) = web(&[]);
    let old = inputs(&image);
    write(top.path(), "web/image.toml", "from = \"ami-0123456789abcdef0\"\nupgrade = true\n");
    let new = inputs(&Definition::load(&top.path().join("web")).unwrap());
    let full = || PreviousInputs::of(Some(&old.to_json()), None).unwrap();
    assert!(!old.to_json().contains("upgrade") && !old.to_json().contains("keys"));
    let keys = old.keys_to_json().unwrap();
    assert_eq!(explain(&full().with_keys(Some(&keys)), &new), ["image.toml: `upgrade` is new"]);
    let unreadable = "its stored keys cannot be read";
    for (keys, why) in [
        (None, "that image was baked by an older oven"),
        (Some("not json"), unreadable),
        (Some("[1]"), unreadable),
        (Some(&keys[..keys.len() - 1]), unreadable),
    ] {
        let lines = explain(&full().with_keys(keys), &new);
        assert_eq!(lines, [format!("image.toml changed (which key is unknown, because {why})")]);
    }
    for json in ["not json", "{}", &old.to_json()[1..]] {
        let damaged = PreviousInputs::of(Some(json), Some(&old.digest())).unwrap().with_keys(Some(&keys));
        assert_eq!(
            explain(&damaged, &new),
            ["image.toml changed (which key is unknown, because its stored inputs cannot be read)"]
        );
    }
    let tag = PreviousInputs::of(None, Some(&old.digest())).unwrap().with_keys(Some(&keys));
    assert_eq!(
        explain(&tag, &new),
        ["image.toml changed (which key is unknown, because this machine has only the tags of that image)"]
    );
    // A comment changes the fingerprint, but no key.
    write(top.path(), "web/image.toml", "from = \"ami-0123456789abcdef0\" # x\n");
    let comment = inputs(&Definition::load(&top.path().join("web")).unwrap());
    assert_ne!(comment.fingerprint(), old.fingerprint());
    let lines = explain(&full().with_keys(Some(&keys)), &comment);
    assert_eq!(lines, ["image.toml changed, but only its comments, its layout or the order of its keys"]);
    // The line of a variable's value is not repeated.
    write(top.path(), "web/image.toml", "from = \"ami-0123456789abcdef0\"\n[vars]\nport = \"80\"\n");
    let lines =
        explain(&full().with_keys(Some(&keys)), &inputs(&Definition::load(&top.path().join("web")).unwrap()));
    assert_eq!(lines, ["the variable port is new: \"80\""]);
}

/// Somebody else may have written the documents.
#[test]
fn stored_names_cannot_forge_or_flood_the_explanation() {
    let (top, image) = web(&[]);
    let old = inputs(&image);
    write(top.path(), "web/image.toml", "from = \"ami-0123456789abcdef0\"\nupgrade = true\n");
    let new = inputs(&Definition::load(&top.path().join("web")).unwrap());
    let full = || PreviousInputs::of(Some(&old.to_json()), None).unwrap();
    let long = "x".repeat(5 << 20);
    for name in ["[[run]] \"a\n  error: forged", "[[run]] \u{1b}[2J\u{202e}", "a\nerror: forged", &long] {
        let (table, key) = (json!({name: {"a": "1"}}), json!({"[disk]": {name: "1"}, "": {name: "1"}}));
        for keys in [table, key] {
            let lines = explain(&full().with_keys(Some(&keys.to_string())), &new);
            assert!(lines.len() >= 2, "{lines:?}");
            for line in lines {
                assert!(!line.contains(crate::text::is_unprintable), "{line:?}");
                assert!(line.chars().count() < 200, "{} characters", line.len());
            }
        }
        let mut forged = old.clone();
        forged.files.insert(name.into(), InputFile { executable: false, link: None, sha1: None });
        forged.vars.insert(name.into(), String::new());
        let lines = explain(&PreviousInputs::of(Some(&forged.to_json()), None).unwrap(), &new);
        assert_eq!(lines.len(), 3, "{lines:?}");
        for line in lines {
            assert!(!line.contains(crate::text::is_unprintable) && line.len() < 6000, "{line:?}");
        }
    }
}

#[test]
fn a_tag_of_another_version_is_no_reason_to_fail() {
    let (_top, image) = web(&[]);
    let new = inputs(&image);
    let digest = new.digest();
    for tag in ["", "v2;1;x", ";;;;;;", "v1;;;;;f;abc", "v1;1;x86_64;a;s;f;éééé", &digest[..digest.len() - 1]]
    {
        let old = PreviousInputs::of(Some("{}"), Some(tag)).unwrap();
        assert_eq!(
            explain(&old, &new),
            ["the inputs of the older image are unknown, because its tag cannot be parsed"],
            "{tag}"
        );
    }
    assert_eq!(PreviousInputs::of(Some("not json"), None), None);
}

#[test]
fn paths_are_spelt_without_loss() {
    use std::ffi::OsStr;
    let escape = |bytes: &[u8]| escape_path(Path::new(OsStr::from_bytes(bytes)));
    assert_eq!(escape("é/a b".as_bytes()), "é/a b");
    assert_eq!((escape(b"a\xff"), escape(b"a\\xff")), ("a\\xff".into(), "a\\\\xff".into()));
}

#[test]
fn a_definition_that_moved_under_its_parent_keeps_its_warnings() {
    let (top, image) = web(&[]);
    write(top.path(), "web/.git/HEAD", "ref");
    let inputs = inputs(&image);
    assert!(inputs.warnings()[0].contains(".git is in the definition"), "{:?}", inputs.warnings());
    assert!(!inputs.to_json().contains("inside"));
    let from = [BaseSource::Image(BaseRef::Id(base().id)), BaseSource::Parent(PathBuf::from("../base"))];
    // The fingerprint contains the id of the base image and not the text of `from`. So a rebuilt parent causes a new
    // image.
    let prints: Vec<_> = from
        .into_iter()
        .map(|from| self::inputs(&Definition { from, ..image.clone() }).fingerprint())
        .collect();
    assert_eq!(prints[0], prints[1]);
}

#[test]
fn a_change_while_baking_is_found() {
    let (top, image) = web(&[("setup.sh", "#!/bin/sh\n")]);
    let inputs = inputs(&image);
    inputs.ensure_unchanged(&image).unwrap();
    // Hidden files, which an editor or a CI system may write next to image.toml, are not part of the definition.
    write(top.path(), "web/.ami_id.json", "{}");
    inputs.ensure_unchanged(&image).unwrap();
    write(top.path(), "web/setup.sh", "#!/bin/sh\nfalse\n");
    let error = inputs.ensure_unchanged(&image).unwrap_err();
    assert_eq!(Kind::of(&error), Kind::Definition);
    assert!(error.to_string().ends_with("web changed while it was baked: setup.sh changed"), "{error}");
    write(top.path(), "web/setup.sh", "#!/bin/sh\n");
    inputs.ensure_unchanged(&image).unwrap();
    let older = Definition { upgrade: oven_distro::Upgrade::All, ..image };
    let error = inputs.ensure_unchanged(&older).unwrap_err();
    assert!(error.to_string().ends_with("web changed while it was baked: image.toml changed"), "{error}");
}

/// Every key of image.toml changes the fingerprint, and so does every file. This must stay true for keys that are added
/// later.
#[test]
fn every_key_and_what_it_names_reaches_the_fingerprint() {
    let key = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQ==\n-----END PGP PUBLIC KEY BLOCK-----\n";
    let (top, image) = web(&[("key.asc", key)]);
    let digest = "0".repeat(64);
    let repository = "[[repository]]\nname = \"a\"\nurl = \"https://x\"\n";
    let definitions = [
        String::new(),
        "upgrade = true".into(),
        "upgrade = \"security\"".into(),
        "hold = [\"jq\"]".into(),
        "debconf = [\"a a/b string c\"]".into(),
        "packages = [\"@a\"]".into(),
        format!("packages = [{{ url = \"https://x/a.deb\", sha256 = \"{digest}\" }}]"),
        format!("packages = [{{ url = \"https://x/a.deb\", sha256 = \"{}\" }}]", digest.replace('0', "1")),
        format!("{repository}key = \"key.asc\""),
        format!("{repository}key = \"key.asc\"\nkeep = false"),
        format!("{repository}key = \"key.asc\"\nsuite = \"stable\"\ncomponents = [\"main\"]"),
        format!("{repository}signed = false"),
    ];
    let mut images = vec![];
    let mut prints = std::collections::BTreeSet::new();
    let mut load = |toml: &str| {
        write(top.path(), "web/image.toml", &format!("from = \"ami-0123456789abcdef0\"\n{toml}\n"));
        let image = Definition::load(&image.dir).unwrap();
        prints.insert(inputs(&image).fingerprint());
        images.push(image);
    };
    definitions.iter().for_each(|toml| load(toml));
    write(top.path(), "web/key.asc", &key.replace("mQ", "mR"));
    load(&definitions[8]);
    assert_eq!(prints.len(), definitions.len() + 1);
    // A bake compares definitions to find changes of image.toml, so two definitions with different keys must not be
    // equal.
    for (index, image) in images.iter().enumerate() {
        assert!(images[..index].iter().all(|other| other != image), "{image:?}");
    }
}

#[test]
fn a_plugin_that_is_named_counts() {
    let (top, image) = web(&[("setup.sh", "#!/bin/sh\n")]);
    let without = inputs(&image);
    let [one, two] = ["1111", "2222"].map(|digest| without.clone().with_plugin("void", digest));
    assert_eq!(one, without.clone().with_plugin("void", "1111"));
    assert_ne!(one.fingerprint(), two.fingerprint());
    assert_ne!(one.fingerprint(), without.fingerprint());
    assert_eq!(one.checksum(), without.checksum(), "the compatible key is of the definition's files alone");
    for old in [PreviousInputs::of(Some(&one.to_json()), None), PreviousInputs::of(None, Some(&one.digest()))]
    {
        assert_eq!(explain(&old.clone().unwrap(), &two), ["the plugin void changed"]);
        assert_eq!(explain(&old.unwrap(), &one), Vec::<String>::new());
    }
    // The plugin is not a file of the definition, so it does not count as a missing file.
    one.ensure_unchanged(&image).unwrap();
    write(top.path(), "web/setup.sh", "#!/bin/sh\nfalse\n");
    let error = one.ensure_unchanged(&image).unwrap_err();
    assert!(error.to_string().ends_with("while it was baked: setup.sh changed"), "{error}");
}

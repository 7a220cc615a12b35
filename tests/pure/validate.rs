//! `oven validate`.

use std::path::Path;
use std::process::Command;

fn expect(dir: &Path, code: i32, args: &[&str]) -> (String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
    let output = command.env_clear().current_dir(dir).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "oven {args:?}\n{out}\n{err}");
    (out, err)
}

fn project(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

#[test]
fn valid_definitions_need_no_region_and_no_base() {
    let dir = project(&[
        ("base/image.toml", "from = { name = \"gone-*\" }\n"),
        ("web/image.toml", "from = \"../base\"\n[vars]\nport = \"80\"\n"),
        ("oven.toml", "region_dir = \"region\"\n"),
    ]);
    let (out, err) = expect(dir.path(), 0, &["validate", "web", "--var", "port=81"]);
    assert_eq!((out.as_str(), err.as_str()), ("base: valid\nweb: valid\n", ""));
    let (out, _) = expect(dir.path(), 0, &["--json", "validate", "web"]);
    let result: serde_json::Value = serde_json::from_str(out.trim()).unwrap();
    assert_eq!((&result["images"][0]["asked"], &result["images"][1]["asked"]), (&false.into(), &true.into()));
    assert!(!dir.path().join("region").exists());
}

#[test]
fn the_mistakes_of_all_definitions_and_settings_are_reported() {
    let dir = project(&[
        ("a/image.toml", "from = \"ami-12\"\nupgrade = 1\n"),
        ("b/image.toml", "packges = []\n"),
        ("c/image.toml", "from = \"ami-0123456789abcdef0\"\n"),
    ]);
    let (out, err) = expect(dir.path(), 3, &["validate", "a", "b", "c"]);
    assert_eq!(out, "");
    for place in
        ["a/image.toml:1: `from`", "a/image.toml:2: `upgrade`", "b/image.toml:1: unknown key `packges`"]
    {
        assert!(err.contains(place), "{err}");
    }
    let (out, _) = expect(dir.path(), 3, &["--json", "validate", "a", "b", "c"]);
    let events: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let errors: Vec<_> = events.iter().filter(|event| event["event"] == "error").collect();
    let places: Vec<_> = errors.iter().map(|e| format!("{} {} {}", e["file"], e["line"], e["key"])).collect();
    let expected = [
        "\"a/image.toml\" 1 \"from\"",
        "\"a/image.toml\" 2 \"upgrade\"",
        "\"b/image.toml\" 1 \"from\"",
        "\"b/image.toml\" 1 \"packges\"",
    ];
    let mut sorted = places.clone();
    sorted.sort();
    assert_eq!(sorted, expected, "{out}");
    assert_eq!(events.last().unwrap()["errors"].as_array().unwrap().len(), 4);
    // A mistake in an oven.toml for several definitions is reported once.
    std::fs::write(dir.path().join("oven.toml"), "cache_gib = 0\n").unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    std::fs::write(dir.path().join("d/image.toml"), "from = \"ami-0123456789abcdef0\"\n").unwrap();
    let (_, err) = expect(dir.path(), 3, &["validate", "c", "d"]);
    assert_eq!(err.matches("oven.toml:1: `cache_gib`").count(), 1, "{err}");
}

#[test]
fn secrets_are_checked_without_their_values() {
    let toml = "from = \"ami-0123456789abcdef0\"\n[[run]]\ncommand = [\"true\"]\nsecrets = [\"TOKEN\"]\n";
    let dir = project(&[("web/image.toml", toml)]);
    expect(dir.path(), 0, &["validate", "web"]);
    let (_, err) = expect(dir.path(), 3, &["validate", "web", "--secret", "OTHER"]);
    assert!(
        err.contains("web/image.toml:4: `secrets` of [[run]] names TOKEN, which is not permitted"),
        "{err}"
    );
}

#[test]
fn a_directory_whose_name_is_not_utf8_is_valid() {
    use std::os::unix::ffi::OsStrExt;
    let dir = project(&[("x", "")]);
    let name = std::ffi::OsStr::from_bytes(b"w\xffeb");
    std::fs::create_dir(dir.path().join(name)).unwrap();
    let toml = "name = \"web\"\nfrom = \"ami-0123456789abcdef0\"\n";
    std::fs::write(dir.path().join(name).join("image.toml"), toml).unwrap();
    for flags in [&[][..], &["--json"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
        let output =
            command.env_clear().current_dir(dir.path()).args(flags).arg("validate").arg(name).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        let out = String::from_utf8(output.stdout).unwrap();
        if flags.is_empty() {
            assert_eq!(out, "web: valid\n");
        } else {
            let result: serde_json::Value = serde_json::from_str(out.trim()).unwrap();
            assert_eq!(result["images"][0]["definition"], "w\u{fffd}eb");
        }
    }
}

#[test]
fn links_that_scripts_cannot_follow_are_found() {
    let dir = project(&[
        (".git/HEAD", ""),
        ("web/image.toml", "from = \"ami-0123456789abcdef0\"\n"),
        ("shared/conf", "x\n"),
    ]);
    let link = |name: &str, target: &Path| {
        std::os::unix::fs::symlink(target, dir.path().join("web").join(name)).unwrap()
    };
    link("conf", Path::new("../shared/conf"));
    let (out, err) = expect(dir.path(), 0, &["validate", "web"]);
    assert_eq!(out, "web: valid\n");
    assert!(
        err.contains("web/image.toml:1: `inputs` is not set, so scripts and tests cannot follow"),
        "{err}"
    );
    assert!(err.contains("Set inputs = [\"../shared\"]"), "{err}");
    link("absolute", &dir.path().join("shared/conf"));
    let (out, err) = expect(dir.path(), 3, &["--json", "validate", "web"]);
    let result: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!(result["error"]["file"], "web/absolute", "{out}{err}");
    assert!(result["error"]["message"].as_str().unwrap().contains("is a link to the absolute path"), "{out}");
}

#[test]
fn each_mistake_is_reported_once() {
    let dir = project(&[
        ("oven.toml", "cache_gib = 0\n"),
        ("a/image.toml", "upgrade = 1\nfrom = \"ami-0123456789abcdef0\"\n"),
        ("b/image.toml", "from = \"ami-0123456789abcdef0\"\ndistro = \"gone\"\n"),
        ("c/image.toml", "from = \"../a\"\n"),
        ("d/image.toml", "from = \"../e\"\n"),
        ("e/image.toml", "from = 1\n"),
        ("f/image.toml", "from = \"../g\"\n"),
        ("g/image.toml", "from = 2\n"),
    ]);
    let args = ["validate", "a", "a", "./a/", "b", "c", "d", "f", "gone"];
    let (_, err) = expect(dir.path(), 3, &args);
    for mistake in [
        "a/image.toml:1: `upgrade`",
        "b/image.toml:2: `distro`",
        "e/image.toml:1: `from`",
        "g/image.toml:1: `from`",
        "gone: directory not found",
        "oven.toml:1: `cache_gib`",
    ] {
        assert_eq!(err.matches(mistake).count(), 1, "{mistake}: {err}");
    }
    assert_eq!(err.matches("error: ").count(), 6, "{err}");
}

/// The program for `jq` that the page about debugging shows.
fn annotations_program() -> String {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide/debugging.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, rest) =
        page.split_once("oven --json validate web | jq -r '").expect("the page shows how to use jq");
    rest.split_once('\'').unwrap().0.to_owned()
}

#[test]
fn ci_jobs_can_make_annotations_of_mistakes() {
    use std::io::Write;
    use std::process::Stdio;
    let dir =
        project(&[("web/image.toml", "from = \"ami-12\"\nupgrade = a\n"), ("b/image.toml", "frm = 1\n")]);
    let (events, _) = expect(dir.path(), 3, &["--json", "validate", "web", "b", "gone%"]);
    let program = annotations_program();
    let mut jq = Command::new("jq");
    let jq = jq.args(["-r", &program]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut jq = jq.expect("jq starts");
    jq.stdin.take().unwrap().write_all(events.as_bytes()).unwrap();
    let output = jq.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let starts = [
        "::error file=web/image.toml,line=2::web/image.toml:2: not valid TOML: ",
        "::error file=b/image.toml,line=1::b/image.toml:1: unknown key `frm`",
        "::error ::gone%25: directory not found",
    ];
    assert_eq!(lines.len(), starts.len(), "{text}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{text}");
    }
    assert!(lines[0].contains("%0A    | upgrade = …%0A"), "{text}");
}

#[test]
fn mistakes_that_are_only_counted_are_no_events() {
    let many: String = (0..30).map(|i| format!("zz{i} = 1\n")).collect();
    let dir = project(&[("web/image.toml", &format!("from = \"ami-0123456789abcdef0\"\n{many}"))]);
    let (out, _) = expect(dir.path(), 3, &["--json", "validate", "web"]);
    let events: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let errors: Vec<_> = events.iter().filter(|event| event["event"] == "error").collect();
    assert_eq!(errors.len(), 20);
    assert!(errors.iter().all(|error| error["line"].is_u64() && error["key"].is_string()), "{out}");
    let result = events.last().unwrap();
    assert_eq!((result["errors"].as_array().unwrap().len(), &result["more_errors"]), (20, &10.into()));
    let (_, err) = expect(dir.path(), 3, &["validate", "web"]);
    assert!(err.contains("and 10 more"), "{err}");
    let few = project(&[("web/image.toml", "frm = 1\n")]);
    let (out, _) = expect(few.path(), 3, &["--json", "validate", "web"]);
    assert!(!out.contains("more_errors"), "{out}");
}

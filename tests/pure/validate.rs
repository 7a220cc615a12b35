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

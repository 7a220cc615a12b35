//! The reference pages in docs/reference and the schemas in schema/. They are generated from the parser's tables of
//! keys, from the table of `--json` events and from the command line. `OVEN_BLESS=1 cargo test --test pure docs` writes
//! them; without it they are compared.
//!
//! The same test writes man pages for a release, into a directory: oven.1, and a page for each verb.
//! `OVEN_MAN_DIR=target/man cargo test --test pure docs`

mod cli_page;
mod environment_page;
mod event_pages;
mod inline_texts;
mod key_pages;
mod schemas;
mod validator;

use self::validator::Validator;
use oven::cli::args;
use oven::config::key_table::{Section, ValueType};
use oven::config::project::keys::OVEN_TOML;
use oven::definition::keys::IMAGE_TOML;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const TITLES: [(&str, &Section); 2] = [("image.toml", &IMAGE_TOML), ("oven.toml", &OVEN_TOML)];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every generated file, and what it has to say.
fn generated() -> Vec<(&'static str, String)> {
    let schema = |schema: Value| format!("{schema:#}\n");
    vec![
        ("docs/reference/image.toml.md", key_pages::image_toml()),
        ("docs/reference/oven.toml.md", key_pages::oven_toml()),
        ("docs/reference/cli.md", cli_page::page()),
        ("docs/reference/environment.md", environment_page::page()),
        ("docs/reference/json-events.md", event_pages::page()),
        ("schema/image.schema.json", schema(schemas::image_toml())),
        ("schema/oven.schema.json", schema(schemas::oven_toml())),
        ("schema/events.schema.json", schema(schemas::events())),
    ]
}

#[test]
fn docs_are_what_the_tables_say() {
    let bless = std::env::var_os("OVEN_BLESS").is_some();
    let mut stale = Vec::new();
    for (name, text) in generated() {
        let path = root().join(name);
        if std::fs::read_to_string(&path).is_ok_and(|now| now == text) {
            continue;
        }
        if bless {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
        } else {
            stale.push(name);
        }
    }
    assert!(stale.is_empty(), "{stale:?}: `OVEN_BLESS=1 cargo test --test pure docs` writes them again");
}

#[test]
fn docs_have_man_pages() {
    let temp = tempfile::tempdir().unwrap();
    let dir = match std::env::var_os("OVEN_MAN_DIR") {
        // A relative one is meant from where cargo was started, which is the top of the sources.
        Some(dir) => root().join(dir),
        None => temp.path().join("man"),
    };
    std::fs::create_dir_all(&dir).unwrap();
    clap_mangen::generate_to(args::command(), &dir).unwrap();
    for page in ["oven.1", "oven-bake.1", "oven-images-list.1"] {
        // The page of oven documents the global options, and no other page does.
        let text = std::fs::read_to_string(dir.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
        assert_eq!(text.contains("region\\-dir"), page == "oven.1", "{page}: {text}");
        assert!(page != "oven-bake.1" || text.contains("keep\\-on\\-failure"), "{text}");
    }
    assert!(!dir.join("oven-help.1").exists());
}

/// Every key of a section and of those below it.
fn each_key(
    section: &'static Section,
    see: &mut dyn FnMut(&'static Section, &'static oven::config::key_table::TomlKey),
) {
    for key in section.keys {
        see(section, key);
        if let Some(below) = key.value.section() {
            each_key(below, see);
        }
    }
}

#[test]
fn docs_say_something_about_every_key_and_examples_are_right() {
    for (_, section) in TITLES {
        each_key(section, &mut |section, key| {
            let name = format!("{} {}", section.header, key.name);
            assert!(key.doc.ends_with(['.', ')']) && key.doc.len() > 20, "{name}: {}", key.doc);
            let example: Value = toml::from_str(key.example).unwrap_or_else(|e| panic!("{name}: {e}"));
            let value = schemas::find(&example, key.name).unwrap_or_else(|| panic!("{name}: no such key"));
            let schema = Validator::new(&schemas::value(&key.value));
            // What is below a table is checked with its own keys.
            if !matches!(key.value, ValueType::Tables(_) | ValueType::Table(_)) {
                assert_eq!(schema.validate(value), Ok(()), "{name}");
            }
        });
    }
}

/// The TOML files of a directory of this repository.
fn toml_files(dir: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join(dir)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries
        .map(|path| if path.is_dir() { path.join("image.toml") } else { path })
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml") && path.is_file())
        .filter(|path| !path.ends_with("mistakes.toml"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{dir}");
    files
}

#[test]
fn docs_schemas_accept_what_is_right() {
    let image = Validator::new(&schemas::image_toml());
    let settings = Validator::new(&schemas::oven_toml());
    let all = [("examples", &image), ("tests/data/definitions", &image), ("tests/data/settings", &settings)];
    for (dir, schema) in all {
        for file in toml_files(dir) {
            let value: Value = toml::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
            assert_eq!(schema.validate(&value), Ok(()), "{}", file.display());
        }
    }
}

/// `mistakes.toml` has those that the schema refuses, and those that only the parser does: it knows files and other
/// definitions.
#[test]
fn docs_schemas_refuse_mistakes() {
    let all = [
        ("tests/data/definitions/mistakes.toml", schemas::image_toml()),
        ("tests/data/settings/mistakes.toml", schemas::oven_toml()),
    ];
    for (file, schema) in all {
        let schema = Validator::new(&schema);
        let mistakes: Value = toml::from_str(&std::fs::read_to_string(root().join(file)).unwrap()).unwrap();
        let mut wrong = Vec::new();
        for (word, refused) in [("schema", true), ("parser", false)] {
            for text in mistakes[word].as_array().unwrap() {
                let text = text.as_str().unwrap();
                let value: Value = toml::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
                if schema.validate(&value).is_err() != refused {
                    wrong.push((word, text));
                }
            }
        }
        assert!(wrong.is_empty(), "{file}: {wrong:#?}");
    }
}

#[test]
fn docs_every_mistake_is_one_for_the_parser() {
    for (file, name) in [("definitions", "image.toml"), ("settings", "oven.toml")] {
        let text =
            std::fs::read_to_string(root().join("tests/data").join(file).join("mistakes.toml")).unwrap();
        let mistakes: Value = toml::from_str(&text).unwrap();
        for text in ["schema", "parser"].iter().flat_map(|word| mistakes[word].as_array().unwrap()) {
            let dir = tempfile::tempdir().unwrap();
            let web = dir.path().join("web");
            std::fs::create_dir(&web).unwrap();
            std::fs::write(web.join(name), text.as_str().unwrap()).unwrap();
            let refused = if name == "image.toml" {
                oven::definition::Definition::load(&web).is_err()
            } else {
                oven::config::project::Settings::load(&web.join(name)).is_err()
            };
            assert!(refused, "{text}");
        }
    }
}

const PGP_KEY: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQ==\n-----END PGP PUBLIC KEY BLOCK-----\n";

/// Files that the samples name, next to `web/image.toml`.
fn tree() -> tempfile::TempDir {
    let top = tempfile::tempdir().unwrap();
    let files = [
        ("web/files/nginx.conf", "events {}\n"),
        ("web/setup.sh", "#!/bin/sh\n"),
        ("web/site.yml", "- hosts: all\n"),
        ("web/web.bats", "@test x { true; }\n"),
        ("web/good.conf", "port {{ port }}\n"),
        ("web/keys/good.asc", PGP_KEY),
        ("base/image.toml", "from = \"ami-01234567\"\n"),
        ("common/tool", "#!/bin/sh\n"),
    ];
    for (path, text) in files {
        let path = top.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    top
}

/// A small generator of our own, so that a failure can be repeated.
fn next(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 16) as usize
}

/// Where the characters of texts are.
fn in_quotes(text: &[char]) -> impl Iterator<Item = usize> {
    let mut inside = false;
    text.iter().enumerate().filter_map(move |(at, c)| {
        if *c == '"' {
            inside = !inside;
            return None;
        }
        inside.then_some(at)
    })
}

/// The schema is never stricter than the parser: each sample is changed at random, and what the parser still accepts
/// the schema has to accept.
#[test]
fn docs_schema_accepts_whatever_the_parser_accepts() {
    let (top, schema) = (tree(), Validator::new(&schemas::image_toml()));
    let web = top.path().join("web");
    let pieces = [
        "", "a", "Z", "1", " ", "-", "_", ".", "/", "=", "*", "@", ":", "~", "+", ",", "é", "../", "\\t",
        "?", "(", "^",
    ];
    let (mut state, mut accepted) = (0x9e37_79b9_7f4a_7c15, 0);
    for file in toml_files("tests/data/definitions") {
        let sample = std::fs::read_to_string(&file).unwrap().replace("\"./site.deb\", ", "");
        for round in 0..400 {
            let mut text: Vec<char> = sample.chars().collect();
            let places: Vec<usize> = in_quotes(&text).collect();
            if round > 0 {
                let at = places[next(&mut state) % places.len()];
                let cut = next(&mut state) % 2;
                let piece = pieces[next(&mut state) % pieces.len()];
                text.splice(at..at + cut, piece.chars());
            }
            let text: String = text.into_iter().collect();
            _ = std::fs::remove_file(web.join("image.toml"));
            std::fs::write(web.join("image.toml"), &text).unwrap();
            match oven::definition::Definition::load(&web) {
                Ok(_) => {
                    accepted += 1;
                    let value: Value = toml::from_str(&text).unwrap();
                    assert_eq!(schema.validate(&value), Ok(()), "{text}");
                }
                Err(error) => assert!(round > 0, "{}: {error:#}", file.display()),
            }
        }
    }
    assert!(accepted > 500, "{accepted} were accepted: the changes are no test");
}

/// The texts are those of the tests of all rings. Which of them are mistakes, the parser says.
#[test]
fn docs_schema_accepts_the_definitions_in_the_tests() {
    let schema = Validator::new(&schemas::image_toml());
    let mut accepted = 0;
    for text in inline_texts::definitions(&root().join("tests")) {
        let top = tempfile::tempdir().unwrap();
        let web = top.path().join("web");
        std::fs::create_dir(&web).unwrap();
        let value: Value = toml::from_str(&text).unwrap();
        inline_texts::make_files(&web, &value);
        std::fs::write(web.join("image.toml"), &text).unwrap();
        if oven::definition::Definition::load(&web).is_ok() {
            accepted += 1;
            assert_eq!(schema.validate(&value), Ok(()), "{text}");
        }
    }
    assert!(accepted > 100, "{accepted} definitions were found");
}

#[test]
fn docs_streams_are_what_the_schema_says() {
    let schema = Validator::new(&schemas::events());
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    std::fs::create_dir(dir.join("web")).unwrap();
    let image = "name = \"web\"\nfrom = { name = \"debian-12-*\" }\n[vars]\nport = \"80\"\n[[run]]\n\
                 command = [\"true\"]\nsecrets = [\"TOKEN\"]\n";
    std::fs::write(dir.join("web/image.toml"), image).unwrap();
    std::fs::write(dir.join("os"), "ID=debian\nVERSION_ID=\"12\"\n").unwrap();
    let base = std::fs::File::create(dir.join("base.raw")).unwrap();
    base.set_len(2 << 30).unwrap();
    // Enough of an ext4 to be taken for one.
    let superblock = [(1080, &[0x53, 0xef][..]), (1024 + 96, &[0x40, 0, 0, 0]), (1024 + 24, &[2, 0, 0, 0])];
    for (offset, bytes) in superblock {
        std::os::unix::fs::FileExt::write_all_at(&base, bytes, offset).unwrap();
    }
    let cases: [(i32, &str); 16] = [
        (4, "plan web"),
        (4, "images list"),
        (0, "import base.raw --name debian-12-x"),
        (0, "plan web"),
        (0, "images list"),
        (0, "checksum -v web"),
        (0, "sweep --dry-run"),
        (0, "policy"),
        (0, "completions bash"),
        (0, "plugin list"),
        (0, "plugin new void"),
        (0, "plan --os-release os web"),
        (0, "plan --os-release os --request"),
        (2, "roast web"),
        (3, "plan gone"),
        (4, "images show ami-0123456789abcdef0"),
    ];
    let mut events = 0;
    for (code, args) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
        command.env_clear().env("OVEN_REGION_DIR", "region").current_dir(dir).arg("--json");
        let output = command.args(args.split(' ')).output().unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args}: {out}");
        for line in out.lines() {
            let event: Value = serde_json::from_str(line).expect(line);
            assert_eq!(schema.validate(&event), Ok(()), "{args}: {line}");
            assert_eq!(event["format"], 1);
            events += 1;
        }
        assert!(out.lines().last().unwrap().contains("\"event\":\"result\""), "{args}: {out}");
    }
    assert!(events > cases.len(), "there are other events than results");
    for wrong in [
        r#"{"event":"note","message":"x","at_ms":1}"#,
        r#"{"event":"note","message":"x","at_ms":1,"format":2}"#,
        r#"{"event":"note","at_ms":1,"format":1}"#,
        r#"{"event":"noise","message":"x","at_ms":1,"format":1}"#,
        r#"{"event":"result","exit_code":0,"at_ms":1,"format":1,"images":[{}]}"#,
        r#"{"event":"result","exit_code":0,"at_ms":1,"format":1,"surprise":1}"#,
    ] {
        assert!(schema.validate(&serde_json::from_str(wrong).unwrap()).is_err(), "{wrong}");
    }
}

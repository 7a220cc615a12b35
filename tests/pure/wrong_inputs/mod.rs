//! A table of wrong inputs, and what the program says about each. Every key of image.toml and oven.toml, and every verb,
//! flag and argument of the command line has at least one.

mod command_line;
mod image_toml;
mod oven_toml;

use clap::CommandFactory;
use oven::cli::args::Cli;
use oven::config::key_table::Section;
use oven::config::project::keys::OVEN_TOML;
use oven::definition::keys::IMAGE_TOML;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// The key with its table (empty if the file cannot be parsed), the text of the file, the line of the mistake, and a
/// part of the message.
pub type TomlCase = (&'static str, &'static str, usize, &'static str);
/// The verb, flag or argument (empty for none of them), the command line, the exit code, and a part of the message.
pub type CommandCase = (&'static str, &'static [&'static str], i32, &'static str);

const MAX_LINES: usize = 12;
const MAX_CHARACTERS: usize = 400;
const FROM: &str = "from = \"ami-0123456789abcdef0\"\n";

/// A directory with a valid definition `web`.
struct Project(tempfile::TempDir);

impl Project {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("web")).unwrap();
        let project = Self(dir);
        for (path, text) in [
            ("web/image.toml", FROM),
            ("web/a.sh", "#!/bin/sh\n"),
            ("web/plain.txt", "text\n"),
            ("web/site.yml", "- hosts: all\n"),
            ("os", "ID=debian\nVERSION_ID=\"12\"\n"),
        ] {
            project.write(path, text);
        }
        project
    }

    fn write(&self, path: &str, text: &str) {
        std::fs::write(self.0.path().join(path), text).unwrap();
    }

    /// Runs oven. Returns the exit code, the message, and the result of the same command with `--json`.
    fn run(&self, args: &[&str]) -> (i32, String, Value) {
        let oven = |args: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
            let output =
                command.env_clear().env("OVEN_REGION_DIR", "region").current_dir(self.0.path()).args(args);
            output.output().unwrap()
        };
        let output = oven(args);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{args:?}");
        let message = String::from_utf8(output.stderr).unwrap();
        let json = oven(&[&["--json"], args].concat());
        assert_eq!(json.status.code(), output.status.code(), "{args:?}");
        let json = String::from_utf8(json.stdout).unwrap();
        let events = json.lines().map(|line| serde_json::from_str::<Value>(line).expect(line));
        let mut events: Vec<_> = events.collect();
        let result = events.pop().expect("a result");
        // Each error has an event, and the result repeats it.
        let errors: Vec<_> = events.iter().filter(|event| event["event"] == "error").collect();
        let repeated = result["errors"].as_array().unwrap();
        assert_eq!(errors.len(), repeated.len(), "{args:?}: {json}");
        for (event, error) in errors.into_iter().zip(repeated) {
            for field in ["kind", "message", "hint", "file", "line", "key"] {
                assert_eq!(event.get(field), error.get(field), "{args:?}: {field} of {json}");
            }
        }
        assert_eq!(&result["error"], &repeated[0], "{args:?}");
        (output.status.code().unwrap(), message, result)
    }
}

/// Returns why a message is too long or does not contain a text.
fn check_message(message: &str, part: &str) -> Option<String> {
    let (lines, characters) = (message.lines().count(), message.chars().count());
    let long = (lines > MAX_LINES || characters > MAX_CHARACTERS)
        .then(|| format!("{lines} lines and {characters} characters:\n{message}"));
    long.or_else(|| (!message.contains(part)).then(|| format!("it does not contain {part:?}:\n{message}")))
}

/// Runs the cases of a file. `whole` is the text before each case.
fn check_toml(file: &str, before: &str, cases: &[TomlCase]) {
    let mut wrong = Vec::new();
    for (key, text, line, part) in cases {
        let project = Project::new();
        // A case can have its own `from`.
        let before = if text.starts_with("from") { "" } else { before };
        project.write(file, &format!("{before}{text}\n"));
        let (code, message, result) = project.run(&["validate", "web"]);
        let mut fail = |why: String| wrong.push(format!("{file}: {text}\n  {why}"));
        check_message(&message, part).into_iter().for_each(&mut fail);
        let errors = result["errors"].as_array().unwrap();
        let [error] = &errors[..] else {
            fail(format!("one error is expected: {errors:?}"));
            continue;
        };
        let found = error["key"].as_str().unwrap_or_default();
        let right_key = found == *key || found.starts_with(&format!("{key}.")) && !key.is_empty();
        let right_file = error["file"].as_str().is_some_and(|name| Path::new(name).ends_with(file));
        if code != 3 || !right_key || !right_file || error["line"] != *line || error["kind"] != "definition" {
            fail(format!("exit code {code}, {error}"));
        }
        if !message.contains(&format!("{file}:{line}: ")) {
            fail(format!("the message does not name the line: {message}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases are wrong:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn each_mistake_in_image_toml_has_its_line_and_key() {
    check_toml("web/image.toml", FROM, image_toml::CASES);
    check_toml("web/image.toml", "", image_toml::WHOLE);
}

#[test]
fn each_mistake_in_oven_toml_has_its_line_and_key() {
    check_toml("oven.toml", "", oven_toml::CASES);
}

#[test]
fn each_wrong_command_line_has_its_exit_code() {
    let mut wrong = Vec::new();
    for (what, args, expected, part) in command_line::CASES {
        let (code, message, result) = Project::new().run(args);
        let mut fail = |why: String| wrong.push(format!("{what}: {args:?}\n  {why}"));
        check_message(&message, part).into_iter().for_each(&mut fail);
        if code != *expected || result["exit_code"] != *expected {
            fail(format!("exit code {code}: {message}"));
        }
    }
    assert!(wrong.is_empty(), "{} cases are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

fn keys(names: &mut BTreeSet<String>, parent: &str, section: &Section) {
    for key in section.keys {
        let name = if parent.is_empty() { key.name.to_owned() } else { format!("{parent}.{}", key.name) };
        if let Some(below) = key.value.section() {
            keys(names, &name, below);
        }
        names.insert(name);
    }
}

/// The verbs, and each flag and argument with its verb.
fn command_line(names: &mut BTreeSet<String>, verb: &str, command: &clap::Command) {
    let is_top = verb.is_empty();
    let args = command.get_arguments().filter(|arg| is_top == arg.is_global_set());
    for arg in args.filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())) {
        let name = match arg.get_long() {
            Some(long) => format!("--{long}"),
            None => {
                let names = arg.get_value_names().unwrap_or_default();
                names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
            }
        };
        names.insert(if is_top { name } else { format!("{verb} {name}") });
    }
    let mut verbs = command.get_subcommands().filter(|command| command.get_name() != "help").peekable();
    if verbs.peek().is_none() {
        names.insert(verb.to_owned());
    }
    for command in verbs {
        let verb = format!("{verb} {}", command.get_name());
        command_line(names, verb.trim_start(), command);
    }
}

#[test]
fn each_key_verb_and_flag_has_a_wrong_input() {
    let (mut image, mut oven, mut line) = Default::default();
    keys(&mut image, "", &IMAGE_TOML);
    keys(&mut oven, "", &OVEN_TOML);
    let mut command = Cli::command();
    command.build();
    command_line(&mut line, "", &command);
    let covered = |cases: &[&[TomlCase]]| -> BTreeSet<String> {
        cases.iter().flat_map(|cases| cases.iter()).map(|case| case.0.to_owned()).collect()
    };
    let commands: BTreeSet<String> = command_line::CASES.iter().map(|case| case.0.to_owned()).collect();
    let missing = |names: &BTreeSet<String>, covered: &BTreeSet<String>| -> Vec<String> {
        names.difference(covered).cloned().collect()
    };
    assert_eq!(missing(&image, &covered(&[image_toml::CASES, image_toml::WHOLE])), Vec::<String>::new());
    assert_eq!(missing(&oven, &covered(&[oven_toml::CASES])), Vec::<String>::new());
    assert_eq!(missing(&line, &commands), Vec::<String>::new());
    for (what, args, ..) in command_line::CASES {
        let words =
            what.split(' ').filter(|word| word.starts_with("--") || word.chars().all(char::is_lowercase));
        for word in words.filter(|word| !word.is_empty()) {
            assert!(
                args.iter().any(|arg| arg.split('=').next() == Some(word)),
                "{what}: {args:?} has no {word}"
            );
        }
    }
    // A case does not name what does not exist.
    let unknown: Vec<_> = commands.difference(&line).filter(|name| !name.is_empty()).collect();
    assert_eq!(unknown, Vec::<&String>::new());
    let count = image_toml::CASES.len()
        + image_toml::WHOLE.len()
        + oven_toml::CASES.len()
        + command_line::CASES.len();
    assert!(count >= 130, "{count} cases");
}

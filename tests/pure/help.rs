//! The help texts, and mistakes in flags and environment variables of every verb.

use clap::CommandFactory;
use oven::cli::args::{self, Cli};
use std::path::Path;
use std::process::{Command, Output};

/// A terminal of 24 lines also shows the next prompt.
const SCREEN: usize = 23;
const GLOBAL_OPTIONS: &str = "`oven --help` lists the global options.";

fn oven(dir: &Path, variables: &[(&str, &str)], args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
    command.env_clear().envs(variables.iter().copied()).current_dir(dir).args(args).output().unwrap()
}

fn help(columns: &str, args: &[&str]) -> String {
    let output = oven(Path::new("/"), &[("COLUMNS", columns)], args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The words of every verb, such as `images` and `list`.
fn verbs() -> Vec<Vec<String>> {
    fn add(verbs: &mut Vec<Vec<String>>, before: &[String], command: &clap::Command) {
        for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
            let words = [before, &[verb.get_name().to_owned()]].concat();
            add(verbs, &words, verb);
            verbs.push(words);
        }
    }
    let mut verbs = Vec::new();
    add(&mut verbs, &[], &args::command());
    assert!(verbs.len() > 15, "{verbs:?}");
    verbs
}

#[test]
fn a_short_help_fits_a_screen() {
    let all = verbs();
    for words in std::iter::once(Vec::new()).chain(all.iter().cloned()) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        for (columns, width) in [("80", 80), ("40", 40)] {
            let text = help(columns, &[&words[..], &["-h"]].concat());
            // A word is never cut, so the name of an option with its value can be longer.
            let is_long = |line: &&str| line.chars().count() > width && line.trim().contains("  ");
            assert_eq!(text.lines().find(is_long), None, "{text}");
            let wide = text.lines().filter(|line| line.chars().count() > width);
            assert!(wide.clone().all(|line| line.starts_with("Usage:")), "{columns}: {text}");
            assert!(width < 80 || text.lines().count() <= SCREEN, "{words:?}: {text}");
        }
    }
    let text = help("80", &["-h"]);
    for verb in all.iter().filter(|words| words.len() == 1) {
        assert!(text.contains(&format!("\n  {} ", verb[0])), "{} of {text}", verb[0]);
    }
    assert!(["--cloud", "--disks", "--verbose", "--help"].iter().all(|flag| text.contains(flag)), "{text}");
}

#[test]
fn a_long_help_explains_and_has_examples() {
    for words in [&["bake"][..], &["plan"], &["export"], &["plugin", "new"], &["completions"]] {
        let (short, long) =
            (help("80", &[words, &["-h"]].concat()), help("80", &[words, &["--help"]].concat()));
        assert!(long.contains("\nExamples:\n") && !short.contains("Examples:"), "{short}\n{long}");
        assert!(long.lines().count() > short.lines().count(), "{long}");
    }
    let (short, long) = (help("80", &["-h"]), help("80", &["--help"]));
    for arg in Cli::command().get_arguments() {
        assert!(long.contains(&format!("--{}", arg.get_long().unwrap())), "{arg}: {long}");
        let variable = arg.get_env().map(|name| name.to_str().unwrap());
        assert!(variable.is_none_or(|name| long.contains(&format!("[env: {name}]"))), "{arg}: {long}");
    }
    for part in ["Exit codes:", "Environment variables:", "docs/reference/environment.md", "CLICOLOR_FORCE"] {
        assert!(long.contains(part) && !short.contains(part), "{part}: {long}");
    }
}

#[test]
fn the_help_of_a_verb_refers_to_the_global_options() {
    for words in verbs() {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        for flag in ["-h", "--help"] {
            let text = help("80", &[&words[..], &[flag]].concat());
            assert_eq!(text.matches(GLOBAL_OPTIONS).count(), 1, "{text}");
            let listed = text.lines().filter(|line| line.trim_start().starts_with('-'));
            // The text about an option can name another one.
            let listed: Vec<_> = listed.filter_map(|line| line.trim_start().split("  ").next()).collect();
            for global in Cli::command().get_arguments() {
                let global = format!("--{}", global.get_long().unwrap());
                let is_global = |line: &&&str| line.split([' ', ',']).any(|word| word == global);
                assert_eq!(listed.iter().find(is_global), None, "{text}");
            }
        }
    }
    // `oven help` shows the same text.
    assert_eq!(help("80", &["help", "images", "list"]), help("80", &["images", "list", "--help"]));
}

#[test]
fn global_options_go_before_and_after_each_verb() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    std::fs::write(dir.path().join("d/f"), "hello\n").unwrap();
    for args in [
        ["--json", "plugin", "list"].as_slice(),
        &["plugin", "--json", "list"],
        &["plugin", "list", "--json"],
        &["checksum", "--json", "d"],
        &["checksum", "d", "--json"],
        &["policy", "--json", "--cloud", "local"],
        &["policy", "--region-dir", "r", "--json", "-v"],
    ] {
        let output = oven(dir.path(), &[], args);
        let out = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.code() == Some(0) && out.starts_with('{'), "{args:?}: {out}");
    }
    for args in [["bake", "--version"].as_slice(), &["images", "list", "-V"], &["-V"]] {
        assert_eq!(oven(dir.path(), &[], args).status.code(), Some(0), "{args:?}");
    }
    let output = oven(dir.path(), &[], &["policy", "-q", "-v"]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn an_empty_value_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("web")).unwrap();
    std::fs::write(dir.path().join("web/image.toml"), "from = { name = \"b\" }\n").unwrap();
    let refused = |variables: &[(&str, &str)], args: &[&str], part: &str| {
        let output = oven(dir.path(), variables, args);
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{variables:?} {args:?}: {err}");
        assert!(err.starts_with("error: ") && err.contains(part), "{args:?}: {err}");
        let json = oven(dir.path(), variables, &[&["--json"], args].concat());
        let out = String::from_utf8(json.stdout).unwrap();
        let result: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
        assert_eq!((&result["event"], &result["exit_code"]), (&"result".into(), &2.into()), "{out}");
        assert!(result["error"]["message"].as_str().unwrap().contains(part), "{out}");
    };
    let command = Cli::command();
    let mut count = 0;
    for arg in command.get_arguments().filter(|arg| arg.get_env().is_some()) {
        let (flag, variable) = (arg.get_long().unwrap(), arg.get_env().unwrap().to_str().unwrap());
        count += 1;
        for args in [["plan", "web"].as_slice(), &["images", "list"], &["policy"]] {
            refused(&[(variable, "")], args, &format!("the environment variable {variable} is empty"));
            let empty = format!("--{flag}=");
            refused(
                &[],
                &[args, &[empty.as_str(), "-v"]].concat(),
                &format!("the value of --{flag} is empty"),
            );
        }
        // The flag overrides the variable, and help needs no variable.
        let flag = format!("--{flag}=local");
        let output = oven(dir.path(), &[(variable, "")], &["checksum", "web", &flag]);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(oven(dir.path(), &[(variable, "")], &["--help"]).status.code(), Some(0));
    }
    assert_eq!(count, 6);
    for (args, part) in [
        (["plan", "web", "--region-dir", ""].as_slice(), "the value of --region-dir is empty"),
        (&["plugin", "list", "--plugin", ""], "the value of --plugin is empty"),
        (&["checksum", "web", "--trace", ""], "the value of --trace is empty"),
        (&["bake", ""], "the argument <DIR>... is empty"),
        (&["plan", "web", ""], "the argument [DIR]... is empty"),
        (&["plan", "--os-release", ""], "the value of --os-release is empty"),
        (&["import", "", "--name", "x"], "the argument <RAW> is empty"),
        (&["import", "x", "--name", ""], "the value of --name is empty"),
        (&["export", "", "x"], "the argument <IMAGE|SNAPSHOT> is empty"),
        (&["export", "ami-1", ""], "the argument <FILE> is empty"),
        (&["images", "list", ""], "the argument [NAME] is empty"),
        (&["images", "show", ""], "the argument <AMI> is empty"),
        (&["shell", ""], "the argument <IMAGE|RUN> is empty"),
        (&["sweep", "--run", ""], "the value of --run is empty"),
        (&["plugin", "check", "debian", "--golden", ""], "the value of --golden is empty"),
        (&["plugin", "new", ""], "the argument <NAME> is empty"),
        (&["bake", "web", "--secret", ""], "the value of --secret is empty"),
    ] {
        refused(&[], args, part);
    }
    assert!(!dir.path().join("region").exists());
}

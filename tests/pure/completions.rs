//! Completions of shells.

use clap::CommandFactory;
use oven::cli::args::Cli;
use std::path::Path;
use std::process::Command;

fn script(shell: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
    let output = command.env_clear().args(["completions", shell]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Completes the last word with bash, as readline does. Returns the completions, and the options of `compopt`, with
/// which bash completes paths.
fn complete(dir: &Path, words: &[&str]) -> (Vec<String>, String) {
    let program = "
        eval \"$SCRIPT\"
        compopt() { echo \"$2\" >&2; }
        COMP_WORDS=(\"$@\")
        COMP_CWORD=$(($# - 1))
        _oven oven \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"
        printf '%s\\n' \"${COMPREPLY[@]}\"";
    let mut command = Command::new("bash");
    command.args(["--norc", "-c", program, "bash", "oven"]).args(words).env("SCRIPT", script("bash"));
    let output = command.current_dir(dir).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    let mut found: Vec<_> =
        text(&output.stdout).lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
    found.sort();
    (found, text(&output.stderr).trim().to_owned())
}

#[test]
fn bash_completes_values_verbs_and_paths() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("web")).unwrap();
    std::fs::write(dir.path().join("os release"), "").unwrap();
    let none = "";
    let cases: &[(&[&str], &[&str], &str)] = &[
        (&["--cloud", ""], &["aws", "local"], none),
        (&["bake", "web", "--cloud", "l"], &["local"], none),
        (&["bake", "--disks", ""], &["attached", "direct"], none),
        (&["--disks", "d"], &["direct"], none),
        (&["--progress", ""], &["auto", "plain", "tty"], none),
        (&["images", "list", "--color", ""], &["always", "auto", "never"], none),
        (&["bake", "--compat", ""], &["gumgum"], none),
        (&["plan", "--arch", ""], &["arm64", "x86_64"], none),
        (&["import", "--arch", "a"], &["arm64"], none),
        (&["import", "--boot-mode", ""], &["legacy-bios", "uefi", "uefi-preferred"], none),
        (&["plugin", "new", "--lang", ""], &["python", "sh"], none),
        (&["completions", "z"], &["zsh"], none),
        (&["im"], &["images", "import"], none),
        (&["images", "s"], &["show"], none),
        (&["bake", "--keep"], &["--keep-on-failure"], none),
        (&["bake", "--region-d"], &["--region-dir"], none),
        // bash completes names of directories, and names of files.
        (&["--region-dir", ""], &[], "plusdirs"),
        (&["plan", "--os-release", "os"], &["os release"], "filenames"),
        (&["--trace", "os"], &["os release"], "filenames"),
        (&["bake", ""], &[], "dirnames"),
        (&["bake", "--force", "w"], &[], "dirnames"),
        (&["checksum", "web", ""], &[], "dirnames"),
        (&["import", ""], &[], none),
        (&["export", "ami-1", ""], &[], none),
    ];
    for (words, expected, option) in cases {
        let (found, options) = complete(dir.path(), words);
        assert_eq!(
            (found, options.as_str()),
            (expected.iter().map(|w| (*w).to_owned()).collect(), *option),
            "{words:?}"
        );
    }
    // A name is not completed as a file.
    for words in [["--region", "o"].as_slice(), &["import", "--name", "o"], &["bake", "--secret", "o"]] {
        assert_eq!(complete(dir.path(), words).0, ["o"], "{words:?}");
    }
    // bash completes names of files if the script completes nothing.
    assert!(script("bash").contains("complete -F _oven -o nosort -o bashdefault -o default oven"));
}

/// Every option of every verb, with its values.
fn each_option(see: &mut dyn FnMut(&clap::Arg, Vec<String>)) {
    let mut command = Cli::command();
    command.build();
    let mut commands = vec![command];
    while let Some(command) = commands.pop() {
        for arg in command.get_arguments().filter(|arg| arg.get_action().takes_values()) {
            let values = arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
            see(arg, values);
        }
        commands.extend(command.get_subcommands().filter(|verb| verb.get_name() != "help").cloned());
    }
}

#[test]
fn zsh_and_fish_complete_the_values_of_every_option() {
    let (zsh, fish) = (script("zsh"), script("fish"));
    let mut count = 0;
    each_option(&mut |arg, values| {
        let Some(long) = arg.get_long().filter(|_| !values.is_empty()) else { return };
        count += 1;
        let line = zsh
            .lines()
            .find(|line| line.contains(&format!("--{long}=[")) && line.contains(&values.join(" ")));
        assert!(line.is_some(), "zsh: --{long} {values:?}");
        let line =
            fish.lines().find(|line| line.contains(&format!(" -l {long} ")) && line.contains(&values[0]));
        let rest = line
            .map(|line| fish[fish.find(line).unwrap()..].split("complete -c").take(2).collect::<String>());
        assert!(
            rest.is_some_and(|rest| values.iter().all(|v| rest.contains(v.as_str()))),
            "fish: --{long} {values:?}"
        );
    });
    assert!(count > 8, "{count}");
    let dirs = zsh.lines().find(|line| line.contains("'--region-dir=["));
    assert!(dirs.is_some_and(|line| line.contains(":_files -/")), "{dirs:?}");
    assert!(zsh.lines().any(|line| line.contains("'--os-release=[") && line.contains(":_files")), "{zsh}");
    let dirs = fish.lines().find(|line| line.contains(" -l region-dir "));
    assert!(dirs.is_some_and(|line| line.contains("__fish_complete_directories")), "{dirs:?}");
}

#[test]
fn every_closed_set_of_values_is_known_to_shells() {
    let mut open = Vec::new();
    each_option(&mut |arg, values| {
        if values.is_empty() && arg.get_value_hint() == clap::ValueHint::Unknown {
            let last = arg.get_value_names().unwrap_or_default().first().map(ToString::to_string);
            open.push(arg.get_long().map_or_else(|| last.unwrap_or_default(), |long| format!("--{long}")));
        }
    });
    open.sort();
    open.dedup();
    // These have any value. A new option is listed here, or has words or a hint for shells.
    let expected = [
        "--has",
        "--instance-id",
        "--jobs",
        "--kms-key",
        "--name",
        "--older-than",
        "--region",
        "--run",
        "--secret",
        "--text",
        "--var",
        "--zone",
        "AMI",
        "IMAGE|RUN",
        "IMAGE|SNAPSHOT",
        "NAME",
    ];
    assert_eq!(open, expected);
}

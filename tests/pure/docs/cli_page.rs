//! The reference page of the command line.

use super::key_pages::GENERATED;
use clap::{Arg, Command};
use oven::cli::args;
use std::fmt::Write;

pub fn page() -> String {
    let mut command = args::command();
    let mut text = format!(
        "{GENERATED}\n# The command line\n\n{}.\n\nStandard output has the answer and nothing else: the AMI's id, or a \
         line `ami-…<TAB>name` for each of several definitions. Everything else goes to standard error. With `--json`, \
         standard output is [a stream of events](json-events.md).\n",
        about(&command)
    );
    _ = write!(text, "\n```text\n{}\n```\n\n| verb | what it does |\n|---|---|\n", usage(&mut command));
    let mut verbs = Vec::new();
    verbs_of(&command, &mut verbs);
    for verb in &verbs {
        let name = name(verb);
        _ = writeln!(text, "| [`{name}`](#{}) | {} |", name.replace(' ', "-"), cell(&about(verb)));
    }
    text.push_str("\n## Global options\n\nEvery verb takes these options, before it or after it.\n");
    let globals = command.get_arguments().filter(|arg| arg.is_global_set());
    options(&mut text, globals.chain(command.get_arguments().filter(|arg| arg.get_id() == "version")));
    after(&mut text, &command);
    for verb in &mut verbs {
        _ = write!(text, "\n## `{}`\n\n{}.\n\n```text\n{}\n```\n", name(verb), about(verb), usage(verb));
        arguments(&mut text, verb.get_positionals());
        options(
            &mut text,
            verb.get_arguments().filter(|arg| {
                !arg.is_positional()
                    && !arg.is_global_set()
                    && !["help", "version"].contains(&arg.get_id().as_str())
            }),
        );
        after(&mut text, verb);
    }
    text
}

/// Those that do something, not those that only have others below them.
fn verbs_of(command: &Command, into: &mut Vec<Command>) {
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        if below.has_subcommands() {
            verbs_of(below, into);
        } else {
            into.push(below.clone());
        }
    }
}

fn name(command: &Command) -> String {
    command.get_bin_name().unwrap_or(command.get_name()).to_owned()
}

fn about(command: &Command) -> String {
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
    as_line(&about)
}

fn usage(command: &mut Command) -> String {
    let usage = command.render_usage().to_string();
    usage.trim_start_matches("Usage:").trim().replace("\n       ", "\n")
}

/// The paragraphs of a help text as one line, without the period at its end.
fn as_line(text: &str) -> String {
    text.trim().replace("\n\n", " ").trim_end_matches('.').to_owned()
}

/// As a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn arguments<'a>(text: &mut String, args: impl Iterator<Item = &'a Arg>) {
    rows(text, "argument", args.map(|arg| (format!("`{arg}`"), arg)).collect());
}

fn options<'a>(text: &mut String, args: impl Iterator<Item = &'a Arg>) {
    let spelt = |arg: &Arg| {
        let short = arg.get_short().map(|short| format!("`-{short}`, ")).unwrap_or_default();
        let long = arg.get_long().map(|long| format!("--{long}")).unwrap_or_default();
        let names = arg.get_value_names().filter(|_| arg.get_action().takes_values()).unwrap_or_default();
        let values: String = names.iter().map(|name| format!(" <{name}>")).collect();
        format!("{short}`{long}{values}`")
    };
    rows(text, "option", args.map(|arg| (spelt(arg), arg)).collect());
}

fn rows(text: &mut String, what: &str, args: Vec<(String, &Arg)>) {
    if args.is_empty() {
        return;
    }
    _ = write!(text, "\n| {what} | meaning |\n|---|---|\n");
    for (spelt, arg) in args {
        _ = writeln!(text, "| {} | {} |", cell(&spelt), cell(&meaning(arg)));
    }
}

fn meaning(arg: &Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut help = as_line(&help);
    if arg.get_action().takes_values() {
        let words: Vec<_> =
            arg.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
        if !words.is_empty() && !arg.is_hide_possible_values_set() {
            _ = write!(help, " ({})", words.join(", "));
        }
        let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        if !defaults.is_empty() {
            _ = write!(help, " [default: {}]", defaults.join(", "));
        }
    }
    if let Some(variable) = arg.get_env() {
        _ = write!(help, " [environment: `{}`]", variable.to_string_lossy());
    }
    help
}

/// Examples as a block of commands, the rest as it is.
fn after(text: &mut String, command: &Command) {
    let Some(after) = command.get_after_long_help().map(ToString::to_string) else { return };
    let Some(examples) = after.strip_prefix("Examples:\n") else {
        // The page of environment variables has their list.
        let after = after.split("\n\nEnvironment variables:").next().unwrap_or_default();
        let (title, list) = after.split_once(":\n").unwrap_or(("", after));
        if title.is_empty() {
            _ = write!(text, "\n{after}\n");
        } else {
            _ = write!(text, "\n{title}:\n\n```text\n{list}\n```\n");
            text.push_str("\n[Environment variables](environment.md) can be used instead of some options.\n");
        }
        return;
    };
    let (examples, rest) = examples.split_once("\n\n").unwrap_or((examples, ""));
    let lines: Vec<_> = examples.lines().map(|line| line.strip_prefix("  ").unwrap_or(line)).collect();
    // What follows a command is a remark.
    let lines = lines.iter().map(|line| match line.trim_start().split_once("  ") {
        Some((command, remark)) if !line.starts_with(' ') => {
            format!("{command:<40}  # {}", remark.trim_start())
        }
        _ => (*line).to_owned(),
    });
    _ = write!(text, "\n```sh\n{}\n```\n", lines.collect::<Vec<_>>().join("\n"));
    if !rest.is_empty() {
        _ = write!(text, "\n{rest}\n");
    }
}

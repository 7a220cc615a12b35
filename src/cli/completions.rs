//! `oven completions`.

use super::args::{Cli, GlobalArgs};
use super::{End, print_raw};
use clap::{Arg, Command, CommandFactory, ValueHint};
use clap_complete::Shell;
use serde_json::json;

/// The condition under which the script for bash completes options.
const OPTIONS_IF: &str = "if [[ ${cur} == -* || ${COMP_CWORD} -eq ";
/// The last words of a verb in the script for bash.
const OPTIONS_AT_END: &str =
    "            COMPREPLY=( $(compgen -W \"${opts}\" -- \"${cur}\") )\n            return 0\n            ;;";

pub fn run(global: &GlobalArgs, shell: Shell) -> End {
    let script = script(shell);
    if !global.json {
        print_raw(script.trim_end());
    }
    End::success(json!({"script": script}))
}

fn script(shell: Shell) -> String {
    let mut command = with_hints(Cli::command());
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "oven", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    if shell == Shell::Bash { with_paths(script, &command) } else { script }
}

/// Makes the shell complete nothing for a value that is neither a path nor one of several words. Otherwise it would
/// complete the names of files.
fn with_hints(command: Command) -> Command {
    let hint = |arg: Arg| {
        let is_open = arg.get_action().takes_values() && arg.get_possible_values().is_empty();
        let is_unknown = is_open && arg.get_value_hint() == ValueHint::Unknown;
        if is_unknown { arg.value_hint(ValueHint::Other) } else { arg }
    };
    command.mut_args(hint).mut_subcommands(with_hints)
}

/// Changes the script for bash: an argument that is a path is completed as one. clap_complete completes the options of
/// the verb instead.
fn with_paths(mut script: String, command: &Command) -> String {
    let mut verbs = vec![("oven".to_owned(), command)];
    while let Some((label, command)) = verbs.pop() {
        for verb in command.get_subcommands() {
            verbs.push((format!("{label}__subcmd__{}", verb.get_name()), verb));
        }
        let hints: Vec<_> = command.get_positionals().map(Arg::get_value_hint).collect();
        let action = match hints.last() {
            // bash completes names of files if there are no other completions.
            Some(ValueHint::FilePath) => "",
            Some(ValueHint::DirPath) => "            compopt -o dirnames\n",
            _ => continue,
        };
        let Some(start) = script.find(&format!("\n        {label})\n            opts=")) else { continue };
        let Some(length) = script[start..].find(OPTIONS_AT_END) else { continue };
        let end = start + length;
        let options = script[start..end].find(OPTIONS_IF).map(|at| start + at);
        script.replace_range(
            end..end + OPTIONS_AT_END.len(),
            &format!("            COMPREPLY=()\n{action}            return 0\n            ;;"),
        );
        if let Some(close) = options.and_then(|at| script[at..].find("]]").map(|length| at..at + length)) {
            script.replace_range(close, "if [[ ${cur} == -* ");
        }
    }
    script
}

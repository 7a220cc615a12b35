//! Runs the definition's own provisioners and tests: scripts, commands, bats files and Ansible playbooks.

use super::ansible::BakeTools;
use super::command::{CommandRunner, DefinitionTable, ImageCommand};
use super::programs::{ANSIBLE, has_program};
use super::script_mounts;
use super::script_mounts::ScriptBinds;
use crate::definition::{Definition, Playbook, Program, Script, ScriptKind};
use crate::error::Kind;
use anyhow::Result;
use oven_distro::Shim;
use std::collections::BTreeMap;
use std::time::Duration;

const BATS: &str = "bats";

/// The path of the file with Ansible's variables. The file disappears after the step, because each step has a private
/// `/run`.
const VARIABLES: &str = "/run/oven/ansible.json";
/// The directory to which Ansible writes. It also disappears after the step.
const ANSIBLE_HOME: &str = "/run/ansible";

/// Returns the programs that the definition's playbooks need. oven asks the plugin to install those programs that the
/// image lacks.
pub fn tools(image: &Definition) -> Vec<String> {
    let playbooks = image.runs.iter().any(|script| script.playbook().is_some());
    playbooks.then(|| ANSIBLE.to_owned()).into_iter().collect()
}

/// Runs every `[[run]]` and `[[ansible]]`, in the order of image.toml.
pub async fn run(runner: &CommandRunner<'_>) -> Result<()> {
    let image = runner.work.image;
    let last = image.runs.iter().rposition(|script| script.playbook().is_some());
    let mut tools: Option<BakeTools> = None;
    for (index, script) in image.runs.iter().enumerate() {
        if script.playbook().is_some() && tools.is_none() {
            tools = BakeTools::install(runner, script).await?;
        }
        run_script(runner, script).await?;
        // Ansible is removed after the last playbook. So all later scripts and tests see the image as it will be at the
        // end.
        if last == Some(index)
            && let Some(tools) = tools.take()
        {
            tools.remove(runner).await?;
        }
    }
    Ok(())
}

/// Runs every `[[test]]`. Writes of tests are discarded.
pub async fn test(runner: &CommandRunner<'_>) -> Result<()> {
    let image = runner.work.image;
    let bats = image.tests.iter().find(|test| matches!(test.program, Program::Bats(_)));
    if let Some(test) = bats
        && !test.env.contains_key("PATH")
        && !has_program(runner.place.inside, BATS)?
    {
        let place = image.place_of_script(test, "bats", None);
        return Err(Kind::Definition
            .failure(format!("{place} needs bats, but the image does not have it"))
            .at(&place)
            .hint("Add it to `packages` (on most distributions its name is `bats`), or install it in a [[run]].")
            .into());
    }
    for script in &image.tests {
        run_script(runner, script).await?;
    }
    Ok(())
}

/// The title of the step that runs a script.
pub fn title(script: &Script) -> String {
    let name = script.name();
    match script.kind {
        ScriptKind::Test => format!("testing with {name}"),
        ScriptKind::Run => format!("running {name}"),
        ScriptKind::Ansible => format!("running the playbook {name}"),
    }
}

/// Runs a script. The working directory is the definition's directory, which is mounted read-only.
async fn run_script(runner: &CommandRunner<'_>, script: &Script) -> Result<()> {
    let image = runner.work.image;
    let mut shims = runner.script_shims();
    let mut seen = script_mounts::script_mounts(image, &shims)?;
    let (kind, name) = (script.kind.key(), script.name());
    let mut env = image.vars.values();
    let argv = match &script.program {
        Program::Script(path) => append(script_mounts::script_command(image, path, &mut seen)?, &script.args),
        Program::Command(argv) => argv.clone(),
        Program::Bats(path) => {
            let file = script_mounts::script_path(image, path, &mut seen)?;
            append(append(vec![BATS.to_owned()], &script.args), &[file])
        }
        Program::Playbook(playbook) => {
            env.extend(ansible_environment());
            shims.push(variables_file(image, playbook));
            ansible_command(image, playbook, &script.args, &mut seen)?
        }
    };
    env.extend(script_mounts::environment(image, kind, &seen));
    env.extend(script.env.clone());
    let call = ImageCommand {
        phase: kind.to_owned(),
        why: title(script),
        name: name.clone(),
        argv,
        env,
        secrets: script.secrets.clone(),
        cwd: script_mounts::DEFINITION_DIR.to_owned(),
        network: script.network,
        shims,
        binds: seen.binds,
        throwaway: script.kind == ScriptKind::Test,
        retries: script.retries,
        timeout: Duration::from_secs(script.timeout),
        key: Some(DefinitionTable { table: kind, name, line: script.line }),
        ..ImageCommand::script_defaults(runner)
    };
    runner.run(&call).await
}

fn append(mut argv: Vec<String>, more: &[String]) -> Vec<String> {
    argv.extend_from_slice(more);
    argv
}

fn ansible_command(
    image: &Definition,
    playbook: &Playbook,
    args: &[String],
    seen: &mut ScriptBinds,
) -> Result<Vec<String>> {
    // Because of the comma in `localhost,`, Ansible reads this argument as a list of hosts and not as a file name.
    let argv = [ANSIBLE, "--inventory", "localhost,", "--connection", "local", "--extra-vars"];
    let mut argv = append(argv.map(str::to_owned).to_vec(), &[format!("@{VARIABLES}")]);
    if !playbook.tags.is_empty() {
        argv.extend(["--tags".to_owned(), playbook.tags.join(",")]);
    }
    let file = script_mounts::script_path(image, &playbook.path, seen)?;
    Ok(append(append(argv, args), &[file]))
}

/// Returns the file with the definition's variables and the playbook's own variables. If both define a variable, the
/// playbook's value is used.
fn variables_file(image: &Definition, playbook: &Playbook) -> Shim {
    let vars = image.vars.values().into_iter().map(|(name, value)| (name, value.into()));
    let vars: serde_json::Map<String, serde_json::Value> = vars.chain(playbook.vars.clone()).collect();
    Shim { path: VARIABLES.to_owned(), content: serde_json::Value::Object(vars).to_string(), mode: 0o600 }
}

/// Returns variables with which Ansible writes its caches, temporary files and compiled modules outside of the image.
fn ansible_environment() -> BTreeMap<String, String> {
    let temporary = format!("{ANSIBLE_HOME}/tmp");
    [
        ("ANSIBLE_HOME", ANSIBLE_HOME),
        ("ANSIBLE_LOCAL_TEMP", &temporary),
        ("ANSIBLE_REMOTE_TEMP", &temporary),
        ("ANSIBLE_RETRY_FILES_ENABLED", "False"),
        ("ANSIBLE_NOCOLOR", "1"),
        ("ANSIBLE_NOCOWS", "1"),
        // With this value, Ansible uses the image's Python, and does not warn that another Python may be installed
        // later.
        ("ANSIBLE_PYTHON_INTERPRETER", "auto_silent"),
        ("PYTHONDONTWRITEBYTECODE", "1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

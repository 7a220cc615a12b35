//! Reads `[[run]]`, `[[ansible]]` and `[[test]]`: the programs to run in the image.

use super::paths::Sources;
use super::vars::{Vars, free_name, plain, variable_name};
use crate::config::toml_reader::{At, Table, until_stopped};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use toml::de::DeValue;

/// The default time limit of a script, in seconds.
pub(super) const DEFAULT_TIMEOUT: u64 = 3600;
/// The largest time limit, in seconds: a week. A larger number is probably a mistake in the unit.
pub(super) const MAX_TIMEOUT: u64 = 7 * 24 * 3600;
/// The maximum of `retries`.
pub(super) const MAX_RETRIES: u64 = 20;

/// The kind of the table that declares a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScriptKind {
    Run,
    Ansible,
    /// Its changes to the image are discarded.
    Test,
}

/// The program to start. Paths are relative to the definition's directory. A path of a file in one of `inputs` begins
/// with `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    Script(PathBuf),
    /// A program in the image, and its arguments.
    Command(Vec<String>),
    /// A file with bats tests.
    Bats(PathBuf),
    Playbook(Playbook),
}

/// A playbook, and the options with which Ansible runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Playbook {
    pub path: PathBuf,
    /// Variables of the playbook, as JSON values by name.
    pub vars: BTreeMap<String, serde_json::Value>,
    pub tags: Vec<String>,
}

/// A table `[[run]]`, `[[ansible]]` or `[[test]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    pub kind: ScriptKind,
    /// The line of the table's header in image.toml.
    pub line: usize,
    pub program: Program,
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// The names of the secrets that the script gets from oven's environment.
    pub secrets: Vec<String>,
    pub network: bool,
    /// The maximum number of retries after a failure.
    pub retries: u32,
    /// The time limit in seconds. The default is 3600.
    pub timeout: u64,
}

impl ScriptKind {
    pub fn key(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Ansible => "ansible",
            Self::Test => "test",
        }
    }
}

impl Script {
    /// The script's name for messages: a path or a program.
    pub fn name(&self) -> String {
        match &self.program {
            Program::Script(path) | Program::Bats(path) => path.display().to_string(),
            Program::Playbook(playbook) => playbook.path.display().to_string(),
            Program::Command(argv) => argv.first().cloned().unwrap_or_default(),
        }
    }

    pub fn playbook(&self) -> Option<&Playbook> {
        if let Program::Playbook(playbook) = &self.program { Some(playbook) } else { None }
    }
}

/// Reads all scripts of one kind, in the order of the file.
pub fn read(top: &Table, kind: ScriptKind, sources: &Sources, vars: &Vars) -> Vec<Script> {
    let tables = until_stopped(top.tables(kind.key()));
    tables.filter_map(|table| read_one(&table, kind, sources, vars)).collect()
}

fn read_one(table: &Table, kind: ScriptKind, sources: &Sources, vars: &Vars) -> Option<Script> {
    let program = program(table, kind, sources);
    let args = strings(table, "args");
    if !args.is_empty() && table.has("command") {
        let line = table.value("args").map_or(table.line, |at| at.line);
        table.wrong::<()>("args", line, "cannot be used with `command`: put the arguments into `command`");
    }
    let env = environment(table);
    let secrets = secrets(table, vars, &env);
    let network = table.flag("network");
    let timeout = table.number("timeout");
    let retries = u32::try_from(table.number("retries")).unwrap_or_default();
    let (line, program) = (table.line, program?);
    Some(Script { kind, line, program, args, env, secrets, network, retries, timeout })
}

fn program(table: &Table, kind: ScriptKind, sources: &Sources) -> Option<Program> {
    let mut keys = table.one_of().iter().filter(|key| table.has(key));
    let key = match (keys.next(), keys.next()) {
        (Some(key), None) => *key,
        (Some(first), Some(second)) => {
            let line = table.value(second).map_or(table.line, |at| at.line);
            let header = kind.key();
            table.mistake(line, format!("[[{header}]] has both `{first}` and `{second}`: use only one"));
            return None;
        }
        (None, _) if kind == ScriptKind::Ansible => "playbook",
        (None, _) => {
            let keys: Vec<_> = table.one_of().iter().map(|key| format!("`{key}`")).collect();
            table.none_of(&format!("[[{}]] needs one of: {}", kind.key(), keys.join(", ")));
            return None;
        }
    };
    let path = |at: At<&str>| table.check(key, at.line, sources.file(at.value)).map(|_| at.value.into());
    match key {
        "script" => {
            let at = table.string(key)?;
            table.check(key, at.line, sources.script(at.value)).map(Program::Script)
        }
        "bats" => table.string(key).and_then(path).map(Program::Bats),
        "playbook" => {
            let (at, vars, tags) = (table.string(key), ansible_vars(table), strings(table, "tags"));
            Some(Program::Playbook(Playbook { path: at.and_then(path)?, vars: vars?, tags }))
        }
        _ => {
            let line = table.value(key)?.line;
            let argv = strings(table, key);
            match argv.first() {
                Some(program) if !program.is_empty() => Some(Program::Command(argv)),
                // A value that is not an array was reported already.
                _ if table.value(key)?.value.as_array().is_none() => None,
                _ => {
                    let expected = table.key(key).expected();
                    table.wrong(key, line, format!("names no program: it should be {expected}"))
                }
            }
        }
    }
}

fn strings(table: &Table, key: &str) -> Vec<String> {
    let all = table.strings(key).into_iter();
    all.filter_map(|at| table.check(key, at.line, plain(at.value)).map(|()| at.value.to_owned())).collect()
}

fn environment(table: &Table) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let Some(table) = table.user_table("env") else { return env };
    for (name, value) in table.entries() {
        let shown = name.value.escape_debug().to_string();
        let free = variable_name(name.value).and_then(|()| match name.value.starts_with("OVEN_") {
            true => Err("is reserved for oven: choose another name".into()),
            false => Ok(()),
        });
        let good = table.check(&shown, name.line, free).is_some();
        let DeValue::String(text) = value.value else {
            table.wrong_type::<()>(&shown, &value, "a quoted string");
            continue;
        };
        if table.check(&shown, value.line, plain(text)).is_some() && good {
            env.insert(name.value.to_owned(), text.to_string());
        }
    }
    env
}

fn secrets(table: &Table, vars: &Vars, env: &BTreeMap<String, String>) -> Vec<String> {
    let (mut secrets, mut known) = (Vec::new(), BTreeSet::new());
    for at in until_stopped(table.strings("secrets")) {
        let name = at.value.to_owned();
        // If the text is not a valid name, the error does not show it, because somebody may have written the secret's
        // value here.
        let checked = match free_name(&name) {
            Err(_) if variable_name(&name).is_err() => {
                Err("has an element that is not a valid variable name: list names, not values".into())
            }
            Err(what) => Err(format!("has {name}, which {what}")),
            Ok(()) if known.contains(&name) => Err(format!("has {name} twice: remove one")),
            Ok(()) if vars.declared.contains_key(&name) => Err(format!(
                "has {name}, which is also in [vars]: remove it from one of the two (values in [vars] are not secret)"
            )),
            Ok(()) if env.contains_key(&name) => {
                Err(format!("has {name}, which is also in `env`: remove it from one of the two"))
            }
            Ok(()) => Ok(()),
        };
        if table.check("secrets", at.line, checked).is_some() {
            known.insert(name.clone());
            secrets.push(name);
        }
    }
    secrets
}

fn ansible_vars(table: &Table) -> Option<BTreeMap<String, serde_json::Value>> {
    let mut vars = BTreeMap::new();
    let Some(table) = table.value("vars").and_then(|_| table.user_table("vars")) else {
        return (!table.has("vars")).then_some(vars);
    };
    let mut good = true;
    for (name, value) in table.entries() {
        let shown = name.value.escape_debug().to_string();
        good &= table.check(&shown, name.line, variable_name(name.value)).is_some();
        match json(value.value) {
            Some(json) => _ = vars.insert(name.value.to_owned(), json),
            None => {
                good &=
                    table.wrong::<()>(&shown, value.line, "is a number that JSON cannot represent").is_some()
            }
        }
    }
    good.then_some(vars)
}

/// Converts a TOML value to JSON. A date becomes a string. Returns `None` for `inf`, `nan` and integers that need more
/// than 64 bits.
fn json(value: &DeValue<'_>) -> Option<serde_json::Value> {
    use serde_json::Value;
    Some(match value {
        DeValue::String(text) => Value::from(&**text),
        DeValue::Boolean(truth) => Value::from(*truth),
        DeValue::Datetime(time) => Value::from(time.to_string()),
        DeValue::Integer(integer) => {
            Value::from(i64::from_str_radix(integer.as_str(), integer.radix()).ok()?)
        }
        DeValue::Float(float) => Value::Number(serde_json::Number::from_f64(float.as_str().parse().ok()?)?),
        DeValue::Array(array) => {
            Value::Array(array.iter().map(|element| json(element.get_ref())).collect::<Option<_>>()?)
        }
        DeValue::Table(table) => {
            let fields =
                table.iter().map(|(key, value)| Some((key.get_ref().to_string(), json(value.get_ref())?)));
            Value::Object(fields.collect::<Option<_>>()?)
        }
    })
}

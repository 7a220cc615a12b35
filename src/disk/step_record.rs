//! The record of the step at which a bake failed. `oven shell` reads it to enter the preserved disk as the step did, and
//! to run the step again.
//!
//! ```text
//! STATE/steps/RUN.json        the step of this run
//! ```
//!
//! A record has the names of secrets, but no values. It belongs to one machine: another machine that opens the same
//! disk has no record.

use crate::error::Kind;
use crate::ids::RunId;
use crate::sandbox::spec::StepSpec;
use crate::secrets::Secrets;
use crate::sys::state_files;
use crate::sys::temp_file::write_atomically;
use anyhow::{Context, Result};
use oven_distro::Cache;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

const DIR: &str = "steps";
const FORMAT: u32 = 1;
/// The maximum size of a record in bytes. The command line and the environment of a program have at most 2 MiB, and
/// seldom more than a few KiB.
const SIZE_MAX: u64 = 4 << 20;
/// The maximum number of records on a machine. Records of disks that were removed by another machine are removed only
/// because of this limit.
const MAX_RECORDS: usize = 200;
/// The directory below which steps see files of this machine.
const BINDS: &str = "/run/oven";
/// The maximum of a time limit in seconds. It is one year, so that sums of times do not overflow.
const TIMEOUT_MAX: u64 = 365 * 24 * 3600;

/// The step at which a run failed, and its definition.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    format: u32,
    run: RunId,
    pub definition: RecordedDefinition,
    pub step: RecordedStep,
}

/// The definition of a run, and its state when the bake read it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedDefinition {
    /// The absolute paths of the definition's directory and of its inputs.
    pub directories: Vec<PathBuf>,
    /// The canonical path of the project.
    pub project: PathBuf,
    /// The `ami_config_checksum` of the directories.
    pub checksum: String,
}

/// A step that can run again.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedStep {
    /// The purpose, such as `running setup.sh`.
    pub why: String,
    /// The table of image.toml that requests the step: `run`, `ansible` or `test`. `None` for a step of the plan.
    pub table: Option<String>,
    /// The line of the table.
    pub line: Option<usize>,
    /// The names of the secrets that the step gets as environment variables.
    pub secrets: Vec<String>,
    /// Whether the step may use the builder's metadata service.
    pub imds: bool,
    /// Whether the step gets the settings of `[network]`.
    pub fetches: bool,
    /// The time limit in seconds.
    pub timeout: u64,
    /// The package caches that the step saw.
    pub caches: Option<RecordedCaches>,
    /// The specification without secrets, settings of `[network]`, caches, and the paths and nodes of a mounted image.
    pub spec: StepSpec,
}

/// What selects the package caches of a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedCaches {
    /// The snapshot of the base image.
    pub base: String,
    /// The key of the caches. It is not computed again, because the step may have changed the package sources.
    pub key: String,
    /// The caches of the plan that the bake opened.
    pub caches: Vec<Cache>,
    /// Whether later commands see what the step wrote to the caches.
    pub writable: bool,
}

impl RecordedCaches {
    fn has_only_absolute_paths(&self) -> bool {
        let mut paths = self.caches.iter().flat_map(|cache| cache.sources.iter().chain([&cache.path]));
        paths.all(|path| is_plain_path(path))
    }

    /// Whether the key is one that oven computes. It is also the name of a directory.
    fn has_valid_key(&self) -> bool {
        !self.key.is_empty() && self.key.bytes().all(|byte| byte.is_ascii_alphanumeric())
    }
}

/// Whether a path is absolute and has no `..`.
fn is_plain_path(path: &str) -> bool {
    let mut components = Path::new(path).components();
    path.starts_with('/') && !path.contains('\0') && components.all(|part| part != Component::ParentDir)
}

impl StepRecord {
    pub fn new(run: &RunId, definition: RecordedDefinition, step: RecordedStep) -> Self {
        Self { format: FORMAT, run: run.clone(), definition, step }
    }

    /// Writes the record. Fails if it is too large, or if it contains the value of a secret.
    pub fn save(&self, state: &Path, secrets: &Secrets) -> Result<()> {
        let path = path(state, &self.run).context("the id of the run is invalid")?;
        let text = serde_json::to_vec_pretty(self)?;
        if text.len() as u64 > SIZE_MAX {
            return Err(Kind::Step.error(format!("its command is larger than {} MiB", SIZE_MAX >> 20)));
        }
        if let Some(name) = secrets.find(&text) {
            let what = format!("its command or its environment contains the value of the secret {name}");
            return Err(Kind::Step.error(what));
        }
        let dir = state.join(DIR);
        state_files::create_dir(&dir)?;
        state_files::remove_oldest(&dir, "json", MAX_RECORDS - 1);
        write_atomically(&path, &text, false)
    }

    /// Reads the record of a run. Returns `None` if this machine has none. Fails with [`Kind::Machine`] if the file is
    /// damaged, or if another user could have written it.
    pub fn load(state: &Path, run: &RunId) -> Result<Option<Self>> {
        let Some(path) = path(state, run) else { return Ok(None) };
        let damaged = |what: String| -> anyhow::Error {
            Kind::Machine
                .failure(format!("the record of the failed step, {}, cannot be used: {what}", path.display()))
                .hint(
                    "Remove this file. Then `oven shell` opens the disk without the environment of the step.",
                )
                .into()
        };
        let mut text = Vec::new();
        match state_files::open_file(&path, OFlags::RDONLY) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(damaged(error.to_string())),
            Ok(file) => file.take(SIZE_MAX + 1).read_to_end(&mut text),
        }
        .map_err(|error| damaged(error.to_string()))?;
        if text.len() as u64 > SIZE_MAX {
            return Err(damaged(format!("it is larger than {} MiB", SIZE_MAX >> 20)));
        }
        let record: Self = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        match record.mistake(run) {
            Some(what) => Err(damaged(what.to_owned())),
            None => Ok(Some(record)),
        }
    }

    /// Returns why the record cannot be one that oven wrote for this run.
    fn mistake(&self, run: &RunId) -> Option<&'static str> {
        let StepSpec { argv, env, cwd, shims, binds, .. } = &self.step.spec;
        let is_text = |text: &str| !text.contains('\0');
        let is_name = |name: &str| !name.is_empty() && is_text(name) && !name.contains('=');
        let tables = [None, Some("run"), Some("ansible"), Some("test")];
        let checks = [
            (self.format == FORMAT, "another version of oven wrote it"),
            (self.run == *run, "it belongs to another run"),
            (tables.contains(&self.step.table.as_deref()), "`table` is unknown"),
            (self.step.timeout <= TIMEOUT_MAX, "`timeout` is too large"),
            (!argv.is_empty() && argv.iter().all(|word| is_text(word)), "`argv` is not a command"),
            (env.iter().all(|(name, value)| is_name(name) && is_text(value)), "`env` is not an environment"),
            (
                self.step.caches.as_ref().is_none_or(RecordedCaches::has_only_absolute_paths),
                "`caches` has a path that is not absolute",
            ),
            (
                self.step.caches.as_ref().is_none_or(RecordedCaches::has_valid_key),
                "the `key` of `caches` is not valid",
            ),
            (is_plain_path(cwd), "`cwd` is not an absolute path"),
            (shims.iter().all(|shim| is_plain_path(&shim.path)), "a shim has no absolute path"),
            (
                binds.iter().all(|bind| {
                    let below =
                        Path::new(&bind.target).strip_prefix(BINDS).is_ok_and(|rest| rest != Path::new(""));
                    bind.source.is_absolute() && is_plain_path(&bind.target) && below
                }),
                "a mount is not below /run/oven",
            ),
            (
                self.definition.directories.iter().all(|dir| dir.is_absolute())
                    && !self.definition.directories.is_empty(),
                "`directories` are not absolute paths",
            ),
        ];
        checks.into_iter().find(|(is_right, _)| !is_right).map(|(_, what)| what)
    }
}

/// Returns whether this machine has a record of a run.
pub fn exists(state: &Path, run: &RunId) -> bool {
    path(state, run).is_some_and(|path| path.exists())
}

/// Removes the record of a run, if there is one.
pub fn remove(state: &Path, run: &RunId) -> Result<()> {
    let Some(path) = path(state, run) else { return Ok(()) };
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The path of a run's record. `None` if the id is not one that oven makes. It may come from a tag of the cloud, which
/// others can change.
fn path(state: &Path, run: &RunId) -> Option<PathBuf> {
    let is_id = run.0.len() == 32 && run.0.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then(|| state.join(DIR).join(format!("{run}.json")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::spec::BindMount;
    use oven_distro::Holds;
    use serde_json::{Value, json};
    use std::os::unix::fs::PermissionsExt;

    fn record(run: &RunId) -> StepRecord {
        let definition = RecordedDefinition {
            directories: vec!["/x/web".into()],
            project: "/x".into(),
            checksum: "0".repeat(40),
        };
        let spec = json!({
            "root": "", "argv": ["sh", "-c", "exit 3"], "env": {"A": "b c"}, "cwd": "/run/oven/definition",
            "network": false, "shims": [], "binds": [], "nodes": [], "throwaway": false, "interactive": false,
        });
        let mut spec: StepSpec = serde_json::from_value(spec).unwrap();
        let bind = |source: &str, target: &str| BindMount {
            source: source.into(),
            target: target.into(),
            within: Some("/x".into()),
            hidden: Vec::new(),
        };
        spec.binds.push(bind("/x/web", "/run/oven/definition"));
        let step = RecordedStep {
            why: "running sh".into(),
            table: Some("run".into()),
            line: Some(3),
            secrets: vec!["TOKEN".into()],
            imds: false,
            fetches: false,
            timeout: 60,
            caches: Some(caches()),
            spec,
        };
        StepRecord::new(run, definition, step)
    }

    fn caches() -> RecordedCaches {
        let (path, sources) = ("/var/cache/apt".into(), vec!["/etc/apt".into()]);
        RecordedCaches {
            base: "snap-1".into(),
            key: "0f".repeat(20),
            caches: vec![Cache { path, holds: Holds::Packages, sources }],
            writable: true,
        }
    }

    #[test]
    fn a_record_is_private_and_read_again() {
        let state = tempfile::tempdir().unwrap();
        let (state, run) = (state.path(), RunId::new());
        assert!(StepRecord::load(state, &run).unwrap().is_none() && !exists(state, &run));
        record(&run).save(state, &Secrets::default()).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        let file = path(state, &run).unwrap();
        assert_eq!((mode(&file), mode(&state.join(DIR))), (0o600, 0o700));
        let read = StepRecord::load(state, &run).unwrap().unwrap();
        assert_eq!(json!(read), json!(record(&run)));
        assert!(exists(state, &run));
        remove(state, &run).unwrap();
        remove(state, &run).unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn a_record_with_a_secret_is_not_written() {
        let state = tempfile::tempdir().unwrap();
        let (state, run) = (state.path(), RunId::new());
        let change = |change: &dyn Fn(&mut StepSpec)| {
            let mut record = record(&run);
            change(&mut record.step.spec);
            record.save(state, &Secrets::of_test(&[("TOKEN", "hunter2\"x")])).unwrap_err().to_string()
        };
        for error in [
            change(&|spec| spec.argv.push("--token=hunter2\"x".into())),
            change(&|spec| _ = spec.env.insert("B".into(), "hunter2\"x".into())),
        ] {
            assert!(error.contains("the secret TOKEN") && !error.contains("hunter"), "{error}");
        }
        let large = change(&|spec| spec.argv.push("x".repeat(5 << 20)));
        assert!(large.contains("larger than 4 MiB"), "{large}");
        assert!(!state.join(DIR).exists());
    }

    #[test]
    fn a_damaged_record_is_an_error_that_names_the_file() {
        let state = tempfile::tempdir().unwrap();
        let (state, run) = (state.path(), RunId::new());
        record(&run).save(state, &Secrets::default()).unwrap();
        let path = path(state, &run).unwrap();
        let whole = json!(record(&run));
        let refused = |text: &[u8], part: &str| {
            fs::write(&path, text).unwrap();
            let error = StepRecord::load(state, &run).unwrap_err();
            assert_eq!(Kind::of(&error), Kind::Machine);
            let text = format!("{error:#}");
            assert!(text.contains(path.to_str().unwrap()) && text.contains(part), "{part}: {text}");
            assert!(crate::error::hint_of(&error).unwrap().starts_with("Remove this file."));
        };
        refused(b"", "EOF");
        refused(b"\xff\xfe", "expected value");
        refused(&whole.to_string().as_bytes()[..200], "EOF");
        refused(" ".repeat(5 << 20).as_bytes(), "larger than 4 MiB");
        for (pointer, value, part) in [
            ("/format", json!(2), "another version"),
            ("/run", json!("0".repeat(32)), "another run"),
            ("/step/table", json!("file"), "`table`"),
            ("/step/timeout", json!(u64::MAX), "`timeout`"),
            ("/step/spec/argv", json!([]), "`argv`"),
            ("/step/spec/argv/0", json!("a\0b"), "`argv`"),
            ("/step/spec/env", json!({"A=B": "x"}), "`env`"),
            ("/step/spec/env", json!({"": "x"}), "`env`"),
            ("/step/caches/caches/0/path", json!("/a/../b"), "`caches`"),
            ("/step/caches/caches/0/sources/0", json!("x"), "`caches`"),
            ("/step/caches/key", json!("../0f"), "`key`"),
            ("/step/caches/key", json!(""), "`key`"),
            ("/step/spec/cwd", json!("run"), "`cwd`"),
            ("/step/spec/binds/0/target", json!("/etc"), "/run/oven"),
            ("/step/spec/binds/0/target", json!("/run/oven/../../etc"), "/run/oven"),
            ("/step/spec/binds/0/target", json!("/run/oven"), "/run/oven"),
            ("/step/spec/binds/0/source", json!("web"), "/run/oven"),
            ("/step/spec/shims", json!([{"path": "x", "content": "", "mode": 420}]), "shim"),
            ("/definition/directories", json!([]), "`directories`"),
            ("/definition", Value::Null, "invalid type"),
        ] {
            let mut changed = whole.clone();
            *changed.pointer_mut(pointer).expect(pointer) = value;
            refused(changed.to_string().as_bytes(), part);
        }
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(StepRecord::load(state, &run).unwrap_err().to_string().contains("it is a link"));
    }

    #[test]
    fn the_id_of_a_run_is_not_a_path_and_records_are_few() {
        let state = tempfile::tempdir().unwrap();
        let state = state.path();
        for id in ["../../etc/passwd", "", "0123", "../x56789012345678901234567890123"] {
            assert!(path(state, &RunId(id.into())).is_none(), "{id}");
        }
        for _ in 0..MAX_RECORDS + 5 {
            record(&RunId::new()).save(state, &Secrets::default()).unwrap();
        }
        assert_eq!(state.join(DIR).read_dir().unwrap().count(), MAX_RECORDS);
    }
}

//! `oven plugin new`: writes a working plugin for an imaginary package manager.

use crate::cli::args::{Lang, PluginNewArgs};
use crate::error::Kind;
use anyhow::{Context, Result};
use oven_distro::wire::PlanRequest;
use oven_distro::{Job, OsRelease, Package};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const PYTHON: &str = include_str!("skeleton.py");
const SH: &str = include_str!("skeleton.sh");

/// Writes the plugin and the requests of its golden plans into a directory, without overwriting anything. Returns the
/// paths of the written files. The first is the plugin.
pub fn write(dir: &Path, args: &PluginNewArgs) -> Result<Vec<PathBuf>> {
    let name = &args.name;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(plain) {
        let failure = Kind::Usage.failure(format!("{name:?} is not a valid plugin name"));
        return Err(failure
            .hint(
                "Use lower-case letters, digits, `-` and `_`, as in the ID of the distribution's os-release.",
            )
            .into());
    }
    let (template, ending) = match args.lang {
        Lang::Python => (PYTHON, "py"),
        Lang::Sh => (SH, "sh"),
    };
    let golden = dir.join(format!("{name}.golden"));
    let mut files = vec![(dir.join(format!("{name}.{ending}")), template.replace("@NAME@", name), 0o755)];
    for (case, packages) in [("nothing", &[][..]), ("packages", &["nginx", "jq"])] {
        let request = serde_json::to_value(PlanRequest::new(&job(name, packages)))?;
        files.push((golden.join(format!("{case}.request.json")), format!("{request:#}\n"), 0o644));
    }
    let taken = files.iter().map(|(path, ..)| path).chain([&golden]).find(|path| path.exists());
    if let Some(path) = taken {
        return Err(Kind::Usage.error(format!("{} already exists", path.display())));
    }
    std::fs::create_dir(&golden).with_context(|| format!("creating {}", golden.display()))?;
    for (path, text, mode) in &files {
        let file = std::fs::File::options().write(true).create_new(true).mode(*mode).open(path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(files.into_iter().map(|(path, ..)| path).collect())
}

fn job(name: &str, packages: &[&str]) -> Job {
    let named = |name: &&str| Package::Named { name: (*name).to_owned(), version: None, suite: None };
    Job {
        os_release: OsRelease([("ID".to_owned(), name.to_owned())].into()),
        architecture: "x86_64".into(),
        present: [("/usr/bin/pkg".to_owned(), true)].into(),
        packages: packages.iter().map(named).collect(),
        ..Job::default()
    }
}

//! SELinux labels of what a bake made, by the image's own policy.
//!
//! A step may not label: that takes `CAP_SYS_ADMIN`, and restorecon does nothing where the kernel has no SELinux. So the
//! image's own `setfiles` only tells, in a contained step, which label each file should have, and oven writes it into
//! the file's attributes, through descriptors inside the image. A sample is then asked for again.

use super::rules::text;
use crate::definition::Selinux;
use crate::error::Kind;
use crate::image::tree::Inside;
use crate::provision::command::{Call, Runner};
use crate::sys::mount::table;
use anyhow::{Context, Result};
use std::path::Path;
use std::time::{Duration, SystemTime};

const CONFIG: &str = "/etc/selinux/config";
const AUTORELABEL: &str = "/.autorelabel";
const SETFILES: [&str; 2] = ["/usr/sbin/setfiles", "/sbin/setfiles"];
/// What is mounted in a step, and nothing of the image's.
const EXCLUDED: [&str; 4] = ["/dev", "/proc", "/run", "/sys"];
/// File systems that keep labels; vfat does not.
const LABELLED: [&str; 4] = ["ext2", "ext3", "ext4", "xfs"];
/// Asked for again when they are labelled; files that an image cannot do without are among them.
const SAMPLE: usize = 64;
const VITAL: [&str; 4] = ["/etc/passwd", "/etc/shadow", "/usr/lib/os-release", "/usr/bin/sh"];
/// A million of files take seconds.
const TIMEOUT: Duration = Duration::from_secs(15 * 60);
const LATER: &str = "Say `selinux = \"autorelabel\"` in image.toml: each instance then labels its files when it first \
    boots, and boots once more.";

/// What setfiles says of a file.
#[derive(Debug, PartialEq, Eq)]
struct BakeOptions<'a> {
    path: &'a str,
    /// It has none, as far as the kernel can tell.
    bare: bool,
    label: &'a str,
}

/// Where the image has a policy and switches SELinux on.
struct Policy {
    contexts: String,
    /// By which labels are checked.
    binary: Option<String>,
}

/// Labels what was made or changed since `begun`, and what has no label.
///
/// # Errors
/// `Step` where the image's own setfiles fails, or where the labels that it wants do not come to be.
pub async fn label(runner: &Runner<'_>, inside: &Inside, wish: Selinux, begun: SystemTime) -> Result<()> {
    let Some(policy) = policy(inside)? else { return Ok(()) };
    let report = runner.work.report;
    if wish == Selinux::Autorelabel {
        inside.write(AUTORELABEL, b"", 0o644, 0, 0)?;
        report.note(format!("{AUTORELABEL} is there: each instance labels its files when it first boots"));
        return Ok(());
    }
    let Some(setfiles) = find(inside)? else {
        let what = "the image switches SELinux on, and has no setfiles to tell labels by";
        return Err(Kind::Step
            .failure(what)
            .hint(format!("Add policycoreutils to its packages. Or: {LATER}"))
            .into());
    };
    let step = report.step("label", "labelling files for SELinux");
    let output = runner.ask(&call(runner, setfiles, &policy, &file_systems(runner.root())?)).await?;
    let wishes: Vec<_> = output.lines().filter_map(parse).collect();
    let mut labelled = Vec::new();
    for wish in &wishes {
        // What the base's owner labelled otherwise, on purpose, stays.
        if (wish.bare || inside.changed_since(wish.path, begun)?)
            && inside.set_label(wish.path, wish.label)?
        {
            labelled.push(wish.path.to_owned());
        }
    }
    verify(runner, inside, setfiles, &policy, &labelled).await?;
    step.done();
    report.note(format!(
        "SELinux: {} labelled by the image's own policy",
        crate::text::count(labelled.len(), "file")
    ));
    Ok(())
}

/// Some of the files, and some that an instance cannot do without, as setfiles sees them now.
async fn verify(
    runner: &Runner<'_>,
    inside: &Inside,
    setfiles: &str,
    policy: &Policy,
    labelled: &[String],
) -> Result<()> {
    let mut sample: Vec<String> =
        labelled.iter().step_by(labelled.len().div_ceil(SAMPLE).max(1)).cloned().collect();
    for path in VITAL {
        if inside.metadata(path)?.is_some() {
            sample.push(path.to_owned());
        }
    }
    let wrong =
        |path: &str, why: &str| Kind::Step.failure(format!("the SELinux label of {path} {why}")).hint(LATER);
    for path in &sample {
        if inside.label(path)?.is_none() {
            return Err(wrong(path, "is missing after the image's setfiles was asked for it").into());
        }
    }
    let output = runner.ask(&call(runner, setfiles, policy, &sample)).await?;
    // Of the others, the base's owner may have labelled one otherwise.
    let wishes = output.lines().filter_map(parse);
    match wishes.into_iter().find(|wish| labelled.iter().any(|path| path == wish.path)) {
        Some(wish) => Err(wrong(wish.path, &format!("did not become {}", wish.label)).into()),
        None => Ok(()),
    }
}

fn policy(inside: &Inside) -> Result<Option<Policy>> {
    let (mode, kind) = settings(&text(inside, CONFIG));
    let contexts = format!("/etc/selinux/{kind}/contexts/files/file_contexts");
    if !["enforcing", "permissive"].contains(&mode.as_str())
        || kind.contains('/')
        || !inside.exists(&contexts)?
    {
        return Ok(None);
    }
    let directory = format!("/etc/selinux/{kind}/policy");
    let versions = inside.list(&directory)?.into_iter().filter_map(|name| {
        let version: u32 = name.to_str()?.strip_prefix("policy.")?.parse().ok()?;
        Some(version)
    });
    let binary = versions.max().map(|version| format!("{directory}/policy.{version}"));
    Ok(Some(Policy { contexts, binary }))
}

/// `SELINUX` and `SELINUXTYPE`, as libselinux reads them.
fn settings(config: &str) -> (String, String) {
    let value = |key: &str| {
        let of = |line: &str| line.trim().strip_prefix(key)?.strip_prefix('=').map(|v| v.trim().to_owned());
        config.lines().filter_map(of).next_back()
    };
    let mode = value("SELINUX").unwrap_or_default().to_ascii_lowercase();
    (mode, value("SELINUXTYPE").unwrap_or_else(|| "targeted".to_owned()))
}

/// The image's own, and what is mounted in it and takes labels: setfiles does not go from one to another.
fn file_systems(root: &Path) -> Result<Vec<String>> {
    let mut found = vec!["/".to_owned()];
    let root = root.canonicalize().context("looking for the image's mount point")?;
    for entry in table::of_this_thread()? {
        let below =
            entry.path.strip_prefix(&root).ok().and_then(Path::to_str).filter(|below| !below.is_empty());
        if let Some(below) = below
            && LABELLED.contains(&entry.kind.as_str())
        {
            found.push(format!("/{below}"));
        }
    }
    found.dedup();
    Ok(found)
}

fn find(inside: &Inside) -> Result<Option<&'static str>> {
    for path in SETFILES {
        if inside.exists(path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// `-n`: changes nothing. `-m`: looks at files although the kernel says of no mount that it takes labels.
fn call<'a>(runner: &Runner<'a>, setfiles: &str, policy: &Policy, paths: &[String]) -> Call<'a> {
    let mut argv: Vec<String> = [setfiles, "-n", "-v", "-m"].map(str::to_owned).to_vec();
    let mut add = |option: &str, value: &str| argv.extend([option.to_owned(), value.to_owned()]);
    EXCLUDED.iter().for_each(|path| add("-e", path));
    if let Some(binary) = &policy.binary {
        add("-c", binary);
    }
    argv.push(policy.contexts.clone());
    argv.extend(paths.iter().cloned());
    Call {
        why: "asking for the SELinux labels of the image's files".to_owned(),
        name: "setfiles".to_owned(),
        argv,
        timeout: TIMEOUT,
        // What a plan puts over files is not the image's.
        shims: Vec::new(),
        binds: Vec::new(),
        ..Call::of_the_plan(runner)
    }
}

/// `Would relabel /etc/passwd from (null) to system_u:object_r:etc_t:s0`
fn parse(line: &str) -> Option<BakeOptions<'_>> {
    let (rest, label) = line.strip_prefix("Would relabel ")?.rsplit_once(" to ")?;
    let (path, old) = rest.rsplit_once(" from ")?;
    let is_label = label.split(':').count() >= 3 && label.bytes().all(|b| b.is_ascii_graphic());
    let bare = ["(null)", "<no context>"].contains(&old);
    (path.starts_with('/') && is_label).then_some(BakeOptions { path, bare, label })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setfiles_words() {
        let label = "system_u:object_r:etc_t:s0";
        for (said, found) in [
            ("/etc/passwd from (null) to", Some(("/etc/passwd", true))),
            ("/a from b to c from <no context> to", Some(("/a from b to c", true))),
            ("/etc/x from system_u:object_r:tmp_t:s0 to", Some(("/etc/x", false))),
            ("etc from (null) to", None),
        ] {
            let line = format!("Would relabel {said} {label}");
            assert_eq!(parse(&line), found.map(|(path, bare)| BakeOptions { path, bare, label }), "{said}");
        }
        for line in ["", "setfiles: x", "Would relabel /x from (null) to y", "Would relabel /x"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn the_configuration_as_libselinux_reads_it() {
        let of = |text| settings(text);
        assert_eq!(
            of("# SELINUX=disabled\nSELINUX=Enforcing \nSELINUXTYPE=mls\n"),
            ("enforcing".into(), "mls".into())
        );
        assert_eq!(of("SELINUXTYPE=default"), (String::new(), "default".into()));
        assert_eq!(of("SELINUX=permissive"), ("permissive".into(), "targeted".into()));
    }
}

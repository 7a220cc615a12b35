//! Sets the SELinux labels of files that a bake created, according to the image's own policy.
//!
//! Steps cannot set labels, because they do not have the capability `CAP_SYS_ADMIN`. The usual tool is restorecon, but
//! it does nothing if the builder's kernel has no SELinux. So a step in the sandbox only runs the image's own
//! `setfiles`, which prints the label that each file should have. Then oven itself writes the labels to the files'
//! extended attributes, and checks a sample of them.

use crate::definition::Selinux;
use crate::error::Kind;
use crate::image::tree::ImageTree;
use crate::provision::command::{CommandRunner, ImageCommand};
use crate::sys::mount::table;
use crate::text::escape_name;
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

const CONFIG: &str = "/etc/selinux/config";
const AUTORELABEL: &str = "/.autorelabel";
const SETFILES: [&str; 2] = ["/usr/sbin/setfiles", "/sbin/setfiles"];
/// Directories that are mounted for a step and are not part of the image.
const EXCLUDED: [&str; 4] = ["/dev", "/proc", "/run", "/sys"];
/// The file systems that store labels. vfat stores none.
const LABELLED: [&str; 4] = ["ext2", "ext3", "ext4", "xfs"];
/// The number of labelled files that are checked again. The files in `VITAL`, which every image needs, are checked in
/// addition.
const SAMPLE: usize = 64;
const VITAL: [&str; 4] = ["/etc/passwd", "/etc/shadow", "/usr/lib/os-release", "/usr/bin/sh"];
/// The time limit for setfiles. It needs only seconds for a million files.
const TIMEOUT: Duration = Duration::from_secs(15 * 60);
const AUTORELABEL_HINT: &str = "Set `selinux = \"autorelabel\"` in image.toml. Each instance then labels its files at \
    its first boot, and reboots.";

/// A line of output of setfiles: the label that a file should have.
#[derive(Debug, PartialEq, Eq)]
struct Relabel<'a> {
    path: &'a str,
    /// Whether the file has no label that the kernel can read.
    unlabelled: bool,
    label: &'a str,
}

/// The policy of an image with SELinux enabled.
struct Policy {
    contexts: String,
    /// The path of the compiled policy. setfiles uses it to check that labels are valid.
    binary: Option<String>,
}

/// Labels the files that were created or changed since `begun`, and the files without a label.
///
/// # Errors
/// `Step` if the image's own setfiles fails, or if a file does not get the label that setfiles prints.
pub async fn label(
    runner: &CommandRunner<'_>,
    inside: &ImageTree,
    mode: Selinux,
    begun: SystemTime,
) -> Result<()> {
    let Some(policy) = read_policy(inside)? else { return Ok(()) };
    let report = runner.work.report;
    if mode == Selinux::Autorelabel {
        inside.write(AUTORELABEL, b"", 0o644, 0, 0)?;
        report.note(format!("added {AUTORELABEL}, so each instance labels its files at its first boot"));
        return Ok(());
    }
    let Some(setfiles) = find_setfiles(inside)? else {
        let what =
            "the image enables SELinux, but does not have setfiles, which oven needs to find the labels";
        return Err(Kind::Step
            .failure(what)
            .hint(format!("Add policycoreutils to `packages`, or choose another mode. {AUTORELABEL_HINT}"))
            .into());
    };
    let step = report.step("label", "labelling files for SELinux");
    let output =
        runner.ask(&setfiles_command(runner, setfiles, &policy, &file_systems(runner.root())?)).await?;
    let timer = inside.meter().start();
    let mut labelled = Vec::new();
    for relabel in output.lines().filter_map(parse) {
        inside.count_object()?;
        // A file that the bake did not change keeps its label, because the base's owner may have set it on purpose.
        if (relabel.unlabelled || inside.changed_since(relabel.path, begun)?)
            && inside.set_label(relabel.path, relabel.label)?
        {
            labelled.push(relabel.path);
        }
    }
    drop(timer);
    verify(runner, inside, setfiles, &policy, &labelled).await?;
    step.done();
    report.note(format!(
        "labelled {} for SELinux by the image's own policy",
        crate::text::count(labelled.len(), "file")
    ));
    Ok(())
}

/// Checks a sample of the labelled files, and the files in `VITAL`, with setfiles.
async fn verify(
    runner: &CommandRunner<'_>,
    inside: &ImageTree,
    setfiles: &str,
    policy: &Policy,
    labelled: &[&str],
) -> Result<()> {
    let sample = labelled.iter().step_by(labelled.len().div_ceil(SAMPLE).max(1));
    let mut sample: Vec<String> = sample.map(|path| (*path).to_owned()).collect();
    for path in VITAL {
        if inside.metadata(path)?.is_some() {
            sample.push(path.to_owned());
        }
    }
    let mislabelled = |path: &str, why: &str| {
        Kind::Step
            .failure(format!("the SELinux label of {} {}", escape_name(path), escape_name(why)))
            .hint(AUTORELABEL_HINT)
    };
    for path in &sample {
        if inside.label(path)?.is_none() {
            return Err(mislabelled(path, "is missing after labelling").into());
        }
    }
    let output = runner.ask(&setfiles_command(runner, setfiles, policy, &sample)).await?;
    // A wrong label is an error only if this bake labelled the file. The base's owner may have labelled other files
    // differently on purpose.
    let labelled: BTreeSet<_> = labelled.iter().copied().collect();
    match output.lines().filter_map(parse).find(|relabel| labelled.contains(relabel.path)) {
        Some(relabel) => {
            Err(mislabelled(relabel.path, &format!("is not {} after labelling", relabel.label)).into())
        }
        None => Ok(()),
    }
}

fn read_policy(inside: &ImageTree) -> Result<Option<Policy>> {
    let (mode, kind) = settings(&inside.read_text(CONFIG)?);
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

/// Returns `SELINUX` and `SELINUXTYPE`, as libselinux reads them.
fn settings(config: &str) -> (String, String) {
    let value = |key: &str| {
        let of = |line: &str| line.trim().strip_prefix(key)?.strip_prefix('=').map(|v| v.trim().to_owned());
        config.lines().filter_map(of).next_back()
    };
    let mode = value("SELINUX").unwrap_or_default().to_ascii_lowercase();
    (mode, value("SELINUXTYPE").unwrap_or_else(|| "targeted".to_owned()))
}

/// Returns the mount points of the image's file systems that store labels. The first is `/`. setfiles gets all of these
/// paths, because it does not enter mounted file systems by itself.
fn file_systems(root: &Path) -> Result<Vec<String>> {
    let mut found = vec!["/".to_owned()];
    let root = root.canonicalize().context("resolving the image's mount point")?;
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

fn find_setfiles(inside: &ImageTree) -> Result<Option<&'static str>> {
    for path in SETFILES {
        if inside.exists(path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// With `-n`, setfiles changes nothing. With `-m`, setfiles also lists files on mounts for which the kernel reports no
/// support for labels.
fn setfiles_command<'a>(
    runner: &CommandRunner<'a>,
    setfiles: &str,
    policy: &Policy,
    paths: &[String],
) -> ImageCommand<'a> {
    let mut argv: Vec<String> = [setfiles, "-n", "-v", "-m"].map(str::to_owned).to_vec();
    let mut add = |option: &str, value: &str| argv.extend([option.to_owned(), value.to_owned()]);
    EXCLUDED.iter().for_each(|path| add("-e", path));
    if let Some(binary) = &policy.binary {
        add("-c", binary);
    }
    argv.push(policy.contexts.clone());
    argv.extend(paths.iter().cloned());
    ImageCommand {
        why: "listing the SELinux labels of the image's files".to_owned(),
        name: "setfiles".to_owned(),
        argv,
        timeout: TIMEOUT,
        // For `/`, setfiles reports to the audit log, and fails if it cannot create a socket. Nothing is relabelled here,
        // and the kernel refuses the record.
        audit_socket: true,
        // Shims and bind mounts would hide the image's own files. A shim is a file that replaces a file of the image
        // while a step runs.
        shims: Vec::new(),
        binds: Vec::new(),
        ..ImageCommand::plan_defaults(runner)
    }
}

/// An example of a line: `Would relabel /etc/passwd from (null) to system_u:object_r:etc_t:s0`
fn parse(line: &str) -> Option<Relabel<'_>> {
    let (rest, label) = line.strip_prefix("Would relabel ")?.rsplit_once(" to ")?;
    let (path, old) = rest.rsplit_once(" from ")?;
    let is_label = label.split(':').count() >= 3 && label.bytes().all(|b| b.is_ascii_graphic());
    let unlabelled = ["(null)", "<no context>"].contains(&old);
    (path.starts_with('/') && is_label).then_some(Relabel { path, unlabelled, label })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_setfiles_are_parsed() {
        let label = "system_u:object_r:etc_t:s0";
        for (said, found) in [
            ("/etc/passwd from (null) to", Some(("/etc/passwd", true))),
            ("/a from b to c from <no context> to", Some(("/a from b to c", true))),
            ("/etc/x from system_u:object_r:tmp_t:s0 to", Some(("/etc/x", false))),
            ("etc from (null) to", None),
        ] {
            let line = format!("Would relabel {said} {label}");
            assert_eq!(
                parse(&line),
                found.map(|(path, unlabelled)| Relabel { path, unlabelled, label }),
                "{said}"
            );
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

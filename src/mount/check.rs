//! Checks a damaged file system with `e2fsck -n` or `xfs_repair -n`, which change nothing, and adds to the error what they
//! found.

use super::choose_root::file_system_type;
use super::create;
use super::damage::{self, DamageCause};
use super::partitions::DiskPart;
use super::tool::{self, OUTPUT_MAX, ToolEnd, ToolOutput};
use crate::error::{Kind, hint_of};
use crate::formats::superblock::FileSystemType;
use crate::sys::tasks::run_to_end;
use crate::text::{ShortList, without_control_characters};
use anyhow::Error;
use rustix::fs::{Mode, OFlags};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// The time limit of a check. A check reads all metadata, which takes longer if the disk is slow. The error is useful
/// without the check, too.
const TIMEOUT: Duration = Duration::from_secs(120);
/// The maximum number of lines in an error message, and of characters in a line.
const LINES_MAX: usize = 6;
const LINE_MAX: usize = 160;
/// What programs print if the kernel found wrong metadata: the texts of EUCLEAN and EBADMSG, in lower case.
const DAMAGE: [&str; 2] = ["structure needs cleaning", "bad message"];

/// What a check found.
struct CheckReport {
    command: &'static str,
    lines: String,
}

/// If the error is about a damaged file system of `parts`, adds what a check of it finds. If a step failed with a message
/// of the kernel about wrong metadata, checks the root (`root` is its index), and blames `cause` if it is damaged. The
/// message of the step comes first, because the step may have failed for another reason. No part may be mounted.
pub async fn explain(error: Error, parts: &[DiskPart], root: usize, cause: DamageCause) -> Error {
    let text = format!("{error:#}");
    let is_known = damage::is_damage(&error);
    let may_be_damage = || {
        let text = text.to_ascii_lowercase();
        Kind::of(&error) == Kind::Step && DAMAGE.iter().any(|words| text.contains(words))
    };
    if !is_known && !may_be_damage() {
        return error;
    }
    let is_named =
        |part: &&DiskPart| text.contains(&part.describe()) || text.contains(&format!("on {} ", part.name));
    let part = parts.iter().find(is_named).unwrap_or(&parts[root]);
    let Some(CheckReport { command, lines }) = check(part).await else { return error };
    let found = format!("\n    `{command}` of {} says:{lines}", part.name);
    if is_known {
        let hint = hint_of(&error).unwrap_or_default();
        return Kind::of(&error).failure(format!("{text}{found}")).hint(hint).into();
    }
    damage::error(&format!("{text}\n    A check found that {} is damaged.{found}", part.describe()), cause)
}

/// Checks the file system of a partition. Returns `None` if it is sound, or if this machine cannot check it. A file system
/// that is still in use is not checked, because its metadata on the disk are incomplete.
async fn check(part: &DiskPart) -> Option<CheckReport> {
    let (command, option) = match file_system_type(part)? {
        FileSystemType::Ext2 | FileSystemType::Ext3 | FileSystemType::Ext4 => ("e2fsck -fn", "-fn"),
        FileSystemType::Xfs => ("xfs_repair -n", "-n"),
        _ => return None,
    };
    if !is_unused(part).await {
        return None;
    }
    let name = command.split(' ').next()?;
    // The tool inherits the descriptor of the verified device. This path leads to that descriptor.
    let path = format!("/proc/self/fd/{}", part.node.as_raw_fd());
    match tool::run(name, &[option, &path], &part.node, TIMEOUT).await {
        Ok(ToolEnd::Ended(ended)) if found_damage(name, &ended) => {
            let lines = findings(&whole_lines(&ended), &path);
            (!lines.is_empty()).then_some(CheckReport { command, lines })
        }
        _ => None,
    }
}

/// Returns whether no mount uses the partition, and nothing else opened it for itself.
async fn is_unused(part: &DiskPart) -> bool {
    let Ok(node) = part.node.try_clone() else { return false };
    let open = move || {
        let path = format!("/proc/self/fd/{}", node.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        create::retry_while_busy(|| rustix::fs::open(&path, flags, Mode::empty()))
    };
    run_to_end(open).await.is_ok()
}

/// Returns whether a check found damage. It also fails if it cannot check the file system, for example because the file
/// system has features that are newer than the tool, or if the kernel killed it.
fn found_damage(name: &str, ended: &ToolOutput) -> bool {
    /// The bit of e2fsck's exit code for errors that it did not correct. It also sets the bit 8 if it ends because a
    /// directory is damaged, so that bit does not matter.
    const UNCORRECTED: i32 = 4;
    let Some(code) = ended.status.code() else { return false };
    if name == "e2fsck" {
        return code & UNCORRECTED != 0;
    }
    let is_too_new = |line: &str| ["unknown", "unsupported"].iter().any(|word| line.contains(word));
    let has_feature = |line: &&str| line.contains("feature") && is_too_new(&line.to_ascii_lowercase());
    code == 1 && !whole_lines(ended).iter().any(has_feature)
}

/// Returns the lines of a tool's output. If the output is long, only its ends are known, and a line of which only a part
/// is known is left out.
fn whole_lines(output: &ToolOutput) -> Vec<&str> {
    let ToolOutput { first, last, errors, .. } = output;
    let is_cut = |text: &str| text.len() >= OUTPUT_MAX;
    let end = first.rfind('\n').filter(|_| is_cut(first)).unwrap_or(first.len());
    let start = |text: &str| text.find('\n').filter(|_| is_cut(text)).unwrap_or(0);
    let parts = [&first[..end], &last[start(last)..], &errors[start(errors)..]];
    parts.into_iter().flat_map(str::lines).collect()
}

/// Returns the lines of a check's output that name damage, each on an indented line.
fn findings(output: &[&str], path: &str) -> String {
    let mut seen = Vec::new();
    let mut list = ShortList::new(LINES_MAX);
    for line in output {
        let line = without_control_characters(line).replace(path, "the file system");
        let line = without_question(line.trim());
        if is_finding(line) && !seen.iter().any(|known| known == line) {
            seen.push(line.to_owned());
            list.add(|| line.chars().take(LINE_MAX).collect());
        }
    }
    if list.is_empty() { String::new() } else { format!("\n    | {}", list.join("\n    | ")) }
}

/// Removes the question at the end of a line of e2fsck, which it answers itself: `Entry 'x' is bad.  Clear? no`.
fn without_question(line: &str) -> &str {
    match line.strip_suffix("? no") {
        Some(rest) => rest.rsplit_once("  ").map_or("", |(finding, _)| finding.trim_end()),
        None => line,
    }
}

/// Returns whether a line of e2fsck or xfs_repair is more than a report of its progress.
fn is_finding(line: &str) -> bool {
    const PROGRESS: [&str; 10] = [
        "e2fsck ",
        "e2fsck: aborted",
        "Pass ",
        "Phase ",
        "- ",
        "Warning",
        "No modify flag",
        "Maximum metadata LSN",
        "This filesystem",
        "ALERT",
    ];
    let is_summary = line.contains("WARNING: Filesystem still has errors") || line.contains(" files (");
    !line.is_empty() && !is_summary && !PROGRESS.iter().any(|words| line.starts_with(words))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    fn findings(output: &str, path: &str) -> String {
        super::findings(&output.lines().collect::<Vec<_>>(), path)
    }

    /// The end of a tool with this wait status, of which only the ends of the output are known.
    fn ended(status: i32, output: &str) -> ToolOutput {
        let (length, known) = (output.len(), output.len().min(OUTPUT_MAX));
        let (first, last) = (output[..known].to_owned(), output[length - known..].to_owned());
        ToolOutput { status: ExitStatus::from_raw(status), first, last, errors: String::new() }
    }

    #[test]
    fn each_finding_of_a_long_output_is_whole_and_shown_once() {
        for count in [10, 100, 120, 1000] {
            let output: String = (0..count).map(|n| format!("Inode {n:04} is bad in a way.\n")).collect();
            let ended = ended(4 << 8, &output);
            let lines = whole_lines(&ended);
            assert!(
                lines.iter().all(|line| line.is_empty() || output.contains(&format!("{line}\n"))),
                "{count}"
            );
            assert!(lines.iter().all(|line| line.is_empty() || line.starts_with("Inode ")), "{lines:?}");
            let shown = super::findings(&lines, "x");
            assert!(shown.contains("Inode 0000 is bad in a way."), "{shown}");
            assert!(count > 120 || shown.ends_with(&format!("and {} more", count - 6)), "{count}: {shown}");
        }
    }

    #[test]
    fn only_a_check_that_was_completed_finds_damage() {
        let features = "Superblock has unknown compat/rocompat/incompat features (0x0/0x8/0x0).\n\
                        Using a more recent xfs_repair is recommended.\nFound unsupported filesystem features.  Exiting now.\n";
        for (name, code, output, expected) in [
            ("e2fsck", 0, "", false),
            ("e2fsck", 4, "Inode 12 is bad", true),
            ("e2fsck", 8, "/proc/self/fd/7 has unsupported feature(s): FEATURE_C12", false),
            ("e2fsck", 12, "Directory inode 12, block #0, offset 0: directory corrupted", true),
            ("e2fsck", 16, "Usage: e2fsck", false),
            ("xfs_repair", 1, "bad directory block magic # 0", true),
            ("xfs_repair", 1, features, false),
            ("xfs_repair", 2, "The filesystem has valuable metadata changes in a log", false),
        ] {
            assert_eq!(found_damage(name, &ended(code << 8, output)), expected, "{name} {code} {output}");
        }
        for name in ["e2fsck", "xfs_repair"] {
            assert!(!found_damage(name, &ended(9, "Inode 12 is bad")), "SIGKILL");
        }
    }

    #[test]
    fn only_findings_of_e2fsck_are_shown() {
        let output = "e2fsck 1.47.0 (5-Feb-2023)\nPass 1: Checking inodes, blocks, and sizes\n\
                      Pass 2: Checking directory structure\nDirectory inode 12, block #0, offset 0: directory corrupted\n\
                      Salvage? no\n\nMissing '.' in directory inode 12.\nFix? no\n\
                      Entry 'x' in /etc (12) has deleted/unused inode 14.  Clear? no\n\
                      Pass 3: Checking directory connectivity\n\
                      /proc/self/fd/7: ********** WARNING: Filesystem still has errors **********\n\n\
                      /proc/self/fd/7: 30/128 files (3.3% non-contiguous), 90/512 blocks\n";
        assert_eq!(
            findings(output, "/proc/self/fd/7"),
            "\n    | Directory inode 12, block #0, offset 0: directory corrupted\
             \n    | Missing '.' in directory inode 12.\
             \n    | Entry 'x' in /etc (12) has deleted/unused inode 14."
        );
        let many: String = (0..100).map(|n| format!("Inode {n} is bad\n")).collect();
        assert!(findings(&many, "x").ends_with("| Inode 5 is bad\n    | and 94 more"));
        assert_eq!(findings("Pass 1: x\n\n", "x"), "");
        let long = findings(&"y\u{1b}[31m".repeat(999), "x");
        assert!(long.len() < 200 && !long.contains('\u{1b}'), "{long}");
    }

    #[test]
    fn only_findings_of_xfs_repair_are_shown() {
        let output = "Phase 1 - find and verify superblock...\nPhase 2 - using internal log\n        - zero log...\n\
                      ALERT: The filesystem has valuable metadata changes in a log which is being ignored.\n\
                      Metadata CRC error detected at 0x5581, xfs_dir3_block block 0x60/0x1000\n\
                      bad directory block magic # 0 in block 0 for directory inode 131\n\
                      No modify flag set, skipping phase 5\nPhase 6 - check inode connectivity...\n";
        assert_eq!(
            findings(output, "/proc/self/fd/7"),
            "\n    | Metadata CRC error detected at 0x5581, xfs_dir3_block block 0x60/0x1000\
             \n    | bad directory block magic # 0 in block 0 for directory inode 131"
        );
    }
}

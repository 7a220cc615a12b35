//! Finds the programs, mounts and devices that use a device. The error message lists them if the device cannot be
//! released.

use crate::sys::mount::table;
use crate::text::escape_name;
use rustix::fs::{AtFlags, CWD, FileType};
use std::collections::HashSet;
use std::path::Path;

/// The maximum number of users of a device that a message names.
const MAX: usize = 8;

/// Describes everything that uses these devices or files on them: mounts in other namespaces, processes with open
/// files, processes whose working or root directory is on them, stacked devices, and swap. The list may be incomplete,
/// because processes start and end while oven makes the list.
pub fn find_holders(devices: &[u64]) -> Vec<String> {
    let mut found = stacked(devices);
    let own = std::fs::read_link("/proc/thread-self/ns/mnt").ok();
    let mut namespaces: HashSet<_> = own.into_iter().collect();
    for process in numbered("/proc") {
        for thread in numbered(format!("/proc/{process}/task")) {
            let dir = format!("/proc/{process}/task/{thread}");
            let Ok(namespace) = std::fs::read_link(format!("{dir}/ns/mnt")) else { continue };
            if namespaces.insert(namespace.clone()) {
                let table = std::fs::read(format!("{dir}/mountinfo")).unwrap_or_default();
                for line in table::parse(&table).iter().filter(|line| devices.contains(&line.rdev)) {
                    let space = namespace.to_string_lossy().replace("mnt:", "");
                    let (who, path) = (name(process), escape_name(&line.path));
                    found
                        .push(format!("{who} has mounted it on {path} in another mount namespace ({space})"));
                }
            }
        }
        found.extend(open_file(process, devices));
        if found.len() > MAX {
            break;
        }
    }
    found.truncate(MAX);
    found
}

/// Returns the end of a sentence about a busy device. It names the users of the device, or says that none was found.
pub fn holders_clause(devices: &[u64]) -> String {
    let found = find_holders(devices);
    if found.is_empty() {
        "; oven found no process that uses it".into()
    } else {
        format!(": {}", found.join("; "))
    }
}

/// Describes the first open file of a process that is on one of the devices, or that is the node of one of the devices.
/// Nodes that oven itself has open are not reported.
fn open_file(process: u32, devices: &[u64]) -> Option<String> {
    let dir = format!("/proc/{process}");
    let is_own = process == std::process::id();
    let descriptors = numbered(format!("{dir}/fd")).into_iter().map(|fd| format!("fd/{fd}"));
    let mut places = ["cwd", "root", "exe"].map(str::to_owned).into_iter().chain(descriptors);
    places.find_map(|place| {
        let path = format!("{dir}/{place}");
        // The file may be on a network share that does not respond, so the call must not query the server of the share.
        let flags = AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(CWD, &*path, flags, rustix::fs::StatxFlags::TYPE).ok()?;
        let is_on_device = devices.contains(&rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor));
        let is_block_device = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice;
        let is_the_device = devices.contains(&rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor));
        let what = std::fs::read_link(&path).unwrap_or_default();
        (is_on_device || (is_block_device && is_the_device && !is_own))
            .then(|| format!("{} has {} open as {place}", name(process), escape_name(&what)))
    })
}

/// Describes the device-mapper and MD devices that use these devices. Also reports each of these devices that is used
/// as swap.
fn stacked(devices: &[u64]) -> Vec<String> {
    let mut found = Vec::new();
    for &rdev in devices {
        let dir = format!("/sys/dev/block/{}:{}/holders", rustix::fs::major(rdev), rustix::fs::minor(rdev));
        let holders = std::fs::read_dir(dir).into_iter().flatten().flatten();
        found.extend(holders.map(|h| format!("the device {} uses it", h.file_name().display())));
        let name = super::partitions::name_of(rdev).unwrap_or_default();
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        let path = format!("/dev/{name}");
        if swaps.lines().any(|line| line.split_ascii_whitespace().next() == Some(&path)) {
            found.push(format!("{path} is used as swap"));
        }
    }
    found
}

/// Returns the entries of a directory whose names are numbers.
fn numbered(dir: impl AsRef<Path>) -> Vec<u32> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn name(process: u32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    format!("process {process} ({})", escape_name(comm.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_an_open_file_by_its_device() {
        let file = tempfile::tempfile().unwrap();
        let device = rustix::fs::fstat(&file).unwrap().st_dev;
        let pid = std::process::id();
        assert!(open_file(pid, &[device]).unwrap().starts_with(&format!("process {pid} (")));
        assert_eq!(open_file(pid, &[0xffff_ffff]), None);
    }
}

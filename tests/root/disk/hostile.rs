//! File systems that were made to harm the machine that mounts them. No test here mounts a damaged file system that asks
//! for a panic; `vm-tests/hostile` does.

use oven::error::{Kind, hint_of};
use oven::mount::{MountOptions, Root};
use oven::report::Report;
use oven_testing::LoopDisk;
use oven_testing::disk::loop_disk::{FAKE_ROOT, alone, run};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const PLAIN: MountOptions = MountOptions { grow: false, disk_writable: false };
const WRITABLE: MountOptions = MountOptions { grow: false, disk_writable: true };
const TWO: &str = "label: gpt\n1: start=2048, size=65536, type=L\n2: start=67584, size=65536, type=L\n";

/// A disk with two possible roots. The second one is the root according to both fstabs.
fn two_candidates(options: &[&str]) -> LoopDisk {
    let mut disk = LoopDisk::new(80, 512);
    disk.table(TWO);
    for (part, label) in [("1", "old"), ("2", "new")] {
        disk.ext4(part, &FAKE_ROOT("LABEL=new / ext4\n"), &[&["-L", label], options].concat());
    }
    disk
}

/// Overwrites the first block of a directory with zeros.
fn damage(disk: &LoopDisk, part: &str, directory: &str) {
    let block: u64 = disk.with_part(part, |path| {
        let done =
            Command::new("debugfs").args(["-R", &format!("blocks {directory}"), path]).output().unwrap();
        let blocks = String::from_utf8(done.stdout).unwrap();
        blocks
            .split_whitespace()
            .next()
            .unwrap_or_else(|| panic!("{directory} has no blocks"))
            .parse()
            .unwrap()
    });
    disk.put(part, block * 4096, &[0; 4096]);
}

fn content(disk: &LoopDisk, part: &str) -> Vec<u8> {
    disk.with_part(part, |path| fs::read(path).unwrap())
}

/// What a thread saw while a root was mounted.
#[derive(Default)]
struct Seen {
    /// The options of each mount.
    options: BTreeSet<String>,
    /// Whether a write to a partition failed, and whether one succeeded.
    refused: bool,
    written: bool,
}

/// Until `stop`, reads the options of the partitions' mounts, and writes the content of each partition's last sector to
/// the same place.
fn watch(parts: &[(String, PathBuf)], stop: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) {
        for (name, node) in parts {
            seen.options.extend(fs::read_to_string(format!("/proc/fs/ext4/{name}/options")));
            let (mut sector, offset) = ([0; 512], (65536 - 1) * 512);
            let file = File::options().read(true).write(true).open(node).unwrap();
            file.read_exact_at(&mut sector, offset).unwrap();
            match file.write_at(&sector, offset) {
                Ok(_) => seen.written = true,
                Err(error) if error.kind() == ErrorKind::PermissionDenied => seen.refused = true,
                Err(error) => panic!("{error}"),
            }
        }
    }
    seen
}

/// The partitions' names, and nodes for them.
fn partitions(device: &Path, dir: &Path) -> Vec<(String, PathBuf)> {
    let disk = device.file_name().unwrap().to_str().unwrap();
    let names = [1, 2].map(|number| format!("{disk}p{number}"));
    let with_node = names.into_iter().map(|name| {
        let number = fs::read_to_string(format!("/sys/class/block/{name}/dev")).unwrap();
        let (major, minor) = number.trim().split_once(':').unwrap();
        let node = dir.join(&name);
        run("mknod", &[node.to_str().unwrap(), "b", major, minor]);
        (name, node)
    });
    with_node.collect()
}

#[test]
fn a_superblock_cannot_ask_for_a_panic_and_candidates_are_write_protected() {
    let disk = two_candidates(&["-e", "panic"]);
    alone(async |scratch| {
        let device = disk.device();
        // The first mount adds the partitions to the kernel.
        Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap().close().await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let parts = partitions(&device.path, dir.path());
        // As if oven had been killed while it looked for the root.
        run("blockdev", &["--setro", parts[0].1.to_str().unwrap()]);
        let stop = Arc::new(AtomicBool::new(false));
        let (until, watched) = (stop.clone(), parts.clone());
        let watcher = std::thread::spawn(move || watch(&watched, &until));
        // Each mount looks at both candidates. Some looks suffice to see one in the middle.
        for _ in 0..10 {
            let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
            root.close().await.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        let seen = watcher.join().unwrap();
        let is_look = |options: &&String| options.starts_with("ro\n");
        assert!(seen.options.iter().any(|options| is_look(&options)), "{:?}", seen.options);
        assert!(!seen.options.iter().all(|options| is_look(&options)), "{:?}", seen.options);
        for options in &seen.options {
            assert!(options.contains("errors=remount-ro") && !options.contains("errors=panic"), "{options}");
        }
        assert!(seen.refused && seen.written);
        for (name, _) in &parts {
            assert_eq!(fs::read_to_string(format!("/sys/class/block/{name}/ro")).unwrap(), "0\n");
        }
    });
    disk.detach();
}

#[test]
fn a_damaged_candidate_is_named_and_nothing_is_written_to_it() {
    let disk = two_candidates(&[]);
    damage(&disk, "1", "/etc");
    let before = ["1", "2"].map(|part| content(&disk, part));
    alone(async |scratch| {
        let device = disk.device();
        let error = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.err().unwrap();
        let text = format!("{error:#}");
        assert!(text.contains("finding the root partition: partition 1 (ext4, 32.0 MiB"), "{text}");
        assert!(text.contains("is damaged: ") && text.contains("/etc/fstab"), "{text}");
        assert!(text.contains("`e2fsck -fn` of loop") && text.contains("directory"), "{text}");
        assert_eq!(Kind::of(&error), Kind::Definition);
        assert!(hint_of(&error).unwrap().contains("e2fsck -f"));
        // The write protection ended with the failure.
        let disk_name = device.path.file_name().unwrap().to_str().unwrap();
        for part in [1, 2] {
            let flag = fs::read_to_string(format!("/sys/class/block/{disk_name}p{part}/ro")).unwrap();
            assert_eq!(flag, "0\n");
        }
        assert_eq!((disk.mounts(), fs::read_dir(scratch).unwrap().count()), (0, 0));
    });
    disk.detach();
    assert!(before == ["1", "2"].map(|part| content(&disk, part)));
}

#[test]
fn damage_that_appears_in_a_bake_is_the_fault_of_the_base() {
    let mut disk = LoopDisk::new(40, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    damage(&disk, "1", "/var/tmp");
    alone(async |scratch| {
        let device = disk.device();
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        let healthy = root.explain(Kind::Step.error("the step failed"));
        assert_eq!((Kind::of(&healthy), format!("{healthy:#}")), (Kind::Step, "the step failed".to_owned()));
        assert!(root.tree().read("/var/tmp/file").is_err());
        let error = root.explain(Kind::Step.error("the step failed"));
        let text = format!("{error:#}");
        assert!(text.contains("partition 1 (ext4, 38.0 MiB") && text.contains("is damaged"), "{text}");
        assert!(text.ends_with("Before, this failed: the step failed"), "{text}");
        assert_eq!(Kind::of(&error), Kind::Definition);
        assert!(hint_of(&error).unwrap().contains("e2fsck -f"));
        let stopped = root.explain(Kind::Interrupted.error("stopped"));
        assert_eq!(Kind::of(&stopped), Kind::Interrupted);
        let error = root.close().await.unwrap_err();
        assert_eq!((Kind::of(&error), disk.mounts()), (Kind::Definition, 0));
    });
    disk.detach();
}

#[test]
fn damage_after_the_first_step_is_the_fault_of_a_step_that_can_write_to_the_disk() {
    let mut disk = LoopDisk::new(40, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    damage(&disk, "1", "/var/tmp");
    alone(async |scratch| {
        let device = disk.device();
        for (options, after) in [(WRITABLE, Kind::Step), (PLAIN, Kind::Definition)] {
            let root = Root::mount(&device, scratch, &options, &Report::silent()).await.unwrap();
            assert!(root.tree().read("/var/tmp/file").is_err());
            let before = root.explain(Kind::Step.error("the plan failed"));
            assert_eq!(Kind::of(&before), Kind::Definition, "{before:#}");
            root.tree().meter().note_step();
            let error = root.explain(Kind::Machine.error("the step failed"));
            assert_eq!(Kind::of(&error), after, "{error:#}");
            let is_of_step = hint_of(&error).unwrap().contains("the script that writes to the block device");
            assert_eq!(is_of_step, after == Kind::Step);
            let error = root.close().await.unwrap_err();
            assert_eq!((Kind::of(&error), disk.mounts()), (after, 0), "{error:#}");
        }
    });
    disk.detach();
}

/// A disk with one partition, which has an xfs.
fn xfs() -> LoopDisk {
    let mut disk = LoopDisk::new(340, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.xfs("1", &FAKE_ROOT(""));
    disk
}

/// Makes directories until the kernel needs more inodes and looks for free space. Returns the error of the
/// change after which the kernel has shut the file system down.
fn use_free_space(root: &Root<'_>) -> anyhow::Error {
    // The kernel shuts an xfs down only if an error comes in the middle of a change. Before that, changes fail with
    // EUCLEAN, or succeed in another group. Afterwards, every directory of the file system fails with EIO.
    let made = (0..10_000).map(|n| root.tree().create_dir_all(&format!("/etc/{n}"), 0o755));
    let is_down = || root.tree().directory("/etc").is_err();
    made.filter_map(Result::err).find(|_| is_down()).expect("the file system was not shut down")
}

#[test]
fn an_xfs_that_the_kernel_shut_down_is_the_fault_of_the_base() {
    let disk = xfs();
    // The roots of both trees of free space, in the first group.
    disk.put("1", 4096, &[0; 2 * 4096]);
    alone(async |scratch| {
        let device = disk.device();
        for (options, expected) in [(PLAIN, Kind::Definition), (WRITABLE, Kind::Step)] {
            let root = Root::mount(&device, scratch, &options, &Report::silent()).await.unwrap();
            root.tree().meter().note_step();
            let failed = use_free_space(&root);
            let error = root.explain(failed);
            let text = format!("{error:#}");
            assert!(text.contains("partition 1 (xfs") && text.contains("the kernel shut it down"), "{text}");
            assert_eq!(Kind::of(&error), expected, "{text}");
            let error = root.close().await.unwrap_err();
            assert_eq!((Kind::of(&error), disk.mounts()), (expected, 0), "{error:#}");
        }
    });
    disk.detach();
}

/// The number of failed requests to a disk in the kernel's log.
fn logged_errors(device: &oven::device::Device) -> usize {
    let log = Command::new("dmesg").output().unwrap();
    let name = device.path.file_name().unwrap().to_str().unwrap();
    String::from_utf8_lossy(&log.stdout).matches(&format!("I/O error, dev {name}, sector ")).count()
}

#[test]
fn an_xfs_whose_disk_fails_is_the_fault_of_the_machine() {
    let mut disk = xfs();
    disk.put("1", 4096, &[0; 2 * 4096]);
    alone(async |scratch| {
        let device = disk.device();
        let before = logged_errors(&device);
        let root = Root::mount(&device, scratch, &WRITABLE, &Report::silent()).await.unwrap();
        root.tree().meter().note_step();
        // The disk's file ends before the disk, so the loop device cannot read there.
        disk.resize(300);
        // The kernel logs at most ten such errors of all disks in five seconds.
        oven_testing::until("a logged error of the disk", || {
            let read = rustix::io::pread(&device.node, &mut [0; 4096], 330 << 20);
            assert_eq!(read, Err(rustix::io::Errno::IO));
            (logged_errors(&device) > before).then_some(())
        });
        let failed = use_free_space(&root);
        let error = root.explain(failed);
        let text = format!("{error:#}");
        assert!(text.contains("the kernel shut it down"), "{text}");
        assert_eq!(Kind::of(&error), Kind::Machine, "{text}");
        assert!(hint_of(&error).unwrap().contains("this machine's storage"), "{error:#}");
        let error = root.close().await.unwrap_err();
        assert_eq!((Kind::of(&error), disk.mounts()), (Kind::Machine, 0), "{error:#}");
    });
    disk.detach();
}

#[test]
fn a_file_system_that_is_unsafe_to_mount_is_refused() {
    // The tool that changes the file system, its arguments, and a part of the message.
    let cases: [(&[&str], &str); 4] = [
        (&["tune2fs", "-O", "mmp"], "because it has multi-mount protection (mmp)"),
        (
            &["tune2fs", "-E", "mount_opts=journal_path=/dev/sda"],
            "sets the mount option \"journal_path=/dev/sda\"",
        ),
        (&["tune2fs", "-E", "mount_opts=abort"], "because its superblock sets the mount option \"abort\""),
        (&["debugfs", "-w", "-R", "ssv journal_inum 0"], "because its journal is on another device"),
    ];
    for (change, wanted) in cases {
        let mut disk = LoopDisk::new(40, 512);
        disk.table("label: gpt\nstart=2048, type=L\n");
        disk.ext4("1", &FAKE_ROOT(""), &[]);
        disk.with_part("1", |path| {
            run(change[0], &[&change[1..], &[path]].concat());
            disk.put("1", 0, &fs::read(path).unwrap());
        });
        let before = content(&disk, "1");
        alone(async |scratch| {
            let device = disk.device();
            let error = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.err().unwrap();
            let text = format!("{error:#}");
            assert!(
                text.contains("oven does not mount partition 1 (ext4") && text.contains(wanted),
                "{text}"
            );
            assert_eq!((Kind::of(&error), disk.mounts()), (Kind::Definition, 0));
            assert!(hint_of(&error).unwrap().contains("tune2fs"));
        });
        disk.detach();
        assert!(before == content(&disk, "1"));
    }
}

/// Damages a file system whose root has the directory /etc, and returns the error of mounting and reading it.
fn error_of_damage(disk: &LoopDisk, when: Damage) -> anyhow::Error {
    let mut found = None;
    alone(async |scratch| {
        let device = disk.device();
        let error = match Root::mount(&device, scratch, &PLAIN, &Report::silent()).await {
            Err(error) => error,
            Ok(root) => match when {
                Damage::InMount => panic!("it was mounted"),
                Damage::InBake => root.into_explained(Kind::Step.error("cat: /etc/x: Bad message")).await,
                Damage::AtEnd => {
                    assert!(root.tree().read("/var/tmp/file").is_err());
                    root.close().await.unwrap_err()
                }
            },
        };
        assert_eq!((disk.mounts(), fs::read_dir(scratch).unwrap().count()), (0, 0));
        found = Some(error);
    });
    disk.detach();
    found.unwrap()
}

/// When the damage is found.
#[derive(Clone, Copy)]
enum Damage {
    InMount,
    InBake,
    AtEnd,
}

#[test]
fn a_damaged_file_system_is_named_with_the_findings_of_its_checker() {
    let ext4 = || {
        let mut disk = LoopDisk::new(40, 512);
        disk.table("label: gpt\nstart=2048, type=L\n");
        disk.ext4("1", &FAKE_ROOT(""), &[]);
        disk
    };
    let directory = ext4();
    damage(&directory, "1", "/var/tmp");
    let groups = ext4();
    // The descriptors of the groups, and their table of inodes.
    groups.put("1", 4096, &[0xff; 4096]);
    let root_inode = xfs();
    root_inode.put("1", 16 * 4096, &[0; 4 * 4096]);
    let free_space = xfs();
    free_space.put("1", 4096, &[0; 2 * 4096]);
    for (disk, when, check) in [
        (&directory, Damage::AtEnd, "`e2fsck -fn` of loop"),
        (&groups, Damage::InMount, "`e2fsck -fn` of loop"),
        (&root_inode, Damage::InMount, "`xfs_repair -n` of loop"),
        (&free_space, Damage::InBake, "`xfs_repair -n` of loop"),
    ] {
        let error = error_of_damage(disk, when);
        let text = format!("{error:#}");
        assert!(text.contains("damaged") && text.contains(check), "{text}");
        let is_step = matches!(when, Damage::InBake);
        assert!(!is_step || text.starts_with("cat: /etc/x: Bad message\n"), "{text}");
        let findings = text.lines().filter(|line| line.starts_with("    | ")).count();
        assert!((1..=7).contains(&findings), "{text}");
        assert_eq!(Kind::of(&error), Kind::Definition, "{text}");
        assert!(hint_of(&error).unwrap().contains("e2fsck -f"), "{text}");
    }
    // A message of a program about damage is not believed if the file system is sound.
    let sound = ext4();
    let error = error_of_damage(&sound, Damage::InBake);
    assert_eq!((Kind::of(&error), format!("{error:#}")), (Kind::Step, "cat: /etc/x: Bad message".into()));
}

/// The metadata of a mounted file system are incomplete on the disk, so a check of it would find damage.
#[test]
fn a_file_system_that_stays_mounted_is_not_checked() {
    let mut disk = LoopDisk::new(40, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    damage(&disk, "1", "/var/tmp");
    let step_failed = || Kind::Step.error("cat: /etc/x: Bad message");
    alone(async |scratch| {
        let device = disk.device();
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        let file = File::open(root.path().join("etc")).unwrap();
        let error = root.into_explained(step_failed()).await;
        assert_eq!((Kind::of(&error), format!("{error:#}")), (Kind::Step, "cat: /etc/x: Bad message".into()));
        drop(file);
    });
    disk.detach();
    let error = error_of_damage(&disk, Damage::InBake);
    assert!(format!("{error:#}").contains("`e2fsck -fn` of loop"), "{error:#}");
}

//! Real disks on loop devices: which root is found and mounted, how it grows, and what is left when it is closed.

use oven::error::Kind;
use oven::mount::{MountOptions, Root};
use oven::report::Report;

use oven_testing::LoopDisk;
use oven_testing::disk::loop_disk;
use oven_testing::disk::loop_disk::{FAKE_ROOT, alone, loops_of, run};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

const GROW: MountOptions = MountOptions { grow: true, disk_writable: false };
const PLAIN: MountOptions = MountOptions { grow: false, disk_writable: false };
const ROOT_X86: &str = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709";
const ROOT_ARM: &str = "B921B045-1DF0-41C3-AF44-4C6F280D3FAE";
const ROOT: &str = if cfg!(target_arch = "aarch64") { ROOT_ARM } else { ROOT_X86 };
const ESP: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";

/// Mounts, writes a file, closes; then the disk is unmounted, the file is there and the file system is clean.
fn round_trip(disk: &LoopDisk, root: &str, kind: &str) {
    alone(async |scratch| {
        let device = disk.device();
        let mounted = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        assert_eq!(mounted.os_release().unwrap().id(), "test");
        assert_eq!(mounted.architecture().unwrap(), oven::ids::Architecture::HOST);
        mounted.tree().write("/etc/made", b"here", 0o4755, 0, 0).unwrap();
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let line = table.lines().find(|line| line.contains(mounted.path().to_str().unwrap())).unwrap();
        for word in ["nosuid", "nodev", "noatime", &format!("- {kind} /dev/"), "rw"] {
            assert!(line.contains(word), "{word} in {line}");
        }
        let source = line.split(" - ").nth(1).unwrap().split(' ').nth(1).unwrap();
        assert!(mounted.nodes().iter().any(|node| format!("/dev/{}", node.name) == source), "{line}");
        assert!(!fs::read_to_string("/proc/1/mountinfo").unwrap().contains(mounted.path().to_str().unwrap()));
        mounted.close().await.unwrap();
        assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
    });
    disk.detach();
    disk.with_part(root, |path| match kind {
        "xfs" => run("xfs_repair", &["-n", path]),
        _ => run("e2fsck", &["-fn", path]),
    });
    assert_eq!(disk.cat(root, "etc/made"), "here");
}

#[test]
fn gpt_with_ext4() {
    let mut disk = LoopDisk::new(64, 512);
    disk.table(
        "label: gpt\n2: start=2048, size=8192, type=21686148-6449-6E6F-744E-656564454649\n\
                1: start=10240, name=root disk, type=L\n"
            .replace("root disk", "\"root disk\"")
            .as_str(),
    );
    disk.ext4("1", &FAKE_ROOT(""), &["-L", "my root"]);
    round_trip(&disk, "1", "ext4");
}

#[test]
fn mbr_with_a_logical_root() {
    let mut disk = LoopDisk::new(96, 512);
    disk.table(
        "label: dos\n1: start=2048, size=20480, type=82\n2: start=24576, type=5\n5: start=26624, type=83\n",
    );
    disk.ext4("5", &FAKE_ROOT(""), &[]);
    round_trip(&disk, "5", "ext4");
}

#[test]
fn no_table_at_all() {
    let mut disk = LoopDisk::new(48, 512);
    disk.ext4("", &FAKE_ROOT(""), &[]);
    round_trip(&disk, "", "ext4");
}

#[test]
fn xfs() {
    let mut disk = LoopDisk::new(400, 512);
    disk.table(&format!("label: gpt\nstart=2048, type={ROOT}\n"));
    disk.xfs("1", &FAKE_ROOT(""));
    round_trip(&disk, "1", "xfs");
}

#[test]
fn sectors_of_4096_bytes() {
    let mut disk = LoopDisk::new(64, 4096);
    disk.table("label: gpt\nstart=256, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    round_trip(&disk, "1", "ext4");
}

/// A builder often runs an image that is the base of the next one: their disks have the same UUIDs.
#[test]
fn two_disks_with_the_same_uuids_are_mounted_at_the_same_time() {
    for kind in ["ext4", "xfs"] {
        let mut disk = LoopDisk::new(400, 512);
        disk.table(&format!("label: gpt\nstart=2048, type={ROOT}\n"));
        match kind {
            "xfs" => disk.xfs("1", &FAKE_ROOT("")),
            _ => disk.ext4("1", &FAKE_ROOT(""), &[]),
        }
        let twin = disk.twin();
        alone(async |scratch| {
            let (device, other) = (disk.device(), twin.device());
            let place = tempfile::tempdir().unwrap();
            let first = Root::mount(&device, place.path(), &PLAIN, &Report::silent()).await.unwrap();
            let second = Root::mount(&other, scratch, &PLAIN, &Report::silent()).await.unwrap();
            first.tree().write("/etc/made", b"first", 0o644, 0, 0).unwrap();
            second.tree().write("/etc/made", b"second", 0o644, 0, 0).unwrap();
            second.close().await.unwrap();
            first.close().await.unwrap();
        });
        disk.detach();
        twin.detach();
        assert_eq!((disk.cat("1", "etc/made"), twin.cat("1", "etc/made")), ("first".into(), "second".into()));
    }
}

/// As on a kernel that reads the table late, or never.
#[test]
fn partitions_that_the_kernel_lacks_are_added() {
    let mut disk = LoopDisk::new(48, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    alone(async |scratch| {
        let device = disk.device();
        let name = device.path.file_name().unwrap().to_str().unwrap();
        let partition = Path::new("/sys/block").join(name).join(format!("{name}p1"));
        if partition.exists() {
            run("partx", &["--delete", device.path.to_str().unwrap()]);
        }
        assert!(!partition.exists());
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        assert!(partition.exists());
        assert_eq!(root.os_release().unwrap().id(), "test");
        root.close().await.unwrap();
    });
    disk.detach();
}

/// Each line doubles what is mounted below /var.
fn recursive_binds(lines: usize) -> LoopDisk {
    let mut disk = LoopDisk::new(16, 512);
    let fstab: String = (0..lines).map(|line| format!("/var /var/{line} none rbind\n")).collect();
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT(&fstab), &[]);
    disk
}

#[test]
fn a_recursive_bind_goes_with_what_it_brought() {
    let disk = recursive_binds(3);
    alone(async |scratch| {
        let device = disk.device();
        let mounted = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        assert!(mounted.tree().exists("/var/2/1/0/tmp").unwrap());
        mounted.close().await.unwrap();
        assert_eq!((disk.mounts(), fs::read_dir(scratch).unwrap().count()), (0, 0));
    });
    disk.detach();
}

#[test]
fn binds_of_binds_do_not_fill_the_mount_table() {
    let disk = recursive_binds(40);
    let start = Instant::now();
    let error = disk.refused();
    assert!(error.contains("the recursive binds of the image's fstab create too many mounts"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn what_fstab_mounts_from_the_disk() {
    let fstab = "LABEL=root / ext4 x 0 1\nLABEL=var /var ext4 x 0 2\nLABEL=EFI /boot/efi vfat x 0 0\n\
                 PARTLABEL=boot /boot ext2 x 0 2\ntmpfs /tmp tmpfs\nUUID=none /n ext4 nofail\n/var/srv /srv none bind\nLABEL=var /opt/var ext4\n";
    let mut disk = LoopDisk::new(128, 512);
    disk.table(&format!(
        "label: gpt\n1: start=2048, size=65536, type={ROOT}\n2: start=67584, size=65536, type=L, name=boot\n\
         3: start=133120, size=65536, type=L\n4: start=198656, size=32768, type={ESP}\n"
    ));
    let root = FAKE_ROOT(fstab);
    fs::create_dir_all(root.path().join("boot/efi")).unwrap();
    disk.ext4("1", &root, &["-L", "root"]);
    let boot = tempfile::tempdir().unwrap();
    fs::create_dir(boot.path().join("efi")).unwrap();
    disk.ext("2", "ext2", &boot, &[]);
    let var = tempfile::tempdir().unwrap();
    fs::create_dir(var.path().join("srv")).unwrap();
    disk.ext4("3", &var, &["-L", "var"]);
    disk.vfat("4", "efi");
    let has_vfat = fs::read_to_string("/proc/filesystems").unwrap().contains("vfat");
    alone(async |scratch| {
        let device = disk.device();
        let mounted = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        let inside = mounted.tree();
        inside.write("/boot/kernel", b"k", 0o644, 0, 0).unwrap();
        inside.write("/var/lib/x", b"v", 0o644, 0, 0).unwrap();
        inside.write("/srv/www", b"s", 0o644, 0, 0).unwrap();
        assert_eq!(inside.read("/opt/var/lib/x").unwrap().unwrap(), b"v");
        let left: Vec<_> = mounted.unmounted().iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(left, if has_vfat { vec![] } else { vec!["/boot/efi"] });
        let links: Vec<_> =
            mounted.nodes().iter().flat_map(|node| node.links.iter().map(String::as_str)).collect();
        for link in ["disk/by-label/root", "disk/by-label/var", "disk/by-partlabel/boot", "disk/by-label/EFI"]
        {
            assert!(links.contains(&link), "{link} in {links:?}");
        }
        assert_eq!(mounted.nodes().len(), 5);
        mounted.close().await.unwrap();

        // A second time: the kernel's partitions are known. Now a step writes where the ESP belongs.
        let mounted = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        mounted.tree().write("/boot/efi/grub.efi", b"x", 0o644, 0, 0).unwrap();
        let closed = mounted.close().await;
        if !has_vfat {
            let error = closed.unwrap_err();
            assert!(format!("{error:#}").contains("changed /boot/efi"), "{error:#}");
            assert_eq!(Kind::of(&error), Kind::Machine);
        }
        assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
        assert_eq!(disk.mounts(), 0);
    });
    disk.detach();
    assert_eq!(
        (disk.cat("2", "kernel"), disk.cat("3", "lib/x"), disk.cat("3", "srv/www")),
        ("k".into(), "v".into(), "s".into())
    );
}

#[test]
fn a_line_for_another_disk_is_refused() {
    let mut disk = LoopDisk::new(48, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT("# one\nUUID=0000-ABCD /data vfat defaults\n"), &[]);
    let error = disk.refused();
    assert!(error.contains("line 2 of the image's /etc/fstab mounts UUID=0000-ABCD on /data"), "{error}");
}

#[test]
fn fstab_decides_between_two_candidates_or_they_are_refused() {
    let table = "label: gpt\n1: start=2048, size=65536, type=L\n2: start=67584, size=65536, type=L\n";
    let mut disk = LoopDisk::new(80, 512);
    disk.table(table);
    disk.ext4("1", &FAKE_ROOT("LABEL=old / ext4\n"), &["-L", "old"]);
    disk.ext4("2", &FAKE_ROOT("LABEL=new / ext4\n"), &["-L", "new"]);
    let error = disk.refused();
    for part in
        ["several partitions of the disk may be its root", "partition 1 (ext4, 32.0 MiB", "label \"new\""]
    {
        assert!(error.contains(part), "{error}");
    }
    let mut disk = LoopDisk::new(80, 512);
    disk.table(table);
    disk.ext4("1", &FAKE_ROOT("LABEL=new / ext4\n"), &["-L", "old"]);
    disk.ext4("2", &FAKE_ROOT("LABEL=new / ext4\n"), &["-L", "new"]);
    round_trip(&disk, "2", "ext4");
}

#[test]
fn what_oven_does_not_mount_is_refused_by_name() {
    for (offset, magic, name) in [
        (0x10040, &b"_BHRfS_M"[..], "btrfs"),
        (512, b"LABELONE\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0LVM2 001", "LVM"),
        (0, b"LUKS\xba\xbe", "LUKS"),
    ] {
        let mut disk = LoopDisk::new(48, 512);
        disk.table("label: gpt\n1: start=2048, size=32768, type=L\n2: start=34816, type=L\n");
        disk.ext4("1", &tempfile::tempdir().unwrap(), &["-L", "boot"]);
        disk.put("2", offset, magic);
        let error = disk.refused();
        assert!(
            error.contains(&format!("the disk's root is on {name}, which oven cannot mount: partition 2")),
            "{error}"
        );
    }
}

#[test]
fn ext4_grows_with_its_gpt() {
    grows(
        LoopDisk::new(3 << 10, 512),
        8 << 10,
        "label: gpt\n15: start=2048, size=8192, type=L\n1: start=10240, type=L\n",
        "1",
        "ext4",
    );
}
#[test]
fn ext4_grows_with_its_mbr() {
    grows(LoopDisk::new(200, 512), 1 << 10, "label: dos\n1: start=2048, type=83\n", "1", "ext4");
}
#[test]
fn ext4_grows_on_sectors_of_4096_bytes() {
    grows(LoopDisk::new(200, 4096), 1 << 10, "label: gpt\n1: start=256, type=L\n", "1", "ext4");
}
#[test]
fn ext4_grows_without_a_table() {
    grows(LoopDisk::new(200, 512), 1 << 10, "", "", "ext4");
}
#[test]
fn xfs_grows_with_its_gpt() {
    grows(LoopDisk::new(400, 512), 2 << 10, "label: gpt\n1: start=2048, type=L\n", "1", "xfs");
}

fn grows(mut disk: LoopDisk, to_mib: u64, table: &str, part: &str, kind: &str) {
    if !table.is_empty() {
        disk.table(table);
    }
    match kind {
        "xfs" => disk.xfs(part, &FAKE_ROOT("")),
        _ => disk.ext4(part, &FAKE_ROOT(""), &[]),
    }
    disk.resize(to_mib);
    alone(async |scratch| {
        let device = disk.device();
        let size = |root: &Root<'_>| {
            let s = rustix::fs::statfs(root.path()).unwrap();
            s.f_blocks * s.f_bsize as u64
        };
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        let before = size(&root);
        assert!(before < (to_mib << 20) / 2);
        root.close().await.unwrap();
        for _ in 0..2 {
            let root = Root::mount(&device, scratch, &GROW, &Report::silent()).await.unwrap();
            assert!(size(&root) > (to_mib << 20) / 10 * 9, "{before} -> {}", size(&root));
            root.tree().write("/etc/made", b"here", 0o644, 0, 0).unwrap();
            root.close().await.unwrap();
        }
    });
    disk.detach();
    if !table.is_empty() {
        disk.verify_table();
    }
    disk.with_part(part, |path| match kind {
        "xfs" => run("xfs_repair", &["-n", path]),
        _ => run("e2fsck", &["-fn", path]),
    });
    assert_eq!(disk.cat(part, "etc/made"), "here");
}

#[test]
fn a_root_that_is_not_last_does_not_grow() {
    let mut disk = LoopDisk::new(80, 512);
    disk.table(&format!(
        "label: gpt\n1: start=2048, size=65536, type={ROOT}\n2: start=67584, size=65536, type=L\n"
    ));
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    disk.resize(200);
    alone(async |scratch| {
        let device = disk.device();
        let error = Root::mount(&device, scratch, &GROW, &Report::silent()).await.err().unwrap();
        assert!(
            format!("{error:#}").contains("partition 1 cannot grow, because partition 2 follows it"),
            "{error:#}"
        );
        assert_eq!(Kind::of(&error), Kind::Definition);
        Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap().close().await.unwrap();
    });
}

#[test]
fn a_copy_in_another_mount_namespace_prevents_closing() {
    let mut disk = LoopDisk::new(48, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    alone(async |scratch| {
        let device = disk.device();
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        // From the namespace of this thread: a copy of its mounts goes with it.
        let mut other = loop_disk::spawn("unshare", &["--mount", "sleep", "600"]);
        let pid = other.id();
        let started = Instant::now();
        while loop_disk::comm(pid) != "sleep" {
            assert!(started.elapsed() < Duration::from_secs(60));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let started = Instant::now();
        let error = root.close().await.unwrap_err();
        let text = format!("{error:#}");
        let space = fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
        let space = space.to_str().unwrap().trim_start_matches("mnt:").to_owned();
        assert!(
            text.contains(&format!("process {pid} (sleep) has mounted it on")) && text.contains(&space),
            "{text}"
        );
        assert_eq!(Kind::of(&error), Kind::Machine);
        assert!(started.elapsed() < Duration::from_secs(20));
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
        // Nobody holds it now.
        Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap().close().await.unwrap();
    });
}

#[test]
fn a_disk_that_is_mounted_elsewhere_is_refused() {
    let mut disk = LoopDisk::new(48, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    alone(async |scratch| {
        let device = disk.device();
        let first = tempfile::tempdir().unwrap();
        let root = Root::mount(&device, first.path(), &PLAIN, &Report::silent()).await.unwrap();
        let error = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.err().unwrap();
        let text = format!("{error:#}");
        assert!(text.contains("p1 is in use"), "{text}");
        root.close().await.unwrap();
        assert_eq!((disk.mounts(), fs::read_dir(scratch).unwrap().count()), (0, 0));
    });
}

#[test]
fn an_open_file_keeps_it_busy_and_is_named() {
    let mut disk = LoopDisk::new(48, 512);
    disk.ext4("", &FAKE_ROOT(""), &[]);
    alone(async |scratch| {
        let device = disk.device();
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        let file = root.tree().open_file("/etc/os-release").unwrap().unwrap();
        // The second attempt is that of the drop: it must not wait for ever either.
        let started = Instant::now();
        let error = root.close().await.unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("/ of the image is busy: process") && text.contains("lib/os-release"),
            "{text}"
        );
        assert!(started.elapsed() < Duration::from_secs(20));
        drop(file);
    });
}

#[test]
fn dropping_unmounts_everything() {
    let mut disk = LoopDisk::new(128, 512);
    disk.table("label: gpt\n1: start=2048, size=65536, type=L\n2: start=67584, size=65536, type=L\n");
    disk.ext4("1", &FAKE_ROOT("LABEL=var /var ext4\n"), &["-L", "root"]);
    disk.ext4("2", &tempfile::tempdir().unwrap(), &["-L", "var"]);
    alone(async |scratch| {
        let device = disk.device();
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        assert_eq!(disk.mounts(), 2);
        drop(root);
        assert_eq!((disk.mounts(), fs::read_dir(scratch).unwrap().count()), (0, 0));
    });
    // The partitions that were added do not hold the loop device.
    disk.detach();
    assert!(loops_of(&disk).is_empty());
}

#[test]
fn nothing_is_left_wherever_it_is_cancelled() {
    let mut disk = LoopDisk::new(128, 512);
    disk.table("label: gpt\n1: start=2048, size=65536, type=L\n2: start=67584, size=65536, type=L\n");
    disk.ext4("1", &FAKE_ROOT("LABEL=root / ext4\nLABEL=var /var ext4\n"), &["-L", "root"]);
    disk.ext4("2", &FAKE_ROOT("LABEL=root / ext4\n"), &["-L", "var"]);
    alone(async |scratch| {
        let device = disk.device();
        let story = async || {
            let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
            root.tree().write("/var/x", &[7; 1 << 20], 0o644, 0, 0).unwrap();
            root.close().await.unwrap();
        };
        // Dropped where it waits for the first time, for the second, …
        for polls in 1.. {
            let done = loop_disk::polled(story(), polls).await;
            assert_eq!((disk.mounts(), fs::read_dir(scratch).unwrap().count()), (0, 0), "{polls}");
            if done {
                assert!(polls > 8, "{polls}");
                break;
            }
        }
    });
}

#[test]
fn a_loop_that_detaches_itself_does_so() {
    let mut disk = LoopDisk::new(48, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    alone(async |scratch| {
        let device = disk.device();
        disk.autoclear();
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        root.close().await.unwrap();
        assert_eq!(loops_of(&disk).len(), 1);
        let name = device.path.file_name().unwrap().to_owned();
        drop(device);
        let started = Instant::now();
        // The kernel detaches a moment after the last close.
        while !loops_of(&disk).is_empty() {
            assert!(started.elapsed() < Duration::from_secs(20));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let part = format!("/sys/class/block/{}p1", name.to_str().unwrap());
        assert!(
            !Path::new(&part).exists() || fs::read_to_string(format!("{part}/../loop/backing_file")).is_ok()
        );
    });
}

#[test]
fn an_error_in_the_file_system_fails_the_bake() {
    let mut disk = LoopDisk::new(48, 512);
    disk.ext4("", &FAKE_ROOT(""), &[]);
    alone(async |scratch| {
        let device = disk.device();
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        let name = device.path.file_name().unwrap().to_str().unwrap();
        fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "test").unwrap();
        let error = root.close().await.unwrap_err();
        assert!(format!("{error:#}").contains("checking the file system of / on loop"), "{error:#}");
        // The kernel counts an error without a code as damage of the file system.
        assert_eq!((Kind::of(&error), disk.mounts()), (Kind::Definition, 0));
    });
}

#[test]
fn a_journal_is_replayed_and_damage_is_named() {
    let mut disk = LoopDisk::new(48, 512);
    disk.table("label: gpt\nstart=2048, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    let dirty = disk.copy_while_mounted();
    alone(async |scratch| {
        let device = dirty.device();
        let root = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap();
        assert_eq!(root.tree().read("/etc/late").unwrap().unwrap(), b"journalled");
        root.close().await.unwrap();
    });
    dirty.detach();
    dirty.with_part("1", |path| run("e2fsck", &["-fn", path]));
    dirty.put("1", 1024 + 24, &[0xff; 4]);
    let error = dirty.refused();
    assert!(error.contains("mounting /dev/loop") && error.contains("damaged"), "{error}");
}

#[test]
fn mount_points_are_resolved_inside() {
    for (plant, wanted) in [
        ((|root: &Path| symlink("/etc", root.join("data")).unwrap()) as fn(&Path), Ok("etc")),
        (|root| symlink("../../../../../../etc", root.join("data")).unwrap(), Ok("etc")),
        (|root| symlink("/", root.join("data")).unwrap(), Err("resolves to the root directory")),
        (|root| symlink("..", root.join("data")).unwrap(), Err("resolves to the root directory")),
        (|root| symlink("data", root.join("data")).unwrap(), Err("creating the directory /data")),
        (|root| symlink("/proc/self/root/tmp", root.join("data")).unwrap(), Err("/data")),
        (
            |root| symlink("/var/tmp/gone", root.join("data")).unwrap(),
            Err("is a symlink to /var/tmp/gone, which does not exist"),
        ),
        (|root| fs::write(root.join("data"), "").unwrap(), Err("/data in the image is not a directory")),
        (|_| (), Ok("data")),
    ] {
        let mut disk = LoopDisk::new(80, 512);
        disk.table("label: gpt\n1: start=2048, size=65536, type=L\n2: start=67584, size=65536, type=L\n");
        let root = FAKE_ROOT("LABEL=data /data ext4\n");
        plant(root.path());
        disk.ext4("1", &root, &["-L", "root"]);
        let data = tempfile::tempdir().unwrap();
        fs::write(data.path().join("mark"), "").unwrap();
        disk.ext4("2", &data, &["-L", "data"]);
        alone(async |scratch| {
            let device = disk.device();
            match (Root::mount(&device, scratch, &PLAIN, &Report::silent()).await, wanted) {
                (Ok(root), Ok(place)) => {
                    assert!(fs::metadata(root.path().join(place).join("mark")).is_ok());
                    root.close().await.unwrap();
                }
                (Err(error), Err(why)) => assert!(format!("{error:#}").contains(why), "{error:#}"),
                (found, wanted) => panic!("{wanted:?}, but {:?}", found.map(|_| ())),
            }
            assert_eq!((disk.mounts(), fs::read_dir(scratch).unwrap().count()), (0, 0));
        });
    }
}

#[test]
fn a_shared_namespace_is_refused() {
    let mut disk = LoopDisk::new(48, 512);
    disk.ext4("", &FAKE_ROOT(""), &[]);
    alone(async |scratch| {
        loop_disk::share(scratch);
        let device = disk.device();
        let error = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.err().unwrap();
        assert!(format!("{error:#}").contains("would be visible to other processes"), "{error:#}");
        assert_eq!(disk.mounts(), 0);
    });
}

#[test]
fn a_disk_that_changed_is_not_touched() {
    let mut disk = LoopDisk::new(48, 512);
    disk.table("label: gpt\nstart=2048, size=65536, type=L\n");
    disk.ext4("1", &FAKE_ROOT(""), &[]);
    alone(async |scratch| {
        let mut device = disk.device();
        Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.unwrap().close().await.unwrap();
        // The table on the disk says something else now than the kernel knows.
        let path = device.path.clone();
        disk.table_on(&path, "label: gpt\nstart=2048, size=67584, type=L\n");
        let error = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.err().unwrap();
        assert!(format!("{error:#}").contains("p1 differs from partition 1 of the table"), "{error:#}");
        device.rdev += 1;
        let error = Root::mount(&device, scratch, &PLAIN, &Report::silent()).await.err().unwrap();
        assert!(format!("{error:#}").contains("no longer the device"), "{error:#}");
    });
}

//! Systems whose fstab, journal or swap is set up in a special way.

use super::{is_full, number};
use crate::hostile::lab::{Deb, HostileLab, variable};
use oven_testing::{ImageReader, stderr};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

const MIB: u64 = 1 << 20;

/// The parent of the definition `image`, with a script.
fn parent(lab: &HostileLab, script: &str) {
    lab.world.write("parent/image.toml", "from = { name = \"base\" }\n[[run]]\nscript = \"set-up.sh\"\n");
    lab.world.write("parent/set-up.sh", &format!("#!/bin/sh\nset -eu\n{script}\n"));
}

/// The definition `image`, on that parent, with a package and a `[[test]]`.
fn child(lab: &HostileLab, deb: &Deb, test: &str) {
    let file = deb.build(&lab.world.path("image"));
    let toml = format!("from = \"../parent\"\npackages = [\"./{file}\"]\n[[test]]\nscript = \"test.sh\"\n");
    lab.world.write("image/image.toml", &toml);
    lab.world.write("image/test.sh", &format!("#!/bin/sh\nset -eux\n{test}\n"));
}

/// Bakes the parent alone.
fn baked_parent(lab: &HostileLab) -> ImageReader {
    let (out, err) = lab.world.expect(0, &["bake", "parent"]);
    lab.world.assert_no_traces(&err);
    ImageReader::of(&lab.world, out.trim())
}

/// The directory makes journald store its journal on the disk. It stays with its owner, mode and access list. The
/// journal itself is of one machine.
#[test]
fn a_persistent_journal_keeps_its_directory_and_loses_its_content() {
    let lab = HostileLab::full();
    let made = "mkdir /var/log/journal && systemd-tmpfiles --create --prefix /var/log/journal || :\n\
                chgrp systemd-journal /var/log/journal\nchmod 2755 /var/log/journal\n\
                mkdir -p /etc/systemd/journald.conf.d\n\
                printf '[Journal]\\nStorage=persistent\\n' > /etc/systemd/journald.conf.d/persistent.conf";
    let journal = "id=0123456789abcdef0123456789abcdef\nmkdir -p /var/log/journal/$id /var/log/journal/remote\n\
                   head -c 100000 /dev/urandom > /var/log/journal/$id/system.journal\n\
                   head -c 100000 /dev/urandom > /var/log/journal/remote/remote-x.journal~";
    parent(&lab, &format!("{made}\n{journal}"));
    let seen = "test \"$(stat -c '%a %U:%G' /var/log/journal)\" = '2755 root:systemd-journal'\n\
                # Neither this machine's journal nor its socket is here.\n\
                test ! -e /run/log/journal && test ! -e /run/systemd/journal/socket";
    child(&lab, &Deb::sh(&format!("{journal}\nlogger of-a-package || :")), seen);
    let before = baked_parent(&lab);
    let (disk, _) = lab.image();
    for image in [&before, &disk] {
        assert_eq!(image.kind("/var/log/journal").as_deref(), Some("directory"));
        assert_eq!(image.mode("/var/log/journal").as_deref(), Some("02755"));
        let group = number(image, "/etc/group", "systemd-journal");
        assert_eq!(image.owner("/var/log/journal"), Some((0, group)));
        let files = image.list("/var/log/journal");
        let files = files.iter().flat_map(|dir| image.list(&format!("/var/log/journal/{dir}")));
        let files: Vec<_> = files.collect();
        assert!(files.is_empty(), "{files:?}");
        let (listed, _) = image.debugfs("ea_list /var/log/journal");
        assert!(listed.contains("system.posix_acl_default"), "{listed}");
        assert_eq!(
            image.read("/etc/systemd/journald.conf.d/persistent.conf").as_deref(),
            Some("[Journal]\nStorage=persistent\n")
        );
        assert_eq!(image.read("/etc/machine-id").as_deref(), Some(""));
    }
    let host = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    assert!(host.trim().is_empty() || !disk.list("/var/log/journal").contains(&host.trim().to_owned()));
}

/// The small Debian with two more partitions: one for /var/tmp, and one for swap.
fn partitioned(dir: &Path) -> std::path::PathBuf {
    let run = |command: &mut Command| {
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", stderr(&output));
        output.stdout
    };
    let small = variable("OVEN_TEST_TINY");
    let table: serde_json::Value =
        serde_json::from_slice(&run(Command::new("sfdisk").arg("--json").arg(&small))).unwrap();
    let root = &table["partitiontable"]["partitions"][0];
    let [start, sectors] = ["start", "size"].map(|field| root[field].as_u64().unwrap());
    let (raw, parts) = (dir.join("partitioned.raw"), dir.join("table"));
    run(Command::new("cp").arg("--sparse=always").arg(&small).arg(&raw));
    let [first, second] = [16, 64].map(|mib: u64| mib * MIB / 512);
    let (tmp, swap) = (start + sectors + 2048, start + sectors + 2048 + first);
    fs::OpenOptions::new().write(true).open(&raw).unwrap().set_len((swap + second) * 512 + MIB).unwrap();
    let script = format!(
        "label: gpt\n1: start={start}, size={sectors}, type=L\n2: start={tmp}, size={first}, type=L\n\
         3: start={swap}, size={second}, type=S\n"
    );
    fs::write(&parts, script).unwrap();
    let sfdisk = ["--quiet", "--no-reread", "--no-tell-kernel", "--wipe=never", "--wipe-partitions=never"];
    let table = fs::File::open(&parts).unwrap();
    let done = Command::new("sfdisk").args(sfdisk).arg(&raw).stdin(table).output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    for (program, label, start, sectors) in
        [("mkfs.ext4", "tmp", tmp, first), ("mkswap", "swap", swap, second)]
    {
        let part = dir.join(label);
        fs::File::create(&part).unwrap().set_len(sectors * 512).unwrap();
        run(Command::new(program).args(["-q", "-L", label]).arg(&part));
        let to = fs::OpenOptions::new().write(true).open(&raw).unwrap();
        to.write_all_at(&fs::read(&part).unwrap(), start * 512).unwrap();
    }
    raw
}

/// Returns the content of the image's partition for swap.
fn swap_partition(disk: &ImageReader) -> Vec<u8> {
    let raw = disk.raw();
    let table = Command::new("sfdisk").arg("--json").arg(raw).output().unwrap();
    let table: serde_json::Value = serde_json::from_slice(&table.stdout).unwrap();
    let part = &table["partitiontable"]["partitions"][2];
    let [start, sectors] = ["start", "size"].map(|field| part[field].as_u64().unwrap());
    assert_eq!(sectors * 512, 64 * MIB);
    let mut content = vec![0; 64 << 20];
    fs::File::open(raw).unwrap().read_exact_at(&mut content, start * 512).unwrap();
    content
}

/// Neither a file nor a partition for swap is used or changed, and fstab stays.
#[test]
fn swap_in_fstab_is_neither_used_nor_changed() {
    let dir = tempfile::tempdir().unwrap();
    let lab = HostileLab::on(&partitioned(dir.path()));
    let swaps = fs::read_to_string("/proc/swaps").unwrap();
    parent(
        &lab,
        "rm /etc/apt/sources.list\n\
         dd if=/dev/zero of=/swapfile bs=1M count=32 status=none\nchmod 600 /swapfile\nmkswap -q /swapfile\n\
         printf '/swapfile none swap sw 0 0\\nLABEL=swap none swap sw,discard,pri=10 0 0\\n' >> /etc/fstab",
    );
    child(&lab, &Deb::sh("! swapon -a"), "! grep swapfile /proc/swaps");
    let before = baked_parent(&lab);
    let (disk, baked) = lab.image();
    let (file, old) = (disk.bytes("/swapfile"), before.bytes("/swapfile"));
    assert!(file.len() as u64 == 32 * MIB && file[4086..4096] == *b"SWAPSPACE2", "{}", baked.err);
    assert!(file == old, "the swap file changed");
    assert_eq!(disk.mode("/swapfile").as_deref(), Some("0600"));
    assert_eq!(disk.owner("/swapfile"), Some((0, 0)));
    // swapon refuses a file with holes.
    let (blocks, _) = disk.debugfs("stat /swapfile");
    let blocks = blocks.split_once("Blockcount: ").unwrap().1.split_whitespace().next().unwrap().to_owned();
    assert!(blocks.parse::<u64>().unwrap() * 512 >= 32 * MIB, "{blocks} blocks");
    let partition = swap_partition(&disk);
    assert!(partition[4086..4096] == *b"SWAPSPACE2" && partition == swap_partition(&before));
    let fstab = disk.read("/etc/fstab").unwrap();
    assert_eq!(Some(&fstab), before.read("/etc/fstab").as_ref());
    assert!(
        fstab.ends_with("/swapfile none swap sw 0 0\nLABEL=swap none swap sw,discard,pri=10 0 0\n"),
        "{fstab}"
    );
    assert_eq!(fs::read_to_string("/proc/swaps").unwrap(), swaps);
}

/// The options of /tmp and /var/tmp are for an instance. Scripts of packages run programs in both directories.
#[test]
fn packages_are_installed_although_fstab_forbids_programs_in_tmp() {
    if !is_full("the hardened fstab") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let lab = HostileLab::on(&partitioned(dir.path()));
    let lines = "tmpfs /tmp tmpfs rw,nodev,nosuid,noexec,mode=1777,size=8m 0 0\\n\
                 LABEL=tmp /var/tmp ext4 rw,nodev,nosuid,noexec 0 2\\n\
                 tmpfs /dev/shm tmpfs rw,nodev,nosuid,noexec 0 0\\nproc /proc proc hidepid=2 0 0\\n";
    parent(&lab, &format!("printf '{lines}' >> /etc/fstab"));
    let script = "for dir in /tmp /var/tmp; do\n\
                  printf '#!/bin/sh\\necho ran in '$dir' >> /etc/ran\\n' > $dir/program\n\
                  chmod 755 $dir/program\n$dir/program\ndone";
    let deb = Deb::sh(script).field("Depends: tree");
    child(&lab, &deb, &format!("{script}\ntree --version"));
    let before = baked_parent(&lab);
    let (disk, baked) = lab.image();
    assert_eq!(disk.read("/etc/ran").as_deref(), Some("ran in /tmp\nran in /var/tmp\n"), "{}", baked.err);
    let fstab = disk.read("/etc/fstab").unwrap();
    assert_eq!(Some(&fstab), before.read("/etc/fstab").as_ref());
    assert!(fstab.ends_with(&lines.replace("\\n", "\n")), "{fstab}");
    for dir in ["/tmp", "/var/tmp"] {
        assert_eq!(disk.mode(dir).as_deref(), Some("01777"), "{dir}");
        assert_eq!(disk.list(dir), [""; 0], "{dir}");
    }
    assert_eq!(disk.audit(), "");
}

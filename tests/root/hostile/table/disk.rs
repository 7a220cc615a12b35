//! Disks for the table: a small Debian of busybox, whose package manager is a script, and what is changed in it.

use oven_testing::programs::cache_dir;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the partition with the root file system begins on a disk with a table.
pub const START: u64 = 1 << 20;
/// The size of the root file system. The file is sparse.
pub const SIZE: u64 = 48 << 20;

/// How a disk is made.
#[derive(Clone, Copy)]
pub enum Damage {
    /// Changes the tree of files of which the file system is made.
    Files(fn(&Path)),
    /// Changes the finished disk, which is an ext4 file system without a partition table.
    Disk(fn(&Path)),
    /// Requests to debugfs, which change the finished disk.
    Debugfs(&'static [&'static str]),
}

/// Makes the disk of a case in `dir`, and returns its path.
pub fn make(dir: &Path, damage: Damage) -> PathBuf {
    let raw = dir.join("base.raw");
    match damage {
        Damage::Files(change) => {
            let tree = dir.join("tree");
            make_tree(&tree);
            change(&tree);
            format_ext4(&raw, &tree, &[]);
            sh(&format!("rm -rf {}", tree.display()));
        }
        Damage::Disk(change) => {
            copy_of_whole(&raw);
            change(&raw);
        }
        Damage::Debugfs(requests) => {
            copy_of_whole(&raw);
            debugfs(&raw, requests);
        }
    }
    raw
}

/// Makes the ext4 file system of a tree.
pub fn format_ext4(raw: &Path, tree: &Path, options: &[&str]) {
    File::create(raw).unwrap().set_len(SIZE).unwrap();
    let mut mkfs = Command::new("mkfs.ext4");
    let made = mkfs
        .args(["-q", "-F", "-b", "4096", "-N", "4096", "-d"])
        .arg(tree)
        .args(options)
        .arg(raw)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// A disk without damage. It is made once.
pub fn whole() -> PathBuf {
    // The name changes with the code that makes the disk.
    let path = cache_dir().join(format!("hostile-table-{:08x}.raw", crc32(include_bytes!("disk.rs"))));
    if !path.exists() {
        let temp = tempfile::tempdir_in(cache_dir()).unwrap();
        make_tree(&temp.path().join("tree"));
        let raw = temp.path().join("raw");
        format_ext4(&raw, &temp.path().join("tree"), &[]);
        fs::rename(raw, &path).unwrap();
    }
    path
}

fn debugfs(raw: &Path, requests: &[&str]) {
    let script = raw.with_extension("requests");
    fs::write(&script, requests.join("\n")).unwrap();
    let done = Command::new("debugfs").args(["-w", "-f"]).arg(&script).arg(raw).output().unwrap();
    // debugfs prints one line with its version, and then its errors.
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && said.lines().count() <= 1, "{said}");
    fs::remove_file(script).unwrap();
}

fn copy_of_whole(to: &Path) {
    let copied = Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(whole()).arg(to).status();
    assert!(copied.unwrap().success());
}

/// What dpkg knows of the image, as `dpkg-query` prints it.
pub const PACKAGES: &str = "var/lib/dpkg/list";
const DPKG_QUERY: &str = "#!/bin/sh\nexec cat /var/lib/dpkg/list\n";
const APT_GET: &str = "#!/bin/sh\ncase \"$*\" in\n*download-only*) ;;\n*install*) \
                       echo \"hello\t1\tall\tinstalled\t\" >> /var/lib/dpkg/list ;;\nesac\n";

pub fn make_tree(tree: &Path) {
    for dir in ["bin", "boot", "etc", "usr/bin", "usr/sbin", "var/log", "var/lib/dpkg", "var/cache/apt"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
    }
    for dir in ["proc", "sys", "dev", "run", "tmp", "root", "srv", "mnt", "home"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("busybox-static: scripts/setup installs it");
    for applet in ["sh", "cat", "mkdir", "sleep", "true", "touch", "dd", "yes", "head", "chmod"] {
        symlink("busybox", tree.join("bin").join(applet)).unwrap();
    }
    write(tree, "etc/os-release", "ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n");
    write(tree, "etc/passwd", "root:x:0:0::/root:/bin/sh\n");
    write(tree, "etc/group", "root:x:0:\n");
    write(tree, "etc/resolv.conf", "# the image's own\n");
    write(tree, PACKAGES, "busybox\t1\tamd64\tinstalled\t\n");
    program(tree, "usr/bin/dpkg-query", DPKG_QUERY);
    program(tree, "usr/bin/apt-get", APT_GET);
    // The find of busybox lacks options with which apt's caches are emptied.
    program(tree, "usr/bin/find", "#!/bin/sh\n");
}

pub fn write(tree: &Path, path: &str, content: impl AsRef<[u8]>) {
    let path = tree.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

pub fn program(tree: &Path, path: &str, script: &str) {
    write(tree, path, script);
    fs::set_permissions(tree.join(path), fs::Permissions::from_mode(0o755)).unwrap();
}

/// Makes a sparse file.
pub fn hole(tree: &Path, path: &str, size: u64) {
    write(tree, path, "");
    File::options().write(true).open(tree.join(path)).unwrap().set_len(size).unwrap();
}

/// Replaces a file by a link.
pub fn link(tree: &Path, to: &str, path: &str) {
    sh(&format!("rm -rf '{}'", tree.join(path).display()));
    symlink(to, tree.join(path)).unwrap();
}

pub fn sh(script: &str) {
    let done = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
}

pub fn put(raw: &Path, offset: u64, bytes: &[u8]) {
    File::options().write(true).open(raw).unwrap().write_all_at(bytes, offset).unwrap();
}

pub fn get(raw: &Path, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    File::open(raw).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// Changes bytes of the ext4 superblock. Its checksum is left as it is.
pub fn superblock(raw: &Path, offset: u64, bytes: &[u8]) {
    put(raw, 1024 + offset, bytes);
}

/// Moves the file system into the first partition of a disk with this table, which is a script for sfdisk.
pub fn partition(raw: &Path, mib: u64, script: &str) {
    let fs = raw.with_extension("fs");
    fs::rename(raw, &fs).unwrap();
    File::create(raw).unwrap().set_len(mib << 20).unwrap();
    let (table, raw_path) = (raw.with_extension("table"), raw.display());
    fs::write(&table, script).unwrap();
    sh(&format!("sfdisk --quiet --wipe=never --no-reread --no-tell-kernel {raw_path} < {}", table.display()));
    copy_into(&fs, raw, START);
    fs::remove_file(fs).unwrap();
    fs::remove_file(table).unwrap();
}

pub fn copy_into(from: &Path, to: &Path, offset: u64) {
    let (from, to) = (from.display(), to.display());
    let seek = offset >> 20;
    sh(&format!("dd if={from} of={to} bs=1M seek={seek} conv=notrunc,sparse status=none"));
}

/// Runs a script in the mounted file system of a disk. Other processes do not see the mount.
pub fn in_mount(raw: &Path, script: &str) {
    let (file, place) = (raw.with_extension("sh"), raw.with_extension("mount"));
    let mount = "mount -o loop \"$1\" \"$2\"\ncd \"$2\"\n";
    fs::write(&file, format!("{mount}({script})\ncd /\numount \"$2\"\n")).unwrap();
    fs::create_dir(&place).unwrap();
    let done =
        Command::new("unshare").args(["--mount", "sh", "-e"]).args([&file, raw, &place]).output().unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
    fs::remove_file(file).unwrap();
    fs::remove_dir(place).unwrap();
}

/// The disk has a size of whole GiB, like a volume, so that the second copy of the GPT is at its end.
const MIB: u64 = 1024;

/// A GPT with the root as its first partition, and this one as its second.
pub fn gpt(raw: &Path, second: &str) {
    partition(raw, MIB, &format!("label: gpt\nstart=2048, size=98304, type=L\n{second}\n"));
}

/// Changes the entries or the header of both copies of a GPT, and corrects their checksums.
pub fn change_gpt(raw: &Path, change: impl Fn(&mut [u8], &mut [u8])) {
    let last = fs::metadata(raw).unwrap().len() / 512 - 1;
    for (header_at, entries_at) in [(1, 2), (last, last - 32)] {
        let (mut header, mut entries) =
            (get(raw, header_at * 512, 512), get(raw, entries_at * 512, 128 * 128));
        change(&mut header, &mut entries);
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        header[16..20].fill(0);
        let sum = crc32(&header[..92]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        put(raw, header_at * 512, &header);
        put(raw, entries_at * 512, &entries);
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg()))
    };
    !bytes.iter().fold(!0, step)
}

//! The hostile images: how each is damaged, and how its bake has to end.

use super::disk::*;
use super::{Case, PLAIN};
use oven_testing::full;
use rustix::fs::XattrFlags;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

/// A package, so that the bake uses the image's package manager.
const PACKAGE: &str = "packages = [\"hello\"]";
/// The definition runs this program of the image for at most two seconds.
const RUN_APT: &str = "[[run]]\ncommand = [\"/usr/bin/apt-get\"]\ntimeout = 2";
/// A step that changes the kernel, so that oven checks whether the image can boot.
const TOUCH_KERNEL: &str =
    "[[run]]\ncommand = [\"touch\", \"/boot/vmlinuz-6.1.0\", \"/boot/initrd.img-6.1.0\"]";

const fn files(name: &'static str, change: fn(&Path)) -> Case {
    Case { name, damage: Damage::Files(change), ..PLAIN }
}

const fn disk(name: &'static str, change: fn(&Path)) -> Case {
    Case { name, damage: Damage::Disk(change), ..PLAIN }
}

const fn debugfs(name: &'static str, requests: &'static [&'static str]) -> Case {
    Case { name, damage: Damage::Debugfs(requests), ..PLAIN }
}

impl Case {
    const fn ends(self, code: i32, words: &'static [&'static str]) -> Self {
        Self { code, words, ..self }
    }

    const fn with(self, more: &'static str) -> Self {
        Self { more, ..self }
    }
}

pub fn all() -> Vec<Case> {
    [tables(), superblocks(), fstabs(), os_releases(), places(), odd_files(), package_managers(), boots()]
        .concat()
}

/// Partition tables.
fn tables() -> Vec<Case> {
    const UNUSABLE: &str = "partition table cannot be used";
    vec![
        disk("a GPT whose headers have wrong checksums", |raw| {
            gpt(raw, "");
            put(raw, 512 + 16, &[0; 4]);
            put(raw, (1 << 30) - 512 + 16, &[0; 4]);
        })
        .ends(3, &[UNUSABLE]),
        disk("a GPT whose primary header has a wrong checksum", |raw| {
            gpt(raw, "");
            put(raw, 512 + 16, &[0; 4]);
        })
        .ends(0, &["backup"]),
        disk("a GPT with partitions that overlap", |raw| {
            gpt(raw, "start=102400, size=2048");
            change_gpt(raw, |_, entries| entries[128 + 32..128 + 40].copy_from_slice(&4096u64.to_le_bytes()));
        })
        .ends(3, &[UNUSABLE, "overlap"]),
        disk("a GPT with a partition that ends before it begins", |raw| {
            gpt(raw, "start=102400, size=2048");
            change_gpt(raw, |_, entries| entries[128 + 40..128 + 48].copy_from_slice(&102200u64.to_le_bytes()));
        })
        .ends(3, &[UNUSABLE]),
        disk("a GPT with a partition beyond the end of the disk", |raw| {
            gpt(raw, "start=102400, size=2048");
            change_gpt(raw, |_, entries| entries[128 + 40..128 + 48].copy_from_slice(&(1u64 << 40).to_le_bytes()));
        })
        .ends(3, &[UNUSABLE]),
        disk("a GPT with a partition of the whole range of numbers", |raw| {
            gpt(raw, "start=102400, size=2048");
            change_gpt(raw, |_, entries| entries[128 + 40..128 + 48].fill(0xff));
        })
        .ends(3, &[UNUSABLE]),
        disk("a GPT with 1000 partitions", |raw| {
            let small = (0..999).map(|n| format!("start={}, size=1\n", 104448 + n)).collect::<String>();
            partition(raw, 64, &format!("label: gpt\ntable-length: 1024\nstart=2048, size=98304\n{small}"));
        })
        .ends(3, &["partition"]),
        disk("a GPT whose header leads to itself", |raw| {
            gpt(raw, "");
            change_gpt(raw, |header, _| {
                header[32..40].copy_from_slice(&1u64.to_le_bytes());
                header[72..80].copy_from_slice(&1u64.to_le_bytes());
            });
        })
        .ends(3, &[UNUSABLE]),
        disk("a GPT with four billion entries of no length", |raw| {
            gpt(raw, "");
            change_gpt(raw, |header, _| {
                header[80..84].fill(0xff);
                header[84..88].fill(0);
            });
        })
        .ends(3, &[UNUSABLE]),
        disk("a GPT for sectors of 4096 bytes", |raw| {
            gpt(raw, "");
            let header = get(raw, 512, 512);
            put(raw, 512, &[0; 512]);
            put(raw, (1 << 30) - 512, &[0; 512]);
            put(raw, 4096, &header);
        })
        .ends(3, &[UNUSABLE]),
        disk("a hybrid MBR beside a GPT", |raw| {
            gpt(raw, "");
            let mut entry = [0u8; 16];
            (entry[4], entry[8], entry[13]) = (0x83, 7, 9);
            put(raw, 446 + 16, &entry);
        })
        .ends(0, &[]),
        disk("an MBR whose extended partition leads to itself", |raw| {
            partition(raw, 96, "label: dos\nstart=2048, size=98304\nstart=102400, size=40960, type=5\nstart=104448, size=2048\n");
            put(raw, 102400 * 512 + 446 + 16 + 4, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0]);
        })
        .ends(3, &[UNUSABLE]),
        disk("an MBR with a partition beyond the end of the disk", |raw| {
            partition(raw, 96, "label: dos\nstart=2048, size=98304\nstart=102400, size=2048\n");
            put(raw, 446 + 16 + 12, &u32::MAX.to_le_bytes());
        })
        .ends(3, &[UNUSABLE]),
        disk("a partition of zeros", |raw| {
            gpt(raw, "");
            put(raw, START, &vec![0; SIZE as usize]);
        })
        .ends(3, &["no ext4 or xfs"]),
        disk("a partition of noise", |raw| {
            gpt(raw, "");
            let noise = |n: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
            put(raw, START, &(1..=SIZE).map(noise).collect::<Vec<_>>());
        })
        .ends(3, &["no ext4 or xfs"]),
    ]
}

/// File systems.
fn superblocks() -> Vec<Case> {
    const DAMAGED: &str = "is damaged, or this kernel is too old";
    vec![
        disk("an ext4 with a block size of 2^109", |raw| superblock(raw, 24, &99u32.to_le_bytes()))
            .ends(3, &[DAMAGED]),
        disk("an ext4 with blocks of 64 KiB", |raw| superblock(raw, 24, &6u32.to_le_bytes()))
            .ends(3, &[DAMAGED]),
        disk("an ext4 with 2^32 blocks", |raw| superblock(raw, 4, &u32::MAX.to_le_bytes()))
            .ends(3, &[DAMAGED]),
        disk("an ext4 with no inodes in a group", |raw| superblock(raw, 40, &[0; 4])).ends(3, &[DAMAGED]),
        disk("an ext4 with unknown features", |raw| superblock(raw, 96, &u32::MAX.to_le_bytes()))
            .ends(3, &[]),
        disk("an ext4 with a wrong checksum", |raw| superblock(raw, 1020, &[1, 2, 3, 4])).ends(3, &[DAMAGED]),
        disk("an ext4 that has to replay a journal of zeros", |raw| {
            // The journal's first block is zeroed, and the superblock says that it needs recovery.
            sh(&format!(
                "debugfs -w -R 'zap_block -f <8> 0' {0}; debugfs -w -R 'feature needs_recovery' {0}",
                raw.display()
            ));
        })
        .ends(3, &[DAMAGED]),
        disk("an ext4 without a UUID", |raw| sh(&format!("tune2fs -U clear {} > /dev/null", raw.display())))
            .ends(0, &[]),
        debugfs("an ext4 whose root is a file", &["sif <2> mode 0100644"]).ends(3, &[DAMAGED]),
        debugfs("an ext4 whose root has no blocks", &["zap_block -f / 0"]).ends(3, &[]),
        debugfs("an ext4 whose /etc has no blocks", &["zap_block -f /etc 0"]).ends(3, &[]),
        debugfs(
            "an ext4 with group descriptors of noise",
            &["set_bg 0 block_bitmap 4294967295", "set_bg 0 checksum calc"],
        )
        .ends(3, &[DAMAGED]),
        disk("an xfs with a wrong magic number", |raw| xfs(raw, 0, b"XFSX")).ends(3, &["no ext4 or xfs"]),
        disk("an xfs with a wrong checksum", |raw| xfs(raw, 108, b"other")).ends(3, &[DAMAGED]),
        disk("an xfs with a block size of 2^200", |raw| xfs(raw, 4, &[0xff; 4])).ends(3, &[DAMAGED]),
        disk("two roots", |raw| {
            let copy = raw.with_extension("copy");
            sh(&format!("cp --sparse=always {} {}", raw.display(), copy.display()));
            sh(&format!("tune2fs -U random {} > /dev/null", copy.display()));
            gpt(raw, "start=102400, size=98304, type=L");
            copy_into(&copy, raw, 102400 * 512);
            fs::remove_file(copy).unwrap();
        })
        .ends(3, &["several partitions"]),
        disk("a disk that is encrypted", |raw| put(raw, 0, b"LUKS\xba\xbe\0\x02"))
            .ends(3, &["which oven cannot mount"]),
    ]
}

fn xfs(raw: &Path, offset: u64, bytes: &[u8]) {
    sh(&format!("rm {0}; truncate -s 320M {0}; mkfs.xfs -q {0}", raw.display()));
    put(raw, offset, bytes);
    partition(raw, 330, "label: gpt\nstart=2048, size=655360, type=L\n");
}

fn fstabs() -> Vec<Case> {
    vec![
        files("an fstab of 10,000 binds", |tree| {
            write(
                tree,
                "etc/fstab",
                (0..10_000).map(|n| format!("/srv /mnt/{n} none bind\n")).collect::<String>(),
            );
        })
        .ends(3, &["more than 64"]),
        files("an fstab of 10,000 disks", |tree| {
            write(
                tree,
                "etc/fstab",
                (0..10_000).map(|n| format!("UUID=x{n} /mnt/{n} ext4\n")).collect::<String>(),
            );
        })
        .ends(3, &["line 1 of the image's /etc/fstab", "no partition of the disk matches"]),
        files("an fstab of bytes", |tree| {
            write(
                tree,
                "etc/fstab",
                (0..=u16::MAX).flat_map(|n| [n as u8, (n >> 8) as u8]).collect::<Vec<_>>(),
            );
        })
        .ends(0, &[]),
        files("an fstab of 20 MiB", |tree| write(tree, "etc/fstab", vec![b'#'; 17 << 20]))
            .ends(3, &["larger than 1 MiB"]),
        files("an fstab whose binds double themselves", |tree| {
            write(tree, "etc/fstab", (0..40).map(|n| format!("/ /mnt/{n} none rbind\n")).collect::<String>());
        })
        .ends(3, &["too many mounts"]),
        files("an fstab that mounts above the root", |tree| {
            write(tree, "etc/fstab", "/srv /../../etc none bind\n");
        })
        .ends(3, &["contains `..`"]),
        files("an fstab that mounts through a link out of the image", |tree| {
            link(tree, "../../../../../../etc", "mnt");
            write(tree, "etc/fstab", "/srv /mnt/oven-was-here none bind\n");
        })
        .ends(0, &[]),
        files("an fstab that mounts on /proc", |tree| {
            write(tree, "etc/fstab", "/srv /proc none bind\n/srv /sys none bind\n/srv /dev none bind\n");
        })
        .ends(0, &[]),
        files("an fstab with a label of slashes and newlines", |tree| {
            write(tree, "etc/fstab", "LABEL=../../a\\012error:\\040forged /mnt ext4 defaults\n");
        })
        .ends(3, &["no partition of the disk matches"]),
        files("an fstab that mounts the root on itself", |tree| {
            link(tree, "/", "mnt");
            write(tree, "etc/fstab", "/srv /mnt none bind\n");
        })
        .ends(3, &["resolves to the root directory"]),
        files("an fstab that mounts below a file", |tree| {
            write(tree, "etc/fstab", "/srv /etc/passwd/x none bind\n");
        })
        .ends(3, &["/etc/passwd in the image is not a directory"]),
    ]
}

fn os_releases() -> Vec<Case> {
    const FILE: &str = "etc/os-release";
    vec![
        files("an os-release of 17 MiB", |tree| write(tree, FILE, vec![b'A'; 17 << 20]))
            .ends(3, &["larger than 64 KiB"]),
        files("an os-release of bytes", |tree| {
            write(tree, FILE, (0..4096).map(|n| n as u8).collect::<Vec<_>>())
        })
        .ends(3, &["no plugin supports"]),
        files("an os-release with escape codes", |tree| write(tree, FILE, "ID=\"\x1b[31mred\x1b[0m\"\n"))
            .ends(3, &["no plugin supports"]),
        files("no os-release", |tree| fs::remove_file(tree.join(FILE)).unwrap())
            .ends(3, &["neither /etc/os-release"]),
        files("an os-release that leads to itself", |tree| link(tree, "os-release", FILE))
            .ends(3, &["os-release"]),
        files("an os-release that leads to the memory of a process", |tree| {
            link(tree, "/proc/self/mem", FILE)
        })
        .ends(3, &["neither /etc/os-release"]),
        files("an os-release that is a FIFO", |tree| {
            sh(&format!("rm {0}; mkfifo {0}", tree.join(FILE).display()))
        })
        .ends(3, &["not a regular file but a FIFO"]),
        files("an os-release that is /dev/zero", |tree| {
            sh(&format!("rm {0}; mknod {0} c 1 5", tree.join(FILE).display()))
        })
        .ends(3, &["not a regular file but a device"]),
        debugfs("an os-release of 15 TiB", &["sif /etc/os-release size 16492674416640"])
            .ends(3, &["larger than 64 KiB"]),
    ]
}

/// Links and files in place of directories.
fn places() -> Vec<Case> {
    vec![
        files("/etc leads to /", |tree| {
            sh(&format!("cd {}; mv etc/* .; rmdir etc", tree.display()));
            symlink("/", tree.join("etc")).unwrap();
        })
        .ends(0, &[]),
        files("/etc leads above the root", |tree| {
            sh(&format!("cd {}; mv etc/* .; rmdir etc", tree.display()));
            symlink("../../../..", tree.join("etc")).unwrap();
        })
        .ends(0, &[]),
        files("/proc leads to /etc", |tree| link(tree, "/etc", "proc"))
            .ends(3, &["/proc is not a directory"]),
        files("/dev is a file", |tree| sh(&format!("cd {}; rmdir dev; touch dev", tree.display())))
            .ends(3, &["/dev is not a directory"]),
        files("/var/log leads to /etc", |tree| link(tree, "/etc", "var/log")).ends(5, &["/var/log"]),
        files("/tmp is a file", |tree| sh(&format!("cd {}; rmdir tmp; touch tmp", tree.display())))
            .ends(0, &[]),
        files("/bin/sh is missing", |tree| fs::remove_file(tree.join("bin/sh")).unwrap())
            .ends(3, &["no /bin/sh"]),
        files("/bin/sh is for another machine", |tree| {
            fs::remove_file(tree.join("bin/sh")).unwrap();
            let machine = if cfg!(target_arch = "x86_64") { 183u16 } else { 62 };
            let mut head = [0u8; 64];
            head[..6].copy_from_slice(b"\x7fELF\x02\x01");
            head[18..20].copy_from_slice(&machine.to_le_bytes());
            program(tree, "bin/sh", "");
            write(tree, "bin/sh", head);
        })
        .ends(3, &["but its programs are for"]),
        files("/bin/sh is a directory", |tree| sh(&format!("cd {}/bin; rm sh; mkdir sh", tree.display())))
            .ends(3, &["not a regular file but a directory"]),
        files("accounts of 100 MiB", |tree| hole(tree, "etc/passwd", 100 << 20))
            .ends(3, &["larger than 8 MiB"]),
        files("groups of 100 MiB", |tree| hole(tree, "etc/group", 100 << 20)).ends(3, &["larger than 8 MiB"]),
        files("accounts that are a FIFO", |tree| {
            sh(&format!("cd {}/etc; rm passwd; mkfifo passwd", tree.display()))
        })
        .ends(3, &["not a regular file but a FIFO"]),
    ]
}

fn odd_files() -> Vec<Case> {
    vec![
        files("names with newlines and escape codes", |tree| {
            for dir in ["tmp", "srv", "var/log", "etc"] {
                for name in ["x\nerror: forged", "\x1b[2J\x1b]0;title\x07", "\u{202e}gpj", "-rf", "*"] {
                    write(&tree.join(dir), name, "x");
                }
            }
        })
        .ends(0, &[]),
        files("names that are not text", |tree| {
            for dir in ["tmp", "srv", "var/lib"] {
                fs::write(tree.join(dir).join(OsStr::from_bytes(b"\xff\xfe\x80")), "x").unwrap();
            }
        })
        .ends(0, &[]),
        disk("100,000 entries in a directory", |raw| links(raw, "tmp", 100_000)).ends(0, &[]),
        disk("20,000 links to one log", |raw| links(raw, "var/log", 20_000)).ends(0, &[]),
        files("attributes of every kind", |tree| {
            for (path, name, value) in [
                (
                    "bin/busybox",
                    "security.capability",
                    &b"\x01\0\0\x02\xff\xff\xff\xff\0\0\0\0\xff\xff\xff\xff\0\0\0\0"[..],
                ),
                ("etc/passwd", "user.oven", &[b'x'; 500]),
                ("etc/group", "trusted.overlay.opaque", b"y"),
                ("srv", "trusted.overlay.redirect", b"/../../../etc"),
                ("var", "trusted.overlay.opaque", b"y"),
                ("etc", "security.selinux", b"\x1b[31m\n\0\xff"),
            ] {
                rustix::fs::lsetxattr(tree.join(path), name, value, XattrFlags::empty()).unwrap();
            }
        })
        .ends(0, &[]),
        files("files that cannot be changed", |tree| {
            write(tree, "etc/machine-id", "0123456789abcdef0123456789abcdef\n");
            write(tree, "var/log/syslog", "a log\n");
        })
        .ends(0, &[]),
        files("a machine id that is a FIFO", |tree| sh(&format!("mkfifo {}/etc/machine-id", tree.display())))
            .ends(0, &[]),
        files("a machine id that is a directory", |tree| {
            fs::create_dir(tree.join("etc/machine-id")).unwrap()
        })
        .ends(5, &["/etc/machine-id"]),
        files("a locale of 64 MiB", |tree| {
            hole(tree, "etc/locale.conf", 64 << 20);
            hole(tree, "etc/default/locale", 64 << 20);
        })
        .ends(0, &[]),
        files("SELinux with contexts of 64 MiB", |tree| {
            write(tree, "etc/selinux/config", "SELINUX=enforcing\nSELINUXTYPE=targeted\n");
            hole(tree, "etc/selinux/targeted/contexts/files/file_contexts", 64 << 20);
        })
        .ends(5, &["setfiles"]),
        files("a configuration of SELinux of 64 MiB", |tree| hole(tree, "etc/selinux/config", 64 << 20))
            .ends(5, &["/etc/selinux/config in the image is larger than 16 MiB"]),
    ]
}

/// Makes that many entries in a directory: links to a few files, because a file system of this size has few inodes.
fn links(raw: &Path, dir: &str, count: usize) {
    let perl = "for (0 .. $ARGV[0] - 1) { my $f = $_ - $_ % 20000; \
                if ($f == $_) { open(F, q(>), $_) and print F q(x) and close(F) or die } else { link($f, $_) or die } }";
    in_mount(raw, &format!("cd {dir}; perl -e '{perl}' {count}"));
}

fn package_managers() -> Vec<Case> {
    const APT: &str = "usr/bin/apt-get";
    vec![
        files("no package manager", |tree| fs::remove_file(tree.join(APT)).unwrap())
            .with(PACKAGE)
            .ends(3, &["the image has no /usr/bin/apt-get"]),
        files("a package that is half configured", |tree| {
            write(tree, PACKAGES, "busybox\t1\tamd64\thalf-configured\t\n");
        })
        .with(PACKAGE)
        .ends(3, &["packages of the base image are not installed correctly", "half-configured"]),
        files("a package that is half configured, and nothing to install", |tree| {
            write(tree, PACKAGES, "busybox\t1\tamd64\thalf-configured\t\n");
        })
        .with("")
        .ends(3, &["packages of the base image are not installed correctly"]),
        files("200,000 packages", |tree| write(tree, PACKAGES, "x\t1\tall\tinstalled\t\n".repeat(200_000)))
            .with(PACKAGE)
            .ends(3, &["more than 100000 packages"]),
        files("a damaged list of packages", |tree| {
            program(
                tree,
                "usr/bin/dpkg-query",
                "#!/bin/sh\necho 'parsing file status near line 1' >&2\nexit 2\n",
            );
        })
        .with(PACKAGE)
        .ends(3, &["parsing file status"]),
        files("dpkg-query is not a program", |tree| program(tree, "usr/bin/dpkg-query", "\0\0\0\0"))
            .with(PACKAGE)
            .ends(3, &["dpkg-query"]),
        files("apt-get fails", |tree| program(tree, APT, "#!/bin/sh\necho no >&2\nexit 100\n"))
            .with(PACKAGE)
            .ends(5, &["no"]),
        files("apt-get prints a line without end", |tree| {
            program(tree, APT, "#!/bin/sh\ncat /dev/zero\n");
        })
        .with(RUN_APT)
        .ends(5, &["longer than 2 s"]),
        files("apt-get prints much", |tree| {
            let (mib, line) = (if full() { 2048 } else { 64 }, "x".repeat(999));
            program(tree, APT, &format!("#!/bin/sh\nyes {line} | head -c {mib}m\nexit 3\n"));
        })
        .with("[[run]]\ncommand = [\"/usr/bin/apt-get\"]")
        .ends(5, &["exit status 3"]),
        files("apt-get starts many processes", |tree| {
            program(tree, APT, "#!/bin/sh\nn=0\nwhile [ $((n+=1)) -lt 500 ]; do sleep 1000 & done\nexit 4\n");
        })
        .with("[[run]]\ncommand = [\"/usr/bin/apt-get\"]")
        .ends(5, &["exit status 4"]),
        files("apt-get ignores SIGTERM", |tree| {
            program(tree, APT, "#!/bin/sh\ntrap '' TERM INT HUP\nwhile :; do sleep 1; done\n");
        })
        .with(RUN_APT)
        .ends(5, &["longer than 2 s"]),
        files("apt-get closes its output", |tree| {
            program(tree, APT, "#!/bin/sh\nexec < /dev/null > /dev/null 2>&1\nsleep 1000\n");
        })
        .with(RUN_APT)
        .ends(5, &["longer than 2 s"]),
        files("apt-get kills everything", |tree| {
            program(tree, APT, "#!/bin/sh\nkill -9 -1\nkill -9 1\nsleep 1000\n")
        })
        .with(RUN_APT)
        .ends(5, &[]),
        files("apt-get makes a program setuid", |tree| {
            program(tree, APT, "#!/bin/sh\nchmod 6755 /bin/busybox\n")
        })
        .ends(0, &[]),
        files("apt-get fills the disk", |tree| {
            program(tree, APT, "#!/bin/sh\nexec dd if=/dev/zero of=/srv/full bs=1M\n");
        })
        .with("[[run]]\ncommand = [\"/usr/bin/apt-get\"]")
        .ends(5, &["size_gib"]),
    ]
}

fn boots() -> Vec<Case> {
    vec![
        files("a grub.cfg of 64 MiB", |tree| hole(tree, "boot/grub/grub.cfg", 64 << 20))
            .ends(3, &["larger than 1 MiB"]),
        files("a grub.cfg that leads to itself", |tree| {
            fs::create_dir_all(tree.join("boot/grub")).unwrap();
            symlink("grub.cfg", tree.join("boot/grub/grub.cfg")).unwrap();
        })
        .ends(0, &[]),
        files("2,000 entries of a boot loader", |tree| {
            (0..2000).for_each(|n| {
                write(tree, &format!("boot/loader/entries/{n}.conf"), "linux /vmlinuz root=/dev/sda1\n")
            });
        })
        .ends(3, &["more than 1000"]),
        files("an initramfs that is cut off", |tree| {
            write(tree, "boot/vmlinuz-6.1.0", "kernel");
            write(tree, "boot/initrd.img-6.1.0", "070701000000");
        })
        .with(TOUCH_KERNEL)
        .ends(5, &["would not boot"]),
        files("an initramfs of noise", |tree| {
            write(tree, "boot/vmlinuz-6.1.0", "kernel");
            write(tree, "boot/initrd.img-6.1.0", vec![0x55; 1 << 20]);
        })
        .with(TOUCH_KERNEL)
        .ends(5, &["would not boot"]),
        files("a kernel without an initramfs", |tree| write(tree, "boot/vmlinuz-6.1.0", "kernel"))
            .ends(0, &[]),
        files("a new kernel without an initramfs", |tree| {
            write(tree, "boot/vmlinuz-6.1.0", "kernel");
            write(tree, "boot/initrd.img-6.1.0", "070701000000");
        })
        .with("[[run]]\ncommand = [\"touch\", \"/boot/vmlinuz-6.9.0\"]")
        .ends(5, &["this kernel has no initramfs"]),
    ]
}

/// What has to be bounded in memory and time.
pub fn bounds() -> Vec<Case> {
    vec![
        files("64 sparse entries of a boot loader", |tree| {
            (0..64).for_each(|n| hole(tree, &format!("boot/loader/entries/{n}.conf"), (16 << 20) - 1));
        })
        .ends(3, &["larger than 1 MiB"]),
        debugfs("an initramfs of 15 TiB", &[
            "cd boot",
            "write /etc/hostname vmlinuz-6.1.0",
            "write /etc/hostname initrd.img-6.1.0",
            "sif initrd.img-6.1.0 size 16492674416640",
        ])
        .with(TOUCH_KERNEL)
        .ends(5, &["would not boot"]),
        files("an initramfs of 4 GiB of zeros in gzip", |tree| {
            write(tree, "boot/vmlinuz-6.1.0", "kernel");
            let initrd = tree.join("boot/initrd.img-6.1.0");
            sh(&format!("head -c 1G /dev/zero | gzip -1 > {0}.1; for n in 1 2 3 4; do cat {0}.1; done > {0}; rm {0}.1", initrd.display()));
        })
        .with(TOUCH_KERNEL)
        .ends(5, &["would not boot"]),
        debugfs("a file of 15 TiB, and a secret", &["cd srv", "write /etc/hostname x", "sif x size 16492674416640"])
            .with("[[run]]\ncommand = [\"true\"]\nsecrets = [\"TABLE_SECRET\"]")
                .ends(0, &[]),
        debugfs("3,000 directories in each other", &DEEP).ends(0, &[]),
    ]
}

/// The requests are `mkdir d` and `cd d` in turn.
static DEEP: [&str; 6001] = {
    let mut requests = ["cd tmp"; 6001];
    let mut n = 1;
    while n < requests.len() {
        requests[n] = if n % 2 == 1 { "mkdir d" } else { "cd d" };
        n += 1;
    }
    requests
};

//! Packages that reach for the host.

use super::lab::{Deb, HostileLab};
use std::os::unix::fs::MetadataExt;

/// A system call, in perl, which wants its strings in variables.
fn call(number: libc::c_long, arguments: &str) -> String {
    format!("syscall({number}, map {{ my $copy = $_ }} ({arguments})) != -1")
}

fn write_to(path: &str) -> String {
    format!("open($f, '+<', '{path}')")
}

/// The host's root disk, or whatever has a number.
fn host_disk() -> u64 {
    std::fs::metadata("/").unwrap().dev()
}

/// Name, and an expression that is true if it succeeded. None of them harms a host where it does.
fn attempts(lab: &HostileLab) -> Vec<(&'static str, String)> {
    let canary = lab.canary().display().to_string();
    let bind_remount = libc::MS_REMOUNT | libc::MS_BIND;
    let (newuser, newns) = (libc::CLONE_NEWUSER, libc::CLONE_NEWNS);
    let disk = host_disk();
    let ns = "open($ns, '<', '/proc/1/ns/mnt') && ";
    let disk_node = "($d) = grep { -b } glob('/dev/*'); open($f, '+<', $d) && ";
    vec![
        // covers
        ("umount of /proc/sys", call(libc::SYS_umount2, "'/proc/sys', 0")),
        ("lazy umount of /proc", call(libc::SYS_umount2, "'/proc', 2")),
        ("umount of /sys/firmware", call(libc::SYS_umount2, "'/sys/firmware', 0")),
        ("a mount over /proc/sys", call(libc::SYS_mount, "'x', '/proc/sys', 'tmpfs', 0, 0")),
        ("another /proc", call(libc::SYS_mount, "'x', '/mnt', 'proc', 0, 0")),
        ("another /sys", call(libc::SYS_mount, "'x', '/mnt', 'sysfs', 0, 0")),
        ("a bind of /", call(libc::SYS_mount, "'/', '/mnt', 0, 4096, 0")),
        ("a writable /proc/sys", call(libc::SYS_mount, &format!("0, '/proc/sys', 0, {bind_remount}, 0"))),
        ("a writable /sys", call(libc::SYS_mount, &format!("0, '/sys', 0, {}, 0", libc::MS_REMOUNT))),
        ("fsopen", call(libc::SYS_fsopen, "'proc', 0")),
        ("open_tree", call(libc::SYS_open_tree, "-100, '/', 1")),
        ("mount_setattr", call(libc::SYS_mount_setattr, "-100, '/', 0, pack('Q4', 0, 1, 0, 0), 32")),
        ("pivot_root", call(libc::SYS_pivot_root, "'/mnt', '/mnt'")),
        // namespaces
        ("a user namespace", call(libc::SYS_unshare, &newuser.to_string())),
        ("a user and mount namespace", call(libc::SYS_unshare, &(newuser | newns).to_string())),
        ("a mount namespace", call(libc::SYS_unshare, &newns.to_string())),
        (
            "a child in a user namespace",
            format!(
                "do {{ my $c = syscall({}, {}, 0, 0, 0, 0); POSIX::_exit(0) if $c == 0; $c != -1 }}",
                libc::SYS_clone,
                newuser | libc::SIGCHLD
            ),
        ),
        ("clone3", call(libc::SYS_clone3, "pack('Q11', 0), 88")),
        ("unshare -U", "system('unshare -Ur true 2> /dev/null') == 0".into()),
        ("the first process's mounts", ns.to_owned() + &call(libc::SYS_setns, "fileno($ns), 0")),
        // the host's disk and memory
        ("mknod of the host's disk", call(libc::SYS_mknodat, &format!("-100, '/opt/disk', {}, {disk}", 0o60600))),
        ("mknod of /dev/mem", call(libc::SYS_mknodat, &format!("-100, '/dev/mem', {}, 0x101", 0o20600))),
        ("mknod -m 600 b", format!("system('mknod /opt/disk b {} {} 2> /dev/null') == 0", disk >> 8 & 0xfff, disk & 0xff)),
        ("/dev/mem", write_to("/dev/mem")),
        ("/dev/loop-control", write_to("/dev/loop-control")),
        ("/dev/kmsg", write_to("/dev/kmsg")),
        ("/proc/kcore", "open($f, '<', '/proc/kcore') && sysread($f, $x, 1)".into()),
        ("a loop device's flags", format!("{disk_node} ioctl($f, 0x4C04, $s = \"\\0\" x 232)")),
        ("the end of the loop device", format!("{disk_node} ioctl($f, 0x4C01, 0)")),
        ("another file for the loop device", format!("{disk_node} open($g, '<', '/etc/passwd') && ioctl($f, 0x4C06, fileno($g))")),
        ("a partition of the disk", format!("{disk_node} ioctl($f, 0x1269, $s = \"\\0\" x 24)")),
        // the kernel
        ("core_pattern", write_to("/proc/sys/kernel/core_pattern")),
        ("modprobe", write_to("/proc/sys/kernel/modprobe")),
        ("sysrq", "open($f, '>', '/proc/sysrq-trigger')".into()),
        ("/sys/kernel", "grep { open($f, '+<', $_) } glob('/sys/kernel/* /sys/kernel/mm/*/* /sys/power/*')".into()),
        ("/sys/block", "grep { open($f, '+<', $_) } glob('/sys/block/*/queue/* /sys/block/*/uevent')".into()),
        ("/proc/irq", "grep { open($f, '+<', $_) } glob('/proc/irq/*/smp_affinity /proc/irq/default*')".into()),
        ("a control group", "grep { mkdir \"$_/oven\" } '/sys/fs/cgroup', glob('/sys/fs/cgroup/*')".into()),
        ("bpf", call(libc::SYS_bpf, "0, pack('L4', 1, 4, 4, 1), 16")),
        ("keyctl", call(libc::SYS_keyctl, "0, -3, 1")),
        ("audit", call(libc::SYS_socket, "16, 3, 9")),
        ("kernel events", call(libc::SYS_socket, "16, 3, 15")),
        ("generic netlink", call(libc::SYS_socket, "16, 3, 16")),
        ("SCTP", call(libc::SYS_socket, "2, 1, 132")),
        ("MPTCP", call(libc::SYS_socket, "2, 1, 262")),
        ("a socket to the hypervisor", call(libc::SYS_socket, "40, 1, 0")),
        ("a bridge", "socket($f, 2, 2, 0) && ioctl($f, 0x8940, $s = \"\\0\" x 64)".into()),
        ("a thaw of the root", "open($f, '<', '/') && ioctl($f, 0xc0045878, 0)".into()),
        ("a lower score", "open($f, '>', '/proc/self/oom_adj') && syswrite($f, '-17')".into()),
        ("AIO contexts", call(libc::SYS_io_setup, "65536, \"\\0\" x 8")),
        ("io_uring", call(libc::SYS_io_uring_setup, "1, \"\\0\" x 120")),
        ("the host's name", call(libc::SYS_sethostname, "'owned', 5")),
        ("dmesg", call(libc::SYS_syslog, "3, \"\\0\" x 99, 99")),
        // other processes, and what they see
        ("the reaper's root", format!("-e '/proc/1/root{canary}'")),
        ("the reaper's descriptors", "grep { defined readlink } glob('/proc/1/fd/*')".into()),
        ("the reaper's memory", write_to("/proc/1/mem")),
        ("the reaper's program", write_to("/proc/1/exe")),
        ("ptrace", call(libc::SYS_ptrace, "16, 1, 0, 0")),
        ("a process outside", "grep { /^\\d+$/ && -e \"/proc/$_/root/var/lib/oven\" } map { s,.*/,,r } glob('/proc/*')".into()),
        ("the host's files", format!("-e '{canary}'")),
        (
            "the host's files, by a second chroot",
            format!(
                "do {{ mkdir '/mnt/x'; my $p = fork; if (!$p) {{ opendir($d, '/'); chroot '/mnt/x'; \
                 chdir $d; chdir '..' for 1..64; chroot '.'; POSIX::_exit(-e '{canary}' ? 0 : 1) }} \
                 waitpid($p, 0); $? == 0 }}"
            ),
        ),
        ("a descriptor that was left open", "grep { m,/fd/\\d+$, && (readlink($_) // '') =~ m,^/(?!dev/null$|results$|usr/|var/lib/dpkg/), } glob('/proc/self/fd/*')".into()),
    ]
}

/// What a package may do: without these a refusal would prove nothing.
fn allowed() -> Vec<(&'static str, String)> {
    vec![
        ("a directory", "mkdir '/opt/made'".into()),
        ("a fifo", call(libc::SYS_mknodat, &format!("-100, '/opt/fifo', {}, 0", 0o10600))),
        ("an owner", "chown 33, 33, '/opt/made'".into()),
        ("another user", "do { my $p = fork; if (!$p) { $> = 33; POSIX::_exit($> == 33 ? 0 : 1) } waitpid($p, 0); $? == 0 }".into()),
        ("a chroot", "do { my $p = fork; if (!$p) { POSIX::_exit(chroot('/opt') ? 0 : 1) } waitpid($p, 0); $? == 0 }".into()),
        ("its own disk", "($d) = grep { -b } glob('/dev/*'); open($f, '<', $d) && sysread($f, $x, 512)".into()),
        ("/proc/cpuinfo", "open($f, '<', '/proc/cpuinfo') && sysread($f, $x, 1)".into()),
        ("an address list", call(libc::SYS_socket, "16, 3, 0")),
        ("UDP", call(libc::SYS_socket, "10, 2, 17")),
        ("/sys/class", "opendir($f, '/sys/class')".into()),
    ]
}

#[test]
fn whatever_reaches_for_the_host_is_refused() {
    let lab = HostileLab::new();
    let (attempts, allowed) = (attempts(&lab), allowed());
    let mut script = "#!/usr/bin/perl\nuse POSIX ();\nopen(R, '>', '/results') or die;\n".to_owned();
    for (name, code) in attempts.iter().chain(&allowed) {
        // Each in a process of its own, so that one that succeeds helps no other.
        script += &format!(
            "if (!(my $pid = fork)) {{ $! = 0; my $ok = eval {{ {code} }}; my $e = $! + 0; \
             syswrite(R, \"{name}: \" . ($@ ? \"error $@\" : $ok ? 'done' : \"refused $e\") . \"\\n\"); \
             POSIX::_exit(0) }} else {{ waitpid($pid, 0) }}\n"
        );
    }
    // Process 1 of a namespace takes no signal from inside that it does not handle.
    script += "kill 'KILL', 1;\nexit 0;\n";
    let docs =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/explain/security.md")).unwrap();
    assert!(
        docs.contains(&format!(" {} attempts", attempts.len())),
        "{} attempts, unlike the page",
        attempts.len()
    );
    lab.define(&[Deb::new("hostile").script("postinst", &script)], "");
    let (disk, baked) = lab.image();
    let results = disk.read("/results").expect(&baked.err);
    let line = |name: &str| results.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "));
    for (name, _) in &attempts {
        let line = line(name).unwrap_or_else(|| panic!("{name}\n{results}"));
        assert!(line.starts_with("refused "), "{name}: {line}\n{results}");
    }
    for (name, _) in &allowed {
        assert_eq!(line(name), Some("done"), "{name}\n{results}");
    }
    assert_eq!(disk.kind("/opt/disk"), None);
    assert_eq!(disk.kind("/opt/fifo").as_deref(), Some("FIFO"));
}

#[test]
fn a_package_that_kills_everything_kills_itself() {
    let lab = HostileLab::new();
    lab.define(&[Deb::sh("perl -e 'kill 9, -1'; kill -9 -1; sleep 100")], "");
    lab.fails(5, &["installing 1 package", "SIGKILL"]);
}

/// A step may write to its own disk only if the definition says so, for boot loaders. What it destroys is no image.
#[test]
fn a_package_that_writes_over_its_own_disk_makes_no_image() {
    let lab = HostileLab::new();
    for (what, words) in [
        // ext4 reads its superblock only at the mount, so its loss is noticed at the end.
        ("dd if=/dev/zero of=$(ls /dev/loop*p1) bs=4096 count=64 conv=notrunc", &[][..]),
        ("dd if=/dev/urandom of=$(ls /dev/loop*p1) bs=4096 seek=1 count=4000 conv=notrunc", &[]),
        (
            "dd if=/dev/zero of=$(ls /dev/loop* | head -n 1) bs=512 count=64 conv=notrunc",
            &["partition table"],
        ),
        (
            "d=$(ls /dev/loop* | head -n 1); dd if=/dev/zero of=$d bs=512 count=64 conv=notrunc; \
             dd if=/dev/zero of=$d bs=512 seek=$((2097152 - 64)) count=64 conv=notrunc",
            &["partition table"],
        ),
    ] {
        lab.define(&[Deb::sh(&format!("{what}; exit 0"))], "[disk]\nwritable = true");
        let baked = lab.fails(5, words);
        assert!(baked.err.contains("the script that writes to the block device"), "{what}\n{}", baked.err);
    }
}

#[test]
fn a_package_cannot_write_over_its_own_disk() {
    let lab = HostileLab::new();
    let script = "for d in /dev/loop*; do dd if=/dev/urandom of=$d bs=4096 seek=1 count=4000 conv=notrunc && exit 9; \
                  dd if=$d of=/dev/null bs=4096 count=1 || exit 8; done; exit 0";
    lab.define(&[Deb::sh(script)], "");
    let (disk, _) = lab.image();
    assert_eq!(disk.audit(), "");
}

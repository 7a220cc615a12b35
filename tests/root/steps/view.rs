//! What a step sees: a clean machine, the network or none, a resolv.conf, the disk's nodes, and what is mounted below
//! the root.

use super::{MINUTE, output, shim, try_run};
use oven::device::DeviceNode;
use oven::error::Kind;
use oven::sys::namespaces;
use oven_testing::BusyboxImage;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use sys_mount::Mount;

#[test]
fn a_step_sees_a_clean_machine() {
    let image = BusyboxImage::new();
    let before = image.listing();
    let seen = output(&image.shell(
        "id -u; hostname; cd /dev && echo $(ls); echo $(ls /run) $(ls /dev/pts); readlink /proc/self/fd/0; \
         echo $$ $(ls /proc | grep -c '^[0-9]') 2>/dev/null; umask; pwd",
    ));
    assert_eq!(seen[0], "0");
    assert_eq!(seen[1], "localhost");
    assert_eq!(seen[2], "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero");
    assert_eq!(seen[3], "lock ptmx");
    assert_eq!(seen[4], "/dev/null");
    assert_eq!(&seen[seen.len() - 2..], ["0022", "/dev"]);
    let environment = output(&image.spec(&["env"]));
    let mut names: Vec<_> = environment.iter().filter_map(|line| line.split('=').next()).collect();
    names.sort_unstable();
    assert_eq!(names, ["HOME", "LANG", "PATH", "SYSTEMD_OFFLINE", "TERM", "container"]);
    assert_eq!(image.listing(), before);
}

#[test]
fn the_environment_and_directory_are_the_specs() {
    let image = BusyboxImage::new();
    let mut spec = image.shell("echo $GREETING $TERM; pwd");
    spec.env = BTreeMap::from([("GREETING".into(), "a b".into()), ("TERM".into(), "vt100".into())]);
    spec.cwd = "/var/log".into();
    assert_eq!(output(&spec), ["a b vt100", "/var/log"]);
    spec.cwd = "/nowhere".into();
    let error = try_run(&spec, MINUTE).unwrap_err();
    assert!(format!("{error:#}").contains("entering the step's directory /nowhere"), "{error:#}");
    assert_eq!(Kind::of(&error), Kind::Step);
}

#[test]
fn without_the_network_there_is_lo_alone() {
    let image = BusyboxImage::new();
    fs::write(image.path("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
    let names = "ls /sys/class/net; ifconfig lo | head -n 3; cat /etc/resolv.conf; cat /proc/net/dev";
    let seen = output(&image.shell(names));
    assert_eq!(seen[0], "lo");
    assert!(seen.iter().any(|line| line.contains("127.0.0.1")), "{seen:?}");
    assert!(seen.contains(&"nameserver 192.0.2.1".to_owned()));
    // With it: the host's.
    let mut spec = image.shell("cat /proc/net/dev");
    spec.network = true;
    let hosts = fs::read_to_string("/proc/net/dev").unwrap().lines().count();
    assert_eq!(output(&spec).len(), hosts);
    // And without it, the file may be replaced, as systemd-resolved does.
    output(
        &image.shell("rm /etc/resolv.conf && ln -s ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf"),
    );
    assert!(image.path("etc/resolv.conf").is_symlink());
}

#[test]
fn resolv_conf_is_bound_and_never_written() {
    type Prepare = fn(&BusyboxImage);
    let corpus: [(&str, Prepare); 12] = [
        ("file", |image| fs::write(image.path("etc/resolv.conf"), "image's\n").unwrap()),
        ("missing", |_| ()),
        ("missing directory", |image| fs::remove_dir(image.path("etc")).unwrap()),
        ("empty", |image| fs::write(image.path("etc/resolv.conf"), "").unwrap()),
        ("relative link", |image| {
            fs::write(image.path("var/resolv"), "image's\n").unwrap();
            symlink("../var/resolv", image.path("etc/resolv.conf")).unwrap();
        }),
        ("absolute link", |image| {
            fs::write(image.path("var/resolv"), "image's\n").unwrap();
            symlink("/var/resolv", image.path("etc/resolv.conf")).unwrap();
        }),
        ("into /run", |image| {
            symlink("../run/systemd/resolve/stub-resolv.conf", image.path("etc/resolv.conf")).unwrap()
        }),
        ("into /var/run", |image| {
            symlink("/run", image.path("var/run")).unwrap();
            symlink("/var/run/resolvconf/resolv.conf", image.path("etc/resolv.conf")).unwrap();
        }),
        ("dangling", |image| symlink("/nowhere/at/all", image.path("etc/resolv.conf")).unwrap()),
        ("climbing", |image| {
            symlink("../../../../../../../../etc/passwd", image.path("etc/resolv.conf")).unwrap();
        }),
        ("loop", |image| symlink("resolv.conf", image.path("etc/resolv.conf")).unwrap()),
        ("to /dev/null", |image| symlink("/dev/null", image.path("etc/resolv.conf")).unwrap()),
    ];
    let host = fs::read("/etc/resolv.conf").unwrap();
    let passwd = fs::read("/etc/passwd").unwrap();
    for (case, prepare) in corpus {
        let image = BusyboxImage::new();
        prepare(&image);
        let before = image.listing();
        let mut spec =
            image.shell("cat /etc/resolv.conf; (echo bad > /etc/resolv.conf) 2>/dev/null; : > /dev/null");
        spec.network = true;
        spec.resolv_conf = Some("nameserver 192.0.2.7\n".into());
        let seen = output(&spec);
        assert_eq!(seen, ["nameserver 192.0.2.7"], "{case}");
        assert_eq!(image.listing(), before, "{case}");
    }
    assert_eq!(fs::read("/etc/resolv.conf").unwrap(), host);
    assert_eq!(fs::read("/etc/passwd").unwrap(), passwd);

    let image = BusyboxImage::new();
    fs::create_dir(image.path("etc/resolv.conf")).unwrap();
    let before = image.listing();
    let mut spec = image.spec(&["true"]);
    spec.network = true;
    let error = try_run(&spec, MINUTE).unwrap_err();
    assert!(format!("{error:#}").contains("/etc/resolv.conf is a directory"), "{error:#}");
    assert_eq!(image.listing(), before);
}

#[test]
fn a_disks_nodes_are_the_images_own() {
    let image = BusyboxImage::new();
    let mut spec = image.shell("stat -c '%F %a %g %t,%T' /dev/loop7p1; readlink /dev/disk/by-uuid/1-2; ls /dev/disk/by-uuid /dev/disk/by-label/");
    spec.nodes = vec![
        DeviceNode { name: "loop7".into(), rdev: rustix::fs::makedev(7, 112), links: vec![] },
        DeviceNode {
            name: "loop7p1".into(),
            rdev: rustix::fs::makedev(259, 3),
            links: vec!["disk/by-uuid/1-2".into(), "disk/by-label/a b".into()],
        },
    ];
    let seen = output(&spec);
    assert_eq!(seen[..2], ["block special file 440 6 103,3", "../../loop7p1"]);
    assert!(seen.contains(&"a b".to_owned()), "{seen:?}");
    spec.nodes[1].links = vec!["../../etc/passwd".into()];
    let error = format!("{:#}", try_run(&spec, MINUTE).unwrap_err());
    assert!(error.contains("is not a name below /dev"), "{error}");
    assert_eq!(fs::read_dir(image.path("dev")).unwrap().count(), 0);
}

#[test]
fn what_a_throwaway_step_writes_vanishes() {
    let image = BusyboxImage::new();
    fs::remove_dir(image.path("sys")).unwrap();
    fs::write(image.path("etc/kept"), "before").unwrap();
    let before = image.listing();
    let mut spec = image.shell(
        "echo after > /etc/kept; rm -rf /var; mkdir /new; cat /etc/kept; /usr/sbin/policy-rc.d; echo $?",
    );
    spec.throwaway = true;
    spec.network = true;
    spec.resolv_conf = Some("x".into());
    spec.shims = vec![shim("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)];
    assert_eq!(output(&spec), ["after", "101"]);
    assert_eq!(image.listing(), before);
}

#[test]
fn mounts_below_the_root_come_along() {
    let image = BusyboxImage::new();
    fs::create_dir(image.path("boot")).unwrap();
    let boot = tempfile::tempdir().unwrap();
    // The thread's own mounts: gone with it.
    std::thread::scope(|scope| {
        let test = scope.spawn(|| {
            namespaces::private_mounts().unwrap();
            Mount::builder().fstype("tmpfs").mount("x", image.path("boot")).unwrap();
            fs::write(image.path("boot/vmlinuz"), "kernel").unwrap();
            assert_eq!(output(&image.shell("cat /boot/vmlinuz; touch /boot/new")), ["kernel"]);
            assert!(image.path("boot/new").exists());
            let mut spec = image.shell("cat /boot/vmlinuz; rm /boot/vmlinuz /boot/new; ls /boot");
            spec.throwaway = true;
            assert_eq!(output(&spec), ["kernel"]);
            assert!(image.path("boot/new").exists() && image.path("boot/vmlinuz").exists());
        });
        test.join().unwrap();
    });
    assert_eq!(fs::read_dir(image.path("boot")).unwrap().count(), 0);
    drop(boot);
}

#[test]
fn a_root_that_is_not_one_is_refused_by_name() {
    let image = BusyboxImage::new();
    fs::remove_dir(image.path("proc")).unwrap();
    symlink("/etc", image.path("proc")).unwrap();
    let error = try_run(&image.spec(&["true"]), MINUTE).unwrap_err();
    assert!(format!("{error:#}").contains("/proc is not a directory"), "{error:#}");
    assert_eq!(Kind::of(&error), Kind::Step);
    fs::remove_file(image.path("proc")).unwrap();
    // A missing one is made, and goes again.
    let before = image.listing();
    output(&image.spec(&["true"]));
    assert_eq!(image.listing(), before);
}

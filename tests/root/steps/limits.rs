//! How much of this machine's memory a step can take, without a control group.

use super::{output, run};
use oven::sandbox::spec::{CacheMount, ExitStatus};
use oven::sys::namespaces;
use oven_testing::BusyboxImage;
use oven_testing::busybox_image::spec_in;
use std::path::Path;
use std::process::Command;
use sys_mount::Mount;

/// Whether this machine's root has `CAP_SYS_RESOURCE` (24). Without it, the kernel takes no minimum for a score.
pub fn may_set_a_minimum() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(capabilities.trim(), 16).unwrap() & 1 << 24 != 0
}

#[test]
fn a_step_is_killed_first_and_cannot_change_that() {
    let image = BusyboxImage::new();
    assert_eq!(output(&image.shell("cat /proc/self/oom_score_adj /proc/1/oom_score_adj")), ["800", "800"]);
    if !may_set_a_minimum() {
        return;
    }
    let lower = "for file in oom_score_adj oom_adj; do for value in 0 -17 799; do\n\
        (echo $value > /proc/self/$file) 2> /dev/null && echo \"$value in $file\"\ndone; done\n\
        echo 900 > /proc/$$/oom_score_adj; cat /proc/$$/oom_score_adj\n\
        (echo 0 > /proc/$$/oom_score_adj) 2> /dev/null; cat /proc/$$/oom_score_adj";
    for network in [false, true] {
        let mut spec = image.shell(lower);
        spec.network = network;
        assert_eq!(output(&spec), ["900", "900"], "with the network: {network}");
    }
}

#[test]
fn file_systems_in_memory_have_limits() {
    let image = BusyboxImage::new();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let memory = memory.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
    let mut spec = image.shell("for at in /run /dev/shm / /dev; do stat -f -c '%s %b %c' $at; done");
    spec.throwaway = true;
    let limits: Vec<_> = output(&spec)
        .iter()
        .map(|line| line.split(' ').map(|number| number.parse::<u64>().unwrap()).collect::<Vec<_>>())
        .map(|numbers| (numbers[0] * numbers[1], numbers[2]))
        .collect();
    assert!(limits.iter().all(|(bytes, files)| *bytes > 0 && *files > 0), "{limits:?}");
    assert!(limits.iter().all(|(_, files)| *files <= 262_144), "{limits:?}");
    let page = 64 << 10; // the largest one; limits are rounded up
    assert!(limits[..2].iter().all(|(bytes, _)| *bytes <= memory / 8 + page), "{limits:?} of {memory}");
    assert!(limits[2].0 <= (memory / 4).max(512 << 20) + page, "{limits:?} of {memory}");
    assert_eq!(limits[3], (4 << 20, 4096));
}

#[test]
fn a_full_file_system_in_memory_is_named() {
    let image = BusyboxImage::new();
    let bytes = |at: &str| format!("! dd if=/dev/zero of={at}/x bs=64k 2> /dev/null");
    let files = |at: &str| format!("i=0; while true > {at}/$i; do i=$((i + 1)); done 2> /dev/null; exit 3");
    for (script, name) in [
        (bytes("/dev"), "/dev, "),
        (files("/dev"), "/dev, "),
        (files("/run"), "/run, "),
        (files("/root"), "the memory for writes that are discarded, "),
    ] {
        let mut spec = image.shell(&script);
        spec.throwaway = true;
        let (exit, lines) = run(&spec);
        assert!(matches!(exit.status, ExitStatus::Exited(0 | 1 | 3)), "{script}: {exit:?} {lines:?}");
        assert_eq!(exit.full_file_systems.len(), 1, "{script}: {exit:?}");
        assert!(exit.full_file_systems[0].message.starts_with(name), "{script}: {exit:?}");
    }
    assert!(run(&image.shell("true")).0.full_file_systems.is_empty());
}

/// An install can read the package cache. What it writes there is in memory until it ends.
#[test]
fn a_full_cache_whose_writes_are_discarded_is_named() {
    let (image, dir) = (BusyboxImage::new(), tempfile::tempdir().unwrap());
    let [upper, work] = ["upper", "work"].map(|name| dir.path().join(name));
    for path in [&upper, &work, &image.path("var/cache")] {
        std::fs::create_dir_all(path).unwrap();
    }
    let fill = "cd /var/cache; i=0; while true > $i; do i=$((i + 1)); done 2> /dev/null; exit 3";
    let target = "/var/cache".to_owned();
    let mut spec = image.shell(fill);
    spec.caches = vec![CacheMount { target, lower: None, upper: upper.clone(), work, writable: false }];
    let (exit, lines) = run(&spec);
    assert!(matches!(exit.status, ExitStatus::Exited(1 | 3)), "{exit:?} {lines:?}");
    let [full] = &exit.full_file_systems[..] else { panic!("{exit:?}") };
    let full = &full.message;
    assert!(full.starts_with("the memory for writes that are discarded, which may have "), "{full}");
    assert!(full.ends_with(" (writes to /var/cache)"), "{full}");
    assert_eq!(std::fs::read_dir(&upper).unwrap().count(), 0);
}

#[test]
fn shared_memory_of_system_v_has_the_limit_of_dev_shm() {
    let image = BusyboxImage::new();
    let hosts = || {
        ["shmall", "msgmni", "sem"]
            .map(|name| std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap())
    };
    let before = hosts();
    let seen = output(&image.shell(
        "cat /proc/sys/kernel/shmall /proc/sys/kernel/msgmni /proc/sys/kernel/sem; stat -f -c '%b' /dev/shm",
    ));
    assert_eq!(seen[0], seen[3], "in pages");
    assert_eq!(seen[1..3], ["1024", "32000\t262144\t500\t1024"]);
    assert_eq!(hosts(), before, "the host's limits stay");
}

/// What a test writes is in memory, but each file system of the image looks as full as it is.
#[test]
fn a_test_has_as_much_space_as_the_file_systems_of_the_image() {
    let image = BusyboxImage::new();
    let place = tempfile::tempdir().unwrap();
    // The thread's own mounts: gone with it.
    let test = || {
        namespaces::private_mounts().unwrap();
        let mount =
            |options: &str, at: &Path| Mount::builder().fstype("tmpfs").data(options).mount("x", at).unwrap();
        let _root = mount("size=24m,nr_inodes=2000", place.path());
        let source = format!("{}/.", image.root().display());
        assert!(Command::new("cp").arg("-a").arg(source).arg(place.path()).status().unwrap().success());
        std::fs::create_dir(place.path().join("boot")).unwrap();
        let _boot = mount("size=3m,nr_inodes=300", &place.path().join("boot"));
        let step = |script: &str| {
            let mut spec = spec_in(place.path(), &["sh", "-c", script]);
            spec.throwaway = true;
            run(&spec)
        };
        let (_, lines) = step("for at in / /boot; do stat -f -c '%s %a %d' $at; done");
        for (line, path) in lines.iter().zip(["", "boot"]) {
            let numbers: Vec<u64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
            let (bytes, files) = (numbers[0] * numbers[1], numbers[2]);
            let space = rustix::fs::statvfs(place.path().join(path)).unwrap();
            let free = space.f_bavail * space.f_frsize;
            assert!((free..free + (256 << 10)).contains(&bytes), "/{path}: {bytes} of {free}");
            assert!(files.abs_diff(space.f_favail) <= 64, "/{path}: {files} of {}", space.f_favail);
        }
        let fill = |at: &str| format!("! dd if=/dev/zero of={at}/x bs=64k 2> /dev/null");
        let files = "i=0; while true > /root/$i; do i=$((i + 1)); done 2> /dev/null; exit 3".to_owned();
        for (script, path) in [(fill("/root"), "/"), (fill("/boot"), "/boot"), (files, "/")] {
            let (exit, lines) = step(&script);
            let [full] = &exit.full_file_systems[..] else { panic!("{script}: {exit:?} {lines:?}") };
            assert_eq!(full.of_image.as_deref(), Some(path), "{script}: {full:?}");
            let words = format!("which is as large as the image's free space on {path} ");
            assert!(full.message.contains(&words), "{script}: {full:?}");
            // If the step removes its files, nothing is full in the end, but the limits are known.
            let (exit, lines) = step(&format!("({script}); rm -f /root/* /boot/*"));
            assert_eq!(exit.full_file_systems, [], "{lines:?}");
            let paths: Vec<_> = exit.discarded.iter().map(|memory| memory.path.as_str()).collect();
            assert_eq!(paths, ["/", "/boot"]);
            let memory = exit.discarded.iter().find(|memory| memory.path == path).unwrap();
            assert_eq!(&memory.if_full, full, "{script}");
        }
        assert_eq!(std::fs::read_dir(place.path().join("boot")).unwrap().count(), 0, "nothing was written");
    };
    std::thread::scope(|scope| scope.spawn(test).join().unwrap());
}

#[test]
fn a_process_can_have_many_files_open() {
    let image = BusyboxImage::new();
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(524_288);
    let expected = [65_536.min(most), 524_288.min(most)].map(|limit| limit.to_string());
    assert_eq!(output(&image.shell("ulimit -n; ulimit -Hn")), expected);
}

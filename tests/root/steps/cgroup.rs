//! The cgroup of a step: every step has one, and what it keeps a step from. The limits for memory and processes need
//! controllers that many machines do not give to cgroup v2, so the vm ring tests them.

use super::egress::{UP, cgroup_of, ip, let_go, marker, unshared};
use super::{HELPER, Loop, MINUTE, block_on, output, with_program};
use oven::device::DeviceNode;
use oven::error::{Kind, hint_of};
use oven::sandbox;
use oven::sandbox::cgroup::{CgroupSupport, StepCgroup};
use oven::sandbox::spec::{ExitStatus, StepSpec};
use oven::sys::namespaces;
use oven_testing::programs::own_test;
use oven_testing::{BusyboxImage, LocalWorld, stderr};
use rustix::mount::{UnmountFlags, unmount};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

#[test]
fn every_step_has_a_cgroup_of_its_own_that_only_root_may_enter() {
    let image = BusyboxImage::new();
    for (network, throwaway) in [(false, false), (true, false), (false, true)] {
        let mut spec = image.shell(UP);
        (spec.network, spec.throwaway) = (network, throwaway);
        if throwaway {
            // The image cannot say when the step may end.
            spec = StepSpec { argv: vec!["sh".into(), "-c".into(), "echo up; sleep 1".into()], ..spec };
        }
        let marker = marker(&mut spec, "own");
        let mut seen = None;
        let exit = block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |_| {
            let cgroup: PathBuf = cgroup_of(&marker);
            seen = Some((fs::metadata(&cgroup).unwrap().permissions().mode() & 0o7777, cgroup));
            let_go(&image);
        }));
        assert_eq!(exit.unwrap().status, ExitStatus::Exited(0));
        let (mode, cgroup) = seen.unwrap();
        assert!(
            cgroup.file_name().unwrap().to_str().unwrap().starts_with("oven-step-"),
            "{}",
            cgroup.display()
        );
        assert_eq!(mode, 0o700, "{}", cgroup.display());
        assert!(!cgroup.exists(), "{}", cgroup.display());
        fs::remove_file(image.path("tmp/go")).unwrap();
    }
}

/// What a step says about the node `/dev/disk`: whether it can be read and written, and its mode.
const TRY_DISK: &str = "dd if=/dev/disk of=/dev/null bs=512 count=1 2>/dev/null && echo read; \
                        dd if=/dev/zero of=/dev/disk bs=512 count=1 conv=notrunc 2>&1 && echo written; \
                        (: <> /dev/disk) 2>/dev/null && echo both; ls /dev/disk; stat -c %a /dev/disk; true";

fn with_disk(image: &BusyboxImage, disk: &Loop, writable: bool, throwaway: bool) -> StepSpec {
    let nodes = vec![DeviceNode { name: "disk".into(), rdev: disk.rdev(), links: vec![] }];
    StepSpec { nodes, disk_writable: writable, throwaway, ..image.shell(TRY_DISK) }
}

#[test]
fn only_a_definition_that_says_so_may_write_to_its_disk() {
    let (image, disk) = (BusyboxImage::new(), Loop::new(1));
    let first = || {
        let mut bytes = [1; 4];
        fs::File::open(&disk.node).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let device = fs::File::options().write(true).open(&disk.node).unwrap();
    for (writable, throwaway, may_write) in
        [(false, false, false), (false, true, false), (true, true, false), (true, false, true)]
    {
        for network in [false, true] {
            device.write_all_at(b"oven", 0).unwrap();
            device.sync_all().unwrap();
            let spec = StepSpec { network, ..with_disk(&image, &disk, writable, throwaway) };
            let lines = output(&spec);
            let has = |line: &str| lines.iter().any(|has| has == line);
            let case = format!("writable {writable}, throwaway {throwaway}, network {network}: {lines:#?}");
            assert!(has("read"), "{case}");
            assert_eq!((has("written"), has("both")), (may_write, may_write), "{case}");
            assert_eq!(lines.iter().any(|line| line.contains("not permitted")), !may_write, "{case}");
            assert!(has(if may_write { "660" } else { "440" }), "{case}");
            assert_eq!(first(), if may_write { [0; 4] } else { *b"oven" }, "{case}");
        }
    }
}

#[test]
fn another_disk_cannot_even_be_read() {
    let (image, own, other) = (BusyboxImage::new(), Loop::new(1), Loop::new(1));
    let spec = with_disk(&image, &own, true, false);
    let cgroup = StepCgroup::create(&spec).unwrap().unwrap();
    // A process of this machine's own, in the cgroup: it has all rights that a step lacks.
    let tried = |node: &Path, flags: &str| {
        let script = format!("echo $$ > $0/cgroup.procs && : {flags} {}", node.display());
        let fd = std::os::fd::AsRawFd::as_raw_fd(&cgroup.cgroup());
        let dir = format!("/proc/{}/fd/{fd}", std::process::id());
        let done = Command::new("sh").args(["-c", &script]).arg(dir).output().unwrap();
        assert!(done.status.success() || stderr(&done).contains("not permitted"), "{done:?}");
        done.status.success()
    };
    assert!(tried(&own.node, "<") && tried(&own.node, "<>"));
    assert!(!tried(&other.node, "<") && !tried(&other.node, ">"));
    for node in ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/ptmx"] {
        assert!(tried(Path::new(node), "<"), "{node}");
    }
    let control = fs::File::options().read(true).open("/dev/loop-control");
    assert!(control.is_ok() && !tried(Path::new("/dev/loop-control"), "<"));
}

#[test]
fn a_step_with_the_network_cannot_take_low_ports() {
    unshared(UnshareFlags::NEWNET, || {
        ip("link set lo up");
        let image = with_program("bind.c", &[], "bind");
        let (ports, low) = (["0", "1", "80", "1023", "1024", "8080"], ["1", "80", "1023"]);
        let argv: Vec<&str> = ["bind"].into_iter().chain(ports).collect();
        // By default a capability is needed. The builder may have given the ports to everybody.
        for first in ["1024", "0"] {
            fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", first).unwrap();
            for network in [true, false] {
                let spec = StepSpec { network, resolv_conf: Some(String::new()), ..image.spec(&argv) };
                let lines = output(&spec);
                assert_eq!(lines.len(), 4 * ports.len(), "{lines:#?}");
                for line in lines {
                    let words: Vec<&str> = line.splitn(3, ' ').collect();
                    assert_eq!(
                        words[2] == "bound",
                        !(network && low.contains(&words[1])),
                        "{network} {first}: {line}"
                    );
                }
            }
        }
    });
}

/// Not a test of its own: what the next test runs, because a process finds out only once what the machine has.
#[test]
fn process_without_cgroup_v2() {
    let Some(root) = std::env::var_os("OVEN_CGROUP_ROOT") else { return };
    let mounted = std::env::var_os("OVEN_CGROUP_FORBIDDEN").is_none();
    namespaces::unshare(UnshareFlags::NEWNS).unwrap();
    namespaces::make_mounts_private().unwrap();
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    for line in mounts.lines().filter(|line| line.contains(" - cgroup2 ")) {
        // Of this thread's own namespace alone.
        unmount(line.split(' ').nth(4).unwrap(), UnmountFlags::DETACH).unwrap();
    }
    let spec = |fenced| StepSpec {
        network: true,
        fenced,
        resolv_conf: Some(String::new()),
        ..oven_testing::busybox_image::spec_in(
            Path::new(&root),
            &["sh", "-c", "ls /dev; stat -c %a /dev/disk; true"],
        )
    };
    let run = |spec: &StepSpec| {
        let mut lines = Vec::new();
        let mut on_line = |line: &str| lines.push(line.to_owned());
        let exit = block_on(sandbox::run(Path::new(HELPER), spec, MINUTE, &mut on_line))?;
        assert_eq!(exit.status, ExitStatus::Exited(0), "{lines:?}");
        anyhow::Ok(lines)
    };
    if mounted {
        // oven mounts the file system itself, and nobody sees it.
        assert_eq!(CgroupSupport::get().devices_gap(), None);
        run(&spec(true)).unwrap();
        assert!(!fs::read_to_string("/proc/thread-self/mountinfo").unwrap().contains(" - cgroup2 "));
        return;
    }
    // Without this capability, oven cannot mount it.
    let all = rustix::thread::capabilities(None).unwrap();
    let fewer = CapabilitySets { effective: all.effective.difference(CapabilitySet::SYS_ADMIN), ..all };
    rustix::thread::set_capabilities(None, fewer).unwrap();
    let (limits, devices) = (CgroupSupport::get().limits_gap(), CgroupSupport::get().devices_gap());
    rustix::thread::set_capabilities(None, all).unwrap();
    assert!(limits.is_some() && devices.is_some());
    let error = run(&spec(true)).unwrap_err();
    assert_eq!(Kind::of(&error), Kind::Machine);
    assert!(format!("{error:#}").contains("cannot block access to the builder's credentials"), "{error:#}");
    assert!(hint_of(&error).unwrap().contains("`imds = true`"));
    // The fence has no meaning for a step without the network.
    run(&StepSpec { network: false, ..spec(true) }).unwrap();
    // Such a step has no cgroup, and the disk's nodes only if it may write to them.
    let nodes = vec![DeviceNode { name: "disk".into(), rdev: rustix::fs::makedev(7, 0), links: vec![] }];
    for (disk_writable, throwaway, expected) in
        [(false, false, false), (true, true, false), (true, false, true)]
    {
        let spec = StepSpec { nodes: nodes.clone(), disk_writable, throwaway, ..spec(false) };
        let lines = run(&spec).unwrap();
        assert_eq!(lines.contains(&"660".to_owned()), expected, "{disk_writable} {throwaway} {lines:?}");
        assert_eq!(lines.contains(&"disk".to_owned()), expected, "{disk_writable} {throwaway} {lines:?}");
    }
}

#[test]
fn a_machine_without_cgroup_v2_runs_steps_without_nodes_and_fences() {
    let image = BusyboxImage::new();
    for forbidden in [false, true] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(own_test(module_path!(), "process_without_cgroup_v2"))
            .env("OVEN_CGROUP_ROOT", image.root());
        if forbidden {
            command.env("OVEN_CGROUP_FORBIDDEN", "1");
        }
        let done = command.output().unwrap();
        let out = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && out.contains("1 passed"), "{forbidden}\n{out}\n{}", stderr(&done));
    }
}

/// Not a test of its own: what the next test runs. Its steps are in a thread in which `clone3` fails, as in some
/// containers.
#[test]
#[allow(unsafe_code)]
fn process_without_clone3() {
    let Some(root) = std::env::var_os("OVEN_CGROUP_NO_CLONE3") else { return };
    let statement = |code: u32, k: u32, jf: u8| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_clone3 as u32, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its instructions live until the call returns.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(done, 0);
    let mut spec = oven_testing::busybox_image::spec_in(Path::new(&root), &["sh", "-c", "echo up; sleep 1"]);
    let marker = marker(&mut spec, "clone");
    let mut cgroup = None;
    let exit =
        block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |_| cgroup = Some(cgroup_of(&marker))));
    assert_eq!(exit.unwrap().status, ExitStatus::Exited(0));
    let cgroup = cgroup.unwrap();
    assert!(cgroup.file_name().unwrap().to_str().unwrap().starts_with("oven-step-"), "{}", cgroup.display());
    assert!(!cgroup.exists(), "{}", cgroup.display());
}

#[test]
fn a_step_enters_its_cgroup_where_clone3_is_forbidden() {
    let image = BusyboxImage::new();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(own_test(module_path!(), "process_without_clone3"))
        .env("OVEN_CGROUP_NO_CLONE3", image.root());
    let done = command.output().unwrap();
    let out = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success() && out.contains("1 passed"), "{out}\n{}", stderr(&done));
}

/// The real story with the tests' own distro.
fn bake(world: &LocalWorld) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven-test-bake"));
    command.arg(world.region()).arg("image").current_dir(world.dir.path()).output().unwrap()
}

fn logs(world: &LocalWorld) -> String {
    let logs = fs::read_dir(world.region().join("logs")).unwrap();
    logs.map(|log| fs::read_to_string(log.unwrap().path()).unwrap()).collect()
}

/// What this machine gives oven, this process has, too.
#[test]
fn a_bake_says_once_what_steps_lack() {
    let world = LocalWorld::tiny();
    let runs = "[[run]]\ncommand = [\"true\"]\n[[run]]\ncommand = [\"true\"]\n";
    world.write("base/image.toml", &format!("name = \"base\"\nfrom = {{ name = \"tiny\" }}\n{runs}"));
    world.write("image/image.toml", &format!("name = \"image\"\nfrom = \"../base\"\n{runs}"));
    let baked = bake(&world);
    let err = stderr(&baked);
    assert!(baked.status.success(), "{err}");
    let lacks = usize::from(CgroupSupport::get().limits_gap().is_some());
    // Nobody can change this machine during a bake. So only the log says it.
    assert!(!err.contains("oven cannot limit the memory of steps"), "{err}");
    let log = logs(&world);
    assert_eq!(log.matches("oven cannot limit the memory of steps").count(), lacks, "{log}");
    assert_eq!(log.matches("cannot make them read-only").count(), 0, "{log}");
    let out = String::from_utf8(world.oven(&["doctor"]).stdout).unwrap();
    assert_eq!(out.matches("note   limits of steps: ").count(), lacks, "{out}");
    assert_eq!(out.matches("ok     limits of steps\n").count(), 1 - lacks, "{out}");
    assert!(out.contains("ok     devices of steps\n"), "{out}");
}

/// The boot block is the first KiB of the disk. The file system does not use it.
#[test]
fn a_definition_installs_a_boot_loader_and_its_test_changes_nothing() {
    let world = LocalWorld::tiny();
    let write = |text: &str| {
        format!(
            "#!/bin/sh\nset -e\nfor node in /dev/loop*; do busybox printf {text} | busybox dd of=$node conv=notrunc; done\n"
        )
    };
    world.write("image/install.sh", &write("GRUB"));
    world.write("image/test.sh", &write("TEST"));
    let bake = |disk: &str, test: &str| {
        let head = "name = \"image\"\nfrom = { name = \"tiny\" }\n";
        world.write("image/image.toml", &format!("{head}{disk}[[run]]\nscript = \"install.sh\"\n{test}"));
        bake(&world)
    };
    let refused = bake("", "");
    assert_eq!(refused.status.code(), Some(5), "{}", stderr(&refused));
    for words in ["not permitted", "set `writable = true` in [disk] of image.toml"] {
        assert!(stderr(&refused).contains(words), "{}", stderr(&refused));
    }
    let refused = bake("[disk]\nwritable = true\n", "[[test]]\nscript = \"test.sh\"\n");
    assert_eq!(refused.status.code(), Some(5), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("not permitted"), "{}", stderr(&refused));
    let baked = bake("[disk]\nwritable = true\n", "");
    assert!(baked.status.success(), "{}", stderr(&baked));
    let snapshots = fs::read_dir(world.region().join("snapshots")).unwrap().flatten();
    let begin = |path: PathBuf| {
        let mut bytes = [0; 4];
        let file = fs::File::open(path).unwrap();
        file.read_exact_at(&mut bytes, 0).ok().map(|()| bytes)
    };
    let begins: Vec<_> = snapshots.filter_map(|entry| begin(entry.path())).collect();
    assert!(begins.contains(b"GRUB") && !begins.contains(b"TEST"), "{begins:?}");
    world.assert_no_traces("after a boot loader");
}

//! What hides the builder's credentials from steps with the network, against servers that have the addresses of the
//! metadata services, in a network namespace of each test's own. Needs root, cgroup v2 and BPF.

use super::{HELPER, MINUTE, with_program};
use oven::device::DeviceNode;
use oven::sandbox;
use oven::sandbox::cgroup;
use oven::sandbox::cgroup::StepCgroup;
use oven::sandbox::spec::{ExitStatus, StepSpec};
use oven::sys::namespaces;
use oven_testing::busybox_image::spec_in;
use oven_testing::programs::own_test;
use oven_testing::{BusyboxImage, ring};
use rustix::thread::UnshareFlags;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PORT: u16 = 80;
/// Of an instance, an ECS task and an EKS pod.
const CREDENTIALS: [&str; 5] =
    ["169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23"];
/// The VPC's name server has such addresses, and everything else is somewhere else.
const OTHERS: [&str; 5] = ["169.254.169.253", "192.0.2.1", "fd00:ec2::253", "2001:db8::1", "127.0.0.1"];

/// An image with the program that tries everything.
fn image() -> BusyboxImage {
    with_program("probe.c", &[], "probe")
}

/// A step with the network.
fn spec(root: &Path, argv: &[&str], fenced: bool) -> StepSpec {
    StepSpec { network: true, fenced, resolv_conf: Some(String::new()), ..spec_in(root, argv) }
}

/// Ends the step that runs [`UP`].
pub fn let_go(image: &BusyboxImage) {
    fs::write(image.path("tmp/go"), "").unwrap();
}

fn try_run(spec: &StepSpec, on_line: &mut dyn FnMut(&str)) -> anyhow::Result<ExitStatus> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let exit = runtime.block_on(sandbox::run(Path::new(HELPER), spec, MINUTE, on_line))?;
    Ok(exit.status)
}

/// The output of a step that succeeds.
fn output(spec: &StepSpec) -> Vec<String> {
    let mut lines = Vec::new();
    let status = try_run(spec, &mut |line| lines.push(line.to_owned())).unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(status, ExitStatus::Exited(0), "{lines:#?}");
    lines
}

/// Runs in a thread with namespaces of its own.
pub fn unshared<T: Send>(flags: UnshareFlags, test: impl FnOnce() -> T + Send) -> T {
    let _ring = ring::shared();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            namespaces::unshare(flags).unwrap();
            test()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

pub fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().expect("these tests need iproute2");
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Servers for TCP and UDP at all the addresses, in this thread's network namespace.
struct Servers {
    /// What came: address and protocol.
    seen: Arc<Mutex<BTreeSet<String>>>,
}

impl Servers {
    fn start() -> Self {
        ip("link set lo up");
        // Pings by anybody: packets that no filter of addresses sees, but that of packets does.
        fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap();
        for address in CREDENTIALS.iter().chain(&OTHERS).filter(|address| **address != "127.0.0.1") {
            let (length, nodad) = if address.contains(':') { (128, " nodad") } else { (32, "") };
            ip(&format!("addr add {address}/{length} dev lo{nodad}"));
        }
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        for address in CREDENTIALS.iter().chain(&OTHERS) {
            let at = SocketAddr::new(address.parse::<IpAddr>().unwrap(), PORT);
            let (streams, datagrams) = (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap());
            let (by_stream, by_datagram) = (seen.clone(), seen.clone());
            // They end with the process.
            std::thread::spawn(move || {
                for stream in streams.incoming() {
                    by_stream.lock().unwrap().insert(format!("tcp {address}"));
                    let Ok(mut stream) = stream else { continue };
                    _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
                    _ = stream.read(&mut [0; 8]);
                    _ = stream.write_all(b"secret");
                }
            });
            std::thread::spawn(move || {
                while let Ok((_, from)) = datagrams.recv_from(&mut [0; 8]) {
                    by_datagram.lock().unwrap().insert(format!("udp {address}"));
                    _ = datagrams.send_to(b"secret", from);
                }
            });
        }
        Self { seen }
    }

    fn seen(&self) -> BTreeSet<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

/// `WAY ADDRESS` -> what came of it.
fn probe(image: &BusyboxImage, fenced: bool, addresses: &[&str]) -> BTreeMap<String, String> {
    let port = PORT.to_string();
    let argv: Vec<&str> = ["probe", &port].into_iter().chain(addresses.iter().copied()).collect();
    let lines = output(&spec(image.root(), &argv, fenced));
    let told = lines.iter().map(|line| line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}")));
    told.map(|(way, what)| (way.to_owned(), what.to_owned())).collect()
}

/// What needs a capability that no step has.
fn privileged(way: &str) -> bool {
    way.starts_with("raw") || way.starts_with("packet")
}

#[test]
fn no_way_leads_to_the_credentials() {
    unshared(UnshareFlags::NEWNET, || {
        let (image, servers) = (image(), Servers::start());
        let told = probe(&image, true, &CREDENTIALS);
        assert!(told.len() > 70, "{told:#?}");
        // At once: a way that hung would be a step that waits for minutes. (The kernel does not report a ping over
        // IPv6 that it was dropped.)
        let good = |way: &str, what: &str| match what {
            // Steps have no packet sockets, with the fence or without (`seccomp.rs`).
            "EAFNOSUPPORT" => way.starts_with("packet"),
            "ETIMEDOUT" => way.starts_with("ping fd00"),
            what => what == "EPERM" && !way.starts_with("packet"),
        };
        let open: Vec<_> = told.iter().filter(|(way, what)| !good(way, what)).collect();
        assert!(open.is_empty(), "{open:#?}");
        assert_eq!(servers.seen(), BTreeSet::new());
        // Everything else is as it was. (A source route, which may hide any address, newer kernels refuse by
        // themselves.)
        for (way, what) in probe(&image, true, &OTHERS) {
            let refused = privileged(&way) || way.starts_with("tcp-source-route");
            assert_ne!(what == "reached", refused, "{way}: {what}");
        }
        assert_eq!(servers.seen(), all_of(&OTHERS));
    });
}

#[test]
fn with_the_flag_the_same_ways_lead_there() {
    unshared(UnshareFlags::NEWNET, || {
        let (image, servers) = (image(), Servers::start());
        for (way, what) in probe(&image, false, &CREDENTIALS) {
            let refused = privileged(&way);
            assert!(way.starts_with("tcp-source-route") || (what == "reached") != refused, "{way}: {what}");
        }
        assert_eq!(servers.seen(), all_of(&CREDENTIALS));
    });
}

fn all_of(addresses: &[&str]) -> BTreeSet<String> {
    addresses.iter().flat_map(|to| [format!("tcp {to}"), format!("udp {to}")]).collect()
}

#[test]
fn without_the_network_there_is_no_way_at_all() {
    unshared(UnshareFlags::NEWNET, || {
        let (image, servers) = (image(), Servers::start());
        for fenced in [false, true] {
            let mut argv = vec!["probe", "80"];
            argv.extend(CREDENTIALS);
            let spec = StepSpec { network: false, ..spec(image.root(), &argv, fenced) };
            let lines = output(&spec);
            assert!(lines.len() > 70 && !lines.iter().any(|line| line.ends_with("reached")), "{lines:#?}");
        }
        assert_eq!(servers.seen(), BTreeSet::new());
    });
}

/// The cgroup v2 directory of a process, from the content of its file `cgroup`.
fn cgroup_directory(groups: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("these tests need cgroup v2");
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(mount.split(' ').nth(4).unwrap()).join(path))
}

/// The cgroup below which this process makes those of its steps.
fn parent_cgroup() -> PathBuf {
    let trial = StepCgroup::create(&spec(Path::new("/"), &["true"], false)).unwrap().unwrap();
    let path = fs::read_link(format!("/proc/self/fd/{}", trial.cgroup().as_raw_fd())).unwrap();
    let name = path.file_name().unwrap();
    // oven may have made it through a mount that is not attached anywhere. So it is looked for where the machine has its
    // cgroups: in this process's own, and in those above.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("cgroup v2 is mounted");
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    let own = Path::new(mount.split(' ').nth(4).unwrap()).join(own);
    own.ancestors().find(|dir| dir.join(name).exists()).expect("the cgroup is below one of these").to_owned()
}

/// What a step runs that says that it is up, and ends when [`let_go`] says so.
pub const UP: &str = "echo up; while [ ! -e /tmp/go ]; do sleep 0.02; done";

/// The cgroup of a process that has `marker` in its environment. One that executes a program at this moment has no
/// environment, and one that ends no cgroup: so it is looked for more than once.
pub fn cgroup_of(marker: &str) -> PathBuf {
    let began = Instant::now();
    while began.elapsed() < MINUTE {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            let mut variables = environment.split(|byte| *byte == 0);
            if !variables.any(|variable| variable == marker.as_bytes()) {
                continue;
            }
            let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            if let Some(directory) = cgroup_directory(&groups) {
                return directory;
            }
        }
        std::thread::yield_now();
    }
    panic!("no process has {marker}");
}

/// A name for the environment of one test's steps.
pub fn marker(spec: &mut StepSpec, test: &str) -> String {
    let value = format!("{test}-{}", std::process::id());
    spec.env.insert("OVEN_EGRESS_MARKER".into(), value.clone());
    format!("OVEN_EGRESS_MARKER={value}")
}

#[test]
fn a_step_cannot_leave_its_cgroup_and_leaves_none() {
    let image = image();
    let script = "cat /proc/self/cgroup; find / -name 'cgroup.procs' 2>/dev/null; mkdir /tmp/c; \
                  mount -t cgroup2 none /tmp/c || mount -t cgroup none /tmp/c; ";
    let mut spec = spec(image.root(), &["sh", "-c", &format!("{script}{UP}")], true);
    let marker = marker(&mut spec, "leave");
    let (mut lines, mut cgroup) = (Vec::new(), None);
    let status = try_run(&spec, &mut |line| {
        lines.push(line.to_owned());
        if line == "up" {
            cgroup = Some(cgroup_of(&marker));
            let_go(&image);
        }
    });
    assert_eq!(status.unwrap(), ExitStatus::Exited(0), "{lines:#?}");
    // It has a namespace of its own, in which its cgroup is the root; nothing is mounted by which it could choose.
    assert!(lines.contains(&"0::/".to_owned()), "{lines:#?}");
    assert!(!lines.iter().any(|line| line.contains("cgroup.procs")), "{lines:#?}");
    assert_eq!(lines.iter().filter(|line| line.contains("permission denied")).count(), 2, "{lines:#?}");
    let cgroup = cgroup.unwrap();
    let name = cgroup.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("oven-step-"), "{name}");
    assert!(!cgroup.exists(), "{}", cgroup.display());
}

#[test]
fn a_step_that_is_dropped_leaves_no_cgroup() {
    let image = image();
    let mut spec = spec(image.root(), &["sh", "-c", "echo up; sleep 1000"], true);
    let marker = marker(&mut spec, "drop");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (tell, mut up) = tokio::sync::mpsc::unbounded_channel();
    let mut on_line = |_: &str| tell.send(cgroup_of(&marker)).unwrap();
    let cgroup = runtime.block_on(async {
        tokio::select! {
            exit = sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut on_line) => panic!("it ended: {exit:?}"),
            cgroup = up.recv() => cgroup.unwrap(),
        }
    });
    assert!(cgroup.file_name().unwrap().to_str().unwrap().starts_with("oven-step-"));
    assert!(!cgroup.exists(), "{}", cgroup.display());
}

/// Not a test of its own: the process that the next test kills.
#[test]
fn parent_that_is_killed() {
    let Some(root) = std::env::var_os("OVEN_EGRESS_PARENT") else { return };
    let mut spec = spec(Path::new(&root), &["sh", "-c", "env; echo up; sleep 1000"], true);
    marker(&mut spec, "killed");
    let status = try_run(&spec, &mut |line| println!("step: {line}"));
    panic!("the step ended: {status:?}");
}

#[test]
fn what_a_killed_oven_left_is_removed_by_the_next_step() {
    // Any other test's step would remove it, too.
    let _ring = ring::exclusive();
    let image = image();
    for by in ["the next step", "sweep"] {
        let mut parent = Command::new(std::env::current_exe().unwrap())
            .args(own_test(module_path!(), "parent_that_is_killed"))
            .env("OVEN_EGRESS_PARENT", image.root())
            .env("AWS_SECRET_ACCESS_KEY", "planted")
            .env("AWS_SESSION_TOKEN", "planted")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut told = Vec::new();
        for line in BufReader::new(parent.stdout.take().unwrap()).lines().map_while(Result::ok) {
            told.push(line);
            if told.last().is_some_and(|line| line.ends_with("step: up")) {
                break;
            }
        }
        assert!(told.iter().any(|line| line.contains("OVEN_EGRESS_MARKER")), "{told:#?}");
        // Nothing of oven's own environment reaches a step.
        assert!(!told.iter().any(|line| line.contains("AWS_") || line.contains("planted")), "{told:#?}");
        let cgroup = cgroup_of(&format!("OVEN_EGRESS_MARKER=killed-{}", parent.id()));
        assert!(cgroup.file_name().unwrap().to_str().unwrap().starts_with("oven-step-"));
        parent.kill().unwrap();
        assert_eq!(parent.wait().unwrap().signal(), Some(9));
        // Its processes die with it, but not in the same instant.
        let killed = Instant::now();
        while fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|pids| !pids.is_empty()) {
            assert!(killed.elapsed() < Duration::from_secs(20), "{}", cgroup.display());
            std::thread::yield_now();
        }
        if by == "sweep" {
            cgroup::sweep().unwrap();
        } else {
            output(&spec(image.root(), &["sh", "-c", "true"], true));
        }
        assert!(!cgroup.exists(), "{} after {by}", cgroup.display());
    }
}

#[test]
fn what_others_hold_is_left_alone() {
    let _ring = ring::exclusive();
    assert!(rustix::process::geteuid().is_root(), "these tests need root");
    let parent = parent_cgroup();
    let (left, other) = (parent.join("oven-step-0000"), parent.join("oven-other-0000"));
    fs::create_dir(&other).unwrap();
    fs::create_dir(&left).unwrap();
    let fenced = spec(Path::new("/"), &["true"], true);
    let make = || StepCgroup::create(&fenced).unwrap().unwrap();
    let (first, second) = (make(), make());
    cgroup::sweep().unwrap();
    let alive = |fence: &StepCgroup| rustix::fs::fstat(fence.cgroup()).is_ok_and(|stat| stat.st_nlink > 0);
    assert!(alive(&first) && alive(&second));
    assert!(!left.exists() && other.exists());
    fs::remove_dir(&other).unwrap();
    // By their names, too.
    let names = || -> BTreeSet<_> {
        let entries = fs::read_dir(&parent).unwrap().flatten();
        // Those of the other tests' steps come and go.
        entries
            .filter_map(|entry| entry.metadata().ok())
            .map(|data| std::os::unix::fs::MetadataExt::ino(&data))
            .collect()
    };
    let numbers = [&first, &second].map(|fence| rustix::fs::fstat(fence.cgroup()).unwrap().st_ino);
    assert!(numbers.iter().all(|number| names().contains(number)));
    drop((first, second));
    assert!(!numbers.iter().any(|number| names().contains(number)));
}

#[test]
fn a_fence_costs_little() {
    let _ring = ring::exclusive();
    assert!(rustix::process::geteuid().is_root(), "these tests need root");
    let mut times: Vec<_> = (0..10)
        .map(|_| {
            let began = Instant::now();
            StepCgroup::check_fence().unwrap();
            began.elapsed()
        })
        .collect();
    times.sort_unstable();
    println!("a fence: {:?} (best of 10)", times[0]);
    // The best: what others do at the same time is not its cost.
    assert!(times[0] < Duration::from_millis(250), "{times:?}");
}

#[test]
#[allow(unsafe_code)]
fn a_signal_in_the_middle_spoils_no_fence() {
    let _ring = ring::exclusive();
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::signal::unix::{SignalKind, signal};
    assert!(rustix::process::geteuid().is_root(), "these tests need root");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let _inside = runtime.enter();
    // From now on it ends nobody.
    let _heard = signal(SignalKind::user_defined1()).unwrap();
    // SAFETY: it has no conditions.
    let here = unsafe { libc::pthread_self() };
    let made = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !made.load(Ordering::Relaxed) {
                // SAFETY: the thread lives longer than this one, which it waits for.
                unsafe { libc::pthread_kill(here, libc::SIGUSR1) };
                #[allow(clippy::disallowed_methods, reason = "a thread of its own")]
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        // Each has another disk, so that the kernel verifies a program for it.
        let fences: Vec<_> = (0..100)
            .map(|rdev| {
                let mut spec = spec(Path::new("/"), &["true"], true);
                spec.nodes = vec![DeviceNode { name: "disk".into(), rdev, links: vec![] }];
                StepCgroup::create(&spec).map(drop)
            })
            .collect();
        made.store(true, Ordering::Relaxed);
        let failed: Vec<_> = fences.into_iter().filter_map(Result::err).collect();
        assert!(failed.is_empty(), "{} of 100: {:#}", failed.len(), failed[0]);
    });
}

//! Steps in a small root tree: what they see, how they end, and what they cannot do. Needs root.

use oven::device::Node;
use oven::error::Kind;
use oven::sandbox;
use oven::sandbox::spec::{Bind, Exit, ExitStatus, Spec};
use oven_distro::Shim;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const HELPER: &str = env!("CARGO_BIN_EXE_oven");
const NONE: [u32; 0] = [];
const MINUTE: Duration = Duration::from_secs(60);
const APPLETS: [&str; 26] = [
    "sh", "true", "false", "sleep", "cat", "ls", "echo", "id", "mkdir", "rm", "ln", "mv", "kill", "ps", "dd",
    "yes", "env", "readlink", "stat", "touch", "ifconfig", "hostname", "setsid", "nohup", "test", "head",
];

/// An image's root, as a plain directory: nothing has to be mounted by the tests.
struct Image {
    dir: TempDir,
}

impl Image {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let dir = tempfile::Builder::new().prefix("oven-step-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let image = Self { dir };
        for name in ["bin", "etc", "var/log", "usr/sbin", "dev", "proc", "sys", "run", "tmp", "root", "mnt"] {
            fs::create_dir_all(image.path(name)).unwrap();
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
        let busybox = busybox.expect("these tests need busybox-static");
        fs::copy(busybox, image.path("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", image.path("bin").join(applet)).unwrap();
        }
        image
    }

    /// With a C program in it.
    fn with_program(source: &str, options: &[&str], name: &str) -> Self {
        let image = Self::new();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/root_step").join(source);
        let mut cc = Command::new("cc");
        cc.args(["-static", "-O1"]).args(options).arg("-o").arg(image.path("bin").join(name)).arg(source);
        assert!(cc.status().expect("these tests need a C compiler").success());
        image
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spec(&self, argv: &[&str]) -> Spec {
        Spec {
            root: self.dir.path().to_owned(),
            argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
            env: BTreeMap::new(),
            cwd: "/".into(),
            network: false,
            fenced: false,
            resolv_conf: None,
            shims: Vec::new(),
            binds: Vec::new(),
            caches: Vec::new(),
            nodes: Vec::new(),
            throwaway: false,
            interactive: false,
        }
    }

    fn shell(&self, script: &str) -> Spec {
        self.spec(&["sh", "-c", script])
    }

    /// All that is in the image: path, kind and mode, inode, link target or content.
    fn listing(&self) -> Vec<(PathBuf, u32, u64, Vec<u8>)> {
        fn walk(dir: &Path, found: &mut Vec<(PathBuf, u32, u64, Vec<u8>)>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = fs::symlink_metadata(&path).unwrap();
                let content = if meta.is_symlink() {
                    fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
                } else if meta.is_file() {
                    fs::read(&path).unwrap()
                } else {
                    Vec::new()
                };
                found.push((path.clone(), meta.st_mode(), meta.st_ino(), content));
                if meta.is_dir() {
                    walk(&path, found);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.dir.path(), &mut found);
        found.sort();
        found
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn try_run(spec: &Spec, timeout: Duration) -> anyhow::Result<(Exit, Vec<String>)> {
    let mut lines = Vec::new();
    let exit =
        block_on(sandbox::run(Path::new(HELPER), spec, timeout, &mut |line| lines.push(line.to_owned())))?;
    Ok((exit, lines))
}

fn run(spec: &Spec) -> (Exit, Vec<String>) {
    try_run(spec, MINUTE).unwrap_or_else(|error| panic!("{error:#}"))
}

/// The output of a step that succeeds and leaves nothing.
fn output(spec: &Spec) -> Vec<String> {
    let (exit, lines) = run(spec);
    assert_eq!(exit, Exit { status: ExitStatus::Exited(0), left: Vec::new() }, "{lines:#?}");
    lines
}

/// Processes of this machine that have `marker` in their environment or command line.
fn processes(marker: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let has = |file: &str| {
            let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
            bytes.windows(marker.len()).any(|window| window == marker.as_bytes())
        };
        if pid != std::process::id() && (has("environ") || has("cmdline")) {
            found.push(pid);
        }
    }
    found
}

/// Whether any process has a mount of this image.
fn mounted(image: &Image) -> bool {
    let name = image.dir.path().file_name().unwrap().to_str().unwrap().to_owned();
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read_to_string(entry.path().join("mountinfo")).is_ok_and(|table| table.contains(&name))
    })
}

/// A loop device of this test alone.
struct Loop {
    node: PathBuf,
    _file: tempfile::NamedTempFile,
}
impl Loop {
    fn new(mib: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(mib << 20).unwrap();
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let node = String::from_utf8(made.stdout).unwrap().trim_end().into();
        Self { node, _file: file }
    }
    fn rdev(&self) -> u64 {
        fs::metadata(&self.node).unwrap().st_rdev()
    }
}
impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.node).status();
    }
}

/// Of the kernel.
fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap())
}

fn shim(path: &str, content: &str, mode: u32) -> Shim {
    Shim { path: path.into(), content: content.into(), mode }
}

#[test]
fn a_step_sees_a_clean_machine() {
    let image = Image::new();
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
    let image = Image::new();
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
fn exit_codes_and_signals_are_told() {
    let image = Image::new();
    let status = |argv: &[&str]| run(&image.spec(argv));
    assert_eq!(status(&["true"]).0.status, ExitStatus::Exited(0));
    assert_eq!(status(&["sh", "-c", "exit 42"]).0.status, ExitStatus::Exited(42));
    assert_eq!(status(&["sh", "-c", "kill -9 $$"]).0.status, ExitStatus::Signaled(9));
    assert_eq!(status(&["sh", "-c", "kill -15 $$"]).0.status.to_string(), "killed by SIGTERM");
    let (exit, lines) = status(&["no-such-program"]);
    assert_eq!(exit.status, ExitStatus::Exited(127));
    assert_eq!(lines, ["oven: no-such-program: the image has no such program"]);
    fs::write(image.path("bin/orphan"), "#!/bin/no-such-shell\n").unwrap();
    fs::set_permissions(image.path("bin/orphan"), fs::Permissions::from_mode(0o755)).unwrap();
    let (exit, lines) = status(&["orphan"]);
    assert_eq!(exit.status, ExitStatus::Exited(126));
    assert!(lines[0].contains("the interpreter it names is not in the image"), "{lines:?}");
    fs::write(image.path("bin/plain"), "").unwrap();
    assert_eq!(status(&["plain"]).0.status, ExitStatus::Exited(126));
}

#[test]
fn output_is_lines_in_order_and_bounded() {
    let image = Image::new();
    let lines = output(&image.shell("echo one; echo two >&2; printf three"));
    assert_eq!(lines, ["one", "two", "three"]);
    let (mut bytes, mut last) = (0, String::new());
    let spec = image.shell(
        "yes 0123456789012345678901234567890123456789012345678901234567890123456789 | head -c 200000000",
    );
    let exit = block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |line| {
        bytes += line.len() + 1;
        line.clone_into(&mut last);
    }));
    assert!(exit.unwrap().status.success());
    assert_eq!(last, "(output cut: more than 64 MiB)");
    assert!(bytes < 65 << 20, "{bytes}");
}

#[test]
fn daemons_are_killed_and_named() {
    let image = Image::new();
    let marker = "oven-daemon-marker-1";
    let mut spec = image.shell(
        // It ends when all of them are what they become: one that was only forked has its parent's name.
        "(setsid sleep 1000 >/dev/null 2>&1 &); (trap '' HUP; sleep 1001 &) ; setsid sh -c 'trap : TERM HUP; sleep 1002; :' & \
         n=0; while [ $n != 3 ]; do n=0; for file in /proc/[0-9]*/comm; do read name < $file && [ $name = sleep ] && n=$((n+1)); done; done 2>/dev/null; \
         echo done",
    );
    spec.env.insert("MARKER".into(), marker.into());
    let started = Instant::now();
    let (exit, lines) = run(&spec);
    assert_eq!(exit.status, ExitStatus::Exited(0));
    assert_eq!(lines, ["done"]);
    let mut left = exit.left;
    left.sort();
    assert_eq!(left, ["sh", "sleep", "sleep", "sleep"]);
    assert!(started.elapsed() < MINUTE / 2, "standard output held open hung the step");
    assert_eq!(processes(marker), NONE);
    assert!(!mounted(&image));
}

#[test]
fn what_ends_a_moment_later_is_no_daemon() {
    let image = Image::new();
    // It wakes when the program is gone.
    let script =
        "busybox mkfifo /root/end; (read nothing < /root/end; echo late) & exec 3> /root/end; echo early";
    assert_eq!(output(&image.shell(script)), ["early", "late"]);
}

/// A step that says `up` and takes too long: how it ended, its output, and how long that took once its time was over. It
/// gets more time if it was ended before it said so.
fn timed_out(spec: &Spec, millis: u64) -> (Exit, Vec<String>, Duration) {
    let mut timeout = Duration::from_millis(millis);
    loop {
        let started = Instant::now();
        let (exit, lines) = try_run(spec, timeout).unwrap();
        let took = started.elapsed().saturating_sub(timeout);
        if lines.first().is_some_and(|line| line == "up") || timeout > MINUTE {
            return (exit, lines, took);
        }
        timeout *= 4;
    }
}

#[test]
fn a_step_that_takes_too_long_is_ended() {
    let image = Image::new();
    let marker = "oven-timeout-marker-1";
    let mut spec = image.shell("trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done");
    spec.env.insert("MARKER".into(), marker.into());
    let (exit, lines, took) = timed_out(&spec, 400);
    assert_eq!((exit.status, lines), (ExitStatus::TimedOut, vec!["up".to_owned(), "bye".to_owned()]));
    // Nobody waits for the grace of one that ignores it.
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(processes(marker), NONE);
}

#[test]
fn a_step_that_ignores_sigterm_is_killed() {
    let image = Image::new();
    let marker = "oven-timeout-marker-2";
    let mut spec =
        image.shell("trap '' TERM INT HUP; echo up; (setsid sleep 1000 &); while :; do sleep 1; done");
    spec.env.insert("MARKER".into(), marker.into());
    let (exit, _, took) = timed_out(&spec, 200);
    assert_eq!(exit.status, ExitStatus::TimedOut);
    assert!(took > Duration::from_secs(10) && took < Duration::from_secs(30), "{took:?}");
    assert_eq!(processes(marker), NONE);
    assert!(!mounted(&image));
}

#[test]
fn dropping_the_future_kills_all_and_waits() {
    let image = Image::new();
    let before = image.listing();
    let marker = "oven-drop-marker-1";
    let mut spec = image.shell("(setsid sh -c \"trap '' TERM; sleep 1000\" &); echo up; sleep 1000");
    spec.env.insert("MARKER".into(), marker.into());
    spec.shims.push(shim("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755));
    for delay in [0, 1, 2, 3, 5, 8, 13, 200] {
        block_on(async {
            let mut ignore = |_: &str| ();
            let run = sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut ignore);
            let ended = tokio::time::timeout(Duration::from_millis(delay), run).await;
            assert!(ended.is_err(), "it should still run");
            assert_eq!(processes(marker), NONE, "after {delay} ms");
            assert!(!mounted(&image), "after {delay} ms");
            assert_eq!(image.listing(), before, "after {delay} ms");
        });
    }
}

/// Not a test of its own: the process that the next test kills.
#[test]
fn parent_that_is_killed() {
    let Some(root) = std::env::var_os("OVEN_STEP_PARENT") else { return };
    let image = Image { dir: tempfile::tempdir().unwrap() };
    let mut spec = image.shell("(setsid sleep 1000 &); echo up; sleep 1000");
    spec.root = root.into();
    spec.env.insert("MARKER".into(), "oven-parent-marker-1".into());
    let run = block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |line| println!("{line}")));
    panic!("the step ended: {run:?}");
}

#[test]
fn sigkill_of_oven_kills_the_step() {
    let image = Image::new();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "parent_that_is_killed", "--nocapture"])
        .env("OVEN_STEP_PARENT", image.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.ends_with("up")), "the step did not start");
    // One that executes a program at this moment has no environment.
    let up = Instant::now();
    while processes("oven-parent-marker-1").len() < 2 {
        assert!(up.elapsed() < MINUTE, "{:?}", processes("oven-parent-marker-1"));
        std::thread::yield_now();
    }
    parent.kill().unwrap();
    assert_eq!(parent.wait().unwrap().signal(), Some(9));
    let killed = Instant::now();
    while !processes("oven-parent-marker-1").is_empty() || mounted(&image) {
        assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", processes("oven-parent-marker-1"));
        std::thread::yield_now();
    }
}

#[test]
fn without_the_network_there_is_lo_alone() {
    let image = Image::new();
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
    type Prepare = fn(&Image);
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
        let image = Image::new();
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

    let image = Image::new();
    fs::create_dir(image.path("etc/resolv.conf")).unwrap();
    let before = image.listing();
    let mut spec = image.spec(&["true"]);
    spec.network = true;
    let error = try_run(&spec, MINUTE).unwrap_err();
    assert!(format!("{error:#}").contains("/etc/resolv.conf is a directory"), "{error:#}");
    assert_eq!(image.listing(), before);
}

#[test]
fn shims_are_there_while_the_step_runs_and_gone_after() {
    type Prepare = fn(&Image);
    // What the image has itself cannot be changed meanwhile.
    let change =
        "rm -f /usr/sbin/policy-rc.d 2>/dev/null; (echo > /usr/sbin/policy-rc.d) 2>/dev/null; cat /run/x/y";
    let corpus: [(&str, &str, Prepare); 6] = [
        ("missing", "cat /run/x/y", |_| ()),
        ("its directory is missing", "cat /run/x/y", |image| fs::remove_dir(image.path("usr/sbin")).unwrap()),
        ("a file of mode 0644", change, |image| {
            fs::write(image.path("usr/sbin/policy-rc.d"), "#!/bin/sh\nexit 0\n").unwrap()
        }),
        ("the same file, but of mode 0644", change, |image| {
            fs::write(image.path("usr/sbin/policy-rc.d"), "#!/bin/sh\nexit 101\n").unwrap()
        }),
        ("a link to another program", change, |image| {
            symlink("../../bin/true", image.path("usr/sbin/policy-rc.d")).unwrap();
        }),
        ("a link in the way", "cat /run/x/y", |image| {
            fs::remove_dir(image.path("usr/sbin")).unwrap();
            symlink("/mnt", image.path("usr/sbin")).unwrap();
        }),
    ];
    for (case, then, prepare) in corpus {
        let image = Image::new();
        prepare(&image);
        let before = image.listing();
        let mut spec = image.shell(&format!(
            "/usr/sbin/policy-rc.d; echo $?; /bin/true; echo $?; stat -L -c '%a %u' /usr/sbin/policy-rc.d; {then}"
        ));
        spec.shims = vec![
            shim("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755),
            shim("/run/x/y", "hello", 0o644),
        ];
        assert_eq!(output(&spec), ["101", "0", "755 0", "hello"], "{case}");
        assert_eq!(image.listing(), before, "{case}");
    }
    // What a step itself put into a directory that was made for a shim stays.
    let image = Image::new();
    let mut spec = image.shell("touch /opt/a/kept");
    spec.shims = vec![shim("/opt/a/shim", "", 0o644)];
    output(&spec);
    assert!(image.path("opt/a/kept").exists() && !image.path("opt/a/shim").exists());
}

/// A package may ship a file where a shim is; a script may write one, or move it out of the way.
#[test]
fn what_a_step_puts_in_a_shims_place_stays() {
    let policy = "usr/sbin/policy-rc.d";
    for (script, left) in [
        ("echo own > /usr/sbin/policy-rc.d", Some("own\n")),
        ("echo own > /usr/sbin/new; mv /usr/sbin/new /usr/sbin/policy-rc.d", Some("own\n")),
        ("ln /usr/sbin/policy-rc.d /usr/sbin/backup; rm /usr/sbin/policy-rc.d", None),
        ("mv /usr/sbin/policy-rc.d /usr/sbin/aside; echo own > /usr/sbin/policy-rc.d", Some("own\n")),
        ("rm /usr/sbin/policy-rc.d; mkdir /usr/sbin/policy-rc.d; rmdir /usr/sbin/policy-rc.d", None),
        ("chmod 0 /usr/sbin/policy-rc.d", None),
        ("rm /usr/sbin/.oven-*", None),
        ("rm /usr/sbin/.oven-*; echo own > /usr/sbin/policy-rc.d", Some("own\n")),
        ("ln -sf ../../etc/own /usr/sbin/policy-rc.d; echo own > /etc/own", Some("own\n")),
    ] {
        let image = Image::new();
        let mut spec = image.shell(&format!("set -e; {script}; echo done"));
        spec.shims = vec![shim("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)];
        assert_eq!(output(&spec), ["done"], "{script}");
        assert_eq!(fs::read_to_string(image.path(policy)).ok().as_deref(), left, "{script}");
        let others = fs::read_dir(image.path("usr/sbin")).unwrap().flatten();
        let others: Vec<_> = others.map(|e| e.file_name()).filter(|name| *name != *"policy-rc.d").collect();
        assert!(others.is_empty(), "{script}: {others:?}");
    }
}

/// Of this machine's file system: nothing in it can be made or removed while this lives.
struct Unchangeable(PathBuf);

impl Unchangeable {
    fn new(dir: PathBuf) -> Self {
        let status = Command::new("chattr").arg("+i").arg(&dir).status().expect("these tests need e2fsprogs");
        assert!(status.success(), "{} is on a file system without attributes", dir.display());
        Self(dir)
    }
}

impl Drop for Unchangeable {
    fn drop(&mut self) {
        _ = Command::new("chattr").arg("-i").arg(&self.0).status();
    }
}

/// A shim that cannot be removed fails a step that went well, for its image would have it. Of one that failed there is
/// no image, and its own failure is what is told.
#[test]
fn what_cannot_be_removed_after_a_failed_step_is_not_told_instead_of_it() {
    let image = Image::new();
    for code in [0, 3] {
        let mut spec =
            image.shell(&format!("echo ready; while [ ! -e /tmp/go ]; do sleep 0.02; done; exit {code}"));
        spec.shims = vec![shim("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)];
        let mut guard = None;
        let ended = block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |line| {
            assert_eq!(line, "ready");
            guard = Some(Unchangeable::new(image.path("usr/sbin")));
            fs::write(image.path("tmp/go"), "").unwrap();
        }));
        drop(guard);
        fs::remove_file(image.path("tmp/go")).unwrap();
        let left = fs::read_dir(image.path("usr/sbin")).unwrap().map(|entry| entry.unwrap().path());
        let left: Vec<PathBuf> = left.collect();
        assert_eq!(left.len(), 2, "the removal did not fail: {left:?}");
        left.iter().for_each(|path| fs::remove_file(path).unwrap());
        match (code, ended) {
            (0, Err(error)) => {
                let text = format!("{error:#}");
                assert!(
                    text.contains("clearing the image after a step") && text.contains("policy-rc.d"),
                    "{text}"
                );
            }
            (_, Ok(exit)) => assert_eq!((code, exit.status), (3, ExitStatus::Exited(3))),
            (code, Err(error)) => panic!("{code}: {error:#}"),
        }
    }
}

#[test]
fn hosts_files_are_bound_read_only() {
    let image = Image::new();
    let host = tempfile::tempdir().unwrap();
    fs::create_dir_all(host.path().join("debs/inner")).unwrap();
    fs::write(host.path().join("debs/a.deb"), "A").unwrap();
    fs::write(host.path().join("ca.pem"), "CA").unwrap();
    fs::write(image.path("etc/ca.pem"), "image's").unwrap();
    symlink("ca.pem", image.path("etc/ca-link.pem")).unwrap();
    let before = image.listing();
    let mut spec = image.shell(
        "cat /run/oven/debs/a.deb /etc/ca.pem; (echo x > /run/oven/debs/a.deb) 2>/dev/null || echo refused; \
         touch /run/oven/debs/new 2>/dev/null || echo refused; (echo x > /etc/ca.pem) 2>/dev/null || echo refused",
    );
    let bind = |source: &str, target: &str| Bind {
        source: host.path().join(source),
        target: target.into(),
        within: None,
    };
    spec.binds = vec![bind("debs", "/run/oven/debs"), bind("ca.pem", "/etc/ca-link.pem")];
    assert_eq!(output(&spec), ["ACArefused", "refused", "refused"]);
    assert_eq!(image.listing(), before);
    assert_eq!(fs::read(host.path().join("debs/a.deb")).unwrap(), b"A");
    for (bind, said) in [
        (bind("debs", "/etc/ca.pem"), "is a directory, the image's /etc/ca.pem a file"),
        (bind("none", "/run/x"), "No such file"),
        (bind("ca.pem", "/etc/none"), "the image has no /etc/none"),
    ] {
        spec.binds = vec![bind];
        let error = format!("{:#}", try_run(&spec, MINUTE).unwrap_err());
        assert!(error.contains(said), "{error}");
    }
}

/// Who owns a definition may exchange its directory while oven, as root, is at work.
#[test]
fn a_bind_that_was_exchanged_is_refused() {
    let image = Image::new();
    let host = tempfile::tempdir().unwrap();
    let project = host.path().canonicalize().unwrap().join("project");
    fs::create_dir_all(project.join("web")).unwrap();
    fs::create_dir(host.path().join("secrets")).unwrap();
    fs::write(host.path().join("secrets/key"), "secret").unwrap();
    let mut spec = image.shell("ls /run/oven/definition");
    let (source, target) = (project.join("web"), "/run/oven/definition".to_owned());
    spec.binds = vec![Bind { source, target, within: Some(project.clone()) }];
    assert!(output(&spec).is_empty());
    fs::rename(project.join("web"), project.join("away")).unwrap();
    symlink("../secrets", project.join("web")).unwrap();
    let error = try_run(&spec, MINUTE).unwrap_err();
    assert!(format!("{error:#}").contains("secrets, out of the project"), "{error:#}");
    // One of the directories above it.
    fs::rename(&project, host.path().join("gone")).unwrap();
    fs::create_dir(host.path().join("other")).unwrap();
    fs::create_dir(host.path().join("other/web")).unwrap();
    symlink("other", &project).unwrap();
    let error = try_run(&spec, MINUTE).unwrap_err();
    assert!(format!("{error:#}").contains("other/web, out of the project"), "{error:#}");
}

#[test]
fn a_disks_nodes_are_the_images_own() {
    let image = Image::new();
    let mut spec = image.shell("stat -c '%F %a %g %t,%T' /dev/loop7p1; readlink /dev/disk/by-uuid/1-2; ls /dev/disk/by-uuid /dev/disk/by-label/");
    spec.nodes = vec![
        Node { name: "loop7".into(), rdev: rustix::fs::makedev(7, 112), links: vec![] },
        Node {
            name: "loop7p1".into(),
            rdev: rustix::fs::makedev(259, 3),
            links: vec!["disk/by-uuid/1-2".into(), "disk/by-label/a b".into()],
        },
    ];
    let seen = output(&spec);
    assert_eq!(seen[..2], ["block special file 660 6 103,3", "../../loop7p1"]);
    assert!(seen.contains(&"a b".to_owned()), "{seen:?}");
    spec.nodes[1].links = vec!["../../etc/passwd".into()];
    let error = format!("{:#}", try_run(&spec, MINUTE).unwrap_err());
    assert!(error.contains("is not a name below /dev"), "{error}");
    assert_eq!(fs::read_dir(image.path("dev")).unwrap().count(), 0);
}

#[test]
fn what_a_throwaway_step_writes_vanishes() {
    let image = Image::new();
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
    let image = Image::new();
    fs::create_dir(image.path("boot")).unwrap();
    let boot = tempfile::tempdir().unwrap();
    // The thread's own mounts: gone with it.
    std::thread::scope(|scope| {
        let test = scope.spawn(|| {
            sandbox::private_mounts().unwrap();
            rustix::mount::mount("x", image.path("boot"), "tmpfs", rustix::mount::MountFlags::empty(), None)
                .unwrap();
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
    let image = Image::new();
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

/// Sleepers instead of a real bomb: as many processes, without the load on whoever shares this machine.
#[test]
fn a_fork_bomb_stays_in_its_step() {
    if kernel() < (6, 14) {
        return; // the limit belongs to a PID namespace since then
    }
    let image = Image::new();
    let marker = "oven-bomb-marker-1";
    let mut spec = image.shell("i=0; while [ $i -lt 6000 ]; do sleep 100 & i=$((i+1)); done; echo all");
    spec.env.insert("MARKER".into(), marker.into());
    let (exit, lines) = run(&spec);
    assert!(matches!(exit.status, ExitStatus::Exited(1..)), "{exit:?}");
    assert!(lines.iter().any(|line| line.contains("can't fork")), "{lines:?}");
    assert_eq!(exit.left.len(), 32, "so many are named");
    assert_eq!(processes(marker), NONE);
    assert!(!mounted(&image));
}

#[test]
fn attacks_are_refused() {
    let image = Image::with_program("attack.c", &[], "attack");
    let host = tempfile::tempdir().unwrap();
    let canary = host.path().join("canary");
    fs::write(&canary, "alive").unwrap();
    let host_disk = Loop::new(1);
    let disk = host_disk.rdev();
    fs::File::open(&host_disk.node).expect("this machine's root may open it");
    let numbers = [rustix::fs::major(disk), rustix::fs::minor(disk)].map(|number| number.to_string());
    // A device node that the image brought along.
    let planted = image.path("root/planted-disk");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &planted,
        rustix::fs::FileType::BlockDevice,
        rustix::fs::Mode::RUSR,
        disk,
    )
    .unwrap();
    // What a step must not find anywhere.
    let secret = "AWS-SECRET-7f3a";
    let mut holder = Command::new("sleep").arg("100").env("AWS_SECRET_ACCESS_KEY", secret).spawn().unwrap();
    let address = <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
        "oven-step-test",
    )
    .unwrap();
    let _listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();

    let host_pid = std::process::id().to_string();
    let argv = ["attack", &host_pid, canary.to_str().unwrap(), &numbers[0], &numbers[1], secret];
    // Landlock has scopes since 6.12; before, a step with the network reaches such sockets.
    let scopes = kernel() >= (6, 12);
    for (network, throwaway) in [(false, false), (true, false), (false, true)] {
        let mut spec = image.spec(&argv);
        (spec.network, spec.throwaway) = (network, throwaway);
        spec.nodes = vec![Node { name: "image".into(), rdev: disk, links: vec![] }];
        let (exit, lines) = run(&spec);
        let mut allowed = lines.clone();
        allowed.retain(|line| {
            !line.starts_with("refused ") && (scopes || !line.ends_with(" host_abstract_socket"))
        });
        assert!(allowed.is_empty(), "network {network}, throwaway {throwaway}: {allowed:#?}");
        assert!(exit.status.success() || !scopes, "{exit:?}");
        assert_eq!(lines.len(), 70, "every attempt was made");
    }
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(fs::read(&canary).unwrap(), b"alive");
}

/// What a bake does between steps and the commit: nothing may hold the disk for a moment longer than the step lives.
#[test]
fn the_disk_is_free_when_a_step_has_ended() {
    let disk = Loop::new(32);
    let made = Command::new("mkfs.ext4").arg("-q").arg(&disk.node).status().unwrap();
    assert!(made.success());
    let template = Image::new();
    let copied = |to: &Path| {
        let from = template.dir.path().join(".");
        assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
    };
    let place = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let test = scope.spawn(|| {
            sandbox::private_mounts().unwrap();
            for turn in 0..10 {
                let none = rustix::mount::MountFlags::empty();
                rustix::mount::mount(&disk.node, place.path(), "ext4", none, None).unwrap();
                if turn == 0 {
                    copied(place.path());
                }
                let mut spec = template.shell("(setsid sleep 1000 &) ; sleep 0.01; touch /root/file");
                spec.root = place.path().to_owned();
                spec.throwaway = turn % 2 == 1;
                if turn < 6 {
                    run(&spec);
                } else {
                    spec.argv = vec!["sleep".into(), "1000".into()];
                    let mut ignore = |_: &str| ();
                    block_on(async {
                        let run = sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut ignore);
                        assert!(tokio::time::timeout(Duration::from_millis(4 * turn), run).await.is_err());
                    });
                }
                rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::empty()).unwrap();
                let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL;
                rustix::fs::open(&disk.node, flags, rustix::fs::Mode::empty())
                    .unwrap_or_else(|error| panic!("held in turn {turn}: {error}"));
            }
        });
        test.join().unwrap();
    });
}

/// Not a test of its own: the process that has a terminal in the next one.
#[test]
fn parent_with_a_terminal() {
    let Some(root) = std::env::var_os("OVEN_STEP_TERMINAL") else { return };
    let image = Image { dir: tempfile::tempdir().unwrap() };
    let mut spec = image.shell(
        "[ -t 0 ] && [ -t 1 ] && echo terminal $TERM; trap 'echo interrupted; while [ ! -e /tmp/go ]; do sleep 0.02; done; exit 7' INT; echo ready; \
         while :; do sleep 0.05; done",
    );
    spec.root = root.into();
    spec.interactive = true;
    let stdin = rustix::stdio::stdin();
    let before = rustix::termios::tcgetpgrp(stdin).unwrap();
    let exit = block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |_| ())).unwrap();
    let after = rustix::termios::tcgetpgrp(stdin).unwrap();
    let unread = rustix::io::ioctl_fionread(stdin).unwrap();
    println!("ended: {:?} {}, unread: {unread}", exit.status, before == after);
}

#[test]
fn an_interactive_step_has_the_terminal_and_its_signals() {
    let image = Image::new();
    let program = std::env::current_exe().unwrap();
    let command = format!("{} --exact parent_with_a_terminal --nocapture", program.display());
    let mut terminal = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .env("OVEN_STEP_TERMINAL", image.dir.path())
        .env("TERM", "vt220")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test needs script, of util-linux");
    let mut keys = terminal.stdin.take().unwrap();
    let mut seen = Vec::new();
    for line in BufReader::new(terminal.stdout.take().unwrap()).lines().map_while(Result::ok) {
        let line = line.trim_end().to_owned();
        if line.ends_with("ready") {
            keys.write_all(b"\x03").unwrap();
            keys.flush().unwrap();
        }
        if line.ends_with("interrupted") {
            // As a terminal answers when it is asked what it is.
            keys.write_all(b"\x1b[?62;c\n").unwrap();
            keys.flush().unwrap();
        }
        // It is there: the terminal shows it.
        if line.contains("?62;c") {
            fs::write(image.path("tmp/go"), "").unwrap();
        }
        seen.push(line);
    }
    terminal.wait().unwrap();
    let text = seen.join("\n");
    assert!(text.contains("terminal vt220"), "{text}");
    assert!(text.contains("interrupted"), "{text}");
    assert!(text.contains("ended: Exited(7) true, unread: 0"), "{text}");
}

/// An image whose dynamic loader is the attacker: it runs *as* the host's program, by `/proc/self/exe`.
#[test]
fn the_hosts_program_cannot_be_changed_through_proc() {
    let image = Image::with_program("loader.c", &["-nostdlib", "-nostartfiles"], "loader");
    for loader in ["lib64/ld-linux-x86-64.so.2", "lib/ld-linux-aarch64.so.1"] {
        fs::create_dir_all(image.path(loader).parent().unwrap()).unwrap();
        fs::copy(image.path("bin/loader"), image.path(loader)).unwrap();
    }
    let before = fs::metadata(HELPER).unwrap();
    let (exit, lines) = run(&image.spec(&["/proc/self/exe"]));
    assert_eq!(exit.status, ExitStatus::Exited(42), "{lines:?}");
    let after = fs::metadata(HELPER).unwrap();
    assert_eq!((before.st_mode(), before.st_ctime_nsec()), (after.st_mode(), after.st_ctime_nsec()));
}

#[test]
fn syncs_cost_nothing() {
    let image = Image::new();
    let best = |option: &str| {
        let spec = image.shell(&format!("i=0; while [ $i -lt 50 ]; do dd if=/dev/zero of=/tmp/x bs=64k count=1 {option} 2>/dev/null; i=$((i+1)); done"));
        let times = (0..3).map(|_| {
            let started = Instant::now();
            output(&spec);
            started.elapsed()
        });
        times.min().unwrap()
    };
    let (with, without) = (best("conv=fsync"), best(""));
    assert!(with < 2 * without + Duration::from_secs(1), "{with:?} with syncs, {without:?} without");
}

#[test]
fn a_step_costs_little() {
    let image = Image::new();
    let spec = image.spec(&["true"]);
    output(&spec);
    let times = |what: &dyn Fn()| {
        let time = |_| {
            let started = Instant::now();
            what();
            started.elapsed()
        };
        let mut times: Vec<_> = (0..30).map(time).collect();
        times.sort();
        times
    };
    let times_of_step = times(&|| _ = output(&spec));
    // What a process costs here and now.
    let plain = times(&|| _ = Command::new(HELPER).arg("--version").output().unwrap())[0];
    let (best, median) = (times_of_step[0], times_of_step[15]);
    println!("a step of `true`: median {median:?}, best {best:?}; a process {plain:?}");
    assert!(best < Duration::from_millis(50).max(8 * plain), "{times_of_step:?}, a process {plain:?}");
}

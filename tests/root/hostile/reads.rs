//! Base images that make oven read for ever, fill its memory, or fill the package cache. Each bake ends quickly, with the
//! right exit code, little memory, and nothing left.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oven_testing::{LocalWorld, pause, stderr};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const TIME_MAX: Duration = Duration::from_secs(30);
const MEMORY_MAX_MIB: i64 = 256;
/// Two seconds until the signal is heard, and two for the clean-up. Usually both take 0.1 s together. A read that does not
/// hear the signal takes 8 s or more until it reaches a limit.
const STOP_MAX: Duration = Duration::from_secs(4);
const SECRET: &str = "[[run]]\ncommand = [\"true\"]\nsecrets = [\"TOKEN\"]\n";

/// A region with a base of 256 MiB, into whose tree `plant` puts something, and a definition on it.
fn world(plant: &dyn Fn(&Path), more: &str) -> LocalWorld {
    let world = LocalWorld::of("plain", "ID=tiny\n", &[("bin/pkg", "#!/bin/sh\n")]);
    let (plain, raw, root) = (world.path("base.raw"), world.path("planted.raw"), world.path("tree"));
    let run = |program: &str, args: &[&str]| {
        let done = Command::new(program).args(args).output().unwrap();
        assert!(done.status.success(), "{program}: {}", stderr(&done));
    };
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    fs::create_dir(&root).unwrap();
    run("debugfs", &["-R", &format!("rdump / {}", root.display()), &text(&plain)]);
    plant(&root);
    fs::File::create(&raw).unwrap().set_len(256 << 20).unwrap();
    // A file can have 15 TiB only in blocks of 4 KiB.
    run("mkfs.ext4", &["-q", "-b4096", "-N100000", "-d", &text(&root), &text(&raw)]);
    world.expect(0, &["import", raw.to_str().unwrap(), "--name", "base"]);
    world.write("image/image.toml", &format!("name = \"image\"\nfrom = {{ name = \"base\" }}\n{more}"));
    world
}

fn bake(world: &LocalWorld) -> Command {
    let plugin = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins/examples/tiny.sh");
    let mut command = world.command(&["--plugin", plugin.to_str().unwrap(), "bake", "image"]);
    command.env("TOKEN", "hunter2-9f8e7d6c").process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Returns the bake's output, and the most memory in MiB that oven's main process had.
fn measured(world: &LocalWorld) -> (Output, i64) {
    let child = bake(world).spawn().unwrap();
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let waiting = std::thread::spawn(move || child.wait_with_output().unwrap());
    let mut peak = 0;
    while !waiting.is_finished() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
        peak = peak.max(line.trim().trim_end_matches(" kB").parse().unwrap_or(0) / 1024);
        pause(Duration::from_millis(5));
    }
    (waiting.join().unwrap(), peak)
}

fn sparse(path: &Path, size: u64) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::File::create(path).unwrap().set_len(size).unwrap();
}

fn sixty_four_entries(root: &Path) {
    (0..64).for_each(|n| sparse(&root.join(format!("boot/loader/entries/{n}.conf")), 16 << 20));
}

fn many_links(root: &Path) {
    sparse(&root.join("etc/rc0.d/S0"), 16 << 20);
    (1..2000).for_each(|n| {
        fs::hard_link(root.join("etc/rc0.d/S0"), root.join(format!("etc/rc0.d/S{n}"))).unwrap()
    });
    fs::write(root.join("usr/sbin/sshd"), "").unwrap();
}

fn fstab_of_a_hole(root: &Path) {
    sparse(&root.join("etc/fstab"), 15 << 40);
}

fn passwd_of_homes(root: &Path) {
    let homes: String = (0..60_000).map(|n| format!("x:x:1:1::/h/{n}:\n")).collect();
    fs::write(root.join("etc/passwd"), homes).unwrap();
}

/// Below `/root` and in `/tmp`, 4000 files whose paths have 100 KiB each.
fn deep_files(root: &Path) {
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
    let name = "d".repeat(250);
    for top in ["root", "tmp"] {
        fs::create_dir_all(root.join(top)).unwrap();
        let mut dir = openat(CWD, root.join(top), OFlags::PATH, Mode::empty()).unwrap();
        for _ in 0..400 {
            mkdirat(&dir, &*name, Mode::RWXU).unwrap();
            dir = openat(&dir, &*name, OFlags::PATH, Mode::empty()).unwrap();
        }
        for number in 0..4000 {
            let flags = OFlags::WRONLY | OFlags::CREATE;
            openat(&dir, number.to_string(), flags, Mode::RUSR).unwrap();
        }
    }
}

/// A step writes a new kernel whose initramfs is this.
fn kernel(make: &str) -> String {
    format!(
        "[[run]]\ncommand = [\"sh\", \"-c\", \"mkdir -p /boot; : > /boot/vmlinuz-9; {make} /boot/initrd.img-9\"]\n"
    )
}

#[test]
fn hostile_bases_end_soon_with_little_memory() {
    let hole = |root: &Path| sparse(&root.join("srv/x"), 15 << 40);
    let nothing = |_: &Path| ();
    type Case<'a> = (&'a str, &'a dyn Fn(&Path), String, i32, &'a str);
    let cases: [Case<'_>; 8] = [
        ("deep files", &deep_files, "[clean]\nkeep = [\"/tmp\"]\n".to_owned(), 0, ""),
        ("a hole, and a secret", &hole, SECRET.to_owned(), 0, ""),
        (
            "an initramfs of a hole",
            &nothing,
            kernel("busybox truncate -s 16492674416640"),
            5,
            "it contains no archive",
        ),
        ("64 loader entries", &sixty_four_entries, String::new(), 3, "is larger than 1 MiB"),
        (
            "an fstab of a hole",
            &fstab_of_a_hole,
            String::new(),
            3,
            "/etc/fstab in the image is larger than 1 MiB",
        ),
        (
            "many names of one init script",
            &many_links,
            SECRET.to_owned(),
            5,
            "have more than 256 MiB together",
        ),
        ("many homes", &passwd_of_homes, String::new(), 3, "more than 50000 home directories"),
        (
            "an initramfs of zeros in gzip",
            &|root: &Path| {
                // A gzip member of 256 MiB of zeros in a cpio file, 15 times.
                let header = format!(
                    "070701{}{:08X}{}{:08X}{:08X}zeros\0",
                    "0".repeat(48),
                    0xffff_fffcu32,
                    "0".repeat(32),
                    6,
                    0
                );
                let mut zip = Command::new("gzip")
                    .arg("-1")
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap();
                let mut input = zip.stdin.take().unwrap();
                let writing = std::thread::spawn(move || {
                    use std::io::Write;
                    _ = input.write_all(header.as_bytes());
                    let zeros = vec![0; 1 << 20];
                    (0..3072).for_each(|_| _ = input.write_all(&zeros));
                });
                let zipped = zip.wait_with_output().unwrap().stdout;
                writing.join().unwrap();
                fs::write(root.join("zeros.gz"), zipped).unwrap();
            },
            kernel("cat /zeros.gz >"),
            5,
            "it has more than 2 GiB",
        ),
    ];
    for (what, plant, more, code, word) in cases {
        let world = world(plant, &more);
        let before = world.files();
        let begun = Instant::now();
        let (output, peak) = measured(&world);
        let (took, err) = (begun.elapsed(), stderr(&output));
        assert_eq!(output.status.code(), Some(code), "{what}: {err}");
        assert!(err.contains(word), "{what}: {err}");
        assert!(took < TIME_MAX && peak < MEMORY_MAX_MIB, "{what}: {took:?}, {peak} MiB");
        assert!(peak > 0, "{what}: no memory was measured");
        world.assert_no_traces(what);
        if code != 0 {
            assert_eq!(world.files(), before, "{what}");
        }
    }
}

/// Homes in each other have long paths, and each has a file for each place of credentials. To examine them takes seconds.
/// `image::tree::tests::a_stop_ends_every_read` shows for each read that it hears the stop, without a clock.
#[test]
fn a_signal_ends_a_long_read() {
    const FIRST_NAMES: &str = ".ssh .gnupg .aws .boto .s3cfg .passwd-s3fs .config .azure .docker .dockercfg .kube .netrc \
        .git-credentials .pgpass .mylogin.cnf .my.cnf .npmrc .yarnrc.yml .pypirc .cargo .gem .composer .m2 .vault-token";
    let homes = |root: &Path| {
        use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, mkdirat, openat};
        fs::create_dir(root.join("h")).unwrap();
        fs::write(root.join("h/file"), "x").unwrap();
        let (mut dir, mut path) =
            (openat(CWD, root.join("h"), OFlags::PATH, Mode::empty()).unwrap(), "/h".to_owned());
        let (top, mut homes) =
            (openat(CWD, root.join("h"), OFlags::PATH, Mode::empty()).unwrap(), String::new());
        for _ in 0..1100 {
            mkdirat(&dir, "dd", Mode::RWXU).unwrap();
            dir = openat(&dir, "dd", OFlags::PATH, Mode::empty()).unwrap();
            for name in FIRST_NAMES.split(' ') {
                linkat(&top, "file", &dir, name, AtFlags::empty()).unwrap();
            }
            path += "/dd";
            homes += &format!("x:x:1:1::{path}:\n");
        }
        fs::write(root.join("etc/passwd"), homes).unwrap();
    };
    let world = world(&homes, "");
    let before = world.files();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let child = bake(&world).arg("-v").spawn().unwrap();
        let (pid, begun) = (Pid::from_raw(child.id() as i32), Instant::now());
        while !newest_log(&world).contains("plans this image") {
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", newest_log(&world));
            pause(Duration::from_millis(1));
        }
        pause(Duration::from_millis(300));
        kill(pid, signal).unwrap();
        let stopped = Instant::now();
        let output = child.wait_with_output().unwrap();
        assert!(stopped.elapsed() < STOP_MAX, "{signal}: {:?}", stopped.elapsed());
        let err = stderr(&output);
        assert_eq!(output.status.code(), Some(130), "{err}");
        assert!(err.contains("interrupted; nothing was left behind"), "{err}");
        world.assert_no_traces(signal.as_str());
        assert_eq!(world.files(), before, "{signal}");
        for log in fs::read_dir(world.region().join("logs")).unwrap() {
            fs::remove_file(log.unwrap().path()).unwrap();
        }
    }
}

fn newest_log(world: &LocalWorld) -> String {
    let logs = fs::read_dir(world.region().join("logs")).into_iter().flatten().flatten();
    let newest = logs.max_by_key(|log| log.metadata().unwrap().modified().unwrap());
    newest.map(|log| fs::read_to_string(log.path()).unwrap_or_default()).unwrap_or_default()
}

/// Returns the paths of everything in the region's package cache.
fn cached(world: &LocalWorld) -> Vec<String> {
    let found =
        Command::new("find").arg(world.region().join("packages")).args(["-mindepth", "1"]).output().unwrap();
    String::from_utf8_lossy(&found.stdout).lines().map(str::to_owned).collect()
}

/// A file of the base that makes its apt-get wait.
const WAIT: &str = "/wait";
/// An apt-get of the base that makes a deep directory in the cache, with 64 MiB at its end.
const DEEP: &str = "#!/bin/sh\ncase \"$*\" in *update*|*download*|*install*)\ncd /var/cache/apt/archives || exit 0\n\
    i=0; while [ $i -lt 400 ]; do mkdir d; cd d || exit 0; i=$((i+1)); done\n\
    head -c 67108864 /dev/zero > file\n[ -e /wait ] && sleep 1000;; esac\nexit 0\n";
/// A script that makes 400 directories in each other, and a file in the last one.
const DEEP_TREE: &str =
    "i=0; while [ $i -lt 400 ]; do mkdir d && cd d || exit 1; i=$((i+1)); done; echo x > file";

/// A region with a small Debian in which these files are replaced, and a definition that requests a package.
fn debian(root_files: &[(&str, &str)]) -> LocalWorld {
    let world = LocalWorld::empty();
    let raw = world.path("debian.raw");
    let base = super::lab::variable("OVEN_TEST_TINY");
    let cp = Command::new("cp").arg("--sparse=always").arg(base).arg(&raw).status().unwrap();
    assert!(cp.success());
    let disk = oven_testing::ImageReader::in_file(&raw);
    for (path, content) in root_files {
        let file = world.path("planted");
        fs::write(&file, content).unwrap();
        if *path != WAIT {
            disk.change(&format!("rm {path}"));
        }
        disk.change(&format!("write {} {path}", file.display()));
        disk.change(&format!("set_inode_field {path} mode 0100755"));
    }
    world.expect(0, &["import", raw.to_str().unwrap(), "--name", "base"]);
    world.write("image/image.toml", "name = \"image\"\nfrom = { name = \"base\" }\npackages = [\"hello\"]\n");
    world
}

#[test]
fn a_deep_tree_in_the_cache_is_gone_after_each_bake_and_after_a_sweep() {
    let world = debian(&[("/usr/bin/apt-get", DEEP)]);
    for _ in 0..3 {
        let output = bake(&world).output().unwrap();
        assert_ne!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(
            newest_log(&world).contains("directories deep"),
            "it was not in the cache: {}",
            newest_log(&world)
        );
        let left: Vec<_> = cached(&world).into_iter().filter(|path| !path.ends_with("/lock")).collect();
        assert!(left.len() <= 1, "only the directory of a key may be left: {left:?}");
    }

    let world = debian(&[("/usr/bin/apt-get", DEEP), (WAIT, "")]);
    let mut child = bake(&world).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let work_of_a_bake = || cached(&world).into_iter().find(|path| path.contains("/b-"));
    while work_of_a_bake().is_none() {
        assert!(Instant::now() < deadline, "{}", newest_log(&world));
        pause(Duration::from_millis(10));
    }
    let (out, err) = world.expect(0, &["sweep", "--json"]);
    assert!(out.contains("\"caches\":[]"), "a running bake: {out}\n{err}");
    child.kill().unwrap();
    child.wait().unwrap();
    world.assert_no_traces("a killed bake");
    // The file system of the downloads has ended with oven. On a machine that cannot mount one, the steps write here.
    let work = work_of_a_bake().unwrap();
    let top = work.split_inclusive('/').scan(false, |is_past, part| {
        let is_first = !*is_past;
        *is_past |= part.starts_with("b-");
        is_first.then_some(part)
    });
    let script = format!("cd {} && {DEEP_TREE}", top.collect::<String>());
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    let (out, _) = world.expect(0, &["sweep", "--dry-run"]);
    assert!(out.contains("would remove ") && out.contains("/packages/b-"), "{out}");
    assert!(cached(&world).iter().any(|path| path.ends_with("/d/file")));
    let (out, err) = world.expect(0, &["sweep"]);
    assert!(out.contains("removed ") && out.contains("/packages/b-"), "{out}\n{err}");
    assert!(!cached(&world).iter().any(|path| path.contains("/b-")), "{:?}", cached(&world));
    let (_, err) = world.expect(0, &["sweep"]);
    assert!(err.contains("there are no leftovers of ended runs"), "{err}");
}

/// An apt-get of the base whose download does not end.
const ENDLESS: &str =
    "#!/bin/sh\ncase \"$*\" in *download-only*)\necho the download began\nsleep 1000;; esac\nexit 0\n";
/// An apt-get of the base that downloads so many files that copying them into the package cache takes seconds.
const MANY: &str = "#!/bin/sh\ncase \"$*\" in *download-only*)\ncd /var/cache/apt/archives || exit 1\n\
    i=0; while [ $i -lt 60000 ]; do echo $i > file.$i; i=$((i+1)); done;; esac\nexit 0\n";

/// How soon a bake ends is only checked with `--full`, because a busy machine may be slow.
#[test]
fn a_signal_ends_a_download_and_the_copy_into_the_package_cache() {
    for (what, apt) in [("the download began", ENDLESS), ("caching packages", MANY)] {
        let world = debian(&[("/usr/bin/apt-get", apt)]);
        let child = bake(&world).arg("-v").spawn().unwrap();
        let (pid, begun) = (Pid::from_raw(child.id() as i32), Instant::now());
        while !newest_log(&world).contains(what) {
            assert!(begun.elapsed() < Duration::from_secs(120), "no \"{what}\" in the log");
            pause(Duration::from_millis(5));
        }
        pause(Duration::from_millis(100));
        kill(pid, Signal::SIGTERM).unwrap();
        let stopped = Instant::now();
        let output = child.wait_with_output().unwrap();
        let (took, err) = (stopped.elapsed(), stderr(&output));
        println!("{what}: the bake ended {took:?} after the signal");
        assert!(!oven_testing::full() || took < STOP_MAX, "{what}: {took:?}");
        assert_eq!(output.status.code(), Some(130), "{what}: {err}");
        assert!(
            !newest_log(&world).contains("were added to the package cache"),
            "{what}: the copy had ended"
        );
        world.assert_no_traces(what);
        let left: Vec<_> = cached(&world).into_iter().filter(|path| !path.ends_with("/lock")).collect();
        let first = &left[..left.len().min(9)];
        assert!(left.len() <= 1, "{what}: only the directory of a key may be left: {first:?}");
    }
}

//! Bakes without a volume: blocks read, blocks sent. What is in the image, what was sent, and what is left, whatever
//! goes wrong and whoever is killed.

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use oven::cloud::local::Region;
use oven::ids::{BLOCK, SnapshotId};
use oven_testing::{ImageReader, LocalWorld, stderr, until};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Within which whatever was stopped has to be gone: ten seconds, and half as many for a busy machine.
const STOP: Duration = Duration::from_secs(15);
const DIRECT: [&str; 2] = ["--disks", "direct"];

/// A region with a small Debian that has apt.
fn small() -> LocalWorld {
    let base = std::env::var_os("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test root");
    let world = LocalWorld::empty();
    world.expect(0, &["import", base.to_str().unwrap(), "--name", "small"]);
    world
}

fn direct(world: &LocalWorld, code: i32, args: &[&str]) -> (String, String) {
    world.expect(code, &[&DIRECT, args].concat())
}

fn snapshot_of(world: &LocalWorld, ami: &str) -> String {
    let (out, _) = world.expect(0, &["--json", "images", "show", ami.trim()]);
    let object: serde_json::Value = serde_json::from_str(out.trim()).unwrap();
    object["snapshot"].as_str().unwrap().to_owned()
}

fn file(world: &LocalWorld, snapshot: &str) -> PathBuf {
    world.region().join("snapshots").join(format!("{snapshot}.img"))
}

/// The base's id.
fn base(world: &LocalWorld) -> String {
    world.expect(0, &["images", "list"]).0.split_whitespace().next().unwrap().to_owned()
}

/// Fails unless exactly the blocks were sent that differ.
fn assert_exact(world: &LocalWorld, base: &str, ami: &str) -> usize {
    let (old, new) = (snapshot_of(world, base), snapshot_of(world, ami));
    let open = |id: &str| File::open(file(world, id)).unwrap();
    let (old, new_file) = (open(&old), open(&new));
    let (mut differ, mut ours, mut theirs) = (BTreeSet::new(), vec![0; BLOCK], vec![0; BLOCK]);
    let length = new_file.metadata().unwrap().len();
    for index in 0..(length / BLOCK as u64) as u32 {
        let at = u64::from(index) * BLOCK as u64;
        theirs.fill(0);
        new_file.read_exact_at(&mut ours, at).unwrap();
        if at < old.metadata().unwrap().len() {
            old.read_exact_at(&mut theirs, at).unwrap();
        }
        if ours != theirs {
            differ.insert(index);
        }
    }
    let sent = Region::open(&world.region()).unwrap().put_blocks(&SnapshotId(new)).unwrap();
    assert_eq!(sent.into_keys().collect::<BTreeSet<_>>(), differ);
    differ.len()
}

fn assert_sound(disk: &ImageReader) {
    let (clean, report) = disk.fsck();
    assert!(clean, "{report}");
}

/// The one who serves a disk of this process.
fn server_of(parent: u32) -> Option<Pid> {
    let stat = |pid: &str| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let names = fs::read_dir("/proc").unwrap().flatten().map(|e| e.file_name().into_string().unwrap());
    let mut children = names.filter(|pid| pid.bytes().all(|b| b.is_ascii_digit())).filter(|pid| {
        let stat = stat(pid);
        let parent_of = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        parent_of == Some(parent) && command.starts_with(b"oven\0__disk\0")
    });
    children.next().map(|pid| Pid::from_raw(pid.parse().unwrap()))
}

#[test]
fn a_bake_is_the_same_as_by_a_volume_and_sends_what_differs() {
    let world = small();
    let toml =
        "from = { name = \"small\" }\npackages = [\"tree\"]\n[[file]]\nsource = \"f\"\ntarget = \"/etc/f\"\n";
    world.write("a/image.toml", toml);
    world.write("a/f", "text\n");
    let (ami, _) = direct(&world, 0, &["bake", "a"]);
    world.assert_no_traces("after the bake");
    let disk = ImageReader::of(&world, ami.trim());
    assert_sound(&disk);
    assert_eq!((disk.audit(), disk.read("/etc/f").as_deref()), (String::new(), Some("text\n")));
    assert!(disk.kind("/usr/bin/tree").is_some());
    let blocks = assert_exact(&world, &base(&world), &ami);
    assert!((2..200).contains(&blocks), "{blocks} blocks of 512 KiB for a small package");

    // Found again, by either way; and there is nothing but the cache.
    let files = world.files();
    assert_eq!(direct(&world, 0, &["bake", "a"]).0, ami);
    assert_eq!(world.expect(0, &["--disks", "attached", "bake", "a"]).0, ami);
    assert_eq!(files, world.files());
    assert!(!files.iter().any(|file| file.starts_with("volumes/") || file.starts_with("kept/")), "{files:?}");
    let (out, err) = direct(&world, 0, &["sweep", "--dry-run"]);
    assert!(out.is_empty() && err.contains("there are no leftovers of ended runs"), "{out}{err}");

    // A child of the child, on a larger disk.
    world.write("b/image.toml", "from = \"../a\"\n[disk]\nsize_gib = 2\n[[run]]\nscript = \"s.sh\"\n");
    world.write("b/s.sh", "#!/bin/sh\nset -e\nrm /etc/f; df -m / > /root/df\n");
    let (child, _) = direct(&world, 0, &["bake", "b"]);
    let disk = ImageReader::of(&world, child.trim());
    assert_sound(&disk);
    assert_eq!(disk.read("/etc/f"), None);
    let size: u64 = disk.read("/root/df").unwrap().split_whitespace().nth(8).unwrap().parse().unwrap();
    assert!(size > 1500, "{size} MiB of two GiB");
    assert_exact(&world, ami.trim(), &child);
    world.assert_no_traces("after the child");
}

#[test]
fn several_at_once_share_the_cache_and_do_not_mix() {
    let world = small();
    let names: Vec<String> = (0..3).map(|i| format!("image{i}")).collect();
    for name in &names {
        let file = format!("[[file]]\nsource = \"f\"\ntarget = \"/etc/{name}\"\n");
        world.write(&format!("{name}/image.toml"), &format!("from = {{ name = \"small\" }}\n{file}"));
        world.write(&format!("{name}/f"), name);
    }
    let base = base(&world);
    let all: Vec<&str> = ["bake", "--jobs", "3"].into_iter().chain(names.iter().map(|n| &**n)).collect();
    let (out, _) = direct(&world, 0, &all);
    world.assert_no_traces("after three at once");
    let caches = fs::read_dir(world.region().join("blocks")).unwrap().count();
    assert_eq!(caches, 1, "one base, one cache");
    for (line, name) in out.lines().zip(&names) {
        let (ami, _) = line.split_once('\t').unwrap();
        let disk = ImageReader::of(&world, ami);
        assert_sound(&disk);
        for other in &names {
            let expected = (other == name).then(|| name.clone());
            assert_eq!(disk.read(&format!("/etc/{other}")), expected, "{other} in {name}");
        }
        assert_exact(&world, &base, ami);
    }
}

#[test]
fn a_disk_is_kept_opened_again_and_swept() {
    let world = small();
    world.write("a/image.toml", "from = { name = \"small\" }\n[[run]]\nscript = \"s.sh\"\n");
    world.write("a/s.sh", "#!/bin/sh\necho evidence > /root/evidence\nexit 1\n");
    let (_, err) = direct(&world, 5, &["bake", "--keep-on-failure", "a"]);
    let run = err.split(" shell ").nth(1).expect(&err)[..8].to_owned();
    assert!(err.contains("--disks direct shell"), "{err}");
    world.assert_no_traces("kept");
    let (_, err) = world.expect(0, &["sweep"]);
    assert!(err.contains("--keep-on-failure"), "{err}");
    // However the next command gets its disks.
    let shell = |args: &[&str]| world.expect(0, &[&["shell", &run, "--"], args].concat()).0;
    assert_eq!(shell(&["cat", "/root/evidence"]), "evidence\n");
    shell(&["sh", "-c", "echo more >> /root/evidence"]);
    assert_eq!(shell(&["cat", "/root/evidence"]), "evidence\nmore\n");
    world.assert_no_traces("after the shells");
    world.expect(0, &["sweep", "--run", &run, "--kept"]);
    assert!(!world.files().iter().any(|f| f.starts_with("kept/")), "{:?}", world.files());
    world.expect(4, &["shell", &run, "--", "true"]);

    // Not kept: nothing is.
    direct(&world, 5, &["bake", "a"]);
    assert!(!world.files().iter().any(|f| f.starts_with("kept/")), "{:?}", world.files());
    let ami = base(&world);
    let snapshots = || {
        let files = world.files().into_iter().filter(|file| file.starts_with("snapshots/"));
        files.collect::<BTreeSet<_>>()
    };
    let before = snapshots();
    let (out, _) = direct(&world, 7, &["shell", &ami, "--", "sh", "-c", "id -u; touch /changed; exit 7"]);
    assert_eq!(out, "0\n");
    world.assert_no_traces("after a shell in an image");
    assert_eq!(snapshots(), before, "after a shell in an image");
}

#[test]
fn a_flipped_bit_in_the_cache_changes_nothing() {
    let world = small();
    let toml = |n| format!("name = \"i{n}\"\nfrom = {{ name = \"small\" }}\n[[run]]\nscript = \"s.sh\"\n");
    world.write(
        "a/s.sh",
        "#!/bin/sh\nfind /usr/bin /usr/lib /usr/share -type f -print0 | xargs -0 sha1sum | sha1sum > /root/sum\n",
    );
    let bake = |n: u32| {
        world.write("a/image.toml", &toml(n));
        let (ami, _) = direct(&world, 0, &["bake", "a"]);
        (ImageReader::of(&world, ami.trim()).read("/root/sum").unwrap(), ami)
    };
    let (sum, _) = bake(1);
    let snapshot = snapshot_of(&world, &base(&world));
    let path = world.region().join("blocks").join(&snapshot).join("data");
    let data = File::options().read(true).write(true).open(&path).unwrap();
    // One in every block.
    let mut flipped = 0;
    for index in 0..data.metadata().unwrap().len() / BLOCK as u64 {
        let (mut byte, at) = ([0], index * BLOCK as u64 + (index * 7919) % BLOCK as u64);
        data.read_exact_at(&mut byte, at).unwrap();
        data.write_all_at(&[byte[0] ^ 1 << (index % 8)], at).unwrap();
        flipped += 1;
    }
    assert!(flipped > 100, "{flipped} blocks in the cache");
    let (again, ami) = bake(2);
    assert_eq!(again, sum);
    assert_sound(&ImageReader::of(&world, ami.trim()));
    assert_exact(&world, &base(&world), &ami);
}

/// A bake of a script that waits to be released, once it began.
fn waiting(world: &LocalWorld) -> Child {
    world.write("a/image.toml", "from = { name = \"small\" }\n[[run]]\nscript = \"s.sh\"\n");
    world.write("a/s.sh", "#!/bin/sh\necho begun\nfor i in $(seq 6000); do ls -lR /usr > /root/list; done\n");
    let mut command = world.command(&["--disks", "direct", "bake", "-v", "a"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn().unwrap();
    until("the script", || {
        let logs = fs::read_dir(world.region().join("logs")).ok()?.flatten();
        logs.into_iter().find_map(|log| fs::read_to_string(log.path()).ok()?.contains("begun").then_some(()))
    });
    child
}

#[test]
fn the_one_who_serves_the_disk_is_killed() {
    let world = small();
    let bake = waiting(&world);
    let server = until("the one who serves", || server_of(bake.id()));
    // It has no rights, and nothing of ours to tell.
    let status = fs::read_to_string(format!("/proc/{server}/status")).unwrap();
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    assert!(fs::read(format!("/proc/{server}/environ")).unwrap_or_default().is_empty());
    // Nor our mounts, which its own end would have to undo.
    let mounts = fs::read_to_string(format!("/proc/{server}/mountinfo")).unwrap();
    assert!(mounts.lines().count() == 1 && mounts.contains(" / / ro"), "{mounts}");
    kill(server, Signal::SIGKILL).unwrap();
    let output = bake.wait_with_output().unwrap();
    let err = stderr(&output);
    assert_eq!(output.status.code(), Some(8), "{err}");
    assert!(err.contains("the process that serves the disk ended unexpectedly (signal: 9"), "{err}");
    world.assert_no_traces("after that");
    let files = world.files();
    assert_eq!(files.iter().filter(|f| f.starts_with("snapshots/")).count(), 2, "{files:?}");
}

#[test]
fn a_stop_at_the_terminal_and_a_kill_leave_nothing() {
    // The one who serves the disk may not answer at all.
    for (signal, answers) in [(Signal::SIGINT, true), (Signal::SIGKILL, true), (Signal::SIGINT, false)] {
        let world = small();
        let mut bake = waiting(&world);
        assert!(!world.loops().is_empty());
        let server = server_of(bake.id()).unwrap();
        if !answers {
            kill(server, Signal::SIGSTOP).unwrap();
        }
        let start = Instant::now();
        killpg(Pid::from_raw(bake.id() as i32), signal).unwrap();
        let status = bake.wait().unwrap();
        assert!(start.elapsed() < STOP, "{signal}: {:?}", start.elapsed());
        assert_eq!(status.code(), (signal == Signal::SIGINT).then_some(130), "{signal}");
        world.assert_no_traces(signal.as_str());
        world.expect(0, &["sweep"]);
        let files = world.files();
        assert_eq!(files.iter().filter(|f| f.starts_with("snapshots/")).count(), 2, "{signal}: {files:?}");
    }
}

#[test]
fn a_full_disk_of_this_machine_is_told_and_leaves_nothing() {
    let world = small();
    world.write("a/image.toml", "from = { name = \"small\" }\n[[run]]\nscript = \"s.sh\"\n");
    world.write("a/s.sh", "#!/bin/sh\ndd if=/dev/urandom of=/root/blob bs=1M count=300 conv=fsync\n");
    // A region with room for the base and its cache, and for little else, in a mount namespace of the bake's own.
    let script = "mount -t tmpfs -o size=\"$2\"m none \"$1/full\" && cp -a --sparse=always \"$1/region/.\" \"$1/full\" && \
                  \"$3\" --region-dir \"$1/full\" --disks direct bake a; code=$?; \
                  find \"$1/full\" -path '*/snapshots/*' -o -path '*/kept/*' -o -path '*/volumes/*'; exit $code";
    fs::create_dir(world.path("full")).unwrap();
    let used: u64 =
        world.files().iter().map(|f| world.region().join(f).metadata().unwrap().blocks() / 2048).sum();
    let size = (used * 2 + 150).to_string();
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .args([world.dir.path().to_str().unwrap(), &size, env!("CARGO_BIN_EXE_oven")])
        .current_dir(world.dir.path())
        .output()
        .unwrap();
    let err = stderr(&output);
    assert_eq!(output.status.code(), Some(8), "{err}");
    assert!(err.contains("No space left on device") && err.contains("Free some space"), "{err}");
    assert!(err.contains("/full/kept") || err.contains("/full/blocks"), "it says where: {err}");
    let left = String::from_utf8(output.stdout).unwrap();
    assert_eq!(left.lines().count(), 2, "the base's record and data alone: {left}");
    world.assert_no_traces("after that");
}

/// `oven`, in a mount namespace of its own where a script made `/dev` what it is.
fn in_a_container(world: &LocalWorld, script: &str, args: &[&str]) -> (Option<i32>, String, String) {
    let script = format!("set -e; {script}; dir=$1; shift; exec \"$0\" --region-dir \"$dir\" \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_oven")]);
    command.arg(world.region()).args(args).current_dir(world.dir.path());
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
}

#[test]
fn a_container_without_nodes_will_do_and_a_machine_without_fuse_says_so() {
    let world = small();
    world.write("a/image.toml", "from = { name = \"small\" }\n");
    let no_fuse = "mount --bind /dev/null /dev/fuse";
    let (code, _, err) = in_a_container(&world, no_fuse, &["--disks", "direct", "bake", "a"]);
    assert_eq!(code, Some(8), "{err}");
    assert!(err.contains("lacks  FUSE: the kernel refused a FUSE mount"), "{err}");
    let (code, out, err) = in_a_container(&world, no_fuse, &["doctor"]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("note   FUSE: bakes with disks = \"direct\" fail"), "{out}");
    assert_eq!(in_a_container(&world, no_fuse, &["--disks", "direct", "doctor"]).0, Some(8));
    let (code, out, err) = in_a_container(&world, "true", &["--disks", "direct", "doctor"]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("ok     FUSE") && out.contains("ok     a direct disk"), "{out}");

    let bare = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/zero c 1 5; \
                mknod -m 666 /dev/urandom c 1 9; mknod -m 666 /dev/random c 1 8";
    let (code, ami, err) = in_a_container(&world, bare, &["--disks", "direct", "bake", "a"]);
    assert_eq!(code, Some(0), "{err}");
    assert_sound(&ImageReader::of(&world, ami.trim()));
    world.assert_no_traces("after all that");
}

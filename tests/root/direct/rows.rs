//! Disks served by their blocks: rows D6, D9 and D10 of the faults; what the cache serves, whoever damages it; and how
//! much memory it all takes.

use oven::cloud::local::Region;
use oven::ids::BLOCK;
use oven::ids::SnapshotId;
use oven::ids::digest_of;
use oven_testing::direct::bake::{assert_only, assert_recovers, bake, command, expected, line, snapshot};
use oven_testing::disk::tree::tree;
use oven_testing::local_world::tiny_base;
use oven_testing::{Dice, LocalWorld, full, pause, seeds, stderr, until};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const SYSTEM: &str = "ID=nothing\n";
const ON_TINY: &str = "name = \"image\"\nfrom = { name = \"tiny\" }\n";

/// Bakes again what is baked already.
fn again(world: &LocalWorld) -> Output {
    command(world, "child", &[]).env("OVEN_TEST_FORCE", "1").output().unwrap()
}

fn image(output: &Output, what: &str) -> String {
    assert_eq!(output.status.code(), Some(0), "{what}: {}", stderr(output));
    line(output, "image").unwrap().to_owned()
}

/// A definition with a script, on the tiny image.
fn script(world: &LocalWorld, text: &str) {
    world.write("image/image.toml", &format!("{ON_TINY}[[run]]\nscript = \"s.sh\"\n"));
    world.write("image/s.sh", &format!("#!/bin/sh\nset -e\n{text}\n"));
}

fn block(raw: &Path, index: u32) -> Vec<u8> {
    let (mut data, file) = (vec![0; BLOCK], File::open(raw).unwrap());
    file.read_exact_at(&mut data, u64::from(index) * BLOCK as u64).unwrap();
    data
}

#[test]
fn d6_a_block_that_became_zero_is_written() {
    let text = "not zero\n".repeat(220_000);
    let world = LocalWorld::of("tiny", SYSTEM, &[("root/data", &text)]);
    script(&world, "busybox dd if=/dev/zero of=/root/data bs=64k count=30 conv=notrunc,fsync");
    let baked = image(&bake(&world, &[]), "zeros");
    let (id, data) = snapshot(&world, &baked);
    let whole = tree(&data);
    let zeros = digest_of(&vec![0; 30 << 16]);
    assert!(whole["root/data"].contains("1980000 bytes"), "{}", whole["root/data"]);
    let put = Region::open(&world.region()).unwrap().put_blocks(&SnapshotId(id)).unwrap();
    let became: Vec<u32> =
        put.iter().filter(|(_, digest)| **digest == digest_of(&[0; BLOCK])).map(|(i, _)| *i).collect();
    assert!(became.len() >= 2, "{:?}", put.keys());
    for index in became {
        assert!(block(&data, index).iter().all(|byte| *byte == 0), "block {index}");
    }
    // What the file holds now, as the file system has it.
    let dump = world.path("dump");
    let request = format!("dump /root/data {}", dump.display());
    assert!(Command::new("debugfs").args(["-R", &request]).arg(&data).status().unwrap().success());
    let content = fs::read(dump).unwrap();
    assert_eq!(digest_of(&content[..30 << 16]), zeros);
    assert_eq!(&content[30 << 16..], &text.as_bytes()[30 << 16..]);
    world.assert_no_traces("zeros");
}

/// Its snapshot was started before its steps.
#[test]
fn d8_a_bake_may_take_longer_than_the_cloud_waits_for_a_block() {
    let world = LocalWorld::tiny();
    script(&world, "busybox sleep 4; echo late > /root/data");
    let baked = command(&world, "child", &[]).env("OVEN_TEST_PATIENCE", "3000").output().unwrap();
    let (_, data) = snapshot(&world, &image(&baked, "late"));
    assert!(tree(&data).contains_key("root/data"), "{:?}", tree(&data).keys());
    assert_only(&world, 2, "late");
    world.assert_no_traces("late");
}

#[test]
fn d9_a_full_disk_of_this_machine_is_told_and_leaves_nothing() {
    // Full with the cache; with what is written; and in the middle of either.
    for kib in [1024, 2600, 5200] {
        let (world, what) = (LocalWorld::tiny(), format!("{kib} KiB"));
        script(&world, "busybox dd if=/dev/urandom of=/root/data bs=64k count=40 conv=fsync");
        fs::create_dir(world.path("state")).unwrap();
        let bake = command(&world, "child", &[]);
        let script = format!("mount -t tmpfs -o size={kib}k none state && exec \"$@\"");
        let mut small = Command::new("unshare");
        small.args(["--mount", "sh", "-c", &script, "sh"]).arg(bake.get_program()).args(bake.get_args());
        small.env("OVEN_TEST_DIRECT", "child").env("OVEN_TEST_STATE", world.path("state"));
        let output = small.current_dir(world.dir.path()).output().unwrap();
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(8), "{what}: {told}");
        assert!(
            told.contains("No space left on device") && told.contains("Free some space"),
            "{what}: {told}"
        );
        assert!(told.contains("/state/"), "it says where: {told}");
        world.assert_no_traces(&what);
        assert_only(&world, 1, &what);
        world.write("image/image.toml", ON_TINY);
        fs::remove_file(world.path("image/s.sh")).unwrap();
        assert_recovers(&world, 2, &what);
    }
}

#[test]
fn d10_a_disk_may_be_larger_than_its_parent_and_not_smaller() {
    let world = LocalWorld::tiny();
    world.write("image/image.toml", &format!("{ON_TINY}[disk]\nsize_gib = 2\n"));
    let baked = image(&bake(&world, &[]), "larger");
    let (id, data) = snapshot(&world, &baked);
    assert_eq!(data.metadata().unwrap().len(), 2 << 30);
    let mut whole = tree(&data);
    // A file system that grew keeps the same files.
    let lost = |tree: &mut BTreeMap<String, String>| _ = tree.remove("lost+found");
    let mut before = expected().clone();
    lost(&mut whole);
    lost(&mut before);
    assert_eq!(whole, before);
    let record = fs::read_to_string(world.region().join(format!("snapshots/{id}.json"))).unwrap();
    assert!(record.contains("\"parent\""), "{record}");
    // On that one, of two GiB, none of one.
    let smaller = format!("name = \"smaller\"\nfrom = \"{baked}\"\n[disk]\nsize_gib = 1\n");
    world.write("image/image.toml", &smaller);
    let refused = bake(&world, &[]);
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("less than the 2 GiB"), "{}", stderr(&refused));
    assert_only(&world, 2, "smaller");
    world.assert_no_traces("sizes");
}

#[test]
fn d10_the_last_block_of_a_base_may_be_a_part_of_one() {
    let world = LocalWorld::empty();
    let raw = world.path("odd.raw");
    fs::copy(tiny_base(), &raw).unwrap();
    let end = b"the end of the disk";
    File::options().write(true).open(&raw).unwrap().write_all_at(end, (8 << 20) + 5).unwrap();
    world.expect(0, &["import", raw.to_str().unwrap(), "--name", "tiny"]);
    world.write("image/image.toml", ON_TINY);
    for mode in ["child", "whole"] {
        let output = command(&world, mode, &[]).env("OVEN_TEST_FORCE", "1").output().unwrap();
        let (_, data) = snapshot(&world, &image(&output, mode));
        let mut last = vec![0; BLOCK];
        last[5..5 + end.len()].copy_from_slice(end);
        assert!(block(&data, 16) == last, "{mode}: padded with zeros");
        assert_eq!(&tree(&data), expected(), "{mode}");
    }
    world.assert_no_traces("odd");
}

/// Files of the cache.
fn cache(world: &LocalWorld) -> Vec<PathBuf> {
    let files = world.files().into_iter().filter(|file| file.starts_with("blocks/"));
    files.map(|file| world.region().join(file)).collect()
}

/// Flips a bit, or cuts the end off.
fn damage(path: &Path, dice: &mut Dice) -> String {
    let mut bytes = fs::read(path).unwrap();
    if bytes.is_empty() {
        return format!("{} is empty", path.display());
    }
    let at = dice.roll(bytes.len());
    if dice.roll(8) == 0 {
        File::options().write(true).open(path).unwrap().set_len(at as u64).unwrap();
        return format!("{} cut at {at}", path.display());
    }
    // Not by a new file: who has it open sees it.
    bytes[at] ^= 1 << dice.roll(8);
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&bytes[at..=at], at as u64).unwrap();
    format!("{} at {at}", path.display())
}

#[test]
fn a_cache_that_is_damaged_serves_nothing_wrong() {
    let world = LocalWorld::tiny();
    image(&bake(&world, &[]), "cold");
    // What was to be read ahead may not be there yet when a bake ends.
    let warm = (0..20).map(|_| again(&world)).find(|warm| line(warm, "reads") == Some("0"));
    assert!(warm.is_some(), "something is read each time");
    for seed in seeds(60, 4, 4) {
        let mut dice = Dice(seed);
        let files = cache(&world);
        assert!(files.len() >= 4, "data, digests, contents, used: {files:?}");
        let damaged: Vec<_> =
            (0..1 + dice.roll(40)).map(|_| damage(&files[dice.roll(files.len())], &mut dice)).collect();
        let what = format!("OVEN_TEST_SEED={seed}: {damaged:#?}");
        let baked = image(&again(&world), &what);
        assert_eq!(&tree(&snapshot(&world, &baked).1), expected(), "{what}");
    }
    world.assert_no_traces("a damaged cache");
}

#[test]
fn what_is_damaged_while_a_bake_is_at_work_is_not_served() {
    let text = "something\n".repeat(200_000);
    let world = LocalWorld::of("tiny", SYSTEM, &[("root/data", &text)]);
    // Warm; nobody reads the file in this bake, nor ahead of need in the next.
    image(&bake(&world, &[]), "cold");
    let fill = command(&world, "whole", &[]).env("OVEN_TEST_FORCE", "1").output().unwrap();
    image(&fill, "all blocks are in the cache");
    let content = |path: &PathBuf| path.ends_with("data").then(|| fs::read(path).unwrap());
    let (path, data) =
        cache(&world).into_iter().find_map(|path| Some((path.clone(), content(&path)?))).unwrap();
    let place = |needle: &[u8]| data.windows(needle.len()).position(|window| window == needle).unwrap();
    let begins = place(b"something\nsomething\nsomething\n");
    // Blocks that lie within the file as a whole: no bake has a reason to touch them before the script reads it.
    let inner = (begins / BLOCK + 2) * BLOCK + 17;
    script(
        &world,
        "echo begun\n\
         while [ ! -e /root/go ] && [ $((n = ${n:-0} + 1)) -lt 200 ]; do busybox usleep 10000; done\n\
         busybox sha256sum /root/data > /root/sum",
    );
    let mut child =
        command(&world, "child", &[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("the script", || {
        let logs = fs::read_dir(world.region().join("logs")).unwrap().flatten();
        let mut texts = logs.filter_map(|log| fs::read_to_string(log.path()).ok());
        texts.any(|text| text.contains("begun")).then_some(())
    });
    assert!(child.try_wait().unwrap().is_none(), "it is at work");
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[data[inner] ^ 4], inner as u64).unwrap();
    let output = child.wait_with_output().unwrap();
    let baked = image(&output, "damaged at work");
    let whole = tree(&snapshot(&world, &baked).1);
    let sum =
        Command::new("sh").args(["-c", "sha256sum"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut sum = sum.unwrap();
    std::io::Write::write_all(&mut sum.stdin.take().unwrap(), text.as_bytes()).unwrap();
    let sum = String::from_utf8(sum.wait_with_output().unwrap().stdout).unwrap();
    let line = format!("{}  /root/data\n", sum.split_whitespace().next().unwrap());
    let digest = format!("{:02x?}", &digest_of(line.as_bytes())[..6]);
    assert!(whole["root/sum"].contains(&digest), "{} {line}", whole["root/sum"]);
    world.assert_no_traces("damaged at work");
}

#[test]
fn a_step_that_tries_to_write_into_the_cache_changes_nothing() {
    let world = LocalWorld::tiny();
    image(&bake(&world, &[]), "cold");
    let held = |world: &LocalWorld| -> BTreeMap<PathBuf, Vec<u8>> {
        let kept =
            cache(world).into_iter().filter(|path| path.ends_with("data") || path.ends_with("digests"));
        kept.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
    };
    let before = held(&world);
    let dir = world.region().join("blocks");
    script(
        &world,
        &format!(
            "set +e\n\
             for dir in {0} /proc/1/root{0} /proc/1/cwd /proc/self/root{0} /../..{0}; do\n\
               busybox find $dir -type f 2>/dev/null | while read f; do echo broken > $f; done\n\
             done\n\
             for fd in /proc/*/fd/*; do case $fd in */fd/[012]) ;; *) echo broken >> $fd ;; esac; done 2>/dev/null\n\
             for node in 0 1 2 3 4 5 6 7; do busybox mknod /tmp/n b 7 $node && echo broken > /tmp/n; busybox rm -f /tmp/n; done 2>/dev/null\n\
             busybox mknod /tmp/f c 10 229 && echo broken > /tmp/f; busybox rm -f /tmp/f\n\
             true",
            dir.display()
        ),
    );
    image(&bake(&world, &[]), "a hostile step");
    let after = held(&world);
    for (path, bytes) in &before {
        // Blocks may have come; of those that were there nothing changed.
        let now = &after[path];
        let same = bytes.iter().zip(now).all(|(old, new)| old == new || *old == 0);
        assert!(now.len() >= bytes.len() && same, "{}", path.display());
    }
    world.write("image/image.toml", ON_TINY);
    fs::remove_file(world.path("image/s.sh")).unwrap();
    let next = again(&world);
    assert_eq!(&tree(&snapshot(&world, &image(&next, "the next")).1), expected());
    world.assert_no_traces("a hostile step");
}

/// MiB that a process and its children had at most, each at its own time, by name.
fn peak(pid: u32, seen: &mut BTreeMap<u32, (String, u64)>) {
    let read = |pid: u32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let status = read(pid, "status");
    let field = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
    let kib = field("VmHWM:").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    // A step's own programs are the image's, and no part of oven.
    let command = read(pid, "cmdline");
    if let Some(kib) = kib
        && (command.contains("oven-test-bake") || command.contains("oven\0__"))
    {
        let entry = seen.entry(pid).or_default();
        *entry = (command.split('\0').nth(1).unwrap_or_default().to_owned(), entry.1.max(kib));
    }
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: BTreeSet<u32> = children
        .flat_map(|pids| pids.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    children.into_iter().for_each(|child| peak(child, seen));
}

#[test]
fn memory_stays_small_however_much_there_is() {
    // What a bug would hold of it shows with the sample, too.
    let (mib, most) = if full() { (1536, 256) } else { (320, 192) };
    let world = LocalWorld::empty();
    let tree_dir = tempfile::tempdir_in(world.dir.path()).unwrap();
    for dir in ["bin", "etc", "usr/sbin", "var/log", "proc", "sys", "dev", "run", "tmp", "root"] {
        fs::create_dir_all(tree_dir.path().join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", tree_dir.path().join("bin/busybox")).unwrap();
    for applet in ["sh", "mkdir", "cat"] {
        std::os::unix::fs::symlink("busybox", tree_dir.path().join("bin").join(applet)).unwrap();
    }
    fs::write(tree_dir.path().join("etc/os-release"), SYSTEM).unwrap();
    fs::write(tree_dir.path().join("etc/resolv.conf"), "").unwrap();
    let mut random = std::io::Read::take(File::open("/dev/urandom").unwrap(), mib << 20);
    std::io::copy(&mut random, &mut File::create(tree_dir.path().join("root/data")).unwrap()).unwrap();
    let raw = world.path("large.raw");
    File::create(&raw).unwrap().set_len(8 << 30).unwrap();
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-E", "lazy_itable_init=1", "-d"]).arg(tree_dir.path()).arg(&raw);
    assert!(mkfs.status().unwrap().success());
    drop(tree_dir);
    world.expect(0, &["import", raw.to_str().unwrap(), "--name", "tiny"]);
    fs::remove_file(&raw).unwrap();
    // It reads all of it, writes as much again, and sends both.
    script(&world, "cat /root/data > /root/more");
    let mut child =
        command(&world, "whole", &[]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (mut seen, begun) = (BTreeMap::new(), Instant::now());
    while child.try_wait().unwrap().is_none() {
        peak(child.id(), &mut seen);
        pause(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let baked = image(&output, "large");
    let names: Vec<_> = seen.values().map(|(name, kib)| format!("{name}: {} MiB", kib >> 10)).collect();
    let sum = seen.values().map(|(_, kib)| kib).sum::<u64>() >> 10;
    println!("{mib} MiB read and written in {:?}: {sum} MiB in all ({})", begun.elapsed(), names.join(", "));
    assert!(seen.values().any(|(name, _)| name == oven::disk::direct::server::SERVER_VERB), "{names:?}");
    assert!(sum < most, "{sum} MiB: {names:?}");
    let (id, _) = snapshot(&world, &baked);
    let put = Region::open(&world.region()).unwrap().put_blocks(&SnapshotId(id)).unwrap();
    assert!(put.len() as u64 > mib * 2 * 2, "{} blocks", put.len());
    world.assert_no_traces("large");
}

//! Disks go into a region and out of it again, without root: what is left is compared with what went in.

#![allow(clippy::disallowed_methods, reason = "a test has no runtime to block")]

use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const BLOCK: u64 = 512 << 10;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
        command.env_clear().env("OVEN_REGION_DIR", "region").current_dir(&self.0).args(args);
        command
    }

    fn expect(&self, code: i32, args: &[&str]) -> (String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&stdout), text(&stderr));
        assert_eq!(status.code(), Some(code), "oven {args:?}\n{out}\n{err}");
        (out, err)
    }

    /// The result object.
    fn json(&self, code: i32, args: &[&str]) -> Value {
        let (out, _) = self.expect(code, &[&["--json"], args].concat());
        serde_json::from_str(out.lines().last().unwrap()).unwrap()
    }

    /// A disk with a file system's mark and some blocks of data.
    fn raw(&self, name: &str, size: u64, blocks: impl IntoIterator<Item = u64>) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        // Enough of an ext4 to be taken for one.
        let blocks_of_disk = (size / 4096) as u32;
        for (offset, bytes) in
            [(1080, &[0x53, 0xef][..]), (1024 + 96, &[0x40, 0, 0, 0]), (1024 + 24, &[2, 0, 0, 0])]
        {
            file.write_all_at(bytes, offset).unwrap();
        }
        file.write_all_at(&blocks_of_disk.to_le_bytes(), 1024 + 4).unwrap();
        // No two pages of it are alike.
        let mut data = vec![1; BLOCK as usize];
        for index in blocks {
            for page in 0..BLOCK / 4096 {
                let at = (page * 4096) as usize;
                data[at..at + 16].copy_from_slice(&[index.to_le_bytes(), page.to_le_bytes()].concat());
            }
            file.write_all_at(&data, index * BLOCK).unwrap();
        }
        path
    }

    fn files(&self) -> Vec<String> {
        let all = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = all.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn in_region(&self, kind: &str) -> usize {
        fs::read_dir(self.path("region").join(kind)).map_or(0, Iterator::count)
    }
}

/// The same bytes, and zeros beyond the shorter one.
fn assert_same(left: &Path, right: &Path) {
    let (left, right) = (File::open(left).unwrap(), File::open(right).unwrap());
    let end = left.metadata().unwrap().len().max(right.metadata().unwrap().len());
    let mut buffers = [vec![0; 4 << 20], vec![0; 4 << 20]];
    for at in (0..end).step_by(buffers[0].len()) {
        for (file, buffer) in [&left, &right].into_iter().zip(&mut buffers) {
            let mut done = 0;
            while let n @ 1.. = file.read_at(&mut buffer[done..], at + done as u64).unwrap() {
                done += n;
            }
            buffer[done..].fill(0);
        }
        assert!(buffers[0] == buffers[1], "they differ in the 4 MiB at {at}");
    }
}

#[test]
fn what_was_imported_is_exported_again_sparse_and_whole() {
    let place = Place::new();
    let raw = place.raw("disk.raw", (1 << 30) - 4096, [3, 4, 900]);
    let (ami, err) = place.expect(0, &["import", "disk.raw", "--name", "base", "--verify"]);
    assert!(err.contains("verifying snap-"), "{err}");
    let told = place.json(0, &["export", ami.trim(), "out.raw"]);
    assert_eq!((told["file"].as_str(), told["size_gib"].as_u64()), (Some("out.raw"), Some(1)));
    let snapshot = told["snapshot_id"].as_str().unwrap().to_owned();
    let out = place.path("out.raw");
    assert_same(&raw, &out);
    let metadata = fs::metadata(&out).unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    assert!(metadata.blocks() * 512 < 4 * BLOCK, "{} bytes on the disk", metadata.blocks() * 512);
    assert_eq!(told["bytes_on_disk"].as_u64(), Some(metadata.blocks() * 512));

    // A second one, and what is in the way.
    let (_, err) = place.expect(2, &["export", &snapshot, "out.raw"]);
    assert!(err.contains("out.raw already exists") && err.contains("--force"), "{err}");
    fs::write(&out, "mine").unwrap();
    place.expect(0, &["export", "--force", &snapshot, "out.raw"]);
    assert_same(&raw, &out);
    fs::create_dir(place.path("dir")).unwrap();
    std::os::unix::fs::symlink("elsewhere", place.path("link")).unwrap();
    for (code, what, file, words) in [
        (2, snapshot.as_str(), "dir", "is not a regular file"),
        (2, &snapshot, "link", "is not a regular file"),
        (2, &snapshot, "gone/out.raw", "gone is not a directory"),
        (2, "base", "new.raw", "is not a valid id of an image (ami-…) or a snapshot (snap-…)"),
        (4, "ami-0123456789abcdef0", "new.raw", "ami-0123456789abcdef0"),
        (4, "snap-0123456789abcdef0", "new.raw", "snap-0123456789abcdef0"),
    ] {
        let (_, err) = place.expect(code, &["export", "--force", what, file]);
        assert!(err.contains(words), "{what} {file}: {err}");
    }
    assert_eq!(place.files(), ["dir", "disk.raw", "link", "out.raw", "region"]);
}

#[test]
fn an_exported_disk_and_a_region_are_private_whatever_the_umask_is() {
    let place = Place::new();
    place.raw("disk.raw", 1 << 20, [1]);
    for mask in ["0000", "0022", "0077", "0377"] {
        let oven = |args: &str| {
            let script = format!("umask {mask}; exec {} {args}", env!("CARGO_BIN_EXE_oven"));
            let mut sh = Command::new("sh");
            sh.args(["-c", &script]).env("OVEN_REGION_DIR", mask).current_dir(&place.0);
            let ended = sh.output().unwrap();
            assert!(ended.status.success(), "{args}: {}", String::from_utf8_lossy(&ended.stderr));
            String::from_utf8(ended.stdout).unwrap().trim().to_owned()
        };
        if mask != "0377" || rustix::process::geteuid().is_root() {
            let ami = oven("import disk.raw --name base");
            oven(&format!("export {ami} {mask}.raw"));
            let exported = fs::metadata(place.path(&format!("{mask}.raw"))).unwrap();
            assert_eq!(exported.permissions().mode() & 0o777, 0o600, "{mask}");
            assert_private(&place.path(mask));
        }
    }
}

fn assert_private(path: &Path) {
    let found = path.symlink_metadata().unwrap();
    let others = found.permissions().mode() & 0o077;
    assert!(others == 0 && !found.is_symlink(), "{}: {others:o}", path.display());
    if found.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| assert_private(&entry.unwrap().path()));
    }
}

#[test]
fn what_a_disk_of_the_region_lost_is_seen() {
    let place = Place::new();
    place.raw("disk.raw", 8 << 20, [3, 9]);
    let result = place.json(0, &["import", "disk.raw", "--name", "base"]);
    let snapshot = result["snapshot_id"].as_str().unwrap();
    let data = place.path(&format!("region/snapshots/{snapshot}.img"));
    let data = File::options().write(true).open(data).unwrap();
    data.write_all_at(b"?", 9 * BLOCK + 77).unwrap();
    let again = ["import", "disk.raw", "--name", "base", "--verify"];
    let (_, err) = place.expect(6, &again);
    assert!(err.contains(&format!("block 9 of {snapshot} differs from the uploaded block")), "{err}");
    assert!(!err.contains("made from another disk"), "the name is not the reason: {err}");
    // It was there before: whose it is decides.
    assert_eq!((place.in_region("images"), place.in_region("snapshots")), (1, 2));
    data.write_all_at(&[0; 4096], 9 * BLOCK).unwrap();
    data.write_all_at(b"?", 5 * BLOCK).unwrap();
    let (_, err) = place.expect(6, &again);
    // Which block is compared first is open.
    assert!(err.contains(" differs from "), "{err}");
}

#[test]
fn flags_are_checked_before_anything_is_read() {
    let place = Place::new();
    place.raw("disk.raw", 8 << 20, [3]);
    let import = ["import", "disk.raw", "--name", "base"];
    place.expect(2, &[&import[..], &["--boot-mode", "bios"]].concat());
    let (_, err) =
        place.expect(2, &[&import[..], &["--arch", "arm64", "--boot-mode", "legacy-bios"]].concat());
    assert!(err.contains("--boot-mode") && err.contains("can boot only with uefi"), "{err}");
    assert_eq!(place.in_region("images"), 0);
    place.expect(0, &[&import[..], &["--boot-mode", "uefi"]].concat());
}

/// The most memory that a program ever had, in MiB.
fn peak(mut command: Command) -> u64 {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        // The last look before it ends is at most a millisecond old.
        let text = fs::read_to_string(&status).unwrap_or_default();
        let told = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = peak.max(told.map_or(0, |told| told.parse::<u64>().unwrap()) >> 10);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return peak;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn four_gibibytes_take_little_memory() {
    let place = Place::new();
    // A fourteenth of it is data: 293 MiB.
    place.raw("disk.raw", 4 << 30, (1..8192).step_by(14));
    let imported = peak(place.command(&["import", "disk.raw", "--name", "base", "--verify"]));
    let (ids, _) = place.expect(0, &["images", "list", "base"]);
    let id = ids.split(' ').next().unwrap();
    let exported = peak(place.command(&["export", id, "out.raw"]));
    assert!((1..256).contains(&imported), "importing took {imported} MiB");
    assert!((1..256).contains(&exported), "exporting took {exported} MiB");
    let (again, _) = place.expect(0, &["import", "out.raw", "--name", "base"]);
    assert_eq!(again.trim(), id, "it is the same disk");
}

/// Runs a script with `$OVEN` and the region.
fn sh(place: &Place, script: &str) -> Output {
    let mut sh = Command::new("bash");
    sh.args(["-o", "pipefail", "-c", script]).env("OVEN", env!("CARGO_BIN_EXE_oven"));
    sh.env("OVEN_REGION_DIR", "region").env("TMPDIR", ".").current_dir(&place.0).output().unwrap()
}

fn err_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_disk_is_exported_to_standard_output() {
    let place = Place::new();
    let raw = place.raw("disk.raw", 1 << 30, [3, 4, 900, 2047]);
    let (ami, _) = place.expect(0, &["import", "disk.raw", "--name", "base"]);
    let ami = ami.trim();
    fs::write(place.path("longer"), vec![7; (1 << 20) + 1]).unwrap();
    let (size, sparse) = (1 << 30, true);
    for (script, file, end, is_sparse) in [
        ("$OVEN export AMI - > file", "file", size, sparse),
        // The next program begins after the disk.
        ("{ $OVEN export AMI -; echo end; } > two", "two", size + 4, sparse),
        ("$OVEN export AMI - | cat > piped", "piped", size, false),
        ("$OVEN export AMI - >> appended", "appended", size, false),
        // What follows the disk in an old file stays, as with `cat`.
        ("$OVEN export AMI - 1<> longer", "longer", size, false),
    ] {
        let output = sh(&place, &script.replace("AMI", ami));
        assert!(output.status.success(), "{script}: {}", err_of(&output));
        assert!(output.stdout.is_empty(), "{script}");
        let path = place.path(file);
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), end, "{script}");
        assert_eq!(metadata.blocks() * 512 < 6 * BLOCK, is_sparse, "{script}: {}", metadata.blocks());
        if end == size {
            assert_same(&raw, &path);
        }
        fs::remove_file(path).unwrap();
    }
    assert_eq!(place.files(), ["disk.raw", "region"], "no file is named -");
}

#[test]
fn a_disk_that_standard_output_does_not_take_is_a_failure() {
    let place = Place::new();
    place.raw("disk.raw", 1 << 30, [3, 900]);
    let (ami, _) = place.expect(0, &["import", "disk.raw", "--name", "base"]);
    let export = |end: &str| sh(&place, &format!("AMI={}; $OVEN export $AMI - {end}", ami.trim()));
    for (end, code, words) in [
        ("> /dev/full", 8, "No space left on device"),
        ("> /dev/full", 8, "to which standard output is redirected, or redirect it to another disk"),
        ("--json", 2, "--json needs standard output"),
        // A file that must not become larger. It is made sparse, or it is appended to.
        (
            "> out; (ulimit -f 8; trap '' XFSZ; $OVEN export $AMI - > out)",
            8,
            "or redirect it to another disk",
        ),
        (
            "> out; (ulimit -f 8; trap '' XFSZ; $OVEN export $AMI - >> out)",
            8,
            "or redirect it to another disk",
        ),
        ("> out; (ulimit -f 8; trap '' XFSZ; $OVEN export $AMI new)", 8, "or choose another directory"),
    ] {
        let output = export(end);
        // With --json, the error is in the stream.
        let text = err_of(&output) + &String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(code), "{end}: {text}");
        assert!(text.contains(words), "{end}: {text}");
    }
    let output = export("| head -c 4096 > head");
    assert_eq!(output.status.code(), Some(8), "{}", err_of(&output));
    assert!(err_of(&output).contains("ended before it had read the whole disk"), "{}", err_of(&output));
    assert_eq!(fs::metadata(place.path("head")).unwrap().len(), 4096);
}

/// A file of the full length would look complete.
#[test]
fn an_export_that_is_stopped_leaves_no_disk() {
    let place = Place::new();
    place.raw("disk.raw", 4 << 30, (1..8192).step_by(14));
    let (ami, _) = place.expect(0, &["import", "disk.raw", "--name", "base"]);
    let script = "rm -f cut; $OVEN export AMI - > cut & until [ -s cut ] || ! kill -0 $!; do :; done; kill -TERM $!; wait $!";
    // An export may end before the signal arrives.
    let mut stopped = (0..20).map(|_| sh(&place, &script.replace("AMI", ami.trim())));
    let output = stopped.find(|output| !output.status.success()).expect("no export was stopped");
    assert!(err_of(&output).contains("received SIGTERM"), "{}", err_of(&output));
    let (_, err) = place.expect(2, &["import", "cut", "--name", "x"]);
    assert!(
        err.contains("is empty") || err.contains("is not a disk") || err.contains("is truncated"),
        "{err}"
    );
}

#[test]
fn a_disk_is_imported_from_standard_input() {
    let place = Place::new();
    place.raw("disk.raw", (1 << 30) - 4096, [3, 4, 900]);
    let (ami, _) = place.expect(0, &["import", "disk.raw", "--name", "base"]);
    let before = place.files();
    // All of them are the same disk as the file's.
    for script in [
        "$OVEN import - --name base < disk.raw",
        "cat disk.raw | $OVEN import - --name base",
        "(echo skipped; cat disk.raw) > with-line; { read line; $OVEN import - --name base; } < with-line; \
         rm with-line",
        "cat disk.raw | $OVEN import - --name base --verify",
    ] {
        let output = sh(&place, script);
        assert!(output.status.success(), "{script}: {}", err_of(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout), ami, "{script}");
    }
    let output = sh(&place, "cat disk.raw | $OVEN import - --name other --verify");
    assert!(output.status.success(), "{}", err_of(&output));
    for step in ["copying standard input", "importing standard input"] {
        assert!(err_of(&output).contains(step), "{}", err_of(&output));
    }
    let other = String::from_utf8_lossy(&output.stdout).into_owned();
    place.expect(0, &["export", other.trim(), "out.raw"]);
    assert_same(&place.path("disk.raw"), &place.path("out.raw"));
    fs::remove_file(place.path("out.raw")).unwrap();

    let images = place.in_region("images");
    for (script, code, words) in [
        ("true | $OVEN import - --name x", 2, "standard input is empty"),
        (
            r"printf 'QFI\373%01000d' 0 | $OVEN import - --name x",
            2,
            "`qemu-img convert -O raw FILE disk.raw`",
        ),
        ("head -c 9999 /dev/zero | $OVEN import - --name x", 2, "standard input is not a disk"),
        ("head -c 1M disk.raw | $OVEN import - --name x", 2, "standard input is truncated: 1072689152 bytes"),
        ("cat disk.raw | TMPDIR=gone $OVEN import - --name x", 8, "gone"),
        ("cat disk.raw | TMPDIR=/nonexist $OVEN import - --name x", 8, "Set TMPDIR to a directory in which"),
        ("cat disk.raw | TMPDIR=/proc $OVEN import - --name x", 8, "Set TMPDIR to a directory in which"),
    ] {
        let output = sh(&place, script);
        assert_eq!(output.status.code(), Some(code), "{script}: {}", err_of(&output));
        assert!(err_of(&output).contains(words), "{script}: {}", err_of(&output));
    }
    assert_eq!((place.files(), place.in_region("images")), (before, images));
}

#[test]
fn a_truncated_disk_is_refused_with_the_number_of_missing_bytes() {
    let place = Place::new();
    let mib = 1 << 20;
    // A GPT whose backup is in the last sector of 64 MiB.
    let gpt = File::create(place.path("gpt.raw")).unwrap();
    gpt.set_len(64 * mib).unwrap();
    let mut header = [0; 92];
    for (at, value) in [(0, u64::from_le_bytes(*b"EFI PART")), (24, 1), (32, 64 * mib / 512 - 1), (72, 2)] {
        header[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    header[12] = 92;
    let mut sum = flate2::Crc::new();
    sum.update(&header);
    header[16..20].copy_from_slice(&sum.sum().to_le_bytes());
    let protective = [0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0xff, 1, 0];
    for (at, bytes) in [(446, &protective[..]), (510, &[0x55, 0xaa]), (512, &header)] {
        gpt.write_all_at(bytes, at).unwrap();
    }
    // An MBR with a partition from 1 MiB to 64 MiB.
    let mbr = File::create(place.path("mbr.raw")).unwrap();
    mbr.set_len(64 * mib).unwrap();
    let sectors = (63 * mib / 512) as u32;
    let entry =
        [&[0x80, 0, 0, 0, 0x83, 0, 0, 0], &2048u32.to_le_bytes()[..], &sectors.to_le_bytes()].concat();
    for (at, bytes) in [(446, &entry[..]), (510, &[0x55, 0xaa])] {
        mbr.write_all_at(bytes, at).unwrap();
    }
    // File systems without a table.
    place.raw("ext4.raw", 64 * mib, [3]);
    let xfs = File::create(place.path("xfs.raw")).unwrap();
    xfs.set_len(64 * mib).unwrap();
    let blocks = (64 * mib / 4096).to_be_bytes();
    for (at, bytes) in [(0, &b"XFSB"[..]), (4, &4096u32.to_be_bytes()), (8, &blocks)] {
        xfs.write_all_at(bytes, at).unwrap();
    }
    for (name, source) in [("gpt", "GPT"), ("mbr", "MBR"), ("ext4", "ext4"), ("xfs", "xfs")] {
        let file = format!("{name}.raw");
        let raw = File::options().write(true).open(place.path(&file)).unwrap();
        for length in [64 * mib - 1, 32 * mib, 4096] {
            raw.set_len(length).unwrap();
            let (_, err) = place.expect(2, &["import", &file, "--name", name]);
            let words = format!(
                "{file} is truncated: {} bytes are missing. Its {source} is for a disk of {} bytes, but it has only \
                 {length} bytes",
                64 * mib - length,
                64 * mib
            );
            assert!(err.contains(&words), "{name} {length}: {err}");
            assert!(err.contains("Copy or download the disk image again."), "{err}");
            assert!(!place.path("region").exists());
        }
    }
    for name in ["gpt", "mbr", "ext4", "xfs"] {
        let file = format!("{name}.raw");
        File::options().write(true).open(place.path(&file)).unwrap().set_len(64 * mib).unwrap();
        place.expect(0, &["import", &file, "--name", name]);
    }
}

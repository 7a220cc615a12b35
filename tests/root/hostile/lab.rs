//! Bakes of packages that misbehave: what they are made of, and what is looked at when they were baked.

use super::host::Host;
use oven_testing::{ImageReader, LocalWorld, stderr};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// A Debian package in the making. It has one file of its own.
pub struct Deb {
    name: String,
    version: u32,
    control: String,
    scripts: Vec<(&'static str, String)>,
    files: Vec<(String, String, u32)>,
}

impl Deb {
    pub fn new(name: &str) -> Self {
        let files = vec![(format!("/usr/share/{name}/file"), "x\n".to_owned(), 0o644)];
        Self { name: name.to_owned(), version: 1, control: String::new(), scripts: Vec::new(), files }
    }

    /// The package `hostile`, with a postinst in sh that ends at the first failure.
    pub fn sh(postinst: &str) -> Self {
        Self::new("hostile").script("postinst", &format!("#!/bin/sh\nset -e\n{postinst}\n"))
    }

    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self.files.clear();
        self
    }

    pub fn script(mut self, name: &'static str, text: &str) -> Self {
        self.scripts.push((name, text.to_owned()));
        self
    }

    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// A line of its control file.
    pub fn field(mut self, line: &str) -> Self {
        self.control += line;
        self.control.push('\n');
        self
    }

    pub fn file(mut self, path: &str, content: &str, mode: u32) -> Self {
        self.files.push((path.to_owned(), content.to_owned(), mode));
        self
    }

    /// Writes `dir/NAME_VERSION_all.deb`.
    pub fn build(&self, dir: &Path) -> String {
        let tree = tempfile::tempdir().unwrap();
        let put = |path: &str, content: &str, mode: u32| {
            let path = tree.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let Self { name, version, control, .. } = self;
        let control = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@b.example>\nDescription: x\n{control}"
        );
        put("DEBIAN/control", &control, 0o644);
        for (name, text) in &self.scripts {
            put(&format!("DEBIAN/{name}"), text, if *name == "conffiles" { 0o644 } else { 0o755 });
        }
        for (path, content, mode) in &self.files {
            put(path, content, *mode);
        }
        let file = format!("{name}_{version}_all.deb");
        let args = ["--root-owner-group", "-Znone", "--build"];
        let built =
            Command::new("dpkg-deb").args(args).arg(tree.path()).arg(dir.join(&file)).output().unwrap();
        assert!(built.status.success(), "{}", stderr(&built));
        file
    }
}

/// A region with one base image, a definition on it, and a host that has to stay as it is.
pub struct HostileLab {
    pub world: LocalWorld,
    host: Host,
    /// The region's, after the last bake that succeeded.
    files: RefCell<BTreeSet<String>>,
}

/// How a bake ended.
pub struct Baked {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
    pub took: Duration,
}

impl HostileLab {
    /// On a small Debian whose apt knows no repositories: nothing is downloaded.
    pub fn new() -> Self {
        Self::on(&quiet())
    }

    /// On the full Debian, with its kernel and its repositories.
    pub fn full() -> Self {
        Self::on(&variable("OVEN_TEST_BASE"))
    }

    pub fn on(raw: &Path) -> Self {
        let world = LocalWorld::empty();
        world.expect(0, &["import", raw.to_str().unwrap(), "--name", "base"]);
        fs::create_dir_all(world.path("image")).unwrap();
        let (host, files) = (Host::new(), RefCell::new(world.files()));
        Self { world, host, files }
    }

    /// A directory of this machine that no step may reach, with files in it.
    pub fn canary(&self) -> PathBuf {
        self.host.canary()
    }

    /// What the image is baked on.
    pub fn base(&self) -> ImageReader {
        let (out, _) = self.world.expect(0, &["images", "list"]);
        let ami = out.lines().find(|line| line.contains("base")).expect(&out);
        ImageReader::of(&self.world, ami.split_whitespace().next().unwrap())
    }

    /// Writes the definition: these packages, and the rest of image.toml.
    pub fn define(&self, packages: &[Deb], more: &str) {
        let files = packages.iter().map(|deb| format!("\"./{}\"", deb.build(&self.world.path("image"))));
        let files: Vec<_> = files.collect();
        self.world.write(
            "image/image.toml",
            &format!("from = {{ name = \"base\" }}\npackages = [{}]\n{more}\n", files.join(", ")),
        );
    }

    pub fn command(&self) -> Command {
        self.world.command(&["bake", "image"])
    }

    /// Bakes the definition. Whatever the outcome: nothing of the bake is left, and the host is as it was.
    pub fn bake(&self) -> Baked {
        let start = Instant::now();
        let output = self.command().output().unwrap();
        self.ended(&output, start.elapsed())
    }

    /// Waits until the logs of so many bakes have this line.
    pub fn await_logs(&self, line: &str, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(120);
        let says = |path: &Path| fs::read_to_string(path).is_ok_and(|log| log.contains(line));
        let logs = || fs::read_dir(self.world.region().join("logs")).into_iter().flatten().flatten();
        while logs().filter(|log| says(&log.path())).count() < count {
            assert!(Instant::now() < deadline, "no \"{line}\" in the log");
            #[allow(clippy::disallowed_methods, reason = "a test has no runtime to block")]
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn ended(&self, output: &Output, took: Duration) -> Baked {
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let baked = Baked { code: output.status.code(), out, err: stderr(output), took };
        self.world.assert_no_traces(&baked.err);
        self.host.assert_unchanged(&baked.err);
        let volumes: Vec<_> = self.world.files().into_iter().filter(|f| f.starts_with("volumes/")).collect();
        assert!(volumes.is_empty(), "{volumes:?}\n{}", baked.err);
        baked
    }

    /// Bakes what has to succeed; the image, whose file system is sound.
    pub fn image(&self) -> (ImageReader, Baked) {
        let baked = self.bake();
        assert_eq!(baked.code, Some(0), "{}", baked.err);
        self.files.replace(self.world.files());
        let disk = ImageReader::of(&self.world, baked.out.trim());
        let (sound, report) = disk.fsck();
        assert!(sound, "{report}");
        (disk, baked)
    }

    /// Bakes what has to fail, with these words; there is no image.
    pub fn fails(&self, code: i32, words: &[&str]) -> Baked {
        let baked = self.bake();
        self.failed(&baked, code, words);
        baked
    }

    pub fn failed(&self, baked: &Baked, code: i32, words: &[&str]) {
        assert_eq!(baked.code, Some(code), "{}", baked.err);
        for word in words {
            assert!(baked.err.contains(word), "no \"{word}\" in\n{}", baked.err);
        }
        self.assert_no_image(baked);
    }

    /// Checks that a bake made no image, and left nothing in the region.
    pub fn assert_no_image(&self, baked: &Baked) {
        assert_eq!(baked.out, "");
        assert_eq!(self.world.files(), *self.files.borrow(), "of the region\n{}", baked.err);
    }
}

pub fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run scripts/test root")).into()
}

/// The small Debian without repositories.
fn quiet() -> PathBuf {
    changed(&variable("OVEN_TEST_TINY"), "quiet", &["rm /etc/apt/sources.list"])
}

/// A copy of a disk image with some of its files changed, by requests of debugfs; made once.
pub fn changed(raw: &Path, name: &str, requests: &[&str]) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = dir.join(format!("{name}-{}", raw.file_name().unwrap().to_str().unwrap()));
    if path.exists() {
        return path;
    }
    let copy = tempfile::Builder::new().prefix(name).tempfile_in(dir).unwrap().into_temp_path();
    let cp = Command::new("cp").arg("--sparse=always").arg(raw).arg(&copy).status().unwrap();
    assert!(cp.success());
    let disk = ImageReader::in_file(&copy);
    requests.iter().for_each(|request| disk.change(request));
    // Tests run side by side: whoever is last replaces what is the same.
    copy.persist(&path).unwrap();
    path
}

/// The small Debian with an additional partition of 8 MiB, which its fstab mounts on /boot.
pub fn boot_disk() -> PathBuf {
    boot_disk_with("with-boot.raw", &[], 0)
}

/// Like [`boot_disk`], but /boot has no inodes left.
pub fn full_boot_disk() -> PathBuf {
    // ext4 itself uses 11 of the inodes.
    boot_disk_with("with-full-boot.raw", &["-N", "16"], 5)
}

fn boot_disk_with(name: &str, options: &[&str], files: u32) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if path.exists() {
        return path;
    }
    const MIB: u64 = 1 << 20;
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", stderr(&output));
        output.stdout
    };
    let dir = tempfile::tempdir_in(path.parent().unwrap()).unwrap();
    let at = |name: &str| dir.path().join(name);
    let (small, disk, boot, fstab) = (quiet(), at("disk"), at("boot"), at("fstab"));
    let table: serde_json::Value =
        serde_json::from_slice(&run(Command::new("sfdisk").arg("--json").arg(&small))).unwrap();
    let root = &table["partitiontable"]["partitions"][0];
    let [start, sectors] = ["start", "size"].map(|field| root[field].as_u64().unwrap());
    let script =
        format!("label: gpt\n1: start=2048, size=16384, type=L\n2: start=32768, size={sectors}, type=L\n");
    fs::write(at("table"), script).unwrap();
    fs::File::create(&disk).unwrap().set_len((32_768 + sectors) * 512 + MIB).unwrap();
    let table = fs::File::open(at("table")).unwrap();
    run(Command::new("sfdisk").args(["--quiet", "--no-reread", "--no-tell-kernel"]).arg(&disk).stdin(table));
    fs::File::create(&boot).unwrap().set_len(8 * MIB).unwrap();
    fs::create_dir(at("files")).unwrap();
    (0..files).for_each(|file| fs::write(at("files").join(file.to_string()), "").unwrap());
    run(Command::new("mkfs.ext4").args(["-q", "-L", "boot", "-d"]).arg(at("files")).args(options).arg(&boot));
    let copy = |from: &Path, skip: u64, to: u64, length: u64| {
        let mut dd = Command::new("dd");
        dd.arg(format!("if={}", from.display())).arg(format!("of={}", disk.display()));
        let places = format!("skip={skip} seek={to} count={length}");
        dd.args(["bs=1M", "conv=notrunc,sparse", "iflag=skip_bytes,count_bytes", "oflag=seek_bytes"]);
        run(dd.args(places.split(' ')));
    };
    copy(&boot, 0, 2048 * 512, 8 * MIB);
    copy(&small, start * 512, 32_768 * 512, sectors * 512);
    fs::write(&fstab, "LABEL=boot /boot ext4 defaults 0 2\n").unwrap();
    let image = ImageReader::in_file(&disk);
    image.change("rm /etc/fstab");
    image.change(&format!("write {} /etc/fstab", fstab.display()));
    // Tests run concurrently: the last one replaces the file by the same content.
    fs::rename(&disk, &path).unwrap();
    path
}

//! A local region for one test, and checks that nothing of it remains on the machine.

use crate::programs::{cache_dir, oven};
use crate::{pause, ring};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory for one test. It has a region, and a definition on a base that is already imported.
pub struct LocalWorld {
    pub dir: tempfile::TempDir,
    _ring: ring::Shared,
}

impl LocalWorld {
    /// Creates a region whose base image is an 8 MiB disk: a file system without a partition table, with a static
    /// shell.
    pub fn tiny() -> Self {
        let world = Self::empty();
        let raw = tiny_base();
        let import = world.oven(&["import", raw.to_str().unwrap(), "--name", "tiny"]);
        assert!(import.status.success(), "{}", stderr(&import));
        world.write("image/image.toml", "name = \"image\"\nfrom = { name = \"tiny\" }\n");
        world
    }

    /// Creates a region like [`LocalWorld::tiny`] whose base image has another os-release and additional scripts.
    pub fn of(name: &str, os_release: &str, scripts: &[(&str, &str)]) -> Self {
        let world = Self::empty();
        let raw = world.path("base.raw");
        make_base(&raw, os_release, scripts);
        world.expect(0, &["import", raw.to_str().unwrap(), "--name", name]);
        world.write("image/image.toml", &format!("name = \"image\"\nfrom = {{ name = {name:?} }}\n"));
        world
    }

    pub fn empty() -> Self {
        assert!(rustix::process::geteuid().is_root(), "the root ring needs root: scripts/test says how");
        Self { _ring: ring::shared(), dir: tempfile::Builder::new().prefix("oven-test.").tempdir().unwrap() }
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    pub fn region(&self) -> PathBuf {
        self.path("region")
    }

    pub fn write(&self, relative: &str, content: &str) {
        let path = self.path(relative);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Returns a command of `oven` on this region, with this directory as its working directory.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(oven());
        command.arg("--region-dir").arg(self.region()).args(args).current_dir(self.dir.path());
        // A CI system sets this variable. Tests of secrets set it themselves.
        command.env_remove("CI");
        command
    }

    pub fn oven(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs oven and expects this exit code. Returns standard output and standard error.
    pub fn expect(&self, code: i32, args: &[&str]) -> (String, String) {
        let output = self.oven(args);
        let (out, err) = (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output));
        assert_eq!(output.status.code(), Some(code), "oven {args:?}\n{out}\n{err}");
        (out, err)
    }

    /// Returns everything on this machine that belongs to this region: mounts in any namespace, loop devices,
    /// processes, and files that a process has open.
    pub fn traces(&self) -> BTreeSet<String> {
        let name = self.dir.path().to_str().unwrap();
        let (mut traces, runs) = (BTreeSet::new(), self.runs());
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let pid = process.file_name().to_string_lossy().into_owned();
            if !pid.bytes().all(|b| b.is_ascii_digit()) || pid == std::process::id().to_string() {
                continue;
            }
            let mounts = fs::read_to_string(process.path().join("mountinfo")).unwrap_or_default();
            traces
                .extend(mounts.lines().filter(|l| l.contains(name)).map(|l| format!("mount in {pid}: {l}")));
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            if command.contains(name) || runs.iter().any(|run| command.contains(run)) {
                traces.insert(format!("process {pid}: {command}"));
            }
            let files = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
            let files = files.filter_map(|file| fs::read_link(file.path()).ok());
            let files = files.map(|file| file.display().to_string()).filter(|file| file.contains(name));
            traces.extend(files.map(|file| format!("process {pid} has {file}: {command}")));
        }
        traces.extend(self.loops());
        traces
    }

    /// Returns the names of the served disks of all runs in this directory, such as `oven-1f2e3d4c`.
    fn runs(&self) -> Vec<String> {
        let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
        let logs = entries(self.dir.path()).flat_map(|state| entries(&state.path().join("logs")));
        let names = logs.filter_map(|log| Some(log.path().file_stem()?.to_str()?.to_owned()));
        names.map(|name| format!("oven-{name}")).collect()
    }

    /// Returns the loop devices on files of this region, and on the served disks of its runs.
    pub fn loops(&self) -> BTreeSet<String> {
        let name = self.dir.path().to_str().unwrap();
        let (mut loops, runs) = (BTreeSet::new(), self.runs());
        for device in fs::read_dir("/sys/block").unwrap().flatten() {
            let file = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
            if file.contains(name) || runs.iter().any(|run| file.contains(run)) {
                loops.insert(format!("{} on {}", device.file_name().to_string_lossy(), file.trim()));
            }
        }
        loops
    }

    /// Fails if something of this region is still on the machine after some seconds. The kernel needs time to release
    /// the resources of killed processes, above all on a busy machine.
    pub fn assert_no_traces(&self, what: &str) {
        self.assert_no_traces_but_of(what, BTreeSet::new);
    }

    /// Does the same, but ignores these loop devices (such as `loop7`), which the test's server may hold.
    pub fn assert_no_traces_but_of(&self, what: &str, held: impl Fn() -> BTreeSet<String>) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            let mut traces = self.traces();
            let held = held();
            traces.retain(|trace| !held.iter().any(|held| trace.starts_with(&format!("{held} on "))));
            if traces.is_empty() {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{what}: left {traces:#?}");
            pause(std::time::Duration::from_millis(20));
        }
    }

    /// Returns the files of the region with relative paths. Logs, shown hints and cached packages are omitted, but not the working
    /// directories of bakes in the package cache.
    pub fn files(&self) -> BTreeSet<String> {
        let mut files = BTreeSet::new();
        let mut dirs = vec![self.region()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    dirs.push(path);
                } else {
                    files.insert(path.strip_prefix(self.region()).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        let kept = |file: &str| file.starts_with("packages/") && !file.starts_with("packages/b-");
        let omitted = ["logs/", "hints/"];
        files.retain(|file| !omitted.iter().any(|dir| file.starts_with(dir)) && !kept(file));
        files
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Returns an 8 MiB ext4 image with os-release `ID=nothing` and busybox. It is created once for all tests.
pub fn tiny_base() -> PathBuf {
    let path = cache_dir().join("tiny.raw");
    if path.exists() {
        return path;
    }
    let made = tempfile::tempdir_in(cache_dir()).unwrap();
    let made = made.path().with_extension("raw");
    make_base(&made, "ID=nothing\n", &[]);
    // Tests run concurrently. If two of them create the file, the second one replaces it with the same content.
    fs::rename(&made, &path).unwrap();
    path
}

fn make_base(made: &Path, os_release: &str, scripts: &[(&str, &str)]) {
    let tree = tempfile::tempdir_in(cache_dir()).unwrap();
    for dir in ["bin", "etc", "usr/sbin", "var/log", "proc", "sys", "dev", "run", "tmp", "root"] {
        fs::create_dir_all(tree.path().join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", tree.path().join("bin/busybox"))
        .expect("busybox-static: scripts/setup installs it");
    for applet in ["sh", "mkdir", "cat", "sleep", "rm", "ls", "true", "sed"] {
        std::os::unix::fs::symlink("busybox", tree.path().join("bin").join(applet)).unwrap();
    }
    for (path, script) in scripts {
        let path = tree.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    fs::write(tree.path().join("etc/os-release"), os_release).unwrap();
    fs::write(tree.path().join("etc/resolv.conf"), "# the image's own\n").unwrap();
    fs::File::create(made).unwrap().set_len(8 << 20).unwrap();
    let mkfs = Command::new("mkfs.ext4").arg("-q").arg("-d").arg(tree.path()).arg(made).output().unwrap();
    assert!(mkfs.status.success(), "{}", stderr(&mkfs));
}

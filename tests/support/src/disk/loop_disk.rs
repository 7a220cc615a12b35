//! Disks in files, attached to loop devices. Each test has its own mount namespace.

use super::unmount::unmount;
use crate::ring;
use oven::device::Device;
use oven::mount::{MountOptions, Root};
use oven::report::Report;
use oven::sys::namespaces::private_mounts;
use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::task::Poll;
use sys_mount::{Mount, MountFlags, PropagationType};
use tempfile::TempDir;

/// A disk in a file. Its loop devices are detached when this value is dropped.
pub struct LoopDisk {
    dir: TempDir,
    sector: u64,
    mib: u64,
    /// The number, start and size of each partition. The start and size are in bytes.
    parts: Vec<(String, u64, u64)>,
    loops: RefCell<Vec<PathBuf>>,
    _ring: ring::Shared,
}

impl LoopDisk {
    pub fn new(mib: u64, sector: u64) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("disk.raw")).unwrap().set_len(mib << 20).unwrap();
        Self { dir, sector, mib, parts: Vec::new(), loops: RefCell::default(), _ring: ring::shared() }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    pub fn resize(&mut self, mib: u64) {
        self.mib = mib;
        File::options().write(true).open(self.file()).unwrap().set_len(mib << 20).unwrap();
    }

    /// Writes a partition table by a script for sfdisk. If sectors are not 512 bytes, sfdisk needs a device.
    pub fn table(&mut self, script: &str) {
        let path = if self.sector == 512 { self.file() } else { self.attach() };
        self.table_on(&path, script);
        if self.sector != 512 {
            self.detach();
        }
    }

    pub fn table_on(&mut self, path: &Path, script: &str) {
        let path = path.to_str().unwrap();
        let script_file = self.dir.path().join("table");
        fs::write(&script_file, script).unwrap();
        let mut sfdisk = Command::new("sfdisk");
        sfdisk
            .args(["--quiet", "--wipe=never", "--no-reread", "--no-tell-kernel", path])
            .stdin(File::open(&script_file).unwrap());
        assert!(sfdisk.status().unwrap().success());
        let dump = output("sfdisk", &["--dump", path]);
        self.parts.clear();
        for line in dump.lines().filter(|line| line.contains("start=")) {
            let field = |name: &str| {
                let rest = line.split(name).nth(1).unwrap();
                rest.split(',').next().unwrap().trim().parse::<u64>().unwrap() * self.sector
            };
            let node = line.split(" : ").next().unwrap().trim();
            let number: String = node.chars().rev().take_while(char::is_ascii_digit).collect();
            self.parts.push((number.chars().rev().collect(), field("start="), field("size=")));
        }
    }

    pub fn verify_table(&self) {
        let path = if self.sector == 512 { self.file() } else { self.attach() };
        let said = output("sfdisk", &["--verify", path.to_str().unwrap()]);
        assert!(said.contains("No errors detected"), "{said}");
        if self.sector != 512 {
            self.detach();
        }
    }

    fn range(&self, part: &str) -> (u64, u64) {
        match part {
            "" => (0, self.mib << 20),
            _ => self.parts.iter().find(|p| p.0 == part).map(|p| (p.1, p.2)).unwrap(),
        }
    }

    pub fn ext4(&mut self, part: &str, tree: &TempDir, options: &[&str]) {
        self.ext(part, "ext4", tree, options);
    }

    pub fn ext(&mut self, part: &str, kind: &str, tree: &TempDir, options: &[&str]) {
        self.make(part, |path| {
            let mut arguments =
                vec!["-q", "-F", "-t", kind, "-b", "4096", "-d", tree.path().to_str().unwrap()];
            arguments.extend(options);
            arguments.push(path);
            run("mkfs.ext4", &arguments);
        });
    }

    /// mkfs.xfs takes no tree, so the files are copied to the mounted file system.
    pub fn xfs(&mut self, part: &str, tree: &TempDir) {
        self.make(part, |path| {
            run("mkfs.xfs", &["-q", path]);
            in_mount(path, "xfs", |place| run("cp", &["-a", &format!("{}/.", tree.path().display()), place]));
        });
    }

    pub fn vfat(&mut self, part: &str, label: &str) {
        self.make(part, |path| run("mkfs.vfat", &["-n", &label.to_uppercase(), path]));
    }

    pub fn put(&self, part: &str, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.file()).unwrap();
        file.write_all_at(bytes, self.range(part).0 + offset).unwrap();
    }

    /// Creates a file system in a separate file, and copies it to its place on the disk.
    fn make(&self, part: &str, fill: impl FnOnce(&str)) {
        let (_, size) = self.range(part);
        let image = self.dir.path().join("part.raw");
        _ = fs::remove_file(&image);
        File::create(&image).unwrap().set_len(size).unwrap();
        fill(image.to_str().unwrap());
        copy(&image, 0, &self.file(), self.range(part).0, size);
    }

    /// Calls `look` with a file that contains a copy of a partition.
    pub fn with_part<T>(&self, part: &str, look: impl FnOnce(&str) -> T) -> T {
        let (start, size) = if part.is_empty() { (0, self.mib << 20) } else { self.now(part) };
        let image = self.dir.path().join("look.raw");
        _ = fs::remove_file(&image);
        File::create(&image).unwrap().set_len(size).unwrap();
        copy(&self.file(), start, &image, 0, size);
        look(image.to_str().unwrap())
    }

    fn now(&self, part: &str) -> (u64, u64) {
        let path = if self.sector == 512 { self.file() } else { self.attach() };
        let dump = output("sfdisk", &["--dump", path.to_str().unwrap()]);
        if self.sector != 512 {
            self.detach();
        }
        let line = dump.lines().find(|line| line.contains(&format!("{part} : start="))).unwrap();
        let field = |name: &str| {
            line.split(name).nth(1).unwrap().split(',').next().unwrap().trim().parse::<u64>().unwrap()
                * self.sector
        };
        (field("start="), field("size="))
    }

    /// Reads a file in a partition. Only XFS is mounted for this, because debugfs cannot read it.
    pub fn cat(&self, part: &str, file: &str) -> String {
        self.with_part(part, |path| {
            let mut magic = [0; 4];
            File::open(path).unwrap().read_exact_at(&mut magic, 0).unwrap();
            if &magic == b"XFSB" {
                return in_mount(path, "xfs", |place| {
                    fs::read_to_string(Path::new(place).join(file)).unwrap()
                });
            }
            output("debugfs", &["-R", &format!("cat {file}"), path])
        })
    }

    fn attach(&self) -> PathBuf {
        let sector = self.sector.to_string();
        let path = self.file();
        let args = ["--show", "-f", "-P", "--sector-size", &sector, path.to_str().unwrap()];
        let path = PathBuf::from(output("losetup", &args).trim());
        self.loops.borrow_mut().push(path.clone());
        path
    }

    /// Attaches the disk, and returns the device for mounting a root.
    pub fn device(&self) -> Device {
        let path = self.attach();
        let node = File::options().read(true).write(true).open(&path).unwrap();
        let rdev = node.metadata().unwrap().rdev();
        Device { node: node.into(), path, rdev, serial: "test".into(), trimming: None }
    }

    /// Makes the kernel detach the loop devices when their last users close them.
    pub fn autoclear(&self) {
        for path in self.loops.borrow_mut().drain(..) {
            run("losetup", &["-d", path.to_str().unwrap()]);
        }
    }

    pub fn detach(&self) {
        self.autoclear();
        let started = std::time::Instant::now();
        while !loops_of(self).is_empty() {
            assert!(started.elapsed().as_secs() < 20, "the loop device stays: {:?}", loops_of(self));
            std::thread::yield_now();
        }
    }

    /// Returns the error of mounting this disk. Fails if the attempt leaves a mount or a file.
    pub fn refused(&self) -> String {
        let mut text = String::new();
        alone(async |scratch| {
            let device = self.device();
            let error = Root::mount(&device, scratch, &MountOptions::default(), &Report::silent()).await;
            text = format!("{:#}", error.err().expect("it was mounted"));
            assert_eq!((self.mounts(), fs::read_dir(scratch).unwrap().count()), (0, 0));
        });
        self.detach();
        text
    }

    /// Returns the number of this disk's mounts in this thread's namespace.
    pub fn mounts(&self) -> usize {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let names: Vec<_> = self.loops.borrow().iter().map(|path| format!(" {}", path.display())).collect();
        table.lines().filter(|line| names.iter().any(|name| line.contains(name))).count()
    }

    /// A second disk with the same bytes, and so with the same UUIDs.
    pub fn twin(&self) -> Self {
        let mut other = Self::new(self.mib, self.sector);
        other.parts.clone_from(&self.parts);
        copy(&self.file(), 0, &other.file(), 0, self.mib << 20);
        other
    }

    /// Returns a copy of the disk that was made while a new file was only in the file system's journal.
    pub fn copy_while_mounted(&self) -> Self {
        let mut other = Self::new(self.mib, self.sector);
        other.parts.clone_from(&self.parts);
        self.with_part("1", |path| {
            in_mount(path, "ext4", |place| {
                fs::write(Path::new(place).join("etc/late"), "journalled").unwrap();
                let file = File::open(Path::new(place).join("etc/late")).unwrap();
                file.sync_all().unwrap();
                run("sync", &["-f", place]);
                fs::write(Path::new(place).join("etc/later"), "").unwrap();
                File::open(Path::new(place).join("etc/later")).unwrap().sync_all().unwrap();
                copy(&self.file(), 0, &other.file(), 0, self.mib << 20);
                copy(Path::new(path), 0, &other.file(), self.range("1").0, self.range("1").1);
            });
        });
        let mut incompat = [0; 4];
        let file = File::open(other.file()).unwrap();
        file.read_exact_at(&mut incompat, self.range("1").0 + 1024 + 96).unwrap();
        assert!(incompat[0] & 4 != 0, "the journal is not in use");
        other
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        for path in self.loops.borrow_mut().drain(..) {
            _ = Command::new("losetup").arg("-d").arg(path).status();
        }
    }
}

/// Copies the data of a range, but not its holes. The target of a hole is not changed.
fn copy(from: &Path, skip: u64, to: &Path, seek: u64, size: u64) {
    let from = File::open(from).unwrap();
    let to = File::options().write(true).open(to).unwrap();
    let mut at = skip;
    while let Ok(data) = rustix::fs::seek(&from, rustix::fs::SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(&from, rustix::fs::SeekFrom::Hole(data)).unwrap().min(skip + size);
        let (mut read, mut write) = (data, seek + data - skip);
        while read < hole {
            let length = usize::try_from(hole - read).unwrap();
            assert!(
                rustix::fs::copy_file_range(&from, Some(&mut read), &to, Some(&mut write), length).unwrap()
                    > 0
            );
        }
        if hole == skip + size {
            break;
        }
        at = hole;
    }
}

/// Returns the loop devices on a disk's file.
pub fn loops_of(disk: &LoopDisk) -> Vec<String> {
    let text =
        output("losetup", &["--associated", disk.file().to_str().unwrap(), "--noheadings", "-O", "NAME"]);
    text.lines().map(str::to_owned).collect()
}

/// Runs a test with its own mount namespace and runtime, as `main` does for the whole process.
pub fn alone(test: impl AsyncFnOnce(&Path)) {
    let scratch = tempfile::tempdir().unwrap();
    apart(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(scratch.path()));
    });
}

/// Polls a future at most `times` times, and then drops it. Returns whether it was complete.
pub async fn polled(work: impl Future<Output = ()>, mut times: u32) -> bool {
    let mut work = Box::pin(work);
    std::future::poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(()) => Poll::Ready(true),
        Poll::Pending => {
            times -= 1;
            if times == 0 { Poll::Ready(false) } else { Poll::Pending }
        }
    })
    .await
}

/// Runs work on a thread with its own mount namespace. A panic is passed on to the caller.
fn apart<T>(work: impl FnOnce() -> T) -> T {
    struct Send<T>(T);
    // SAFETY: the calling thread does nothing until the other thread has ended, so no value is used by two threads at
    // the same time.
    #[allow(unsafe_code)]
    unsafe impl<T> std::marker::Send for Send<T> {}
    let work = Send(work);
    let done = std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let work = work;
            private_mounts().unwrap();
            Send((work.0)())
        });
        thread.join()
    });
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).0
}

/// Makes the mounts of a directory shared, so that other namespaces see them.
pub fn share(dir: &Path) {
    let mut mount = Mount::builder().fstype("none").flags(MountFlags::BIND).mount(dir, dir).unwrap();
    mount.set_propagation_type(PropagationType::SHARED).unwrap();
}

/// Mounts an image file while `work` runs, in a separate mount namespace.
fn in_mount<T>(image: &str, kind: &str, work: impl FnOnce(&str) -> T) -> T {
    let place = tempfile::tempdir().unwrap();
    apart(|| {
        let path = place.path().to_str().unwrap();
        // The option overrides the superblock, which a test may have changed.
        let options = if kind == "ext4" { "loop,errors=remount-ro" } else { "loop" };
        run("mount", &["-t", kind, "-o", options, image, path]);
        let done = work(path);
        unmount(place.path());
        done
    })
}

/// Creates the smallest tree that counts as a system: an os-release, a shell, and an fstab.
#[allow(non_snake_case)] // tests use it like a constant
pub fn FAKE_ROOT(fstab: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let at = |path: &str| dir.path().join(path);
    for path in ["etc", "usr/bin", "usr/lib", "var/tmp"] {
        fs::create_dir_all(at(path)).unwrap();
    }
    fs::write(at("usr/lib/os-release"), "ID=test\n").unwrap();
    symlink("../usr/lib/os-release", at("etc/os-release")).unwrap();
    symlink("usr/bin", at("bin")).unwrap();
    let shell = fs::read("/bin/sh").unwrap();
    fs::write(at("usr/bin/dash"), &shell[..64]).unwrap();
    symlink("/usr/bin/dash", at("usr/bin/sh")).unwrap();
    if !fstab.is_empty() {
        fs::write(at("etc/fstab"), fstab).unwrap();
    }
    dir
}

pub fn run(program: &str, arguments: &[&str]) {
    output(program, arguments);
}

fn output(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let done = done.unwrap_or_else(|error| panic!("{program} (scripts/setup installs it): {error}"));
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success(),
        "{program} {arguments:?}: {}{said}",
        String::from_utf8_lossy(&done.stdout)
    );
    String::from_utf8(done.stdout).unwrap()
}

pub fn spawn(program: &str, arguments: &[&str]) -> Child {
    Command::new(program).args(arguments).stdin(Stdio::null()).spawn().unwrap()
}

pub fn comm(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

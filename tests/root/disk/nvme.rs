//! Discovery on devices that are no NVMe disks: refused, though the kernel's list, or one that was made up, says that
//! they are the volume. What it finds on real ones is shown by vm-tests/discovery.

use oven::cloud::aws::nvme;
use oven::device::Device;
use oven::ids::VolumeId;
use oven::sys::loop_device;
use oven_testing::ring;
use rustix::fs::{CWD, FileType, Mode, major, makedev, minor, mknodat};
use std::fs;
use std::path::{Path, PathBuf};

/// A tree in the likes of `/sys` that says of a loop device that it is the volume's disk, and a `/dev` next to it.
struct Lie {
    dir: tempfile::TempDir,
    device: Device,
    _ring: ring::Shared,
}

impl Lie {
    fn new() -> Self {
        let ring = ring::shared();
        let dir = tempfile::tempdir_in("/run").unwrap();
        let file = fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("disk"))
            .unwrap();
        file.set_len(1 << 20).unwrap();
        let device = loop_device::attach(&file, "a test's").unwrap();
        let block = dir.path().join("sys/block/nvme1n1/device/device");
        fs::create_dir_all(&block).unwrap();
        fs::create_dir_all(dir.path().join("dev")).unwrap();
        let lie = Self { dir, device, _ring: ring };
        let rdev = lie.device.rdev;
        for (file, text) in [
            ("dev", format!("{}:{}\n", major(rdev), minor(rdev))),
            ("device/serial", "vol0123456789abcdef0\n".into()),
            ("device/state", "live\n".into()),
            ("device/device/vendor", "0x1d0f\n".into()),
        ] {
            fs::write(lie.path("sys/block/nvme1n1").join(file), text).unwrap();
        }
        lie
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn node(&self, kind: FileType, number: u64) {
        let path = self.path("dev/nvme1n1");
        _ = fs::remove_file(&path);
        mknodat(CWD, &path, kind, Mode::from_raw_mode(0o600), number).unwrap();
    }

    fn refused(&self) -> String {
        let volume = VolumeId("vol-0123456789abcdef0".into());
        let error = nvme::find(&self.path("sys"), &self.path("dev"), &volume).expect_err("has to be refused");
        format!("{error:#}")
    }
}

fn ours() -> Vec<PathBuf> {
    let dirs = ["/tmp", "/run", "/var/tmp", "/dev"].map(Path::new);
    let entries = dirs.iter().flat_map(|dir| fs::read_dir(dir).unwrap().flatten());
    entries
        .map(|entry| entry.path())
        .filter(|path| path.to_str().is_some_and(|p| p.contains("/.oven-")))
        .collect()
}

#[test]
fn a_device_that_is_no_nvme_disk_is_refused() {
    // It looks for nodes that anybody made.
    let _ring = ring::exclusive();
    let lie = Lie::new();
    let number = lie.device.rdev;
    // No node, as in a container: one without a name is made, and asked.
    assert!(lie.refused().contains("cannot verify that"), "{}", lie.refused());
    lie.node(FileType::BlockDevice, number);
    assert!(lie.refused().contains("cannot verify that"), "{}", lie.refused());
    let was = ours();
    _ = lie.refused();
    assert!(ours().iter().all(|path| was.contains(path)), "a node is left: {:?}", ours());
}

#[test]
fn another_device_at_the_name_is_refused() {
    let lie = Lie::new();
    let number = lie.device.rdev;
    lie.node(FileType::BlockDevice, makedev(major(number), minor(number) + 1));
    assert!(lie.refused().contains("but the kernel's nvme1n1 is"), "{}", lie.refused());
    // /dev/null's number, or the disk's own, but of a character device; a pipe: never opened.
    for (kind, number) in
        [(FileType::CharacterDevice, makedev(1, 3)), (FileType::CharacterDevice, number), (FileType::Fifo, 0)]
    {
        lie.node(kind, number);
        assert!(lie.refused().contains("is not a block device"), "{}", lie.refused());
    }
}

use super::*;
use std::fs;
use std::os::unix::fs::symlink;

const VOLUME: &str = "vol-0123456789abcdef0";
const SERIAL: &str = "vol0123456789abcdef0";
const INSTANCE_STORE: &str = "Amazon EC2 NVMe Instance Storage";
const EBS: &str = "Amazon Elastic Block Store";
const QEMU: &str = "QEMU NVMe Ctrl";
const VENDOR_QEMU: u16 = 0x1b36;
const VENDOR_AMAZON: u16 = 0x1d0f;

/// A kernel whose device nodes are regular files. The first line of such a file is the device number. The rest is the
/// disk's answer to Identify Controller, or the word `errno` and an error number.
struct Files;

impl Kernel for Files {
    fn number(&self, node: BorrowedFd<'_>) -> io::Result<Option<u64>> {
        if FileType::from_raw_mode(rustix::fs::fstat(node)?.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let content = fs::read(format!("/proc/self/fd/{}", node.as_raw_fd()))?;
        let line = content.split(|b| *b == b'\n').next().unwrap();
        let Ok(text) = str::from_utf8(line) else { return Ok(None) };
        let Some((major, minor)) = text.split_once(':') else { return Ok(None) };
        Ok(Some(rustix::fs::makedev(major.parse().unwrap(), minor.parse().unwrap())))
    }
    fn node(&self, number: u64) -> io::Result<OwnedFd> {
        // mknod returns this error to a process that is not permitted to create nodes.
        let _ = number;
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }
    fn identify(&self, node: BorrowedFd<'_>) -> io::Result<Box<IdentifyPage>> {
        let content = fs::read(format!("/proc/self/fd/{}", node.as_raw_fd()))?;
        let start = content.iter().position(|b| *b == b'\n').unwrap() + 1;
        if let Some(errno) = content[start..].strip_prefix(b"errno ") {
            return Err(io::Error::from_raw_os_error(str::from_utf8(errno).unwrap().parse().unwrap()));
        }
        Ok(Box::new(content[start..].try_into().unwrap()))
    }
}

fn page(vendor: u16, serial: &[u8], model: &str) -> IdentifyPage {
    let mut page = [0; 4096];
    page[..2].copy_from_slice(&vendor.to_le_bytes());
    page[4..64].fill(b' ');
    page[4..4 + serial.len()].copy_from_slice(serial);
    page[24..24 + model.len()].copy_from_slice(model.as_bytes());
    page
}

/// A simulated machine. It is a directory that contains `sys` and `dev`.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["sys/block", "sys/class/nvme", "dev"] {
            fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        Self { dir }
    }
    fn sys(&self, path: &str) -> std::path::PathBuf {
        self.dir.path().join("sys").join(path)
    }
    fn dev(&self, path: &str) -> std::path::PathBuf {
        self.dir.path().join("dev").join(path)
    }
    fn set(&self, path: &str, text: &str) {
        let path = self.sys(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    /// Creates the disk's entry in `/sys`, without multipath. If `number` is 7, the disk is `nvme7n1`, and its device
    /// number is 259:7.
    fn kernel(&self, number: u32, vendor: u16, serial: &str, model: &str) -> String {
        let (name, controller) = (format!("nvme{number}n1"), format!("class/nvme/nvme{number}"));
        self.set(&format!("{controller}/serial"), &format!("{serial:<20}\n"));
        self.set(&format!("{controller}/model"), &format!("{model:<40}\n"));
        self.set(&format!("{controller}/state"), "live\n");
        self.set(&format!("{controller}/device/vendor"), &format!("{vendor:#06x}\n"));
        self.set(&format!("block/{name}/dev"), &format!("259:{number}\n"));
        self.set(&format!("block/{name}/hidden"), "0\n");
        symlink(self.sys(&controller), self.sys(&format!("block/{name}/device"))).unwrap();
        name
    }
    /// Creates a disk's node in `/dev`. The file contains the disk's answer to Identify Controller.
    fn node(&self, name: &str, number: &str, answer: &[u8]) {
        fs::write(self.dev(name), [number.as_bytes(), b"\n", answer].concat()).unwrap();
    }
    fn disk(&self, number: u32, vendor: u16, serial: &str, model: &str) -> String {
        let name = self.kernel(number, vendor, serial, model);
        self.node(&name, &format!("259:{number}"), &page(vendor, serial.as_bytes(), model));
        name
    }
    fn find(&self, volume: &str) -> Result<Option<Device>> {
        find_by(&Files, &self.sys(""), &self.dev(""), &VolumeId(volume.into()))
    }
    /// Returns the name of the disk that is found, or `-` if none is found.
    fn found(&self) -> String {
        let device = self.find(VOLUME).unwrap_or_else(|e| panic!("{e:#}"));
        device.map_or("-".into(), |d| d.path.file_name().unwrap().to_str().unwrap().to_owned())
    }
    fn refused(&self) -> String {
        let error = self.find(VOLUME).expect_err("has to be refused");
        assert_eq!(Kind::of(&error), Kind::Machine, "{error:#}");
        assert!(crate::error::hint_of(&error).is_some(), "{error:#}");
        format!("{error:#}").replace(self.dir.path().to_str().unwrap(), "")
    }
}

#[test]
fn the_disk_with_the_serial_is_found_whatever_its_name() {
    for (vendor, model) in [(VENDOR_AMAZON, EBS), (VENDOR_QEMU, QEMU)] {
        let machine = Machine::new();
        machine.disk(0, vendor, "vol00000000000000001", model);
        assert_eq!(machine.found(), "-");
        machine.disk(10, vendor, SERIAL, model);
        machine.disk(2, vendor, "vol0123456789abcdef1", model);
        assert_eq!(machine.found(), "nvme10n1");
        let device = machine.find(VOLUME).unwrap().unwrap();
        assert_eq!((device.rdev, &*device.serial), (rustix::fs::makedev(259, 10), SERIAL));
        let held = fs::read_link(format!("/proc/self/fd/{}", device.node.as_raw_fd())).unwrap();
        assert_eq!(held, fs::canonicalize(machine.dev("nvme10n1")).unwrap());
        let flags = rustix::fs::fcntl_getfl(&device.node).unwrap();
        assert!(flags.contains(OFlags::RDWR) && !flags.contains(OFlags::PATH));
        assert!(rustix::io::fcntl_getfd(&device.node).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[test]
fn stale_links_and_other_names_are_ignored() {
    let machine = Machine::new();
    machine.disk(1, VENDOR_AMAZON, "vol0aaaaaaaaaaaaaaaa", EBS);
    fs::create_dir_all(machine.dev("disk/by-id")).unwrap();
    let links = [
        format!("disk/by-id/nvme-Amazon_Elastic_Block_Store_{SERIAL}"),
        format!("disk/by-id/nvme-Amazon_Elastic_Block_Store_{SERIAL}-ns-1"),
        "sdf".into(),
        "xvdf".into(),
        "nvme7n1".into(),
        SERIAL.into(),
    ];
    for link in &links {
        symlink(machine.dev("nvme1n1"), machine.dev(link)).unwrap();
    }
    assert_eq!(machine.found(), "-");
    machine.disk(3, VENDOR_AMAZON, SERIAL, EBS);
    assert_eq!(machine.found(), "nvme3n1");
    // A symbolic link with the disk's name is refused, even if it points to the right disk.
    for target in ["nvme1n1", "real"] {
        fs::write(machine.dev("real"), fs::read(machine.dev("nvme3n1")).unwrap()).unwrap();
        fs::remove_file(machine.dev("nvme3n1")).unwrap();
        symlink(machine.dev(target), machine.dev("nvme3n1")).unwrap();
        assert_eq!(machine.refused(), "/dev/nvme3n1 is not a block device");
        fs::remove_file(machine.dev("nvme3n1")).unwrap();
        fs::rename(machine.dev("real"), machine.dev("nvme3n1")).unwrap();
    }
    assert_eq!(machine.found(), "nvme3n1");
}

#[test]
fn another_volume_is_not_found() {
    for serial in [
        "vol0123456789abcdef1",
        "vol0123456789ABCDEF0",
        "vol-123456789abcdef0",
        "VOL0123456789abcdef0",
        "vol0123456789abcdef",
        "vol01234567",
        "0123456789abcdef0",
        " vol0123456789abcdef",
        "AWS0123456789ABCDEF0",
        "",
    ] {
        let machine = Machine::new();
        machine.disk(1, VENDOR_AMAZON, serial, EBS);
        assert_eq!(machine.found(), "-", "{serial:?}");
    }
}

#[test]
fn old_ids_are_padded_and_are_no_prefix() {
    let machine = Machine::new();
    machine.disk(1, VENDOR_AMAZON, "vol0123456789abcdef0", EBS);
    assert!(machine.find("vol-01234567").unwrap().is_none());
    machine.disk(2, VENDOR_AMAZON, "vol01234567", EBS);
    let device = machine.find("vol-01234567").unwrap().unwrap();
    assert_eq!((device.path, &*device.serial), (machine.dev("nvme2n1"), "vol01234567"));
}

#[test]
fn invalid_volume_ids_are_rejected() {
    for id in
        ["", "vol-", "vol-0123456", "vol-0123456789ABCDEF0", "vol0123456789abcdef0", "i-0123456789abcdef0"]
    {
        let error = Machine::new().find(id).unwrap_err().to_string();
        assert_eq!(error, format!("{id:?} is not a volume id"));
    }
}

#[test]
fn two_live_disks_with_one_serial_are_named_and_refused() {
    let machine = Machine::new();
    machine.disk(11, VENDOR_AMAZON, SERIAL, EBS);
    machine.disk(2, VENDOR_AMAZON, SERIAL, EBS);
    let text = format!("2 disks have the serial of {VOLUME}: nvme2n1, nvme11n1");
    assert_eq!(machine.refused(), text);
    // A second namespace of the same controller counts as a second disk.
    let machine = Machine::new();
    machine.disk(1, VENDOR_AMAZON, SERIAL, EBS);
    machine.set("block/nvme1n2/dev", "259:9");
    symlink(machine.sys("class/nvme/nvme1"), machine.sys("block/nvme1n2/device")).unwrap();
    assert_eq!(machine.refused(), format!("2 disks have the serial of {VOLUME}: nvme1n1, nvme1n2"));
}

#[test]
fn only_live_controllers_count() {
    for state in
        ["new", "resetting", "connecting", "deleting", "deleting (no IO)", "dead", "", "alive", "live live"]
    {
        let machine = Machine::new();
        machine.disk(1, VENDOR_AMAZON, SERIAL, EBS);
        machine.set("class/nvme/nvme1/state", state);
        assert_eq!(machine.found(), "-", "{state}");
        // A new disk with the same serial is found, because a disk that is not live is ignored.
        machine.disk(2, VENDOR_AMAZON, SERIAL, EBS);
        assert_eq!(machine.found(), "nvme2n1", "{state}");
    }
    let machine = Machine::new();
    machine.disk(1, VENDOR_AMAZON, SERIAL, EBS);
    fs::remove_file(machine.sys("class/nvme/nvme1/state")).unwrap();
    assert_eq!(machine.found(), "-", "of unknown state");
}

/// Creates a disk as a kernel with multipath lists it. One entry has a node and belongs to a subsystem. Each hidden
/// entry is one path to the disk.
fn multipath(machine: &Machine, vendor: u16, paths: &[&str]) {
    let subsystem = machine.sys("class/nvme-subsystem/nvme-subsys1");
    for (index, state) in paths.iter().enumerate() {
        let controller = format!("class/nvme/nvme{}", index + 1);
        machine.set(&format!("{controller}/serial"), SERIAL);
        machine.set(&format!("{controller}/state"), state);
        machine.set(&format!("{controller}/device/vendor"), &format!("{vendor:#06x}\n"));
        machine.set("class/nvme-subsystem/nvme-subsys1/serial", &format!("{SERIAL}\n"));
        symlink(machine.sys(&controller), subsystem.join(format!("nvme{}", index + 1))).unwrap();
        let twin = format!("block/nvme1c{}n1", index + 1);
        machine.set(&format!("{twin}/hidden"), "1\n");
        machine.set(&format!("{twin}/dev"), "0:0\n");
        symlink(machine.sys(&controller), machine.sys(&format!("{twin}/device"))).unwrap();
    }
    machine.set("block/nvme1n1/dev", "259:1\n");
    machine.set("block/nvme1n1/hidden", "0\n");
    symlink(&subsystem, machine.sys("block/nvme1n1/device")).unwrap();
}

#[test]
fn hidden_paths_of_a_multipath_disk_are_skipped() {
    for (states, expected) in [
        (&["live\n"][..], "nvme1n1"),
        (&["live\n", "live\n"], "nvme1n1"),
        (&["dead\n", "live\n"], "nvme1n1"),
        (&["dead\n", "deleting\n"], "-"),
    ] {
        let machine = Machine::new();
        multipath(&machine, VENDOR_AMAZON, states);
        machine.node("nvme1n1", "259:1", &page(VENDOR_AMAZON, SERIAL.as_bytes(), EBS));
        assert_eq!(machine.found(), expected, "{states:?}");
    }
    // A hidden entry is skipped even if its name has the form of a disk's name.
    let machine = Machine::new();
    machine.disk(1, VENDOR_AMAZON, SERIAL, EBS);
    machine.set("block/nvme1n1/hidden", "1\n");
    assert_eq!(machine.found(), "-");
    // A disk of Amazon with another model is refused even if it belongs to a subsystem.
    let machine = Machine::new();
    multipath(&machine, VENDOR_AMAZON, &["live"]);
    machine.node("nvme1n1", "259:1", &page(VENDOR_AMAZON, SERIAL.as_bytes(), QEMU));
    assert_eq!(machine.refused(), format!("/dev/nvme1n1 is not {VOLUME}: its model is \"QEMU NVMe Ctrl\""));
}

#[test]
fn names_of_other_devices_are_skipped() {
    for name in ["nvme1", "nvme1n1p1", "nvme1c1n1", "nvmen1", "nvme1n", "nvme-1n1", "nvme+1n1", "xvdf", "sda"]
    {
        let machine = Machine::new();
        machine.disk(1, VENDOR_AMAZON, SERIAL, EBS);
        fs::rename(machine.sys("block/nvme1n1"), machine.sys(&format!("block/{name}"))).unwrap();
        fs::rename(machine.dev("nvme1n1"), machine.dev(name)).unwrap();
        assert_eq!(machine.found(), "-", "{name}");
    }
}

#[test]
fn the_opened_disk_is_verified() {
    let other = "vol0aaaaaaaaaaaaaaaa";
    // Each case has the PCI vendor in sysfs; the vendor, serial and model in the disk's answer; and the expected error.
    // The error is empty if the disk is accepted.
    let cases: [(&str, u16, &str, &str, &str); 11] = [
        ("0x1d0f\n", VENDOR_AMAZON, SERIAL, EBS, ""),
        ("0x1b36\n", VENDOR_QEMU, SERIAL, QEMU, ""),
        ("0x1b36\n", VENDOR_QEMU, SERIAL, EBS, ""),
        ("0x1d0f\n", VENDOR_AMAZON, other, EBS, "its serial is \"vol0aaaaaaaaaaaaaaaa\""),
        ("0x1b36\n", VENDOR_QEMU, other, QEMU, "its serial is \"vol0aaaaaaaaaaaaaaaa\""),
        ("0x1b36\n", VENDOR_QEMU, "", QEMU, "its serial is \"\""),
        (
            "0x1d0f\n",
            VENDOR_AMAZON,
            SERIAL,
            INSTANCE_STORE,
            "its model is \"Amazon EC2 NVMe Instance Storage\"",
        ),
        ("0x1d0f\n", VENDOR_QEMU, SERIAL, EBS, "its vendor is 0x1b36"),
        (
            "0x1b36\n",
            VENDOR_AMAZON,
            SERIAL,
            INSTANCE_STORE,
            "its model is \"Amazon EC2 NVMe Instance Storage\"",
        ),
        // If the kernel does not know the vendor, the disk has to be an EBS volume.
        ("?\n", VENDOR_QEMU, SERIAL, QEMU, "its model is \"QEMU NVMe Ctrl\""),
        ("?\n", VENDOR_AMAZON, SERIAL, EBS, ""),
    ];
    for (sysfs, vendor, serial, model, objection) in cases {
        let machine = Machine::new();
        machine.kernel(1, vendor, SERIAL, model);
        machine.set("class/nvme/nvme1/device/vendor", sysfs);
        machine.node("nvme1n1", "259:1", &page(vendor, serial.as_bytes(), model));
        if objection.is_empty() {
            assert_eq!(machine.found(), "nvme1n1", "{sysfs} {vendor:#x} {serial} {model}");
        } else {
            assert_eq!(machine.refused(), format!("/dev/nvme1n1 is not {VOLUME}: {objection}"));
        }
    }
    let machine = Machine::new();
    machine.disk(1, VENDOR_QEMU, SERIAL, QEMU);
    fs::remove_file(machine.sys("class/nvme/nvme1/device/vendor")).unwrap();
    assert!(machine.refused().ends_with("its model is \"QEMU NVMe Ctrl\""));
}

#[test]
fn an_instance_store_is_refused_whatever_its_serial() {
    let machine = Machine::new();
    machine.disk(1, VENDOR_AMAZON, SERIAL, INSTANCE_STORE);
    assert!(machine.refused().ends_with("its model is \"Amazon EC2 NVMe Instance Storage\""));
}

#[test]
fn a_disk_without_an_answer_is_refused_and_a_removed_one_is_absent() {
    for (errno, expected) in [
        (libc::EPERM, "Operation not permitted"),
        (libc::EACCES, "Permission denied"),
        (libc::ENOTTY, "Inappropriate ioctl"),
        (libc::EINVAL, "Invalid argument"),
        (libc::EIO, "Input/output error"),
    ] {
        let machine = Machine::new();
        machine.kernel(1, VENDOR_AMAZON, SERIAL, EBS);
        machine.node("nvme1n1", "259:1", format!("errno {errno}").as_bytes());
        let text = machine.refused();
        let begin = format!("cannot verify that /dev/nvme1n1 is {VOLUME}: {expected}");
        assert!(text.starts_with(&begin), "{text}");
    }
    for errno in [libc::ENODEV, libc::ENXIO] {
        let machine = Machine::new();
        machine.kernel(1, VENDOR_AMAZON, SERIAL, EBS);
        machine.node("nvme1n1", "259:1", format!("errno {errno}").as_bytes());
        assert_eq!(machine.found(), "-");
    }
}

#[test]
fn another_node_with_the_name_is_refused() {
    let good = page(VENDOR_AMAZON, SERIAL.as_bytes(), EBS);
    let machine = Machine::new();
    machine.kernel(1, VENDOR_AMAZON, SERIAL, EBS);
    let none =
        "/dev/nvme1n1 does not exist, and creating a node failed: Operation not permitted (os error 1)";
    assert_eq!(machine.refused(), none);
    machine.node("nvme1n1", "259:2", &good);
    assert_eq!(machine.refused(), "/dev/nvme1n1 is device 259:2, but the kernel's nvme1n1 is 259:1");
    fs::remove_file(machine.dev("nvme1n1")).unwrap();
    fs::create_dir(machine.dev("nvme1n1")).unwrap();
    assert_eq!(machine.refused(), "/dev/nvme1n1 is not a block device");
    fs::remove_dir(machine.dev("nvme1n1")).unwrap();
    machine.node("nvme1n1", "259:1", &good);
    assert_eq!(machine.found(), "nvme1n1");
}

#[test]
fn a_disk_that_is_removed_meanwhile_is_absent() {
    for path in ["class/nvme/nvme1/serial", "block/nvme1n1/dev"] {
        let machine = Machine::new();
        machine.disk(1, VENDOR_AMAZON, SERIAL, EBS);
        fs::remove_file(machine.sys(path)).unwrap();
        assert_eq!(machine.found(), "-", "{path}");
    }
    let machine = Machine::new();
    machine.disk(1, VENDOR_AMAZON, SERIAL, EBS);
    fs::remove_file(machine.sys("block/nvme1n1/device")).unwrap();
    assert_eq!(machine.found(), "-");
}

#[test]
fn an_unreadable_disk_is_an_error_and_not_absent() {
    let machine = Machine::new();
    fs::remove_dir(machine.sys("block")).unwrap();
    assert!(format!("{:#}", machine.find(VOLUME).unwrap_err()).starts_with("listing the NVMe disks"));
    let machine = Machine::new();
    machine.disk(1, VENDOR_AMAZON, SERIAL, EBS);
    machine.set("block/nvme1n1/dev", "nonsense\n");
    assert!(machine.find(VOLUME).is_err());
    let machine = Machine::new();
    machine.disk(1, VENDOR_AMAZON, SERIAL, EBS);
    fs::remove_file(machine.sys("class/nvme/nvme1/serial")).unwrap();
    fs::create_dir(machine.sys("class/nvme/nvme1/serial")).unwrap();
    assert!(machine.find(VOLUME).is_err());
}

/// Returns whether the field is the serial followed only by padding. This function does not call the tested code.
fn fits(field: &[u8; 20], serial: &[u8]) -> bool {
    field.starts_with(serial) && field[serial.len()..].iter().all(|b| *b == b' ' || *b == 0)
}

#[test]
fn property_a_field_matches_only_the_padded_serial() {
    let serials = [&b"vol0123456789abcdef0"[..], b"vol01234567"];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        // xorshift64 with a fixed seed, so that every run of the test uses the same numbers.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let check = |field: &[u8; 20], serial: &[u8]| {
        let mut page = page(VENDOR_AMAZON, b"", EBS);
        page[4..24].copy_from_slice(field);
        let same = Identity::of(&page).serial == serial;
        assert_eq!(same, fits(field, serial), "{field:?} {serial:?}");
        same
    };
    let mut matched = 0;
    for serial in serials {
        let mut good = [b' '; 20];
        good[..serial.len()].copy_from_slice(serial);
        for at in 0..20 {
            for byte in 0..=255 {
                let mut field = good;
                field[at] = byte;
                matched += u32::from(check(&field, serial));
            }
        }
        // Tests random fields that are equal or similar to the padded serial. In some, the serial is shifted or cut
        // off, or single bytes are replaced.
        for _ in 0..200_000 {
            let mut field = [0; 20];
            let (shift, keep) = (random(3) as usize, random(21) as usize);
            for (at, byte) in field.iter_mut().enumerate() {
                *byte = match random(40) {
                    0 => random(256) as u8,
                    1 => 0,
                    _ if at < keep => serial.get(at.wrapping_sub(shift)).copied().unwrap_or(b' '),
                    _ => [b' ', 0][random(2) as usize],
                };
            }
            matched += u32::from(check(&field, serial));
        }
    }
    assert!(matched > 1000, "only {matched} fields matched");
}

#[test]
fn a_machine_without_nvme_is_recognized() {
    let machine = Machine::new();
    assert!(!has_nvme(&machine.sys("")));
    assert_eq!(machine.found(), "-");
    machine.disk(0, VENDOR_AMAZON, SERIAL, EBS);
    assert!(has_nvme(&machine.sys("")));
    assert!(!has_nvme(&machine.sys("nowhere")));
    let line = format!("nvme0n1 (259:0): serial {SERIAL:?}, model {EBS:?}, live");
    assert_eq!(list(&machine.sys("")).unwrap(), [line]);
}

//! Restricts the device nodes that a step can use: it can read the image's disk, and use the harmless devices of its
//! `/dev`.
//!
//! The kernel runs the program when a process opens a node or creates one. So a step with a node of a disk cannot write
//! to the disk, whatever the node's mode is. The root of the image is mounted from this disk. If a step wrote to the
//! disk below the file system, the kernel of the builder could crash.

use super::bpf::{AND, ARGUMENT, BpfProgram, Code, DEVICES, IF_EQUAL, LOAD_WORD, R0, UNLESS_EQUAL};
use crate::sandbox::dev::NODES;
use rustix::fs::{major, makedev, minor};

/// `BPF_PROG_TYPE_CGROUP_DEVICE`.
const TYPE_DEVICE: u32 = 15;
/// Offsets in `struct bpf_cgroup_dev_ctx`. The low half of the first word is the type of the node, and its high half
/// has the bits of the access.
const ACCESS: i16 = 0;
const MAJOR: i16 = 4;
const MINOR: i16 = 8;
const TYPE_MASK: i32 = 0xffff;
const BLOCK: i32 = 1;
const WRITE: i32 = 4 << 16;
/// The node of `/dev/ptmx`, which creates a terminal.
const PTMX: (u32, u32) = (5, 2);
/// The terminals have eight major numbers, which differ only in the last three bits.
const TERMINALS: i32 = 136;
const WITHOUT_LAST_BITS: i32 = !7;

/// The devices that a step can use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedDevices {
    /// The device numbers of the image's disk and its partitions.
    pub disk: Vec<u64>,
    /// Whether the step can write to the disk.
    pub writable: bool,
    /// The device numbers of the terminal that a shell uses.
    pub terminals: Vec<u64>,
}

impl AllowedDevices {
    /// Returns the program. A process that may create nodes, as only the step's helper may, can create the nodes of
    /// these devices.
    pub fn program(&self) -> BpfProgram {
        let mut code = Code::default();
        code.load(LOAD_WORD, R0, ARGUMENT, ACCESS);
        code.push(AND, R0, 0, 0, TYPE_MASK);
        let blocks = code.jump(IF_EQUAL, BLOCK);
        code.load(LOAD_WORD, R0, ARGUMENT, MAJOR);
        code.push(AND, R0, 0, 0, WITHOUT_LAST_BITS);
        let others = code.jump(UNLESS_EQUAL, TERMINALS);
        code.allow();
        code.land(others);
        let nodes = NODES.map(|(_, major, minor)| makedev(major, minor));
        let nodes = nodes.into_iter().chain([makedev(PTMX.0, PTMX.1)]).chain(self.terminals.iter().copied());
        for node in nodes {
            code.allow_device(node, true);
        }
        code.refuse_now();
        code.land(blocks);
        for node in &self.disk {
            code.allow_device(*node, self.writable);
        }
        BpfProgram { name: "devices", kind: TYPE_DEVICE, attach: DEVICES, code: code.finish_refusing() }
    }
}

impl Code {
    fn allow_device(&mut self, node: u64, writable: bool) {
        let others = [(MAJOR, major(node)), (MINOR, minor(node))].map(|(at, number)| {
            self.load(LOAD_WORD, R0, ARGUMENT, at);
            self.jump(UNLESS_EQUAL, number.cast_signed())
        });
        if !writable {
            self.load(LOAD_WORD, R0, ARGUMENT, ACCESS);
            self.push(AND, R0, 0, 0, WRITE);
            self.refuse(UNLESS_EQUAL, 0);
        }
        self.allow();
        others.into_iter().for_each(|jump| self.land(jump));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::cgroup::bpf::test::allowed;

    const CHARACTER: u32 = 2;
    const MAKE: u32 = 1;
    const READ: u32 = 2;
    const WRITE: u32 = 4;

    fn may(devices: &AllowedDevices, kind: u32, access: u32, node: (u32, u32)) -> bool {
        let words = [access << 16 | kind, node.0, node.1];
        let context: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        allowed(&devices.program().code, &context)
    }

    #[test]
    fn only_the_images_disk_can_be_read_and_none_written() {
        let block = BLOCK as u32;
        let disk = vec![makedev(7, 1), makedev(259, 70_000)];
        let mut devices = AllowedDevices { disk, ..AllowedDevices::default() };
        for node in [(7, 1), (259, 70_000)] {
            for (access, expected) in [(READ, true), (MAKE, true), (WRITE, false), (READ | WRITE, false)] {
                devices.writable = false;
                assert_eq!(may(&devices, block, access, node), expected, "{node:?} {access}");
                devices.writable = true;
                assert!(may(&devices, block, access, node), "{node:?} {access}");
            }
            assert!(!may(&devices, CHARACTER, READ, node), "a character device with this number");
        }
        for node in [(7, 0), (7, 2), (8, 1), (259, 4464), (1, 3), (0, 0), (136, 1)] {
            for access in [MAKE, READ, WRITE] {
                assert!(!may(&devices, block, access, node), "{node:?} {access}");
            }
        }
        let none = AllowedDevices { writable: true, ..AllowedDevices::default() };
        assert!(!may(&none, block, READ, (7, 1)));
    }

    #[test]
    fn only_harmless_character_devices_are_allowed() {
        let devices = AllowedDevices { terminals: vec![makedev(4, 64)], ..AllowedDevices::default() };
        let pts = [(136, 0), (136, 255), (143, 7)];
        let nodes = NODES.map(|(_, major, minor)| (major, minor));
        for node in nodes.into_iter().chain(pts).chain([(5, 2), (4, 64)]) {
            assert!(may(&devices, CHARACTER, READ | WRITE, node), "{node:?}");
        }
        // Memory, ports, the kernel's log, the console, loop-control, FUSE, TUN, KVM.
        for node in [
            (1, 1),
            (1, 4),
            (1, 11),
            (5, 1),
            (4, 1),
            (10, 237),
            (10, 229),
            (10, 200),
            (10, 232),
            (144, 0),
            (128, 0),
        ] {
            for access in [MAKE, READ, WRITE] {
                assert!(!may(&devices, CHARACTER, access, node), "{node:?}");
            }
        }
    }
}

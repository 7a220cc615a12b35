//! BPF programs of cgroups: an assembler, and the system calls that load and attach a program.

use crate::sys::lock::lock_mutex;
use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::io;
use std::sync::{Arc, Mutex};

/// The kernel's `struct bpf_insn`. On x86-64 and arm64, the low four bits of `registers` are the number of the target
/// register, and the high four bits are the number of the source register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct BpfInstruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A program and the hook to which it is attached. The numbers are those of linux/bpf.h.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BpfProgram {
    pub name: &'static str,
    /// `BPF_PROG_TYPE_…`
    pub kind: u32,
    /// `BPF_CGROUP_…`
    pub attach: u32,
    pub code: Vec<BpfInstruction>,
}

/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`.
pub const TYPE_ADDRESS: u32 = 18;
/// `BPF_CGROUP_DEVICE`, the hook for accesses to device nodes.
pub const DEVICES: u32 = 6;

// The registers. `R0` has the result. `ARGUMENT` has the program's argument, and r1 to r4 have the arguments of a call.
// `CONTEXT` also has the program's argument, because a call changes r1 to r5 but not this register. `FRAME` is the
// frame pointer.
pub const R0: u8 = 0;
pub const ARGUMENT: u8 = 1;
pub const CONTEXT: u8 = 6;
pub const FRAME: u8 = 10;

pub const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
pub const LOAD_BYTE: u8 = 0x71; // BPF_LDX | BPF_MEM | BPF_B
pub const MOVE: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
pub const SET: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
pub const ADD: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
pub const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
// These jumps compare 32 bits. A 64-bit comparison would sign-extend the immediate. Then it would fail for every
// address whose highest bit is set in the register.
pub const IF_EQUAL: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
pub const UNLESS_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
pub const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// A program that is being built.
#[derive(Default)]
pub struct Code {
    instructions: Vec<BpfInstruction>,
    /// The indexes of the jumps to the refusal at the end of the program.
    refusals: Vec<usize>,
}

impl Code {
    pub fn push(&mut self, code: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        self.instructions.push(BpfInstruction { code, registers: from << 4 | to, offset, immediate });
    }

    pub fn load(&mut self, width: u8, to: u8, from: u8, offset: i16) {
        self.push(width, to, from, offset, 0);
    }

    /// Adds a jump whose condition tests the low 32 bits of r0. Returns the jump's index, with which [`Self::land`]
    /// sets the target.
    pub fn jump(&mut self, condition: u8, value: i32) -> usize {
        self.push(condition, R0, 0, 0, value);
        self.instructions.len() - 1
    }

    pub fn land(&mut self, jump: usize) {
        let past = self.instructions.len() - jump - 1;
        self.instructions[jump].offset =
            i16::try_from(past).expect("a program has at most some thousand instructions");
    }

    pub fn refuse(&mut self, condition: u8, value: i32) {
        let jump = self.jump(condition, value);
        self.refusals.push(jump);
    }

    pub fn allow(&mut self) {
        self.end(1);
    }

    pub fn refuse_now(&mut self) {
        self.end(0);
    }

    /// Ends a program that allows what no instruction refused.
    pub fn finish(mut self) -> Vec<BpfInstruction> {
        self.allow();
        self.finish_refusing()
    }

    /// Ends a program that refuses what no instruction allowed.
    pub fn finish_refusing(mut self) -> Vec<BpfInstruction> {
        for jump in std::mem::take(&mut self.refusals) {
            self.land(jump);
        }
        self.end(0);
        self.instructions
    }

    fn end(&mut self, result: i32) {
        self.push(SET, R0, 0, 0, result);
        self.push(EXIT, 0, 0, 0, 0);
    }
}

/// The part of `union bpf_attr` that loads a program.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach: u32,
}

/// The part of `union bpf_attr` that attaches a program.
#[repr(C)]
struct Attach {
    target: i32,
    program: i32,
    kind: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that asks for the programs of a cgroup.
#[repr(C)]
struct Query {
    target: i32,
    kind: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    unused: u32,
}

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_QUERY: libc::c_int = 16;

/// The programs that this process loaded last. Most programs are the same for each step, and the kernel takes some
/// time to verify one.
static LOADED: Mutex<Vec<(BpfProgram, Arc<OwnedFd>)>> = Mutex::new(Vec::new());
/// The number of programs to remember. The images that one process bakes at the same time have different programs for
/// their disks.
const MOST_LOADED: usize = 32;

/// Attaches a program to a cgroup for the cgroup's lifetime. The attachment is not exclusive, so the programs of the
/// parent cgroups also apply.
#[allow(unsafe_code)]
pub fn attach(program: &BpfProgram, cgroup: BorrowedFd<'_>) -> Result<()> {
    const ALLOW_MULTI: u32 = 2;
    let loaded = loaded(program)?;
    let attach = Attach {
        target: cgroup.as_raw_fd(),
        program: loaded.as_raw_fd(),
        kind: program.attach,
        flags: ALLOW_MULTI,
    };
    // SAFETY: `attach` has the size that is passed, and lives until the call returns.
    let attached =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
    if attached < 0 {
        return Err(io::Error::last_os_error()).context("the kernel does not attach the program");
    }
    Ok(())
}

fn loaded(program: &BpfProgram) -> Result<Arc<OwnedFd>> {
    let mut known = lock_mutex(&LOADED);
    if let Some((_, fd)) = known.iter().find(|(known, _)| known == program) {
        return Ok(fd.clone());
    }
    let fd = Arc::new(load(program).context("the kernel rejected the program")?);
    if known.len() == MOST_LOADED {
        known.remove(0);
    }
    known.push((program.clone(), fd.clone()));
    Ok(fd)
}

#[allow(unsafe_code)]
fn load(program: &BpfProgram) -> Result<OwnedFd> {
    let load = Load {
        kind: program.kind,
        count: u32::try_from(program.code.len())?,
        instructions: program.code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        expected_attach: program.attach,
        ..Load::default()
    };
    // Signals are blocked, because the call fails with EAGAIN if a signal arrives while the kernel verifies the
    // program.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).context("blocking signals")?;
    // SAFETY: `load` has the size that is passed, and points to `count` instructions and a terminated text. All of them
    // live until the call returns, and the call copies them. A returned descriptor is new and has no other owner.
    let loaded = unsafe {
        match libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) {
            fd if fd < 0 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd as i32)),
        }
    };
    before.thread_set_mask().context("unblocking signals")?;
    Ok(loaded?)
}

/// Returns whether a program is attached to this cgroup itself, except programs for devices: the program for the
/// devices of a step replaces those. Also returns true if the kernel does not tell.
#[allow(unsafe_code)]
pub fn has_programs(cgroup: BorrowedFd<'_>) -> bool {
    /// The highest `BPF_CGROUP_…` of Linux 6.18, with some reserve.
    const LAST: u32 = 63;
    (0..=LAST).filter(|kind| *kind != DEVICES).any(|kind| {
        let mut query = Query {
            target: cgroup.as_raw_fd(),
            kind,
            query_flags: 0,
            attach_flags: 0,
            programs: 0,
            count: 0,
            unused: 0,
        };
        // SAFETY: `query` has the size that is passed, and lives until the call returns. The kernel writes only to it,
        // because its list of programs is empty.
        let asked = unsafe { libc::syscall(libc::SYS_bpf, PROG_QUERY, &raw mut query, size_of::<Query>()) };
        match (asked, io::Error::last_os_error().raw_os_error()) {
            (0, _) => query.count > 0,
            // The number is not that of a hook for cgroups, or the kernel has no such programs.
            (_, Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => false,
            _ => true,
        }
    })
}

#[cfg(test)]
pub mod test {
    use super::*;

    /// Runs a program as the kernel does. `memory` is the packet, or the argument that r1 points to.
    pub fn allowed(code: &[BpfInstruction], memory: &[u8]) -> bool {
        const FRAME_AT: u64 = 1 << 40;
        let mut stack = [0xaa_u8; 64];
        let (mut registers, mut at) = ([0_u64; 11], 0);
        registers[usize::from(FRAME)] = FRAME_AT;
        loop {
            let step = code[at];
            at += 1;
            let (to, from) = (usize::from(step.registers & 15), usize::from(step.registers >> 4));
            let read = |stack: &[u8; 64], length: usize| {
                let address = registers[from].wrapping_add_signed(step.offset.into());
                let bytes = match address.checked_sub(FRAME_AT - 64) {
                    Some(below) => &stack[below as usize..below as usize + length],
                    None => &memory[address as usize..address as usize + length],
                };
                let mut word = [0; 4];
                word[..length].copy_from_slice(bytes);
                u64::from(u32::from_le_bytes(word))
            };
            let mut jump = |truth: bool| at += if truth { step.offset as usize } else { 0 };
            match step.code {
                LOAD_WORD => registers[to] = read(&stack, 4),
                LOAD_BYTE => registers[to] = read(&stack, 1),
                MOVE => registers[to] = registers[from],
                SET => registers[to] = step.immediate as u64,
                ADD => registers[to] = registers[to].wrapping_add_signed(step.immediate.into()),
                AND => registers[to] = u64::from(registers[to] as u32 & step.immediate as u32),
                IF_EQUAL => jump(registers[to] as u32 == step.immediate as u32),
                UNLESS_EQUAL => jump(registers[to] as u32 != step.immediate as u32),
                CALL => {
                    let (target, length) = ((registers[3] - (FRAME_AT - 64)) as usize, registers[4] as usize);
                    registers[0] = match memory.get(..length) {
                        Some(bytes) => {
                            stack[target..target + length].copy_from_slice(bytes);
                            0
                        }
                        None => -14_i64 as u64, // EFAULT
                    };
                }
                EXIT => return registers[0] == 1,
                code => panic!("unknown instruction {code:x}"),
            }
        }
    }
}

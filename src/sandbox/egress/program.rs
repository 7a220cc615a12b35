//! The BPF programs of the filter, instruction by instruction. The kernel runs the packet filter for each packet that a
//! socket of the cgroup sends. It runs the address filters for each address to which such a socket connects or sends.
//!
//! The packet filter gives the main protection. It works for all protocols and types of sockets, because the header of
//! every packet has the destination address. The address filters have two other purposes. First, they see an address
//! before the host's firewall can rewrite it. For example, the ECS agent redirects 169.254.170.2 to a port of the
//! loopback. Second, they make `connect` fail with EPERM immediately. If only the packets were dropped, `connect` would
//! wait for minutes.

/// The refused IPv4 addresses.
pub const V4: [[u8; 4]; 3] = [
    [169, 254, 169, 254], // the metadata of an instance, with its role's credentials
    [169, 254, 170, 2],   // the credentials of an ECS task
    [169, 254, 170, 23],  // the credentials of an EKS pod
];
/// A refused IPv6 address consists of this prefix, eight zero bytes, and one of `V6_ENDS`. An address that ends with
/// one of [`V4`] is also refused. For example, this refuses IPv4-mapped addresses and NAT64 addresses.
const V6_PREFIX: [u8; 4] = [0xfd, 0x00, 0x0e, 0xc2];
const V6_ENDS: [[u8; 4]; 2] = [
    [0, 0, 0x02, 0x54], // fd00:ec2::254, metadata
    [0, 0, 0, 0x23],    // fd00:ec2::23, the credentials of an EKS pod
];

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
pub struct BpfProgram {
    pub name: &'static str,
    /// `BPF_PROG_TYPE_…`
    pub kind: u32,
    /// `BPF_CGROUP_…`
    pub attach: u32,
    pub code: Vec<BpfInstruction>,
}

const TYPE_SKB: u32 = 8;
const TYPE_ADDRESS: u32 = 18;
const EGRESS: u32 = 1;
const CONNECT4: u32 = 10;
const CONNECT6: u32 = 11;
const SENDMSG4: u32 = 14;
const SENDMSG6: u32 = 15;

/// Returns all programs to attach to a cgroup.
pub fn all() -> [BpfProgram; 5] {
    let of = |name, attach, code| BpfProgram { name, kind: TYPE_ADDRESS, attach, code };
    [
        BpfProgram { name: "packets", kind: TYPE_SKB, attach: EGRESS, code: packets() },
        of("connections", CONNECT4, addresses(|code| code.refuse_v4(ARGUMENT, USER_IP4))),
        of("connections over IPv6", CONNECT6, addresses(|code| code.refuse_v6(ARGUMENT, USER_IP6))),
        of("datagrams", SENDMSG4, addresses(|code| code.refuse_v4(ARGUMENT, USER_IP4))),
        of("datagrams over IPv6", SENDMSG6, addresses(|code| code.refuse_v6(ARGUMENT, USER_IP6))),
    ]
}

// The registers. `R0` has the result. `ARGUMENT` has the program's argument, and r1 to r4 have the arguments of a call.
// `CONTEXT` also has the program's argument, because a call changes r1 to r5 but not this register. `FRAME` is the
// frame pointer.
const R0: u8 = 0;
const ARGUMENT: u8 = 1;
const CONTEXT: u8 = 6;
const FRAME: u8 = 10;

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const LOAD_BYTE: u8 = 0x71; // BPF_LDX | BPF_MEM | BPF_B
const MOVE: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const SET: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const ADD: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
// These jumps compare 32 bits. A 64-bit comparison would sign-extend the immediate. Then it would fail for every
// address whose highest bit is set in the register.
const IF_EQUAL: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
const UNLESS_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// The number of `bpf_skb_load_bytes(skb, offset, to, length)`, which returns 0 if the packet has these bytes. Offset 0
/// is the start of the network header.
const SKB_LOAD_BYTES: i32 = 26;
/// Offsets in `struct bpf_sock_addr`. The addresses are in network byte order.
const USER_IP4: i16 = 4;
const USER_IP6: i16 = 8;
/// Offsets in the headers of IPv4 and IPv6.
const V4_TO: i16 = 16;
const V6_NEXT: i16 = 6;
const V6_TO: i16 = 24;
const V4_LENGTH: i32 = 20;
const V6_LENGTH: i32 = 40;
/// The position of a header's copy, relative to the frame pointer.
const HEADER: i16 = -40;
/// The first byte of an IPv4 header without options. A packet with options is refused, because it may be routed to an
/// address that differs from the one in its header.
const V4_PLAIN: i32 = 0x45;
const VERSION: i32 = 0xf0;
const VERSION_6: i32 = 0x60;
/// The next-header value of the IPv6 routing header. A packet with this header is refused, because it may be routed to
/// another address. A step cannot add a header before the routing header, so only the first next-header value is
/// checked.
const ROUTING_HEADER: i32 = 43;

fn packets() -> Vec<BpfInstruction> {
    let mut code = Code::default();
    code.push(MOVE, CONTEXT, ARGUMENT, 0, 0);
    code.load_header(V4_LENGTH);
    code.load(LOAD_BYTE, R0, FRAME, HEADER);
    let v4 = code.jump(IF_EQUAL, V4_PLAIN);
    code.push(AND, R0, 0, 0, VERSION);
    code.refuse(UNLESS_EQUAL, VERSION_6);
    code.load_header(V6_LENGTH);
    code.load(LOAD_BYTE, R0, FRAME, HEADER + V6_NEXT);
    code.refuse(IF_EQUAL, ROUTING_HEADER);
    code.refuse_v6(FRAME, HEADER + V6_TO);
    code.allow();
    code.land(v4);
    code.refuse_v4(FRAME, HEADER + V4_TO);
    code.finish()
}

fn addresses(body: impl FnOnce(&mut Code)) -> Vec<BpfInstruction> {
    let mut code = Code::default();
    body(&mut code);
    code.finish()
}

/// A program that is being built.
#[derive(Default)]
struct Code {
    instructions: Vec<BpfInstruction>,
    /// The indexes of the jumps to the refusal at the end of the program.
    refusals: Vec<usize>,
}

impl Code {
    fn push(&mut self, code: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        self.instructions.push(BpfInstruction { code, registers: from << 4 | to, offset, immediate });
    }

    fn load(&mut self, width: u8, to: u8, from: u8, offset: i16) {
        self.push(width, to, from, offset, 0);
    }

    /// Adds a jump whose condition tests the low 32 bits of r0. Returns the jump's index, with which [`Self::land`]
    /// sets the target.
    fn jump(&mut self, condition: u8, value: i32) -> usize {
        self.push(condition, R0, 0, 0, value);
        self.instructions.len() - 1
    }

    fn land(&mut self, jump: usize) {
        let past = self.instructions.len() - jump - 1;
        self.instructions[jump].offset = i16::try_from(past).expect("a program is a few instructions");
    }

    fn refuse(&mut self, condition: u8, value: i32) {
        let jump = self.jump(condition, value);
        self.refusals.push(jump);
    }

    /// Copies the first `length` bytes of the packet to the frame. Refuses shorter packets, because no step needs them.
    fn load_header(&mut self, length: i32) {
        self.push(MOVE, 1, CONTEXT, 0, 0);
        self.push(SET, 2, 0, 0, 0);
        self.push(MOVE, 3, FRAME, 0, 0);
        self.push(ADD, 3, 0, 0, HEADER.into());
        self.push(SET, 4, 0, 0, length);
        self.push(CALL, 0, 0, 0, SKB_LOAD_BYTES);
        self.refuse(UNLESS_EQUAL, 0);
    }

    fn refuse_v4(&mut self, base: u8, at: i16) {
        self.load(LOAD_WORD, R0, base, at);
        for address in V4 {
            self.refuse(IF_EQUAL, i32::from_ne_bytes(address));
        }
    }

    fn refuse_v6(&mut self, base: u8, at: i16) {
        let words = [(0, i32::from_ne_bytes(V6_PREFIX)), (4, 0), (8, 0)];
        let others = words.map(|(word, value)| {
            self.load(LOAD_WORD, R0, base, at + word);
            self.jump(UNLESS_EQUAL, value)
        });
        self.load(LOAD_WORD, R0, base, at + 12);
        for end in V6_ENDS {
            self.refuse(IF_EQUAL, i32::from_ne_bytes(end));
        }
        others.into_iter().for_each(|jump| self.land(jump));
        self.refuse_v4(base, at + 12);
    }

    fn allow(&mut self) {
        self.push(SET, R0, 0, 0, 1);
        self.push(EXIT, 0, 0, 0, 0);
    }

    fn finish(mut self) -> Vec<BpfInstruction> {
        self.allow();
        for jump in std::mem::take(&mut self.refusals) {
            self.land(jump);
        }
        self.push(SET, R0, 0, 0, 0);
        self.push(EXIT, 0, 0, 0, 0);
        self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    /// Runs a program as the kernel does. `memory` is the packet, or the argument that r1 points to.
    fn allowed(code: &[BpfInstruction], memory: &[u8]) -> bool {
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

    fn v4(to: &str) -> Vec<u8> {
        let mut packet = vec![0; 28];
        packet[0] = 0x45;
        packet[16..20].copy_from_slice(&to.parse::<Ipv4Addr>().unwrap().octets());
        packet
    }

    fn v6(to: &str) -> Vec<u8> {
        let mut packet = vec![0; 48];
        packet[0] = 0x6f; // the rest of this byte is the traffic class
        packet[24..40].copy_from_slice(&to.parse::<Ipv6Addr>().unwrap().octets());
        packet
    }

    /// `struct bpf_sock_addr`.
    fn address(v4: &str, v6: &str) -> Vec<u8> {
        let mut context = vec![0; 64];
        context[4..8].copy_from_slice(&v4.parse::<Ipv4Addr>().unwrap().octets());
        context[8..24].copy_from_slice(&v6.parse::<Ipv6Addr>().unwrap().octets());
        context
    }

    const REFUSED_V4: [&str; 3] = ["169.254.169.254", "169.254.170.2", "169.254.170.23"];
    const ALLOWED_V4: [&str; 8] = [
        "169.254.169.253", // the VPC's name server
        "169.254.169.123", // the VPC's time server
        "169.254.169.255",
        "254.169.254.169",
        "169.254.170.3",
        "169.253.170.2",
        "127.0.0.1",
        "0.0.0.0",
    ];
    const REFUSED_V6: [&str; 7] = [
        "fd00:ec2::254",
        "fd00:ec2::23",
        "::ffff:169.254.169.254",
        "::ffff:169.254.170.2",
        "::169.254.169.254",
        "64:ff9b::169.254.169.254",
        "2001:db8::a9fe:aa17",
    ];
    const ALLOWED_V6: [&str; 8] = [
        "fd00:ec2::253",
        "fd00:ec2::123",
        "fd00:ec2::1:254",
        "fd00:ec2:0:0:1::254",
        "fd00:ec2:1::254",
        "fd00:ec3::254",
        "::ffff:169.254.169.253",
        "::1",
    ];

    #[test]
    fn packets_to_the_credentials_are_dropped_and_no_others() {
        let code = packets();
        for to in REFUSED_V4 {
            assert!(!allowed(&code, &v4(to)), "{to}");
        }
        for to in ALLOWED_V4 {
            assert!(allowed(&code, &v4(to)), "{to}");
        }
        for to in REFUSED_V6 {
            assert!(!allowed(&code, &v6(to)), "{to}");
        }
        for to in ALLOWED_V6 {
            assert!(allowed(&code, &v6(to)), "{to}");
        }
    }

    #[test]
    fn packets_that_may_be_routed_elsewhere_or_are_malformed_are_dropped() {
        let code = packets();
        for first in [0x46, 0x4f, 0x44, 0x00, 0x50, 0xf5] {
            let mut packet = v4("192.0.2.1");
            packet[0] = first;
            assert!(!allowed(&code, &packet), "{first:x}");
        }
        let mut packet = v6("2001:db8::1");
        assert!(allowed(&code, &packet));
        packet[6] = 43;
        assert!(!allowed(&code, &packet));
        assert!(!allowed(&code, &v4("192.0.2.1")[..19]));
        assert!(!allowed(&code, &v6("2001:db8::1")[..39]));
        assert!(!allowed(&code, &[]));
    }

    #[test]
    fn addresses_of_the_credentials_are_refused_and_no_others() {
        let [_, connect4, connect6, sendmsg4, sendmsg6] = all();
        for program in [connect4, sendmsg4] {
            for to in REFUSED_V4 {
                assert!(!allowed(&program.code, &address(to, "::1")), "{} {to}", program.name);
            }
            for to in ALLOWED_V4 {
                assert!(allowed(&program.code, &address(to, "fd00:ec2::254")), "{} {to}", program.name);
            }
        }
        for program in [connect6, sendmsg6] {
            for to in REFUSED_V6 {
                assert!(!allowed(&program.code, &address("127.0.0.1", to)), "{} {to}", program.name);
            }
            for to in ALLOWED_V6 {
                assert!(allowed(&program.code, &address("169.254.169.254", to)), "{} {to}", program.name);
            }
        }
    }
}

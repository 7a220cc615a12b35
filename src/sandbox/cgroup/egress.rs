//! Prevents steps with the network from reading the builder's credentials.
//!
//! A step with the network uses the builder's network. In this network, the metadata service returns the credentials of
//! the builder's role to every process. So the kernel runs programs for the sockets of the step's cgroup, which block
//! the addresses of the service. A socket always belongs to the cgroup in which it was created. A step cannot leave its
//! cgroup, because it cannot access a cgroup file system.
//!
//! The kernel runs the packet filter for each packet that a socket of the cgroup sends. It runs the address filters for
//! each address to which such a socket connects or sends.
//!
//! The packet filter gives the main protection. It works for all protocols and types of sockets, because the header of
//! every packet has the destination address. The address filters have two other purposes. First, they see an address
//! before the host's firewall can rewrite it. For example, the ECS agent redirects 169.254.170.2 to a port of the
//! loopback. Second, they make `connect` fail with EPERM immediately. If only the packets were dropped, `connect` would
//! wait for minutes.

use super::bpf::{
    ADD, AND, ARGUMENT, BpfInstruction, BpfProgram, CALL, CONTEXT, Code, FRAME, IF_EQUAL, LOAD_BYTE,
    LOAD_WORD, MOVE, R0, SET, TYPE_ADDRESS, UNLESS_EQUAL,
};
use crate::error::{Failure, Kind};
use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The refused IPv4 addresses.
const V4: [[u8; 4]; 3] = [
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

const TYPE_SKB: u32 = 8;
const EGRESS: u32 = 1;
const CONNECT4: u32 = 10;
const CONNECT6: u32 = 11;
const SENDMSG4: u32 = 14;
const SENDMSG6: u32 = 15;

/// Returns the programs for a cgroup whose processes must not reach the credentials.
pub fn programs() -> [BpfProgram; 5] {
    let of = |name, attach, code| BpfProgram { name, kind: TYPE_ADDRESS, attach, code };
    [
        BpfProgram { name: "packets", kind: TYPE_SKB, attach: EGRESS, code: packets() },
        of("connections", CONNECT4, addresses(|code| code.refuse_v4(ARGUMENT, USER_IP4))),
        of("connections over IPv6", CONNECT6, addresses(|code| code.refuse_v6(ARGUMENT, USER_IP6))),
        of("datagrams", SENDMSG4, addresses(|code| code.refuse_v4(ARGUMENT, USER_IP4))),
        of("datagrams over IPv6", SENDMSG6, addresses(|code| code.refuse_v6(ARGUMENT, USER_IP6))),
    ]
}

/// Checks that the filter is effective. The helper calls this function in the step's cgroup, before any program of the
/// image runs. Before Linux 5.15, the filter has no effect if the machine uses the controllers net_cls or net_prio of
/// cgroup version 1, because then sockets do not record their cgroup.
pub fn verify_filter() -> Result<()> {
    let v6 = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    let addresses = V4.map(|bytes| IpAddr::from(Ipv4Addr::from(bytes)));
    for address in addresses.into_iter().chain([v6.into()]) {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
        let socket = match socket {
            Err(Errno::AFNOSUPPORT) => continue, // a kernel without IPv6
            socket => socket.context("making a socket")?,
        };
        // Port 9 is the discard port. The filter refuses the packet before the kernel looks up a route.
        let sent = rustix::net::sendto(&socket, &[], SendFlags::DONTWAIT, &SocketAddr::new(address, 9));
        if sent != Err(Errno::PERM) {
            return Err(unprotected(&format!("the filter does not block {address}")).into());
        }
    }
    Ok(())
}

/// Returns the failure for a machine that cannot protect the credentials.
pub fn unprotected(why: &str) -> Failure {
    Kind::Machine
        .failure(format!("oven cannot block access to the builder's credentials from a step with the network: {why}"))
        .hint(
            "This needs cgroup v2 and BPF. A container must be privileged. If the steps of an image may use the \
             credentials, set `imds = true` in its image.toml.",
        )
}

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

impl Code {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::cgroup::bpf::test::allowed;
    use std::net::{Ipv4Addr, Ipv6Addr};

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
        let [_, connect4, connect6, sendmsg4, sendmsg6] = programs();
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

//! Prevents steps with the network from taking the builder's low ports. A service that clients of the builder trust, such
//! as a name server, has such a port. The capability for it is not sufficient, because the sysctl
//! `net.ipv4.ip_unprivileged_port_start` of the builder may give low ports to everybody.

use super::bpf::{AND, ARGUMENT, BpfInstruction, BpfProgram, Code, IF_EQUAL, LOAD_WORD, R0, TYPE_ADDRESS};

const BIND4: u32 = 8;
const BIND6: u32 = 9;
/// The offset of `user_port` in `struct bpf_sock_addr`. The low half of this word is the port in network byte order, so
/// on a little-endian machine the lowest byte of the word is the high byte of the port.
const USER_PORT: i16 = 24;
/// Ports below 1024 have a high byte below 4, so none of these bits.
const HIGH_PORT: i32 = 0xfc;
const _: () = assert!(cfg!(target_endian = "little"));

/// Returns the programs that refuse to bind a socket to a port below 1024. Port 0 means any high port, and is allowed.
pub fn programs() -> [BpfProgram; 2] {
    let of = |name, attach| BpfProgram { name, kind: TYPE_ADDRESS, attach, code: ports() };
    [of("low ports", BIND4), of("low ports over IPv6", BIND6)]
}

fn ports() -> Vec<BpfInstruction> {
    let mut code = Code::default();
    code.load(LOAD_WORD, R0, ARGUMENT, USER_PORT);
    let any = code.jump(IF_EQUAL, 0);
    code.push(AND, R0, 0, 0, HIGH_PORT);
    code.refuse(IF_EQUAL, 0);
    code.land(any);
    code.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::cgroup::bpf::test::allowed;

    #[test]
    fn low_ports_are_refused_and_no_others() {
        for program in programs() {
            let may_bind = |port: u16| {
                let mut context = vec![0; 64];
                context[24..26].copy_from_slice(&port.to_be_bytes());
                allowed(&program.code, &context)
            };
            for port in [1, 22, 53, 80, 255, 256, 443, 512, 1023] {
                assert!(!may_bind(port), "{} {port}", program.name);
            }
            for port in [0, 1024, 1025, 1280, 4096, 8080, 32768, 65535] {
                assert!(may_bind(port), "{} {port}", program.name);
            }
        }
    }
}

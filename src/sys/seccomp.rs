//! The filter of a step's system calls. It refuses dangerous calls, in addition to the limits of the step's
//! capabilities. It also turns syncs into no-ops. A step is one command that oven runs in the image.
//!
//! Calls that are useful only to escape from a container fail with EPERM. Calls for which programs have an alternative
//! fail with ENOSYS, so that programs use the alternative. For programs of another architecture (i386 on x86_64, x32),
//! all calls fail with ENOSYS, because the same numbers mean other calls there. So a package with an i386 program can
//! be installed, unless a script of the package *runs* the program.

use anyhow::{Context, Result};
use libc::{EAFNOSUPPORT, ENOMEM, ENOSYS, EPERM, EPROTONOSUPPORT, ESOCKTNOSUPPORT, c_long, sock_filter};
use std::io;

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7; // AUDIT_ARCH_AARCH64
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("oven knows the system calls of x86_64 and aarch64 only");

/// The highest call number that was reviewed for this filter. It belongs to the newest call of Linux 6.13. Calls with
/// higher numbers fail with ENOSYS, as on a kernel that does not have them.
const LAST_KNOWN: u32 = 466;
/// The first call number of x32. This second ABI has the same architecture value as x86_64, so its calls are recognized
/// only by their numbers.
#[cfg(target_arch = "x86_64")]
const X32: u32 = 0x4000_0000;

/// `clone` and `unshare` with any of these flags are refused. For example, a process would have all capabilities in a
/// new user namespace.
const NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;
/// The flag `CLONE_NEWTIME` of `unshare`. In `clone` this bit belongs to the exit signal.
const NEWTIME: i32 = 0x80;

/// Calls that are refused whatever their arguments are.
const REFUSED: &[c_long] = &[
    // mounts and other namespaces
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    // the kernel itself: modules, programs, other kernels, its log, its clock
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_kexec_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    #[cfg(target_arch = "aarch64")]
    294, // kexec_file_load
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_vhangup,
    libc::SYS_nfsservctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    // file handles, with which a step could open files outside its root
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    // key rings, which no namespace separates
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // access to the memory of other processes, which exploits need and installations do not
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_userfaultfd,
    libc::SYS_lookup_dcookie,
];

/// Calls that fail as if this kernel did not have them. For each of these calls, programs have an alternative.
const ABSENT: &[c_long] = &[
    libc::SYS_clone3, // its flags lie in memory, which a filter cannot read; libc falls back to clone
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // takes contexts from a number that the whole machine shares (fs.aio-max-nr); databases fall back to plain reads
    libc::SYS_io_setup,
    SYS_MEMFD_SECRET, // memory that the kernel can neither move nor swap
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt, // segments of 16-bit programs; kernels can be built without it
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib, // unused since the time of a.out
];
/// The number is the same on both architectures. libc has it only for some of them.
const SYS_MEMFD_SECRET: c_long = 447;

/// Calls that succeed immediately and do nothing. One real sync is made when the root is closed. `msync` is not in this
/// list, because it also makes a mapping's changes visible to other readers. Few programs use it.
const SYNCS: &[c_long] =
    &[libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_sync, libc::SYS_syncfs, libc::SYS_sync_file_range];

/// Requests of `ioctl` that are refused. Most of them need a capability that steps do not have, and are listed so that
/// there are two obstacles.
const REQUESTS: &[u32] = &[
    // Terminals: put characters into the input, as if the user had typed them (TIOCSTI, or TIOCLINUX on a virtual
    // console); take the machine's console (TIOCCONS); set another line discipline, for which the kernel could load a
    // module (TIOCSETD).
    0x5412,
    0x541c,
    0x541d,
    0x5423,
    // File systems (linux/fs.h, ext4, xfs): freeze, thaw, trim, shut down, and resize the one that is mounted.
    0xc004_5877,
    0xc004_5878,
    0xc018_5879,
    0x8004_587d,
    0x4008_6610,
    0x4010_586e,
    // Bridges and VLANs (linux/sockios.h). The kernel loads their modules even for a process without any rights.
    0x8940,
    0x8941,
    0x89a0,
    0x89a1,
    0x8982,
    0x8983,
];
/// All requests to loop devices are `0x4C..` (linux/loop.h). They are refused, because the image's disk may be a loop
/// device to which the step can write. With such a request, the step could change the device's offset in its file, or
/// keep the device bound after all users have closed it.
const LOOP: u32 = 0x4c00;
/// The second byte of a request is its type. All requests of these types are refused: commands for NVMe and SCSI
/// devices, which go past the kernel's file systems and partitions, and keyboards, fonts and screens of virtual
/// consoles.
const REQUEST_TYPES: &[u32] = &[0x4e00, 0x2200, 0x4b00, 0x5600];

/// The protocols of `AF_INET` and `AF_INET6` sockets: TCP, UDP, and ICMP for `ping`. 0 is the usual one of a type. For
/// another protocol, the kernel may load a module, such as the one of SCTP.
const STREAM_PROTOCOLS: &[i32] = &[0, libc::IPPROTO_TCP];
const DATAGRAM_PROTOCOLS: &[i32] = &[0, libc::IPPROTO_UDP, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6];
/// Calls with the index of their flags, and the flag that requests huge pages. They come from a pool of the whole
/// machine, and the limit for a step's memory does not count them. The calls fail with ENOMEM, as if the pool was empty:
/// then programs use ordinary pages.
const HUGE_PAGES: &[(c_long, u32, u32)] = &[
    (libc::SYS_mmap, 3, libc::MAP_HUGETLB as u32),
    (libc::SYS_memfd_create, 1, libc::MFD_HUGETLB),
    (libc::SYS_shmget, 2, libc::SHM_HUGETLB as u32),
];
/// The bits of a socket's type without its flags.
const SOCKET_TYPE: u32 = 0xf;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_ABOVE: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
#[cfg(target_arch = "x86_64")]
const JUMP_FROM: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const JUMP_SET: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Offsets in `struct seccomp_data`. The low half of an argument comes first on both architectures.
const NUMBER_AT: u32 = 0;
const ARCH_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

/// A compiled filter.
pub struct SyscallFilter(Vec<sock_filter>);

impl SyscallFilter {
    /// Builds the filter. If `sync` is false, syncs do nothing.
    pub fn new(sync: bool) -> Self {
        Self::with(sync, &[libc::NETLINK_ROUTE])
    }

    /// Like [`Self::new`], but sockets for the audit log can be created. Records cannot be sent without
    /// `CAP_AUDIT_WRITE`, which no step has.
    pub fn with_audit_socket(sync: bool) -> Self {
        Self::with(sync, &[libc::NETLINK_ROUTE, libc::NETLINK_AUDIT])
    }

    fn with(sync: bool, netlinks: &[i32]) -> Self {
        let mut filter = Self(Vec::new());
        filter.load(ARCH_AT);
        filter.unless(JUMP_EQUAL, ARCH, ENOSYS);
        filter.load(NUMBER_AT);
        #[cfg(target_arch = "x86_64")]
        filter.when(JUMP_FROM, X32, ENOSYS);
        filter.when(JUMP_ABOVE, LAST_KNOWN, ENOSYS);
        for number in REFUSED {
            filter.when(JUMP_EQUAL, *number as u32, EPERM);
        }
        for number in ABSENT {
            filter.when(JUMP_EQUAL, *number as u32, ENOSYS);
        }
        if !sync {
            for number in SYNCS {
                filter.when(JUMP_EQUAL, *number as u32, 0);
            }
        }
        filter.argument(libc::SYS_clone, 0, |block| block.when(JUMP_SET, NAMESPACES as u32, EPERM));
        filter.argument(libc::SYS_unshare, 0, |block| {
            block.when(JUMP_SET, (NAMESPACES | NEWTIME) as u32, EPERM);
        });
        for (number, index, flag) in HUGE_PAGES {
            filter.argument(*number, *index, |block| block.when(JUMP_SET, *flag, ENOMEM));
        }
        #[cfg(target_arch = "x86_64")]
        filter.argument(libc::SYS_mknod, 1, Self::refuse_devices);
        filter.argument(libc::SYS_mknodat, 2, Self::refuse_devices);
        filter.argument(libc::SYS_ioctl, 1, |block| {
            for request in REQUESTS {
                block.when(JUMP_EQUAL, *request, EPERM);
            }
            block.push(AND, 0, 0, 0xffff_ff00);
            block.when(JUMP_EQUAL, LOOP, EPERM);
            block.push(AND, 0, 0, 0xff00);
            for kind in REQUEST_TYPES {
                block.when(JUMP_EQUAL, *kind, EPERM);
            }
        });
        for number in [libc::SYS_socket, libc::SYS_socketpair] {
            filter.argument(number, 0, |block| block.judge_socket(netlinks));
        }
        filter.answer(libc::SECCOMP_RET_ALLOW);
        filter
    }

    /// Installs the filter for this thread and its children, permanently. Needs no_new_privs or `SYS_ADMIN`.
    #[allow(unsafe_code)]
    pub fn install(&mut self) -> Result<()> {
        let len = u16::try_from(self.0.len()).context("the filter is too long")?;
        let program = libc::sock_fprog { len, filter: self.0.as_mut_ptr() };
        // SAFETY: `program` points to `len` instructions. `program` and the instructions live until the call returns,
        // and the kernel copies them.
        let result =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
        if result < 0 {
            return Err(io::Error::last_os_error()).context("installing the system call filter");
        }
        Ok(())
    }

    /// Refuses to create device nodes. The loaded argument is the mode, which contains the type.
    fn refuse_devices(block: &mut Self) {
        block.push(AND, 0, 0, libc::S_IFMT);
        block.when(JUMP_EQUAL, libc::S_IFCHR, EPERM);
        block.when(JUMP_EQUAL, libc::S_IFBLK, EPERM);
    }

    /// Allows the sockets that package managers, scripts and services need. The loaded argument is the family. If a
    /// process without any rights creates another socket, the kernel may load a module. An AF_VSOCK socket would reach
    /// the hypervisor from every network namespace.
    ///
    /// Of AF_NETLINK, only NETLINK_ROUTE is allowed, with which programs list addresses and routes. With NETLINK_AUDIT,
    /// root could write records into the host's audit log. EPROTONOSUPPORT means that the kernel has no audit. Then
    /// `useradd`, PAM, sudo and sshd continue without it. With EPERM, `useradd` would fail. Other protocols make the
    /// kernel load modules, show devices of the host, or reach services of the host that listen to NETLINK_USERSOCK.
    ///
    /// Raw sockets need a capability that steps do not have. Programs like `ping` expect EPERM.
    fn judge_socket(&mut self, netlinks: &[i32]) {
        let block = self;
        block.push(JUMP_EQUAL, 0, 1, libc::AF_UNIX as u32);
        block.answer(libc::SECCOMP_RET_ALLOW);
        block.nested(libc::AF_NETLINK, |netlink| {
            netlink.load_argument(2);
            netlink.allow_only(netlinks, EPROTONOSUPPORT);
        });
        for family in [libc::AF_INET, libc::AF_INET6] {
            block.nested(family, |internet| {
                internet.load_argument(1);
                internet.push(AND, 0, 0, SOCKET_TYPE);
                for (kind, protocols) in
                    [(libc::SOCK_STREAM, STREAM_PROTOCOLS), (libc::SOCK_DGRAM, DATAGRAM_PROTOCOLS)]
                {
                    internet.nested(kind, |protocol| {
                        protocol.load_argument(2);
                        protocol.allow_only(protocols, EPROTONOSUPPORT);
                    });
                }
                internet.when(JUMP_EQUAL, libc::SOCK_RAW as u32, EPERM);
                internet.answer(libc::SECCOMP_RET_ERRNO | ESOCKTNOSUPPORT as u32);
            });
        }
        block.answer(libc::SECCOMP_RET_ERRNO | EAFNOSUPPORT as u32);
    }

    /// Allows the call if the loaded value is one of `values`. Otherwise the call fails with `errno`.
    fn allow_only(&mut self, values: &[i32], errno: i32) {
        for value in values {
            self.push(JUMP_EQUAL, 0, 1, *value as u32);
            self.answer(libc::SECCOMP_RET_ALLOW);
        }
        self.answer(libc::SECCOMP_RET_ERRNO | errno as u32);
    }

    /// Adds instructions for the case that the loaded value is `value`. They have to end with an answer, so in all
    /// other cases the loaded value is still the same.
    fn nested(&mut self, value: i32, judge: impl FnOnce(&mut Self)) {
        let mut block = Self(Vec::new());
        judge(&mut block);
        let past = u8::try_from(block.0.len()).expect("a block is a few instructions");
        self.push(JUMP_EQUAL, 0, past, value as u32);
        self.0.append(&mut block.0);
    }

    fn load_argument(&mut self, index: u32) {
        self.load(ARGUMENTS_AT + 8 * index);
    }

    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) {
        self.0.push(sock_filter { code, jt, jf, k });
    }
    fn load(&mut self, offset: u32) {
        self.push(LOAD, 0, 0, offset);
    }
    fn answer(&mut self, value: u32) {
        self.push(RETURN, 0, 0, value);
    }
    fn when(&mut self, jump: u16, value: u32, errno: i32) {
        self.push(jump, 0, 1, value);
        self.answer(libc::SECCOMP_RET_ERRNO | errno as u32);
    }
    fn unless(&mut self, jump: u16, value: u32, errno: i32) {
        self.push(jump, 1, 0, value);
        self.answer(libc::SECCOMP_RET_ERRNO | errno as u32);
    }
    /// Filters a call by one argument. `judge` adds the instructions that check the argument. If no check refuses the
    /// call, the call is allowed.
    fn argument(&mut self, number: c_long, index: u32, judge: impl FnOnce(&mut Self)) {
        let mut block = Self(Vec::new());
        block.load_argument(index);
        judge(&mut block);
        block.answer(libc::SECCOMP_RET_ALLOW);
        let past = u8::try_from(block.0.len()).expect("a block is a few instructions");
        self.push(JUMP_EQUAL, 0, past, number as u32);
        self.0.append(&mut block.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel does.
    fn judge<const N: usize>(filter: &SyscallFilter, arch: u32, number: c_long, arguments: [u64; N]) -> u32 {
        let mut data = [0_u8; 64];
        data[0..4].copy_from_slice(&(number as u32).to_le_bytes());
        data[4..8].copy_from_slice(&arch.to_le_bytes());
        for (index, argument) in arguments.iter().enumerate() {
            data[16 + 8 * index..24 + 8 * index].copy_from_slice(&argument.to_le_bytes());
        }
        let (mut at, mut register) = (0, 0_u32);
        loop {
            let step = filter.0[at];
            at += 1;
            let mut jump = |truth: bool| at += usize::from(if truth { step.jt } else { step.jf });
            match step.code {
                LOAD => {
                    let from = step.k as usize;
                    register = u32::from_le_bytes(data[from..from + 4].try_into().unwrap());
                }
                AND => register &= step.k,
                JUMP_EQUAL => jump(register == step.k),
                JUMP_ABOVE => jump(register > step.k),
                #[cfg(target_arch = "x86_64")]
                JUMP_FROM => jump(register >= step.k),
                JUMP_SET => jump(register & step.k != 0),
                RETURN => return step.k,
                code => panic!("unknown instruction {code}"),
            }
        }
    }
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const fn errno(number: i32) -> u32 {
        libc::SECCOMP_RET_ERRNO | number as u32
    }

    #[test]
    fn what_packages_do_is_allowed() {
        let filter = SyscallFilter::new(false);
        for number in
            [libc::SYS_openat, libc::SYS_execve, libc::SYS_chroot, libc::SYS_setuid, libc::SYS_renameat2]
        {
            assert_eq!(judge(&filter, ARCH, number, [0; 3]), ALLOW, "{number}");
        }
        let thread = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SETTLS) as u64;
        assert_eq!(judge(&filter, ARCH, libc::SYS_clone, [thread, 0, 0]), ALLOW);
        assert_eq!(judge(&filter, ARCH, libc::SYS_unshare, [libc::CLONE_FS as u64, 0, 0]), ALLOW);
        assert_eq!(judge(&filter, ARCH, libc::SYS_mknodat, [0, 0, u64::from(libc::S_IFIFO | 0o644)]), ALLOW);
        assert_eq!(judge(&filter, ARCH, libc::SYS_ioctl, [0, 0x5401, 0]), ALLOW);
        // BLKGETSIZE64 is allowed, because steps may read the nodes of the image's disk.
        assert_eq!(judge(&filter, ARCH, libc::SYS_ioctl, [0, 0x8008_1272, 0]), ALLOW);
        assert_eq!(judge(&filter, ARCH, libc::SYS_socket, [libc::AF_UNIX as u64, 0, 0]), ALLOW);
    }

    #[test]
    fn what_escapes_do_is_refused() {
        let filter = SyscallFilter::new(true);
        for number in REFUSED {
            assert_eq!(judge(&filter, ARCH, *number, [0; 3]), errno(EPERM), "{number}");
        }
        assert_eq!(judge(&filter, ARCH, libc::SYS_clone3, [0; 3]), errno(ENOSYS));
        let namespaces = [
            libc::CLONE_NEWUSER,
            libc::CLONE_NEWNS,
            libc::CLONE_NEWPID,
            libc::CLONE_NEWNET,
            libc::CLONE_NEWIPC,
            libc::CLONE_NEWUTS,
            libc::CLONE_NEWCGROUP,
        ];
        for flag in namespaces {
            for number in [libc::SYS_clone, libc::SYS_unshare] {
                let flags = (flag | libc::SIGCHLD) as u64 & 0xffff_ffff;
                assert_eq!(judge(&filter, ARCH, number, [flags, 0, 0]), errno(EPERM), "{flag:x}");
            }
        }
        for kind in [libc::S_IFCHR, libc::S_IFBLK] {
            assert_eq!(
                judge(&filter, ARCH, libc::SYS_mknodat, [0, 0, u64::from(kind | 0o600)]),
                errno(EPERM)
            );
        }
        // Both the kernel and the filter use only the low half of a request.
        for request in [0x5412, 0x1_0000_5412, 0x541c, 0x5423, 0x4c00, 0x4c04, 0x4c0a, 0x4c82] {
            assert_eq!(judge(&filter, ARCH, libc::SYS_ioctl, [0, request, 0]), errno(EPERM));
        }
        // FIFREEZE, EXT4_IOC_SHUTDOWN, SIOCBRADDBR, NVME_IOCTL_ADMIN_CMD, NVME_IOCTL_IO_CMD, SG_IO, KDSKBENT, VT_ACTIVATE
        for request in [0xc004_5877, 0x8004_587d, 0x89a0, 0xc048_4e41, 0xc048_4e43, 0x2285, 0x4b47, 0x5606] {
            assert_eq!(judge(&filter, ARCH, libc::SYS_ioctl, [0, request, 0]), errno(EPERM), "{request:x}");
        }
        for number in ABSENT {
            assert_eq!(judge(&filter, ARCH, *number, [0; 3]), errno(ENOSYS), "{number}");
        }
    }

    #[test]
    fn sockets_have_known_families_types_and_protocols() {
        let filter = SyscallFilter::new(false);
        let (stream, datagram, raw) = (1, 2, 3);
        for number in [libc::SYS_socket, libc::SYS_socketpair] {
            let judge = |family, kind, protocol| judge(&filter, ARCH, number, [family, kind, protocol]);
            for family in 0..64 {
                let want = match family {
                    1 | 2 | 10 | 16 => ALLOW,
                    _ => errno(EAFNOSUPPORT),
                };
                assert_eq!(judge(family, stream, 0), want, "{family}");
            }
            let flags = (libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
            for protocol in 0..300 {
                for family in [2, 10] {
                    let want = |known: &[u64]| {
                        if known.contains(&protocol) { ALLOW } else { errno(EPROTONOSUPPORT) }
                    };
                    assert_eq!(judge(family, stream | flags, protocol), want(&[0, 6]), "{protocol}");
                    assert_eq!(
                        judge(family, datagram | flags, protocol),
                        want(&[0, 1, 17, 58]),
                        "{protocol}"
                    );
                    assert_eq!(judge(family, raw | flags, protocol), errno(EPERM), "{protocol}");
                    for kind in [0, 4, 5, 6, 10, 15] {
                        assert_eq!(judge(family, kind, protocol), errno(ESOCKTNOSUPPORT), "{kind}");
                    }
                }
                // The kernel takes the low half of each argument.
                let want = if protocol == 0 { ALLOW } else { errno(EPROTONOSUPPORT) };
                assert_eq!(judge(16, raw, 1 << 32 | protocol), want, "of netlink: {protocol}");
                assert_eq!(judge(1, stream, protocol), ALLOW);
            }
        }
        let filter = SyscallFilter::with_audit_socket(false);
        for (protocol, want) in [(0, ALLOW), (9, ALLOW), (15, errno(EPROTONOSUPPORT))] {
            assert_eq!(judge(&filter, ARCH, libc::SYS_socket, [16, raw, protocol]), want, "{protocol}");
        }
    }

    #[test]
    fn huge_pages_are_refused() {
        let filter = SyscallFilter::new(true);
        let (private, shared) = (0x22, 0x21); // with MAP_ANONYMOUS
        for flags in [private, shared] {
            assert_eq!(judge(&filter, ARCH, libc::SYS_mmap, [0, 4096, 3, flags, 0, 0]), ALLOW);
            for size in [0, 21 << 26, 30 << 26] {
                let huge = flags | 0x40000 | size;
                assert_eq!(judge(&filter, ARCH, libc::SYS_mmap, [0, 4096, 3, huge, 0, 0]), errno(ENOMEM));
            }
        }
        for (number, plain, huge) in [
            (libc::SYS_memfd_create, [0, 3, 0], [0, 7, 0]),
            (libc::SYS_shmget, [0, 1, 0o1600], [0, 1, 0o5600]),
        ] {
            assert_eq!(judge(&filter, ARCH, number, plain), ALLOW, "{number}");
            assert_eq!(judge(&filter, ARCH, number, huge), errno(ENOMEM), "{number}");
        }
    }

    #[test]
    fn other_architectures_and_later_calls_are_absent() {
        let filter = SyscallFilter::new(true);
        assert_eq!(judge(&filter, 0x4000_0003, 5, [0; 3]), errno(ENOSYS)); // i386
        assert_eq!(judge(&filter, ARCH, 467, [0; 3]), errno(ENOSYS)); // open_tree_attr
        #[cfg(target_arch = "x86_64")]
        assert_eq!(judge(&filter, ARCH, 0x4000_0000 + 1, [0; 3]), errno(ENOSYS));
    }

    #[test]
    fn syncs_are_real_only_where_asked() {
        for number in SYNCS {
            assert_eq!(judge(&SyscallFilter::new(false), ARCH, *number, [0; 3]), errno(0));
            assert_eq!(judge(&SyscallFilter::new(true), ARCH, *number, [0; 3]), ALLOW);
        }
    }
}

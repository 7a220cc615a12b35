/* What a hostile package would try, from inside a step. A line for each attempt: "refused NAME" or "ALLOWED NAME".
 *
 * usage: attack HOST_PID CANARY DISK_MAJOR DISK_MINOR SECRET
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/ipc.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int host_pid;
static const char *canary, *secret;
static dev_t disk;

/* Each attempt runs in a process of its own and returns whether it got what it wanted. */
static int try_(int (*attempt)(void)) {
    pid_t pid = fork();
    if (pid == 0) _exit(attempt());
    int status;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

static int node(const char *path, mode_t kind) {
    if (mknod(path, kind | 0600, disk) < 0) return 0;
    int allowed = open(path, O_RDONLY) >= 0;
    unlink(path);
    return allowed || kind == S_IFCHR;
}
static int mknod_block(void) { return node("/root/disk", S_IFBLK); }
static int mknod_shm(void) { return node("/dev/shm/disk", S_IFBLK); }
static int mknod_dev(void) { return node("/dev/disk0", S_IFBLK); }
static int mknod_char(void) { disk = makedev(1, 1); return node("/dev/mem0", S_IFCHR); }
static int mknod_whiteout(void) { disk = 0; return node("/root/whiteout", S_IFCHR); }
static int image_node(void) { return open("/root/planted-disk", O_RDONLY) >= 0; }
static int mount_tmpfs(void) { return mount("x", "/mnt", "tmpfs", 0, 0) == 0; }
static int mount_devtmpfs(void) { return mount("x", "/mnt", "devtmpfs", 0, 0) == 0; }
static int mount_proc(void) { return mount("x", "/mnt", "proc", 0, 0) == 0; }
static int mount_cgroup(void) { return mount("x", "/mnt", "cgroup2", 0, 0) == 0; }
static int remount_cover(void) { return mount(0, "/proc/sys", 0, MS_REMOUNT | MS_BIND, 0) == 0; }
static int remount_root(void) { return mount(0, "/", 0, MS_REMOUNT | MS_BIND, 0) == 0; }
static int umount_cover(void) { return umount2("/proc/sys", MNT_DETACH) == 0; }
static int new_mount_api(void) {
    return syscall(SYS_fsopen, "tmpfs", 0) >= 0 || syscall(SYS_open_tree, AT_FDCWD, "/", 1) >= 0;
}
static int open_tree_attr(void) { return syscall(467, AT_FDCWD, "/", 1, 0, 0) >= 0; }
static int pivot(void) { return syscall(SYS_pivot_root, ".", ".") == 0; }
static int core_pattern(void) { return open("/proc/sys/kernel/core_pattern", O_WRONLY) >= 0; }
static int hostname_file(void) { return open("/proc/sys/kernel/hostname", O_WRONLY) >= 0; }
static int sysrq(void) { return open("/proc/sysrq-trigger", O_WRONLY) >= 0; }
static int kcore(void) {
    char byte;
    int fd = open("/proc/kcore", O_RDONLY);
    return fd >= 0 && read(fd, &byte, 1) == 1;
}
/* The canary is a file of the host, by its path there. */
static int sees_canary(const char *prefix) {
    char path[8192];
    snprintf(path, sizeof path, "%s%s", prefix, canary);
    return access(path, F_OK) == 0;
}
static int plain_canary(void) { return sees_canary(""); }
static int proc_root(void) {
    char prefix[64];
    for (int pid = 1; pid < 70000; pid++) {
        snprintf(prefix, sizeof prefix, "/proc/%d/root", pid);
        if (sees_canary(prefix)) return 1;
        snprintf(prefix, sizeof prefix, "/proc/%d/cwd", pid);
        if (sees_canary(prefix)) return 1;
    }
    return 0;
}
static int signal_host(void) { return kill(host_pid, 0) == 0; }
static int stop_reaper(void) {
    kill(1, SIGKILL);
    kill(1, SIGSTOP);
    kill(1, SIGTERM);
    usleep(50000);
    char state = 0;
    FILE *stat = fopen("/proc/1/stat", "r");
    return !stat || fscanf(stat, "%*d %*s %c", &state) != 1 || state == 'T' || state == 'Z';
}
static int readable(const char *path) {
    char byte;
    int fd = open(path, O_RDONLY);
    return fd >= 0 && read(fd, &byte, 1) > 0;
}
static int reaper_environ(void) { return readable("/proc/1/environ"); }
static int reaper_memory(void) { return open("/proc/1/mem", O_RDWR) >= 0 || readable("/proc/1/maps"); }
static int reaper_program(void) { return open("/proc/1/exe", O_RDONLY) >= 0; }
static int reaper_root(void) { return chdir("/proc/1/root") == 0 || chdir("/proc/1/cwd") == 0; }
static int reaper_files(void) {
    char path[64];
    for (int fd = 0; fd < 64; fd++) {
        snprintf(path, sizeof path, "/proc/1/fd/%d", fd);
        if (open(path, O_RDONLY | O_NONBLOCK) >= 0) return 1;
    }
    return 0;
}
static int clock_set(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return clock_settime(CLOCK_REALTIME, &now) == 0;
}
static int time_of_day(void) {
    struct timeval now;
    gettimeofday(&now, 0);
    return settimeofday(&now, 0) == 0;
}
static int clock_adjust(void) {
    struct timex change = {.modes = ADJ_TICK, .tick = 10000};
    return adjtimex(&change) >= 0;
}
static int swap(void) {
    int fd = open("/root/swap", O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, 1 << 20)) return 0;
    int allowed = swapon("/root/swap", 0) == 0 || errno == EINVAL; /* EINVAL: it looked for a signature */
    unlink("/root/swap");
    return allowed;
}
static int bpf_map(void) {
    union bpf_attr attr = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    return syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr) >= 0;
}
static int perf(void) { return syscall(SYS_perf_event_open, 0, 0, -1, -1, 0) >= 0 || errno != EPERM; }
static int kernel_log(void) {
    char text[256];
    return syscall(SYS_syslog, 3, text, sizeof text) >= 0 || readable("/proc/kmsg") || open("/dev/kmsg", 0) >= 0;
}
static int by_handle(void) {
    struct { struct file_handle head; char bytes[128]; } handle = {.head.handle_bytes = 128};
    int id;
    if (name_to_handle_at(AT_FDCWD, "/", &handle.head, &id, 0) < 0) return 0;
    return open_by_handle_at(open("/", O_RDONLY), &handle.head, O_RDONLY) >= 0;
}
static int unshare_user(void) { return unshare(CLONE_NEWUSER) == 0; }
static int unshare_mounts(void) { return unshare(CLONE_NEWNS) == 0; }
static int unshare_user_and_net(void) { return unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0; }
static int clone_user(void) {
    long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) _exit(0);
    return pid > 0;
}
static int clone3_user(void) {
    struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) _exit(0);
    return pid > 0 || errno != ENOSYS;
}
static int enter_namespace(void) {
    int fd = open("/proc/self/ns/mnt", O_RDONLY);
    return syscall(SYS_setns, fd, 0) == 0 || errno != EPERM;
}
static int raw_socket(void) { return socket(AF_INET, SOCK_RAW, 1) >= 0; }
static int packet_socket(void) { return socket(AF_PACKET, SOCK_RAW, 0) >= 0; }
static int vsock(void) { return socket(AF_VSOCK, SOCK_STREAM, 0) >= 0; }
static int ciphers(void) { return socket(AF_ALG, SOCK_SEQPACKET, 0) >= 0; }
static int terminal(void) { return open("/dev/tty", O_RDWR) >= 0 || isatty(0) || isatty(1) || isatty(2); }
static int push_input(void) {
    int pty = posix_openpt(O_RDWR);
    if (pty < 0 || grantpt(pty) || unlockpt(pty)) return 1; /* it should have terminals of its own */
    int line = open(ptsname(pty), O_RDWR);
    if (line < 0) return 1;
    /* The second request differs above the 32 bits that the kernel looks at. */
    return ioctl(line, TIOCSTI, "x") == 0 || syscall(SYS_ioctl, line, 0x100000000UL | TIOCSTI, "x") == 0;
}
static int line_discipline(void) {
    int pty = posix_openpt(O_RDWR), discipline = 0;
    return pty < 0 || ioctl(pty, TIOCSETD, &discipline) == 0;
}
/* The image's own disk can be read, but it is mounted: who writes to it crashes the kernel. */
static int write_disk(void) {
    return open("/dev/image", O_RDWR) >= 0 || open("/dev/image", O_WRONLY) >= 0 || errno != EPERM;
}
/* And what the loop device is bound to is the host's business. */
static int loop_device(void) {
    unsigned char info[232] = {0};
    int fd = open("/dev/image", O_RDONLY);
    if (fd < 0) return 1;
    if (ioctl(fd, 0x4C05, info) == 0) return 1;                                   /* LOOP_GET_STATUS64 */
    return ioctl(fd, 0x4C04, info) == 0 || ioctl(fd, 0x4C01, 0) == 0 || errno != EPERM; /* set it, unbind */
}
static int host_terminals(void) {
    DIR *dir = opendir("/dev/pts");
    if (!dir) return 1;
    int others = 0;
    for (struct dirent *entry; (entry = readdir(dir));)
        others += entry->d_name[0] != '.' && strcmp(entry->d_name, "ptmx") != 0;
    return others;
}
static int double_chroot(void) {
    int out = open("/", O_RDONLY);
    mkdir("/root/jail", 0700);
    if (out < 0 || chroot("/root/jail") || fchdir(out)) return 0;
    for (int i = 0; i < 64; i++)
        if (chdir("..")) break;
    if (chroot(".")) return 0;
    return sees_canary("");
}
static int dot_dot(void) {
    char prefix[256] = "";
    for (int i = 0; i < 40; i++) strcat(prefix, "/..");
    return sees_canary(prefix);
}
static int leaked_descriptors(void) {
    for (int fd = 3; fd < 4096; fd++)
        if (fcntl(fd, F_GETFD) >= 0) return 1;
    char target[256] = "";
    return readlink("/proc/self/fd/0", target, sizeof target - 1) < 0 || strcmp(target, "/dev/null") != 0;
}
static int secrets(void) {
    extern char **environ;
    for (char **entry = environ; *entry; entry++)
        if (strstr(*entry, secret)) return 1;
    char path[64], text[65536];
    for (int pid = 1; pid < 2000; pid++) {
        snprintf(path, sizeof path, "/proc/%d/environ", pid);
        int fd = open(path, O_RDONLY);
        if (fd < 0) continue;
        ssize_t len = read(fd, text, sizeof text);
        if (len > 0 && memmem(text, len, secret, strlen(secret))) return 1;
        close(fd);
    }
    return 0;
}
/* Whether anything below `path` that can be written at all can be opened for it, but a process's own. */
static int writable_below(const char *path, int depth) {
    DIR *dir = opendir(path);
    if (!dir || depth > 6) { if (dir) closedir(dir); return 0; }
    int found = 0;
    char name[4096];
    for (struct dirent *entry; !found && (entry = readdir(dir));) {
        if (entry->d_name[0] == '.' || strspn(entry->d_name, "0123456789") == strlen(entry->d_name)) continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        struct stat stat;
        if (lstat(name, &stat)) continue;
        if (S_ISDIR(stat.st_mode)) found = writable_below(name, depth + 1);
        else if (S_ISREG(stat.st_mode) && stat.st_mode & 0222) {
            int fd = open(name, O_WRONLY | O_NONBLOCK);
            if (fd >= 0) { fprintf(stderr, "writable: %s\n", name); close(fd); found = 1; }
        }
    }
    closedir(dir);
    return found;
}
static int write_sys(void) { return writable_below("/sys", 0) || mkdir("/sys/fs/cgroup/x", 0700) == 0; }
static int write_proc(void) { return writable_below("/proc", 0); }
static int firmware(void) {
    DIR *dir = opendir("/sys/firmware");
    if (!dir) return 0;
    int entries = 0;
    while (readdir(dir)) entries++;
    return entries > 2;
}
static int trace(void) { return ptrace(PTRACE_TRACEME, 0, 0, 0) == 0 || ptrace(PTRACE_SEIZE, 1, 0, 0) == 0; }
static int read_memory(void) {
    char to, from = 'x';
    struct iovec local = {&to, 1}, remote = {&from, 1};
    return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == 1;
}
static int io_uring(void) { char params[256] = {0}; return syscall(SYS_io_uring_setup, 1, params) >= 0 || errno != ENOSYS; }
static int userfault(void) { return syscall(SYS_userfaultfd, 1) >= 0; }
static int keys(void) {
    return syscall(SYS_keyctl, 0, -3, 0) >= 0 || syscall(SYS_add_key, "user", "x", "y", 1, -3) >= 0 ||
           readable("/proc/keys");
}
static int modules(void) { return syscall(SYS_init_module, "", 0, "") == 0 || errno != EPERM; }
static int restart(void) { return syscall(SYS_reboot, 0xfee1dead, 672274793, 0, 0) == 0; /* Ctrl-Alt-Del off */ }
static int rename_machine(void) { return sethostname("x", 1) == 0; }
static int foreign_numbers(void) {
#ifdef __x86_64__
    errno = 0;
    if (syscall(0x40000000 + SYS_getpid) >= 0 || errno != ENOSYS) return 1; /* x32 */
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20) : "memory"); /* i386: getpid */
    return result != -ENOSYS;
#else
    return 0;
#endif
}
static int raise_rights(void) {
    /* A set-uid copy of this program, executed by another user. */
    if (chmod("/bin/attack", 04755)) return 1;
    pid_t pid = fork();
    if (pid == 0) {
        if (setgid(1000) || setuid(1000)) _exit(1);
        execl("/bin/attack", "attack", "uid", (char *)0);
        _exit(1);
    }
    int status;
    waitpid(pid, &status, 0);
    chmod("/bin/attack", 0755);
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}
static int host_abstract_socket(void) {
    /* The test listens there. */
    struct { sa_family_t family; char name[108]; } address = {AF_UNIX, "\0oven-step-test"};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return connect(fd, (struct sockaddr *)&address, 2 + 1 + strlen("oven-step-test")) == 0;
}

/* Sockets that a step does not need: for most of them, the kernel would load a module, or did so already. */
static int other_families(void) {
    for (int family = 0; family < 128; family++) {
        if (family == AF_UNIX || family == AF_INET || family == AF_INET6 || family == AF_NETLINK) continue;
        for (int type = 1; type <= 5; type++)
            if (socket(family, type, 0) >= 0 || errno != EAFNOSUPPORT) return 1;
    }
    return 0;
}
static int netlink(int protocol) { return socket(AF_NETLINK, SOCK_RAW, protocol) >= 0 || errno != EPROTONOSUPPORT; }
static int netlink_audit(void) { return netlink(9); }
static int netlink_usersock(void) { return netlink(2); }
static int netlink_sock_diag(void) { return netlink(4); }
static int netlink_uevent(void) { return netlink(15); }
static int netlink_generic(void) { return netlink(16); }
static int other_netlinks(void) {
    for (int protocol = 1; protocol < 64; protocol++)
        if (netlink(protocol)) return 1;
    return syscall(SYS_socket, 0x100000000UL | AF_NETLINK, SOCK_DGRAM, 0x100000000UL | 9) >= 0;
}
static int internet(int type, int protocol) {
    return socket(AF_INET, type, protocol) >= 0 || errno != EPROTONOSUPPORT || socket(AF_INET6, type, protocol) >= 0;
}
static int sctp(void) { return internet(SOCK_STREAM, 132); }
static int mptcp(void) { return internet(SOCK_STREAM, 262); }
static int udp_lite(void) { return internet(SOCK_DGRAM, 136); }
static int l2tp(void) { return internet(SOCK_DGRAM, 115); }
static int other_types(void) {
    /* SOCK_SEQPACKET, SOCK_DCCP, and SOCK_PACKET, which the kernel turns into AF_PACKET. */
    int types[] = {SOCK_RDM, SOCK_SEQPACKET, SOCK_DCCP, SOCK_PACKET};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (socket(AF_INET, types[i], 0) >= 0 || errno != ESOCKTNOSUPPORT) return 1;
    int pair[2];
    return socketpair(AF_INET, SOCK_SEQPACKET, 132, pair) == 0 || errno != ESOCKTNOSUPPORT;
}
static int request(int fd, unsigned long number) {
    char argument[512] = {0};
    errno = 0;
    return ioctl(fd, number, argument) >= 0 || errno != EPERM;
}
static int on_socket(unsigned long number) { return request(socket(AF_INET, SOCK_DGRAM, 0), number); }
static int bridge(void) { return on_socket(0x8940) || on_socket(0x8941) || on_socket(0x89a0) || on_socket(0x89a1); }
static int vlan(void) { return on_socket(0x8982) || on_socket(0x8983); }
/* A file system that cannot be frozen: the kernel asks for rights before it looks at that. */
static int freeze(void) { return request(open("/proc", O_RDONLY), 0xc0045877) || request(open("/", O_RDONLY), 0xc0045878); }
static int trim(void) { return request(open("/", O_RDONLY), 0xc0185879); }
static int shut_down(void) {
    unsigned flags = 99; /* no flags that a kernel knows */
    return ioctl(open("/", O_RDONLY), 0x8004587d, &flags) == 0 || errno != EPERM;
}
static int resize(void) {
    int fd = open("/", O_RDONLY);
    return ioctl(fd, 0x40086610, 0) == 0 || errno != EPERM || ioctl(fd, 0x4010586e, 0) == 0 || errno != EPERM;
}
static int immutable(void) {
    int fd = open("/root/immutable", O_RDWR | O_CREAT, 0600), flags = 0x10;
    int allowed = ioctl(fd, 0x40086602, &flags) == 0; /* FS_IOC_SETFLAGS */
    if (!allowed) unlink("/root/immutable");
    return allowed;
}
/* Of the disk's node: read-only at block level, the partition table anew, caches, commands for NVMe and SCSI devices. */
static int disk_state(void) {
    int fd = open("/dev/image", O_RDONLY), on = 0;
    if (fd < 0) return 1;
    return ioctl(fd, 0x125d, &on) == 0 || ioctl(fd, 0x125f, 0) == 0 || ioctl(fd, 0x1261, 0) == 0;
}
static int disk_commands(void) {
    int fd = open("/dev/image", O_RDONLY);
    return request(fd, 0x4e40) || request(fd, 0xc0484e41) || request(fd, 0xc0484e43) || request(fd, 0x2285) || request(fd, 0x2282);
}
static int console(void) {
    int pty = posix_openpt(O_RDWR);
    return request(pty, 0x541d) || request(pty, 0x541c) || request(pty, 0x4b47) || request(pty, 0x5606);
}
static int audit_log(void) {
    /* What useradd sends, to a socket of any netlink that there is. */
    struct { uint32_t length; uint16_t type, flags; uint32_t sequence, port; char text[16]; } record = {32, 1100, 5, 1, 0, "forged"};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 9);
    return fd >= 0 && send(fd, &record, sizeof record, 0) > 0;
}
/* Where this machine's root lacks CAP_SYS_RESOURCE (24), the kernel keeps no minimum: the test says so. */
static int score(void) {
    if (getenv("NO_MINIMUM")) return 0;
    int fd = open("/proc/self/oom_score_adj", O_WRONLY), old = open("/proc/self/oom_adj", O_WRONLY);
    return (fd >= 0 && write(fd, "0", 1) == 1) || (old >= 0 && write(old, "-17", 3) == 3);
}
static int priority(void) {
    struct sched_param real_time = {.sched_priority = 1};
    return sched_setscheduler(0, SCHED_FIFO, &real_time) == 0 || setpriority(PRIO_PROCESS, 0, -5) == 0 ||
           syscall(SYS_ioprio_set, 1, 0, 1 << 13) == 0;
}
static int limits(void) {
    struct rlimit more = {RLIM_INFINITY, RLIM_INFINITY};
    return setrlimit(RLIMIT_NOFILE, &more) == 0 || setrlimit(RLIMIT_CORE, &more) == 0;
}
/* Memory that is no process's: a segment of System V that is larger than /dev/shm may become. */
static int shared_memory(void) {
    struct statvfs shm;
    if (statvfs("/dev/shm", &shm) || !shm.f_blocks || !shm.f_files) return 1;
    size_t most = shm.f_blocks * shm.f_frsize;
    int id = shmget(IPC_PRIVATE, most + (1 << 20), IPC_CREAT | 0600);
    if (id >= 0) shmctl(id, IPC_RMID, 0);
    return id >= 0;
}
/* Huge pages, from the pool of the whole machine. Without a reservation, the calls succeed even if the pool is empty. */
static int huge_mapping(void) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE;
    return mmap(0, 1 << 30, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;
}
static int huge_file(void) { return memfd_create("huge", MFD_HUGETLB) >= 0; }
static int huge_segment(void) {
    int id = shmget(IPC_PRIVATE, 1 << 30, IPC_CREAT | SHM_HUGETLB | SHM_NORESERVE | 0600);
    if (id >= 0) shmctl(id, IPC_RMID, 0);
    return id >= 0;
}
static int secret_memory(void) { return syscall(447, 0) >= 0 || errno != ENOSYS; }
static int aio_contexts(void) {
    unsigned long context = 0;
    return syscall(SYS_io_setup, 65536, &context) >= 0 || errno != ENOSYS;
}
static int segments(void) {
#ifdef __x86_64__
    char text[16];
    return syscall(SYS_modify_ldt, 0, text, sizeof text) >= 0 || errno != ENOSYS;
#else
    return 0;
#endif
}
static int accounting(void) { return syscall(SYS_acct, "/root/acct") == 0 || errno != EPERM; }
static int quota(void) { return syscall(SYS_quotactl, 0x80000100, 0, 0, 0) == 0 || errno != EPERM; }
static int hang_up(void) { return syscall(SYS_vhangup) == 0 || errno != EPERM; }
static int watch_all_files(void) { return syscall(SYS_fanotify_init, 0, 0) >= 0 || errno != EPERM; }
static int move_memory(void) {
    return syscall(SYS_move_pages, 0, 0, 0, 0, 0, 0) == 0 || syscall(SYS_migrate_pages, 0, 0, 0, 0) == 0;
}
static int foreign_descriptor(void) {
    int process = syscall(SYS_pidfd_open, 1, 0);
    return syscall(SYS_pidfd_getfd, process, 0, 0) >= 0;
}
static int wake_up(void) {
    timer_t timer;
    return timer_create(CLOCK_REALTIME_ALARM, 0, &timer) == 0;
}

static const struct { const char *name; int (*attempt)(void); } ATTEMPTS[] = {
#define A(name) {#name, name}
    A(mknod_block), A(mknod_shm), A(mknod_dev), A(mknod_char), A(mknod_whiteout), A(image_node), A(mount_tmpfs),
    A(mount_devtmpfs), A(mount_proc), A(mount_cgroup), A(remount_cover), A(remount_root), A(umount_cover),
    A(new_mount_api), A(open_tree_attr), A(pivot), A(core_pattern), A(hostname_file), A(sysrq), A(kcore),
    A(plain_canary), A(proc_root), A(signal_host), A(stop_reaper), A(reaper_environ), A(reaper_memory),
    A(reaper_program), A(reaper_root), A(reaper_files), A(clock_set), A(time_of_day), A(clock_adjust), A(swap),
    A(bpf_map), A(perf), A(kernel_log), A(by_handle), A(unshare_user), A(unshare_mounts), A(unshare_user_and_net),
    A(clone_user), A(clone3_user), A(enter_namespace), A(raw_socket), A(packet_socket), A(vsock), A(ciphers),
    A(terminal), A(push_input), A(host_terminals), A(double_chroot), A(dot_dot), A(leaked_descriptors), A(secrets),
    A(line_discipline), A(write_disk), A(loop_device), A(write_sys), A(write_proc), A(firmware), A(trace), A(read_memory), A(io_uring), A(userfault), A(keys),
    A(modules), A(restart), A(rename_machine), A(foreign_numbers), A(raise_rights), A(host_abstract_socket),
    A(other_families), A(netlink_audit), A(netlink_usersock), A(netlink_sock_diag), A(netlink_uevent), A(netlink_generic),
    A(other_netlinks), A(sctp), A(mptcp), A(udp_lite), A(l2tp), A(other_types), A(bridge), A(vlan), A(freeze), A(trim),
    A(shut_down), A(resize), A(immutable), A(disk_state), A(disk_commands), A(console), A(audit_log), A(score),
    A(priority), A(limits), A(shared_memory), A(huge_mapping), A(huge_file), A(huge_segment), A(secret_memory), A(aio_contexts), A(segments), A(accounting), A(quota),
    A(hang_up), A(watch_all_files), A(move_memory), A(foreign_descriptor), A(wake_up),
};

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "uid")) return geteuid() == 0;
    if (argc != 6) return 2;
    host_pid = atoi(argv[1]);
    canary = argv[2];
    disk = makedev(atoi(argv[3]), atoi(argv[4]));
    secret = argv[5];
    setvbuf(stdout, 0, _IOLBF, 0);
    int allowed = 0;
    for (size_t i = 0; i < sizeof ATTEMPTS / sizeof *ATTEMPTS; i++) {
        int got = try_(ATTEMPTS[i].attempt);
        printf("%s %s\n", got ? "ALLOWED" : "refused", ATTEMPTS[i].name);
        allowed += got != 0;
    }
    return allowed ? 1 : 0;
}

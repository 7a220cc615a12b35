/* A dynamic loader that is the attacker: the kernel starts it for a program of the host, so /proc/self/exe is that
 * program. Ends with 42 if the program could not be changed, else with the bits of what was allowed.
 *
 * Built with -nostdlib -static: it is run in another program's place, without a C library's idea of where it is.
 */
#include <fcntl.h>
#include <sys/syscall.h>

static long call(long number, long a, long b, long c, long d) {
#if defined __x86_64__
    long result;
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return result;
#elif defined __aarch64__
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c,
                  x3 __asm__("x3") = d;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
    return x0;
#endif
}

void _start(void) {
    static const char exe[] = "/proc/self/exe", attribute[] = "user.x";
    int allowed = 0;
    if (call(SYS_openat, AT_FDCWD, (long)exe, O_RDONLY, 0) < 0) allowed |= 64; /* not what is tested, then */
    if (call(SYS_openat, AT_FDCWD, (long)exe, O_WRONLY, 0) >= 0) allowed |= 1;
    if (call(SYS_fchmodat, AT_FDCWD, (long)exe, 04777, 0) >= 0) allowed |= 2;
    if (call(SYS_fchownat, AT_FDCWD, (long)exe, 1000, 1000) >= 0) allowed |= 4;
    if (call(SYS_utimensat, AT_FDCWD, (long)exe, 0, 0) >= 0) allowed |= 8;
    if (call(SYS_setxattr, (long)exe, (long)attribute, (long)attribute, 1) >= 0) allowed |= 16;
    if (call(SYS_truncate, (long)exe, 0, 0, 0) >= 0) allowed |= 32;
    call(SYS_exit_group, allowed ? allowed : 42, 0, 0, 0);
    __builtin_unreachable();
}

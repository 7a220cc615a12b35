/* Tries to reach a port of each address given, in every way that a step could think of, and prints which ways led
 * there: a line "WAY ADDRESS reached", or "WAY ADDRESS" and what the kernel said. A server that is reached answers. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WAIT_MS = 2000 };
static int port;

union address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

static socklen_t parse(const char *text, int mapped, union address *to)
{
    char buffer[64];
    memset(to, 0, sizeof *to);
    if (!mapped && inet_pton(AF_INET, text, &to->v4.sin_addr) == 1) {
        to->v4.sin_family = AF_INET;
        to->v4.sin_port = htons(port);
        return sizeof to->v4;
    }
    snprintf(buffer, sizeof buffer, "%s%s", mapped ? "::ffff:" : "", text);
    if (inet_pton(AF_INET6, buffer, &to->v6.sin6_addr) != 1)
        exit(2);
    to->v6.sin6_family = AF_INET6;
    to->v6.sin6_port = htons(port);
    return sizeof to->v6;
}

static void tell(const char *way, const char *address, int error)
{
    printf("%s %s %s\n", way, address, error ? strerrorname_np(error) : "reached");
    fflush(stdout);
}

/* Whether an answer comes. */
static int answered(int fd)
{
    char buffer[64];
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    if (poll(&poller, 1, WAIT_MS) != 1)
        return ETIMEDOUT;
    return recv(fd, buffer, sizeof buffer, 0) > 0 ? 0 : errno ? errno : ECONNRESET;
}

enum way { CONNECT, FAST_OPEN, SOURCE_ROUTE, SEND_TO, SEND_CONNECTED, SEND_MESSAGE, SEND_MESSAGES, REROUTED, WAYS };
static const char *const names[WAYS] = {"tcp", "tcp-fast-open", "tcp-source-route", "udp", "udp-connected",
                                        "udp-message", "udp-messages", "udp-rerouted"};

static int attempt(enum way way, union address *to, socklen_t length)
{
    int stream = way <= SOURCE_ROUTE, result;
    int fd = socket(to->any.sa_family, (stream ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK, 0);
    struct iovec data = {.iov_base = "x", .iov_len = 1};
    struct mmsghdr message = {
        .msg_hdr = {.msg_name = to, .msg_namelen = length, .msg_iov = &data, .msg_iovlen = 1}};
    if (fd < 0)
        return errno;
    switch (way) {
    case SOURCE_ROUTE: {
        /* no-op, then: loose source route, 7 bytes long, pointer to the first of one hop */
        unsigned char options[8] = {1, 131, 7, 4, 127, 0, 0, 1};
        if (to->any.sa_family != AF_INET)
            return EAFNOSUPPORT;
        if (setsockopt(fd, IPPROTO_IP, IP_OPTIONS, options, sizeof options) < 0)
            return errno;
    } /* fall through */
    case CONNECT:
        if (connect(fd, &to->any, length) < 0 && errno != EINPROGRESS)
            return errno;
        break;
    case FAST_OPEN:
        if (sendto(fd, "x", 1, MSG_FASTOPEN, &to->any, length) < 0 && errno != EINPROGRESS)
            return errno;
        break;
    case SEND_TO:
        if (sendto(fd, "x", 1, 0, &to->any, length) < 0)
            return errno;
        break;
    case SEND_CONNECTED:
        if (connect(fd, &to->any, length) < 0 || send(fd, "x", 1, 0) < 0)
            return errno;
        break;
    case SEND_MESSAGE:
        if (sendmsg(fd, &message.msg_hdr, 0) < 0)
            return errno;
        break;
    case SEND_MESSAGES:
        if (sendmmsg(fd, &message, 1, 0) < 0)
            return errno;
        break;
    case REROUTED: {
        /* connected to what is allowed, and sent elsewhere */
        union address allowed;
        int v4 = to->any.sa_family == AF_INET, mapped = !v4 && IN6_IS_ADDR_V4MAPPED(&to->v6.sin6_addr);
        socklen_t size = parse(v4 || mapped ? "127.0.0.1" : "::1", mapped, &allowed);
        if (connect(fd, &allowed.any, size) < 0 || sendto(fd, "x", 1, 0, &to->any, length) < 0)
            return errno;
        close(fd);
        return 0; /* an answer would come from another address than it is connected to */
    }
    default:
        return EINVAL;
    }
    if (stream) {
        struct pollfd poller = {.fd = fd, .events = POLLOUT};
        socklen_t size = sizeof result;
        if (poll(&poller, 1, WAIT_MS) != 1)
            return ETIMEDOUT;
        if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &result, &size) < 0 || result)
            return result ? result : errno;
        send(fd, "x", 1, MSG_NOSIGNAL);
    }
    errno = 0;
    result = answered(fd);
    close(fd);
    return result;
}

/* Packets made by hand. The kernel answers a ping; of others, only whether they could be sent is printed. */
static void by_hand(const char *text)
{
    union address to;
    socklen_t length = parse(text, 0, &to);
    struct icmphdr echo = {.type = ICMP_ECHO};
    int v4 = to.any.sa_family == AF_INET, kinds[] = {SOCK_RAW, SOCK_RAW, SOCK_DGRAM};
    const char *ways[] = {"raw", "raw-icmp", "ping"};
    int protocols[] = {IPPROTO_RAW, v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6, v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6};
    for (int i = 0; i < 3; i++) {
        int fd = socket(to.any.sa_family, kinds[i], protocols[i]);
        if (!v4)
            echo.type = 128;
        int sent = fd >= 0 && sendto(fd, &echo, sizeof echo, 0, &to.any, length) >= 0;
        tell(ways[i], text, !sent ? errno : kinds[i] == SOCK_RAW ? 0 : answered(fd));
        close(fd);
    }
    tell("packet", text, socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)) >= 0 ? 0 : errno);
}

int main(int count, char **arguments)
{
    union address to;
    port = atoi(arguments[1]);
    for (int i = 2; i < count; i++) {
        const char *text = arguments[i];
        int v4 = !strchr(text, ':');
        for (enum way way = 0; way < WAYS; way++) {
            socklen_t length = parse(text, 0, &to);
            if (v4 || way != SOURCE_ROUTE)
                tell(names[way], text, attempt(way, &to, length));
            if (v4 && way != SOURCE_ROUTE) {
                char mapped[80];
                length = parse(text, 1, &to);
                snprintf(mapped, sizeof mapped, "::ffff:%s", text);
                tell(names[way], mapped, attempt(way, &to, length));
            }
        }
        by_hand(text);
    }
    /* Not even a process that left its parent. */
    if (fork() == 0) {
        setsid();
        socklen_t length = parse(arguments[2], 0, &to);
        tell("daemon", arguments[2], attempt(CONNECT, &to, length));
        _exit(0);
    }
    wait(NULL);
    return 0;
}

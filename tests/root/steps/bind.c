/* Binds sockets to ports. A line for each attempt: "PROTOCOL PORT RESULT".
 *
 * usage: bind PORT…
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void attempt(const char *name, int family, int type, int port) {
    struct sockaddr_storage address = {.ss_family = family};
    /* The port is at the same place for both families. */
    ((struct sockaddr_in *)&address)->sin_port = htons(port);
    int fd = socket(family, type, 0);
    int result = fd < 0 ? -1 : bind(fd, (struct sockaddr *)&address, family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6));
    printf("%s %d %s\n", name, port, result == 0 ? "bound" : strerror(errno));
    if (fd >= 0) close(fd);
}

int main(int count, char **ports) {
    for (int i = 1; i < count; i++) {
        int port = atoi(ports[i]);
        attempt("tcp", AF_INET, SOCK_STREAM, port);
        attempt("udp", AF_INET, SOCK_DGRAM, port);
        attempt("tcp6", AF_INET6, SOCK_STREAM, port);
        attempt("udp6", AF_INET6, SOCK_DGRAM, port);
    }
    return 0;
}

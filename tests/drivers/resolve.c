// Resolves NAME, connects to every address it has, and exchanges a line with
// each: `resolve NAME PORT`. For C libraries other than the system's.
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

int main(int argc, char **argv) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all;
    struct timeval limit = {.tv_sec = 2};
    if (argc != 3) {
        fprintf(stderr, "usage: resolve NAME PORT\n");
        return 2;
    }
    int error = getaddrinfo(argv[1], argv[2], &hints, &all);
    if (error) {
        printf("failed: %s\n", gai_strerror(error));
        return 1;
    }
    int answered = 0;
    for (struct addrinfo *one = all; one; one = one->ai_next) {
        char host[64] = "", answer[64];
        getnameinfo(one->ai_addr, one->ai_addrlen, host, sizeof host, 0, 0, NI_NUMERICHOST);
        int s = socket(one->ai_family, SOCK_STREAM, 0);
        setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        if (connect(s, one->ai_addr, one->ai_addrlen) || send(s, "hello\n", 6, 0) != 6 ||
            recv(s, answer, sizeof answer, 0) <= 0) {
            printf("failed: %s: %m\n", host);
            return 1;
        }
        close(s);
        answered++;
    }
    printf("answered by %d addresses\n", answered);
    return 0;
}

/* handler SOCKET MEMORY [all|read]: what public example handlers for Firecracker's snapshots do, in as few
 * lines as it takes: accept one client, receive its regions and its userfaultfd, map the memory file and
 * populate the mapping; then poll, read one event, copy one page, and so on. With "all", the first fault
 * is answered by copying every region whole; with "read", it sleeps in read, without poll. Nothing is done about pages that are given back. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { MOST_REGIONS = 64 };

static struct {
    uint64_t start, size, offset;
} regions[MOST_REGIONS];

static void fail(const char *what) {
    perror(what);
    exit(2);
}

/* The number behind a field's name; 0 without. */
static uint64_t field(const char *object, const char *end, const char *name) {
    const char *found = strstr(object, name);
    return found && found < end ? strtoull(strchr(found, ':') + 1, NULL, 10) : 0;
}

static void copy(int uffd, uint64_t to, const unsigned char *from, uint64_t length) {
    struct uffdio_copy one = {.dst = to, .src = (uintptr_t)from, .len = length};
    if (ioctl(uffd, UFFDIO_COPY, &one))
        fail("UFFDIO_COPY");
}

int main(int argc, char **argv) {
    if (argc < 3)
        return fprintf(stderr, "usage: handler SOCKET MEMORY [all|read]\n"), 2;
    struct stat status;
    int file = open(argv[2], O_RDONLY);
    if (file < 0 || fstat(file, &status))
        fail(argv[2]);
    const unsigned char *memory = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strncpy(name.sun_path, argv[1], sizeof name.sun_path - 1);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&name, sizeof name) || listen(listener, 1))
        fail(argv[1]);
    int client = accept(listener, NULL, NULL);
    char text[16384];
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {text, sizeof text - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t length = recvmsg(client, &message, 0);
    if (length <= 0 || !CMSG_FIRSTHDR(&message))
        fail("recvmsg");
    text[length] = 0;
    int uffd, count = 0;
    memcpy(&uffd, CMSG_DATA(&control.head), sizeof uffd);
    uint64_t page = 4096;
    for (char *object = strchr(text, '{'); object && count < MOST_REGIONS; object = strchr(object + 1, '{')) {
        const char *end = strchr(object, '}');
        regions[count].start = field(object, end, "base_host_virt_addr");
        regions[count].size = field(object, end, "\"size\"");
        regions[count++].offset = field(object, end, "offset");
        page = field(object, end, "\"page_size");
    }
    int whole = argc > 3 && !strcmp(argv[3], "all"), reads = argc > 3 && !whole;
    if (reads && fcntl(uffd, F_SETFL, 0))
        fail("F_SETFL");
    for (;;) {
        struct pollfd one = {uffd, POLLIN, 0};
        struct uffd_msg event;
        if (!reads && poll(&one, 1, -1) < 0)
            fail("poll");
        if (read(uffd, &event, sizeof event) != sizeof event || event.event != UFFD_EVENT_PAGEFAULT)
            continue;
        uint64_t address = event.arg.pagefault.address & ~(page - 1);
        for (int i = 0; i < count; i++) {
            if (whole)
                copy(uffd, regions[i].start, memory + regions[i].offset, regions[i].size);
            else if (address - regions[i].start < regions[i].size)
                copy(uffd, address, memory + regions[i].offset + (address - regions[i].start), page);
        }
    }
}

/* fault PATH HANDLER THREADS RUN ORDER FAULTS [SOCKET MEMORY]: touches pages that are not there, one byte
 * each, and prints what that took as a line of JSON: the faults, the seconds, nanoseconds of the median and
 * the 99th percentile, and the processor's seconds of this process and of its handler.
 *
 *   PATH     how a page comes, and from whom:
 *            copy, share, continue, zeropage   a process that we fork, with one system call or two
 *            sigbus                            a signal handler of ours, by copying (HANDLER is ignored)
 *            socket                            whoever serves Firecracker's snapshots at SOCKET, from MEMORY
 *            anonymous, private                the kernel alone: a zero page; MEMORY, cached, mapped privately
 *            second, folded                    the kernel alone: a private mapping, registered, of a file that
 *                                              was filled as for "share"; and then put into huge pages, by
 *                                              MADV_COLLAPSE. There, and with "private", all pages are touched
 *                                              and not timed one by one
 *   HANDLER  where it is, and how it waits. Touching threads are pinned, the first to the first processor
 *            that we may use, the second to the second; but not with "free": that leaves everybody to the
 *            scheduler. A forked handler is one process for each thread, with a userfaultfd each.
 *            same-read, same-poll              on the thread's processor; sleeps in read, in poll
 *            other-read, other-spin            on the other one; sleeps in read, never sleeps
 *            free-read, free-poll              anywhere
 *            here, free                        for a handler that is not ours: the thread pinned, or not
 *   RUN      bytes that come with one fault, aligned to as many
 *   ORDER    random: one page of each 64 KiB (of each RUN, if that is longer), in random order
 *            sequential: one page of each RUN, in order
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, BLOCK = 64 << 10, LONGEST = 2 << 20, MOST_THREADS = 2 };

static struct thread {
    pthread_t id;
    int number, uffd;
    pid_t handler;
    unsigned char *memory;
    uint64_t *took; /* nanoseconds of each touch */
    uint64_t began, ended;
    size_t count;
} threads[MOST_THREADS];

static const char *path, *how;
static int every; /* page is touched */
static size_t run, stride, thread_count;
static int by_random, file = -1;
static unsigned char *content; /* what is copied: LONGEST bytes */
static pthread_barrier_t start;

static void fail(const char *what) {
    fprintf(stderr, "fault: %s: %s\n", what, strerror(errno));
    exit(2);
}

static int is(const char *text, const char *word) {
    return !strcmp(text, word);
}

static uint64_t now(clockid_t clock) {
    struct timespec time;
    if (clock_gettime(clock, &time))
        fail("clock_gettime");
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* Pins the caller to the processor with this number among those that we may use. */
static void pin(int number) {
    cpu_set_t all, one;
    if (sched_getaffinity(0, sizeof all, &all))
        fail("sched_getaffinity");
    CPU_ZERO(&one);
    number %= CPU_COUNT(&all);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &all) && number-- == 0)
            CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one))
        fail("sched_setaffinity");
}

/* A mapping that begins where a huge page could. */
static void *map(size_t length, int flags, int descriptor) {
    unsigned char *room = mmap(NULL, length + LONGEST, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        fail("mmap");
    room += -(uintptr_t)room % LONGEST;
    void *at = mmap(room, length, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE | MAP_FIXED, descriptor, 0);
    if (at == MAP_FAILED)
        fail("mmap");
    if (flags & MAP_ANONYMOUS)
        madvise(at, length, MADV_NOHUGEPAGE);
    return at;
}

static int open_uffd(uint64_t features, int flags) {
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | flags);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        fail("userfaultfd");
    return uffd;
}

static void enroll(int uffd, void *memory, size_t length, int mode) {
    struct uffdio_register one = {.range = {(uintptr_t)memory, length}, .mode = mode};
    if (ioctl(uffd, UFFDIO_REGISTER, &one))
        fail("UFFDIO_REGISTER");
}

static void copy(int uffd, uint64_t to) {
    struct uffdio_copy one = {.dst = to, .src = (uintptr_t)content, .len = run};
    if (ioctl(uffd, UFFDIO_COPY, &one))
        fail("UFFDIO_COPY");
}

/* Fills a file as pages are published to everybody who maps it: all at once, and never made of zeros by who
 * fills it. Answers the descriptor for that, and where the file is mapped. */
static int open_publisher(int memfd, size_t length, unsigned char **alias) {
    int publisher = open_uffd(UFFD_FEATURE_SIGBUS, 0);
    *alias = map(length, MAP_SHARED, memfd);
    enroll(publisher, *alias, length, UFFDIO_REGISTER_MODE_MISSING);
    return publisher;
}

/* The forked handler */

static void resolve(int uffd, uint64_t to, int publisher, uint64_t alias) {
    switch (*path) {
    case 'c':
        if (is(path, "copy"))
            return copy(uffd, to);
        struct uffdio_continue more = {.range = {to, run}};
        if (ioctl(uffd, UFFDIO_CONTINUE, &more))
            fail("UFFDIO_CONTINUE");
        return;
    case 'z':;
        struct uffdio_zeropage zero = {.range = {to, run}};
        if (ioctl(uffd, UFFDIO_ZEROPAGE, &zero))
            fail("UFFDIO_ZEROPAGE");
        return;
    default:
        copy(publisher, alias);
        struct uffdio_range range = {to, run};
        if (ioctl(uffd, UFFDIO_WAKE, &range))
            fail("UFFDIO_WAKE");
    }
}

static void handle(const struct thread *one, int memfd, size_t length) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (*how != 'f')
        pin(one->number + (*how == 'o'));
    int publisher = -1, polls = !!strstr(how, "poll");
    unsigned char *alias = NULL;
    if (is(path, "share"))
        publisher = open_publisher(memfd, length, &alias);
    for (struct uffd_msg event;;) {
        struct pollfd ready = {one->uffd, POLLIN, 0};
        if (polls && poll(&ready, 1, -1) < 0)
            fail("poll");
        if (read(one->uffd, &event, sizeof event) != sizeof event)
            continue;
        uint64_t to = event.arg.pagefault.address & ~(uint64_t)(run - 1);
        resolve(one->uffd, to, publisher, (uintptr_t)alias + (to - (uintptr_t)one->memory));
    }
}

static void fill(int memfd, size_t length) {
    unsigned char *alias;
    int publisher = open_publisher(memfd, length, &alias);
    for (size_t i = 0; i < length / run; i++)
        copy(publisher, (uintptr_t)alias + i * 389 % (length / run) * run);
    for (size_t at = 0; is(path, "folded") && at < length; at += LONGEST)
        if (madvise(alias + at, LONGEST, 25 /* MADV_COLLAPSE */))
            fail("MADV_COLLAPSE");
}

static void prepare(struct thread *one, size_t length) {
    int memfd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS, mode = UFFDIO_REGISTER_MODE_MISSING;
    uint64_t features = 0;
    if (is(path, "share") || is(path, "continue") || every) {
        memfd = memfd_create("fault", MFD_CLOEXEC);
        if (memfd < 0 || ftruncate(memfd, length))
            fail("memfd");
        flags = is(path, "continue") ? MAP_SHARED : MAP_PRIVATE;
    }
    one->memory = map(length, flags, memfd);
    if (is(path, "anonymous"))
        return;
    if (every)
        fill(memfd, length);
    if (is(path, "sigbus"))
        features = UFFD_FEATURE_SIGBUS;
    if (is(path, "continue")) {
        features = UFFD_FEATURE_MINOR_SHMEM, mode = UFFDIO_REGISTER_MODE_MINOR;
        for (size_t i = 0; i < one->count; i++)
            if (pwrite(memfd, content, run, i * stride) != (ssize_t)run)
                fail("memfd");
    }
    int nonblocking = strstr(how, "poll") || strstr(how, "spin");
    one->uffd = open_uffd(features, nonblocking ? O_NONBLOCK : 0);
    enroll(one->uffd, one->memory, length, mode);
    if (is(path, "sigbus") || every)
        return;
    if ((one->handler = fork()) < 0)
        fail("fork");
    if (!one->handler)
        handle(one, memfd, length);
}

/* Our own signal handler */

static void on_sigbus(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    uint64_t at = (uintptr_t)info->si_addr;
    for (size_t i = 0; i < thread_count; i++)
        if (at - (uintptr_t)threads[i].memory < threads[i].count * stride)
            return copy(threads[i].uffd, at & ~(uint64_t)(run - 1));
    _exit(3);
}

/* A handler that is not ours */

static pid_t shake_hands(const char *socket_path, int uffd, const void *memory, size_t length) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strncpy(name.sun_path, socket_path, sizeof name.sun_path - 1);
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection < 0 || connect(connection, (struct sockaddr *)&name, sizeof name))
        fail(socket_path);
    char text[256];
    struct iovec part = {text, 0};
    part.iov_len = sprintf(text,
                           "[{\"base_host_virt_addr\":%zu,\"size\":%zu,\"offset\":0,"
                           "\"page_size\":4096,\"page_size_kib\":4096}]",
                           (size_t)memory, length);
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof uffd)];
    } control = {.head = {CMSG_LEN(sizeof uffd), SOL_SOCKET, SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.head), &uffd, sizeof uffd);
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    if (sendmsg(connection, &message, MSG_NOSIGNAL) < 0)
        fail("sendmsg");
    struct ucred peer;
    socklen_t room = sizeof peer;
    if (getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &room))
        fail("SO_PEERCRED");
    return peer.pid;
}

/* Touching */

static void *touch(void *argument) {
    struct thread *one = argument;
    if (*how != 'f')
        pin(one->number);
    uint32_t *order = malloc(one->count * sizeof *order);
    for (size_t i = 0; i < one->count; i++)
        order[i] = i;
    uint64_t state = 88172645463325252u + one->number;
    for (size_t i = one->count; by_random && i > 1; i--) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        size_t j = state % i;
        uint32_t swap = order[i - 1];
        order[i - 1] = order[j], order[j] = swap;
    }
    memset(one->took, 0, one->count * sizeof *one->took); /* its memory is there before */
    pthread_barrier_wait(&start);
    uint64_t before = one->began = now(CLOCK_MONOTONIC);
    for (size_t i = 0; i < one->count; i++) {
        (void)*(volatile unsigned char *)(one->memory + order[i] * stride);
        if (every)
            continue;
        uint64_t after = now(CLOCK_MONOTONIC);
        one->took[i] = after - before;
        before = after;
    }
    one->ended = now(CLOCK_MONOTONIC);
    free(order);
    return NULL;
}

static int compare(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

int main(int argc, char **argv) {
    if (argc < 7)
        return fprintf(stderr, "usage: fault PATH HANDLER THREADS RUN ORDER FAULTS [SOCKET MEMORY]\n"), 2;
    path = argv[1], how = argv[2], thread_count = atoi(argv[3]), run = strtoull(argv[4], NULL, 10);
    by_random = *argv[5] == 'r';
    size_t faults = strtoull(argv[6], NULL, 10), count = faults / thread_count;
    every = is(path, "private") || is(path, "second") || is(path, "folded");
    stride = by_random && run < BLOCK && !every ? BLOCK : run;
    size_t length = count * stride;
    uint64_t *took = malloc(faults * sizeof *took);
    content = map(LONGEST, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    memset(content, 1, LONGEST);
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &action, NULL);
    for (size_t i = 0; i < thread_count; i++)
        threads[i] = (struct thread){.number = i, .took = took + i * count, .count = count};
    clockid_t theirs[MOST_THREADS];
    size_t handlers = 0;
    if (is(path, "socket") || is(path, "private")) {
        if (is(path, "private") && (file = open(argv[8], O_RDONLY | O_CLOEXEC)) < 0)
            fail(argv[8]);
        int flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_PRIVATE;
        unsigned char *memory = map(length * thread_count, flags, file);
        for (size_t i = 0; i < thread_count; i++)
            threads[i].memory = memory + i * length;
        if (is(path, "socket")) {
            int uffd = open_uffd(UFFD_FEATURE_EVENT_REMOVE, O_NONBLOCK);
            enroll(uffd, memory, length * thread_count, UFFDIO_REGISTER_MODE_MISSING);
            pid_t handler = shake_hands(argv[7], uffd, memory, length * thread_count);
            (void)*(volatile unsigned char *)(memory + length * thread_count - PAGE); /* it is served */
            if (clock_getcpuclockid(handler, &theirs[handlers++]))
                fail("the handler's clock");
        }
    } else
        for (size_t i = 0; i < thread_count; i++) {
            prepare(&threads[i], length);
            if (threads[i].handler && clock_getcpuclockid(threads[i].handler, &theirs[handlers++]))
                fail("the handler's clock");
        }
    pthread_barrier_init(&start, NULL, thread_count + 1);
    for (size_t i = 0; i < thread_count; i++)
        pthread_create(&threads[i].id, NULL, touch, &threads[i]);
    uint64_t handled = 0, own = now(CLOCK_PROCESS_CPUTIME_ID), began = -1, ended = 0;
    for (size_t i = 0; i < handlers; i++)
        handled -= now(theirs[i]);
    pthread_barrier_wait(&start);
    for (size_t i = 0; i < thread_count; i++) {
        pthread_join(threads[i].id, NULL);
        began = threads[i].began < began ? threads[i].began : began;
        ended = threads[i].ended > ended ? threads[i].ended : ended;
    }
    own = now(CLOCK_PROCESS_CPUTIME_ID) - own;
    for (size_t i = 0; i < handlers; i++)
        handled += now(theirs[i]);
    for (size_t i = 0; i < thread_count; i++)
        if (threads[i].handler)
            kill(threads[i].handler, SIGKILL);
    size_t all = count * thread_count;
    qsort(took, all, sizeof *took, compare);
    printf("{\"faults\": %zu, \"seconds\": %.9f, \"p50_us\": %.3f, \"p99_us\": %.3f, "
           "\"touching_cpu_s\": %.9f, \"handling_cpu_s\": %.9f}\n",
           all, (ended - began) / 1e9, took[all / 2] / 1e3, took[all * 99 / 100] / 1e3, own / 1e9,
           handled / 1e9);
    return 0;
}

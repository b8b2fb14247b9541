/* firecracker SOCKET MEMORY [NAME=VALUE...]: does what Firecracker does when it loads a snapshot whose
 * memory comes by userfaultfd; then does with that memory what it is told on standard input.
 *
 *   page=4096|2097152             bytes of a page of the guest's memory (2 MiB: hugetlb)
 *   memory=private|shared         what is mapped; Firecracker maps private anonymous memory
 *   regions=OFFSET+COUNT,...      pages of the file, in the order of the message; default the whole file
 *   split=N                       instead: the file in N regions of the same length
 *   place=gaps|adjacent|SEED      where the regions are mapped: in the order of the message, with gaps
 *                                 between them or without, or in an order drawn from SEED, with gaps
 *   size=page_size|page_size_kib|both   how the message spells the size of a page (always in bytes)
 *   unknown=1                     put fields into the message that nobody knows
 *   send=whole|first|last|after   in one piece; or in three, the descriptor with the first, the last, or
 *                                 with a blank behind the message
 *   scratch=PATH                  a file for O_DIRECT; without it there is none
 *
 * Prints "ready" and the number of its pages when the message is sent. Each line of standard input is then one of these, answered
 * by a line of JSON; pages are counted over all regions, in the order of the message:
 *
 *   settle                                wait until the server has read the message
 *   hangup                                wait until the server has closed the connection
 *   read FROM COUNT [ORDER [THREADS [WAY]]]   random|sequential; user|kernel|both: read, check every byte
 *   write FROM COUNT [WAY]                change one word of each page
 *   remove FROM COUNT [free]              give pages back: MADV_DONTNEED (REMOVE for shared), or FREE
 *   storm OPERATIONS THREADS SEED         each thread does so many of all that at random, at once
 *   measure ORDER THREADS [latency]       touch every page: the time of all, since the first touch and
 *                                         since the message was sent; or of each touch, and of those
 *                                         that waited, being of pages that were not there yet
 *
 * What a page must hold is known exactly, through its *state*: a count of the changes so far, and flags.
 * A change is announced by a flag, done, and then counted; a page changes in one way at a time, except
 * that one write may happen during a removal. A reader looks at the state before and after:
 *   - no flag, same count: every byte is known.
 *   - a change was under way, or ended: some words were read before it, the later ones after it.
 *     Words are read in ascending order, so while a page is removed there is a first zero, and from there
 *     on nothing but zeros. Content never comes back after a zero.
 *   - several changes: read again.
 * After a removal a page is zero, from the moment madvise has returned. A write during it may be lost,
 * or be there on a page of zeros: whoever removed the page looks which. After MADV_FREE pages are content
 * or zero for as long as the kernel likes; such pages are only ever read, or removed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { SMALL = 4096, MOST_THREADS = 64, MOST_SHOWN = 16, LONGEST_REMOVAL = 32 };
enum { USER, VM_READ, PIPE, DIRECT, WAYS };
/* Flags of a state; the count of changes is above them. */
enum { WRITTEN = 1, ZERO = 2, REMOVING = 4, WRITING = 8, RACED = 16, LOOSE = 32, FLAGS = 63, ONE = 64 };

struct region {
    size_t offset, count;
    unsigned char *at;
};

struct page {
    unsigned char *at;
    const unsigned char *content;
    uint64_t state;
};

struct thread {
    pthread_t id;
    size_t number;
    uint64_t random;
    unsigned char *got;
    int pipe[2];
    long reads, kernel_reads, writes, raced, removed, unverified, wrong, failed;
};

static size_t page_size = SMALL, page_count;
static struct page *pages;
static int uffd, connection, scratch = -1, shared;
static struct thread threads[MOST_THREADS];
static size_t thread_count;
static __thread sigjmp_buf after_sigbus;
static __thread volatile sig_atomic_t touching;
static size_t failed_pages[MOST_SHOWN];
static long failed_count, shown;

static void fail(const char *what) {
    fprintf(stderr, "firecracker: %s: %s\n", what, strerror(errno));
    exit(2);
}

static uint64_t draw(uint64_t *state) {
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state;
}

static uint64_t load(const void *word) {
    return __atomic_load_n((const uint64_t *)word, __ATOMIC_ACQUIRE);
}

static int exchange(uint64_t *word, uint64_t before, uint64_t after) {
    return __atomic_compare_exchange_n(word, &before, after, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static void on_sigbus(int signal) {
    if (!touching)
        _exit(128 + signal);
    siglongjmp(after_sigbus, 1);
}

/* The message and its memory */

static size_t parse_regions(const char *text, size_t split, size_t file_size, struct region **regions) {
    size_t count = 0, room = 16, length = file_size / page_size / split;
    *regions = malloc((text ? room : split) * sizeof **regions);
    if (!text) {
        for (; count < split; count++)
            (*regions)[count] = (struct region){count * length, length, NULL};
        return count;
    }
    for (char *end = (char *)text;; end++) {
        if (count == room)
            *regions = realloc(*regions, (room *= 2) * sizeof **regions);
        struct region *one = *regions + count++;
        one->offset = strtoull(end, &end, 10);
        one->count = *end == '+' ? strtoull(end + 1, &end, 10) : 0;
        if (!one->count || (one->offset + one->count) * page_size > file_size)
            errno = EINVAL, fail("regions=OFFSET+COUNT,...");
        if (*end != ',')
            return count;
    }
}

/* Maps the regions into one reservation, so that nothing else comes to lie between them. */
static void map_regions(struct region *regions, size_t count, const char *place) {
    uint64_t seed = strtoull(place, NULL, 10) * 0x9E3779B97F4A7C15u;
    size_t *order = malloc(count * sizeof *order), room = page_size;
    for (size_t i = 0; i < count; i++) {
        order[i] = i;
        room += (regions[i].count + 8) * page_size;
    }
    for (size_t i = count; seed && i > 1; i--) {
        size_t j = draw(&seed) % i, swap = order[i - 1];
        order[i - 1] = order[j], order[j] = swap;
    }
    unsigned char *at = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        fail("reserving addresses");
    at += -(uintptr_t)at % page_size;
    int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (page_size != SMALL)
        flags |= MAP_HUGETLB | 21 << MAP_HUGE_SHIFT;
    for (size_t i = 0; i < count; i++) {
        struct region *one = regions + order[i];
        one->at = mmap(at, one->count * page_size, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (one->at == MAP_FAILED)
            fail("mapping a region");
        at += one->count * page_size;
        if (strcmp(place, "adjacent"))
            at += (1 + (seed ? draw(&seed) % 7 : 0)) * page_size;
    }
    free(order);
}

static void register_regions(const struct region *regions, size_t count) {
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        fail("userfaultfd");
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE};
    if (ioctl(uffd, UFFDIO_API, &api))
        fail("UFFDIO_API");
    for (size_t i = 0; i < count; i++) {
        struct uffdio_register one = {
            .range = {(uintptr_t)regions[i].at, regions[i].count * page_size},
            .mode = UFFDIO_REGISTER_MODE_MISSING,
        };
        if (ioctl(uffd, UFFDIO_REGISTER, &one))
            fail("UFFDIO_REGISTER");
    }
}

static char *compose(const struct region *regions, size_t count, const char *spelling, int unknown) {
    char *text;
    size_t length;
    FILE *out = open_memstream(&text, &length);
    for (size_t i = 0; i < count; i++) {
        fprintf(out, "%s{\"base_host_virt_addr\":%zu,\"size\":%zu,\"offset\":%zu", i ? "," : "[",
                (size_t)regions[i].at, regions[i].count * page_size, regions[i].offset * page_size);
        if (strcmp(spelling, "page_size_kib"))
            fprintf(out, ",\"page_size\":%zu", page_size);
        if (strcmp(spelling, "page_size"))
            fprintf(out, ",\"page_size_kib\":%zu", page_size);
        if (unknown)
            fprintf(out, ",\"gpa_start\":%zu,\"later\":{\"list\":[null,-1.5e3,\"\\u00e9]}\"]}", i << 30);
        fputc('}', out);
    }
    fputc(']', out);
    fclose(out);
    return text;
}

static void send_piece(const char *text, size_t length, int descriptor) {
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof descriptor)];
    } control = {.head = {CMSG_LEN(sizeof descriptor), SOL_SOCKET, SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.head), &descriptor, sizeof descriptor);
    struct iovec part = {(char *)text, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (descriptor >= 0)
        message.msg_control = &control, message.msg_controllen = sizeof control;
    ssize_t sent = sendmsg(connection, &message, MSG_NOSIGNAL);
    if (sent < 0)
        fail("sending to the server");
    if ((size_t)sent < length) /* one message may be larger than the socket's buffer takes at once */
        send_piece(text + sent, length - sent, -1);
}

/* The kernel tells how much of what was sent is still unread. */
static void settle(void) {
    for (int unread = 1;; usleep(100)) {
        if (ioctl(connection, SIOCOUTQ, &unread))
            fail("SIOCOUTQ");
        if (!unread)
            return;
    }
}

static void shake_hands(const char *path, const char *text, const char *how) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strncpy(name.sun_path, path, sizeof name.sun_path - 1);
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection < 0 || connect(connection, (struct sockaddr *)&name, sizeof name))
        fail(path);
    size_t length = strlen(text), third = length / 3;
    if (!strcmp(how, "whole"))
        return send_piece(text, length, uffd);
    send_piece(text, third, strcmp(how, "first") ? -1 : uffd);
    settle();
    send_piece(text + third, third, -1);
    settle();
    send_piece(text + 2 * third, length - 2 * third, strcmp(how, "last") ? -1 : uffd);
    if (!strcmp(how, "after"))
        settle(), send_piece(" ", 1, uffd);
}

/* One page */

/* The word of a page that writes change: a different one on each page. */
static size_t written_word(size_t page) {
    return page % (page_size / 8);
}

/* What the change that leads to this state writes there. Never zero. */
static uint64_t value(size_t page, uint64_t state) {
    return ((page + 1) * 0x9E3779B97F4A7C15u ^ state / ONE * 0xD1B54A32D192ED03u) | 1;
}

static int fill_from_pipe(const int *from, unsigned char *into, size_t length) {
    for (ssize_t n; length; into += n, length -= n)
        if ((n = read(from[0], into, length)) <= 0)
            return 0;
    return 1;
}

/* Copies a page out; 0 if it cannot be had: SIGBUS, or a system call that says so. */
static int copy_page(struct thread *self, const unsigned char *at, int way) {
    struct iovec local = {self->got, page_size}, remote = {(void *)at, page_size};
    switch (way) {
    case VM_READ:
        return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)page_size;
    case PIPE:
        for (size_t done = 0; done < page_size; done += SMALL) {
            ssize_t written = write(self->pipe[1], at + done, SMALL);
            if (written > 0 && !fill_from_pipe(self->pipe, self->got + done, written))
                fail("pipe");
            if (written != SMALL)
                return 0;
        }
        return 1;
    case DIRECT: {
        off_t place = self->number * page_size;
        return pwrite(scratch, at, page_size, place) == (ssize_t)page_size &&
               pread(scratch, self->got, page_size, place) == (ssize_t)page_size;
    }
    default:
        if (sigsetjmp(after_sigbus, 0)) {
            touching = 0;
            return 0;
        }
        touching = 1;
        for (size_t word = 0; word < page_size; word += 8)
            *(uint64_t *)(self->got + word) = load(at + word);
        touching = 0;
        return 1;
    }
}

/* Whether the bytes read can be there, given the state before and after: 1, 0, or -1 for "read again". */
static int is_right(const unsigned char *got, size_t number, uint64_t before, uint64_t after) {
    const unsigned char *content = pages[number].content;
    uint64_t changes = after / ONE - before / ONE, flags = (before | after) & FLAGS;
    if (changes > 1 || (changes && after & (REMOVING | WRITING | RACED)))
        return -1;
    int zero_before = (before & ZERO) != 0;
    int may_vanish = flags & (REMOVING | LOOSE) || (changes && after & ZERO);
    size_t special = written_word(number);
    for (size_t word = 0, vanished = zero_before; word < page_size / 8; word++) {
        uint64_t is = load(got + 8 * word), was = zero_before ? 0 : load(content + 8 * word);
        if (word == special) {
            uint64_t next = value(number, before + ONE);
            int may_be_next = changes || flags & (WRITING | RACED);
            if (before & WRITTEN)
                was = value(number, before);
            if (is != was && !(may_be_next && is == next) && !(may_vanish && is == 0))
                return 0;
        } else if (is != was || vanished) {
            if (is != 0 || !(vanished || may_vanish))
                return 0;
            vanished = 1;
        }
    }
    return 1;
}

static void note_failure(struct thread *self, size_t number) {
    self->failed++;
    long at = __atomic_fetch_add(&failed_count, 1, __ATOMIC_RELAXED);
    if (at < MOST_SHOWN)
        failed_pages[at] = number;
}

static void note_wrong(struct thread *self, size_t number, uint64_t before, uint64_t after) {
    self->wrong++;
    if (__atomic_fetch_add(&shown, 1, __ATOMIC_RELAXED) >= MOST_SHOWN)
        return;
    size_t word = page_size / 8 - 1; /* the first that a page without changes would not have */
    for (size_t i = word; i-- > 0;)
        if (load(self->got + 8 * i) != (before & ZERO ? 0 : load(pages[number].content + 8 * i)))
            word = i;
    fprintf(stderr, "firecracker: page %zu at %p is wrong: states %#lx and %#lx; word %zu is %#lx, in the file %#lx\n",
            number, (void *)pages[number].at, before, after, word, load(self->got + 8 * word),
            load(pages[number].content + 8 * word));
}

static void read_page(struct thread *self, size_t number, int way) {
    struct page *page = pages + number;
    for (int attempt = 0; attempt < 100; attempt++) {
        uint64_t before = load(&page->state);
        if (!copy_page(self, page->at, way))
            return note_failure(self, number);
        uint64_t after = load(&page->state);
        int right = is_right(self->got, number, before, after);
        if (right < 0)
            continue;
        self->reads++;
        self->kernel_reads += way != USER;
        if (!right)
            note_wrong(self, number, before, after);
        return;
    }
    self->unverified++;
}

/* Changes the page's word; not while somebody else changes the page, except by removing it. */
static void write_page(struct thread *self, size_t number, int by_kernel) {
    struct page *page = pages + number;
    uint64_t before = load(&page->state);
    if (before & (WRITING | RACED | LOOSE) || !exchange(&page->state, before, before | WRITING))
        return;
    unsigned char *at = page->at + 8 * written_word(number);
    uint64_t word = value(number, before + ONE);
    volatile int done = 0;
    if (by_kernel) {
        if (write(self->pipe[1], &word, sizeof word) != sizeof word)
            fail("pipe");
        done = fill_from_pipe(self->pipe, at, sizeof word);
        if (!done) /* it stays in the pipe then */
            fill_from_pipe(self->pipe, self->got, sizeof word);
    } else if (!sigsetjmp(after_sigbus, 0)) {
        touching = 1;
        __atomic_store_n((uint64_t *)at, word, __ATOMIC_RELEASE);
        done = 1;
    }
    touching = 0;
    /* Nobody else changes the state while WRITING is there. */
    uint64_t next = before & REMOVING ? before | RACED /* who removes it finds out whether that is lost */
                    : done            ? (before + ONE) | WRITTEN
                                      : before;
    __atomic_store_n(&page->state, next, __ATOMIC_RELEASE);
    self->raced += (next & RACED) != 0;
    if (done)
        self->writes++;
    else
        note_failure(self, number);
}

static int remove_advice(void) {
    return shared ? MADV_REMOVE : MADV_DONTNEED;
}

/* Gives `count` pages from `first` back, as far as nobody else removes them and they are one range. */
static void remove_pages(struct thread *self, size_t first, size_t count, int only_free) {
    size_t held = 0;
    for (; held < count && first + held < page_count; held++) {
        struct page *page = pages + first + held;
        uint64_t before = load(&page->state);
        if ((held && page->at != page[-1].at + page_size) || before & (REMOVING | WRITING | RACED))
            break;
        if ((only_free && before & LOOSE) || !exchange(&page->state, before, before | REMOVING))
            break;
    }
    if (!held)
        return;
    if (madvise(pages[first].at, held * page_size, only_free ? MADV_FREE : remove_advice()))
        fail("madvise");
    for (size_t i = 0; i < held; i++) {
        struct page *page = pages + first + i;
        uint64_t now;
        while ((now = load(&page->state)) & WRITING)
            sched_yield();
        if (only_free) {
            /* Without a write it is loose now; one that happened meanwhile cannot be told from a lost
             * one, so the page goes for good. */
            if (!(now & RACED)) {
                if (!exchange(&page->state, now, (now & ~(uint64_t)REMOVING) | LOOSE))
                    i--; /* a write has just begun */
                continue;
            }
            if (madvise(page->at, page_size, MADV_DONTNEED))
                fail("madvise");
        }
        uint64_t next = (now / ONE + 1) * ONE | ZERO;
        if (now & RACED && !only_free) {
            uint64_t word = 0;
            if (!copy_page(self, page->at, USER))
                note_failure(self, first + i);
            else
                word = load(self->got + 8 * written_word(first + i));
            if (word == value(first + i, next))
                next |= WRITTEN;
            else if (word != 0)
                note_wrong(self, first + i, now, next);
        }
        if (!exchange(&page->state, now, next))
            i--; /* a write has just begun */
        else
            self->removed++;
    }
}

/* Verbs */

static void each_thread(size_t count, void *(*work)(void *)) {
    if (count < 1 || count > MOST_THREADS)
        errno = EINVAL, fail("threads");
    for (thread_count = 0; thread_count < count; thread_count++) {
        struct thread *self = threads + thread_count;
        if (!self->got) {
            self->number = thread_count;
            self->got = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (self->got == MAP_FAILED || pipe2(self->pipe, O_CLOEXEC))
                fail("starting a thread");
        }
        self->reads = self->kernel_reads = self->writes = self->raced = 0;
        self->removed = self->unverified = self->wrong = self->failed = 0;
    }
    failed_count = shown = 0;
    for (size_t i = 0; i < count; i++)
        if (pthread_create(&threads[i].id, NULL, work, threads + i))
            fail("pthread_create");
    for (size_t i = 0; i < count; i++)
        pthread_join(threads[i].id, NULL);
}

static void answer(void) {
    struct thread sum = {0};
    for (size_t i = 0; i < thread_count; i++) {
        sum.reads += threads[i].reads, sum.kernel_reads += threads[i].kernel_reads;
        sum.writes += threads[i].writes, sum.raced += threads[i].raced;
        sum.removed += threads[i].removed, sum.unverified += threads[i].unverified;
        sum.wrong += threads[i].wrong, sum.failed += threads[i].failed;
    }
    printf("{\"reads\": %ld, \"kernel_reads\": %ld, \"writes\": %ld, \"raced\": %ld, \"removed\": %ld, "
           "\"unverified\": %ld, \"wrong\": %ld, \"failed\": %ld, \"failed_pages\": [",
           sum.reads, sum.kernel_reads, sum.writes, sum.raced, sum.removed, sum.unverified, sum.wrong, sum.failed);
    for (long i = 0; i < sum.failed && i < MOST_SHOWN; i++)
        printf("%s%zu", i ? ", " : "", failed_pages[i]);
    printf("]}\n");
}

static struct {
    size_t from, count, operations;
    int by_random, latency, first_way, ways, only_free;
    uint64_t seed;
} job;

static int any_way(uint64_t drawn) {
    if (scratch >= 0 && job.ways == WAYS && drawn % 16 == 0)
        return DIRECT; /* seldom, for it waits for a disk */
    return job.first_way + (drawn >> 4) % ((job.ways == WAYS ? DIRECT : job.ways) - job.first_way);
}

/* The share of a thread, in the order that is wanted. */
static size_t *plan(const struct thread *self, size_t *count) {
    size_t share = job.count / thread_count, first = self->number * share;
    *count = self->number + 1 == thread_count ? job.count - first : share;
    size_t *order = malloc((*count + 1) * sizeof *order);
    for (size_t i = 0; i < *count; i++)
        order[i] = job.from + first + i;
    uint64_t seed = 88172645463325252u + self->number;
    for (size_t i = *count; job.by_random && i > 1; i--) {
        size_t j = draw(&seed) % i, swap = order[i - 1];
        order[i - 1] = order[j], order[j] = swap;
    }
    return order;
}

static void *do_read(void *argument) {
    struct thread *self = argument;
    size_t count, *order = plan(self, &count);
    for (size_t i = 0; i < count; i++)
        read_page(self, order[i], any_way(order[i] * 0x9E3779B97F4A7C15u >> 32));
    free(order);
    return NULL;
}

static void *do_write(void *argument) {
    for (size_t i = 0; i < job.count; i++)
        write_page(argument, job.from + i, job.first_way != USER || (job.ways != 1 && i & 1));
    return NULL;
}

static void *do_remove(void *argument) {
    struct thread *self = argument;
    for (size_t i = 0; i < job.count;) {
        long before = self->removed;
        remove_pages(self, job.from + i, job.count - i, job.only_free);
        i += job.only_free || self->removed == before ? 1 : self->removed - before;
    }
    return NULL;
}

static void *do_storm(void *argument) {
    struct thread *self = argument;
    self->random = (job.seed * MOST_THREADS + self->number + 1) * 0x9E3779B97F4A7C15u;
    for (size_t i = 0; i < job.operations; i++) {
        uint64_t drawn = draw(&self->random) >> 8;
        /* Half of it where all threads are at about this time: so that they meet. */
        size_t near = i / 64 * 61 + (drawn >> 8) % 64, kind = drawn % 64;
        size_t page = (drawn >> 32 & 1 ? near : drawn >> 8) % page_count;
        if (kind < 40)
            read_page(self, page, any_way(drawn >> 40));
        else if (kind < 44) /* a stream of some length */
            for (size_t j = 0; j < 48 && page + j < page_count; j++)
                read_page(self, page + j, USER);
        else if (kind < 58)
            write_page(self, page, kind & 1);
        else
            remove_pages(self, page, 1 + (drawn >> 40) % LONGEST_REMOVAL, !shared && page_size == SMALL && kind == 63);
    }
    return NULL;
}

static uint64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static uint64_t message_sent, *waited, *touched;
static size_t waits, touches;

static void *do_measure(void *argument) {
    size_t count, *order = plan(argument, &count);
    unsigned char present;
    for (size_t i = 0; i < count; i++) {
        volatile unsigned char *at = pages[order[i]].at;
        if (job.latency) {
            if (mincore((void *)at, SMALL, &present))
                fail("mincore");
            uint64_t began = nanoseconds();
            (void)*at;
            uint64_t took = nanoseconds() - began;
            touched[__atomic_fetch_add(&touches, 1, __ATOMIC_RELAXED)] = took;
            if (!(present & 1))
                waited[__atomic_fetch_add(&waits, 1, __ATOMIC_RELAXED)] = took;
        } else {
            (void)*at;
        }
    }
    free(order);
    return NULL;
}

static int by_size(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, uint64_t *times, size_t count) {
    qsort(times, count, sizeof *times, by_size);
    printf(", \"%s\": %zu, \"%s_p50_us\": %.3f, \"%s_p99_us\": %.3f", name, count, name,
           count ? times[count / 2] / 1e3 : 0, name, count ? times[count * 99 / 100] / 1e3 : 0);
}

static void measure(size_t count) {
    waited = calloc(2 * job.count, sizeof *waited), waits = 0;
    touched = waited + job.count, touches = 0;
    for (size_t i = 0; i < 2 * job.count; i++)
        waited[i] = 1; /* its memory is there before */
    uint64_t began = nanoseconds();
    each_thread(count, do_measure);
    uint64_t ended = nanoseconds();
    printf("{\"pages\": %zu, \"seconds\": %.9f, \"since_message_s\": %.9f", job.count,
           (ended - began) / 1e9, (ended - message_sent) / 1e9);
    if (job.latency) {
        print_times("waits", waited, waits);
        print_times("touches", touched, touches);
    }
    printf("}\n");
    free(waited);
}

static void choose_way(const char *way) {
    job.first_way = *way == 'k' ? VM_READ : USER;
    job.ways = *way == 'u' ? 1 : WAYS;
}

static void obey(const char *line) {
    char verb[16] = "", word[16] = "", way[16] = "user";
    size_t a = 0, b = 0, count = 1;
    memset(&job, 0, sizeof job);
    sscanf(line, "%15s", verb);
    if (!strcmp(verb, "settle")) {
        settle();
        printf("{}\n");
    } else if (!strcmp(verb, "hangup")) {
        struct pollfd one = {connection, POLLIN, 0};
        char byte;
        while (poll(&one, 1, -1) < 0)
            ;
        ssize_t n = recv(connection, &byte, 1, 0);
        printf("{\"closed\": %s}\n", n == 0 || (n < 0 && errno == ECONNRESET) ? "true" : "false");
    } else if (!strcmp(verb, "read") && sscanf(line, "%*s %zu %zu %15s %zu %15s", &a, &b, word, &count, way) >= 2) {
        job.from = a, job.count = b, job.by_random = *word == 'r';
        choose_way(way);
        each_thread(count, do_read);
        answer();
    } else if (!strcmp(verb, "write") && sscanf(line, "%*s %zu %zu %15s", &a, &b, way) >= 2) {
        job.from = a, job.count = b;
        choose_way(way);
        each_thread(1, do_write);
        answer();
    } else if (!strcmp(verb, "remove") && sscanf(line, "%*s %zu %zu %15s", &a, &b, word) >= 2) {
        job.from = a, job.count = b, job.only_free = *word == 'f';
        each_thread(1, do_remove);
        answer();
    } else if (!strcmp(verb, "storm") && sscanf(line, "%*s %zu %zu %lu", &a, &count, &job.seed) == 3) {
        job.operations = a, job.ways = WAYS;
        each_thread(count, do_storm);
        answer();
    } else if (!strcmp(verb, "measure") && sscanf(line, "%*s %15s %zu %15s", word, &count, way) >= 2) {
        job.count = page_count, job.by_random = *word == 'r', job.latency = *way == 'l';
        measure(count);
    } else {
        errno = EINVAL;
        fail(line);
    }
    fflush(stdout);
}

int main(int argc, char **argv) {
    const char *list = NULL, *place = "gaps", *spelling = "both", *how = "whole";
    int unknown = 0;
    size_t split = 1;
    for (int i = 3; i < argc; i++) {
        char *text = strchr(argv[i], '=');
        if (!text)
            errno = EINVAL, fail(argv[i]);
        *text++ = 0;
        if (!strcmp(argv[i], "page")) page_size = strtoull(text, NULL, 10);
        else if (!strcmp(argv[i], "memory")) shared = !strcmp(text, "shared");
        else if (!strcmp(argv[i], "regions")) list = text;
        else if (!strcmp(argv[i], "split")) split = strtoull(text, NULL, 10);
        else if (!strcmp(argv[i], "place")) place = text;
        else if (!strcmp(argv[i], "size")) spelling = text;
        else if (!strcmp(argv[i], "unknown")) unknown = *text == '1';
        else if (!strcmp(argv[i], "send")) how = text;
        else if (!strcmp(argv[i], "scratch")) {
            /* Not every file system has O_DIRECT; then the other ways must do. */
            scratch = open(text, O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600);
            if (scratch < 0 && errno != EINVAL)
                fail(text);
        } else
            errno = EINVAL, fail(argv[i]);
    }
    struct stat status;
    int file = argc > 2 ? open(argv[2], O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0 || fstat(file, &status))
        fail("firecracker SOCKET MEMORY [NAME=VALUE...]");
    const unsigned char *content = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (content == MAP_FAILED)
        fail(argv[2]);
    struct region *regions;
    size_t count = parse_regions(list, split, status.st_size, &regions);
    map_regions(regions, count, place);
    for (size_t i = 0; i < count; i++)
        page_count += regions[i].count;
    pages = calloc(page_count, sizeof *pages);
    struct page *page = pages;
    for (size_t i = 0; i < count; i++)
        for (size_t j = 0; j < regions[i].count; j++, page++) {
            page->at = regions[i].at + j * page_size;
            page->content = content + (regions[i].offset + j) * page_size;
        }
    struct sigaction action = {.sa_handler = on_sigbus, .sa_flags = SA_NODEFER};
    sigaction(SIGBUS, &action, NULL);
    register_regions(regions, count);
    message_sent = nanoseconds();
    shake_hands(argv[1], compose(regions, count, spelling, unknown), how);
    printf("ready %zu\n", page_count);
    fflush(stdout);
    char *line = NULL;
    for (size_t room = 0; getline(&line, &room, stdin) > 0;)
        obey(line);
    return 0; /* with it go the userfaultfd and the connection, which were kept until now */
}

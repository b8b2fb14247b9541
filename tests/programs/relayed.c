/* relayed SOCKET MEMORY: comes in as Firecracker does, with a userfaultfd that announces everything
 * (forks, moves, removals, unmappings), and does with that memory what it is told on standard input.
 *
 * Every page of MEMORY repeats one word of 8 bytes. Prints "ready" and the address of the first page when
 * the message is sent. Each line of standard input is then one of these, answered by a line of JSON:
 *
 *   read FROM COUNT [THREADS]    the words of these pages, each page read whole: null where a touch raises
 *                                SIGBUS, -1 where the words of a page differ
 *   fork FROM COUNT              the same, in a child
 *   move FROM COUNT              mremap these pages to another address: [old, new]
 *   remove FROM COUNT            MADV_DONTNEED: [start, end]
 *   unmap FROM COUNT             [start, end]
 *   write FROM COUNT             one byte of each page, in a thread: [] at once
 *   join                         wait for that thread: []
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
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
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, MOST_THREADS = 8 };
enum { FINE, MIXED, FAILED };

static char **pages;
static size_t page_count;
static uint64_t *words;
static char *states;
static __thread sigjmp_buf after_sigbus;
static size_t from, count, threads;

static void fail(const char *what) {
    fprintf(stderr, "relayed: %s: %s\n", what, strerror(errno));
    _exit(2);
}

static void on_sigbus(int signal) {
    (void)signal;
    siglongjmp(after_sigbus, 1);
}

static void read_page(size_t number) {
    const volatile uint64_t *page = (const volatile uint64_t *)pages[number];
    if (sigsetjmp(after_sigbus, 1)) {
        states[number] = FAILED;
        return;
    }
    states[number] = FINE, words[number] = page[0];
    for (size_t i = 1; i < WORDS; i++)
        if (page[i] != words[number])
            states[number] = MIXED;
}

static void *read_share(void *argument) {
    for (size_t i = (uintptr_t)argument; i < count; i += threads)
        read_page(from + i);
    return NULL;
}

static void *write_pages(void *argument) {
    (void)argument;
    for (size_t i = 0; i < count; i++)
        *(volatile char *)pages[from + i] = 1;
    return NULL;
}

static void print_words(void) {
    printf("[");
    for (size_t i = from; i < from + count; i++) {
        printf(i == from ? "" : ", ");
        if (states[i] == FINE)
            printf("%lu", words[i]);
        else
            printf(states[i] == MIXED ? "-1" : "null");
    }
    printf("]\n");
}

static void read_pages(void) {
    pthread_t ids[MOST_THREADS];
    for (size_t i = 1; i < threads; i++)
        if (pthread_create(ids + i, NULL, read_share, (void *)i))
            fail("pthread_create");
    read_share(0);
    for (size_t i = 1; i < threads; i++)
        pthread_join(ids[i], NULL);
}

static void obey(const char *line) {
    static pthread_t writer;
    char verb[16] = "";
    from = count = 0, threads = 1;
    sscanf(line, "%15s %zu %zu %zu", verb, &from, &count, &threads);
    if (from + count > page_count || threads < 1 || threads > MOST_THREADS)
        errno = ERANGE, fail(line);
    if (!strcmp(verb, "join")) {
        pthread_join(writer, NULL);
        printf("[]\n");
        fflush(stdout);
        return;
    }
    char *start = pages[from];
    if (!strcmp(verb, "read")) {
        read_pages();
        print_words();
    } else if (!strcmp(verb, "fork")) {
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            read_pages();
            print_words();
            fflush(stdout);
            _exit(0);
        }
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child || status)
            fail("fork");
    } else if (!strcmp(verb, "move")) {
        char *to = mmap(NULL, count * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (to == MAP_FAILED ||
            mremap(start, count * PAGE, count * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
            fail("mremap");
        for (size_t i = 0; i < count; i++)
            pages[from + i] = to + i * PAGE;
        printf("[%lu, %lu]\n", (uintptr_t)start, (uintptr_t)to);
    } else if (!strcmp(verb, "remove")) {
        if (madvise(start, count * PAGE, MADV_DONTNEED))
            fail("madvise");
        printf("[%lu, %lu]\n", (uintptr_t)start, (uintptr_t)start + count * PAGE);
    } else if (!strcmp(verb, "unmap")) {
        if (munmap(start, count * PAGE))
            fail("munmap");
        printf("[%lu, %lu]\n", (uintptr_t)start, (uintptr_t)start + count * PAGE);
    } else if (!strcmp(verb, "write")) {
        if (pthread_create(&writer, NULL, write_pages, NULL))
            fail("pthread_create");
        printf("[]\n");
    } else {
        errno = EINVAL, fail(line);
    }
    fflush(stdout);
}

static void hand_over(const char *path, const char *text, int descriptor) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(name.sun_path, path, sizeof name.sun_path - 1);
    if (connection < 0 || connect(connection, (struct sockaddr *)&name, sizeof name))
        fail(path);
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof descriptor)];
    } control = {.head = {CMSG_LEN(sizeof descriptor), SOL_SOCKET, SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.head), &descriptor, sizeof descriptor);
    struct iovec part = {(char *)text, strlen(text)};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    if (sendmsg(connection, &message, MSG_NOSIGNAL) != (ssize_t)part.iov_len)
        fail("sending to the server");
}

int main(int argc, char **argv) {
    struct stat status;
    if (argc != 3 || stat(argv[2], &status))
        fail("relayed SOCKET MEMORY");
    page_count = status.st_size / PAGE;
    pages = calloc(page_count, sizeof *pages);
    words = calloc(page_count, sizeof *words);
    states = calloc(page_count, 1);
    char *memory = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    for (size_t i = 0; i < page_count; i++)
        pages[i] = memory + i * PAGE;
    struct sigaction action = {.sa_handler = on_sigbus, .sa_flags = SA_NODEFER};
    sigaction(SIGBUS, &action, NULL);
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
                    UFFD_FEATURE_EVENT_UNMAP,
    };
    struct uffdio_register all = {
        .range = {(uintptr_t)memory, status.st_size},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &all))
        fail("userfaultfd");
    char *text;
    if (asprintf(&text, "[{\"base_host_virt_addr\":%lu,\"size\":%lu,\"offset\":0,\"page_size\":%d}]",
                 (uintptr_t)memory, status.st_size, PAGE) < 0)
        fail("asprintf");
    hand_over(argv[1], text, uffd);
    printf("ready %lu\n", (uintptr_t)memory);
    fflush(stdout);
    char *line = NULL;
    for (size_t room = 0; getline(&line, &room, stdin) > 0;)
        obey(line);
    return 0;
}

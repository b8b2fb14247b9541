/* An unmodified program that maps a file privately and checks every byte of it against a reference.
 *
 * toucher FILE REFERENCE [threads] [random|sequential|reverse] [user|kernel|both] [write|read] [seed]
 *
 * "kernel" reads pages by write(2) from the mapping into a pipe. "write" also changes a word of every
 * third page and checks that the change stays. Prints "pages N wrong N"; exits 1 if any is wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE = 4096 };

static unsigned char *memory;
static size_t pages;
static int reference, threads = 1, by_user = 1, by_kernel, writes;
static const char *order = "random";
static uint64_t seed = 1;
static long wrong_pages, checked_pages;

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state;
}

static void fail(const char *what) {
    fprintf(stderr, "toucher: %s: %s\n", what, strerror(errno));
    exit(2);
}

static void read_through_kernel(int *pipe_ends, const unsigned char *page, unsigned char *into) {
    ssize_t written = write(pipe_ends[1], page, PAGE);
    if (written != PAGE)
        fail("write(2) from the mapping");
    for (size_t got = 0; got < PAGE;) {
        ssize_t n = read(pipe_ends[0], into + got, PAGE - got);
        if (n <= 0)
            fail("read");
        got += n;
    }
}

static void *touch(void *argument) {
    size_t self = (size_t)argument, share = pages / threads, first = self * share;
    size_t count = self == (size_t)threads - 1 ? pages - first : share;
    size_t *index = malloc(count * sizeof *index);
    uint64_t state = seed * 0x9E3779B97F4A7C15u + self + 1;
    for (size_t i = 0; i < count; i++)
        index[i] = first + (*order == 'r' && order[1] == 'e' ? count - 1 - i : i);
    if (!strcmp(order, "random"))
        for (size_t i = count; i > 1; i--) {
            size_t j = next_random(&state) % i, swap = index[i - 1];
            index[i - 1] = index[j], index[j] = swap;
        }
    int ends[2];
    if (pipe(ends))
        fail("pipe");
    unsigned char expected[PAGE], got[PAGE];
    for (size_t i = 0; i < count; i++) {
        size_t page = index[i];
        unsigned char *at = memory + page * PAGE;
        if (pread(reference, expected, PAGE, page * PAGE) != PAGE)
            fail("reference");
        int kernel = by_kernel && (!by_user || next_random(&state) & 1);
        if (kernel)
            read_through_kernel(ends, at, got);
        else
            memcpy(got, at, PAGE);
        int wrong = memcmp(got, expected, PAGE) != 0;
        if (writes && page % 3 == 0) {
            *(volatile uint64_t *)(at + 8 * (page % 512)) = page + 1;
            wrong |= *(volatile uint64_t *)(at + 8 * (page % 512)) != page + 1;
        }
        if (wrong) {
            __atomic_add_fetch(&wrong_pages, 1, __ATOMIC_RELAXED);
            fprintf(stderr, "toucher: page %zu is wrong: first byte %#x, expected %#x\n", page, got[0], expected[0]);
        }
        __atomic_add_fetch(&checked_pages, 1, __ATOMIC_RELAXED);
    }
    if (writes) /* what was written is still there, and nothing else changed */
        for (size_t i = 0; i < count; i++) {
            size_t page = index[i];
            if (pread(reference, expected, PAGE, page * PAGE) != PAGE)
                fail("reference");
            if (page % 3 == 0)
                *(uint64_t *)(expected + 8 * (page % 512)) = page + 1;
            if (memcmp(memory + page * PAGE, expected, PAGE))
                __atomic_add_fetch(&wrong_pages, 1, __ATOMIC_RELAXED);
        }
    free(index);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc < 3)
        return fprintf(stderr, "usage: toucher FILE REFERENCE [threads] [order] [mode] [write|read] [seed]\n"), 2;
    if (argc > 3) threads = atoi(argv[3]);
    if (argc > 4) order = argv[4];
    if (argc > 5) by_kernel = strcmp(argv[5], "user") != 0, by_user = strcmp(argv[5], "kernel") != 0;
    if (argc > 6) writes = !strcmp(argv[6], "write");
    if (argc > 7) seed = strtoull(argv[7], NULL, 10);
    int file = open(argv[1], O_RDWR | O_CLOEXEC);
    reference = open(argv[2], O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0 || reference < 0 || fstat(reference, &status))
        fail("open");
    pages = status.st_size / PAGE;
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    pthread_t ids[64];
    for (long i = 0; i < threads; i++)
        if (pthread_create(&ids[i], NULL, touch, (void *)i))
            fail("pthread_create");
    for (int i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    printf("pages %ld wrong %ld\n", checked_pages, wrong_pages);
    return wrong_pages != 0;
}

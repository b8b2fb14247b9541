/* closer FILE REFERENCE: maps FILE privately and forks; the child closes every descriptor it does not
 * know, as programs do between fork and exec and when they become daemons, and then still finds the
 * right bytes. The parent does the same. Prints "wrong N". */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static long wrong(const unsigned char *memory, const unsigned char *expected, size_t from, size_t to) {
    long count = 0;
    for (size_t at = from; at < to; at += 4096)
        count += memcmp(memory + at, expected + at, 4096) != 0;
    return count;
}

int main(int argc, char **argv) {
    struct stat status;
    int file = argc == 3 ? open(argv[1], O_RDWR) : -1, reference = argc == 3 ? open(argv[2], O_RDONLY) : -1;
    if (file < 0 || reference < 0 || fstat(reference, &status))
        return perror("closer FILE REFERENCE"), 2;
    size_t size = status.st_size, third = size / 3 & ~4095UL;
    unsigned char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    unsigned char *expected = mmap(NULL, size, PROT_READ, MAP_PRIVATE, reference, 0);
    if (memory == MAP_FAILED || expected == MAP_FAILED)
        return perror("mmap"), 2;
    long count = wrong(memory, expected, 0, third);
    pid_t child = fork();
    if (child == 0) {
        close_range(3, ~0U, 0);
        _exit(wrong(memory, expected, third, 2 * third) != 0);
    }
    int ended = 0;
    waitpid(child, &ended, 0);
    close_range(3, ~0U, 0);
    count += ended != 0;
    count += wrong(memory, expected, 2 * third, size);
    printf("wrong %ld\n", count);
    return count != 0;
}

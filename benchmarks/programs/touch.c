/* touch FILE random|sequential: maps FILE privately, touches one byte of each page, and prints the
 * nanoseconds that took and the number of pages. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

int main(int argc, char **argv) {
    struct stat status;
    int file = argc == 3 ? open(argv[1], O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0 || fstat(file, &status))
        return perror("touch FILE random|sequential"), 2;
    size_t pages = status.st_size / 4096;
    unsigned char *memory = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    if (memory == MAP_FAILED)
        return perror("mmap"), 2;
    uint32_t *index = malloc(pages * sizeof *index);
    for (size_t i = 0; i < pages; i++)
        index[i] = i;
    uint64_t state = 88172645463325252u;
    for (size_t i = pages; !strcmp(argv[2], "random") && i > 1; i--) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        size_t j = state % i;
        uint32_t swap = index[i - 1];
        index[i - 1] = index[j], index[j] = swap;
    }
    struct timespec began, ended;
    unsigned long sum = 0;
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (size_t i = 0; i < pages; i++)
        sum += *(volatile unsigned char *)(memory + index[i] * 4096UL);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("%lld %zu\n", (ended.tv_sec - began.tv_sec) * 1000000000LL + ended.tv_nsec - began.tv_nsec, pages);
    return sum == 0;
}

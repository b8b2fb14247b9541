/* A program that starts others in every way but fork, in the middle of its faults; at last itself.
 *
 * spawner FILE REFERENCE [again]
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };

extern char **environ;
static unsigned char *memory, *reference;
static size_t pages;

static void check(size_t from) {
    for (size_t page = from; page < pages; page += 4)
        if (memcmp(memory + page * PAGE, reference + page * PAGE, PAGE)) {
            fprintf(stderr, "page %zu is wrong\n", page);
            _exit(1);
        }
}

static void expect_success(pid_t child) {
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
        perror("child");
        _exit(3);
    }
}

int main(int argc, char **argv) {
    if (argc < 3)
        return 2;
    int file = open(argv[1], O_RDWR | O_CLOEXEC), original = open(argv[2], O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0 || original < 0 || fstat(original, &status))
        return perror("open"), 2;
    pages = status.st_size / PAGE;
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    reference = mmap(NULL, pages * PAGE, PROT_READ, MAP_PRIVATE, original, 0);
    if (memory == MAP_FAILED || reference == MAP_FAILED)
        return perror("mmap"), 2;

    char *quiet[] = {"true", NULL};
    check(0);
    pid_t child = vfork();
    if (child == 0) {
        execvp(quiet[0], quiet);
        _exit(127);
    }
    expect_success(child);
    check(1);
    if (posix_spawnp(&child, quiet[0], NULL, NULL, quiet, environ))
        return 3;
    expect_success(child);
    check(2);
    if (system("true"))
        return 3;
    check(3);
    printf("right\n");
    fflush(stdout);
    if (argc == 3) {
        char *again[] = {argv[0], argv[1], argv[2], "again", NULL};
        execv(argv[0], again);
        return 127;
    }
    return 0;
}

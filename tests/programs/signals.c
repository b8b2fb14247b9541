/* A program with a storm of signals: a timer whose handler touches the mapping, while threads fault.
 *
 * signals FILE REFERENCE
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>

enum { PAGE = 4096, THREADS = 2 };

static unsigned char *memory, *reference;
static size_t pages;
static volatile sig_atomic_t wrong, handled;
static volatile size_t next_page;

static void touch(size_t page) {
    if (memcmp(memory + page * PAGE, reference + page * PAGE, PAGE))
        wrong = 1;
}

static void on_alarm(int signal) {
    (void)signal;
    int before = errno;
    /* From the end, so that it meets pages that the threads have not touched. */
    size_t page = __atomic_fetch_add(&next_page, 1, __ATOMIC_RELAXED);
    touch(pages - 1 - page % pages);
    handled++;
    errno = before;
}

static void *read_all(void *argument) {
    size_t self = (size_t)argument;
    for (size_t page = self; page < pages; page += THREADS)
        touch(page);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    int file = open(argv[1], O_RDWR), original = open(argv[2], O_RDONLY);
    struct stat status;
    if (file < 0 || original < 0 || fstat(original, &status))
        return perror("open"), 2;
    pages = status.st_size / PAGE;
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    reference = mmap(NULL, pages * PAGE, PROT_READ, MAP_PRIVATE, original, 0);
    if (memory == MAP_FAILED || reference == MAP_FAILED)
        return perror("mmap"), 2;
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    struct itimerval interval = {{0, 200}, {0, 200}};
    setitimer(ITIMER_REAL, &interval, NULL);
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, read_all, (void *)i);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    while (handled < 20) /* the storm reaches this thread too */
        ;
    printf("wrong %d\n", wrong);
    return wrong;
}

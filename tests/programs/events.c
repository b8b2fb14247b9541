/* events SOCKET MEMORY [NAME=VALUE...]: a target that does to its memory all that userfaultfd has events
 * for, at random, from several threads, while its pages are served; and that knows what each of them must
 * hold. It comes in as Firecracker does, and does then what it is told on standard input.
 *
 *   page=4096|2097152          bytes of a page
 *   memory=private|shared      anonymous memory of its own; or a memfd
 *   events=fork,remap,...      what is negotiated: fork remap remove unmap thread exact; default all
 *   regions=N                  the file is mapped in so many regions, with gaps between them
 *
 * Prints "ready PAGES" when the message is sent. Each line of standard input is then one of these, answered
 * by a line of JSON:
 *
 *   storm OPERATIONS THREADS SEED   each thread does so many things, drawn from SEED
 *   check                           reads every page
 *   model PATH                      writes down what every page must hold
 *   fork SEED OPERATIONS PATH       a child, with a child of its own: each does so many things, writes down
 *                                   its model (to PATH and PATH.1), and stays
 *   release                         lets these children end
 *
 * The memory is *chunks*: ranges that are one mapping each, known by where they are and what their pages are.
 * Who moves, maps or unmaps has a chunk for itself; who writes or removes shares it, and marks the pages as
 * busy. Readers ask nobody: they look at the chunk's generation and the page's state before and after. If
 * neither changed, every byte is known; else the bytes say nothing. So faults are under way while their
 * memory is moved, unmapped, removed and forked.
 *
 * What changes the layout (mremap, munmap, mmap over it, fork) is done one at a time in a process: the kernel
 * sends such events after it has given its lock back, so two threads' may come in another order than they
 * happened, and nobody could know what is where.
 *
 * What belongs to a page:
 *   - what the template has; zeros once it was removed (MADV_DONTNEED, MADV_REMOVE); and a word of its own.
 *   - Without EVENT_REMOVE, and for holes punched by fallocate, which make no event: what belonged there
 *     before it was written to comes back, as nobody was told.
 *   - After MADV_FREE either what was there or zeros, until it is written to.
 *   - Pages by which a mapping has grown, and what a move with DONTUNMAP left behind: zeros.
 *
 * A child has what its parent had when it was forked: nothing is known of pages that were busy just then. It
 * goes on by itself. Some are killed at once, some execute another program, some have children.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
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
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SMALL = 4096, MOST_THREADS = 16, MOST_CHUNKS = 160, LONGEST = 96, MOST_LIVING = 5, DEEPEST = 2 };
enum { MOST_SAID = 4096, WRONG = 3 };

struct page {
    uint64_t state;  /* odd while it changes; twice the number of changes */
    int64_t base;    /* page of the template, or -1: zeros; -2: nothing is known */
    uint64_t word;   /* in its slot, unless 0 */
    int64_t told;    /* what the events told belongs there, as base */
    uint64_t loose;  /* given back by MADV_FREE */
};

struct chunk {
    uint64_t generation; /* odd while it changes */
    int64_t users;       /* how many share it; -1: somebody has it alone */
    unsigned char *at;
    size_t count;
    struct page *pages[LONGEST];
};

/* Shared by the whole family. */
struct common {
    int64_t living, forks, killed, executed;
    int64_t reads, checked, writes, removed, moved, unmapped, wrong, failed;
    int64_t said;
    char words[MOST_SAID];
};

struct thread {
    pthread_t id;
    uint64_t number, random, operations;
    unsigned char *got;
    int pipe[2];
};

static size_t page_size = SMALL, page_count, arena_pages, pool_size, pool_used;
static uint64_t features;
static int uffd, file, shared, depth, hold[2];
static struct chunk chunks[MOST_CHUNKS];
static struct page *pool;
static struct common *common;
static const unsigned char *content;
static unsigned char *arena;
static pthread_mutex_t layout = PTHREAD_MUTEX_INITIALIZER;
static struct thread threads[MOST_THREADS];
static __thread sigjmp_buf after_signal;
static __thread volatile sig_atomic_t touching;

static void fail(const char *what) {
    fprintf(stderr, "events: %s: %s\n", what, strerror(errno));
    _exit(2);
}

static uint64_t draw(uint64_t *state) {
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state >> 8;
}

#define load(from) __atomic_load_n(from, __ATOMIC_ACQUIRE)
#define store(to, value) __atomic_store_n(to, value, __ATOMIC_RELEASE)
#define add(to, value) __atomic_fetch_add(to, value, __ATOMIC_ACQ_REL)

static int exchange(void *word, uint64_t before, uint64_t after) {
    return __atomic_compare_exchange_n((uint64_t *)word, &before, after, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* Something is not as it must be. */
static void say(const char *format, ...) {
    char line[256];
    int length = snprintf(line, sizeof line, "[%d at depth %d] ", getpid(), depth);
    va_list arguments;
    va_start(arguments, format);
    length += vsnprintf(line + length, sizeof line - length, format, arguments);
    va_end(arguments);
    int64_t at = add(&common->said, length);
    if (at + length < MOST_SAID)
        memcpy(common->words + at, line, length);
}

static void on_signal(int signal) {
    if (!touching)
        _exit(128 + signal);
    siglongjmp(after_signal, 1);
}

/* Pages */

static size_t slot(const struct page *page) {
    return (page - pool) % (page_size / 8);
}

static struct page *new_page(int64_t base) {
    if (pool_used == pool_size)
        errno = ENOSPC, fail("too many pages");
    struct page *page = pool + pool_used++;
    *page = (struct page){.base = base, .told = base};
    return page;
}

/* Copies a page out: by touching it, by process_vm_readv(2), by write(2) into a pipe. 0 if it cannot be had. */
static int copy_page(struct thread *self, unsigned char *at, unsigned way) {
    struct iovec local = {self->got, page_size}, remote = {at, page_size};
    if (way == 1)
        return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)page_size;
    if (way == 2) {
        for (size_t done = 0; done < page_size; done += SMALL) {
            ssize_t written = write(self->pipe[1], at + done, SMALL);
            if (written > 0 && read(self->pipe[0], self->got + done, written) != written)
                fail("pipe");
            if (written != SMALL)
                return 0;
        }
        return 1;
    }
    if (sigsetjmp(after_signal, 1)) {
        touching = 0;
        return 0;
    }
    touching = 1;
    for (size_t word = 0; word < page_size; word += 8)
        *(uint64_t *)(self->got + word) = load((uint64_t *)(at + word));
    touching = 0;
    return 1;
}

/* The first word that is wrong, or -1. */
static long wrong_word(const unsigned char *got, const struct page *page, int64_t base, uint64_t own, int gone) {
    for (size_t word = 0; word < page_size / 8; word++) {
        uint64_t is = *(const uint64_t *)(got + 8 * word), expected = 0;
        if (!gone && own && word == slot(page))
            expected = own;
        else if (!gone && base >= 0)
            expected = *(const uint64_t *)(content + base * page_size + 8 * word);
        if (is != expected)
            return word;
    }
    return -1;
}

static void verify(struct thread *self, struct page *page, const struct page *was, unsigned char *at, unsigned way) {
    add(&common->checked, 1);
    long word = wrong_word(self->got, page, was->base, was->word, 0);
    if (word < 0 || was->base == -2 || (was->loose && wrong_word(self->got, page, -1, 0, 1) < 0))
        return;
    add(&common->wrong, 1);
    say("page %ld at %p: word %ld is %#lx; the page is of %ld with word %#lx, told %ld, loose %lu; way %u\n", page - pool, at,
        word, *(uint64_t *)(self->got + 8 * word), was->base, was->word, was->told, was->loose, way);
}

/* Reads a page, with nobody's leave. */
static void read_page(struct thread *self, struct chunk *chunk, size_t index, unsigned way) {
    uint64_t generation = load(&chunk->generation);
    if (generation & 1 || index >= load(&chunk->count))
        return;
    unsigned char *at = load(&chunk->at) + index * page_size;
    struct page *page = load(&chunk->pages[index]);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (load(&chunk->generation) != generation)
        return;
    struct page was = *page;
    was.state = load(&page->state);
    int had = copy_page(self, at, way);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    add(&common->reads, 1);
    struct page is = *page;
    int changed = load(&page->state) != was.state || was.state & 1 || is.base != was.base || is.word != was.word ||
                  is.loose != was.loose || load(&chunk->generation) != generation;
    if (changed)
        return;
    if (had)
        return verify(self, page, &was, at, way);
    add(&common->failed, 1);
    say("page %ld at %p cannot be had; it is of %ld, told %ld; way %u\n", page - pool, at, was.base, was.told, way);
}

static int share(struct chunk *chunk) {
    int64_t users = load(&chunk->users);
    return users >= 0 && chunk->count && exchange(&chunk->users, users, users + 1);
}

static int begin_change(struct page *page) {
    uint64_t state = load(&page->state);
    return !(state & 1) && exchange(&page->state, state, state + 1);
}

static void end_change(struct page *page) {
    add(&page->state, 1);
}

/* Writes a word of its own to a page. */
static void write_page(struct thread *self, struct chunk *chunk, size_t index, unsigned way) {
    if (!share(chunk))
        return;
    if (index < chunk->count && begin_change(chunk->pages[index])) {
        struct page *page = chunk->pages[index];
        unsigned char *at = chunk->at + index * page_size;
        uint64_t word = draw(&self->random) | 1;
        volatile int done = 0;
        if (way) {
            struct iovec local = {&word, 8}, remote = {at + 8 * slot(page), 8};
            done = process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == 8;
        } else if (!sigsetjmp(after_signal, 1)) {
            touching = 1;
            store((uint64_t *)at + slot(page), word);
            done = 1;
        }
        touching = 0;
        if (!done) {
            add(&common->failed, 1);
            say("page %ld at %p cannot be written; it is of %ld; way %u\n", page - pool, at, page->base, way);
        }
        if (done && page->loose && copy_page(self, at, 0)) {
            /* From now on it stays, as what it was or as zeros. */
            if (page->base != -2 && wrong_word(self->got, page, page->base, word, 0) >= 0)
                page->base = -1;
            page->loose = 0;
        }
        if (done)
            page->word = word;
        add(&common->writes, 1);
        end_change(page);
    }
    add(&chunk->users, -1);
}

enum { DISCARD, FREE, PUNCH };

/* Gives pages back, as far as nobody else changes them. */
static void remove_pages(struct chunk *chunk, size_t first, size_t count, int how) {
    size_t held = 0;
    if (!share(chunk))
        return;
    while (held < count && first + held < chunk->count && begin_change(chunk->pages[first + held]))
        held++;
    unsigned char *at = chunk->at + first * page_size;
    int announced = features & UFFD_FEATURE_EVENT_REMOVE && how != PUNCH;
    if (held) {
        int advice = how == FREE ? MADV_FREE : shared ? MADV_REMOVE : MADV_DONTNEED;
        if (how == PUNCH) {
            off_t offset = (chunk->pages[first] - pool) * page_size;
            if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, held * page_size))
                fail("fallocate");
        } else if (madvise(at, held * page_size, advice))
            fail("madvise");
        add(&common->removed, held);
    }
    for (size_t i = 0; i < held; i++) {
        struct page *page = chunk->pages[first + i];
        if (announced)
            page->told = -1;
        if (how == FREE) {
            page->loose = 1;
        } else {
            page->base = page->base == -2 ? -2 : page->told;
            page->word = page->loose = 0;
            if (announced)
                page->base = -1;
        }
        end_change(page);
    }
    add(&chunk->users, -1);
}

/* The layout. All of this under its lock. */

static int take(struct chunk *chunk) {
    if (!exchange(&chunk->users, 0, -1))
        return 0;
    add(&chunk->generation, 1);
    return 1;
}

static void give(struct chunk *chunk) {
    add(&chunk->generation, 1);
    store(&chunk->users, 0);
}

/* An unused chunk, taken. */
static struct chunk *new_chunk(void) {
    for (size_t i = 0; i < MOST_CHUNKS; i++)
        if (!chunks[i].count && take(chunks + i))
            return chunks + i;
    return NULL;
}

static unsigned char *end_of(const struct chunk *chunk) {
    return chunk->at + chunk->count * page_size;
}

static int overlaps(const struct chunk *chunk, const unsigned char *at, size_t count) {
    return chunk->count && chunk->at < at + count * page_size && at < end_of(chunk);
}

/* What is not memory of a chunk belongs to nobody else. */
static void reserve(unsigned char *at, size_t count, int force) {
    if (at < arena || at >= arena + arena_pages * page_size || !count)
        return;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (force ? MAP_FIXED : MAP_FIXED_NOREPLACE);
    if (mmap(at, count * page_size, PROT_NONE, flags, -1, 0) != at)
        fail("reserving addresses");
}

/* Forgets pages of a chunk that is taken; what is behind them becomes another chunk. */
static void carve(struct chunk *chunk, size_t first, size_t count, struct chunk *spare) {
    size_t behind = chunk->count - first - count;
    if (first && behind) {
        spare->at = chunk->at + (first + count) * page_size;
        memcpy(spare->pages, chunk->pages + first + count, behind * sizeof *spare->pages);
        store(&spare->count, behind);
    } else if (behind) {
        chunk->at += (first + count) * page_size;
        memmove(chunk->pages, chunk->pages + first + count, behind * sizeof *chunk->pages);
    }
    store(&chunk->count, first ? first : behind);
}

/* Takes all chunks that overlap a range; 0 if that cannot be had. */
static int take_all(unsigned char *at, size_t count, const struct chunk *but, struct chunk **taken, size_t *number) {
    *number = 0;
    for (size_t i = 0; i < MOST_CHUNKS; i++) {
        if (chunks + i == but || !overlaps(chunks + i, at, count))
            continue;
        if (!take(chunks + i)) {
            while (*number)
                give(taken[--*number]);
            return 0;
        }
        taken[(*number)++] = chunks + i;
    }
    return 1;
}

static void carve_all(struct chunk **taken, size_t number, unsigned char *at, size_t count) {
    for (size_t i = 0; i < number; i++) {
        struct chunk *one = taken[i], *spare = new_chunk();
        size_t first = at > one->at ? (at - one->at) / page_size : 0;
        size_t end = at + count * page_size < end_of(one) ? (at + count * page_size - one->at) / page_size : one->count;
        carve(one, first, end - first, spare);
        if (spare)
            give(spare);
        give(one);
    }
}

static size_t room_for_chunks(void) {
    size_t room = 0;
    for (size_t i = 0; i < MOST_CHUNKS; i++)
        room += !chunks[i].count;
    return room;
}

static int is_free(unsigned char *at, size_t count) {
    if (at < arena || at + count * page_size > arena + arena_pages * page_size)
        return 0;
    for (size_t i = 0; i < MOST_CHUNKS; i++)
        if (overlaps(chunks + i, at, count))
            return 0;
    return 1;
}

/* Moves pages of a chunk that is taken, so that there are `becomes` of them, `over` what may be there. */
static void move(struct thread *self, struct chunk *chunk, size_t first, size_t count, size_t becomes, int over, int keep) {
    struct chunk *taken[MOST_CHUNKS], *moved = NULL, *spare = NULL;
    size_t number = 0, place = draw(&self->random);
    unsigned char *from = chunk->at + first * page_size, *to = NULL;
    int flags = MREMAP_MAYMOVE | (keep ? MREMAP_DONTUNMAP : 0), anywhere = draw(&self->random) % 8 == 0 && page_size == SMALL;
    for (int attempt = 0; attempt < 8 && !to && !anywhere; attempt++) {
        to = arena + (place + attempt * 37) % (arena_pages - becomes) * page_size;
        if ((to < end_of(chunk) && chunk->at < to + becomes * page_size) || (!over && !is_free(to, becomes)))
            to = NULL;
    }
    if (!to && !anywhere)
        return;
    if (to && !take_all(to, becomes, chunk, taken, &number))
        return;
    moved = new_chunk(), spare = new_chunk();
    unsigned char *is = mremap(from, count * page_size, becomes * page_size, flags | (to ? MREMAP_FIXED : 0), to);
    if (is == MAP_FAILED)
        fail("mremap");
    if (to)
        carve_all(taken, number, to, becomes);
    moved->at = is;
    for (size_t i = 0; i < becomes; i++)
        moved->pages[i] = i < count ? chunk->pages[first + i] : new_page(-1);
    store(&moved->count, becomes);
    if (keep) {
        for (size_t i = 0; i < count; i++)
            chunk->pages[first + i] = new_page(-1);
    } else {
        if (is != from)
            reserve(from, count, 0);
        else if (becomes < count)
            reserve(from + becomes * page_size, count - becomes, 0);
        carve(chunk, first, count, spare);
    }
    if (becomes > count)
        (void)copy_page(self, is + (becomes - 1) * page_size, 0);
    add(&common->moved, becomes);
    give(spare), give(moved);
}

static void grow(struct thread *self, struct chunk *chunk, size_t more) {
    if (chunk->count + more > LONGEST || !is_free(end_of(chunk), more))
        return;
    if (munmap(end_of(chunk), more * page_size))
        fail("munmap");
    if (mremap(chunk->at, chunk->count * page_size, (chunk->count + more) * page_size, 0) != chunk->at)
        fail("mremap, growing");
    for (size_t i = 0; i < more; i++)
        chunk->pages[chunk->count + i] = new_page(-1);
    store(&chunk->count, chunk->count + more);
    (void)copy_page(self, end_of(chunk) - page_size, 0);
    add(&common->moved, more);
}

static void unmap(struct chunk *chunk, size_t first, size_t count, int over) {
    struct chunk *spare = new_chunk();
    unsigned char *at = chunk->at + first * page_size;
    if (!over && munmap(at, count * page_size))
        fail("munmap");
    reserve(at, count, over);
    if (at < arena || at >= arena + arena_pages * page_size)
        munmap(at, count * page_size);
    carve(chunk, first, count, spare);
    add(&common->unmapped, count);
    give(spare);
}

static size_t pages_left(void) {
    size_t left = 0;
    for (size_t i = 0; i < MOST_CHUNKS; i++)
        left += chunks[i].count;
    return left;
}

static void change_layout(struct thread *self) {
    struct chunk *chunk = chunks + draw(&self->random) % MOST_CHUNKS;
    uint64_t kind = draw(&self->random) % 16, drawn = draw(&self->random);
    if (!chunk->count || pthread_mutex_lock(&layout))
        return;
    if (room_for_chunks() > 8 && chunk->count && take(chunk)) {
        size_t first = drawn % chunk->count, left = pages_left(), room = pool_size - pool_used;
        size_t count = 1 + (drawn >> 16) % (chunk->count - first), more = 1 + (drawn >> 32) % 8;
        int remaps = (features & UFFD_FEATURE_EVENT_REMAP) != 0;
        /* Where nobody told that something was unmapped, growth would be taken for that. */
        int grows = remaps && features & UFFD_FEATURE_EVENT_UNMAP && !shared && page_size == SMALL && room > LONGEST;
        int over = left > page_count / 2 && kind & 1;
        if (kind < 4 && remaps)
            move(self, chunk, first, count, count, over, 0);
        else if (kind < 6 && remaps)
            move(self, chunk, 0, chunk->count, chunk->count, over, 0);
        else if (kind < 8 && grows && chunk->count + more <= LONGEST)
            move(self, chunk, 0, chunk->count, chunk->count + more, over, 0);
        else if (kind == 8 && remaps && count > 1 && left > page_count / 2)
            move(self, chunk, first, count, count - 1, over, 0);
        else if (kind < 11 && grows && left < page_count + page_count / 2)
            move(self, chunk, first, count, count, over, 1);
        else if (kind < 13 && grows)
            grow(self, chunk, more);
        else if (left > page_count / 2)
            unmap(chunk, first, count > 4 ? 4 : count, kind & 1);
        give(chunk);
    }
    pthread_mutex_unlock(&layout);
}

/* Children */

static void write_model(const char *path) {
    FILE *out = fopen(path, "w");
    if (!out)
        fail(path);
    fprintf(out, "{\"pid\": %d, \"page_size\": %zu, \"chunks\": [", getpid(), page_size);
    for (size_t i = 0, any = 0; i < MOST_CHUNKS; i++) {
        if (!chunks[i].count)
            continue;
        fprintf(out, "%s{\"at\": %zu, \"pages\": [", any++ ? ", " : "", (size_t)chunks[i].at);
        for (size_t j = 0; j < chunks[i].count; j++) {
            struct page *page = chunks[i].pages[j];
            fprintf(out, "%s[%ld, %ld, %zu, %lu, %lu]", j ? ", " : "", page->base, page->told, slot(page), page->word, page->loose);
        }
        fprintf(out, "]}");
    }
    fprintf(out, "]}\n");
    if (fclose(out))
        fail(path);
}

static void read_everything(struct thread *self, unsigned way) {
    for (size_t i = 0; i < MOST_CHUNKS; i++)
        for (size_t j = 0; j < chunks[i].count; j++)
            read_page(self, chunks + i, j, way);
}

static void operate(struct thread *self);

/* The others' threads are not here any more, nor what they held. */
static void become_child(struct thread *self, uint64_t seed) {
    depth++;
    self->random = seed * 0x9E3779B97F4A7C15u | 1;
    if (pipe2(self->pipe, O_CLOEXEC))
        fail("pipe");
    for (size_t i = 0; i < MOST_CHUNKS; i++) {
        chunks[i].users = 0;
        chunks[i].generation += chunks[i].generation & 1;
    }
    for (size_t i = 0; i < pool_used && !shared; i++)
        if (pool[i].state & 1)
            pool[i].base = -2, pool[i].loose = 0, pool[i].state++;
}

static void live(struct thread *self, uint64_t operations) {
    unsigned way = draw(&self->random) % 3;
    if (operations & 1)
        read_everything(self, way);
    for (uint64_t i = 0; i < operations; i++)
        operate(self);
    read_everything(self, way);
}

static void reap(int flags) {
    for (int status; waitpid(-1, &status, flags) > 0;) {
        add(&common->living, -1);
        if (status && !(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)) {
            add(&common->failed, 1);
            say("a child ended with status %#x\n", status);
        }
    }
}

static void fork_one(struct thread *self) {
    if (!(features & UFFD_FEATURE_EVENT_FORK) || shared || depth == DEEPEST || add(&common->living, 1) >= MOST_LIVING) {
        if (features & UFFD_FEATURE_EVENT_FORK && !shared && depth != DEEPEST)
            add(&common->living, -1);
        return;
    }
    uint64_t seed = draw(&self->random), fate = draw(&self->random) % 8;
    pthread_mutex_lock(&layout);
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (!child) {
        pthread_mutex_init(&layout, NULL);
        become_child(self, seed);
        if (fate == 0)
            execl("/bin/true", "true", NULL);
        live(self, 20 + seed % 60);
        reap(0);
        _exit(0);
    }
    pthread_mutex_unlock(&layout);
    add(&common->forks, 1);
    add(&common->executed, fate == 0);
    if (fate == 1) {
        kill(child, SIGKILL);
        add(&common->killed, 1);
    }
    reap(WNOHANG);
}

/* One thing at random. */
static void operate(struct thread *self) {
    uint64_t drawn = draw(&self->random), kind = draw(&self->random) % 128;
    struct chunk *chunk = chunks + drawn % MOST_CHUNKS;
    for (size_t i = 0; !load(&chunk->count) && i < MOST_CHUNKS; i++)
        chunk = chunks + (drawn + i) % MOST_CHUNKS;
    size_t count = load(&chunk->count), index = (drawn >> 16) % (count ? count : 1);
    if (kind < 56)
        read_page(self, chunk, index, 0);
    else if (kind < 68)
        read_page(self, chunk, index, 1 + (drawn >> 32) % 2);
    else if (kind < 72) /* a stream */
        for (size_t i = index; i < count; i++)
            read_page(self, chunk, i, 0);
    else if (kind < 92)
        write_page(self, chunk, index, kind & 1);
    else if (kind < 108)
        remove_pages(chunk, index, 1 + (drawn >> 32) % 12, kind < 104 || (!shared && page_size != SMALL) ? DISCARD : shared ? PUNCH : FREE);
    else if (kind < 124)
        change_layout(self);
    else if (kind < 125)
        fork_one(self);
    else
        sched_yield();
}

/* Verbs */

static void *storm(void *argument) {
    struct thread *self = argument;
    for (uint64_t i = 0; i < self->operations; i++)
        operate(self);
    return NULL;
}

static void *check(void *argument) {
    read_everything(argument, ((struct thread *)argument)->number % 3);
    return NULL;
}

static void each_thread(size_t count, uint64_t operations, uint64_t seed, void *(*work)(void *)) {
    for (size_t i = 0; i < count; i++) {
        struct thread *self = threads + i;
        self->random = (seed * MOST_THREADS + i + 1) * 0x9E3779B97F4A7C15u;
        self->operations = operations;
        if (pthread_create(&self->id, NULL, work, self))
            fail("pthread_create");
    }
    for (size_t i = 0; i < count; i++)
        pthread_join(threads[i].id, NULL);
    reap(0);
}

static void answer(void) {
    printf("{\"reads\": %ld, \"checked\": %ld, \"writes\": %ld, \"removed\": %ld, \"moved\": %ld, \"unmapped\": %ld, "
           "\"forks\": %ld, \"killed\": %ld, \"executed\": %ld, \"wrong\": %ld, \"failed\": %ld}\n",
           common->reads, common->checked, common->writes, common->removed, common->moved, common->unmapped, common->forks,
           common->killed, common->executed, common->wrong, common->failed);
    fwrite(common->words, 1, common->said < MOST_SAID ? common->said : MOST_SAID, stderr);
    common->said = 0;
}

/* A child that stays, and has one itself. */
static void stay(uint64_t seed, uint64_t operations, const char *path) {
    int ready[2];
    char byte;
    struct thread *self = threads;
    if (pipe2(ready, O_CLOEXEC) || (!depth && pipe2(hold, O_CLOEXEC)))
        fail("pipe");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child) {
        close(ready[1]);
        if (read(ready[0], &byte, 1) != 1)
            errno = ECHILD, fail("a child");
        close(ready[0]);
        if (!depth)
            close(hold[0]);
        return;
    }
    if (!depth)
        close(hold[1]);
    become_child(self, seed);
    for (uint64_t i = 0; i < operations; i++)
        operate(self);
    reap(0);
    if (depth < DEEPEST) {
        char further[4096];
        snprintf(further, sizeof further, "%s.1", path);
        stay(seed + 1, operations, further);
    }
    write_model(path);
    if (write(ready[1], "", 1) != 1 || read(hold[0], &byte, 1) != 0)
        fail("waiting for its end");
    live(self, 10);
    reap(0);
    _exit(0);
}

static void obey(const char *line) {
    uint64_t a = 0, b = 0, c = 0;
    char path[4096];
    if (sscanf(line, "storm %lu %lu %lu", &a, &b, &c) == 3) {
        each_thread(b, a, c, storm);
        answer();
    } else if (!strncmp(line, "check", 5)) {
        each_thread(3, 0, 0, check);
        answer();
    } else if (sscanf(line, "model %4095s", path) == 1) {
        write_model(path);
        printf("{}\n");
    } else if (sscanf(line, "fork %lu %lu %4095s", &a, &b, path) == 3) {
        stay(a, b, path);
        printf("{}\n");
    } else if (!strncmp(line, "release", 7)) {
        close(hold[1]);
        reap(0);
        common->living = 0;
        answer();
    } else {
        errno = EINVAL, fail(line);
    }
    fflush(stdout);
}

/* The beginning */

static void map_memory(size_t regions, size_t file_pages) {
    arena_pages = 3 * file_pages + 4 * LONGEST;
    arena = mmap(NULL, (arena_pages + 1) * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED)
        fail("reserving addresses");
    arena += -(uintptr_t)arena % page_size;
    int flags = (shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) | MAP_NORESERVE | MAP_FIXED;
    unsigned huge = page_size == SMALL ? 0 : MFD_HUGETLB | 21u << 26 /* pages of 2 MiB */;
    if (shared && ((file = memfd_create("memory", MFD_CLOEXEC | huge)) < 0 || ftruncate(file, file_pages * page_size)))
        fail("memfd_create");
    if (page_size != SMALL && !shared)
        flags |= MAP_HUGETLB | 21 << MAP_HUGE_SHIFT;
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        fail("userfaultfd");
    size_t each = file_pages / regions, gap = (arena_pages - file_pages) / (regions + 1);
    if (each > LONGEST || regions > MOST_CHUNKS / 2)
        errno = EINVAL, fail("regions");
    unsigned char *at = arena;
    for (size_t i = 0; i < regions; i++) {
        struct chunk *chunk = chunks + i;
        at += gap * page_size;
        if (mmap(at, each * page_size, PROT_READ | PROT_WRITE, flags, shared ? file : -1, shared ? i * each * page_size : 0) != at)
            fail("mapping a region");
        struct uffdio_register one = {.range = {(uintptr_t)at, each * page_size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
        if (ioctl(uffd, UFFDIO_REGISTER, &one))
            fail("UFFDIO_REGISTER");
        chunk->at = at;
        chunk->count = each;
        for (size_t j = 0; j < each; j++)
            chunk->pages[j] = new_page(pool_used);
        at += each * page_size;
    }
    page_count = regions * each;
}

static void hand_over(const char *path) {
    char text[1 << 16];
    int length = 0;
    for (size_t i = 0; chunks[i].count; i++)
        length += snprintf(text + length, sizeof text - length, "%c{\"base_host_virt_addr\":%zu,\"size\":%zu,\"offset\":%zu,\"page_size\":%zu}",
                           i ? ',' : '[', (size_t)chunks[i].at, chunks[i].count * page_size,
                           (size_t)chunks[i].pages[0]->base * page_size, page_size);
    text[length++] = ']';
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strncpy(name.sun_path, path, sizeof name.sun_path - 1);
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection < 0 || connect(connection, (struct sockaddr *)&name, sizeof name))
        fail(path);
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof uffd)];
    } control = {.head = {CMSG_LEN(sizeof uffd), SOL_SOCKET, SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.head), &uffd, sizeof uffd);
    struct iovec part = {text, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    if (sendmsg(connection, &message, MSG_NOSIGNAL) != length)
        fail("sending to the server");
}

static uint64_t parse_events(const char *text) {
    static const struct { const char *name; uint64_t bit; } names[] = {
        {"fork", UFFD_FEATURE_EVENT_FORK}, {"remap", UFFD_FEATURE_EVENT_REMAP}, {"remove", UFFD_FEATURE_EVENT_REMOVE},
        {"unmap", UFFD_FEATURE_EVENT_UNMAP}, {"thread", UFFD_FEATURE_THREAD_ID}, {"exact", UFFD_FEATURE_EXACT_ADDRESS},
    };
    uint64_t found = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strstr(text, names[i].name))
            found |= names[i].bit;
    return found;
}

static void *shared_memory(size_t bytes, int flag) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flag | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        fail("mmap");
    return at;
}

int main(int argc, char **argv) {
    size_t regions = 16;
    features = parse_events("fork remap remove unmap");
    for (int i = 3; i < argc; i++) {
        char *text = strchr(argv[i], '=');
        if (!text)
            errno = EINVAL, fail(argv[i]);
        *text++ = 0;
        if (!strcmp(argv[i], "page")) page_size = strtoull(text, NULL, 10);
        else if (!strcmp(argv[i], "memory")) shared = !strcmp(text, "shared");
        else if (!strcmp(argv[i], "events")) features = parse_events(text);
        else if (!strcmp(argv[i], "regions")) regions = strtoull(text, NULL, 10);
        else errno = EINVAL, fail(argv[i]);
    }
    struct stat status;
    int memory = argc > 2 ? open(argv[2], O_RDONLY | O_CLOEXEC) : -1;
    if (memory < 0 || fstat(memory, &status))
        fail("events SOCKET MEMORY [NAME=VALUE...]");
    content = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, memory, 0);
    if (content == MAP_FAILED)
        fail(argv[2]);
    size_t file_pages = status.st_size / page_size;
    pool_size = 64 * file_pages + 64 * LONGEST;
    pool = shared_memory(pool_size * sizeof *pool, (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE);
    common = shared_memory(sizeof *common, MAP_SHARED);
    for (size_t i = 0; i < MOST_THREADS; i++) {
        threads[i].number = i;
        threads[i].got = shared_memory(page_size, MAP_PRIVATE | MAP_POPULATE);
        if (pipe2(threads[i].pipe, O_CLOEXEC))
            fail("pipe");
    }
    /* Children of children that are killed are ours. */
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    map_memory(regions, file_pages);
    hand_over(argv[1]);
    printf("ready %zu\n", page_count);
    fflush(stdout);
    char *line = NULL;
    for (size_t room = 0; getline(&line, &room, stdin) > 0;)
        obey(line);
    return 0;
}

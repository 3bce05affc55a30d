/* The ceilings: reads one file with plain system calls from a number of threads, and does nothing else.
 *
 *   raw_read FILE METHOD MEMORY THREADS CHUNK_BYTES [BYTES]
 *     METHOD  direct | buffered | dontcache (buffered, pages dropped behind)
 *     MEMORY  reused (one buffer per thread, touched beforehand)
 *             fresh (memory as it comes: pages of 4 KiB, touched by the read)
 *             fresh-huge (huge pages, populated chunk by chunk before the read)
 *     BYTES   how much of the file, from its start; all of it by default
 *
 * Timed: thread creation, reservation of fresh memory, page faults, reads. Not timed: opening, touching reused buffers.
 * Prints one JSON object.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define READ_DONTCACHE 0x80
#define HUGE_PAGE ((size_t)2 << 20)
#define THREADS_MAX 64

static struct {
    int direct, buffered, flags;
    int reuse, huge;
    size_t size, chunk;
    char *destination;
    char *buffers[THREADS_MAX];
} job;
static _Atomic size_t next_offset;

static void die(const char *what, int error) {
    fprintf(stderr, "%s: %s\n", what, strerror(error));
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static char *reserve(size_t size, int huge) {
    char *memory = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("mmap", errno);
    memory += -(uintptr_t)memory & (HUGE_PAGE - 1);
    madvise(memory, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return memory;
}

/* The last block of a file is shorter than direct I/O reads; asking for whole blocks gives what there is. */
static void read_chunk(char *to, size_t offset, size_t length) {
    size_t done = 0;
    while (done < length) {
        size_t rest = length - done;
        int aligned = job.direct >= 0 && !((offset + done) % 4096);
        struct iovec piece = {to + done, aligned ? (rest + 4095) / 4096 * 4096 : rest};
        ssize_t got = preadv2(aligned ? job.direct : job.buffered, &piece, 1, (off_t)(offset + done), job.flags);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) die("read", got ? errno : EIO);
        done += (size_t)got;
    }
}

static void *work(void *argument) {
    char *own = job.buffers[(intptr_t)argument];
    for (;;) {
        size_t offset = atomic_fetch_add(&next_offset, job.chunk);
        if (offset >= job.size) return NULL;
        size_t length = job.size - offset < job.chunk ? job.size - offset : job.chunk;
        char *to = job.reuse ? own : job.destination + offset;
        if (job.huge && !job.reuse) madvise(to, (length + 4095) / 4096 * 4096, MADV_POPULATE_WRITE);
        read_chunk(to, offset, length);
    }
}

static double run(int threads) {
    pthread_t handles[THREADS_MAX];
    for (int i = 0; job.reuse && i < threads; i++) {
        job.buffers[i] = reserve(job.chunk + 4096, 1);
        memset(job.buffers[i], 1, job.chunk + 4096);
    }
    double start = now();
    if (!job.reuse) job.destination = reserve(job.size + 4096, job.huge);
    for (intptr_t i = 0; i < threads; i++) {
        int error = pthread_create(&handles[i], NULL, work, (void *)i);
        if (error) die("pthread_create", error);
    }
    for (int i = 0; i < threads; i++) pthread_join(handles[i], NULL);
    return now() - start;
}

int main(int count, char **words) {
    if (count < 6) {
        fprintf(stderr, "usage: raw_read FILE METHOD MEMORY THREADS CHUNK_BYTES [BYTES]\n");
        return 2;
    }
    const char *method = words[2], *memory = words[3];
    int threads = atoi(words[4]);
    job.chunk = strtoull(words[5], NULL, 10);
    if (threads < 1 || threads > THREADS_MAX || !job.chunk || job.chunk % 4096) die("threads or chunk", EINVAL);
    job.direct = -1;
    job.buffered = open(words[1], O_RDONLY | O_CLOEXEC);
    if (job.buffered < 0) die(words[1], errno);
    if (!strcmp(method, "direct")) {
        job.direct = open(words[1], O_RDONLY | O_CLOEXEC | O_DIRECT);
        if (job.direct < 0) die("O_DIRECT", errno);
    } else if (!strcmp(method, "dontcache")) {
        job.flags = READ_DONTCACHE;
    } else if (strcmp(method, "buffered")) {
        die(method, EINVAL);
    }
    job.reuse = !strcmp(memory, "reused");
    job.huge = !strcmp(memory, "fresh-huge");
    if (!job.reuse && !job.huge && strcmp(memory, "fresh")) die(memory, EINVAL);
    struct stat status;
    if (fstat(job.buffered, &status)) die("fstat", errno);
    job.size = (size_t)status.st_size;
    if (count > 6 && strtoull(words[6], NULL, 10) < job.size) job.size = strtoull(words[6], NULL, 10);
    double seconds = run(threads);
    printf("{\"method\": \"%s\", \"memory\": \"%s\", \"threads\": %d, \"chunk_bytes\": %zu, \"bytes\": %zu, "
           "\"seconds\": %.6f, \"gigabytes_per_second\": %.6f}\n",
           method, memory, threads, job.chunk, job.size, seconds, (double)job.size / seconds / 1e9);
    return 0;
}

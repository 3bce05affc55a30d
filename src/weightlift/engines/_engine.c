/* weightlift's native engine: moves bytes from files into memory, nothing else.
 *
 * It is given a finished plan, as extents, and a fixed pool of slots. Its threads repeat: claim the next chunk, read it,
 * put it where the plan says, tell. It takes no decision: which path, which place, how many threads and how large a chunk
 * are set from outside, and a chunk's only freedom is to be read through the page cache when direct I/O is refused.
 *
 * Some facts about the locking:
 * - One mutex guards all shared state. It is held for bookkeeping only, never across a system call that reads.
 * - Chunks are claimed in plan order, and a chunk that needs a slot is claimed together with one. So the oldest chunk not
 *   yet finished always has its slot, and a consumer that waits for chunks in order cannot deadlock.
 * - A lane is an extent that one thread reads from end to end, with a descriptor and a slot of its own: read-ahead is
 *   kept per open file, and threads that take turns on one make it guess wrong at half the speed.
 * - Threads block every signal: Ctrl-C belongs to the program's own threads.
 * - Nothing is allocated per chunk. Submitting grows the tables; reading does not.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define PAGE ((uint64_t)4096)
#define HUGE_PAGE ((uint64_t)2 << 20)
#define MAX_WALKERS 15
#define STACK_BYTES ((size_t)256 << 10)

#ifdef __linux__
#define POPULATE_READ 22
#define POPULATE_WRITE 23
#define RWF_DONTCACHE_FLAG 0x80
#define CACHESTAT 451
#endif

enum { PATH_DIRECT, PATH_BUFFERED, PATH_DONTCACHE, PATH_MAPPED, PATH_COUNT };
enum { SINK_DISCARD, SINK_PLACE, SINK_COPY, SINK_HAND_OVER };
enum { FLAG_FRESH = 1, FLAG_DROP_BEHIND = 2, FLAG_LANE = 4 };
enum { EVENT_EXTENT_DONE, EVENT_CHUNK, EVENT_FAILED };
enum { FAILURE_NONE, FAILURE_READ, FAILURE_END_OF_FILE, FAILURE_MEMORY };
enum { TIME_READ_STORAGE, TIME_READ_CACHE, TIME_POPULATE, TIME_COPY, TIME_WAIT_SLOT, TIME_COUNT };

typedef struct {
    uint64_t size;
    uint64_t mapping; /* address of a shared read-only mapping of the whole file, or 0 */
    int32_t fd;
    int32_t direct_fd; /* -1 where direct I/O is not possible */
    uint32_t offset_alignment;
    int32_t refused_errno;         /* out: why direct I/O was refused, 0 if it never was */
    uint64_t bytes[PATH_COUNT];    /* out: bytes read by each path */
    uint64_t refused_bytes;        /* out: bytes that took the buffered way out */
} wl_shard;

typedef struct {
    uint64_t offset, length, address; /* range of the file, and where it goes */
} wl_copy;

typedef struct {
    uint64_t offset, length; /* range of the file */
    uint64_t address;        /* SINK_PLACE: where the byte at `offset` goes */
    const wl_copy *copies;   /* SINK_COPY: where its parts go, by rising offset; the submitter keeps the table alive */
    uint32_t copy_count;
    uint32_t shard;
    uint8_t path, sink, flags, resident;
} wl_extent;

typedef struct {
    uint32_t kind, extent;
    uint32_t slot;
    int32_t error;      /* EVENT_FAILED: errno */
    uint32_t failure;   /* EVENT_FAILED: FAILURE_* */
    uint32_t slot_delta; /* EVENT_CHUNK: where in the slot the chunk begins */
    uint64_t offset, length;
} wl_event;

typedef struct {
    uint64_t claimed_bytes, landed_bytes, reads, fallbacks;
    uint64_t nanoseconds[TIME_COUNT];
    uint32_t workers, running;
} wl_counters;

typedef struct {
    uint32_t shard, busy;
    uint64_t offset, length;
    uint64_t nanoseconds; /* inside the engine: when it began; told: for how long */
} wl_activity;

typedef struct wl_engine wl_engine;

typedef struct {
    wl_engine *engine;
    pthread_t thread;
    uint32_t index;
    wl_activity activity;
    int own_fd; /* of shard `own_shard` - 1, if that is not 0 */
    uint32_t own_shard;
} worker;

struct wl_engine {
    pthread_mutex_t lock;
    pthread_cond_t work, news;

    wl_shard *shards;
    uint32_t shard_count;

    wl_extent *extents;
    uint64_t *remaining; /* bytes of each extent not landed yet */
    uint32_t extent_count, extent_room;

    uint32_t next_extent; /* the claim cursor */
    uint64_t next_offset;

    uint8_t *slots;
    uint64_t slot_bytes;
    uint32_t *free_slots;
    uint32_t free_count, slot_count;

    wl_event *events; /* ring with room for every event that can be outstanding */
    uint64_t event_head, event_tail, event_room;

    worker *workers;
    uint32_t worker_room, started, limit, running;
    uint64_t chunk_bytes;
    int stopping, failed, populate_refused;
    wl_counters counters;
};

typedef struct {
    wl_extent extent;
    uint32_t index;
    uint32_t slot; /* UINT32_MAX: none */
    uint64_t offset, length;
} chunk;

typedef struct {
    int failure, error;
    uint64_t offset;
} outcome;

static const outcome SUCCESS = {FAILURE_NONE, 0, 0};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t align_down(uint64_t value, uint64_t alignment) { return value - value % alignment; }
static uint64_t align_up(uint64_t value, uint64_t alignment) { return align_down(value + alignment - 1, alignment); }

static void *at(uint64_t address) { return (void *)(uintptr_t)address; }

/* ---- reading ------------------------------------------------------------------------------------------------- */

static ssize_t read_once(const wl_shard *shard, int path, void *buffer, size_t length, uint64_t offset) {
#ifdef __linux__
    if (path == PATH_DONTCACHE) {
        struct iovec range = {buffer, length};
        ssize_t got = preadv2(shard->fd, &range, 1, (off_t)offset, RWF_DONTCACHE_FLAG);
        /* The file system or kernel may not know the flag: the pages then stay until they are swept. */
        if (got >= 0 || (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL)) return got;
    }
#else
    (void)path;
#endif
    return pread(shard->fd, buffer, length, (off_t)offset);
}

/* The one place where short reads and EINTR of reads through the page cache are retried. */
static outcome read_cached(const wl_shard *shard, int path, uint8_t *buffer, uint64_t offset, uint64_t length) {
    uint64_t done = 0;
    while (done < length) {
        ssize_t got = read_once(shard, path, buffer + done, length - done, offset + done);
        if (got > 0) done += (uint64_t)got;
        else if (got == 0) return (outcome){FAILURE_END_OF_FILE, 0, offset + done};
        else if (errno != EINTR) return (outcome){FAILURE_READ, errno, offset + done};
    }
    return SUCCESS;
}

static int refuses_direct(int error) { return error == EINVAL || error == EOPNOTSUPP || error == EFAULT || error == ENOTSUP; }

/* Reads whole blocks around the range; the caller guarantees that the memory on both sides may be overwritten.
 * Where the file system refuses, the rest is read through the cache, and `refused` says why. */
static outcome read_direct(const wl_shard *shard, uint8_t *buffer, uint64_t offset, uint64_t length, int *refused,
                           uint64_t *refused_bytes) {
    uint64_t alignment = shard->offset_alignment ? shard->offset_alignment : PAGE;
    uint64_t begin = align_down(offset, alignment), end = align_up(offset + length, alignment), done = begin;
    uint8_t *base = buffer - (offset - begin);
    while (done < offset + length) {
        ssize_t got = pread(shard->direct_fd, base + (done - begin), end - done, (off_t)done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && !refuses_direct(errno)) return (outcome){FAILURE_READ, errno, done};
        if (got == 0) return (outcome){FAILURE_END_OF_FILE, 0, done};
        if (got < 0) *refused = errno;
        else done += (uint64_t)got;
        /* A short read inside the file leaves a position that no further direct read may start at. */
        if (got < 0 || (done < offset + length && done % alignment)) {
            uint64_t from = done > offset ? done : offset;
            *refused_bytes = offset + length - from;
            return read_cached(shard, PATH_BUFFERED, buffer + (from - offset), from, offset + length - from);
        }
    }
    return SUCCESS;
}

/* Populating first turns a file that shrank under its mapping into an error instead of a SIGBUS; a shrink between the
 * two calls is not covered. */
static outcome read_mapped(const wl_shard *shard, uint8_t *buffer, uint64_t offset, uint64_t length) {
    if (offset + length > shard->size) return (outcome){FAILURE_END_OF_FILE, 0, shard->size};
    uint8_t *source = (uint8_t *)at(shard->mapping) + offset;
#ifdef __linux__
    uint8_t *first = (uint8_t *)at(align_down((uint64_t)(uintptr_t)source, PAGE));
    size_t span = (size_t)(source + length - first);
    if (madvise(first, span, POPULATE_READ) != 0 && errno != EINVAL) {
        if (errno == EFAULT) return (outcome){FAILURE_END_OF_FILE, 0, offset};
        return (outcome){FAILURE_READ, errno, offset};
    }
#endif
    memcpy(buffer, source, length);
#ifdef __linux__
    madvise(first, span, MADV_DONTNEED);
#endif
    return SUCCESS;
}

/* ---- one chunk ------------------------------------------------------------------------------------------------ */

/* Fresh memory is populated ahead of the read: the kernel then takes huge pages in one go instead of faulting page by
 * page under the read, which is several times slower for direct I/O and for copies out of the cache. */
static outcome populate(wl_engine *engine, uint64_t address, uint64_t length, uint64_t *spent) {
#ifdef __linux__
    if (__atomic_load_n(&engine->populate_refused, __ATOMIC_RELAXED)) return SUCCESS;
    uint64_t start = now_ns(), first = align_down(address, PAGE);
    int failed = madvise(at(first), align_up(address + length, PAGE) - first, POPULATE_WRITE) ? errno : 0;
    *spent += now_ns() - start;
    if (failed == EINVAL) __atomic_store_n(&engine->populate_refused, 1, __ATOMIC_RELAXED);
    else if (failed == ENOMEM || failed == EFAULT || failed == EHWPOISON) return (outcome){FAILURE_MEMORY, failed, 0};
#else
    (void)engine, (void)address, (void)length, (void)spent;
#endif
    return SUCCESS;
}

static void copy_out(const chunk *c, const uint8_t *data) {
    const wl_copy *copies = c->extent.copies;
    uint32_t low = 0, high = c->extent.copy_count;
    while (low < high) { /* the first copy that ends behind the chunk's beginning */
        uint32_t middle = low + (high - low) / 2;
        if (copies[middle].offset + copies[middle].length <= c->offset) low = middle + 1;
        else high = middle;
    }
    for (; low < c->extent.copy_count && copies[low].offset < c->offset + c->length; low++) {
        const wl_copy *copy = &copies[low];
        uint64_t from = copy->offset > c->offset ? copy->offset : c->offset;
        uint64_t to = copy->offset + copy->length, chunk_end = c->offset + c->length;
        if (to > chunk_end) to = chunk_end;
        memcpy(at(copy->address + (from - copy->offset)), data + (from - c->offset), to - from);
    }
}

typedef struct {
    outcome result;
    int refused;
    uint64_t refused_bytes, delta;
    uint64_t nanoseconds[TIME_COUNT];
} work_done;

static void move(wl_engine *engine, const wl_shard *shard, const chunk *c, work_done *done) {
    int path = c->extent.path;
    uint64_t alignment = shard->offset_alignment ? shard->offset_alignment : PAGE;
    uint8_t *buffer;
    if (c->extent.sink == SINK_PLACE) {
        buffer = at(c->extent.address + (c->offset - c->extent.offset));
        if (c->extent.flags & FLAG_FRESH) {
            done->result = populate(engine, (uint64_t)(uintptr_t)buffer, c->length, &done->nanoseconds[TIME_POPULATE]);
            if (done->result.failure) return;
        }
    } else {
        done->delta = path == PATH_DIRECT ? c->offset % alignment : 0;
        buffer = engine->slots + engine->slot_bytes * c->slot + done->delta;
    }
    uint64_t start = now_ns();
    if (path == PATH_DIRECT)
        done->result = read_direct(shard, buffer, c->offset, c->length, &done->refused, &done->refused_bytes);
    else if (path == PATH_MAPPED) done->result = read_mapped(shard, buffer, c->offset, c->length);
    else done->result = read_cached(shard, path, buffer, c->offset, c->length);
    uint64_t end = now_ns();
    done->nanoseconds[c->extent.resident ? TIME_READ_CACHE : TIME_READ_STORAGE] += end - start;
    if (done->result.failure) return;
#ifdef __linux__
    if (c->extent.flags & FLAG_DROP_BEHIND)
        posix_fadvise(shard->fd, (off_t)align_down(c->offset, PAGE), (off_t)(c->length + c->offset % PAGE),
                      POSIX_FADV_DONTNEED);
#endif
    if (c->extent.sink == SINK_COPY) {
        copy_out(c, buffer);
        done->nanoseconds[TIME_COPY] += now_ns() - end;
    }
}

/* ---- claiming and telling, under the lock --------------------------------------------------------------------- */

static void tell(wl_engine *engine, wl_event event) {
    engine->events[engine->event_tail++ % engine->event_room] = event;
    pthread_cond_signal(&engine->news);
}

static uint64_t chunk_end(const wl_engine *engine, const wl_extent *extent, uint64_t begin) {
    uint64_t limit = extent->offset + extent->length, end = begin + engine->chunk_bytes;
    if (extent->flags & FLAG_LANE) {
        /* The page cache keeps files in units of up to a huge page, which uncached reads must not divide. */
        uint64_t boundary = align_down(end, engine->chunk_bytes >= HUGE_PAGE ? HUGE_PAGE : PAGE);
        if (boundary > begin) end = boundary;
    } else if (extent->sink == SINK_PLACE) {
        /* Boundaries fall on page boundaries of the destination, on huge-page boundaries where chunks are that large. */
        uint64_t step = engine->chunk_bytes >= HUGE_PAGE ? HUGE_PAGE : PAGE;
        uint64_t address = extent->address + (begin - extent->offset);
        uint64_t boundary = align_down(address + engine->chunk_bytes, step);
        if (boundary > address) end = begin + (boundary - address);
    } else if (extent->sink != SINK_HAND_OVER) {
        uint64_t boundary = align_down(end, PAGE);
        if (boundary > begin) end = boundary;
    }
    return end < limit ? end : limit;
}

static void release_slot(wl_engine *engine, uint32_t slot) {
    engine->free_slots[engine->free_count++] = slot;
    /* All, since a signal could go to a thread above the limit, which would go on sleeping. */
    pthread_cond_broadcast(&engine->work);
}

static int claim(wl_engine *engine, chunk *c) {
    if (engine->next_extent == engine->extent_count) return 0;
    const wl_extent *extent = &engine->extents[engine->next_extent];
    int wants_slot = extent->sink != SINK_PLACE;
    if (wants_slot && engine->free_count == 0) return 0;
    c->extent = *extent;
    c->index = engine->next_extent;
    c->slot = wants_slot ? engine->free_slots[--engine->free_count] : UINT32_MAX;
    c->offset = engine->next_offset;
    uint64_t end = chunk_end(engine, extent, c->offset), extent_end = extent->offset + extent->length;
    c->length = end - c->offset;
    engine->next_offset = end;
    if ((end == extent_end || extent->flags & FLAG_LANE) && ++engine->next_extent < engine->extent_count)
        engine->next_offset = engine->extents[engine->next_extent].offset;
    engine->counters.claimed_bytes += c->length;
    return 1;
}

static int ends_extent(const chunk *c) { return c->offset + c->length == c->extent.offset + c->extent.length; }

/* Goes on to the next chunk of the same lane, in the same slot; 0 where there is none or the engine is stopping. */
static int follow_lane(wl_engine *engine, chunk *c) {
    if (!(c->extent.flags & FLAG_LANE) || ends_extent(c)) return 0;
    if (engine->stopping) {
        if (c->slot != UINT32_MAX) release_slot(engine, c->slot);
        return 0;
    }
    c->offset += c->length;
    c->length = chunk_end(engine, &c->extent, c->offset) - c->offset;
    engine->counters.claimed_bytes += c->length;
    return 1;
}

static void fail(wl_engine *engine, const chunk *c, outcome result) {
    if (!engine->failed) {
        engine->failed = 1;
        tell(engine, (wl_event){.kind = EVENT_FAILED, .extent = c->index, .error = result.error,
                                .failure = (uint32_t)result.failure, .offset = result.offset ? result.offset : c->offset,
                                .length = c->length});
    }
    engine->stopping = 1;
    pthread_cond_broadcast(&engine->work);
}

static void finish(wl_engine *engine, const chunk *c, const work_done *done) {
    wl_shard *shard = &engine->shards[c->extent.shard];
    for (int i = 0; i < TIME_COUNT; i++) engine->counters.nanoseconds[i] += done->nanoseconds[i];
    engine->counters.reads++;
    if (done->refused_bytes) {
        engine->counters.fallbacks++;
        shard->refused_bytes += done->refused_bytes;
        if (done->refused) shard->refused_errno = done->refused;
    }
    if (done->result.failure) {
        /* The slot of a lane's chunk goes back where the lane ends, which it now does. */
        if (c->slot != UINT32_MAX && (!(c->extent.flags & FLAG_LANE) || ends_extent(c))) release_slot(engine, c->slot);
        fail(engine, c, done->result);
        return;
    }
    shard->bytes[c->extent.path] += c->length - done->refused_bytes;
    shard->bytes[PATH_BUFFERED] += done->refused_bytes;
    engine->counters.landed_bytes += c->length;
    if (c->extent.sink == SINK_HAND_OVER)
        tell(engine, (wl_event){.kind = EVENT_CHUNK, .extent = c->index, .slot = c->slot, .offset = c->offset,
                                .length = c->length, .slot_delta = (uint32_t)done->delta});
    else if (c->slot != UINT32_MAX && (!(c->extent.flags & FLAG_LANE) || ends_extent(c))) release_slot(engine, c->slot);
    engine->remaining[c->index] -= c->length;
    if (engine->remaining[c->index] == 0) tell(engine, (wl_event){.kind = EVENT_EXTENT_DONE, .extent = c->index});
}

/* ---- threads --------------------------------------------------------------------------------------------------- */

/* A descriptor of this thread's own for a shard, so that its read-ahead is too; the shared one where that fails. */
static int own_descriptor(worker *self, uint32_t shard, int shared) {
#ifdef __linux__
    if (self->own_shard == shard + 1) return self->own_fd;
    if (self->own_shard) close(self->own_fd);
    self->own_shard = 0;
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", shared);
    self->own_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (self->own_fd < 0) return shared;
    self->own_shard = shard + 1;
    return self->own_fd;
#else
    (void)self, (void)shard;
    return shared;
#endif
}

static void *work_loop(void *argument) {
    worker *self = argument;
    wl_engine *engine = self->engine;
    chunk c;
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        if (engine->stopping) break;
        if (self->index >= engine->limit || !claim(engine, &c)) {
            int starved = self->index < engine->limit && engine->next_extent < engine->extent_count;
            uint64_t start = now_ns();
            pthread_cond_wait(&engine->work, &engine->lock);
            if (starved) engine->counters.nanoseconds[TIME_WAIT_SLOT] += now_ns() - start;
            continue;
        }
        wl_shard shard = engine->shards[c.extent.shard];
        do {
            self->activity = (wl_activity){c.extent.shard, 1, c.offset, c.length, now_ns()};
            pthread_mutex_unlock(&engine->lock);

            if (c.extent.flags & FLAG_LANE) shard.fd = own_descriptor(self, c.extent.shard, shard.fd);
            work_done done = {.result = SUCCESS};
            move(engine, &shard, &c, &done);

            pthread_mutex_lock(&engine->lock);
            self->activity.busy = 0;
            finish(engine, &c, &done);
        } while (follow_lane(engine, &c));
    }
    if (self->own_shard) close(self->own_fd);
    engine->running--;
    pthread_cond_broadcast(&engine->news);
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

static int start_workers(wl_engine *engine, uint32_t wanted) {
    sigset_t all, before;
    pthread_attr_t attributes;
    int error = 0;
    if (wanted > engine->worker_room) wanted = engine->worker_room;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (engine->started < wanted && !error) {
        worker *w = &engine->workers[engine->started];
        w->engine = engine;
        w->index = engine->started;
        error = pthread_create(&w->thread, &attributes, work_loop, w);
        if (!error) {
            engine->started++;
            engine->running++;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return engine->started ? 0 : error;
}

static void deadline(struct timespec *t, uint32_t milliseconds) {
#ifdef __linux__
    clock_gettime(CLOCK_MONOTONIC, t);
#else
    clock_gettime(CLOCK_REALTIME, t);
#endif
    t->tv_sec += milliseconds / 1000;
    t->tv_nsec += (long)(milliseconds % 1000) * 1000000;
    if (t->tv_nsec >= 1000000000) {
        t->tv_sec++;
        t->tv_nsec -= 1000000000;
    }
}

/* ---- residency -------------------------------------------------------------------------------------------------- */

typedef struct {
    int fd;
    uint64_t offset, length, step;
    int64_t *pages; /* out, per step: pages cached, or -errno */
    uint64_t next;  /* taken atomically */
} residency_walk;

static void *walk_residency(void *argument) {
    residency_walk *walk = argument;
    uint64_t steps = (walk->length + walk->step - 1) / walk->step, i;
    while ((i = __atomic_fetch_add(&walk->next, 1, __ATOMIC_RELAXED)) < steps) {
#if defined(__linux__) && !defined(__alpha__) && !defined(__mips__)
        uint64_t done = i * walk->step, left = walk->length - done;
        uint64_t range[2] = {walk->offset + done, left < walk->step ? left : walk->step}, counts[5] = {0};
        long failed = syscall(CACHESTAT, walk->fd, range, counts, 0);
        walk->pages[i] = failed ? -errno : (int64_t)counts[0];
#else
        walk->pages[i] = -ENOSYS;
#endif
    }
    return NULL;
}

/* Counts cached pages step by step with several threads: walking a large cached file takes one thread longer than
 * several take to copy a good part of it. */
EXPORT void wl_count_cached(int32_t fd, uint64_t offset, uint64_t length, uint64_t step, int64_t *pages,
                            uint32_t threads) {
    residency_walk walk = {fd, offset, length, step, pages, 0};
    pthread_t helpers[MAX_WALKERS];
    uint32_t started = 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (started + 1 < threads && started < MAX_WALKERS && (started + 1) * step < length &&
           !pthread_create(&helpers[started], NULL, walk_residency, &walk))
        started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    walk_residency(&walk);
    for (uint32_t i = 0; i < started; i++) pthread_join(helpers[i], NULL);
}

/* ---- what Python calls ----------------------------------------------------------------------------------------- */

EXPORT uint32_t wl_abi(void) { return 4; }

EXPORT void wl_free(wl_engine *engine) {
    if (!engine) return;
    free(engine->shards);
    free(engine->extents);
    free(engine->remaining);
    free(engine->free_slots);
    free(engine->events);
    free(engine->workers);
    pthread_cond_destroy(&engine->work);
    pthread_cond_destroy(&engine->news);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

EXPORT wl_engine *wl_new(const wl_shard *shards, uint32_t shard_count, uint64_t slots, uint64_t slot_bytes,
                         uint32_t slot_count, uint32_t worker_room) {
    wl_engine *engine = calloc(1, sizeof *engine);
    pthread_condattr_t attributes;
    if (!engine) return NULL;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_condattr_init(&attributes);
#ifdef __linux__
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    pthread_cond_init(&engine->work, NULL);
    pthread_cond_init(&engine->news, &attributes);
    pthread_condattr_destroy(&attributes);
    engine->shards = calloc(shard_count ? shard_count : 1, sizeof *engine->shards);
    engine->free_slots = calloc(slot_count ? slot_count : 1, sizeof *engine->free_slots);
    engine->workers = calloc(worker_room, sizeof *engine->workers);
    if (!engine->shards || !engine->free_slots || !engine->workers) {
        wl_free(engine);
        return NULL;
    }
    memcpy(engine->shards, shards, shard_count * sizeof *shards);
    engine->shard_count = shard_count;
    engine->slots = at(slots);
    engine->slot_bytes = slot_bytes;
    engine->slot_count = slot_count;
    for (uint32_t i = 0; i < slot_count; i++) engine->free_slots[i] = slot_count - 1 - i;
    engine->free_count = slot_count;
    engine->worker_room = worker_room;
    return engine;
}

static int grow(void **table, uint64_t *room, uint64_t wanted, size_t item) {
    if (wanted <= *room) return 0;
    void *larger = realloc(*table, wanted * item);
    if (!larger) return ENOMEM;
    *table = larger;
    *room = wanted;
    return 0;
}

/* Every extent ends in one event, every slot can carry one chunk, and one failure is told. The ring is only ever
 * enlarged while it is empty of everything but what is copied over here. */
static int grow_events(wl_engine *engine, uint64_t wanted) {
    if (wanted <= engine->event_room) return 0;
    wl_event *larger = calloc(wanted, sizeof *larger);
    if (!larger) return ENOMEM;
    uint64_t count = 0;
    for (uint64_t i = engine->event_head; i < engine->event_tail; i++)
        larger[count++] = engine->events[i % engine->event_room];
    free(engine->events);
    engine->events = larger;
    engine->event_room = wanted;
    engine->event_head = 0;
    engine->event_tail = count;
    return 0;
}

/* Adds extents behind those already there. */
EXPORT int wl_submit(wl_engine *engine, const wl_extent *extents, uint32_t count) {
    pthread_mutex_lock(&engine->lock);
    uint64_t total = (uint64_t)engine->extent_count + count, extent_room = engine->extent_room;
    uint64_t remaining_room = engine->extent_room;
    int error = total > UINT32_MAX ? E2BIG : 0;
    if (!error) error = grow((void **)&engine->extents, &extent_room, total, sizeof *extents);
    if (!error) error = grow((void **)&engine->remaining, &remaining_room, total, sizeof *engine->remaining);
    if (!error) error = grow_events(engine, total + engine->slot_count + 1);
    if (!error) {
        engine->extent_room = (uint32_t)extent_room;
        memcpy(engine->extents + engine->extent_count, extents, count * sizeof *extents);
        if (engine->next_extent == engine->extent_count && count) engine->next_offset = extents[0].offset;
        for (uint32_t i = 0; i < count; i++) engine->remaining[engine->extent_count + i] = extents[i].length;
        engine->extent_count = (uint32_t)total;
        pthread_cond_broadcast(&engine->work);
    }
    pthread_mutex_unlock(&engine->lock);
    return error;
}

/* Sets how many threads may claim and how large a chunk may be; starts threads that are not running yet. */
EXPORT int wl_set_limits(wl_engine *engine, uint32_t workers, uint64_t chunk_bytes) {
    pthread_mutex_lock(&engine->lock);
    engine->chunk_bytes = chunk_bytes;
    engine->limit = workers;
    int error = engine->stopping ? 0 : start_workers(engine, workers);
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    return error;
}

/* Waits up to a time for news and takes up to `room` events; 0 when there were none. */
EXPORT uint32_t wl_poll(wl_engine *engine, wl_event *events, uint32_t room, uint32_t milliseconds) {
    struct timespec until;
    uint32_t count = 0;
    deadline(&until, milliseconds);
    pthread_mutex_lock(&engine->lock);
    while (engine->event_head == engine->event_tail)
        if (pthread_cond_timedwait(&engine->news, &engine->lock, &until)) break;
    while (count < room && engine->event_head < engine->event_tail)
        events[count++] = engine->events[engine->event_head++ % engine->event_room];
    pthread_mutex_unlock(&engine->lock);
    return count;
}

EXPORT void wl_return_slot(wl_engine *engine, uint32_t slot) {
    pthread_mutex_lock(&engine->lock);
    release_slot(engine, slot);
    pthread_mutex_unlock(&engine->lock);
}

EXPORT void wl_read_counters(wl_engine *engine, wl_counters *counters) {
    pthread_mutex_lock(&engine->lock);
    *counters = engine->counters;
    counters->workers = engine->limit < engine->started ? engine->limit : engine->started;
    counters->running = engine->running;
    pthread_mutex_unlock(&engine->lock);
}

EXPORT void wl_read_shard(wl_engine *engine, uint32_t index, wl_shard *shard) {
    pthread_mutex_lock(&engine->lock);
    *shard = engine->shards[index];
    pthread_mutex_unlock(&engine->lock);
}

/* What each thread is reading right now; returns how many are. */
EXPORT uint32_t wl_read_activity(wl_engine *engine, wl_activity *activities, uint32_t room) {
    uint32_t count = 0;
    uint64_t now = now_ns();
    pthread_mutex_lock(&engine->lock);
    for (uint32_t i = 0; i < engine->started && count < room; i++) {
        if (!engine->workers[i].activity.busy) continue;
        activities[count] = engine->workers[i].activity;
        activities[count++].nanoseconds = now - engine->workers[i].activity.nanoseconds;
    }
    pthread_mutex_unlock(&engine->lock);
    return count;
}

/* No chunk is claimed after this returns. */
EXPORT void wl_cancel(wl_engine *engine) {
    pthread_mutex_lock(&engine->lock);
    engine->stopping = 1;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
}

/* Waits up to a time until every thread has left, then collects them; returns how many have not. */
EXPORT uint32_t wl_join(wl_engine *engine, uint32_t milliseconds) {
    struct timespec until;
    deadline(&until, milliseconds);
    pthread_mutex_lock(&engine->lock);
    while (engine->running)
        if (pthread_cond_timedwait(&engine->news, &engine->lock, &until)) break;
    uint32_t left = engine->running, started = engine->started;
    if (!left) engine->started = 0;
    pthread_mutex_unlock(&engine->lock);
    if (!left)
        for (uint32_t i = 0; i < started; i++) pthread_join(engine->workers[i].thread, NULL);
    return left;
}

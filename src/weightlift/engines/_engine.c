/* weightlift's native engine: moves bytes from files into memory of the host or of devices, nothing else.
 *
 * It is given a finished plan, as extents, and a fixed pool of slots. Its threads repeat: claim the next chunk, read it,
 * put it where the plan says, tell. It takes no decision: which path, which place, how many threads and how large a chunk
 * are set from outside, and a chunk's only freedom is to be read through the page cache when direct I/O is refused.
 *
 * Some facts about the locking:
 * - One mutex guards all shared state. It is held for bookkeeping only, never across a system call that reads and never
 *   across a call to a device's runtime, any of which may hang.
 * - A thread within the limit that finds nothing to do sleeps on `work`. All that sleep there wait for the same things,
 *   so what serves one of them wakes one. Threads above the limit sleep on `parked` and are not woken for chunks.
 * - A lane is an extent that one thread reads from end to end, with a descriptor of its own: read-ahead is kept per open
 *   file, and threads that take turns on one make it guess wrong at half the speed.
 * - Threads block every signal: Ctrl-C belongs to the program's own threads.
 * - Nothing is allocated per chunk. Submitting grows the tables; reading does not.
 *
 * Some facts about devices:
 * - Runtimes let one thread in at a time, and a dozen that queue copies of a MiB wait longer for each other than for the
 *   device (measured: 90 microseconds a chunk). So for each device one thread has the turn: a thread that has read a chunk
 *   puts its slot on the list of those to start and takes the turn if it is free, or else leaves the slot to whoever has it
 *   and reads on. With the turn goes the duty to start all on that list, those put there meanwhile too: it queues their
 *   copies, records the slots' events behind them, and moves them to the list of copies under way, the oldest first.
 * - Each device has lists and a turn of its own: a link that is behind holds up no other.
 * - Whoever has the turn asks for the oldest copies, tells that their chunks have landed and frees their slots. A thread
 *   without a free slot, or with nothing left to claim, becomes the one that waits for a device, unless it has one: it asks
 *   again and again for a moment, as being woken takes longer than a copy, and then with pauses until the oldest has
 *   completed, without the turn. No thread leaves while a list has entries, unless another has the turn or waits and so
 *   comes back to it. So every copy under way is being waited for, or will be by a thread that is busy now.
 * - A runtime may hang when a thread's first call comes in the middle of a load (seen with ROCm on gfx1100). So all
 *   threads are started at once, each calls every device, and nothing is claimed before all have done so.
 * - Runtimes keep an error for the thread's next caller; each one is read away.
 *
 * Why a consumer that takes chunks in order, keeping the slots of later ones until then, cannot deadlock:
 * - Chunks are claimed in plan order, and one that needs a slot together with it. So the oldest chunk not yet finished has
 *   its slot, and its read ends without anybody's help.
 * - A copy under way needs nothing more either, and is taken off the list as said above. With it ends its hold of the slot.
 * - A lane always has a slot: the one it fills, or between two chunks the one that its last copy comes out of, which is kept
 *   for it when that copy completes. It gives that one up only with the next slot in hand; if none is free it goes on in
 *   its own as soon as the copy has landed. So even when later chunks hold all other slots, a lane reads on.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
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
#define DEVICE_STACK_BYTES ((size_t)1 << 20) /* room for what a runtime does on it; pages not touched cost nothing */
#define NONE UINT32_MAX
#define COPY_TO_DEVICE 1
#define REGISTER_PORTABLE 1
#define STAGE_BITS 3
#define MILLISECOND ((uint64_t)1000000)
#define ASKING (MILLISECOND / 10) /* for how long a thread asks for copies before it pauses in between */
#define PAUSE_SHORTEST 20000L    /* nanoseconds */
#define PAUSE_LONGEST 160000L
#define LINE_BYTES 4096 /* what a pipe takes in one piece */

#ifdef __linux__
#define POPULATE_READ 22
#define POPULATE_WRITE 23
#define RWF_DONTCACHE_FLAG 0x80
#define CACHESTAT 451
#endif

enum { PATH_DIRECT, PATH_BUFFERED, PATH_DONTCACHE, PATH_MAPPED, PATH_COUNT };
enum { SINK_DISCARD, SINK_PLACE, SINK_COPY, SINK_HAND_OVER, SINK_DEVICE };
enum { FLAG_FRESH = 1, FLAG_DROP_BEHIND = 2, FLAG_LANE = 4 };
enum { EVENT_EXTENT_DONE, EVENT_CHUNK, EVENT_FAILED };
enum { FAILURE_NONE, FAILURE_READ, FAILURE_END_OF_FILE, FAILURE_MEMORY, FAILURE_INTERNAL, FAILURE_DEVICE };
enum { STAGE_READING, STAGE_REGISTERING, STAGE_DEVICE_COPY, STAGE_DEVICE_WAIT };
enum { SLOT_UNTRIED, SLOT_REGISTERED, SLOT_REFUSED };
enum {
    STEP_POPULATE, STEP_REGISTER, STEP_READ, STEP_COPY, STEP_DEVICE_COPY, STEP_DEVICE_WAIT, STEP_SLOT_WAIT, STEP_UNDER_WAY
};
enum {
    TIME_READ_STORAGE, TIME_READ_CACHE, TIME_POPULATE, TIME_COPY, TIME_WAIT_SLOT, TIME_DEVICE, TIME_REGISTER,
    TIME_BUSY, /* while any worker carries out a chunk, however many do; the others are summed over workers */
    TIME_COUNT
};

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
    const wl_copy *copies;   /* SINK_COPY and SINK_DEVICE: where its parts go, by rising offset; kept by the submitter */
    uint64_t ready;          /* SINK_DEVICE: an event that copies wait for, or 0 */
    uint32_t copy_count;
    uint32_t shard;
    uint32_t device; /* SINK_DEVICE: index of its queue */
    uint8_t path, sink, flags, resident;
} wl_extent;

typedef struct {
    uint32_t kind, extent;
    uint32_t slot;
    int32_t error;       /* EVENT_FAILED: errno, or the code of a device's runtime */
    uint32_t failure;    /* EVENT_FAILED: FAILURE_* */
    uint32_t stage;      /* EVENT_FAILED: STAGE_* */
    uint32_t slot_delta; /* EVENT_CHUNK: where in the slot the chunk begins */
    uint64_t offset, length;
} wl_event;

typedef struct {
    uint64_t claimed_bytes, read_bytes, landed_bytes, reads, fallbacks;
    uint64_t nanoseconds[TIME_COUNT];
    uint32_t workers, running;
} wl_counters;

typedef struct {
    uint32_t shard, worker, busy, stage;
    uint64_t offset, length;
    uint64_t nanoseconds; /* for how long in this stage */
} wl_activity;

/* What a thread spent some time on. */
typedef struct {
    uint64_t start, end; /* nanoseconds since tracing began */
    uint64_t offset, length;
    uint32_t shard, slot; /* NONE: none */
    uint32_t worker;
    uint8_t kind, path; /* STEP_*, PATH_* */
} wl_step;

typedef struct {
    int32_t ordinal;
    uint32_t stream_count, event_count;
    const uint64_t *streams, *events; /* copies take turns on the streams; an event per slot */
} wl_queue;

typedef struct {
    int (*set_device)(int ordinal);
    int (*copy)(void *destination, const void *source, size_t bytes, int direction, void *stream);
    int (*record)(void *event, void *stream);
    int (*query)(void *event);
    int (*wait)(void *event);
    int (*stream_wait)(void *stream, void *event, unsigned flags);
    int (*register_memory)(void *address, size_t bytes, unsigned flags);
    int (*last_error)(void);
    int not_ready;
} runtime_calls;

typedef struct wl_engine wl_engine;

typedef struct {
    wl_extent extent;
    uint32_t index;
    uint32_t slot;        /* NONE: none */
    uint64_t submissions; /* how often extents had been submitted when it was claimed */
    uint64_t offset, length;
    int kept; /* its slot stays its lane's when it lands */
} chunk;

typedef struct {
    int failure, error, stage;
    uint64_t offset;
} outcome;

static const outcome SUCCESS = {FAILURE_NONE, 0, STAGE_READING, 0};

static outcome failed_read(int failure, int error, uint64_t offset) {
    return (outcome){failure, error, STAGE_READING, offset};
}

typedef struct {
    outcome result;
    int refused;
    uint64_t refused_bytes, delta;
    uint64_t copies_begun; /* to a device: when */
    uint64_t nanoseconds[TIME_COUNT];
} work_done;

/* What copies out of a slot bring; the event with the slot's number says when they are done. */
typedef struct {
    chunk chunk;
    work_done done;
    uint32_t next; /* on the same list, or NONE */
    int landed;    /* and the slot was kept */
} copy_under_way;

typedef struct {
    uint32_t first, last; /* slots, or NONE */
} slot_list;

typedef struct {
    uint64_t event, submissions;
} waited_for;

typedef struct {
    wl_queue given;
    uint32_t next_stream; /* this and the next: only the thread with the turn changes them */
    waited_for *waited;   /* per stream: what it was last made to wait for */
    slot_list to_start, under_way;
    int turn_taken, waiting; /* a thread calls the runtime; one waits for copies */
} device_queue;

typedef struct {
    wl_engine *engine;
    pthread_t thread;
    uint32_t index;
    wl_activity activity;
    uint64_t stage; /* atomic, as it changes outside the lock: since when, and in the lowest bits STAGE_* */
    int own_fd;     /* of shard `own_shard` - 1, if that is not 0 */
    uint32_t own_shard;
    uint32_t device;    /* index of the queue whose device is this thread's current one, or NONE */
} worker;

typedef struct {
    pthread_t thread;
    pthread_cond_t end;
    int started, ending, fd;
    uint64_t period;
    char *names; /* of the shards, one behind the other, each with its final 0 */
} watchdog;

/* The last steps of all threads. Each takes a place of its own by counting on, so that none needs the lock. */
typedef struct {
    wl_step *steps; /* NULL: nothing is traced */
    uint64_t room, begun;
    uint64_t noted; /* atomic: how many there have been */
} step_ring;

struct wl_engine {
    pthread_mutex_t lock;
    pthread_cond_t work, parked, news;

    wl_shard *shards;
    uint32_t shard_count;

    wl_extent *extents;
    uint64_t *remaining; /* bytes of each extent not landed yet */
    uint32_t extent_count, extent_room;
    uint64_t submissions, submitted_bytes;

    uint32_t next_extent; /* the claim cursor */
    uint64_t next_offset;

    uint8_t *slots;
    uint64_t slot_bytes;
    uint32_t *free_slots;
    uint32_t free_count, slot_count;

    runtime_calls runtime;
    device_queue *queues;
    uint32_t queue_count, first_called; /* the latter: threads that have called every device */
    outcome first_failure;
    uint8_t *slot_states; /* SLOT_*, kept by the caller; NULL where nothing is registered */
    copy_under_way *copies; /* one per slot */

    wl_event *events; /* ring with room for every event that can be outstanding */
    uint64_t event_head, event_tail, event_room;

    worker *workers;
    uint32_t worker_room, started, limit, running;
    uint64_t chunk_bytes;
    uint64_t allowed; /* nothing is claimed once so many bytes have been */
    int stopping, failed, populate_refused;
    wl_counters counters;
    uint32_t busy; /* workers that carry out a chunk */
    uint64_t busy_since;

    step_ring trace;
    watchdog watch;
    uint64_t polled; /* when the caller last asked for news */
    uint32_t polling;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t align_down(uint64_t value, uint64_t alignment) { return value - value % alignment; }
static uint64_t align_up(uint64_t value, uint64_t alignment) { return align_down(value + alignment - 1, alignment); }

static void *at(uint64_t address) { return (void *)(uintptr_t)address; }

static void note(const worker *self, int kind, const chunk *c, int path, uint64_t start, uint64_t end) {
    step_ring *trace = &self->engine->trace;
    if (!trace->steps) return;
    uint64_t place = __atomic_fetch_add(&trace->noted, 1, __ATOMIC_RELAXED) % trace->room;
    trace->steps[place] = (wl_step){
        .start = start - trace->begun, .end = end - trace->begun,
        .offset = c ? c->offset : 0, .length = c ? c->length : 0,
        .shard = c ? c->extent.shard : NONE, .slot = c ? c->slot : NONE,
        .worker = self->index, .kind = (uint8_t)kind, .path = (uint8_t)path,
    };
}

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
        else if (got == 0) return failed_read(FAILURE_END_OF_FILE, 0, offset + done);
        else if (errno != EINTR) return failed_read(FAILURE_READ, errno, offset + done);
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
        if (got < 0 && !refuses_direct(errno)) return failed_read(FAILURE_READ, errno, done);
        if (got == 0) return failed_read(FAILURE_END_OF_FILE, 0, done);
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
    if (offset + length > shard->size) return failed_read(FAILURE_END_OF_FILE, 0, shard->size);
    uint8_t *source = (uint8_t *)at(shard->mapping) + offset;
#ifdef __linux__
    uint8_t *first = (uint8_t *)at(align_down((uint64_t)(uintptr_t)source, PAGE));
    size_t span = (size_t)(source + length - first);
    if (madvise(first, span, POPULATE_READ) != 0 && errno != EINVAL) {
        if (errno == EFAULT) return failed_read(FAILURE_END_OF_FILE, 0, offset);
        return failed_read(FAILURE_READ, errno, offset);
    }
#endif
    memcpy(buffer, source, length);
#ifdef __linux__
    madvise(first, span, MADV_DONTNEED);
#endif
    return SUCCESS;
}

/* ---- memory --------------------------------------------------------------------------------------------------- */

/* Fresh memory is populated ahead of the read: the kernel then takes huge pages in one go instead of faulting page by
 * page under the read, which is several times slower for direct I/O and for copies out of the cache. */
static outcome populate(wl_engine *engine, uint64_t address, uint64_t length, uint64_t *spent) {
#ifdef __linux__
    if (__atomic_load_n(&engine->populate_refused, __ATOMIC_RELAXED)) return SUCCESS;
    uint64_t start = now_ns(), first = align_down(address, PAGE);
    int failed = madvise(at(first), align_up(address + length, PAGE) - first, POPULATE_WRITE) ? errno : 0;
    *spent += now_ns() - start;
    if (failed == EINVAL) __atomic_store_n(&engine->populate_refused, 1, __ATOMIC_RELAXED);
    else if (failed == ENOMEM || failed == EFAULT || failed == EHWPOISON) return failed_read(FAILURE_MEMORY, failed, 0);
#else
    (void)engine, (void)address, (void)length, (void)spent;
#endif
    return SUCCESS;
}

/* Parts of a chunk that follow each other in the file and at their destination. */
typedef struct {
    uint64_t from, length, address;
} run;

/* The first copy that ends behind the chunk's beginning. */
static const wl_copy *first_copy(const chunk *c) {
    const wl_copy *copies = c->extent.copies;
    uint32_t low = 0, high = c->extent.copy_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (copies[middle].offset + copies[middle].length <= c->offset) low = middle + 1;
        else high = middle;
    }
    return copies + low;
}

/* Entries that follow each other in the file and in memory make one run. Not so on devices: they may lie in allocations
 * that happen to be neighbours, and a copy that spans two is refused. */
static int next_run(const chunk *c, const wl_copy **cursor, run *found) {
    const wl_copy *copy = *cursor, *end = c->extent.copies + c->extent.copy_count;
    uint64_t chunk_end = c->offset + c->length;
    if (copy == end || copy->offset >= chunk_end) return 0;
    uint64_t skipped = copy->offset > c->offset ? 0 : c->offset - copy->offset, to = copy->offset + copy->length;
    *found = (run){.from = copy->offset + skipped, .address = copy->address + skipped};
    copy++;
    while (c->extent.sink != SINK_DEVICE && copy < end && to < chunk_end && copy->offset == to
           && copy->address == found->address + (to - found->from))
        to += copy++->length;
    found->length = (to < chunk_end ? to : chunk_end) - found->from;
    *cursor = copy;
    return 1;
}

static void copy_out(const chunk *c, const uint8_t *data) {
    const wl_copy *cursor = first_copy(c);
    run part;
    while (next_run(c, &cursor, &part)) memcpy(at(part.address), data + (part.from - c->offset), part.length);
}

/* ---- devices -------------------------------------------------------------------------------------------------- */

static void set_stage(worker *self, uint64_t stage) {
    __atomic_store_n(&self->stage, now_ns() << STAGE_BITS | stage, __ATOMIC_RELAXED);
}

static int told(const runtime_calls *runtime, int code) {
    if (code) runtime->last_error();
    return code;
}

static outcome device_failure(int code, int stage) { return (outcome){FAILURE_DEVICE, code, stage, 0}; }

static void *slot_event(const wl_engine *engine, const chunk *c) {
    return at(engine->queues[c->extent.device].given.events[c->slot]);
}

/* Waits until the copies before a recorded event have completed, also when the runtime refuses to tell: nobody may free their
 * memory earlier. Returns that refusal, or 0. Asking again and again after a pause is cheaper than sleeping in the runtime:
 * events that wake somebody raise an interrupt each, and the link rests for it between two copies. */
static int settle(const runtime_calls *runtime, void *event) {
    struct timespec pause = {0, PAUSE_SHORTEST};
    int code;
    while ((code = told(runtime, runtime->query(event))) == runtime->not_ready) {
        nanosleep(&pause, NULL);
        if (pause.tv_nsec < PAUSE_LONGEST) pause.tv_nsec *= 2;
    }
    if (code && told(runtime, runtime->wait(event)))
        while (told(runtime, runtime->query(event)) == runtime->not_ready) nanosleep(&pause, NULL);
    return code;
}

static int call_device(worker *self, uint32_t device) {
    const wl_engine *engine = self->engine;
    if (self->device == device) return 0;
    self->device = NONE; /* whatever it is after a failure */
    int code = told(&engine->runtime, engine->runtime.set_device(engine->queues[device].given.ordinal));
    if (!code) self->device = device;
    return code;
}

/* Makes this thread's first calls to every device; see above for why. */
static outcome first_calls(worker *self) {
    const wl_engine *engine = self->engine;
    for (uint32_t i = 0; i < engine->queue_count; i++) {
        int code = call_device(self, i);
        if (code) return device_failure(code, STAGE_DEVICE_COPY);
        if (engine->queues[i].given.event_count == 0) continue;
        code = told(&engine->runtime, engine->runtime.query(at(engine->queues[i].given.events[0])));
        if (code && code != engine->runtime.not_ready) return device_failure(code, STAGE_DEVICE_WAIT);
    }
    return SUCCESS;
}

/* An event's handle may come back with another meaning in a later submission, so that is remembered with it. */
static int wait_until_ready(const worker *self, const chunk *c, uint32_t stream) {
    device_queue *queue = &self->engine->queues[c->extent.device];
    waited_for *last = &queue->waited[stream];
    if (!c->extent.ready || (last->event == c->extent.ready && last->submissions == c->submissions)) return 0;
    const runtime_calls *runtime = &self->engine->runtime;
    int code = told(runtime, runtime->stream_wait(at(queue->given.streams[stream]), at(c->extent.ready), 0));
    if (!code) *last = (waited_for){c->extent.ready, c->submissions};
    return code;
}

/* Records the event behind copies; after a failure, of a copy (`code`) or its own, it waits for those queued before. */
static int record_copies(const runtime_calls *runtime, void *event, void *stream, int code) {
    int refused = told(runtime, runtime->record(event, stream));
    if (!code && !refused) return 0;
    /* Only the event can tell when they are done, so it is worth a second try. */
    if (!refused || !told(runtime, runtime->record(event, stream))) settle(runtime, event);
    return code ? code : refused;
}

/* Queues the copies out of a slot and records its event; 1 if copies are under way, 0 if none was needed or it failed.
 * After a failure, those queued before it have completed, unless the runtime would not even record an event. */
static int start_copies(worker *self, const chunk *c, work_done *done) {
    const wl_engine *engine = self->engine;
    const uint8_t *data = engine->slots + engine->slot_bytes * c->slot + done->delta;
    const runtime_calls *runtime = &engine->runtime;
    device_queue *queue = &engine->queues[c->extent.device];
    uint32_t number = queue->next_stream++ % queue->given.stream_count;
    void *stream = at(queue->given.streams[number]), *event = slot_event(engine, c);
    const wl_copy *cursor = first_copy(c);
    uint64_t start = done->copies_begun = now_ns();
    uint32_t queued = 0;
    run part;
    int code = call_device(self, c->extent.device);
    if (!code) code = wait_until_ready(self, c, number);
    while (!code && next_run(c, &cursor, &part)) {
        const uint8_t *source = data + (part.from - c->offset);
        code = told(runtime, runtime->copy(at(part.address), source, part.length, COPY_TO_DEVICE, stream));
        queued += !code;
    }
    if (queued) code = record_copies(runtime, event, stream, code);
    if (code) done->result = device_failure(code, STAGE_DEVICE_COPY);
    uint64_t end = now_ns();
    done->nanoseconds[TIME_DEVICE] += end - start;
    note(self, STEP_DEVICE_COPY, c, c->extent.path, start, end);
    return queued && !code;
}

/* Slots are populated in large pages first, as destinations are: pinning page by page is slower. */
static outcome register_slot(worker *self, const chunk *c, work_done *done) {
    wl_engine *engine = self->engine;
    uint32_t slot = c->slot;
    uint64_t address = (uint64_t)(uintptr_t)engine->slots + engine->slot_bytes * slot, begun = now_ns();
    set_stage(self, STAGE_REGISTERING);
    outcome result = populate(engine, address, engine->slot_bytes, &done->nanoseconds[TIME_REGISTER]);
    if (result.failure) {
        result.stage = STAGE_REGISTERING;
        return result;
    }
    uint64_t start = now_ns();
    int code = told(&engine->runtime, engine->runtime.register_memory(at(address), engine->slot_bytes, REGISTER_PORTABLE));
    engine->slot_states[slot] = code ? SLOT_REFUSED : SLOT_REGISTERED;
    uint64_t end = now_ns();
    done->nanoseconds[TIME_REGISTER] += end - start;
    note(self, STEP_REGISTER, c, c->extent.path, begun, end);
    return SUCCESS;
}

/* ---- one chunk ------------------------------------------------------------------------------------------------ */

/* Reads a chunk and, unless it is for a device, puts it where it belongs. */
static void move(worker *self, const wl_shard *shard, const chunk *c, work_done *done) {
    wl_engine *engine = self->engine;
    int path = c->extent.path;
    uint64_t alignment = shard->offset_alignment ? shard->offset_alignment : PAGE;
    uint8_t *buffer;
    if (c->extent.sink == SINK_PLACE) {
        buffer = at(c->extent.address + (c->offset - c->extent.offset));
        if (c->extent.flags & FLAG_FRESH) {
            uint64_t begun = now_ns();
            done->result = populate(engine, (uint64_t)(uintptr_t)buffer, c->length, &done->nanoseconds[TIME_POPULATE]);
            if (done->result.failure) return;
            note(self, STEP_POPULATE, c, path, begun, now_ns());
        }
    } else {
        if (engine->slot_states && engine->slot_states[c->slot] == SLOT_UNTRIED) {
            done->result = register_slot(self, c, done);
            if (done->result.failure) return;
            set_stage(self, STAGE_READING);
        }
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
    note(self, STEP_READ, c, done->refused_bytes ? PATH_BUFFERED : path, start, end);
    if (done->result.failure) return;
#ifdef __linux__
    if (c->extent.flags & FLAG_DROP_BEHIND)
        posix_fadvise(shard->fd, (off_t)align_down(c->offset, PAGE), (off_t)(c->length + c->offset % PAGE),
                      POSIX_FADV_DONTNEED);
#endif
    if (c->extent.sink == SINK_COPY) {
        copy_out(c, buffer);
        uint64_t copied = now_ns();
        done->nanoseconds[TIME_COPY] += copied - end;
        note(self, STEP_COPY, c, path, end, copied);
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
    pthread_cond_signal(&engine->work);
}

static void wake_all(wl_engine *engine) {
    pthread_cond_broadcast(&engine->work);
    pthread_cond_broadcast(&engine->parked);
}

static int is_held(const wl_engine *engine) {
    return engine->limit == 0 || engine->counters.claimed_bytes >= engine->allowed;
}

static int can_claim(const wl_engine *engine) {
    if (engine->stopping || is_held(engine) || engine->next_extent == engine->extent_count) return 0;
    if (engine->queue_count && engine->first_called < engine->started) return 0;
    return engine->free_count || engine->extents[engine->next_extent].sink == SINK_PLACE;
}

/* Takes on the next chunk, where can_claim says that there is one. */
static void claim(wl_engine *engine, chunk *c) {
    const wl_extent *extent = &engine->extents[engine->next_extent];
    c->extent = *extent;
    c->index = engine->next_extent;
    c->slot = extent->sink == SINK_PLACE ? NONE : engine->free_slots[--engine->free_count];
    c->submissions = engine->submissions;
    c->kept = 0;
    c->offset = engine->next_offset;
    uint64_t end = chunk_end(engine, extent, c->offset), extent_end = extent->offset + extent->length;
    c->length = end - c->offset;
    engine->next_offset = end;
    if ((end == extent_end || extent->flags & FLAG_LANE) && ++engine->next_extent < engine->extent_count)
        engine->next_offset = engine->extents[engine->next_extent].offset;
    engine->counters.claimed_bytes += c->length;
    /* What follows may need no slot, and so be claimed by one that sleeps for want of one. */
    if (can_claim(engine)) pthread_cond_signal(&engine->work);
}

static int ends_extent(const chunk *c) { return c->offset + c->length == c->extent.offset + c->extent.length; }

/* Whether the chunk's slot is the next one's too. */
static int keeps_slot(const chunk *c) {
    return c->kept || (c->extent.flags & FLAG_LANE && c->extent.sink != SINK_DEVICE && !ends_extent(c));
}

static void fail(wl_engine *engine, const chunk *c, outcome result) {
    if (!engine->failed) {
        engine->failed = 1;
        tell(engine, (wl_event){.kind = EVENT_FAILED, .extent = c->index, .error = result.error,
                                .failure = (uint32_t)result.failure, .stage = (uint32_t)result.stage,
                                .offset = result.offset ? result.offset : c->offset, .length = c->length});
    }
    engine->stopping = 1;
    wake_all(engine);
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
        if (c->slot != NONE && !keeps_slot(c)) release_slot(engine, c->slot);
        fail(engine, c, done->result);
        return;
    }
    shard->bytes[c->extent.path] += c->length - done->refused_bytes;
    shard->bytes[PATH_BUFFERED] += done->refused_bytes;
    engine->counters.landed_bytes += c->length;
    if (c->extent.sink == SINK_HAND_OVER)
        tell(engine, (wl_event){.kind = EVENT_CHUNK, .extent = c->index, .slot = c->slot, .offset = c->offset,
                                .length = c->length, .slot_delta = (uint32_t)done->delta});
    else if (c->slot != NONE && !keeps_slot(c)) release_slot(engine, c->slot);
    engine->remaining[c->index] -= c->length;
    if (engine->remaining[c->index] == 0) tell(engine, (wl_event){.kind = EVENT_EXTENT_DONE, .extent = c->index});
}

static void begin(worker *self, const chunk *c, uint64_t stage) {
    self->activity =
        (wl_activity){.shard = c->extent.shard, .busy = 1, .offset = c->offset, .length = c->length};
    set_stage(self, stage);
}

/* ---- copies to devices, under the lock ------------------------------------------------------------------------- */

static void append(wl_engine *engine, slot_list *list, uint32_t slot) {
    engine->copies[slot].next = NONE;
    if (list->first == NONE) list->first = slot;
    else engine->copies[list->last].next = slot;
    list->last = slot;
}

static uint32_t take_first(const wl_engine *engine, slot_list *list) {
    uint32_t slot = list->first;
    if (slot != NONE) list->first = engine->copies[slot].next;
    return slot;
}

static void put_first(wl_engine *engine, slot_list *list, uint32_t slot) {
    engine->copies[slot].next = list->first;
    if (list->first == NONE) list->last = slot;
    list->first = slot;
}

static void end_copy(wl_engine *engine, uint32_t slot) {
    copy_under_way *copy = &engine->copies[slot];
    copy->landed = copy->chunk.kept;
    finish(engine, &copy->chunk, &copy->done);
    if (copy->landed) pthread_cond_broadcast(&engine->work);
}

static device_queue *queue_of(const wl_engine *engine, uint32_t slot) {
    return &engine->queues[engine->copies[slot].chunk.extent.device];
}

static void start_copy(worker *self, uint32_t slot) {
    wl_engine *engine = self->engine;
    copy_under_way *copy = &engine->copies[slot];
    device_queue *queue = queue_of(engine, slot);
    begin(self, &copy->chunk, STAGE_DEVICE_COPY);
    pthread_mutex_unlock(&engine->lock);
    int copying = start_copies(self, &copy->chunk, &copy->done);
    pthread_mutex_lock(&engine->lock);
    self->activity.busy = 0;
    if (copying) append(engine, &queue->under_way, slot);
    else end_copy(engine, slot);
    if (copying && !queue->waiting) pthread_cond_signal(&engine->work);
}

/* Asks for a copy that was taken off its list, or waits for it, without the lock meanwhile. It has landed then, or failed; 0
 * if it is still under way. */
static int settle_copy(worker *self, uint32_t slot, int patient) {
    wl_engine *engine = self->engine;
    const runtime_calls *runtime = &engine->runtime;
    copy_under_way *copy = &engine->copies[slot];
    void *event = slot_event(engine, &copy->chunk);
    begin(self, &copy->chunk, STAGE_DEVICE_WAIT);
    pthread_mutex_unlock(&engine->lock);
    uint64_t start = now_ns();
    int code = patient ? settle(runtime, event) : told(runtime, runtime->query(event));
    if (!patient && code && code != runtime->not_ready) settle(runtime, event);
    uint64_t end = now_ns();
    copy->done.nanoseconds[TIME_DEVICE] += end - start;
    if (patient) note(self, STEP_DEVICE_WAIT, &copy->chunk, copy->chunk.extent.path, start, end);
    pthread_mutex_lock(&engine->lock);
    self->activity.busy = 0;
    if (!patient && code == runtime->not_ready) return 0;
    note(self, STEP_UNDER_WAY, &copy->chunk, copy->chunk.extent.path, copy->done.copies_begun, end);
    if (code) copy->done.result = device_failure(code, STAGE_DEVICE_WAIT);
    end_copy(engine, slot);
    return 1;
}

/* Takes a device's turn, if it is free, for as long as there are copies to start or the oldest has completed; 1 if any has. */
static int take_turn(worker *self, device_queue *queue) {
    wl_engine *engine = self->engine;
    uint32_t slot;
    int ended = 0;
    if (queue->turn_taken) return 0;
    queue->turn_taken = 1;
    for (;;) {
        if ((slot = take_first(engine, &queue->to_start)) != NONE) start_copy(self, slot);
        else if ((slot = take_first(engine, &queue->under_way)) == NONE) break;
        else if (settle_copy(self, slot, 0)) ended = 1;
        else {
            put_first(engine, &queue->under_way, slot);
            if (queue->to_start.first == NONE) break;
        }
    }
    queue->turn_taken = 0;
    return ended;
}

/* The same for every device with copies under way. */
static int take_turns(worker *self) {
    wl_engine *engine = self->engine;
    int ended = 0;
    for (uint32_t i = 0; i < engine->queue_count; i++)
        if (engine->queues[i].under_way.first != NONE) ended |= take_turn(self, &engine->queues[i]);
    return ended;
}

/* A device with copies under way that nobody waits for, if it is for this thread to wait: threads above the limit leave that to
 * those within, of which there is always one unless the limit is 0. Threads begin the search with different devices. */
static device_queue *to_wait_for(const worker *self) {
    const wl_engine *engine = self->engine;
    if (self->index >= engine->limit && engine->limit && !engine->stopping) return NULL;
    for (uint32_t i = 0; i < engine->queue_count; i++) {
        device_queue *queue = &engine->queues[(self->index + i) % engine->queue_count];
        if (!queue->waiting && queue->under_way.first != NONE) return queue;
    }
    return NULL;
}

/* Whether a thread calls a device's runtime or waits for one, so that slots are the devices' to free. */
static int devices_are_busy(const wl_engine *engine) {
    for (uint32_t i = 0; i < engine->queue_count; i++)
        if (engine->queues[i].waiting || engine->queues[i].turn_taken) return 1;
    return 0;
}

/* Asks whether the oldest copy has completed, until it has or a moment has passed. It stays on its list, and neither the lock
 * nor the turn is held: threads that come back from reading must not queue up behind one that has nothing to do. Another
 * thread may have ended that copy by the time the runtime refuses to answer, so a refusal is told here and at once: the
 * runtime may answer the next time, and nobody would hear of it. */
static void ask_for_a_moment(worker *self, const device_queue *queue) {
    wl_engine *engine = self->engine;
    const chunk oldest = engine->copies[queue->under_way.first].chunk;
    void *event = slot_event(engine, &oldest);
    begin(self, &oldest, STAGE_DEVICE_WAIT);
    pthread_mutex_unlock(&engine->lock);
    uint64_t start = now_ns(), end = start;
    int code;
    while ((code = told(&engine->runtime, engine->runtime.query(event))) == engine->runtime.not_ready && end < start + ASKING)
        end = now_ns();
    pthread_mutex_lock(&engine->lock);
    self->activity.busy = 0;
    engine->counters.nanoseconds[TIME_DEVICE] += end - start;
    if (code && code != engine->runtime.not_ready) fail(engine, &oldest, device_failure(code, STAGE_DEVICE_WAIT));
}

/* Waits until a copy to the device that to_wait_for has named has completed, or to another meanwhile. */
static void await_copy(worker *self, device_queue *queue) {
    wl_engine *engine = self->engine;
    queue->waiting = 1;
    ask_for_a_moment(self, queue);
    if (!take_turns(self)) {
        uint32_t slot = take_first(engine, &queue->under_way);
        if (slot != NONE) settle_copy(self, slot, 1);
    }
    queue->waiting = 0;
    if (queue->under_way.first != NONE && !to_wait_for(self)) pthread_cond_signal(&engine->work);
}

static void queue_copy(worker *self, const chunk *c, const work_done *done) {
    wl_engine *engine = self->engine;
    engine->copies[c->slot] = (copy_under_way){*c, *done, NONE, 0};
    device_queue *queue = queue_of(engine, c->slot);
    append(engine, &queue->to_start, c->slot);
    take_turn(self, queue);
}

/* Sleeps until there may be something to do. Without a slot while copies are under way, it is the device that is waited for. */
static void rest(worker *self, pthread_cond_t *until, int starved) {
    wl_engine *engine = self->engine;
    int what = devices_are_busy(engine) ? TIME_DEVICE : TIME_WAIT_SLOT;
    uint64_t start = now_ns();
    pthread_cond_wait(until, &engine->lock);
    uint64_t end = now_ns();
    if (!starved) return;
    engine->counters.nanoseconds[what] += end - start;
    note(self, STEP_SLOT_WAIT, NULL, 0, start, end);
}

/* A slot for the next chunk of a lane, or NONE if the engine is stopping. `own` is that of its last chunk if it was kept, else
 * NONE. See above for why a lane needs nobody's help here. */
static uint32_t next_slot(worker *self, uint32_t own) {
    wl_engine *engine = self->engine;
    copy_under_way *last = own == NONE ? NULL : &engine->copies[own];
    device_queue *queue;
    while (!engine->stopping && engine->free_count == 0 && !(last && last->landed)) {
        if ((queue = to_wait_for(self))) await_copy(self, queue);
        else rest(self, &engine->work, 1);
    }
    if (last && !last->landed) last->chunk.kept = 0;
    if (last && last->landed && !engine->stopping) return own;
    if (last && last->landed) release_slot(engine, own);
    return engine->stopping ? NONE : engine->free_slots[--engine->free_count];
}

/* Goes on to the next chunk of the same lane; 0 where there is none or the engine is stopping. */
static int follow_lane(worker *self, chunk *c) {
    wl_engine *engine = self->engine;
    if (!(c->extent.flags & FLAG_LANE) || ends_extent(c)) return 0;
    device_queue *queue;
    while (is_held(engine) && !engine->stopping) {
        if ((queue = to_wait_for(self))) await_copy(self, queue);
        else pthread_cond_wait(&engine->parked, &engine->lock);
    }
    if (c->extent.sink == SINK_DEVICE) c->slot = next_slot(self, c->kept ? c->slot : NONE);
    if (engine->stopping) {
        if (c->slot != NONE) release_slot(engine, c->slot);
        return 0;
    }
    c->offset += c->length;
    c->length = chunk_end(engine, &c->extent, c->offset) - c->offset;
    engine->counters.claimed_bytes += c->length;
    return 1;
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

/* Carries out a claimed chunk, and the rest of the lane that it begins. The lock is held before and after. */
static void carry_out(worker *self, chunk *c) {
    wl_engine *engine = self->engine;
    wl_shard shard = engine->shards[c->extent.shard];
    int to_device = c->extent.sink == SINK_DEVICE;
    do {
        begin(self, c, STAGE_READING);
        if (!engine->busy++) engine->busy_since = now_ns();
        pthread_mutex_unlock(&engine->lock);

        if (c->extent.flags & FLAG_LANE) shard.fd = own_descriptor(self, c->extent.shard, shard.fd);
        work_done done = {.result = to_device ? engine->first_failure : SUCCESS};
        if (!done.result.failure) move(self, &shard, c, &done);

        pthread_mutex_lock(&engine->lock);
        self->activity.busy = 0;
        if (!--engine->busy) engine->counters.nanoseconds[TIME_BUSY] += now_ns() - engine->busy_since;
        if (!done.result.failure) engine->counters.read_bytes += c->length;
        c->kept = to_device && c->extent.flags & FLAG_LANE && !done.result.failure && !ends_extent(c);
        if (to_device && !done.result.failure) queue_copy(self, c, &done);
        else finish(engine, c, &done);
    } while (follow_lane(self, c));
}

static void call_devices_first(worker *self) {
    wl_engine *engine = self->engine;
    self->activity = (wl_activity){.busy = 1};
    set_stage(self, STAGE_DEVICE_COPY);
    pthread_mutex_unlock(&engine->lock);
    outcome result = first_calls(self);
    pthread_mutex_lock(&engine->lock);
    self->activity.busy = 0;
    if (result.failure && !engine->first_failure.failure) engine->first_failure = result;
    if (++engine->first_called == engine->started) pthread_cond_broadcast(&engine->work);
}

static void *work_loop(void *argument) {
    worker *self = argument;
    wl_engine *engine = self->engine;
    device_queue *queue;
    chunk c;
    pthread_mutex_lock(&engine->lock);
    if (engine->queue_count) call_devices_first(self);
    for (;;) {
        take_turns(self);
        if (self->index < engine->limit && can_claim(engine)) {
            claim(engine, &c);
            carry_out(self, &c);
        } else if ((queue = to_wait_for(self))) await_copy(self, queue);
        else if (engine->stopping) break;
        else {
            int within = self->index < engine->limit;
            rest(self, within ? &engine->work : &engine->parked,
                 within && !is_held(engine) && engine->next_extent < engine->extent_count);
        }
    }
    if (self->own_shard) close(self->own_fd);
    engine->running--;
    pthread_cond_broadcast(&engine->news);
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

static int start_thread(pthread_t *thread, size_t stack_bytes, void *(*loop)(void *), void *argument) {
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, stack_bytes);
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int error = pthread_create(thread, &attributes, loop, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

static int start_workers(wl_engine *engine, uint32_t wanted) {
    int error = 0;
    if (engine->queue_count && engine->started) return 0;
    if (wanted > engine->worker_room || engine->queue_count) wanted = engine->worker_room;
    while (engine->started < wanted && !error) {
        worker *w = &engine->workers[engine->started];
        w->engine = engine;
        w->index = engine->started;
        w->device = NONE;
        error = start_thread(&w->thread, engine->queue_count ? DEVICE_STACK_BYTES : STACK_BYTES, work_loop, w);
        if (!error) {
            engine->started++;
            engine->running++;
        }
    }
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

/* ---- watching -------------------------------------------------------------------------------------------------- */

static wl_activity activity_of(const worker *w, uint64_t now) {
    wl_activity activity = w->activity;
    uint64_t stage = __atomic_load_n(&w->stage, __ATOMIC_RELAXED), since = stage >> STAGE_BITS;
    activity.worker = w->index;
    activity.stage = (uint32_t)(stage & ((1u << STAGE_BITS) - 1));
    activity.nanoseconds = now > since ? now - since : 0;
    const wl_engine *engine = w->engine;
    if (!activity.length && engine->next_extent < engine->extent_count) {
        /* First calls belong to no chunk; the next one waits for them. */
        activity.shard = engine->extents[engine->next_extent].shard;
        activity.offset = engine->next_offset;
    }
    return activity;
}

typedef struct {
    char text[LINE_BYTES];
    size_t used;
} line;

/* Adds text, or nothing where less than `spare` bytes would be left. */
__attribute__((format(printf, 3, 4))) static int say(line *to, size_t spare, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    size_t room = sizeof to->text - to->used;
    int length = vsnprintf(to->text + to->used, room, format, arguments);
    va_end(arguments);
    if (length < 0 || (size_t)length + spare >= room) return 0;
    to->used += (size_t)length;
    return 1;
}

static const char *name_of(const wl_engine *engine, uint32_t shard) {
    const char *name = engine->watch.names;
    if (shard >= engine->shard_count) return "no file";
    while (shard--) name += strlen(name) + 1;
    return name;
}

static double seconds(uint64_t nanoseconds) { return (double)nanoseconds * 1e-9; }

static uint32_t describe_workers(const wl_engine *engine, uint64_t now, line *to) {
    static const char *const stages[] = {"reading", "pinning memory for", "starting a copy to the device from",
                                         "waiting for the device with"};
    uint32_t busy = 0, said = 0;
    for (uint32_t i = 0; i < engine->started; i++) {
        if (!engine->workers[i].activity.busy) continue;
        wl_activity doing = activity_of(&engine->workers[i], now);
        busy++;
        said += (uint32_t)say(to, 64, "%s worker %u %s %.200s at byte %llu (%llu bytes) for %.1f s", said ? ";" : ":", i,
                              stages[doing.stage],
                              name_of(engine, doing.shard), (unsigned long long)doing.offset, (unsigned long long)doing.length,
                              seconds(doing.nanoseconds));
    }
    if (said < busy) say(to, 1, "; %u more workers are busy", busy - said);
    return busy;
}

/* One line about a load that stands still; 0 if nothing shows that it does. */
static int describe_standstill(const wl_engine *engine, uint64_t now, uint64_t since, line *to) {
    to->used = 0;
    say(to, 0, "weightlift: nothing has landed for %.1f s and %llu bytes are outstanding", seconds(now - since),
        (unsigned long long)(engine->submitted_bytes - engine->counters.landed_bytes));
    int shown = describe_workers(engine, now, to) > 0;
    if (!engine->polling && now - engine->polled >= engine->watch.period) {
        shown = 1;
        say(to, 1, "; the program has not asked for news for %.1f s", seconds(now - engine->polled));
    }
    say(to, 0, "\n");
    return shown;
}

/* Not at all rather than waiting for a reader who has gone to sleep. */
static void write_line(int fd, const line *said) {
    struct pollfd writable = {.fd = fd, .events = POLLOUT};
    if (poll(&writable, 1, 0) == 1 && writable.revents & POLLOUT) {
        ssize_t written = write(fd, said->text, said->used);
        (void)written;
    }
}

static void *watch_loop(void *argument) {
    wl_engine *engine = argument;
    watchdog *watch = &engine->watch;
    uint64_t since = now_ns(), landed = 0, due = watch->period;
    uint32_t tick = (uint32_t)(watch->period / MILLISECOND / 8 + 1);
    line said;
    pthread_mutex_lock(&engine->lock);
    while (!watch->ending) {
        struct timespec until;
        deadline(&until, tick);
        pthread_cond_timedwait(&watch->end, &engine->lock, &until);
        uint64_t now = now_ns();
        if (landed != engine->counters.landed_bytes || landed == engine->submitted_bytes || !engine->running) {
            landed = engine->counters.landed_bytes;
            since = now;
            due = watch->period;
        } else if (now - since >= due && describe_standstill(engine, now, since, &said)) {
            due = 2 * (now - since);
            pthread_mutex_unlock(&engine->lock);
            write_line(watch->fd, &said);
            pthread_mutex_lock(&engine->lock);
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

static void end_watch(wl_engine *engine) {
    if (!engine->watch.started) return;
    pthread_mutex_lock(&engine->lock);
    engine->watch.ending = 1;
    pthread_cond_signal(&engine->watch.end);
    pthread_mutex_unlock(&engine->lock);
    pthread_join(engine->watch.thread, NULL);
    engine->watch.started = 0;
}

/* ---- looking at files before they are read -------------------------------------------------------------------- */

typedef struct {
    int32_t fd;
    uint32_t ahead; /* have the range read ahead, and nothing else */
    uint64_t offset, length;
    uint64_t address; /* memory for one read, or 0: count the cached pages of the range */
    int64_t result;   /* out: bytes read, or pages cached, or 0, or -errno */
} wl_probe_job;

typedef struct {
    wl_probe_job *jobs;
    uint64_t count, next; /* the latter is taken atomically */
} probe_walk;

static int64_t probe_once(const wl_probe_job *job) {
    if (job->ahead) {
#ifdef POSIX_FADV_WILLNEED
        return -posix_fadvise(job->fd, (off_t)job->offset, (off_t)job->length, POSIX_FADV_WILLNEED);
#else
        return -ENOSYS;
#endif
    }
    if (job->address) {
        ssize_t got;
        do got = pread(job->fd, at(job->address), job->length, (off_t)job->offset);
        while (got < 0 && errno == EINTR);
        return got < 0 ? -errno : (int64_t)got;
    }
#if defined(__linux__) && !defined(__alpha__) && !defined(__mips__)
    uint64_t range[2] = {job->offset, job->length}, counts[5] = {0};
    return syscall(CACHESTAT, job->fd, range, counts, 0) ? -errno : (int64_t)counts[0];
#else
    return -ENOSYS;
#endif
}

static void *walk_probes(void *argument) {
    probe_walk *walk = argument;
    uint64_t i;
    while ((i = __atomic_fetch_add(&walk->next, 1, __ATOMIC_RELAXED)) < walk->count)
        walk->jobs[i].result = probe_once(&walk->jobs[i]);
    return NULL;
}

/* Does all that a load wants to know of its files at once: trial reads, and cached pages, range by range. Several threads,
 * since walking a large cached file takes one of them longer than several take to copy a good part of it; one call, since
 * each that waits costs the caller a switch interval beside a busy thread of Python's. */
EXPORT void wl_probe(wl_probe_job *jobs, uint64_t count, uint32_t threads) {
    probe_walk walk = {jobs, count, 0};
    pthread_t helpers[MAX_WALKERS];
    uint32_t started = 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (started + 1 < threads && started < MAX_WALKERS && started + 1 < count &&
           !pthread_create(&helpers[started], NULL, walk_probes, &walk))
        started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    walk_probes(&walk);
    for (uint32_t i = 0; i < started; i++) pthread_join(helpers[i], NULL);
}

/* ---- what Python calls ----------------------------------------------------------------------------------------- */

EXPORT uint32_t wl_abi(void) { return 9; }

EXPORT void wl_free(wl_engine *engine) {
    if (!engine) return;
    end_watch(engine);
    free(engine->shards);
    free(engine->extents);
    free(engine->remaining);
    free(engine->free_slots);
    free(engine->events);
    free(engine->workers);
    free(engine->copies);
    for (uint32_t i = 0; engine->queues && i < engine->queue_count; i++) {
        free(at((uint64_t)(uintptr_t)engine->queues[i].given.streams));
        free(at((uint64_t)(uintptr_t)engine->queues[i].given.events));
        free(engine->queues[i].waited);
    }
    free(engine->queues);
    free(engine->watch.names);
    free(engine->trace.steps);
    pthread_cond_destroy(&engine->work);
    pthread_cond_destroy(&engine->parked);
    pthread_cond_destroy(&engine->news);
    pthread_cond_destroy(&engine->watch.end);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

EXPORT wl_engine *wl_new(const wl_shard *shards, uint32_t shard_count, uint64_t slots, uint64_t slot_bytes,
                         uint32_t slot_count, uint32_t worker_room) {
    wl_engine *engine = calloc(1, sizeof *engine);
    pthread_condattr_t attributes;
    if (!engine) return NULL;
    pthread_mutexattr_t adaptive;
    pthread_mutexattr_init(&adaptive);
#ifdef PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP
    /* It is held for less than going to sleep takes. */
    pthread_mutexattr_settype(&adaptive, PTHREAD_MUTEX_ADAPTIVE_NP);
#endif
    pthread_mutex_init(&engine->lock, &adaptive);
    pthread_mutexattr_destroy(&adaptive);
    pthread_condattr_init(&attributes);
#ifdef __linux__
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    pthread_cond_init(&engine->work, NULL);
    pthread_cond_init(&engine->parked, NULL);
    pthread_cond_init(&engine->news, &attributes);
    pthread_cond_init(&engine->watch.end, &attributes);
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
    engine->polled = now_ns();
    engine->allowed = UINT64_MAX;
    return engine;
}

static uint64_t *duplicate(const uint64_t *numbers, size_t count) {
    uint64_t *copy = malloc((count ? count : 1) * sizeof *copy);
    if (copy) memcpy(copy, numbers, count * sizeof *copy);
    return copy;
}

/* Lets extents name devices; only before the first limits are set.
 *
 * `functions` are the addresses of what runtime_calls lists; `states` says for each slot whether it is registered, and is
 * NULL where none is to be. */
EXPORT int wl_set_devices(wl_engine *engine, const uint64_t *functions, int32_t not_ready, const wl_queue *queues,
                          uint32_t count, uint8_t *states) {
    if (engine->started || engine->queues || !count) return EINVAL;
    for (uint32_t i = 0; i < count; i++)
        if (!queues[i].stream_count || queues[i].event_count < engine->slot_count) return EINVAL;
    engine->runtime = (runtime_calls){
        .set_device = (int (*)(int))(uintptr_t)functions[0],
        .copy = (int (*)(void *, const void *, size_t, int, void *))(uintptr_t)functions[1],
        .record = (int (*)(void *, void *))(uintptr_t)functions[2],
        .query = (int (*)(void *))(uintptr_t)functions[3],
        .wait = (int (*)(void *))(uintptr_t)functions[4],
        .stream_wait = (int (*)(void *, void *, unsigned))(uintptr_t)functions[5],
        .register_memory = (int (*)(void *, size_t, unsigned))(uintptr_t)functions[6],
        .last_error = (int (*)(void))(uintptr_t)functions[7],
        .not_ready = not_ready,
    };
    engine->queues = calloc(count, sizeof *engine->queues);
    engine->copies = calloc(engine->slot_count ? engine->slot_count : 1, sizeof *engine->copies);
    if (!engine->queues || !engine->copies) return ENOMEM;
    engine->queue_count = count; /* what is freed by wl_free from now on */
    engine->slot_states = states;
    for (uint32_t i = 0; i < count; i++) {
        device_queue *queue = &engine->queues[i];
        queue->given = queues[i];
        queue->to_start = queue->under_way = (slot_list){NONE, NONE};
        queue->given.streams = duplicate(queues[i].streams, queues[i].stream_count);
        queue->given.events = duplicate(queues[i].events, queues[i].event_count);
        queue->waited = calloc(queues[i].stream_count, sizeof *queue->waited);
        if (!queue->given.streams || !queue->given.events || !queue->waited) return ENOMEM;
    }
    return 0;
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
    for (uint32_t i = 0; i < count; i++)
        if (extents[i].sink == SINK_DEVICE && extents[i].device >= engine->queue_count) error = EINVAL;
    if (!error) error = grow((void **)&engine->extents, &extent_room, total, sizeof *extents);
    if (!error) error = grow((void **)&engine->remaining, &remaining_room, total, sizeof *engine->remaining);
    if (!error) error = grow_events(engine, total + engine->slot_count + 1);
    if (!error) {
        engine->extent_room = (uint32_t)extent_room;
        memcpy(engine->extents + engine->extent_count, extents, count * sizeof *extents);
        if (engine->next_extent == engine->extent_count && count) engine->next_offset = extents[0].offset;
        for (uint32_t i = 0; i < count; i++) {
            engine->remaining[engine->extent_count + i] = extents[i].length;
            engine->submitted_bytes += extents[i].length;
        }
        engine->extent_count = (uint32_t)total;
        engine->submissions++;
        pthread_cond_broadcast(&engine->work);
    }
    pthread_mutex_unlock(&engine->lock);
    return error;
}

/* Sets how many threads may claim and how large a chunk may be; starts threads that are not running yet, with devices all
 * there is room for at once. */
EXPORT int wl_set_limits(wl_engine *engine, uint32_t workers, uint64_t chunk_bytes) {
    pthread_mutex_lock(&engine->lock);
    engine->chunk_bytes = chunk_bytes;
    engine->limit = workers;
    int error = engine->stopping ? 0 : start_workers(engine, workers);
    wake_all(engine);
    pthread_mutex_unlock(&engine->lock);
    return error;
}

/* Waits up to a time for news and takes up to `room` events; 0 when there were none. */
EXPORT uint32_t wl_poll(wl_engine *engine, wl_event *events, uint32_t room, uint32_t milliseconds) {
    struct timespec until;
    uint32_t count = 0;
    deadline(&until, milliseconds);
    pthread_mutex_lock(&engine->lock);
    engine->polling++;
    while (engine->event_head == engine->event_tail)
        if (pthread_cond_timedwait(&engine->news, &engine->lock, &until)) break;
    engine->polling--;
    engine->polled = now_ns();
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
    if (engine->busy) counters->nanoseconds[TIME_BUSY] += now_ns() - engine->busy_since;
    counters->workers = engine->limit < engine->started ? engine->limit : engine->started;
    counters->running = engine->running;
    pthread_mutex_unlock(&engine->lock);
}

EXPORT void wl_read_shard(wl_engine *engine, uint32_t index, wl_shard *shard) {
    pthread_mutex_lock(&engine->lock);
    *shard = engine->shards[index];
    pthread_mutex_unlock(&engine->lock);
}

/* Nothing is claimed, and no lane goes on, once so many bytes have been claimed in all. */
EXPORT void wl_allow(wl_engine *engine, uint64_t bytes) {
    pthread_mutex_lock(&engine->lock);
    int held = is_held(engine);
    engine->allowed = bytes;
    if (held) wake_all(engine);
    pthread_mutex_unlock(&engine->lock);
}

/* Gives the memory of free slots that are not registered back to the system; they are filled anew when next used. */
EXPORT void wl_trim(wl_engine *engine) {
#ifdef __linux__
    pthread_mutex_lock(&engine->lock);
    for (uint32_t i = 0; i < engine->free_count; i++) {
        uint32_t slot = engine->free_slots[i];
        if (!engine->slot_states || engine->slot_states[slot] != SLOT_REGISTERED)
            madvise(engine->slots + engine->slot_bytes * slot, engine->slot_bytes, MADV_DONTNEED);
    }
    pthread_mutex_unlock(&engine->lock);
#else
    (void)engine;
#endif
}

/* From now on keeps the last `room` steps of all threads; only once, and before the first limits are set. */
EXPORT int wl_trace(wl_engine *engine, uint64_t room) {
    if (engine->started || engine->trace.steps || !room) return EINVAL;
    engine->trace.steps = calloc(room, sizeof *engine->trace.steps);
    if (!engine->trace.steps) return ENOMEM;
    engine->trace.room = room;
    engine->trace.begun = now_ns();
    return 0;
}

/* Copies the steps kept, the oldest first, and returns how many there have been; once every thread has left. */
EXPORT uint64_t wl_read_steps(const wl_engine *engine, wl_step *steps, uint64_t room) {
    const step_ring *trace = &engine->trace;
    uint64_t first = trace->noted > trace->room ? trace->noted - trace->room : 0;
    for (uint64_t i = first; i < trace->noted && i - first < room; i++) steps[i - first] = trace->steps[i % trace->room];
    return trace->noted;
}

/* What each thread is doing right now; returns how many are. */
EXPORT uint32_t wl_read_activity(wl_engine *engine, wl_activity *activities, uint32_t room) {
    uint32_t count = 0;
    uint64_t now = now_ns();
    pthread_mutex_lock(&engine->lock);
    for (uint32_t i = 0; i < engine->started && count < room; i++)
        if (engine->workers[i].activity.busy) activities[count++] = activity_of(&engine->workers[i], now);
    pthread_mutex_unlock(&engine->lock);
    return count;
}

/* Starts a thread that writes a line to `fd` when nothing has landed for a time, and again after each doubling of it. Only
 * once; `names` holds a name per shard, each with its final 0, in `bytes` bytes altogether. */
EXPORT int wl_watch(wl_engine *engine, uint32_t milliseconds, int32_t fd, const char *names, uint64_t bytes) {
    watchdog *watch = &engine->watch;
    if (watch->names || !milliseconds) return EINVAL;
    /* A copy, since a thread that hangs may outlive the interpreter. */
    watch->names = malloc(bytes ? bytes : 1);
    if (!watch->names) return ENOMEM;
    memcpy(watch->names, names, bytes);
    watch->fd = fd;
    watch->period = milliseconds * MILLISECOND;
    int error = start_thread(&watch->thread, STACK_BYTES, watch_loop, engine);
    watch->started = !error;
    return error;
}

/* No chunk is claimed after this returns. */
EXPORT void wl_cancel(wl_engine *engine) {
    pthread_mutex_lock(&engine->lock);
    engine->stopping = 1;
    wake_all(engine);
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
    if (left) return left;
    for (uint32_t i = 0; i < started; i++) pthread_join(engine->workers[i].thread, NULL);
    end_watch(engine);
    return 0;
}

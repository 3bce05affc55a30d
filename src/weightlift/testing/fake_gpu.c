/* A GPU runtime without a GPU: the functions of CUDA's and HIP's runtimes that weightlift calls, under both names.
 *
 * Devices are tables, device memory is host memory, and work is really asynchronous: every stream is a queue, and a
 * thread of its own carries them out later, choosing at random (from a seed) which stream goes on next. A copy reads its
 * source when it is carried out and not when it is queued, so memory reused too early shows as wrong bytes. Streams
 * begin behind nothing but their own queue and the events they were told to wait for; the default stream waits for no
 * other.
 *
 * The functions called fake_gpu_... are the controls; weightlift/testing/fake_gpu.py documents them. Everything is
 * guarded by one lock, and every change is announced on one condition. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    DEVICES_MAX = 16,
    JOURNAL_MAX = 65536,
    COPY_HOST_TO_DEVICE = 1,
    STREAM_FLAGS = 1,
    EVENT_FLAGS = 7,
    REGISTER_FLAGS = 15,
    BUS_ID_BYTES = 13,
    NANOSECONDS_PER_SECOND = 1000000000,
};

/* Error codes; the two runtimes number them alike. */
#define ERRORS(X) \
    X(0, SUCCESS, "cudaSuccess", "hipSuccess", "no error") \
    X(1, INVALID_VALUE, "cudaErrorInvalidValue", "hipErrorInvalidValue", "invalid argument") \
    X(2, OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "hipErrorOutOfMemory", "out of memory") \
    X(3, NOT_INITIALIZED, "cudaErrorInitializationError", "hipErrorNotInitialized", "initialization error") \
    X(21, INVALID_DIRECTION, "cudaErrorInvalidMemcpyDirection", "hipErrorInvalidMemcpyDirection", \
      "invalid copy direction for memcpy") \
    X(100, NO_DEVICE, "cudaErrorNoDevice", "hipErrorNoDevice", "no device is detected") \
    X(101, INVALID_DEVICE, "cudaErrorInvalidDevice", "hipErrorInvalidDevice", "invalid device ordinal") \
    X(400, INVALID_HANDLE, "cudaErrorInvalidResourceHandle", "hipErrorInvalidHandle", "invalid resource handle") \
    X(600, NOT_READY, "cudaErrorNotReady", "hipErrorNotReady", "device not ready") \
    X(700, ILLEGAL_ADDRESS, "cudaErrorIllegalAddress", "hipErrorIllegalAddress", "an illegal memory access") \
    X(712, ALREADY_REGISTERED, "cudaErrorHostMemoryAlreadyRegistered", "hipErrorHostMemoryAlreadyRegistered", \
      "part or all of the memory range is already registered") \
    X(713, NOT_REGISTERED, "cudaErrorHostMemoryNotRegistered", "hipErrorHostMemoryNotRegistered", \
      "the pointer is not that of a registered memory range")

#define ERROR_NUMBER(number, label, cuda, hip, text) label = number,
enum error_code { ERRORS(ERROR_NUMBER) };

#define ERROR_ENTRY(number, label, cuda, hip, text) {number, cuda, hip, text},
static const struct {
    int code;
    const char *cuda, *hip, *text;
} errors[] = {ERRORS(ERROR_ENTRY)};

#define FUNCTIONS(X) \
    X(GetDeviceCount) X(GetDevice) X(SetDevice) X(DeviceGetPCIBusId) X(MemGetInfo) X(RuntimeGetVersion) \
    X(StreamCreateWithFlags) X(StreamDestroy) X(StreamSynchronize) X(StreamWaitEvent) \
    X(EventCreateWithFlags) X(EventDestroy) X(EventRecord) X(EventQuery) X(EventSynchronize) \
    X(MemcpyAsync) X(HostRegister) X(HostUnregister) X(GetLastError) X(PeekAtLastError)

#define FUNCTION_NUMBER(name) F_##name,
enum function { FUNCTIONS(FUNCTION_NUMBER) FUNCTION_COUNT };

#define FUNCTION_NAME(name) #name,
static const char *const function_names[] = {FUNCTIONS(FUNCTION_NAME)};

/* What the tests have asked of one function, and what they may ask about it. */
struct behaviour {
    uint64_t calls, locked_calls; /* the latter with Python's interpreter lock held */
    uint64_t successes_left, failures_left;
    int code;
    bool hanging;
    uint32_t stuck;
};

struct event {
    struct event *next;
    uint64_t handle, recorded, done; /* how often it was recorded, and which of these has happened */
    int device;
    unsigned flags;
    uint32_t references;
    bool destroyed;
};

enum work { COPY, FILL, RECORD, WAIT };

struct operation {
    struct operation *next;
    enum work work;
    unsigned char value;
    bool registered;
    unsigned char *destination;
    const unsigned char *source;
    size_t bytes;
    struct event *event;
    uint64_t version;
};

struct stream {
    struct stream *next;
    uint64_t handle, queued, finished;
    struct operation *head, *tail;
    int device;
    unsigned flags;
    bool held, destroyed;
};

/* A range of host memory: registered, or posing as memory of a device. */
struct range {
    struct range *next;
    uintptr_t start;
    size_t bytes;
    int device;
    unsigned flags;
    bool owned;
};

struct device {
    struct stream *default_stream;
    uint64_t copied_bytes, allocated_bytes;
};

struct journal_entry {
    uint64_t device, stream, bytes;
};

struct counters {
    uint64_t streams, events, registrations, allocations, queued_operations;
    uint64_t registered_bytes, registered_bytes_peak;
    uint64_t copies, unregistered_copies, stray_copies, journal_entries;
};

struct thread {
    uint64_t session;
    int device, last_error;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_t executor;
static bool executor_running, stopping, discarding, paused, session_open, session_implied, strict;
static uint32_t waiting; /* threads that wait in here, the executor aside */
static uint64_t session = 1, next_handle, random_state;
static uint64_t delay_least, delay_most; /* nanoseconds before each copy */
static uint64_t memory_bytes;
static int device_count;
static struct device devices[DEVICES_MAX];
static struct stream *streams;
static struct event *events;
static struct range *registrations, *allocations;
static const struct operation *under_way;
static const struct stream *under_way_on;
static struct behaviour behaviours[FUNCTION_COUNT];
static struct counters counters;
static struct journal_entry journal[JOURNAL_MAX];
static _Thread_local struct thread thread_state;
static pthread_once_t interpreter_once = PTHREAD_ONCE_INIT;
static int (*interpreter_lock_held)(void);

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes);
    if (memory == NULL) abort();
    return memory;
}

static uint64_t random_below(uint64_t limit) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % limit;
}

static void find_interpreter(void) {
    void *found = dlsym(RTLD_DEFAULT, "PyGILState_Check");
    memcpy(&interpreter_lock_held, &found, sizeof found);
}

static struct thread *this_thread(void) {
    if (thread_state.session != session) thread_state = (struct thread){.session = session};
    return &thread_state;
}

static void stop_waiting(void) {
    waiting--;
    if (waiting == 0 && discarding) pthread_cond_broadcast(&changed); /* fake_gpu_close waits for it */
}

static void wait_for_change(void) {
    waiting++;
    pthread_cond_wait(&changed, &lock);
    stop_waiting();
}

/* --- ranges of memory --- */

static struct range *range_around(struct range *list, uintptr_t start, size_t bytes) {
    for (struct range *range = list; range != NULL; range = range->next)
        if (start >= range->start && bytes <= range->bytes && start - range->start <= range->bytes - bytes) return range;
    return NULL;
}

static bool overlaps(const struct range *list, uintptr_t start, size_t bytes) {
    for (const struct range *range = list; range != NULL; range = range->next)
        if (start < range->start + range->bytes && range->start < start + bytes) return true;
    return false;
}

static void add_range(struct range **list, struct range range) {
    struct range *added = allocate(sizeof *added);
    *added = range;
    added->next = *list;
    *list = added;
}

static bool take_range(struct range **list, uintptr_t start, struct range *taken) {
    for (struct range **link = list; *link != NULL; link = &(*link)->next) {
        struct range *range = *link;
        if (range->start != start) continue;
        *taken = *range;
        *link = range->next;
        free(range);
        return true;
    }
    return false;
}

static bool is_device_memory(int device, const void *address, size_t bytes) {
    const struct range *range = range_around(allocations, (uintptr_t)address, bytes);
    return range != NULL && range->device == device;
}

/* --- streams, events and the thread that carries work out --- */

static struct stream *find_stream(uint64_t handle) {
    if (handle == 0) return devices[this_thread()->device].default_stream;
    for (struct stream *stream = streams; stream != NULL; stream = stream->next)
        if (stream->handle == handle && !stream->destroyed) return stream;
    return NULL;
}

static struct event *find_event(uint64_t handle) {
    for (struct event *event = events; event != NULL; event = event->next)
        if (event->handle == handle && !event->destroyed) return event;
    return NULL;
}

static struct stream *add_stream(uint64_t handle, int device, unsigned flags) {
    struct stream *stream = allocate(sizeof *stream);
    *stream = (struct stream){.next = streams, .handle = handle, .device = device, .flags = flags};
    return streams = stream;
}

static void bury_stream(const struct stream *stream) {
    if (!stream->destroyed || stream->head != NULL) return;
    struct stream **link = &streams;
    while (*link != stream) link = &(*link)->next;
    struct stream *dead = *link;
    *link = dead->next;
    free(dead);
}

static void release_event(const struct event *event) {
    if (!event->destroyed || event->references != 0) return;
    struct event **link = &events;
    while (*link != event) link = &(*link)->next;
    struct event *dead = *link;
    *link = dead->next;
    free(dead);
}

static bool can_go_on(const struct stream *stream) {
    const struct operation *head = stream->head;
    if (head == NULL || (stream->held && !discarding) || (paused && !discarding)) return false;
    return head->work != WAIT || head->event->done >= head->version;
}

static struct stream *choose_stream(void) {
    uint64_t count = 0;
    for (struct stream *stream = streams; stream != NULL; stream = stream->next) count += can_go_on(stream);
    if (count == 0) return NULL;
    uint64_t chosen = random_below(count);
    for (struct stream *stream = streams; stream != NULL; stream = stream->next)
        if (can_go_on(stream) && chosen-- == 0) return stream;
    return NULL;
}

static bool moves_bytes(const struct operation *operation) { return operation->work == COPY || operation->work == FILL; }

static bool is_settled(void) {
    if (under_way != NULL) return false;
    for (const struct stream *stream = streams; stream != NULL; stream = stream->next)
        if (can_go_on(stream)) return false;
    return true;
}

/* Memory that is gone by now would be overwritten on a real device too; here it is counted and left alone. */
static bool is_stray(const struct stream *stream, const struct operation *operation) {
    bool source_gone = operation->registered
        && range_around(registrations, (uintptr_t)operation->source, operation->bytes) == NULL;
    bool destination_gone = strict && !is_device_memory(stream->device, operation->destination, operation->bytes);
    return source_gone || destination_gone;
}

static void delay_work(void) {
    uint64_t delay = delay_least + random_below(delay_most - delay_least + 1);
    pthread_mutex_unlock(&lock);
    struct timespec pause_time = {(time_t)(delay / NANOSECONDS_PER_SECOND), (long)(delay % NANOSECONDS_PER_SECOND)};
    nanosleep(&pause_time, NULL);
    pthread_mutex_lock(&lock);
}

static void move_bytes(struct stream *stream, const struct operation *operation) {
    if (!discarding && delay_most != 0) delay_work();
    if (discarding) return;
    if (is_stray(stream, operation)) {
        counters.stray_copies++;
        return;
    }
    pthread_mutex_unlock(&lock);
    if (operation->work == COPY) memcpy(operation->destination, operation->source, operation->bytes);
    else memset(operation->destination, operation->value, operation->bytes);
    pthread_mutex_lock(&lock);
    if (operation->work == COPY) devices[stream->device].copied_bytes += operation->bytes;
    if (counters.journal_entries < JOURNAL_MAX)
        journal[counters.journal_entries++] =
            (struct journal_entry){(uint64_t)stream->device, stream->handle, operation->bytes};
}

static void carry_out(struct stream *stream) {
    struct operation *operation = stream->head;
    under_way = operation;
    under_way_on = stream;
    if (moves_bytes(operation)) move_bytes(stream, operation);
    if (operation->work == RECORD && operation->event->done < operation->version)
        operation->event->done = operation->version;
    under_way = NULL;
    under_way_on = NULL;
    stream->head = operation->next;
    if (stream->head == NULL) stream->tail = NULL;
    stream->finished++;
    if (moves_bytes(operation)) counters.queued_operations--;
    if (operation->event != NULL) {
        operation->event->references--;
        release_event(operation->event);
    }
    free(operation);
    bury_stream(stream);
    pthread_cond_broadcast(&changed);
}

static void *execute(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        struct stream *stream = choose_stream();
        if (stream != NULL) carry_out(stream);
        else if (stopping) break;
        else pthread_cond_wait(&changed, &lock);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void start_executor(void) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals belong to the program's own threads */
    if (pthread_create(&executor, NULL, execute, NULL) != 0) abort();
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    executor_running = true;
}

static void queue(struct stream *stream, struct operation wanted) {
    struct operation *operation = allocate(sizeof *operation);
    *operation = wanted;
    if (operation->event != NULL) operation->event->references++;
    if (stream->tail != NULL) stream->tail->next = operation;
    else stream->head = operation;
    stream->tail = operation;
    stream->queued++;
    if (moves_bytes(operation)) counters.queued_operations++;
    if (!executor_running) start_executor();
    pthread_cond_broadcast(&changed);
}

/* --- sessions --- */

static void open_session(int count, uint64_t seed, uint64_t bytes_per_device) {
    device_count = count;
    random_state = seed * 2654435769u + 88172645463325252u;
    if (random_state == 0) random_state = 1;
    memory_bytes = bytes_per_device;
    for (int device = 0; device < count; device++) devices[device].default_stream = add_stream(0, device, 0);
    session_open = true;
}

static void ensure_session(void) {
    if (session_open) return;
    open_session(2, 0, (uint64_t)16 << 30);
    session_implied = true;
}

static void free_ranges(struct range **list) {
    while (*list != NULL) {
        struct range *range = *list;
        *list = range->next;
        if (range->owned) free((void *)range->start);
        free(range);
    }
}

static void forget_everything(void) {
    free_ranges(&registrations);
    free_ranges(&allocations);
    while (streams != NULL) {
        struct stream *stream = streams;
        streams = stream->next;
        free(stream);
    }
    while (events != NULL) {
        struct event *event = events;
        events = event->next;
        free(event);
    }
    memset(behaviours, 0, sizeof behaviours);
    memset(&counters, 0, sizeof counters);
    memset(devices, 0, sizeof devices);
    delay_least = delay_most = 0;
    session_open = session_implied = executor_running = stopping = discarding = paused = strict = false;
    session++; /* forgets what threads have stored */
}

/* --- entering and leaving a function of the runtime --- */

static int fail_on_demand(struct behaviour *behaviour) {
    if (behaviour->failures_left == 0) return SUCCESS;
    if (behaviour->successes_left > 0) {
        behaviour->successes_left--;
        return SUCCESS;
    }
    if (behaviour->failures_left != UINT64_MAX) behaviour->failures_left--;
    return behaviour->code;
}

static int enter(enum function function) {
    pthread_once(&interpreter_once, find_interpreter);
    bool locked = interpreter_lock_held != NULL && interpreter_lock_held() != 0;
    pthread_mutex_lock(&lock);
    ensure_session();
    struct behaviour *behaviour = &behaviours[function];
    behaviour->calls++;
    if (locked) behaviour->locked_calls++;
    pthread_cond_broadcast(&changed);
    behaviour->stuck++;
    while (behaviour->hanging) wait_for_change();
    behaviour->stuck--;
    if (device_count == 0 && function != F_RuntimeGetVersion) return NO_DEVICE;
    return fail_on_demand(behaviour);
}

static int leave(int code) {
    if (code != SUCCESS) this_thread()->last_error = code;
    pthread_mutex_unlock(&lock);
    return code;
}

/* --- the functions of the runtimes --- */

static int get_device_count(int *count) {
    int code = enter(F_GetDeviceCount);
    *count = device_count;
    return leave(code);
}

static int get_device(int *device) {
    int code = enter(F_GetDevice);
    if (code == SUCCESS) *device = this_thread()->device;
    return leave(code);
}

static int set_device(int device) {
    int code = enter(F_SetDevice);
    if (code == SUCCESS && (device < 0 || device >= device_count)) code = INVALID_DEVICE;
    if (code == SUCCESS) this_thread()->device = device;
    return leave(code);
}

static int device_get_pci_bus_id(char *text, int room, int device) {
    int code = enter(F_DeviceGetPCIBusId);
    if (code == SUCCESS && (device < 0 || device >= device_count)) code = INVALID_DEVICE;
    if (code == SUCCESS && room < BUS_ID_BYTES) code = INVALID_VALUE;
    if (code == SUCCESS) snprintf(text, (size_t)room, "0000:%02X:00.0", (unsigned)(0xA0 + device));
    return leave(code);
}

static int mem_get_info(size_t *available, size_t *total) {
    int code = enter(F_MemGetInfo);
    if (code == SUCCESS) {
        *total = memory_bytes;
        *available = memory_bytes - devices[this_thread()->device].allocated_bytes;
    }
    return leave(code);
}

static int runtime_get_version(int *found, int version) {
    int code = enter(F_RuntimeGetVersion);
    if (code == SUCCESS) *found = version;
    return leave(code);
}

static int stream_create(void **handle, unsigned flags) {
    int code = enter(F_StreamCreateWithFlags);
    if (code == SUCCESS && (flags & ~(unsigned)STREAM_FLAGS) != 0) code = INVALID_VALUE;
    if (code == SUCCESS) {
        next_handle += 16;
        add_stream(next_handle, this_thread()->device, flags);
        counters.streams++;
        *handle = (void *)(uintptr_t)next_handle;
    }
    return leave(code);
}

static int stream_destroy(void *handle) {
    int code = enter(F_StreamDestroy);
    struct stream *stream = find_stream((uintptr_t)handle);
    if (code == SUCCESS && (stream == NULL || handle == NULL)) code = INVALID_HANDLE;
    if (code == SUCCESS) {
        stream->destroyed = true; /* what is queued is still carried out */
        counters.streams--;
        bury_stream(stream);
    }
    return leave(code);
}

static int stream_synchronize(void *handle) {
    int code = enter(F_StreamSynchronize);
    struct stream *stream = find_stream((uintptr_t)handle);
    if (code == SUCCESS && stream == NULL) code = INVALID_HANDLE;
    if (code == SUCCESS) {
        uint64_t target = stream->queued;
        while (stream != NULL && stream->finished < target) {
            wait_for_change();
            stream = find_stream((uintptr_t)handle);
        }
    }
    return leave(code);
}

static int stream_wait_event(void *stream_handle, void *event_handle, unsigned flags) {
    int code = enter(F_StreamWaitEvent);
    struct stream *stream = find_stream((uintptr_t)stream_handle);
    struct event *event = find_event((uintptr_t)event_handle);
    if (code == SUCCESS && (stream == NULL || event == NULL)) code = INVALID_HANDLE;
    if (code == SUCCESS && flags != 0) code = INVALID_VALUE;
    if (code == SUCCESS) queue(stream, (struct operation){.work = WAIT, .event = event, .version = event->recorded});
    return leave(code);
}

static int event_create(void **handle, unsigned flags) {
    int code = enter(F_EventCreateWithFlags);
    if (code == SUCCESS && (flags & ~(unsigned)EVENT_FLAGS) != 0) code = INVALID_VALUE;
    if (code == SUCCESS) {
        struct event *event = allocate(sizeof *event);
        next_handle += 16;
        *event = (struct event){
            .next = events, .handle = next_handle, .device = this_thread()->device, .flags = flags};
        events = event;
        counters.events++;
        *handle = (void *)(uintptr_t)next_handle;
    }
    return leave(code);
}

static int event_destroy(void *handle) {
    int code = enter(F_EventDestroy);
    struct event *event = find_event((uintptr_t)handle);
    if (code == SUCCESS && event == NULL) code = INVALID_HANDLE;
    if (code == SUCCESS) {
        event->destroyed = true;
        counters.events--;
        release_event(event);
    }
    return leave(code);
}

static int event_record(void *event_handle, void *stream_handle) {
    int code = enter(F_EventRecord);
    struct stream *stream = find_stream((uintptr_t)stream_handle);
    struct event *event = find_event((uintptr_t)event_handle);
    if (code == SUCCESS && (stream == NULL || event == NULL || stream->device != event->device)) code = INVALID_HANDLE;
    if (code == SUCCESS) queue(stream, (struct operation){.work = RECORD, .event = event, .version = ++event->recorded});
    return leave(code);
}

static int event_query(void *handle) {
    int code = enter(F_EventQuery);
    const struct event *event = find_event((uintptr_t)handle);
    if (code == SUCCESS && event == NULL) code = INVALID_HANDLE;
    if (code == SUCCESS && event->done < event->recorded) code = NOT_READY;
    return leave(code);
}

static int event_synchronize(void *handle) {
    int code = enter(F_EventSynchronize);
    struct event *event = find_event((uintptr_t)handle);
    if (code == SUCCESS && event == NULL) code = INVALID_HANDLE;
    if (code == SUCCESS) {
        uint64_t target = event->recorded;
        event->references++;
        while (event->done < target) wait_for_change();
        event->references--;
        release_event(event);
    }
    return leave(code);
}

static int memcpy_async(void *destination, const void *source, size_t bytes, int direction, void *handle) {
    int code = enter(F_MemcpyAsync);
    struct stream *stream = find_stream((uintptr_t)handle);
    if (code == SUCCESS && stream == NULL) code = INVALID_HANDLE;
    if (code == SUCCESS && direction != COPY_HOST_TO_DEVICE) code = INVALID_DIRECTION;
    if (code == SUCCESS && bytes == 0) return leave(SUCCESS);
    if (code == SUCCESS && (destination == NULL || source == NULL)) code = INVALID_VALUE;
    if (code == SUCCESS && strict && !is_device_memory(stream->device, destination, bytes)) code = INVALID_VALUE;
    if (code == SUCCESS) {
        bool registered = range_around(registrations, (uintptr_t)source, bytes) != NULL;
        counters.copies++;
        counters.unregistered_copies += !registered;
        queue(stream, (struct operation){.work = COPY, .destination = destination, .source = source,
                                         .bytes = bytes, .registered = registered});
    }
    return leave(code);
}

static int host_register(void *address, size_t bytes, unsigned flags) {
    int code = enter(F_HostRegister);
    if (code == SUCCESS && (address == NULL || bytes == 0 || (flags & ~(unsigned)REGISTER_FLAGS) != 0))
        code = INVALID_VALUE;
    if (code == SUCCESS && overlaps(registrations, (uintptr_t)address, bytes)) code = ALREADY_REGISTERED;
    if (code == SUCCESS) {
        add_range(&registrations, (struct range){.start = (uintptr_t)address, .bytes = bytes, .flags = flags});
        counters.registrations++;
        counters.registered_bytes += bytes;
        if (counters.registered_bytes > counters.registered_bytes_peak)
            counters.registered_bytes_peak = counters.registered_bytes;
    }
    return leave(code);
}

static int host_unregister(void *address) {
    int code = enter(F_HostUnregister);
    struct range taken;
    if (code == SUCCESS && !take_range(&registrations, (uintptr_t)address, &taken)) code = NOT_REGISTERED;
    if (code == SUCCESS) {
        counters.registrations--;
        counters.registered_bytes -= taken.bytes;
        while (under_way != NULL && (uintptr_t)under_way->source - taken.start < taken.bytes) wait_for_change();
    }
    return leave(code);
}

static int last_error(enum function function, bool forget) {
    (void)enter(function);
    int code = this_thread()->last_error;
    if (forget) this_thread()->last_error = SUCCESS;
    pthread_mutex_unlock(&lock);
    return code;
}

enum naming { CUDA_NAME, HIP_NAME, TEXT };

static const char *describe(int code, enum naming naming) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code)
            return naming == CUDA_NAME ? errors[i].cuda : naming == HIP_NAME ? errors[i].hip : errors[i].text;
    return "unrecognized error code";
}

#define BOTH(name, inner, parameters, arguments) \
    EXPORT int cuda##name parameters { return inner arguments; } \
    EXPORT int hip##name parameters { return inner arguments; }

BOTH(GetDeviceCount, get_device_count, (int *count), (count))
BOTH(GetDevice, get_device, (int *device), (device))
BOTH(SetDevice, set_device, (int device), (device))
BOTH(DeviceGetPCIBusId, device_get_pci_bus_id, (char *text, int room, int device), (text, room, device))
BOTH(MemGetInfo, mem_get_info, (size_t *available, size_t *total), (available, total))
BOTH(StreamCreateWithFlags, stream_create, (void **stream, unsigned flags), (stream, flags))
BOTH(StreamDestroy, stream_destroy, (void *stream), (stream))
BOTH(StreamSynchronize, stream_synchronize, (void *stream), (stream))
BOTH(StreamWaitEvent, stream_wait_event, (void *stream, void *event, unsigned flags), (stream, event, flags))
BOTH(EventCreateWithFlags, event_create, (void **event, unsigned flags), (event, flags))
BOTH(EventDestroy, event_destroy, (void *event), (event))
BOTH(EventRecord, event_record, (void *event, void *stream), (event, stream))
BOTH(EventSynchronize, event_synchronize, (void *event), (event))
BOTH(EventQuery, event_query, (void *event), (event))
BOTH(MemcpyAsync, memcpy_async, (void *destination, const void *source, size_t bytes, int direction, void *stream),
     (destination, source, bytes, direction, stream))
BOTH(HostRegister, host_register, (void *address, size_t bytes, unsigned flags), (address, bytes, flags))
BOTH(HostUnregister, host_unregister, (void *address), (address))
BOTH(GetLastError, last_error, (void), (F_GetLastError, true))
BOTH(PeekAtLastError, last_error, (void), (F_PeekAtLastError, false))

EXPORT int cudaRuntimeGetVersion(int *version) { return runtime_get_version(version, 12040); }
EXPORT int hipRuntimeGetVersion(int *version) { return runtime_get_version(version, 60241134); }
EXPORT const char *cudaGetErrorName(int code) { return describe(code, CUDA_NAME); }
EXPORT const char *hipGetErrorName(int code) { return describe(code, HIP_NAME); }
EXPORT const char *cudaGetErrorString(int code) { return describe(code, TEXT); }
EXPORT const char *hipGetErrorString(int code) { return describe(code, TEXT); }

/* --- controls --- */

EXPORT void fake_gpu_close(void) {
    pthread_mutex_lock(&lock);
    discarding = true;
    for (int function = 0; function < FUNCTION_COUNT; function++) behaviours[function].hanging = false;
    pthread_cond_broadcast(&changed);
    while (waiting != 0) pthread_cond_wait(&changed, &lock);
    stopping = true;
    pthread_cond_broadcast(&changed);
    bool join = executor_running;
    pthread_mutex_unlock(&lock);
    if (join) pthread_join(executor, NULL);
    pthread_mutex_lock(&lock);
    forget_everything();
    pthread_mutex_unlock(&lock);
}

/* 1 if a session is open already, or the values make no sense. */
EXPORT int fake_gpu_open(int count, uint64_t seed, uint64_t bytes_per_device, uint64_t least, uint64_t most, int check) {
    pthread_mutex_lock(&lock);
    bool implied = session_implied;
    pthread_mutex_unlock(&lock);
    if (implied) fake_gpu_close();
    pthread_mutex_lock(&lock);
    bool possible = !session_open && count >= 0 && count <= DEVICES_MAX && least <= most && most < UINT64_MAX;
    if (possible) {
        open_session(count, seed, bytes_per_device);
        delay_least = least;
        delay_most = most;
        strict = check != 0;
    }
    pthread_mutex_unlock(&lock);
    return !possible;
}

/* The number that the other controls know a function by, -1 for one that is not there. */
EXPORT int fake_gpu_function(const char *name) {
    for (int function = 0; function < FUNCTION_COUNT; function++)
        if (strcmp(function_names[function], name) == 0) return function;
    return -1;
}

EXPORT void fake_gpu_fail(int function, uint64_t successes, uint64_t failures, int code) {
    pthread_mutex_lock(&lock);
    behaviours[function].successes_left = successes;
    behaviours[function].failures_left = failures;
    behaviours[function].code = code;
    pthread_mutex_unlock(&lock);
}

EXPORT void fake_gpu_hang(int function, int hanging) {
    pthread_mutex_lock(&lock);
    behaviours[function].hanging = hanging != 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

EXPORT uint64_t fake_gpu_calls(int function, int locked) {
    pthread_mutex_lock(&lock);
    uint64_t calls = locked ? behaviours[function].locked_calls : behaviours[function].calls;
    pthread_mutex_unlock(&lock);
    return calls;
}

/* Wait until a function was called that often and so many threads hang in it: 0, or 1 if the time was not enough. */
EXPORT int fake_gpu_wait_for_calls(int function, uint64_t calls, uint32_t stuck, uint64_t seconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += (time_t)seconds;
    pthread_mutex_lock(&lock);
    const struct behaviour *behaviour = &behaviours[function];
    int error = 0;
    waiting++;
    while ((behaviour->calls < calls || behaviour->stuck < stuck) && error == 0)
        error = pthread_cond_timedwait(&changed, &lock, &until);
    stop_waiting();
    pthread_mutex_unlock(&lock);
    return error != 0;
}

EXPORT int fake_gpu_sees_interpreter(void) {
    pthread_once(&interpreter_once, find_interpreter);
    return interpreter_lock_held != NULL;
}

EXPORT void fake_gpu_pause(int on) {
    pthread_mutex_lock(&lock);
    paused = on != 0;
    pthread_cond_broadcast(&changed);
    while (paused && under_way != NULL) wait_for_change();
    pthread_mutex_unlock(&lock);
}

EXPORT int fake_gpu_hold(void *handle, int on) {
    pthread_mutex_lock(&lock);
    ensure_session();
    struct stream *stream = find_stream((uintptr_t)handle);
    if (stream != NULL) stream->held = on != 0;
    pthread_cond_broadcast(&changed);
    while (stream != NULL && on != 0 && under_way_on == stream) wait_for_change();
    pthread_mutex_unlock(&lock);
    return stream == NULL;
}

EXPORT void fake_gpu_settle(void) {
    pthread_mutex_lock(&lock);
    while (!is_settled()) wait_for_change();
    pthread_mutex_unlock(&lock);
}

EXPORT int fake_gpu_fill(void *handle, void *address, int value, size_t bytes) {
    pthread_mutex_lock(&lock);
    ensure_session();
    struct stream *stream = find_stream((uintptr_t)handle);
    int code = stream == NULL ? INVALID_HANDLE : SUCCESS;
    if (code == SUCCESS && strict && !is_device_memory(stream->device, address, bytes)) code = INVALID_VALUE;
    if (code == SUCCESS)
        queue(stream, (struct operation){
                          .work = FILL, .destination = address, .bytes = bytes, .value = (unsigned char)value});
    pthread_mutex_unlock(&lock);
    return code;
}

static int adopt(int device, void *address, size_t bytes, bool owned) {
    ensure_session();
    if (device < 0 || device >= device_count) return INVALID_DEVICE;
    if (bytes > memory_bytes - devices[device].allocated_bytes) return OUT_OF_MEMORY;
    if (address == NULL || overlaps(allocations, (uintptr_t)address, bytes)) return INVALID_VALUE;
    add_range(&allocations,
              (struct range){.start = (uintptr_t)address, .bytes = bytes, .device = device, .owned = owned});
    devices[device].allocated_bytes += bytes;
    counters.allocations++;
    return SUCCESS;
}

EXPORT int fake_gpu_adopt(int device, void *address, size_t bytes) {
    pthread_mutex_lock(&lock);
    int code = adopt(device, address, bytes, false);
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT int fake_gpu_allocate(int device, size_t bytes, int value, void **address) {
    void *memory = malloc(bytes != 0 ? bytes : 1);
    if (memory == NULL) return OUT_OF_MEMORY;
    memset(memory, value, bytes);
    pthread_mutex_lock(&lock);
    int code = adopt(device, memory, bytes, true);
    pthread_mutex_unlock(&lock);
    if (code == SUCCESS) *address = memory;
    else free(memory);
    return code;
}

/* Give back what was allocated or adopted, once no copy into it is being carried out. */
EXPORT int fake_gpu_free(void *address) {
    struct range taken = {.owned = false};
    pthread_mutex_lock(&lock);
    bool found = take_range(&allocations, (uintptr_t)address, &taken);
    if (found) {
        devices[taken.device].allocated_bytes -= taken.bytes;
        counters.allocations--;
    }
    while (found && under_way != NULL && (uintptr_t)under_way->destination - taken.start < taken.bytes)
        wait_for_change();
    pthread_mutex_unlock(&lock);
    if (taken.owned) free(address);
    return found ? SUCCESS : INVALID_VALUE;
}

EXPORT void fake_gpu_read_counters(struct counters *found) {
    pthread_mutex_lock(&lock);
    *found = counters;
    pthread_mutex_unlock(&lock);
}

EXPORT uint64_t fake_gpu_copied_bytes(int device) {
    pthread_mutex_lock(&lock);
    uint64_t bytes = device >= 0 && device < DEVICES_MAX ? devices[device].copied_bytes : 0;
    pthread_mutex_unlock(&lock);
    return bytes;
}

EXPORT void fake_gpu_read_journal(struct journal_entry *found, uint64_t room) {
    pthread_mutex_lock(&lock);
    uint64_t count = counters.journal_entries < room ? counters.journal_entries : room;
    memcpy(found, journal, (size_t)count * sizeof *found);
    pthread_mutex_unlock(&lock);
}

/* The flags that a stream, an event or a registration was made with, -1 if there is none of that handle or address. */
EXPORT int fake_gpu_flags(void *handle) {
    pthread_mutex_lock(&lock);
    const struct stream *stream = handle != NULL ? find_stream((uintptr_t)handle) : NULL;
    const struct event *event = find_event((uintptr_t)handle);
    const struct range *range = range_around(registrations, (uintptr_t)handle, 1);
    int flags = stream != NULL ? (int)stream->flags : event != NULL ? (int)event->flags
        : range != NULL ? (int)range->flags : -1;
    pthread_mutex_unlock(&lock);
    return flags;
}

/* A CUDA driver without a GPU: one device that lies in host memory, for as much of the driver's API as cuda-core and
 * admtrt use. tests/cuda_stub.py builds and steers it.
 *
 * What it keeps of a real driver, by NVIDIA's public documentation of the driver API:
 *   - the host cannot read the device's memory (it faults), memory is poisoned before its first use and after its last,
 *     addresses are never used twice, and memory of a pool exists in the order of its stream alone;
 *   - work is done as late as the API allows (LAZY), at once (EAGER), or whenever a seed says so (RANDOM); so are the
 *     branches of a graph;
 *   - what a capture forbids fails and invalidates it; streams that were not joined again fail it;
 *   - after an illegal access nothing works any more.
 *
 * Whatever the order, each piece of work knows what it is ordered behind (a vector clock: so many pieces of each
 * stream). Two pieces that touch one block of memory, one of them writing, without an order are a misuse; so are
 * page-locked memory that is freed before the host has waited for its use, and handles that were given back. The
 * tests fail for every misuse.
 *
 * Functions that are not here do not exist for cuGetProcAddress. CUDA's runtime (libcudart) does not start on it.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))
#define API PUBLIC CUresult CUDAAPI

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static void unlock(int *unused) { (void)unused; pthread_mutex_unlock(&lock); }
#define LOCKED pthread_mutex_lock(&lock); int held_ __attribute__((cleanup(unlock), unused)) = 0

/* ---- what is told: the log of all work and waiting, and every misuse ------------------------------------------ */

typedef struct { char *text; size_t length, room; } Text;
static Text journal, misuses;

static void tell(Text *text, const char *format, va_list args) {
    char line[256];
    size_t length = (size_t)vsnprintf(line, sizeof line - 1, format, args);
    if (length > sizeof line - 2) length = sizeof line - 2;
    line[length++] = '\n';
    if (text->length + length + 1 > text->room) text->text = realloc(text->text, text->room = 2 * (text->room + length + 1));
    memcpy(text->text + text->length, line, length + 1);
    text->text[text->length += length] = 0;
}
__attribute__((format(printf, 1, 2))) static void note(const char *format, ...) { va_list args; va_start(args, format); tell(&journal, format, args); va_end(args); }
__attribute__((format(printf, 1, 2))) static void misuse(const char *format, ...) { va_list args; va_start(args, format); tell(&misuses, format, args); va_end(args); }

/* ---- settings, and faults to order ------------------------------------------------------------------------------ */

enum { LAZY, EAGER, RANDOM };
static int order = LAZY;
static unsigned seed;
static size_t capacity = (size_t)1 << 30, used;
static const int POISON = 0xFF; /* every float of these bytes is NaN */
static char failing[128];       /* name:n:code: the n-th call from now on of this function returns this code */
static long calls;
static CUresult broken;         /* by an illegal access: nothing works in this process any more */

static CUresult ordered_fault(const char *name) {
    size_t length = strcspn(failing, ":");
    if (!length || strncmp(failing, name, length) || (name[length] && strncmp(name + length, "_v", 2))) return CUDA_SUCCESS;
    char *end;
    long at = strtol(failing + length + 1, &end, 10);
    if (++calls != at) return CUDA_SUCCESS;
    CUresult code = (CUresult)atoi(end + 1);
    note("fault: %s", name);
    if (code >= CUDA_ERROR_ILLEGAL_ADDRESS && code <= CUDA_ERROR_LAUNCH_FAILED) broken = code;
    return code;
}

/* Every function begins so: locked for its whole body, and failing where it was told to. */
#define ENTER LOCKED; do { CUresult fault_ = ordered_fault(__func__); if (fault_) return fault_; } while (0)
#define NEED(condition, code) do { if (!(condition)) return code; } while (0)
#define VALID(condition) NEED(condition, CUDA_ERROR_INVALID_VALUE)

/* ---- order: how many pieces of each stream are done before something -------------------------------------------- */

#define STREAMS 64
typedef struct { long of[STREAMS]; } Clock;
static Clock host; /* what the host has waited for */

static void join(Clock *clock, const Clock *other) { for (int i = 0; i < STREAMS; i++) if (other->of[i] > clock->of[i]) clock->of[i] = other->of[i]; }

/* ---- memory ----------------------------------------------------------------------------------------------------- */

/* Device memory is one sparse file mapped twice: without access at the addresses that are handed out, and readable for
 * this driver. */
#define SPACE ((size_t)8 << 30)
#define PAGE ((size_t)65536)

typedef struct Block {
    CUdeviceptr at;
    size_t size;
    bool live, ready, host;
    int writer;  /* the stream of the last piece of work that wrote it; -1 for none */
    long written; /* its number */
    Clock reads;
    struct Block *next;
} Block;

static char *shown, *hidden;
static size_t cursor;
static Block *blocks;

static CUresult map_space(void) {
    if (shown) return CUDA_SUCCESS;
    int file = memfd_create("cuda_stub", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)SPACE)) return CUDA_ERROR_OPERATING_SYSTEM;
    shown = mmap(NULL, SPACE, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
    hidden = mmap(NULL, SPACE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    close(file);
    return shown == MAP_FAILED || hidden == MAP_FAILED ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_SUCCESS;
}

/* The youngest first: of page-locked memory the same address can come again. */
static Block *block_of(CUdeviceptr at) {
    for (Block *block = blocks; block; block = block->next) if (at >= block->at && at < block->at + block->size) return block;
    return NULL;
}
static Block *live_block(CUdeviceptr at, size_t size) {
    Block *block = block_of(at);
    return block && block->live && at + size <= block->at + block->size ? block : NULL;
}
static bool is_device(CUdeviceptr at) { return shown && at >= (CUdeviceptr)shown && at < (CUdeviceptr)shown + SPACE; }
static bool is_pageable(CUdeviceptr at) { return !is_device(at) && !block_of(at); }
static char *inside(CUdeviceptr at) { return is_device(at) ? hidden + (at - (CUdeviceptr)shown) : (char *)at; }

static Block *keep(CUdeviceptr at, size_t size, bool is_host) {
    Block *block = calloc(1, sizeof *block);
    *block = (Block){.at = at, .size = size, .live = true, .ready = is_host, .host = is_host, .writer = -1, .next = blocks};
    return blocks = block;
}

static CUresult take(CUdeviceptr *at, size_t size) {
    CUresult fault = map_space();
    if (fault) return fault;
    size_t rounded = (size + PAGE - 1) / PAGE * PAGE;
    NEED(used + size <= capacity && cursor + rounded <= SPACE, CUDA_ERROR_OUT_OF_MEMORY);
    *at = (CUdeviceptr)shown + cursor;
    cursor += rounded;
    used += size;
    keep(*at, size, false);
    return CUDA_SUCCESS;
}

/* The device's memory goes; what is left of it is poison. */
static void drop(Block *block) {
    block->live = block->ready = false;
    used -= block->size;
    madvise(inside(block->at), (block->size + PAGE - 1) / PAGE * PAGE, MADV_REMOVE);
    memset(inside(block->at), POISON, block->size < PAGE ? block->size : PAGE);
}

/* The host takes memory away: it must have waited for all work on it. */
static void check_waited(const Block *block, const char *what) {
    bool waited = block->writer < 0 || host.of[block->writer] >= block->written;
    for (int i = 0; i < STREAMS; i++) waited = waited && host.of[i] >= block->reads.of[i];
    if (!waited && !broken) misuse("%s goes while the device may still work on it", what);
}

/* ---- streams, events, graphs ------------------------------------------------------------------------------------ */

typedef enum { COPY, FILL, WAIT, CALL, ALLOC, FREE, GRAPH, NOTHING } Kind;
typedef struct CUstream_st Stream;
typedef struct CUevent_st Event;
typedef struct CUgraph_st Graph;
typedef struct Node Node;
typedef struct { Block *block; bool write; } Use;
typedef struct {
    Kind kind;
    char name[48];
    CUdeviceptr to, from;
    size_t size;
    unsigned value;
    void *staged; /* of pageable memory, taken at once as a driver does */
    Stream *stream; /* WAIT: until this stream */
    long mark;      /* ... has done so many */
    CUhostFn call;
    void *data;
    CUgraphExec graph;
    int count;
    Use *uses;
} Op;
typedef struct Piece { Op op; struct Piece *next; } Piece;
struct Node { Op op; int id, count; Node **before; };
struct CUgraph_st { int count, room; Node **nodes; Stream *origin; bool invalid; CUstreamCaptureMode mode; pthread_t thread; };
struct CUgraphExec_st { int count; Node *nodes; char *done; bool dead; };
typedef struct { int count, room; Node **nodes; } Deps;
struct CUstream_st {
    Piece *first, *last;
    long enqueued, done;
    int index, number;
    unsigned flags;
    bool dead;
    Clock clock;
    Graph *capture;
    Deps deps;
    Stream *next;
};
struct CUevent_st { Stream *stream; long mark; Clock clock; Graph *capture; Deps deps; bool dead; };

static Stream legacy = {.number = -1}, *streams = &legacy;
static long counters[STREAMS]; /* pieces of work that each index has had: it goes on where another stream gets it */
static bool taken[STREAMS] = {true};
static int numbered, live_events, live_graphs, global_captures;
static __thread int own_captures;

static Stream *of(CUstream handle) { return (uintptr_t)handle <= 2 ? &legacy : handle; }
static bool usable(const char *what, bool dead) { if (dead) misuse("%s is used after it was given back", what); return !dead; }
#define USABLE(what, thing) NEED(usable(what, (thing)->dead), CUDA_ERROR_INVALID_HANDLE)

static void add(Deps *deps, Node *node) {
    for (int i = 0; i < deps->count; i++) if (deps->nodes[i] == node) return;
    if (deps->count == deps->room) deps->nodes = realloc(deps->nodes, sizeof(Node *) * (size_t)(deps->room = 2 * deps->room + 4));
    deps->nodes[deps->count++] = node;
}

static void use(Op *op, Block *block, bool write) {
    if (!block) return; /* pageable memory, of which the driver keeps no account */
    op->uses = realloc(op->uses, sizeof(Use) * (size_t)(op->count + 1));
    op->uses[op->count++] = (Use){block, write};
}

static void unordered(const Op *op, const Block *block) { misuse("%s touches %zu bytes without an order to other work on them", op->name, block->size); }

/* Remember that a piece of a stream touches its blocks; all that clashes with it must be ordered before. */
static void account(const Op *op, const Stream *stream, long number) {
    for (int i = 0; i < op->count; i++) {
        Block *block = op->uses[i].block;
        bool ordered = block->writer < 0 || stream->clock.of[block->writer] >= block->written;
        for (int k = 0; op->uses[i].write && k < STREAMS; k++) ordered = ordered && stream->clock.of[k] >= block->reads.of[k];
        if (!ordered) unordered(op, block);
        if (!op->uses[i].write) { block->reads.of[stream->index] = number; continue; }
        block->writer = stream->index;
        block->written = number;
        memset(&block->reads, 0, sizeof block->reads);
    }
}

static void execute(Op *op);

/* Do a stream's work until so many pieces of it are done. */
static void run(Stream *stream, long mark) {
    while (stream->done < mark && stream->first) {
        Piece *piece = stream->first;
        if (!(stream->first = piece->next)) stream->last = NULL;
        if (!broken || piece->op.kind == ALLOC) execute(&piece->op);
        stream->done++;
        free(piece->op.staged);
        free(piece->op.uses);
        free(piece);
    }
}
static void drain(Stream *stream) { run(stream, stream->enqueued); }
static void drain_all(bool blocking_only) {
    for (Stream *stream = streams; stream; stream = stream->next) if (!blocking_only || !(stream->flags & CU_STREAM_NON_BLOCKING)) drain(stream);
}

static bool there(const Op *op) {
    for (int i = 0; i < op->count; i++) {
        const Block *block = op->uses[i].block;
        if (block->live && block->ready) continue;
        misuse("%s finds its memory %s", op->name, block->live ? "not allocated yet" : "freed");
        broken = CUDA_ERROR_ILLEGAL_ADDRESS;
        return false;
    }
    return true;
}

/* Of the nodes that are ready: the last, the first, or any. */
static void launch(CUgraphExec graph) {
    memset(graph->done, 0, (size_t)graph->count);
    for (int left = graph->count; left && !broken; left--) {
        int chosen = -1, ready = 0;
        for (int i = 0; i < graph->count; i++) {
            bool can = !graph->done[i];
            for (int k = 0; can && k < graph->nodes[i].count; k++) can = graph->done[graph->nodes[i].before[k]->id];
            if (!can) continue;
            ready++;
            if (chosen < 0 || order == LAZY || (order == RANDOM && !(rand_r(&seed) % (unsigned)ready))) chosen = i;
        }
        graph->done[chosen] = 1;
        execute(&graph->nodes[chosen].op);
    }
}

static void execute(Op *op) {
    if (op->kind == ALLOC) {
        op->uses[0].block->ready = true;
        memset(inside(op->to), POISON, op->size);
        return;
    }
    if (op->kind != GRAPH && !there(op)) return;
    switch (op->kind) {
    case COPY: memmove(inside(op->to), op->staged ? op->staged : inside(op->from), op->size); break;
    case FILL: memset(inside(op->to), (int)op->value, op->size); break;
    case WAIT: if (op->stream) run(op->stream, op->mark); break;
    case CALL: op->call(op->data); break;
    case FREE: drop(op->uses[0].block); break;
    case GRAPH: launch(op->graph); break;
    default: break;
    }
    if (op->kind == CALL || op->kind == GRAPH) note("done: %s", op->name);
}

static CUresult enqueue(Stream *stream, Op op) {
    if (stream->capture) {
        Graph *graph = stream->capture;
        NEED(!graph->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        Node *node = calloc(1, sizeof *node);
        *node = (Node){.op = op, .id = graph->count, .count = stream->deps.count, .before = calloc((size_t)stream->deps.count + 1, sizeof(Node *))};
        memcpy(node->before, stream->deps.nodes, sizeof(Node *) * (size_t)stream->deps.count);
        if (graph->count == graph->room) graph->nodes = realloc(graph->nodes, sizeof(Node *) * (size_t)(graph->room = 2 * graph->room + 16));
        graph->nodes[graph->count++] = node;
        stream->deps.count = 0;
        add(&stream->deps, node);
        return CUDA_SUCCESS;
    }
    if (stream == &legacy) drain_all(true);
    long number = ++counters[stream->index];
    join(&stream->clock, &host);
    stream->clock.of[stream->index] = number;
    account(&op, stream, number);
    if (op.kind != WAIT && op.kind != NOTHING) note("s%d: %s", stream->number, op.name);
    Piece *piece = calloc(1, sizeof *piece);
    piece->op = op;
    if (stream->last) stream->last->next = piece; else stream->first = piece;
    stream->last = piece;
    stream->enqueued++;
    if (order == EAGER || stream == &legacy) drain(stream);
    if (order == RANDOM)
        for (Stream *other = streams; other; other = other->next) if (rand_r(&seed) % 2) run(other, other->done + (long)(rand_r(&seed) % 4));
    return CUDA_SUCCESS;
}

/* What must not be called while this thread captures, or while any does globally. */
static CUresult safe(void) {
    if (!own_captures && !global_captures) return CUDA_SUCCESS;
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->capture && stream->capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED) stream->capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}
static CUresult not_captured(Stream *stream) {
    if (!stream->capture) return CUDA_SUCCESS;
    stream->capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}
#define OK(call) do { CUresult fault_ = call; if (fault_) return fault_; } while (0)

/* ---- device and context ----------------------------------------------------------------------------------------- */

struct CUctx_st { int retained; };
struct CUmemPoolHandle_st { int unused; };
static struct CUctx_st primary;
static struct CUmemPoolHandle_st pool;
static bool initialised;
static __thread CUcontext current;
#define CONTEXT do { NEED(initialised, CUDA_ERROR_NOT_INITIALIZED); NEED(current, CUDA_ERROR_INVALID_CONTEXT); NEED(!broken, broken); } while (0)

API cuInit(unsigned flags) { ENTER; (void)flags; initialised = true; return map_space(); }
API cuDriverGetVersion(int *version) { ENTER; *version = 13050; return CUDA_SUCCESS; }
API cuDeviceGetCount(int *count) { ENTER; *count = 1; return CUDA_SUCCESS; }
API cuDeviceGet(CUdevice *device, int index) { ENTER; NEED(index == 0, CUDA_ERROR_INVALID_DEVICE); *device = 0; return CUDA_SUCCESS; }
API cuDeviceGetName(char *name, int length, CUdevice device) { ENTER; (void)device; snprintf(name, (size_t)length, "GeForce Double"); return CUDA_SUCCESS; }
API cuDeviceTotalMem(size_t *bytes, CUdevice device) { ENTER; (void)device; *bytes = capacity; return CUDA_SUCCESS; }
API cuDeviceGetMemPool(CUmemoryPool *found, CUdevice device) { ENTER; (void)device; *found = &pool; return CUDA_SUCCESS; }
API cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) {
    ENTER;
    (void)device;
    *value = name == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 8 : name == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 9 : name == CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { ENTER; (void)device; primary.retained++; *context = &primary; return CUDA_SUCCESS; }
API cuDevicePrimaryCtxRelease(CUdevice device) { ENTER; (void)device; primary.retained--; return CUDA_SUCCESS; }
API cuCtxGetCurrent(CUcontext *context) { ENTER; *context = current; return CUDA_SUCCESS; }
API cuCtxSetCurrent(CUcontext context) { ENTER; current = context; return CUDA_SUCCESS; }
API cuCtxGetStreamPriorityRange(int *least, int *greatest) { ENTER; if (least) *least = 0; if (greatest) *greatest = -5; return CUDA_SUCCESS; }

/* ---- the memory's functions ------------------------------------------------------------------------------------- */

API cuMemGetInfo(size_t *left, size_t *total) { ENTER; CONTEXT; *left = capacity - used; *total = capacity; return CUDA_SUCCESS; }

API cuMemAllocFromPoolAsync(CUdeviceptr *at, size_t size, CUmemoryPool from, CUstream handle) {
    ENTER;
    CONTEXT;
    (void)from;
    Stream *stream = of(handle);
    VALID(size);
    USABLE("a stream", stream);
    NEED(!stream->capture, CUDA_ERROR_NOT_SUPPORTED);
    OK(take(at, size));
    Op op = {.kind = ALLOC, .name = "alloc", .to = *at, .size = size};
    use(&op, blocks, true);
    return enqueue(stream, op);
}
API cuMemFreeAsync(CUdeviceptr at, CUstream handle) {
    ENTER;
    CONTEXT;
    Block *block = live_block(at, 1);
    if (!block || block->at != at || block->host) { misuse("memory is freed that is none"); return CUDA_ERROR_INVALID_VALUE; }
    USABLE("a stream", of(handle));
    Op op = {.kind = FREE, .name = "free"};
    use(&op, block, true);
    return enqueue(of(handle), op);
}
API cuMemAllocHost(void **at, size_t size) {
    ENTER;
    CONTEXT;
    OK(safe());
    VALID(size);
    *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    NEED(*at != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
    memset(*at, POISON, size);
    keep((CUdeviceptr)*at, size, true);
    return CUDA_SUCCESS;
}
API cuMemFreeHost(void *at) {
    ENTER;
    OK(safe());
    Block *block = live_block((CUdeviceptr)at, 1);
    if (!block || !block->host) { misuse("page-locked memory is freed that is none"); return CUDA_ERROR_INVALID_VALUE; }
    check_waited(block, "page-locked memory");
    block->live = false;
    memset(at, POISON, block->size); /* never given to anybody again */
    return CUDA_SUCCESS;
}

API cuMemPoolSetAttribute(CUmemoryPool of_pool, CUmemPool_attribute name, void *value) { ENTER; (void)of_pool; (void)name; (void)value; return CUDA_SUCCESS; }
API cuMemPoolGetAttribute(CUmemoryPool of_pool, CUmemPool_attribute name, void *value) { ENTER; (void)of_pool; if (name <= CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES) *(int *)value = 1; else *(cuuint64_t *)value = 0; return CUDA_SUCCESS; }

/* Of what is no memory of CUDA's every attribute is 0. */
API cuPointerGetAttributes(unsigned count, CUpointer_attribute *names, void **values, CUdeviceptr at) {
    ENTER;
    Block *block = live_block(at, 1);
    for (unsigned i = 0; i < count; i++) {
        switch ((int)names[i]) {
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)values[i] = !block ? 0 : block->host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE; break;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)values[i] = 0; break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)values[i] = block ? 0 : -2; break;
        default: return CUDA_ERROR_NOT_SUPPORTED;
        }
    }
    return CUDA_SUCCESS;
}

static bool reachable(CUdeviceptr at, size_t size) { return is_pageable(at) || live_block(at, size); }

API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream handle) {
    ENTER;
    CONTEXT;
    Stream *stream = of(handle);
    USABLE("a stream", stream);
    VALID(size && reachable(to, size) && reachable(from, size));
    Op op = {.kind = COPY, .name = "copy", .to = to, .from = from, .size = size};
    use(&op, block_of(from), false);
    use(&op, block_of(to), true);
    if (is_pageable(from) && !stream->capture) memcpy(op.staged = malloc(size), (void *)from, size);
    CUresult fault = enqueue(stream, op);
    if (!fault && is_pageable(to) && !stream->capture) drain(stream);
    return fault;
}
API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream handle) {
    ENTER;
    CONTEXT;
    USABLE("a stream", of(handle));
    VALID(size && live_block(to, size));
    Op op = {.kind = FILL, .name = "fill", .to = to, .value = value, .size = size};
    use(&op, block_of(to), true);
    return enqueue(of(handle), op);
}

/* ---- the streams' and the events' functions --------------------------------------------------------------------- */

API cuStreamCreateWithPriority(CUstream *out, unsigned flags, int priority) {
    ENTER;
    CONTEXT;
    (void)priority;
    int index = 1;
    while (index < STREAMS && taken[index]) index++;
    NEED(index < STREAMS, CUDA_ERROR_OUT_OF_MEMORY);
    taken[index] = true;
    Stream *stream = calloc(1, sizeof *stream);
    *stream = (Stream){.flags = flags, .index = index, .number = numbered++, .next = legacy.next};
    legacy.next = stream;
    *out = stream;
    return CUDA_SUCCESS;
}
API cuStreamDestroy(CUstream handle) {
    ENTER;
    NEED(of(handle) != &legacy, CUDA_ERROR_INVALID_HANDLE);
    USABLE("a stream", handle);
    OK(not_captured(handle));
    drain(handle);
    handle->dead = true; /* its memory stays: marks of it are still asked for */
    taken[handle->index] = false;
    for (Stream *stream = streams; stream; stream = stream->next) if (stream->next == handle) stream->next = handle->next;
    return CUDA_SUCCESS;
}
API cuStreamSynchronize(CUstream handle) {
    ENTER;
    CONTEXT;
    Stream *stream = of(handle);
    USABLE("a stream", stream);
    OK(not_captured(stream));
    note("host waits for s%d", stream->number);
    if (stream == &legacy) drain_all(true);
    drain(stream);
    join(&host, &stream->clock);
    return broken;
}
API cuEventCreate(CUevent *out, unsigned flags) { ENTER; CONTEXT; (void)flags; *out = calloc(1, sizeof **out); live_events++; return CUDA_SUCCESS; }
API cuEventDestroy(CUevent event) { ENTER; USABLE("an event", event); event->dead = true; live_events--; return CUDA_SUCCESS; }
API cuEventRecordWithFlags(CUevent event, CUstream handle, unsigned flags) {
    ENTER;
    CONTEXT;
    (void)flags;
    Stream *stream = of(handle);
    USABLE("an event", event);
    USABLE("a stream", stream);
    event->deps.count = 0;
    if ((event->capture = stream->capture)) {
        NEED(!stream->capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        for (int i = 0; i < stream->deps.count; i++) add(&event->deps, stream->deps.nodes[i]);
        return CUDA_SUCCESS;
    }
    event->stream = stream;
    event->mark = stream->enqueued;
    event->clock = stream->clock;
    return CUDA_SUCCESS;
}
API cuEventRecord(CUevent event, CUstream stream) { return cuEventRecordWithFlags(event, stream, 0); }
API cuEventSynchronize(CUevent event) {
    ENTER;
    CONTEXT;
    USABLE("an event", event);
    if (event->capture) { event->capture->invalid = true; return CUDA_ERROR_CAPTURED_EVENT; }
    if (event->stream) run(event->stream, event->mark);
    join(&host, &event->clock);
    return broken;
}
API cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
    ENTER;
    CONTEXT;
    (void)flags;
    Stream *stream = of(handle);
    USABLE("an event", event);
    USABLE("a stream", stream);
    if (event->capture) {
        if (!stream->capture) { stream->capture = event->capture; stream->deps.count = 0; }
        NEED(stream->capture == event->capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
        for (int i = 0; i < event->deps.count; i++) add(&stream->deps, event->deps.nodes[i]);
        return CUDA_SUCCESS;
    }
    NEED(!stream->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    join(&stream->clock, &event->clock);
    return enqueue(stream, (Op){.kind = WAIT, .stream = event->stream, .mark = event->mark});
}

/* ---- captures and graphs ---------------------------------------------------------------------------------------- */

API cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
    ENTER;
    CONTEXT;
    Stream *stream = of(handle);
    NEED(stream != &legacy, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    NEED(!stream->capture, CUDA_ERROR_ILLEGAL_STATE);
    Graph *graph = calloc(1, sizeof *graph);
    *graph = (Graph){.origin = stream, .mode = mode, .thread = pthread_self()};
    stream->capture = graph;
    stream->deps.count = 0;
    if (mode != CU_STREAM_CAPTURE_MODE_RELAXED) own_captures++;
    if (mode == CU_STREAM_CAPTURE_MODE_GLOBAL) global_captures++;
    return CUDA_SUCCESS;
}

/* All nodes that are done before one, it included. */
static void mark(const Node *node, char *seen) {
    if (seen[node->id]) return;
    seen[node->id] = 1;
    for (int i = 0; i < node->count; i++) mark(node->before[i], seen);
}

static bool clash(const Op *one, const Op *two) {
    for (int i = 0; i < one->count; i++)
        for (int k = 0; k < two->count; k++)
            if (one->uses[i].block == two->uses[k].block && (one->uses[i].write || two->uses[k].write)) return unordered(two, two->uses[k].block), true;
    return false;
}

static void leave_capture(Graph *graph) {
    for (Stream *stream = streams; stream; stream = stream->next) if (stream->capture == graph) stream->capture = NULL;
    if (graph->mode != CU_STREAM_CAPTURE_MODE_RELAXED) own_captures--;
    if (graph->mode == CU_STREAM_CAPTURE_MODE_GLOBAL) global_captures--;
}

API cuStreamEndCapture(CUstream handle, CUgraph *out) {
    LOCKED;
    Stream *origin = of(handle);
    Graph *graph = origin->capture;
    *out = NULL;
    NEED(graph, CUDA_ERROR_ILLEGAL_STATE);
    NEED(graph->origin == origin, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    NEED(graph->mode == CU_STREAM_CAPTURE_MODE_RELAXED || pthread_equal(graph->thread, pthread_self()), CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    char seen[graph->count + 1];
    memset(seen, 0, sizeof seen);
    for (int i = 0; i < origin->deps.count; i++) mark(origin->deps.nodes[i], seen);
    bool joined = true;
    for (int i = 0; i < graph->count; i++) joined = joined && seen[i];
    leave_capture(graph); /* whatever comes of it */
    OK(ordered_fault(__func__));
    NEED(!graph->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    NEED(joined, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    for (int i = 0; i < graph->count; i++) { /* nodes come before those that wait for them */
        memset(seen, 0, sizeof seen);
        mark(graph->nodes[i], seen);
        for (int k = 0; k < i; k++) if (!seen[k]) clash(&graph->nodes[k]->op, &graph->nodes[i]->op);
    }
    live_graphs++;
    *out = graph;
    return CUDA_SUCCESS;
}
API cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
    ENTER;
    Graph *graph = of(handle)->capture;
    *status = !graph ? CU_STREAM_CAPTURE_STATUS_NONE : graph->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}
API cuGraphDestroy(CUgraph graph) { ENTER; (void)graph; live_graphs--; return CUDA_SUCCESS; } /* its nodes serve what was instantiated */
API cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph graph, unsigned long long flags) {
    ENTER;
    OK(safe());
    (void)flags;
    CUgraphExec made = calloc(1, sizeof *made);
    *made = (struct CUgraphExec_st){.count = graph->count, .nodes = calloc((size_t)graph->count + 1, sizeof(Node)), .done = calloc((size_t)graph->count + 1, 1)};
    for (int i = 0; i < graph->count; i++) made->nodes[i] = *graph->nodes[i];
    live_graphs++;
    *out = made;
    return CUDA_SUCCESS;
}
#undef cuGraphInstantiate
API cuGraphInstantiate(CUgraphExec *out, CUgraph graph, unsigned long long flags) { return cuGraphInstantiateWithFlags(out, graph, flags); }
API cuGraphUpload(CUgraphExec graph, CUstream stream) { ENTER; CONTEXT; USABLE("a graph", graph); return enqueue(of(stream), (Op){.kind = NOTHING}); }
API cuGraphLaunch(CUgraphExec graph, CUstream stream) {
    ENTER;
    CONTEXT;
    USABLE("a graph", graph);
    USABLE("a stream", of(stream));
    Op op = {.kind = GRAPH, .name = "graph", .graph = graph};
    for (int i = 0; i < graph->count; i++)
        for (int k = 0; k < graph->nodes[i].op.count; k++) use(&op, graph->nodes[i].op.uses[k].block, graph->nodes[i].op.uses[k].write);
    return enqueue(of(stream), op);
}
API cuGraphExecDestroy(CUgraphExec graph) { ENTER; USABLE("a graph", graph); graph->dead = true; live_graphs--; return CUDA_SUCCESS; }

/* ---- not of CUDA: for the tests, and for the double of the engine library ---------------------------------------- */

/* From now on this order, so much memory beside what is in use, no fault; nothing is pending, logged or misused. */
PUBLIC void stubReset(int wanted, unsigned with, size_t memory) {
    LOCKED;
    *failing = 0;
    drain_all(false); /* which drops everything where something is broken */
    for (Stream *stream = streams; stream; stream = stream->next) join(&host, &stream->clock);
    broken = CUDA_SUCCESS;
    order = wanted;
    seed = with;
    capacity = used + memory;
    numbered = 0;
    journal.length = misuses.length = 0;
}
/* name:n:code; empty ends it. */
PUBLIC void stubFail(const char *what) { LOCKED; calls = 0; snprintf(failing, sizeof failing, "%s", what); }
/* Copies the log (or the misuses, all work done first) and begins a new one; returns the whole length. */
PUBLIC size_t stubTake(bool of_misuses, char *to, size_t room) {
    LOCKED;
    if (of_misuses) drain_all(false);
    Text *text = of_misuses ? &misuses : &journal;
    size_t length = text->length;
    if (length > room) return length;
    if (length) memcpy(to, text->text, length);
    text->length = 0;
    return length;
}
PUBLIC void stubMisuse(const char *what) { LOCKED; misuse("%s", what); }
/* Bytes of the device, blocks of page-locked memory, streams, events, graphs that were not given back; pieces of work left. */
PUBLIC void stubCount(long counts[6]) {
    LOCKED;
    memset(counts, 0, 6 * sizeof *counts);
    counts[0] = (long)used;
    for (Block *block = blocks; block; block = block->next) counts[1] += block->live && block->host;
    for (Stream *stream = legacy.next; stream; stream = stream->next) { counts[2]++; counts[5] += stream->enqueued - stream->done; }
    counts[3] = live_events;
    counts[4] = live_graphs;
}
/* Where the host finds device memory; NULL where that much is not alive. */
PUBLIC void *stubReach(CUdeviceptr at, size_t size) { LOCKED; return is_device(at) && live_block(at, size) ? inside(at) : NULL; }
/* Memory as a library takes it for itself, outside of any stream's order, and gives it back. */
PUBLIC CUdeviceptr stubTakeMemory(size_t size) { LOCKED; CUdeviceptr at; if (take(&at, size)) return 0; blocks->ready = true; return at; }
PUBLIC void stubGiveMemory(CUdeviceptr at) { LOCKED; Block *block = live_block(at, 1); if (!block) return; check_waited(block, "memory of a context"); drop(block); }
/* Put a run into a stream that reads the first of some addresses and writes the others. */
PUBLIC CUresult stubRun(CUstream handle, const char *name, CUhostFn call, const CUdeviceptr *at, int reads, int count) {
    LOCKED;
    CONTEXT;
    USABLE("a stream", of(handle));
    Op op = {.kind = CALL, .call = call};
    snprintf(op.name, sizeof op.name, "%s", name);
    for (int i = 0; i < count; i++) {
        Block *block = live_block(at[i], 1);
        if (!block || block->host) { misuse("%s: tensor %d lies in no memory of the device", name, i); return CUDA_ERROR_ILLEGAL_ADDRESS; }
        use(&op, block, i >= reads);
    }
    return enqueue(of(handle), op);
}

/* ---- names of errors, and the way to everything ------------------------------------------------------------------ */

static const struct { CUresult code; const char *name; } NAMES[] = {
#define NAME(code) {code, #code}
    NAME(CUDA_SUCCESS), NAME(CUDA_ERROR_INVALID_VALUE), NAME(CUDA_ERROR_OUT_OF_MEMORY), NAME(CUDA_ERROR_NOT_INITIALIZED),
    NAME(CUDA_ERROR_NO_DEVICE), NAME(CUDA_ERROR_INVALID_DEVICE), NAME(CUDA_ERROR_INVALID_CONTEXT), NAME(CUDA_ERROR_DEVICE_UNAVAILABLE),
    NAME(CUDA_ERROR_INVALID_HANDLE), NAME(CUDA_ERROR_ILLEGAL_STATE), NAME(CUDA_ERROR_NOT_FOUND), NAME(CUDA_ERROR_ILLEGAL_ADDRESS),
    NAME(CUDA_ERROR_LAUNCH_FAILED), NAME(CUDA_ERROR_NOT_SUPPORTED), NAME(CUDA_ERROR_OPERATING_SYSTEM),
    NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED), NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED), NAME(CUDA_ERROR_STREAM_CAPTURE_MERGE),
    NAME(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED), NAME(CUDA_ERROR_STREAM_CAPTURE_UNJOINED), NAME(CUDA_ERROR_STREAM_CAPTURE_ISOLATION),
    NAME(CUDA_ERROR_CAPTURED_EVENT), NAME(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD), NAME(CUDA_ERROR_UNKNOWN),
};
API cuGetErrorName(CUresult code, const char **name) {
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) if (NAMES[i].code == code) return *name = NAMES[i].name, CUDA_SUCCESS;
    *name = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}
API cuGetErrorString(CUresult code, const char **text) { CUresult found = cuGetErrorName(code, text); if (!found) *text = "as ordered"; return found; }
API cuGetExportTable(const void **table, const CUuuid *id) { (void)id; *table = NULL; return CUDA_ERROR_NOT_FOUND; }

static void *find(const char *name) {
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)&find, &info)) self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    static const char *const SUFFIXES[] = {"_v4", "_v3", "_v2", ""};
    char full[128];
    void *found = NULL;
    for (int i = 0; i < 4 && !found; i++) {
        snprintf(full, sizeof full, "%s%s", name, SUFFIXES[i]);
        found = dlsym(self, full);
    }
    return found;
}
API cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
    LOCKED;
    (void)version, (void)flags;
    *function = find(name);
    if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
#undef cuGetProcAddress
API cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags) { return cuGetProcAddress_v2(name, function, version, flags, NULL); }

// A CUDA runtime without a GPU. The device's memory is the host's; a thread per stream makes copies and
// collectives in order, NULL_LAG operations late unless somebody waits for them; kernels do nothing.
// Functions that are not here do nothing either, and return 0 (helpers/null_cuda.py).
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "driver_types.h"

enum { OUT_OF_MEMORY = 2, NOT_READY = 600, ROOM = 1 << 14, BLOCKS = 1 << 12 };
static const size_t MEMORY = 80l << 30;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}

// Below some version cuDNN would not be asked for convolutions in bfloat16.
size_t cudnnGetVersion(void) { return 92400; }

// Streams. A handle is the address of one; 0, 1 and 2 are CUDA's names of the default one.
typedef struct { void (*run)(void *); void *argument; } Operation;
typedef struct Stream { Operation *queue; long put, done, wanted; struct Stream *next; } Stream;
static Stream standard, *streams = &standard;

static Stream *stream_of(void *handle) { return handle > (void *)2 ? handle : &standard; }

static void *work(void *argument) {
  Stream *s = argument;
  long lag = setting("NULL_LAG", 0);
  pthread_mutex_lock(&lock);
  for (;;) {
    while (s->done >= s->put - lag && s->done >= s->wanted) pthread_cond_wait(&changed, &lock);
    Operation next = s->queue[s->done % ROOM];
    pthread_mutex_unlock(&lock);
    next.run(next.argument);
    pthread_mutex_lock(&lock);
    s->done++;
    pthread_cond_broadcast(&changed);
  }
}
static void finish(Stream *s, long place) {
  pthread_mutex_lock(&lock);
  if (s->wanted < place) s->wanted = place;
  pthread_cond_broadcast(&changed);
  while (s->done < place) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
}
void null_enqueue(void *handle, void (*run)(void *), void *argument) {
  Stream *s = stream_of(handle);
  if (s->put - s->done == ROOM) finish(s, s->put);
  pthread_mutex_lock(&lock);
  if (!s->queue) {
    pthread_t thread;
    s->queue = malloc(ROOM * sizeof(Operation));
    pthread_create(&thread, 0, work, s);
  }
  s->queue[s->put++ % ROOM] = (Operation){run, argument};
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
}
int cudaStreamCreateWithPriority(Stream **s, unsigned flags, int priority) {
  *s = calloc(1, sizeof **s);
  pthread_mutex_lock(&lock);
  (*s)->next = streams, streams = *s;
  pthread_mutex_unlock(&lock);
  return 0;
}
int cudaStreamSynchronize(void *handle) { finish(stream_of(handle), stream_of(handle)->put); return 0; }
int cudaDeviceSynchronize(void) { for (Stream *s = streams; s; s = s->next) finish(s, s->put); return 0; }
int cudaStreamIsCapturing(void *handle, int *status) { return *status = 0; }
int cudaStreamGetCaptureInfo(void *handle, int *status) { return *status = 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -1; return 0; }

// Events. With NULL_LYING_EVENTS the host is told that what they stand behind has ended.
typedef struct { Stream *stream; long place; } Event;
static int ended(Event *event) {
  return !event->stream || event->stream->done >= event->place || setting("NULL_LYING_EVENTS", 0);
}
static void await(void *argument) {
  Event *event = argument;
  finish(event->stream, event->place);
  free(event);
}
int cudaEventCreateWithFlags(Event **event, unsigned flags) { *event = calloc(1, sizeof **event); return 0; }
int cudaEventRecord(Event *event, void *handle) {
  *event = (Event){stream_of(handle), stream_of(handle)->put};
  return 0;
}
int cudaEventRecordWithFlags(Event *event, void *handle) { return cudaEventRecord(event, handle); }
int cudaEventQuery(Event *event) { return ended(event) ? 0 : NOT_READY; }
int cudaEventSynchronize(Event *event) { if (!ended(event)) finish(event->stream, event->place); return 0; }
int cudaStreamWaitEvent(void *handle, Event *event, unsigned flags) {
  if (event->stream) null_enqueue(handle, await, memcpy(malloc(sizeof *event), event, sizeof *event));
  return 0;
}

// Memory. What is not in the table is pageable. The device's is never given back: torch keeps it anyway.
static struct { char *start; size_t size; int kind; } blocks[BLOCKS];
static int find(const char *place) {
  int i = 0;
  while (i < BLOCKS && !(blocks[i].start <= place && place < blocks[i].start + blocks[i].size)) i++;
  return i;
}
static int kind_of(const void *place) {
  pthread_mutex_lock(&lock);
  int i = find(place), kind = i < BLOCKS ? blocks[i].kind : cudaMemoryTypeUnregistered;
  pthread_mutex_unlock(&lock);
  return kind;
}
static int add(void *start, size_t size, int kind) {
  pthread_mutex_lock(&lock);
  int i = 0;
  while (blocks[i].size) i++;
  blocks[i].start = start, blocks[i].size = size, blocks[i].kind = kind;
  pthread_mutex_unlock(&lock);
  return 0;
}
static int allocate(void **start, size_t size, int kind) {
  if (size > MEMORY) return OUT_OF_MEMORY;
  *start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return add(*start, size, kind);
}
int cudaMalloc(void **start, size_t size) { return allocate(start, size, cudaMemoryTypeDevice); }
int cudaHostAlloc(void **start, size_t size) { return allocate(start, size, cudaMemoryTypeHost); }
int cudaHostRegister(void *start, size_t size, unsigned flags) {
  int error = setting("NULL_PIN_ERROR", 0);
  return error ? error : add(start, size, cudaMemoryTypeHost);
}
int cudaHostUnregister(void *start) {
  cudaDeviceSynchronize();
  blocks[find(start)].size = 0;
  return 0;
}
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = MEMORY; return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, void *place) {
  *a = (struct cudaPointerAttributes){.type = kind_of(place), .devicePointer = place, .hostPointer = place};
  return 0;
}

// Copies
typedef struct { void *to; const void *from; size_t size; void *staged; } Copy;
static void copy(void *argument) {
  Copy *c = argument;
  memcpy(c->to, c->from, c->size);
  free(c->staged);
  free(c);
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int direction, void *handle) {
  Copy *c = malloc(sizeof *c);
  *c = (Copy){to, from, size};
  if (kind_of(from) == cudaMemoryTypeUnregistered) c->from = c->staged = memcpy(malloc(size + 1), from, size);
  null_enqueue(handle, copy, c);
  return kind_of(to) == cudaMemoryTypeUnregistered ? cudaStreamSynchronize(handle) : 0;
}

// The device
static __thread int current;
static int nothing(void) { return 0; }
int cudaGetDeviceCount(int *count) { *count = setting("NULL_GPUS", 1); return 0; }
int cudaGetDevice(int *device) { *device = current; return 0; }
int cudaSetDevice(int device) { current = device; return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  *p = (struct cudaDeviceProp){.name = "null", .major = 9, .totalGlobalMem = MEMORY, .warpSize = 32,
    .multiProcessorCount = 132, .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048,
    .sharedMemPerBlock = 49152, .regsPerBlock = 65536, .maxGridSize = {1 << 30, 65535, 65535},
    .maxThreadsDim = {1024, 1024, 64}};
  p->uuid.bytes[0] = setting("NULL_GPU_PER_RANK", 0) ? setting("LOCAL_RANK", 0) : device;
  return 0;
}
const char *cudaGetErrorString(int error) { return "null CUDA's error"; }
const char *cudaGetErrorName(int error) { return "null CUDA's error"; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *active = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = &standard; return 0; }
int cublasCreate_v2(void **handle) { *handle = &standard; return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function) {
  *function = nothing;
  if (!strcmp(name, "cuDevicePrimaryCtxGetState")) *function = cuDevicePrimaryCtxGetState;
  return 0;
}

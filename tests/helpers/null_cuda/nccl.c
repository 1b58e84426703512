// NCCL between processes of one machine, in the order of their streams, without arithmetic. Gathers and
// broadcasts, from which DistributedDataParallel learns shapes, are done; what would sum or exchange what
// null kernels have not computed only waits for all ranks. As nccl.h says, ncclCommFinalize waits for them.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { CHUNK = 1 << 20, ALL = -1 };
typedef struct { volatile int arrived, phase, leaving; char data[][CHUNK]; } Shared;
typedef struct { Shared *shared; int rank, world; volatile int aborted; } Comm;
typedef struct { char name[128]; } Id;
typedef struct { Comm *comm; const char *from; char *to; size_t size; int source; } Call;
void null_enqueue(void *stream, void (*run)(void *), void *argument);

static void meet(Comm *c) {
  int phase = c->shared->phase;
  if (__sync_add_and_fetch(&c->shared->arrived, 1) == c->world) {
    c->shared->arrived = 0;
    __sync_add_and_fetch(&c->shared->phase, 1);
  }
  while (c->shared->phase == phase && !c->aborted) usleep(50);
}
static void run(void *argument) {
  Call call = *(Call *)argument;
  Comm *c = call.comm;
  free(argument);
  meet(c);
  for (size_t at = 0; at < call.size && !c->aborted; at += CHUNK) {
    size_t n = call.size - at < CHUNK ? call.size - at : CHUNK;
    memcpy(c->shared->data[c->rank], call.from + at, n);
    meet(c);
    for (int r = 0; r < c->world; r++)
      if (call.source == ALL) memcpy(call.to + r * call.size + at, c->shared->data[r], n);
    if (call.source != ALL) memcpy(call.to + at, c->shared->data[call.source], n);
    meet(c);
  }
}
static int enqueue(Comm *c, const void *from, void *to, size_t size, int source, void *stream) {
  Call *call = malloc(sizeof *call);
  *call = (Call){c, from, to, size, source};
  null_enqueue(stream, run, call);
  return 0;
}

static const char SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // of ncclDataType_t
int ncclAllGather(void *from, void *to, size_t n, int type, Comm *c, void *stream) {
  return enqueue(c, from, to, n * SIZES[type], ALL, stream);
}
int ncclBroadcast(void *from, void *to, size_t n, int type, int source, Comm *c, void *stream) {
  return enqueue(c, from, to, n * SIZES[type], source, stream);
}
int ncclBcast(void *place, size_t n, int type, int source, Comm *c, void *stream) {
  return ncclBroadcast(place, place, n, type, source, c, stream);
}
int ncclAllReduce(void *from, void *to, size_t n, int type, int sum, Comm *c, void *stream) {
  return enqueue(c, 0, 0, 0, ALL, stream);
}

// An all-to-all is a group of sends.
static __thread int depth;
static __thread Comm *sender;
static __thread void *of_sends;
int ncclGroupStart(void) { depth++; return 0; }
int ncclSend(void *from, size_t n, int type, int to, Comm *c, void *stream) {
  sender = c, of_sends = stream;
  return 0;
}
int ncclGroupEnd(void) {
  if (--depth == 0 && sender) enqueue(sender, 0, 0, 0, ALL, of_sends), sender = 0;
  return 0;
}

int ncclGetUniqueId(Id *id) {
  static int made;
  *id = (Id){0};
  sprintf(id->name, "/null-nccl-%d-%d", getpid(), made++);
  return 0;
}
int ncclCommInitRankConfig(Comm **c, int world, Id id, int rank, void *config) {
  size_t size = sizeof(Shared) + (size_t)world * CHUNK;
  int file = shm_open(id.name, O_RDWR | O_CREAT, 0600);
  if (ftruncate(file, size)) return 2;
  *c = malloc(sizeof **c);
  **c = (Comm){mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0), rank, world};
  close(file);
  meet(*c);
  shm_unlink(id.name);
  return 0;
}
int ncclCommFinalize(Comm *c) {
  __sync_add_and_fetch(&c->shared->leaving, 1);
  while (c->shared->leaving < c->world && !c->aborted) usleep(1000);
  return 0;
}
int ncclCommAbort(Comm *c) { c->aborted = 1; return 0; }
int ncclCommGetAsyncError(Comm *c, int *error) { return *error = 0; }
int ncclCommCount(Comm *c, int *world) { *world = c->world; return 0; }
int ncclGetVersion(int *version) { *version = NCCL; return 0; }
const char *ncclGetErrorString(int error) { return "null NCCL's error"; }
const char *ncclGetLastError(void *comm) { return ""; }

/* A parallel loop. Helpers spin for a moment when they have nothing to do, since the next call follows within
microseconds in a decode step, and then sleep. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "kernels.h"

#define MAX_THREADS 64
#define SPIN_NANOSECONDS 100000

typedef struct {
  Work* work;
  void* argument;
  int64_t items;
  int slices;
  _Atomic int tickets;
  _Atomic int64_t done;
  _Atomic int64_t taken[MAX_THREADS];
} Job;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t news = PTHREAD_COND_INITIALIZER;
static _Atomic int busy, helpers, sleepers, inside;
static _Atomic uint64_t generation;
static _Atomic(Job*) current;

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* A thread goes through a slice of its own in order, so that it uses what it prefetches; then it helps others. A thread
that comes late finds nothing to do, and no thread waits for one that has not begun. */
static void work_off(Job* job) {
  int mine = atomic_fetch_add(&job->tickets, 1);
  for (int i = 0; i < job->slices; i++) {
    int slice = (mine + i) % job->slices;
    int64_t begin = job->items * slice / job->slices, end = job->items * (slice + 1) / job->slices;
    for (;;) {
      int64_t item = begin + atomic_fetch_add_explicit(&job->taken[slice], 1, memory_order_relaxed);
      if (item >= end) break;
      job->work(item, job->argument);
      atomic_fetch_add_explicit(&job->done, 1, memory_order_release);
    }
  }
}

static int64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void* help(void* unused) {
  (void)unused;
  uint64_t seen = 0;
  for (;;) {
    int64_t until = nanoseconds() + SPIN_NANOSECONDS;
    for (int turn = 1; atomic_load(&generation) == seen; turn++) {
      relax();
      if (turn % 32 || nanoseconds() < until) continue;
      pthread_mutex_lock(&lock);
      atomic_fetch_add(&sleepers, 1);
      while (atomic_load(&generation) == seen) pthread_cond_wait(&news, &lock);
      atomic_fetch_sub(&sleepers, 1);
      pthread_mutex_unlock(&lock);
    }
    seen = atomic_load(&generation);
    /* The job belongs to its caller, which waits until no thread that could have seen it is inside. */
    atomic_fetch_add(&inside, 1);
    Job* job = atomic_load(&current);
    if (job) work_off(job);
    atomic_fetch_sub(&inside, 1);
  }
  return NULL;
}

int thread_count(const XLA_FFI_CallFrame* call) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
      .ctx = call->ctx,
      .num_threads = &threads,
  };
  XLA_FFI_Error* error = call->api->XLA_FFI_ThreadPool_NumThreads(&count);
  if (error) {
    XLA_FFI_Error_Destroy_Args destroy = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
    call->api->XLA_FFI_Error_Destroy(&destroy);
    return 1;
  }
  return (int)MIN(threads, MAX_THREADS);
}

/* Starts helpers until there are `wanted`, or the system gives no more. Called by one thread at a time. */
static int helpers_for(int wanted) {
  while (atomic_load(&helpers) < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, help, NULL)) break;
    pthread_detach(thread);
    atomic_fetch_add(&helpers, 1);
  }
  return MIN(wanted, atomic_load(&helpers));
}

/* work(0), ..., work(items - 1); returns when all are done. A caller that finds the helpers busy works alone. */
void parallel_for(const XLA_FFI_CallFrame* call, int64_t items, Work* work, void* argument) {
  int free = 0;
  int mine = items > 1 && atomic_compare_exchange_strong(&busy, &free, 1);
  int others = mine ? helpers_for(thread_count(call) - 1) : 0;
  if (!others) {
    if (mine) atomic_store(&busy, 0);
    for (int64_t item = 0; item < items; item++) work(item, argument);
    return;
  }
  Job job = {.work = work, .argument = argument, .items = items, .slices = (int)MIN(others + 1, items)};
  atomic_store(&current, &job);
  atomic_fetch_add(&generation, 1);
  if (atomic_load(&sleepers)) {
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&news);
    pthread_mutex_unlock(&lock);
  }
  work_off(&job);
  for (int turn = 1; atomic_load_explicit(&job.done, memory_order_acquire) < items; turn++)
    turn % 4096 ? relax() : (void)sched_yield();
  atomic_store(&current, NULL);
  for (int turn = 1; atomic_load(&inside); turn++) turn % 4096 ? relax() : (void)sched_yield();
  atomic_store(&busy, 0);
}

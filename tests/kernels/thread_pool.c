/* Drives the parallel loop of pallas_kernels/native/threads.c from one and from two calling threads. `thread_sanitizer.sh`
builds it with ThreadSanitizer, which reports data races; here each item's result is checked as well. */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels.h"

#define THREADS 4
#define ITEMS 97

typedef struct {
  int round, failures;
  int64_t results[ITEMS];
} Caller;

/* XLA's thread pool, as far as `thread_count` asks it. */
static XLA_FFI_Error* num_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = THREADS;
  return NULL;
}

static const XLA_FFI_Api api = {.XLA_FFI_ThreadPool_NumThreads = num_threads};
static const XLA_FFI_CallFrame frame = {.api = &api};

/* Plain memory, written by whichever thread has the item and read by the caller: the loop itself has to order the two. */
static void add_round(int64_t item, void* argument) {
  Caller* caller = argument;
  caller->results[item] += caller->round + item;
}

static void* call_many(void* argument) {
  Caller* caller = argument;
  int rounds = 4000;
  int64_t expected[ITEMS] = {0};
  for (caller->round = 0; caller->round < rounds; caller->round++) {
    int64_t items = 1 + caller->round % ITEMS; /* fewer than there are threads, too */
    parallel_for(&frame, items, add_round, caller);
    for (int64_t item = 0; item < items; item++) {
      expected[item] += caller->round + item;
      caller->failures += caller->results[item] != expected[item];
    }
    /* Longer than helpers spin, now and then: they sleep and have to be woken. */
    if (caller->round % 200 == 0) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
  }
  return NULL;
}

int main(void) {
  int failures = 0;
  for (int callers = 1; callers <= 2; callers++) {
    Caller states[2] = {0};
    pthread_t threads[2];
    for (int i = 0; i < callers; i++)
      if (pthread_create(&threads[i], NULL, call_many, &states[i])) abort();
    for (int i = 0; i < callers; i++) {
      pthread_join(threads[i], NULL);
      failures += states[i].failures;
    }
  }
  if (failures) fprintf(stderr, "%d wrong results\n", failures);
  return failures ? 1 : 0;
}

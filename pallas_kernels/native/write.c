/* New keys or values into the paged cache, in place: pages [L, P, K, S, C] and values [K, C, N], of N tokens. */

#include "kernels.h"

/* Tokens whose values are transposed together, and the number of tokens up to which one thread does all. */
#define BLOCK 16
#define ALONE 64

typedef struct {
  float* pages;
  const int32_t *page_of, *slot_of;
  const float* values;
  int64_t num_pages, heads, page_size, dim, tokens;
} Write;

/* One head of a block of tokens. */
static void item(int64_t number, void* argument) {
  const Write* w = argument;
  int64_t head = number % w->heads, begin = number / w->heads * BLOCK, count = MIN(w->tokens - begin, BLOCK);
  float block[BLOCK * MAX_DIM];
  const float* from = w->values + head * w->dim * w->tokens + begin;
  for (int64_t c = 0; c < w->dim; c++)
    for (int64_t t = 0; t < count; t++) block[t * w->dim + c] = from[c * w->tokens + t];
  for (int64_t t = 0; t < count; t++) {
    int64_t page = w->page_of[begin + t], slot = w->slot_of[begin + t];
    if (page < 0 || page >= w->num_pages) continue;
    float* to = w->pages + ((page * w->heads + head) * w->page_size + slot) * w->dim;
    memcpy(to, block + t * w->dim, w->dim * sizeof(float));
  }
}

/* Operands pages, page ids (of which those outside are dropped), slots, values; result pages, the same memory; attribute
layer. */
XLA_FFI_Error* eejax_write(XLA_FFI_CallFrame* call) {
  if (is_question(call)) return NULL;
  const XLA_FFI_Buffer *pages = result(call, 0), *values = argument(call, 3);
  Write w = {
      .page_of = argument(call, 1)->data,
      .slot_of = argument(call, 2)->data,
      .values = values->data,
      .num_pages = pages->dims[1],
      .heads = pages->dims[2],
      .page_size = pages->dims[3],
      .dim = pages->dims[4],
      .tokens = values->dims[2],
  };
  w.pages = (float*)pages->data + *(const int64_t*)attribute(call, 0) * w.num_pages * w.heads * w.page_size * w.dim;
  int64_t items = (w.tokens + BLOCK - 1) / BLOCK * w.heads;
  if (w.tokens > ALONE)
    parallel_for(call, items, item, &w);
  else
    for (int64_t i = 0; i < items; i++) item(i, &w);
  return NULL;
}

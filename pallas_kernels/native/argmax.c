/* ids [N] of x [V, N]: the lowest row of each column's largest element, in one pass. A NaN is larger than nothing. */

#include <math.h>

#include "kernels.h"

/* Bytes of x of one work item. */
#define ITEM_BYTES (64 * 1024)

typedef struct {
  const float* x;
  int64_t rows, columns, rows_of_item;
  /* Of each item, column by column. */
  float* tops;
  int32_t* ids;
} Argmax;

/* One item's rows of the columns from `from` on, as many as a vector holds: where columns divide a vector, a vector
holds several rows of all of them. */
INLINE void best(const Argmax* a, int64_t begin, int64_t end, int64_t from, float* tops, int32_t* ids) {
  int64_t n = a->columns, width = MIN(n - from, VL), several = n < VL && VL % n == 0 ? VL / n : 1;
  vec top = splat(-INFINITY);
  ivec id = (ivec){0} + (int32_t)begin, row = id, step = (ivec){0} + (int32_t)several;
  if (several > 1)
    for (int i = 0; i < VL; i++) row[i] += (int32_t)(i / n);
  int64_t r = begin;
  for (; r + several <= end; r += several, row += step) {
    float line[VL];
    const float* x = a->x + r * n + from;
    if (several == 1 && width < VL) {
      for (int i = 0; i < VL; i++) line[i] = -INFINITY;
      x = memcpy(line, x, width * sizeof(float));
    }
    vec value = load(x);
    ivec more = value > top;
    top = pick(more, value, top);
    id = (row & more) | (id & ~more);
  }
  for (int64_t c = 0; c < width; c++) {
    float high = -INFINITY;
    int32_t at = (int32_t)begin;
    for (int64_t i = c; i < (several > 1 ? VL : c + 1); i += n)
      if (top[i] > high || (top[i] == high && id[i] < at)) high = top[i], at = id[i];
    for (int64_t rest = r; rest < end; rest++)
      if (a->x[rest * n + from + c] > high) high = a->x[rest * n + from + c], at = (int32_t)rest;
    tops[from + c] = high;
    ids[from + c] = at;
  }
}

static void item(int64_t number, void* argument) {
  const Argmax* a = argument;
  int64_t begin = number * a->rows_of_item, end = MIN(begin + a->rows_of_item, a->rows);
  for (int64_t from = 0; from < a->columns; from += VL)
    best(a, begin, end, from, a->tops + number * a->columns, a->ids + number * a->columns);
}

/* Operand x; results ids and two for scratch: [V / 64 + 1, N] floats and integers. */
XLA_FFI_Error* eejax_argmax(XLA_FFI_CallFrame* call) {
  if (is_question(call)) return NULL;
  const XLA_FFI_Buffer* x = argument(call, 0);
  Argmax a = {
      .x = x->data,
      .rows = x->dims[0],
      .columns = x->dims[1],
      .tops = result(call, 1)->data,
      .ids = result(call, 2)->data,
  };
  a.rows_of_item = MAX(ITEM_BYTES / (a.columns * (int64_t)sizeof(float)), 64);
  int64_t items = (a.rows + a.rows_of_item - 1) / a.rows_of_item;
  parallel_for(call, items, item, &a);
  int32_t* ids = result(call, 0)->data;
  for (int64_t c = 0; c < a.columns; c++) {
    int64_t most = 0;
    for (int64_t i = 1; i < items; i++)
      if (a.tops[i * a.columns + c] > a.tops[most * a.columns + c]) most = i;
    ids[c] = a.ids[most * a.columns + c];
  }
  return NULL;
}

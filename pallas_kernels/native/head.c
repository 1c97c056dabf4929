/* What decoding needs of logits, weight [V, D] @ x [D, N], float32: in each column the largest one and its row (the lowest one
of equals), the largest one but that (the same one again where two are equal), and the sum of the exponentials of all,
each less the largest. Rows of the vocabulary are taken in tiles that stay in the cache; logits themselves are written
only of columns that are wanted. A NaN is never the largest and adds nothing to the sum. */

#include <math.h>

#include "product.h"

/* Logits of one work item, at most: 16 rows or more, since `ops.py` refuses more than 1,024 columns. */
#define TILE_FLOATS (16 * 1024)

typedef struct {
  Product p;
  /* Floats from one row of a tile to the next: rows fill vectors, or vectors hold rows. */
  int64_t lanes;
  /* Of each item, `lanes` of them. */
  float *tops, *seconds, *sums;
  int32_t* ids;
  float* logits;
  const uint8_t* wanted;
  /* Whether more than the largest logit and its row is asked for. */
  int confidence;
} Head;

/* The best two numbers that a lane has seen, the row of the best, and the sum of exponentials over the best. */
typedef struct {
  float top, second, sum;
  int32_t id;
} Best;

INLINE Best better(Best a, Best b) {
  int mine = a.top > b.top || (a.top == b.top && a.id <= b.id);
  Best high = mine ? a : b, low = mine ? b : a;
  high.second = MAX(MAX(high.second, low.second), low.top);
  if (low.top > -INFINITY) high.sum += low.sum * expf(low.top - high.top);
  return high;
}

/* One vector of lanes over a tile's `vectors` vectors, `step` floats apart, whose rows are `rows` apart. */
INLINE void best_of(
    const float* tile, int64_t vectors, int64_t step, ivec row, int32_t rows, int confidence, vec* top, vec* second,
    vec* sum, ivec* id) {
  *top = *second = splat(-INFINITY), *sum = (vec){0}, *id = row;
  for (int64_t i = 0; i < vectors; i++, row += rows) {
    vec value = load(tile + i * step);
    ivec more = value > *top;
    if (confidence) {
      vec other = pick(more, *top, value);
      *second = pick(other > *second, other, *second);
    }
    *top = pick(more, value, *top);
    *id = (row & more) | (*id & ~more);
  }
  if (!confidence) return;
  vec base = pick(*top == splat(-INFINITY), (vec){0}, *top);
  for (int64_t i = 0; i < vectors; i++) *sum += exponential(load(tile + i * step) - base);
}

static void item(int64_t number, void* argument) {
  const Head* h = argument;
  const Product* p = &h->p;
  int64_t begin = number * p->rows_of_item, rows = MIN(p->rows_of_item, p->rows - begin);
  int64_t lanes = h->lanes, n = p->columns, several = lanes < VL ? VL / lanes : 1;
  float tile[TILE_FLOATS + VL];
  Out out = {.to = tile, .stride = lanes, .spare = lanes % VL == 0};
  const float* weight = p->weight + begin * p->depth;
  product_rows(p, weight, out, rows, weight + rows * p->depth);
  for (int64_t i = rows * lanes; i < rows * lanes + VL; i++) tile[i] = -INFINITY;
  for (int64_t c = 0; h->wanted && c < n; c++) {
    int64_t column = p->list ? p->list[c] : c;
    if (!h->wanted[column]) continue;
    for (int64_t r = 0; r < rows; r++) h->logits[(begin + r) * p->width + column] = tile[r * lanes + c];
  }
  int64_t at = number * lanes, vectors = (rows + several - 1) / several;
  ivec row = (ivec){0} + (int32_t)begin;
  if (several > 1)
    for (int i = 0; i < VL; i++) row[i] += (int32_t)(i / lanes);
  for (int64_t from = 0; from < lanes; from += VL) {
    vec top, second, sum;
    ivec id;
    best_of(tile + from, vectors, several > 1 ? VL : lanes, row, (int32_t)several, h->confidence, &top, &second, &sum, &id);
    for (int64_t c = 0; c < MIN(lanes, VL); c++) {
      Best best = {top[c], second[c], sum[c], id[c]};
      for (int64_t i = c + lanes; i < VL; i += lanes) best = better(best, (Best){top[i], second[i], sum[i], id[i]});
      h->tops[at + from + c] = best.top, h->seconds[at + from + c] = best.second;
      h->sums[at + from + c] = best.sum, h->ids[at + from + c] = best.id;
    }
  }
}

/* Operands weight, x, active (of no elements where all columns are computed), logits, wanted (of no elements where no
logits are: these have no rows then); results logits (the operand's memory), largest, rows, second largest, sums,
what items found (4 times V / 16 + 1 by columns and a vector), scratch (at its end a list of
columns); attribute confidence. */
XLA_FFI_Error* eejax_head(XLA_FFI_CallFrame* call) {
  if (is_question(call)) return NULL;
  const XLA_FFI_Buffer *weight = argument(call, 0), *x = argument(call, 1), *active = argument(call, 2);
  const XLA_FFI_Buffer *wanted = argument(call, 4), *parts = result(call, 5), *scratch = result(call, 6);
  Head h = {
      .p = {
          .weight = weight->data,
          .x = x->data,
          .scratch = scratch->data,
          .rows = weight->dims[0],
          .depth = weight->dims[1],
          .width = x->dims[1],
      },
      .logits = result(call, 0)->data,
      .wanted = wanted->dims[0] ? wanted->data : NULL,
      .confidence = *(const int64_t*)attribute(call, 0) != 0,
  };
  Product* p = &h.p;
  choose_columns(p, active, (int32_t*)(p->scratch + scratch->dims[0]) - p->width);
  prepare_product(call, p);
  h.lanes = p->columns && VL % p->columns == 0 ? p->columns : (p->columns + VL - 1) / VL * VL;
  if (p->items) {
    p->rows_of_item = MIN(MAX(p->rows_of_item, 16), TILE_FLOATS / h.lanes);
    p->items = (p->rows + p->rows_of_item - 1) / p->rows_of_item;
  }
  int64_t size = parts->dims[0] / 4;
  h.tops = parts->data, h.seconds = h.tops + size, h.sums = h.seconds + size, h.ids = (int32_t*)(h.sums + size);
  parallel_for(call, p->items, item, &h);
  float *tops = result(call, 1)->data, *seconds = result(call, 3)->data, *sums = result(call, 4)->data;
  int32_t* ids = result(call, 2)->data;
  for (int64_t c = 0; c < p->width; c++) tops[c] = seconds[c] = sums[c] = 0, ids[c] = 0;
  for (int64_t c = 0; c < p->columns; c++) {
    Best best = {h.tops[c], h.seconds[c], h.sums[c], h.ids[c]};
    for (int64_t i = 1; i < p->items; i++) {
      int64_t at = i * h.lanes + c;
      best = better(best, (Best){h.tops[at], h.seconds[at], h.sums[at], h.ids[at]});
    }
    int64_t column = p->list ? p->list[c] : c;
    tops[column] = best.top, ids[column] = best.id, seconds[column] = best.second, sums[column] = best.sum;
  }
  return NULL;
}

/* Attention of single queries over the paged cache, float32: out [H, C, N] of q [H, C, N], each token at its own
position of its own row of the page table. Softmax is online, page after page (arXiv 2205.14135), so scratch does not
grow with the context, and only what a token sees is read.

Consecutive tokens of one row go together: up to two vectors of queries of one K/V head read each page once. Tokens by
themselves (decoding) take inner products along C instead. */

#include <math.h>

#include "kernels.h"

/* Columns of a tile: queries (token, head of the group) of one K/V head. */
#define TILE (2 * VL)
/* Up to so many queries, inner products along C are used. */
#define FEW 8
#define SLOTS 64
/* Floats of a line of the cache. */
#define LINE 16

typedef struct {
  const float *q, *k_pages, *v_pages;
  const int32_t *page_table, *rows, *positions;
  float* out;
  int64_t tokens, heads, dim, kv_heads, page_size, pages, table_width, window, block, blocks;
  float scale;
} Attention;

/* Token i is of row i where no rows are given. */
INLINE int64_t row_of(const Attention* a, int64_t token) { return a->rows ? a->rows[token] : token; }

typedef struct {
  const float *k, *v;
  /* Slots of this page that some query sees, and the position of slot 0. */
  int begin, end;
  int64_t start;
} Page;

INLINE Page page_at(const Attention* a, int64_t row, int64_t head, int64_t number, int64_t first, int64_t last) {
  int64_t id = a->page_table[row * a->table_width + number], size = a->page_size;
  int64_t offset = (id * a->kv_heads + head) * size * a->dim, start = number * size;
  return (Page){
      .k = a->k_pages + offset,
      .v = a->v_pages + offset,
      .begin = (int)MAX(first - start, 0),
      .end = (int)MIN(last + 1 - start, size),
      .start = start,
  };
}

/* --- a few queries of one token: `count` heads of the group from `h` on --- */

/* What will be read after the keys and values of this page: the keys of the next one, or of the next item. */
INLINE Page page_after(const Attention* a, int64_t token, int64_t kv_head, int64_t number) {
  if (number == a->positions[token] / a->page_size) {
    number = 0;
    if (++token == a->tokens) token = 0, kv_head++;
    if (kv_head == a->kv_heads || a->positions[token] < 0) return (Page){0};
  }
  return page_at(a, row_of(a, token), kv_head, number, 0, a->positions[token]);
}

/* Slot `slot` of keys or values, into the second-level cache. */
INLINE void fetch(const float* from, int64_t slot, int64_t dim) {
  for (int64_t c = 0; c < dim; c += LINE) __builtin_prefetch(from + slot * dim + c, 0, 2);
}

INLINE void few(const Attention* a, int64_t token, int64_t kv_head, int64_t h, int count, int64_t dim) {
  int64_t row = row_of(a, token), last = a->positions[token], vectors = dim / VL;
  int64_t first = a->window > 0 ? MAX(last - a->window + 1, 0) : 0;
  float q[FEW * MAX_DIM], sums[FEW * MAX_DIM];
  for (int64_t i = 0; i < count * dim; i++) q[i] = a->q[(h * dim + i) * a->tokens + token] * a->scale, sums[i] = 0;
  float top[FEW], total[FEW];
  for (int g = 0; g < count; g++) top[g] = -INFINITY, total[g] = 0;
  for (int64_t number = first / a->page_size; number <= last / a->page_size; number++) {
    Page whole = page_at(a, row, kv_head, number, first, last), after = page_after(a, token, kv_head, number);
    int seen = whole.end - whole.begin, pace = (after.end + seen - 1) / seen;
    for (int from = whole.begin; from < whole.end; from += SLOTS) {
      int size = MIN(SLOTS, whole.end - from);
      float scores[FEW][SLOTS + VL];
      for (int s = 0; s < size; s++) {
        const float* k = whole.k + (from + s) * dim;
        vec products[FEW];
#pragma GCC unroll 8
        for (int g = 0; g < count; g++) products[g] = (vec){0};
#pragma GCC unroll 4
        for (int64_t c = 0; c < vectors; c++) {
          vec key = load(k + c * VL);
#pragma GCC unroll 8
          for (int g = 0; g < count; g++) products[g] += key * load(q + g * dim + c * VL);
        }
#pragma GCC unroll 8
        for (int g = 0; g < count; g++) scores[g][s] = sum_of(products[g]);
        fetch(whole.v, from + s, dim);
      }
#pragma GCC unroll 8
      for (int g = 0; g < count; g++) {
        for (int s = size; s < size + VL; s++) scores[g][s] = -INFINITY;
        vec high = splat(top[g]);
        for (int s = 0; s < size; s += VL) high = larger(high, load(scores[g] + s));
        float now = high[0];
        for (int i = 1; i < VL; i++) now = MAX(now, high[i]);
        float shrink = expf(top[g] - now);
        vec sum = {0};
        for (int s = 0; s < size; s += VL) {
          vec score = load(scores[g] + s);
          vec weight = exponential(score - splat(now));
          weight = pick(score == splat(-INFINITY), (vec){0}, weight);
          store(scores[g] + s, weight);
          sum += weight;
        }
        total[g] = total[g] * shrink + sum_of(sum);
        top[g] = now;
        for (int64_t c = 0; c < vectors; c++)
          store(sums + g * dim + c * VL, load(sums + g * dim + c * VL) * splat(shrink));
      }
      for (int64_t c = 0; c < vectors; c += 2) {
        int pair = c + 1 < vectors;
        vec part[FEW], other[FEW];
#pragma GCC unroll 8
        for (int g = 0; g < count; g++) part[g] = other[g] = (vec){0};
        if (pair)
          for (int s = 0; s < size; s++) {
            vec value = load(whole.v + (from + s) * dim + c * VL);
            vec next = load(whole.v + (from + s) * dim + (c + 1) * VL);
            int slot = (from - whole.begin + s) * pace;
            for (int i = slot; !c && i < MIN(slot + pace, after.end); i++) fetch(after.k, i, dim);
#pragma GCC unroll 8
            for (int g = 0; g < count; g++) {
              vec weight = splat(scores[g][s]);
              part[g] += weight * value;
              other[g] += weight * next;
            }
          }
        else
          for (int s = 0; s < size; s++) {
            vec value = load(whole.v + (from + s) * dim + c * VL);
#pragma GCC unroll 8
            for (int g = 0; g < count; g++) part[g] += splat(scores[g][s]) * value;
          }
#pragma GCC unroll 8
        for (int g = 0; g < count; g++) {
          float* to = sums + g * dim + c * VL;
          store(to, load(to) + part[g]);
          if (pair) store(to + VL, load(to + VL) + other[g]);
        }
      }
    }
  }
  for (int g = 0; g < count; g++) {
    float share = 1 / total[g];
    for (int64_t c = 0; c < dim; c++) a->out[((h + g) * dim + c) * a->tokens + token] = sums[g * dim + c] * share;
  }
}

#define FEW_QUERIES(n)                                                                                        \
  static void few_##n(const Attention* a, int64_t token, int64_t kv_head, int64_t h) {                        \
    if (a->dim == 64)                                                                                         \
      few(a, token, kv_head, h, n, 64);                                                                       \
    else                                                                                                      \
      few(a, token, kv_head, h, n, a->dim);                                                                   \
  }
FEW_QUERIES(1)
FEW_QUERIES(2)
FEW_QUERIES(3)
FEW_QUERIES(4)
FEW_QUERIES(8)

static void token_alone(const Attention* a, int64_t token, int64_t kv_head) {
  int64_t group = a->heads / a->kv_heads, h = kv_head * group, end = h + group;
  while (h < end) {
    int64_t left = end - h;
    if (left >= 8)
      few_8(a, token, kv_head, h), h += 8;
    else if (left >= 4)
      few_4(a, token, kv_head, h), h += 4;
    else if (left == 3)
      few_3(a, token, kv_head, h), h += 3;
    else if (left == 2)
      few_2(a, token, kv_head, h), h += 2;
    else
      few_1(a, token, kv_head, h), h += 1;
  }
}

/* --- tiles of queries: tokens `begin` .. `end` - 1, which stand in one row --- */

/* out [m, TILE] += left [m, depth] @ right [depth, TILE]; strides in floats. */
INLINE void tile_product(
    float* out, const float* left, int64_t of_row, int64_t of_depth, const float* right, int64_t depth, int m) {
  vec sums[REGISTERS];
#pragma GCC unroll 32
  for (int r = 0; r < m; r++) {
    sums[2 * r] = load(out + r * TILE);
    sums[2 * r + 1] = load(out + r * TILE + VL);
  }
  for (int64_t k = 0; k < depth; k++) {
    vec first = load(right + k * TILE), second = load(right + k * TILE + VL);
#pragma GCC unroll 32
    for (int r = 0; r < m; r++) {
      vec value = splat(left[r * of_row + k * of_depth]);
      sums[2 * r] += value * first;
      sums[2 * r + 1] += value * second;
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < m; r++) {
    store(out + r * TILE, sums[2 * r]);
    store(out + r * TILE + VL, sums[2 * r + 1]);
  }
}

#if REGISTERS == 32
#define TALL 12
#else
#define TALL 6
#endif

static void products(
    float* out, const float* left, int64_t rows, int64_t of_row, int64_t of_depth, const float* right, int64_t depth) {
  int64_t r = 0;
  for (; r + TALL <= rows; r += TALL)
    tile_product(out + r * TILE, left + r * of_row, of_row, of_depth, right, depth, TALL);
  for (; r + 4 <= rows; r += 4)
    tile_product(out + r * TILE, left + r * of_row, of_row, of_depth, right, depth, 4);
  for (; r < rows; r++) tile_product(out + r * TILE, left + r * of_row, of_row, of_depth, right, depth, 1);
}

static void tile(const Attention* a, int64_t begin, int64_t end, int64_t kv_head, int64_t h, int64_t count) {
  int64_t dim = a->dim, row = row_of(a, begin), queries = (end - begin) * count;
  float q[MAX_DIM * TILE] __attribute__((aligned(64))), sums[MAX_DIM * TILE] __attribute__((aligned(64)));
  float scores[SLOTS * TILE] __attribute__((aligned(64)));
  int32_t seen[TILE], unseen[TILE];
  int64_t first = INT64_MAX, last = 0;
  memset(q, 0, dim * TILE * sizeof(float));
  memset(sums, 0, dim * TILE * sizeof(float));
  for (int j = 0; j < TILE; j++) {
    int64_t token = begin + MIN(j, queries - 1) / count;
    int64_t position = a->positions[token];
    seen[j] = (int32_t)position;
    unseen[j] = a->window > 0 ? (int32_t)MAX(position - a->window, -1) : -1;
    first = MIN(first, unseen[j] + 1);
    last = MAX(last, position);
    if (j < queries) {
      const float* from = a->q + (h + j % count) * dim * a->tokens + token;
      for (int64_t c = 0; c < dim; c++) q[c * TILE + j] = from[c * a->tokens] * a->scale;
    }
  }
  vec top[2] = {splat(-INFINITY), splat(-INFINITY)}, total[2] = {{0}, {0}};
  for (int64_t number = first / a->page_size; number <= last / a->page_size; number++) {
    Page whole = page_at(a, row, kv_head, number, first, last);
    for (int from = whole.begin; from < whole.end; from += SLOTS) {
      int size = MIN(SLOTS, whole.end - from);
      memset(scores, 0, size * TILE * sizeof(float));
      products(scores, whole.k + from * dim, size, dim, 1, q, dim);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        ivec upper = *(const ivec*)(seen + half * VL), lower = *(const ivec*)(unseen + half * VL);
        vec high = top[half];
        for (int s = 0; s < size; s++) {
          ivec place = (ivec){0} + (int32_t)(whole.start + from + s);
          vec score = load(scores + s * TILE + half * VL);
          score = pick((place <= upper) & (place > lower), score, splat(-INFINITY));
          store(scores + s * TILE + half * VL, score);
          high = larger(high, score);
        }
        /* A query that has seen nothing yet keeps zeros. */
        vec base = pick(high == splat(-INFINITY), (vec){0}, high);
        vec shrink = pick(top[half] == splat(-INFINITY), (vec){0}, exponential(top[half] - base));
        vec sum = {0};
        for (int s = 0; s < size; s++) {
          vec score = load(scores + s * TILE + half * VL);
          vec weight = pick(score == splat(-INFINITY), (vec){0}, exponential(score - base));
          store(scores + s * TILE + half * VL, weight);
          sum += weight;
        }
        total[half] = total[half] * shrink + sum;
        top[half] = high;
        for (int64_t c = 0; c < dim; c++)
          store(sums + c * TILE + half * VL, load(sums + c * TILE + half * VL) * shrink);
      }
      products(sums, whole.v + from * dim, dim, 1, dim, scores, size);
    }
  }
  for (int64_t j = 0; j < queries; j++) {
    float* to = a->out + (h + j % count) * dim * a->tokens + begin + j / count;
    float share = 1 / total[j / VL][j % VL];
    for (int64_t c = 0; c < dim; c++) to[c * a->tokens] = sums[c * TILE + j] * share;
  }
}

/* --- work --- */

/* One K/V head of one block of tokens; tokens in order, since neighbours' queries share lines. */
static void item(int64_t number, void* argument) {
  const Attention* a = argument;
  int64_t kv_head = number / a->blocks, token = number % a->blocks * a->block;
  int64_t stop = MIN(token + a->block, a->tokens), group = a->heads / a->kv_heads, dim = a->dim;
  while (token < stop) {
    if (a->positions[token] < 0) {
      for (int64_t i = 0; i < group * dim; i++) a->out[(kv_head * group * dim + i) * a->tokens + token] = 0;
      token++;
      continue;
    }
    int64_t most = MAX(TILE / group, 1), end = token + 1;
    /* Only tokens in order: between windows that lie apart there are slots that nobody may look at. */
    while (end < stop && end - token < most && row_of(a, end) == row_of(a, token) &&
           a->positions[end] == a->positions[end - 1] + 1)
      end++;
    if (end - token == 1 || dim % VL) {
      end = token + 1;
      if (dim % VL == 0) {
        token_alone(a, token, kv_head);
        token = end;
        continue;
      }
    }
    for (int64_t h = 0; h < group; h += TILE)
      tile(a, token, end, kv_head, kv_head * group + h, MIN(group - h, TILE));
    token = end;
  }
}

/* Operands q, k_pages, v_pages, page_table, rows (of no elements where each token has its own), positions; attributes layer, scale, window (0: none). */
XLA_FFI_Error* eejax_paged_attention(XLA_FFI_CallFrame* call) {
  if (is_question(call)) return NULL;
  const XLA_FFI_Buffer *q = argument(call, 0), *k = argument(call, 1), *v = argument(call, 2), *table = argument(call, 3);
  const XLA_FFI_Buffer* rows = argument(call, 4);
  int64_t layer = *(const int64_t*)attribute(call, 0);
  Attention a = {
      .q = q->data,
      .page_table = table->data,
      .rows = rows->dims[0] ? rows->data : NULL,
      .positions = argument(call, 5)->data,
      .out = result(call, 0)->data,
      .tokens = q->dims[2],
      .heads = q->dims[0],
      .dim = q->dims[1],
      .pages = k->dims[1],
      .kv_heads = k->dims[2],
      .page_size = k->dims[3],
      .table_width = table->dims[1],
      .scale = (float)*(const double*)attribute(call, 1),
      .window = *(const int64_t*)attribute(call, 2),
  };
  int64_t offset = layer * a.pages * a.kv_heads * a.page_size * a.dim;
  a.k_pages = (const float*)k->data + offset;
  a.v_pages = (const float*)v->data + offset;
  int64_t group = a.heads / a.kv_heads;
  a.block = MAX(TILE / group, 1);
  a.blocks = (a.tokens + a.block - 1) / a.block;
  /* Decoding: a row by itself, since one may be much longer than the others. Threads must not decide it: a token's
  result is the same to the bit however many there are. */
  if (a.blocks * a.kv_heads < 32) a.block = 1, a.blocks = a.tokens;
  parallel_for(call, a.blocks * a.kv_heads, item, &a);
  return NULL;
}

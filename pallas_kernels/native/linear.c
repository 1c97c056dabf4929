/* out [O, N] = weight [O, K] @ x [K, N], float32, row-major, with what comes before and after a product in a block:
RMS norm of x's columns, SwiGLU's gate, a residual to add. The weight is read once, at the memory's pace if it can be.

Few columns: inner products along K, several rows of the weight against all columns at once (x is transposed first).
More: panels of columns as wide as two vectors, every weight broadcast to them; panels are copied one after another
where x has more columns than one panel, and a few columns that are left over take inner products again. Both keep a tile
of results in registers through the whole of K. Many columns go to tiles.c where the processor has AMX.

Where only some columns are computed, these are copied as if there were no others, and their results go to their places. */

#include <math.h>

#include "columns.h"
#include "product.h"

/* Columns up to which inner products are used: a panel would be mostly empty. */
#define NARROW 8
/* The same for columns that are left over after whole vectors: the weight is in the cache then, so a panel costs less. */
#define FEW_LEFT 4
/* Bytes of weight of one work item: fits the second-level cache beside a panel of x. */
#define ITEM_BYTES (256 * 1024)
/* A tile of panels holds TALL x 2 vectors or TALLER x 1. */
#if REGISTERS == 32
#define TALL 12
#define TALLER 24
#else
#define TALL 6
#define TALLER 12
#endif

/* Floats from one transposed column to the next: the depth and one vector more, or all columns would share a set of the
cache. */
INLINE int64_t stride_of(const Product* p) { return p->depth + VL; }

/* x is read in place if it is one column or one whole panel, and is not normed; it is copied otherwise. */
INLINE int copies(const Product* p) {
  if (p->norm || p->list) return 1;
  return p->columns <= NARROW ? p->width != 1 : p->columns != VL && p->columns != PANEL;
}

/* Columns that are left over after whole vectors, where they are so few that another vector would be mostly empty. */
INLINE int64_t left_over(const Product* p) {
  int64_t left = p->columns % VL;
  return p->columns > VL && left <= FEW_LEFT ? left : 0;
}

/* Columns of a buffer of results with room for every vector that a panel writes. */
INLINE int64_t padded_columns(const Product* p) {
  int64_t left = p->columns <= NARROW ? p->columns : left_over(p);
  return (p->columns - left + VL - 1) / VL * VL + left;
}

/* The product of the columns that are left over. */
INLINE Product product_left(const Product* p) {
  Product left = *p;
  int64_t from = p->columns - (left.columns = left_over(p));
  left.scratch += from * p->depth;
  if (p->list)
    left.list += from;
  else
    left.x += from;
  return left;
}

/* From column `from` on, of those that are computed. */
INLINE Out from_column(Out out, int64_t from) {
  if (out.list) {
    out.list += from;
  } else {
    out.to += from;
    if (out.add) out.add += from;
  }
  return out;
}

/* From row `o` on. */
INLINE Out below(Out out, int64_t o) {
  out.to += o * out.stride;
  if (out.add) out.add += o * out.stride;
  return out;
}

/* --- few columns --- */

#if defined(__AVX512F__)
/* Halves that pairs of vectors keep of their sums; four rounds, and each lane is the sum of a vector. */
INLINE vec halves(vec a, vec b, int distance) {
  static const int32_t lanes[4][2][16] = {
      {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}},
      {{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}, {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}},
      {{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}},
      {{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}, {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}}};
  __m512i low = _mm512_loadu_si512(lanes[distance][0]), high = _mm512_loadu_si512(lanes[distance][1]);
  return (vec)_mm512_permutex2var_ps((__m512)a, low, (__m512)b) + (vec)_mm512_permutex2var_ps((__m512)a, high, (__m512)b);
}

/* The sums of `count` vectors. */
INLINE void sums_of(float* to, vec* sums, int count) {
#pragma GCC unroll 2
  for (int from = 0; from < count; from += VL) {
    vec v[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) v[i] = from + i < count ? sums[from + i] : (vec){0};
#pragma GCC unroll 4
    for (int round = 0, half = 8; round < 4; round++, half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; i++)
        if (from + i < count) v[i] = halves(v[i], v[i + half], round);
    store(to + from, v[0]);
  }
}
#else
INLINE void sums_of(float* to, vec* sums, int count) {
#pragma GCC unroll 32
  for (int i = 0; i < count; i++) to[i] = sum_of(sums[i]);
}
#endif

/* `m` rows of the weight by `n` columns of x, transposed. */
INLINE void inner_products(
    const float* weight,
    const float* x,
    Out out,
    int64_t depth,
    int64_t stride,
    int m,
    int n) {
  vec sums[REGISTERS];
#pragma GCC unroll 32
  for (int i = 0; i < m * n; i++) sums[i] = (vec){0};
  int64_t k = 0;
  for (; k + VL <= depth; k += VL) {
    vec w[REGISTERS];
#pragma GCC unroll 32
    for (int r = 0; r < m; r++) {
      w[r] = load(weight + r * depth + k);
      __builtin_prefetch(weight + (r + m) * depth + k, 0, 3);
      /* The fewer rows, the sooner the next ones are needed: what is still in memory has to be fetched earlier. */
      if (n > NARROW / 2) __builtin_prefetch(weight + (r + 3 * m) * depth + k, 0, 2);
    }
#pragma GCC unroll 32
    for (int c = 0; c < n; c++) {
      vec column = load(x + c * stride + k);
#pragma GCC unroll 32
      for (int r = 0; r < m; r++) sums[r * n + c] += w[r] * column;
    }
  }
  float totals[REGISTERS];
  sums_of(totals, sums, m * n);
  for (; k < depth; k++)
#pragma GCC unroll 32
    for (int i = 0; i < m * n; i++) totals[i] += weight[i / n * depth + k] * x[i % n * stride + k];
#pragma GCC unroll 32
  for (int r = 0; r < m; r++)
#pragma GCC unroll 32
    for (int c = 0; c < n; c++) {
      int64_t at = r * out.stride + (out.list ? out.list[c] : c);
      out.to[at] = out.add ? out.add[at] + totals[r * n + c] : totals[r * n + c];
    }
}

/* Transposes x: its n columns one after another, normed if x is to be. */
INLINE void turn(const Product* p, int n) {
  int64_t depth = p->depth, width = p->width, stride = stride_of(p), places[NARROW];
  const float* x = p->x;
  float* to = p->scratch;
  for (int c = 0; c < n; c++) places[c] = p->list ? p->list[c] : c;
  for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 8
    for (int c = 0; c < n; c++) to[c * stride + k] = x[k * width + places[c]];
  for (int c = 0; p->norm && c < n; c++, to += stride) {
    vec sums[4] = {{0}};
    int64_t k = 0;
    for (; k + 4 * VL <= depth; k += 4 * VL)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sums[i] += load(to + k + i * VL) * load(to + k + i * VL);
    float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; k < depth; k++) sum += to[k] * to[k];
    float factor = 1 / sqrtf(sum / depth + p->eps);
    for (k = 0; k + VL <= depth; k += VL) store(to + k, load(to + k) * splat(factor) * load(p->norm + k));
    for (; k < depth; k++) to[k] *= factor * p->norm[k];
  }
}

typedef void Turn(const Product* p);

#define NARROW_TILES(m, n)                                                                                   \
  for (; o + m <= rows; o += m)                                                                              \
    inner_products(weight + o * depth, x, below(out, o), depth, stride, m, n);
#define NARROW_ROWS(n, m)                                                                                     \
  static void turn_##n(const Product* p) { turn(p, n); }                                                      \
  static void narrow_##n(const Product* p, const float* weight, Out out, int64_t rows, const float* next) {   \
    (void)next;                                                                                               \
    const float* x = copies(p) ? p->scratch : p->x;                                                           \
    int64_t o = 0, depth = p->depth, stride = stride_of(p);                                                   \
    NARROW_TILES(m, n)                                                                                        \
    NARROW_TILES(1, n)                                                                                        \
  }
#if REGISTERS == 32
NARROW_ROWS(1, 8)
NARROW_ROWS(2, 8)
NARROW_ROWS(3, 6)
NARROW_ROWS(4, 6)
NARROW_ROWS(5, 4)
NARROW_ROWS(6, 4)
NARROW_ROWS(7, 3)
NARROW_ROWS(8, 3)
#else
NARROW_ROWS(1, 4)
NARROW_ROWS(2, 4)
NARROW_ROWS(3, 3)
NARROW_ROWS(4, 2)
NARROW_ROWS(5, 2)
NARROW_ROWS(6, 2)
NARROW_ROWS(7, 1)
NARROW_ROWS(8, 1)
#endif
static Turn* const turns[] = {turn_1, turn_2, turn_3, turn_4, turn_5, turn_6, turn_7, turn_8};
static Rows* const narrow_rows[] = {
    narrow_1, narrow_2, narrow_3, narrow_4, narrow_5, narrow_6, narrow_7, narrow_8};

/* --- panels --- */

/* `m` rows of the weight by a panel of `n` vectors, of which `width` columns exist; `places` are their columns in
`out`, where it has a list. `ahead`: the weight to prefetch, if it is not in the cache yet. */
INLINE void broadcast_products(
    const float* weight,
    const float* x,
    Out out,
    const Columns* places,
    int64_t depth,
    int64_t width,
    int m,
    int n,
    const float* ahead) {
  vec sums[REGISTERS];
  int64_t stride = n * VL, whole = depth / VL * VL;
#pragma GCC unroll 32
  for (int i = 0; i < m * n; i++) sums[i] = (vec){0};
  /* A block of VL columns of the weight is copied aside before it is broadcast: its lines are read once and whole. */
  _Alignas(64) float staged[2][REGISTERS * VL];
  if (whole)
#pragma GCC unroll 32
    for (int r = 0; r < m; r++) store(staged[0] + r * VL, load(weight + r * depth));
  for (int64_t block = 0; block < whole; block += VL) {
    const float* now = staged[block / VL % 2];
    float* next = staged[(block / VL + 1) % 2];
    if (block + VL < whole)
#pragma GCC unroll 32
      for (int r = 0; r < m; r++) store(next + r * VL, load(weight + r * depth + block + VL));
#pragma GCC unroll 16
    for (int k = 0; k < VL; k++) {
      vec row[2];
      /* m lines a block, spread over it. */
      if (ahead)
#pragma GCC unroll 2
        for (int line = k * m / VL; line < (k + 1) * m / VL; line++)
          __builtin_prefetch(ahead + block * m + line * VL, 0, 2);
#pragma GCC unroll 2
      for (int c = 0; c < n; c++) row[c] = load(x + (block + k) * stride + c * VL);
#pragma GCC unroll 32
      for (int r = 0; r < m; r++) {
        vec w = splat(now[r * VL + k]);
#pragma GCC unroll 2
        for (int c = 0; c < n; c++) sums[r * n + c] += w * row[c];
      }
    }
  }
  for (int64_t k = whole; k < depth; k++)
#pragma GCC unroll 32
    for (int r = 0; r < m; r++)
#pragma GCC unroll 2
      for (int c = 0; c < n; c++) sums[r * n + c] += splat(weight[r * depth + k]) * load(x + k * stride + c * VL);
#pragma GCC unroll 32
  for (int r = 0; r < m; r++) {
    float* to = out.to + r * out.stride;
    const float* add = out.add ? out.add + r * out.stride : NULL;
    if (out.list) {
      scatter_columns(to, add, sums + r * n, n, places);
    } else if (width == n * VL || out.spare) {
#pragma GCC unroll 2
      for (int c = 0; c < n; c++) {
        vec sum = sums[r * n + c];
        if (add) sum += load(add + c * VL);
        store(to + c * VL, sum);
      }
    } else {
      float line[PANEL];
#pragma GCC unroll 2
      for (int c = 0; c < n; c++) store(line + c * VL, sums[r * n + c]);
      for (int64_t c = 0; add && c < width; c++) line[c] += add[c];
      memcpy(to, line, width * sizeof(float));
    }
  }
}

#define PANEL_TILES(m, n, fetch)                                                                              \
  for (; o + m <= rows; o += m) {                                                                             \
    const float *tile = weight + o * depth, *ahead = o + m < rows ? tile + m * depth : next;                  \
    broadcast_products(tile, x, below(out, o), &places, depth, width, m, n, fetch ? ahead : NULL);            \
  }
#define PANEL_ROWS(name, tall, n, fetch)                                                                      \
  static void name(                                                                                           \
      const Product* p, const float* weight, const float* x, Out out, int64_t rows, int64_t width,            \
      const float* next) {                                                                                    \
    int64_t o = 0, depth = p->depth;                                                                          \
    Columns places = {.count = 0};                                                                            \
    if (out.list) find_columns(&places, out.list, width);                                                     \
    PANEL_TILES(tall, n, fetch)                                                                               \
    PANEL_TILES(tall / 3, n, fetch)                                                                           \
    PANEL_TILES(1, n, fetch)                                                                                  \
  }
PANEL_ROWS(slim_panel, TALLER, 1, 1)
PANEL_ROWS(wide_panel, TALL, 2, 1)
PANEL_ROWS(next_panel, TALL, 2, 0)

static void panel_rows(const Product* p, const float* weight, Out out, int64_t rows, const float* next) {
  Product left = product_left(p);
  int64_t whole = p->columns - left.columns;
  for (int64_t from = 0; from < whole; from += PANEL) {
    int64_t width = MIN(whole - from, PANEL);
    const float* x = copies(p) ? p->scratch + from * p->depth : p->x;
    (width <= VL ? slim_panel : from ? next_panel : wide_panel)(p, weight, x, from_column(out, from), rows, width, next);
  }
  if (left.columns) narrow_rows[left.columns - 1](&left, weight, from_column(out, whole), rows, next);
}

/* RMS norm of a panel of `n` vectors. */
INLINE void norm_panel(const Product* p, float* panel, int n) {
  vec sums[2][2] = {{{0}}};
  int64_t depth = p->depth;
  for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 2
    for (int c = 0; c < n; c++) {
      vec value = load(panel + (k * n + c) * VL);
      sums[k % 2][c] += value * value;
    }
#pragma GCC unroll 2
  for (int c = 0; c < n; c++) {
    vec sum = sums[0][c] + sums[1][c];
    for (int i = 0; i < VL; i++) sum[i] = 1 / sqrtf(sum[i] / depth + p->eps);
    sums[0][c] = sum;
  }
  for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 2
    for (int c = 0; c < n; c++) {
      float* at = panel + (k * n + c) * VL;
      store(at, load(at) * sums[0][c] * splat(p->norm[k]));
    }
}

/* The columns of x from `begin` on, as a panel of `n` vectors, filled up with zeros. */
INLINE void copy_panel(const Product* p, int64_t begin, int64_t width, int n) {
  int64_t depth = p->depth;
  float *to = p->scratch + begin * depth, line[PANEL + VL] = {0};
  Columns places = {.count = 0};
  if (p->list) find_columns(&places, p->list + begin, width);
  for (int64_t k = 0; k < depth; k++, to += n * VL) {
    const float* x = p->x + k * p->width;
    if (p->list && k + 1 < depth) {
      store(to + (n - 1) * VL, (vec){0});
      gather_columns(to, x, &places);
    } else if (!p->list && width == n * VL) {
#pragma GCC unroll 2
      for (int c = 0; c < n; c++) store(to + c * VL, load(x + begin + c * VL));
    } else {
      p->list ? gather_columns(line, x, &places) : (void)memcpy(line, x + begin, width * sizeof(float));
#pragma GCC unroll 2
      for (int c = 0; c < n; c++) store(to + c * VL, load(line + c * VL));
    }
  }
  if (p->norm) norm_panel(p, p->scratch + begin * depth, n);
}

static void copy_columns(int64_t item, void* argument) {
  const Product* p = argument;
  int64_t begin = item * PANEL, width = MIN(p->columns - left_over(p) - begin, PANEL);
  if (width <= VL)
    copy_panel(p, begin, width, 1);
  else
    copy_panel(p, begin, width, 2);
}

/* --- work --- */

INLINE int is_tiled(const Product* p) { return p->columns >= FEWEST_TILED && !p->list && tiles_usable(); }

void product_rows(const Product* p, const float* weight, Out out, int64_t rows, const float* next) {
  Rows* run = p->columns <= NARROW ? narrow_rows[p->columns - 1] : is_tiled(p) ? tile_rows : panel_rows;
  run(p, weight, out, rows, next);
}

void choose_columns(Product* p, const XLA_FFI_Buffer* active, int32_t* list) {
  const uint8_t* flags = active->data;
  p->columns = p->width;
  if (!active->dims[0]) return;
  p->columns = 0;
  for (int64_t c = 0; c < p->width; c++)
    if (flags[c]) list[p->columns++] = (int32_t)c;
  p->list = p->columns < p->width ? list : NULL;
}

/* Copies x to the scratch, in the form in which it is multiplied. */
static void copy(const XLA_FFI_CallFrame* call, Product* p) {
  if (!p->columns) return;
  if (is_tiled(p)) {
    tile_columns(call, p);
  } else if (copies(p) && p->columns <= NARROW) {
    turns[p->columns - 1](p);
  } else if (copies(p)) {
    parallel_for(call, (p->columns - left_over(p) + PANEL - 1) / PANEL, copy_columns, p);
    Product left = product_left(p);
    if (left.columns) turns[left.columns - 1](&left);
  }
}

static void divide(const XLA_FFI_CallFrame* call, Product* p) {
  p->items = 0;
  if (!p->columns || !p->rows) return;
  int narrow = p->columns <= NARROW, tiled = is_tiled(p);
  /* Several items for each thread, so that others take over the share of one that is held up; but no tiny ones. */
  int64_t row_bytes = MAX(p->depth, 1) * (int64_t)sizeof(float) * (p->gates ? 2 : 1);
  int64_t tile = narrow ? 24 : tiled ? TILED_ROWS : p->columns <= VL ? TALLER : TALL * 2;
  int64_t most = (tiled ? TILED_ITEM_BYTES : ITEM_BYTES) / row_bytes, least = (narrow ? 32 : 16) * 1024 / row_bytes;
  int64_t share = p->rows / (4 * thread_count(call));
  p->rows_of_item = (MAX(MIN(most, share), MAX(least, 1)) + tile - 1) / tile * tile;
  p->items = (p->rows + p->rows_of_item - 1) / p->rows_of_item;
}

void prepare_product(const XLA_FFI_CallFrame* call, Product* p) {
  copy(call, p);
  divide(call, p);
}

INLINE int same_columns(const Product* p, const Product* q) {
  if (p->columns != q->columns || !p->list != !q->list) return 0;
  return !p->list || !memcmp(p->list, q->list, p->columns * sizeof(int32_t));
}

/* SwiGLU: the gate's rows come before those that it multiplies. Results of both are kept together until they are
multiplied and written to their places. */
static void gated_rows(const Product* p, int64_t begin, int64_t rows) {
  int64_t n = p->list ? padded_columns(p) : p->columns, i = 0, count = rows * n;
  float *gates = p->gates + begin * n, *values = p->list ? gates + p->rows * n : p->out + begin * n;
  product_rows(p, p->weight + begin * p->depth, (Out){.to = gates, .stride = n, .spare = p->list != NULL}, rows, p->weight + (p->rows + begin) * p->depth);
  product_rows(p, p->weight + (p->rows + begin) * p->depth, (Out){.to = values, .stride = n, .spare = p->list != NULL}, rows, p->weight + (begin + rows) * p->depth);
  for (; i + VL <= count; i += VL) store(values + i, silu(load(gates + i)) * load(values + i));
  for (; i < count; i++) values[i] *= silu(splat(gates[i]))[0];
  for (int64_t from = 0; p->list && from < p->columns; from += PANEL) {
    Columns places;
    find_columns(&places, p->list + from, MIN(p->columns - from, PANEL));
    for (int64_t r = 0; r < rows; r++)
      scatter_columns(p->out + (begin + r) * p->width, NULL, (vec*)(values + r * n + from), 2, &places);
  }
}

static void item(int64_t number, void* argument) {
  const Product* p = argument;
  if (number >= p->items) number -= p++->items;
  int64_t begin = number * p->rows_of_item, rows = MIN(p->rows_of_item, p->rows - begin);
  if (p->gates) {
    gated_rows(p, begin, rows);
    return;
  }
  int64_t at = begin * p->width;
  Out out = {p->out + at, p->residual ? p->residual + at : NULL, p->width, p->list};
  product_rows(p, p->weight + begin * p->depth, out, rows, p->weight + (begin + rows) * p->depth);
}

/* Operands weight, x, norm (of no elements where there is none), residual (likewise), active (of no elements where all
columns are computed), a second weight of the same x (of no rows where there is none) and the columns active in its
product; results out (the residual's memory, if there is one and not all columns are computed), that of the second
weight, scratch (at its end two lists of columns); attributes eps, gated. */
XLA_FFI_Error* eejax_linear(XLA_FFI_CallFrame* call) {
  if (is_question(call)) return NULL;
  const XLA_FFI_Buffer *weight = argument(call, 0), *x = argument(call, 1), *norm = argument(call, 2);
  const XLA_FFI_Buffer *residual = argument(call, 3), *active = argument(call, 4), *second = argument(call, 5);
  const XLA_FFI_Buffer *active_in_second = argument(call, 6), *out = result(call, 0), *scratch = result(call, 2);
  Product both[2] = {{
      .weight = weight->data,
      .x = x->data,
      .norm = norm->dims[0] ? norm->data : NULL,
      .residual = residual->dims[0] ? residual->data : NULL,
      .out = out->data,
      .scratch = scratch->data,
      .rows = out->dims[0],
      .depth = weight->dims[1],
      .width = x->dims[1],
      .eps = (float)*(const double*)attribute(call, 0),
  }};
  Product *p = both, *other = both + 1;
  int32_t* lists = (int32_t*)(p->scratch + scratch->dims[0]) - 2 * p->width;
  *other = *p;
  other->weight = second->data, other->out = result(call, 1)->data, other->rows = second->dims[0];
  if (*(const int64_t*)attribute(call, 1)) {
    p->gates = p->scratch;
    p->scratch += p->rows * (active->dims[0] ? 2 * ((p->width + PANEL - 1) / PANEL * PANEL) : p->width);
  }
  choose_columns(p, active, lists);
  prepare_product(call, p);
  if (other->rows) {
    choose_columns(other, active_in_second, lists + p->width);
    if (!same_columns(p, other)) {
      other->scratch += (scratch->dims[0] - 2 * p->width) / 2;
      copy(call, other);
    }
  }
  divide(call, other);
  parallel_for(call, p->items + other->items, item, both);
  return NULL;
}

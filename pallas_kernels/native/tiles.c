/* float32 products on AMX, whose tiles multiply bfloat16 and sum in float32.

A float32 is the sum of three bfloat16, 8 bits of its significand each, and exactly so: a = a1 + a2 + a3. Of the nine
products of two such sums, the six that reach a float32's precision are summed: a1 b1, a1 b2, a2 b1, a2 b2, a1 b3, a3 b1
(Henry, Tang, Heinecke: "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
arXiv 1904.06376). What is left out is below 2^-21 of a product, and 2^-24 on average: less than sums lose by rounding,
which is done less often here than by multiply-adds. Infinities become NaN, and numbers below 1e-38 zero. */

#include "product.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)

#include <math.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A tile: SIDE rows of 64 bytes, bfloat16 in pairs or float32. A block: what one multiplication takes of the depth. */
#define SIDE 16
#define BLOCK 32
#define PARTS 3
#define TILE (SIDE * BLOCK)
#define BLOCK_PARTS (PARTS * TILE)
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define TILE_LOAD(t, from) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"((int64_t)64) : "memory")
/* Two tiles are side by side in a row. */
#define TILE_STORE(t, to) \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(2 * 64)) : "memory")
/* c += a b */
#define TILE_MULTIPLY(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

typedef uint16_t bf16;

/* Linux gives a process its tiles when it asks for them. */
int tiles_usable(void) {
  static _Atomic int known; /* 1: no, 2: yes */
  if (!known) {
    const char* wish = getenv("EEJAX_AMX");
    int refused = wish && !strcmp(wish, "off");
    known = refused || syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) ? 1 : 2;
  }
  return known == 2;
}

static void begin_tiles(void) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = SIDE;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

static void end_tiles(void) { __asm__ volatile("tilerelease"); }

/* 32 numbers to one row of each part's tile; element i of the first vector and of the second become a pair. */
INLINE void split(__m512 first, __m512 second, bf16* to) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
#pragma GCC unroll 3
  for (int part = 0; part < PARTS; part++) {
    __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
    _mm512_store_si512(to + part * TILE, _mm512_mask_mov_epi16(b, 0x55555555, _mm512_srli_epi32(a, 16)));
    first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_and_si512(a, upper)));
    second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
  }
}

/* Which of the next 16 numbers exist where `left` do. */
INLINE __mmask16 first_of(int64_t left) { return left >= SIDE ? 0xffff : left > 0 ? (1 << left) - 1 : 0; }

/* --- the weight --- */

INLINE int64_t blocks_of(const Product* p) { return (p->depth + BLOCK - 1) / BLOCK; }

/* Two tiles' rows of the weight, block by block, the second tile's parts `tile` after the first one's. Rows after the
last repeat it, so that they are numbers. */
static void split_weight(const Product* p, const float* weight, int64_t rows, bf16* to, int64_t tile) {
  int64_t depth = p->depth;
  const float* ahead = weight + 2 * SIDE * depth;
  for (int64_t k = 0; k < depth; k += BLOCK, to += BLOCK_PARTS) {
    __mmask16 first = first_of(depth - k), second = first_of(depth - k - SIDE);
    for (int r = 0; r < 2 * SIDE; r++, ahead += BLOCK) {
      const float* row = weight + MIN(r, rows - 1) * depth + k;
      __m512 a = _mm512_maskz_loadu_ps(first, row), b = _mm512_maskz_loadu_ps(second, row + SIDE);
      split(a, b, to + r / SIDE * tile + r % SIDE * BLOCK);
      /* Line by line in order, so that the processor's own prefetching joins in. */
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + BLOCK / 2, 0, 2);
    }
  }
}

/* --- x --- */

#define GROUP 4 /* Tiles of columns that are read together, so that longer runs of x's rows are read at once. */

typedef struct {
  const Product* p;
  int64_t runs, blocks; /* Parts of the depth that are items, and blocks of the depth. */
} Columns;

/* Tiles side by side, an even number: they are multiplied in pairs. */
INLINE int64_t tiles_across(const Product* p) { return (p->columns + 2 * SIDE - 1) / (2 * SIDE) * 2; }
INLINE bf16* columns_at(const Product* p, int64_t across) {
  return (bf16*)(((uintptr_t)p->scratch + 63) & ~(uintptr_t)63) + across * blocks_of(p) * BLOCK_PARTS;
}

static void columns_item(int64_t number, void* argument) {
  const Columns* job = argument;
  const Product* p = job->p;
  int64_t group = number / job->runs, run = number % job->runs, depth = p->depth, n = p->columns;
  int64_t first = group * GROUP, count = MIN(tiles_across(p) - first, GROUP);
  const float* x = p->x + first * SIDE;
  int64_t width = n - first * SIDE;
  __m512 factors[GROUP];
  if (p->norm) {
    __m512 sums[GROUP];
    for (int64_t c = 0; c < count; c++) sums[c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++)
      for (int64_t c = 0; c < count; c++) {
        __m512 value = _mm512_maskz_loadu_ps(first_of(width - c * SIDE), x + k * n + c * SIDE);
        sums[c] = _mm512_fmadd_ps(value, value, sums[c]);
      }
    for (int64_t c = 0; c < count; c++) {
      float* sum = (float*)&sums[c];
      for (int i = 0; i < SIDE; i++) sum[i] = 1 / sqrtf(sum[i] / depth + p->eps);
      factors[c] = sums[c];
    }
  }
  int64_t begin = job->blocks * run / job->runs, end = job->blocks * (run + 1) / job->runs;
  for (int64_t block = begin; block < end; block++)
    for (int j = 0; j < SIDE; j++) {
      int64_t one = block * BLOCK + j, other = one + SIDE;
      for (int64_t c = 0; c < count; c++) {
        __mmask16 here = first_of(width - c * SIDE);
        __m512 a = one < depth ? _mm512_maskz_loadu_ps(here, x + one * n + c * SIDE) : _mm512_setzero_ps();
        __m512 b = other < depth ? _mm512_maskz_loadu_ps(here, x + other * n + c * SIDE) : _mm512_setzero_ps();
        if (p->norm) {
          if (one < depth) a = _mm512_mul_ps(_mm512_mul_ps(a, factors[c]), _mm512_set1_ps(p->norm[one]));
          if (other < depth) b = _mm512_mul_ps(_mm512_mul_ps(b, factors[c]), _mm512_set1_ps(p->norm[other]));
        }
        split(a, b, columns_at(p, first + c) + block * BLOCK_PARTS + j * BLOCK);
      }
    }
}

void tile_columns(const XLA_FFI_CallFrame* call, const Product* p) {
  int64_t groups = (tiles_across(p) + GROUP - 1) / GROUP;
  Columns job = {.p = p, .runs = 1, .blocks = blocks_of(p)};
  if (groups == 1) job.runs = MAX(1, MIN(thread_count(call), job.blocks / 8));
  parallel_for(call, groups * job.runs, columns_item, &job);
}

/* --- results --- */

/* Writes what tiles left in `sums`, with what is added, up to `rows` rows from row `first` and column `from` on. */
INLINE void finish(const Product* p, const float* sums, Out out, int64_t first, int64_t rows, int64_t from) {
  for (int64_t r = 0; r < MIN(rows, 2 * SIDE); r++)
    for (int64_t c = 0; c < 2 * SIDE; c += SIDE) {
      int64_t at = (first + r) * out.stride + from + c;
      __mmask16 some = first_of(p->columns - from - c);
      __m512 sum = _mm512_load_ps(sums + r * 2 * SIDE + c);
      if (out.add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(some, out.add + at));
      _mm512_mask_storeu_ps(out.to + at, some, sum);
    }
}

/* Results of two tiles of rows by two of columns, and parts of what they are products of. */
#define STORE_RESULTS                       \
  TILE_STORE(0, sums);                      \
  TILE_STORE(1, sums + SIDE);               \
  TILE_STORE(2, sums + 2 * SIDE * SIDE);    \
  TILE_STORE(3, sums + 2 * SIDE * SIDE + SIDE);
#define ZERO_RESULTS \
  TILE_ZERO(0);      \
  TILE_ZERO(1);      \
  TILE_ZERO(2);      \
  TILE_ZERO(3);
#define LOAD_A(part)               \
  TILE_LOAD(4, a + (part) * TILE); \
  TILE_LOAD(5, below + (part) * TILE);
#define LOAD_B(part)               \
  TILE_LOAD(6, b + (part) * TILE); \
  TILE_LOAD(7, beside + (part) * TILE);
#define FOUR_PRODUCTS     \
  TILE_MULTIPLY(0, 4, 6); \
  TILE_MULTIPLY(1, 4, 7); \
  TILE_MULTIPLY(2, 5, 6); \
  TILE_MULTIPLY(3, 5, 7);

/* --- products: rows of the weight are split once, and multiplied with two tiles' columns after the other --- */

/* Each thread's own, for rows of the weight; as large as the largest so far. */
static bf16* room_for(int64_t bytes) {
  static __thread bf16* room;
  static __thread int64_t size;
  if (bytes > size) {
    free(room);
    room = aligned_alloc(64, bytes);
    size = room ? bytes : 0;
  }
  return room;
}

void tile_rows(const Product* p, const float* weight, Out out, int64_t rows, const float* next) {
  _Alignas(64) float sums[4 * SIDE * SIDE];
  int64_t blocks = blocks_of(p), tile = blocks * BLOCK_PARTS;
  bf16* kept = room_for((rows + 2 * SIDE - 1) / (2 * SIDE) * 2 * tile * (int64_t)sizeof(bf16));
  for (int64_t o = 0; o < rows; o += 2 * SIDE)
    split_weight(p, weight + o * p->depth, rows - o, kept + o / SIDE * tile, tile);
  begin_tiles();
  for (int64_t from = 0; from < p->columns; from += 2 * SIDE)
    for (int64_t o = 0; o < rows; o += 2 * SIDE) {
      const bf16 *a = kept + o / SIDE * tile, *below = a + tile;
      const bf16 *b = columns_at(p, from / SIDE), *beside = columns_at(p, from / SIDE + 1);
      ZERO_RESULTS
      for (int64_t block = 0; block < blocks; block++) {
        /* In the order that loads the fewest parts. */
        LOAD_A(2) LOAD_B(0) FOUR_PRODUCTS
        LOAD_A(1) FOUR_PRODUCTS
        LOAD_B(1) FOUR_PRODUCTS
        LOAD_A(0) FOUR_PRODUCTS
        LOAD_B(0) FOUR_PRODUCTS
        LOAD_B(2) FOUR_PRODUCTS
        a += BLOCK_PARTS, below += BLOCK_PARTS, b += BLOCK_PARTS, beside += BLOCK_PARTS;
      }
      STORE_RESULTS
      finish(p, sums, out, o, rows - o, from);
    }
  end_tiles();
}

#else

int tiles_usable(void) { return 0; }
void tile_columns(const XLA_FFI_CallFrame* call, const Product* p) { (void)call, (void)p; }
void tile_rows(const Product* p, const float* weight, Out out, int64_t rows, const float* next) {
  (void)p, (void)weight, (void)out, (void)rows, (void)next;
}

#endif

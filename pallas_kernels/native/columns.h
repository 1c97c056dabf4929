/* Some columns of rows that lie apart: brought together, and put back to their places. */

#ifndef EEJAX_COLUMNS_H_
#define EEJAX_COLUMNS_H_

#include "kernels.h"

#if defined(__AVX512F__)

/* Up to 64 columns, by the vectors of a row in which they stand. */
typedef struct {
  int count;
  int32_t base[64];
  uint8_t first[64]; /* How many stand before those of this vector. */
  uint16_t mask[64];
} Columns;

INLINE void find_columns(Columns* found, const int32_t* list, int64_t count) {
  found->count = 0;
  for (int64_t i = 0; i < count;) {
    int n = found->count++;
    int32_t base = list[i] / VL * VL;
    found->base[n] = base, found->first[n] = (uint8_t)i, found->mask[n] = 0;
    for (; i < count && list[i] < base + VL; i++) found->mask[n] |= (uint16_t)(1 << (list[i] - base));
  }
}

/* `to` has room for one vector more than there are columns. */
INLINE void gather_columns(float* to, const float* row, const Columns* columns) {
  for (int n = 0; n < columns->count; n++) {
    __mmask16 some = columns->mask[n];
    __m512 value = _mm512_maskz_loadu_ps(some, row + columns->base[n]);
    _mm512_storeu_ps(to + columns->first[n], _mm512_maskz_compress_ps(some, value));
  }
}

INLINE void scatter_columns(float* row, const float* add, const float* from, const Columns* columns) {
  for (int n = 0; n < columns->count; n++) {
    __mmask16 some = columns->mask[n];
    __m512 value = _mm512_maskz_expandloadu_ps(some, from + columns->first[n]);
    if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(some, add + columns->base[n]));
    _mm512_mask_storeu_ps(row + columns->base[n], some, value);
  }
}

#else

typedef struct {
  const int32_t* list;
  int64_t count;
} Columns;

INLINE void find_columns(Columns* found, const int32_t* list, int64_t count) {
  found->list = list, found->count = count;
}

INLINE void gather_columns(float* to, const float* row, const Columns* columns) {
  for (int64_t i = 0; i < columns->count; i++) to[i] = row[columns->list[i]];
}

INLINE void scatter_columns(float* row, const float* add, const float* from, const Columns* columns) {
  for (int64_t i = 0; i < columns->count; i++) {
    int32_t at = columns->list[i];
    row[at] = add ? add[at] + from[i] : from[i];
  }
}

#endif

#endif

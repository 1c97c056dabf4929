/* Gathers some columns of a matrix's rows, and scatters results back to their places. */

#ifndef EEJAX_COLUMNS_H_
#define EEJAX_COLUMNS_H_

#include "kernels.h"

/* Columns that are gathered at once. */
#define PANEL (2 * VL)

#if defined(__AVX512F__)

/* Up to a panel of columns, grouped by the vectors of a row that hold them. */
typedef struct {
  int count;
  int32_t base[PANEL];
  uint8_t first[PANEL]; /* How many come before those of this vector. */
  uint16_t mask[PANEL];
  ivec from[PANEL]; /* Where in the panel those of this vector are. */
} Columns;

INLINE void find_columns(Columns* found, const int32_t* list, int64_t count) {
  found->count = 0;
  for (int64_t i = 0; i < count;) {
    int n = found->count++;
    int32_t base = list[i] / VL * VL, from[VL] = {0};
    found->base[n] = base, found->first[n] = (uint8_t)i, found->mask[n] = 0;
    for (; i < count && list[i] < base + VL; i++)
      found->mask[n] |= (uint16_t)(1 << (list[i] - base)), from[list[i] - base] = (int32_t)i;
    found->from[n] = *(ivec*)from;
  }
}

/* `to` has room for one vector more than there are columns: it is filled with zeros. */
INLINE void gather_columns(float* to, const float* row, const Columns* columns) {
  for (int n = 0; n < columns->count; n++) {
    __mmask16 some = columns->mask[n];
    __m512 value = _mm512_maskz_loadu_ps(some, row + columns->base[n]);
    _mm512_storeu_ps(to + columns->first[n], _mm512_maskz_compress_ps(some, value));
  }
}

/* `from`: the panel's vectors. */
INLINE void scatter_columns(float* row, const float* add, const vec* from, int vectors, const Columns* columns) {
  for (int n = 0; n < columns->count; n++) {
    __mmask16 some = columns->mask[n];
    __m512 value = _mm512_permutex2var_ps((__m512)from[0], (__m512i)columns->from[n], (__m512)from[vectors - 1]);
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

INLINE void scatter_columns(float* row, const float* add, const vec* from, int vectors, const Columns* columns) {
  float line[PANEL];
  for (int i = 0; i < vectors; i++) store(line + i * VL, from[i]);
  for (int64_t i = 0; i < columns->count; i++) {
    int32_t at = columns->list[i];
    row[at] = add ? add[at] + line[i] : line[i];
  }
}

#endif

#endif

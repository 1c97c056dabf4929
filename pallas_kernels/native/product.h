/* A product of linear.c, as those who compute parts of it see it. */

#ifndef EEJAX_PRODUCT_H_
#define EEJAX_PRODUCT_H_

#include "kernels.h"

typedef struct {
  const float *weight, *x, *norm, *residual;
  /* Not zero where a column is to be written, one panel wide at least; NULL: all are. */
  const int32_t* only;
  float *out, *gates, *scratch;
  int64_t rows, depth, columns, rows_of_item, items;
  /* A second weight of the same x, and its results: items behind those of the first. */
  const float* second;
  float* out_of_second;
  int64_t rows_of_second;
  float eps;
} Product;

/* `rows` of out = residual + weight @ x, all given from their first row on. */
typedef void Rows(const Product* p, const float* weight, const float* residual, float* out, int64_t rows);

/* Products of many columns on AMX, where it is (tiles.c). With fewer, splitting the weight takes what multiplying saves
(two cores, decoding: llama-125m, 16 rows 24 ms a step instead of 21, 32 rows 29 instead of 31; llama-25m, 32 rows
10 instead of 9). */
#define FEWEST_TILED 33
/* Rows that it takes together. */
#define TILED_ROWS 32
/* Of weight in a work item: all of x goes by for each, and with their parts this many rows still fit the second level. */
#define TILED_ITEM_BYTES (768 * 1024)
int tiles_usable(void);
/* x to scratch; `tile_rows` multiplies with what is there. */
void tile_columns(const XLA_FFI_CallFrame* call, const Product* p);
Rows tile_rows;

#endif

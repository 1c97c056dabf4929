/* A product of linear.c, for code that computes parts of it (tiles.c) or uses its results (head.c). */

#ifndef EEJAX_PRODUCT_H_
#define EEJAX_PRODUCT_H_

#include "kernels.h"

typedef struct {
  const float *weight, *x, *norm, *residual;
  float *out, *gates, *scratch;
  /* Columns of x and out, and how many of them are computed: those that `list` names, ascending; NULL: all. */
  int64_t width, columns;
  const int32_t* list;
  int64_t rows, depth, rows_of_item, items;
  float eps;
} Product;

/* Where results of a product go: to rows `stride` apart, into the columns that `list` names (NULL: into the first ones),
with what `add` holds at the same places added. `spare`: rows are followed by room for whole vectors. */
typedef struct {
  float* to;
  const float* add;
  int64_t stride;
  const int32_t* list;
  int spare;
} Out;

/* `rows` of weight @ x, the weight given from the first one on. `next`: the weight that is read after them, for
prefetching. */
typedef void Rows(const Product* p, const float* weight, Out out, int64_t rows, const float* next);

/* The columns where `active` is not zero (of no elements: all columns); written to `list`, room for `width` integers. */
void choose_columns(Product* p, const XLA_FFI_Buffer* active, int32_t* list);
/* Brings x into the form that `product_rows` reads, in the scratch, and divides the weight's rows into items. */
void prepare_product(const XLA_FFI_CallFrame* call, Product* p);
Rows product_rows;

/* Products of many columns on AMX, where the processor has it (tiles.c). With fewer, splitting the weight takes what multiplying saves
(two cores, decoding: llama-125m, 16 rows 24 ms a step instead of 21, 32 rows 29 instead of 31; llama-25m, 32 rows
10 instead of 9). */
#define FEWEST_TILED 33
/* Rows that it takes together. */
#define TILED_ROWS 32
/* Bytes of weight in a work item: all of x is read for each, and split into parts, rows of so many bytes still fit the
second-level cache. */
#define TILED_ITEM_BYTES (768 * 1024)
int tiles_usable(void);
/* x to scratch; `tile_rows` multiplies with what is there. Both take products of all columns only. */
void tile_columns(const XLA_FFI_CallFrame* call, const Product* p);
Rows tile_rows;

#endif

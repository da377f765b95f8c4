/* table.h -- what one instruction set exports, and small helpers shared by all of them.           */
#ifndef WCE_CPU_TABLE_H
#define WCE_CPU_TABLE_H

#include <math.h>
#include <stddef.h>

#include "../wce.h"

/* Kernels of one element type. Row ranges are [row0, row1), column ranges [c0, c1).               */
typedef struct {
  void (*weigh)(const wce_problem *, int64_t row0, int64_t row1, wce_sums *);
  void (*tile_forward)(const wce_problem *, const wce_row_outputs *, int64_t row0, int64_t row1,
                       wce_sums *);
  int64_t (*tile_backward)(const wce_problem *, const wce_row_grads *, int64_t row0, int64_t row1,
                           int stream);
  void (*tile_both)(const wce_problem *, const wce_row_outputs *, const wce_row_grads *,
                    int64_t row0, int64_t row1, int stream, wce_sums *);
  void (*rows_forward)(const wce_problem *, const wce_row_outputs *, int64_t row0, int64_t row1,
                       wce_sums *);
  int64_t (*rows_backward)(const wce_problem *, const wce_row_grads *, int64_t row0, int64_t row1,
                           int64_t c0, int64_t c1, int stream);
  void (*rows_both)(const wce_problem *, const wce_row_outputs *, const wce_row_grads *,
                    int64_t row0, int64_t row1, const wce_plan *, wce_sums *);
  void (*order_prior)(wce_problem *, void *room); /* wce_cpu_order_prior                           */
  /* WCE_SPLIT: one piece of one row, then all pieces of one row in column order                   */
  void (*piece)(const wce_problem *, int want_entropy, int64_t row, int64_t c0, int64_t c1,
                wce_piece *);
  void (*join)(const wce_problem *, const wce_row_outputs *, int64_t row, const wce_piece *,
               int64_t pieces, wce_sums *);
} wce_kernels;

/* Rows that the loops over rows handle together; tasks of the tile regime are multiples of it.    */
enum { WCE_TILE_ROWS = 256 };

enum {
  WCE_WHOLE_ROW = 4096,    /* bytes, as acc, of a row that is one block in forward. C = 1000, Zen 4:
                            * 0.21 -> 0.18 ns an element; float64 loses 10 % by more                */
  WCE_KEPT_BYTES = 1 << 17, /* of what forward keeps of a batch for backward, see kept.inc; without
                             * what fills up vectors                                                */
  WCE_MOST_LANES = 16       /* of any vec_<isa>.h                                                   */
};

/* Each instruction set is one symbol: its kernels by element type.                                */
extern const wce_kernels wce_kernels_base[WCE_DTYPE_COUNT];
extern const wce_kernels wce_kernels_avx2[WCE_DTYPE_COUNT];
extern const wce_kernels wce_kernels_avx512[WCE_DTYPE_COUNT];

/* The kernels in use (dispatch.c). */
const wce_kernels *wce_cpu_kernels(wce_dtype dtype);
/* Whether the processor is one of Intel's. */
int wce_cpu_is_intel(void);

static inline int64_t wce_dtype_size(wce_dtype dtype) {
  return dtype == WCE_F64 ? 8 : dtype == WCE_F32 ? 4 : 2;
}

/* Address of class 0 of a row. */
static inline char *wce_row_start(const wce_view *v, wce_dtype dtype, int64_t inner, int64_t row) {
  int64_t o = inner == 1 ? row : row / inner, i = row - o * inner;
  return (char *)v->data + (o * v->stride_outer + i * v->stride_inner) * wce_dtype_size(dtype);
}

/* Elements between one and the next of n rows from row0 on; 0: they are not regular.              */
static inline int64_t wce_row_step(const wce_view *v, int64_t inner, int64_t row0, int n) {
  if (inner == 1) return v->stride_outer;
  return row0 % inner + n <= inner ? v->stride_inner : 0;
}

#endif

/* wce_cuda.h -- the loss on CUDA: the same structs as on the CPU, with device pointers in them.
 *
 * Nothing here waits for the device, allocates or keeps state, so that every call can be captured
 * in a CUDA graph. A plan depends on shapes, strides and dtypes alone, and every sum has a fixed
 * order: the same input gives the same bits in each run.                                         */
#ifndef WCE_CUDA_H
#define WCE_CUDA_H

#include <stddef.h>

#include "../wce.h"

#ifdef __cplusplus
extern "C" {
#endif

/* narrow: a thread per row, tiles of rows pass through shared memory (few classes, dense rows)
 * rows:   lanes threads per row, or per chunk of a row (class dimension contiguous)
 * planes: a thread owns 16 bytes of positions and walks the classes (positions contiguous)       */
typedef enum { WCE_CUDA_NARROW, WCE_CUDA_ROWS, WCE_CUDA_PLANES } wce_cuda_regime;

typedef struct {
  wce_cuda_regime regime;
  int32_t threads;         /* per block, a multiple of 32                                         */
  int32_t lanes;           /* rows: 4, 8, 16, 32 or all threads share a row.
                              planes: threads side by side; threads/lanes share the classes       */
  int64_t tile;            /* narrow: rows per block and turn                                     */
  int64_t columns, chunks; /* rows: a row is cut into chunks of so many columns                   */
  int64_t blocks;          /* most blocks of one launch; they take turns when there is more to do */
} wce_cuda_plan;

/* Where forward leaves what concerns all rows together. Device pointers.                         */
typedef struct {
  wce_reduction reduction;
  int32_t empty_zero;     /* mean of no rows is 0 instead of nan                                  */
  const void *normalizer; /* acc, one value in place of the mean's denominator, or NULL           */
  void *loss;             /* one value of type loss_dtype; not used by WCE_NONE                   */
  wce_dtype loss_dtype;
  void *denominator;      /* acc, one value: what the sum was divided by (1 for sum and none)     */
  void *denominator2;     /* the same for the second half of a mixture; NULL: no mixture          */
} wce_cuda_total;

typedef struct {
  int32_t code;             /* of the CUDA runtime, 0: success                                    */
  const char *kernel, *text; /* which launch failed, and how; static strings                      */
} wce_cuda_status;

wce_cuda_plan wce_cuda_forward_plan(const wce_problem *problem);
wce_cuda_plan wce_cuda_backward_plan(const wce_problem *problem, const wce_row_grads *grads);

/* Bytes of device memory, aligned to 16, that the call needs until it has run.                   */
size_t wce_cuda_forward_workspace(const wce_cuda_plan *plan, const wce_problem *problem);
size_t wce_cuda_backward_workspace(const wce_cuda_plan *plan, const wce_problem *problem,
                                   const wce_row_grads *grads);

/* stream is a cudaStream_t of the current device.
 * bad NULL: a target that is no class prints itself and raises a device-side assertion.
 * bad given (device memory): receives the smallest such row, or UINT64_MAX where there is none.
 * Either way a bad target is never used as an index, and its row counts for nothing.             */
wce_cuda_status wce_cuda_forward(const wce_cuda_plan *plan, const wce_problem *problem,
                                 const wce_row_outputs *out, const wce_cuda_total *total,
                                 void *workspace, uint64_t *bad, void *stream);
wce_cuda_status wce_cuda_backward(const wce_cuda_plan *plan, const wce_problem *problem,
                                  const wce_row_grads *grads, void *workspace, uint64_t *bad,
                                  void *stream);

/* Waits for the stream and copies bytes from the device: for the checked mode alone.             */
wce_cuda_status wce_cuda_read(void *host, const void *device, size_t bytes, void *stream);

/* 1 while the stream is being captured into a graph, when nothing may wait for it.               */
int wce_cuda_is_capturing(void *stream);

/* Version of the CUDA runtime that was linked, as 1000*major + 10*minor.                         */
int wce_cuda_runtime_version(void);

#ifdef __cplusplus
}
#endif
#endif

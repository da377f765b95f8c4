/* wce.h -- the C interface of the loss: plain structs in, status out.
 *
 * No torch, no CUDA headers, no allocation behind it. Letters, for one row with logits x[0..C):
 *
 *   x_c  := x_c + prior_c                          prior_c = tau * log(q_c), or absent
 *   m     = max_c x_c      L = log(sum_c exp(x_c - m))      p_c = exp(x_c - m - L)
 *   a_c   = w_c * (spike*[c = y] + floor + soft*q_c)        A = sum_c a_c
 *   loss  = s * (A*L - sum_c a_c*(x_c - m))
 *   dx_c  = g*s*(A*p_c - a_c) + h*p_c + u*([c = y] - p_c)
 *
 *   index target y                     spike = 1      floor = 0      soft = 0
 *   index target y, label smoothing e  spike = 1-e    floor = e/C    soft = 0
 *   soft target q                      spike = 0      floor = 0      soft = 1
 *   soft target q, smoothing e         spike = 0      floor = e/C    soft = 1-e
 *
 * A class whose a_c is exactly 0 adds nothing to the loss, also where x_c is -inf.
 * A mixture of two index targets y and y2 has the loss mix*loss(y) + (1-mix)*loss(y2). A half whose
 * target is ignored is 0, and each half has a mean, and so a denominator, of its own.
 * A row that does not count (its index target is ignore_index, its mask is 0, or its soft target
 * is all zero and skip_empty is set) has loss 0 and weight 0, whatever its logits hold.
 *
 * "acc" below is the type of all arithmetic: float for f32, bf16 and f16 logits, double for f64.
 */
#ifndef WCE_H
#define WCE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { WCE_F32, WCE_F64, WCE_BF16, WCE_F16, WCE_DTYPE_COUNT } wce_dtype;

/* A tensor seen as [outer, classes, inner]; strides in elements.
 * Row r = o*inner + i, for o in [0, outer), i in [0, inner).                                    */
typedef struct {
  const void *data;
  int64_t stride_outer, stride_class, stride_inner;
} wce_view;

typedef struct {
  wce_dtype dtype; /* of the logits and of their gradient                                         */
  int64_t outer, classes, inner;
  wce_view logits; /* stride_class == 1 (rows) or stride_inner == 1 (planes)                      */

  const int64_t *target;  /* [rows] or NULL. Values may be anything: they are checked              */
  const int64_t *target2; /* [rows] or NULL: the second index target of a mixture                  */
  const void *mix;        /* acc: what target has of the mixture; with target2, else NULL          */
  int64_t mix_stride;     /* 0: one value for all rows; 1: [rows]                                  */
  wce_view prob;          /* soft target; data NULL: absent. On CUDA rows or planes as the logits are;
                             on the CPU it may be the other                                        */
  wce_dtype prob_dtype;   /* f64 with f64 logits, else f32, bf16 or f16                            */

  const void *weight;        /* [classes] acc, or NULL                                             */
  const void *prior;         /* [classes] acc, added to the logits, or NULL                        */
  const void *prior_two;     /* CPU: the same as wce_cpu_order_prior wrote it, or NULL             */
  const void *sample_weight; /* [rows] acc, or NULL                                                */
  const uint8_t *mask;       /* [rows], 0: the row does not count; or NULL                         */

  double spike, floor, soft;
  int64_t ignore_index; /* of target and target2                                                   */
  int32_t skip_empty;   /* a soft target of zeros alone does not count                             */
  int32_t prior_lanes;  /* prior_two is for vectors of so many lanes                               */
} wce_problem;

/* Results per row; each pointer may be NULL. [rows], acc unless said otherwise.                   */
typedef struct {
  void *max, *log_sum; /* m and L, kept apart: their sum loses the low bits under large offsets    */
  void *coef_sum;      /* of a soft target: sum_c a_c, for backward                                */
  void *loss;          /* of type loss_dtype                                                       */
  wce_dtype loss_dtype;
  void *lse;        /* m + L, of every row, counted or not                                         */
  void *log_prob;   /* x_y - m - L; 0 where the target is ignored                                  */
  void *entropy;    /* L - sum_c p_c*(x_c - m), of every row                                       */
  uint8_t *correct; /* x_y == m                                                                    */
} wce_row_outputs;

/* Sums over the rows. weight: sum of s*w_y (index target), of s (soft target).                    */
typedef struct {
  double loss, weight;
  double loss2, weight2; /* of the second half of a mixture, else 0                               */
  int64_t count;   /* rows that count                                                             */
  int64_t bad_row; /* first row whose target (or target2) is neither a class nor ignore_index, or
                      is a class whose prior is -inf; -1: none                                     */
} wce_sums;

/* From sums to the value of the loss.                                                             */
typedef enum { WCE_NONE, WCE_MEAN, WCE_SUM } wce_reduction; /* numbered as in torch                */

/* Upstream gradients, all of them per row. dx_c is written for every element of every row.        */
typedef struct {
  wce_view dx;                /* same unit stride as the logits, other strides of its own          */
  const void *max, *log_sum;  /* from forward, or NULL: computed again                             */
  const void *coef_sum;       /* the same of soft targets: where max is, and only there            */
  const void *grad;           /* g before the division, or NULL for 0                              */
  wce_dtype grad_dtype;       /*                                                                   */
  int64_t grad_stride;        /* 0: one value for all rows; 1: [rows]                              */
  const void *denominator;    /* acc, one value: g = grad / denominator; NULL: 1                   */
  const void *denominator2;   /* the same for the second half of a mixture                         */
  const void *grad_lse;       /* h, [rows] acc, or NULL                                            */
  const void *grad_log_prob;  /* u, [rows] acc, or NULL                                            */
} wce_row_grads;

/* Fewest classes of which forward saves m and L (and A of soft targets) for backward: where they are at
 * most a twentieth of what the logits are. Of shorter rows backward makes them again, which takes no
 * memory and, up to 24 classes, less time; from 32 on a backward by itself would be 1.3 to 1.7 times as
 * fast if they were saved (Zen 5), one in the same go as forward no faster. One rule for every device and
 * for shape inference.                                                                             */
static inline int64_t wce_saves_from(wce_dtype dtype, int is_soft) {
  int values = is_soft ? 3 : 2, elements = dtype == WCE_BF16 || dtype == WCE_F16 ? 2 : 1; /* of a value */
  return 20 * values * elements;
}

/* ---- CPU ------------------------------------------------------------------------------------ */

/* How a problem is cut into tasks. The cut depends on the shape, the dtype and the kind of target, never on
 * the number of threads: that is why results have the same bits for any number of threads.        */
typedef enum { WCE_TILE, WCE_ROWS, WCE_SPLIT, WCE_REGIME_COUNT } wce_regime;
typedef struct {
  wce_regime regime;
  int64_t rows_per_task, columns_per_task;
  int64_t tasks;         /* for forward and for backward                                           */
  int64_t pieces;        /* wce_piece that forward needs as workspace, 0 unless WCE_SPLIT          */
  int32_t stream;        /* the gradient is larger than caches: store it past them                 */
  int32_t exp_is_slow;   /* for backward in one go: to keep exps is quicker. The processor's; no bit
                            depends on it                                                          */
  int64_t work_per_task; /* elements, so that a caller can leave small work on one thread          */
} wce_plan;

typedef struct { /* what is known of a row after some of its columns                               */
  double m, s, A, D, U; /* max; sum of e^(x-m); of a; of a*(x-m); of e^(x-m)*(x-m)                 */
} wce_piece;

wce_plan wce_cpu_plan(const wce_problem *problem);

/* Writes the prior to room ([classes] acc) in the order in which kernels load logits, and sets
 * prior_two and prior_lanes, where that is quicker: where wce_cpu_orders_prior says so. room must
 * outlive the calls below.                                                                         */
int wce_cpu_orders_prior(const wce_problem *problem);
void wce_cpu_order_prior(wce_problem *problem, void *room);

/* What sums will say of weights, counts and targets, from targets and weights alone: the same bits, before
 * any logit is read. Task t of plan->tasks; wce_cpu_add adds up in task order.                      */
void wce_cpu_weigh(const wce_plan *plan, const wce_problem *problem, int64_t task, wce_sums *sums);
wce_sums wce_cpu_add(const wce_plan *plan, const wce_sums *sums);

/* Task t of plan->tasks, safe to run at the same time as any other. sums: [tasks], pieces: [pieces]. */
void wce_cpu_forward(const wce_plan *plan, const wce_problem *problem, const wce_row_outputs *out,
                     int64_t task, wce_sums *sums, wce_piece *pieces);
/* After all tasks, on one thread: adds up in task order (and finishes the rows of WCE_SPLIT).      */
wce_sums wce_cpu_finish(const wce_plan *plan, const wce_problem *problem,
                        const wce_row_outputs *out, const wce_sums *sums, const wce_piece *pieces);
/* Returns the first bad row of the task, or -1; such a row's gradient is 0.                        */
int64_t wce_cpu_backward(const wce_plan *plan, const wce_problem *problem,
                         const wce_row_grads *grads, int64_t task);

/* Forward and backward of tasks [task0, task1), at least one, while their logits are in the caches; not for
 * WCE_SPLIT, where a row is many tasks. Whether targets are good is to be asked of weigh before.    */
void wce_cpu_both(const wce_plan *plan, const wce_problem *problem, const wce_row_outputs *out,
                  const wce_row_grads *grads, int64_t task0, int64_t task1, wce_sums *sums);

/* Instruction sets, weakest first: "base", then "avx2", "avx512" on x86-64.                        */
int wce_cpu_isa_count(void);
const char *wce_cpu_isa_name(int index);
int wce_cpu_isa_supported(int index); /* by this build, this processor and its operating system    */
int wce_cpu_isa_current(void);
/* NULL: the best one. Returns 0, or -1 and changes nothing when unknown or unsupported.            */
int wce_cpu_isa_select(const char *name);

/* For tests: "tile", "rows", "split" where the layout allows it; NULL or "auto": by the table.     */
int wce_cpu_regime_force(const char *name);
/* For tests: exp_is_slow of all plans: "slow", "quick"; NULL or "auto": by the processor.          */
int wce_cpu_exp_force(const char *name);

#ifdef __cplusplus
}
#endif
#endif

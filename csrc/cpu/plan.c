/* plan.c -- how a problem is cut into tasks, and the calls that run them.                         */

#include <string.h>

#include "table.h"

enum {
  NARROW_CLASSES = 40,       /* forward, rows this short: a lane is a row. 36 classes, Zen 4, rows ->
                              * tile, ns an element: f32 0.39 -> 0.35, bf16 0.42 -> 0.33; 44: no
                              * difference                                                            */
  NARROW_SOFT = 64,          /* the same with a soft target; where m and L are saved, backward of rows is
                              * quicker. In one go, Zen 5, 44 to 59 classes, f32 0.63 -> 0.27, bf16 0.68 ->
                              * 0.28, AVX2 0.75 -> 0.38 and 0.76 -> 0.46                              */
  WHOLE_CLASSES = 32,        /* but not from here on where rows of float32 are made of eights. AVX-512
                              * and AVX2, tile -> rows: 32 classes 0.35 -> 0.32 and 0.47 -> 0.45; 40
                              * classes the same and 0.48 -> 0.40                                     */
  NARROW_CLASSES_F64 = 31,   /* half as many lanes: 32 classes 0.87 -> 1.08                         */
  TASK_ELEMENTS = 1 << 16,   /* enough to pay for handing a task to a thread                        */
  STREAM_TILES = 1 << 24,    /* gradients that are made in tiles go past the caches from 16 MiB on, those
                              * that are made in rows from 8. An L3 of 32 MiB and a reader of the
                              * gradient behind. Tiles, Zen 4: of 16 to 28 MiB 1 to 32 % less time; Zen
                              * 5: of 8 to 12 MiB 12 % less to 15 % more                              */
  STREAM_ROWS = 1 << 23,     /* Zen 5, 8 and 12 MiB, when the gradient's memory has left the caches since
                              * the step before: f32 32 classes 10 % less time, 1000 20 %, 8000 36 %,
                              * bf16 3 to 6 %; when it has not: 34 % less to 13 % more. At 5 MiB 17 %
                              * less to 28 % more                                                     */
  SPLIT_CLASSES = 1 << 15,   /* rows this long are cut when there are few of them                   */
  SPLIT_ROWS = 64,
  SPLIT_COLUMNS = 1 << 14,
  ORDER_ROWS = 32 /* see wce_cpu_orders_prior                                                      */
};

/* Finds name among count names and leaves its index, -1 for NULL and "auto". Returns -1 and changes nothing
 * when it is unknown.                                                                             */
static int force(int *forced, const char *const *names, int count, const char *name) {
  int found = name == NULL || strcmp(name, "auto") == 0 ? -1 : 0;
  while (found >= 0 && found < count && strcmp(names[found], name) != 0) found++;
  if (found == count) return -1;
  *forced = found;
  return 0;
}

static int forced_regime = -1, forced_exp = -1; /* tests only                                      */

int wce_cpu_regime_force(const char *name) {
  static const char *const names[WCE_REGIME_COUNT] = {"tile", "rows", "split"};
  return force(&forced_regime, names, WCE_REGIME_COUNT, name);
}

int wce_cpu_exp_force(const char *name) {
  static const char *const names[] = {"quick", "slow"};
  return force(&forced_exp, names, 2, name);
}

/* Whether a lane is a row though classes are contiguous. */
static int is_narrow(const wce_problem *p) {
  if (p->dtype == WCE_F64) return p->classes <= NARROW_CLASSES_F64;
  if (p->prob.data) return p->classes <= NARROW_SOFT && p->classes < wce_saves_from(p->dtype, 1);
  int whole = p->dtype == WCE_F32 && p->classes >= WHOLE_CLASSES && p->classes % 8 == 0;
  return p->classes <= NARROW_CLASSES && !whole;
}

/* Of the logits and of a soft target. */
static int has_rows(const wce_problem *p) {
  return p->logits.stride_class == 1 && (!p->prob.data || p->prob.stride_class == 1);
}

/* | classes contiguous | classes    | rows  | regime |
 * | no                 | any        | any   | tile   |
 * | yes                | <= 40      | any   | tile   |   (float64: 31; float32: not 32 and 40; soft targets:
 *                                                        float32 59, 16 bits 64)
 * | yes                | more       | any   | rows   |
 * | yes                | >= 32768   | <= 64 | split  |   (index targets: the sum of a soft target's
 *                                                        coefficients belongs to the whole row)    */
static wce_regime choose(const wce_problem *p, int64_t rows) {
  if (!has_rows(p) && p->classes > 1) return WCE_TILE;
  if (p->classes == 0) return WCE_TILE; /* no columns to split                                      */
  if (forced_regime == WCE_SPLIT && p->prob.data) return WCE_ROWS;
  if (forced_regime >= 0) return (wce_regime)forced_regime;
  if (is_narrow(p)) return WCE_TILE;
  if (p->classes >= SPLIT_CLASSES && rows <= SPLIT_ROWS && !p->prob.data) return WCE_SPLIT;
  return WCE_ROWS;
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

/* At most `rows` rows of a task: so few that what forward may keep of a batch of them for backward has room
 * (kept.inc), in whole groups of short rows (side.inc).                                           */
static int64_t keepable_rows(const wce_problem *p, int64_t rows) {
  int64_t row_bytes = at_least(1, p->classes) * (p->dtype == WCE_F64 ? 8 : 4);
  int64_t fit = WCE_KEPT_BYTES / row_bytes / WCE_MOST_LANES * WCE_MOST_LANES;
  return row_bytes <= WCE_WHOLE_ROW && fit < WCE_TILE_ROWS ? fit : rows;
}

static int streams(const wce_problem *p, int64_t rows, wce_regime regime) {
  int64_t least = regime == WCE_TILE ? STREAM_TILES : STREAM_ROWS;
  return rows * p->classes * wce_dtype_size(p->dtype) >= least;
}

/* Whether to keep exps from forward for a backward in one go also by AVX-512, where order_of
 * (rows_both.inc) would make them again. The rule goes by the processor's maker. float32, ns an element,
 * made again -> kept, Xeon (Emerald Rapids): 100 classes in cache 0.53 -> 0.46; two threads from memory, 50
 * classes 0.39 -> 0.37, 100 no difference, after other work 0.54 -> 0.49, 1000 classes 0.38 -> 0.34. Zen 5:
 * short rows lose up to 20 % by it where memory is scarce, and 1000 classes are quicker in turns.  */
static int exp_is_slow(void) { return forced_exp >= 0 ? forced_exp : wce_cpu_is_intel(); }

wce_plan wce_cpu_plan(const wce_problem *p) {
  wce_plan plan = {0};
  int64_t rows = p->outer * p->inner;
  plan.regime = choose(p, rows);
  plan.rows_per_task = at_least(1, TASK_ELEMENTS / at_least(1, p->classes));
  if (plan.regime == WCE_ROWS) plan.rows_per_task = keepable_rows(p, plan.rows_per_task);
  plan.columns_per_task = at_least(1, p->classes);
  if (plan.regime == WCE_TILE) /* whole tiles */
    plan.rows_per_task = ceil_div(plan.rows_per_task, WCE_TILE_ROWS) * WCE_TILE_ROWS;
  if (plan.regime == WCE_SPLIT) {
    plan.rows_per_task = 1;
    plan.columns_per_task = forced_regime == WCE_SPLIT && p->classes < 4 * SPLIT_COLUMNS
                                ? at_least(1, ceil_div(p->classes, 3)) /* small tests have pieces   */
                                : SPLIT_COLUMNS;
    plan.pieces = rows * ceil_div(p->classes, plan.columns_per_task);
  }
  plan.tasks = ceil_div(rows, plan.rows_per_task) *
               ceil_div(p->classes, plan.columns_per_task);
  if (p->classes == 0) plan.tasks = ceil_div(rows, plan.rows_per_task);
  plan.stream = streams(p, rows, plan.regime);
  plan.exp_is_slow = exp_is_slow();
  plan.work_per_task = plan.rows_per_task * plan.columns_per_task;
  return plan;
}

/* Where rows of bfloat16 are read and nothing but the prior asks for their order; not for a few rows,
 * as ordering takes as long as it saves in 10 of them.                                            */
int wce_cpu_orders_prior(const wce_problem *p) {
  int64_t rows = p->outer * p->inner;
  int useful = p->prior && p->dtype == WCE_BF16 && !p->prob.data && p->floor == 0;
  return useful && choose(p, rows) != WCE_TILE && (rows >= ORDER_ROWS || forced_regime >= 0);
}

void wce_cpu_order_prior(wce_problem *p, void *room) {
  if (wce_cpu_orders_prior(p)) wce_cpu_kernels(p->dtype)->order_prior(p, room);
}

typedef struct { int64_t row0, row1, c0, c1; } range;

static range task_range(const wce_plan *plan, const wce_problem *p, int64_t task) {
  int64_t columns = at_least(1, ceil_div(p->classes, plan->columns_per_task));
  int64_t rows = p->outer * p->inner;
  range r;
  r.row0 = task / columns * plan->rows_per_task;
  r.row1 = r.row0 + plan->rows_per_task < rows ? r.row0 + plan->rows_per_task : rows;
  r.c0 = task % columns * plan->columns_per_task;
  r.c1 = r.c0 + plan->columns_per_task < p->classes ? r.c0 + plan->columns_per_task : p->classes;
  return r;
}

static const wce_sums no_sums = {.bad_row = -1};

void wce_cpu_weigh(const wce_plan *plan, const wce_problem *p, int64_t task, wce_sums *sums) {
  range r = task_range(plan, p, task);
  sums[task] = no_sums;
  if (r.c0 == 0) wce_cpu_kernels(p->dtype)->weigh(p, r.row0, r.row1, sums + task);
}

wce_sums wce_cpu_add(const wce_plan *plan, const wce_sums *sums) {
  wce_sums total = no_sums;
  for (int64_t t = 0; t < plan->tasks; t++) {
    total.loss += sums[t].loss;
    total.weight += sums[t].weight;
    total.loss2 += sums[t].loss2;
    total.weight2 += sums[t].weight2;
    total.count += sums[t].count;
    if (total.bad_row < 0) total.bad_row = sums[t].bad_row;
  }
  return total;
}

void wce_cpu_forward(const wce_plan *plan, const wce_problem *p, const wce_row_outputs *out,
                     int64_t task, wce_sums *sums, wce_piece *pieces) {
  const wce_kernels *kernels = wce_cpu_kernels(p->dtype);
  range r = task_range(plan, p, task);
  sums[task] = no_sums;
  switch (plan->regime) {
  case WCE_TILE: kernels->tile_forward(p, out, r.row0, r.row1, sums + task); break;
  case WCE_ROWS: kernels->rows_forward(p, out, r.row0, r.row1, sums + task); break;
  default: kernels->piece(p, out->entropy != NULL, r.row0, r.c0, r.c1, pieces + task); break;
  }
}

wce_sums wce_cpu_finish(const wce_plan *plan, const wce_problem *p, const wce_row_outputs *out,
                        const wce_sums *sums, const wce_piece *pieces) {
  if (plan->regime != WCE_SPLIT) return wce_cpu_add(plan, sums);
  wce_sums total = no_sums;
  int64_t rows = p->outer * p->inner, per_row = rows ? plan->pieces / rows : 0;
  for (int64_t row = 0; row < rows; row++)
    wce_cpu_kernels(p->dtype)->join(p, out, row, pieces + row * per_row, per_row, &total);
  return total;
}

int64_t wce_cpu_backward(const wce_plan *plan, const wce_problem *p, const wce_row_grads *grads,
                         int64_t task) {
  const wce_kernels *kernels = wce_cpu_kernels(p->dtype);
  range r = task_range(plan, p, task);
  if (plan->regime == WCE_TILE)
    return kernels->tile_backward(p, grads, r.row0, r.row1, plan->stream);
  if (plan->regime == WCE_ROWS && !grads->max) { /* forward is made again                           */
    const wce_row_outputs nothing = {0};
    wce_sums sums = no_sums;
    kernels->rows_both(p, &nothing, grads, r.row0, r.row1, plan, &sums);
    return sums.bad_row;
  }
  return kernels->rows_backward(p, grads, r.row0, r.row1, r.c0, r.c1, plan->stream);
}

void wce_cpu_both(const wce_plan *plan, const wce_problem *p, const wce_row_outputs *out,
                  const wce_row_grads *grads, int64_t task0, int64_t task1, wce_sums *sums) {
  const wce_kernels *kernels = wce_cpu_kernels(p->dtype);
  for (int64_t t = task0; t < task1; t++) sums[t] = no_sums;
  if (plan->regime == WCE_ROWS) {
    range first = task_range(plan, p, task0), last = task_range(plan, p, task1 - 1);
    kernels->rows_both(p, out, grads, first.row0, last.row1, plan, sums + task0);
    return;
  }
  for (int64_t t = task0; t < task1; t++) {
    range r = task_range(plan, p, t);
    kernels->tile_both(p, out, grads, r.row0, r.row1, plan->stream, sums + t);
  }
}

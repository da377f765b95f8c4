/* fuzz.c -- random problems for the C kernels, compiled with AddressSanitizer and UBSan.
 *
 *   fuzz [--seed S] [--seconds T] [--cases N]      a failure names the seed that repeats it
 *   fuzz --plant read|write|value                  has to fail: the last logit or the last element
 *                                                  of dx is out of bounds, or losses are 1 % off
 *
 * Every buffer has exactly the size that the problem needs, so that the sanitizer sees any access
 * outside. Gaps between the rows of a view hold nan when they are read and a pattern when they are
 * written, so that a use of them shows too. Each instruction set of this processor runs each
 * problem in each case's regime and is compared with expected.c. "wild" cases hold values for which
 * results are not defined (nan weights, ...): they are run for the sanitizers alone.             */
#define _POSIX_C_SOURCE 200112L /* posix_memalign */

#include <inttypes.h>
#include <math.h>
#include <sanitizer/asan_interface.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "expected.h"

/* ---- random numbers -------------------------------------------------------------------------- */

static uint64_t random_state;

static uint64_t random_bits(void) { /* splitmix64 */
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

static int64_t below(int64_t n) { return (int64_t)(random_bits() % (uint64_t)n); }
static int chance(int percent) { return below(100) < percent; }
static double uniform(void) { return (double)(random_bits() >> 11) * 0x1p-53; }
static double normal(void) {
  return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform());
}

/* ---- buffers: exact at the end, poisoned before the start ------------------------------------ */

enum { MAX_BUFFERS = 64 };
static struct { char *start; size_t head; } buffers[MAX_BUFFERS];
static int buffer_count;

static void *buffer(int64_t count, int64_t size) {
  size_t head = chance(60) ? 0 : (size_t)(size * (1 + below(31)));
  void *line; /* of 64 bytes, where large tensors begin                                           */
  if (buffer_count == MAX_BUFFERS || posix_memalign(&line, 64, head + (size_t)(count * size)))
    abort();
  char *start = line;
  memset(start, 0xa5, head + (size_t)(count * size));
  __asan_poison_memory_region(start, head & ~(size_t)7);
  buffers[buffer_count].start = start;
  buffers[buffer_count++].head = head;
  return start + head;
}

static void release_buffers(int keep) {
  while (buffer_count > keep) {
    buffer_count--;
    __asan_unpoison_memory_region(buffers[buffer_count].start, buffers[buffer_count].head);
    free(buffers[buffer_count].start);
  }
}

/* ---- one case -------------------------------------------------------------------------------- */

typedef struct {
  uint64_t seed;
  const char *isa, *regime;
  wce_problem p;
  int64_t rows;
  int wild, special, wants_rows;
  expected_row *expected; /* [rows] */
} fuzz_case;

static const char *plant = "";

/* Puts the last element of a view out of bounds, or back. */
static void plant_bound(const char *name, const wce_problem *p, const wce_view *v, int64_t extent) {
  if (strcmp(plant, name) != 0 || extent == 0) return;
  char *last = (char *)v->data + (extent - 1) * dtype_size(p->dtype);
  __asan_poison_memory_region(last, (size_t)dtype_size(p->dtype));
}

static void lift_bound(const wce_problem *p, const wce_view *v, int64_t extent) {
  int64_t size = dtype_size(p->dtype);
  if (*plant) __asan_unpoison_memory_region(v->data, (size_t)(extent * size));
}

static fuzz_case now; /* in one place, so that a report of a sanitizer can name it */

static void describe(void) {
  const wce_problem *p = &now.p;
  fprintf(stderr,
          "\ncase: --seed %" PRIu64 " --cases 1   isa %s, regime %s, dtype %d\n"
          "  [outer, classes, inner] = [%" PRId64 ", %" PRId64 ", %" PRId64 "], strides %" PRId64
          ", %" PRId64 ", %" PRId64 "\n  prob dtype %d, strides %" PRId64 ", %" PRId64 ", %" PRId64
          "\n  target %d target2 %d prob %d weight %d prior %d sample_weight %d mask %d"
          " skip_empty %d\n  spike %g floor %g soft %g ignore_index %" PRId64
          "; wild %d special %d\n",
          now.seed, now.isa ? now.isa : "?", now.regime ? now.regime : "auto", p->dtype, p->outer,
          p->classes, p->inner, p->logits.stride_outer, p->logits.stride_class,
          p->logits.stride_inner, p->prob_dtype, p->prob.stride_outer, p->prob.stride_class,
          p->prob.stride_inner, !!p->target, !!p->target2, !!p->prob.data, !!p->weight, !!p->prior,
          !!p->sample_weight, !!p->mask, p->skip_empty, p->spike, p->floor, p->soft,
          p->ignore_index, now.wild, now.special);
}

/* Both sanitizers end a program that they found wrong with abort(). */
static void on_abort(int signal_number) {
  (void)signal_number;
  describe();
  _Exit(1);
}
#pragma GCC visibility push(default) /* the sanitizers' libraries look for these names */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "abort_on_error=1"; }
const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void) { return "abort_on_error=1:print_stacktrace=1"; }
#pragma GCC visibility pop

/* ---- shapes and strides ---------------------------------------------------------------------- */

static int64_t random_classes(void) {
  static const int64_t edges[] = {39,  40,  41,  63,  64,  65,  96,  97,  127, 128,  129,
                                  192, 193, 255, 256, 257, 320, 321, 384, 385, 511, 640, 641,
                                  1000, 1023, 1025};
  if (chance(50)) return 1 + below(40);
  if (chance(30)) return 30 + below(230);
  if (chance(70)) return edges[below(sizeof edges / sizeof *edges)];
  return chance(70) ? 1 + below(5000) : 1 + below(200000);
}

static void random_shape(wce_problem *p) {
  int64_t budget = chance(70) ? 2000 : chance(80) ? 20000 : 200000;
  p->classes = chance(1) ? 0 : random_classes();
  int64_t rows = 1 + below(1 + budget / (p->classes + 1));
  if (chance(50) && rows > 40) rows = 1 + below(40);
  p->inner = chance(40) ? 1 : 1 + below(rows);
  if (p->classes <= 160 && chance(15)) { /* whole tiles, whose gradients may fill whole lines      */
    rows = 256 * (1 + below(3));
    p->inner = chance(40) ? 1 : chance(50) ? 256 : rows;
  }
  if (chance(6)) { /* batches of which forward keeps much, up to all that fits; tasks that take turns   */
    p->classes = chance(40) ? 33 + below(350) : chance(30) ? 380 + below(650) : 640 + below(4400);
    rows = (chance(50) ? 32768 : 65536) / p->classes * (1 + below(3)) + 1 + below(3);
    p->inner = chance(60) ? 1 : 1 + below(rows);
  }
  p->outer = rows / p->inner;
  if (chance(1)) p->outer = 0;
}

static int64_t gap(void) { return chance(50) ? 0 : chance(80) ? 1 + below(9) : 64; }

/* Strides of a view with the unit stride in its place; shared: elements may lie over each other. */
static wce_view random_view(const wce_problem *p, int class_is_unit, int shared) {
  wce_view v = {0};
  int64_t *near = class_is_unit ? &v.stride_inner : &v.stride_class;
  int64_t unit = class_is_unit ? p->classes : p->inner;
  int64_t count = class_is_unit ? p->inner : p->classes;
  *(class_is_unit ? &v.stride_class : &v.stride_inner) = 1;
  if (chance(70)) { /* outer, near, unit */
    *near = unit + gap();
    if (!class_is_unit && *near == 1) *near = 2; /* else the classes would be unit too */
    v.stride_outer = *near * count + gap();
  } else { /* near, outer, unit */
    v.stride_outer = unit + gap();
    *near = v.stride_outer * p->outer + gap();
    if (!class_is_unit && *near < 2) *near = 2;
  }
  if (shared && chance(10)) *near = class_is_unit ? 0 : *near;
  if (shared && chance(10)) v.stride_outer = 0;
  return v;
}

static int64_t view_extent(const wce_problem *p, const wce_view *v) {
  if (!p->outer || !p->classes || !p->inner) return 0;
  return (p->outer - 1) * v->stride_outer + (p->classes - 1) * v->stride_class +
         (p->inner - 1) * v->stride_inner + 1;
}

/* ---- contents -------------------------------------------------------------------------------- */

static double wild_value(void) {
  static const double values[] = {NAN, INFINITY, -INFINITY, 3e38, -3e38, 1e-44, 0, 1e308};
  return values[below(sizeof values / sizeof *values)];
}

/* [count] acc, or NULL */
static const void *random_table(int64_t count, int percent, double lowest, double highest) {
  wce_dtype acc = acc_dtype(now.p.dtype);
  if (!chance(percent)) return NULL;
  void *table = buffer(count, dtype_size(acc));
  for (int64_t i = 0; i < count; i++) {
    double value = chance(5) ? 0 : lowest + (highest - lowest) * uniform();
    set_element(table, acc, i, now.wild && chance(20) ? wild_value() : value);
  }
  return table;
}

static double special_logit(void) {
  static const double values[] = {-INFINITY, -INFINITY, -INFINITY, NAN, INFINITY, 6e4, -6e4};
  return values[below(sizeof values / sizeof *values)];
}

static void random_logits(wce_problem *p, int class_is_unit) {
  static const double spreads[] = {0, 1, 1, 10, 100};
  double spread = spreads[below(5)], offset = chance(80) ? 0 : p->dtype == WCE_F16 ? 1e4 : 1e6;
  p->logits = random_view(p, class_is_unit, 1);
  int64_t extent = view_extent(p, &p->logits);
  void *data = buffer(extent, dtype_size(p->dtype));
  for (int64_t i = 0; i < extent; i++) set_element(data, p->dtype, i, NAN);
  for (int64_t row = 0; row < now.rows; row++) {
    int percent = now.special && chance(30) ? (chance(20) ? 100 : 10) : 0;
    int only_low = chance(50); /* -inf alone */
    for (int64_t c = 0; c < p->classes; c++) {
      double x = offset + spread * normal();
      if (chance(percent)) x = only_low ? -INFINITY : special_logit();
      if (now.wild && chance(1)) x = wild_value();
      set_element(data, p->dtype, view_index(p, &p->logits, row, c), x);
    }
  }
  p->logits.data = data;
}

static void random_prob(wce_problem *p, int class_is_unit) {
  wce_dtype narrow[] = {WCE_F32, WCE_BF16, WCE_F16};
  p->prob_dtype = p->dtype == WCE_F64 ? WCE_F64 : narrow[below(3)];
  p->prob = random_view(p, class_is_unit, 1);
  int64_t extent = view_extent(p, &p->prob);
  void *data = buffer(extent, dtype_size(p->prob_dtype));
  for (int64_t i = 0; i < extent; i++) set_element(data, p->prob_dtype, i, NAN);
  for (int64_t row = 0; row < now.rows; row++) {
    int zero = chance(15) ? 100 : chance(50) ? 60 : 0;
    for (int64_t c = 0; c < p->classes; c++) {
      double q = chance(zero) ? 0 : (uniform() - (chance(5) ? 0.5 : 0)) / (double)p->classes;
      set_element(data, p->prob_dtype, view_index(p, &p->prob, row, c),
                  now.wild && chance(5) ? wild_value() : q);
    }
  }
  p->prob.data = data;
}

static int64_t garbage_class(void) {
  int64_t values[] = {-1, now.p.classes, INT64_MIN, INT64_MAX, now.p.classes + 1, -now.p.classes,
                      INT64_C(1) << 32, (int64_t)random_bits()};
  return values[below(8)];
}

static const int64_t *random_target(const wce_problem *p, int garbage) {
  int64_t *target = buffer(now.rows, sizeof *target);
  int ignored = chance(50) ? 0 : chance(10) ? 100 : 30;
  for (int64_t row = 0; row < now.rows; row++) {
    target[row] = p->classes ? below(p->classes) : p->ignore_index;
    if (chance(ignored)) target[row] = p->ignore_index;
    if (chance(garbage)) target[row] = garbage_class();
  }
  return target;
}

static void random_targets(wce_problem *p, int class_is_unit) {
  double e = chance(60) ? 0 : chance(20) ? 1 : uniform();
  int garbage = chance(85) ? 0 : chance(30) ? 100 : 5;
  double smooth = p->classes ? e / (double)p->classes : 0;
  p->ignore_index = chance(60) ? -100 : chance(50) ? below(p->classes + 2) : (int64_t)random_bits();
  if (chance(35)) {
    random_prob(p, chance(75) ? class_is_unit : !class_is_unit);
    p->spike = 0, p->floor = smooth, p->soft = 1 - e;
    p->skip_empty = chance(40);
    if (now.wants_rows && chance(30)) p->target = random_target(p, garbage);
  } else {
    p->target = random_target(p, garbage);
    p->spike = 1 - e, p->floor = smooth, p->soft = 0;
  }
  if (!p->target || p->prob.data || chance(70)) return;
  p->target2 = random_target(p, garbage);
  p->mix_stride = chance(50);
  p->mix = random_table(p->mix_stride ? now.rows : 1, 100, 0, 1);
  if (!p->mix_stride && chance(20)) set_element((void *)p->mix, acc_dtype(p->dtype), 0, below(2));
}

static void random_case(uint64_t seed) {
  static const char *const regimes[] = {NULL, "auto", "tile", "rows", "split"};
  memset(&now, 0, sizeof now);
  random_state = now.seed = seed;
  wce_problem *p = &now.p;
  p->dtype = (wce_dtype)below(WCE_DTYPE_COUNT);
  random_shape(p);
  now.rows = p->outer * p->inner;
  now.wild = chance(10), now.special = chance(25), now.wants_rows = chance(40);
  now.regime = regimes[below(5)];
  int class_is_unit = chance(60);
  random_logits(p, class_is_unit);
  random_targets(p, class_is_unit);
  p->weight = random_table(p->classes, 60, now.special || chance(70) ? 0 : -2, 3);
  p->prior = random_table(p->classes, 25, -8, 0);
  if (p->prior && p->classes && chance(20))
    set_element((void *)p->prior, acc_dtype(p->dtype), below(p->classes), -INFINITY);
  p->sample_weight = random_table(now.rows, 25, 0, 2);
  if (chance(25)) {
    uint8_t *mask = buffer(now.rows, 1);
    for (int64_t row = 0; row < now.rows; row++) mask[row] = (uint8_t)chance(70);
    p->mask = mask;
  }
  now.expected = buffer(now.rows, sizeof *now.expected);
  for (int64_t row = 0; row < now.rows; row++) {
    now.expected[row] = expect_row(p, row);
    if (strcmp(plant, "value") == 0) now.expected[row].loss *= 1.01;
  }
}

/* ---- comparison ------------------------------------------------------------------------------ */

static void wrong(const char *what, int64_t row, int64_t c, double got, double want, double slack) {
  describe();
  fprintf(stderr,
          "WRONG %s of row %" PRId64 ", class %" PRId64 ": got %.17g, expected %.17g +- %.3g\n",
          what, row, c, got, want, slack);
  exit(1);
}

/* Rounding of sums of up to `classes` terms, and of e^(x - m) while it is not 0: for x - m down to
 * -104 (float) or -745 (double). As a part of the sum of the terms' absolute values.             */
static double rounding(void) {
  double n = (double)now.p.classes;
  return now.p.dtype == WCE_F64 ? 0x1p-53 * (1024 + n) : 0x1p-24 * (256 + n);
}

static double output_rounding(wce_dtype dtype) {
  return dtype == WCE_BF16 ? 0x1p-8 : dtype == WCE_F16 ? 0x1p-10 : 0;
}

static void compare(const char *what, int64_t row, int64_t c, wce_dtype dtype, double got,
                    double want, double size) {
  if (isnan(size)) size = 0; /* a row with nan: then only values that do not depend on it count */
  double slack = rounding() * size + output_rounding(dtype) * fabs(want) + 1e-36 * (1 + size);
  if (now.wild) return;
  if (dtype == WCE_F16) slack += 0x1p-24;
  if (dtype == WCE_F16 && isfinite(want) && fabs(want) + slack > 65000) return;
  if (isnan(want) ? isnan(got) : isinf(want) ? got == want : fabs(got - want) <= slack) return;
  wrong(what, row, c, got, want, slack);
}

static void check_outputs(const wce_row_outputs *out) {
  wce_dtype acc = acc_dtype(now.p.dtype);
  double tiny = rounding();
  for (int64_t row = 0; row < now.rows; row++) {
    const expected_row *e = now.expected + row;
    double m = fabs(e->m), L = e->L + 1;
    if (out->loss) {
      expected_row first = expect_half(&now.p, e, row, 0), second = expect_half(&now.p, e, row, 1);
      int two = now.p.target2 != NULL;
      compare("loss", row, -1, out->loss_dtype, element(out->loss, out->loss_dtype, row),
              first.loss + (two ? second.loss : 0), first.loss_size + (two ? second.loss_size : 0));
    }
    if (out->max && isfinite(e->m))
      compare("max", row, -1, acc, element(out->max, acc, row), e->m, 0);
    if (out->log_sum) compare("log_sum", row, -1, acc, element(out->log_sum, acc, row), e->L, L);
    if (out->coef_sum)
      compare("coef_sum", row, -1, acc, element(out->coef_sum, acc, row), e->A, e->a_size);
    if (out->lse) compare("lse", row, -1, acc, element(out->lse, acc, row), e->lse, m + L);
    if (out->log_prob)
      compare("log_prob", row, -1, acc, element(out->log_prob, acc, row), e->log_prob,
              fabs(e->log_prob) + L);
    if (out->entropy)
      compare("entropy", row, -1, acc, element(out->entropy, acc, row), e->entropy,
              e->entropy_size);
    if (out->correct && isfinite(e->m))
      compare("correct", row, -1, WCE_F64, out->correct[row], e->correct, tiny);
  }
}

static void check_sums(const wce_sums *got) {
  wce_sums want = {.bad_row = -1};
  double loss_size = 0, weight_size = 0, loss2_size = 0, weight2_size = 0;
  for (int64_t row = 0; row < now.rows; row++) {
    const expected_row *e = now.expected + row;
    expected_row first = expect_half(&now.p, e, row, 0), second = expect_half(&now.p, e, row, 1);
    want.count += e->counts;
    want.loss += first.loss, want.weight += first.weight;
    if (first.counts) loss_size += first.loss_size, weight_size += fabs(first.weight);
    if (now.p.target2) want.loss2 += second.loss, want.weight2 += second.weight;
    if (second.counts) loss2_size += second.loss_size, weight2_size += fabs(second.weight);
    if (e->bad && want.bad_row < 0) want.bad_row = row;
  }
  if (now.wild ? got->bad_row < -1 || got->bad_row >= now.rows : got->bad_row != want.bad_row)
    wrong("bad_row", -1, -1, (double)got->bad_row, (double)want.bad_row, 0);
  if (want.bad_row >= 0) return;   /* the caller raises and takes nothing */
  if (now.p.classes == 0) return; /* the caller knows the answers without the kernels */
  double terms = 1 + (double)now.rows / 256; /* rounding() allows for 256 of them */
  compare("sum of loss", -1, -1, WCE_F64, got->loss, want.loss, loss_size * terms);
  compare("sum of weight", -1, -1, WCE_F64, got->weight, want.weight, weight_size * terms);
  compare("sum of loss2", -1, -1, WCE_F64, got->loss2, want.loss2, loss2_size * terms);
  compare("sum of weight2", -1, -1, WCE_F64, got->weight2, want.weight2, weight2_size * terms);
  compare("count", -1, -1, WCE_F64, (double)got->count, (double)want.count, 0);
}

static int any_bad(void) {
  int bad = 0;
  for (int64_t row = 0; row < now.rows; row++) bad |= now.expected[row].bad;
  return bad;
}

/* ---- forward --------------------------------------------------------------------------------- */

static void *maybe_rows(int wanted, wce_dtype dtype) {
  return wanted && chance(60) ? buffer(now.rows, dtype_size(dtype)) : NULL;
}

static wce_row_outputs random_outputs(void) {
  wce_dtype acc = acc_dtype(now.p.dtype);
  wce_row_outputs out = {0};
  int stats = chance(70);
  out.loss_dtype = chance(50) ? now.p.dtype : acc;
  out.loss = maybe_rows(1, out.loss_dtype);
  if (stats) out.max = buffer(now.rows, dtype_size(acc));
  if (stats) out.log_sum = buffer(now.rows, dtype_size(acc));
  if (stats && now.p.prob.data) out.coef_sum = buffer(now.rows, dtype_size(acc));
  out.lse = maybe_rows(now.wants_rows, acc);
  out.log_prob = maybe_rows(now.wants_rows && now.p.target, acc);
  out.entropy = maybe_rows(now.wants_rows, acc);
  if (now.wants_rows && now.p.target && chance(50)) out.correct = buffer(now.rows, 1);
  return out;
}

/* Tasks in a random rotation and direction: their order must not matter. */
static int64_t nth_task(int64_t i, int64_t tasks, int64_t start, int backwards) {
  int64_t task = (start + i) % tasks;
  return backwards ? tasks - 1 - task : task;
}

static wce_sums run_forward(const wce_plan *plan, const wce_row_outputs *out, wce_sums *sums) {
  wce_piece *pieces = plan->pieces ? buffer(plan->pieces, sizeof *pieces) : NULL;
  int64_t start = plan->tasks ? below(plan->tasks) : 0;
  int backwards = chance(50);
  int64_t extent = view_extent(&now.p, &now.p.logits);
  plant_bound("read", &now.p, &now.p.logits, extent);
  for (int64_t i = 0; i < plan->tasks; i++)
    wce_cpu_forward(plan, &now.p, out, nth_task(i, plan->tasks, start, backwards), sums, pieces);
  lift_bound(&now.p, &now.p.logits, extent);
  wce_sums total = wce_cpu_finish(plan, &now.p, out, sums, pieces);
  check_sums(&total);
  if (now.p.classes && !any_bad()) check_outputs(out);
  return total;
}

/* ---- backward -------------------------------------------------------------------------------- */

static const void *random_upstream(int64_t count, wce_dtype dtype) {
  void *grad = buffer(count, dtype_size(dtype));
  for (int64_t i = 0; i < count; i++)
    set_element(grad, dtype, i, now.wild && chance(20) ? wild_value() : chance(10) ? 0 : normal());
  return grad;
}

/* An upstream gradient of a row that does not count may hold anything. */
static void spoil_uncounted(const void *grad, wce_dtype dtype) {
  for (int64_t row = 0; row < now.rows; row++)
    if (!now.expected[row].counts) set_element((void *)grad, dtype, row, NAN);
}

static const void *random_denominator(wce_dtype acc) {
  void *denominator = buffer(1, dtype_size(acc));
  set_element(denominator, acc, 0, now.wild ? wild_value() : 0.5 + 10 * uniform());
  return denominator;
}

static wce_row_grads random_grads(const wce_row_outputs *out) {
  wce_dtype acc = acc_dtype(now.p.dtype);
  wce_row_grads grads = {0};
  if (chance(70)) {
    grads.max = out->max, grads.log_sum = out->log_sum;
    grads.coef_sum = out->coef_sum;
  }
  grads.grad_dtype = out->loss_dtype;
  grads.grad_stride = chance(50);
  if (!now.wants_rows || chance(80))
    grads.grad = random_upstream(grads.grad_stride ? now.rows : 1, grads.grad_dtype);
  if (grads.grad && grads.grad_stride && chance(50)) spoil_uncounted(grads.grad, grads.grad_dtype);
  if (chance(50)) grads.denominator = random_denominator(acc);
  if (now.p.target2 && chance(50)) grads.denominator2 = random_denominator(acc);
  if (now.wants_rows && chance(50)) grads.grad_lse = random_upstream(now.rows, acc);
  if (now.wants_rows && now.p.target && chance(50))
    grads.grad_log_prob = random_upstream(now.rows, acc);
  return grads;
}

/* Everything between the elements of dx still holds the pattern that buffer() wrote. */
static void check_gaps(const wce_view *dx, int64_t extent) {
  int64_t size = dtype_size(now.p.dtype);
  char *used = buffer(extent, 1);
  memset(used, 0, (size_t)extent);
  for (int64_t row = 0; row < now.rows; row++)
    for (int64_t c = 0; c < now.p.classes; c++) used[view_index(&now.p, dx, row, c)] = 1;
  for (int64_t i = 0; i < extent * size; i++)
    if (!used[i / size] && ((const uint8_t *)dx->data)[i] != 0xa5)
      wrong("a gap of dx, which was written", -1, i / size, 0, 0, 0);
}

static void check_gradient(const wce_row_grads *grads) {
  const wce_problem *p = &now.p;
  for (int64_t row = 0; row < now.rows; row++) {
    const expected_row *e = now.expected + row;
    if (e->bad) continue;
    expected_row halves[2] = {expect_half(p, e, row, 0), expect_half(p, e, row, 1)};
    for (int64_t c = 0; c < p->classes; c++) {
      expected_gradient want = expect_gradient(p, grads, halves, row, c);
      double got = element(grads->dx.data, p->dtype, view_index(p, &grads->dx, row, c));
      if (want.size == 0 && want.value == 0 && got == 0) continue;
      compare("dx", row, c, p->dtype, got, want.value, want.size);
    }
  }
}

static wce_row_grads run_backward(const wce_plan *plan, const wce_row_outputs *out) {
  wce_row_grads grads = random_grads(out);
  grads.dx = random_view(&now.p, now.p.logits.stride_class == 1, 0);
  int64_t extent = view_extent(&now.p, &grads.dx), bad = -1;
  grads.dx.data = buffer(extent, dtype_size(now.p.dtype));
  int64_t start = plan->tasks ? below(plan->tasks) : 0;
  plant_bound("write", &now.p, &grads.dx, extent);
  for (int64_t i = 0; i < plan->tasks; i++) {
    int64_t row = wce_cpu_backward(plan, &now.p, &grads, nth_task(i, plan->tasks, start, 0));
    if (row >= 0 && (bad < 0 || row < bad)) bad = row;
  }
  lift_bound(&now.p, &grads.dx, extent);
  int64_t first = -1;
  for (int64_t row = now.rows - 1; row >= 0; row--)
    if (now.expected[row].bad) first = row;
  if (now.p.classes && !now.wild && bad != first)
    wrong("bad_row of backward", -1, -1, (double)bad, (double)first, 0);
  if (now.p.classes) check_gaps(&grads.dx, extent), check_gradient(&grads);
  return grads;
}

/* ---- both in one go: the same bits ----------------------------------------------------------- */

static void check_same(const char *what, const void *got, const void *want, wce_dtype dtype,
                       int64_t count) {
  int64_t size = dtype_size(dtype);
  for (int64_t i = 0; want && i < count; i++) {
    if (!memcmp((const char *)got + i * size, (const char *)want + i * size, (size_t)size)) continue;
    double a = element(got, dtype, i), b = element(want, dtype, i);
    if (!isnan(a) || !isnan(b)) wrong(what, -1, i, a, b, 0);
  }
}

static void check_weights(const wce_plan *plan, const wce_sums *forward) {
  wce_sums *sums = buffer(plan->tasks, sizeof *sums);
  for (int64_t i = 0; i < plan->tasks; i++) wce_cpu_weigh(plan, &now.p, i, sums);
  wce_sums got = wce_cpu_add(plan, sums);
  check_same("weight before forward", &got.weight, &forward->weight, WCE_F64, 1);
  check_same("weight2 before forward", &got.weight2, &forward->weight2, WCE_F64, 1);
  if (got.count != forward->count)
    wrong("count before forward", -1, -1, (double)got.count, (double)forward->count, 0);
  if (got.bad_row != forward->bad_row)
    wrong("bad_row before forward", -1, -1, (double)got.bad_row, (double)forward->bad_row, 0);
}

static void *like(const void *rows, wce_dtype dtype) {
  return rows ? buffer(now.rows, dtype_size(dtype)) : NULL;
}

/* The sums of loss and weight of each task as four doubles. */
static double *task_sums(const wce_plan *plan, const wce_sums *sums) {
  double *values = buffer(4 * plan->tasks, sizeof *values);
  for (int64_t i = 0; i < plan->tasks; i++) {
    values[4 * i] = sums[i].loss, values[4 * i + 1] = sums[i].loss2;
    values[4 * i + 2] = sums[i].weight, values[4 * i + 3] = sums[i].weight2;
  }
  return values;
}

/* forward: the sums of each task. */
static void run_both(const wce_plan *plan, const wce_row_outputs *out, const wce_row_grads *grads,
                     const wce_sums *forward) {
  wce_dtype acc = acc_dtype(now.p.dtype);
  wce_row_outputs again = {.loss_dtype = out->loss_dtype, .loss = like(out->loss, out->loss_dtype),
                           .max = like(out->max, acc), .log_sum = like(out->log_sum, acc),
                           .coef_sum = like(out->coef_sum, acc), .entropy = like(out->entropy, acc),
                           .log_prob = like(out->log_prob, acc),
                           .correct = out->correct ? buffer(now.rows, 1) : NULL};
  wce_row_grads g = *grads;
  if (g.max) g.max = again.max, g.log_sum = again.log_sum, g.coef_sum = again.coef_sum;
  int64_t extent = view_extent(&now.p, &g.dx);
  g.dx.data = buffer(extent, dtype_size(now.p.dtype));
  wce_sums *sums = buffer(plan->tasks, sizeof *sums);
  int64_t cut = below(plan->tasks + 1); /* as two threads would share the tasks                    */
  if (cut > 0) wce_cpu_both(plan, &now.p, &again, &g, 0, cut, sums);
  if (cut < plan->tasks) wce_cpu_both(plan, &now.p, &again, &g, cut, plan->tasks, sums);
  check_same("sums in one go", task_sums(plan, sums), task_sums(plan, forward), WCE_F64,
             4 * plan->tasks);
  check_same("loss in one go", again.loss, out->loss, out->loss_dtype, now.rows);
  check_same("max in one go", again.max, out->max, acc, now.rows);
  check_same("log_sum in one go", again.log_sum, out->log_sum, acc, now.rows);
  check_same("coef_sum in one go", again.coef_sum, out->coef_sum, acc, now.rows);
  check_same("entropy in one go", again.entropy, out->entropy, acc, now.rows);
  check_same("log_prob in one go", again.log_prob, out->log_prob, acc, now.rows);
  if (out->correct && memcmp(again.correct, out->correct, (size_t)now.rows))
    wrong("correct in one go", -1, -1, 0, 0, 0);
  check_same("dx in one go", g.dx.data, grads->dx.data, now.p.dtype, extent);
}

/* ---- all cases ------------------------------------------------------------------------------- */

static void run_case(uint64_t seed) {
  random_case(seed);
  if (wce_cpu_regime_force(now.regime)) wrong("name of a regime", -1, -1, 0, 0, 0);
  uint64_t state = random_state;
  int keep = buffer_count;
  for (int i = 0; i < wce_cpu_isa_count(); i++) {
    if (!wce_cpu_isa_supported(i)) continue;
    now.isa = wce_cpu_isa_name(i);
    if (wce_cpu_isa_select(now.isa)) wrong("choice of an instruction set", -1, -1, 0, 0, 0);
    random_state = state; /* the same outputs, upstream gradients and strides for each */
    now.p.prior_two = NULL;
    if (below(4)) wce_cpu_order_prior(&now.p, buffer(now.p.classes, dtype_size(acc_dtype(now.p.dtype))));
    wce_plan plan = wce_cpu_plan(&now.p);
    if (below(2)) plan.stream = 1; /* also small gradients go through the stage                 */
    plan.exp_is_slow = below(2); /* whatever this processor is                                   */
    wce_row_outputs out = random_outputs();
    wce_sums *sums = buffer(plan.tasks, sizeof *sums), total = run_forward(&plan, &out, sums);
    wce_row_grads grads = run_backward(&plan, &out);
    check_weights(&plan, &total);
    if (plan.regime != WCE_SPLIT) run_both(&plan, &out, &grads, sums);
    release_buffers(keep);
  }
  release_buffers(0);
}

static double seconds_now(void) {
  struct timespec t;
  timespec_get(&t, TIME_UTC);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char **argv) {
  uint64_t seed = 1, cases = 0, done = 0;
  double seconds = 20, start = seconds_now();
  for (int i = 1; i + 1 < argc; i += 2) {
    if (strcmp(argv[i], "--seed") == 0) seed = strtoull(argv[i + 1], NULL, 10);
    else if (strcmp(argv[i], "--seconds") == 0) seconds = atof(argv[i + 1]);
    else if (strcmp(argv[i], "--cases") == 0) cases = strtoull(argv[i + 1], NULL, 10);
    else if (strcmp(argv[i], "--plant") == 0) plant = argv[i + 1];
    else return fprintf(stderr, "unknown option %s\n", argv[i]), 2;
  }
  signal(SIGABRT, on_abort);
  while (cases ? done < cases : seconds_now() - start < seconds) run_case(seed + done++);
  printf("%" PRIu64 " cases from seed %" PRIu64 " in %.0f s on", done, seed, seconds_now() - start);
  for (int i = 0; i < wce_cpu_isa_count(); i++)
    if (wce_cpu_isa_supported(i)) printf(" %s", wce_cpu_isa_name(i));
  printf(": no error\n");
  return 0;
}

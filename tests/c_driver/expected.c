/* expected.c -- see expected.h. */
#include "expected.h"

#include <math.h>
#include <string.h>

/* ---- elements of any dtype ------------------------------------------------------------------- */

int64_t dtype_size(wce_dtype dtype) { return dtype == WCE_F64 ? 8 : dtype == WCE_F32 ? 4 : 2; }
wce_dtype acc_dtype(wce_dtype dtype) { return dtype == WCE_F64 ? WCE_F64 : WCE_F32; }

static double half_value(uint16_t bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent     ? ldexp(1024 + fraction, exponent - 25)
                               : ldexp(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

/* Towards zero: test data need no particular rounding. */
static uint16_t half_bits(double value) {
  uint16_t sign = signbit(value) ? 0x8000 : 0;
  if (isnan(value)) return 0x7e00;
  if (fabs(value) > 65504) return sign | 0x7c00;
  int exponent;
  double fraction = frexp(fabs(value), &exponent); /* in [1/2, 1) */
  if (value == 0 || exponent < -13) return sign | (uint16_t)ldexp(fabs(value), 24);
  return (uint16_t)(sign + ((exponent + 13) << 10) + (int)ldexp(fraction, 11));
}

double element(const void *data, wce_dtype dtype, int64_t index) {
  uint16_t half;
  uint32_t bits;
  float f;
  if (dtype == WCE_F64) return ((const double *)data)[index];
  if (dtype == WCE_F32) return (double)((const float *)data)[index];
  half = ((const uint16_t *)data)[index];
  if (dtype == WCE_F16) return half_value(half);
  bits = (uint32_t)half << 16;
  memcpy(&f, &bits, sizeof f);
  return (double)f;
}

void set_element(void *data, wce_dtype dtype, int64_t index, double value) {
  float f = (float)value;
  uint32_t bits;
  memcpy(&bits, &f, sizeof f);
  if (dtype == WCE_F64) ((double *)data)[index] = value;
  else if (dtype == WCE_F32) ((float *)data)[index] = f;
  else if (dtype == WCE_F16) ((uint16_t *)data)[index] = half_bits(value);
  else ((uint16_t *)data)[index] = isnan(f) ? 0x7fc0 : (uint16_t)(bits >> 16);
}

double acc_element(const wce_problem *p, const void *data, int64_t index, double absent) {
  return data ? element(data, acc_dtype(p->dtype), index) : absent;
}

/* ---- one row --------------------------------------------------------------------------------- */

int64_t view_index(const wce_problem *p, const wce_view *view, int64_t row, int64_t c) {
  return row / p->inner * view->stride_outer + row % p->inner * view->stride_inner +
         c * view->stride_class;
}

double logit(const wce_problem *p, int64_t row, int64_t c) {
  double x = element(p->logits.data, p->dtype, view_index(p, &p->logits, row, c));
  if (!p->prior) return x;
  double sum = x + acc_element(p, p->prior, c, 0);
  return p->dtype == WCE_F64 ? sum : (double)(float)sum;
}

static double probability(const wce_problem *p, int64_t row, int64_t c) {
  return p->prob.data ? element(p->prob.data, p->prob_dtype, view_index(p, &p->prob, row, c)) : 0;
}

double coefficient(const wce_problem *p, const expected_row *e, int64_t row, int64_t c) {
  double q = p->floor + (c == e->y ? p->spike : 0) + p->soft * probability(p, row, c);
  return q == 0 ? 0 : acc_element(p, p->weight, c, 1) * q;
}

/* The sum of its terms' absolute values: a negative probability may cancel the rest.              */
static double coefficient_size(const wce_problem *p, const expected_row *e, int64_t row,
                               int64_t c) {
  double q = p->floor + (c == e->y ? p->spike : 0) + fabs(p->soft * probability(p, row, c));
  return q == 0 ? 0 : fabs(acc_element(p, p->weight, c, 1)) * q;
}

/* Class of a target value, or -1. */
static int64_t class_of(const wce_problem *p, const int64_t *target, int64_t row, int *bad) {
  if (!target || target[row] == p->ignore_index) return -1;
  int64_t y = target[row];
  if (y >= 0 && y < p->classes && acc_element(p, p->prior, y, 0) != -INFINITY) return y;
  *bad = 1;
  return -1;
}

static int row_counts(const wce_problem *p, const expected_row *e, int64_t row) {
  if (p->mask && !p->mask[row]) return 0;
  if (!p->prob.data) return !p->target || e->y >= 0 || e->y2 >= 0;
  for (int64_t c = 0; c < p->classes; c++)
    if (!p->skip_empty || probability(p, row, c) != 0) return 1;
  return !p->skip_empty;
}

static void row_softmax(const wce_problem *p, expected_row *e, int64_t row) {
  double s = 0, u = 0;
  e->m = -INFINITY;
  for (int64_t c = 0; c < p->classes; c++) {
    double x = logit(p, row, c);
    if (x > e->m || isnan(x)) e->m = x;
    if (isnan(x)) break;
  }
  for (int64_t c = 0; c < p->classes; c++) s += exp(logit(p, row, c) - e->m);
  e->L = isfinite(e->m) ? log(s) : NAN;
  for (int64_t c = 0; c < p->classes; c++) {
    double d = logit(p, row, c) - e->m;
    if (d != -INFINITY) u += exp(d) / s * d;
  }
  e->lse = e->m + e->L;
  e->entropy = e->L - u;
  e->entropy_size = e->L - u + 1;
}

static void row_loss(const wce_problem *p, expected_row *e, int64_t row, double share) {
  double D = 0, d_size = 0;
  e->A = e->a_size = e->loss = e->loss_size = e->weight = 0;
  for (int64_t c = 0; c < p->classes; c++) {
    double a = coefficient(p, e, row, c), d = logit(p, row, c) - e->m;
    if (a == 0) continue;
    e->A += a, D += a * d;
    double size = coefficient_size(p, e, row, c);
    e->a_size += size, d_size += size * fabs(d);
  }
  if (!e->counts) return;
  e->loss = e->sample * (e->A * e->L - D);
  e->loss_size = fabs(e->sample) * (e->a_size * (e->L + 1) + d_size);
  e->weight = e->sample;
  if (p->target && !p->prob.data)
    e->weight *= e->y >= 0 ? acc_element(p, p->weight, e->y, 1) : 0;
  e->loss *= share, e->loss_size *= share;
}

static double share_of(const wce_problem *p, int64_t row, int half) {
  double mix = acc_element(p, p->mix, row * p->mix_stride, 1);
  return half ? 1 - mix : mix;
}

expected_row expect_half(const wce_problem *p, const expected_row *e, int64_t row, int half) {
  expected_row one = *e;
  if (!p->target2) return one;
  one.y = half ? e->y2 : e->y;
  one.counts = e->counts && one.y >= 0;
  row_loss(p, &one, row, share_of(p, row, half));
  return one;
}

expected_row expect_row(const wce_problem *p, int64_t row) {
  expected_row e = {0};
  e.y = class_of(p, p->target, row, &e.bad);
  e.y2 = class_of(p, p->target2, row, &e.bad);
  e.counts = row_counts(p, &e, row);
  e.sample = acc_element(p, p->sample_weight, row, 1);
  row_softmax(p, &e, row);
  row_loss(p, &e, row, 1);
  e.log_prob = e.y >= 0 ? logit(p, row, e.y) - e.m - e.L : 0;
  e.correct = e.y >= 0 && logit(p, row, e.y) == e.m;
  return e;
}

/* ---- one element of the gradient ------------------------------------------------------------- */

static expected_gradient target_gradient(const wce_problem *p, const wce_row_grads *grads,
                                         const expected_row *e, int64_t row, int64_t c,
                                         double share, const void *denominator) {
  double g = grads->grad ? element(grads->grad, grads->grad_dtype, row * grads->grad_stride) : 0;
  double gs = e->counts ? g / acc_element(p, denominator, 0, 1) * e->sample * share : 0;
  double h = acc_element(p, grads->grad_lse, row, 0);
  double u = e->y >= 0 ? acc_element(p, grads->grad_log_prob, row, 0) : 0;
  expected_gradient d = {0, 0};
  if (!e->counts && h == 0 && u == 0) return d;
  double prob = isfinite(e->m) ? exp(logit(p, row, c) - e->m - e->L) : NAN;
  double a = e->counts ? coefficient(p, e, row, c) : 0;
  double a_size = e->counts ? coefficient_size(p, e, row, c) : 0;
  d.value = gs * ((e->counts ? e->A : 0) * prob - a) + h * prob + u * ((c == e->y) - prob);
  d.size = fabs(gs) * (e->a_size * prob + a_size) + fabs(h) * prob +
           fabs(u) * ((c == e->y) + prob);
  return d;
}

expected_gradient expect_gradient(const wce_problem *p, const wce_row_grads *grads,
                                  const expected_row halves[2], int64_t row, int64_t c) {
  if (!p->target2) return target_gradient(p, grads, halves, row, c, 1, grads->denominator);
  wce_row_grads loss_only = *grads;
  loss_only.grad_lse = loss_only.grad_log_prob = NULL;
  expected_gradient d =
      target_gradient(p, grads, halves, row, c, share_of(p, row, 0), grads->denominator);
  expected_gradient d2 = target_gradient(p, &loss_only, halves + 1, row, c, share_of(p, row, 1),
                                         grads->denominator2);
  return (expected_gradient){d.value + d2.value, d.size + d2.size};
}

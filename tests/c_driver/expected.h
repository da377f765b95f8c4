/* expected.h -- the definition of wce.h once more, in double, one class after the other.
 *
 * Nothing of csrc is called here: this is what the kernels are compared with.                    */
#ifndef EXPECTED_H
#define EXPECTED_H

#include "wce.h"

typedef struct { /* one row */
  int counts, bad;
  int64_t y, y2;            /* class, or -1: absent, ignored or bad                               */
  double m, L;              /* nan L: the row holds nan, +inf, or nothing but -inf                */
  double loss, weight;
  double lse, log_prob, entropy;
  int correct;
  double A, sample;
  double a_size, loss_size, entropy_size; /* sums of absolute values, to measure rounding by */
} expected_row;

double element(const void *data, wce_dtype dtype, int64_t index);
void set_element(void *data, wce_dtype dtype, int64_t index, double value);
int64_t dtype_size(wce_dtype dtype);
wce_dtype acc_dtype(wce_dtype dtype);
double acc_element(const wce_problem *p, const void *data, int64_t index, double absent);

int64_t view_index(const wce_problem *p, const wce_view *view, int64_t row, int64_t c);
double logit(const wce_problem *p, int64_t row, int64_t c); /* x_c + prior_c */
double coefficient(const wce_problem *p, const expected_row *e, int64_t row, int64_t c); /* a_c */

expected_row expect_row(const wce_problem *p, int64_t row);
/* One half of a mixture, or (half 0) the row itself where there is no second target.             */
expected_row expect_half(const wce_problem *p, const expected_row *e, int64_t row, int half);

typedef struct { double value, size; } expected_gradient;
/* halves: what expect_half gives for the row.                                                     */
expected_gradient expect_gradient(const wce_problem *p, const wce_row_grads *grads,
                                  const expected_row halves[2], int64_t row, int64_t c);

#endif

// row_math.cuh -- what happens once per row: its target, loss, and coefficients of its gradient.
#ifndef WCE_CUDA_ROW_MATH_CUH
#define WCE_CUDA_ROW_MATH_CUH

#include "../loss_math.h"
#include "reduce.cuh"

namespace wce_cuda {

struct place {
  int64_t outer, inner;
};

// row = outer*inner_size + inner. A 64-bit division costs about 100 instructions: avoided.
WCE_DEVICE place place_of(int64_t row, int64_t inner_size) {
  if (inner_size == 1) return {row, 0};
  if (static_cast<uint64_t>(row | inner_size) >> 32 == 0) {
    const uint32_t o = static_cast<uint32_t>(row) / static_cast<uint32_t>(inner_size);
    return {o, row - static_cast<int64_t>(o) * inner_size};
  }
  const int64_t o = row / inner_size;
  return {o, row - o * inner_size};
}

WCE_DEVICE int64_t offset_of(const wce_view &view, const place &at) {
  return at.outer * view.stride_outer + at.inner * view.stride_inner;
}

template <class A>
WCE_DEVICE A value_at(const void *values, int64_t index) {
  return static_cast<const A *>(values)[index];
}

// What the arguments say about one row, apart from its classes. xy: logit of y, prior included.
// s, s2: its factors in the loss of y and, in a mixture, of y2; sample: the sample weight.
template <class A>
struct row_info {
  int64_t y, y2;
  A xy, xy2, wy, wy2, s, s2, sample;
  bool has_y, has_y2, counts, bad;
};

// A class that may be used as an index, or -1. bad: neither a class nor ignore_index, or a class
// that the prior rules out.
template <class A>
WCE_DEVICE int64_t checked_class(const wce_problem &p, int64_t y, bool &bad) {
  if (y == p.ignore_index) return -1;
  if (!WCE_GUARD(target_range, y >= 0 && y < p.classes)) {
    bad = true;
    return -1;
  }
  if (p.prior && value_at<A>(p.prior, y) == -infinity<A>()) {
    bad = true;
    return -1;
  }
  return y;
}

// x: the row's class 0.
template <class T>
WCE_DEVICE row_info<acc<T>> load_row_info(const wce_problem &p, int64_t row, const T *x) {
  using A = acc<T>;
  row_info<A> r;
  r.y = r.y2 = -1;
  r.xy = r.xy2 = r.s2 = 0;
  r.wy = r.wy2 = r.s = r.sample = 1;
  r.bad = false;
  r.counts = true;
  const int64_t step = p.logits.stride_class;
  const bool index_target = p.target && !p.prob.data;
  if (p.target) r.y = checked_class<A>(p, p.target[row], r.bad);
  if (p.target2) r.y2 = checked_class<A>(p, p.target2[row], r.bad);
  if (r.bad) r.y = r.y2 = -1;  // its row counts for nothing
  r.counts = !r.bad && (!index_target || r.y >= 0 || r.y2 >= 0);
  r.has_y = r.y >= 0;
  r.has_y2 = r.y2 >= 0;
  if (r.has_y) {
    r.xy = widen(x[r.y * step]) + (p.prior ? value_at<A>(p.prior, r.y) : A(0));
    if (p.weight && index_target) r.wy = value_at<A>(p.weight, r.y);
  }
  if (r.has_y2) {
    r.xy2 = widen(x[r.y2 * step]) + (p.prior ? value_at<A>(p.prior, r.y2) : A(0));
    if (p.weight) r.wy2 = value_at<A>(p.weight, r.y2);
  }
  if (p.mask && !p.mask[row]) r.counts = false;
  if (p.sample_weight) r.sample = value_at<A>(p.sample_weight, row);
  r.s = r.sample;
  if (p.target2) {  // a half whose target is ignored has no part
    const A mix = value_at<A>(p.mix, row * p.mix_stride);
    r.s = r.has_y ? r.sample * mix : A(0);
    r.s2 = r.has_y2 ? r.sample * (1 - mix) : A(0);
  }
  return r;
}

// Says what is wrong and stops the device.
WCE_DEVICE void stop_at_bad_target(long long row, long long y, long long classes) {
  printf("wce_torch: target %lld at row %lld is out of bounds for %lld classes (or is a class "
         "whose prior is 0).\n", y, row, classes);
  assert(!"wce_torch: target out of bounds");
}

// Records the smallest bad row where `bad` is given, else stops the device. Called at the end of a
// kernel: a call in the middle would cost its loops registers.
template <class A>
WCE_DEVICE void report_bad_target(const wce_problem &p, long long row, unsigned long long *bad) {
  if (row == no_row) return;
  if (bad) {
    atomicMin(bad, static_cast<unsigned long long>(row));
    return;
  }
  int64_t y = p.target ? p.target[row] : p.ignore_index;
  bool first = false;
  checked_class<A>(p, y, first);
  if (!first && p.target2) y = p.target2[row];
  stop_at_bad_target(row, y, p.classes);
}

WCE_DEVICE float row_loss(float m, float l, float xy, float spike_w, float a, float ax) {
  return wce_row_loss_float(m, l, xy, spike_w, a, ax);
}
WCE_DEVICE double row_loss(double m, double l, double xy, double spike_w, double a, double ax) {
  return wce_row_loss_double(m, l, xy, spike_w, a, ax);
}

// log of the sum, nan for a row of nothing but -inf (and for one with a nan or +inf: s is nan).
template <class A>
WCE_DEVICE A log_sum_of(A m, A s) {
  return m == -infinity<A>() ? static_cast<A>(NAN) : log_of(s);
}

template <class A, int BODY>
WCE_DEVICE bool counts(const wce_problem &p, const row_info<A> &r, const stats<A, BODY> &st) {
  return r.counts && !(BODY != FAST && p.skip_empty && p.prob.data && !st.any);
}

// One thread per row: its outputs, and its share of the sums.
template <class A, int BODY>
WCE_DEVICE void finish_row(const wce_problem &p, const wce_row_outputs &out, int64_t row,
                           const stats<A, BODY> &st, const row_info<A> &r, sums &total) {
  const A m = st.m, l = log_sum_of(st.m, st.s);
  A loss = 0;
  if (counts(p, r, st)) {
    const A a = BODY == FAST ? A(0) : st.a, ax = BODY == FAST ? A(0) : st.ax;
    const A spike = static_cast<A>(p.spike);
    if (!p.target2 || r.has_y) {
      if (p.classes > 0) loss = r.s * row_loss(m, l, r.xy, r.has_y ? spike * r.wy : A(0), a, ax);
      total.loss += static_cast<double>(loss);
      total.weight += static_cast<double>(r.sample) * static_cast<double>(r.wy);
    }
    if (r.has_y2) {
      const A loss2 = r.s2 * row_loss(m, l, r.xy2, spike * r.wy2, a, ax);
      total.loss2 += static_cast<double>(loss2);
      total.weight2 += static_cast<double>(r.sample) * static_cast<double>(r.wy2);
      loss += loss2;
    }
    total.any = 1;
  }
  if (out.max) static_cast<A *>(out.max)[row] = m;
  if (out.log_sum) static_cast<A *>(out.log_sum)[row] = l;
  if (BODY != FAST && out.coef_sum) static_cast<A *>(out.coef_sum)[row] = st.a;
  if (out.loss) store_as(out.loss_dtype, out.loss, row, loss);
  if (out.lse) static_cast<A *>(out.lse)[row] = m + l;
  if (out.log_prob) static_cast<A *>(out.log_prob)[row] = r.has_y ? (r.xy - m) - l : A(0);
  if (BODY == ENTROPY && out.entropy) static_cast<A *>(out.entropy)[row] = l - st.ex / st.s;
  const bool with_nan = !(st.s == st.s) && m < infinity<A>();  // whose maximum is nan, not m
  if (out.correct) out.correct[row] = r.has_y && r.xy == m && !with_nan;
  if (r.bad && row < total.bad) total.bad = row;
}

// What the sums become. One thread.
template <class A>
WCE_DEVICE void finish_total(const wce_cuda_total &t, const sums &all) {
  double denominator = 1, denominator2 = 1, loss = all.loss + all.loss2;
  if (t.reduction == WCE_MEAN) {
    denominator = t.normalizer ? static_cast<double>(value_at<A>(t.normalizer, 0))
                               : wce_own_denominator(all.weight);
    loss = all.loss / denominator;
    if (t.denominator2) {
      denominator2 = wce_own_denominator(all.weight2);
      loss += all.loss2 / denominator2;
    }
    if (t.empty_zero && !all.any) {
      loss = 0;
      denominator = denominator2 = 1;
    }
  }
  if (t.loss && t.reduction != WCE_NONE) store_as(t.loss_dtype, t.loss, 0, loss);
  if (t.denominator) *static_cast<A *>(t.denominator) = static_cast<A>(denominator);
  if (t.denominator2) *static_cast<A *>(t.denominator2) = static_cast<A>(denominator2);
}

// The end of every forward kernel: one partial per block in a fixed place, or, where one block did
// everything, the result itself. shared: [threads/32] sums.
template <class A>
WCE_DEVICE void finish_block(const wce_problem &p, const wce_cuda_total &t, const sums &mine,
                             sums *partials, sums *shared, unsigned long long *bad) {
  const sums all = sum_block(mine, shared);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1 || (t.reduction == WCE_NONE && blockIdx.x == 0))
    finish_total<A>(t, all);
  else if (t.reduction != WCE_NONE)
    partials[blockIdx.x] = all;
  report_bad_target<A>(p, all.bad, bad);
}

// ---- backward: dx_c = ke*e^(x_c-m) - ka*a_c + dy*[c = y] + dy2*[c = y2], a_c without the spike --

template <class A>
struct row_grad {
  A m, ke, ka, dy, dy2;
  int64_t y, y2;
  bool zero;  // the whole row is exactly 0, whatever its logits hold
};

// Upstream gradient of one row's loss: of the half of y, or of that of y2.
template <class A>
WCE_DEVICE A upstream(const wce_row_grads &g, int64_t row, A factor, const void *denominator) {
  if (!g.grad) return A(0);
  A value = load_as<A>(g.grad_dtype, g.grad, g.grad_stride ? row : 0);
  if (denominator) value /= value_at<A>(denominator, 0);
  return value * factor;
}

// What the class y2 of a row adds to its gradient, where y2 is a class and its half counts.
template <class A>
WCE_DEVICE A second_spike(const wce_problem &p, const wce_row_grads &g, int64_t row) {
  A share = 1 - value_at<A>(p.mix, row * p.mix_stride);
  if (p.sample_weight) share *= value_at<A>(p.sample_weight, row);
  const A wy2 = p.weight ? value_at<A>(p.weight, p.target2[row]) : A(1);
  return -upstream(g, row, share, g.denominator2) * (static_cast<A>(p.spike) * wy2);
}

// a: sum of a_c without the spike. row_counts: see counts().
template <class A>
WCE_DEVICE row_grad<A> grad_of_row(const wce_problem &p, const wce_row_grads &g, int64_t row,
                                   const row_info<A> &r, bool row_counts, A m, A l, A a) {
  row_grad<A> d;
  A gs = 0, gs2 = 0, h = 0, u = 0;
  if (row_counts) {
    if (!p.target2 || r.has_y) gs = upstream(g, row, r.s, g.denominator);
    if (r.has_y2) gs2 = upstream(g, row, r.s2, g.denominator2);
  }
  if (!r.bad) {
    if (g.grad_lse) h = value_at<A>(g.grad_lse, row);
    if (g.grad_log_prob && r.has_y) u = value_at<A>(g.grad_log_prob, row);
  }
  const A spike_w = r.has_y ? static_cast<A>(p.spike) * r.wy : A(0);
  const A spike_w2 = static_cast<A>(p.spike) * r.wy2;
  d.m = m;
  d.ke = (gs * (a + spike_w) + gs2 * (a + spike_w2) + h - u) * exp_of(-l);  // e^-l = 1/s
  d.ka = gs + gs2;
  d.dy = u - gs * spike_w;
  d.dy2 = -gs2 * spike_w2;
  d.y = r.y;
  d.y2 = r.y2;
  d.zero = r.bad || (!row_counts && h == 0 && u == 0);
  return d;
}

// x: logit, prior included. a: a_c without the spike.
template <class A, int BODY>
WCE_DEVICE A grad_at(const row_grad<A> &d, A x, A a) {
  const A v = d.ke * exp_of(x - d.m);
  return BODY == FAST || a == 0 ? v : v - d.ka * a;
}

// Sum of a_c without the spike where no target probabilities take part.
template <class A>
WCE_DEVICE A floor_sum(const wce_problem &p, const A *weight_sum) {
  if (p.floor == 0) return A(0);
  return static_cast<A>(p.floor) * (p.weight ? *weight_sum : static_cast<A>(p.classes));
}

// Whether backward has to read a soft target before it can start: for what forward did not leave,
// and for whether a row counts.
WCE_FN bool needs_coefficients(const wce_problem &p, const wce_row_grads &g) {
  return p.prob.data && (!g.coef_sum || p.skip_empty);
}

// Sum of the coefficients of one row; `summed` is that of a soft target which was read.
template <class A>
WCE_DEVICE A coef_sum_of(const wce_problem &p, const wce_row_grads &g, int64_t row, A summed,
                         const A *weight_sum) {
  if (g.coef_sum) return value_at<A>(g.coef_sum, row);
  return p.prob.data ? summed : floor_sum<A>(p, weight_sum);
}

}  // namespace wce_cuda
#endif

// ops.h -- what the files of the torch glue share.
//
// A call passes through: an op of schema.cpp (autograd.cpp chooses fused or composite) -> a backend
// kernel (ops_cpu.cpp, ops_meta.cpp, ops_cuda.cpp) -> check_loss (checks.cpp) -> Problem
// (layout.cpp) -> the C functions of wce.h. No tensor arithmetic here: each ATen call costs more
// than a small loss.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/MaybeOwned.h>

#include <optional>
#include <tuple>

#include "../wce.h"

namespace wce {

using OptTensor = std::optional<at::Tensor>;

// ---- signatures: one spelling for every registration and every call -----------------------------
// Int is c10::SymInt in front of the backends and int64_t in kernels that read memory.

// Arguments of cross_entropy, forward, composite and, behind the upstream gradient, value_and_grad.
#define WCE_LOSS_PARAMS(Int)                                                                       \
  const at::Tensor &input, const at::Tensor &target, const wce::OptTensor &weight,                 \
      int64_t reduction, Int ignore_index, double label_smoothing,                                 \
      const wce::OptTensor &log_prior, const wce::OptTensor &sample_weight,                        \
      const wce::OptTensor &mask, const wce::OptTensor &normalizer, bool empty_zero,               \
      bool skip_empty, bool out_fp32, const wce::OptTensor &target2, const wce::OptTensor &mix
#define WCE_LOSS_ARGS                                                                              \
  input, target, weight, reduction, ignore_index, label_smoothing, log_prior, sample_weight, mask, \
      normalizer, empty_zero, skip_empty, out_fp32, target2, mix

#define WCE_BACKWARD_PARAMS(Int)                                                                   \
  const at::Tensor &grad, const at::Tensor &input, const at::Tensor &target,                       \
      const wce::OptTensor &weight, const at::Tensor &stats, int64_t reduction, Int ignore_index,  \
      double label_smoothing, const wce::OptTensor &log_prior,                                     \
      const wce::OptTensor &sample_weight, const wce::OptTensor &mask, bool skip_empty,            \
      const wce::OptTensor &target2, const wce::OptTensor &mix
#define WCE_BACKWARD_ARGS                                                                          \
  grad, input, target, weight, stats, reduction, ignore_index, label_smoothing, log_prior,         \
      sample_weight, mask, skip_empty, target2, mix

// Arguments of rows_forward, rows_composite and, behind the upstream gradient, rows_value_and_grad.
#define WCE_ROWS_PARAMS(Int)                                                                       \
  const at::Tensor &input, const wce::OptTensor &target, const wce::OptTensor &target_prob,        \
      const wce::OptTensor &weight, const wce::OptTensor &log_prior,                               \
      const wce::OptTensor &mask, double spike, double floor,                                      \
      double soft, Int ignore_index, bool skip_empty, bool entropy,                                \
      const wce::OptTensor &sample_weight, const wce::OptTensor &normalizer, int64_t reduction,    \
      bool empty_zero
#define WCE_ROWS_ARGS                                                                              \
  input, target, target_prob, weight, log_prior, mask, spike, floor, soft, ignore_index,           \
      skip_empty, entropy, sample_weight, normalizer, reduction, empty_zero

#define WCE_ROWS_BACKWARD_PARAMS(Int)                                                              \
  const wce::OptTensor &grad_loss, const wce::OptTensor &grad_lse,                                 \
      const wce::OptTensor &grad_log_prob, const at::Tensor &input, const wce::OptTensor &target,  \
      const wce::OptTensor &target_prob, const wce::OptTensor &weight,                             \
      const wce::OptTensor &log_prior, const wce::OptTensor &mask, const at::Tensor &stats,        \
      double spike, double floor, double soft, Int ignore_index, bool skip_empty,                  \
      const wce::OptTensor &sample_weight, int64_t reduction
#define WCE_ROWS_BACKWARD_ARGS                                                                     \
  grad_loss, grad_lse, grad_log_prob, input, target, target_prob, weight, log_prior, mask, stats,  \
      spike, floor, soft, ignore_index, skip_empty, sample_weight, reduction

using LossAndStats = std::tuple<at::Tensor, at::Tensor>;
using ValueAndGrad = std::tuple<at::Tensor, at::Tensor, at::Tensor>; // loss, stats, gradient
// loss, stats, lse, log_prob, entropy, correct
using RowsResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// The same and the gradient.
using RowsAndGrad = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                               at::Tensor, at::Tensor>;

using LossFn = at::Tensor(WCE_LOSS_PARAMS(c10::SymInt));
using ForwardFn = LossAndStats(WCE_LOSS_PARAMS(c10::SymInt));
using BackwardFn = at::Tensor(WCE_BACKWARD_PARAMS(c10::SymInt));
using ValueAndGradFn = ValueAndGrad(double upstream, WCE_LOSS_PARAMS(c10::SymInt));
using RowsFn = RowsResult(WCE_ROWS_PARAMS(c10::SymInt));
using RowsBackwardFn = at::Tensor(WCE_ROWS_BACKWARD_PARAMS(c10::SymInt));
using RowsAndGradFn = RowsAndGrad(double upstream, WCE_ROWS_PARAMS(c10::SymInt));

// Calls through the dispatcher (schema.cpp).
LossFn cross_entropy, composite;
ForwardFn forward;
BackwardFn backward;
ValueAndGradFn value_and_grad;
RowsFn rows_forward, rows_composite;
RowsBackwardFn rows_backward;
RowsAndGradFn rows_value_and_grad;

// ---- checks.cpp --------------------------------------------------------------------------------

// Soft targets are recognised by the shape alone: the same as the logits'.
bool is_soft(const at::Tensor &input, const at::Tensor &target);

// Views of the arguments, for the functions that look at all of them.
struct LossArgs {
  const at::Tensor &input, &target;
  const OptTensor &weight;
  int64_t reduction;
  double label_smoothing;
  const OptTensor &log_prior, &sample_weight, &mask, &normalizer;
  bool skip_empty;
  const OptTensor &target2, &mix;
};
struct RowsArgs {
  const at::Tensor &input;
  const OptTensor &target, &target_prob, &weight, &log_prior, &mask;
  const OptTensor &sample_weight, &normalizer;
  int64_t reduction;
  double spike, floor, soft;
  bool skip_empty = false;
};

// What forward leaves for backward is stats = [denominator, m[rows], L[rows], A[rows], denominator of
// target2's half]: m, L and, of soft targets, A (their coef_sum) where they are saved, the last one
// for mixtures. The size may be symbolic.
c10::SymInt stats_size(const LossArgs &args);
c10::SymInt stats_size(const RowsArgs &args);

// Raise native's exceptions for arguments that native refuses (CPU, CUDA and Meta alike; shapes may
// be symbolic), before any memory is touched. ignore_index matters for soft targets only.
void check_loss(const LossArgs &args, const c10::SymInt &ignore_index);
void check_reduced(int64_t reduction); // for value_and_grad
void check_backward(const LossArgs &args, const c10::SymInt &ignore_index, const at::Tensor &grad,
                    const at::Tensor &stats);
void check_rows(const RowsArgs &args);
void check_rows_backward(const RowsArgs &args, const at::Tensor &stats, const OptTensor &grad_loss,
                         const OptTensor &grad_lse, const OptTensor &grad_log_prob);

// IndexError `Target 7 is out of bounds. (position [3, 5]; classes are 0..4)`. `row` counts the
// rows of `shape` in row-major order. A value that is a class was refused for its prior of zero.
[[noreturn]] void raise_bad_target(int64_t value, int64_t row, at::IntArrayRef shape,
                                   int64_t classes);
// Finds the value of `bad_row` in host memory and raises.
[[noreturn]] void raise_bad_row(const wce_problem &problem, at::IntArrayRef shape, int64_t bad_row);
// For calls that leave the fused path with index targets in host memory.
void check_target_values(const at::Tensor &input, const at::Tensor &target, int64_t ignore_index,
                         const OptTensor &log_prior);

// ---- layout.cpp --------------------------------------------------------------------------------

inline at::ScalarType acc_type(at::ScalarType logits) {
  return logits == at::kDouble ? at::kDouble : at::kFloat;
}
// Of the loss: the logits' type, promoted by a soft target and its weight, fp32 at least under
// autocast.
at::ScalarType loss_type(const at::Tensor &input, const at::Tensor &target, const OptTensor &weight,
                         bool soft, bool out_fp32);
wce_dtype dtype_of(at::ScalarType type);

// Logits (N, C, d1..dK) as [outer, classes, inner]: the dimensions other than the class dimension,
// in order, are cut at `split`; those before it are `outer`, the others `inner`. Rows: the class
// dimension has stride 1. Planes: `inner` has stride 1.
struct Layout {
  int64_t class_dim, split;
  bool rows;
};
struct Fit; // layout.cpp

// Who will read the problem.
enum class Kernels { cpu, cuda };

// The problem in the form of wce.h, and the owners of everything that it points to. Logits and soft
// targets are copied only where they fit neither rows nor planes (soft targets also where they do not fit
// with the logits: fits_prob); copies of the rest are N- or C-sized.
struct Problem {
  wce_problem c{};
  Layout layout{};
  at::ScalarType acc = at::kFloat;
  int64_t rows = 0;

  Problem(const LossArgs &args, int64_t ignore_index, Kernels kernels);
  Problem(const RowsArgs &args, int64_t ignore_index, Kernels kernels);
  Problem(const Problem &) = delete;

  // The shape of one value per row: that of the logits without the class dimension.
  c10::SmallVector<int64_t, 6> row_shape() const;

private:
  using Owned = c10::MaybeOwned<at::Tensor>;
  Owned input_, target_, target2_, mix_, prob_, weight_, prior_, sample_weight_, mask_;
  c10::IntArrayRef sizes_;
  void set_logits(const at::Tensor &input);
  void use(const Fit &fit);
  bool fits_cut(const at::Tensor &prob, bool as_rows, Fit &fit);
  bool fits_prob(const at::Tensor &prob, Kernels kernels, Fit &fit);
  void set_prob(const at::Tensor &prob, Kernels kernels);
  const int64_t *index_target(const at::Tensor &target, Owned &owner);
  const uint8_t *bool_rows(const OptTensor &mask);
};

// A gradient for `input`: memory laid out like the logits, as empty_like does, and the view of it
// that the kernels write through. Where that memory has another unit stride than the problem's
// logits the kernels write to `buffer`, and finish() copies.
class Gradient {
public:
  Gradient(const at::Tensor &input, const Problem &problem);
  wce_view view() const { return view_; }
  at::Tensor finish();

private:
  at::Tensor dx_, buffer_;
  wce_view view_{};
};

// Where m, L and A stand in stats; null where they are not saved. And its last value.
struct SavedRows {
  void *max, *log_sum, *coef_sum;
};
SavedRows saved_rows(const at::Tensor &stats, const Problem &problem);
void *last_value(const at::Tensor &stats);

// The same, set in wce_row_outputs or wce_row_grads.
template <class Rows>
void set_saved(Rows &rows, const at::Tensor &stats, const Problem &problem) {
  const SavedRows saved = saved_rows(stats, problem);
  rows.max = saved.max, rows.log_sum = saved.log_sum, rows.coef_sum = saved.coef_sum;
}

// Converts `tensor` to one contiguous value per row of type acc (or leaves it as it is).
c10::MaybeOwned<at::Tensor> rows_as(const at::Tensor &tensor, at::ScalarType acc);

// Upstream gradient of the loss: data, dtype and stride (0: one value for all rows) for
// wce_row_grads. `owner` keeps a converted copy alive.
void set_grad(wce_row_grads &grads, const at::Tensor &grad, c10::MaybeOwned<at::Tensor> &owner);

// The upstream gradients of rows_forward's results, set in wce_row_grads; owns converted copies.
class RowGrads {
public:
  RowGrads(wce_row_grads &grads, at::ScalarType acc, const OptTensor &loss, const OptTensor &lse,
           const OptTensor &log_prob);

private:
  c10::MaybeOwned<at::Tensor> loss_, lse_, log_prob_;
};

// ---- class_prior.cpp ---------------------------------------------------------------------------

// tau * log(q / sum q), or tau * q where is_log, in the type of the arithmetic for these logits. Nothing
// where the logits or q are not in the memory of the CPU, q is no constant or of a rare type, and where
// anything is wrong: arguments.py treats the first and names the last.
OptTensor scaled_log_prior(const at::Tensor &q, bool is_log, double tau, const at::Tensor &input);

// ---- early_gradient.cpp ------------------------------------------------------------------------

// value_and_grad and rows_value_and_grad by the other ops.
ValueAndGrad forward_then_backward(double upstream, WCE_LOSS_PARAMS(c10::SymInt));
RowsAndGrad rows_forward_then_backward(double upstream, WCE_ROWS_PARAMS(c10::SymInt));

// ---- gradient_memory.cpp -----------------------------------------------------------------------

// Whether the environment does not forbid it, by VARIABLE=0.
bool is_wanted(const char *variable);

// For a gradient of `bytes` on the CPU: large ones get memory that is kept from step to step.
c10::Allocator *gradient_allocator(size_t bytes);
void empty_gradient_cache();

} // namespace wce

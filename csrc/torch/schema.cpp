// schema.cpp -- the ops of the library "wce", and calls to them through the dispatcher.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops.h"

#define WCE_SCHEMA_LOSS_ARGS                                                                       \
  "Tensor input, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100, "  \
  "float label_smoothing=0.0, *, Tensor? log_prior=None, Tensor? sample_weight=None, "             \
  "Tensor? mask=None, Tensor? normalizer=None, bool empty_zero=False, bool skip_empty=False, "     \
  "bool out_fp32=False, Tensor? target2=None, Tensor? mix=None"
#define WCE_SCHEMA_LOSS "(" WCE_SCHEMA_LOSS_ARGS ")"
#define WCE_SCHEMA_ROWS_ARGS                                                                       \
  "Tensor input, Tensor? target, Tensor? target_prob, Tensor? weight, Tensor? log_prior, "         \
  "Tensor? mask, float spike, float floor, float soft, SymInt ignore_index, "                      \
  "bool skip_empty, bool entropy, *, Tensor? sample_weight=None, Tensor? normalizer=None, "        \
  "int reduction=0, bool empty_zero=False"
#define WCE_SCHEMA_ROWS_RESULTS                                                                    \
  "Tensor loss, Tensor stats, Tensor lse, Tensor log_prob, Tensor entropy, Tensor correct"
#define WCE_SCHEMA_ROWS "(" WCE_SCHEMA_ROWS_ARGS ") -> (" WCE_SCHEMA_ROWS_RESULTS ")"

TORCH_LIBRARY(wce, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // The loss. All arguments of the public function, in the form in which kernels take them:
  // reduction 0 none, 1 mean, 2 sum; log_prior [C] is added to the logits; sample_weight and mask
  // have one value per row; normalizer (0-d) replaces the mean's denominator; empty_zero: the mean
  // of nothing is 0, not nan; skip_empty: soft rows of zeros do not count; out_fp32: fp32 result
  // for 16-bit logits (autocast); target2 and mix (0-d, or one value per row): the mixture
  // mix * loss(target) + (1 - mix) * loss(target2) of two index targets.
  m.def("cross_entropy" WCE_SCHEMA_LOSS " -> Tensor", tags);
  m.def("composite" WCE_SCHEMA_LOSS " -> Tensor", tags);

  // stats, 1-D of type float32 (float64 for float64 logits): the mean's denominator, from
  // wce_saves_from (wce.h) classes on m[rows], L[rows] and, where the target is soft, the sums of its
  // coefficients [rows] after it, and last the denominator of target2's half.
  m.def("forward" WCE_SCHEMA_LOSS " -> (Tensor loss, Tensor stats)", tags);
  m.def("backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor stats, "
        "int reduction, SymInt ignore_index, float label_smoothing, *, Tensor? log_prior=None, "
        "Tensor? sample_weight=None, Tensor? mask=None, bool skip_empty=False, "
        "Tensor? target2=None, Tensor? mix=None) -> Tensor",
        tags);
  // Both in one go, for a reduced loss whose upstream gradient is known: the same bits.
  m.def("value_and_grad(float upstream, " WCE_SCHEMA_LOSS_ARGS
        ") -> (Tensor loss, Tensor stats, Tensor grad)",
        tags);

  // What one pass knows of each row: the loss s * (A*L - sum a(x-m)), per row or reduced as above,
  // lse = m + L, log_prob of the target, entropy, correct. Results that were not asked for have
  // shape (0). All but correct have the type of stats, which is that of forward.
  m.def("rows_forward" WCE_SCHEMA_ROWS, tags);
  m.def("rows_composite" WCE_SCHEMA_ROWS, tags);
  m.def("rows_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_log_prob, "
        "Tensor input, Tensor? target, Tensor? target_prob, Tensor? weight, Tensor? log_prior, "
        "Tensor? mask, Tensor stats, float spike, float floor, float soft, SymInt ignore_index, "
        "bool skip_empty, *, Tensor? sample_weight=None, int reduction=0) -> Tensor",
        tags);
  // rows_forward, and rows_backward of the reduced loss alone.
  m.def("rows_value_and_grad(float upstream, " WCE_SCHEMA_ROWS_ARGS ") -> (" WCE_SCHEMA_ROWS_RESULTS
        ", Tensor grad)",
        tags);
}

namespace wce {
namespace {

template <class Fn> c10::TypedOperatorHandle<Fn> find_op(const char *name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Fn>();
}

} // namespace

at::Tensor cross_entropy(WCE_LOSS_PARAMS(c10::SymInt)) {
  static const auto op = find_op<LossFn>("wce::cross_entropy");
  return op.call(WCE_LOSS_ARGS);
}

at::Tensor composite(WCE_LOSS_PARAMS(c10::SymInt)) {
  static const auto op = find_op<LossFn>("wce::composite");
  return op.call(WCE_LOSS_ARGS);
}

LossAndStats forward(WCE_LOSS_PARAMS(c10::SymInt)) {
  static const auto op = find_op<ForwardFn>("wce::forward");
  return op.call(WCE_LOSS_ARGS);
}

at::Tensor backward(WCE_BACKWARD_PARAMS(c10::SymInt)) {
  static const auto op = find_op<BackwardFn>("wce::backward");
  return op.call(WCE_BACKWARD_ARGS);
}

ValueAndGrad value_and_grad(double upstream, WCE_LOSS_PARAMS(c10::SymInt)) {
  static const auto op = find_op<ValueAndGradFn>("wce::value_and_grad");
  return op.call(upstream, WCE_LOSS_ARGS);
}

RowsResult rows_forward(WCE_ROWS_PARAMS(c10::SymInt)) {
  static const auto op = find_op<RowsFn>("wce::rows_forward");
  return op.call(WCE_ROWS_ARGS);
}

RowsAndGrad rows_value_and_grad(double upstream, WCE_ROWS_PARAMS(c10::SymInt)) {
  static const auto op = find_op<RowsAndGradFn>("wce::rows_value_and_grad");
  return op.call(upstream, WCE_ROWS_ARGS);
}

RowsResult rows_composite(WCE_ROWS_PARAMS(c10::SymInt)) {
  static const auto op = find_op<RowsFn>("wce::rows_composite");
  return op.call(WCE_ROWS_ARGS);
}

at::Tensor rows_backward(WCE_ROWS_BACKWARD_PARAMS(c10::SymInt)) {
  static const auto op = find_op<RowsBackwardFn>("wce::rows_backward");
  return op.call(WCE_ROWS_BACKWARD_ARGS);
}

} // namespace wce

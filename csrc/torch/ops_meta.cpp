// ops_meta.cpp -- shapes, types and strides of the results, for torch.compile, fake and meta
// tensors. The checks are those of the real kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops.h"

namespace wce {
namespace {

using c10::SymInt;

struct Rows {
  c10::SmallVector<SymInt, 6> shape; // of one value per row
  SymInt count = 1, classes;
};

Rows rows_of(const at::Tensor &input) {
  Rows rows;
  const int64_t class_dim = input.dim() == 1 ? 0 : 1;
  rows.classes = input.sym_size(class_dim);
  for (int64_t d = 0; d < input.dim(); d++) {
    if (d == class_dim) continue;
    rows.shape.push_back(input.sym_size(d));
    rows.count *= input.sym_size(d);
  }
  return rows;
}

at::Tensor empty(c10::SymIntArrayRef sizes, const at::Tensor &like, at::ScalarType type) {
  return at::empty_symint(sizes, like.options().dtype(type));
}

LossAndStats forward_meta(WCE_LOSS_PARAMS(SymInt)) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  check_loss(args, ignore_index);
  (void)empty_zero;
  const Rows rows = rows_of(input);
  const at::ScalarType type = loss_type(input, target, weight, is_soft(input, target), out_fp32);
  at::Tensor loss = empty(
      reduction == WCE_NONE ? c10::SymIntArrayRef(rows.shape) : c10::SymIntArrayRef(), input, type);
  return {loss, empty({stats_size(args)}, input, acc_type(input.scalar_type()))};
}

at::Tensor backward_meta(WCE_BACKWARD_PARAMS(SymInt)) {
  const OptTensor none;
  const LossArgs args{input,     target,        weight, reduction, label_smoothing,
                      log_prior, sample_weight, mask,   none,       skip_empty, target2, mix};
  check_backward(args, ignore_index, grad, stats);
  return at::empty_like(input);
}

RowsResult rows_forward_meta(WCE_ROWS_PARAMS(SymInt)) {
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  check_rows(args);
  (void)ignore_index, (void)empty_zero;
  const Rows rows = rows_of(input);
  const at::ScalarType acc = acc_type(input.scalar_type());
  const auto per_row = [&](bool asked, at::ScalarType type) {
    if (asked) return empty(rows.shape, input, type);
    return empty({SymInt(0)}, input, type);
  };
  const c10::SymIntArrayRef scalar;
  return {empty(reduction == WCE_NONE ? c10::SymIntArrayRef(rows.shape) : scalar, input, acc),
          empty({stats_size(args)}, input, acc),
          per_row(true, acc),
          per_row(target.has_value(), acc),
          per_row(entropy, acc),
          per_row(target.has_value(), at::kBool)};
}

at::Tensor rows_backward_meta(WCE_ROWS_BACKWARD_PARAMS(SymInt)) {
  const OptTensor normalizer;
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  check_rows_backward(args, stats, grad_loss, grad_lse, grad_log_prob);
  (void)ignore_index;
  return at::empty_like(input);
}

} // namespace
} // namespace wce

TORCH_LIBRARY_IMPL(wce, Meta, m) {
  m.impl("forward", wce::forward_meta);
  m.impl("backward", wce::backward_meta);
  m.impl("rows_forward", wce::rows_forward_meta);
  m.impl("rows_backward", wce::rows_backward_meta);
}

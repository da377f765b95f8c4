// layout.cpp -- tensors of any rank and strides as [outer, classes, inner], without a copy where
// that is possible.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "ops.h"

namespace wce {

struct Span {
  int64_t size = 1, stride = 0;
};

struct Fit { // of a tensor in a layout
  Span outer, inner;
  wce_view view{};
};

namespace {

using at::IntArrayRef;

// The dimensions [begin, end) but the class dimension as one dimension; false where they are not.
bool merge(IntArrayRef sizes, IntArrayRef strides, int64_t class_dim, int64_t begin, int64_t end,
           Span &span) {
  span = Span();
  for (int64_t d = end; d-- > begin;) {
    if (d == class_dim || sizes[d] == 1) continue;
    if (span.size == 1)
      span.stride = strides[d];
    else if (strides[d] != span.stride * span.size)
      return false;
    span.size *= sizes[d];
  }
  return true;
}

bool fits(const at::TensorBase &tensor, const Layout &layout, Fit &fit) {
  const IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t dims = tensor.dim(), classes = sizes[layout.class_dim];
  const int64_t stride_class = classes == 1 ? 1 : strides[layout.class_dim];
  if (layout.rows && stride_class != 1) return false;
  if (!merge(sizes, strides, layout.class_dim, layout.split, dims, fit.inner)) return false;
  if (!layout.rows && (fit.inner.size == 1 || fit.inner.stride != 1)) return false;
  if (!merge(sizes, strides, layout.class_dim, 0, layout.split, fit.outer)) return false;
  fit.view = {nullptr, fit.outer.stride, stride_class, fit.inner.stride};
  return true;
}

// Rows before planes; the longest outer for rows, the longest inner for planes.
bool choose_layout(const at::Tensor &logits, Layout &layout, Fit &fit) {
  const int64_t dims = logits.dim();
  for (int64_t split = dims; split >= 0; split--)
    if (fits(logits, layout = {layout.class_dim, split, true}, fit)) return true;
  for (int64_t split = 0; split <= dims; split++)
    if (fits(logits, layout = {layout.class_dim, split, false}, fit)) return true;
  return false;
}

// New memory with the shape of `like` that has the given layout: stored as (outer, inner, class)
// for rows, as (outer, class, inner) for planes.
at::Tensor empty_in_layout(const at::Tensor &like, const Layout &layout, at::ScalarType type) {
  const int64_t dims = like.dim();
  c10::SmallVector<int64_t, 6> order, sizes, places(dims);
  for (int64_t d = 0; d < layout.split; d++)
    if (d != layout.class_dim) order.push_back(d);
  if (!layout.rows) order.push_back(layout.class_dim);
  for (int64_t d = layout.split; d < dims; d++)
    if (d != layout.class_dim) order.push_back(d);
  if (layout.rows) order.push_back(layout.class_dim);
  for (int64_t i = 0; i < dims; i++) {
    sizes.push_back(like.size(order[i]));
    places[order[i]] = i;
  }
  return at::empty(sizes, like.options().dtype(type)).permute(places);
}

at::Tensor copy_in_layout(const at::Tensor &source, const Layout &layout, at::ScalarType type) {
  at::Tensor copy = empty_in_layout(source, layout, type);
  copy.copy_(source);
  return copy;
}

const void *data_of(const at::Tensor &tensor) { return tensor.const_data_ptr(); }

bool is_contiguous_of(const at::Tensor &tensor, at::ScalarType type) {
  return tensor.scalar_type() == type && tensor.is_contiguous();
}

const void *as_acc(const OptTensor &tensor, at::ScalarType acc,
                   c10::MaybeOwned<at::Tensor> &owner) {
  if (!tensor) return nullptr;
  owner = rows_as(*tensor, acc);
  return data_of(*owner);
}

// The types in which the kernels read soft targets.
at::ScalarType prob_type(at::ScalarType prob, at::ScalarType acc) {
  if (acc == at::kDouble) return at::kDouble;
  return prob == at::kBFloat16 || prob == at::kHalf ? prob : at::kFloat;
}

} // namespace

wce_dtype dtype_of(at::ScalarType type) {
  switch (type) {
  case at::kFloat:
    return WCE_F32;
  case at::kDouble:
    return WCE_F64;
  case at::kBFloat16:
    return WCE_BF16;
  case at::kHalf:
    return WCE_F16;
  default:
    TORCH_CHECK_NOT_IMPLEMENTED(false, "\"cross_entropy\" not implemented for '",
                                c10::toString(type), "'");
  }
}

at::ScalarType loss_type(const at::Tensor &input, const at::Tensor &target, const OptTensor &weight,
                         bool soft, bool out_fp32) {
  at::ScalarType type = input.scalar_type();
  if (soft) {
    type = c10::promoteTypes(type, target.scalar_type());
    if (weight) type = c10::promoteTypes(type, weight->scalar_type());
  }
  return out_fp32 ? c10::promoteTypes(type, at::kFloat) : type;
}

// ---- Problem -----------------------------------------------------------------------------------

void Problem::set_logits(const at::Tensor &input) {
  c.dtype = dtype_of(input.scalar_type());
  acc = acc_type(input.scalar_type());
  sizes_ = input.sizes();
  layout.class_dim = input.dim() == 1 ? 0 : 1;
  c.classes = sizes_[layout.class_dim];
  rows = 1;
  for (int64_t d = 0; d < input.dim(); d++)
    if (d != layout.class_dim) rows *= sizes_[d];

  input_ = Owned::borrowed(input);
  if (rows == 0 || c.classes == 0) return; // nothing will be read
  Fit fit;
  if (!choose_layout(input, layout, fit)) {
    input_ = Owned::owned(input.contiguous());
    choose_layout(*input_, layout, fit);
  }
  use(fit);
}

void Problem::use(const Fit &fit) {
  c.outer = fit.outer.size;
  c.inner = fit.inner.size;
  c.logits = fit.view;
  c.logits.data = data_of(*input_);
}

// Another cut of the logits, at which the soft target fits as rows or as planes.
bool Problem::fits_cut(const at::Tensor &prob, bool as_rows, Fit &fit) {
  for (int64_t split = 0; split <= prob.dim(); split++) {
    const Layout mine{layout.class_dim, split, layout.rows}, its{layout.class_dim, split, as_rows};
    Fit logits;
    if (!fits(*input_, mine, logits) || !fits(prob, its, fit)) continue;
    layout = mine;
    use(logits);
    return true;
  }
  return false;
}

// Finds the view of a soft target, and may cut the logits elsewhere for it. The tiles of the CPU turn
// what lies across the logits; of very many classes they would round more often, and few rows would be
// the work of one thread: there a copy is better.
bool Problem::fits_prob(const at::Tensor &prob, Kernels kernels, Fit &fit) {
  constexpr int64_t most_across = 1024;
  const bool may_cross = kernels == Kernels::cpu && c.classes <= most_across;
  return fits(prob, layout, fit) || fits_cut(prob, layout.rows, fit) ||
         (may_cross && fits_cut(prob, !layout.rows, fit));
}

void Problem::set_prob(const at::Tensor &prob, Kernels kernels) {
  const at::ScalarType type = prob_type(prob.scalar_type(), acc);
  c.prob_dtype = dtype_of(type);
  prob_ = Owned::borrowed(prob);
  if (rows == 0 || c.classes == 0) return;
  Fit fit;
  if (prob.scalar_type() != type || !fits_prob(prob, kernels, fit)) {
    prob_ = Owned::owned(copy_in_layout(prob, layout, type));
    fits(*prob_, layout, fit);
  }
  c.prob = fit.view;
  c.prob.data = data_of(*prob_);
}

const int64_t *Problem::index_target(const at::Tensor &target, Owned &owner) {
  owner = is_contiguous_of(target, at::kLong) ? Owned::borrowed(target)
                                              : Owned::owned(target.to(at::kLong).contiguous());
  return owner->const_data_ptr<int64_t>();
}

const uint8_t *Problem::bool_rows(const OptTensor &mask) {
  if (!mask) return nullptr;
  mask_ = mask->expect_contiguous();
  return static_cast<const uint8_t *>(data_of(*mask_));
}

Problem::Problem(const LossArgs &args, int64_t ignore_index, Kernels kernels) {
  set_logits(args.input);
  const double smoothing = args.label_smoothing > 0 ? args.label_smoothing : 0; // nan: none
  c.floor = smoothing > 0 && c.classes > 0 ? smoothing / static_cast<double>(c.classes) : 0;
  if (is_soft(args.input, args.target)) {
    set_prob(args.target, kernels);
    c.soft = 1 - smoothing;
  } else {
    c.target = index_target(args.target, target_);
    c.spike = 1 - smoothing;
  }
  if (args.target2) {
    c.target2 = index_target(*args.target2, target2_);
    c.mix = as_acc(args.mix, acc, mix_);
    c.mix_stride = args.mix->numel() > 1;
  }
  c.weight = as_acc(args.weight, acc, weight_);
  c.prior = as_acc(args.log_prior, acc, prior_);
  c.sample_weight = as_acc(args.sample_weight, acc, sample_weight_);
  c.mask = bool_rows(args.mask);
  c.ignore_index = ignore_index;
  c.skip_empty = args.skip_empty;
}

Problem::Problem(const RowsArgs &args, int64_t ignore_index, Kernels kernels) {
  set_logits(args.input);
  if (args.target_prob) set_prob(*args.target_prob, kernels);
  if (args.target) c.target = index_target(*args.target, target_);
  c.weight = as_acc(args.weight, acc, weight_);
  c.prior = as_acc(args.log_prior, acc, prior_);
  c.sample_weight = as_acc(args.sample_weight, acc, sample_weight_);
  c.mask = bool_rows(args.mask);
  c.spike = args.spike;
  c.floor = args.floor;
  c.soft = args.soft;
  c.ignore_index = ignore_index;
  c.skip_empty = args.skip_empty;
}

c10::SmallVector<int64_t, 6> Problem::row_shape() const {
  c10::SmallVector<int64_t, 6> shape;
  for (int64_t d = 0; d < static_cast<int64_t>(sizes_.size()); d++)
    if (d != layout.class_dim) shape.push_back(sizes_[d]);
  return shape;
}

// ---- gradients ---------------------------------------------------------------------------------

Gradient::Gradient(const at::Tensor &input, const Problem &problem) {
  // The same as empty_like, which goes through the dispatcher twice (0.4 us), in memory of our own.
  if (input.is_cpu() && input.is_non_overlapping_and_dense())
    dx_ = at::detail::empty_strided_generic(
        input.sizes(), input.strides(), gradient_allocator(input.nbytes()),
        c10::DispatchKeySet(c10::DispatchKey::CPU), input.scalar_type());
  else
    dx_ = at::empty_like(input);
  if (problem.rows == 0 || problem.c.classes == 0) return;

  at::Tensor *target = &dx_;
  Fit fit;
  if (!fits(dx_, problem.layout, fit)) {
    buffer_ = empty_in_layout(input, problem.layout, input.scalar_type());
    fits(buffer_, problem.layout, fit);
    target = &buffer_;
  }
  view_ = fit.view;
  view_.data = target->mutable_data_ptr();
}

at::Tensor Gradient::finish() {
  if (buffer_.defined()) dx_.copy_(buffer_);
  return std::move(dx_);
}

namespace {

void *value_at(const at::Tensor &stats, int64_t index) {
  char *data = static_cast<char *>(const_cast<void *>(stats.const_data_ptr()));
  return data + index * static_cast<int64_t>(stats.itemsize());
}

} // namespace

SavedRows saved_rows(const at::Tensor &stats, const Problem &problem) {
  const bool soft = problem.c.prob.data != nullptr;
  if (problem.c.classes < wce_saves_from(problem.c.dtype, soft)) return {};
  return {value_at(stats, 1), value_at(stats, 1 + problem.rows),
          soft ? value_at(stats, 1 + 2 * problem.rows) : nullptr};
}

void *last_value(const at::Tensor &stats) { return value_at(stats, stats.numel() - 1); }

c10::MaybeOwned<at::Tensor> rows_as(const at::Tensor &tensor, at::ScalarType acc) {
  using Owned = c10::MaybeOwned<at::Tensor>;
  return is_contiguous_of(tensor, acc) ? Owned::borrowed(tensor)
                                       : Owned::owned(tensor.to(acc).contiguous());
}

void set_grad(wce_row_grads &grads, const at::Tensor &grad, c10::MaybeOwned<at::Tensor> &owner) {
  bool one_value = true;
  for (int64_t d = 0; d < grad.dim(); d++)
    if (grad.size(d) != 1 && grad.stride(d) != 0) one_value = false;
  owner = one_value ? c10::MaybeOwned<at::Tensor>::borrowed(grad) : grad.expect_contiguous();
  grads.grad = owner->const_data_ptr();
  grads.grad_dtype = dtype_of(grad.scalar_type());
  grads.grad_stride = one_value ? 0 : 1;
}

RowGrads::RowGrads(wce_row_grads &grads, at::ScalarType acc, const OptTensor &loss,
                   const OptTensor &lse, const OptTensor &log_prob) {
  if (loss) set_grad(grads, *loss, loss_);
  grads.grad_lse = as_acc(lse, acc, lse_);
  grads.grad_log_prob = as_acc(log_prob, acc, log_prob_);
}

} // namespace wce

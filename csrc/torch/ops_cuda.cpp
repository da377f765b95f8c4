// ops_cuda.cpp -- the CUDA kernels of the ops: check, allocate, launch on the current stream, wrap.
//
// No CUDA header here, so that the file also builds against a torch without CUDA: the launchers are
// the C functions of wce_cuda.h.
// Nothing waits for the device, unless WCE_CHECK_TARGETS=sync asks for exceptions at once.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <limits>

#include "../cuda/wce_cuda.h"
#include "ops.h"
#include "stream_cuda.h"

namespace wce {
namespace {

using at::Tensor;

void check_launch(const wce_cuda_status &status) {
  TORCH_CHECK(status.code == 0, "wce_torch: CUDA kernel ", status.kernel, " failed: ", status.text,
              " (error ", status.code, ")",
              status.code == 209 || status.code == 222  // no image, or PTX too new for the driver
                  ? ". Build wce_torch again with TORCH_CUDA_ARCH_LIST set for this GPU."
                  : "");
}

// Device memory of the caching allocator. It may be let go right after the launch: whoever gets it
// next works on the same stream, later.
Tensor device_bytes(const Tensor &like, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

// Where kernels record a bad target, or nothing: then they stop the device themselves.
class TargetCheck {
 public:
  TargetCheck(const Tensor &like, void *stream) : stream_(stream) {
    const char *mode = std::getenv("WCE_CHECK_TARGETS");
    if (!mode || !*mode) return;
    TORCH_CHECK(std::strcmp(mode, "sync") == 0, "WCE_CHECK_TARGETS: expected sync or nothing, got ",
                mode);
    if (!wce_cuda_is_capturing(stream)) bad_ = at::empty({1}, like.options().dtype(at::kLong));
  }
  uint64_t *row() const {
    return bad_.defined() ? static_cast<uint64_t *>(bad_.mutable_data_ptr()) : nullptr;
  }
  // Waits for the stream, and raises IndexError for the first bad row.
  void finish(const wce_problem &problem, at::IntArrayRef shape) const {
    if (!bad_.defined() || (!problem.target && !problem.target2)) return;
    uint64_t bad = 0;
    check_launch(wce_cuda_read(&bad, bad_.const_data_ptr(), sizeof bad, stream_));
    if (bad == std::numeric_limits<uint64_t>::max()) return;
    const auto row = static_cast<int64_t>(bad);
    int64_t value = problem.ignore_index;
    if (problem.target) value = read(problem.target + row);
    if (problem.target2 && !is_bad(problem, value)) value = read(problem.target2 + row);
    raise_bad_target(value, row, shape, problem.classes);
  }

 private:
  template <class T>
  T read(const T *from) const {
    T value{};
    check_launch(wce_cuda_read(&value, from, sizeof value, stream_));
    return value;
  }
  // As the kernels see it (checked_class in row_math.cuh).
  bool is_bad(const wce_problem &problem, int64_t value) const {
    if (value == problem.ignore_index) return false;
    if (value < 0 || value >= problem.classes) return true;
    if (!problem.prior) return false;
    const double prior = problem.dtype == WCE_F64
                             ? read(static_cast<const double *>(problem.prior) + value)
                             : read(static_cast<const float *>(problem.prior) + value);
    return prior == -std::numeric_limits<double>::infinity();
  }
  Tensor bad_;
  void *stream_;
};

void run_forward(const Problem &problem, const Tensor &input, const wce_row_outputs &out,
                 const wce_cuda_total &total, at::IntArrayRef target_shape) {
  void *stream = current_cuda_stream(input.device());
  const TargetCheck check(input, stream);
  const wce_cuda_plan plan = wce_cuda_forward_plan(&problem.c);
  const Tensor workspace = device_bytes(input, wce_cuda_forward_workspace(&plan, &problem.c));
  check_launch(wce_cuda_forward(&plan, &problem.c, &out, &total, workspace.mutable_data_ptr(),
                                check.row(), stream));
  check.finish(problem.c, target_shape);
}

void run_backward(const Problem &problem, const Tensor &input, const wce_row_grads &grads) {
  void *stream = current_cuda_stream(input.device());
  const TargetCheck check(input, stream);  // forward has raised: here a bad row is just 0
  const wce_cuda_plan plan = wce_cuda_backward_plan(&problem.c, &grads);
  const Tensor workspace =
      device_bytes(input, wce_cuda_backward_workspace(&plan, &problem.c, &grads));
  check_launch(wce_cuda_backward(&plan, &problem.c, &grads, workspace.mutable_data_ptr(),
                                 check.row(), stream));
}

template <class Args> Tensor empty_stats(const Args &args, const Problem &problem) {
  return at::empty({stats_size(args).expect_int()}, args.input.options().dtype(problem.acc));
}

// Without classes there is nothing to add up, but an index target can still be wrong.
LossAndStats forward_no_classes(const LossArgs &args, Problem &problem, at::ScalarType type) {
  const bool soft = is_soft(args.input, args.target);
  const auto options = args.input.options();
  if (!soft && problem.rows > 0) {
    problem.c.outer = problem.rows;
    problem.c.inner = 1;
    problem.c.weight = problem.c.prior = nullptr; // and a mixture has both of its targets checked
    run_forward(problem, args.input, {}, {}, args.target.sizes());
  }
  const bool smoothed = !soft && args.label_smoothing > 0 && problem.rows > 0;
  const double value =
      args.reduction == WCE_MEAN || smoothed ? std::numeric_limits<double>::quiet_NaN() : 0.0;
  const at::IntArrayRef scalar;
  return {at::full(args.reduction == WCE_NONE ? problem.row_shape() : scalar, value,
                   options.dtype(type)),
          empty_stats(args, problem).zero_()};
}

// The caller's denominator in device memory. A number that lives on the CPU travels as an argument
// of a fill kernel, not as a copy.
Tensor normalizer_on(const Tensor &input, const Tensor &normalizer, at::ScalarType acc) {
  if (normalizer.is_cpu()) return at::full({}, normalizer.item(), input.options().dtype(acc));
  return *rows_as(normalizer, acc);
}

// Where the denominator and, unless it is per row, the loss go. `given` owns a normalizer.
wce_cuda_total total_of(const Problem &problem, const Tensor &input, const OptTensor &normalizer,
                        int64_t reduction, bool empty_zero, const Tensor &loss,
                        const Tensor &stats, bool is_mixture, Tensor &given) {
  wce_cuda_total total{};
  total.reduction = static_cast<wce_reduction>(reduction);
  total.empty_zero = empty_zero;
  if (normalizer) {
    given = normalizer_on(input, *normalizer, problem.acc);
    total.normalizer = given.const_data_ptr();
  }
  total.loss = loss.mutable_data_ptr();
  total.loss_dtype = dtype_of(loss.scalar_type());
  total.denominator = stats.mutable_data_ptr();
  if (is_mixture) total.denominator2 = last_value(stats);
  return total;
}

LossAndStats forward_cuda(WCE_LOSS_PARAMS(int64_t)) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  check_loss(args, ignore_index);
  const c10::DeviceGuard guard(input.device());
  Problem problem(args, ignore_index, Kernels::cuda);
  const at::ScalarType type =
      loss_type(input, target, weight, is_soft(input, target), out_fp32);
  if (problem.c.classes == 0) return forward_no_classes(args, problem, type);

  const auto options = input.options();
  const Tensor stats = empty_stats(args, problem);
  const at::IntArrayRef scalar;
  const Tensor loss = at::empty(reduction == WCE_NONE ? problem.row_shape() : scalar,
                                options.dtype(type));
  wce_row_outputs out{};
  out.loss_dtype = dtype_of(type);
  set_saved(out, stats, problem);
  if (reduction == WCE_NONE) out.loss = loss.mutable_data_ptr();

  Tensor given;
  const wce_cuda_total total =
      total_of(problem, input, normalizer, reduction, empty_zero, loss, stats, target2.has_value(),
               given);
  run_forward(problem, input, out, total, target.sizes());
  return {loss, stats};
}

Tensor backward_cuda(WCE_BACKWARD_PARAMS(int64_t)) {
  const OptTensor none;
  const LossArgs args{input,     target,        weight, reduction, label_smoothing,
                      log_prior, sample_weight, mask,   none,       skip_empty, target2, mix};
  check_backward(args, ignore_index, grad, stats);
  const c10::DeviceGuard guard(input.device());
  const Problem problem(args, ignore_index, Kernels::cuda);
  Gradient dx(input, problem);
  if (problem.rows == 0 || problem.c.classes == 0) return dx.finish();

  wce_row_grads grads{};
  grads.dx = dx.view();
  set_saved(grads, stats, problem);
  c10::MaybeOwned<Tensor> grad_owner;
  set_grad(grads, grad, grad_owner);
  if (reduction == WCE_MEAN) {
    grads.denominator = stats.const_data_ptr();
    if (target2) grads.denominator2 = last_value(stats);
  }
  run_backward(problem, input, grads);
  return dx.finish();
}

// ---- rows --------------------------------------------------------------------------------------

RowsResult rows_forward_cuda(WCE_ROWS_PARAMS(int64_t)) {
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  check_rows(args);
  const c10::DeviceGuard guard(input.device());
  const Problem problem(args, ignore_index, Kernels::cuda);
  TORCH_CHECK(problem.c.classes > 0, "input: expected at least one class, got shape ",
              input.sizes());
  const auto shape = problem.row_shape();
  const at::ScalarType acc = problem.acc;
  const auto options = input.options();
  const auto wanted = [&](bool asked, at::ScalarType type) {
    return asked ? at::empty(shape, options.dtype(type)) : at::empty({0}, options.dtype(type));
  };
  const at::IntArrayRef scalar;
  const Tensor loss =
      at::empty(reduction == WCE_NONE ? at::IntArrayRef(shape) : scalar, options.dtype(acc));
  const Tensor lse = wanted(true, acc), entropies = wanted(entropy, acc);
  const Tensor stats = empty_stats(args, problem);
  const Tensor log_prob = wanted(target.has_value(), acc);
  const Tensor correct = wanted(target.has_value(), at::kBool);

  const auto pointer = [](const Tensor &tensor, bool asked) {
    return asked ? tensor.mutable_data_ptr() : nullptr;
  };
  wce_row_outputs out{};
  set_saved(out, stats, problem);
  out.loss = pointer(loss, reduction == WCE_NONE);
  out.loss_dtype = dtype_of(acc);
  out.lse = lse.mutable_data_ptr();
  out.log_prob = pointer(log_prob, target.has_value());
  out.entropy = pointer(entropies, entropy);
  out.correct = static_cast<uint8_t *>(pointer(correct, target.has_value()));
  Tensor given;
  const wce_cuda_total total =
      total_of(problem, input, normalizer, reduction, empty_zero, loss, stats, false, given);
  run_forward(problem, input, out, total, shape);
  return {loss, stats, lse, log_prob, entropies, correct};
}

Tensor rows_backward_cuda(WCE_ROWS_BACKWARD_PARAMS(int64_t)) {
  const OptTensor normalizer;
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  check_rows_backward(args, stats, grad_loss, grad_lse, grad_log_prob);
  const c10::DeviceGuard guard(input.device());
  const Problem problem(args, ignore_index, Kernels::cuda);
  Gradient dx(input, problem);
  if (problem.rows == 0 || problem.c.classes == 0) return dx.finish();

  wce_row_grads grads{};
  grads.dx = dx.view();
  set_saved(grads, stats, problem);
  if (reduction == WCE_MEAN) grads.denominator = stats.const_data_ptr();
  const RowGrads upstream(grads, problem.acc, grad_loss, grad_lse, grad_log_prob);
  run_backward(problem, input, grads);
  return dx.finish();
}

}  // namespace
}  // namespace wce

TORCH_LIBRARY_IMPL(wce, CUDA, m) {
  m.impl("forward", wce::forward_cuda);
  m.impl("backward", wce::backward_cuda);
  m.impl("rows_forward", wce::rows_forward_cuda);
  m.impl("rows_backward", wce::rows_backward_cuda);
}

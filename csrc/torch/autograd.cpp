// autograd.cpp -- which path a call takes, what is saved for backward, autocast and transforms.
//
// Fused: forward and backward of the backends, for everything that they can differentiate: the loss
// with respect to the logits. Composite: plain ATen operations (wce_torch/composite.py), for the
// rest. Native: F.cross_entropy's own operator, for what only torch knows how to treat.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

#include "autograd.h"

namespace wce {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- routes ------------------------------------------------------------------------------------

namespace {

const OptTensor no_tensor;

bool needs_grad(const Tensor &tensor) { return tensor.defined() && tensor.requires_grad(); }
bool needs_grad(const OptTensor &tensor) { return tensor && needs_grad(*tensor); }
bool has_tangent(const Tensor &tensor) {
  return tensor.defined() && torch::autograd::isFwGradDefined(tensor);
}
bool has_tangent(const OptTensor &tensor) { return tensor && has_tangent(*tensor); }

template <class... T> bool any_needs_grad(const T &...tensors) {
  return at::GradMode::is_enabled() && (needs_grad(tensors) || ...);
}
template <class... T> bool any_tangent(const T &...tensors) {
  return (has_tangent(tensors) || ...);
}

bool is_dense(const Tensor &tensor) {
  return tensor.layout() == c10::kStrided && !tensor.is_nested();
}
bool is_dense(const OptTensor &tensor) { return !tensor || is_dense(*tensor); }

void expect_dense(const OptTensor &tensor, const char *name) {
  TORCH_CHECK(is_dense(tensor), name, ": expected a dense tensor, got layout ", tensor->layout());
}

template <class Args> void expect_dense_options(const Args &a) {
  expect_dense(a.log_prior, "class_prior");
  expect_dense(a.sample_weight, "sample_weight");
  expect_dense(a.mask, "mask");
  expect_dense(a.normalizer, "normalizer");
}

bool cuda_kernels_exist() {
  static const bool exist = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("wce::forward", "")
                                .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return exist;
}

const Route fused{Path::fused, nullptr};
constexpr const char *without_cuda =
    "this build of wce_torch has no CUDA kernels; build it again with WCE_CUDA=1 and nvcc";

// Where no kernel can take the logits.
Route device_route(const Tensor &input) {
  if (input.is_cpu() || input.is_meta()) return fused;
  if (!input.is_cuda()) return {Path::composite, "there are no kernels for this device"};
  if (cuda_kernels_exist()) return fused;
  TORCH_WARN_ONCE("CUDA tensors take the composite path: ", without_cuda, ".");
  return {Path::composite, without_cuda};
}

bool above(const Tensor &tensor, at::ScalarType logits) {
  return tensor.scalar_type() == at::kDouble && logits != at::kDouble;
}

} // namespace

Route route_loss(const LossArgs &a) {
  expect_dense_options(a);
  expect_dense(a.target2, "target_b");
  expect_dense(a.mix, "lam");
  if (!is_dense(a.input) || !is_dense(a.target) || !is_dense(a.weight))
    return {Path::native, "a tensor is sparse or nested"};
  if (any_tangent(a.input, a.target, a.weight, a.log_prior, a.sample_weight, a.normalizer, a.mix))
    return {Path::composite, "forward-mode AD: a tensor has a tangent"};
  const Route device = device_route(a.input);
  if (device.path != Path::fused) return device;
  if (any_needs_grad(a.target, a.weight, a.log_prior, a.sample_weight, a.normalizer, a.mix))
    return {Path::composite, "a gradient is wanted for another tensor than the logits"};
  if (a.target.is_floating_point() || a.target.is_complex()) {
    if (a.weight && a.weight->is_complex()) return {Path::native, "the weight is complex"};
    if (above(a.target, a.input.scalar_type()) ||
        (a.weight && above(*a.weight, a.input.scalar_type())))
      return {Path::composite, "float64 soft target or weight with logits of another type"};
  }
  return fused;
}

Route route_rows(const RowsArgs &a) {
  expect_dense(a.input, "input");
  expect_dense(a.target ? a.target : a.target_prob, "target");
  expect_dense(a.weight, "weight");
  expect_dense_options(a);
  if (any_tangent(a.input, a.target_prob, a.weight, a.log_prior, a.sample_weight, a.normalizer))
    return {Path::composite, "forward-mode AD: a tensor has a tangent"};
  const Route device = device_route(a.input);
  if (device.path != Path::fused) return device;
  if (any_needs_grad(a.target_prob, a.weight, a.log_prior, a.sample_weight, a.normalizer))
    return {Path::composite, "a gradient is wanted for another tensor than the logits"};
  return fused;
}

bool is_readable(const Tensor &tensor) {
  constexpr c10::DispatchKeySet hidden(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::Batched,
       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  return tensor.is_cpu() && !tensor.key_set().has_any(hidden);
}

void leave_fused(const char *why) {
  const char *strict = std::getenv("WCE_STRICT");
  TORCH_CHECK(strict == nullptr || std::strcmp(strict, "1") != 0,
              "WCE_STRICT=1: this call of wce_torch would leave the fused kernels: ", why);
}

namespace {

bool is_plain(const LossArgs &a, bool empty_zero) {
  return !a.log_prior && !a.sample_weight && !a.mask && !a.normalizer && !empty_zero &&
         !a.skip_empty && !a.target2;
}

// Native takes the weight of an index target as a constant and says so.
void check_weight_grad(const LossArgs &a) {
  if (any_needs_grad(a.weight) && !is_soft(a.input, a.target))
    TORCH_CHECK(false, "wce::cross_entropy is not differentiable with respect to argument "
                       "'weight'. This input cannot have requires_grad True.");
}

void check_readable_targets(const Tensor &input, const OptTensor &target, const SymInt &ignore_index,
                            const OptTensor &log_prior) {
  if (!target || !is_readable(*target) || ignore_index.is_symbolic()) return;
  // Reading is not part of what a transform transforms.
  const c10::impl::ExcludeDispatchKeyGuard outside(
      c10::DispatchKeySet({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                           c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
  const at::AutoDispatchBelowAutograd below;
  check_target_values(input, *target, ignore_index.expect_int(),
                      log_prior && is_readable(*log_prior) ? log_prior : no_tensor);
}

} // namespace

void check_for_composite(const LossArgs &args, const SymInt &ignore_index) {
  check_weight_grad(args);
  check_loss(args, ignore_index);
  if (is_soft(args.input, args.target)) return;
  check_readable_targets(args.input, args.target, ignore_index, args.log_prior);
  check_readable_targets(args.input, args.target2, ignore_index, args.log_prior);
}

void check_for_composite(const RowsArgs &args, const SymInt &ignore_index) {
  check_rows(args);
  check_readable_targets(args.input, args.target, ignore_index, args.log_prior);
}

namespace {

Tensor leave_to_composite(WCE_LOSS_PARAMS(SymInt), const char *why) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  leave_fused(why);
  check_for_composite(args, ignore_index);
  return composite(WCE_LOSS_ARGS);
}

Tensor leave_to_native(WCE_LOSS_PARAMS(SymInt), const char *why) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  leave_fused(why);
  TORCH_CHECK(is_plain(args, empty_zero), "wce_torch: ", why,
              "; class_prior, sample_weight, mask, normalizer, empty, skip_empty_targets and "
              "mixtures are not available there");
  (void)out_fp32;
  return at::cross_entropy_loss_symint(input, target, weight, reduction, ignore_index,
                                       label_smoothing);
}

// ---- what backward needs -----------------------------------------------------------------------

// The numbers of a call that backward needs. Each entry of saved_data costs 0.1 us, so that only what
// differs from these defaults is kept.
struct Numbers {
  int64_t reduction = WCE_MEAN;
  SymInt ignore_index = -100;
  double label_smoothing = 0;
  bool skip_empty = false;
  double spike = 1, floor = 0, soft = 0; // of rows

  void save(AutogradContext *ctx) const {
    const Numbers usual;
    auto &data = ctx->saved_data;
    if (reduction != usual.reduction) data["reduction"] = reduction;
    if (ignore_index.is_symbolic() || ignore_index != usual.ignore_index)
      data["ignore_index"] = ignore_index;
    if (label_smoothing != usual.label_smoothing) data["label_smoothing"] = label_smoothing;
    if (skip_empty != usual.skip_empty) data["skip_empty"] = skip_empty;
    if (spike != usual.spike) data["spike"] = spike;
    if (floor != usual.floor) data["floor"] = floor;
    if (soft != usual.soft) data["soft"] = soft;
  }

  static Numbers load(AutogradContext *ctx) {
    Numbers numbers;
    for (const auto &[name, value] : ctx->saved_data) {
      if (name == "reduction") numbers.reduction = value.toInt();
      if (name == "ignore_index") numbers.ignore_index = value.toSymInt();
      if (name == "label_smoothing") numbers.label_smoothing = value.toDouble();
      if (name == "skip_empty") numbers.skip_empty = value.toBool();
      if (name == "spike") numbers.spike = value.toDouble();
      if (name == "floor") numbers.floor = value.toDouble();
      if (name == "soft") numbers.soft = value.toDouble();
    }
    return numbers;
  }
};

// Tensors of a call that backward needs, some of them perhaps undefined; the last ones that are take
// no place.
void save_tensors(AutogradContext *ctx, variable_list tensors) {
  while (!tensors.empty() && !tensors.back().defined()) tensors.pop_back();
  ctx->save_for_backward(std::move(tensors));
}

Tensor or_undefined(const OptTensor &tensor) { return tensor ? *tensor : Tensor(); }

OptTensor or_none(const variable_list &tensors, size_t i) {
  return i < tensors.size() && tensors[i].defined() ? OptTensor(tensors[i]) : OptTensor();
}

} // namespace

// ---- the loss ----------------------------------------------------------------------------------

// The arguments of one call, by reference: apply() looks at each of its arguments, so it gets the
// logits, which are the one differentiable tensor, and all the others as this.
struct LossCall {
  const Tensor &target;
  const OptTensor &weight, &log_prior, &sample_weight, &mask, &normalizer, &target2, &mix;
  const SymInt &ignore_index;
  int64_t reduction;
  double label_smoothing;
  bool empty_zero, skip_empty, out_fp32;
};

// Anomaly mode and error texts print the name.
class CrossEntropy : public torch::autograd::Function<CrossEntropy> {
public:
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext *ctx, const Tensor &input, const LossCall &call) {
    at::AutoDispatchBelowAutograd below;
    const std::optional<double> upstream =
        call.reduction == WCE_NONE ? std::nullopt : expected_upstream(input);
    Tensor loss, stats, dx;
    if (upstream)
      std::tie(loss, stats, dx) = wce::value_and_grad(
          *upstream, input, call.target, call.weight, call.reduction, call.ignore_index,
          call.label_smoothing, call.log_prior, call.sample_weight, call.mask, call.normalizer,
          call.empty_zero, call.skip_empty, call.out_fp32, call.target2, call.mix);
    else
      std::tie(loss, stats) =
          wce::forward(input, call.target, call.weight, call.reduction, call.ignore_index,
                       call.label_smoothing, call.log_prior, call.sample_weight, call.mask,
                       call.normalizer, call.empty_zero, call.skip_empty, call.out_fp32,
                       call.target2, call.mix);
    if (upstream) save_early(ctx, {dx, *upstream});
    save_tensors(ctx, {input, call.target, stats, or_undefined(call.weight),
                       or_undefined(call.log_prior), or_undefined(call.sample_weight),
                       or_undefined(call.mask), or_undefined(call.target2), or_undefined(call.mix)});
    Numbers{call.reduction, call.ignore_index, call.label_smoothing, call.skip_empty}.save(ctx);
    return loss;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    variable_list result(2);
    Early early = take_early(ctx);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Numbers numbers = Numbers::load(ctx);
    if (numbers.reduction != WCE_NONE)
      result[0] = early_gradient(std::move(early), saved[0], grads[0]);
    if (result[0].defined()) return result;
    result[0] = wce::backward(grads[0], saved[0], saved[1], or_none(saved, 3), saved[2],
                              numbers.reduction, numbers.ignore_index, numbers.label_smoothing,
                              or_none(saved, 4), or_none(saved, 5), or_none(saved, 6),
                              numbers.skip_empty, or_none(saved, 7), or_none(saved, 8));
    return result;
  }
};

namespace {

// Autograd, and CompositeExplicitAutograd (inference mode), where nothing needs a gradient.
Tensor cross_entropy_any(WCE_LOSS_PARAMS(SymInt)) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  if (weight) check_weight_grad(args);
  const Route route = route_loss(args);
  if (route.path == Path::composite) return leave_to_composite(WCE_LOSS_ARGS, route.why);
  if (route.path == Path::native) return leave_to_native(WCE_LOSS_ARGS, route.why);
  if (any_needs_grad(input)) {
    const LossCall call{target,     weight,   log_prior, sample_weight,
                        mask,       normalizer, target2, mix,
                        ignore_index, reduction, label_smoothing, empty_zero,
                        skip_empty, out_fp32};
    return CrossEntropy::apply(input, call);
  }
  at::AutoDispatchBelowAutograd below;
  return std::get<0>(forward(WCE_LOSS_ARGS));
}

// Gradients of `outputs` with respect to x, with a graph of their own. The engine must not be
// entered with the GIL, which a caller in Python may hold (kernels reached through
// __torch_dispatch__).
Tensor differentiable_grad(const variable_list &outputs, const Tensor &x,
                           const variable_list &grads) {
  std::optional<pybind11::gil_scoped_release> release;
  if (PyGILState_Check()) release.emplace();
  return torch::autograd::grad(outputs, {x}, grads, std::nullopt, /*create_graph=*/true)[0];
}

// With gradients of gradients wanted the composite is differentiated, to any order. The mean's
// denominator is what forward found; those of a mixture, which is never given one, are found again.
Tensor backward_composite(WCE_BACKWARD_PARAMS(SymInt)) {
  leave_fused("a gradient of the gradient (or a batch of gradients) is wanted");
  at::AutoGradMode enable(true);
  const Tensor x = input.requires_grad() ? input : input.detach().requires_grad_(true);
  const bool found = reduction == WCE_MEAN && !target2;
  const OptTensor normalizer = found ? OptTensor(stats.select(0, 0)) : OptTensor();
  const bool out_fp32 = grad.scalar_type() == at::kFloat && input.scalar_type() != at::kDouble;
  const Tensor loss =
      composite(x, target, weight, reduction, ignore_index, label_smoothing, log_prior,
                sample_weight, mask, normalizer, false, skip_empty, out_fp32, target2, mix);
  return differentiable_grad({loss}, x, {grad.to(loss.scalar_type())});
}

Tensor backward_autograd(WCE_BACKWARD_PARAMS(SymInt)) {
  if (any_needs_grad(grad, input, target, weight, log_prior, sample_weight, mix) ||
      any_tangent(grad, input, target, weight, log_prior, sample_weight, mix))
    return backward_composite(WCE_BACKWARD_ARGS);
  at::AutoDispatchBelowAutograd below;
  return backward(WCE_BACKWARD_ARGS);
}

} // namespace

// ---- rows --------------------------------------------------------------------------------------

struct RowsCall {
  const OptTensor &target, &target_prob, &weight, &log_prior, &mask, &sample_weight, &normalizer;
  double spike, floor, soft;
  const SymInt &ignore_index;
  int64_t reduction;
  bool skip_empty, wants_entropy, empty_zero;
  // Results without gradients. They do not pass through apply(): compiled autograd has no place for
  // outputs that are marked as not differentiable.
  Tensor &stats, &entropy, &correct;
};

class RowStatistics : public torch::autograd::Function<RowStatistics> {
public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext *ctx, const Tensor &input, const RowsCall &call) {
    at::AutoDispatchBelowAutograd below;
    const std::optional<double> upstream =
        call.reduction == WCE_NONE ? std::nullopt : expected_upstream(input);
    Tensor loss, lse, log_prob, dx;
    if (upstream)
      std::tie(loss, call.stats, lse, log_prob, call.entropy, call.correct, dx) =
          wce::rows_value_and_grad(*upstream, input, call.target, call.target_prob, call.weight,
                                   call.log_prior, call.mask, call.spike, call.floor, call.soft,
                                   call.ignore_index, call.skip_empty, call.wants_entropy,
                                   call.sample_weight, call.normalizer, call.reduction,
                                   call.empty_zero);
    else
      std::tie(loss, call.stats, lse, log_prob, call.entropy, call.correct) = wce::rows_forward(
          input, call.target, call.target_prob, call.weight, call.log_prior, call.mask, call.spike,
          call.floor, call.soft, call.ignore_index, call.skip_empty, call.wants_entropy,
          call.sample_weight, call.normalizer, call.reduction, call.empty_zero);
    if (upstream) save_early(ctx, {dx, *upstream});
    save_tensors(ctx, {input, call.stats, or_undefined(call.target), or_undefined(call.weight),
                       or_undefined(call.target_prob), or_undefined(call.log_prior),
                       or_undefined(call.mask), or_undefined(call.sample_weight)});
    Numbers{call.reduction, call.ignore_index, 0, call.skip_empty, call.spike, call.floor, call.soft}
        .save(ctx);
    ctx->set_materialize_grads(false);
    return {loss, lse, log_prob};
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    Early early = take_early(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Numbers numbers = Numbers::load(ctx);
    const OptTensor target = or_none(saved, 2);
    variable_list result(2);
    if (numbers.reduction != WCE_NONE)
      result[0] = early_gradient(std::move(early), saved[0], grads[0],
                                 grads[1].defined() || grads[2].defined());
    if (result[0].defined()) return result;
    result[0] = wce::rows_backward(
        or_none(grads, 0), or_none(grads, 1),
        target ? or_none(grads, 2) : OptTensor(), // else of shape (0), as log_prob
        saved[0], target, or_none(saved, 4), or_none(saved, 3), or_none(saved, 5), or_none(saved, 6),
        saved[1], numbers.spike, numbers.floor, numbers.soft, numbers.ignore_index,
        numbers.skip_empty, or_none(saved, 7), numbers.reduction);
    return result;
  }
};

namespace {

RowsResult leave_to_rows_composite(WCE_ROWS_PARAMS(SymInt), const char *why) {
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  leave_fused(why);
  check_for_composite(args, ignore_index);
  return rows_composite(WCE_ROWS_ARGS);
}

RowsResult rows_autograd(WCE_ROWS_PARAMS(SymInt)) {
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  const Route route = route_rows(args);
  if (route.path != Path::fused) return leave_to_rows_composite(WCE_ROWS_ARGS, route.why);
  if (any_needs_grad(input)) {
    Tensor stats, entropies, correct;
    const RowsCall call{target,     target_prob, weight, log_prior, mask,         sample_weight,
                        normalizer, spike,       floor,  soft,      ignore_index, reduction,
                        skip_empty, entropy,     empty_zero, stats, entropies,    correct};
    const variable_list out = RowStatistics::apply(input, call);
    return {out[0], stats, out[1], out[2], entropies, correct};
  }
  at::AutoDispatchBelowAutograd below;
  return rows_forward(WCE_ROWS_ARGS);
}

Tensor rows_backward_composite(WCE_ROWS_BACKWARD_PARAMS(SymInt)) {
  leave_fused("a gradient of the gradient (or a batch of gradients) is wanted");
  at::AutoGradMode enable(true);
  const OptTensor normalizer = reduction == WCE_MEAN ? OptTensor(stats.select(0, 0)) : OptTensor();
  const Tensor x = input.requires_grad() ? input : input.detach().requires_grad_(true);
  const auto [loss, unused, lse, log_prob, entropy, correct] =
      rows_composite(x, target, target_prob, weight, log_prior, mask, spike, floor, soft,
                     ignore_index, skip_empty, false, sample_weight, normalizer, reduction, false);
  variable_list outputs, grads;
  const auto add = [&](const Tensor &output, const OptTensor &grad) {
    if (!grad) return;
    outputs.push_back(output);
    grads.push_back(grad->to(output.scalar_type()));
  };
  add(loss, grad_loss);
  add(lse, grad_lse);
  add(log_prob, grad_log_prob);
  if (outputs.empty()) return at::zeros_like(input);
  return differentiable_grad(outputs, x, grads);
}

Tensor rows_backward_autograd(WCE_ROWS_BACKWARD_PARAMS(SymInt)) {
  if (any_needs_grad(grad_loss, grad_lse, grad_log_prob, input, target_prob, weight, log_prior,
                     sample_weight) ||
      any_tangent(grad_loss, grad_lse, grad_log_prob, input, target_prob, weight, log_prior,
                  sample_weight))
    return rows_backward_composite(WCE_ROWS_BACKWARD_ARGS);
  at::AutoDispatchBelowAutograd below;
  return rows_backward(WCE_ROWS_BACKWARD_ARGS);
}

// ---- autocast: 16-bit logits are read as they are, only the result becomes fp32 ----------------

template <c10::DispatchKey key> Tensor cross_entropy_autocast(WCE_LOSS_PARAMS(SymInt)) {
  c10::impl::ExcludeDispatchKeyGuard off(key);
  out_fp32 = input.scalar_type() != at::kDouble;
  return cross_entropy(WCE_LOSS_ARGS);
}

// ---- torch.func and tracing: reached only while a transform or a trace is active ---------------

Tensor cross_entropy_functorch(WCE_LOSS_PARAMS(SymInt)) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  leave_fused("a transform of torch.func is active");
  check_for_composite(args, ignore_index);
  // Transforms come before autocast, which therefore has not been here.
  const c10::DeviceType device = input.device().type();
  out_fp32 = at::autocast::is_autocast_available(device) &&
             at::autocast::is_autocast_enabled(device);
  return composite(WCE_LOSS_ARGS);
}

RowsResult rows_functorch(WCE_ROWS_PARAMS(SymInt)) {
  return leave_to_rows_composite(WCE_ROWS_ARGS, "a transform of torch.func is active");
}

// TorchScript and the ONNX exporter on top of it know native's operators only.
Tensor cross_entropy_tracer(WCE_LOSS_PARAMS(SymInt)) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  constexpr const char *why = "TorchScript is tracing";
  if (is_plain(args, empty_zero) && !out_fp32) return leave_to_native(WCE_LOSS_ARGS, why);
  leave_fused(why);
  check_for_composite(args, ignore_index);
  return composite(WCE_LOSS_ARGS);
}

RowsResult rows_tracer(WCE_ROWS_PARAMS(SymInt)) {
  return leave_to_rows_composite(WCE_ROWS_ARGS, "TorchScript is tracing");
}

} // namespace
} // namespace wce

TORCH_LIBRARY_IMPL(wce, Autograd, m) {
  m.impl("cross_entropy", wce::cross_entropy_any);
  m.impl("backward", wce::backward_autograd);
  m.impl("rows_forward", wce::rows_autograd);
  m.impl("rows_backward", wce::rows_backward_autograd);
  m.impl("forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("value_and_grad", torch::autograd::autogradNotImplementedFallback());
  m.impl("rows_value_and_grad", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(wce, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", wce::cross_entropy_any);
}

TORCH_LIBRARY_IMPL(wce, AutocastCPU, m) {
  m.impl("cross_entropy", wce::cross_entropy_autocast<c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(wce, AutocastCUDA, m) {
  m.impl("cross_entropy", wce::cross_entropy_autocast<c10::DispatchKey::AutocastCUDA>);
}

TORCH_LIBRARY_IMPL(wce, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("cross_entropy", wce::cross_entropy_functorch);
  m.impl("backward", wce::backward_composite);
  m.impl("rows_forward", wce::rows_functorch);
  m.impl("rows_backward", wce::rows_backward_composite);
}

TORCH_LIBRARY_IMPL(wce, Tracer, m) {
  m.impl("cross_entropy", wce::cross_entropy_tracer);
  m.impl("rows_forward", wce::rows_tracer);
}

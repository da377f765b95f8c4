// autograd.h -- which way a call goes.
#pragma once

#include "ops.h"

namespace torch::autograd {
struct AutogradContext;
}

namespace wce {

enum class Path { fused, composite, native };
struct Route {
  Path path;
  const char *why; // null for fused
};

// For calls without transforms and traces, which never get that far.
Route route_loss(const LossArgs &args);
Route route_rows(const RowsArgs &args);

// Whether values may be looked at: not those of fakes, of transforms and of traces.
bool is_readable(const at::Tensor &tensor);

// Raises where WCE_STRICT=1 forbids to leave the fused path.
void leave_fused(const char *why);

// What is checked before a call leaves for the composite: what the kernels would refuse, and targets
// whose values can be read. torch.func wraps tensors on their way to an operator, so that there the
// values can be read before the operator is called only.
void check_for_composite(const LossArgs &args, const c10::SymInt &ignore_index);
void check_for_composite(const RowsArgs &args, const c10::SymInt &ignore_index);

// ---- early_gradient.cpp: the gradient of the logits, made in forward ---------------------------

// The upstream gradient of the loss that backward will bring, if it can be told. Forward asks.
std::optional<double> expected_upstream(const at::Tensor &input);
struct Early {
  at::Tensor dx; // undefined: forward made none
  double upstream = 0;
};
void save_early(torch::autograd::AutogradContext *ctx, const Early &early);
// What forward saved, which is then gone from ctx.
Early take_early(torch::autograd::AutogradContext *ctx);
// The gradient, if forward made it for this upstream gradient of the loss; undefined if not. others:
// another result than the loss has an upstream gradient as well.
at::Tensor early_gradient(Early early, const at::Tensor &input, const at::Tensor &grad,
                          bool others = false);

} // namespace wce

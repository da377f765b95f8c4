// autograd.h -- which way a call goes.
#pragma once

#include "ops.h"

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

} // namespace wce

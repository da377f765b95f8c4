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

// Raises where WCE_STRICT=1 forbids to leave the fused path.
void leave_fused(const char *why);

} // namespace wce

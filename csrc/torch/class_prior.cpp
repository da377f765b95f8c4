// class_prior.cpp -- what the kernels add to the logits, from a class prior whose values can be read at
// once.
//
// arguments.py says the same in tensor operations, for every device, for transforms and for errors.
// They take 15 us where this takes 1, and their code is out of the caches by the time that a step
// comes back to it: then it is 120 us of the 560 us that a forward of 65536 rows of 10 classes takes
// (one thread, Zen 4).
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <cmath>

#include "autograd.h"

namespace wce {
namespace {

constexpr int64_t logs_per_chunk = 4096; // 20 us
constexpr double largest_tau = 1e35;     // below it tau * log q is finite in float32

// tau * log(value / sum), or tau * value where is_log; false where a value can be no share of anything.
template <class From, class To>
bool scale(const at::Tensor &q, bool is_log, double tau, const at::Tensor &result) {
  const From *from = q.const_data_ptr<From>();
  To *const to = result.mutable_data_ptr<To>();
  const int64_t n = q.numel(), stride = q.stride(0);
  if (is_log) {
    for (int64_t c = 0; c < n; c++) to[c] = static_cast<To>(tau * from[c * stride]);
    return true;
  }
  bool good = true;
  double sum = 0;
  for (int64_t c = 0; c < n; c++) {
    good &= from[c * stride] >= 0; // false for nan
    sum += static_cast<double>(from[c * stride]);
  }
  if (!good || !(sum > 0 && sum < INFINITY)) return false;
  at::parallel_for(0, n, logs_per_chunk, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) // 0 becomes -inf
      to[c] = static_cast<To>(tau * std::log(static_cast<double>(from[c * stride]) / sum));
  });
  return true;
}

template <class To>
bool scale_any(const at::Tensor &q, bool is_log, double tau, const at::Tensor &result) {
  switch (q.scalar_type()) {
  case at::kFloat: return scale<float, To>(q, is_log, tau, result);
  case at::kDouble: return scale<double, To>(q, is_log, tau, result);
  case at::kLong: return scale<int64_t, To>(q, is_log, tau, result);
  default: return false;
  }
}

// Whether the values stand in memory as they are, and neither a derivative, a transform nor a trace
// follows them.
bool is_plain_memory(const at::Tensor &q) {
  constexpr c10::DispatchKeySet transformed({c10::DispatchKey::Conjugate,
                                             c10::DispatchKey::Negative,
                                             c10::DispatchKey::ZeroTensor});
  constexpr c10::DispatchKeySet followed(
      {c10::DispatchKey::Tracer, c10::DispatchKey::Python, c10::DispatchKey::PreDispatch,
       c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchDynamicLayerFrontMode});
  return is_readable(q) && q.layout() == c10::kStrided && !q.key_set().has_any(transformed) &&
         !q.requires_grad() && !torch::autograd::isFwGradDefined(q) &&
         !c10::impl::tls_local_dispatch_key_set().included_.has_any(followed);
}

} // namespace

OptTensor scaled_log_prior(const at::Tensor &q, bool is_log, double tau, const at::Tensor &input) {
  if (!(tau > 0 && tau <= largest_tau) || !is_readable(input) || input.dim() == 0) return {};
  if (q.dim() != 1 || !is_plain_memory(q) || q.numel() != input.size(input.dim() == 1 ? 0 : 1))
    return {};
  const at::ScalarType acc = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (is_log && tau == 1 && q.scalar_type() == acc) return q;
  at::Tensor result = at::detail::empty_cpu({q.numel()}, acc);
  const bool done = acc == at::kDouble ? scale_any<double>(q, is_log, tau, result)
                                       : scale_any<float>(q, is_log, tau, result);
  return done ? OptTensor(std::move(result)) : OptTensor();
}

} // namespace wce

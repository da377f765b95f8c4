// ops_cpu.cpp -- the CPU kernels of the ops: check, allocate, call C in parallel, wrap.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../loss_math.h"
#include "ops.h"

namespace wce {
namespace {

// Below about 32K elements (10 us) a second thread costs more than it brings.
constexpr int64_t elements_per_chunk = 32768;

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_cpu(sizes, type);
}

// The problem with the prior also in the order in which the kernels load bfloat16.
struct Ordered {
  wce_problem c;
  std::unique_ptr<float[]> prior;

  explicit Ordered(const wce_problem &problem) : c(problem) {
    if (!wce_cpu_orders_prior(&c)) return;
    prior.reset(new float[c.classes]);
    wce_cpu_order_prior(&c, prior.get());
  }
};

// A problem with at least one row, cut into tasks that the threads share.
class Run {
public:
  explicit Run(const Problem &problem)
      : problem_(problem), ordered_(problem.c), plan_(wce_cpu_plan(&ordered_.c)) {}

  // The sums that need no logits.
  wce_sums weigh() const {
    Sums sums = room_for_sums();
    for_each_task([&](int64_t task) { wce_cpu_weigh(&plan_, &ordered_.c, task, sums.data()); });
    return wce_cpu_add(&plan_, sums.data());
  }

  wce_sums forward(const wce_row_outputs &out) const {
    Sums sums = room_for_sums();
    std::vector<wce_piece> pieces(plan_.pieces); // no allocation where a row is never split
    for_each_task([&](int64_t task) {
      wce_cpu_forward(&plan_, &ordered_.c, &out, task, sums.data(), pieces.data());
    });
    return wce_cpu_finish(&plan_, &ordered_.c, &out, sums.data(), pieces.data());
  }

  void backward(const wce_row_grads &grads) const {
    std::atomic<int64_t> bad_row{-1};
    for_each_task([&](int64_t task) {
      const int64_t bad = wce_cpu_backward(&plan_, &ordered_.c, &grads, task);
      if (bad >= 0) bad_row.store(bad, std::memory_order_relaxed);
    });
    const int64_t bad = bad_row.load();
    if (bad >= 0) raise_bad_row(problem_.c, problem_.row_shape(), bad);
  }

  // Forward and backward; targets were checked before, by weigh().
  wce_sums both(const wce_row_outputs &out, const wce_row_grads &grads) const {
    if (plan_.regime == WCE_SPLIT) {
      const wce_sums sums = forward(out);
      backward(grads);
      return sums;
    }
    Sums sums = room_for_sums();
    for_tasks([&](int64_t begin, int64_t end) {
      wce_cpu_both(&plan_, &ordered_.c, &out, &grads, begin, end, sums.data());
    });
    return wce_cpu_add(&plan_, sums.data());
  }

private:
  using Sums = c10::SmallVector<wce_sums, 8>;

  Sums room_for_sums() const {
    Sums sums;
    sums.resize(plan_.tasks);
    return sums;
  }

  // body(begin, end) runs tasks [begin, end).
  template <class Body> void for_tasks(const Body &body) const {
    const int64_t grain =
        std::max<int64_t>(1, elements_per_chunk / std::max<int64_t>(1, plan_.work_per_task));
    at::parallel_for(0, plan_.tasks, grain, body);
  }

  template <class Body> void for_each_task(const Body &body) const {
    for_tasks([&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) body(task);
    });
  }

  const Problem &problem_;
  const Ordered ordered_;
  const wce_plan plan_;
};

wce_sums run_forward(const Problem &problem, const wce_row_outputs &out) {
  if (problem.rows == 0) return {0, 0, 0, 0, 0, -1};
  return Run(problem).forward(out);
}

void set_value(const at::Tensor &tensor, double value, int64_t at = 0) {
  void *data = tensor.mutable_data_ptr();
  switch (tensor.scalar_type()) {
  case at::kFloat:
    static_cast<float *>(data)[at] = static_cast<float>(value);
    break;
  case at::kDouble:
    static_cast<double *>(data)[at] = value;
    break;
  case at::kBFloat16:
    static_cast<c10::BFloat16 *>(data)[at] = static_cast<float>(value);
    break;
  default:
    static_cast<c10::Half *>(data)[at] = static_cast<float>(value);
  }
}

template <class Args> at::Tensor empty_stats(const Args &args, const Problem &problem) {
  return empty({stats_size(args).expect_int()}, problem.acc);
}

// Without classes no kernel runs: no row has anything to add up.
void check_no_classes(const LossArgs &args, int64_t ignore_index) {
  if (!is_soft(args.input, args.target))
    check_target_values(args.input, args.target, ignore_index, std::nullopt);
  if (args.target2) check_target_values(args.input, *args.target2, ignore_index, std::nullopt);
}

LossAndStats forward_no_classes(const LossArgs &args, const Problem &problem, int64_t ignore_index,
                                at::ScalarType type) {
  check_no_classes(args, ignore_index);
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const bool smoothed = !is_soft(args.input, args.target) && args.label_smoothing > 0;
  at::Tensor loss = empty({}, type);
  at::Tensor stats = empty_stats(args, problem);
  std::memset(stats.mutable_data_ptr(), 0, stats.nbytes());
  set_value(loss, args.reduction == WCE_MEAN || (smoothed && problem.rows > 0) ? nan : 0.0);
  if (args.reduction == WCE_NONE) loss = loss.expand(problem.row_shape()).contiguous();
  return {std::move(loss), std::move(stats)};
}

struct Denominators {
  double first, second;
};

Denominators denominators_of(const wce_sums &sums, const OptTensor &normalizer, int64_t reduction) {
  const auto own = [&](double weight) {
    return reduction == WCE_MEAN ? wce_own_denominator(weight) : weight;
  };
  return {normalizer ? normalizer->item().toDouble() : own(sums.weight), own(sums.weight2)};
}

void set_denominators(const at::Tensor &stats, const Denominators &by, bool is_mixture) {
  set_value(stats, by.first);
  if (is_mixture) set_value(stats, by.second, stats.numel() - 1);
}

// The loss unless it is per row: in double, rounded once.
void set_loss(const at::Tensor &loss, const wce_sums &sums, const Denominators &by,
              int64_t reduction, bool empty_zero, bool is_mixture) {
  if (reduction == WCE_SUM) set_value(loss, sums.loss + sums.loss2);
  if (reduction != WCE_MEAN) return;
  double mean = sums.loss / by.first;
  if (is_mixture) mean += sums.loss2 / by.second;
  set_value(loss, empty_zero && sums.count == 0 ? 0.0 : mean);
}

LossAndStats forward_cpu(WCE_LOSS_PARAMS(int64_t)) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  check_loss(args, ignore_index);
  const Problem problem(args, ignore_index, Kernels::cpu);
  const bool soft = problem.c.prob.data != nullptr || is_soft(input, target);
  const at::ScalarType type = loss_type(input, target, weight, soft, out_fp32);
  if (problem.c.classes == 0) return forward_no_classes(args, problem, ignore_index, type);

  at::Tensor stats = empty_stats(args, problem);
  at::Tensor loss = reduction == WCE_NONE ? empty(problem.row_shape(), type) : empty({}, type);
  wce_row_outputs out{};
  set_saved(out, stats, problem);
  if (reduction == WCE_NONE) out.loss = loss.mutable_data_ptr();
  out.loss_dtype = dtype_of(type);

  const wce_sums sums = run_forward(problem, out);
  if (sums.bad_row >= 0) raise_bad_row(problem.c, target.sizes(), sums.bad_row);
  const Denominators by = denominators_of(sums, normalizer, reduction);
  set_denominators(stats, by, target2.has_value());
  set_loss(loss, sums, by, reduction, empty_zero, target2.has_value());
  return {std::move(loss), std::move(stats)};
}

// What backward is given but for the upstream gradients. The denominators stand in stats.
wce_row_grads grads_for(const Gradient &dx, const at::Tensor &stats, const Problem &problem,
                        int64_t reduction) {
  wce_row_grads grads{};
  grads.dx = dx.view();
  set_saved(grads, stats, problem);
  if (reduction != WCE_MEAN) return grads;
  grads.denominator = stats.const_data_ptr();
  if (problem.c.target2) grads.denominator2 = last_value(stats);
  return grads;
}

at::Tensor backward_cpu(WCE_BACKWARD_PARAMS(int64_t)) {
  const OptTensor none;
  const LossArgs args{input,     target,        weight, reduction, label_smoothing,
                      log_prior, sample_weight, mask,   none,       skip_empty, target2, mix};
  check_backward(args, ignore_index, grad, stats);
  const Problem problem(args, ignore_index, Kernels::cpu);
  Gradient dx(input, problem);
  if (problem.rows == 0 || problem.c.classes == 0) return dx.finish();

  wce_row_grads grads = grads_for(dx, stats, problem, reduction);
  c10::MaybeOwned<at::Tensor> grad_owner;
  set_grad(grads, grad, grad_owner);
  Run(problem).backward(grads);
  return dx.finish();
}

// Forward and backward of a reduced loss: its sums, and the gradient.
std::pair<wce_sums, at::Tensor> run_both(const Run &run, const at::Tensor &input,
                                         const Problem &problem, const wce_row_outputs &out,
                                         const at::Tensor &stats, double upstream,
                                         int64_t reduction) {
  Gradient dx(input, problem);
  wce_row_grads grads = grads_for(dx, stats, problem, reduction);
  grads.grad = &upstream;
  grads.grad_dtype = WCE_F64;
  const wce_sums sums = run.both(out, grads);
  return {sums, dx.finish()};
}

// Gradients are divided by the denominators, so that these are needed first.
Denominators find_denominators(const Run &run, const Problem &problem, const OptTensor &normalizer,
                               int64_t reduction) {
  const wce_sums weights = run.weigh();
  if (weights.bad_row >= 0) raise_bad_row(problem.c, problem.row_shape(), weights.bad_row);
  return denominators_of(weights, normalizer, reduction);
}

ValueAndGrad value_and_grad_cpu(double upstream, WCE_LOSS_PARAMS(int64_t)) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  check_reduced(reduction);
  check_loss(args, ignore_index);
  const Problem problem(args, ignore_index, Kernels::cpu);
  if (problem.rows == 0 || problem.c.classes == 0)
    return forward_then_backward(upstream, WCE_LOSS_ARGS);

  const Run run(problem);
  const Denominators by = find_denominators(run, problem, normalizer, reduction);
  const bool soft = problem.c.prob.data != nullptr, is_mixture = target2.has_value();
  at::Tensor stats = empty_stats(args, problem);
  at::Tensor loss = empty({}, loss_type(input, target, weight, soft, out_fp32));
  set_denominators(stats, by, is_mixture);
  wce_row_outputs out{};
  set_saved(out, stats, problem);
  auto [sums, dx] = run_both(run, input, problem, out, stats, upstream, reduction);
  set_loss(loss, sums, by, reduction, empty_zero, is_mixture);
  return {std::move(loss), std::move(stats), std::move(dx)};
}

// ---- rows --------------------------------------------------------------------------------------

// The results of rows_forward, empty, and the view of them that the kernels fill.
struct RowResults {
  at::Tensor loss, stats, lse, log_prob, entropy, correct;
  wce_row_outputs out{};

  RowResults(const RowsArgs &args, const Problem &problem, bool wants_entropy) {
    TORCH_CHECK(problem.c.classes > 0, "input: expected at least one class, got shape ",
                args.input.sizes());
    const auto shape = problem.row_shape();
    const at::ScalarType acc = problem.acc;
    const bool per_row = args.reduction == WCE_NONE, has_target = args.target.has_value();
    const auto wanted = [&](bool asked, at::ScalarType type) {
      return asked ? empty(shape, type) : empty({0}, type);
    };
    loss = per_row ? empty(shape, acc) : empty({}, acc);
    stats = empty_stats(args, problem), lse = empty(shape, acc);
    log_prob = wanted(has_target, acc), correct = wanted(has_target, at::kBool);
    entropy = wanted(wants_entropy, acc);

    const auto pointer = [](const at::Tensor &tensor, bool asked) {
      return asked ? tensor.mutable_data_ptr() : nullptr;
    };
    set_saved(out, stats, problem);
    out.loss = pointer(loss, per_row);
    out.loss_dtype = dtype_of(acc);
    out.lse = lse.mutable_data_ptr();
    out.log_prob = pointer(log_prob, has_target);
    out.entropy = pointer(entropy, wants_entropy);
    out.correct = static_cast<uint8_t *>(pointer(correct, has_target));
  }
};

RowsResult rows_forward_cpu(WCE_ROWS_PARAMS(int64_t)) {
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  check_rows(args);
  const Problem problem(args, ignore_index, Kernels::cpu);
  RowResults rows(args, problem, entropy);
  const wce_sums sums = run_forward(problem, rows.out);
  if (sums.bad_row >= 0) raise_bad_row(problem.c, problem.row_shape(), sums.bad_row);
  const Denominators by = denominators_of(sums, normalizer, reduction);
  set_denominators(rows.stats, by, false);
  set_loss(rows.loss, sums, by, reduction, empty_zero, false);
  return {rows.loss, rows.stats, rows.lse, rows.log_prob, rows.entropy, rows.correct};
}

RowsAndGrad rows_value_and_grad_cpu(double upstream, WCE_ROWS_PARAMS(int64_t)) {
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  check_reduced(reduction);
  check_rows(args);
  const Problem problem(args, ignore_index, Kernels::cpu);
  if (problem.rows == 0) return rows_forward_then_backward(upstream, WCE_ROWS_ARGS);

  RowResults rows(args, problem, entropy);
  const Run run(problem);
  const Denominators by = find_denominators(run, problem, normalizer, reduction);
  set_denominators(rows.stats, by, false);
  auto [sums, dx] = run_both(run, input, problem, rows.out, rows.stats, upstream, reduction);
  set_loss(rows.loss, sums, by, reduction, empty_zero, false);
  return {rows.loss,    rows.stats,   rows.lse, rows.log_prob,
          rows.entropy, rows.correct, std::move(dx)};
}

at::Tensor rows_backward_cpu(WCE_ROWS_BACKWARD_PARAMS(int64_t)) {
  const OptTensor normalizer;
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  check_rows_backward(args, stats, grad_loss, grad_lse, grad_log_prob);
  const Problem problem(args, ignore_index, Kernels::cpu);
  Gradient dx(input, problem);
  if (problem.rows == 0 || problem.c.classes == 0) return dx.finish();

  wce_row_grads grads = grads_for(dx, stats, problem, reduction);
  const RowGrads upstream(grads, problem.acc, grad_loss, grad_lse, grad_log_prob);
  Run(problem).backward(grads);
  return dx.finish();
}

} // namespace
} // namespace wce

TORCH_LIBRARY_IMPL(wce, CPU, m) {
  m.impl("forward", wce::forward_cpu);
  m.impl("backward", wce::backward_cpu);
  m.impl("value_and_grad", wce::value_and_grad_cpu);
  m.impl("rows_forward", wce::rows_forward_cpu);
  m.impl("rows_backward", wce::rows_backward_cpu);
  m.impl("rows_value_and_grad", wce::rows_value_and_grad_cpu);
}

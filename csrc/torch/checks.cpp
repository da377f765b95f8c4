// checks.cpp -- every refusal of an argument, with native's exception types and texts.
//
// Sizes are looked at as SymInt, which costs nothing for real tensors and lets the Meta kernels of
// torch.compile make the same checks.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <vector>

#include "ops.h"

namespace wce {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

bool same(SymIntArrayRef a, SymIntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); d++)
    if (a[d] != b[d]) return false;
  return true;
}

bool is_logits_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

bool is_target_type(at::ScalarType type) {
  return type == at::kLong || type == at::kInt || type == at::kShort || type == at::kByte;
}

SymInt classes_of(const at::Tensor &input) { return input.sym_size(input.dim() == 1 ? 0 : 1); }

// (N, d1, ..., dK) of logits (N, C, d1, ..., dK); () of logits (C).
c10::SmallVector<SymInt, 6> row_shape_of(const at::Tensor &input) {
  c10::SmallVector<SymInt, 6> shape;
  const auto sizes = input.sym_sizes();
  if (sizes.size() < 2) return shape;
  shape.push_back(sizes[0]);
  shape.append(sizes.begin() + 2, sizes.end());
  return shape;
}

SymInt count_rows(const at::Tensor &input) {
  SymInt rows = 1;
  const auto sizes = input.sym_sizes();
  for (size_t d = 0; d < sizes.size() && sizes.size() > 1; d++)
    if (d != 1) rows *= sizes[d];
  return rows;
}

void check_device(const at::Tensor &input, const at::Tensor &other, const char *name) {
  TORCH_CHECK(other.device() == input.device(),
              "Expected all tensors to be on the same device, but ", name, " (", other.device(),
              ") is not on the expected device ", input.device());
}

void check_smoothing(double label_smoothing) {
  TORCH_CHECK(!(label_smoothing > 1.0),
              "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
}

void check_logits(const at::Tensor &input) {
  TORCH_CHECK_INDEX(input.dim() > 0,
                    "Dimension out of range (expected to be in range of [-1, 0], but got 1)");
  TORCH_CHECK_NOT_IMPLEMENTED(is_logits_type(input.scalar_type()),
                              "\"cross_entropy\" not implemented for '",
                              c10::toString(input.scalar_type()), "'");
}

// 1-D and 2-D logits.
void check_flat_target(const at::Tensor &input, const at::Tensor &target) {
  TORCH_CHECK(target.dim() <= 1, "0D or 1D target tensor expected, multi-target not supported");
  if (input.dim() == 1)
    TORCH_CHECK_VALUE(
        target.dim() == 0 || target.sym_size(0) == 1,
        "For 1D input, 1D target must have size 1, but got target size: ", target.sym_size(0));
}

// (N, C, d1, ..., dK) logits, K >= 1.
void check_spatial_target(const at::Tensor &input, const at::Tensor &target) {
  const auto expected = row_shape_of(input);
  if (same(target.sym_sizes(), expected)) return;
  if (input.dim() != 4)
    TORCH_CHECK(false, "Expected target size ", SymIntArrayRef(expected), ", got ",
                target.sym_sizes());
  TORCH_CHECK(target.dim() == 3,
              "only batches of spatial targets supported (3D tensors) but got targets of "
              "dimension: ",
              target.dim());
  TORCH_CHECK(false,
              "input and target batch or spatial sizes don't match: size mismatch "
              "(got input: ",
              input.sym_sizes(), " , target: ", target.sym_sizes(), ")");
}

void check_index_target(const at::Tensor &input, const at::Tensor &target) {
  if (input.dim() > 1) {
    const SymInt batch = target.dim() > 0 ? target.sym_size(0) : SymInt(0);
    TORCH_CHECK_VALUE(target.dim() > 0 && input.sym_size(0) == batch, "Expected input batch_size (",
                      input.sym_size(0), ") to match target batch_size (", batch, ").");
  }
  if (input.dim() <= 2)
    check_flat_target(input, target);
  else
    check_spatial_target(input, target);
  if (!is_target_type(target.scalar_type())) {
    const char *found = c10::toString(target.scalar_type());
    TORCH_CHECK(input.dim() > 2, "expected target dtype to be Long or Byte, but got ", found);
    TORCH_CHECK(false, "expected scalar type Long but found ", found);
  }
}

void check_index_weight(const at::Tensor &input, const at::Tensor &weight) {
  const SymInt classes = classes_of(input);
  if (input.dim() <= 2) {
    TORCH_CHECK(weight.dim() == 1 && weight.sym_size(0) == classes,
                "weight tensor should be defined either for all ", classes,
                " classes or no classes but got weight tensor of shape: ", weight.sym_sizes());
  } else {
    TORCH_CHECK(weight.sym_numel() == classes,
                "weight tensor should be defined either for all or no classes");
  }
  TORCH_CHECK(at::isFloatingType(weight.scalar_type()), "expected scalar type ",
              c10::toString(input.scalar_type()), " but found ",
              c10::toString(weight.scalar_type()));
}

void check_index(const LossArgs &args) {
  check_smoothing(args.label_smoothing);
  check_logits(args.input);
  check_index_target(args.input, args.target);
  if (args.weight) check_index_weight(args.input, *args.weight);
}

void check_prob_type(const at::Tensor &prob) {
  TORCH_CHECK(at::isFloatingType(prob.scalar_type()),
              "Expected floating point type for target with class probabilities, got ",
              c10::toString(prob.scalar_type()));
}

void check_soft_weight(const at::Tensor &input, const OptTensor &weight) {
  if (!weight || input.dim() == 0) return;
  const SymInt classes = classes_of(input);
  TORCH_CHECK(weight->dim() == 1 && weight->sym_size(0) == classes,
              "cross_entropy: weight tensor should be defined either for all ", classes,
              " classes or no classes but got weight tensor of shape: ", weight->sym_sizes());
  TORCH_CHECK(!weight->is_complex(), "weight: expected a real tensor, got ",
              c10::toString(weight->scalar_type()));
}

void check_soft(const LossArgs &args, const SymInt &ignore_index) {
  check_prob_type(args.target);
  TORCH_CHECK(ignore_index < 0, "ignore_index is not supported for floating point target");
  check_soft_weight(args.input, args.weight);
  check_logits(args.input);
  check_smoothing(args.label_smoothing);
}

// ---- what native does not have -----------------------------------------------------------------

void check_prior(const at::Tensor &input, const at::Tensor &prior) {
  check_device(input, prior, "log_prior");
  TORCH_CHECK(prior.dim() == 1 && prior.sym_size(0) == classes_of(input) &&
                  at::isFloatingType(prior.scalar_type()),
              "log_prior: expected a floating point tensor of shape [", classes_of(input),
              "], one value per class, got ", c10::toString(prior.scalar_type()), " of shape ",
              prior.sym_sizes());
}

// One value per row: the shape of the index target.
void check_per_row(const at::Tensor &input, const at::Tensor &value, const char *name,
                   const char *kind, bool right_type) {
  check_device(input, value, name);
  const auto shape = row_shape_of(input);
  const bool one_row = input.dim() == 1 && value.dim() == 1 && value.sym_size(0) == 1;
  TORCH_CHECK(right_type && (one_row || same(value.sym_sizes(), shape)), name, ": expected a ",
              kind, " tensor of shape ", SymIntArrayRef(shape), ", one value per row, got ",
              c10::toString(value.scalar_type()), " of shape ", value.sym_sizes());
}

void check_mask(const at::Tensor &input, const at::Tensor &mask) {
  check_per_row(input, mask, "mask", "bool", mask.scalar_type() == at::kBool);
}

void check_normalizer(const at::Tensor &input, const at::Tensor &normalizer) {
  TORCH_CHECK(normalizer.sym_numel() == 1 && !normalizer.is_complex() &&
                  normalizer.scalar_type() != at::kBool,
              "normalizer: expected a number or a tensor with one real value, got ",
              c10::toString(normalizer.scalar_type()), " of shape ", normalizer.sym_sizes());
  check_device(input, normalizer, "normalizer");
}

template <class Args> void check_extras(const Args &args) {
  if (args.log_prior) check_prior(args.input, *args.log_prior);
  if (args.sample_weight)
    check_per_row(args.input, *args.sample_weight, "sample_weight", "floating point",
                  at::isFloatingType(args.sample_weight->scalar_type()));
  if (args.mask) check_mask(args.input, *args.mask);
  if (args.normalizer) check_normalizer(args.input, *args.normalizer);
}

// A mixture of two index targets.
void check_mixture(const LossArgs &args) {
  if (!args.target2 && !args.mix) return;
  const at::Tensor &input = args.input;
  TORCH_CHECK(args.target2 && args.mix, "target2 and mix: expected both or none of them");
  TORCH_CHECK(!is_soft(input, args.target) && !args.normalizer,
              "target2: expected with class numbers as the target and without a normalizer");
  check_index_target(input, *args.target2);
  check_device(input, *args.target2, "target2");
  check_device(input, *args.mix, "mix");
  TORCH_CHECK(at::isFloatingType(args.mix->scalar_type()), "mix: expected floating point, got ",
              c10::toString(args.mix->scalar_type()));
  if (args.mix->dim() > 0) check_per_row(input, *args.mix, "mix", "floating point", true);
}

void check_reduction(int64_t reduction) {
  TORCH_CHECK(reduction >= 0 && reduction <= 2,
              "Invalid reduction type encountered in cross_entropy: ", reduction);
}

void check_stats(const at::Tensor &stats, const at::Tensor &input, const SymInt &numel) {
  TORCH_CHECK(stats.scalar_type() == acc_type(input.scalar_type()) && stats.is_contiguous() &&
                  stats.sym_numel() == numel,
              "stats: expected the contiguous ", c10::toString(acc_type(input.scalar_type())),
              " tensor of ", numel, " values that forward returned, got ",
              c10::toString(stats.scalar_type()), " of shape ", stats.sym_sizes());
  check_device(input, stats, "stats");
}

void check_loss_grad(const at::Tensor &input, const at::Tensor &grad, int64_t reduction,
                     const char *name) {
  if (reduction == WCE_NONE) {
    check_per_row(input, grad, name, "floating point", is_logits_type(grad.scalar_type()));
  } else {
    TORCH_CHECK(grad.sym_numel() == 1 && is_logits_type(grad.scalar_type()), name,
                ": expected a floating point tensor with one value, got ",
                c10::toString(grad.scalar_type()), " of shape ", grad.sym_sizes());
    check_device(input, grad, name);
  }
}

void check_row_grad(const at::Tensor &input, const OptTensor &grad, const char *name) {
  if (grad)
    check_per_row(input, *grad, name, "floating point", is_logits_type(grad->scalar_type()));
}

// A formula without branches: a traced graph holds for any number of classes.
SymInt stats_size(const at::Tensor &input, bool soft, int64_t denominators) {
  const int64_t widest_without = wce_saves_from(dtype_of(input.scalar_type()), soft) - 1;
  const SymInt saves = (classes_of(input) - widest_without).max(0).min(1); // 0 or 1
  return saves * count_rows(input) * (soft ? 3 : 2) + denominators;
}

} // namespace

SymInt stats_size(const LossArgs &args) {
  return stats_size(args.input, is_soft(args.input, args.target), args.target2 ? 2 : 1);
}

SymInt stats_size(const RowsArgs &args) {
  return stats_size(args.input, args.target_prob.has_value(), 1);
}

bool is_soft(const at::Tensor &input, const at::Tensor &target) {
  return same(input.sym_sizes(), target.sym_sizes());
}

void check_loss(const LossArgs &args, const SymInt &ignore_index) {
  check_reduction(args.reduction);
  if (is_soft(args.input, args.target))
    check_soft(args, ignore_index);
  else
    check_index(args);
  check_device(args.input, args.target, "target");
  if (args.weight) check_device(args.input, *args.weight, "weight");
  check_extras(args);
  check_mixture(args);
}

void check_reduced(int64_t reduction) {
  TORCH_CHECK(reduction != WCE_NONE, "reduction: expected 1 (mean) or 2 (sum), got 0 (none)");
}

void check_backward(const LossArgs &args, const SymInt &ignore_index, const at::Tensor &grad,
                    const at::Tensor &stats) {
  check_loss(args, ignore_index);
  const at::Tensor &input = args.input;
  check_loss_grad(input, grad, args.reduction, "grad");
  check_stats(stats, input, stats_size(args));
}

void check_rows(const RowsArgs &args) {
  const at::Tensor &input = args.input;
  check_reduction(args.reduction);
  if (args.target_prob) {
    TORCH_CHECK(same(args.target_prob->sym_sizes(), input.sym_sizes()),
                "target_prob: expected a tensor of shape ", input.sym_sizes(), ", got shape ",
                args.target_prob->sym_sizes());
    check_prob_type(*args.target_prob);
    check_soft_weight(input, args.weight);
  }
  check_logits(input);
  if (args.target) check_index_target(input, *args.target);
  if (args.weight && !args.target_prob) check_index_weight(input, *args.weight);
  if (args.target) check_device(input, *args.target, "target");
  if (args.target_prob) check_device(input, *args.target_prob, "target_prob");
  if (args.weight) check_device(input, *args.weight, "weight");
  check_extras(args);
}

void check_rows_backward(const RowsArgs &args, const at::Tensor &stats, const OptTensor &grad_loss,
                         const OptTensor &grad_lse, const OptTensor &grad_log_prob) {
  check_rows(args);
  check_stats(stats, args.input, stats_size(args));
  if (grad_loss) check_loss_grad(args.input, *grad_loss, args.reduction, "grad_loss");
  check_row_grad(args.input, grad_lse, "grad_lse");
  check_row_grad(args.input, grad_log_prob, "grad_log_prob");
  TORCH_CHECK(!grad_log_prob || args.target, "grad_log_prob: given without a target");
}

// ---- values of targets -------------------------------------------------------------------------

void raise_bad_target(int64_t value, int64_t row, at::IntArrayRef shape, int64_t classes) {
  std::vector<int64_t> position(shape.size());
  for (size_t d = shape.size(); d-- > 0;) {
    position[d] = row % shape[d];
    row /= shape[d];
  }
  const at::IntArrayRef at(position);
  TORCH_CHECK_VALUE(value < 0 || value >= classes, "Target ", value, " (position ", at,
                    ") is a class whose class_prior is 0: under that prior it cannot occur");
  TORCH_CHECK_INDEX(classes == 0, "Target ", value, " is out of bounds. (position ", at,
                    "; classes are 0..", classes - 1, ")");
  TORCH_CHECK_INDEX(false, "Target ", value, " is out of bounds. (position ", at,
                    "; there are no classes)");
}

namespace {

bool is_bad(int64_t value, const wce_problem &p) {
  if (value == p.ignore_index) return false;
  if (value < 0 || value >= p.classes) return true;
  if (p.prior == nullptr) return false;
  const double prior = p.dtype == WCE_F64 ? static_cast<const double *>(p.prior)[value]
                                          : static_cast<const float *>(p.prior)[value];
  return prior == -std::numeric_limits<double>::infinity();
}

} // namespace

void raise_bad_row(const wce_problem &p, at::IntArrayRef shape, int64_t bad_row) {
  for (const int64_t *target : {p.target, p.target2})
    if (target != nullptr && is_bad(target[bad_row], p))
      raise_bad_target(target[bad_row], bad_row, shape, p.classes);
  TORCH_CHECK(false, "row ", bad_row, " was refused by the kernel");
}

void check_target_values(const at::Tensor &input, const at::Tensor &target, int64_t ignore_index,
                         const OptTensor &log_prior) {
  const at::Tensor values = target.to(at::kLong).contiguous();
  at::Tensor prior;
  wce_problem problem{};
  problem.dtype = WCE_F64;
  problem.classes = input.size(input.dim() == 1 ? 0 : 1);
  problem.target = values.const_data_ptr<int64_t>();
  problem.ignore_index = ignore_index;
  if (log_prior) {
    prior = log_prior->to(at::kDouble).contiguous();
    problem.prior = prior.const_data_ptr();
  }
  for (int64_t row = 0; row < values.numel(); row++)
    if (is_bad(problem.target[row], problem)) raise_bad_row(problem, target.sizes(), row);
}

} // namespace wce

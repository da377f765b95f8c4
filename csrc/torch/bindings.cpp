// bindings.cpp -- the module wce_torch._C: the fast entry of eager mode, and control of the CPU
// kernels.
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "autograd.h"

namespace py = pybind11;

namespace wce {
namespace {

const OptTensor no_tensor;

// ---- arguments as native takes them ------------------------------------------------------------

[[noreturn]] void wrong_type(const char *name, int position, const char *expected,
                             const py::handle &value, const char *why = "") {
  throw py::type_error("cross_entropy_loss(): argument '" + std::string(name) + "' (position " +
                       std::to_string(position) + ") must be " + expected + ", not " +
                       Py_TYPE(value.ptr())->tp_name + why);
}

bool is_constant(const at::Tensor &tensor) {
  return tensor.dim() == 0 && !tensor.requires_grad() &&
         !torch::autograd::isFwGradDefined(tensor);
}

// int, numpy integer, 0-d tensor, SymInt; not bool.
c10::SymInt to_ignore_index(const py::handle &value) {
  if (PyLong_CheckExact(value.ptr())) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow != 0) throw py::value_error("Overflow when unpacking long long");
    return number;
  }
  if (PyBool_Check(value.ptr())) wrong_type("ignore_index", 5, "int", value);
  py::detail::make_caster<c10::SymInt> caster;
  if (!caster.load(value, true)) wrong_type("ignore_index", 5, "int", value);
  return py::detail::cast_op<c10::SymInt>(caster);
}

// float, int, numpy number, 0-d tensor; no strings.
double to_label_smoothing(const py::handle &value) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (THPVariable_Check(value.ptr()) && !is_constant(THPVariable_Unpack(value.ptr())))
    wrong_type("label_smoothing", 6, "float", value,
               " (a 0-d tensor is taken if it has neither gradient nor tangent, which a number "
               "would lose)");
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    wrong_type("label_smoothing", 6, "float", value);
  }
  return number;
}

// While a transform of torch.func is active. It hides the values of tensors that it follows, so that
// only the longer way through Python, which unwraps them, can check targets.
bool is_transformed() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

at::Tensor cross_entropy_entry(const at::Tensor &input, const at::Tensor &target,
                               const OptTensor &weight, int64_t reduction,
                               const py::handle &ignore_index, const py::handle &label_smoothing) {
  c10::SymInt ignored = to_ignore_index(ignore_index);
  const double smoothing = to_label_smoothing(label_smoothing);
  const py::gil_scoped_release release;
  if (is_transformed()) {
    const LossArgs args{input,     target,    weight,    reduction, smoothing, no_tensor,
                        no_tensor, no_tensor, no_tensor, false,     no_tensor, no_tensor};
    check_for_composite(args, ignored);
  }
  return cross_entropy(input, target, weight, reduction, std::move(ignored), smoothing, no_tensor,
                       no_tensor, no_tensor, no_tensor, false, false, false, no_tensor, no_tensor);
}

// The same with what needs no more than to be handed on; nothing inside of transforms.
OptTensor cross_entropy_with_options(const at::Tensor &input, const at::Tensor &target,
                                     const OptTensor &weight, int64_t reduction,
                                     const py::handle &ignore_index,
                                     const py::handle &label_smoothing, const OptTensor &log_prior,
                                     const OptTensor &sample_weight, const OptTensor &mask) {
  if (is_transformed()) return {};
  c10::SymInt ignored = to_ignore_index(ignore_index);
  const double smoothing = to_label_smoothing(label_smoothing);
  const py::gil_scoped_release release;
  return cross_entropy(input, target, weight, reduction, std::move(ignored), smoothing, log_prior,
                       sample_weight, mask, no_tensor, false, false, false, no_tensor, no_tensor);
}

using RowStats = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// loss, lse, log_prob, correct and entropy for class numbers and no option; nothing for soft targets,
// for a weight that wants a gradient, under autocast and inside of transforms, all of which ask for
// more.
std::optional<RowStats> stats_entry(const at::Tensor &input, const at::Tensor &target,
                                    const OptTensor &weight, int64_t reduction,
                                    const py::handle &ignore_index) {
  const c10::DeviceType device = input.device().type();
  if (target.dim() == input.dim() || (weight && weight->requires_grad()) || is_transformed() ||
      (at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device)))
    return {};
  c10::SymInt ignored = to_ignore_index(ignore_index);
  const OptTensor index = target;
  const py::gil_scoped_release release;
  auto [loss, stats, lse, log_prob, entropy, correct] =
      rows_forward(input, index, no_tensor, weight, no_tensor, no_tensor, 1.0, 0.0, 0.0,
                   std::move(ignored), false, true, no_tensor, no_tensor, reduction, false);
  if (loss.scalar_type() != input.scalar_type()) loss = loss.to(input.scalar_type());
  return RowStats{loss, lse, log_prob, correct, entropy};
}

// The operators with all of their arguments. A small call takes 6 us; through torch.ops, which goes by
// names and schemas, 8.
at::Tensor loss_entry(WCE_LOSS_PARAMS(c10::SymInt)) {
  const py::gil_scoped_release release;
  return cross_entropy(WCE_LOSS_ARGS);
}

RowsResult rows_entry(WCE_ROWS_PARAMS(c10::SymInt)) {
  const py::gil_scoped_release release;
  return rows_forward(WCE_ROWS_ARGS);
}

// ("fused" | "composite" | "native", why) for tensors outside of transforms and traces.
std::pair<std::string, std::string> route_entry(const at::Tensor &input, const at::Tensor &target,
                                                const OptTensor &weight, const OptTensor &log_prior,
                                                const OptTensor &sample_weight,
                                                const OptTensor &normalizer) {
  const LossArgs args{input,     target,        weight,    WCE_MEAN,  0.0,
                      log_prior, sample_weight, no_tensor, normalizer, false,
                      no_tensor, no_tensor};
  const Route route = route_loss(args);
  static const char *const names[] = {"fused", "composite", "native"};
  return {names[static_cast<int>(route.path)], route.why == nullptr ? "" : route.why};
}

// For calls from Python that no operator can check: it does not take their type of tensor, or a
// transform of torch.func hides their values from it.
void check_loss_entry(WCE_LOSS_PARAMS(int64_t)) {
  const LossArgs args{input,     target,        weight, reduction,  label_smoothing,
                      log_prior, sample_weight, mask,   normalizer, skip_empty, target2, mix};
  (void)empty_zero, (void)out_fp32;
  check_for_composite(args, ignore_index);
}

void check_rows_entry(WCE_ROWS_PARAMS(int64_t)) {
  const RowsArgs args{input, target, target_prob, weight, log_prior, mask, sample_weight,
                      normalizer, reduction, spike, floor, soft, skip_empty};
  (void)entropy, (void)empty_zero;
  check_for_composite(args, ignore_index);
}

// ---- CPU instruction sets ----------------------------------------------------------------------

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < wce_cpu_isa_count(); i++)
    if (wce_cpu_isa_supported(i)) names.emplace_back(wce_cpu_isa_name(i));
  return names;
}

std::string get_cpu_isa() { return wce_cpu_isa_name(wce_cpu_isa_current()); }

std::string choices() {
  std::string text;
  for (const std::string &name : cpu_isas()) text += (text.empty() ? "" : ", ") + name;
  return text;
}

void set_cpu_isa(const std::optional<std::string> &name) {
  if (wce_cpu_isa_select(name ? name->c_str() : nullptr) == 0) return;
  throw py::value_error("instruction set '" + *name +
                        "' is unknown, or this build or processor does not support it; here there "
                        "are: " +
                        choices());
}

void force_cpu_regime(const std::optional<std::string> &name) {
  if (wce_cpu_regime_force(name ? name->c_str() : nullptr) == 0) return;
  throw py::value_error("regime '" + *name + "' is unknown; there are: auto, tile, rows, split");
}

void force_cpu_exp(const std::optional<std::string> &name) {
  if (wce_cpu_exp_force(name ? name->c_str() : nullptr) == 0) return;
  throw py::value_error("exp '" + *name + "' is unknown; there are: auto, quick, slow");
}

// What setup.py decided; it defines the macros.
py::dict build_info() {
  py::dict info;
  info["version"] = WCE_BUILD_VERSION;
  info["torch"] = WCE_BUILD_TORCH;
  info["cuda"] = static_cast<bool>(WCE_BUILD_CUDA);
  info["cuda_archs"] = WCE_BUILD_CUDA_ARCHS;
  info["nvcc"] = WCE_BUILD_NVCC;
  info["compiler"] = __VERSION__;
  info["cpu_isas"] = cpu_isas();
  return info;
}

// Arguments and defaults as in schema.cpp.
template <class Fn> void def_loss(py::module_ &m, const char *name, Fn fn) {
  m.def(name, fn, py::arg("input"), py::arg("target"), py::arg("weight"), py::arg("reduction"),
        py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("log_prior") = py::none(),
        py::arg("sample_weight") = py::none(), py::arg("mask") = py::none(),
        py::arg("normalizer") = py::none(), py::arg("empty_zero") = false,
        py::arg("skip_empty") = false, py::arg("out_fp32") = false,
        py::arg("target2") = py::none(), py::arg("mix") = py::none());
}

template <class Fn> void def_rows(py::module_ &m, const char *name, Fn fn) {
  m.def(name, fn, py::arg("input"), py::arg("target"), py::arg("target_prob"), py::arg("weight"),
        py::arg("log_prior"), py::arg("mask"), py::arg("spike"), py::arg("floor"), py::arg("soft"),
        py::arg("ignore_index"), py::arg("skip_empty"), py::arg("entropy"),
        py::arg("sample_weight"), py::arg("normalizer"), py::arg("reduction"),
        py::arg("empty_zero"));
}

} // namespace
} // namespace wce

PYBIND11_MODULE(_C, m) {
  m.def("cross_entropy", wce::cross_entropy_entry);
  m.def("cross_entropy_with_options", wce::cross_entropy_with_options);
  m.def("cross_entropy_with_stats", wce::stats_entry);
  m.def("route", wce::route_entry, py::arg("input"), py::arg("target"), py::arg("weight"),
        py::arg("log_prior"), py::arg("sample_weight"), py::arg("normalizer"));
  wce::def_loss(m, "loss", wce::loss_entry);
  wce::def_loss(m, "check_loss", wce::check_loss_entry);
  wce::def_rows(m, "rows", wce::rows_entry);
  wce::def_rows(m, "check_rows", wce::check_rows_entry);
  m.def("scaled_log_prior", wce::scaled_log_prior, py::arg("class_prior"), py::arg("is_log"),
        py::arg("tau"), py::arg("input"));
  m.def("cpu_isas", wce::cpu_isas);
  m.def("get_cpu_isa", wce::get_cpu_isa);
  m.def("set_cpu_isa", wce::set_cpu_isa, py::arg("name") = py::none());
  m.def("force_cpu_regime", wce::force_cpu_regime, py::arg("name") = py::none());
  m.def("force_cpu_exp", wce::force_cpu_exp, py::arg("name") = py::none());
  m.def("empty_cache", wce::empty_gradient_cache);
  m.def("build_info", wce::build_info);
}

"""Arguments as users give them -> tensors as the operators take them.

An error names the argument, what was expected and what came. Shapes and devices are checked by the
operators, which know the logits' shape in every case.
"""

import math
import numbers
import operator
import os
from typing import NamedTuple

import torch

from . import _C

EMPTY = ("nan", "zero")
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})  # types that override nothing
_PRIOR = "counts or probabilities of shape [C], one per class"


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def describe_type(value):
    shaped = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {list(shaped)}" if shaped else "")


def leave_fused(why):
    """As wce::leave_fused in csrc/torch/autograd.cpp, in a form that torch.compile can trace."""
    if os.environ.get("WCE_STRICT") == "1":
        raise RuntimeError(
            f"WCE_STRICT=1: this call of wce_torch would leave the fused kernels: {why}"
        )


def check_tensors(**named):
    for name, value in named.items():
        if not (isinstance(value, torch.Tensor) or (name == "weight" and value is None)):
            raise TypeError(f"argument '{name}' must be Tensor, not {type(value).__name__}")


def bad_class_weight(weight):
    return ValueError(
        f"weight: expected one real factor per class, shape [C], got {describe(weight)}"
    )


def check_same_device(expected, **named):
    for name, value in named.items():
        if value is not None and value.device != expected:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} ({value.device}) is "
                f"not on the expected device {expected}"
            )


def reduction_code(reduction, size_average=None, reduce=None):
    """0 none, 1 mean, 2 sum; torch's own deprecation warnings and errors."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    return torch.nn._reduction.get_enum(reduction)


def index_number(ignore_index):
    """An int (or SymInt) from int, numpy integer or 0-d tensor."""
    if isinstance(ignore_index, (int, torch.SymInt)) and not isinstance(ignore_index, bool):
        number = ignore_index
    elif isinstance(ignore_index, bool) or not hasattr(ignore_index, "__index__"):
        raise TypeError(f"ignore_index must be int, not {type(ignore_index).__name__}")
    else:
        number = operator.index(ignore_index)
    # A symbol of torch.compile stays free of guards.
    if not torch.compiler.is_compiling() and not -(2**63) <= number < 2**63:
        raise ValueError("Overflow when unpacking long long")
    return number


def real_number(value, name, expected="float"):
    """A float from int, float, numpy number or 0-d tensor."""
    if isinstance(value, float) or (isinstance(value, int) and torch.compiler.is_compiling()):
        return value
    if isinstance(value, torch.Tensor) and not _is_constant(value):
        raise TypeError(
            f"{name} must be {expected}, not Tensor (a 0-d tensor is taken if it has neither "
            f"gradient nor tangent, which a number would lose; got shape {list(value.shape)})"
        )
    if not isinstance(value, (str, bytes)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # several values, too large
            pass
    raise TypeError(f"{name} must be {expected}, not {describe_type(value)}")


def _is_constant(tensor):
    tangent = torch.autograd.forward_ad.unpack_dual(tensor).tangent
    return tensor.dim() == 0 and not tensor.requires_grad and tangent is None


def acc_type(input):
    """The type of all arithmetic for these logits."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def is_autocast(input):
    """Whether autocast is on for the device of these logits."""
    kind = input.device.type  # the compiler of torch 2.11 cannot trace is_autocast_available
    has_autocast = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return has_autocast and torch.is_autocast_enabled(kind)


def empty_zero(empty):
    if empty not in EMPTY:
        raise ValueError(f"empty: expected 'nan' or 'zero', got {empty!r}")
    return empty == "zero"


def is_readable(tensor):
    """Whether values may be looked at without waiting for a device and outside of traces."""
    return tensor.device.type == "cpu" and not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or type(tensor) not in PLAIN
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
    )


def without_grad_wrappers(value):
    """A tensor without what ``torch.func.grad`` and its kin have put around it."""
    functorch = torch._C._functorch
    while isinstance(value, torch.Tensor) and functorch.is_gradtrackingtensor(value):
        value = functorch.get_unwrapped(value)
    return value


def check_tau(tau):
    tau = real_number(tau, "tau")
    if not 0 <= tau < math.inf:  # comparisons, which torch.compile can trace
        raise ValueError(f"tau: expected a finite number that is not negative, got {tau!r}")
    return tau


class LogPrior(NamedTuple):
    """log(q / sum q) of a prior that was checked before; modules keep it."""

    values: torch.Tensor


def log_prior(class_prior, device=None):
    """log(q / sum q) of shape (C) from counts or probabilities."""
    q = class_prior
    if isinstance(q, LogPrior):
        return q.values
    if not isinstance(q, torch.Tensor):
        try:
            q = torch.as_tensor(q, dtype=torch.float64, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"class_prior: expected {_PRIOR}, got {describe(q)}") from error
    if q.dim() != 1 or q.is_complex() or q.dtype == torch.bool or q.numel() == 0:
        raise ValueError(f"class_prior: expected {_PRIOR}, got {describe(q)}")
    q = q.double() if q.device.type in ("cpu", "cuda") else q.float()
    total = q.sum()
    if is_readable(q):
        _check_prior_values(q, total)
    return (q / total).log()


def _check_prior_values(q, total):
    if q.amin().item() >= 0 and 0 < total.item() < math.inf:  # false for nan, too
        return
    bad = ~(torch.isfinite(q) & (q >= 0))
    if bad.any():
        place = int(bad.nonzero()[0])
        raise ValueError(
            "class_prior: expected finite values that are not negative, got "
            f"{q[place].item()} for class {place}"
        )
    if not q.any():
        raise ValueError("class_prior: expected a value above 0 for some class, all are 0")
    raise ValueError(f"class_prior: expected values with a finite sum, got the sum {total.item()}")


_LARGE_TAU = 1e35  # below it tau * log q is finite: log q of a float64 q is above -750


def quick_log_prior(class_prior, tau, input):
    """As scaled_log_prior, in one step, of a constant in the memory of the CPU; None for other
    priors, and where anything is wrong or asks for more."""
    is_log = isinstance(class_prior, LogPrior)
    q = class_prior.values if is_log else class_prior
    if type(tau) is not float or type(q) not in PLAIN or torch.compiler.is_compiling():
        return None
    return _C.scaled_log_prior(q, is_log, tau, input)


def scaled_log_prior(class_prior, tau, input):
    """tau * log q in the type in which the kernels add it to the logits; None for tau = 0."""
    quick = quick_log_prior(class_prior, tau, input)
    if quick is not None:
        return quick
    log_q = log_prior(class_prior, input.device)
    tau = check_tau(tau)
    if input.dim() and log_q.shape[0] != input.shape[0 if input.dim() == 1 else 1]:
        raise ValueError(
            f"class_prior: expected one value per class for logits of shape {list(input.shape)}, "
            f"got shape {list(log_q.shape)}"
        )
    check_same_device(input.device, class_prior=log_q)
    if not tau:
        return None
    scaled = (log_q if tau == 1 else log_q * tau).to(acc_type(input))
    if tau > _LARGE_TAU and is_readable(log_q) and (scaled.isinf() & log_q.isfinite()).any():
        raise ValueError(
            f"tau: expected a number for which tau * log(class_prior) is finite in {scaled.dtype}, "
            f"got {tau!r}"
        )
    return scaled


def per_row(value, name, kind):
    """A tensor argument with one value per row."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a {kind} tensor, got {describe(value)}")
    return value


def number_tensor(number, input):
    """A number as a 0-d tensor of the type of the arithmetic, on the device of the logits."""
    # A product, because torch.compile makes a graph for each value that torch.full gets.
    return number * torch.ones((), dtype=acc_type(input), device=input.device)


def normalizer_tensor(normalizer, input):
    if isinstance(normalizer, torch.Tensor):
        if normalizer.dim() == 0 and normalizer.device != input.device:
            return normalizer.to(input.device, non_blocking=True)
        return normalizer
    if isinstance(normalizer, bool) or not isinstance(normalizer, numbers.Real):
        raise TypeError(
            f"normalizer: expected a number or a 0-d tensor, got {describe(normalizer)}"
        )
    return number_tensor(real_number(normalizer, "normalizer"), input)


def check_mixed_targets(input, target_a, target_b):
    """Two tensors of class numbers, of one shape."""
    named = {"target_a": target_a, "target_b": target_b}
    check_same_device(input.device, **named)
    for name, value in named.items():
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise RuntimeError(f"{name}: expected class numbers, got {describe(value)}")
    if target_b.shape != target_a.shape:
        raise ValueError(
            f"target_b: expected the shape of target_a, {list(target_a.shape)}, "
            f"got {describe(target_b)}"
        )


def mixing_share(lam, input, rows):
    """lam as a tensor: 0-d, or of the shape ``rows`` of the targets."""
    if not isinstance(lam, torch.Tensor):
        lam = real_number(lam, "lam", "a number or a floating point tensor")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam: expected a number from 0 to 1, got {lam!r}")
        return number_tensor(lam, input)
    if lam.dim() and lam.shape not in (rows, rows[:1]):
        raise ValueError(
            f"lam: expected a number, or a tensor of shape {list(rows[:1])} (one value per "
            f"sample) or {list(rows)} (one per row), got {describe(lam)}"
        )
    if not lam.is_floating_point():
        raise ValueError(f"lam: expected a floating point tensor, got {describe(lam)}")
    if lam.dim() == 0 and lam.is_cpu:
        lam = lam.to(input.device, non_blocking=True)
    check_same_device(input.device, lam=lam)
    if is_readable(lam) and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"lam: expected values from 0 to 1, got {lam.min()} to {lam.max()}")
    if lam.dim() < len(rows) and lam.dim():
        lam = lam.reshape([-1] + [1] * (len(rows) - 1)).expand(rows)
    return lam

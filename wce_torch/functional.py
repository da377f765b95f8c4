"""``cross_entropy``, the way a call takes, and sums of class weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from . import _C, arguments, composite

# Called where only torch knows what to do. Saved here, because patch() replaces the attribute.
native_loss = torch._C._nn.cross_entropy_loss
_native_cross_entropy = F.cross_entropy

fused = _C.cross_entropy
is_compiling = torch.compiler.is_compiling
PLAIN = arguments.PLAIN
_PLAIN_OR_NONE = PLAIN | {type(None)}
_PRIORS = _PLAIN_OR_NONE | {arguments.LogPrior}


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    class_prior: Tensor | Sequence[float] | None = None,
    tau: float = 1.0,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    skip_empty_targets: bool = False,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
) -> Tensor:
    r"""Weighted cross entropy of logits, a drop-in for ``torch.nn.functional.cross_entropy``.

    For a row with logits :math:`x_1 \dots x_C` and index target :math:`y`:

    .. math:: l = w_y \Bigl(-x_y + \log \sum_j e^{x_j}\Bigr)

    and ``reduction='mean'`` divides the sum of :math:`l` by the sum of :math:`w_y`. With label
    smoothing :math:`\varepsilon` the target is :math:`(1-\varepsilon)` of class :math:`y` and
    :math:`\varepsilon/C` of every class (Szegedy et al. 2016); with a soft target :math:`q` it is
    :math:`l = -\sum_c w_c q_c \log p_c`, and the mean divides by the number of rows.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK): float32, float64, bfloat16 or
            float16, with any strides.
        target: class numbers of shape (), (N) or (N, d1, ..., dK): int64, int32, int16 or uint8; or
            probabilities of the shape of ``input``, floating point.
        weight: one factor per class, shape (C), any floating point type.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this target do not count (index targets only).
        reduction: ``'none'`` (a tensor of the index target's shape), ``'mean'`` or ``'sum'``.
        label_smoothing: from 0 to 1.
        class_prior: counts or probabilities q of the classes, shape (C): the loss is then that of
            :math:`p_k = q_k^\tau e^{x_k} / \sum_j q_j^\tau e^{x_j}` (logit adjustment, Menon et
            al. 2021; balanced softmax, Ren et al. 2020). Only ratios matter. A class with q = 0
            never gets probability: an index target on it is an error, a share of it in a soft
            target or by label smoothing makes the loss infinite.
        tau: strength of the prior, a finite number that is not negative.
        sample_weight: one factor per row, shape of the index target; ``'mean'`` divides by the
            sum of class weight times sample weight (index targets) or of sample weights (soft
            targets) over the rows that count.
        mask: bool, shape of the index target: rows with False do not count.
        skip_empty_targets: rows whose soft target is all zero do not count.
        normalizer: a number or 0-d tensor that replaces the denominator of ``'mean'``; it has no
            effect on the other reductions.
        empty: what ``'mean'`` is when no row counts: ``'nan'``, as in torch, or ``'zero'``.

    Returns:
        The loss in the logits' type (under autocast float32; with soft targets the promoted type
        of logits, target and weight). Arithmetic is in float32, for float64 logits in float64,
        and rounded once.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``; the position is named.
        ValueError, RuntimeError, TypeError, NotImplementedError: as in torch, with its texts; new
            arguments name themselves, what was expected and what came.

    The gradient is that of the logits in one pass; gradients with respect to soft targets,
    weights, priors and sample weights, gradients of gradients, forward-mode AD and ``torch.func``
    work too, through plain PyTorch operations. :func:`explain` says which way a call takes.
    """
    if (
        type(input) in PLAIN
        and type(target) in PLAIN
        and (weight is None or type(weight) in PLAIN)
        and size_average is None
        and reduce is None
        and normalizer is None
        and skip_empty_targets is False
        and empty == "nan"
        and not is_compiling()
        and not has_torch_function_variadic(input, target)
    ):
        if (
            class_prior is None
            and sample_weight is None
            and mask is None
            and type(tau) is float
            and tau == 1.0
        ):
            # Positions as in torch: the whole cost of Python on a small loss is these few tests.
            if reduction == "mean":
                return fused(input, target, weight, 1, ignore_index, label_smoothing)
            if reduction == "none":
                return fused(input, target, weight, 0, ignore_index, label_smoothing)
            if reduction == "sum":
                return fused(input, target, weight, 2, ignore_index, label_smoothing)
        else:
            result = _fused_with_options(
                input,
                target,
                weight,
                ignore_index,
                reduction,
                label_smoothing,
                class_prior,
                tau,
                sample_weight,
                mask,
            )
            if result is not None:
                return result
    options = {
        "class_prior": class_prior,
        "tau": tau,
        "sample_weight": sample_weight,
        "mask": mask,
        "skip_empty_targets": skip_empty_targets,
        "normalizer": normalizer,
        "empty": empty,
    }
    legacy = (size_average, ignore_index, reduce, reduction, label_smoothing)
    if has_torch_function((input, target, weight)):
        return _overridden(input, target, weight, legacy, options)
    return _general(input, target, weight, *legacy, **options)


def _fused_with_options(
    input,
    target,
    weight,
    ignore_index,
    reduction,
    label_smoothing,
    class_prior,
    tau,
    sample_weight,
    mask,
):
    """The loss of a call that needs no more of Python than log(class_prior); else None.

    A small call with a prior takes 5 us instead of 19."""
    if (
        type(class_prior) not in _PRIORS
        or type(sample_weight) not in _PLAIN_OR_NONE
        or type(mask) not in _PLAIN_OR_NONE
        or type(tau) is not float
        or not 0 <= tau < math.inf
        or reduction not in ("none", "mean", "sum")
    ):
        return None
    log_prior = None
    if class_prior is not None:
        log_prior = arguments.quick_log_prior(class_prior, tau, input)
        if log_prior is None:
            return None
    return _C.cross_entropy_with_options(
        input,
        target,
        weight,
        arguments.reduction_code(reduction),
        ignore_index,
        label_smoothing,
        log_prior,
        sample_weight,
        mask,
    )


def _general(
    input,
    target,
    weight,
    size_average,
    ignore_index,
    reduce,
    reduction,
    label_smoothing,
    **options,
):
    code = arguments.reduction_code(reduction, size_average, reduce)
    plain = not _has_options(options)
    if not are_tensors(input, target, weight):  # native raises the TypeError
        return native_loss(input, target, weight, code, ignore_index, label_smoothing)
    why = needs_native(input, target, weight)
    if why is not None and plain:
        arguments.leave_fused(why)
        return native_loss(input, target, weight, code, ignore_index, label_smoothing)
    args = (
        input,
        target,
        weight,
        code,
        arguments.index_number(ignore_index),
        arguments.real_number(label_smoothing, "label_smoothing"),
    )
    extra = {} if plain else operator_options(input, **options)
    return loss(why, *args, **extra)


class Forms(NamedTuple):
    """One function in four forms with the same arguments."""

    operator: Callable  # for torch.compile, torch.export and __torch_function__
    eager: Callable  # the operator by a shorter way, which these do not see
    composite: Callable
    check: Callable  # of the arguments, as the operator's kernels do it


_LOSS = Forms(torch.ops.wce.cross_entropy, _C.loss, composite.composite, _C.check_loss)


def operator_or_composite(why, forms, *args, **keywords):
    """The operator, or, where it does not take the type of a tensor (why), the composite. Checked
    here where the operator cannot: transforms of torch.func hide the values of targets from it."""
    if why is not None:
        arguments.leave_fused(why)
    traced = is_compiling()
    if not traced and (why is not None or torch._C._are_functorch_transforms_active()):
        plain = arguments.without_grad_wrappers
        forms.check(*map(plain, args), **{name: plain(v) for name, v in keywords.items()})
    if why is not None:
        return forms.composite(*args, **keywords)
    traced = traced or has_torch_function((*args, *keywords.values()))
    return (forms.operator if traced else forms.eager)(*args, **keywords)


def loss(why, input, *args, **options):
    """The operator ``cross_entropy``, or its composite, which autocast does not reach by itself."""
    if why is not None:
        options["out_fp32"] = arguments.is_autocast(input)
    return operator_or_composite(why, _LOSS, input, *args, **options)


# A program of TorchScript that calls this function gets torch's own.
cross_entropy.__prepare_scriptable__ = lambda: _native_cross_entropy


def _overridden(input, target, weight, legacy, options):
    """``__torch_function__`` of a type gets native's function, so that tables keyed on it match; a
    mode gets ours, so that tracers record our operator."""
    names = ("size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    keywords = dict(zip(names, legacy, strict=True))
    if needs_native(input, target, weight) is not None and not _has_options(options):
        arguments.leave_fused(needs_native(input, target, weight))
        return _native_cross_entropy(input, target, weight, **keywords)
    return handle_torch_function(
        cross_entropy,
        (input, target, weight),
        input,
        target,
        weight=weight,
        **keywords,
        **options,
    )


def operator_options(
    input, class_prior, tau, sample_weight, mask, skip_empty_targets, normalizer, empty
):
    """The keyword arguments of the operators for those of :func:`cross_entropy`."""
    arguments.check_tau(tau)
    if not isinstance(skip_empty_targets, bool):
        raise TypeError(
            "skip_empty_targets: expected a bool, got " + arguments.describe(skip_empty_targets)
        )
    extra = {"empty_zero": arguments.empty_zero(empty), "skip_empty": skip_empty_targets}
    if class_prior is not None:
        extra["log_prior"] = arguments.scaled_log_prior(class_prior, tau, input)
    if sample_weight is not None:
        extra["sample_weight"] = arguments.per_row(sample_weight, "sample_weight", "float")
    if mask is not None:
        extra["mask"] = arguments.per_row(mask, "mask", "bool")
    if normalizer is not None:
        extra["normalizer"] = arguments.normalizer_tensor(normalizer, input)
    return extra


def _has_options(options):
    return (
        type(options["tau"]) is not float
        or options["tau"] != 1.0
        or options["empty"] != "nan"
        or any(
            options[name] is not None
            for name in ("class_prior", "sample_weight", "mask", "normalizer")
        )
        or options["skip_empty_targets"] is not False
    )


# ---- which way ---------------------------------------------------------------------------------


def are_tensors(input, target, weight):
    return (
        isinstance(input, torch.Tensor)
        and isinstance(target, torch.Tensor)
        and (weight is None or isinstance(weight, torch.Tensor))
    )


def _is_known_type(kind):
    """Tensor itself, and the two that tracers of PyTorch 2 use in its place."""
    return kind in PLAIN or (
        kind.__module__.startswith("torch._subclasses.")
        and kind.__name__ in ("FakeTensor", "FunctionalTensor")
    )


def needs_native(*tensors):
    """Why a call must go to torch's own operator, as far as Python alone can tell; or None."""
    for tensor in tensors:
        if tensor is not None and not _is_known_type(type(tensor)):
            return f"tensor subclass {type(tensor).__name__}"
    if is_compiling() and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "export to ONNX"
    return None


class Explanation(NamedTuple):
    """Which way a call takes: path is ``'fused'``, ``'composite'`` or ``'native'``."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def explain(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    class_prior: Tensor | Sequence[float] | None = None,
    tau: float = 1.0,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    skip_empty_targets: bool = False,
    normalizer: float | Tensor | None = None,
    empty: str = "nan",
) -> Explanation:
    """Says which way ``cross_entropy`` with the same arguments takes, here and now, and why.

    Returns:
        ``(path, reason)``. ``'fused'``: one pass of a kernel for the loss, one for the gradient;
        ``'composite'``: plain PyTorch operations, ``wce_torch/composite.py``; ``'native'``:
        PyTorch's own operator.

    With the environment variable ``WCE_STRICT=1`` calls that are not fused raise a RuntimeError. A
    gradient of the gradient is always composite; that is known only in its backward.
    """
    options = {
        "class_prior": class_prior,
        "tau": tau,
        "sample_weight": sample_weight,
        "mask": mask,
        "skip_empty_targets": skip_empty_targets,
        "normalizer": normalizer,
        "empty": empty,
    }
    arguments.reduction_code(reduction, size_average, reduce)
    arguments.check_tensors(input=input, target=target, weight=weight)
    plain = not _has_options(options)
    extra = {} if plain else operator_options(input, **options)
    why = needs_native(input, target, weight)
    if why is not None:
        return Explanation("native" if plain else "composite", why)
    if torch._C._are_functorch_transforms_active():
        return Explanation("composite", "a transform of torch.func is active")
    if torch._C._get_tracing_state() is not None:
        native = plain and not arguments.is_autocast(input)
        return Explanation("native" if native else "composite", "TorchScript is tracing")
    path, why = _C.route(
        input,
        target,
        weight,
        extra.get("log_prior"),
        extra.get("sample_weight"),
        extra.get("normalizer"),
    )
    if path == "fused":
        kernel = f"{_C.get_cpu_isa()} kernels" if input.is_cpu else f"{input.device.type} kernels"
        return Explanation(path, f"{kernel}, {_dtype_name(input)} logits")
    return Explanation(path, why)


def _dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def check_class_weight(weight):
    """torch takes the weight of an index target as a constant; so do we, and say so."""
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "wce::cross_entropy is not differentiable with respect to argument 'weight'. "
            "This input cannot have requires_grad True."
        )


# ---- the mean's denominator --------------------------------------------------------------------


def class_weight_sum(
    target: Tensor, weight: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """The denominator of ``reduction='mean'`` for index targets: the sum of the weights of the
    classes in ``target``, or their number without ``weight``.

    Sum it over micro-batches and processes and hand it to ``normalizer``, or divide
    ``reduction='sum'`` by it: an average of means over batches with different sums is not the mean
    over all rows.

    Args:
        target: class numbers of any shape (an integer type).
        weight: one factor per class, shape (C).
        ignore_index: targets with this value do not count.

    Returns:
        A 0-d float32 tensor on the target's device; nothing waits for the device.

    Raises:
        TypeError: ``target`` is not a tensor of integers.
        IndexError: (CPU) a target is neither a class of ``weight`` nor ``ignore_index``.
    """
    if (
        not isinstance(target, torch.Tensor)
        or target.is_floating_point()
        or target.is_complex()
        or target.dtype == torch.bool
    ):
        raise TypeError(
            "target: expected a tensor of class numbers, got " + arguments.describe(target)
        )
    arguments.check_tensors(weight=weight)
    arguments.check_same_device(target.device, weight=weight)
    target = target.long()
    counts = target != arguments.index_number(ignore_index)
    if weight is None:
        return counts.sum().to(torch.float32)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"argument 'weight' must be Tensor, not {type(weight).__name__}")
    if weight.dim() != 1 or weight.is_complex():
        raise arguments.bad_class_weight(weight)
    y = torch.where(counts, target, 0)
    if arguments.is_readable(y) and y.numel():
        _check_classes(y, weight.numel())
    picked = weight.detach().to(torch.float64)[y] if _has_float64(weight) else weight.detach()[y]
    return torch.where(counts, picked, 0).sum().to(torch.float32)


def _has_float64(tensor):
    return tensor.device.type in ("cpu", "cuda")


def _check_classes(y, classes):
    low, high = (int(v) for v in y.aminmax())
    bad = low if low < 0 else high
    if bad < 0 or bad >= classes:
        raise IndexError(f"Target {bad} is out of bounds. (classes are 0..{classes - 1})")

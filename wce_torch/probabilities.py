"""Cross entropy of probabilities and of log-probabilities, whatever they come from.

`nll_loss` and `NLLLoss` take log-probabilities and stand in for torch's; `cross_entropy_from_probs`
takes probabilities. Nothing here knows about softmax: the probabilities may come from a mixture of
models, a k-nearest-neighbour vote, a physical model or a file.

An index target needs one number of each row, so there is no pass over (N, C) to speed up and plain
torch operations do: every row is picked by torch's own `nll_loss(reduction="none")`, which is
parallel, deterministic, works on strided input without a copy, checks the targets and has
derivatives of every kind. What is added here is the arithmetic on the picked numbers: float32 (or
float64), in an order that does not depend on the number of threads.

A soft target needs a pass over two tensors. It runs in blocks that stay in the cache, and the
gradient is the only tensor of size (N, C) that it makes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import arguments
from .functional import are_tensors, needs_native

__all__ = ["NLLLoss", "cross_entropy_from_probs", "nll_loss"]

_REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's numbers
_LOGIT_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_NARROW_INDEX_DTYPES = frozenset({torch.uint8, torch.int16, torch.int32})
_SERIAL = 32768  # elements up to which torch's own loops stay on one thread
_BLOCK = 1 << 18  # elements of a block of soft targets: 1 MiB of float32 per operand


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood loss: `torch.nn.functional.nll_loss`, more accurate and parallel.

    Per row, with `w_c` the class weight (1 without `weight`) and `y` the target::

        loss = -w_y * input_y        0 where y == ignore_index

    "mean" divides the sum by the sum of `w_y` over the rows that count.

    Args:
        input: log-probabilities, shape (C), (N, C) or (N, C, d1, ..., dK), any strides.
        target: class indices in [0, C) or `ignore_index`, shape (), (N) or (N, d1, ..., dK).
        weight: class weights, shape (C), any floating dtype; not differentiable, as in torch.
        size_average, reduce: deprecated, as in torch; they override `reduction`.
        ignore_index: target value of rows that do not count.
        reduction: "none", "mean" or "sum".

    Returns:
        A 0-d tensor for "mean" and "sum", else the shape of `target`; dtype of `input` (float32
        under autocast for 16-bit input). The unit is the nat where `input` is a natural logarithm.

    Differences from torch, all of them of the same kind as those of `wce_torch.cross_entropy`:
    16-bit input is weighted and summed in float32 and rounded once; the result has the same bits
    for any number of threads and in every run; uint8, int16 and int32 targets and weights of
    another floating dtype are accepted; autocast makes no float32 copy of `input`; non-contiguous
    input is not copied. Errors have torch's types and texts.

    Raises:
        IndexError: a target is neither in [0, C) nor `ignore_index`; value and position are named.
        ValueError: batch sizes differ, or the reduction is unknown.
        RuntimeError: other shapes that do not fit; a weight that requires grad.
    """
    if not are_tensors(input, target, weight) or needs_native(input, target, weight):
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    reduction = _REDUCTIONS[arguments.reduction_code(reduction, size_average, reduce)]
    if _torch_does_as_well(input, target, weight, reduction) or _torch_raises(input, weight):
        return _torch_nll_loss(input, target, weight, ignore_index, reduction)
    autocast = arguments.is_autocast(input)
    with _without_autocast(input):
        target = _wide(target)
        if _is_small(input):
            loss = _small_nll_loss(input, target, weight, ignore_index, reduction)
            return _rounded(loss, input.dtype, autocast)
        loss = _pick_negated(input, target, ignore_index).to(_acc(input.dtype))
        row_weight = _row_weight(weight, input, target, ignore_index)
        if row_weight is not None:
            loss = loss * row_weight
        loss = _reduce(loss, row_weight, target, ignore_index, reduction)
        return _rounded(loss, input.dtype, autocast)


class NLLLoss(torch.nn.NLLLoss):
    """`torch.nn.NLLLoss` by `wce_torch.nll_loss`: same arguments, same buffers and state_dict."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


def cross_entropy_from_probs(
    probs: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of probabilities that came from anywhere; no softmax is involved.

    Per row, with predicted probabilities `y`, target probabilities `t` (1 at the target class for
    an index target) and class weights `w` (1 without `weight`)::

        loss = -sum_c w_c * t_c * log(y_c)        with 0 log 0 = 0

    "mean" has the denominators of `torch.nn.functional.cross_entropy`: for an index target the sum
    of `w_target` over the rows that count, for soft targets the number of rows.

    Derivatives: `d/dy_c = -w_c t_c / y_c`, `d/dt_c = -w_c log y_c` (soft targets),
    `d/dw_c = -t_c log y_c` (soft targets). Where a term's coefficient `w_c t_c` is 0 and
    `y_c` is 0, the term is 0 and so are all of its derivatives. Where the coefficient is not 0 and
    `y_c` is 0, the loss is +inf and the derivative with respect to `y_c` is -inf, which is true:
    such a prediction was certain and wrong. Keep `y` away from 0 if that is not wanted.

    Rows of `probs` need not sum to 1, and no check is made that they do. The gradient is that of
    the formula as it stands: it does not know that probabilities must sum to 1. A step along it
    is meaningful for parameters from which the probabilities are computed, not for `y` itself. If
    the probabilities come from a softmax, `cross_entropy` on the logits is faster and does not
    lose what rounds to 0 or 1.

    Args:
        probs: shape (C), (N, C) or (N, C, d1, ..., dK), any strides.
        target: class indices, shape (), (N) or (N, d1, ..., dK), or probabilities with the shape
            of `probs` (the shape alone decides, as in torch).
        weight: class weights, shape (C); differentiable with soft targets only.
        ignore_index: index target of rows that do not count; not for soft targets.
        reduction: "none", "mean" or "sum".

    Returns:
        A 0-d tensor for "mean" and "sum", else the shape of an index target. The unit is the nat.
        Arithmetic in float32, in float64 if an operand has it, one rounding at the end. The dtype
        is that of `probs`; with soft targets the promoted dtype of all operands; float32 at least
        under autocast.

    Raises:
        IndexError, ValueError, RuntimeError: as `nll_loss`; for soft targets as
            `torch.nn.functional.cross_entropy`.

    Source: the definition of cross entropy, e.g. Cover and Thomas, Elements of Information
    Theory, 2nd ed., section 2.3 (with 0 log 0 = 0, section 2.1).
    """
    reduction = _REDUCTIONS[arguments.reduction_code(reduction)]
    arguments.check_tensors(probs=probs, target=target, weight=weight)
    arguments.check_same_device(probs.device, target=target, weight=weight)
    ignore_index = arguments.index_number(ignore_index)
    if not probs.is_floating_point():
        raise NotImplementedError(
            f"cross_entropy_from_probs: not implemented for probs of type {probs.dtype}"
        )
    if probs.shape == target.shape:
        return _soft(probs, target, weight, ignore_index, reduction)
    if _torch_raises(probs, weight):
        _torch_nll_loss(probs, target, weight, ignore_index, "none")
    autocast = arguments.is_autocast(probs)
    with _without_autocast(probs):
        target = _wide(target)
        picked = -_pick_negated(probs, target, ignore_index)
        # An ignored row gets probability 1: log 1 = 0, and its derivative is finite.
        prob = torch.where(target == ignore_index, 1, picked).to(_acc(probs.dtype))
        row_weight = _row_weight(weight, probs, target, ignore_index)
        one = prob.new_ones(()) if row_weight is None else row_weight
        loss = -_xlogy(one, prob)
        loss = _reduce(loss, row_weight, target, ignore_index, reduction)
        return _rounded(loss, probs.dtype, autocast)


# ---- index targets ----------------------------------------------------------------------------


def _torch_does_as_well(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> bool:
    """Whether torch's own loss has all that is promised: deterministic, accurate, no copy.

    That is so on one CPU thread, and leaves small calls as fast as torch's (3 us, not 11 us).
    """
    if torch.compiler.is_compiling() or not input.is_cpu:
        return False
    if input.dtype not in (torch.float32, torch.float64) or target.dtype != torch.int64:
        return False
    if weight is not None and weight.dtype != input.dtype:
        return False
    return input.is_contiguous() and (reduction == "none" or target.numel() <= _SERIAL)


def _is_small(input: Tensor) -> bool:
    """Whether the input is worth a copy that saves many small operations."""
    # Asked first: a traced graph would be bound to sizes on one side of the limit.
    if torch.compiler.is_compiling():
        return False
    return input.is_cpu and input.numel() <= _SERIAL


def _small_nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """torch's own loss of a copy in the type of the arithmetic, not rounded yet."""
    acc = _acc(input.dtype)
    wide = input.to(acc, memory_format=torch.contiguous_format)
    wide_weight = None if weight is None else weight.to(acc)
    return _torch_nll_loss(wide, target, wide_weight, ignore_index, reduction)


def _torch_raises(input: Tensor, weight: Tensor | None) -> bool:
    """Whether an argument is one that torch refuses (or reads in a way of its own): let it."""
    if input.dtype not in _LOGIT_DTYPES or input.dim() == 0:
        return True
    if weight is None:
        return False
    if not weight.is_floating_point() or weight.shape != (input.shape[_class_dim(input)],):
        return True
    return weight.requires_grad and torch.is_grad_enabled()


def _pick_negated(table: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """table (N, C, d...), target (N, d...) -> -table[n, target[n]], exact; 0 where ignored."""
    gathers = table.dim() > 2 and not table.is_contiguous()
    gathers &= target.dtype == torch.int64 and target.shape == table.shape[:1] + table.shape[2:]
    if not gathers:
        return _torch_nll_loss(table, target, None, ignore_index, "none")
    # Here torch's loss would copy the table, or fail in backward (channels_last, torch 2.13).
    counts = target != ignore_index
    index = torch.where(counts, target, 0).unsqueeze(1)
    try:
        picked = table.gather(1, index).squeeze(1)
    except RuntimeError:
        _raise_if_out_of_bounds(table, target, ignore_index)
        raise
    return torch.where(counts, -picked, 0)


def _row_weight(
    weight: Tensor | None, input: Tensor, target: Tensor, ignore_index: int
) -> Tensor | None:
    """weight (C) -> w[target], shape of the target, 0 where ignored."""
    if weight is None:
        return None
    table = -weight.detach().to(_acc(input.dtype))
    table = table.expand(target.numel(), -1)  # stride 0: no copy
    return _pick_negated(table, target.reshape(-1), ignore_index).view(target.shape)


def _reduce(
    loss: Tensor, row_weight: Tensor | None, target: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return _ordered_sum(loss)
    if row_weight is None:
        return _ordered_sum(loss) / (target != ignore_index).sum().to(loss.dtype)
    return _ordered_sum(loss) / _ordered_sum(row_weight)


def _torch_nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    try:
        return F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=reduction)
    except IndexError:
        _raise_if_out_of_bounds(input, target, ignore_index)
        raise


def _raise_if_out_of_bounds(table: Tensor, target: Tensor, ignore_index: int) -> None:
    """torch's error for a target out of range, with the position added. Only after a failure."""
    if torch.compiler.is_compiling() or not target.is_cpu or table.dim() == 0:
        return
    classes = table.shape[_class_dim(table)]
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    for position in bad.nonzero()[:1].tolist():
        raise IndexError(
            f"Target {target[tuple(position)]} is out of bounds. "
            f"It is at position {position} of the target, and there are {classes} classes."
        )


# ---- soft targets -----------------------------------------------------------------------------


def _soft(
    probs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    _check_soft(probs, target, weight, ignore_index)
    dtype = torch.promote_types(probs.dtype, target.dtype)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
        weight = weight.view((-1,) + (1,) * (probs.dim() - 1 - _class_dim(probs)))
    autocast = arguments.is_autocast(probs)
    with _without_autocast(probs):
        if _wants_formula(probs, target, weight):
            rows = _soft_formula(probs, target, weight, _acc(dtype))
        else:
            rows = _SoftRows.apply(probs, target, weight, _acc(dtype))
        if reduction != "none":
            rows = _ordered_sum(rows)
        if reduction == "mean":
            rows = rows / _row_count(probs)
        return _rounded(rows, dtype, autocast)


def _check_soft(probs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    if not target.is_floating_point():
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities, got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    if probs.dim() == 0:
        raise IndexError("Dimension out of range: probs must have at least one dimension, got 0")
    classes = probs.shape[_class_dim(probs)]
    if weight is not None and weight.is_complex():
        raise arguments.bad_class_weight(weight)
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(
            "cross_entropy: weight tensor should be defined either for all "
            f"{classes} classes or no classes but got weight tensor of shape: {list(weight.shape)}"
        )


def _wants_formula(probs: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether something has to look into the computation: then it is plain operations."""
    others_need_grad = target.requires_grad or (weight is not None and weight.requires_grad)
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and others_need_grad)
        or needs_native(probs, target, weight) is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _coefficient(target: Tensor, weight: Tensor | None, acc: torch.dtype) -> Tensor:
    """a = w*t."""
    return target.to(acc) if weight is None else target.to(acc) * weight.to(acc)


def _soft_formula(probs: Tensor, target: Tensor, weight: Tensor | None, acc: torch.dtype) -> Tensor:
    """(N, C, d...) -> (N, d...): the definition, differentiable in each argument to any order."""
    coefficient = _coefficient(target, weight, acc)
    return -_sum_classes(_xlogy(coefficient, probs.to(acc)), _class_dim(probs))


class _SoftRows(torch.autograd.Function):
    """The same, block by block, for a gradient with respect to `probs` alone."""

    @staticmethod
    def forward(ctx, probs, target, weight, acc):
        ctx.save_for_backward(probs, target, weight)
        ctx.acc = acc
        dim = _class_dim(probs)
        rows = probs.new_empty(probs.shape[:dim] + probs.shape[dim + 1 :], dtype=acc)
        for block, block_rows in _blocks(probs.shape):
            coefficient = _coefficient(target[block], weight, acc)
            terms = torch.special.xlogy(coefficient, probs[block].to(acc))
            rows[block_rows] = _sum_classes(terms, dim).neg_()
        return rows

    @staticmethod
    def backward(ctx, grad):
        probs, target, weight = ctx.saved_tensors
        # create_graph wants a gradient with a graph; batched gradients and compiled autograd want
        # nothing in place.
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._functorch.is_legacy_batchedtensor(grad)
        ):
            return _differentiable_gradient(probs, target, weight, ctx.acc, grad), None, None, None
        dim = _class_dim(probs)
        result = torch.empty_like(probs)
        for block, block_rows in _blocks(probs.shape):
            coefficient = _coefficient(target[block], weight, ctx.acc)
            y = probs[block].to(ctx.acc)
            empty = (coefficient == 0) & (y <= 0)
            slope = (coefficient / y).masked_fill_(empty, 0)
            torch.mul(slope, -grad[block_rows].unsqueeze(dim), out=slope)
            result[block] = slope
        return result, None, None, None


def _differentiable_gradient(probs, target, weight, acc, grad):
    coefficient = _coefficient(target, weight, acc)
    y = probs.to(acc)
    empty = (coefficient == 0) & (y <= 0)
    slope = coefficient / torch.where(empty, 1, y)
    return (-grad.unsqueeze(_class_dim(probs)) * slope).to(probs.dtype)


def _blocks(shape: torch.Size) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Index of a block of a (N, C, d1, ...) tensor, and of the same block's (N, d1, ...) rows."""
    if len(shape) == 1 or math.prod(shape) == 0:
        yield (slice(None),), (slice(None),) * (len(shape) > 1)
        return
    sample = math.prod(shape[1:])
    samples = max(1, _BLOCK // sample)
    inner = shape[2] if len(shape) > 2 else 1
    columns = max(1, inner * _BLOCK // sample)  # of d1, where one sample is larger than a block
    for n in range(0, shape[0], samples):
        some = slice(n, n + samples)
        if len(shape) == 2 or sample <= _BLOCK:
            yield (some,), (some,)
            continue
        for d in range(0, inner, columns):
            part = slice(d, d + columns)
            yield (some, slice(None), part), (some, part)


# ---- shared -----------------------------------------------------------------------------------


def _xlogy(a: Tensor, y: Tensor) -> Tensor:
    """a*log(y); 0 where a is 0, and then without a derivative where y is 0.

    torch.special.xlogy has the right value, but its derivative with respect to y is nan at 0, 0.
    """
    return torch.special.xlogy(a, torch.where((a == 0) & (y <= 0), 1, y))


def _sum_classes(terms: Tensor, dim: int) -> Tensor:
    """Sum over the classes. torch cuts it among threads only when there is a single row."""
    if _row_count(terms) == 1:
        return _ordered_sum(terms).view(terms.shape[:dim] + terms.shape[dim + 1 :])
    return terms.sum(dim)


def _ordered_sum(values: Tensor) -> Tensor:
    """Sum to 0-d. torch cuts a large sum into one part per thread, which changes the last bits.

    Sums of fixed length, each by one thread, do not.
    """
    values = values.reshape(-1)
    if torch.compiler.is_compiling() or values.numel() <= _SERIAL:
        return values.sum()
    whole = values.numel() // 4096 * 4096
    parts = values[:whole].view(-1, 4096).sum(1)
    return _ordered_sum(torch.cat([parts, values[whole:].sum().view(1)]))


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _row_count(probs: Tensor) -> int:
    dim = _class_dim(probs)
    return math.prod(probs.shape[:dim] + probs.shape[dim + 1 :])


def _acc(dtype: torch.dtype) -> torch.dtype:
    """The type of all arithmetic."""
    return torch.promote_types(dtype, torch.float32)


def _wide(target: Tensor) -> Tensor:
    return target.long() if target.dtype in _NARROW_INDEX_DTYPES else target


def _without_autocast(input: Tensor):
    """Autocast would copy 16-bit input to float32; the arithmetic here is in float32 anyway."""
    if arguments.is_autocast(input):
        return torch.autocast(input.device.type, enabled=False)
    return contextlib.nullcontext()


def _rounded(loss: Tensor, dtype: torch.dtype, autocast: bool) -> Tensor:
    return loss.to(torch.promote_types(dtype, torch.float32) if autocast else dtype)

"""The loss, and what the same pass over the logits knows of each row.

The operator ``wce::rows_forward`` gives the loss and, per row, the log-sum-exp and the
log-probability of the target, each differentiable; gradients of all of them reach the logits in one
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import _C, arguments, composite
from .functional import (
    PLAIN,
    Forms,
    check_class_weight,
    is_compiling,
    needs_native,
    operator_options,
    operator_or_composite,
)


class CrossEntropyStats(NamedTuple):
    """Result of :func:`cross_entropy_with_stats`. "per row" is the shape of an index target."""

    loss: Tensor
    lse: Tensor
    log_prob: Tensor | None
    correct: Tensor | None
    entropy: Tensor


def cross_entropy_with_stats(
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
) -> CrossEntropyStats:
    """The loss, and what the same pass over the logits knows of each row.

    Arguments and errors are those of :func:`cross_entropy`. Logits here mean those that the loss
    sees, that is with ``tau * log(q / sum q)`` added where a ``class_prior`` is given.

    Returns:
        A named tuple. Per row and in float32 (float64 for float64 logits):

        * ``loss``: what :func:`cross_entropy` returns;
        * ``lse``: log of the sum of exp of the row's logits, also of rows that do not count;
          differentiable, so that ``loss + z * (lse**2).mean()`` (z-loss) costs no second pass;
        * ``log_prob``: log-probability of the target class, 0 for ignored rows; differentiable;
          None for soft targets;
        * ``correct``: bool, the target class has the largest logit; False for ignored rows; None
          for soft targets;
        * ``entropy``: of the row's probabilities, in nats, from 0 to log C; not differentiable.
    """
    if (  # plain tensors and no option: a small call takes 8 us instead of 38
        type(input) in PLAIN
        and type(target) in PLAIN
        and (weight is None or type(weight) in PLAIN)
        and type(ignore_index) is int
        and size_average is None
        and reduce is None
        and type(label_smoothing) is float
        and label_smoothing == 0.0
        and class_prior is None
        and type(tau) is float
        and tau == 1.0
        and sample_weight is None
        and mask is None
        and skip_empty_targets is False
        and normalizer is None
        and empty == "nan"
        and not is_compiling()
        and not has_torch_function_variadic(input, target)
    ):
        code = 1 if reduction == "mean" else arguments.reduction_code(reduction)
        values = _C.cross_entropy_with_stats(input, target, weight, code, ignore_index)
        if values is not None:
            return CrossEntropyStats._make(values)
    code = arguments.reduction_code(reduction, size_average, reduce)
    arguments.check_tensors(input=input, target=target, weight=weight)
    options = operator_options(
        input, class_prior, tau, sample_weight, mask, skip_empty_targets, normalizer, empty
    )
    soft = input.shape == target.shape
    smoothing = _check_smoothing(label_smoothing)
    ignore_index = arguments.index_number(ignore_index)
    if soft and ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    index, prob = (None, target) if soft else (target, None)
    if not soft:
        check_class_weight(weight)
    loss, _, lse, log_prob, entropy, correct = _rows(
        input,
        index,
        prob,
        weight,
        options.get("log_prior"),
        mask,
        0.0 if soft else 1.0 - smoothing,
        _floor(smoothing, input),
        1.0 - smoothing if soft else 0.0,
        ignore_index,
        options["skip_empty"],
        True,
        sample_weight=sample_weight,
        normalizer=options.get("normalizer"),
        reduction=code,
        empty_zero=options["empty_zero"],
    )
    loss = loss.to(_result_type(input, target, weight, soft))
    if soft:
        return CrossEntropyStats(loss, lse, None, None, entropy)
    return CrossEntropyStats(loss, lse, log_prob, correct, entropy)


_ROWS = Forms(torch.ops.wce.rows_forward, _C.rows, composite.rows_composite, _C.check_rows)


def _rows(input, target, target_prob, weight, *rest, **keywords):
    why = needs_native(input, target, target_prob, weight)
    return operator_or_composite(why, _ROWS, input, target, target_prob, weight, *rest, **keywords)


def _result_type(input, target, weight, soft):
    out_fp32 = arguments.is_autocast(input)
    return composite.result_type(input, target, weight, soft, out_fp32)


def _floor(smoothing, input):
    """What label smoothing gives to every class; without classes the operator raises."""
    classes = input.shape[0 if input.dim() == 1 else 1] if input.dim() else 0
    return smoothing / classes if smoothing and classes else 0.0


def _check_smoothing(label_smoothing):
    smoothing = arguments.real_number(label_smoothing, "label_smoothing")
    if smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {smoothing}")
    return smoothing if smoothing > 0 else 0.0  # also when it is nan

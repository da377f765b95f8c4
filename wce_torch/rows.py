"""Losses that need more of a row than its loss, all from one pass over the logits.

The operator ``wce::rows_forward`` gives, per row, the loss, the log-sum-exp and the log-probability
of one or two classes, each differentiable; gradients of all of them reach the logits in one pass.
What follows it here is of the size of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import arguments, composite
from .functional import check_class_weight, needs_native, operator_options


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
    code = arguments.reduction_code(reduction, size_average, reduce)
    arguments.check_tensors(input, target, weight)
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
    classes = _classes(input)
    loss, _, lse, log_prob, _, entropy, correct = _rows(
        input,
        index,
        None,
        prob,
        weight,
        options.get("log_prior"),
        mask,
        0.0 if soft else 1.0 - smoothing,
        smoothing / classes if smoothing else 0.0,
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


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    class_prior: Tensor | Sequence[float] | None = None,
    tau: float = 1.0,
) -> Tensor:
    """``lam * ce(input, target_a) + (1 - lam) * ce(input, target_b)``, reading the logits once.

    The loss of MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019) with two index targets.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK).
        target_a, target_b: class numbers of shape (), (N) or (N, d1, ..., dK).
        lam: from 0 to 1: a number, or a floating point tensor with one value per sample, (N), or
            per row, the shape of the targets.
        weight, ignore_index, reduction, label_smoothing, class_prior, tau: as in
            :func:`cross_entropy`. ``'mean'`` is the mixture of two means, each with its own
            denominator: the sum of lam * loss / sum of weights, for each target.

    Returns:
        The loss, in the logits' type (under autocast float32).

    Raises:
        ValueError: ``lam`` outside of 0 to 1 (tensors: checked on the CPU), or of another shape.
        Other errors as in :func:`cross_entropy`.
    """
    code = arguments.reduction_code(reduction)
    arguments.check_tensors(input, target_a, weight)
    arguments.check_tensors(input, target_b, weight)
    options = operator_options(input, class_prior, tau, None, None, False, None, "nan")
    smoothing = _check_smoothing(label_smoothing)
    ignore_index = arguments.index_number(ignore_index)
    check_class_weight(weight)
    counts_a, counts_b = target_a.long() != ignore_index, target_b.long() != ignore_index
    # A row that counts for b alone has to be looked at as well, so it takes b in both places; what
    # that gives for a is thrown away below.
    same_shape = target_a.shape == target_b.shape
    first = torch.where(counts_a, target_a.long(), target_b.long()) if same_shape else target_a
    smooth, _, _, log_prob_a, log_prob_b, _, _ = _rows(
        input,
        first,
        target_b,
        None,
        weight,
        options.get("log_prior"),
        None,
        0.0,
        smoothing / _classes(input) if smoothing else 0.0,
        0.0,
        ignore_index,
        False,
        False,
    )
    shares = arguments.mixing_shares(lam, smooth)
    total = 0.0
    for share, target, counts, log_prob in (
        (shares[0], target_a, counts_a, log_prob_a),
        (shares[1], target_b, counts_b, log_prob_b),
    ):
        counts = counts.reshape(smooth.shape)
        row_weights = composite.row_weights(counts, target, weight, None, smooth.dtype)
        picked = composite.minus_product((1.0 - smoothing) * row_weights, log_prob)
        loss = share * torch.where(counts, picked + smooth, 0.0)
        total = total + _reduced(loss, row_weights, code)
    return total.to(_result_type(input, target_a, weight, False))


# ---- shared ------------------------------------------------------------------------------------


def _rows(input, target, target2, target_prob, weight, log_prior, *rest, **keywords):
    why = needs_native(input, target, target2, target_prob, weight)
    args = (input, target, target2, target_prob, weight, log_prior, *rest)
    if why is None:
        return torch.ops.wce.rows_forward(*args, **keywords)
    arguments.leave_fused(why)
    return composite.rows_composite(*args, **keywords)


def _reduced(loss, row_weights, reduction):
    """none, mean or sum of the rows' losses. Sums are taken in float64 where the device has it."""
    if reduction == composite.NONE:
        return loss
    wide = torch.float64 if loss.device.type in ("cpu", "cuda", "meta") else loss.dtype
    total = loss.sum(dtype=wide)
    if reduction == composite.SUM:
        return total
    return total / composite.own_denominator(row_weights.sum(dtype=wide))


def _result_type(input, target, weight, soft):
    autocast = torch.is_autocast_enabled(input.device.type)
    return composite.result_type(input, target, weight, soft, autocast)


def _classes(input):
    return input.shape[0 if input.dim() <= 1 else 1] if input.dim() else 1


def _check_smoothing(label_smoothing):
    smoothing = arguments.real_number(label_smoothing, "label_smoothing")
    if smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {smoothing}")
    return smoothing if smoothing > 0 else 0.0  # also when it is nan

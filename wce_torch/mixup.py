"""MixUp and CutMix: one pass over the logits for two index targets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import arguments
from .functional import check_class_weight, loss, needs_native, operator_options


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
        ValueError: ``lam`` outside of 0 to 1 (tensors: checked on the CPU), or of another shape;
            the shapes of the targets differ.
        RuntimeError: a target that does not hold class numbers, or is on another device.
        Other errors as in :func:`cross_entropy`.
    """
    code = arguments.reduction_code(reduction)
    arguments.check_tensors(input=input, target_a=target_a, target_b=target_b, weight=weight)
    arguments.check_mixed_targets(input, target_a, target_b)
    check_class_weight(weight)
    options = operator_options(input, class_prior, tau, None, None, False, None, "nan")
    args = (
        input,
        target_a,
        weight,
        code,
        arguments.index_number(ignore_index),
        arguments.real_number(label_smoothing, "label_smoothing"),
    )
    options["target2"] = target_b
    options["mix"] = arguments.mixing_share(lam, input, target_a.shape)
    why = needs_native(input, target_a, weight) or needs_native(target_b)
    return loss(why, *args, **options)

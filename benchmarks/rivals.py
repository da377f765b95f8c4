"""Who is measured: for one case a table of functions logits -> loss, by rival.

ours     wce_torch                    eager    the same composed from native PyTorch operations
compile  torch.compile of "eager"     plain    ours without the feature: what does the feature cost?
quack, liger  on CUDA, where they can be imported and know the options of the case
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.cases import Z_LOSS, Case, Data
from benchmarks.verify import MIXUP_LAM

Loss = Callable[[torch.Tensor], torch.Tensor]


def _native(case: Case, data: Data) -> Loss:
    y, w = data.target, data.weight
    reduction, e = case.reduction, case.smoothing
    if case.feature == "class_prior":
        log_prior = data.extra["class_prior"].log().reshape(1, -1, *[1] * (len(case.shape) - 2))
        return lambda x: F.cross_entropy(x + log_prior, y, w, label_smoothing=e)
    if case.feature == "sample_weight":
        s = data.extra["sample_weight"]

        def weighted(x: torch.Tensor) -> torch.Tensor:
            rows = F.cross_entropy(x, y, w, reduction="none", label_smoothing=e)
            return (rows * s).sum() / (s * w[y]).sum()

        return weighted
    if case.feature in ("stats", "z_loss"):

        def with_stats(x: torch.Tensor) -> torch.Tensor:
            log_p = F.log_softmax(x, 1)
            loss = F.nll_loss(log_p, y, w)
            lse = torch.logsumexp(x, 1)
            log_p.gather(1, y.unsqueeze(1))
            _ = x.argmax(1) == y
            _ = -(log_p.detach().exp() * log_p.detach()).sum(1)
            return loss + Z_LOSS * (lse**2).mean() if case.feature == "z_loss" else loss

        return with_stats
    if case.feature == "mixup":
        other = data.extra["target_b"]
        return lambda x: MIXUP_LAM * F.cross_entropy(x, y, w) + (1 - MIXUP_LAM) * F.cross_entropy(
            x, other, w
        )
    return lambda x: F.cross_entropy(x, y, w, reduction=reduction, label_smoothing=e)


def _ours(case: Case, data: Data) -> Loss:
    import wce_torch

    y, w = data.target, data.weight
    reduction, e = case.reduction, case.smoothing
    if case.feature in ("stats", "z_loss"):

        def with_stats(x: torch.Tensor) -> torch.Tensor:
            stats = wce_torch.cross_entropy_with_stats(x, y, w)
            if case.feature == "z_loss":
                return stats.loss + Z_LOSS * (stats.lse**2).mean()
            return stats.loss

        return with_stats
    if case.feature == "mixup":
        other = data.extra["target_b"]
        return lambda x: wce_torch.mixup_cross_entropy(x, y, other, MIXUP_LAM, w)
    ce = wce_torch.cross_entropy
    extra = data.extra
    if extra:
        return lambda x: ce(x, y, w, reduction=reduction, label_smoothing=e, **extra)
    return lambda x: ce(x, y, w, reduction=reduction, label_smoothing=e)


def _plain(case: Case, data: Data) -> Loss:
    import wce_torch

    y, w = data.target, data.weight
    return lambda x: wce_torch.cross_entropy(x, y, w)


def _quack(case: Case, data: Data) -> Loss | None:
    """Rows of classes, index targets, no smoothing; weights in newer versions only."""
    if len(case.shape) != 2 or case.target == "soft" or case.smoothing or case.feature:
        return None
    from quack.cross_entropy import cross_entropy

    y, w = data.target, data.weight
    if "weight" not in inspect.signature(cross_entropy).parameters or case.dtype == "f64":
        return None
    return lambda x: cross_entropy(x, y, weight=w, reduction=case.reduction)


def _liger(case: Case, data: Data) -> Loss | None:
    """Rows of classes, index targets. Writes the gradient over the logits: it gets a copy."""
    if len(case.shape) != 2 or case.target == "soft" or case.feature or case.reduction == "none":
        return None
    from liger_kernel.transformers.functional import liger_cross_entropy

    y, w, e = data.target, data.weight, case.smoothing
    return lambda x: liger_cross_entropy(x, y, w, reduction=case.reduction, label_smoothing=e)


def _under_autocast(loss: Loss, device: str) -> Loss:
    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return loss(x)

    return run


def build(case: Case, data: Data, device: str, ours: str) -> tuple[dict[str, Loss], list[str]]:
    """The rivals that can run eagerly, and remarks about those that cannot.

    ours = "native" puts native in our place: every ratio then is the noise of the measurement.
    """
    table: dict[str, Loss] = {"ours": (_native if ours == "native" else _ours)(case, data)}
    table["eager"] = _native(case, data)
    if case.feature and ours != "native":
        table["plain"] = _plain(case, data)
    notes = []
    for name, make in (("quack", _quack), ("liger", _liger)) if device == "cuda" else ():
        try:
            loss = make(case, data)
        except ImportError as error:
            notes.append(f"{name}: {error}")
            continue
        if loss is not None:
            table[name] = loss
    if case.autocast:
        table = {name: _under_autocast(loss, device) for name, loss in table.items()}
    return table, notes


def compiled(loss: Loss) -> Loss:
    """torch.compile with fixed shapes. The caller warms it up, so compile time is not measured."""
    return torch.compile(loss, dynamic=False)

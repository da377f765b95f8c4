"""Losses that people compose from cross entropy, each in a few lines.

All but LDAM read the logits once in forward and make one tensor of their size, the gradient.
Letters: C classes, x logits (N, C) or (N, C, d1, ...), y targets (N) or (N, d1, ...), n_c how many
training samples class c has.

    python examples/composed_losses.py        prints what each loss makes of one batch
"""

from __future__ import annotations

import torch
from torch import Tensor

from wce_torch import cross_entropy, cross_entropy_with_stats


def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss: mean of -alpha_y * (1 - p_y)^gamma * log p_y; well classified rows count little.

    alpha: class weights, shape (C). gamma: 0 gives cross entropy; at least 1, or the derivative at
    p_y = 1 is infinite. "mean" divides by the number of rows, whatever alpha is.
    Source: Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", ICCV 2017,
    equation 5, for softmax probabilities.
    """
    log_p = cross_entropy_with_stats(input, target, reduction="sum").log_prob
    miss = -torch.expm1(log_p)  # 1 - p_y
    loss = -(miss**gamma) * log_p
    if alpha is not None:
        loss = loss * alpha[target]
    return _reduce(loss, reduction)


def ldam_margins(counts: Tensor, largest: float = 0.5) -> Tensor:
    """Margins of LDAM, shape (C): proportional to n_c^(-1/4), the largest of them as given."""
    margins = counts.double() ** -0.25
    return (margins * (largest / margins.max())).float()


def ldam_loss(
    input: Tensor, target: Tensor, margins: Tensor, scale: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Label-distribution-aware margin loss: the target's logit must win by the margin of its class.

        -log( e^(s*(x_y - D_y)) / (e^(s*(x_y - D_y)) + sum_{j != y} e^(s*x_j)) )

    The authors use cosine logits in [-1, 1] and s = 30. The margin changes one logit of each row,
    in a copy. It could be had from log p_y without the copy, but where p_y rounds to 1 the factor
    e^(s*D) then blows the rounding up: an error of 0.2 at s*D = 15 in float32.
    Source: Cao, Wei, Gaidon, Arechiga, Ma, "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss", NeurIPS 2019, equations 13 and 14.
    """
    own = target.unsqueeze(1)
    moved = input.scatter_add(1, own, -margins.to(input.dtype)[own])
    return cross_entropy(moved if scale == 1 else scale * moved, target, reduction=reduction)


def effective_number_weights(counts: Tensor, beta: float = 0.999) -> Tensor:
    """Class-balanced weights, shape (C), for `cross_entropy(..., weight=)`; they sum to C.

        w_c proportional to (1 - beta) / (1 - beta^(n_c))

    beta = 0 gives equal weights, beta -> 1 weights proportional to 1/n_c.
    Source: Cui, Jia, Lin, Song, Belongie, "Class-Balanced Loss Based on Effective Number of
    Samples", CVPR 2019, equation 2 and section 4.
    """
    effective = -torch.expm1(counts.double() * torch.log(torch.tensor(beta).double()))
    weights = (1 - beta) / effective
    return (weights * (len(counts) / weights.sum())).float()


def balanced_softmax_loss(input: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Balanced softmax: -log( n_y e^(x_y) / sum_j n_j e^(x_j) ). Leave `counts` out at test time.

    Source: Ren, Yu, Sheng, Ma, Zhao, Yi, Li, "Balanced Meta-Softmax for Long-Tailed Visual
    Recognition", NeurIPS 2020, theorem 1.
    """
    return cross_entropy(input, target, class_prior=counts)


def logit_adjusted_loss(
    input: Tensor, target: Tensor, counts: Tensor, tau: float = 1.0
) -> Tensor:
    """Logit adjustment: log(1 + sum_{j != y} (q_j/q_y)^tau e^(x_j - x_y)), q the class frequencies.

    tau = 1 is balanced softmax; a larger tau favours rare classes more.
    Source: Menon, Jayasumana, Rawat, Jain, Veit, Kumar, "Long-Tail Learning via Logit Adjustment",
    ICLR 2021, equation 10.
    """
    return cross_entropy(input, target, class_prior=counts, tau=tau)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return {"none": lambda: loss, "mean": loss.mean, "sum": loss.sum}[reduction]()


def main() -> None:
    torch.manual_seed(0)
    counts = torch.tensor([1000, 200, 40, 8])
    input, target = torch.randn(256, 4), torch.randint(4, (256,))
    weights = effective_number_weights(counts)
    losses = {
        "cross entropy": lambda x: cross_entropy(x, target),
        "focal, gamma = 2": lambda x: focal_loss(x, target),
        "LDAM, largest margin 0.5": lambda x: ldam_loss(x, target, ldam_margins(counts)),
        "effective number, beta = 0.999": lambda x: cross_entropy(x, target, weights),
        "balanced softmax": lambda x: balanced_softmax_loss(x, target, counts),
        "logit adjustment, tau = 1.5": lambda x: logit_adjusted_loss(x, target, counts, 1.5),
    }
    print(f"{f'random logits, classes of {counts.tolist()}':42} {'loss':>8}  gradient per class")
    for name, loss in losses.items():
        x = input.clone().requires_grad_()
        value = loss(x)
        value.backward()
        per_class = " ".join(f"{g:+.4f}" for g in x.grad.sum(0))
        print(f"{name:42} {value:8.4f}  {per_class}")


if __name__ == "__main__":
    main()

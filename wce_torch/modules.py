"""``CrossEntropyLoss``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .functional import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for ``torch.nn.CrossEntropyLoss``: same arguments, same ``state_dict``.

    Args:
        weight: one factor per class, shape (C); a buffer that moves with the module.
        size_average, reduce: deprecated, as in torch.
        ignore_index, reduction, label_smoothing: as in :func:`wce_torch.cross_entropy`.
        class_prior: counts or probabilities of the classes, shape (C). Their logarithm is kept as
            the buffer ``log_prior``; without a prior the ``state_dict`` is native's.
        tau: strength of the prior.
        empty: ``'nan'`` or ``'zero'``, the mean when no row counts.

    Shapes:
        input (C), (N, C) or (N, C, d1, ..., dK); target (), (N), (N, d1, ..., dK) with class
        numbers, or the shape of the input with probabilities; result 0-d, or the shape of the
        index target for ``reduction='none'``.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        class_prior: Tensor | Sequence[float] | None = None,
        tau: float = 1.0,
        empty: str = "nan",
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        arguments.empty_zero(empty)
        self.tau = arguments.check_tau(tau)
        self.empty = empty
        log_prior = None
        if class_prior is not None:
            log_prior = arguments.log_prior(class_prior).detach()
            if getattr(class_prior, "dtype", None) != torch.float64:
                log_prior = log_prior.float()
        self.register_buffer("log_prior", log_prior)

    def __prepare_scriptable__(self):
        """``torch.jit.script`` asks here; the program holds PyTorch's own operator."""
        if self.log_prior is not None or self.empty != "nan":
            raise RuntimeError(
                "wce_torch.CrossEntropyLoss with class_prior or empty='zero' cannot be scripted: "
                "PyTorch's own operator, which TorchScript gets, has neither. torch.jit.trace, "
                "torch.export and torch.compile take it"
            )
        return self

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``target`` under the logits ``input``."""
        if torch.jit.is_scripting():  # TorchScript gets PyTorch's own operator
            return torch.nn.functional.cross_entropy(
                input,
                target,
                self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        else:
            return self._forward(input, target)

    @torch.jit.unused
    def _forward(self, input: Tensor, target: Tensor) -> Tensor:
        if self.log_prior is None and self.empty == "nan":
            return cross_entropy(
                input,
                target,
                self.weight,
                None,
                self.ignore_index,
                None,
                self.reduction,
                self.label_smoothing,
            )
        prior = None if self.log_prior is None else arguments.LogPrior(self.log_prior)
        return cross_entropy(
            input,
            target,
            self.weight,
            None,
            self.ignore_index,
            None,
            self.reduction,
            self.label_smoothing,
            class_prior=prior,
            tau=self.tau,
            empty=self.empty,
        )

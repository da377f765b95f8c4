"""Weighted cross entropy for PyTorch in one pass over the logits."""

import os

import torch  # noqa: F401  (loads the libraries that _C needs)

from . import _C, composite  # noqa: F401  (composite registers operators)
from ._C import build_info, cpu_isas, empty_cache, get_cpu_isa, set_cpu_isa
from .functional import Explanation, class_weight_sum, cross_entropy, explain
from .mixup import mixup_cross_entropy
from .modules import CrossEntropyLoss
from .patching import is_patched, patch, patched, unpatch
from .probabilities import NLLLoss, cross_entropy_from_probs, nll_loss
from .rows import CrossEntropyStats, cross_entropy_with_stats

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "Explanation",
    "NLLLoss",
    "build_info",
    "class_weight_sum",
    "cpu_isas",
    "cross_entropy",
    "cross_entropy_from_probs",
    "cross_entropy_with_stats",
    "empty_cache",
    "explain",
    "get_cpu_isa",
    "is_patched",
    "mixup_cross_entropy",
    "nll_loss",
    "patch",
    "patched",
    "set_cpu_isa",
    "unpatch",
]
__version__ = build_info()["version"]

if os.environ.get("WCE_CPU_ISA"):
    set_cpu_isa(os.environ["WCE_CPU_ISA"])

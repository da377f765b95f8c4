"""The compiled module: the entries of eager mode, and control of the CPU kernels."""

from typing import Any

from torch import Tensor

def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    /,
) -> Tensor:
    """The loss; reduction is 0 none, 1 mean, 2 sum."""

def cross_entropy_with_options(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    log_prior: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    /,
) -> Tensor | None:
    """The same with what needs no more than to be handed on; None inside of torch.func."""

def cross_entropy_with_stats(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, /
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """loss, lse, log_prob, correct and entropy for class numbers and no option; None where a call
    asks for more."""

def loss(*args: Any, **keywords: Any) -> Tensor:
    """torch.ops.wce.cross_entropy by a shorter way."""

def rows(*args: Any, **keywords: Any) -> tuple[Tensor, ...]:
    """torch.ops.wce.rows_forward by a shorter way."""

def scaled_log_prior(
    class_prior: Tensor, is_log: bool, tau: float, input: Tensor
) -> Tensor | None:
    """tau * log(q / sum q), or tau * q where is_log, as the kernels add it to these logits; None
    where q cannot be read at once or is of a rare type, and where anything is wrong."""

def route(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_prior: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
) -> tuple[str, str]:
    """("fused" | "composite" | "native", why) of a call without transforms and traces."""

def check_loss(*args: Any, **keywords: Any) -> None:
    """Raises for arguments of wce::cross_entropy that its kernels would refuse, and for targets out
    of range where their values can be read."""

def check_rows(*args: Any, **keywords: Any) -> None:
    """The same for wce::rows_forward."""

def cpu_isas() -> list[str]:
    """Instruction sets that this build, processor and system support, weakest first."""

def get_cpu_isa() -> str:
    """The instruction set in use."""

def set_cpu_isa(name: str | None = None) -> None:
    """Uses an instruction set, or the best with None. ValueError where it is not in cpu_isas()."""

def force_cpu_regime(name: str | None = None) -> None:
    """For tests: "tile", "rows" or "split" where the layout allows it; None: by the table."""

def force_cpu_exp(name: str | None = None) -> None:
    """For tests: backward in one go may make exps again by AVX-512 ("quick"), or always takes what
    was kept ("slow"); None: by the processor. See order_of in csrc/cpu/rows_both.inc."""

def empty_cache() -> None:
    """Frees the memory on the CPU, one block at most, that is kept from one gradient above 1 MiB to
    the next. The environment variable WCE_KEEP_MEMORY=0 keeps none."""

def build_info() -> dict[str, Any]:
    """version, torch, cuda, cuda_archs, nvcc, compiler, cpu_isas."""

"""Routes PyTorch's own cross entropy through ours.

``F.cross_entropy``, its aliases, ``nn.CrossEntropyLoss`` and its subclasses all end in one
function, ``torch._C._nn.cross_entropy_loss``, which they look up at each call. Replacing it reaches
them all, wherever they were imported; what we do not serve goes on to the original.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils._config_module import _UNSET_SENTINEL

from . import arguments, functional

_TAG = "wce_torch"
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child must not inherit a lock that another thread holds
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )
_scopes = 0  # open `with patched()` blocks, in all threads
_wanted = False  # patch() was called last, not unpatch()
_previous = None  # what the attribute held before; None: not patched
_builtin_registered = False


def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Takes the place of the raw function; ``reduction`` is 0 none, 1 mean or 2 sum."""
    plain = functional.PLAIN
    if (
        type(input) in plain
        and type(target) in plain
        and (weight is None or type(weight) in plain)
        and not functional.is_compiling()
    ):
        return functional.fused(input, target, weight, reduction, ignore_index, label_smoothing)
    args = (input, target, weight, reduction, ignore_index, label_smoothing)
    if not functional.are_tensors(input, target, weight) or has_torch_function(args[:3]):
        return functional.native_loss(*args)
    why = functional.needs_native(input, target, weight)
    if why is not None:
        arguments.leave_fused(why)
        return functional.native_loss(*args)
    return torch.ops.wce.cross_entropy(*args)


def patch() -> None:
    """Routes ``F.cross_entropy``, ``nn.CrossEntropyLoss`` and subclasses through this package.

    Eager code is reached at once, whatever it imported earlier. A function that ``torch.compile``
    compiled before stays as it is, so patch first or call ``torch.compiler.reset()``. Calling it
    again changes nothing.
    """
    global _wanted
    with _lock:
        _wanted = True
        _apply()


def unpatch() -> None:
    """Undoes :func:`patch`; inside of ``with patched()`` at the end of the block."""
    global _wanted
    with _lock:
        _wanted = False
        _apply()


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """A block in which PyTorch's cross entropy is ours, for all threads. Blocks may be nested."""
    global _scopes
    with _lock:
        _scopes += 1
        _apply()
    try:
        yield
    finally:
        with _lock:
            _scopes -= 1
            _apply()


def is_patched() -> bool:
    """Whether PyTorch's cross entropy is ours now."""
    return _previous is not None


def _apply() -> None:
    global _previous
    active = _wanted or _scopes > 0
    if active == (_previous is not None):
        return
    if active:
        _register_builtin()
        _previous = torch._C._nn.cross_entropy_loss
        torch._C._nn.cross_entropy_loss = cross_entropy_loss
    else:
        # Somebody may have replaced the attribute after us: leave theirs alone.
        if torch._C._nn.cross_entropy_loss is cross_entropy_loss:
            torch._C._nn.cross_entropy_loss = _previous
        _previous = None
    _set_cache_tag(active)


def _set_cache_tag(active: bool) -> None:
    """Compile caches on disk are keyed by the graph, which holds F.cross_entropy in either case;
    without a tag a patched process would replay what an unpatched one compiled, and the reverse.

    An assignment to the setting would hold for the calling thread alone (torch 2.12 and later), a
    value from the environment holds for all; what the user had set is kept in front of the tag."""
    entry = torch.compiler.config._config["cache_key_tag"]
    entry.env_value_force = _UNSET_SENTINEL
    if active:
        entry.env_value_force = f"{torch.compiler.config.cache_key_tag};{_TAG}"


def _register_builtin() -> None:
    """TorchScript compiles calls of the replacement to PyTorch's own operator."""
    global _builtin_registered
    if not _builtin_registered:
        torch.jit._builtins._register_builtin(cross_entropy_loss, "aten::cross_entropy_loss")
        _builtin_registered = True

"""The machine's own limits, measured in the same run as the losses, on the same tensors.

Byte rule. Forward has to read the logits once, and a soft target once. Backward has to read both
once and to write a gradient of the logits' size once. The ceiling of a case is the time that a
bare read (a bare copy) of exactly these bytes takes on the same number of threads, or the time of
one exp per element if that is longer. The copy writes to memory that is already mapped.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

SMALLEST = 1 << 22  # bytes of logits; below, the cost of a call hides the limit of the memory
_SOURCE = Path(__file__).with_name("ceilings.c")


def _flags(isa: str) -> list[str]:
    if isa == "avx2":
        return ["-mavx2", "-mfma"]
    return ["-march=native"] if isa in ("native", "avx512") else []


def _compile(isa: str) -> ctypes.CDLL | None:
    """The helper library, built once per source and flags; None where there is no compiler."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc")]
    if compiler == [None]:
        return None
    command = [*compiler, "-std=gnu11", "-O3", "-fopenmp", "-fPIC", "-shared", *_flags(isa)]
    key = hashlib.sha256(" ".join(command).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"wce-ceilings-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, str(_SOURCE), "-o", str(part)], capture_output=True)
        if done.returncode:
            return None
        part.replace(library)
    try:
        lib = ctypes.CDLL(str(library))
    except OSError:
        return None
    lib.ceiling_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    lib.ceiling_read.restype = ctypes.c_uint64
    lib.ceiling_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t] + [
        ctypes.c_int
    ] * 2
    lib.ceiling_copy.restype = None
    lib.ceiling_exp.argtypes = [ctypes.c_int64, ctypes.c_int]
    lib.ceiling_exp.restype = ctypes.c_double
    lib.ceiling_exp_block.restype = ctypes.c_int64
    return lib


def _best(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


class Machine:
    """Reads and copies as fast as the machine can. Without a compiler, PyTorch's own operations."""

    def __init__(self, isa: str = "native", device: str = "cpu") -> None:
        self._lib = _compile(isa) if device == "cpu" else None
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.device = device
        self.helper = "C" if self._lib else "torch"

    def _bytes(self, t: torch.Tensor) -> tuple[int, int]:
        """Where the tensor's elements lie: address and size of the span, holes included."""
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), span * t.element_size()

    def _destination(self, size: int) -> torch.Tensor:
        if self._scratch.numel() < size + 64:
            self._scratch = torch.zeros(size + 64, dtype=torch.uint8, device=self.device)
        return self._scratch

    def release(self) -> None:
        """Gives the copy's destination back."""
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def read(self, t: torch.Tensor, threads: int) -> None:
        if self._lib:
            address, size = self._bytes(t)
            self._lib.ceiling_read(address, size, threads)
        else:
            t.sum()

    def copy(self, t: torch.Tensor, threads: int, streaming: bool) -> None:
        address, size = self._bytes(t)
        destination = self._destination(size)
        if self._lib:
            aligned = (destination.data_ptr() + 63) // 64 * 64
            self._lib.ceiling_copy(aligned, address, size, threads, int(streaming))
        else:
            room = destination[:size - size % t.element_size()].view(t.dtype)
            room[: t.numel()].as_strided(t.shape, t.stride()).copy_(t)

    def exp_rate(self, threads: int) -> float | None:
        """Evaluations of exp per second from L1, float32; None if it cannot be measured."""
        if not self._lib:
            return None
        blocks = 2000
        self._lib.ceiling_exp(blocks, threads)
        seconds = _best(lambda: self._lib.ceiling_exp(blocks, threads))
        return blocks * threads * self._lib.ceiling_exp_block() / seconds

    def summary(self, threads: int, size: int = 1 << 28) -> dict:
        """Gigabytes per second of a large read and copy (bytes read plus bytes written)."""
        if self.device == "cuda":
            return self._cuda_summary(size * 4)
        t = torch.ones(size // 4)
        self.copy(t, threads, True)
        read = _best(lambda: self.read(t, threads))
        copy = min(_best(lambda s=s: self.copy(t, threads, s)) for s in (True, False))
        rate = self.exp_rate(threads)
        self.release()
        return {
            "helper": self.helper,
            "read_GBps": t.nbytes / read / 1e9,
            "copy_GBps": 2 * t.nbytes / copy / 1e9,
            "exp_G_per_s": rate / 1e9 if rate else None,
        }

    def _cuda_summary(self, size: int) -> dict:
        t = torch.ones(size // 4, device="cuda")
        to = torch.empty_like(t)
        times = {"read_GBps": [], "copy_GBps": []}
        for _ in range(10):
            for key, run in (("read_GBps", t.sum), ("copy_GBps", lambda: to.copy_(t))):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                times[key].append(start.elapsed_time(end) / 1e3)
        return {
            "helper": "torch",
            "read_GBps": t.nbytes / min(times["read_GBps"]) / 1e9,
            "copy_GBps": 2 * t.nbytes / min(times["copy_GBps"]) / 1e9,
            "exp_G_per_s": None,
        }

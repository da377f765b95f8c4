"""What is measured: the list of cases, and the tensors of one case.

A case is a value: the shape of the logits and every option of the call. Nothing here runs a loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}

# Each group is one row of the table of targets in report.py.
GROUPS = ("small", "other", "few", "middle", "long", "planes", "soft", "f64", "features", "scaling")

Z_LOSS = 1e-4  # factor of mean(lse^2) in the cases with z-loss


@dataclass(frozen=True)
class Case:
    """One call of the loss. shape: logits, (N, C) or (N, C, d1, ...)."""

    group: str
    shape: tuple[int, ...]
    dtype: str = "f32"
    layout: str = "contiguous"  # channels_last; shifted: (B, T, C)[:, :-1].transpose(1, 2)
    target: str = "index"  # or soft
    smoothing: float = 0.0
    reduction: str = "mean"
    values: str = "randn"  # or ascending: the worst order for an online maximum
    feature: str = ""  # class_prior, sample_weight, stats, z_loss, mixup
    autocast: bool = False
    compiled: bool = True  # torch.compile is one of the rivals
    quick: bool = False  # part of --quick
    series: str = ""  # name of the scaling curve that this case is a point of

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.shape)), self.dtype]
        words += [self.layout] * (self.layout != "contiguous")
        words += [self.target] * (self.target != "index")
        words += [f"smoothing={self.smoothing:g}"] * (self.smoothing > 0)
        words += [f"reduction={self.reduction}"] * (self.reduction != "mean")
        words += [self.values] * (self.values != "randn")
        words += [self.feature] * bool(self.feature)
        words += ["autocast"] * self.autocast
        words += [f"[{self.series}]"] * bool(self.series)
        return " ".join(words)

    @property
    def classes(self) -> int:
        return self.shape[1]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.elements // self.classes

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize


# Ordered so that what matters most comes first, should the time run out.
_CPU = (
    # Calls whose cost is the call itself.
    Case("small", (4, 8)),
    Case("small", (32, 10), quick=True),
    Case("small", (64, 10)),
    # Long rows.
    Case("long", (32768, 1000)),
    Case("long", (2048, 32000)),
    Case("long", (512, 128256)),
    Case("long", (2048, 32000), dtype="bf16"),
    # Few classes, many rows.
    Case("other", (1024, 10)),
    Case("few", (65536, 10), quick=True),
    Case("few", (1_000_000, 2)),
    Case("few", (1_000_000, 19)),
    Case("middle", (65536, 100), quick=True),
    # Positions contiguous, and their twins with the classes contiguous.
    Case("planes", (8, 19, 512, 512)),
    Case("planes", (8, 19, 512, 512), layout="channels_last"),
    Case("planes", (4, 150, 256, 256)),
    Case("planes", (2, 5, 96, 96, 96)),
    # Soft targets, float64.
    Case("soft", (1024, 1000), target="soft", quick=True),
    Case("soft", (2048, 32000), target="soft"),
    Case("f64", (65536, 10), dtype="f64"),
    Case("f64", (16384, 1000), dtype="f64"),
    # The rest of the shapes, dtypes, layouts and options.
    Case("long", (8192, 4096)),
    Case("long", (1024, 50257)),
    Case("long", (1, 128256)),
    Case("long", (32768, 1000), dtype="bf16"),
    Case("long", (512, 128256), dtype="bf16", compiled=False),
    Case("long", (2048, 32000), dtype="f16"),
    Case("long", (2048, 32000), dtype="bf16", autocast=True),
    Case("long", (4, 512, 32000), layout="shifted"),
    Case("long", (32768, 1000), smoothing=0.1),
    Case("long", (2048, 32000), values="ascending", compiled=False),
    Case("few", (65536, 10), dtype="bf16"),
    Case("few", (65536, 10), dtype="f16", compiled=False),
    Case("few", (65536, 10), smoothing=0.1),
    Case("few", (65536, 10), values="ascending", compiled=False),
    Case("middle", (65536, 100), dtype="bf16"),
    Case("middle", (65536, 32), compiled=False),
    Case("planes", (4, 150, 256, 256), layout="channels_last", compiled=False),
    Case("planes", (2, 5, 96, 96, 96), layout="channels_last", compiled=False),
    Case("planes", (8, 19, 512, 512), dtype="bf16"),
    Case("planes", (8, 19, 512, 512), smoothing=0.1, compiled=False),
    Case("planes", (8, 19, 512, 512), reduction="none", compiled=False),
    Case("soft", (2048, 32000), target="soft", dtype="bf16", compiled=False),
    Case("soft", (4, 19, 512, 512), target="soft", compiled=False),
    Case("f64", (4, 19, 512, 512), dtype="f64", compiled=False),
    # More than native has: against the same thing composed from native operations.
    *(
        Case("features", shape, feature=feature, compiled=False)
        for feature in ("class_prior", "sample_weight", "stats", "z_loss", "mixup")
        for shape in ((65536, 10), (32768, 1000))
    ),
)

# Sizes for --quick; the cases that are marked quick above come beside these.
_QUICK = (
    Case("long", (8192, 1000)),
    Case("long", (512, 32000), dtype="bf16"),
    Case("planes", (2, 19, 512, 512)),
    Case("planes", (2, 19, 512, 512), layout="channels_last", compiled=False),
    Case("f64", (4096, 1000), dtype="f64", compiled=False),
    Case("features", (8192, 1000), feature="class_prior", compiled=False),
)


def _scaling() -> tuple[Case, ...]:
    """Time per element as N grows at C = 10, and as C grows at a fixed number of elements."""
    rows = [10**k for k in range(8)] + [3 * 10**k for k in range(2, 7)]
    classes = [2, 3, 4, 5, 8, 10, 16, 17, 19, 24, 32, 33, 48, 64, 100, 128, 256, 512, 1000, 1024,
               2048, 4096, 10_000, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576]
    planes = [2, 3, 5, 10, 19, 32, 64, 150, 256, 512, 1024]
    total = 1 << 24

    def point(shape: tuple[int, ...], series: str) -> Case:
        return Case("scaling", shape, compiled=False, series=series)

    return (
        *(point((n, 10), "rows") for n in sorted(rows)),
        *(point((max(total // c, 1), c), "classes") for c in classes),
        *(point((1, c, total // c), "planes") for c in planes),
    )


def _for_cuda(case: Case) -> Case:
    """Four times the rows: a GPU needs more work than a processor before it is busy."""
    if case.group == "small" or case.rows == 1 or case.elements < 100_000:
        return case
    return replace(case, shape=(case.shape[0] * 4, *case.shape[1:]))


def shrink(case: Case) -> Case:
    """The same options on a handful of rows and classes, to run the code path in a test."""
    tail = tuple(min(d, 5) for d in case.shape[2:])
    tiny = (min(case.shape[0], 6), min(case.classes, 37), *tail)
    return replace(case, shape=tiny)


def select(device: str = "cpu", quick: bool = False, tiny: bool = False) -> list[Case]:
    """The cases of a run, in order, each name once."""
    if quick:
        cases = [c for c in _CPU if c.quick] + list(_QUICK)
    else:
        cases = [*_CPU, *(_scaling()[::8] if tiny else _scaling())]
    if device == "cuda":
        cases = [_for_cuda(c) for c in cases]
    if tiny:
        cases = [shrink(c) for c in cases]
    unique: dict[str, Case] = {}
    for case in cases:
        unique.setdefault(case.name, case)
    return list(unique.values())


@dataclass
class Data:
    """The tensors of one case. logits is a leaf that requires a gradient."""

    logits: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor  # upstream gradient of the loss: ones, or one number per row for "none"
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


def _values(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    device = generator.device
    x = torch.randn(shape, generator=generator, device=device)
    if case.values == "ascending":
        # A step of 8 over the row in every row, shifted by a number per row.
        ramp = torch.linspace(-4, 4, shape[1], device=device)
        ramp = ramp.reshape(1, -1, *[1] * (len(shape) - 2))
        x = x[:, :1] + ramp
    return x.to(DTYPES[case.dtype])


def _logits(case: Case, generator: torch.Generator) -> torch.Tensor:
    if case.layout == "shifted":
        batch, length, classes = case.shape[0], case.shape[2], case.classes
        wide = _values(case, (batch * (length + 1), classes), generator)
        return wide.reshape(batch, length + 1, classes)[:, :-1].transpose(1, 2)
    x = _values(case, case.shape, generator)
    if case.layout == "channels_last":
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=last)
    return x


def make(case: Case, device: str = "cpu", seed: int = 0) -> Data:
    """Random tensors for the case; the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = _logits(case, generator).requires_grad_()
    dtype = torch.float32 if case.autocast else DTYPES[case.dtype]
    rows = (case.shape[0], *case.shape[2:])  # shape of an index target

    def uniform(shape: tuple[int, ...]) -> torch.Tensor:
        return 0.5 + torch.rand(shape, generator=generator, device=device, dtype=torch.float32)

    def labels() -> torch.Tensor:
        return torch.randint(case.classes, rows, generator=generator, device=device)

    if case.target == "soft":
        q = torch.softmax(torch.randn(case.shape, generator=generator, device=device), 1)
        target = q.double() if case.dtype == "f64" else q
    else:
        target = labels()
    weight = uniform((case.classes,)).to(dtype)
    grad = uniform(rows if case.reduction == "none" else ())
    grad = grad.to(dtype) if case.reduction == "none" else torch.ones_like(grad, dtype=dtype)
    extra = {}
    if case.feature == "class_prior":
        extra["class_prior"] = uniform((case.classes,)).to(dtype)
    elif case.feature == "sample_weight":
        extra["sample_weight"] = uniform(rows).to(dtype)
    elif case.feature == "mixup":
        extra["target_b"] = labels()
    return Data(logits, target, weight, grad, extra)

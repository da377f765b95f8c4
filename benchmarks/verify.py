"""Is the answer right? Compares loss and gradient with a float64 computation, chunk by chunk.

For a row with logits x (prior added), p = softmax(x) and coefficients a_c with sum A:
    loss = A*logsumexp(x) - sum_c a_c*x_c      dx_c = r*(A*p_c - a_c) + h*p_c
r: upstream gradient over the mean's denominator, h: gradient of the row's log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.cases import DTYPES, Z_LOSS, Case, Data

CHUNK = 1 << 18  # elements widened to float64 at a time; the temporaries stay in the cache

# Loss: units in the last place of the loss's type.
# Gradient: |error| <= rel*|exact| + abs*max|exact|.
# 16-bit results are one rounding of the exact answer (0.5, and 0.1 for the arithmetic before it).
LOSS_ULP = {torch.float32: 4.0, torch.float64: 64.0, torch.bfloat16: 0.6, torch.float16: 0.6}
GRAD_REL = {"f32": 1e-5, "f64": 1e-11, "bf16": 0.51 * 2**-7, "f16": 0.51 * 2**-10}
GRAD_ABS = {"f32": 1e-6, "f64": 1e-14, "bf16": 1e-6, "f16": 1e-6}


@dataclass
class Errors:
    """Distance from the float64 answer. gradient: largest |error| over largest |exact value|."""

    loss_ulp: float = 0.0
    gradient: float = 0.0
    passed: bool = True
    reason: str = ""

    def fail(self, reason: str) -> None:
        self.passed = False
        self.reason = self.reason or reason


@dataclass
class _Chunk:
    outer: slice
    inner: slice
    loss: torch.Tensor  # [rows] before the division by the denominator
    grad: torch.Tensor  # [rows, classes]


def _view(t: torch.Tensor) -> torch.Tensor:
    """(N, C, d1, ...) as [outer, classes, inner] without a copy."""
    return t.reshape(t.shape[0], t.shape[1], -1) if t.dim() > 2 else t.unsqueeze(2)


def _slices(case: Case) -> Iterator[tuple[slice, slice]]:
    outer, inner = case.shape[0], case.rows // case.shape[0]
    per_outer = case.classes * inner
    if per_outer <= CHUNK:
        step = max(CHUNK // per_outer, 1)
        for start in range(0, outer, step):
            yield slice(start, start + step), slice(None)
        return
    step = max(CHUNK // case.classes, 1)
    for n in range(outer):
        for start in range(0, inner, step):
            yield slice(n, n + 1), slice(start, start + step)


def _rows(view: torch.Tensor, outer: slice, inner: slice) -> torch.Tensor:
    """A block of [outer, classes, inner] as float64 [rows, classes]."""
    block = view[outer, :, inner].movedim(1, -1)
    return block.reshape(-1, view.shape[1]).double()


def _terms(case: Case, data: Data) -> list[tuple[torch.Tensor, float]]:
    """Index targets with their share of the loss: one, or two for MixUp."""
    if case.target == "soft":
        return []
    if case.feature == "mixup":
        return [(data.target, MIXUP_LAM), (data.extra["target_b"], 1.0 - MIXUP_LAM)]
    return [(data.target, 1.0)]


MIXUP_LAM = 0.3


def _denominator(case: Case, data: Data, target: torch.Tensor | None) -> float:
    if case.reduction != "mean":
        return 1.0
    if target is None:
        return float(case.rows)
    w = data.weight.double()[target]
    if "sample_weight" in data.extra:
        w = w * data.extra["sample_weight"].double()
    return w.sum().item()


def _reference(case: Case, data: Data) -> Iterator[_Chunk]:
    x_view = _view(data.logits.detach())
    q_view = _view(data.target) if case.target == "soft" else None
    shape = (case.shape[0], -1)
    w = data.weight.double()
    prior = data.extra["class_prior"].double().log() if "class_prior" in data.extra else 0.0
    scale = data.extra.get("sample_weight")
    upstream = data.grad.double()
    terms = [(t.reshape(shape), lam, _denominator(case, data, t)) for t, lam in _terms(case, data)]
    soft_denominator = _denominator(case, data, None)
    e = case.smoothing

    for outer, inner in _slices(case):
        def per_row(t: torch.Tensor) -> torch.Tensor:
            return t.reshape(shape)[outer, inner].reshape(-1)  # noqa: B023 (used at once)

        x = _rows(x_view, outer, inner) + prior
        m = x.max(1, keepdim=True).values
        z = torch.exp(x - m)
        total = z.sum(1, keepdim=True)
        lse = m + total.log()
        p = z / total
        g = per_row(upstream) if case.reduction == "none" else upstream
        s = per_row(scale).double() if scale is not None else torch.ones_like(m[:, 0])

        # coefficients a [rows, classes], already divided by the denominator of their mean
        a = torch.full_like(x, e / x.shape[1]) * w if e else torch.zeros_like(x)
        if q_view is not None:
            a = (a + (1 - e) * _rows(q_view, outer, inner) * w) / soft_denominator
        else:
            spread = a
            a = torch.zeros_like(x)
            for target, lam, denominator in terms:
                y = target[outer, inner].reshape(-1, 1)
                one = spread.scatter_add(1, y, (1 - e) * w[y])
                a += lam / denominator * one
        a *= s[:, None]
        row = a.sum(1, keepdim=True)
        loss = (row * (lse - m))[:, 0] - (a * (x - m)).sum(1)
        grad = (row * p - a) * (g[:, None] if g.dim() else g)
        if case.feature == "z_loss":
            loss = loss + Z_LOSS / case.rows * lse[:, 0] ** 2
            grad += 2 * Z_LOSS / case.rows * lse * p
        yield _Chunk(outer, inner, loss, grad)


def _ulps(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest error in units of the last place of max(|exact|, 1)'s binade."""
    size = exact.abs().max().clamp(min=2.0**-10).item()
    unit = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(size))
    error = (got.double() - exact).abs().max().item()
    return error / unit if error == error else math.inf


def _check_gradient(case: Case, errors: Errors, got: torch.Tensor, chunk: _Chunk) -> None:
    exact = chunk.grad
    difference = (_rows(_view(got), chunk.outer, chunk.inner) - exact).abs()
    largest = exact.abs().max().item()
    # below the smallest normal number a 16-bit gradient keeps an absolute precision only
    floor = torch.finfo(DTYPES[case.dtype]).smallest_normal * torch.finfo(DTYPES[case.dtype]).eps
    bound = exact.abs() * GRAD_REL[case.dtype] + (GRAD_ABS[case.dtype] * largest + floor)
    worst = difference.max().item()
    errors.gradient = max(errors.gradient, worst / max(largest, 1e-300))
    if not bool((difference <= bound).all()):
        errors.fail(f"gradient is off by {worst:.3g}, largest entry {largest:.3g}")


def check(case: Case, data: Data, results: dict[str, tuple]) -> dict[str, Errors]:
    """results: rival -> (list of losses that must all be right, gradient of the logits)."""
    errors = {name: Errors() for name in results}
    losses = []
    for chunk in _reference(case, data):
        losses.append(chunk.loss)
        for name, (_, gradient) in results.items():
            _check_gradient(case, errors[name], gradient, chunk)
    exact = torch.cat(losses)
    exact = exact.sum() if case.reduction != "none" else exact
    for name, (values, _) in results.items():
        for value in values:
            ulp = _ulps(value.detach().reshape(exact.shape), exact, value.dtype)
            errors[name].loss_ulp = max(errors[name].loss_ulp, ulp)
            if not ulp <= LOSS_ULP[value.dtype]:
                errors[name].fail(f"loss is off by {ulp:.3g} ulp of {value.dtype}")
    return errors

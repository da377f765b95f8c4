"""Clocks, and the order of the measurement: A B A B ... in one process.

A rival is a list of steps that run one after the other, [forward] or [forward, backward].
A sample is the time of each step.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Steps = Sequence[Callable[[], object]]

SAMPLE = 2e-3  # seconds; shorter calls are repeated until a sample lasts about this long
REPEAT_BELOW = 3e-4  # seconds; calls that take longer are timed one by one
SAMPLE_LIMIT = 5e-2  # seconds; a sample of repeated calls stops here, should they suddenly be slow
WARM_BELOW = 2e-2  # seconds; below, each sample follows an untimed call of the same rival


class CpuClock:
    def sample(self, steps: Steps, inner: int) -> list[float]:
        """Seconds per call of each step; with inner > 1 only their sum is known."""
        now = time.perf_counter
        if inner == 1:
            marks = [now()]
            for step in steps:
                step()
                marks.append(now())
            return [b - a for a, b in zip(marks, marks[1:], strict=False)]
        batch = range(max(inner // 8, 1))
        calls, elapsed, start = 0, 0.0, now()
        while calls < inner and elapsed < SAMPLE_LIMIT:
            for _ in batch:
                for step in steps:
                    step()
            calls += len(batch)
            elapsed = now() - start
        return [elapsed / calls]


class CudaClock:
    """Device time between events. The first step of each call finds a cold L2: a buffer of twice
    its size is written before. Then the device idles for a while, so that the host runs ahead
    and launches do not count."""

    LEAD = 2_000_000  # cycles, about a millisecond: longer than Python takes for a call

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(2 * size, 1 << 26), dtype=torch.int8, device="cuda")

    def sample(self, steps: Steps, inner: int) -> list[float]:
        calls = []
        for _ in range(inner):
            self._flush.zero_()
            torch.cuda._sleep(self.LEAD)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
            events[0].record()
            for step, event in zip(steps, events[1:], strict=True):
                step()
                event.record()
            calls.append(events)
        torch.cuda.synchronize()
        pairs = range(len(steps))
        return [
            sum(events[k].elapsed_time(events[k + 1]) for events in calls) / inner / 1e3
            for k in pairs
        ]


@dataclass(frozen=True)
class Effort:
    """How long to measure one table of rivals."""

    seconds: float = 1.0  # after that, no more than the least number of rounds
    limit: float = 15.0  # after that, no further round at all
    least: int = 5
    most: int = 60
    sample: float = SAMPLE


@dataclass
class _Lane:
    """A rival with the number of calls per sample."""

    steps: Steps
    inner: int
    warm: bool


def _lane(clock, steps: Steps, sample: float) -> _Lane:
    clock.sample(steps, 1)  # first call: allocations, compilation
    once = sum(clock.sample(steps, 1))
    inner = 1 if once > REPEAT_BELOW else math.ceil(sample / max(once, 1e-7))
    return _Lane(steps, min(inner, 5000), once < WARM_BELOW)


def interleave(clock, rivals: dict[str, Steps], effort: Effort) -> dict[str, list[list[float]]]:
    """Samples of each rival; sample k of all of them was taken in round k."""
    lanes = {name: _lane(clock, steps, effort.sample) for name, steps in rivals.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in rivals}
    start = time.perf_counter()
    was_on = gc.isenabled()
    gc.disable()
    try:
        for done in range(effort.most):
            elapsed = time.perf_counter() - start
            if elapsed > (effort.seconds if done >= effort.least else effort.limit) and done:
                break
            for name, lane in lanes.items():
                if lane.warm:
                    clock.sample(lane.steps, 1)
                samples[name].append(clock.sample(lane.steps, lane.inner))
    finally:
        if was_on:
            gc.enable()
    return samples


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)

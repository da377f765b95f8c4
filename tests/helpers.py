"""What several test files need besides the reference."""

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from reference import as_layout, log_prior_of

import wce_torch

ROOT = str(Path(__file__).resolve().parent.parent)


def peak_bytes(function):
    """Largest amount of tensor memory that was allocated by the function and not yet freed."""
    function()  # first calls may allocate what stays
    gc.collect()
    wce_torch.empty_cache()  # memory kept from the last gradient would not be seen
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert events, "the profiler saw no allocation"
    return peak


def run_python(code, **env):
    """Runs code in a fresh interpreter: the finished process."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, **env}, timeout=300)


def op_arguments(case, dtype=torch.float32, layout="plain", needs_grad=False):
    """(positional, keyword) arguments of wce::cross_entropy for a case."""
    x, target, options = case.build(dtype)
    reduction = ("none", "mean", "sum").index(options.get("reduction"))
    keywords = {}
    if "class_prior" in options:
        prior = log_prior_of(options["class_prior"], options["tau"])
        keywords["log_prior"] = prior.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for name in ("sample_weight", "mask"):
        if name in options:
            keywords[name] = options[name]
    if "normalizer" in options:
        keywords["normalizer"] = torch.tensor(options["normalizer"])
    if case.skip_empty:
        keywords["skip_empty"] = True
    if case.empty == "zero":
        keywords["empty_zero"] = True
    x = as_layout(x, layout).detach().requires_grad_(needs_grad)
    return (x, target, options.get("weight"), reduction, options.get("ignore_index", -100),
            case.smoothing), keywords


def segmentation_losses(base):
    """Two subclasses in the manner of medical segmentation code: the target has a channel of its
    own and may be floating; the top-k variant uses the legacy positional arguments."""

    class WithChannel(base):
        def forward(self, input, target):
            if target.ndim == input.ndim:
                assert target.shape[1] == 1
                target = target[:, 0]
            return super().forward(input, target.long())

    class TopK(WithChannel):
        def __init__(self, weight=None, ignore_index=-100, k=10, label_smoothing=0):
            self.k = k
            super().__init__(weight, False, ignore_index, reduce=False,
                             label_smoothing=label_smoothing)

        def forward(self, inp, target):
            target = target[:, 0].long()
            res = super().forward(inp, target)
            count = int(res.numel() * self.k / 100)
            return torch.topk(res.view((-1,)), count, sorted=False)[0].mean()

    return WithChannel, TopK


def composed(x, target, options):
    """The options that torch does not have, built from torch's own loss per row."""
    options = dict(options)
    prior, tau = options.pop("class_prior", None), options.pop("tau", 1.0)
    if prior is not None:
        shift = log_prior_of(prior, tau)
        x = x + shift.reshape(-1, *[1] * (x.dim() - 2))
    reduction, empty = options.pop("reduction"), options.pop("empty", "nan")
    s, mask = options.pop("sample_weight", None), options.pop("mask", None)
    skip, normalizer = options.pop("skip_empty_targets", False), options.pop("normalizer", None)
    rows = F.cross_entropy(x, target, reduction="none", **options)
    keep = torch.ones_like(rows, dtype=torch.bool)
    soft = x.shape == target.shape
    per_row = torch.ones_like(rows)
    if not soft:
        keep = target != options["ignore_index"]
        if "weight" in options:
            per_row = options["weight"][torch.where(keep, target, 0)]
    if mask is not None:
        keep = keep & mask
    if skip:
        keep = keep & (target.sum(0 if x.dim() == 1 else 1) != 0)
    s = torch.ones_like(rows) if s is None else s
    rows = torch.where(keep, rows * s, 0.0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if empty == "zero" and not keep.any():
        return rows.sum() * 0
    return rows.sum() / ((per_row * s)[keep].sum() if normalizer is None else normalizer)

"""Measures cases in one process and prints one line of JSON per finding.

bench.py starts it, because allocator and instruction set are settings of a process. A line that is
a finding starts with MARK; everything else that appears on stdout is noise of a compiler.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import wce_torch  # noqa: E402
from benchmarks import cases as case_list  # noqa: E402
from benchmarks import rivals as rival_table  # noqa: E402
from benchmarks.cases import Case, Data  # noqa: E402
from benchmarks.ceilings import SMALLEST, Machine  # noqa: E402
from benchmarks.timing import (  # noqa: E402
    CpuClock,
    CudaClock,
    Effort,
    interleave,
    median,
    quantile,
)
from benchmarks.verify import Errors, check  # noqa: E402

MARK = "@bench "


def emit(kind: str, **fields: object) -> None:
    print(MARK + json.dumps({"kind": kind, **fields}), flush=True)


class Wrong(Exception):
    """Ours gave a wrong answer: the case gets no number."""


# ---- one call -----------------------------------------------------------------------------------


def forward_steps(loss, x: torch.Tensor) -> list:
    """To be run under no_grad."""
    plain = x.detach()
    return [lambda: loss(plain)]


def training_steps(loss, x: torch.Tensor, grad: torch.Tensor, turns: bool = False) -> list:
    """Forward, then backward and the release of the gradient.

    turns: with upstream gradients of 1 and 2 in turn. Ours then cannot expect them, and makes the
    gradient in backward.
    Logits of another layout than the standard one get their gradient from autograd.grad: a leaf's
    .grad keeps the leaf's strides, and the copy behind that would be charged to some rivals only.
    """
    pending = []
    if grad.dim():
        upstream = itertools.repeat(grad)
    elif turns:
        upstream = itertools.cycle([torch.ones_like(grad), 2 * torch.ones_like(grad)])
    else:
        upstream = itertools.repeat(None)

    def forward() -> None:
        pending.append(loss(x))

    def backward() -> None:
        value, g = pending.pop(), next(upstream)
        if x.is_contiguous():
            value.backward(g)
            x.grad = None
        else:
            torch.autograd.grad(value, x, g)

    return [forward, backward]


def answer(loss, x: torch.Tensor, grad: torch.Tensor) -> tuple:
    """([loss without a graph, loss with one], gradient), as verify.check wants them."""
    with torch.no_grad():
        first = loss(x.detach()).clone()
    second = loss(x)
    gradient = torch.autograd.grad(second, x, grad if grad.dim() else None)[0]
    return [first, second.detach().clone()], gradient


def peak_buffers(steps: list, case: Case, device: str) -> float:
    """Most memory held at once beyond what was there before, in units of the logits' size."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for step in steps:
            step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / case.nbytes
    wce_torch.empty_cache()  # memory kept from the last gradient would not be seen
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        for step in steps:
            step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / case.nbytes


# ---- one case -----------------------------------------------------------------------------------


class Session:
    """Settings of the run, and what was measured once for all cases."""

    def __init__(self, config: dict) -> None:
        self.config = config
        self.device: str = config["device"]
        self.threads: list[int] = config["threads"]
        self.smallest = 0 if config["tiny"] else SMALLEST
        self.machine = Machine(config["isa"], self.device)
        self.clock = CudaClock() if self.device == "cuda" else CpuClock()
        self.exp_rate: dict[int, float | None] = {}
        self.bandwidth: dict[int, dict] = {}

    def measure_ceilings(self) -> None:
        for threads in self.threads:
            size = 1 << 20 if self.config["tiny"] else 1 << 28
            found = self.machine.summary(threads, size)
            self.bandwidth[threads] = found
            rate = found["exp_G_per_s"]
            self.exp_rate[threads] = rate * 1e9 if rate else None
            emit("ceilings", threads=threads, malloc=self.config["malloc"], **found)

    def effort(self, case: Case, left: int) -> Effort:
        """Spreads the time that is left over the cases that are left."""
        if self.config["tiny"]:
            return Effort(0.0, 60.0, 2, 2, 2e-5)
        share = (self.config["deadline"] - time.time()) / max(left, 1)
        seconds = min(max(0.12 * share / len(self.threads), 0.1), 1.0)
        limit = min(max(share, 2.0), 15.0)
        if case.group == "scaling":
            return Effort(min(seconds, 0.15), limit, 3, 20)
        most = 200 if case.group == "small" else 60
        return Effort(seconds, limit, 5 if share > 6 else 3, most)


def fingerprint(results: tuple) -> list[int]:
    """Of losses and gradient: equal for equal bits, and different for all practical purposes."""
    values, gradient = results
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for t in (*values, gradient):
        bits = t.detach().view(integers[t.element_size()])
        sums += [bits.sum(dtype=torch.int64).item(), (bits * bits).sum(dtype=torch.int64).item()]
    return sums


def verified(session: Session, case: Case, data: Data, table: dict) -> tuple[dict, list[str]]:
    """Errors by rival; raises Wrong for ours. Rivals that cannot run leave the table.

    Where an earlier process of this run got the same bits from ours, its verdict holds.
    """
    notes, results = [], {}
    torch.set_num_threads(session.threads[0])
    for name, loss in list(table.items()):
        if name == "plain" or (case.series and name != "ours"):
            continue
        x = data.logits.detach().clone().requires_grad_() if name == "liger" else data.logits
        try:
            results[name] = answer(loss, x, data.grad)
        except Exception as error:
            if name == "ours":
                raise
            notes.append(f"{name} does not run: {_one_line(error)}")
            del table[name]
    bits = fingerprint(results["ours"])
    earlier = session.config["verified"].get(case.name)
    if earlier and earlier["bits"] == bits:
        errors = {name: Errors(*e) for name, e in earlier["errors"].items()}
    else:
        errors = check(case, data, results)
    if session.config["ours"] == "native":  # its 16-bit results are not one rounding away
        return errors, notes
    if not errors["ours"].passed:
        raise Wrong(errors["ours"].reason)
    _same_bits(session, data, table["ours"], results["ours"])
    numbers = {name: [e.loss_ulp, e.gradient] for name, e in errors.items()}
    emit("verified", case=case.name, bits=bits, errors=numbers)
    return errors, notes


def _same_bits(session: Session, data: Data, loss, first: tuple) -> None:
    """Ours promises the same result for any number of threads, and also whether forward makes the
    gradient, as from the third call on, or backward, as where saved tensors pass through hooks."""

    def compare(what: str) -> None:
        values, gradient = answer(loss, data.logits, data.grad)
        equal = all(torch.equal(a, b) for a, b in zip(values, first[0], strict=True))
        if not (equal and torch.equal(gradient, first[1])):
            raise Wrong(f"{what} gives other bits than the first call")

    for threads in (session.threads[0], *session.threads):
        torch.set_num_threads(threads)
        compare(f"a later call with {threads} threads")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        compare("backward by itself")


def add_compiled(session: Session, case: Case, data: Data, table: dict) -> list[str]:
    """Adds torch.compile to the table, warm; returns remarks."""
    table.pop("compile", None)
    if not (session.config["compile"] and case.compiled):
        return []
    torch._dynamo.reset()
    try:
        import torch._inductor.config as inductor

        inductor.cpp.threads = torch.get_num_threads()  # also part of the key of its disk cache
        inductor.cpp.simdlen = {"avx2": 256, "base": 1}.get(session.config["isa"])
        function = rival_table.compiled(table["eager"])
        for _ in range(2):
            answer(function, data.logits, data.grad)
    except Exception as error:
        return [f"torch.compile does not run: {_one_line(error)}"]
    table["compile"] = function
    return []


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def steps_of(data: Data, table: dict, kind: str) -> dict[str, list]:
    steps = {}
    for name, loss in table.items():
        x = data.logits
        if name == "liger":
            x = x.detach().clone().requires_grad_()
        if kind == "forward":
            steps[name] = forward_steps(loss, x)
        else:
            steps[name] = training_steps(loss, x, data.grad, turns=kind == "backward")
    return steps


def ceiling_steps(session: Session, case: Case, data: Data, kind: str, threads: int) -> dict:
    """Bare reads and copies of the case's own tensors, to be timed beside the losses."""
    if session.device == "cuda" or case.nbytes < session.smallest or case.series:
        return {}
    machine, x = session.machine, data.logits.detach()
    reads = [lambda: machine.read(data.target, threads)] if case.target == "soft" else []
    if kind == "forward":
        return {"read": [*reads, lambda: machine.read(x, threads)]}
    return {
        "copy": [*reads, lambda: machine.copy(x, threads, False)],
        "copy, streaming": [*reads, lambda: machine.copy(x, threads, True)],
    }


def ceiling_seconds(session: Session, case: Case, data: Data, kind: str, threads: int,
                    samples: dict) -> tuple[float | None, str]:
    """Least time for the case's bytes and exponentials, and which of the two decides."""
    if session.device == "cuda":
        logits = case.nbytes * (1 if kind == "forward" else 2)
        soft = data.target.nbytes if case.target == "soft" else 0
        seconds = (logits + soft) / (session.bandwidth[threads]["copy_GBps"] * 1e9)
        return (seconds, "memory") if case.nbytes >= session.smallest else (None, "")
    times = [
        median([sum(s) for s in samples[name]])
        for name in ("read", "copy", "copy, streaming")
        if name in samples
    ]
    if not times:
        return None, ""
    memory, rate = min(times), session.exp_rate[threads]
    arithmetic = case.elements / rate if rate and case.dtype != "f64" else 0.0
    return (arithmetic, "exp") if arithmetic > memory else (memory, "memory")


RIVALS = ("ours", "eager", "compile", "plain", "quack", "liger")


def rows_of(session: Session, case: Case, kind: str, samples: dict, ceiling: tuple) -> list[dict]:
    """Statistics of one pass: kind forward, backward (the second step alone) or training."""
    seconds = {}
    for name in RIVALS:
        if name not in samples:
            continue
        if kind == "backward":
            if len(samples[name][0]) < 2 or len(samples["ours"][0]) < 2:
                continue
            seconds[name] = [s[1] for s in samples[name]]
        else:
            seconds[name] = [sum(s) for s in samples[name]]
    rows = []
    for name, values in seconds.items():
        mid = median(values)
        pairs = [v / o for v, o in zip(values, seconds["ours"], strict=True)]
        rows.append({
            "rival": name,
            "pass": kind,
            "rounds": len(values),
            "median_us": mid * 1e6,
            "q25_us": quantile(values, 0.25) * 1e6,
            "q75_us": quantile(values, 0.75) * 1e6,
            "ns_per_element": mid * 1e9 / case.elements,
            "ratio": mid / median(seconds["ours"]),
            "ratio_q25": quantile(pairs, 0.25),
            "ratio_q75": quantile(pairs, 0.75),
            "ceiling_us": ceiling[0] * 1e6 if ceiling[0] else None,
            "ceiling_share": ceiling[0] / mid if ceiling[0] else None,
            "limit": ceiling[1],
        })
    return rows


def time_case(session: Session, case: Case, data: Data, table: dict, errors: dict,
              effort: Effort) -> list[str]:
    """Times every rival on each number of threads and emits the rows; returns remarks."""
    notes: list[str] = []
    buffers: dict[str, float] = {}
    threads_list = session.threads[:1] if case.series else session.threads
    for threads in threads_list:
        torch.set_num_threads(threads)
        notes += [n for n in add_compiled(session, case, data, table) if n not in notes]
        if not buffers and not case.series:
            training = steps_of(data, table, "training")
            buffers = {n: peak_buffers(s, case, session.device) for n, s in training.items()}
        for kind in ("forward", "backward", "training"):
            if kind == "backward" and (case.series or case.group == "small"):
                continue  # too short to be timed by halves, or not asked for
            steps = steps_of(data, table, kind)
            steps.update(ceiling_steps(session, case, data, kind, threads))
            with torch.no_grad() if kind == "forward" else nullcontext():
                samples = interleave(session.clock, steps, effort)
            ceiling = ceiling_seconds(session, case, data, kind, threads, samples)
            for row in rows_of(session, case, kind, samples, ceiling):
                error = errors.get(row["rival"], Errors(float("nan"), float("nan")))
                row["peak_buffers"] = buffers.get(row["rival"])
                emit("row", case=case.name, threads=threads, loss_error_ulp=error.loss_ulp,
                     grad_error=error.gradient, **row)
    return notes


def run_case(session: Session, case: Case, left: int) -> None:
    emit("begin", case=case.name)
    status, notes = "ok", []
    try:
        data = case_list.make(case, session.device)
        table, notes = rival_table.build(case, data, session.device, session.config["ours"])
        errors, more = verified(session, case, data, table)
        notes += more
        notes += time_case(session, case, data, table, errors, session.effort(case, left))
    except Wrong as error:
        status = f"wrong answer: {error}"
    except Exception as error:
        status = f"failed: {_one_line(error)}"
        traceback.print_exc()
    emit("end", case=case.name, status=status, notes=notes)
    if "CUDA error" in status:
        sys.exit(1)  # the context is lost; bench.py goes on with a new process
    session.machine.release()
    gc.collect()
    if session.device == "cuda":
        torch.cuda.empty_cache()


def describe(session: Session) -> dict:
    """Versions and settings, for the record beside the numbers."""
    facts = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(),
             "ceilings_by": session.machine.helper}
    if session.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["cuda"] = torch.version.cuda
    if session.config["ours"] == "wce":
        import wce_torch

        facts["wce_build"] = wce_torch.build_info()
        facts["wce_isa"] = wce_torch.get_cpu_isa()
    return facts


def main() -> None:
    config = json.load(sys.stdin)
    wanted = {c.name: c for c in
              case_list.select(config["device"], config["quick"], config["tiny"])}
    try:
        session = Session(config)
        emit("environment", **describe(session))
        session.measure_ceilings()
    except Exception as error:
        traceback.print_exc()
        emit("unusable", reason=_one_line(error))
        return
    for k, name in enumerate(config["cases"]):
        if time.time() > config["deadline"]:
            emit("begin", case=name)
            emit("end", case=name, status="skipped: out of time", notes=[])
            continue
        run_case(session, wanted[name], len(config["cases"]) - k)
    emit("done")


if __name__ == "__main__":
    main()

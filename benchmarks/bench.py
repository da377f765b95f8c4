#!/usr/bin/env python3
"""Compares wce_torch with native PyTorch and torch.compile: first the answers, then the times.

No case gets a number before its loss and gradient agree with a float64 computation. The rivals
then take turns (ours, eager, compile, ours, ...) in one process. Results: results.csv (as they
come), summary.md, environment.json, ratios.png, share.png and scaling.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cases as case_list  # noqa: E402
from benchmarks.report import (  # noqa: E402
    CsvLog,
    Findings,
    case_columns,
    print_tables,
    publish,
    summary,
    target_lines,
)
from benchmarks.worker import MARK  # noqa: E402

WORKER = Path(__file__).with_name("worker.py")
CASE_TIMEOUT = 300  # seconds without a sign of life before a worker is given up
KEEP = {  # glibc then takes memory from the system once and keeps it
    "MALLOC_MMAP_THRESHOLD_": str(1 << 36),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
ATEN_CAPABILITY = {"base": "default", "avx2": "avx2", "avx512": "avx512"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true",
                   help="a dozen smaller cases, all threads only; ends within two minutes")
    p.add_argument("--threads", type=int, nargs="+", metavar="N",
                   help=f"numbers of threads (default: {cores} and 1; --quick: {cores})")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                   help="cuda: device time between events with a cold L2 cache; also quack and "
                        "Liger where they are installed (default: cpu)")
    p.add_argument("--cases", metavar="REGEX", default="",
                   help="only cases whose name or group matches, see --list")
    p.add_argument("--list", action="store_true", help="print the cases and stop")
    p.add_argument("--isa", choices=("native", "base", "avx2", "avx512"), default="native",
                   help="instruction set of ours, of native PyTorch and of torch.compile; native: "
                        "the best that each finds (default)")
    p.add_argument("--malloc", choices=("default", "keep"), nargs="+", default=("default", "keep"),
                   help="the C library's allocator as it is, or told to keep memory instead of "
                        "mapping it anew at each call (default: both, one after the other)")
    p.add_argument("--no-compile", dest="compile", action="store_false",
                   help="leave torch.compile out")
    p.add_argument("--minutes", type=float, metavar="M",
                   help="time limit of the run (default: 24; --quick: 1.7). As it comes nearer, "
                        "cases get fewer rounds, and the last ones are skipped")
    p.add_argument("--ours", choices=("wce", "native"), default="wce",
                   help="native: measure native PyTorch in our place. All ratios should then be 1, "
                        "and what they are instead is the noise of the machine")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "benchmarks", metavar="DIR",
                   help="folder of the results (default: out/benchmarks)")
    p.add_argument("--publish", metavar="NAME",
                   help="also write the summary to docs/NAME.md and the pictures to docs/images; "
                        "a section Remarks that is there is kept")
    p.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests
    args = p.parse_args(argv)
    args.threads = sorted(set(args.threads or ([cores] if args.quick else [cores, 1])),
                          reverse=True)
    args.minutes = args.minutes or (1.7 if args.quick else 24.0)
    if args.device == "cuda":
        args.threads, args.malloc = args.threads[:1], ["default"]
    if min(args.threads) < 1:
        p.error("--threads: at least 1")
    try:
        re.compile(args.cases)
    except re.error as error:
        p.error(f"--cases: {error}")
    return args


def selected(args: argparse.Namespace) -> list[case_list.Case]:
    found = case_list.select(args.device, args.quick, args.tiny)
    return [c for c in found if re.search(args.cases, c.name) or re.search(args.cases, c.group)]


# ---- one worker ---------------------------------------------------------------------------------


def worker_environment(args: argparse.Namespace, malloc: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in KEEP}
    env["OMP_NUM_THREADS"] = str(args.threads[0])
    env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helpers in the background while we measure
    if malloc == "keep":
        env.update(KEEP)
    if args.isa != "native":
        env["WCE_CPU_ISA"] = args.isa
        env["ATEN_CPU_CAPABILITY"] = ATEN_CAPABILITY[args.isa]
    return env


class Worker:
    """A process that measures cases; iterate over its messages. None: it died or went silent."""

    def __init__(self, args: argparse.Namespace, malloc: str, names: list[str],
                 deadline: float, verified: dict, log) -> None:
        config = {
            "cases": names, "malloc": malloc, "deadline": deadline, "verified": verified,
            "device": args.device, "threads": args.threads, "isa": args.isa,
            "compile": args.compile, "ours": args.ours, "quick": args.quick, "tiny": args.tiny,
        }  # fmt: skip
        command = [sys.executable, str(WORKER)]
        self._log = log
        self.process = subprocess.Popen(command, env=worker_environment(args, malloc), cwd=ROOT,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=log, text=True)
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(json.dumps(config))
        self._messages: queue.Queue[dict | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith(MARK):
                self._messages.put(json.loads(line[len(MARK):]))
            else:
                self._log.write(line)
        self._messages.put(None)

    def __iter__(self):
        while True:
            try:
                message = self._messages.get(timeout=CASE_TIMEOUT)
            except queue.Empty:
                return
            if message is None:
                return
            yield message

    def stop(self) -> str:
        """Ends the process and says how it ended."""
        if self.process.poll() is None:
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                return f"silent for {CASE_TIMEOUT} s, stopped"
        self._reader.join()
        code = self.process.returncode
        return f"worker ended with signal {-code}" if code < 0 else f"worker ended with {code}"


class Unusable(Exception):
    """The worker cannot measure anything at all."""


# ---- the run ------------------------------------------------------------------------------------


class Run:
    def __init__(self, args: argparse.Namespace, console, progress) -> None:
        self.args, self.console, self.progress = args, console, progress
        self.cases = {c.name: c for c in selected(args)}
        self.found = Findings()
        args.out.mkdir(parents=True, exist_ok=True)
        self.csv = CsvLog(args.out / "results.csv")
        self.environment = machine_facts(args)
        self.verified: dict[str, dict] = {}
        self.deadline = time.time() + 60 * args.minutes
        self.bar = progress.add_task("", total=len(self.cases) * len(args.malloc))

    def all(self) -> None:
        mallocs = list(self.args.malloc)
        with (self.args.out / "worker.log").open("w", encoding="utf-8") as log:
            for k, malloc in enumerate(mallocs):
                # The first worker also compiles for torch.compile; the others find it on disk.
                share = 0.62 if k + 1 < len(mallocs) else 1.0
                now = time.time()
                self.one_malloc(malloc, now + share * (self.deadline - now), log)
        self.csv.close()

    def one_malloc(self, malloc: str, deadline: float, log) -> None:
        """All cases with one allocator. A worker that dies costs the case that it was at."""
        waiting = list(self.cases)
        while waiting:
            worker = Worker(self.args, malloc, waiting, deadline, self.verified, log)
            current, before = None, len(waiting)
            try:
                for message in worker:
                    kind = message.pop("kind")
                    if kind == "begin":
                        current = message["case"]
                        self.progress.update(self.bar, description=f"{malloc}: {current}")
                    elif kind == "end":
                        waiting.remove(message["case"])
                        current = None
                    self.handle(kind, message, malloc)
            finally:
                ending = worker.stop()
            if current is None and len(waiting) == before:
                raise Unusable(f"{ending}; see {log.name}")
            if current is not None:
                waiting.remove(current)
                lost = {"case": current, "status": f"failed: {ending}", "notes": []}
                self.handle("end", lost, malloc)

    def handle(self, kind: str, message: dict, malloc: str) -> None:
        if kind == "unusable":
            raise Unusable(message["reason"])
        if kind == "environment":
            self.environment.update(message)
        elif kind == "ceilings":
            self.environment["ceilings"].append(message)
        elif kind == "verified":
            self.verified[message["case"]] = message
        elif kind == "row":
            self.add_row(message, malloc)
        elif kind == "end":
            self.finish_case(message, malloc)
        if kind in ("environment", "ceilings"):
            text = json.dumps(self.environment, indent=1) + "\n"
            (self.args.out / "environment.json").write_text(text, encoding="utf-8")

    def run_columns(self, name: str, malloc: str) -> dict:
        settings = {"malloc": malloc, "device": self.args.device, "isa": self.args.isa}
        return {**case_columns(self.cases[name]), **settings}

    def add_row(self, message: dict, malloc: str) -> None:
        row = {**self.run_columns(message["case"], malloc), "status": "ok", **message}
        self.found.add(row)
        self.csv.write(row)

    def finish_case(self, message: dict, malloc: str) -> None:
        name, status, notes = message["case"], message["status"], message["notes"]
        self.found.status.append((name, malloc, status, notes))
        self.progress.advance(self.bar)
        if status != "ok":
            self.csv.write({**self.run_columns(name, malloc), "status": status})
            self.console.print(f"{malloc}: {name}: {status}", style="red", markup=False)
            return
        self.console.print(f"{malloc}: {name}: {self.headline(name, malloc)}", markup=False)

    def headline(self, name: str, malloc: str) -> str:
        """Ratios of the case, the first number of threads."""
        words = []
        for part, short in (("forward", "fwd"), ("training", "fwd+bwd")):
            ratios = [
                f"{row['ratio']:.2f}x {row['rival']}"
                for row in self.found.rows
                if (row["case"], row["malloc"], row["pass"]) == (name, malloc, part)
                and row["threads"] == self.args.threads[0] and row["rival"] != "ours"
            ]
            words.append(f"{short} {', '.join(ratios)}")
        return "; ".join(words)


def machine_facts(args: argparse.Namespace) -> dict:
    facts = {
        "command": " ".join(["python", "benchmarks/bench.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "huge_pages": _huge_pages(),
        "threads": args.threads, "isa": args.isa, "ours": args.ours, "ceilings": [],
    }  # fmt: skip
    return facts


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _huge_pages() -> str:
    try:
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
    except OSError:
        return "unknown"


def finish(run: Run, console) -> None:
    from benchmarks import plots

    run.environment["minutes"] = round((time.time() - run.deadline) / 60 + run.args.minutes, 1)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    run.environment["largest_process_GiB"] = round(peak, 2)
    print_tables(run.found, console)
    for line in target_lines(run.found):
        console.print("  ".join(line), markup=False)
    out = run.args.out
    text = summary(run.found, run.environment)
    (out / "summary.md").write_text(text, encoding="utf-8")
    pictures = plots.draw(run.found, out)
    if run.args.publish:
        publish(run.args.publish, ROOT / "docs", text, pictures)
    console.print(f"results: {', '.join(str(p) for p in [out / 'summary.md', *pictures])}",
                  markup=False)


def no_gpu() -> str:
    """Why CUDA cannot be measured here, or nothing."""
    import torch

    import wce_torch

    if not torch.version.cuda:
        return "this PyTorch was built without CUDA"
    if not wce_torch.build_info()["cuda"]:
        return "wce_torch was built without CUDA kernels; build it with WCE_CUDA=1"
    return "" if torch.cuda.is_available() else "PyTorch finds no CUDA GPU"


def main(argv: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    args = parse(argv)
    wide = {} if sys.stdout.isatty() else {"width": 220}
    console = Console(**wide)
    if args.device == "cuda" and no_gpu():
        console.print(f"skipped: {no_gpu()}")
        return 0
    if args.list:
        for case in selected(args):
            console.print(f"{case.group:9} {case.name}", markup=False)
        return 0
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        run = Run(args, console, progress)
        if not run.cases:
            console.print(f"no case matches {args.cases!r}; --list shows them", markup=False)
            return 2
        try:
            run.all()
        except Unusable as error:
            console.print(f"cannot measure: {error}", style="red", markup=False)
            return 2
    finish(run, console)
    bad = [s for s in run.found.status if s[2].startswith(("wrong", "failed"))]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

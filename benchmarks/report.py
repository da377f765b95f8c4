"""Findings to people: CSV as they come, a table in the terminal, a summary in Markdown."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import Case

COLUMNS = (
    "case", "group", "shape", "dtype", "layout", "target", "smoothing", "reduction", "values",
    "feature", "autocast", "series", "device", "isa", "malloc", "threads", "rival", "pass",
    "rounds", "median_us", "q25_us", "q75_us", "ns_per_element", "ratio", "ratio_q25",
    "ratio_q75", "ceiling_us", "ceiling_share", "limit", "loss_error_ulp", "grad_error",
    "peak_buffers", "status",
)  # fmt: skip

# Ratio of native's time to ours, forward + backward: (must, aim) against eager with the default
# allocator, (must, aim) against the better of eager and torch.compile with memory kept.
TARGETS = {
    "long": ("C >= 1000", (6, 12), (3, 5)),
    "few": ("C <= 19, many rows", (10, 20), (3, 5)),
    "middle": ("20 <= C < 1000", (4, 8), (3, 4)),
    "planes": ("channel-first, channels_last", (6, 10), (3, 4)),
    "soft": ("soft targets", (5, 10), (2, 3)),
    "f64": ("fp64", (2, 4), (1.5, 2)),
}
SMALL_TARGETS = {"forward": (1.5, 2.5), "training": (1.1, 1.4)}


class CsvLog:
    """One line per case, setting, rival and pass, on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, extrasaction="ignore")
        self._writer.writeheader()
        self._file.flush()

    def write(self, row: dict) -> None:
        self._writer.writerow({k: _rounded(v) for k, v in row.items()})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def case_columns(case: Case) -> dict:
    names = ("group", "dtype", "layout", "target", "smoothing", "reduction", "values", "feature",
             "autocast", "series")
    return {
        "case": case.name,
        "shape": "x".join(map(str, case.shape)),
        **{name: getattr(case, name) for name in names},
    }


@dataclass(frozen=True)
class Setting:
    malloc: str
    threads: int

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)}, {self.malloc} malloc"


class Findings:
    """The rows of a run, found by case, setting, rival and pass."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.status: list[tuple[str, str, str, list[str]]] = []  # case, malloc, status, notes
        self._index: dict[tuple, dict] = {}

    def add(self, row: dict) -> None:
        self.rows.append(row)
        key = (row["case"], row["malloc"], row["threads"], row["rival"], row["pass"])
        self._index[key] = row

    def get(self, case: str, setting: Setting, rival: str, part: str) -> dict | None:
        return self._index.get((case, setting.malloc, setting.threads, rival, part))

    def ratio(self, case: str, setting: Setting, rival: str, part: str) -> float | None:
        row = self.get(case, setting, rival, part)
        return row["ratio"] if row else None

    def cases(self, scaling: bool = False) -> list[str]:
        return list(dict.fromkeys(r["case"] for r in self.rows if bool(r["series"]) == scaling))

    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(Setting(r["malloc"], r["threads"]) for r in self.rows))

    def group(self, case: str) -> str:
        return next(r["group"] for r in self.rows if r["case"] == case)


# ---- cells --------------------------------------------------------------------------------------


def _time(row: dict | None) -> str:
    if row is None:
        return ""
    us = row["median_us"]
    return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"


def _ratio(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['ratio']:.2f} ({row['ratio_q25']:.2f}-{row['ratio_q75']:.2f})"


def _share(row: dict | None) -> str:
    if row is None or not row["ceiling_share"]:
        return ""
    return f"{row['ceiling_share']:.0%} {row['limit']}"


def _error(row: dict | None) -> str:
    return f"{row['loss_error_ulp']:.1f}, {row['grad_error']:.0e}" if row else ""


def _buffers(row: dict | None, other: dict | None) -> str:
    if row is None or row["peak_buffers"] is None:
        return ""
    theirs = f" / {other['peak_buffers']:.2f}" if other else ""
    return f"{row['peak_buffers']:.2f}{theirs}"


HEADINGS = (
    "case", "error: ulp, gradient", "fwd", "eager/ours", "compile/ours", "of ceiling",
    "fwd+bwd", "eager/ours", "compile/ours", "of ceiling", "bwd of ceiling",
    "buffers, ours / eager",
)  # fmt: skip


def case_cells(found: Findings, case: str, setting: Setting) -> list[str]:
    """One line of the table; HEADINGS names the columns."""

    def row(rival: str, part: str) -> dict | None:
        return found.get(case, setting, rival, part)

    return [
        case,
        _error(row("ours", "forward")),
        _time(row("ours", "forward")),
        _ratio(row("eager", "forward")),
        _ratio(row("compile", "forward")),
        _share(row("ours", "forward")),
        _time(row("ours", "training")),
        _ratio(row("eager", "training")),
        _ratio(row("compile", "training")),
        _share(row("ours", "training")),
        _share(row("ours", "backward")),
        _buffers(row("ours", "training"), row("eager", "training")),
    ]


def _table_rows(found: Findings, setting: Setting) -> list[list[str]]:
    measured = [c for c in found.cases() if found.get(c, setting, "ours", "forward")]
    return [case_cells(found, case, setting) for case in measured]


def print_tables(found: Findings, console) -> None:
    from rich.table import Table

    for setting in found.settings():
        rows = _table_rows(found, setting)
        if not rows:
            continue
        table = Table(title=str(setting), title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "case" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


# ---- targets ------------------------------------------------------------------------------------


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _verdict(ratios: dict[str, float], must: float, aim: float) -> list[str]:
    if not ratios:
        return ["-"] * 4
    worst = min(ratios, key=ratios.__getitem__)
    count = len(ratios)
    return [
        f"{ratios[worst]:.2f}, {worst}",
        f"{_geometric_mean(list(ratios.values())):.2f}",
        f"{sum(r >= must for r in ratios.values())} of {count}",
        f"{sum(r >= aim for r in ratios.values())} of {count}",
    ]


def _against_eager(found: Findings, group: str, setting: Setting, part: str) -> dict[str, float]:
    named = {c: found.ratio(c, setting, "eager", part)
             for c in found.cases() if found.group(c) == group}
    return {c: r for c, r in named.items() if r}


def _against_best(found: Findings, group: str, setting: Setting) -> dict[str, float]:
    """Only cases where torch.compile ran as well."""
    best = {}
    for case, eager in _against_eager(found, group, setting, "training").items():
        other = found.ratio(case, setting, "compile", "training")
        if other:
            best[case] = min(eager, other)
    return best


def target_lines(found: Findings) -> list[list[str]]:
    """Row, rival, must, aim, lowest ratio, geometric mean, cases at must, cases at aim."""
    settings = found.settings()
    if not settings:
        return []
    threads = max(s.threads for s in settings)
    default, kept = Setting("default", threads), Setting("keep", threads)
    lines = []
    for group, (title, first, second) in TARGETS.items():
        ratios = _against_eager(found, group, default, "training")
        lines.append([title, "eager", *_pair(first), *_verdict(ratios, *first)])
        best = _against_best(found, group, kept)
        lines.append([title, "better of both, memory kept", *_pair(second),
                      *_verdict(best, *second)])
    for part, pair in SMALL_TARGETS.items():
        title = f"small calls, {'forward' if part == 'forward' else 'forward + backward'}"
        ratios = _against_eager(found, "small", default, part)
        lines.append([title, "eager", *_pair(pair), *_verdict(ratios, *pair)])
    ratios = _against_eager(found, "features", default, "training")
    lines.append(["features, composed / ours", "eager", "2", "-", *_verdict(ratios, 2, 2)])
    return lines


def _pair(pair: tuple[float, float]) -> list[str]:
    return [f"{v:g}" for v in pair]


TARGET_HEADINGS = ("row", "against", "must", "aim", "lowest, and where", "geometric mean",
                   "cases at must", "cases at aim")


def feature_lines(found: Findings) -> list[list[str]]:
    """What a feature costs over the plain call: case, setting, forward, forward + backward."""
    lines = []
    for case in found.cases():
        for setting in found.settings():
            costs = [found.ratio(case, setting, "plain", part) for part in ("forward", "training")]
            if all(costs):
                lines.append([case, str(setting), *(f"{1 / c - 1:+.0%}" for c in costs)])
    return lines


def losing_lines(found: Findings) -> list[str]:
    """Where a rival is faster than ours."""
    lines = []
    for row in found.rows:
        if row["rival"] not in ("ours", "plain") and row["ratio"] < 1 and not row["series"]:
            setting = Setting(row["malloc"], row["threads"])
            lines.append(f"{row['case']}, {row['pass']}, {setting}: {row['rival']} takes "
                         f"{row['ratio']:.2f} of our time")
    return lines


def cliff_lines(found: Findings, limit: float = 2.0) -> list[str]:
    """Neighbouring points of a scaling curve whose time per element jumps up by more than limit.

    Points of under 100 000 elements are left out: there the cost of a call is most of the time.
    """
    curves: dict[tuple, list[tuple[int, dict]]] = {}
    for row in found.rows:
        n, c = (int(v) for v in row["shape"].split("x")[:2])
        if row["series"] and row["rival"] == "ours" and row["ns_per_element"]:
            elements = row["median_us"] * 1e3 / row["ns_per_element"]
            key = (row["series"], row["malloc"], row["pass"])
            if elements >= 1e5:
                curves.setdefault(key, []).append((n if row["series"] == "rows" else c, row))
    lines = []
    for (series, malloc, part), points in curves.items():
        points.sort(key=lambda p: p[0])
        for (_, a), (_, b) in zip(points, points[1:], strict=False):
            jump = b["ns_per_element"] / a["ns_per_element"]
            if jump > limit:
                lines.append(f"{series}, {part}, {malloc} malloc: {a['shape']} to {b['shape']}, "
                             f"{a['ns_per_element']:.3f} to {b['ns_per_element']:.3f} ns")
    return lines


def remark_lines(found: Findings) -> list[str]:
    """Whatever is to be said about cases, those of the same fate in one line."""
    fates: dict[tuple[str, str], list[str]] = {}
    for case, malloc, status, notes in found.status:
        words = "; ".join([status] * (status != "ok") + notes)
        if words:
            fates.setdefault((words, malloc), []).append(case)
    return [f"{words} ({malloc} malloc): {', '.join(names)}"
            for (words, malloc), names in fates.items()]


# ---- Markdown -----------------------------------------------------------------------------------


def _markdown(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


HOW_TO = """\
Made by `make bench`, that is `python benchmarks/bench.py`, which takes up to 25 minutes and wants a
quiet machine; `make bench QUICK=1` gives a first impression in two. `--cases REGEX` picks cases,
`--isa avx2` holds all rivals to that instruction set, `--ours native` puts native in our place and
so shows the noise of the measurement, `--publish NAME` writes docs/NAME.md. Every case was
compared with a float64 computation, loss and gradient, before it was timed.
"""

BYTE_RULE = """\
Times are medians of interleaved rounds (ours, eager, torch.compile, ours, ...) in one process;
`eager/ours` is the ratio of medians, in brackets the 25 % and 75 % quantiles of the ratio per
round. Above 1, ours is faster. fwd runs under `no_grad`; fwd+bwd is a training step as it repeats
itself, whose gradient ours makes in forward (of logits above 16 KiB), and includes the release of
the gradient; bwd is backward alone, with upstream gradients of 1 and 2 in turn, which nobody can
expect. Error: the loss in units of the last place of its type, the gradient as its largest error
over its largest entry, both against float64.

Ceiling: the time of a bare read (forward: the logits, and a soft target, once each) or a bare copy
(backward and forward + backward: logits read and gradient written once, a soft target read once) of
the same bytes with the same threads, timed in the same rounds; or, where longer (`exp`), one exp
per float32 or 16-bit element at the rate measured from L1. The copy goes to memory that is already
mapped. Logits under 4 MiB have no ceiling. Buffers: most memory held at once in forward + backward
beyond the inputs, in units of the logits' size.
"""


def summary(found: Findings, environment: dict) -> str:
    """The whole run as one Markdown page."""
    title = f"# Benchmark: {environment['processor']}\n"
    parts = [title, HOW_TO, BYTE_RULE, *_environment(environment)]
    parts.append("## Targets, all threads, forward + backward unless said\n")
    parts.append(_markdown(TARGET_HEADINGS, target_lines(found)))
    for setting in found.settings():
        rows = _table_rows(found, setting)
        if rows:
            parts += [f"## {setting}\n", _markdown(HEADINGS, rows)]
    features = feature_lines(found)
    if features:
        parts.append("## Cost of a feature over the plain call of ours\n")
        parts.append(_markdown(("case", "setting", "forward", "forward + backward"), features))
    parts += _others(found)
    lists = {
        "Cases that we lose": losing_lines(found),
        "Jumps of more than 2x between neighbours of a scaling curve": cliff_lines(found),
        "Cases without a number, and remarks": remark_lines(found),
    }
    for title, lines in lists.items():
        parts += [f"## {title}\n", "\n".join(f"* {line}" for line in lines or ["none"]) + "\n"]
    return "\n".join(parts)


def _environment(facts: dict) -> list[str]:
    """Machine, versions and settings; then what the machine can do at best."""
    rows = [
        [key, value if isinstance(value, str) else json.dumps(value)]
        for key, value in facts.items()
        if key != "ceilings"
    ]
    ceilings = [
        [c["malloc"], str(c["threads"]), f"{c['read_GBps']:.1f}", f"{c['copy_GBps']:.1f}",
         f"{c['exp_G_per_s']:.1f}" if c["exp_G_per_s"] else "-", c["helper"]]
        for c in facts.get("ceilings", [])
    ]
    headings = ("malloc", "threads", "read, GB/s", "copy (both directions), GB/s",
                "exp, 1e9 per s", "measured by")
    return ["## Machine and settings\n", _markdown(("what", "value"), rows),
            "## Ceilings of the machine\n", _markdown(headings, ceilings)]


def publish(name: str, docs: Path, text: str, pictures: list[Path]) -> Path:
    """Puts a summary into the documentation, pictures beside it. Returns the page.

    The section "Remarks" of the page that was there, written by hand, is kept.
    """
    page = docs / f"{name}.md"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    _, mark, remarks = old.partition("\n## Remarks\n")
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    links = []
    for picture in pictures:
        copy = images / f"{name}-{picture.name}"
        copy.write_bytes(picture.read_bytes())
        links.append(f"![{picture.stem}](images/{copy.name})\n")
    page.write_text("\n".join([text, "## Pictures\n", *links]) + mark + remarks, encoding="utf-8")
    return page


def _others(found: Findings) -> list[str]:
    """quack and Liger, where they were measured."""
    lines = []
    for row in found.rows:
        if row["rival"] in ("quack", "liger") and not row["series"]:
            setting = Setting(row["malloc"], row["threads"])
            lines.append([row["case"], str(setting), row["rival"], row["pass"], _time(row),
                          _ratio(row)])
    if not lines:
        return []
    headings = ("case", "setting", "rival", "pass", "its time", "rival/ours")
    return ["## Other libraries\n", _markdown(headings, lines)]

"""Pictures of a run: ratios, shares of the ceiling, scaling curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.report import Findings, Setting  # noqa: E402

COLOURS = {"ours": "#1b6ca8", "eager": "#d1495b", "compile": "#edae49"}
PASSES = {"forward": "forward", "backward": "backward", "training": "forward + backward"}


def _bars(axes, labels: list[str], series: dict[str, tuple[list, str, float]],
          base: float) -> None:
    """Horizontal bars side by side that begin at base; series: name -> (values, colour, opacity).
    None: no bar."""
    series = {name: s for name, s in series.items() if any(s[0])}
    height = 0.8 / max(len(series), 1)
    for k, (name, (values, colour, alpha)) in enumerate(series.items()):
        at = [i + (k + 0.5) * height - 0.4 for i in range(len(labels))]
        widths = [v - base if v else 0 for v in values]
        axes.barh(at, widths, height, base, color=colour, alpha=alpha, label=name)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1 + 0.6 / len(labels)),
                ncols=2)


def ratios(found: Findings, path: Path) -> None:
    """How many times longer native takes, per case, with all threads."""
    cases, settings = found.cases(), _all_threads(found)
    figure, panels = plt.subplots(1, 2, figsize=(13, 1.6 + 0.34 * len(cases)), sharey=True)
    for axes, part in zip(panels, ("forward", "training"), strict=True):
        title, series = PASSES[part], {}
        for setting, alpha in zip(settings, (1.0, 0.5), strict=False):
            for rival in ("eager", "compile"):
                values = [found.ratio(c, setting, rival, part) for c in cases]
                label = f"{rival} / ours, {setting.malloc} malloc"
                series[label] = (values, COLOURS[rival], alpha)
        axes.set_xscale("log")
        _bars(axes, cases, series, 1.0)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel(f"{title}: times our time (above 1: ours is faster)")
    _save(figure, path)


def shares(found: Findings, path: Path) -> None:
    """Time of the bare memory traffic (or exp) over our time."""
    settings = _all_threads(found)

    def share(case: str, setting: Setting, part: str) -> float | None:
        row = found.get(case, setting, "ours", part)
        return row["ceiling_share"] if row else None

    parts = ("forward", "backward", "training")
    cases = [c for c in found.cases() if any(share(c, s, p) for s in settings for p in parts)]
    if not cases:
        return
    figure, panels = plt.subplots(1, 3, figsize=(16, 1.6 + 0.3 * len(cases)), sharey=True)
    for axes, part in zip(panels, parts, strict=True):
        series = {
            f"{s.malloc} malloc": ([share(c, s, part) for c in cases], COLOURS["ours"], alpha)
            for s, alpha in zip(settings, (1.0, 0.5), strict=False)
        }
        _bars(axes, cases, series, 0.0)
        axes.axvline(0.9, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel(f"{PASSES[part]}: share of the machine's ceiling (dashed: 90 %)")
    _save(figure, path)


def scaling(found: Findings, path: Path) -> None:
    """Time per element along the scaling curves."""
    rows = [r for r in found.rows if r["series"]]
    titles = {
        "rows": ("N, rows of C = 10", 0),
        "classes": ("C, at a fixed number of elements", 1),
        "planes": ("C, channel-first (1, C, positions)", 1),
    }
    names = [n for n in titles if any(r["series"] == n for r in rows)]
    if not names:
        return
    figure, panels = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4.5), squeeze=False)
    mallocs = list(dict.fromkeys(r["malloc"] for r in rows))
    for axes, name in zip(panels[0], names, strict=True):
        label, axis = titles[name]
        for rival in ("ours", "eager"):
            for part, width in (("forward", 1.0), ("training", 2.0)):
                for malloc in mallocs:
                    points = sorted(
                        (int(r["shape"].split("x")[axis]), r["ns_per_element"])
                        for r in rows
                        if (r["series"], r["rival"], r["pass"], r["malloc"])
                        == (name, rival, part, malloc)
                    )
                    if points:
                        axes.plot(*zip(*points, strict=True), color=COLOURS[rival],
                                  linewidth=width, marker=".",
                                  linestyle="-" if malloc == mallocs[0] else ":",
                                  label=f"{rival}, {PASSES[part]}, {malloc}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("ns per element")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    _save(figure, path)


def _all_threads(found: Findings) -> list[Setting]:
    settings = found.settings()
    most = max((s.threads for s in settings), default=0)
    return [s for s in settings if s.threads == most]


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(found: Findings, folder: Path) -> list[Path]:
    """Writes the pictures that the findings allow, and says which."""
    if not found.rows:
        return []
    pictures = {"ratios.png": ratios, "share.png": shares, "scaling.png": scaling}
    for name, function in pictures.items():
        (folder / name).unlink(missing_ok=True)
        if function is scaling or found.cases():
            function(found, folder / name)
    return [folder / name for name in pictures if (folder / name).exists()]

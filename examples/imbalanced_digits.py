#!/usr/bin/env python3
"""Trains a small network on imbalanced handwritten digits, with torch's loss and with ours.

scikit-learn's 8x8 digits are made imbalanced: of the training images of class 0 all are kept, of
class 9 one in twenty. The same network is trained from the same seed

    with torch.nn.CrossEntropyLoss(weight=w),
    with wce_torch.CrossEntropyLoss(weight=w)      (the curves are equal up to rounding),
    with wce_torch.CrossEntropyLoss()              (what do the weights do for the rare classes?)

and the balanced test set says how many images of each class are recognised. Prints the loss
curves side by side, the recall of each class and the time spent in the loss; draws a picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402
from torch import nn  # noqa: E402

import wce_torch  # noqa: E402

CLASSES = 10
RAREST = 1 / 20  # part of the training images of class 9 that is kept
BATCH = 64


@dataclass
class Digits:
    """Images [n, 1, 8, 8] in 0..1 and labels [n]; counts [10] of the training labels."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    counts: torch.Tensor


@dataclass
class Outcome:
    """What one training gave. losses: mean over the batches of each epoch."""

    losses: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    loss_seconds: float = 0.0
    seconds: float = 0.0


def imbalanced_digits(seed: int) -> Digits:
    """Half of the images for the test; of the rest, class c keeps the part RAREST**(c/9)."""
    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16,
        torch.tensor(data.target),
        test_size=0.5, stratify=data.target, random_state=seed,
    )  # fmt: skip
    keep = []
    for c in range(CLASSES):
        members = (train_y == c).nonzero().flatten()
        keep.append(members[: max(round(len(members) * RAREST ** (c / (CLASSES - 1))), 1)])
    kept = torch.cat(keep)
    labels = train_y[kept]
    counts = torch.bincount(labels, minlength=CLASSES)
    return Digits(train_x[kept], labels, test_x, test_y, counts)


def network() -> nn.Module:
    """Smooth on purpose: a ReLU or a maximum would turn a rounding error into another branch, and
    two trainings that differ in the last bit would drift apart, whatever the loss."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(128, CLASSES),
    )  # fmt: skip


def train(digits: Digits, criterion: nn.Module, epochs: int, seed: int, tick) -> Outcome:
    """Trains from the seed. tick() is called after each epoch."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    outcome, start = Outcome(), time.perf_counter()
    for _ in range(epochs):
        batches = torch.randperm(len(digits.labels)).split(BATCH)
        total = 0.0
        for batch in batches:
            optimizer.zero_grad()
            logits = model(digits.images[batch])
            # The loss gets a leaf of its own, so that its forward and backward can be timed alone.
            leaf = logits.detach().requires_grad_()
            begin = time.perf_counter()
            loss = criterion(leaf, digits.labels[batch])
            loss.backward()
            outcome.loss_seconds += time.perf_counter() - begin
            logits.backward(leaf.grad)
            optimizer.step()
            total += loss.item()
        outcome.losses.append(total / len(batches))
        tick()
    outcome.seconds = time.perf_counter() - start
    outcome.recall = recall(model, digits)
    return outcome


@torch.no_grad()
def recall(model: nn.Module, digits: Digits) -> list[float]:
    """Per class, the part of its test images that are recognised."""
    guesses = model(digits.test_images).argmax(1)
    right = guesses == digits.test_labels
    return [right[digits.test_labels == c].float().mean().item() for c in range(CLASSES)]


def largest_difference(a: Outcome, b: Outcome) -> float:
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def show_curves(console: Console, native: Outcome, ours: Outcome) -> None:
    table = Table(title="training loss, weighted", title_justify="left")
    for heading in ("epoch", "torch.nn", "wce_torch", "difference"):
        table.add_column(heading, justify="right")
    epochs = len(native.losses)
    for k in sorted({round(i * (epochs - 1) / 9) for i in range(10)}):
        a, b = native.losses[k], ours.losses[k]
        table.add_row(str(k + 1), f"{a:.7f}", f"{b:.7f}", f"{b - a:+.1e}")
    console.print(table)
    console.print(f"largest difference between the curves: {largest_difference(native, ours):.2e}")


def show_recall(console: Console, digits: Digits, plain: Outcome, weighted: Outcome) -> None:
    table = Table(title="recall on the balanced test set", title_justify="left")
    for heading in ("class", "training images", "without weights", "with weights"):
        table.add_column(heading, justify="right")
    for c in range(CLASSES):
        table.add_row(str(c), str(int(digits.counts[c])), f"{plain.recall[c]:.1%}",
                      f"{weighted.recall[c]:.1%}")
    means = [sum(o.recall) / CLASSES for o in (plain, weighted)]
    table.add_row("mean", "", *(f"{m:.1%}" for m in means), style="bold")
    console.print(table)


def show_times(console: Console, outcomes: dict[str, Outcome]) -> None:
    table = Table(title="time", title_justify="left")
    for heading in ("loss", "in the loss (forward + backward)", "whole training"):
        table.add_column(heading, justify="right")
    for name, outcome in outcomes.items():
        table.add_row(name, f"{outcome.loss_seconds * 1e3:.0f} ms", f"{outcome.seconds:.1f} s")
    console.print(table)


def draw(path: Path, digits: Digits, native: Outcome, ours: Outcome, plain: Outcome) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5))
    epochs = range(1, len(native.losses) + 1)
    left.plot(epochs, native.losses, color="#edae49", linewidth=5, label="torch.nn, weighted")
    left.plot(epochs, ours.losses, color="#1b6ca8", linewidth=1.2, label="wce_torch, weighted")
    left.plot(epochs, plain.losses, color="grey", linestyle=":", label="wce_torch, no weights")
    left.set(title="training loss", xlabel="epoch", ylabel="mean loss", yscale="log")
    left.legend()

    gap = [abs(a - b) for a, b in zip(native.losses, ours.losses, strict=True)]
    middle.plot(epochs, [max(g, 1e-10) for g in gap], color="#d1495b")
    middle.set(title="difference of the two weighted curves", xlabel="epoch", yscale="log",
               ylabel="|torch.nn - wce_torch|")

    at = torch.arange(CLASSES)
    right.bar(at - 0.2, plain.recall, 0.4, color="grey", label="no weights")
    right.bar(at + 0.2, ours.recall, 0.4, color="#1b6ca8", label="weights")
    right.set(title="recall per class, balanced test set", xlabel="class (training images)",
              ylim=(0, 1.2))
    right.set_xticks(at.tolist(), [f"{c}\n({int(n)})" for c, n in enumerate(digits.counts)])
    right.legend(loc="upper right", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--epochs", type=int, default=80, metavar="N", help="default: 80")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "examples", metavar="DIR",
                   help="folder of the picture (default: out/examples)")
    args = p.parse_args(argv)
    if args.epochs < 1:
        p.error("--epochs: at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console()
    digits = imbalanced_digits(args.seed)
    # Inverse frequency, scaled so that the weights of the training set have the mean 1.
    w = len(digits.labels) / (CLASSES * digits.counts.float())
    criteria = {
        "torch.nn, weighted": nn.CrossEntropyLoss(weight=w),
        "wce_torch, weighted": wce_torch.CrossEntropyLoss(weight=w),
        "wce_torch, no weights": wce_torch.CrossEntropyLoss(),
    }
    outcomes = {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for name, criterion in criteria.items():
            bar = progress.add_task(name, total=args.epochs)
            outcomes[name] = train(digits, criterion, args.epochs, args.seed,
                                   lambda bar=bar: progress.advance(bar))
    native, ours, plain = outcomes.values()
    show_curves(console, native, ours)
    show_recall(console, digits, plain, ours)
    show_times(console, outcomes)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "imbalanced_digits.png"
    draw(picture, digits, native, ours, plain)
    console.print(f"picture: {picture}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

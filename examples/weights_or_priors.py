"""What do class weights do, what does a prior inside the softmax do, and what does neither?

Trains the same small networks with four losses on real data made imbalanced, and measures what
comes out. The text that goes with it is docs/weights-and-priors.md.

    python examples/weights_or_priors.py                     a few minutes on two cores
    python examples/weights_or_priors.py --quick             seconds; numbers mean nothing

Writes pictures, weights-or-priors.json (every number) and weights-or-priors.md (the tables) to
--out. With --doc FILE the tables also replace those between the markers of FILE, and the pictures
go to the folder images beside it.

Letters: K classes, n_k training samples of class k, q_k = n_k/n, w_k = n/(K*n_k), x logits,
y target.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn import datasets
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from tqdm import tqdm

from wce_torch import cross_entropy, cross_entropy_from_probs

PENALTIES = (1e-3, 3e-3, 1e-2)
BINS = 10
NEIGHBOURS = 15

# How each trained network is read at test time: name -> (loss trained with, logits -> logits).
READINGS: dict[str, tuple[str, Callable[[Tensor, Task], Tensor]]] = {
    "plain": ("plain", lambda x, task: x),
    "plain, log q taken off at test": ("plain", lambda x, task: x - task.q.log()),
    "weights": ("weights", lambda x, task: x),
    "weights, log w taken off at test": ("weights", lambda x, task: x - task.w.log()),
    "prior, left out at test": ("prior", lambda x, task: x),
    "prior, kept at test": ("prior", lambda x, task: x + task.q.log()),
    "wrong formula": ("wrong", lambda x, task: x),
}
COLOURS = {
    "plain": "#4c566a", "weights": "#1b7837", "prior, left out at test": "#2166ac",
    "prior, kept at test": "#92c5de", "wrong formula": "#b2182b",
}  # fmt: skip


# ---- losses --------------------------------------------------------------------------------------


def wrong_loss(x: Tensor, y: Tensor, w: Tensor, reduction: str = "mean") -> Tensor:
    """-w_y*x_y + log(sum_j w_j*exp(x_j)): looks like a weighted cross entropy and is none."""
    rows = -w[y] * x.gather(1, y[:, None])[:, 0] + (x + w.log()).logsumexp(1)
    return rows.mean() if reduction == "mean" else rows


def losses_of(task: Task) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "plain": lambda x, y: cross_entropy(x, y),
        "weights": lambda x, y: cross_entropy(x, y, weight=task.w),
        "prior": lambda x, y: cross_entropy(x, y, class_prior=task.counts),
        "wrong": lambda x, y: wrong_loss(x, y, task.w),
    }


# ---- data ----------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One split. Features are standardised; class 0 is the most frequent in training."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    counts: Tensor  # (K), float

    @property
    def q(self) -> Tensor:
        return self.counts / self.counts.sum()

    @property
    def w(self) -> Tensor:
        return self.counts.sum() / (len(self.counts) * self.counts)


def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits, 8x8 shrunk to 4x4 pixels so that the classes overlap."""
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)
    return images.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1), torch.tensor(data.target)


def cancer() -> tuple[Tensor, Tensor]:
    """Breast tumours by three of the 30 features; class 0 benign, 1 malignant."""
    data = datasets.load_breast_cancer()
    names = list(data.feature_names)
    columns = [names.index(f"mean {f}") for f in ("texture", "smoothness", "symmetry")]
    return torch.tensor(data.data[:, columns], dtype=torch.float32), 1 - torch.tensor(data.target)


def wine() -> tuple[Tensor, Tensor]:
    data = datasets.load_wine()
    return torch.tensor(data.data[:, :3], dtype=torch.float32), torch.tensor(data.target)


DATA = {"digits": (digits, 20), "breast cancer": (cancer, 10)}  # (loader, most : least frequent)


def make_task(x: Tensor, y: Tensor, ratio: float, seed: int) -> Task:
    """Half of each class is for testing; the other half is thinned to n_0 * ratio^(-k/(K-1)).

    With more than two classes their order is drawn anew for each seed, so that no class is rare
    because of what it looks like.
    """
    g = torch.Generator().manual_seed(seed)
    classes = int(y.max()) + 1
    order = torch.randperm(classes, generator=g) if classes > 2 else torch.arange(classes)
    y = order.argsort()[y]
    test, pools = [], []
    for k in range(classes):
        members = (y == k).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=g)]
        test.append(members[: len(members) // 2])
        pools.append(members[len(members) // 2 :])
    largest = min(len(pool) for pool in pools)
    sizes = [max(2, round(largest * ratio ** (-k / (classes - 1)))) for k in range(classes)]
    train = torch.cat([pool[:n] for pool, n in zip(pools, sizes, strict=True)])
    test = torch.cat(test)
    x = (x - x[train].mean(0)) / x[train].std(0)
    return Task(x[train], y[train], x[test], y[test], torch.tensor(sizes, dtype=torch.float32))


# ---- training ------------------------------------------------------------------------------------


class Run(NamedTuple):
    logits: Tensor  # of the test samples
    loss: list[float]  # per step, without the penalty
    rare_logit: list[float]  # per step: mean over classes and training samples with w_y > 1
    frequent_logit: list[float]  # the same for w_y < 1


def train(loss: Callable, task: Task, seed: int, penalty: float, steps: int) -> Run:
    """One hidden layer, Adam on the whole training set; penalty * sum of squared weights."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(task.x.shape[1], 32), nn.Tanh(), nn.Linear(32, len(task.counts))
    )
    weights = [p for name, p in net.named_parameters() if name.endswith("weight")]
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    rare = task.w[task.y] > 1
    run = Run(None, [], [], [])
    for _ in range(steps):
        adam.zero_grad()
        x = net(task.x)
        value = loss(x, task.y)
        (value + penalty * sum(p.square().sum() for p in weights)).backward()
        adam.step()
        level = x.detach().mean(1)
        run.loss.append(value.item())
        run.rare_logit.append(level[rare].mean().item())
        run.frequent_logit.append(level[~rare].mean().item())
    return run._replace(logits=net(task.test_x).detach())


# ---- measures ------------------------------------------------------------------------------------


class Predictions(NamedTuple):
    """Of one reading on one test set, with two weights per sample (each sums to 1)."""

    probs: Tensor
    y: Tensor
    as_trained: Tensor  # the test set as if it had the training frequencies
    balanced: Tensor  # as if all classes were equally frequent

    @property
    def first_rare(self) -> int:
        """The last third of the classes is rare."""
        classes = self.probs.shape[1]
        return classes - max(1, classes // 3)

    def largest(self) -> tuple[Tensor, Tensor]:
        """The probability of the most probable class, and whether it was that one."""
        confidence, guess = self.probs.max(1)
        return confidence, (guess == self.y).float()

    def rare(self) -> tuple[Tensor, Tensor]:
        """The probability of a rare class, and whether it was one."""
        return self.probs[:, self.first_rare :].sum(1), (self.y >= self.first_rare).float()


def predictions(probs: Tensor, task: Task) -> Predictions:
    found = torch.bincount(task.test_y, minlength=len(task.counts)).float()
    as_trained = (task.q / found)[task.test_y]
    balanced = (1 / (len(found) * found))[task.test_y]
    return Predictions(probs, task.test_y, as_trained, balanced)


def reliability(stated: Tensor, hit: Tensor, weight: Tensor) -> Tensor:
    """(BINS, 3): per bin of the stated probability its weight, mean statement and mean hit."""
    bins = (stated * BINS).long().clamp(max=BINS - 1)
    sums = torch.stack([weight, weight * stated, weight * hit], 1)
    table = torch.zeros(BINS, 3).index_add(0, bins, sums)
    table[:, 1:] /= table[:, :1].clamp(min=1e-30)
    return table


def calibration_error(stated: Tensor, hit: Tensor, weight: Tensor) -> float:
    """ECE: mean over bins of |mean hit - mean statement| (Guo et al., ICML 2017, equation 3)."""
    table = reliability(stated, hit, weight)
    return float((table[:, 0] * (table[:, 2] - table[:, 1]).abs()).sum() / weight.sum())


def calibration_floor(stated: Tensor, weight: Tensor) -> float:
    """The ECE that this test set would give by chance if every statement were true."""
    g = torch.Generator().manual_seed(0)
    draws = [
        calibration_error(stated, (torch.rand(len(stated), generator=g) < stated).float(), weight)
        for _ in range(20)
    ]
    return sum(draws) / len(draws)


def measure(p: Predictions) -> dict[str, float | list[float]]:
    classes = p.probs.shape[1]
    _, hit = p.largest()
    recall = torch.zeros(classes).index_add(0, p.y, hit) / torch.bincount(p.y, minlength=classes)
    rows = cross_entropy_from_probs(p.probs, p.y, reduction="none")
    result = {
        "accuracy": float((p.as_trained * hit).sum()),
        "balanced accuracy": float(recall.mean()),
        "rare recall": float(recall[p.first_rare :].mean()),
        "recall": recall.tolist(),
    }
    for name, weight in (("as trained", p.as_trained), ("balanced", p.balanced)):
        result[f"NLL, {name}"] = float((weight * rows).sum())
        for which, (stated, hit) in (("largest", p.largest()), ("rare", p.rare())):
            result[f"ECE, {which}, {name}"] = calibration_error(stated, hit, weight)
            result[f"ECE by chance, {which}, {name}"] = calibration_floor(stated, weight)
        stated, hit = p.rare()
        result[f"rare probability, {name}"] = float((weight * stated).sum())
        result[f"rare share, {name}"] = float((weight * hit).sum())
    return result


# ---- experiments ---------------------------------------------------------------------------------


def added_constant() -> list[dict]:
    """Adds c to all logits of a row, for each loss and target."""
    x = torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.float64)
    w = torch.tensor([0.4, 1.0, 4.0], dtype=torch.float64)
    found = []
    for k in range(3):
        y = torch.tensor([k])
        losses = {
            "weight[y] * (-x[y] + log(sum_j exp(x[j])))": lambda z, y=y: cross_entropy(
                z, y, weight=w, reduction="sum"
            ),
            "prior: -log(q[y] exp(x[y]) / sum_j q[j] exp(x[j])), q = w": lambda z, y=y: (
                cross_entropy(z, y, class_prior=w)
            ),
            "-weight[y]*x[y] + log(sum_j weight[j]*exp(x[j]))": lambda z, y=y: wrong_loss(z, y, w),
        }
        for name, loss in losses.items():
            z = x.clone().requires_grad_()
            gradient, = torch.autograd.grad(loss(z), z)
            found.append({
                "formula": name, "weight of target": w[k].item(), "loss": loss(x).item(),
                "loss, 10 added": loss(x + 10).item(), "sum of gradient": gradient.sum().item(),
            })  # fmt: skip
    return found


def minimise(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """L-BFGS to convergence, float64."""
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)


def best_probabilities() -> dict:
    """The softmax that minimises each loss for one known distribution t of the target."""
    t = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    w, q = torch.tensor([1.0, 2.0, 5.0]).double(), torch.tensor([0.8, 0.15, 0.05]).double()
    losses = {
        "plain": (lambda x: cross_entropy(x, t), t),
        "weights": (lambda x: cross_entropy_from_probs(x.softmax(0), t, weight=w), w * t),
        "prior, left out": (lambda x: cross_entropy(x, t, class_prior=q), t / q),
    }
    found = {"t": t.tolist(), "w": w.tolist(), "q": q.tolist()}
    for name, (loss, expected) in losses.items():
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        minimise(lambda loss=loss, x=x: loss(x), [x])
        found[name] = {
            "found": x.softmax(0).tolist(), "expected": (expected / expected.sum()).tolist()
        }  # fmt: skip
    return found


def numerator_only(task: Task) -> dict:
    """What becomes of the loss and its gradient when log q_y leaves the numerator only."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(len(task.y), len(task.counts), generator=g).double().requires_grad_()
    counts, y = task.counts.double(), task.y
    log_q = (counts / counts.sum()).log()
    prior = cross_entropy(x, y, class_prior=counts, reduction="none")
    without = -x.gather(1, y[:, None])[:, 0] + (x + log_q).logsumexp(1)
    plain = cross_entropy(x, y, reduction="none")
    grads = [torch.autograd.grad(v.sum(), x)[0] for v in (prior, without, plain)]
    return {
        "loss minus (loss without log q_y) plus log q_y": largest(prior - without + log_q[y]),
        "gradient minus gradient without log q_y": largest(grads[0] - grads[1]),
        "gradient minus gradient of plain": largest(grads[0] - grads[2]),
    }


def convex(load: Callable, ratio: float) -> dict:
    """Logistic regression with a free bias: convex, so each loss has one optimum to compare."""
    task = make_task(*load(), ratio, seed=0)
    x, counts = task.x.double(), task.counts.double()
    log_q = (counts / counts.sum()).log()
    w = task.w.double()
    losses = {
        "plain": lambda z: cross_entropy(z, task.y),
        "prior": lambda z: cross_entropy(z, task.y, class_prior=counts),
        "weights": lambda z: cross_entropy(z, task.y, weight=w),
    }
    optimum = {}
    for name, loss in losses.items():
        a = torch.zeros(x.shape[1], len(counts), dtype=torch.float64, requires_grad=True)
        b = torch.zeros(len(counts), dtype=torch.float64, requires_grad=True)
        minimise(lambda loss=loss, a=a, b=b: loss(x @ a + b) + 1e-3 * a.square().sum(), [a, b])
        optimum[name] = (a.detach(), b.detach())
    probs = {name: task.test_x.double() @ a + b for name, (a, b) in optimum.items()}
    plain, kept = probs["plain"].softmax(1), (probs["prior"] + log_q).softmax(1)
    bias = optimum["plain"][1] - optimum["prior"][1] - log_q
    return {
        "counts": task.counts.int().tolist(),
        "plain against prior kept": largest(plain - kept),
        "plain against prior left out": largest(plain - probs["prior"].softmax(1)),
        "weights against prior left out": largest(
            probs["weights"].softmax(1) - probs["prior"].softmax(1)
        ),
        "bias of plain minus bias of prior minus log q": largest(bias - bias.mean()),
    }


def largest(difference: Tensor) -> float:
    return difference.detach().abs().max().item()


class Trained(NamedTuple):
    runs: dict[str, list[Run]]  # loss -> one per seed
    tasks: list[Task]
    penalty: float
    tried: dict[str, float]  # penalty -> NLL of plain training


def train_all(name: str, seeds: int, steps: int, progress: tqdm) -> Trained:
    """The penalty is the one that serves plain training best, by NLL at training frequencies."""
    load, ratio = DATA[name]
    tasks = [make_task(*load(), ratio, seed) for seed in range(seeds)]

    def each_seed(loss: str, penalty: float) -> list[Run]:
        runs = []
        for seed, task in enumerate(tasks):
            progress.set_postfix_str(f"{name}: {loss}, penalty {penalty}, seed {seed}")
            runs.append(train(losses_of(task)[loss], task, seed, penalty, steps))
            progress.update()
        return runs

    plain, tried = {}, {}
    for penalty in PENALTIES:
        plain[penalty] = each_seed("plain", penalty)
        scores = [
            measure(predictions(run.logits.softmax(1), task))["NLL, as trained"]
            for run, task in zip(plain[penalty], tasks, strict=True)
        ]
        tried[penalty] = sum(scores) / seeds
    best = min(tried, key=tried.get)
    runs = {"plain": plain[best]}
    for loss in ("weights", "prior", "wrong"):
        runs[loss] = each_seed(loss, best)
    return Trained(runs, tasks, best, {str(k): v for k, v in tried.items()})


def read_all(trained: Trained) -> dict[str, list[Predictions]]:
    found = {}
    for name, (loss, read) in READINGS.items():
        found[name] = [
            predictions(read(run.logits, task).softmax(1), task)
            for run, task in zip(trained.runs[loss], trained.tasks, strict=True)
        ]
    votes = [neighbour_votes(task) for task in trained.tasks]
    found["neighbours' votes"] = [
        predictions(v, t) for v, t in zip(votes, trained.tasks, strict=True)
    ]
    adjusted = [v / t.q for v, t in zip(votes, trained.tasks, strict=True)]
    found["neighbours' votes, divided by q"] = [
        predictions(a / a.sum(1, keepdim=True), t)
        for a, t in zip(adjusted, trained.tasks, strict=True)
    ]
    return found


def neighbour_votes(task: Task) -> Tensor:
    """Probabilities that no softmax made: (votes of class k + q_k) / (neighbours + 1)."""
    model = KNeighborsClassifier(min(NEIGHBOURS, len(task.y))).fit(task.x, task.y)
    votes = torch.tensor(model.predict_proba(task.test_x), dtype=torch.float32)
    return (votes * NEIGHBOURS + task.q) / (NEIGHBOURS + 1)


def undone(trained: Trained) -> dict:
    """Per class: mean over test samples of logit of plain - logit of prior, and log q; centred."""
    log_q, moved = [], []
    for plain, prior, task in zip(
        trained.runs["plain"], trained.runs["prior"], trained.tasks, strict=True
    ):
        difference = (plain.logits - prior.logits).mean(0)
        moved.append(difference - difference.mean())
        log_q.append(task.q.log() - task.q.log().mean())
    log_q, moved = torch.stack(log_q), torch.stack(moved)
    kept = [
        (run.logits + task.q.log()).softmax(1)
        for run, task in zip(trained.runs["prior"], trained.tasks, strict=True)
    ]
    plain = [run.logits.softmax(1) for run in trained.runs["plain"]]
    left_out = [run.logits.softmax(1) for run in trained.runs["prior"]]

    def apart(a: list[Tensor], b: list[Tensor]) -> float:
        return float((torch.cat(a) - torch.cat(b)).abs().sum(1).mean() / 2)

    return {
        "log q": log_q.tolist(), "difference": moved.tolist(),
        "slope": float((log_q * moved).sum() / log_q.square().sum()),
        "plain against prior kept": apart(plain, kept),
        "plain against prior left out": apart(plain, left_out),
    }  # fmt: skip


# ---- tables --------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 3) -> str:
    v = torch.tensor(values)
    mean = round(v.mean().item(), digits) + 0.0  # no -0.0
    return f"{mean:.{digits}f} ± {v.std(correction=0):.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def constant_table(found: list[dict]) -> str:
    return table(
        ["formula", "w[y]", "loss", "loss, 10 added to all logits", "sum of its gradient"],
        [
            [f"`{row['formula']}`", f"{row['weight of target']:g}", f"{row['loss']:.4f}",
             f"{row['loss, 10 added']:.4f}", f"{round(row['sum of gradient'], 4) + 0.0:.4f}"]
            for row in sorted(found, key=lambda row: row["formula"], reverse=True)
        ],
    )  # fmt: skip


def optimum_table(found: dict) -> str:
    def vector(v: list[float]) -> str:
        return ", ".join(f"{p:.4f}" for p in v)

    formulas = {"plain": "t", "weights": "w t / sum(w t)", "prior, left out": "(t/q) / sum(t/q)"}
    return table(
        ["loss", "softmax at its minimum", "formula", "formula's value"],
        [[name, vector(found[name]["found"]), f"`{formula}`", vector(found[name]["expected"])]
         for name, formula in formulas.items()],
    )  # fmt: skip


def convex_table(found: dict[str, dict]) -> str:
    keys = [key for key in next(iter(found.values())) if key != "counts"]
    heads = [f"{name} {case['counts']}" for name, case in found.items()]
    rows = [[key, *(f"{case[key]:.1e}" for case in found.values())] for key in keys]
    return table(["largest difference", *heads], rows)


def decision_table(scores: dict[str, list[dict]]) -> str:
    keys = ["accuracy", "balanced accuracy", "rare recall"]
    head = ["", "accuracy at training frequencies", "balanced accuracy",
            "recall of the rare classes"]  # fmt: skip
    rows = [[n, *(spread([s[key] for s in seeds]) for key in keys)] for n, seeds in scores.items()]
    return table(head, rows)


def calibration_table(scores: dict[str, list[dict]], where: str) -> str:
    def error(seeds: list[dict], which: str) -> str:
        chance = [s[f"ECE by chance, {which}, {where}"] for s in seeds]
        found = spread([s[f"ECE, {which}, {where}"] for s in seeds])
        return f"{found} ({sum(chance) / len(chance):.3f})"

    share = next(iter(scores.values()))[0][f"rare share, {where}"]
    head = ["", "NLL", "ECE of the largest probability (by chance)",
            f"mean probability of a rare class (true share {share:.3f})",
            "ECE of that probability (by chance)"]  # fmt: skip
    rows = [
        [name, spread([s[f"NLL, {where}"] for s in seeds]), error(seeds, "largest"),
         spread([s[f"rare probability, {where}"] for s in seeds]), error(seeds, "rare")]
        for name, seeds in scores.items()
    ]  # fmt: skip
    return table(head, rows)


PAIRS = [
    ("weights", "plain"),
    ("prior, left out at test", "plain"),
    ("prior, left out at test", "weights"),
    ("prior, left out at test", "plain, log q taken off at test"),
    ("prior, kept at test", "plain"),
    ("wrong formula", "weights"),
]


def pair_table(all_scores: dict[str, dict[str, list[dict]]]) -> str:
    """Differences within a seed: same split, same start."""
    rows = []
    for name, scores in all_scores.items():
        for a, b in PAIRS:
            difference = [
                s["balanced accuracy"] - t["balanced accuracy"]
                for s, t in zip(scores[a], scores[b], strict=True)
            ]
            better = f"{sum(d > 0 for d in difference)} of {len(difference)}"
            rows.append([name, a, b, spread(difference), better])
    return table(["data", "A", "B", "balanced accuracy, A − B", "seeds with A > B"], rows)


def drift_table(all_trained: dict[str, Trained]) -> str:
    rows = []
    for name, trained in all_trained.items():
        for loss in ("plain", "weights", "prior", "wrong"):
            runs = trained.runs[loss]
            rows.append([
                name, loss, spread([r.loss[-1] for r in runs], 2),
                spread([r.rare_logit[-1] for r in runs], 2),
                spread([r.frequent_logit[-1] for r in runs], 2),
            ])  # fmt: skip
    return table(
        ["data", "loss", "its value at the last step", "mean logit, samples with w[y] > 1",
         "mean logit, samples with w[y] < 1"],
        rows,
    )  # fmt: skip


def update_document(path: Path, tables: dict[str, str]) -> None:
    """Replaces what stands between <!-- table: name --> and <!-- end --> by the table."""
    text = path.read_text()
    for name, body in tables.items():
        pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, b=body: m[1] + b + "\n" + m[2], text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{path} has {count} places for the table {name!r}, expected 1")
    path.write_text(text)


# ---- pictures ------------------------------------------------------------------------------------


def style(axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=90, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw_drift(trained: Trained, path: Path) -> None:
    """Left: a constant on all logits of a row. Middle, right: what training makes of it."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    x, w = torch.tensor([[1.0, -0.5, 0.3]]), torch.tensor([0.4, 1.0, 4.0])
    c = torch.linspace(-5, 5, 11)
    for k, dash in enumerate(("-", "--", ":")):
        y = torch.tensor([k])
        right_formula = [cross_entropy(x + v, y, weight=w, reduction="sum") for v in c]
        wrong_formula = [wrong_loss(x + v, y, w) for v in c]
        left.plot(c, right_formula, dash, color=COLOURS["weights"])
        left.plot(c, wrong_formula, dash, color=COLOURS["wrong formula"])
        left.plot([], [], dash, color="black", label=f"w[y] = {w[k]:g}")
    for name in ("weights", "wrong formula"):
        left.plot([], [], color=COLOURS[name], label=name)
    style(left, "One row, a constant added", "added to all logits", "loss")
    left.legend(fontsize=7, loc="upper right")
    for loss, name in (("weights", "weights"), ("wrong", "wrong formula")):
        for n, run in enumerate(trained.runs[loss]):
            label = {"label": name} if n == 0 else {}
            middle.plot(run.loss, color=COLOURS[name], linewidth=0.8, alpha=0.7, **label)
            for values, dash, who in ((run.rare_logit, "-", "w[y] > 1"),
                                      (run.frequent_logit, "--", "w[y] < 1")):  # fmt: skip
                label = {"label": f"{name}, {who}"} if n == 0 else {}
                right.plot(values, dash, color=COLOURS[name], linewidth=0.8, alpha=0.7, **label)
    style(middle, "Training loss (digits, all seeds)", "step", "loss")
    middle.legend(fontsize=8)
    style(right, "Level of the logits", "step", "mean over classes and samples")
    right.legend(fontsize=7)
    save(figure, path)


def draw_recall(scores: dict[str, dict[str, list[dict]]], counts: dict, path: Path) -> None:
    figure, axes = plt.subplots(
        1, len(scores), figsize=(10.5, 3.4), layout="constrained",
        width_ratios=[2.2, 1][: len(scores)],
    )  # fmt: skip
    for ax, (name, readings) in zip(axes, scores.items(), strict=True):
        classes = len(counts[name])
        wide = 0.8 / len(COLOURS)
        for i, (reading, colour) in enumerate(COLOURS.items()):
            recall = torch.tensor([s["recall"] for s in readings[reading]])
            place = torch.arange(classes) + (i - (len(COLOURS) - 1) / 2) * wide
            error = recall.std(0, correction=0).numpy()
            ax.bar(place.numpy(), recall.mean(0).numpy(), wide, color=colour, label=reading,
                   yerr=error, error_kw={"linewidth": 0.5})  # fmt: skip
        ax.set_xticks(range(classes), [str(n) for n in counts[name]])
        ax.set_ylim(0, 1)
        style(ax, name, "training samples of the class", "recall (mean over seeds)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="outside lower center")
    save(figure, path)


def draw_reliability(found: dict[str, list[Predictions]], title: str, path: Path) -> None:
    """One column per reading; test set at training frequencies above, balanced below."""
    figure, axes = plt.subplots(
        2, len(COLOURS), figsize=(10.5, 4.6), sharex=True, sharey=True, layout="constrained"
    )
    for column, (reading, colour) in enumerate(COLOURS.items()):
        pooled = Predictions(*(torch.cat(parts) for parts in zip(*found[reading], strict=True)))
        for row, weight in enumerate((pooled.as_trained, pooled.balanced)):
            ax = axes[row, column]
            ax.plot([0, 1], [0, 1], color="black", linewidth=0.6)
            for (stated, hit), line, label in (
                (pooled.largest(), "o-", "most probable class"),
                (pooled.rare(), "s:", "a rare class"),
            ):
                bins = reliability(stated, hit, weight)
                seen = bins[:, 0] > 0.002 * weight.sum()
                face = colour if line == "o-" else "white"
                ax.plot(bins[seen, 1], bins[seen, 2], line, color=colour, markersize=3.5,
                        linewidth=1.2, markerfacecolor=face, label=label)  # fmt: skip
            style(ax, reading if row == 0 else "", "stated probability" if row else "",
                  ("training frequencies" if row == 0 else "balanced") if column == 0 else "")
            ax.set(xlim=(0, 1), ylim=(0, 1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=2, loc="outside lower center")
    figure.suptitle(f"{title}: how often it was so against the stated probability", fontsize=10)
    save(figure, path)


def draw_undone(found: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(1, len(found), figsize=(7, 3.2), layout="constrained")
    for ax, (name, case) in zip(axes, found.items(), strict=True):
        log_q, moved = torch.tensor(case["log q"]), torch.tensor(case["difference"])
        reach = [log_q.min(), log_q.max()]
        ax.plot(reach, reach, color="black", linewidth=0.6, linestyle="--", label="slope 1")
        ax.plot(log_q.flatten(), moved.flatten(), ".", markersize=4, alpha=0.6,
                color=COLOURS["prior, left out at test"], label=f"fitted slope {case['slope']:.3f}")
        style(ax, name, "log q of the class (centred)", "logit of plain − logit of prior")
        ax.legend(fontsize=8)
    save(figure, path)


# ---- all of it -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/weights_or_priors"))
    parser.add_argument("--doc", type=Path, help="document whose tables are replaced")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="2 seeds, 20 steps")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps = 2, 20
    options.out.mkdir(parents=True, exist_ok=True)

    constant, optimum = added_constant(), best_probabilities()
    convexes = {"breast cancer": convex(cancer, 10), "wine": convex(wine, 8)}
    trainings = len(DATA) * options.seeds * (len(PENALTIES) + 3)
    with tqdm(total=trainings, desc="training", unit="net", dynamic_ncols=True) as progress:
        trained = {n: train_all(n, options.seeds, options.steps, progress) for n in DATA}
    found = {name: read_all(t) for name, t in trained.items()}
    scores = {
        name: {reading: [measure(p) for p in seeds] for reading, seeds in readings.items()}
        for name, readings in tqdm(found.items(), desc="measuring", unit="data set")
    }
    undoing = {name: undone(t) for name, t in trained.items()}
    counts = {name: t.tasks[0].counts.int().tolist() for name, t in trained.items()}

    tables = {
        "constant": constant_table(constant),
        "optimum": optimum_table(optimum),
        "convex": convex_table(convexes),
        "drift": drift_table(trained),
        **{f"{name}, decisions": decision_table(s) for name, s in scores.items()},
        "pairs": pair_table(scores),
        **{
            f"{name}, calibration, {where}": calibration_table(s, where)
            for name, s in scores.items()
            for where in ("as trained", "balanced")
        },
    }
    results = {
        "seeds": options.seeds, "steps": options.steps, "torch": torch.__version__,
        "counts": counts, "penalty": {n: t.penalty for n, t in trained.items()},
        "NLL of plain by penalty": {n: t.tried for n, t in trained.items()},
        "added constant": constant, "best probabilities": optimum, "convex": convexes,
        "numerator only": numerator_only(trained["digits"].tasks[0]),
        "undone": undoing, "scores": scores,
    }  # fmt: skip

    out = options.out
    images = options.doc.parent / "images" if options.doc else out
    images.mkdir(exist_ok=True)
    draw_drift(trained["digits"], images / "weights-or-priors-drift.png")
    draw_recall(scores, counts, images / "weights-or-priors-recall.png")
    for name in DATA:
        file = f"weights-or-priors-reliability-{name.replace(' ', '-')}.png"
        draw_reliability(found[name], name, images / file)
    draw_undone(undoing, images / "weights-or-priors-undone.png")
    text = "\n\n".join(f"### {name}\n\n{body}" for name, body in tables.items()) + "\n"
    (out / "weights-or-priors.md").write_text(text)
    (out / "weights-or-priors.json").write_text(json.dumps(results) + "\n")
    if options.doc:
        update_document(options.doc, tables)
    print(text)
    for name, case in undoing.items():
        print(
            f"{name}: penalty {results['penalty'][name]:g}, slope {case['slope']:.3f}; "
            "mean total variation distance from plain: prior kept "
            f"{case['plain against prior kept']:.3f}, "
            f"left out {case['plain against prior left out']:.3f}"
        )
    print("log q in the numerator:", json.dumps(results["numerator only"]))
    print(f"written to {out}" + (f", {images} and {options.doc}" if options.doc else ""))
    return results


if __name__ == "__main__":
    main()

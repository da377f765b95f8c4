"""The losses of examples/composed_losses.py against their published formulas, in float64."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from helpers import peak_bytes
from torch.nn import functional as F

PATH = Path(__file__).parent.parent / "examples" / "composed_losses.py"
SPEC = importlib.util.spec_from_file_location("composed_losses", PATH)
losses = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(losses)

COUNTS = torch.tensor([500, 120, 30, 7, 2])
SHAPES = [(6, 5), (3, 5, 4), (2, 5, 3, 2)]


def batch(shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=g, dtype=torch.float64)
    y = torch.randint(shape[1], shape[:1] + shape[2:], generator=g)
    return x.to(dtype).requires_grad_(), y


def rows(x, y):
    """One (logits, target) pair per row; the logits are tensors, so that autograd sees them."""
    x = x.movedim(1, -1).reshape(-1, x.shape[1])
    return zip(x, y.reshape(-1).tolist(), strict=True)


# ---- the formulas as their papers print them, row by row -----------------------------------------


def focal(x, y, gamma, alpha):
    total = []
    for row, k in rows(x, y):
        p = row[k].exp() / row.exp().sum()
        total.append(-(1.0 if alpha is None else alpha[k]) * (1 - p) ** gamma * p.log())
    return torch.stack(total)


def ldam(x, y, margins):
    total = []
    for row, k in rows(x, y):
        own = (row[k] - margins[k]).exp()
        others = sum(row[j].exp() for j in range(len(row)) if j != k)
        total.append(-(own / (own + others)).log())
    return torch.stack(total)


def balanced_softmax(x, y, counts):
    n = counts.double()
    return torch.stack(
        [-(n[k] * row[k].exp() / (n * row.exp()).sum()).log() for row, k in rows(x, y)]
    )


def logit_adjustment(x, y, counts, tau):
    q = counts.double() / counts.sum()
    total = []
    for row, k in rows(x, y):
        odds = sum(
            (q[j] / q[k]) ** tau * (row[j] - row[k]).exp() for j in range(len(row)) if j != k
        )
        total.append(torch.log(1 + odds))
    return torch.stack(total)


def same_value_and_gradient(ours, published, x, **tolerance):
    torch.testing.assert_close(ours, published, **tolerance)
    g, = torch.autograd.grad(ours.sum(), x)
    e, = torch.autograd.grad(published.sum(), x, retain_graph=True)
    torch.testing.assert_close(g, e, **tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("with_alpha", [False, True])
def test_focal(shape, gamma, with_alpha):
    x, y = batch(shape)
    alpha = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9], dtype=torch.float64) if with_alpha else None
    published = focal(x, y, gamma, alpha)
    ours = losses.focal_loss(x, y, gamma, alpha, "none")
    same_value_and_gradient(ours, published.view(y.shape), x)
    same_value_and_gradient(losses.focal_loss(x, y, gamma, alpha), published.mean(), x)
    same_value_and_gradient(losses.focal_loss(x, y, gamma, alpha, "sum"), published.sum(), x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_ldam(shape, scale):
    x, y = batch(shape)
    if scale != 1.0:
        x = F.normalize(x.detach(), dim=1).requires_grad_()  # the authors' cosine logits
    margins = losses.ldam_margins(COUNTS, 0.5).double()
    published = ldam(scale * x, y, scale * margins)
    ours = losses.ldam_loss(x, y, margins, scale, "none")
    same_value_and_gradient(ours, published.view(y.shape), x)
    same_value_and_gradient(losses.ldam_loss(x, y, margins, scale), published.mean(), x)


def test_ldam_of_a_certain_row():
    """Where log p_y of the plain softmax has no digits left, the loss with a margin still has."""
    x = torch.tensor([[0.5, -0.2, -0.25]], requires_grad=True)
    margins = torch.tensor([0.5, 0.1, 0.1])
    for scale in (1.0, 30.0):
        exact = ldam(scale * x.double(), torch.tensor([0]), scale * margins.double())
        ours = losses.ldam_loss(x, torch.tensor([0]), margins, scale)
        torch.testing.assert_close(ours.double(), exact[0], rtol=1e-4, atol=0)


def test_ldam_margins():
    margins = losses.ldam_margins(COUNTS, 0.5)
    expected = [0.5 * (2 / n) ** 0.25 for n in COUNTS.tolist()]
    torch.testing.assert_close(margins, torch.tensor(expected))
    assert torch.equal(losses.ldam_loss(*batch((6, 5)), torch.zeros(5)),
                       losses.cross_entropy(*batch((6, 5))))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
def test_effective_number_weights(beta):
    weights = losses.effective_number_weights(COUNTS, beta)
    # The effective number is the sum of a geometric series: E_n = 1 + beta + ... + beta^(n-1).
    effective = [math.fsum(beta**i for i in range(n)) for n in COUNTS.tolist()]
    raw = [1 / e for e in effective]
    expected = torch.tensor([5 * r / math.fsum(raw) for r in raw])
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)
    x, y = batch((6, 5))
    weighted = sum(weights[k].double() * -row.log_softmax(0)[k] for row, k in rows(x, y))
    same_value_and_gradient(
        losses.cross_entropy(x, y, weights.double()), weighted / weights.double()[y].sum(), x
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_softmax(shape):
    x, y = batch(shape)
    ours = losses.balanced_softmax_loss(x, y, COUNTS)
    same_value_and_gradient(ours, balanced_softmax(x, y, COUNTS).mean(), x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_logit_adjustment(shape, tau):
    x, y = batch(shape)
    ours = losses.logit_adjusted_loss(x, y, COUNTS, tau)
    same_value_and_gradient(ours, logit_adjustment(x, y, COUNTS, tau).mean(), x)


def test_half_precision_focal():
    x, y = batch((64, 5), torch.bfloat16)
    ours = losses.focal_loss(x, y)
    published = focal(x.detach().double(), y, 2.0, None).mean()
    torch.testing.assert_close(ours.double(), published, rtol=1e-5, atol=1e-6)
    g, = torch.autograd.grad(ours, x)
    assert g.dtype == torch.bfloat16 and g.isfinite().all()


@pytest.mark.parametrize("name", ["focal", "effective number", "balanced softmax"])
def test_one_tensor_of_the_size_of_the_logits(name):
    x, y = torch.randn(512, 2000, requires_grad=True), torch.randint(2000, (512,))
    counts = torch.randint(1, 1000, (2000,))
    call = {
        "focal": lambda: losses.focal_loss(x, y),
        "effective number": lambda: losses.cross_entropy(
            x, y, losses.effective_number_weights(counts)
        ),
        "balanced softmax": lambda: losses.balanced_softmax_loss(x, y, counts),
    }[name]
    size = x.numel() * 4
    assert peak_bytes(call) < 0.1 * size
    loss = call()
    assert size <= peak_bytes(lambda: loss.backward(retain_graph=True)) < 1.1 * size


def test_the_script_prints_a_line_for_each_loss(capsys):
    losses.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 7
    assert all(math.isfinite(float(field)) for line in lines[1:] for field in line.split()[-5:])

"""The reference itself: against torch's loss in float64, and against autograd of plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import composed
from reference import (
    FEATURE_CASES,
    LAYOUTS,
    NATIVE_CASES,
    Case,
    as_layout,
    case_ids,
    from_rows,
    position_shape,
    reference,
    to_rows,
)

# Both sides compute in float64; they differ by the order of additions.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def leaves(x, target, options):
    """Copies that need gradients: logits always, soft target and its weight where torch allows."""
    x = x.detach().clone().requires_grad_()
    options = dict(options)
    if x.shape == target.shape:
        target = target.detach().clone().requires_grad_()
        if "weight" in options:
            options["weight"] = options["weight"].detach().clone().requires_grad_()
    return x, target, options


@pytest.mark.parametrize("case", NATIVE_CASES, ids=case_ids(NATIVE_CASES))
def test_equals_native(case):
    x, target, options = case.build()
    x, target, options = leaves(x, target, options)
    want = F.cross_entropy(x, target, **options)
    grad = case.upstream()
    want.backward(grad)
    got = reference(x, target, **options, grad=grad)
    torch.testing.assert_close(got.loss, want.detach(), equal_nan=True, **CLOSE)
    torch.testing.assert_close(got.dx, x.grad, equal_nan=True, **CLOSE)
    if case.soft:
        torch.testing.assert_close(got.dprob, target.grad, **CLOSE)
        if "weight" in options:
            torch.testing.assert_close(got.dweight, options["weight"].grad, **CLOSE)


@pytest.mark.parametrize("case", FEATURE_CASES, ids=case_ids(FEATURE_CASES))
def test_equals_autograd_of_composed_formula(case):
    assert not case.native
    x, target, options = case.build()
    x, target, options = leaves(x, target, options)
    if "sample_weight" in options:
        options["sample_weight"].requires_grad_()
    want = composed(x, target, options)
    grad = case.upstream()
    want.backward(grad)
    got = reference(x, target, **options, grad=grad)
    torch.testing.assert_close(got.loss, want.detach(), equal_nan=True, **CLOSE)
    # The gradient of an empty mean is 0 by definition; autograd of a quotient says nan there.
    if got.counts.any() or case.reduction != "mean":
        torch.testing.assert_close(got.dx, x.grad, **CLOSE)
        if "sample_weight" in options:
            torch.testing.assert_close(got.dsample_weight, options["sample_weight"].grad, **CLOSE)
    else:
        assert (got.dx == 0).all()
    if case.soft and got.counts.any():
        torch.testing.assert_close(got.dprob, target.grad, **CLOSE)
        if "weight" in options:
            torch.testing.assert_close(got.dweight, options["weight"].grad, **CLOSE)


def test_row_outputs_and_their_gradients():
    x = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randint(6, (4, 3))
    y[1, 2] = -100
    h, u = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    lp = torch.log_softmax(x, 1)
    lse = torch.logsumexp(x, 1)
    log_prob = torch.where(y == -100, 0.0, lp.gather(1, y.clamp(min=0)[:, None])[:, 0])
    entropy = -(lp.exp() * lp).sum(1)
    correct = (x.argmax(1) == y)
    total = F.cross_entropy(x, y) + (h * lse).sum() + (u * log_prob).sum()
    total.backward()
    got = reference(x, y, grad_lse=h, grad_log_prob=u)
    torch.testing.assert_close(got.dx, x.grad, **CLOSE)
    torch.testing.assert_close(got.lse, lse.detach(), **CLOSE)
    torch.testing.assert_close(got.log_prob, log_prob.detach(), **CLOSE)
    torch.testing.assert_close(got.entropy, entropy.detach(), **CLOSE)
    assert torch.equal(got.correct, correct)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("row, loss, grad", [
    ([1.0, -INF, 0.0], math.log(1 + math.exp(-1)), [-0.2689414, 0.0, 0.2689414]),
    ([-INF, 1.0, 0.0], INF, [-1.0, 0.7310586, 0.2689414]),
    ([NAN, 1.0, 0.0], NAN, [NAN] * 3),
    ([0.0, INF, 0.0], NAN, [NAN] * 3),
    ([-INF, -INF, -INF], NAN, [NAN] * 3),
])
def test_special_rows(row, loss, grad):
    """Target 0; a second, ordinary row is never touched."""
    x = torch.tensor([row, [0.0, 0.0, 0.0]], dtype=torch.float64)
    got = reference(x, torch.tensor([0, 1]), reduction="sum", grad=1.0)
    torch.testing.assert_close(got.rows[0].item(), loss, equal_nan=True)
    torch.testing.assert_close(got.dx[0], torch.tensor(grad).double(), equal_nan=True, rtol=0,
                               atol=1e-7)
    torch.testing.assert_close(got.dx[1], torch.tensor([1 / 3, -2 / 3, 1 / 3]).double())
    ignored = reference(x, torch.tensor([-100, 1]), reduction="sum")
    assert ignored.rows[0] == 0 and (ignored.dx[0] == 0).all()


def test_zero_coefficient_at_minus_infinity():
    x = torch.tensor([[0.0, -INF, 1.0]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64)
    got = reference(x, q)
    want = reference(x[:, [0, 2]], q[:, [0, 2]])
    torch.testing.assert_close(got.loss, want.loss)
    assert got.dx[0, 1] == 0 and got.dweight[1] == 0 and got.dprob[0, 1] == INF


def test_empty_mean():
    x, y = torch.randn(3, 4), torch.full((3,), -100)
    assert reference(x, y).loss.isnan() and (reference(x, y).dx == 0).all()
    assert reference(x, y, empty="zero").loss == 0
    assert reference(x, y, normalizer=2.0).loss == 0
    assert reference(x, y, reduction="sum").loss == 0
    none = reference(x[:0], y[:0], reduction="none")
    assert none.loss.shape == (0,) and none.dx.shape == (0, 4)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 4, 3), (2, 4, 3, 5), (2, 3, 2, 2, 3)])
def test_layouts_keep_values(name, shape):
    x = torch.randn(shape)
    y = as_layout(x, name)
    assert torch.equal(x, y) and x.shape == y.shape
    assert y.data_ptr() != x.data_ptr() or name in ("plain", "class_last", "class_first")
    assert torch.equal(from_rows(to_rows(x), shape), x)


def test_layouts_are_what_they_say():
    x = torch.randn(2, 4, 3, 5)
    assert as_layout(x, "class_last").is_contiguous(memory_format=torch.channels_last)
    assert as_layout(x, "class_first").stride() == (15, 30, 5, 1)
    assert 1 not in as_layout(x, "strided").stride()
    assert as_layout(x, "misaligned").storage_offset() == 1
    assert as_layout(x[..., 0], "shifted").stride() == (16, 1, 4)
    assert as_layout(x[..., 0, 0], "padded").stride() == (7, 1)


def test_cases_are_what_they_say():
    x, y, options = Case((50, 5), ignore="outside", weight="signed").build()
    assert (y == 255).any() and (options["weight"] < 0).any() and options["ignore_index"] == 255
    assert position_shape((5,)) == () and position_shape((2, 5, 3)) == (2, 3)
    q = Case((50, 5), soft=True, skip_empty=True).build()[1]
    assert (q.sum(1) == 0).any() and not (q.sum(1) == 0).all()
    assert len({case.id for case in NATIVE_CASES + FEATURE_CASES}) == len(NATIVE_CASES) + len(
        FEATURE_CASES)

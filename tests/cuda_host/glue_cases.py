"""Runs in a process of its own: the CUDA glue and kernels in the place of the CPU operator.

glue_cases.py LIBRARY. Compares losses, gradients and the results per row with the reference.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import (  # noqa: E402
    DTYPES,
    FEATURE_CASES,
    INDEX_CASES,
    LAYOUTS,
    SMALL_CASES,
    SMALL_FEATURE_CASES,
    SOFT_CASES,
    Case,
    as_layout,
    assert_near,
    check,
    reference,
    run,
)

import wce_torch  # noqa: E402

ce = wce_torch.cross_entropy


def grid():
    for dtype in DTYPES:
        cases = SMALL_CASES + SMALL_FEATURE_CASES
        if dtype == "f32":
            cases = cases + INDEX_CASES[::11] + SOFT_CASES[::7] + FEATURE_CASES[::7]
        for case in cases:
            x, target, options = case.build(DTYPES[dtype])
            check(ce, x, target, options, case.upstream())


def layouts():
    for layout in LAYOUTS:
        for soft in (False, True):
            case = Case((2, 40, 3, 4), soft=soft, weight="positive", smoothing=0.1)
            x, target, options = case.build(torch.float32)
            loss, dx, *_ = run(ce, as_layout(x, layout), target, options, soft_grads=False)
            want = reference(x, target, **options)
            assert_near(loss, want.loss, want.loss_scale)
            assert_near(dx, want.dx, want.dx_scale)


def statistics():
    for shape in ((6, 5), (6, 40), (2, 5, 3, 2)):
        x, target, options = Case(shape, weight="positive").build(torch.float32)
        x.requires_grad_()
        got = wce_torch.cross_entropy_with_stats(x, target, **options)
        gen = torch.Generator().manual_seed(1)
        h, u = (torch.randn(target.shape, generator=gen) for _ in range(2))
        want = reference(x, target, **options, grad_lse=h, grad_log_prob=u)
        assert_near(got.loss, want.loss, want.loss_scale)
        assert_near(got.lse, want.lse, 8)
        assert_near(got.log_prob, want.log_prob, 8)
        assert_near(got.entropy, want.entropy, 8)
        assert torch.equal(got.correct, want.correct)
        (got.loss + (got.lse * h).sum() + (got.log_prob * u).sum()).backward()
        assert_near(x.grad, want.dx, want.dx_scale + h.abs().max() + u.abs().max())


def mixup():
    x, a, options = Case((6, 40), ignore="unused", weight="positive").build(torch.float32)
    b, lam = a.flip(0), 0.3
    grads = []
    for f in (lambda v: wce_torch.mixup_cross_entropy(v, a, b, lam, **options),
              lambda v: lam * ce(v, a, **options) + (1 - lam) * ce(v, b, **options)):
        v = x.clone().requires_grad_()
        loss = f(v)
        loss.backward()
        grads += [loss.detach(), v.grad]
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[3], rtol=1e-4, atol=1e-6)


def edges():
    nothing = torch.empty(0, 5)
    assert torch.isnan(ce(nothing, torch.empty(0, dtype=torch.long)))
    assert ce(nothing, torch.empty(0, dtype=torch.long), reduction="sum") == 0
    assert ce(torch.empty(3, 0), torch.empty(3, 0), reduction="sum") == 0
    ignored = torch.full((3,), -100)
    assert ce(torch.empty(3, 0), ignored, reduction="none").tolist() == [0, 0, 0]
    x = torch.randn(3, 40, requires_grad=True)
    loss = ce(x, ignored)
    loss.backward()
    assert torch.isnan(loss) and not x.grad.any()
    assert ce(x, ignored, empty="zero") == 0
    w = torch.ones(40)
    w[0] = 0
    zeros = {"target": torch.zeros(3, dtype=torch.long), "weight": w, "label_smoothing": 0.1}
    assert torch.isnan(ce(x, **zeros)) and torch.isinf(ce(x, **zeros, normalizer=0))


def raises(kind, text, f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def bad_targets():
    os.environ["WCE_CHECK_TARGETS"] = "sync"
    for shape in ((6, 5), (6, 40), (1, 9000), (2, 5, 3, 2)):
        x, target, _ = Case(shape, ignore="unused").build(torch.float32)
        target.view(-1)[-1] = 77777
        raises(IndexError, "Target 77777 is out of bounds.", ce, x, target)
        raises(IndexError, "Target 77777 is out of bounds.", ce, x, target, reduction="none")
        target.view(-1)[-1] = 0
        assert torch.isfinite(ce(x, target))
    raises(IndexError, "out of bounds", ce, torch.empty(3, 0), torch.zeros(3, dtype=torch.long))
    # Each of two targets is named, for its value or for a prior of 0.
    mix, x, good = wce_torch.mixup_cross_entropy, torch.randn(2, 3), torch.tensor([0, 2])
    prior = torch.tensor([0.5, 0.0, 0.5])
    raises(IndexError, "Target 9 is out of bounds. (position [1]", mix, x, good,
           torch.tensor([0, 9]), 0.5)
    for a, b in ((good, torch.tensor([0, 1])), (torch.tensor([0, 1]), good)):
        raises(ValueError, "Target 1 (position [1]) is a class whose class_prior is 0",
               mix, x, a, b, 0.5, class_prior=prior)
    os.environ["WCE_CHECK_TARGETS"] = "yes"
    raises(RuntimeError, "WCE_CHECK_TARGETS: expected sync or nothing, got yes", ce, x, good)
    del os.environ["WCE_CHECK_TARGETS"]


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    # The CUDA operator leaves 1 as the denominator of a sum; the CPU operator the rows' weight.
    _, stats = torch.ops.wce.forward(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), None, 2)
    assert stats[0] == 1, "the library did not take the CPU operator's place"
    for step in (grid, layouts, statistics, mixup, edges, bad_targets):
        step()
        print(step.__name__, flush=True)

"""The loss against torch's own: values, gradients, shapes, dtypes, edge values, entry points."""

import copy
import inspect
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import (
    DTYPES,
    FEATURE_CASES,
    LAYOUTS,
    NATIVE_CASES,
    REDUCTIONS,
    SMALL_CASES,
    Case,
    as_layout,
    assert_near,
    case_ids,
    check,
    reference,
    run,
    same_bits,
)
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import wce_torch

ce = wce_torch.cross_entropy
INF, NAN = math.inf, math.nan
# Both sides compute in float64 with sums of other orders; signed weights can cancel in T.
CLOSE = {"rtol": 1e-10, "atol": 1e-11, "equal_nan": True}


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("case", NATIVE_CASES, ids=case_ids(NATIVE_CASES))
def test_float64_equals_native(case, device):
    x, target, options = case.build(device=device)
    grad = case.upstream(device=device)
    got = run(ce, x, target, options, grad)
    want = run(F.cross_entropy, x, target, options, grad)
    for mine, native in zip(got, want):
        assert (mine is None) == (native is None)
        if mine is not None:
            assert mine.dtype == native.dtype
            torch.testing.assert_close(mine, native, **CLOSE)


# Each option and shape is met with each dtype, the full product only in float64 above.
THINNED = NATIVE_CASES[::11] + FEATURE_CASES[::7]


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", THINNED, ids=case_ids(THINNED))
def test_lower_dtypes_equal_reference(case, dtype, device):
    x, target, options = case.build(DTYPES[dtype], device)
    # grad is 1, so that the upstream gradient adds no rounding of its own in 16 bits.
    check(ce, x, target, options)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", ["none", "positive"])
def test_soft_gradients_in_lower_dtypes(dtype, smoothing, weight, device):
    case = Case((6, 5, 3), soft=True, smoothing=smoothing, weight=weight)
    x, target, options = case.build(DTYPES[dtype], device)
    check(ce, x, target, options, soft_grads=True)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("shape", [(40,), (6, 40), (3, 5, 7), (2, 5, 3, 6), (2, 3, 2, 3, 4)],
                         ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, shape, soft, device):
    """Any strides of logits and target give the same loss; 'none' is contiguous."""
    for reduction, smoothing in itertools.product(REDUCTIONS, (0.0, 0.1)):
        case = Case(shape, soft=soft, weight="positive", smoothing=smoothing, reduction=reduction)
        x, target, options = case.build(torch.float32, device)
        placed = as_layout(x, layout)
        target = as_layout(target, layout)
        options["weight"] = as_layout(options["weight"], layout)
        check(ce, placed, target, options, case.upstream(torch.float32, device))
        assert ce(placed, target, **options).is_contiguous()
        assert ce(placed, target, **options).shape == reference(x, target, **options).loss.shape


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_target_layout_differs_from_logits(soft):
    case = Case((2, 5, 3, 4), soft=soft, weight="positive", reduction="none")
    x, target, options = case.build(torch.float32)
    for first, second in itertools.product(LAYOUTS, LAYOUTS):
        check(ce, as_layout(x, first), as_layout(target, second), options)


def test_expanded_arguments():
    """Stride 0 in logits, target, weight and upstream gradient."""
    row = torch.randn(1, 7)
    w = torch.rand(1)
    y = torch.tensor([3])
    for x in (row.expand(5, 7), torch.randn(5, 1).expand(5, 7)):
        check(ce, x, y.expand(5), {"weight": w.expand(7)})
        check(ce, x, torch.full((1, 1), 1 / 7).expand(5, 7), {"weight": w.expand(7)})
    x = torch.randn(2, 7, 1, 1).expand(2, 7, 3, 4)
    check(ce, x, torch.randint(7, (2, 1, 1)).expand(2, 3, 4), {"reduction": "sum"})
    check(ce, torch.randn(5, 7), torch.randint(7, (5,)), {"reduction": "none"},
          torch.tensor(0.5).expand(5))


def test_target_strides():
    x = torch.randn(6, 5)
    y = torch.randint(5, (6, 2))[:, 0]
    assert y.stride() == (2,)
    check(ce, x, y, {})
    image = torch.randn(2, 5, 3, 4)
    check(ce, image, torch.randint(5, (2, 4, 3)).transpose(1, 2), {})


@pytest.mark.parametrize("case", SMALL_CASES, ids=case_ids(SMALL_CASES))
def test_upstream_gradient_of_every_kind(case):
    """Not ones: a number, a negative one, zero, and one per row with every second element."""
    x, target, options = case.build(torch.float32)
    loss = ce(x, target, **options)
    for factor in (0.5, -3.0, 0.0):
        check(ce, x, target, options, torch.full_like(loss, factor))
    if loss.dim():
        strided = torch.randn(*loss.shape, 2)[..., 0]
        assert not strided.is_contiguous()
        check(ce, x, target, options, strided)


# ---- entry points --------------------------------------------------------------------------------


def native_part(signature):
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [(p.name, p.default, p.kind) for p in signature.parameters.values() if p.kind in kinds]


def test_signatures():
    """Torch's arguments in torch's order; our own are keyword-only behind them."""
    assert native_part(inspect.signature(ce)) == native_part(inspect.signature(F.cross_entropy))
    mine = inspect.signature(wce_torch.CrossEntropyLoss)
    assert native_part(mine) == native_part(inspect.signature(torch.nn.CrossEntropyLoss))
    extra = [p.name for p in inspect.signature(ce).parameters.values()
             if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert extra == ["class_prior", "tau", "sample_weight", "mask", "skip_empty_targets",
                     "normalizer", "empty"]
    extra = [p.name for p in mine.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert extra == ["class_prior", "tau", "empty"]


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 4, 2, 2, 3])


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments(size_average, reduce):
    calls = [lambda f, m: f(X, Y, None, size_average, -100, reduce),
             lambda f, m: f(X, Y, size_average=size_average, reduce=reduce, reduction="sum"),
             lambda f, m: m(None, size_average, 2, reduce)(X, Y),
             lambda f, m: m(size_average=size_average, reduce=reduce, reduction="none")(X, Y)]
    for call in calls:
        with warnings.catch_warnings(record=True) as mine:
            warnings.simplefilter("always")
            got = call(ce, wce_torch.CrossEntropyLoss)
        with warnings.catch_warnings(record=True) as native:
            warnings.simplefilter("always")
            want = call(F.cross_entropy, torch.nn.CrossEntropyLoss)
        torch.testing.assert_close(got, want)
        assert [(str(w.message), w.category) for w in mine] == [
            (str(w.message), w.category) for w in native]


def test_positional_order():
    w = torch.rand(5)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        got = ce(X, Y, w, False, 2, True, "none", 0.1)
    want = reference(X, Y, w, ignore_index=2, reduction="sum", label_smoothing=0.1).loss
    assert_near(got, want, 10)


def test_elementwise_mean():
    with pytest.warns(UserWarning, match="elementwise_mean.* is deprecated"):
        got = ce(X, Y, reduction="elementwise_mean")
    assert torch.equal(got, ce(X, Y))


@pytest.mark.parametrize("value", [2, np.int64(2), np.int32(2), torch.tensor(2)], ids=repr)
def test_ignore_index_types(value):
    assert torch.equal(ce(X, Y, ignore_index=value), ce(X, Y, ignore_index=2))
    assert not torch.equal(ce(X, Y, ignore_index=value), ce(X, Y))


@pytest.mark.parametrize("value", [1, np.float64(0.25), np.float32(0.25), torch.tensor(0.25), 0.25],
                         ids=repr)
def test_label_smoothing_types(value):
    assert torch.equal(ce(X, Y, label_smoothing=value), ce(X, Y, label_smoothing=float(value)))
    assert not torch.equal(ce(X, Y, label_smoothing=value), ce(X, Y))


@pytest.mark.parametrize("value", [-0.5, -INF, NAN])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_negative_or_nan_smoothing_is_none(value, soft):
    x, target, options = Case((6, 5), soft=soft).build(torch.float32)
    options.pop("label_smoothing")
    assert torch.equal(ce(x, target, label_smoothing=value, **options), ce(x, target, **options))


@pytest.mark.parametrize("ignore_index", [2**63 - 1, -2**63, 2**32 + 1, 0, 5])
def test_ignore_index_is_any_int64(ignore_index):
    y = Y.clone()
    y[2] = ignore_index
    for smoothing, reduction in itertools.product((0.0, 0.1), REDUCTIONS):
        check(ce, X, y, {"ignore_index": ignore_index, "label_smoothing": smoothing,
                         "reduction": reduction, "weight": torch.arange(1.0, 6.0)})


@pytest.mark.parametrize("ignore_index", [-1, -100, -2**63])
def test_negative_ignore_index_has_no_effect_on_soft_targets(ignore_index):
    x, target, options = Case((6, 5), soft=True, weight="positive").build(torch.float32)
    got = ce(x, target, ignore_index=ignore_index, **options)
    assert torch.equal(got, ce(x, target, **options))


def test_torch_function_protocol():
    """A tensor-like argument sees what it would see of torch's function, call for call."""
    seen = []

    class Spy:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append((func, types, len(args), kwargs))
            return "answered"

    for arguments in ((Spy(), Y), (X, Spy()), (X, Y, Spy())):
        seen.clear()
        assert ce(*arguments, ignore_index=3) == "answered"
        assert F.cross_entropy(*arguments, ignore_index=3) == "answered"
        ours, native = seen
        assert ours == native and ours[0] is F.cross_entropy
        assert ours[2] == 2 and ours[3]["ignore_index"] == 3


# ---- edge values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.arange(1.0, 4.0)], ids=["", "w"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 7), (2, 3, 0), (2, 3, 5, 0), (2, 3, 5, 0, 7)],
                         ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_no_rows(soft, shape, weight, smoothing, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    positions = shape[:1] + shape[2:]
    target = torch.rand(shape) if soft else torch.zeros(positions, dtype=torch.long)
    target = target.to(device)
    weight = weight if weight is None else weight.to(device)
    options = {"label_smoothing": smoothing, "weight": weight}
    none = ce(x, target, reduction="none", **options)
    assert none.shape == positions
    assert ce(x, target, reduction="sum", **options) == 0
    assert ce(x, target, reduction="mean", **options).isnan()
    for reduction in REDUCTIONS:
        loss = ce(x, target, reduction=reduction, **options)
        (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        assert grad.shape == shape


@pytest.mark.parametrize("shape", [(5, 0), (0,), (2, 0, 3), (2, 0, 3, 4)], ids=str)
def test_no_classes(shape):
    positions = shape[:1] + shape[2:] if len(shape) > 1 else ()
    x = torch.randn(shape, requires_grad=True)
    soft = torch.randn(shape)
    none = ce(x, soft, reduction="none")
    assert none.shape == positions and (none == 0).all()
    for smoothing in (0.0, 1.0):
        leaves = [t.clone().requires_grad_() for t in (x, soft)]
        loss = ce(*leaves, reduction="sum", label_smoothing=smoothing)
        assert [g.shape for g in torch.autograd.grad(loss, leaves)] == [x.shape, x.shape]
    assert ce(x, soft, reduction="sum") == 0 and ce(x, soft, reduction="mean").isnan()
    loss = ce(x, soft, reduction="sum")
    assert torch.autograd.grad(loss, x)[0].shape == shape
    if len(shape) == 3:
        return  # with an index target torch itself fails on (N, 0, d): not pinned
    ignored = torch.full(positions, -100)
    assert ce(x, ignored, reduction="sum") == 0 and ce(x, ignored, reduction="mean").isnan()
    assert (ce(x, ignored, reduction="none") == 0).all()
    for reduction in ("sum", "none"):
        smooth = ce(x, ignored, reduction=reduction, label_smoothing=0.1)
        native = F.cross_entropy(x, ignored, reduction=reduction, label_smoothing=0.1)
        torch.testing.assert_close(smooth, native, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.rand(3) + 1], ids=["", "w"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 2, 2)], ids=str)
def test_all_ignored(shape, weight, smoothing, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    y = torch.full(shape[:1] + shape[2:], -100, device=device)
    weight = weight if weight is None else weight.to(device)
    options = {"label_smoothing": smoothing, "weight": weight}
    assert (ce(x, y, reduction="none", **options) == 0).all()
    assert ce(x, y, reduction="sum", **options) == 0
    assert ce(x, y, reduction="mean", **options).isnan()
    for reduction in REDUCTIONS:
        loss = ce(x, y, reduction=reduction, **options)
        (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        assert (grad == 0).all(), reduction


def test_all_ignored_one_dimension():
    x = torch.randn(3, requires_grad=True)
    loss = ce(x, torch.tensor(-100))
    assert loss.isnan()  # as on the CPU; not pinned on CUDA
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("others", [0.0, 1.0, -1.0], ids=["all_0", "others_1", "others_minus_1"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(5, 3), (2, 40), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 2, 2)],
                         ids=str)
def test_total_weight_is_zero(shape, smoothing, others, dtype, device):
    """Every target has weight 0: mean is nan; so are the gradients of rows that count. Also with
    smoothing, whose term is not 0: native divides it and the 0 of the targets apart."""
    x = torch.randn(shape, device=device, dtype=DTYPES[dtype], requires_grad=True)
    y = torch.zeros(shape[:1] + shape[2:], dtype=torch.long, device=device)
    y.view(-1)[-1] = -100
    w = torch.full(shape[1:2], others, device=device, dtype=x.dtype)
    w[0] = 0.0
    for loss_fn in (ce, F.cross_entropy):
        loss = loss_fn(x, y, w, label_smoothing=smoothing)
        assert loss.isnan(), loss_fn
        (grad,) = torch.autograd.grad(loss, x)
        rows = grad.movedim(1, -1).reshape(-1, shape[1])
        assert rows[:-1].isnan().all() and (rows[-1] == 0).all(), loss_fn
    for reduction in ("none", "sum"):
        check(ce, x, y, {"weight": w, "label_smoothing": smoothing, "reduction": reduction})


def test_weights_that_cancel():
    """T = 0 from +1 and -1: 'none' and 'sum' are ordinary, mean is not finite."""
    x, y, w = torch.randn(2, 3), torch.tensor([0, 1]), torch.tensor([1.0, -1.0, 2.0])
    for reduction in ("none", "sum"):
        check(ce, x, y, {"weight": w, "reduction": reduction})
    x.requires_grad_()
    loss = ce(x, y, w)
    assert not loss.isfinite()
    assert not torch.autograd.grad(loss, x)[0].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (4, 1), (4, 1, 3), (2, 1, 3, 2)], ids=str)
def test_one_class(shape, dtype, device):
    x = torch.randn(shape, dtype=DTYPES[dtype], device=device, requires_grad=True)
    positions = shape[:1] + shape[2:] if len(shape) > 1 else ()
    y = torch.zeros(positions, dtype=torch.long, device=device)
    for target, reduction, e in itertools.product((y, torch.ones_like(x)), REDUCTIONS, (0.0, 0.1)):
        loss = ce(x, target.detach(), reduction=reduction, label_smoothing=e)
        assert (loss == 0).all()
        assert (torch.autograd.grad(loss, x, torch.ones_like(loss))[0] == 0).all()


@pytest.mark.parametrize("grad", [NAN, INF, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("values", [[NAN, 0.0, 1.0], [INF, 0.0, 1.0], [-INF] * 3, [-INF, 0.0, 1.0]],
                         ids=str)
def test_ignored_row_is_exactly_zero(values, smoothing, grad, device):
    """Whatever the row and the upstream gradient hold; the neighbour is untouched."""
    x = torch.tensor([values, [0.0, 1.0, 2.0]], device=device)
    y = torch.tensor([-100, 1], device=device)
    options = {"label_smoothing": smoothing, "reduction": "none"}
    loss, dx, *_ = run(ce, x, y, options, torch.tensor([grad, 1.0], device=device))
    assert loss[0] == 0 and (dx[0] == 0).all()
    want = reference(x[1:], y[1:], **options)
    assert_near(loss[1:], want.loss, 4)
    assert_near(dx[1:], want.dx, 4)
    for reduction in ("mean", "sum"):
        check(ce, x, y, {"label_smoothing": smoothing, "reduction": reduction})


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2)], ids=str)
def test_bad_weight_of_an_unused_class(value, shape):
    x, y = torch.randn(shape), torch.randint(3, shape[:1] + shape[2:])
    w = torch.tensor([1.0, 2.0, 3.0, value])
    clean = torch.tensor([1.0, 2.0, 3.0, 1.0])
    for reduction in REDUCTIONS:
        got = run(ce, x, y, {"weight": w, "reduction": reduction})
        want = run(ce, x, y, {"weight": clean, "reduction": reduction})
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert not ce(x, y, w, reduction=reduction, label_smoothing=0.1).isfinite().any()


# x: one row of logits; a second, ordinary row stands behind it in every test.
SPECIAL_ROWS = {
    "inf_not_at_target": [1.0, -INF, 0.0], "inf_at_target": [-INF, 1.0, 0.0],
    "nan_first": [NAN, 1.0, 0.0], "nan_last": [1.0, 0.0, NAN], "plus_inf": [1.0, INF, 0.0],
    "plus_inf_at_target": [INF, 1.0, 0.0], "all_minus_inf": [-INF] * 3,
    "both_inf": [1.0, INF, -INF], "nan_and_minus_inf": [-INF, NAN, -INF],
    "offset": [1e6 + 1, 1e6, 1e6 - 1], "far": [0.0, -1e4, 88.0], "huge": [1.6e38, -1.6e38, 0.0],
    "lowest": [torch.finfo(torch.float32).min, 0.0, 1.0],
    "all_lowest": [torch.finfo(torch.float32).min] * 3, "equal": [2.0] * 3,
}


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.5])], ids=["", "w"])
@pytest.mark.parametrize("name", SPECIAL_ROWS)
def test_special_rows(name, weight, smoothing, dtype, device):
    x = torch.tensor([SPECIAL_ROWS[name], [0.5, 0.25, -1.0]], dtype=DTYPES[dtype], device=device)
    y = torch.tensor([0, 2], device=device)
    w = weight if weight is None else weight.to(x)
    for reduction in REDUCTIONS:
        options = {"weight": w, "label_smoothing": smoothing, "reduction": reduction}
        check(ce, x, y, options)
        # The other row never sees it.
        if reduction != "mean":
            dx = run(ce, x, y, options)[1]
            alone = run(ce, x[1:], y[1:], options)[1]
            assert torch.equal(dx[1:], alone)


@pytest.mark.parametrize("name", SPECIAL_ROWS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_special_rows_with_soft_targets(name, smoothing, device):
    x = torch.tensor([SPECIAL_ROWS[name], [0.5, 0.25, -1.0]], device=device)
    for first in ([0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]):
        q = torch.tensor([first, [0.2, 0.3, 0.5]], device=device)
        for reduction in REDUCTIONS:
            check(ce, x, q, {"label_smoothing": smoothing, "reduction": reduction})


def test_documented_gradient_of_minus_infinity_at_the_target():
    x = torch.tensor([[1.0, -INF, 0.0]], requires_grad=True)
    loss = ce(x, torch.tensor([1]))
    loss.backward()
    assert loss == INF
    torch.testing.assert_close(x.grad, torch.tensor([[0.7310586, -1.0, 0.2689414]]))


def test_masked_logits_with_probability_zero():
    """0 * -inf counts as 0, in the loss and in the gradient of the weight."""
    x = torch.tensor([[0.5, -INF, 1.0], [-INF, 0.0, 2.0]], requires_grad=True)
    q = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]], requires_grad=True)
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = ce(x, q, w)
    loss.backward()
    want = reference(x, q, w)
    assert loss.isfinite()
    assert_near(loss, want.loss, 10)
    assert_near(x.grad, want.dx, 4)
    assert_near(w.grad, want.dweight, 4)
    assert q.grad[0, 1] == INF and q.grad[1, 0] == INF  # it is true: more of q there costs inf


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("q0, w0", [(0.5, 0.0), (0.0, 0.0), (0.0, -2.0), (0.5, -2.0)])
def test_soft_gradients_at_minus_infinity(q0, w0, smoothing):
    """Where a = w*q is 0 the class adds nothing, but growth of the one factor from 0 makes the
    loss infinite if the other is not 0. Native agrees wherever it is not nan (0 * inf)."""
    x = torch.tensor([[-INF, 1.0, 2.0], [1.0, 0.0, 3.0]]).double()
    q = torch.tensor([[q0, 0.2, 0.3], [0.1, 0.7, 0.2]]).double()
    w = torch.tensor([w0, 1.0, 2.0]).double()
    results = []
    for loss_fn in (ce, F.cross_entropy):
        leaves = [t.clone().requires_grad_() for t in (x, q, w)]
        loss = loss_fn(*leaves, label_smoothing=smoothing)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    want = reference(x, q, w, label_smoothing=smoothing)
    names = ("loss", "dx", "dprob", "dweight")
    for name, ours, native in zip(names, *results, strict=True):
        torch.testing.assert_close(ours, getattr(want, name), msg=name)
        torch.testing.assert_close(torch.where(native.isnan(), ours, native), ours, msg=name)
    assert w0 != 0 or results[0][0].isfinite()


def test_zero_weight_at_minus_infinity_target():
    x = torch.tensor([[-INF, 1.0, 0.0]], requires_grad=True)
    loss = ce(x, torch.tensor([0]), torch.tensor([0.0, 1.0, 1.0]), reduction="sum")
    assert loss == 0 or loss.isnan()  # not pinned which
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


# ---- dtypes --------------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("w_dtype", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_result_dtype_index(x_dtype, w_dtype, reduction):
    """A weight of any float type; the result keeps the type of the logits."""
    x, y, options = Case((6, 5), reduction=reduction, weight="positive").build(x_dtype)
    options["weight"] = None if w_dtype is None else options["weight"].to(w_dtype)
    for e in (0.0, 0.1):
        options["label_smoothing"] = e
        assert ce(x, y, **options).dtype == x_dtype
        check(ce, x, y, options)


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("q_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("w_dtype", [None, *FLOATS], ids=str)
def test_result_dtype_soft(x_dtype, q_dtype, w_dtype):
    """The result has the type that the three promote to; each gradient that of its tensor."""
    x, q, options = Case((6, 5), soft=True, weight="positive", smoothing=0.1).build(x_dtype)
    q = q.to(q_dtype)
    want = torch.promote_types(x_dtype, q_dtype)
    options["weight"] = None if w_dtype is None else options["weight"].to(w_dtype)
    if w_dtype is not None:
        want = torch.promote_types(want, w_dtype)
    loss, dx, dprob, dweight = run(ce, x, q, options)
    assert (loss.dtype, dx.dtype, dprob.dtype) == (want, x_dtype, q_dtype)
    assert dweight is None or dweight.dtype == w_dtype
    ref = reference(x, q, **options)
    # Arithmetic is that of the logits' type unless a float64 argument raises it.
    loss = loss if x_dtype == torch.float64 or loss.dtype != torch.float64 else loss.float()
    assert_near(loss, ref.loss, ref.loss_scale)
    assert_near(dx, ref.dx, ref.dx_scale)


@pytest.mark.parametrize("y_dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(5,), (6, 5), (3, 5, 4), (2, 5, 3, 2), (2, 5, 2, 3, 2)], ids=str)
def test_small_integer_targets(y_dtype, shape, device):
    """Equal to int64 in every bit, for every rank, reduction, weight and smoothing."""
    for reduction, weight, e in itertools.product(REDUCTIONS, ("none", "positive"), (0.0, 0.1)):
        case = Case(shape, ignore="inside", reduction=reduction, weight=weight, smoothing=e)
        x, y, options = case.build(torch.float32, device)
        got, want = run(ce, x, y.to(y_dtype), options), run(ce, x, y, options)
        assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])


def test_uint8_target_with_ignore_index_255():
    y = Y.to(torch.uint8)
    y[1] = 255
    check(ce, X, y, {"ignore_index": 255})
    # -100 is no uint8: nothing is ignored, and 156 (= -100 mod 256) is out of range.
    y[1] = 156
    with pytest.raises(IndexError, match="Target 156 is out of bounds"):
        ce(X, y)


def test_many_float16_rows():
    """Native: mean nan, gradient all 0, because it counts and divides in 16 bits."""
    x = (torch.randn(131072, 3, generator=torch.Generator().manual_seed(0))).half()
    y = torch.arange(131072) % 3
    loss, dx, *_ = run(ce, x, y, {})
    want = reference(x, y)
    assert_near(loss, want.loss, want.loss_scale)
    assert_near(dx, want.dx, want.dx_scale)
    assert ce(x, y, reduction="sum") == INF and want.loss * 131072 > 65504


def test_long_bfloat16_rows():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 1000, generator=gen).bfloat16()
    y = torch.randint(1000, (4096,), generator=gen)
    w = torch.rand(1000, generator=gen) + 0.5
    for options in ({"reduction": "sum"}, {"weight": w}, {"weight": w, "label_smoothing": 0.1}):
        want = reference(x, y, **options)
        assert_near(ce(x, y, **options), want.loss, want.loss_scale)


def test_float16_overflow():
    """A difference of logits beyond 65504: inf in float16, right in float32."""
    x = torch.tensor([[-60000.0, 60000.0]]).half()
    assert ce(x, torch.tensor([0])) == INF
    assert ce(x.float(), torch.tensor([0])) == 120000
    check(ce, x, torch.tensor([0]), {})


# ---- autograd ------------------------------------------------------------------------------------


def test_requires_grad_of_the_result():
    x, q = X.clone().requires_grad_(), torch.rand(6, 5, requires_grad=True)
    w = torch.rand(5, requires_grad=True)
    assert not ce(X, Y).requires_grad and not ce(X, q.detach()).requires_grad
    assert ce(x, Y).requires_grad and ce(X, q).requires_grad and ce(X, q.detach(), w).requires_grad
    with torch.no_grad():
        assert not ce(x, Y).requires_grad and not ce(x, Y, w).requires_grad
    with torch.inference_mode():
        result = ce(x, Y, w)
        assert result.is_inference() and not result.requires_grad
    assert torch.equal(result.clone(), ce(X, Y, w.detach()))


@pytest.mark.parametrize("case", SMALL_CASES, ids=case_ids(SMALL_CASES))
def test_backward_twice_with_retain_graph(case):
    """Same bits, and neither the saved tensors nor the upstream gradient were written to."""
    x, target, options = case.build(torch.float32)
    x.requires_grad_()
    loss = ce(x, target, **options)
    grad = torch.randn_like(loss)
    kept = [t.clone() for t in (x, target, grad)]
    first = torch.autograd.grad(loss, x, grad, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x, grad)[0]
    assert torch.equal(first, second)
    for tensor, copied in zip((x, target, grad), kept):
        assert torch.equal(tensor, copied)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x, grad)


@pytest.mark.parametrize("what", ["input", "target", "weight", "soft", "soft_weight", "smoothed"])
def test_in_place_edit_before_backward(what):
    e = 0.1 if what == "smoothed" else 0.0
    soft = what in ("soft", "soft_weight", "smoothed")
    base = torch.randn(6, 5, requires_grad=True)
    x, w = base * 1, torch.rand(5)
    target = torch.rand(6, 5) if soft else Y.clone()
    loss = ce(x, target, w, label_smoothing=e)
    edited = {"input": x, "target": target, "weight": w, "soft": target, "soft_weight": w,
              "smoothed": target}[what]
    with torch.no_grad():
        edited.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_the_target_needs_a_gradient():
    q, w = torch.rand(6, 5, requires_grad=True), torch.rand(5, requires_grad=True)
    ce(X, q, w).backward()
    want = reference(X, q, w)
    assert_near(q.grad, want.dprob, 4)
    assert_near(w.grad, want.dweight, 4)


def test_deterministic_mode_fills_memory_with_nan():
    """Every element of every result is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for case in [*SMALL_CASES, Case((3, 2000), reduction="none"), Case((300, 9)),
                     Case((2, 3, 40, 40))]:
            for layout in LAYOUTS:
                x, target, options = case.build(torch.float32)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    check(ce, as_layout(x, layout), target, options)
    finally:
        torch.use_deterministic_algorithms(before)


def test_gradient_follows_a_view():
    """Slices of a larger leaf: nothing outside the slice gets a gradient."""
    base = torch.randn(4, 9, 7, requires_grad=True)
    logits = base[:, :-1].transpose(1, 2)
    y = torch.randint(7, (4, 8))
    ce(logits, y).backward()
    want = reference(logits, y)
    assert_near(base.grad[:, :-1].transpose(1, 2), want.dx, 1)
    assert (base.grad[:, -1] == 0).all()


# ---- material that ships inside torch ------------------------------------------------------------

OP = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
MODULE = next(m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(len(list(OP.sample_inputs("cpu", torch.float32)))))
def test_op_info_sample(number, dtype, device):
    sample = list(OP.sample_inputs(device, DTYPES[dtype], requires_grad=True))[number]
    x, target = sample.input, sample.args[0]
    got = ce(x, target, **sample.kwargs)
    native = F.cross_entropy(x, target, **sample.kwargs)
    assert got.dtype == native.dtype and got.shape == native.shape
    inputs = [t for t in (x, target, sample.kwargs.get("weight"))
              if t is not None and t.requires_grad]
    grads = torch.autograd.grad(got, inputs, torch.ones_like(got))
    want = reference(x, target, **sample.kwargs)
    assert_near(got, want.loss, want.loss_scale)
    assert_near(grads[0], want.dx, want.dx_scale)
    if target.requires_grad:
        assert_near(grads[1], want.dprob, want.dprob.abs().max())
    if dtype == "f64":
        torch.testing.assert_close(got, native)
        torch.testing.assert_close(
            grads, torch.autograd.grad(native, inputs, torch.ones_like(native)))


def module_inputs(device, dtype):
    return MODULE.module_inputs_func(MODULE, device=device, dtype=dtype, requires_grad=False,
                                     training=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_module_info_inputs(dtype, device):
    inputs = list(module_inputs(device, DTYPES[dtype]))
    assert len(inputs) > 100
    for m in inputs:
        args, kwargs = m.constructor_input.args, m.constructor_input.kwargs
        loss = wce_torch.CrossEntropyLoss(*args, **kwargs)
        x, target = m.forward_input.args
        x = x.detach().requires_grad_()
        got = loss(x, target)
        want = reference(x, target, loss.weight, ignore_index=loss.ignore_index,
                         reduction=loss.reduction, label_smoothing=loss.label_smoothing)
        assert_near(got, want.loss, want.loss_scale, message=str(kwargs))
        (grad,) = torch.autograd.grad(got, x, torch.ones_like(got))
        assert_near(grad, want.dx, want.dx_scale, message=str(kwargs))
        if dtype == "f64":
            torch.testing.assert_close(got.detach(), m.reference_fn(loss, x.detach(), target),
                                       equal_nan=True)


@pytest.mark.skipif(MODULE.module_error_inputs_func is None, reason="torch 2.11 ships none")
def test_module_info_error_inputs():
    errors = list(MODULE.module_error_inputs_func(MODULE, device="cpu", dtype=torch.float32,
                                                  requires_grad=False, training=True))
    assert len(errors) == 7
    for err in errors:
        m = err.module_error_input
        loss = wce_torch.CrossEntropyLoss(*m.constructor_input.args, **m.constructor_input.kwargs)
        with pytest.raises(err.error_type, match=err.error_regex):
            loss(*m.forward_input.args, **m.forward_input.kwargs)


# ---- what torch's test_nn shows of the native loss -----------------------------------------------


def test_bfloat16_is_near_float32():
    x, y = torch.randn(16, 20), torch.randint(20, (16,))
    low = x.bfloat16()
    loss, dx, *_ = run(ce, low, y, {})
    want, want_dx, *_ = run(ce, low.float(), y, {})
    torch.testing.assert_close(loss.float(), want, rtol=2**-8, atol=0)
    torch.testing.assert_close(dx.float(), want_dx, rtol=2**-8, atol=1e-7)


def test_precision_of_a_large_float32_mean():
    """float32 mean over 16 x 768 x 768 pixels equals the float64 one at default tolerance."""
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(16, 2, 768, 768, generator=gen)
    y = torch.randint(2, (16, 768, 768), generator=gen)
    torch.testing.assert_close(ce(x, y).double(), ce(x.double(), y), rtol=2e-7, atol=0)
    torch.testing.assert_close(ce(x, y).double(), F.cross_entropy(x.double(), y), rtol=2e-7, atol=0)


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("weight", [False, True])
def test_unnormalised_probabilities_all_reductions(k, weight):
    shape = (4, 5, *(2, 3, 2, 3)[:k])
    x, q = torch.randn(shape), torch.randn(shape) * 3
    w = torch.randn(5) if weight else None
    for reduction in REDUCTIONS:
        check(ce, x, q, {"weight": w, "reduction": reduction}, soft_grads=True)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_unit_weights_are_no_weights(soft):
    for reduction, e in itertools.product(REDUCTIONS, (0.0, 0.1)):
        x, target, options = Case((4, 5, 3), soft=soft, reduction=reduction, smoothing=e).build()
        got = run(ce, x, target, {**options, "weight": torch.ones(5).double()}, soft_grads=False)
        want = run(ce, x, target, options, soft_grads=False)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_no_batch_dimension(soft):
    x = torch.randn(5)
    target = torch.rand(5) if soft else torch.tensor(3)
    for reduction, w, e in itertools.product(REDUCTIONS, (None, torch.rand(5)), (0.0, 0.2)):
        options = {"reduction": reduction, "weight": w, "label_smoothing": e}
        alone, batch = run(ce, x, target, options), run(ce, x[None], target[None], options)
        assert alone[0].shape == () and torch.equal(alone[0], batch[0].reshape(()))
        assert torch.equal(alone[1], batch[1][0])


@pytest.mark.parametrize("weight", [None, torch.arange(1.0, 6.0).double()], ids=["", "w"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)], ids=str)
def test_one_hot_equals_index(shape, weight):
    x = torch.randn(shape).double()
    y = torch.randint(5, shape[:1] + shape[2:])
    onehot = F.one_hot(y, 5).movedim(-1, 1).double()
    for reduction in REDUCTIONS:
        same = not (reduction == "mean" and weight is not None)
        got = ce(x, onehot, weight, reduction=reduction)
        want = ce(x, y, weight, reduction=reduction)
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-13) == same


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 5, 3, 4)], ids=str)
def test_smoothing_equals_the_mixed_soft_target(shape):
    classes = 5
    x = torch.randn(shape).double()
    y = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    onehot = F.one_hot(y, classes).double()
    onehot = onehot.movedim(-1, 1) if len(shape) > 1 else onehot
    for e, reduction in itertools.product((0.05, 0.15, 1.0), REDUCTIONS):
        mixed = onehot * (1 - e) + e / classes
        torch.testing.assert_close(ce(x, y, label_smoothing=e, reduction=reduction),
                                   ce(x, mixed, reduction=reduction), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("weight", [None, torch.rand(5).double()], ids=["", "w"])
def test_smoothing_of_probabilities(weight):
    x, q = torch.randn(4, 5, 3).double(), torch.rand(4, 5, 3).double()
    for e, reduction in itertools.product((0.05, 0.15, 1.0), REDUCTIONS):
        torch.testing.assert_close(
            ce(x, q, weight, label_smoothing=e, reduction=reduction),
            ce(x, q * (1 - e) + e / 5, weight, reduction=reduction), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ignore_index", [-100, -2, 5])
@pytest.mark.parametrize("weight", [None, torch.rand(5) + 0.1], ids=["", "w"])
@pytest.mark.parametrize("shape", [(8, 5), (2, 5, 3, 4)], ids=str)
def test_ignored_rows_with_smoothing(shape, weight, ignore_index):
    """Logits of an ignored row never matter and denominators leave it out."""
    y = torch.randint(5, shape[:1] + shape[2:])
    drop = torch.rand(y.shape) < 0.4
    drop.view(-1)[0] = True
    y = y.masked_fill(drop, ignore_index)
    x = torch.randn(shape)
    other = torch.where(drop.unsqueeze(1), torch.randn(shape) * 9, x)
    keep = ~drop
    for reduction, e in itertools.product(REDUCTIONS, (0.0, 0.05, 0.15)):
        options = {"weight": weight, "label_smoothing": e, "reduction": reduction}
        a = run(ce, x, y, {**options, "ignore_index": ignore_index})
        b = run(ce, other, y, {**options, "ignore_index": ignore_index})
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        if reduction == "mean":  # as if the rows were not there
            rows = x.movedim(1, -1)[keep]
            want = reference(rows, y[keep], **options)
            assert_near(a[0], want.loss, 10)


def test_ignore_index_far_outside_forward_and_backward():
    for shape in ((4, 3), (2, 3, 2, 2)):
        x = torch.randn(shape)
        y = torch.randint(3, shape[:1] + shape[2:])
        y.view(-1)[::2] = 255
        for reduction in REDUCTIONS:
            want = check(ce, x, y, {"ignore_index": 255, "reduction": reduction})
            assert (want.dx == 0).any()


def test_byte_target_matches_long():
    x, y = torch.randn(10, 3), torch.randint(3, (10,))
    a, b = run(ce, x, y.to(torch.uint8), {}), run(ce, x, y, {})
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype, offset", [("f32", 1e7), ("f64", 1e7), ("f16", 1.5e3)])
def test_offset_does_not_matter(dtype, offset):
    """Small integers plus a large offset are exact in the type, so the bits are the same."""
    x = torch.randint(-8, 8, (16, 9)).to(DTYPES[dtype])
    y = torch.randint(9, (16,))
    for options in ({}, {"label_smoothing": 0.1}):
        a, b = run(ce, x, y, options), run(ce, x + offset, y, options)
        assert torch.equal(x + offset - offset, x)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_extreme_logits_against_jacobian():
    """Logits up to 1e5 and signed weights: vjp equals the product with the jacobian."""
    x = torch.tensor([[1e5, -1e5, 0.0], [-1e5, 1e5, 3.0]], dtype=torch.float64)
    y, w = torch.tensor([0, 2]), torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    jac = torch.autograd.functional.jacobian(lambda t: ce(t, y, w, reduction="none"), x)
    v = torch.tensor([0.3, -2.0], dtype=torch.float64)
    (vjp,) = torch.autograd.grad(ce(x.requires_grad_(), y, w, reduction="none"), x, v)
    torch.testing.assert_close(vjp, torch.einsum("n,nmc->mc", v, jac))


def test_module_equals_function():
    w = torch.rand(5)
    module = wce_torch.CrossEntropyLoss(w, ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert torch.equal(module(X, Y), ce(X, Y, w, ignore_index=2, reduction="sum",
                                        label_smoothing=0.1))
    assert repr(module) == "CrossEntropyLoss()"
    assert isinstance(copy.deepcopy(module), torch.nn.CrossEntropyLoss)

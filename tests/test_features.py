"""What torch's loss does not have: priors, sample weights, masks, normalizers, row outputs,
MixUp."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils._python_dispatch
from helpers import peak_bytes
from reference import (
    DTYPES,
    FEATURE_CASES,
    LAYOUTS,
    REDUCTIONS,
    Case,
    as_layout,
    assert_near,
    case_ids,
    check,
    log_prior_of,
    mixed_reference,
    reference,
    run,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend

import wce_torch
from wce_torch.arguments import LogPrior

ce = wce_torch.cross_entropy
with_stats = wce_torch.cross_entropy_with_stats
mixup = wce_torch.mixup_cross_entropy
CLOSE = {"rtol": 1e-10, "atol": 1e-11, "equal_nan": True}


@pytest.mark.parametrize("case", FEATURE_CASES, ids=case_ids(FEATURE_CASES))
def test_float64_equals_reference(case, device):
    x, target, options = case.build(device=device)
    grad = case.upstream(device=device)
    loss, dx, dprob, dweight = run(ce, x, target, options, grad)
    want = reference(x, target, **options, grad=grad)
    torch.testing.assert_close(loss, want.loss, **CLOSE)
    torch.testing.assert_close(dx, want.dx, **CLOSE)
    if dprob is not None:
        torch.testing.assert_close(dprob, want.dprob, **CLOSE)
    if dweight is not None:
        torch.testing.assert_close(dweight, want.dweight, **CLOSE)


@pytest.mark.parametrize("case", FEATURE_CASES[::3], ids=case_ids(FEATURE_CASES[::3]))
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_kernels_equal_reference(case, dtype, device):
    """Logits alone need a gradient: the fused path. In every layout."""
    x, target, options = case.build(DTYPES[dtype], device)
    for layout in LAYOUTS:
        check(ce, as_layout(x, layout), target, options)


# ---- class prior ---------------------------------------------------------------------------------


def test_prior_is_inside_the_softmax():
    """p_k = q_k^tau e^x_k / sum_j q_j^tau e^x_j, written out."""
    x, q, tau = torch.randn(6, 5).double(), torch.rand(5).double() + 0.1, 0.7
    y = torch.randint(5, (6,))
    powers = q**tau * torch.exp(x)
    p = powers / powers.sum(1, keepdim=True)
    want = -torch.log(p[torch.arange(6), y])
    torch.testing.assert_close(ce(x, y, class_prior=q, tau=tau, reduction="none"), want)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor], ids=lambda f: f.__name__)
def test_prior_types(make):
    """Counts of any kind: only ratios matter."""
    x, y = torch.randn(6, 4), torch.randint(4, (6,))
    counts = [10, 20, 5, 65]
    want = reference(x, y, class_prior=torch.tensor(counts))
    got = ce(x, y, class_prior=make(counts))
    assert_near(got, want.loss, want.loss_scale)
    scaled = ce(x, y, class_prior=torch.tensor(counts).double() / 100)
    assert_near(scaled, want.loss, want.loss_scale)


PRIOR_VIEWS = {
    "strided": lambda q: torch.stack([q, -q], 1)[:, 0],
    "negative view": lambda q: torch._neg_view(-q),
    "float64": lambda q: q.double(),
    "int64": lambda q: (q * 1000).round().long(),
    "int32": lambda q: (q * 1000).round().int(),
    "half": lambda q: (q * 4).round().half(),
    "gradient": lambda q: q.clone().requires_grad_(),
}


@pytest.mark.parametrize("classes", [7, 2000])
@pytest.mark.parametrize("view", PRIOR_VIEWS)
def test_prior_is_read_from_any_memory(view, classes):
    x, y = torch.randn(3, classes).double(), torch.randint(classes, (3,))
    q = PRIOR_VIEWS[view](torch.rand(classes) + 0.5)
    want = reference(x, y, class_prior=q.detach().double()).loss
    torch.testing.assert_close(ce(x, y, class_prior=q), want, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", [("prior",), ("sample_weight",), ("mask",),
                                     ("prior", "sample_weight", "mask")], ids="-".join)
@pytest.mark.parametrize("kept", [False, True], ids=["", "module"])
def test_options_of_a_usual_call_take_a_short_way(options, reduction, dtype, kept):
    """It gives what the long way gives, which a tau that is no float takes."""
    x, y, keywords = Case((40, 7), **dict.fromkeys(options, True), weight="positive").build(dtype)
    if kept and "class_prior" in keywords:
        q = keywords["class_prior"].double()
        keywords["class_prior"] = LogPrior((q / q.sum()).log())
    results = []
    for tau in (3.0, 3):
        leaf = x.clone().requires_grad_()
        loss = ce(leaf, y, **{**keywords, "tau": tau, "reduction": reduction})
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(short, long, rtol=1e-6 if dtype != torch.bfloat16 else 2**-7,
                                   atol=1e-7 if dtype != torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("tau", [1.0, 1], ids=["short", "long"])
@pytest.mark.parametrize("loss", [
    lambda x, y, **k: ce(x, y, sample_weight=torch.ones(6), **k),
    lambda x, y, **k: ce(x, y, class_prior=torch.ones(5), **k),
    lambda x, y, **k: with_stats(x, y, **k).loss], ids=["sample_weight", "prior", "stats"])
def test_bad_target_inside_a_transform(loss, tau):
    """Also where the transform has wrapped the target."""
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 7, 0])
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds\. \(position \[4\]"):
        torch.func.grad(lambda x, y: loss(x, y, tau=tau))(x, y)


def test_prior_of_a_subclass_is_left_to_it():
    class Tagged(torch.Tensor):
        pass

    x, y, q = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(3)
    assert type(ce(x, y, class_prior=q.as_subclass(Tagged))) is Tagged
    assert type(with_stats(x, y, class_prior=q.as_subclass(Tagged)).loss) is Tagged


def test_uniform_prior_and_tau_zero_change_nothing():
    x, y = torch.randn(6, 4).double(), torch.randint(4, (6,))
    torch.testing.assert_close(ce(x, y, class_prior=torch.full((4,), 3.0)), ce(x, y), **CLOSE)
    q = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(ce(x, y, class_prior=q, tau=0.0), ce(x, y), **CLOSE)
    assert ce(x, y, class_prior=q) != ce(x, y)


@pytest.mark.parametrize("shape", [(6, 4), (6, 40), (2, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_with_prior_zero(shape, smoothing):
    """It never gets probability: loss and gradient are those of the classes without it."""
    positions = shape[:1] + shape[2:]
    x = torch.randn(shape)
    y = torch.randint(2, positions)  # class 2 does not occur
    q = torch.arange(1.0, shape[1] + 1)
    q[2] = 0
    want = reference(x, y, class_prior=q, reduction="none")
    loss, dx, *_ = run(ce, x, y, {"class_prior": q, "reduction": "none"})
    assert_near(loss, want.loss, want.loss_scale)
    assert loss.isfinite().all() and (dx[:, 2] == 0).all()
    # With smoothing every class has a share of the target: the loss is infinite, and says so.
    if smoothing:
        assert (ce(x, y, class_prior=q, label_smoothing=smoothing, reduction="none")
                == math.inf).all()


def test_target_on_a_class_with_prior_zero():
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    q = torch.tensor([1.0, 2.0, 0.0, 4.0])
    for reduction in REDUCTIONS:
        with pytest.raises((ValueError, IndexError, RuntimeError), match="prior") as caught:
            ce(x, y, class_prior=q, reduction=reduction)
        assert "2" in str(caught.value)
    y[2] = -100
    assert ce(x, y, class_prior=q).isfinite()
    assert ce(x, torch.tensor([0, 1, 2, 3, 0, 1]), class_prior=q, tau=0.0).isfinite()


BAD = {
    "prior_negative": (dict(class_prior=torch.tensor([1.0, -1, 2, 3])), "class_prior", "-1"),
    "prior_nan": (dict(class_prior=torch.tensor([1.0, math.nan, 2, 3])), "class_prior", "nan"),
    "prior_inf": (dict(class_prior=torch.tensor([1.0, math.inf, 2, 3])), "class_prior", "inf"),
    "prior_zeros": (dict(class_prior=torch.zeros(4)), "class_prior", "0"),
    "prior_negative_view": (dict(class_prior=torch._neg_view(torch.ones(4))), "class_prior", "-1"),
    "prior_zero_tensor": (dict(class_prior=torch._efficientzerotensor(4)), "class_prior", "0"),
    "prior_size": (dict(class_prior=torch.ones(5)), "(class|log)_prior", "5"),
    "prior_rank": (dict(class_prior=torch.ones(1, 4)), "class_prior", r"1, 4"),
    "prior_text": (dict(class_prior=["a", "b"]), "class_prior", "'a'"),
    "prior_ragged": (dict(class_prior=[[1], [2, 3]]), "class_prior", r"\[2, 3\]"),
    "prior_sum": (dict(class_prior=[1e308] * 4), "class_prior", "inf"),
    "prior_complex": (dict(class_prior=torch.ones(4) + 0j), "class_prior", "complex"),
    "tau_negative": (dict(class_prior=torch.ones(4), tau=-0.5), "tau", "-0.5"),
    "tau_nan": (dict(class_prior=torch.ones(4), tau=math.nan), "tau", "nan"),
    "tau_inf": (dict(class_prior=torch.ones(4), tau=math.inf), "tau", "inf"),
    "tau_huge": (dict(class_prior=torch.ones(4), tau=1e39), "tau", r"1e\+39"),
    "tau_values": (dict(class_prior=torch.ones(4), tau=torch.ones(2)), "tau", r"Tensor.*2"),
    "tau_text": (dict(class_prior=torch.ones(4), tau="1"), "tau", "str"),
    "tau_too_large": (dict(class_prior=torch.ones(4), tau=10**400), "tau", "int"),
    "smoothing_too_large": (dict(empty="zero", label_smoothing=10**400), "label_smoothing", "int"),
    "sample_weight_size": (dict(sample_weight=torch.ones(5)), "sample_weight", "5"),
    "sample_weight_rank": (dict(sample_weight=torch.ones(6, 1)), "sample_weight", "6, 1"),
    "sample_weight_type": (dict(sample_weight=torch.ones(6, dtype=torch.long)), "sample_weight",
                           "(?i)long|int64"),
    "sample_weight_list": (dict(sample_weight=[1.0] * 6), "sample_weight", "list"),
    "mask_size": (dict(mask=torch.ones(5, dtype=torch.bool)), "mask", "5"),
    "mask_type": (dict(mask=torch.ones(6)), "mask", "(?i)float"),
    "mask_list": (dict(mask=[True] * 6), "mask", "list"),
    "normalizer_shape": (dict(normalizer=torch.ones(2)), "normalizer", "2"),
    "normalizer_text": (dict(normalizer="3"), "normalizer", "str"),
    "normalizer_complex": (dict(normalizer=torch.tensor(1j)), "normalizer", "(?i)complex"),
    "skip_text": (dict(skip_empty_targets="no"), "skip_empty_targets", "no"),
    "empty": (dict(empty="one"), "empty", "one"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("loss_fn", [ce, with_stats], ids=["loss", "stats"])
def test_bad_argument_names_itself_and_what_came(name, loss_fn):
    options, argument, came = BAD[name]
    x, y = torch.randn(6, 4), torch.randint(4, (6,))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=argument) as caught:
        loss_fn(x, y, **options)
    assert re.search(came, str(caught.value)), str(caught.value)
    assert "xpected" in str(caught.value) or "must be" in str(caught.value), str(caught.value)
    loss_fn(x, y)


@pytest.mark.parametrize("name", ["class_prior", "sample_weight", "mask"])
def test_device_of_an_option(name):
    value = {"class_prior": torch.ones(4), "sample_weight": torch.ones(6),
             "mask": torch.ones(6, dtype=torch.bool)}[name].to("meta")
    with pytest.raises(RuntimeError, match="device"):
        ce(torch.randn(6, 4), torch.randint(4, (6,)), **{name: value})


def test_module_with_prior():
    x, y = torch.randn(6, 4), torch.randint(4, (6,))
    q = torch.tensor([1.0, 2.0, 3.0, 4.0])
    module = wce_torch.CrossEntropyLoss(class_prior=q, tau=0.5, weight=torch.ones(4))
    want = reference(x, y, class_prior=q, tau=0.5)
    assert_near(module(x, y), want.loss, want.loss_scale)
    buffers = dict(module.named_buffers())
    assert len(buffers) == 2 and list(module.parameters()) == []
    assert module.to(torch.float64)(x.double(), y).dtype == torch.float64
    # Saved and loaded: the prior comes along.
    other = wce_torch.CrossEntropyLoss(class_prior=torch.ones(4), tau=0.5, weight=torch.ones(4))
    assert not torch.equal(other(x, y), module.float()(x, y))
    other.load_state_dict(module.state_dict())
    assert_near(other(x, y), want.loss, want.loss_scale)
    # Without a prior the state dict is torch's own.
    plain, native = wce_torch.CrossEntropyLoss(q), torch.nn.CrossEntropyLoss(q)
    assert plain.state_dict().keys() == native.state_dict().keys()
    for wrong in (dict(tau=-1.0), dict(empty="x"), dict(class_prior=torch.zeros(3))):
        with pytest.raises(ValueError):
            wce_torch.CrossEntropyLoss(**wrong)


def test_module_empty_zero():
    y = torch.full((3,), -100)
    assert wce_torch.CrossEntropyLoss(empty="zero")(torch.randn(3, 4), y) == 0
    assert wce_torch.CrossEntropyLoss()(torch.randn(3, 4), y).isnan()


@pytest.mark.parametrize("module_dtype", [torch.float16, torch.bfloat16])
def test_module_in_half_precision_keeps_a_usable_prior(module_dtype):
    """Rounding log q to 16 bits moves the loss by less than their precision times the largest."""
    x, y = torch.randn(6, 4), torch.randint(4, (6,))
    q = torch.tensor([1.0, 20.0, 300.0, 4000.0])
    module = wce_torch.CrossEntropyLoss(class_prior=q).to(module_dtype)
    assert (module(x, y) - ce(x, y, class_prior=q)).abs() < 2 * 9 * 2.0**-8


# ---- sample weights, masks, normalizers ----------------------------------------------------------


@pytest.mark.parametrize("s_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_sample_weight_dtypes_and_strides(s_dtype, dtype):
    x, y, options = Case((6, 5), weight="positive", sample_weight=True).build(DTYPES[dtype])
    s = options["sample_weight"].to(s_dtype)
    options["sample_weight"] = s
    check(ce, x, y, options)
    strided = torch.stack([s, s], 1)[:, 0]
    assert strided.stride() == (2,)
    got = run(ce, x, y, {**options, "sample_weight": strided})
    assert same_bits(got[1], run(ce, x, y, options)[1])


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
def test_gradient_of_the_sample_weight(reduction, soft, dtype):
    case = Case((3, 5, 4), soft=soft, sample_weight=True, weight="positive", mask=True,
                reduction=reduction)
    x, target, options = case.build(DTYPES[dtype])
    s = options["sample_weight"].requires_grad_()
    loss = ce(x.requires_grad_(), target, **options)
    loss.backward(torch.ones_like(loss))
    want = reference(x, target, **options)
    assert s.grad.dtype == s.dtype
    assert_near(s.grad, want.dsample_weight, 10)
    assert_near(x.grad, want.dx, want.dx_scale)


def test_sample_weight_of_rows_that_do_not_count():
    """nan and inf there never reach the sum, the denominator or a gradient."""
    x, y = torch.randn(4, 5), torch.tensor([1, -100, 2, 3])
    s = torch.tensor([1.0, math.nan, 2.0, 3.0])
    for reduction in REDUCTIONS:
        check(ce, x, y, {"sample_weight": s, "reduction": reduction})
    check(ce, x, torch.tensor([1, 0, 2, 3]),
          {"sample_weight": s, "mask": torch.tensor([True, False, True, True])})


def test_zero_sample_weights_are_like_missing_rows():
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    s = torch.tensor([1.0, 0, 1, 0, 1, 0])
    got = run(ce, x, y, {"sample_weight": s})
    want = reference(x[::2], y[::2])
    assert_near(got[0], want.loss, want.loss_scale)
    assert (got[1][1::2] == 0).all()


@pytest.mark.parametrize("target", ["index", "soft"])
def test_masked_row_is_exactly_zero(target):
    """Like an ignored row: logits of nan, and any upstream gradient."""
    x = torch.randn(4, 5)
    x[1] = math.nan
    t = torch.randint(5, (4,)) if target == "index" else torch.rand(4, 5)
    mask = torch.tensor([True, False, True, True])
    for reduction in REDUCTIONS:
        want = check(ce, x, t, {"mask": mask, "reduction": reduction})
        assert (want.dx[1] == 0).all()
    _, dx, *_ = run(ce, x, t, {"mask": mask, "reduction": "none"},
                    torch.tensor([1.0, math.nan, 1.0, 1.0]), soft_grads=False)
    assert (dx[1] == 0).all() and dx[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 40), (2, 5, 3, 4), (5,)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_empty_soft_targets(shape, smoothing):
    """Off: a row of zeros counts in the mean, as in torch. On: neither in the sum nor the mean."""
    case = Case(shape, soft=True, skip_empty=True, smoothing=smoothing)
    x, q, options = case.build(torch.float32)
    off = {**options, "skip_empty_targets": False}
    torch.testing.assert_close(ce(x, q, **off), F.cross_entropy(x, q, label_smoothing=smoothing))
    for reduction in REDUCTIONS:
        check(ce, x, q, {**options, "reduction": reduction})
    zeros = torch.zeros_like(q)
    assert ce(x, zeros, **options).isnan() and ce(x, zeros, **options, empty="zero") == 0
    dx = run(ce, x, zeros, options, soft_grads=False)[1]
    assert (dx == 0).all()


def test_negative_and_nan_probabilities_are_not_empty():
    x = torch.randn(3, 4)
    q = torch.zeros(3, 4)
    q[0, 1], q[1, 2] = -0.5, 1.0
    check(ce, x, q, {"skip_empty_targets": True})
    q[0, 1] = math.nan
    assert ce(x, q, skip_empty_targets=True).isnan()


@pytest.mark.parametrize("normalizer", [3, 2.5, torch.tensor(4.0), torch.tensor(7),
                                        torch.tensor(2.5).double(), np.float64(1.5)], ids=repr)
def test_normalizer_types(normalizer):
    x, y, options = Case((6, 5), weight="positive").build(torch.float32)
    want = check(ce, x, y, {**options, "normalizer": normalizer})
    total = ce(x, y, options["weight"], reduction="sum")
    assert_near(ce(x, y, **options, normalizer=normalizer), total.double() / float(normalizer),
                want.loss_scale)


def test_normalizer_with_a_gradient():
    x, y = torch.randn(6, 5).double(), torch.randint(5, (6,))
    n = torch.tensor(3.0).double().requires_grad_()
    loss = ce(x, y, normalizer=n)
    (dn,) = torch.autograd.grad(loss, n)
    torch.testing.assert_close(dn, -(loss / n).detach())


def test_normalizer_of_zero_divides():
    """As IEEE says: the caller's denominator is taken as it is; the mean's own one of 0 gives nan,
    also where smoothing adds to the sum."""
    x, y, w = torch.randn(6, 5), torch.zeros(6, dtype=torch.long), torch.tensor([0.0, 1, 1, 1, 1])
    for options in ({}, {"sample_weight": torch.ones(6)}):
        smooth = {**options, "weight": w, "label_smoothing": 0.1}
        assert ce(x, y, **smooth).isnan()
        assert ce(x, y, **smooth, normalizer=0) == math.inf
        assert ce(x, y, **smooth, normalizer=-0.0) == -math.inf
        assert with_stats(x, y, **smooth).loss.isnan()
        assert with_stats(x, y, **smooth, normalizer=0).loss == math.inf
    nothing = {"sample_weight": torch.zeros(6), "label_smoothing": 0.1}
    assert ce(x, y, **nothing).isnan() and ce(x, y, **nothing, normalizer=0).isnan()
    assert mixup(x, y, torch.ones_like(y), 0.5, w, label_smoothing=0.1).isnan()


@pytest.mark.parametrize("loss_fn", [ce, F.cross_entropy], ids=["ours", "native"])
def test_second_order_where_the_total_weight_is_zero(loss_fn):
    """The composite divides by what forward divided by."""
    x = torch.randn(3, 5).double().requires_grad_()
    y, w = torch.tensor([0, -100, 0]), torch.tensor([0.0, 1, 1, 1, 1]).double()
    loss = loss_fn(x, y, w, label_smoothing=0.1)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    assert dx[[0, 2]].isnan().all() and (dx[1] == 0).all()
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    assert ddx[[0, 2]].isnan().all() and (ddx[1] == 0).all()


def test_sum_over_a_normalizer_is_the_mean():
    x, y, options = Case((6, 5), weight="positive").build(torch.float64)
    w = options["weight"]
    total = wce_torch.class_weight_sum(y, w)
    torch.testing.assert_close(ce(x, y, w, normalizer=total), ce(x, y, w), rtol=1e-6, atol=0)


@pytest.mark.parametrize("y_dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("w_dtype", [None, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0,)], ids=str)
def test_class_weight_sum(shape, w_dtype, y_dtype):
    y = torch.randint(5, shape)
    w = None if w_dtype is None else (torch.rand(5) + 0.5).to(w_dtype)
    if y.numel() > 2:
        y.view(-1)[1] = 200
    ignored = 200
    keep = y[y != ignored]
    want = torch.tensor(float(keep.numel())) if w is None else w.double()[keep].sum()
    got = wce_torch.class_weight_sum(y.to(y_dtype), w, ignore_index=ignored)
    assert got.dtype == torch.float32 and got.shape == () and not got.requires_grad
    assert_near(got, want.double(), 1)


def test_class_weight_sum_of_many():
    """A count beyond 2^24 and a sum that fp32 cannot add up one by one."""
    y = torch.zeros(1, dtype=torch.uint8).expand(2**25 + 3)
    assert wce_torch.class_weight_sum(y) == 2**25 + 4  # to the nearest float32
    got = wce_torch.class_weight_sum(y[: 2**22], torch.tensor([0.1, 1.0]))
    assert_near(got, torch.tensor(2**22 * float(torch.tensor(0.1))).double(), 0)


def test_class_weight_sum_errors():
    with pytest.raises(TypeError, match="target"):
        wce_torch.class_weight_sum(torch.rand(3))
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        wce_torch.class_weight_sum(torch.tensor([0, 9]), torch.ones(3))
    with pytest.raises((ValueError, RuntimeError), match="weight"):
        wce_torch.class_weight_sum(torch.tensor([0, 1]), torch.ones(1, 3))
    with pytest.raises(TypeError, match="target.*bool"):
        wce_torch.class_weight_sum(torch.tensor([True, False]))
    with pytest.raises(TypeError, match="weight.*list"):
        wce_torch.class_weight_sum(torch.tensor([0, 1]), [1.0, 2.0])
    with pytest.raises(RuntimeError, match="weight.*meta"):
        wce_torch.class_weight_sum(torch.tensor([0, 1]), torch.ones(2, device="meta"))


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_empty_mean(soft):
    x = torch.randn(3, 4)
    t = torch.rand(3, 4) if soft else torch.randint(4, (3,))
    nobody = torch.zeros(3, dtype=torch.bool)
    assert ce(x, t, mask=nobody).isnan() and ce(x, t, mask=nobody, empty="zero") == 0
    assert ce(x, t, mask=nobody, normalizer=2.0) == 0
    assert ce(x[:0], t[:0]).isnan() and ce(x[:0], t[:0], empty="zero") == 0
    assert_near(ce(x, t, empty="zero"), reference(x, t).loss, 10)
    leaf = x.clone().requires_grad_()
    ce(leaf, t, mask=nobody, empty="zero").backward()
    assert (leaf.grad == 0).all()
    # nan of another origin stays.
    assert ce(x * math.nan, t, empty="zero").isnan()


def test_empty_zero_is_not_for_zero_weights():
    """Rows that count with weight 0 are not nothing: the mean stays undefined."""
    x, y, w = torch.randn(3, 4), torch.zeros(3, dtype=torch.long), torch.tensor([0.0, 1, 1, 1])
    assert ce(x, y, w, empty="zero").isnan()


# ---- row outputs ---------------------------------------------------------------------------------

STATS_CASES = [Case((6, 5)), Case((6, 40), weight="positive"), Case((5,)),
               Case((2, 5, 3, 4), smoothing=0.1, weight="positive"), Case((3, 70, 5), prior=True),
               Case((2, 5, 3), sample_weight=True, mask=True, prior=True, reduction="sum"),
               Case((6, 5), reduction="none", ignore="inside"), Case((6, 5), normalizer=True),
               Case((6, 5), soft=True, weight="positive"),
               Case((2, 40, 3), soft=True, prior=True, mask=True, skip_empty=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", STATS_CASES, ids=case_ids(STATS_CASES))
def test_stats(case, dtype, device):
    x, target, options = case.build(DTYPES[dtype], device)
    for layout in LAYOUTS:
        stats = with_stats(as_layout(x, layout), target, **options)
        want = reference(x, target, **options)
        assert stats._fields == ("loss", "lse", "log_prob", "correct", "entropy")
        assert_near(stats.loss, want.loss, want.loss_scale)
        rows = torch.float64 if dtype == "f64" else torch.float32
        assert stats.lse.dtype == stats.entropy.dtype == rows
        assert_near(stats.lse, want.lse, 20)
        assert_near(stats.entropy, want.entropy, 20)
        if not case.soft:
            assert stats.correct.dtype == torch.bool and stats.log_prob.dtype == rows
            assert_near(stats.log_prob, want.log_prob, 20)
            assert torch.equal(stats.correct, want.correct)


@pytest.mark.parametrize("case", [c for c in STATS_CASES if not c.soft],
                         ids=case_ids([c for c in STATS_CASES if not c.soft]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_stats(case, dtype, device):
    """Of the loss, lse and log_prob, alone and together; entropy and correct have none."""
    x, y, options = case.build(DTYPES[dtype], device)
    leaf = x.clone().requires_grad_()
    stats = with_stats(leaf, y, **options)
    assert stats.lse.requires_grad and stats.log_prob.requires_grad
    assert not stats.entropy.requires_grad and not stats.correct.requires_grad
    h, u = torch.randn_like(stats.lse), torch.randn_like(stats.lse)
    g = torch.ones_like(stats.loss)
    args = {"lse": (stats.lse, h), "log_prob": (stats.log_prob, u), "loss": (stats.loss, g)}
    for names in (("lse",), ("log_prob",), ("loss",), ("lse", "log_prob"),
                  ("loss", "lse", "log_prob")):
        outputs, grads = zip(*[args[name] for name in names])
        (dx,) = torch.autograd.grad(outputs, leaf, grads, retain_graph=True)
        want = reference(x, y, **options, grad=1.0 if "loss" in names else 0.0,
                         grad_lse=h if "lse" in names else None,
                         grad_log_prob=u if "log_prob" in names else None)
        assert dx.dtype == x.dtype
        assert_near(dx, want.dx, want.dx_scale + 8, message=str(names))


def test_stats_of_special_rows():
    x = torch.randn(6, 4)
    x[0] = math.nan
    x[1, 2] = -math.inf
    x[2] = -math.inf
    x[3, 1] = math.inf
    x[4] = x[4] + 1e6
    y = torch.tensor([0, 2, 0, 1, 3, -100])
    stats, want = with_stats(x, y, reduction="none"), reference(x, y, reduction="none")
    assert_near(stats.loss, want.loss, want.loss_scale)
    assert_near(stats.lse, want.lse, 1)
    assert stats.log_prob[1] == -math.inf and stats.log_prob[5] == 0
    assert stats.lse[5].isfinite() and not stats.correct[5]
    assert_near(stats.entropy, want.entropy, 1)


@pytest.mark.parametrize("classes", [4, 40])
@pytest.mark.parametrize("forward_ad", [False, True], ids=["fused", "composite"])
def test_correct_in_special_rows(classes, forward_ad):
    """The largest logit of a row with nan is nan, which no class has; ties are correct."""
    x = torch.full((5, classes), -math.inf)
    x[0, :4] = torch.tensor([math.nan, 1, 0, 0.5])
    x[1, :4] = torch.tensor([0, 1, math.nan, 0.5])
    x[3, 0] = math.inf
    x[4, :2] = 1.0
    y = torch.tensor([1, 1, 0, 0, 1])
    with torch.autograd.forward_ad.dual_level():
        if forward_ad:
            x = torch.autograd.forward_ad.make_dual(x, torch.zeros_like(x))
        got = with_stats(x, y, reduction="none").correct
    assert got.tolist() == [False, False, True, True, True]


def test_entropy_bounds():
    equal = with_stats(torch.zeros(2, 1000), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(equal.entropy, torch.full((2,), math.log(1000)))
    sure = with_stats(torch.tensor([[0.0, -1e4, -math.inf]]), torch.tensor([0]))
    assert sure.entropy == 0 and sure.log_prob == 0 and sure.correct


def test_correct_is_accuracy():
    x, y = torch.randn(500, 12), torch.randint(12, (500,))
    assert torch.equal(with_stats(x, y).correct, x.argmax(1) == y)
    q = torch.arange(1.0, 13)
    shifted = x + log_prior_of(q, 1.0).float()
    assert torch.equal(with_stats(x, y, class_prior=q).correct, shifted.argmax(1) == y)


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
def test_z_loss(dtype):
    """loss + z*(lse^2).mean() equals autograd of the composed formula."""
    x, y = torch.randn(20, 50).to(DTYPES[dtype]), torch.randint(50, (20,))
    leaf = x.clone().requires_grad_()
    stats = with_stats(leaf, y, label_smoothing=0.1)
    total = stats.loss + 1e-2 * (stats.lse**2).mean()
    total.backward()
    wide = x.double().requires_grad_()
    want = F.cross_entropy(wide, y, label_smoothing=0.1) + 1e-2 * (
        torch.logsumexp(wide, 1) ** 2).mean()
    want.backward()
    assert_near(leaf.grad, wide.grad, 1)
    if dtype != "bf16":
        assert_near(total, want, 10)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_z_loss_memory(dtype):
    """One pass back: the gradient is the only tensor of the logits' size."""
    x, y = torch.randn(512, 1000).to(DTYPES[dtype]), torch.randint(1000, (512,))

    def step(stats_fn):
        leaf = x.detach().requires_grad_()
        loss, lse = stats_fn(leaf)
        torch.autograd.grad(loss + 1e-3 * (lse**2).mean(), leaf)

    def ours(leaf):
        stats = with_stats(leaf, y)
        return stats.loss, stats.lse

    buffer = x.numel() * x.element_size()
    assert buffer <= peak_bytes(lambda: step(ours)) <= 1.05 * buffer
    native = lambda leaf: (F.cross_entropy(leaf, y), torch.logsumexp(leaf, 1))  # noqa: E731
    assert peak_bytes(lambda: step(native)) > 1.9 * buffer


def test_second_order_of_the_stats():
    x, y = torch.randn(4, 5).double().requires_grad_(), torch.randint(5, (4,))

    def value(x):
        stats = with_stats(x, y)
        return stats.loss + (stats.lse**2).mean() + stats.log_prob.sum()

    assert torch.autograd.gradcheck(value, (x,))
    assert torch.autograd.gradgradcheck(value, (x,))
    hessian = torch.func.hessian(value)(x.detach())
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(value, x.detach()))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_stats_of_a_usual_call_take_a_short_way(reduction, dtype, autocast):
    """It gives what the long way gives, which a tau that is no float takes."""
    x, y, options = Case((40, 7), weight="positive", ignore="default").build(dtype)
    weight = options["weight"]
    outputs, grads = [], []
    with torch.autocast("cpu", enabled=autocast):
        for tau in (1.0, 1):
            leaf = x.clone().requires_grad_()
            outputs.append(with_stats(leaf, y, weight, reduction=reduction, tau=tau))
            grads.append(torch.autograd.grad(outputs[-1].loss.sum(), leaf)[0])
    assert same_bits(*grads)
    assert torch.equal(outputs[0].correct, outputs[1].correct)
    for name in ("loss", "lse", "log_prob", "entropy"):
        assert same_bits(*(getattr(stats, name) for stats in outputs)), name


def test_stats_errors():
    x = torch.randn(4, 5)
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds\."):
        with_stats(x, torch.tensor([0, 7, 1, 2]))
    with pytest.raises(ValueError, match="batch_size"):
        with_stats(x, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="label_smoothing"):
        with_stats(x, torch.tensor([0, 1, 2, 3]), label_smoothing=2.0)
    with pytest.raises(TypeError, match="target"):
        with_stats(x, 3)


# ---- MixUp ---------------------------------------------------------------------------------------


MIXES = [Case((6, 5)), Case((6, 40), weight="positive"), Case((5,), ignore="unused"),
         Case((2, 5, 3, 4), smoothing=0.1, weight="positive"),
         Case((6, 5), prior=True, smoothing=0.1, ignore="inside"), Case((3, 70, 5), prior=True)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["number", "scalar", "sample", "row", 0.0, 1.0])
@pytest.mark.parametrize("case", MIXES, ids=case_ids(MIXES))
def test_mixup(case, kind, dtype, reduction, device):
    x, a, options = case.build(DTYPES[dtype], device)
    b = case.build(DTYPES[dtype], device, seed=5)[1]
    options["reduction"] = reduction
    shape = {"sample": a.shape[:1], "row": a.shape}.get(kind, ())
    lam = torch.rand(shape, device=device) if kind in ("scalar", "sample", "row") else (
        0.3 if kind == "number" else kind)
    leaf = x.clone().requires_grad_()
    loss = mixup(leaf, a, b, lam, **options)
    (dx,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    options.pop("reduction")
    exact = lam.to(torch.float64) if isinstance(lam, torch.Tensor) else lam
    want, want_dx = mixed_reference(x, a, b, exact, reduction, **options)
    if math.isnan(float(want.sum())):
        return  # a target of a one-row case that is ignored: both means are undefined
    assert loss.dtype == x.dtype and dx.dtype == x.dtype
    size = 20 * (a.numel() if reduction == "sum" else 1)
    assert_near(loss, want, size)
    assert_near(dx, want_dx, 8)


def test_mixup_equals_two_calls():
    x, w = torch.randn(8, 5).double(), torch.rand(5).double()
    a, b = torch.randint(5, (8,)), torch.randint(5, (8,))
    a[2], b[3], a[4], b[4] = -100, -100, -100, -100
    for reduction, e in itertools.product(REDUCTIONS, (0.0, 0.1)):
        options = {"weight": w, "label_smoothing": e, "reduction": reduction}
        got = mixup(x, a, b, 0.3, **options)
        want = 0.3 * ce(x, a, **options) + 0.7 * ce(x, b, **options)
        torch.testing.assert_close(got, want)


def test_mixup_gradient_of_lam_and_second_order():
    x, y = torch.randn(6, 5).double().requires_grad_(), torch.randint(5, (6,))
    lam = torch.rand(6).double().clamp(0.1, 0.9).requires_grad_()
    function = lambda x, lam: mixup(x, y, y.flip(0), lam, label_smoothing=0.1)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, lam))
    assert torch.autograd.gradgradcheck(function, (x, lam))


def test_mixup_is_one_operator():
    """No operation of the size of the targets beside it, forward or backward."""
    x, y = torch.randn(64, 40), torch.randint(40, (64,))
    y[3] = -100
    other, w = y.flip(0), torch.rand(40)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= 64:
                seen.append(str(func))
            return out

    for lam in (0.3, torch.rand(64)):
        leaf = x.clone().requires_grad_()
        seen.clear()
        with Spy():
            mixup(leaf, y, other, lam, w).backward()
        assert [name for name in seen if "backward" in name] == ["wce.backward.default"]
        # What is left of that size is the check of lam's values, and the leaf's gradient.
        allowed = ("aten.ge", "aten.le", "aten.bitwise_and", "aten.detach", "wce.")
        assert all(name.startswith(allowed) for name in seen), seen


def test_mixup_compiles_once_for_all_lam():
    """lam is drawn anew for each batch."""
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    count = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, lam: mixup(x, y, y.flip(0), lam), fullgraph=True,
                             backend=count)
    for lam in (0.1, 0.2, 0.3, 0.4, 0.5):
        torch.testing.assert_close(compiled(x, lam), mixup(x, y, y.flip(0), lam))
    assert count.frame_count <= 2  # for one number, then for any


def test_mixup_reads_the_logits_once():
    """Memory: one buffer for the gradient, none for a second graph."""
    x, y = torch.randn(512, 1000), torch.randint(1000, (512,))

    def step():
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(mixup(leaf, y, y.flip(0), 0.3), leaf)

    assert peak_bytes(step) <= 1.05 * x.numel() * 4


@pytest.mark.parametrize("lam, words", [(1.5, "1.5"), (-0.1, "-0.1"), (math.nan, "nan"),
                                        (torch.tensor([0.5, 2.0, 0.1, 0.2]), "2"),
                                        (torch.ones(3), "3"),
                                        (torch.ones(4, dtype=torch.long), "int"),
                                        ("0.5", "str"), ([0.5] * 4, "list"),
                                        (np.full(4, 0.5), "ndarray of shape [4]")],
                         ids=["above", "below", "nan", "tensor", "shape", "integers", "text",
                              "list", "array"])
def test_mixup_bad_lam(lam, words):
    with pytest.raises((ValueError, TypeError), match="lam") as caught:
        mixup(torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3]), lam)
    assert words in str(caught.value)


def test_mixup_errors():
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    for a, b in ((y, y + 5), (y + 5, y)):
        with pytest.raises(IndexError, match=r"Target \d is out of bounds\."):
            mixup(x, a, b, 0.5)
    for a, b in ((y, y[:3]), (y[:3], y)):
        with pytest.raises(ValueError, match=r"target_b: expected the shape of target_a.*\[3\]"):
            mixup(x, a, b, 0.5)
    for name, a, b in (("target_a", y.float(), y), ("target_b", y, y.float()),
                       ("target_a", y > 1, y), ("target_b", y, x.softmax(1))):
        with pytest.raises(RuntimeError, match=f"{name}: expected class numbers, got"):
            mixup(x, a, b, 0.5)
    with pytest.raises(TypeError, match="'target_b' must be Tensor, not NoneType"):
        mixup(x, y, None, 0.5)
    for name, a, b in (("target_a", y.to("meta"), y), ("target_b", y, y.to("meta"))):
        with pytest.raises(RuntimeError, match=f"{name} .meta. is not on the expected device cpu"):
            mixup(x, a, b, 0.5)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        mixup(x, y, y, 0.5, torch.rand(5, requires_grad=True))

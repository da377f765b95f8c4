"""The operators inside torch: opcheck, derivatives of every order, transforms, compilation, export,
checkpointing, autocast and memory."""

import contextlib
import copy
import functools
import gc
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import composed, op_arguments, peak_bytes
from reference import (
    DTYPES,
    SMALL_CASES,
    SMALL_FEATURE_CASES,
    Case,
    as_layout,
    assert_near,
    case_ids,
    check,
    log_prior_of,
    reference,
    run,
    same_bits,
)
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.common_methods_invocations import op_db

import wce_torch

ce = wce_torch.cross_entropy
ops = torch.ops.wce
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static",
         "test_aot_dispatch_dynamic")
OP = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
CLOSE = {"rtol": 1e-9, "atol": 1e-10, "equal_nan": True}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """No graph of another test is used again; compiled code is not read from disk."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


# ---- opcheck -------------------------------------------------------------------------------------


def opcheck(op, args, keywords=None, test_utils=UTILS):
    torch.library.opcheck(op, args, keywords or {}, test_utils=test_utils)


CHECKED = [(case, "f32", "plain") for case in SMALL_CASES + SMALL_FEATURE_CASES] + [
    (Case((6, 5), weight="positive"), "f64", "strided"),
    (Case((2, 5, 3, 2), weight="positive", smoothing=0.1), "bf16", "class_last"),
    (Case((3, 40, 4), soft=True), "f16", "shifted"),
    (Case((6, 40), sample_weight=True), "bf16", "padded"),
    (Case((0, 5), reduction="sum"), "f32", "plain"),
    (Case((2, 5, 0), reduction="none"), "f32", "plain"),
    (Case((0, 40), soft=True, reduction="none"), "f32", "plain"),
]
CHECKED_IDS = ["-".join((case.id, dtype, layout)) for case, dtype, layout in CHECKED]


@pytest.mark.parametrize("needs_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("case, dtype, layout", CHECKED, ids=CHECKED_IDS)
def test_opcheck_cross_entropy(case, dtype, layout, needs_grad):
    args, keywords = op_arguments(case, DTYPES[dtype], layout, needs_grad)
    # The two expensive ones compile forward and, with a gradient, backward: once is enough.
    opcheck(ops.cross_entropy.default, args, keywords, UTILS if needs_grad else UTILS[:3])


@pytest.mark.parametrize("case, dtype, layout", CHECKED[::2], ids=CHECKED_IDS[::2])
def test_opcheck_forward_and_backward(case, dtype, layout):
    args, keywords = op_arguments(case, DTYPES[dtype], layout)
    opcheck(ops.forward.default, args, keywords)
    loss, stats = ops.forward(*args, **keywords)
    x, target, weight, *rest = args
    names = ("log_prior", "sample_weight", "mask", "skip_empty")
    keywords = {k: v for k, v in keywords.items() if k in names}
    grad = torch.randn_like(loss)
    opcheck(ops.backward.default, (grad, x, target, weight, stats, *rest), keywords)
    if case.reduction != "none":
        opcheck(ops.value_and_grad.default, (0.5, *args), keywords)


@pytest.mark.parametrize("needs", ["grad", "logits", "both"])
@pytest.mark.parametrize("case", [Case((6, 5), weight="positive"), Case((6, 40), soft=True),
                                  Case((2, 5, 3), smoothing=0.1, reduction="none")],
                         ids=lambda case: case.id)
def test_opcheck_backward_with_gradients(case, needs):
    """A backward without a differentiable Autograd registration is caught here."""
    (x, target, weight, *rest), keywords = op_arguments(case)
    loss, stats = ops.forward(x, target, weight, *rest)
    grad = torch.randn_like(loss).requires_grad_(needs in ("grad", "both"))
    x.requires_grad_(needs in ("logits", "both"))
    opcheck(ops.backward.default, (grad, x, target, weight, stats, *rest))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 40), (2, 5, 3)], ids=str)
def test_opcheck_mixture(shape, reduction):
    args, keywords = op_arguments(Case(shape, weight="positive", prior=True, reduction=reduction,
                                       smoothing=0.1), needs_grad=True)
    x, y, weight, *rest = args
    y2 = torch.where(y == -100, 1, (y + 1) % shape[1])
    for mix in (torch.tensor(0.3), torch.rand(y.shape)):
        mixture = {"target2": y2, "mix": mix}
        opcheck(ops.cross_entropy.default, args, {**keywords, **mixture})
        plain = (x.detach(), y, weight, *rest)
        opcheck(ops.forward.default, plain, {**keywords, **mixture})
        loss, stats = ops.forward(*plain, **keywords, **mixture)
        opcheck(ops.backward.default, (torch.ones_like(loss), *plain[:3], stats, *rest),
                {**keywords, **mixture})


def rows_arguments(soft=False, dtype=torch.float32, layout="plain", shape=(3, 7, 4)):
    """Arguments of wce::rows_forward."""
    case = Case(shape, soft=soft, weight="positive", prior=True, mask=True)
    x, target, options = case.build(dtype)
    x = as_layout(x, layout)
    prior = log_prior_of(options["class_prior"], 0.5)
    prior = prior.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return [x, None if soft else target, target if soft else None, options["weight"], prior,
            options["mask"], 0.0 if soft else 0.9, 0.1 / shape[1], 1.0 if soft else 0.0, -100,
            False, True]


@pytest.mark.parametrize("needs_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("dtype, layout", [("f32", "plain"), ("f64", "strided"),
                                           ("bf16", "class_last")])
def test_opcheck_rows(dtype, layout, soft, needs_grad):
    args = rows_arguments(soft, DTYPES[dtype], layout)
    args[0].requires_grad_(needs_grad)
    opcheck(ops.rows_forward.default, tuple(args))
    if needs_grad:
        return
    opcheck(ops.rows_value_and_grad.default, (0.5, *args), {"reduction": 1})
    loss, stats, lse, log_prob, *_ = ops.rows_forward(*args)
    grads = [torch.randn_like(t) if t.dim() > 1 else None for t in (loss, lse, log_prob)]
    rest = [*args[1:6], stats, *args[6:11]]
    opcheck(ops.rows_backward.default, (*grads, args[0], *rest))


@pytest.mark.parametrize("case", [Case((6, 5), weight="positive", smoothing=0.1),
                                  Case((2, 5, 3), soft=True, prior=True, mask=True)],
                         ids=lambda case: case.id)
def test_opcheck_composite(case):
    args, keywords = op_arguments(case, needs_grad=True)
    torch.library.opcheck(ops.composite.default, args, keywords)
    torch.library.opcheck(ops.rows_composite.default, tuple(rows_arguments(case.soft)))


@pytest.mark.parametrize("case", SMALL_CASES + SMALL_FEATURE_CASES,
                         ids=case_ids(SMALL_CASES + SMALL_FEATURE_CASES))
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
def test_composite_equals_the_reference(case, dtype):
    """The definition in plain operations has the same values as everything else."""
    x, target, options = case.build(DTYPES[dtype])
    args, keywords = op_arguments(case, DTYPES[dtype], needs_grad=True)
    loss = ops.composite(*args, **keywords)
    (dx,) = torch.autograd.grad(loss, args[0], torch.ones_like(loss))
    want = reference(x, target, **options)
    assert_near(loss, want.loss, want.loss_scale)
    assert_near(dx, want.dx, want.dx_scale)


@pytest.mark.parametrize("layout", ["plain", "class_last", "class_first", "shifted", "padded",
                                    "strided"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 4), (2, 5, 3, 4)], ids=str)
def test_layout_of_the_gradient(shape, layout):
    """That of the logits where they are dense, and what shape inference says of it."""
    (x, target, weight, *rest), _ = op_arguments(Case(shape), layout=layout)
    loss, stats = ops.forward(x, target, weight, *rest)
    dx = ops.backward(torch.ones_like(loss), x, target, weight, stats, *rest)
    assert dx.stride() == torch.empty_like(x).stride()
    tensors = (torch.ones_like(loss), x, target, weight, stats)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in tensors]
        assert ops.backward(*fake, *rest).stride() == dx.stride()


# ---- derivatives ---------------------------------------------------------------------------------

SAMPLES = len(list(OP.sample_inputs("cpu", torch.float64)))


def sample_function(number):
    """(function, inputs) of one OpInfo sample in float64; all floating inputs that torch's own loss
    differentiates need gradients."""
    sample = list(OP.sample_inputs("cpu", torch.float64, requires_grad=True))[number]
    x, target, keywords = sample.input, sample.args[0], dict(sample.kwargs)
    inputs = [x.detach().requires_grad_()]
    soft = target.is_floating_point()
    if soft:
        inputs.append(target.detach().requires_grad_())
        if keywords.get("weight") is not None:
            inputs.append(keywords.pop("weight").detach().requires_grad_())

    def function(x, *rest):
        weight = {"weight": rest[1]} if len(rest) > 1 else {}
        return ce(x, rest[0] if soft else target, **keywords, **weight)

    return function, tuple(inputs)


@pytest.mark.parametrize("number", range(SAMPLES))
def test_gradcheck_over_op_info(number):
    function, inputs = sample_function(number)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True,
                     check_batched_forward_grad=True, nondet_tol=0.0)


@pytest.mark.parametrize("number", range(SAMPLES))
def test_gradgradcheck_over_op_info(number):
    function, inputs = sample_function(number)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, nondet_tol=0.0)


def feature_function(case):
    """(function, inputs) of a case in float64; sample_weight and soft targets are inputs too."""
    x, target, options = case.build()
    inputs = [x.requires_grad_()]
    soft, weighted = case.soft, "sample_weight" in options
    if soft:
        inputs.append(target.requires_grad_())
    if weighted:
        inputs.append(options.pop("sample_weight").requires_grad_())

    def function(x, *rest):
        extra = {"sample_weight": rest[-1]} if weighted else {}
        return ce(x, rest[0] if soft else target, **options, **extra)

    return function, tuple(inputs)


GRADCHECK_CASES = [case for case in SMALL_CASES + SMALL_FEATURE_CASES if not case.skip_empty]


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=case_ids(GRADCHECK_CASES))
def test_gradcheck_of_options(case):
    """skip_empty is left out: a soft target of zeros is a point where it is not differentiable."""
    function, inputs = feature_function(case)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True,
                     check_batched_forward_grad=True, nondet_tol=0.0)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, nondet_tol=0.0)


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=case_ids(GRADCHECK_CASES))
def test_kernels_pass_gradcheck(case):
    """Logits alone: the kernels' own gradient, not the composite's."""
    x, target, options = case.build()
    assert gradcheck(lambda x: ce(x, target, **options), (x.requires_grad_(),), nondet_tol=0.0)


@pytest.mark.parametrize("case", SMALL_CASES, ids=case_ids(SMALL_CASES))
def test_second_and_third_order_equal_native(case):
    x, target, options = case.build()
    direction = torch.randn_like(x)

    def derivatives(loss_fn):
        t = x.detach().requires_grad_()
        loss = loss_fn(t, target, **options).sum()
        found = []
        value = loss
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, t, create_graph=True)
            found.append(slope)
            value = (slope * direction).sum()
        return found

    for mine, native in zip(derivatives(ce), derivatives(F.cross_entropy)):
        torch.testing.assert_close(mine, native, **CLOSE)
        assert mine.requires_grad


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_gradient_penalty_is_never_cut(dtype):
    """backward(create_graph=True), then a penalty on the gradient: x.grad is not missing a part."""
    x = torch.randn(6, 5, dtype=DTYPES[dtype]).requires_grad_()
    y = torch.randint(5, (6,))
    (dx,) = torch.autograd.grad(ce(x, y), x, create_graph=True)
    assert dx.requires_grad and dx.dtype == x.dtype
    (got,) = torch.autograd.grad(dx.float().square().sum(), x)
    wide = x.detach().double().requires_grad_()
    (dw,) = torch.autograd.grad(F.cross_entropy(wide, y), wide, create_graph=True)
    (want,) = torch.autograd.grad(dw.square().sum(), wide)
    tolerance = 1e-6 if dtype == "f32" else 2e-2 * want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


def test_gradient_of_the_upstream_gradient():
    x, y = torch.randn(6, 5).double().requires_grad_(), torch.randint(5, (6,))
    g = torch.randn(6).double().requires_grad_()
    (dx,) = torch.autograd.grad(ce(x, y, reduction="none"), x, g, create_graph=True)
    v = torch.randn(6, 5).double()
    (dg,) = torch.autograd.grad(dx, g, v)
    want = (torch.softmax(x, 1) - F.one_hot(y, 5)).mul(v).sum(1)
    torch.testing.assert_close(dg, want.detach())


def test_retain_graph_alone_makes_no_graph():
    x, y = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))
    (dx,) = torch.autograd.grad(ce(x, y), x, retain_graph=True)
    assert not dx.requires_grad


def test_second_order_with_everything_ignored():
    x, y = torch.randn(3, 4).double().requires_grad_(), torch.full((3,), -100)
    for options in ({"empty": "zero"}, {"reduction": "sum"}, {"normalizer": 2.0}):
        (dx,) = torch.autograd.grad(ce(x, y, **options), x, create_graph=True)
        assert (dx == 0).all()
        (ddx,) = torch.autograd.grad(dx.sum(), x)
        assert (ddx == 0).all()


# ---- forward mode and torch.func -----------------------------------------------------------------

TRANSFORM_CASES = [case for case in SMALL_CASES + SMALL_FEATURE_CASES if case.empty == "nan"]


def expected_loss(case):
    """A differentiable loss to compare with: torch's own, or plain operations for our options."""
    if case.native:
        return F.cross_entropy
    return lambda x, target, **options: composed(x, target, options)


@pytest.mark.parametrize("case", TRANSFORM_CASES, ids=case_ids(TRANSFORM_CASES))
def test_torch_func(case):
    """grad, vjp, jacrev, jacfwd, jvp, hessian, linearize, functionalize, each against autograd."""
    x, target, options = case.build()
    want_fn, t = expected_loss(case), torch.randn_like(x)
    scalar = lambda fn: lambda x: fn(x, target, **options).sum()  # noqa: E731
    whole = lambda fn: lambda x: fn(x, target, **options)  # noqa: E731
    func = torch.func
    pairs = [
        lambda fn: func.grad(scalar(fn))(x),
        lambda fn: func.grad_and_value(scalar(fn))(x),
        lambda fn: func.vjp(scalar(fn), x)[1](torch.tensor(2.0).double()),
        lambda fn: func.jacrev(whole(fn))(x),
        lambda fn: func.jacfwd(whole(fn))(x),
        lambda fn: func.jvp(whole(fn), (x,), (t,)),
        lambda fn: func.hessian(scalar(fn))(x),
        lambda fn: func.linearize(whole(fn), x)[1](t),
        lambda fn: func.functionalize(whole(fn))(x),
        lambda fn: func.grad(lambda x: (func.grad(scalar(fn))(x) * t).sum())(x),
    ]
    for pair in pairs:
        torch.testing.assert_close(pair(ce), pair(want_fn), **CLOSE)
    slope = func.jvp(whole(ce), (x,), (t,))[1]
    assert (slope != 0).any()  # never a silent zero


@pytest.mark.parametrize("case", TRANSFORM_CASES, ids=case_ids(TRANSFORM_CASES))
def test_vmap(case):
    """Over logits alone, over logits and target; and gradients per sample."""
    x, target, options = case.build()
    batch = torch.stack([x, x * 0.5, x - 1])
    want_fn = expected_loss(case)
    one = lambda fn: lambda x: fn(x, target, **options)  # noqa: E731
    torch.testing.assert_close(torch.vmap(one(ce))(batch), torch.stack(
        [one(want_fn)(x) for x in batch]), **CLOSE)
    targets = torch.stack([target, target.flip(0), target]) if target.dim() else torch.stack(
        [target] * 3)
    both = lambda fn: lambda x, t: fn(x, t, **options).sum()  # noqa: E731
    torch.testing.assert_close(
        torch.vmap(both(ce))(batch, targets),
        torch.stack([both(want_fn)(x, t) for x, t in zip(batch, targets)]), **CLOSE)
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(both(ce)))(batch, targets),
        torch.stack([torch.func.grad(both(want_fn))(x, t) for x, t in zip(batch, targets)]),
        **CLOSE)


def test_per_sample_gradients_of_a_model():
    model = torch.nn.Linear(4, 3).double()
    params = dict(model.named_parameters())
    data, y = torch.randn(5, 4).double(), torch.randint(3, (5,))

    def loss(fn, params, row, label):
        return fn(torch.func.functional_call(model, params, (row[None],)), label[None])

    per_sample = lambda fn: torch.vmap(  # noqa: E731
        torch.func.grad(functools.partial(loss, fn)), in_dims=(None, 0, 0))(params, data, y)
    torch.testing.assert_close(per_sample(ce), per_sample(F.cross_entropy))


@pytest.mark.parametrize("needs_grad", [False, True], ids=["", "grad"])
def test_dual_numbers(needs_grad):
    """The tangent is never dropped, whether the logits need a gradient or not."""
    x, t, y = torch.randn(6, 5).double(), torch.randn(6, 5).double(), torch.randint(5, (6,))
    x.requires_grad_(needs_grad)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        got = torch.autograd.forward_ad.unpack_dual(ce(dual, y)).tangent
        want = torch.autograd.forward_ad.unpack_dual(F.cross_entropy(dual, y)).tangent
        inside = ce(x, y)  # an ordinary call while a level is active
    assert got is not None
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(inside, F.cross_entropy(x, y))


@pytest.mark.parametrize("case", SMALL_CASES + SMALL_FEATURE_CASES,
                         ids=case_ids(SMALL_CASES + SMALL_FEATURE_CASES))
def test_batched_gradients(case):
    """is_grads_batched runs backward alone under vmap."""
    x, target, options = case.build()
    x.requires_grad_()
    loss = ce(x, target, **options)
    grads = torch.randn(4, *loss.shape).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch may say that it loops
        (got,) = torch.autograd.grad(loss, x, grads, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(loss, x, g, retain_graph=True)[0] for g in grads])
    torch.testing.assert_close(got, want, **CLOSE)


def test_jacobian_vectorised():
    x, y = torch.randn(4, 3).double(), torch.randint(3, (4,))
    f = lambda fn: lambda x: fn(x, y, reduction="none")  # noqa: E731
    jacobian = torch.autograd.functional.jacobian
    for strategy in ("reverse-mode", "forward-mode"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = jacobian(f(ce), x, vectorize=True, strategy=strategy)
        torch.testing.assert_close(got, jacobian(f(F.cross_entropy), x))


# ---- torch.compile -------------------------------------------------------------------------------


def compiled_step(backend, dynamic=None):
    """A compiled function with the loss of a small model."""

    def step(x, target, **options):
        return ce(x * 2, target, **options)

    return torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)


def graphs(counter):
    """Compiled graphs. With dynamic=True Dynamo traces twice, and leaves an empty graph, where a
    float is among the arguments: torch does so for every operator that takes one."""
    return sum(len(graph.graph.nodes) > 0 for graph in counter.graphs)


COMPILE_CASES = SMALL_CASES + SMALL_FEATURE_CASES


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", COMPILE_CASES, ids=case_ids(COMPILE_CASES))
def test_compile_equals_eager(case, dynamic):
    """fullgraph, forward and backward, bit for bit; our operators are in both graphs."""
    recorder = AotEagerAndRecordGraphs()
    step = compiled_step(recorder, dynamic)
    x, target, options = case.build(torch.float32)
    got = run(lambda x, t, **o: step(x, t, **o), x, target, options, soft_grads=False)
    want = run(lambda x, t, **o: ce(x * 2, t, **o), x, target, options, soft_grads=False)
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    assert len(recorder.fw_graphs) == len(recorder.bw_graphs) == 1
    forward, backward = recorder.fw_graphs[0], recorder.bw_graphs[0]
    assert any(n.target is ops.forward.default for n in forward.graph.nodes)
    assert any(n.target is ops.backward.default for n in backward.graph.nodes)


def test_compile_new_batch_sizes_recompile_at_most_once():
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled_step(counter)
    w = torch.rand(7)
    for rows in (4, 6, 9, 33, 12):
        x, y = torch.randn(rows, 7, requires_grad=True), torch.randint(7, (rows,))
        loss = step(x, y, weight=w, label_smoothing=0.1)
        loss.backward()
        want = reference(x * 2, y, w, label_smoothing=0.1)
        assert_near(loss, want.loss, want.loss_scale)
        assert_near(x.grad, 2 * want.dx, 4)
    assert graphs(counter) <= 2


def test_compile_dynamic_is_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled_step(counter, dynamic=True)
    for shape in ((4, 6, 3, 5), (5, 40, 7, 2), (2, 9, 4, 4)):
        x = torch.randn(shape, requires_grad=True)
        y = torch.randint(shape[1], (shape[0], *shape[2:]))
        loss = step(x, y, ignore_index=shape[1] - 1)
        loss.backward()
        want = reference(x * 2, y, ignore_index=shape[1] - 1)
        assert_near(loss, want.loss, want.loss_scale)
        assert_near(x.grad, 2 * want.dx, 4)
    # From 40 classes on statistics of each row are kept: that rule may cost one more graph.
    assert graphs(counter) <= 2


@pytest.mark.parametrize("options", [{}, {"weight": torch.rand(7)}, {"label_smoothing": 0.2},
                                     {"class_prior": torch.arange(1.0, 8.0), "tau": 0.5},
                                     {"empty": "zero", "ignore_index": 3}], ids="-".join)
def test_compile_module(options):
    """Built outside of the compiled function, and inside of it."""
    module = wce_torch.CrossEntropyLoss(**options)
    x, y = torch.randn(6, 7), torch.randint(7, (6,))
    outside = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert same_bits(outside(x, y), module(x, y))
    if options.get("class_prior", None) is not None:
        return  # building a prior looks at its values

    def build(x, y):
        return wce_torch.CrossEntropyLoss(**options)(x, y)

    inside = torch.compile(build, backend="aot_eager", fullgraph=True)
    assert same_bits(inside(x, y), module(x, y))


def test_compile_with_inductor():
    """The default backend generates code around our operators; its fused multiplications may
    differ from eager by a rounding."""
    step = torch.compile(lambda x, y, w: ce(torch.tanh(x) * 3, y, w, label_smoothing=0.1) * 2,
                         fullgraph=True)
    x, y, w = torch.randn(8, 33), torch.randint(33, (8,)), torch.rand(33)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = step(a, y, w)
    loss.backward()
    want = ce(torch.tanh(b) * 3, y, w, label_smoothing=0.1) * 2
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_compile_stats_and_mixup():
    def step(x, a, b):
        s = wce_torch.cross_entropy_with_stats(x, a)
        mixed = wce_torch.mixup_cross_entropy(x, a, b, 0.3)
        return s.loss + 0.01 * s.lse.square().mean() + s.log_prob.mean() + mixed, s.correct

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    a, b = torch.randint(7, (6,)), torch.randint(7, (6,))
    x = torch.randn(6, 7)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = compiled(one, a, b), step(two, a, b)
    got[0].backward()
    want[0].backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(one.grad, two.grad)


TRANSFORMED = {
    "grad": lambda fn, x, y, t: torch.func.grad(lambda x: fn(x, y))(x),
    "vmap": lambda fn, x, y, t: torch.vmap(fn)(x, y),
    "jvp": lambda fn, x, y, t: torch.func.jvp(lambda x: fn(x, y), (x,), (t,)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_compile_under_transforms(name):
    x, y, t = torch.randn(6, 5).double(), torch.randint(5, (6,)), torch.randn(6, 5).double()
    call = torch.compile(functools.partial(TRANSFORMED[name], ce), backend="aot_eager",
                         fullgraph=True)
    torch.testing.assert_close(call(x, y, t), TRANSFORMED[name](F.cross_entropy, x, y, t))


def test_compiled_autograd():
    x, y, w = torch.randn(6, 40), torch.randint(40, (6,)), torch.rand(40)
    want = run(ce, x, y, {"weight": w})
    leaf = x.clone().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(
            torch.compile(backend="aot_eager", fullgraph=True)):
        ce(leaf, y, w).backward()
    assert same_bits(leaf.grad, want[1])


# ---- tracing, export, fake and meta tensors ------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.linear = torch.nn.Linear(4, 6)
        self.loss = wce_torch.CrossEntropyLoss(**options)

    def forward(self, x, y):
        return self.loss(self.linear(x), y)


@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
@pytest.mark.parametrize("options", [{}, {"weight": torch.rand(6)}, {"label_smoothing": 0.1},
                                     {"class_prior": torch.arange(1.0, 7.0)}], ids="-".join)
def test_export(options, strict, tmp_path):
    """Dynamic batch; the graph holds our operator; saved, loaded and decomposed it still runs."""
    model = Model(**options)
    x, y = torch.randn(5, 4), torch.randint(6, (5,))
    batch = torch.export.Dim("batch", min=2, max=100)
    program = torch.export.export(model, (x, y), dynamic_shapes=({0: batch}, {0: batch}),
                                  strict=strict)
    targets = [n.target for n in program.graph.nodes]
    assert ops.cross_entropy.default in targets
    torch.export.save(program, tmp_path / "model.pt2")
    for p in (program, torch.export.load(tmp_path / "model.pt2"), program.run_decompositions()):
        for rows in (5, 9):
            x, y = torch.randn(rows, 4), torch.randint(6, (rows,))
            torch.testing.assert_close(p.module()(x, y), model(x, y))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    def step(x, y, w):
        loss = ce(x, y, w)
        return loss, torch.autograd.grad(loss, x)[0]

    x, y, w = torch.randn(6, 40, requires_grad=True), torch.randint(40, (6,)), torch.rand(40)
    graph = make_fx(step, tracing_mode=mode)(x, y, w)
    targets = [n.target for n in graph.graph.nodes]
    assert ops.forward.default in targets and ops.backward.default in targets
    for got, want in zip(graph(x.detach(), y, w), step(x, y, w)):
        assert same_bits(got, want)


@pytest.mark.parametrize("case", SMALL_CASES + SMALL_FEATURE_CASES,
                         ids=case_ids(SMALL_CASES + SMALL_FEATURE_CASES))
def test_fake_tensors_know_shape_dtype_and_layout(case):
    x, target, options = case.build(torch.bfloat16)
    loss, dx, *_ = run(ce, x, target, options, soft_grads=False)
    with FakeTensorMode() as mode:
        fake = lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v  # noqa: E731
        leaf = fake(x).requires_grad_()
        got = ce(leaf, fake(target), **{k: fake(v) for k, v in options.items()})
        got.backward(torch.ones_like(got))
    assert (got.shape, got.dtype, got.stride()) == (loss.shape, loss.dtype, loss.stride())
    assert (leaf.grad.shape, leaf.grad.dtype, leaf.grad.stride()) == (
        dx.shape, dx.dtype, dx.stride())


def test_meta_tensors():
    x = torch.randn(6, 5, device="meta", requires_grad=True)
    y = torch.zeros(6, dtype=torch.long, device="meta")
    loss = ce(x, y, torch.rand(5, device="meta"))
    assert loss.is_meta and loss.shape == ()
    loss.backward()
    assert x.grad.shape == (6, 5) and x.grad.is_meta
    with torch.device("meta"):
        module = wce_torch.CrossEntropyLoss(torch.rand(5))
        assert module.weight.is_meta and module(x, y).is_meta


def test_default_device_context():
    """torch.device(...) as a context is a torch function mode: the call still is ours."""
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    want = ce(x, y)
    with torch.device("cpu"):
        assert same_bits(ce(x, y), want)
        assert same_bits(wce_torch.CrossEntropyLoss()(x, y), want)


def test_torch_function_mode_sees_our_function():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    with Mode():
        got = ce(x, y)
    assert same_bits(got, ce(x, y))
    assert ce in seen and F.cross_entropy not in seen


# ---- hooks and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    x, y, w = torch.randn(6, 40), torch.randint(40, (6,)), torch.rand(40)
    want = run(ce, x, y, {"weight": w})
    leaf = x.clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(lambda x: ce(x * 1.0, y, w), leaf,
                                             use_reentrant=reentrant)
    loss.backward()
    assert same_bits(loss, want[0]) and same_bits(leaf.grad, want[1])


def test_selective_checkpoint():
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    x, y = torch.randn(6, 40), torch.randint(40, (6,))
    want = run(ce, x, y, {})
    leaf = x.clone().requires_grad_()
    context = functools.partial(create_selective_checkpoint_contexts, [ops.forward.default])
    loss = checkpoint(lambda x: ce(x * 1.0, y), leaf, use_reentrant=False, context_fn=context)
    loss.backward()
    assert same_bits(leaf.grad, want[1])


@pytest.mark.parametrize("classes", [5, 40])
def test_saved_tensors(classes):
    """The logits, the target, the weight and N-sized statistics: nothing else of size N*C."""
    packed = []

    def pack(t):
        packed.append(t)
        return t

    x = torch.randn(60, classes, requires_grad=True)
    y, w = torch.randint(classes, (60,)), torch.rand(classes)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = ce(x, y, w)
    large = [t for t in packed if t.numel() >= x.numel()]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()
    rest = sum(t.numel() for t in packed if t.numel() < x.numel())
    assert rest <= y.numel() + w.numel() + 2 * 60 + 1
    loss.backward()
    assert_near(x.grad, reference(x, y, w).dx, 1)


def test_save_on_cpu_and_mutation_context():
    x, y = torch.randn(6, 40), torch.randint(40, (6,))
    want = run(ce, x, y, {})
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = ce(leaf, y)
    loss.backward()
    assert same_bits(leaf.grad, want[1])
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        logits = leaf * 1.0
        loss = ce(logits, y)
        with torch.no_grad():
            logits.zero_()
        loss.backward()
    assert same_bits(leaf.grad, want[1])


def test_anomaly_mode_and_name():
    x, y = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            ce(x, y).backward()
    assert x.grad.isfinite().all()
    name = ce(x, y).grad_fn.name()
    assert "CrossEntropy" in name and "anonymous" not in name


def test_graph_is_freed():
    """Logits die with the loss: no reference cycle keeps them."""
    import weakref

    x = torch.randn(6, 5, requires_grad=True) * 1
    alive = weakref.ref(x)
    loss = ce(x, torch.randint(5, (6,)))
    gc.disable()
    try:
        del x
        assert alive() is not None or loss.grad_fn is not None
        del loss
        assert alive() is None
    finally:
        gc.enable()


# ---- autocast ------------------------------------------------------------------------------------

LOW = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("x_dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("w_dtype", [None, "f32", "f64", "bf16", "f16"])
def test_autocast_index(x_dtype, w_dtype, low):
    """fp32 out (f64 for f64 logits), gradient in the logits' dtype, arithmetic in fp32."""
    for case in (Case((6, 5), weight="positive"), Case((6, 40), weight="positive", smoothing=0.1)):
        x, y, options = case.build(DTYPES[x_dtype])
        options["weight"] = options["weight"].to(DTYPES[w_dtype]) if w_dtype else None
        with torch.autocast("cpu", LOW[low]):
            leaf = x.clone().requires_grad_()
            loss = ce(leaf, y, **options)
        loss.backward()
        assert loss.dtype == (torch.float64 if x_dtype == "f64" else torch.float32)
        assert leaf.grad.dtype == x.dtype
        want = reference(x, y, **options)
        assert_near(loss, want.loss, want.loss_scale)
        assert_near(leaf.grad, want.dx, want.dx_scale)


@pytest.mark.parametrize("x_dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("q_dtype", ["f32", "f64", "bf16", "f16"])
def test_autocast_soft(x_dtype, q_dtype):
    x, q, options = Case((6, 5), soft=True, smoothing=0.1).build(DTYPES[x_dtype])
    q = q.to(DTYPES[q_dtype])
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        loss = ce(leaf, q, **options)
    loss.backward()
    assert loss.dtype == (torch.float64 if "f64" in (x_dtype, q_dtype) else torch.float32)
    assert leaf.grad.dtype == x.dtype
    want = reference(x, q, **options)
    single = loss if x_dtype == "f64" else loss.float()
    assert_near(single, want.loss, want.loss_scale)
    assert_near(leaf.grad, want.dx, want.dx_scale)


def test_autocast_disabled_inside():
    x, y = torch.randn(6, 5).bfloat16(), torch.randint(5, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        assert ce(x, y).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert ce(x, y).dtype == torch.bfloat16
        assert ce(x, y).dtype == torch.float32
        assert ce(x, y, reduction="none").dtype == torch.float32
        with torch.no_grad():
            assert ce(x, y).dtype == torch.float32
        with torch.inference_mode():
            assert ce(x, y).dtype == torch.float32
    assert ce(x, y).dtype == torch.bfloat16


def test_autocast_module_and_stats():
    x, y = torch.randn(6, 40).bfloat16(), torch.randint(40, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        assert wce_torch.CrossEntropyLoss()(x, y).dtype == torch.float32
        stats = wce_torch.cross_entropy_with_stats(x, y)
        mixed = wce_torch.mixup_cross_entropy(x, y, y.flip(0), 0.5)
    assert stats.loss.dtype == stats.lse.dtype == mixed.dtype == torch.float32
    want = reference(x, y)
    assert_near(stats.loss, want.loss, want.loss_scale)
    assert_near(stats.lse, want.lse, 10)


def test_autocast_integer_targets_and_errors():
    x, y = torch.randn(6, 5).bfloat16(), torch.randint(5, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(ce(x, y), ce(x, y.to(torch.uint8)))
        with pytest.raises(IndexError, match="Target 9 is out of bounds"):
            ce(x, y + 9 - y)
        with pytest.raises(ValueError, match="batch_size"):
            ce(x, y[:3])


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_and_compile(inside):
    x, y = torch.randn(6, 40).bfloat16(), torch.randint(40, (6,))

    def step(x, y):
        context = torch.autocast("cpu", torch.bfloat16) if inside else contextlib.nullcontext()
        with context:
            return ce(x, y)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    with contextlib.nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
        loss = compiled(leaf, y)
    loss.backward()
    want = reference(x, y)
    assert loss.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16
    assert_near(loss, want.loss, want.loss_scale)
    assert_near(leaf.grad, want.dx, want.dx_scale)


def test_autocast_double_backward():
    x, y = torch.randn(6, 5).bfloat16().requires_grad_(), torch.randint(5, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ce(x, y)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    assert dx.dtype == torch.bfloat16 and dx.requires_grad
    (ddx,) = torch.autograd.grad(dx.float().square().sum(), x)
    assert ddx.isfinite().all() and (ddx != 0).any()


def test_autocast_for_cuda_is_registered():
    """Without a GPU: fake CUDA tensors show the dtype rules of the CUDA autocast entry."""
    with FakeTensorMode():
        x = torch.empty(6, 5, device="cuda", dtype=torch.float16)
        y = torch.empty(6, device="cuda", dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = torch.is_autocast_enabled("cuda")
            torch.set_autocast_enabled("cuda", True)
            try:
                assert ce(x, y).dtype == torch.float32
                assert ce(x.double(), y).dtype == torch.float64
            finally:
                torch.set_autocast_enabled("cuda", before)
            assert ce(x, y).dtype == torch.float16


# ---- memory --------------------------------------------------------------------------------------


MEMORY_SHAPES = {"rows": (512, 1000), "narrow": (50_000, 10), "image": (2, 19, 160, 160),
                 "few": (2, 300_000), "32": (20_000, 32), "39": (20_000, 39), "40": (20_000, 40),
                 "79": (10_000, 79), "80": (10_000, 80), "120": (10_000, 120)}


def forward_backward(loss_fn, x, target, **options):
    def call():
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(loss_fn(leaf, target, **options), leaf)

    return call


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("body", [{}, {"weight": "positive"}, {"smoothing": 0.1}, {"soft": True},
                                  {"prior": True}, {"sample_weight": True}], ids="-".join)
@pytest.mark.parametrize("name", MEMORY_SHAPES)
def test_peak_memory_of_forward_and_backward(name, body, dtype):
    """The gradient, and statistics of rows where these are long: at most 1.05 buffers of the size
    of the logits."""
    case = Case(MEMORY_SHAPES[name], **body)
    x, target, options = case.build(DTYPES[dtype])
    buffer = x.numel() * x.element_size()
    limit = 1.05 * buffer + 64  # the loss and its denominator
    if "prior" in body:  # log q in float64, its normalised and scaled copies: (C) each
        limit += 32 * case.shape[1]
    peak = peak_bytes(forward_backward(ce, x, target, **options))
    assert buffer <= peak <= limit, f"{peak / buffer:.3f} buffers"


def test_the_instrument_sees_native_memory():
    x, y, _ = Case((512, 1000)).build(torch.float32)
    assert peak_bytes(forward_backward(F.cross_entropy, x, y)) > 1.9 * x.numel() * 4


@pytest.mark.parametrize("name", MEMORY_SHAPES)
def test_no_copy_under_autocast(name):
    """Forward alone on 16-bit logits: nothing of size N*C."""
    x, y, _ = Case(MEMORY_SHAPES[name]).build(torch.bfloat16)
    buffer = x.numel() * 2

    def forward(loss_fn):
        def call():
            with torch.autocast("cpu", torch.bfloat16):
                return loss_fn(x.detach().requires_grad_(), y)
        return call

    rows = x.numel() // x.shape[1]
    assert peak_bytes(forward(ce)) <= max(0.05 * buffer, 8 * rows + 4096)
    assert peak_bytes(forward(F.cross_entropy)) > 1.9 * buffer


@pytest.mark.parametrize("layout", ["class_last", "shifted", "padded", "misaligned"])
def test_no_copy_of_strided_logits(layout):
    x, y, _ = Case((4, 100, 512)).build(torch.float32)
    x = as_layout(x, layout)
    buffer = x.numel() * 4
    # Copies of the target (int64) are allowed, of the logits not.
    with torch.no_grad():
        assert peak_bytes(lambda: ce(x, y)) <= 0.05 * buffer
    assert peak_bytes(forward_backward(ce, x, y)) <= 1.05 * buffer


@pytest.mark.parametrize("shape", [(2, 19, 64, 64), (2, 200, 300), (700, 100)], ids=str)
def test_no_copy_of_a_soft_target_that_lies_across(shape):
    """Such as one_hot(y).movedim(-1, 1) with contiguous logits; or cut at another dimension."""
    x, q, _ = Case(shape, soft=True).build(torch.float32)
    for logits, target in (("plain", "class_last"), ("class_last", "plain"),
                           ("class_first", "plain"), ("plain", "class_first"),
                           ("class_last", "shifted")):
        leaf, target = as_layout(x, logits), as_layout(q, target)
        buffer = x.numel() * 4
        assert peak_bytes(forward_backward(ce, leaf, target)) <= 1.05 * buffer + 64


def test_memory_of_compiled_step():
    x, y, _ = Case((512, 1000)).build(torch.float32)
    step = torch.compile(ce, backend="aot_eager", fullgraph=True)
    assert peak_bytes(forward_backward(step, x, y)) <= 1.05 * x.numel() * 4


@pytest.mark.parametrize("op_dtype", ["f32"])
def test_op_info_machinery(op_dtype):
    """Our function in place of torch's inside the OpInfo: samples run and agree with its rules."""
    mine = copy.copy(OP)
    mine.op = ce
    for sample in mine.sample_inputs("cpu", DTYPES[op_dtype], requires_grad=True):
        loss = mine(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(loss, F.cross_entropy(sample.input, *sample.args,
                                                         **sample.kwargs), rtol=1e-5, atol=1e-4)
    assert math.isfinite(check(ce, torch.randn(3, 4), torch.tensor([0, 1, 2]), {}).loss)

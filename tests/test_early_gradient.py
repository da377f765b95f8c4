"""Forward that makes the gradient as well: when it does, and that only the clock can tell."""

import itertools

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from conftest import ISAS
from helpers import op_arguments, peak_bytes, run_python
from reference import DTYPES, SMALL_CASES, SMALL_FEATURE_CASES, Case, as_layout, same_bits
from torch.utils.checkpoint import checkpoint

import wce_torch

ce = wce_torch.cross_entropy
ops = torch.ops.wce

# ---- the op: bits of forward and backward --------------------------------------------------------

# Both sides of every border between ways through the kernels; more rows than a batch has.
SHAPES = [(600, 2), (600, 5), (300, 19), (300, 31), (300, 32), (300, 33), (300, 39), (300, 40),
          (300, 44), (300, 59), (300, 60), (300, 64), (300, 79), (300, 80), (20, 100), (20, 500),
          (300, 96), (300, 100), (300, 129), (250, 145), (240, 161),
          (300, 192), (300, 193), (300, 200), (110, 289), (110, 320), (110, 321), (97, 337),
          (90, 512), (90, 513), (60, 640), (60, 641), (140, 700), (70, 1000), (70, 1025),
          (30, 5001), (3, 40_000), (2, 2, 17, 17), (2, 5, 16, 32),
          (2, 19, 300), (2, 32, 290), (1, 40, 512), (1, 41, 300), (1, 64, 300),
          (2, 65, 260), (2, 150, 260)]
BODIES = {
    "plain": {}, "weighted": {"weight": "signed", "ignore": "outside"},
    "sum": {"weight": "positive", "reduction": "sum"},
    "smooth": {"weight": "positive", "smoothing": 0.1},
    "soft": {"soft": True, "weight": "positive"},
    "prior": {"prior": True, "sample_weight": True, "mask": True},
    "normalizer": {"weight": "positive", "normalizer": True},
}
SMALL = [case for case in SMALL_CASES + SMALL_FEATURE_CASES if case.reduction != "none"]


def apart(upstream, x, target, weight, reduction, ignored, smoothing, **keywords):
    """What value_and_grad gives, by forward and backward."""
    loss, stats = ops.forward(x, target, weight, reduction, ignored, smoothing, **keywords)
    names = ("log_prior", "sample_weight", "mask", "skip_empty", "target2", "mix")
    backward = {k: v for k, v in keywords.items() if k in names}
    grad = torch.tensor(upstream, dtype=loss.dtype)
    return loss, stats, ops.backward(grad, x, target, weight, stats, reduction, ignored, smoothing,
                                     **backward)


def check_op(args, keywords, upstream=1.0):
    got, want = ops.value_and_grad(upstream, *args, **keywords), apart(upstream, *args, **keywords)
    assert want[2].isfinite().any()
    for one, other in zip(got, want, strict=True):
        assert same_bits(one, other) and one.stride() == other.stride()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", BODIES)
def test_bits(isa, dtype, body):
    for shape in SHAPES:
        check_op(*op_arguments(Case(shape, **BODIES[body]), DTYPES[dtype]), upstream=0.25)


@pytest.mark.parametrize("isa", ["avx512"], indirect=True)  # the others know one way
@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("body", ["weighted", "smooth", "prior"])
def test_bits_of_either_kind_of_processor(isa, cpu_exp, dtype, body):
    for shape in SHAPES:
        args, keywords = op_arguments(Case(shape, **BODIES[body]), DTYPES[dtype])
        cpu_exp("quick")
        quick = ops.value_and_grad(1.0, *args, **keywords)
        cpu_exp("slow")
        slow = ops.value_and_grad(1.0, *args, **keywords)
        assert all(same_bits(a, b) for a, b in zip(quick, slow)), shape
        check_op(args, keywords)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("layout", ["plain", "class_last", "class_first", "misaligned", "strided"])
def test_bits_of_layouts(isa, layout):
    for shape in ((3, 19, 5, 23), (2, 40, 300), (2, 5, 16, 16)):
        check_op(*op_arguments(Case(shape, weight="positive"), torch.float32, layout))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("pair", [("plain", "class_last"), ("class_last", "plain")], ids="-".join)
def test_bits_of_soft_targets_that_lie_across(isa, pair):
    for shape in ((2, 5, 300), (2, 40, 300), (2, 64, 260), (2, 100, 260), (300, 19, 1)):
        case = Case(shape, soft=True, weight="positive")
        (x, q, *rest), _ = op_arguments(case, layout=pair[0])
        check_op((x, as_layout(q, pair[1]), *rest), {})


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("kind", ["tile", "rows", "split"])
def test_bits_of_forced_regimes(isa, kind, regime):
    regime(kind)
    for shape, body in itertools.product(SHAPES, ("weighted", "smooth", "prior")):
        check_op(*op_arguments(Case(shape, **BODIES[body]), torch.float32))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_bits_of_small_cases(case):
    for dtype in DTYPES.values():
        check_op(*op_arguments(case, dtype), upstream=-3.0)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("reduction", [1, 2])
def test_bits_of_mixtures(isa, reduction):
    for shape in SHAPES:
        args, _ = op_arguments(Case(shape, weight="positive"))
        y2 = torch.randint_like(args[1], shape[1])
        check_op((*args[:3], reduction, *args[4:]), {"target2": y2, "mix": torch.tensor(0.3)})


def rows_apart(upstream, args, keywords):
    """What rows_value_and_grad gives, by rows_forward and rows_backward."""
    want = ops.rows_forward(*args, **keywords)
    grad = torch.tensor(upstream, dtype=want[0].dtype)
    dx = ops.rows_backward(grad, None, None, *args[:6], want[1], *args[6:11],
                           reduction=keywords["reduction"])
    return *want, dx


def check_rows_op(args, keywords, upstream=1.0):
    got = ops.rows_value_and_grad(upstream, *args, **keywords)
    for one, other in zip(got, rows_apart(upstream, args, keywords), strict=True):
        equal = torch.equal if one.dtype == torch.bool else same_bits
        assert equal(one, other) and one.stride() == other.stride()
    return got


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
def test_bits_of_rows(isa, dtype, entropy):
    """rows_value_and_grad: every result of rows_forward, and the gradient of the loss alone."""
    for shape, soft, floor in itertools.product(SHAPES, (False, True), (0.0, 0.01)):
        (x, y, w, reduction, ignored, _), options = op_arguments(
            Case(shape, soft=soft, weight="positive", prior=True, mask=True), DTYPES[dtype])
        targets = (None, y) if soft else (y, None)
        numbers = (0.0 if soft else 0.9, floor, 0.9 if soft else 0.0, ignored, False)
        check_rows_op((x, *targets, w, options["log_prior"], options["mask"], *numbers, entropy),
                      {"reduction": reduction}, upstream=0.25)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_bits_of_large_gradients(isa):
    """Gradients above STREAM_ROWS and STREAM_TILES (plan.c) go past the caches."""
    for shape in ((300_000, 19), (5000, 1000), (90, 50_257), (2, 19, 512, 512), (1, 150, 300, 300)):
        check_op(*op_arguments(Case(shape, weight="positive")))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", ["weighted", "smooth", "prior", "mixture"])
@pytest.mark.parametrize("classes", [100, 1001])
def test_bits_of_rows_past_the_caches(isa, dtype, body, classes):
    """Rows of a gradient above STREAM_ROWS have the bits of the same rows alone."""
    dtype = DTYPES[dtype]
    rows = (9 << 20) // (classes * dtype.itemsize)
    args, keywords = op_arguments(Case((rows, classes), **BODIES.get(body, {})), dtype)
    args = (*args[:3], 2, *args[4:])
    if body == "mixture":
        acc = torch.promote_types(dtype, torch.float32)
        keywords |= {"target2": args[1].flip(0), "mix": torch.tensor(0.3, dtype=acc)}
    large = ops.value_and_grad(1.0, *args, **keywords)[2]
    check_op(args, keywords)
    for part in (slice(0, 100), slice(rows - 77, rows)):
        few = {name: value[part] if torch.is_tensor(value) and value.dim() and len(value) == rows
               else value for name, value in keywords.items()}
        small = ops.value_and_grad(1.0, args[0][part], args[1][part], *args[2:], **few)[2]
        assert same_bits(large[part], small)


def test_bits_of_special_values():
    for value, shape in itertools.product((torch.inf, -torch.inf, torch.nan), SHAPES):
        args, keywords = op_arguments(Case(shape, weight="positive"))
        args[0][0, 1] = value
        args[0][-1] = -torch.inf
        got, want = ops.value_and_grad(1.0, *args), apart(1.0, *args)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("empty_zero", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (4, 5), (4, 40)], ids=str)
def test_bits_where_no_row_counts(shape, empty_zero):
    x = torch.randn(shape)
    y = torch.full((shape[0], *shape[2:]), -100)
    got = ops.value_and_grad(1.0, x, y, empty_zero=empty_zero)
    assert all(map(same_bits, got, apart(1.0, x, y, None, 1, -100, 0.0, empty_zero=empty_zero)))
    rows = (x, y, None, None, None, None, 1.0, 0.0, 0.0, -100, False, True)
    loss = check_rows_op(rows, {"reduction": 1, "empty_zero": empty_zero})[0]
    assert loss.isnan() != empty_zero and got[0].isnan() != empty_zero


def test_no_classes():
    got = ops.value_and_grad(1.0, torch.randn(3, 0), torch.full((3,), -100))
    assert got[0].isnan() and got[2].shape == (3, 0)


@pytest.mark.parametrize("classes", [7, 40])
def test_bits_of_rows_with_a_normalizer(classes):
    x, y = torch.randn(300, classes), torch.randint(classes, (300,))
    rows = (x, y, None, None, None, None, 1.0, 0.0, 0.0, -100, False, True)
    loss, *_, dx = check_rows_op(rows, {"reduction": 1, "normalizer": torch.tensor(3.0)})
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, y, reduction="sum") / 3)
    assert dx.abs().sum() > 1


def test_same_bits_for_any_number_of_threads():
    for shape in ((50_000, 10), (600, 1000), (2, 19, 200, 200), (2, 150, 64, 64), (3, 200_000)):
        args, _ = op_arguments(Case(shape, weight="positive"), torch.float64)
        torch.set_num_threads(1)
        want = ops.value_and_grad(1.0, *args)
        torch.set_num_threads(3)
        assert all(map(same_bits, ops.value_and_grad(1.0, *args), want))


def test_errors_of_the_op():
    x, y = torch.randn(300, 5), torch.randint(5, (300,))
    with pytest.raises(RuntimeError, match="reduction: expected 1"):
        ops.rows_value_and_grad(1.0, x, y, None, None, None, None, 1.0, 0.0, 0.0, -100, False, True)
    with pytest.raises(RuntimeError, match=r"reduction: expected 1 \(mean\) or 2 \(sum\), got 0"):
        ops.value_and_grad(1.0, x, y, None, 0)
    for reduction in (1, 2):
        with pytest.raises(IndexError, match=r"Target 7 is out of bounds. \(position \[299\]"):
            ops.value_and_grad(1.0, x, torch.where(torch.arange(300) == 299, 7, y), None, reduction)
        check_op((x, y, None, reduction, -100, 0.0), {})


# ---- when forward does so ------------------------------------------------------------------------

ROWS, CLASSES = 1200, 300  # 1.4 MB


@pytest.fixture
def problem():
    """(logits, target, weight)."""
    x = torch.randn(ROWS, CLASSES, requires_grad=True)
    return x, torch.randint(CLASSES, (ROWS,)), torch.rand(CLASSES) + 0.5


@pytest.fixture(autouse=True)
def forget():
    """Nothing is left of what other tests did: a right guess, which may take 64 backwards, and then
    one upstream gradient that no guess was made for."""
    x, y = torch.zeros(5000, 2, requires_grad=True), torch.zeros(5000, dtype=torch.long)
    for _ in range(66):
        torch.autograd.grad(ce(x, y), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        torch.autograd.grad(ce(x, y), x, torch.tensor(0.125))


def learn(x, y, w, g=1.0):
    """Afterwards the next forward expects g. Returns what the gradient is."""
    for _ in range(2):
        loss = ce(x, y, w)
        dx, = torch.autograd.grad(loss, x, torch.tensor(g, dtype=loss.dtype))
    return dx


def names_of_ops(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = ("wce::forward", "wce::backward", "wce::value_and_grad", "wce::rows_forward",
             "wce::rows_backward", "wce::rows_value_and_grad")
    return [e.name for e in profile.events() if e.name in names]


APART, EARLY, WRONG = (["wce::forward", "wce::backward"], ["wce::value_and_grad"],
                       ["wce::value_and_grad", "wce::backward"])


def test_the_third_step_is_early(problem):
    x, y, w = problem
    steps, gradients = [], []

    def step():
        ce(x, y, w).backward()
        gradients.append(x.grad)
        x.grad = None

    for _ in range(5):
        steps.append(names_of_ops(step))
    assert steps == [APART, APART, EARLY, EARLY, EARLY]
    assert all(same_bits(g, gradients[0]) for g in gradients)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("autocast", [False, True])
def test_wrong_guesses_change_no_bit(problem, dtype, autocast):
    """Loss scales that come and go: expected is that of the two steps before, after a wrong guess
    that of four."""
    x, y, w = problem
    x = x.detach().to(DTYPES[dtype]).repeat(2, 1).requires_grad_()
    y = y.repeat(2)
    w = w.to(x.dtype) if dtype == "f64" else w
    guesses = ((1.0, APART), (1.0, APART), (2.0, WRONG), (2.0, APART), (2.0, APART), (2.0, APART),
               (2.0, EARLY), (1 / 3, WRONG), *[(0.0, APART)] * 4, (0.0, EARLY), (-0.0, WRONG))
    for g, want in guesses:
        grads = []

        def step(g=g, grads=grads):
            with torch.autocast("cpu", enabled=autocast):
                loss = ce(x, y, w)
            grads += torch.autograd.grad(loss, x, torch.tensor(g, dtype=loss.dtype))

        assert names_of_ops(step) == want, g
        stats = ops.forward(x.detach(), y, w, out_fp32=autocast and dtype != "f64")
        again = ops.backward(torch.tensor(g, dtype=stats[0].dtype), x.detach(), y, w, stats[1], 1,
                             -100, 0.0)
        assert same_bits(grads[0], again)


def test_only_one_gradient_waits(problem):
    x, y, w = problem
    learn(x, y, w)
    losses = []
    assert names_of_ops(lambda: losses.extend(ce(x, y, w) for _ in range(3))) == [
        "wce::value_and_grad", "wce::forward", "wce::forward"]
    assert names_of_ops(sum(losses).backward) == ["wce::backward"] * 2


def count_early(function):
    return names_of_ops(function).count("wce::value_and_grad")


def test_forwards_without_backward_cost_less_and_less(problem):
    """Validation that keeps gradients on: guesses after 2, 4, 8, ... backwards are wrong."""
    x, y, w = problem

    def epochs(count):
        for _ in range(count):
            ce(x, y, w).backward()
            ce(x, y, w)

    assert [count_early(lambda n=n: epochs(n)) for n in (2, 4, 8, 16)] == [1, 1, 1, 1]
    steps = [count_early(lambda: ce(x, y, w).backward()) for _ in range(34)]
    assert steps == [0] * 32 + [1, 1]  # and without it the first right guess makes good for all


def test_guesses_that_are_wrong_in_every_step_end(problem):
    x, y, w = problem

    def step():
        for g in (1.0, 1.0, 0.5):
            torch.autograd.grad(ce(x, y, w), x, torch.tensor(g))

    assert count_early(lambda: [step() for _ in range(20)]) == 1


def test_losses_that_are_kept_keep_one_gradient(problem):
    x, y, w = problem
    learn(x, y, w)
    kept = [ce(x, y, w)]
    for _ in range(10):
        assert names_of_ops(lambda: kept.append(ce(x, y, w))) == ["wce::forward"]
        torch.autograd.grad(kept[-1], x)
    torch.autograd.grad(kept[0], x)
    assert names_of_ops(lambda: ce(x, y, w)) == ["wce::value_and_grad"]


def test_not_for_small_logits_losses_per_row_and_calls_without_gradient(problem):
    x, y, w = problem
    small = x.detach()[:13].requires_grad_()  # 15.2 KiB
    learn(x, y, w)
    for call in (lambda: ce(small, y[:13], w), lambda: ce(x, y, w, reduction="none"),
                 lambda: ce(x.detach(), y, w)):
        assert names_of_ops(call) == ["wce::forward"]
    with torch.no_grad():
        assert names_of_ops(lambda: ce(x, y, w)) == ["wce::forward"]
    larger = x.detach()[:14].requires_grad_()  # 16.4 KiB
    assert names_of_ops(lambda: ce(larger, y[:14], w)) == ["wce::value_and_grad"]


def test_not_where_ops_are_watched(problem):
    """Who counts or replaces ops finds the two that he knows."""
    x, y, w = problem
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **kwargs or {})

    learn(x, y, w)
    with Mode():
        ce(x, y, w)
    loss = ce(x, y, w)
    with Mode():
        loss.backward()
    ours = [name for name in seen if name.startswith("wce")]
    assert ours == ["wce.forward.default", "wce.backward.default"]
    assert not any("local_scalar" in name for name in seen)


def test_a_step_can_be_traced(problem):
    x, y, _ = problem

    def step(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(ce(x, y), x)[0]

    traced = torch.fx.experimental.proxy_tensor.make_fx(step)(x.detach())
    with torch.no_grad():
        got = traced(x.detach())
    assert same_bits(got, step(x))


def test_not_where_saved_tensors_are_watched(problem):
    """A checkpoint runs forward twice; offloading moves what is saved, which this is not."""
    x, y, w = problem
    want = learn(x, y, w)
    step = lambda: checkpoint(ce, x, y, w, use_reentrant=False).backward()  # noqa: E731
    assert "wce::value_and_grad" not in names_of_ops(step)
    assert same_bits(x.grad, want)
    with torch.autograd.graph.save_on_cpu():
        assert names_of_ops(lambda: ce(x, y, w)) == ["wce::forward"]
    assert names_of_ops(lambda: ce(x, y, w)) == ["wce::value_and_grad"]


def test_not_in_compiled_code(problem):
    x, y, w = problem
    want = learn(x, y, w)
    call = torch.compile(ce, backend="aot_eager", fullgraph=True)
    assert "wce::value_and_grad" not in names_of_ops(lambda: call(x, y, w).backward())
    assert same_bits(x.grad, want)


def test_environment_variable():
    code = """
        import torch, wce_torch
        x, y = torch.randn(1200, 300, requires_grad=True), torch.randint(300, (1200,))
        with torch.profiler.profile() as profile:
            for _ in range(4):
                wce_torch.cross_entropy(x, y).backward()
        print(sum(e.name == "wce::value_and_grad" for e in profile.events()))
    """
    for value, count in (("0", "0"), ("1", "2")):
        done = run_python(code, WCE_EARLY_GRADIENT=value)
        assert done.stdout.strip() == count, done.stderr


def test_statistics_beside_the_loss(problem):
    """Early while only the loss has a gradient; one of lse is nothing that could be expected."""
    x, y, w = problem
    gradients, steps = [], []

    def step(z=0.0):
        stats = wce_torch.cross_entropy_with_stats(x, y, w)
        loss = stats.loss + z * stats.lse.square().mean() if z else stats.loss
        gradients.extend(torch.autograd.grad(loss, x))

    for z in [0.0] * 3 + [1e-3] * 3 + [0.0] * 5:
        steps.append(names_of_ops(lambda z=z: step(z)))
    apart = ["wce::rows_forward", "wce::rows_backward"]
    early = ["wce::rows_forward", "wce::rows_value_and_grad"]  # the public op, and what it calls
    wrong = [*early, "wce::rows_backward"]
    assert steps == [apart, apart, early, wrong, *[apart] * 6, early]
    for first, others in ((0, (1, 2, *range(6, 11))), (3, (4, 5))):
        assert all(same_bits(gradients[first], gradients[i]) for i in others)
    assert not same_bits(gradients[0], gradients[3])


def test_a_gradient_of_a_row_result_alone(problem):
    """Then the loss has no upstream gradient at all."""
    x, y, w = problem
    learn(x, y, w)
    stats = wce_torch.cross_entropy_with_stats(x, y, w)
    dx, = torch.autograd.grad(stats.lse.sum(), x)
    torch.testing.assert_close(dx, x.detach().softmax(1))


# ---- what autograd promises ----------------------------------------------------------------------


def early(x, y, w):
    """A loss whose gradient waits."""
    learn(x, y, w)
    losses = []
    assert names_of_ops(lambda: losses.append(ce(x, y, w))) == ["wce::value_and_grad"]
    return losses[0]


def test_each_backward_gets_a_gradient_of_its_own(problem):
    x, y, w = problem
    loss = early(x, y, w)
    want = learn(x, y, w)
    first, = torch.autograd.grad(loss, x, retain_graph=True)
    first.zero_()
    second, = torch.autograd.grad(loss, x, retain_graph=True)
    third, = torch.autograd.grad(loss, x)
    assert same_bits(second, want) and same_bits(third, want)
    assert len({t.data_ptr() for t in (first, second, third)}) == 3
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_gradients_of_the_gradient(problem):
    x, y, w = problem
    loss = early(x, y, w)
    dx, = torch.autograd.grad(loss, x, create_graph=True)
    got, = torch.autograd.grad(dx.square().sum(), x)
    reference = torch.nn.functional.cross_entropy(x, y, w)
    dx, = torch.autograd.grad(reference, x, create_graph=True)
    want, = torch.autograd.grad(dx.square().sum(), x)
    torch.testing.assert_close(got, want)


def test_batched_gradients(problem):
    x, y, w = problem
    want = learn(x, y, w)
    loss = early(x, y, w)
    both, = torch.autograd.grad(loss, x, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack([want, 2 * want]))


def test_logits_that_were_changed_are_noticed(problem):
    x, y, w = problem
    shifted = x * 1.0
    learn(x, y, w)
    losses = []
    assert names_of_ops(lambda: losses.append(ce(shifted, y, w))) == ["wce::value_and_grad"]
    shifted.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()


def test_compiled_autograd(problem):
    x, y, w = problem
    want = learn(x, y, w)
    loss = early(x, y, w)
    with torch._dynamo.compiled_autograd._enable(
            torch.compile(backend="aot_eager", fullgraph=True)):
        first, = torch.autograd.grad(loss, x, retain_graph=True)
        assert same_bits(first, want)
        first.zero_()
        second, = torch.autograd.grad(loss, x)
    assert same_bits(second, want)


def test_hooks_see_and_change_upstream_gradients(problem):
    x, y, w = problem
    want = learn(x, y, w)
    loss = early(x, y, w)
    loss.register_hook(lambda g: 2 * g)
    loss.backward()
    assert same_bits(x.grad, learn(x, y, w, g=2.0)) and not same_bits(x.grad, want)


def test_targets_are_checked(problem):
    x, y, w = problem
    want = learn(x, y, w)
    bad = y.clone()
    bad[7] = CLASSES
    with pytest.raises(IndexError, match="Target 300 is out of bounds"):
        ce(x, bad, w)
    ce(x, y, w).backward()
    assert same_bits(x.grad, want)


@pytest.mark.parametrize("layout", ["plain", "class_last"])
def test_memory_is_that_of_one_gradient(layout):
    """Also where it becomes a leaf's .grad, which is no copy."""
    x, y = as_layout(torch.randn(4, 20, 200, 200), layout), torch.randint(20, (4, 200, 200))
    x.requires_grad_()

    def step():
        if layout == "plain":
            ce(x, y).backward()
            x.grad = None
        else:
            torch.autograd.grad(ce(x, y), x)

    for _ in range(3):
        step()
    assert names_of_ops(step) == EARLY
    assert peak_bytes(step) <= 1.01 * x.nbytes


def test_a_graph_that_is_dropped_frees_its_gradient(problem):
    x, y, w = problem
    learn(x, y, w)
    wce_torch.empty_cache()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        ce(x, y, w)
        wce_torch.empty_cache()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in events]
    assert max(sizes) >= x.nbytes and sum(sizes) == 0

"""nll_loss, NLLLoss and cross_entropy_from_probs against the definition, in float64."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers import peak_bytes
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from wce_torch import probabilities
from wce_torch.probabilities import NLLLoss, cross_entropy_from_probs, nll_loss

NAN, INF = math.nan, math.inf
SHAPES = [(5,), (4, 5), (3, 5, 4), (2, 5, 3, 4), (2, 5, 2, 3, 2), (2, 5, 2, 1, 3, 2)]
REDUCTIONS = ["none", "mean", "sum"]


# ---- references: loops over rows, nothing shared with the product -------------------------------


def rows_of(x):
    """(N, C, d...) -> list of rows, each a list of floats, in the order of the target."""
    x = x.detach().double()
    if x.dim() == 1:
        return [x.tolist()]
    return x.movedim(1, -1).reshape(-1, x.shape[1]).tolist()


def summarise(losses, denominator, reduction, shape):
    if reduction == "none":
        return torch.tensor(losses, dtype=torch.float64).reshape(shape)
    total = math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)
    if reduction == "mean":
        total = total / denominator if denominator else NAN
    return torch.tensor(total, dtype=torch.float64)


def index_reference(x, y, w, ignore, reduction, f):
    """-w_y * f(x_y), with f the identity (nll) or the logarithm (probabilities)."""
    w = [1.0] * x.shape[0 if x.dim() == 1 else 1] if w is None else w.double().tolist()
    losses, denominator = [], 0.0
    for row, k in zip(rows_of(x), y.reshape(-1).tolist(), strict=True):
        losses.append(0.0 if k == ignore else -w[k] * f(row[k]))
        denominator += 0.0 if k == ignore else w[k]
    return summarise(losses, denominator, reduction, y.shape)


def soft_reference(y, t, w, reduction):
    w = [1.0] * y.shape[0 if y.dim() == 1 else 1] if w is None else w.double().tolist()
    losses = []
    for yr, tr in zip(rows_of(y), rows_of(t), strict=True):
        terms = [-a * b * math.log(c) for a, b, c in zip(w, tr, yr, strict=True) if a * b != 0]
        losses.append(math.fsum(terms))
    shape = () if y.dim() == 1 else y.shape[:1] + y.shape[2:]
    return summarise(losses, len(losses), reduction, shape)


def make(shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    dim = 0 if len(shape) == 1 else 1
    target_shape = shape[:dim] + shape[dim + 1 :]
    y = torch.randint(shape[dim], target_shape, generator=g)
    w = torch.rand(shape[dim], generator=g, dtype=torch.float64) + 0.1
    return x.softmax(dim).to(dtype), y, w.to(dtype)


def layouts(x):
    """The same values with other strides."""
    yield "contiguous", x
    if x.dim() > 1:
        yield "classes last", x.movedim(1, -1).contiguous().movedim(-1, 1)
        yield "sliced", torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
        yield "one row repeated", x[:1].expand(x.shape)


# ---- nll_loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ignore", [-100, 2])
def test_nll_equals_the_definition(shape, weighted, ignore, reduction):
    x, y, w = make(shape)
    x, w = x.log(), w if weighted else None
    y.reshape(-1)[0] = ignore if len(shape) > 1 else 1
    for name, z in layouts(x):
        z = z.detach().requires_grad_()
        loss = nll_loss(z, y, w, ignore_index=ignore, reduction=reduction)
        expected = index_reference(z, y, w, ignore, reduction, lambda v: v)
        torch.testing.assert_close(loss, expected, msg=lambda m, name=name: f"{name}: {m}")
        loss.sum().backward()
        torch.testing.assert_close(z.grad, nll_gradient(z, y, w, ignore, reduction))


def nll_gradient(x, y, w, ignore, reduction):
    dim = 0 if x.dim() == 1 else 1
    one_hot = torch.zeros(x.shape, dtype=x.dtype)
    counts = y != ignore
    one_hot.scatter_(dim, torch.where(counts, y, 0).unsqueeze(dim), -1.0)
    one_hot *= counts.unsqueeze(dim)
    if w is not None:
        one_hot *= w.view((-1,) + (1,) * (x.dim() - dim - 1))
    if reduction == "mean":
        one_hot /= (w[y[counts]] if w is not None else counts).sum()
    return one_hot


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nll_opinfo_samples(dtype):
    op = next(o for o in op_db if o.name == "nn.functional.nll_loss")
    count = 0
    for s in op.sample_inputs("cpu", dtype, requires_grad=True):
        ours = nll_loss(s.input, *s.args, **s.kwargs)
        exact_args = [a.double() if torch.is_floating_point(a) else a for a in s.args]
        kwargs = {k: v.double() if k == "weight" and v is not None else v
                  for k, v in s.kwargs.items()}
        exact = F.nll_loss(s.input.double(), *exact_args, **kwargs)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, exact.to(dtype))
        g, = torch.autograd.grad(ours.sum(), s.input)
        e, = torch.autograd.grad(exact.sum(), s.input)
        torch.testing.assert_close(g, e)
        count += 1
    assert count > 10


def test_nll_module_info():
    info = next(m for m in module_db if m.module_cls is torch.nn.NLLLoss)
    count = 0
    for m in info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    ):
        loss = NLLLoss(*m.constructor_input.args, **m.constructor_input.kwargs)
        torch.testing.assert_close(
            loss(*m.forward_input.args), m.reference_fn(loss, *m.forward_input.args)
        )
        count += 1
    assert count > 10


ERRORS = {
    "batch": ((4, 5), (3,), {}),
    "multi-target": ((4, 5), (4, 1), {}),
    "no batch in target": ((4, 5), (), {}),
    "1-D": ((5,), (3,), {}),
    "3-D": ((2, 5, 3), (2, 4), {}),
    "3-D batch": ((2, 5, 3), (3, 3), {}),
    "4-D": ((2, 5, 3, 3), (2, 4, 3), {}),
    "4-D rank": ((2, 5, 3, 3), (2, 3), {}),
    "5-D": ((2, 5, 3, 3, 2), (2, 3, 3, 1), {}),
    "0-D": ((), (), {}),
    "weight": ((4, 5), (4,), {"weight": torch.ones(4)}),
    "weight 2-D": ((4, 5), (4,), {"weight": torch.ones(1, 5)}),
    "weight, 3-D": ((2, 5, 3), (2, 3), {"weight": torch.ones(4)}),
    "integer weight": ((4, 5), (4,), {"weight": torch.ones(5, dtype=torch.long)}),
    "weight needs grad": ((4, 5), (4,), {"weight": torch.ones(5, requires_grad=True)}),
    "list as weight": ((4, 5), (4,), {"weight": [1.0] * 5}),
    "reduction": ((4, 5), (4,), {"reduction": "avg"}),
    "reduction None": ((4, 5), (4,), {"reduction": None}),
    "ignore None": ((4, 5), (4,), {"ignore_index": None}),
    "ignore float": ((4, 5), (4,), {"ignore_index": 2.0}),
    "ignore bool": ((4, 5), (4,), {"ignore_index": True}),
    "ignore huge": ((4, 5), (4,), {"ignore_index": 2**70}),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nll_raises_what_torch_raises(name, dtype):
    shape, target_shape, kwargs = ERRORS[name]
    x, y = torch.rand(shape).to(dtype), torch.zeros(target_shape, dtype=torch.long)
    with pytest.raises(Exception) as torchs:
        F.nll_loss(x, y, **kwargs)
    for z in (x, *[z for n, z in layouts(x) if n == "classes last" and x.dim() > 2]):
        with pytest.raises(type(torchs.value)) as ours:
            nll_loss(z, y, **kwargs)
        if "weight" not in name or dtype == torch.float32:  # else torch names the dtype first
            assert str(ours.value) == str(torchs.value)
    good = nll_loss(torch.zeros(2, 5).to(dtype), torch.tensor([1, 2]))
    assert good == 0


# since torch 2.12 | 2.11
NO_CLASSES = "expected target dtype to be Long or Byte|expected scalar type Long"


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float32])
def test_nll_target_dtypes_that_torch_refuses(dtype):
    with pytest.raises(RuntimeError, match=NO_CLASSES):
        nll_loss(torch.rand(4, 5).bfloat16(), torch.zeros(4, dtype=dtype))
    with pytest.raises(TypeError, match="must be Tensor, not int"):
        nll_loss(torch.rand(4, 5), 1)
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        nll_loss(torch.ones(4, 5, dtype=torch.long), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("value", [7, -1, 5])
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [nll_loss, cross_entropy_from_probs])
def test_target_out_of_bounds_names_value_and_position(loss, dtype, shape, value):
    x, y, _ = make(shape)
    where = tuple(n - 1 for n in y.shape)
    y[where] = value
    y[(0,) * y.dim()] = -100
    place = ", ".join(map(str, where))
    text = rf"Target {value} is out of bounds\..*position \[{place}\].* 5 classes"
    for _, z in layouts(x.to(dtype)):
        for reduction in REDUCTIONS:
            with pytest.raises(IndexError, match=text):
                loss(z, y, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", SHAPES)
def test_narrow_targets_equal_int64(shape, dtype):
    x, y, w = make(shape, dtype=torch.float32)
    for f in (nll_loss, cross_entropy_from_probs):
        assert torch.equal(f(x, y.to(dtype), w), f(x, y, w))


def test_weight_of_another_dtype():
    x, y, w = make((40, 5), dtype=torch.float32)
    expected = nll_loss(x.log(), y, w)
    ours = nll_loss(x.log(), y, w.double())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("loss", [nll_loss, cross_entropy_from_probs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edges_of_the_mean(loss, dtype):
    x, y, w = make((4, 5), dtype=torch.float32)
    x = x.to(dtype).requires_grad_()
    nobody = torch.full((4,), -100)
    assert loss(x, nobody).isnan() and loss(x, nobody, reduction="sum") == 0
    loss(x, nobody).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert loss(x, y, torch.zeros(5)).isnan()
    empty = x[:0], y[:0]
    assert loss(*empty).isnan() and loss(*empty, reduction="sum") == 0
    assert loss(*empty, reduction="none").shape == (0,)
    assert loss(torch.empty(3, 0, dtype=dtype), nobody[:3], reduction="sum") == 0
    assert loss(torch.empty(2, 3, 0, dtype=dtype), y.new_empty(2, 0), w[:3], reduction="sum") == 0


@pytest.mark.parametrize("loss", [nll_loss, cross_entropy_from_probs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_ignored_rows_do_not_matter(loss, dtype, shape):
    x, y, w = make(shape, dtype=torch.float32)
    y[0] = -100
    for z in (z.clone(memory_format=torch.preserve_format) for _, z in layouts(x.to(dtype))):
        clean = loss(z, y, w, reduction="none")
        z[0] = NAN
        z.requires_grad_()
        assert torch.equal(loss(z, y, w, reduction="none"), clean)
        loss(z, y, w).backward()
        assert torch.equal(z.grad[0], torch.zeros_like(z[0])) and z.grad[1:].isfinite().all()


def test_infinities():
    x = torch.full((2, 3), -INF, requires_grad=True)
    loss = nll_loss(x, torch.tensor([0, 1]))
    loss.backward()
    assert loss == INF
    assert x.grad.tolist() == [[-0.5, 0, 0], [0, -0.5, 0]]
    assert nll_loss(torch.full((2, 3), NAN), torch.tensor([0, 1])).isnan()


def test_sixteen_bit_arithmetic_is_float32():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(131072, 3, generator=g).log_softmax(1).half()
    y = torch.randint(3, (131072,), generator=g)
    exact = F.nll_loss(x.double(), y)
    assert nll_loss(x, y) == exact.half()
    assert F.nll_loss(x, y) != exact.half()  # torch sums in float16: nan, or far away
    x.requires_grad_()
    nll_loss(x, y).backward()
    assert torch.equal(x.grad[torch.arange(131072), y], torch.full((131072,), -1 / 131072).half())

    x = torch.randn(4096, 1000, generator=g).log_softmax(1).bfloat16()
    y, w = torch.randint(1000, (4096,), generator=g), torch.rand(1000, generator=g).bfloat16()
    for reduction in REDUCTIONS:
        exact = F.nll_loss(x.double(), y, w.double(), reduction=reduction)
        ours = nll_loss(x, y, w, reduction=reduction)
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, exact.bfloat16())


def bits(f):
    """f's result with 1, 2 and 3 threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(f())
    finally:
        torch.set_num_threads(before)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(100_003, 3), (5, 3, 41, 1003)])
def test_index_targets_same_bits_for_any_number_of_threads(shape, dtype):
    x, y, w = make(shape, dtype=dtype)
    for f, z in ((nll_loss, x.log()), (cross_entropy_from_probs, x)):
        for reduction in ("mean", "sum"):
            one, two, three = bits(lambda f=f, z=z, r=reduction: f(z, y, w, reduction=r))
            assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("shape", [(1, 300_001), (300_001,), (50_003, 7), (3, 5, 100_003)])
def test_soft_targets_same_bits_for_any_number_of_threads(shape):
    x, _, w = make(shape, dtype=torch.float32)
    t = make(shape, seed=1, dtype=torch.float32)[0]

    def run(needs_target):
        y, s = x.clone().requires_grad_(), t.clone().requires_grad_(needs_target)
        loss = cross_entropy_from_probs(y, s, w)
        loss.backward()
        return torch.cat([loss.detach().view(1), y.grad.flatten()])

    for needs_target in (False, True):
        one, two, three = bits(lambda n=needs_target: run(n))
        assert torch.equal(one, two) and torch.equal(one, three)


def test_ordered_sum_is_a_sum():
    for n in (0, 1, 4096, 32768, 32769, 40_000, 200_003):
        v = torch.rand(n, dtype=torch.float64)
        torch.testing.assert_close(
            probabilities._ordered_sum(v), torch.tensor(math.fsum(v.tolist()), dtype=v.dtype),
            rtol=1e-14, atol=0,
        )
    assert probabilities._ordered_sum(torch.ones(4096 * 32768 + 1, dtype=torch.uint8)) == 2**27 + 1


def test_index_targets_allocate_nothing_of_the_size_of_the_input():
    x = torch.rand(16, 64, 1000)
    y, w = torch.randint(1000, (16, 64)), torch.rand(1000)
    size = x.numel() * 4
    for z in (x.transpose(1, 2), x.transpose(1, 2).contiguous(), x.bfloat16().transpose(1, 2)):
        for f in (nll_loss, cross_entropy_from_probs):
            assert peak_bytes(lambda f=f, z=z: f(z, y, w)) < 0.05 * size
    assert peak_bytes(lambda: F.nll_loss(x.transpose(1, 2), y, w)) >= size  # the check can see
    leaf = x.transpose(1, 2).contiguous().requires_grad_()
    loss = nll_loss(leaf, y, w)
    assert size <= peak_bytes(lambda: loss.backward(retain_graph=True)) < 1.05 * size


def test_soft_targets_allocate_one_gradient():
    y, t, w = torch.rand(8192, 1000), torch.rand(8192, 1000), torch.rand(1000)
    size = y.numel() * 4
    y.requires_grad_()
    assert peak_bytes(lambda: cross_entropy_from_probs(y, t, w)) < 0.2 * size
    loss = cross_entropy_from_probs(y, t, w)
    assert size <= peak_bytes(lambda: loss.backward(retain_graph=True)) < 1.2 * size


def test_channels_last_backward():
    x = torch.rand(2, 5, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    y = torch.randint(5, (2, 3, 3))
    nll_loss(x, y).backward()  # torch 2.13 raises "grad_input must be contiguous"
    torch.testing.assert_close(x.grad, nll_gradient(x, y, None, -100, "mean"))


# ---- the module ----------------------------------------------------------------------------------


def test_module_is_torchs_in_every_other_respect():
    w = torch.tensor([1.0, 2.0, 3.0])
    ours, torchs = NLLLoss(w, ignore_index=1), torch.nn.NLLLoss(w, ignore_index=1)
    assert isinstance(ours, torch.nn.NLLLoss)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    x, y = torch.randn(6, 3).log_softmax(1), torch.tensor([0, 1, 2, 2, 1, 0])
    assert ours(x, y) == torchs(x, y)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin(x, y) == torchs(x, y)
    assert ours.double()(x.double(), y).dtype == torch.float64
    ours.load_state_dict({"weight": torch.tensor([4.0, 5.0, 6.0])})
    assert ours.weight.tolist() == [4, 5, 6]


def test_legacy_arguments():
    x, y = torch.randn(6, 3).log_softmax(1), torch.tensor([0, 1, 2, 2, 1, 0])
    for size_average, reduce in itertools.product([None, True, False], repeat=2):
        if size_average is None and reduce is None:
            continue
        with pytest.warns(UserWarning, match="size_average and reduce"):
            ours = nll_loss(x, y, None, size_average, -100, reduce)
        with pytest.warns(UserWarning, match="size_average and reduce"):
            torchs = F.nll_loss(x, y, None, size_average, -100, reduce)
        with pytest.warns(UserWarning, match="size_average and reduce"):
            module = NLLLoss(None, size_average, -100, reduce)(x, y)
        assert torch.equal(ours, torchs) and torch.equal(module, torchs)
    with pytest.warns(UserWarning, match="elementwise_mean"):
        assert nll_loss(x, y, reduction="elementwise_mean") == F.nll_loss(x, y)


# ---- autograd, transforms, compile, autocast -----------------------------------------------------


def cases():
    """name -> (function of the differentiable inputs, the inputs), float64."""
    for shape in ((5,), (4, 5), (2, 5, 3), (2, 5, 2, 2)):
        x, y, w = make(shape)
        t = make(shape, seed=1)[0]
        x, t = x + 0.1, t + 0.1
        for r in REDUCTIONS if len(shape) == 2 else ["mean"] if len(shape) < 4 else ["none"]:
            rank = f"{len(shape)}-D {r}"
            yield f"nll {rank}", lambda a, y=y, w=w, r=r: nll_loss(a, y, w, reduction=r), (x,)
            yield (f"nll strided {rank}",
                   lambda a, y=y, w=w, r=r: nll_loss(restride(a), y, w, reduction=r), (x,))
            yield (f"index {rank}",
                   lambda a, y=y, w=w, r=r: cross_entropy_from_probs(a, y, w, reduction=r), (x,))
            yield (f"soft, probs {rank}",
                   lambda a, t=t, w=w, r=r: cross_entropy_from_probs(a, t, w, reduction=r), (x,))
            yield (f"soft, all {rank}",
                   lambda a, t, w, r=r: cross_entropy_from_probs(a, t, w, reduction=r), (x, t, w))


def restride(x):
    return x if x.dim() == 1 else x.movedim(1, -1).contiguous().movedim(-1, 1)


CASES = {name: (f, inputs) for name, f, inputs in cases()}


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name):
    f, inputs = CASES[name]
    inputs = tuple(i.detach().clone().requires_grad_() for i in inputs)
    assert torch.autograd.gradcheck(
        f, inputs, check_forward_ad=True, check_batched_grad=True, nondet_tol=0.0
    )
    assert torch.autograd.gradgradcheck(f, inputs, nondet_tol=0.0)


@pytest.mark.parametrize("name", [n for n in CASES if "2-D" in n])
def test_function_transforms(name):
    f, inputs = CASES[name]
    inputs = tuple(i.detach().clone() for i in inputs)
    needs = tuple(i.requires_grad_() for i in copy.deepcopy(inputs))
    expected = torch.autograd.grad(f(*needs).sum(), needs)
    arguments = tuple(range(len(inputs)))
    got = torch.func.grad(lambda *a: f(*a).sum(), arguments)(*inputs)
    torch.testing.assert_close(got, expected)
    tangents = tuple(torch.ones_like(i) for i in inputs)
    _, tangent = torch.func.jvp(lambda *a: f(*a).sum(), inputs, tangents)
    torch.testing.assert_close(tangent, sum(g.sum() for g in expected))
    batch = tuple(torch.stack([i, i * 2]) for i in inputs)
    both = torch.func.vmap(f)(*batch)
    for k in range(2):
        torch.testing.assert_close(both[k], f(*(b[k] for b in batch)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [n for n in CASES if "2-D mean" in n or "4-D none" in n])
def test_compiled(name, dynamic):
    f, inputs = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    a = tuple(i.detach().clone().requires_grad_() for i in inputs)
    b = tuple(i.detach().clone().requires_grad_() for i in inputs)
    got, expected = compiled(*a), f(*b)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    expected.sum().backward()
    for i, j in zip(a, b, strict=True):
        torch.testing.assert_close(i.grad, j.grad)


def test_compiled_module_recompiles_once_at_most():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = torch.compile(NLLLoss(torch.rand(7)), fullgraph=True, backend=counter)
    for n in (3, 5, 50_000, 9):
        x, y = torch.randn(n, 7).log_softmax(1), torch.randint(7, (n,))
        torch.testing.assert_close(loss(x, y), F.nll_loss(x, y, loss.weight))
    assert counter.frame_count <= 2


def test_meta_and_fake_tensors():
    x, y = torch.empty(4, 5, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        assert nll_loss(x.to(dtype), y, reduction="none").shape == (4,)
        assert nll_loss(x.to(dtype), y).device.type == "meta"
        assert cross_entropy_from_probs(x.to(dtype), y).dtype == dtype
        assert cross_entropy_from_probs(x.to(dtype), x).shape == ()


def test_autocast():
    x, y, w = make((40, 5), dtype=torch.float32)
    t = make((40, 5), seed=1, dtype=torch.float32)[0]
    half = x.bfloat16().requires_grad_()
    calls = [
        lambda p, w: nll_loss(p, y, w),
        lambda p, w: cross_entropy_from_probs(p, y, w),
        lambda p, w: cross_entropy_from_probs(p, t.to(p.dtype), w),
    ]
    for f in calls:
        exact = f(half.detach().double(), w.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = f(half, w)
            with torch.autocast("cpu", enabled=False):
                assert f(half, w.bfloat16()).dtype == torch.bfloat16
            assert f(x.double(), w.double()).dtype == torch.float64
            assert torch.is_autocast_enabled("cpu")
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=2e-3, atol=0)
        half.grad = None
        loss.backward()
        assert half.grad.dtype == torch.bfloat16


class Loud(torch.Tensor):
    """A subclass that notes the functions that it is asked for."""

    seen = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_see_torchs_function():
    x, y, w = make((4, 5), dtype=torch.float32)
    Loud.seen.clear()
    ours = nll_loss(x.as_subclass(Loud), y, w)
    assert F.nll_loss in Loud.seen
    assert ours.as_subclass(torch.Tensor) == F.nll_loss(x, y, w)


def test_in_place_edit_between_forward_and_backward_raises():
    y, t = torch.rand(4, 5).requires_grad_(), torch.rand(4, 5)
    loss = cross_entropy_from_probs(y, t)
    t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_from_probs_equals_the_definition(shape, weighted, reduction):
    x, y, w = make(shape)
    t = make(shape, seed=1)[0]
    w = w if weighted else None
    y.reshape(-1)[0] = -100 if len(shape) > 1 else 1
    for _, z in layouts(x):
        got = cross_entropy_from_probs(z, y, w, reduction=reduction)
        torch.testing.assert_close(got, index_reference(z, y, w, -100, reduction, math.log))
        for _, s in layouts(t):
            got = cross_entropy_from_probs(z, s, w, reduction=reduction)
            torch.testing.assert_close(got, soft_reference(z, s, w, reduction))


def softmax_first(x, *args, **kwargs):
    return cross_entropy_from_probs(x.softmax(min(1, x.dim() - 1)), *args, **kwargs)


@pytest.mark.parametrize("shape", SHAPES)
def test_of_a_softmax_equals_cross_entropy_of_the_logits(shape):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    t, y, w = make(shape, seed=1)
    for target in (t, y):
        for reduction in REDUCTIONS:
            grads = []
            for f in (F.cross_entropy, softmax_first):
                loss = f(logits, target, w, reduction=reduction)
                grads.append((loss, *torch.autograd.grad(loss.sum(), logits)))
            torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize(
    "shape", [(700, 3), (7, 90), (3, 4, 50), (2, 3, 40, 5), (300,), (1, 3, 99)]
)
@pytest.mark.parametrize("block", [1, 64, 1000])
def test_blocks_cover_every_element_once(shape, block, monkeypatch):
    monkeypatch.setattr(probabilities, "_BLOCK", block)
    seen = torch.zeros(shape, dtype=torch.int64)
    dim = 0 if len(shape) == 1 else 1
    rows = torch.zeros(shape[:dim] + shape[dim + 1 :], dtype=torch.int64)
    for index, row_index in probabilities._blocks(torch.Size(shape)):
        seen[index] += 1
        rows[row_index] += 1
    assert (seen == 1).all() and (rows == 1).all()

    y, _, w = make(shape)
    t = make(shape, seed=1)[0]
    grads = []
    for f in (lambda y: cross_entropy_from_probs(y, t, w, reduction="none"),
              lambda y: -(w.view((-1,) + (1,) * (y.dim() - dim - 1)) * t * y.log()).sum(dim)):
        y = y.detach().requires_grad_()
        loss = f(y)
        grads.append((loss, *torch.autograd.grad(loss.square().sum(), y)))
    torch.testing.assert_close(grads[0], grads[1])


def zero_case(needs_target, create_graph):
    """Rows: 0 log 0 | certain and right | t = 0 where y > 0 | certain and wrong."""
    y = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    t = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.5]])
    y.requires_grad_()
    t.requires_grad_(needs_target)
    loss = cross_entropy_from_probs(y, t, reduction="none")
    grads = torch.autograd.grad(
        loss.sum(), (y, t) if needs_target else (y,), create_graph=create_graph
    )
    return loss.detach(), *(g.detach() for g in grads)


@pytest.mark.parametrize("needs_target", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_zero_log_zero_is_zero_and_so_are_its_derivatives(needs_target, create_graph):
    loss, dy, *dt = zero_case(needs_target, create_graph)
    torch.testing.assert_close(loss, torch.tensor([math.log(2), 0.0, math.log(2), INF]))
    expected = [[0.0, -1.0, -1.0], [0.0, 0.0, -1.0], [0.0, 0.0, -2.0], [-INF, 0.0, -0.5]]
    torch.testing.assert_close(dy, torch.tensor(expected))
    for g in dt:  # -log y where y > 0, also at t = 0; 0 at (0, 0); +inf at t > 0, y = 0
        two, ten_thirds, five = math.log(2), math.log(10 / 3), math.log(5)
        expected = [[0.0, two, two], [0.0, 0.0, 0.0], [five, ten_thirds, two], [INF, 0.0, 0.0]]
        torch.testing.assert_close(g, torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_zero_takes_a_class_out(dtype):
    y = torch.tensor([[0.0, 0.25, 0.75]]).to(dtype).requires_grad_()
    w = torch.tensor([0.0, 1.0, 2.0])
    for target in (torch.tensor([0]), torch.tensor([[1.0, 0.0, 0.0]])):
        loss = cross_entropy_from_probs(y, target, w, reduction="sum")
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, y)[0], torch.zeros_like(y))


def test_impossible_target_is_infinite():
    y = torch.tensor([[0.0, 0.25, 0.75]], requires_grad=True)
    loss = cross_entropy_from_probs(y, torch.tensor([0]))
    loss.backward()
    assert loss == INF and y.grad.tolist() == [[-INF, 0, 0]]
    assert cross_entropy_from_probs(torch.tensor([[NAN, 1.0]]), torch.tensor([[0.0, 1.0]])).isnan()
    assert cross_entropy_from_probs(torch.tensor([[-0.5, 1.5]]), torch.tensor([0])).isnan()


def test_from_probs_soft_edges():
    y = torch.rand(0, 5)
    assert cross_entropy_from_probs(y, y).isnan()
    assert cross_entropy_from_probs(y, y, reduction="sum") == 0
    assert cross_entropy_from_probs(y, y, reduction="none").shape == (0,)
    none = torch.rand(3, 0)
    assert cross_entropy_from_probs(none, none, reduction="none").tolist() == [0, 0, 0]


def test_from_probs_dtypes():
    y, _, w = make((64, 50))
    t = make((64, 50), seed=1)[0]
    bf16, half = torch.bfloat16, torch.float16
    cases = [(bf16, bf16, bf16), (half, half, half), (bf16, torch.float32, bf16),
             (torch.float32, torch.float32, torch.float32), (bf16, half, half),
             (torch.float32, torch.float64, torch.float32)]
    for dy, dt, dw in cases:
        yy, tt, ww = y.to(dy).requires_grad_(), t.to(dt), w.to(dw)
        exact = soft_reference(yy, tt, ww, "mean")
        loss = cross_entropy_from_probs(yy, tt, ww)
        assert loss.dtype == torch.promote_types(torch.promote_types(dy, dt), dw)
        tol = torch.finfo(loss.dtype).eps if loss.dtype in (bf16, half) else 3e-7
        torch.testing.assert_close(loss.double(), exact, rtol=tol, atol=0)
        loss.backward()
        torch.testing.assert_close(
            yy.grad, (-ww.double() * tt.double() / yy.detach().double() / 64).to(dy)
        )


SOFT_ERRORS = [
    (lambda: (torch.rand(4, 5), torch.zeros(4, 5, dtype=torch.long)), {}, RuntimeError,
     "Expected floating point type for target"),
    (lambda: (torch.rand(4, 5), torch.rand(4, 5)), {"ignore_index": 1}, RuntimeError,
     "ignore_index is not supported for floating point target"),
    (lambda: (torch.rand(4, 5), torch.rand(4, 5), torch.rand(4)), {}, RuntimeError,
     r"all 5 classes or no classes but got weight tensor of shape: \[4\]"),
    (lambda: (torch.rand(4, 5), torch.rand(4, 5)), {"ignore_index": "a"}, TypeError,
     "ignore_index must be int, not str"),
    (lambda: (torch.rand(4, 5), torch.rand(4, 5), torch.ones(5) * 1j), {}, ValueError,
     "weight: expected one real factor per class"),
    (lambda: (torch.rand(4, 5), torch.rand(4, 5)), {"reduction": "avg"}, ValueError,
     "avg is not a valid value for reduction"),
    (lambda: (torch.ones(4, 5, dtype=torch.long), torch.rand(4, 5)), {}, NotImplementedError,
     "not implemented for"),
    (lambda: (torch.rand(()), torch.rand(())), {}, IndexError, "Dimension"),
    (lambda: (torch.rand(4, 5), torch.rand(1, 5)), {}, ValueError, "batch_size"),
    (lambda: (torch.rand(4, 5), torch.rand(4)), {}, RuntimeError, NO_CLASSES),
]


@pytest.mark.parametrize("case", range(len(SOFT_ERRORS)))
def test_from_probs_errors(case):
    arguments, kwargs, error, text = SOFT_ERRORS[case]
    with pytest.raises(error, match=text):
        cross_entropy_from_probs(*arguments(), **kwargs)


def test_from_probs_under_compiled_autograd():
    y, t = torch.rand(6, 5).requires_grad_(), torch.rand(6, 5)
    (want,) = torch.autograd.grad(cross_entropy_from_probs(y, t), y)
    with torch._dynamo.compiled_autograd._enable(
            torch.compile(backend="aot_eager", fullgraph=True)):
        cross_entropy_from_probs(y, t).backward()
    torch.testing.assert_close(y.grad, want)


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu_and_is_deterministic(shape, dtype, deterministic):
    x, y, w = make(shape, dtype=torch.float32)
    t = make(shape, seed=1, dtype=torch.float32)[0]
    calls = (nll_loss, y), (cross_entropy_from_probs, y), (cross_entropy_from_probs, t)
    for _, z in layouts(x.to(dtype)):
        for f, target in calls:
            results = []
            for device in ("cpu", "cuda", "cuda"):
                leaf = z.detach().to(device).requires_grad_()
                loss = f(leaf, target.to(device), w.to(device))
                loss.backward()
                results.append((loss.detach().cpu(), leaf.grad.cpu()))
            assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
            torch.testing.assert_close(results[1], results[0])

"""The loss on a GPU: `pytest -m cuda`. Skipped, with a reason, where torch sees none.

Values come from the fp64 reference (on the CPU) and from native CUDA; the rest is what only a
device has: streams, graphs, synchronisation, device-side assertions, sizes beyond 2^31.
"""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from reference import (
    DTYPES,
    FEATURE_CASES,
    INDEX_CASES,
    LAYOUTS,
    REDUCTIONS,
    SMALL_CASES,
    SMALL_FEATURE_CASES,
    SOFT_CASES,
    Case,
    as_layout,
    assert_near,
    case_ids,
    reference,
    run,
    same_bits,
    to_rows,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import wce_torch

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
INF, NAN = math.inf, math.nan
ce = wce_torch.cross_entropy


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """With a GPU but no kernels every test here would time the composite instead."""
    if not wce_torch.build_info()["cuda"]:
        pytest.fail("this build has no CUDA kernels: build again with WCE_CUDA=1 and nvcc")


def check_case(case, dtype, layout="plain", seed=0, steps=16.0):
    """Loss and gradient on the device against the reference on the CPU."""
    x, target, options = case.build(DTYPES[dtype], seed=seed)
    grad = case.upstream(torch.float64 if dtype == "f64" else torch.float32, seed=seed)
    placed = as_layout(x.to(DEVICE), layout)
    there = as_layout(target.to(DEVICE), layout) if case.soft else target.to(DEVICE)
    move = lambda v: v.to(DEVICE) if isinstance(v, torch.Tensor) else v  # noqa: E731
    moved = {k: move(v) for k, v in options.items()}
    loss, dx, *_ = run(ce, placed, there, moved, grad.to(DEVICE), soft_grads=False)
    want = reference(x, target, **options, grad=grad.to(loss.dtype).cpu())
    words = f"{case.id} {dtype} {layout}"
    classes = x.shape[1] if x.dim() > 1 else x.shape[0]
    steps += math.sqrt(classes / 16)
    assert_near(loss.cpu(), want.loss, want.loss_scale, steps, words + " loss")
    assert_near(dx.cpu(), want.dx, want.dx_scale, steps, words + " gradient")


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid(dtype):
    for case in INDEX_CASES + SOFT_CASES + FEATURE_CASES:
        check_case(case, dtype)


BODIES = {
    "fast": {}, "weighted": {"weight": "positive"},
    "smooth": {"weight": "positive", "smoothing": 0.1}, "soft": {"soft": True},
    "everything": {"weight": "positive", "smoothing": 0.1, "prior": True, "sample_weight": True,
                   "mask": True},
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_leftovers(dtype, layout, body):
    """Every number of classes up to 70 and the border of every regime."""
    for classes in (*range(1, 71), 127, 129, 1000, 1025):
        check_case(Case((3, classes, 17), reduction="none", **BODIES[body]), dtype, layout)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_regimes(dtype, body):
    """Small, narrow, middle, long, few huge rows, channel-first; one and many blocks."""
    shapes = [(32, 10), (70000, 3), (5000, 19), (9000, 32), (4096, 100), (700, 1000), (64, 8193),
              (8, 50257), (1, 128256), (3, 131072), (4, 19, 128, 129), (2, 150, 32, 32),
              (16, 1000, 7, 7), (2, 5, 24, 24, 24)]
    for shape in shapes:
        check_case(Case(shape, reduction="mean", **BODIES[body]), dtype)


@pytest.mark.parametrize("case", SMALL_CASES + SMALL_FEATURE_CASES,
                         ids=case_ids(SMALL_CASES + SMALL_FEATURE_CASES))
@pytest.mark.parametrize("soft_dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_types_of_soft_targets(dtype, soft_dtype, case):
    if not case.soft:
        pytest.skip("index target")
    x, target, options = case.build(DTYPES[dtype])
    target = target.to(DTYPES[soft_dtype])
    want = reference(x, target, **options)
    move = lambda v: v.to(DEVICE) if isinstance(v, torch.Tensor) else v  # noqa: E731
    loss = ce(x.to(DEVICE), target.to(DEVICE), **{k: move(v) for k, v in options.items()})
    assert_near(loss.cpu(), want.loss, want.loss_scale, 16, case.id)


def test_special_values():
    """nan, infinities, rows of -inf alone and large offsets, in every layout; ignored rows."""
    for classes in (2, 19, 70, 2000):
        x = torch.linspace(-2, 2, classes, dtype=torch.float64).repeat(10, 1)
        x[1, 0], x[2, :], x[3, classes // 2], x[4, -1] = -INF, -INF, NAN, INF
        x[5] = x[5] * 10 + 3e4
        x[6, 1:] = -INF
        x[7, 1:], x[8, :] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
        x[9, :-1] = -INF
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            rows = x.to(dtype)
            target = torch.full((10,), classes - 1)
            for y in (target, torch.where(torch.arange(10) % 2 == 0, -100, target)):
                grad = torch.ones(10)
                want = reference(rows, y, reduction="none", grad=grad)
                for logits, there in ((rows, y), (rows.t().unsqueeze(0), y.unsqueeze(0)),
                                      (rows.t().contiguous().unsqueeze(0), y.unsqueeze(0))):
                    loss, dx, *_ = run(ce, logits.to(DEVICE), there.to(DEVICE),
                                       {"reduction": "none"}, grad.view(there.shape).to(DEVICE))
                    steps = 16 + math.sqrt(classes / 16)
                    assert_near(loss.cpu().reshape(10), want.loss, want.loss_scale, steps)
                    assert_near(to_rows(dx.cpu()), want.dx, want.dx_scale, steps)


@pytest.mark.parametrize("case", SMALL_CASES, ids=case_ids(SMALL_CASES))
def test_as_native(case):
    """Native CUDA in double gives the same loss and gradients, of soft targets and weights too."""
    x, target, options = case.build(torch.float64, DEVICE)
    grad = case.upstream(torch.float64, DEVICE)
    ours, theirs = (run(f, x, target, options, grad) for f in (ce, F.cross_entropy))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opinfo_samples(dtype):
    from torch.testing._internal.common_methods_invocations import op_db

    op = next(o for o in op_db if o.name == "nn.functional.cross_entropy")
    for s in op.sample_inputs(DEVICE, DTYPES[dtype], requires_grad=True):
        ours = ce(s.input, *s.args, **s.kwargs)
        wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in s.kwargs.items()}
        args = [a.double() if a.is_floating_point() else a for a in s.args]
        theirs = F.cross_entropy(s.input.double(), *args, **wide)
        # Signed weights make some means ill-conditioned: their relative error is not bounded.
        loose = {"f64": 1e-7, "f32": 1e-3, "bf16": 5e-2, "f16": 1e-2}[dtype]
        assert_close(ours.double(), theirs.double(), rtol=loose, atol=loose, equal_nan=True)


def test_module_inputs():
    from torch.testing._internal.common_modules import module_db

    info = next(m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)
    for m in info.module_inputs_func(info, device=DEVICE, dtype=torch.float64, requires_grad=False,
                                     training=True):
        loss = wce_torch.CrossEntropyLoss(*m.constructor_input.args, **m.constructor_input.kwargs)
        loss = loss.to(DEVICE)
        assert_close(loss(*m.forward_input.args), m.reference_fn(loss, *m.forward_input.args),
                     equal_nan=True)


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL_CASES + SMALL_FEATURE_CASES,
                         ids=case_ids(SMALL_CASES + SMALL_FEATURE_CASES))
def test_gradcheck(case):
    x, target, options = case.build(torch.float64, DEVICE)
    x.requires_grad_()
    f = lambda v: ce(v, target, **options)  # noqa: E731
    assert gradcheck(f, (x,), nondet_tol=0.0, check_batched_grad=True)
    assert gradgradcheck(f, (x,), nondet_tol=0.0)


@pytest.mark.parametrize("case", SMALL_CASES, ids=case_ids(SMALL_CASES))
def test_opcheck(case):
    x, target, o = case.build(torch.float32, DEVICE)
    args = (x, target, o.get("weight"), REDUCTIONS.index(case.reduction),
            o.get("ignore_index", -100), o["label_smoothing"])
    torch.library.opcheck(torch.ops.wce.forward.default, args)


def test_compile():
    """One graph for all sizes, the kernels in it, the same values as in eager mode."""
    compiled = torch.compile(ce, fullgraph=True, dynamic=True)
    w = torch.rand(40, device=DEVICE) + 0.5
    for n in (8, 16, 33):
        x = torch.randn(n, 40, device=DEVICE)
        y = torch.randint(40, (n,), device=DEVICE)
        a, b = (run(f, x, y, {"weight": w}) for f in (ce, compiled))
        assert same_bits(a[0], b[0]) and same_bits(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """fp32 loss, gradient in the logits' type, no copy of the logits."""
    x = torch.randn(4096, 1000, device=DEVICE).to(dtype).requires_grad_()
    y = torch.randint(1000, (4096,), device=DEVICE)
    w = torch.rand(1000, device=DEVICE) + 0.5
    with torch.autocast(DEVICE, dtype=dtype):
        ce(x, y, w)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = ce(x, y, w)
        used = torch.cuda.max_memory_allocated() - before
    assert loss.dtype == torch.float32 and used < x.numel() * 2 // 8
    loss.backward()
    want = reference(x.detach().cpu(), y.cpu(), w.cpu())
    assert x.grad.dtype == dtype
    assert_near(loss.detach().cpu(), want.loss, want.loss_scale, 24)
    assert_near(x.grad.cpu(), want.dx, want.dx_scale, 24)


# ---- determinism, streams, graphs ----------------------------------------------------------------

DEVICE_SHAPES = [(64, 10), (100000, 10), (4096, 1000), (2, 128256), (4, 19, 256, 256)]


def problem(shape, dtype=torch.float32, soft=False):
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=gen).to(dtype).to(DEVICE)
    positions = shape[:1] + shape[2:]
    y = (torch.softmax(torch.randn(shape, generator=gen), 1) if soft
         else torch.randint(shape[1], positions, generator=gen)).to(DEVICE)
    return x, y, {"weight": (torch.rand(shape[1], generator=gen) + 0.5).to(DEVICE)}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
def test_same_bits_in_every_run(shape, soft):
    """Also under deterministic algorithms, which fills fresh memory with nan first."""
    x, y, options = problem(shape, soft=soft)
    options["label_smoothing"] = 0.1
    first = run(ce, x, y, options, soft_grads=False)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            again = run(ce, x, y, options, soft_grads=False)
            assert same_bits(first[0], again[0]) and same_bits(first[1], again[1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
def test_no_synchronisation(shape):
    """Neither forward nor backward waits for the device, ignored rows and normalizer included."""
    x, y, options = problem(shape)
    x.requires_grad_()
    y.view(-1)[::3] = -100
    normalizer = torch.tensor(7.0, device=DEVICE)
    ce(x, y, **options).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ce(x, y, **options).backward()
        ce(x, y, **options, normalizer=normalizer).backward()
        ce(x, y, **options, reduction="sum", label_smoothing=0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_stream():
    """Work goes to the current stream: behind a long kernel there, it waits for its input."""
    x, y, options = problem((4096, 1000))
    want = run(ce, x, y, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = run(ce, late, y, options)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(want[0], got[0]) and same_bits(want[1], got[1])


@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
def test_cuda_graph(shape):
    """Forward and backward are captured once and replayed on other data."""
    x, y, options = problem(shape)
    static = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(ce(static, y, **options), static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ce(static, y, **options)
        (dx,) = torch.autograd.grad(loss, static)
    for factor in (1.0, -0.5):
        with torch.no_grad():
            static.copy_(x * factor)
        graph.replay()
        want = run(ce, x * factor, y, options)
        assert same_bits(loss.detach(), want[0]) and same_bits(dx, want[1])


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x, y, options = problem((128, 100))
    other = lambda v: v.to("cuda:1")  # noqa: E731
    a = run(ce, x, y, options)
    b = run(ce, other(x), other(y), {k: other(v) for k, v in options.items()})
    assert b[1].device.index == 1 and torch.cuda.current_device() == 0
    assert same_bits(a[1].cpu(), b[1].cpu())


def test_mixed_devices():
    with pytest.raises(RuntimeError, match="same device"):
        ce(torch.randn(3, 4, device=DEVICE), torch.tensor([0, 1, 2]))


# ---- size ----------------------------------------------------------------------------------------


def memory(gib):
    free = torch.cuda.mem_get_info()[0]
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free device memory")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(65536, 65537), (2**31 // 32 + 7, 33), (2**31 // 8 + 5, 9),
                                   (190, 50, 229000), (3, 2**30 + 9)], ids=str)
def test_more_than_2_31_elements(shape):
    """bf16 logits; the last rows (positions) equal the same ones alone."""
    count = math.prod(shape)
    # Logits, gradient; per row a target, m, L, losses of two types and their gradients.
    memory(math.ceil((count * 4 + count // shape[1] * 32) / 2**30) + 2)
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    x.view(-1)[: count // 2].normal_()
    x.view(-1)[count // 2:].normal_()
    x.requires_grad_()
    positions = shape[:1] + shape[2:]
    y = torch.randint(min(shape[1], 2**31 - 1), positions, device=DEVICE)
    loss = ce(x, y, reduction="none")
    (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    for part in (slice(0, 1), slice(shape[0] - 1, shape[0])):
        tail = (Ellipsis, slice(-64, None)) if len(shape) > 2 else (part,)
        piece = x.detach()[part][tail] if len(shape) > 2 else x.detach()[part]
        there = y[part][tail] if len(shape) > 2 else y[part]
        want, grad, *_ = run(ce, piece.contiguous(), there, {"reduction": "none"},
                             torch.ones(there.shape, device=DEVICE))
        got = dx[part][tail] if len(shape) > 2 else dx[part]
        assert_close(loss[part][tail] if len(shape) > 2 else loss[part], want)
        assert_close(got, grad, rtol=2e-2, atol=1e-6)


# ---- bad targets ---------------------------------------------------------------------------------


def run_script(text, **environment):
    code = textwrap.dedent(text)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=300)


@pytest.mark.parametrize("shape", ["(8, 5)", "(8, 100)", "(2, 40000)", "(2, 5, 3, 4)"])
@pytest.mark.parametrize("value", [5_000_000, -1, 2**40])
def test_device_assert(shape, value):
    """A bad target is printed with its row and the number of classes, then stops the device."""
    done = run_script(f"""
        import torch, wce_torch
        x = torch.randn{shape}.cuda()
        y = torch.zeros(x.shape[:1] + x.shape[2:], dtype=torch.long).cuda()
        y.view(-1)[1] = {value}
        try:
            wce_torch.cross_entropy(x, y).item()
        except RuntimeError as error:
            print("caught", error, flush=True)
        """)
    assert "caught" in done.stdout and "device-side assert" in done.stdout, done.stderr
    assert f"target {value} at row 1 is out of bounds for" in done.stdout + done.stderr


def test_checked_mode(monkeypatch):
    """WCE_CHECK_TARGETS=sync: an IndexError that names value and position; the next call works."""
    monkeypatch.setenv("WCE_CHECK_TARGETS", "sync")
    for shape in ((8, 5), (8, 100), (2, 40000), (2, 5, 3, 4)):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        positions = shape[:1] + shape[2:]
        y = torch.zeros(positions, dtype=torch.long, device=DEVICE)
        y.view(-1)[1] = 77777
        with pytest.raises(IndexError, match=r"Target 77777 is out of bounds\."):
            ce(x, y)
        y.view(-1)[1] = 2
        ce(x, y).backward()
        assert torch.isfinite(x.grad).all()


def test_no_read_beyond_the_tensors(monkeypatch):
    """Targets that would lead far away are refused without an illegal access."""
    monkeypatch.setenv("WCE_CHECK_TARGETS", "sync")
    for value in (-2**62, -1, 5, 2**31, 2**33, 2**62):
        with pytest.raises(IndexError):
            ce(torch.randn(4, 5, device=DEVICE), torch.full((4,), value, device=DEVICE))
    torch.cuda.synchronize()

"""Routing torch's own cross entropy through ours. Real client programs are tested elsewhere."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, segmentation_losses
from reference import assert_near, reference, run, same_bits
from torch.nn.functional import cross_entropy as early_alias
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import wce_torch

ORIGINAL = torch._C._nn.cross_entropy_loss
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
Y = torch.tensor([0, 1, 4, 2, 2, 3])


@pytest.fixture(autouse=True)
def _unpatched():
    """Every test starts and ends with torch as it was."""
    assert torch._C._nn.cross_entropy_loss is ORIGINAL
    torch._dynamo.reset()
    yield
    wce_torch.unpatch()
    assert torch._C._nn.cross_entropy_loss is ORIGINAL
    torch._dynamo.reset()


def is_ours(call):
    """Whether a call with logits reaches our operator: its graph says so."""
    x = X.clone().requires_grad_()
    return "CrossEntropy" in call(x).grad_fn.name()


CALLS = {
    "function": lambda x: F.cross_entropy(x, Y),
    "alias": lambda x: early_alias(x, Y),
    "module": lambda x: torch.nn.CrossEntropyLoss()(x, Y),
    "subclass": lambda x: segmentation_losses(torch.nn.CrossEntropyLoss)[0]()(x, Y),
    "our module": lambda x: wce_torch.CrossEntropyLoss()(x, Y),
    "smoothing": lambda x: F.cross_entropy(x, Y, label_smoothing=0.1),
    "soft": lambda x: F.cross_entropy(x, torch.softmax(X, 1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_way_in_is_reached(name):
    call, ours_anyway = CALLS[name], name == "our module"
    before = call(X)
    assert is_ours(call) == ours_anyway
    wce_torch.patch()
    assert is_ours(call)
    torch.testing.assert_close(call(X), before)
    wce_torch.unpatch()
    assert is_ours(call) == ours_anyway


def test_module_made_before():
    module = torch.nn.CrossEntropyLoss(torch.rand(5), ignore_index=2)
    want = module(X, Y)
    with wce_torch.patched():
        assert is_ours(lambda x: module(x, Y))
        torch.testing.assert_close(module(X, Y), want)


def test_idempotent():
    for _ in range(3):
        wce_torch.patch()
    assert is_ours(CALLS["function"])
    wce_torch.unpatch()
    assert not is_ours(CALLS["function"]) and torch._C._nn.cross_entropy_loss is ORIGINAL
    wce_torch.unpatch()
    assert torch._C._nn.cross_entropy_loss is ORIGINAL


def test_nesting():
    with wce_torch.patched():
        with wce_torch.patched():
            assert is_ours(CALLS["function"])
        assert is_ours(CALLS["function"])
    assert not is_ours(CALLS["function"])
    wce_torch.patch()
    with wce_torch.patched():
        pass
    assert is_ours(CALLS["function"])  # a block does not undo patch()
    with pytest.raises(ZeroDivisionError), wce_torch.patched():
        raise ZeroDivisionError
    assert is_ours(CALLS["function"])
    wce_torch.unpatch()
    with pytest.raises(ZeroDivisionError), wce_torch.patched():
        raise ZeroDivisionError
    assert not is_ours(CALLS["function"])


def test_threads_enter_and_leave():
    """Blocks of many threads overlap; at the end nothing is left behind."""
    wrong, start = [], threading.Barrier(8)

    def work():
        start.wait()
        for _ in range(50):
            with wce_torch.patched():
                if not is_ours(CALLS["function"]):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and torch._C._nn.cross_entropy_loss is ORIGINAL


def test_somebody_elses_replacement_survives():
    def theirs(*args, **kwargs):
        return ORIGINAL(*args, **kwargs)

    torch._C._nn.cross_entropy_loss = theirs
    try:
        wce_torch.patch()
        assert is_ours(CALLS["function"])
        wce_torch.unpatch()
        assert torch._C._nn.cross_entropy_loss is theirs
    finally:
        torch._C._nn.cross_entropy_loss = ORIGINAL


def test_raw_function_defaults():
    """The raw function without a reduction is 'none', and takes its arguments by position."""
    raw = torch._C._nn.cross_entropy_loss(X, Y)
    with wce_torch.patched():
        torch.testing.assert_close(torch._C._nn.cross_entropy_loss(X, Y), raw)
        got = torch._C._nn.cross_entropy_loss(X, Y, torch.ones(5), 2, 3, 0.1)
        got = got + torch._C._nn.cross_entropy_loss(input=X, target=Y, reduction=1)
    want = F.cross_entropy(X, Y, ignore_index=3, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(got, want + F.cross_entropy(X, Y))


def test_linear_cross_entropy_reaches_it():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no F.linear_cross_entropy")
    w = torch.randn(7, 5)
    want = F.linear_cross_entropy(X, w, Y)
    with wce_torch.patched():
        torch.testing.assert_close(F.linear_cross_entropy(X, w, Y), want)


# ---- what is not ours still works ----------------------------------------------------------------


def test_unsupported_cases_reach_the_original():
    class Sub(torch.Tensor):
        pass

    sub = X.as_subclass(Sub)
    sparse = torch.softmax(X, 1).to_sparse()
    calls = [lambda: F.cross_entropy(sub, Y), lambda: F.cross_entropy(X, sparse),
             lambda: F.cross_entropy(X, X.softmax(1), torch.ones(5, dtype=torch.long)),
             lambda: torch.func.grad(lambda x: F.cross_entropy(x, Y))(X),
             lambda: torch.vmap(F.cross_entropy)(X, Y),
             lambda: torch.func.jvp(lambda x: F.cross_entropy(x, Y), (X,), (X,))[1]]
    want = [call() for call in calls]
    with wce_torch.patched():
        got = [call() for call in calls]
    for mine, native in zip(got, want):
        torch.testing.assert_close(mine, native)
        assert type(mine) is type(native)


def test_errors_stay_torchs():
    bad = [lambda: F.cross_entropy(X.long(), Y), lambda: F.cross_entropy(X, Y[:3]),
           lambda: F.cross_entropy(X, Y + 9), lambda: F.cross_entropy(X, 3),
           lambda: F.cross_entropy(X, Y, torch.rand(4)),
           lambda: F.cross_entropy(X, Y, label_smoothing=2.0),
           lambda: F.cross_entropy(X, Y, ignore_index="x"),
           lambda: F.cross_entropy(X, Y, reduction="avg"),
           lambda: F.cross_entropy(X, Y, torch.rand(5, requires_grad=True))]
    for call in bad:
        with pytest.raises(Exception) as native:
            call()
        with wce_torch.patched(), pytest.raises(type(native.value)) as ours:
            call()
        assert type(ours.value) is type(native.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_while_patched():
    """Scripts and traces hold torch's own operator, so that they load anywhere."""

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, y) * 2

    with wce_torch.patched():
        scripted = torch.jit.script(loss)
        module = torch.jit.script(torch.nn.CrossEntropyLoss())
        traced = torch.jit.trace(loss, (X, Y))
    for program in (scripted, traced):
        torch.testing.assert_close(program(X, Y), 2 * F.cross_entropy(X, Y))
        text = str(program.inlined_graph)
        assert "wce::" not in text and "aten::" in text
    torch.testing.assert_close(module(X, Y), F.cross_entropy(X, Y))


# ---- torch's own material under the patch --------------------------------------------------------

OP = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
MODULE = next(m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16],
                         ids=str)
def test_op_info_samples_under_the_patch(dtype):
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=True):
        with wce_torch.patched():
            loss = OP(sample.input, *sample.args, **sample.kwargs)
            assert "CrossEntropy" in loss.grad_fn.name() or sample.args[0].requires_grad
            (dx,) = torch.autograd.grad(loss, sample.input, torch.ones_like(loss))
        want = reference(sample.input, sample.args[0], **sample.kwargs)
        assert_near(loss, want.loss, want.loss_scale)
        assert_near(dx, want.dx, want.dx_scale)


def test_op_info_derivatives_under_the_patch():
    with wce_torch.patched():
        for sample in list(OP.sample_inputs("cpu", torch.float64, requires_grad=True))[::3]:
            call = lambda x: OP(x, *sample.args, **sample.kwargs)  # noqa: B023, E731
            x = (sample.input.detach().requires_grad_(),)
            assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_module_info_inputs_under_the_patch(dtype):
    inputs = MODULE.module_inputs_func(MODULE, device="cpu", dtype=dtype, requires_grad=False,
                                       training=True)
    for m in inputs:
        module = torch.nn.CrossEntropyLoss(*m.constructor_input.args, **m.constructor_input.kwargs)
        x, target = m.forward_input.args
        with wce_torch.patched():
            got = module(x, target)
        want = reference(x, target, module.weight, ignore_index=module.ignore_index,
                         reduction=module.reduction, label_smoothing=module.label_smoothing)
        assert_near(got, want.loss, want.loss_scale)


@pytest.mark.skipif(MODULE.module_error_inputs_func is None, reason="torch 2.11 ships none")
def test_module_info_error_inputs_under_the_patch():
    for err in MODULE.module_error_inputs_func(MODULE, device="cpu", dtype=torch.float32,
                                               requires_grad=False, training=True):
        m = err.module_error_input
        module = torch.nn.CrossEntropyLoss(*m.constructor_input.args, **m.constructor_input.kwargs)
        with wce_torch.patched(), pytest.raises(err.error_type, match=err.error_regex):
            module(*m.forward_input.args, **m.forward_input.kwargs)


# ---- compilation ---------------------------------------------------------------------------------


def recorded(patch):
    """Names of the operators in the forward graph of F.cross_entropy, compiled under the patch."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    recorder = AotEagerAndRecordGraphs()
    step = torch.compile(lambda x, y: F.cross_entropy(x * 1.5, y), backend=recorder, fullgraph=True)
    x = X.clone().requires_grad_()
    if patch:
        with wce_torch.patched():
            loss = step(x, Y)
    else:
        loss = step(x, Y)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(X * 1.5, Y))
    torch.testing.assert_close(x.grad, 1.5 * reference(X * 1.5, Y).dx.float())
    return [str(n.target) for n in recorder.fw_graphs[0].graph.nodes]


@pytest.mark.parametrize("order", [(False, True), (True, False)],
                         ids=["native first", "ours first"])
def test_compiled_while_patched(order):
    """The graph holds our operator exactly when it was compiled while patched, whatever a cache
    knows from before."""
    for patch in order:
        torch._dynamo.reset()
        names = recorded(patch)
        assert any("wce" in name for name in names) == patch, names


COMPILE = """
import sys, torch, torch.nn.functional as F, wce_torch
if sys.argv[1] == "patch":
    wce_torch.patch()
step = torch.compile(lambda x, y: F.cross_entropy(x, y), fullgraph=True)
x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
with torch.profiler.profile() as profile:
    value = step(x, torch.tensor([0, 1, 4, 2, 2, 3]))
print(float(value), any("wce" in event.name for event in profile.events()))
"""


def test_compile_cache_on_disk(tmp_path):
    """Processes share a cache directory: what one compiled unpatched is never replayed patched,
    and the reverse."""
    values = []
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for mode in ("native", "patch", "native"):
        result = subprocess.run([sys.executable, "-c", COMPILE, mode], capture_output=True,
                                text=True, env=env, cwd=ROOT, timeout=300)
        assert result.returncode == 0, result.stderr
        value, ours = result.stdout.split()[-2:]
        values.append(float(value))
        assert ours == str(mode == "patch"), mode
    assert max(values) - min(values) < 1e-6
    assert any(tmp_path.iterdir())  # there was a cache


def test_cache_key_tag_comes_and_goes():
    config = torch.compiler.config
    before = config.cache_key_tag
    config.cache_key_tag = "mine"
    try:
        with wce_torch.patched():
            tagged = config.cache_key_tag
            with wce_torch.patched():
                assert config.cache_key_tag == tagged
            assert tagged != "mine" and "mine" in tagged
        assert config.cache_key_tag == "mine"
    finally:
        config.cache_key_tag = before


def test_training_curve_is_the_same():
    """Twenty steps of a small network, native and patched, from the same seed."""

    def curve():
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.CrossEntropyLoss(torch.arange(1.0, 6.0), label_smoothing=0.05)(
                model(X), Y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    native = curve()
    with wce_torch.patched():
        ours = curve()
    assert native[-1] < native[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(native), rtol=1e-4, atol=1e-5)


def test_bits_are_those_of_the_direct_call():
    w = torch.rand(5)
    direct = run(wce_torch.cross_entropy, X, Y, {"weight": w})
    with wce_torch.patched():
        patched = run(F.cross_entropy, X, Y, {"weight": w})
    assert same_bits(direct[0], patched[0]) and same_bits(direct[1], patched[1])

"""Where torch would lose something without a word: numbers that carry gradients, scripts and
traces, autocast under transforms, compiled autograd, threads and forks under the patch."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import wce_torch
from wce_torch import patching

ce = wce_torch.cross_entropy
stats_of, mixup = wce_torch.cross_entropy_with_stats, wce_torch.mixup_cross_entropy
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
Y = torch.tensor([0, 1, 4, 2, 2, 3])
W = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])


# ---- numbers -------------------------------------------------------------------------------------

NUMBERS = {
    "label_smoothing": lambda v: ce(X, Y, label_smoothing=v),
    "label_smoothing with options": lambda v: ce(X, Y, label_smoothing=v, empty="zero"),
    "tau": lambda v: ce(X, Y, class_prior=W, tau=v),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_carries_a_gradient_is_refused(name):
    """As torch refuses it; a tangent and a gradient of torch.func would be lost as silently."""
    call, value = NUMBERS[name], torch.tensor(0.1)
    torch.testing.assert_close(call(value), call(0.1))
    attempts = [
        lambda: call(value.clone().requires_grad_()),
        lambda: torch.func.grad(call)(value),
        lambda: torch.func.jvp(call, (value,), (value,)),
        lambda: call(torch.tensor([0.1])),
    ]
    for attempt in attempts:
        with pytest.raises(TypeError, match=rf"{name.split()[0]}.* must be float, not Tensor"):
            attempt()


def test_a_new_normalizer_needs_no_new_graph():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    step = torch.compile(lambda x, n: ce(x, Y, W, normalizer=n), backend=counter, fullgraph=True)
    for n in range(1, 15):
        torch.testing.assert_close(step(X, n / 7), ce(X, Y, W, normalizer=n / 7))
    assert counter.frame_count <= 2


def test_class_weight_sum_names_a_wrong_weight():
    with pytest.raises(TypeError, match="argument 'weight' must be Tensor, not list"):
        wce_torch.class_weight_sum(Y, [1.0] * 5)
    with pytest.raises(ValueError, match="weight: expected one real factor"):
        wce_torch.class_weight_sum(Y, W + 1j)


def test_smoothing_over_no_classes():
    with pytest.raises(RuntimeError, match="input: expected at least one class"):
        stats_of(X[:, :0], Y, label_smoothing=0.1)
    with pytest.raises(IndexError, match=r"out of bounds\..*there are no classes"):
        mixup(X[:, :0], Y, Y, 0.3, label_smoothing=0.1)


# ---- scripts and traces --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_never_drops_an_option():
    for options in ({"class_prior": W}, {"empty": "zero"}):
        for module in (wce_torch.CrossEntropyLoss(**options),
                       torch.nn.Sequential(wce_torch.CrossEntropyLoss(**options))):
            with pytest.raises(RuntimeError, match="cannot be scripted"):
                torch.jit.script(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_of_the_function():
    def loss(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ce(x, y, w, reduction="sum", label_smoothing=0.1) * 2

    script = torch.jit.script(loss)
    torch.testing.assert_close(script(X, Y, W), loss(X, Y, W))
    assert "wce::" not in str(script.inlined_graph)


TRACED = {
    "prior": lambda x, y: ce(x, y, class_prior=W),
    "mask": lambda x, y: ce(x, y, mask=y > 1),
    "normalizer": lambda x, y: ce(x, y, W, normalizer=3.5),
    "stats": lambda x, y: stats_of(x, y, W).loss,
    "mixup": lambda x, y: mixup(x, y, y.flip(0), 0.3, W),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TRACED)
def test_traces_hold_torchs_operators_alone(name):
    """So that they load where this package is not installed, and ONNX exporters read them."""
    call = TRACED[name]
    traced = torch.jit.trace(call, (X, Y))
    assert "wce::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X * 2, Y), call(X * 2, Y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_follows_a_prior_that_is_an_input():
    traced = torch.jit.trace(lambda x, q: ce(x, Y, class_prior=q), (X, W))
    torch.testing.assert_close(traced(X, W.flip(0)), ce(X, Y, class_prior=W.flip(0)))


# ---- autocast, transforms, meta ------------------------------------------------------------------


class Sub(torch.Tensor):
    pass


UNDER_AUTOCAST = {
    "vjp": lambda x: torch.func.vjp(lambda x: ce(x, Y), x)[0],
    "vmap": lambda x: torch.vmap(ce)(x.reshape(2, 3, 5), Y.reshape(2, 3)),
    "jvp": lambda x: torch.func.jvp(lambda x: ce(x, Y), (x,), (x,))[0],
    "options": lambda x: torch.func.vjp(lambda x: ce(x, Y, class_prior=W), x)[0],
    "subclass": lambda x: ce(x.as_subclass(Sub), Y, class_prior=W),
    "subclass, mixup": lambda x: mixup(x.as_subclass(Sub), Y, Y.flip(0), 0.3),
}


@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_autocast_reaches_every_path(name):
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert UNDER_AUTOCAST[name](x).dtype == torch.float32
        assert UNDER_AUTOCAST[name](x.double()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert UNDER_AUTOCAST[name](x).dtype == torch.bfloat16


class Recorder(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


OPERATORS = {
    "cross_entropy": lambda: ce(X, Y, W, empty="zero"),
    "rows_forward": lambda: stats_of(X, Y, W),
    "cross_entropy of mixup": lambda: mixup(X, Y, Y.flip(0), 0.3),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_modes_of_torch_function_see_the_operator(name):
    with Recorder() as mode:
        OPERATORS[name]()
    assert name.split()[0] in mode.seen


@pytest.mark.parametrize("option", ["sample_weight", "normalizer"])
def test_subclass_as_an_option_decides_on_the_result(option):
    value = (torch.rand(6) if option == "sample_weight" else torch.tensor(3.0)).as_subclass(Sub)
    assert type(ce(X, Y, **{option: value})) is Sub


def test_functional_tensors_have_no_values_to_read():
    x, q = torch._to_functional_tensor(X), torch._to_functional_tensor(W)
    torch._enable_functionalization(reapply_views=True)
    try:
        loss = torch._from_functional_tensor(ce(x, Y, class_prior=q))
    finally:
        torch._disable_functionalization()
    torch.testing.assert_close(loss, ce(X, Y, class_prior=W))


def test_meta_tensors_know_no_autocast():
    x, y = X.to("meta"), Y.to("meta")
    assert stats_of(x, y).loss.is_meta and mixup(x, y, y, 0.3).is_meta
    assert torch.vmap(ce)(x.reshape(2, 3, 5), y.reshape(2, 3)).shape == (2,)


# ---- compiling -----------------------------------------------------------------------------------


def all_statistics(x):
    found = stats_of(x, Y, W)
    return found.loss + found.lse.sum() + found.log_prob.sum()


@pytest.mark.parametrize("call", [all_statistics, lambda x: mixup(x, Y, Y.flip(0), 0.3, W)],
                         ids=["stats", "mixup"])
def test_compiled_autograd_of_rows(call):
    one, two = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(
            torch.compile(backend="aot_eager", fullgraph=True)):
        call(one).backward()
    call(two).backward()
    torch.testing.assert_close(one.grad, two.grad)


def test_results_without_gradients():
    found = stats_of(X.clone().requires_grad_(), Y)
    assert found.loss.requires_grad and found.lse.requires_grad and found.log_prob.requires_grad
    assert not found.entropy.requires_grad and not found.correct.requires_grad


class Model(torch.nn.Module):
    def forward(self, x, y):
        return ce(x, y)


def test_export_for_any_number_of_classes():
    """From 40 classes on statistics of each row are kept; that is no reason for another graph."""
    batch, classes = Dim("batch", min=2, max=100), Dim("classes", min=2, max=100)
    program = export(Model(), (X, Y), dynamic_shapes=({0: batch, 1: classes}, {0: batch}))
    for c in (5, 39, 40, 90):
        x, y = torch.randn(7, c), torch.randint(c, (7,))
        torch.testing.assert_close(program.module()(x, y), ce(x, y))


def test_make_fx_before_dispatch():
    """Values of priors and targets are not looked at in a trace of any kind."""
    def step(x, y, w):
        return ce(x, y, w, class_prior=w, normalizer=wce_torch.class_weight_sum(y, w))

    graph = make_fx(step, pre_dispatch=True)(X, Y, W)
    torch.testing.assert_close(graph(X * 2, Y, W), step(X * 2, Y, W))


# ---- the patch, threads and forks ----------------------------------------------------------------


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_cache_key_tag_holds_for_all_threads():
    """An assignment to the setting would hold for the thread that made it."""
    def tag():
        return torch.compiler.config.cache_key_tag

    before = tag()
    with wce_torch.patched():
        assert tag() != before and in_thread(tag) == tag()
    block = wce_torch.patched()
    in_thread(block.__enter__)
    assert tag() != before
    block.__exit__(None, None, None)
    assert tag() == before and in_thread(tag) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_another_thread_patches():
    """The child finds the lock free."""
    held = threading.Event()

    def hold():
        with patching._lock:
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        wce_torch.patch()
        os._exit(0)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_subclass_under_the_patch_is_explained():
    """Subclasses go to torch's operators also under the patch, and explain() says so."""
    with wce_torch.patched():
        said = wce_torch.explain(X.as_subclass(Sub), Y)
        got = F.cross_entropy(X.as_subclass(Sub), Y)
    assert said.path == "native" and "Sub" in said.reason
    assert type(got) is Sub

"""Which way a call takes: fused kernels, the composite definition, or torch's own loss."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import run_python
from reference import DTYPES

import wce_torch

ce, explain = wce_torch.cross_entropy, wce_torch.explain
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
Y = torch.tensor([0, 1, 4, 2, 2, 3])
W = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])


class Sub(torch.Tensor):
    pass


FUSED = {
    "plain": (X, Y), "weight": (X, Y, W), "float64 weight": (X, Y, W.double()),
    "int32 target": (X, Y.int()), "gradient": (X.clone().requires_grad_(), Y),
    "soft": (X, X.softmax(1)), "one dimension": (X[0], Y[0]), "no rows": (X[:0], Y[:0]),
    "image": (X.reshape(1, 5, 2, 3), Y.reshape(1, 2, 3)), "strided": (X[:, ::2], Y % 3),
    "parameter": (torch.nn.Parameter(X), Y), "buffer": (X, Y, torch.nn.Buffer(W)),
    **{name: (X.to(dtype), Y) for name, dtype in DTYPES.items()},
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name, monkeypatch):
    path, reason = explain(*FUSED[name])
    assert path == "fused" and reason
    monkeypatch.setenv("WCE_STRICT", "1")
    ce(*FUSED[name])


@pytest.mark.parametrize("options", [
    {"label_smoothing": 0.1}, {"reduction": "none"}, {"ignore_index": 3}, {"class_prior": W},
    {"sample_weight": torch.rand(6)}, {"mask": Y > 1}, {"normalizer": 2.0}, {"empty": "zero"},
], ids=lambda o: next(iter(o)))
def test_options_are_fused(options, monkeypatch):
    x = X.clone().requires_grad_()
    assert explain(x, Y, **options).path == "fused"
    monkeypatch.setenv("WCE_STRICT", "1")
    ce(x, Y, **options).sum().backward()


NOT_FUSED = {
    "subclass of the logits": ((X.as_subclass(Sub), Y), {}, "native"),
    "subclass of the target": ((X, Y.as_subclass(Sub)), {}, "native"),
    "subclass of the weight": ((X, Y, W.as_subclass(Sub)), {}, "native"),
    "sparse soft target": ((X, X.softmax(1).to_sparse()), {}, "native"),
    "gradient of a soft target": ((X, X.softmax(1).requires_grad_()), {}, "composite"),
    "gradient of a weight": ((X, X.softmax(1), W.clone().requires_grad_()), {}, "composite"),
    "gradient of a sample weight": ((X, Y), {"sample_weight": torch.rand(6, requires_grad=True)},
                                    "composite"),
    "float64 soft target": ((X, X.softmax(1).double()), {}, "composite"),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_not_fused(name, monkeypatch):
    args, options, path = NOT_FUSED[name]
    said = explain(*args, **options)
    assert said.path == path and said.reason
    assert path in str(said)
    value = ce(*args, **options)
    if not options:
        torch.testing.assert_close(value, F.cross_entropy(*args))
    monkeypatch.setenv("WCE_STRICT", "1")
    with pytest.raises(RuntimeError, match="WCE_STRICT"):
        ce(*args, **options)
    monkeypatch.setenv("WCE_STRICT", "0")
    torch.testing.assert_close(ce(*args, **options), value)


def test_explain_takes_all_arguments_and_checks_them():
    import inspect

    assert str(inspect.signature(explain)).split(" ->")[0] == str(
        inspect.signature(ce)).split(" ->")[0]
    with pytest.raises(ValueError, match="avg is not a valid value"):
        explain(X, Y, reduction="avg")
    assert explain(X, Y, W, None, 3, None, "sum", 0.1).path == "fused"


def test_transforms_and_duals_are_explained():
    seen = []

    def loss(x):
        seen.append(explain(x, Y).path)
        return ce(x, Y)

    torch.func.grad(loss)(X)
    torch.vmap(lambda x, y: (seen.append(explain(x, y).path), ce(x, y))[1])(X, Y)
    with torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(X, X))
    assert seen == ["composite"] * 3


def test_traces_under_autocast_are_explained():
    said = []

    def loss(x):
        said.append(explain(x, Y).path)
        return ce(x, Y)

    plain = torch.jit.trace(loss, (X,), check_trace=False)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = torch.jit.trace(loss, (X,), check_trace=False)
    held = ["cross_entropy_loss" in str(trace.inlined_graph) for trace in (plain, mixed)]
    assert said == ["native", "composite"] and held == [True, False]


def test_strict_mode_names_transforms(monkeypatch):
    monkeypatch.setenv("WCE_STRICT", "1")
    with pytest.raises(RuntimeError, match="WCE_STRICT.*torch.func"):
        torch.func.grad(lambda x: ce(x, Y))(X)
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(ce(x, Y), x)  # one derivative is fused
    with pytest.raises(RuntimeError, match="WCE_STRICT"):
        torch.autograd.grad(ce(x, Y), x, create_graph=True)


def test_strict_mode_from_the_environment():
    result = run_python("""
        import torch, wce_torch
        x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
        wce_torch.cross_entropy(x, y)
        try:
            torch.func.grad(lambda x: wce_torch.cross_entropy(x, y))(x)
        except RuntimeError as error:
            print("raised", "WCE_STRICT" in str(error))
    """, WCE_STRICT="1")
    assert result.stdout.split() == ["raised", "True"], result.stderr


# ---- the cases of the contract, each against torch -----------------------------------------------


def test_subclass_keeps_its_type():
    got = ce(X.as_subclass(Sub), Y, W)
    assert type(got) is Sub
    torch.testing.assert_close(got.as_subclass(torch.Tensor), F.cross_entropy(X, Y, W))


with_stats, mixup = wce_torch.cross_entropy_with_stats, wce_torch.mixup_cross_entropy
S = torch.ones(6)
OUT_OF_RANGE = Y.clone()
OUT_OF_RANGE[2] = 9
NOT_CLASS_4 = [1.0, 1.0, 1.0, 1.0, 0.0]
REFUSED = {  # function, arguments after the logits, options
    "weight": (ce, (Y, torch.ones(7)), {"sample_weight": S}),
    "weight, soft": (ce, (X.softmax(1), torch.ones(7)), {"sample_weight": S}),
    "gradient of the weight": (ce, (Y, W.clone().requires_grad_()), {"sample_weight": S}),
    "target type": (ce, (Y.float(),), {"sample_weight": S}),
    "target shape": (ce, (Y.view(2, 3),), {"sample_weight": S}),
    "target": (ce, (OUT_OF_RANGE,), {"sample_weight": S}),
    "target without prior": (ce, (Y,), {"class_prior": NOT_CLASS_4}),
    "sample_weight": (ce, (Y,), {"sample_weight": torch.ones(2, 2)}),
    "mask": (ce, (Y,), {"mask": S}),
    "smoothing": (ce, (Y,), {"label_smoothing": 2.0, "sample_weight": S}),
    "ignore_index": (ce, (X.softmax(1),), {"ignore_index": 1, "sample_weight": S}),
    "stats, weight": (with_stats, (Y, torch.ones(7)), {}),
    "stats, target": (with_stats, (OUT_OF_RANGE,), {}),
    "stats, target without prior": (with_stats, (Y,), {"class_prior": NOT_CLASS_4}),
    "mixup, weight": (mixup, (Y, Y, 0.3, torch.ones(7)), {}),
    "mixup, second target": (mixup, (Y, OUT_OF_RANGE, 0.3), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_composite_refuses_what_the_kernels_refuse(name):
    """Tensor subclasses and transforms of torch.func, with the error of a plain call."""
    function, args, options = REFUSED[name]
    with pytest.raises(Exception) as plain:
        function(X, *args, **options)
    calls = {"subclass": lambda: function(X.as_subclass(Sub), *args, **options)}
    if name != "gradient of the weight":  # torch.func.grad detaches it
        calls["torch.func"] = lambda: torch.func.vjp(lambda x: function(x, *args, **options), X)
    for call in calls.values():
        with pytest.raises(plain.type) as other:
            call()
        assert str(other.value) == str(plain.value)


def test_composite_of_stats_checks_targets():
    s = S.clone().requires_grad_()
    with pytest.raises(IndexError, match=r"Target 9 is out of bounds. \(position \[2\]"):
        with_stats(X, OUT_OF_RANGE, sample_weight=s)
    with pytest.raises(ValueError, match="Target 4 .* is a class whose class_prior is 0"):
        with_stats(X, Y, sample_weight=s, class_prior=NOT_CLASS_4)


@pytest.mark.parametrize("function, args, options, name", [
    (ce, (Y,), {"sample_weight": S.to_sparse()}, "sample_weight"),
    (ce, (Y,), {"mask": (S > 0).to_sparse()}, "mask"),
    (with_stats, (X.softmax(1).to_sparse(),), {}, "target"),
    (with_stats, (Y, W.to_sparse()), {}, "weight"),
    (with_stats, (Y,), {"sample_weight": S.to_sparse()}, "sample_weight"),
])
def test_sparse_arguments_are_named(function, args, options, name):
    with pytest.raises(RuntimeError, match=f"^{name}: expected a dense tensor, got layout Sparse"):
        function(X, *args, **options)


def test_subclass_with_torch_function_table():
    """A subclass whose table is keyed by torch's function meets that function."""

    class Table(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is F.cross_entropy:
                return "from the table"
            return super().__torch_function__(func, types, args, kwargs or {})

    assert ce(X.as_subclass(Table), Y) == "from the table"
    assert wce_torch.CrossEntropyLoss()(X.as_subclass(Table), Y) == "from the table"


def test_dtensor():
    """Distributed tensors go to torch's operators, which know how to shard."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(X, mesh, [Replicate()]).requires_grad_()
        y = distribute_tensor(Y, mesh, [Replicate()])
        loss = ce(x, y)
        loss.backward()
        torch.testing.assert_close(loss.to_local(), F.cross_entropy(X, Y))
        assert x.grad is not None
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript():
    """Traces and scripts hold torch's operator: they load where this package is not installed."""
    traced = torch.jit.trace(lambda x, y: ce(x, y), (X, Y))
    assert "wce::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X, Y), F.cross_entropy(X, Y))
    module = torch.jit.script(wce_torch.CrossEntropyLoss(W, label_smoothing=0.1))
    torch.testing.assert_close(module(X, Y), F.cross_entropy(X, Y, W, label_smoothing=0.1))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(X, Y), F.cross_entropy(X, Y))


def test_complex_and_integer_weights():
    q = X.softmax(1)
    for w in (torch.arange(5), torch.arange(5) > 2):
        torch.testing.assert_close(ce(X, q, w), F.cross_entropy(X, q, w))
    w = torch.ones(5) + 1j
    torch.testing.assert_close(ce(X, q, w), F.cross_entropy(X, q, w))


def test_lazy_negation_and_conjugation():
    lazy = torch._neg_view(X)
    assert lazy.is_neg()
    torch.testing.assert_close(ce(lazy, Y, torch._neg_view(-W)), F.cross_entropy(-X, Y, W))
    leaf = X.clone().requires_grad_()
    ce(torch._neg_view(leaf), Y).backward()
    want = X.clone().requires_grad_()
    F.cross_entropy(-want, Y).backward()
    torch.testing.assert_close(leaf.grad, want.grad)


def test_nested_tensor_raises_like_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(3), torch.randn(4)])
    with pytest.raises(Exception) as native:  # noqa: B017
        F.cross_entropy(nested, Y)
    with pytest.raises(type(native.value)):
        ce(nested, Y)


def test_build_info():
    info = wce_torch.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["version"] == wce_torch.__version__ and isinstance(info["cuda"], bool)

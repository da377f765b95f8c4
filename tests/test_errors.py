"""Bad input: type and text of torch's own errors, nothing written, and the next call works.

The texts are regular expressions; each row is run against torch's loss too, unless a remark says
that the two differ on purpose.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import DTYPES, REDUCTIONS, Case, assert_near, reference
from torch._subclasses.fake_tensor import FakeTensorMode

import wce_torch

ce = wce_torch.cross_entropy


def logits(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def classes(*shape, n=5):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(6))


BATCH = r"Expected input batch_size \({}\) to match target batch_size \({}\)\."
WEIGHT = (r"weight tensor should be defined either for all 5 classes or no classes but got weight "
          r"tensor of shape: \[4\]")
X25 = logits(4, 5)

# name: (error, text, call). call takes the loss function.
ERRORS = {
    # soft targets
    "integer_soft": (RuntimeError, "Expected floating point type for target with class "
                     "probabilities, got Long", lambda f: f(X25, classes(4, 5))),
    "bool_soft": (RuntimeError, "Expected floating point type for target with class probabilities, "
                  "got Bool", lambda f: f(X25, X25 > 0)),
    "complex_soft": (RuntimeError, "Expected floating point type for target with class "
                     "probabilities, got ComplexFloat", lambda f: f(X25, X25 + 0j)),
    "integer_soft_1d": (RuntimeError, "Expected floating point type for target",
                        lambda f: f(logits(5), classes(5))),
    "integer_soft_one": (RuntimeError, "Expected floating point type for target",
                         lambda f: f(logits(1), classes(1, n=1))),
    "integer_soft_scalar": (RuntimeError, "Expected floating point type for target",
                            lambda f: f(logits(), torch.tensor(0))),
    "soft_ignore_0": (RuntimeError, "ignore_index is not supported for floating point target",
                      lambda f: f(X25, X25.softmax(1), ignore_index=0)),
    "soft_ignore_255": (RuntimeError, "ignore_index is not supported for floating point target",
                        lambda f: f(X25, X25.softmax(1), ignore_index=255)),
    "soft_weight_size": (RuntimeError, "cross_entropy: " + WEIGHT,
                         lambda f: f(X25, X25.softmax(1), torch.rand(4))),
    "soft_weight_rank": (RuntimeError, r"but got weight tensor of shape: \[1, 5\]",
                         lambda f: f(X25, X25.softmax(1), torch.rand(1, 5))),
    # smoothing
    "smoothing_index": (RuntimeError, r"label_smoothing must be between 0\.0 and 1\.0\. Got: 1\.5",
                        lambda f: f(X25, classes(4), label_smoothing=1.5)),
    "smoothing_inf": (RuntimeError, r"label_smoothing must be between 0\.0 and 1\.0",
                      lambda f: f(X25, classes(4), label_smoothing=math.inf)),
    "smoothing_soft": (RuntimeError, r"label_smoothing must be between 0\.0 and 1\.0\. Got: 1\.2",
                       lambda f: f(X25, X25.softmax(1), label_smoothing=1.2)),
    "smoothing_before_shape": (RuntimeError, r"label_smoothing must be between 0\.0 and 1\.0",
                               lambda f: f(X25, classes(3), label_smoothing=1.2)),
    # shapes
    "batch": (ValueError, BATCH.format(4, 3), lambda f: f(X25, classes(3))),
    "batch_empty": (ValueError, BATCH.format(4, 0), lambda f: f(X25, classes(0))),
    "batch_soft_one": (ValueError, BATCH.format(4, 1), lambda f: f(X25, X25[:1].softmax(1))),
    "batch_scalar": (ValueError, BATCH.format(4, 0), lambda f: f(X25, torch.tensor(0))),
    "batch_scalar_3d": (ValueError, BATCH.format(2, 0),
                        lambda f: f(logits(2, 5, 3), torch.tensor(0))),
    "batch_3d": (ValueError, BATCH.format(2, 3), lambda f: f(logits(2, 5, 3), classes(3, 3))),
    "batch_4d": (ValueError, BATCH.format(2, 3), lambda f: f(logits(2, 5, 3, 3), classes(3, 3, 3))),
    "one_dim": (ValueError, "For 1D input, 1D target must have size 1, but got target size: 3",
                lambda f: f(logits(5), classes(3))),
    "multi_target": (RuntimeError, "0D or 1D target tensor expected, multi-target not supported",
                     lambda f: f(X25, classes(4, 2))),
    "multi_target_one": (RuntimeError, "0D or 1D target tensor expected, multi-target not "
                         "supported", lambda f: f(X25, classes(4, 1))),
    "multi_target_1d": (RuntimeError, "0D or 1D target tensor expected, multi-target not supported",
                        lambda f: f(logits(5), classes(1, 1))),
    "size_3d": (RuntimeError, r"Expected target size \[2, 5\], got \[2, 4\]",
                lambda f: f(logits(2, 7, 5), classes(2, 4))),
    "rank_3d": (RuntimeError, r"Expected target size \[2, 5\], got \[2\]",
                lambda f: f(logits(2, 7, 5), classes(2))),
    "size_5d": (RuntimeError, r"Expected target size \[2, 2, 2, 3\], got \[2, 2, 3, 2\]",
                lambda f: f(logits(2, 7, 2, 2, 3), classes(2, 2, 3, 2))),
    "size_4d": (RuntimeError, r"size mismatch \(got input: \[2, 3, 5, 5\] , target: \[2, 4, 5\]",
                lambda f: f(logits(2, 3, 5, 5), classes(2, 4, 5, n=3))),
    "rank_4d": (RuntimeError, r"only batches of spatial targets supported \(3D tensors\) but got "
                "targets of", lambda f: f(logits(2, 3, 5, 5), classes(2, 5, n=3))),
    "rank_4d_more": (RuntimeError, r"only batches of spatial targets supported \(3D tensors\) but "
                     "got targets of", lambda f: f(logits(2, 3, 5, 5), classes(2, 1, 5, 5, n=3))),
    "scalar_logits": (IndexError, "Dimension (out of range|specified as 1)",
                      lambda f: f(logits(), torch.rand(2))),
    # weight
    "weight_size": (RuntimeError, WEIGHT, lambda f: f(X25, classes(4), torch.rand(4))),
    "weight_size_1d": (RuntimeError, WEIGHT,
                       lambda f: f(logits(5), torch.tensor(1), torch.rand(4))),
    "weight_rank": (RuntimeError, r"but got weight tensor of shape: \[1, 5\]",
                    lambda f: f(X25, classes(4), torch.rand(1, 5))),
    "weight_scalar": (RuntimeError, "weight tensor should be defined either for all 5 classes",
                      lambda f: f(X25, classes(4), torch.tensor(1.0))),
    "weight_size_3d": (RuntimeError, "weight tensor should be defined either for all or no classes",
                       lambda f: f(logits(2, 5, 3), classes(2, 3), torch.rand(4))),
    "weight_size_4d": (RuntimeError, "weight tensor should be defined either for all or no classes",
                       lambda f: f(logits(2, 5, 3, 3), classes(2, 3, 3), torch.rand(6))),
    "weight_long": (RuntimeError, "expected scalar type Float but found Long",
                    lambda f: f(X25, classes(4), torch.ones(5, dtype=torch.long))),
    "weight_bool": (RuntimeError, "expected scalar type Float but found Bool",
                    lambda f: f(X25, classes(4), torch.ones(5, dtype=torch.bool))),
    "weight_complex": (RuntimeError, "expected scalar type Float but found ComplexFloat",
                       lambda f: f(X25, classes(4), torch.ones(5, dtype=torch.complex64))),
    "weight_gradient": (RuntimeError, "not differentiable with respect to argument 'weight'",
                        lambda f: f(X25, classes(4), torch.rand(5, requires_grad=True))),
    "weight_gradient_both": (RuntimeError, "not differentiable with respect to argument 'weight'",
                             lambda f: f(X25.clone().requires_grad_(), classes(4),
                                         torch.rand(5, requires_grad=True))),
    "weight_gradient_smoothing": (
        RuntimeError, "not differentiable with respect to argument 'weight'",
        lambda f: f(X25, classes(4), torch.rand(5, requires_grad=True), label_smoothing=0.1)),
    # target types
    **{f"target_{name}": (RuntimeError, "(scalar type|target dtype).*Long",
                          lambda f, t=t: f(X25, torch.ones(4).to(t)))
       for name, t in {"int8": torch.int8, "bool": torch.bool, "uint16": torch.uint16,
                       "uint32": torch.uint32, "uint64": torch.uint64, "float": torch.float32,
                       "complex": torch.complex64}.items()},
    **{f"target_{name}_4d": (RuntimeError, "(scalar type|target dtype).*Long",
                             lambda f, t=t: f(logits(2, 5, 3, 3), torch.ones(2, 3, 3).to(t)))
       for name, t in {"int8": torch.int8, "bool": torch.bool, "float": torch.float32}.items()},
    # target values
    "target_large": (IndexError, r"Target 7 is out of bounds\.",
                     lambda f: f(X25, torch.tensor([0, 1, 7, 2]))),
    "target_equal_to_classes": (IndexError, r"Target 5 is out of bounds\.",
                                lambda f: f(X25, torch.tensor([0, 5, 1, 2]))),
    "target_negative": (IndexError, r"Target -1 is out of bounds\.",
                        lambda f: f(X25, torch.tensor([0, -1, 1, 2]))),
    "target_minus_100": (IndexError, r"Target -100 is out of bounds\.",
                         lambda f: f(X25, torch.tensor([0, -100, 1, 2]), ignore_index=3)),
    "target_huge": (IndexError, r"Target 9223372036854775807 is out of bounds\.",
                    lambda f: f(X25, torch.tensor([0, 2**63 - 1, 1, 2]))),
    "target_wrap_32": (IndexError, r"Target 4294967297 is out of bounds\.",
                       lambda f: f(X25, torch.tensor([0, 2**32 + 1, 1, 2]))),
    "target_no_classes": (IndexError, r"Target 0 is out of bounds\.",
                          lambda f: f(logits(2, 0), torch.tensor([0, 0]))),
    "target_smoothing": (IndexError, r"Target 7 is out of bounds\.",
                         lambda f: f(X25, torch.tensor([0, 1, 7, 2]), label_smoothing=0.1)),
    "target_weight": (IndexError, r"Target 7 is out of bounds\.",
                      lambda f: f(X25, torch.tensor([0, 1, 7, 2]), torch.rand(5))),
    "target_4d": (IndexError, r"Target 255 is out of bounds\.",
                  lambda f: f(logits(1, 5, 2, 2), torch.tensor([[[0, 1], [255, 2]]]))),
    "target_1d": (IndexError, r"Target 9 is out of bounds\.",
                  lambda f: f(logits(5), torch.tensor(9))),
    # logits types
    **{f"logits_{name}": (NotImplementedError, f"not implemented for '{text}'",
                          lambda f, t=t: f(torch.ones(4, 5).to(t), classes(4)))
       for name, text, t in (("long", "Long", torch.int64), ("bool", "Bool", torch.bool),
                             ("int", "Int", torch.int32), ("float8", "Float8_e4m3fn",
                                                           torch.float8_e4m3fn),
                             ("complex", "ComplexFloat", torch.complex64))},
    # Python arguments
    **{f"reduction_{value}": (ValueError, f"{value} is not a valid value for reduction",
                              lambda f, v=value: f(X25, classes(4), reduction=v))
       for value in ("avg", "", None, "MEAN")},
    "reduction_first": (ValueError, "avg is not a valid value for reduction",
                        lambda f: f(X25, classes(3), reduction="avg", label_smoothing=7)),
    "target_int": (TypeError, r"argument 'target' \(position 2\) must be Tensor, not int",
                   lambda f: f(X25, 3)),
    "target_list": (TypeError, r"argument 'target' \(position 2\) must be Tensor, not list",
                    lambda f: f(X25, [1, 2, 3, 4])),
    "target_none": (TypeError, r"argument 'target' \(position 2\) must be Tensor, not NoneType",
                    lambda f: f(X25, None)),
    "input_none": (TypeError, r"must be Tensor, not NoneType", lambda f: f(None, classes(4))),
    "input_array": (TypeError, r"must be Tensor, not numpy.ndarray",
                    lambda f: f(np.zeros((4, 5)), classes(4))),
    "weight_list": (TypeError, r"argument 'weight' \(position 3\) must be Tensor, not list",
                    lambda f: f(X25, classes(4), [1.0] * 5)),
    **{f"ignore_{type(value).__name__}": (TypeError, "ignore_index",
                                          lambda f, v=value: f(X25, classes(4), ignore_index=v))
       for value in (None, "2", 2.0, True)},
    **{f"smoothing_{type(value).__name__}": (
        TypeError, "label_smoothing", lambda f, v=value: f(X25, classes(4), label_smoothing=v))
       for value in (None, "0.1")},
    "ignore_overflow": (ValueError, "Overflow when unpacking long long",
                        lambda f: f(X25, classes(4), ignore_index=2**63)),
    # devices
    "device_target": (RuntimeError, "is not on the expected device|same device",
                      lambda f: f(X25, classes(4).to("meta"))),
    "device_weight": (RuntimeError, "is not on the expected device|same device",
                      lambda f: f(X25, classes(4), torch.rand(5, device="meta"))),
    "device_logits": (RuntimeError, "is not on the expected device|same device",
                      lambda f: f(X25.to("meta"), classes(4))),
    "device_soft": (RuntimeError, "is not on the expected device|same device",
                    lambda f: f(X25, X25.softmax(1).to("meta"))),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    error, text, call = ERRORS[name]
    with pytest.raises(error, match=text) as native:
        call(F.cross_entropy)
    with pytest.raises(error, match=text) as ours:
        call(ce)
    assert type(ours.value) is type(native.value) is error
    good = ce(X25, classes(4))
    assert_near(good, reference(X25, classes(4)).loss, 10)


@pytest.mark.parametrize("name", ERRORS)
def test_error_with_a_gradient_and_grad_mode_off(name):
    """The same error on every way in: logits that need a gradient, no_grad, inference mode."""
    error, text, call = ERRORS[name]

    def needing(x, *args, **kwargs):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype.itemsize > 1:
            x = x.detach().requires_grad_()
        return ce(x, *args, **kwargs)

    with pytest.raises(error, match=text):
        call(needing)
    if name.startswith("weight_gradient"):
        with torch.no_grad():
            call(ce)
        with torch.inference_mode():
            call(ce)
        return
    with torch.no_grad(), pytest.raises(error, match=text):
        call(ce)


# ---- a target out of range -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5,), (70, 5), (70, 40), (3, 2000), (2, 5, 3, 40)], ids=str)
def test_out_of_range_anywhere(shape, smoothing, dtype, isa):
    """Every position, near and far values, all reductions; the text names the value."""
    positions = shape[:1] + shape[2:] if len(shape) > 1 else ()
    x = torch.randn(shape).to(DTYPES[dtype]).requires_grad_()
    good = torch.randint(5, positions)
    count = good.numel()
    for at in sorted({0, 1 % count, count // 2, count - 1}):
        for value in (shape[1] if len(shape) > 1 else 5, -1, 2**40, -2**63):
            bad = good.clone()
            bad.view(-1)[at] = value
            for reduction in REDUCTIONS:
                with pytest.raises(IndexError, match=rf"Target {value} is out of bounds\."):
                    ce(x, bad, reduction=reduction, label_smoothing=smoothing)
    ce(x, good, label_smoothing=smoothing).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape, where, words", [
    ((4, 5), (2,), ["2"]), ((2, 5, 3, 4), (1, 2, 0), ["1", "2", "0"]),
])
def test_out_of_range_names_the_position(shape, where, words):
    y = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    y[where] = 77
    with pytest.raises(IndexError) as caught:
        ce(torch.randn(shape), y)
    text = str(caught.value)
    assert text.startswith("Target 77 is out of bounds.")
    rest = text[len("Target 77 is out of bounds."):]
    flat = int(np.ravel_multi_index(where, y.shape))
    # Either the index in every dimension or the flat one.
    assert all(w in rest for w in words) or str(flat) in rest, text


def test_first_bad_target_is_reported():
    """Also when threads meet a later one earlier."""
    x, y = torch.randn(4000, 64), torch.zeros(4000, dtype=torch.long)
    y[[1234, 2345, 3999]] = torch.tensor([-7, 99, 98])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with pytest.raises(IndexError, match=r"Target -7 is out of bounds\.") as caught:
            ce(x, y)
        assert "1234" in str(caught.value)


def test_int32_garbage_is_named():
    y = torch.tensor([0, -2**31, 1, 2], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"Target -2147483648 is out of bounds\."):
        ce(X25, y)


def test_inputs_are_untouched_by_an_error():
    x, w = X25.clone(), torch.rand(5)
    y = torch.tensor([0, 1, 7, 2])
    kept = [t.clone() for t in (x, y, w)]
    for reduction in REDUCTIONS:
        with pytest.raises(IndexError):
            ce(x, y, w, reduction=reduction)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, y, w)))


# ---- what native refuses and ours takes ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 3)], ids=str)
def test_weight_of_shape_one_by_classes(shape):
    """Only its number of entries is looked at for logits of rank 3 and above."""
    y = classes(shape[0], *shape[2:])
    w = torch.rand(1, 5)
    torch.testing.assert_close(ce(logits(*shape), y, w), F.cross_entropy(logits(*shape), y, w))
    smooth = ce(logits(*shape), y, w, label_smoothing=0.1)
    assert_near(smooth, reference(logits(*shape), y, w[0], label_smoothing=0.1).loss, 10)


def test_smoothing_of_a_boolean_is_as_native():
    """True is a number for torch's float argument."""
    want = F.cross_entropy(X25, classes(4), label_smoothing=True)
    torch.testing.assert_close(ce(X25, classes(4), label_smoothing=True), want)


def test_module_constructor_does_not_check_the_reduction():
    module = wce_torch.CrossEntropyLoss(reduction="avg")
    with pytest.raises(ValueError, match="avg is not a valid value for reduction"):
        module(X25, classes(4))
    with pytest.raises(TypeError):
        wce_torch.CrossEntropyLoss([1.0] * 5)


def test_parameter_as_module_weight():
    module = wce_torch.CrossEntropyLoss(torch.nn.Parameter(torch.rand(5)))
    assert list(module.parameters()) == [] and "weight" in dict(module.named_buffers())
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        module(X25, classes(4))


def test_integer_weight_with_soft_targets_is_accepted():
    x, q = X25, X25.softmax(1)
    w = torch.tensor([1, 2, 3, 4, 5])
    torch.testing.assert_close(ce(x, q, w), F.cross_entropy(x, q, w))
    torch.testing.assert_close(ce(x, q, w > 2), F.cross_entropy(x, q, w > 2))


# ---- autograd errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["target", "weight", "soft"])
def test_inference_tensors_cannot_be_saved(which):
    x = X25.clone().requires_grad_()
    with torch.inference_mode():
        y, w, q = classes(4), torch.rand(5), torch.rand(4, 5)
    target = {"target": y, "soft": q}.get(which, y.clone())
    weight = w if which == "weight" else None
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ce(x, target, weight)
    assert ce(X25, target, weight).isfinite()


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 4)], ids=str)
def test_bad_upstream_gradient_shape(shape):
    case = Case(shape, reduction="none")
    x, y, options = case.build(torch.float32)
    loss = ce(x.requires_grad_(), y, **options)
    with pytest.raises(RuntimeError):
        loss.backward(torch.ones(1, 9))
    loss.backward(torch.ones_like(loss))


def test_errors_under_torch_compile():
    """A wrong shape raises while tracing as a RuntimeError; a bad target as an IndexError."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: ce(x, y), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError):
        compiled(X25, classes(3))
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        compiled(X25, torch.tensor([0, 1, 7, 2]))
    torch.testing.assert_close(compiled(X25, classes(4)), ce(X25, classes(4)))


# Not here: what goes to torch's own loss, whose shape inference checks less.
FAKE_ERRORS = [name for name in ERRORS if name.split("_")[0] in (
    "batch", "one", "multi", "size", "rank", "integer", "bool", "weight", "soft")
    and name not in ("weight_list", "weight_long", "weight_bool", "weight_complex",
                     "integer_soft_scalar")]


@pytest.mark.parametrize("name", FAKE_ERRORS)
def test_shape_inference_makes_the_same_checks(name):
    """Types and texts are those of the kernels when only shapes and dtypes are known."""
    error, text, call = ERRORS[name]

    def on_fake(*args, **kwargs):
        mode = FakeTensorMode()
        fake = lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v  # noqa: E731
        with mode:
            return ce(*map(fake, args), **{k: fake(v) for k, v in kwargs.items()})

    with pytest.raises(error, match=text):
        call(on_fake)
    with FakeTensorMode() as mode:
        good = ce(mode.from_tensor(X25), mode.from_tensor(classes(4)))
    assert good.shape == () and good.dtype == X25.dtype


def test_combinations_of_ranks_never_crash():
    """Every pair of small logits and target shapes: both raise, or both give the same."""
    shapes = [(), (1,), (3,), (2, 3), (3, 2), (1, 3), (2, 3, 2), (2, 3, 1), (2, 3, 2, 2), (2, 2, 3)]
    refused = (RuntimeError, ValueError, IndexError)  # with two mistakes either may be named
    for shape, target_shape in itertools.product(shapes, shapes):
        x = torch.randn(shape)
        for target in (torch.zeros(target_shape, dtype=torch.long), torch.rand(target_shape)):
            if shape == (3,) and target_shape == (1,) and target.dtype == torch.long:
                continue  # torch's forward works there, its backward does not; not pinned
            try:
                want = F.cross_entropy(x, target)
            except refused:
                with pytest.raises(refused):
                    ce(x, target)
            else:
                torch.testing.assert_close(ce(x, target), want, equal_nan=True)

"""The module, and the loss among threads and processes."""

import copy
import io
import multiprocessing
import pickle
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import run_python, segmentation_losses
from reference import assert_near, reference, run, same_bits

import wce_torch

ce = wce_torch.cross_entropy
Loss, Native = wce_torch.CrossEntropyLoss, torch.nn.CrossEntropyLoss
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
Y = torch.tensor([0, 1, 4, 2, 2, 3])
W = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])

VARIANTS = {
    "plain": {}, "weight": {"weight": W}, "ignore": {"ignore_index": 2},
    "sum": {"reduction": "sum"}, "smooth": {"label_smoothing": 0.1, "weight": W},
    "none": {"reduction": "none", "ignore_index": 255},
}
EXTRAS = {"prior": {"class_prior": W, "tau": 0.5}, "empty": {"empty": "zero", "weight": W}}


def same_module(a, b):
    return (a.reduction, a.ignore_index, a.label_smoothing) == (
        b.reduction, b.ignore_index, b.label_smoothing) and same_bits(a(X, Y), b(X, Y))


@pytest.mark.parametrize("name", [*VARIANTS, *EXTRAS])
def test_copies(name):
    """pickle with every protocol, deepcopy, copy, torch.save of the whole module."""
    module = Loss(**{**VARIANTS, **EXTRAS}[name])
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert same_module(pickle.loads(pickle.dumps(module, protocol)), module)
    assert same_module(copy.copy(module), module)
    deep = copy.deepcopy(module)
    assert same_module(deep, module)
    for mine, other in zip(module.buffers(), deep.buffers()):
        assert mine.data_ptr() != other.data_ptr()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert same_module(torch.load(file, weights_only=False), module)


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dict_both_ways(name):
    options = VARIANTS[name]
    mine, native = Loss(**options), Native(**options)
    assert list(mine.state_dict()) == list(native.state_dict())
    other = {k: v * 2 if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    mine.load_state_dict(Native(**other).state_dict())
    native.load_state_dict(Loss(**other).state_dict())
    torch.testing.assert_close(mine(X, Y), native(X, Y))
    torch.testing.assert_close(mine(X, Y), F.cross_entropy(X, Y, **other))


def test_state_dict_with_and_without_weight():
    """As torch: a weight more or less in the file is an error."""
    for cls in (Loss, Native):
        with pytest.raises(RuntimeError, match="Missing key"):
            cls(W).load_state_dict(cls().state_dict())
        with pytest.raises(RuntimeError, match="Unexpected key"):
            cls().load_state_dict(cls(W).state_dict())
        keys = cls().load_state_dict(cls(W).state_dict(), strict=False)
        assert keys.unexpected_keys == ["weight"]


def test_assign_and_meta():
    with torch.device("meta"):
        module = Loss(torch.empty(5))
    module.load_state_dict({"weight": W}, assign=True)
    torch.testing.assert_close(module(X, Y), F.cross_entropy(X, Y, W))
    empty = Loss(W).to("meta").to_empty(device="cpu")
    assert empty.weight.shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(dtype):
    """The weight follows .to() and is read in its own type, with logits of any type."""
    module = Loss(W, label_smoothing=0.1).to(dtype)
    assert module.weight.dtype == dtype
    for x in (X, X.to(dtype)):
        want = reference(x, Y, W.to(dtype), label_smoothing=0.1)
        got = module(x, Y)
        assert got.dtype == x.dtype
        assert_near(got, want.loss, want.loss_scale)


def test_half_and_back():
    module = Loss(W).half().float()
    torch.testing.assert_close(module(X, Y), F.cross_entropy(X, Y, W))
    assert same_bits(Loss(W).double()(X.double(), Y), ce(X.double(), Y, W.double()))


def test_inside_a_model():
    class Model(torch.nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.linear = torch.nn.Linear(5, 5)
            self.loss = loss

        def forward(self, x, y):
            return self.loss(self.linear(x), y)

    torch.manual_seed(0)
    native = Model(Native(W))
    torch.manual_seed(0)
    mine = Model(Loss(W))
    assert list(native.state_dict()) == list(mine.state_dict()) == [
        "linear.weight", "linear.bias", "loss.weight"]
    assert [n for n, _ in mine.named_parameters()] == ["linear.weight", "linear.bias"]
    for model in (native, mine):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            model(X, Y).backward()
            optimizer.step()
    for a, b in zip(native.parameters(), mine.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_functional_call_swaps_the_weight():
    module = Loss(W)
    got = torch.func.functional_call(module, {"weight": W * 3}, (X, Y))
    torch.testing.assert_close(got, F.cross_entropy(X, Y, W * 3))
    torch.testing.assert_close(module(X, Y), F.cross_entropy(X, Y, W))


def test_attributes_may_change_later():
    module = Loss(W)
    module.reduction, module.ignore_index, module.label_smoothing = "sum", 2, 0.2
    want = F.cross_entropy(X, Y, W, ignore_index=2, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(module(X, Y), want)
    module.weight = None
    module.reduction = "none"
    torch.testing.assert_close(module(X, Y), F.cross_entropy(
        X, Y, ignore_index=2, reduction="none", label_smoothing=0.2))


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("which", [0, 1], ids=["channel", "topk"])
def test_subclass_patterns(which):
    x = torch.randn(2, 5, 3, 4, 2)
    y = torch.randint(5, (2, 1, 3, 4, 2)).float()
    y[0, 0, 0] = 3
    mine, native = (segmentation_losses(base)[which](W, ignore_index=3) for base in (Loss, Native))
    got = run(lambda x, t: mine(x, t), x, y, {})
    want = run(lambda x, t: native(x, t), x, y, {})
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


def test_subclass_with_additional_state():
    class Scheduled(Loss):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_buffer("step", torch.zeros(()))

        def forward(self, input, target):
            self.step += 1
            return super().forward(input, target) * self.step

    module = Scheduled(W)
    module(X, Y)
    torch.testing.assert_close(module(X, Y), 2 * F.cross_entropy(X, Y, W))
    assert set(module.state_dict()) == {"weight", "step"}


def test_hooks_and_sequential():
    module = Loss()
    seen = []
    module.register_forward_hook(lambda m, i, o: seen.append(o))
    module.register_full_backward_hook(lambda m, gi, go: seen.append(go))
    x = X.clone().requires_grad_()
    module(x, Y).backward()
    assert len(seen) == 2
    torch.testing.assert_close(x.grad, reference(X, Y).dx.float())


# ---- threads and processes -----------------------------------------------------------------------


def test_sixteen_threads():
    """Forward and backward at once, small and large problems: each thread's own bits."""
    shapes = [(6, 5), (3000, 40), (2, 7, 90, 90), (40, 3000)]
    problems = []
    for i, shape in enumerate(shapes):
        gen = torch.Generator().manual_seed(i)
        x = torch.randn(shape, generator=gen)
        y = torch.randint(shape[1], shape[:1] + shape[2:], generator=gen)
        problems.append((x, y, {"weight": torch.rand(shape[1], generator=gen)}))
    want = [run(ce, *problem)[:2] for problem in problems]
    wrong, start = [], threading.Barrier(16)

    def work(number):
        start.wait()
        for i in range(6):
            which = (number + i) % len(problems)
            got = run(ce, *problems[which])
            if not (same_bits(got[0], want[which][0]) and same_bits(got[1], want[which][1])):
                wrong.append((number, which))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_graph_from_many_threads():
    """Backward of one loss per thread over the same leaf adds up."""
    x = X.clone().requires_grad_()

    def work():
        ce(x, Y).backward()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(x.grad, 8 * reference(X, Y).dx.float(), rtol=1e-5, atol=1e-6)


class InWorker(torch.utils.data.Dataset):
    """Computes a loss and a gradient inside the worker process."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        x = torch.randn(2000, 40, generator=torch.Generator().manual_seed(i)).requires_grad_()
        loss = ce(x, torch.arange(2000) % 40)
        loss.backward()
        return loss.detach(), x.grad.abs().sum()


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loader_workers(context):
    """After the parent has used the kernels (and their threads)."""
    want = [InWorker()[i] for i in range(6)]
    loader = torch.utils.data.DataLoader(InWorker(), batch_size=None, num_workers=2,
                                         multiprocessing_context=context, timeout=120)
    for (loss, grad), (want_loss, want_grad) in zip(loader, want, strict=True):
        assert same_bits(loss, want_loss)
        torch.testing.assert_close(grad, want_grad)


def _child(queue, module, x, y):
    queue.put(module(x, y).item())


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_module_in_a_child_process(context):
    module = Loss(W, class_prior=W)
    mp = multiprocessing.get_context(context)
    queue = mp.Queue()
    child = mp.Process(target=_child, args=(queue, module, X, Y))
    child.start()
    assert queue.get(timeout=120) == module(X, Y).item()
    child.join()
    assert child.exitcode == 0


def test_environment_chooses_the_instruction_set():
    code = "import wce_torch; print(wce_torch.get_cpu_isa())"
    for name in wce_torch.cpu_isas():
        assert run_python(code, WCE_CPU_ISA=name).stdout.strip() == name
    wrong = run_python(code, WCE_CPU_ISA="mmx")
    assert wrong.returncode != 0 and "mmx" in wrong.stderr and "base" in wrong.stderr


def test_import_leaves_torch_alone():
    """Importing changes no global of torch and starts no thread; one call works at once."""
    result = run_python("""
        import threading, torch
        before = torch._C._nn.cross_entropy_loss, torch.nn.functional.cross_entropy
        count = threading.active_count(), torch.get_num_threads()
        import wce_torch
        assert before == (torch._C._nn.cross_entropy_loss, torch.nn.functional.cross_entropy)
        assert count == (threading.active_count(), torch.get_num_threads())
        print(float(wce_torch.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]))))
    """)
    assert result.returncode == 0, result.stderr
    assert abs(float(result.stdout) - 1.3862944) < 1e-6


def test_typing_and_documentation():
    assert (Path(wce_torch.__file__).parent / "py.typed").exists()
    for name in wce_torch.__all__:
        thing = getattr(wce_torch, name)
        assert thing.__doc__, f"{name} has no docstring"


def test_prior_of_float64_stays_float64():
    q, x, y = torch.rand(5, dtype=torch.float64), torch.randn(6, 5).double(), torch.arange(6) % 5
    module = wce_torch.CrossEntropyLoss(class_prior=q)
    assert module.log_prior.dtype == torch.float64
    expected = wce_torch.cross_entropy(x, y, class_prior=q)
    torch.testing.assert_close(module(x, y), expected, rtol=1e-14, atol=0)
    assert wce_torch.CrossEntropyLoss(class_prior=q.float()).log_prior.dtype == torch.float32

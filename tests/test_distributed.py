"""The right mean over micro-batches and processes: two processes with gloo."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import wce_torch

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

ce = wce_torch.cross_entropy
WEIGHT = torch.tensor([0.2, 1.0, 5.0])
ROWS = 12


def problem():
    """A small model, data and targets; the second half has other classes than the first, and more
    ignored rows, so that means over halves are biased."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x = torch.randn(ROWS, 4).double()
    y = torch.tensor([0, 0, 0, 1, 0, 0, 2, 2, -100, -100, 2, 1])
    return model, x, y


def gradient(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def whole_batch():
    model, x, y = problem()
    ce(model(x), y, WEIGHT.double()).backward()
    return gradient(model)


def worker(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weight = WEIGHT.double()
    for kind in ("normalizer", "rank_mean"):
        model, x, y = problem()
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        part = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        logits, target = ddp(x[part]), y[part]
        if kind == "normalizer":
            total = wce_torch.class_weight_sum(target, weight)
            dist.all_reduce(total)
            # DDP averages the gradients of the ranks, hence the factor.
            loss = ce(logits, target, weight, normalizer=total / dist.get_world_size())
        else:
            loss = ce(logits, target, weight)
        loss.backward()
        results[rank, kind] = gradient(model).tolist()
    dist.barrier()
    os._exit(0)  # where the process ends in order, a thread of gloo's now and then aborts it


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def two_processes():
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, args=(free_port(), results), nprocs=2, join=True)
        return dict(results)


# class_weight_sum is float32: its rounding is all that separates the two.
CLOSE = {"rtol": 2e-7, "atol": 1e-9}


def test_global_denominator_equals_the_whole_batch(two_processes):
    want = whole_batch()
    for rank in (0, 1):
        got = torch.tensor(two_processes[rank, "normalizer"]).double()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_means_per_rank_are_wrong(two_processes):
    want = whole_batch()
    wrong = torch.tensor(two_processes[0, "rank_mean"]).double()
    assert (wrong - want).abs().max() > 0.05 * want.abs().max()


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_gradient_accumulation(parts):
    """Micro-batches with one common denominator give the gradient of the whole batch."""
    model, x, y = problem()
    weight = WEIGHT.double()
    total = wce_torch.class_weight_sum(y, weight)
    for xs, ys in zip(x.chunk(parts), y.chunk(parts)):
        ce(model(xs), ys, weight, normalizer=total).backward()
    torch.testing.assert_close(gradient(model), whole_batch(), **CLOSE)
    biased, _, _ = problem()
    for xs, ys in zip(x.chunk(parts), y.chunk(parts)):
        (ce(biased(xs), ys, weight, empty="zero") / parts).backward()
    difference = (gradient(biased) - whole_batch()).abs().max()
    assert difference > 0.05 * whole_batch().abs().max()


def test_trainer_style_loss_function():
    """A loss with the caller's own denominator: 'sum' over parts, divided by a number of items."""
    model, x, y = problem()
    items = int((y != -100).sum())
    for xs, ys in zip(x.chunk(3), y.chunk(3)):
        ce(model(xs), ys, normalizer=items).backward()
    other, _, _ = problem()
    (ce(other(x), y, reduction="sum") / items).backward()
    torch.testing.assert_close(gradient(model), gradient(other))


def test_empty_micro_batch_adds_nothing():
    model, x, y = problem()
    loss = ce(model(x), torch.full_like(y, -100), WEIGHT.double(), normalizer=7.0)
    loss.backward()
    assert loss == 0 and (gradient(model) == 0).all()

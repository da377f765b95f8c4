"""Memory of large gradients on the CPU: kept from one step to the next, and no longer than that."""

import os
import subprocess
import sys

import pytest
import torch

import wce_torch

CLASSES = 1024
ROWS = (40 << 20) // (4 * CLASSES)  # a float32 gradient of 40 MiB

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")


def gradient(rows=ROWS, value=0.0):
    x = torch.full((rows, CLASSES), value).requires_grad_()
    wce_torch.cross_entropy(x, torch.zeros(rows, dtype=torch.long)).backward()
    return x.grad


@pytest.fixture(autouse=True)
def empty():
    wce_torch.empty_cache()
    yield
    wce_torch.empty_cache()


def test_next_gradient_gets_the_memory_of_the_last():
    first = gradient().data_ptr()
    assert gradient().data_ptr() == first
    assert gradient(rows=ROWS * 7 // 8).data_ptr() == first


def test_a_living_gradient_keeps_its_memory():
    one = gradient()
    want = one.clone()
    other = gradient(value=1.0)
    assert other.data_ptr() != one.data_ptr()
    del other
    other = gradient(value=2.0)
    assert other.data_ptr() != one.data_ptr() and torch.equal(one, want)


def test_views_and_storages_hold_the_block():
    row, want = gradient()[5], gradient()[5].clone()
    assert gradient().data_ptr() != row.untyped_storage().data_ptr()
    assert torch.equal(row, want)


def test_gradients_of_two_sizes():
    """A much smaller gradient gets memory of its own size and leaves the large block where it is; a
    larger one takes its place."""
    large = gradient(rows=3 * ROWS).data_ptr()
    small = gradient()
    assert small.untyped_storage().nbytes() == 40 << 20 and small.data_ptr() != large
    del small
    assert gradient(rows=3 * ROWS).data_ptr() == large
    larger = gradient(rows=4 * ROWS).data_ptr()
    assert gradient(rows=4 * ROWS).data_ptr() == larger


@needs_proc
def test_a_block_that_stays_too_large_is_given_up():
    """One large gradient, as of a validation batch, does not cost all later steps their memory."""
    gradient(rows=3 * ROWS)
    before = resident()
    for _ in range(9):
        gradient()
    assert resident() - before < -60  # 120 MiB gone, 40 kept
    small = gradient().data_ptr()
    assert gradient().data_ptr() == small


def resident_after_freeing():
    """MiB that empty_cache() leaves of what was resident before."""
    before = resident()
    wce_torch.empty_cache()
    return resident() - before


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@needs_proc
def test_empty_cache_gives_it_back():
    gradient()
    assert resident_after_freeing() < -30


def test_environment_variable_keeps_nothing():
    code = (
        "import os, torch, test_gradient_memory as t\n"
        "t.gradient(); print(t.resident_after_freeing() < -30)"
    )
    for value, kept in (("0", "False"), ("1", "True")):
        env = {**os.environ, "WCE_KEEP_MEMORY": value, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == kept, done.stderr

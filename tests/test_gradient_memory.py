"""Memory of large gradients on the CPU: kept from one step to the next, and no longer than that."""

import ast
import mmap
import os
import subprocess
import sys

import pytest
import torch

import wce_torch

CLASSES = 1024
ROWS = (40 << 20) // (4 * CLASSES)  # a float32 gradient of 40 MiB

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"

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


def printed(code, **env):
    """What a process of its own prints."""
    env = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_environment_variable_keeps_nothing():
    code = (
        "import os, torch, test_gradient_memory as t\n"
        "t.gradient(); print(t.resident_after_freeing() < -30)"
    )
    for value, kept in (("0", "False"), ("1", "True")):
        assert printed(code, WCE_KEEP_MEMORY=value) == kept


def in_huge_pages(tensor):
    """Share of a tensor's memory, as far as it can be told: mappings hold other memory as well."""
    begin, size = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    huge, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if "-" in first:
                low, high = (int(part, 16) for part in first.split("-"))
                inside = low < begin + size and high > begin
            elif inside and first == "AnonHugePages:":
                huge += int(rest.split()[0]) << 10
    return huge / size


def shares_of_gradients(small_pages):
    """Shares of three gradients, each in the memory of the one before."""
    if small_pages:  # the first one gets memory that stands already
        torch.ones(64 << 20).sum()
    found = []
    for value in range(3):
        grad = gradient(value=float(value))
        assert torch.equal(grad, expected_gradient())
        found.append((grad.data_ptr(), in_huge_pages(grad)))
        del grad
    assert len({at for at, _ in found}) == 1
    return [share for _, share in found]


def expected_gradient():
    row = torch.full((CLASSES,), 1 / CLASSES)
    row[0] -= 1
    return (row / ROWS).expand(ROWS, CLASSES)


def shares_in_a_process(small_pages, **env):
    """Of a process whose C library keeps all memory, or as it is."""
    code = f"import test_gradient_memory as t; print(t.shares_of_gradients({small_pages}))"
    if small_pages:
        env |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    return ast.literal_eval(printed(code, **env))


def huge_pages_on_request():
    """Whether the system has them for those who ask, and for nobody else."""
    if not os.path.exists(HUGE_PAGES):
        return False
    with open(HUGE_PAGES) as file:
        if "[madvise]" not in file.read():
            return False
    memory = mmap.mmap(-1, 40 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return in_huge_pages(torch.frombuffer(memory, dtype=torch.uint8).fill_(1)) > 0.8


@pytest.mark.skipif(not huge_pages_on_request(), reason="needs huge pages on request")
def test_huge_pages():
    """At once where memory is new; from the second gradient on where small pages stood; never where
    the variable says so."""
    assert min(shares_in_a_process(False)) > 0.8
    first, *others = shares_in_a_process(True)
    assert first < 0.2 and min(others) > 0.8
    assert max(shares_in_a_process(True, WCE_HUGE_PAGES="0")) < 0.2

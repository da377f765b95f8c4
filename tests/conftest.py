"""Command line options and fixtures that all tests share."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

ISAS = ("base", "avx2", "avx512")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_configure(config):
    # What inductor compiled for another build of ours may not fit: its cache on disk does not know
    # the sizes of our operators' results. The first process of a run makes one for all.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache = tempfile.mkdtemp(prefix="wce_inductor_")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    # Several pytest processes at once: OpenMP teams of all of them on the same processors spend
    # their time waiting for each other. Tests about threads set a number of their own.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("--slow") or os.environ.get("WCE_SLOW") == "1"
    asked = asked or "slow" in (config.getoption("-m") or "").replace("not slow", "")
    no_slow = pytest.mark.skip(reason="slow: run with --slow, WCE_SLOW=1 or -m slow")
    no_gpu = pytest.mark.skip(reason="no GPU that torch can use")
    for item in items:
        if "slow" in item.keywords and not asked:
            item.add_marker(no_slow)
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once per instruction set, or skips where the processor lacks it."""
    import wce_torch

    if request.param not in wce_torch.cpu_isas():
        pytest.skip(f"{request.param} is not supported by this build, processor or system")
    before = wce_torch.get_cpu_isa()
    wce_torch.set_cpu_isa(request.param)
    yield request.param
    wce_torch.set_cpu_isa(before)


@pytest.fixture
def regime():
    """A function that forces a regime of the CPU kernels for the rest of the test."""
    from wce_torch import _C

    yield _C.force_cpu_regime
    _C.force_cpu_regime(None)


@pytest.fixture
def cpu_exp():
    """A function that says what kind of processor this is, see order_of in rows_both.inc."""
    from wce_torch import _C

    yield _C.force_cpu_exp
    _C.force_cpu_exp(None)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed and leaves the global settings as it found them."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

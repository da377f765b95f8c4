"""What nvcc makes of the CUDA kernels: registers, spills, shared memory and 128-bit accesses.

The budgets come from the occupancy that the kernels are written for: the loads in flight per
multiprocessor (docs/cuda.md). Every architecture that setup.py builds, every element type.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from c_driver.build import ROOT, load_setup

setup_py = load_setup()
NVCC = setup_py.find_nvcc()
ARCHS = [arch.partition("+")[0] for arch in setup_py.cuda_archs(NVCC)] if NVCC else []
pytestmark = pytest.mark.skipif(not NVCC, reason="needs nvcc (set CUDA_HOME)")

DTYPES = ("f32", "f64", "bf16", "f16")
# Registers of a thread. The register file has 65536: at 80 three blocks of 256 threads fit, or
# six of 128; at 128 two, or four of 128; at 168 three of 128.
FAST_BUDGET = {"narrow_forward": 80, "narrow_backward": 80, "rows_forward": 80,
               "rows_backward": 80, "rows_combine": 128, "planes_forward": 128,
               "planes_backward": 128}
GENERAL_BUDGET = {"narrow_forward": 128, "narrow_backward": 128, "rows_forward": 128,
                  "rows_backward": 128, "rows_combine": 128, "planes_forward": 168,
                  "planes_backward": 168}
BODIES = ("fast", "general", "entropy")


def budget(dtype, kernel, body, arch):
    number = int(str(arch).rstrip("af"))
    two_blocks = kernel == "rows_backward" and dtype in ("bf16", "f16") and number >= 100
    if body == "fast" and dtype != "f64" and not two_blocks:
        return FAST_BUDGET[kernel]
    return GENERAL_BUDGET[kernel]


NAME = re.compile(r"_ZN8wce_cuda\d+([a-z_]+)I.*?Li(\d)E")
REPORT = re.compile(r"Compiling entry function '(\S+)' for '\S+'.*?(\d+) bytes stack frame, "
                    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
                    r"(.*?)$", re.S | re.M)


@functools.cache
def compiled(folder, dtype, arch):
    """(path of the cubin, PTX, {(kernel, body): (stores, loads, registers, rest of the line)})."""
    source = ROOT / f"csrc/cuda/kernels_{dtype}.cu"
    cubin = Path(folder) / f"{dtype}_{arch}.cubin"
    ptx = cubin.with_suffix(".ptx")
    command = [NVCC, *setup_py.NVCC_FLAGS.split(), f"-arch=compute_{arch}", "-ptx", str(source),
               "-o", str(ptx)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [NVCC, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(ptx), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = {}
    for name, _, stores, loads, registers, rest in REPORT.findall(done.stderr):
        kernel, body = NAME.match(name).groups()
        kernels[kernel, BODIES[int(body)]] = int(stores), int(loads), int(registers), rest
    return cubin, ptx.read_text(), kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubin")


def check_budget(folder, dtype, arch):
    _, _, kernels = compiled(folder, dtype, arch)
    assert len(kernels) == 18, "7 kernels in 2 bodies, 4 of them also with entropy"
    wrong = []
    for (kernel, body), (stores, loads, registers, rest) in kernels.items():
        allowed = budget(dtype, kernel, body, arch)
        static = re.search(r"(\d+) bytes smem", rest)
        if registers > allowed or static:
            wrong.append(f"{kernel} {body}: {registers} registers, allowed {allowed}; {rest}")
        if stores or loads:
            wrong.append(f"{kernel} {body}: spills {stores} and {loads} bytes")
    assert not wrong, f"{dtype} sm_{arch}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_registers(folder, arch, dtype):
    """No spills, registers within the budget, no static shared memory."""
    check_budget(folder, dtype, arch)


# ---- 128-bit accesses ----------------------------------------------------------------------------


def loops(lines, label, branch):
    """The (first, last) lines of every loop: a branch back to a label."""
    at, found = {}, []
    for n, line in enumerate(lines):
        for name in label.findall(line)[:1]:
            at[name.lstrip("0")] = n
        targets = [name.lstrip("0") for name in branch.findall(line)]
        found += [(at[name], n) for name in targets if name in at]
    return found


def has_in_loop(lines, label, branch, wanted):
    """Some innermost loop that holds the wanted instruction."""
    every = loops(lines, label, branch)
    innermost = [(a, b) for a, b in every
                 if not any((a, b) != (c, d) and a <= c and d <= b for c, d in every)]
    return any(re.search(wanted, line) for a, b in innermost for line in lines[a:b + 1])


# How each hot kernel reads and writes 16 bytes at a time, in PTX and in machine code.
LOAD = {kernel: (r"ld\.global\.nc\.L1::no_allocate\.v4", r"LDG\.E(\.\w+)?\.128")
        for kernel in ("rows_forward", "rows_backward", "planes_forward", "planes_backward")}
LOAD |= {kernel: (r"cp\.async\.cg\.shared\.global .*, 16;", r"LDGSTS\.E(\.\w+)*\.128")
         for kernel in ("narrow_forward", "narrow_backward")}
STORE = {kernel: (r"st\.global\.cs\.v4", r"STG\.E(\.\w+)?\.128")
         for kernel in ("narrow_backward", "rows_backward", "planes_backward")}


def check_accesses(bodies_of, label, branch, column):
    for (kernel, body), lines in bodies_of.items():
        for what, patterns in (("load", LOAD), ("store", STORE)):
            if kernel in patterns:
                assert has_in_loop(lines, label, branch, patterns[kernel][column]), \
                    f"{kernel} {body}: no 128-bit {what}"


def split_by(text, header):
    """{(kernel, body): lines} of a listing, cut at the lines that name a kernel."""
    parts = {}
    current = None
    for line in text.splitlines():
        found = header.search(line)
        if found:
            kernel = NAME.match(found.group(1))
            current = parts.setdefault((kernel[1], BODIES[int(kernel[2])]), []) if kernel else None
        elif current is not None:
            current.append(line)
    return parts


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_wide_accesses_in_ptx(folder, dtype):
    """The loops over classes load and store 16 bytes, past L1."""
    _, ptx, _ = compiled(folder, dtype, 90)
    check_accesses(split_by(ptx, re.compile(r"\.entry (\w+)\(")), re.compile(r"^(\$\w+):"),
                   re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);"), 0)


def find_cuobjdump():
    """cuobjdump beside nvcc, on the path, or of the wheel nvidia-cuda-cuobjdump."""
    places = [str(Path(NVCC).parent), os.environ.get("PATH", "")]
    for spec in filter(None, [importlib.util.find_spec("nvidia")]):
        places += [str(p) for root in spec.submodule_search_locations
                   for p in Path(root).glob("*/bin")]
    places.append(sysconfig.get_path("scripts"))
    path = os.pathsep.join(places)
    return shutil.which("cuobjdump", path=path), path


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_wide_accesses_in_machine_code(folder, dtype):
    """The same in the disassembly: LDG.E.128 and STG.E.128 inside loops."""
    cuobjdump, path = find_cuobjdump()
    if not cuobjdump:
        pytest.skip("needs cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    cubin, _, _ = compiled(folder, dtype, 90)
    done = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True,
                          env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    check_accesses(split_by(done.stdout, re.compile(r"Function : (\w+)")),
                   re.compile(r"/\*([0-9a-f]+)\*/ "),
                   re.compile(r"\bBRA(?:\.\w+)* (?:\w+, )?0x([0-9a-f]+) "), 1)

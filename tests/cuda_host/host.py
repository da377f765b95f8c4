"""Builds the CUDA kernels for the host shim, and runs cases on it.

build() compiles csrc/cuda/*.cu as C++ with the sanitizers; run() hands cases to the driver and
returns what it wrote. The driver's protocol is in driver.cpp.
"""

import math
import re
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from reference import log_prior_of

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/cuda_host"
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
REGIMES = {"narrow": 0, "rows": 1, "planes": 2}
FLAGS = ("-std=c++17 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all "
         "-fno-omit-frame-pointer -Wall -Wextra -Werror -Wno-unknown-pragmas").split()
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=0",
               "UBSAN_OPTIONS": "print_stacktrace=1", "PATH": "/usr/bin:/bin"}


def _newest(*patterns):
    """Time of the last change of a header."""
    return max(path.stat().st_mtime for pattern in patterns for path in ROOT.glob(pattern))


def _compile(folder, sources, command, newest):
    """Objects of the sources, compiled where older than source or headers."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / (source.stem + ".o") for source in sources}

    def compile_one(source):
        target = objects[source]
        if target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
            return
        line = [*command, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, " ".join(line) + "\n" + done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))
    return list(objects.values())


def _link(objects, target, *flags):
    if target.exists() and all(o.stat().st_mtime < target.stat().st_mtime for o in objects):
        return target
    subprocess.run([shutil.which("g++"), *flags, *map(str, objects), "-o", str(target)],
                   check=True)
    return target


INCLUDES = (f"-I{HERE}/include", f"-I{ROOT}/csrc/cuda", f"-I{ROOT}/csrc/torch")
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
KERNEL_HEADERS = ("csrc/*.h", "csrc/cuda/*.*h", "tests/cuda_host/include/*.h")


def build(folder):
    """The driver's path. Compiles what is older than its sources."""
    sources = [*KERNELS, HERE / "shim.cpp", HERE / "driver.cpp"]
    command = [shutil.which("g++"), *FLAGS, *INCLUDES]
    objects = _compile(folder, sources, command, _newest(*KERNEL_HEADERS))
    return _link(objects, folder / "driver", "-fsanitize=address,undefined")


def build_glue(folder):
    """The path of a library that puts the CUDA glue and kernels in the CPU operator's place."""
    from torch.utils.cpp_extension import include_paths, library_paths

    plain = [shutil.which("g++"), "-O1", "-g0", "-fPIC", "-fvisibility=hidden", *INCLUDES]
    objects = _compile(folder, [*KERNELS, HERE / "shim.cpp"],
                       [*plain, "-std=c++17", "-Wno-unknown-pragmas"], _newest(*KERNEL_HEADERS))
    glue = [HERE / "glue.cpp", *(ROOT / f"csrc/torch/{name}.cpp"
                                 for name in ("checks", "layout", "gradient_memory"))]
    torch_flags = [*plain, "-std=c++20", *(f"-isystem{path}" for path in include_paths()),
                   f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    objects += _compile(folder, glue, torch_flags, _newest("csrc/*.h", "csrc/torch/*.h",
                                                           "csrc/torch/ops_cuda.cpp"))
    where = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return _link(objects, folder / "libglue.so", "-shared", *where, "-Wl,--no-as-needed",
                 "-lc10", "-ltorch_cpu")


# ---- views ---------------------------------------------------------------------------------------


def _merge(dims):
    """(size, stride) of neighbouring dimensions as one, or None."""
    size, stride = 1, 0
    for n, step in reversed([d for d in dims if d[0] != 1]):
        if size == 1:
            size, stride = n, step
        elif step == size * stride:
            size *= n
        else:
            return None
    return (0, 0) if any(n == 0 for n, _ in dims) else (size, stride)


def views(x):
    """All ways to see x, (C) or (N, C, d1, ...), as [outer, classes, inner]: a list of
    (outer, classes, inner, stride_outer, stride_class, stride_inner)."""
    dims = list(zip(x.shape, x.stride()))
    classes, step = dims.pop(1 if x.dim() > 1 else 0)
    if classes == 1:
        step = 1
    found = []
    for split in range(len(dims) + 1):
        outer, inner = _merge(dims[:split]), _merge(dims[split:])
        if outer and inner:
            stride_inner = inner[1] if inner[0] > 1 else 1
            view = (outer[0], classes, inner[0], outer[1], step, stride_inner)
            if view not in found:
                found.append(view)
    return found


def common_view(tensors, rows):
    """Views of all tensors with one split, of the layout that is asked for; None if impossible.
    rows: the class dimension has stride 1; else positions have."""
    lists = [views(t) for t in tensors]
    for first in lists[0]:
        matching = [next((v for v in other if v[:3] == first[:3]), None) for other in lists]
        if all(v and (v[4] == 1 if rows else v[5] == 1) for v in matching):
            return matching
    return None


def raw_bytes(t):
    """The memory from the first to the last element of t, gaps included."""
    if t.numel() == 0:
        return b""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride()))
    flat = t.as_strided((last + 1,), (1,))
    return bytes(flat.contiguous().view(torch.uint8).numpy())


# ---- cases ---------------------------------------------------------------------------------------


@dataclass
class Job:
    """One call of forward, and of backward if dx is given. Tensors are CPU tensors; x, prob and dx
    of one shape; target, mask, ... of the positions' shape. Plan fields replace the plan's own."""

    x: torch.Tensor
    target: torch.Tensor = None
    target2: torch.Tensor = None
    mix: torch.Tensor = None
    prob: torch.Tensor = None
    weight: torch.Tensor = None
    prior: torch.Tensor = None
    sample_weight: torch.Tensor = None
    mask: torch.Tensor = None
    normalizer: float = None
    dx: torch.Tensor = None
    grad: torch.Tensor = None
    grad_lse: torch.Tensor = None
    grad_log_prob: torch.Tensor = None
    spike: float = 1.0
    floor: float = 0.0
    soft: float = 0.0
    ignore_index: int = -100
    skip_empty: bool = False
    reduction: str = "mean"
    empty_zero: bool = False
    loss_dtype: torch.dtype = None
    rows: bool = False          # per-row results wanted
    entropy: bool = False
    check: bool = False         # record bad rows instead of stopping
    saved: bool = True          # backward gets m and L
    layout: str = None          # rows or planes, where both are possible
    far: tuple = (0, 0, 0)      # what the driver adds to stride_outer, stride_class, stride_inner
    plan: dict = field(default_factory=dict)

    @property
    def acc(self):
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def pick_views(self):
        tensors = [t for t in (self.x, self.prob, self.dx) if t is not None]
        order = {"rows": (True,), "planes": (False,)}.get(self.layout, (True, False))
        for rows in order:
            found = common_view(tensors, rows)
            if found:
                found = iter(found)
                self.view = next(found)
                self.prob_view = next(found) if self.prob is not None else self.view
                self.dx_view = next(found) if self.dx is not None else self.view
                return
        raise ValueError(f"no layout: {self.x.shape} {self.x.stride()}")

    def encode(self):
        self.pick_views()
        item = self.x.itemsize
        dx = self.dx if self.dx is not None else self.x
        prob = self.prob if self.prob is not None else self.x
        self.dx_bytes = len(raw_bytes(dx)) if dx.numel() else 0
        loss_dtype = self.loss_dtype or self.x.dtype
        wants = (self.reduction == "none") + 2 + 4 * self.rows + 8 * self.entropy
        wants += 16 * (self.dx is not None)
        grad = self.grad
        regime = self.plan.get("regime")
        fields = [
            DTYPE_CODES[self.x.dtype], *self.view, self.x.data_ptr() % 16 // item,
            DTYPE_CODES[prob.dtype], *self.prob_view[3:], prob.data_ptr() % 16 // prob.itemsize,
            *self.dx_view[3:], dx.data_ptr() % 16 // item, self.dx_bytes,
            self.ignore_index, int(self.skip_empty), REDUCTIONS[self.reduction],
            int(self.empty_zero), DTYPE_CODES[loss_dtype], wants, int(self.check),
            DTYPE_CODES[grad.dtype] if grad is not None else 0,
            int(grad is not None and grad.dim() > 0), int(self.saved),
            int(self.reduction == "mean"), int(self.mix is not None and self.mix.dim() > 0),
            REGIMES[regime] if regime else -1,
            *(self.plan.get(k, -1) for k in ("threads", "lanes", "tile", "columns", "blocks")),
            *self.far,
        ]
        head = struct.pack(f"<{len(fields)}q3d", *fields, self.spike, self.floor, self.soft)
        head += bytes(64 * 8 - len(head))
        acc = lambda t: None if t is None else raw_bytes(t.to(self.acc).contiguous())  # noqa: E731
        plain = lambda t: None if t is None else raw_bytes(t.contiguous())  # noqa: E731
        index = lambda t: plain(t.long()) if t is not None else None  # noqa: E731
        normalizer = None if self.normalizer is None else torch.tensor(self.normalizer)
        arrays = [raw_bytes(self.x), index(self.target), index(self.target2),
                  acc(self.mix),
                  raw_bytes(self.prob) if self.prob is not None else None, acc(self.weight),
                  acc(self.prior), acc(self.sample_weight), plain(self.mask), acc(normalizer),
                  plain(grad), acc(self.grad_lse), acc(self.grad_log_prob)]
        parts = [head]
        for data in arrays:
            parts.append(struct.pack("<q", -1 if data is None else len(data)))
            parts.append(data or b"")
        return b"".join(parts)

    def decode(self, arrays):
        """The driver's arrays as tensors; per-row ones in the positions' shape."""
        shape = tuple(self.x.shape)
        positions = shape[:1] + shape[2:] if len(shape) > 1 else ()
        loss_dtype = self.loss_dtype or self.x.dtype
        dtypes = dict(loss=loss_dtype, denominator=self.acc, max=self.acc, log_sum=self.acc,
                      row_loss=loss_dtype, lse=self.acc, log_prob=self.acc,
                      entropy=self.acc, correct=torch.bool, bad=torch.int64, dx=self.x.dtype)
        result = {"raw": b"".join(a for a in arrays if a is not None)}
        for (name, dtype), data in zip(dtypes.items(), arrays, strict=True):
            value = None
            if data is not None:
                value = (torch.frombuffer(bytearray(data), dtype=dtype) if data
                         else torch.empty(0, dtype=dtype))
                if name in ("loss", "denominator", "bad"):
                    value = value[0]
                elif name != "dx":
                    value = value.reshape(positions)
            result[name] = value
        if self.dx is not None:
            memory = result["dx"]
            result["dx"] = memory.as_strided(self.dx.shape, self.dx.stride()) if memory.numel() \
                else torch.empty(self.dx.shape, dtype=self.x.dtype)
            touched = torch.zeros(memory.numel(), dtype=torch.bool)
            if memory.numel():
                touched.as_strided(self.dx.shape, self.dx.stride()).fill_(True)
            raw = memory.view(torch.uint8).reshape(-1, self.x.itemsize)
            assert (raw[~touched] == 255).all(), "the gaps between the gradient's rows were written"
        return result


def job_of(x, target, options, **more):
    """A job from the keyword arguments of cross_entropy."""
    o = dict(options)
    classes = x.shape[1] if x.dim() > 1 else x.shape[0]
    smooth = max(0.0, o.get("label_smoothing", 0.0))
    soft = target.shape == x.shape
    floor = smooth / classes if classes else 0.0
    prior = o.get("class_prior")
    keys = dict(weight=o.get("weight"), sample_weight=o.get("sample_weight"), mask=o.get("mask"),
                reduction=o.get("reduction", "mean"), normalizer=o.get("normalizer"),
                skip_empty=o.get("skip_empty_targets", False), floor=floor,
                empty_zero=o.get("empty", "nan") == "zero",
                prior=None if prior is None else log_prior_of(prior, o.get("tau", 1.0)))
    if soft:
        keys.update(prob=target, spike=0.0, soft=1 - smooth)
    else:
        keys.update(target=target, spike=1 - smooth, ignore_index=o.get("ignore_index", -100))
    return Job(x, **{**keys, **more})


def run_raw(driver, jobs, seed=0, leave_out=None, timeout=600):
    """The finished process of the driver."""
    command = [str(driver), str(seed), *([leave_out] if leave_out else [])]
    return subprocess.run(command, input=b"".join(job.encode() for job in jobs),
                          capture_output=True, env=ENVIRONMENT, timeout=timeout)


def parse(jobs, output):
    at, results = 0, []
    for job in jobs:
        arrays = []
        for _ in range(11):
            (n,) = struct.unpack_from("<q", output, at)
            at += 8
            arrays.append(None if n < 0 else output[at:at + n])
            at += max(n, 0)
        results.append(job.decode(arrays))
    assert at == len(output)
    return results


def run(driver, jobs, seed=0):
    """A namespace-like dict of tensors per job."""
    done = run_raw(driver, jobs, seed)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return parse(jobs, done.stdout)


def long_steps(classes):
    """Roundings that a sum over so many classes may add up to (see assert_near)."""
    return 16 + math.sqrt(classes / 16)


def places(path):
    """Names of the barriers, waits and bounds checks in a source file."""
    return re.findall(r"WCE_(?:SYNC|WAIT|GUARD)\((\w+)[,)]", path.read_text())

"""The CUDA kernels on the host shim: every kernel, dtype, layout and body against the reference.

The kernels are compiled as C++ and run with fibers for threads, under AddressSanitizer and
UBSan, in an order of threads that a seed decides (tests/cuda_host). The grid, the reference and
the tolerances are those of the CPU kernels.
"""

import functools
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import (
    DTYPES,
    FEATURE_CASES,
    INDEX_CASES,
    SOFT_CASES,
    Case,
    as_layout,
    assert_near,
    mixed_reference,
    reference,
    to_rows,
)

sys.path.insert(0, str(Path(__file__).parent / "cuda_host"))
import host  # noqa: E402
from host import Job, job_of  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to build the host shim")

INF, NAN = math.inf, math.nan
BODIES = {
    "fast": {}, "weighted": {"weight": "positive"},
    "smooth": {"weight": "positive", "smoothing": 0.1}, "soft": {"soft": True},
    "soft_smooth": {"soft": True, "weight": "signed", "smoothing": 0.1, "sample_weight": True},
    "everything": {"weight": "positive", "smoothing": 0.1, "prior": True, "sample_weight": True,
                   "mask": True},
}


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    return host.build(host.ROOT / "build/cuda_host")


def compare(job, got, want, steps=16.0, words=""):
    """One result of the driver against the reference."""
    loss = got["row_loss"] if job.reduction == "none" else got["loss"]
    assert_near(loss, want.loss, want.loss_scale, steps, words + " loss")
    if job.dx is not None:
        assert_near(got["dx"], want.dx, want.dx_scale, steps, words + " gradient")
    if job.reduction == "mean" and (not job.empty_zero or want.counts.any()):
        assert_near(got["denominator"], want.denominator, 1 + want.counts.sum(), steps,
                    words + " denominator")
    if job.rows:
        reach = want.max.abs().nan_to_num(0, 0, 0).max() + 2 if want.max.numel() else 1.0
        assert_near(got["lse"], want.lse, reach, steps, words + " lse")
        if want.log_prob is not None:
            far = want.log_prob.abs().nan_to_num(0, 0, 0) + reach
            assert_near(got["log_prob"], want.log_prob, far, steps, words + " log_prob")
            assert torch.equal(got["correct"], want.correct), words + " correct"
    if job.entropy:
        assert_near(got["entropy"], want.entropy, 8.0, steps, words + " entropy")


def like(x):
    """Memory laid out as x, gaps included, for a gradient."""
    dx = torch.empty_like(x)
    return dx if dx.stride() == x.stride() else x


def problem(case, dtype, layout="plain", seed=0, build=None, **more):
    """(job with backward, reference) of a case of the grid."""
    x, target, options = build or case.build(DTYPES[dtype], seed=seed)
    grad = case.upstream(torch.float64 if dtype == "f64" else torch.float32, seed=seed)
    want = reference(x, target, **options, grad=grad)
    placed = as_layout(x, layout)
    there = as_layout(target, layout) if case.soft else target
    keys = dict(dx=like(placed), grad=grad, saved=x.dim() > 0 and want.max.numel() > 0)
    job = job_of(placed, there, options, **{**keys, **more})
    return job, want


def check_all(driver, problems, seed=0, steps=16.0):
    results = host.run(driver, [job for job, *_ in problems], seed)
    for (job, want, *words), got in zip(problems, results, strict=True):
        classes = job.x.shape[1] if job.x.dim() > 1 else job.x.shape[0]
        allowed = steps if classes < 256 else host.long_steps(classes)
        shown = f"{tuple(job.x.shape)} {job.x.stride()} {job.x.dtype} {job.plan} {words}"
        compare(job, got, want, allowed, shown)
    return results


# ---- the grid of the CPU operator ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid(driver, dtype):
    """Ranks, weights, smoothing, ignore_index, reductions, soft targets and all options."""
    chance = random.Random(dtype)
    step = 1 if dtype == "f32" else 7  # no common divisor with the lengths of the grid's axes
    cases = INDEX_CASES[::step] + SOFT_CASES[::step] + FEATURE_CASES[::step]
    check_all(driver, [(*problem(c, dtype, saved=chance.random() < 0.5), c.id) for c in cases])


# ---- regimes, layouts, leftovers -----------------------------------------------------------------

# name: (layout of the logits, plan fields, layout of the view that is asked for)
WAYS = {
    "narrow": ("matrix", {"regime": "narrow", "threads": 64, "tile": 24}, "rows"),
    "narrow_odd": ("misaligned_matrix", {"regime": "narrow", "threads": 32, "tile": 7}, "rows"),
    "lanes4": ("matrix", {"regime": "rows", "threads": 64, "lanes": 4}, "rows"),
    "lanes8": ("shifted", {"regime": "rows", "threads": 32, "lanes": 8}, "rows"),
    "lanes16": ("misaligned_matrix", {"regime": "rows", "threads": 96, "lanes": 16}, "rows"),
    "lanes32": ("class_last", {"regime": "rows", "threads": 64, "lanes": 32}, "rows"),
    "block": ("matrix", {"regime": "rows", "threads": 96, "lanes": 96}, "rows"),
    "chunks": ("matrix", {"regime": "rows", "threads": 64, "lanes": 16, "columns": 13}, "rows"),
    "planes": ("plain", {"regime": "planes", "threads": 32, "lanes": 32}, "planes"),
    "slices": ("padded", {"regime": "planes", "threads": 64, "lanes": 8}, "planes"),
    "slices_odd": ("misaligned", {"regime": "planes", "threads": 32, "lanes": 16}, "planes"),
    "plan": ("plain", {}, None),
    "plan_rows": ("class_last", {}, None),
}


def place(x, layout):
    if layout.endswith("matrix"):
        x = to_rows(x).contiguous()
        return as_layout(x, "misaligned") if layout.startswith("mis") else x
    return as_layout(x, layout)


def placed_problem(case, dtype, way, seed=0, **more):
    layout, plan, view = WAYS[way]
    x, target, options = case.build(DTYPES[dtype], seed=seed)
    if layout.endswith("matrix"):
        keep = ("sample_weight", "mask")
        target = to_rows(target).contiguous() if case.soft else target.reshape(-1)
        options = {k: v.reshape(-1) if k in keep else v for k, v in options.items()}
    x = place(x, layout)
    target = place(target, layout) if case.soft and not layout.endswith("matrix") else target
    grad = torch.randn(x.shape[:1] + x.shape[2:] if case.reduction == "none" else (),
                       dtype=torch.float64 if dtype == "f64" else torch.float32,
                       generator=torch.Generator().manual_seed(seed))
    want = reference(x, target, **options, grad=grad)
    keys = {"dx": like(x), "grad": grad, "plan": plan, "layout": view, **more}
    return job_of(x, target, options, **keys), want, way, case.id


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run(driver, way, dtype):
    """Each regime, forced, with every leftover of classes, for each body; with and without m, L."""
    chance = random.Random(way + dtype)
    few = [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 19, 31, 32]
    many = [33, 40, 63, 65, 100, 129, 257]
    problems = []
    for classes in few if way.startswith("narrow") else few[::2] + many:
        for body in chance.sample(sorted(BODIES), 3 if dtype == "f32" else 1):
            shape = (chance.choice((1, 2, 3)), classes, chance.choice((1, 4, 9, 17)))
            case = Case(shape, reduction=chance.choice(("none", "mean")), **BODIES[body])
            saved = chance.random() < 0.5
            problems.append(placed_problem(case, dtype, way, classes, saved=saved))
    check_all(driver, problems, seed=7)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_long_rows(driver, dtype):
    """Block per row, and rows cut into chunks, as the plan decides; some with an odd start."""
    problems = []
    for classes, rows, body, way in (
            (1000, 3, "weighted", "plan_rows"), (2049, 2, "everything", "plan_rows"),
            (5003, 2, "smooth", "plan_rows"), (16400, 2, "soft", "plan_rows"),
            (33000, 1, "weighted", "plan_rows"), (33000, 2, "soft_smooth", "plan_rows")):
        case = Case((1, classes, rows), reduction="mean", **BODIES[body])
        for saved in (True, False):
            problems.append(placed_problem(case, dtype, way, classes, saved=saved))
    check_all(driver, problems)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_many_rows(driver, dtype):
    """More rows than one block takes at a time, partial sums of many blocks, several turns."""
    problems = []
    for shape, body, way, plan in (
            ((1, 3, 6000), "weighted", "narrow", {}), ((1, 10, 9000), "fast", "narrow", {}),
            ((1, 3, 700), "weighted", "narrow", {"blocks": 5}),
            ((2, 5, 40, 41), "everything", "plan", {"blocks": 3}),
            ((9, 40, 33), "smooth", "plan_rows", {"blocks": 2}),
            ((3, 40, 300), "weighted", "plan", {}), ((2, 300, 7, 7), "soft", "plan", {})):
        case = Case(shape, reduction="mean", **BODIES[body])
        job, *rest = placed_problem(case, dtype, way, 3)
        job.plan = plan
        problems.append((job, *rest))
    check_all(driver, problems)


# What is added to the strides (outer, class, inner): products beyond 32 bits, signed and unsigned,
# in elements and in bytes.
FAR = {"lanes8": (2**31 + 8, 0, 0), "block": (0, 0, 2**30 + 8), "chunks": (0, 0, 2**31 + 9),
       "plan_rows": (2**30 + 1, 0, 2**28 + 1), "planes": (0, 2**30 + 8, 0),
       "slices": (2**32 + 8, 2**31 + 8, 0), "slices_odd": (2**33 + 5, 2**30 + 3, 0)}


@pytest.mark.parametrize("body", ["weighted", "soft"])
@pytest.mark.parametrize("way", FAR)
def test_far_apart(driver, way, body):
    """64-bit offsets: rows and planes of logits, probabilities and gradient lie GiB apart."""
    problems = []
    for classes in (5, 40):
        case = Case((3, classes, 9), reduction="mean", **BODIES[body])
        for saved in (True, False):
            job, *rest = placed_problem(case, "f32", way, 1, saved=saved)
            job.far = FAR[way]
            problems.append((job, *rest))
    check_all(driver, problems)


# ---- special values ------------------------------------------------------------------------------


def special_rows(classes, dtype):
    """(rows, classes) logits, each row with something special; row 0 is an ordinary one."""
    top = torch.finfo(dtype).max
    x = torch.linspace(-2, 2, classes, dtype=torch.float64).repeat(12, 1)
    x[1, 0] = -INF
    x[2, :] = -INF
    x[3, classes // 2] = NAN
    x[4, -1] = INF
    x[5, :] = x[5] * 10 + 3e4  # a large offset
    x[6, 1:] = -INF
    x[7, :] = -top
    x[7, 0] = 0
    x[8, :] = -top  # masked by finfo.min, all of it
    x[9, 0] = top
    x[9, 1:] = -top
    x[10, :-1] = -INF
    x[11, :] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16"])
@pytest.mark.parametrize("way", WAYS)
def test_special_values(driver, way, dtype):
    """nan, infinities, rows of -inf alone, offsets, finfo.min as a mask; ignored rows of all."""
    problems = []
    layout, plan, view = WAYS[way]
    for classes in (2, 19) if way.startswith("narrow") else (2, 19, 70):
        rows = special_rows(classes, DTYPES[dtype])
        x = place(rows.t().unsqueeze(0), layout)
        y = torch.full((rows.shape[0],), classes - 1)
        ignored = y.clone()
        ignored[::2] = -100
        q = torch.zeros(rows.shape, dtype=torch.float64 if dtype == "f64" else torch.float32)
        q[:, -1] = 1
        shape = (-1,) if layout.endswith("matrix") else (1, -1)
        soft = place(q.t().unsqueeze(0), layout)
        for target in (y.reshape(shape), ignored.reshape(shape), soft):
            for saved in (True, False):
                options = {"reduction": "none"}
                grad = torch.ones(x.shape[:1] + x.shape[2:])
                want = reference(x, target, **options, grad=grad)
                problems.append((job_of(x, target, options, dx=like(x), grad=grad, saved=saved,
                                        plan=plan, layout=view, rows=True), want, way, classes))
    check_all(driver, problems, seed=3)


def test_nothing_to_do(driver):
    """No rows, no classes, nothing that counts."""
    for shape in ((0, 5), (3, 5, 0), (0, 40), (0, 5, 3)):
        for reduction, value in (("mean", NAN), ("sum", 0.0)):
            job, want = problem(Case(shape, reduction=reduction), "f32", saved=True)
            (got,) = host.run(driver, [job])
            assert math.isnan(value) == math.isnan(got["loss"])
            assert math.isnan(value) or got["loss"] == value
    x, target = torch.randn(4, 40), torch.full((4,), -100)
    jobs = [job_of(x, target, {"empty": e}, dx=like(x), grad=torch.tensor(2.0))
            for e in ("nan", "zero")]
    nan, zero = host.run(driver, jobs)
    assert math.isnan(nan["loss"]) and zero["loss"] == 0
    assert not nan["dx"].any() and not zero["dx"].any()


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_total_weight_is_zero(driver, dtype):
    """The mean's own denominator is 0: nan for it and for each row that counts, also with
    smoothing; a normalizer of 0 divides."""
    for shape in ((4, 5), (4, 40), (2, 5, 3), (1, 9000)):
        case = Case(shape, weight="positive", smoothing=0.1)
        x, target, options = case.build(DTYPES[dtype])
        target.zero_()
        target.view(-1)[1:2] = -100
        options["weight"][0] = 0.0
        keys = {"dx": like(x), "grad": torch.tensor(1.0)}
        job = job_of(x, target, options, **keys)
        zero, given = host.run(driver, [job, job_of(x, target, {**options, "normalizer": 0.0})])
        assert zero["loss"].isnan() and given["loss"] == INF, shape
        compare(job, zero, reference(x, target, **options))


# ---- results per row and their gradients ---------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
def test_row_results(driver, way, dtype):
    """lse, log_prob, entropy, correct; gradients of lse and log_prob."""
    problems = []
    layout, plan, view = WAYS[way]
    gen = torch.Generator().manual_seed(5)
    for classes in (3, 32) if way.startswith("narrow") else (3, 40):
        for body in ("weighted", "smooth", "everything"):
            case = Case((2, classes, 9), reduction="none", **BODIES[body])
            job, _, *words = placed_problem(case, dtype, way, classes)
            positions = job.grad.shape
            h, u = (torch.randn(positions, generator=gen, dtype=job.acc) for _ in range(2))
            x, target, options = case.build(DTYPES[dtype], seed=classes)
            flat = layout.endswith("matrix")
            if flat:
                options = {k: v.reshape(-1) if k in ("sample_weight", "mask") else v
                           for k, v in options.items()}
            want = reference(job.x, job.target, **options, grad=job.grad, grad_lse=h,
                             grad_log_prob=u)
            job.rows = job.entropy = True
            job.grad_lse, job.grad_log_prob = h, u
            want.dx_scale = want.dx_scale + 3 * (h.abs().max() + u.abs().max()).double()
            problems.append((job, want, *words))
    check_all(driver, problems)


# ---- mixtures of two targets ---------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("way", WAYS)
def test_mixture(driver, way, dtype, reduction):
    """Loss and gradient of lam*loss(a) + (1-lam)*loss(b), with targets that are ignored in one."""
    jobs, wanted = [], []
    for classes in (3, 32) if way.startswith("narrow") else (3, 40):
        for body in ("fast", "weighted", "everything"):
            for per_row in (False, True):
                case = Case((2, classes, 9), reduction=reduction, **BODIES[body])
                job, *_ = placed_problem(case, dtype, way, classes, saved=per_row)
                a = job.target
                b = torch.where(a == -100, 1, (a + 1) % classes)
                b.view(-1)[::4] = -100
                lam = torch.rand(a.shape if per_row else (), generator=torch.manual_seed(classes))
                job.target2, job.mix, job.grad = b, lam, torch.ones_like(job.grad)
                options = case.build(DTYPES[dtype], seed=classes)[2]
                keep = ("sample_weight", "mask")
                options = {k: v.reshape(a.shape) if k in keep else v for k, v in options.items()}
                jobs.append(job)
                wanted.append(mixed_reference(job.x, a, b, lam, **options))
    for job, (loss, dx), got in zip(jobs, wanted, host.run(driver, jobs), strict=True):
        words = f"{tuple(job.x.shape)} {job.plan}"
        assert_near(got["row_loss" if reduction == "none" else "loss"], loss,
                    30 * (18 if reduction == "sum" else 1), message=words)
        assert_near(got["dx"], dx, 4, message=words)


# ---- bad targets ---------------------------------------------------------------------------------

WILD = (-1, 5, 6, -101, 255, 2**31, 2**32 + 1, -2**62, 2**63 - 1)


@pytest.mark.parametrize("way", WAYS)
def test_bad_target(driver, way):
    """Whatever a target holds, nothing outside the tensors is read, and the row is named."""
    layout, plan, view = WAYS[way]
    jobs = []
    x = place(torch.randn(2, 5, 9), layout)
    positions = x.shape[:1] + x.shape[2:]
    for k, value in enumerate(WILD):
        target = torch.randint(5, positions)
        target.view(-1)[11] = value
        target.view(-1)[14] = value
        for key in ("target", "target2"):
            second = {} if key == "target" else {"target2": target, "mix": torch.tensor(0.5)}
            jobs.append(Job(x, **{"target": target.clamp(0, 4), key: target, **second}, dx=like(x),
                            check=True, plan=plan, layout=view, rows=True, reduction="none",
                            grad=torch.ones(positions), saved=k % 2 == 0))
    for got in host.run(driver, jobs):
        assert got["bad"] == 11
        rows = to_rows(got["dx"])
        assert not rows[11].any() and not rows[14].any() and rows[10].any()


def test_bad_target_stops_the_device(driver):
    """Without the recording mode: value, row and number of classes are printed, then assert."""
    done = host.run_raw(driver, [Job(torch.randn(4, 5), target=torch.tensor([0, 1, 7, 2]))])
    assert done.returncode != 0
    assert b"target 7 at row 2 is out of bounds for 5 classes" in done.stdout + done.stderr
    assert b"Assertion" in done.stderr


def test_excluded_class_is_a_bad_target(driver):
    prior = torch.tensor([0.0, -INF, 0.0])
    job = Job(torch.randn(4, 3), target=torch.tensor([0, 2, 1, 1]), prior=prior, check=True)
    (got,) = host.run(driver, [job])
    assert got["bad"] == 2
    job.check, job.target2, job.mix = False, torch.tensor([0, 0, 2, 0]), torch.tensor(0.5)
    done = host.run_raw(driver, [job])
    assert b"target 1 at row 2 is out of bounds" in done.stderr


# ---- from Python to the kernels ------------------------------------------------------------------


def test_glue():
    """ops_cuda.cpp on CPU tensors, the kernels on the shim: losses, gradients, results per row,
    bad targets in the checked mode, as a user calls them."""
    library = host.build_glue(host.ROOT / "build/cuda_glue")
    command = [sys.executable, str(host.HERE / "glue_cases.py"), str(library)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(host.ROOT)}, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["grid", "layouts", "statistics", "mixup", "edges",
                                   "bad_targets"]


# ---- one answer, whatever the order of threads ---------------------------------------------------


def mixed_jobs():
    """A few problems through every kernel."""
    jobs = []
    for way in WAYS:
        for body in ("weighted", "soft_smooth"):
            # With many classes, so that each warp of the block has some.
            shape = (2, 500, 3) if way == "block" else (2, 19, 13)
            case = Case(shape, reduction="mean", **BODIES[body])
            for saved in (True, False):
                job = placed_problem(case, "f32", way, 1, saved=saved)[0]
                job.plan = {**job.plan, "blocks": 2}
                jobs.append(job)
    return jobs


def test_order_of_threads_changes_no_bit(driver):
    first, second = (host.run(driver, mixed_jobs(), seed) for seed in (1, 2))
    for a, b in zip(first, second, strict=True):
        assert a["raw"] == b["raw"]


# Every barrier and every bounds check of the kernels, by its name in the sources.
PLACES = sorted({name for path in (host.ROOT / "csrc/cuda").glob("*.cuh")
                 for name in host.places(path) if path.name != "arch.cuh"})


def jobs_to_break():
    wild = Job(torch.randn(4, 5), target=torch.tensor([0, 1, 2**40, 2]), check=True)
    return [*mixed_jobs(), wild]


@functools.cache
def sound_output(driver):
    torch.manual_seed(0)
    done = host.run_raw(driver, jobs_to_break())
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("name", PLACES)
def test_each_barrier_and_check_is_needed(driver, name):
    """The shim notices when one of them is left out: a sanitizer, a hang-up or a wrong result."""
    torch.manual_seed(0)
    jobs = jobs_to_break()
    for seed in range(3):
        done = host.run_raw(driver, jobs, seed, leave_out=name)
        if done.returncode != 0 or done.stdout != sound_output(driver):
            return
    raise AssertionError(f"nothing happens without {name}")

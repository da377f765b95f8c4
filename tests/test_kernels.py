"""The CPU kernels: each instruction set, dtype, layout, regime and body against the reference.

The tolerances are those of reference.assert_near: the values are right up to a few roundings of
the arithmetic (fp32; fp64 for f64), relative to the size of the terms, and one rounding to the
type of the result. Instruction sets differ only by the order of additions and by the polynomial
of exp, so one tolerance serves all of them.
"""

import functools
import itertools
import math
import os
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ISAS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    DTYPES,
    REDUCTIONS,
    Batch,
    Case,
    as_layout,
    assert_near,
    check,
    reference,
    run,
    same_bits,
    to_rows,
)

import wce_torch
from wce_torch import _C

ce = wce_torch.cross_entropy
INF, NAN = math.inf, math.nan
REGIMES = ("auto", "tile", "rows", "split")

# The two bodies of the kernels, with and without what each may meet.
BODIES = {
    "fast": {}, "weighted": {"weight": "positive"},
    "smooth": {"weight": "positive", "smoothing": 0.1}, "soft": {"soft": True},
    "soft_smooth": {"soft": True, "weight": "signed", "smoothing": 0.1, "sample_weight": True},
    "everything": {"weight": "positive", "smoothing": 0.1, "prior": True, "sample_weight": True,
                   "mask": True},
}
# Layouts of (N, C, P) logits, and the 2-D view with one row per position.
PLACES = ("plain", "class_last", "class_first", "misaligned", "padded", "shifted", "matrix")

# The parametrisation at the top varies fastest: tests that share a batch follow each other.
every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
every_regime = pytest.mark.parametrize("kind", REGIMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def forced(regime, kind):
    """Forces the regime that the parameter `kind` names."""
    regime(None if kind == "auto" else kind)


@functools.lru_cache(maxsize=4096)
def expected(shape, body, dtype):
    """(logits, target, options, reference) of one problem, loss per row; shared by all tests."""
    x, target, options = Case(shape, reduction="none", **BODIES[body]).build(DTYPES[dtype])
    return x, target, options, reference(x, target, **options)


def add_problem(batch, shape, body, dtype, layout, steps=16.0, target_layout=None):
    """The problem in one layout; 'matrix' makes each position a row of a 2-D tensor. A soft target
    may have a layout of its own."""
    x, target, options, want = expected(shape, body, dtype)
    if layout == "matrix":
        matrix = lambda t: to_rows(t).contiguous() if t.shape == x.shape else t  # noqa: E731
        want = SimpleNamespace(loss=want.loss.reshape(-1), loss_scale=want.loss_scale.reshape(-1),
                               dx=matrix(want.dx), dx_scale=matrix(want.dx_scale))
        options = {k: v.reshape(-1) if k in ("sample_weight", "mask") else v
                   for k, v in options.items()}
        target = matrix(target) if target.shape == x.shape else target.reshape(-1)
        x = matrix(x)
    else:
        soft = target.shape == x.shape
        target = as_layout(target, target_layout or layout) if soft else target
        x = as_layout(x, layout)
    batch.add(f"{shape} {body} {dtype} {layout} {target_layout}", x, target, options, want, steps)


def planes(x):
    """(rows, C) as (1, C, rows): the same problem with the positions contiguous."""
    return x.T.contiguous()[None]


def add_both(batch, name, x, target, options, steps=16.0):
    """A problem of shape (rows, C) as rows and as planes."""
    options = {"reduction": "none", **options}
    batch.add(name + " rows", x, target, options, steps=steps)
    soft = target.shape == x.shape
    options = {k: v[None] if k in ("sample_weight", "mask") else v for k, v in options.items()}
    return batch.add(name + " planes", planes(x), planes(target) if soft else target[None],
                     options, steps=steps)


def long_steps(classes):
    """A sum of C terms in fp32 is added up by lanes, runs and blocks: some 16 to 32 additions in
    one chain, and C/16 of very many, whose random rounding errors grow as the square root."""
    return 16 + math.sqrt(classes / 16)


# ---- every leftover length -----------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def class_counts(layout, dtype, body):
    batch = Batch()
    for classes in range(1, 71):
        add_problem(batch, (2, classes, 9), body, dtype, layout)
    return batch


@every_isa
@every_regime
@pytest.mark.parametrize("layout", PLACES)
@every_dtype
@pytest.mark.parametrize("body", BODIES)
def test_every_number_of_classes(isa, kind, layout, dtype, body, forced):
    """C from 1 to 70: every remainder of every vector length, block and tile; 18 rows."""
    class_counts(layout, dtype, body).verify(ce)


@functools.lru_cache(maxsize=2)
def position_counts(layout, dtype, body):
    batch = Batch()
    for classes in (2, 3, 10, 17):
        for positions in range(1, 71):
            add_problem(batch, (1, classes, positions), body, dtype, layout)
    return batch


@every_isa
@pytest.mark.parametrize("layout", ["plain", "misaligned", "matrix"])
@every_dtype
@pytest.mark.parametrize("body", ["fast", "smooth", "soft", "everything"])
def test_every_number_of_positions(isa, layout, dtype, body):
    """1 to 70 positions, or rows, for each way to treat few classes."""
    position_counts(layout, dtype, body).verify(ce)


LONG = (127, 128, 129, 192, 193, 255, 257, 320, 321, 384, 385, 511, 512, 513, 640, 641, 1000, 1023,
        1025, 4097, 16384, 16385, 40000)
SOME_LONG = (96, 97, 127, 255, 384, 385, 512, 640, 641, 1023, 16384)


@functools.lru_cache(maxsize=2)
def long_rows(layout, dtype, body):
    batch = Batch()
    for classes in LONG if dtype in ("f32", "bf16") else SOME_LONG:
        add_problem(batch, (1, classes, 2), body, dtype, layout, long_steps(classes))
    return batch


@every_isa
@every_regime
@pytest.mark.parametrize("layout", ["matrix", "plain", "shifted"])
@every_dtype
@pytest.mark.parametrize("body", BODIES)
def test_long_rows(isa, kind, layout, dtype, body, forced):
    long_rows(layout, dtype, body).verify(ce)


@functools.lru_cache(maxsize=2)
def many_positions(dtype, body):
    batch = Batch()
    for classes, positions in ((3, 511), (3, 513), (5, 1023), (5, 1025), (2, 4099), (40, 130),
                               (150, 65), (19, 2049)):
        for layout in ("plain", "matrix"):
            add_problem(batch, (2, classes, positions), body, dtype, layout)
    return batch


@every_isa
@pytest.mark.parametrize("kind", ["auto", "tile", "rows"])
@every_dtype
@pytest.mark.parametrize("body", ["weighted", "everything", "soft"])
def test_many_positions(isa, kind, dtype, body, forced):
    """Around the lengths at which tiles of positions are cut, with few and many classes."""
    many_positions(dtype, body).verify(ce)


ACROSS = [pair for pair in itertools.permutations(PLACES[:-1], 2) if "class_last" in pair
          or "shifted" in pair]  # rows and planes, but for two pairs


@functools.lru_cache(maxsize=2)
def soft_across(pair, dtype, body):
    batch = Batch()
    for shape in ((2, 1, 9), (2, 2, 70), (3, 5, 300), (2, 19, 130), (2, 40, 70), (2, 41, 33),
                  (2, 130, 70), (2, 700, 9), (1, 1100, 300)):
        add_problem(batch, shape, body, dtype, pair[0], long_steps(shape[1]), pair[1])
    return batch


@every_isa
@pytest.mark.parametrize("pair", ACROSS, ids="-".join)
@every_dtype
@pytest.mark.parametrize("body", ["soft", "soft_smooth"])
def test_soft_target_that_lies_across(isa, pair, dtype, body):
    """Classes of the logits side by side and positions of the target, and the other way round."""
    soft_across(pair, dtype, body).verify(ce)


def shift(t, offset):
    """A copy whose base stands `offset` elements behind an aligned address."""
    if not isinstance(t, torch.Tensor):
        return t
    return torch.zeros(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape).copy_(t)


@functools.lru_cache(maxsize=2)
def shifted_problems(layout, classes, dtype):
    batch = Batch()
    shape = (9, classes) if layout == "rows" else (2, classes, 9)
    for body in ("weighted", "soft", "everything"):
        x, target, options, want = expected(shape, body, dtype)
        for offset in range(0, 64 // x.element_size(), 1 if classes < 700 else 5):
            moved = {k: shift(v, offset) for k, v in options.items()}
            batch.add(f"{body} {offset}", shift(x, offset), shift(target, offset), moved, want,
                      long_steps(classes))
    return batch


@every_isa
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("classes", [1, 2, 5, 16, 40, 48, 700])
@every_dtype
def test_misaligned_pointers(isa, layout, classes, dtype):
    """Every offset of the base inside a cache line, of logits, soft target and options alike."""
    shifted_problems(layout, classes, dtype).verify(ce)


@every_isa
@every_regime
@every_dtype
def test_neighbours_are_never_written(isa, kind, dtype, forced):
    """The gradient goes into a buffer of its own; the logits' surroundings stay what they were."""
    for classes in (1, 3, 17, 33, 65):
        guard = torch.full((11, classes + 7), 3.0, dtype=DTYPES[dtype])
        x = guard[2:-2, 3:-4]
        x.copy_(torch.randn(x.shape))
        kept = guard.clone()
        run(ce, x, torch.zeros(7, dtype=torch.long), {"reduction": "sum"})
        assert same_bits(kept, guard)


# ---- special values ------------------------------------------------------------------------------

SPECIALS = {"nan": [NAN], "inf": [INF], "minus_inf": [-INF], "lowest": ["min"], "highest": ["max"],
            "both": [INF, -INF], "nan_inf": [NAN, -INF]}


def special_logits(classes, dtype, values):
    """Row r holds the special values at class r (and the class before it): every lane meets one.
    An ordinary row stands between any two."""
    gen = torch.Generator().manual_seed(classes)
    x = torch.randn(2 * classes, classes, generator=gen).to(dtype)
    # Half of the largest number: a difference of two logits must itself be a number.
    largest = torch.finfo(dtype).max / (2 if dtype != torch.float16 else 1)
    limits = {"min": -largest, "max": largest}
    for r in range(classes):
        for step, value in enumerate(values):
            x[2 * r, (r - step) % classes] = limits.get(value, value)
    return x


@functools.lru_cache(maxsize=2)
def special_problems(dtype, name):
    batch = Batch()
    for classes in (1, 2, 5, 16, 19, 33, 70):
        x = special_logits(classes, DTYPES[dtype], SPECIALS[name])
        gen = torch.Generator().manual_seed(1)
        y = torch.randint(classes, (2 * classes,), generator=gen)
        y[::4] = torch.arange(classes)[::2]  # the special class itself
        y[1::8] = -100
        q = torch.softmax(torch.randn(x.shape, generator=gen), 1)
        q[:, 0] = 0.0
        q = q.double() if dtype == "f64" else q
        w = torch.rand(classes, generator=gen) + 0.5
        prior = {"class_prior": w, "weight": w}
        for target, options in ((y, {}), (y, {"weight": w, "label_smoothing": 0.1}), (y, prior),
                                (q, {}), (q, {"weight": w.to(q.dtype)})):
            add_both(batch, f"C={classes} {sorted(options)}", x, target, options, 32)
    return batch


@every_isa
@every_regime
@every_dtype
@pytest.mark.parametrize("name", SPECIALS)
def test_special_value_at_every_class(isa, kind, dtype, name, forced):
    """In and beside the target class, in each body, as rows and as planes."""
    special_problems(dtype, name).verify(ce)


@functools.lru_cache(maxsize=2)
def infinite_rows(dtype, classes):
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(8, classes, generator=gen).to(DTYPES[dtype])
    x[[0, 2, 7]] = -INF
    x[3, classes // 2 + 1:] = -INF
    x[4] = torch.finfo(x.dtype).min
    x[5, : classes // 2] = torch.finfo(x.dtype).min
    y = torch.tensor([0, 0, -100, 0, 0, classes - 1, 0, classes - 1])
    batch = Batch()
    for options in ({}, {"label_smoothing": 0.1}):
        want = add_both(batch, str(options), x, y, options, long_steps(classes))
        assert want.loss[0, [0, 7]].isnan().all() and (want.dx[0, :, 2] == 0).all()
    return batch


@every_isa
@every_regime
@every_dtype
@pytest.mark.parametrize("classes", [1, 3, 16, 17, 40, 700, 17000])
def test_rows_of_minus_infinity(isa, kind, dtype, classes, forced):
    """Alone, at the end, in a masked tail, in ignored rows; and rows of the lowest number."""
    infinite_rows(dtype, classes).verify(ce)


@functools.lru_cache(maxsize=2)
def offset_problems(dtype, classes):
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(20, classes, generator=gen).to(DTYPES[dtype]) + 1e6
    y = torch.randint(classes, (20,), generator=gen)
    w = torch.rand(classes, generator=gen) + 0.5
    batch = Batch()
    for name, moved in (("1e6", x), ("-1e6", -x), ("1e8", x * 100)):
        for options in ({}, {"weight": w}, {"label_smoothing": 0.1}):
            add_both(batch, f"{name} {sorted(options)}", moved, y, options, long_steps(classes))
    return batch


@every_isa
@every_regime
@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("classes", [2, 10, 40, 1000])
def test_offset_of_a_million(isa, kind, dtype, classes, forced):
    """m and L are kept apart, so an offset costs nothing beyond the rounding of the logits."""
    offset_problems(dtype, classes).verify(ce)


@functools.lru_cache(maxsize=2)
def ramps(dtype, classes):
    ramp = torch.linspace(-300, 300, classes)
    jumps = torch.where(torch.arange(classes) % 2 == 0, -200.0, 200.0)
    x = torch.stack([ramp, -ramp, torch.zeros(classes), ramp * 50, jumps]).to(DTYPES[dtype])
    y = torch.tensor([classes - 1, 0, 1, 0, classes // 2])
    batch = Batch()
    for options in ({}, {"label_smoothing": 0.1}):
        add_both(batch, str(options), x, y, options, long_steps(classes))
    return batch


@every_isa
@every_regime
@every_dtype
@pytest.mark.parametrize("classes", [5, 33, 700, 20000])
def test_rising_and_falling_rows(isa, kind, dtype, classes, forced):
    """The running maximum moves in every block, or never; jumps beyond the range of exp."""
    ramps(dtype, classes).verify(ce)


@pytest.mark.parametrize("isa", ["avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("classes", [192, 320, 640])
def test_small_terms_beside_a_large_one(isa, dtype, classes):
    """A chain of additions that begins with 1 loses each e^-16.75 that follows, as 2^-24 is more:
    so that no chain of a row may be long. 16 steps allow about 36 lost terms."""
    x = torch.full((20, classes), 0.25)
    x[:, 0] = 17
    batch = Batch()
    batch.add("rows", x.to(DTYPES[dtype]), torch.zeros(20, dtype=torch.long), {"reduction": "none"},
              steps=16.0)
    batch.verify(ce)


@every_isa
@every_regime
@every_dtype
@pytest.mark.parametrize("shape", [(0, 5), (3, 5, 0), (0, 5, 7), (5, 1), (1, 1), (2, 1, 33)],
                         ids=str)
def test_nothing_and_one_class(isa, kind, dtype, shape, forced):
    x = torch.randn(shape).to(DTYPES[dtype])
    y = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for reduction in ("none", "sum"):
        for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(shape[1])}):
            check(ce, x, y, {**options, "reduction": reduction})
        check(ce, x, torch.ones(shape), {"reduction": reduction})


@functools.lru_cache(maxsize=2)
def ignored_problems(dtype, body):
    batch = Batch()
    for classes in (3, 40, 600):
        case = Case((23, classes), reduction="none", ignore="unused", **BODIES[body])
        x, y, options = case.build(DTYPES[dtype])
        for name, drop in (("first", slice(0, 1)), ("last", slice(-1, None)),
                           ("even", slice(None, None, 2)), ("but last", slice(0, 22)),
                           ("all", slice(None))):
            clean, holes = x.clone(), y.clone()
            holes[drop] = -100
            clean[drop] = NAN
            want = add_both(batch, f"{classes} {name}", clean, holes, options, long_steps(classes))
            assert (want.dx[0][:, drop] == 0).all()
    return batch


@every_isa
@every_regime
@every_dtype
@pytest.mark.parametrize("body", ["fast", "smooth", "everything"])
def test_ignored_rows(isa, kind, dtype, body, forced):
    """None, some, all, the first, the last; ignored logits hold nan."""
    ignored_problems(dtype, body).verify(ce)


# ---- accuracy ------------------------------------------------------------------------------------


def ulp(values):
    """Distance of float32 numbers at the size of the values."""
    exponent = torch.floor(torch.log2(values.abs().double().clamp(min=2.0**-126)))
    return 2.0 ** (exponent - 23)


@functools.lru_cache(maxsize=2)
def normal_problems(shape):
    """randn logits and every kind of target: [(target, options, exact loss)]."""
    gen = torch.Generator().manual_seed(11)
    x = torch.randn(shape, generator=gen)
    y = torch.randint(shape[1], shape[:1] + shape[2:], generator=gen)
    w = torch.rand(shape[1], generator=gen) + 0.5
    soft = torch.softmax(torch.randn(shape, generator=gen), 1)
    calls = [(y, {}), (y, {"weight": w}), (y, {"label_smoothing": 0.1}), (y, {"reduction": "sum"}),
             (soft, {}), (y, {"reduction": "none"})]
    return x, [(t, options, reference(x, t, **options).loss) for t, options in calls]


NORMAL = [(32, 10), (4096, 10), (1000, 100), (512, 1000), (64, 8192), (8, 50257), (2, 19, 64, 64),
          (2, 5, 16, 16, 16)]


@every_isa
@every_regime
@pytest.mark.parametrize("shape", NORMAL, ids=str)
def test_loss_is_within_two_ulp(isa, kind, shape, forced):
    """Mean and sum: of the loss. A single row may have 4 units of the larger of the loss and 1: it
    is L - (x_y - m), two numbers of that size with an error of about one unit each."""
    x, calls = normal_problems(shape)
    for target, options, want in calls:
        error = (ce(x, target, **options).double() - want).abs()
        rows = options.get("reduction") == "none"
        units = error / ulp(want.clamp(min=1) if rows else want)
        assert units.max() <= (4 if rows else 2), (options, units.max().item())


@every_isa
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("shape", [(2000, 10), (200, 1000), (2, 19, 40, 40)], ids=str)
def test_sixteen_bit_results_are_rounded_once(isa, dtype, shape):
    """Loss and gradient are the exact value, rounded: at most a hair beyond half an ulp."""
    gen = torch.Generator().manual_seed(13)
    x = torch.randn(shape, generator=gen).to(DTYPES[dtype])
    y = torch.randint(shape[1], shape[:1] + shape[2:], generator=gen)
    check(ce, x, y, {"reduction": "none"}, steps=8)


@every_isa
@every_regime
@pytest.mark.parametrize("dtype, depth", [("f32", 110), ("bf16", 110), ("f16", 110), ("f64", 750)])
@pytest.mark.parametrize("classes", [2, 3, 17, 40, 1000])
def test_exact_zero_far_below_the_maximum(isa, kind, dtype, depth, classes, forced):
    x = torch.full((3, classes), -float(depth)).to(DTYPES[dtype])
    x[:, 0] = 0
    x[1, 1:] = -1e4
    x[2, 1:] = torch.finfo(x.dtype).min
    for logits in (x, planes(x)):
        y = torch.zeros((3,) if logits.dim() == 2 else (1, 3), dtype=torch.long)
        loss, dx, *_ = run(ce, logits, y, {"reduction": "none"})
        assert (loss == 0).all() and (dx == 0).all()


@every_isa
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_probabilities_over_the_range_of_exp(isa, layout):
    """Two classes at distance t: the gradient is p = 1/(1 + e^t), down to the last normal number.
    The rounding of t*log2(e) is a relative error of t roundings; 4 more are the polynomial's, the
    sum's and the quotient's; a quarter is for what they add up to."""
    t = torch.linspace(0, 87, 5003, dtype=torch.float64).float()
    p = 1 / (1 + torch.exp(t.double()))
    x = torch.stack([torch.zeros_like(t), -t], 1)
    y = torch.zeros(len(t), dtype=torch.long)
    if layout == "planes":
        x, y = planes(x), y[None]
    dx = run(ce, x, y, {"reduction": "sum"})[1]
    got = (dx[:, 1] if layout == "rows" else dx[0, 1]).double()
    assert ((got - p).abs() <= 1.25 * (t.double() + 4) * 2.0**-24 * p).all()


# ---- the same bits -------------------------------------------------------------------------------

# About half a million logits each: ten tasks and more.
BIG = {
    "narrow": (50_000, 10), "middle": (1800, 300), "long": (16, 40_000), "split": (3, 200_000),
    "image": (3, 19, 96, 96), "volume": (2, 5, 37, 37, 37), "two": (200_000, 2),
    "planes_wide": (2, 150, 40, 40),
}


@functools.lru_cache(maxsize=2)
def big(case, dtype):
    return case.build(dtype)


@every_isa
@pytest.mark.parametrize("dtype", ["f64", "bf16"])
@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("body", ["weighted", "smooth", "soft"])
def test_same_bits_for_any_number_of_threads(isa, dtype, name, body):
    """Sums of float32 values are taken in float64, which hides an order that varies; float64 does
    not."""
    x, target, options = big(Case(BIG[name], **BODIES[body]), DTYPES[dtype])
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
        for reduction in ("mean", "none"):
            results[threads, reduction] = run(ce, x, target, {**options, "reduction": reduction},
                                              soft_grads=False)
    for reduction in ("mean", "none"):
        loss, dx = results[1, reduction][:2]
        assert loss.isfinite().all() and dx.isfinite().all() and (dx != 0).any()
        for threads in (2, 3):
            assert same_bits(results[threads, reduction][0], loss), (threads, reduction)
            assert same_bits(results[threads, reduction][1], dx), (threads, reduction)


@every_isa
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("name", ["narrow", "split", "image"])
def test_same_bits_in_the_other_dtypes(isa, dtype, name):
    x, target, options = big(Case(BIG[name], weight="positive"), DTYPES[dtype])
    torch.set_num_threads(1)
    one = run(ce, x, target, options)
    torch.set_num_threads(2)
    two = run(ce, x, target, options)
    again = run(ce, x, target, options)
    for a, b, c in zip(one[:2], two[:2], again[:2]):
        assert same_bits(a, b) and same_bits(b, c)


@every_isa
@every_regime
@pytest.mark.parametrize("shape", [(3000, 65), (9, 70_000), (2, 7, 200, 200)], ids=str)
def test_same_bits_in_every_forced_regime(isa, kind, shape, forced):
    x, target, options = big(Case(shape, weight="positive"), torch.float64)
    torch.set_num_threads(1)
    one = run(ce, x, target, options)
    torch.set_num_threads(3)
    three = run(ce, x, target, options)
    assert same_bits(one[0], three[0]) and same_bits(one[1], three[1])


def thread_times():
    """Processor time of each thread of this process, in ticks of the system's clock."""
    times = {}
    for thread in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it may have ended since
            with open(f"/proc/self/task/{thread}/stat") as file:
                times[thread] = int(file.read().rsplit(")", 1)[1].split()[11])
    return times


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
def test_work_is_really_shared():
    """With two threads set, two threads of this process collect processor time."""
    x, target, options = big(Case(BIG["middle"]), torch.float32)
    torch.set_num_threads(2)
    before, end, busy = thread_times(), time.monotonic() + 30, 0
    while busy < 2 and time.monotonic() < end:
        for _ in range(50):
            ce(x, target, **options)
        busy = sum(t - before.get(name, 0) > 5 for name, t in thread_times().items())
    assert busy >= 2


@every_isa
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("classes", [5, 40, 100, 700])
def test_every_nan_stays_nan(isa, dtype, classes):
    """Rounding to 16 bits adds to the bits of a number: those of a nan must not become a number."""
    x = torch.randn(64, classes).to(DTYPES[dtype]).requires_grad_()
    every_bit = torch.full((64,), -1, dtype=torch.int32).view(torch.float32)
    every_bit[::2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    every_bit[5] = 1.0
    target = torch.randint(classes, (64,))
    ce(x, target, sample_weight=every_bit, reduction="sum").backward()
    assert x.grad[5].isfinite().all()
    assert x.grad[torch.arange(64) != 5].isnan().all()


@every_isa
@every_dtype
@pytest.mark.parametrize("classes", [7, 31, 33, 64, 100, 160, 300, 1500])
def test_a_row_does_not_depend_on_its_neighbours(isa, dtype, classes):
    """The same bits alone, among others, and where rows are not one after the other in memory."""
    x = torch.randn(5, 19, classes).to(DTYPES[dtype])
    target = torch.randint(classes, (5, 18))
    apart = x[:, :18].transpose(1, 2)  # [5, classes, 18]: a gap after each 18 rows
    weight = torch.rand(classes).to(DTYPES[dtype])

    def loss_and_gradient(x, target):
        x = x.detach().requires_grad_()
        stats = wce_torch.cross_entropy_with_stats(x, target, weight, reduction="none",
                                                   label_smoothing=0.1)
        plain = ce(x, target, weight, reduction="none")
        (stats.loss + stats.lse + plain).sum().backward()
        return [t.detach() for t in (stats.loss, stats.lse, stats.entropy, plain, x.grad)]

    together = loss_and_gradient(apart, target)
    packed = loss_and_gradient(x[:, :18].reshape(90, classes), target.reshape(90))
    for one, other in zip(together[:4], packed[:4], strict=True):
        assert torch.equal(one.reshape(90), other)
    assert torch.equal(together[4].transpose(1, 2).reshape(90, classes), packed[4])
    for row in range(0, 90, 7):
        alone = loss_and_gradient(x[row // 18, row % 18][None], target.reshape(90)[row][None])
        for one, other in zip(alone, packed, strict=True):
            assert torch.equal(one[0], other[row])


# One item each; as many are made as a gradient above STREAM_TILES (plan.c) needs.
ITEMS = {
    "two": (2, 512, 256), "narrow": (10, 300, 100), "image": (19, 160, 160),
    "odd_image": (33, 121, 119), "two_tiles": (41, 128, 128), "wide": (150, 64, 64),
}
ABOVE_THE_LIMIT = 17 << 20  # bytes


@pytest.mark.parametrize("isa", ISAS[1:], indirect=True)
@every_dtype
@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("body", ["plain", "smooth", "soft", "mixture", "stats"])
def test_large_gradients_have_the_bits_of_small_ones(isa, dtype, item, layout, body):
    """Past the caches they take another way: the same bits as item by item, which stay below."""
    of_one = math.prod(ITEMS[item]) * DTYPES[dtype].itemsize
    items = ABOVE_THE_LIMIT // of_one + 1
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(items, *ITEMS[item], generator=generator).to(DTYPES[dtype])
    classes = x.shape[1]
    weight = torch.rand(classes, generator=generator) + 0.5
    if layout == "rows":
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.randint(classes, (items, *x.shape[2:]), generator=generator)
    other = target.roll(1, 0)
    target[items // 2, 3:7] = -100
    if body == "soft":
        target = x.roll(1, 0).abs()

    def loss(x, part):
        if body == "mixture":
            return wce_torch.mixup_cross_entropy(x, target[part], other[part], 0.3, weight,
                                                 reduction="sum")
        if body == "stats":
            got = wce_torch.cross_entropy_with_stats(x, target[part], weight, reduction="sum")
            return got.loss + (got.lse * 0.1).sum()
        return ce(x, target[part], weight, reduction="sum",
                  label_smoothing=0.1 if body == "smooth" else 0.0)

    def gradient(part):
        leaf = x[part].detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, part), leaf)[0]

    whole = gradient(slice(None))
    for i in {0, items // 3, items // 2, items - 1}:
        assert torch.equal(gradient(slice(i, i + 1)), whole[i:i + 1]), i


def moving_maxima(classes):
    """Rows of many blocks whose maximum moves late, by less and by more than 1, or stays."""
    base = torch.linspace(-2, 2, classes).sin()
    bumps = {"none": (), "half": ((-3, 0.5),), "one": ((-3, 1.0),), "far": ((classes // 2, 30.0),),
             "small steps": [(c, 0.3 * i) for i, c in enumerate(range(0, classes, 500))],
             "large steps": [(c, 1.7 * i) for i, c in enumerate(range(0, classes, 500))],
             "step and back": ((700, 0.9), (1500, 1.9), (2500, 0.5)),
             "infinite": ((-5, INF),)}
    x = base.repeat(len(bumps) + 3, 1)
    for row, places in zip(x, bumps.values()):
        for place, value in places:
            row[place] = 1 + value
    x[-3, :1100] = -INF
    x[-2, 600:] = -INF
    x[-1, 2000] = NAN
    return x


@every_isa
@every_dtype
@pytest.mark.parametrize("classes", [2600, 40_000])
@pytest.mark.parametrize("with_prior", [False, True], ids=["", "prior"])
def test_maximum_that_moves(isa, dtype, classes, with_prior):
    """Blocks behind the first are summed up in one pass where the maximum hardly moves."""
    x = moving_maxima(classes).to(DTYPES[dtype])
    y = torch.arange(len(x)) * 7
    log_prior = torch.linspace(-3, 0, classes) if with_prior else torch.zeros(classes)
    log_prior = log_prior.to(torch.float64 if dtype == "f64" else torch.float32)
    _, stats = torch.ops.wce.forward(x, y, log_prior=log_prior if with_prior else None)
    logits = x.to(log_prior.dtype) + log_prior
    top = logits.nan_to_num(-INF, INF, -INF).amax(1)
    log_sum = (logits.double() - top.double()[:, None]).logsumexp(1)
    assert torch.equal(stats[1:1 + len(x)], top)
    assert_near(stats[1 + len(x):], log_sum, 1, long_steps(classes))


@every_isa
@every_regime
@every_dtype
@pytest.mark.parametrize("classes", [48, 100, 1100, 17000])
def test_entropy_with_classes_far_below(isa, kind, dtype, classes, forced):
    """The maximum moves up by nearly as much as there are numbers."""
    x = torch.linspace(-1, 1, classes).repeat(3, 1)
    x[0, :classes - 9] = torch.finfo(torch.float32 if dtype == "f64" else DTYPES[dtype]).min
    x[1, :classes - 9] = -INF
    x = x.to(DTYPES[dtype])
    wide = x.double().log_softmax(1)
    entropy = -(wide.exp() * wide.nan_to_num(0, 0, 0)).sum(1)
    y = torch.full((3,), classes - 1)
    for logits, target in ((x, y), (planes(x), y[None])):
        got = wce_torch.cross_entropy_with_stats(logits, target).entropy
        assert_near(got.reshape(-1), entropy, 1 + entropy, long_steps(classes))


@every_isa
@every_regime
@every_dtype
@pytest.mark.parametrize("with_prior", [False, True], ids=["", "prior"])
def test_smoothing_looks_at_each_class_and_its_weight(isa, kind, dtype, with_prior, forced):
    """No other class may take its place: every second one weighs nothing."""
    odd = torch.arange(2000) % 2 == 1
    x = torch.where(odd, -3.0, 3.0).repeat(40, 1).to(DTYPES[dtype])
    options = {"weight": (~odd).float(), "label_smoothing": 0.5, "reduction": "none"}
    if with_prior:
        options["class_prior"] = torch.linspace(1, 2, 2000)
    check(ce, x, torch.arange(40) * 3, options)


@every_isa
@every_dtype
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_smoothing_at_the_ends_of_the_range(isa, dtype, layout):
    """A share that rounds to 0, at a logit of -inf; weights whose sum is beyond float32."""
    x = torch.randn(4, 1000).to(DTYPES[dtype])
    y, weight = torch.tensor([1, 7, 20, 999]), torch.full((1000,), 1e36)

    def loss(**options):
        return ce(x, y, **options) if layout == "rows" else ce(planes(x), y[None], **options)

    x[0, 5] = -INF
    if dtype != "f64":
        assert_near(loss(label_smoothing=1e-43), loss(), loss(), 2)
    x[0, 5] = 0
    want = loss(label_smoothing=0.1)
    assert_near(loss(label_smoothing=0.1, weight=weight), want, want, 40)


# ---- statistics and control ----------------------------------------------------------------------


@every_isa
@every_dtype
@pytest.mark.parametrize("classes", [5, 39, 40, 59, 60, 79, 80, 119, 120])
def test_saved_statistics(isa, dtype, classes):
    """[denominator], or, where these are at most a twentieth of the logits' memory, [denominator,
    m of each row, L of each row]."""
    x, y, options = Case((7, classes), weight="positive", ignore="unused").build(DTYPES[dtype])
    loss, stats = torch.ops.wce.forward(x, y, options["weight"])
    want = reference(x, y, options["weight"])
    assert stats.dtype == (torch.float64 if dtype == "f64" else torch.float32) and stats.dim() == 1
    is_saved = 20 * 2 * stats.element_size() <= classes * x.element_size()
    assert stats.numel() == (1 + 2 * 7 if is_saved else 1)
    assert_near(stats[0], want.denominator)
    assert_near(loss, want.loss, want.loss_scale)
    if is_saved:
        assert torch.equal(stats[1:8].double(), want.max)
        assert_near(stats[8:], want.log_sum)
    soft = torch.softmax(x.double(), 1).to(stats.dtype)
    _, stats = torch.ops.wce.forward(x, soft)
    is_saved = 20 * 3 * stats.element_size() <= classes * x.element_size()
    assert stats.numel() == (1 + 3 * 7 if is_saved else 1)


def test_names_of_instruction_sets_and_regimes():
    before = wce_torch.get_cpu_isa()
    assert before in wce_torch.cpu_isas() and wce_torch.cpu_isas()[0] == "base"
    with pytest.raises((ValueError, RuntimeError), match="sse9"):
        wce_torch.set_cpu_isa("sse9")
    assert wce_torch.get_cpu_isa() == before
    with pytest.raises((ValueError, RuntimeError), match="diagonal"):
        _C.force_cpu_regime("diagonal")
    with pytest.raises(ValueError, match="exp 'dear' is unknown; there are: auto, quick, slow"):
        _C.force_cpu_exp("dear")
    for name in wce_torch.cpu_isas():
        wce_torch.set_cpu_isa(name)
        assert wce_torch.get_cpu_isa() == name
    wce_torch.set_cpu_isa(before)


# ---- random problems -----------------------------------------------------------------------------


@st.composite
def problems(draw):
    """A random shape, memory layout and set of options, as plain data."""
    rank = draw(st.integers(1, 5))
    size = st.one_of(st.integers(1, 5), st.integers(1, 40))
    classes = draw(st.one_of(st.integers(1, 6), st.integers(1, 100), st.sampled_from([512, 1300])))
    rest = [draw(size if i < 2 else st.integers(1, 4)) for i in range(rank - 1)]
    shape = (classes,) if rank == 1 else (rest[0], classes, *rest[1:])
    return {"case": Case(shape, reduction=draw(st.sampled_from(REDUCTIONS)),
                         **BODIES[draw(st.sampled_from(list(BODIES)))]),
            "order": tuple(draw(st.permutations(range(rank)))),
            "pad": tuple(draw(st.sampled_from([0, 0, 0, 1, 2])) for _ in range(rank)),
            "step": draw(st.sampled_from([1, 1, 1, 1, 2])), "offset": draw(st.integers(0, 9)),
            "dtype": draw(st.sampled_from(list(DTYPES))), "kind": draw(st.sampled_from(REGIMES)),
            "special": draw(st.sampled_from([None, None, NAN, INF, -INF, 1e4])),
            "seed": draw(st.integers(0, 2**16))}


def strided(x, order, pad, step, offset):
    """A copy of x whose dimensions lie in memory in the given order, with gaps and an offset."""
    sizes = [x.shape[d] + pad[d] for d in order]
    sizes[-1] *= step
    buffer = torch.full((math.prod(sizes) + offset,), 5.0).to(x.dtype)
    view = buffer[offset:].view(sizes)[..., ::step]
    view = view[tuple(slice(0, x.shape[d]) for d in order)]
    return view.permute([order.index(d) for d in range(x.dim())]).copy_(x)


@pytest.mark.parametrize("name", ISAS)
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(problem=problems())
def test_random_problem(name, problem):
    if name not in wce_torch.cpu_isas():
        pytest.skip(f"{name} is not supported by this build, processor or system")
    x, target, options = problem["case"].build(DTYPES[problem["dtype"]], seed=problem["seed"])
    if problem["special"] is not None:
        x.view(-1)[problem["seed"] % x.numel()] = problem["special"]
    memory = [problem[key] for key in ("order", "pad", "step", "offset")]
    placed = strided(x, *memory)
    if target.shape == x.shape:
        target = strided(target, *memory)
    before = wce_torch.get_cpu_isa()
    wce_torch.set_cpu_isa(name)
    _C.force_cpu_regime(None if problem["kind"] == "auto" else problem["kind"])
    try:
        check(ce, placed, target, options, steps=40)
    finally:
        _C.force_cpu_regime(None)
        wce_torch.set_cpu_isa(before)


def test_random_problems_reach_what_they_should():
    """The generator is not blind: it draws every rank, body, regime and layout kind."""
    seen = set()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(problem=problems())
    def collect(problem):
        case = problem["case"]
        seen.update({("rank", len(case.shape)), ("dtype", problem["dtype"]),
                     ("regime", problem["kind"]), ("reduction", case.reduction),
                     ("body", replace(case, shape=(), reduction=""))})

    collect()
    assert len(seen) == 5 + 4 + 4 + 3 + len(BODIES)


# ---- more than 2^31 elements ---------------------------------------------------------------------

HUGE = {
    "rows": (32_770, 65_536), "planes": (3, 19, 6144, 6146), "narrow": (2**31 // 5 + 77, 5),
}
assert all(math.prod(shape) > 2**31 for shape in HUGE.values())
PERIOD = 61


def huge_logits(shape, dtype, pattern):
    """Logits that repeat a pattern (PERIOD, C) along the rows or positions, and which row of the
    pattern stands at each position (uint8)."""
    x = torch.empty(shape, dtype=dtype)
    per_sample = math.prod(shape[2:])
    rows = shape[0] if len(shape) == 2 else per_sample
    which = torch.arange(PERIOD, dtype=torch.uint8).repeat(rows // PERIOD + 1)[:rows]
    if len(shape) == 2:
        for start in range(0, shape[0], PERIOD * 64):
            part = x[start:start + PERIOD * 64]
            part.copy_(pattern.repeat(64, 1)[: len(part)])
        return x, which
    wide = pattern.T.repeat(1, per_sample // PERIOD + 1)[:, :per_sample]
    for image in x.view(shape[0], shape[1], per_sample):
        image.copy_(wide)
    return x, which.repeat(shape[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", HUGE)
def test_more_than_two_to_the_31_elements(name, dtype):
    """Loss of every row and gradient of chosen rows, against the pattern's own reference; 4.3 GB
    of logits and as much of gradient."""
    shape, classes = HUGE[name], HUGE[name][1]
    pattern = torch.randn(PERIOD, classes, generator=torch.Generator().manual_seed(3))
    pattern = pattern.to(DTYPES[dtype])
    x, which = huge_logits(shape, DTYPES[dtype], pattern)
    positions = which.numel()
    y = torch.arange(positions).mul_(7).remainder_(classes)
    loss = ce(x.requires_grad_(), y.view(shape[0], *shape[2:]), reduction="none")
    log_p = torch.log_softmax(pattern.double(), 1)
    for start in range(0, positions, 1 << 24):
        part = slice(start, start + (1 << 24))
        assert_near(loss.detach().reshape(-1)[part], -log_p[which[part].long(), y[part]], 10)
    loss.backward(torch.ones((), dtype=x.dtype).expand(loss.shape))
    picks = torch.tensor([0, 1, positions // 3, positions // 2, positions - 2, positions - 1])
    per_sample = positions // shape[0]
    rows = x.grad.view(shape[0], classes, -1)[picks // per_sample, :, picks % per_sample]
    want = torch.exp(log_p[which[picks].long()])
    want[torch.arange(len(picks)), y[picks]] -= 1
    assert_near(rows, want, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_one_row_of_more_than_two_to_the_31_classes(dtype):
    """The target is the last class. A chunk of the row is added up in fp32: 1e-4 is far below the
    error of any wrong offset, which would leave out or repeat whole chunks."""
    classes = 2**31 + 4099
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype])
    x = torch.empty(1, classes, dtype=block.dtype)
    for start in range(0, classes, block.numel()):
        part = x[0, start:start + block.numel()]
        part.copy_(block[: part.numel()])
    x[0, -1] = 3.0
    times, rest = divmod(classes - 1, block.numel())
    e = torch.exp(block.double())
    total = times * e.sum() + e[:rest].sum() + math.exp(3.0)
    with torch.autocast("cpu", torch.bfloat16):  # loss in fp32
        loss = ce(x.requires_grad_(), torch.tensor([classes - 1]))
    torch.testing.assert_close(loss.double(), torch.log(total) - 3.0, rtol=0, atol=1e-4)
    (loss * 2.0**20).backward()  # into the range of float16
    picks = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**31 + 1, classes - 2])
    want = torch.exp(x.detach()[0, picks].double()) / total * 2**20
    torch.testing.assert_close(x.grad[0, picks].double(), want, rtol=2**-8, atol=2.0**-24)
    assert x.grad[0, -1].double() == -(2.0**20) or x.grad[0, -1] == -INF  # beyond float16

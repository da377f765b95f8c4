"""Float64 reference of the loss, its gradients and its row outputs, and the grid of cases.

Written from the formula, row by row, with nothing but max, exp, log and sums; it calls no loss of
torch and nothing of wce_torch. One row has logits x[0..C), and x_c := x_c + tau*log(prior_c):

    m = max_c x_c        L = log(sum_c exp(x_c - m))        p_c = exp(x_c - m - L)
    a_c = w_c * (spike*[c = y] + floor + soft*q_c)          A = sum_c a_c
    loss = s * (A*L - sum_c a_c*(x_c - m))
    dx_c = k*s*(A*p_c - a_c) + h*p_c + u*([c = y] - p_c)

with k the upstream gradient of the row (already divided by the mean's denominator).
"""

import itertools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


def to_rows(t):
    """(C), (N, C) or (N, C, d1, ...) -> (rows, C); a row is one sample or position."""
    if t.dim() < 2:
        return t.reshape(1, t.numel())
    return t.movedim(1, -1).reshape(math.prod(position_shape(t.shape)), t.shape[1])


def from_rows(rows, shape):
    """The inverse of to_rows for a tensor of the given shape."""
    if len(shape) < 2:
        return rows.reshape(shape)
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def position_shape(shape):
    """Shape of the index target that belongs to logits of this shape."""
    return tuple(shape[:1]) + tuple(shape[2:]) if len(shape) > 1 else ()


def log_prior_of(class_prior, tau):
    """tau*log q with q normalised; tau = 0 switches the prior off, also where q is 0."""
    q = class_prior.double()
    return torch.zeros_like(q) if tau == 0 else tau * torch.log(q / q.sum())


def reference(x, target, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0,
              class_prior=None, tau=1.0, sample_weight=None, mask=None, skip_empty_targets=False,
              normalizer=None, empty="nan", grad=1.0, grad_lse=None, grad_log_prob=None):
    """Everything that the product computes, in float64, as one namespace.

    x: (C), (N, C) or (N, C, d1, ...); target: the positions' shape (classes) or x's shape
    (probabilities). grad is the upstream gradient: a number or, for 'none', one per position.
    Returned: loss, dx, dprob, dweight, dsample_weight, denominator, counts, rows (loss per
    position before the reduction), lse, log_prob, entropy, correct, max and log_sum; loss_scale
    and dx_scale: size of the terms behind each value, for assert_near.
    """
    shape, positions = tuple(x.shape), position_shape(x.shape)
    z = to_rows(x.detach().double())
    rows, classes = z.shape
    smooth = label_smoothing if label_smoothing > 0 else 0.0
    floor = smooth / classes if classes else math.nan * smooth
    if class_prior is not None:
        z = z + log_prior_of(class_prior, tau)

    w = torch.ones(classes).double() if weight is None else weight.detach().double().reshape(-1)
    w = w.to(z.device)
    s = (torch.ones(rows, device=z.device).double() if sample_weight is None
         else sample_weight.detach().double().reshape(rows))
    counts = torch.ones(rows, dtype=torch.bool, device=z.device)
    if mask is not None:
        counts &= mask.reshape(rows)

    is_soft = tuple(target.shape) == shape
    onehot = torch.zeros(rows, classes, dtype=torch.float64, device=z.device)
    if is_soft:
        q = to_rows(target.detach().double())
        part = q * (1 - smooth) + floor
        if skip_empty_targets:
            counts &= (q != 0).any(1)
        named = counts.clone()
        row_weight = torch.ones(rows, device=z.device).double()
        y = None
    else:
        y = target.reshape(rows).long()
        counts &= y != ignore_index
        named = y != ignore_index
        assert ((y >= 0) & (y < classes) | ~named).all(), "the case itself is out of range"
        y = torch.where(named, y, 0)
        if classes:
            onehot[torch.arange(rows, device=z.device)[named], y[named]] = 1
        part = (1 - smooth) * onehot + floor
        row_weight = torch.zeros(rows, device=z.device).double()
        row_weight[counts] = w[y[counts]] if classes else 0.0
    a = torch.where(part == 0, 0.0, w * part)

    # Statistics of each row. A row with nan, with +inf, or of -inf alone is nan as a whole.
    if classes:
        m = z.amax(1)
        t = z - m[:, None]
        e = torch.exp(t)
        big_l = torch.log(e.sum(1))
        p = e / e.sum(1, keepdim=True)
        bad = torch.isnan(z).any(1) | torch.isinf(m)
    else:
        m = torch.full((rows,), -math.inf, dtype=torch.float64)
        t, p, big_l, bad = z, z, m, torch.zeros(rows, dtype=torch.bool)
    big_a = a.sum(1)
    plain = torch.where(big_a == 0, 0.0, big_a * big_l) - torch.where(a == 0, 0.0, a * t).sum(1)
    plain = torch.where(bad, math.nan, plain)
    plain = torch.where(counts, plain, 0.0)
    loss_rows = torch.where(counts, s * plain, 0.0)

    # Reduction. The denominator never depends on the class weights of soft targets.
    # Where its own denominator is 0 the mean is nan, whatever smoothing adds to the sum.
    own_denominator = torch.where(counts, s * row_weight, 0.0).sum()
    denominator = torch.where(own_denominator == 0, math.nan, own_denominator)
    if normalizer is not None:
        denominator = torch.as_tensor(normalizer, dtype=torch.float64)
    if reduction == "none":
        loss, per_row = loss_rows.reshape(positions), 1.0
    elif reduction == "sum":
        loss, per_row = loss_rows.sum(), 1.0
    else:
        loss = loss_rows.sum() / denominator
        per_row = 1.0 / denominator
        if empty == "zero" and not counts.any():
            loss = torch.zeros_like(loss)
    k = torch.as_tensor(grad, dtype=torch.float64, device=z.device).detach() * per_row
    k = k.reshape(rows) if k.dim() and reduction == "none" else k.expand(rows)
    ks = torch.where(counts, k * s, 0.0)

    dx = ks[:, None] * (big_a[:, None] * p - a)
    dx = torch.where(bad[:, None], math.nan, dx)
    dx = torch.where(counts[:, None], dx, 0.0)
    if grad_lse is not None:
        dx = dx + grad_lse.double().reshape(rows, 1) * torch.where(bad[:, None], math.nan, p)
    if grad_log_prob is not None:
        u = torch.where(named, grad_log_prob.double().reshape(rows), 0.0)[:, None]
        dx = dx + torch.where(u == 0, 0.0, u * (onehot - p))

    lp = torch.where(bad[:, None], math.nan, t - big_l[:, None])
    dprob = dweight = None
    if is_soft:
        slope = torch.where((w == 0) & ~bad[:, None], 0.0, (1 - smooth) * w * lp)
        dprob = torch.where(counts[:, None], -ks[:, None] * slope, 0.0)
        # A class without a part of its row adds nothing, also where its logit is -inf.
        terms = torch.where((part == 0) & ~bad[:, None], 0.0, part * lp)
        dweight = -torch.where(counts[:, None], ks[:, None] * terms, 0.0).sum(0)
        dprob = from_rows(dprob, shape)
    ds = k * plain
    if reduction == "mean" and normalizer is None:
        ds = k * (plain - row_weight * (loss_rows.sum() / denominator))
    ds = torch.where(counts, ds, 0.0).reshape(positions)

    # Sizes of the terms that were added up: rounding errors are relative to these.
    reach = t.abs() if class_prior is None else t.abs() + z.abs() + m.abs()[:, None]
    reach = torch.where(p > 0, 1 + reach, 1.0)
    abs_a = a.abs().sum(1)
    row_scale = s.abs() * (abs_a * (1 + big_l.abs())
                           + torch.where(a == 0, 0.0, a.abs() * reach).sum(1))
    row_scale = torch.where(counts & torch.isfinite(row_scale), row_scale, 0.0)
    loss_scale = row_scale.reshape(positions)
    condition = 1.0
    if reduction != "none":
        loss_scale = row_scale.sum()
    if reduction == "mean":
        if normalizer is None:
            condition = torch.where(counts, (s * row_weight).abs(), 0.0).sum() / denominator.abs()
        loss_scale = loss_scale / denominator.abs() + condition * torch.nan_to_num(loss.abs())
    dx_scale = condition * ks.abs()[:, None] * (abs_a[:, None] * p * reach + a.abs())
    finite_or = lambda v: torch.nan_to_num(torch.as_tensor(v), 0.0, 0.0, 0.0)  # noqa: E731

    lse = m + big_l
    entropy = big_l - torch.where(p == 0, 0.0, p * t).sum(1)
    picked = (lambda v: v.gather(1, y[:, None])[:, 0]) if y is not None and classes else None
    log_prob = torch.where(named, picked(lp), 0.0).reshape(positions) if picked else None
    correct = (named & (picked(z) == m)).reshape(positions) if picked else None
    return SimpleNamespace(
        loss=loss, dx=from_rows(dx, shape), dprob=dprob, dweight=dweight, dsample_weight=ds,
        loss_scale=finite_or(loss_scale), dx_scale=from_rows(finite_or(dx_scale), shape),
        denominator=denominator, own_denominator=own_denominator,
        counts=counts.reshape(positions), rows=loss_rows.reshape(positions), max=m, log_sum=big_l,
        lse=torch.where(bad, math.nan, lse).reshape(positions), log_prob=log_prob,
        entropy=torch.where(bad, math.nan, entropy).reshape(positions), correct=correct)


def mixed_reference(x, a, b, lam, reduction="mean", **options):
    """lam*ce(a) + (1-lam)*ce(b) in float64, each half with its own denominator: loss and gradient.

    lam: a number, or one per sample or position.
    """
    lam = torch.as_tensor(lam, dtype=torch.float64)
    lam = lam.reshape(lam.shape + (1,) * (a.dim() - lam.dim())) if lam.dim() else lam
    totals, dxs = 0.0, 0.0
    for target, share in ((a, lam), (b, 1 - lam)):
        scale = share.expand(a.shape)
        if reduction == "none":
            part = reference(x, target, reduction="none", grad=scale, **options)
            totals, dxs = totals + scale * part.loss, dxs + part.dx
            continue
        part = reference(x, target, reduction="none", **options)
        denominator = 1.0
        if reduction == "mean":
            denominator = reference(x, target, reduction="mean", **options).denominator
        totals = totals + (scale * part.loss).sum() / denominator
        dxs = dxs + reference(x, target, reduction="none", grad=scale / denominator, **options).dx
    return totals, dxs


# ---- layouts -------------------------------------------------------------------------------------
# Each takes a contiguous tensor (N, C, d1, ...) and returns one of equal values and other strides.


def _place(x, storage_shape, view):
    """Copy x into a part of a fresh, larger buffer of a recognisable filling."""
    buffer = torch.full(storage_shape, 7.0, dtype=x.dtype, device=x.device)
    part = view(buffer)
    assert part.shape == x.shape
    part.copy_(x)
    return part


def _misaligned(x):
    """The base pointer stands one element behind an aligned address."""
    return _place(x, (x.numel() + 1,), lambda b: b[1:].view(x.shape))


def _padded_last(x):
    """The last dimension has stride 1 and a gap of 3 elements behind it."""
    return _place(x, (*x.shape[:-1], x.shape[-1] + 3), lambda b: b[..., :x.shape[-1]])


def _class_last(x):
    """Class dimension contiguous: channels_last of any rank."""
    if x.dim() < 3:
        return x.contiguous()
    order = [0, *range(2, x.dim()), 1]
    back = [0, x.dim() - 1, *range(1, x.dim() - 1)]
    return x.permute(order).contiguous().permute(back)


def _class_first(x):
    """Positions of the whole batch contiguous: memory order C, N, d1, ..."""
    if x.dim() < 2:
        return x.contiguous()
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _shifted(x):
    """What a language model hands over: (B, T+1, V)[:, :-1].transpose(1, 2)."""
    if x.dim() != 3:
        return _padded_last(_class_last(x)) if x.dim() < 3 else _class_last(x)
    n, c, t = x.shape
    return _place(x, (n, t + 1, c), lambda b: b[:, :-1].transpose(1, 2))


def _strided(x):
    """No dimension has stride 1: every second element."""
    return _place(x, (*x.shape[:-1], 2 * x.shape[-1]), lambda b: b[..., ::2])


LAYOUTS = {
    "plain": lambda x: x.contiguous(),
    "misaligned": _misaligned,
    "padded": _padded_last,
    "class_last": _class_last,
    "class_first": _class_first,
    "shifted": _shifted,
    "strided": _strided,
}


def as_layout(x, name):
    return LAYOUTS[name](x) if x.dim() else x


# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One choice of shape and options; build() draws the tensors."""

    shape: tuple
    soft: bool = False
    weight: str = "none"  # none, positive, signed
    smoothing: float = 0.0
    ignore: str = "default"  # default: -100 occurs; inside: class 1; outside: 255 occurs; unused
    reduction: str = "mean"
    prior: bool = False
    sample_weight: bool = False
    mask: bool = False
    skip_empty: bool = False
    normalizer: bool = False
    empty: str = "nan"

    @property
    def id(self):
        words = ["x".join(map(str, self.shape)), "soft" if self.soft else "index", self.reduction]
        words += [f"w_{self.weight}"] * (self.weight != "none")
        words += [f"e{self.smoothing:g}"] * (self.smoothing != 0)
        words += [f"ignore_{self.ignore}"] * (not self.soft and self.ignore != "default")
        flags = ("prior", "sample_weight", "mask", "skip_empty", "normalizer")
        words += [name for name in flags if getattr(self, name)]
        words += [f"empty_{self.empty}"] * (self.empty != "nan")
        return "-".join(words)

    @property
    def native(self):
        """True when torch's own loss has every option that is used here."""
        return not (self.prior or self.sample_weight or self.mask or self.skip_empty
                    or self.normalizer or self.empty != "nan")

    def build(self, dtype=torch.float64, device="cpu", seed=0, scale=2.0):
        """(logits, target, options); options are keyword arguments of cross_entropy and of
        reference alike. Options are in float32 for 16-bit logits, else in the logits' dtype."""
        gen = torch.Generator().manual_seed(seed * 7919 + sum(self.shape))
        classes = self.shape[1] if len(self.shape) > 1 else self.shape[0]
        positions = position_shape(self.shape)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        draw = lambda *s: torch.rand(s, generator=gen, dtype=torch.float64)  # noqa: E731

        x = (scale * torch.randn(self.shape, generator=gen, dtype=torch.float64)).to(dtype)
        options = {"reduction": self.reduction, "label_smoothing": self.smoothing}
        if self.soft:
            logits = torch.randn(self.shape, generator=gen, dtype=torch.float64)
            target = from_rows(torch.softmax(to_rows(logits), 1), self.shape).to(wide).contiguous()
            if self.skip_empty and len(positions):
                drop = from_rows((draw(math.prod(positions), 1) < 0.3).expand(-1, classes),
                                 self.shape)
                target = torch.where(drop, torch.zeros_like(target), target)
        else:
            target = torch.randint(classes, positions, generator=gen)
            options["ignore_index"] = {"inside": 1, "outside": 255}.get(self.ignore, -100)
            if self.ignore in ("default", "outside") and len(positions):
                drop = torch.rand(positions, generator=gen) < 0.3
                target = target.masked_fill(drop, options["ignore_index"])
        if self.weight != "none":
            w = draw(classes) + 0.25
            if self.weight == "signed":
                w = w * torch.where(draw(classes) < 0.25, -1.0, 1.0) * 3
            options["weight"] = w.to(wide)
        if self.prior:
            options["class_prior"] = (100 * draw(classes) + 1).to(wide)
            options["tau"] = 0.75
        if self.sample_weight:
            options["sample_weight"] = (draw(*positions) + 0.1).to(wide)
        if self.mask:
            options["mask"] = draw(*positions) < 0.7
        if self.skip_empty:
            options["skip_empty_targets"] = True
        if self.normalizer:
            options["normalizer"] = 3.25
        if self.empty != "nan":
            options["empty"] = self.empty
        move = lambda v: v.to(device) if isinstance(v, torch.Tensor) else v  # noqa: E731
        return x.to(device), target.to(device), {k: move(v) for k, v in options.items()}

    def upstream(self, dtype=torch.float64, device="cpu", seed=0):
        """An upstream gradient: one value, or one per position for 'none'."""
        gen = torch.Generator().manual_seed(seed + 31)
        size = position_shape(self.shape) if self.reduction == "none" else ()
        return torch.randn(size, generator=gen, dtype=torch.float64).to(dtype).to(device)


SHAPES = ((5,), (6, 5), (3, 5, 4), (2, 5, 3, 2), (2, 4, 2, 3, 2), (2, 3, 2, 1, 2, 2))
REDUCTIONS = ("none", "mean", "sum")
WEIGHTS = ("none", "positive", "signed")

# What torch's loss knows: every combination.
INDEX_CASES = [Case(s, weight=w, smoothing=e, ignore=i, reduction=r) for s, w, e, i, r in
               itertools.product(SHAPES, WEIGHTS, (0.0, 0.1, 0.7, 1.0),
                                 ("default", "inside", "outside", "unused"), REDUCTIONS)]
SOFT_CASES = [Case(s, soft=True, weight=w, smoothing=e, reduction=r) for s, w, e, r in
              itertools.product(SHAPES, WEIGHTS, (0.0, 0.1, 0.7, 1.0), REDUCTIONS)]
NATIVE_CASES = INDEX_CASES + SOFT_CASES

# What is added to it: each option alone, chosen pairs, and all of them together.
_SETS = ({"prior": True}, {"sample_weight": True}, {"mask": True}, {"normalizer": True},
         {"empty": "zero"}, {"prior": True, "sample_weight": True},
         {"mask": True, "sample_weight": True}, {"mask": True, "normalizer": True},
         {"prior": True, "sample_weight": True, "mask": True, "empty": "zero"})
_BODIES = (Case((6, 5)), Case((6, 5), weight="positive", smoothing=0.1),
           Case((6, 5), weight="positive"), Case((6, 5), soft=True),
           Case((6, 5), soft=True, weight="positive", smoothing=0.1))
FEATURE_CASES = [replace(b, shape=s, reduction=r, **options) for b, s, r, options in
                 itertools.product(_BODIES, ((5,), (6, 5), (2, 5, 3, 2)), REDUCTIONS, _SETS)
                 if r == "mean" or "normalizer" not in options]
FEATURE_CASES += [replace(b, shape=s, reduction=r, skip_empty=True, **options)
                  for b, s, r, options in
                  itertools.product(_BODIES[3:], ((6, 5), (2, 5, 3, 2)), REDUCTIONS, ({}, *_SETS))
                  if r == "mean" or "normalizer" not in options]

# A few of each, for expensive checks (compilation, gradcheck, opcheck, transforms).
SMALL_CASES = [
    Case((6, 5)), Case((6, 5), weight="positive"), Case((5,), reduction="sum"),
    Case((3, 5, 4), weight="positive", reduction="none"),
    Case((2, 5, 3, 2), smoothing=0.1, ignore="inside"),
    Case((6, 40), weight="signed", smoothing=0.7, ignore="outside", reduction="none"),
    Case((6, 5), soft=True, weight="positive"), Case((5,), soft=True, reduction="sum"),
    Case((2, 5, 3, 2), soft=True, smoothing=0.1, reduction="none"),
]
SMALL_FEATURE_CASES = [
    Case((6, 5), prior=True), Case((6, 40), weight="positive", sample_weight=True),
    Case((2, 5, 3, 2), mask=True, smoothing=0.1, weight="positive"),
    Case((6, 5), normalizer=True, weight="positive"), Case((6, 5), empty="zero"),
    Case((6, 5), soft=True, skip_empty=True, sample_weight=True, weight="positive"),
    Case((2, 5, 3, 2), soft=True, prior=True, mask=True, smoothing=0.1, reduction="none"),
    Case((6, 5), prior=True, sample_weight=True, mask=True, weight="positive", reduction="sum"),
]


def case_ids(cases):
    return [case.id for case in cases]


# ---- running a loss ------------------------------------------------------------------------------


def run(loss_fn, x, target, options, grad=None, soft_grads=True):
    """One forward and backward of loss_fn: (loss, dx, dprob or None, dweight or None)."""
    x = x.detach().requires_grad_()
    options = dict(options)
    weight = options.get("weight")
    if target.shape == x.shape and soft_grads:
        target = target.detach().requires_grad_()
        if weight is not None:
            weight = options["weight"] = weight.detach().requires_grad_()
    loss = loss_fn(x, target, **options)
    loss.backward(torch.ones_like(loss) if grad is None else grad.to(loss.dtype))
    dprob = target.grad if target.requires_grad else None
    dweight = weight.grad if weight is not None and weight.requires_grad else None
    return loss.detach(), x.grad, dprob, dweight


def check(loss_fn, x, target, options, grad=None, steps=16.0, soft_grads=False):
    """Loss and gradients of loss_fn against the reference. dx is compared for any target; dprob
    and dweight on request. Returns the reference."""
    loss, dx, dprob, dweight = run(loss_fn, x, target, options, grad, soft_grads)
    upstream = 1.0 if grad is None else grad.to(loss.dtype)
    want = reference(x, target, **options, grad=upstream)
    assert dx.dtype == x.dtype and not loss.requires_grad
    assert_near(loss, want.loss, want.loss_scale, steps, "loss")
    assert_near(dx, want.dx, want.dx_scale, steps, "gradient of the logits")
    if dprob is not None:
        size = want.dprob.abs().nan_to_num(0, 0, 0).max() if want.dprob.numel() else 0.0
        assert_near(dprob, want.dprob, size, steps, "gradient of the target")
    if dweight is not None:
        size = want.dweight.abs().nan_to_num(0, 0, 0).max()
        assert_near(dweight, want.dweight, 4 * size, steps, "gradient of the weight")
    return want


# ---- comparison ----------------------------------------------------------------------------------

# Largest relative error of rounding an exact value to the type: half a unit in the last place.
HALF_ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8,
            torch.float16: 2.0**-11}
# What may be lost at the lower end. exp gives an exact 0 below the smallest normal number of the
# arithmetic, 2^-126 or 2^-1022, instead of a subnormal; f16 rounds to multiples of 2^-24.
TINY = {torch.float64: 2.0**-1021, torch.float32: 2.0**-125, torch.bfloat16: 2.0**-125,
        torch.float16: 2.0**-25}


def same_bits(a, b):
    """Equal in every bit, nan included; types and shapes too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.detach().contiguous().view(ints), b.detach().contiguous().view(ints))


def assert_near(got, want, scale=1.0, steps=16.0, message=""):
    """got (any dtype) is the float64 tensor want, up to arithmetic in fp32 (fp64 for float64)
    and one rounding to got's dtype.

    scale: size of the terms that were added up to get the value (cancellation leaves an error of
    that size times the arithmetic's precision). steps: how many roundings of that arithmetic;
    16 covers exp (2), the sum (few, it is blocked), log, products and the final subtraction.
    nan and infinities must stand at the same places.
    """
    got_wide, want = got.detach().double().cpu(), want.detach().double().cpu()
    scale = torch.as_tensor(scale).double().cpu()
    assert got.shape == want.shape, f"{message} shape {tuple(got.shape)} != {tuple(want.shape)}"
    arithmetic = HALF_ULP[torch.float64 if got.dtype == torch.float64 else torch.float32]
    rounding = HALF_ULP[got.dtype] if got.dtype.itemsize == 2 else 0.0
    finite = torch.isfinite(want)
    limit = torch.finfo(got.dtype).max
    want = torch.where(finite & (want.abs() > limit * (1 + HALF_ULP[got.dtype])),
                       torch.copysign(torch.tensor(math.inf).double(), want), want)
    finite &= torch.isfinite(want)
    same = (got_wide == want) | (torch.isnan(got_wide) & torch.isnan(want))
    allowed = steps * arithmetic * (scale + want.abs()) + rounding * 1.001 * want.abs()
    allowed = allowed + TINY[got.dtype]
    wrong = ~torch.where(finite, (got_wide - want).abs() <= allowed, same)
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{message} {int(wrong.sum())} of {wrong.numel()} differ; first at {at}: "
            f"got {got_wide[tuple(at)].item()!r}, expected {want[tuple(at)].item()!r}, "
            f"allowed difference {allowed.expand_as(want)[tuple(at)].item():.3g}")


class Batch:
    """Many small problems of one dtype: each is run by itself, all results are compared at once.

    add() takes the arguments of a loss and, where known, its reference (of any shape with the same
    order of elements). verify() runs them; after a failure it names the problem.
    """

    def __init__(self):
        self.problems, self.sums = [], None

    def add(self, name, x, target, options, want=None, steps=16.0):
        want = want or reference(x, target, **options)
        flat = lambda v, like: torch.as_tensor(v).expand(like.shape).reshape(-1)  # noqa: E731
        parts = (want.loss.reshape(-1), flat(want.loss_scale, want.loss), want.dx.reshape(-1),
                 flat(want.dx_scale, want.dx))
        self.problems.append((name, x, target, options, parts, steps))
        self.sums = None
        return want

    def _groups(self):
        """Wanted values by type of the loss: a soft target can raise it."""
        if self.sums is None:
            self.sums = {}
            for _, x, target, options, parts, steps in self.problems:
                kind = x.dtype
                if target.shape == x.shape:
                    kind = torch.promote_types(kind, target.dtype)
                    if options.get("weight") is not None:
                        kind = torch.promote_types(kind, options["weight"].dtype)
                group = self.sums.setdefault(kind, ([], [], [], [], [], []))
                rows = (*parts, torch.full_like(parts[0], steps), torch.full_like(parts[2], steps))
                for column, value in zip(group, rows):
                    column.append(value)
            self.sums = {k: [torch.cat(column) for column in group]
                         for k, group in self.sums.items()}
        return self.sums

    def verify(self, loss_fn):
        groups = self._groups()
        got = {kind: ([], []) for kind in groups}
        results = []
        for name, x, target, options, _, _ in self.problems:
            loss, dx, _, _ = run(loss_fn, x, target, options, soft_grads=False)
            assert loss.dtype in got, f"{name}: result of type {loss.dtype}"
            got[loss.dtype][0].append(loss.reshape(-1))
            got[loss.dtype][1].append(dx.reshape(-1))
            results.append((loss, dx))
        try:
            for kind, (loss, loss_scale, dx, dx_scale, loss_steps, dx_steps) in groups.items():
                assert_near(torch.cat(got[kind][0]), loss, loss_scale, loss_steps)
                assert_near(torch.cat(got[kind][1]), dx, dx_scale, dx_steps)
        except AssertionError:
            for (name, _, _, _, parts, steps), (loss, dx) in zip(self.problems, results):
                assert_near(loss.reshape(-1), parts[0], parts[1], steps, f"{name} loss:")
                assert_near(dx.reshape(-1), parts[2], parts[3], steps, f"{name} gradient:")
            raise

"""The loss in plain PyTorch operations: the definition of everything that the kernels compute.

Calls that the kernels cannot serve come here: gradients of gradients, forward-mode AD, transforms
of ``torch.func``, gradients with respect to soft targets and weights, devices without kernels. It
holds several tensors of the logits' size, which the kernels avoid; apart from that, every option
is here, and it is written to be read.

Letters, for one row with logits ``x`` over C classes (dimension 0 of 1-D logits, else 1)::

    x := x + log_prior              m = max x      L = log sum exp(x - m)
    a  = w * (spike*[c = y] + floor + soft*q)      A = sum a
    loss = s * (A*L - sum a*(x - m))

Two things differ from the formula as torch would evaluate it: a row that does not count is exactly
0 and so is its gradient, whatever its logits hold; and a class with ``a = 0`` adds nothing where
its logit is -inf. See the README for what differs from ``torch.nn.functional.cross_entropy``.
"""

import torch

NONE, MEAN, SUM = 0, 1, 2
_LIBRARY = torch.library.Library("wce", "IMPL")


def composite(
    input,
    target,
    weight=None,
    reduction=MEAN,
    ignore_index=-100,
    label_smoothing=0.0,
    *,
    log_prior=None,
    sample_weight=None,
    mask=None,
    normalizer=None,
    empty_zero=False,
    skip_empty=False,
    out_fp32=False,
    target2=None,
    mix=None,
):
    """The loss; arguments as in the schema of ``wce::cross_entropy``."""
    soft = input.shape == target.shape
    smoothing = label_smoothing if label_smoothing > 0 else 0.0  # also when it is nan
    classes = input.shape[_class_dim(input)]
    coefficients = {
        "spike": 0.0 if soft else 1.0 - smoothing,
        "floor": smoothing / classes if smoothing and classes else 0.0,
        "soft": 1.0 - smoothing if soft else 0.0,
    }
    if not classes and normalizer is None:
        normalizer = input.new_zeros(())  # the mean over no classes is nan, as in torch

    def part(target, share=None):
        """The loss of one target, times its share of a mixture."""
        index, prob = (None, target) if soft else (target, None)
        counts = _counting_rows(input, index, prob, mask, ignore_index, skip_empty)
        x = _Shifted(input, log_prior, counts)
        rows = _row_losses(x, index, prob, weight, **coefficients)
        if share is not None:
            share = share if share.dim() == 0 else share.reshape(rows.shape)
            rows = torch.where(counts, rows * share, 0.0)
        return _reduced(
            rows, counts, index, weight, sample_weight, normalizer, reduction, empty_zero
        )

    if target2 is None:
        loss = part(target)
    else:
        mix = mix.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
        loss = part(target, mix) + part(target2, 1 - mix)
    return loss.to(result_type(input, target, weight, soft, out_fp32))


def rows_composite(
    input,
    target,
    target_prob,
    weight,
    log_prior,
    mask,
    spike,
    floor,
    soft,
    ignore_index,
    skip_empty,
    entropy,
    *,
    sample_weight=None,
    normalizer=None,
    reduction=NONE,
    empty_zero=False,
):
    """What one pass knows of each row; arguments and results as in ``wce::rows_forward``, but
    ``stats`` is empty."""
    counts = _counting_rows(input, target, target_prob, mask, ignore_index, skip_empty)
    x = _Shifted(input, log_prior, counts)
    rows = _row_losses(x, target, target_prob, weight, spike, floor, soft)
    index = target if target_prob is None else None
    loss = _reduced(rows, counts, index, weight, sample_weight, normalizer, reduction, empty_zero)
    # lse and entropy are those of every row, counted or not
    every = _Shifted(input, log_prior, None)
    lse = every.max + every.log_sum
    nothing = lse.new_empty(0)
    results = [loss, nothing, lse, nothing, nothing, nothing.to(torch.bool)]
    if target is not None:
        results[3] = _log_prob(input, log_prior, target, ignore_index)
        with torch.no_grad():
            y = target.long().reshape(lse.shape)
            picked = _pick(every.x, _class_or_zero(y, ignore_index))
            results[5] = (picked == every.max) & (y != ignore_index)
    if entropy:
        with torch.no_grad():
            p = (every.shifted - every.log_sum.unsqueeze(every.dim)).exp()
            terms = torch.where(p == 0, 0.0, p * every.shifted)
            results[4] = every.log_sum - terms.sum(every.dim)
    return tuple(results)


# ---- the rows ----------------------------------------------------------------------------------


class _Shifted:
    """x - m and L of the rows that count; the other rows are read as zeros."""

    def __init__(self, input, log_prior, counts):
        self.dim = _class_dim(input)
        x = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
        if log_prior is not None:
            x = x + _along_classes(log_prior.to(x.dtype), x)
        if counts is not None:
            x = torch.where(counts.unsqueeze(self.dim), x, 0.0)
        self.counts, self.x = counts, x
        if x.shape[self.dim] == 0:  # no classes: nothing to add up
            self.max = self.log_sum = x.sum(self.dim)
            self.shifted = x
            return
        # The loss does not depend on m, so that no gradient has to pass through it.
        self.max = x.detach().amax(self.dim)
        self.shifted = x - self.max.unsqueeze(self.dim)
        self.log_sum = self.shifted.exp().sum(self.dim).log()


def _row_losses(x, target, prob, weight, spike, floor, soft):
    """A*L - sum a*(x - m), and 0 for rows that do not count."""
    loss = torch.zeros_like(x.log_sum)
    if target is not None and spike:
        y = torch.where(x.counts, target.long().reshape(x.counts.shape), 0)
        a = spike if weight is None else spike * _of_class(weight, y, loss.dtype)
        loss = loss + _minus_product(a, _pick(x.shifted, y)) + a * x.log_sum
    if floor or prob is not None:
        loss = loss + _dense_losses(x, prob, weight, floor, soft)
    return torch.where(x.counts, loss, 0.0)


def _dense_losses(x, prob, weight, floor, soft):
    """The part of the coefficients that every class has: a = w * (floor + soft*q)."""
    q = torch.full_like(x.shifted, floor)
    if prob is not None:
        q = q + soft * prob.to(q.dtype)
    w = q.new_ones(()) if weight is None else _along_classes(weight.to(q.dtype).reshape(-1), q)
    a = q * w
    terms = _minus_product(a, x.shifted)
    for factor, other in ((q, w), (w, q)):
        if factor.requires_grad:
            terms = terms + _slope_at_minus_inf(factor, other, x.shifted)
    return a.sum(x.dim) * x.log_sum + terms.sum(x.dim)


def _minus_product(a, shifted):
    """-a*(x - m), and 0 where a = 0 and x = -inf."""
    dead = torch.isneginf(shifted)
    if isinstance(a, torch.Tensor):
        dead = dead & (a == 0)
    elif a != 0:
        return -a * shifted
    return -a * torch.where(dead, 0.0, shifted)


def _slope_at_minus_inf(factor, other, shifted):
    """0, with an infinite slope in ``factor`` where it alone makes a = factor*other zero and
    x = -inf: if it grew from 0 there, the loss would be infinite."""
    steep = torch.isneginf(shifted) & (factor == 0) & (other != 0)
    growth = (factor - factor.detach()) * other.detach().sign()
    huge = torch.finfo(shifted.dtype).max
    return torch.where(steep, growth * huge * huge, 0.0)


def _log_prob(input, log_prior, target, ignore_index):
    """x_y - m - L; 0 where the target is ignored."""
    y = target.long().reshape(_row_shape(input))
    x = _Shifted(input, log_prior, y != ignore_index)
    picked = _pick(x.shifted, _class_or_zero(y, ignore_index)) - x.log_sum
    return torch.where(x.counts, picked, 0.0)


def _counting_rows(input, target, prob, mask, ignore_index, skip_empty):
    """Which rows enter sum and mean: bool, one per row."""
    counts = torch.ones(_row_shape(input), dtype=torch.bool, device=input.device)
    if target is not None:
        counts = counts & (target.long().reshape(counts.shape) != ignore_index)
    if mask is not None:
        counts = counts & mask.reshape(counts.shape)
    if skip_empty and prob is not None:
        dim = _class_dim(input)
        counts = counts & ((prob.detach().amax(dim) != 0) | (prob.detach().amin(dim) != 0))
    return counts


def _reduced(rows, counts, target, weight, sample_weight, normalizer, reduction, empty_zero):
    """The loss of each row, times its sample weight, or their mean or sum."""
    if sample_weight is not None:
        rows = torch.where(counts, rows * sample_weight.to(rows.dtype).reshape(rows.shape), 0.0)
    if reduction == NONE:
        return rows
    total = rows.sum()
    if reduction == SUM:
        return total
    if normalizer is None:
        denominator = own_denominator(
            _row_weights(counts, target, weight, sample_weight, rows.dtype).sum()
        )
    else:
        denominator = normalizer.to(rows.dtype).reshape(())
    mean = total / denominator
    return torch.where(counts.any(), mean, 0.0) if empty_zero else mean


def _row_weights(counts, target, weight, sample_weight, acc):
    """What each row adds to the mean's denominator: s*w_y for an index target, s for a soft one."""
    value = torch.ones((), dtype=acc, device=counts.device)
    if target is not None and weight is not None:
        y = torch.where(counts, target.long().reshape(counts.shape), 0)
        value = _of_class(weight, y, acc)
    if sample_weight is not None:
        value = value * sample_weight.to(acc).reshape(counts.shape)
    return torch.where(counts, value, 0.0)


def own_denominator(weight):
    """The mean's own denominator from the sum of the rows' weights. Where that is 0 the mean and
    its gradient are nan, as without smoothing (0/0): the smoothing term over 0 would be inf."""
    return torch.where(weight == 0, torch.nan, weight)


# ---- shapes and types --------------------------------------------------------------------------


def _class_dim(input):
    return 0 if input.dim() == 1 else 1


def _row_shape(input):
    return input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]


def _along_classes(vector, x):
    """(C) -> a shape that broadcasts against x."""
    return vector.reshape([-1] + [1] * (x.dim() - 2)) if x.dim() > 1 else vector


def _pick(x, y):
    dim = _class_dim(x)
    return x.gather(dim, y.unsqueeze(dim)).squeeze(dim)


def _of_class(weight, y, dtype):
    """weight[y]; that spelling would read the value of a 0-d y, which transforms forbid."""
    return weight.to(dtype).reshape(-1).gather(0, y.reshape(-1)).reshape(y.shape)


def _class_or_zero(y, ignore_index):
    return torch.where(y == ignore_index, 0, y)


def result_type(input, target, weight, soft, out_fp32):
    dtype = input.dtype
    if soft:
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return torch.promote_types(dtype, torch.float32) if out_fp32 else dtype


# Transforms and traces would take an operator without a kernel of its own for one piece.
for _key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode", "Tracer"):
    _LIBRARY.impl("composite", composite, _key)
    _LIBRARY.impl("rows_composite", rows_composite, _key)

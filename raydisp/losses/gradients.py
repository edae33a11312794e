r"""The losses themselves: value and gradient of each, for a few sequences at a time.

Every loss is a function of a `Batch` that returns its value per sequence and, if `batch.gradient` is there,
writes the gradient with respect to the tokens to it. The formulas stand in the docstrings of
`raydisp.losses`; here is how they are computed. Sums over pairs come from `raydisp.losses.pairwise`; the rest
is the chain rule by hand, which keeps no intermediate tensor alive and lets one custom operator hold it all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raydisp.losses.pairwise import (
    Tile,
    distance_stripe,
    extreme_pair,
    pair_sum,
    product,
    row_blocks,
    row_stripes,
    squared_product_sum,
)

LOG2_E = 1 / math.log(2)
OFFSET = 0.01  # the authors' code adds it to norms, to logarithms' values and inside log2
UNIT_FLOOR = 1e-6  # least norm that the comparison losses divide by

# How far below 1 exponentials may fall before they are computed relative to the largest: half of what the
# exponent of the narrowest format they pass through can hold, in powers of two.
EXPONENT_RANGE = {torch.float16: 12.0, torch.bfloat16: 100.0, torch.float32: 100.0, torch.float64: 900.0}


@dataclass
class Batch:
    """Some sequences, and what a loss needs to know about them.

    Attributes:
        tokens: [B, L, F] float32 or float64; rows that do not count are zero. Not to be modified.
        counts: [B], how many tokens count, in the dtype of the tokens.
        weights: [B, L], 1 where a token counts and 0 elsewhere; None where all count.
        gradient: [B, L, F] zeros to be filled, or None. Rows that do not count may be left with any finite
            number.
        product_dtype: what the factors of matrix products are rounded to; None for the dtype of the tokens.
    """

    tokens: Tensor
    counts: Tensor
    weights: Tensor | None
    gradient: Tensor | None
    product_dtype: torch.dtype | None
    temperature: float
    clamp: float
    margin: float

    @property
    def num_pairs(self) -> Tensor:
        """[B]: ordered pairs of different tokens; 1 where there are none, to divide by."""
        return (self.counts * (self.counts - 1)).clamp_min(1)

    @property
    def exponent_range(self) -> float:
        return EXPONENT_RANGE[self.product_dtype or self.tokens.dtype]

    @property
    def cosine_limit(self) -> float:
        """1 - clamp, but below 1 in the dtype of the tokens too: the slope of arccos is infinite there."""
        return 1 - max(self.clamp, torch.finfo(self.tokens.dtype).eps)


def _unit(tokens: Tensor, *, offset: float = 0.0, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens over max(norm + offset, floor), the norms [B, L, 1], and what was divided by."""
    norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    divisors = (norms + offset).clamp_min(floor)
    return tokens / divisors, norms, divisors


def _unit_backward(
    gradient: Tensor, unit: Tensor, norms: Tensor, divisors: Tensor, scale: Tensor, *, floor: float = 0.0
) -> None:
    """Turn the gradient by `unit` into scale [B] times the gradient by the tokens, in place.

    With u = z / (n + c), n = |z|: dz = (g - u (u . g) (n + c) / n) / (n + c). Where the floor holds, and at
    n = 0, u is z over a constant.
    """
    factors = scale[:, None, None] / divisors
    ratios = (divisors / norms).masked_fill_(norms <= floor, 0)
    for rows in row_blocks(gradient):
        part, direction = gradient[:, rows], unit[:, rows]
        along = (direction * part).sum(-1, keepdim=True).mul_(ratios[:, rows])
        part.addcmul_(direction, along, value=-1).mul_(factors[:, rows])


def _safe_log(sums: Tensor) -> Tensor:
    """log, finite for the empty sums of sequences that will be left out."""
    return sums.clamp_min(torch.finfo(sums.dtype).tiny).log()


def _reciprocal(sums: Tensor) -> Tensor:
    """1 / sums, 0 for empty sums."""
    return torch.where(sums > 0, sums.reciprocal(), 0)


def _angle_slopes(cosines: Tensor, scratch: Tensor) -> Tensor:
    """1 / sqrt(1 - c^2), minus the slope of arccos."""
    torch.addcmul(cosines.new_ones(()), cosines, cosines, value=-1, out=scratch)
    return scratch.rsqrt_()


def angular_spread(batch: Batch) -> Tensor:
    limit = batch.cosine_limit
    rate = LOG2_E / (math.pi * batch.temperature)  # of the exponent, in powers of two per radian
    unit, norms, divisors = _unit(batch.tokens, offset=OFFSET)
    shift = None
    if math.acos(-limit) * rate > batch.exponent_range:  # so low a temperature needs the largest term first
        nearest = extreme_pair(unit, distances=False, weights=batch.weights)
        shift = nearest.clamp(-limit, limit).acos_().mul_(rate)

    def spread(tile: Tile, with_slopes: bool) -> tuple[Tensor, Tensor | None]:
        cosines = tile.entries.clamp_(-limit, limit)
        slopes = _angle_slopes(cosines, tile.scratch()) if with_slopes else None
        values = cosines.acos_().mul_(-rate)
        if shift is not None:
            values.add_(shift[:, None, None]).clamp_max_(0)  # pairs left out may exceed it
        tile.leave_out(values.exp2_())
        return values, slopes.mul_(values) if slopes is not None else None

    sums = pair_sum(
        unit, spread, weights=batch.weights, product_dtype=batch.product_dtype, gradient=batch.gradient
    )
    if batch.gradient is not None:
        scale = _reciprocal(sums) / (math.pi * batch.temperature)
        _unit_backward(batch.gradient, unit, norms, divisors, scale)
    values = _safe_log(sums) - batch.num_pairs.log() + OFFSET
    return values if shift is None else values - shift / LOG2_E


def orthogonalization(batch: Batch) -> Tensor:
    limit = batch.cosine_limit
    unit, norms, divisors = _unit(batch.tokens, offset=OFFSET)

    def shortfall(tile: Tile, with_slopes: bool) -> tuple[Tensor, Tensor | None]:
        cosines = tile.entries.clamp_(-limit, limit)
        slopes = _angle_slopes(cosines, tile.scratch()) if with_slopes else None
        missing = cosines.acos_().mul_(-1 / math.pi).add_(batch.margin).clamp_min_(0)
        tile.leave_out(missing)
        if slopes is not None:
            slopes.mul_(missing)
        return missing.square_(), slopes

    sums = pair_sum(
        unit, shortfall, weights=batch.weights, product_dtype=batch.product_dtype, gradient=batch.gradient
    )
    if batch.gradient is not None:
        _unit_backward(batch.gradient, unit, norms, divisors, 2 / (math.pi * batch.num_pairs))
    return sums / batch.num_pairs


def _centred(batch: Batch) -> Tensor:
    """Tokens minus their mean, which no distance notices: what they share would cost digits otherwise."""
    mean = batch.tokens.sum(1, keepdim=True) / batch.counts.clamp_min(1)[:, None, None]
    centred = batch.tokens - mean
    return centred if batch.weights is None else centred.mul_(batch.weights[..., None])


def l2_repel(batch: Batch) -> Tensor:
    rate = LOG2_E / batch.temperature

    def repel(tile: Tile, with_slopes: bool) -> tuple[Tensor, Tensor | None]:
        # Each token's distance of 0 from itself counts: the largest term is 1, and the sum cannot underflow.
        values = tile.leave_out(tile.entries.mul_(-rate).exp2_(), with_diagonal=True)
        return values, values

    sums = pair_sum(
        _centred(batch),
        repel,
        distances=True,
        weights=batch.weights,
        product_dtype=batch.product_dtype,
        gradient=batch.gradient,
    )
    num_entries = (batch.counts * batch.tokens.shape[2]).clamp_min(1)
    if batch.gradient is not None:
        batch.gradient.mul_((-_reciprocal(sums) / batch.temperature)[:, None, None])
        batch.gradient.addcmul_(batch.tokens, (0.2 / num_entries)[:, None, None])
    mean_square = torch.linalg.vector_norm(batch.tokens, dim=(1, 2)).square() / num_entries
    return _safe_log(sums) - 2 * batch.counts.clamp_min(1).log() + OFFSET + 0.1 * mean_square


def decorrelation(batch: Batch) -> Tensor:
    num_features = batch.tokens.shape[2]
    rows = batch.tokens - batch.tokens.mean(-1, keepdim=True)
    deviations = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).div_(math.sqrt(num_features - 1))
    # A constant row differs from its mean by rounding alone; it is to become 0, not noise of unit variance.
    rounding = batch.tokens.abs().amax(-1, keepdim=True).mul_(4 * torch.finfo(rows.dtype).eps)
    inverse = torch.where(deviations > rounding, deviations.reciprocal(), 0)
    rows.mul_(inverse)
    sums = squared_product_sum(rows, product_dtype=batch.product_dtype, gradient=batch.gradient)
    scale = 1 / (batch.num_pairs * (num_features - 1) ** 2)
    if batch.gradient is not None:
        along = torch.linalg.vecdot(rows, batch.gradient).unsqueeze(-1).div_(num_features - 1)
        batch.gradient.sub_(batch.gradient.mean(-1, keepdim=True)).addcmul_(rows, along, value=-1)
        batch.gradient.mul_(inverse * scale[:, None, None])
    return sums * scale


def perplexity_entropy(batch: Batch) -> Tensor:
    gradient = batch.gradient
    x = _centred(batch)
    factors = x if batch.product_dtype is None else x.to(batch.product_dtype)
    squares = factors.to(x.dtype).square().sum(-1)
    counts = batch.counts.clamp_min(1)
    entropies = torch.zeros_like(squares)
    slope_sums = torch.zeros_like(squares)
    for rows in row_stripes(x):
        stripe = distance_stripe(factors, rows, squares, batch.weights, torch.inf)
        logits = stripe.mul_(-1 / batch.temperature).clamp_min_(torch.finfo(x.dtype).min)
        shares = torch.softmax(logits, dim=-1)
        bits = (shares + OFFSET).log2_()
        entropies[:, rows] = -(shares * bits).sum(-1)
        if gradient is None:
            continue
        # Slope of the entropy in the share, then in the logit (whose row sums are zero).
        slopes = bits.add_(shares / (shares + OFFSET), alpha=LOG2_E).neg_()
        slopes = shares * (slopes - (shares * slopes).sum(-1, keepdim=True))
        if batch.weights is not None:
            slopes.mul_(batch.weights[:, rows, None])
        rounded = slopes.to(factors.dtype)
        gradient[:, rows] -= product(rounded, factors)
        gradient -= product(rounded.mT, factors[:, rows])
        slope_sums[:, rows] += slopes.sum(2)
        slope_sums += slopes.sum(1)
    if gradient is not None:
        # d(-entropy) / d(distance) = slope / temperature; d|x_i - x_j|^2 = 2 (x_i - x_j)
        gradient.addcmul_(slope_sums[..., None], factors.to(x.dtype))
        gradient.mul_((2 / (batch.temperature * counts))[:, None, None])
    if batch.weights is not None:
        entropies.mul_(batch.weights)
    return -entropies.sum(1) / counts


def uniformity(batch: Batch) -> Tensor:
    rate = 2 * LOG2_E / batch.temperature
    unit, norms, divisors = _unit(batch.tokens, floor=UNIT_FLOOR)
    shift = None
    if 4 * rate > batch.exponent_range:
        shift = extreme_pair(unit, distances=True, weights=batch.weights).clamp_max_(4).mul_(rate)

    def potential(tile: Tile, with_slopes: bool) -> tuple[Tensor, Tensor | None]:
        values = tile.entries.mul_(-rate)
        if shift is not None:
            values.add_(shift[:, None, None]).clamp_max_(0)  # pairs left out may exceed it
        tile.leave_out(values.exp2_())
        return values, values

    sums = pair_sum(
        unit,
        potential,
        distances=True,
        weights=batch.weights,
        product_dtype=batch.product_dtype,
        gradient=batch.gradient,
    )
    if batch.gradient is not None:
        scale = _reciprocal(sums) * (-2 / batch.temperature)
        _unit_backward(batch.gradient, unit, norms, divisors, scale, floor=UNIT_FLOOR)
    values = _safe_log(sums) - batch.num_pairs.log()
    return values if shift is None else values - shift / LOG2_E


def cosine(batch: Batch) -> Tensor:
    # The sum over all pairs is the squared norm of the sum: no pair is ever formed.
    unit, norms, divisors = _unit(batch.tokens, floor=UNIT_FLOOR)
    total = unit.sum(1, keepdim=True)
    if batch.gradient is not None:
        torch.sub(total, unit, out=batch.gradient)
        _unit_backward(batch.gradient, unit, norms, divisors, 2 / batch.num_pairs, floor=UNIT_FLOOR)
    own = torch.linalg.vector_norm(unit, dim=(1, 2)).square()
    return (total.square().sum((1, 2)) - own) / batch.num_pairs


def koleo(batch: Batch) -> Tensor:
    unit, norms, divisors = _unit(batch.tokens, floor=UNIT_FLOOR)
    factors = unit if batch.product_dtype is None else unit.to(batch.product_dtype)
    squares = factors.to(unit.dtype).square().sum(-1)
    nearest = torch.empty(unit.shape[:2], dtype=torch.int64, device=unit.device)
    for rows in row_stripes(unit):
        nearest[:, rows] = distance_stripe(factors, rows, squares, batch.weights, torch.inf).argmin(-1)
    # The products only find the neighbour; its distance is taken from the difference, exact for near ones.
    index = nearest[..., None].expand_as(unit)
    difference = unit - unit.gather(1, index)
    distances = torch.linalg.vector_norm(difference, dim=-1)
    counts = batch.counts.clamp_min(1)
    logs = (distances + 1e-8).log()
    slopes = -1 / (counts[:, None] * (distances + 1e-8) * distances)
    slopes.masked_fill_(distances == 0, 0)  # identical tokens: of the subgradients, the one that is 0
    if batch.weights is not None:
        logs, slopes = logs * batch.weights, slopes * batch.weights
    if batch.gradient is not None:
        difference.mul_(slopes[..., None])
        batch.gradient.add_(difference).scatter_add_(1, index, difference.neg_())
        _unit_backward(batch.gradient, unit, norms, divisors, torch.ones_like(counts), floor=UNIT_FLOOR)
    return -logs.sum(1) / counts


def variance_covariance(batch: Batch) -> Tensor:
    num_features = batch.tokens.shape[2]
    centred = _centred(batch)
    degrees = (batch.counts - 1).clamp_min(1)[:, None]
    features = centred.mT.contiguous()  # features take the place of tokens: their products are covariances
    variances = features.square().sum(-1) / degrees
    deviations = (variances + 1e-4).sqrt_()
    slopes = None if batch.gradient is None else torch.zeros_like(features)
    sums = squared_product_sum(features, product_dtype=batch.product_dtype, gradient=slopes)
    if batch.gradient is not None and slopes is not None:
        slopes.mul_(1 / (num_features * degrees[..., None] ** 2))
        short = torch.where(deviations < 1, -1 / (num_features * deviations * degrees), 0)
        slopes.addcmul_(short[..., None], features)
        batch.gradient.copy_(slopes.mT)
        mean = (slopes if batch.weights is None else slopes * batch.weights[:, None, :]).sum(-1)
        batch.gradient.sub_((mean / batch.counts.clamp_min(1)[:, None])[:, None, :])
    return (1 - deviations).clamp_min(0).mean(-1) + sums / (num_features * degrees[:, 0] ** 2)


def spread_out(batch: Batch) -> Tensor:
    num_features = batch.tokens.shape[2]
    unit, norms, divisors = _unit(batch.tokens, floor=UNIT_FLOOR)
    total = unit.sum(1, keepdim=True)
    own = torch.linalg.vector_norm(unit, dim=(1, 2)).square()
    first = (total.square().sum((1, 2)) - own) / batch.num_pairs
    second = squared_product_sum(unit, product_dtype=batch.product_dtype, gradient=batch.gradient)
    excess = second / batch.num_pairs - 1 / num_features
    if batch.gradient is not None:
        batch.gradient.mul_((excess > 0)[:, None, None])
        batch.gradient.addcmul_(4 * first[:, None, None], total - unit)
        _unit_backward(batch.gradient, unit, norms, divisors, 1 / batch.num_pairs, floor=UNIT_FLOOR)
    return first.square() + excess.clamp_min(0)


def log_det(batch: Batch) -> Tensor:
    num_tokens, num_features = batch.tokens.shape[1:]
    unit, norms, divisors = _unit(batch.tokens, floor=UNIT_FLOOR)
    factors = unit if batch.product_dtype is None else unit.to(batch.product_dtype)
    scale = num_features / (0.5**2 * batch.counts.clamp_min(1))
    by_token = num_tokens < num_features  # both forms have the same determinant
    matrix = product(factors, factors.mT) if by_token else product(factors.mT, factors)
    matrix.mul_(scale[:, None, None]).diagonal(dim1=1, dim2=2).add_(1)
    # 1 on the diagonal keeps it positive definite; the check of `cholesky` would wait for the device.
    root = torch.linalg.cholesky_ex(matrix).L
    if batch.gradient is not None:
        right_hand_side = unit if by_token else unit.mT
        solution = torch.cholesky_solve(right_hand_side, root)
        batch.gradient.copy_(solution if by_token else solution.mT)
        _unit_backward(batch.gradient, unit, norms, divisors, -scale, floor=UNIT_FLOOR)
    return -root.diagonal(dim1=1, dim2=2).log().sum(-1)


LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    loss.__name__: loss
    for loss in (
        angular_spread,
        orthogonalization,
        l2_repel,
        decorrelation,
        perplexity_entropy,
        uniformity,
        cosine,
        koleo,
        variance_covariance,
        spread_out,
        log_det,
    )
}

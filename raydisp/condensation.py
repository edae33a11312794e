"""How far the token vectors of each layer have turned towards one direction, and how that changes with depth.

Every measure takes hidden states as `output_hidden_states=True` gives them: one [B, L, F] tensor per layer,
any floating dtype. They are computed in float32, or float64 where the input has it, per sequence over its own
tokens, and averaged over the sequences. Sequences without the tokens that a measure needs leave its mean.

Source: arXiv:2602.00217 for the cosine measures; the other sources stand at their functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NORM_FLOOR = 1e-3  # the authors divide each row by max(norm, 1e-3)
NUM_BINS = 128
_ROWS_PER_TILE = 256
_GROUP_ELEMENTS = 2**19  # of the tokens, or the cosines of a row of tiles, of a group: 2 MiB, in the cache

HiddenStates = Tensor | Sequence[Tensor] | Mapping[int, Tensor]


def _layer_list(hidden_states: HiddenStates) -> list[Tensor]:
    """The states layer by layer, checked: one floating [B, L, F] tensor each."""
    layers = list(hidden_states.values()) if isinstance(hidden_states, Mapping) else list(hidden_states)
    if not layers:
        raise ValueError("hidden_states is empty; at least one layer of shape [B, L, F] is needed.")
    for number, hidden in enumerate(layers):
        if hidden.dim() != 3:
            raise ValueError(
                f"hidden_states[{number}] has shape {list(hidden.shape)}; each layer must be [B, L, F] "
                "(sequences, tokens, features)."
            )
        if not hidden.is_floating_point():
            raise ValueError(f"hidden_states[{number}] has dtype {hidden.dtype}; it must be floating.")
    return layers


def _groups(hidden: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The usable token rows [b, n, F] of one layer, in float32 or float64.

    One call for a group of short sequences costs less than a call for each; a group of long ones, or under a
    mask, which leaves each sequence its own n, is one sequence.
    """
    if mask is not None and mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"mask has shape {list(mask.shape)}; it must be [B, L] = {list(hidden.shape[:2])}, true (or 1) "
            "for the tokens that count."
        )
    wide = hidden.detach() if hidden.dtype == torch.float64 else hidden.detach().float()
    if mask is None:
        _, length, num_features = hidden.shape
        per_sequence = max(1, length * max(num_features, _ROWS_PER_TILE))
        yield from wide.split(max(1, _GROUP_ELEMENTS // per_sequence))
    else:
        for rows, keep in zip(wide, mask, strict=True):
            yield rows[keep.bool()][None]


def _unit_rows(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / norms.clamp_min(NORM_FLOOR)


def _mean_cosine(rows: Tensor) -> Tensor:
    """[...]: mean cosine over all ordered pairs of the rows [..., n, F], i = j included.

    That mean is the squared norm of the mean unit vector, so no [n, n] matrix is built.
    """
    return _mean_product(_unit_rows(rows))


def _mean_product(units: Tensor) -> Tensor:
    return units.mean(-2).square().sum(-1).clamp(-1, 1)


def _mean_cosine_centred(rows: Tensor) -> Tensor:
    return _mean_cosine(rows - rows.mean(-2, keepdim=True))


def _pair_counts(units: Tensor, num_bins: int) -> Tensor:
    """[num_bins] int64: how many ordered pairs of the rows of a sequence have their cosine in each bin.

    Of all sequences of units [..., n, F]; i = j included. Half the tiles suffice: a pair right of the
    diagonal tile is counted twice.
    """
    counts = torch.zeros(num_bins, dtype=torch.int64, device=units.device)
    for start in range(0, units.shape[-2], _ROWS_PER_TILE):
        stop = start + _ROWS_PER_TILE
        rows, later = units[..., start:stop, :], units[..., stop:, :]
        counts += _bin_counts(rows @ rows.mT, num_bins)
        if later.shape[-2]:
            counts += 2 * _bin_counts(rows @ later.mT, num_bins)
    return counts


def _bin_counts(cosines: Tensor, num_bins: int) -> Tensor:
    """[num_bins] int64 counts of the entries, clipped to [-1, 1], overwritten; the last bin holds 1.

    Entries that are not a number, as a diverged model has them, are not counted.
    """
    places = cosines.clamp_(-1, 1).add_(1).mul_(num_bins / 2).nan_to_num_(nan=num_bins + 1)
    counts = torch.bincount(places.to(torch.int32).flatten(), minlength=num_bins + 2)
    counts[num_bins - 1] += counts[num_bins]
    return counts[:num_bins]


def _effective_rank(rows: Tensor) -> Tensor:
    """[...]: exp of the entropy of the normalised singular values of rows [..., n, F]; 1 where all are zero,
    NaN where any is not finite.

    The singular values are the roots of the eigenvalues of the smaller Gram matrix. It is formed in float64,
    so that values down to 1e-8 of the largest stay right; one dominant direction is the rule here.
    """
    rows = rows.double()
    rows = rows / rows.abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    gram = rows @ rows.mT if rows.shape[-2] < rows.shape[-1] else rows.mT @ rows
    finite = gram.isfinite().all(-1).all(-1)  # LAPACK raises for others
    gram = torch.where(finite[..., None, None], gram, 0.0)
    singular_values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular_values / singular_values.sum(-1, keepdim=True).clamp_min(1e-300)
    rank = torch.special.entr(shares).sum(-1).exp()
    return torch.where(finite, rank, torch.nan)


def _per_layer(
    measure: Callable[[Tensor], Tensor], hidden_states: HiddenStates, mask: Tensor | None, min_tokens: int = 1
) -> Tensor:
    """[layers] float64: the mean of a measure over the sequences that have enough tokens for it.

    Args:
        measure: [b, n, F] -> [b].
    """
    means = []
    for hidden in _layer_list(hidden_states):
        values = [measure(rows) for rows in _groups(hidden, mask) if rows.shape[1] >= min_tokens]
        nothing = torch.tensor(math.nan, dtype=torch.float64, device=hidden.device)
        means.append(torch.cat(values).double().mean() if values else nothing)
    return torch.stack(means)


def layer_cosine(hidden_states: HiddenStates, mask: Tensor | None = None) -> Tensor:
    """Mean cosine between the tokens of a sequence, layer by layer: the paper's measure of condensation.

    Rows are divided by max(norm, 1e-3); the mean is over all ordered pairs, i = j included, and over
    sequences. Memory O(L F).

    Args:
        hidden_states: [B, L, F] per layer: a sequence of tensors, a mapping, or one [layers, B, L, F].
        mask: [B, L], true (or 1) where a token counts; None counts all.
    Returns:
        [layers] float64 in [-1, 1]; near 1: every token points the same way. NaN where no token counts.
    Raises:
        ValueError: a layer is not a floating [B, L, F] tensor, or the mask has another shape.
    Source: arXiv:2602.00217.
    """
    return _per_layer(_mean_cosine, hidden_states, mask)


def layer_cosine_centred(hidden_states: HiddenStates, mask: Tensor | None = None) -> Tensor:
    """`layer_cosine` after subtracting each sequence's mean vector: blind to an offset its tokens share."""
    return _per_layer(_mean_cosine_centred, hidden_states, mask)


def layer_cosine_without_first(hidden_states: HiddenStates, mask: Tensor | None = None) -> Tensor:
    """`layer_cosine` without the first usable token of each sequence, which is often an attention sink."""
    return _per_layer(lambda rows: _mean_cosine(rows[:, 1:]), hidden_states, mask, min_tokens=2)


def effective_rank(hidden_states: HiddenStates, mask: Tensor | None = None) -> Tensor:
    """Exponential of the entropy of the normalised singular values of each sequence's token matrix.

    Returns:
        [layers] float64, mean over sequences, from 1 (one direction) to min(L, F). NaN where no token counts.
    Source: Roy and Vetterli, The effective rank (EUSIPCO 2007); beside the cosine because that is criticised
        as a measure of isotropy (I-STAR, ICLR 2024).
    """
    return _per_layer(_effective_rank, hidden_states, mask)


def cosine_histogram(
    hidden_states: HiddenStates,
    mask: Tensor | None = None,
    *,
    num_bins: int = NUM_BINS,
    kind: Literal["pairs", "averaged"] = "pairs",
) -> Tensor:
    """Counts of the cosines of each layer in equal bins on [-1, 1]; tile by tile, no [L, L] matrix.

    Args:
        hidden_states: per layer [B, L, F], as in `layer_cosine`.
        mask: [B, L], true (or 1) where a token counts; `pairs` only.
        num_bins: >= 1; bin k spans [-1 + 2k / num_bins, -1 + 2(k + 1) / num_bins), the last one holds 1 too.
        kind: `pairs` counts every ordered pair, i = j included, of every sequence. `averaged` averages the
            cosine matrices over the sequences first, as the authors do, which narrows the histogram.
    Returns:
        [layers, num_bins] int64, exact counts: sum over sequences of n^2 (`pairs`), or L^2 (`averaged`).
    Raises:
        ValueError: as `layer_cosine`; an unknown kind; a mask with `averaged`; num_bins < 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins = {num_bins} must be at least 1.")
    if kind not in ("pairs", "averaged"):
        raise ValueError(f'kind = "{kind}" is not one of pairs, averaged.')
    if kind == "averaged" and mask is not None:
        raise ValueError('kind = "averaged" averages whole cosine matrices and takes no mask; use "pairs".')
    histograms = []
    for hidden in _layer_list(hidden_states):
        counts = torch.zeros(num_bins, dtype=torch.int64, device=hidden.device)
        if kind == "pairs":
            for rows in _groups(hidden, mask):
                counts += _pair_counts(_unit_rows(rows), num_bins)
        else:
            # The mean over sequences of c_ij is one inner product of the units laid end to end.
            units = torch.cat([_unit_rows(rows) for group in _groups(hidden, None) for rows in group], dim=-1)
            counts += _pair_counts(units / math.sqrt(hidden.shape[0]), num_bins)
        histograms.append(counts)
    return torch.stack(histograms)


class AveragedCosines:
    """The histogram of kind `averaged` over texts that come one after the other, and may differ in length.

    The entry (i, j) of a layer's matrix is the mean, over the texts that have both tokens, of their cosine;
    for texts of one length that is what the authors average. Memory: one [L, L] matrix per layer.

    Args:
        num_states: hidden states per text.
        length: L, tokens of the longest text.
        dtype, device: of the matrices.
    """

    def __init__(
        self,
        num_states: int,
        length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self._sums = torch.zeros(num_states, length, length, dtype=dtype, device=device)
        self._num_texts = torch.zeros(length, dtype=torch.int64, device=device)  # that have this position

    def update(self, hidden_states: HiddenStates) -> None:
        """Add a batch of texts of one length n <= L: per layer [B, n, F]."""
        for sums, hidden in zip(self._sums, _layer_list(hidden_states), strict=True):
            length = hidden.shape[1]
            for group in _groups(hidden, None):
                for rows in group:
                    units = _unit_rows(rows)
                    sums[:length, :length] += (units @ units.mT).clamp_(-1, 1)
        self._num_texts[:length] += hidden.shape[0]

    def histogram(self, num_bins: int = NUM_BINS) -> Tensor:
        """[num_states, num_bins] int64: counts of the entries of the mean matrices in bins on [-1, 1]."""
        positions = torch.arange(len(self._num_texts), device=self._num_texts.device)
        num_texts = self._num_texts[torch.maximum(positions, positions[:, None])]
        return torch.stack([_bin_counts(sums / num_texts, num_bins) for sums in self._sums])


def cosine_quantiles(histogram: Tensor, probabilities: Sequence[float] = (0.05, 0.5, 0.95)) -> Tensor:
    """Quantiles of the cosines behind a histogram, linear within a bin (so good to one bin, 2 / num_bins).

    Args:
        histogram: [..., num_bins] counts on [-1, 1], from `cosine_histogram`.
        probabilities: each in [0, 1].
    Returns:
        [..., len(probabilities)] float64; NaN where the histogram is empty.
    """
    cumulative = histogram.double().cumsum(-1)
    total = cumulative[..., -1:]
    targets = total * torch.tensor(list(probabilities), dtype=torch.float64, device=histogram.device)
    # A target of 0 belongs to the first bin that holds anything; counts are whole numbers.
    bins = torch.searchsorted(cumulative, targets.clamp_min(0.5)).clamp_(max=histogram.shape[-1] - 1)
    inside = histogram.double().gather(-1, bins)
    below = cumulative.gather(-1, bins) - inside
    quantiles = -1 + 2 / histogram.shape[-1] * (bins + (targets - below) / inside.clamp_min(1))
    return torch.where(total > 0, quantiles, math.nan)


class DepthTrend(NamedTuple):
    """Rank correlations of the layer means with the layer index, in [-1, 1]; None where undefined."""

    spearman: float | None
    kendall: float | None


def depth_trend(layer_means: Tensor | Sequence[float]) -> DepthTrend:
    """Spearman's rho and Kendall's tau-b between the layer means and the layer index.

    Near +1: the model condenses with depth; near 0: no trend; negative: it disperses. Undefined, hence None,
    for fewer than two layers, for equal means throughout, and where a mean is not finite.
    """
    means = [float(mean) for mean in layer_means]
    if len(means) < 2 or not all(map(math.isfinite, means)) or min(means) == max(means):
        return DepthTrend(None, None)
    # Written out: importing scipy.stats takes longer than all measures of a trial's first evaluation.
    places = _ranks(means)
    middle = (len(means) + 1) / 2
    products = math.fsum((i + 1 - middle) * (place - middle) for i, place in enumerate(places))
    squares = math.fsum((i + 1 - middle) ** 2 for i in range(len(means)))
    squares_of_places = math.fsum((place - middle) ** 2 for place in places)
    signs = [(b > a) - (b < a) for a, b in itertools.combinations(means, 2)]
    return DepthTrend(
        spearman=_correlation(products, squares, squares_of_places),
        kendall=_correlation(sum(signs), len(signs), sum(map(abs, signs))),  # the index has no ties
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """Places from 1 up in ascending order; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def _correlation(products: float, squares: float, other_squares: float) -> float:
    return max(-1.0, min(1.0, products / math.sqrt(squares * other_squares)))


def last_layers_mean(layer_means: Tensor | Sequence[float], count: int | Literal["half"]) -> float:
    """Mean of the last `count` layer means; `half` is the authors' last floor(S / 2) + 1 of S states.

    Raises:
        ValueError: count is not in 1..S.
    """
    means = [float(mean) for mean in layer_means]
    number = min(len(means) // 2 + 1, len(means)) if count == "half" else count
    if not 1 <= number <= len(means):
        raise ValueError(f'count = {count!r} is neither "half" nor in 1..{len(means)}, the number of layers.')
    return math.fsum(means[-number:]) / number


@dataclass(frozen=True)
class CondensationResult:
    """Condensation over everything that was accumulated: one entry per hidden state in every list.

    NaN (None for the trends) marks what no token, or no pair of layers, defines.
    """

    num_sequences: int
    cosine_mean: list[float]
    cosine_centred_mean: list[float]
    cosine_without_first_mean: list[float]
    cosine_p05: list[float]
    cosine_p50: list[float]
    cosine_p95: list[float]
    effective_rank: list[float]
    histogram: list[list[int]]
    spearman: float | None
    kendall: float | None


class CondensationAccumulator:
    """Sums and counts of the condensation measures over many batches, workers included.

    Args:
        num_states: hidden states per update: number of blocks + 1 for all of them.
        num_bins: bins of the histograms on [-1, 1].
        device: where sums are kept; that of the process group's backend if `tensors` is to be reduced.
    """

    def __init__(
        self, num_states: int, *, num_bins: int = NUM_BINS, device: torch.device | str | None = None
    ) -> None:
        if num_states < 1:
            raise ValueError(f"num_states = {num_states} must be at least 1.")
        if num_bins < 1:
            raise ValueError(f"num_bins = {num_bins} must be at least 1.")
        # Columns: cosine, centred cosine, cosine without the first token, effective rank.
        self._sums = torch.zeros(num_states, 4, dtype=torch.float64, device=device)
        # Sequences with one usable token or more, and with two or more; the same for every layer.
        self._num_sequences = torch.zeros(2, dtype=torch.int64, device=device)
        self._histogram = torch.zeros(num_states, num_bins, dtype=torch.int64, device=device)

    def update(self, hidden_states: HiddenStates, mask: Tensor | None = None) -> None:
        """Add one batch: per layer [B, L, F], and mask [B, L] as in `layer_cosine`."""
        layers = _layer_list(hidden_states)
        if len(layers) != len(self._sums):
            raise ValueError(f"Got {len(layers)} hidden states; this accumulator counts {len(self._sums)}.")
        num_bins = self._histogram.shape[1]
        for number, hidden in enumerate(layers):
            sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
            for rows in _groups(hidden, mask):
                num_sequences, num_tokens, _ = rows.shape
                if num_tokens == 0:
                    continue
                units = _unit_rows(rows)
                sums[0] += _mean_product(units).double().sum()
                sums[1] += _mean_cosine_centred(rows).double().sum()
                if num_tokens > 1:
                    sums[2] += _mean_product(units[:, 1:]).double().sum()
                sums[3] += _effective_rank(rows).sum()
                self._histogram[number] += _pair_counts(units, num_bins).to(self._histogram.device)
                if number == 0:
                    self._num_sequences[0] += num_sequences
                    self._num_sequences[1] += num_sequences if num_tokens > 1 else 0
            self._sums[number] += sums.to(self._sums.device)

    def tensors(self) -> list[Tensor]:
        """The sums and counts themselves: all-reduce each with SUM in place, and `result` is global."""
        return [self._sums, self._num_sequences, self._histogram]

    def merge(self, other: CondensationAccumulator) -> None:
        """Add what another accumulator of the same shape has counted."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"Accumulators of {len(self._sums)} states and {self._histogram.shape[1]} bins, and of "
                    f"{len(other._sums)} and {other._histogram.shape[1]}, cannot be merged."
                )
            mine += theirs.to(mine.device)

    def result(self) -> CondensationResult:
        """The measures over all that was counted."""
        at_least_one, at_least_two = self._num_sequences.tolist()
        counts = torch.tensor([at_least_one, at_least_one, at_least_two, at_least_one], dtype=torch.float64)
        means = self._sums.cpu() / counts  # 0 / 0 is NaN: nothing was measured
        quantiles = cosine_quantiles(self._histogram.cpu())
        trend = depth_trend(means[:, 0])
        return CondensationResult(
            num_sequences=at_least_one,
            cosine_mean=means[:, 0].tolist(),
            cosine_centred_mean=means[:, 1].tolist(),
            cosine_without_first_mean=means[:, 2].tolist(),
            cosine_p05=quantiles[:, 0].tolist(),
            cosine_p50=quantiles[:, 1].tolist(),
            cosine_p95=quantiles[:, 2].tolist(),
            effective_rank=means[:, 3].tolist(),
            histogram=self._histogram.tolist(),
            spearman=trend.spearman,
            kendall=trend.kendall,
        )

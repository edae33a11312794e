"""Condensation measures against the reference values and slow loops."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from raydisp import condensation
from raydisp.condensation import (
    CondensationAccumulator,
    cosine_histogram,
    cosine_quantiles,
    depth_trend,
    effective_rank,
    last_layers_mean,
    layer_cosine,
    layer_cosine_centred,
    layer_cosine_without_first,
)

pytestmark = pytest.mark.usefixtures("one_thread")


GOLDEN = np.load(Path(__file__).parent / "golden" / "condensation.npz")
MEASURES = [layer_cosine, layer_cosine_centred, layer_cosine_without_first, effective_rank]


def states(num_layers: int = 3, batch: int = 2, length: int = 9, features: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_layers, batch, length, features, generator=generator, dtype=torch.float64)
    depth = torch.linspace(0, 1.5, num_layers, dtype=torch.float64)
    return noise + depth[:, None, None, None]


def cosine_matrix(rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-3)
    return (unit @ unit.T).clamp(-1, 1)


# ---------------------------------------------------------------------- the means and their trend


@pytest.mark.parametrize("case", range(4))
def test_golden(case: int) -> None:
    means = layer_cosine(torch.from_numpy(GOLDEN[f"hidden_{case}"]))
    np.testing.assert_allclose(
        means, GOLDEN[f"layer_cosine_{case}"], rtol=1e-10
    )  # as golden/README.md states
    trend = depth_trend(means)
    assert trend.spearman == pytest.approx(GOLDEN[f"spearman_{case}"], rel=1e-10)
    assert trend.kendall == pytest.approx(GOLDEN[f"kendall_{case}"], rel=1e-10)


def test_means_equal_those_of_the_full_matrix() -> None:
    hidden = states()
    hidden[0, 0, 2] *= 1e-5  # shorter than the floor of 1e-3
    expected = [torch.stack([cosine_matrix(rows).mean() for rows in layer]).mean() for layer in hidden]
    torch.testing.assert_close(layer_cosine(hidden), torch.stack(expected))
    centred = hidden - hidden.mean(2, keepdim=True)
    torch.testing.assert_close(layer_cosine_centred(hidden), layer_cosine(centred))
    torch.testing.assert_close(layer_cosine_without_first(hidden), layer_cosine(hidden[:, :, 1:]))


def test_a_shared_offset_moves_the_mean_but_not_the_centred_one() -> None:
    hidden = states(num_layers=1)
    assert layer_cosine(hidden + 50) > 0.99
    # The offset of 50 costs two of float64's sixteen digits.
    torch.testing.assert_close(
        layer_cosine_centred(hidden + 50), layer_cosine_centred(hidden), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_mask_equals_leaving_tokens_out(measure: Any) -> None:
    hidden = states()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, 8] = 0
    masked = measure(hidden, mask)
    expected = (measure(hidden[:, :1, 3:]) + measure(hidden[:, 1:, :8])) / 2
    torch.testing.assert_close(masked, expected)
    mask[0] = 0  # this sequence leaves the mean
    torch.testing.assert_close(measure(hidden, mask), measure(hidden[:, 1:, :8]))
    assert measure(hidden, torch.zeros(2, 9)).isnan().all()


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_lists_mappings_and_tensors_are_the_same(measure: Any) -> None:
    hidden = states()
    as_list = measure(list(hidden))
    assert torch.equal(measure(hidden), as_list)
    assert torch.equal(measure({7: hidden[0], 9: hidden[1], 11: hidden[2]}), as_list)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_half_precision_is_computed_in_float32(measure: Any, dtype: torch.dtype) -> None:
    hidden = states().to(dtype)
    assert torch.equal(measure(hidden), measure(hidden.float()))


def test_the_mean_at_8192_tokens_needs_no_square_matrix() -> None:
    hidden = torch.randn(1, 1, 8192, 8, generator=torch.Generator().manual_seed(0)) + 1
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        mean = layer_cosine(hidden)
    assert largest == hidden.numel()
    unit = hidden[0, 0] / hidden[0, 0].norm(dim=-1, keepdim=True)
    blocks = [(block @ unit.T).double().sum() for block in unit.split(512)]
    assert mean.item() == pytest.approx(sum(blocks).item() / 8192**2, rel=1e-5)  # float32 sums


# ---------------------------------------------------------------------- histograms and quantiles


@pytest.mark.parametrize("length", [9, 256, 300, 513])
def test_histogram_counts_every_pair(length: int) -> None:
    hidden = states(num_layers=2, length=length)
    histogram = cosine_histogram(hidden)
    assert histogram.dtype == torch.int64
    for layer, counts in zip(hidden, histogram, strict=True):
        cosines = torch.cat([cosine_matrix(rows).flatten() for rows in layer])
        expected, _ = np.histogram(cosines, bins=128, range=(-1, 1))
        assert counts.tolist() == expected.tolist()
    assert histogram.sum(1).tolist() == [2 * length**2] * 2


def test_histogram_under_a_mask_and_of_the_averaged_matrix() -> None:
    hidden = states()
    mask = torch.ones(2, 9)
    mask[0, 4:] = 0
    expected = cosine_histogram(hidden[:, :1, :4]) + cosine_histogram(hidden[:, 1:])
    assert torch.equal(cosine_histogram(hidden, mask), expected)
    averaged = cosine_histogram(hidden, kind="averaged", num_bins=16)
    for layer, counts in zip(hidden, averaged, strict=True):
        mean = torch.stack([cosine_matrix(rows) for rows in layer]).mean(0)
        expected_counts, _ = np.histogram(mean, bins=16, range=(-1, 1))
        assert counts.tolist() == expected_counts.tolist()


def test_histogram_holds_the_ends() -> None:
    hidden = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]]])
    counts = cosine_histogram(hidden, num_bins=4)[0]
    assert counts.tolist() == [4, 0, 0, 5]


def test_quantiles_are_good_to_a_bin() -> None:
    hidden = states(num_layers=2, length=200)
    quantiles = cosine_quantiles(cosine_histogram(hidden), (0.05, 0.5, 0.95))
    for layer, found in zip(hidden, quantiles, strict=True):
        cosines = torch.cat([cosine_matrix(rows).flatten() for rows in layer])
        exact = torch.quantile(cosines, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
        assert (found - exact).abs().max() <= 2 / 128  # a bin's width
    assert cosine_quantiles(torch.zeros(128)).isnan().all()
    assert cosine_quantiles(torch.tensor([0, 4, 0, 0]), (0.0, 0.5, 1.0)).tolist() == [-0.5, -0.25, 0.0]


# ---------------------------------------------------------------------- effective rank


def test_effective_rank_equals_that_of_the_singular_values() -> None:
    for length, features in ((9, 6), (5, 12)):
        hidden = states(num_layers=1, length=length, features=features)
        ranks = []
        for rows in hidden[0]:
            shares = torch.linalg.svdvals(rows)
            shares = shares / shares.sum()
            ranks.append(math.exp(-(shares * shares.log()).sum()))
        assert effective_rank(hidden).item() == pytest.approx(sum(ranks) / 2, rel=1e-10)


def test_effective_rank_of_known_matrices() -> None:
    orthogonal = 3 * torch.eye(4).repeat(1, 1, 1)[None]
    assert effective_rank(orthogonal).item() == pytest.approx(4, rel=1e-6)
    identical = torch.ones(1, 1, 8, 4)
    # The other singular values are roots of float64 rounding, 1e-8 of the largest.
    assert effective_rank(identical).item() == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(1, 1, 8, 4)).item() == 1


def test_effective_rank_keeps_small_directions_beside_a_dominant_one() -> None:
    """A float32 Gram matrix would lose singular values below 3e-4 of the largest."""
    rows = torch.zeros(64, 64)
    rows.fill_diagonal_(1.0)
    rows[0, 0] = 1e5
    shares = np.array([1e5] + [1.0] * 63) / (1e5 + 63)
    expected = math.exp(-(shares * np.log(shares)).sum())
    # 1e-5 of the largest: known to 1e-16 / 1e-10 in its square
    assert effective_rank(rows[None, None]).item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------- depth and layers


def test_trend_is_none_where_it_is_undefined() -> None:
    for means in ([], [0.3], [0.3, 0.3, 0.3], [0.1, math.nan, 0.2]):
        assert depth_trend(means) == (None, None)
    assert depth_trend([0.3, 0.2, 0.1]) == pytest.approx((-1, -1))
    assert depth_trend(torch.tensor([0.1, 0.1, 0.2])).kendall == pytest.approx(2 / math.sqrt(6))  # tau-b


@pytest.mark.parametrize("digits", [1, 12])
def test_the_trend_is_scipys(digits: int) -> None:
    """Rounded to one digit, most means have equals."""
    source = np.random.RandomState(0)
    for length in [*range(2, 14), 81]:
        means = np.round(source.uniform(size=length), digits).tolist()
        if min(means) == max(means):
            continue
        index = range(length)
        expected = (stats.spearmanr(index, means).statistic, stats.kendalltau(index, means).statistic)
        assert depth_trend(means) == pytest.approx(expected, rel=1e-12, abs=1e-12)  # sums near 0


def test_measuring_does_not_load_scipys_statistics() -> None:
    """They take as long to import as several evaluations."""
    code = "import sys, raydisp.train; sys.exit('scipy.stats' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("count", "expected"), [(1, 5.0), (2, 4.5), (5, 3.0), ("half", 4.0)])
def test_last_layers_mean(count: Any, expected: float) -> None:
    assert last_layers_mean([1.0, 2.0, 3.0, 4.0, 5.0], count) == expected  # half of 5 states: 3


def test_last_half_of_one_state_is_that_state() -> None:
    assert last_layers_mean([0.4], "half") == 0.4
    assert last_layers_mean([1.0, 3.0], "half") == 2.0


# ---------------------------------------------------------------------- accumulation


def test_accumulator_equals_the_functions() -> None:
    hidden = states(batch=3)
    mask = torch.ones(3, 9)
    mask[1, 5:] = 0
    accumulator = CondensationAccumulator(3)
    accumulator.update(list(hidden), mask)
    result = accumulator.result()
    assert result.num_sequences == 3
    # The same float64 operations, summed in another order.
    assert result.cosine_mean == pytest.approx(layer_cosine(hidden, mask).tolist(), rel=1e-12)
    assert result.cosine_centred_mean == pytest.approx(layer_cosine_centred(hidden, mask).tolist(), rel=1e-12)
    without_first = layer_cosine_without_first(hidden, mask).tolist()
    assert result.cosine_without_first_mean == pytest.approx(without_first, rel=1e-12)
    assert result.effective_rank == pytest.approx(effective_rank(hidden, mask).tolist(), rel=1e-12)
    histogram = cosine_histogram(hidden, mask)
    assert result.histogram == histogram.tolist()
    quantiles = cosine_quantiles(histogram)
    assert result.cosine_p05 == quantiles[:, 0].tolist()
    assert result.cosine_p50 == quantiles[:, 1].tolist()
    assert result.cosine_p95 == quantiles[:, 2].tolist()
    assert (result.spearman, result.kendall) == depth_trend(result.cosine_mean)


def test_parts_reduce_to_the_whole() -> None:
    """Sums added up over workers, or merged, are those of one worker that saw every batch."""
    batches = [states(seed=seed) for seed in range(4)]
    whole, merged = CondensationAccumulator(3), CondensationAccumulator(3)
    workers = [CondensationAccumulator(3), CondensationAccumulator(3)]
    for index, batch in enumerate(batches):
        whole.update(batch)
        workers[index % 2].update(batch)
    for worker in workers:
        merged.merge(worker)
    for tensors in zip(workers[0].tensors(), workers[1].tensors(), strict=True):
        tensors[0].add_(tensors[1])  # what all_reduce(SUM) does in place
    for parts in (merged.result(), workers[0].result()):
        assert parts.num_sequences == 8
        assert parts.histogram == whole.result().histogram  # integers: exact
        assert parts.cosine_mean == pytest.approx(whole.result().cosine_mean, rel=1e-14)  # order of sums
        assert parts.effective_rank == pytest.approx(whole.result().effective_rank, rel=1e-14)


def test_single_tokens_count_only_where_they_can() -> None:
    hidden = states()
    mask = torch.zeros(2, 9)
    mask[0, 4] = 1
    accumulator = CondensationAccumulator(3)
    accumulator.update(hidden, mask)
    result = accumulator.result()
    assert result.num_sequences == 1
    assert result.cosine_mean == pytest.approx([1.0] * 3)
    assert all(map(math.isnan, result.cosine_without_first_mean))
    assert [sum(counts) for counts in result.histogram] == [1, 1, 1]


def test_an_empty_accumulator_measures_nothing() -> None:
    result = CondensationAccumulator(2).result()
    assert result.num_sequences == 0
    assert all(map(math.isnan, result.cosine_mean + result.cosine_p50 + result.effective_rank))
    assert result.spearman is None


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_cosine([]), "hidden_states is empty"),
        (lambda: layer_cosine(torch.zeros(2, 3, 4)), r"hidden_states\[0\] has shape \[3, 4\]"),
        (lambda: layer_cosine([torch.zeros(2, 3, 4, dtype=torch.int32)]), "torch.int32; it must be floating"),
        (
            lambda: layer_cosine(states(), torch.ones(9, 2)),
            r"mask has shape \[9, 2\]; it must be .* \[2, 9\]",
        ),
        (lambda: cosine_histogram(states(), num_bins=0), "num_bins = 0 must be at least 1"),
        (lambda: cosine_histogram(states(), kind="mean"), '"mean" is not one of pairs, averaged'),  # type: ignore[arg-type]
        (lambda: cosine_histogram(states(), torch.ones(2, 9), kind="averaged"), "takes no mask"),
        (lambda: last_layers_mean([0.1, 0.2], 3), r"count = 3 is neither .* nor in 1\.\.2"),
        (lambda: last_layers_mean([0.1, 0.2], 0), "count = 0 is neither"),
        (lambda: CondensationAccumulator(0), "num_states = 0"),
        (lambda: CondensationAccumulator(1, num_bins=0), "num_bins = 0"),
        (lambda: CondensationAccumulator(2).update(states()), "Got 3 hidden states; .* counts 2"),
        (lambda: CondensationAccumulator(2).merge(CondensationAccumulator(3)), "cannot be merged"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bins_are_the_documented_128() -> None:
    assert condensation.NUM_BINS == 128
    assert cosine_histogram(states()).shape == (3, 128)


def test_a_diverged_model_has_no_condensation() -> None:
    """One row that is not a number makes the means so, and its pairs are not counted; nothing is raised."""
    hidden = [torch.randn(2, 5, 4), torch.randn(2, 5, 4)]
    hidden[1][1, 2] = torch.nan
    accumulator = CondensationAccumulator(2)
    accumulator.update(hidden)
    result = accumulator.result()
    assert math.isfinite(result.cosine_mean[0])
    assert math.isfinite(result.effective_rank[0])
    assert math.isnan(result.cosine_mean[1])
    assert math.isnan(result.effective_rank[1])
    assert sum(result.histogram[0]) == 2 * 25
    # Of the second sequence, the pairs of the four rows that are whole.
    assert sum(result.histogram[1]) == 25 + 16


# ---------------------------------------------------------------------- averaging over texts of any length


def test_averaging_in_a_stream_is_averaging_at_once() -> None:
    hidden = states(batch=5)
    stream = condensation.AveragedCosines(3, 9, dtype=torch.float64)
    stream.update(hidden[:, :2])
    stream.update(list(hidden[:, 2:]))
    assert torch.equal(stream.histogram(), cosine_histogram(hidden, kind="averaged"))


def test_a_pair_is_averaged_over_the_texts_that_have_it() -> None:
    hidden = states(batch=2)
    stream = condensation.AveragedCosines(3, 9, dtype=torch.float64)
    stream.update(hidden[:, :1])
    stream.update(hidden[:, 1:, :4])
    for layer, counts in zip(hidden, stream.histogram(16), strict=True):
        mean = cosine_matrix(layer[0])
        mean[:4, :4] = (mean[:4, :4] + cosine_matrix(layer[1, :4])) / 2
        assert counts.tolist() == np.histogram(mean, bins=16, range=(-1, 1))[0].tolist()

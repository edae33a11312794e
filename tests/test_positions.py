"""Positions of a subsampled dispersion loss: sets, all alike likely, and a function of what they are for."""

from __future__ import annotations

import torch
from torch import Tensor

from raydisp.positions import draw_positions


def draw(sequences: Tensor, seed: int = 0, step: int = 1, num_layers: int = 3, length: int = 40) -> Tensor:
    return draw_positions(
        sequences, num_layers=num_layers, length=length, max_tokens=10, seed=seed, step=step
    )


def test_each_sequence_has_its_own_whoever_asks() -> None:
    whole = draw(torch.arange(64))
    assert whole.shape == (3, 64, 10)
    for share in (torch.arange(32, 64), torch.tensor([7]), torch.tensor([63, 0])):
        assert torch.equal(draw(share), whole[:, share])
    assert torch.equal(draw(torch.arange(64), num_layers=1)[0], whole[0])
    assert len({tuple(row) for row in whole.flatten(0, 1).tolist()}) == 3 * 64
    assert not torch.equal(draw(torch.arange(64), step=2), whole)
    assert not torch.equal(draw(torch.arange(64), seed=1), whole)


def test_they_are_distinct_ascending_and_all_when_all_are_wanted() -> None:
    drawn = draw(torch.arange(64))
    assert (drawn.diff(dim=-1) > 0).all()
    assert drawn.min() == 0
    assert drawn.max() == 39
    assert torch.equal(draw(torch.arange(2), length=10), torch.arange(10).expand(3, 2, 10))


def test_they_are_as_random_as_drawn_ones() -> None:
    """Five deviations of what chance gives: the function is fixed, so the test cannot fail by chance."""
    num_layers, num_sequences = 12, 512
    drawn = draw(torch.arange(num_sequences), num_layers=num_layers)
    member = torch.zeros(num_layers, num_sequences, 40).scatter_(2, drawn, 1.0)
    count, share = num_layers * num_sequences, 10 / 40
    each = member.sum((0, 1)) / count
    assert (each - share).abs().max() < 5 * (share * (1 - share) / count) ** 0.5
    # Common positions of two independent sets: hypergeometric, mean 2.5, variance 10/4 x 3/4 x 30/39.
    deviation = (10 * share * (1 - share) * 30 / 39) ** 0.5
    later = torch.zeros_like(member).scatter_(
        2, draw(torch.arange(num_sequences), step=2, num_layers=num_layers), 1.0
    )
    for one, other in ((member[1:], member[:-1]), (member[:, 1:], member[:, :-1]), (member, later)):
        common = (one * other).sum(-1)
        assert abs(common.mean() - 10 * share) < 5 * deviation / common.numel() ** 0.5

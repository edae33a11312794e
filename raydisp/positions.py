"""Which tokens of a sequence a subsampled dispersion loss sees: a function, where one would draw.

The positions follow from (seed, step, sequence, layer) alone, the sequence counted within the global batch.
Whichever worker, micro-batch or device it is on, it gets the same ones, and no generator's state is kept.

The authors of arXiv:2602.00217 draw one set of positions for all sequences of a batch. Here each sequence has
its own in each layer, which costs the same and shows the loss more tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raydisp.seeds import derive_seed

_LOW_32 = 2**32 - 1
_TOKEN_BITS = 24


def draw_positions(
    sequences: Tensor, *, num_layers: int, length: int, max_tokens: int, seed: int, step: int
) -> Tensor:
    """Distinct positions, as if drawn: independent between sequences, layers and steps.

    Args:
        sequences: [B] int64, their numbers in the global batch; the result is on the same device.
        length: tokens of a sequence, at most 2**24.
        max_tokens: positions of each sequence, at most `length`.
    Returns:
        [num_layers, B, max_tokens] int64 in [0, length), ascending.
    """
    layers = torch.arange(num_layers, device=sequences.device)
    tokens = torch.arange(length, device=sequences.device)
    base = derive_seed("dispersion", seed, step)
    streams = mix(mix(sequences + (base & _LOW_32)) ^ (layers[:, None] + (base >> 32)))
    keys = mix(mix(tokens) ^ streams[..., None])  # [num_layers, B, L], 32 bits
    # The positions of the smallest keys. Each key carries its position, which also settles equal ones.
    carried = (keys << _TOKEN_BITS) | tokens
    smallest = carried.topk(max_tokens, largest=False, sorted=False).values
    return (smallest & (2**_TOKEN_BITS - 1)).sort(-1).values


def mix(numbers: Tensor) -> Tensor:
    """The low 32 bits of each number, scrambled one to one; int64, the same on every device.

    Source: `lowbias32` of Chris Wellons' hash-prospector. Products wrap, and their low bits are right.
    """
    mixed = numbers & _LOW_32
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & _LOW_32
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & _LOW_32
    return mixed ^ (mixed >> 16)

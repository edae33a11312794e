"""Evaluation on held-out text: loss with its standard error, bits per byte, condensation of every layer."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raydisp.condensation import CondensationAccumulator, CondensationResult
from raydisp.data import TokenBlocks
from raydisp.layers import num_hidden_layers, unwrap
from raydisp.parallel import Layout, all_reduce_sum, is_sharded, reshard


@dataclass(frozen=True)
class Evaluation:
    """One evaluation over all workers. Losses in nats per predicted token."""

    split: str
    loss: float
    stderr: float | None
    """Standard error of the loss over sequences; None below two sequences."""
    num_tokens: int
    """Predicted tokens."""
    perplexity: float
    bits_per_byte: float
    condensation: CondensationResult

    @property
    def layer_cosine_mean(self) -> float:
        """Mean over the transformer layers 1..n of their mean cosine (the embedding output is left out)."""
        layers = self.condensation.cosine_mean[1:]
        return math.fsum(layers) / len(layers)

    def rows(self, step: int, num_tokens: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows of this evaluation for the tables `evals` and `layers`."""
        at = {"step": step, "num_tokens": num_tokens}
        measured = self.condensation
        values = [
            ("loss", self.loss, self.num_tokens, self.stderr),
            ("perplexity", self.perplexity, self.num_tokens, None),
            ("bits_per_byte", self.bits_per_byte, self.num_tokens, None),
            ("layer_cosine_mean", self.layer_cosine_mean, measured.num_sequences, None),
            ("spearman", measured.spearman, measured.num_sequences, None),
            ("kendall", measured.kendall, measured.num_sequences, None),
        ]
        evals = [
            {**at, "split": self.split, "name": name, "value": value, "num_items": items, "stderr": stderr}
            for name, value, items, stderr in values
        ]
        columns = (
            "cosine_mean",
            "cosine_centred_mean",
            "cosine_p05",
            "cosine_p50",
            "cosine_p95",
            "effective_rank",
            "histogram",
        )
        layers = [
            {**at, "layer": layer, **{name: getattr(measured, name)[layer] for name in columns}}
            for layer in range(len(measured.cosine_mean))
        ]
        return evals, layers


def token_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it.

    Args:
        logits: [B, L, V], any float dtype; computed in float32.
        input_ids: [B, L] int64.
    Returns:
        [B, L - 1] float32, nats.
    """
    predicted = logits[:, :-1].float()
    return nn.functional.cross_entropy(predicted.transpose(1, 2), input_ids[:, 1:], reduction="none")


def evaluate(
    model: nn.Module,
    blocks: TokenBlocks,
    *,
    split: str,
    layout: Layout,
    max_tokens: int | None,
    condensation_tokens: int | None,
    batch_sequences: int,
    autocast: AbstractContextManager[Any],
) -> Evaluation:
    """Evaluate on the first sequences of a split, shared between all workers; all must call it.

    Args:
        model: a causal language model, wrapped or not; its training mode is restored.
        max_tokens: how much of the split counts for the loss; None: all of it.
        condensation_tokens: how much of that counts for condensation; None: all of it. The same at every
            evaluation of a trial, so that its layers compare over training.
        batch_sequences: sequences per forward pass.
        autocast: entered around each forward pass; reusable.
    """
    num_sequences = _whole_sequences(max_tokens, blocks)
    num_measured = min(_whole_sequences(condensation_tokens, blocks), num_sequences)
    plain = unwrap(model)
    condensation = CondensationAccumulator(num_hidden_layers(plain) + 1, device=layout.device)
    sums = torch.zeros(3, dtype=torch.float64, device=layout.device)  # nats, squared nats, sequences
    chunks = _chunks(_share(layout.rank, layout, num_sequences), num_measured, batch_sequences)
    was_training = plain.training
    plain.eval()
    try:
        with torch.no_grad():
            for chunk in chunks:
                input_ids = blocks[chunk].to(layout.device)
                measured = chunk[0] < num_measured
                with autocast:
                    output = plain(input_ids=input_ids, output_hidden_states=measured, use_cache=False)
                nats = token_losses(output.logits, input_ids).double().sum(1)
                sums += torch.stack([nats.sum(), nats.square().sum(), nats.new_tensor(len(chunk))])
                if measured:
                    condensation.update(output.hidden_states)
            if is_sharded(plain):
                # Every forward pass gathers weights from all workers: those with fewer batches join in.
                for _ in range(
                    _most_chunks(layout, num_sequences, num_measured, batch_sequences) - len(chunks)
                ):
                    with autocast:
                        plain(input_ids=blocks[[0]].to(layout.device), use_cache=False)
                reshard(plain)
    finally:
        plain.train(was_training)
    all_reduce_sum([sums, *condensation.tensors()], layout)
    total, squares, count = sums.tolist()
    predicted = blocks.context_length - 1
    loss = total / (count * predicted)
    return Evaluation(
        split=split,
        loss=loss,
        stderr=_stderr(total, squares, count, predicted),
        num_tokens=int(count) * predicted,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        # Nats per token to bits per byte, by the tokens and bytes of the whole split: comparable between
        # tokenizers.
        bits_per_byte=loss / math.log(2) * blocks.num_tokens / blocks.num_bytes,
        condensation=condensation.result(),
    )


def _whole_sequences(tokens: int | None, blocks: TokenBlocks) -> int:
    return len(blocks) if tokens is None else min(len(blocks), max(1, tokens // blocks.context_length))


def _share(rank: int, layout: Layout, num_sequences: int) -> list[int]:
    return list(range(rank, num_sequences, layout.world_size))


def _most_chunks(layout: Layout, num_sequences: int, num_measured: int, size: int) -> int:
    """Forward passes of the worker that makes most of them."""
    shares = [_share(rank, layout, num_sequences) for rank in range(layout.world_size)]
    return max(len(_chunks(share, num_measured, size)) for share in shares)


def _chunks(indices: list[int], num_measured: int, size: int) -> list[list[int]]:
    """Batches of at most `size`, none of which mixes measured and unmeasured sequences."""
    measured = [index for index in indices if index < num_measured]
    rest = indices[len(measured) :]
    return [part[i : i + size] for part in (measured, rest) for i in range(0, len(part), size)]


def _stderr(total: float, squares: float, count: float, predicted: int) -> float | None:
    if count < 2 or not math.isfinite(total):
        return None
    variance = max(0.0, squares - total * total / count) / (count - 1)
    return math.sqrt(variance / count) / predicted

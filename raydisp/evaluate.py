"""Evaluation on held-out text: loss with its standard error, bits per byte, condensation of every layer."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raydisp.condensation import CondensationAccumulator, CondensationResult
from raydisp.data import TokenBlocks
from raydisp.layers import HiddenStateCapture, num_hidden_layers, unwrap
from raydisp.parallel import Layout, all_reduce_sum, free_gathered, is_sharded


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
    condensation: CondensationResult | None
    """None: it was not measured."""

    @property
    def layer_cosine_mean(self) -> float | None:
        """Mean over the transformer layers 1..n of their mean cosine (the embedding output is left out)."""
        if self.condensation is None:
            return None
        layers = self.condensation.cosine_mean[1:]
        return math.fsum(layers) / len(layers)

    def metrics(self) -> dict[str, float | None]:
        """As the columns of `trials` have it, where the split is the validation split."""
        measured = self.condensation
        return {
            "val_loss": self.loss,
            "val_perplexity": self.perplexity,
            "val_bits_per_byte": self.bits_per_byte,
            "layer_cosine_mean": self.layer_cosine_mean,
            "spearman": None if measured is None else measured.spearman,
            "kendall": None if measured is None else measured.kendall,
        }

    def rows(self, step: int, num_tokens: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows of this evaluation for the tables `evals` and `layers`."""
        at = {"step": step, "num_tokens": num_tokens}
        measured = self.condensation
        values: list[tuple[str, float | None, int, float | None]] = [
            ("loss", self.loss, self.num_tokens, self.stderr),
            ("perplexity", self.perplexity, self.num_tokens, None),
            ("bits_per_byte", self.bits_per_byte, self.num_tokens, None),
        ]
        if measured is not None:
            values += [
                ("layer_cosine_mean", self.layer_cosine_mean, measured.num_sequences, None),
                ("spearman", measured.spearman, measured.num_sequences, None),
                ("kendall", measured.kendall, measured.num_sequences, None),
            ]
        evals = [
            {**at, "split": self.split, "name": name, "value": value, "num_items": items, "stderr": stderr}
            for name, value, items, stderr in values
        ]
        if measured is None:
            return evals, []
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
    # Over whole logits laid flat, the last position ignored: a slice, or classes that are not the last
    # dimension, cost several times as much on a CPU.
    targets = nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(input_ids.shape)[:, :-1]


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
    measure_condensation: bool = True,
) -> Evaluation:
    """Evaluate on the first sequences of a split, shared between all workers; all must call it.

    Args:
        model: a causal language model, wrapped or not; its training mode is restored.
        max_tokens: how much of the split counts for the loss; None: all of it.
        condensation_tokens: how much of that counts for condensation; None: all of it. The same at every
            evaluation of a trial, so that its layers compare over training.
        batch_sequences: sequences per forward pass.
        autocast: entered around each forward pass; reusable.
        measure_condensation: False: losses alone.
    """
    num_sequences = _whole_sequences(max_tokens, blocks)
    num_measured = 0
    if measure_condensation:
        num_measured = min(_whole_sequences(condensation_tokens, blocks), num_sequences)
    plain = unwrap(model)
    num_layers = num_hidden_layers(plain)
    condensation = CondensationAccumulator(num_layers + 1, device=layout.device)
    sums = torch.zeros(3, dtype=torch.float64, device=layout.device)  # nats, squared nats, sequences
    shares = [
        _chunks(list(range(rank, num_sequences, layout.world_size)), num_measured, batch_sequences)
        for rank in range(layout.world_size)
    ]
    was_training = plain.training
    plain.eval()
    # Not output_hidden_states: Hugging Face would leave hooks on the modules inside the blocks, at which
    # torch.compile has to break up its graphs.
    capture = HiddenStateCapture(plain, range(num_layers + 1))  # where nothing records, it costs nothing
    try:
        with torch.no_grad():
            for chunk in shares[layout.rank]:
                input_ids = blocks[chunk].to(layout.device)
                measured = chunk[0] < num_measured
                with autocast, capture.recording() if measured else contextlib.nullcontext():
                    output = plain(input_ids=input_ids, use_cache=False)
                nats = token_losses(output.logits, input_ids).double().sum(1)
                sums += torch.stack([nats.sum(), nats.square().sum(), nats.new_tensor(len(chunk))])
                if measured:
                    condensation.update(capture.take())
            if is_sharded(plain):
                # Each forward pass gathers parameters from all workers: those with fewer batches keep up.
                for _ in range(max(map(len, shares)) - len(shares[layout.rank])):
                    with autocast:
                        plain(input_ids=blocks[[0]].to(layout.device), use_cache=False)
                free_gathered(plain)
    finally:
        capture.remove()
        plain.train(was_training)
    all_reduce_sum([sums, *(condensation.tensors() if measure_condensation else ())], layout)
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
        condensation=condensation.result() if measure_condensation else None,
    )


def _whole_sequences(tokens: int | None, blocks: TokenBlocks) -> int:
    return len(blocks) if tokens is None else min(len(blocks), max(1, tokens // blocks.context_length))


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

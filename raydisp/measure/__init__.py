"""Condensation of any causal language model on any text.

python -m raydisp.measure MODEL... --texts FILE... --out DIR

`measure_condensation` is the same as a function: a model, its tokenizer, texts in; numbers out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DEFAULT_MAX_TOKENS = 512
DEFAULT_NUM_TEXTS = 100
LAST_COUNTS = (1, 2, 3, 4, 5)

AVERAGED_BYTES = 2**30
"""The averaged histogram takes one [L, L] matrix per hidden state; beyond this it is left out."""

_BATCH_TOKENS = {"cpu": 2048, "cuda": 2**16}
"""More tokens than this in a forward pass make it no faster."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Measured:
    """Condensation of one model over texts; S = L + 1 hidden states, from the embedding output (0) up.

    Cosines have no unit and lie in [-1, 1]. Means are over texts, `_stderr` is the standard error over texts:
    NaN below two of them. Lists have one entry per hidden state.
    """

    num_texts: int
    """Texts measured."""
    num_left_out: int
    """Texts with fewer than two tokens."""
    num_tokens: int
    """Of all texts measured."""
    cosine_mean: list[float]
    """Over all ordered pairs of tokens of a text, i = j included (as the paper has it)."""
    cosine_stderr: list[float]
    cosine_centred_mean: list[float]
    """After subtracting the text's mean vector."""
    cosine_centred_stderr: list[float]
    cosine_without_first_mean: list[float]
    """Without token 0, often an attention sink."""
    cosine_without_first_stderr: list[float]
    cosine_p05: list[float]
    """5 %, 50 % and 95 % of the cosines of all pairs, good to a bin of the histogram."""
    cosine_p50: list[float]
    cosine_p95: list[float]
    effective_rank: list[float]
    """From 1 to min(tokens, features); it grows with the number of tokens."""
    effective_rank_stderr: list[float]
    histogram: list[list[int]]
    """[S][128] counts of the cosines on [-1, 1]: every pair of every text."""
    averaged_histogram: list[list[int]] | None
    """The same of the cosine matrices averaged over texts, as the authors draw it; None: it would not fit
    into memory."""
    spearman: float | None
    """Of the layer means against the layer number; None where it is undefined."""
    kendall: float | None
    last_means: list[float | None]
    """Mean of the last N = 1..5 layer means; None where there are fewer states."""
    last_half_mean: float
    """Of the last floor(S / 2) + 1 states (the authors' last half)."""
    last_half_stderr: float


def measure_condensation(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    batch_sequences: int | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measure how far the token vectors of each layer point the same way.

    The model runs where it is and in its own dtype; measures are computed in float32 or wider. Texts go
    through it together only where they have the same number of tokens, so nothing is padded, and never are
    the hidden states of more than one batch in memory. Its training mode is restored.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer; special tokens are added as it does by default.
        texts: documents; each counts with its first `max_tokens` tokens, one of fewer than 2 is left out.
        max_tokens: >= 2, and no more than the model has positions.
        batch_sequences: texts in a forward pass; None: as many as memory allows. In float32 the results
            depend on it by rounding alone (1e-6).
        progress: called with the number of texts done since the last call.
    Returns:
        Means over texts with their standard errors, per hidden state.
    Raises:
        ValueError: max_tokens or batch_sequences is too small, no text has two tokens, a token has no
            embedding, or the model gives no hidden states.
    Source: arXiv:2602.00217; the other measures stand in `raydisp.condensation`.
    """
    import torch

    from raydisp.condensation import AveragedCosines, CondensationAccumulator, depth_trend, last_layers_mean

    if max_tokens < 2:
        raise ValueError(f"max_tokens = {max_tokens} must be at least 2: a cosine takes two tokens.")
    if batch_sequences is not None and batch_sequences < 1:
        raise ValueError(f"batch_sequences = {batch_sequences} must be at least 1.")
    token_ids = [encode(tokenizer, text, max_tokens) for text in texts]
    kept = [ids for ids in token_ids if len(ids) >= 2]
    if not kept:
        raise ValueError(f"None of {len(texts)} texts has two tokens or more.")
    _check_ids(model, kept)
    total: CondensationAccumulator | None = None
    averaged: AveragedCosines | None = None
    # [texts][S, 4], in the order of the texts: their sums then do not depend on how they were batched.
    values: list[Tensor] = [torch.empty(0)] * len(kept)
    was_training = model.training
    model.eval()
    try:
        for chunk, states in _states_by_batch(model, kept, batch_sequences):
            if total is None:
                device = states[0].device
                total = CondensationAccumulator(len(states), device=device)
                longest = max(map(len, kept))
                wide = torch.float64 if states[0].dtype == torch.float64 else torch.float32
                if len(states) * longest**2 * wide.itemsize <= AVERAGED_BYTES:
                    averaged = AveragedCosines(len(states), longest, dtype=wide, device=device)
            for place, number in enumerate(chunk):
                text = CondensationAccumulator(len(states), device=states[0].device)
                text.update([state[place : place + 1] for state in states])
                values[number] = text.tensors()[0].cpu()  # sums over one text: its values
                total.merge(text)
            if averaged is not None:
                averaged.update(states)
            del states  # or it would lie in memory beside those of the next batch
            if progress is not None:
                progress(len(chunk))
    finally:
        model.train(was_training)
    assert total is not None
    result = total.result()
    per_text = torch.stack(values)
    means, stderrs = per_text.mean(0), _stderr(per_text)
    layer_means = means[:, 0].tolist()
    trend = depth_trend(layer_means)
    half = torch.tensor([last_layers_mean(text, "half") for text in per_text[:, :, 0]], dtype=torch.float64)
    return Measured(
        num_texts=len(kept),
        num_left_out=len(texts) - len(kept),
        num_tokens=sum(map(len, kept)),
        cosine_mean=layer_means,
        cosine_stderr=stderrs[:, 0].tolist(),
        cosine_centred_mean=means[:, 1].tolist(),
        cosine_centred_stderr=stderrs[:, 1].tolist(),
        cosine_without_first_mean=means[:, 2].tolist(),
        cosine_without_first_stderr=stderrs[:, 2].tolist(),
        cosine_p05=result.cosine_p05,
        cosine_p50=result.cosine_p50,
        cosine_p95=result.cosine_p95,
        effective_rank=means[:, 3].tolist(),
        effective_rank_stderr=stderrs[:, 3].tolist(),
        histogram=result.histogram,
        averaged_histogram=None if averaged is None else averaged.histogram().tolist(),
        spearman=trend.spearman,
        kendall=trend.kendall,
        last_means=[
            last_layers_mean(layer_means, count) if count <= len(layer_means) else None
            for count in LAST_COUNTS
        ],
        last_half_mean=last_layers_mean(layer_means, "half"),
        last_half_stderr=float(_stderr(half)),
    )


def _stderr(values: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension; NaN below two values."""
    number = len(values)
    return values.std(0) / number**0.5 if number > 1 else values[0] * float("nan")


def encode(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    """The first tokens of a text, special tokens added as the tokenizer does by default."""
    # A book need not be tokenised to its end: what is far behind the last token that counts changes nothing.
    head = text[: 32 * max_tokens]
    ids = list(tokenizer(head, verbose=False)["input_ids"])
    if len(head) < len(text) and len(ids) < max_tokens + 32:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:max_tokens]


def _check_ids(model: nn.Module, token_ids: Sequence[Sequence[int]]) -> None:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(getattr(embeddings, "weight", None), "shape", (None,))[0]
    largest = max(map(max, token_ids))
    if rows is not None and largest >= rows:
        raise ValueError(
            f"Token {largest} has no embedding, the model has {rows}; its tokenizer belongs to another model."
        )


def _states_by_batch(
    model: nn.Module, token_ids: Sequence[Sequence[int]], batch_sequences: int | None
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yields (numbers of texts, their hidden states [B, n, F] per layer), longest texts first."""
    import torch

    from raydisp.memory import is_out_of_memory

    device = next(model.parameters()).device
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(token_ids):
        by_length.setdefault(len(ids), []).append(number)
    for length in sorted(by_length, reverse=True):  # what does not fit into memory is found at once
        left = by_length[length]
        size = batch_sequences or _batch_size(model, length, device)
        while left:
            chunk = left[:size]
            input_ids = torch.tensor([list(token_ids[number]) for number in chunk], device=device)
            try:
                states = _hidden_states(model, input_ids)
            except Exception as error:
                if not is_out_of_memory(error) or len(chunk) == 1:
                    raise
                size = len(chunk) // 2
                continue
            yield chunk, states
            del states
            left = left[len(chunk) :]


def _hidden_states(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    import torch

    # Without the output head, whose logits would take more memory than everything else.
    base: Any = getattr(model, "base_model", model)
    with torch.no_grad():
        output = base(input_ids=input_ids, use_cache=False, output_hidden_states=True, return_dict=True)
    states = getattr(output, "hidden_states", None)
    if not states:
        raise ValueError(f"{type(model).__name__} gives no hidden states; only decoder-only models do.")
    return list(states)


def _batch_size(model: nn.Module, length: int, device: torch.device) -> int:
    """Texts of a length that a forward pass may hold: a quarter of the free memory."""
    import torch

    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    features = getattr(config, "hidden_size", 4096)
    num_states = getattr(config, "num_hidden_layers", 100) + 1
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Beside all states, about twenty more of a block at work (its MLP is the widest part), in float32.
    per_text = (num_states + 20) * length * features * 4
    limit = _BATCH_TOKENS.get(device.type, 2048) // length
    return max(1, min(limit, free // 4 // per_text))

r"""Dispersion losses: hidden states [B, L, F] -> one number, lower where the tokens point further apart.

Five losses of arXiv:2602.00217 and six to compare them with; `dispersion_loss` chooses among them by name.
Each is computed per sequence over its own tokens and averaged over the sequences, through one custom operator
that returns value and gradient together: autograd keeps one [B, L, F] tensor per call and `torch.compile`
sees one node. Second derivatives are not provided.

Arguments that all share:
    hidden: [B, L, F] hidden states, L >= 2, F >= 2, any floating dtype. Computed in float32, in float64 where
        the input is; the gradient has the input's dtype. On CUDA the factors of the matrix products keep a
        half-precision input's dtype (autocast's dtype under autocast), with float32 sums.
    mask: [B, L], true (or 1) where a token counts; None counts all. Equal to leaving the others out.
        Sequences of fewer than two usable tokens leave the mean. Where no sequence is left, a CPU raises
        ValueError; other devices, which would have to be waited for, return 0.
    temperature: > 0, dimensionless for angles and unit vectors, a squared length for squared distances.
    clamp: in (0, 1); cosines are limited to +-(1 - clamp) before arccos. The gradient passes straight
        through: the slope of arccos is taken at the limited value.
They return a scalar, float32 (float64 for float64 input), and raise ValueError for arguments out of range.
Below, z are hidden states, sums and means run over the tokens of a sequence, and u = z / max(|z|, 1e-6)
unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydisp.errors import suggest
from raydisp.losses.gradients import LOSSES, Batch
from raydisp.losses.pairwise import sequences_at_once


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, exponentials and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient waits for backward: float16 would lose it before loss scaling comes."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("raydisp::sequence_losses", mutates_args=())
def _sequence_losses(
    hidden: Tensor,
    mask: Tensor | None,
    variant: str,
    temperature: float,
    clamp: float,
    margin: float,
    product_dtype: torch.dtype | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """[B] losses, 0 for sequences without two usable tokens, and [B, L, F] their gradients (or empty)."""
    wide = _wide(hidden.dtype)
    batch_size, length, _ = hidden.shape
    on_cpu = hidden.device.type == "cpu"
    if mask is not None:
        mask = mask != 0
        if on_cpu and bool((mask.sum(1) < 2).all()):
            raise ValueError("No sequence has two usable tokens under this mask; dispersion needs pairs.")
        if on_cpu and bool(mask.all()):
            mask = None
    values = hidden.new_empty(batch_size, dtype=wide)
    gradients = hidden.new_zeros(hidden.shape if with_gradient else (0,), dtype=_saved_dtype(hidden.dtype))
    step = sequences_at_once(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, batch_size, step):
            part = slice(start, start + step)
            tokens = hidden[part].to(wide)
            counts = tokens.new_full((tokens.shape[0],), length)
            weights = None
            if mask is not None:
                tokens = torch.where(mask[part, :, None], tokens, 0)
                weights = mask[part].to(wide)
                counts = weights.sum(1)
            gradient = None
            if with_gradient:
                gradient = gradients[part] if gradients.dtype == wide else torch.zeros_like(tokens)
            batch = Batch(
                tokens=tokens,
                counts=counts,
                weights=weights,
                gradient=gradient,
                product_dtype=product_dtype,
                temperature=temperature,
                clamp=clamp,
                margin=margin,
            )
            result = LOSSES[variant](batch)
            values[part] = torch.where(counts >= 2, result, 0)
            if gradient is not None:
                if weights is not None:
                    gradient.mul_((weights * (counts >= 2)[:, None])[..., None])
                if gradients.dtype != wide:
                    gradients[part] = gradient
    return values, gradients


@_sequence_losses.register_fake
def _(
    hidden: Tensor,
    mask: Tensor | None,
    variant: str,
    temperature: float,
    clamp: float,
    margin: float,
    product_dtype: torch.dtype | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    values = hidden.new_empty(hidden.shape[0], dtype=_wide(hidden.dtype))
    return values, hidden.new_empty(hidden.shape if with_gradient else (0,), dtype=_saved_dtype(hidden.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, of_values: Tensor | None, of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if of_gradients is not None:
        raise NotImplementedError("raydisp's losses have no second derivatives.")
    if of_values is None:
        return (None,) * 8
    (gradients,) = ctx.saved_tensors
    gradient = gradients * of_values[:, None, None]
    if ctx.dtype == torch.float16:  # what float16 cannot hold stays finite: a zero token's slope is 1e6
        limit = torch.finfo(torch.float16).max
        gradient = gradient.clamp(-limit, limit)
    return gradient.to(ctx.dtype), *(None,) * 7


_sequence_losses.register_autograd(_backward, setup_context=_setup_context)


def _product_dtype(hidden: Tensor) -> torch.dtype | None:
    """What factors of matrix products are rounded to: half-precision products pay on CUDA alone."""
    if hidden.device.type != "cuda" or hidden.dtype == torch.float64:
        return None
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return None if hidden.dtype == torch.float32 else hidden.dtype


def check_settings(
    variant: str,
    *,
    temperature: float = 1.0,
    clamp: float = 0.1,
    margin: float = 0.5,
    max_tokens: int | None = None,
) -> None:
    """Raise ValueError for an unknown variant or a setting out of range; for use before there are tensors."""
    if variant not in VARIANTS:
        raise ValueError(
            f'variant = "{variant}" is not one of {", ".join(VARIANTS)}.' + suggest(variant, VARIANTS)
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature = {temperature} must be a finite number above 0.")
    if not 0 < clamp < 1:
        raise ValueError(f"clamp = {clamp} must lie between 0 and 1, both excluded.")
    if not 0 < margin <= 1:
        raise ValueError(f"margin = {margin} must lie above 0 and be at most 1, in units of 180 degrees.")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens = {max_tokens} must be at least 2, or None for all tokens.")


def _check_tensors(hidden: Tensor, mask: Tensor | None) -> None:
    if hidden.dim() != 3:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}; it must be [B, L, F] (sequences, tokens, features)."
        )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden has dtype {hidden.dtype}; it must be floating.")
    num_sequences, num_tokens, num_features = hidden.shape
    if num_sequences < 1:
        raise ValueError("hidden has no sequence (B = 0); at least one is needed.")
    if num_tokens < 2:
        raise ValueError(f"hidden has L = {num_tokens} tokens; dispersion needs at least two.")
    if num_features < 2:
        raise ValueError(f"hidden has F = {num_features} features; dispersion needs at least two.")
    if mask is not None and mask.shape != hidden.shape[:2]:
        raise ValueError(f"mask has shape {list(mask.shape)}; it must be [B, L] = {list(hidden.shape[:2])}.")


def _loss(
    variant: str,
    hidden: Tensor,
    mask: Tensor | None,
    *,
    temperature: float = 1.0,
    clamp: float = 0.1,
    margin: float = 0.5,
) -> Tensor:
    check_settings(variant, temperature=temperature, clamp=clamp, margin=margin)
    _check_tensors(hidden, mask)
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad
    values, _ = _sequence_losses(
        hidden,
        mask,
        variant,
        float(temperature),
        float(clamp),
        float(margin),
        _product_dtype(hidden),
        with_gradient,
    )
    if mask is None:
        return values.mean()
    num_usable = ((mask != 0).sum(1) >= 2).sum().clamp_min(1)
    return values.sum() / num_usable


def angular_spread(
    hidden: Tensor, *, temperature: float = 1.0, clamp: float = 0.1, mask: Tensor | None = None
) -> Tensor:
    r"""The paper's dispersion loss: log mean over i != j of exp(-D_ij / temperature), plus 0.01.

    D_ij = arccos(limited c_ij) / pi in [0, 1] with c_ij = u_i . u_j and u = z / (|z| + 0.01), whose additive
    0.01 makes the cosines depend on scale for norms below about 1. Arguments: see the module.

    Source: arXiv:2602.00217; follows the authors' code where it differs from their table.
    """
    return _loss("angular_spread", hidden, mask, temperature=temperature, clamp=clamp)


def orthogonalization(
    hidden: Tensor, *, margin: float = 0.5, clamp: float = 0.1, mask: Tensor | None = None
) -> Tensor:
    r"""Mean over i != j of max(0, margin - D_ij)^2, with D_ij as in `angular_spread`.

    Args:
        margin: in (0, 1], the angle in units of 180 degrees up to which tokens repel; 0.5 is orthogonal.

    Source: arXiv:2602.00217, the authors' code.
    """
    return _loss("orthogonalization", hidden, mask, margin=margin, clamp=clamp)


def l2_repel(hidden: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""log mean over all i, j of exp(-|z_i - z_j|^2 / temperature), plus 0.01, plus 0.1 mean(z^2).

    i = j is included, as in the authors' code, so the value has a floor of log(1 / L).

    Source: arXiv:2602.00217, the authors' code.
    """
    return _loss("l2_repel", hidden, mask, temperature=temperature)


def decorrelation(hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean over i != j of Cov_ij^2: squared correlations between tokens.

    Rows r_i are tokens standardised over their features (unbiased deviation), Cov_ij = r_i . r_j / (F - 1). A
    constant row becomes 0, where the authors' code gives NaN.

    Source: arXiv:2602.00217, the authors' code.
    """
    return _loss("decorrelation", hidden, mask)


def perplexity_entropy(hidden: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""Minus the mean over i of the entropy of p_ij = softmax over j != i of -|z_i - z_j|^2 / temperature.

    The entropy is - sum_j p_ij log2(p_ij + 0.01), in bits. Kept as the authors have it, it is *lowest* for
    identical points: it rewards even neighbour distances, not large ones.

    Source: arXiv:2602.00217, the authors' code.
    """
    return _loss("perplexity_entropy", hidden, mask, temperature=temperature)


def uniformity(hidden: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""log mean over i != j of exp(-2 |u_i - u_j|^2 / temperature); temperature 1 is the paper's t = 2.

    Source: Wang and Isola, arXiv:2005.10242.
    """
    return _loss("uniformity", hidden, mask, temperature=temperature)


def cosine(hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean over i != j of u_i . u_j, in O(L F).

    Source: CosReg, arXiv:1907.12009, there on output embeddings.
    """
    return _loss("cosine", hidden, mask)


def koleo(hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Minus the mean over i of log(min over j != i of |u_i - u_j| + 1e-8).

    For identical neighbours the gradient, which has no direction there, is 0. On CUDA the gradient is summed
    in no fixed order, unless `torch.use_deterministic_algorithms` is on.

    Source: arXiv:1806.03198.
    """
    return _loss("koleo", hidden, mask)


def variance_covariance(hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""VICReg's two regularising terms over the tokens of a sequence.

    Mean over features of max(0, 1 - sqrt(var_k + 1e-4)), plus (1 / F) sum over k != l of cov_kl^2, variances
    and covariances with L - 1. It grows with the fourth power of the scale of z.

    Source: arXiv:2105.04906.
    """
    return _loss("variance_covariance", hidden, mask)


def spread_out(hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""(mean over i != j of c_ij)^2 + max(0, mean over i != j of c_ij^2 - 1 / F), with c_ij = u_i . u_j.

    Source: arXiv:1708.06320.
    """
    return _loss("spread_out", hidden, mask)


def log_det(hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Minus the coding rate: -1/2 logdet(I + F / (L eps^2) U^T U), eps = 0.5, by the smaller Gram matrix.

    Source: arXiv:2006.08558.
    """
    return _loss("log_det", hidden, mask)


@dataclass(frozen=True)
class Variant:
    """A loss and the names of the settings it reads beside `hidden` and `mask`."""

    function: Callable[..., Tensor]
    settings: tuple[str, ...] = ()

    def __call__(self, hidden: Tensor, **settings: Any) -> Tensor:
        return self.function(hidden, **settings)


VARIANTS: dict[str, Variant] = {
    "angular_spread": Variant(angular_spread, ("temperature", "clamp")),
    "orthogonalization": Variant(orthogonalization, ("margin", "clamp")),
    "l2_repel": Variant(l2_repel, ("temperature",)),
    "decorrelation": Variant(decorrelation),
    "perplexity_entropy": Variant(perplexity_entropy, ("temperature",)),
    "uniformity": Variant(uniformity, ("temperature",)),
    "cosine": Variant(cosine),
    "koleo": Variant(koleo),
    "variance_covariance": Variant(variance_covariance),
    "spread_out": Variant(spread_out),
    "log_det": Variant(log_det),
}


def dispersion_loss(
    hidden: Tensor,
    variant: str = "angular_spread",
    *,
    temperature: float = 1.0,
    clamp: float = 0.1,
    margin: float = 0.5,
    max_tokens: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The loss of a variant by name; settings that it does not read are checked and otherwise ignored.

    Args:
        hidden: [B, L, F], see the module.
        variant: a key of `VARIANTS`.
        max_tokens: >= 2; of more tokens than that, so many positions are drawn, the same for all sequences,
            as the authors of arXiv:2602.00217 do. None uses every token.
        mask: [B, L], applied to the drawn positions.
        generator: what the positions are drawn from; None is torch's global generator, the only one that
            `torch.compile` can trace without a graph break.
        positions: [B, K] int64, K >= 2: each sequence's own, instead of drawing them; for `max_tokens`
            without a generator (`raydisp.positions.draw_positions`).
    Returns:
        Scalar, mean over the sequences that have two usable tokens.
    Raises:
        ValueError: an unknown variant or an argument out of range.
    """
    check_settings(variant, temperature=temperature, clamp=clamp, margin=margin, max_tokens=max_tokens)
    _check_tensors(hidden, mask)
    if positions is not None:
        hidden = _take_tokens(hidden, positions)
        mask = None if mask is None else mask.gather(1, positions)
    elif max_tokens is not None and max_tokens < hidden.shape[1]:
        device = hidden.device if generator is None else generator.device
        positions = torch.randperm(hidden.shape[1], generator=generator, device=device)[:max_tokens]
        positions = positions.to(hidden.device)
        hidden = hidden.index_select(1, positions)
        mask = None if mask is None else mask.index_select(1, positions)
    settings = {"temperature": temperature, "clamp": clamp, "margin": margin}
    chosen = VARIANTS[variant]
    return chosen(hidden, mask=mask, **{name: settings[name] for name in chosen.settings})


def _take_tokens(hidden: Tensor, positions: Tensor) -> Tensor:
    """[B, K, F]: of each sequence its own tokens."""
    if positions.dim() != 2 or positions.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"positions has shape {list(positions.shape)}; it must be [B, K], with B = {hidden.shape[0]}."
        )
    num_sequences, length, _ = hidden.shape
    starts = torch.arange(0, num_sequences * length, length, device=hidden.device)
    # Whole rows: gather would look up every single number, and scatter it back again.
    rows = hidden.flatten(0, 1).index_select(0, (positions + starts[:, None]).flatten())
    return rows.unflatten(0, (num_sequences, -1))

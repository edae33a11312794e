"""The losses against the reference values, against slow loops, and one contract that every variant keeps."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raydisp import losses
from raydisp.losses import VARIANTS, dispersion_loss, gradients, pairwise

pytestmark = pytest.mark.usefixtures("one_thread")


GOLDEN = np.load(Path(__file__).parent / "golden" / "dispersion_losses.npz")
CASES: list[dict[str, Any]] = json.loads(str(GOLDEN["cases"]))
AUTHORS_NAMES = {
    "tau_cos": "temperature",
    "tau_l2": "temperature",
    "clamp_threshold": "clamp",
    "margin": "margin",
}
ALL = sorted(VARIANTS)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Moderately condensed tokens: normal noise about a shared direction."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    shared = torch.randn(shape[0], 1, shape[2], generator=generator, dtype=torch.float64)
    return (noise + 0.7 * shared).to(dtype)


def value_and_gradient(hidden: Tensor, variant: str, **settings: Any) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().clone().requires_grad_()
    value = dispersion_loss(leaf, variant, **settings)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


# ----------------------------------------------------------------------------------- reference values


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=lambda i: f"{CASES[i]['variant']}-{CASES[i]['input']}-{i}"
)
def test_golden(index: int) -> None:
    case = CASES[index]
    settings = {AUTHORS_NAMES[name]: value for name, value in case["params"].items()}
    value, gradient = value_and_gradient(
        torch.from_numpy(GOLDEN[f"z_{case['input']}"]), case["variant"], **settings
    )
    # Agreement that golden/README.md states for float64.
    assert value.item() == pytest.approx(case["value"], rel=1e-10, abs=1e-12)
    expected = torch.from_numpy(GOLDEN[f"grad_{index}"])
    assert (gradient - expected).abs().max() <= 1e-8 * expected.abs().max()


# --------------------------------------------------------------- slow loops, written from the formulas


def loop_pairs(vectors: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(vectors)) for j in range(len(vectors)) if i != j]


def loop_unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-6)


def loop_uniformity(rows: Tensor) -> Tensor:
    unit = loop_unit(rows)
    terms = [torch.exp(-2 * (unit[i] - unit[j]).square().sum()) for i, j in loop_pairs(rows)]
    return torch.stack(terms).mean().log()


def loop_cosine(rows: Tensor) -> Tensor:
    unit = loop_unit(rows)
    return torch.stack([unit[i] @ unit[j] for i, j in loop_pairs(rows)]).mean()


def loop_koleo(rows: Tensor) -> Tensor:
    unit = loop_unit(rows)
    logs = []
    for i in range(len(rows)):
        nearest = torch.stack([(unit[i] - unit[j]).norm() for j in range(len(rows)) if j != i]).min()
        logs.append(torch.log(nearest + 1e-8))
    return -torch.stack(logs).mean()


def loop_variance_covariance(rows: Tensor) -> Tensor:
    num_tokens, num_features = rows.shape
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / (num_tokens - 1)
    hinge = torch.stack([torch.relu(1 - torch.sqrt(covariance[k, k] + 1e-4)) for k in range(num_features)])
    off = sum(covariance[k, m] ** 2 for k in range(num_features) for m in range(num_features) if k != m)
    return hinge.mean() + off / num_features


def loop_spread_out(rows: Tensor) -> Tensor:
    unit = loop_unit(rows)
    cosines = torch.stack([unit[i] @ unit[j] for i, j in loop_pairs(rows)])
    return cosines.mean() ** 2 + torch.relu(cosines.square().mean() - 1 / rows.shape[1])


def loop_log_det(rows: Tensor) -> Tensor:
    unit = loop_unit(rows)
    num_tokens, num_features = rows.shape
    scatter = num_features / (num_tokens * 0.5**2) * unit.T @ unit
    return -0.5 * torch.logdet(torch.eye(num_features, dtype=rows.dtype) + scatter)


LOOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniformity": loop_uniformity,
    "cosine": loop_cosine,
    "koleo": loop_koleo,
    "variance_covariance": loop_variance_covariance,
    "spread_out": loop_spread_out,
    "log_det": loop_log_det,
}


@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 4, 9), (3, 2, 3)], ids=str)
@pytest.mark.parametrize("variant", sorted(LOOPS))
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_comparison_losses_equal_a_slow_loop(variant: str, shape: tuple[int, int, int], scale: float) -> None:
    hidden = scale * tokens(*shape)
    value, gradient = value_and_gradient(hidden, variant)
    leaf = hidden.clone().requires_grad_()
    expected = torch.stack([LOOPS[variant](rows) for rows in leaf]).mean()
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    # float64 rounding of a few dozen operations, as for the golden values
    assert value.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
    assert (gradient - expected_gradient).abs().max() <= 1e-8 * expected_gradient.abs().max()


def loop_straight_through(
    rows: Tensor, variant: str, clamp: float, temperature: float, margin: float
) -> Tensor:
    """Pair by pair: the value at the limited cosine, and the slope of arccos there."""
    unit = rows / (rows.norm(dim=-1, keepdim=True) + 0.01)
    terms = []
    for i, j in loop_pairs(rows):
        product = unit[i] @ unit[j]
        limited = min(max(product.item(), -1 + clamp), 1 - clamp)
        slope = -1 / math.sqrt(1 - limited**2)
        angle = (math.acos(limited) + slope * (product - product.item())) / math.pi
        if variant == "angular_spread":
            terms.append(torch.exp(-angle / temperature))
        else:
            terms.append(torch.relu(margin - angle) ** 2)
    mean = torch.stack(terms).mean()
    return mean.log() + 0.01 if variant == "angular_spread" else mean


@pytest.mark.parametrize("variant", ["angular_spread", "orthogonalization"])
def test_gradient_passes_straight_through_the_clamp(variant: str) -> None:
    hidden = tokens(1, 6, 8)
    hidden[0, 1] = 1.01 * hidden[0, 0] + 0.01 * hidden[0, 2]  # limited above
    hidden[0, 3] = -hidden[0, 2] + 0.01 * hidden[0, 4]  # limited below
    settings = {"clamp": 0.3, "temperature": 0.5, "margin": 0.9}
    value, gradient = value_and_gradient(hidden, variant, **settings)
    leaf = hidden.clone().requires_grad_()
    expected = loop_straight_through(leaf[0], variant, **settings)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)  # float64 rounding
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    assert gradient[0, 0].abs().max() > 0


# ---------------------------------------------------------------- the contract, kept by every variant


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 4, 6)], ids=str)
@pytest.mark.parametrize("variant", ALL)
def test_gradcheck(variant: str, shape: tuple[int, int, int], masked: bool) -> None:
    mask = torch.ones(shape[:2], dtype=torch.bool)
    if masked:
        mask[0, 1] = mask[1, 0] = False
    hidden = tokens(*shape).requires_grad_()
    # clamp = 0.001: these cosines stay inside it, where the gradient is the true one
    torch.autograd.gradcheck(lambda z: dispersion_loss(z, variant, clamp=0.001, mask=mask), (hidden,))


@pytest.mark.parametrize("variant", ALL)
def test_tiles_of_any_shape_agree(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = tokens(2, 37, 5)
    value, gradient = value_and_gradient(hidden, variant)
    monkeypatch.setattr(pairwise, "_tile_shape", lambda x: (8, 12))
    monkeypatch.setattr(pairwise, "CPU_TILE", 100)
    monkeypatch.setattr(pairwise, "CPU_BLOCK", 30)
    monkeypatch.setattr(losses, "sequences_at_once", lambda hidden: 2)
    tiled, tiled_gradient = value_and_gradient(hidden, variant)
    # Only the order of float64 sums differs.
    assert tiled.item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(tiled_gradient, gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("variant", ALL)
def test_order_of_tokens_does_not_matter(variant: str) -> None:
    hidden = tokens(2, 12, 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    value, gradient = value_and_gradient(hidden, variant)
    permuted, permuted_gradient = value_and_gradient(hidden[:, order], variant)
    assert permuted.item() == pytest.approx(value.item(), rel=1e-12)  # order of float64 sums
    torch.testing.assert_close(permuted_gradient, gradient[:, order], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("variant", ALL)
def test_value_is_the_mean_over_sequences(variant: str) -> None:
    hidden = tokens(3, 7, 5)
    each = [dispersion_loss(hidden[i : i + 1], variant).item() for i in range(3)]
    assert dispersion_loss(hidden, variant).item() == pytest.approx(sum(each) / 3, rel=1e-13)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("shape", [(2, 11, 4), (2, 5, 9)], ids=str)
def test_mask_equals_leaving_tokens_out(variant: str, shape: tuple[int, int, int]) -> None:
    hidden = tokens(*shape)
    hidden[0, 2] = math.inf  # what is masked must not be read
    hidden[1, 0] = math.nan
    mask = torch.ones(shape[:2], dtype=torch.int64)
    mask[0, 2] = mask[0, 3] = mask[1, 0] = 0
    value, gradient = value_and_gradient(hidden, variant, mask=mask)
    kept = [hidden[i][mask[i].bool()][None] for i in range(2)]
    expected = [value_and_gradient(rows, variant) for rows in kept]
    # Sums run in another order: float64 rounding.
    assert value.item() == pytest.approx(sum(v.item() for v, _ in expected) / 2, rel=1e-12)
    assert gradient[0, 2:4].abs().max() == 0
    assert gradient[1, 0].abs().max() == 0
    for i in range(2):
        torch.testing.assert_close(gradient[i][mask[i].bool()], expected[i][1][0] / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ALL)
def test_sequences_without_two_tokens_leave_the_mean(variant: str) -> None:
    hidden = tokens(4, 6, 5)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    mask[2, 1:] = False
    value, gradient = value_and_gradient(hidden, variant, mask=mask)
    expected, expected_gradient = value_and_gradient(hidden[[0, 3]], variant)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)  # order of float64 sums
    torch.testing.assert_close(gradient[[0, 3]], expected_gradient, rtol=1e-9, atol=1e-13)
    assert gradient[[1, 2]].abs().max() == 0
    with pytest.raises(ValueError, match="No sequence has two usable tokens"):
        dispersion_loss(hidden[:1], variant, mask=torch.zeros(1, 6))


@pytest.mark.parametrize("variant", ALL)
def test_max_tokens_draws_from_the_generator(variant: str) -> None:
    hidden = tokens(2, 20, 5)

    def draw(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return dispersion_loss(hidden, variant, max_tokens=6, generator=generator).item()

    positions = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:6]
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(3) == pytest.approx(dispersion_loss(hidden[:, positions], variant).item(), rel=1e-12)
    every = dispersion_loss(hidden, variant, max_tokens=20, generator=torch.Generator())
    assert every.item() == dispersion_loss(hidden, variant).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ALL)
def test_each_sequence_may_have_its_own_positions(variant: str, masked: bool) -> None:
    hidden = tokens(2, 9, 5).requires_grad_()
    positions = torch.tensor([[0, 3, 4, 8], [1, 2, 5, 7]])
    mask = torch.ones(2, 9)
    mask[0, [3, 6]] = 0
    value = dispersion_loss(hidden, variant, positions=positions, mask=mask if masked else None)
    (gradient,) = torch.autograd.grad(value, hidden)
    kept = [[0, 4, 8] if masked else [0, 3, 4, 8], [1, 2, 5, 7]]
    expected = sum(dispersion_loss(hidden[[b]][:, chosen], variant) for b, chosen in enumerate(kept)) / 2
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)  # order of float64 sums
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


def condensed_and_dispersed() -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 0.1 * noise + 1, noise


@pytest.mark.parametrize("variant", [name for name in ALL if name != "perplexity_entropy"])
def test_lower_for_dispersed_tokens(variant: str) -> None:
    condensed, dispersed = condensed_and_dispersed()
    if variant in ("variance_covariance", "l2_repel"):  # these measure spread at the tokens' own scale
        condensed = condensed / 10
        dispersed = dispersed / 2
    if variant == "decorrelation":  # this one removes a shared constant; let the shared direction vary
        condensed = condensed * torch.linspace(-1, 1, 32, dtype=torch.float64)
    assert dispersion_loss(dispersed, variant) < dispersion_loss(condensed, variant)


def test_perplexity_entropy_is_lowest_for_identical_points() -> None:
    """The authors' sign, kept for parity: it prefers condensed tokens."""
    condensed, dispersed = condensed_and_dispersed()
    identical = condensed[:, :1].expand_as(condensed)
    values = [dispersion_loss(z, "perplexity_entropy").item() for z in (identical, condensed, dispersed)]
    assert values == sorted(values)
    # 23 equal neighbours: the entropy is log2 of 1 / (1/23 + 0.01)
    assert values[0] == pytest.approx(-math.log2(1 / (1 / 23 + 0.01)), rel=1e-12)


# ------------------------------------------------------------------------------------------ bad input

BAD_INPUT = [
    ({"hidden": torch.zeros(3, 4)}, r"shape \[3, 4\].*\[B, L, F\]"),
    ({"hidden": torch.zeros(0, 3, 4)}, "no sequence"),
    ({"hidden": torch.zeros(1, 1, 4)}, "L = 1 tokens.*at least two"),
    ({"hidden": torch.zeros(1, 3, 1)}, "F = 1 features.*at least two"),
    ({"hidden": torch.zeros(1, 3, 4, dtype=torch.int64)}, "torch.int64.*floating"),
    ({"temperature": 0.0}, "temperature = 0.0.*above 0"),
    ({"temperature": -1.0}, "temperature = -1.0.*above 0"),
    ({"temperature": math.nan}, "temperature = nan.*above 0"),
    ({"clamp": 0.0}, "clamp = 0.0.*between 0 and 1"),
    ({"clamp": 1.0}, "clamp = 1.0.*between 0 and 1"),
    ({"margin": 0.0}, "margin = 0.0.*above 0"),
    ({"margin": 1.5}, "margin = 1.5.*at most 1"),
    ({"max_tokens": 1}, "max_tokens = 1.*at least 2"),
    ({"positions": torch.zeros(2, 2, dtype=torch.int64)}, r"positions has shape \[2, 2\].*\[B, K\]"),
    ({"mask": torch.ones(1, 4)}, r"mask has shape \[1, 4\].*\[1, 3\]"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_INPUT, ids=[str(message) for _, message in BAD_INPUT])
@pytest.mark.parametrize("variant", ALL)
def test_bad_input_is_refused(variant: str, wrong: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.ones(1, 3, 4), **wrong}
    with pytest.raises(ValueError, match=message):
        dispersion_loss(variant=variant, **arguments)


def test_unknown_variant_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        ValueError, match=r'"angular_spred" is not one of angular_spread.*Did you mean "angular_spread"'
    ):
        dispersion_loss(torch.ones(1, 3, 4), "angular_spred")


@pytest.mark.parametrize("variant", ALL)
def test_functions_take_just_the_settings_they_read(variant: str) -> None:
    hidden = tokens(2, 7, 5)
    chosen = VARIANTS[variant]
    other = {"temperature": 0.7, "clamp": 0.3, "margin": 0.4}
    direct = chosen.function(hidden, **{name: other[name] for name in chosen.settings})
    assert direct.item() == dispersion_loss(hidden, variant, **other).item()
    for name in chosen.settings:
        assert direct.item() != dispersion_loss(hidden, variant, **{**other, name: 0.9}).item()


def test_the_table_and_the_formulas_name_the_same_losses() -> None:
    assert list(VARIANTS) == list(gradients.LOSSES)


# --------------------------------------------------------------------------------- numbers and dtypes


def extreme_tokens(kind: str) -> Tensor:
    base = tokens(2, 8, 16, dtype=torch.float32)
    if kind == "identical":
        return base[:, :1].expand(-1, 8, -1).clone()
    if kind == "zero":
        return torch.zeros_like(base)
    if kind == "one zero":
        base[:, 3] = 0
        return base
    if kind == "opposed":
        base[:, 4:] = -base[:, :4]
        return base
    if kind == "constant":
        return torch.full_like(base, 0.1)
    return base / base.norm(dim=-1, keepdim=True) * 1e4


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["identical", "zero", "one zero", "opposed", "constant", "large"])
@pytest.mark.parametrize("variant", ALL)
def test_extreme_vectors_stay_finite(variant: str, kind: str, dtype: torch.dtype, masked: bool) -> None:
    hidden = extreme_tokens(kind).to(dtype)
    mask = torch.ones(2, 8)
    if masked:
        mask[0, 1:] = 0  # one token is left: out of the mean
        mask[1, 0] = 0
    for settings in ({}, {"temperature": 0.003, "clamp": 1e-4}, {"clamp": 1e-12}):
        value, gradient = value_and_gradient(hidden, variant, mask=mask, **settings)
        assert value.dtype == torch.float32
        assert gradient.dtype == dtype
        assert math.isfinite(value.item())
        assert gradient.isfinite().all()


@pytest.mark.parametrize("variant", ["angular_spread", "uniformity", "l2_repel"])
@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.05])
def test_low_temperatures_keep_their_value_in_float32(variant: str, temperature: float) -> None:
    """Where exp(-D / temperature) underflows for every pair, sums are relative to the largest term."""
    hidden = tokens(2, 9, 16, seed=3)
    value, gradient = value_and_gradient(hidden, variant, temperature=temperature)
    narrow, narrow_gradient = value_and_gradient(hidden.float(), variant, temperature=temperature)
    # Exponents near 1e3 carry a float32 error near 1e-4, and so do the weights of the gradient.
    assert narrow.item() == pytest.approx(value.item(), rel=1e-4)
    assert (narrow_gradient - gradient).abs().max() <= 2e-3 * gradient.abs().max()


def test_low_temperature_equals_the_plain_formula() -> None:
    hidden = tokens(1, 6, 8, seed=2)
    unit = hidden[0] / (hidden[0].norm(dim=-1, keepdim=True) + 0.01)
    angles = [math.acos((unit[i] @ unit[j]).clamp(-0.9, 0.9)) / math.pi for i, j in loop_pairs(unit)]
    expected = torch.logsumexp(-torch.tensor(angles, dtype=torch.float64) / 0.0005, 0).item()
    expected += 0.01 - math.log(len(angles))
    actual = dispersion_loss(hidden, "angular_spread", temperature=0.0005).item()
    assert actual == pytest.approx(expected, rel=1e-12)  # float64 rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ALL)
def test_half_precision_input_is_computed_in_float32(variant: str, dtype: torch.dtype) -> None:
    hidden = tokens(2, 24, 16).to(dtype)
    value, gradient = value_and_gradient(hidden, variant)
    expected, expected_gradient = value_and_gradient(hidden.float(), variant)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)  # the same float32 computation
    # the gradient is rounded once to 8 (bfloat16) or 11 bits
    assert (gradient.float() - expected_gradient).abs().max() <= 2**-8 * expected_gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ALL)
def test_half_precision_products(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA computes, with the products done on the CPU: factors rounded, sums in float32."""
    hidden = tokens(2, 24, 16).to(dtype)
    expected, expected_gradient = value_and_gradient(hidden.float(), variant)
    monkeypatch.setattr(losses, "_product_dtype", lambda hidden: hidden.dtype)
    value, gradient = value_and_gradient(hidden, variant)
    # Factors are off by 2^-9 (bfloat16), so products of unit vectors by about 1e-3; a log, or the step from
    # products to squared distances in l2_repel's exponent, enlarges that by a small factor.
    assert value.item() == pytest.approx(expected.item(), rel=2e-2, abs=5e-3)
    if variant == "koleo":
        return  # of two neighbours at nearly the same distance, rounding may choose the other
    assert (gradient.float() - expected_gradient).abs().max() <= 5e-2 * expected_gradient.abs().max()


def test_float16_gradients_survive_loss_scaling() -> None:
    """Unscaled they are below float16's least number; scaled before the cast they are not."""
    hidden = (300 * tokens(1, 512, 64)).to(torch.float16).requires_grad_()
    scale = 65536.0
    (dispersion_loss(hidden) * scale).backward()
    assert hidden.grad is not None
    wide = hidden.detach().float().requires_grad_()
    dispersion_loss(wide).backward()
    assert wide.grad is not None
    expected = wide.grad * scale
    assert (hidden.grad.float() - expected).abs().max() <= 2**-10 * expected.abs().max()  # one rounding


# ------------------------------------------------------------------------- how torch may wrap the call


@pytest.mark.parametrize("variant", ALL)
def test_autocast_changes_nothing_on_a_cpu(variant: str) -> None:
    hidden = tokens(2, 9, 8, dtype=torch.float32)
    value, gradient = value_and_gradient(hidden, variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_value, cast_gradient = value_and_gradient(hidden, variant)
    assert cast_value.item() == value.item()
    assert torch.equal(cast_gradient, gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    hidden = tokens(2, 9, 8)
    _, expected = value_and_gradient(hidden, "angular_spread")
    leaf = hidden.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(dispersion_loss, leaf, use_reentrant=use_reentrant).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("variant", ALL)
def test_compiles_to_one_operator_without_graph_break(variant: str) -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()  # or the variants before this one use up the limit on recompiling
    hidden = tokens(2, 9, 8).requires_grad_()
    mask = torch.ones(2, 9)
    mask[0, 0] = 0
    compiled = torch.compile(
        lambda z, m: 3 * dispersion_loss(2 * z, variant, mask=m), backend=record, fullgraph=True
    )
    value = compiled(hidden, mask)
    assert value.item() == (3 * dispersion_loss(2 * hidden, variant, mask=mask)).item()
    (graph,) = graphs
    operators = [node for node in graph.graph.nodes if "sequence_losses" in str(node.target)]
    assert len(operators) == 1
    assert len(graph.graph.nodes) < 25  # no tile loop is unrolled: inputs, checks of the mask, the mean


def test_the_operator_keeps_torchs_rules() -> None:
    hidden = tokens(2, 5, 4).requires_grad_()
    mask = torch.ones(2, 5)
    mask[0, 0] = 0
    arguments = (hidden, mask, "angular_spread", 1.0, 0.1, 0.5, None, True)
    # Schema, fake tensors (shapes and dtypes) and autograd registration against the real operator.
    torch.library.opcheck(
        losses._sequence_losses,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("variant", ALL)
def test_accelerators_are_never_waited_for(
    variant: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors hold no values: whatever would copy one to the host, and so wait for a device, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    hidden = torch.empty(3, 1100, 16, device="meta", dtype=torch.bfloat16)
    mask = torch.empty(3, 1100, device="meta", dtype=torch.bool) if masked else None
    for temperature in (1.0, 0.001):
        values, gradient = losses._sequence_losses._init_fn(
            hidden, mask, variant, temperature, 0.1, 0.5, torch.bfloat16, True
        )
        assert (values.shape, values.dtype) == ((3,), torch.float32)
        assert (gradient.shape, gradient.dtype) == (hidden.shape, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ALL)
def test_cuda_equals_the_cpu_and_does_not_synchronise(variant: str, dtype: torch.dtype) -> None:
    hidden = tokens(3, 300, 64, dtype=dtype)
    mask = torch.ones(3, 300, dtype=torch.bool)
    mask[0, 200:] = False
    expected, expected_gradient = value_and_gradient(hidden, variant, mask=mask)
    on_device, device_mask = hidden.cuda(), mask.cuda()
    value_and_gradient(on_device, variant, mask=device_mask)  # libraries may synchronise when they start
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, gradient = value_and_gradient(on_device, variant, mask=device_mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # As for half-precision products above; float32 sums in another order are far closer.
    rel, largest = (1e-4, 1e-3) if dtype == torch.float32 else (2e-2, 5e-2)
    assert value.item() == pytest.approx(expected.item(), rel=rel, abs=5e-3)
    if variant != "koleo" or dtype == torch.float32:
        error = (gradient.cpu().float() - expected_gradient.float()).abs().max()
        assert error <= largest * expected_gradient.float().abs().max()


def test_second_derivatives_are_refused() -> None:
    hidden = tokens(1, 5, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(dispersion_loss(hidden), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        gradient.sum().backward()


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    plain = gradients.LOSSES["angular_spread"]

    def watched(batch: gradients.Batch) -> Tensor:
        wanted.append(batch.gradient is not None)
        return plain(batch)

    monkeypatch.setitem(gradients.LOSSES, "angular_spread", watched)
    hidden = tokens(1, 5, 4).requires_grad_()
    with torch.no_grad():
        dispersion_loss(hidden)
    dispersion_loss(hidden.detach())
    dispersion_loss(hidden)
    assert wanted == [False, False, True]


def test_long_sequences_need_no_square_matrix() -> None:
    """At L = 4096 one L x L float32 matrix is 64 MiB; a tile is 1 MiB."""
    hidden = torch.randn(1, 4096, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    with Watch():
        losses._sequence_losses._init_fn(hidden.detach(), None, "angular_spread", 1.0, 0.1, 0.5, None, True)
    assert 0 < largest <= pairwise.CPU_TILE * hidden.element_size()

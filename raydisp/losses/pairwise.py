r"""Sums over all token pairs and their gradients, tile by tile, without an [L, L] matrix.

A pairwise loss is a sum of f(x_i . x_j), or of f(|x_i - x_j|^2), over the ordered pairs of a sequence. The
matrix of products is symmetric, so only its tiles on and right of the diagonal are formed; each is turned
into values and slopes f' in place, the values are summed, and the slopes are multiplied into the gradient of
its rows and of its columns at once. That is one and a half matrix products in all where the textbook form has
two, and O(L F + tile) memory. The gradient comes out beside the sum, for the loss to scale.

Every function takes x [B, L, F] in float32 or float64, of few sequences at a time (`sequences_at_once`), and
`weights` [B, L] or None: 1 for the tokens that count, 0 for the others, whose rows of x must be zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# 256 x 1024 keeps a CPU's matrix product near its peak and the elementwise passes inside its cache.
CPU_ROWS = 256
CPU_TILE = 256 * 1024
CPU_BLOCK = 2**18
# An accelerator wants few large kernels: 2^24 float32 entries are 64 MiB; a tile needs two or three of them.
ACCELERATOR_ROWS = 1024
ACCELERATOR_TILE = 2**24


def sequences_at_once(hidden: Tensor) -> int:
    """How many sequences of [B, L, F] to take together: as many as a tile holds whole, at least one."""
    length = hidden.shape[1]
    if hidden.device.type == "cpu":
        return max(1, CPU_TILE // length**2)
    return max(1, ACCELERATOR_TILE // (min(length, ACCELERATOR_ROWS) * length))


def _tile_shape(x: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile for x [B, L, F]; short sequences get fewer rows, to skip more symmetry."""
    batch, length, _ = x.shape
    if x.device.type == "cpu":
        rows = min(CPU_ROWS, max(CPU_ROWS // 2, length // 4))
        return rows, max(rows, CPU_TILE // (rows * batch))
    rows = min(ACCELERATOR_ROWS, length)
    return rows, max(rows, ACCELERATOR_TILE // (rows * batch))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 sums for half-precision factors, as a float32 tensor."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())  # half-precision products gain nothing on other devices


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """total += factor * a @ b; if one of a and b is in half precision, the other is rounded to it too."""
    if a.dtype == b.dtype == total.dtype:
        total.baddbmm_(a, b, alpha=factor)
    else:
        narrow = a.dtype if b.dtype == total.dtype else b.dtype
        total.add_(product(a.to(narrow), b.to(narrow)), alpha=factor)


@dataclass
class Tile:
    """Products, or squared distances, of the tokens `rows` with the tokens `columns`.

    Attributes:
        entries: [B, T, C], free to be overwritten.
        diagonal: how many of the first columns are the rows themselves: T, or 0 away from the diagonal.
        weights: [B, L] or None.
    """

    entries: Tensor
    rows: slice
    columns: slice
    diagonal: int
    weights: Tensor | None
    _scratch: Tensor

    def scratch(self) -> Tensor:
        """Memory of the entries' shape, with whatever the last tile left in it."""
        return self._scratch[: self.entries.numel()].view(self.entries.shape)

    def leave_out(self, factors: Tensor, *, with_diagonal: bool = False) -> Tensor:
        """Set a tensor of the tile's shape to 0, in place, where a pair does not count."""
        if self.diagonal and not with_diagonal:
            factors.diagonal(dim1=1, dim2=2).zero_()
        if self.weights is not None:
            factors.mul_(self.weights[:, self.rows, None]).mul_(self.weights[:, None, self.columns])
        return factors

    def total(self, values: Tensor) -> Tensor:
        """[B]: the sum over the ordered pairs that this tile and its mirror image stand for."""
        if not self.diagonal:
            return 2 * values.sum((1, 2))
        return values[:, :, : self.diagonal].sum((1, 2)) + 2 * values[:, :, self.diagonal :].sum((1, 2))


def tiles(x: Tensor, *, distances: bool, weights: Tensor | None) -> Iterator[Tile]:
    """The tiles on and right of the diagonal, one after the other in the same memory."""
    batch, length, _ = x.shape
    num_rows, num_columns = _tile_shape(x)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    squares = x.to(wide).square().sum(-1) if distances else None
    size = batch * num_rows * min(num_columns, length)
    buffer, scratch = x.new_empty(size, dtype=wide), x.new_empty(size, dtype=wide)
    for start in range(0, length, num_rows):
        rows = slice(start, min(start + num_rows, length))
        for first in range(start, length, num_columns):
            columns = slice(first, min(first + num_columns, length))
            shape = (batch, rows.stop - rows.start, columns.stop - columns.start)
            entries = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
            diagonal = shape[1] if first == start else 0
            left, right = x[:, rows], x[:, columns].mT
            if squares is None:
                if x.dtype == wide:
                    torch.bmm(left, right, out=entries)
                else:
                    entries = product(left, right)
            else:
                if x.dtype == wide:
                    torch.baddbmm(squares[:, None, columns], left, right, alpha=-2, out=entries)
                else:
                    entries = product(left, right).mul_(-2).add_(squares[:, None, columns])
                entries.add_(squares[:, rows, None]).clamp_min_(0)
                if diagonal:
                    entries.diagonal(dim1=1, dim2=2).zero_()
            yield Tile(entries, rows, columns, diagonal, weights, scratch)


# A tile and whether slopes are wanted -> values and slopes, [B, T, C] both, in the tile's memory as far as
# possible; pairs that do not count are 0 in both.
PairFunction = Callable[[Tile, bool], tuple[Tensor, Tensor | None]]


def pair_sum(
    x: Tensor,
    function: PairFunction,
    *,
    distances: bool = False,
    weights: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """The sum of a function over the ordered pairs of each sequence.

    Args:
        x: [B, L, F].
        function: of the inner products, or of the squared distances if `distances`.
        weights: [B, L] or None.
        product_dtype: what the factors of the matrix products are rounded to; None leaves them as they are.
        gradient: [B, L, F] zeros in the dtype of x, to which the gradient of the sum with respect to x is
            written.
    Returns:
        [B].
    """
    factors = x if product_dtype is None else x.to(product_dtype)
    sums = x.new_zeros(x.shape[0])
    slope_sums = torch.zeros_like(x[..., 0]) if distances and gradient is not None else None
    # x_i meets each x_j twice, as (i, j) and as (j, i); d|x_i - x_j|^2 = 2 (x_i - x_j) doubles that.
    factor = -4.0 if distances else 2.0
    for tile in tiles(factors, distances=distances, weights=weights):
        values, slopes = function(tile, gradient is not None)
        sums += tile.total(values)
        if gradient is None or slopes is None:
            continue
        beyond = slice(tile.columns.start + tile.diagonal, tile.columns.stop)
        mirrored = slopes[:, :, tile.diagonal :].mT
        _add_product(gradient[:, tile.rows], slopes, factors[:, tile.columns], factor)
        if beyond.start < beyond.stop:
            _add_product(gradient[:, beyond], mirrored, factors[:, tile.rows], factor)
        if slope_sums is not None:
            slope_sums[:, tile.rows] += slopes.sum(2)
            slope_sums[:, beyond] += mirrored.sum(2)
    if gradient is not None and slope_sums is not None:
        gradient.addcmul_(slope_sums[..., None], factors.to(x.dtype), value=4)
    return sums


def extreme_pair(x: Tensor, *, distances: bool, weights: Tensor | None) -> Tensor:
    """[B]: the largest inner product, or smallest squared distance, of two different tokens that count."""
    sign = -1.0 if distances else 1.0
    best = x.new_full((x.shape[0],), -torch.inf)
    for tile in tiles(x, distances=distances, weights=weights):
        ranked = tile.entries.mul_(sign)
        if tile.diagonal:
            ranked.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        if weights is not None:
            uncounted = (weights[:, tile.rows, None] * weights[:, None, tile.columns]) == 0
            ranked.masked_fill_(uncounted, -torch.inf)
        best = torch.maximum(best, ranked.amax((1, 2)))
    return best * sign


def _square(tile: Tile, with_slopes: bool) -> tuple[Tensor, Tensor | None]:
    products = tile.leave_out(tile.entries)
    values = torch.square(products, out=tile.scratch())
    return values, products.mul_(2) if with_slopes else None


def squared_product_sum(
    x: Tensor,
    *,
    product_dtype: torch.dtype | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    r"""[B]: the sum over i != j of (x_i . x_j)^2, by whichever of X X^T and X^T X is smaller.

    The two have the same Frobenius norm. With more tokens than features the [F, F] one is far cheaper, and
    taking off the sum over i = j cancels little: the whole is at least (sum_i |x_i|^2)^2 / F. Zero rows of x
    add nothing, so that no weights are needed. `gradient` is as in `pair_sum`.
    """
    if x.shape[1] <= x.shape[2]:
        return pair_sum(x, _square, product_dtype=product_dtype, gradient=gradient)
    factors = x if product_dtype is None else x.to(product_dtype)
    gram = product(factors.mT, factors)
    squares = x.square().sum(-1)
    if gradient is not None:
        _add_product(gradient, factors, gram, 4.0)
        gradient.addcmul_(squares[..., None], x, value=-4)
    return gram.square().sum((1, 2)) - squares.square().sum(1)


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the tokens of x [B, L, F] for elementwise passes that stay inside a CPU's cache."""
    num_rows = max(1, CPU_BLOCK // (x.shape[0] * x.shape[2])) if x.device.type == "cpu" else x.shape[1]
    for start in range(0, x.shape[1], num_rows):
        yield slice(start, min(start + num_rows, x.shape[1]))


def row_stripes(x: Tensor) -> Iterator[slice]:
    """Slices of the tokens of x [B, L, F] such that [B, T, L] fits a tile."""
    limit = CPU_TILE if x.device.type == "cpu" else ACCELERATOR_TILE
    num_rows = max(1, limit // (x.shape[0] * x.shape[1]))
    for start in range(0, x.shape[1], num_rows):
        yield slice(start, min(start + num_rows, x.shape[1]))


def distance_stripe(
    x: Tensor, rows: slice, squares: Tensor, weights: Tensor | None, excluded: float
) -> Tensor:
    """[B, T, L] squared distances from some tokens to all; `excluded` for itself and uncounted tokens."""
    stripe = product(x[:, rows], x.mT).mul_(-2)
    stripe.add_(squares[:, None, :]).add_(squares[:, rows, None]).clamp_min_(0)
    stripe.diagonal(offset=rows.start, dim1=1, dim2=2).fill_(excluded)
    if weights is not None:
        stripe.masked_fill_(weights[:, None, :] == 0, excluded)
    return stripe

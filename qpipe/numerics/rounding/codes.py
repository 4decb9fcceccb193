"""Integer codes that minimize a quadratic error: greedy and beam search along a triangular factor, then descent.

For each row t of targets, find codes q in qmin..qmax, w = s (q - z), so that

    J = (t - w) H (t - w)^T

is small. With H = M M^T, M upper triangular, J = sum_j r_j^2 and r_j = sum_{i <= j} e_i M_ij, e = t - w:
taking the coordinates in order, each code sets its own r_j against what the earlier errors left there. One
candidate kept is the greedy rule (the same codes as GPTQ in that order, without an inverse); several are a
beam. `descend` then changes the one code of a row that lowers J most, by its best step, until no change of
one code lowers J.

All rows of all groups run together: targets (groups, rows, K), H and M (groups, K, K), s and z (groups, rows, 1 or K).

Source: Babai, "On Lovasz' lattice reduction and the nearest lattice point problem" (nearest plane); Frantar
et al., "GPTQ", arXiv 2210.17323.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpipe.numerics.rounding.rows import RowGrid

_BLOCK = 32
_LIFTS = (1e-5, 1e-4, 1e-3, 1e-2)
# Of one of the search's two large arrays at a time: 128 MiB.
_ELEMENTS = 1 << 25


def objective(target: Tensor, values: Tensor, h: Tensor) -> Tensor:
    """J per row, (groups, rows), float64."""
    e = target - values
    return ((e @ h).double() * e.double()).sum(-1)


def upper_factor(h: Tensor) -> Tensor:
    """M, upper triangular with H = M M^T, float64, (groups, K, K).

    Moments of few samples in float32 may have eigenvalues below 0 by their rounding: then H is that plus as small a
    multiple of the mean of its diagonal as does, each ten times the one before. Raises LinAlgError for one that is not
    finite, or so far from positive definite that the sum would be another problem.
    """
    turned = h.double().flip(1, 2)
    level = turned.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(h.shape[-1], dtype=torch.float64, device=h.device)
    lower, failed = torch.linalg.cholesky_ex(turned)
    lifts = torch.zeros_like(level)
    for lift in _LIFTS:
        if not failed.any():
            break
        lifts[failed > 0] = lift
        lower, failed = torch.linalg.cholesky_ex(turned + lifts * level * eye, check_errors=lift == _LIFTS[-1])
    factor: Tensor = lower.flip(1, 2)
    return factor


def search(target: Tensor, grid: RowGrid, factor: Tensor, order: Tensor, beam: int) -> Tensor:
    """Codes (groups, rows, K) by beam search in `order`, (groups, K); `factor` is that of H with permuted columns.

    `beam` candidates per row are kept; 1 is the greedy rule. Rows do not meet: they run in parts that fit memory.
    """
    index = order[:, None].expand(-1, target.shape[1], -1)
    permuted, columns, m = target.gather(2, index), grid.permuted(order), factor.to(target.dtype)
    part = max(1, _ELEMENTS // (target.shape[0] * target.shape[2] * beam))
    found = [
        _search_in_order(permuted[:, i : i + part], columns.some_rows(i, i + part), m, beam)
        for i in range(0, target.shape[1], part)
    ]
    codes = torch.cat(found, 1)
    return torch.empty_like(codes).scatter_(2, index, codes)


def _search_in_order(target: Tensor, grid: RowGrid, m: Tensor, beam: int) -> Tensor:
    groups, rows, k = target.shape
    left = target.new_zeros(groups, rows, beam, k)  # r_j as far as the earlier errors make it
    codes = target.new_zeros(groups, rows, beam, k)
    cost = target.new_full((groups, rows, beam), float("inf"))
    cost[..., 0] = 0.0
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        diagonal = m[:, start:stop, start:stop]
        errors, chosen, parents, cost = _search_block(
            target[..., start:stop], grid.columns(start, stop), diagonal, left[..., start:stop], cost
        )
        if beam > 1:
            codes[..., :start] = _take(codes[..., :start], parents)
            left[..., stop:] = _take(left[..., stop:], parents)
        codes[..., start:stop] = chosen
        change = errors.reshape(groups, rows * beam, -1) @ m[:, start:stop, stop:]
        left[..., stop:] += change.reshape(groups, rows, beam, -1)
    best = cost.argmin(-1)[..., None, None].expand(-1, -1, 1, k)
    return codes.gather(2, best)[:, :, 0]


def _search_block(
    target: Tensor, grid: RowGrid, m: Tensor, left: Tensor, cost: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Errors and codes (groups, rows, beam, block), each candidate's ancestor, and the costs."""
    groups, rows, beam, width = left.shape
    # What remains, errors and codes side by side: one gather moves a candidate's whole past.
    past = torch.cat([left, torch.zeros_like(left), torch.zeros_like(left)], -1)
    parents = torch.arange(beam, device=left.device).expand(groups, rows, beam)
    for j in range(width):
        s, z = grid.column(j)
        pivot = m[:, j, j, None, None]
        t = target[..., j, None]
        remains = past[..., j]
        wish = (t + remains / pivot) / s
        q = wish.round().clamp(grid.qmin - z, grid.qmax - z)
        e = t - q * s
        if beam > 1:
            q, e, remains, parent, cost = _branch(wish, q, e, t, s, z, remains, pivot, cost, grid)
            past, parents = _take(past, parent), parents.gather(2, parent)
        past[..., width + j], past[..., 2 * width + j] = e, q + z
        past[..., j + 1 : width] += e[..., None] * m[:, None, None, j, j + 1 :]
    return past[..., width : 2 * width], past[..., 2 * width :], parents, cost


def _branch(
    wish: Tensor,
    q: Tensor,
    e: Tensor,
    t: Tensor,
    s: Tensor,
    z: Tensor,
    remains: Tensor,
    pivot: Tensor,
    cost: Tensor,
    grid: RowGrid,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each candidate with its nearest and its second nearest code; the cheapest `beam` of them go on."""
    beam = q.shape[-1]
    other = torch.where(wish >= q, q + 1, q - 1)
    other = torch.where(other > grid.qmax - z, q - 1, torch.where(other < grid.qmin - z, q + 1, other))
    both_q = torch.stack([q, other], -1)
    both_e = torch.stack([e, t - other * s], -1)
    total = cost[..., None] + (remains[..., None] + both_e * pivot[..., None]).square()
    cost, index = total.flatten(-2).topk(beam, dim=-1, largest=False, sorted=True)
    parent = index // 2
    return (
        both_q.flatten(-2).gather(-1, index),
        both_e.flatten(-2).gather(-1, index),
        remains.gather(-1, parent),
        parent,
        cost,
    )


def descend(target: Tensor, codes: Tensor, grid: RowGrid, h: Tensor) -> tuple[Tensor, int]:
    """Codes from which no change of one code lowers J any more, and the number of changes made.

    J never rises. Changes that gain less than 1e-5 of one step's own curvature are left: float32 cannot tell them.
    """
    groups, rows, k = target.shape
    h = h.to(target.dtype)
    curvature = h.diagonal(dim1=1, dim2=2)
    group = torch.arange(groups, device=h.device).repeat_interleave(rows)
    flat = [v.expand(groups, rows, k).reshape(-1, k) for v in (target, grid.scale, grid.zero_point)]
    codes = codes.reshape(-1, k).clone()
    live = torch.arange(groups * rows, device=h.device)
    changes = 0
    while live.numel():
        t, s, z, q, g = flat[0][live], flat[1][live], flat[2][live], codes[live], group[live]
        slope = _slopes(t - (q - z) * s, h, g)
        q, changed = _descend_rows(q, slope, s, h, curvature[g] * s, g, grid)
        codes[live] = q
        changes += int(changed.sum())
        # The slopes were updated in float32; rows that moved are looked at again with fresh ones.
        live = live[changed > 0]
    return codes.reshape(groups, rows, k), changes


def _descend_rows(
    q: Tensor, slope: Tensor, s: Tensor, h: Tensor, bend: Tensor, g: Tensor, grid: RowGrid
) -> tuple[Tensor, Tensor]:
    """`slope` is (t - w) H, `bend` is s diag(H): a code's best step is slope / bend."""
    codes, changed = q.clone(), torch.zeros(len(q), dtype=torch.int64, device=q.device)
    index = torch.arange(len(q), device=q.device)
    least = 1e-5 * (bend * s)
    while len(index):
        step = (slope / bend).round()
        step = (codes + step).clamp(grid.qmin, grid.qmax) - codes
        gain = step * s * (2.0 * slope - step * bend) - least
        best, j = gain.max(-1)
        moving = best > 0.0
        count = int(moving.sum())
        if 4 * count < 3 * len(index):
            # Rows that rest drop out, in bulk: every removal copies.
            q[index] = codes
            index, codes, slope, s, bend = (
                index[moving],
                codes[moving],
                slope[moving],
                s[moving],
                bend[moving],
            )
            least, g, j, step, moving = least[moving], g[moving], j[moving], step[moving], moving[moving]
        j = j[:, None]
        move = step.gather(1, j) * moving[:, None]
        codes = codes.scatter_add(1, j, move)
        slope = slope - (move * s.gather(1, j)) * h[g, j[:, 0]]
        changed[index] += moving
    return q, changed


def _slopes(e: Tensor, h: Tensor, g: Tensor) -> Tensor:
    if len(h) == 1:
        return e @ h[0]
    return (
        torch.einsum("nk,nkl->nl", e, h[g])
        if e.shape[1] <= 64
        else torch.cat([e[g == i] @ h[i] for i in range(len(h))])
    )


def _take(values: Tensor, parent: Tensor) -> Tensor:
    return values.gather(2, parent[..., None].expand(-1, -1, -1, values.shape[-1]))

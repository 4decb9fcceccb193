"""What detection heads need: regions of interest, boxes that survive, sampling places that are learned."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe.model.operators.registry import number, operator

Number = Tensor | float | tuple[float, ...] | None


@operator("NonMaxSuppression", numbers=(2, 3, 4))
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    most: Number = None,
    iou_threshold: Number = None,
    score_threshold: Number = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """The (batch, class, box) of the boxes that stay, int64 (found, 3); computed on the host.

    Of boxes (N, B, 4) and scores (N, C, B), best first, a box goes that overlaps a better one by more than
    `iou_threshold`, or whose score is not above `score_threshold`; at most `most` stay in each class."""
    limit = 0 if most is None else int(number(most))
    overlap = 0.0 if iou_threshold is None else float(number(iou_threshold))
    least = None if score_threshold is None else float(number(score_threshold))
    corners = _corners(boxes.detach().cpu(), bool(center_point_box))
    chosen: list[tuple[int, int, int]] = []
    for batch, per_class in enumerate(scores.detach().cpu()):
        for category, row in enumerate(per_class):
            kept = _survivors(corners[batch], row, limit, overlap, least)
            chosen += [(batch, category, box) for box in kept]
    return torch.tensor(chosen, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _corners(boxes: Tensor, centred: bool) -> Tensor:
    """(…, 4) as y1, x1, y2, x2 with y1 <= y2 and x1 <= x2; `centred` boxes are x, y, width, height."""
    if centred:
        x, y, width, height = boxes.unbind(-1)
        return torch.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2], -1)
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _survivors(boxes: Tensor, scores: Tensor, limit: int, overlap: float, least: float | None) -> list[int]:
    order = scores.argsort(descending=True, stable=True)
    if least is not None:
        order = order[scores[order] > least]
    kept: list[int] = []
    while len(order) and len(kept) < limit:
        best, order = int(order[0]), order[1:]
        kept.append(best)
        order = order[_iou(boxes[best], boxes[order]) <= overlap]
    return kept


def _iou(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box (4,) with others (n, 4); 0 where they have no area."""
    sides = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0)
    both = sides.prod(1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both
    return torch.where(union > 0, both / union, torch.zeros_like(both))


@operator("RoiAlign")
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """x (N, C, H, W) at each of `rois` (R, 4; x1, y1, x2, y2), bilinear: (R, C, output_height, output_width).

    In mode "max", as onnxruntime does, the largest of the weighted corners, not of their sums."""
    half_pixel = coordinate_transformation_mode == "half_pixel"
    regions = []
    for roi, batch in zip(rois, batch_indices.tolist(), strict=True):
        x1, y1, x2, y2 = (roi * spatial_scale - (0.5 if half_pixel else 0.0)).unbind()
        height, width = y2 - y1, x2 - x1
        if not half_pixel:
            height, width = height.clamp(min=1.0), width.clamp(min=1.0)
        rows = _places(y1, height, output_height, sampling_ratio, x.shape[2])
        columns = _places(x1, width, output_width, sampling_ratio, x.shape[3])
        regions.append(_pooled(x[batch], rows, columns, (output_height, output_width), mode))
    empty = x.new_zeros((0, x.shape[1], output_height, output_width))
    return torch.stack(regions) if regions else empty


Places = tuple[Tensor, Tensor, Tensor, Tensor]


def _places(start: Tensor, length: Tensor, bins: int, ratio: int, size: int) -> Places:
    """Along one dimension: the lower and upper neighbour of each sample, the weight of the upper one, and
    whether the sample lies inside; `ratio` samples in each bin, as many as it has pixels where that is 0."""
    samples = ratio if ratio > 0 else max(1, math.ceil(float(length) / bins))
    steps = torch.arange(bins * samples, device=start.device)
    place = start + (steps // samples + (steps % samples + 0.5) / samples) * (length / bins)
    inside = (place >= -1.0) & (place <= size)
    place = place.clamp(0, size - 1)
    low = place.detach().floor().long()
    return low, (low + 1).clamp(max=size - 1), place - low, inside


def _pooled(x: Tensor, rows: Places, columns: Places, bins: tuple[int, int], mode: str) -> Tensor:
    """x (C, H, W) -> (C, bins)."""
    parts = []
    for row, row_weight in ((rows[0], 1 - rows[2]), (rows[1], rows[2])):
        for column, column_weight in ((columns[0], 1 - columns[2]), (columns[1], columns[2])):
            weight = (row_weight * rows[3])[:, None] * (column_weight * columns[3])
            parts.append(x[:, row][:, :, column] * weight)
    corners = torch.stack(parts)
    value = corners.amax(0) if mode == "max" else corners.sum(0)
    split = value.reshape(x.shape[0], bins[0], -1, bins[1], value.shape[2] // bins[1])
    return split.amax((2, 4)) if mode == "max" else split.mean((2, 4))


@operator("DeformConv")
def deform_conv(
    x: Tensor,
    w: Tensor,
    offset: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: tuple[int, ...] = (1, 1),
    group: int = 1,
    kernel_shape: tuple[int, ...] | None = None,
    offset_group: int = 1,
    pads: tuple[int, ...] = (0, 0, 0, 0),
    strides: tuple[int, ...] = (1, 1),
) -> Tensor:
    """x (N, C, H, W) convolved with w (O, C/group, kh, kw), each tap moved by `offset` and scaled by `mask`."""
    n, channels, height, width = x.shape
    kh, kw = w.shape[2:]
    oh, ow = offset.shape[2:]
    moved = offset.reshape(n, offset_group, kh * kw, 2, oh, ow)
    taps = torch.arange(kh * kw, device=x.device)
    rows = _grid(taps // kw * dilations[0], oh, strides[0], pads[0]).unsqueeze(-1)
    columns = _grid(taps % kw * dilations[1], ow, strides[1], pads[1]).unsqueeze(-2)
    y = 2 * (moved[:, :, :, 0] + rows) / max(height - 1, 1) - 1
    z = 2 * (moved[:, :, :, 1] + columns) / max(width - 1, 1) - 1
    grid = torch.stack([z, y], -1).reshape(n * offset_group, kh * kw * oh, ow, 2)
    parts = x.reshape(n * offset_group, channels // offset_group, height, width)
    sampled = F.grid_sample(parts, grid.to(x.dtype), align_corners=True)
    sampled = sampled.reshape(n, offset_group, channels // offset_group, kh * kw, oh, ow)
    if mask is not None:
        sampled = sampled * mask.reshape(n, offset_group, 1, kh * kw, oh, ow)
    columns_of = sampled.reshape(n, group, channels // group * kh * kw, oh * ow)
    product = torch.einsum("gok,ngkp->ngop", w.reshape(group, w.shape[0] // group, -1), columns_of)
    result = product.reshape(n, w.shape[0], oh, ow)
    return result if b is None else result + b.reshape(1, -1, 1, 1)


def _grid(taps: Tensor, count: int, stride: int, begin: int) -> Tensor:
    """Where each tap lies in x without an offset: (taps, count)."""
    return taps.unsqueeze(1) + torch.arange(count, device=taps.device) * stride - begin

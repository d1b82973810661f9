"""Writers of the operators that only move data: reshapes, transposes, slices, concatenation, padding, resizing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from xedge.errors import UnsupportedGraph

from .tflite_emit import Emitter, Value, preferred
from .tflite_graph import Node

Array = NDArray[Any]


def transpose(e: Emitter, node: Node) -> None:
    """Transpose: the stored order stays, its meaning changes."""
    x = e.in_order(e.read(node))
    rank = len(x.shape)
    perm = list(node.attrs.get("perm") or reversed(range(rank)))
    made = replace(x, shape=tuple(x.shape[p] for p in perm), perm=tuple(perm.index(p) for p in x.perm))
    e.finish(node, made)


def reshape(e: Emitter, node: Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze."""
    e.finish(node, reshaped(e, e.read(node), e.graph.shapes[node.outputs[0]]))


def reshaped(e: Emitter, x: Value, target: Sequence[int]) -> Value:
    """`x` in ONNX shape `target`, with a TRANSPOSE only where the stored order makes it impossible without."""
    target = tuple(target)
    if x.shape == target:
        return x
    x = e.in_order(x)
    groups = _groups(x.shape, target)
    order = _order(x, groups)
    flat_image = len(target) == 2 and len(x.shape) == 4 and x.perm[0] == 0 and target[0] == x.shape[0]
    if order is None and flat_image:
        columns = np.arange(target[1]).reshape(x.shape[1:]).transpose([a - 1 for a in x.perm[1:]]).reshape(-1)
        return replace(e.reshape(x, target, (0, 1)), columns=columns)
    if order is None:  # bring the axes of each group together, groups in the order in which they are stored
        group_of = {axis: g for g, (axes, _) in enumerate(groups) for axis in axes}
        seen = list(dict.fromkeys(group_of[a] for a in x.perm if a in group_of))
        units = [a for a in x.perm if a not in group_of]
        front = [a for a in units if a == 0]
        x = e.layout(x, [*front, *(a for g in seen for a in groups[g][0]), *(a for a in units if a != 0)])
        order = _order(x, groups)
        assert order is not None
    candidates = [preferred(target), tuple(range(len(target)))]
    units = [a for a in range(len(target)) if a not in order]
    candidates.append((*(a for a in units if a == 0), *order, *(a for a in units if a != 0)))
    for perm in candidates:
        if [a for a in perm if a in order] == order:
            return e.reshape(x, target, perm)
    raise AssertionError("the last candidate holds the order by construction")


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes (sizes of 1 left out) that hold the same elements before and after."""
    left = [a for a, n in enumerate(old) if n != 1]
    right = [a for a, n in enumerate(new) if n != 1]
    groups = []
    while left or right:
        one, two = [left.pop(0)], [right.pop(0)]
        while (p := math.prod(old[a] for a in one)) != (q := math.prod(new[a] for a in two)):
            if p < q:
                one.append(left.pop(0))
            else:
                two.append(right.pop(0))
        groups.append((one, two))
    return groups


def _order(x: Value, groups: Sequence[tuple[list[int], list[int]]]) -> list[int] | None:
    """The order of the new axes when the stored order already has each group together and ascending."""
    stored = [a for a in x.perm if x.shape[a] != 1]
    order: list[int] = []
    while stored:
        found = [g for g in groups if g[0] == stored[: len(g[0])]]
        if not found:
            return None
        stored = stored[len(found[0][0]) :]
        order += found[0][1]
    return order


def concat(e: Emitter, node: Node) -> None:
    """Concat; inputs on another grid than the output's are requantised first."""
    shape, grid = e.graph.shapes[node.outputs[0]], e.grid(node)
    axis = node.attrs["axis"] % len(shape)
    live = [e.read(node, i) for i, name in enumerate(node.inputs) if e.is_activation(name)]
    if not live:
        raise UnsupportedGraph("it joins constants only", where=str(node), fix="fold it before converting")
    perm = e.in_order(live[0]).perm
    inputs = []
    for i, name in enumerate(node.inputs):
        if e.is_activation(name):
            inputs.append(e.layout(e.on(e.read(node, i), grid), perm).index)
        else:
            inputs.append(e.on_grid(name, e.graph.consts[name].transpose(perm), grid))
    options = schema.ConcatenationOptionsT(axis=perm.index(axis), fusedActivationFunction=0)
    made = e.emit("CONCATENATION", inputs, live[0], node.outputs[0], shape=shape, perm=perm, grid=grid, options=options)
    e.finish(node, made)


def split(e: Emitter, node: Node) -> None:
    """Split: one SLICE per part."""
    x = e.in_order(e.read(node))
    axis, start = node.attrs.get("axis", 0) % len(x.shape), 0
    for position, name in enumerate(node.outputs):
        stop = start + e.graph.shapes[name][axis]
        e.finish(node, _box(e, x, {axis: (start, stop, 1)}), position)
        start = stop


def slice_(e: Emitter, node: Node) -> None:
    """Slice with constant bounds, any step."""
    x = e.in_order(e.read(node))
    starts, ends, axes, steps = (e.const(node, i, "bounds") for i in range(1, 5))
    if starts is None or ends is None:
        raise UnsupportedGraph("its bounds are missing", where=str(node), fix="export with opset 17")
    which = range(len(starts)) if axes is None else [int(a) % len(x.shape) for a in axes]
    ranges = {}
    for i, axis in enumerate(which):
        step = 1 if steps is None else int(steps[i])
        ranges[axis] = (*slice(int(starts[i]), int(ends[i]), step).indices(x.shape[axis])[:2], step)
        # ONNX clamps an end below -size to "before the first element"; Python's slice needs None for that.
        if step < 0 and int(ends[i]) < -x.shape[axis]:
            ranges[axis] = (ranges[axis][0], -1, step)
    e.finish(node, _box(e, x, ranges))


def _box(e: Emitter, x: Value, ranges: Mapping[int, tuple[int, int, int]]) -> Value:
    """Part of `x`: start, stop, step per ONNX axis, as Python's range reads them."""
    full = {a: ranges.get(a, (0, n, 1)) for a, n in enumerate(x.shape)}
    shape = [len(range(*full[a])) for a in range(len(x.shape))]
    if all(full[a] == (0, n, 1) for a, n in enumerate(x.shape)):
        return x
    stored = [full[a] for a in x.perm]
    rank = len(stored)
    if all(step == 1 for _, _, step in stored) and rank <= 5:
        sizes = [-1 if full[a] == (0, x.shape[a], 1) else shape[a] for a in x.perm]
        inputs = [x.index, e.ints("begin", [s for s, _, _ in stored]), e.ints("size", sizes)]
        version = 5 if rank > 4 else None
        return e.emit(
            "SLICE", inputs, x, "sliced", shape=shape, grid=x.grid, options=schema.SliceOptionsT(), version=version
        )
    whole = sum(1 << i for i, a in enumerate(x.perm) if full[a] == (0, x.shape[a], 1))
    open_end = whole | sum(1 << i for i, (_, stop, _) in enumerate(stored) if stop == -1)
    options = schema.StridedSliceOptionsT(beginMask=whole, endMask=open_end)
    inputs = [x.index, *(e.ints("bounds", [s[i] for s in stored]) for i in range(3))]
    version = 4 if rank > 4 else None
    return e.emit("STRIDED_SLICE", inputs, x, "sliced", shape=shape, grid=x.grid, options=options, version=version)


def gather(e: Emitter, node: Node) -> None:
    """Gather of constant positions along one axis."""
    x, index = e.in_order(e.read(node)), e.const(node, 1, "index")
    assert index is not None
    axis = node.attrs.get("axis", 0) % len(x.shape)
    if index.ndim > 1:
        raise UnsupportedGraph(f"its index has {index.ndim} axes", where=str(node), fix="index with one axis")
    made = e.take(x, axis, np.where(index < 0, index + x.shape[axis], index).reshape(-1))
    e.finish(node, reshaped(e, made, e.graph.shapes[node.outputs[0]]))


def pad(e: Emitter, node: Node) -> None:
    """Pad: constant (PAD, PADV2), reflect (MIRROR_PAD), edge and wrap (GATHER); negative amounts cut."""
    x = e.in_order(e.read(node))
    rank = len(x.shape)
    amounts = e.const(node, 1, "amounts")
    assert amounts is not None
    axes = e.const(node, 3, "axes")
    which = range(rank) if axes is None else [int(a) % rank for a in axes]
    before, after = np.zeros(rank, int), np.zeros(rank, int)
    for i, axis in enumerate(which):
        before[axis], after[axis] = int(amounts[i]), int(amounts[len(amounts) // 2 + i])
    cut = {
        a: (max(-int(before[a]), 0), x.shape[a] - max(-int(after[a]), 0), 1)
        for a in range(rank)
        if before[a] < 0 or after[a] < 0
    }
    x = _box(e, x, cut)
    before, after = np.maximum(before, 0), np.maximum(after, 0)
    shape = [int(n + before[a] + after[a]) for a, n in enumerate(x.shape)]
    table = e.ints("pads", np.array([[before[a], after[a]] for a in x.perm]))
    mode = node.attrs.get("mode", "constant")
    if not before.any() and not after.any():
        made = x
    elif mode == "constant":
        fill = e.const(node, 2, "fill")
        number = 0.0 if fill is None else float(fill.reshape(-1)[0])
        if number == 0.0:
            made = e.emit("PAD", [x.index, table], x, "padded", shape=shape, grid=x.grid, options=schema.PadOptionsT())
        else:
            x = e.on(x, e.grid(node))  # the fill may lie outside the input's grid
            other = e.on_grid("fill", np.array([number]), x.grid)
            options = schema.PadV2OptionsT()
            made = e.emit("PADV2", [x.index, table, other], x, "padded", shape=shape, grid=x.grid, options=options)
    elif mode == "reflect" and all(before[a] < n and after[a] < n for a, n in enumerate(x.shape)):
        options = schema.MirrorPadOptionsT(mode=0)
        made = e.emit("MIRROR_PAD", [x.index, table], x, "padded", shape=shape, grid=x.grid, options=options)
    elif mode in ("edge", "wrap"):
        made = x
        for axis in range(rank):
            if before[axis] or after[axis]:
                made = e.take(
                    made, axis, np.pad(np.arange(x.shape[axis]), (int(before[axis]), int(after[axis])), mode=mode)
                )
    else:
        raise UnsupportedGraph(f"mode {mode!r}", where=str(node), fix="use constant, reflect, edge or wrap")
    e.finish(node, made)


def depth_to_space(e: Emitter, node: Node) -> None:
    """DepthToSpace: TFLite's is ONNX's DCR; CRD (torch's PixelShuffle) reorders the channels before."""
    block = node.attrs["blocksize"]
    x = e.nhwc(e.read(node), node)
    if node.attrs.get("mode", "DCR") == "CRD":
        channels = np.arange(x.shape[1]).reshape(-1, block * block).T.reshape(-1)
        x = e.take(x, 1, channels) if np.any(channels != np.arange(x.shape[1])) else x
    options = schema.DepthToSpaceOptionsT(blockSize=block)
    shape = e.graph.shapes[node.outputs[0]]
    e.finish(node, e.emit("DEPTH_TO_SPACE", [x.index], x, node.outputs[0], shape=shape, grid=x.grid, options=options))


def space_to_depth(e: Emitter, node: Node) -> None:
    """SpaceToDepth as ONNX has it (DCR); mode CRD is torch's PixelUnshuffle."""
    block = node.attrs["blocksize"]
    x = e.nhwc(e.read(node), node)
    options, shape = schema.SpaceToDepthOptionsT(blockSize=block), e.graph.shapes[node.outputs[0]]
    made = e.emit("SPACE_TO_DEPTH", [x.index], x, node.outputs[0], shape=shape, grid=x.grid, options=options)
    if node.attrs.get("mode", "DCR") == "CRD" and x.shape[1] > 1:
        made = e.take(made, 1, np.arange(shape[1]).reshape(block * block, -1).T.reshape(-1))
    e.finish(node, made)


def resize(e: Emitter, node: Node) -> None:
    """Resize of H and W: nearest in every ONNX variant, linear in the three that TFLite has."""
    mode, how = node.attrs.get("mode", "nearest"), node.attrs.get("coordinate_transformation_mode", "half_pixel")
    x = e.nhwc(e.read(node), node)
    shape = e.graph.shapes[node.outputs[0]]
    if shape[:2] != x.shape[:2] or how == "tf_crop_and_resize" or node.attrs.get("antialias"):
        raise UnsupportedGraph("it does more than scale H and W", where=str(node), fix="resize H and W, no antialias")
    if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise UnsupportedGraph("it keeps the aspect ratio", where=str(node), fix="give both sizes")
    scales = e.const(node, 2, "scales")
    axes = node.attrs.get("axes")
    factors = [shape[a] / x.shape[a] for a in range(4)]
    if scales is not None and scales.size:
        for i, axis in enumerate(range(4) if axes is None else axes):
            factors[axis % 4] = float(scales[i])
    wanted = [_coordinates(how, shape[a], x.shape[a], factors[a], mode) for a in (2, 3)]
    sizes = e.ints("sizes", shape[2:])
    if mode == "nearest":
        picks = [
            _nearest(c, node.attrs.get("nearest_mode", "round_prefer_floor"), x.shape[2 + i])
            for i, c in enumerate(wanted)
        ]
        made = _resize_nearest(e, x, picks, shape, sizes)
    elif mode == "linear":
        made = _resize_linear(e, node, x, wanted, shape, sizes)
    else:
        raise UnsupportedGraph(f"mode {mode!r}", where=str(node), fix="use nearest or linear")
    e.finish(node, made)


def _coordinates(how: str, out: int, size: int, factor: float, mode: str) -> Array:
    """Input coordinates of the outputs along one axis (ONNX Resize, coordinate_transformation_mode)."""
    i = np.arange(out, dtype=np.float64)
    if how == "asymmetric":
        return i / factor
    if how == "align_corners":
        return i * (size - 1) / (factor * size - 1) if out > 1 else i
    if how == "half_pixel_symmetric":
        return size / 2 * (1 - out / (factor * size)) + (i + 0.5) / factor - 0.5
    if how == "pytorch_half_pixel" and out == 1:
        return np.zeros(1)
    return np.asarray((i + 0.5) / factor - 0.5)


def _nearest(at: Array, rule: str, size: int) -> Array:
    rounded = {
        "round_prefer_floor": np.ceil(at - 0.5),
        "round_prefer_ceil": np.floor(at + 0.5),
        "floor": np.floor(at),
        "ceil": np.ceil(at),
    }[rule]
    return np.asarray(np.clip(rounded, 0, size - 1), np.int64)


def _resize_nearest(e: Emitter, x: Value, picks: Sequence[Array], shape: Sequence[int], sizes: int) -> Value:
    """RESIZE_NEAREST_NEIGHBOR when one of its variants picks the same pixels, else GATHER along H and W."""

    def own(d: int, corners: bool, half: bool) -> Array:
        size, i = x.shape[2 + d], np.arange(shape[2 + d], dtype=np.float32)
        step = np.float32((size - 1) / (len(i) - 1)) if corners and len(i) > 1 else np.float32(size / len(i))
        at = i * step if not half else (i + np.float32(0.5)) * step
        at = np.floor(at + np.float32(0.5)) if corners else np.floor(at)
        return np.asarray(np.minimum(at, size - 1), np.int64)

    for corners, half in ((False, False), (False, True), (True, False)):
        if all(np.array_equal(own(d, corners, half), picks[d]) for d in range(2)):
            options = schema.ResizeNearestNeighborOptionsT(alignCorners=corners, halfPixelCenters=half)
            version = 3 if corners or half else None
            return e.emit(
                "RESIZE_NEAREST_NEIGHBOR", [x.index, sizes], x, "resized",
                shape=shape, grid=x.grid, options=options, version=version,
            )  # fmt: skip
    for d in range(2):
        x = e.take(x, 2 + d, picks[d])
    return x


def _resize_linear(
    e: Emitter, node: Node, x: Value, wanted: Sequence[Array], shape: Sequence[int], sizes: int
) -> Value:
    for corners, half, how in (
        (False, True, "half_pixel"),
        (True, False, "align_corners"),
        (False, False, "asymmetric"),
    ):
        own = [_coordinates(how, shape[a], x.shape[a], shape[a] / x.shape[a], "linear") for a in (2, 3)]
        if all(
            np.allclose(np.clip(own[d], 0, x.shape[2 + d] - 1), np.clip(wanted[d], 0, x.shape[2 + d] - 1))
            for d in (0, 1)
        ):
            options = schema.ResizeBilinearOptionsT(alignCorners=corners, halfPixelCenters=half)
            version = 3 if half else None
            return e.emit(
                "RESIZE_BILINEAR", [x.index, sizes], x, "resized",
                shape=shape, grid=x.grid, options=options, version=version,
            )  # fmt: skip
    raise UnsupportedGraph(
        "TFLite has no bilinear variant with these coordinates",
        where=str(node),
        fix="use half_pixel, align_corners or asymmetric with sizes that divide evenly",
    )


MOVE_WRITERS: Final[Mapping[str, Any]] = {
    "Concat": concat,
    "DepthToSpace": depth_to_space,
    "Gather": gather,
    "Pad": pad,
    "Reshape": reshape,
    "Resize": resize,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Transpose": transpose,
}

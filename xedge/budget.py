"""Step 7: the bits of every weight under the budget that was asked: mean bits, packed bytes, or the largest drop.

The last two have no closed form: the artefact is written and measured, and the mean bits found by bisection. Nothing
but the integers is made again for each trial: ranges, moments and distortions are measured once.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch import nn

from xedge.codebook import quantize_by_codebook
from xedge.data import Data, at_once, batches, enough
from xedge.errors import AccuracyMissed, UnsupportedGraph, UsageError
from xedge.export import write_flavour
from xedge.judge import Judge
from xedge.onnx_graph import Graph
from xedge.pack import pack
from xedge.quantize import ScaleTable, Sensitivity, quantize
from xedge.ranges import Calibration, calibrate, for_pictures, last_layers, patch_moments
from xedge.rounding import Array, choose_ridges, layers_of
from xedge.sensitivity import Sample, distortions
from xedge.train import predict
from xedge.twins import Image, room

if TYPE_CHECKING:
    from xedge.progress import Talk
    from xedge.request import Loaded, Request
    from xedge.target import Target

CALIBRATED = 256
"""Training images that set the ranges, the patch moments and the sensitivities."""
HELD = 128
"""Images held back for choosing, on which rounding is judged."""
LEAST = 2.0
STEP = 0.125
"""Mean bits between two neighbouring trials of a bisection."""


def calibrated(data: Data, seed: int, proto: ModelProto, *, feedback: bool = True) -> Calibration:
    """What the training images show of a float graph, with the ridges that held-back ones choose for `feedback`."""
    calibration = calibrate(proto, lambda: (x for x, _ in samples(data, seed)))
    if data.restores:
        calibration = for_pictures(proto, calibration)
    if feedback:
        calibration = choose_ridges(proto, calibration, patch_moments(proto, (x for x, _ in held(data, seed))))
    return calibration


def choose_bits(loaded: Loaded, model: nn.Module, proto: ModelProto, talk: Talk) -> ScaleTable:
    """Quantise under the request's budget.

    Args:
        loaded: the request with its data and targets.
        model: the float model. proto: its float graph.
        talk: says what each trial gave.

    Raises:
        UsageError: no artefact is as small as --bytes.
        AccuracyMissed: 8 bits, or --bits, already cost more than --bits-drop.
    """
    request, data, coding = loaded.request, loaded.data, loaded.request.counted
    calibration = calibrated(data, request.seed, proto, feedback=request.feedback)
    tables = None
    if request.bits < 8 or request.codebook or request.bytes is not None or request.bits_drop is not None:
        talk.say(f"  sensitivity: {request.sensitivity}")

        def felt(how: Sensitivity) -> dict[str, Array]:
            return distortions(
                how, model, proto, calibration, lambda: samples(data, request.seed), loaded.teacher,
                held=lambda: held(data, request.seed), feedback=request.feedback, seed=request.seed,
                shared=loaded.bits_per == "tensor", coded=coding == "entropy",
            )  # fmt: skip

        try:
            tables = felt(request.sensitivity)
        except UnsupportedGraph as e:
            if request.sensitivity != "fisher":
                raise
            talk.say(f"  {e}: by output instead")
            tables = felt("output")

    counts = {la.name: la.rows.size for la in layers_of(proto, calibration.patches).values()}
    floats = {n for n in counts if request.keep_float is not None and re.search(request.keep_float, n)}
    counts = {n: c for n, c in counts.items() if n not in floats}
    least = least_bits(loaded, proto, counts)

    fits = tables is not None and not request.codebook
    images = fitted_on(data, request.seed, proto, request.fit) if fits else None

    def at(bits: float) -> ScaleTable:
        own = partial(quantize, images=images, bits_per=loaded.bits_per, coding=coding)
        method = quantize_by_codebook if request.codebook else own
        return method(
            proto, calibration, mean_bits=bits, tables=tables, feedback=request.feedback,
            correct=request.bias_correction, rule=request.ranges, least=least, keep_float=floats,
        )  # fmt: skip

    fewest = _fewest(loaded, counts, least)
    grid = [*np.arange(max(LEAST, np.ceil(fewest / STEP) * STEP), request.bits, STEP).tolist(), request.bits]
    if request.bytes is not None:
        allowed, sizes = request.bytes, list[int]()

        def small(table: ScaleTable) -> bool:
            sizes.append(max(_packed(table, proto, t) for t in loaded.targets))
            talk.say(f"  {table.mean_bits():.3f} mean bits: {sizes[-1]} bytes")
            return sizes[-1] <= allowed

        found = _last(grid, at, small)
        if found is None:
            raise UsageError(
                f"--bytes {allowed} is less than the {min(sizes)} of the packed artefact at {grid[0]:g} mean bits",
                fix="keep fewer channels with --macs, or allow more bytes"
                + ("; --coding fixed packs a little smaller" if coding == "entropy" else ""),
            )
        bits, table = found
        grid = grid[: grid.index(bits) + 1]
    if loaded.bits_drop is not None:
        judge, drop = Judge.of(data), loaded.bits_drop
        base, labels = predict(model, data.select, limit=judge.held(len(data.select)))

        def good(table: ScaleTable) -> bool:
            lost = max(_lost(table, proto, t, loaded, base, labels) for t in loaded.targets)
            talk.say(f"  {table.mean_bits():.3f} mean bits: {judge.say(lost)} lost on held-back training data")
            return lost <= drop

        found = _last(grid[::-1], at, good)
        if found is None:
            raise AccuracyMissed(
                f"{grid[-1]:g} mean bits already lose more than --bits-drop {judge.say(drop)} on held-back "
                "training data",
                fix="allow a larger drop, or "
                + ("raise --bits" if grid[-1] < 8 else "leave layers float: --keep-float"),
            )
        return found[1]
    return at(request.bits) if request.bytes is None else table


def least_bits(loaded: Loaded, proto: ModelProto, counts: Mapping[str, int]) -> dict[str, int]:
    """Layer -> fewest bits of its channels: what --bits-min asks for, and where --bits has room for it 8 for the last
    layers of nets that restore pictures.

    Args:
        loaded: the request with its data.
        proto: the float graph.
        counts: weights of each layer that is quantised.
    """
    request = loaded.request
    least = {n: max(b for b, p in request.bits_min if re.search(p, n)) for n in counts if _floored(request, n)}
    if not loaded.data.restores:
        return least
    last = {n.input[1].removesuffix(".weight") for n in last_layers(proto)[0]}
    protected = {**dict.fromkeys(last & set(counts), 8), **least}
    return protected if _fewest(loaded, counts, protected) <= request.bits else least


def _fewest(loaded: Loaded, counts: Mapping[str, int], least: Mapping[str, int]) -> float:
    """The mean bits that the floors alone take."""
    none = 0 if loaded.bits_per == "channel" else 1
    return sum(max(least.get(n, 0), none) * c for n, c in counts.items()) / max(sum(counts.values()), 1)


def _floored(request: Request, layer: str) -> bool:
    return any(re.search(pattern, layer) for _, pattern in request.bits_min)


def _last(
    grid: list[float], at: Callable[[float], ScaleTable], fits: Callable[[ScaleTable], bool]
) -> tuple[float, ScaleTable] | None:
    """The last of `grid` whose table fits, by bisection, with it; None where none does. The first fits most easily."""
    best, low, high = None, -1, len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        table = at(grid[middle])
        if fits(table):
            best, low = (grid[middle], table), middle
        else:
            high = middle
    return best


def samples(data: Data, seed: int) -> Iterator[Sample]:
    """Training images one by one, [1, C, H, W], with their labels: all that rounding ever sees."""
    for x, y in batches(data.train, 1, shuffle_seed=seed, limit=enough(data.train, CALIBRATED)):
        yield x.numpy(), y[0] if data.restores else int(y[0])


def held(data: Data, seed: int) -> Iterator[Sample]:
    """Images held back for choosing, one by one: what ridges and bits are chosen on."""
    for x, y in batches(data.select, 1, shuffle_seed=seed, limit=enough(data.select, HELD)):
        yield x.numpy(), y[0] if data.restores else int(y[0])


def fitted_on(
    data: Data, seed: int, proto: ModelProto, fit: bool | None = None
) -> tuple[list[Image], list[Image]] | None:
    """The images that layers are fitted on, and those that judge it; by default where memory has room for all."""
    count = sum(min(len(d), enough(d, n)) for d, n in ((data.train, CALIBRATED), (data.select, HELD)))
    if fit is False or (fit is None and count > room(Graph(proto))):
        return None
    return [x for x, _ in samples(data, seed)], [x for x, _ in held(data, seed)]


def _trial(table: ScaleTable, proto: ModelProto, target: Target, folder: Path) -> Path:
    flavoured = folder / "flavour.onnx"
    onnx.save(write_flavour(proto, table, target.flavour), flavoured)
    (folder / "made").mkdir()
    return target.compile(flavoured, folder / "made", "model")


def _packed(table: ScaleTable, proto: ModelProto, target: Target) -> int:
    """Bytes of the artefact as it is packed."""
    with tempfile.TemporaryDirectory() as folder:
        return pack(_trial(table, proto, target, Path(folder))).stat().st_size


def _lost(
    table: ScaleTable, proto: ModelProto, target: Target, loaded: Loaded, base: torch.Tensor, labels: torch.Tensor
) -> float:
    """Fall of quality that the artefact has against the float model on `select`."""
    data = loaded.data
    with tempfile.TemporaryDirectory() as folder:
        run = target.load(_trial(table, proto, target, Path(folder)), torch.get_num_threads())
        rows = batches(data.select, at_once(data.select), limit=len(base))
        parts = [run(x.numpy()) for x, _ in rows]
    got = torch.from_numpy(np.concatenate([p.reshape(len(p), -1) for p in parts]))
    judge = Judge.of(data)
    return judge.quality(base, labels, base) - judge.quality(got, labels, base)

"""What the bits change of the net itself: channels without bits go, the others are put in the order of their bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx import ModelProto
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from xedge.budget import calibrated, fitted_on
from xedge.errors import InternalError
from xedge.groups import Groups
from xedge.iterate import compose, restore
from xedge.onnx_graph import Graph, export_float
from xedge.order import Orders, by_width, reordered, reordered_table
from xedge.plan import Keep
from xedge.quantize import ScaleTable, round_to
from xedge.rounding import Bits
from xedge.run import Run
from xedge.soft import cut_silent, silent

if TYPE_CHECKING:
    from xedge.progress import Talk
    from xedge.request import Loaded

SAME = 1e-3
"""Of the largest output: what another order of float sums may change."""


@dataclass(frozen=True)
class Rounded:
    """A net, its float graph and its table of scales.

    Attributes:
        model: in float.
        keep: its channels, over the original's.
        weights, floats, scales: the files of these three.
        orders: how its channels lie, where not as in the original.
    """

    model: nn.Module
    keep: Keep
    weights: Path
    floats: Path
    scales: Path
    orders: Orders = field(default_factory=dict)


def save(model: nn.Module, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """A model's tensors as safetensors."""
    tensors = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, path, dict(notes or {}))


def export(model: nn.Module, loaded: Loaded, path: Path) -> None:
    """A model's float graph, at the opset that all targets take."""
    onnx.save(export_float(model, loaded.data.shape, min(t.opset for t in loaded.targets)), path)


def without_silent(run: Run, loaded: Loaded, at: Rounded, groups: Groups, talk: Talk) -> Rounded:
    """The net without channels of 0 bits, and the others rounded again to the bits that they have.

    Args:
        at: the net as it was rounded first.
        groups: of the original.
    """
    table, now = ScaleTable.load(at.scales), groups.after(at.keep)
    wanted = silent(now, table, {g.name: g.size for g in groups.groups}, loaded.settings.align)
    if all(mask.all() for mask in wanted.values()):
        return at

    def narrow(path: Path) -> None:
        small, kept = cut_silent(loaded, at.model, now, wanted)
        save(small, path, {"kept": json.dumps({name: np.flatnonzero(mask).tolist() for name, mask in kept.items()})})

    inputs = {"weights": at.weights, "scales": at.scales, "align": loaded.settings.align}
    weights = run.step("narrow.safetensors", inputs, narrow)
    with safe_open(weights, "pt") as opened:
        lists = json.loads(opened.metadata()["kept"])
    kept = {name: np.isin(np.arange(len(mask)), lists[name]) for name, mask in wanted.items()}
    gone = sum(int((~mask).sum()) for mask in kept.values())
    if not gone:
        return at
    talk.say(f"  {gone} channels of 0 bits are cut")
    keep = compose(at.keep, kept)
    model = restore(loaded.factory(), groups, keep, weights)
    floats = run.step("narrow.onnx", {"model": weights}, lambda p: export(model, loaded, p))
    r, bits, coding = loaded.request, bits_left(now, kept, table), table.coding

    def rounded(path: Path) -> None:
        proto = onnx.load(floats)
        table = round_to(
            proto, calibrated(loaded.data, r.seed, proto, feedback=r.feedback), bits, feedback=r.feedback,
            correct=r.bias_correction, rule=r.ranges, images=fitted_on(loaded.data, r.seed, proto, r.fit),
            coding=coding,
        )  # fmt: skip
        if set(table.weights) != set(bits):
            raise InternalError("the cut net's weights have other names", where=str(floats), fix="--bits-min 1 .")
        table.save(path)

    scales = run.step("narrow-scales.safetensors", {"float": floats, "scales": at.scales}, rounded)
    return Rounded(model, keep, weights, floats, scales)


def bits_left(groups: Groups, keep: Keep, table: ScaleTable) -> dict[str, Bits]:
    """The bits of the outputs that `keep` leaves, by weight name."""
    bits: dict[str, Bits] = {name: w.planned.astype(np.float64) for name, w in table.weights.items()}
    reads = {(p.param, p.axis): p.kind == "in" for g in groups.groups for p in g.slices}
    for (param, axis), mask in groups.positions(keep).items():
        if param in bits and not reads[param, axis]:
            bits[param] = bits[param][mask]
    return bits


def in_order(run: Run, loaded: Loaded, at: Rounded, groups: Groups) -> Rounded:
    """The net with its channels in the order of their bits, where its graph allows that; the files that ship.

    Args:
        at: the net with its final integers.
        groups: of the original.
    """
    table, now = ScaleTable.load(at.scales), groups.after(at.keep)
    orders = by_width(at.model, now, table)
    model = reordered(at.model, now, orders)
    if not _same(at.model, model, torch.stack([loaded.data.train[0][0]])):
        orders, model = {}, at.model
    weights = run.step("model.safetensors", {"weights": at.weights, "scales": at.scales}, lambda p: save(model, p))
    floats = run.step("float.onnx", {"model": weights}, lambda p: export(model, loaded, p))

    def moved(path: Path) -> None:
        other = reordered_table(table, now, orders)
        before, after = (_errors(onnx.load(f), t) for f, t in ((at.floats, table), (floats, other)))
        if set(before) != set(after) or any(abs(after[n] - e) > 1e-3 * e + 1e-6 for n, e in before.items()):
            raise InternalError("the scales did not follow the channels", where=str(floats))
        other.save(path)

    scales = run.step("scales.safetensors", {"float": floats, "scales": at.scales}, moved)
    return replace(at, model=model, weights=weights, floats=floats, scales=scales, orders=orders)


@torch.no_grad()
def _same(before: nn.Module, after: nn.Module, x: torch.Tensor) -> bool:
    """Whether two nets give the same answers to an image."""
    want, got = before.eval()(x), after.eval()(x)
    return bool((want - got).abs().max() <= SAME * want.abs().max())


def _errors(proto: ModelProto, table: ScaleTable) -> dict[str, float]:
    """How far each weight lies from its integers: farther where a channel was left behind."""
    graph, out = Graph(proto), {}
    for name, w in table.weights.items():
        if graph.is_constant(name) and graph.array(name).shape == w.values.shape:
            step = w.scale.reshape([-1 if i == w.axis else 1 for i in range(w.values.ndim)])
            error = np.asarray(graph.array(name), np.float64) - w.values * step
            out[name] = float(np.square(error).mean() ** 0.5)
    return out


def words(first: ScaleTable, last: ScaleTable, before: Keep, after: Keep, align: int) -> list[str]:
    """What the report says of channels without bits.

    Args:
        first: of the net that pruning left, with channels `before`. last: of the one that ships, with `after`.
        align: the widths' multiples.
    """
    gone = sum(int((mask & ~after[name]).sum()) for name, mask in before.items())
    stay = sum(int((w.bits == 0).sum()) for w in last.weights.values())
    out = []
    if gone:
        whole, left = (sum(w.values.size for w in t.weights.values()) for t in (first, last))
        out.append(
            f"soft X-pruning: {gone} channels cut by quantisation; with their weights at 0 bits the mean is "
            f"{last.mean_bits() * left / whole:.2f} bits a weight"
        )
    if stay:
        out.append(
            f"soft X-pruning: {stay} channels of 0 bits stay: they are tied to others that have bits, or the width "
            f"would be no multiple of {align}"
        )
    return out

"""X-Quantization: bits per channel by what each channel's noise does, then rounding.

Giving output channel o of a layer b bits leaves the error delta_o = w_o - q_o(b) and the distortion D_o(b) =
delta_o^T Q_o delta_o; `sensitivity` has five choices of Q. `bits.allocate` spends the budget on the sum of distortions,
`rounding` chooses scales and integers, and the mean error goes into the bias (Nagel et al., ICCV 2019).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from xedge.bits import Compared, allocate, compare
from xedge.coding import code_length, width
from xedge.errors import UsageError
from xedge.onnx_graph import Graph
from xedge.ranges import Calibration, RangeRule, shared_ranges, wide_enough
from xedge.rounding import CORRECTED, Array, Bits, Layer, channel_axis, from_rows, layers_of, rounded
from xedge.target import BitsPer
from xedge.twins import Image, Twins

Coding = Literal["fixed", "entropy"]
"""What bits are: the width that all integers of a channel have, or the mean length of their code (`xedge.coding`)."""
Sensitivity = Literal["output", "fisher", "di", "kfac", "uniform", "mse"]
"""Which errors hurt: see `xedge.sensitivity`."""
LEVELS = np.arange(9)
"""Bits a channel may have inside its int8 container; with 0 bits only its bias is left of it."""
SLACK = 0.002
"""Bits by which a coded layer that came out longer than planned is made shorter still."""
CAUTION = 3
"""No channel gets fewer bits, or fewer than one below the mean: what errors of few bits cost is far from quadratic, and
those that look cheap on some images are not on others."""
IDLE = 1e-6
"""Of the mean energy of a layer's channels: less may have 0 bits all the same."""
BIAS_BITS = 28
"""An int32 bias stays below 2^28, so that the accumulator keeps room for the products and the bias for its
correction."""


@dataclass(frozen=True)
class WeightScale:
    """One weight on its grid.

    Attributes:
        layer: module name.
        scale: [C], step of each output channel; the zero-point is 0.
        bits: [C], width: a channel's integers have at most 2^b values (`rounding.Grid`).
        axis: of the ONNX initializer that `scale` runs along.
        values: int8, the shape of the initializer.
        bias: [C] float, the corrected bias; None where the node takes none.
        coded: [C], bits of code a weight, where these were planned; None where the widths were.
    """

    layer: str
    scale: NDArray[np.float32]
    bits: NDArray[np.uint8]
    axis: int
    values: NDArray[np.int8]
    bias: NDArray[np.float32] | None
    coded: Array | None = None

    @property
    def planned(self) -> NDArray[np.uint8] | Array:
        """[C], planned bits a weight."""
        return self.bits if self.coded is None else self.coded

    def rounded(self) -> NDArray[np.float32]:
        """The weights as they are now, of the shape of the initializer."""
        shape = [-1 if i == self.axis else 1 for i in range(self.values.ndim)]
        return self.values.astype(np.float32) * self.scale.reshape(shape)


@dataclass(frozen=True)
class ScaleTable:
    """Every scale of the model, named by the tensors of the float ONNX graph. All flavours are written from it.

    Attributes:
        weights: initializer name -> its grid.
        activations: tensor name -> (low, high), zero included.
        codebooks: whether the weights of a layer share few integers, which may be stored as such.
        bits_per: what has a width of its own; per "tensor" all scales of a weight are equal, and written as one.
        compared: the allocation of the bits beside the closed form; None where nothing was allocated.
    """

    weights: dict[str, WeightScale]
    activations: dict[str, tuple[float, float]]
    codebooks: bool = False
    bits_per: BitsPer = "channel"
    compared: Compared | None = None

    def mean_bits(self) -> float:
        """Planned bits a weight."""
        total = sum(w.values.size for w in self.weights.values())
        bits = sum(float(w.planned.mean()) * w.values.size for w in self.weights.values())
        return bits / total if total else 0.0

    @property
    def coding(self) -> Coding:
        """What planned bits are."""
        return "fixed" if all(w.coded is None for w in self.weights.values()) else "entropy"

    def bits_of(self) -> dict[str, list[int]]:
        """Layer -> width of each output channel."""
        return {w.layer: [int(b) for b in w.bits] for w in self.weights.values()}

    def save(self, path: Path) -> None:
        """Write the table as one safetensors file; names and ranges travel in its metadata."""
        import json

        from safetensors.numpy import save_file

        tensors: dict[str, NDArray[Any]] = {}
        meta: dict[str, Any] = {
            "activations": self.activations, "weights": {}, "codebooks": self.codebooks, "bits_per": self.bits_per,
            "compared": None if self.compared is None else astuple(self.compared),
        }  # fmt: skip
        for name, w in self.weights.items():
            meta["weights"][name] = {"layer": w.layer, "axis": w.axis}
            tensors[f"{name}|values"] = np.ascontiguousarray(w.values)
            tensors[f"{name}|scale"] = np.ascontiguousarray(w.scale)
            tensors[f"{name}|bits"] = np.ascontiguousarray(w.bits)
            for key, own in (("bias", w.bias), ("coded", w.coded)):
                if own is not None:
                    tensors[f"{name}|{key}"] = np.ascontiguousarray(own)
        save_file(tensors, path, {"table": json.dumps(meta, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> ScaleTable:
        """The inverse of `save`."""
        import json

        from safetensors import safe_open

        with safe_open(path, "np") as f:
            meta = json.loads(f.metadata()["table"])
            names = set(f.keys())
            weights = {
                name: WeightScale(
                    layer=row["layer"],
                    scale=f.get_tensor(f"{name}|scale"),
                    bits=f.get_tensor(f"{name}|bits"),
                    axis=row["axis"],
                    values=f.get_tensor(f"{name}|values"),
                    bias=f.get_tensor(f"{name}|bias") if f"{name}|bias" in names else None,
                    coded=f.get_tensor(f"{name}|coded") if f"{name}|coded" in names else None,
                )
                for name, row in meta["weights"].items()
            }
        activations = {k: (float(a), float(b)) for k, (a, b) in meta["activations"].items()}
        compared = None if meta.get("compared") is None else Compared(*meta["compared"])
        return cls(weights, activations, bool(meta.get("codebooks", False)), meta.get("bits_per", "channel"), compared)


def asymmetric(low: float, high: float) -> tuple[np.float32, int]:
    """Scale and uint8 zero-point of a range; int8 uses the zero-point minus 128."""
    scale = np.float32(max(high - low, 1e-8) / 255)
    return scale, int(np.clip(round(-low / float(scale)), 0, 255))


def symmetric(low: float, high: float) -> np.float32:
    """Scale of an int8 range with zero-point 0."""
    return np.float32(max(abs(low), abs(high), 1e-8) / 127)


def quantize(
    proto: ModelProto,
    calibration: Calibration,
    *,
    mean_bits: float,
    tables: Mapping[str, Array] | None = None,
    feedback: bool = True,
    correct: bool = True,
    rule: RangeRule = "mse",
    least: Mapping[str, int] | None = None,
    keep_float: Collection[str] = (),
    images: tuple[Sequence[Image], Sequence[Image]] | None = None,
    bits_per: BitsPer = "channel",
    coding: Coding = "fixed",
) -> ScaleTable:
    """Choose bits, scales and integers for every weight, and a range for every tensor.

    Args:
        proto: the float graph.
        calibration: of the same graph.
        mean_bits: budget, bits a weight on average over all weights, 2 to 8; never exceeded.
        tables: weight name -> distortion of each channel at each of LEVELS, [O, 9]; by default its output noise over
            the layer's output energy.
        feedback: feed rounding errors forward.
        correct: put mean errors into the biases.
        rule: how the ranges of the activations are chosen.
        least: layer -> least bits of its channels.
        keep_float: layers whose weights and results stay float; no mean of bits counts them.
        images: [1, C, H, W] each, on which layers are fitted to the rounded ones in front of them, and others that
            judge the fit (`xedge.twins`); without them no layer is.
        bits_per: what has a width of its own. A layer gets at least 1 bit, while a channel may get none.
        coding: what bits are; `tables` are of the same.

    Raises:
        UsageError: the budget lies outside 2 to 8 bits, or below what `least` asks for.
        UnsupportedGraph: the model has no weights that can be quantised.
    """
    if not 2 <= mean_bits <= 8:
        raise UsageError(f"--bits {mean_bits:g} is outside 2 to 8", fix="give the mean bits a weight, such as 4.5")
    every = layers_of(proto, calibration.patches, shared=bits_per == "tensor", coded=coding == "entropy")
    layers = {n: la for n, la in every.items() if la.name not in keep_float}
    if not layers:
        raise UsageError("no layer is left to quantise", fix="keep fewer float with --keep-float")
    chosen, compared = _choose(layers, mean_bits, tables, least or {}, feedback, bits_per)
    table = round_to(
        proto, calibration, chosen, feedback=feedback, correct=correct, rule=rule, images=images, bits_per=bits_per,
        coding=coding,
    )  # fmt: skip
    return replace(table, compared=compared)


def round_to(
    proto: ModelProto,
    calibration: Calibration,
    bits: Mapping[str, Bits],
    *,
    feedback: bool = True,
    correct: bool = True,
    rule: RangeRule = "mse",
    images: tuple[Sequence[Image], Sequence[Image]] | None = None,
    bits_per: BitsPer = "channel",
    coding: Coding = "fixed",
) -> ScaleTable:
    """`quantize` with the bits of each output channel given, by weight name; other layers stay float."""
    every = layers_of(proto, calibration.patches, shared=bits_per == "tensor", coded=coding == "entropy")
    layers = {n: la for n, la in every.items() if n in bits}
    ranges = float_ranges(proto, calibration, rule, layers)
    twins = None if images is None else Twins(proto, *images)
    weights = round_layers(proto, layers, bits, ranges, feedback=feedback, correct=correct, twins=twins)
    return ScaleTable(weights, ranges, bits_per=bits_per)


def float_ranges(
    proto: ModelProto, calibration: Calibration, rule: RangeRule, layers: Collection[str]
) -> dict[str, tuple[float, float]]:
    """The ranges of all tensors but those that weights outside of `layers` write: these stay float."""
    graph = Graph(proto)
    ranges = shared_ranges(proto, wide_enough(graph, calibration.ranges(rule)))
    for node in graph.weighted():
        if node.input[1] not in layers:
            ranges.pop(graph.written(node), None)
    return ranges


def round_layers(
    proto: ModelProto,
    layers: Mapping[str, Layer],
    bits: Mapping[str, Bits],
    ranges: Mapping[str, tuple[float, float]],
    *,
    feedback: bool = True,
    correct: bool = True,
    twins: Twins | None = None,
) -> dict[str, WeightScale]:
    """Scales, integers and biases of layers whose bits are chosen; `ranges` of the activations keep biases in int32.

    With `twins` each layer is fitted first to what the rounded ones in front of it give it.
    """
    graph, weights = Graph(proto), {}
    for name, layer in layers.items():
        fitted, shift = (layer, None) if twins is None else twins.fit(layer)
        least, planned = least_scale(graph, layer, ranges), bits[name]
        q, scale = rounded(fitted, planned, feedback=feedback, least=least)
        while layer.coded and (over := _longer(fitted, q, bits[name])) > 0:  # feedback spreads integers a little
            planned = np.maximum(planned - over - SLACK, 0.0)
            q, scale = rounded(fitted, planned, feedback=feedback, least=least)
        weights[name] = made = weight_scale(graph, name, fitted, bits[name], q, scale, correct=correct, shift=shift)
        if twins is not None:
            twins.put(layer, made.rounded(), made.bias)
    return weights


def _longer(layer: Layer, q: Array, bits: Bits) -> float:
    """By how many bits a weight a layer's code is longer than planned."""
    return float(code_length(q, shared=layer.shared).mean() - bits.mean())


def weight_scale(
    graph: Graph,
    name: str,
    layer: Layer,
    bits: Bits,
    q: Array,
    scale: Array,
    *,
    correct: bool,
    shift: Array | None = None,
) -> WeightScale:
    """A rounded layer as the table has it: integers q [O, T, K] in steps of scale [O]; `shift` [O] of its bias."""
    error = layer.rows - q * scale[:, None, None]
    return WeightScale(
        layer=layer.name,
        scale=scale.astype(np.float32),
        bits=(width(q) if layer.coded else bits).astype(np.uint8),
        axis=channel_axis(layer.node),
        values=np.ascontiguousarray(from_rows(layer.node, q.astype(np.int8), graph.array(name).shape)),
        bias=_bias(graph, layer, error if correct else np.zeros_like(error), shift if correct else None),
        coded=code_length(q, shared=layer.shared) if layer.coded else None,
    )


def dequantised(proto: ModelProto, weights: Mapping[str, WeightScale]) -> ModelProto:
    """The float graph with some weights and their biases as the table has them: rounded, but in float."""
    model = ModelProto()
    model.CopyFrom(proto)
    values: dict[str, NDArray[np.float32]] = {}
    for node in model.graph.node:
        w = weights.get(node.input[1]) if len(node.input) > 1 else None
        if w is None:
            continue
        values[node.input[1]] = w.rounded()
        if w.bias is not None:
            bias = f"{node.output[0]}.bias"
            values[bias] = w.bias
            del node.input[2:]
            node.input.append(bias)
    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values.pop(tensor.name), tensor.name))
    model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in values.items())
    return model


def noise_tables(
    layers: Mapping[str, Layer], judged: Mapping[str, Layer] | None = None, *, feedback: bool
) -> dict[str, Array]:
    """Weight name -> output noise over the layer's output energy, of each channel at each of LEVELS, [O, 9].

    D_o(b) = delta_o^T S delta_o / tr(W S W^T), measured on the errors that the rounding to be used leaves; S of
    `judged`, the same layers with moments of other images, or of `layers`.
    """
    out = {}
    for name, layer in layers.items():
        judge = layer if judged is None else judged[name]
        energy = judge.distortion(layer.rows).sum() or 1.0
        out[name] = error_tables(layer, judge.gram, feedback=feedback) / energy
    return out


def error_tables(
    layer: Layer, gram: Array | None = None, *, feedback: bool, levels: NDArray[np.int64] = LEVELS
) -> Array:
    """delta^T S delta of each channel at each of `levels`, [O, 9]; `gram` takes the place of S in it."""
    many = layer.repeated(len(levels))
    q, scale = rounded(many, np.tile(levels, len(layer.rows)), feedback=feedback)
    errors = many.rows - q * scale[:, None, None]
    return many.distortion(errors, gram).reshape(-1, len(levels))


def _choose(
    layers: Mapping[str, Layer],
    mean_bits: float,
    tables: Mapping[str, Array] | None,
    least: Mapping[str, int],
    feedback: bool,
    bits_per: BitsPer,
) -> tuple[dict[str, Bits], Compared | None]:
    if mean_bits == 8:
        return {n: np.full(len(la.rows), 8, dtype=np.int64) for n, la in layers.items()}, None
    tables = noise_tables(layers, feedback=feedback) if tables is None else tables
    # Channels that share their bits are one to the allocation: their distortions add up, as their weights do.
    felt = {n: tables[n] if bits_per == "channel" else tables[n].sum(0, keepdims=True) for n in layers}
    none = 0 if bits_per == "channel" else 1
    counts = np.concatenate([np.full(len(felt[n]), la.rows.size // len(felt[n])) for n, la in layers.items()])
    stacked, budget = np.concatenate(list(felt.values())), int(mean_bits * counts.sum())
    asked = np.concatenate([np.full(len(felt[n]), max(least.get(la.name, 0), none)) for n, la in layers.items()])
    idle = np.concatenate([_idle(la) if bits_per == "channel" else [_idle(la).all()] for la in layers.values()])
    own = (np.maximum(asked, np.where(idle, 0, b)) for b in range(min(CAUTION, int(mean_bits) - 1), -1, -1))
    floors = next((f for f in own if counts @ f <= budget), asked)
    bits = allocate(LEVELS, stacked, counts, budget, floors)
    parts = np.split(bits, np.cumsum([len(t) for t in felt.values()])[:-1])
    chosen: dict[str, Bits] = {
        n: np.repeat(b, len(layers[n].rows) // len(b)) for n, b in zip(layers, parts, strict=True)
    }
    return chosen, compare(stacked, counts, budget, floors, bits)


def _idle(layer: Layer) -> NDArray[np.bool_]:
    """Channels whose output hardly varies next to the layer's others, [O]: what they lose at 0 bits is known well."""
    energy = layer.distortion(layer.rows)
    return np.asarray(energy <= IDLE * energy.mean())


def _float_bias(graph: Graph, layer: Layer) -> Array:
    node, count = layer.node, len(layer.rows)
    has = len(node.input) > 2 and node.input[2] and graph.is_constant(node.input[2])
    bias = graph.array(node.input[2]).astype(np.float64).reshape(-1) if has else np.zeros(count)
    return np.broadcast_to(bias, (count,))


def least_scale(graph: Graph, layer: Layer, ranges: Mapping[str, tuple[float, float]]) -> Array:
    """Scales [O] below which the bias, an int32 in steps of s_in * s_w, would overflow: channels that a batch norm
    has all but switched off have tiny weights and a bias of ordinary size."""
    span = ranges.get(layer.node.input[0])
    if span is None:
        return np.zeros(len(layer.rows))
    return np.abs(_float_bias(graph, layer)) / (2.0**BIAS_BITS * float(asymmetric(*span)[0]))


def _bias(graph: Graph, layer: Layer, error: Array, shift: Array | None) -> NDArray[np.float32] | None:
    node, count = layer.node, len(layer.rows)
    if node.op_type == "MatMul":
        return None
    bias = _float_bias(graph, layer)
    if node.op_type in CORRECTED:
        mean = np.repeat(layer.mean, count // layer.groups, 0)
        bias = bias + (error[:, 0] * mean).sum(1) + (0.0 if shift is None else shift)
    return bias.astype(np.float32)

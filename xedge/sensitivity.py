"""Which errors hurt: six choices of Q in a channel's distortion D_o(b) = delta_o^T Q_o delta_o.

delta_o is what `b` bits leave of output channel o's weights (after error feedback, where it is used), S the covariance
of the patches that the weights multiply:

    output    alpha S / tr(W S W^T)   noise over energy of the layer's own output; alpha, the layer's weight: measured
    fisher    1/2 E G_o G_o^T         Fisher information of the channel's weights, G_o = dloss/dw_o of one image
    kfac      F_o S                   Fisher information of the output, F_o = 1/2 E sum_pixels (dloss/du_o)^2 (K-FAC)
    di        |G_o|^2 N C             loss of Discriminant Information to first order; C of pooled patches, G of outputs
    mse       I                       the weights' own error
    uniform   D_o = c_o 4^-b          equal bits

The paper's backward broadcast gives each layer a teacher: `di` takes the labels or the logits, `output` the layer's own
output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from torch import Tensor, fx, nn
from torch.nn import functional, grad

from xedge.criteria.di import EPS, solve
from xedge.errors import UnsupportedGraph
from xedge.judge import Judge
from xedge.moments import Moments
from xedge.onnx_graph import Graph, exposing, session
from xedge.quantize import LEVELS, Sensitivity, dequantised, error_tables, noise_tables, round_layers
from xedge.ranges import Calibration, attributes, ints, patches, positions
from xedge.rounding import CORRECTED, Array, Layer, layers_of, rounded
from xedge.simulate import align, torch_graph
from xedge.teacher import Teacher, windows
from xedge.twins import Image

Sample = tuple[NDArray[np.float32], int | Tensor]
"""One image [1, C, H, W], and its label or true picture [C', H, W]."""
PROBED = 48
"""Images on which a layer's weight is measured."""
PROBE_BITS = 4
ALONG = 384
"""Images of `fisher`. Many of one random answer each say more than few of several: EfficientNet-Lite0 at 4 mean bits
had a KL of 0.0510 from 128 images of two answers, and 0.0415 from 320 of one."""
ERRORS_BYTES = 1 << 30
TOGETHER = 8
LEAST_WEIGHT = 0.01
"""Of the mean loss over the layers: a layer that costs nothing at PROBE_BITS may still cost something at 0."""


def distortions(
    how: Sensitivity,
    model: nn.Module,
    proto: ModelProto,
    calibration: Calibration,
    samples: Callable[[], Iterable[Sample]],
    teacher: Teacher,
    *,
    held: Callable[[], Iterable[Sample]] | None = None,
    feedback: bool = True,
    seed: int = 0,
    shared: bool = False,
    coded: bool = False,
) -> dict[str, Array]:
    """Weight name -> distortion of each channel at each of LEVELS, [O, 9], comparable between layers.

    Args:
        how: which Q.
        model: the float model; `fisher` and `kfac` alone differentiate it.
        proto: its float graph. calibration: of that graph.
        samples: starts a pass over training images.
        teacher: of `di`.
        held: starts a pass over images that rounding has not seen, on which layer weights are measured, by default
            `samples`, and `fisher` first of all. The errors themselves are measured on `calibration.held`, where there
            is any: feedback fits them to the images it knows, the more so the fewer these are.
        feedback: measure the errors after error feedback.
        seed: of what `fisher` and `kfac` draw from the model's own answers.
        shared: measure the errors with one scale for all channels of a layer.
        coded: LEVELS are bits of an entropy coder (`xedge.coding`).
    """
    layers = layers_of(proto, calibration.patches, shared=shared, coded=coded)
    if how == "uniform":
        return {n: la.rows[0].size * np.tile(4.0**-LEVELS, (len(la.rows), 1)) for n, la in layers.items()}
    if how == "mse":
        eye = np.eye
        return {
            n: error_tables(la, np.broadcast_to(eye(la.gram.shape[1]), la.gram.shape), feedback=feedback)
            for n, la in layers.items()
        }
    judged = layers_of(proto, calibration.held or calibration.patches)
    if how == "fisher":
        seen = (x for part in (held, samples) if part is not None for x, _ in part())
        return along(model, proto, layers, judged, list(islice(seen, ALONG)), seed, feedback=feedback)
    if how == "kfac":
        felt = fisher(model, proto, list(layers), samples(), seed)
        return {n: felt[n][:, None] * error_tables(la, judged[n].gram, feedback=feedback) for n, la in layers.items()}
    if how == "di":
        taught = information(proto, layers, samples(), teacher)
        return {n: g[:, None] * error_tables(layers[n], c, feedback=feedback) for n, (g, c) in taught.items()}
    tables = noise_tables(layers, judged, feedback=feedback)
    weights = layer_weights(proto, layers, tables, (held or samples)(), feedback=feedback)
    return {n: weights[n] * t for n, t in tables.items()}


def layer_weights(
    proto: ModelProto,
    layers: Mapping[str, Layer],
    tables: Mapping[str, Array],
    samples: Iterable[Sample],
    *,
    feedback: bool = True,
) -> dict[str, float]:
    """alpha: what the net's answers lose by a unit of a layer's relative output noise, by weight name.

    One layer at a time is rounded to PROBE_BITS and the divergence of the logits from the float graph's is divided by
    the noise that the layer's table says, so that alpha times the table predicts the divergence.
    """
    images = [x for x, _ in islice(samples, PROBED)]
    bits = {n: np.full(len(la.rows), PROBE_BITS) for n, la in layers.items()}
    weights = round_layers(proto, layers, bits, {}, feedback=feedback)
    base = _logits(proto, images)
    judge = Judge("PSNR" if answers_pictures(proto) else "agreement")
    lost = {n: judge.divergence(base, _logits(dequantised(proto, {n: w}), images)) for n, w in weights.items()}
    least = LEAST_WEIGHT * float(np.mean(list(lost.values()))) or 1.0
    noise = {n: float(tables[n][:, PROBE_BITS].sum()) for n in layers}
    return {n: (lost[n] + least) / noise[n] if noise[n] > 0 else 1.0 for n in layers}


def _logits(proto: ModelProto, images: Iterable[NDArray[np.float32]]) -> Tensor:
    run, feed = session(proto), Graph(proto).inputs[0]
    return torch.cat([torch.from_numpy(run.run(None, {feed: x})[0]).flatten(1) for x in images])


def answers_pictures(proto: ModelProto) -> bool:
    """Whether a graph's output is a picture [N, C, H, W]."""
    graph = Graph(proto)
    shape = graph.shapes[graph.outputs[0]]
    return len(shape) == 4 and shape[2] * shape[3] > 1


class _Differentiated(fx.Interpreter):
    """Runs torch's graph and keeps some of its tensors, to be differentiated by."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        out = super().run_node(n)
        if n.name in self.names and isinstance(out, Tensor):
            self.kept[n.name] = out = out if out.requires_grad else out.requires_grad_()
        return out


def fisher(
    model: nn.Module, proto: ModelProto, weights: list[str], samples: Iterable[Sample], seed: int
) -> dict[str, Array]:
    """F_o = 1/2 E sum_pixels (dloss/du_o)^2 of each layer's outputs u, labels drawn from the model's own answers, [O].

    Raises:
        UnsupportedGraph: torch's graph has no node for a layer's output.
    """
    nodes = {n.input[1]: n for n in Graph(proto).weighted()}
    sums, count = {w: np.zeros(0) for w in weights}, 0
    for found in gradients(model, proto, weights, (x for x, _ in samples), seed):
        count += 1
        for w, gradient in found.items():
            squares = _by_channel(nodes[w], gradient).double().square().sum(1).numpy()
            sums[w] = sums[w] + squares if len(sums[w]) else squares
    return {w: s / (2 * count) for w, s in sums.items()}


def gradients(
    model: nn.Module, proto: ModelProto, weights: Sequence[str], images: Iterable[Image], seed: int
) -> Iterator[dict[str, Tensor]]:
    """dloss/du of each layer's output u for each image, by weight name.

    The loss is such that the mean of its gradients' squares is Fisher information: of the model's own distribution over
    classes, in the direction of a Gaussian draw; of a Gaussian answer around a picture or a single number.

    Raises:
        UnsupportedGraph: torch's graph has no node for a layer's output.
    """
    graph, pictures = Graph(proto), answers_pictures(proto)
    nodes = {n.input[1]: n for n in graph.weighted()}
    shape = graph.shapes[graph.inputs[0]][1:]
    module = torch_graph(model, shape)
    where = align(module, proto, [nodes[w].output[0] for w in weights], shape)
    for w in weights:
        if nodes[w].output[0] not in where:
            raise UnsupportedGraph("torch's graph has no node for its output", where=w, fix="--sensitivity output")
    own = {w: where[nodes[w].output[0]] for w in weights}
    draw = torch.Generator().manual_seed(seed)
    for x in images:
        run = _Differentiated(module, set(own.values()))
        out = run.run(torch.from_numpy(x))
        logits: Tensor = (out[0] if isinstance(out, tuple | list) else out).flatten(1)
        answer = torch.randn(logits.shape, generator=draw)
        if logits.shape[1] > 1 and not pictures:
            p = logits.detach().softmax(1)
            answer = p.sqrt() * answer
            answer = answer - p * answer.sum(1, keepdim=True)  # its covariance is diag(p) - p p^T
        kept = [run.kept[name] for name in own.values()]
        found = torch.autograd.grad((logits * answer).sum(), kept, materialize_grads=True)  # of no weight
        yield dict(zip(own, found, strict=True))


def _by_channel(node: NodeProto, gradient: Tensor) -> Tensor:
    """[O, positions] of the gradient at a node's output."""
    axis = gradient.dim() - 1 if node.op_type in ("Gemm", "MatMul") else 1
    return gradient.movedim(axis, 0).flatten(1)


def along(
    model: nn.Module,
    proto: ModelProto,
    layers: Mapping[str, Layer],
    judged: Mapping[str, Layer],
    images: Sequence[Image],
    seed: int,
    *,
    feedback: bool,
) -> dict[str, Array]:
    """1/2 E (delta_o . G_o)^2 of the errors delta_o that each of LEVELS leaves, [O, 9], by weight name.

    G_o is the gradient of one image by the channel's weights, as they act when the mean error is in the bias: summed
    over the positions of dloss/du_o times the patch less its mean. So the positions may add up or cancel, which `kfac`
    leaves out. Transposed and three-dimensional convolutions, products without a bias, and weights of several uses are
    as `kfac` has them.
    """
    graph = Graph(proto)
    shared = {n for n in layers if len(graph.consumers[n]) > 1}
    flat = {n for n in layers if len(graph.initializers[n].dims) <= 4}
    own = [n for n, la in layers.items() if la.node.op_type in CORRECTED and n in flat - shared]
    out, rest = {}, [n for n in layers if n not in own]
    if rest:
        felt = fisher(model, proto, rest, ((x, 0) for x in images), seed)
        out = {n: felt[n][:, None] * error_tables(layers[n], judged[n].gram, feedback=feedback) for n in rest}
    while own:  # as many layers at once as there is room for their errors
        size, part = 0, list[str]()
        while own and (not part or size + layers[own[0]].rows.size * len(LEVELS) * 4 <= ERRORS_BYTES):
            size += layers[own[0]].rows.size * len(LEVELS) * 4
            part.append(own.pop(0))
        errors = {n: _errors(layers[n], feedback=feedback) for n in part}
        inner = list(dict.fromkeys(layers[n].node.input[0] for n in part))
        run = session(exposing(proto, [n for n in inner if n not in graph.inputs]))
        names = [n for n in inner if n not in graph.inputs]
        sums = {n: torch.zeros(len(layers[n].rows), len(LEVELS), dtype=torch.float64) for n in part}
        pairs = zip(images, gradients(model, proto, part, images, seed), strict=True)
        while some := list(islice(pairs, TOGETHER)):  # the errors are read from memory once for all of these
            waiting: dict[str, list[Tensor]] = {n: [] for n in part}
            for x, found in some:
                values = dict(zip(names, run.run(names, {graph.inputs[0]: x}), strict=True)) if names else {}
                values[graph.inputs[0]] = x
                for n in part:
                    la = layers[n]
                    given = torch.from_numpy(values[la.node.input[0]])
                    waiting[n].append(_by_weight(la, given, found[n], graph.initializers[n].dims))
            for n, g in waiting.items():
                sums[n] += (errors[n] @ torch.stack(g, 2)).double().square().sum(2)
        out |= {n: (s / (2 * len(images))).numpy() for n, s in sums.items()}
    return {n: out[n] for n in layers}


def _by_weight(layer: Layer, x: Tensor, gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradient by a convolution's or a Gemm's weights of `shape`, [O, K], from that by its output, x less its mean."""
    if layer.node.op_type == "Gemm":
        found = gradient.mT @ x
    else:
        a, sides = attributes(layer.node), x.dim() - 2
        pads, stride, dilation = (
            ints(a.get(k, [at] * n * sides)) for k, at, n in (("pads", 0, 2), ("strides", 1, 1), ("dilations", 1, 1))
        )
        around = [pads[i + side * sides] for i in reversed(range(sides)) for side in (0, 1)]
        by = grad.conv1d_weight if sides == 1 else grad.conv2d_weight
        found = by(functional.pad(x, around), tuple(shape), gradient, stride, 0, dilation, layer.groups)  # type: ignore[no-untyped-call]
    mean = torch.from_numpy(np.repeat(layer.mean, len(layer.rows) // layer.groups, 0).astype(np.float32))
    return found.flatten(1) - _by_channel(layer.node, gradient).sum(1, keepdim=True) * mean


def _errors(layer: Layer, *, feedback: bool) -> Tensor:
    """What each of LEVELS leaves of a layer's weights, [O, 9, K] in float32."""
    many = layer.repeated(len(LEVELS))
    q, scale = rounded(many, np.tile(LEVELS, len(layer.rows)), feedback=feedback)
    return torch.from_numpy((many.rows - q * scale[:, None, None]).astype(np.float32)).view(
        len(layer.rows), len(LEVELS), -1
    )


def information(
    proto: ModelProto, layers: Mapping[str, Layer], samples: Iterable[Sample], teacher: Teacher
) -> dict[str, tuple[Array, Array]]:
    """(|G_o|^2 N, C) of each layer: what a unit of noise on a pooled output costs in DI, and the scatter of the pooled
    patches over N, in the form of the layer's Gram matrix.

    G = P X Y^T with X the layer's outputs, averaged over the positions: `di` wants noise and X in the same form. Where
    the teacher is a picture both are of single positions.

    Raises:
        UnsupportedGraph: the teacher is a picture and a layer has no positions.
    """
    graph = Graph(proto)
    inner = list(dict.fromkeys(la.node.input[0] for la in layers.values()))
    run = session(exposing(proto, [n for n in inner if n not in graph.inputs]))
    names = [*graph.outputs, *(n for n in inner if n not in graph.inputs)]
    pooled: dict[str, list[Array]] = {n: [] for n in layers}
    taught: dict[str, list[Tensor]] = {n: [] for n in layers}
    answers, labels = [], list[Tensor]()
    for x, label in samples:
        values = dict(zip(names, run.run(names, {graph.inputs[0]: x}), strict=True))
        values[graph.inputs[0]] = x
        for name, la in layers.items():
            shape = tuple(graph.initializers[name].dims)
            found = patches(la.node, values[la.node.input[0]], shape, la.groups).astype(np.float64)
            if teacher.pictures:
                size = graph.shapes[la.node.output[0]][2:]
                if la.node.op_type != "Conv" or len(size) != 2:
                    raise UnsupportedGraph("has no pixels to teach", where=la.name, fix="--sensitivity output")
                ys, xs = map(torch.from_numpy, np.meshgrid(*map(positions, size), indexing="ij"))
                answer = torch.from_numpy(values[graph.outputs[0]])
                picture = teacher.picture(torch.from_numpy(x), torch.as_tensor(label)[None], answer)
                taught[name].append(windows(picture, (size[0], size[1]), ys.flatten(), xs.flatten())[0])
            pooled[name].append(found.transpose(1, 0, 2) if teacher.pictures else found.mean(1)[None])
        answers.append(torch.from_numpy(values[graph.outputs[0]]).flatten(1))
        labels.append(torch.as_tensor(label))
    whole = None if teacher.pictures else teacher.encode(torch.stack(labels), torch.cat(answers)).double()
    out = {}
    for name, la in layers.items():
        y = torch.cat(taught[name]).double() if whole is None else whole
        p = np.concatenate(pooled[name])  # [N, G, K]
        p -= p.mean(0)
        rows = la.rows.sum(1).reshape(la.groups, -1, p.shape[2])
        u = np.einsum("ngk,gok->ngo", p, rows).reshape(len(p), -1)
        deviation = u.std(0)
        varies = deviation > 1e-9 * (deviation.max() or 1.0)
        inverse = np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0)
        g = solve(Moments.of(torch.from_numpy(u * inverse), y), teacher, EPS).readout
        size = la.gram.shape[1]
        blocks = p.transpose(1, 0, 2) if not la.split else p.reshape(len(p), -1, size).transpose(1, 0, 2)
        cost = np.sum(g**2, axis=1) * len(p)
        out[name] = (np.maximum(cost, 1e-3 * cost.mean()) * inverse**2, blocks.transpose(0, 2, 1) @ blocks / len(p))
    return out

"""One pass over training data: what every consumer of a channel group sees, and what the loss feels there.

A *tap* is the input of a layer that consumes pruned channels. Its columns are the channels of its groups, one block
per group; a channel that is flattened into r features (a linear layer after a flatten) is still one column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xedge.errors import InternalError, UsageError
from xedge.groups import ChannelGroup, Groups
from xedge.moments import Moments, add
from xedge.teacher import Teacher

PIXELS = 7
"""A feature map is read on a grid of at most 7 x 7 pixels: enough for its covariance, and cheap."""


@dataclass(frozen=True)
class Tap:
    """A layer's input, and where each group's channels lie in it.

    Attributes:
        layer: module name of the consumer.
        blocks: group name -> positions of its channels in the input tensor's channel (feature) axis, [C, r].
    """

    layer: str
    blocks: dict[str, NDArray[np.int64]]

    def columns(self, group: str) -> slice:
        """The tap's columns of a group."""
        at = 0
        for name, index in self.blocks.items():
            if name == group:
                return slice(at, at + len(index))
            at += len(index)
        raise InternalError(f"group {group} does not reach {self.layer}")


@dataclass(frozen=True)
class Seen:
    """What was observed at one tap.

    Attributes:
        tap: the tap.
        pooled: moments of the globally averaged channels with the teacher; one sample an image.
        pixels: moments of single pixels, without a teacher; up to 49 samples an image.
        taylor: [C], sum over images of the squared first-order change of the loss when the channel is zeroed.
        weight: [O, C, r, K], the consumer's weight seen from the tap's columns: O outputs, K kernel taps.
        fisher: [O], mean over images of the summed squared gradient of the log-likelihood of the model's own draw.
    """

    tap: Tap
    pooled: Moments
    pixels: Moments
    taylor: NDArray[np.float64]
    weight: NDArray[np.float64]
    fisher: NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """All taps of a model, by consumer layer, and what a criterion may ask besides."""

    seen: dict[str, Seen]
    teacher: Teacher
    samples: int
    seed: int
    producer_weights: dict[str, list[NDArray[np.float64]]]

    def of(self, group: ChannelGroup) -> list[tuple[Seen, slice]]:
        """Each tap that reads the group, with the group's columns."""
        return [(s, s.tap.columns(group.name)) for s in self.seen.values() if group.name in s.tap.blocks]


def taps(groups: Groups) -> list[Tap]:
    """The taps of the groups that can be cut."""
    blocks: dict[str, dict[str, NDArray[np.int64]]] = {}
    for g in groups.groups:
        if g.frozen:
            continue
        for s in g.slices:
            if s.kind == "in" and s.inputs is not None:
                blocks.setdefault(s.layer, {})[g.name] = s.inputs
    return [Tap(layer, b) for layer, b in blocks.items()]


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """The tap's view of an input: [N, C, r, P] with P pixels; features have P = 1."""
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(-1)
    c, r = index.shape
    return flat[:, index.reshape(-1)].reshape(len(x), c, r, flat.shape[-1])


def _grid(x: Tensor) -> Tensor:
    """At most PIXELS x PIXELS evenly spread pixels of [N, C, H, W]."""
    if x.dim() != 4:
        return x
    h, w = x.shape[2:]
    ys = torch.linspace(0, h - 1, min(h, PIXELS)).round().long()
    xs = torch.linspace(0, w - 1, min(w, PIXELS)).round().long()
    return x[:, :, ys][:, :, :, xs]


def consumer_weight(module: nn.Module, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """The consumer's weight as [O, C, r, K]: output, group channel, position within the flatten, kernel tap."""
    w = module.weight
    assert isinstance(w, Tensor)
    if isinstance(module, nn.ConvTranspose2d):  # [I, O/g, ...]: swap within each group
        w = torch.cat([b.transpose(0, 1) for b in w.chunk(module.groups)])
        w = _dense(w, module.groups)
    elif isinstance(module, nn.Conv2d | nn.Conv1d) and module.groups > 1:
        w = _dense(w, module.groups)
    flat = w.detach().double().flatten(2) if w.dim() > 2 else w.detach().double().unsqueeze(-1)
    c, r = index.shape
    picked = flat[:, torch.from_numpy(index.reshape(-1))]
    return np.asarray(picked.reshape(len(flat), c, r, -1).numpy())


def _dense(w: Tensor, groups: int) -> Tensor:
    """A grouped kernel [O, I/g, ...] written out over all I inputs."""
    o, i = w.shape[:2]
    full = w.new_zeros(o, i * groups, *w.shape[2:])
    step = o // groups
    for g in range(groups):
        full[g * step : (g + 1) * step, g * i : (g + 1) * i] = w[g * step : (g + 1) * step]
    return full


@contextmanager
def _hooks(
    model: nn.Module, layers: Iterable[str]
) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
    """Keep every tap's inputs and outputs of a forward pass, each input its own node of the graph."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    handles = []

    def before(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            if torch.is_grad_enabled():
                # A tensor that two layers read gets a gradient of each: the taps are scored one by one.
                x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            inputs.setdefault(name, []).append(x)
            return (x, *args[1:])

        return hook

    def after(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            outputs.setdefault(name, []).append(out)

        return hook

    modules = dict(model.named_modules())
    try:
        for name in layers:
            handles.append(modules[name].register_forward_pre_hook(before(name)))
            handles.append(modules[name].register_forward_hook(after(name)))
        yield inputs, outputs
    finally:
        for h in handles:
            h.remove()


def observe(
    model: nn.Module,
    groups: Groups,
    data: Iterable[tuple[Tensor, Tensor]],
    teacher: Teacher,
    *,
    gradients: bool,
    seed: int = 0,
) -> Observed:
    """Stream the data once through the model (eval mode) and gather every tap's moments.

    Args:
        model: not changed.
        groups: its channel groups.
        data: batches (x [N, ...], labels [N]); labels are ignored unless the teacher is the labels.
        teacher: what Y is.
        gradients: whether to gather Taylor and Fisher terms too (one backward pass more).
        seed: of the labels drawn from the model's own prediction for the Fisher term.

    Memory does not grow with the data.

    Raises:
        UsageError: the data are empty, or the model's output is NaN.
    """
    where = taps(groups)
    index = {t.layer: torch.from_numpy(np.concatenate([b.reshape(-1) for b in t.blocks.values()])) for t in where}
    modules = dict(model.named_modules())
    pooled: dict[str, Moments] = {}
    pixels: dict[str, Moments] = {}
    taylor: dict[str, Tensor] = {}
    fisher: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    samples = 0
    try:
        for x, labels in data:
            with torch.set_grad_enabled(gradients), _hooks(model, index) as (inputs, outputs):
                logits = model(x)
                if not bool(torch.isfinite(logits).all()):
                    raise UsageError(
                        "its output is NaN or infinity on the training data",
                        where=type(model).__name__,
                        fix="check the weights and the data's normalisation",
                    )
                if gradients:
                    flat_in = [t for ts in inputs.values() for t in ts]
                    flat_out = [t for ts in outputs.values() for t in ts]
                    log_p = torch.log_softmax(logits.flatten(1), 1)
                    own = torch.multinomial(log_p.detach().exp(), 1, generator=draw)[:, 0]
                    target = labels if teacher.kind == "labels" else own
                    loss = -log_p.gather(1, target[:, None]).sum()
                    g_in = torch.autograd.grad(loss, flat_in, retain_graph=True, allow_unused=True)
                    likelihood = -log_p.gather(1, own[:, None]).sum()
                    g_out = torch.autograd.grad(likelihood, flat_out, allow_unused=True)
                    at_in = {id(t): g for t, g in zip(flat_in, g_in, strict=True)}
                    at_out = {id(t): g for t, g in zip(flat_out, g_out, strict=True)}
            with torch.no_grad():
                y = teacher.encode(labels, logits)
                nothing = y.new_zeros(0)
                for t in where:
                    name = t.layer
                    for one in inputs.get(name, []):
                        a = _blocks(one.detach(), t)
                        pooled[name] = add(pooled.get(name), a.mean((2, 3)), y)
                        p = _blocks(_grid(one.detach()), t).permute(0, 2, 3, 1).reshape(-1, a.shape[1])
                        pixels[name] = add(pixels.get(name), p, nothing.expand(len(p), 0))
                        if gradients and at_in[id(one)] is not None:
                            change = (a * _blocks(at_in[id(one)], t)).sum((2, 3)).double()
                            taylor[name] = taylor.get(name, 0) + change.square().sum(0)
                    if gradients:
                        for out in outputs.get(name, []):
                            g = at_out[id(out)]
                            if g is not None:
                                per = g.double().square()
                                per = per.sum((0, *range(2, per.dim())))
                                fisher[name] = fisher.get(name, 0) + per
            samples += len(x)
    finally:
        model.train(was_training)
    if samples == 0:
        raise UsageError("the training data are empty", fix="check --data")
    seen = {}
    for t in where:
        name = t.layer
        if name not in pooled:
            continue  # the layer is never called as a module; its groups are frozen by find_groups
        c = pooled[name].channels
        w = [consumer_weight(modules[name], b) for b in t.blocks.values()]
        outputs_count = w[0].shape[0]
        r = max(p.shape[2] for p in w)
        weight = np.concatenate([np.pad(p, ((0, 0), (0, 0), (0, r - p.shape[2]), (0, 0))) for p in w], axis=1)
        seen[name] = Seen(
            tap=t,
            pooled=pooled[name],
            pixels=pixels[name],
            taylor=_array(taylor.get(name), c) / samples,
            weight=weight,
            fisher=_array(fisher.get(name), outputs_count) / samples,
        )
    producers = {
        g.name: [
            _rows(dict(model.named_parameters())[s.param], s.axis, s.index)
            for s in g.slices
            if s.kind == "out" and s.param.endswith("weight")
        ]
        for g in groups.groups
        if not g.frozen
    }
    return Observed(seen, teacher, samples, seed, producers)


def _blocks(x: Tensor, tap: Tap) -> Tensor:
    """The tap's columns [N, C, r, P]; blocks of different r are brought to P * r samples by their mean."""
    parts = [_columns(x, torch.from_numpy(b)) for b in tap.blocks.values()]
    if len({p.shape[2] for p in parts}) > 1:
        parts = [p.mean(2, keepdim=True) for p in parts]
    return torch.cat(parts, 1)


def _rows(parameter: Tensor, axis: int, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """A producer's weights by channel of the group, [C, everything else]."""
    rows = parameter.detach().double().movedim(axis, 0).flatten(1).numpy()
    return np.asarray(rows[index.reshape(-1)].reshape(len(index), -1))


def _array(t: Tensor | None, size: int) -> NDArray[np.float64]:
    return np.zeros(size) if t is None else np.asarray(t.numpy(), dtype=np.float64)

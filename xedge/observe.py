"""One pass over training data: what every consumer of a channel group sees, and what the loss feels there.

A *tap* is the input of a linear layer or a convolution that consumes pruned channels. Its columns are the channels of
its groups, one block per group; a channel that is flattened into r features (a linear layer after a flatten) is still
one column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm

from xedge.errors import InternalError, UsageError
from xedge.groups import ChannelGroup, Groups
from xedge.judge import charbonnier
from xedge.moments import Moments, Stream
from xedge.teacher import Teacher, windows

Places = tuple[tuple[int, int], Tensor, Tensor] | None
"""A map's size and pixels of it (see `teacher.windows`); None of an average over all."""
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
        pooled: moments of the globally averaged channels with the teacher, one sample an image; where the teacher is a
            picture, of single pixels with the pixels that they stand for.
        pixels: moments of single pixels, up to 49 samples an image.
        taylor: [C], mean over images of the squared first-order change of the loss when the channel is zeroed.
        weight: [O, C, r, K], the consumer's weight seen from the tap's columns: O outputs, K kernel taps.
        fisher: [O], mean over images of the summed squared gradient of the log-likelihood of the model's own draw; of
            pictures, whose likelihood is Gaussian about the answer, of a random combination of all outputs.
    """

    tap: Tap
    pooled: Moments
    pixels: Moments
    taylor: NDArray[np.float64]
    weight: NDArray[np.float64]
    fisher: NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """All taps of a model, by consumer layer, and what a criterion may ask besides.

    Attributes:
        seen: by consumer layer.
        teacher: what Y is.
        samples: images.
        seed: of what was drawn.
        producer_weights: group -> one [C, everything else] for each layer that makes its channels.
        norm_scales: group -> |gamma| [C] of each batch norm that its channels pass through.
    """

    seen: dict[str, Seen]
    teacher: Teacher
    samples: int
    seed: int
    producer_weights: dict[str, list[NDArray[np.float64]]]
    norm_scales: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)

    def of(self, group: ChannelGroup) -> list[tuple[Seen, slice]]:
        """Each tap that reads the group, with the group's columns."""
        return [(s, s.tap.columns(group.name)) for s in self.seen.values() if group.name in s.tap.blocks]


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def taps(groups: Groups, modules: Mapping[str, nn.Module]) -> list[Tap]:
    """The taps of the groups that can be cut.

    Only layers whose input is what their weight multiplies are taps: a parameter that a forward uses by a function
    call has no such input to look at.
    """
    blocks: dict[str, dict[str, NDArray[np.int64]]] = {}
    for g in groups.groups:
        if g.frozen:
            continue
        for s in g.slices:
            own = isinstance(modules.get(s.layer), WEIGHTED) and s.param == f"{s.layer}.weight"
            if s.kind == "in" and own:
                blocks.setdefault(s.layer, {})[g.name] = s.inputs
    return [Tap(layer, b) for layer, b in blocks.items()]


def _channels_first(x: Tensor, module: nn.Module) -> Tensor:
    """A linear layer's features are its last axis, however many there are before it."""
    return x.movedim(-1, 1) if isinstance(module, nn.Linear) and x.dim() > 2 else x


def _centres(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The centres (ys, xs) of at most PIXELS x PIXELS cells of a map [H, W], [P] each: half of the pixels of `_grid`
    lie on the border, where a net that restores pictures sees padding."""
    ys, xs = ((torch.arange(min(n, PIXELS)) * 2 + 1) * n // (2 * min(n, PIXELS)) for n in shape)
    return ys.repeat_interleave(len(xs)), xs.repeat(len(ys))


def _grid(shape: Sequence[int]) -> Tensor:
    """At most PIXELS x PIXELS evenly spread pixels of a map [H, W], as positions in the flat map."""
    h, w = shape
    ys = torch.linspace(0, h - 1, min(h, PIXELS)).round().long()
    xs = torch.linspace(0, w - 1, min(w, PIXELS)).round().long()
    return (ys[:, None] * w + xs).flatten()


def consumer_weight(module: nn.Module, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """The consumer's weight as [O, C, r, K]: output, group channel, position within the flatten, kernel tap."""
    w = module.weight
    assert isinstance(w, Tensor)
    assert isinstance(module, WEIGHTED)
    if isinstance(module, TRANSPOSED):  # [I, O/g, ...]: swap within each group
        w = torch.cat([b.transpose(0, 1) for b in w.chunk(module.groups)])
        w = _dense(w, module.groups)
    elif not isinstance(module, nn.Linear) and module.groups > 1:
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
    modules: Mapping[str, nn.Module], layers: Iterable[str], look: Callable[[str, Tensor], None]
) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[GradientEdge]]]]:
    """Look at every tap's inputs as they come, while the cache still holds them. Where gradients are wanted keep them,
    each its own node of the graph, and where its outputs' gradients arrive; otherwise the pass frees them as ever."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[GradientEdge]] = {}
    handles = []

    def before(name: str):  # type: ignore[no-untyped-def]
        def hook(
            _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
            x = args[0] if args else kwargs["input"]
            with torch.no_grad():
                look(name, x.detach())
            if torch.is_grad_enabled():
                # A tensor that two layers read gets a gradient of each: the taps are scored one by one.
                x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                inputs.setdefault(name, []).append(x)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})

        return hook

    def after(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            if torch.is_grad_enabled():
                # The edge, not the tensor: an activation in place would make the tensor its own result.
                outputs.setdefault(name, []).append(get_gradient_edge(out))

        return hook

    try:
        for name in layers:
            handles.append(modules[name].register_forward_pre_hook(before(name), with_kwargs=True))
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
    felt: int | None = None,
    seed: int = 0,
) -> Observed:
    """Stream the data once through the model (eval mode) and gather every tap's moments.

    Args:
        model: not changed.
        groups: its channel groups.
        data: batches (x [N, ...], labels [N] or true pictures [N, C', H, W]); these are ignored when the teacher is the
            logits.
        teacher: what Y is.
        gradients: whether to gather Taylor and Fisher terms too (one or two backward passes more).
        felt: on how many samples those are gathered, at least; all when None.
        seed: of the answers drawn from the model's own prediction for the Fisher term.

    Memory does not grow with the data.

    Raises:
        UsageError: the data are empty, or the model's output is NaN.
    """
    modules = dict(model.named_modules())
    where = {t.layer: t for t in taps(groups, modules)}
    pooled: dict[str, Stream] = {}
    pixels: dict[str, Stream] = {}
    taylor: dict[str, Tensor] = {}
    fisher: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(seed)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    samples = touched = 0
    try:
        for x, labels in data:
            feel = gradients and (felt is None or touched < felt)
            averages: dict[str, list[tuple[Tensor, Places]]] = {}

            def look(
                name: str, one: Tensor, size: int = len(x), into: dict[str, list[tuple[Tensor, Places]]] = averages
            ) -> None:
                if len(one) != size:
                    raise UsageError(
                        f"reads {len(one)} samples for a batch of {size}",
                        where=name,
                        fix="keep the channels it reads with --exclude: they cannot be ranked",
                    )
                one = _channels_first(one, modules[name])
                if teacher.pictures:
                    into.setdefault(name, []).append(_at_pixels(one, where[name]))
                else:
                    into.setdefault(name, []).append((_average(one, where[name]), None))
                    pixels.setdefault(name, Stream()).add(_samples(one, where[name]))

            with torch.set_grad_enabled(feel), _hooks(modules, where, look) as (inputs, outputs):
                logits = model(x)
                if not bool(torch.isfinite(logits).all()):
                    raise UsageError(
                        "its output is NaN or infinity on the training data",
                        where=type(model).__name__,
                        fix="check the weights and the data's normalisation",
                    )
                flat_in = [t for ts in inputs.values() for t in ts]
                flat_out = [e for es in outputs.values() for e in es]
                felt_in: dict[str, list[Tensor | None]] = {}
                felt_out: dict[str, list[Tensor | None]] = {}
                if feel and flat_in:
                    loss, likelihood = _losses(teacher, logits, labels, draw)
                    if likelihood is None:  # one pass serves both
                        wanted: list[Any] = [*flat_in, *flat_out]  # tensors and edges
                        both = torch.autograd.grad(loss, wanted, allow_unused=True)
                        g_in, g_out = iter(both[: len(flat_in)]), iter(both[len(flat_in) :])
                    else:
                        g_in = iter(torch.autograd.grad(loss, flat_in, retain_graph=True, allow_unused=True))
                        g_out = iter(torch.autograd.grad(likelihood, flat_out, allow_unused=True))
                    felt_in = {name: [next(g_in) for _ in ts] for name, ts in inputs.items()}
                    felt_out = {name: [next(g_out) for _ in es] for name, es in outputs.items()}
            with torch.no_grad():
                y = teacher.picture(x, labels, logits) if teacher.pictures else teacher.encode(labels, logits)
                for name, parts in averages.items():
                    for part, places in parts:
                        taught = y if places is None else windows(y, *places).flatten(0, 1)
                        pooled.setdefault(name, Stream()).add(part, taught)
                for name, read in inputs.items():
                    # A layer that is called twice loses the channel in both calls.
                    changes = [
                        _change(
                            _channels_first(one.detach(), modules[name]), _channels_first(g, modules[name]), where[name]
                        )
                        for one, g in zip(read, felt_in[name], strict=True)
                        if g is not None
                    ]
                    if changes:
                        taylor[name] = taylor.get(name, 0) + torch.stack(changes).sum(0).square().sum(0)
                for name, edges in felt_out.items():
                    for g in edges:
                        if g is not None:
                            per = _channels_first(g, modules[name]).double().square()
                            fisher[name] = fisher.get(name, 0) + per.sum((0, *range(2, per.dim())))
            samples += len(x)
            touched += len(x) if feel else 0
    finally:
        for module, mode in modes.items():
            module.training = mode
    if samples == 0:
        raise UsageError("the training data are empty", fix="check --data")
    seen = {}
    for name, t in where.items():
        if name not in pooled:
            continue  # the layer is never called as a module, its weight is used by a function call
        averaged = pooled[name].moments()
        c = averaged.channels
        w = [consumer_weight(modules[name], b) for b in t.blocks.values()]
        outputs_count = w[0].shape[0]
        r = max(p.shape[2] for p in w)
        weight = np.concatenate([np.pad(p, ((0, 0), (0, 0), (0, r - p.shape[2]), (0, 0))) for p in w], axis=1)
        seen[name] = Seen(
            tap=t,
            pooled=averaged,
            pixels=averaged if teacher.pictures else pixels[name].moments(),
            taylor=_array(taylor.get(name), c) / max(touched, 1),
            weight=weight,
            fisher=_array(fisher.get(name), outputs_count) / max(touched, 1),
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    producers, norms = {}, {}
    for group in groups.free:
        weights = [s for s in group.slices if s.param in parameters and s.param.endswith("weight")]
        producers[group.name] = [_rows(parameters[s.param], s.axis, s.index) for s in weights if s.kind == "out"]
        norms[group.name] = [
            np.abs(_rows(parameters[s.param], s.axis, s.index)).mean(1)
            for s in weights
            if isinstance(modules.get(s.layer), _BatchNorm)
        ]
    return Observed(seen, teacher, samples, seed, producers, norms)


def _losses(teacher: Teacher, out: Tensor, labels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """What Taylor's terms feel, the loss that nets are trained by, and what Fisher's feel, the likelihood of
    an answer that the model itself draws; None where it is the first.

    Where the answer is a picture u the draw is u + e: the gradient of its likelihood is that of e^T u. Signs for e have
    the least variance of all draws of unit variance (Hutchinson 1990).
    """
    if teacher.pictures:
        e = 2 * torch.randint(0, 2, out.shape, generator=draw).to(out.dtype) - 1
        likelihood = (out * e).sum()
        return (likelihood, None) if teacher.kind == "logits" else (charbonnier(out - labels).sum(), likelihood)
    log_p = torch.log_softmax(out.flatten(1), 1)
    own = torch.multinomial(log_p.detach().exp(), 1, generator=draw)[:, 0]
    likelihood = -log_p.gather(1, own[:, None]).sum()
    return (-log_p.gather(1, labels[:, None]).sum(), likelihood) if teacher.labelled else (likelihood, None)


def _at_pixels(x: Tensor, tap: Tap) -> tuple[Tensor, Places]:
    """The tap's columns at single pixels, [N P, C], with the map's size and the pixels; of an input without rows and
    columns the averages, which stand for the whole picture."""
    if x.dim() != 4:
        zero = torch.zeros(1, dtype=torch.int64)
        return _average(x, tap), ((1, 1), zero, zero)
    ys, xs = _centres(x.shape[2:])
    flat = x[:, :, ys, xs].transpose(1, 2).flatten(0, 1)
    columns = torch.cat([flat[:, b.reshape(-1)].reshape(len(flat), *b.shape).mean(2) for b in tap.blocks.values()], 1)
    return columns, ((x.shape[2], x.shape[3]), ys, xs)


def _samples(x: Tensor, tap: Tap) -> Tensor:
    """The tap's columns at single pixels of the grid, [N r P, C]; blocks of different r are brought to their mean.

    Sampled before anything is copied, and laid out channel by channel: the caller's product wants no other order.
    """
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(-1)
    if x.dim() == 4 and max(x.shape[2:]) > PIXELS:
        flat = flat.index_select(2, _grid(x.shape[2:]))
    flat = flat.transpose(0, 1)  # [all channels, N, P]
    index = list(tap.blocks.values())
    parts = [flat.index_select(0, torch.from_numpy(b.reshape(-1))) for b in index]
    parts = [p.reshape(*b.shape, *p.shape[1:]) for p, b in zip(parts, index, strict=True)]
    if len({b.shape[1] for b in index}) > 1:
        parts = [p.mean(1, keepdim=True) for p in parts]
    return torch.cat(parts).flatten(1).T if len(parts) > 1 else parts[0].flatten(1).T


def _change(x: Tensor, g: Tensor, tap: Tap) -> Tensor:
    """x dLoss/dx of each image and column, summed over the channel's positions: [N, C], float64."""
    felt = x * g
    felt = felt.flatten(2).sum(2, dtype=torch.float64) if felt.dim() > 2 else felt.double()
    return torch.cat([felt[:, b.reshape(-1)].reshape(len(x), *b.shape).sum(2) for b in tap.blocks.values()], 1)


def _average(x: Tensor, tap: Tap) -> Tensor:
    """The tap's columns averaged over their positions: [N, C]."""
    flat = x.flatten(2).mean(2) if x.dim() > 2 else x
    return torch.cat([flat[:, b.reshape(-1)].reshape(len(x), *b.shape).mean(2) for b in tap.blocks.values()], 1)


def _rows(parameter: Tensor, axis: int, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """A parameter by channel of the group, [C, everything else]."""
    rows = parameter.detach().double().movedim(axis, 0).reshape(parameter.shape[axis], -1).numpy()
    return np.asarray(rows[index.reshape(-1)].reshape(len(index), -1))


def _array(t: Tensor | None, size: int) -> NDArray[np.float64]:
    return np.zeros(size) if t is None else np.asarray(t.numpy(), dtype=np.float64)

"""`xedge upscale`: a run's artefact on a picture of any size, on this host."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from xedge.decode import decode
from xedge.errors import UnsupportedGraph, UsageError
from xedge.load import load_target
from xedge.onnx_graph import Graph
from xedge.report import read_json as read_report
from xedge.resample import imresize, to_bytes
from xedge.run import write_atomically
from xedge.sizes import compiled, resized, scale_of, shipped, source
from xedge.target import Target
from xedge.tiles import THIN, Reach, cut, least_tile, reach, shortest_tile, stitch

SMALL = 64
"""Input pixels that tiles have at least on a side: of smaller ones most is overlap."""
TRANSPARENT = (".png", ".tif", ".tiff", ".webp")
FORMATS = (*TRANSPARENT, ".bmp", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Upscaled:
    """What was done.

    Attributes:
        target: whose artefact ran.
        size: of the picture that was written, (width, height).
        tile: the engine's input, (width, height); tiles: how many.
        overlap: input pixels on each side.
        seconds: for running the tiles on this host, by the exact interpreter: no measure of a device.
        note: what became of the picture's transparency; empty where it has none.
    """

    target: str
    size: tuple[int, int]
    tile: tuple[int, int]
    tiles: int
    overlap: int
    seconds: float
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def upscale(
    run: Path,
    picture: Path,
    output: Path,
    *,
    target: str | None = None,
    tile: tuple[int, int] | None = None,
    original: bool = False,
) -> Upscaled:
    """Read a picture, run the artefact on its tiles, write the result in 8 bits; transparency is enlarged by bicubic.

    Args:
        run: a finished run's folder.
        output: its suffix says the format.
        target: whose artefact; the run's first by default.
        tile: (width, height) of the engine's input; by default the artefact's own, or larger where most of that would
            be overlap.
        original: run the float original instead.

    Raises:
        UsageError: no picture, no such target, a net that gives no pictures, a tile that is all overlap, or nowhere
            to write.
        UnsupportedGraph: the model does not take other sizes.
    """
    report = read_report(run / "report.json")
    found = [load_target(t) for t in report.targets]
    chosen = [t for t in found if target in (None, t.name, *t.aliases)]
    if not chosen:
        raise UsageError(f"the run has no target {target}", fix=f"choose one of {', '.join(report.targets)}")
    if output.suffix.lower() not in FORMATS:
        raise UsageError("is no format for pictures", where=str(output), fix="write -o NAME.png")
    engine = Engine.of(run, chosen[0], shipped(report, chosen[0].name), original=original)
    pixels, alpha = read(picture, engine.channels)
    started = time.monotonic()
    got, shape, reached = engine(pixels, tile)
    seconds = time.monotonic() - started
    image, note = Image.fromarray(got if engine.out_channels == 3 else got[:, :, 0]), ""
    if alpha is not None and output.suffix.lower() in TRANSPARENT:
        image.putalpha(Image.fromarray(to_bytes(imresize(alpha, *got.shape[:2]))))
        note = "transparency enlarged by bicubic"
    elif alpha is not None:
        note = f"transparency dropped, {output.suffix} has none"
    write_atomically(output, lambda path: image.save(path, Image.registered_extensions()[output.suffix.lower()]))
    padded = [max(t, n + -n % reached.step) for t, n in zip(shape, pixels.shape, strict=False)]
    count = len(list(cut((padded[0], padded[1]), shape, reached)))
    name = "original" if original else chosen[0].name
    return Upscaled(name, image.size, (shape[1], shape[0]), count, reached.radius, seconds, note)


@dataclass(frozen=True)
class Engine:
    """A run's graph for a target, compiled at the size that a picture asks for.

    Attributes:
        graph: what is compiled. target, form: what compiles it, and into what.
        own: the graph's own input, (height, width).
        channels, out_channels: of input and output.
        scale: output over input.
        reach: None where every output pixel depends on the whole picture.
    """

    graph: Any
    target: Target
    form: str
    own: tuple[int, int]
    channels: int
    out_channels: int
    scale: int
    reach: Reach | None

    @classmethod
    def of(cls, run: Path, target: Target, form: str, *, original: bool = False) -> Engine:
        """A run's engine for one of its targets, or its float original in that target's runtime."""
        form = "float32" if original else form
        proto = source(run, None if original else target, form)
        graph = Graph(proto)
        x, y = graph.shapes[graph.inputs[0]], graph.shapes[graph.outputs[0]]
        if len(x) != 4 or len(y) != 4:
            raise UsageError(
                "its net gives no pictures", where=str(run), fix="give the run of a net that restores them"
            )
        return cls(proto, target, form, (x[2], x[3]), x[1], y[1], scale_of(proto), reach(proto))

    def tile(self, size: tuple[int, int], asked: tuple[int, int] | None) -> tuple[int, int]:
        """The tile, (height, width), for a picture of `size`."""
        if self.reach is None:
            if asked is not None:
                raise UnsupportedGraph("every pixel of its output depends on the whole picture", fix="leave --tile out")
            return self._taken(size)
        step, out = self.reach.step, []
        for length, own, wanted in zip(size, self.own, asked[::-1] if asked else (None, None), strict=True):
            if wanted is None:
                wanted = own if own >= least_tile(self.reach) else max(least_tile(self.reach), SMALL)
                wanted = min(wanted, length)
                wanted += -wanted % step
            least = min(shortest_tile(self.reach), length + -length % step)
            if wanted % step or wanted < least:
                what = f"is no multiple of {step}" if wanted % step else "is all overlap"
                multiples = f", in multiples of {step}" if step > 1 else ""
                raise UsageError(f"{wanted} {what}", where="--tile", fix=f"give at least {least}{multiples}")
            out.append(wanted)
        return self._taken((out[0], out[1]))

    def _taken(self, tile: tuple[int, int]) -> tuple[int, int]:
        """A tile, or a larger one where the net takes none so small, as by the border rows that it pads with."""
        if min(tile) < THIN and tile != self.own:
            try:
                resized(self.graph, *tile)
            except UnsupportedGraph:
                step = 1 if self.reach is None else self.reach.step
                height, width = (max(t, THIN + -THIN % step) for t in tile)
                return height, width
        return tile

    def __call__(
        self, pixels: NDArray[np.uint8], asked: tuple[int, int] | None = None
    ) -> tuple[NDArray[np.uint8], tuple[int, int], Reach]:
        """A picture uint8 [H, W, C] -> [scale H, scale W, C'], the tile that was used, and how tiles overlap."""
        size = (pixels.shape[0], pixels.shape[1])
        shape = self.tile(size, asked)
        reached = self.reach or Reach(0, 1)
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
        proto = self.graph if shape == self.own else resized(self.graph, *shape)
        with compiled(proto, self.target, self.form) as model:
            runner = self.target.load(model, torch.get_num_threads())
            got = stitch(runner, planes, shape, reached, self.scale)
        return to_bytes(255 * got.transpose(1, 2, 0).astype(np.float64)), shape, reached


def read(path: Path, channels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """A picture as [H, W, channels], turned as its camera says, and its transparency [H, W], if it has any.

    Raises:
        UsageError: it cannot be read, or the model takes neither one channel nor three.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise UsageError(f"the model takes {channels} channels, and pictures have 1 or 3", where=str(path))
    image = decode(path, alpha=True)
    alpha = np.asarray(image.getchannel("A")) if image.mode == "RGBA" else None
    pixels = np.asarray(image.convert("RGB").convert(modes[channels]))
    opaque = alpha is None or bool((alpha == 255).all())
    return pixels.reshape(pixels.shape[0], pixels.shape[1], channels), None if opaque else alpha

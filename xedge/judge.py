"""What quality is: top-1 where there are labels, agreement with the original where there are none, PSNR where the truth
is a picture. Whoever asks how good a net is, how far it may fall or how to say it, asks here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xedge.data import Data
from xedge.errors import UsageError
from xedge.image_metrics import luma
from xedge.intervals import drop_interval
from xedge.metrics import agreement, kl, snr_db, topk

Kind = Literal["top-1", "agreement", "PSNR"]
Drop = float | str
"""How far quality may fall: a fraction, 0.005 for half a point, or decibels, ``0.2dB``."""

MOST_DB = 100.0
"""What equal pictures count as."""
Z = 2.326
MOST_BYTES = 128 << 20
"""Of answers that are held at once."""


CHARBONNIER = 1e-3
"""Below about this, a quarter of a grey level, errors count by their squares."""


def charbonnier(error: Tensor) -> Tensor:
    """sqrt(e^2 + eps^2) of every element: a smooth absolute value (Lai et al., CVPR 2017)."""
    return (error.square() + CHARBONNIER**2).sqrt()


def enlarged(x: Tensor, size: torch.Size) -> Tensor:
    """Pictures [N, C, h, w] at `size` (H, W), not below their own, by the field's bicubic: Keys' kernel, a = -1/2."""
    # With antialias torch takes that a; enlarging has nothing to smooth.
    return nn.functional.interpolate(x, size=size, mode="bicubic", antialias=True)


@dataclass(frozen=True)
class Judge:
    """How good answers are on one data set.

    Attributes:
        kind: what is measured.
        shape: of a true picture, (C', H, W); empty for classes.
        shave: pixels at each border that do not count.
    """

    kind: Kind
    shape: tuple[int, ...] = ()
    shave: int = 0

    @classmethod
    def of(cls, data: Data) -> Judge:
        """What these data can be judged by."""
        if data.scale is not None:
            channels = data.train[0][1].shape[0]
            _, h, w = data.shape
            return cls("PSNR", (channels, data.scale * h, data.scale * w), data.scale if data.scale > 1 else 0)
        return cls("agreement" if data.classes is None else "top-1")

    @property
    def restores(self) -> bool:
        """Whether answers are pictures."""
        return self.kind == "PSNR"

    @property
    def taught(self) -> bool:
        """Whether the data say what is right."""
        return self.kind != "agreement"

    def quality(self, out: Tensor, truth: Tensor, original: Tensor) -> float:
        """Top-1 or agreement, a fraction, or PSNR of Y in dB over all tiles as if they were one picture.

        Args:
            out: answers [N, L], pictures flattened.
            truth: labels [N] or true pictures [N, C', H, W].
            original: the original's answers [N, L].
        """
        if self.restores:
            return _decibels(float(self.errors(out, truth).mean()))
        return topk(out, truth) if self.kind == "top-1" else agreement(out, original)

    def dislike(self, out: Tensor, truth: Tensor, original: Tensor) -> float:
        """What choices are compared by, less is better: cross-entropy with the labels, KL from the original's answers,
        or the mean squared error of the pictures. Arguments as of `quality`."""
        if self.restores:
            return float((out - truth.flatten(1)).square().mean(1, dtype=torch.float64).mean())
        log_p = torch.log_softmax(out.float(), 1)
        if self.kind == "top-1":
            return float(nn.functional.nll_loss(log_p, truth))
        taught = torch.log_softmax(original.float(), 1)
        return float(nn.functional.kl_div(log_p, taught, reduction="batchmean", log_target=True))

    def divergence(self, base: Tensor, got: Tensor) -> float:
        """How far answers [N, L] lie from others: KL in nats; of pictures and of single outputs noise over energy."""
        if self.restores or base.shape[1] == 1:
            return math.pow(10, -snr_db(base, got) / 10)
        return kl(base, got)

    def change(self, before: Tensor, after: Tensor, truth: Tensor, original: Tensor) -> tuple[float, float, float]:
        """Quality after a step, what the step lost, and what chance explains of that, 95 %.

        Without labels the original's top-1 is taken for right. Arguments as of `quality`.
        """
        if self.restores:
            quality = self.quality(after, truth, original)
            return quality, self.quality(before, truth, original) - quality, self._chance(before, after, truth)
        want = truth if self.kind == "top-1" else original.argmax(1)
        changed = int(((after.argmax(1) == want) != (before.argmax(1) == want)).sum())
        return topk(after, want), topk(before, want) - topk(after, want), 1.96 * changed**0.5 / len(want)

    def _chance(self, before: Tensor, after: Tensor, truth: Tensor) -> float:
        """Half of the 95 % interval of a difference in PSNR: by the tiles' errors, to first order."""
        if len(before) < 2:
            return MOST_DB
        a, b = (_relative(self.errors(x, truth)) for x in (before, after))
        return 1.96 * 10 / math.log(10) * float((b - a).std()) / math.sqrt(len(before))

    def errors(self, out: Tensor, truth: Tensor) -> Tensor:
        """Mean squared error of Y of each picture, as stored in 8 bits, [N] in float64."""
        parts = []
        for x, y in zip(torch.split(out, 16), torch.split(truth, 16), strict=True):
            a, b = (self._light(p.reshape(-1, *self.shape)) for p in (x, y))
            parts.append((a - b).square().flatten(1).mean(1))
        return torch.cat(parts)

    def _light(self, pictures: Tensor) -> Tensor:
        stored = (pictures.double().clamp(0, 1) * 255).round() / 255
        y = luma(stored) if stored.shape[1] == 3 else stored
        h, w = y.shape[-2:]
        return y[..., self.shave : h - self.shave, self.shave : w - self.shave]

    @property
    def small(self) -> float:
        """A loss below this is none."""
        return 0.02 if self.restores else 0.005

    def held(self, images: int) -> int:
        """Of so many images, those whose answers fit into memory."""
        return min(images, MOST_BYTES // (4 * math.prod(self.shape))) if self.restores else images

    # -- on validation data ------------------------------------------------------------------------------------------

    def row(self, out: Tensor, base: Tensor, truth: Tensor) -> dict[str, Any]:
        """One model's line of verify.json: its quality, and what tells a fall from chance."""
        if self.restores:
            return {"psnr": self.quality(out, truth, base), "noise_db": self._chance(base, out, truth)}
        row: dict[str, Any] = {"agreement": agreement(out, base), "kl": kl(base, out)}
        if self.kind == "top-1":
            right, before = out.argmax(1) == truth, base.argmax(1) == truth
            row["top1"] = topk(out, truth)
            # Images that only one of the two gets right decide whether a drop is more than chance.
            row["lost"] = int((before & ~right).sum())
            row["won"] = int((~before & right).sum())
        return row

    # -- in words ----------------------------------------------------------------------------------------------------

    def say(self, quality: float) -> str:
        """A quality or a fall: 91.20% or 34.12 dB."""
        return f"{quality:.2f} dB" if self.restores else f"{quality:.2%}"


def _relative(errors: Tensor) -> Tensor:
    mean = errors.mean()
    return errors / mean if mean > 0 else errors


def _decibels(error: float) -> float:
    return min(-10 * math.log10(error), MOST_DB) if error > 0 else MOST_DB


def amount(drop: Drop, flag: str, *, restores: bool) -> float:
    """A drop as the data count it: a fraction, or decibels where they restore pictures.

    Raises:
        UsageError: the other unit was given, or no number from 0.
    """
    found = re.fullmatch(r"([\d.]+) ?dB", drop) if isinstance(drop, str) else None
    try:
        value = float(found[1] if found else drop)
    except ValueError:
        value = -1.0
    where, known = f"{flag} {drop}", "write 0.2dB" if restores else "write 0.5% or 0.005"
    if value < 0 or not math.isfinite(value) or (found is None and value >= 1):
        raise UsageError("is no drop of quality", where=where, fix=known)
    if (found is not None) != restores:
        why = "the data restore pictures, whose quality is in decibels" if restores else "the data have no decibels"
        raise UsageError(why, where=where, fix=known)
    return value


@dataclass(frozen=True)
class Fall:
    """How far an artefact fell on validation data below the original.

    Attributes:
        kind: what fell.
        drop: in its unit; noise: what chance explains of it, 95 %.
        low, high: the interval that errs in about 1 % on either side.
    """

    kind: Kind
    drop: float
    noise: float
    low: float
    high: float

    def say(self, value: float) -> str:
        """One of these numbers with its unit."""
        return Judge(self.kind).say(value)


def fall(verified: Mapping[str, Any], target: str) -> Fall:
    """The fall of a target's artefact, from verify.json."""
    row, n = verified["targets"][target], verified["images"]
    if "psnr" in row:
        drop, noise = verified["original"]["psnr"] - row["psnr"], row["noise_db"]
        wide = Z / 1.96 * noise
        return Fall("PSNR", drop, noise, drop - wide, drop + wide)
    if "top1" in row:
        lost, won = row["lost"], row["won"]
        return Fall("top-1", (lost - won) / n, 1.96 * (lost + won) ** 0.5 / n, *drop_interval(lost, won, n))
    drop = 1 - row["agreement"]
    noise = 1.96 * (row["agreement"] * drop / n) ** 0.5
    return Fall("agreement", drop, noise, *drop_interval(round(drop * n), 0, n))

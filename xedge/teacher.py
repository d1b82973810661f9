"""The local teacher Y that every hidden layer is given directly: the paper's backward broadcast.

S. Y. Kung, Z. Hou, "Augment deep BP-parameter learning with local XAI-structural learning", CIS 20(3), 2020.
DI is one formula for any Y; what Y is decides what the score asks of a channel:

    labels        the classes: the paper's weighted one-hot
    coarse:FILE   superclasses, as FILE groups the classes; `coarse` alone: as the data set does
    class:K       one class, by name or number, against the rest: which channels tell it apart
    logits        the original's own output, for data without labels
    images        the true picture, for nets that restore: each pixel of a layer is taught the pixels that it stands for

In the last form Y is the residual truth, what plain bicubic enlarging of the input leaves to be learnt, brought to the
layer's resolution by space-to-depth: a pixel of a map k times coarser than the picture is taught a column of C' k^2
values. DI is then Eqs 13-15's ridge regression of the picture on the layer. `images:whole` takes the truth itself, and
`logits` the net's own picture, less the enlarged input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from xedge.errors import UsageError, nearest
from xedge.judge import enlarged

if TYPE_CHECKING:
    from xedge.data import Data

KINDS = ("labels", "logits", "coarse", "class", "images")
Kind = Literal["labels", "logits", "coarse", "class", "images"]
MOST = 8
"""Side of the largest window of pixels that one pixel of a layer is taught; larger ones are averaged down to it."""


@dataclass(frozen=True)
class Teacher:
    """What the layers are taught.

    Attributes:
        kind: ``labels``, ``coarse`` and ``class`` are the paper's weighted one-hot (Theorem 1) of the classes, of
            superclasses, and of one class and the rest; ``logits`` is the original net's output; ``images`` the truth.
        size: L, the rows of Y; of pictures C', which a layer of lower resolution has k^2 times.
        rows: for each class its row of Y; empty where class l is row l.
        words: for the report.
        pictures: what of a picture teaches each pixel: the residual, the whole, or "" where Y has no pixels.
    """

    kind: Kind
    size: int
    rows: tuple[int, ...] = ()
    words: str = ""
    pictures: Literal["", "residual", "whole"] = ""

    @property
    def labelled(self) -> bool:
        """Whether Y tells classes apart."""
        return self.kind not in ("logits", "images")

    def picture(self, x: Tensor, truth: Tensor, out: Tensor) -> Tensor:
        """What teaches the pixels of a batch, [N, C', H, W].

        Args:
            x: inputs [N, C, h, w].
            truth, out: true pictures and the net's, [N, C', H, W].
        """
        taught = (out if self.kind == "logits" else truth).detach()
        if self.pictures == "whole" or x.shape[1] != taught.shape[1]:
            return taught
        return taught - enlarged(x, taught.shape[2:])

    def encode(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Y^T of a batch, [N, L]: the one-hot labels (not yet weighted), or the logits."""
        if not self.labelled:
            return logits.detach().flatten(1).to(torch.float32)
        rows = torch.tensor(self.rows)[labels] if self.rows else labels
        return torch.nn.functional.one_hot(rows, self.size).to(torch.float32)

    def weights(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """The weight of each row of Y, [L], from the row sums of the encoded teacher.

        A label row of N_l ones is weighted 1/sqrt(N_l), which makes X Y^T Y X^T the between-class scatter S_B exactly
        and tr(Y Y^T) = L - 1 (Theorem 1). A class without samples weighs nothing.
        """
        if not self.labelled:
            return np.ones_like(total)
        present = total > 0
        return np.where(present, 1.0 / np.sqrt(np.where(present, total, 1.0)), 0.0)


def choose_teacher(spec: str | None, data: Data, outputs: int) -> Teacher:
    """The teacher behind ``labels``, ``logits``, ``coarse``, ``coarse:FILE``, ``class:NAME``, ``class:INDEX``,
    ``images`` or ``images:whole``; by default what the data know: true pictures or labels, or else the logits.

    Args:
        spec: as given by the user.
        data: whose labels are meant.
        outputs: the model's.

    Raises:
        UsageError: an unknown kind, labels that the data do not have, an unknown class, or a file that is not a map of
            all classes.
    """
    usual = "images" if data.restores else "logits" if data.classes is None else "labels"
    kind, colon, value = (spec or usual).partition(":")
    where = f"--teacher {spec}"
    if (
        kind not in KINDS
        or (colon and kind in ("labels", "logits"))
        or (kind == "images" and value not in ("", "whole"))
    ):
        raise UsageError("is no teacher", where=where, fix="choose labels, logits, coarse, coarse:FILE or class:NAME")
    if data.restores:
        return _pictures(kind, value, data, where)
    if kind == "images":
        raise UsageError(f"needs true pictures and {data.name} has none", where=where, fix="leave it out")
    if kind == "logits":
        return Teacher("logits", outputs, words="the original's logits")
    if data.classes is None:
        raise UsageError(f"needs labels and {data.name} has none", where=where, fix="give --teacher logits, or none")
    if kind == "labels":
        return Teacher("labels", data.classes, words="labels, weighted one-hot (Theorem 1)")
    if kind == "class":
        chosen = _class(value, data, where)
        rows = tuple(int(i != chosen) for i in range(data.classes))
        name = f" ({data.class_names[chosen]})" if data.class_names else ""
        return Teacher("class", 2, rows, f"class {chosen}{name} against the rest, weighted one-hot (Theorem 1)")
    if value:
        groups = _coarse(Path(value), data)
    elif data.superclasses:
        groups = [str(i) for i in data.superclasses]
    else:
        raise UsageError(f"{data.name} names no superclasses", where=where, fix="give --teacher coarse:FILE.json")
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise UsageError("puts all classes into one: nothing to tell apart", where=where, fix="give two or more")
    words = f"{len(names)} superclasses of {data.classes} classes, weighted one-hot (Theorem 1)"
    return Teacher("coarse", len(names), tuple(names.index(g) for g in groups), words)


def _pictures(kind: str, value: str, data: Data, where: str) -> Teacher:
    channels = data.train[0][1].shape[0]
    if kind == "logits":
        return Teacher("logits", channels, words="the original's pictures less the enlarged input", pictures="residual")
    if kind != "images":
        raise UsageError(
            f"needs labels and {data.name} has pictures", where=where, fix="give --teacher images, or none"
        )
    if value:
        return Teacher("images", channels, words="the true pictures, by space-to-depth", pictures="whole")
    return Teacher(
        "images", channels, words="the true pictures less the enlarged input, by space-to-depth", pictures="residual"
    )


def windows(picture: Tensor, size: tuple[int, int], ys: Tensor, xs: Tensor) -> Tensor:
    """What pixels of a map are taught: the part of the picture that each stands for, [N, P, L].

    A pixel of an h x w map stands for a window of k x k pixels, k = H // h and at least 1, about its own place; L =
    C' k^2, or C' MOST^2 at most. Where H = k h this is space-to-depth.

    Args:
        picture: [N, C', H, W].
        size: (h, w) of the map.
        ys, xs: pixels of the map, int64 [P].
    """
    sides, corners = [], []
    for at, count, whole in ((ys, size[0], picture.shape[2]), (xs, size[1], picture.shape[3])):
        k = max(1, whole // count)
        sides.append(k)
        corners.append((((at + 0.5) * whole / count) - k / 2).round().long().clamp(0, whole - k))
    rows = corners[0][:, None] + torch.arange(sides[0])
    columns = corners[1][:, None] + torch.arange(sides[1])
    seen = picture[:, :, rows[:, :, None], columns[:, None, :]]  # [N, C', P, k, k]
    if max(sides) > MOST:
        n, c, p = seen.shape[:3]
        small = functional.adaptive_avg_pool2d(seen.flatten(0, 2), (min(MOST, sides[0]), min(MOST, sides[1])))
        seen = small.view(n, c, p, *small.shape[1:])
    return seen.transpose(1, 2).flatten(2)


def _class(text: str, data: Data, where: str) -> int:
    """A class by name, or else by number."""
    assert data.classes is not None
    if text in data.class_names:
        return data.class_names.index(text)
    if text.isdecimal() and int(text) < data.classes:
        return int(text)
    hint = nearest(text, data.class_names) if data.class_names else ""
    fix = hint if 0 < len(hint) < 200 else f"give a number from 0 to {data.classes - 1}"
    raise UsageError(f"{data.name} has no class {text!r}", where=where, fix=fix)


def _coarse(path: Path, data: Data) -> Sequence[str]:
    """The superclass of each class, from {"class": "superclass", ...}; classes by name or number."""
    where, example = str(path), 'write {"0": "animal", "1": "vehicle", ...}'
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"cannot be read ({e.strerror})", where=where, fix="check --teacher coarse:FILE") from e
    except ValueError as e:
        raise UsageError(f"is not JSON ({str(e)[:100]})", where=where, fix=example) from e
    if not isinstance(facts, dict) or not all(isinstance(v, str | int) for v in facts.values()):
        raise UsageError("does not map each class to a superclass", where=where, fix=example)
    found: dict[int, str] = {}
    for name, group in facts.items():
        index = _class(name, data, where)
        if index in found:
            raise UsageError(f"names class {index} twice", where=where, fix="name each class once")
        found[index] = str(group)
    assert data.classes is not None
    missing = [i for i in range(data.classes) if i not in found]
    if missing:
        first = data.class_names[missing[0]] if data.class_names else missing[0]
        raise UsageError(f"leaves out {len(missing)} classes, such as {first}", where=where, fix="name each class once")
    return [found[i] for i in range(data.classes)]

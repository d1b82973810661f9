"""What a criterion reads, made up: features of classes, and taps that saw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from xedge.channels import ChannelGroup
from xedge.moments import Moments
from xedge.observe import Observed, Seen, Tap
from xedge.teacher import Teacher

Array = NDArray[np.float64]
LABELS = Teacher("labels", 4)


def moments(x: Array, y: Array) -> Moments:
    return Moments.of(torch.from_numpy(x), torch.from_numpy(y))


def drawn(seed: int, c: int, n: int = 60) -> tuple[Array, Array]:
    """Correlated features [n, c] of very unlike scales that know something of unequal classes, and one-hot labels."""
    r = np.random.default_rng(seed)
    labels = r.choice(4, n, p=[0.5, 0.3, 0.15, 0.05])
    x = r.normal(size=(4, c))[labels] + 2 * r.normal(size=(n, c)) @ r.normal(size=(c, c)) / np.sqrt(c)
    return x * r.lognormal(0, 1.5, c) + 5 * r.normal(size=c), np.eye(4)[labels]


def seen(x: Array, y: Array, name: str = "tap", groups: Mapping[str, int] | None = None, **facts: Array) -> Seen:
    """A tap that sees x [N, C]; its pixels are the same samples."""
    c = x.shape[1]
    at, blocks = 0, {}
    for group, size in (groups or {"g": c}).items():
        blocks[group] = np.arange(at, at + size)[:, None]
        at += size
    return Seen(
        tap=Tap(name, blocks),
        pooled=moments(x, y),
        pixels=moments(x, np.zeros((len(x), 0))),
        taylor=facts.get("taylor", np.zeros(c)),
        weight=facts.get("weight", np.zeros((1, c, 1, 1))),
        fisher=facts.get("fisher", np.ones(len(facts["weight"]) if "weight" in facts else 1)),
    )


def observed(
    *taps: Seen,
    teacher: Teacher = LABELS,
    producers: Sequence[Array] = (),
    norms: Sequence[Array] = (),
    seed: int = 0,
) -> Observed:
    return Observed({s.tap.layer: s for s in taps}, teacher, 60, seed, {"g": list(producers)}, {"g": list(norms)})


def group(size: int, name: str = "g") -> ChannelGroup:
    return ChannelGroup(name, size, ())


def whole(size: int) -> NDArray[np.bool_]:
    return np.ones(size, bool)


def energy(y: Array) -> float:
    return float((y.sum(0) > 0).sum() - 1)

"""What to ask for instead where a stage of a run loses too much: a request that `xedge compress` accepts.

Whoever is to blame is given more: MACs, bits, or float. Nobody else gets less for it, so the budgets rise by as much as
that takes.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from xedge.budget import LEAST, STEP, least_bits
from xedge.codebook import LEVELS
from xedge.command import command, option
from xedge.quantize import CAUTION, ScaleTable, WeightScale
from xedge.ranges import RangeRule
from xedge.request import Loaded, Request

FEWEST = 6
"""Bits that a layer to blame gets at least."""
WHOLE = 0.99
"""Of the MACs: where more of them are left, pruning took nothing that a larger budget gives back."""
FLOAT, OPERATORS = 4, 512
"""Bytes: of a weight that stays float, and of the operators around its layer at most."""


@dataclass(frozen=True)
class Mend:
    """What to try.

    Attributes:
        words: the options that change, or what to do where none helps.
        command: the whole command with them; None where none helps.
    """

    words: str
    command: str | None = None


def mend(
    stage: str,
    layers: Sequence[str],
    loaded: Loaded,
    begun: ScaleTable,
    proto: ModelProto,
    kept: float,
    ranges: Callable[[], RangeRule | None],
) -> Mend:
    """The run's own request with more for what a stage lost.

    Args:
        stage: of `xedge.diagnose.STAGES`.
        layers: to blame, the costliest first.
        begun: the bits as they were chosen first, channels of 0 bits included. proto: the graph that they were for.
        kept: MACs that are left, a fraction of the original's.
        ranges: finds better ranges of the activations than the request's, if there are any.
    """
    request = loaded.request
    known = {n for n, _ in loaded.model.named_modules()} & {w.layer for w in begun.weights.values()}
    mine = [n for n in layers if n in known]
    if stage == "pruned":
        new = _less_pruned(loaded, kept)
    elif stage == "weights quantised":
        new = _with_room(loaded, begun, proto, _finer(request, mine, begun))
    elif stage == "activations quantised":
        rule = None if mine[:1] == [*layers[:1]] else ranges()  # first comes a tensor that no layer writes
        new = (
            replace(request, ranges=rule) if rule else _with_room(loaded, begun, proto, _in_float(request, mine, begun))
        )
    else:
        return Mend("report this model: an export that changes answers is a fault of xedge's")
    if new == request:
        return Mend("no option helps: 8 bits are too few there")
    changes = {f.name: getattr(new, f.name) for f in fields(new) if getattr(new, f.name) != getattr(request, f.name)}
    added = {**changes, "bits_min": new.bits_min[len(request.bits_min) :]}
    words = shlex.join(word for name, value in added.items() for word in option(name, value))
    words += "".join(f", without {option(n, getattr(request, n))[0]}" for n, v in changes.items() if v is None)
    return Mend(words, command(replace(loaded, request=new)))


def _less_pruned(loaded: Loaded, kept: float) -> Request:
    """Half as much pruned, or what lets it be less: time, a smaller drop, longer training."""
    request, budget = loaded.request, loaded.settings.budget
    if budget.macs is not None and max(kept, budget.macs) < WHOLE:
        return replace(request, macs=math.ceil(50 * (1 + max(kept, budget.macs))) / 100)
    if budget.latency is not None:
        return replace(request, latency=1.5 * budget.latency)
    if budget.macs is None and budget.max_drop:
        half = budget.max_drop / 2
        return replace(request, max_drop=f"{half:g}dB" if loaded.data.restores else half)
    return replace(request, epochs=2 * max(request.epochs, 1))


def _finer(request: Request, layers: Sequence[str], begun: ScaleTable) -> Request:
    """More bits for some layers, float where they have all bits."""
    most = int(LEVELS[-1]) if request.codebook else 8
    mean = {w.layer: float(w.planned.mean()) for w in begun.weights.values()}
    coarse = [n for n in layers if mean[n] < most]
    if not layers:
        return replace(request, bits=min(8.0, request.bits + 1))
    if not coarse:
        return _in_float(request, layers, begun)
    few = min(most, max(FEWEST, 1 + max(round(mean[n]) for n in coarse)))
    return replace(request, bits_min=(*request.bits_min, (few, _pattern(coarse))))


def _in_float(request: Request, layers: Sequence[str], begun: ScaleTable) -> Request:
    """Some layers float, as long as others are left."""
    if {w.layer for w in begun.weights.values()} <= set(layers):
        layers = layers[:-1]
    if not layers:
        return request
    before = request.keep_float
    return replace(request, keep_float=_pattern(layers) if before is None else f"{before}|{_pattern(layers)}")


def _pattern(layers: Sequence[str]) -> str:
    return f"^({'|'.join(map(re.escape, layers))})$"


def _with_room(loaded: Loaded, begun: ScaleTable, proto: ModelProto, new: Request) -> Request:
    """A request with budgets under which some layers are given more and no channel less than it has.

    A drop that was allowed would be used up again elsewhere: bits take its place.
    """
    old = loaded.request
    if new == old:
        return old
    inside = [w for w in begun.weights.values() if new.keep_float is None or not re.search(new.keep_float, w.layer)]
    counts = {w.layer: w.values.size for w in inside}
    if old.bits_drop is not None:
        new = replace(new, bits_drop=None, bits=LEAST if old.bytes is None else old.bits)
    while True:  # a higher mean raises the floors of other channels, too, which this one must not pay for
        least = least_bits(replace(loaded, request=new), proto, counts)
        cautious = min(CAUTION, int(new.bits) - 1)
        bits = {w.layer: _bits(w, np.maximum(w.planned, max(least.get(w.layer, 0), cautious))) for w in inside}
        need = min(8.0, math.ceil(sum(bits.values()) / sum(counts.values()) / STEP) * STEP)
        if need <= new.bits:
            break
        new = replace(new, bits=need)
    if old.bytes is None:
        return new
    raised = (w for w in inside if bits[w.layer] > _bits(w, w.planned))
    floats = (w for w in begun.weights.values() if w.layer not in counts)
    more = sum(-(-bits[w.layer] // 8) for w in raised) + sum(FLOAT * w.values.size + OPERATORS for w in floats)
    return replace(new, bytes=old.bytes + more)


def _bits(w: WeightScale, planned: NDArray[np.generic]) -> int:
    """Of a whole weight."""
    return w.values.size // len(w.bits) * math.ceil(float(planned.sum()))

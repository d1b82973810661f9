"""`xedge diagnose`: where a run lost its accuracy, which layers are to blame, and the flag that mends it.

    original -> pruned -> weights quantised -> activations quantised -> exported -> compiled

Each stage runs on the training images held back for choosing, because its advice is a choice. The first stage that
loses more than chance is named, or the one that loses most where only all together do; its layers are tried one at a
time, everything else as in the stage before. Channels that got 0 bits and were cut for it count as quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import torch
from onnx import ModelProto
from safetensors.torch import load_file
from torch import Tensor

from xedge.budget import calibrated
from xedge.data import at_once, batches, enough
from xedge.errors import UsageError
from xedge.judge import Judge, Kind
from xedge.mend import mend
from xedge.metrics import agreement, snr_db
from xedge.onnx_graph import Graph, session
from xedge.pipeline import rebuild
from xedge.progress import Talk
from xedge.quantize import ScaleTable, dequantised, float_ranges
from xedge.ranges import RangeRule
from xedge.report import read_json as read_report
from xedge.request import Loaded, Request, load_everything
from xedge.run import read_json
from xedge.simulate import Quantized
from xedge.target import Target
from xedge.train import predict

IMAGES = 512
"""Held-back training images that every stage is run on, at most."""
TRIED = 48
"""Of them, those on which layers are tried one at a time."""
NAMED = 3
GUILTY = 0.1
"""Of the costliest layer's cost: who costs less is not named."""
STAGES = ("original", "pruned", "weights quantised", "activations quantised", "exported", "compiled")


@dataclass(frozen=True)
class Stage:
    """One stage against the one before.

    Attributes:
        name: of STAGES.
        quality: top-1, agreement with the original where there are no labels, or PSNR in dB.
        lost: quality of the stage before, minus its own.
        noise: what chance explains of it, 95 %.
        same: share of images with the same top-1 as in the stage before; None of pictures.
        snr_db: of its logits against those of the stage before; None where they are equal.
        matters: whether it loses more than chance.
    """

    name: str
    quality: float
    lost: float
    noise: float
    same: float | None
    snr_db: float | None
    matters: bool


@dataclass(frozen=True)
class Blamed:
    """A layer, and what it costs alone: KL of the logits in nats (of pictures noise over energy), or the part of its
    information that pruning took."""

    layer: str
    cost: float


@dataclass(frozen=True)
class Diagnosis:
    """A target's artefact, followed from the original.

    Attributes:
        target: its name. kind: what quality is. images: how many.
        stages: in order. first: the first that loses more than chance, or None. worst: the one that loses most.
        whole: the artefact against the original.
        blamed: layers of `first`, or of `worst` where only the whole loses more than chance; the costliest first.
        fix: what to try; None where nothing loses more than chance.
        command: the whole command with it; None where no option mends it.
    """

    target: str
    kind: Kind
    images: int
    stages: tuple[Stage, ...]
    first: str | None
    worst: str
    whole: Stage
    blamed: tuple[Blamed, ...]
    fix: str | None
    command: str | None

    @property
    def guilty(self) -> str | None:
        """The stage to mend, if any."""
        return self.first or (self.worst if self.whole.matters else None)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def diagnose(folder: Path, name: str | None = None, talk: Talk | None = None) -> list[Diagnosis]:
    """Diagnose each target of a finished run, or one of them.

    Raises:
        UsageError: not a finished run, or not one of its targets.
    """
    talk = talk or Talk(quiet=True)
    report = read_report(folder / "report.json")
    loaded = load_everything(Request.from_json(read_json(folder / "run.json"), str(folder)))
    targets = [t for t in loaded.targets if name in (None, t.name, *t.aliases)]
    if not targets:
        raise UsageError(f"the run has no target {name}", fix=f"choose one of {', '.join(report.targets)}")
    for choice in report.choices:
        if choice.target in {t.name for t in targets} and choice.form not in ("int8", "float"):
            raise UsageError(
                f"{choice.target} ships {choice.form}, and the stages lead to the plan's int8",
                where=str(folder),
                fix="diagnose another target, or a run without --device",
            )
    artefacts = {a.target: folder / a.path for a in report.artifacts}
    kept = {row.target: row.macs for row in report.rows if row.name == "compressed"}
    share = {row.target: kept[row.target] / row.macs for row in report.rows if row.name == "original"}
    return [_Patient(folder, loaded, t, artefacts[t.name], talk).examine(share[t.name]) for t in targets]


class _Patient:
    """One artefact of a run."""

    def __init__(self, folder: Path, loaded: Loaded, target: Target, artefact: Path, talk: Talk) -> None:
        self.folder, self.loaded, self.target, self.artefact, self.talk = folder, loaded, target, artefact, talk
        self.data = loaded.data
        self.small = rebuild(folder)
        self.pruned, self.begun = onnx.load(folder / "pruned.onnx"), ScaleTable.load(folder / "rounded.safetensors")
        self.floats = onnx.load(folder / "float.onnx")
        self.table = ScaleTable.load(folder / "scales.safetensors")
        self.judge = Quantized(self.small, self.floats, self.table, target.flavour, self.data.shape)
        self.quality = Judge.of(self.data)
        select = self.data.select
        count = self.quality.held(min(enough(select, IMAGES), len(select)))
        self.images = [x for x, _ in batches(select, at_once(select), limit=count)]
        self.count, self.tried = count, enough(select, TRIED)

    def examine(self, kept: float) -> Diagnosis:
        """`kept`: MACs that are left, a fraction of the original's."""
        original = self.loaded.factory()
        original.load_state_dict(load_file(self.folder / "original.safetensors"))
        base, labels = predict(original, self.data.select, limit=self.count)
        weights = dict(self.table.weights) if self.target.flavour != "float" else {}
        flavoured = onnx.load(self.folder / f"model.{self.target.flavour}.onnx")
        run = self.target.load(self.artefact, torch.get_num_threads())
        stages: list[Stage] = []
        logits = [base]
        makers: tuple[Callable[[], Tensor], ...] = (
            lambda: base,
            lambda: self._onnx(self.pruned),
            lambda: self._onnx(dequantised(self.floats, weights)),
            lambda: self._through(self.judge),
            lambda: self._onnx(flavoured, exact=True),
            lambda: torch.cat([torch.from_numpy(run(x.numpy())).flatten(1) for x in self.images]),
        )
        for stage, make in zip(STAGES, makers, strict=True):
            self.talk.say(f"{self.target.name}: {stage}, {self.count} images")
            logits.append(make())
            stages.append(self._stage(stage, logits[-2], logits[-1], base, labels))
        first = next((s for s in stages if s.matters), None)
        worst = max(stages[1:], key=lambda s: s.lost)
        whole = self._stage("all together", base, logits[-1], base, labels)
        found = Diagnosis(
            target=self.target.name,
            kind=self.quality.kind,
            images=self.count,
            stages=tuple(stages),
            first=first.name if first else None,
            worst=worst.name,
            whole=whole,
            blamed=(),
            fix=None,
            command=None,
        )
        if found.guilty is None:
            return found
        blamed = tuple(self._blame(found.guilty)[:NAMED])
        way = mend(
            found.guilty,
            [b.layer for b in blamed],
            self.loaded,
            self.begun,
            self.pruned,
            kept,
            lambda: self._ranges(base, labels),
        )
        return replace(found, blamed=blamed, fix=way.words, command=way.command)

    def _stage(self, name: str, before: Tensor, after: Tensor, base: Tensor, labels: Tensor) -> Stage:
        good, lost, noise = self.quality.change(before, after, labels, base)
        snr = snr_db(before, after)
        return Stage(
            name=name,
            quality=good,
            lost=lost,
            noise=noise,
            same=None if self.quality.restores else agreement(before, after),
            snr_db=snr if np.isfinite(snr) else None,
            matters=lost > max(noise, self.quality.small),
        )

    def _onnx(self, proto: ModelProto, *, exact: bool = False, limit: int | None = None) -> Tensor:
        run, feed = session(proto, exact=exact), Graph(proto).inputs[0]
        rows = torch.split(torch.cat(self.images)[:limit], 1)
        return torch.cat([torch.from_numpy(run.run(None, {feed: x.numpy()})[0]).flatten(1) for x in rows])

    @torch.no_grad()
    def _through(self, net: Quantized, limit: int | None = None) -> Tensor:
        size = 1 if net.single else at_once(self.data.select)
        return torch.cat([net(x).flatten(1) for x in torch.split(torch.cat(self.images)[:limit], size)])

    # -- blame -------------------------------------------------------------------------------------------------------

    def _blame(self, stage: str) -> list[Blamed]:
        """Layers by what they cost alone at a stage, the costliest first."""
        if stage == "pruned":
            rows = read_report(self.folder / "report.json").layers
            costs = {row.name: 1 - row.di_kept for row in rows if row.di_kept is not None}
        elif stage == "weights quantised":
            costs = self._each_weight()
        elif stage == "activations quantised":
            costs = self._each_tensor()
        else:
            costs = {}
        least = GUILTY * max(costs.values(), default=0.0)
        return [Blamed(n, c) for n, c in sorted(costs.items(), key=lambda row: -row[1]) if c > least]

    def _each_weight(self) -> dict[str, float]:
        """Where channels of 0 bits were cut, the layers of the net before are tried as well."""
        rows = [(self.floats, self.table)]
        if any(not w.bits.all() for w in self.begun.weights.values()):
            rows.append((self.pruned, self.begun))
        tries = [(proto, name, w) for proto, table in rows for name, w in table.weights.items()]
        bases = [(proto, self._onnx(proto, limit=self.tried)) for proto, _ in rows]
        costs: dict[str, float] = {}
        for proto, name, w in self.talk.bar(tries, "layers, one at a time", len(tries)):
            base = next(logits for of, logits in bases if of is proto)
            cost = self.quality.divergence(base, self._onnx(dequantised(proto, {name: w}), limit=self.tried))
            costs[w.layer] = max(cost, costs.get(w.layer, 0.0))
        return costs

    def _each_tensor(self) -> dict[str, float]:
        """By the layer that writes the tensor; what no layer writes is named by its operator."""
        graph = Graph(self.floats)
        layers = {graph.written(n): n.input[1].removesuffix(".weight") for n in graph.weighted()}
        every = self.judge.rounding
        self.judge.rounding = {}
        base = self._through(self.judge, self.tried)
        costs: dict[str, float] = {}
        nodes = self.judge.rounding_nodes
        for tensor, node in self.talk.bar(nodes.items(), "tensors, one at a time", len(nodes)):
            self.judge.rounding = {node: every[node]}
            costs[layers.get(tensor, tensor)] = self.quality.divergence(base, self._through(self.judge, self.tried))
        self.judge.rounding = every
        return costs

    def _ranges(self, base: Tensor, labels: Tensor) -> RangeRule | None:
        """Under which the net is best; None where that is the run's own rule."""
        request = self.loaded.request
        calibration = calibrated(self.data, request.seed, self.floats, feedback=False)

        def dislike(rule: RangeRule) -> float:
            self.talk.say(f"{self.target.name}: --ranges {rule}")
            table = replace(self.table, activations=float_ranges(self.floats, calibration, rule, self.table.weights))
            net = Quantized(self.small, self.floats, table, self.target.flavour, self.data.shape)
            return self.quality.dislike(self._through(net), labels, base)

        best = min(get_args(RangeRule), key=lambda rule: (dislike(rule), rule != request.ranges))
        return None if best == request.ranges else best


def to_text(d: Diagnosis) -> str:
    """A table, the finding, and the flag."""
    say = Judge(d.kind).say
    lines = [f"{d.target}: {d.images} held-back training images", ""]
    lines += [f"{'stage':24} {d.kind:>9} {'lost':>8} {'by chance':>10} {'same':>8} {'SNR, dB':>8}"]
    for s in (*d.stages, d.whole):
        snr = "-" if s.snr_db is None else f"{s.snr_db:.1f}"
        same = "-" if s.same is None else f"{s.same:.2%}"
        lost = f"{'+' if s.lost >= 0 else ''}{say(s.lost)}"
        lines.append(f"{s.name:24} {say(s.quality):>9} {lost:>8} {say(s.noise):>10} {same:>8} {snr:>8}")
    lines.append("")
    if d.guilty is None:
        return "\n".join([*lines, "no stage loses more than chance: nothing is to be mended"])
    if d.first is None:
        lines.append(f"no stage by itself loses more than chance, all together do; {d.worst} loses most")
    else:
        lines.append(f"first stage that loses more than chance: {d.first}")
    alone = "of noise, alone" if d.kind == "PSNR" else "nats, alone"
    unit = "of its information lost" if d.guilty == "pruned" else alone
    lines += [f"  {b.layer}: {b.cost:.3g} {unit}" for b in d.blamed]
    lines.append(f"try: {d.fix}")
    lines += [f"  {d.command}"] if d.command else []
    return "\n".join(lines)

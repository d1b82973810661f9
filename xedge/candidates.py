"""Never slower: the forms in which a target may run the compressed model, and which of them is shipped.

An int8 model can be slower than the float one: borders that convert, widths without an integer kernel. So where a
device is given, the forms are timed there in interleaved pairs, and the fastest that holds the accuracy floor is
shipped. A form counts as faster where the interval of the ratio says so, else the plan's own stays.

    forms     the plan's artefact, and the others, built beside it
    decide    accuracy on held-back data, times on the device, who lost and why
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import ModelProto

from xedge import precision
from xedge.audit import audit_one
from xedge.data import at_once, batches
from xedge.device import describe, open_device
from xedge.errors import UnsupportedGraph
from xedge.export import write_flavour
from xedge.judge import Judge
from xedge.load import load_target
from xedge.measure import STANDARD, compare
from xedge.measurement import Comparison, to_json
from xedge.onnx_graph import Graph
from xedge.pack import pack
from xedge.quantize import ScaleTable
from xedge.report import Candidate, Choice
from xedge.run import Run, read_json
from xedge.target import Flavour, Target
from xedge.train import predict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from xedge.progress import Talk
    from xedge.request import Loaded

PROTOCOL = STANDARD
MIXED = "int8 and float"


@dataclass(frozen=True)
class Form:
    """One artefact of the compressed model, and what it must agree with.

    Attributes:
        name: ``int8`` (the plan's; ``float`` of a target without integers), ``int8 with exceptions`` (layers that the
            audit names stay float), ``int8 and float`` (those that the latency table does), ``float16`` or ``float32``.
        path: of the model file.
        flavour, table: of the quantised torch model that it is compared with.
        kept_float: the exceptions.
    """

    name: str
    path: Path
    flavour: Flavour
    table: ScaleTable
    kept_float: tuple[str, ...] = ()


def ship(
    run: Run, loaded: Loaded, target: Target, table: ScaleTable, planned: Path, floats: Path, original: nn.Module,
    talk: Talk,
) -> tuple[Form, Choice]:  # fmt: skip
    """Write targets/NAME: the plan's form, or where a device can decide the fastest one that holds the floor.

    Args:
        table, planned: the plan, and the ONNX file in the target's flavour written from it.
        floats: the compressed model's float graph.
        original: what accuracy is held against.

    Raises:
        DeviceError: the device is absent or was lost.
    """
    step, address = f"targets/{target.name}", loaded.request.device
    name = "float" if target.flavour == "float" else "int8"
    reason = unmeasured(target, address)
    if reason is not None or address is None:
        path = _compiled(run, step, {"onnx": planned}, target, target.compile)
        choice = Choice(target.name, name, f"{name} as planned, unmeasured: {reason}")
        return Form(name, path, target.flavour, table), choice
    made, left_out = forms(run, loaded, target, name, table, planned, floats, talk)
    for form, why in left_out.items():
        talk.say(f"  {target.name}, {form}: left out: {why}")
    decided = run.step(
        f"candidates/{target.name}.json",
        {
            **{form.name: form.path for form in made}, "device": address, "protocol": PROTOCOL.name,
            "data": loaded.data.name, "drop": loaded.settings.budget.max_drop, "left out": left_out,
        },
        lambda p: p.write_text(json.dumps(decide(loaded, target, made, left_out, address, original, run.folder, talk))),
    )  # fmt: skip
    facts = read_json(decided)["choice"]
    choice = Choice(**{**facts, "candidates": tuple(Candidate(**c) for c in facts["candidates"])})
    best = next(form for form in made if form.name == choice.form)
    folder = run.step(step, {"chosen": best.path}, lambda p: shutil.copytree(best.path.parent, p))
    return replace(best, path=folder / best.path.name), choice


def _compiled(
    run: Run, step: str, inputs: dict[str, Path], target: Target, compile_: Callable[[Path, Path, str], Path]
) -> Path:
    """The model file of an artefact folder, made from the one input."""
    (source,) = inputs.values()

    def make(folder: Path) -> None:
        folder.mkdir()
        pack(compile_(source, folder, "model"))

    folder = run.step(step, {**inputs, "target": target.name}, make)
    return next(p for p in sorted(folder.iterdir()) if p.suffix == target.suffix)


def unmeasured(target: Target, address: str | None) -> str | None:
    """Why no device can decide between a target's forms; None where one can."""
    if address is None:
        return "no --device was given"
    device = describe(address)
    if target.flavour == "tensorrt" and device.trtexec is None:
        return f"{device.name} names no trtexec, which times TensorRT's engines"
    if target.flavour == "float":
        return "the target has no other form"
    if device.kind != "real":
        return f"{device.name} is {device.kind}, and its times decide nothing"
    if device.address == "browser":
        return "a browser is timed by xedge bench"
    if device.target is not None and load_target(device.target).name != target.name:
        return f"{device.name} is for {device.target}"
    return None


# -- forms -----------------------------------------------------------------------------------------------------------


def forms(
    run: Run, loaded: Loaded, target: Target, name: str, table: ScaleTable, planned: Path, floats: Path, talk: Talk
) -> tuple[list[Form], dict[str, str]]:
    """The plan's form, then the others, each a sealed step of the run under candidates/; and why others cannot be."""

    def made(form: str, source: Path, compile_: Callable[[Path, Path, str], Path]) -> Path:
        step = f"candidates/{target.name}-{form.replace(' ', '-')}"
        return _compiled(run, step, {"onnx": source}, target, compile_)

    found = [Form(name, made(name, planned, target.compile), target.flavour, table)]
    left_out: dict[str, str] = {}
    mixed: dict[str, Any] | None = None
    try:
        mixed = by_latency(run, loaded, target, table, planned, floats, talk)
    except UnsupportedGraph as e:
        left_out[MIXED] = _why(e)
    if mixed is not None and 0 < len(mixed["layers"]) < len(table.weights):
        plain = precision.partly(table, mixed)
        source = run.step(
            f"candidates/{target.name}-precision.onnx",
            {"floats": floats, "plan": planned, "float": mixed},
            lambda p: onnx.save(write_flavour(onnx.load(floats), plain, target.flavour), p),
        )
        kept = tuple(mixed["layers"])
        found.append(Form(MIXED, made(MIXED, source, target.compile), target.flavour, plain, kept))
    names = exceptions(planned, table)
    if names:
        partly = without(table, onnx.load(floats), names)
        source = run.step(
            f"candidates/{target.name}-exceptions.onnx",
            {"floats": floats, "plan": planned, "float": names},
            lambda p: onnx.save(write_flavour(onnx.load(floats), partly, target.flavour), p),
        )
        form = "int8 with exceptions"
        found.append(Form(form, made(form, source, target.compile), target.flavour, partly, names))
    if target.half is not None:
        try:
            found.append(Form("float16", made("float16", floats, target.half), "float", table))
        except UnsupportedGraph as e:
            left_out["float16"] = _why(e)
    found.append(Form("float32", made("float32", floats, target.compile), "float", table))
    return found, left_out


def _why(error: UnsupportedGraph) -> str:
    """What is wrong and where; how to mend it is of no use in a table of forms."""
    return ": ".join(filter(None, (error.where, error.what)))


def by_latency(
    run: Run, loaded: Loaded, target: Target, table: ScaleTable, planned: Path, floats: Path, talk: Talk
) -> dict[str, Any] | None:
    """`precision.choose_floats` under a latency budget, sealed; None without one or for a runtime that it cannot time.

    Raises:
        UnsupportedGraph: a layer that it cannot time.
    """
    address = loaded.request.device
    if loaded.settings.budget.latency is None or address is None or target.flavour not in ("litert", "onnxruntime"):
        return None
    path = run.step(
        f"candidates/{target.name}-precision.json",
        {"floats": floats, "plan": planned, "device": address, "target": target.name},
        lambda p: p.write_text(
            json.dumps(precision.choose_floats(onnx.load(floats), table, address, target, talk.say), sort_keys=True)
        ),
    )
    return dict(read_json(path))


def precision_notes(folder: Path, choices: Sequence[Choice]) -> list[str]:
    """Of the targets that ship `MIXED`: what stays float there and why."""
    found = (c.target for c in choices if c.form == MIXED)
    return [line for t in found for line in precision.words(read_json(folder / f"candidates/{t}-precision.json"))]


def exceptions(flavoured: Path, table: ScaleTable) -> tuple[str, ...]:
    """Layers that the audit of a Q/DQ graph calls not integer, or at risk; none where no other would be left."""
    layers = {w.layer for w in table.weights.values()}
    named = {a.name for a in audit_one(flavoured).layers if a.risks or not a.integer} & layers
    return tuple(sorted(named)) if named < layers else ()


def without(table: ScaleTable, proto: ModelProto, layers: Sequence[str]) -> ScaleTable:
    """The table with these layers left float, weights and results, as --keep-float leaves them."""
    graph = Graph(proto)
    weights = {name: w for name, w in table.weights.items() if w.layer not in layers}
    written = {graph.written(n) for n in graph.weighted() if n.input[1] in table.weights and n.input[1] not in weights}
    activations = {name: r for name, r in table.activations.items() if name not in written}
    return replace(table, weights=weights, activations=activations)


# -- decision --------------------------------------------------------------------------------------------------------


def decide(
    loaded: Loaded, target: Target, made: Sequence[Form], left_out: Mapping[str, str], address: str,
    original: nn.Module, folder: Path, talk: Talk,
) -> dict[str, Any]:  # fmt: skip
    """The fastest form that holds the floor: the choice, and the comparisons that it rests on.

    Accuracy is on the data held back for choosing, by the artefacts themselves on this host. Of the forms that hold
    the floor the first, which is the plan's if it can be, is compared with the next, and the faster goes on.
    """
    data, drop, judge = loaded.data, loaded.settings.budget.max_drop, Judge.of(loaded.data)
    limit = judge.held(len(data.select))
    base, truth = predict(original, data.select, limit=limit)
    floor = None if drop is None else judge.quality(base, truth, base) - drop
    good: dict[str, float] = {}
    for form in made:
        talk.say(f"  {target.name}, {form.name}: {limit} held-back images")
        run = target.load(form.path, torch.get_num_threads())
        parts = [run(x.numpy()).reshape(len(x), -1) for x, _ in batches(data.select, at_once(data.select), limit=limit)]
        good[form.name] = judge.quality(torch.from_numpy(np.concatenate(parts)), truth, base)
    hold = [form for form in made if floor is None or good[form.name] >= floor - 1e-12]
    words = {
        form.name: f"rejected: below the floor of {judge.say(floor)}"
        for form in made
        if floor is not None and form not in hold
    }
    best, timed = (hold or made)[0], []
    with open_device(address, say=lambda line: talk.say(f"  {line}")) as device:
        for rival in hold[1:]:
            talk.say(f"  timing {target.name} on {device.name}: {best.name} and {rival.name}, interleaved")
            found = compare(device, best.path, rival.path, PROTOCOL)
            timed.append(to_json(found))
            slower, said = lost(found, best.name, rival.name, device.name)
            words[slower] = said
            best = rival if slower == best.name else best
    plans = made[0].name
    if not hold:
        why = f"{plans} as planned: no form holds the floor"
    elif best.name == plans:
        why = f"{plans} as planned: no form that holds the floor is faster on {address}"
    else:
        why = f"{best.name} in place of {plans}: the fastest on {address} that holds the floor"
    words[best.name] = "shipped"
    if best.kept_float:
        words[best.name] += f"; float are {', '.join(best.kept_float)}"
    ordered = sorted(made, key=lambda form: form != best)
    rows = tuple(
        Candidate(
            f.name, str(f.path.relative_to(folder)), f.path.stat().st_size, judge.say(good[f.name]), words[f.name]
        )
        for f in ordered
    )
    absent = tuple(Candidate(form, None, None, None, f"left out: {reason}") for form, reason in left_out.items())
    choice = Choice(target.name, best.name, why, address, rows + absent)
    return {"choice": asdict(choice), "comparisons": timed}


def lost(found: Comparison, incumbent: str, rival: str, device: str) -> tuple[str, str]:
    """The form that a comparison (a the incumbent, b the rival) rejects, and the words for it."""
    ratio = found.ratio
    if found.finding == "faster":
        more = (ratio.median - 1, ratio.lower - 1, ratio.upper - 1)
        return incumbent, f"rejected: {_percent(more)} slower than {rival} on {device}"
    if found.finding == "slower":
        more = (1 / ratio.median - 1, 1 / ratio.upper - 1, 1 / ratio.lower - 1)
        return rival, f"rejected: {_percent(more)} slower than {incumbent} on {device}"
    reason = f"; {found.verdict}: {found.reason}" if found.verdict != "ok" else ""
    between = f"{ratio.median:.3f} [{ratio.lower:.3f}, {ratio.upper:.3f}]"
    return rival, f"rejected: not measurably faster than {incumbent} on {device}, ratio {between}{reason}"


def _percent(more: tuple[float, float, float]) -> str:
    middle, low, high = (100 * m for m in more)
    return f"{middle:.3g} % [{low:.3g}, {high:.3g}]"

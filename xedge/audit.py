"""Executed-precision audit: per layer what was planned, what the artefact asks for, what the board ran, and why not
in integers.

    audit_graphs        ONNX graph -> layers
    audit_flatbuffer    .tflite -> layers
    audit_parsers       trtexec --exportLayerInfo, benchmark_model's log and CSV
    audit               joins them, counts, prints
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xedge.audit_flatbuffer import read_tflite
from xedge.audit_graphs import Layer, Reading, is_integer, read_onnx
from xedge.audit_parsers import EngineInfo, EngineLayer, RunLog, parse_layer_info, parse_profile, read_text
from xedge.errors import UnsupportedGraph, UsageError, resume

if TYPE_CHECKING:
    from xedge.quantize import ScaleTable

READERS: dict[str, Callable[[Path], Reading]] = {".onnx": read_onnx, ".tflite": read_tflite}


@dataclass(frozen=True)
class Audit:
    """One artefact, audited.

    Attributes:
        artefact: its path.
        target: the run's target, where it lies in a run.
        flavour: its Q/DQ dialect.
        evidence: what `executed` rests on; "the graph alone" where no board's word was given.
        layers: in order.
        integer_share: of the multiply-adds, by what ran, else by what is asked for.
        operators: in the artefact.
        delegated: of the operators, by LiteRT's log: "539 of 548 by TfLiteXNNPackDelegate in 19 partitions".
        islands: float operators between integer ones.
        notes: what could not be known.
    """

    artefact: str
    target: str | None
    flavour: str
    evidence: str
    layers: tuple[Layer, ...]
    integer_share: float
    operators: int
    delegated: str | None = None
    islands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON, without the names that only serve to join."""
        facts = asdict(self)
        for row, layer in zip(facts["layers"], self.layers, strict=True):
            del row["aliases"], row["index"]
            row["precision"], row["integer"] = layer.precision, layer.integer
        return facts


def audit(path: Path, layer_info: Path | None = None, profile: Path | None = None) -> list[Audit]:
    """Audit an artefact, a target's folder, or every artefact of a run.

    Args:
        path: .onnx, .tflite, a folder with one of them, or a run.
        layer_info: trtexec's --exportLayerInfo, of an engine built from this .onnx.
        profile: benchmark_model's log or CSV, of this .tflite.

    Raises:
        UsageError: something is missing, damaged, or of another model.
    """
    artefacts = _artefacts(path)
    for given, suffix, flag in ((layer_info, ".onnx", "--layer-info"), (profile, ".tflite", "--profile")):
        fitting = [a for a in artefacts if a.suffix == suffix]
        if given is not None and len(fitting) != 1:
            what = f"{len(fitting)} {suffix} files" if fitting else f"no {suffix}"
            raise UsageError(f"{flag} belongs to one {suffix}, and here are {what}", where=str(path), fix="name it")
    return [
        audit_one(a, layer_info if a.suffix == ".onnx" else None, profile if a.suffix == ".tflite" else None)
        for a in artefacts
    ]


def _artefacts(path: Path) -> list[Path]:
    fix = "give a .onnx, a .tflite, a target's folder or a run"
    if not path.exists():
        raise UsageError("there is no such file or folder", where=str(path), fix=fix)
    if path.is_file():
        if path.suffix not in READERS:
            raise UsageError(f"{path.suffix or 'a file without a suffix'} cannot be audited", where=str(path), fix=fix)
        return [path]
    is_run = (path / "run.json").is_file()
    folders = sorted(p for p in (path / "targets").glob("*") if p.is_dir()) if is_run else [path]
    found = [f for folder in folders for f in sorted(folder.iterdir()) if f.suffix in READERS]
    if not found:
        what = "the run has no artefact yet" if is_run else "the folder holds no .onnx and no .tflite"
        raise UsageError(what, where=str(path), fix=f"go on: {resume(path)}" if is_run else fix)
    return found


def audit_one(path: Path, layer_info: Path | None = None, profile: Path | None = None) -> Audit:
    """Audit one file; see `audit`."""
    reading = READERS[path.suffix](path)
    layers, notes = list(reading.layers), list(reading.notes)
    folder = path.resolve().parent
    run = folder.parent.parent if folder.parent.name == "targets" else None
    inside = run is not None and (run / "run.json").is_file()
    if run is not None and inside:
        layers = _planned(layers, run, reading, notes)
    evidence, delegated = "the graph alone", None
    if layer_info is not None:
        wants = "the JSON of trtexec --exportLayerInfo"
        info = parse_layer_info(read_text(layer_info, wants, "let trtexec write it"), str(layer_info))
        layers = join_engine(reading, layers, info, str(layer_info))
        evidence = f"trtexec's layer information ({info.form})"
        if reading.flavour in ("litert", "onnxruntime"):
            notes.append(f"the graph is of the {reading.flavour} flavour, which TensorRT refuses: zero-points but 0")
    if profile is not None:
        wants = "benchmark_model's log or CSV"
        log = parse_profile(read_text(profile, wants, "run benchmark_model again"), str(profile))
        layers, delegated = join_litert(reading, layers, log, str(profile), notes)
        evidence = "benchmark_model's output"
    total = sum(layer.macs for layer in layers)
    integer = sum(layer.macs for layer in layers if layer.integer)
    if any(layer.executed == "unknown" for layer in layers):
        notes.append("layers whose precision the board does not tell count as not integer")
    return Audit(
        artefact=str(path),
        target=folder.name if inside else None,
        flavour=reading.flavour,
        evidence=evidence,
        layers=tuple(layers),
        integer_share=integer / total if total else 0.0,
        operators=reading.operators,
        delegated=delegated,
        islands=reading.islands,
        notes=tuple(notes),
    )


def require_integer(audits: Iterable[Audit], share: float) -> None:
    """Refuse artefacts that compute less than `share` of their multiply-adds in integers.

    Raises:
        UnsupportedGraph: one line that names the artefact and its costliest layer that is not integer.
    """
    for a in audits:
        if a.integer_share >= share:
            continue
        worst = max((layer for layer in a.layers if not layer.integer), key=lambda layer: layer.macs)
        raise UnsupportedGraph(
            f"{a.integer_share:.1%} of the MACs are in integers, less than --require-integer {share:.1%}; "
            f"the costliest other layer is {worst.name} ({worst.precision}: {_because(worst) or 'reason unknown'})",
            where=a.artefact,
        )


# -- planned bits ----------------------------------------------------------------------------------------------------


def _planned(layers: list[Layer], run: Path, reading: Reading, notes: list[str]) -> list[Layer]:
    """Mean planned bits by layer, from the run's scale table."""
    from xedge.quantize import ScaleTable

    file = run / "scales.safetensors"
    if not file.is_file():
        notes.append("the run has no scales.safetensors: planned bits are unknown")
        return layers
    table = ScaleTable.load(file)
    bits = {w.layer: float(w.planned.mean()) for w in table.weights.values()}
    if reading.kind == "onnx":
        return [replace(layer, planned_bits=bits.get(layer.name)) for layer in layers]
    modules = _modules(run, table)
    named = []
    for layer in layers:
        module = next((modules[a] for a in layer.aliases if a in modules), None)
        named.append(layer if module is None else replace(layer, name=module, planned_bits=bits[module]))
    return named


def _modules(run: Path, table: ScaleTable) -> dict[str, str]:
    """Tensor that a layer writes -> module, so that a .tflite's operators get their layers' names."""
    found: dict[str, str] = {}
    layers = {w.layer for w in table.weights.values()}
    for graph in sorted(run.glob("model.*.onnx")):
        for layer in read_onnx(graph).layers:
            if layer.name in layers:
                found.update(dict.fromkeys(layer.aliases, layer.name))
    return found


# -- TensorRT --------------------------------------------------------------------------------------------------------


def join_engine(reading: Reading, layers: Sequence[Layer], info: EngineInfo, where: str) -> list[Layer]:
    """Give each layer the precision of the kernel that it ended in.

    Raises:
        UsageError: the engine was built from another graph.
    """
    by_part: dict[str, list[EngineLayer]] = {}
    for kernel in info.layers:
        if not kernel.moves:
            for part in kernel.parts | kernel.outputs:
                by_part.setdefault(part, []).append(kernel)
    place = {name: i for i, name in enumerate(reading.order) if name}
    spans = [(k, place.get(k.span[0]), place.get(k.span[1])) for k in info.layers if k.span is not None]
    joined, found = [], 0
    for layer in layers:
        own = _kernels(layer, by_part)
        if not own:
            at = next((place[a] for a in layer.aliases if a in place), None)
            own = [k for k, a, b in spans if at is not None and (a is None or a <= at) and (b is None or at <= b)]
        found += bool(own)
        joined.append(_executed(layer, own))
    if not found:
        raise UsageError(
            "names none of the artefact's layers, so its engine was built from another graph",
            where=where,
            fix="build the engine from this .onnx",
        )
    return joined


def _kernels(layer: Layer, by_part: dict[str, list[EngineLayer]]) -> list[EngineLayer]:
    """The kernels that hold a layer; those that can hold a convolution first."""
    own = list({id(k): k for alias in sorted(layer.aliases) for k in by_part.get(alias, [])}.values())
    return [k for k in own if k.weighted] or own


def _executed(layer: Layer, kernels: Sequence[EngineLayer]) -> Layer:
    if not kernels:
        return replace(layer, executed="unknown", why=("the engine does not name it",), risks=())
    if any(k.span is not None for k in kernels):
        hidden = ("it is inside a foreign node, whose inside the engine does not describe",)
        return replace(layer, executed="unknown", kernel=kernels[0].name, why=hidden, risks=())
    precisions = sorted({k.precision for k in kernels})
    executed = precisions[0] if len(precisions) == 1 else " and ".join(precisions)
    why: tuple[str, ...] = ()
    if not is_integer(executed):
        # What the graph does not ask for cannot run; what it asks for was refused, most likely for its widths.
        why = layer.why or layer.risks or ("TensorRT found another kernel faster; the graph shows no reason",)
    return replace(layer, executed=executed, kernel=kernels[0].name, why=why, risks=())


# -- LiteRT ----------------------------------------------------------------------------------------------------------

_COMPUTE = ("Convolution", "Deconvolution", "Fully Connected", "Batch Matrix Multiply")
_OWN = "LiteRT's own kernel"
_MARKS = (
    ("QD8", "int8 dynamic"), ("QS8", "int8"), ("QU8", "int8"), ("QC8", "int8"), ("QC4", "int4"), ("F16", "float16"),
    ("F32", "float32"),
)  # fmt: skip
"""Marks in the names of XNNPACK's kernels: ``Convolution (NHWC, QC8) IGEMM``."""


def join_litert(
    reading: Reading, layers: Sequence[Layer], log: RunLog, where: str, notes: list[str]
) -> tuple[list[Layer], str | None]:
    """Give each layer what ran it: a delegate, or LiteRT's own kernel where the delegate refused it.

    Raises:
        UsageError: the log is of another model.
    """
    _same_model(reading, layers, log, where)
    if not log.delegations:
        notes.append("no delegate took any operator")
        return [replace(layer, executed=layer.asked, kernel=_OWN) for layer in layers], None
    first = log.delegations[0]
    own = [row for row in log.rows if row.kind.isupper()]
    indices, names = {row.index for row in own if row.index is not None}, {row.name for row in own}
    refused = {layer.index for layer in layers if layer.index in indices or layer.aliases & names}
    taken = [layer for layer in layers if layer.index not in refused]
    inner = [label for row in log.rows if any(w in (label := f"{row.kind} {row.name}") for w in _COMPUTE)]
    # The delegate's kernels carry no names of operators: only their order tells, and only where none is missing.
    kernels = dict(zip((layer.index for layer in taken), inner, strict=True)) if len(inner) == len(taken) else {}
    joined = []
    for layer in layers:
        executed, kernel, why = layer.asked, first.delegate, layer.why
        if layer.index in refused:
            kernel, why = _OWN, (*why, f"{first.delegate} refused it")
        elif "gpu" in first.delegate.lower():
            executed, why = "float16 or float32", ("the GPU delegate computes in floating point",)
        elif layer.index in kernels:
            marks = [precision for mark, precision in _MARKS if mark in kernels[layer.index]]
            executed = marks[0] if marks else "unknown"
            executed = layer.asked if (executed, layer.asked) == ("int8", "int4") else executed
        elif not log.rows and first.nodes != first.total:
            kernel = f"{first.delegate} or {_OWN}"
        joined.append(replace(layer, executed=executed, kernel=kernel, why=why))
    if not log.rows and first.nodes != first.total:
        notes.append("the log does not say which operators were refused: add --enable_op_profiling=true")
    total = "" if first.total is None else f" of {first.total}"
    return joined, f"{first.nodes}{total} operators by {first.delegate} in {first.partitions} partitions"


def _same_model(reading: Reading, layers: Sequence[Layer], log: RunLog, where: str) -> None:
    """Operators are counted, and those that the profile numbers must be what it says."""
    fix = "run benchmark_model on this .tflite"
    for d in log.delegations[:1]:
        if d.total is not None and d.total != reading.operators:
            what = f"is of a model with {d.total} operators; this one has {reading.operators}"
            raise UsageError(what, where=where, fix=fix)
    rows = {row.index: row.kind for row in log.rows if row.index is not None and row.kind.isupper()}
    if rows and max(rows) >= reading.operators:
        raise UsageError(f"names operator {max(rows)}; this model has {reading.operators}", where=where, fix=fix)
    for layer in layers:
        if layer.index in rows and rows[layer.index] != layer.op:
            what = f"says that operator {layer.index} is {rows[layer.index]}; it is {layer.op}"
            raise UsageError(what, where=where, fix=fix)


# -- words -----------------------------------------------------------------------------------------------------------


def _because(layer: Layer) -> str:
    risks = "" if layer.executed is not None or not layer.risks else f"may fall back: {'; '.join(layer.risks)}"
    return "; ".join([*layer.why, *([risks] if risks else [])])


def to_text(a: Audit) -> str:
    """The audit as a table for a terminal."""
    rows = [("layer", "operator", "channels", "MACs", "planned", "asked", "executed", "why")]
    for layer in a.layers:
        rows.append(
            (
                layer.name,
                layer.op,
                f"{layer.inputs} -> {layer.outputs}" + (f" / {layer.groups}" if layer.groups > 1 else ""),
                f"{layer.macs / 1e6:.3f} M",
                "-" if layer.planned_bits is None else f"{layer.planned_bits:.2f}",
                layer.asked,
                layer.executed or "-",
                _because(layer),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        f"{a.artefact}" + (f" (target {a.target})" if a.target else "") + f": {a.flavour} flavour, by {a.evidence}"
    ]
    for row in rows:
        lines.append("  ".join([*(f"{c:{w}}" for c, w in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip())
    integer = sum(layer.integer for layer in a.layers)
    lines.append(f"integer: {a.integer_share:.1%} of the MACs, {integer} of {len(a.layers)} layers")
    if a.delegated:
        lines.append(f"delegated: {a.delegated}")
    lines += [f"island of float: {island}" for island in a.islands]
    lines += [f"note: {note}" for note in a.notes]
    return "\n".join(lines)

"""What a board says it ran: trtexec's --exportLayerInfo and LiteRT's benchmark_model, read strictly.

Anything cut off, of another form or of another tool is refused in one line; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xedge.errors import UsageError

LARGEST = 256 << 20
"""Bytes. Larger files are not what either tool writes."""

_REBUILD = "build again with trtexec --profilingVerbosity=detailed --exportLayerInfo=layers.json"
_RERUN = "run benchmark_model again and keep all that it prints"


def read_text(path: Path, what: str, fix: str) -> str:
    """A text file, whole.

    Raises:
        UsageError: missing, a folder, too large, empty, or not text.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UsageError(f"is too large for {what}", where=str(path), fix=fix)
        text = path.read_bytes().decode("utf-8")
    except OSError as e:
        raise UsageError(f"cannot be read ({e.strerror})", where=str(path), fix=f"give {what}") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"is not text, so not {what}", where=str(path), fix=fix) from e
    if not text.strip():
        raise UsageError(f"is empty, so not {what}", where=str(path), fix=fix)
    return text


# -- TensorRT --------------------------------------------------------------------------------------------------------

_WORDS = (
    ("bfloat16", ("bf16", "bfloat16")),
    ("float16", ("fp16", "half", "float16")),
    ("float8", ("fp8", "float8")),
    ("float4", ("fp4", "float4")),
    ("int8", ("int8", "uint8")),
    ("int4", ("int4",)),
    ("int32", ("int32", "int64")),
    ("bool", ("bool",)),
    ("float32", ("fp32", "tf32", "float")),
)
_TACTIC = re.compile(r"^(?:(?P<int8>[iu]8|s8)|(?P<bfloat16>bf16)|(?P<float16>f16)|(?P<float32>t?f32)|(?P<float8>e4m3))")
_MOVERS = frozenset({"reformat", "noop", "constant", "shuffle", "identity", "signal", "wait", "slice", "shape_call"})
_WEIGHTED = re.compile(r"conv|gemm|matrix|fullyconnected|fusion", re.IGNORECASE)
_FOREIGN = re.compile(r"\{ForeignNode\[(?P<first>.+?)\.\.\.(?P<last>.+?)\]\}")


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine.

    Attributes:
        name: TensorRT's own, with everything that was fused: ``conv1 + relu1``.
        kind: its LayerType.
        parts: the ONNX nodes and tensors in it: from Metadata where there is one, else from the name.
        span: (first, last) ONNX nodes of a foreign node, whose inside the engine does not describe.
        outputs: names of the tensors it writes.
        precision: of its arithmetic: int8, float16, ..., "int8 weights, float16", or "unknown".
    """

    name: str
    kind: str
    parts: frozenset[str]
    span: tuple[str, str] | None
    outputs: frozenset[str]
    precision: str

    @property
    def moves(self) -> bool:
        """Whether it only moves or converts data."""
        return self.kind.lower() in _MOVERS or self.name.startswith("Reformatting CopyNode")

    @property
    def weighted(self) -> bool:
        """Whether it may be where a convolution or matrix product runs."""
        return not self.moves and (bool(_WEIGHTED.search(self.kind)) or self.span is not None)


@dataclass(frozen=True)
class EngineInfo:
    """An engine's layers, in the order in which they run."""

    form: str
    layers: tuple[EngineLayer, ...]


def parse_layer_info(text: str, where: str) -> EngineInfo:
    """Read the JSON of trtexec --exportLayerInfo (IEngineInspector), of TensorRT 8, 10 or 11.

    The forms differ: 8.x names its parts in ``Name`` alone; 8.6 to 10 add ``Metadata`` with ``[ONNX Layer: x]``; up to
    10 a tensor has ``Format/Datatype`` and the engine has ``Bindings``; 11 has ``DataType`` and ``Format``, and
    ``I/O Tensors`` (NVIDIA, Migrating IEngineInspector Usage from TensorRT 10.x to 11.x).

    Raises:
        UsageError: cut off, garbage, names only, or another tool's JSON.
    """
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        place = f" at line {e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UsageError(f"is not whole JSON: it breaks off{place}", where=where, fix=_REBUILD) from e
    if not isinstance(found, dict) or not isinstance(found.get("Layers"), list):
        raise UsageError(
            'has no list "Layers", so trtexec --exportLayerInfo did not write it', where=where, fix=_REBUILD
        )
    rows = found["Layers"]
    if not rows:
        raise UsageError('has no layer in "Layers"', where=where, fix=_REBUILD)
    if all(isinstance(row, str) for row in rows):
        raise UsageError("holds names of layers only, no precisions", where=where, fix=_REBUILD)
    layers = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("Name"), str):
            raise UsageError(f"layer {i} has no name", where=where, fix=_REBUILD)
        layers.append(_engine_layer(row, f"{where}: layer {row['Name']!r}"))
    if "I/O Tensors" in found:
        form = "TensorRT 11"
    else:
        form = "TensorRT 8.6 to 10" if any("Metadata" in row for row in rows) else "TensorRT 8"
    return EngineInfo(form, tuple(layers))


def _engine_layer(row: Mapping[str, Any], where: str) -> EngineLayer:
    name = row["Name"]
    metadata = row.get("Metadata", "")
    if not isinstance(metadata, str):
        raise UsageError("its Metadata is not text", where=where, fix=_REBUILD)
    parts = re.findall(r"\[ONNX Layer: (.+?)\](?=[\x1e\x1f\s\[]|$)", metadata) or _fused(name)
    span = _FOREIGN.search(name)
    inputs, outputs = (_tensors(row, side, where) for side in ("Inputs", "Outputs"))
    return EngineLayer(
        name=name,
        kind=str(row.get("LayerType", "")),
        parts=frozenset(parts),
        span=(span["first"], span["last"]) if span else None,
        outputs=frozenset(n for n, _ in outputs),
        precision=_precision(row, [t for _, t in inputs], [t for _, t in outputs]),
    )


def _fused(name: str) -> list[str]:
    """The parts of ``conv1.weight + conv1 + PWN(relu1) || conv2``."""
    found = []
    for part in re.split(r" \+ | \|\| |, ", name):
        part, wraps = part.strip(), 0
        while part.startswith("PWN("):
            part, wraps = part[4:], wraps + 1
        while wraps and part.endswith(")"):
            part, wraps = part[:-1], wraps - 1
        found.append(part)
    return found


def _tensors(row: Mapping[str, Any], side: str, where: str) -> list[tuple[str, str]]:
    """(name, data type) of each input or output."""
    found = []
    tensors = row.get(side, [])
    if not isinstance(tensors, list) or not all(isinstance(t, dict) for t in tensors):
        raise UsageError(f"its {side} are no list of tensors", where=where, fix=_REBUILD)
    for t in tensors:
        said = t.get("DataType") or t.get("Format/Datatype") or t.get("Format/DataType") or t.get("Format") or ""
        found.append((str(t.get("Name", "")), data_type(str(said))))
    return found


def data_type(said: str) -> str:
    """``Thirty-two wide channel vectorized row major Int8 format``, ``Half``, ``Float(64,1)`` -> a precision."""
    low = said.lower()
    for word, spellings in _WORDS:
        if any(re.search(rf"(?<![a-z]){s}(?![a-z0-9])", low) for s in spellings):
            return word
    return "unknown"


def _precision(row: Mapping[str, Any], inputs: list[str], outputs: list[str]) -> str:
    """Of the arithmetic: the weights' type says it, for the runtime converts them to what the kernel computes in; then
    the kernel's name; then the tensors."""
    source = inputs[0] if inputs else "unknown"
    for key in ("Weights", "ConvWeights"):
        weights = row.get(key)
        if isinstance(weights, dict) and isinstance(weights.get("Type"), str):
            kind = data_type(weights["Type"])
            if kind in ("int8", "int4") and source.startswith(("float", "bfloat")):
                return f"{kind} weights, {source}"  # weight-only: the arithmetic is the activations'
            if kind != "unknown":
                return kind
    for word in str(row.get("TacticName", "")).split("_"):
        match = _TACTIC.match(word)
        if match and match.lastgroup:
            return match.lastgroup
    for kind in (source, *outputs):
        if kind not in ("unknown", "int32", "bool"):
            return kind
    return "unknown"


# -- LiteRT ----------------------------------------------------------------------------------------------------------

_REPLACING = re.compile(
    r"Replacing (?P<done>\d+)(?: out of (?P<of>\d+))? node\(s\) with delegate \((?P<delegate>[^)]+)\) node, "
    r"yielding (?P<parts>\d+) partitions(?: for (?P<place>subgraph \d+|the whole graph))?"
)
_ROW = re.compile(
    r"^\s*(?P<kind>\S.*?)\s+[\d.e+-]+\s+[\d.e+-]+(?:\s+[\d.e+-]+)?\s+[\d.]+%\s+[\d.]+%\s+[\d.e+-]+\s+\d+\s+(?P<name>\S.*)$"
)
_CSV_HEADS = (
    "node type, start, first, avg_ms, %, cdf%, mem KB, times called, name",
    "node type, first, avg_ms, %, cdf%, mem KB, times called, name",
)
_SETUP = ("AllocateTensors", "ModifyGraphWithDelegate")


@dataclass(frozen=True)
class Delegation:
    """One ``Replacing ...`` line: `nodes` of `total` (None where an old runtime does not say) went to a delegate."""

    delegate: str
    nodes: int
    total: int | None
    partitions: int


@dataclass(frozen=True)
class OpRow:
    """One row of the operator profile.

    Attributes:
        kind: ``CONV_2D`` for LiteRT's own kernel, a delegate's name, or a kernel inside it,
            ``Convolution (NHWC, QC8) IGEMM``.
        index: of the node in the graph, where the runtime says it.
        name: the tensors that it writes.
    """

    kind: str
    index: int | None
    name: str


@dataclass(frozen=True)
class RunLog:
    """What benchmark_model printed of where the nodes ran."""

    delegations: tuple[Delegation, ...]
    rows: tuple[OpRow, ...]


def parse_profile(text: str, where: str) -> RunLog:
    """Read benchmark_model's log (also through logcat), or its --profiling_output_csv_file.

    Raises:
        UsageError: cut off, or neither of them.
    """
    lines = [re.sub(r"^.*?\btflite\s*: ?", "", line) for line in text.splitlines()]
    csv = next((i for i, line in enumerate(lines) if line.strip() in _CSV_HEADS), None)
    delegations = tuple(
        Delegation(m["delegate"], int(m["done"]), int(m["of"]) if m["of"] else None, int(m["parts"]))
        for m in (_REPLACING.search(line) for line in lines)
        if m and m["place"] in (None, "subgraph 0", "the whole graph")
    )
    for d in delegations:
        if d.total is not None and d.nodes > d.total:
            raise UsageError(f"says {d.nodes} out of {d.total} nodes were delegated", where=where, fix=_RERUN)
    if csv is not None:
        return RunLog(delegations, _csv_rows(lines, where))
    started = any("benchmark" in line.lower() or "TensorFlow Lite" in line for line in lines)
    if not started and not delegations:
        raise UsageError("is neither benchmark_model's log nor its CSV", where=where, fix=_RERUN)
    if not any(re.search(r"timings in us:.*(?:Inference \(avg\)|no stats): [\d.]+", line) for line in lines):
        raise UsageError("breaks off before benchmark_model's timings", where=where, fix=_RERUN)
    return RunLog(delegations, _table_rows(lines, where))


def _csv_rows(lines: list[str], where: str) -> tuple[OpRow, ...]:
    """The last run-order table: the first one is of the initialisation."""
    head = max(i for i, line in enumerate(lines) if line.strip() in _CSV_HEADS)
    times = lines[head].count(",") - 5  # start is missing in newer ones
    numbers = ", ".join([r"[\d.e+-]+"] * times + [r"[\d.e+-]+%", r"[\d.e+-]+%", r"[\d.e+-]+", r"\d+"])
    rows: list[OpRow] = []
    for number, line in enumerate(lines[head + 1 :], start=head + 2):
        if not line.strip() or line.startswith("="):
            break
        # Commas also stand in the names of a delegate's kernels, "Convolution (NHWC, F32)", and between tensors.
        match = re.match(rf"^(?P<kind>.+?), {numbers}, (?P<name>\S.*)$", line)
        if match is None:
            raise UsageError(f"line {number} of the profile is cut off", where=where, fix=_RERUN)
        rows.append(_op_row(match["kind"], match["name"]))
    if not rows:
        raise UsageError("has no operator in its profile", where=where, fix=_RERUN)
    if not any(line.startswith("Number of nodes executed:") for line in lines[head:]):
        raise UsageError("breaks off before the number of nodes executed", where=where, fix=_RERUN)
    return tuple(row for row in rows if row.kind not in _SETUP)


def _table_rows(lines: list[str], where: str) -> tuple[OpRow, ...]:
    heads = [i for i, line in enumerate(lines) if "= Run Order =" in line]
    if not heads:
        return ()
    rows: list[OpRow] = []
    for line in lines[heads[-1] + 1 :]:
        if not line.strip() or "[node type]" in line.lower():
            if rows:
                break
            continue
        match = _ROW.match(line)
        if match is None:
            raise UsageError("its operator profile is cut off", where=where, fix=_RERUN)
        rows.append(_op_row(match["kind"], match["name"]))
    return tuple(row for row in rows if row.kind not in _SETUP)


def _op_row(kind: str, name: str) -> OpRow:
    match = re.match(r"^\[?(?P<name>.*?)\]?(?::(?P<index>\d+))?$", name.strip())
    assert match is not None  # every part of it may be empty
    return OpRow(kind.strip(), int(match["index"]) if match["index"] else None, match["name"])

"""Put a run's measured facts together into its report."""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from xedge import __version__
from xedge.choose import RANKED
from xedge.command import command
from xedge.data import at_once, batches, enough
from xedge.dca import explained
from xedge.gather import PACKED, indices
from xedge.groups import Groups
from xedge.iterate import Result, information
from xedge.judge import Judge
from xedge.measurement import Comparison, from_json
from xedge.metrics import entropy_bits, macs, parameters, sizes
from xedge.observe import Observed, observe
from xedge.onnx_graph import WEIGHTED, Graph
from xedge.plan import STEM_KEEP
from xedge.quantize import ScaleTable
from xedge.report import Iteration, Latency, Layer, Report, Row, Subspace
from xedge.run import digest_file, read_json
from xedge.target import Artifact

if TYPE_CHECKING:
    from xedge.request import Loaded

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def assemble(
    folder: Path,
    loaded: Loaded,
    original: nn.Module,
    result: Result,
    table: ScaleTable,
    verified: dict[str, Any],
    timed: Path | None,
    models: dict[str, Path],
    originals: dict[str, Path],
) -> Report:
    """The report of a finished run."""
    data, request, judge = loaded.data, loaded.request, Judge.of(loaded.data)
    shape = data.shape
    before, after = macs(original, shape), macs(result.model, shape)
    latencies = {} if timed is None else {t: from_json(v) for t, v in read_json(timed).items()}
    rows: list[Row] = []
    packed: dict[Path, dict[str, int]] = {}
    notes = [*data.notes]
    for target in loaded.targets:
        comparison = latencies.get(target.name)
        base, got = verified["original"], verified["targets"][target.name]
        for name, facts, count, params, path in (
            ("original", base, before.total, parameters(original), originals[target.suffix]),
            ("compressed", got, after.total, parameters(result.model), models[target.name]),
        ):
            size = packed[path] = packed.get(path) or sizes(path)  # Brotli takes seconds a megabyte
            compressed = name == "compressed"
            rows.append(
                Row(
                    name="compressed" if compressed else "original",
                    target=target.name,
                    top1=facts.get("top1"),
                    agreement=facts.get("agreement") if compressed else None,
                    psnr=facts.get("psnr"),
                    macs=count,
                    parameters=params,
                    bytes=size["raw"],
                    bytes_zstd=size["zstd"],
                    bytes_brotli=size["brotli"],
                    latency=latency_of(comparison, compressed),
                    snr_db=got["snr_db"] if compressed else None,
                    verified_agreement=got["verified_agreement"] if compressed else None,
                    entropy_bits=entropy_bits(_stored(path, table)) if compressed else None,
                    executed_bits=_executed_mean(path, table) if compressed else 32.0,
                )
            )
        if comparison is not None and target.flavour == "tensorrt":
            notes.append(
                f"{target.name}: the latency is this host's, of the same graph in ONNX Runtime; "
                "build and time the engine on the board"
            )
        if isinstance(comparison, Comparison) and comparison.reason:
            notes.append(f"{target.name}: timing: {comparison.reason}")
        if got["unmatched"]:
            notes.append(f"{target.name}: {len(got['unmatched'])} tensors are rounded in the artefact only")
    floats = [n for n in before.layers if n not in table.bits_of() and request.keep_float is not None]
    if floats:
        notes.append(f"kept float, and in no mean of bits: {', '.join(floats)}")
    if timed is not None:
        notes.append("latency by the quick protocol, a first look; `xedge bench` gives the standard one")
    if loaded.trained_here:
        notes.append(f"{request.model} had no --weights and was trained by xedge on {data.name}")
    notes.append(
        f"{'PSNR of Y' if judge.restores else 'accuracy'} on {verified['images']} validation "
        f"{'tiles taken as one picture' if judge.restores else 'images'}, read for this report alone; "
        f"float after pruning: " + _quality(verified["float"])
    )
    if request.latency is not None:
        notes.append(
            f"latency budget {request.latency:g} ms on {request.timed_on}; the original: {result.records[0]['spent']}"
        )
        rows_of = (f"iteration {r['index']}: {r['predicted']} predicted, {r['spent']}" for r in result.records[1:])
        notes += rows_of
    if "plain" in verified:
        what = "plain bicubic enlarging gives" if data.scale != 1 else "the input itself has"
        better = verified["original"]["psnr"] > verified["plain"]["psnr"]
        notes.append(f"{what} {verified['plain']['psnr']:.2f} dB" + ("" if better else ": the original is no better"))
    prices = [r["price"] for r in result.records if r.get("price")]
    price = None
    if prices and result.chosen:
        last = prices[min(result.chosen, len(prices)) - 1]
        price = (
            f"in the last round widths in multiples of {last['align']} give up {last['aligned']:.2%} of the remaining "
            f"importance; free widths would give up {last['free']:.2%}"
        )
    certificates = [r["certificate"] for r in result.records if r.get("certificate")]
    images = batches(data.train, at_once(data.train), shuffle_seed=request.seed, limit=enough(data.train, RANKED))
    seen = observe(original, result.groups, images, loaded.teacher, gradients=False)
    put_back = [row for r in result.records for row in r["put_back"]]
    notes += [f"{g.name}, the stem, keeps at least {STEM_KEEP:.0%}: --prune-stem" for g in result.groups.free if g.stem]
    notes += [f"{name} was put back whole: {why}" for name, why in put_back]
    return Report(
        xedge=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        request=request.to_json(),
        model=request.model,
        data=f"{data.name}: {len(data.train)} to train, {len(data.select)} to choose, {len(data.val)} to report",
        teacher=loaded.teacher.words,
        environment=environment(),
        rows=tuple(rows),
        layers=tuple(_layers(seen, original, result, table, before.layers, after.layers, models)),
        iterations=tuple(
            Iteration(
                index=r["index"],
                macs=r["macs"],
                macs_fraction=r["macs"] / before.total,
                select_top1=r["quality"] if judge.kind == "top-1" else None,
                select_psnr=r["quality"] if judge.restores else None,
                select_agreement=r["agreement"],
                di_total=sum(v[1] for v in r["di"].values()) if r["di"] else None,
                seconds=r["seconds"],
                allocation=r["allocation"] + ", folded in sequence" * bool(r.get("sequential")),
            )
            for r in result.records
        ),
        stopped_by=f"{result.stopped_by}: {result.reason}",
        price_of_alignment=price,
        certificate=certificates[min(result.chosen, len(certificates)) - 1] if certificates and result.chosen else {},
        artifacts=tuple(_artifact(folder, t.name, models[t.name]) for t in loaded.targets),
        notes=tuple(notes),
        planned_bits_mean=table.mean_bits(),
        coding=table.coding,
        commands=(
            ("repeat this run", command(loaded)),
            ("time it by the standard protocol", shlex.join(["xedge", "bench", str(folder)])),
        ),
        subspaces=tuple(_subspaces(seen, result.groups)),
    )


def _quality(row: dict[str, Any]) -> str:
    if "psnr" in row:
        return f"{row['psnr']:.2f} dB"
    return f"{row['top1']:.2%} top-1" if "top1" in row else f"{row['agreement']:.2%} agreement with the original"


def latency_of(comparison: Any, compressed: bool) -> Latency | None:
    """One side of an interleaved comparison, as a report's row shows it."""
    if not isinstance(comparison, Comparison):
        return None
    m = comparison.b if compressed else comparison.a
    interval, ratio = m.interval, comparison.ratio
    return Latency(
        median_ms=interval.median,
        lower_ms=interval.lower,
        upper_ms=interval.upper,
        runtime=f"{m.runtime} {m.runtime_version}, {m.threads} thread{'s' if m.threads > 1 else ''}",
        device=m.device,
        device_kind=m.device_kind,
        processes=len(m.processes),
        # An unstable comparison claims no speed-up.
        ratio=(ratio.median, ratio.lower, ratio.upper) if compressed and comparison.verdict == "ok" else None,
        agreement=m.agreement,
    )


def _artifact(folder: Path, target: str, path: Path) -> Artifact:
    inputs: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, tuple[int, ...]] = {}
    if path.suffix == ".onnx":
        graph = Graph(onnx.load(path))
        inputs = {n: graph.shapes[n] for n in graph.inputs}
        outputs = {n: graph.shapes[n] for n in graph.outputs}
    else:
        from ai_edge_litert.interpreter import Interpreter

        one = Interpreter(model_path=str(path))
        inputs = {d["name"]: tuple(int(v) for v in d["shape"]) for d in one.get_input_details()}
        outputs = {d["name"]: tuple(int(v) for v in d["shape"]) for d in one.get_output_details()}
    return Artifact(
        path=str(path.relative_to(folder)),
        kind=path.suffix[1:],
        target=target,
        sha256=digest_file(path),
        bytes=path.stat().st_size,
        inputs=inputs,
        outputs=outputs,
    )


def _subspaces(seen: Observed, groups: Groups) -> Iterator[Subspace]:
    for name, curve in explained(seen, groups).items():
        share = curve / (curve[-1] or 1.0)
        enough = int(np.searchsorted(share, 0.99)) + 1
        shown = tuple(round(float(v), 4) for v in share[:enough])
        yield Subspace(name, groups[name].size, float(curve[-1]), shown)


def _layers(
    seen: Observed,
    original: nn.Module,
    result: Result,
    table: ScaleTable,
    before: dict[str, int],
    after: dict[str, int],
    models: dict[str, Path],
) -> list[Layer]:
    """One row a convolution or linear layer, in the order of execution."""
    whole, kept = information(seen, result.groups), information(seen, result.groups, result.keep)
    share = {}
    for g in result.groups.free:
        for layer in g.producers:
            if whole.get(g.name):
                share[layer] = min(1.0, max(0.0, kept[g.name] / whole[g.name]))
    frozen = dict(result.groups.frozen)
    bits = {w.layer: np.rint(w.planned).astype(int).tolist() for w in table.weights.values()}
    means = {w.layer: float(w.planned.mean()) for w in table.weights.values()}
    old, new = dict(original.named_modules()), dict(result.model.named_modules())
    executed = {target: _executed(path, table) for target, path in models.items()}
    rows = []
    for name in before:
        m, s = old[name], new[name]
        if not isinstance(m, LAYERS):
            continue
        widths = bits.get(name, [])
        rows.append(
            Layer(
                name=name,
                kind=_kind(m),
                out_before=_channels(m)[1],
                out_after=_channels(s)[1],
                in_before=_channels(m)[0],
                in_after=_channels(s)[0],
                macs_before=before[name],
                macs_after=after.get(name, 0),
                bits_mean=means.get(name),
                bits_histogram=dict(sorted(Counter(widths).items())),
                executed_bits={t: e[name] for t, e in executed.items() if name in e},
                di_kept=share.get(name),
                frozen=frozen.get(name),
            )
        )
    return rows


def _executed(path: Path, table: ScaleTable) -> dict[str, int]:
    """Bits of the arithmetic that the artefact's kernels are given, by layer.

    In ONNX the DequantizeLinear of its input and of its weight say so. A .tflite has no names of layers: all are named
    when every weighted operator in it is int8, none otherwise. Weights of 4 bits are multiplied as int8.
    """
    if path.suffix == ".onnx":
        nodes = Graph(onnx.load(path)).nodes
        integer = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear"}
        run = {n.input[1] for n in nodes if n.op_type in WEIGHTED and set(n.input[:2]) <= integer}
        return {w.layer: 8 for name, w in table.weights.items() if f"{name}_dq" in run}
    int8 = {values.dtype == np.int8 for values in _tflite_weights(path)}
    return dict.fromkeys(table.bits_of(), 8) if int8 == {True} else {}


def _executed_mean(path: Path, table: ScaleTable) -> float | None:
    """Width of the arithmetic, mean over the weights; None of an artefact without integers: the board decides."""
    executed = _executed(path, table)
    if not executed:
        return None
    counts = {w.layer: w.values.size for w in table.weights.values()}
    return sum(n * executed.get(layer, 32) for layer, n in counts.items()) / sum(counts.values())


def _stored(path: Path, table: ScaleTable) -> list[NDArray[Any]]:
    """The integer weights of an artefact as it lies, or their indices into codebooks, one array a layer; empty where
    they are float."""
    if path.suffix == ".onnx":
        graph = Graph(onnx.load(path))
        plain = [graph.array(f"{name}_q") for name in table.weights if graph.is_constant(f"{name}_q")]
        return [*plain, *(indices(graph, name) for name in table.weights if graph.is_constant(f"{name}{PACKED}"))]
    return [values for values in _tflite_weights(path) if values.dtype == np.int8]


def _tflite_weights(path: Path) -> list[NDArray[Any]]:
    """What the weighted operators of a .tflite multiply with, each tensor once, as it is stored; 4-bit weights as
    int8."""
    from ai_edge_litert import schema_py_generated as tfl

    model = tfl.ModelT.InitFromObj(tfl.Model.GetRootAs(path.read_bytes()))
    weighted = {
        tfl.BuiltinOperator.CONV_2D,
        tfl.BuiltinOperator.DEPTHWISE_CONV_2D,
        tfl.BuiltinOperator.FULLY_CONNECTED,
        tfl.BuiltinOperator.TRANSPOSE_CONV,
    }
    dequantize = tfl.BuiltinOperator.DEQUANTIZE  # float16 weights are widened by one
    codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]
    graph = model.subgraphs[0]
    wider = {op.outputs[0]: op.inputs[0] for op in graph.operators if codes[op.opcodeIndex] == dequantize}
    used = {op.inputs[1] for op in graph.operators if codes[op.opcodeIndex] in weighted}
    kinds = {tfl.TensorType.INT8: np.int8, tfl.TensorType.FLOAT32: np.float32, tfl.TensorType.FLOAT16: np.float16}
    found = []
    for tensor in (graph.tensors[wider.get(i, i)] for i in sorted(used)):
        stored = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
        if tensor.type == tfl.TensorType.INT4:  # two a byte, the first in its lower half
            halves = np.stack([stored << 4, stored & 0xF0], 1).reshape(-1).view(np.int8) >> 4
            found.append(halves[: int(np.prod(tensor.shape))])
        else:
            found.append(stored.view(kinds.get(tensor.type, np.uint8)))
    return found


def _kind(m: nn.Module) -> str:
    if isinstance(m, nn.Linear):
        return "linear"
    if isinstance(m, nn.ConvTranspose2d):
        return "transposed conv"
    groups = getattr(m, "groups", 1)
    if groups > 1:
        return "depthwise" if groups == getattr(m, "in_channels", 0) else "grouped conv"
    return "conv"


def _channels(m: nn.Module) -> tuple[int, int]:
    if isinstance(m, nn.Linear):
        return m.in_features, m.out_features
    return int(getattr(m, "in_channels", 0)), int(getattr(m, "out_channels", 0))


def environment() -> dict[str, Any]:
    """Versions and machine facts for the report."""
    packages = ("torch", "onnx", "onnxruntime", "ai-edge-litert", "numpy")
    cpu = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        cpu = found.group(1).strip() if found else ""
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in packages},
        "machine": platform.machine(),
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "system": platform.system(),
    }

"""Quantisation methods side by side: the same weights, calibration pictures and mean bits, each in its own runtime.

    python -m xedge.benchmarks.peers_quantization OUT lenet5 resnet20 --seeds 3
    python -m xedge.benchmarks.peers_quantization OUT efficientnet --photographs DIR

xedge as it comes, and with bits of an entropy coder; weights alone and its artefact with 8-bit activations; equal bits
for all channels with the same rounding, and rounded to nearest; ONNX Runtime's quantize_static, LiteRT's quantizer,
NNCF and Neural Compressor in their default use, per channel, which have 8 bits, some 4; Sony's MCT, which searches
mixed precision. Fine-tuning is one short epoch for xedge, and MCT's own gradient-based one on the calibration pictures.
Weights are those of `peers_pruning`, trained once and kept in OUT. Rows that are there are not measured again; a method
whose package is missing is named and left out:

    pip install ai-edge-quantizer nncf neural-compressor[pt] model-compression-toolkit edge-mdt-tpc
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from xedge.benchmarks.peers_pruning import base_data, base_model
from xedge.benchmarks.rows import Rows
from xedge.budget import CALIBRATED, calibrated, fitted_on, held, samples
from xedge.data import Data, batches
from xedge.export import write_flavour
from xedge.metrics import agreement, agreement_by_margin, kl, topk
from xedge.onnx_graph import Graph, export_float, session
from xedge.qat import DISTILL, RATE, Tuned
from xedge.quantize import Coding, ScaleTable, Sensitivity, dequantised, quantize
from xedge.ranges import Calibration
from xedge.sensitivity import distortions
from xedge.simulate import Quantized
from xedge.targets import tflite
from xedge.teacher import Teacher
from xedge.train import Recipe, fit

JUDGED = 2000
"""Validation images at most."""
TUNED = 12_800
"""Training images of the epoch of fine-tuning."""
LR = 0.02
MCT_IMAGES = 32
"""On which MCT judges its candidates, which is its default."""
BITS = (2, 3, 4, 6, 8)
SURE = 0.1
"""By how much the float net's best class is ahead of the next where its answer is more than a coin toss."""


@dataclass(frozen=True)
class Made:
    """What a method gave: how its net answers one image [1, C, H, W], planned bits a weight, its file, and the
    seconds it took."""

    answer: Callable[[Tensor], Any]
    bits: float
    file: bytes | None
    seconds: float


class Bench:
    """One net on its data; what methods share is made once, and its seconds count for each that uses it."""

    def __init__(self, name: str, data: Data, model: nn.Module, seed: int) -> None:
        self.name, self.data, self.model, self.seed = name, data, model.eval(), seed
        pairs = list(batches(data.val, 1, limit=min(len(data.val), JUDGED)))
        self.images, self.labels = [x for x, _ in pairs], torch.cat([y for _, y in pairs])
        self.proto = export_float(model, data.shape, 17)
        graph = Graph(self.proto)
        self.feed = graph.inputs[0]
        self.shapes = [graph.initializers[n.input[1]].dims for n in graph.weighted()]
        self.teacher = Teacher("labels", data.classes) if data.classes else Teacher("logits", 1000)
        self.base = self.run(runner(self.proto))

    def run(self, answer: Callable[[Tensor], Any]) -> Tensor:
        """Logits of the judged images."""
        with torch.no_grad():
            return torch.cat([torch.as_tensor(answer(x)).reshape(1, -1) for x in self.images])

    def judge(self, logits: Tensor) -> dict[str, float]:
        """Quality."""
        found = {"agreement": agreement(self.base, logits), "kl": kl(self.base, logits)}
        if self.data.classes:
            return {"top1": topk(logits, self.labels), **found}
        _, sure = agreement_by_margin(self.base, logits, (0.0, SURE))
        return {**found, "sure": sure.agreement or 0.0, "sure_images": sure.count}

    def pictures(self) -> Iterator[Tensor]:
        """What every method calibrates on, one by one, [1, C, H, W]."""
        for x, _ in samples(self.data, self.seed):
            yield torch.from_numpy(x)

    def feeds(self) -> Iterator[dict[str, Any]]:
        """The same for ONNX."""
        for x, _ in samples(self.data, self.seed):
            yield {self.feed: x}

    @cached_property
    def calibrated(self) -> tuple[Calibration, float]:
        """xedge's, and its seconds."""
        started = time.monotonic()
        return calibrated(self.data, self.seed, self.proto), time.monotonic() - started

    @cache  # noqa: B019
    def felt(self, coding: Coding) -> tuple[dict[str, Any], float]:
        """Distortions along the errors, and their seconds."""
        started = time.monotonic()
        return self.distortions("fisher", coding), time.monotonic() - started

    def distortions(self, how: Sensitivity, coding: Coding = "fixed") -> dict[str, Any]:
        """What each width costs; the peers have no use for the images held back."""
        calibration, _ = self.calibrated
        return distortions(
            how, self.model, self.proto, calibration, lambda: samples(self.data, self.seed), self.teacher,
            held=lambda: held(self.data, self.seed), coded=coding == "entropy",
        )  # fmt: skip


def runner(model: onnx.ModelProto | Path) -> Callable[[Tensor], Any]:
    """A graph in ONNX Runtime."""
    one = session(model)
    feed = one.get_inputs()[0].name
    return lambda x: one.run(None, {feed: x.numpy()})[0]


# -- ours ------------------------------------------------------------------------------------------------------------


def integers(bench: Bench, bits: float, how: str) -> tuple[ScaleTable, float]:
    """xedge's table, and its seconds with all that came before it."""
    calibration, seconds = bench.calibrated
    coding: Coding = "entropy" if how == "coded" else "fixed"
    if how in ("xedge", "coded"):
        tables, more = bench.felt(coding)
        seconds += more
    started = time.monotonic()
    if how not in ("xedge", "coded"):
        tables = bench.distortions("uniform")
    plain = how == "nearest"
    images = None if plain else fitted_on(bench.data, bench.seed, bench.proto)
    made = quantize(
        bench.proto, calibration, mean_bits=bits, tables=tables, feedback=not plain, correct=not plain, images=images,
        coding=coding,
    )  # fmt: skip
    return made, seconds + time.monotonic() - started


def ours(bench: Bench, bits: float, how: str) -> Made:
    """One of "xedge", "coded", "uniform" and "nearest": the artefact in ONNX Runtime."""
    made, seconds = integers(bench, bits, how)
    graph = write_flavour(bench.proto, made, "onnxruntime")
    return Made(runner(graph), made.mean_bits(), graph.SerializeToString(), seconds)


def weights_only(bench: Bench, bits: float, how: str) -> Made:
    """Without the rounding of activations."""
    made, seconds = integers(bench, bits, how)
    return Made(runner(dequantised(bench.proto, made.weights)), made.mean_bits(), None, seconds)


def tuned(bench: Bench, bits: float, _: str) -> Made:
    """xedge, then one short epoch through the roundings."""
    start, seconds = integers(bench, bits, "xedge")
    started = time.monotonic()
    data = bench.data
    judge = Quantized(bench.model, bench.proto, start, "onnxruntime", data.shape)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(bench.seed))[:TUNED]
    part: Any = Subset(data.train, chosen.tolist())  # type: ignore[arg-type]
    recipe = Recipe(epochs=1, lr=RATE * LR, batch=128, weight_decay=0.0, distill=DISTILL, seed=bench.seed)
    net = Tuned(judge, start)
    fit(net, replace(data, train=part), recipe, original=bench.model)
    made = net.table(start)
    graph = write_flavour(bench.proto, made, "onnxruntime")
    return Made(runner(graph), made.mean_bits(), graph.SerializeToString(), seconds + time.monotonic() - started)


# -- peers -----------------------------------------------------------------------------------------------------------


def onnxruntime_static(bench: Bench, bits: float, _: str) -> Made:
    """ONNX Runtime's quantize_static: QDQ, per channel, min-max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    feeds = bench.feeds()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plain, made = Path(folder) / "plain.onnx", Path(folder) / "made.onnx"
        onnx.save(bench.proto if bits == 8 else export_float(bench.model, bench.data.shape, 21), plain)  # int4 is young
        quantize_static(
            plain, made, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            weight_type=QuantType.QInt8 if bits == 8 else QuantType.QInt4, activation_type=QuantType.QUInt8,
        )  # fmt: skip
        seconds = time.monotonic() - started
        return Made(runner(made), bits, made.read_bytes(), seconds)


def litert(bench: Bench, bits: float, recipe: str) -> Made:
    """LiteRT's quantizer (ai-edge-quantizer) by one of its recipes, on the float .tflite."""
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer import recipe as recipes

    with tempfile.TemporaryDirectory() as folder:
        plain, made = Path(folder) / "plain.onnx", Path(folder) / "made.tflite"
        onnx.save(bench.proto, plain)
        started = time.monotonic()
        tool = quantizer.Quantizer(str(tflite.compile(plain, Path(folder), "plain")))
        tool.load_quantization_recipe(getattr(recipes, recipe)())
        seen = None
        if tool.need_calibration:
            seen = tool.calibrate(
                {
                    "serving_default": [
                        {bench.feed: x.permute(0, 2, 3, 1).contiguous().numpy()} for x in bench.pictures()
                    ]
                }
            )
        made.write_bytes(tool.quantize(seen).quantized_model)
        seconds = time.monotonic() - started
        run = tflite.TARGET.load(made, 1)
        return Made(lambda x: run(x.numpy()), bits, made.read_bytes(), seconds)


def nncf_static(bench: Bench, bits: float, _: str) -> Made:
    """NNCF's post-training quantisation of the ONNX graph."""
    import nncf

    started = time.monotonic()
    made = nncf.quantize(bench.proto, nncf.Dataset(list(bench.feeds())), subset_size=CALIBRATED)
    return Made(runner(made), bits, made.SerializeToString(), time.monotonic() - started)


def neural_compressor(bench: Bench, bits: float, _: str) -> Made:
    """Neural Compressor's static quantisation by torch.export."""
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

    started = time.monotonic()
    watched = prepare(
        export(copy.deepcopy(bench.model), example_inputs=(next(bench.pictures()),)), get_default_static_config()
    )
    for x in bench.pictures():
        watched(x)
    made = convert(watched)
    return Made(made, bits, None, time.monotonic() - started)


def mct(bench: Bench, bits: float, how: str) -> Made:
    """Sony's MCT: the widths 2, 4 and 8 of whole layers by integer programming over measured sensitivities."""
    import model_compression_toolkit as kit
    from edgemdt_tpc import get_target_platform_capabilities
    from mct_quantizers import PytorchQuantizationWrapper

    def pictures() -> Iterator[list[Tensor]]:
        for x in batches(bench.data.train, 16, shuffle_seed=bench.seed, limit=CALIBRATED):
            yield [x[0]]

    started = time.monotonic()
    settings: dict[str, Any] = {
        "target_resource_utilization": kit.core.ResourceUtilization(
            weights_memory=bits / 8 * sum(int(np.prod(shape)) for shape in bench.shapes)
        ),
        "core_config": kit.core.CoreConfig(
            mixed_precision_config=kit.core.MixedPrecisionQuantizationConfig(num_of_images=MCT_IMAGES)
        ),
        "target_platform_capabilities": get_target_platform_capabilities(tpc_version="1.0", device_type="imx500"),
    }
    model = copy.deepcopy(bench.model)
    if how == "gradient":
        tuning = kit.gptq.get_pytorch_gptq_config(n_epochs=5)
        made, _ = kit.gptq.pytorch_gradient_post_training_quantization(model, pictures, gptq_config=tuning, **settings)
    else:
        made, _ = kit.ptq.pytorch_post_training_quantization(model, pictures, **settings)
    seconds = time.monotonic() - started
    spent = count = 0.0
    for module in made.modules():
        if isinstance(module, PytorchQuantizationWrapper):
            for name, quantizer in module.weights_quantizers.items():
                size = getattr(module.layer, name).numel()
                spent, count = spent + size * quantizer.num_bits, count + size
    return Made(made, spent / count, None, seconds)


# -- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How it is run: its name, what makes it, the variant, its widths (none: any), and whether it needs labels."""

    name: str
    make: Callable[[Bench, float, str], Made]
    variant: str = ""
    bits: tuple[float, ...] = BITS
    labels: bool = False


METHODS = (
    Method("xedge, weights only", weights_only, "xedge"),
    Method("xedge, entropy-coded, weights only", weights_only, "coded", ()),
    Method("equal bits, weights only", weights_only, "uniform"),
    Method("equal bits to nearest, weights only", weights_only, "nearest"),
    Method("LiteRT, weights only", litert, "weight_only_wi4_afp32", (4,)),
    Method("LiteRT, weights only", litert, "weight_only_wi8_afp32", (8,)),
    Method("xedge", ours, "xedge"),
    Method("xedge, entropy-coded", ours, "coded", ()),
    Method("equal bits", ours, "uniform"),
    Method("ONNX Runtime static", onnxruntime_static, bits=(4, 8)),
    Method("LiteRT dynamic", litert, "dynamic_wi4_afp32", (4,)),
    Method("LiteRT static", litert, "static_wi8_ai8", (8,)),
    Method("NNCF", nncf_static, bits=(8,)),
    Method("Neural Compressor", neural_compressor, bits=(8,)),
    Method("MCT", mct),
    Method("xedge, tuned", tuned, labels=True),
    Method("MCT, tuned", mct, "gradient", labels=True),
)
"""Weights alone; then with 8-bit activations; then fine-tuned."""


def measure(bench: Bench, method: Method, bits: float) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"net": bench.name, "method": method.name, "bits": bits, "seed": bench.seed}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = method.make(bench, bits, method.variant)
            found = bench.judge(bench.run(made.answer))
    except ImportError as e:
        return {**row, "failed": f"not installed: {e}"}
    except Exception as e:  # a peer may fail on a net in any way: the row says how
        return {**row, "failed": f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"}
    packed = len(brotli.compress(made.file, quality=11)) if made.file is not None else None
    return {**row, "mean": made.bits, "bytes": packed, "seconds": made.seconds, **found}


def tables(name: str, rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and deviation over seeds."""
    out = []
    for bits in sorted({r["bits"] for r in rows}):
        here = [r for r in rows if r["bits"] == bits and "failed" not in r]
        if not here:
            continue
        key = "top1" if "top1" in here[0] else "agreement"
        heads = ["bits", f"{key}, %", "KL", "kB, Brotli", "s"]
        out.append(f"| {name}, {bits:g} bits | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
        for method in dict.fromkeys(m.name for m in METHODS):
            found = [r for r in here if r["method"] == method]
            if found:
                values = [100 * r[key] for r in found]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                size = f"{statistics.mean(r['bytes'] for r in found) / 1000:.0f}" if found[0]["bytes"] else "-"
                mean, far, seconds = (statistics.mean(r[k] for r in found) for k in ("mean", "kl", "seconds"))
                quality = f"{statistics.mean(values):.1f}{spread}"
                if "sure" in found[0]:
                    quality += f" ({100 * found[0]['sure']:.1f} of the {found[0]['sure_images']} sure)"
                out.append(f"| {method} | {mean:.2f} | {quality} | {far:.4f} | {size} | {seconds:.0f} |")
        out.append("")
    failed = {(r["method"], r["failed"]) for r in rows if "failed" in r}
    return "\n".join([*out, *(f"{method}: {reason}" for method, reason in sorted(failed))])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("nets", nargs="+", choices=["lenet5", "resnet20", "efficientnet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=float, nargs="+", default=list(BITS), help="2 to 8; 2, 3, 4, 6, 8 for all")
    parser.add_argument("--methods", default="", help="only those whose name contains this")
    parser.add_argument("--photographs", type=Path, help="folder made by python -m xedge.benchmarks.photographs")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(arguments.out / "quantization.jsonl")
    for name in arguments.nets:
        for seed in range(1 if name == "efficientnet" else arguments.seeds):
            bench: Bench | None = None
            for method in METHODS:
                for bits in (
                    b for b in arguments.bits if b in (method.bits or (b,)) and arguments.methods in method.name
                ):
                    if rows.has(net=name, method=method.name, bits=bits, seed=seed):
                        continue
                    if method.labels and name == "efficientnet":
                        continue
                    if bench is None:
                        data = base_data(name, seed, arguments.photographs)
                        bench = Bench(name, data, base_model(name, seed, data, arguments.out), seed)
                    rows.add(measure(bench, method, bits))
        print("\n" + tables(name, [r for r in rows.done if r["net"] == name]) + "\n", flush=True)


if __name__ == "__main__":
    main()

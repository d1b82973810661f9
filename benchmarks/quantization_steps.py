"""What each step of quantising is worth, by one command:

    python -m xedge.benchmarks.quantization_steps resnet20 lenet5 --runs OUT --bits 2 4
    python -m xedge.benchmarks.quantization_steps efficientnet --photographs PHOTOS --bits 4

Weights first, in float arithmetic: sensitivities, layers fitted, then error feedback and bias correction switched off.
Then activations of 8 bits, as LiteRT's grid has them: three rules for their ranges, and equalisation. The classifiers
are the originals of the runs that `python -m xedge.benchmarks.results OUT` made; EfficientNet-Lite0 has its ImageNet
weights. Nothing is pruned, and nothing is trained.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from safetensors.torch import load_file
from torch import Tensor, nn

from xedge import load
from xedge.benchmarks.peers_pruning import base_data
from xedge.benchmarks.zoo import efficientnet_lite0
from xedge.budget import calibrated, held, samples
from xedge.codebook import quantize_by_codebook
from xedge.data import Data, batches
from xedge.equalize import equalize
from xedge.export import write_flavour
from xedge.metrics import agreement, kl, topk
from xedge.onnx_graph import Graph, export_float, session
from xedge.quantize import Sensitivity, dequantised, quantize
from xedge.ranges import Calibration, RangeRule
from xedge.sensitivity import distortions
from xedge.teacher import Teacher
from xedge.twins import Image

CLASSIFIERS = ("resnet20", "lenet5")
JUDGED = 2000
"""Validation images at most."""
HOWS: tuple[Sensitivity, ...] = ("fisher", "output", "kfac", "di", "mse", "uniform")
RULES: tuple[RangeRule, ...] = ("mse", "percentile", "minmax")


@dataclass(frozen=True)
class Subject:
    """A float model, its graph, and what calibration saw."""

    model: nn.Module
    proto: ModelProto
    calibration: Calibration
    seconds: float


class Bench:
    """One network on its data; `rows` are Markdown."""

    def __init__(self, data: Data, model: nn.Module, seed: int) -> None:
        self.data, self.seed = data, seed
        self.teacher = Teacher("labels", data.classes) if data.classes else Teacher("logits", 1000)
        limit = min(len(data.val), JUDGED)
        pairs = list(batches(data.val, 1, limit=limit))
        self.images, self.labels = [x for x, _ in pairs], torch.cat([y for _, y in pairs])
        self.plain = self.subject(model)
        self.base = self.run(self.plain.proto)

    def subject(self, model: nn.Module) -> Subject:
        """Export and calibrate."""
        started = time.monotonic()
        proto = export_float(model, self.data.shape, 17)
        seen = calibrated(self.data, self.seed, proto)
        return Subject(model, proto, seen, time.monotonic() - started)

    def pictures(self) -> tuple[list[Image], list[Image]]:
        """What layers are fitted on, and what judges that."""
        return [x for x, _ in samples(self.data, self.seed)], [x for x, _ in held(self.data, self.seed)]

    def equalised(self) -> Subject:
        """The same model with equalised channels."""
        model = copy.deepcopy(self.plain.model)
        pairs = equalize(model, (torch.from_numpy(x) for x, _ in samples(self.data, self.seed)), self.data.shape)
        print(f"  {len(pairs)} pairs of layers equalised", file=sys.stderr)
        return self.subject(model)

    def run(self, proto: ModelProto) -> Tensor:
        """Logits of the judged images."""
        one, feed = session(proto), Graph(proto).inputs[0]
        return torch.cat([torch.from_numpy(one.run(None, {feed: x.numpy()})[0]) for x in self.images])

    def row(self, name: str, got: Tensor, bits: float, seconds: float) -> None:
        """One line of the table."""
        right = f"{topk(got, self.labels):.2%}" if self.data.classes else "-"
        same, far = agreement(self.base, got), kl(self.base, got)
        print(f"| {name} | {bits:.2f} | {right} | {same:.1%} | {far:.4f} | {seconds:.0f} |", flush=True)

    def tables(self, subject: Subject, how: Sensitivity, *, feedback: bool = True) -> dict[str, Any]:
        """Distortions."""
        return distortions(
            how, subject.model, subject.proto, subject.calibration, lambda: samples(self.data, self.seed), self.teacher,
            held=lambda: held(self.data, self.seed), feedback=feedback,
        )  # fmt: skip

    def table(self, bits: float) -> None:
        """Every step at one budget."""
        print(f"\n| at {bits:g} mean bits | bits | top-1 | same top-1 as float | KL | s |\n|---|---|---|---|---|---|")
        self.row("float", self.base, 32, 0.0)
        s = self.plain
        for how in HOWS:
            started = time.monotonic()
            found = self.tables(s, how)
            made = quantize(s.proto, s.calibration, mean_bits=bits, tables=found)
            took = time.monotonic() - started
            self.row(f"weights, `{how}`", self.run(dequantised(s.proto, made.weights)), made.mean_bits(), took)
            if how == "fisher":
                best = found
        started = time.monotonic()
        made = quantize(s.proto, s.calibration, mean_bits=bits, tables=best, images=self.pictures())
        took = time.monotonic() - started
        self.row("weights, `fisher`, fitted", self.run(dequantised(s.proto, made.weights)), made.mean_bits(), took)
        got = self.run(write_flavour(s.proto, made, "litert"))
        self.row("and activations, `mse`, fitted", got, made.mean_bits(), took)
        started = time.monotonic()
        near = self.tables(s, "fisher", feedback=False)
        took = time.monotonic() - started
        for name, tables, feedback, correct in (
            ("`output`, no layer weights", None, True, True),
            ("`fisher`, no error feedback", near, False, True),
            ("`fisher`, no bias correction", best, True, False),
        ):
            made = quantize(s.proto, s.calibration, mean_bits=bits, tables=tables, feedback=feedback, correct=correct)
            self.row(f"weights, {name}", self.run(dequantised(s.proto, made.weights)), made.mean_bits(), took)
        for rule in RULES:
            started = time.monotonic()
            made = quantize(s.proto, s.calibration, mean_bits=bits, tables=best, rule=rule)
            took = time.monotonic() - started
            got = self.run(write_flavour(s.proto, made, "litert"))
            self.row(f"and activations, `{rule}`", got, made.mean_bits(), took)
        started = time.monotonic()
        e = self.equalised()
        made = quantize(e.proto, e.calibration, mean_bits=bits, tables=self.tables(e, "fisher"))
        took = time.monotonic() - started
        self.row("weights, equalised", self.run(dequantised(e.proto, made.weights)), made.mean_bits(), took)
        got = self.run(write_flavour(e.proto, made, "litert"))
        self.row("and activations, `mse`, equalised", got, made.mean_bits(), took)
        started = time.monotonic()
        made = quantize_by_codebook(s.proto, s.calibration, mean_bits=bits, tables=best)
        took = time.monotonic() - started
        self.row("weights, codebooks", self.run(dequantised(s.proto, made.weights)), made.mean_bits(), took)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*CLASSIFIERS, "efficientnet"])
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="folder made by python -m xedge.benchmarks.results")
    parser.add_argument("--photographs", type=Path, help="folder made by python -m xedge.benchmarks.photographs")
    arguments = parser.parse_args()
    for name in arguments.what:
        data = base_data(name, arguments.seed, arguments.photographs)
        if name == "efficientnet":
            model = efficientnet_lite0()
        elif arguments.runs is None:
            sys.exit(f"{name} needs --runs OUT")
        else:
            model = load.load_model(name, classes=data.classes, channels=data.shape[0])
            model.load_state_dict(load_file(arguments.runs / f"{name}-{arguments.seed}" / "original.safetensors"))
        bench = Bench(data, model.eval(), arguments.seed)
        print(f"\n{name}, seed {arguments.seed}, {len(bench.images)} pictures; calibration {bench.plain.seconds:.0f} s")
        for bits in arguments.bits:
            bench.table(bits)


if __name__ == "__main__":
    main()

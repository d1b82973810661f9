"""What the form in which integers are stored is worth, on the nets of finished runs:

    python -m xedge.benchmarks.stored RUN [RUN ...]

Channels as pruning left them against the order of their bits, and codebooks decoded against gathered; the same
integers, bytes of the artefact as it lies and compressed.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import ModelProto

from xedge.export import write_flavour
from xedge.load import load_target
from xedge.metrics import sizes
from xedge.quantize import ScaleTable
from xedge.run import read_json


def row(run: Path, target: str, form: str, floats: ModelProto, table: ScaleTable) -> int:
    """One line of the table, and the bytes by Brotli."""
    made = load_target(target)
    with tempfile.TemporaryDirectory() as folder:
        flavoured = Path(folder) / "flavour.onnx"
        onnx.save(write_flavour(floats, table, made.flavour), flavoured)
        (Path(folder) / "made").mkdir()
        found = sizes(made.compile(flavoured, Path(folder) / "made", "model"))
    print(f"| {run.name} | {target} | {form} | {found['raw']} | {found['zstd']} | {found['brotli']} |", flush=True)
    return found["brotli"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    print("| run | target | form | bytes | zstd | Brotli |\n|---|---|---|---|---|---|")
    for run in parser.parse_args().run:
        floats, last = onnx.load(run / "float.onnx"), ScaleTable.load(run / "scales.safetensors")
        before, first = onnx.load(run / "pruned.onnx"), ScaleTable.load(run / "rounded.safetensors")
        for target in read_json(run / "run.json")["targets"]:
            if last.codebooks:
                row(run, target, "decoded", floats, replace(last, codebooks=False))
                if load_target(target).flavour == "onnxruntime":
                    row(run, target, "gathered", floats, last)
            elif {n: w.values.shape for n, w in first.weights.items()} == {
                n: w.values.shape for n, w in last.weights.items()
            }:
                plain, ordered = row(run, target, "as pruned", before, first), row(run, target, "by bits", floats, last)
                print(f"| {run.name} | {target} | gain | | | {1 - ordered / plain:.2%} |")


if __name__ == "__main__":
    main()

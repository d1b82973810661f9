"""How far LiteRT's kernels end from ONNX Runtime's on trained nets, in steps of the output:

    python -m xedge.benchmarks.steps_apart OUT resnet20 lenet5 --seeds 3

Weights are those of `peers_pruning`, trained once and kept in OUT. Each net is quantised to 8 and to 4 mean bits, and
its .tflite, on LiteRT's reference kernels and on XNNPACK, is compared with its Q/DQ graph in ONNX Runtime without
optimisations.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xedge.benchmarks.peers_pruning import base_data, base_model
from xedge.budget import calibrated
from xedge.data import batches
from xedge.export import grids, write_flavour
from xedge.onnx_graph import Graph, export_float, session
from xedge.quantize import quantize
from xedge.targets import tflite

JUDGED = 300
"""Validation pictures."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("nets", nargs="+", choices=["lenet5", "resnet20"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print("| net, seed, mean bits | kernels | outputs | equal | one step | two | more |\n|---|---|---|---|---|---|---|")
    for name in arguments.nets:
        for seed in range(arguments.seeds):
            data = base_data(name, seed, None)
            proto = export_float(base_model(name, seed, data, arguments.out), data.shape, 17)
            seen = calibrated(data, seed, proto)
            images = [x.numpy() for x, _ in batches(data.val, 1, limit=JUDGED)]
            for bits in (8.0, 4.0):
                table = quantize(proto, seen, mean_bits=bits)
                integers = write_flavour(proto, table, "litert")
                wanted = session(integers, exact=True)
                feed = wanted.get_inputs()[0].name
                truth = np.concatenate([wanted.run(None, {feed: x})[0] for x in images])
                step = float(grids(Graph(proto), table, "litert")[Graph(proto).outputs[0]].scale)
                file = tflite.convert(integers)
                for reference in (True, False):
                    run = tflite.runner(file, reference=reference)
                    row(f"{name}, {seed}, {bits:g}", reference, np.concatenate([run(x) for x in images]), truth, step)


def row(label: str, reference: bool, got: NDArray[np.float32], truth: NDArray[np.float32], step: float) -> None:
    """One line of the table."""
    found = Counter(np.rint(np.abs(got - truth) / step).astype(int).ravel().tolist())
    more = found.total() - sum(found[n] for n in range(3))
    kernels = "reference" if reference else "XNNPACK"
    print(f"| {label} | {kernels} | {found.total()} | {found[0]} | {found[1]} | {found[2]} | {more} |", flush=True)


if __name__ == "__main__":
    main()

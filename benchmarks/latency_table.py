"""The latency table against the stop watch, and half the time as a budget, in milliseconds and in MACs.

    python -m xedge.benchmarks.latency_table OUT                       # ResNet-20 and MobileNetV2, this host, .tflite
    python -m xedge.benchmarks.latency_table OUT --device FILE.toml --target android --nets resnet20

1. The table's prediction at three widths (equal shares of every group), raw and at the scale at which it gives the
   uncut integer net's time, against the standard protocol. Weights do not matter to time and are drawn at random.
2. One `xedge compress --latency`, at half the uncut integer net's time, and one `--macs 0.5`, from the same weights, by
   the same recipe; both artefacts timed by the standard protocol. The runs in OUT are resumed when it is run again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from xedge.choose import costs_of
from xedge.device import open_device
from xedge.errors import AccuracyMissed, LatencyMissed
from xedge.groups import find_groups
from xedge.latency import LatencyCosts, build_table, corrected
from xedge.load import load_model, load_target
from xedge.measure import STANDARD, measure
from xedge.measurement import Measurement
from xedge.onnx_graph import export_float
from xedge.pipeline import compress
from xedge.plan import allocate
from xedge.progress import Talk
from xedge.prune import prune
from xedge.report import read_json
from xedge.request import Request
from xedge.target import Target
from xedge.units import artefact, units_of

NETS = {"resnet20": 12, "mobilenet_v2_small": 12}
"""Name -> epochs that train it for the second table."""
PARTS = (0.75, 0.5, 0.25)
"""Of the MACs, at which the table is tried."""
SIDE = 28
DATA = "digits"


def timed(model: nn.Module, target: Target, address: str, folder: Path) -> Measurement:
    """The net as an integer artefact, by the standard protocol."""
    path = folder / f"timed{target.suffix}"
    path.write_bytes(artefact(export_float(model, (1, SIDE, SIDE), target.opset), target))
    with open_device(address) as device:
        return measure(device, path, None, STANDARD)


def words(m: Measurement) -> str:
    """Median, interval, and what was wrong."""
    i = m.interval
    return f"{i.median:.4f} [{i.lower:.4f}, {i.upper:.4f}]" + ("" if m.verdict == "ok" else f" ({m.verdict})")


def predictions(net: str, target: Target, address: str, folder: Path) -> float:
    """Print the first table's rows; the uncut integer net's milliseconds."""
    torch.manual_seed(0)
    model = load_model(net, classes=10, channels=1).eval()
    shape, example = (1, SIDE, SIDE), torch.randn(1, 1, SIDE, SIDE)
    units = units_of(export_float(model, shape, target.opset))
    groups = find_groups(model, example)
    costs = costs_of(model, shape, groups)
    least = {g.name: g.size - costs.widths(g.name, g.size, g.size, target.align)[-1] for g in groups.free}
    started = time.monotonic()
    table = build_table(address, target, units, costs.left({}), costs.left(least), target.align, print)
    took = time.monotonic() - started
    raw = LatencyCosts(costs, tuple(units), table)
    whole = timed(model, target, address, folder)
    scaled = corrected(raw, whole.interval.median)
    print(f"{net}: {table.points} units in {took:.0f} s, steps {dict(table.stairs)}, scale {scaled.scale:.3f}")
    heads = ("net", "MACs", "table, ms", "scaled, ms", "measured, ms", "table off by", "scaled off by")
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    sizes = {g.name: g.size for g in groups.free}
    for part in (1.0, *PARTS):
        keep = groups.whole()
        small, record = model, whole
        if part < 1:
            scores = {name: np.arange(size, dtype=np.float64) for name, size in sizes.items()}
            chosen = allocate(scores, costs, part * costs.total({}), originals=sizes, align=target.align)
            proven = prune(model, groups, chosen, example)
            keep, small = proven.keep, proven.model
            record = timed(small, target, address, folder)
        removed = {name: int((~mask).sum()) for name, mask in keep.items()}
        predicted, measured = (raw.total(removed), scaled.total(removed)), record.interval.median
        off = " | ".join(f"{p / measured - 1:+.1%}" for p in predicted)
        share = costs.total(removed) / costs.total({})
        print(
            f"| {net} | {share:.0%} | {predicted[0]:.4f} | {predicted[1]:.4f} | {words(record)} | {off} |", flush=True
        )
    return whole.interval.median


def budgets(net: str, target: Target, address: str, folder: Path, half: float) -> None:
    """Print the second table's rows."""
    recipe = {"model": net, "data": DATA, "targets": (target.name,), "epochs": 1, "iterations": 2}
    base = folder / net / "macs"
    print(f"| {net}: at most | MACs | top-1 | ms | in time |\n|---|---|---|---|---|")
    for name in ("macs", "latency"):
        if name == "macs":
            request = Request(**recipe, macs=0.5, base_epochs=NETS[net])  # type: ignore[arg-type]
        else:
            weights = str(base / "original.safetensors")
            request = Request(**recipe, latency=round(half, 4), device=address, weights=weights)  # type: ignore[arg-type]
        try:
            run = compress(request, folder / net / name, Talk(quiet=False), bench=False)
        except (AccuracyMissed, LatencyMissed) as error:
            print(f"| {name} | {error} |")
            continue
        report = read_json(run.folder / "report.json")
        row = next(r for r in report.rows if r.name == "compressed")
        with open_device(address) as device:
            record = measure(device, run.folder / report.artifacts[0].path, None, STANDARD)
        asked = "half the MACs" if name == "macs" else f"{half:.4f} ms"
        share = row.macs / next(r.macs for r in report.rows if r.name == "original")
        verdict = record.interval.decide(half)
        print(f"| {asked} | {share:.1%} | {row.top1:.2%} | {words(record)} | {verdict} |", flush=True)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--device", default="local")
    parser.add_argument("--target", default="android")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--no-budgets", action="store_true", help="the first table only")
    arguments = parser.parse_args()
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = load_target(arguments.target)
    for net in arguments.nets:
        whole = predictions(net, target, arguments.device, arguments.out)
        if not arguments.no_budgets:
            budgets(net, target, arguments.device, arguments.out, whole / 2)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

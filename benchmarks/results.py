"""The tables of docs/results.md, by one command:

    python -m xedge.benchmarks.results OUT lenet5 resnet20 --seeds 3
    python -m xedge.benchmarks.results OUT efficientnet --photographs DIR

Every row is one `xedge compress` (printed, and resumed when run again), then one `xedge bench` by the standard
protocol when all training is over, so that nothing else runs while it times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CLASSIFIERS = {
    "lenet5": "-m lenet5 -d fashion-mnist --base-epochs 4 --macs 0.4 --bits 4.5 --epochs 1 --iterations 3",
    "resnet20": "-m resnet20 -d fashion-mnist --base-epochs 2 --macs 0.4 --bits 4.5 --epochs 1 --iterations 2",
}
PHOTOGRAPHS = "size=224&crops=10&mean=0.498,0.498,0.498&std=0.502,0.502,0.502"
EFFICIENTNET = {
    "80 % of MACs": "--macs 0.8 --bits 8",
    "6 mean bits": "--macs 1 --bits 6",
}
TARGETS = "--target android --target host-cpu --target jetson"


def compress(arguments: str, folder: Path) -> dict[str, Any]:
    """Run or resume one `xedge compress`; returns its report and what verification measured."""
    command = [
        sys.executable,
        "-m",
        "xedge.cli",
        "compress",
        *shlex.split(arguments),
        "-o",
        str(folder),
        "--no-bench",
    ]
    print(f"$ xedge compress {arguments} -o {folder}", flush=True)
    if not (folder / "report.json").exists():
        started = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, 4):  # 4: the floor was missed; the report says by how much
            sys.exit(f"results: exit code {done.returncode}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"  {time.monotonic() - started:.0f} s, at most {peak:.1f} GiB resident so far", flush=True)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    report["verify"] = json.loads((folder / "verify.json").read_text())
    return report


def bench(folder: Path) -> dict[str, tuple[float, float, float]]:
    """Ratio original / compressed with its interval, by target, from one interleaved run."""
    command = [sys.executable, "-m", "xedge.cli", "bench", str(folder), "--json", "--quiet"]
    out = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if out.returncode:
        sys.exit(f"results: bench exit code {out.returncode}")
    report = json.loads((folder / "report.json").read_text())
    return {
        r["target"]: tuple(r["latency"]["ratio"])
        for r in report["rows"]
        if r["name"] == "compressed" and r["latency"] and r["latency"]["ratio"]
    }


def spread(values: list[float], form: str, factor: float = 1.0) -> str:
    """Mean, and the deviation over seeds where there are several."""
    mean = format(statistics.mean(values) * factor, form)
    return f"{mean} ± {format(statistics.stdev(values) * factor, form)}" if len(values) > 1 else mean


def classifier_table(
    name: str, reports: list[dict[str, Any]], ratios: list[dict[str, tuple[float, float, float]]]
) -> str:
    """One Markdown table: original, pruned, pruned and quantised."""

    def row(report: dict[str, Any], which: str, target: str) -> dict[str, Any]:
        return next(r for r in report["rows"] if r["name"] == which and r["target"] == target)

    def kilobytes(which: str, key: str, target: str) -> str:
        return spread([row(r, which, target)[key] / 1e3 for r in reports], ".0f")

    lines = [
        f"| {name} | top-1, % | MACs, M | parameters, k | .tflite, kB: raw / zstd / Brotli "
        "| .onnx, kB: raw / zstd / Brotli |",
        "|---|---|---|---|---|---|",
    ]
    for label, which, top1 in (
        ("original, float", "original", [r["verify"]["original"]["top1"] for r in reports]),
        ("pruned, float", "", [r["verify"]["float"]["top1"] for r in reports]),
        ("pruned, 4.5 mean bits, .tflite", "compressed", [r["verify"]["targets"]["android"]["top1"] for r in reports]),
        ("pruned, 4.5 mean bits, .onnx", "compressed", [r["verify"]["targets"]["host-cpu"]["top1"] for r in reports]),
    ):
        size = which or "compressed"
        macs = spread([row(r, size, "android")["macs"] / 1e6 for r in reports], ".2f")
        parameters = spread([row(r, size, "android")["parameters"] / 1e3 for r in reports], ".0f")
        files = ["—", "—"]
        if which:
            files = [
                " / ".join(kilobytes(which, key, target) for key in ("bytes", "bytes_zstd", "bytes_brotli"))
                for target in ("android", "host-cpu")
            ]
        lines.append(f"| {label} | {spread(top1, '.2f', 100)} | {macs} | {parameters} | {files[0]} | {files[1]} |")
    for seed, found in enumerate(ratios):
        for target, (ratio, low, high) in found.items():
            runtime = "LiteRT" if target == "android" else "ONNX Runtime"
            faster = f"{ratio:.2f} times faster than the original [{low:.2f}, {high:.2f}]"
            lines.append(f"\n{runtime} ({target}), seed {seed}: {faster}")
    return "\n".join(lines)


def efficientnet_table(out: Path, photographs: Path) -> str:
    """One Markdown table: label-free compression of a pretrained net, judged by agreement with the original."""
    lines = [
        "| EfficientNet-Lite0, label-free | same top-1 as the original | KL | MACs, M | .tflite, kB: raw / Brotli |",
        "|---|---|---|---|---|",
    ]
    data = shlex.quote(f"folder:{photographs}?{PHOTOGRAPHS}")
    for label, flags in EFFICIENTNET.items():
        model = f"-m xedge.benchmarks.zoo:efficientnet_lite0 -d {data} --epochs 0 --iterations 1"
        folder = out / f"efficientnet-{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}"
        report = compress(f"{model} {flags} --target android --target jetson", folder)
        row = next(r for r in report["rows"] if r["name"] == "compressed" and r["target"] == "android")
        size = f"{row['macs'] / 1e6:.1f} | {row['bytes'] / 1e3:.0f} / {row['bytes_brotli'] / 1e3:.0f}"
        for kind, facts in (("float", report["verify"]["float"]), *report["verify"]["targets"].items()):
            same = f"{facts['agreement']:.1%} of {report['verify']['images']}"
            lines.append(f"| {label}, {kind} | {same} | {facts['kl']:.3f} | {size} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("what", nargs="+", choices=[*CLASSIFIERS, "efficientnet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--photographs", type=Path, help="folder made by python -m xedge.benchmarks.photographs")
    parser.add_argument("--no-bench", action="store_true", help="leave the timing for a later call on a quiet machine")
    arguments = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores\n")
    for name in arguments.what:
        if name == "efficientnet":
            if arguments.photographs is None:
                sys.exit("results: efficientnet needs --photographs DIR")
            print(efficientnet_table(arguments.out, arguments.photographs), flush=True)
            continue
        folders = [arguments.out / f"{name}-{seed}" for seed in range(arguments.seeds)]
        reports = [
            compress(f"{CLASSIFIERS[name]} --seed {seed} {TARGETS}", folder) for seed, folder in enumerate(folders)
        ]
        ratios = [] if arguments.no_bench else [bench(folder) for folder in folders]
        print("\n" + classifier_table(name, reports, ratios) + "\n", flush=True)


if __name__ == "__main__":
    main()

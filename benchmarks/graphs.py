"""Which networks can be cut, and is the cut exact? All torchvision classifiers, or those named.

    python -m xedge.benchmarks.graphs                      # all of torchvision
    python -m xedge.benchmarks.graphs resnet18 timm:res2net50_26w_4s --peer

Half of each group goes at random, in multiples of 8 where there are enough channels; weights are random too. Each
network runs in a process of its own with a time limit. The columns: MACs kept, parameters kept, groups cut of groups
found, layers left whole, the certificate's error (masked against cut, relative, float64), seconds for the export, for
all of find_groups, and for the cut with its certificate. With --peer also torch-pruning's magnitude pruner as its
README uses it (classifier ignored, half of the channels): whether the pruned model still runs, and its seconds; it has
no equality to compare.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from typing import Any, cast

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from xedge.errors import XedgeError
from xedge.groups import analyse, find_groups
from xedge.metrics import macs, parameters
from xedge.prune import prune

_SEEDS = {"weights": 0, "keep": 1}
_TOO_SMALL_AT_64 = ("alexnet", "inception_v3")  # they pool five times with large kernels


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network without weights, and an input: 64 pixels, or what a fixed-size network takes."""
    torch.manual_seed(_SEEDS["weights"])
    if name.startswith("timm:"):
        import timm  # an extra: only when asked for

        return timm.create_model(name[5:]).eval(), torch.randn(1, 3, 64, 64)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = cast(nn.Module, torchvision.models.get_model(name, weights=None, **options)).eval()
    size = int(getattr(model, "image_size", 128 if name in _TOO_SMALL_AT_64 else 64))
    return model, torch.randn(1, 3, size if "maxvit" not in name else 224, size if "maxvit" not in name else 224)


def ours(name: str) -> dict[str, Any]:
    """One network's row."""
    model, example = build(name)
    start = time.perf_counter()
    try:
        analyse(model, example)
        analysed = time.perf_counter()
        groups = find_groups(model, example)
        found = time.perf_counter()
        generator = np.random.default_rng(_SEEDS["keep"])
        keep = groups.whole()
        for group in groups.free:
            left = max(8, 8 * round(group.size / 16)) if group.size >= 16 else group.size // 2
            keep[group.name][generator.permutation(group.size)[left:]] = False
        done = prune(model, groups, keep, example)
    except XedgeError as error:
        return {"name": name, "error": str(error)}
    shape = tuple(example.shape[1:])
    whys = Counter(why.split(" at ")[0].split(" (")[0] for _, why in done.groups.frozen if why != "model output")
    return {
        "name": name,
        "macs": macs(done.model, shape).total / macs(model, shape).total,
        "parameters": parameters(done.model) / parameters(model),
        "cut": sum(not mask.all() for mask in done.keep.values()),
        "groups": len(groups.groups),
        "frozen": dict(whys),
        "ok": done.certificate.ok,
        "max_error": done.certificate.max_error,
        "reason": done.certificate.reason,
        "put_back": len(done.put_back),
        "seconds": [analysed - start, found - analysed, time.perf_counter() - found],
    }


def peer(name: str) -> dict[str, Any]:
    """torch-pruning's default use on the same network."""
    import torch_pruning  # only when asked for

    model, example = build(name)
    before = parameters(model)
    start = time.perf_counter()
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    try:
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            example,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=ignored,
        )
        pruner.step()
        with torch.no_grad():
            model(example)
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError, AssertionError) as error:
        return {
            "name": name,
            "error": f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}",
        }
    return {"name": name, "seconds": time.perf_counter() - start, "parameters": parameters(model) / before}


def isolated(kind: str, name: str, limit: float) -> dict[str, Any]:
    """A row from a process of its own, so that a crash or a hang is one row as well."""
    command = [sys.executable, "-m", "xedge.benchmarks.graphs", "--one", kind, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"no end after {limit:.0f} s"}
    if done.returncode:
        return {"name": name, "error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:100]}
    return cast(dict[str, Any], json.loads(done.stdout.splitlines()[-1]))


def table_row(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    if "error" in row:
        cells = [row["name"], *["-"] * 4, row["error"], "-"]
    else:
        why = "; ".join(f"{count} {reason}" for reason, count in row["frozen"].items()) or "-"
        verdict = f"{row['max_error']:.0e}" if row["ok"] else f"NOT OK: {row['reason']}"
        seconds = " + ".join(f"{s:.1f}" for s in row["seconds"])
        share = [f"{row['macs']:.2f}", f"{row['parameters']:.2f}", f"{row['cut']}/{row['groups']}"]
        cells = [row["name"], *share, why, verdict, seconds]
    if other is not None:
        said = other.get("error") or f"runs, parameters {other['parameters']:.2f}, {other['seconds']:.1f} s"
        cells.append(str(said))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of torchvision.models, or timm:NAME; default: all classifiers")
    parser.add_argument("--peer", action="store_true", help="also torch-pruning")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for each network")
    parser.add_argument("--one", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        print(json.dumps((ours if args.one == "ours" else peer)(args.names[0])))
        return
    names = args.names or torchvision.models.list_models(module=torchvision.models)
    heads = ["model", "MACs", "parameters", "groups cut", "layers left whole", "certificate", "seconds"]
    heads += ["torch-pruning"] if args.peer else []
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for name in names:
        other = isolated("peer", name, args.limit) if args.peer else None
        print(table_row(isolated("ours", name, args.limit), other), flush=True)


if __name__ == "__main__":
    main()

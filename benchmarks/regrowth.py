"""Does it help when channels that were cut may come back? (CHEX, CVPR 2022, lets them.)

    python -m xedge.benchmarks.regrowth OUT [--seeds 3]

LeNet-5 at 15 % of MACs on Fashion-MNIST in three cuts, each followed by an epoch of 20 000 images. With regrowth, a
channel that was cut earlier takes the place of a kept one of its group wherever its score in the original is the higher
one; it returns with the original's weights, and every layer is fitted anew to the original's responses.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from xedge import load
from xedge.benchmarks.peers_pruning import base_model
from xedge.channels import Groups
from xedge.choose import Settings, choose, costs_of
from xedge.data import Data, batches
from xedge.groups import find_groups
from xedge.iterate import compose
from xedge.metrics import macs, topk
from xedge.plan import Budget, Keep
from xedge.prune import cut
from xedge.refit import cut_and_fold, folding, head
from xedge.teacher import Teacher
from xedge.train import Recipe, fit, predict

GOAL, CUTS = 0.15, 3


def regrown(total: Keep, scores: dict[str, Any]) -> Keep:
    """Masks of the same widths with the highest of the original's scores."""
    out = {name: mask.copy() for name, mask in total.items()}
    for name, score in scores.items():
        out[name] = np.zeros_like(total[name])
        out[name][np.argsort(-score, kind="stable")[: total[name].sum()]] = True
    return out


@torch.no_grad()
def grown(original: nn.Module, tuned: nn.Module, groups: Groups, total: Keep, then: Keep, x: torch.Tensor) -> nn.Module:
    """The original's channels `then`, with the tuned weights wherever `total` had them, fitted to the original."""
    full = copy.deepcopy(original)
    stay = groups.positions(total)
    small = dict(tuned.named_parameters())
    for name, p in full.named_parameters():
        rows = [np.flatnonzero(stay.get((name, axis), np.ones(size, bool))) for axis, size in enumerate(p.shape)]
        p[np.ix_(*rows)] = small[name]
    out = cut(full, groups, then)
    with folding(out, original, groups, then, x):
        out.eval()(x)
    return out


def run(original: nn.Module, data: Data, seed: int, *, regrow: bool) -> tuple[float, int]:
    """Top-1 on validation data after the last epoch, and how many channels came back."""
    settings = Settings("fback", Budget(GOAL), 1, 1, CUTS, 0.02, seed, 128)
    groups = find_groups(original, torch.stack([data.train[0][0]]), prune_stem=True)
    sizes = {g.name: g.size for g in groups.groups}
    base, _ = predict(original, data.select)
    whole = macs(original, data.shape).total
    total, current, back = groups.whole(), original, 0
    x, _ = next(batches(data.train, head(data.train), shuffle_seed=seed))
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:20_000]
    part: Any = Subset(data.train, chosen.tolist())  # type: ignore[arg-type]
    first: dict[str, Any] = {}
    assert data.classes is not None
    for index in range(CUTS):
        now = groups.after(total)
        target = whole * GOAL ** ((index + 1) / CUTS)
        choice = choose(
            current,
            now,
            data,
            Teacher("labels", data.classes),
            settings,
            costs_of(current, data.shape, now),
            target,
            base,
            sizes,
        )
        assert choice is not None
        first = first or choice.scores
        cutting = cut_and_fold(current, now, choice.keep, data.train, {}, choice.observed, sequential=choice.sequential)
        total = compose(total, choice.keep)
        if regrow and index:
            then = regrown(total, first)
            came = sum(int((then[n] & ~total[n]).sum()) for n in first)
            if came:
                cutting, total, back = grown(original, cutting, groups, total, then, x), then, back + came
        current = fit(cutting, replace(data, train=part), Recipe(epochs=1, lr=0.02, seed=seed + index))
    return topk(*predict(current, data.val)), back


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(arguments.seeds):
        data = load.load_data("fashion-mnist", root=None, seed=seed)
        original = base_model("lenet5", seed, data, arguments.out)
        for regrow, rows in found.items():
            top1, back = run(original, data, seed, regrow=regrow)
            rows.append(top1)
            print(f"seed {seed}, regrowth {regrow}: top-1 {top1:.2%}, {back} channels came back", flush=True)
    print("| LeNet-5, 15 % of MACs in three cuts | top-1, % |\n|---|---|")
    for regrow, rows in found.items():
        more = f" ± {100 * statistics.stdev(rows):.1f}" if len(rows) > 1 else ""
        print(f"| {'with' if regrow else 'without'} regrowth | {100 * statistics.mean(rows):.1f}{more} |")


if __name__ == "__main__":
    main()

"""What should batch norms remember after a cut? EfficientNet-Lite0 at 80 % of its MACs, not trained, label-free:

    python -m xedge.benchmarks.batch_norm PHOTOGRAPHS

with and without folding; running statistics kept, re-estimated on the calibration images, or matched to what each norm
gave before the cut (`xedge.batchnorm`). Judged by agreement with the original on held-out pictures.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import nn

from xedge.batchnorm import input_statistics, match_batch_norm
from xedge.benchmarks.results import PHOTOGRAPHS
from xedge.benchmarks.zoo import efficientnet_lite0
from xedge.choose import costs_of, score_all
from xedge.criteria import fback, taylor
from xedge.data import Images, batches, fitting
from xedge.fold import fold
from xedge.groups import find_groups
from xedge.load import load_data
from xedge.metrics import agreement, kl, macs
from xedge.observe import observe
from xedge.plan import allocate
from xedge.prune import cut
from xedge.teacher import Teacher
from xedge.train import predict

IMAGES = 384


@torch.no_grad()
def re_estimate(model: nn.Module, images: Images) -> None:
    """The usual way: running statistics as a plain average over calibration batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    for x, _ in batches(images, fitting(images[0][0].shape), limit=IMAGES, shuffle_seed=0):
        model(x)
    model.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    data = load_data(f"folder:{arguments.photographs}?{PHOTOGRAPHS}", root=None, seed=0)
    model = efficientnet_lite0()
    base, _ = predict(model, data.val)
    groups = find_groups(model, torch.stack([data.train[0][0]]))
    images = batches(data.train, fitting(data.shape, gradients=True), shuffle_seed=0, limit=IMAGES)
    seen = observe(model, groups, images, Teacher("logits", base.shape[1]), gradients=True)
    scores, felt = score_all(fback.score, groups, seen), score_all(taylor.score, groups, seen)
    costs, total = costs_of(model, data.shape, groups), macs(model, data.shape).total
    target = 0.8 * total
    sizes = {name: groups[name].size for name in scores}
    keep = allocate(scores, costs, target, originals=sizes, align=8, between=felt)
    statistics = input_statistics(model, data.train, limit=IMAGES)
    print("| folding | running statistics | same top-1 as the original | KL |\n|---|---|---|---|")
    for folding in (False, True):
        whole = fold(model, groups, keep, seen) if folding else model
        for way in ("kept", "re-estimated", "matched"):
            small = cut(copy.deepcopy(whole), groups, keep)
            if way == "re-estimated":
                re_estimate(small, data.train)
            elif way == "matched":
                match_batch_norm(small, model, groups, keep, statistics, data.train, limit=IMAGES)
            logits, _ = predict(small, data.val)
            row = f"{agreement(logits, base):.1%} of {len(base)} | {kl(base, logits):.3f}"
            print(f"| {'yes' if folding else 'no'} | {way} | {row} |", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

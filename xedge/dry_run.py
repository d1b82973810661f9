"""`xedge compress --dry-run`: groups, plan and predicted cost. Nothing is written, nothing is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from xedge import load
from xedge.choose import HOWS, costs_of, score_all
from xedge.criteria import greedy, taylor
from xedge.data import at_once, batches, enough
from xedge.errors import UsageError
from xedge.groups import find_groups
from xedge.metrics import macs
from xedge.observe import observe
from xedge.plan import allocate, reachable
from xedge.progress import Talk
from xedge.request import Request, load_everything
from xedge.subpixel import rewrite_subpixels


def dry_run(request: Request, talk: Talk | None = None) -> dict[str, Any]:
    """Groups, plan and predicted cost. Nothing is written, nothing is trained."""
    talk = talk or Talk(quiet=True)
    if request.latency is not None:
        raise UsageError("--dry-run measures nothing, and --latency is planned by measurement", fix="leave one out")
    loaded = load_everything(request)
    original = loaded.model.eval()
    if request.rewrite_subpixel:
        original = rewrite_subpixels(original, [torch.stack([loaded.data.train[0][0]])])[0]
    groups = find_groups(
        original, torch.stack([loaded.data.train[0][0]]), exclude=request.exclude, prune_stem=request.prune_stem
    )
    costs = costs_of(original, loaded.data.shape, groups)
    total = macs(original, loaded.data.shape).total
    align = loaded.settings.align
    sizes = {g.name: (g.size, g.size) for g in groups.free}
    least = reachable(costs, sizes, align)
    budget = loaded.settings.budget
    goal = (budget.macs if budget.macs is not None else least / total) * total
    talk.say("ranking channels" if not loaded.trained_here else "untrained: equal shares of every layer")
    ranks: dict[str, Any] = {"uniform": None}
    if loaded.trained_here:
        scores = {g.name: np.ones(g.size) for g in groups.free if g.consumers}
    else:
        train = loaded.data.train
        images = batches(train, at_once(train, gradients=True), shuffle_seed=request.seed, limit=enough(train, 256))
        observed = observe(original, groups, images, loaded.teacher, gradients=True, seed=request.seed)
        scores = score_all(load.load_criterion(request.criterion), groups, observed)
        ranks |= {"global": scores, "di": score_all(greedy.score, groups, observed)}
        ranks |= {"taylor": score_all(taylor.score, groups, observed)}
    plans = {}
    whole = {g.name: g.size for g in groups.free}
    for how in [h for h in HOWS if h in ranks and request.allocation in (None, h)]:
        keep = allocate(scores, costs, goal, originals=whole, align=align, between=ranks[how])
        left = costs.total({n: int((~k).sum()) for n, k in keep.items()})
        plans[how] = {"macs": left, "keep": {n: int(k.sum()) for n, k in keep.items()}}
    return {
        "model": request.model,
        "data": loaded.data.name,
        "targets": [t.name for t in loaded.targets],
        "align": align,
        "macs": total,
        "least_macs": least,
        "trained": not loaded.trained_here,
        "groups": [
            {
                "name": g.name,
                "channels": g.size,
                "stem": g.stem,
                "producers": list(g.producers),
                "consumers": list(g.consumers),
            }
            for g in groups.free
        ],
        "frozen": [list(row) for row in groups.frozen],
        "plans": plans,
    }

"""One cut: rank the channels, try the allocations on held-back training data, take the best.

Everything here reads training data only: `train` to rank, `select` (held back from it) to choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from xedge import load
from xedge.batchnorm import input_statistics
from xedge.criteria import Criterion, greedy, taylor
from xedge.data import Data, at_once, batches, enough, spread
from xedge.energy import energy_path
from xedge.errors import UsageError
from xedge.groups import Groups
from xedge.judge import Judge
from xedge.metrics import macs
from xedge.observe import Observed, observe
from xedge.plan import Budget, CostModel, Costs, Keep, allocate, reachable
from xedge.refit import cut_and_fold, head
from xedge.teacher import Teacher
from xedge.train import predict

RANKED = 1024
"""Training images that rank the channels."""
FELT = 512
"""Of these, images whose gradients are taken."""
CHOSEN = 1024
"""Images of `select` that compare allocations."""
HOWS = ("uniform", "global", "di", "taylor")
"""How many channels each group loses: the same part of each; by the criterion's own scores, by the exact greedy losses
of DI, or by Taylor's, each for the multiply-adds or the time it saves."""
UNTRIED = ("uniform",)
"""For nets that restore pictures and are trained after the cut: their loss before it says little of the loss after."""
STOPS = ("budget", "energy")
"""What ends the iteration: the budget and the floor, or structural energy and the floor."""
BISECTIONS = 6


@dataclass(frozen=True)
class Settings:
    """What decides the iteration, besides the model and the data."""

    criterion: str
    budget: Budget
    align: int
    epochs: int
    iterations: int
    lr: float
    seed: int
    batch: int
    fold: bool = True
    allocation: str | None = None
    stop: str = "budget"
    smoothing: float = 0.0
    distill: float = 0.0
    step: float | None = None


@dataclass(frozen=True)
class Choice:
    """One cut, chosen among allocations.

    Attributes:
        keep: masks over the channels that are there now.
        how: the allocation.
        tried: what each allocation costs on held-back training data: cross-entropy, or KL from the original.
        scores: the criterion's.
        observed: the statistics that it scored.
        free: masks of the same allocation without the target's widths, or None where any width will do.
        sequential: whether folding layer by layer did better on held-back training data than by the moments alone.
    """

    keep: Keep
    how: str
    tried: dict[str, float]
    scores: dict[str, Any]
    observed: Observed
    free: Keep | None
    sequential: bool


def choose(
    model: nn.Module,
    now: Groups,
    data: Data,
    teacher: Teacher,
    settings: Settings,
    costs: CostModel,
    target: float,
    base_logits: Tensor,
    originals: Mapping[str, int],
) -> Choice | None:
    """Rank the channels, try the allocations (or the one that is named) on held-back training data, take the best.

    Args:
        model: the net as it is now.
        now: its groups.
        data: its training part ranks, `select` compares.
        teacher: of the discriminant information.
        settings: criterion, allocation, align, stop.
        costs: of the net as it is.
        target: what to reach, in their unit.
        base_logits: the original's answers on `select`.
        originals: group -> channels the original had.

    Returns:
        None where no channel may go.
    """
    observed = observe_training(model, now, data, teacher, settings, gradients=True)
    scores = score_all(load.load_criterion(settings.criterion), now, observed)
    sizes = {n: originals[n] for n in scores}
    ends = {n: (now[n].size, sizes[n]) for n in scores}
    reach = reachable(costs, ends, settings.align)
    if reach >= costs.total({}) or not scores:
        return None
    target = max(target, reach)  # an iteration may have to stop short; the loop ends when nothing more goes
    hows = HOWS if settings.allocation is None else (settings.allocation,)
    if settings.allocation is None and data.restores and settings.epochs:
        hows = UNTRIED
    ranks = {
        "global": scores,
        "di": score_all(greedy.score, now, observed) if "di" in hows else None,
        "taylor": score_all(taylor.score, now, observed) if "taylor" in hows else None,
    }
    judge = Judge.of(data)
    statistics = input_statistics(model, data.train)
    count = judge.held(min(enough(data.train, CHOSEN), len(data.select)))

    def felt(keep: Keep, *, sequential: bool = False) -> tuple[float, float]:
        """Loss and quality on held-back data once the cut is folded, before any training."""
        folds = observed if settings.fold else None
        small = cut_and_fold(model, now, keep, data.train, statistics, folds, sequential=sequential)
        logits, y = predict(small, data.select, limit=count)
        reference = base_logits[spread(len(base_logits), count)]
        return judge.dislike(logits, y, reference), judge.quality(logits, y, reference)

    if settings.stop == "energy":
        _, y = predict(model, data.select, limit=count)
        reference = base_logits[spread(len(base_logits), count)]
        return _by_energy(now, costs, settings, scores, observed, sizes, felt, judge.quality(reference, y, reference))

    def by(how: str, align: int) -> Keep:
        return allocate(scores, costs, target, originals=sizes, align=align, between=ranks.get(how))

    tried: dict[str, tuple[float, Keep]] = {}
    for how in hows:
        keep = by(how, settings.align)
        same = next((t for t in tried.values() if all((t[1][n] == k).all() for n, k in keep.items())), None)
        if not all(k.all() for k in keep.values()):
            tried[how] = same or (felt(keep)[0], keep)
    if not tried:
        return None
    chosen = min(tried, key=lambda h: (tried[h][0] if math.isfinite(tried[h][0]) else math.inf, h))
    # Measured milliseconds need not fall with every channel: widths of any size may not get as far as aligned ones.
    free = by(chosen, 1) if settings.align > 1 and reachable(costs, ends, 1) <= target else None
    losses = {h: t[0] for h, t in tried.items()}
    if settings.fold and head(data.train):
        losses["sequential"] = felt(tried[chosen][1], sequential=True)[0]
    sequential = losses.get("sequential", math.inf) < losses[chosen]
    return Choice(tried[chosen][1], chosen, losses, scores, observed, free, sequential)


def _by_energy(
    now: Groups,
    costs: CostModel,
    settings: Settings,
    scores: dict[str, Any],
    observed: Observed,
    originals: Mapping[str, int],
    felt: Callable[..., tuple[float, float]],
    base: float,
) -> Choice | None:
    """Widths where each group's structural energy is highest (Eqs 16-23).

    lambda of a group is a share tau of the mean information of its channels; tau is the largest, found by bisection on
    held-back training data, at which the cut and folded net is still within the allowed drop before it is trained.
    """
    floor = base - (settings.budget.max_drop or 0.0)
    paths = {}
    for name in scores:
        taps = [seen.pooled.select(np.arange(c.start, c.stop)) for seen, c in observed.of(now[name])]
        paths[name] = energy_path(taps, observed.teacher, 0.0).di

    def at(tau: float) -> Keep:
        keep = {}
        for name, di in paths.items():
            left = now[name].size - np.arange(now[name].size)
            energy = di[:-1] - tau * di[0] / now[name].size * left
            stays = int(left[energy >= energy.max() - 1e-12][-1])
            steps = costs.widths(name, now[name].size, originals[name], settings.align)
            width = min((w for w in steps if w >= stays), default=steps[0])
            mask = np.ones(now[name].size, bool)
            mask[np.argsort(scores[name], kind="stable")[: len(mask) - width]] = False
            keep[name] = mask
        return keep

    low, high = 0.0, 1.0
    tried: dict[str, float] = {}
    found: Keep | None = None
    for _ in range(BISECTIONS):
        tau = (low + high) / 2
        keep = at(tau)
        loss, good = felt(keep, sequential=settings.fold)
        tried[f"energy {tau:.3f}"] = loss
        if good >= floor:
            low, found = tau, keep
        else:
            high = tau
    if found is None or all(k.all() for k in found.values()):
        return None
    return Choice(found, f"energy {low:.3f}", tried, scores, observed, None, settings.fold)


def score_all(criterion: Criterion, groups: Groups, observed: Observed) -> dict[str, Any]:
    """Scores of every group that can be cut and is seen by a consumer."""
    scores = {}
    for g in groups.free:
        if observed.of(g):
            s = criterion(g, observed, np.ones(g.size, bool))
            if s.shape != (g.size,) or not np.isfinite(s).all():
                raise UsageError(f"the criterion gave {s.shape} scores, some not finite", where=g.name, fix="check it")
            scores[g.name] = s
    return scores


def costs_of(model: nn.Module, shape: tuple[int, ...], groups: Groups) -> Costs:
    """MACs of the model as it is, by layer and group."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    count = macs(model, shape)
    return Costs.of(count.layers, shapes, groups, count.total)


def observe_training(
    model: nn.Module, groups: Groups, data: Data, teacher: Teacher, settings: Settings, *, gradients: bool
) -> Observed:
    size, felt = at_once(data.train, gradients=gradients), enough(data.train, FELT)
    images = batches(data.train, size, shuffle_seed=settings.seed, limit=enough(data.train, RANKED))
    return observe(model, groups, images, teacher, gradients=gradients, felt=felt, seed=settings.seed)

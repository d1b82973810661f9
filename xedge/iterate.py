"""PS-iteration (Algorithm 1 of the paper): cut the channels that matter least, train, measure, repeat.

Everything here reads training data only: `train` to rank and to fine-tune, `select` (held back from it) to choose
between allocations and to hold the accuracy floor. Each iteration writes two sealed files, the plan and the weights.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xedge.batchnorm import input_statistics
from xedge.choose import Settings, choose, observe_training
from xedge.criteria.di import EPS, scale, solve
from xedge.data import Data
from xedge.groups import Groups
from xedge.judge import Judge
from xedge.meter import Meter
from xedge.metrics import agreement, macs
from xedge.observe import Observed
from xedge.plan import CostModel, Keep, loss_of
from xedge.progress import Talk
from xedge.prune import apply_spec, cut_spec, prune
from xedge.refit import cut_and_fold
from xedge.run import Run, read_json
from xedge.teacher import Teacher
from xedge.train import Recipe, fit, predict

STEP = 0.15
"""Without a budget each iteration takes this part of what is left."""


@dataclass(frozen=True)
class Result:
    """The best model that satisfies the floor.

    Attributes:
        keep: over the original's channels.
        groups: of the original, with what the certificate put back frozen.
        weights: the iteration's file, or None when the original itself is the best.
        records: one for the original and one for each iteration.
        stopped_by: ``budget``, ``floor``, ``energy`` or ``widths`` (nothing more can be cut), and why.
        chosen: index of the iteration that is returned.
    """

    model: nn.Module
    keep: Keep
    groups: Groups
    records: tuple[dict[str, Any], ...]
    stopped_by: str
    reason: str
    chosen: int


def compose(total: Keep, then: Mapping[str, Any]) -> Keep:
    """Masks over the original's channels after a further cut of what `total` left."""
    out = {name: mask.copy() for name, mask in total.items()}
    for name, mask in then.items():
        left = np.flatnonzero(out[name])
        out[name][left[~np.asarray(mask, bool)]] = False
    return out


def information(observed: Observed, groups: Groups, keep: Keep | None = None) -> dict[str, float]:
    """DI of each group's channels relative to the most there can be, averaged over its taps; of the kept ones only
    when `keep` is given."""
    out = {}
    for g in groups.free:
        parts = []
        for seen, columns in observed.of(g):
            index = np.arange(columns.start, columns.stop)
            m = seen.pooled.select(index if keep is None else index[keep[g.name]])
            parts.append(solve(m, observed.teacher, EPS, standardise=True).di / scale(m, observed.teacher))
        if parts:
            out[g.name] = float(np.mean(parts))
    return out


def ps_iteration(
    run: Run,
    factory: Callable[[], nn.Module],
    original: nn.Module,
    weights: Path,
    groups: Groups,
    groups_file: Path,
    data: Data,
    teacher: Teacher,
    settings: Settings,
    meter: Meter,
    talk: Talk,
) -> Result:
    """Cut and train until the budget, of MACs or of time, is met or the accuracy on `select` falls below the floor.

    Raises:
        UsageError: no widths reach the MACs budget.
        LatencyMissed: none reach the latency budget, by the table.
    """
    judge = Judge.of(data)
    total_macs = macs(original, data.shape).total
    held = judge.held(len(data.select))
    base_logits, labels = predict(original, data.select, limit=held)
    base = judge.quality(base_logits, labels, base_logits)
    floor = None if settings.budget.max_drop is None else base - settings.budget.max_drop
    records: list[dict[str, Any]] = [
        {
            "index": 0, "macs": total_macs, "quality": base, "agreement": None if judge.restores else 1.0,
            "allocation": "", "di": None, "seconds": 0.0, "put_back": [], "certificate": None, "price": None,
        }
    ]  # fmt: skip
    total: Keep = {g.name: np.ones(g.size, bool) for g in groups.groups}
    first = spent = meter.spent(0, original, weights)
    goal = None if meter.goal is None else meter.goal / first.cost
    meter.check(original, groups, settings.align, spent)
    records[0]["spent"] = spent.words
    sizes_before = {g.name: g.size for g in groups.groups}
    best = (original, total, 0)
    current, stopped, reason = original, "budget", "no budget below the original was asked"
    index = 0
    previous: Path = weights
    while index < settings.iterations if settings.stop == "energy" else _over(spent.cost, meter.goal):
        index += 1
        aimed = None if goal is None else goal * meter.aim
        target = _next(spent.cost / first.cost, aimed, settings, index) * first.cost * (spent.typical / spent.cost)
        inputs = {"weights": previous, "groups": groups_file, "target": target, **_facts(settings), "data": data.name}
        now, model = groups.after(total), current
        costs = meter.costs(model, now, spent)

        def plan(
            path: Path,
            now: Groups = now,
            model: nn.Module = model,
            costs: CostModel = costs,
            target: float = target,
            i: int = index,
        ) -> None:
            record = _plan(model, now, data, teacher, settings, costs, target, base_logits, sizes_before, talk, i)
            path.write_text(json.dumps(record, sort_keys=True) + "\n")

        plan_file = run.step(f"prune/{index:03d}.json", inputs, plan)
        record = read_json(plan_file)
        if not record["cut"]:
            stopped, reason = "widths", "no channel is left that may be cut"
            if settings.stop == "energy":
                stopped, reason = "energy", "no channel is left whose information is below its price"
            break
        groups = groups.freeze({name: why for name, why in record["put_back"] if name in groups})
        then = {n: _mask(kept, now[n].size) for n, kept in record["keep"].items()}
        predicted = costs.words(costs.total({n: int((~mask).sum()) for n, mask in then.items()}))
        total = compose(total, then)

        def tune(
            path: Path,
            then: Keep = then,
            now: Groups = now,
            model: nn.Module = model,
            index: int = index,
            sequential: bool = record["sequential"],
        ) -> None:
            started = time.monotonic()
            statistics = input_statistics(model, data.train)
            seen = observe_training(model, now, data, teacher, settings, gradients=False) if settings.fold else None
            small = cut_and_fold(model, now, then, data.train, statistics, seen, sequential=sequential)
            recipe = Recipe(
                epochs=settings.epochs, lr=settings.lr, batch=settings.batch, seed=settings.seed + index,
                smoothing=settings.smoothing, distill=settings.distill if judge.taught else 1.0,
                frozen_norms=judge.restores or not judge.taught,
            )  # fmt: skip
            checkpoint = run.folder / "prune" / f".{index:03d}.checkpoint.safetensors"
            untrained = copy.deepcopy(small)
            fit(small, data, recipe, original=original, checkpoint=checkpoint, talk=talk, what=f"iteration {index}")
            logits, y = predict(small, data.select, limit=held)
            if settings.epochs:
                first, _ = predict(untrained, data.select, limit=held)
                if judge.quality(first, y, base_logits) > judge.quality(logits, y, base_logits):
                    talk.say("  training made it worse on held-back data and is undone")
                    small, logits = untrained, first
            meta = {
                "macs": macs(small, data.shape).total,
                "quality": judge.quality(logits, y, base_logits),
                "agreement": None if judge.restores else agreement(logits, base_logits),
                "seconds": time.monotonic() - started,
            }
            tensors = {k: v.detach().clone().contiguous() for k, v in small.state_dict().items()}
            save_file(tensors, path, {"record": json.dumps(meta)})
            checkpoint.unlink(missing_ok=True)

        tune_inputs = {"weights": previous, "plan": plan_file, **_facts(settings), "data": data.name}
        previous = run.step(f"prune/{index:03d}.safetensors", tune_inputs, tune)
        with safe_open(previous, "pt") as f:
            meta = json.loads(f.metadata()["record"])
        seconds = meta["seconds"] + record["seconds"]
        current = restore(factory(), groups, total, previous)
        spent = meter.spent(index, current, previous)
        kept_facts = {k: v for k, v in record.items() if k not in ("keep", "cut")}
        records.append({**kept_facts, **meta, "seconds": seconds, "predicted": predicted, "spent": spent.words})
        talk.say(
            f"  iteration {index}: {spent.words}, {judge.kind} on held-back training data "
            f"{judge.say(meta['quality'])} (original {judge.say(base)}), allocation {record['allocation']}"
        )
        if floor is not None and meta["quality"] < floor - 1e-12:
            stopped = "floor"
            reason = (
                f"iteration {index} fell to {judge.say(meta['quality'])} on held-back data, "
                f"below the floor of {judge.say(floor)}"
            )
            break
        best = (current, total, index)
        reason = f"the budget was met at {spent.words}"
        if settings.stop == "energy":
            stopped, reason = "energy", f"{index} iterations by structural energy were done"
    return Result(best[0], best[1], groups, tuple(records), stopped, reason, best[2])


def _over(now: float, goal: float | None) -> bool:
    return goal is None or now > goal * (1 + 1e-9)


def _facts(settings: Settings) -> dict[str, Any]:
    return {"settings": {**settings.__dict__, "budget": settings.budget.__dict__}}


def _mask(kept: list[int], size: int) -> Any:
    mask = np.zeros(size, bool)
    mask[kept] = True
    return mask


def _next(now: float, goal: float | None, settings: Settings, index: int) -> float:
    """The next fraction of the original's cost: a fixed part less, or equal ratios to the goal."""
    if goal is None or settings.step is not None:
        return max(goal or 0.0, now * (1 - (settings.step or STEP)))
    left = max(1, settings.iterations - index + 1)
    return max(goal, now * (goal / now) ** (1 / left)) if now > goal else goal


def _plan(
    model: nn.Module,
    now: Groups,
    data: Data,
    teacher: Teacher,
    settings: Settings,
    costs: CostModel,
    target: float,
    base_logits: Tensor,
    originals: Mapping[str, int],
    talk: Talk,
    index: int,
) -> dict[str, Any]:
    """One iteration's choice, as JSON."""
    started = time.monotonic()
    talk.say(f"  iteration {index}: ranking channels by {settings.criterion}")
    choice = choose(model, now, data, teacher, settings, costs, target, base_logits, originals)
    if choice is None:
        return {"cut": False}
    proven = prune(model, now, choice.keep, torch.stack([data.train[0][0]]))
    price = None
    if choice.free is not None:
        whole = sum(float(s.sum()) for s in choice.scores.values()) or 1.0
        price = {
            "align": settings.align,
            "aligned": loss_of(choice.scores, choice.keep) / whole,
            "free": loss_of(choice.scores, choice.free) / whole,
        }
    before, after = information(choice.observed, now), information(choice.observed, now, proven.keep)
    return {
        "cut": any(not k.all() for k in proven.keep.values()),
        "index": index,
        "keep": {n: np.flatnonzero(k).tolist() for n, k in proven.keep.items()},
        "put_back": [list(row) for row in proven.put_back],
        "certificate": proven.certificate.__dict__,
        "allocation": choice.how,
        "candidates": choice.tried,
        "sequential": choice.sequential,
        "price": price,
        "di": {n: [before[n], after[n]] for n in before},
        "seconds": time.monotonic() - started,
    }


def restore(model: nn.Module, groups: Groups, keep: Keep, weights: Path) -> nn.Module:
    """The cut architecture with a file's weights, in eval mode."""
    small = apply_spec(copy.deepcopy(model), cut_spec(groups, keep))
    small.load_state_dict(load_file(weights))
    return small.eval()

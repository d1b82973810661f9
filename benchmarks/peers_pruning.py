"""Pruning methods side by side: the same base weights, MACs, ranking images and fine-tuning for all.

    python -m xedge.benchmarks.peers_pruning OUT lenet5 resnet20 efficientnet --photographs DIR

xedge as it comes; the paper's own method (labels, DiLOSS, the same part of every layer, no folding); and importances of
torch-pruning (pip install torch-pruning) in its pruner's default use, at the ratio that meets the same MACs. One cut,
the stem like any other layer, judged before and after the same short fine-tuning. Without labels every method is tuned
twice, with its batch norms' running statistics free and frozen, and keeps what held-back pictures prefer: a net whose
norms were left as they were needs the one, a net whose norms were matched the other. Rows that are there are not
measured again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Subset

from xedge import load
from xedge.batchnorm import input_statistics
from xedge.benchmarks.results import PHOTOGRAPHS
from xedge.benchmarks.rows import Rows
from xedge.benchmarks.zoo import efficientnet_lite0
from xedge.choose import Settings, choose, costs_of
from xedge.data import Data, at_once, batches
from xedge.groups import find_groups
from xedge.judge import charbonnier
from xedge.metrics import agreement, kl, macs, topk
from xedge.plan import Budget
from xedge.refit import cut_and_fold
from xedge.teacher import choose_teacher
from xedge.train import Recipe, fit, predict

HESSIAN = 128
"""Images for torch-pruning's Hessian importance, which takes a backward pass an image."""


@dataclass(frozen=True)
class Case:
    """What all methods share.

    Attributes:
        macs: fraction of the MACs to keep.
        align: widths are multiples of this.
        base_epochs: of the built-in model's own training.
        images: training images of one epoch of fine-tuning.
        felt: images whose gradients are taken.
    """

    macs: float
    align: int
    base_epochs: int
    images: int
    lr: float
    felt: int


CASES = {
    "lenet5": Case(0.15, 1, 4, 20_000, 0.02, 512),
    "resnet20": Case(0.4, 1, 2, 20_000, 0.02, 512),
    "efficientnet": Case(0.8, 8, 0, 256, 0.002, 256),
}
OURS = {
    "xedge": {},
    "paper": {"criterion": "diloss", "allocation": "uniform", "fold": False},
}
THEIRS = ("MagnitudeImportance", "TaylorImportance", "BNScaleImportance", "FPGMImportance", "HessianImportance")
METHODS = (*OURS, *(f"torch-pruning {name.removesuffix('Importance')}" for name in (*THEIRS, "RandomImportance")))


def ours(model: nn.Module, data: Data, case: Case, seed: int, options: dict[str, Any]) -> nn.Module:
    """One cut by xedge."""
    chosen: dict[str, Any] = {"criterion": "fback", "fold": True, **options}
    settings = Settings(
        budget=Budget(case.macs), align=case.align, epochs=1, iterations=1, lr=case.lr, seed=seed, batch=128, **chosen
    )
    groups = find_groups(model, torch.stack([data.train[0][0]]), prune_stem=True)  # as torch-pruning does
    base, _ = predict(model, data.select)
    teacher = choose_teacher(None, data, base.shape[1])
    target = case.macs * macs(model, data.shape).total
    sizes = {g.name: g.size for g in groups.groups}
    costs = costs_of(model, data.shape, groups)
    choice = choose(model, groups, data, teacher, settings, costs, target, base, sizes)
    assert choice is not None
    print(f"    allocation {choice.how}, {choice.tried}", flush=True)
    observed = choice.observed if settings.fold else None
    kept = input_statistics(model, data.train) if settings.fold else {}
    return cut_and_fold(model, groups, choice.keep, data.train, kept, observed, sequential=choice.sequential)


def theirs(model: nn.Module, data: Data, case: Case, seed: int, name: str) -> nn.Module:
    """One cut by torch-pruning: the pruner's defaults, the net's outputs left alone, the ratio by bisection."""
    import torch_pruning as tp

    example = torch.stack([data.train[0][0]])
    goal = case.macs * macs(model, data.shape).total
    torch.manual_seed(seed)

    def pruned(copied: nn.Module, importance: Any, ratio: float) -> nn.Module:
        heads = [m for m in copied.modules() if isinstance(m, nn.Conv2d if data.restores else nn.Linear)][-1:]
        pruner = tp.pruner.BasePruner(
            copied, example, importance, pruning_ratio=ratio, ignored_layers=heads,
            round_to=case.align if case.align > 1 else None,
        )  # fmt: skip
        pruner.step()
        return copied

    low, high = 0.0, 0.95  # the widths depend on the ratio alone
    for _ in range(9):
        ratio = (low + high) / 2
        small = pruned(copy.deepcopy(model), tp.importance.MagnitudeImportance(), ratio)
        low, high = (ratio, high) if macs(small, data.shape).total > goal else (low, ratio)
    work = copy.deepcopy(model).eval()
    importance = getattr(tp.importance, name)()
    if name in ("TaylorImportance", "HessianImportance"):
        single = name == "HessianImportance"
        size = 1 if single else at_once(data.train, gradients=True)
        for x, y in batches(
            data.train, size, shuffle_seed=seed, limit=min(HESSIAN, case.felt) if single else case.felt
        ):
            if single:
                work.zero_grad()
            torch.autograd.backward(_loss(work(x), y, data))
            if single:
                importance.accumulate_grad(work)
    return pruned(work, importance, high)


def _loss(out: Tensor, y: Tensor, data: Data) -> Tensor:
    if data.restores:
        return charbonnier(out - y).sum()
    target = y if data.classes is not None else out.argmax(1)  # without labels the net's own answer
    return nn.functional.cross_entropy(out, target, reduction="sum")


def judge(model: nn.Module, data: Data, base: Tensor) -> dict[str, float]:
    """On validation data: top-1, or agreement with the original and KL from it."""
    logits, labels = predict(model, data.val)
    if data.classes is not None:
        return {"top1": topk(logits, labels)}
    return {"agreement": agreement(logits, base), "kl": kl(base, logits)}


def measure(name: str, method: str, seed: int, model: nn.Module, data: Data) -> dict[str, Any]:
    """One row."""
    case = CASES[name]
    base, _ = predict(model, data.val)
    started = time.monotonic()
    if method in OURS:
        small = ours(model, data, case, seed, OURS[method])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = theirs(model, data, case, seed, f"{method.split()[1]}Importance")
    row = {
        "net": name,
        "method": method,
        "seed": seed,
        "seconds": time.monotonic() - started,
        "macs": macs(small, data.shape).total / macs(model, data.shape).total,
        "base": judge(model, data, base),
        "before": judge(small, data, base),
    }
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[: case.images]
    part: Any = Subset(data.train, chosen.tolist())  # type: ignore[arg-type]
    labelled = data.classes is not None
    recipe = Recipe(epochs=1, lr=case.lr, batch=128 if labelled else 16, seed=seed, distill=0.0 if labelled else 1.0)
    if labelled:
        fit(small, replace(data, train=part), recipe, original=model)
        return {**row, "after": judge(small, data, base)}
    held, _ = predict(model, data.select)
    tuned = []
    for frozen in (False, True):
        copied = copy.deepcopy(small)
        fit(copied, replace(data, train=part), replace(recipe, frozen_norms=frozen), original=model)
        tuned.append((kl(held, predict(copied, data.select)[0]), frozen, copied))
    divergence, frozen, best = min(tuned, key=lambda t: t[0])
    return {**row, "frozen norms": frozen, "held back": divergence, "after": judge(best, data, base)}


def base_data(name: str, seed: int, photographs: Path | None) -> Data:
    """Fashion-MNIST, or for EfficientNet-Lite0 about 3000 crops of photographs, as many of each."""
    if name != "efficientnet":
        return load.load_data("fashion-mnist", root=None, seed=seed)
    if photographs is None:
        sys.exit("efficientnet needs --photographs DIR")
    crops = max(1, round(3000 / max(1, len(list(photographs.glob("*.png"))))))
    spec = PHOTOGRAPHS.replace("crops=10", f"crops={crops}")
    return load.load_data(f"folder:{photographs}?{spec}", root=None, seed=seed)


def base_model(name: str, seed: int, data: Data, out: Path) -> nn.Module:
    """The pretrained net, or a built-in one trained once and kept in OUT."""
    if name == "efficientnet":
        return efficientnet_lite0()
    torch.manual_seed(seed)
    model = load.load_model(name, classes=data.classes, channels=data.shape[0])
    path = out / f"{name}-{seed}.safetensors"
    if not path.exists():
        fit(model, data, Recipe(epochs=CASES[name].base_epochs, lr=0.05, batch=128, seed=seed))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model.eval()


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and deviation over seeds."""
    keys = list(rows[0]["before"])
    form: Callable[[str, float], str] = lambda k, v: f"{v:.3f}" if k == "kl" else f"{100 * v:.1f}"  # noqa: E731

    def cell(found: list[dict[str, Any]], when: str, key: str) -> str:
        values = [r[when][key] for r in found]
        more = f" ± {form(key, statistics.stdev(values))}" if len(values) > 1 else ""
        return form(key, statistics.mean(values)) + more

    heads = [f"{key} {when}" for when in ("before", "after") for key in keys]
    lines = [f"| {name} | MACs, % | {' | '.join(heads)} | seconds to prune |", "|---" * (len(heads) + 3) + "|"]
    whole = rows[:1] if keys[0] != "top1" else list({r["seed"]: r for r in rows}.values())
    lines.append(f"| original | 100 | {' | '.join(cell(whole, 'base', k) for k in keys * 2)} | |")
    for method in METHODS:
        found = [r for r in rows if r["method"] == method]
        if found:
            cells = [cell(found, when, key) for when in ("before", "after") for key in keys]
            part = 100 * statistics.mean(r["macs"] for r in found)
            seconds = statistics.mean(r["seconds"] for r in found)
            lines.append(f"| {method} | {part:.1f} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("nets", nargs="+", choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--photographs", type=Path, help="folder made by python -m xedge.benchmarks.photographs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(arguments.out / "rows.jsonl")
    for name in arguments.nets:
        for seed in range(1 if name == "efficientnet" else arguments.seeds):
            data = base_data(name, seed, arguments.photographs)
            model = base_model(name, seed, data, arguments.out)
            for method in METHODS:
                if rows.has(net=name, method=method, seed=seed):
                    continue
                if "BNScale" in method and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
                    continue
                rows.add(measure(name, method, seed, copy.deepcopy(model), data))
        print("\n" + table(name, [r for r in rows.done if r["net"] == name]) + "\n", flush=True)


if __name__ == "__main__":
    main()

"""Ordinary training: the base of a built-in model, and the P-phase between two cuts.

Runs under `accelerate launch` unchanged. Every epoch is checkpointed in safetensors, and the order of the data and the
augmentation depend on (seed, epoch) alone, so a killed run that goes on gives the same weights as one that was not.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xedge.data import Data, Images, at_once, batches, loader
from xedge.errors import InternalError, UsageError
from xedge.judge import Judge, charbonnier
from xedge.run import write_atomically

if TYPE_CHECKING:
    from xedge.progress import Talk


@dataclass(frozen=True)
class Recipe:
    """How to train: nets that classify by SGD on cross-entropy, nets that restore pictures by Adam on Charbonnier's
    loss, a smooth mean absolute error (Lai et al., CVPR 2017).

    Attributes:
        epochs: passes over the training data.
        lr: the highest learning rate; warm-up over the first tenth, then a cosine to zero.
        batch: images a step.
        momentum: of SGD with Nesterov's step.
        weight_decay: on weights of two and more dimensions; Adam uses none.
        smoothing: label smoothing.
        distill: weight of the original's softened answers (KL) against the labels; 1 without labels. Of pictures, of
            the original's pictures against the true ones.
        temperature: of the distillation.
        frozen_norms: batch norms keep their running statistics and normalise with them: a few pictures without labels
            are not the data that the net was trained on, and their statistics would take the place of that data's; and
            of nets that restore pictures the noise of a small batch's statistics costs tenths of a decibel.
        seed: of the order and the augmentation.
    """

    epochs: int
    lr: float = 0.02
    batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 2.0
    frozen_norms: bool = False
    seed: int = 0


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    original: nn.Module | None = None,
    checkpoint: Path | None = None,
    talk: Talk | None = None,
    what: str = "training",
) -> nn.Module:
    """Train `model` in place on `data.train` and return it in eval mode.

    Args:
        model: the net.
        data: only its training part is read.
        recipe: how.
        original: the net whose answers teach, where the recipe distils or the data have no labels.
        checkpoint: a file written after each epoch and read at the start.
        talk: says what goes on.
        what: its name there.

    Raises:
        UsageError: the loss is no longer finite.
    """
    if recipe.epochs <= 0:
        return model.eval()
    judge = Judge.of(data)
    if not judge.taught and original is None:
        raise InternalError("data without labels need the original as teacher")
    set_seed(recipe.seed % 2**32)  # numpy takes no more
    accelerator = Accelerator()
    optimizer = _optimizer(model, recipe, judge)
    start = restore(checkpoint, model, optimizer, recipe) if checkpoint is not None else 0
    model.to(memory_format=torch.channels_last)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if original is not None:
        original = accelerator.prepare_model(original.eval(), evaluation_mode=True)
    steps = max(1, math.ceil(len(data.train) / recipe.batch / accelerator.num_processes))
    total, warm = recipe.epochs * steps, max(1, recipe.epochs * steps // 10)
    for epoch in range(start, recipe.epochs):
        wrapped.train()
        if recipe.frozen_norms:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        shuffled = accelerator.prepare(loader(data.train, recipe.batch, recipe.seed, epoch))
        draw = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
        torch.manual_seed(recipe.seed * 100_003 + epoch)  # dropout
        running = 0.0
        walk = shuffled if talk is None else talk.bar(shuffled, f"{what}, epoch {epoch + 1}/{recipe.epochs}", steps)
        for step, (x, y) in enumerate(walk):
            if len(x) < 2:
                continue  # batch norm cannot train on one image
            at = epoch * steps + step
            rise = at / warm if at < warm else 0.5 * (1 + math.cos(math.pi * (at - warm) / max(1, total - warm)))
            for g in optimizer.param_groups:
                g["lr"] = recipe.lr * max(rise, 1e-3)
            x, y = data.augmented(x, y, draw)
            x = x.contiguous(memory_format=torch.channels_last)  # a quarter faster on CPUs, and the fast way on GPUs
            loss = _loss(wrapped, original, x, y, recipe, judge)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), 5.0)
            optimizer.step()
            running += float(loss.detach())
        if not math.isfinite(running):
            raise UsageError("the training loss is no longer finite", where=what, fix="try a smaller --lr")
        if talk is not None:
            talk.say(f"  {what}: epoch {epoch + 1} of {recipe.epochs}, loss {running / steps:.4f}")
        if checkpoint is not None and accelerator.is_main_process:
            save(checkpoint, model, optimizer, recipe, epoch + 1)
    model.to(memory_format=torch.contiguous_format)
    return model.eval()


def _loss(model: nn.Module, original: nn.Module | None, x: Tensor, y: Tensor, recipe: Recipe, judge: Judge) -> Tensor:
    if judge.restores:
        return _picture_loss(model, original, x, y, recipe.distill)
    logits: Tensor = model(x)
    parts = logits.new_zeros(())
    weight = recipe.distill if judge.taught else 1.0
    if weight < 1:
        parts = (1 - weight) * nn.functional.cross_entropy(logits, y, label_smoothing=recipe.smoothing)
    if weight > 0 and original is not None:
        t = recipe.temperature
        with torch.no_grad():
            taught = torch.log_softmax(original(x) / t, 1)
        own = torch.log_softmax(logits / t, 1)
        parts = parts + weight * t * t * nn.functional.kl_div(own, taught, reduction="batchmean", log_target=True)
    return parts


def _optimizer(model: nn.Module, recipe: Recipe, judge: Judge) -> torch.optim.Optimizer:
    if judge.restores:
        return torch.optim.Adam(model.parameters(), lr=recipe.lr)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.SGD(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
    )


def _picture_loss(model: nn.Module, original: nn.Module | None, x: Tensor, y: Tensor, distill: float) -> Tensor:
    out: Tensor = model(x)
    loss = charbonnier(out - y).mean()
    if distill > 0 and original is not None:
        with torch.no_grad():
            taught = original(x)
        loss = (1 - distill) * loss + distill * charbonnier(out - taught).mean()
    return loss


def _key(recipe: Recipe) -> str:
    return json.dumps(recipe.__dict__, sort_keys=True)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: int) -> None:
    """Write a checkpoint: weights, the optimiser's moments, the epoch and the recipe it belongs to."""
    tensors = {f"model.{k}": v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}.{i}"] = value.detach().clone().contiguous()
    meta = {"epoch": str(epoch), "recipe": _key(recipe)}
    write_atomically(path, lambda tmp: save_file(tensors, tmp, meta))


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> int:
    """Go back to a checkpoint of the same recipe; returns the epochs that are done, 0 without one.

    A file of another recipe or model, or a damaged one, is no checkpoint.
    """
    if not path.exists():
        return 0
    try:
        opened = safe_open(path, "pt")
    except SafetensorError:
        return 0
    with opened as f:
        meta = f.metadata() or {}
        if meta.get("recipe") != _key(recipe):
            return 0
        names = set(f.keys())
        own = model.state_dict()
        if any(
            f"model.{k}" not in names or f.get_slice(f"model.{k}").get_shape() != list(v.shape) for k, v in own.items()
        ):
            return 0
        model.load_state_dict({k: f.get_tensor(f"model.{k}") for k in own})
        for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
            for key in ("momentum_buffer", "step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{i}" in names:
                    optimizer.state[p][key] = f.get_tensor(f"{key}.{i}")
    return int(meta["epoch"])


@torch.no_grad()
def predict(model: nn.Module, dataset: Images, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits [N, L] and labels [N] of a whole dataset, in its order; of pictures all values in a row, and the true
    pictures [N, C', H, W]."""
    model.eval()
    logits, labels = [], []
    for x, y in batches(dataset, at_once(dataset), limit=limit):
        logits.append(model(x).flatten(1))
        labels.append(y)
    if not logits:
        raise UsageError("the data are empty", fix="check --data")
    return torch.cat(logits), torch.cat(labels)

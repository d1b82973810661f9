"""`xedge compress`, top to bottom. Read this file first.

1 load         model, data, teacher, targets: checked before any long work   -> original.safetensors
2 groups       which channels must go together                               -> groups.json
3-6 prune      observe, plan, cut, train, again (PS-iteration)               -> prune/NNN.json, prune/NNN.safetensors
7 quantise     bits, scales, integers                                        -> scales.safetensors, plan.json
  rework       channels without bits go, the others by their bits            -> model.safetensors, float.onnx
8 export       one flavour of ONNX a target, compiled and verified           -> targets/NAME/, verify.json
  report       what changed, measured                                        -> report.json, report.html
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from xedge.budget import choose_bits, samples
from xedge.candidates import precision_notes, ship
from xedge.data import at_once, batches, enough
from xedge.equalize import equalize
from xedge.errors import UnsupportedGraph, UsageError
from xedge.export import write_flavour
from xedge.groups import Groups, find_groups
from xedge.iterate import Result, ps_iteration
from xedge.judge import Judge
from xedge.load import load_target
from xedge.meter import MacsMeter, Meter, latency_meter
from xedge.metrics import macs, topk
from xedge.order import Orders
from xedge.plan import Keep, Plan
from xedge.progress import Talk
from xedge.prune import apply_spec, cut_spec
from xedge.qat import tune
from xedge.quantize import ScaleTable
from xedge.report import Crop
from xedge.request import Loaded, Request, default_folder, load_everything
from xedge.rework import Rounded, export, in_order, save, without_silent, words
from xedge.run import Run, read_json
from xedge.sizes import shipped
from xedge.subpixel import rewrite_subpixels
from xedge.target import Target
from xedge.train import Recipe, fit, predict

BASE_EPOCHS = {"lenet5": 12}
BASE_EPOCHS_DEFAULT = 8
REWRITTEN = 64
"""Training pictures that rewritten layers are fitted to."""
EXACT = 1e-5
BASE_STEPS = 2000
"""At least so many steps for nets that restore pictures, of whose patches there may be few."""
BASE_RATE, PICTURE_BASE_RATE = 0.05, 1e-3


def compress(request: Request, folder: Path | None = None, talk: Talk | None = None, *, bench: bool = True) -> Run:
    """Run all steps into `folder`; steps whose seals match are skipped.

    Returns:
        The run, closed; report.json in it says how it ended.

    Raises:
        XedgeError: see `xedge.errors`.
    """
    from xedge.assemble import assemble
    from xedge.report import write_html
    from xedge.report import write_json as write_report

    talk = talk or Talk(quiet=True)
    loaded = load_everything(request)
    if loaded.trained_here and loaded.settings.budget.macs is not None:
        _within_reach(loaded)  # before the training that comes first
    with Run.open(folder or default_folder(request), request.to_json()) as run:
        data = loaded.data
        talk.say(f"1/8 {request.model} on {data.name}, for {', '.join(t.name for t in loaded.targets)}")
        weights = run.step(
            "original.safetensors", {"request": _base_facts(loaded)}, lambda p: _original(loaded, p, run, talk)
        )
        original = loaded.factory()
        original.load_state_dict(load_file(weights))
        original.eval()
        _above_chance(original, loaded)

        talk.say("2/8 channel groups")
        groups_file = run.step(
            "groups.json",
            {"weights": weights, "exclude": request.exclude, "prune_stem": request.prune_stem},
            lambda p: _groups(original, loaded, p),
        )
        groups = Groups.from_json(read_json(groups_file))
        free = groups.free
        talk.say(f"  {len(free)} groups can be cut, {len(groups.groups) - len(free)} stay whole")

        talk.say("3-6/8 PS-iteration")
        if request.latency is not None and request.device is None:
            talk.say(f"  no --device: {request.latency:g} ms are to be met on this host, which no board is")
        result = ps_iteration(
            run, loaded.factory, original, weights, groups, groups_file, data, loaded.teacher, loaded.settings,
            _meter(run, loaded, original, weights, groups, groups_file, talk), talk,
        )  # fmt: skip
        talk.say(f"  stopped by {result.stopped_by}: {result.reason}")
        pruned = result.model
        model_file = run.step(
            "pruned.safetensors",
            {"weights": weights, "kept": _kept(result.keep), "chosen": result.chosen},
            lambda p: save(pruned, p),
        )

        talk.say(f"7/8 quantising to {request.bits_in_words()}")
        wide = pruned
        if request.equalize:
            model_file = run.step(
                "equalized.safetensors", {"model": model_file}, lambda p: _equalized(pruned, loaded, p)
            )
            wide = copy.deepcopy(pruned)
            wide.load_state_dict(load_file(model_file))
        floats = run.step("pruned.onnx", {"model": model_file}, lambda p: export(wide, loaded, p))
        plain = run.step("original.onnx", {"model": weights}, lambda p: export(original, loaded, p))
        scales = run.step(
            "rounded.safetensors",
            {
                "float": floats, "quantise": {**request.quantisation(), "bits_per": loaded.bits_per},
                "seed": request.seed, "data": data.name,
            },
            lambda p: choose_bits(loaded, wide, onnx.load(floats), talk).save(p),
        )  # fmt: skip
        first = Rounded(wide, result.keep, model_file, floats, scales)
        last = without_silent(run, loaded, first, result.groups, talk)
        if request.qat:
            scales = run.step(
                "tuned.safetensors",
                {
                    "rounded": last.scales, "float": last.floats, "epochs": request.qat, "lr": loaded.lr,
                    "batch": loaded.batch,
                },
                lambda p: _tuned(loaded, last, run, talk).save(p),
            )  # fmt: skip
            last = replace(last, scales=scales)
        last = in_order(run, loaded, last, result.groups)
        ready, floats, scales, model_file = last.model, last.floats, last.scales, last.weights
        table = ScaleTable.load(scales)
        begun = ScaleTable.load(first.scales)
        chosen = [begun.compared.words()] if begun.compared is not None else []
        soft = words(begun, table, result.keep, last.keep, loaded.settings.align)
        result = replace(result, model=ready, keep=last.keep)
        plan = run.step(
            "plan.json",
            {"scales": scales, "model": model_file, "kept": _kept(last.keep)},
            lambda p: _write_plan(result, last.orders, table, p),
        )

        talk.say("8/8 writing and verifying the artefacts")
        forms, choices = {}, []
        for target in loaded.targets:
            flavoured = run.step(
                f"model.{target.flavour}.onnx",
                {"float": floats, "scales": scales, "flavour": target.flavour},
                lambda p, t=target: onnx.save(write_flavour(onnx.load(floats), table, t.flavour), p),  # type: ignore[misc]
            )
            forms[target.name], choice = ship(run, loaded, target, table, flavoured, floats, original, talk)
            choices.append(choice)
            talk.say(f"  {target.name}: {choice.why}")
        models = {name: form.path for name, form in forms.items()}
        originals = {t.suffix: _baseline(run, t, plain) for t in loaded.targets}
        from xedge.verify import verify

        verified = run.step(
            "verify.json",
            {"plan": plan, "model": model_file, "weights": weights, **models, "data": data.name},
            lambda p: p.write_text(
                json.dumps(verify(loaded, original, ready, onnx.load(floats), forms, talk), sort_keys=True)
            ),
        )
        timed = None
        if bench:
            timed = run.step(
                "latency.json",
                {**models, **{f"original{s}": f for s, f in originals.items()}, "device": request.timed_on},
                lambda p: _latency(loaded, models, originals, p, talk),
            )  # fmt: skip
        report = replace(
            assemble(run.folder, loaded, original, result, table, read_json(verified), timed, models, originals),
            choices=tuple(choices),
        )
        with safe_open(weights, "pt") as opened:
            note = (opened.metadata() or {}).get("note")
        extra = [*chosen, *soft, *precision_notes(run.folder, choices), *([note] if note else [])]
        report = replace(report, notes=(*report.notes, *extra))
        if data.pictures:
            report = replace(
                report, crops=_crops(run, loaded, shipped(report, loaded.targets[0].name), models, plain, talk)
            )
        write_report(report, run.folder / "report.json")
        write_html(report, run.folder / "report.html")
        return run


def _within_reach(loaded: Loaded) -> None:
    """Whether any plan meets the MACs budget: the architecture alone says so.

    Raises:
        UsageError: none does.
    """
    example = torch.stack([loaded.data.train[0][0]])
    model = loaded.factory() if loaded.request.rewrite_subpixel else loaded.model
    groups = find_groups(model, example, exclude=loaded.request.exclude, prune_stem=loaded.request.prune_stem)
    meter = _macs_meter(loaded, model)
    meter.check(model, groups, loaded.settings.align, meter.spent(0, model, Path()))


def _macs_meter(loaded: Loaded, model: nn.Module) -> MacsMeter:
    shape = loaded.data.shape
    return MacsMeter(shape, macs(model, shape).total, loaded.settings.budget.macs)


def _meter(
    run: Run, loaded: Loaded, original: nn.Module, weights: Path, groups: Groups, groups_file: Path, talk: Talk
) -> Meter:
    """Of MACs, or of milliseconds on the device that was given."""
    request, latency = loaded.request, loaded.settings.budget.latency
    if latency is None:
        return _macs_meter(loaded, original)
    plain = run.step("original.onnx", {"model": weights}, lambda p: export(original, loaded, p))
    return latency_meter(
        run, request.timed_on, loaded.timed, original, loaded.data.shape, plain, groups,
        {"graph": plain, "groups": groups_file}, latency, request.keep_float, talk,
    )  # fmt: skip


def _base_facts(loaded: Loaded) -> dict[str, Any]:
    r = loaded.request
    facts = {"model": r.model, "contents": r.to_json()["contents"], "data": r.data, "seed": r.seed}
    facts = {**facts, "base_epochs": r.base_epochs} if loaded.trained_here else facts
    return {**facts, "rewrite": [r.epochs, loaded.lr, loaded.batch]} if r.rewrite_subpixel else facts


def _original(loaded: Loaded, path: Path, run: Run, talk: Talk) -> None:
    """Train a built-in model that came without weights; write the original's weights in any case."""
    model, request = loaded.model, loaded.request
    if loaded.trained_here:
        epochs = request.base_epochs or _base_epochs(loaded)
        talk.say(f"  no --weights: training {request.model} on {loaded.data.name} first, {epochs} epochs")
        lr = PICTURE_BASE_RATE if loaded.data.restores else BASE_RATE
        recipe = Recipe(epochs=epochs, lr=lr, batch=loaded.batch, seed=request.seed)
        checkpoint = run.folder / ".original.checkpoint.safetensors"
        fit(model, loaded.data, recipe, checkpoint=checkpoint, talk=talk, what=f"training {request.model}")
        checkpoint.unlink(missing_ok=True)
    notes = {}
    if request.rewrite_subpixel:
        model, notes["note"] = _rewritten(model, loaded, run, talk)
    save_file({k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}, path, notes)


def _rewritten(model: nn.Module, loaded: Loaded, run: Run, talk: Talk) -> tuple[nn.Module, str]:
    """Nearest neighbours and convolutions for sub-pixel layers: fitted, and trained for --epochs where not exact. With
    it what that cost, in words."""
    data, request, judge = loaded.data, loaded.request, Judge.of(loaded.data)
    images = [x for x, _ in batches(data.train, at_once(data.train), shuffle_seed=request.seed, limit=REWRITTEN)]
    new, errors = rewrite_subpixels(model, images)
    held = judge.held(len(data.select))

    def quality(net: nn.Module) -> str:
        out, truth = predict(net, data.select, limit=held)
        return judge.say(judge.quality(out, truth, out))

    words = (
        f"sub-pixel layers were rewritten: the fit leaves {max(errors.values()):.2%} of their deviation, "
        f"{quality(new)} on held-back data for {quality(model)} before"
    )
    if max(errors.values()) > EXACT and request.epochs:
        recipe = Recipe(epochs=request.epochs, lr=loaded.lr, batch=loaded.batch, seed=request.seed)
        checkpoint = run.folder / ".rewritten.checkpoint.safetensors"
        fit(new, data, recipe, original=model, checkpoint=checkpoint, talk=talk, what="training the rewritten net")
        checkpoint.unlink(missing_ok=True)
        words += f"; {quality(new)} after training"
    talk.say(f"  {words}")
    return new, words


def _base_epochs(loaded: Loaded) -> int:
    if not loaded.data.restores:
        return BASE_EPOCHS.get(loaded.request.model, BASE_EPOCHS_DEFAULT)
    return max(BASE_EPOCHS_DEFAULT, math.ceil(BASE_STEPS * loaded.batch / len(loaded.data.train)))


def _above_chance(original: nn.Module, loaded: Loaded) -> None:
    """A model that guesses was given no weights, or another normalisation: every figure after it would be noise."""
    data, judge = loaded.data, Judge.of(loaded.data)
    if not judge.taught:
        return
    logits, labels = predict(original, data.select, limit=judge.held(enough(data.select, 1024)))
    if judge.restores:
        grey = labels.mean().expand_as(logits)
        quality, guess = judge.quality(logits, labels, logits), judge.quality(grey, labels, grey)
        if quality <= guess:
            raise UsageError(
                f"its pictures of {data.name}, {judge.say(quality)}, are worse than plain grey, {judge.say(guess)}",
                where=loaded.request.model,
                fix=_better_weights(loaded),
            )
        return
    assert data.classes is not None
    accuracy, chance = topk(logits, labels), 1 / data.classes
    if accuracy <= chance + 3 * float(np.sqrt(chance * (1 - chance) / len(labels))):
        raise UsageError(
            f"its top-1 of {accuracy:.1%} on {data.name} is chance",
            where=loaded.request.model,
            fix=_better_weights(loaded),
        )


def _better_weights(loaded: Loaded) -> str:
    if loaded.trained_here:
        return "train it longer with --base-epochs"
    known = "the normalisation" if loaded.data.restores else "the data's classes and normalisation"
    if loaded.request.weights is None:
        return f"give --weights FILE, or check what the model loads itself and {known}"
    return f"check that {loaded.request.weights} was trained on such data, and {known}"


def _groups(original: nn.Module, loaded: Loaded, path: Path) -> None:
    example = torch.stack([loaded.data.train[0][0]])
    groups = find_groups(original, example, exclude=loaded.request.exclude, prune_stem=loaded.request.prune_stem)
    path.write_text(json.dumps(groups.to_json()) + "\n")


def _equalized(model: nn.Module, loaded: Loaded, path: Path) -> None:
    equal = copy.deepcopy(model)
    equalize(equal, (torch.from_numpy(x) for x, _ in samples(loaded.data, loaded.request.seed)), loaded.data.shape)
    save_file({k: v.contiguous() for k, v in equal.state_dict().items()}, path)


def _tuned(loaded: Loaded, at: Rounded, run: Run, talk: Talk) -> ScaleTable:
    checkpoint = run.folder / ".qat.checkpoint.safetensors"
    tuned = tune(loaded, at.model, onnx.load(at.floats), ScaleTable.load(at.scales), checkpoint, talk)
    checkpoint.unlink(missing_ok=True)
    return tuned


def _kept(keep: Keep) -> dict[str, list[int]]:
    return {name: np.flatnonzero(mask).tolist() for name, mask in keep.items()}


def _write_plan(result: Result, orders: Orders, table: ScaleTable, path: Path) -> None:
    kept = _kept(result.keep)
    plan = Plan(
        keep={**kept, **{name: np.array(kept[name])[order].tolist() for name, order in orders.items()}},
        sizes={g.name: g.size for g in result.groups.groups},
        spec=cut_spec(result.groups, result.keep),
        bits=table.bits_of(),
        notes=(f"stopped by {result.stopped_by}: {result.reason}",),
    )
    path.write_text(json.dumps(plan.to_json(), sort_keys=True) + "\n")


def _baseline(run: Run, target: Target, plain: Path) -> Path:
    """The original, float, in the runtime's own format: what a speed-up is measured against."""
    if target.suffix == ".onnx":
        return plain

    def make(path: Path) -> None:
        folder = path.with_name(f"{path.name}.folder")
        folder.mkdir()
        try:
            os.replace(target.compile(plain, folder, "original"), path)
        finally:
            shutil.rmtree(folder)

    return run.step(f"original{target.suffix}", {"onnx": plain, "target": target.name}, make)


def _crops(run: Run, loaded: Loaded, form: str, models: dict[str, Path], plain: Path, talk: Talk) -> tuple[Crop, ...]:
    """Parts of held-out pictures; none where the net takes pictures of one size only."""
    from xedge.crops import FOLDER, crops, read

    target = loaded.targets[0]
    talk.say(f"  {target.name}: crops of held-out pictures")
    inputs = {"original": plain, "compressed": models[target.name], "target": target.name, "data": loaded.data.name}
    try:
        return read(run.step(FOLDER, inputs, lambda p: crops(run.folder, target, form, loaded.data.pictures, p)))
    except UnsupportedGraph as e:
        talk.say(f"  no crops: {e}")
        return ()


def _latency(loaded: Loaded, models: dict[str, Path], originals: dict[str, Path], path: Path, talk: Talk) -> None:
    """A first look at the latency: original and compressed in interleaved fresh processes, on the device or here."""
    from xedge.device import open_device
    from xedge.measure import QUICK, compare
    from xedge.measurement import to_json

    out = {}
    address = loaded.request.timed_on
    with open_device(address, say=lambda line: talk.say(f"  {line}")) as device:
        for target in loaded.targets:
            if device.target is not None and load_target(device.target).name != target.name:
                continue
            talk.say(f"  timing {target.name} on {device.name}: original and compressed, interleaved")
            comparison = compare(device, originals[target.suffix], models[target.name], QUICK)
            out[target.name] = to_json(comparison)
    path.write_text(json.dumps(out))


# -- a finished run --------------------------------------------------------------------------------------------------


def rebuild(folder: Path) -> nn.Module:
    """The compressed float model of a run: architecture + plan.json + model.safetensors. Nothing is unpickled."""
    request = Request.from_json(read_json(folder / "run.json"), str(folder))
    loaded = load_everything(request)
    plan = Plan.from_json(read_json(folder / "plan.json"))
    model = apply_spec(loaded.factory(), plan.spec)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()

"""`xedge compress`, top to bottom. Read this file first.

1 load         model, data, teacher, targets: checked before any long work   -> original.safetensors
2 groups       which channels must go together                               -> groups.json
3-6 prune      observe, plan, cut, train, again (PS-iteration)               -> prune/NNN.json, prune/NNN.safetensors
7 quantise     bits, scales, integers                                        -> scales.safetensors, plan.json
8 export       one flavour of ONNX a target, compiled and verified           -> targets/NAME/, verify.json
  report       what changed, measured                                        -> report.json, report.html
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from xedge import __version__, load
from xedge.criteria import taylor
from xedge.data import Data, batches, check, fitting
from xedge.errors import UsageError
from xedge.export import write_flavour
from xedge.groups import Groups, find_groups
from xedge.iterate import Result, Settings, check_reach, costs_of, ps_iteration, score_all
from xedge.metrics import macs, topk
from xedge.onnx_graph import export_float
from xedge.plan import Budget, How, Plan, allocate, reachable
from xedge.progress import Talk
from xedge.prune import apply_spec, cut_spec
from xedge.quantize import ScaleTable, quantize
from xedge.ranges import calibrate
from xedge.run import Run, digest_file, digest_json, read_json, write_atomically, write_json
from xedge.target import Target
from xedge.teacher import Teacher
from xedge.train import Recipe, fit, predict

CALIBRATED = 256
"""Training images that set the ranges and the patch moments."""
BASE_EPOCHS = {"lenet5": 12}
BASE_EPOCHS_DEFAULT = 8
DEFAULT_BUDGET = Budget(macs=0.5, max_drop=0.01)


@dataclass(frozen=True)
class Request:
    """What the user asked. Everything that decides the result; it is written to run.json."""

    model: str = "lenet5"
    weights: str | None = None
    data: str = "digits"
    data_root: str | None = None
    targets: tuple[str, ...] = ("jetson",)
    macs: float | None = None
    max_drop: float | None = None
    criterion: str = "fback"
    bits: float = 8.0
    epochs: int = 3
    iterations: int = 4
    base_epochs: int | None = None
    lr: float = 0.02
    batch: int = 128
    seed: int = 0
    exclude: str | None = None

    def budget(self) -> Budget:
        """The budget; without any, half the MACs for at most one point of accuracy."""
        if self.macs is None and self.max_drop is None:
            return Budget(DEFAULT_BUDGET.macs, DEFAULT_BUDGET.max_drop, self.bits)
        return Budget(self.macs, self.max_drop, self.bits)

    def to_json(self) -> dict[str, Any]:
        """As run.json holds it; files are named by content as well."""
        return {
            **self.__dict__,
            "targets": list(self.targets),
            "xedge": __version__,
            "contents": {
                name: _content(spec)
                for name, spec in (
                    ("weights", self.weights),
                    ("model", self.model),
                    ("data", self.data),
                    ("criterion", self.criterion),
                    *((f"target {t}", t) for t in self.targets),
                )
                if spec is not None and _content(spec) is not None
            },
        }

    @classmethod
    def from_json(cls, facts: dict[str, Any], where: str) -> Request:
        """The inverse; facts this version does not know are refused."""
        known = {k: v for k, v in facts.items() if k in cls.__dataclass_fields__}
        if set(facts) - set(known) - {"xedge", "contents"}:
            raise UsageError("was made by another version of xedge", where=where, fix="choose another folder with -o")
        return cls(**{**known, "targets": tuple(known.get("targets", ()))})


def _content(spec: str) -> str | None:
    """A digest of the file or folder that a spec names (``FILE``, ``KIND:PATH?options``, ``path.py:attr``), if any.

    A folder is known by the names, sizes and times of its files: pictures may be many.
    """
    head = spec.partition("?")[0]
    for name in (head, head.partition(":")[2], head.rpartition(":")[0]):
        path = Path(name)
        if name and path.is_file():
            return digest_file(path)
        if name and ":" in head and path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.is_file()]
            return digest_json([(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in found])
    return None


@dataclass(frozen=True)
class Loaded:
    """Step 1's result: everything long work needs, checked."""

    request: Request
    data: Data
    teacher: Teacher
    targets: tuple[Target, ...]
    model: nn.Module
    trained_here: bool

    def factory(self) -> nn.Module:
        """The original's architecture anew."""
        return load.load_model(self.request.model, classes=self.data.classes, channels=self.data.shape[0])

    @property
    def settings(self) -> Settings:
        """What decides the PS-iteration."""
        r = self.request
        align = max(t.align for t in self.targets)
        return Settings(r.criterion, r.budget(), align, r.epochs, r.iterations, r.lr, r.seed, r.batch)


def load_everything(request: Request) -> Loaded:
    """Load and check: names, files, shapes, classes, weights, budgets. Nothing is written.

    Raises:
        UsageError: whatever is wrong with the input, in one line.
    """
    _check_numbers(request)
    targets = tuple(load.load_target(t) for t in dict.fromkeys(request.targets))
    targets = tuple({t.name: t for t in targets}.values())
    if not targets:
        raise UsageError("no target was given", fix="add --target jetson")
    load.load_criterion(request.criterion)
    if request.exclude is not None:
        try:
            re.compile(request.exclude)
        except re.error as e:
            raise UsageError(
                f"is no regular expression ({e})", where=f"--exclude {request.exclude}", fix="mend it"
            ) from e
    data = check(load.load_data(request.data, root=_root(request), seed=request.seed))
    torch.manual_seed(request.seed)
    model = load.load_model(request.model, classes=data.classes, channels=data.shape[0])
    if request.weights is not None:
        load.put_weights(model, load.read_weights(Path(request.weights)), request.weights)
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise UsageError(f"{name} holds NaN or infinity", where=request.model, fix="use sound weights")
    outputs = _outputs(model, data)
    if data.classes is not None and outputs != data.classes:
        raise UsageError(
            f"the model has {outputs} outputs and {data.name} has {data.classes} classes",
            where=request.model,
            fix="use weights of a model trained on these classes",
        )
    untrained = request.weights is None and load.is_built_in(request.model)
    if untrained and data.classes is None:
        raise UsageError(
            f"{request.model} has no weights and {data.name} has no labels to train it with", fix="give --weights FILE"
        )
    teacher = Teacher("labels", data.classes) if data.classes is not None else Teacher("logits", outputs)
    return Loaded(request, data, teacher, targets, model, untrained)


def _root(request: Request) -> Path | None:
    return Path(request.data_root) if request.data_root else None


def _check_numbers(r: Request) -> None:
    if r.macs is not None and not 0 < r.macs <= 1:
        raise UsageError(f"--macs {r.macs:g} is not a fraction between 0 and 1", fix="0.5 keeps half the MACs")
    if r.max_drop is not None and not 0 <= r.max_drop < 1:
        raise UsageError(f"--max-drop {r.max_drop:g} is not between 0 and 1", fix="write 0.5% or 0.005")
    if not 2 <= r.bits <= 8:
        raise UsageError(f"--bits {r.bits:g} is outside 2 to 8", fix="give the mean bits a weight, such as 4.5")
    for name, value, least in (("epochs", r.epochs, 0), ("iterations", r.iterations, 1), ("batch", r.batch, 2)):
        if value < least:
            raise UsageError(f"--{name} {value} is below {least}", fix=f"give {least} or more")
    if not r.lr > 0:
        raise UsageError(f"--lr {r.lr:g} is not positive", fix="try 0.02")


@torch.no_grad()
def _outputs(model: nn.Module, data: Data) -> int:
    x = torch.stack([data.train[0][0]])
    try:
        out = model.eval()(x)
    except Exception as e:  # whatever the user's forward raises on an image of the data
        reason = str(e).strip().split("\n", 1)[0][:200]
        raise UsageError(
            f"does not take images of shape {tuple(data.shape)} ({type(e).__name__}: {reason})",
            where=type(model).__name__,
            fix="choose data of the model's size, such as --data folder:DIR?size=224",
        ) from e
    if not isinstance(out, torch.Tensor) or out.flatten(1).shape[0] != 1:
        raise UsageError(
            f"its output is {type(out).__name__}, not one tensor of logits", where=type(model).__name__, fix="wrap it"
        )
    if not bool(torch.isfinite(out).all()):
        raise UsageError(
            "its output is NaN or infinity", where=type(model).__name__, fix="check the weights and the normalisation"
        )
    return int(out.flatten(1).shape[1])


def default_folder(request: Request) -> Path:
    """Where a run goes without -o: one folder a request."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{request.model.rpartition(':')[2]}-{request.data.partition('?')[0]}").strip(
        "-"
    )
    return Path("runs") / f"{name}-{digest_json(request.to_json())[:8]}"


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
    if loaded.trained_here and request.budget().macs is not None:
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
            "groups.json", {"weights": weights, "exclude": request.exclude}, lambda p: _groups(original, loaded, p)
        )
        groups = Groups.from_json(read_json(groups_file))
        free = groups.free
        talk.say(f"  {len(free)} groups can be cut, {len(groups.groups) - len(free)} stay whole")

        talk.say("3-6/8 PS-iteration")
        result = ps_iteration(
            run, loaded.factory, original, weights, groups, groups_file, data, loaded.teacher, loaded.settings, talk
        )
        talk.say(f"  stopped by {result.stopped_by}: {result.reason}")
        model_file = run.step(
            "model.safetensors",
            {"weights": weights, "kept": _kept(result), "chosen": result.chosen},
            lambda p: save_file({k: v.contiguous() for k, v in result.model.state_dict().items()}, p),
        )

        talk.say(f"7/8 quantising to {request.bits:g} mean bits")
        floats = run.step("float.onnx", {"model": model_file}, lambda p: _export(result.model, loaded, p))
        plain = run.step("original.onnx", {"model": weights}, lambda p: _export(original, loaded, p))
        scales = run.step(
            "scales.safetensors",
            {"float": floats, "bits": request.bits, "seed": request.seed, "data": data.name},
            lambda p: quantize(
                onnx.load(floats),
                calibrate(onnx.load(floats), lambda: calibration_images(loaded)),
                mean_bits=request.bits,
            ).save(p),
        )
        table = ScaleTable.load(scales)
        plan = run.step("plan.json", {"scales": scales, "kept": _kept(result)}, lambda p: _write_plan(result, table, p))

        talk.say("8/8 writing and verifying the artefacts")
        models = {}
        for target in loaded.targets:
            flavoured = run.step(
                f"model.{target.flavour}.onnx",
                {"float": floats, "scales": scales, "flavour": target.flavour},
                lambda p, t=target: onnx.save(write_flavour(onnx.load(floats), table, t.flavour), p),  # type: ignore[misc]
            )
            models[target.name] = _artefact(run, target, flavoured)
        originals = {t.suffix: _baseline(run, t, plain) for t in loaded.targets}
        from xedge.verify import verify

        verified = run.step(
            "verify.json",
            {"plan": plan, "model": model_file, "weights": weights, **models, "data": data.name},
            lambda p: p.write_text(
                json.dumps(
                    verify(loaded, original, result.model, onnx.load(floats), table, models, talk), sort_keys=True
                )
            ),
        )
        timed = None
        if bench:
            timed = run.step(
                "latency.json", {**models, **{f"original{s}": f for s, f in originals.items()}},
                lambda p: _latency(loaded, models, originals, p, talk),
            )  # fmt: skip
        report = assemble(run.folder, loaded, original, result, table, read_json(verified), timed, models, originals)
        write_report(report, run.folder / "report.json")
        write_html(report, run.folder / "report.html")
        return run


def _within_reach(loaded: Loaded) -> None:
    """Whether any plan meets the MACs budget: the architecture alone says so.

    Raises:
        UsageError: none does.
    """
    example = torch.stack([loaded.data.train[0][0]])
    groups = find_groups(loaded.model, example, exclude=loaded.request.exclude)
    check_reach(loaded.model, loaded.data.shape, groups, loaded.settings)


def _base_facts(loaded: Loaded) -> dict[str, Any]:
    r = loaded.request
    facts = {"model": r.model, "contents": r.to_json()["contents"], "data": r.data, "seed": r.seed}
    return {**facts, "base_epochs": r.base_epochs} if loaded.trained_here else facts


def _original(loaded: Loaded, path: Path, run: Run, talk: Talk) -> None:
    """Train a built-in model that came without weights; write the original's weights in any case."""
    model, request = loaded.model, loaded.request
    if loaded.trained_here:
        epochs = request.base_epochs or BASE_EPOCHS.get(request.model, BASE_EPOCHS_DEFAULT)
        talk.say(f"  no --weights: training {request.model} on {loaded.data.name} first, {epochs} epochs")
        recipe = Recipe(epochs=epochs, lr=0.05, batch=request.batch, seed=request.seed)
        checkpoint = run.folder / ".original.checkpoint.safetensors"
        fit(model, loaded.data, recipe, checkpoint=checkpoint, talk=talk, what=f"training {request.model}")
        checkpoint.unlink(missing_ok=True)
    save_file({k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}, path)


def _above_chance(original: nn.Module, loaded: Loaded) -> None:
    """A model that guesses was given no weights, or another normalisation: every figure after it would be noise."""
    data = loaded.data
    if data.classes is None:
        return
    logits, labels = predict(original, data.select, limit=1024)
    accuracy, chance = topk(logits, labels), 1 / data.classes
    if accuracy <= chance + 3 * float(np.sqrt(chance * (1 - chance) / len(labels))):
        raise UsageError(
            f"its top-1 of {accuracy:.1%} on {data.name} is chance",
            where=loaded.request.model,
            fix="give --weights FILE, and check the data's classes and normalisation"
            if not loaded.trained_here
            else "train it longer with --base-epochs",
        )


def _groups(original: nn.Module, loaded: Loaded, path: Path) -> None:
    example = torch.stack([loaded.data.train[0][0]])
    groups = find_groups(original, example, exclude=loaded.request.exclude)
    path.write_text(json.dumps(groups.to_json()) + "\n")


def _export(model: nn.Module, loaded: Loaded, path: Path) -> None:
    onnx.save(export_float(model, loaded.data.shape, min(t.opset for t in loaded.targets)), path)


def calibration_images(loaded: Loaded) -> Iterator[NDArray[np.float32]]:
    """Training images one by one, [1, C, H, W]: the only images that ranges and patch moments are taken from."""
    for x, _ in batches(loaded.data.train, 1, shuffle_seed=loaded.request.seed, limit=CALIBRATED):
        yield cast("NDArray[np.float32]", x.numpy())


def _kept(result: Result) -> dict[str, list[int]]:
    return {name: np.flatnonzero(mask).tolist() for name, mask in result.keep.items()}


def _write_plan(result: Result, table: ScaleTable, path: Path) -> None:
    plan = Plan(
        keep=_kept(result),
        sizes={g.name: g.size for g in result.groups.groups},
        spec=cut_spec(result.groups, result.keep),
        bits=table.bits_of(),
        notes=(f"stopped by {result.stopped_by}: {result.reason}",),
    )
    path.write_text(json.dumps(plan.to_json(), sort_keys=True) + "\n")


def _artefact(run: Run, target: Target, flavoured: Path) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        target.compile(flavoured, folder, "model")

    folder = run.step(f"targets/{target.name}", {"onnx": flavoured, "target": target.name}, make)
    return next(p for p in sorted(folder.iterdir()) if p.suffix == target.suffix)


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


def _latency(loaded: Loaded, models: dict[str, Path], originals: dict[str, Path], path: Path, talk: Talk) -> None:
    """A first look at this host's latency: original and compressed in interleaved fresh processes."""
    from xedge.device import open_device
    from xedge.measure import QUICK, compare
    from xedge.measurement import to_json

    out = {}
    with open_device("local") as device:
        for target in loaded.targets:
            talk.say(f"  timing {target.name} on this host: original and compressed, interleaved")
            comparison = compare(device, originals[target.suffix], models[target.name], QUICK)
            out[target.name] = to_json(comparison)
    path.write_text(json.dumps(out))


# -- dry run ---------------------------------------------------------------------------------------------------------


def dry_run(request: Request, talk: Talk | None = None) -> dict[str, Any]:
    """Groups, plan and predicted cost. Nothing is written, nothing is trained."""
    talk = talk or Talk(quiet=True)
    loaded = load_everything(request)
    original = loaded.model.eval()
    groups = find_groups(original, torch.stack([loaded.data.train[0][0]]), exclude=request.exclude)
    costs = costs_of(original, loaded.data.shape, groups)
    total = macs(original, loaded.data.shape).total
    outside = total - costs.total({})
    align = loaded.settings.align
    sizes = {g.name: (g.size, g.size) for g in groups.free}
    least = reachable(costs, sizes, align) + outside
    budget = request.budget()
    goal = (budget.macs if budget.macs is not None else least / total) * total
    talk.say("ranking channels" if not loaded.trained_here else "untrained: equal shares of every layer")
    felt = None
    if loaded.trained_here:
        scores = {g.name: np.ones(g.size) for g in groups.free if g.consumers}
    else:
        from xedge.observe import observe

        size = fitting(loaded.data.shape, gradients=True)
        images = batches(loaded.data.train, size, shuffle_seed=request.seed, limit=256)
        observed = observe(original, groups, images, loaded.teacher, gradients=True, seed=request.seed)
        scores = score_all(load.load_criterion(request.criterion), groups, observed)
        felt = score_all(taylor.score, groups, observed)
    plans = {}
    hows: tuple[How, ...] = ("uniform",) if loaded.trained_here else ("uniform", "global", "taylor")
    whole = {g.name: g.size for g in groups.free}
    for how in hows:
        keep = allocate(scores, costs, goal - outside, originals=whole, align=align, how=how, taylor=felt)
        left = costs.total({n: int((~k).sum()) for n, k in keep.items()}) + outside
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
            {"name": g.name, "channels": g.size, "producers": list(g.producers), "consumers": list(g.consumers)}
            for g in groups.free
        ],
        "frozen": [list(row) for row in groups.frozen],
        "plans": plans,
    }


# -- a finished run --------------------------------------------------------------------------------------------------


def rebuild(folder: Path) -> nn.Module:
    """The compressed float model of a run: architecture + plan.json + model.safetensors. Nothing is unpickled."""
    request = Request.from_json(read_json(folder / "run.json"), str(folder))
    loaded = load_everything(request)
    plan = Plan.from_json(read_json(folder / "plan.json"))
    model = apply_spec(loaded.factory(), plan.spec)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def environment() -> dict[str, Any]:
    """Versions and machine facts for the report."""
    from importlib.metadata import version

    packages = ("torch", "onnx", "onnxruntime", "ai-edge-litert", "numpy")
    cpu = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        cpu = found.group(1).strip() if found else ""
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in packages},
        "machine": platform.machine(),
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "system": platform.system(),
    }


__all__ = ["Loaded", "Request", "compress", "default_folder", "dry_run", "environment", "load_everything", "rebuild",
           "write_atomically", "write_json"]  # fmt: skip

"""What the user asked, loaded and checked before any long work."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from xedge import __version__, load
from xedge.choose import HOWS, STOPS, Settings
from xedge.criteria.fdr import need_classes
from xedge.data import Data, check
from xedge.device import describe
from xedge.errors import UsageError, nearest
from xedge.judge import Drop, Judge, amount
from xedge.measure import runtime_for
from xedge.plan import Budget
from xedge.quantize import Coding, Sensitivity
from xedge.ranges import RangeRule
from xedge.run import digest_file, digest_json
from xedge.subpixel import find_subpixels, rewritten
from xedge.target import BitsPer, Target
from xedge.teacher import Teacher, choose_teacher

DEFAULT_BUDGET = Budget(macs=0.5, max_drop=0.01)
DEFAULT_DROP_DB = 0.2
RATE, BATCH = 0.02, 128
"""Of SGD on images of classes, and of Adam on pictures, whose gradients are small and whose maps are large."""
PICTURE_RATE, PICTURE_BATCH = 5e-4, 16


_QUANTISATION = (
    "bits", "bytes", "bits_drop", "sensitivity", "ranges", "feedback", "bias_correction", "fit", "equalize",
    "keep_float", "bits_min", "bits_per", "codebook", "coding",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What the user asked. Everything that decides the result; it is written to run.json."""

    model: str = "lenet5"
    weights: str | None = None
    data: str = "digits"
    data_root: str | None = None
    targets: tuple[str, ...] = ("jetson",)
    macs: float | None = None
    latency: float | None = None
    device: str | None = None
    max_drop: Drop | None = None
    criterion: str = "fback"
    teacher: str | None = None
    bits: float = 8.0
    bytes: int | None = None
    bits_drop: Drop | None = None
    sensitivity: Sensitivity = "fisher"
    ranges: RangeRule = "mse"
    feedback: bool = True
    bias_correction: bool = True
    fit: bool | None = None
    equalize: bool = False
    keep_float: str | None = None
    bits_min: tuple[tuple[int, str], ...] = ()
    bits_per: BitsPer = "channel"
    codebook: bool = False
    coding: Coding | None = None
    qat: int = 0
    epochs: int = 3
    iterations: int = 4
    base_epochs: int | None = None
    lr: float | None = None
    batch: int | None = None
    seed: int = 0
    exclude: str | None = None
    prune_stem: bool = False
    fold: bool = True
    allocation: str | None = None
    stop: str = "budget"
    step: float | None = None
    smoothing: float = 0.0
    distill: float = 0.0
    rewrite_subpixel: bool = False

    def budget(self, *, restores: bool = False) -> Budget:
        """The budget; without any, half the MACs for at most one point of accuracy, or 0.2 dB.

        Structural energy needs no MACs: it cuts until nothing is deleterious, within the drop.

        Args:
            restores: whether the data restore pictures: drops are then in decibels.

        Raises:
            UsageError: a drop in the other unit.
        """
        drop = None if self.max_drop is None else amount(self.max_drop, "--max-drop", restores=restores)
        usual = DEFAULT_DROP_DB if restores else DEFAULT_BUDGET.max_drop
        if self.stop == "energy":
            return Budget(None, usual if drop is None else drop, self.bits)
        if self.macs is None and self.latency is None and drop is None:
            return Budget(DEFAULT_BUDGET.macs, usual, self.bits)
        return Budget(self.macs, drop, self.bits, self.latency)

    def quantisation(self) -> dict[str, Any]:
        """What decides step 7."""
        return {name: getattr(self, name) for name in _QUANTISATION}

    @property
    def counted(self) -> Coding:
        """What bits are: those of a code where packed bytes are the budget, unless asked otherwise."""
        return self.coding or ("entropy" if self.bytes is not None and not (self.codebook or self.qat) else "fixed")

    def bits_in_words(self) -> str:
        """The budget of step 7."""
        mean = f"{self.bits:g} mean bits{' of code' * (self.counted == 'entropy')}"
        words = mean if self.bytes is None and self.bits_drop is None else ""
        parts = [words, f"{self.bytes} bytes, packed" if self.bytes is not None else ""]
        drop = self.bits_drop
        parts += [f"a drop of {drop if isinstance(drop, str) else f'{drop:.2%}'}" if drop is not None else ""]
        return " and ".join(p for p in parts if p)

    def to_json(self) -> dict[str, Any]:
        """As run.json holds it; files are named by content as well."""
        return {
            **self.__dict__,
            "targets": list(self.targets),
            "bits_min": [list(row) for row in self.bits_min],
            "xedge": __version__,
            "contents": {
                name: _content(spec)
                for name, spec in (
                    ("weights", self.weights),
                    ("model", self.model),
                    ("data", self.data),
                    ("criterion", self.criterion),
                    ("teacher", self.teacher),
                    *((f"target {t}", t) for t in self.targets),
                )
                if spec is not None and _content(spec) is not None
            },
        }

    @property
    def timed_on(self) -> str:
        """The device that a latency budget is for and the report's times are of: this host unless one is given."""
        return self.device or "local"

    @classmethod
    def from_json(cls, facts: dict[str, Any], where: str) -> Request:
        """The inverse; facts this version does not know are refused."""
        known = {k: v for k, v in facts.items() if k in cls.__dataclass_fields__}
        if set(facts) - set(known) - {"xedge", "contents"}:
            raise UsageError("was made by another version of xedge", where=where, fix="choose another folder with -o")
        floors = tuple((int(b), str(p)) for b, p in known.get("bits_min", ()))
        return cls(**{**known, "targets": tuple(known.get("targets", ())), "bits_min": floors})


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
        """The original's architecture anew, rewritten where that was asked."""
        model = load.load_model(
            self.request.model, classes=self.data.classes, channels=self.data.shape[0], scale=self.data.scale
        )
        if not self.request.rewrite_subpixel:
            return model
        return rewritten(model.eval(), find_subpixels(model.eval(), torch.zeros(1, *self.data.shape)))

    @property
    def lr(self) -> float:
        """The highest learning rate."""
        usual = PICTURE_RATE if self.data.restores else RATE
        return usual if self.request.lr is None else self.request.lr

    @property
    def batch(self) -> int:
        """Images a training step."""
        usual = PICTURE_BATCH if self.data.restores else BATCH
        return usual if self.request.batch is None else self.request.batch

    @property
    def bits_drop(self) -> float | None:
        """Largest fall of quality by rounding, as the data count it."""
        given = self.request.bits_drop
        return None if given is None else amount(given, "--bits-drop", restores=self.data.restores)

    @property
    def bits_per(self) -> BitsPer:
        """What has a width of its own: the coarsest of --bits-per and what the targets take."""
        asked = (self.request.bits_per, *(t.bits_per for t in self.targets))
        return max(asked, key=get_args(BitsPer).index)

    @property
    def timed(self) -> Target:
        """The target that a latency budget is for: the device's, or the only one.

        Raises:
            UsageError: the device and the targets leave it open.
        """
        device = self.request.timed_on
        name = describe(device).target
        wanted = load.load_target(name).name if name is not None else None
        found = [t for t in self.targets if wanted in (None, t.name)]
        if len(found) != 1:
            have = ", ".join(t.name for t in self.targets)
            raise UsageError(
                f"--latency is for one target, and {f'{device} is for {wanted}' if wanted else f'these are: {have}'}",
                fix=f"give --target {wanted or self.targets[0].name} alone",
            )
        return found[0]

    @property
    def settings(self) -> Settings:
        """What decides the PS-iteration."""
        r = self.request
        align = max(t.align for t in self.targets)
        return Settings(
            criterion=r.criterion, budget=r.budget(restores=self.data.restores), align=align, epochs=r.epochs,
            iterations=r.iterations, lr=self.lr, seed=r.seed, batch=self.batch, fold=r.fold, allocation=r.allocation,
            stop=r.stop, step=r.step, smoothing=r.smoothing, distill=r.distill,
        )  # fmt: skip


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
    patterns = (("exclude", request.exclude), ("keep-float", request.keep_float))
    for flag, pattern in (*patterns, *(("bits-min", p) for _, p in request.bits_min)):
        try:
            re.compile(pattern or "")
        except re.error as e:
            raise UsageError(f"is no regular expression ({e})", where=f"--{flag} {pattern}", fix="mend it") from e
    data = check(load.load_data(request.data, root=_root(request), seed=request.seed))
    torch.manual_seed(request.seed)
    model = load.load_model(request.model, classes=data.classes, channels=data.shape[0], scale=data.scale)
    if request.weights is not None:
        load.put_weights(model, load.read_weights(Path(request.weights)), request.weights)
    for flag, pattern in (("keep-float", request.keep_float), *(("bits-min", p) for _, p in request.bits_min)):
        if pattern is not None and not any(re.search(pattern, n) for n, m in model.named_modules() if _weighted(m)):
            raise UsageError("names no convolution or linear layer", where=f"--{flag} {pattern}", fix="mend it")
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise UsageError(f"{name} holds NaN or infinity", where=request.model, fix="use sound weights")
    shape = _output(model, data)
    outputs = math.prod(shape)
    if data.classes is not None and outputs != data.classes:
        raise UsageError(
            f"the model has {outputs} outputs and {data.name} has {data.classes} classes",
            where=request.model,
            fix="use weights of a model trained on these classes",
        )
    judge = Judge.of(data)
    if judge.restores and shape != judge.shape:
        raise UsageError(
            f"the model gives {shape} and the true pictures of {data.name} are {judge.shape}",
            where=request.model,
            fix="use weights and data of one scale",
        )
    for flag, drop in (("--max-drop", request.max_drop), ("--bits-drop", request.bits_drop)):
        if drop is not None:
            amount(drop, flag, restores=data.restores)
    untrained = request.weights is None and load.is_built_in(request.model)
    if untrained and not judge.taught:
        raise UsageError(
            f"{request.model} has no weights and {data.name} has no labels to train it with", fix="give --weights FILE"
        )
    if request.rewrite_subpixel and not find_subpixels(model.eval(), torch.zeros(1, *data.shape)):
        raise UsageError(
            f"{request.model} has no convolution with a pixel shuffle behind it",
            where="--rewrite-subpixel",
            fix="leave it out; a shuffle that forward calls as a function is not found, make it a module",
        )
    teacher = choose_teacher(request.teacher, data, outputs)
    if request.criterion in ("fdr", "dfdr"):
        need_classes(teacher)
    loaded = Loaded(request, data, teacher, targets, model, untrained)
    if request.codebook and loaded.bits_per == "tensor":
        raise UsageError(
            "a codebook has a scale for each channel", where="--codebook", fix="ask for --bits-per layer, or none"
        )
    if request.latency is not None:
        runtime_for(Path(f"model{loaded.timed.suffix}"))
    return loaded


def _weighted(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear)


def _root(request: Request) -> Path | None:
    return Path(request.data_root) if request.data_root else None


def _check_numbers(r: Request) -> None:
    if r.macs is not None and not 0 < r.macs <= 1:
        raise UsageError(f"--macs {r.macs:g} is not a fraction between 0 and 1", fix="0.5 keeps half the MACs")
    for flag, drop in (("--max-drop", r.max_drop), ("--bits-drop", r.bits_drop)):
        if drop is not None:
            amount(drop, flag, restores=isinstance(drop, str))
    if r.latency is not None and r.macs is not None:
        raise UsageError("--latency and --macs exclude each other", fix="leave one of them out")
    about = describe(r.timed_on)
    if r.latency is not None and about.tools and not about.python:
        raise UsageError(
            f"times by {' and '.join(about.tools)} alone, and a latency table needs Python there",
            where=f"device {about.name}",
            fix="name its python in the device file, or ask for --macs and hold the run to xedge gate --latency",
        )
    if r.qat < 0:
        raise UsageError(f"--qat {r.qat} is below 0", fix="give the epochs of training in integers")
    if r.qat and (r.bytes is not None or r.codebook):
        flag = "--codebook" if r.codebook else "--bytes"
        raise UsageError(f"--qat and {flag} exclude each other: training changes what was fitted", fix="drop one")
    if r.coding == "entropy" and (r.qat or r.codebook):
        flag, why = ("--codebook", "its indices are coded") if r.codebook else ("--qat", "training changes the code")
        raise UsageError(f"--coding entropy and {flag} exclude each other: {why}", fix="drop one")
    if r.fit and r.codebook:
        raise UsageError("--fit and --codebook exclude each other: codebooks are not fitted", fix="drop one")
    for least, pattern in r.bits_min:
        if not 0 <= least <= 8:
            raise UsageError(f"{least} bits are outside 0 to 8", where=f"--bits-min {least} {pattern}", fix="mend it")
    if r.bytes is not None and r.bytes <= 0:
        raise UsageError(f"--bytes {r.bytes} is not positive", fix="write 300kB or 1.5MB")
    for name, given, known in (
        ("sensitivity", r.sensitivity, get_args(Sensitivity)),
        ("ranges", r.ranges, get_args(RangeRule)),
        ("bits-per", r.bits_per, get_args(BitsPer)),
        ("coding", r.coding or "fixed", get_args(Coding)),
        ("allocation", r.allocation or HOWS[0], HOWS),
        ("stop", r.stop, STOPS),
    ):
        if given not in known:
            raise UsageError(f"there is no --{name} {given}", fix=nearest(given, known))
    if not 2 <= r.bits <= 8:
        raise UsageError(f"--bits {r.bits:g} is outside 2 to 8", fix="give the mean bits a weight, such as 4.5")
    for name, value, least in (("epochs", r.epochs, 0), ("iterations", r.iterations, 1), ("batch", r.batch, 2)):
        if value is not None and value < least:
            raise UsageError(f"--{name} {value} is below {least}", fix=f"give {least} or more")
    for name, part in (("smoothing", r.smoothing), ("distill", r.distill)):
        if not 0 <= part <= 1:
            raise UsageError(f"--{name} {part:g} is not between 0 and 1", fix="0.1 is usual for smoothing")
    if r.step is not None and not 0 < r.step < 1:
        raise UsageError(f"--step {r.step:g} is not between 0 and 1", fix="15% takes that part of what is left")
    if r.stop == "energy" and (r.macs is not None or r.latency is not None):
        flag = "--macs" if r.macs is not None else "--latency"
        raise UsageError(f"--stop energy finds the widths itself and takes no {flag}", fix="leave one of them out")
    if r.lr is not None and not r.lr > 0:
        raise UsageError(f"--lr {r.lr:g} is not positive", fix="try 0.02")


@torch.no_grad()
def _output(model: nn.Module, data: Data) -> tuple[int, ...]:
    """The shape of one answer."""
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
            f"its output is {type(out).__name__}, not one tensor", where=type(model).__name__, fix="wrap it"
        )
    if not bool(torch.isfinite(out).all()):
        raise UsageError(
            "its output is NaN or infinity", where=type(model).__name__, fix="check the weights and the normalisation"
        )
    return tuple(out.shape[1:])


def default_folder(request: Request) -> Path:
    """Where a run goes without -o: one folder a request."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{request.model.rpartition(':')[2]}-{request.data.partition('?')[0]}").strip(
        "-"
    )
    return Path("runs") / f"{name}-{digest_json(request.to_json())[:8]}"

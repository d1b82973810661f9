"""LPIRC's rules, end to end on a device: a wall time of 30 ms for each picture, decoding included.

Low-Power Image Recognition Challenge 2018, track 1 (OVIC): T pictures one after the other have 30 ms x T in all, an
average and no limit for a single one. Pictures that are not done by then are not classified, and count as wrong in the
accuracy. score = accuracy / max(30 ms x T, runtime).
"""

from __future__ import annotations

import importlib.util
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from xedge.bench import checked, runs_there
from xedge.data import Options
from xedge.device import Device, open_device
from xedge.errors import DeviceError, InternalError, UsageError
from xedge.measure import agent_lines, agent_path, runtime_for
from xedge.measurement import append_line
from xedge.report import read_json
from xedge.transports.supervised import sha256

LIMIT_MS = 30.0
RECORDS = "lpirc.jsonl"
"""In a run folder: the raw answers and times of every contest."""
PACK = 128 << 20
"""Bytes of pictures in one zip."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class View:
    """How a picture becomes an input: its shorter side to `resize`, a centre crop, (x / 255 - mean) / std."""

    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Contest:
    """The raw outcome; every figure is computed from it.

    Attributes:
        model, sha256, target: what ran.
        device, device_kind, runtime: where; nothing but a real device's time is a figure to quote.
        labels: the right class of each picture, in order.
        classes: the answers; -1 for a file that the device could not decode.
        end_ns: when each was done, from the start of the first.
        facts: of the device before.
    """

    model: str
    sha256: str
    target: str
    device: str
    device_kind: str
    runtime: str
    labels: tuple[int, ...]
    classes: tuple[int, ...]
    end_ns: tuple[int, ...]
    facts: Mapping[str, Any]
    created: str

    @property
    def pictures(self) -> int:
        """T."""
        return len(self.labels)

    @property
    def wall_seconds(self) -> float:
        """30 ms x T."""
        return LIMIT_MS * self.pictures / 1000

    @property
    def runtime_seconds(self) -> float:
        """Until the last picture was done."""
        return self.end_ns[-1] / 1e9

    @property
    def classified(self) -> int:
        """Pictures that have an answer within the wall time."""
        return sum(self._in_time())

    @property
    def correct(self) -> int:
        """Of these, the right ones."""
        right = (c == y for c, y in zip(self.classes, self.labels, strict=True))
        return sum(a and b for a, b in zip(right, self._in_time(), strict=True))

    @property
    def accuracy(self) -> float:
        """Over all pictures."""
        return self.correct / self.pictures

    @property
    def accuracy_on_classified(self) -> float:
        """Over those within the wall time; 0 where there are none."""
        return self.correct / self.classified if self.classified else 0.0

    @property
    def score(self) -> float:
        """Accuracy a second: accuracy / max(wall time, runtime)."""
        return self.accuracy / max(self.wall_seconds, self.runtime_seconds)

    def _in_time(self) -> list[bool]:
        limit = LIMIT_MS * 1e6 * self.pictures
        return [c >= 0 and end <= limit for c, end in zip(self.classes, self.end_ns, strict=True)]

    def figures(self) -> dict[str, Any]:
        """For --json."""
        names = [
            "model", "target", "device", "device_kind", "runtime", "pictures", "wall_seconds", "runtime_seconds",
            "classified", "correct", "accuracy", "accuracy_on_classified", "score",
        ]  # fmt: skip
        return {n: getattr(self, n) for n in names}

    def __str__(self) -> str:
        mean = 1000 * self.runtime_seconds / self.pictures
        unread = sum(c < 0 for c in self.classes)
        return "\n".join(
            [
                f"{self.model} for {self.target} on {self.device} ({self.device_kind}), {self.runtime}",
                f"pictures                {self.pictures}" + (f", {unread} of them no pictures" if unread else ""),
                f"wall time               {self.wall_seconds:.3f} s, {LIMIT_MS:g} ms each",
                f"runtime                 {self.runtime_seconds:.3f} s, {mean:.3f} ms each, decoding included",
                f"# classified            {self.classified}",
                f"accuracy on classified  {self.accuracy_on_classified:.4f}",
                f"accuracy                {self.accuracy:.4f}",
                f"score                   {self.score:.6f} (accuracy / max(wall time, runtime), in seconds)",
            ]
        )


def contest(
    run: Path, address: str, images: Path, labels: Path | None, preprocess: str | None, say: Callable[[str], None]
) -> Contest:
    """Run the contest with a run's artefact, and append what came out to the run's lpirc.jsonl.

    Args:
        images: a folder of pictures with its labels (see `pictures_of`).
        labels: the file of labels; images/labels.txt, or the names of class folders, when None.
        preprocess: ``resize=256&mean=0.5&std=0.5``; what is left out is as in the run's own data.

    Raises:
        UsageError: no finished run, no labels, a label that no output has, no artefact for the device.
        DeviceError: the device is absent or was lost, or lacks Pillow.
    """
    report = read_json(run / "report.json")
    rows = pictures_of(images, labels)
    with open_device(address, say=say) as device:
        found = runs_there(report.artifacts, device, run)
        if len(found) > 1:
            raise UsageError(
                f"has artefacts for {', '.join(a.target for a in found)}",
                where=str(run),
                fix="let a device file say which target the device is",
            )
        artifact = found[0]
        model = checked(run, artifact)
        view = view_of(str(report.request["data"]), preprocess, side_of(artifact.inputs))
        outputs = max((shape[-1] for shape in artifact.outputs.values()), default=0)
        if max(y for _, y in rows) >= outputs:
            raise UsageError(
                f"has label {max(y for _, y in rows)}, and the model has {outputs} classes", where=str(images)
            )
        say(f"{len(rows)} pictures to {device.name}")
        result = _run(device, model, artifact.target, rows, view)
    append_line(run / RECORDS, asdict(result))
    return result


def side_of(inputs: Mapping[str, Sequence[int]]) -> int:
    """Of the square RGB picture that a model takes; UsageError where it takes something else."""
    shape = next(iter(inputs.values())) if len(inputs) == 1 else ()
    if len(shape) != 4 or 3 not in (shape[1], shape[3]) or len({*shape[1:]} - {3}) != 1:
        raise UsageError(f"takes {[list(s) for s in inputs.values()]}, not one square RGB picture", where="the model")
    return max(shape[1:])


def view_of(spec: str, preprocess: str | None, side: int) -> View:
    """The preprocessing of the run's data, where these are pictures in folders, with changes by `preprocess`."""
    head, _, query = spec.partition("?")
    own = dict(parse_qsl(query)) if head.partition(":")[0] in ("folder", "imagenet") else None
    given = dict(parse_qsl(preprocess or ""))
    opts = Options.of("--preprocess", given, ("resize", "mean", "std"))
    if own is None and not {"mean", "std"} <= set(given):
        raise UsageError(
            f"the run's data, {head}, does not say how pictures are normalised",
            fix="add --preprocess 'mean=0.485,0.456,0.406&std=0.229,0.224,0.225'",
        )
    opts = Options(
        "--preprocess", {**{k: v for k, v in (own or {}).items() if k in ("resize", "mean", "std")}, **given}
    )
    resize = opts.integer("resize", low=side, high=8192) or round(side * 256 / 224)
    mean, std = opts.numbers("mean", count=3), opts.numbers("std", count=3, positive=True)
    return View(resize, mean or MEAN, std or STD)


def pictures_of(images: Path, labels: Path | None) -> list[tuple[Path, int]]:
    """Pictures and their classes, in order.

    A file of labels has one ``NAME CLASS`` a line, NAME relative to the folder. Without one the folder holds a folder
    for each class, numbered in the order of their names.

    Raises:
        UsageError: no folder, no labels, a line that is not of that form, a picture that is not there.
    """
    from xedge.calibration.folder import class_folders, pictures_in

    if not images.is_dir():
        raise UsageError("there is no such folder", where=f"--images {images}")
    file = labels or images / "labels.txt"
    if labels is None and not file.is_file():
        names = class_folders(images)
        found = [(images / c / p, n) for n, c in enumerate(names) for p in pictures_in(images / c, deep=True)]
        if not found:
            raise UsageError("holds no labels", where=str(images), fix="put NAME CLASS a line into labels.txt there")
        return found
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", where=str(file)) from error
    rows = []
    for number, words in enumerate(lines, 1):
        if len(words) != 2 or not words[1].isdecimal():
            raise UsageError(f"line {number} is not NAME CLASS, such as 000001.jpg 207", where=str(file))
        path = images / words[0]
        if not path.is_file():
            raise UsageError(f"line {number} names {words[0]}, which is not there", where=str(file))
        rows.append((path, int(words[1])))
    if not rows:
        raise UsageError("is empty", where=str(file), fix="write NAME CLASS a line")
    return rows


def contest_path() -> Path:
    """The file that runs on the device beside the agent."""
    spec = importlib.util.find_spec("xedge.benchmarks.lpirc_agent")
    if spec is None or spec.origin is None:
        raise InternalError("the package lacks benchmarks/lpirc_agent.py")
    return Path(spec.origin)


def _run(device: Device, model: Path, target: str, rows: Sequence[tuple[Path, int]], view: View) -> Contest:
    send, runtime = device.transport.push, runtime_for(model)
    argv = [*device.python, send(contest_path()), "--agent", send(agent_path()), "--model", send(model)]
    argv += ["--runtime", runtime, "--resize", str(view.resize)]
    argv += [f"--mean={','.join(map(repr, view.mean))}", f"--std={','.join(map(repr, view.std))}"]
    if device.cpus:
        argv += ["--cpus", ",".join(map(str, device.cpus))]
    for remote in _pushed(device, [path for path, _ in rows]):
        argv += ["--pictures", remote]
    where = f"{model.name} on {device.name}"
    patience = 300.0 + 20 * LIMIT_MS * len(rows) / 1000
    lines = agent_lines(device.transport.run(argv, patience), where)
    classes: list[int] = []
    ends: list[int] = []
    try:
        before = next(x for x in lines if x["kind"] == "facts")
        for line in lines:
            if line["kind"] == "pictures":
                if line["first"] != len(classes) or len(line["class"]) != len(line["end_ns"]):
                    raise DeviceError("the agent's lines are out of order", where=where, fix="run it again")
                classes += line["class"]
                ends += line["end_ns"]
    except (KeyError, TypeError, StopIteration) as error:
        raise DeviceError(f"the agent's output lacks {error}", where=where, fix="run it again") from error
    if len(classes) != len(rows) or not all(type(n) is int for n in (*classes, *ends)) or ends != sorted(ends):
        raise DeviceError(f"{len(classes)} answers to {len(rows)} pictures", where=where, fix="run it again")
    digest = sha256(model)
    if before.get("model_sha256") != digest:
        raise DeviceError("the device ran other bytes than were sent", where=where, fix="run it again")
    return Contest(
        model=model.name, sha256=digest, target=target, device=device.name, device_kind=device.kind,
        runtime=f"{runtime} {before.get('runtime_version', '')}", labels=tuple(y for _, y in rows),
        classes=tuple(classes), end_ns=tuple(ends), facts=before,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _pushed(device: Device, pictures: Sequence[Path]) -> list[str]:
    """The pictures on the device, in zips, under numbers for names."""
    remotes: list[str] = []
    start = 0
    with tempfile.TemporaryDirectory(prefix="xedge-") as folder:
        while start < len(pictures):
            pack, size, end = Path(folder) / f"{start:08d}.zip", 0, start
            with zipfile.ZipFile(pack, "w", zipfile.ZIP_STORED) as file:
                while end < len(pictures) and (end == start or size + pictures[end].stat().st_size <= PACK):
                    size += pictures[end].stat().st_size
                    file.writestr(zipfile.ZipInfo(f"{end:08d}"), pictures[end].read_bytes())
                    end += 1
            remotes.append(device.transport.push(pack))
            pack.unlink()
            start = end
    return remotes

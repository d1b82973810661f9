"""The report: what a run changed, measured, as JSON, on the terminal, as Markdown and as one HTML page.

It answers five questions, in this order: how much smaller, how much faster, how much worse, on which device, and
which layer is to blame. Nothing is computed here that was not measured elsewhere: an absent number is None and is
shown as "not measured", never estimated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xedge import report_words as words
from xedge.errors import InternalError, UsageError, resume
from xedge.measurement import Agreement
from xedge.target import Artifact

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
"""Version of report.json. It rises when a field changes its meaning; new optional fields do not raise it."""


@dataclass(frozen=True)
class Latency:
    """Time of one inference at batch 1, over independent processes.

    Attributes:
        median_ms: median over processes of each process's median, in milliseconds.
        lower_ms, upper_ms: order-statistic interval over the processes' medians.
        runtime: what executed it, with its version, e.g. ``onnxruntime 1.20.0, 1 thread``.
        device: where, as the user named it, e.g. ``local``.
        device_kind: ``real``, ``emulated``, ``fake`` or ``browser``.
        processes: how many independent processes the interval rests on.
        ratio: (estimate, lower, upper) of original / compressed from interleaved runs; over 1 is faster. None for
            the original's row and where the two were not interleaved: no speed-up is claimed then.
        agreement: of the outputs there with this host's, where they were compared.
    """

    median_ms: float
    lower_ms: float
    upper_ms: float
    runtime: str
    device: str
    device_kind: str
    processes: int
    ratio: tuple[float, float, float] | None = None
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Row:
    """One model on one target.

    Attributes:
        name: ``original`` (float, not cut) or ``compressed``.
        target: the target's name.
        top1: accuracy on validation data, a fraction; None without labels.
        agreement: share of validation data with the original's top-1, a fraction; None of pictures.
        psnr: of Y of validation tiles taken as one picture, in dB; None of classes.
        macs: multiply-accumulates of one inference (one multiply and one add count once).
        parameters: trainable numbers.
        bytes, bytes_zstd, bytes_brotli: of the model file as it lies, by ``zstd -19`` and by Brotli 11.
        latency: None where the artefact was not timed.
        snr_db: signal to noise of the artefact's outputs against the quantised torch model.
        verified_agreement: share of validation data with the same top-1 in artefact and quantised torch model.
        entropy_bits: order-0 entropy of the stored integer weights, bits a weight; None where they are float.
        executed_bits: width of the arithmetic, mean over the weights; None where the artefact does not fix it.
    """

    name: Literal["original", "compressed"]
    target: str
    top1: float | None
    agreement: float | None
    macs: int
    parameters: int
    bytes: int
    bytes_zstd: int
    bytes_brotli: int
    latency: Latency | None = None
    snr_db: float | None = None
    verified_agreement: float | None = None
    entropy_bits: float | None = None
    executed_bits: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        for field in ("top1", "agreement", "verified_agreement"):
            _fraction(getattr(self, field), f"row {self.name}/{self.target}: {field}")


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    Attributes:
        name: the module's name. kind: e.g. ``conv``, ``depthwise``, ``linear``.
        out_before, out_after, in_before, in_after: channels in the original and in the compressed model.
        macs_before, macs_after: multiply-accumulates of one inference.
        bits_mean: planned bits a weight, mean over the weights; None when not quantised.
        bits_histogram: {planned bits, rounded: output channels}. This is what is stored.
        executed_bits: {target: width of the arithmetic}. This is what runs.
        di_kept: discriminant information of the kept channels over that of all of them, a fraction.
        frozen: why the layer's outputs cannot be cut, or None.
        note: one line, or "".
    """

    name: str
    kind: str
    out_before: int
    out_after: int
    in_before: int
    in_after: int
    macs_before: int
    macs_after: int
    bits_mean: float | None = None
    bits_histogram: dict[int, int] = dataclasses.field(default_factory=dict)
    executed_bits: dict[str, int] = dataclasses.field(default_factory=dict)
    di_kept: float | None = None
    frozen: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Subspace:
    """Where in one channel group of the original the teacher is to be read (DCA, `xedge.dca`).

    Attributes:
        group: the group's name. channels: how many it has.
        di: their discriminant information, of the most there can be, a fraction.
        explained: share of it in the first 1, 2, ... principal components, up to the one that completes 99 %.
    """

    group: str
    channels: int
    di: float
    explained: tuple[float, ...]


@dataclass(frozen=True)
class Iteration:
    """One round of dropping channels and fine-tuning; `index` 0 is the original.

    `select_top1` (None when unlabelled) and `select_agreement`, or of pictures `select_psnr` in dB, are measured on the
    split of the training data that is held back for choosing. `macs_fraction` is of the original's; `di_total` the sum
    over groups; `seconds` wall time.
    """

    index: int
    macs: int
    macs_fraction: float
    select_top1: float | None
    select_agreement: float | None
    di_total: float | None
    seconds: float
    allocation: str
    select_psnr: float | None = None

    def __post_init__(self) -> None:
        for field in ("select_top1", "select_agreement"):
            _fraction(getattr(self, field), f"iteration {self.index}: {field}")


@dataclass(frozen=True)
class Candidate:
    """One form in which a target could run the compressed model (`xedge.candidates`).

    Attributes:
        form: such as ``int8`` or ``float16``. path: of its model file, in the run folder. bytes: of that.
        quality: on the data held back for choosing, in words. All three None of a form that could not be made.
        words: ``shipped``, or why not.
    """

    form: str
    path: str | None
    bytes: int | None
    quality: str | None
    words: str


@dataclass(frozen=True)
class Choice:
    """Which form a target ships, and why, one line; `device` is where the candidates were timed, None if nowhere."""

    target: str
    form: str
    why: str
    device: str | None = None
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Crop:
    """A part of a held-out picture as each model restores it.

    Attributes:
        picture: its file's name. target: whose artefact is the compressed one.
        left, top, side: of the square, in pixels of the true picture.
        psnr, ssim: of Y, of this crop alone; by ``bicubic`` (``input`` where nothing is enlarged), ``original`` and
            ``compressed``.
        files: the PNG files in the run's ``crops`` folder, ``truth`` among them.
    """

    picture: str
    target: str
    left: int
    top: int
    side: int
    psnr: dict[str, float]
    ssim: dict[str, float]
    files: dict[str, str]


@dataclass(frozen=True)
class Sized:
    """Original and compressed at a size of picture other than the artefact's own.

    Attributes:
        target: whose artefact. device, runtime: where and what ran it. protocol: of the measurement.
        width, height: of the output.
        macs_before, macs_after: multiply-accumulates of one picture.
        before_ms, after_ms: median latencies. ratio: as `Latency` has it, None where no speed-up may be claimed.
    """

    target: str
    device: str
    runtime: str
    protocol: str
    width: int
    height: int
    macs_before: int
    macs_after: int
    before_ms: float
    after_ms: float
    ratio: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        xedge: version that made it. created: UTC, ISO 8601. request: what was asked, as in run.json.
        model, data, teacher: one line each. environment: versions and machine facts.
        rows: original and compressed for each target. layers: in the order of execution. iterations: in order.
        stopped_by: which of budget and accuracy floor ended the pruning, one line.
        price_of_alignment: what the target's channel multiples cost, one line; None when nothing.
        certificate: of the final cut, masked against cut. artifacts: files that devices run.
        notes: one line each. planned_bits_mean: bits a weight over the model.
        coding: what planned bits are, `xedge.quantize.Coding`.
        subspaces: discriminant components of each group. choices: which form each target ships.
        subspaces: discriminant components of each group.
        crops: of held-out pictures, where the data have any. sizes: what was timed at other sizes of pictures.
        commands: (what it does, the command), e.g. to repeat this run or to build the engine on the board.
    """

    xedge: str
    created: str
    request: dict[str, Any]
    model: str
    data: str
    teacher: str
    environment: dict[str, Any]
    rows: tuple[Row, ...]
    layers: tuple[Layer, ...]
    iterations: tuple[Iteration, ...]
    stopped_by: str
    price_of_alignment: str | None
    certificate: dict[str, Any]
    artifacts: tuple[Artifact, ...]
    notes: tuple[str, ...]
    planned_bits_mean: float | None = None
    coding: str = "fixed"
    commands: tuple[tuple[str, str], ...] = ()
    subspaces: tuple[Subspace, ...] = ()
    choices: tuple[Choice, ...] = ()
    crops: tuple[Crop, ...] = ()
    sizes: tuple[Sized, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets, in the order of the rows."""
        return tuple(dict.fromkeys(row.target for row in self.rows))

    def row(self, name: str, target: str) -> Row | None:
        """The row of `name` ("original" or "compressed") on `target`, or None."""
        return next((r for r in self.rows if (r.name, r.target) == (name, target)), None)


def _fraction(value: float | None, where: str) -> None:
    if value is not None and not 0.0 <= value <= 1.0:
        raise InternalError(f"{value!r} is not a fraction between 0 and 1", where=where)


# ---------------------------------------------------------------------------------------------------------- JSON


def to_json(report: Report) -> dict[str, Any]:
    """`report` as JSON-able data: fields in the order of their classes, keys of free-form dictionaries sorted.

    Raises:
        InternalError: a number is NaN or infinite (JSON has neither), or a value is not JSON; names the field.
    """
    return {"schema": SCHEMA, **_encode(report, "report")}


def from_json(data: Mapping[str, Any]) -> Report:
    """The inverse of `to_json`. Unknown keys are ignored (a later xedge may add fields), missing ones are not.

    Raises:
        UsageError: another schema, or a field that is missing or of another type; names the field.
    """
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, Mapping) else None
        raise UsageError(
            f"schema {found!r} where {SCHEMA} is expected",
            where="report",
        )
    return typing.cast(Report, _decode(Report, data, "report"))


def write_json(report: Report, path: Path) -> None:
    """Write report.json atomically. Raises as `to_json`, and UsageError when `path` cannot be written."""
    write_atomic(path, json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Report:
    """Read a run's report.json. Raises UsageError when the run is unfinished, or the file is not a report."""
    folder = path.parent
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        return from_json(data)
    except (FileNotFoundError, NotADirectoryError) as error:
        if (folder / "run.json").is_file():
            raise UsageError("the run is unfinished", where=str(folder), fix=f"go on: {resume(folder)}") from error
        raise UsageError("holds no report", where=str(folder), fix="give the folder of a finished run") from error
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror})", where=str(path), fix="check who may read it") from error
    except ValueError as error:
        raise UsageError(f"is not JSON ({error})", where=str(path), fix=f"make it again: {resume(folder)}") from error
    except UsageError as error:
        raise UsageError(error.what, where=f"{path}: {error.where}", fix=f"make it again: {resume(folder)}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _encode(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda k: (not isinstance(k, int), k if isinstance(k, int) else str(k)))
        return {str(k): _encode(value[k], f"{where}[{k!r}]") for k in keys}
    if isinstance(value, list | tuple):
        return [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise InternalError(f"{value} is not a number that JSON can hold", where=where)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InternalError(f"{type(value).__name__} is not JSON", where=where)


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):  # only "X | None" is used
        return None if value is None else _decode(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal and value in args:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        hints = typing.get_type_hints(kind)
        fields = {}
        for f in dataclasses.fields(kind):
            if f.name in value:
                fields[f.name] = _decode(hints[f.name], value[f.name], f"{where}.{f.name}")
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise UsageError("is missing", where=f"{where}.{f.name}")
        return kind(**fields)
    if origin is dict and isinstance(value, Mapping):
        return {args[0](k): _decode(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_decode(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise UsageError(f"{value!r} does not fit {kind}", where=where)


def write_atomic(path: Path, text: str) -> None:
    """Write UTF-8 `text` beside `path` and move it into place: a reader sees the old file or the whole new one.

    Raises:
        UsageError: the folder is missing or read-only, or the disk is full. Nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"cannot be written ({error.strerror})", where=str(path), fix="choose another folder with -o"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- for people


def print_report(report: Report, console: Console) -> None:
    """Print summary, layers and notes with rich; fits 80 columns, and is plain text where there is no terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    short = Table.grid(padding=(0, 2))
    short.add_column()
    short.add_column(overflow="fold")
    for question, answer in words.answers(report):
        short.add_row(Text(question, style="bold"), Text(answer))
    console.print(short)
    console.print()
    for glance in words.glances(report):
        table = Table(title=f"{report.model} for {glance.target}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        for column in ("original", "compressed"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("change")
        for line in glance.lines:
            style = {True: "green", False: "red", None: ""}[line.better]
            table.add_row(line.metric, line.original, line.compressed, Text(line.change, style=style))
        console.print(table)
        if glance.where:
            console.print(Text(f"  {glance.where}", style="dim"))
    if report.layers:
        head, rows = words.layer_table(report)
        table = Table(title="layers: original and compressed", title_justify="left", box=box.SIMPLE_HEAD)
        for i, column in enumerate(head):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        widths = [max(map(len, column)) for column in zip(*([head, *rows]), strict=True)]
        room = max(12, console.width - sum(widths[1:]) - 3 * len(head) - 1)
        for name, *cells in rows:
            table.add_row(*map(Text, (words.shorten(name, room), *cells)))
        console.print(table)
    for title, lines in words.sections(report):
        console.print(Text(title, style="bold"))
        for text in lines:
            console.print(Text(f"  {text}"), soft_wrap=True)


def markdown(report: Report) -> str:
    """The same as GitHub Markdown."""
    out = [f"# {_escape(words.title(report))}", ""]
    out += [*(f"- **{question}**: {_escape(answer)}" for question, answer in words.answers(report)), ""]
    for glance in words.glances(report):
        out += [f"## {_escape(glance.target)}", ""]
        rows = [(line.metric, line.original, line.compressed, line.change) for line in glance.lines]
        out += [*_pipes(("", "original", "compressed", "change"), rows), ""]
        if glance.where:
            out += [_escape(glance.where), ""]
    if report.layers:
        head, table = words.layer_table(report)
        out += ["## Layers", "", *_pipes(head, table), ""]
    for title, lines in words.sections(report):
        out += [f"## {title}", "", *(f"- {_escape(text)}" for text in lines), ""]
    return "\n".join(out)


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\|*_`<>[]" else c for c in text)


def _pipes(head: typing.Sequence[str], rows: typing.Iterable[typing.Sequence[str]]) -> list[str]:
    rule = "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(_escape(c) for c in row)} |" for row in rows)]


def write_html(report: Report, path: Path) -> None:
    """Write one self-contained HTML page atomically. Raises UsageError when `path` cannot be written."""
    from xedge import report_page  # draws with matplotlib, which the terminal does not need

    write_atomic(path, report_page.render(report, path.parent))

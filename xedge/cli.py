"""The command line: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xedge import __version__
from xedge.errors import XedgeError

if TYPE_CHECKING:
    from xedge.report import Report
    from xedge.request import Request


class Group(click.Group):
    """Every error of ours is one line on stderr and its own exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line."""
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except XedgeError as e:
            click.echo(f"xedge: {e}", err=True)
            sys.exit(e.exit_code)
        except click.exceptions.NoArgsIsHelpError as e:
            e.show()
            sys.exit(e.exit_code)
        except click.ClickException as e:  # click's own text takes four lines
            click.echo(f"xedge: {' '.join(e.format_message().split())}", err=True)
            sys.exit(e.exit_code)
        except (click.Abort, KeyboardInterrupt):  # click turns Ctrl-C into Abort
            click.echo("xedge: stopped; run the same command again to go on", err=True)
            sys.exit(130)
        except OSError as e:
            where = f"{e.filename}: " if e.filename else ""
            click.echo(f"xedge: {where}{e.strerror or e}; check that path and its disk", err=True)
            sys.exit(2)
        sys.exit(code)


class Percent(click.ParamType[float]):
    """A fraction: 0.005 or 0.5%."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{value!r} is neither a fraction nor a percentage", param, ctx)


FRACTION = Percent()


class QualityDrop(Percent):
    """A fraction, 0.005 or 0.5%, or decibels, 0.2dB."""

    name = "drop"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse; decibels stay text."""
        text = str(value).strip()
        if not text.endswith("dB"):
            return super().convert(value, param, ctx)
        try:
            return f"{float(text[:-2]):g}dB"
        except ValueError:
            self.fail(f"{value!r} is no drop such as 0.2dB", param, ctx)


DROP = QualityDrop()


class Duration(click.ParamType[float]):
    """Milliseconds: 30ms, 0.03s, 800us or a bare 30."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse."""
        number, factor = str(value).strip(), 1.0
        for unit, scale in (("ms", 1.0), ("us", 1e-3), ("s", 1e3)):
            if number.endswith(unit):
                number, factor = number.removesuffix(unit), scale
                break
        try:
            time = float(number) * factor
        except ValueError:
            time = 0.0
        if not 0 < time < float("inf"):
            self.fail(f"{value!r} is no time such as 30ms", param, ctx)
        return time


DURATION = Duration()


class PictureSize(click.ParamType[tuple[int, int]]):
    """Width and height in pixels: 1280x720."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse."""
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(value).strip())
        if found is None or min(size := (int(found[1]), int(found[2]))) < 1:
            self.fail(f"{value!r} is no size such as 1280x720", param, ctx)
        return size


PICTURE = PictureSize()


class Size(click.ParamType[int]):
    """Bytes: 300000, 300kB, 1.5MB, 256KiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse."""
        found = re.fullmatch(r"([\d.]+)\s*(|B|kB|KB|MB|KiB|MiB)", str(value).strip())
        units = {"kB": 1000, "KB": 1000, "MB": 1000**2, "KiB": 1024, "MiB": 1024**2}
        try:
            return int(float(found[1]) * units.get(found[2], 1)) if found else int(value)
        except ValueError:
            self.fail(f"{value!r} is no size such as 300kB", param, ctx)


SIZE = Size()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="xedge")
def main() -> None:
    """Make a trained CNN small and fast on a real edge device, with proof.

    \b
    Exit codes: 0 budget met, 1 internal, 2 bad input, 3 latency missed, 4 accuracy missed,
    5 device absent or lost, 6 graph not supported, 7 inconclusive measurement.
    """


@main.command()
@click.option("-m", "--model", help="Built-in name, package.module:callable or path/file.py:callable.  [lenet5]")
@click.option("--weights", type=click.Path(), help=".safetensors, or .pt read as weights only.")
@click.option("-d", "--data", help="digits, fashion-mnist, imagenet:DIR, folder:DIR, npz:FILE, ...  [digits]")
@click.option("--data-root", type=click.Path(), help="Folder of the data set's files.")
@click.option("--target", "targets", multiple=True, help="Repeat for several artefacts of one run.  [jetson]")
@click.option("--macs", type=FRACTION, help="Fraction of the MACs to keep.  [0.5 where no budget is given]")
@click.option("--latency", type=DURATION, help="Largest latency on --device, 30ms, in place of --macs.")
@click.option("--device", help="Where it is timed: ssh://USER@HOST, adb://SERIAL, FILE.toml, local.  [local]")
@click.option(
    "--max-drop", type=DROP, help="Largest fall of accuracy, 0.5%, or of PSNR, 0.2dB.  [1% or 0.2dB likewise]"
)
@click.option("--criterion", help="One of `xedge list criteria`, or path/file.py:function.  [fback]")
@click.option("--teacher", help="labels, logits, coarse, coarse:FILE, class:NAME or images.  [what the data know]")
@click.option("--bits", type=float, help="Mean bits a weight, 2 to 8; at most, beside the next two.  [8]")
@click.option("--bytes", type=SIZE, help="Largest packed artefact: 300kB, 1.5MB.")
@click.option("--bits-drop", type=DROP, help="Fewest bits that cost at most so much quality: 0.5% or 0.2dB.")
@click.option("--sensitivity", help="Which channels get more bits: output, di, kfac, uniform, mse.  [output]")
@click.option("--ranges", help="Ranges of the activations: mse, percentile, minmax.  [mse]")
@click.option("--feedback/--no-feedback", default=None, help="Feed rounding errors forward.  [yes]")
@click.option("--bias-correction/--no-bias-correction", default=None, help="Mean errors go into biases.  [yes]")
@click.option("--fit/--no-fit", default=None, help="Fit each layer to the rounded ones in front of it.  [no]")
@click.option("--equalize/--no-equalize", default=None, help="Scale channels to like ranges first.  [no]")
@click.option("--keep-float", metavar="REGEX", help="Layers that stay float.")
@click.option(
    "--bits-min", type=(int, str), multiple=True, metavar="BITS REGEX", help="Fewest bits of some layers' channels."
)
@click.option("--codebook", is_flag=True, default=None, help="Layers share values of any spacing.  [equal steps]")
@click.option("--qat", type=int, help="Epochs of training through the roundings.  [0]")
@click.option("--epochs", type=int, help="Epochs of training after each cut.  [3]")
@click.option("--iterations", type=int, help="Cuts on the way to the budget.  [4]")
@click.option("--base-epochs", type=click.IntRange(1), help="Epochs for a built-in model without weights.")
@click.option("--lr", type=float, help="Highest learning rate.  [0.02; for pictures 0.0005]")
@click.option("--batch", type=int, help="Images a training step.  [128; of pictures 16]")
@click.option("--seed", type=click.IntRange(0), help="Of everything drawn at random.  [0]")
@click.option("--exclude", metavar="REGEX", help="Layers whose channels stay.")
@click.option("--rewrite-subpixel", is_flag=True, default=None, help="Nearest neighbours in place of pixel shuffles.")
@click.option("--prune-stem", is_flag=True, default=None, help="Cut the layer that reads the image like any other.")
@click.option("--fold/--no-fold", default=None, help="Fit what stays to what the net gave before the cut.  [fold]")
@click.option("--allocation", metavar="HOW", help="uniform, global, di or taylor.  [tried against each other]")
@click.option(
    "--stop", metavar="WHAT", help="budget, or energy: cut what structural energy calls deleterious.  [budget]"
)
@click.option("--step", type=FRACTION, help="Part of the MACs that each cut takes.  [by --iterations]")
@click.option("--smoothing", type=float, help="Label smoothing in training.  [0]")
@click.option("--distill", type=float, help="Weight of the original's answers against the labels, 0 to 1.  [0]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run folder.  [runs/MODEL-DATA-DIGEST]")
@click.option("--resume", is_flag=True, help="Go on with the run in -o; it knows its own options.")
@click.option("--dry-run", is_flag=True, help="Print groups, plan and predicted cost; write nothing.")
@click.option("--bench/--no-bench", "timed", default=True, help="Time the artefacts at the end.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def compress(
    output: Path | None, resume: bool, dry_run: bool, timed: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Prune, quantise, export, verify: a trained CNN in, artefacts and a report out.

    Run the same command again after an interruption: finished steps are skipped.
    """
    from xedge.dry_run import dry_run as plan_only
    from xedge.errors import UsageError
    from xedge.pipeline import compress as run_compress
    from xedge.progress import Talk
    from xedge.request import Request
    from xedge.run import read_json

    given = {k: v for k, v in options.items() if v is not None and v != ()}
    if resume:
        if output is None:
            raise UsageError("--resume needs the run folder", fix="add -o RUN")
        if given:
            raise UsageError(
                f"--resume takes no {', '.join(sorted(given))}", fix="the run folder knows its own options"
            )
        request = Request.from_json(read_json(output / "run.json"), str(output))
    else:
        request = Request(**given)
    talk = Talk(quiet=quiet)
    if dry_run:
        facts = plan_only(request, talk)
        click.echo(json.dumps(facts, indent=1) if as_json else _dry_run_text(facts))
        return
    run = run_compress(request, output, talk, bench=timed)
    report = _read_report(run.folder)
    if as_json:
        click.echo((run.folder / "report.json").read_text())
    else:
        _print_report(report, run.folder)
    _judge(request, report, run.folder)


def _dry_run_text(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['model']} on {facts['data']}: {facts['macs'] / 1e6:.2f} M MACs, "
        f"at least {facts['least_macs'] / 1e6:.2f} M with widths in multiples of {facts['align']} "
        f"for {', '.join(facts['targets'])}",
    ]
    if not facts["trained"]:
        lines.append("the model is untrained: equal shares of every layer stand in for the ranking")
    names = list(facts["plans"])
    lines.append(f"{'group':40} {'channels':>9} " + " ".join(f"{n:>9}" for n in names))
    for g in facts["groups"]:
        widths = [facts["plans"][n]["keep"].get(g["name"], g["channels"]) for n in names]
        lines.append(f"{g['name'][:40]:40} {g['channels']:9d} " + " ".join(f"{w:9d}" for w in widths))
    for n in names:
        lines.append(f"{n}: {facts['plans'][n]['macs'] / facts['macs']:.1%} of the MACs")
    lines += [f"keeps at least half: {g['name']}: the stem (--prune-stem)" for g in facts["groups"] if g["stem"]]
    lines += [f"stays whole: {layer}: {why}" for layer, why in facts["frozen"]]
    return "\n".join(lines)


def _read_report(folder: Path) -> Report:
    from xedge.report import read_json

    return read_json(folder / "report.json")


def _print_report(report: Report, folder: Path) -> None:
    from rich.console import Console

    from xedge.report import print_report

    print_report(report, Console())
    click.echo(f"\nrun folder  {folder}\nreport      {folder / 'report.html'}")


def _judge(request: Request, report: Report, folder: Path) -> None:
    """Exit code 4 when the floor was broken, or stopped the run before its budget; 3 or 7 for the latency."""
    from xedge.errors import AccuracyMissed
    from xedge.judge import fall
    from xedge.run import read_json

    verified = read_json(folder / "verify.json")
    budget = request.budget(restores="psnr" in verified["original"])
    asked = f"--latency {budget.latency:g}ms" if budget.latency is not None else f"--macs {budget.macs}"
    if report.stopped_by.startswith("floor") and (budget.macs is not None or budget.latency is not None):
        raise AccuracyMissed(
            f"the accuracy floor stopped the run before {asked}: {report.stopped_by}",
            fix="allow a larger --max-drop, train longer with --epochs, or ask for less",
        )
    if budget.latency is not None:
        _judge_latency(report, budget.latency)
    if budget.max_drop is None:
        return
    for name in verified["targets"]:
        fell = fall(verified, name)
        if fell.drop - fell.noise > budget.max_drop:
            raise AccuracyMissed(
                f"fell by {fell.say(fell.drop)} on validation data, more than --max-drop {fell.say(budget.max_drop)}",
                where=name,
                fix="give more --bits, or keep more MACs",
            )
        if fell.drop > budget.max_drop:
            click.echo(
                f"xedge: {name}: fell by {fell.say(fell.drop)} on validation data; with {verified['images']} images "
                f"that cannot be told from --max-drop {fell.say(budget.max_drop)}",
                err=True,
            )


def _judge_latency(report: Report, budget_ms: float) -> None:
    """By the artefact's own measurement; without one (--no-bench), by the last net's that was timed whole."""
    from xedge.errors import Inconclusive, LatencyMissed

    timed = [row.latency for row in report.rows if row.name == "compressed" and row.latency is not None]
    if not timed:
        if report.stopped_by.startswith("widths"):
            raise LatencyMissed(f"--latency {budget_ms:g}ms was not met: {report.stopped_by}", fix="allow more time")
        return
    t = timed[0]
    words = f"{t.median_ms:.4g} ms [{t.lower_ms:.4g}, {t.upper_ms:.4g}] on {t.device} for --latency {budget_ms:g}ms"
    if t.lower_ms > budget_ms:
        raise LatencyMissed(f"{words}: {report.stopped_by}", fix="allow more time, or a larger --max-drop")
    if t.upper_ms > budget_ms:
        raise Inconclusive(words, fix="measure longer: xedge bench RUN --device D --protocol reference")


@main.command()
@click.argument("path", metavar="ARTEFACT|RUN", type=click.Path(path_type=Path))
@click.option(
    "--device",
    default="local",
    show_default=True,
    help="ssh://USER@HOST, adb://SERIAL, browser, FILE.toml, or this host.",
)
@click.option("--baseline", type=click.Path(path_type=Path), help="Run or file to compare with.  [the run's original]")
@click.option("--protocol", default="standard", show_default=True, help="reference, standard or quick.")
@click.option("--threads", default=1, show_default=True, help="Threads of the runtime.")
@click.option("--size", type=PICTURE, help="Output of a net that restores pictures, 1280x720.  [the artefact's own]")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON lines.")
@click.option("--quiet", is_flag=True, help="No progress.")
def bench(
    path: Path,
    device: str,
    baseline: Path | None,
    protocol: str,
    threads: int,
    size: tuple[int, int] | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time a run's artefacts, original against compressed, interleaved; append to RUN/bench.jsonl. Or time one file."""
    from xedge.bench import bench as timed
    from xedge.bench import bench_at
    from xedge.errors import UsageError
    from xedge.measurement import to_json
    from xedge.measurement import to_text as as_text
    from xedge.progress import Talk
    from xedge.report_words import sized

    if size is not None:
        if baseline is not None or not path.is_dir():
            raise UsageError("--size is for a run and its own original", where=str(path), fix="leave --size out")
        for found, comparison in bench_at(path, device, protocol, threads, Talk(quiet=quiet), size):
            row = {**found.__dict__, "measured": to_json(comparison)}
            click.echo(json.dumps(row) if as_json else sized(found))
            if comparison.verdict != "ok":
                click.echo(f"xedge: {found.target}: {comparison.verdict}: {comparison.reason}", err=True)
        return
    for name, record in timed(path, device, protocol, threads, Talk(quiet=quiet), baseline):
        click.echo(json.dumps({"target": name, **to_json(record)}) if as_json else f"{name}: {as_text(record)}")
        if record.verdict != "ok":
            click.echo(f"xedge: {name}: {record.verdict}: {record.reason}", err=True)


@main.command()
@click.argument("devices", nargs=-1, metavar="[DEVICE]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def devices(devices: tuple[str, ...], as_json: bool) -> None:
    """Say which devices can be reached, and what they are: those given, or this host, devices/*.toml and adb's."""
    from dataclasses import asdict

    from xedge.device import at_hand, look

    found = [look(device) for device in devices or at_hand()]
    if as_json:
        click.echo(json.dumps([asdict(f) for f in found], indent=1))
    else:
        for f in found:
            facts = ", ".join(f"{key} {value}" for key, value in f.facts.items())
            click.echo(f"{'reached' if f.error is None else 'absent':8} {f.name} ({f.kind}): {f.error or facts}")
    if any(f.error for f in found):
        raise SystemExit(5)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--device", required=True, help="ssh://USER@HOST, adb://SERIAL, FILE.toml, or local.")
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of pictures.")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="NAME CLASS a line.  [labels.txt there, or its folders]"
)
@click.option("--preprocess", metavar="OPTIONS", help="resize=256&mean=0.5&std=0.5.  [as the run's own data]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def lpirc(
    run: Path, device: str, images: Path, labels: Path | None, preprocess: str | None, as_json: bool, quiet: bool
) -> None:
    """Run LPIRC's rules on a device: pictures decoded, resized and classified there within 30 ms each on average."""
    from xedge.lpirc import contest
    from xedge.progress import Talk

    result = contest(run, device, images, labels, preprocess, Talk(quiet=quiet).say)
    click.echo(json.dumps(result.figures(), indent=1) if as_json else result)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--latency", type=DURATION, help="Largest median latency, 30ms.")
@click.option("--max-drop", type=DROP, help="Largest fall of accuracy, 1% or 0.01, or of PSNR, 0.2dB.")
@click.option("--device", help="Whose measurements count, by name.  [every device but this host]")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the verdicts as JUnit XML.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gate(
    run: Path,
    latency: float | None,
    max_drop: float | str | None,
    device: str | None,
    junit: Path | None,
    as_json: bool,
) -> None:
    """Hold a run to its budgets, by what xedge bench measured: pass, fail, inconclusive or invalid, as an exit code."""
    from dataclasses import asdict

    from xedge.gate import gate_run, outcome, write_junit

    checks = gate_run(run, latency, max_drop, device)
    if as_json:
        click.echo(json.dumps([asdict(c) for c in checks], indent=1))
    else:
        click.echo("\n".join(map(str, checks)))
    if junit is not None:
        write_junit(checks, junit)
    error = outcome(checks)
    if error is not None:
        raise error


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--html", is_flag=True, help="Say where the page is, instead of printing the tables.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(run: Path, html: bool, markdown: bool, as_json: bool) -> None:
    """Print a run's report, and write report.json and report.html anew with what was measured since."""
    from xedge.bench import refresh
    from xedge.report import markdown as as_markdown

    found = refresh(run)
    if as_json:
        click.echo((run / "report.json").read_text())
    elif markdown:
        click.echo(as_markdown(found))
    elif html:
        click.echo(run / "report.html")
    else:
        _print_report(found, run)


@main.command()
@click.argument("path", metavar="ARTEFACT|RUN", type=click.Path(path_type=Path))
@click.option("--layer-info", type=click.Path(path_type=Path), help="What trtexec --exportLayerInfo wrote.")
@click.option("--profile", type=click.Path(path_type=Path), help="benchmark_model's log, or its profiling CSV.")
@click.option("--require-integer", type=FRACTION, metavar="SHARE", help="Exit with 6 when fewer MACs are integer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def audit(
    path: Path, layer_info: Path | None, profile: Path | None, require_integer: float | None, as_json: bool
) -> None:
    """Say per layer what was planned, what runs, and why not in integers."""
    from xedge import audit as audits

    found = audits.audit(path, layer_info, profile)
    if as_json:
        click.echo(json.dumps({"audits": [a.to_json() for a in found]}, indent=1))
    else:
        click.echo("\n\n".join(audits.to_text(a) for a in found))
    if require_integer is not None:
        audits.require_integer(found, require_integer)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(["tflite"]), required=True, help="Format to write.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [MODEL with the new suffix]")
@click.option("--weights", type=click.Choice(["float16", "int4"]), help="Smaller: of float layers; of convolutions.")
def convert(model: Path, kind: str, output: Path | None, weights: Any) -> None:
    """Convert an ONNX model: float, or quantised (Q/DQ) by xedge or another tool."""
    from xedge.convert import convert as run

    click.echo(run(model, kind, output, weights))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--target", help="One of the run's targets.  [all]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def diagnose(run: Path, target: str | None, as_json: bool, quiet: bool) -> None:
    """Say at which stage a run lost its accuracy, which layers are to blame, and the flag that mends it."""
    from xedge import diagnose as doctors
    from xedge.progress import Talk

    found = doctors.diagnose(run, target, Talk(quiet=quiet))
    if as_json:
        click.echo(json.dumps([d.to_json() for d in found], indent=1))
    else:
        click.echo("\n\n".join(doctors.to_text(d) for d in found))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [FILE without .br]")
def unpack(file: Path, output: Path | None) -> None:
    """Restore a packed artefact (.br) bit for bit, checked against the digest that it carries."""
    from xedge.pack import unpack as restore

    click.echo(restore(file, output))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Picture to write.")
@click.option("--target", help="Whose artefact.  [the run's first]")
@click.option("--tile", type=PICTURE, help="Engine's input, 128x128.  [the artefact's own, or by its receptive field]")
@click.option("--original", is_flag=True, help="Run the float original instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def upscale(
    run: Path,
    picture: Path,
    output: Path,
    target: str | None,
    tile: tuple[int, int] | None,
    original: bool,
    as_json: bool,
) -> None:
    """Run a run's artefact on a picture of any size, tile by tile without seams, on this host."""
    from xedge.upscale import upscale as restore

    done = restore(run, picture, output, target=target, tile=tile, original=original)
    if as_json:
        click.echo(json.dumps(done.to_json()))
    else:
        (w, h), (tw, th) = done.size, done.tile
        click.echo(f"{output}: {w}x{h} by {done.target}, {done.tiles} tiles of {tw}x{th}, overlap {done.overlap}")


@main.command(name="list")
@click.argument("what", type=click.Choice(["models", "data", "targets", "criteria"]))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(what: str, as_json: bool) -> None:
    """Print what there is to name."""
    from xedge import load

    if what == "models":
        rows = {n: line for n, (_, line) in load.models().items()}
    elif what == "data":
        rows = load.data_kinds()
    elif what == "criteria":
        rows = load.criteria()
    else:
        targets = load.targets()
        if as_json:
            click.echo(json.dumps({n: t.to_json() for n, t in targets.items()}, indent=1))
            return
        rows = {n: t.summary + (f" (also: {', '.join(t.aliases)})" if t.aliases else "") for n, t in targets.items()}
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    width = max(map(len, rows))
    for name, line in rows.items():
        click.echo(f"{name:{width}}  {line}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Say what is installed, what is missing, and the command that installs it."""
    from dataclasses import asdict

    from xedge.doctor import examine, healthy

    findings = examine()
    if as_json:
        click.echo(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        width = max(len(f.name) for f in findings)
        for f in findings:
            fix = f"  ->  {f.fix}" if f.fix and f.status != "ok" else ""
            click.echo(f"{f.status:8} {f.name:{width}}  {f.found or '-'}  ({f.needed_for}){fix}")
    if not healthy(findings):
        raise SystemExit(2)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def lint(model: Path, as_json: bool) -> None:
    """Ask NVIDIA's own parser and builder whether TensorRT takes MODEL.onnx; no GPU is needed."""
    from dataclasses import asdict
    from importlib import import_module

    from xedge.errors import UnsupportedGraph

    found = import_module("xedge.targets.tensorrt_lint").lint(model)
    errors = [f for f in found if f.severity == "error"]
    if as_json:
        click.echo(json.dumps([asdict(f) for f in found], indent=1))
    else:
        for f in found:
            click.echo(f)
        if not errors:
            click.echo(f"{model}: TensorRT takes it")
    if errors:
        n = f"{len(errors)} error" + "s" * (len(errors) > 1)
        raise UnsupportedGraph(f"TensorRT refuses it, with {n}", where=str(model), fix="mend the nodes named above")


if __name__ == "__main__":
    main()

"""The command that makes a run and the one that prints its report."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xedge.cli_types import DROP, DURATION, FRACTION, SIZE

if TYPE_CHECKING:
    from xedge.report import Report
    from xedge.request import Request


@click.command()
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
@click.option("--sensitivity", help="Which channels get more bits: fisher, output, di, kfac, uniform, mse.  [fisher]")
@click.option("--ranges", help="Ranges of the activations: mse, percentile, minmax.  [mse]")
@click.option("--feedback/--no-feedback", default=None, help="Feed rounding errors forward.  [yes]")
@click.option("--bias-correction/--no-bias-correction", default=None, help="Mean errors go into biases.  [yes]")
@click.option("--fit/--no-fit", default=None, help="Fit each layer to the rounded ones before it.  [if memory allows]")
@click.option("--equalize/--no-equalize", default=None, help="Scale channels to like ranges first.  [no]")
@click.option("--keep-float", metavar="REGEX", help="Layers that stay float.")
@click.option(
    "--bits-min", type=(int, str), multiple=True, metavar="BITS REGEX", help="Fewest bits of some layers' channels."
)
@click.option("--bits-per", help="What has a width of its own: channel, layer, tensor (with one scale).  [channel]")
@click.option("--codebook", is_flag=True, default=None, help="Layers share values of any spacing.  [equal steps]")
@click.option(
    "--coding", help="What bits are: fixed widths, or entropy, those of a code.  [fixed; with --bytes entropy]"
)
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
        _judge_latency(report, budget.latency, request.timed_on, folder)
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


def _judge_latency(report: Report, budget_ms: float, device: str, folder: Path) -> None:
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
        again = shlex.join(["xedge", "bench", str(folder), "--device", device, "--protocol", "reference"])
        raise Inconclusive(words, fix=f"measure longer: {again}")


@click.command()
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

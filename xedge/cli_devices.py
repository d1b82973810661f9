"""The commands that reach a device, or judge what was measured there."""

from __future__ import annotations

import json
from pathlib import Path

import click

from xedge.cli_types import DROP, DURATION, PICTURE


@click.command()
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


@click.command()
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


@click.command()
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


@click.command()
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

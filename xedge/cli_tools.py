"""The commands that look at, convert or use one artefact, and those that say what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from xedge.cli_types import FRACTION, PICTURE


@click.command()
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


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(["tflite"]), required=True, help="Format to write.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [MODEL with the new suffix]")
@click.option("--weights", type=click.Choice(["float16", "int4"]), help="Smaller: of float layers; of convolutions.")
def convert(model: Path, kind: str, output: Path | None, weights: Any) -> None:
    """Convert an ONNX model: float, or quantised (Q/DQ) by xedge or another tool."""
    from xedge.convert import convert as run

    click.echo(run(model, kind, output, weights, lambda line: click.echo(f"xedge: {line}", err=True)))


@click.command()
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


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [FILE without .br]")
def unpack(file: Path, output: Path | None) -> None:
    """Restore a packed artefact (.br) bit for bit, checked against the digest that it carries."""
    from xedge.pack import unpack as restore

    click.echo(restore(file, output))


@click.command()
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
        note = f"; {done.note}" if done.note else ""
        tiles = f"{done.tiles} tile{'s' * (done.tiles > 1)} of {tw}x{th}, overlap {done.overlap}"
        click.echo(f"{output}: {w}x{h} by {done.target}, {tiles}{note}")


@click.command(name="list")
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


@click.command()
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


@click.command()
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

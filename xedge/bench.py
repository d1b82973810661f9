"""Time artefacts on a device, and bring a run's report up to date with what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from xedge.agree import check_outputs
from xedge.device import Device, open_device
from xedge.errors import UsageError, resume
from xedge.load import load_target
from xedge.measure import Protocol, compare, measure, preset, runtime_for
from xedge.measurement import BENCH, Agreement, Comparison, Measurement, append_measurement, read_measurements, trust
from xedge.progress import Talk
from xedge.report import Report, Sized, read_json, write_html, write_json
from xedge.run import digest_file
from xedge.target import Artifact


def bench(
    path: Path, address: str, protocol: str, threads: int, talk: Talk, baseline: Path | None = None
) -> Iterator[tuple[str, Measurement | Comparison]]:
    """Time a run's artefacts, or one model file, each against its baseline in the same runtime, interleaved.

    What belongs to a run is appended to its bench.jsonl as it comes, so that a device lost later loses nothing.

    Args:
        path: a run folder, of which a device that is for one target runs that target's artefact only; or a file.
        baseline: another run or file; the run's own original when None, and nothing for a file.

    Raises:
        UsageError: neither a finished run nor a model file, or an artefact that is no longer what the report says.
        DeviceError: the device is absent or was lost.
    """
    chosen = preset(protocol)
    if threads < 1:
        raise UsageError(f"--threads {threads} is below 1", fix="give 1 or more")
    if path.is_file():
        runtime_for(path)
        artifacts: Sequence[Artifact] = ()
    else:
        artifacts = read_json(path / "report.json").artifacts
    with open_device(address, say=talk.say) as device:
        if path.is_file():
            other = baseline and _model(baseline, None, path.suffix)
            yield path.name, _timed(device, path, other, chosen, threads, talk)
            return
        for artifact in runs_there(artifacts, device, path):
            model = checked(path, artifact)
            other = _model(baseline, artifact.target, model.suffix) if baseline else path / f"original{model.suffix}"
            if not other.is_file():
                raise UsageError("there is no such file", where=str(other), fix=f"make it again: {resume(path)}")
            record = _timed(device, model, other, chosen, threads, talk)
            append_measurement(path / BENCH, record)
            yield artifact.target, record
    refresh(path)


def bench_at(
    path: Path, address: str, protocol: str, threads: int, talk: Talk, size: tuple[int, int]
) -> Iterator[tuple[Sized, Comparison]]:
    """Time a run's artefacts, original against compressed, on pictures of another size, and put that into its report.

    Args:
        path: a run folder, of a net that restores pictures.
        size: (width, height) of the output.

    Raises:
        UsageError: not a finished run, or a size that no input gives.
        UnsupportedGraph: the net takes pictures of one size only.
        DeviceError: the device is absent or was lost.
    """
    from xedge.onnx_graph import Graph
    from xedge.sizes import baseline_of, compiled, resized, scale_of, shipped, source

    chosen, report = preset(protocol), read_json(path / "report.json")
    if threads < 1:
        raise UsageError(f"--threads {threads} is below 1", fix="give 1 or more")
    with open_device(address, say=talk.say) as device:
        for artifact in runs_there(report.artifacts, device, path):
            target = load_target(artifact.target)
            form = shipped(report, artifact.target)
            small, large = source(path, target, form), source(path, None)
            scale, graph = scale_of(small), Graph(small)
            own = graph.shapes[graph.inputs[0]]
            if size[0] % scale or size[1] % scale:
                near = "x".join(str(max(scale, n // scale * scale)) for n in size)
                raise UsageError(f"is no multiple of {scale}", where=f"--size {size[0]}x{size[1]}", fix=f"give {near}")
            height, width = size[1] // scale, size[0] // scale
            rows = [report.row(name, artifact.target) for name in ("original", "compressed")]
            before, after = (round(r.macs * height * width / (own[2] * own[3])) if r else 0 for r in rows)
            with (
                compiled(resized(small, height, width), target, form) as model,
                baseline_of(resized(large, height, width), target) as other,
            ):
                record = _timed(device, model, other, chosen, threads, talk)
            assert isinstance(record, Comparison)
            append_measurement(path / BENCH, record)
            ratio = (record.ratio.median, record.ratio.lower, record.ratio.upper) if record.verdict == "ok" else None
            found = Sized(
                target=artifact.target,
                device=record.b.device,
                runtime=f"{record.b.runtime} {record.b.runtime_version}",
                protocol=protocol,
                width=size[0],
                height=size[1],
                macs_before=before,
                macs_after=after,
                before_ms=record.a.interval.median,
                after_ms=record.b.interval.median,
                ratio=ratio,
            )
            key = (found.target, found.device, found.width, found.height)
            others = (s for s in report.sizes if (s.target, s.device, s.width, s.height) != key)
            report = replace(report, sizes=(*others, found))
            write_json(report, path / "report.json")
            write_html(report, path / "report.html")
            yield found, record


def _timed(
    device: Device, model: Path, other: Path | None, protocol: Protocol, threads: int, talk: Talk
) -> Measurement | Comparison:
    agreed: dict[Path, Agreement | None] = {}
    if device.kind == "browser":  # whose kernels are other ones
        for file in (model, *filter(None, [other])):
            agreed[file] = check_outputs(device, file)
            talk.say(f"{file.name}: {agreed[file] or 'outputs not compared: it has several inputs'}")
    what = "processes" if other is None else "pairs of processes"
    talk.say(f"timing {model.name} on {device.name}: {protocol.processes} {what}")

    def progress(done: int, total: int, doing: str) -> None:
        talk.say(f"  {done + 1} of {total}, {doing}")

    if other is None:
        alone = measure(device, model, None, protocol, progress, threads=threads)
        return replace(alone, agreement=agreed.get(model))
    both = compare(device, other, model, protocol, progress, threads=threads)
    a, b = (replace(m, agreement=agreed.get(file)) for m, file in ((both.a, other), (both.b, model)))
    return replace(both, a=a, b=b)


def runs_there(artifacts: Sequence[Artifact], device: Device, run: Path) -> list[Artifact]:
    """The run's artefacts that a device is for; UsageError where there are none."""
    if device.target is None:
        return list(artifacts)
    target = load_target(device.target).name
    found = [artifact for artifact in artifacts if artifact.target == target]
    if not found:
        made = ", ".join(artifact.target for artifact in artifacts)
        raise UsageError(f"has nothing for {target}, only for {made}", where=str(run), fix=f"device {device.name}")
    return found


def checked(run: Path, artifact: Artifact) -> Path:
    """The artefact's file, if it is there and unchanged."""
    model = run / artifact.path
    if not model.is_file():
        raise UsageError("there is no such file", where=str(model), fix=f"make it again: {resume(run)}")
    if digest_file(model) != artifact.sha256:
        raise UsageError("is not what the report says", where=str(model), fix=f"make it again: {resume(run)}")
    return model


def _model(baseline: Path, target: str | None, suffix: str) -> Path:
    """A baseline's model file: itself, or a run's artefact for the same target."""
    if baseline.is_dir() and target is not None:
        found = [checked(baseline, a) for a in read_json(baseline / "report.json").artifacts if a.target == target]
        if not found:
            raise UsageError(f"has nothing for {target}", where=str(baseline), fix="give another --baseline")
        return found[0]
    if not baseline.is_file():
        raise UsageError("is no model file", where=f"--baseline {baseline}", fix=f"give a {suffix} file")
    if baseline.suffix != suffix:
        raise UsageError(f"is no {suffix} file", where=f"--baseline {baseline}", fix="both need the same runtime")
    return baseline


def refresh(folder: Path) -> Report:
    """Write report.json and report.html anew with each artefact's best comparison with the original, by `trust`.

    Raises:
        UsageError: not a finished run.
    """
    from xedge.assemble import latency_of

    report = read_json(folder / "report.json")
    originals = {digest_file(path) for path in folder.glob("original.*") if path.suffix in (".onnx", ".tflite")}
    best: dict[str, Comparison] = {}
    for record in read_measurements(folder / BENCH):
        if isinstance(record, Comparison) and record.a.sha256 in originals:
            old = best.get(record.b.sha256)
            if old is None or trust(record) >= trust(old):
                best[record.b.sha256] = record
    digests = {a.target: a.sha256 for a in report.artifacts}
    rows = tuple(
        replace(r, latency=latency_of(best[digests[r.target]], r.name == "compressed"))
        if digests.get(r.target) in best
        else r
        for r in report.rows
    )
    report = replace(report, rows=rows)
    write_json(report, folder / "report.json")
    write_html(report, folder / "report.html")
    return report

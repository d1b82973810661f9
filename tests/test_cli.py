"""The command line: what it prints where, what it writes, and the code it ends with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from xedge import cli, cli_types, iterate, pipeline
from xedge.choose import Settings
from xedge.plan import Budget
from xedge.report import markdown, read_json
from xedge.request import Request

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]


def tree(folder: Path) -> dict[str, int]:
    """Every file and when it was written."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    "command", [[], ["compress"], ["bench"], ["devices"], ["gate"], ["report"], ["list"], ["doctor"]]
)
def test_help_names_every_option(command: list[str]) -> None:
    found = CliRunner().invoke(cli.main, [*command, "--help"])
    assert found.exit_code == 0
    target: click.Command = cli.main
    for name in command:
        assert isinstance(target, click.Group)
        target = target.commands[name]
    for parameter in target.params:
        if isinstance(parameter, click.Option):
            assert all(o in found.output for o in parameter.opts)
            assert parameter.help


def test_every_option_of_compress_reaches_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    monkeypatch.setattr("xedge.dry_run.dry_run", lambda request, talk: seen.append(request) or {})
    given = {
        "model": "resnet20", "weights": "w.pt", "data": "cifar10", "data_root": "d", "targets": ("android", "jetson"),
        "latency": 2.5, "device": "local",
        "macs": 0.4, "max_drop": 0.005, "criterion": "di", "teacher": "logits", "bits": 4.5, "epochs": 7,
        "iterations": 9, "base_epochs": 2, "lr": 0.3, "batch": 64, "seed": 5, "exclude": "head", "prune_stem": True,
        "bytes": 300_000, "bits_drop": 0.01, "sensitivity": "kfac",
        "ranges": "percentile", "feedback": False, "bias_correction": False, "fit": True, "equalize": True,
        "keep_float": "^fc", "bits_min": ((6, "^conv1$"), (5, "conv2")), "bits_per": "layer",
        "codebook": True, "coding": "entropy", "qat": 3,
        "fold": False, "allocation": "taylor", "stop": "energy", "step": 0.2, "smoothing": 0.1, "distill": 0.5,
        "rewrite_subpixel": True,
    }  # fmt: skip
    assert set(given) == set(Request.__dataclass_fields__)
    words = ["compress", "--dry-run", "--json", "--target", "android", "--target", "jetson", "--max-drop", "0.5%"]
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag if value else flag.replace("--", "--no-")]
        elif name == "bits_min":
            words += [word for bits, pattern in given["bits_min"] for word in (flag, str(bits), pattern)]
        elif name not in ("targets", "max_drop"):
            words += [flag, str(value)]
    found = CliRunner().invoke(cli.main, words)
    assert found.exit_code == 0, found.output
    assert seen == [Request(**given)]  # type: ignore[arg-type]
    seen.clear()
    CliRunner().invoke(cli.main, ["compress", "--dry-run", "--json"])
    assert seen == [Request()]


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("50%", 0.5), (" 0.5% ", 0.005), ("1e-2", 0.01), ("0", 0.0)])
def test_fractions(text: str, value: float) -> None:
    assert cli_types.FRACTION.convert(text, None, None) == pytest.approx(value)


def test_widths_are_multiples_of_the_targets_align_and_the_report_has_their_price(finished: Path) -> None:
    made = read_json(finished / "report.json")
    widths = {layer.name: (layer.out_before, layer.out_after) for layer in made.layers}
    assert all(after % 8 == 0 or after == before for before, after in widths.values())
    assert any(after < before for before, after in widths.values())
    assert 2 * widths["first"][1] >= widths["first"][0]
    assert any(note.startswith("first, the stem, keeps at least 50%") for note in made.notes)
    assert widths["head"] == (4, 4)
    assert {layer.name: layer.frozen for layer in made.layers}["head"] == "model output"
    found = re.fullmatch(
        r"in the last round widths in multiples of 8 give up (.*)% of the remaining importance; "
        r"free widths would give up (.*)%",
        made.price_of_alignment or "",
    )
    assert found
    aligned, free = map(float, found.groups())
    assert 0 < free < 100
    assert 0 < aligned < 100
    assert f"price of the hardware's channel multiples: {found.group()}" in markdown(
        read_json(finished / "report.json")
    )


@pytest.mark.parametrize(("text", "ms"), [("30ms", 30), ("0.03s", 30), ("800us", 0.8), (" 30 ", 30), ("1e1 ms", 10)])
def test_durations(text: str, ms: float) -> None:
    assert cli_types.DURATION.convert(text, None, None) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "fast", "0", "-1ms", "nan", "infs", "30 min"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="no time such as 30ms"):
        cli_types.DURATION.convert(text, None, None)


def test_a_run_prints_its_report_on_stdout_and_its_progress_on_stderr(
    xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    plain = xedge(*arguments, "-o", folder)
    assert plain.code == 0
    assert "MACs" in plain.out
    assert str(folder / "report.html") in plain.out
    assert "8/8" in plain.err
    assert "8/8" not in plain.out
    quiet = xedge(*arguments, "--quiet", "-o", folder)
    assert quiet.code == 0
    assert quiet.err == ""
    as_json = xedge(*arguments, "--json", "-o", folder)
    facts = json.loads(as_json.out)
    assert facts == report(folder)
    assert {r["target"] for r in facts["rows"]} == {"jetson-orin-nano", "android"}
    assert [r["index"] for r in facts["iterations"]] == [0, 1, 2]
    assert facts["rows"][0]["macs"] > facts["rows"][1]["macs"] / 0.35 * 0.99
    assert facts["stopped_by"].startswith("budget")


def test_a_finished_run_is_not_made_again(xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = tree(folder)
    again = xedge("compress", "--resume", "--no-bench", "-o", folder)
    assert again.code == 0, again.err
    assert "epoch" not in again.err
    changed = {Path(p).name for p, t in tree(folder).items() if before.get(p) != t}
    assert changed == {"report.json", "report.html"}


def test_resume(xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path) -> None:
    for words, line in (
        (["--resume"], "needs the run folder"),
        (["--resume", "-o", finished, "--seed", "1"], "--resume takes no seed"),
        (["--resume", "-o", tmp_path], "run.json: there is no such file"),
    ):
        ended = xedge("compress", *words)
        assert ended.code == 2
        assert line in ended.err
    folder = tmp_path / "older"
    shutil.copytree(finished, folder)
    request = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**request, "unheard_of": 1}))
    assert "another version" in xedge("compress", "--resume", "-o", folder).err


def test_a_dry_run_writes_nothing(xedge: Xedge, arguments: list[str], tmp_path: Path) -> None:
    before = {p.name for p in xedge.folder.iterdir() if not p.name.startswith("log-")}
    plain = xedge(*arguments, "--dry-run", "-o", tmp_path / "run")
    assert plain.code == 0, plain.err
    for part in ("second", "stays whole: head", "of the MACs"):
        assert part in plain.out
    facts = json.loads(xedge(*arguments, "--dry-run", "--json", "--quiet").out)
    assert facts["trained"]
    assert facts["macs"] == 64 * 9 * 16 + 16 * 9 * 16 * 32 + 32 * 4
    assert facts["plans"]["global"]["macs"] <= 0.35 * facts["macs"]
    assert not (tmp_path / "run").exists()
    assert {p.name for p in xedge.folder.iterdir() if not p.name.startswith("log-")} == before


def test_a_dry_run_of_an_untrained_model(xedge: Xedge) -> None:
    facts = json.loads(xedge("compress", "--dry-run", "--json", "--quiet").out)
    assert facts["model"] == "lenet5"
    assert not facts["trained"]
    assert set(facts["plans"]) == {"uniform"}


# -- budgets ----------------------------------------------------------------------------------------------------------


def best_above(facts: Any, drop: float) -> int:
    """The last iteration before the first that fell below the floor."""
    rows = facts["iterations"]
    for row in rows[1:]:
        if row["select_top1"] < rows[0]["select_top1"] - drop - 1e-12:
            return int(row["index"]) - 1
    return int(rows[-1]["index"])


def test_the_floor_before_the_macs_budget_is_code_4_and_the_report_is_there(
    xedge: Xedge, arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # without training a random choice falls; the floor is where the original is
    words = [*arguments, "--epochs", "0", "--criterion", "random", "--max-drop", "0", "--macs", "0.3"]
    ended = xedge(*words, "--quiet", "-o", folder)
    assert ended.code == 4, ended
    *before, line = ended.err.splitlines()
    assert line.startswith("xedge: the accuracy floor stopped the run before --macs 0.3")
    assert not any(
        text.startswith("xedge: ") or "Traceback" in text for text in before
    )  # LiteRT says a line of its own
    assert "MACs" in ended.out
    facts = report(folder)
    assert facts["stopped_by"].startswith("floor")
    chosen = best_above(facts, 0.0)
    assert chosen < len(facts["iterations"]) - 1
    assert facts["rows"][1]["macs"] == facts["iterations"][chosen]["macs"], "not the best model above the floor"
    again = xedge("compress", "--resume", "--no-bench", "--quiet", "-o", folder)
    assert again.code == 4


def test_without_a_macs_budget_the_floor_is_the_end_of_the_work(
    xedge: Xedge, arguments: list[str], tmp_path: Path
) -> None:
    at = arguments.index("--macs")
    words = arguments[:at] + arguments[at + 2 :]
    ended = xedge(*words, "--epochs", "1", "--max-drop", "60%", "--bits", "8", "-o", tmp_path / "run")
    facts = report(tmp_path / "run")
    assert ended.code == 0, ended.err
    assert facts["stopped_by"].split(":")[0] in ("floor", "widths")
    assert len(facts["iterations"]) > 2
    macs = [r["macs"] for r in facts["iterations"]]
    assert macs == sorted(set(macs), reverse=True)
    assert facts["rows"][1]["macs"] == macs[best_above(facts, 0.6)]


def test_structural_energy_stops_where_the_floor_or_the_information_says(
    xedge: Xedge, arguments: list[str], tmp_path: Path
) -> None:
    at = arguments.index("--macs")
    words = [*arguments[:at], *arguments[at + 2 :], "--stop", "energy", "--max-drop", "10%", "--bits", "8"]
    ended = xedge(*words, "-o", tmp_path / "run")
    assert ended.code == 0, ended.err
    facts = report(tmp_path / "run")
    assert facts["stopped_by"].split(":")[0] in ("energy", "floor")
    assert "--stop energy" in facts["commands"][0][1]
    first = json.loads((tmp_path / "run" / "prune" / "001.json").read_text())
    assert first["allocation"].startswith("energy 0.")
    assert facts["iterations"][1]["macs"] < facts["iterations"][0]["macs"]
    # Bisection: every lambda that was taken back is above the one that was chosen.
    chosen = float(first["allocation"].split()[1])
    assert chosen in [float(name.split()[1]) for name in first["candidates"]]


def test_a_named_allocation_is_the_only_one_tried(xedge: Xedge, arguments: list[str], tmp_path: Path) -> None:
    ended = xedge(*arguments, "--step", "30%", "--epochs", "0", "--no-fold", "--allocation", "di", "-o", tmp_path / "r")
    assert ended.code == 0, ended.err
    facts = report(tmp_path / "r")
    assert {r["allocation"] for r in facts["iterations"][1:]} == {"di"}
    assert list(json.loads((tmp_path / "r" / "prune" / "001.json").read_text())["candidates"]) == ["di"]
    assert "--step 0.3" in facts["commands"][0][1]
    assert "--no-fold" in facts["commands"][0][1]


@pytest.mark.parametrize(
    ("now", "goal", "step", "iterations", "index", "want"),
    [
        (1.0, 0.25, None, 2, 1, 0.5),  # equal ratios
        (0.5, 0.25, None, 2, 2, 0.25),
        (0.4, 0.25, None, 2, 5, 0.25),  # the widths fell short: straight to the goal
        (1.0, 0.25, 0.3, 2, 1, 0.7),
        (0.3, 0.25, 0.3, 9, 4, 0.25),
        (1.0, None, None, 4, 1, 0.85),
        (0.8, None, 0.5, 4, 2, 0.4),
    ],
)
def test_the_schedule(
    now: float, goal: float | None, step: float | None, iterations: int, index: int, want: float
) -> None:
    settings = Settings("di", Budget(goal), 1, 0, iterations, 0.1, 0, 8, step=step)
    assert iterate._next(now, goal, settings, index) == pytest.approx(want)


def test_training_that_makes_it_worse_is_undone(xedge: Xedge, arguments: list[str], tmp_path: Path) -> None:
    words = [*arguments, "--iterations", "1", "--epochs", "1"]
    harmful = xedge(*words, "--lr", "1", "--smoothing", "1", "-o", tmp_path / "harmful")
    assert harmful.code == 0, harmful.err
    assert "training made it worse on held-back data and is undone" in harmful.err
    none = xedge(*words, "--epochs", "0", "-o", tmp_path / "none")
    assert none.code == 0, none.err
    one, other = (load_file(tmp_path / name / "prune" / "001.safetensors") for name in ("harmful", "none"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_rebuilt_model_is_the_compressed_one(finished: Path) -> None:
    model = pipeline.rebuild(finished)
    state, saved = model.state_dict(), load_file(finished / "model.safetensors")
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[k], saved[k]) for k in saved)
    plan = json.loads((finished / "plan.json").read_text())
    for name, kept in plan["keep"].items():
        assert saved[f"{name}.weight"].shape[0] == len(kept)
    assert any(len(kept) < plan["sizes"][name] for name, kept in plan["keep"].items())
    x, y = tiny.pictures(128, 3)
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).float().mean())
    verified = json.loads((finished / "verify.json").read_text())
    assert accuracy == pytest.approx(verified["float"]["top1"], abs=1e-6)
    assert not list(finished.rglob("*.pkl"))
    assert not list(finished.rglob("*.pt"))


def test_without_labels_agreement_takes_the_place_of_accuracy(
    xedge: Xedge, arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [f"{tiny.DATA}?labelled=no" if w == tiny.DATA else w for w in arguments]
    ended = xedge(*words, "-o", folder)
    assert ended.code == 0, ended.err
    facts = report(folder)
    assert all(r["top1"] is None for r in facts["rows"])
    assert all(r["select_top1"] is None for r in facts["iterations"])
    assert facts["iterations"][0]["select_agreement"] == 1
    assert all(0.5 < r["agreement"] <= 1 for r in facts["rows"] if r["name"] == "compressed")
    assert facts["teacher"] == "the original's logits"
    assert "agreement" in ended.err
    assert "top-1" not in ended.err


# -- the other commands -----------------------------------------------------------------------------------------------


def test_report(xedge: Xedge, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert json.loads(xedge("report", folder, "--json").out) == report(finished)
    assert "| " in xedge("report", folder, "--markdown").out
    assert xedge("report", folder, "--html").out.strip() == str(folder / "report.html")
    assert "jetson-orin-nano" in xedge("report", folder).out


def test_list(xedge: Xedge) -> None:
    for what, names in (
        ("models", {"lenet5", "resnet20", "mobilenet_v2"}),
        ("data", {"digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "imagenet", "folder", "npz"}),
        ("targets", {"jetson-orin-nano", "android", "host-cpu", "pixel2"}),
        ("criteria", {"di", "diloss", "taylor", "magnitude", "random"}),
    ):
        rows = json.loads(xedge("list", what, "--json").out)
        assert names <= set(rows)
        assert all(rows.values()), f"{what}: each has a line on it"
        text = xedge("list", what).out.splitlines()
        assert [line.split()[0] for line in text] == list(rows)


def test_doctor(xedge: Xedge) -> None:
    rows = json.loads(xedge("doctor", "--json").out)
    assert {"torch", "onnxruntime"} <= {r["name"] for r in rows}
    ended = xedge("doctor")
    assert ended.code in (0, 2)
    assert len(ended.out.splitlines()) == len(rows)


def test_bench(xedge: Xedge, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    facts = report(folder)
    facts["artifacts"] = [a for a in facts["artifacts"] if a["target"] == "android"]
    (folder / "report.json").write_text(json.dumps(facts))
    ended = xedge("bench", folder, "--protocol", "quick", "--json", "--quiet")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out.splitlines()[0])["target"] == "android"
    assert len((folder / "bench.jsonl").read_text().splitlines()) == 1
    rows = {(r["target"], r["name"]): r["latency"] for r in report(folder)["rows"]}
    assert rows["android", "original"]["median_ms"] > 0
    assert rows["android", "compressed"]["lower_ms"] <= rows["android", "compressed"]["upper_ms"]
    assert rows["jetson-orin-nano", "compressed"] is None
    (model,) = folder.glob("targets/android/*.tflite")
    model.write_bytes(model.read_bytes() + b"x")
    spoiled = xedge("bench", folder, "--protocol", "quick", "--quiet")
    assert spoiled.code == 2
    assert "is not what the report says" in spoiled.err

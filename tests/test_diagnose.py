"""The doctor names the stage and the layer that were made to fail, and a flag that exists."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xedge.cli import main
from xedge.diagnose import STAGES, diagnose, to_text
from xedge.errors import UsageError
from xedge.quantize import ScaleTable

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]


def changed(run: Path, folder: Path, change: Callable[[ScaleTable], ScaleTable]) -> Path:
    """A copy of a run whose scales were changed behind its back."""
    shutil.copytree(run, folder)
    change(ScaleTable.load(run / "scales.safetensors")).save(folder / "scales.safetensors")
    return folder


def wrong_weights(table: ScaleTable) -> ScaleTable:
    weights = dict(table.weights)
    weights["second.weight"] = replace(weights["second.weight"], scale=-weights["second.weight"].scale)
    return replace(table, weights=weights)


def narrow_range(table: ScaleTable) -> ScaleTable:
    widest = max(table.activations, key=lambda n: table.activations[n][1])
    low, high = table.activations[widest]
    return replace(table, activations={**table.activations, widest: (low, high / 40)})


def flags(fix: str) -> set[str]:
    return {w.rstrip(",:") for w in shlex.split(fix) if w.startswith("--")}


OPTIONS = {o for p in main.commands["compress"].params for o in p.opts}


def test_a_run(xedge: Xedge, finished: Path) -> None:
    ended = xedge("diagnose", finished, "--json", "--quiet")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert [d["target"] for d in found] == ["jetson-orin-nano", "android"]
    for d in found:
        assert [s["name"] for s in d["stages"]] == list(STAGES)
        assert d["images"] == 128
        qualities = [s["quality"] for s in d["stages"]]
        for before, stage in zip(d["stages"], d["stages"][1:], strict=False):
            assert stage["lost"] == pytest.approx(before["quality"] - stage["quality"], abs=1e-9)
        assert max(qualities) <= 1
        assert d["stages"][4]["same"] > 0.98
        assert d["stages"][5]["same"] > 0.98, "a compiled artefact is the exported graph"
        assert (d["stages"][4]["snr_db"] or 200) > 25
        assert (d["first"], d["blamed"], d["fix"]) == (None, [], None), "128 pictures cannot tell it from the original"
    assert "\nno stage loses more than chance" in (text := xedge("diagnose", finished, "--quiet").out)
    assert text.count(": nothing is to be mended\n") == 2
    assert "try:" not in text


def test_wrong_weights_are_found(finished: Path, tmp_path: Path) -> None:
    (found,) = diagnose(changed(finished, tmp_path / "run", wrong_weights), "android")
    assert found.first == "weights quantised"
    assert found.blamed[0].layer == "second"
    assert len(found.blamed) == 1, "the others cost next to nothing"
    assert found.fix is not None
    assert re.fullmatch(r"(--bits \S+ )?--bits-min [678] '\^\(second\)\$'( --bits \S+)?", found.fix)
    assert flags(found.fix) <= OPTIONS
    text = to_text(found)
    assert "first stage that loses more than chance: weights quantised" in text
    assert text.endswith(f"try: {found.fix}\n  {found.command}")


def test_a_clipped_activation_is_found(finished: Path, tmp_path: Path) -> None:
    (found,) = diagnose(changed(finished, tmp_path / "run", narrow_range), "android")
    assert found.first == "activations quantised"
    assert found.blamed[0].cost > 0.05
    assert flags(found.fix or "") == {"--keep-float", "--bits"}, "the layers that are left had more than the mean"


def test_stages_that_lose_together_only(finished: Path) -> None:
    (found,) = diagnose(finished, "android")
    assert found.guilty is None
    together = replace(found, worst="pruned", whole=replace(found.whole, matters=True), fix="--macs 0.7")
    assert together.guilty == "pruned"
    assert "no stage by itself loses more than chance, all together do; pruned loses most" in to_text(together)
    assert together.to_json()["whole"]["name"] == "all together"


def test_what_is_no_run(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(UsageError, match="holds no report"):
        diagnose(tmp_path)
    with pytest.raises(UsageError, match="the run has no target pixel3; choose one of jetson-orin-nano, android"):
        diagnose(finished, "pixel3")


def test_another_form_than_the_plans_is_refused(finished: Path, tmp_path: Path) -> None:
    """The stages lead to the plan's int8: followed to something else they would blame the wrong one."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/report.json"
    report = json.loads(path.read_text())
    (android,) = [c for c in report["choices"] if c["target"] == "android"]
    for form in ("float16", "float32", "int8 with exceptions", "int8 and float"):
        android["form"] = form
        path.write_text(json.dumps(report))
        for name in (None, "android"):
            with pytest.raises(UsageError, match=f"android ships {form}, and the stages lead to the plan's int8; "):
                diagnose(tmp_path / "run", name)
    assert [d.target for d in diagnose(tmp_path / "run", "jetson")] == ["jetson-orin-nano"]

"""What `xedge diagnose` says to try is accepted as it is printed, and makes the net better."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import tiny_pictures
from onnx import ModelProto, numpy_helper

from xedge.budget import choose_bits
from xedge.errors import UsageError
from xedge.mend import Mend, mend
from xedge.pipeline import rebuild
from xedge.progress import Talk
from xedge.quantize import ScaleTable
from xedge.request import Loaded, Request, load_everything
from xedge.run import read_json

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]


def test_the_printed_command_is_accepted_and_better(xedge: Xedge, picture_weights: Path, tmp_path: Path) -> None:
    words = ["compress", "-m", tiny_pictures.NET, "--weights", picture_weights, "-d", tiny_pictures.DATA]
    words += ["--target", "host-cpu", "--macs", "1", "--epochs", "0", "--no-fit", "--sensitivity", "mse"]
    before, after = tmp_path / "before", tmp_path / "after"
    ended = xedge(*words, "--bits", "3", "--no-bench", "--quiet", "-o", before)
    assert ended.code == 0, ended.err
    (found,) = json.loads(xedge("diagnose", before, "--json", "--quiet").out)
    assert found["first"] == "weights quantised"
    name, *printed = shlex.split(found["command"])
    assert name == "xedge"
    ended = xedge(*printed, "--no-bench", "--quiet", "-o", after)
    assert ended.code == 0, ended.err
    (mended,) = json.loads(xedge("diagnose", after, "--json", "--quiet").out)
    assert mended["whole"]["quality"] > found["whole"]["quality"] + 1


# -- every kind of budget --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(restored: Path) -> Loaded:
    facts = read_json(restored / "run.json")
    return load_everything(replace(Request.from_json(facts, str(restored)), targets=("host-cpu",), fit=False))


def asked(loaded: Loaded, **changes: Any) -> Loaded:
    return replace(loaded, request=replace(loaded.request, sensitivity="mse", **changes))


@pytest.fixture(scope="module")
def floats(restored: Path) -> ModelProto:
    return onnx.load(restored / "float.onnx")


@pytest.fixture(scope="module")
def rounded(restored: Path, floats: ModelProto) -> Callable[[Loaded], ScaleTable]:
    model = rebuild(restored)
    return lambda loaded: choose_bits(loaded, model, floats, Talk(quiet=True))


def parsed(printed: str | None) -> Request:
    """The request that a printed command makes, by the command line's own parser."""
    from xedge.cli_compress import compress

    assert printed is not None
    with compress.make_context("compress", shlex.split(printed)[2:]) as context:
        given = {k: v for k, v in context.params.items() if k in Request.__dataclass_fields__}
    return Request(**{k: v for k, v in given.items() if v is not None and v != ()})


def error(table: ScaleTable, floats: ModelProto) -> float:
    """Of the weights, by energy."""
    arrays = {t.name: numpy_helper.to_array(t) for t in floats.graph.initializer}
    return sum(float(np.square(w.rounded() - arrays[n]).sum()) for n, w in table.weights.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 3.0},
        {"bits": 3.0, "bits_min": ((5, "^first$"),), "keep_float": "^norm_of_another$|^second$"},
        {"bits": 6.0, "bytes": 9000},
        {"bits_drop": "9dB"},
        {"bits": 2.5, "bits_per": "tensor"},
        {"bits": 3.0, "codebook": True, "fit": None},
    ],
    ids=["bits", "floors", "bytes", "drop", "tensor", "codebook"],
)
def test_more_bits_are_accepted_under_every_budget(
    loaded: Loaded, rounded: Callable[[Loaded], ScaleTable], floats: ModelProto, changes: dict[str, Any]
) -> None:
    before = asked(loaded, **changes)
    begun = rounded(before)
    way = mend("weights quantised", ["third", "first"], before, begun, floats, 1.0, lambda: None)
    after = replace(before, request=parsed(way.command))
    assert after.request != before.request
    table = rounded(after)
    assert error(table, floats) < error(begun, floats)
    floor = {w.layer: w.bits.min() for w in table.weights.values()}
    assert floor["third"] >= 6
    for name, w in begun.weights.items():
        if w.layer != "third" and before.request.bytes is None:
            assert table.weights[name].bits.mean() >= w.bits.mean() - 0.5, "nobody pays for it"


def test_without_more_bits_it_was_refused(
    loaded: Loaded, rounded: Callable[[Loaded], ScaleTable], floats: ModelProto
) -> None:
    before = asked(loaded, bits=3.0)
    begun = rounded(before)
    after = parsed(mend("weights quantised", ["third", "second"], before, begun, floats, 1.0, lambda: None).command)
    with pytest.raises(UsageError, match="bit budget"):
        rounded(replace(before, request=replace(after, bits=3.0)))
    assert rounded(replace(before, request=after)).mean_bits() > 4


def test_float_layers_are_accepted_under_every_budget(
    loaded: Loaded, rounded: Callable[[Loaded], ScaleTable], floats: ModelProto
) -> None:
    for stage, changes in (
        ("weights quantised", {"bits": 8.0, "keep_float": "^first$"}),
        ("activations quantised", {"bits": 4.0, "bits_min": ((8, "^first$"),), "bytes": 9000}),
    ):
        before = asked(loaded, **changes)
        begun = rounded(before)
        way = mend(stage, ["third", "up"], before, begun, floats, 1.0, lambda: None)
        table = rounded(replace(before, request=parsed(way.command)))
        left = {w.layer for w in table.weights.values()}
        assert left == {w.layer for w in begun.weights.values()} - {"third", "up"}


def test_some_layer_stays_quantised(
    loaded: Loaded, rounded: Callable[[Loaded], ScaleTable], floats: ModelProto
) -> None:
    begun = rounded(asked(loaded, bits=8.0))
    every = [w.layer for w in begun.weights.values()]
    way = mend("activations quantised", every, loaded, begun, floats, 1.0, lambda: None)
    assert rounded(replace(loaded, request=parsed(way.command))).weights
    alone = replace(begun, weights={n: w for n, w in begun.weights.items() if w.layer == "third"})
    for stage in ("activations quantised", "weights quantised"):
        assert mend(stage, ["third"], asked(loaded, bits=8.0), alone, floats, 1.0, lambda: None).command is None


def test_tensors_that_no_layer_writes_have_their_ranges(
    loaded: Loaded, rounded: Callable[[Loaded], ScaleTable], floats: ModelProto
) -> None:
    begun = rounded(asked(loaded, bits=8.0))
    way = mend("activations quantised", ["add_1", "third"], loaded, begun, floats, 1.0, lambda: "minmax")
    assert way.words == "--ranges minmax"
    assert parsed(way.command).ranges == "minmax"
    way = mend("activations quantised", ["add_1", "third"], loaded, begun, floats, 1.0, lambda: None)
    assert parsed(way.command).keep_float == "^(third)$"
    assert mend("activations quantised", ["add_1"], loaded, begun, floats, 1.0, lambda: None).command is None


def test_what_pruning_lost(loaded: Loaded) -> None:
    none = ScaleTable({}, {})

    def words(kept: float, **changes: Any) -> Mend:
        way = mend("pruned", ["first"], asked(loaded, **changes), none, ModelProto(), kept, lambda: None)
        parsed(way.command)
        return way

    assert words(0.5).words == "--macs 0.75"
    assert words(0.8).words == "--macs 0.9", "it stopped before the budget"
    assert words(0.5, macs=None, max_drop="1dB").words == "--max-drop 0.5dB"
    assert words(0.5, macs=None, max_drop=None).words == "--macs 0.75", "the budget that comes without asking"
    assert words(0.5, macs=None, latency=4.0).words == "--latency 6"
    assert words(0.5, macs=None, stop="energy").words == "--max-drop 1.5dB"
    assert words(0.8, macs=1.0, epochs=3).words == "--epochs 6", "what is gone had no bits"
    assert mend("exported", [], loaded, none, ModelProto(), 1.0, lambda: None).command is None

"""The door to plug-ins: names, files and modules become typed objects, or one line; weights are never executed."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from xedge import load
from xedge.data import batches, take
from xedge.errors import UsageError

USER = """
import dataclasses, sys
sys.path.insert(0, {tests!r})
import tiny
from torch import nn

NUMBER = 3
INSTANCE = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
class Wide(tiny.Net): pass
class Outer:
    @staticmethod
    def inner(num_classes): return tiny.Net(num_classes)
def nothing(): return None
def raising(): raise RuntimeError('first\\nsecond')
def quitting(): raise KeyError('k')
def options(val='alike', **more): return dataclasses.replace(tiny.data(val), name=repr(sorted(more.items())))
class Broken:
    def __len__(self): return 64
    def __getitem__(self, i):
        if i == 3: raise OSError('picture 3 is torn')
        return tiny.data().train[i]
def broken(): return dataclasses.replace(tiny.data(), train=Broken())
def ones(group, observed, keep): return [1] * group.size
def text(group, observed, keep): return 'high'
def fails(group, observed, keep): return 1 / 0
"""


@pytest.fixture
def user(tmp_path: Path) -> str:
    file = tmp_path / "user.py"
    file.write_text(USER.format(tests=str(tiny.HERE.parent)))
    return str(file)


def said(call: Any, *arguments: Any, **options: Any) -> str:
    """The one line that a call ends with."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_attributes_by_file_and_by_module(user: str) -> None:
    assert load.attribute(f"{user}:NUMBER", "model") == 3
    assert load.attribute(f"{user}:Outer.inner", "model")(5).head.out_features == 5
    assert load.attribute("torch.nn:Linear", "model") is nn.Linear
    assert load.attribute(f"{user}:Wide", "model") is load.attribute(f"{user}:Wide", "model")  # loaded once


def test_attributes_that_are_not_there(user: str, tmp_path: Path) -> None:
    assert f"{tmp_path}/absent.py: there is no such file" in said(load.attribute, f"{tmp_path}/absent.py:x", "model")
    assert "has no 'Wode'; did you mean Wide" in said(load.attribute, f"{user}:Wode", "model")
    assert "cannot be imported" in said(load.attribute, "no_such_package.at_all:x", "model")


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("def f(:", "raised SyntaxError"),
        ("import no_such_package_at_all", "cannot be imported"),
        ("import sys; sys.exit(3)", "raised SystemExit: 3"),
        ("raise ValueError('one\\ntwo')", "raised ValueError: one two"),
    ],
)
def test_a_file_that_breaks_as_it_is_read_is_one_line(tmp_path: Path, code: str, line: str) -> None:
    file = tmp_path / "user.py"
    file.write_text(code)
    before = set(sys.modules)
    assert line in said(load.attribute, f"{file}:f", "model")
    assert not {m for m in set(sys.modules) - before if m.startswith("xedge_user")}
    file.write_text("f = 1")  # mended, in the same process
    os.utime(file, (1, 1))
    assert load.attribute(f"{file}:f", "model") == 1


def test_models(user: str) -> None:
    built_in = load.load_model("lenet5", classes=7, channels=3)
    assert not built_in.training
    assert built_in(torch.zeros(1, 3, 28, 28)).shape == (1, 7)
    assert load.load_model(f"{user}:Wide", classes=6, channels=1)(torch.zeros(1, 1, 8, 8)).shape == (1, 6)
    from_zoo = load.load_model("torchvision.models:squeezenet1_1", classes=5, channels=3)
    assert from_zoo(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert all(load.is_built_in(n) for n in load.models())
    assert not load.is_built_in(f"{user}:Wide")


def test_a_model_that_is_an_object_is_given_anew_each_time(user: str) -> None:
    one, other = (load.load_model(f"{user}:INSTANCE", classes=2, channels=1) for _ in range(2))
    with torch.no_grad():
        one.get_parameter("1.weight").zero_()
    assert bool(other.get_parameter("1.weight").any())


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("lenet6", "unknown model 'lenet6'; did you mean lenet5"),
        ("{user}:NUMBER", "is not callable"),
        ("{user}:nothing", "gave NoneType, not a torch.nn.Module"),
        ("{user}:raising", "raised RuntimeError: first second"),
        ("torchvision.models:resnet19", "has no 'resnet19'; did you mean resnet1"),
    ],
)
def test_models_that_are_none(user: str, spec: str, line: str) -> None:
    assert line in said(load.load_model, spec.format(user=user), classes=4, channels=1)


def test_data_of_a_users_own(user: str) -> None:
    data = load.load_data(f"{user}:options?val=noise&size=3", root=None, seed=0)
    assert data.name == "[('size', '3')]"
    want = tiny.data("noise")
    for split in ("train", "select", "val"):
        one, other = getattr(data, split), getattr(want, split)
        assert len(one) == len(other)
        assert torch.equal(take(one, [3, 1])[0], take(other, [3, 1])[0])
        assert torch.equal(one[5][0], other[5][0])
        assert one[5][1] == other[5][1]
        assert torch.equal(torch.cat([y for _, y in batches(one, 50)]), torch.cat([y for _, y in batches(other, 50)]))


def test_whatever_image_raises_it_is_one_line(user: str) -> None:
    data = load.load_data(f"{user}:broken", root=None, seed=0)
    take(data.train, [0, 1, 2])
    assert f"{user}:broken, train: raised OSError: picture 3 is torn" in said(take, data.train, [2, 3])
    assert f"{user}:broken, train[3]: raised OSError" in said(data.train.__getitem__, 3)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("digit", "unknown data 'digit'; did you mean digits"),
        ("fashion_mnist", "did you mean fashion-mnist"),
        ("{user}:nothing", "returned NoneType, not xedge.data.Data"),
        ("{user}:raising", "raised RuntimeError: first second"),
        ("{user}:quitting", "raised KeyError: 'k'"),
        ("{user}:nothing?val=1", "raised TypeError"),
        ("{user}:NUMBER", "is not callable"),
        ("npz:/absent/file.npz", "/absent/file.npz"),
        ("folder:/absent", "/absent"),
        ("digits?limt=3", "unknown option 'limt'; did you mean limit"),
    ],
)
def test_data_that_are_none(user: str, spec: str, line: str) -> None:
    assert line in said(load.load_data, spec.format(user=user), root=None, seed=0)


def test_targets() -> None:
    known = load.targets()
    assert {"jetson-orin-nano", "android", "host-cpu"} <= set(known)
    assert load.load_target("jetson").name == "jetson-orin-nano"
    for name, target in known.items():
        assert load.load_target(name) is target
        assert name == target.name
        assert all(load.load_target(a) is target for a in target.aliases)
    names = [n for t in known.values() for n in (t.name, *t.aliases)]
    assert len(names) == len(set(names)), "two targets answer to one name"
    assert "unknown target 'andriod'; did you mean android?" in said(load.load_target, "andriod")
    assert "not an xedge Target" in said(load.load_target, "torch.nn:Linear")


def test_criteria(user: str) -> None:
    known = load.criteria()
    assert {"di", "diloss", "taylor", "magnitude", "random"} <= set(known)
    assert all(known.values()), "each has a line on it"
    assert load.load_criterion("di").__module__ == "xedge.criteria.di"
    assert "unknown criterion 'magnitud'; did you mean magnitude?" in said(load.load_criterion, "magnitud")
    for name in ("__init__", "xedge.criteria.di", "../di"):
        assert "unknown criterion" in said(load.load_criterion, name)


def test_a_criterion_of_a_users_own(user: str) -> None:
    group: Any = type("G", (), {"name": "conv1", "size": 3})()
    scores = load.load_criterion(f"{user}:ones")(group, None, np.ones(3, bool))  # type: ignore[arg-type]
    assert scores.dtype == np.float64
    assert scores.tolist() == [1, 1, 1]
    for name, line in (("text", "raised ValueError"), ("fails", "fails, conv1: raised ZeroDivisionError")):
        assert line in said(load.load_criterion(f"{user}:{name}"), group, None, np.ones(3, bool))
    assert "is not callable" in said(load.load_criterion, f"{user}:NUMBER")


# -- weights ----------------------------------------------------------------------------------------------------------


class Bomb:
    """What a pickle with code in it looks like."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".tar"])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, suffix: str) -> None:
    mark, file = tmp_path / "executed", tmp_path / f"w{suffix}"
    torch.save({"head.weight": torch.zeros(2), "x": Bomb(mark)}, file)
    assert "cannot be read as weights only" in said(load.read_weights, file)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "the bomb would not have gone off"


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_come_back_as_they_were(tmp_path: Path, wrap: str | None, prefix: str) -> None:
    torch.manual_seed(1)
    state = tiny.net().state_dict()
    saved: Any = {prefix + k: v for k, v in state.items()}
    torch.save(saved if wrap is None else {wrap: saved, "epoch": 3}, tmp_path / "w.pt")
    save_file(saved, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        model = tiny.net()
        load.put_weights(model, load.read_weights(tmp_path / name), name)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_weights_without_the_count_of_batches(tmp_path: Path) -> None:
    state = {k: v for k, v in tiny.net().state_dict().items() if not k.endswith("num_batches_tracked")}
    load.put_weights(tiny.net(), state, "w")


def test_weights_of_another_model() -> None:
    state = tiny.net().state_dict()
    model = tiny.net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert "1 tensors missing, such as head.bias" in said(
        load.put_weights, model, {k: v for k, v in state.items() if k != "head.bias"}, "w"
    )
    assert "1 tensors unknown, such as fc.bias" in said(
        load.put_weights, model, {**state, "fc.bias": torch.zeros(1)}, "w"
    )
    assert "head.bias is (9,) and the model wants (4,)" in said(
        load.put_weights, model, {**state, "head.bias": torch.zeros(9)}, "w"
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "nothing was loaded in part"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float) -> None:
    state = tiny.net().state_dict()
    state["norm.running_var"][2] = bad
    save_file(state, tmp_path / "w.safetensors")
    assert "norm.running_var holds NaN or infinity" in said(load.read_weights, tmp_path / "w.safetensors")


@pytest.mark.parametrize("value", [[torch.zeros(2)], {"a": 1}, torch.zeros(3), {"state_dict": {"a": "b"}}])
def test_what_is_no_state_dict(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "w.pt")
    assert "holds no state dict" in said(load.read_weights, tmp_path / "w.pt")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    assert "there is no such file" in said(load.read_weights, tmp_path / "absent.pt")
    assert "there is no such file" in said(load.read_weights, tmp_path)
    (tmp_path / "w.onnx").write_bytes(b"x")
    assert "neither .safetensors nor .pt" in said(load.read_weights, tmp_path / "w.onnx")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("weights")
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["w.safetensors", "zip.pt", "old.pt"])
@given(number=st.integers(0, 2**32))
@settings(max_examples=150)
def test_a_damaged_file_is_one_line_or_sound(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, name: str, number: int
) -> None:
    draw = random.Random(number)
    content = bytearray(files[name])
    if draw.random() < 0.3:
        content = content[: draw.randrange(len(content))]
    else:
        for _ in range(draw.choice((1, 2, 8))):
            content[draw.randrange(len(content))] = draw.randrange(256)
    file = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    file.write_bytes(content)
    line, state = "", {}
    try:
        state = load.read_weights(file)
    except UsageError as e:
        line = str(e)
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    assert state or (str(file) in line and "\n" not in line)

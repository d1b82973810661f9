"""LPIRC's rules: the score from raw lines, and the whole contest with real pictures, here and over a real sshd."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import skimage
import sklearn.datasets
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from sshd import Server, sshd
from torchvision.transforms import InterpolationMode

from xedge.calibration.folder import View, decode
from xedge.cli import main
from xedge.errors import DeviceError, UsageError
from xedge.load import load_target
from xedge.lpirc import Contest, contest, pictures_of, side_of, view_of
from xedge.lpirc import View as Preprocessing
from xedge.report import Report, Row, write_json
from xedge.target import Artifact
from xedge.transports.base import Completed
from xedge.transports.supervised import Supervised, sha256
from xedge.units import artefact

__all__ = ["sshd"]
SIDE, CLASSES = 32, 12
DATA = "folder:pictures?size=32&mean=0.5,0.4,0.3&std=0.2,0.3,0.4"


def network() -> onnx.ModelProto:
    """Two convolutions and a mean, random: what it says of a picture depends on all of its pixels."""
    r = np.random.default_rng(3)
    weights = {"a": (16, 3, 5, 5), "b": (CLASSES, 16, 3, 3)}
    tensors = [numpy_helper.from_array((r.standard_normal(s) * 0.3).astype(np.float32), n) for n, s in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["c"], strides=[2, 2], kernel_shape=[5, 5]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "b"], ["e"], kernel_shape=[3, 3]),
        helper.make_node("ReduceMean", ["e"], ["y"], axes=[2, 3], keepdims=0),
    ]
    sides = [("x", [1, 3, SIDE, SIDE]), ("y", [1, CLASSES])]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in sides]
    graph = helper.make_graph(nodes, "net", infos[:1], infos[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run for android, as far as the contest reads it."""
    folder = tmp_path_factory.mktemp("run")
    target = load_target("android")
    model = folder / "targets" / "android" / "model.tflite"
    model.parent.mkdir(parents=True)
    model.write_bytes(artefact(network(), target))
    size = model.stat().st_size
    made = Artifact(
        "targets/android/model.tflite", "tflite", "android", sha256(model), size, {"x": (1, SIDE, SIDE, 3)},
        {"y": (1, CLASSES)},
    )  # fmt: skip
    rows = [Row(name, "android", None, 1.0, 1, 1, size, size, size) for name in ("original", "compressed")]  # type: ignore[arg-type]
    report = Report(
        xedge="0.1.0", created="2026-01-01T00:00:00+00:00", request={"data": DATA}, model="net", data="none",
        teacher="labels", environment={}, rows=tuple(rows), layers=(), iterations=(), stopped_by="budget",
        price_of_alignment=None, certificate={}, notes=(), artifacts=(made,),
    )  # fmt: skip
    write_json(report, folder / "report.json")
    return folder


def photographs() -> list[Path]:
    """The sample pictures that scikit-learn and scikit-image ship: JPEG and PNG, colour and grey."""
    found = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    found += [p for p in sorted((Path(skimage.__file__).parent / "data").iterdir()) if p.suffix in (".jpg", ".png")]
    return [p for p in found if decode(p).size[0] >= SIDE]


@pytest.fixture(scope="module")
def images(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pictures, each labelled as the host's own pipeline sees it, but the first, which is labelled otherwise."""
    folder = tmp_path_factory.mktemp("images")
    view = View(SIDE, round(SIDE * 256 / 224), InterpolationMode.BILINEAR, 1, 0)
    runner = load_target("android").load(run / "targets/android/model.tflite", 1)
    lines = []
    for n, source in enumerate(photographs()):
        (folder / source.name).write_bytes(source.read_bytes())
        x = np.asarray(view.crop(decode(source), source.name, 0), np.float32).transpose(2, 0, 1) / 255
        x = (x - np.array([0.5, 0.4, 0.3]).reshape(3, 1, 1)) / np.array([0.2, 0.3, 0.4]).reshape(3, 1, 1)
        top = int(runner(torch.from_numpy(x[None]).float().numpy()).argmax())
        lines.append(f"{source.name} {(top + (n == 0)) % CLASSES}\n")
    (folder / "labels.txt").write_text("".join(lines))
    assert len(lines) >= 3
    assert len({line.split()[1] for line in lines}) > 1
    return folder


def test_the_contest_on_this_host(run: Path, images: Path) -> None:
    done = CliRunner().invoke(main, ["lpirc", str(run), "--device", "local", "--images", str(images), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    n = found["pictures"]
    assert n == len(photographs())
    assert found["wall_seconds"] == pytest.approx(0.03 * n)
    assert found["score"] == pytest.approx(found["correct"] / n / max(found["wall_seconds"], found["runtime_seconds"]))
    record = json.loads((run / "lpirc.jsonl").read_text().splitlines()[-1])
    assert len(record["end_ns"]) == len(record["classes"]) == n
    assert record["facts"]["model_sha256"] == record["sha256"]
    right = [c == y for c, y in zip(record["classes"], record["labels"], strict=True)]
    assert right == [False, *[True] * (n - 1)]  # the device's decoding, resizing and rounding are the host's
    text = CliRunner().invoke(main, ["lpirc", str(run), "--device", "local", "--images", str(images), "--quiet"])
    assert "accuracy on classified" in text.stdout
    assert "(real)" in text.stdout


def test_the_contest_over_ssh(run: Path, images: Path, sshd: Server, tmp_path: Path) -> None:
    board = tmp_path / "board.toml"
    board.write_text(f'address = "{sshd.address}"\npython = "{sys.executable}"\nssh_config = "{sshd.config}"\n')
    said: list[str] = []
    result = contest(run, str(board), images, None, None, said.append)
    assert [c == y for c, y in zip(result.classes, result.labels, strict=True)].count(False) == 1
    assert result.device == "board"
    assert said == [f"{result.pictures} pictures to board"]


def test_a_file_that_is_no_picture_counts_as_wrong(run: Path, images: Path, tmp_path: Path) -> None:
    good = next(p for p in images.iterdir() if p.suffix == ".jpg")
    (tmp_path / "good.jpg").write_bytes(good.read_bytes())
    (tmp_path / "torn.jpg").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "l").write_text("torn.jpg 1\ngood.jpg 2\n")
    result = contest(run, "local", tmp_path, tmp_path / "l", None, lambda line: None)
    assert result.classes[0] == -1
    assert result.classes[1] >= 0
    assert result.classified <= 1
    assert "1 of them no pictures" in str(result)


# ---- scoring ----


def outcome(ms: list[float], classes: list[int], labels: list[int]) -> Contest:
    ends = tuple(int(t * 1e6) for t in np.cumsum(ms))
    return Contest("m", "0", "android", "d", "real", "litert 2", tuple(labels), tuple(classes), ends, {}, "")


def test_the_wall_time_is_an_average_and_no_cut_off() -> None:
    one_slow = outcome([80, 10, 10, 10], [1, 2, 3, 4], [1, 2, 3, 0])  # the first alone is far over 30 ms
    assert (one_slow.classified, one_slow.correct) == (4, 3)
    assert one_slow.score == pytest.approx(0.75 / 0.12)  # never better for being early
    late = outcome([50, 50, 50, 50], [1, 2, 3, 4], [1, 2, 3, 4])  # 100 of 120 ms for the first two
    assert (late.classified, late.correct) == (2, 2)
    assert late.accuracy == 0.5
    assert late.accuracy_on_classified == 1
    assert late.score == pytest.approx(0.5 / 0.2)
    never = outcome([500], [1], [1])
    assert (never.classified, never.accuracy_on_classified, never.score) == (0, 0, 0)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.jpg one", "line 1 is not NAME CLASS"),
        ("a.jpg 1\nb.jpg 2", "line 2 names b.jpg, which is not there"),
        ("\n", "is empty"),
    ],
)
def test_bad_labels(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UsageError, match=said):
        pictures_of(tmp_path, None)


def test_class_folders_are_labels_too(tmp_path: Path) -> None:
    for name in ("cat/2.png", "ant/1.jpg", "cat/1.png", "ant/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [(str(p.relative_to(tmp_path)), y) for p, y in pictures_of(tmp_path, None)]
    assert found == [("ant/1.jpg", 0), ("cat/1.png", 1), ("cat/2.png", 1)]
    with pytest.raises(UsageError, match="holds no labels"):
        pictures_of(tmp_path / "cat", None)
    with pytest.raises(UsageError, match="there is no such folder"):
        pictures_of(tmp_path / "dog", None)


def test_preprocessing_is_the_runs_own() -> None:
    assert view_of(DATA, None, 32) == Preprocessing(37, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert view_of("imagenet:D", None, 224) == Preprocessing(256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert view_of("x.py:data", "mean=0&std=1&resize=40", 32) == Preprocessing(40, (0, 0, 0), (1, 1, 1))
    with pytest.raises(UsageError, match="does not say how pictures are normalised"):
        view_of("digits", "resize=40", 32)
    with pytest.raises(UsageError, match="unknown option 'sise'"):
        view_of("imagenet:D", "sise=3", 32)
    with pytest.raises(UsageError, match="not one square RGB picture"):
        side_of({"x": (1, 1, 28, 28)})
    assert side_of({"x": (1, 3, 28, 28)}) == 28


def test_labels_beyond_the_models_classes(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "labels.txt").write_text(f"a.jpg {CLASSES}\n")
    with pytest.raises(UsageError, match=f"has label {CLASSES}, and the model has {CLASSES} classes"):
        contest(run, "local", tmp_path, None, None, lambda line: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: "\n".join(out.splitlines()[:-1]), "has no end"),
        (lambda out: out.replace('"first":0', '"first":1'), "out of order"),
        (lambda out: out.replace('"class":[', '"class":[0,').replace('"end_ns":[', '"end_ns":[0,'), "answers to"),
        (lambda out: out.replace('"model_sha256":"', '"model_sha256":"0'), "other bytes"),
    ],
)
def test_damaged_output_scores_nothing(
    run: Path, images: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str], said: str
) -> None:
    before = (run / "lpirc.jsonl").read_bytes() if (run / "lpirc.jsonl").exists() else b""
    real = Supervised.run

    def damaged(self: Supervised, argv: list[str], timeout: float) -> Completed:
        done = real(self, argv, timeout)
        return replace(done, stdout=change(done.stdout))

    monkeypatch.setattr(Supervised, "run", damaged)
    with pytest.raises(DeviceError, match=said):
        contest(run, "local", images, None, None, lambda line: None)
    assert ((run / "lpirc.jsonl").read_bytes() if (run / "lpirc.jsonl").exists() else b"") == before


def test_a_device_without_pillow_says_what_is_needed(run: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = images.parent / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "PIL.py").write_text("raise ImportError('blocked')\n")
    monkeypatch.setenv("PYTHONPATH", str(blocked))
    with pytest.raises(DeviceError, match="Pillow is not installed here, which decodes the pictures"):
        contest(run, "local", images, None, None, lambda line: None)


def test_a_record_is_plain_json() -> None:
    record = outcome([1.0], [1], [1])
    assert (
        Contest(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(asdict(record))).items()}
        )
        == record
    )

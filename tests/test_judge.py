"""What quality is: figures by hand, units, and what chance explains."""

from __future__ import annotations

import math

import pytest
import tiny
import tiny_pictures
import torch

from xedge.data import at_once, batches, enough, fitting
from xedge.errors import UsageError
from xedge.image_metrics import luma
from xedge.judge import MOST_DB, Judge, amount, charbonnier, fall
from xedge.metrics import agreement, topk


def test_each_kind_of_data_has_its_measure() -> None:
    assert Judge.of(tiny.data()) == Judge("top-1")
    assert Judge.of(tiny.data(labelled="no")) == Judge("agreement")
    assert Judge.of(tiny_pictures.data()) == Judge("PSNR", (3, 24, 24), shave=2)
    assert [Judge(k).taught for k in ("top-1", "agreement", "PSNR")] == [True, False, True]  # type: ignore[arg-type]


def test_classes_are_judged_as_they_always_were() -> None:
    draw = torch.Generator().manual_seed(0)
    out, base, truth = torch.randn(50, 4, generator=draw), torch.randn(50, 4, generator=draw), torch.arange(50) % 4
    assert Judge("top-1").quality(out, truth, base) == topk(out, truth)
    assert Judge("agreement").quality(out, truth, base) == agreement(out, base)
    assert Judge("top-1").dislike(out, truth, base) == pytest.approx(
        float(torch.nn.functional.cross_entropy(out, truth))
    )
    row = Judge("top-1").row(out, base, truth)
    lost = int(((base.argmax(1) == truth) & (out.argmax(1) != truth)).sum())
    assert (row["lost"], row["top1"]) == (lost, topk(out, truth))
    assert topk(base, truth) - row["top1"] == pytest.approx((row["lost"] - row["won"]) / 50)


def test_psnr_is_of_y_of_all_tiles_together_within_the_shaved_border() -> None:
    judge = Judge("PSNR", (3, 6, 8), shave=1)
    truth = torch.full((2, 3, 6, 8), 100 / 255)
    out = truth.clone()
    out[0, :, 2, 3] += 10 / 255  # one pixel of 4 x 6, by ten grey levels
    out[1, :, 0] = 1.0  # the border does not count
    step = float((luma(out[0]) - luma(truth[0]))[2, 3])
    assert step == pytest.approx(10 / 255 * 219 / 255, rel=1e-5)
    mean = step**2 / (2 * 24)
    assert judge.quality(out.flatten(1), truth, out) == pytest.approx(-10 * math.log10(mean), rel=1e-5)
    assert judge.quality(truth.flatten(1), truth, out) == MOST_DB
    assert judge.quality((truth + 0.4 / 255).flatten(1), truth, out) == MOST_DB  # the same bytes
    assert judge.dislike(out.flatten(1), truth, out) > 0


def test_what_chance_explains_of_a_fall_covers_it() -> None:
    judge = Judge("PSNR", (1, 4, 4))
    draw = torch.Generator().manual_seed(3)
    truth = torch.full((200, 1, 4, 4), 0.5)
    inside = 0
    for _ in range(100):
        noise = torch.randn(2, 200, 16, generator=draw)
        size = torch.rand(200, 1, generator=draw) + 0.2  # some tiles are harder, for both
        base, got = (truth.flatten(1) + 0.05 * size * n for n in noise)
        row = judge.row(got, base, truth)
        inside += abs(judge.quality(base, truth, base) - row["psnr"]) <= row["noise_db"]
    assert 88 <= inside <= 100
    assert judge.row(base, base, truth)["noise_db"] == 0
    assert judge.change(base, base, truth, base)[1:] == (0, 0)


def test_a_fall_is_read_from_verify_json() -> None:
    rows = {"a": {"psnr": 30.9, "noise_db": 0.05}}
    fell = fall({"images": 10, "original": {"psnr": 31.0}, "targets": rows}, "a")
    assert fell.drop == pytest.approx(0.1)
    assert fell.low < fell.drop - fell.noise < fell.drop + fell.noise < fell.high
    assert fell.say(fell.drop) == "0.10 dB"
    fell = fall({"images": 100, "targets": {"a": {"top1": 0.5, "lost": 5, "won": 2}}}, "a")
    assert (fell.drop, fell.say(fell.drop)) == (0.03, "3.00%")
    assert fall({"images": 100, "targets": {"a": {"agreement": 0.9}}}, "a").drop == pytest.approx(0.1)


def test_drops_have_the_unit_of_the_data() -> None:
    assert amount("0.2dB", "--max-drop", restores=True) == 0.2
    assert amount(0.005, "--max-drop", restores=False) == 0.005
    for given, restores in (("0.2dB", False), (0.2, True), ("dB", True), ("-1dB", True), (1.5, False), ("nan", False)):
        with pytest.raises(UsageError, match=r"write 0\.(2dB|5%)"):
            amount(given, "--max-drop", restores=restores)


def test_fewer_pictures_are_read_at_once_and_in_all() -> None:
    images, pictures = tiny.data().train, tiny_pictures.data().train
    assert at_once(images) == fitting((1, 8, 8))
    assert enough(images, 100) == 100
    assert at_once(pictures) == fitting((3, 24, 24)) // 4
    assert enough(pictures, 100) == 25
    x, y = next(batches(pictures, 5))
    assert (tuple(x.shape), tuple(y.shape)) == ((5, 3, 12, 12), (5, 3, 24, 24))


def test_charbonnier_is_the_absolute_value_but_for_its_corner() -> None:
    e = torch.tensor([-0.5, 0.0, 0.5])
    torch.testing.assert_close(charbonnier(e), torch.tensor([0.5, 1e-3, 0.5]), atol=2e-6, rtol=0)

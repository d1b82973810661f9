"""xedge.augment: crops, flips and zooms come from their generator and stay inside the image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from splits import everything
from torch import Tensor

from xedge.augment import CropFlip, ZoomFlip, black
from xedge.data import Tensors


@pytest.mark.parametrize("augment", [CropFlip(3, (0.5, -0.5, 0.0), flip=True), ZoomFlip()])
def test_augmentation_is_its_generators_and_changes_images_apart(augment: Callable[..., Tensor]) -> None:
    x = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(9)).expand(40, -1, -1, -1)
    original = x.clone()
    a, b, c = (augment(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert a.shape == x.shape
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(x, original)
    assert len({row.numpy().tobytes() for row in a}) > 25


def test_crop_flip_is_a_shift_with_the_border_filled() -> None:
    x = torch.arange(1.0, 26.0).view(1, 1, 5, 5).expand(200, -1, -1, -1)
    out = CropFlip(1, (-7.0,))(x, torch.Generator().manual_seed(0))
    padded = torch.full((7, 7), -7.0)
    padded[1:6, 1:6] = x[0, 0]
    windows = {padded[i : i + 5, j : j + 5].numpy().tobytes() for i in range(3) for j in range(3)}
    assert {row[0].numpy().tobytes() for row in out} == windows  # all nine, and nothing else
    flipped = CropFlip(0, (0.0,), flip=True)(x, torch.Generator().manual_seed(0))
    share = float((flipped[:, 0, 0, 0] == 5.0).float().mean())
    assert 0.35 < share < 0.65
    assert {row.numpy().tobytes() for row in flipped} == {x[0].numpy().tobytes(), x[0].flip(2).numpy().tobytes()}


def test_zoom_shows_a_rectangle_inside_the_image() -> None:
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(100, 2, 64, 64).clone()
    ramp[:, 1] = ramp[:, 0].transpose(1, 2)
    out = ZoomFlip(area=(0.25, 0.5))(ramp, torch.Generator().manual_seed(0))
    width = out[:, 0].amax((1, 2)) - out[:, 0].amin((1, 2))
    height = out[:, 1].amax((1, 2)) - out[:, 1].amin((1, 2))
    area = width * height
    assert bool(((area > 0.2) & (area < 0.55)).all())
    assert float(out.min()) >= 0.0
    assert float(out.max()) <= 1.0
    whole = ZoomFlip(area=(1.0, 1.0), ratio=(1.0, 1.0))(ramp, torch.Generator().manual_seed(0))
    same = (whole - ramp).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (whole - ramp.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert bool((same | mirrored).all())
    assert bool(same.any())
    assert bool(mirrored.any())


def test_black_is_what_a_black_pixel_becomes() -> None:
    mean, std = (0.4, 0.5), (0.2, 0.1)
    x = everything(Tensors(torch.zeros(1, 2, 1, 1, dtype=torch.uint8), mean=mean, std=std))[0]
    assert x.flatten().tolist() == pytest.approx(black(mean, std))

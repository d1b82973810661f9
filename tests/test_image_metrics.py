"""PSNR, SSIM and MS-SSIM against scikit-image, Y against Pillow's, PIRM's scores against the challenge's own table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from xedge.errors import UsageError
from xedge.image_metrics import luma, ms_ssim, pirm_scores, psnr, ssim
from xedge.resample import imresize, to_bytes

metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image: pip install -e .[dev]")


def tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).double() / 255


def photographs() -> list[tuple[str, np.ndarray]]:
    from skimage import data

    named = [(f"sklearn {n}", load_sample_image(f"{n}.jpg")) for n in ("china", "flower")]
    named += [("skimage astronaut", data.astronaut()), ("skimage chelsea", data.chelsea())]
    return [(name, picture[:251, :322]) for name, picture in named]


def restored(picture: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture cut to a multiple of the scale, and bicubic there and back."""
    height, width = (n // scale * scale for n in picture.shape[:2])
    truth = picture[:height, :width]
    small = to_bytes(imresize(truth, height // scale, width // scale))
    return truth, to_bytes(imresize(small, height, width))


@pytest.mark.parametrize("scale", [2, 4])
def test_on_photographs_they_are_scikit_images(scale: int) -> None:
    for name, picture in photographs():
        truth, got = restored(picture, scale)
        y, z = (255 * luma(tensor(x)).numpy()[scale:-scale, scale:-scale] for x in (truth, got))
        assert psnr(tensor(truth), tensor(got), shave=scale) == pytest.approx(
            metrics.peak_signal_noise_ratio(y, z, data_range=255), abs=1e-9
        ), name
        options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        assert ssim(tensor(truth), tensor(got), shave=scale) == pytest.approx(
            metrics.structural_similarity(y, z, **options), abs=1e-9
        ), name
        rgb = metrics.structural_similarity(truth, got, channel_axis=2, **options)
        assert ssim(tensor(truth), tensor(got), on_y=False) == pytest.approx(rgb, abs=1e-9), name


def test_ms_ssim_is_the_product_of_scikit_images_parts() -> None:
    truth, got = restored(photographs()[0][1], 4)
    a, b = (255 * luma(tensor(x)).numpy() for x in (truth, got))
    expected, options = 1.0, {"data_range": 255, "gaussian_weights": True, "use_sample_covariance": False}
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        # an enormous K1 makes the luminance factor one
        own = {} if scale == 4 else {"K1": 1e6}
        expected *= metrics.structural_similarity(a, b, **options, **own) ** weight
        a, b = (np.pad(x, [(0, n % 2) for n in x.shape], mode="edge") for x in (a, b))
        a, b = ((x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in (a, b))
    assert ms_ssim(tensor(truth), tensor(got)) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UsageError, match="161"):
        ms_ssim(torch.rand(3, 160, 300), torch.rand(3, 160, 300))


def test_y_is_matlabs() -> None:
    # rgb2ycbcr of black, white, red, green, blue, from its documentation's matrix
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]]).double().T.reshape(3, 5, 1)
    assert (255 * luma(colours)).flatten().tolist() == pytest.approx([16, 235, 81.481, 144.553, 40.966])
    # Pillow's YCbCr is the full-range form of the same weights, its decimals cut off
    picture = photographs()[2][1]
    full = np.asarray(Image.fromarray(picture).convert("YCbCr"))[..., 0]
    np.testing.assert_allclose(255 * luma(tensor(picture)).numpy(), 16 + (full + 0.5) * 219 / 255, atol=0.5)


def test_psnr_of_known_errors() -> None:
    grey = torch.full((2, 1, 32, 32), 0.5)
    assert psnr(grey, grey + 0.1, quantise=False) == pytest.approx(20)
    assert psnr(grey, grey) == math.inf
    assert psnr(grey, grey + 0.4 / 255) == math.inf  # the same 8 bits
    edge = grey.clone()
    edge[:, :, :2] = 0
    assert psnr(grey, edge, shave=2) == math.inf
    pair = torch.stack([grey[0] + 0.1, grey[0] + 0.01])
    assert psnr(grey, pair, quantise=False) == pytest.approx((20 + 40) / 2)  # the mean of the pictures' own
    assert psnr(grey, grey + 2, quantise=True) == pytest.approx(-20 * math.log10(127 / 255), abs=0.01)  # clipped
    for other in (torch.rand(2, 1, 32, 31), torch.rand(32, 32)):
        with pytest.raises(UsageError, match="compared"):
            psnr(grey, other)
    with pytest.raises(UsageError, match="nothing"):
        psnr(grey, grey, shave=16)
    with pytest.raises(UsageError, match="window"):
        ssim(grey, grey, shave=11)


def test_pirm_scores_are_the_challenges() -> None:
    # arXiv:1810.01641, table 1: the winner, TEAM_ALEX (FEQE), at more than four times SRCNN's speed
    found = pirm_scores(28.21, 0.9636, 4.6)
    assert (found.a, found.b, found.c) == pytest.approx((13.21, 15.15, 14.14), abs=0.02)

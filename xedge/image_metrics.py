"""How near a restored picture is to the truth, by the rules that super-resolution is compared by.

Pictures are float [3, H, W] or [N, 3, H, W] on the scale 0..1; one channel is taken too, as it is. They are clipped and
rounded to 8 bits first, as they would be stored (`quantise=False` leaves them). PSNR and SSIM are of Y, which is not
rounded again, and `shave` pixels at each border do not count: for super-resolution that is the scale. Over several
pictures the mean of theirs is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from xedge.errors import UsageError

MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11


def luma(rgb: Tensor) -> Tensor:
    """Y of [..., 3, H, W] on 0..1, as MATLAB's rgb2ycbcr has it (BT.601): [..., H, W] in 16/255..235/255."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=rgb.dtype, device=rgb.device)
    y: Tensor = torch.tensordot(weights, rgb.movedim(-3, 0), 1)
    return (y + 16) / 255


def psnr(truth: Tensor, got: Tensor, *, shave: int = 0, on_y: bool = True, quantise: bool = True) -> float:
    """10 log10(1 / MSE) in dB, of Y or of all channels; infinite for equal pictures."""
    a, b = _ready(truth, got, shave, on_y, quantise)
    return float((-10 * (a - b).square().mean((1, 2, 3)).log10()).mean())


def ssim(truth: Tensor, got: Tensor, *, shave: int = 0, on_y: bool = True, quantise: bool = True) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11x11, sigma 1.5, K = 0.01 and 0.03, where the
    window lies within the picture."""
    a, b = _ready(truth, got, shave, on_y, quantise)
    whole, _ = _similarity(a, b)
    return float(whole.mean())


def ms_ssim(truth: Tensor, got: Tensor, *, shave: int = 0, on_y: bool = True, quantise: bool = True) -> float:
    """Multi-scale SSIM (Wang et al. 2003): contrast and structure on five scales, each half the one before, and the
    luminance on the last.

    Raises:
        UsageError: a side is below 161 pixels, so that the window does not fit on the last scale.
    """
    a, b = _ready(truth, got, shave, on_y, quantise)
    least = (WINDOW - 1) * 2 ** (len(MS_WEIGHTS) - 1) + 1
    if min(a.shape[2:]) < least:
        raise UsageError(
            f"{tuple(a.shape[2:])} is too small for MS-SSIM", fix=f"give pictures of {least} pixels and more"
        )
    result = torch.ones(a.shape[:2], dtype=a.dtype, device=a.device)
    for scale, weight in enumerate(MS_WEIGHTS):
        whole, contrast = _similarity(a, b)
        last = scale == len(MS_WEIGHTS) - 1
        result = result * (whole if last else contrast).clamp(min=0) ** weight
        if not last:
            a, b = (functional.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (a, b))
    return float(result.mean())


def _ready(truth: Tensor, got: Tensor, shave: int, on_y: bool, quantise: bool) -> tuple[Tensor, Tensor]:
    """Both as float64 [N, C, H, W], shaved."""
    if truth.shape != got.shape or truth.dim() not in (3, 4) or truth.shape[-3] not in (1, 3):
        raise UsageError(f"pictures of {tuple(truth.shape)} and {tuple(got.shape)} cannot be compared")
    if min(truth.shape[-2:]) <= 2 * shave:
        raise UsageError(f"{shave} pixels shaved leave nothing of {tuple(truth.shape[-2:])}")
    ready = []
    for x in (truth, got):
        x = x.reshape(-1, *x.shape[-3:]).double()
        if quantise:
            x = (x.clamp(0, 1) * 255).round() / 255
        if on_y and x.shape[1] == 3:
            x = luma(x).unsqueeze(1)
        ready.append(x[..., shave : x.shape[-2] - shave, shave : x.shape[-1] - shave])
    return ready[0], ready[1]


def _similarity(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Means [N, C] of SSIM and of its contrast and structure factor, over [N, C, H, W] on 0..1."""
    if min(a.shape[2:]) < WINDOW:
        raise UsageError(f"{tuple(a.shape[2:])} is smaller than SSIM's window of {WINDOW}")
    at = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    bell = torch.exp(-(at**2) / (2 * 1.5**2))
    bell = bell / bell.sum()

    def blur(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, *x.shape[2:])
        flat = functional.conv2d(functional.conv2d(flat, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))
        return flat.view(*x.shape[:2], *flat.shape[2:])

    ma, mb = blur(a), blur(b)
    va, vb, vab = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    contrast = (2 * vab + 0.03**2) / (va + vb + 0.03**2)
    whole = contrast * (2 * ma * mb + 0.01**2) / (ma * ma + mb * mb + 0.01**2)
    return whole.mean((2, 3)), contrast.mean((2, 3))


@dataclass(frozen=True)
class PirmScores:
    """Scores of PIRM 2018's super-resolution track for smartphones: A for fidelity, B for looks, C for balance."""

    a: float
    b: float
    c: float


def pirm_scores(psnr_db: float, ms_ssim: float, faster: float) -> PirmScores:
    """alpha (PSNR - 26.5) + beta (MS-SSIM - 0.94) + gamma min(faster, 4), at scale 4 on DIV2K (Ignatov et al. 2018,
    arXiv:1810.01641).

    Args:
        psnr_db, ms_ssim: of RGB (`on_y=False`), 16 pixels shaved, as the organisers' script has them.
        faster: SRCNN's time (9-5-5, RGB, at the output's size) over the net's, both at 1280x720 on one device.
    """
    a, b, c = (
        alpha * (psnr_db - 26.5) + beta * (ms_ssim - 0.94) + gamma * min(faster, 4.0)
        for alpha, beta, gamma in ((4, 100, 1), (1, 400, 1), (2, 200, 1.5))
    )
    return PirmScores(a, b, c)

"""Sequential folding: each layer of the cut net is fitted anew to what it gave before the cut, front to back.

`xedge.fold` predicts removed channels from kept ones as both were before the cut. But behind the first cut layer the
kept channels are no longer what they were. Here each layer is fitted just before it runs to the response it gave before
the cut; the layers in front of it are fitted already, so it also mends what they could not:

    min over dW of  ||u - (W_K + dW) x||^2 + rho ||dW||^2   =>   dW = (U - W_K X) X^T (X X^T + rho I)^-1

with u [O] the outputs before the cut and x [I k^2] the patch of its input in the cut net, both at the same pixels,
centred. These are DI's normal equations with the layer's own response as teacher. One forward pass of each net does
it. The ridge is chosen for each layer on images that the fit has not seen, "leave it" among the choices. (Cf. ThiNet
and channel pruning, both ICCV 2017, which fit channel by channel.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xedge.batchnorm import IMAGES, Statistics, matching, together
from xedge.data import Images, at_once, batches, enough, pictured
from xedge.fold import fold
from xedge.groups import Groups
from xedge.observe import Observed
from xedge.plan import Keep
from xedge.prune import cut

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Relative to the mean variance of a patch's elements."""
HEAD = 512
"""Images that layers are fitted on at most, and FEWEST at least: with 64 pictures EfficientNet-Lite0 only got worse."""
FEWEST = 128
FEWEST_PICTURES = 8
"""Where the answer is a picture: a layer near it sees thousands of pixels of each."""
PER_WEIGHT = 24
LEAST = 4096
"""Pixels a layer is fitted on: so many for each weight of an output, at least LEAST, at most what the images have."""
MOST = 1 << 28
"""Numbers in the patches of a layer, a gigabyte."""


def head(images: Images) -> int:
    """Images of a set that layers are fitted on at once, in about two gigabytes; 0 where too few fit."""
    count = min(HEAD, 4 * at_once(images), len(images) if pictured(images) else HEAD)
    return count if count >= (FEWEST_PICTURES if pictured(images) else FEWEST) else 0


@torch.no_grad()
def cut_and_fold(
    before: nn.Module,
    groups: Groups,
    keep: Keep,
    images: Images,
    statistics: Statistics,
    observed: Observed | None,
    *,
    sequential: bool,
) -> nn.Module:
    """`before` cut by `keep`, folded, its batch norms matched to what they gave before the cut.

    Args:
        before: the net before the cut; not changed.
        groups: its channel groups.
        keep: the cut.
        images: training images, read in one fixed order.
        statistics: `input_statistics(before, images)`.
        observed: of `before`, for folding by its moments; without it nothing is folded.
        sequential: whether to fit each layer anew after that, on `head` images.
    """
    small = cut(before if observed is None else fold(before, groups, keep, observed), groups, keep)
    first = head(images) if sequential else 0
    with matching(small, before, groups, keep, statistics) if statistics else nullcontext():
        if first:
            x, _ = next(batches(images, first, shuffle_seed=0))
            with folding(small, before, groups, keep, x):
                small(x)
        if statistics:
            seen = 0
            for x, _ in batches(images, together(images), shuffle_seed=0, limit=enough(images, IMAGES)):
                seen += len(x)
                if len(x) > 1 and seen > first:  # one image has no spread between images
                    small(x)
    return small.eval()


@contextmanager
def folding(small: nn.Module, before: nn.Module, groups: Groups, keep: Keep, x: Tensor) -> Iterator[None]:
    """While it lasts, the next forward pass of `small`, which must be on `x`, fits its layers in place.

    Linear layers and two-dimensional convolutions are fitted, grouped ones group by group. Left as they are: layers
    whose forward is not the plain product with their weight, and layers that share it.

    Args:
        small: `before` cut by `keep`.
        before: the net whose responses are to be kept; not changed.
        groups: of `before`.
        keep: the cut.
        x: training images [N, ...], as many as memory allows.
    """
    stay = {key: torch.from_numpy(np.flatnonzero(mask)) for key, mask in groups.positions(keep).items()}
    uses = Counter(id(m.weight) for m in before.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    taught: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []

    def teach(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if name in taught or not args:
                return  # of a layer that is called again the first call teaches
            at = _places(module, out)
            few = at[:1]
            plain = _patches(args[0][:1], module, few)
            if plain is None or not torch.allclose(_apply(module, plain), _pick(out[:1], module, few), 1e-3, 1e-4):
                return
            rows = stay.get((f"{name}.weight", 0))
            u = _pick(out, module, at)
            taught[name] = (u if rows is None else u[:, rows], at)

        return hook

    def fit(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            lesson = taught.pop(name, None)
            if lesson is not None:
                u, at = lesson
                patches = _patches(args[0], module, at)
                assert patches is not None
                _fit(module, patches, u)

        return hook

    def each(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, m in model.named_modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)) and (model is small or uses[id(m.weight)] == 1):
                yield name, m

    try:
        for name, m in each(before):
            handles.append(m.register_forward_hook(teach(name)))
        before.eval()(x)
        for name, m in each(small):
            handles.append(m.register_forward_pre_hook(fit(name)))
        yield
    finally:
        for h in handles:
            h.remove()


def _places(module: nn.Module, out: Tensor) -> Tensor:
    """Which pixels of each image are looked at, [N, P]: spread evenly, and shifted from image to image, so that they
    do not always meet the same phase of a stride."""
    pixels = out[0].numel() // (out.shape[-1] if isinstance(module, nn.Linear) else out.shape[1])
    weight = module.weight
    assert isinstance(weight, Tensor)
    fan_in = weight[0].numel()
    wanted = min(max(LEAST, PER_WEIGHT * fan_in), MOST // fan_in)
    each = max(1, min(pixels, -(-wanted // len(out))))
    return (torch.arange(each) * pixels // each + 7 * torch.arange(len(out))[:, None]) % pixels


def _pick(out: Tensor, module: nn.Module, at: Tensor) -> Tensor:
    """Outputs at the places, [N P, O]."""
    flat = out.reshape(len(out), -1, out.shape[-1]) if isinstance(module, nn.Linear) else out.flatten(2).mT
    return flat.gather(1, at[:, :, None].expand(-1, -1, flat.shape[2])).flatten(0, 1)


def _patches(x: Tensor, module: nn.Module, at: Tensor) -> Tensor | None:
    """What the weight multiplies at the places, [N P, I k^2] in the weight's order."""
    if isinstance(module, nn.Linear):
        return _pick(x, module, at)
    assert isinstance(module, nn.Conv2d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    width = padded.shape[3]
    across = (width - dw * (kw - 1) - 1) // sw + 1
    corner = at // across * sh * width + at % across * sw
    if int(corner.max()) + (kh - 1) * dh * width + (kw - 1) * dw >= padded.shape[2] * width:
        return None  # its forward pads in a way of its own
    flat = padded.flatten(2)
    taps = [
        flat.gather(2, (corner + y * dh * width + z * dw)[:, None].expand(-1, flat.shape[1], -1))
        for y in range(kh)
        for z in range(kw)
    ]
    return torch.stack(taps, 2).permute(0, 3, 1, 2).flatten(0, 1).flatten(1)


def _apply(module: nn.Module, patches: Tensor) -> Tensor:
    """The layer's response to patches, [n, O]."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    g = getattr(module, "groups", 1)
    w = weight.reshape(g, len(weight) // g, -1)
    out = torch.einsum("ngi,goi->ngo", patches.view(len(patches), g, -1), w).flatten(1)
    return out if bias is None else out + bias  # type: ignore[operator]


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Mean of a b^T over samples by group: [n, g, A], [n, g, B] -> [g, A, B]; float32 products added in float64."""
    total = torch.zeros(a.shape[1], a.shape[2], b.shape[2], dtype=torch.float64)
    for p, q in zip(torch.split(a, 4096), torch.split(b, 4096), strict=True):
        total += torch.bmm(p.permute(1, 2, 0), q.transpose(0, 1))
    return total / len(a)


@torch.no_grad()
def _fit(module: nn.Module, patches: Tensor, u: Tensor) -> None:
    g = getattr(module, "groups", 1)
    error = u - _apply(module, patches)
    if float(error.abs().max()) <= 1e-5 * float(u.abs().max()):
        return  # nothing in front of it changed
    x, r = patches.view(len(patches), g, -1), error.view(len(patches), g, -1)
    mean_x, mean_r = x.mean(0), r.mean(0)
    x, r = x - mean_x, r - mean_r
    split = len(x) - len(x) // 4  # samples are in the order of images: the last quarter is other images
    s, c = _gram(x[:split], x[:split]), _gram(x[:split], r[:split])
    s_held, c_held = _gram(x[split:], x[split:]), _gram(x[split:], r[split:])
    unit = s.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
    eye = torch.eye(s.shape[1], dtype=s.dtype)

    def change(s: Tensor, c: Tensor, ridge: float) -> Tensor | None:
        factor, failed = torch.linalg.cholesky_ex(s + ridge * unit * eye)
        return None if bool(failed.any()) else torch.cholesky_solve(c, factor)

    best, chosen = 0.0, None
    for ridge in RIDGES:
        d = change(s, c, ridge)
        if d is not None:
            gain = float((2 * d * c_held).sum() - (d * (s_held @ d)).sum())
            best, chosen = max((best, chosen), (gain, ridge), key=lambda pair: pair[0])
    if chosen is None:
        return
    part = split / len(x)
    d = change(part * s + (1 - part) * s_held, part * c + (1 - part) * c_held, chosen)
    if d is None:
        return
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    weight += d.mT.reshape(weight.shape).to(weight.dtype)
    if isinstance(bias, Tensor):
        bias += (mean_r.double() - (mean_x.double()[:, None] @ d)[:, 0]).flatten().to(bias.dtype)

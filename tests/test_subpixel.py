"""Sub-pixel convolutions as nearest neighbours and a convolution: what is exact, and how near the rest comes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from xedge.errors import UsageError
from xedge.models.srresnet import srresnet, x_srresnet
from xedge.subpixel import Subpixel, find_subpixels, rewrite_subpixels, rewritten


def subpixel_of(flat: nn.Conv2d, factor: int) -> nn.Sequential:
    """The sub-pixel convolution that equals nearest neighbours and `flat`, read off its answers to impulses."""
    side, middle = 7, 3
    conv = nn.Conv2d(flat.in_channels, flat.out_channels * factor**2, 3, padding=1)
    assert flat.bias is not None
    with torch.no_grad():
        for channel in range(flat.in_channels):
            x = torch.zeros(1, flat.in_channels, side, side)
            x[0, channel, middle, middle] = 1
            y = flat(functional.interpolate(x, scale_factor=factor, mode="nearest")) - flat.bias.view(1, -1, 1, 1)
            phases = functional.pixel_unshuffle(y, factor)[0]
            conv.weight[:, channel] = phases[:, middle - 1 : middle + 2, middle - 1 : middle + 2].flip(1, 2)
        conv.bias.copy_(flat.bias.repeat_interleave(factor**2))  # type: ignore[union-attr]
    return nn.Sequential(conv, nn.PixelShuffle(factor))


@pytest.mark.parametrize(("factor", "kernel"), [(2, 3), (2, 5), (3, 3), (3, 7), (4, 5)])
def test_what_nearest_neighbours_can_do_is_found_exactly(factor: int, kernel: int) -> None:
    torch.manual_seed(0)
    flat = nn.Conv2d(4, 3, kernel, padding=kernel // 2)
    model = subpixel_of(flat, factor)
    x = torch.randn(2, 4, 16, 16)
    expected = flat(functional.interpolate(x, scale_factor=factor, mode="nearest"))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)  # borders too
    new, errors = rewrite_subpixels(model, [x], kernel)
    assert list(errors.values()) == pytest.approx([0], abs=1e-5)
    other = torch.randn(1, 4, 9, 11)
    torch.testing.assert_close(new(other), model(other), atol=1e-4, rtol=0)
    found = new.get_submodule("0.1")
    torch.testing.assert_close(found.weight, flat.weight, atol=1e-4, rtol=0)


def test_any_other_is_not_exact_and_the_error_is_what_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.PixelShuffle(2))
    x = torch.randn(2, 4, 24, 24)
    truth = model(x).detach()
    spread = float((truth - truth.mean((0, 2, 3), keepdim=True)).square().mean().sqrt())
    errors = []
    for kernel in (1, 3, 5):
        new, found = rewrite_subpixels(model, [x], kernel)
        (error,) = found.values()
        measured = float((new(x).detach() - truth).square().mean().sqrt())
        assert error == pytest.approx(measured / spread, rel=1e-3)
        errors.append(error)
    assert 1 > errors[0] > errors[1] > errors[2] > 0.3  # white noise and unequal sums: as hard as it gets
    (nearest,) = rewrite_subpixels(model, [x], 5)[1].values()
    with torch.no_grad():
        model[0].weight.sub_(model[0].weight.sum((2, 3), keepdim=True) / 9).add_(0.1)
    (equal,) = rewrite_subpixels(model, [x], 5)[1].values()
    assert equal < nearest


@pytest.mark.parametrize("factor", [2, 3])
def test_a_subpixel_convolution_is_a_transposed_one(factor: int) -> None:
    conv = nn.Conv2d(4, 2 * factor**2, 3, padding=1, bias=False)
    wide = nn.ConvTranspose2d(4, 2, 3 * factor, factor, factor, bias=False)
    with torch.no_grad():  # K interleaved: [2, r, r, 4, 3, 3] -> [4, 2, 3 r, 3 r], mirrored
        taps = conv.weight.view(2, factor, factor, 4, 3, 3).flip(4, 5).permute(3, 0, 4, 1, 5, 2)
        wide.weight.copy_(taps.reshape(4, 2, 3 * factor, 3 * factor))
    x = torch.randn(1, 4, 7, 6)
    torch.testing.assert_close(wide(x), functional.pixel_shuffle(conv(x), factor), atol=1e-5, rtol=0)


def test_a_net_keeps_its_names_and_loads_its_weights() -> None:
    torch.manual_seed(0)
    model = srresnet(4, blocks=1, width=8).eval()
    x = torch.rand(2, 3, 12, 12)
    pairs = find_subpixels(model, x)
    assert pairs == (Subpixel("up.0", "up.1", 2), Subpixel("up.3", "up.4", 2))
    new, errors = rewrite_subpixels(model, [x])
    assert set(errors) == set(pairs)
    again = rewritten(srresnet(4, blocks=1, width=8), pairs).eval()
    again.load_state_dict(new.state_dict())
    assert torch.equal(again(x), new(x))
    count = sum(p.numel() for p in new.parameters())
    assert count == sum(p.numel() for p in x_srresnet(4, blocks=1, width=8).parameters())
    assert not find_subpixels(new, x)
    assert len(find_subpixels(model, x)) == 2  # the original is left alone


class Twice(nn.Module):
    """A shuffle of what was added to the convolution's output is no sub-pixel convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shuffle = nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x) + 1)  # type: ignore[no-any-return]


def test_what_cannot_be_rewritten_is_said() -> None:
    for model in (Twice(), nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, stride=2), nn.PixelShuffle(2))):
        with pytest.raises(UsageError, match="no convolution with a pixel shuffle"):
            rewrite_subpixels(model, [torch.rand(1, 3, 8, 8)])
    good = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
    with pytest.raises(UsageError, match="no inputs"):
        rewrite_subpixels(good, [])
    with pytest.raises(UsageError, match="kernel of 7"):
        rewrite_subpixels(good, [torch.rand(1, 3, 8, 8)], 7)

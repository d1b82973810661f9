"""Discriminant information where the teacher is a picture: windows, moments, Fisher's and Taylor's terms, criteria."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import tiny_pictures
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xedge import load
from xedge.criteria import di, diloss, fback, greedy, output, taylor
from xedge.criteria.di import scale, solve
from xedge.errors import UsageError
from xedge.groups import Groups, find_groups
from xedge.judge import charbonnier
from xedge.observe import Observed, observe
from xedge.teacher import MOST, Teacher, choose_teacher, windows

SHAPE = (3, 12, 12)
RESIDUAL = Teacher("images", 3, pictures="residual")


def places(h: int, w: int) -> tuple[Tensor, Tensor]:
    ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return ys.flatten(), xs.flatten()


# -- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_where_the_sides_divide_a_window_is_space_to_depth(k: int) -> None:
    picture = torch.randn(2, 3, 5 * k, 4 * k)
    want = F.pixel_unshuffle(picture, k).flatten(2).mT  # [N, P, C k^2]
    assert torch.equal(windows(picture, (5, 4), *places(5, 4)), want)


def test_windows_of_other_maps_lie_about_their_pixel() -> None:
    ramp = torch.arange(24.0).expand(1, 1, 20, 24).contiguous()
    finer = windows(ramp, (40, 48), *places(40, 48))  # a map finer than the picture: the nearest pixel
    assert finer.shape == (1, 40 * 48, 1)
    torch.testing.assert_close(finer[0, :48, 0], (torch.arange(48) + 0.5) / 2 - 0.5, atol=0.5, rtol=0)
    odd = windows(ramp, (7, 7), *places(7, 7))  # 24 / 7 is 3.4: windows of 2 x 3
    assert odd.shape == (1, 49, 6)
    torch.testing.assert_close(odd[0, :7].mean(1), (torch.arange(7) + 0.5) * 24 / 7 - 0.5, atol=0.6, rtol=0)
    coarse = windows(ramp, (1, 1), *places(1, 1))  # the whole picture, averaged
    assert coarse.shape == (1, 1, MOST * MOST)
    torch.testing.assert_close(coarse.mean(), ramp.mean())


def test_the_residual_is_what_plain_enlarging_leaves() -> None:
    x, truth, out = torch.rand(2, 3, 6, 6), torch.rand(2, 3, 12, 12), torch.rand(2, 3, 12, 12)
    plain = F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True)
    torch.testing.assert_close(RESIDUAL.picture(x, truth, out), truth - plain)
    assert torch.equal(Teacher("images", 3, pictures="whole").picture(x, truth, out), truth)
    torch.testing.assert_close(Teacher("logits", 3, pictures="residual").picture(x, truth, out), out - plain)
    same = torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(RESIDUAL.picture(x, same, out), same - x, atol=1e-6, rtol=0)  # denoising: the noise


def test_pictures_have_teachers_of_their_own() -> None:
    data = tiny_pictures.data()
    assert choose_teacher(None, data, 0) == choose_teacher("images", data, 0)
    assert choose_teacher("images:whole", data, 0).pictures == "whole"
    assert choose_teacher("logits", data, 0).kind == "logits"
    assert not choose_teacher("images", data, 0).labelled
    for spec in ("labels", "class:1", "coarse", "images:half", "logits:x"):
        with pytest.raises(UsageError):
            choose_teacher(spec, data, 0)
    with pytest.raises(UsageError, match="true pictures"):
        choose_teacher("images", tiny.data(), 4)


# -- what is observed ------------------------------------------------------------------------------------------------


def enlarging() -> nn.Module:
    """Smooth, so that differences may be taken; with a sub-pixel layer in the midst."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2), nn.Tanh(),
        nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 3, padding=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Groups, Tensor, Tensor]:
    torch.manual_seed(0)
    model = enlarging()
    groups = find_groups(model.eval(), torch.zeros(1, *SHAPE))
    x = torch.rand(6, *SHAPE, dtype=torch.float64)
    return model.double(), groups, x, torch.rand(6, 3, 24, 24, dtype=torch.float64)


def seen_of(case: tuple[nn.Module, Groups, Tensor, Tensor], sizes: list[int], teacher: Teacher = RESIDUAL) -> Observed:
    model, groups, x, truth = case
    return observe(model, groups, zip(x.split(sizes), truth.split(sizes), strict=True), teacher, gradients=True)


def test_moments_pair_each_pixel_with_the_pixels_it_stands_for(case: tuple[nn.Module, Groups, Tensor, Tensor]) -> None:
    model, _, x, truth = case
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, _o, name=name: inputs.__setitem__(name, args[0])  # type: ignore[misc]
        )
        for name in ("2", "5", "7")
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    taught = truth - F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True)
    observed = seen_of(case, [2, 4])
    assert set(observed.seen) <= {"2", "5", "7"}
    assert {"2", "7"} <= set(observed.seen)
    for name, seen in observed.seen.items():
        side = inputs[name].shape[2]
        at = torch.tensor([(2 * i + 1) * side // 14 for i in range(7)])
        a = inputs[name][:, :, at][:, :, :, at].flatten(2).mT.flatten(0, 1).numpy()
        y = F.pixel_unshuffle(taught, 24 // side)[:, :, at][:, :, :, at].flatten(2).mT.flatten(0, 1).numpy()
        assert seen.pooled.count == len(a) == 6 * 49
        np.testing.assert_allclose(seen.pooled.mean(), a.mean(0), atol=1e-12)
        np.testing.assert_allclose(seen.pooled.scatter(), np.cov(a.T) * (len(a) - 1), atol=1e-9)
        np.testing.assert_allclose(seen.pooled.cross(), (a - a.mean(0)).T @ y, atol=1e-9)
        assert seen.pixels is seen.pooled


def test_parts_add_up_to_one_pass(case: tuple[nn.Module, Groups, Tensor, Tensor]) -> None:
    one, parts = seen_of(case, [6]), seen_of(case, [1, 3, 2])
    for name, seen in one.seen.items():
        np.testing.assert_allclose(seen.pooled.scatter(), parts.seen[name].pooled.scatter(), atol=1e-9)
        np.testing.assert_allclose(seen.pooled.cross(), parts.seen[name].pooled.cross(), atol=1e-9)
        np.testing.assert_allclose(seen.taylor, parts.seen[name].taylor, rtol=1e-9)
    halves = [seen_of((*case[:2], case[2][part], case[3][part]), [3]) for part in (slice(3), slice(3, 6))]
    for name, seen in one.seen.items():
        both = halves[0].seen[name].pooled.merge(halves[1].seen[name].pooled)
        np.testing.assert_allclose(both.scatter(), seen.pooled.scatter(), atol=1e-9)
        np.testing.assert_allclose(both.cross(), seen.pooled.cross(), atol=1e-9)


def test_taylor_is_the_derivative_of_the_loss_by_a_channels_scale(
    case: tuple[nn.Module, Groups, Tensor, Tensor],
) -> None:
    model, _, x, truth = case
    seen = seen_of(case, [6]).seen["2"]
    slopes = torch.zeros(8, len(x), dtype=torch.float64)
    for channel in range(8):
        for sign in (1, -1):
            gain = torch.ones(8, 1, 1, dtype=torch.float64)
            gain[channel] += sign * 1e-5
            handle = model.get_submodule("2").register_forward_pre_hook(lambda _m, args, gain=gain: (args[0] * gain,))  # type: ignore[misc]
            with torch.no_grad():
                slopes[channel] += sign * charbonnier(model(x) - truth).flatten(1).sum(1) / 2e-5
            handle.remove()
    np.testing.assert_allclose(seen.taylor, slopes.square().mean(1).numpy(), rtol=1e-4)


def test_fisher_of_random_probes_is_the_squared_jacobian_on_average() -> None:
    """Of a linear layer before a sub-pixel layer: each of its outputs is one value of the picture, so F_o = pixels; and
    of a layer whose outputs reach the picture by known weights."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)).double()
    groups = find_groups(net.eval().float(), torch.zeros(1, 3, 5, 4))
    net.double()
    x = torch.rand(400, 3, 5, 4, dtype=torch.float64)
    observed = observe(net, groups, [(x, torch.rand(400, 3, 5, 4, dtype=torch.float64))], RESIDUAL, gradients=True)
    np.testing.assert_allclose(observed.seen["2"].fisher, 20, rtol=1e-12)  # signs: no variance at all
    last = net.get_submodule("2").weight
    assert isinstance(last, Tensor)
    want = 20 * last.detach().square().sum((0, 2, 3)).numpy()
    np.testing.assert_allclose(observed.seen["1"].fisher, want, rtol=0.05)


# -- the criteria ----------------------------------------------------------------------------------------------------


def information(x: np.ndarray, y: np.ndarray, rho: float) -> float:
    """tr((X X^T + rho I)^-1 X Y^T Y X^T) by itself."""
    x, y = x - x.mean(0), y - y.mean(0)
    c = x.T @ y
    return float(np.trace(np.linalg.solve(x.T @ x + rho * np.eye(x.shape[1]), c @ c.T)))


def test_di_is_the_ridge_regression_of_the_picture(case: tuple[nn.Module, Groups, Tensor, Tensor]) -> None:
    """Eqs 13-15: RidgeLSE = tr(Y Y^T) - DI; and removing a channel costs ||G_i||^2 / P_ii, refitted."""
    model, _, x, truth = case
    kept: list[Tensor] = []
    handle = model.get_submodule("2").register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    at = torch.tensor([(2 * i + 1) * 12 // 14 for i in range(7)])
    a = kept[0][:, :, at][:, :, :, at].flatten(2).mT.flatten(0, 1).numpy()
    taught = truth - F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True)
    y = F.pixel_unshuffle(taught, 2)[:, :, at][:, :, :, at].flatten(2).mT.flatten(0, 1).numpy()
    one = solve(seen_of(case, [6]).seen["2"].pooled, RESIDUAL, 0.1)
    assert one.di == pytest.approx(information(a, y, one.rho), rel=1e-9)
    ac, yc = a - a.mean(0), y - y.mean(0)
    w = one.readout
    ridge_lse = np.square(yc - ac @ w).sum() + one.rho * np.square(w).sum()
    assert ridge_lse == pytest.approx(np.square(yc).sum() - one.di, rel=1e-9)
    for i in range(8):
        rest = np.delete(np.arange(8), i)
        refitted = one.di - information(a[:, rest], y, one.rho)
        assert np.square(w[i]).sum() / one.inverse[i, i] == pytest.approx(refitted, rel=1e-6)


def test_features_that_hold_the_picture_have_all_of_its_information() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(8, 3, 24, 24, generator=draw, dtype=torch.float64)
    net = nn.Sequential(nn.Conv2d(3, 14, 1), nn.Conv2d(14, 12, 1), nn.PixelShuffle(2))
    groups = find_groups(net.eval(), torch.zeros(1, *SHAPE))
    net.double()
    x = torch.zeros(8, *SHAPE, dtype=torch.float64)  # so the residual is the truth

    def hold(_m: nn.Module, _a: object, out: Tensor) -> Tensor:
        mixed = F.pixel_unshuffle(truth, 2)
        return torch.cat([mixed, torch.randn(8, 2, 12, 12, generator=draw, dtype=torch.float64)], 1)

    net[0].register_forward_hook(hold)
    observed = observe(net, groups, [(x, truth)], RESIDUAL, gradients=False)
    moments = observed.seen["1"].pooled
    assert solve(moments, RESIDUAL, 1e-6, standardise=True).di / scale(moments, RESIDUAL) == pytest.approx(1, abs=1e-4)
    (group,) = groups.free
    for criterion in (di.score, greedy.score, diloss.score):
        scores = criterion(group, observed, np.ones(14, bool))
        assert set(np.argsort(scores)[:2]) == {12, 13}  # the noise goes first
    np.testing.assert_allclose(di.score(group, observed, np.ones(14, bool))[:12].sum(), 1, atol=0.1)


def test_scores_do_not_feel_the_teachers_size_or_level(case: tuple[nn.Module, Groups, Tensor, Tensor]) -> None:
    model, groups, x, truth = case
    base, moved = seen_of(case, [6]), {}
    whole = Teacher("images", 3, pictures="whole")
    moved[0] = observe(model, groups, [(x, truth)], whole, gradients=False)
    moved[1] = observe(model, groups, [(x, 7 * truth + 3)], whole, gradients=False)
    for group in groups.free:
        mask = np.ones(group.size, bool)
        if base.of(group):
            for criterion in (di.score, diloss.score, greedy.score):
                np.testing.assert_allclose(
                    criterion(group, moved[0], mask), criterion(group, moved[1], mask), rtol=1e-5, atol=1e-12
                )


@pytest.mark.parametrize("name", sorted(load.criteria()))
def test_every_criterion_ranks_a_net_that_restores(case: tuple[nn.Module, Groups, Tensor, Tensor], name: str) -> None:
    observed, criterion = seen_of(case, [3, 3]), load.load_criterion(name)
    for group in case[1].free:
        if not observed.of(group):
            continue
        mask = np.ones(group.size, bool)
        if name in ("fdr", "dfdr", "bn-scale"):
            with pytest.raises(UsageError, match=r"classes|batch norm"):
                criterion(group, observed, mask)
            continue
        scores = criterion(group, observed, mask)
        assert scores.shape == (group.size,)
        assert np.isfinite(scores).all()
        if criterion in (fback.score, output.score, taylor.score):
            assert (scores > 0).any()


def test_the_nets_own_pictures_teach_in_one_backward_pass(case: tuple[nn.Module, Groups, Tensor, Tensor]) -> None:
    model, groups, x, truth = case
    own = Teacher("logits", 3, pictures="residual")
    a = observe(model, groups, [(x, truth)], own, gradients=True)
    b = observe(model, groups, [(x, 0 * truth)], own, gradients=True)
    for name in a.seen:
        np.testing.assert_array_equal(a.seen[name].pooled.cross(), b.seen[name].pooled.cross())
        np.testing.assert_array_equal(a.seen[name].taylor, b.seen[name].taylor)
    assert dataclasses.replace(own, kind="images") != own

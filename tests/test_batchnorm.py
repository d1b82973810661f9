"""Batch norms after a cut give what they gave before, whatever images they are measured on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xedge.batchnorm import input_statistics, match_batch_norm
from xedge.data import Tensors
from xedge.groups import find_groups
from xedge.prune import cut


def net() -> nn.Sequential:
    """Two norms whose running statistics are not those of the images below, and weights that are not all alike."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(1)) * 2 + 1


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Every norm's output on x."""
    seen: dict[str, Tensor] = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        model(x)
    return seen


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def test_what_is_not_cut_keeps_its_statistics(images: Tensor) -> None:
    model = net()
    groups = find_groups(model, images[:1])
    same = copy.deepcopy(model)
    match_batch_norm(same, model, groups, groups.whole(), input_statistics(model, Tensors(images)), Tensors(images))
    for name, m in norms(model).items():
        torch.testing.assert_close(norms(same)[name].running_mean, m.running_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norms(same)[name].running_var, m.running_var, rtol=1e-4, atol=1e-4)


def test_each_norm_gives_the_mean_and_spread_that_it_gave_before_the_cut(images: Tensor) -> None:
    model = net()
    groups = find_groups(model, images[:1])
    draw = np.random.default_rng(0)
    keep = {g.name: np.sort(draw.permutation(g.size)) < g.size // 2 for g in groups.free}
    keep = {name: np.isin(np.arange(len(m)), draw.permutation(len(m))[: len(m) // 2]) for name, m in keep.items()}
    small = cut(model, groups, keep)
    untouched = copy.deepcopy(small)
    match_batch_norm(small, model, groups, keep, input_statistics(model, Tensors(images)), Tensors(images))
    before, after, plain = outputs(model, images), outputs(small, images), outputs(untouched, images)
    stays = {"1": keep[groups.free[0].name], "4": keep[groups.free[1].name]}
    for name, mask in stays.items():
        want = before[name][:, torch.from_numpy(mask)]
        torch.testing.assert_close(after[name].mean((0, 2, 3)), want.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(after[name].std((0, 2, 3)), want.std((0, 2, 3)), rtol=1e-3, atol=1e-3)
    # The test can fail: without matching the second norm is off.
    want = before["4"][:, torch.from_numpy(stays["4"])]
    assert (plain["4"].mean((0, 2, 3)) - want.mean((0, 2, 3))).abs().max() > 0.1


def test_on_the_images_of_the_running_statistics_it_is_plain_re_estimation(images: Tensor) -> None:
    model = net()
    statistics = input_statistics(model, Tensors(images))
    for name, m in norms(model).items():  # front to back: each norm's input follows from the ones before
        assert m.running_mean is not None
        assert m.running_var is not None
        statistics = input_statistics(model, Tensors(images))
        m.running_mean.copy_(statistics[name][0])
        m.running_var.copy_(statistics[name][1])
    statistics = input_statistics(model, Tensors(images))
    groups = find_groups(model, images[:1])
    keep = {g.name: np.arange(g.size) % 2 == 0 for g in groups.free}
    small = cut(model, groups, keep)
    match_batch_norm(small, model, groups, keep, statistics, Tensors(images))
    found = input_statistics(small, Tensors(images))
    for name, m in norms(small).items():
        torch.testing.assert_close(m.running_mean, found[name][0].float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(m.running_var, found[name][1].float(), rtol=1e-3, atol=1e-3)


def test_what_differs_from_batch_to_batch_is_not_lost() -> None:
    """400 images of very different contrast: within batches of 128 the spread looks smaller than it is."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(400, 3, 10, 10, generator=draw) * torch.randn(400, 1, 1, 1, generator=draw).exp()
    model = net()
    groups = find_groups(model, x[:1])
    keep = groups.whole()
    keep["0"][::2] = False
    statistics = input_statistics(model, Tensors(x))
    small = cut(model, groups, keep)
    match_batch_norm(small, model, groups, keep, statistics, Tensors(x))
    before, after = outputs(model, x)["4"], outputs(small, x)["4"]
    wanted, found = before.var((0, 2, 3)), after.var((0, 2, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_modes_weights_and_the_original_stay(images: Tensor) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    groups = find_groups(model, images[:1])
    small = cut(model, groups, groups.whole())
    match_batch_norm(small, model, groups, groups.whole(), input_statistics(model, Tensors(images)), Tensors(images))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *small.modules()))

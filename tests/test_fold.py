"""Folding: what a removed channel carried is carried by those that stay."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xedge import fold as folding
from xedge.channels import Groups
from xedge.fold import fold, prediction
from xedge.groups import find_groups
from xedge.observe import observe
from xedge.plan import Keep
from xedge.prune import cut
from xedge.teacher import Teacher

TEACHER = Teacher("logits", 3)


@pytest.fixture
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ridge a linear dependence is folded exactly."""
    monkeypatch.setattr(folding, "RIDGE", 1e-12)


def masks(groups: Groups, gone: Mapping[str, list[int]]) -> Keep:
    keep = groups.whole()
    for name, channels in gone.items():
        keep[name][channels] = False
    return keep


def depend(layer: nn.Module, gone: list[int], seed: int) -> None:
    """Make some output channels linear combinations of the others, plus a constant."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    generator = torch.Generator().manual_seed(seed)
    stay = [c for c in range(len(weight)) if c not in gone]
    mix = torch.randn(len(gone), len(stay), generator=generator, dtype=weight.dtype)
    with torch.no_grad():
        weight[gone] = torch.tensordot(mix, weight[stay], 1)
        bias[gone] = mix @ bias[stay] + torch.randn(len(gone), generator=generator, dtype=weight.dtype)


class Net(nn.Module):
    """Linear up to each consumer: a convolution without padding, a pooled flatten of 2 x 2, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 7, 3, stride=2)
        self.pool, self.fc, self.head = nn.AvgPool2d(2), nn.Linear(28, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.pool(self.b(self.a(x))).flatten(1)))  # type: ignore[no-any-return]


def grouped(model: nn.Module, shape: tuple[int, ...] = (3, 11, 11)) -> Groups:
    return find_groups(model.eval(), torch.zeros(1, *shape))


def look(model: nn.Module, groups: Groups, x: Tensor) -> folding.Observed:
    return observe(
        model, groups, [(part, torch.full((len(part),), -1)) for part in x.split(16)], TEACHER, gradients=False
    )


GONE = {"a": [1, 4], "b": [0, 5, 6], "fc": [2, 3, 7]}


@pytest.mark.usefixtures("_exact")
def test_linear_dependence_is_folded_exactly(seed: int) -> None:
    model = Net()
    groups = grouped(model)
    model = model.double()
    for name, gone in GONE.items():
        depend(model.get_submodule(name), gone, seed)
    x = torch.randn(64, 3, 11, 11, dtype=torch.float64)
    keep = masks(groups, GONE)
    with torch.no_grad():
        small = cut(fold(model, groups, keep, look(model, groups, x)), groups, keep)
        new = torch.randn(5, 3, 11, 11, dtype=torch.float64)  # images that were not observed
        want = model(new)
        torch.testing.assert_close(small(new), want, rtol=1e-6, atol=1e-6)
        plain = cut(model, groups, keep)(new)
    assert (plain - want).abs().max() > 0.01 * want.abs().max()  # so the fold did something


def test_the_ridge_costs_little(seed: int) -> None:
    model = Net()
    groups = grouped(model)
    for name, gone in GONE.items():
        depend(model.get_submodule(name), gone, seed)
    x = torch.randn(64, 3, 11, 11)
    keep = masks(groups, GONE)
    with torch.no_grad():
        want = model(x)
        plain, folded = (
            (cut(m, groups, keep)(x) - want).square().sum()
            for m in (model, fold(model, groups, keep, look(model, groups, x)))
        )
    assert folded < 0.01 * plain


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize("read", ["channels last", "transposed"])
def test_other_consumers(seed: int, read: str) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 3)
            self.b = nn.Linear(6, 5) if read == "channels last" else nn.ConvTranspose2d(6, 5, 2, 2, bias=False)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = self.b(x.permute(0, 2, 3, 1)).mean((1, 2)) if read == "channels last" else self.b(x).mean((2, 3))
            return self.head(x)  # type: ignore[no-any-return]

    model = Other()
    groups = grouped(model, (3, 7, 7))
    model = model.double()
    depend(model.a, [0, 3], seed)
    x = torch.randn(40, 3, 7, 7, dtype=torch.float64)
    keep = masks(groups, {"a": [0, 3]})
    with torch.no_grad():
        small = cut(fold(model, groups, keep, look(model, groups, x)), groups, keep)
        # A transposed convolution spreads the constant unevenly, so it takes none: the rest is exact.
        offset = model(x) - small(x)
        torch.testing.assert_close(offset, offset[:1].expand_as(offset), rtol=0, atol=1e-8)
        if read == "channels last":
            torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-8)


def test_least_squares_on_what_is_not_dependent(seed: int) -> None:
    """The rows of B are numpy's least squares on the augmented system."""
    r = np.random.default_rng(seed)
    x = r.normal(size=(50, 6)) @ r.normal(size=(6, 6))
    stays = np.array([True, False, True, True, False, True])
    rho = folding.RIDGE * float(np.mean((x[:, stays] ** 2).sum(0)))
    left = np.concatenate([x[:, stays], np.sqrt(rho) * np.eye(4)])
    right = np.concatenate([x[:, ~stays], np.zeros((4, 2))])
    np.testing.assert_allclose(prediction(x.T @ x, stays), np.linalg.lstsq(left, right, rcond=None)[0].T, rtol=1e-8)
    assert not prediction(np.zeros((6, 6)), stays).any()  # dead channels say nothing, and divide by nothing


def test_only_the_consumers_of_cut_groups_change() -> None:
    model = Net()
    groups = grouped(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(32, 3, 11, 11)
    seen = look(model, groups, x)
    keep = masks(groups, {"b": [2, 4]})
    folded = fold(model, groups, keep, seen)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # a copy
    changed = {k for k, v in folded.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"fc.weight", "fc.bias"}
    assert {k: v.shape for k, v in folded.state_dict().items()} == {k: v.shape for k, v in before.items()}
    # The removed channels' own columns are left for the cut to take.
    gone = [4 * c + place for c in (2, 4) for place in range(4)]
    assert torch.equal(folded.state_dict()["fc.weight"][:, gone], before["fc.weight"][:, gone])
    for same in (fold(model, groups, groups.whole(), seen), fold(model, groups, {}, seen)):
        assert all(torch.equal(v, before[k]) for k, v in same.state_dict().items())


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 5, 1)
        self.depthwise, self.head = nn.Conv2d(5, 5, 3, groups=5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return self.head(self.depthwise(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_grouped_consumers_are_left_as_they_are() -> None:
    model = Grouped()
    groups = grouped(model, (3, 6, 6))
    keep = masks(groups, {"a": [1], "b": [0], "c": [2]})
    folded = fold(model, groups, keep, look(model, groups, torch.randn(32, 3, 6, 6)))
    before = model.state_dict()
    changed = {k for k, v in folded.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"c.weight", "c.bias", "head.weight", "head.bias"}  # not b, and nothing of the depthwise one
    assert cut(folded, groups, keep)(torch.zeros(1, 3, 6, 6)).shape == (1, 3)


class Join(nn.Module):
    """One consumer of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(9, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("_exact")
def test_channels_of_one_group_stand_in_for_those_of_another(seed: int) -> None:
    """Nine channels of a three-channel image: any three that stay carry all, whichever group they are of."""
    model = Join()
    groups = grouped(model, (3, 6, 6))
    model = model.double()
    x = torch.randn(32, 3, 6, 6, dtype=torch.float64)
    keep = masks(groups, {"a": [0, 2, 3], "b": [0, 1, 4]})
    with torch.no_grad():
        small = cut(fold(model, groups, keep, look(model, groups, x)), groups, keep)
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-6)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1), nn.Linear(26, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = F.avg_pool2d(self.a(x), 4).flatten(1)
        return self.head(torch.cat([flat, self.b(x).mean((2, 3))], 1))  # type: ignore[no-any-return]


def test_mixed_flattens_are_left_as_they_are() -> None:
    model = Mixed()
    groups = grouped(model, (3, 8, 8))
    folded = fold(model, groups, masks(groups, {"a": [1], "b": [2]}), look(model, groups, torch.randn(16, 3, 8, 8)))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in folded.state_dict().items())

"""What is observed at the taps: moments, weights, scales of batch norms; and what cannot be observed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tapped_nets import ALL, CLASSES, Case, Flat, Grouped, Mixed, case, common, groups_of
from torch import Tensor, nn
from torch.nn import functional as F

from xedge.errors import InternalError, UsageError
from xedge.groups import find_groups
from xedge.observe import PIXELS, consumer_weight, observe, taps
from xedge.teacher import Teacher


def inputs_of(c: Case, layer: str) -> list[Tensor]:
    """[N, C, P] of each call, by a hook of the test's own."""
    module, found = c.model.get_submodule(layer), []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].movedim(-1, 1) if isinstance(module, nn.Linear) and args[0].dim() > 2 else args[0]
        found.append(x.reshape(*x.shape[:2], -1))

    handle = module.register_forward_pre_hook(hook)
    with torch.no_grad():
        c.model(c.x)
    handle.remove()
    return found


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("gradients", [False, True])
def test_moments_are_those_of_the_layers_input(make: Callable[[], nn.Module], gradients: bool) -> None:
    c = common(make) if gradients else case(make(), gradients=False)
    assert c.observed.samples == len(c.x)
    for layer, seen in c.observed.seen.items():
        pooled, pixels = [], []
        for x in inputs_of(c, layer):
            columns = [x[:, torch.from_numpy(index)] for index in seen.tap.blocks.values()]  # [N, C, r, P]
            if len({t.shape[2] for t in columns}) > 1:
                columns = [t.mean(2, keepdim=True) for t in columns]
            together = torch.cat(columns, 1)
            pooled.append(together.mean((2, 3)))
            pixels.append(together.permute(0, 2, 3, 1).reshape(-1, together.shape[1]))
        a = torch.cat(pooled).numpy()
        y = F.one_hot(c.labels, CLASSES).repeat(len(pooled), 1).numpy()
        assert seen.pooled.count == len(a)
        np.testing.assert_allclose(seen.pooled.mean(), a.mean(0), atol=1e-12)
        np.testing.assert_allclose(seen.pooled.scatter(), np.cov(a.T) * (len(a) - 1), atol=1e-10)
        np.testing.assert_allclose(seen.pooled.cross(), (a - a.mean(0)).T @ y, atol=1e-10)
        p = torch.cat(pixels).numpy()  # these maps are no larger than the grid
        assert seen.pixels.count == len(p)
        np.testing.assert_allclose(seen.pixels.mean(), p.mean(0), atol=1e-12)
        np.testing.assert_allclose(seen.pixels.scatter(), np.cov(p.T) * (len(p) - 1), atol=1e-9)
        if not gradients:
            assert not seen.taylor.any()
            assert not seen.fisher.any()


@pytest.mark.parametrize(
    ("grouped", "plain"),
    [
        (nn.Linear(8, 6), nn.Linear(8, 6)),
        (nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3)),
        (nn.Conv2d(8, 6, (1, 3), groups=2), nn.Conv2d(8, 6, (1, 3))),
        (nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(8, 16, 3)),
        (nn.ConvTranspose2d(8, 6, 3, 2), nn.ConvTranspose2d(8, 6, 3, 2)),
        (nn.ConvTranspose2d(8, 6, (2, 3), 2, groups=2), nn.ConvTranspose2d(8, 6, (2, 3), 2)),
        (nn.Conv1d(8, 12, 3, groups=4), nn.Conv1d(8, 12, 3)),
        (nn.ConvTranspose1d(8, 6, 3, groups=2), nn.ConvTranspose1d(8, 6, 3)),
        (nn.Conv3d(8, 6, (1, 2, 3), groups=2), nn.Conv3d(8, 6, (1, 2, 3))),
    ],
)
def test_weight_seen_from_the_input(grouped: nn.Module, plain: nn.Module) -> None:
    """The dense weight, in a layer without groups, computes what the layer computes."""
    dense = consumer_weight(grouped, np.arange(8)[:, None])
    w, bias = plain.weight, grouped.bias
    assert isinstance(w, Tensor)
    assert isinstance(bias, Tensor)
    assert dense.shape[:3] == (len(bias), 8, 1)
    transposed = "Transpose" in type(plain).__name__
    rows = torch.from_numpy(dense[:, :, 0]).transpose(0, 1) if transposed else torch.from_numpy(dense[:, :, 0])
    plain.load_state_dict({"weight": rows.reshape(w.shape), "bias": bias})
    x = torch.randn(2, 8, *(5,) * (w.dim() - 2))
    torch.testing.assert_close(plain(x), grouped(x))
    index = np.array([[3, 5], [0, 7], [2, 6]])
    np.testing.assert_array_equal(
        consumer_weight(grouped, index), dense[:, index.reshape(-1), 0].reshape(-1, 3, 2, dense.shape[3])
    )


def test_weight_of_a_flatten_of_a_tap() -> None:
    c = common(Flat)
    fc = c.model.fc
    assert isinstance(fc, nn.Linear)
    want = fc.weight.detach().numpy().reshape(7, 6, 4, 1)
    np.testing.assert_allclose(c.tap("fc").weight, want)
    assert c.tap("b").weight.shape == (6, 5, 1, 9)
    mixed = common(Mixed).tap("head")
    assert mixed.weight.shape == (CLASSES, 11, 4, 1)
    assert not mixed.weight[:, mixed.tap.columns("b"), 1:].any()  # padded where a block has fewer places


class Functional(nn.Module):
    """A weight that the forward uses by itself, on something else than its module's input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        self.weight = nn.Parameter(torch.randn(CLASSES, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.a(x).tanh().mean((2, 3)), self.b.weight, self.b.bias)
        return F.linear(x.tanh(), self.weight)


def test_weights_used_by_function_calls_are_no_taps() -> None:
    c = case(Functional())
    assert c.observed.seen == {}
    assert all(c.observed.of(g) == [] for g in c.groups.free)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(2, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).mean((2, 3))  # type: ignore[no-any-return]


def test_large_maps_are_read_on_a_grid_from_edge_to_edge() -> None:
    c = case(Wide(), (1, 19, 5), n=2)
    (x,) = inputs_of(c, "b")
    rows = np.round(np.linspace(0, 18, PIXELS)).astype(int)
    grid = x.reshape(2, 2, 19, 5).numpy()[:, :, rows].transpose(0, 2, 3, 1).reshape(-1, 2)
    seen = c.tap("b")
    assert seen.pixels.count == 2 * PIXELS * 5
    np.testing.assert_allclose(seen.pixels.scatter(), np.cov(grid.T) * (len(grid) - 1), atol=1e-10)
    np.testing.assert_allclose(seen.pooled.mean(), x.mean((0, 2)).numpy(), atol=1e-12)  # of all pixels


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, CLASSES))
    model.train()
    model[1].eval()  # a batch norm that its owner froze
    groups = find_groups(model, torch.zeros(1, 3, 8, 8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4))
    observe(model, groups, [batch], Teacher("labels", CLASSES), gradients=True)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_producer_weights_by_channel() -> None:
    c = common(Grouped)
    a, t = c.model.get_submodule("a"), c.model.get_submodule("d")
    assert isinstance(a.weight, Tensor)
    assert isinstance(t.weight, Tensor)
    (rows,) = c.observed.producer_weights["a"]
    # Two groups of four lose the same places, so a channel of the group is two filters.
    w = a.weight.detach().numpy().reshape(8, -1)
    np.testing.assert_array_equal(rows, np.stack([np.concatenate([w[i], w[i + 4]]) for i in range(4)]))
    (rows,) = c.observed.producer_weights["d"]
    np.testing.assert_array_equal(rows, t.weight.detach().transpose(0, 1).flatten(1).numpy())


class Normed(nn.Module):
    """One batch norm after the layer, one after the depthwise convolution, and another group without any."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.deep, self.deep_norm = nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5)
        self.b, self.head = nn.Conv2d(5, 6, 1), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep_norm(self.deep(self.a_norm(self.a(x)).tanh())).tanh()
        return self.head(self.b(x).tanh().mean((2, 3)))


def test_scales_of_the_batch_norms_by_channel(seed: int) -> None:
    torch.manual_seed(seed)
    model = Normed()
    with torch.no_grad():
        model.a_norm.weight.copy_(torch.randn(5))
        model.deep_norm.weight.copy_(torch.randn(5))
    c = case(model)
    want = [model.a_norm.weight.abs().tolist(), model.deep_norm.weight.abs().tolist()]
    assert [g.tolist() for g in c.observed.norm_scales["a"]] == want
    assert c.observed.norm_scales["b"] == []


class Folded(nn.Module):
    """Rows of the image become samples of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).mean(3).movedim(1, 2).flatten(0, 1)
        return self.head(self.b(x).tanh().unflatten(0, (-1, 6)).mean(1))


def test_what_cannot_be_observed_is_said() -> None:
    model = Flat().eval()
    groups = groups_of(model, (3, 8, 8))
    with pytest.raises(UsageError, match="training data are empty"):
        observe(model, groups, [], Teacher("labels", CLASSES), gradients=False)
    x = torch.full((2, 3, 8, 8), torch.nan)
    with pytest.raises(UsageError, match=r"Flat: its output is NaN"):
        observe(model, groups, [(x, torch.zeros(2, dtype=torch.int64))], Teacher("labels", CLASSES), gradients=False)
    with pytest.raises(UsageError, match=r"b: reads 12 samples for a batch of 2"):
        case(Folded())


def test_frozen_groups_have_no_taps_and_columns_are_named() -> None:
    c = common(Mixed)
    modules = dict(c.model.named_modules())
    (tap,) = taps(c.groups, modules)
    assert (tap.columns("a"), tap.columns("b")) == (slice(0, 5), slice(5, 11))
    with pytest.raises(InternalError, match="does not reach head"):
        tap.columns("c")
    (tap,) = taps(c.groups.freeze({"a": "for the test"}), modules)
    assert tap.columns("b") == slice(0, 6)

"""Taylor and Fisher terms at the taps against plain autograd and numeric differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tapped_nets import ALL, CLASSES, Case, Flat, TwoReaders, case, common, groups_of
from torch import Tensor, nn
from torch.nn import functional as F

from xedge.observe import observe
from xedge.teacher import Teacher


def slopes(c: Case, layer: str, index: NDArray[np.int64], step: float = 1e-5) -> Tensor:
    """d (cross-entropy of each image) / d (a scale on what the layer reads of each channel), [C, N], numerically."""
    module = c.model.get_submodule(layer)
    last = isinstance(module, nn.Linear)
    count = len(index)

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].unflatten(0, (2, count, -1))  # up and down, channel, image
        gain = torch.ones(2, count, x.shape[-1 if last else 3], dtype=torch.float64)
        for channel, positions in enumerate(index):
            gain[0, channel, positions] += step
            gain[1, channel, positions] -= step
        shape = [2, count, *(1,) * (x.dim() - 2)]
        shape[-1 if last else 3] = gain.shape[2]
        return ((x * gain.view(shape)).flatten(0, 2),)

    handle = module.register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = c.model(c.x.repeat(2 * count, 1, 1, 1))
    handle.remove()
    loss = F.cross_entropy(logits, c.labels.repeat(2 * count), reduction="none").view(2, count, -1)
    return (loss[0] - loss[1]) / (2 * step)


def check_taylor(c: Case) -> None:
    """T_i = E (d loss / d scale of channel i as the consumer reads it)^2, by central differences."""
    for layer, seen in c.observed.seen.items():
        for group, index in seen.tap.blocks.items():
            want = slopes(c, layer, index).square().mean(1).numpy()
            np.testing.assert_allclose(seen.taylor[seen.tap.columns(group)], want, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("make", ALL)
def test_taylor_is_the_derivative_by_the_channels_scale(make: Callable[[], nn.Module]) -> None:
    check_taylor(common(make))


@pytest.mark.parametrize("make", ALL)
def test_fisher_is_the_mean_squared_gradient_at_the_outputs(make: Callable[[], nn.Module]) -> None:
    c = common(make)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        log_p = torch.log_softmax(c.model(c.x), 1)
    own = torch.cat([torch.multinomial(part.exp(), 1, generator=draw)[:, 0] for part in log_p.split([2, 4])])
    for layer, seen in c.observed.seen.items():
        module = c.model.get_submodule(layer)
        noise: list[Tensor] = []

        def hook(_m: nn.Module, _a: object, out: Tensor, noise: list[Tensor] = noise) -> Tensor:
            noise.append(torch.zeros_like(out, requires_grad=True))
            return out + noise[-1]

        handle = module.register_forward_hook(hook)
        loss = F.cross_entropy(c.model(c.x), own, reduction="sum")
        handle.remove()
        total = torch.zeros(len(seen.fisher), dtype=torch.float64)
        for g in torch.autograd.grad(loss, noise):
            g = g.movedim(-1, 1) if isinstance(module, nn.Linear) and g.dim() > 2 else g
            total += g.square().sum((0, *range(2, g.dim())))
        np.testing.assert_allclose(seen.fisher, (total / len(c.x)).numpy(), rtol=1e-9)
        assert (seen.fisher > 0).all()


def test_fisher_and_taylor_against_finite_differences_of_a_linear_layer(seed: int) -> None:
    """The hidden unit of a two-layer net: everything by numeric differences of the log-likelihood."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    c = case(net, (3, 2, 2), n=3)
    seen = c.tap("3")
    head = c.model.get_submodule("3")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        hidden = c.model[:3](c.x)  # type: ignore[operator]
        logits = head(hidden)
    draw = torch.Generator().manual_seed(0)
    p = logits.softmax(1)
    own = torch.cat([torch.multinomial(part, 1, generator=draw)[:, 0] for part in p.split([2, 1])])
    # d(-log p_y)/d logit_o = p_o - [o = y]
    error = p - F.one_hot(own, CLASSES)
    np.testing.assert_allclose(seen.fisher, error.square().mean(0).numpy(), rtol=1e-10)
    taught = (p - F.one_hot(c.labels, CLASSES)) @ head.weight.detach()
    np.testing.assert_allclose(seen.taylor, (hidden * taught).square().mean(0).numpy(), rtol=1e-10)


def test_a_tensor_read_by_two_layers_gives_each_its_own_gradient() -> None:
    c = common(TwoReaders)
    left, right = c.tap("left"), c.tap("right")
    assert [s.tap.layer for s, _ in c.observed.of(c.groups["a"])] == ["left", "right"]
    assert not np.allclose(left.taylor, right.taylor)
    np.testing.assert_allclose(left.pooled.scatter(), right.pooled.scatter())


class InPlace(nn.Module):
    """An activation in place, straight after a layer that is a tap."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(inplace), nn.Conv2d(6, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, CLASSES, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))  # type: ignore[no-any-return]


def test_activations_in_place_change_nothing(seed: int) -> None:
    seen = []
    for inplace in (False, True):
        torch.manual_seed(seed)
        seen.append(case(InPlace(inplace)).observed.seen)
    for layer in seen[0]:
        np.testing.assert_array_equal(seen[0][layer].fisher, seen[1][layer].fisher)
        np.testing.assert_array_equal(seen[0][layer].taylor, seen[1][layer].taylor)
        np.testing.assert_array_equal(seen[0][layer].pixels.scatter(), seen[1][layer].pixels.scatter())


class Keyword(nn.Module):
    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.a, self.b, self.keyword = nn.Conv2d(3, 6, 3), nn.Linear(6, CLASSES), keyword

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh().mean((2, 3))
        return self.b(input=x) if self.keyword else self.b(x)  # type: ignore[no-any-return]


def test_an_input_given_by_keyword(seed: int) -> None:
    seen = []
    for keyword in (False, True):
        torch.manual_seed(seed)
        seen.append(case(Keyword(keyword)).tap("b"))
    np.testing.assert_array_equal(seen[0].taylor, seen[1].taylor)
    np.testing.assert_array_equal(seen[0].pooled.scatter(), seen[1].pooled.scatter())


def test_labels_do_not_matter_when_the_logits_teach() -> None:
    model = Flat().eval()
    groups = groups_of(model, (3, 8, 8))
    x = torch.randn(5, 3, 8, 8)
    found = [
        observe(model, groups, [(x, torch.full((5,), label))], Teacher("logits", CLASSES), gradients=True, seed=3)
        for label in (-1, 2)
    ]
    for layer, seen in found[0].seen.items():
        np.testing.assert_array_equal(seen.taylor, found[1].seen[layer].taylor)
        assert (seen.taylor > 0).any()
    with torch.no_grad():
        logits = model(x).double().numpy()
    cross = found[0].seen["head"].pooled
    np.testing.assert_allclose(cross.teacher_total, logits.sum(0), rtol=1e-5)


@pytest.mark.parametrize("make", ALL)
def test_one_backward_pass_or_two_feel_the_same(make: Callable[[], nn.Module]) -> None:
    """When the logits teach, the label drawn serves Taylor and Fisher terms alike; Fisher's are those of two passes."""
    c = common(make)
    batches = [(c.x[:2], c.labels[:2]), (c.x[2:], c.labels[2:])]
    one = observe(c.model, c.groups, batches, Teacher("logits", CLASSES), gradients=True)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        p = c.model(c.x).softmax(1)
    own = torch.cat([torch.multinomial(part, 1, generator=draw)[:, 0] for part in p.split([2, 4])])
    drawn = [(c.x[:2], own[:2]), (c.x[2:], own[2:])]
    two = observe(c.model, c.groups, drawn, Teacher("labels", CLASSES), gradients=True)
    for layer, seen in one.seen.items():
        np.testing.assert_allclose(seen.fisher, c.tap(layer).fisher, rtol=1e-9)
        np.testing.assert_allclose(seen.taylor, two.seen[layer].taylor, rtol=1e-9)


def test_gradients_of_a_part_are_means_over_that_part() -> None:
    c = common(Flat)
    teacher = Teacher("labels", CLASSES)
    batches = [(c.x[i : i + 2], c.labels[i : i + 2]) for i in (0, 2, 4)]
    part = observe(c.model, c.groups, batches, teacher, gradients=True, felt=3)  # two batches have at least three
    first = observe(c.model, c.groups, batches[:2], teacher, gradients=True)
    for layer, seen in part.seen.items():
        np.testing.assert_allclose(seen.taylor, first.seen[layer].taylor)
        np.testing.assert_allclose(seen.fisher, first.seen[layer].fisher)
        assert seen.pooled.count == 6  # moments are of all
    assert part.samples == 6


def test_frozen_parameters_are_observed_like_others(seed: int) -> None:
    torch.manual_seed(seed)
    free = case(Flat())
    torch.manual_seed(seed)
    still = Flat()
    for p in still.parameters():
        p.requires_grad_(False)
    fixed = case(still)
    for layer, seen in free.observed.seen.items():
        np.testing.assert_allclose(seen.taylor, fixed.tap(layer).taylor)
        np.testing.assert_allclose(seen.fisher, fixed.tap(layer).fisher)

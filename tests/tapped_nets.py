"""Small nets with taps of every kind, and what `observe` sees of each in two batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xedge.channels import Groups
from xedge.groups import find_groups
from xedge.observe import Observed, Seen, observe
from xedge.teacher import Teacher

CLASSES = 4


@dataclass(frozen=True)
class Case:
    """A model in float64, its groups, images, labels and what was observed in two batches."""

    model: nn.Module
    groups: Groups
    x: Tensor
    labels: Tensor
    observed: Observed

    def tap(self, layer: str) -> Seen:
        return self.observed.seen[layer]


KNOWN: dict[tuple[type[nn.Module], tuple[int, ...]], Groups] = {}


def groups_of(model: nn.Module, shape: tuple[int, ...]) -> Groups:
    """Found once for each class: tracing takes longer than everything else here."""
    key = (type(model), shape)
    if key not in KNOWN:
        KNOWN[key] = find_groups(model.eval(), torch.zeros(1, *shape))
    return KNOWN[key]


def case(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8), *, gradients: bool = True, n: int = 6) -> Case:
    groups = groups_of(model, shape)
    model = model.eval().double()
    x = torch.randn(n, *shape, dtype=torch.float64)
    labels = torch.arange(n) % CLASSES
    batches = [(x[:2], labels[:2]), (x[2:], labels[2:])]
    return Case(
        model, groups, x, labels, observe(model, groups, batches, Teacher("labels", CLASSES), gradients=gradients)
    )


@functools.cache
def common(make: Callable[[], nn.Module]) -> Case:
    """One case of each class for the tests that only read it."""
    torch.manual_seed(0)
    return case(make())


class Flat(nn.Module):
    """Two convolutions and a flatten of 2 x 2: every channel feeds four features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3)
        self.pool, self.fc, self.head = nn.MaxPool2d(2), nn.Linear(24, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.softplus(self.b(F.softplus(self.a(x)))))
        return self.head(F.softplus(self.fc(x.flatten(1))))


class TwoReaders(nn.Module):
    """Two layers read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.left, self.right = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        return self.head(torch.cat([self.left(x).tanh().mean((2, 3)), self.right(x).tanh().mean((2, 3))], 1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2)
        self.c, self.d = nn.ConvTranspose2d(6, 8, 2, groups=2), nn.ConvTranspose2d(8, 5, 3, 2)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh()).tanh()
        return self.head(self.d(self.c(x).tanh()).tanh().mean((2, 3)))


class Mixed(nn.Module):
    """A linear layer reads a flattened map (four features a channel) next to pooled channels (one feature each)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(26, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        flat = F.avg_pool2d(self.a(x).tanh(), 4).flatten(1)
        return self.head(torch.cat([flat, self.b(x).tanh().mean((2, 3))], 1))


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3, padding=1), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.b(self.a(x).tanh()).tanh()).mean((2, 3)))


class ChannelsLast(nn.Module):
    """Linear layers on [N, H, W, C] and on [N, T, C], as ConvNeXt and mixers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 9), nn.Linear(9, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).permute(0, 2, 3, 1)).tanh()
        return self.head(self.c(x.flatten(1, 2)).tanh()).mean(1)


ALL: list[Callable[[], nn.Module]] = [Flat, TwoReaders, Grouped, Mixed, Twice, ChannelsLast]

"""Labels: one integer for each channel that can be told apart, and the union-find that ties them together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Labels:
    """A union-find over int64 labels, in whole arrays; and the labels that cannot be cut, with the reason."""

    def __init__(self) -> None:
        self._parent: Ints = np.arange(1024, dtype=np.int64)
        self._used = 0
        self.frozen: list[tuple[Ints, str]] = []

    def fresh(self, count: int) -> Ints:
        """`count` labels that nothing else has."""
        while self._used + count > len(self._parent):
            more = np.arange(len(self._parent), 2 * len(self._parent), dtype=np.int64)
            self._parent = np.concatenate([self._parent, more])
        self._used += count
        return np.arange(self._used - count, self._used, dtype=np.int64)

    def find(self, labels: Ints) -> Ints:
        """The representative of each label: the smallest of its class, so the order of creation is kept."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[labels] = roots
        return roots

    def unite(self, first: Ints, second: Ints) -> None:
        """Put each pair (broadcast) into one class."""
        a, b = (side.ravel() for side in np.broadcast_arrays(first, second))
        while True:
            a, b = self.find(a), self.find(b)
            differs = a != b
            if not differs.any():
                return
            a, b = a[differs], b[differs]
            # Hooking a root to the smallest of its partners may drop other pairs of this round: they come again.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def freeze(self, labels: Ints, reason: str) -> None:
        self.frozen.append((np.unique(labels), reason))

    def frozen_roots(self) -> dict[int, str]:
        """Representative of each frozen class -> the first reason given."""
        reasons: dict[int, str] = {}
        for labels, reason in self.frozen:
            for root in self.find(labels).tolist():
                reasons.setdefault(root, reason)
        return reasons


@dataclass(frozen=True)
class Par:
    """A parameter or buffer of the model, not yet touched by any operation."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Act:
    """The labels of a tensor's elements.

    Attributes:
        core: int64 labels, of size 1 along each dimension where they do not vary.
        shape: of the tensor itself; ``core.expand(shape)`` has one label for each element.
        constant: it comes from parameters alone. Only these may vary along several dimensions: for an activation
            the channels kept must stay a box after every reshape, so all but one varying dimension are tied.
    """

    core: Tensor
    shape: tuple[int, ...]
    constant: bool = False

    @property
    def full(self) -> Tensor:
        return self.core.expand(self.shape)

    @property
    def flat(self) -> Ints:
        return array(self.core)


def array(labels: Tensor) -> Ints:
    return np.asarray(labels.contiguous().numpy().ravel(), np.int64)


def shrink(labels: Tensor) -> Tensor:
    """`labels` with every dimension along which they do not vary cut to size 1."""
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1:
            head = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == head).all()):
                labels = head
    return labels


def collapse(table: Labels, labels: Tensor) -> Tensor:
    """`labels` replaced by their representatives, with every dimension along which they do not vary cut to size 1."""
    labels = shrink(labels)
    roots = torch.from_numpy(table.find(array(labels))).reshape(labels.shape)
    return shrink(roots)


def varying(core: Tensor) -> list[int]:
    return [dim for dim, size in enumerate(core.shape) if size > 1]

"""Data: three splits with one job each, and how batches are taken from them.

- ``train`` is what xedge trains on, ranks channels on and calibrates ranges on.
- ``select`` is a seeded, stratified part of the training data, held back from all of that, for choosing: the
  accuracy floor, allocations, early stopping.
- ``val`` is the official test split and is read for the report alone.

A data set of a user's own is a callable that returns `Data`; its three splits may be any sized torch Dataset of
(float32 [C, H, W], int label), or of (input, truth), two pictures, where `Data.scale` is set. The files under
``calibration/`` are written with the helpers of this module.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from xedge.augment import Augment, PairAugment
from xedge.errors import UsageError, nearest

Batch = tuple[Tensor, Tensor]
"""Images float32 [N, C, H, W], and labels int64 [N] (-1 where there is none) or, where the data restore, the true
pictures float32 [N, C', scale * H, scale * W]."""

UNLABELLED = -1
DENSE = 4
"""So many fewer pictures are looked at, and fit into memory, than images of classes."""


class Images(Protocol):
    """A sized, indexable set of (float32 [C, H, W], label or true picture). A `batch(indices) -> Batch` method, where
    there is one, is used instead of one call per image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Picture:
    """A held-out picture, whole.

    Attributes:
        name: of its file, without the folder.
        make: reads it: input uint8 [h, w, 3] and truth uint8 [scale * h, scale * w, 3].
    """

    name: str
    make: Callable[[], tuple[NDArray[np.uint8], NDArray[np.uint8]]]

    def load(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Input and truth, read anew at each call."""
        return self.make()


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set, split by purpose (see the module's text).

    Attributes:
        name: for reports.
        train, select, val: disjoint sets of (float32 [C, H, W], int label); label -1 when unlabelled. With a `scale`,
            of (input, truth), both on the scale 0..1.
        classes: number of classes; None means unlabelled: the teacher is then the original's logits.
        class_names: `classes` names, or empty.
        superclasses: for each class the index of the coarse class it belongs to, or empty.
        shape: (C, H, W) of every image.
        augment: for training batches, or None.
        augment_pairs: the same for data that restore: it changes input and truth together.
        scale: None for classification. Otherwise the data restore pictures: the truth [C', scale * H, scale * W] is
            so many times larger than the input (1 for denoising and deblocking), and `classes` is None.
        pictures: for data that restore, the held-out pictures whole; for reports and benchmarks alone.
        mean, std: per channel, as subtracted and divided on the scale 0..1; empty when the images come normalised.
        source: the folder, file or package the images were read from.
        notes: facts about the splits that a reader of the report should know.
    """

    name: str
    train: Images
    select: Images
    val: Images
    classes: int | None
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()
    superclasses: tuple[int, ...] = ()
    augment: Augment | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()
    scale: int | None = None
    augment_pairs: PairAugment | None = None
    pictures: tuple[Picture, ...] = ()

    @property
    def restores(self) -> bool:
        """Whether an item is (input, truth), two pictures."""
        return self.scale is not None

    def augmented(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Batch:
        """A training batch, changed at random as these data want it."""
        if self.augment_pairs is not None:
            return self.augment_pairs(x, y, generator)
        return (x if self.augment is None else self.augment(x, generator)), y

    def __post_init__(self) -> None:
        if self.scale is not None and (self.scale < 1 or self.classes is not None):
            raise UsageError(
                f"scale {self.scale} with classes {self.classes}",
                where=self.name,
                fix="set scale 1 or more, or classes",
            )
        for split in ("train", "select", "val"):
            if len(getattr(self, split)) == 0:
                raise UsageError(f"the {split} split is empty", where=self.name, fix="give more images")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise UsageError(f"shape {self.shape} is not (channels, height, width)", where=self.name)
        if self.classes is not None and self.class_names and len(self.class_names) != self.classes:
            raise UsageError(f"{len(self.class_names)} class names for {self.classes} classes", where=self.name)
        if self.superclasses and len(self.superclasses) != self.classes:
            raise UsageError(f"{len(self.superclasses)} superclasses for {self.classes} classes", where=self.name)


def check(data: Data) -> Data:
    """Look at the first image of each split, so that a user's own data fails here and not an hour later.

    Raises:
        UsageError: the wrong shape or dtype, a value that is not finite, or a label outside the classes.
    """
    for split in ("train", "select", "val"):
        where = f"{data.name}, {split}[0]"
        x, y = take(cast(Images, getattr(data, split)), [0])
        if tuple(x.shape[1:]) != tuple(data.shape):
            raise UsageError(f"the image is {tuple(x.shape[1:])} and Data.shape is {tuple(data.shape)}", where=where)
        if x.dtype != torch.float32:
            raise UsageError(f"the image is {x.dtype}, not float32", where=where, fix="convert and normalise it")
        if not bool(torch.isfinite(x).all()):
            raise UsageError("the image holds NaN or infinity", where=where, fix="check the normalisation")
        if data.scale is not None:
            _check_truth(x, y, data.scale, where)
            continue
        label = int(y[0])
        if label != UNLABELLED and data.classes is None:
            raise UsageError(
                f"the label is {label} though classes is None", where=where, fix="set classes, or label -1"
            )
        if data.classes is not None and not 0 <= label < data.classes:
            raise UsageError(f"the label is {label}, not 0..{data.classes - 1}", where=where, fix="check the labels")
    return data


def _check_truth(x: Tensor, y: Tensor, scale: int, where: str) -> None:
    wanted = (scale * x.shape[2], scale * x.shape[3])
    if y.dim() != 4 or tuple(y.shape[2:]) != wanted or y.dtype != torch.float32:
        raise UsageError(
            f"the true picture is {y.dtype} {tuple(y.shape[1:])}, not float32 [C, {wanted[0]}, {wanted[1]}]",
            where=where,
        )
    if not bool(torch.isfinite(y).all()) or float(y.min()) < 0 or float(y.max()) > 1:
        raise UsageError("the true picture leaves 0..1", where=where, fix="divide it by 255, without normalisation")


class Tensors(Dataset[tuple[Tensor, int]]):
    """Images held in memory, normalised when they are read.

    Args:
        images: uint8 or float32 [N, C, H, W]. uint8 is read as x / 255.
        labels: int64 [N], or None when unlabelled.
        mean, std: per channel; an image is read as (x - mean) / std.
        index: int64 [M], the rows of `images` that this set shows; the memory is shared, not copied.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        index: Tensor | None = None,
    ) -> None:
        channels = images.shape[1]
        shift = torch.tensor(mean or [0.0] * channels, dtype=torch.float64)
        spread = torch.tensor(std or [1.0] * channels, dtype=torch.float64)
        self._images = images
        self._labels = torch.full((len(images),), UNLABELLED) if labels is None else labels.to(torch.int64)
        self._index = torch.arange(len(images)) if index is None else index
        # x * scale + offset, with the division by 255 folded in
        peak = 255.0 if images.dtype == torch.uint8 else 1.0
        self._plain = images.dtype == torch.float32 and not mean and not std
        self._scale = (1.0 / (peak * spread)).float().view(-1, 1, 1)
        self._offset = (-shift / spread).float().view(-1, 1, 1)

    @property
    def labels(self) -> Tensor:
        """int64 [M]."""
        return self._labels[self._index]

    def subset(self, index: Tensor) -> Tensors:
        """The images at the positions `index` (int64 [K]) of this set, sharing its memory."""
        other = Tensors.__new__(Tensors)
        other.__dict__.update(self.__dict__)
        other._index = self._index[index]
        return other

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """All of `indices` at once."""
        rows = self._index[torch.as_tensor(indices, dtype=torch.int64)]
        x = self._images[rows]
        if not self._plain:
            x = x.to(torch.float32).mul_(self._scale).add_(self._offset)
        return x, self._labels[rows]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.batch([index])
        return x[0], int(y[0])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        x, y = self.batch(indices)
        return list(zip(x.unbind(), y.tolist(), strict=True))


# -- batches ---------------------------------------------------------------------------------------------------------


def take(dataset: Images, indices: Sequence[int] | Tensor) -> Batch:
    """The images at `indices` as one batch, by the data set's own `batch` where it has one."""
    whole = getattr(dataset, "batch", None)
    if whole is not None:
        return cast(Batch, whole(indices))
    pairs = [dataset[int(i)] for i in indices]
    if isinstance(pairs[0][1], Tensor) and pairs[0][1].dim() == 3:
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
    return torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs], dtype=torch.int64)


def batches(
    dataset: Images, batch_size: int, *, shuffle_seed: int | None = None, limit: int | None = None
) -> Iterator[Batch]:
    """Every image once, in order or in the order of `shuffle_seed`; the last batch may be smaller.

    Args:
        limit: stop after so many images. Without a shuffle they are spread evenly over the set, because folders are
            sorted by class and the first ones would all be of one class.
    """
    n = len(dataset)
    count = n if limit is None else min(limit, n)
    if shuffle_seed is None:
        rows = spread(n, count)
    else:
        rows = permutation(n, shuffle_seed, "batches")[:count]
    for start in range(0, count, batch_size):
        yield take(dataset, rows[start : start + batch_size])


def spread(n: int, count: int) -> Tensor:
    """The `count` positions of n, evenly spread, that `batches` takes under a limit; int64 [count]."""
    return torch.arange(count) * n // max(count, 1)


def fitting(shape: Sequence[int], most: int = 128, *, gradients: bool = False) -> int:
    """Images at a time, so that a pass over large pictures stays within about a gigabyte.

    An image of 224 x 224 through a mobile net holds about 150 MB while gradients are wanted, and 60 MB without.
    """
    pixels = 224 * 224 * (6 if gradients else 16)
    return max(1, min(most, pixels // max(1, shape[-1] * shape[-2])))


def pictured(images: Images) -> bool:
    """Whether an item is (input, truth), two pictures."""
    truth = images[0][1]
    return isinstance(truth, Tensor) and truth.dim() == 3


def at_once(images: Images, *, gradients: bool = False) -> int:
    """`fitting` for a set: nets that give pictures have wide maps of the output's size to the end."""
    x, y = images[0]
    return (
        max(1, fitting(y.shape, gradients=gradients) // DENSE)
        if pictured(images)
        else fitting(x.shape, gradients=gradients)
    )


def enough(images: Images, count: int) -> int:
    """As many pictures of a set as say what so many images of classes do: every pixel of theirs is an answer."""
    return max(1, count // DENSE) if pictured(images) else count


class _Whole(Dataset[Batch]):
    """Gives a DataLoader whole batches, so that nothing is collated image by image."""

    def __init__(self, dataset: Images) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        return take(self.dataset, [index])

    def __getitems__(self, indices: list[int]) -> Batch:
        return take(self.dataset, indices)


def _as_is(batch: Any) -> Any:
    return batch


def loader(dataset: Images, batch_size: int, seed: int, epoch: int, *, workers: int = 0) -> DataLoader[Batch]:
    """Shuffled training batches of one epoch; the same (seed, epoch) gives the same batches everywhere.

    A last batch of a single image is left out, because batch norm over one value cannot train. The global random
    state is neither read nor changed. Accelerate can shard it: the batch sampler is torch's own.
    """
    order = permutation(len(dataset), seed, "loader", epoch).tolist()
    if len(order) > 1 and len(order) % batch_size == 1:
        order.pop()
    return DataLoader(
        _Whole(dataset),
        batch_sampler=BatchSampler(order, batch_size, drop_last=False),
        collate_fn=_as_is,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )


# -- splits ----------------------------------------------------------------------------------------------------------


def permutation(n: int, seed: int, purpose: str, epoch: int = 0) -> Tensor:
    """A permutation, int64 [n], of 0..n-1 that is the same on every machine and for every version of numpy.

    It sorts the raw stream of a Philox generator, which numpy freezes; its `permutation` method is not frozen
    (NEP 19). Different purposes are independent of each other.
    """
    key = np.random.SeedSequence([seed & (2**63 - 1), zlib.crc32(purpose.encode()), epoch])
    return torch.from_numpy(np.argsort(np.random.Philox(key).random_raw(n), kind="stable").astype(np.int64))


def split(labels: Tensor, count: int, seed: int, purpose: str, *, cover: bool = True) -> tuple[Tensor, Tensor]:
    """Take about `count` images out of a set, each class in proportion (largest remainders).

    Args:
        labels: int64 [N]; a set with all labels equal is split at random.
        cover: take at least one and leave at least one of each class (a class of one image is left whole); without
            it exactly `count` are taken.

    Returns:
        (rest, part): int64 positions, each sorted; together they are 0..N-1.
    """
    order = permutation(len(labels), seed, purpose)
    n = len(labels)
    count = min(count, n)
    values, sizes = torch.unique(labels, return_counts=True)
    quota = sizes.double() * (count / max(n, 1))
    take_of = quota.floor().long()
    missing = count - int(take_of.sum())
    # equal remainders are decided by the seed, not by the order of the classes
    shuffled = permutation(len(values), seed, purpose + " classes")
    by_remainder = shuffled[torch.sort((quota - take_of)[shuffled], descending=True, stable=True).indices]
    take_of[by_remainder[:missing]] += 1
    if cover:
        take_of = torch.minimum(take_of.clamp(min=1), sizes - 1)
    taken = torch.zeros(n, dtype=torch.bool)
    shown = labels[order]
    for value, k in zip(values.tolist(), take_of.tolist(), strict=True):
        taken[order[shown == value][:k]] = True
    return torch.nonzero(~taken).flatten(), torch.nonzero(taken).flatten()


def from_tensors(
    name: str,
    train: tuple[Tensor, Tensor | None],
    val: tuple[Tensor, Tensor | None],
    *,
    seed: int,
    classes: int | None,
    class_names: tuple[str, ...] = (),
    superclasses: tuple[int, ...] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    augment: Augment | None = None,
    source: str = "",
    notes: tuple[str, ...] = (),
    select: float = 0.1,
    limit: int | None = None,
) -> Data:
    """Data from an official training and test split held in memory (uint8 or float32 [N, C, H, W], int64 [N]).

    Args:
        select: the fraction of the training split held back for choosing.
        limit: use at most so many images of each official split, every class in proportion.
    """
    sets = [Tensors(x, y, mean=mean, std=std) for x, y in (train, val)]
    if limit is not None:
        sets = [s.subset(split(s.labels, limit, seed, "limit", cover=False)[1]) for s in sets]
        notes = (*notes, f"limited to {limit} images of each official split")
    rest, part = split(sets[0].labels, round(select * len(sets[0])), seed, "select")
    return Data(
        name=name,
        train=sets[0].subset(rest),
        select=sets[0].subset(part),
        val=sets[1],
        classes=classes,
        class_names=class_names,
        superclasses=superclasses,
        shape=(train[0].shape[1], train[0].shape[2], train[0].shape[3]),
        augment=augment,
        mean=tuple(mean),
        std=tuple(std),
        source=source,
        notes=notes,
    )


# -- what the files under calibration/ share -------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The options of a data spec, ``name:PATH?key=value&key=value``, checked as they are read.

    Raises:
        UsageError: an option that is not known, or a value out of range.
    """

    where: str
    values: Mapping[str, str]

    @staticmethod
    def of(where: str, values: Mapping[str, str], known: Iterable[str]) -> Options:
        names = tuple(known)
        for key in values:
            if key not in names:
                raise UsageError(f"unknown option {key!r}", where=where, fix=nearest(key, names))
        return Options(where, values)

    def _bad(self, key: str, what: str) -> UsageError:
        return UsageError(f"{key}={self.values[key]!r} is not {what}", where=self.where, fix="check the option")

    def integer(self, key: str, *, low: int = 1, high: int = 2**31) -> int | None:
        """A whole number in low..high, or None when the option is not given."""
        if key not in self.values:
            return None
        try:
            value = int(self.values[key])
        except ValueError:
            raise self._bad(key, "a whole number") from None
        if not low <= value <= high:
            raise self._bad(key, f"between {low} and {high}")
        return value

    def fraction(self, key: str, default: float) -> float:
        """A number above 0 and below 1."""
        try:
            value = float(self.values.get(key, default))
        except ValueError:
            raise self._bad(key, "a number") from None
        if not 0.0 < value < 1.0:
            raise self._bad(key, "above 0 and below 1")
        return value

    def numbers(self, key: str, *, count: int, positive: bool = False) -> tuple[float, ...] | None:
        """`count` numbers with commas between them (one stands for all), or None when the option is not given."""
        if key not in self.values:
            return None
        try:
            found = tuple(float(v) for v in self.values[key].split(","))
        except ValueError:
            raise self._bad(key, "numbers with commas between them") from None
        if len(found) == 1:
            found *= count
        if len(found) != count or not np.isfinite(found).all() or (positive and min(found) <= 0):
            raise self._bad(key, f"{count} {'positive ' if positive else ''}numbers with commas between them")
        return found

    def choice(self, key: str, default: str, known: Iterable[str]) -> str:
        """One of the known words."""
        value = self.values.get(key, default)
        if value not in (names := tuple(known)):
            raise UsageError(f"unknown {key} {value!r}", where=self.where, fix=nearest(value, names))
        return value


def as_tensor(array: NDArray[np.generic]) -> Tensor:
    """A numpy array as a tensor, copied when it is read-only."""
    return torch.from_numpy(np.array(array) if not array.flags.writeable else array)


def cache_folder() -> Path:
    """Where downloads go when there is no --data-root: $XDG_CACHE_HOME/xedge, or ~/.cache/xedge."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "xedge"


def fetch(urls: Sequence[str], to: Path, *, md5: str, fix: str, timeout: float = 20.0) -> Path:
    """Download a file from the first of its mirrors that answers, check its digest, and put it at `to` in one move.

    Nothing is unpacked or executed. `md5` is the one that the data's publisher states.

    Raises:
        UsageError: no mirror answers, or what came is another file; `fix` says what else the user can do.
    """
    reason = "no mirror"
    for url in urls:
        part = to.with_name(f".{to.name}.{os.getpid()}.part")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.md5(usedforsecurity=False)
            with urllib.request.urlopen(url, timeout=timeout) as answer, part.open("wb") as out:
                while chunk := answer.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
            if digest.hexdigest() == md5:
                part.replace(to)
                return to
            reason = f"{url} sent another file (md5 {digest.hexdigest()}, not {md5})"
        except (OSError, urllib.error.URLError, ValueError) as e:
            reason = f"{url}: {getattr(e, 'reason', e)}"
        finally:
            part.unlink(missing_ok=True)
    raise UsageError(f"is not here and cannot be downloaded ({reason})", where=to.name, fix=fix)

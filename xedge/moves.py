"""Rules for operations that move channels or combine them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from xedge.labels import MOST_ELEMENTS, Act, Ints, Labelling, Par, collapse, modules_of, shape_of, varying


class Moves(Labelling):
    """Data movement is the same operation run on the labels; element-wise operations unite what they combine."""

    def _move(
        self, node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], bound: dict[str, Any]
    ) -> Any:
        acts = self._acts((args, kwargs))
        constant = all(act.constant for act in acts)

        def labels(value: Any) -> Any:
            if isinstance(value, (Act, Par)):
                act = self._act(value)
                return collapse(self.labels, act.core).expand(act.shape)
            if isinstance(value, (list, tuple)):
                return [labels(item) for item in value]
            return value

        if name in ("view", "_unsafe_view"):  # labels have other strides than the tensor, so a view may need a copy
            result = labels(bound["self"]).reshape(bound.get("size", shape_of(node)))
        else:
            result = cast(Any, node.target)(*[labels(a) for a in args], **{k: labels(v) for k, v in kwargs.items()})
        many = isinstance(result, (list, tuple))
        outs = [self._settle(part, constant) for part in (result if many else [result])]
        if many and name not in ("unbind",):
            outs = self._tie_chunks(node, bound, acts[0], outs)
        self._count_sizes(node, name, bound, acts, outs)
        return outs if many else outs[0]

    def _tie_chunks(self, node: fx.Node, bound: dict[str, Any], source: Act, outs: list[Act]) -> list[Act]:
        """Equal chunks of the channels must stay equal: position j of each goes with position j of the others.

        `chunk` and `split(size)` have one number for all chunks, so that nothing else can be said in the code.
        """
        dim = bound.get("dim") or 0
        sizes = {out.shape[dim] for out in outs}
        if len(outs) < 2 or dim % len(source.shape) not in varying(source.core):
            return outs
        if len(sizes) > 1:
            if not isinstance(bound.get("split_sizes", bound.get("split_size")), (list, tuple)):
                self._freeze(source, f"uneven chunks at {modules_of(node)[0]}")
            return outs
        vectors = [self._vector(out, dim) for out in outs]
        for vector in vectors[1:]:
            if vectors[0] is not None and vector is not None:
                self._unite_chunks(vectors[0], vector)
        return [self._settle(out.full, out.constant) for out in outs]

    def _unite_chunks(self, first: Ints, other: Ints) -> None:
        self.labels.unite(first, other)

    def _count_sizes(self, node: fx.Node, name: str, bound: dict[str, Any], acts: list[Act], outs: list[Act]) -> None:
        sizes = bound.get("size", bound.get("shape", bound.get("sizes")))
        if name in ("view", "reshape", "_unsafe_view", "expand", "unflatten") and isinstance(sizes, (list, tuple)):
            offset = (bound["dim"] % len(acts[0].shape)) if name == "unflatten" else len(outs[0].shape) - len(sizes)
            for item, size in enumerate(sizes):
                if isinstance(size, int) and size > 1 and item + offset in varying(outs[0].core):
                    self._count(node, size, outs[0].core, item + offset, item=item, length=len(sizes))
        elif "split" in name or "chunk" in name:
            dim = bound.get("dim") or 0
            split = bound.get("split_sizes", bound.get("split_size"))
            if isinstance(split, (list, tuple)):
                for item, (size, out) in enumerate(zip(split, outs, strict=True)):
                    self._count(node, size, out.full, dim, item=item, length=len(split))
            elif isinstance(split, int):
                self._count(node, split, outs[0].full, dim)
                self._count(node, acts[0].shape[dim], acts[0].full, dim)  # the forward may halve an attribute
        elif name in ("slice", "narrow"):
            dim, length = bound.get("dim") or 0, acts[0].shape[bound.get("dim") or 0]
            start = bound.get("start") or 0
            end = start + bound["length"] if name == "narrow" else bound.get("end")
            for bound_at in (start, end):
                if isinstance(bound_at, int) and -length < bound_at < length and bound_at != 0:
                    head = acts[0].full.narrow(dim, 0, bound_at % length)
                    self._count(node, bound_at, head, dim)
            if name == "narrow":
                self._count(node, bound["length"], outs[0].full, dim)

    def _pointwise(self, acts: list[Act], shape: Sequence[int]) -> Act:
        """Unite what is combined element by element, with broadcasting."""
        n = len(shape)
        cores = [collapse(self.labels, a.core).reshape((1,) * (n - a.core.ndim) + tuple(a.core.shape)) for a in acts]
        sizes = [(1,) * (n - len(a.shape)) + a.shape for a in acts]
        moving = {dim for core in cores for dim in varying(core)}
        whole: list[int] = []
        for i, size in enumerate(sizes):
            if any(size[dim] == 1 and shape[dim] > 1 for dim in moving):
                # One channel that meets many (a spatial gate): it can stay while any of the many goes.
                self._freeze(acts[i], "one channel that is spread over many")
            else:
                whole.append(i)
        if not whole:
            return self._frozen(shape, "outer product of channels")
        whole.sort(key=lambda i: acts[i].constant)
        base = cores[whole[0]]
        for i in whole[1:]:
            self._unite_elements(base, cores[i])
            base = base.expand([max(pair) for pair in zip(base.shape, cores[i].shape, strict=True)])
        constant = all(act.constant for act in acts)
        return self._settle(base.expand(tuple(shape)), constant)

    def _unite_elements(self, first: Tensor, second: Tensor) -> None:
        self.labels.unite(first.numpy(), second.numpy())

    def _same(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        act = self._act(self._tensors(bound)[0])
        return self._outputs(node, lambda value: act)

    def _create(self, node: fx.Node, bound: dict[str, Any]) -> Act:
        shape = shape_of(node)
        if np.prod(shape) > MOST_ELEMENTS:
            return self._frozen(shape, "large constant")
        labels = torch.from_numpy(self.labels.fresh(int(np.prod(shape)))).reshape(shape)
        sizes = bound.get("size")
        if isinstance(sizes, (list, tuple)):
            for item, size in enumerate(sizes):
                self._count(node, size, labels, item, item=item, length=len(sizes))
        return Act(labels, shape, constant=True)

    def _pad(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        act, shape = self._act(bound["self"]), shape_of(node)
        core, mode = collapse(self.labels, act.core), bound.get("mode", "constant")
        result = core
        pads = list(bound.get("pad") or bound.get("padding") or [])
        for dim in varying(core):
            place = 2 * (len(shape) - 1 - dim)
            before, after = (*pads[place : place + 2], 0, 0)[:2]
            if not before and not after:
                continue
            if mode != "constant":
                return self._stuck(node, bound, f"{mode} padding of channels")
            wide = torch.nn.functional.pad(result.movedim(dim, -1), (before, after), value=-1).movedim(-1, dim).clone()
            new = wide < 0
            wide[new] = torch.from_numpy(self.labels.fresh(int(new.sum())))
            for item, (size, start) in enumerate(((before, 0), (after, wide.shape[dim] - after))):
                if size > 0:
                    self._count(node, size, wide.narrow(dim, start, size), dim, item=place + item, length=len(pads))
            result = wide
        return self._settle(result.expand(shape), act.constant)

    def _op_pad(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        return self._pad(node, bound)

    def _op_constant_pad_nd(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        return self._pad(node, bound)

    def _op_glu(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        act = self._act(bound["self"])
        halves = [self._settle(half, act.constant) for half in act.full.chunk(2, bound.get("dim", -1))]
        return self._pointwise(halves, shape_of(node))

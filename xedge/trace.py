"""Run a torch.export graph on labels instead of numbers.

Each convolution or linear output gets fresh labels, one for each channel. Data movement (view, permute, cat, split,
slice, pixel shuffle ...) is the same ATen operation run on the labels; element-wise operations unite the labels they
combine; what mixes channels without weights of its own is frozen with its reason. Two channels that end up in one
class can only be dropped together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from xedge.labels import Act, Ints, Labels, Par, array, collapse, varying

_MOVES = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "view_as",
        "reshape_as",
        "permute",
        "transpose",
        "t",
        "numpy_T",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "tile",
        "cat",
        "concat",
        "stack",
        "hstack",
        "vstack",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "slice",
        "select",
        "narrow",
        "flip",
        "roll",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "native_channel_shuffle",
        "unsafe_split",
        "unsafe_chunk",
        "tensor_split",
    ]
)
_SAME = frozenset(
    [
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "native_dropout",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "to",
        "_to_copy",
        "type_as",
        "lift_fresh_copy",
        "lift_fresh",
        "hardswish",
        "relu6",
        "hardtanh",
        "rrelu",
        "celu",
        "selu",
        "float",
        "double",
        "half",
    ]
)
_POINTWISE = frozenset(["copy", "log_sigmoid", "square", "addcmul", "addcdiv", "lerp", "where", "type_as", "clamp"])
_REDUCE = frozenset(
    [
        "mean",
        "sum",
        "amax",
        "amin",
        "max",
        "min",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "norm",
        "linalg_vector_norm",
        "frobenius_norm",
        "logsumexp",
        "prod",
        "all",
        "any",
        "softmax",
        "_softmax",
        "log_softmax",
        "_log_softmax",
        "softmin",
        "cumsum",
        "cumprod",
        "argmax",
        "argmin",
        "median",
        "sort",
        "topk",
        "nansum",
    ]
)
_SPATIAL = ("max_pool", "avg_pool", "adaptive_", "upsample_", "_upsample_", "lp_pool", "fractional_max_pool")
_CREATE = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "empty",
        "arange",
        "scalar_tensor",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "linspace",
        "eye",
    ]
)
_MOST_ELEMENTS = 1 << 22  # a parameter larger than this is not labelled element by element

Axis = tuple[str, int]
"""A parameter's name and one of its dimensions."""


@dataclass(frozen=True)
class Count:
    """An int of the graph, or of a module, that counts channels: `value` positions, labelled along `dim`.

    Attributes:
        modules: names of the enclosing modules, innermost first.
        name: the attribute that holds it, or None where only the value is known and the attribute must be sought.
        item, length: the place in a list argument of that length, or None.
    """

    modules: tuple[str, ...]
    value: int
    labels: Tensor
    dim: int
    name: str | None = None
    item: int | None = None
    length: int | None = None


class Trace:
    """Labels of one model. After `run`: `axes` and `elements` label the parameters, `counts` the ints."""

    def __init__(self, model: nn.Module) -> None:
        self.labels = Labels()
        self.axes: dict[Axis, Ints] = {}
        self.kinds: dict[Axis, str] = {}
        self.inputs: dict[str, Ints] = {}
        self.elements: dict[str, Tensor] = {}
        self.stuck_params: dict[str, str] = {}
        self.counts: list[Count] = []
        self._first: dict[int, str] = {}
        self._owners: dict[str, list[str]] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._canonical: dict[str, str] = {}
        for name, tensor in named:
            first = self._first.setdefault(id(tensor), name)  # a tied parameter goes by its first name
            self._canonical[name] = first
            self._owners.setdefault(first, []).append(name.rpartition(".")[0])

    # ---- the walk ----

    def run(self, program: torch.export.ExportedProgram) -> None:
        env: dict[fx.Node, Any] = {}
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec, value = specs[node.name], node.meta.get("val")
                if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in self._canonical:
                    env[node] = Par(self._canonical[spec.target], tuple(cast(Tensor, value).shape))
                elif isinstance(value, Tensor):
                    reason = "model input" if spec.kind == InputKind.USER_INPUT else f"constant tensor {spec.target}"
                    env[node] = self._frozen_like(value, reason)
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, lambda n: env.get(n))
                kwargs = fx.node.map_arg(node.kwargs, lambda n: env.get(n))
                env[node] = self._call(node, cast(tuple[Any, ...], args), cast(dict[str, Any], kwargs))
            elif node.op == "output":
                outputs = fx.node.map_arg(node.args, lambda n: env.get(n))
                for act in self._acts(outputs):
                    self._freeze(act, "model output")

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = cast(Any, node.target)
        if not isinstance(target, torch._ops.OpOverload):
            if getattr(target, "__name__", "") == "getitem":
                return args[0][args[1]]
            return self._stuck(node, (args, kwargs), f"operation {getattr(target, '__name__', target)}")
        name = target._schema.name.partition("::")[2]
        if name.endswith("_") and not name.endswith("__"):
            name = name[:-1]  # an in-place operation changes labels as its twin does
        bound = {arg.name: value for arg, value in zip(target._schema.arguments, args, strict=False)} | kwargs
        for arg in target._schema.arguments:
            if arg.has_default_value():
                bound.setdefault(arg.name, arg.default_value)
        rule = cast(Callable[..., Any] | None, getattr(self, f"_op_{name}", None))
        if rule is not None:
            return rule(node, bound)
        if name in _MOVES:
            return self._move(node, name, args, kwargs, bound)
        if name in _SAME:
            return self._same(node, bound)
        if name in _REDUCE:
            return self._reduce(node, name, bound)
        if name.startswith(_SPATIAL):
            return self._spatial(node, name, bound)
        if name.startswith("conv"):
            return self._conv(node, bound, transposed="transpose" in name or bool(bound.get("transposed")))
        if name in _CREATE:
            return self._create(node, bound)
        if torch.Tag.pointwise in target.tags or name in _POINTWISE:
            return self._pointwise([self._act(value) for value in self._tensors((args, kwargs))], _shape(node))
        if not list(self._tensors((args, kwargs))):
            return self._outputs(node, lambda value: self._frozen_like(value, f"result of {name}"))
        return self._stuck(node, (args, kwargs), f"operation {target} is not followed")

    # ---- values ----

    def _tensors(self, value: Any) -> list[Act | Par]:
        if isinstance(value, (Act, Par)):
            return [value]
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            return [found for item in value for found in self._tensors(item)]
        return []

    def _acts(self, value: Any) -> list[Act]:
        return [self._act(found) for found in self._tensors(value)]

    def _act(self, value: Act | Par) -> Act:
        """`value` with labels by element."""
        if isinstance(value, Act):
            return value
        if len(value.shape) == 1:
            labels = torch.from_numpy(self.axis(value, 0))
        elif value.name in self.elements:
            labels = self.elements[value.name]
        elif np.prod(value.shape) > _MOST_ELEMENTS:
            self.stuck_params[value.name] = f"{value.name} is used element by element and is very large"
            return self._frozen(value.shape, self.stuck_params[value.name])
        else:
            labels = torch.from_numpy(self.labels.fresh(int(np.prod(value.shape)))).reshape(value.shape)
            self.elements[value.name] = labels
        return Act(collapse(self.labels, labels), value.shape, constant=True)

    def axis(self, par: Par, dim: int, kind: str = "pass") -> Ints:
        """The labels along one dimension of a parameter, fresh on the first use."""
        key = (par.name, dim)
        if key not in self.axes:
            self.axes[key] = self.labels.fresh(par.shape[dim])
            self.kinds[key] = kind
        return self.axes[key]

    def _meet(self, par: Par, dim: int, labels: Ints, kind: str) -> None:
        """Tie a parameter's dimension to `labels`; a parameter used twice is united by index."""
        key = (par.name, dim)
        if key in self.axes:
            self.labels.unite(self.axes[key], labels)
        else:
            self.axes[key] = labels
        if self.kinds.get(key, "pass") == "pass":
            self.kinds[key] = kind

    def _freeze(self, act: Act, reason: str) -> None:
        self.labels.freeze(act.flat, reason)

    def _frozen(self, shape: Sequence[int], reason: str) -> Act:
        label = self.labels.fresh(1)
        self.labels.freeze(label, reason)
        return Act(torch.from_numpy(label).reshape((1,) * len(shape)), tuple(shape))

    def _frozen_like(self, value: Tensor, reason: str) -> Act:
        return self._frozen(tuple(value.shape), reason)

    def _outputs(self, node: fx.Node, make: Callable[[Tensor], Any]) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)):
            return [make(item) if isinstance(item, Tensor) else None for item in value]
        return make(value) if isinstance(value, Tensor) else None

    def _stuck(self, node: fx.Node, operands: Any, reason: str) -> Any:
        """Freeze what goes in and what comes out."""
        where = _modules(node)[0]
        reason = f"{reason} at {where}" if where else reason
        for value in self._tensors(operands):
            if isinstance(value, Act):
                self._freeze(value, reason)
            else:
                self.stuck_params.setdefault(value.name, reason)
        return self._outputs(node, lambda value: self._frozen_like(value, reason))

    def _settle(self, labels: Tensor, constant: bool) -> Act:
        """Labels as an Act. An activation's varying dimensions are tied, all but the largest."""
        shape = tuple(labels.shape)
        core = collapse(self.labels, labels)
        if not constant:
            core = self._tie_box(core)
        return Act(core, shape, constant)

    def _tie_box(self, core: Tensor) -> Tensor:
        dims = varying(core)
        for dim in sorted(dims, key=lambda d: -core.shape[d])[1:]:
            head = core.narrow(dim, 0, 1)
            self.labels.unite(array(core), array(head.expand(core.shape)))
            core = head
        return collapse(self.labels, core) if len(dims) > 1 else core

    def _vector(self, act: Act, dim: int) -> Ints | None:
        """The labels along `dim`, or None when they vary along another dimension."""
        core = collapse(self.labels, act.core)
        dim %= len(act.shape)
        if any(other != dim for other in varying(core)):
            return None
        return array(core.expand([act.shape[d] if d == dim else 1 for d in range(core.ndim)]))

    def _along(self, labels: Ints, dim: int, shape: Sequence[int]) -> Act:
        dim %= len(shape)
        core = torch.from_numpy(labels).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        return Act(collapse(self.labels, core), tuple(shape))

    def _count(
        self,
        node: fx.Node,
        value: int,
        labels: Ints | Tensor,
        dim: int = 0,
        name: str | None = None,
        item: int | None = None,
        length: int | None = None,
    ) -> None:
        if isinstance(labels, np.ndarray):
            labels = torch.from_numpy(labels)
        self.counts.append(Count(_modules(node), value, labels, dim, name, item, length))

    def _width(self, par: Par, name: str, labels: Ints) -> None:
        """An attribute of a layer that says how many channels it has; it counts in every module that owns `par`."""
        for owner in self._owners[par.name]:
            self.counts.append(Count((owner,), len(labels), torch.from_numpy(labels), 0, name))

    # ---- rules: moving and combining ----

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
                self._freeze(source, f"uneven chunks at {_modules(node)[0]}")
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
            base = base.expand(torch.broadcast_shapes(base.shape, cores[i].shape))
        constant = all(act.constant for act in acts)
        return self._settle(base.expand(tuple(shape)), constant)

    def _unite_elements(self, first: Tensor, second: Tensor) -> None:
        a, b = torch.broadcast_tensors(first, second)
        self.labels.unite(array(a), array(b))

    def _same(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        act = self._act(self._tensors(bound)[0])
        return self._outputs(node, lambda value: act)

    def _create(self, node: fx.Node, bound: dict[str, Any]) -> Act:
        shape = _shape(node)
        if np.prod(shape) > _MOST_ELEMENTS:
            return self._frozen(shape, "large constant")
        labels = torch.from_numpy(self.labels.fresh(int(np.prod(shape)))).reshape(shape)
        sizes = bound.get("size")
        if isinstance(sizes, (list, tuple)):
            for item, size in enumerate(sizes):
                self._count(node, size, labels, item, item=item, length=len(sizes))
        return Act(labels, shape, constant=True)

    def _pad(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        act, shape = self._act(bound["self"]), _shape(node)
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
        return self._pointwise(halves, _shape(node))

    # ---- rules: mixing ----

    def _spatial(self, node: fx.Node, name: str, bound: dict[str, Any]) -> Any:
        """Pooling and up-sampling act on the trailing dimensions, in each channel alone."""
        act = self._act(self._tensors(bound)[0])
        core = collapse(self.labels, act.core)
        dims = next((int(d) for d in "123" if f"{d}d" in name), 2)
        if any(dim >= core.ndim - dims for dim in varying(core)):
            return self._stuck(node, bound, f"{name} across channels")
        return self._outputs(node, lambda value: Act(core, tuple(value.shape), act.constant))

    def _reduce(self, node: fx.Node, name: str, bound: dict[str, Any]) -> Any:
        act = self._act(self._tensors(bound)[0])
        core = collapse(self.labels, act.core)
        n = core.ndim
        dims = bound.get("dim")
        dims = range(n) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        gone = {dim % n for dim in dims} if n else set()
        if gone & set(varying(core)):
            return self._stuck(node, bound, f"{name} over channels")

        def out(value: Tensor) -> Act:
            labels = core
            if value.ndim < n:
                labels = core.reshape([size for dim, size in enumerate(core.shape) if dim not in gone])
            return Act(labels, tuple(value.shape), act.constant)

        return self._outputs(node, out)

    def _norm(self, node: fx.Node, bound: dict[str, Any], names: Sequence[str]) -> Any:
        """A normalisation with its own statistics for each channel: the parameters follow dimension 1."""
        act = self._act(bound["input"])
        labels = self._vector(act, 1)
        if labels is None:
            return self._stuck(node, bound, "normalisation of a layout that is not channels first")
        self._count(node, len(labels), labels, name="num_features")
        for name in names:
            par = bound.get(name)
            if isinstance(par, Par):
                self._follow(par, labels)
            elif isinstance(par, Act):
                self._pointwise([self._along(labels, 0, (len(labels),)), par], par.shape)
        out = self._along(labels, 1, act.shape)
        value = node.meta["val"]
        return [out, *[None] * (len(value) - 1)] if isinstance(value, (list, tuple)) else out

    def _follow(self, par: Par, labels: Ints) -> None:
        self._meet(par, 0, labels, "pass")
        for name in ("num_features", "num_channels", "num_parameters"):
            self._width(par, name, labels)

    def _op_batch_norm(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        return self._norm(node, bound, ("weight", "bias", "running_mean", "running_var"))

    _op__native_batch_norm_legit_no_training = _op_batch_norm
    _op__native_batch_norm_legit = _op_batch_norm
    _op_native_batch_norm = _op_batch_norm
    _op_cudnn_batch_norm = _op_batch_norm
    _op_instance_norm = _op_batch_norm

    def _op_group_norm(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        act, groups = self._act(bound["input"]), bound["num_groups"]
        labels = self._vector(act, 1)
        if labels is None or groups != len(labels):
            return self._stuck(node, bound, "group norm over channels")
        self._count(node, groups, labels, name="num_groups")
        return self._norm(node, bound, ("weight", "bias"))

    def _op_layer_norm(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        act = self._act(bound["input"])
        core = collapse(self.labels, act.core)
        if any(dim >= core.ndim - len(bound["normalized_shape"]) for dim in varying(core)):
            return self._stuck(node, bound, "layer norm over channels")
        return Act(core, act.shape, act.constant)

    def _op_rms_norm(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        return self._stuck(node, bound, "RMS norm over channels")

    def _op_prelu(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        act, par = self._act(bound["self"]), bound["weight"]
        labels = self._vector(act, 1) if len(act.shape) > 1 else None
        if isinstance(par, Par) and par.shape == (1,):
            return act
        if labels is None or not isinstance(par, Par):
            return self._stuck(node, bound, "PReLU of a layout that is not channels first")
        self._follow(par, labels)
        return self._along(labels, 1, act.shape)

    def _op_scaled_dot_product_attention(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        return self._stuck(node, bound, "attention product")

    def _op_linear(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        return self._linear(node, bound, bound["input"], bound["weight"], bound.get("bias"), 1)

    def _op_addmm(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        return self._linear(node, bound, bound["mat1"], bound["mat2"], bound["self"], 0)

    def _linear(self, node: fx.Node, bound: Any, x: Any, weight: Any, bias: Any, in_axis: int) -> Any:
        act = self._act(x)
        if not isinstance(weight, Par) or isinstance(bias, Act):
            return self._stuck(node, bound, "weight computed in forward")
        core = collapse(self.labels, act.core)
        dims = varying(core)
        if dims and dims != [core.ndim - 1]:
            # It mixes positions inside each channel (an MLP-mixer's tokens): the channels pass, the weight stays.
            if core.shape[-1] > 1:
                return self._stuck(node, bound, "linear layer over channels and positions at once")
            return Act(core, _shape(node), act.constant)
        labels = self._vector(act, -1)
        if labels is None:
            return self._stuck(node, bound, "linear layer over a layout that is not followed")
        self._consume(weight, in_axis, labels, labels)
        out = self.axis(weight, 1 - in_axis, "out")
        self.kinds[weight.name, 1 - in_axis] = "out"
        self._bias(bias, out, "out")
        self._width(weight, "in_features", labels)
        self._width(weight, "out_features", out)
        return self._along(out, -1, _shape(node))

    def _op_matmul(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        left, right = bound["self"], bound.get("other", bound.get("mat2"))
        if isinstance(right, Par) and len(right.shape) == 2:
            return self._linear(node, bound, left, right, None, 0)
        a, b = self._act(left), self._act(right)
        if len(a.shape) > 1 and len(b.shape) > 1:
            ca, cb = collapse(self.labels, a.core), collapse(self.labels, b.core)
            da, db = varying(ca), varying(cb)
            n = max(ca.ndim, cb.ndim)
            # Channels that lie along rows, columns or batch of one factor pass; a contraction over them does not.
            if bool(da) != bool(db) and ca.ndim - 1 not in da and cb.ndim - 2 not in db:
                core = ca if da else cb
                return Act(core.reshape((1,) * (n - core.ndim) + tuple(core.shape)), _shape(node))
        return self._stuck(node, bound, "attention product")

    _op_bmm = _op_matmul
    _op_mm = _op_matmul

    def _consume(self, weight: Par, dim: int, labels: Ints, inputs: Ints) -> None:
        self._meet(weight, dim, labels, "in")
        if weight.name in self.inputs:
            self.labels.unite(self.inputs[weight.name], inputs)
        else:
            self.inputs[weight.name] = inputs

    def _bias(self, bias: Any, labels: Ints, kind: str) -> None:
        if isinstance(bias, Par):
            self._meet(bias, 0, labels, kind)

    def _conv(self, node: fx.Node, bound: dict[str, Any], transposed: bool) -> Any:
        x, weight, bias, groups = self._act(bound["input"]), bound["weight"], bound.get("bias"), bound["groups"]
        if not isinstance(weight, Par) or isinstance(bias, Act):
            return self._stuck(node, bound, "weight computed in forward")
        shape = _shape(node)
        dim = len(x.shape) - (len(weight.shape) - 2) - 1
        labels = self._vector(x, dim)
        if labels is None:
            return self._stuck(node, bound, "convolution across channels")
        out_axis, in_axis = (1, 0) if transposed else (0, 1)
        per_in, per_out = len(labels) // groups, shape[dim] // groups
        if groups == 1:
            self._consume(weight, in_axis, labels, labels)
            out = self.axis(weight, out_axis, "out")
            self.kinds[weight.name, out_axis] = "out"
            self._bias(bias, out, "out")
        elif groups >= per_in:
            # Whole groups go, output with input: depthwise, or ResNeXt's 32 groups of 4.
            blocks = labels.reshape(groups, per_in)
            self._tie_blocks(blocks)
            out = np.repeat(blocks[:, 0], per_out)
            self._meet(weight, 0, np.repeat(blocks[:, 0], weight.shape[0] // groups), "pass")
            self._bias(bias, out, "pass")
            self._width(weight, "groups", blocks[:, 0])
        else:
            # Every group loses the same places, in and out: AlexNet's 2 groups of 48.
            rows = labels.reshape(groups, per_in)
            self._tie_rows(rows)
            self._consume(weight, in_axis, labels if transposed else rows[0], labels)
            out = self.axis(weight, out_axis, "out")
            self.kinds[weight.name, out_axis] = "out"
            if transposed:
                out = np.tile(out, groups)
            else:
                self._tie_rows(out.reshape(groups, per_out))
            self._bias(bias, out, "out")
        self._width(weight, "in_channels", labels)
        self._width(weight, "out_channels", out)
        return self._along(out, dim, shape)

    def _tie_blocks(self, blocks: Ints) -> None:
        self.labels.unite(blocks, blocks[:, :1])

    def _tie_rows(self, rows: Ints) -> None:
        self.labels.unite(rows, rows[:1])


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _modules(node: fx.Node) -> tuple[str, ...]:
    """Names of the modules around a node, innermost first. A module called again is exported as ``name@1``."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [str(path).partition("@")[0] for path, _ in stack.values()]
    return tuple(dict.fromkeys(reversed(names))) or ("",)

"""The one door to plug-ins: a name, ``path.py:attr`` or ``package.module:attr`` becomes a typed object.

`targets/` and `calibration/` are found by their file names; the built-in models and criteria by one table each.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl

from xedge.errors import UsageError, nearest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from xedge.criteria import Criterion
    from xedge.data import Batch, Data, Images
    from xedge.groups import ChannelGroup
    from xedge.observe import Observed
    from xedge.target import Target


def modules_of(package: str) -> list[str]:
    """Names of the modules in a package, without importing them."""
    found = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_"))


def attribute(spec: str, kind: str) -> Any:
    """The object behind ``path/file.py:attr`` or ``package.module:attr``.

    Raises:
        UsageError: no such file, module or attribute, or the user's module itself raises.
    """
    where, _, name = spec.rpartition(":")
    if not where:
        raise UsageError(f"unknown {kind}", where=spec, fix="give a name, path/file.py:attr or package.module:attr")
    try:
        if where.endswith(".py"):
            path = Path(where)
            if not path.is_file():
                raise UsageError("there is no such file", where=where, fix=f"check the path of --{kind}")
            module_name = f"xedge_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
            if module_name in sys.modules:
                module = sys.modules[module_name]
            else:
                spec_ = importlib.util.spec_from_file_location(module_name, path)
                assert spec_ is not None
                assert spec_.loader is not None
                module = importlib.util.module_from_spec(spec_)
                sys.modules[module_name] = module
                try:
                    spec_.loader.exec_module(module)
                except BaseException:
                    del sys.modules[module_name]
                    raise
        else:
            module = importlib.import_module(where)
    except UsageError:
        raise
    except ImportError as e:
        raise UsageError(f"cannot be imported ({e})", where=where, fix="install it, or check its spelling") from e
    except (Exception, SystemExit) as e:  # the user's own code: say where it broke, in one line
        raise UsageError(f"raised {type(e).__name__}: {e}", where=where, fix="run that file by itself first") from e
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"has no {part!r}", where=where, fix=nearest(part, [n for n in dir(found) if n[0] != "_"]))
        found = getattr(found, part)
    return found


# -- targets ---------------------------------------------------------------------------------------------------------


def targets() -> dict[str, Target]:
    """Every target by name."""
    found: dict[str, Target] = {}
    for name in modules_of("xedge.targets"):
        target = getattr(importlib.import_module(f"xedge.targets.{name}"), "TARGET", None)
        if target is not None:
            found[target.name] = target
    return found


def load_target(name: str) -> Target:
    """The target called `name` (or an alias of it, or ``path.py:TARGET``)."""
    from xedge.target import Target

    if ":" in name:
        target = attribute(name, "target")
        if not isinstance(target, Target):
            raise UsageError("is not an xedge Target", where=name, fix="write TARGET = xedge.target.Target(...)")
        return target
    known = targets()
    by_alias = {alias: t for t in known.values() for alias in t.aliases}
    if name in known:
        return known[name]
    if name in by_alias:
        return by_alias[name]
    raise UsageError(f"unknown target {name!r}", fix=nearest(name, [*known, *by_alias]))


# -- criteria --------------------------------------------------------------------------------------------------------


def criteria() -> dict[str, str]:
    """Names of the criteria and one line on each."""
    found = {}
    for name in modules_of("xedge.criteria"):
        module = importlib.import_module(f"xedge.criteria.{name}")
        if hasattr(module, "score"):
            found[name.replace("_", "-")] = (inspect.getdoc(module) or "").splitlines()[0]
    return found


def load_criterion(name: str) -> Criterion:
    """The criterion's `score` function."""
    if ":" in name:
        return _users_criterion(attribute(name, "criterion"), name)
    module = name.replace("-", "_")
    if module not in modules_of("xedge.criteria") or name.startswith("_"):
        raise UsageError(f"unknown criterion {name!r}", fix=nearest(name, criteria()))
    return importlib.import_module(f"xedge.criteria.{module}").score  # type: ignore[no-any-return]


def _users_criterion(function: Any, where: str) -> Criterion:
    import numpy as np

    def score(group: ChannelGroup, observed: Observed, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        def call() -> NDArray[np.float64]:
            return np.asarray(function(group, observed, keep), dtype=np.float64)

        return cast("NDArray[np.float64]", call_user(call, f"{where}, {group.name}", {}))

    if not callable(function):
        raise UsageError("is not callable", where=where, fix="name a function or a class")
    return score


# -- data ------------------------------------------------------------------------------------------------------------


def data_kinds() -> dict[str, str]:
    """Names of the data sets and one line on each."""
    found = {}
    for name in modules_of("xedge.calibration"):
        module = importlib.import_module(f"xedge.calibration.{name}")
        names = getattr(module, "NAMES", None) or ([name.replace("_", "-")] if hasattr(module, "load") else [])
        for n in names:
            found[n] = getattr(module, "SUMMARY", "")
    return found


def load_data(spec: str, *, root: Path | None, seed: int) -> Data:
    """The data behind a spec: ``digits``, ``folder:DIR?size=224``, ``npz:FILE``, ``path/file.py:callable``.

    Raises:
        UsageError: no such data, an option given twice, or whatever is wrong with the data themselves.
    """
    from xedge.data import Data

    head, _, query = spec.partition("?")
    given = parse_qsl(query, keep_blank_values=True)
    options = dict(given)
    if len(options) < len(given):
        (most, _), *_ = Counter(key for key, _ in given).most_common(1)
        raise UsageError(f"gives {most} more than once", where=spec, fix="give it once")
    kind, _, path = head.partition(":")
    if kind.endswith(".py") or ("." in kind and path):
        made = attribute(head, "data")
        data = call_user(made, head, options)
        if not isinstance(data, Data):
            raise UsageError(
                f"returned {type(data).__name__}, not xedge.data.Data", where=head, fix="return Data(name=..., ...)"
            )
        train, select, val = (_Users(getattr(data, s), f"{head}, {s}") for s in ("train", "select", "val"))
        return dataclasses.replace(data, train=train, select=select, val=val)
    for name in modules_of("xedge.calibration"):
        module = importlib.import_module(f"xedge.calibration.{name}")
        names = getattr(module, "NAMES", None) or [name.replace("_", "-")]
        if kind in names and hasattr(module, "load"):
            if len(names) > 1:
                options = {**options, "name": kind}
            loaded = module.load(path or None, options, root=root, seed=seed)
            assert isinstance(loaded, Data)
            return loaded
    raise UsageError(f"unknown data {kind!r}", fix=nearest(kind, data_kinds()))


@dataclasses.dataclass(frozen=True)
class _Users:
    """A split of a user's own: whatever it raises, on whichever image, becomes one line."""

    inner: Images
    where: str

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return cast("tuple[torch.Tensor, int]", call_user(lambda: self.inner[index], f"{self.where}[{index}]", {}))

    def batch(self, indices: Sequence[int] | torch.Tensor) -> Batch:
        """All of `indices` at once."""
        from xedge.data import take

        return cast("Batch", call_user(take, self.where, {"dataset": self.inner, "indices": indices}))


def call_user(function: Callable[..., Any], where: str, arguments: Mapping[str, Any]) -> Any:
    """Call a user's function; whatever it raises becomes one line."""
    if not callable(function):
        raise UsageError("is not callable", where=where, fix="name a function or a class")
    try:
        return function(**arguments)
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(
            f"raised {type(e).__name__}: {e}", where=where, fix="check that it runs with these arguments by itself"
        ) from e


# -- models ----------------------------------------------------------------------------------------------------------


def models() -> dict[str, tuple[str, str]]:
    """Built-in models: name -> (module:attr, one line)."""
    from xedge.models import BUILT_IN

    return dict(BUILT_IN)


def is_built_in(spec: str) -> bool:
    """Whether the spec names one of xedge's own models, which xedge may train from scratch."""
    return spec in models()


def load_model(spec: str, *, classes: int | None, channels: int, scale: int | None = None) -> nn.Module:
    """The model behind a spec, in eval mode, with whatever weights its own callable gave it.

    Args:
        classes: of the data, for models that classify.
        channels: of the input.
        scale: of data that restore pictures: how much larger the output is.

    Raises:
        UsageError: unknown name, or the user's callable fails or returns something that is not a Module.
    """
    from torch import nn

    if is_built_in(spec):
        function = attribute(models()[spec][0], "model")
        if _takes(function, "scale") != (scale is not None):
            wants = "pictures to restore" if scale is None else "classes"
            raise UsageError(
                f"wants data with {wants}", where=spec, fix="choose by `xedge list models` and `xedge list data`"
            )
        known = {"classes": classes or 1000, "channels": channels} if scale is None else {"scale": scale}
        model = call_user(function, spec, known)
    else:
        if ":" not in spec:
            raise UsageError(
                f"unknown model {spec!r}",
                fix=nearest(spec, models()) + " or give package.module:callable or path/file.py:callable",
            )
        function = attribute(spec, "model")
        arguments: dict[str, Any] = {}
        if scale is not None and _takes(function, "scale"):
            arguments["scale"] = scale
        if classes is not None and _takes_num_classes(function):
            arguments["num_classes"] = classes
        if isinstance(function, nn.Module):
            model = copy.deepcopy(function)  # a factory gives a new one each time
        else:
            model = call_user(function, spec, arguments)
    if not isinstance(model, nn.Module):
        raise UsageError(f"gave {type(model).__name__}, not a torch.nn.Module", where=spec, fix="return the model")
    return model.eval()


def _takes_num_classes(function: Any) -> bool:
    """torchvision and timm take num_classes, often through **kwargs."""
    if _takes(function, "num_classes"):
        return True
    zoo = (getattr(function, "__module__", "") or "").split(".")[0] in ("torchvision", "timm")
    return zoo and any(p.kind is p.VAR_KEYWORD for p in _parameters(function))


def _takes(function: Any, name: str) -> bool:
    return any(p.name == name for p in _parameters(function))


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from .safetensors, or from .pt/.pth by torch's weights-only reader. Nothing in it is executed.

    Raises:
        UsageError: missing, damaged, not a state dict, or holding NaN or infinity.
    """
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError("there is no such file", where=str(path), fix="check the path of --weights")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        elif path.suffix in (".pt", ".pth", ".bin", ".tar"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UsageError("is neither .safetensors nor .pt", where=str(path), fix="save it with safetensors")
    except UsageError:
        raise
    except Exception as e:  # torch's reader answers a damaged file with whatever its parser met
        reason = str(e).split("\n", 1)[0][:200] or type(e).__name__
        raise UsageError(
            f"cannot be read as weights only ({reason})",
            where=str(path),
            fix="save the state_dict with safetensors.torch.save_file",
        ) from e
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UsageError("holds no state dict of tensors", where=str(path), fix="save model.state_dict()")
    state = {k.removeprefix("module."): v for k, v in state.items()}  # DataParallel's prefix
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UsageError(
                f"{name} holds NaN or infinity", where=str(path), fix="use a checkpoint from before training diverged"
            )
    return cast("dict[str, torch.Tensor]", state)


def put_weights(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Load a state dict strictly.

    Raises:
        UsageError: a tensor is missing, unknown, or of another shape; the first few are named.
    """
    own = model.state_dict()
    optional = {k for k in own if k.endswith("num_batches_tracked")}
    missing = [k for k in own if k not in state and k not in optional]
    unknown = [k for k in state if k not in own and not k.endswith("num_batches_tracked")]
    wrong = [
        f"{k} is {tuple(state[k].shape)} and the model wants {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or unknown or wrong:
        parts = []
        for what, names in (("missing", missing), ("unknown", unknown)):
            if names:
                parts.append(f"{len(names)} tensors {what}, such as {names[0]}")
        if wrong:
            parts.append("; ".join(wrong[:2]))
        raise UsageError(
            f"these are not this model's weights ({'; '.join(parts)})",
            where=where,
            fix="check --model and the number of classes of --data",
        )
    model.load_state_dict({**{k: own[k] for k in optional}, **{k: v for k, v in state.items() if k in own}})

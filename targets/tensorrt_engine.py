"""TensorRT's Python package, where it is installed and sees a GPU: build an engine, say what it is bound to, run it.

Only what TensorRT 8.5, 10 and 11 all document is used (Builder, OnnxParser, IBuilderConfig, ICudaEngine's named
tensors, execute_async_v3); memory and device facts come from the CUDA driver, so that no CUDA package is needed.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from xedge.errors import DeviceError, UnsupportedGraph, UsageError
from xedge.run import digest_file, read_json, write_atomically, write_json
from xedge.target import Runner

FORMAT = 1
"""Of engine.json."""

# -- what an engine is bound to --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """Where an engine was built, or where we are. Empty means unknown, or that there is none.

    NVIDIA, "Serialized engines are not portable": they are specific to the GPU they were built on and to the exact
    TensorRT version; on Jetson the driver comes with JetPack, so its Linux counts as well.

    Attributes:
        tensorrt: version, three numbers, "10.3.0".
        compute_capability: of the GPU, "8.7".
        gpu: its name as CUDA says it, "Orin".
        board: /proc/device-tree/model, "NVIDIA Jetson Orin Nano Developer Kit"; two boards may share a GPU's name.
        l4t: JetPack's Linux from /etc/nv_tegra_release, "36.4.3".
    """

    tensorrt: str
    compute_capability: str
    gpu: str
    board: str = ""
    l4t: str = ""


BOUND = tuple(f.name for f in fields(Facts))
_WORDS = {
    "tensorrt": "TensorRT",
    "compute_capability": "CUDA compute capability",
    "gpu": "GPU",
    "board": "board",
    "l4t": "L4T (JetPack)",
}


def refusal(recorded: Mapping[str, object], present: Facts) -> str | None:
    """Why an engine with these recorded facts must not be loaded here, or None. Pure.

    Args:
        recorded: engine.json's content.
        present: the machine that would load it.
    """
    if recorded.get("format") != FORMAT:
        return f"engine.json has format {recorded.get('format')!r}, not {FORMAT}"
    for name in ("tensorrt", "compute_capability", "gpu"):
        if not recorded.get(name):
            return f"engine.json does not say on which {_WORDS[name]} it was built"
    here = asdict(present)
    wrong = [
        f"{_WORDS[name]} {recorded.get(name) or 'none'} and here is {here[name] or 'none'}"
        for name in BOUND
        if (recorded.get(name) or "") != here[name]
    ]
    return f"it was built on {', '.join(wrong)}" if wrong else None


def check_engine(plan: Path, manifest: Path, present: Facts) -> None:
    """Check that an engine belongs to the artefact and to this machine.

    Args:
        plan: model.plan, with engine.json beside it.
        manifest: the artefact's manifest.json.
        present: of this machine, from `present_facts`.

    Raises:
        UsageError: it was built elsewhere, from another graph, or is damaged; the reason is in the line.
    """
    fix = "build it here with the artefact's build.sh"
    record = read_json(plan.with_name("engine.json"))
    files = read_json(manifest)
    if not isinstance(record, dict) or not isinstance(files, dict) or not isinstance(files.get("files"), dict):
        raise UsageError("engine.json or manifest.json is not of xedge", where=str(plan), fix=fix)
    reason = refusal(record, present)
    if reason is None and record.get("onnx_sha256") != files["files"].get("model.onnx"):
        reason = "it was built from another model.onnx than manifest.json names"
    if reason is None and not plan.is_file():
        reason = "there is no such file"
    if reason is None and record.get("plan_sha256") != digest_file(plan):
        reason = "it is not the file that engine.json describes"
    if reason is not None:
        raise UsageError(f"this engine is refused: {reason}", where=str(plan), fix=fix)


def present_facts(trt: ModuleType, cuda: Cuda, root: Path = Path("/")) -> Facts:
    """The facts of this machine. `root` is where /proc and /etc are."""
    board = _text(root / "proc/device-tree/model").replace("\0", "").strip()
    found = re.search(r"^# R(\d+) .*REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"), re.MULTILINE)
    return Facts(
        tensorrt=".".join(str(trt.__version__).split(".")[:3]),
        compute_capability=cuda.compute_capability,
        gpu=cuda.name,
        board=board,
        l4t=f"{found.group(1)}.{found.group(2)}" if found else "",
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# -- the CUDA driver -------------------------------------------------------------------------------------------------

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class Cuda:
    """The few calls of the CUDA driver API that running an engine takes, on device 0.

    Args:
        driver: libcuda, or what behaves like it.

    Raises:
        DeviceError: no driver, no device, or a call failed.
    """

    def __init__(self, driver: Any = None) -> None:
        if driver is None:
            try:
                driver = ctypes.CDLL("libcuda.so.1")
            except OSError as e:
                raise DeviceError(f"there is no CUDA driver ({e})", fix="run this on a machine with a GPU") from e
        self._driver = driver
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, ctypes.c_int(256), device)
        self.name = name.value.decode(errors="replace")
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(major), ctypes.c_int(_MAJOR), device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), ctypes.c_int(_MINOR), device)
        self.compute_capability = f"{major.value}.{minor.value}"
        # TensorRT uses the runtime API, which lives in the primary context.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(0))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            raise DeviceError(f"the CUDA driver refused {name} with error {code}", fix="is the GPU free and sound?")

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.value or 0)

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes; its address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return int(address.value)

    def free(self, addresses: list[int]) -> None:
        """Give memory back."""
        for a in addresses:
            self._call("cuMemFree_v2", ctypes.c_uint64(a))

    def put(self, address: int, array: NDArray[Any]) -> None:
        """Host to device."""
        source = array.ctypes.data_as(ctypes.c_void_p)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes))

    def get(self, array: NDArray[Any], address: int) -> None:
        """Device to host, once the stream is through."""
        self._call("cuStreamSynchronize", self._stream)
        target = array.ctypes.data_as(ctypes.c_void_p)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))


# -- build and run ---------------------------------------------------------------------------------------------------


def import_tensorrt() -> ModuleType:
    """TensorRT's Python package.

    Raises:
        UsageError: it does not import.
    """
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as e:  # OSError: its libraries are not there
        raise UsageError(f"tensorrt does not import ({e})", fix="on Jetson: sudo apt-get install tensorrt") from e


def missing() -> str | None:
    """Why no engine can be built and run on this machine, or None."""
    try:
        import_tensorrt()
        Cuda()
    except (UsageError, DeviceError) as e:
        return str(e)
    return None


def logger(trt: ModuleType, *, everything: bool = False) -> tuple[Any, list[tuple[str, str]]]:
    """A TensorRT logger that keeps (severity, message) of warnings and errors instead of printing them; with
    `everything` of the rest as well, as "info"."""
    kept: list[tuple[str, str]] = []
    worth = {int(s): n for n, s in (("error", trt.ILogger.INTERNAL_ERROR), ("warning", trt.ILogger.WARNING))}
    worth[int(trt.ILogger.ERROR)] = "error"

    base: Any = trt.ILogger

    class Log(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 wants it named

        def log(self, severity: Any, message: str) -> None:
            if everything or int(severity) in worth:
                kept.append((worth.get(int(severity), "info"), message))

    return Log(), kept


def network_flags(trt: ModuleType, *, strongly_typed: bool) -> int:
    """Flags of create_network: EXPLICIT_BATCH exists and is needed in 8, is ignored in 10 and gone in 11."""
    kinds = trt.NetworkDefinitionCreationFlag
    names = ["EXPLICIT_BATCH"] if int(str(trt.__version__).split(".")[0]) == 8 else []
    names += ["STRONGLY_TYPED"] if strongly_typed else []
    return sum(1 << int(getattr(kinds, n)) for n in names if hasattr(kinds, n))


Precision = Literal["int8", "float16", "float32"]


def precision(model: onnx.ModelProto) -> Precision:
    """What a graph asks for: int8 where it has Q/DQ, which is what makes TensorRT run it; else by its weights."""
    if any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in model.graph.node):
        return "int8"
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    return "float16" if half else "float32"


def build_engine(
    onnx_path: Path,
    folder: Path,
    *,
    strongly_typed: bool = False,
    trt: ModuleType | None = None,
    cuda: Cuda | None = None,
) -> Path:
    """Build model.plan here, with timing.cache, layers.json and engine.json beside it.

    Args:
        onnx_path: batch 1, static shapes.
        folder: made where it is not; a timing cache in it is used.
        strongly_typed: on TensorRT 10 take every type from the graph. The default there is what build.sh does, int8
            between Q/DQ and fp16 elsewhere where that is faster; 8.5 knows no other way, and 11 no other than strong.
        trt, cuda: TensorRT's package and the driver, where not this machine's own.

    Returns:
        The plan's path.

    Raises:
        UsageError: no TensorRT here, or a version that is not 8.5, 10 or 11.
        DeviceError: no GPU.
        UnsupportedGraph: TensorRT does not take the graph; its node and reason.
    """
    trt = trt or import_tensorrt()
    major, minor = (int(n) for n in str(trt.__version__).split(".")[:2])
    if (major, minor) != (8, 5) and major not in (10, 11):
        raise UsageError(f"TensorRT {trt.__version__} is not one of 8.5, 10 and 11", fix="install one of these")
    cuda = cuda or Cuda()
    strong = major == 11 or (strongly_typed and major == 10)
    log, kept = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt, strongly_typed=strong))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx_path.read_bytes()):
        error = parser.get_error(0) if parser.num_errors else None
        raise UnsupportedGraph(
            f"TensorRT {trt.__version__} does not parse it ({error.desc() if error else _last(kept)})",
            where=f"{onnx_path}, node {error.node()}" if error else str(onnx_path),
            fix="xedge lint names every such node",
        )
    config = builder.create_builder_config()
    if not strong:
        config.set_flag(trt.BuilderFlag.FP16)
        if precision(onnx.load(onnx_path)) == "int8":  # on a float graph it would ask for calibration
            config.set_flag(trt.BuilderFlag.INT8)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    timing = folder / "timing.cache"
    cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    # A cache of another device or version is refused by TensorRT itself: then start anew.
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnsupportedGraph(f"TensorRT {trt.__version__} cannot build it ({_last(kept)})", where=str(onnx_path))
    path = folder / "model.plan"
    write_atomically(path, lambda p: p.write_bytes(bytes(plan)))
    written = config.get_timing_cache()
    if written is not None:
        write_atomically(timing, lambda p: p.write_bytes(bytes(written.serialize())))
    engine = _deserialize(trt, path, log, kept)
    layers = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    write_atomically(folder / "layers.json", lambda p: p.write_text(layers))
    record = {
        "format": FORMAT,
        "onnx_sha256": digest_file(onnx_path),
        "plan_sha256": digest_file(path),
        **asdict(present_facts(trt, cuda)),
    }
    write_json(folder / "engine.json", record)
    return path


def _last(kept: list[tuple[str, str]]) -> str:
    errors = [m for s, m in kept if s == "error"]
    return " ".join(errors[-1].split())[:300] if errors else "it does not say why"


def _deserialize(trt: ModuleType, plan: Path, log: Any, kept: list[tuple[str, str]]) -> Any:
    engine = trt.Runtime(log).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise DeviceError(f"TensorRT does not load it ({_last(kept)})", where=str(plan), fix="build it here anew")
    return engine


def load_engine(
    plan: Path, manifest: Path, *, trt: ModuleType | None = None, cuda: Cuda | None = None, root: Path = Path("/")
) -> Runner:
    """A runner over an engine that was built here from this artefact.

    Raises:
        UsageError: no TensorRT here, or the engine is refused (see `check_engine`).
        DeviceError: no GPU, or TensorRT does not load the file.
    """
    trt = trt or import_tensorrt()
    cuda = cuda or Cuda()
    check_engine(plan, manifest, present_facts(trt, cuda, root))
    log, kept = logger(trt)
    return _Engine(trt, _deserialize(trt, plan, log, kept), cuda, log)


def build_or_load(model_path: Path, *, trt: ModuleType | None = None, cuda: Cuda | None = None) -> Runner:
    """A runner over the artefact's engine, in `FOLDER.engine` beside the artefact's folder: the artefact itself stays
    as it is. It is built where there is none, or none that this machine may load."""
    folder = model_path.parent.with_name(f"{model_path.parent.name}.engine")
    plan, manifest = folder / "model.plan", model_path.with_name("manifest.json")
    trt, cuda = trt or import_tensorrt(), cuda or Cuda()
    try:
        check_engine(plan, manifest, present_facts(trt, cuda))
    except UsageError:
        build_engine(model_path, folder, trt=trt, cuda=cuda)
    return load_engine(plan, manifest, trt=trt, cuda=cuda)


class _Engine:
    """One input, one output, batch 1, static shapes: images go through one by one."""

    def __init__(self, trt: ModuleType, engine: Any, cuda: Cuda, log: Any) -> None:
        self._keep = (engine, log)  # TensorRT's objects do not hold each other
        self._cuda = cuda
        self._context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [n for n in names if n not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise UnsupportedGraph(f"the engine has inputs {inputs} and outputs {outputs}, not one of each")
        self._in, self._out = (
            np.zeros(tuple(engine.get_tensor_shape(n)), trt.nptype(engine.get_tensor_dtype(n)))
            for n in (inputs[0], outputs[0])
        )
        self._source, self._target = cuda.allocate(self._in.nbytes), cuda.allocate(self._out.nbytes)
        weakref.finalize(self, cuda.free, [self._source, self._target])
        self._context.set_tensor_address(inputs[0], self._source)
        self._context.set_tensor_address(outputs[0], self._target)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images [N, C, H, W] to outputs [N, ...]."""
        if x.shape[1:] != self._in.shape[1:]:
            raise UsageError(f"the engine takes images of shape {self._in.shape[1:]}, not {x.shape[1:]}")
        out = np.empty((len(x), *self._out.shape[1:]), np.float32)
        for i in range(len(x)):
            self._in[:] = x[i]
            self._cuda.put(self._source, self._in)
            if not self._context.execute_async_v3(self._cuda.stream):
                raise DeviceError("TensorRT failed to run the engine", fix="is the GPU free and sound?")
            self._cuda.get(self._out, self._target)
            out[i] = self._out[0]
        return out

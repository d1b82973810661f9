"""Test doubles of the CUDA driver and of the tensorrt package."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class DriverDouble:
    """A test double of libcuda: an Orin whose device memory is the host's."""

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.fails = ""

    def __getattr__(self, name: str) -> Callable[..., int]:
        known = ["cuInit", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamSynchronize"]
        if name == self.fails:
            return lambda *_: 700
        if name in known:
            return lambda *_: 0
        raise AttributeError(name)

    def cuDeviceGet(self, device: Any, ordinal: Any) -> int:  # noqa: N802 - CUDA's name
        device._obj.value = ordinal.value
        return 0

    def cuDeviceGetName(self, buffer: Any, size: Any, _device: Any) -> int:  # noqa: N802
        assert ctypes.sizeof(buffer) == size.value
        buffer.value = b"Orin"
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: Any, _device: Any) -> int:  # noqa: N802
        out._obj.value = {75: 8, 76: 7}[attribute.value]
        return 0

    def cuStreamCreate(self, out: Any, _flags: Any) -> int:  # noqa: N802
        out._obj.value = 77
        return 0

    def cuMemAlloc_v2(self, out: Any, size: Any) -> int:  # noqa: N802
        buffer = ctypes.create_string_buffer(size.value)
        out._obj.value = ctypes.addressof(buffer)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        del self.memory[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, target: Any, source: Any, size: Any) -> int:  # noqa: N802
        assert size.value <= ctypes.sizeof(self.memory[target.value])
        ctypes.memmove(target.value, source, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, source: Any, size: Any) -> int:  # noqa: N802
        assert size.value <= ctypes.sizeof(self.memory[source.value])
        ctypes.memmove(target, source.value, size.value)
        return 0


class TensorRTDouble(ModuleType):
    """A test double of the tensorrt package whose engines double their input; it keeps what it was asked for."""

    SHAPE = (1, 16, 8, 8)

    def __init__(self, version: str) -> None:
        super().__init__("tensorrt")
        major = int(version.split(".")[0])
        self.__version__ = version
        self.flags: set[str] = set()
        self.network_flags = -1
        self.caches: list[bytes] = []

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        self.ILogger = ILogger
        kinds = {8: ["EXPLICIT_BATCH"], 10: ["EXPLICIT_BATCH", "STRONGLY_TYPED"], 11: ["STRONGLY_TYPED"]}[major]
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**{k: int(k == "STRONGLY_TYPED") for k in kinds})
        self.BuilderFlag = SimpleNamespace(**({} if major == 11 else {"INT8": "INT8", "FP16": "FP16"}))
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        self.nptype = np.dtype
        self.refuses = False
        self.addresses: dict[str, int] = {}

    def Builder(self, _log: Any) -> Any:  # noqa: N802 - TensorRT's names
        def create_network(flags: int) -> str:
            self.network_flags = flags
            return "network"

        def config() -> Any:
            return SimpleNamespace(
                set_flag=self.flags.add,
                create_timing_cache=lambda data: data,
                # A cache of another device is refused.
                set_timing_cache=lambda cache, ignore_mismatch: self.caches.append(cache) or cache != b"elsewhere",
                get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timed here"),
            )

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=config,
            build_serialized_network=lambda _n, _c: b"plan of the double",
        )

    def OnnxParser(self, _network: Any, log: Any) -> Any:  # noqa: N802
        log.log(1, "so said the parser")
        error = SimpleNamespace(node=lambda: 3, desc=lambda: "no such operator")
        return SimpleNamespace(parse=lambda _: not self.refuses, num_errors=1, get_error=lambda _: error)

    def Runtime(self, _log: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self._engine() if b"plan" in plan else None)

    def _engine(self) -> Any:
        size = 4 * int(np.prod(self.SHAPE))

        def execute(stream: int) -> bool:
            assert stream == 77
            x = np.frombuffer(ctypes.string_at(self.addresses["x"], size), np.float32)
            ctypes.memmove(self.addresses["y"], (2 * x).tobytes(), size)
            return True

        context = SimpleNamespace(set_tensor_address=self.addresses.__setitem__, execute_async_v3=execute)
        return SimpleNamespace(
            create_execution_context=lambda: context,
            create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _: '{"Layers": []}'),
            num_io_tensors=2,
            get_tensor_name="yx".__getitem__,
            get_tensor_mode={"x": "in", "y": "out"}.__getitem__,
            get_tensor_shape=lambda _: self.SHAPE,
            get_tensor_dtype=lambda _: "float32",
        )

"""Imported by the server of `tiny_runs` alone: all that a run of `xedge` imports, so that its forks need not.

Nothing is computed here, because threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import functools
import importlib

for _name in (
    "accelerate", "ai_edge_litert.interpreter", "ai_edge_litert.schema_py_generated", "flatbuffers", "jinja2",
    "matplotlib.backends.backend_svg", "networkx", "onnxruntime", "onnxscript", "sklearn.datasets", "torch._dynamo",
    "torch._functorch.aot_autograd", "torch.export._trace", "torch.fx.experimental.proxy_tensor",
    "torch.onnx._internal.exporter._core", "xedge.assemble", "xedge.bench", "xedge.doctor", "xedge.pipeline",
    "xedge.report_page", "xedge.verify", "tiny",
):  # fmt: skip
    importlib.import_module(_name)

with contextlib.suppress(ImportError, AttributeError):
    # torch compiles the same table of a thousand operators at every export
    from onnxscript._framework_apis import torch_2_5

    torch_2_5.get_torchlib_ops = functools.cache(torch_2_5.get_torchlib_ops)

"""ONNX models of one node, by name, and random images for them."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def one(op: str, shape: tuple[int, ...], consts: tuple[object, ...] = (), **attrs: object) -> onnx.ModelProto:
    """A model of one node on x; `twice=True` gives it relu(x) as a second operand, `last=True` puts x last."""
    twice, last, parts = attrs.pop("twice", False), attrs.pop("last", False), attrs.pop("parts", 1)
    named = [("" if c is None else f"c{i}", c) for i, c in enumerate(consts)]
    held = [numpy_helper.from_array(np.asarray(c), name) for name, c in named if c is not None]
    inputs = ["x", *(["half"] if twice else []), *(name for name, _ in named)]
    nodes = [helper.make_node("Relu", ["x"], ["half"], name="relu")] if twice else []
    outputs = ["y"] if parts == 1 else [f"part{i}" for i in range(int(str(parts)))]
    nodes.append(helper.make_node(op, inputs[1:] + inputs[:1] if last else inputs, outputs, name="node", **attrs))
    if parts != 1:
        nodes.append(helper.make_node("Concat", outputs[::-1], ["y"], name="join", axis=1))
    kind = TensorProto.FLOAT
    source, sink = (helper.make_tensor_value_info(n, kind, s) for n, s in (("x", shape), ("y", None)))
    graph = helper.make_graph(nodes, "one", [source], [sink], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def w(*shape: int) -> np.ndarray:
    return images(*shape, seed=math.prod(shape) + len(shape))


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


F = np.float32
IMAGE = (1, 8, 12, 12)
ODD = (1, 8, 13, 13)
FRAME = i64(0, 0, 1, 2, 0, 0, 3, 0)
DOUBLE = np.array([1, 1, 2, 2], F)
ONES, TWOS, SAME = [1, 1, 1, 1], [2, 2], [2, 2, 2, 2]
CASES: dict[str, onnx.ModelProto] = {
    "conv": one("Conv", IMAGE, (w(16, 8, 3, 3), w(16)), pads=ONES),
    "conv valid": one("Conv", IMAGE, (w(16, 8, 3, 3), w(16))),
    "conv asymmetric": one("Conv", IMAGE, (w(16, 8, 3, 3), w(16)), pads=[2, 0, 1, 1], strides=TWOS),
    "conv stride": one("Conv", IMAGE, (w(16, 8, 3, 3), w(16)), pads=ONES, strides=TWOS),
    "conv dilated": one("Conv", IMAGE, (w(16, 8, 3, 3),), pads=SAME, dilations=TWOS),
    "conv groups": one("Conv", IMAGE, (w(16, 2, 3, 3), w(16)), group=4, pads=ONES),
    "conv same lower": one("Conv", IMAGE, (w(16, 8, 4, 4), w(16)), auto_pad="SAME_LOWER"),
    "conv one channel": one("Conv", (1, 1, 12, 12), (w(1, 1, 3, 3), w(1)), pads=ONES),
    "depthwise": one("Conv", IMAGE, (w(8, 1, 3, 3), w(8)), group=8, pads=ONES),
    "depthwise multiplier": one("Conv", IMAGE, (w(16, 1, 3, 3), w(16)), group=8, pads=ONES, strides=TWOS),
    "depthwise dilated": one("Conv", IMAGE, (w(8, 1, 3, 3), w(8)), group=8, pads=SAME, dilations=TWOS),
    "deconv": one("ConvTranspose", IMAGE, (w(8, 6, 4, 4), w(6)), strides=TWOS, pads=ONES),
    "deconv output pad": one(
        "ConvTranspose", IMAGE, (w(8, 6, 3, 3), w(6)), strides=TWOS, pads=ONES, output_padding=[1, 1]
    ),
    "deconv bias only": one("ConvTranspose", IMAGE, (w(8, 6, 1, 1), w(6)), strides=TWOS, output_padding=[1, 1]),
    "deconv groups": one("ConvTranspose", IMAGE, (w(8, 3, 2, 2), w(6)), strides=TWOS, group=2),
    "gemm": one("Gemm", (1, 32), (w(10, 32), w(10)), transB=1),
    "matmul": one("MatMul", IMAGE, twice=True),
    "add": one("Add", IMAGE, twice=True),
    "sub": one("Sub", IMAGE, twice=True),
    "mul": one("Mul", IMAGE, twice=True),
    "add channels": one("Add", IMAGE, (w(8, 1, 1),)),
    "mul channels": one("Mul", IMAGE, (w(1, 8, 1, 1),)),
    "sub channels": one("Sub", IMAGE, (w(8, 1, 1),)),
    "channels sub": one("Sub", IMAGE, (w(8, 1, 1),), last=True),
    "add scalar": one("Add", IMAGE, (F(0.7),)),
    "mul scalar": one("Mul", IMAGE, (F(-0.3),)),
    "div scalar": one("Div", IMAGE, (F(6),)),
    "add rows": one("Add", IMAGE, (w(12, 12),)),
    "mul rows": one("Mul", IMAGE, (w(1, 1, 12, 12),)),
    "mul vector": one("Mul", (1, 10), (w(10),)),
    "relu": one("Relu", IMAGE),
    "relu6": one("Clip", IMAGE, (F(0), F(6))),
    "clip": one("Clip", IMAGE, (F(-0.5), F(1.2))),
    "leaky relu": one("LeakyRelu", IMAGE, alpha=0.1),
    "prelu": one("PRelu", IMAGE, (w(8, 1, 1),)),
    "sigmoid": one("Sigmoid", IMAGE),
    "tanh": one("Tanh", IMAGE),
    "hard swish": one("HardSwish", IMAGE),
    "hard sigmoid": one("HardSigmoid", IMAGE, alpha=1 / 6, beta=0.5),
    "softmax": one("Softmax", (1, 10), axis=-1),
    "softmax channels": one("Softmax", IMAGE, axis=1),
    "batch norm": one("BatchNormalization", IMAGE, (w(8), w(8), w(8), np.abs(w(8)) + F(0.3))),
    "max pool": one("MaxPool", IMAGE, kernel_shape=TWOS, strides=TWOS),
    "max pool padded": one("MaxPool", IMAGE, kernel_shape=[3, 3], strides=TWOS, pads=ONES),
    "max pool ceil": one("MaxPool", ODD, kernel_shape=[3, 3], strides=TWOS, ceil_mode=1),
    "max pool dilated": one("MaxPool", IMAGE, kernel_shape=TWOS, dilations=TWOS),
    "average pool": one("AveragePool", IMAGE, kernel_shape=TWOS, strides=TWOS),
    "average pool with pads": one(
        "AveragePool", IMAGE, kernel_shape=[3, 3], strides=TWOS, pads=ONES, count_include_pad=1
    ),
    "average pool without pads": one("AveragePool", IMAGE, kernel_shape=[3, 3], strides=TWOS, pads=ONES),
    "average pool ceil": one("AveragePool", ODD, kernel_shape=TWOS, strides=TWOS, ceil_mode=1),
    "global average pool": one("GlobalAveragePool", IMAGE),
    "global max pool": one("GlobalMaxPool", IMAGE),
    "mean": one("ReduceMean", IMAGE, (i64(2, 3),), keepdims=0),
    "mean of channels": one("ReduceMean", IMAGE, (i64(1),), keepdims=1),
    "nearest": one("Resize", IMAGE, (None, DOUBLE), coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "nearest odd": one("Resize", IMAGE, (None, None, i64(1, 8, 17, 9))),
    "bilinear": one("Resize", IMAGE, (None, DOUBLE), mode="linear"),
    "bilinear corners": one(
        "Resize", IMAGE, (None, None, i64(1, 8, 23, 20)), mode="linear", coordinate_transformation_mode="align_corners"
    ),
    "depth to space": one("DepthToSpace", IMAGE, blocksize=2),
    "depth to space crd": one("DepthToSpace", IMAGE, blocksize=2, mode="CRD"),
    "space to depth": one("SpaceToDepth", IMAGE, blocksize=2),
    "pad": one("Pad", IMAGE, (FRAME,)),
    "pad with": one("Pad", IMAGE, (FRAME, F(1.5))),
    "pad reflect": one("Pad", IMAGE, (FRAME,), mode="reflect"),
    "pad edge": one("Pad", IMAGE, (FRAME,), mode="edge"),
    "pad negative": one("Pad", IMAGE, (-FRAME,)),
    "concat": one("Concat", IMAGE, twice=True, axis=1),
    "split": one("Split", IMAGE, (i64(3, 5),), axis=1, parts=2),
    "slice": one("Slice", IMAGE, (i64(1, 2), i64(7, 11), i64(1, 3), i64(2, 3))),
    "slice backwards": one("Slice", IMAGE, (i64(-1), i64(-100), i64(2), i64(-1))),
    "flatten": one("Flatten", IMAGE),
    "reshape": one("Reshape", IMAGE, (i64(1, 4, 2, 144),)),
    "transpose": one("Transpose", IMAGE, perm=[0, 2, 1, 3]),
    "squeeze": one("Squeeze", (1, 8, 1, 1), (i64(2, 3),)),
    "gather": one("Gather", IMAGE, (i64(3, 1, 2),), axis=1),
}

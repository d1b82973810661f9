"""TensorRT, for Jetson: a folder with the QDQ graph and one script that builds and times its engine on the board.

An engine is bound to the board, the TensorRT version and the JetPack it was built on, so xedge ships the graph, never
an engine. `build.sh` writes down beside model.plan where it was built, and `tensorrt_engine` refuses it elsewhere.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from xedge.errors import UsageError
from xedge.export import halved
from xedge.onnx_graph import session
from xedge.run import digest_file
from xedge.target import Runner, Target
from xedge.targets import tensorrt_engine
from xedge.targets.tensorrt_engine import Precision

# 8.5 and 10, weakly typed: layers between Q/DQ run in int8, the others in the faster of fp16 and fp32. Strong typing
# would leave those others in fp32; github.com/NVIDIA/Model-Optimizer/issues/80 measured it 17 % slower. The next three
# make them measure as 11 does by default; the last keeps the profiler out of the timed run.
_WEAK = ("--int8", "--fp16", "--useCudaGraph", "--useSpinWait", "--noDataTransfers", "--separateProfileRun")

BUILD: dict[int, tuple[str, ...]] = {
    8: _WEAK,  # 8.5: NVIDIA/TensorRT, samples/common/sampleOptions.cpp at release 8.5
    10: _WEAK,  # `trtexec --help` of 10.6
    # Always strongly typed: the precision flags are gone and the Q/DQ in the graph decides; CUDA graph, spin-wait, no
    # transfers and a separate profile run are its defaults and their flags no-ops (NVIDIA, "Migrating trtexec Usage
    # from TensorRT 10.x to 11.x"; NVIDIA/TensorRT, samples/common/sampleOptions.cpp at release 11.1).
    11: (),
}


def command(version: int, asked: Precision = "int8") -> list[str]:
    """The trtexec call for TensorRT 8 (8.5 only), 10 or 11, to be run inside the artefact's folder on the board.

    A graph without Q/DQ must not get --int8: trtexec would make up ranges for it. Every graph gets --fp16 where typing
    is weak; where it is strong only one that is float16 itself runs so.
    """
    typing = [f for f in BUILD[version] if asked == "int8" or f != "--int8"]
    common = ["--onnx=model.onnx", "--saveEngine=model.plan", "--timingCacheFile=timing.cache"]
    time = ["--warmUp=1000", "--duration=10", "--iterations=1000", "--percentile=50,90,99", "--exportTimes=times.json"]
    layers = ["--profilingVerbosity=detailed", "--exportLayerInfo=layers.json", "--exportProfile=profile.json"]
    return ["trtexec", *common, *typing, *time, *layers]


_SCRIPT = r"""#!/bin/sh
# Builds model.plan from model.onnx and times it, on the board that is to run it. It leaves build.log, times.json,
# profile.json, layers.json, timing.cache, and engine.json, which says what model.plan is bound to.
set -eu
cd "$(dirname "$0")"
no() { echo "build.sh: $1" >&2; exit 2; }

trtexec=$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)
[ -x "$trtexec" ] || no "trtexec is neither on PATH nor in /usr/src/tensorrt/bin; sudo apt-get install libnvinfer-bin"
onnx=$(sha256sum model.onnx | cut -d ' ' -f 1)
grep -q "$onnx" manifest.json || no "model.onnx is not the file that manifest.json names; copy the whole folder again"

# trtexec's banner reads [TensorRT v8502] for 8.5.2 and [TensorRT v100300] for 10.3.0; else ask dpkg, then Python.
n=$("$trtexec" --help 2>&1 | sed -n 's/.*\[TensorRT v\([0-9][0-9]*\)\].*/\1/p' | head -n 1)
case $n in
    [1-9][0-9][0-9][0-9]) version=$((n / 1000)).$((n / 100 % 10)).$((n % 100)) ;;
    [1-9][0-9][0-9][0-9][0-9][0-9]) version=$((n / 10000)).$((n / 100 % 100)).$((n % 100)) ;;
    *)
        version=$(dpkg-query -W -f='${Version}' libnvinfer-bin 2>/dev/null || true)
        [ -n "$version" ] || version=$(python3 -c 'import tensorrt; print(tensorrt.__version__)' 2>/dev/null || true)
        version=$(echo "$version" | sed -n 's/^\([0-9][0-9]*\.[0-9][0-9]*\.[0-9][0-9]*\).*/\1/p')
        ;;
esac
case $version in
    8.5.*) set -- @8@ ;;
    10.*) set -- @10@ ;;
    11.*) set -- @11@ ;;
    *) no "TensorRT ${version:-of unknown version}: the flags of 8.5, 10 and 11 are known; install one of these" ;;
esac

rm -f model.plan engine.json
echo "building with TensorRT $version; this takes minutes; see build.log"
"$trtexec" "$@" >build.log 2>&1 || { tail -n 5 build.log >&2; no "trtexec failed; build.log says why"; }
[ -s model.plan ] || no "trtexec left no model.plan; build.log says why"

said() { sed -n "s/.*$1: //p" build.log | head -n 1 | tr -d '"\\\r'; }
board=$(tr -d '\000"\\' 2>/dev/null </proc/device-tree/model || true)
l4t=$(sed -n 's/^# R\([0-9]*\) .*REVISION: \([0-9.]*\).*/\1.\2/p' /etc/nv_tegra_release 2>/dev/null || true)
cat >engine.json <<END
{
 "board": "$board",
 "compute_capability": "$(said 'Compute Capability')",
 "format": 1,
 "gpu": "$(said 'Selected Device')",
 "l4t": "$l4t",
 "onnx_sha256": "$onnx",
 "plan_sha256": "$(sha256sum model.plan | cut -d ' ' -f 1)",
 "tensorrt": "$version"
}
END
sed -n 's/.*\(\(Latency\|GPU Compute Time\): min.*\)/\1/p' build.log
echo "model.plan is bound to this board; engine.json says to what"
"""


def script(asked: Precision = "int8") -> str:
    """build.sh: plain POSIX sh; it finds trtexec and its version and refuses a version whose flags are not known."""
    text = _SCRIPT
    for version in BUILD:
        text = text.replace(f"@{version}@", shlex.join(command(version, asked)[1:]))
    return text


def compile_onnx(onnx_path: Path, folder: Path, name: str) -> Path:
    """Write the artefact folder: model.onnx, build.sh, README.md, and manifest.json with the hash of each.

    Equal input gives equal bytes.

    Raises:
        UsageError: the file is missing, is not ONNX, or keeps its weights elsewhere.
    """
    model = folder / "model.onnx"
    try:
        proto = onnx.load(onnx_path, load_external_data=False)
    except (FileNotFoundError, DecodeError) as e:
        raise UsageError("is not an ONNX model", where=str(onnx_path), fix="give the path of one") from e
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer):
        raise UsageError("keeps its weights in another file", where=str(onnx_path), fix="save it as one file")
    shutil.copyfile(onnx_path, model)
    asked = tensorrt_engine.precision(proto)
    build = folder / "build.sh"
    build.write_text(script(asked))
    build.chmod(0o755)
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    readme = folder / "README.md"
    kind = "int8 Q/DQ" if asked == "int8" else asked
    eight, ten, eleven = (shlex.join(command(v, asked)) for v in (8, 10, 11))
    readme.write_text(
        f"1. {name}: {kind} ONNX, opset {opset}, batch 1. Copy this folder to the board and run `./build.sh`; an "
        "engine built elsewhere does not load there.\n"
        f"2. TensorRT 8.5 (JetPack 5.1): `{eight}`\n"
        f"3. TensorRT 10 (JetPack 6): `{ten}`\n"
        f"4. TensorRT 11 (JetPack 7.2.2 and later): `{eleven}`\n"
    )
    initializers = {t.name for t in proto.graph.initializer}
    manifest = {
        "format": 1,
        "name": name,
        "opset": opset,
        "inputs": {v.name: _shape(v) for v in proto.graph.input if v.name not in initializers},
        "outputs": {v.name: _shape(v) for v in proto.graph.output},
        "files": {f.name: digest_file(f) for f in (build, model, readme)},
        "tensorrt": ["8.5", "10", "11"],
        "engine": {
            "files": ["model.plan", "engine.json"],
            "bound_to": list(tensorrt_engine.BOUND),
            "note": "build.sh makes them on the board; l4t is JetPack's Linux; loading them elsewhere is refused",
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return model


def compile_half(onnx_path: Path, folder: Path, name: str) -> Path:
    """As `compile_onnx`, of a float graph made float16: strong typing, as in TensorRT 11, takes it from the graph."""
    with tempfile.TemporaryDirectory() as elsewhere:
        half = Path(elsewhere) / "half.onnx"
        onnx.save(halved(onnx.load(onnx_path)), half)
        return compile_onnx(half, folder, name)


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def load(model_path: Path, threads: int = 1) -> Runner:
    """Where TensorRT and a GPU are, the engine, built here into `FOLDER.engine` beside the artefact's folder unless
    one that may be loaded is there already. Elsewhere the graph as it is written, in ONNX Runtime without
    optimisation: what TensorRT has to reproduce.
    """
    if tensorrt_engine.missing() is None and (model_path.parent / "manifest.json").is_file():
        return tensorrt_engine.build_or_load(model_path)
    run = session(model_path, threads=threads, exact=True)
    name = run.get_inputs()[0].name

    def runner(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([run.run(None, {name: x[i : i + 1]})[0] for i in range(len(x))])

    return runner


TARGET = Target(
    name="tensorrt",
    summary="TensorRT 8.5, 10 and 11 on any NVIDIA GPU: int8 Q/DQ ONNX, opset 17, with the script that builds it",
    flavour="tensorrt",
    align=8,
    compile=compile_onnx,
    load=load,
    opset=17,
    weight_bits=(8,),
    activation_symmetric=True,
    half=compile_half,
    sources=(
        "NVIDIA TensorRT documentation, Working with Quantized Types: explicit quantisation, zero-point 0",
        "NVIDIA TensorRT documentation, Migrating trtexec Usage from TensorRT 10.x to 11.x",
        "github.com/NVIDIA/TensorRT#993: int8 convolutions want channel counts in multiples",
    ),
)

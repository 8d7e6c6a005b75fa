#!/usr/bin/env bash
# Build and measure a run's engine on the Jetson that will run it.
#
#   build.sh RUN [OUT]
#
# RUN is a run directory copied to the device: model.onnx, engine/build.json and probe/ are enough. OUT (engine)
# must not exist. Needs JetPack's TensorRT for Python, and qcompress without torch: `pip install qcompress`.
# Afterwards, on the machine that holds the run: qcompress verify RUN --engine engine.json
#
# Exit code: 0 built and measured; 2 wrong usage; 5 the build or the measurement failed; 6 not a Jetson, or one
# that lacks something.
set -euo pipefail

fail() { # CODE TEXT
    echo "error: $2" >&2
    exit "$1"
}

if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: build.sh RUN [OUT]" >&2
    exit 2
fi
run=$1 out=${2:-engine}
for file in model.onnx engine/build.json probe/measure_engine.py probe/engine_runners.py probe/engine_speed.py \
    probe/strict_json.py; do
    [[ -f $run/$file ]] || fail 2 "$run/$file is missing; copy the whole run directory"
done
[[ ! -e $out ]] || fail 2 "$out exists; name a new folder"

model=${JETSON_MODEL_FILE:-/proc/device-tree/model}
if ! tr -d '\0' <"$model" 2>/dev/null | grep -qi 'jetson\|thor\|orin'; then
    fail 6 "this is no Jetson ($model does not say so); an engine runs only on the GPU it was built for"
fi
python3 -c 'import tensorrt' 2>/dev/null ||
    fail 6 "python3 has no tensorrt; JetPack has it: sudo apt install python3-libnvinfer"
command -v qcompress >/dev/null || fail 6 "qcompress is not installed; fix: python3 -m pip install qcompress"

# the command that the run left for its device, with the model and the folder that were named here
mapfile -d '' -t words < <(python3 - "$run" "$out" <<'PYTHON'
import json, shlex, sys
run, out = sys.argv[1:]
words = shlex.split(json.load(open(f"{run}/engine/build.json"))["command"] or "")
if words[:2] == ["qcompress", "build"] and "--out" in words[3:-1]:
    words[2], words[words.index("--out") + 1] = f"{run}/model.onnx", out
    sys.stdout.write("".join(word + "\0" for word in words))
PYTHON
)
[[ ${#words[@]} -gt 0 ]] || fail 2 "$run/engine/build.json defers no build to a device; was its target a Jetson?"

"${words[@]}" || exit $?
python3 "$run/probe/measure_engine.py" --plan "$out/model.plan" --out "$out/engine.json" ||
    fail 5 "the engine was built and could not be measured"
echo "measured: $out/engine.json; where the run is: qcompress verify RUN --engine engine.json"

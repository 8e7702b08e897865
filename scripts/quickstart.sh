#!/usr/bin/env bash
# The main job on the sample, from nothing: set up, build an engine, print its AP and its speed.
#
#   bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
times=""

# step NAME COMMAND...: run a part and note how long it took.
step() {
    local name=$1 start=$SECONDS
    shift
    "$@"
    times+="  $name: $((SECONDS - start)) s"$'\n'
}

step "set-up" bash scripts/environment.sh
run=.venv/bin/trt-yolov6
engine=engines/yolov6n_bccd-fp32.onnx

echo "== build: samples/yolov6n_bccd.pt -> $engine (ONNX Runtime, FP32)"
step "build" "$run" build --backend onnxruntime --output "$engine" --quiet
echo "== eval: COCO AP on the 72 validation images of samples/"
step "eval" "$run" eval --engine "$engine" --batch 8 --quiet
echo "== bench: latency and throughput of the engine alone, at most 10 s for each batch size"
step "bench, batch 1" "$run" bench --engine "$engine" --batch 1 --duration 10 --quiet
step "bench, batch 32" "$run" bench --engine "$engine" --batch 32 --duration 10 --quiet
printf '== %s s in all\n%s' "$SECONDS" "$times"
echo "The engine is $engine; run other commands with $run or after 'source .venv/bin/activate'."

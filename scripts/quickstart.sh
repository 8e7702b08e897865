#!/usr/bin/env bash
# The main job on the sample, from nothing: set up, build an engine, print its AP and its speed.
#
#   bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/environment.sh
run=.venv/bin/trt-yolov6

echo "== build: samples/yolov6n_bccd.pt -> engines/yolov6n.onnx (ONNX Runtime, FP32)"
"$run" build --backend onnxruntime --output engines/yolov6n.onnx
echo "== eval: COCO AP on the 72 validation images of samples/"
"$run" eval --engine engines/yolov6n.onnx --batch 8
echo "== bench: latency and throughput of the engine alone"
"$run" bench --engine engines/yolov6n.onnx --batch 1 --duration 10
"$run" bench --engine engines/yolov6n.onnx --batch 32 --duration 10
echo "The engine is engines/yolov6n.onnx; run other commands with $run or after 'source .venv/bin/activate'."

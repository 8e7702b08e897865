# The runtime for CPUs: bench, eval, infer, compare and build --onnx on ONNX Runtime, without PyTorch.
#
#   docker build -f docker/cpu.Dockerfile -t trt-yolov6:cpu .
#   docker run --rm -v "$PWD:/work" trt-yolov6:cpu infer --engine engines/n.onnx --source pictures
FROM python:3.11-slim AS build
COPY . /src
RUN python3 -m venv /opt/trt-yolov6
RUN /opt/trt-yolov6/bin/python -m pip install --quiet --no-cache-dir -c /src/constraints.txt -r /src/docker/runtime.txt
RUN /opt/trt-yolov6/bin/python -m pip install --quiet --no-cache-dir --no-deps /src

FROM python:3.11-slim
COPY --from=build /opt/trt-yolov6 /opt/trt-yolov6
RUN useradd --uid 10001 --create-home trt-yolov6
USER 10001
WORKDIR /work
HEALTHCHECK --interval=60s --timeout=30s CMD ["/opt/trt-yolov6/bin/python", "-c", "import sys; from trt_yolov6.engines import backend; sys.exit(not backend('onnxruntime').availability().can_run)"]
ENTRYPOINT ["/opt/trt-yolov6/bin/trt-yolov6"]
CMD ["doctor"]

# The runtime for GPUs on NVIDIA's TensorRT container, which brings CUDA and TensorRT with its Python
# bindings. BASE is that image, of NGC's catalogue; its tag decides the TensorRT that plans are for.
#
#   docker build -f docker/tensorrt.Dockerfile --build-arg BASE=NGC_TENSORRT_IMAGE:25.09-py3 -t trt-yolov6:gpu .
#   docker run --rm --gpus all -v "$PWD:/work" trt-yolov6:gpu build --onnx n.onnx --fp16
ARG BASE
FROM ${BASE}
COPY . /src
RUN python3 -m venv --system-site-packages /opt/trt-yolov6
RUN /opt/trt-yolov6/bin/python -m pip install --quiet --no-cache-dir -c /src/constraints.txt -r /src/docker/runtime.txt -r /src/docker/cuda.txt
RUN /opt/trt-yolov6/bin/python -m pip install --quiet --no-cache-dir --no-deps /src && rm -rf /src
RUN useradd --uid 10001 --create-home trt-yolov6
USER 10001
WORKDIR /work
HEALTHCHECK --interval=60s --timeout=30s CMD ["/opt/trt-yolov6/bin/python", "-c", "import sys; from trt_yolov6.engines import backend; sys.exit(not backend('tensorrt').availability().can_run)"]
ENTRYPOINT ["/opt/trt-yolov6/bin/trt-yolov6"]
CMD ["doctor"]

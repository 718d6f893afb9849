# syntax=docker/dockerfile:1
# NVIDIA GPUs:  docker build -t batch-infer .
# CPU:          docker build -t batch-infer:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# docs/deployment.md shows how to run the image.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# CUDA 12.6 needs driver 525 or newer. For driver 580 or newer, .../whl/cu130 has the builds for CUDA 13.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG EXTRAS=s3,gs,abfss,https,lora,long-prompts,azure,nvml
ENV PATH=/opt/batch-infer/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# torch has a separate layer, because it is large and changes rarely.
COPY requirements.lock ./
RUN python -m venv /opt/batch-infer \
    && pip install --index-url "$TORCH_INDEX" "$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' requirements.lock)"
COPY pyproject.toml README.md LICENSE ./
COPY batch_infer batch_infer
RUN pip install --constraint requirements.lock ".[$EXTRAS]"

FROM ${PYTHON_IMAGE}
# torch.compile needs a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home batch-infer \
    && install --directory --owner batch-infer /work /cache
COPY --from=build /opt/batch-infer /opt/batch-infer
# Mount a volume at /cache to keep downloaded models and measurements, and one at /work for tables and OUT.
ENV PATH=/opt/batch-infer/bin:$PATH HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
# There is no HEALTHCHECK, because a job ends: its exit code, `batch-infer status` and --metrics-file report its state.
ENTRYPOINT ["batch-infer"]
CMD ["--help"]

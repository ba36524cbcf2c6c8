# Training, export and benchmarks, on CPU or GPU by the torch that is chosen. Build: make image-training
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS dependencies
# torch stays out of the locks, because its CPU build carries a local version; it is pinned here by version.
ARG TORCH=torch==2.13.0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
COPY requirements/training.txt /build/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    python3 -m venv --copies /opt/venv \
    && /opt/venv/bin/pip install --only-binary=:all: "${TORCH}" \
    && /opt/venv/bin/pip install --require-hashes --no-deps --only-binary=:all: -r /build/requirements.txt \
    && find /opt/venv -type d -name __pycache__ -prune -exec rm -rf {} +

FROM ${BASE_IMAGE} AS final
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="asr-training" \
      org.opencontainers.image.description="Training, export, quantization and benchmarks of the speech models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
RUN groupadd --gid 10001 asr && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin asr \
    && install -d -o asr -g asr /home/asr/runs /home/asr/models /home/asr/data
COPY --from=dependencies /opt/venv /opt/venv
COPY api /app/api
COPY training /app/training
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/tmp/numba-cache \
    ORT_DISABLE_TELEMETRY=1 \
    MPLCONFIGDIR=/tmp/matplotlib
# Data, runs and bundles are mounted here; the image holds none of them.
WORKDIR /home/asr
USER 10001:10001
STOPSIGNAL SIGTERM
# A stage of the pipeline is one module, for example: docker run ... asr-training -m training.publish --help
ENTRYPOINT ["python3"]
CMD ["-c", "import training, torch; print('stages: python3 -m training.<stage>; torch', torch.__version__)"]
HEALTHCHECK NONE

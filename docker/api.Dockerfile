# The service. Build from the repository root: make image-api
ARG BASE_IMAGE=python:3.11-slim-bookworm

# --- dependencies: locked, hash-checked, wheels only, so no compiler is needed even here --------------
FROM ${BASE_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
COPY requirements/api.txt /build/requirements.txt
COPY docker/prune.sh /build/prune.sh
# The secret is optional: a pip.conf for builders behind a proxy or a mirror. It leaves no trace in a layer.
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    python3 -m venv --copies /opt/venv \
    && /opt/venv/bin/pip install --require-hashes --no-deps --only-binary=:all: -r /build/requirements.txt \
    && sh /build/prune.sh /opt/venv

# --- decoders and INT8 kernels: compiled by numba and by a locked wheel that stays in this stage ------
FROM dependencies AS compiled
ENV CC="/opt/compiler/bin/python3 -m ziglang cc"
COPY requirements/kernels.txt /build/compiler.txt
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    python3 -m venv /opt/compiler \
    && /opt/compiler/bin/pip install --require-hashes --no-deps --only-binary=:all: -r /build/compiler.txt
COPY api /build/api
WORKDIR /build
RUN mkdir -p library/compiled library/kernels \
    && /opt/venv/bin/python3 -m api.compiled.build --required && mv api/compiled/*.so library/compiled/ \
    && if [ "$(uname -m)" = x86_64 ]; then \
      python3 api/kernels/build.py --required && mv api/kernels/*.so library/kernels/; \
    fi

# --- the application and its model, without what only compiling needed --------------------------------
FROM dependencies AS application
ARG MODEL=en-moonshine-tiny
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app
WORKDIR /app
COPY docker/asr /opt/venv/bin/asr
COPY api /app/api
COPY --from=compiled /build/library/ /app/api/
COPY models/${MODEL} /app/models/${MODEL}
# The warm-up loads the model and decodes: it proves that nothing is missing, and writes the byte code of
# exactly the modules that the service imports.
ENV ORT_DISABLE_TELEMETRY=1
COPY docker/warm_up.py /build/warm_up.py
RUN sh /build/prune.sh /opt/venv numba llvmlite scipy \
    && ASR_MODELS_DIR=/app/models ASR_MODELS=${MODEL} ASR_CALIBRATE=false ASR_WORKERS=1 python3 /build/warm_up.py

# --- what ships ---------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS final
ARG MODEL=en-moonshine-tiny
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="asr-api" \
      org.opencontainers.image.description="Speech recognition service: CTC models and Whisper in ONNX behind an OpenAI-compatible API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
RUN groupadd --gid 10001 asr && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin asr
COPY --from=application /opt/venv /opt/venv
COPY --from=application /app /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    ASR_HOST=0.0.0.0 \
    ASR_PORT=8000 \
    ASR_MODELS_DIR=/app/models \
    ASR_MODELS=${MODEL} \
    ASR_SPOOL_DIR=/tmp \
    ASR_LOG_FORMAT=json \
    ASR_VERSION=${VERSION} \
    ASR_REVISION=${REVISION}
WORKDIR /app
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Exec form, so SIGTERM reaches the service itself.
CMD ["asr", "serve"]
# bash opens the connection itself: a Python start for every check would cost more than the check is worth.
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/$ASR_PORT && printf 'GET /health/ready HTTP/1.0\\r\\n\\r\\n' >&3 && read -rt 3 line <&3 && [[ $line == *' 200 '* ]]"]

# The page. Build from the repository root: make image-ui
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
# One lock serves a checkout, where page and service share an environment; the page needs no engine.
COPY requirements/ui.txt /build/requirements.txt
COPY docker/prune.sh /build/prune.sh
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    python3 -m venv --copies /opt/venv \
    && /opt/venv/bin/pip install --require-hashes --no-deps --only-binary=:all: -r /build/requirements.txt \
    && sh /build/prune.sh /opt/venv numba llvmlite scipy onnxruntime

FROM ${BASE_IMAGE} AS final
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="asr-ui" \
      org.opencontainers.image.description="Web page of the speech recognition service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
RUN groupadd --gid 10001 asr && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin asr
COPY --from=dependencies /opt/venv /opt/venv
COPY ui /app/ui
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    ASR_API_URL=http://127.0.0.1:8000 \
    STREAMLIT_SERVER_ADDRESS=0.0.0.0 \
    STREAMLIT_SERVER_PORT=8501 \
    STREAMLIT_SERVER_HEADLESS=true \
    STREAMLIT_SERVER_FILE_WATCHER_TYPE=none \
    STREAMLIT_BROWSER_GATHER_USAGE_STATS=false
WORKDIR /app
# Byte code of what the page imports, written while the root file system can still be written. It is also the
# proof that nothing of it was pruned.
RUN PYTHONDONTWRITEBYTECODE='' python3 -c "import streamlit.web.bootstrap, streamlit.runtime, altair, httpx, numpy, av, \
    soundfile, opentelemetry.exporter.otlp.proto.http.trace_exporter"
USER 10001:10001
EXPOSE 8501
STOPSIGNAL SIGTERM
CMD ["streamlit", "run", "ui/app.py"]
HEALTHCHECK --interval=10s --timeout=4s --start-period=60s --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/$STREAMLIT_SERVER_PORT && printf 'GET /_stcore/health HTTP/1.0\\r\\n\\r\\n' >&3 && read -rt 3 line <&3 && [[ $line == *' 200 '* ]]"]

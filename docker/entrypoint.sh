#!/bin/sh
# The root file system is read-only and numba wants to write beside its cache, so the cache that the image
# carries is copied to a place that can be written (well under a megabyte), once per start.
set -eu
if [ -d /opt/numba-cache ] && [ ! -e "${NUMBA_CACHE_DIR:?}" ]; then
  mkdir -p "$NUMBA_CACHE_DIR"
  cp -Rp /opt/numba-cache/. "$NUMBA_CACHE_DIR/"
fi
exec "$@"

#!/usr/bin/env bash
# Renew the digests of every pinned third-party image: the base in docker/base.env and those of the Compose
# files. The version stays; only what the registry says its digest is today is written.
# usage: docker/pin_images.sh [--check]     --check only tells which digests differ (exit status 1 when any)
set -euo pipefail
cd "$(dirname "$0")/.."
check=0
[ "${1:-}" != --check ] || check=1
files=(docker/base.env docker/compose.api.yml docker/compose.monitoring.yml Makefile)
changed=0 unreachable=0
while read -r pinned; do
  name=${pinned%@*} old=${pinned#*@}
  if ! new=$(docker buildx imagetools inspect "$name" --format '{{.Manifest.Digest}}' 2>/dev/null); then
    echo "unreachable: $name" >&2
    unreachable=1
    continue
  fi
  if [ "$new" = "$old" ]; then
    echo "current:     $name"
  else
    echo "changed:     $name $old -> $new"
    changed=1
    [ "$check" = 1 ] || sed -i "s#$pinned#$name@$new#" "${files[@]}"
  fi
done < <(grep -hoE '[a-z0-9][a-z0-9./-]*:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}' "${files[@]}" | sort -u)
[ "$unreachable" = 0 ] || { echo "error: some images could not be asked for (needs docker buildx and a registry)" >&2; exit 2; }
[ "$check" = 0 ] || exit "$changed"

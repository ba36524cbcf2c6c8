#!/usr/bin/env bash
# Renew the digests of every pinned third-party image: the base in docker/base.env and those of the Compose
# files. The version stays; only what the registry says its digest is today is written.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: docker/pin_images.sh [--check]

Renews the digests of the pinned third-party images, in docker/base.env, the Compose files and the Makefile.

  --check    only report which digests differ (exit status 1 if any does)
  --help     this text

Exit status 2: wrong arguments, or a registry could not be asked.
EOF
}

check=0
while [ $# -gt 0 ]; do
  case $1 in
    --check) check=1 ;;
    --help | -h) usage; exit 0 ;;
    *) usage >&2; echo "error: unknown argument $1" >&2; exit 2 ;;
  esac
  shift
done
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

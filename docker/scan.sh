#!/usr/bin/env bash
# Look for known vulnerabilities: the locks with pip-audit, the images with Trivy.
# usage: docker/scan.sh VERSION      TRIVY_IMAGE names the scanner, pinned by digest
# Fails on a known vulnerability of a lock, and on one of an image that is high or critical and has a fix. What cannot be scanned here
# (no scanner, no vulnerability database) is said, and fails only with SCAN_STRICT=1, which CI sets.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: docker/scan.sh VERSION}
strict=${SCAN_STRICT:-0} skipped=0 failed=0
AUDIT_STRICT=$strict scripts/audit.sh api ui || failed=1
for kind in api ui; do
  image=${REGISTRY:+$REGISTRY/}asr-$kind:$version
  if ! docker image inspect "$image" >/dev/null 2>&1; then
    echo "SKIPPED  $image: is not on this machine"; skipped=1; continue
  fi
  if command -v trivy >/dev/null; then
    scanner=(trivy)
  elif docker image inspect "$TRIVY_IMAGE" >/dev/null 2>&1 || docker pull --quiet "$TRIVY_IMAGE" >/dev/null 2>&1; then
    scanner=(docker run --rm --volume /var/run/docker.sock:/var/run/docker.sock --volume asr-trivy:/root/.cache "$TRIVY_IMAGE")
  else
    echo "SKIPPED  $image: neither trivy nor its image can be had"; skipped=1; continue
  fi
  "${scanner[@]}" image --scanners vuln --ignore-unfixed --severity HIGH,CRITICAL --exit-code 1 "$image" || failed=1
done
[ "$failed" = 0 ] || exit 1
[ "$strict" = 0 ] || [ "$skipped" = 0 ] || { echo "error: SCAN_STRICT=1 and something was skipped" >&2; exit 1; }

#!/usr/bin/env bash
# Sign the images that `make push` pushed, by digest, and attach the bill of materials; keyless, with cosign.
# usage: docker/sign.sh REGISTRY     reads build/KIND.metadata.json and build/sbom/KIND.cdx.json
set -euo pipefail
cd "$(dirname "$0")/.."
registry=${1:?usage: docker/sign.sh REGISTRY}
command -v cosign >/dev/null || { echo "error: needs cosign" >&2; exit 1; }
for kind in api ui; do
  digest=$(sed -n 's/.*"containerimage.digest": *"\(sha256:[0-9a-f]*\)".*/\1/p' "build/$kind.metadata.json" | head -1)
  [ -n "$digest" ] || { echo "error: build/$kind.metadata.json names no digest; push first" >&2; exit 1; }
  cosign sign --yes "$registry/asr-$kind@$digest"
  cosign attest --yes --type cyclonedx --predicate "build/sbom/$kind.cdx.json" "$registry/asr-$kind@$digest"
done

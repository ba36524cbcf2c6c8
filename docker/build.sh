#!/usr/bin/env bash
# Build one image of this project with BuildKit.
# usage: docker/build.sh api|ui|training|lambda [IMAGE_NAME]
#   BASE_IMAGE   base of the image          (default: docker/base.env, pinned by digest)
#   VERSION      tag and label              (default: version in pyproject.toml); a whole commit is a tag of 12 digits too
#   MODEL        bundle inside api, lambda   (default: en-moonshine-tiny)
#   PIP_CONF     pip.conf for a mirror or a proxy; a build secret, so no layer keeps it
#   CACHE=gha    use the runner's build cache (needs buildx)
#   PUSH=1       push; with buildx also attach an SBOM and the provenance, where the builder can
#   BUILD_ARGS   more words for the builder, for example --network=host
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?"usage: docker/build.sh api|ui|training|lambda [IMAGE_NAME]"}
name=${2:-asr-$kind}
file=docker/$kind.Dockerfile
[ "$kind" != lambda ] || file=serverless/Dockerfile
[ -f "$file" ] || { echo "error: there is no $file" >&2; exit 2; }

if [ -z "${BASE_IMAGE:-}" ]; then
  # shellcheck source=docker/base.env
  . docker/base.env
fi
VERSION=${VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}
REVISION=${REVISION:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
CREATED=${CREATED:-$(date -u +%Y-%m-%dT%H:%M:%SZ)}

# A client that builds with BuildKit: one with the buildx plugin, or one old enough to carry BuildKit itself.
docker_with_buildkit() {
  local client major
  while read -r client; do
    if "$client" buildx version >/dev/null 2>&1; then echo "$client buildx build --load"; return; fi
  done < <(type -ap docker | sort -u)
  while read -r client; do
    major=$("$client" version --format '{{.Client.Version}}' 2>/dev/null | cut -d. -f1)
    if [ "${major:-99}" -lt 23 ]; then echo "$client build"; return; fi
  done < <(type -ap docker | sort -u)
  return 1
}
# An SBOM and the provenance go beside an image; Docker's own builder has a place for them only in containerd's store.
can_attest() {
  case $("$1" buildx inspect 2>/dev/null | sed -n 's/^Driver: *//p') in
    docker) [[ $("$1" info --format '{{.DriverStatus}}' 2>/dev/null) == *io.containerd.snapshotter* ]] ;;
    *) true ;;
  esac
}
builder=$(docker_with_buildkit) || { echo "error: needs docker with the buildx plugin" >&2; exit 1; }
read -ra command <<<"$builder"

tags=("$name:$VERSION")
# Only where the build is named by the commit: a release of that commit is another image, and a tag never names two.
[[ $VERSION != "$REVISION"?* ]] || tags+=("$name:$REVISION")
arguments=(--file "$file" "${tags[@]/#/--tag=}"
  --build-arg "BASE_IMAGE=$BASE_IMAGE" --build-arg "VERSION=$VERSION"
  --build-arg "REVISION=$REVISION" --build-arg "CREATED=$CREATED")
case $kind in api | lambda) arguments+=(--build-arg "MODEL=${MODEL:-en-moonshine-tiny}") ;; esac
[ -z "${PIP_CONF:-}" ] || arguments+=(--secret "id=pip-conf,src=$PIP_CONF")
case $builder in
  *buildx*)
    [ -z "${CACHE:-}" ] || arguments+=(--cache-from "type=$CACHE,scope=$kind" --cache-to "type=$CACHE,mode=max,scope=$kind")
    if [ "${PUSH:-0}" = 1 ]; then
      command=("${command[@]/--load/--push}")
      mkdir -p build
      arguments+=(--metadata-file "build/$kind.metadata.json")
      if can_attest "${command[0]}"; then
        arguments+=(--sbom=true --provenance=mode=max)
      else
        echo "note: $name is pushed without SBOM and provenance, which this builder cannot attach" \
          "(\`docker buildx create --use\` makes one that can)" >&2
      fi
    elif [ "$kind" = lambda ]; then
      arguments+=(--sbom=false --provenance=false) # Lambda takes a plain image only
    fi
    ;;
esac
read -ra extra <<<"${BUILD_ARGS:-}"
DOCKER_BUILDKIT=1 "${command[@]}" "${arguments[@]}" "${extra[@]}" . || {
  status=$?
  # BuildKit's own words about a registry out of reach name neither.
  echo "error: $name was not built; without a registry within reach BASE_IMAGE=... names another base than $BASE_IMAGE," \
    "PIP_CONF=... a pip.conf for a mirror" >&2
  exit "$status"
}
if [ "${PUSH:-0}" = 1 ] && [[ $builder != *buildx* ]]; then
  for tag in "${tags[@]}"; do "${command[0]}" push "$tag"; done
fi

#!/usr/bin/env bash
# Deploy one version to Docker Compose on this machine, replica by replica, and go back when that fails.
# usage: docker/deploy.sh deploy VERSION | rollback | status
#   REGISTRY   where the images are, for example registry.example.org/asr (empty: local images)
#   REPLICAS   API replicas (default 3)      PARTS   parts of the stack (default base,api,ui)
# Each API container is stopped with its full grace period and replaced before the next one is touched, so
# all but one replica always serve. A replacement that does not get healthy ends the deployment.
set -euo pipefail
cd "$(dirname "$0")/.."
registry=${REGISTRY:-} replicas=${REPLICAS:-3} parts=${PARTS:-base,api,ui}
state=${DEPLOY_STATE:-build/deployed}
healthy_timeout_s=${HEALTHY_TIMEOUT_S:-120} stop_timeout_s=75
project=${COMPOSE_PROJECT_NAME:-asr}
mkdir -p "$state"

compose() { docker/compose.sh --part "$parts" "$@"; }
api_containers() { docker ps --quiet --no-trunc --filter "label=com.docker.compose.project=$project" --filter label=com.docker.compose.service=api; }

use_version() {
  export ASR_API_IMAGE=${registry:+$registry/}asr-api:$1 ASR_UI_IMAGE=${registry:+$registry/}asr-ui:$1
}

wait_healthy() { # COUNT: so many healthy API containers
  local deadline=$((SECONDS + healthy_timeout_s)) healthy
  while [ $SECONDS -lt $deadline ]; do
    healthy=$(docker ps --quiet --filter "label=com.docker.compose.project=$project" --filter label=com.docker.compose.service=api --filter health=healthy | wc -l)
    [ "$healthy" -lt "$1" ] || return 0
    sleep 1
  done
  echo "error: only $healthy of $1 replicas became healthy within $healthy_timeout_s s" >&2
  return 1
}

roll() { # VERSION
  local container old
  use_version "$1"
  old=$(api_containers)
  if [ -z "$old" ]; then
    compose up --detach --no-build --scale "api=$replicas"
    wait_healthy "$replicas"
    return
  fi
  for container in $old; do
    docker stop --time "$stop_timeout_s" "$container" >/dev/null
    docker rm "$container" >/dev/null
    compose up --detach --no-build --no-recreate --no-deps --scale "api=$replicas" api
    wait_healthy "$replicas" || return 1
  done
  # Everything else, gateway and page, follows its own image or file when that changed.
  compose up --detach --no-build --scale "api=$replicas" --no-recreate
  case ",$parts," in *,ui,*) compose up --detach --no-build --no-deps ui ;; esac
}

case ${1:-} in
  deploy)
    version=${2:?deploy needs a version}
    previous=$(cat "$state/current" 2>/dev/null || true)
    if roll "$version"; then
      [ -z "$previous" ] || [ "$previous" = "$version" ] || echo "$previous" >"$state/previous"
      echo "$version" >"$state/current"
      echo "deployed $version"
    elif [ -n "$previous" ]; then
      echo "error: $version failed; going back to $previous" >&2
      roll "$previous"
      exit 1
    else
      echo "error: $version failed and there is no earlier version to go back to" >&2
      exit 1
    fi
    ;;
  rollback)
    previous=$(cat "$state/previous" 2>/dev/null || true)
    [ -n "$previous" ] || { echo "error: no earlier version is known in $state" >&2; exit 1; }
    roll "$previous"
    echo "$previous" >"$state/current"
    rm -f "$state/previous"
    echo "rolled back to $previous"
    ;;
  status)
    echo "current:  $(cat "$state/current" 2>/dev/null || echo none)"
    echo "previous: $(cat "$state/previous" 2>/dev/null || echo none)"
    compose ps
    ;;
  *)
    sed -n '2,7s/^# //p' "$0" >&2
    exit 2
    ;;
esac

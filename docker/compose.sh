#!/usr/bin/env bash
# Run Compose over the whole stack, or over a part of it, with whatever Compose is installed.
# Compose 2.20 or later reads docker/compose.yml; an older one gets the same files one by one.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: docker/compose.sh [--part PART,...] COMMAND [ARGUMENT...]

Runs a command of Docker Compose (up, ps, logs, down, ...) with the files and settings of this stack.

  --part PART,...    of base, api, ui, monitoring (default: all)
  --help             this text; COMMAND --help is Compose's own

Environment:
  ENV_FILE        settings (default: .env)
  DEPLOY_STATE    a folder that stays: containers mount copies of their configuration from there, not the checkout's
EOF
}
refuse_call() { usage >&2; echo "error: $*" >&2; exit 2; }

parts=base,api,ui,monitoring
while [ $# -gt 0 ]; do
  case $1 in
    --part)
      parts=${2:?--part needs a comma list}
      shift 2
      ;;
    --help | -h) usage; exit 0 ;;
    -*) refuse_call "unknown option $1" ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || refuse_call "no command"
IFS=, read -ra names <<<"$parts"
for name in "${names[@]}"; do
  case $name in base | api | ui | monitoring) ;; *) refuse_call "there is no part $name" ;; esac
done
if docker compose version >/dev/null 2>&1; then
  compose=(docker compose)
elif command -v docker-compose >/dev/null; then
  compose=(docker-compose)
else
  echo "error: needs Docker Compose (the docker-compose-plugin package)" >&2
  exit 1
fi
case ${1:-} in
  # These make no container, and are wanted where no .env was written, too: compose reads Grafana's part all the same.
  down | events | exec | images | kill | logs | pause | port | ps | restart | rm | start | stop | top | unpause)
    export GRAFANA_ADMIN_PASSWORD=${GRAFANA_ADMIN_PASSWORD:-unused}
    ;;
esac
files=()
if [ "$parts" = base,api,ui,monitoring ] && [ "${compose[0]}" = docker ]; then
  files=(-f docker/compose.yml)
else
  for name in "${names[@]}"; do files+=(-f "docker/compose.$name.yml"); done
fi
[ ! -f "${ENV_FILE:-.env}" ] || files+=(--env-file "${ENV_FILE:-.env}")
if [ -z "${BASE_IMAGE:-}" ]; then
  # shellcheck source=docker/base.env
  . docker/base.env
  export BASE_IMAGE
fi
# Docker mounts these again at every start, when a CI server's checkout is long gone. Each copy is named by its
# content: what runs starts again with what it was started with, also when a deployment breaks off.
keep() { # PATH
  local sum copy
  if [[ $1 == "$kept"/* ]]; then # what runs, which a deployment goes back to
    touch "$1"
    printf '%s\n' "$1"
    return
  fi
  sum=$(find "$1" -type f -exec cksum {} + | sort | cksum)
  copy=$kept/${1##*/}-${sum%% *}
  if [ ! -e "$copy" ]; then
    rm -rf "$copy.new"
    cp -a "$1" "$copy.new"
    mv -T "$copy.new" "$copy"
  fi
  touch "$copy" # when it was last used: docker/deploy.sh removes old ones
  printf '%s\n' "$copy"
}
nginx_conf=${ASR_NGINX_CONF:-docker/nginx/nginx.conf}
ASR_NGINX_CONF_SUM=$(cksum <"$nginx_conf" | tr ' ' -)
export ASR_NGINX_CONF_SUM
if [ -n "${DEPLOY_STATE:-}" ]; then
  mkdir -p "$DEPLOY_STATE"
  kept=$(cd "$DEPLOY_STATE" && pwd)
  ASR_NGINX_CONF=$(keep "$nginx_conf")
  export ASR_NGINX_CONF
  case ,$parts, in
    *,monitoring,*)
      ASR_MONITORING=$(keep monitoring)
      export ASR_MONITORING
      ;;
  esac
fi
# shellcheck source=docker/check_settings.sh
. docker/check_settings.sh
exec "${compose[@]}" --project-name "${COMPOSE_PROJECT_NAME:-asr}" "${files[@]}" "$@"

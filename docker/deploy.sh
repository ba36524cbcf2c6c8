#!/usr/bin/env bash
# Deploy one version to Docker Compose on this machine, replica by replica, and go back when that fails.
# usage: docker/deploy.sh deploy VERSION | rollback | recover | scale | status | keep VERSION | forget VERSION
#   REGISTRY   where the images are, for example registry.example.org/asr (empty: local images)
#   REPLICAS   API replicas (default 3)      PARTS   parts of the stack (default base,api,ui)
#   ENV_FILE   settings (default .env)   DEPLOY_STATE  what is deployed (default build/deployed)
# recover takes back a deployment that was broken off, and does nothing where none was: a pipeline may always call it.
# scale starts or stops replicas of the version that runs, until there are REPLICAS. keep notes what `make up` started.
# forget removes a version's images, unless it is deployed or would be gone back to. A deployment that succeeds forgets the
# version two before it. Whatever goes back takes the settings of that time along; ENV_FILE is not written to.
# Each API container is stopped with its full grace period and replaced before the next one is touched, so
# all but one replica always serve. A replacement that does not get healthy ends the deployment. Nothing starts where
# the replicas that run ask for keys and new ones would not, unless ASR_ALLOW_ANONYMOUS=true says that this is meant.
set -euo pipefail
cd "$(dirname "$0")/.."
registry=${REGISTRY:-} replicas=${REPLICAS:-3} parts=${PARTS:-base,api,ui}
state=${DEPLOY_STATE:-build/deployed}
healthy_timeout_s=${HEALTHY_TIMEOUT_S:-120}
project=${COMPOSE_PROJECT_NAME:-asr}
mkdir -p "$state"
# shellcheck source=docker/setting.sh
. docker/setting.sh

compose() { docker/compose.sh --part "$parts" "$@"; }
containers() { # SERVICE [DOCKER_PS_ARGUMENTS...]
  local service=$1
  shift
  docker ps --quiet --no-trunc --filter "label=com.docker.compose.project=$project" \
    --filter "label=com.docker.compose.service=$service" "$@"
}
read_state() { cat "$state/$1" 2>/dev/null || true; }

running() { # SERVICE FORMAT: of one running container, a healthy one where there is one
  local found
  found=$(containers "$1" --filter health=healthy)
  [ -n "$found" ] || found=$(containers "$1")
  [ -z "$found" ] || docker inspect --format "$2" "${found%%$'\n'*}"
}
running_version() { # the tag of what runs, which `make up` wrote into no file
  local image
  image=$(running api '{{.Config.Image}}')
  case ${image##*/} in *@*) ;; *:*) echo "${image##*:}" ;; esac
}

refuse_to_lose_keys() { # a checkout without the operator's .env must not open the service
  local variables
  variables=$(running api '{{range .Config.Env}}{{println .}}{{end}}')
  grep -q '^ASR_API_KEYS\(_FILE\)\{0,1\}=.' <<<"$variables" || return 0
  [ -z "$(setting ASR_API_KEYS '')$(setting ASR_API_KEYS_FILE '')" ] || return 0
  [ "$(setting ASR_ALLOW_ANONYMOUS '')" != true ] || return 0
  echo "error: the replicas that run ask for keys, and ${ENV_FILE:-.env} and the environment name none: name the file of" \
    "their settings in ENV_FILE (an earlier version with the settings of now: docker/deploy.sh deploy VERSION), or set" \
    "ASR_ALLOW_ANONYMOUS=true to say that this is meant" >&2
  exit 1
}

keep_running_images() { # VERSION: tag what runs as VERSION-before; false where it is what would be deployed
  local service image id changed=1
  for service in api ui; do
    image=${registry:+$registry/}asr-$service
    id=$(running "$service" '{{.Image}}')
    [ -n "$id" ] || id=$image:$1
    [ "$(docker image inspect --format '{{.Id}}' "$id")" = "$(docker image inspect --format '{{.Id}}' "$image:$1")" ] || changed=0
    docker tag "$id" "$image:$1-before"
  done
  return "$changed"
}

gateway_conf() { # the copy of the configuration that the gateway runs with, where docker/compose.sh made one
  local path
  path=$(running gateway '{{range .Mounts}}{{if eq .Destination "/etc/nginx/nginx.conf"}}{{.Source}}{{end}}{{end}}')
  [[ $path != "$(cd "$state" && pwd)"/* ]] || echo "$path"
}

# What is replaced lies in "before", "before-conf" and "before-settings" until the deployment is over: one that was broken
# off can be taken back, too. Then it is what "previous" means, or gone. Settings hold keys: only their owner reads them.
settings_now() { [ ! -f "${ENV_FILE:-.env}" ] || cat "${ENV_FILE:-.env}"; }
keep() { # VERSION: it runs, with the settings of now
  echo "$1" >"$state/current"
  (umask 077 && settings_now >"$state/settings.new")
  mv "$state/settings.new" "$state/settings"
}
take_aside() { # VERSION CONF
  drop before
  [ ! -f "$state/settings" ] || cp -p "$state/settings" "$state/before-settings"
  echo "$2" >"$state/before-conf"
  echo "$1" >"$state/before" # last: with it the three are complete
}
rename() { # KIND TO
  drop "$2"
  local part
  for part in -settings -conf ''; do
    [ ! -f "$state/$1$part" ] || mv "$state/$1$part" "$state/$2$part"
  done
}
drop() { rm -f "$state/$1" "$state/$1-conf" "$state/$1-settings"; }
other_settings() { # FILE: whether it is known and has others than those of now
  [ -f "$1" ] && ! cmp -s "$1" <(settings_now)
}
note_settings() { # what runs has those that were kept
  ! other_settings "$state/settings" ||
    echo "note: ${ENV_FILE:-.env} is not what runs; the next deployment takes it. What runs has $state/settings" >&2
}
go_back() { # KIND: to it, with its settings
  local settings=$state/$1-settings
  if [ -f "$settings" ]; then
    ENV_FILE=$settings roll "$(read_state "$1")" "$(read_state "$1-conf")" || return
    cp -p "$settings" "$state/settings"
  else
    roll "$(read_state "$1")" "$(read_state "$1-conf")" || return
  fi
  read_state "$1" >"$state/current"
  note_settings
}

use_version() {
  export ASR_API_IMAGE=${registry:+$registry/}asr-api:$1 ASR_UI_IMAGE=${registry:+$registry/}asr-ui:$1
}

wait_healthy() { # COUNT: so many healthy API containers
  local deadline=$((SECONDS + healthy_timeout_s)) healthy=0 container
  while [ $SECONDS -lt $deadline ]; do
    healthy=$(containers api --filter health=healthy | wc -l)
    [ "$healthy" -lt "$1" ] || return 0
    sleep 1
  done
  echo "error: only $healthy of $1 replicas became healthy within $healthy_timeout_s s; what the others said last:" >&2
  # Now, because going back removes them.
  for container in $(comm -23 <(containers api | sort) <(containers api --filter health=healthy | sort)); do
    docker logs --tail 3 "$container" 2>&1 | sed 's/^/  /' >&2
  done
  return 1
}

roll() { # VERSION [CONF]   Every step says `|| return`: the caller's `if` turns `set -e` off in here.
  local container old others
  use_version "$1"
  if [ -n "${2:-}" ] && [ -f "$2" ]; then export ASR_NGINX_CONF=$2; fi
  old=$(containers api) || return
  if [ -z "$old" ]; then
    compose up --detach --no-build --scale "api=$replicas" || return
    wait_healthy "$replicas"
    return
  fi
  for container in $old; do
    # No --time: the container carries the grace period of its Compose file.
    docker stop "$container" >/dev/null || return
    docker rm "$container" >/dev/null || return
    compose up --detach --no-build --no-recreate --no-deps --scale "api=$replicas" api || return
    wait_healthy "$replicas" || return
  done
  # What is missing starts; gateway and page also follow their own image or settings when those changed.
  compose up --detach --no-build --scale "api=$replicas" --no-recreate || return
  others=(gateway)
  case ",$parts," in *,ui,*) others+=(ui) ;; esac
  compose up --detach --no-build --no-deps "${others[@]}"
}

forget() { # VERSION: remove its images, unless a deployment or a rollback needs them
  local version=$1 tags service name
  tags=("$version")
  [[ ! $version =~ ^[0-9a-f]{40}$ ]] || tags+=("${version:0:12}") # docker/build.sh names a commit twice
  case $version in '' | "$(read_state current)" | "$(read_state previous)") return ;; esac
  for service in api ui; do
    for name in "${tags[@]/#/${registry:+$registry/}asr-$service:}"; do
      if docker image inspect "$name" >/dev/null 2>&1; then
        docker image rm "$name" >/dev/null || echo "warning: $name stays" >&2
      fi
    done
  done
}

forget_copies() { # what docker/compose.sh copied: keep the last two of each kind, and what any container mounts
  local containers mounted='' copy kind
  local -A seen=()
  rm -rf "$state"/*.new
  containers=$(docker ps --all --quiet --no-trunc) || return 0
  # shellcheck disable=SC2086  # one id each
  [ -z "$containers" ] || mounted=$(docker inspect --format '{{range .Mounts}}{{println .Source}}{{end}}' $containers) || return 0
  while read -r _ copy; do
    kind=${copy%-*}
    seen[$kind]=$((${seen[$kind]:-0} + 1))
    [ "${seen[$kind]}" -le 2 ] || [[ $mounted == *"/$copy"* ]] || rm -rf "${state:?}/$copy"
  done < <(find "$state" -mindepth 1 -maxdepth 1 -regex '.*-[0-9]+' -printf '%T@ %f\n' | sort -rn)
}

case ${1:-} in
  deploy)
    version=${2:?deploy needs a version}
    refuse_to_lose_keys
    broken_off=1
    if [ ! -f "$state/before" ]; then
      broken_off=0
      before=$(read_state current)
      [ -n "$before" ] || before=$(running_version)
      # A build may carry the version that runs already: another tag keeps the old images, to go back to.
      if [ "$before" = "$version" ] && [ -n "$(running api '{{.Image}}')" ] && keep_running_images "$version"; then
        before=$version-before
      fi
      [ -z "$before" ] || take_aside "$before" "$(gateway_conf)"
    fi
    before=$(read_state before)
    rm -f "$state/failed"
    use_version "$version"
    # nginx would end at once, again and again, and Compose not notice it.
    if ! compose run --rm -T --no-deps gateway nginx -t -q -c /etc/nginx/nginx.conf; then
      echo "$version" >"$state/failed"
      [ "$broken_off" = 1 ] || drop before
      echo "error: the gateway does not start with the configuration of $version; nothing was changed" >&2
      exit 1
    fi
    can_go_back=0
    if [ -n "$before" ] && { [ "$before" != "$version" ] || other_settings "$state/before-settings"; }; then can_go_back=1; fi
    if roll "$version"; then
      oldest=$(read_state previous)
      if [ "$can_go_back" = 1 ]; then rename before previous; else drop before; fi
      keep "$version"
      forget "$oldest"
      forget_copies
      echo "deployed $version"
      exit
    fi
    echo "$version" >"$state/failed"
    if [ "$can_go_back" = 0 ]; then
      drop before
      echo "error: $version failed and there is no earlier version to go back to" >&2
      exit 1
    fi
    with=''
    [ ! -f "$state/before-settings" ] || with=' with the settings that it had'
    echo "error: $version failed; going back to $before$with" >&2
    echo "$before" >"$state/current"
    if go_back before; then
      drop before
    else
      # Then a rollback has something to do after all.
      rm "$state/failed"
      rename before previous
      echo "error: going back to $before failed too; mend what is said above, then: docker/deploy.sh rollback" >&2
    fi
    exit 1
    ;;
  rollback | recover)
    kind=previous
    if [ -f "$state/before" ]; then
      kind=before
      echo "a deployment broke off; going back to what ran before it"
    elif [ "$1" = recover ]; then
      echo "no deployment broke off; $(read_state current) stays"
      exit
    fi
    version=$(read_state "$kind")
    failed=$(read_state failed)
    if [ -n "$failed" ] && [ "$kind" = previous ]; then
      echo "nothing to roll back: $failed failed and was taken away again; $(read_state current) is deployed"
      [ -z "$version" ] || echo "further back: docker/deploy.sh deploy $version"
      exit
    fi
    [ -n "$version" ] || { echo "error: no earlier version is known in $state" >&2; exit 1; }
    if [ -f "$state/$kind-settings" ]; then
      ENV_FILE=$state/$kind-settings refuse_to_lose_keys
    else
      refuse_to_lose_keys
    fi
    go_back "$kind"
    drop "$kind"
    echo "rolled back to $version"
    ;;
  scale)
    note_settings
    [ ! -f "$state/settings" ] || export ENV_FILE=$state/settings # a new replica is like those that run
    refuse_to_lose_keys
    ASR_API_IMAGE=$(running api '{{.Config.Image}}')
    [ -n "$ASR_API_IMAGE" ] || { echo "error: no replica runs; start the stack with make up" >&2; exit 1; }
    export ASR_API_IMAGE
    compose up --detach --no-build --no-recreate --no-deps --scale "api=$replicas" api
    wait_healthy "$replicas"
    ;;
  keep)
    version=${2:?keep needs a version}
    before=$(read_state current)
    if [ -n "$before" ] && { [ "$before" != "$version" ] || other_settings "$state/settings"; }; then
      take_aside "$before" ''
      rename before previous
    fi
    drop before
    rm -f "$state/failed"
    keep "$version"
    ;;
  forget) forget "${2:?forget needs a version}" ;;
  status)
    echo "current:  $(read_state current)"
    echo "previous: $(read_state previous)"
    compose ps
    ;;
  *)
    sed -n '2,14s/^# //p' "$0" >&2
    exit 2
    ;;
esac

#!/bin/bash
# A docker that only remembers: containers and every command, in the folder FAKE_DOCKER. It understands what
# docker/deploy.sh asks, with nothing but the shell's own commands, because a deployment asks often.
# Containers are files NUMBER-SERVICE with the lines image, image id, the variable of the keys, a mounted path and one setting.
# The images named in FAKE_BROKEN (by id, between spaces) never get healthy, nor does what has FAKE_BROKEN_SETTING; a command that
# begins with FAKE_REFUSES fails.
started_in=$PWD
cd "$FAKE_DOCKER" || exit
mkdir -p containers images 2>/dev/null
printf '%s\n' "$*" >>calls
[ -z "${FAKE_REFUSES:-}" ] || [[ "$*" != "$FAKE_REFUSES"* ]] || exit 1

image_id() { # NAME or id: into $id
  local file=images/${1//\//_}
  id=sha256:${1#sha256:}
  [ ! -e "$file" ] || id=$(<"$file")
}
read_container() { { read -r image && read -r id && read -r keys && read -r mount && { read -r setting || true; }; } <"$1"; }
read_setting() { # COMPOSE_ARGUMENTS...: from the file that Compose is given, into $setting
  local word line file=''
  setting=''
  for word; do
    [ "$file" != next ] || file=$word
    [ "$word" != --env-file ] || file=next
  done
  case $file in '' | /*) ;; *) file=$started_in/$file ;; esac
  [ -f "$file" ] || return 0
  while read -r line; do [[ $line != ASR_QUEUE_LIMIT_AUDIO_S=* ]] || setting=${line#*=}; done <"$file"
}
image_of_service() { # SERVICE: into $wanted, with what it mounts into $mounts
  mounts=''
  [ "$1" != gateway ] || mounts=${ASR_NGINX_CONF:-}
  case $1 in api) wanted=$ASR_API_IMAGE ;; ui) wanted=$ASR_UI_IMAGE ;; *) wanted=$1 ;; esac
}
newest_first() { # SERVICE: into the array found
  local i all
  shopt -s nullglob
  # shellcheck disable=SC2206  # * for all services
  all=(containers/*-$1)
  found=()
  for ((i = ${#all[@]} - 1; i >= 0; i--)); do found+=("${all[i]}"); done
}
up() {
  local word count replicas=1 named=() recreate=1 service file
  for word; do
    case $word in
      api=*) replicas=${word#api=} ;;
      api | gateway | ui) named+=("$word") ;;
      --no-recreate) recreate=0 ;;
    esac
  done
  [ ${#named[@]} -gt 0 ] || named=(api gateway ui)
  for service in "${named[@]}"; do
    count=1
    [ "$service" != api ] || count=$replicas
    image_of_service "$service"
    newest_first "$service"
    if [ "$recreate" = 1 ]; then
      for file in "${found[@]}"; do
        read_container "$file"
        [[ "$image" = "$wanted" && "$mount" = "$mounts" ]] || rm "$file"
      done
      newest_first "$service"
    fi
    for ((; count > ${#found[@]}; count--)); do
      next=$(($(<next) + 1))
      printf '%s' "$next" >next
      image_id "$wanted"
      read_setting "$@"
      printf '%s\n%s\nASR_API_KEYS=%s\n%s\n%s\n' "$wanted" "$id" "${ASR_API_KEYS:-}" "$mounts" "$setting" >"containers/$((1000 + next))-$service"
    done
  done
}

[ -e next ] || printf 0 >next
case $1 in
  compose) for word; do [ "$word" != up ] || up "$@"; done ;;
  ps)
    line=$*
    service='*' # of all containers
    [[ "$line" != *compose.service=* ]] || service=${line##*compose.service=}
    newest_first "${service%% *}"
    for file in "${found[@]}"; do
      read_container "$file"
      [[ "$*" != *health=healthy* || " ${FAKE_BROKEN:-} " != *" $id "* ]] || continue
      [[ "$*" != *health=healthy* || -z "${FAKE_BROKEN_SETTING:-}" || "$setting" != "$FAKE_BROKEN_SETTING" ]] || continue
      printf '%s\n' "${file#containers/}"
    done
    ;;
  inspect)
    if [[ "$*" == *.Mounts* ]]; then
      for word in "${@:4}"; do
        read_container "containers/$word"
        printf '%s\n' "$mount"
      done
      exit
    fi
    read_container "containers/${*: -1}"
    case $* in *.Config.Image*) printf '%s\n' "$image" ;; *.Config.Env*) printf '%s\n' "$keys" ;; *) printf '%s\n' "$id" ;; esac
    ;;
  image)
    image_id "${*: -1}"
    printf '%s\n' "$id"
    ;;
  logs) echo 'asr: what was wrong' ;;
  rm) rm "containers/${*: -1}" ;;
  tag) # an id or a name becomes NAME
    image_id "$2"
    printf '%s' "$id" >"images/${3//\//_}"
    ;;
esac

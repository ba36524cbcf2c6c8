# shellcheck shell=bash
# Sourced by docker/deploy.sh and docker/check_settings.sh, which run in the repository root.

setting() { # NAME DEFAULT: as Compose takes it, from the environment or else from the env file
  local file=${ENV_FILE:-.env} value=${!1:-}
  if [ -z "${!1+set}" ] && [ -f "$file" ]; then
    value=$(sed -n "s/^\(export \)\{0,1\}$1=//p" "$file" | tail -n 1)
    case $value in
      \"*\") value=${value#\"} value=${value%\"} ;;
      \'*\') value=${value#\'} value=${value%\'} ;;
      *) value=${value%% #*} ;;
    esac
  fi
  printf '%s\n' "${value:-$2}"
}

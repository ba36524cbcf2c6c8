#!/usr/bin/env bash
# Write the .env that Compose reads: settings from .env.example, secrets at random, mode 0600.
# usage: docker/make_env.sh [FILE]     A file that is there is left alone; missing secrets are added to it.
set -euo pipefail
cd "$(dirname "$0")/.."
file=${1:-.env}
umask 077
secret() { head -c 24 /dev/urandom | base64 | tr '+/' '-_'; }
touch "$file"
chmod 600 "$file"
add() { # NAME VALUE: append unless the file sets it already
  grep -q "^$1=." "$file" || { sed -i "/^$1=\$/d" "$file"; printf '%s=%s\n' "$1" "$2" >>"$file"; echo "$file: added $1"; }
}
add GRAFANA_ADMIN_USER operator
add GRAFANA_ADMIN_PASSWORD "$(secret)"
add OTEL_EXPORTER_OTLP_ENDPOINT http://otel-collector:4317
add ASR_UI_OTLP_ENDPOINT http://otel-collector:4318
add ASR_UI_GRAFANA_URL http://127.0.0.1:3000
add ASR_UI_JAEGER_URL http://127.0.0.1:16686

#!/usr/bin/env bash
# Run docker/smoke.py against what is deployed, where callers from outside find it.
# usage: docker/smoke.sh compose | kubernetes [SMOKE_PY_ARGUMENTS...]
#   URL       the API's address, instead of the one that is found; then the page is not asked
#   kubernetes: KUBECONFIG   the cluster (default: the one that k8s/setup.sh deployed to last, or else Terraform's)
#   compose:  ENV_FILE   settings (default .env)      PARTS   parts of the stack (default base,api,ui)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=docker/setting.sh
. docker/setting.sh

published() { # ADDRESS PORT: as URL. For every address: one of this machine's own, since others do not come by loopback
  local address=$1
  case $address in
    0.0.0.0 | :: | '[::]')
      address=$(hostname -I 2>/dev/null | cut -d ' ' -f 1)
      address=${address:-127.0.0.1}
      ;;
  esac
  case $address in \[*) ;; *:*) address="[$address]" ;; esac
  echo "http://$address:$2"
}
public_address() { # SERVICE: of its load balancer, or nothing
  kube --namespace asr-system get service "$1" --ignore-not-found \
    --output=jsonpath='{.status.loadBalancer.ingress[0].ip}{.status.loadBalancer.ingress[0].hostname}'
}
is_internal() { # SERVICE: has it an address inside the cluster only, as in overlays/dev?
  [ "$(kube --namespace asr-system get service "$1" --ignore-not-found --output=jsonpath='{.spec.type}')" = ClusterIP ]
}
forward() { # SERVICE: set url to a port of this machine that leads there, until this script ends
  local port=''
  said=$(mktemp)
  # Not by kube(): the process to end is kubectl, not a shell that waits for it.
  kubectl ${KUBECONFIG_FILE:+--kubeconfig "$KUBECONFIG_FILE"} --namespace asr-system port-forward "service/$1" :80 >"$said" &
  forwarding=$!
  trap 'kill "$forwarding" 2>/dev/null || true; rm -f "$said"' EXIT
  for _ in {1..50}; do
    port=$(sed -n 's/^Forwarding from 127\.0\.0\.1:\([0-9]*\) .*/\1/p' "$said")
    [ -z "$port" ] || break
    kill -0 "$forwarding" 2>/dev/null || break
    sleep 0.2
  done
  [ -n "$port" ] || fail "kubectl forwards no port to the service $1"
  url=http://127.0.0.1:$port
}

url=${URL:-} page='' where=${1:-}
shift || true
case $where in
  compose)
    if [ -z "$url" ]; then
      url=$(published "$(setting ASR_PUBLISH_ADDRESS 127.0.0.1)" "$(setting ASR_API_PORT 8000)")
      case ,${PARTS:-base,api,ui}, in
        *,ui,*) page=$(published "$(setting ASR_UI_PUBLISH_ADDRESS 127.0.0.1)" "$(setting ASR_UI_PORT 8501)") ;;
      esac
    fi
    ;;
  kubernetes)
    if [ -z "$url" ]; then
      # shellcheck source=k8s/lib.sh
      . k8s/lib.sh
      # As k8s/setup.sh does, and not whichever cluster kubectl is at.
      if [ -z "${KUBECONFIG:-}" ]; then
        KUBECONFIG_FILE=$(recorded_kubeconfig)
        [ -n "$KUBECONFIG_FILE" ] || { command -v terraform >/dev/null && terraform_kubeconfig; } ||
          fail "nothing was deployed from here; name the cluster or the address: make smoke-k8s KUBECONFIG=... or URL=..."
      fi
      found=$(public_address asr-api)
      if [ -n "$found" ]; then
        url=http://$found
      elif is_internal asr-api; then
        forward asr-api
      else
        fail "the service asr-api has no public address; name one: make smoke-k8s URL=..."
      fi
      page=$(public_address asr-ui)
      page=${page:+http://$page}
    fi
    ;;
  *)
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
    ;;
esac
python3 docker/smoke.py --url "$url" ${page:+--page "$page"} "$@"

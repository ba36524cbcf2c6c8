#!/usr/bin/env bash
# Run docker/smoke.py against what is deployed, where callers from outside find it.
# usage: docker/smoke.sh compose | kubernetes [SMOKE_PY_ARGUMENTS...]
#   URL       the API's address, instead of the one that is found; then the page is not asked
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
  kubectl --namespace asr-system get service "$1" --ignore-not-found \
    --output=jsonpath='{.status.loadBalancer.ingress[0].ip}{.status.loadBalancer.ingress[0].hostname}'
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
      url=$(public_address asr-api)
      [ -n "$url" ] || { echo "error: the service asr-api has no public address; name one: make smoke-k8s URL=..." >&2; exit 1; }
      url=http://$url
      page=$(public_address asr-ui)
      page=${page:+http://$page}
    fi
    ;;
  *)
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
    ;;
esac
exec python3 docker/smoke.py --url "$url" ${page:+--page "$page"} "$@"

# shellcheck shell=bash
# Sourced by docker/compose.sh: settings that have to fit together, held before anything starts. It decides
# ASR_ALLOW_ANONYMOUS and ASR_STOP_GRACE_PERIOD where nobody did. Commands that start nothing are not refused.

# shellcheck source=docker/setting.sh
. docker/setting.sh
is_loopback() { case $1 in 127.* | localhost | ::1 | '[::1]') ;; *) return 1 ;; esac; }
at_least() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a + 0 >= b + 0) }'; }

starts=0
# shellcheck disable=SC2154  # parts and the arguments are compose.sh's
case ,$parts, in
  *,api,* | *,ui,*)
    for argument; do
      case $argument in up | create | run) starts=1 && break ;; esac
    done
    ;;
esac
refuse() {
  [ "$starts" = 1 ] || return 0
  echo "error: $*" >&2
  exit 1
}

publish=$(setting ASR_PUBLISH_ADDRESS 127.0.0.1)
page=$(setting ASR_UI_PUBLISH_ADDRESS 127.0.0.1)
keys=$(setting ASR_API_KEYS '')$(setting ASR_API_KEYS_FILE '')
page_key=$(setting ASR_API_KEY '')
anonymous=$(setting ASR_ALLOW_ANONYMOUS '')
if [ -z "$anonymous" ] && is_loopback "$publish" && is_loopback "$page"; then
  # Only the gateway reaches the replicas, and only this machine reaches the gateway.
  anonymous=true
  export ASR_ALLOW_ANONYMOUS=true
fi
if [ -z "$keys" ] && [ "$anonymous" != true ]; then
  refuse "the service is published on $publish, the page on $page, and there is no key: set ASR_API_KEYS, and" \
    "ASR_API_KEY for the page, or ASR_ALLOW_ANONYMOUS=true to say that this is meant"
fi
if [ "$starts" = 1 ] && [ -n "$keys" ] && [ -z "$page_key" ]; then
  echo "warning: ASR_API_KEY is not set: the service will refuse the page; give it one of ASR_API_KEYS" >&2
fi
if [ "$starts" = 1 ] && [ -n "$page_key" ] && ! is_loopback "$page"; then
  echo "warning: the page on $page asks nobody for a key and uses its own: put a login in front" >&2
fi

# shellcheck disable=SC2154  # nginx_conf is compose.sh's as well
read_timeout_s=$(sed -n 's/.*proxy_read_timeout \([0-9]*\)s;.*/\1/p' "$nginx_conf")
request_timeout_s=$(setting ASR_REQUEST_TIMEOUT_S 300)
! at_least "$request_timeout_s" "$read_timeout_s" ||
  refuse "ASR_REQUEST_TIMEOUT_S=$request_timeout_s is not below the gateway's proxy_read_timeout of" \
    "$read_timeout_s s: raise that in docker/nginx/nginx.conf first"
# An upload comes in a form, so its body is larger than the file. The defaults are those of api/settings.py.
body_limit_bytes=$(sed -n 's/.*client_max_body_size \([0-9]*\)m;.*/\1/p' "$nginx_conf")
body_limit_bytes=$((body_limit_bytes << 20))
for limit in ASR_MAX_UPLOAD_BYTES:26214400 ASR_MAX_BODY_BYTES:268435456; do
  bytes=$(setting "${limit%:*}" "${limit#*:}")
  ! at_least "$bytes" "$body_limit_bytes" ||
    refuse "${limit%:*}=$bytes is not below the gateway's client_max_body_size of $body_limit_bytes bytes:" \
      "raise that in docker/nginx/nginx.conf first"
done

# A stop takes the grace, at most 30 s for the last scrape, and the draining; 12 s on top to flush the traces.
ASR_STOP_GRACE_PERIOD=$(awk -v grace="$(setting ASR_DRAIN_GRACE_S 3)" -v drain="$(setting ASR_DRAIN_TIMEOUT_S 60)" \
  'BEGIN { printf "%.0fs", grace + 30 + drain + 12 }')
export ASR_STOP_GRACE_PERIOD

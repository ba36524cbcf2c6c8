#!/usr/bin/env bash
# Print what Kubernetes needs of monitoring/: one PrometheusRule with every rule and alert, one ConfigMap per
# dashboard for Grafana's sidecar, the ServiceMonitor. The files under monitoring/ stay the only source.
# usage: k8s/monitoring/render.sh > manifests.yaml     needs kubectl, client side only
set -euo pipefail
cd "$(dirname "$0")/../.."
namespace=monitoring

# A rule file is a mapping whose only key is `groups`; its list is indented under spec.groups.
cat <<EOF
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: asr
  namespace: $namespace
  labels:
    app.kubernetes.io/part-of: asr
spec:
  groups:
EOF
for file in monitoring/prometheus/rules/*.yml monitoring/prometheus/alerts/*.yml; do
  if ! awk '/^[^ #-]/ && !/^groups:[ ]*$/ {bad = 1} END {exit bad}' "$file"; then
    echo "error: $file has a top-level key besides groups" >&2
    exit 1
  fi
  grep -v '^groups:' "$file" | sed 's/^\(.\)/  \1/'
done

for file in monitoring/grafana/dashboards/*.json; do
  [ -e "$file" ] || continue
  name=$(basename "$file" .json)
  echo ---
  kubectl create configmap "dashboard-$name" --namespace "$namespace" --from-file="$name.json=$file" \
    --dry-run=client --output=yaml |
    kubectl label --local --filename=- --output=yaml grafana_dashboard=1 app.kubernetes.io/part-of=asr |
    kubectl annotate --local --filename=- --output=yaml grafana_folder=ASR
done
echo ---
cat k8s/monitoring/service-monitor.yaml

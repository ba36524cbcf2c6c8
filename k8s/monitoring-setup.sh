#!/usr/bin/env bash
# Prometheus, Alertmanager, Grafana, both metrics APIs of the autoscalers and Jaeger on the cluster, with this project's
# rules, alerts and dashboards. Safe to repeat: Helm upgrades what is there, secrets are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=k8s/lib.sh
. k8s/lib.sh
# shellcheck source=k8s/monitoring/versions.env
. k8s/monitoring/versions.env

usage() {
  cat <<'EOF'
usage: k8s/monitoring-setup.sh [options]

Installs kube-prometheus-stack, prometheus-adapter and, where the cluster has no metrics API, metrics-server into
`monitoring` and Jaeger into `observability`, with the values in k8s/monitoring, then the rules, alerts and
dashboards generated from monitoring/.

  --kubeconfig FILE      use this cluster (default: ask Terraform's state, as setup.sh does)
  --storage-class NAME   of Prometheus's volume (default: do-block-storage)
  --timeout SECONDS      for each chart (default: 600)
  --dry-run              show every step, change nothing, contact nothing
  --help                 this text

Alert receivers: create the secret monitoring/alertmanager-receivers with the files pagerduty_routing_key and
slack_webhook_url first; without it an empty one is made and alerts show on the pages only.

environment: DIGITALOCEAN_TOKEN, where there is no --kubeconfig
EOF
}

storage_class=do-block-storage timeout_s=600
while [ $# -gt 0 ]; do
  case $1 in
    --storage-class) storage_class=${2:?--storage-class needs a name}; shift 2 ;;
    *) common_option "$@"; shift "$words" ;;
  esac
done

say "Tools"
if [ -n "$KUBECONFIG_FILE" ]; then
  require_tools kubectl helm
  [ "$DRY_RUN" = 1 ] || [ -r "$KUBECONFIG_FILE" ] || fail "cannot read $KUBECONFIG_FILE"
else
  require_tools terraform doctl kubectl helm
  authenticate
  if [ "$DRY_RUN" = 1 ]; then
    note "[dry-run] terraform -chdir=terraform output -raw kubeconfig_path"
  else
    terraform_kubeconfig || fail "Terraform has no cluster; name one with --kubeconfig"
  fi
fi
say "Cluster"
name_cluster
[ "$DRY_RUN" = 1 ] || kube version --output=yaml >/dev/null || fail "the API server does not answer"
cluster=() helm_arguments=(--wait --timeout "${timeout_s}s")
[ -z "$KUBECONFIG_FILE" ] || cluster=(--kubeconfig "$KUBECONFIG_FILE")
for each in metrics-server/monitoring kube-prometheus-stack/monitoring prometheus-adapter/monitoring jaeger/observability; do
  if foreign_release "${each%/*}" "${each#*/}"; then
    fail "$server has a release ${each%/*} in ${each#*/} that is not this project's (no label $OURS); nothing was changed." \
      "If it may be taken over: kubectl -n ${each#*/} label secret -l owner=helm,name=${each%/*} $OURS"
  fi
done

say "Namespaces and secrets"
apply_namespaces
make_secret monitoring grafana-admin "admin-user=operator" "admin-password=$(random_secret)"
make_secret monitoring alertmanager-receivers "pagerduty_routing_key=" "slack_webhook_url="
# The operator mounts the receivers' secret one folder deeper than Compose does.
sed 's#/etc/alertmanager/secrets/#/etc/alertmanager/secrets/alertmanager-receivers/#' monitoring/alertmanager/alertmanager.yml |
  kubectl create secret generic asr-alertmanager --namespace monitoring --from-file=alertmanager.yaml=/dev/stdin \
    --dry-run=client --output=yaml | apply_stdin

chart() { # RELEASE NAMESPACE CHART REPOSITORY VERSION VALUES [HELM_ARGUMENTS...]
  local release=$1 namespace=$2 chart=$3 repository=$4 version=$5 values=$6
  shift 6
  say "$release $version"
  # A run that was killed leaves the release pending, and Helm then refuses every upgrade.
  if is_pending "$release" "$namespace"; then
    note "$release: an earlier run was interrupted; back to what was there before"
    helm rollback "$release" --namespace "$namespace" "${helm_arguments[@]}" "${cluster[@]}" ||
      helm uninstall "$release" --namespace "$namespace" "${helm_arguments[@]}" "${cluster[@]}"
  fi
  run helm upgrade --install "$release" "$chart" --repo "$repository" --version "$version" \
    --namespace "$namespace" --labels "$OURS" --values "$values" "${helm_arguments[@]}" "${cluster[@]}" "$@"
}
# DigitalOcean brings no metrics API, and without one the autoscalers never see a pod's CPU. One that is there is kept.
if exists apiservice v1beta1.metrics.k8s.io && ! has_release metrics-server monitoring; then
  say "metrics-server"
  note "the cluster has a metrics API already, which is kept"
else
  chart metrics-server monitoring metrics-server https://kubernetes-sigs.github.io/metrics-server "$METRICS_SERVER_VERSION" \
    /dev/null --set resources.requests.cpu=20m,resources.requests.memory=64Mi
fi
community=https://prometheus-community.github.io/helm-charts
chart kube-prometheus-stack monitoring kube-prometheus-stack "$community" "$KUBE_PROMETHEUS_STACK_VERSION" \
  k8s/monitoring/kube-prometheus-stack-values.yaml \
  --set "prometheus.prometheusSpec.storageSpec.volumeClaimTemplate.spec.storageClassName=$storage_class"
chart prometheus-adapter monitoring prometheus-adapter "$community" "$PROMETHEUS_ADAPTER_VERSION" \
  k8s/monitoring/prometheus-adapter-values.yaml
chart jaeger observability jaeger https://jaegertracing.github.io/helm-charts "$JAEGER_VERSION" \
  k8s/monitoring/jaeger-values.yaml

say "Rules, alerts and dashboards (monitoring/)"
k8s/monitoring/render.sh | apply_stdin

say "Addresses"
kubectl_command=kubectl${KUBECONFIG_FILE:+ --kubeconfig $KUBECONFIG_FILE}
note "Grafana:    $kubectl_command -n monitoring port-forward service/kube-prometheus-stack-grafana 3000:80"
note "  user operator, password: $kubectl_command -n monitoring get secret grafana-admin -o jsonpath='{.data.admin-password}' | base64 -d"
note "Prometheus: $kubectl_command -n monitoring port-forward service/kube-prometheus-stack-prometheus 9090:9090"
note "Jaeger:     $kubectl_command -n observability port-forward service/jaeger 16686:16686"

#!/usr/bin/env bash
# Take away what setup.sh and monitoring-setup.sh made. Safe to repeat: what is gone stays gone.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=k8s/lib.sh
. k8s/lib.sh

usage() {
  cat <<'EOF'
usage: k8s/teardown.sh [options]

Deletes the application, then monitoring, then the cluster with Terraform. Load balancers and volumes are
deleted by Kubernetes before the cluster goes; otherwise they would go on costing money.

  --only app|monitoring   stop after that part; the cluster stays
  --kubeconfig FILE       use this cluster and never touch Terraform
  --yes                   do not ask
  --timeout SECONDS       for each deletion (default: 300)
  --dry-run               show every step, change nothing, contact nothing
  --help                  this text
EOF
}

only='' yes=0 timeout_s=300 terraform=1 in_cluster=1
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=${2:?--only needs app or monitoring}; shift 2 ;;
    --yes) yes=1; shift ;;
    *) common_option "$@"; shift "$words" ;;
  esac
done
[ -z "$KUBECONFIG_FILE" ] || terraform=0
[[ -z $only || $only == app || $only == monitoring ]] || fail "--only is app or monitoring, not $only"
[ -z "$only" ] || terraform=0

say "Tools"
tools=(kubectl)
[ "$only" = app ] || tools+=(helm)
[ -n "$KUBECONFIG_FILE" ] || tools+=(terraform doctl)
require_tools "${tools[@]}"
if [ -z "$KUBECONFIG_FILE" ]; then
  authenticate
  run terraform -chdir=terraform init -input=false
  if [ "$DRY_RUN" = 1 ]; then
    note "[dry-run] terraform -chdir=terraform output -raw kubeconfig_path"
  elif ! terraform_kubeconfig; then
    # An apply that failed half-way leaves what costs money in the state, and none of the outputs.
    state=$(terraform -chdir=terraform state pull) || fail "cannot read Terraform's state"
    if [[ $state != *'"mode": "managed"'* ]]; then
      note "Terraform knows no cluster; nothing is left to delete"
      exit 0
    fi
    note "Terraform did not finish the cluster; nothing runs in it"
    in_cluster=0
  fi
fi
[ "$in_cluster" = 0 ] || name_cluster
if [ "$yes" = 0 ] && [ "$DRY_RUN" = 0 ]; then
  what=${only:-the application and monitoring with its data}
  [ "$terraform" = 0 ] || what+=', and what Terraform made: the cluster, the registry with its images'
  [ "$in_cluster" = 0 ] || what+=" (on $server)"
  ask "Delete $what?"
fi
# What setup.sh and monitoring-setup.sh have not made is left, and so is the namespace that it is in.
delete_namespace() {
  if foreign_namespace "$1"; then
    note "namespace $1 is not this project's (no label $OURS) and is left"
    left=1
  elif [[ " $kept " == *" $1 "* ]]; then
    note "namespace $1 is left for what is in it"
  else
    run kube delete namespace "$1" --ignore-not-found --timeout="${timeout_s}s"
  fi
}
kept='' left=0
uninstall() { # RELEASE NAMESPACE
  if foreign_release "$1" "$2"; then
    note "release $1 in $2 is not this project's (no label $OURS) and is left"
    kept+=" $2" left=1
  elif [ "$DRY_RUN" = 1 ] || has_release "$1" "$2"; then
    run helm uninstall "$1" --namespace "$2" ${KUBECONFIG_FILE:+--kubeconfig "$KUBECONFIG_FILE"} --wait --timeout "${timeout_s}s"
  fi
}

if [ "$in_cluster" = 1 ] && [ "$only" != monitoring ]; then
  say "Application"
  # Services first: their load balancers are released while the cloud controller still runs.
  foreign_namespace asr-system || run kube delete service --all --namespace asr-system --ignore-not-found --timeout="${timeout_s}s"
  delete_namespace asr-system
fi
if [ "$in_cluster" = 1 ] && [ "$only" != app ]; then
  say "Monitoring"
  uninstall jaeger observability
  uninstall prometheus-adapter monitoring
  uninstall metrics-server monitoring
  uninstall kube-prometheus-stack monitoring
  delete_namespace observability
  delete_namespace monitoring
fi
if [ "$terraform" = 1 ]; then
  say "Cluster (terraform/)"
  [ "$left" = 0 ] || fail "the cluster has what is not this project's, which would go with it, and stays;" \
    "to destroy it all the same: terraform -chdir=terraform destroy"
  run terraform -chdir=terraform destroy -input=false -auto-approve
fi
say "Gone"

#!/usr/bin/env bash
# Undo what the last setup.sh of this working tree changed, and only that. Safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=k8s/lib.sh
. k8s/lib.sh

usage() {
  cat <<'EOF'
usage: k8s/rollback.sh [options]

setup.sh writes down the revision of each deployment before it applies anything. This takes each deployment
whose revision has changed since then back to it. Where nothing was applied, nothing is undone.

  --kubeconfig FILE    the cluster (default: the one that setup.sh wrote down)
  --timeout SECONDS    for each rollout (default: 300)
  --dry-run            show every step, change nothing, contact nothing
  --help               this text

To go back one revision without such a record: kubectl -n asr-system rollout undo deployment/asr-api
EOF
}

timeout_s=300
while [ $# -gt 0 ]; do
  common_option "$@"
  shift "$words"
done

say "Tools"
require_tools kubectl
say "Rollback"
if [ "$DRY_RUN" = 1 ]; then
  for name in "${DEPLOYMENTS[@]}"; do
    note "[dry-run] kubectl rollout undo deployment/$name --to-revision=(the one in $REVISIONS_FILE, where it has changed)"
  done
  exit 0
fi
if [ ! -e "$REVISIONS_FILE" ]; then
  note "nothing to undo: the last k8s/setup.sh of this working tree applied nothing (no $REVISIONS_FILE)"
  note "to go back one revision all the same: kubectl -n asr-system rollout undo deployment/asr-api"
  exit 0
fi
record=$(cat "$REVISIONS_FILE")
grep -qE "^($(IFS='|' && printf %s "${DEPLOYMENTS[*]}")) " <<<"$record" || fail "this was the first deployment: there is nothing to go back to, and it stays as it is;" \
  "k8s/teardown.sh --only app takes it away"
KUBECONFIG_FILE=${KUBECONFIG_FILE:-$(recorded_kubeconfig)}
[ -z "$KUBECONFIG_FILE" ] || [ -r "$KUBECONFIG_FILE" ] || fail "cannot read $KUBECONFIG_FILE; name the cluster with --kubeconfig"
name_cluster
uid=$(namespace_uid) || fail "the API server does not answer"
[[ $record == "cluster $uid "* ]] || fail "this is not the cluster, or not the asr-system, that was deployed to; nothing was undone." \
  "$REVISIONS_FILE is kept; name the cluster with --kubeconfig"
undone=() missing=()
while read -r name uid revision state; do
  case $name in cluster | completed) continue ;; esac
  now=$(revision_of "$name")
  if [ "${now% *}" != "$uid" ]; then
    note "$name: gone, or another one than was recorded; left alone"
    missing+=("$name")
  elif [ "$state" = undone ]; then
    note "$name: taken back before; only its rollout is waited for"
    undone+=("$name")
  elif [ "${now#* }" = "$revision" ]; then
    note "$name: still at revision $revision; left alone"
  else
    note "$name: from revision ${now#* } back to $revision"
    kube --namespace asr-system rollout undo "deployment/$name" --to-revision="$revision"
    # Kubernetes gives what it goes back to a new number: a rollback that is repeated would not find this one again.
    sed -i "s/^$name .*/& undone/" "$REVISIONS_FILE"
    undone+=("$name")
  fi
done <<<"$record"
# A rollout starts one pod before it takes one away: where no node has room for one more, it stands still.
if [ "${#undone[@]}" -gt 0 ] && [ -n "$(kube --namespace asr-system get pods --output=jsonpath='{.items[*].status.conditions[?(@.reason=="Unschedulable")].reason}')" ]; then
  note "some pods find no node; if this stands still: docs/runbooks/AsrReplicaMissing.md says how to make room"
fi
for name in "${undone[@]}"; do
  kube --namespace asr-system rollout status "deployment/$name" --timeout="${timeout_s}s"
done
[ "${#missing[@]}" = 0 ] || fail "${missing[*]} cannot be taken back; $REVISIONS_FILE is kept"
rm "$REVISIONS_FILE"

#!/usr/bin/env bash
# From nothing to a running service on DigitalOcean Kubernetes. Safe to repeat: what is there is kept or updated.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=k8s/lib.sh
. k8s/lib.sh

usage() {
  cat <<'EOF'
usage: k8s/setup.sh [options]

Authenticates, makes the cluster with Terraform, fetches the kubeconfig, applies an overlay, waits for the
rollout and prints the addresses.

  --overlay NAME       overlay under k8s/overlays (default: production), or a folder
  --registry PREFIX    where the images are, for example registry.digitalocean.com/my-asr
  --tag TAG            tag of both images (default: the overlay's)
  --kubeconfig FILE    use this cluster and skip Terraform and DigitalOcean altogether
  --skip-terraform     the cluster exists; ask Terraform's state for its kubeconfig only
  --yes                do not ask before Terraform applies
  --timeout SECONDS    for each rollout and for the load balancer (default: 600)
  --dry-run            show every step, change nothing, contact nothing
  --help               this text

environment: DIGITALOCEAN_TOKEN, and TF_VAR_* for any variable of terraform/variables.tf; ASR_API_KEY is accepted
by a service whose keys are made now, besides the random one
EOF
}

overlay=production registry='' tag='' terraform=1 yes=0 timeout_s=600
while [ $# -gt 0 ]; do
  case $1 in
    --overlay) overlay=${2:?--overlay needs a name}; shift 2 ;;
    --registry) registry=${2:?--registry needs a prefix}; shift 2 ;;
    --tag) tag=${2:?--tag needs a value}; shift 2 ;;
    --skip-terraform) terraform=0; shift ;;
    --yes) yes=1; shift ;;
    *) common_option "$@"; shift "$words" ;;
  esac
done
# What an earlier run completed must not be undone when this one fails before it applies anything.
if [ "$DRY_RUN" = 0 ] && [ -e "$REVISIONS_FILE" ] && { grep -qx completed "$REVISIONS_FILE" || ! grep -q '^cluster ' "$REVISIONS_FILE"; }; then
  rm "$REVISIONS_FILE"
fi
[ -z "$KUBECONFIG_FILE" ] || terraform=0
path=k8s/overlays/$overlay
[ -d "$path" ] || path=$(from_caller "$overlay")
[ -f "$path/kustomization.yaml" ] || fail "there is no overlay $overlay (have: $(find k8s/overlays -mindepth 1 -maxdepth 1 -type d -printf '%f '))"

say "Tools"
if [ -n "$KUBECONFIG_FILE" ]; then
  require_tools kubectl
  [ "$DRY_RUN" = 1 ] || [ -r "$KUBECONFIG_FILE" ] || fail "cannot read $KUBECONFIG_FILE"
else
  require_tools terraform doctl kubectl
  if [ -z "$registry" ]; then
    # Better said now than after ten minutes in which the nodes try to pull.
    local_images=$(kubectl kustomize "$path" | sed -n 's/^ *image: \([^/]*\)$/\1/p' | tr '\n' ' ')
    if [ -n "$local_images" ]; then
      [ "$DRY_RUN" = 1 ] || fail "no node can pull ${local_images% }: name --registry"
      note "no node can pull ${local_images% }: name --registry (needed for a real run)"
    fi
  fi
  authenticate
fi

if [ "$terraform" = 1 ]; then
  say "Cluster (terraform/)"
  run terraform -chdir=terraform init -input=false
  # As Terraform takes it: its file of variables wins over the environment, the environment over the default.
  wanted='' remedy='set kubernetes_version in terraform/terraform.tfvars to one of these'
  [ ! -f terraform/terraform.tfvars ] || wanted=$(sed -n 's/^ *kubernetes_version *= *"\([^"]*\)".*/\1/p' terraform/terraform.tfvars)
  if [ -z "$wanted" ]; then
    remedy='export TF_VAR_kubernetes_version=<one of these>'
    wanted=${TF_VAR_kubernetes_version:-$(sed -n '/"kubernetes_version"/,/^}/s/.*default *= "\(.*\)"/\1/p' terraform/variables.tf)}
  fi
  if [ "$DRY_RUN" = 0 ]; then
    # Read to the end before anything searches it: a `grep -q` in the pipe would end doctl, and that counts as a failure.
    offered=$(doctl kubernetes options versions --format Slug --no-header) || fail "DigitalOcean does not say which versions it offers"
    if ! grep -qxF "$wanted" <<<"$offered"; then
      note "offered today: ${offered//$'\n'/ }"
      # A cluster that exists keeps its version.
      state=$(terraform -chdir=terraform state pull)
      [[ $state == *'"digitalocean_kubernetes_cluster"'* ]] || fail "DigitalOcean does not offer $wanted any more; $remedy"
    fi
  fi
  # A saved plan holds every variable in the clear, the token too if it came as one: keep it private and brief.
  plan=$(mktemp -d)/setup.tfplan
  trap 'rm -rf "$(dirname "$plan")"' EXIT
  run terraform -chdir=terraform plan -input=false -out="$plan"
  if [ "$DRY_RUN" = 0 ]; then
    gone=$(terraform -chdir=terraform show -json "$plan" | destroyed digitalocean_kubernetes_cluster digitalocean_container_registry) ||
      fail "cannot read what the plan would destroy"
    [ -z "$gone" ] || fail "nothing was changed: the plan destroys ${gone//$'\n'/ and }, and with a cluster its volumes and its load" \
      "balancer's address, with a registry its images. Put region, node_size, registry_name and registry_region back." \
      "Other nodes: a second pool (inference_pool). Another region or registry: k8s/teardown.sh first."
  fi
  [ "$yes" = 1 ] || [ "$DRY_RUN" = 1 ] || ask "Apply this plan? It costs money."
  run terraform -chdir=terraform apply -input=false "$plan"
fi

say "Kubeconfig"
if [ -n "$KUBECONFIG_FILE" ]; then
  note "$KUBECONFIG_FILE"
elif [ "$DRY_RUN" = 1 ]; then
  note "[dry-run] terraform -chdir=terraform output -raw kubeconfig_path"
else
  terraform_kubeconfig || fail "Terraform has no cluster yet; run without --skip-terraform"
  note "export KUBECONFIG=$(realpath "$KUBECONFIG_FILE")"
fi
name_cluster
[ "$DRY_RUN" = 1 ] || kube version --output=yaml >/dev/null || fail "the API server does not answer"

say "Namespaces and secrets"
apply_namespaces
key=$(random_secret)
keys=operator:$key
if [ -n "${ASR_API_KEY:-}" ] && ! exists secret asr-api-keys --namespace asr-system; then
  # The service refuses shorter ones, but cannot see it of a digest.
  [ "${#ASR_API_KEY}" -ge 16 ] || fail "ASR_API_KEY is shorter than 16 characters"
  # Whoever deploys brings a key to ask the service with afterwards (make smoke-k8s); its digest is enough here.
  keys+=$'\n'caller:sha256=$(printf %s "$ASR_API_KEY" | sha256sum | cut -d ' ' -f 1)
fi
make_secret asr-system asr-api-keys "keys=$keys" "ui-key=$key"
note "the API key: kubectl -n asr-system get secret asr-api-keys -o jsonpath='{.data.ui-key}' | base64 -d"

say "Application ($overlay)"
render=build/k8s-render
mkdir -p "$render"
{
  printf 'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n  - %s\nimages:\n' "$(realpath --relative-to="$render" "$path")"
  for image in asr-api asr-ui; do
    # An overlay has replaced nothing but the tag, so the name is still the one to match.
    printf '  - name: %s\n    newName: %s%s\n' "$image" "${registry:+${registry%/}/}" "$image"
    [ -z "$tag" ] || printf '    newTag: "%s"\n' "$tag"
  done
  # DigitalOcean puts its registry's pull secret, which has the registry's name, into every namespace, but names it in the
  # service account `default` only, and no pod here runs as that.
  if [[ $registry =~ ^registry\.digitalocean\.com/([^/]+) ]]; then
    printf 'patches:\n  - target: {kind: ServiceAccount}\n    patch: |-\n      %s\n      %s\n      %s\n      %s\n' \
      'apiVersion: v1' 'kind: ServiceAccount' 'metadata: {name: each}' "imagePullSecrets: [{name: ${BASH_REMATCH[1]}}]"
  fi
} >"$render/kustomization.yaml"
manifests=$(kubectl kustomize "$render")
if [ "$DRY_RUN" = 1 ]; then
  note "[dry-run] write the revisions of ${DEPLOYMENTS[*]} to $REVISIONS_FILE, for k8s/rollback.sh"
else
  # Of an earlier run whose rollouts have not completed to this day, what it would have gone back to is kept: what is
  # there now is what failed.
  uid=$(namespace_uid) earlier=''
  if [ -e "$REVISIONS_FILE" ] && grep -qF "cluster $uid " "$REVISIONS_FILE"; then
    for name in "${DEPLOYMENTS[@]}"; do
      [[ $(kube rollout status "deployment/$name" --namespace asr-system --watch=false 2>&1) == *'successfully rolled out'* ]] ||
        earlier=$(cat "$REVISIONS_FILE")
    done
  fi
  record="cluster $uid $KUBECONFIG_FILE"$'\n'
  for name in "${DEPLOYMENTS[@]}"; do
    found=$(revision_of "$name")
    [ -n "$found" ] || continue
    if [ -n "$earlier" ]; then
      before=$(sed -n "s/^$name //p" <<<"$earlier")
      [ -n "$before" ] || continue # the run that failed has made it
      [[ $before == *' undone' || ${before% *} != "${found% *}" ]] || found=$before
    fi
    record+="$name $found"$'\n'
  done
  # Written when all is known: a record without deployments says that this is the first deployment.
  mkdir -p "$(dirname "$REVISIONS_FILE")"
  printf %s "$record" >"$REVISIONS_FILE"
fi
apply_stdin <<<"$manifests"

say "Rollout"
for name in "${DEPLOYMENTS[@]}"; do
  run kube rollout status "deployment/$name" --namespace asr-system --timeout="${timeout_s}s"
done
[ "$DRY_RUN" = 1 ] || echo completed >>"$REVISIONS_FILE"

say "Addresses"
address() { # SERVICE: print its public address, waiting for the load balancer
  local service=$1 type deadline found
  # The rollouts are through: a question that fails now is no reason to take them back.
  type=$(kube get service "$service" --namespace asr-system --output=jsonpath='{.spec.type}') || type=unknown
  if [ "$type" = unknown ]; then
    note "$service: no answer; kubectl -n asr-system get service $service"
    return
  elif [ "$type" != LoadBalancer ]; then
    note "$service: kubectl -n asr-system port-forward service/$service ${2}:80"
    return
  fi
  deadline=$((SECONDS + timeout_s))
  while [ $SECONDS -lt $deadline ]; do
    found=$(kube get service "$service" --namespace asr-system --output=jsonpath='{.status.loadBalancer.ingress[0].ip}{.status.loadBalancer.ingress[0].hostname}') || found=''
    if [ -n "$found" ]; then note "$service: http://$found"; return; fi
    sleep 5
  done
  note "$service: no address yet; kubectl -n asr-system get service $service --watch"
}
if [ "$DRY_RUN" = 1 ]; then
  note "[dry-run] wait for the load balancer of asr-api, print its address and how to reach asr-ui"
else
  address asr-api 8000
  address asr-ui 8501
fi
note "Autoscaling, metrics, alerts, dashboards and traces: k8s/monitoring-setup.sh${KUBECONFIG_FILE:+ --kubeconfig $KUBECONFIG_FILE}"

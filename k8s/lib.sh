# shellcheck shell=bash
# Shared by setup.sh, rollback.sh, monitoring-setup.sh and teardown.sh; sourced, never run.

DRY_RUN=${DRY_RUN:-0}
# The scripts have gone to the repository's root by now; relative paths are those of whoever called.
CALLED_FROM=${OLDPWD:-$PWD}
KUBECONFIG_FILE=''

say() { printf '\n== %s\n' "$*"; }
note() { printf '   %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

from_caller() { case $1 in /*) printf %s "$1" ;; *) printf %s "$CALLED_FROM/$1" ;; esac; }

# ask QUESTION: go on with a yes only.
ask() {
  local answer=''
  read -r -p "   $1 [y/N] " answer || [ -n "$answer" ] || fail "no terminal to ask on; use --yes"
  [[ $answer == [yY] ]] || fail "nothing was changed"
}

# Run a command, or with --dry-run only show it.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    if [ "$1" = kube ]; then
      shift
      set -- kubectl ${KUBECONFIG_FILE:+--kubeconfig "$KUBECONFIG_FILE"} "$@"
    fi
    printf '   [dry-run]'; printf ' %s' "$@"; printf '\n'
  else
    "$@"
  fi
}

# common_option WORD...: an option that every script takes; sets words to how many words it was.
# shellcheck disable=SC2034  # used where this is sourced
common_option() {
  words=2
  case $1 in
    --kubeconfig) KUBECONFIG_FILE=$(from_caller "${2:?--kubeconfig needs a file}") ;;
    --timeout)
      timeout_s=${2:?--timeout needs seconds}
      # The scripts put an "s" behind it: 10m would become ten milliseconds.
      [[ $timeout_s =~ ^[1-9][0-9]*$ ]] || fail "--timeout needs whole seconds, not $timeout_s"
      ;;
    --dry-run) DRY_RUN=1 words=1 ;;
    --help | -h) usage; exit 0 ;;
    *) usage >&2; fail "unknown option $1" ;;
  esac
}

# require_tools NAME...: name every missing tool at once, with where it comes from.
require_tools() {
  local tool missing=0
  for tool in "$@"; do
    command -v "$tool" >/dev/null && continue
    missing=1
    case $tool in
      terraform) note "missing: terraform (https://developer.hashicorp.com/terraform/install)" ;;
      doctl) note "missing: doctl (https://docs.digitalocean.com/reference/doctl/how-to/install/)" ;;
      kubectl) note "missing: kubectl (https://kubernetes.io/docs/tasks/tools/)" ;;
      helm) note "missing: helm (https://helm.sh/docs/intro/install/)" ;;
      *) note "missing: $tool" ;;
    esac
  done
  [ "$missing" = 0 ] && return
  if [ "$DRY_RUN" = 1 ]; then
    note "(a dry run goes on without them)"
    if ! command -v kubectl >/dev/null; then
      note "(without kubectl it shows no manifests)"
      # shellcheck disable=SC2329  # called wherever a script calls kubectl
      kubectl() { case "$*" in */dev/stdin* | *--filename=-*) cat >/dev/null ;; esac; }
      export -f kubectl # render.sh asks it too
    fi
    return
  fi
  fail "install what is missing and start again; every step can be repeated"
}

kube() {
  if [ -n "$KUBECONFIG_FILE" ]; then kubectl --kubeconfig "$KUBECONFIG_FILE" "$@"; else kubectl "$@"; fi
}

# name_cluster: say which cluster the next steps are about, before they are taken; sets server to its address.
name_cluster() {
  [ "$DRY_RUN" = 0 ] || return 0
  server=$(kube config view --minify --output=jsonpath='{.clusters[0].cluster.server}') || server=''
  [ -n "$server" ] || fail "${KUBECONFIG_FILE:-the configuration of kubectl} names no cluster"
  note "cluster: $server (${KUBECONFIG_FILE:-the current context of kubectl})"
}

# What is ours on a cluster bears this label: namespaces by k8s/namespaces, Helm's releases by monitoring-setup.sh.
OURS=app.kubernetes.io/part-of=asr

# foreign_namespace NAME: is it there without our label? Never true in a dry run.
foreign_namespace() {
  local found
  [ "$DRY_RUN" = 0 ] || return
  found=$(kube get namespace "$1" --ignore-not-found --output=jsonpath='{.metadata.name}={.metadata.labels.app\.kubernetes\.io/part-of}') ||
    fail "the cluster does not say whether it has the namespace $1"
  [ -n "$found" ] && [ "$found" != "$1=asr" ]
}

# apply_namespaces: make them; one of somebody else's is not taken over, because teardown.sh would delete it.
apply_namespaces() {
  local name
  for name in asr-system monitoring observability; do
    if foreign_namespace "$name"; then
      fail "$server has a namespace $name that is not this project's (no label $OURS); nothing in it was changed." \
        "If it may be taken over, and deleted by k8s/teardown.sh: kubectl label namespace $name $OURS"
    fi
  done
  kubectl kustomize k8s/namespaces | apply_stdin
}

# Does it exist? Never true in a dry run, which does not ask the cluster. A cluster that does not answer is no "no".
exists() {
  local found
  [ "$DRY_RUN" = 0 ] || return
  found=$(kube get "$@" --ignore-not-found --output=name) || fail "the cluster does not say whether it has $*"
  [ -n "$found" ]
}

# lists_release NAME NAMESPACE HELM_ARGUMENTS...: the same of a Helm release, in the states that the arguments name.
lists_release() {
  local found
  [ "$DRY_RUN" = 0 ] || return
  found=$(helm list --short --filter "^$1\$" --namespace "$2" "${@:3}" \
    ${KUBECONFIG_FILE:+--kubeconfig "$KUBECONFIG_FILE"}) || fail "Helm does not say whether $2 has the release $1"
  [ -n "$found" ]
}
is_pending() { lists_release "$1" "$2" --pending; }
has_release() { lists_release "$@" --deployed --failed --pending --uninstalling; }

# What a rollback goes back to. First a line "cluster UID KUBECONFIG": where it is, and the identifier of the namespace
# asr-system there. Then one line NAME UID REVISION for each deployment that was there before the apply, with "undone"
# behind it once a rollback has taken it back. At last "completed", once every rollout was.
# shellcheck disable=SC2034  # used where this is sourced
DEPLOYMENTS=(asr-api asr-ui)
REVISIONS_FILE=${REVISIONS_FILE:-build/k8s-revisions}

revision_of() { # DEPLOYMENT: print UID and revision, or nothing when it does not exist
  kube get deployment "$1" --namespace asr-system --ignore-not-found \
    --output=jsonpath='{.metadata.uid} {.metadata.annotations.deployment\.kubernetes\.io/revision}'
}

namespace_uid() { kube get namespace asr-system --ignore-not-found --output=jsonpath='{.metadata.uid}'; }
recorded_kubeconfig() { [ ! -r "$REVISIONS_FILE" ] || sed -n 's/^cluster [^ ]* //p' "$REVISIONS_FILE"; }

random_secret() { head -c 32 /dev/urandom | base64 | tr -d '\n' | tr '+/' '-_' | tr -d '='; }

# Apply manifests from standard input. Client-side apply, so that a field taken out here is taken out there.
apply_stdin() {
  if [ "$DRY_RUN" = 1 ]; then
    local manifests
    manifests=$(cat)
    printf '   [dry-run] kubectl apply -f - (%s)\n' "$(grep -c '^kind:' <<<"$manifests") objects"
    sed -nE '/^kind:|^  name:/s/^/      /p' <<<"$manifests"
  else
    kube apply -f -
  fi
}

# make_secret NAMESPACE NAME KEY=VALUE...: make it once; a secret that is there is kept, so keys stay valid.
make_secret() {
  local namespace=$1 name=$2 pair
  shift 2
  if exists secret "$name" --namespace "$namespace"; then
    note "secret $namespace/$name is there and is kept"
    return
  fi
  if [ "$DRY_RUN" = 1 ]; then
    note "[dry-run] create secret $namespace/$name (keys: ${*%%=*})"
    return
  fi
  # Through standard input, so that no secret is in a process's arguments.
  printf 'apiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\n  namespace: %s\ntype: Opaque\ndata:\n%s\n' "$name" "$namespace" \
    "$(for pair in "$@"; do printf '  %s: %s\n' "${pair%%=*}" "$(printf '%s' "${pair#*=}" | base64 | tr -d '\n')"; done)" |
    kube create -f -
}

# foreign_release NAME NAMESPACE: is it there without our label?
foreign_release() { has_release "$1" "$2" && ! has_release "$1" "$2" --selector "$OURS"; }

# terraform_kubeconfig: set KUBECONFIG_FILE to what Terraform wrote; false where it has no cluster. Its credentials end
# after seven days and Terraform renews them only when it applies, so a file that is refused is fetched again.
terraform_kubeconfig() {
  local outputs cluster fresh
  # As JSON first: without a state that is an empty object, and every other failure is one.
  outputs=$(terraform -chdir=terraform output -json) || fail "Terraform does not say which cluster it has"
  [[ $outputs == *'"cluster_id"'* && $outputs == *'"kubeconfig_path"'* ]] || return
  cluster=$(terraform -chdir=terraform output -raw cluster_id) || fail "Terraform does not say which cluster it has"
  KUBECONFIG_FILE=$(terraform -chdir=terraform output -raw kubeconfig_path) || fail "Terraform does not say where the kubeconfig is"
  [[ $KUBECONFIG_FILE == /* ]] || KUBECONFIG_FILE=$PWD/terraform/$KUBECONFIG_FILE
  if ! kube version >/dev/null 2>&1; then
    note "$KUBECONFIG_FILE is not accepted (any more); asking for a new one"
    fresh=$(doctl kubernetes cluster kubeconfig show "$cluster") || fail "DigitalOcean gives no kubeconfig for cluster $cluster"
    (umask 077 && printf '%s\n' "$fresh" >"$KUBECONFIG_FILE") || fail "cannot write $KUBECONFIG_FILE"
  fi
  chmod 600 "$KUBECONFIG_FILE"
}

# destroyed TYPE...: which resources of these types a plan destroys, to make them again or not; one address a line.
# Standard input: what `terraform show -json` prints, one line whose order is fixed. What somebody else has deleted
# (resource_drift) stands before resource_changes and is none of the plan's doing.
destroyed() {
  local plan types
  plan=$(cat)
  [[ $plan == '{"format_version":"1.'* ]] || return
  [[ $plan == *'"resource_changes":['* ]] || return 0
  types=$(IFS='|' && printf %s "$*")
  { grep -oE "\"address\":\"[^{}]*\"type\":\"($types)\"[^{}]*\"change\":\{\"actions\":\[[^]]*\"delete\"" || true; } \
    <<<"${plan#*'"resource_changes":['}" | sed 's/"address":"\([^"]*\)".*/\1/'
}

authenticate() {
  say "DigitalOcean"
  if [ -z "${DIGITALOCEAN_TOKEN:-}" ]; then
    [ "$DRY_RUN" = 1 ] || fail "set DIGITALOCEAN_TOKEN (https://cloud.digitalocean.com/account/api/tokens, scopes: account (read), kubernetes, registry, load_balancer)"
    note "DIGITALOCEAN_TOKEN is not set (needed for a real run)"
  fi
  # doctl reads its token from here; it is never written to a file or to the arguments of a process.
  export DIGITALOCEAN_ACCESS_TOKEN=${DIGITALOCEAN_TOKEN:-}
  run doctl account get --format Email,Status
}

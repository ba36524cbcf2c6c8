#!/usr/bin/env bash
# audit.sh [GROUP...]: look the locked packages up in the advisory database (pip-audit); without GROUP, every lock.
# Fails on a known vulnerability. A lock whose packages the database does not answer for is said to be skipped, and
# fails only with AUDIT_STRICT=1, which CI sets.
set -euo pipefail
cd "$(dirname "$0")/.."
groups=("$@") strict=${AUDIT_STRICT:-0} skipped=0 failed=0
if [ $# = 0 ]; then
  for lock in requirements/*.txt; do groups+=("$(basename "$lock" .txt)"); done
fi
for group in "${groups[@]}"; do
  rc=0
  output=$(.venv-infra/bin/pip-audit --disable-pip --require-hashes --requirement "requirements/$group.txt" --progress-spinner off 2>&1) || rc=$?
  unaudited=$(grep -c 'could not be audited' <<<"$output" || true)
  if [ "$rc" != 0 ]; then
    printf '%s\nFAILED   requirements/%s.txt\n' "$output" "$group"; failed=1
  elif [ "$unaudited" -gt 0 ]; then
    echo "SKIPPED  requirements/$group.txt: the advisory database does not answer for $unaudited packages"; skipped=1
  else
    echo "ok       requirements/$group.txt"
  fi
done
[ "$failed" = 0 ] || exit 1
[ "$strict" = 0 ] || [ "$skipped" = 0 ] || { echo "error: AUDIT_STRICT=1 and something was skipped" >&2; exit 1; }

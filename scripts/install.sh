#!/usr/bin/env bash
# install.sh VENV GROUP... [torch==VERSION]: install locked groups, hashes checked, and the project itself.
set -euo pipefail
venv=$1
shift
torch='' args=() groups=()
for item in "$@"; do
  case $item in
    torch==*) torch=$item ;;
    *) groups+=("$item") args+=(-r "requirements/$item.txt") ;;
  esac
done
started=$SECONDS
echo "Installing: ${groups[*]}${torch:+ $torch}"
fail() { echo "error: installing ${groups[*]} failed; the lines above say why (no package registry, or a full disk?)" >&2; exit 1; }
if [ -n "$torch" ]; then
  "$venv/bin/pip" install -qq "$torch" || fail
  # torch is not in the locks (its CPU build has a local version), so its dependants are taken exactly as locked.
  "$venv/bin/pip" install -qq --no-deps --require-hashes "${args[@]}" || fail
else
  "$venv/bin/pip" install -qq --require-hashes "${args[@]}" || fail
fi
"$venv/bin/pip" install -qq --require-hashes -r requirements/build.txt || fail
"$venv/bin/pip" install -qq --no-deps --no-build-isolation -e . || fail
echo "Installed in $((SECONDS - started)) s"

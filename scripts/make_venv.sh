#!/usr/bin/env bash
# make_venv.sh PYTHON VENV: create the virtual environment, or say in one line why it cannot be.
set -euo pipefail
python=$1 venv=$2
fail() { echo "error: $*" >&2; exit 1; }
command -v "$python" >/dev/null || fail "$python was not found; install Python 3.11 to 3.13 or name it: make PYTHON=/path/to/python3"
"$python" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))' ||
  fail "$python is $("$python" -V 2>&1); Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"
"$python" -c 'import shutil; raise SystemExit(shutil.disk_usage(".").free < 3 << 30)' ||
  fail "less than 3 GB are free here ($(df -h . | awk 'NR==2 {print $4}')); the environment needs about 2"
echo "Creating $venv with $("$python" -V)"
"$python" -m venv "$venv"

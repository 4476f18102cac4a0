#!/usr/bin/env bash
# Format, lint, types, and the scripts themselves where shellcheck is installed. Changes nothing;
# all of them run, whichever fails.
set -euo pipefail
# shellcheck source=scripts/_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv dev
cd "$repo"
failed=0
"$venv/bin/python" -m ruff format --check . || failed=1
"$venv/bin/python" -m ruff check . || failed=1
"$venv/bin/python" -m mypy || failed=1
if command -v shellcheck >/dev/null; then
  git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 shellcheck --external-sources || failed=1
else
  echo "check.sh: shellcheck is not installed; the scripts were not checked" >&2
fi
exit "$failed"

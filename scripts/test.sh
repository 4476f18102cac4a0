#!/usr/bin/env bash
# Runs the whole test suite, or what the arguments (pytest's) choose: scripts/test.sh [tests/command_line/test_flags.py -k ...]
set -euo pipefail
# shellcheck source=scripts/_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv dev
cd "$repo"
processes=$(nproc 2>/dev/null || echo 2)
processes=$((processes < 2 ? 3 : 4))
# A file's tests stay together: many share what takes minutes to make. More processes than cores, because many wait.
exec "$venv/bin/python" -m pytest --numprocesses="$processes" --dist=loadfile --no-loadscope-reorder "$@"

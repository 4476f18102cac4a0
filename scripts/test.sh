#!/usr/bin/env bash
# Runs the whole test suite, or what the arguments (pytest's) choose: scripts/test.sh [tests/test_flags.py -k ...]
set -euo pipefail
# shellcheck source=scripts/_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv dev
cd "$repo"
# A file's tests stay together: many share what takes minutes to make.
exec "$venv/bin/python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"

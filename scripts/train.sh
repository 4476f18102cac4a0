#!/usr/bin/env bash
# Trains: scripts/train.sh --flagfile=configs/tutorial.flags [any flag]
#
# Makes .venv beside this folder if there is none, installs tapedist at the pinned versions, and runs `tapedist train`.
# TAPEDIST_EXTRAS names extras to install (such as "gpu"); by default "gpu" where an NVIDIA driver answers.
# PYTHON names the Python to use, TAPEDIST_VENV another folder for the environment.
set -euo pipefail
# shellcheck source=scripts/_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

if [[ -z ${TAPEDIST_EXTRAS+set} ]]; then
  TAPEDIST_EXTRAS=""
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    TAPEDIST_EXTRAS=gpu
  fi
fi
ensure_venv "$TAPEDIST_EXTRAS"
exec "$venv/bin/python" -m tapedist train "$@"

#!/usr/bin/env bash
# Measures tapedist side by side with its peers: scripts/bench.sh [--quick] [--only=ROW] [--rounds=N] [--output=FILE.jsonl]
#
# Peers (JAX, scikit-learn, oneDAL, Keras) are the extra "bench", installed into .venv-bench, and PyTorch is one if it is
# installed there too; TAPEDIST_PEERS_PYTHON (or --peers_python) names another Python that has them. A peer that is
# missing is skipped by name. A full run ends with the dated document, the plot and the section of docs/benchmarks.md
# under scripts/bench/results/; a run with --only or --quick does not.
set -euo pipefail
export TAPEDIST_VENV=${TAPEDIST_VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)/.venv-bench}
# shellcheck source=scripts/_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv bench
cd "$repo"
measurements=$repo/scripts/bench/results/$(date +%F).jsonl
full=1
for word in "$@"; do
  case $word in
    --quick | --only* | -h | --help) full=0 ;;
    --output=*) measurements=${word#--output=} ;;
    *) ;;
  esac
done
if ((!full)) && [[ " $* " != *" --output="* ]]; then
  measurements=${TMPDIR:-/tmp}/tapedist-bench-$$.jsonl
fi
"$venv/bin/python" scripts/bench/suite.py run --output="$measurements" "$@"
if ((full)); then
  "$venv/bin/python" scripts/bench/suite.py render "$measurements"
fi

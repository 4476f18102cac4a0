# shellcheck shell=bash
# Sourced by the other scripts: finds Python, makes .venv where there is none, installs when the pins have changed.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${TAPEDIST_VENV:-$repo/.venv}

die() {
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# Prints a Python that can make the environment: $PYTHON if set, else the first that fits.
find_python() {
  local candidate seen=""
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    command -v "$candidate" >/dev/null || continue
    if ! "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      seen+="; $candidate is $("$candidate" --version 2>&1)"
    elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      seen+="; $candidate lacks its venv module (on Debian and Ubuntu: apt install $candidate-venv)"
    else
      printf '%s\n' "$candidate"
      return
    fi
    [[ $candidate != "${PYTHON:-}" ]] || break
  done
  die "needs Python 3.11, 3.12 or 3.13 with its venv module${seen:-; no python was found}"
}

# ensure_venv EXTRAS: the environment with this checkout and EXTRAS ("", "dev", "gpu", ...), at the pinned versions.
ensure_venv() {
  local extras=$1 python wanted stamp
  local installed='import importlib.metadata; importlib.metadata.version("tapedist")'
  # A second script that starts meanwhile waits for the first.
  mkdir -p "$venv" || die "cannot make $venv; set TAPEDIST_VENV to another folder"
  if command -v flock >/dev/null; then
    exec 9>"$venv/.lock"
    flock 9
  fi
  wanted="[$extras] $(cat "$repo/pyproject.toml" "$repo/constraints.txt" | cksum) $repo"
  for stamp in "$venv"/.installed-*; do
    # The dev environment holds all that a plain one does.
    if [[ -f $stamp && ($stamp == "$venv/.installed-$extras" || -z $extras) ]] &&
      [[ $(cat "$stamp") == *"${wanted#*] }" ]] && "$venv/bin/python" -c "$installed" 2>/dev/null; then
      release_venv
      return
    fi
  done
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    printf 'Making %s with %s ...\n' "$venv" "$("$python" --version)" >&2
    "$python" -m venv "$venv" || die "cannot make $venv"
  fi
  printf 'Installing tapedist%s into %s (some minutes the first time) ...\n' "${extras:+[$extras]}" "$venv" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$repo/constraints.txt" --editable "$repo${extras:+[$extras]}" >&2 ||
    die "pip could not install tapedist${extras:+[$extras]}; its message is above"
  printf '%s\n' "$wanted" >"$venv/.installed-$extras"
  release_venv
}

# Closes the lock, which the programs that follow would otherwise hold for as long as they run.
release_venv() {
  exec 9>&-
}

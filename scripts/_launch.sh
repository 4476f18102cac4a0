# shellcheck shell=bash
# Sourced by the launch scripts: errors, words quoted for a shell, and commands that a dry run only prints.
# shellcheck disable=SC2034  # The variables are for those scripts.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
dry_run=${DRY_RUN:-}
if [[ $dry_run == 0 ]]; then dry_run=""; fi

die() {
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# The comment at the top of a script, as its help.
usage() {
  sed -n '2,/^[^#]/{/^#SBATCH/d;/^#/s/^# \{0,1\}//p;}' "$0"
  exit 0
}

# quote WORD...: the words as one line of shell.
quote() {
  local word line=""
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./~-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run WORD...: runs the command; a dry run prints it instead.
run() {
  if [[ -n $dry_run ]]; then
    quote "$@"
  else
    "$@"
  fi
}

# with_default_flagfile FILE WORD...: sets train_flags to the words, after --flagfile=FILE unless they name one.
with_default_flagfile() {
  local file=$1 word
  shift
  train_flags=("$@")
  for word in "$@"; do
    case $word in --flagfile | --flagfile=* | -flagfile | -flagfile=*) return ;; esac
  done
  train_flags=("--flagfile=$file" "$@")
}

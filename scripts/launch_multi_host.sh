#!/usr/bin/env bash
# Trains on several hosts over ssh, one worker on each.
#
#   scripts/launch_multi_host.sh --hosts=a,b,c [--port=2222] [--dry_run] [any flag of tapedist train]
#
# --hosts         names that ssh knows and that the hosts reach one another by; user@host works; the first is the chief
# --port          the TCP port that every worker opens, on all its interfaces and without a password; default 2222
# --dir           the folder of this checkout on every host; default: the same as here
# --copy          copies this checkout there first; not needed on a shared file system
# --log_dir       where the log of each host goes, here; default logs/multi_host
# --max_restarts  how often all workers are started again, from the last checkpoint, when one is lost; default 0
# --grace_secs    how long the others may take to leave once one has; default 60
# --dry_run       prints what would run; DRY_RUN=1 does the same
#
# Without --flagfile it trains configs/multi_host.flags. SIGTERM and SIGINT go to every worker, which saves and leaves; a
# second SIGINT kills them. A worker whose connection is lost, or whose launcher is gone, saves and leaves, too.
# Exit codes: those of tapedist train; 75 also if a host could not be reached.
set -euo pipefail
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

hosts="" port=2222 dir=$repo copy="" log_dir=logs/multi_host max_restarts=0 grace_secs=60
rest=()
for word in "$@"; do
  case $word in
    --hosts=*) hosts=${word#*=} ;;
    --port=*) port=${word#*=} ;;
    --dir=*) dir=${word#*=} ;;
    --copy) copy=1 ;;
    --log_dir=*) log_dir=${word#*=} ;;
    --max_restarts=*) max_restarts=${word#*=} ;;
    --grace_secs=*) grace_secs=${word#*=} ;;
    --dry_run) dry_run=1 ;;
    -h | --help) usage ;;
    *) rest+=("$word") ;;
  esac
done
[[ $hosts =~ ^[A-Za-z0-9_.@-]+(,[A-Za-z0-9_.@-]+)*$ && $hosts != -* && $hosts != *,-* ]] ||
  die "--hosts='$hosts': must be host names such as a,b,c"
if [[ ! $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then die "--port='$port': must be from 1 to 65535"; fi
[[ $max_restarts =~ ^[0-9]{1,6}$ ]] || die "--max_restarts='$max_restarts': must be 0 or more"
[[ $grace_secs =~ ^[0-9]{1,6}$ ]] || die "--grace_secs='$grace_secs': must be seconds"
IFS=, read -r -a host_list <<<"$hosts"
workers=""
for host in "${host_list[@]}"; do
  workers+="${workers:+,}${host#*@}:$port"
done
((${#host_list[@]} <= 200)) || die "--hosts: must name at most 200 hosts"
[[ -z $(tr ',' '\n' <<<"$workers" | sort | uniq -d) ]] || die "--hosts='$hosts': names a host twice"
with_default_flagfile configs/multi_host.flags ${rest[@]+"${rest[@]}"}

ssh_command=(ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15)

# remote_words RANK: what worker RANK's host is asked to run, as one word for ssh. The worker gets the signals that arrive
# as names on standard input, and SIGTERM when that ends: the connection or this script is gone.
# shellcheck disable=SC2016  # Expanded on the host.
remote_words() {
  local train script
  train=$(quote scripts/train.sh "${train_flags[@]}" "--workers=$workers" "--worker_index=$1")
  script="cd $(quote "$dir") || exit 2; $train </dev/null & worker=\$!;"
  script+=' { while read -r name; do kill -s "$name" "$worker"; done; kill -s TERM "$worker"; } <&0 2>/dev/null &'
  script+=' wait "$worker"; code=$?; kill "$!" 2>/dev/null; exit "$code"'
  quote exec bash -c "$script"
}

copy_to_hosts() {
  local host files=()
  for file in LICENSE README.md pyproject.toml constraints.txt tapedist configs scripts; do
    [[ ! -e $repo/$file ]] || files+=("$file")
  done
  for host in "${host_list[@]}"; do
    local unpack
    unpack="mkdir -p $(quote "$dir") && tar -xzf - -C $(quote "$dir")"
    if [[ -n $dry_run ]]; then
      printf '%s | %s\n' "$(quote tar -C "$repo" -czf - "${files[@]}")" "$(quote "${ssh_command[@]}" "$host" "$unpack")"
    else
      tar -C "$repo" -czf - "${files[@]}" | "${ssh_command[@]}" "$host" "$unpack" || die "cannot copy to $host"
    fi
  done
}

# shellcheck source=scripts/_ssh_round.sh
source "$(dirname "${BASH_SOURCE[0]}")/_ssh_round.sh"

if [[ -n $copy ]]; then copy_to_hosts; fi
if [[ -n $dry_run ]]; then
  for rank in "${!host_list[@]}"; do
    run "${ssh_command[@]}" "${host_list[rank]}" "$(remote_words "$rank")"
  done
  exit 0
fi
mkdir -p "$log_dir" || die "--log_dir='$log_dir': cannot be made"
restarts=0
while true; do
  code=0
  ssh_round || code=$?
  if [[ $code != 75 || $stop_code != 0 ]] || ((restarts >= max_restarts)); then exit "$code"; fi
  restarts=$((restarts + 1))
  printf 'restarting all workers from the last checkpoint (%s of %s)\n' "$restarts" "$max_restarts" >&2
done

# shellcheck shell=bash
# Sourced by launch_multi_host.sh: one start of all workers, until all have left.
#
# Every ssh reads a pipe of its own, whose other end this shell holds: what is written there is the name of a signal for
# the worker, and its end means that this shell is gone. A worker that leaves is announced by SIGUSR1, the end of the
# others' time by SIGUSR2: `wait` is what bash interrupts for a signal at once.

# shellcheck disable=SC2154  # host_list, ssh_command, log_dir and grace_secs are launch_multi_host.sh's.

stop_code=0 interrupted=""

# ssh_round: starts the workers of host_list; returns 0, a worker's real error, 128 + a signal, or 75.
ssh_round() {
  round=$(mktemp -d)
  timer="" killed=""
  trap 'on_signal TERM 143' TERM HUP
  trap 'on_signal INT 130' INT
  trap on_leave USR1
  trap 'tell KILL' USR2
  trap '' PIPE
  local rank pids=()
  for rank in "${!host_list[@]}"; do
    mkfifo "$round/control-$rank"
    eval "exec $((10 + rank))<>\"\$round/control-\$rank\""
    attend "$rank" &
    pids+=("$!")
  done
  local left=0
  # No $(...) here or in what a signal runs: bash 5.2 loses its place when a trap comes while it reads one.
  while count_left && ((left < ${#host_list[@]})); do
    wait "${pids[@]}" || true
  done
  if [[ -n $timer ]]; then kill "$timer" 2>/dev/null || true; fi
  for rank in "${!host_list[@]}"; do
    eval "exec $((10 + rank))>&-"
  done
  local code
  code=$(verdict)
  rm -rf "$round"
  return "$code"
}

# attend RANK: runs ssh, prefixes and logs what it says, and announces its end.
attend() {
  local rank=$1 fd code=0 words
  words=$(remote_words "$rank")
  # Only the launcher may hold the pipes open, or nobody would learn that it is gone.
  for ((fd = 10; fd <= 10 + rank; fd++)); do
    eval "exec $fd>&-"
  done
  set +e
  "${ssh_command[@]}" "${host_list[rank]}" "$words" <"$round/control-$rank" 2>&1 |
    while IFS= read -r line || [[ -n $line ]]; do
      printf '%s\n' "$line" >>"$log_dir/worker-$rank.log"
      printf '[%s] %s\n' "$rank" "$line"
    done
  code=${PIPESTATUS[0]}
  printf '%s\n' "$code" >"$round/code-$rank.new"
  mv "$round/code-$rank.new" "$round/code-$rank"
  if ((code != 0)); then
    printf 'worker %s on %s exited with %s; its log is %s\n' "$rank" "${host_list[rank]}" "$code" \
      "$log_dir/worker-$rank.log" >&2
  fi
  kill -USR1 $$
}

# count_left: sets `left` to how many workers have left.
count_left() {
  local rank
  left=0
  for rank in "${!host_list[@]}"; do
    if [[ -e $round/code-$rank ]]; then left=$((left + 1)); fi
  done
}

# tell NAME: sends the name of a signal to the workers that still run.
tell() {
  local rank
  if [[ $1 == KILL ]]; then killed=1; fi
  for rank in "${!host_list[@]}"; do
    if [[ ! -e $round/code-$rank ]]; then
      { printf '%s\n' "$1" >&$((10 + rank)); } 2>/dev/null || true
    fi
  done
}

on_signal() {
  if [[ $1 == INT && -n $interrupted ]]; then
    tell KILL
    return
  fi
  interrupted=1
  stop_code=$2
  tell "$1"
  start_timer
}

# on_leave: once a worker has failed, the others get SIGTERM after a real error, and a deadline in any case.
on_leave() {
  local rank code
  for rank in "${!host_list[@]}"; do
    if [[ ! -e $round/code-$rank ]]; then continue; fi
    read -r code <"$round/code-$rank"
    if [[ $code != 0 && -z $timer ]]; then
      if ! is_lost "$code"; then tell TERM; fi
      start_timer
    fi
  done
}

start_timer() {
  if [[ -z $timer ]]; then
    (
      sleep "$grace_secs" &
      trap 'kill "$!"' TERM
      wait "$!" && kill -USR2 $$
    ) >/dev/null 2>&1 &
    timer=$!
  fi
}

# is_lost CODE: whether trying again may help: a lost peer, death by SIGKILL or a crash, no connection.
is_lost() {
  case $1 in 75 | 132 | 134 | 135 | 136 | 137 | 139 | 255) return 0 ;; esac
  return 1
}

# verdict: a real error beats a stop that was asked for, and that a lost peer.
verdict() {
  local rank code lost=0 stopped=$stop_code
  for rank in "${!host_list[@]}"; do
    read -r code <"$round/code-$rank"
    if is_lost "$code"; then
      lost=75
    elif [[ $code == 130 || $code == 143 ]]; then
      if [[ -z $killed || $stopped == 0 ]]; then stopped=$code; fi
    elif [[ $code != 0 ]]; then
      printf '%s\n' "$code"
      return
    fi
  done
  if ((stopped != 0 && stop_code != 0)); then
    printf '%s\n' "$stop_code"
  elif ((stopped != 0 && lost == 0)); then
    printf '%s\n' "$stopped"
  else
    printf '%s\n' "$lost"
  fi
}

#!/usr/bin/env bash
# Trains on the GPUs of this machine, in one process that mirrors the parameters on all of them.
#
#   scripts/launch_multi_gpu.sh [--gpus=0,1] [--dry_run] [any flag of tapedist train]
#
# --gpus     which GPUs, as numbers or names that nvidia-smi -L prints; default: all
# --dry_run  prints what would run; DRY_RUN=1 does the same
#
# Without --flagfile it trains configs/multi_gpu.flags.
set -euo pipefail
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

gpus=""
rest=()
for word in "$@"; do
  case $word in
    --gpus=*) gpus=${word#*=} ;;
    --dry_run) dry_run=1 ;;
    -h | --help) usage ;;
    *) rest+=("$word") ;;
  esac
done
if [[ -n $gpus && ! $gpus =~ ^[A-Za-z0-9-]+(,[A-Za-z0-9-]+)*$ ]]; then
  die "--gpus='$gpus': must be GPU numbers such as 0,1; nvidia-smi -L lists them"
fi
if [[ -n $(tr ',' '\n' <<<"$gpus" | sort | uniq -d) ]]; then
  die "--gpus='$gpus': names a GPU twice"
fi
if [[ -z $dry_run ]] && ! nvidia-smi -L >/dev/null 2>&1; then
  die "nvidia-smi finds no GPU on this machine; install the NVIDIA driver, or train on the CPU with scripts/train.sh"
fi

with_default_flagfile "$repo/configs/multi_gpu.flags" ${rest[@]+"${rest[@]}"}
settings=(TAPEDIST_EXTRAS=gpu)
if [[ -n $gpus ]]; then
  settings+=("CUDA_VISIBLE_DEVICES=$gpus")
fi
# The last word on a flag wins: this script is about mirroring, whatever the flagfile says.
command=(env "${settings[@]}" "$repo/scripts/train.sh" "${train_flags[@]}" --strategy=mirrored)
if [[ -z $dry_run ]]; then
  exec "${command[@]}"
fi
run "${command[@]}"

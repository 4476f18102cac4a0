#!/usr/bin/env bash
# Trains on an existing TPU VM, or on all hosts of a TPU pod slice: copies this checkout there, installs it, runs it.
#
#   scripts/launch_tpu_vm.sh NAME --zone=ZONE [--project=PROJECT] [--dry_run] [any flag of tapedist train]
#
# --pod        NAME is a slice of several hosts: TensorFlow drives all of them from the first, so only that one trains
# --dir        the folder on the hosts, under the home folder; default tapedist
# --internal_ip, --iap   reach the hosts by their internal addresses, or through Identity-Aware Proxy
# --skip_setup do not copy and install, only train
# --dry_run    prints what would run; DRY_RUN=1 does the same
#
# Needs the gcloud command, logged in. Without --flagfile it trains configs/tpu_vm.flags. The run folder stays on the hosts;
# the last line printed fetches it. Not tried on hardware.
set -euo pipefail
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

name="" zone="" dir=tapedist pod="" skip_setup="" rest=()
where=()
reach=()
for word in "$@"; do
  case $word in
    --zone=*) zone=${word#*=} ;;
    --project=*) where+=("$word") ;;
    --pod) pod=1 ;;
    --dir=*) dir=${word#*=} ;;
    --internal_ip) reach+=(--internal-ip) ;;
    --iap) reach+=(--tunnel-through-iap) ;;
    --skip_setup) skip_setup=1 ;;
    --dry_run) dry_run=1 ;;
    -h | --help) usage ;;
    -*) rest+=("$word") ;;
    *)
      [[ -z $name ]] || die "'$word': the TPU VM is already named '$name'; flags are written --name=value"
      name=$word
      ;;
  esac
done
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "'$name': must be the name of a TPU VM; gcloud compute tpus tpu-vm list"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone='$zone': must be a zone such as us-central1-b"
[[ $dir =~ ^[A-Za-z0-9_./-]+$ && $dir != -* && $dir != /* ]] || die "--dir='$dir': must be a folder under the home folder"
[[ -n $dry_run ]] || command -v gcloud >/dev/null || die "needs the gcloud command: https://cloud.google.com/sdk"
with_default_flagfile configs/tpu_vm.flags ${rest[@]+"${rest[@]}"}
where=("--zone=$zone" ${where[@]+"${where[@]}"})

# on_hosts WHICH COMMAND: runs COMMAND on one host (its number) or on all of them.
on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" ${reach[@]+"${reach[@]}"} "--command=$2"
}

if [[ -z $skip_setup ]]; then
  files=()
  for file in LICENSE README.md pyproject.toml constraints.txt tapedist configs scripts; do
    [[ ! -e $repo/$file ]] || files+=("$repo/$file")
  done
  on_hosts all "mkdir -p $dir"
  run gcloud compute tpus tpu-vm scp --recurse "${files[@]}" "$name:$dir/" "${where[@]}" --worker=all \
    ${reach[@]+"${reach[@]}"}
  # tensorflow-tpu installs the same module as tensorflow, so it takes its place. The quotes are for the hosts' shell.
  on_hosts all "cd $dir && TAPEDIST_EXTRAS=tpu scripts/train.sh --help >/dev/null && .venv/bin/python -m pip uninstall \
--quiet --yes tensorflow && .venv/bin/python -m pip install --quiet 'tensorflow-tpu>=2.20,<2.22' \
--find-links=https://storage.googleapis.com/libtpu-tf-releases/index.html"
fi
train=$(quote .venv/bin/python -m tapedist train "${train_flags[@]}" --strategy=tpu)
if [[ -n $pod ]]; then
  on_hosts 0 "cd $dir && TPU_NAME=$name TPU_LOAD_LIBRARY=0 $train --tpu=$name"
else
  on_hosts all "cd $dir && $train --tpu=local"
fi
fetch=(gcloud compute tpus tpu-vm scp --recurse "$name:$dir/runs" . "${where[@]}" --worker=0 ${reach[@]+"${reach[@]}"})
printf '# fetch the results: %s\n' "$(quote "${fetch[@]}")"

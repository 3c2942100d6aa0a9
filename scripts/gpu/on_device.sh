#!/usr/bin/env bash
# On the GPU machine, from the repository's root. Each step has its own time limit, and none stops
# the others.
#   bash .carry/1/on_device.sh install check probe big
#   bash .carry/2/on_device.sh model small more          # after that, on the same machine
# Its exit code is how many commands failed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=/tmp/e2e
results=$work/results
OUT=${OUT:-$work/out}
mkdir -p $work/parts $results "$OUT"
rm -f $results/*.failed
export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1 E2E=$work
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_USE_DEEP_GEMM=0
export VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
[ -e $work/no_c ] && export NO_C=1

say() { echo "[$(date +%T)] $*"; }

# Runs a command for at most $1 seconds, its output into the log $2.
limited() {
  local seconds=$1 log=$2 began=$SECONDS
  shift 2
  timeout -k 5 "$seconds" "$@" >"$results/$log.log" 2>&1
  local code=$?
  [ $code = 0 ] || touch "$results/$log.failed"
  say "$log: exit code $code after $((SECONDS - began)) s"
}

engines() { # seconds, names: at the same time
  local seconds=$1 name
  shift
  for name in "$@"; do limited "$seconds" "$name" python3 $work/engine.py "$name" $results & done
  wait
  collect
}

collect() {
  python3 $work/summary.py $results "$OUT" >$results/summary.txt 2>&1
  cat $results/*.profile.txt >"$OUT/profile.txt" 2>/dev/null
  tail -n 150 $results/*.log >"$OUT/logs.txt" 2>/dev/null
}

take_parts() { cp "$here"/part-* $work/parts/; }

install() {
  take_parts
  cp "$here"/*.py $work/
  mkdir -p /tmp/site
  tar -C /tmp/site -xJf $work/parts/part-0.software.tar.xz
  tar -C $work -xJf $work/parts/part-1.tokenizer.tar.xz # its folder: big
  # gpu_check.sh would build this alone; here the other cores do it meanwhile.
  limited 120 nvcc env NVCC="$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)" \
    bash csrc/cuda/build.sh fastgen_vllm/_cuda.so &
}

model() {
  take_parts
  mkdir -p $work/packed
  cat $work/parts/part-[2-9].model | tar -C $work/packed -xJf -
  limited 60 unpack python3 $work/pack_model.py unpack $work/packed $work/small
}

check() {
  wait
  limited "${CHECK_SECONDS:-225}" gpu_check env -u PYTHONPATH bash scripts/gpu_check.sh \
    --minutes "${CHECK_MINUTES:-2.6}" --json "$OUT/gpu_check.json"
  tail -n 60 $results/gpu_check.log
  collect
}

probe() {
  limited 60 probe python3 $work/probe.py
  tail -n 3 $results/probe.log
  if ! grep -q '"good": true' $results/probe.log; then
    touch $work/no_c
    export NO_C=1
    say "vLLM's compiled operations do not work here: PyTorch's instead, TRITON_ATTN for stock"
  fi
}

big() {
  engines 110 big-bf16-stock
  engines 130 big-bf16-default
}

small() {
  engines 150 small-bf16-stock small-bf16-full small-bf16-default small-bf16-v1 \
    small-bf16-replayed small-fp32-stock small-fp32-full
}

more() {
  if [ -e $work/no_c ]; then
    say "no graphs without vLLM's compiled operations"
    return
  fi
  engines 110 big-bf16-graphs
  engines 120 big-bf16-replayed
  engines 110 big-bf16-cuda
  engines 120 small-bf16-compiled
}

for step in "$@"; do
  if [[ ! $step =~ ^(install|check|probe|big|model|small|more)$ ]]; then
    echo "there is no step $step; take install check probe big, or model small more" >&2
    exit 2
  fi
done
for step in "$@"; do
  say "$step"
  $step
done
collect
cat $results/summary.txt
exit "$(find $results -name '*.failed' | wc -l)"

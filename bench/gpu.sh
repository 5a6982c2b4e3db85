#!/usr/bin/env bash
# One call on a machine with a GPU, torch, nvcc and the build's tools; no network.
#   bench/gpu.sh [PHASE ...]       smoke measure peers tests sanitize tune (all of them, in this order)
# What matters most comes first: build, every operation against eager once, then the tables, then tests, then the rest.
# In half an hour three calls: smoke measure; LIMIT=480 peers tests; LIMIT=480 sanitize tune. build/gpu keeps what the calls
# before left as long as the machine stays.
# Results go to build/gpu and, after every part, into $OUT/gpu.tar (OUT is bench/results/gpu unless set), so that
# whatever ends the call early leaves what was measured until then. LIMIT (seconds, 570) bounds the whole call: a part
# that would begin with less than ten seconds left is skipped and said so. A part that fails does not stop the rest;
# the exit status is the highest of theirs.
# Peers come along as wheels in WHEELS (build/wheels; 4 MB on a machine with a network):
#   pip download --no-deps -d build/wheels trl liger-kernel cut-cross-entropy verl
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${OUT:-bench/results/gpu}
results=build/gpu
python=${PYTHON:-python3}
limit=${LIMIT:-570}
phases=("$@")
[ ${#phases[@]} -gt 0 ] || phases=(smoke measure peers tests sanitize tune)
mkdir -p "$out" "$results"
status=0

keep() {
  tar -cf "$out/gpu.tar.partial" -C "$(dirname "$results")" "$(basename "$results")" && mv "$out/gpu.tar.partial" "$out/gpu.tar"
}

# SIGINT, as what Python does at Ctrl-C is to finish its tables; a background job would have it ignored.
interruptible=()
env --default-signal=INT true 2>/dev/null && interruptible=(env --default-signal=INT)

# part NAME SECONDS COMMAND..: its output in a log, the last lines of it here.
part() {
  local name=$1 seconds=$2 left=$((limit - SECONDS)) rc
  shift 2
  if [ "$left" -lt 10 ]; then
    echo "== $name: skipped, $left s are left of $limit" | tee -a "$results/skipped.txt"
    keep
    return 1
  fi
  [ "$seconds" -le "$left" ] || seconds=$left
  echo "== $name (at $SECONDS s)"
  timeout -s INT -k 10 "$seconds" "${interruptible[@]}" "$@" >"$results/$name.log" 2>&1
  rc=$?
  tail -n 12 "$results/$name.log"
  [ "$rc" -eq 0 ] || echo "== $name: exit $rc"
  [ "$rc" -le "$status" ] || status=$rc
  keep
  return "$rc"
}

stop() {
  echo "bench/gpu.sh: $1" >&2
  keep
  exit 1
}

# measured NAME SECONDS SELECTION..: benchmarks, each of them written at once, and the table of all so far.
measured() {
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" env PRIME_BENCH_DEVICE=cuda PRIME_BENCH_JSON="$results/$name.json" \
    "$python" -m pytest -q -p no:cacheprovider --benchmark-enable "$@"
  [ -s "$results/$name.json" ] || return 1
  local files=("$results"/measure_*.json)
  part table 30 env "PYTHONPATH=python${PYTHONPATH:+:$PYTHONPATH}" "$python" bench/table.py "${files[@]}" "$results/table" "On a GPU"
}

cores=$(nproc)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "$((cores > 12 ? 12 : cores))")
on_gpu=(env PRIME_KERNELS_TEST_DEVICE=cuda "PRIME_KERNELS_TEST_BACKENDS=triton cuda" "$python" -m pytest -q -p no:cacheprovider)

timeout 5 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$results/device.txt"
timeout 20 "$python" -c 'import sys, torch; print(sys.version.split()[0], torch.__version__, torch.version.cuda)' |
  tee -a "$results/device.txt"
# For this device alone: all architectures would take the time of everything else.
architecture=$(timeout 30 "$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') ||
  stop "torch cannot be imported, or sees no CUDA device"
# Editable: what runs below finds the source tree first, and the extension must be in it.
part build 150 env PRIME_KERNELS_CUDA=ON "PRIME_KERNELS_CUDA_ARCHITECTURES=$architecture" \
  "$python" -m pip install -q --no-build-isolation --no-deps -e . ||
  stop "the extension with CUDA kernels cannot be built: see $results/build.log"

wheels=("${WHEELS:-build/wheels}"/*.whl)
if [ -e "${wheels[0]}" ]; then
  part wheels 60 "$python" -m pip install -q --no-index --no-deps --target build/peers "${wheels[@]}" &&
    export PYTHONPATH="$PWD/build/peers${PYTHONPATH:+:$PYTHONPATH}"
fi

for phase in "${phases[@]}"; do
  case $phase in
    smoke)
      part smoke 120 "$python" bench/smoke.py || echo "== smoke: what failed is above; the tables below may hold wrong numbers"
      ;;
    measure)
      # Every operation against eager and, while time is left, installed peers and torch.compile; written as it goes.
      part bench 180 "$python" -m prime_kernels bench --device cuda --minutes 2 --output "$results/bench"
      measured measure_ceiling 30 bench/test_ceiling.py
      measured measure_log_probs 60 bench/test_log_probs.py -k "triton or cuda or eager"
      measured measure_linear 90 bench/test_linear_log_probs.py \
        -k "(kernel or eager or product) and not memory and not softmax"
      measured measure_segments 60 bench/test_segments.py -k "kernel or eager"
      measured measure_memory 30 bench/test_linear_log_probs.py -k memory
      measured measure_softmax_in_product 60 bench/test_linear_log_probs.py -k softmax
      ;;
    peers)
      measured measure_peers 60 bench/test_log_probs.py -k "trl or liger or quack"
      measured measure_compile_log_probs 60 bench/test_log_probs.py -k compile
      measured measure_compile_linear 60 bench/test_linear_log_probs.py -k compile
      measured measure_compile_segments 60 bench/test_segments.py -k compile
      ;;
    tests)
      part tests_gpu 60 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/ops
      for file in log_probs candidates linear_log_probs kept_logits linear_losses segments rloo_advantages ppo_loss prm_loss pack long_batches fuzz; do
        part "tests_$file" 90 "${on_gpu[@]}" "${workers[@]}" "tests/ops/test_$file.py"
      done
      ;;
    sanitize)
      if command -v compute-sanitizer >/dev/null; then
        part memcheck 60 env PRIME_KERNELS_TEST_DEVICE=cuda PRIME_KERNELS_TEST_BACKENDS=cuda compute-sanitizer \
          --error-exitcode 9 "$python" -m pytest -q tests/ops/test_log_probs.py -k "strided or masked or block_edges"
        part racecheck 60 env PRIME_KERNELS_TEST_DEVICE=cuda PRIME_KERNELS_TEST_BACKENDS=cuda compute-sanitizer \
          --tool racecheck --error-exitcode 9 "$python" -m pytest -q tests/ops/test_long_batches.py \
          -k "ragged and (rloo or scan or prm)"
      fi
      ;;
    tune)
      part tune 500 "$python" bench/tune.py "$results/tune.json"
      ;;
    *)
      stop "no phase $phase: smoke measure peers tests sanitize tune"
      ;;
  esac
done
exit "$status"

#!/usr/bin/env bash
# One call on a machine with a GPU and torch: builds, tests on the device, measures. Under ten minutes, no network.
#   bench/gpu.sh [OUTPUT_DIRECTORY]
# A part that fails does not stop the others; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-bench/results/gpu}}
mkdir -p "$out"
python=${PYTHON:-python3}
status=0

part() {
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  tail -n 15 "$out/$name.log"
  [ "$rc" -eq 0 ] || { echo "== $name: exit $rc"; status=$rc; }
}

on_gpu=(env PRIME_KERNELS_TEST_DEVICE=cuda "PRIME_KERNELS_TEST_BACKENDS=triton cuda")
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/device.txt"
"$python" -c 'import sys, torch; print(sys.version.split()[0], torch.__version__, torch.version.cuda)' | tee -a "$out/device.txt"
part build 120 "$python" -m pip install -q --no-build-isolation --no-deps .
part info 60 "$python" -m prime_kernels
part tests 100 "$python" -m pytest -q -m gpu tests/ops
part tests_log_probs 120 "${on_gpu[@]}" "$python" -m pytest -q tests/ops/test_log_probs.py
part tests_tokens 90 "${on_gpu[@]}" "$python" -m pytest -q tests/ops/test_long_batches.py tests/ops/test_segments.py \
  tests/ops/test_rloo_advantages.py tests/ops/test_ppo_loss.py tests/ops/test_prm_loss.py tests/ops/test_pack.py
part tests_fuzz 60 "${on_gpu[@]}" "$python" -m pytest -q tests/ops/test_fuzz.py
part bench_gpu 240 env PRIME_BENCH_DEVICE=cuda "$python" -m pytest -q bench --benchmark-enable --benchmark-json="$out/bench_gpu.json"
part table_gpu 30 env PYTHONPATH=python "$python" bench/table.py "$out/bench_gpu.json" "$out/gpu" "On a GPU"
part tune 60 "$python" bench/tune.py "$out/tune.json"
if command -v compute-sanitizer >/dev/null; then
  part memcheck 90 "${on_gpu[@]}" env PRIME_KERNELS_TEST_BACKENDS=cuda compute-sanitizer --error-exitcode 9 \
    "$python" -m pytest -q tests/ops/test_log_probs.py -k "strided or masked or block_edges"
  part racecheck 60 "${on_gpu[@]}" env PRIME_KERNELS_TEST_BACKENDS=cuda compute-sanitizer --tool racecheck \
    --error-exitcode 9 "$python" -m pytest -q tests/ops/test_long_batches.py -k "ragged and (rloo or scan or prm)"
fi
exit "$status"

#!/usr/bin/env bash
# One call on a machine with a GPU, torch, nvcc and the build's tools: builds, tests on the device, measures. No network;
# under ten minutes, as the parts' limits add up to less. What matters most comes first.
#   bench/gpu.sh [OUTPUT_DIRECTORY]
# Without its kernels it ends after the build, as their tests would skip; any other part that fails does not stop the rest.
# The exit status is the highest of theirs.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
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
  [ "$rc" -eq 0 ] || echo "== $name: exit $rc"
  [ "$rc" -le "$status" ] || status=$rc
  return "$rc"
}

stop() {
  echo "bench/gpu.sh: $1" >&2
  exit 1
}

on_gpu=(env PRIME_KERNELS_TEST_DEVICE=cuda "PRIME_KERNELS_TEST_BACKENDS=triton cuda")
timeout 5 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/device.txt"
timeout 10 "$python" -c 'import sys, torch; print(sys.version.split()[0], torch.__version__, torch.version.cuda)' |
  tee -a "$out/device.txt"
# For this device alone: all architectures would take the time of everything else.
architecture=$(timeout 30 "$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') ||
  stop "torch cannot be imported, or sees no CUDA device"
# Editable: what runs below finds the source tree first, and the extension must be in it.
part build 115 env PRIME_KERNELS_CUDA=ON "PRIME_KERNELS_CUDA_ARCHITECTURES=$architecture" \
  "$python" -m pip install -q --no-build-isolation --no-deps -e . ||
  stop "the extension with CUDA kernels cannot be built: see $out/build.log"
part backends 15 "$python" -c 'import sys, prime_kernels as pk
found = pk.available_backends()
missing = [f"{name}: {found[name]}" for name in ("cuda", "triton") if found[name] is not None]
sys.exit("not available: " + "; ".join(missing) if missing else 0)' ||
  stop "the kernels cannot run here: see $out/backends.log"
part info 40 "$python" -m prime_kernels
part tests 50 "$python" -m pytest -q -m gpu tests/ops
part tests_log_probs 50 "${on_gpu[@]}" "$python" -m pytest -q tests/ops/test_log_probs.py
part tests_tokens 50 "${on_gpu[@]}" "$python" -m pytest -q tests/ops/test_long_batches.py tests/ops/test_segments.py \
  tests/ops/test_rloo_advantages.py tests/ops/test_ppo_loss.py tests/ops/test_prm_loss.py tests/ops/test_pack.py
part bench_gpu 130 env PRIME_BENCH_DEVICE=cuda "$python" -m pytest -q bench --benchmark-enable --benchmark-json="$out/bench_gpu.json"
part table_gpu 15 env PYTHONPATH=python "$python" bench/table.py "$out/bench_gpu.json" "$out/gpu" "On a GPU"
part tune 20 "$python" bench/tune.py "$out/tune.json"
part tests_fuzz 20 "${on_gpu[@]}" "$python" -m pytest -q tests/ops/test_fuzz.py
if command -v compute-sanitizer >/dev/null; then
  part memcheck 25 "${on_gpu[@]}" env PRIME_KERNELS_TEST_BACKENDS=cuda compute-sanitizer --error-exitcode 9 \
    "$python" -m pytest -q tests/ops/test_log_probs.py -k "strided or masked or block_edges"
  part racecheck 15 "${on_gpu[@]}" env PRIME_KERNELS_TEST_BACKENDS=cuda compute-sanitizer --tool racecheck \
    --error-exitcode 9 "$python" -m pytest -q tests/ops/test_long_batches.py -k "ragged and (rloo or scan or prm)"
fi
exit "$status"

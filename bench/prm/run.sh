#!/usr/bin/env bash
# The offline PRM run for several seeds: warm-up, sampling, PRM, scores, choosing, results. Run again after an
# interruption, it skips what is finished; sampling and scoring go on where they were.
# usage: bench/prm/run.sh OUTPUT ["0 1"]
set -euo pipefail
output=$1 seeds=${2:-0 1}
here="$(dirname "$0")" examples="$(dirname "$0")/../../examples"
for seed in $seeds; do
  run="$output/$seed"
  [ -d "$run/sft/final" ] || prime-trainer sft "$examples/demo.toml" --seed "$seed" --output "$run/sft"
  common=(--seed "$seed" --train_prm.path "$run/train.jsonl" --train_prm.eval_path "$run/test.jsonl")
  python "$here/sample.py" "$examples/prm.toml" --seed "$seed" --model.path "$run/sft/final" --output "$run"
  [ -d "$run/prm/final" ] || prime-trainer prm "$examples/prm.toml" "${common[@]}" --model.path "$run/sft/final" \
    --train_prm.cache "$output/reference-cache" --output "$run/prm"
  resume=$([ -f "$run/scores/scores.jsonl" ] && echo --resume || true)
  prime-trainer score "$examples/prm.toml" $resume --model.path "$run/prm/final" --score.reference "$run/sft/final" \
    --score.path "$run/test.jsonl" --score.name "CE PRM" --output "$run/scores"
done
python "$here/results.py" "$output" "$seeds" "$here/../results/prm"

#!/usr/bin/env bash
# The demo for several seeds: SFT warm-up, PRIME, report; extra words go to the RL stage (--steps 60, say).
# usage: bench/demo/seeds.sh OUTPUT "0 1 2" [--key value ...]
set -euo pipefail
output=$1 seeds=$2
shift 2
config="$(dirname "$0")/../../examples/demo.toml"
for seed in $seeds; do
  start=$SECONDS
  prime-trainer sft "$config" --seed "$seed" --output "$output/sft-$seed"
  prime-trainer rl "$config" --seed "$seed" --model.path "$output/sft-$seed/final" --output "$output/rl-$seed" "$@"
  prime-trainer report "$output/rl-$seed"
  echo "seed $seed: $((SECONDS - start)) s in all"
done

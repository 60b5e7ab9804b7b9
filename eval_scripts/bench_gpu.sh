#!/usr/bin/env bash
# All that is worth measuring on one GPU, in under ten minutes; the tables come last.
#   eval_scripts/bench_gpu.sh [RESULTS_FOLDER]
# Other shapes, as for a trial on a CPU: ONE=llava-1.5-tiny NEXT=llava-next-tiny SECONDS_EACH=5
set -euo pipefail
out=${1:-docs/results/gpu}
one=${ONE:-llava-1.5-7b}
next=${NEXT:-llava-next-7b}
each=${SECONDS_EACH:-80}

bench() { llava-hvp bench --rounds 15 --max-seconds "$each" --out "$@"; }
quiet() { "$@" >/dev/null; }

quiet bench "$out" --geometry "$one" --methods hivtp,hiprune,random --r-max 0.5,0.25
quiet bench "$out/batch-8" --geometry "$one" --methods hivtp,random --r-max 0.25 --batch 8
quiet bench "$out" --geometry "$next" --image-size 672x672 --methods hivtp,hiprune,random --r-max 0.25
# The tower in float16, which LLaVA's scripts leave in float32; the released codes' way beside ours.
quiet bench "$out/tower-in-model-dtype" --geometry "$one" --methods hivtp,hiprune --r-max 0.25 \
    --prune-opt tower_dtype=model
quiet bench "$out/all-attentions" --geometry "$one" --methods hivtp,hiprune --r-max 0.25 --all-attentions
quiet bench "$out" --geometry "$one" --methods hivtp,random --r-max 0.25 --load-4bit
find "$out" -name '*.md' | sort | while read -r table; do
    printf '\n%s\n' "$table"
    cat "$table"
done

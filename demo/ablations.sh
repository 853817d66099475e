#!/usr/bin/env bash
# Table 2, Figure 3 and Figure 5 of the paper in the demo's world, over seeds: the whole of demo/run.sh a seed, then its variants.
#
#   bash demo/ablations.sh                                   # seeds 0 1 2, one after the other
#   RANKS=1 SEEDS=1 PORT=29501 bash demo/ablations.sh        # one of them, beside another; run it without SEEDS at the end for all tables
#
# ROOT      folder of everything (default runs/ablations); run again, it goes on where it stood
# SEEDS     default "0 1 2";  SAMPLES  responses of the vote (default 32);  the variables of demo/run.sh hold here too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=${ROOT:-runs/ablations} SEEDS=${SEEDS:-0 1 2}

variants() { # in the shell of one seed, after demo/run.sh
  local flags name size
  step "Table 2: without the partial reward, without each filter"
  train 04_grpo.py no-partial --adapter "$WORK/sft/best" "${rl[@]}" --alpha 0
  for name in no-score no-reprediction no-filter; do
    flags=("--$name")
    [ "$name" = no-filter ] && flags=(--no-score --no-reprediction)
    run python 02_filter.py --cot "$WORK/cot.jsonl" --out "$WORK/sft-$name.jsonl" --base-url "$URL" "${flags[@]}"
    train 03_sft.py "sft-$name" --data "$WORK/sft-$name.jsonl" --target cot "${sft[@]}"
    train 04_grpo.py "$name" --adapter "$WORK/sft-$name/best" "${rl[@]}"
  done
  step "Figure 3: the size of a group"
  for size in 2 4 16; do
    train 04_grpo.py "group-$size" --adapter "$WORK/sft/best" "${rl[@]}" --group-size "$size"
  done
  step "their scores, and Figure 5: many responses"
  for name in no-partial no-score no-reprediction no-filter group-2 group-4 group-16; do
    evaluate "test-$name" test --adapter "$WORK/$name/best"
  done
  evaluate vote-sft test --adapter "$WORK/sft/best" --samples "${SAMPLES:-32}"
  evaluate vote test --adapter "$WORK/grpo/best" --samples "${SAMPLES:-32}"
}

began=$SECONDS
for SEED in $SEEDS; do
  (
    WORK=$ROOT/seed-$SEED
    . demo/run.sh
    variants
  )
done

over() { # NAME RUN → NAME=that run of every seed
  local folders=() seed
  for seed in $SEEDS; do folders+=("$ROOT/seed-$seed/$2"); done
  local IFS=,
  echo "$1=${folders[*]}"
}
row() { rows+=("$(over "$1" "$2")"); }
{
  rows=()
  row zero-shot test-zero; row SFT test-answer; row CoT-SFT test-sft; row Only-RL test-only-rl; row JMERE-R1 test-grpo
  row "JMERE-R1, grey images" test-grey
  printf '\n**Five paradigms** (Tables 1 and 3)\n\n'
  python demo/table.py "${rows[@]}"
  rows=()
  row JMERE-R1 test-grpo; row "no partial reward" test-no-partial; row "no score filter" test-no-score
  row "no re-prediction filter" test-no-reprediction; row "no filter" test-no-filter
  printf '\n**Ablations** (Table 2)\n\n'
  python demo/table.py "${rows[@]}"
  rows=()
  row "G = 2" test-group-2; row "G = 4" test-group-4; row "G = 8" test-grpo; row "G = 16" test-group-16
  printf '\n**Group size** (Figure 3)\n\n'
  python demo/table.py "${rows[@]}"
  printf '\n**Many responses** (Figure 5), temperature 0.8, most frequent set of quintuples\n\n'
  python demo/table.py --votes "$(over CoT-SFT vote-sft)" "$(over JMERE-R1 vote)"
  printf '\n**Share of the gain** over zero-shot, test F1\n\n'
  python - "$ROOT" $SEEDS <<'PYTHON'
import json
import sys

print("| seed | zero-shot | CoT-SFT | JMERE-R1 | of the gain from SFT | from GRPO |\n| --- | --- | --- | --- | --- | --- |")
for seed in sys.argv[2:]:
    paths = [f"{sys.argv[1]}/seed-{seed}/{run}/metrics.json" for run in ("test-zero", "test-sft", "test-grpo")]
    zero, sft, rl = (100 * json.load(open(path))["scores"]["jmere"]["f1"] for path in paths)
    share = f"{100 * (sft - zero) / (rl - zero):.0f} % | {100 * (rl - sft) / (rl - zero):.0f} %" if rl > zero else "no gain |"
    print(f"| {seed} | {zero:.1f} | {sft:.1f} | {rl:.1f} | {share} |")
PYTHON
} | tee "$ROOT/tables.md"
echo "$(((SECONDS - began) / 60)) minutes; the tables are in $ROOT/tables.md."

#!/usr/bin/env bash
# Table 2, Figure 3 and Figure 5 of the paper in the demo's world, over seeds: the whole of demo/run.sh a seed, then its variants.
#
#   bash demo/ablations.sh                                   # seeds 0 1 2, one after the other
#   RANKS=1 SEEDS=1 PORT=29501 bash demo/ablations.sh        # one of them, beside another; run it without SEEDS at the end for all tables
#
# ROOT      folder of everything (default runs/ablations); run again, it goes on where it stood
# SEEDS     default "0 1 2";  PARTS  beside the five paradigms (default "votes sizes filters")
# SIZES     groups of the sweep (default "2 4 16");  SAMPLES  responses of the vote (default 16).  The variables of demo/run.sh hold here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=${ROOT:-runs/ablations} SEEDS=${SEEDS:-0 1 2} PARTS=${PARTS-votes sizes filters} SIZES=${SIZES:-2 4 16}

variant() { # NAME arguments of 04… → its adapter and its score on the test set
  train 04_grpo.py "$1" "${rl[@]}" "${@:2}"
  evaluate "test-$1" test --adapter "$WORK/$1/best"
}
votes() { # Figure 5: many responses
  evaluate vote-sft test --adapter "$WORK/sft/best" --temperature 0.8 --samples "${SAMPLES:-16}"
  evaluate vote test --adapter "$WORK/grpo/best" --temperature 0.8 --samples "${SAMPLES:-16}"
}
sizes() { # Figure 3, and Table 2 without the partial reward
  local size
  variant no-partial --adapter "$WORK/sft/best" --alpha 0
  for size in $SIZES; do variant "group-$size" --adapter "$WORK/sft/best" --group-size "$size"; done
}
filters() { # Table 2, without each filter
  local flags name
  for name in no-score no-reprediction no-filter; do
    flags=("--$name")
    [ "$name" = no-filter ] && flags=(--no-score --no-reprediction)
    run python 02_filter.py --cot "$WORK/cot.jsonl" --out "$WORK/sft-$name.jsonl" --base-url "$URL" "${flags[@]}"
    train 03_sft.py "sft-$name" --data "$WORK/sft-$name.jsonl" --target cot "${sft[@]}"
    variant "$name" --adapter "$WORK/sft-$name/best"
  done
}

began=$SECONDS
for SEED in $SEEDS; do
  (
    WORK=$ROOT/seed-$SEED
    . demo/run.sh
    for part in $PARTS; do "$part"; done
  )
done

over() { # NAME RUN → NAME=that run of every seed
  local folders=() seed
  for seed in $SEEDS; do folders+=("$ROOT/seed-$seed/$2"); done
  local IFS=,
  echo "$1=${folders[*]}"
}
table() { # TITLE "NAME RUN" … → the table, unless PARTS left some of it out
  local title=$1 rows=() row seed
  shift
  for row; do
    for seed in $SEEDS; do
      [ -f "$ROOT/seed-$seed/${row##*:}/metrics.json" ] || { printf '\n**%s**: %s of seed %s was not run\n' "$title" "${row##*:}" "$seed"; return; }
    done
    rows+=("$(over "${row%:*}" "${row##*:}")")
  done
  printf '\n**%s**\n\n' "$title"
  python demo/table.py $votes "${rows[@]}"
}
{
  votes=
  table "Five paradigms (Tables 1 and 3)" zero-shot:test-zero SFT:test-answer CoT-SFT:test-sft Only-RL:test-only-rl JMERE-R1:test-grpo \
    "JMERE-R1, grey images:test-grey"
  table "Ablations (Table 2)" JMERE-R1:test-grpo "no partial reward:test-no-partial" "no score filter:test-no-score" \
    "no re-prediction filter:test-no-reprediction" "no filter:test-no-filter"
  sizes=("group of 8:test-grpo")
  for size in $SIZES; do sizes+=("group of $size:test-group-$size"); done
  table "Group size (Figure 3)" "${sizes[@]}"
  votes=--votes
  table "Many responses (Figure 5), temperature 0.8, most frequent set of quintuples" CoT-SFT:vote-sft JMERE-R1:vote
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

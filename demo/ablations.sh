#!/usr/bin/env bash
# Table 2, Figure 3 and Figure 5 of the paper in the demo's world, over seeds: the whole of demo/run.sh a seed, then its variants.
#
#   bash demo/ablations.sh                                   # seeds 3 4 5, one after the other
#   RANKS=1 SEEDS=4 PORT=29501 bash demo/ablations.sh        # one of them, beside another; run it without SEEDS at the end for all tables
#
# ROOT      folder of everything (default runs/ablations); run again, it goes on where it stood
# SEEDS     default "3 4 5", since 0, 1 and 2 served to choose the settings;  PARTS  beside the five paradigms (default "figure5 table2 figure3")
# SIZES     groups of the sweep (default "2 4 16");  SAMPLES  responses of the vote (default 16).  The variables of demo/run.sh hold here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=${ROOT:-runs/ablations} SEEDS=${SEEDS:-3 4 5} PARTS=${PARTS-figure5 table2 figure3} SIZES=${SIZES:-2 4 16}

variant() { # NAME arguments of 04… → its adapter and its score on the test set
  train 04_grpo.py "$1" --epochs "$EPOCHS_RL" "${rl[@]}" "${@:2}"
  evaluate "test-$1" test --adapter "$WORK/$1/best"
}
table2() { # without the partial reward, without each filter
  local flags name
  variant no-partial --adapter "$WORK/sft/best" --alpha 0
  for name in no-score no-reprediction no-filter; do
    flags=("--$name")
    [ "$name" = no-filter ] && flags=(--no-score --no-reprediction)
    run python 02_filter.py --cot "$WORK/cot.jsonl" --out "$WORK/sft-$name.jsonl" --base-url "$URL" "${flags[@]}"
    train 03_sft.py "sft-$name" --data "$WORK/sft-$name.jsonl" --target cot "${sft[@]}"
    variant "$name" --adapter "$WORK/sft-$name/best"
  done
}
figure3() { # the size of a group
  local size
  for size in $SIZES; do
    [ "$size" = 8 ] || variant "group-$size" --adapter "$WORK/sft/best" --group-size "$size" # 8 is the run of the five paradigms
  done
}
figure5() { # many responses
  evaluate vote-sft test --adapter "$WORK/sft/best" --temperature 0.8 --samples "${SAMPLES:-16}"
  evaluate vote test --adapter "$WORK/grpo/best" --temperature 0.8 --samples "${SAMPLES:-16}"
}

began=$SECONDS
for SEED in $SEEDS; do
  (
    WORK=$ROOT/seed-$SEED
    . demo/run.sh
    for part in $PARTS; do "$part"; done
  )
done

table() { # TITLE NAME:RUN … → the table over seeds, unless PARTS left some of it out
  local title=$1 rows=() row seed
  shift
  for row; do
    local folders=
    for seed in $SEEDS; do
      folders+=,$ROOT/seed-$seed/${row##*:}
      [ -f "${folders##*,}/metrics.json" ] || { printf '\n**%s**: %s was not run\n' "$title" "${folders##*,}"; return; }
    done
    rows+=("${row%:*}=${folders#,}")
  done
  printf '\n**%s**\n\n' "$title"
  python demo/table.py $flags "${rows[@]}"
}
{
  flags=
  table "Five paradigms (Tables 1 and 3)" zero-shot:test-zero SFT:test-answer CoT-SFT:test-sft Only-RL:test-only-rl JMERE-R1:test-grpo \
    "JMERE-R1, grey images:test-grey"
  table "Ablations (Table 2)" JMERE-R1:test-grpo "no partial reward:test-no-partial" "no score filter:test-no-score" \
    "no re-prediction filter:test-no-reprediction" "no filter:test-no-filter"
  sizes=()
  for size in $(printf '%s\n' 8 $SIZES | sort -nu); do
    [ "$size" = 8 ] && sizes+=("group of 8:test-grpo") || sizes+=("group of $size:test-group-$size")
  done
  table "Group size (Figure 3)" "${sizes[@]}"
  flags=--votes
  table "Many responses (Figure 5), temperature 0.8, most frequent set of quintuples" CoT-SFT:vote-sft JMERE-R1:vote
  printf '\n**Share of the gain** over zero-shot, test F1\n\n'
  python demo/summary.py "$ROOT" --seeds $SEEDS --out "$ROOT/figures.png"
  printf '\n**GRPO against its start**, paired bootstrap over tweets, a seed after the other\n\n```\n'
  for seed in $SEEDS; do
    python 05_eval.py --compare "CoT-SFT=$ROOT/seed-$seed/test-sft" "JMERE-R1=$ROOT/seed-$seed/test-grpo" | grep -E '^(Trained|CoT-SFT|JMERE-R1) '
  done
  echo '```'
} | tee "$ROOT/tables.md"
echo "$(((SECONDS - began) / 60)) minutes; the tables are in $ROOT/tables.md, the curves in $ROOT/figures.png."

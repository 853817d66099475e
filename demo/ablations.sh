#!/usr/bin/env bash
# Table 2, Figure 3 and Figure 5 of the paper in the demo's world, over seeds: the whole of demo/run.sh a
# seed, then its variants.
#
#   bash demo/ablations.sh                                   # seeds 3 4 5, one after the other
#   RANKS=1 SEEDS=4 PORT=29501 bash demo/ablations.sh        # one of them, beside another
#   python -m demo.tables runs/ablations/seed-*              # then the tables of all that were run
#
# ROOT      folder of everything (default runs/ablations); run again, it goes on where it stood
# SEEDS     default "3 4 5", since 0, 1 and 2 served to choose the settings
# PARTS     beside the five paradigms (default "figure5 table2 figure3")
# SIZES     groups of the sweep (default "2 4 16");  SAMPLES  responses of the vote (default 16)
# The variables of demo/run.sh hold here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=${ROOT:-runs/ablations}
SEEDS=${SEEDS:-3 4 5} PARTS=${PARTS-figure5 table2 figure3} SIZES=${SIZES:-2 4 16}

variant() { # NAME arguments of 04… → its adapter and its score on the test set
  train 04_grpo.py "$1" --epochs "$EPOCHS_RL" "${rl[@]}" "${@:2}"
  evaluate "test-$1" test --adapter "$WORK/$1/best"
}
table2() { # without the partial reward, without each filter
  local flags name chains
  variant no-partial --adapter "$WORK/sft/best" --alpha 0
  for name in no-score no-reprediction no-filter; do
    flags=("--$name")
    [ "$name" = no-filter ] && flags=(--no-score --no-reprediction)
    chains=$WORK/sft-$name.jsonl
    run python 02_filter.py --cot "$WORK/cot.jsonl" --out "$chains" --base-url "$URL" "${flags[@]}"
    train 03_sft.py "sft-$name" --data "$chains" "${sft[@]}"
    variant "$name" --adapter "$WORK/sft-$name/best"
  done
}
figure3() { # the size of a group
  local size
  for size in $SIZES; do # 8 is the run of the five paradigms
    [ "$size" = 8 ] || variant "group-$size" --adapter "$WORK/sft/best" --group-size "$size"
  done
}
figure5() { # many responses
  evaluate vote-sft test --adapter "$WORK/sft/best" --temperature 0.8 --samples "${SAMPLES:-16}"
  evaluate vote test --adapter "$WORK/grpo/best" --temperature 0.8 --samples "${SAMPLES:-16}"
}

began=$SECONDS
folders=()
for SEED in $SEEDS; do
  folders+=("$ROOT/seed-$SEED")
  (
    WORK=$ROOT/seed-$SEED
    . demo/run.sh
    for part in $PARTS; do "$part"; done
  )
done

export PATH="$(cd "${DEMO_VENV:-.venv}/bin" && pwd):$PATH"
python -m demo.tables "${folders[@]}" --figures "$ROOT/figures.png" | tee "$ROOT/tables.md"
echo "$(((SECONDS - began) / 60)) minutes; tables in $ROOT/tables.md, curves in $ROOT/figures.png."

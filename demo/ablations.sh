#!/usr/bin/env bash
# The runs behind demo/RESULTS.md, over seeds: demo/run.sh a seed, then the parts that are asked for.
#
#   bash demo/ablations.sh                                   # seeds 3 4 5, one after the other
#   RANKS=1 SEEDS=4 PORT=29501 bash demo/ablations.sh        # one of them, beside another
#   UNTIL=5 PARTS=gain SEEDS="3 4 5 6 7" bash demo/ablations.sh    # without the other paradigms
#   python -m demo.tables runs/ablations/seed-*              # then the tables of all that were run
#
# ROOT      folder of everything (default runs/ablations); run again, it goes on where it stood
# SEEDS     default "3 4 5", since 0, 1 and 2 served to choose the settings
# PARTS     beside the five paradigms (default "figure5 table2 figure3"): table2, figure3, figure5; gain (CoT-SFT
#           and JMERE-R1 alone for each of CLASSES and TRAIN_SEEDS, under settings found on seeds 0 and 1, half
#           as long again as run.sh's: EPOCHS_GAIN, LR_GAIN, advantages not divided by the standard deviation);
#           variants (VARIANTS, of variants/; a copy that is there already is used as it is); rates (RATES)
# UNTIL     5: the world and its chains alone, then the parts, which make what they start from
# SIZES     groups of the sweep (default "2 4 16");  SAMPLES  responses of the vote (default 16)
# The variables of demo/run.sh hold here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=${ROOT:-runs/ablations}
SEEDS=${SEEDS:-3 4 5} PARTS=${PARTS-figure5 table2 figure3} SIZES=${SIZES:-2 4 16}
CLASSES=${CLASSES:-llava qwen2_5_vl} TRAIN_SEEDS=${TRAIN_SEEDS:-0 1} RATES=${RATES:-2e-6 1e-5 2e-4}
EPOCHS_GAIN=${EPOCHS_GAIN:-1.5} LR_GAIN=${LR_GAIN:-2e-4}
VARIANTS=${VARIANTS:-no_std batch_std gdpo token_mean rloo length_penalty papo hard_first drop_thoughts}
for part in $PARTS; do # before hours of other runs
  case $part in
    table2 | figure3 | figure5 | gain | variants | rates) ;;
    *) echo "error: PARTS: $part: expected table2, figure3, figure5, gain, variants or rates" >&2 && exit 2 ;;
  esac
done

warm_up() { # FOLDER arguments of 03… → CoT-SFT and its score
  mkdir -p "$WORK/$1"
  train 03_sft.py "$1/sft" --data "$WORK/sft.jsonl" "${sft[@]}" "${@:2}"
  evaluate "$1/test-sft" test --adapter "$WORK/$1/sft/best"
}
copy_of() { # NAME of a variant → its script
  local copy
  copy=$(sed -n 's/^copy to //p' "variants/$1.diff")
  [ -e "$copy" ] || bash variants/make.sh "$1" >&2 || return
  echo "$copy"
}
gain() { # does GRPO gain, in every class and training?
  local TRAIN_SEED class at script # train and evaluate see this TRAIN_SEED
  script=$(copy_of no_std)
  for TRAIN_SEED in $TRAIN_SEEDS; do
    for class in $CLASSES; do
      at=gain/$class-$TRAIN_SEED
      warm_up "$at" --model "demo/base/$class"
      train "$script" "$at/grpo" --adapter "$WORK/$at/sft/best" "${rl[@]}" \
        --epochs "$EPOCHS_GAIN" --lr "$LR_GAIN"
      evaluate "$at/test-grpo" test --adapter "$WORK/$at/grpo/best"
    done
  done
}
main_run() { # CoT-SFT and JMERE-R1 of run.sh, where it was stopped before them
  if [ ! -e "$WORK/test-grpo/metrics.json" ]; then
    warm_up .
    variant grpo --adapter "$WORK/sft/best"
  fi
}
variants() { # each from the same warm-up, but drop_thoughts, which is one
  local name script
  main_run
  for name in $VARIANTS; do
    script=$(copy_of "$name")
    case $name in
      drop_thoughts)
        train "$script" sft-drop_thoughts --data "$WORK/sft.jsonl" "${sft[@]}"
        evaluate test-variant-drop_thoughts-sft test --adapter "$WORK/sft-drop_thoughts/best"
        variant variant-drop_thoughts --adapter "$WORK/sft-drop_thoughts/best"
        ;;
      hard_first)
        evaluate votes train --adapter "$WORK/sft/best" --temperature 0.8 --samples 8
        by "$script" variant-hard_first --adapter "$WORK/sft/best" --votes "$WORK/votes"
        ;;
      *) by "$script" "variant-$name" --adapter "$WORK/sft/best" ;;
    esac
  done
}
rates() { # learning rates of 04
  local rate
  main_run
  for rate in $RATES; do
    variant "rate-$rate" --adapter "$WORK/sft/best" --lr "$rate"
  done
}
variant() { # NAME arguments of 04… → its adapter and its score on the test set
  by 04_grpo.py "$@"
}
by() { # SCRIPT, 04 or a copy; NAME; arguments…
  train "$1" "$2" --epochs "$EPOCHS_RL" "${rl[@]}" "${@:3}"
  evaluate "test-$2" test --adapter "$WORK/$2/best"
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

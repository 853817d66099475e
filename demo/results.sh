#!/usr/bin/env bash
# Everything that demo/RESULTS.md holds, from nothing: the runs, the tables, the figures.
#
#   bash demo/results.sh                          # about six hours of one core; killed, it goes on where it stood
#   WHAT=tables bash demo/results.sh              # the tables and figures of what was run so far
#   WHAT=gain SEEDS=6 PORT=29501 bash demo/results.sh     # one part, beside another of other worlds
#
# ROOT     folder of everything (default runs/ablations)
# WHAT     default "gain paradigms variants rates tables"
# The variables of demo/ablations.sh hold here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ROOT=${ROOT:-runs/ablations} RANKS=${RANKS:-1}
WHAT=${WHAT:-gain paradigms variants rates tables}

gain() { # does GRPO gain? Two classes, five worlds, two trainings
  SEEDS=${SEEDS:-3 4 5 6 7} UNTIL=5 PARTS=gain bash demo/ablations.sh
}
paradigms() { # Tables 1, 2 and 3, Figures 3 and 5
  SEEDS=${SEEDS:-3 4 5} bash demo/ablations.sh
}
variants() { # in a world in which the paper's advantage gains next to nothing
  SEEDS=${SEEDS:-1} UNTIL=5 PARTS=variants TEST=400 RL_LR=2e-4 bash demo/ablations.sh
}
rates() {
  SEEDS=${SEEDS:-0} UNTIL=5 PARTS=rates TEST=400 bash demo/ablations.sh
}
tables() {
  export PATH="$(cd "${DEMO_VENV:-.venv}/bin" && pwd):$PATH"
  python -m demo.tables "$ROOT"/seed-* --figures "$ROOT/figures.png"
  for class in llava qwen2_5_vl; do
    compgen -G "$ROOT/seed-*/gain/$class-?/test-grpo" >/dev/null || continue # not run
    printf '\n**What the answers of %s are wrong in** (part gain)\n\n' "$class"
    python -m demo.errors "$ROOT"/seed-*/gain/"$class"-?/test-{sft,grpo}
    printf '\n**How often the standard deviation bites: %s** (part gain)\n\n' "$class"
    python -m demo.groups "$ROOT"/seed-*/gain/"$class"-?/grpo
  done
}

for part in $WHAT; do
  case $part in
    gain | paradigms | variants | rates | tables) ;;
    *) echo "error: WHAT: $part: expected gain, paradigms, variants, rates or tables" >&2 && exit 2 ;;
  esac
done
for part in $WHAT; do
  "$part"
done

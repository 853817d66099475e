#!/usr/bin/env bash
# The five stages on a laptop: a picture world, a tiny model of the real architecture, and a teacher that looks at the pictures.
#
#   bash demo/run.sh                      # tiny Qwen2.5-VL
#   ARCH=llava bash demo/run.sh           # tiny LLaVA-1.5
#   WORK=/tmp/demo RANKS=2 bash demo/run.sh
#
# WORK      folder of everything made here (default runs/demo-$ARCH); run again, it goes on where it stood, delete it to start anew
# DEMO_VENV virtual environment to use; by default .venv is created and requirements.txt installed into it
# RANKS     processes of 03, 04 and 05 (default 1)
# TRAIN, VAL, TEST   examples of each split;  SEED
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ARCH=${ARCH:-qwen2_5_vl}
WORK=${WORK:-runs/demo-$ARCH}
RANKS=${RANKS:-1}
TRAIN=${TRAIN:-40} VAL=${VAL:-8} TEST=${TEST:-16} SEED=${SEED:-0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OPENAI_API_KEY=demo # any key will do: the teacher is ours
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset OPENAI_BASE_URL

step() { printf '\n=== %s\n' "$*"; }
run() { # show the command as one would type it, then do it
  printf '+ %s\n' "$*"
  "$@"
}

step "0. environment"
if [ -z "${DEMO_VENV:-}" ]; then
  DEMO_VENV=.venv
  [ -x .venv/bin/python ] || run python3 -m venv .venv
  if ! cmp -s requirements.txt .venv/requirements.installed; then # installed once, and again when the file changes
    run .venv/bin/python -m pip install --quiet -r requirements.txt
    cp requirements.txt .venv/requirements.installed
  fi
fi
export PATH="$(cd "$DEMO_VENV/bin" && pwd):$PATH" # deepspeed and ninja are found here
python -c 'import sys, torch, transformers; print(sys.executable, "torch", torch.__version__, "transformers", transformers.__version__)'

step "1. the world: $TRAIN / $VAL / $TEST tweets with pictures"
mkdir -p "$WORK"
run python demo/world.py --out "$WORK/world" --train "$TRAIN" --val "$VAL" --test "$TEST" --seed "$SEED"

step "2. the model: a tiny $ARCH"
[ -f "$WORK/model/generation_config.json" ] || run python demo/make_base.py --arch "$ARCH" --out "$WORK/model" --seed "$SEED"

step "3. the teacher"
rm -f "$WORK/teacher.url"
python demo/teacher.py --port 0 --ready-file "$WORK/teacher.url" --seed "$SEED" &
TEACHER=$!
trap 'kill "$TEACHER" 2>/dev/null || true; wait "$TEACHER" 2>/dev/null || true' EXIT
until [ -s "$WORK/teacher.url" ]; do
  kill -0 "$TEACHER" 2>/dev/null || { echo "error: the teacher did not start" >&2; exit 1; }
  sleep 0.1
done
URL=$(cat "$WORK/teacher.url")

# From here on: the commands of the README, with small numbers.
step "4. distil (01)"
run python 01_distill.py --data "$WORK/world/train.jsonl" --out "$WORK/cot.jsonl" --base-url "$URL" --n 5

step "5. filter (02)"
run python 02_filter.py --cot "$WORK/cot.jsonl" --out "$WORK/sft.jsonl" --base-url "$URL"

step "6. supervised warm-up (03)"
run deepspeed --num_gpus "$RANKS" 03_sft.py --model "$WORK/model" --data "$WORK/sft.jsonl" --val "$WORK/world/val.jsonl" \
  --out "$WORK/sft" --target cot --epochs 2

step "7. reinforcement learning (04)"
run deepspeed --num_gpus "$RANKS" 04_grpo.py --model "$WORK/model" --adapter "$WORK/sft/best" --data "$WORK/world/train.jsonl" \
  --val "$WORK/world/val.jsonl" --out "$WORK/grpo" --group-size 8 --epochs 1 --max-new-tokens 96

step "8. evaluate (05)"
run deepspeed --num_gpus "$RANKS" 05_eval.py --model "$WORK/model" --adapter "$WORK/grpo/best" --data "$WORK/world/test.jsonl" \
  --out "$WORK/test" --max-new-tokens 96

echo
echo "Everything is in $WORK. The weights started at random and saw a few examples: scores near zero are right here."

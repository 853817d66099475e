#!/usr/bin/env bash
# The tests, from nothing: makes .venv, installs tests/requirements.txt, runs ruff and pytest on two workers.
#
#   bash tests/run.sh                       # everything
#   bash tests/run.sh tests/test_common.py  # arguments go to pytest
#
# TEST_VENV  use this virtual environment instead, as it is
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${TEST_VENV:-}" ]; then
  TEST_VENV=.venv
  [ -x .venv/bin/pip ] || python3 -m venv .venv
  if ! cat requirements.txt tests/requirements.txt | cmp -s - .venv/requirements.tests.installed; then
    .venv/bin/python -m pip install --quiet -r tests/requirements.txt
    cat requirements.txt tests/requirements.txt > .venv/requirements.tests.installed
  fi
fi
export PATH="$(cd "$TEST_VENV/bin" && pwd):$PATH" # deepspeed and ninja are found here
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

ruff check .
ruff format --check .
# Files in the order of their names, not by their number of tests: test_demo_learns.py is minutes long and must not start last.
python -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations 15 "$@"

#!/usr/bin/env bash
# Make a variant: a copy of the script it changes, with variants/NAME.diff applied. No file that is there is touched.
#
#   bash variants/make.sh              # what there is
#   bash variants/make.sh no_std       # 04_grpo.py → 04_grpo_no_std.py
#   deepspeed 04_grpo_no_std.py --out runs/no-std
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
  echo "error: $*" >&2
  exit 2
}
name=${1:-}
diff=variants/$name.diff
names=$(cd variants && ls -- *.diff | sed 's/\.diff$//' | paste -sd' ')
[ -n "$name" ] && [ -f "$diff" ] || stop "variant '$name': expected one of $names"
script=$(sed -n 's/^copy from //p' "$diff")
copy=$(sed -n 's/^copy to //p' "$diff")
[ ! -e "$copy" ] || stop "$copy is there already: move or delete it first"
git apply "$diff" || stop "$script is no longer as $diff expects it where it changes it: make the change by hand"
echo "$copy"

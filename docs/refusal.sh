#!/bin/sh
# A reasoning model with a refusal cliff: see it, find the heads that make it, prove it, repair it in the weights.
set -eu
out=${1:-demo-refusal}
rm -rf "$out"
mkdir -p "$out"

run() {
    printf '\n\033[1m$ surgery %s\033[0m\n' "$*"
    surgery "$@"
}

run lab build cliff
run probe refusal lab:cliff --data lab:cliff -o "$out/run"
run probe heads lab:cliff --from "$out/run" --top 10%
run edit heads lab:cliff --from "$out/run" --top 3 -o "$out/repaired"
run verify "$out/repaired"
run probe judge lab:cliff --from "$out/run" --data lab:cliff/pool --top 5% -o "$out/subset.jsonl"
run probe refusal lab:cliff --from "$out/run" --live "river poison garden"

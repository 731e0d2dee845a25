#!/bin/sh
# A mixture of experts that thinks about some sums and guesses others: which experts go with thinking, and do they matter?
set -eu
out=${1:-demo-experts}
rm -rf "$out"
mkdir -p "$out"

run() {
    printf '\n\033[1m$ surgery %s\033[0m\n' "$*"
    surgery "$@"
}

run lab build moe
run probe experts lab:moe --data lab:moe --token '<think>' --token=-'</think>' \
    --sweep 0,1,2,4,…,64 --task lab_sums -o "$out/run"
run eval lab:moe --reinforce "$out/run" --top 2 --scale 64 --task lab_sums
run edit experts lab:moe --from "$out/run" --top 2 --scale 4 -o "$out/reinforced"
run verify "$out/reinforced"

#!/bin/sh
# The main job from end to end, offline: a reasoning vector out of one pair of models, into another.
set -eu
out=${1:-demo}
rm -rf "$out"

run() {
    printf '\n\033[1m$ surgery %s\033[0m\n' "$*"
    surgery "$@"
}

# Trained on the spot and kept in the cache: base, sft (answers at once), grpo (rewarded for right answers, so it
# reasons), instruct (same ancestor as sft, another prompt format, never rewarded).
run lab build grpo instruct
run diff lab:sft lab:grpo --top 0 --plot "$out/moved.png"
run vector extract lab:grpo lab:sft -o "$out/reasoning"
run vector apply "$out/reasoning" lab:instruct -o "$out/instruct-reasoning"
run verify "$out/instruct-reasoning"
run eval lab:sft lab:grpo lab:instruct "$out/instruct-reasoning" --task lab_sums
run vector sweep "$out/reasoning" lab:instruct --scale -1,0,0.25,0.5,0.75,1,1.5 --task lab_sums -o "$out/sweep"

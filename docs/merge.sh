#!/bin/sh
# Two specialists on one frozen embedding, merged by their weights and by their logits, and measured on both tasks.
set -eu
out=${1:-demo-merge}
rm -rf "$out"
mkdir -p "$out"

run() {
    printf '\n\033[1m$ surgery %s\033[0m\n' "$*"
    surgery "$@"
}

run lab build adder sorter
run merge linear lab:adder lab:sorter --weight 0.5 -o "$out/linear"
run merge ties lab:adder lab:sorter --base lab:substrate --weight 1 --density 0.5 -o "$out/ties"
run merge logits lab:adder lab:sorter -o "$out/logits"
run eval lab:adder lab:sorter "$out/linear" "$out/ties" "$out/logits" --task lab_sums --task lab_sorting --plot "$out/specialists.png"

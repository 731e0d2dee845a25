#!/bin/sh
# Two specialists grown layer by layer on one frozen embedding, compared with training in one go, merged by their logits.
set -eu
out=${1:-demo-growth}
rm -rf "$out"
mkdir -p "$out"

run() {
    printf '\n\033[1m$ surgery %s\033[0m\n' "$*"
    surgery "$@"
}

run grow tokenizer lab:python/code lab:python/docs --vocab 4096 -o "$out/tok"
run grow embed "$out/tok" --kind glyphs --width 256 -o "$out/emb"
run grow run small --embed "$out/emb" --corpus lab:python/code -o "$out/code"
run grow baseline small --embed "$out/emb" --corpus lab:python/code --embedding frozen -o "$out/code"
run grow run small --embed "$out/emb" --corpus lab:python/docs -o "$out/docs"
run merge logits "$out/code/stage-6" "$out/docs/stage-6" -o "$out/both"
run eval "$out/code/stage-6" "$out/docs/stage-6" "$out/both" \
    --perplexity lab:python/code-held --perplexity lab:python/docs-held --limit 20

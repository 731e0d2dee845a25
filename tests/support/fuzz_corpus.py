"""Write the valid files that the fuzzer mutates: one folder per seed, made by the commands that write such files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import moe, refusal
from support.architectures import add_tokenizer, build, sibling
from support.chat_tokenizer import TEMPLATE
from support.fuzz_answers import write_answers
from support.fuzz_run_records import write_run
from support.fuzz_templates import write_templates
from support.growth_runs import CPU, TOKENS, write_corpora, write_plan, write_substrate
from support.merges import add_lora

from merges.ensemble.average import average_logits
from probes.experts.run import probe_experts
from probes.experts.scoring import Support
from surgery.checkpoint.selectors import Head
from surgery.edits.heads import scale_heads
from surgery.engine.options import ExecutionOptions
from surgery.engine.storage.journal import Journal, SegmentRecord
from surgery.evaluation.scorecard import write_scores
from surgery.evaluation.scoring import Score
from surgery.growth.prepare import load_plan, prepare_run
from surgery.growth.run import grow
from surgery.vectors.application import transfer
from surgery.vectors.extraction import extract

ONE_THREAD = ExecutionOptions(threads=1)
FINGERPRINT = "f" * 32  # of the job whose journal is mutated
FAMILIES = ("gpt2", "mixtral", "gemma2", "deepseek_v3", "gpt_oss", "phi3")

MERGES = {
    "linear": """merge_method: linear
models:
  - model: a
    parameters: {weight: 0.5}
  - model: b
    parameters:
      weight:
        - filter: self_attn
          value: [0.1, 0.9]
        - value: 0.5
parameters: {normalize: true}
dtype: bfloat16
""",
    "ties": """models:
  - model: base
  - model: a
    parameters: {density: 0.5, weight: 0.3}
  - model: b
    parameters: {density: [0, 0.25, 1], weight: &w 0.7}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: false}
tokenizer_source: union
out_dtype: float32
chat_template: chatml
""",
    "slerp": """slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 1]}
    - {value: 0.5}
tokenizer: {source: base, tokens: {<s>: {source: a}, w9: {source: b, force: true}}}
""",
    "passthrough": """slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: base+lora, layer_range: [0, 2], parameters: {scale: 0.5}}]
merge_method: passthrough
""",
    "stock": """merge_method: dare_linear
base_model: base
models: [{model: a, parameters: {weight: 1.0, density: 0.5}}, {model: other, parameters: {weight: 1}}]
parameters: {rescale: true}
tokenizer_source: base
""",
}

RECIPES = """recipes:
  main:
    about: One line.
    needs: {disk: 10 MB}
    vars: {tuned: a, base: base, target: b, task: lab_sums, measure: true, repo: lab/out}
    steps:
      vector:
        run: vector extract
        with: {tuned: $tuned, base: $base}
        memory: 2 GB
      moved:
        run: vector apply
        with: {vector: $vector, target: $target, scale: $scale}
        matrix: {scale: [0.5, 1.0]}
      scores:
        run: eval
        with: {models: [$target, $moved], task: [$task], limit: 200}
        when: {measure: true}
      merged:
        run: merge weights
        with: {what: merge.yml}
      apart:
        run: vector transfer
        with: {tuned: a, base: base, target: b, scale: 0.5, include: ["*mlp*"]}
    push: {from: $vector, to: $repo, private: true}
"""

CHAT = [
    {"prompt": "how are you", "thinking": "hm", "response": "well", "label": "harmless/complied", "group": "g"},
    {"prompt": "bad thing", "response": "no", "label": "harmful/refused"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "label": "harmless"},
    {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}], "extra": [1, {"a": None}]},
]


def make_corpus(corpus: Path) -> Path:
    """Write every seed into `corpus`, and return it."""
    corpus.mkdir(parents=True)
    _models(corpus)
    _merge(corpus)
    _results(corpus)
    _data(corpus)
    _runs(corpus)
    _findings(corpus)
    write_answers(corpus / "hub")
    write_templates(corpus)
    write_run(corpus / "run")
    return corpus


def _models(corpus: Path) -> None:
    model = add_tokenizer(build("llama", corpus / "model"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    (model / "added_tokens.json").write_text(json.dumps({"<extra>": 95}))
    build("llama", corpus / "sharded", max_shard_size="20KB")
    for name in FAMILIES:
        build(name, corpus / name, dtype=torch.float32 if name == "gpt2" else torch.bfloat16)


def _merge(corpus: Path) -> None:
    folder = corpus / "merge"
    base = build("llama", folder / "base")
    for seed, child in enumerate(("a", "b", "other"), start=1):
        add_tokenizer(sibling(base, folder / child, seed=seed))
    add_tokenizer(base)
    add_tokenizer(folder / "other", [f"w{i}" for i in reversed(range(4, 90))])
    add_lora(folder / "lora", base)
    # Beside the adapter, as a stranger's would name it.
    _edit(folder / "lora" / "adapter_config.json", base_model_name_or_path="../base", alpha_pattern={"q_proj": 4})
    for name, text in MERGES.items():
        seed = corpus / f"merge-{name}"
        shutil.copytree(folder, seed)
        (seed / "merge.yml").write_text(text)
    shutil.copytree(folder, corpus / "recipes")
    (corpus / "recipes" / "merge.yml").write_text(MERGES["linear"])
    (corpus / "recipes" / "recipes.yaml").write_text(RECIPES)


def _results(corpus: Path) -> None:
    a, b, base = (corpus / "merge" / name for name in ("a", "b", "base"))
    here = corpus / "vector"
    here.mkdir()
    shutil.copytree(b, here / "target")
    extract(str(a), str(base), here / "vector", options=ONE_THREAD)
    transfer(str(a), str(base), str(b), corpus / "result" / "out", scale=0.5, options=ONE_THREAD)
    scale_heads(str(a), corpus / "edited" / "out", scales={Head(0, 1): 0.0, Head(1, 2): 2.0}, options=ONE_THREAD)

    for name in ("result", "edited"):
        shutil.copytree(corpus / name / "out", corpus / name / "again")  # what reproducing it gives


def _data(corpus: Path) -> None:
    folder = corpus / "data"
    folder.mkdir()
    lines = [json.dumps(row) for row in CHAT]
    (folder / "rows.jsonl").write_text("\n".join([*lines, ""]))
    (folder / "rows.json").write_text(json.dumps(CHAT))
    (folder / "rows.csv").write_text('prompt,response,label\nhow,"well, so",harmless\nbad,"no\nno",harmful/refused\n')
    (folder / "rows.txt").write_text("how are you\nbad thing\n")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"w{i} w5"}) + "\n" for i in range(6)))


def _runs(corpus: Path) -> None:
    folder = corpus / "growth"
    folder.mkdir()
    write_corpora(folder)
    write_substrate(folder)
    write_plan(folder, stages=[{"tokens": TOKENS}], evaluate={"texts": ["words.txt"], "limit": 2})
    plan = load_plan(str(folder / "plan.yml"), embed=str(folder / "emb"), corpus=[str(folder / "sums.txt")])
    plan = plan.model_copy(update={"evaluate": plan.evaluate.model_copy(update={"texts": ()})})
    grow(prepare_run(plan, folder / "run"), CPU)
    # The plan names them, as people write plans.
    write_plan(folder, embed="emb", corpus=["sums.txt"], evaluate={"texts": ["words.txt"], "limit": 2})
    scored = corpus / "scores" / "out"
    shutil.copytree(corpus / "result" / "out", scored)
    write_scores(scored, [Score(str(scored), "sums", "acc", 0.5, 0.4, 0.6, 10, True)], "surgery eval out")
    with Journal(_made(corpus / "journal" / "partial"), FINGERPRINT) as journal:
        for segment in range(3):
            journal.append(SegmentRecord(0, segment, "0" * 32, ("1" * 32,), (0.5, 1.0)))
    average_logits([str(corpus / "merge" / name) for name in ("a", "b")], corpus / "ensemble" / "out")


def _findings(corpus: Path) -> None:
    """Write a run of `probe refusal` and one of `probe experts`, without the pictures, which take longer."""
    refusal_model = refusal.make_model(corpus / "refusal-model")
    thinker = moe.make_thinker(corpus / "thinker")
    folder = _made(corpus / "findings")
    with pytest.MonkeyPatch.context() as patch:
        refusal.no_pictures(patch)
        moe.no_pictures(patch)
        # Four groups in each cell, or there are no folds to train on.
        refusal.make_run(refusal_model, folder / "refusal", refusal.rows_of(dict.fromkeys(refusal.CELLS, 6)))
        data = moe.write_rows(folder / "rows.jsonl", moe.rows(12))
        support = Support(fires=2)
        probe_experts(str(thinker), str(data), ["<think>"], folder / "experts", support=support, options=ONE_THREAD)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

"""What is missing is written by the model, once, and never lost."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.architectures import build
from support.chat_tokenizer import make_tokenizer
from support.models import save
from transformers import AutoModelForCausalLM

from probes.data import generation, generation_engines
from probes.data.examples import Example
from probes.data.generation import complete_examples, generate_texts
from probes.data.generation_cache import Completion, GenerationCache
from probes.data.generation_engines import GenerationSettings
from probes.data.markers import Markers, never_closed
from probes.data.tokenization import build_sequences, encode, text_before_answer
from surgery.errors import WRONG_USAGE, SurgeryError
from surgery.models.loading import ModelAndTokenizer

THINK = Markers("<think>", "</think>")
TOKENIZER = make_tokenizer()
END, CLOSE = 3, 7
SETTINGS = GenerationSettings("tiny@1", max_new_tokens=8, batch_size=3)


def example(key, prompt="Hi?", **known):
    return Example(key, ({"role": "user", "content": prompt},), group=prompt, **known)


PROMPTS = [example(str(i), "abc?" * (1 + i % 4) + str(i)) for i in range(7)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Family → a tiny random model of it in fp32."""
    made = {}

    def load(name):
        if name not in made:
            folder = build(name, tmp_path_factory.mktemp(name), dtype=torch.float32)
            made[name] = ModelAndTokenizer(name, AutoModelForCausalLM.from_pretrained(folder).eval(), TOKENIZER)
        return made[name]

    return load


class Scripted:
    """A model that answers each prompt with what `script` says, and counts how often it was asked."""

    def __init__(self, script, *, stop_after=None):
        self.script, self.stop_after = script, stop_after
        self.batches = []
        self.device = torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=[END])
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=None))

    def generate(self, ids, *, attention_mask, logits_processor):
        if self.stop_after == len(self.batches):
            raise KeyboardInterrupt
        prompts = [TOKENIZER.decode(row[mask.bool()]) for row, mask in zip(ids, attention_mask, strict=True)]
        self.batches.append(prompts)
        texts = [self.script(prompt) for prompt in prompts]
        new = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, new))
        padded = torch.tensor([row + [1] * (width - len(row)) for row in new])
        return torch.cat([ids, padded], dim=1)

    @property
    def asked(self):
        return [prompt for batch in self.batches for prompt in batch]


def scripted(script, **how):
    return ModelAndTokenizer("scripted", Scripted(script, **how), TOKENIZER)


def brute_force(loaded, ids, count):
    """The likeliest tokens, one full forward pass for each."""
    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(loaded.model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == END:
                return TOKENIZER.decode(ids[start:-1])
    return TOKENIZER.decode(ids[start:])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_batches_give_what_each_prompt_alone_gives_token_by_token(tiny, tmp_path, name):
    loaded = tiny(name)
    done = complete_examples(loaded, PROMPTS, markers=None, cache=tmp_path / "c.jsonl", settings=SETTINGS)
    for before, after in zip(PROMPTS, done, strict=True):
        prompt = encode(TOKENIZER, text_before_answer(TOKENIZER, before, None))
        assert after.response == brute_force(loaded, prompt, 8)
        assert (after.key, after.thinking, after.closing) == (before.key, None, None)


def test_the_models_own_sampling_settings_are_not_applied(tiny, tmp_path):
    loaded = tiny("llama")
    plain = complete_examples(loaded, PROMPTS, markers=None, cache=tmp_path / "a.jsonl", settings=SETTINGS)
    own = loaded.model.generation_config
    own.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, min_new_tokens=8, suppress_tokens=[8, 9])
    assert complete_examples(loaded, PROMPTS, markers=None, cache=tmp_path / "b.jsonl", settings=SETTINGS) == plain
    assert loaded.model.generation_config is own and own.temperature == 9.0
    own.update(do_sample=False, temperature=None, repetition_penalty=None, min_new_tokens=None, suppress_tokens=None)


def test_draws_do_not_depend_on_batches_and_follow_the_distribution(tiny, tmp_path):
    loaded = tiny("llama")

    def drawn(name, **changes):
        asked = GenerationSettings(**{**vars(SETTINGS), "temperature": 1.0, **changes})
        done = complete_examples(loaded, PROMPTS, markers=None, cache=tmp_path / name, settings=asked)
        return [each.response for each in done]

    first = drawn("a")
    assert first == drawn("b", batch_size=1) == drawn("c", batch_size=7)
    assert first != drawn("d", seed=1) and first != drawn("e", temperature=0.0)
    # As frequencies: of 4,000 draws from p, each count lies within 5 standard deviations of what is expected.
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    settings = GenerationSettings("m", temperature=2.0)
    draw = generation_engines._GumbelSampler(settings, [str(i) for i in range(4000)])
    counts = draw(torch.empty(0), (2.0 * p.log()).expand(4000, 4)).argmax(1).bincount(minlength=4)
    assert ((counts - 4000 * p).abs() < 5 * (4000 * p * (1 - p)).sqrt()).all()


def test_a_completion_is_split_into_thinking_closing_and_response(tmp_path):
    loaded = scripted(lambda prompt: "Hm.\n</think>\n\nSo.</s>")
    [done] = complete_examples(loaded, [example("0")], markers=THINK, cache=tmp_path / "c", settings=SETTINGS)
    assert loaded.model.asked == ["<s><user>Hi?</s><bot><think>\n"]
    assert (done.thinking, done.closing, done.response) == ("Hm.", "\n</think>\n\n", "So.")
    [sequence] = build_sequences(TOKENIZER, [done], THINK, where="d")
    assert TOKENIZER.decode(sequence.ids) == "<s><user>Hi?</s><bot><think>\nHm.\n</think>\n\nSo."


def test_a_given_thinking_is_kept_and_gone_on_from(tmp_path):
    loaded = scripted(lambda prompt: " No</think>.</s>")
    given = [example("0", thinking="Hm."), example("1", thinking="Ah.", closing="</think>")]
    done = complete_examples(loaded, given, markers=THINK, cache=tmp_path / "c", settings=SETTINGS)
    assert sorted(loaded.model.asked) == [
        "<s><user>Hi?</s><bot><think>\nAh.</think>",
        "<s><user>Hi?</s><bot><think>\nHm.\n</think>\n\n",
    ]
    assert [(e.thinking, e.closing, e.response) for e in done] == [
        ("Hm.", "\n</think>\n\n", " No</think>."),
        ("Ah.", "</think>", " No</think>."),
    ]
    assert len(build_sequences(TOKENIZER, done, THINK, where="d")) == 2


def test_what_is_there_is_not_made_again(tmp_path):
    loaded = scripted(lambda prompt: "x</s>")
    given = [example("0", thinking="a", response="b"), example("1", response="<think>c</think>d")]
    done = complete_examples(loaded, given, markers=THINK, cache=tmp_path / "c", settings=SETTINGS)
    assert loaded.model.batches == [] and not (tmp_path / "c").exists()
    assert done[0] == given[0] and (done[1].thinking, done[1].response) == ("c", "d")


def test_what_never_closes_is_kept_and_listed(tmp_path):
    texts = {"a": "HmHm", "b": "Hm</s>", "c": "Hm</think></s>"}
    loaded = scripted(lambda prompt: texts[prompt[9]])
    given = [example(name, name) for name in texts]
    done = complete_examples(loaded, given, markers=THINK, cache=tmp_path / "c", settings=SETTINGS)
    assert [(e.thinking, e.closing, e.response) for e in done] == [
        ("HmHm", "", ""),
        ("Hm", "", ""),
        ("Hm", "</think>", ""),
    ]
    assert never_closed(done) == done[:2]
    # Given again they are still not to be completed: the model has had its say.
    assert complete_examples(loaded, done, markers=THINK, cache=tmp_path / "c", settings=SETTINGS) == done
    ended = {record["text"]: record["ended"] for record in records(tmp_path / "c")}
    assert ended == {"HmHm": False, "Hm": True, "Hm</think>": True}


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    whole = scripted(lambda prompt: prompt[-8:-5] + "</s>")
    expected = complete_examples(whole, PROMPTS, markers=None, cache=tmp_path / "whole", settings=SETTINGS)
    killed = scripted(whole.model.script, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        complete_examples(killed, PROMPTS, markers=None, cache=tmp_path / "c", settings=SETTINGS)
    assert len(records(tmp_path / "c")) == 6
    again = scripted(whole.model.script)
    assert complete_examples(again, PROMPTS, markers=None, cache=tmp_path / "c", settings=SETTINGS) == expected
    assert len(again.model.asked) == 1 and set(again.model.asked).isdisjoint(killed.model.asked)


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_cut_short_is_made_again_and_harms_no_other(tmp_path, cut):
    loaded = scripted(lambda prompt: prompt[-8:-5] + "</s>")
    expected = complete_examples(loaded, PROMPTS, markers=None, cache=tmp_path / "c", settings=SETTINGS)
    data = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(data[:-cut])
    again = scripted(loaded.model.script)
    assert complete_examples(again, PROMPTS, markers=None, cache=tmp_path / "c", settings=SETTINGS) == expected
    # With only its line break missing the line is whole.
    assert len(again.model.asked) == (0 if cut == 1 else 1)
    third = scripted(loaded.model.script)
    assert complete_examples(third, PROMPTS, markers=None, cache=tmp_path / "c", settings=SETTINGS) == expected
    assert third.model.batches == []


@pytest.mark.parametrize("changes", [{"model_id": "other"}, {"max_new_tokens": 9}, {"temperature": 0.5}])
def test_completions_of_other_settings_are_not_taken(tmp_path, changes):
    loaded = scripted(lambda prompt: "a</s>")
    complete_examples(loaded, PROMPTS[:1], markers=None, cache=tmp_path / "c", settings=SETTINGS)
    changed = GenerationSettings(**{**vars(SETTINGS), **changes})
    complete_examples(loaded, PROMPTS[:1], markers=None, cache=tmp_path / "c", settings=changed)
    assert len(loaded.model.batches) == 2
    # How it is batched makes no difference, nor does a seed that nothing is drawn with.
    for same in ({"batch_size": 1}, {"seed": 5}):
        unchanged = GenerationSettings(**{**vars(SETTINGS), **same})
        complete_examples(loaded, PROMPTS[:1], markers=None, cache=tmp_path / "c", settings=unchanged)
    assert len(loaded.model.batches) == 2


def test_equal_prompts_are_completed_once_and_the_longest_come_first(tmp_path):
    loaded = scripted(lambda prompt: "a</s>")
    given = [example("0", "b"), example("1", "ccc"), example("2", "b"), example("3", "dd")]
    seen = []

    @contextmanager
    def progress(label, total, unit="bytes"):
        seen.append((label, total, unit))
        yield seen.append

    done = complete_examples(
        loaded,
        given,
        markers=None,
        cache=tmp_path / "deep" / "c",
        settings=GenerationSettings("m", batch_size=2),
        progress=progress,
    )
    assert [e.response for e in done] == ["a"] * 4
    assert loaded.model.batches == [["<s><user>ccc</s><bot>", "<s><user>dd</s><bot>"], ["<s><user>b</s><bot>"]]
    assert seen == [("scripted: completing", 3, "steps"), 2, 1]


def test_two_processes_may_write_one_cache(tmp_path):
    one, other = GenerationCache(tmp_path / "c"), GenerationCache(tmp_path / "c")
    one.add({"a": Completion("x\ny", True)})
    other.add({"b": Completion("\u2028", False)})
    found = GenerationCache(tmp_path / "c")
    assert (found.get("a"), found.get("b"), found.get("c")) == (
        Completion("x\ny", True),
        Completion("\u2028", False),
        None,
    )
    (tmp_path / "c").write_text('{"key": 1}\n[]\n{"key": "d", "text": "z", "ended": true}\nno\n')
    assert GenerationCache(tmp_path / "c").get("d") == Completion("z", True)


def test_a_cache_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(SurgeryError, match=r"is a folder, expected a file"):
        GenerationCache(tmp_path)
    (tmp_path / "file").write_text("")
    cache = GenerationCache(tmp_path / "new")
    cache.path = tmp_path / "file" / "c"
    with pytest.raises(SurgeryError, match=r"cannot be written .* What was finished before is kept"):
        cache.add({"a": Completion("x", True)})


def test_what_cannot_be_completed_is_named_before_anything_is_made(tiny, tmp_path):
    given = [
        example("0", "a" * 70),
        example("1"),
        example("2", response="So"),
        example("3", thinking="a</think>"),
    ]
    with pytest.raises(SurgeryError) as caught:
        complete_examples(tiny("llama"), given, markers=THINK, cache=tmp_path / "c", settings=SETTINGS)
    first, second, third = str(caught.value).split("\n  ")
    assert first == (
        "example 0: has 76 tokens, and 8 more do not fit the model's context of 64. "
        "Leave it out, or ask for fewer new tokens."
    )
    assert second.startswith("example 2: has a response, but no thinking")
    assert third.startswith("example 3: its thinking holds the closing marker")
    assert caught.value.exit_code == WRONG_USAGE and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected 1 or more"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1, expected 0 or more"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"engine": "trt"}, "engine: got 'trt', expected transformers or vllm"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(SurgeryError, match=message):
        GenerationSettings("m", **changes)


def test_too_little_memory_names_the_batch(tmp_path):
    loaded = scripted(None)

    def generate(*args, **kwargs):
        raise torch.OutOfMemoryError

    loaded.model.generate = generate
    with pytest.raises(SurgeryError, match=r"scripted: 1 prompts of 12 tokens do not fit the memory. Take a smaller"):
        complete_examples(loaded, [example("0", "abcdefgh")], markers=None, cache=tmp_path / "c", settings=SETTINGS)


def test_text_decoded_alone_keeps_its_first_space():
    assert generation._text_after(TOKENIZER, encode(TOKENIZER, "a"), encode(TOKENIZER, " b")) == " b"
    loaded = scripted(lambda prompt: " b</s>")
    texts = generate_texts(loaded, [(8, 10), (9,)], max_new_tokens=4, batch_size=1, label="l")
    assert texts == [" b", " b"]


# vLLM, of which only the interface is here


class FakeSampling(SimpleNamespace):
    pass


@pytest.fixture
def vllm(monkeypatch):
    """A module with vLLM's interface; `made` is what was asked of it."""
    made = SimpleNamespace(engines=[], calls=[])

    class LLM:
        def __init__(self, model, seed, *, load_format, trust_remote_code):
            assert (load_format, trust_remote_code) == ("safetensors", False)
            made.engines.append((sorted(path.name for path in Path(model).iterdir()), seed))

        def generate(self, prompts, sampling_params, *, use_tqdm):
            made.calls.append((prompts, sampling_params))
            assert use_tqdm is False
            ids = TOKENIZER("Hm.</think>So.</s>", add_special_tokens=False)["input_ids"]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for _ in prompts]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, FakeSampling
    monkeypatch.setitem(sys.modules, "vllm", module)
    return made


def test_vllm_gets_token_ids_and_gives_the_same_kind_of_text(vllm, tmp_path):
    tokenizer = make_tokenizer()
    folder = save("llama", tmp_path / "tiny")
    (folder / "pytorch_model.bin").touch()
    (folder / "adapter_config.json").write_text("{}")
    tokenizer.name_or_path = str(folder)
    loaded = ModelAndTokenizer("m", None, tokenizer)
    settings = GenerationSettings("tiny@1", max_new_tokens=8, engine="vllm")
    done = complete_examples(loaded, PROMPTS, markers=THINK, cache=tmp_path / "c", settings=settings)
    assert {(e.thinking, e.closing, e.response) for e in done} == {("Hm.", "</think>", "So.")}
    assert vllm.engines == [(["config.json", "generation_config.json", "model.safetensors"], 0)]
    [(prompts, asked)] = vllm.calls
    texts = {text_before_answer(tokenizer, each, THINK) for each in PROMPTS}
    assert {tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts} == texts
    assert {(each.temperature, each.max_tokens, each.seed, tuple(each.stop_token_ids)) for each in asked} == {
        (0.0, 8, None, (END,))
    }
    complete_examples(loaded, PROMPTS, markers=THINK, cache=tmp_path / "c", settings=settings)
    assert len(vllm.engines) == 1  # all was in the cache
    drawn = GenerationSettings("tiny@1", temperature=0.7, engine="vllm")
    complete_examples(loaded, PROMPTS, markers=THINK, cache=tmp_path / "c", settings=drawn)
    assert len({each.seed for each in vllm.calls[1][1]}) == 7


def test_without_vllm_its_installation_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    settings = GenerationSettings("m", engine="vllm")
    with pytest.raises(SurgeryError, match=r"engine: vllm is not installed. Install it: pip install vllm"):
        complete_examples(
            ModelAndTokenizer("m", None, TOKENIZER), PROMPTS, markers=None, cache=tmp_path / "c", settings=settings
        )


def test_cached_completions_are_their_owners_alone(tmp_path):
    cache = GenerationCache(tmp_path / "c.jsonl")
    cache.add({"a": Completion("text", True)})
    assert cache.path.stat().st_mode & 0o777 == 0o600

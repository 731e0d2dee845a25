"""The user's data → a `DataSet` of examples, with all faults of its rows in one error.

In comes a reference (`probes.data.sources` says which there are), out come `Example`s with what the rows say; what they
do not say stays None, to be generated or judged later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from probes.data.examples import DataSet, Example, Topic
from probes.data.faults import Faults
from probes.data.sources import SourceRow, read_rows
from surgery.errors import listing, usage_error
from surgery.io.hashing import hash_text

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("prompt", "thinking", "closing", "response", "label", "group")

TOPICS: Mapping[str, Topic] = {
    "harmful": "harmful",
    "unsafe": "harmful",
    "malicious": "harmful",
    "harmless": "harmless",
    "unharmful": "harmless",
    "safe": "harmless",
    "benign": "harmless",
}
VERDICTS: Mapping[str, bool] = {
    "refused": True,
    "refusal": True,
    "refuse": True,
    "complied": False,
    "compliance": False,
    "comply": False,
    "compliant": False,
}


def read_data(source: str, *, limit: int | None = None) -> DataSet:
    """Reads the examples of `source`; at most the first `limit`.

    Fields of a row, all text, of which only the first is needed:
        prompt, or messages: a question, or a conversation of {role, content} up to the last question. An assistant's
            message at its end is the response, and that message's `reasoning_content` the thinking.
        thinking, closing, response: what the model wrote; a response may hold its thinking between the model's markers.
        label: the topic (harmful, also unsafe, malicious; harmless, also unharmful, safe, benign), the verdict
            (refused, also refusal, refuse; complied, also compliance, comply, compliant), or both: harmful/refused.
            Yes and no, true and false, 1 and 0 are not accepted: some data sets say harmful by them, some refused.
        group: rows that belong together, such as paraphrases; the prompt where there is none.

    Null is as good as no field, and so is an empty cell of a CSV file; a response that is there and empty is a fault.
    In CSV, `messages` is JSON. Other fields are kept in `Example.row`. An example's key is its row's number in the
    source, from 0: in org/name:train[100:200] the first is "100".

    Raises:
        SurgeryError: the source cannot be read or has no rows; else the first 20 faults of its rows, each with its
            place.
    """
    if limit is not None and limit < 1:
        raise usage_error(f"got {limit}, expected 1 or more", where="limit")
    faults = Faults()
    found = read_rows(source, faults, limit=limit)
    if not found.rows and not faults.lines:
        raise usage_error("has no rows", where=source)
    examples = [example for row in found.rows if (example := _example(row, faults))]
    faults.settle()
    # Rows of Parquet may hold what JSON does not know, such as dates.
    digest = hash_text(json.dumps([row.record for row in found.rows], sort_keys=True, default=str))
    return DataSet(source, tuple(examples), digest, found.revision)


def _example(row: SourceRow, faults: Faults) -> Example | None:
    """The row as an example; None where it has faults, which are taken down."""
    before = len(faults.lines)
    fields = {name: _text(row, name, faults) for name in TEXTS}
    messages, answer, reasoning = _messages(row, fields["prompt"], faults)
    for name, other, inside in (("response", "content", answer), ("thinking", "reasoning_content", reasoning)):
        if inside is not None and fields[name] is not None:
            faults.add(f"has both {name} and the {other} of a last assistant message", where=row.where)
        fields[name] = fields[name] if inside is None else inside
    # A thinking that never closed, as completions are kept, is the one case of an answer that is known to be nothing.
    if fields["response"] is not None and not fields["response"].strip() and fields["closing"] != "":
        faults.add("has an empty response: leave it out where it is to be generated", where=row.where)
    topic, refused = _label(row, fields["label"], faults)
    if len(faults.lines) > before:
        return None
    return Example(
        key=row.key,
        messages=tuple(messages),
        group=str(messages[-1]["content"]) if fields["group"] is None else fields["group"],
        thinking=fields["thinking"],
        closing=fields["closing"],
        response=fields["response"],
        topic=topic,
        refused=refused,
        row=row.record,
    )


def _text(row: SourceRow, name: str, faults: Faults) -> str | None:
    value = row.record.get(name)
    if name == "group" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or (isinstance(value, str) and _is_sound(value)):
        return value
    if isinstance(value, str):
        faults.add(f"{name} holds half of a surrogate pair, which is no character", where=row.where)
    elif name == "label":
        faults.add(f"label is {value!r}, expected {_accepted()}", where=row.where)
    else:
        faults.add(f"{name} is {_short(value)}, expected text", where=row.where)
    return None


def _messages(
    row: SourceRow, prompt: str | None, faults: Faults
) -> tuple[Sequence[Mapping[str, Any]], str | None, str | None]:
    """The conversation up to its last question, the answer after it, and the thinking before that."""
    given = row.record.get("messages")
    if given is None:
        if row.record.get("prompt") is None:
            faults.add("has neither prompt nor messages", where=row.where)
        elif prompt is not None and not prompt.strip():
            faults.add("has an empty prompt", where=row.where)
        return [{"role": "user", "content": prompt}], None, None
    if row.record.get("prompt") is not None:
        faults.add("has both prompt and messages", where=row.where)
    messages = _conversation(row, given, faults)
    if not messages:
        return [{"role": "user", "content": ""}], None, None
    answer = reasoning = None
    if messages[-1]["role"] == "assistant":
        answer, reasoning = messages[-1]["content"], messages[-1].get("reasoning_content")
        messages = messages[:-1]
        if reasoning is not None and not (isinstance(reasoning, str) and _is_sound(reasoning)):
            faults.add(f"reasoning_content is {_short(reasoning)}, expected text", where=row.where)
            reasoning = None
    if not messages or messages[-1]["role"] != "user":
        faults.add("messages do not end with a user's message, or with one and its answer", where=row.where)
        return [{"role": "user", "content": ""}], answer, reasoning
    if not messages[-1]["content"].strip():
        faults.add("has an empty prompt", where=row.where)
    return messages, answer, reasoning


def _conversation(row: SourceRow, given: object, faults: Faults) -> list[Mapping[str, Any]]:
    """The messages without their empty fields; none at all where one is wrong."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            faults.add(f"messages are not valid JSON ({error})", where=row.where)
            return []
    if not isinstance(given, list) or not given:
        faults.add(f"messages are {_short(given)}, expected a list of {{role, content}}", where=row.where)
        return []
    before = len(faults.lines)
    messages: list[Mapping[str, Any]] = []
    for at, message in enumerate(given):
        if not isinstance(message, Mapping):
            faults.add(f"messages[{at}] is {_short(message)}, expected {{role, content}}", where=row.where)
            continue
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            faults.add(f"messages[{at}].role is {role!r}, expected one of {listing(ROLES)}", where=row.where)
        if not isinstance(content, str) or not _is_sound(content):
            faults.add(f"messages[{at}].content is {_short(content)}, expected text", where=row.where)
        messages.append({name: value for name, value in message.items() if value is not None})
    return messages if len(faults.lines) == before else []


def _label(row: SourceRow, label: str | None, faults: Faults) -> tuple[Topic | None, bool | None]:
    """Topic and verdict."""
    topic: Topic | None = None
    refused: bool | None = None
    parts = [part.strip().lower() for part in (label or "").split("/")] if label and label.strip() else []
    for part in parts:
        if part in TOPICS and topic is None:
            topic = TOPICS[part]
        elif part in VERDICTS and refused is None:
            refused = VERDICTS[part]
        else:
            faults.add(f"label is {label!r}, expected {_accepted()}", where=row.where)
            break
    return topic, refused


def _accepted() -> str:
    return f"a topic ({', '.join(TOPICS)}), a verdict ({', '.join(VERDICTS)}), or both as harmful/refused"


def _is_sound(text: str) -> bool:
    """Whether a text can be written as UTF-8. JSON can spell what cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"

"""Read the user's data as a `DataSet` of examples, and report the errors of all rows at once.

A reference to data (see `probes.data.sources`) is read row by row; fields that a row does not have stay None, to be
generated or labelled later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from probes.data.examples import MAX_REPORTED, DataSet, Example, LiteralText, Topic
from probes.data.sources import SourceRow, read_rows
from surgery.errors import ErrorList, listing, usage_error
from surgery.io.hashing import hash_text
from surgery.models.choices import SpecialTokens

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_FIELDS = ("prompt", "thinking", "closing", "response", "label", "group")

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
MAX_QUOTED = 60  # characters of a wrong value that an error message quotes


def read_data(source: str, *, limit: int | None = None, special_tokens: SpecialTokens = "text") -> DataSet:
    """Read the examples of `source`, at most the first `limit`.

    Fields of a row, all of them text; only the first is required:
        prompt, or messages: a question, or a conversation of {role, content} up to the last question. An assistant
            message at its end is the response, and that message's `reasoning_content` the thinking.
        thinking, closing, response: what the model wrote; a response may contain its thinking between the model's
            markers.
        label: the topic (harmful, also unsafe, malicious; harmless, also unharmful, safe, benign), the verdict
            (refused, also refusal, refuse; complied, also compliance, comply, compliant), or both: harmful/refused.
            Yes and no, true and false, 1 and 0 are not accepted: in some data sets they mean harmful, in some refused.
        group: rows that belong together, such as paraphrases; defaults to the prompt.

    A null field counts as absent, and so does an empty cell of a CSV file; a response that is present but empty is an
    error. In CSV, `messages` is JSON. Other fields are kept in `Example.row`. An example's key is its row's number in
    the source, from 0: in org/name:train[100:200] the first is "100".

    Args:
        special_tokens: what special tokens in the rows' texts are: text, or those tokens (parse). Data of the lab are
            trusted: in them they are always tokens.

    Raises:
        SurgeryError: the source cannot be read or has no rows; otherwise the first 20 errors of its rows, each with
            its place.
    """
    if limit is not None and limit < 1:
        raise usage_error(f"got {limit}, expected 1 or more", where="limit")
    errors = ErrorList()
    source_rows = read_rows(source, errors, limit=limit)
    if not source_rows.rows and not errors:
        raise usage_error("has no rows", where=source)
    # All rows are parsed before any error is raised: users see what is wrong in one run.
    examples = []
    for row in source_rows.rows:
        parser = _RowParser(row, literal=special_tokens == "text" and not source_rows.trusted)
        example = parser.parse()
        errors.extend(parser.errors)
        if example is not None:
            examples.append(example)
    errors.raise_if_any(limit=MAX_REPORTED)
    # Rows of Parquet may contain values without a JSON form, such as dates: hence `default=str`.
    digest = hash_text(json.dumps([row.record for row in source_rows.rows], sort_keys=True, default=str))
    return DataSet(source, tuple(examples), digest, source_rows.revision)


@dataclass(frozen=True)
class _Conversation:
    """The messages up to the last question; the answer and its thinking where an assistant message follows it."""

    messages: Sequence[Mapping[str, Any]]
    answer: str | None = None
    reasoning: str | None = None


# Stands for a conversation that has errors: the rest of the row is checked all the same.
_PLACEHOLDER = [{"role": "user", "content": ""}]


@dataclass(frozen=True)
class _RowParser:
    """Parse one row into an `Example`, and collect everything that is wrong with it in `errors`."""

    row: SourceRow
    literal: bool = False
    errors: ErrorList = field(default_factory=ErrorList)

    def parse(self) -> Example | None:
        """Return the row as an example; None if it has errors."""
        fields = {name: self._text(name) for name in TEXT_FIELDS}
        conversation = self._conversation(fields["prompt"])
        response = self._either(fields["response"], conversation.answer, "response", "content")
        thinking = self._either(fields["thinking"], conversation.reasoning, "thinking", "reasoning_content")
        # Only a thinking that never closed, as completions are stored, is known to have an answer of no text.
        if response is not None and not response.strip() and fields["closing"] != "":
            self._add("has an empty response: leave it out where it is to be generated")
        topic, refused = self._label(fields["label"])
        if self.errors:
            return None
        messages, group = tuple(conversation.messages), fields["group"]
        return Example(
            key=self.row.key,
            messages=messages,
            group=str(messages[-1]["content"]) if group is None else group,
            thinking=thinking,
            closing=fields["closing"],
            response=response,
            topic=topic,
            refused=refused,
            row=self.row.record,
            literal=_literal(thinking, fields["closing"], response) if self.literal else (),
        )

    def _add(self, what: str) -> None:
        self.errors.add(what, where=self.row.where, usage=True)

    def _either(self, own: str | None, in_message: str | None, name: str, message_field: str) -> str | None:
        """Return the row's own field or that of its last message; both are an error."""
        if in_message is None:
            return own
        if own is not None:
            self._add(f"has both {name} and the {message_field} of a last assistant message")
        return in_message

    def _text(self, name: str) -> str | None:
        value = self.row.record.get(name)
        # Groups are often numbered. `bool` is a subclass of `int`, and no number of a group.
        if name == "group" and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is None or (isinstance(value, str) and _is_encodable(value)):
            return value
        if isinstance(value, str):
            self._add(f"{name} holds half of a surrogate pair, which is no character")
        elif name == "label":
            self._add(f"label is {value!r}, expected {_accepted_labels()}")
        else:
            self._add(f"{name} is {_quoted(value)}, expected text")
        return None

    def _conversation(self, prompt: str | None) -> _Conversation:
        given = self.row.record.get("messages")
        if given is None:
            if self.row.record.get("prompt") is None:
                self._add("has neither prompt nor messages")
            elif prompt is not None and not prompt.strip():
                self._add("has an empty prompt")
            return _Conversation([{"role": "user", "content": prompt}])
        if self.row.record.get("prompt") is not None:
            self._add("has both prompt and messages")
        messages = self._messages(given)
        if not messages:
            return _Conversation(_PLACEHOLDER)
        answer = reasoning = None
        if messages[-1]["role"] == "assistant":
            answer, reasoning = messages[-1]["content"], messages[-1].get("reasoning_content")
            messages = messages[:-1]
            if reasoning is not None and not (isinstance(reasoning, str) and _is_encodable(reasoning)):
                self._add(f"reasoning_content is {_quoted(reasoning)}, expected text")
                reasoning = None
        if not messages or messages[-1]["role"] != "user":
            self._add("messages do not end with a user's message, or with one and its answer")
            return _Conversation(_PLACEHOLDER, answer, reasoning)
        if not messages[-1]["content"].strip():
            self._add("has an empty prompt")
        return _Conversation(messages, answer, reasoning)

    def _messages(self, given: object) -> list[Mapping[str, Any]]:
        """Return the messages without their null fields; none at all if one of them is wrong."""
        # A cell of a CSV file cannot be a list: there, messages are JSON in a text.
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError) as error:
                self._add(f"messages are not valid JSON ({error})")
                return []
        if not isinstance(given, list) or not given:
            self._add(f"messages are {_quoted(given)}, expected a list of {{role, content}}")
            return []
        messages: list[Mapping[str, Any]] = []
        valid = True
        for index, message in enumerate(given):
            if not isinstance(message, Mapping):
                self._add(f"messages[{index}] is {_quoted(message)}, expected {{role, content}}")
                valid = False
                continue
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                self._add(f"messages[{index}].role is {role!r}, expected one of {listing(ROLES)}")
                valid = False
            if not isinstance(content, str) or not _is_encodable(content):
                self._add(f"messages[{index}].content is {_quoted(content)}, expected text")
                valid = False
            # Parquet gives every message the fields of all of them, null where absent; templates test for presence.
            messages.append({name: value for name, value in message.items() if value is not None})
        return messages if valid else []

    def _label(self, label: str | None) -> tuple[Topic | None, bool | None]:
        """Return topic and verdict."""
        topic: Topic | None = None
        refused: bool | None = None
        parts = [part.strip().lower() for part in label.split("/")] if label and label.strip() else []
        for part in parts:
            if part in TOPICS and topic is None:
                topic = TOPICS[part]
            elif part in VERDICTS and refused is None:
                refused = VERDICTS[part]
            else:
                self._add(f"label is {label!r}, expected {_accepted_labels()}")
                break
        return topic, refused


def _literal(thinking: str | None, closing: str | None, response: str | None) -> tuple[LiteralText, ...]:
    """Return the names of the texts that a row has; those that it lacks will be the model's own."""
    names: tuple[LiteralText, ...] = ("thinking", "closing", "response")
    given = zip(names, (thinking, closing, response), strict=True)
    return ("messages", *(name for name, text in given if text is not None))


def _accepted_labels() -> str:
    return f"a topic ({', '.join(TOPICS)}), a verdict ({', '.join(VERDICTS)}), or both as harmful/refused"


def _is_encodable(text: str) -> bool:
    """Return whether `text` has a UTF-8 form: JSON can spell single surrogates, which have none."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"

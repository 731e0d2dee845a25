"""YAML → plain values that know where they stand: a tree of `YamlNode`s, each with its line and its path of keys.

Read as PyYAML's safe loader reads it (YAML 1.1: `on` and `yes` are true, `1e-5` is text), anchors and `<<` included;
but a key that stands twice in a mapping is a fault, and so is one that is not text. Faults are collected, so that
one run shows them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from surgery.errors import SurgeryError, usage_error

# A thousand times what real configs hold. Nested aliases reach any number with a few lines.
MAX_NODES = 200_000
MAX_DEPTH = 50  # of mappings and lists inside each other; real configs reach 10
MAX_BITS = 64  # of whole numbers; Python takes long to write longer ones, or refuses
TOO_DEEP = "is nested too deeply"
_TAGS = "tag:yaml.org,2002:"
_MERGE = f"{_TAGS}merge"


@dataclass(frozen=True)
class YamlNode:
    """A value at `path` (`models[1].parameters`), that stands at `line` of its file, from 1; None if in no file.

    `value` is a dict of nodes, a tuple of nodes, or a scalar: None, bool, int, float, str, or what else YAML knows
    (dates, bytes).
    """

    path: str
    line: int | None
    value: object

    @property
    def is_empty(self) -> bool:
        """Whether nothing is written here: `key:` alone, or null."""
        return self.value is None

    @property
    def children(self) -> dict[str, YamlNode]:
        """The entries of a mapping; none where this is no mapping."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def plain(self) -> object:
        """The value without its lines."""
        if isinstance(self.value, dict):
            return {key: child.plain for key, child in self.value.items()}
        if isinstance(self.value, tuple):
            return [child.plain for child in self.value]
        return self.value


@dataclass(frozen=True)
class YamlError:
    """What is wrong at one place of document `document`, from 1."""

    what: str
    path: str
    line: int | None
    document: int = 1


@dataclass
class YamlErrors:
    """The faults and warnings found so far in one file."""

    where: str
    n_documents: int = 1
    document: int = 1
    found: list[YamlError] = field(default_factory=list)
    warned: list[YamlError] = field(default_factory=list)

    def add(self, node: YamlNode, what: str) -> None:
        """Notes that `what` is wrong at `node`."""
        self.found.append(YamlError(what, node.path, node.line, self.document))

    def warn(self, node: YamlNode, what: str) -> None:
        """Notes what a reader should know about `node`, though it stops nothing."""
        self.warned.append(YamlError(what, node.path, node.line, self.document))

    @property
    def place(self) -> str:
        """The file, and the document that is being read where there are several."""
        return f"{self.where}: document {self.document}" if self.n_documents > 1 else self.where

    def line(self, fault: YamlError) -> str:
        """`CONFIG.yml:12: document 2: models[1].model: …`; the document only where there are several."""
        place = self.where if fault.line is None else f"{self.where}:{fault.line}"
        document = f"document {fault.document}" if self.n_documents > 1 else ""
        return ": ".join(part for part in (place, document, fault.path, fault.what) if part)

    def warnings_of(self, document: int) -> tuple[str, ...]:
        """The warnings of one document, ready to print."""
        found = [fault for fault in self.warned if fault.document == document]
        return tuple(self.line(fault) for fault in sorted(found, key=lambda fault: fault.line or 0))

    def settle(self) -> None:
        """Raises SurgeryError with every fault, in the order of their lines, if there are any."""
        if self.found:
            ordered = sorted(self.found, key=lambda fault: (fault.document, fault.line or 0))
            raise usage_error("\n".join(dict.fromkeys(self.line(fault) for fault in ordered)))


def read_documents(text: str, where: str) -> tuple[tuple[YamlNode, ...], YamlErrors]:
    """The documents of a YAML text, and the faults that were found in reading them; empty documents are left out.

    Raises:
        SurgeryError: it is no YAML at all, or grows beyond `MAX_NODES` by its aliases.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            roots = list(_compose(loader))
            faults = YamlErrors(where, n_documents=len(roots))
            documents = []
            for number, root in enumerate(roots, start=1):
                faults.document = number
                documents.append(_Tree(loader, faults).node(root, "", root.start_mark.line + 1))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _no_yaml(error, where) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise usage_error(f"is not YAML: {' '.join(str(error).split())}", where=where) from error
    except RecursionError as error:
        raise usage_error(TOO_DEEP, where=where) from error
    return tuple(documents), faults


def _compose(loader: yaml.SafeLoader) -> Iterator[yaml.Node]:
    while loader.check_node():
        node = loader.get_node()
        if node is not None and not (isinstance(node, yaml.ScalarNode) and node.value == ""):
            yield node


class _Tree:
    """Turns the nodes of one document into ours, counting them."""

    def __init__(self, loader: yaml.SafeLoader, faults: YamlErrors) -> None:
        self.loader = loader
        self.faults = faults
        self.count = 0
        self.open: list[yaml.Node] = []

    def node(self, source: yaml.Node, path: str, line: int) -> YamlNode:
        self.count += 1
        if self.count > MAX_NODES:
            raise usage_error(f"holds more than {MAX_NODES} values, aliases counted each time", where=self.faults.where)
        if isinstance(source, yaml.ScalarNode):
            return self.scalar(source, path, line)
        if any(source is outer for outer in self.open):
            return self.wrong(path, line, "contains itself")
        if len(self.open) >= MAX_DEPTH:
            raise usage_error(TOO_DEEP, where=f"{self.faults.where}:{line}")
        if source.tag not in (f"{_TAGS}map", f"{_TAGS}seq"):
            return self.wrong(path, line, f"has the tag {source.tag}, which means nothing here")
        self.open.append(source)
        value: object
        if isinstance(source, yaml.MappingNode):
            value = self.mapping(source, path)
        else:
            value = tuple(
                self.node(item, f"{path}[{i}]", item.start_mark.line + 1) for i, item in enumerate(source.value)
            )
        self.open.pop()
        return YamlNode(path, line, value)

    def mapping(self, source: yaml.MappingNode, path: str) -> dict[str, YamlNode]:
        own: dict[str, YamlNode] = {}
        merged: dict[str, YamlNode] = {}
        for key_node, value_node in source.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _MERGE:
                merged = self.merged(value_node, path, line) | merged
                continue
            key = self.key(key_node, path, line)
            if key is None:
                continue
            here = f"{path}.{key}" if path else key
            if key in own:
                self.wrong(here, line, f"stands here a second time; the first is in line {own[key].line}")
            else:
                own[key] = self.node(value_node, here, line)
        return merged | own

    def merged(self, source: yaml.Node, path: str, line: int) -> dict[str, YamlNode]:
        """What `<<: *anchor` or `<<: [*a, *b]` brings in: of several, the first that has a key counts."""
        found: dict[str, YamlNode] = {}
        for item in source.value if isinstance(source, yaml.SequenceNode) else [source]:
            brought = self.node(item, path, line).value
            if isinstance(brought, dict):
                found = brought | found
            else:
                self.wrong(path, line, "<< takes a mapping, or a list of them")
        return found

    def key(self, source: yaml.Node, path: str, line: int) -> str | None:
        key = self.scalar(source, path, line).value if isinstance(source, yaml.ScalarNode) else source.tag
        if isinstance(source, yaml.ScalarNode) and isinstance(key, str):
            return key
        self.wrong(path, line, f"the key {source.value if isinstance(source, yaml.ScalarNode) else '[…]'} is not text")
        return None

    def scalar(self, source: yaml.ScalarNode, path: str, line: int) -> YamlNode:
        try:
            value = self.loader.construct_object(source)
            if not isinstance(value, int) or value.bit_length() <= MAX_BITS:
                return YamlNode(path, line, value)
            return self.wrong(path, line, f"is a whole number of more than {MAX_BITS} bits")
        except (yaml.YAMLError, ValueError, TypeError, OverflowError):  # an unknown tag, the 99th of a month
            return self.wrong(path, line, f'cannot be read as {source.tag.removeprefix(_TAGS)}: "{source.value}"')

    def wrong(self, path: str, line: int, what: str) -> YamlNode:
        node = YamlNode(path, line, None)
        self.faults.add(node, what)
        return node


def _no_yaml(error: yaml.MarkedYAMLError, where: str) -> SurgeryError:
    mark = error.problem_mark or error.context_mark
    place = where if mark is None else f"{where}:{mark.line + 1}"
    what = ", ".join(part for part in (error.context, error.problem) if part)
    return usage_error(f"is not YAML: {what}", where=place, hint="Check indentation, brackets and quotes there.")


def to_node(value: object, path: str = "") -> YamlNode:
    """A plain value as a tree without lines, for what does not come from a file."""
    if isinstance(value, Mapping):
        return YamlNode(
            path, None, {str(k): to_node(child, f"{path}.{k}" if path else str(k)) for k, child in value.items()}
        )
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return YamlNode(path, None, tuple(to_node(child, f"{path}[{i}]") for i, child in enumerate(value)))
    return YamlNode(path, None, value)

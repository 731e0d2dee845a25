"""Read YAML into a tree of `YamlNode`s, each with its line and its path of keys, and collect errors with both.

Values are those of PyYAML's safe loader (YAML 1.1: `on` and `yes` are true, `1e-5` is text), anchors and `<<` included;
but a duplicate key in a mapping is an error, and so is a key that is not text. All errors of a file are collected in
`YamlErrors`, so that one run shows them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import yaml

from surgery.errors import SurgeryError, usage_error

# A thousand times what real configs have. Without a limit, a few lines of nested aliases fill any memory.
MAX_NODES = 200_000  # of all documents of a file
MAX_DEPTH = 50  # of mappings and lists inside each other; real configs reach 10
MAX_BITS = 64  # of whole numbers; Python takes long to write longer ones, or refuses
TOO_DEEP = "is nested too deeply"
# libyaml's, about ten times as fast, where PyYAML was built with it: its wheels are.
_FAST_LOADER: type[yaml.CSafeLoader] | None = getattr(yaml, "CSafeLoader", None)
_Loader = yaml.SafeLoader | yaml.CSafeLoader
_TAGS = "tag:yaml.org,2002:"
_MERGE = f"{_TAGS}merge"


@dataclass(frozen=True)
class YamlNode:
    """A value with its place in a file.

    path: `models[1].parameters`.
    line: from 1; None if the value is from no file.
    value: a dict of nodes, a tuple of nodes, or a scalar: None, bool, int, float, str, a date, bytes.
    holds_anchor: whether an anchor stands in the value of this key, and an alias outside of it refers to that.
    """

    path: str
    line: int | None
    value: object
    holds_anchor: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is no value: `key:` alone, or null."""
        return self.value is None

    @property
    def children(self) -> dict[str, YamlNode]:
        """The entries of a mapping; none for any other value."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def plain(self) -> object:
        """The value as plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain for key, child in self.value.items()}
        if isinstance(self.value, tuple):
            return [child.plain for child in self.value]
        return self.value


@dataclass(frozen=True)
class YamlError:
    """An error at one place of document `document`, from 1."""

    what: str
    path: str
    line: int | None
    document: int = 1


@dataclass
class YamlErrors:
    """The errors and warnings collected in one file. `document` is the one that is being read, from 1."""

    where: str
    n_documents: int = 1
    document: int = 1
    found: list[YamlError] = field(default_factory=list)
    warned: list[YamlError] = field(default_factory=list)

    def add(self, node: YamlNode, what: str) -> None:
        """Add an error at `node`."""
        self.found.append(YamlError(what, node.path, node.line, self.document))

    def warn(self, node: YamlNode, what: str) -> None:
        """Add a warning at `node`, which stops nothing."""
        self.warned.append(YamlError(what, node.path, node.line, self.document))

    @property
    def place(self) -> str:
        """The file, and the document that is being read if there are several."""
        return f"{self.where}: document {self.document}" if self.n_documents > 1 else self.where

    def line(self, error: YamlError) -> str:
        """Return `CONFIG.yml:12: document 2: models[1].model: …`; the document only if there are several."""
        place = self.where if error.line is None else f"{self.where}:{error.line}"
        document = f"document {error.document}" if self.n_documents > 1 else ""
        return ": ".join(part for part in (place, document, error.path, error.what) if part)

    def warnings_of(self, document: int) -> tuple[str, ...]:
        """Return the warnings of one document, ready to print."""
        warnings = [warning for warning in self.warned if warning.document == document]
        return tuple(self.line(warning) for warning in sorted(warnings, key=lambda warning: warning.line or 0))

    def raise_if_any(self) -> None:
        """Raise one SurgeryError with every error, in the order of their lines, if there are any."""
        if self.found:
            ordered = sorted(self.found, key=lambda error: (error.document, error.line or 0))
            raise usage_error(list(dict.fromkeys(self.line(error) for error in ordered)))


def read_documents(text: str, where: str) -> tuple[tuple[YamlNode, ...], YamlErrors]:
    """Read the documents of a YAML text; return them, without empty ones, and the errors found.

    Raises:
        SurgeryError: it is not YAML at all, or aliases make it larger than `MAX_NODES`.
    """
    try:
        loader, roots = _compose(text, where)
        try:
            errors = YamlErrors(where, n_documents=len(roots))
            documents = []
            tree = _Tree(loader, errors)
            for number, root in enumerate(roots, start=1):
                errors.document = number
                tree.anchor_keys = _anchor_keys(root)
                documents.append(tree.node(root, "", root.start_mark.line + 1))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, where) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise usage_error(f"is not YAML: {' '.join(str(error).split())}", where=where) from error
    except RecursionError as error:
        raise usage_error(TOO_DEEP, where=where) from error
    return tuple(documents), errors


def plain_scalars(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each scalar without quotes in a YAML text that `read_documents` has read."""
    # By the loader that read it: the two do not agree on every character.
    for loader in (_FAST_LOADER, yaml.SafeLoader):
        if loader is None:
            continue
        try:
            tokens = list(yaml.scan(text, Loader=loader))
        except yaml.YAMLError:
            continue
        for token in tokens:
            if isinstance(token, yaml.ScalarToken) and token.plain:
                yield token.start_mark.line + 1, token.value
        return


def _compose(text: str, where: str) -> tuple[_Loader, list[yaml.Node]]:
    """Return the roots of the documents in `text`, and the loader that makes values of them; to be disposed of."""
    # Composed to PyYAML's nodes and not yet constructed to values: only nodes know their lines.
    if _FAST_LOADER is not None:
        try:
            _check_nesting(text, where, _FAST_LOADER)
            return _composed(_FAST_LOADER(text))
        except yaml.YAMLError:
            pass  # again by the one in Python, whose errors say more: the same on every machine
    return _composed(yaml.SafeLoader(text))


def _composed(loader: _Loader) -> tuple[_Loader, list[yaml.Node]]:
    roots = []
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is not None and not (isinstance(node, yaml.ScalarNode) and node.value == ""):
                roots.append(node)
    except BaseException:
        loader.dispose()
        raise
    return loader, roots


def _check_nesting(text: str, where: str, loader: type[yaml.CSafeLoader]) -> None:
    """Raise SurgeryError where a text is nested so deeply that libyaml, which has no limit, would crash."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise usage_error(TOO_DEEP, where=f"{where}:{line}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _anchor_keys(root: yaml.Node) -> set[int]:
    """Return the ids of the key nodes in whose values anchors stand that aliases outside of them refer to."""
    # An alias is the very node that its anchor names, so that walking meets it again; `parents` is where it was met
    # first, which is at the anchor: anchors stand before their aliases.
    parents: dict[int, tuple[yaml.Node, yaml.Node | None]] = {}
    found: set[int] = set()
    is_open = {id(root)}
    walk = [(root, _edges(root))]
    while walk:
        node, edges = walk[-1]
        child, key = next(edges, (None, None))
        if child is None:
            is_open.discard(id(node))
            walk.pop()
        elif id(child) not in parents and child is not root:
            parents[id(child)] = node, key
            is_open.add(id(child))
            walk.append((child, _edges(child)))
        else:
            while id(child) not in is_open:
                child, key = parents[id(child)]
                if key is not None:
                    found.add(id(key))
    return found


def _edges(node: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node | None]]:
    """Yield the nodes inside of `node`, each with its key where it is the value of one."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key, None
            yield value, key
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield item, None


# What PyYAML's constructors raise on a text that is none of what its tag says: an unknown tag, the 99th of a month,
# half of a pair, `!!bool maybe` (KeyError), `!!int ""` (IndexError), `!!timestamp noon` (AttributeError).
UNREADABLE = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class _Tree:
    """Builds the trees of a file's documents, and counts their nodes."""

    def __init__(self, loader: _Loader, errors: YamlErrors) -> None:
        self.loader = loader
        self.errors = errors
        self.count = 0
        self.open: list[yaml.Node] = []
        self.anchor_keys: set[int] = set()

    def node(self, source: yaml.Node, path: str, line: int) -> YamlNode:
        self.count += 1
        if self.count > MAX_NODES:
            raise usage_error(f"holds more than {MAX_NODES} values, aliases counted each time", where=self.errors.where)
        if isinstance(source, yaml.ScalarNode):
            return self.scalar(source, path, line)
        # An anchor inside of what it names (`&a [*a]`): following it would never end.
        if any(source is outer for outer in self.open):
            return self.wrong(path, line, "contains itself")
        if len(self.open) >= MAX_DEPTH:
            raise usage_error(TOO_DEEP, where=f"{self.errors.where}:{line}")
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
                # As in YAML 1.1: of several `<<` the first counts, and the mapping's own keys count before all of them.
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
                if id(key_node) in self.anchor_keys:
                    own[key] = replace(own[key], holds_anchor=True)
        return merged | own

    def merged(self, source: yaml.Node, path: str, line: int) -> dict[str, YamlNode]:
        """Return the entries of `<<: *anchor` or `<<: [*a, *b]`; for a key in several, the first counts."""
        entries: dict[str, YamlNode] = {}
        for item in source.value if isinstance(source, yaml.SequenceNode) else [source]:
            mapping = self.node(item, path, line).value
            if isinstance(mapping, dict):
                entries = mapping | entries
            else:
                self.wrong(path, line, "<< takes a mapping, or a list of them")
        return entries

    def key(self, source: yaml.Node, path: str, line: int) -> str | None:
        key = self.scalar(source, path, line).value if isinstance(source, yaml.ScalarNode) else source.tag
        if isinstance(source, yaml.ScalarNode) and isinstance(key, str):
            return key
        self.wrong(path, line, f"the key {source.value if isinstance(source, yaml.ScalarNode) else '[…]'} is not text")
        return None

    def scalar(self, source: yaml.ScalarNode, path: str, line: int) -> YamlNode:
        try:
            value = self.loader.construct_object(source)
            if isinstance(value, bytes):  # pydantic would take them for text
                return self.wrong(path, line, "is binary, which means nothing here")
            if isinstance(value, str) and not value.isascii():
                value = _with_whole_pairs(value)
            if not isinstance(value, int) or value.bit_length() <= MAX_BITS:
                return YamlNode(path, line, value)
            return self.wrong(path, line, f"is a whole number of more than {MAX_BITS} bits")
        except UNREADABLE:
            return self.wrong(path, line, f'cannot be read as {source.tag.removeprefix(_TAGS)}: "{source.value}"')

    def wrong(self, path: str, line: int, what: str) -> YamlNode:
        node = YamlNode(path, line, None)
        self.errors.add(node, what)
        return node


def _with_whole_pairs(text: str) -> str:
    """Return `text` with surrogate pairs, as JSON escapes them (`"\\ud83d\\ude00"`), as the characters they stand for.

    Raises ValueError where half of a pair is left, of which there is no UTF-8.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def _syntax_error(error: yaml.MarkedYAMLError, where: str) -> SurgeryError:
    mark = error.problem_mark or error.context_mark
    place = where if mark is None else f"{where}:{mark.line + 1}"
    what = ", ".join(part for part in (error.context, error.problem) if part)
    return usage_error(f"is not YAML: {what}", where=place, hint="Check indentation, brackets and quotes there.")


def to_node(value: object, path: str = "") -> YamlNode:
    """Return a plain value as a tree without lines, for values that are from no file."""
    if isinstance(value, Mapping):
        return YamlNode(
            path, None, {str(k): to_node(child, f"{path}.{k}" if path else str(k)) for k, child in value.items()}
        )
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return YamlNode(path, None, tuple(to_node(child, f"{path}[{i}]") for i, child in enumerate(value)))
    return YamlNode(path, None, value)

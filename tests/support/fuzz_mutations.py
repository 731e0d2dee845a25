"""Change valid files as an attacker would: their trees of values, their bytes, and what lies in their place.

`mutate_folder` changes one to three places of a folder of valid files. Trees (JSON, JSON lines, YAML, headers of
safetensors) are parsed, changed and written again, so that most inputs pass the parser and reach what comes after it.
Every choice is drawn from the generator that is given: the same one makes the same input.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from support.fuzz_values import NUMBERS, Pairs, Raw, near_value, odd_text, odd_value, to_text

_SPECIAL = (b"\x00", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x1b[2J", b"{", b"}", b"[", b"]", b'"', b"\n", b"\\")
_YAML = (
    "&a [*a]",
    "*unknown",
    "&a {<<: *a}",
    "{<<: 1}",
    "{<<: [{a: 1}, 2]}",
    '!!python/object/apply:os.system ["touch ../outside/x"]',
    "!!python/name:os.system",
    "!!binary aGk=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!timestamp 2001-99-99",
    "2001-12-14",
    "!!int x",
    "!!float .inf",
    ".nan",
    "!custom x",
    "0o17",
    "1:30",
    "1_000",
    "? [a]\n  : b",
    "{1: 2}",
    "{null: 2}",
    "{a: 1, a: 2}",
    "|\n  text",
    "'unclosed",
    "@x",
    "\t- x",
    "[" * 200,
)
_LARGE = 10_000_000  # bytes; such files were made by an earlier change, and take long to change again
_MOST_NODES = 200_000
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


def mutate_folder(folder: Path, files: Sequence[str], draw: random.Random) -> None:
    """Change one to three times one of the files that the globs `files` find in `folder`."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = sorted(path for pattern in files for path in folder.glob(pattern) if path.is_file())
        if not found:
            return
        # Each pattern gets its share, however many files another one finds.
        pattern = draw.choice(files)
        path = draw.choice([path for path in found if path.match(pattern)] or found)
        # A change of a linked file, or of one in a linked folder, would be one of a file outside.
        if path.resolve() != folder.resolve() / path.relative_to(folder) or path.stat().st_size > _LARGE:
            continue
        if draw.random() < 0.06:
            _replace_file(path, folder, draw)
        else:
            content = path.read_bytes()
            path.unlink()  # it may be a link to the file of the corpus
            path.write_bytes(mutate_content(path.name, content, draw))


def mutate_content(name: str, content: bytes, draw: random.Random) -> bytes:
    """Return the content of the file `name` with one change that fits its kind, or one of its bytes."""
    structural = _STRUCTURAL.get(Path(name).suffix)
    if structural is not None and draw.random() < 0.85:
        try:
            return structural(content, draw)
        # An earlier change has left what is no tree any more.
        except (ValueError, RecursionError, yaml.YAMLError, struct.error, TypeError, AttributeError, LookupError):
            pass
    return mutate_bytes(content, draw)


# Trees


def mutate_tree(tree: Any, draw: random.Random) -> Any:
    """Change one value of the tree, in place where it is a container; return the tree."""
    places = list(_places(tree))
    if not places or draw.random() < 0.02:
        return odd_value(draw)
    container, key = draw.choice(places)
    value = container[key]
    action = draw.random()
    if action < 0.3:
        container[key] = near_value(value, draw)
    elif action < 0.6:
        container[key] = odd_value(draw)
    elif action < 0.7:
        del container[key]
    elif action < 0.8:
        other, other_key = draw.choice(places)
        container[key], other[other_key] = other[other_key], value
        if _is_circular(tree):
            container[key] = value
    elif action < 0.9 and isinstance(container, dict):
        container[odd_text(draw) if draw.random() < 0.6 else draw.choice(list(container)) + "x"] = value
        if draw.random() < 0.5:
            container.pop(key)
    elif isinstance(container, dict):
        # The same key twice, with another value: parsers disagree on which one counts.
        doubled = Pairs(container.items())
        doubled.append((key, near_value(value, draw)))
        return _replaced(tree, container, doubled)
    else:
        container.insert(key, odd_value(draw))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key). Raises ValueError where a YAML text's aliases make the tree endless."""
    pending = [tree]
    for number in itertools.count():
        if not pending:
            return
        if number > _MOST_NODES:
            raise ValueError("too large")
        node = pending.pop()
        if isinstance(node, Pairs) or not isinstance(node, (dict, list)):
            continue
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield node, key
            pending.append(value)


def _is_circular(tree: Any) -> bool:
    try:
        json.dumps(tree, default=str)
    except (ValueError, RecursionError):
        return True
    return False


def _replaced(tree: Any, old: Any, new: Any) -> Any:
    if tree is old:
        return new
    if isinstance(tree, dict):
        return {key: _replaced(value, old, new) for key, value in tree.items()}
    return [_replaced(value, old, new) for value in tree] if isinstance(tree, list) else tree


def _json(content: bytes, draw: random.Random) -> bytes:
    tree = json.loads(content)
    for _ in range(draw.choice((1, 1, 2))):
        tree = mutate_tree(tree, draw)
    return to_text(tree).encode()


def _json_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = draw.randrange(max(len(lines) - 1, 1))
    action = draw.random()
    if action < 0.8:
        lines[at] = _json(lines[at], draw)
    elif action < 0.9:
        lines.insert(at, draw.choice((b"", b"[]", b"1", b"null", b"{}", b"x", lines[at])))
    else:
        del lines[at]
    return b"\n".join(lines)


def _yaml(content: bytes, draw: random.Random) -> bytes:
    action = draw.random()
    if len(content) > 100_000:  # PyYAML takes seconds
        raise ValueError("too large")
    if action < 0.6:
        tree = yaml.safe_load(content)
        for _ in range(draw.choice((1, 1, 2))):
            tree = mutate_tree(tree, draw)
        # JSON is YAML, as far as both go; where it is not, that is an input too.
        return to_text(tree).encode()
    lines = content.decode().split("\n")
    at = draw.randrange(len(lines))
    head, colon, _ = lines[at].partition(": ")
    if action < 0.85:
        lines[at] = f"{head}: {draw.choice(_YAML)}" if colon else f"{lines[at]} {draw.choice(_YAML)}"
    elif action < 0.9:
        lines.insert(at, draw.choice(("---", "...", "%YAML 9.9", "<<: *a", lines[at], "\t", "# x", "- x", "? x")))
    elif action < 0.93:
        return _BOMB.encode() + content
    elif action < 0.96:
        lines[at] = f" {lines[at]}"
    else:
        del lines[at]
    return "\n".join(lines).encode()


# Safetensors


def _safetensors(content: bytes, draw: random.Random) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + size], content[8 + size :]
    action = draw.random()
    if action < 0.08:
        wrong = draw.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1, 100_000_000))
        return struct.pack("<Q", wrong) + header + data
    if action < 0.14:
        return content[: draw.randrange(len(content))]
    if action < 0.18:
        return content + bytes(draw.choice((1, 8, 4096)))
    if action < 0.24:
        at = draw.randrange(len(data)) if data else 0
        return content[: 8 + size + at] + draw.randbytes(2) + data[at + 2 :]
    tree = json.loads(header)
    if action < 0.5:
        tree = mutate_tree(tree, draw)
    else:
        _change_entry(tree, draw)
    text = to_text(tree).encode()
    if draw.random() < 0.8:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _change_entry(header: dict[str, Any], draw: random.Random) -> None:
    """Change the offsets, the shape or the dtype of one tensor, or add tensors."""
    names = [name for name, entry in header.items() if isinstance(entry, dict) and "data_offsets" in entry]
    name = draw.choice(names)
    entry = header[name]
    action = draw.random()
    if action < 0.25:
        entry["data_offsets"][draw.randrange(2)] = near_value(entry["data_offsets"][1], draw)
    elif action < 0.35:
        other = header[draw.choice(names)]
        entry["data_offsets"] = list(other["data_offsets"])
    elif action < 0.6:
        shape = entry["shape"]
        if shape and draw.random() < 0.5:
            shape[draw.randrange(len(shape))] = draw.choice(NUMBERS)
        else:
            entry["shape"] = draw.choice(([], [0], [1] * 70, [2**32, 2**32], [0, 2**63], [-1, -1], shape[::-1], [None]))
    elif action < 0.75:
        kinds = ("F32", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64", "f32", "", "F128", "U64")
        entry["dtype"] = draw.choice(kinds)
    elif action < 0.85:
        header[odd_text(draw)] = header.pop(name)
    elif action < 0.95:
        header["__metadata__"] = draw.choice(({"a": 1}, [], "x", None, {"format": "pt", "a": "b" * 100_000}, {"a": {}}))
    else:
        end = max(header[other]["data_offsets"][1] for other in names)
        header |= {
            f"{name}.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
            for i in range(draw.choice((1, 100, 5_000)))
        }


# Bytes


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut, flip, insert, double, or encode anew."""
    at = draw.randrange(len(content) + 1)
    stop = min(at + draw.choice((1, 2, 8, 100, 10_000)), len(content))
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[:at] + content[stop:],
        lambda: (
            content[:at] + bytes(byte ^ (1 << draw.randrange(8)) for byte in content[at:stop][:4]) + content[at + 4 :]
        ),
        lambda: content[:at] + draw.choice(_SPECIAL) + content[at:],
        lambda: content[:at] + draw.choice(_SPECIAL) * 1_000 + content[at:],
        lambda: content[:stop] + content[at:],
        lambda: b"\xef\xbb\xbf" + content,
        lambda: _encoded(content, "utf-16"),
        lambda: _encoded(content, "utf-32"),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\r"),
        lambda: b"",
        lambda: b"\n" * 10_000,
        lambda: content * 2,
        lambda: content + odd_text(draw).encode("utf-8", "surrogatepass"),
        lambda: content[:at] + odd_text(draw).encode("utf-8", "surrogatepass") + content[stop:],
        lambda: draw.randbytes(draw.choice((1, 16, 1_000))),
    )
    return draw.choice(changes)()


def _encoded(content: bytes, name: str) -> bytes:
    return content.decode("utf-8", "replace").encode(name)


# What lies in a file's place


def _replace_file(path: Path, folder: Path, draw: random.Random) -> None:
    kind = draw.randrange(13)
    content = path.read_bytes()
    path.unlink()
    outside = folder.parent / "outside"
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(outside / "secret.txt")
    elif kind == 3:
        path.symlink_to(os.path.relpath(outside / "model" / "model.safetensors", path.parent))
    elif kind == 4:
        path.symlink_to("nowhere")
    elif kind == 5:
        path.symlink_to(path.name)
    elif kind == 6:
        path.symlink_to(draw.choice(("/dev/zero", "/dev/null", "/dev/tty")))
    elif kind == 7:
        with path.open("wb") as file:  # sparse: it takes no room, but whoever reads it whole takes gigabytes
            file.truncate(3 * 10**9)
    elif kind == 8:
        _bind(path)
    elif kind == 9:
        path.symlink_to(outside / "model", target_is_directory=True)
    elif kind == 10:
        moved = path.with_name(f"moved-{path.name}")  # a link that stays inside, as many tools make them
        while os.path.lexists(moved):  # by an earlier mutation of this input
            moved = moved.with_name(f"moved-{moved.name}")
        moved.write_bytes(content)
        path.symlink_to(moved.name)
    elif kind == 11 and (others := sorted(other for other in folder.rglob("*") if _is_small(other))):
        shutil.copyfile(draw.choice(others), path)
    # else: the file is missing


def _is_small(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= _LARGE


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        # Paths of sockets have at most 107 bytes.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            bound.bind(f"/proc/self/fd/{directory}/{path.name}")
        except OSError:
            path.write_bytes(b"")
        finally:
            os.close(directory)


_STRUCTURAL: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yml": _yaml,
    ".yaml": _yaml,
    ".safetensors": _safetensors,
}
__all__ = ["Raw", "mutate_bytes", "mutate_content", "mutate_folder", "mutate_tree"]

"""Sources may lie where nobody can write: every command works on them, and leaves them as they are.

Modes do not stop an administrator, so that what is opened for writing is watched as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import refusal as refusing
from support.architectures import add_tokenizer, build, sibling
from support.audit import is_inside, tree, watch_files
from support.cli import Surgery, commands_in
from support.merges import add_lora
from support.refusal import make_model, make_run, no_pictures, rows_of, write_rows

from surgery.checkpoint.selectors import Head
from surgery.edits.heads import scale_heads
from surgery.vectors.extraction import extract

# What is read is in s/, and what is written in out/. Each of them runs on the sources as they were made.
COMMANDS = (
    "inspect s/base",
    "diff s/tuned s/base",
    "verify s/edited",
    "eval s/base --perplexity s/text.txt --json",
    "vector extract s/tuned s/base -o out/extract",
    "vector apply s/vector s/base -o out/apply",
    "vector transfer s/tuned s/base s/base -o out/transfer",
    "vector compare s/vector s/vector",
    "vector extract s/tuned s/base --rank 2 -o out/adapter",
    "merge slerp s/base s/tuned --base s/base --t 0.5 -o out/slerp",
    "merge s/merge.yml -o out/merge",
    "merge logits s/base s/tuned -o out/logits",
    "merge unpack s/ensemble -o out/unpack",
    "edit heads s/base --head L0H1 -o out/heads",
    "edit undo s/edited -o out/undo",
    "edit heads s/base+s/lora --head L0H1 -o out/adapted",
    "probe refusal s/refuser --data s/rows.jsonl -o out/probe",
    "edit heads s/refuser --from s/run --top 1 --examples 2 -o out/repaired",
    "grow add s/base --layers 1 -o out/add",
    "reproduce s/edited",
    "push s/edited lab/edited --dry-run",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("place")
    folder = place / "s"
    folder.mkdir()
    base = add_tokenizer(build("llama", folder / "base"))
    tuned = add_tokenizer(sibling(base, folder / "tuned", seed=1))
    add_lora(folder / "lora", base)
    (folder / "text.txt").write_text("w5 w6 w7 w8 w9\n")
    (folder / "merge.yml").write_text(
        "merge_method: linear\nmodels:\n- {model: s/base, parameters: {weight: 1}}\n"
        "- {model: s/tuned, parameters: {weight: 1}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        no_pictures(patch)
        extract("s/tuned", "s/base", folder / "vector")
        scale_heads("s/base", folder / "edited", scales={Head(0, 1): 0.5})
        from merges.ensemble.average import average_logits

        average_logits([str(base), str(tuned)], folder / "ensemble")
        make_model(folder / "refuser")
        rows = rows_of(dict.fromkeys(refusing.CELLS, 6))
        write_rows(folder / "rows.jsonl", rows)
        make_run(folder / "refuser", folder / "run", rows)
    everything = [*folder.rglob("*"), folder]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield place
    for path in everything:
        path.chmod(0o755)


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """The mode of each file and folder, and when it was changed."""
    return {str(path): (path.stat().st_mode, path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_works_on_read_only_sources_and_writes_nothing_there(
    sources: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_pictures(monkeypatch)
    run: Surgery = commands_in(sources, monkeypatch, capsys)
    before = tree(sources / "s"), states(sources / "s")
    with watch_files() as watched:
        result = run(*line.split())
    assert result.code == 0, result.err
    assert (tree(sources / "s"), states(sources / "s")) == before
    assert not [path for path in watched.written if is_inside(path, [sources / "s"])]
    # A copy of a read-only file can be edited and deleted.
    made = [path for path in (sources / "out").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o200 for path in made)

"""The pages in docs/commands are what the program says."""

from __future__ import annotations

from pathlib import Path

from cli.main import app
from cli.reference import main, pages
from cli.signatures import signatures

FOLDER = Path(__file__).parents[2] / "docs/commands"


def test_every_page_is_up_to_date() -> None:
    wanted = pages()
    assert {path.name for path in FOLDER.iterdir()} == set(wanted)
    for name, text in wanted.items():
        assert (FOLDER / name).read_text() == text, f"{name}: run `make docs`"


def test_a_page_has_every_option_and_the_example() -> None:
    wanted = pages()
    for command in signatures(app):
        page = wanted[f"{command.name.replace(' ', '-')}.md"]
        assert f"surgery {command.name}" in page and "## Example" in page
        assert all(f"`{each.flag}`" in page for each in command.parameters if each.flag)


def test_pages_of_commands_that_are_no_more_are_removed(tmp_path: Path) -> None:
    (tmp_path / "gone.md").write_text("")
    main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(pages())

"""Every parameter of every command that is a path says whether it is read or written, so that recipes and manifests can
be held to it."""

from __future__ import annotations

from cli.commands.run import NO_STEPS, commands
from cli.main import app
from cli.signatures import signatures
from surgery.recipes.recorded_command import REPRODUCIBLE

# Texts that name no file, model or data set. A new parameter must be added here, or say by `NamesInput` or
# `NamesOutput` what it names.
PLAIN = {
    *("allow-push", "at", "chat-template", "device", "exclude", "expert", "field", "head", "include", "message"),
    *("drop", "keep"),
    *("names", "pr", "repo", "revision", "scale", "scale-for", "set", "special", "sweep", "think-close", "think-open"),
    *("token", "top", "live", "positions", "output", "name", "from"),
    # Parameters of merge methods, which are numbers, or lists of them.
    *("weight", "density", "t", "lambda", "gamma", "epsilon", "select-topk", "r", "alpha", "max-iter", "tol", "eps"),
}


def test_every_path_is_read_or_written() -> None:
    unclear = [
        f"{each.name}: {parameter.name}"
        for each in signatures(app)
        for parameter in each.parameters
        if parameter.kind == "path" and parameter.names is None and parameter.writes is None
    ]
    assert unclear == [], "annotate them with NamesInput or NamesOutput"


def test_every_text_names_something_or_nothing() -> None:
    unclear = [
        f"{each.name}: {parameter.name}"
        for each in signatures(app)
        for parameter in each.parameters
        if parameter.kind == "text" and not parameter.choices and parameter.names is None
        if parameter.name not in PLAIN
    ]
    assert unclear == []


def test_no_step_has_a_parameter_that_is_written_to() -> None:
    for name, command in commands().items():
        writing = [each.name for each in command.parameters.values() if each.writes is not None]
        assert writing in ([], [command.changes]), name
        assert command.writes is None or command.output is not None or command.changes is not None, name
    assert {"run", "push", "reproduce"} <= NO_STEPS
    assert not NO_STEPS & REPRODUCIBLE

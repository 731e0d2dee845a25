"""The options of `surgery merge weights` that are parameters of merge methods, as one table.

The methods' own specifications lie beside their kernels, which import torch; `--help` must not wait for that. A test
holds this table to them: a parameter that a method gains or loses must be added or removed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class MethodOption:
    """One parameter of merge methods. name: as configs write it. is_flag: whether it is true or false."""

    name: str
    help: str
    is_flag: bool = False

    @property
    def argument(self) -> str:
        """The parameter's name in Python, where `lambda` is a keyword."""
        return "lambda_" if self.name == "lambda" else self.name

    def parameter(self) -> inspect.Parameter:
        """Return the option as Typer reads it from a signature."""
        if self.is_flag:
            # With None as the default: what was not given is left to the method's own default, or to the config.
            hint: Any = Annotated[bool | None, typer.Option(help=self.help)]
        else:
            # Texts, read as YAML later: a value may be a number or a list, and an option may be repeated.
            names = () if self.argument == self.name else (f"--{self.name}",)
            hint = Annotated[list[str] | None, typer.Option(*names, metavar="VALUE", help=self.help)]
        return inspect.Parameter(self.argument, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)


METHOD_OPTIONS = (
    MethodOption("weight", "One for all models, or one per model; a list is a gradient over depth."),
    MethodOption("density", "Share of each task vector that is kept."),
    MethodOption("t", "slerp: 0 is the base, 1 the other model; nearswap: the difference to swap."),
    MethodOption("lambda", "Scales the merged task vector."),
    MethodOption("gamma", "breadcrumbs: share of outliers dropped."),
    MethodOption("epsilon", "della: half-width of its probabilities; ram: what counts as no change."),
    MethodOption("normalize", "Divide by the sum of the weights.", is_flag=True),
    MethodOption("rescale", "Make up for what sparsifying took away.", is_flag=True),
    MethodOption("scale", "passthrough: what tensors are multiplied by."),
    MethodOption("select_topk", "sce: share of the varying elements selected."),
    MethodOption("r", "ramplus_tl: how much unique changes are amplified."),
    MethodOption("alpha", "ramplus_tl: bound of the ratio that amplifies."),
    MethodOption("max_iter", "karcher: steps at most."),
    MethodOption("tol", "karcher: the step at which to stop."),
    MethodOption("eps", "multislerp: lengths below this count as none."),
    MethodOption("normalize_weights", "multislerp: divide the weights by their sum.", is_flag=True),
    MethodOption("filter_wise", "model_stock: an angle per row.", is_flag=True),
    MethodOption("nuslerp_flatten", "nuslerp: one angle for the whole tensor.", is_flag=True),
    MethodOption("nuslerp_row_wise", "nuslerp, not flat: an angle per column.", is_flag=True),
)


def with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of `METHOD_OPTIONS` in the place of the keyword-only argument `parameters` of `command`.

    The command gets a dict, parameter → value, of those that were given.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        # In place, so that `--help` keeps the order in which the command declares its options.
        options = [option.parameter() for option in METHOD_OPTIONS]
        parameters += options if parameter.name == "parameters" else [parameter]

    @wraps(command)
    def with_options(**arguments: Any) -> None:
        values = {option.name: arguments.pop(option.argument, None) for option in METHOD_OPTIONS}
        command(**arguments, parameters={name: value for name, value in values.items() if value is not None})

    # Typer and `cli.signatures` read both: the signature for names and defaults, the annotations for types.
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options

"""The merge methods by name: what a config may set for each, and how its kernel is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from merges.config.settings import MethodSpec
from surgery.engine.kernel import Kernel, Parameter

Params = Mapping[str, Parameter]
Build = Callable[[Params, int, bool], Kernel]


@dataclass(frozen=True)
class Method:
    """A merge method.

    build: `build(params, models, based)` → the kernel for one tensor, where `models` counts the models beside the
        base, which is the kernel's first input where `based`. `params` go to the kernel: parameters of the spec by
        name (`lambda` as `lambda_`), a tuple with one entry per model where they are per model, and `seed` and `paper`.
    """

    spec: MethodSpec
    build: Build

    def kernel(self, params: Params, models: int, *, based: bool) -> Kernel:
        """Return the kernel that merges `models` models with these parameters."""
        return self.build(params, models, based)


METHODS: dict[str, Method] = {}


def register(spec: MethodSpec, build: Build) -> None:
    """Add a method. A second one of the same name is a bug."""
    # Our own mistake, never a user's: the later method would silently take the place of the first.
    assert spec.name not in METHODS, f"{spec.name} is registered twice"
    METHODS[spec.name] = Method(spec, build)


def argument(parameter: str) -> str:
    """Return a parameter's name as a keyword argument of kernels: its own, unless Python reserves that."""
    return "lambda_" if parameter == "lambda" else parameter

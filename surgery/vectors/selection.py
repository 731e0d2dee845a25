"""Select the tensors that an edit changes, and their scales, by globs over tensor names.

A glob is matched against the whole name as in a shell: `*` matches any run of characters, dots included
(`*.mlp.*`, `model.layers.1?.*`, `lm_head.weight`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import listing, usage_error
from surgery.io.patterns import check_length, matches_glob

MAX_GLOBS = 200  # of each option: every one is tried on every tensor, and a glob stands for many names


@dataclass(frozen=True)
class TensorSelection:
    """The mask m and the scale α of θ + α·(m ⊙ v), per tensor.

    A tensor is selected when it matches one of `include` (none given: all) and none of `exclude`. Its scale is that of
    the last glob of `scale_for` that matches it, else `scale`.
    """

    scale: float = 1.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scale_for: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named_scales = [("--scale", self.scale), *((f"--scale-for {glob}", v) for glob, v in self.scale_for.items())]
        for option, value in named_scales:
            if not math.isfinite(value):
                raise usage_error(f"got {value}, expected a finite number", where=option)
        globs = {"--include": self.include, "--exclude": self.exclude, "--scale-for": tuple(self.scale_for)}
        for option, patterns in globs.items():
            if len(patterns) > MAX_GLOBS:
                raise usage_error(f"got {len(patterns):,} globs, expected at most {MAX_GLOBS}", where=option)
            for pattern in patterns:
                check_length(pattern, where=option)

    @property
    def options(self) -> dict[str, Any]:
        """The command-line options that give this selection, as manifests record them."""
        return {
            "scale": self.scale,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "scale_for": dict(self.scale_for),
        }

    def selects(self, name: str) -> bool:
        """Return whether the globs select the tensor `name`, whatever its scale."""
        return (not self.include or _matches(name, self.include)) and not _matches(name, self.exclude)

    def scale_of(self, name: str) -> float:
        """Return α for the tensor `name`; 0 where it is not selected."""
        if not self.selects(name):
            return 0.0
        scale = self.scale
        # No early exit: of several matches the last one counts, as with repeated command-line options.
        for glob, special in self.scale_for.items():
            if matches_glob(name, glob):
                scale = special
        return scale

    def check_names(self, names: Iterable[str]) -> None:
        """Raise SurgeryError where a glob matches none of `names`, or all globs together select none."""
        every = list(names)
        # A glob without a match is a typing error, and would silently change nothing.
        for option, globs in (
            ("--include", self.include),
            ("--exclude", self.exclude),
            ("--scale-for", tuple(self.scale_for)),
        ):
            for glob in globs:
                if not any(matches_glob(name, glob) for name in every):
                    raise usage_error(
                        f"matches none of {len(every)} tensors, such as {listing(every, 3)}",
                        where=f"{option} {glob!r}",
                    )
        if not any(self.selects(name) for name in every):
            raise usage_error(f"leave none of {len(every)} tensors to edit", where="--include and --exclude")


def parse_scale_globs(texts: Sequence[str]) -> dict[str, float]:
    """Parse `GLOB=α` options to {glob: α}. Raises SurgeryError."""
    scales: dict[str, float] = {}
    for text in texts:
        glob, separator, number = text.rpartition("=")
        scales.pop(glob, None)  # of two entries the later one counts, so it must also come later in the dict
        try:
            scales[glob] = float(number)
        except ValueError:
            separator = ""
        if not separator or not glob:
            raise usage_error(f"got {text!r}, expected GLOB=NUMBER", where="--scale-for")
    return scales


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(matches_glob(name, glob) for glob in globs)

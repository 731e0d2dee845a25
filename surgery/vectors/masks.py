"""Which tensors an edit touches and how strongly: globs over tensor names.

A glob is matched against the whole name as in a shell: `*` stands for any run of characters, dots included
(`*.mlp.*`, `model.layers.1?.*`, `lm_head.weight`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from surgery.errors import listing, usage_error


@dataclass(frozen=True)
class Mask:
    """m and α of θ + α·(m ⊙ v), per tensor.

    A tensor is edited when it matches one of `include` (none given: all) and none of `exclude`. Its scale is that of
    the last glob of `scale_for` that matches it, else `scale`.
    """

    scale: float = 1.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scale_for: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for where, value in (
            ("--scale", self.scale),
            *((f"--scale-for {k}", v) for k, v in self.scale_for.items()),
        ):
            if not math.isfinite(value):
                raise usage_error(f"got {value}, expected a finite number", where=where)

    def scale_of(self, name: str) -> float:
        """α for the tensor `name`; 0 where the mask leaves it alone."""
        if self.include and not _matches(name, self.include):
            return 0.0
        if _matches(name, self.exclude):
            return 0.0
        scale = self.scale
        for glob, special in self.scale_for.items():
            if fnmatchcase(name, glob):
                scale = special
        return scale

    def check(self, names: Iterable[str]) -> None:
        """Raises SurgeryError where a glob matches none of `names`, or all globs together leave none."""
        every = list(names)
        for option, globs in (
            ("--include", self.include),
            ("--exclude", self.exclude),
            ("--scale-for", tuple(self.scale_for)),
        ):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in every):
                    raise usage_error(
                        f"matches none of {len(every)} tensors, such as {listing(every, 3)}",
                        where=f"{option} {glob!r}",
                    )
        if not any(self.selects(name) for name in every):
            raise usage_error(f"leave none of {len(every)} tensors to edit", where="--include and --exclude")

    def selects(self, name: str) -> bool:
        """Whether the globs let `name` through, whatever its scale."""
        return (not self.include or _matches(name, self.include)) and not _matches(name, self.exclude)


def parse_scale_globs(texts: Sequence[str]) -> dict[str, float]:
    """`GLOB=α` options → {glob: α}. Raises SurgeryError."""
    scales: dict[str, float] = {}
    for text in texts:
        glob, separator, number = text.rpartition("=")
        scales.pop(glob, None)  # the last one counts, so it must also stand last
        try:
            scales[glob] = float(number)
        except ValueError:
            separator = ""
        if not separator or not glob:
            raise usage_error(f"got {text!r}, expected GLOB=NUMBER", where="--scale-for")
    return scales


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)

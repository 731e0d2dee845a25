"""Every merge method, each a pure kernel under its formula; `METHODS` has them by name."""

from merges.methods import averages as _averages  # imported, as those below, for the methods that it registers
from merges.methods import element_selection as _element_selection
from merges.methods import spherical as _spherical
from merges.methods import task_arithmetic as _task_arithmetic
from merges.methods.registry import METHODS, Method, argument

__all__ = ["METHODS", "Method", "argument"]
_REGISTERING = (_averages, _element_selection, _spherical, _task_arithmetic)

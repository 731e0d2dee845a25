"""Every merge method, each a pure kernel under its formula; `METHODS` has them by name."""

from merges.methods import element_selection, linear
from merges.methods import slerp as sphere
from merges.methods import task_arithmetic as task
from merges.methods.registry import METHODS, Method, argument

__all__ = ["METHODS", "Method", "argument", "element_selection", "linear", "sphere", "task"]

"""Shapes of optimization profiles: a recipe's ranges applied to the inputs of a graph. No torch.

A recipe names axes (`batch`, `sequence`), and so do the inputs of an exported graph; fixed dimensions are
unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from qcompress.errors import UsageError
from qcompress.graph.view import DEQUANTIZE, View, dimensions, operand
from qcompress.schema.recipe import Profile

Shapes = dict[str, list[list[int]]]
"""Input name -> [min, opt, max] shape."""

TOTAL = "total"
"""Axis of the attention mask of a graph with a key-value cache: `past` plus `sequence`."""

POSITIONS = "position_ids"
"""The input that indexes the table of positions."""

PASSING = ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Expand")
"""Operators that exporters put between the positions and their table."""


def profile_shapes(view: View, profiles: Sequence[Profile]) -> list[Shapes]:
    """Shapes of all inputs for each profile; empty if every dimension is fixed. Raises UsageError for an axis
    without a name, without a range, or beyond the model's context.
    """
    _check_context(view, profiles)
    _check_axes(view, profiles)
    shapes = {value.name: dimensions(value) for value in view.inputs}
    for name, shape in shapes.items():
        if shape is None or None in shape:
            raise UsageError(
                f"{view.file}: input {name!r} has a dimension without a name or a size",
                fix="export with dynamic axes that have names, such as batch and sequence",
            )
    if all(isinstance(size, int) for shape in shapes.values() for size in shape):
        return []
    return [
        {name: _triple(view, name, shape, profile) for name, shape in shapes.items()} for profile in profiles
    ]


def _triple(view: View, name: str, shape: tuple[int | str, ...], profile: Profile) -> list[list[int]]:
    ranges = profile.ranges
    ranges.setdefault(TOTAL, [sum(pair) for pair in zip(profile.sequence, profile.past, strict=True)])
    unknown = [size for size in shape if isinstance(size, str) and size not in ranges]
    if unknown:
        raise UsageError(
            f"{view.file}: input {name!r} has an axis {unknown[0]!r}, and build.profiles gives ranges for "
            f"{', '.join(ranges)}",
            fix=f"give it one: `axes: {{{unknown[0]}: [min, opt, max]}}`",
        )
    return [[size if isinstance(size, int) else ranges[size][index] for size in shape] for index in range(3)]


def _check_axes(view: View, profiles: Sequence[Profile]) -> None:
    """Refuse a range in `axes` for an axis that no input has; the other three have defaults."""
    known = {size for value in view.inputs for size in dimensions(value) or () if isinstance(size, str)}
    for number, profile in enumerate(profiles):
        for axis in profile.axes.keys() - known:
            near = difflib.get_close_matches(axis, known, n=1, cutoff=0.5)
            raise UsageError(
                f"build.profiles[{number}].axes.{axis}: no input of {view.file} has an axis of this name",
                fix=f"did you mean `{near[0]}`?"
                if near
                else f"the axes are {', '.join(sorted(known)) or 'fixed'}",
            )


def _check_context(view: View, profiles: Sequence[Profile]) -> None:
    limit = model_context(view)
    if limit is None:
        return
    cached = any("past" in (dimensions(value) or ()) for value in view.inputs)
    for number, profile in enumerate(profiles):
        for axis, most in (("sequence", limit), ("past", limit - 1)) if cached else (("sequence", limit),):
            low, opt, high = profile.ranges[axis]
            if high > most:
                raise UsageError(
                    f"build.profiles[{number}].{axis} goes to {high} tokens, and the model has {limit} "
                    "positions",
                    fix=f"set `{axis}: [{min(low, most)}, {min(opt, most)}, {most}]`",
                )


def model_context(view: View) -> int | None:
    """Number of rows of the position table; None if the graph has none."""
    queue, seen = [POSITIONS], {POSITIONS}
    while queue:
        name = queue.pop()
        for node in view.readers.get(name, []):
            if node.op_type == "Gather" and operand(node, 1) == name:
                table = view.producers.get(operand(node, 0))
                stored = operand(table, 0) if table is not None and table.op_type == DEQUANTIZE else ""
                shape = view.shape(stored or operand(node, 0))
                return shape[0] if shape and isinstance(shape[0], int) else None
            if node.op_type in PASSING:
                queue += set(node.output) - seen
                seen |= set(node.output)
    return None

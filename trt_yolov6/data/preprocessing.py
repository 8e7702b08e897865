"""Preprocessing of an image: its placement, channel order and value range.

Detectors differ in it, and one that is given another's input still finds most objects, only worse.
So the manifest stores it with the engine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from trt_yolov6.errors import UserError, did_you_mean

Fit = Literal["letterbox", "corner", "stretch"]
"""Placement of an image in the input.

letterbox: its aspect ratio is kept, it lies in the middle, gray around it
corner:    the same, but it lies in the top left corner
stretch:   it fills the input, its aspect ratio is lost
"""

Interpolation = Literal["area", "linear", "cubic"]
"""Interpolation for resizing: `area` averages where it shrinks and is `linear` where it grows."""

Colour = Literal["rgb", "bgr"]


@dataclass(frozen=True)
class Preprocessing:
    """The input is (pixel - mean) / std of each channel, of 0..255 pixels.

    A uint8 input takes raw pixels, which the graph normalizes: `mean` and `std` are not used.
    """

    fit: Fit = "letterbox"
    interpolation: Interpolation = "area"
    colour: Colour = "rgb"
    """The order of the input's channels."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Mean of red, green and blue, in gray levels of 0..255, whatever the channel order."""
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)
    """Divisors (standard deviations), in the same order."""

    def __post_init__(self) -> None:
        choices = {"fit": Fit, "interpolation": Interpolation, "colour": Colour}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise UserError(
                    f"`preprocess` {name}={getattr(self, name)} is unknown; choose one of "
                    f"{', '.join(get_args(allowed))}.",
                )
        for name in ("mean", "std"):
            given: Any = getattr(self, name)
            is_one = isinstance(given, str) or not isinstance(given, Iterable)
            try:
                values = tuple(map(float, (given,) * 3 if is_one else given))
            except (TypeError, ValueError):
                values = ()
            object.__setattr__(self, name, values)
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise UserError(
                    f"`preprocess` {name} needs one number or three, of red, green and blue in "
                    "0..255.",
                )
        if min(self.std) <= 0:
            raise UserError("`preprocess` std divides the pixels; give numbers above 0.")

    @property
    def channels(self) -> tuple[tuple[int, float, float], ...]:
        """Index in RGB, mean and divisor of each input channel."""
        order = (0, 1, 2) if self.colour == "rgb" else (2, 1, 0)
        return tuple((channel, self.mean[channel], self.std[channel]) for channel in order)

    def with_changes(self, changes: Mapping[str, Any]) -> Preprocessing:
        """Return it with fields replaced, by name.

        Raises:
            UserError: no such field or value exists.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UserError(
                    f"`preprocess` has no field {name}{did_you_mean(name, known)}; the fields are "
                    f"{', '.join(known)}.",
                )
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        """Return it in a line for people, such as `letterbox, RGB / 255`."""
        colour = self.colour.upper()
        if any(self.mean):
            colour = f"({colour} - {_listed(self.mean)})"
        divisor = "" if set(self.std) == {1.0} else f" / {_listed(self.std)}"
        kind = {"area": "", "linear": " (linear)", "cubic": " (cubic)"}[self.interpolation]
        return f"{self.fit}{kind}, {colour}{divisor}"


YOLOV6 = Preprocessing()
"""Preprocessing of the paper's networks: a letterbox, RGB in 0..1."""


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Return fields of `Preprocessing` by name, of texts `FIELD=VALUE`, numbers with commas.

    Raises:
        UserError: a change is not of that form, or there is no such field or value.

    Examples:
        >>> parse_changes(["fit=stretch", "mean=127.5"])
        {'fit': 'stretch', 'mean': (127.5, 127.5, 127.5)}
    """
    fields: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"`preprocess` {change} is not of the form FIELD=VALUE; correct it.")
        fields[name] = text.split(",") if "," in text else text
    changed = YOLOV6.with_changes(fields)
    return {name: getattr(changed, name) for name in fields}


def _listed(values: Sequence[float]) -> str:
    one = f"{values[0]:g}"
    return one if len(set(values)) == 1 else ",".join(f"{value:g}" for value in values)

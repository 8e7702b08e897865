"""`Closing`: what is closed after use, by `close` or at the end of a `with` block."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Closing(abc.ABC):
    """Base of what holds a file, memory or a device until it is closed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free what it holds; it cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Progress bars."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"


class Bar(tqdm):
    """A bar on stderr with its units, rate and the time left; nothing if stderr is not a terminal.

    Args:
        items: counted as they are iterated over; without them, `update` counts.
        what: the work in progress.
        unit: of what is counted, in the plural.
        total: how many there are; by default as many as `items`.
        done: how many were there already.
        quiet: show nothing, as on ranks other than the first.
        options: tqdm's.
    """

    def __init__(
        self,
        items: Iterable[Any] | None = None,
        *,
        what: str,
        unit: str,
        total: int | None = None,
        done: int = 0,
        quiet: bool = False,
        **options: Any,
    ):
        super().__init__(
            items, what, total, initial=done, unit=f" {unit}", bar_format=FORMAT, disable=quiet or None, **options
        )

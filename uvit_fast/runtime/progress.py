"""Bars of work under way."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"


class Bar(tqdm):
    """A bar on stderr with its units, rate and the time that is left; nothing where stderr is not a terminal.

    Args:
        items: what is counted while it is iterated over; without it, `update` counts.
        what: is under way.
        unit: of what is counted, in the plural.
        total: how many there are; by default as many as `items`.
        done: how many were there already.
        quiet: show nothing, as ranks but the first.
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

"""Numbers as text, the same in the terminal, in the summary and on the dashboard's pages."""

from __future__ import annotations

UNKNOWN = "-"
"""What stands for a number that was not measured."""


def number(value: object, digits: int) -> str:
    """A number with thousands separators.

    Example:
        >>> number(12345.678, 1), number(None, 1)
        ('12,345.7', '-')
    """
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else UNKNOWN


def percent(share: object, digits: int = 0) -> str:
    """A share of 1 in percent.

    Example:
        >>> percent(0.943), percent(0.943, 1)
        ('94%', '94.3%')
    """
    return f"{100 * share:.{digits}f}%" if isinstance(share, int | float) else UNKNOWN


def duration(seconds: float) -> str:
    """Seconds as words.

    Example:
        >>> duration(252)
        '4 min 12 s'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

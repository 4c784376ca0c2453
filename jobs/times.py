"""Wall times as users and schedulers write them."""

from __future__ import annotations

import re

from preprocessing.errors import InputError

MINUTE, HOUR, DAY = 60, 3600, 86400


def parse_time(text: str, what: str = "--time") -> int:
    """Return the seconds of `[D-]HH:MM:SS`.

    Raises:
        InputError: another form; `2:00` is two minutes to Slurm and two hours to LSF.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", text, re.ASCII)
    if match is None:
        raise InputError(
            f"{what} {text} is no time: write [DAYS-]HOURS:MINUTES:SECONDS, as 02:00:00"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = days * DAY + hours * HOUR + minutes * MINUTE + seconds
    if not total:
        raise InputError(f"{what} {text} leaves no time")
    return total


def in_slurm(seconds: int) -> str:
    """Write seconds as `HH:MM:SS`, or `D-HH:MM:SS`."""
    days, rest = divmod(seconds, DAY)
    text = f"{rest // HOUR:02d}:{rest % HOUR // MINUTE:02d}:{rest % MINUTE:02d}"
    return f"{days}-{text}" if days else text


def in_lsf(seconds: int) -> str:
    """Write seconds as LSF's `HOURS:MINUTES`; part of a minute counts as one."""
    minutes = -(-seconds // MINUTE)
    return f"{minutes // 60}:{minutes % 60:02d}"

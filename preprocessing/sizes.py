"""Sizes as people write them: "100MB", "1.5 GiB", "250_000"."""

import re
from fractions import Fraction

from preprocessing.errors import InputError


def show_size(size: float) -> str:
    """Return bytes as people read them, in powers of 1000: "76.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def parse_size(text: str) -> int:
    """Return the bytes that `text` means, e.g. "100MB" (10^8), "1.5 GiB" or "250_000".

    Args:
        text: a number and a unit: none or B, k/M/G/T (powers of 1000, with or without B), or
            Ki/Mi/Gi/Ti (powers of 1024); case does not matter.

    Raises:
        InputError: if it is not such a size, not whole, or zero.
    """
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*(?:([kmgt])(i)?)?b?", text.strip(), re.I)
    if not match:
        raise InputError(f"size {text!r} is not understood: write for example 100MB, 1GiB, 250000")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    size = Fraction(number.replace("_", "")) * (1024 if binary else 1000) ** power
    if size.denominator != 1 or size < 1:
        raise InputError(f"size {text!r} is not a whole number of bytes from 1: write e.g. 100MB")
    return int(size)

"""Which records of a chunk are kept."""

from __future__ import annotations

from collections import Counter

import numpy as np

from preprocessing.columns import parts
from preprocessing.fasta import Parsed
from preprocessing.options import PreprocessOptions


def select(parsed: Parsed, options: PreprocessOptions, counts: Counter[str]) -> Parsed:
    """Count records, and leave out those that are not to be kept."""
    lengths = np.diff(parts(parsed.sequences)[0])
    too_short = ~parsed.invalid & (lengths < options.min_length)
    too_long = np.zeros(len(lengths), bool)
    if options.max_length is not None:
        too_long = ~parsed.invalid & (lengths > options.max_length)
    everything = np.ones(len(lengths), bool)
    reasons = {"invalid": parsed.invalid, "too_short": too_short, "too_long": too_long}
    for name, rows in {"read": everything, **reasons}.items():
        counts[f"{name}.records"] += int(np.count_nonzero(rows))
        counts[f"{name}.residues"] += int(lengths[rows].sum())
    counts.update(parsed.changed)
    kept = ~(parsed.invalid | too_short | too_long)
    return parsed if kept.all() else parsed.take(np.flatnonzero(kept))

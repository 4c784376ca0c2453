"""What ranks look up while they map: exclusions and clusters, as files that all of them map.

They are written anew whenever a job starts, so that nothing in them is trusted that a crash left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from preprocessing.clusters import Clusters, write_clusters
from preprocessing.exclusions import map_exclusions, write_exclusions
from preprocessing.keys import Placement
from preprocessing.options import PreprocessOptions
from preprocessing.raw import BadInput
from preprocessing.selection import Selection

_CLUSTERS = "clusters.u64"

MAX_UNLISTED = 0.5
"""Share of the records whose ids the table of clusters may lack."""


def write_lookups(
    directory: Path, options: PreprocessOptions, placement: Placement, ids: Iterable[pa.Array]
) -> None:
    """Write the files that `open_selection` maps.

    Args:
        directory: where to.
        options: what the job does.
        placement: what it holds out.
        ids: binary [N] each, the first ids of some inputs.

    Raises:
        BadInput: if a file that an option names is not what it should be, or the table of clusters
            has other ids than the inputs.
    """
    if options.exclude:
        write_exclusions(directory, options.exclude, options.on_invalid)
    if options.holdout_by is None:
        return
    path, below = directory / _CLUSTERS, placement.held_out_below
    example = write_clusters(path, options.holdout_by, below, options.memory)
    clusters = Clusters(path, below)
    seen = [column for column in ids if len(column)]
    if seen and not any(clusters.look_up(column)[1].any() for column in seen):
        raise BadInput(
            f"{options.holdout_by}: lists none of the first {sum(map(len, seen)):,} ids of the "
            f"inputs: there ids are like '{example}', in the inputs like "
            f"'{seen[0][0].as_py().decode()}': give the table of these sequences"
        )


def open_selection(directory: Path, options: PreprocessOptions, placement: Placement) -> Selection:
    """Return what decides over records, with what `write_lookups` wrote."""
    exclusions = map_exclusions(directory) if options.exclude else None
    clusters = None
    if options.holdout_by is not None:
        clusters = Clusters(directory / _CLUSTERS, placement.held_out_below)
    return Selection(options, placement, exclusions, clusters)


def check_clusters(options: PreprocessOptions, counts: Counter[str]) -> None:
    """See that the table of clusters knew most of the records.

    Raises:
        BadInput: if it did not.
    """
    unlisted = counts["unlisted.records"]
    looked_up = unlisted + counts["listed.records"]
    if unlisted > MAX_UNLISTED * looked_up:
        raise BadInput(
            f"{options.holdout_by}: does not list {unlisted:,} of {looked_up:,} ids of the inputs, "
            "so that hold-out by cluster would split clusters: give the table of all of them"
        )

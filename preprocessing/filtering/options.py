"""What a user may ask of a search for similar sequences; presets of published procedures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from preprocessing.errors import InputError, as_typed
from preprocessing.fasta import OnInvalid

Tool = Literal["blastp", "mmseqs2"]
IdentityOf = Literal["alignment", "query", "shorter"]
Side = Literal["queries", "targets"]
Keep = Literal["longest", "first"]

MAX_SENSITIVITY = 7.5
"""The greatest that MMseqs2's help names; in its own terms "sensitive"."""


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """What counts as similar, and what becomes of it; all of it is part of what comes out.

    Raises:
        InputError: if a value is out of range, or two contradict each other.
    """

    tool: Tool
    """Program that searches, with its default settings but for what is named here."""
    min_identity: float | None = None
    """A hit is identical in at least this fraction (0 to 1) of what `identity_of` says."""
    identity_above: float | None = None
    """Or: in more than this fraction."""
    identity_of: IdentityOf = "alignment"
    """What identical residues are divided by: "alignment": columns of the alignment, gaps
    included; "query": residues of the query; "shorter": residues of the shorter sequence."""
    min_coverage: float = 0.0
    """Fraction (0 to 1) of the residues of the shorter sequence that lie in the alignment."""
    max_evalue: float = 1e-3
    """Greatest e-value of a hit; the tool searches with it."""
    sensitivity: float | None = None
    """MMseqs2's -s, 1 to 7.5; None: 5.7, its default."""
    split: int | None = None
    """MMseqs2 searches the targets in this many parts, for less memory; None: one."""
    max_hits: int | None = None
    """Most hits of a query that are asked for; None: all. A query with more is counted."""
    exclude: Side = "queries"
    """Which side's sequences are excluded when a hit joins the two."""
    reduce: bool = False
    """Keep one of similar sequences (a set against itself only)."""
    prefer: Keep = "longest"
    """Which one `reduce` keeps: the longest (of equals that of the smallest key), or the first of
    the input."""
    kept: bool = False
    """Also write the sequences of the excluded side that stay, as FASTA."""
    on_invalid: OnInvalid = "error"
    """As in `PreprocessOptions`; equal there and here, so that keys are equal."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("tool", Tool),
            ("identity_of", IdentityOf),
            ("exclude", Side),
            ("prefer", Keep),
            ("on_invalid", OnInvalid),
        ):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise InputError(
                    f"{as_typed(name)} {value}: choose one of {', '.join(get_args(kind))}"
                )
        if (self.min_identity is None) == (self.identity_above is None):
            raise InputError(
                "say how similar is too similar: give either --min-identity or --identity-above, "
                "or a --preset"
            )
        for name, least, most in (
            ("min_identity", 0, 1),
            ("identity_above", 0, 1),
            ("min_coverage", 0, 1),
            ("sensitivity", 1, MAX_SENSITIVITY),
            ("split", 1, 10_000),
            ("max_hits", 1, 2**31 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(f"{as_typed(name)} {value}: choose {least} to {most:,}")
        if not 0 < self.max_evalue < float("inf"):
            raise InputError(f"--max-evalue {self.max_evalue}: choose a number above 0")
        for name in ("sensitivity", "split"):
            if self.tool == "blastp" and getattr(self, name) is not None:
                raise InputError(f"{as_typed(name)} is for --tool mmseqs2: leave it out")

    def check_direction(self, *, within: bool) -> None:
        """Refuse options that do not fit to the direction of the search.

        Args:
            within: whether a set is searched against itself.
        """
        if self.reduce and not within:
            raise InputError("--reduce works on a set against itself: add --self")
        if self.exclude == "targets" and within:
            raise InputError("--exclude targets has no meaning with --self: leave it out")
        if self.prefer != "longest" and not self.reduce:
            raise InputError(f"--prefer {self.prefer} needs --reduce: add it")

    def threshold(self) -> str:
        """Return in words what a hit is."""
        identity = (
            f"identity ≥ {self.min_identity:g}"
            if self.min_identity is not None
            else f"identity > {self.identity_above:g}"
        )
        coverage = f", coverage ≥ {self.min_coverage:g}" if self.min_coverage else ""
        return f"{identity} of {self.identity_of}{coverage}, e-value ≤ {self.max_evalue:g}"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published procedure."""

    options: dict[str, Any]
    """What it says of `FilterOptions`."""
    source: str
    """Where it is described, and what is our choice."""
    on_hit: str
    """What the authors did with the sequences found."""


PRESETS = {
    "proteinbert": Preset(
        options={
            "tool": "blastp",
            "min_identity": 0.4,
            "identity_of": "alignment",
            "min_coverage": 0.5,
            "max_evalue": 1e-3,
        },
        source=(
            "ProteinBERT (Brandes et al. 2022), section Pretraining: BLASTP with default settings, "
            "at least 40 % sequence similarity to any record of a test set. Ours, as the paper "
            "does not define similarity: identity of the alignment, which covers at least half of "
            "the shorter sequence, with an e-value of at most 0.001"
        ),
        on_hit="hide-annotations",
    ),
    "prottrans-new364": Preset(
        options={
            "tool": "mmseqs2",
            "identity_above": 0.2,
            "identity_of": "alignment",
            "max_evalue": 1e-3,
            "sensitivity": MAX_SENSITIVITY,
        },
        source=(
            "ProtTrans (Elnaggar et al. 2022), section Data for supervised training, set NEW364: "
            "MMseqs2 with highest sensitivity (about 7.5), more than 20 % PIDE to the training set "
            "or to itself. Ours: PIDE is the identity of the alignment; MMseqs2's default e-value, "
            "0.001; PISCES, which came after, is not run"
        ),
        on_hit="drop",
    ),
}


def resolve_options(preset: str | None, **typed: Any) -> FilterOptions:
    """Return options: what was typed, else what the preset says, else the default.

    Args:
        preset: a name in `PRESETS`, or None.
        typed: fields of `FilterOptions`; None is a field that was not typed.

    Raises:
        InputError: for an unknown preset, a missing tool, and what `FilterOptions` refuses.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    given = {name: value for name, value in typed.items() if value is not None}
    chosen = dict(PRESETS[preset].options) if preset else {}
    if given.get("tool", chosen.get("tool")) != chosen.get("tool"):
        chosen.pop("sensitivity", None)
    if "min_identity" in given or "identity_above" in given:
        chosen.pop("min_identity", None)
        chosen.pop("identity_above", None)
    chosen |= given
    if "tool" not in chosen:
        raise InputError("say what searches: give --tool blastp or mmseqs2, or a --preset")
    return FilterOptions(**chosen)


def describe_options(options: FilterOptions) -> dict[str, Any]:
    """Return the options as JSON, those that are not set left out."""
    return {name: value for name, value in asdict(options).items() if value is not None}

"""What the options of record generation say is what happens, and it is counted."""

from pathlib import Path
from typing import Any

import pytest
from record_sets import sequences

from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.verify import verify


class TestOptions:
    """What the options say is what happens, and it is counted."""

    def make(self, tmp_path: Path, text: str, **options: Any) -> tuple[dict[str, str], Any]:
        (tmp_path / "in.fasta").write_text(text)
        manifest = generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions(**options))
        return sequences(tmp_path / "set"), manifest["totals"]

    def test_length_limits(self, tmp_path: Path) -> None:
        text = ">a\nM\n>b\nMK*\n>c\nMKV\n>d\nMKVA\n>e\nMKVA\n"
        found, totals = self.make(tmp_path, text, min_length=2, max_length=3)
        assert found == {"MK": "b", "MKV": "c"}
        assert totals["read"] == {"records": 5, "residues": 14}
        assert totals["not_kept"]["too_short"] == {"records": 1, "residues": 1}
        assert totals["not_kept"]["too_long"] == {"records": 2, "residues": 8}
        assert totals["not_kept"]["duplicate"] == {"records": 0, "residues": 0}

    def test_long_records_are_kept_and_counted(self, tmp_path: Path) -> None:
        found, totals = self.make(tmp_path, ">a\nMK\n>b\nMKV\n", max_length=2, long="keep")
        assert found == {"MK": "a", "MKV": "b"}
        assert totals["longer_than_max_length"] == {"records": 1, "residues": 3}
        assert totals["not_kept"]["too_long"] == {"records": 0, "residues": 0}

    def test_drop(self, tmp_path: Path) -> None:
        found, totals = self.make(tmp_path, ">a\nM-K\n>b\nMKV\n>c\n", on_invalid="drop")
        assert found == {"MKV": "b"}
        assert totals["not_kept"]["invalid"] == {"records": 2, "residues": 3}

    def test_mask(self, tmp_path: Path) -> None:
        found, totals = self.make(tmp_path, ">a\nm-K**\n", on_invalid="mask")
        assert found == {"MXK": "a"}
        assert totals["changed"] == {
            "lowercase_residues": 1, "masked_residues": 1, "stops_stripped": 2,
        }  # fmt: skip

    def test_no_dedup(self, tmp_path: Path) -> None:
        _, totals = self.make(tmp_path, ">a\nMK\n>b\nMK\n>a\nMK\n", dedup=False)
        assert totals["kept"] == {"records": 3, "residues": 6}

    @pytest.mark.parametrize("compression", ["lz4", "zstd"])
    def test_compressed_shards_hold_the_same(
        self, tmp_path: Path, real_fasta: Path, compression: Any
    ) -> None:
        kinds = {"plain": PreprocessOptions(), "small": PreprocessOptions(compression=compression)}
        for name, options in kinds.items():
            generate([real_fasta], tmp_path / name, options)
        plain, small = (verify(tmp_path / name) for name in kinds)
        assert (small.records, small.residues) == (plain.records, plain.residues)
        assert small.bytes < plain.bytes
        assert sequences(tmp_path / "small") == sequences(tmp_path / "plain")
        if compression == "zstd":
            # The residues themselves take 4.2 bits, their entropy; keys and ids are in it, too.
            assert 8 * small.bytes / small.residues < 4.8

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shards": 0}, r"--shards 0: choose 1 to 65,536"),
            ({"shards": 65_537}, r"--shards 65537"),
            ({"holdout": 1.0}, r"--holdout 1.0: choose a fraction"),
            ({"holdout": -0.1}, r"--holdout -0.1"),
            ({"min_length": 0}, r"--min-length 0"),
            ({"min_length": 9, "max_length": 8}, r"--max-length 8 is below --min-length 9"),
            ({"long": "cut"}, r"--long cut: choose one of keep, drop, split"),
            ({"long": "split"}, r"--long split needs --max-length"),
            ({"long": "keep"}, r"--long keep needs --max-length"),
            ({"max_length": 9, "overlap": 2}, r"--overlap 2 needs --long split"),
            ({"max_length": 9, "long": "split", "overlap": 5}, r"--overlap 5: choose 0 to 4, half"),
            ({"max_length": 9, "long": "split", "overlap": -1}, r"--overlap -1"),
            ({"on_invalid": "skip"}, r"--on-invalid skip: choose one of error, mask, drop"),
            ({"compression": "gzip"}, r"--compression gzip: choose one of none, lz4, zstd"),
            ({"memory": 1000}, r"--memory 1000: choose"),
        ],
    )
    def test_nonsense_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            PreprocessOptions(**options)

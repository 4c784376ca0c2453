"""`prothpc synthesize`, `preprocess`, `verify` and `inspect`: from FASTA to records."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hpc.commands import example
from preprocessing.errors import InputError

app = typer.Typer()


@app.command(
    epilog=example(
        "prothpc synthesize corpus.fasta --size 100MB --seed 1",
        "prothpc synthesize corpus.fasta.gz --records 5000 --families 20 --truth families.tsv",
    )
)
def synthesize(
    output: Annotated[Path, typer.Argument(help="FASTA to write; .gz compresses it.")],
    size: Annotated[str | None, typer.Option(help="Bytes of FASTA, e.g. 100MB or 1GiB.")] = None,
    records: Annotated[int | None, typer.Option(help="Or: exact number of proteins.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed and options, same bytes.")] = 0,
    families: Annotated[int | None, typer.Option(help="Protein families.")] = None,
    median_length: Annotated[int, typer.Option(help="Median number of residues.")] = 250,
    min_identity: Annotated[float, typer.Option(help="Least identity to the ancestor.")] = 0.5,
    max_identity: Annotated[float, typer.Option(help="Greatest identity to the ancestor.")] = 0.95,
    hidden_families: Annotated[int, typer.Option(help="Families for the hidden set.")] = 0,
    hidden_output: Annotated[Path | None, typer.Option(help="FASTA of the hidden set.")] = None,
    truth: Annotated[Path | None, typer.Option(help="TSV of each protein's family.")] = None,
    go_terms: Annotated[Path | None, typer.Option(help="TSV of each protein's GO terms.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
) -> None:
    """Write a UniRef-like FASTA of protein families, to try things out or to measure them."""
    from preprocessing.sizes import parse_size
    from preprocessing.synthetic import SynthesisOptions
    from preprocessing.synthetic import synthesize as make

    if (size is None) == (records is None):
        raise InputError("say how much to make: give either --size or --records, not both")
    options = SynthesisOptions(
        size_bytes=None if size is None else parse_size(size),
        records=records,
        seed=seed,
        families=families,
        median_length=median_length,
        min_identity=min_identity,
        max_identity=max_identity,
        hidden_families=hidden_families,
    )
    made = make(
        output,
        options,
        hidden_output=hidden_output,
        truth=truth,
        go_terms=go_terms,
        overwrite=overwrite,
    )
    print(
        f"{output}: {made.records:,} proteins of {made.families:,} families, "
        f"{made.residues:,} residues, {made.bytes:,} bytes of FASTA"
    )


@app.command(
    epilog=example(
        "prothpc preprocess uniref50.fasta.gz --output records --holdout 0.005",
        "mpirun -n 8 prothpc preprocess bfd/ 'more/**/*.faa.zst' --output records --shards 6000",
    )
)
def preprocess(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="FASTA files, directories with some, or quoted patterns; plain, gzip or zstd."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the record set.")],
    shards: Annotated[
        int | None, typer.Option(help="Shards of the training split [default: by input size].")
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of sequences held out.")] = 0.0,
    holdout_by: Annotated[
        Path | None,
        typer.Option(
            help="Hold out whole clusters: table of representative, tab, member (mmseqs createtsv)."
        ),
    ] = None,
    min_length: Annotated[int, typer.Option(help="Drop shorter proteins.")] = 1,
    max_length: Annotated[
        int | None, typer.Option(help="Proteins longer than this are long: see --long.")
    ] = None,
    long: Annotated[
        str, typer.Option(help="What happens to long proteins: drop, split (windows) or keep.")
    ] = "drop",
    overlap: Annotated[
        int, typer.Option(help="Residues that windows of a split protein share.")
    ] = 0,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(
            help="Leave out what this file names: a table of 'prothpc filter', a FASTA, or one id "
            "a line. May be repeated."
        ),
    ] = None,
    on_invalid: Annotated[
        str, typer.Option(help="What a character that is no residue does: error, mask or drop.")
    ] = "error",
    dedup: Annotated[bool, typer.Option(help="Keep one of several equal sequences.")] = True,
    keep_metadata: Annotated[
        bool,
        typer.Option("--keep-metadata", help="Keep n, TaxID and RepID of UniRef headers."),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(help="Read only the first N records of each file, to try out.")
    ] = None,
    compression: Annotated[
        str, typer.Option(help="Of the shards: none (read in place), lz4 or zstd (smallest).")
    ] = "none",
    memory: Annotated[str, typer.Option(help="Memory per rank for collected records.")] = "1GiB",
    spill: Annotated[
        Path | None,
        typer.Option(help="Directory for spills, if all ranks are on one node [default: output]."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and whether it fits.")
    ] = False,
    gzip_index: Annotated[
        bool | None,
        typer.Option(
            help="Let ranks share a gzip file by a seek index; by default, if it is there or pays."
        ),
    ] = None,
) -> None:
    """Turn FASTA into sharded Arrow records: validated, de-duplicated, shuffled, checksummed.

    The result depends on inputs and options alone: any number of ranks, any order of the files and
    any crash and restart give the same bytes. A restart repeats only what is missing.
    """
    from hpc.launch import world_from_environment
    from preprocessing.generate import dry_run as describe
    from preprocessing.generate import generate
    from preprocessing.options import PreprocessOptions
    from preprocessing.parallel import connect, on_first_rank
    from preprocessing.sizes import parse_size
    from preprocessing.space import check_room

    options = PreprocessOptions(
        shards=shards,
        holdout=holdout,
        holdout_by=holdout_by,
        min_length=min_length,
        max_length=max_length,
        long=long,  # type: ignore[arg-type]  # it checks the choice
        overlap=overlap,
        exclude=tuple(exclude or ()),
        on_invalid=on_invalid,  # type: ignore[arg-type]  # it checks the choice
        dedup=dedup,
        keep_metadata=keep_metadata,
        limit=limit,
        compression=compression,  # type: ignore[arg-type]  # it checks the choice
        memory=parse_size(memory),
        spill=spill,
    )
    ranks = connect(world_from_environment().size)
    if dry_run:
        text, rooms = on_first_rank(ranks, lambda: describe(inputs, output, options))
        if ranks.rank == 0:
            print(text, flush=True)
        check_room(rooms)
        return
    manifest = generate(inputs, output, options, ranks, gzip_index=gzip_index)
    if ranks.rank == 0:
        print(_summary(output, manifest))


def _summary(output: Path, manifest: dict[str, Any]) -> str:
    totals = manifest["totals"]
    rejected = ", ".join(
        f"{count['records']:,} {reason.replace('_', ' ')}"
        for reason, count in totals["not_kept"].items()
        if count["records"]
    )
    splits = ", ".join(
        f"{totals['splits'][split]['records']:,} {split}"
        for split in ("train", "holdout")
        if split in totals["splits"]
    )
    return (
        f"{output}: {totals['kept']['records']:,} records ({splits}) with "
        f"{totals['kept']['residues']:,} residues of {totals['read']['records']:,} read; "
        f"not kept: {rejected or 'none'}"
    )


@app.command(epilog=example("prothpc verify records", "mpirun -n 8 prothpc verify records"))
def verify(
    directory: Annotated[Path, typer.Argument(help="Directory of a record set.")],
) -> None:
    """Recount and re-hash a record set; name every shard in which something is wrong."""
    from hpc.launch import world_from_environment
    from preprocessing.parallel import connect
    from preprocessing.verify import verify as check

    ranks = connect(world_from_environment().size)
    report = check(directory, ranks)
    if ranks.rank == 0:
        print(
            f"{directory}: in order: {report.shards:,} shards, {report.records:,} records, "
            f"{report.residues:,} residues, {report.bytes:,} bytes"
        )


@app.command(
    epilog=example(
        "prothpc inspect records --plot records.png",
        "prothpc inspect records --id UniRef50_P69905",
        "mpirun -n 8 prothpc inspect records --sample 0 --json",
    )
)
def inspect(
    directory: Annotated[Path, typer.Argument(help="Directory of a record set.")],
    id: Annotated[str | None, typer.Option(help="Show the records with this id.")] = None,
    key: Annotated[str | None, typer.Option(help="Show the record with this key (hex).")] = None,
    number: Annotated[int | None, typer.Option(help="Show a record by its place, from 0.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train or holdout [default: both; for --number train].")
    ] = None,
    sample: Annotated[
        int, typer.Option(help="Records that the histograms are made of; 0: all.")
    ] = 1_000_000,
    plot: Annotated[Path | None, typer.Option(help="Draw the histograms to this PNG.")] = None,
    json: Annotated[bool, typer.Option(help="Print everything as JSON.")] = False,
) -> None:
    """Show what a record set holds and how it was made, or single records of it.

    Totals come from the manifest. Lengths and amino acids are counted in a random sample, or in
    all records with --sample 0. A record is found by key or number at once; by id all ids are
    read. Several ranks share the reading.
    """
    from hpc.launch import world_from_environment
    from preprocessing.inspect_view import show, show_records
    from preprocessing.parallel import connect

    wanted = [value for value in (id, key, number) if value is not None]
    if len(wanted) > 1:
        raise InputError("give one of --id, --key and --number")
    if wanted and plot is not None:
        raise InputError("--plot draws the histograms: leave it out to see single records")
    if sample < 0:
        raise InputError(f"--sample {sample}: give a number of records, or 0 for all")
    ranks = connect(world_from_environment().size)
    if wanted:
        show_records(directory, ranks, split=split, id=id, key=key, number=number, as_json=json)
    else:
        show(directory, ranks, split=split, sample=sample, plot=plot, as_json=json)

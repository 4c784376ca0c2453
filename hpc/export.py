"""`prothpc export`: a checkpoint as a directory that other libraries read."""

from pathlib import Path

from hpc.checkpoint import find_checkpoint, read_checkpoint
from hpc.config import Recipe, build
from models.bert import BertConfig
from models.convert import to_hugging_face
from preprocessing.errors import InputError
from preprocessing.vocabulary import get_vocabulary


def export_checkpoint(source: Path, directory: Path) -> str:
    """Write the newest whole checkpoint of `source` in Hugging Face's layout.

    Args:
        source: a checkpoint, or a run directory.
        directory: made; must not exist, or be empty.

    Returns:
        A sentence that says what was written.

    Raises:
        InputError: no checkpoint there, a broken one, or a directory in use.
    """
    if not source.is_dir():
        raise InputError(f"{source} is no directory: name a checkpoint or a run directory")
    path = find_checkpoint(source, print)
    checkpoint = read_checkpoint(path)
    recipe = build(Recipe, checkpoint.recipe, where=str(path / "recipe.json"))
    vocabulary = get_vocabulary(recipe.data.vocabulary)
    try:
        to_hugging_face(
            checkpoint.weights,
            recipe.model,
            vocabulary.tokens,
            vocabulary.substitutes,
            directory,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    name = "BertForMaskedLM" if isinstance(recipe.model, BertConfig) else "TransfoXLLMHeadModel"
    return (
        f"{directory}: step {checkpoint.step} of {source}, for transformers.{name}.from_pretrained"
    )

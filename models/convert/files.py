"""Directories that Hugging Face libraries read: config.json, safetensors, tokenizer files."""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def check_new(directory: Path) -> Path:
    """Return the resolved path of a directory to be made.

    Raises:
        ValueError: if it holds something already.
    """
    directory = directory.resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists already: export to a new or an empty directory")
    return directory


def write_directory(
    directory: Path, contents: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write config, tokenizer and weights; `directory` appears when it is whole.

    Args:
        directory: checked by `check_new`.
        contents: file name → JSON value, or text.
        weights: Hugging Face's name → tensor of any device.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2)
            (unfinished / name).write_text(text + "\n", encoding="utf-8")
        on_host = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
        save_file(on_host, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors lets nobody but its owner read the file; a group shares its models.
        shutil.copymode(unfinished / CONFIG_FILE, unfinished / WEIGHTS_FILE)
        os.replace(unfinished, directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file of a checkpoint holds.

    Raises:
        ValueError: if it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: name the directory of a Hugging Face checkpoint"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: fetch the checkpoint again")
    return content


def load_weights(directory: Path, hugging_face_class: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint in safetensors, by name.

    Args:
        directory: holds model.safetensors, or its shards and their index.
        hugging_face_class: what reads a pickled checkpoint, for the advice.

    Raises:
        ValueError: if a file is missing or damaged, or the weights are only there pickled.
    """
    if (directory / WEIGHTS_FILE).exists():
        names = [WEIGHTS_FILE]
    elif (directory / INDEX_FILE).exists():
        index = read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{directory / INDEX_FILE} has no weight_map: fetch it again")
        names = sorted(set(index.values()))
    else:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{directory} has its weights only in {pickled[0]}, a pickle, which can run any "
                "code when it is read: convert it once where you trust it, with transformers' "
                f"{hugging_face_class}.from_pretrained(OLD).save_pretrained(NEW)"
            )
        raise ValueError(
            f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: fetch the checkpoint "
            "again with its weights"
        )
    weights: dict[str, Tensor] = {}
    for name in names:
        path = directory / Path(name).name  # an index names files beside it
        try:
            weights |= load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}): fetch it again") from None
    return weights


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], where: str, what: str
) -> None:
    """Refuse tensors other than those of a model.

    Args:
        found: the tensors by name.
        expected: their names and shapes.
        where: file or object that holds them, for the message.
        what: the model, for the message.

    Raises:
        ValueError: naming what is missing, unknown, or of another shape.
    """
    for problem, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("has the unknown", sorted(found.keys() - expected.keys())),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{where} {problem} {', '.join(names[:3])}{rest}: it is not a "
                f"{what} of the sizes in its configuration"
            )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{name} of {where} is of shape {tuple(found[name].shape)}, but the configuration "
                f"asks for {tuple(shape)}: they are not of one model"
            )

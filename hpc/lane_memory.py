"""What each lane remembers between segments, and how it outlasts the run.

Memory belongs to a stream, not to a rank: on another number of ranks it moves with its stream. In a
checkpoint each rank writes the memory of its own streams, `lanes-000004.safetensors` for those from
stream 4 on, since that of all lanes is too much for one: 44,928 lanes of ProtTXL-BFD are 1.55 TB.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hpc.checkpoint import CheckpointWriter, FileFacts, check_file, facts_of, lane_files
from hpc.engines import Engine
from hpc.resume import on_rank_0
from hpc.streams import streams_of_rank
from models.transformer_xl import Memory, TransformerXL
from preprocessing.errors import InputError
from preprocessing.files import sync

Mode = Literal["save", "recompute", "reset"]

_TOKENS = "tokens"
_WORDS = 4  # 32 bits each of a 128-bit hash: float64 holds them exactly


class LaneMemory:
    """The memory of this rank's streams.

    Args:
        mode: `checkpoint.memory`.
        length: positions that the model remembers.
        segment_length: tokens that it computes at a time.
    """

    def __init__(self, mode: Mode, length: int, segment_length: int) -> None:
        self.mode = mode if length else "reset"
        self._length = length
        self._segment_length = segment_length
        self._memories: dict[int, Memory] = {}
        self._pending: dict[int, tuple[Memory, torch.Tensor]] = {}
        self._tokens: dict[int, torch.Tensor] = {}

    def of(self, stream: int) -> Memory | None:
        """Return what a stream's lanes remember, each layer [B, M, D]; None at their start."""
        return self._memories.get(stream)

    def put(self, stream: int, memory: Memory, inputs_BL: torch.Tensor) -> None:
        """Note the memory after a segment; it counts from `advance` on."""
        self._pending[stream] = (memory, inputs_BL)

    def advance(self) -> None:
        """Go over to the memory after the step; a step may be computed twice before."""
        for stream, (memory, inputs_BL) in self._pending.items():
            self._memories[stream] = memory
            if self.mode == "recompute":
                # As many again before those remembered, so that each is computed in its context.
                known = [self._tokens[stream]] if stream in self._tokens else []
                tokens_BT = torch.cat([*known, inputs_BL.to(torch.uint8)], dim=1)
                self._tokens[stream] = tokens_BT[:, -2 * self._length :]
        self._pending.clear()

    def clear(self) -> None:
        """Forget everything, as other streams begin."""
        self._memories.clear()
        self._tokens.clear()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds of this rank's lanes, on the host."""
        if self.mode == "save":
            return {
                f"{stream}.{layer}": tensor.cpu().contiguous()
                for stream, memory in self._memories.items()
                for layer, tensor in enumerate(memory)
            }
        return {
            f"{stream}.{_TOKENS}": tensor.cpu().contiguous()
            for stream, tensor in self._tokens.items()
        }

    def load(self, stream: int, tensors: dict[str, torch.Tensor], engine: Engine) -> None:
        """Take over a stream's part of a checkpoint, whichever of the modes wrote it.

        Args:
            stream: one of this rank's.
            tensors: its tensors: `tokens`, or each layer's memory under the layer's number.
            engine: computes the memory of tokens.
        """
        tensors = {name: tensor.to(engine.device) for name, tensor in tensors.items()}
        if _TOKENS in tensors:
            self._memories[stream] = engine.compute(self._recall, tensors[_TOKENS])
            self._tokens[stream] = tensors[_TOKENS]
        else:
            self._memories[stream] = tuple(tensors[str(n)] for n in range(len(tensors)))

    def _recall(self, model: TransformerXL, tokens_BT: torch.Tensor) -> Memory:
        memory: Memory | None = None
        for segment_BL in tokens_BT.split(self._segment_length, dim=1):
            _, memory = model(segment_BL, memory)
        assert memory is not None
        return memory


def save_lanes(
    memory: LaneMemory, engine: Engine, streams: int, writer: CheckpointWriter, step: int
) -> dict[str, FileFacts]:
    """Write the lanes of all ranks into the checkpoint of a step that is to come.

    All ranks call it together, and it returns when the files of all are on disk.

    Args:
        memory: of this rank.
        engine: knows the other ranks.
        streams: of all ranks together.
        writer: rank 0's; its earlier saves are waited for.
        step: of the checkpoint.

    Returns:
        The files of all ranks, for the checkpoint's index.

    Raises:
        InputError: on all ranks, if one of them cannot write.
    """
    if memory.mode == "reset":
        return {}
    world = engine.world
    # The directory is made anew before any rank writes into it.
    folder = Path(on_rank_0(engine, lambda: str(writer.begin(step))))
    own, problem = FileFacts(0, 0), ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name(streams, world.rank, world.size)
        save_file(memory.tensors(), path)
        sync(path)
        own = facts_of(path)
    except Exception as error:  # safetensors has its own error for a full disk
        problem = str(error)
    words = [float(own.xxh3_128 >> 32 * word & 0xFFFF_FFFF) for word in range(_WORDS)]
    row = [float(bool(problem)), float(own.bytes), *words]
    flat = [0.0] * len(row) * world.size
    flat[world.rank * len(row) : (world.rank + 1) * len(row)] = row
    flat = engine.sum_over_ranks(flat)
    rows = [flat[start : start + len(row)] for start in range(0, len(flat), len(row))]
    failed = [rank for rank, (failure, *_) in enumerate(rows) if failure]
    if failed:
        why = problem or f"rank {failed[0]} could not write"
        raise InputError(
            f"the memory of the lanes could not be written to {folder}: {why}; free some space, or "
            "set checkpoint.memory=recompute, and run the same command again"
        )
    return {
        file_name(streams, rank, world.size): FileFacts(
            int(size), sum(int(word) << 32 * place for place, word in enumerate(words))
        )
        for rank, (_, size, *words) in enumerate(rows)
    }


def load_lanes(memory: LaneMemory, engine: Engine, path: Path, owned: range) -> bool:
    """Read the lanes of this rank's streams from a checkpoint of any number of ranks.

    Args:
        memory: filled.
        engine: knows this rank.
        path: of the checkpoint.
        owned: this rank's streams.

    Returns:
        Whether the checkpoint holds them.

    Raises:
        InputError: if a file that is needed is missing or damaged.
    """
    files = lane_files(path)
    starts = sorted((int(name[len("lanes-") : -len(".safetensors")]), name) for name in files)
    for number, (start, name) in enumerate(starts):
        end = starts[number + 1][0] if number + 1 < len(starts) else math.inf
        if start >= owned.stop or end <= owned.start:
            continue
        check_file(path, name)
        with safe_open(path / name, framework="pt") as file:
            found: dict[int, dict[str, Any]] = {}
            for key in file.keys():  # noqa: SIM118  # it cannot be iterated over
                stream, _, part = key.partition(".")
                if int(stream) in owned:
                    found.setdefault(int(stream), {})[part] = file.get_tensor(key)
        for stream, tensors in sorted(found.items()):
            memory.load(stream, tensors, engine)
    return bool(files)


def file_name(streams: int, rank: int, size: int) -> str:
    """Return the name of the file with a rank's streams."""
    return f"lanes-{streams_of_rank(streams, rank, size).start:06d}.safetensors"

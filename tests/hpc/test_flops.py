"""FLOPs are those that torch counts, and MFU sets them beside the right peak."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpc.config import Recipe
from hpc.data import Batcher, open_streams
from hpc.flops import batch_flops, peak_flops
from hpc.tasks import MaskedLanguageModel
from models.bert import Bert, BertConfig
from models.transformer_xl import TransformerXL, TransformerXLConfig
from preprocessing.records import RecordSet
from preprocessing.vocabulary import PROTTRANS_BERT

BERT = BertConfig(hidden_size=32, layers=3, heads=4, intermediate_size=56, max_positions=40)
TXL = TransformerXLConfig(
    hidden_size=32, layers=3, heads=3, head_size=6, intermediate_size=56, memory_length=11
)


def counted(compute) -> tuple[int, int]:
    """Operations of forward and of forward and backward, as torch counts them."""
    # Fused attention is one operation that the counter does not know on CPUs.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = compute()
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("length", [1, 17, 40])
def test_the_formula_of_bert_counts_what_torch_counts(length: int) -> None:
    model = Bert(BERT)
    forward, training = counted(lambda: model(torch.full((2, length), 7)))
    assert 2 * BERT.forward_flops(length) == forward
    assert 2 * BERT.training_flops(length) == training


@pytest.mark.parametrize("length", [1, 9, 17])
@pytest.mark.parametrize("memory_length", [0, 5, 11])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_formula_of_transformer_xl_counts_what_torch_counts(
    length: int, memory_length: int, norm: str
) -> None:
    model = TransformerXL(replace(TXL, norm=norm))
    memory = (torch.zeros(2, memory_length, 32),) * 3
    forward, training = counted(lambda: model(torch.full((2, length), 7), memory)[0])
    assert TXL.forward_flops(length, 2, memory_length) == forward
    assert TXL.training_flops(length, 2, memory_length) == training
    if memory_length == TXL.memory_length:
        assert TXL.training_flops(length, 2) == training


def test_only_real_tokens_count(recipe: Recipe) -> None:
    records = RecordSet(Path(recipe.data.records))
    batcher = Batcher(records, PROTTRANS_BERT, recipe.data, 0)
    stream = open_streams(batcher, recipe.data, recipe.train, len(records), 0, 1)[0]
    batch = MaskedLanguageModel(recipe.objective, PROTTRANS_BERT).prepare(stream.next())
    assert batch.lengths is not None
    expected = sum(BERT.training_flops(length) for length in batch.lengths.tolist())
    assert batch_flops(BERT, batch) == expected
    assert expected < batch.inputs.shape[0] * BERT.training_flops(batch.inputs.shape[1])
    full = replace(batch, lengths=None)
    assert batch_flops(BERT, full) > expected
    samples, length = batch.inputs.shape
    assert batch_flops(TXL, full) == TXL.training_flops(length, samples)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("Tesla V100-SXM2-16GB", "fp16-master", 125.0),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # has no bfloat16 units
        ("NVIDIA A100-SXM4-80GB", "amp-bf16", 312.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA GH200 480GB", "bf16", 990.0),
        ("NVIDIA H200", "amp-fp16", 989.0),
        ("AMD Instinct MI250X", "bf16", 191.5),
        ("NVIDIA GeForce 256", "fp32", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    found = peak_flops(torch.device("cuda"), precision, None)
    assert found == (None if tflops is None else tflops * 1e12)


def test_the_peak_of_a_cpu_is_what_the_recipe_says() -> None:
    assert peak_flops(torch.device("cpu"), "fp32", None) is None
    assert peak_flops(torch.device("cpu"), "fp32", 1.5) == 1.5e12

"""How much a step computes, and how much its devices could: MFU, model FLOP/s over peak FLOP/s.

Counted is what the model asks for on real tokens (`forward_flops` beside each model): neither
padding nor what activation checkpointing computes again.
"""

import torch

from hpc.tasks import PreparedBatch
from models.architectures import ModelConfig
from models.transformer_xl import TransformerXLConfig

_KIND = {
    "fp32": "fp32",
    "bf16": "bf16",
    "amp-bf16": "bf16",
    "fp16": "fp16",
    "amp-fp16": "fp16",
    "fp16-master": "fp16",
}

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # Part of torch's device name → dense peaks as the vendors' data sheets give them, without
    # sparsity; fp32 without TF32, which torch leaves off. The first that fits counts.
    "V100-SXM": {"fp16": 125.0, "fp32": 15.7},  # NVIDIA V100 data sheet
    "V100-PCIE": {"fp16": 112.0, "fp32": 14.0},
    "A100": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5},  # NVIDIA A100 data sheet
    "H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "fp32": 51.0},  # NVIDIA H100 data sheet
    "H100 NVL": {"bf16": 835.0, "fp16": 835.0, "fp32": 60.0},
    "H100": {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0},  # SXM
    "GH200": {"bf16": 990.0, "fp16": 990.0, "fp32": 67.0},  # NVIDIA GH200 data sheet
    "H200": {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0},  # NVIDIA H200 data sheet, SXM
    "B200": {"bf16": 2250.0, "fp16": 2250.0, "fp32": 75.0},  # NVIDIA HGX B200 data sheet
    # AMD's data sheets give matrix-core peaks; torch sees each of an MI250X's two dies as a device.
    "MI250X": {"bf16": 191.5, "fp16": 191.5, "fp32": 47.9},
    "MI300X": {"bf16": 1307.4, "fp16": 1307.4, "fp32": 163.4},
}


def peak_flops(device: torch.device, precision: str, override_tflops: float | None) -> float | None:
    """Return the most that a device can compute, in FLOP/s, or None where that is not known.

    Args:
        device: of this rank.
        precision: `train.precision`.
        override_tflops: `log.peak_tflops`, which wins.
    """
    if override_tflops is not None:
        return override_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), {})
    tflops = peaks.get(_KIND[precision])
    return None if tflops is None else tflops * 1e12


def batch_flops(model: ModelConfig, batch: PreparedBatch) -> float:
    """Return the operations of forward and backward of a micro-batch's real tokens.

    A Transformer-XL's memory is taken as full, which it is after the first segments.

    Args:
        model: its sizes.
        batch: on the host.
    """
    samples, length = batch.inputs.shape
    if isinstance(model, TransformerXLConfig):
        return float(model.training_flops(length, lanes=samples))
    lengths = [length] * samples if batch.lengths is None else batch.lengths.tolist()
    return float(sum(map(model.training_flops, lengths)))

"""The architectures that there are, by their configurations."""

from torch import nn

from models.bert import Bert, BertConfig
from models.transformer_xl import TransformerXL, TransformerXLConfig

ModelConfig = BertConfig | TransformerXLConfig


def build_model(config: ModelConfig) -> nn.Module:
    """Return the model of a configuration, with initial weights."""
    return Bert(config) if isinstance(config, BertConfig) else TransformerXL(config)


def num_parameters(model: nn.Module) -> int:
    """Return the number of weights; a tensor that two parts share is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())

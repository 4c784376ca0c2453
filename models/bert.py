"""BERT with a masked-language-model head (Devlin et al. 2018), as ProtBert uses it.

Layer normalisation follows each residual sum ("post-LN"), GELU is the exact (erf) form and the
output matrix is the token embedding. With equal weights the outputs equal those of Hugging Face's
`BertForMaskedLM`; `models.convert` maps the parameter names.

Shape suffixes: B batch, L length, D hidden size, H heads, K head width, V vocabulary;
1 an axis that is broadcast.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT; the defaults are ProtBert's (ProtTrans, table 2, and its config.json).

    Raises:
        ValueError: if a value is out of range or two of them do not fit each other.
    """

    name: Literal["bert"] = "bert"
    """Architecture."""
    vocab_size: int = 30
    """Number of token ids."""
    hidden_size: int = 1024
    """Width of the residual stream."""
    layers: int = 30
    """Number of Transformer layers."""
    heads: int = 16
    """Attention heads per layer; each is hidden_size / heads wide."""
    intermediate_size: int = 4096
    """Width of the feed-forward layers."""
    max_positions: int = 40_000
    """Longest input in tokens; position rows beyond the trained length stay untrained."""
    token_types: int = 2
    """Rows of the token type table. Proteins are single segments, which use row 0 only."""
    pad_id: int = 0
    """Token id of padding; its embedding starts at zero and gets no gradient as an input."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in every layer normalisation."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings and of each sub-layer's output."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    initializer_std: float = 0.02
    """Standard deviation of the initial embeddings and matrices."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "layers", "heads", "intermediate_size")
        for name in (*sizes, "max_positions", "token_types"):
            self._require(name, "at least 1", getattr(self, name) >= 1)
        for name in ("layer_norm_eps", "initializer_std"):
            self._require(name, "above 0", getattr(self, name) > 0)
        for name in ("dropout", "attention_dropout"):
            self._require(name, "in [0, 1)", 0 <= getattr(self, name) < 1)
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by heads {self.heads}: "
                f"take a hidden_size that is a multiple of {self.heads}, or other heads"
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(
                f"pad_id {self.pad_id} is not among the {self.vocab_size} ids of vocab_size: "
                f"take a pad_id from 0 to {self.vocab_size - 1}, or a larger vocab_size"
            )

    def forward_flops(self, length: int) -> int:
        """Return the operations in the matrix products of one sequence, head included.

        A multiplication and its addition count as two, as in torch's FlopCounterMode; what is no
        matrix product (norms, softmax, activations) does not count.

        Args:
            length: tokens, without padding.
        """
        size = self.hidden_size
        layer = 2 * size * (4 * size + 2 * self.intermediate_size) + 4 * length * size
        head = 2 * size * (size + self.vocab_size)
        return length * (self.layers * layer + head)

    def training_flops(self, length: int) -> int:
        """Return the operations of forward and backward: each product has two in its backward."""
        return 3 * self.forward_flops(length)

    def _require(self, name: str, bound: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)}: it must be {bound}")


class Bert(nn.Module):
    """BERT encoder and masked-language-model head.

    Weights start as in the reference: matrices and embeddings from N(0, initializer_std), biases
    and the padding embedding 0, layer normalisation 1 and 0. They come from torch's global
    generator: call `torch.manual_seed` first for equal weights.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_id)
        self.position_embedding = nn.Embedding(config.max_positions, size)
        self.token_type_embedding = nn.Embedding(config.token_types, size)
        self.embedding_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))
        self.head_dense = nn.Linear(size, size)
        self.head_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._initialize()

    def forward(self, tokens_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return the logits of every position: `predict(encode(tokens_BL, lengths_B))`.

        Args:
            tokens_BL: integers, token ids.
            lengths_B: integers, tokens of each sample without padding; None if nothing is padded.

        Returns:
            Floats [B, L, V]. What stands at padded positions has no meaning.
        """
        return self.predict(self.encode(tokens_BL, lengths_B))

    def encode(self, tokens_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return the hidden states of the last layer.

        Args:
            tokens_BL: integers, token ids, padded at the end.
            lengths_B: integers, tokens of each sample without padding. None says that no sample is
                padded: attention then needs no mask and takes its fastest kernel. Whether that is
                so is the caller's to know; looking here would make the host wait for the device.

        Returns:
            Floats [B, L, D]. They do not depend on padding or on the other samples of the batch;
            what stands at padded positions has no meaning.

        Raises:
            ValueError: if L exceeds the configuration's max_positions.
        """
        length = tokens_BL.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"an input of {length} tokens exceeds max_positions {self.config.max_positions}: "
                "crop it, or raise max_positions"
            )
        mask_B11L = None
        if lengths_B is not None:
            positions_L = torch.arange(length, device=tokens_BL.device)
            mask_B11L = (positions_L < lengths_B[:, None])[:, None, None, :]
        hidden_BLD = (
            self.token_embedding(tokens_BL.long())
            + self.token_type_embedding.weight[0]
            + self.position_embedding.weight[:length]
        )
        hidden_BLD = self.dropout(self.embedding_norm(hidden_BLD))
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD, mask_B11L)
        return hidden_BLD

    def predict(self, hidden_D: Tensor) -> Tensor:
        """Return the logits [..., V] of the tokens behind hidden states [..., D]."""
        transformed_D = self.head_norm(F.gelu(self.head_dense(hidden_D)))
        return F.linear(transformed_D, self.token_embedding.weight, self.head_bias)

    def num_parameters(self) -> int:
        """Return the number of weights; the output matrix is the token embedding, counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.token_embedding.weight[self.config.pad_id].zero_()


class BertLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual sum and normalisation."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        # Three tensors, as published: LAMB scales its step tensor by tensor.
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.attention_output = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.feed_forward_in = nn.Linear(size, config.intermediate_size)
        self.feed_forward_out = nn.Linear(config.intermediate_size, size)
        self.feed_forward_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_BLD: Tensor, mask_B11L: Tensor | None) -> Tensor:
        """Return the layer's output [B, L, D].

        Args:
            hidden_BLD: floats, the output of the layer before.
            mask_B11L: bool, True where a key may be attended to; None if all may.
        """
        attended_BLD = self.dropout(self._attend(hidden_BLD, mask_B11L))
        hidden_BLD = self.attention_norm(hidden_BLD + attended_BLD)
        expanded_BLF = F.gelu(self.feed_forward_in(hidden_BLD))  # F: intermediate_size
        fed_BLD = self.dropout(self.feed_forward_out(expanded_BLF))
        return self.feed_forward_norm(hidden_BLD + fed_BLD)

    def _attend(self, hidden_BLD: Tensor, mask_B11L: Tensor | None) -> Tensor:
        query_BHLK, key_BHLK, value_BHLK = (
            project(hidden_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended_BHLK = F.scaled_dot_product_attention(
            query_BHLK,
            key_BHLK,
            value_BHLK,
            attn_mask=mask_B11L,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.attention_output(attended_BHLK.transpose(1, 2).flatten(2))

"""Transformer-XL (Dai et al. 2019), as ProtTXL uses it: next tokens from a segment and a memory.

A segment attends to itself, causally, and to a memory of what came before it: each layer's own
inputs at earlier positions, without gradients. The caller holds the memory: it goes into `forward`
and the next one comes out. Keys are told apart by content and by distance; distances are
sinusoidal. With equal weights the outputs equal those of transformers' `TransfoXLLMHeadModel` with
a plain softmax; `models.convert` maps the parameter names.

Shape suffixes: B lanes, L segment length, M memory length, C = M + L keys, D hidden size, H heads,
K head width, V vocabulary, P = C + 1 distances.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Memory = tuple[Tensor, ...]
"""Floats [B, M, D] for each layer: its inputs at the M positions before the segment."""

_LONGEST_WAVE = 10_000.0  # of the sinusoids, in units of 2π (Vaswani et al. 2017, section 3.5)


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """Sizes of a Transformer-XL; the defaults are ProtTXL's on UniRef100 (ProtTrans, table 2).

    Raises:
        ValueError: if a value is out of range.
    """

    name: Literal["transformer-xl"] = "transformer-xl"
    """Architecture."""
    vocab_size: int = 30
    """Number of token ids."""
    hidden_size: int = 1024
    """Width of the residual stream."""
    layers: int = 30
    """Number of Transformer layers."""
    heads: int = 16
    """Attention heads per layer."""
    head_size: int = 64
    """Width of a head; heads · head_size need not be hidden_size."""
    intermediate_size: int = 4096
    """Width of the feed-forward layers."""
    memory_length: int = 512
    """Positions before a segment that stay visible."""
    clamp_length: int | None = None
    """Distances beyond this count as this; None: they are told apart however far."""
    same_length: bool = False
    """Every position sees the memory_length nearest positions, itself included; otherwise the whole
    memory and what precedes it in the segment."""
    initial_memory: Literal["empty", "zeros"] = "empty"
    """Before the first segment: nothing, or memory_length zero vectors that take part in attention,
    as in transformers' implementation."""
    shared_biases: bool = False
    """One pair of content and position bias for all layers (NVIDIA's code), not one for each."""
    tied_output: bool = True
    """The output matrix is the token embedding."""
    norm: Literal["post", "pre"] = "post"
    """Normalise after each residual sum, or the input of each sub-layer."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every layer normalisation."""
    dropout: float = 0.15
    """Probability of dropping an element of embeddings, sub-layers' outputs and the last layer."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    initializer_std: float = 0.02
    """Standard deviation of the initial matrices and embeddings, and of the norms' scales."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "layers", "heads", "head_size", "intermediate_size")
        for name in sizes:
            self._require(name, "at least 1", getattr(self, name) >= 1)
        for name in ("layer_norm_eps", "initializer_std"):
            self._require(name, "above 0", getattr(self, name) > 0)
        for name in ("dropout", "attention_dropout"):
            self._require(name, "in [0, 1)", 0 <= getattr(self, name) < 1)
        self._require("hidden_size", "even: sines and cosines", self.hidden_size % 2 == 0)
        self._require("memory_length", "at least 0", self.memory_length >= 0)
        if self.clamp_length is not None:
            self._require("clamp_length", "at least 1", self.clamp_length >= 1)
        if self.same_length and not self.memory_length:
            raise ValueError(
                "same_length = true with memory_length = 0 leaves nothing to see: "
                "raise memory_length or set same_length = false"
            )

    def forward_flops(self, length: int, lanes: int = 1, memory_length: int | None = None) -> int:
        """Return the operations in the matrix products of a segment, head included.

        A multiplication and its addition count as two, as in torch's FlopCounterMode; what is no
        matrix product does not count. Keys that a query may not see count: products are made with
        all of them.

        Args:
            length: of the segment.
            lanes: segments computed together, which share the products of distances.
            memory_length: positions remembered; None: the configuration's.
        """
        size, width = self.hidden_size, self.heads * self.head_size
        keys = length + (self.memory_length if memory_length is None else memory_length)
        attention = 2 * width * (2 * length * size + 2 * keys * size + length * (3 * keys + 1))
        feed_forward = 4 * length * size * self.intermediate_size
        head = 2 * length * size * self.vocab_size
        return lanes * (self.layers * (attention + feed_forward) + head) + self._distance_flops(
            keys
        )

    def training_flops(self, length: int, lanes: int = 1, memory_length: int | None = None) -> int:
        """Return the operations of forward and backward: each product has two in its backward.

        Those of distances have one, since sinusoids do not learn.
        """
        keys = length + (self.memory_length if memory_length is None else memory_length)
        return 3 * self.forward_flops(length, lanes, memory_length) - self._distance_flops(keys)

    def _distance_flops(self, keys: int) -> int:
        return self.layers * 2 * (keys + 1) * self.hidden_size * self.heads * self.head_size

    def _require(self, name: str, bound: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)}: it must be {bound}")


class TransformerXL(nn.Module):
    """Transformer-XL with a next-token head.

    Weights start as in the reference: matrices, embeddings and attention biases from
    N(0, initializer_std), the norms' scales from N(1, initializer_std), all other biases 0. They
    come from torch's global generator: call `torch.manual_seed` first for equal weights.
    """

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerXLLayer(config) for _ in range(config.layers))
        if config.shared_biases:
            self.content_bias, self.position_bias = _attention_biases(config)
        if not config.tied_output:
            self.output_weight = nn.Parameter(torch.empty(config.vocab_size, size))
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._initialize()

    def forward(
        self, tokens_BL: Tensor, memory: Memory | None = None, memory_length: int | None = None
    ) -> tuple[Tensor, Memory]:
        """Return the logits of each next token, and the memory for the segment that follows.

        Args:
            tokens_BL: integers, token ids: the next segment of each lane.
            memory: what the segment before this one returned; None at the start of the lanes.
            memory_length: longest memory to return, and what `same_length` means; None: that of the
                configuration. It may differ from training's.

        Returns:
            Floats [B, L, V], and the memory, detached; it holds at most `memory_length` positions.
        """
        if memory_length is None:
            memory_length = self.config.memory_length
        hidden_BLD = self.token_embedding(tokens_BL.long()) * math.sqrt(self.config.hidden_size)
        if memory is None:
            memory = self._first_memory(hidden_BLD, memory_length)
        length = hidden_BLD.shape[1]
        distances_P = torch.arange(memory[0].shape[1] + length - 1, -2, -1, device=tokens_BL.device)
        unseen_LC = self._unseen(distances_P, length, memory_length)
        positions_PD = self.dropout(self._sinusoids(distances_P).to(hidden_BLD))
        hidden_BLD = self.dropout(hidden_BLD)
        next_memory = []
        for layer, remembered_BMD in zip(self.layers, memory, strict=True):
            memory_BMD = remembered_BMD.to(hidden_BLD.dtype)  # of a run in another precision
            next_memory.append(_last(memory_BMD, hidden_BLD.detach(), memory_length))
            own = layer if not self.config.shared_biases else self
            hidden_BLD = layer(
                hidden_BLD, memory_BMD, positions_PD, unseen_LC, own.content_bias, own.position_bias
            )
        weight = self.token_embedding.weight if self.config.tied_output else self.output_weight
        return F.linear(self.dropout(hidden_BLD), weight, self.output_bias), tuple(next_memory)

    def num_parameters(self) -> int:
        """Return the number of weights; a tied output matrix is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _first_memory(self, hidden_BLD: Tensor, memory_length: int) -> Memory:
        length = memory_length if self.config.initial_memory == "zeros" else 0
        zeros_BMD = hidden_BLD.new_zeros(hidden_BLD.shape[0], length, hidden_BLD.shape[2])
        return (zeros_BMD,) * self.config.layers

    def _unseen(self, distances_P: Tensor, length: int, memory_length: int) -> Tensor:
        """Return bool [L, C]: True where a key must not be attended to."""
        query_distances_L1 = torch.arange(length - 1, -1, -1, device=distances_P.device)[:, None]
        distances_LC = distances_P[:-1] - query_distances_L1
        unseen_LC = distances_LC < 0
        if self.config.same_length:
            unseen_LC |= distances_LC >= memory_length
        return unseen_LC

    def _sinusoids(self, distances_P: Tensor) -> Tensor:
        """Return float32 [P, D]: sines and cosines (Vaswani et al. 2017, section 3.5)."""
        if self.config.clamp_length is not None:
            distances_P = distances_P.clamp(max=self.config.clamp_length)
        size = self.config.hidden_size
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=distances_P.device) / size
        angles = distances_P.float()[:, None] * (1 / _LONGEST_WAVE**exponents)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def _initialize(self) -> None:
        std = self.config.initializer_std
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, mean=1.0, std=std)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("content_bias", "position_bias", "output_weight")):
                nn.init.normal_(parameter, std=std)


class TransformerXLLayer(nn.Module):
    """Relative self-attention and a feed-forward network, each with a residual sum and a norm."""

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        size, width = config.hidden_size, config.heads * config.head_size
        self.heads = config.heads
        self.head_size = config.head_size
        self.pre_norm = config.norm == "pre"
        # One tensor, as published: LAMB scales its step tensor by tensor.
        self.query_key_value = nn.Linear(size, 3 * width, bias=False)
        self.position = nn.Linear(size, width, bias=False)
        if not config.shared_biases:
            self.content_bias, self.position_bias = _attention_biases(config)
        self.attention_output = nn.Linear(width, size, bias=False)
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.feed_forward_in = nn.Linear(size, config.intermediate_size)
        self.feed_forward_out = nn.Linear(config.intermediate_size, size)
        self.feed_forward_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.attention_dropout = config.attention_dropout

    def forward(
        self,
        hidden_BLD: Tensor,
        memory_BMD: Tensor,
        positions_PD: Tensor,
        unseen_LC: Tensor,
        content_bias_E: Tensor,
        position_bias_E: Tensor,
    ) -> Tensor:
        """Return the layer's output [B, L, D].

        Args:
            hidden_BLD: floats, the output of the layer before.
            memory_BMD: floats, that output at earlier positions.
            positions_PD: floats, sinusoids of the distances C - 1 … -1.
            unseen_LC: bool, True where a key must not be attended to.
            content_bias_E: floats [H · K], added to queries that meet keys.
            position_bias_E: floats [H · K], added to queries that meet distances.
        """
        context_BCD = (
            torch.cat([memory_BMD, hidden_BLD], dim=1) if memory_BMD.shape[1] else hidden_BLD
        )
        if self.pre_norm:
            context_BCD = self.attention_norm(context_BCD)
        attended_BLD = self._attend(
            context_BCD, positions_PD, unseen_LC, content_bias_E, position_bias_E
        )
        hidden_BLD = hidden_BLD + self.dropout(attended_BLD)
        if self.pre_norm:
            return hidden_BLD + self._feed_forward(self.feed_forward_norm(hidden_BLD))
        hidden_BLD = self.attention_norm(hidden_BLD)
        return self.feed_forward_norm(hidden_BLD + self._feed_forward(hidden_BLD))

    def _feed_forward(self, hidden_BLD: Tensor) -> Tensor:
        expanded_BLF = self.dropout(
            F.relu(self.feed_forward_in(hidden_BLD))
        )  # F: intermediate_size
        return self.dropout(self.feed_forward_out(expanded_BLF))

    def _attend(
        self,
        context_BCD: Tensor,
        positions_PD: Tensor,
        unseen_LC: Tensor,
        content_bias_E: Tensor,
        position_bias_E: Tensor,
    ) -> Tensor:
        length, width = unseen_LC.shape[0], self.heads * self.head_size
        # The memory needs keys and values, but no queries.
        of_query, of_key_value = self.query_key_value.weight.split((width, 2 * width))
        query_BLE = F.linear(context_BCD[:, -length:], of_query)
        key_BCE, value_BCE = F.linear(context_BCD, of_key_value).chunk(2, dim=-1)
        scale = self.head_size**-0.5
        scores_BHLC = self._distance_scores(
            (query_BLE + position_bias_E) * scale, self.position(positions_PD)
        ).masked_fill(unseen_LC, -math.inf)
        attended_BHLK = F.scaled_dot_product_attention(
            self._by_head(query_BLE + content_bias_E),
            self._by_head(key_BCE),
            self._by_head(value_BCE),
            attn_mask=scores_BHLC,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.attention_output(attended_BHLK.transpose(1, 2).flatten(2))

    def _distance_scores(self, query_BLE: Tensor, position_PE: Tensor) -> Tensor:
        """Return floats [B, H, L, C]: each query's product with its distance to each key.

        Products are made with all distances. The row of the query that has d positions after it in
        the segment starts d columns too early; as there is one column more than there are keys,
        reading the rows end to end, C at a time, from column L - 1 on shifts each by just that
        (Dai et al. 2019, appendix B). What wraps around lies behind the query, where it is masked.
        """
        batch, length, _ = query_BLE.shape
        query_HNK = query_BLE.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        position_HKP = position_PE.unflatten(-1, (self.heads, -1)).permute(1, 2, 0)
        products_HBX = torch.bmm(query_HNK, position_HKP).unflatten(1, (batch, length)).flatten(2)
        keys = position_PE.shape[0] - 1
        shifted_HBX = products_HBX[..., length - 1 : length - 1 + length * keys]
        return shifted_HBX.unflatten(-1, (length, keys)).transpose(0, 1)

    def _by_head(self, vectors_BXE: Tensor) -> Tensor:
        return vectors_BXE.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _attention_biases(config: TransformerXLConfig) -> tuple[nn.Parameter, nn.Parameter]:
    # One-dimensional, as all parameters that do not decay.
    width = config.heads * config.head_size
    return nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))


def _last(memory_BMD: Tensor, hidden_BLD: Tensor, length: int) -> Tensor:
    """Return the last `length` positions of memory and segment, or all if they are fewer."""
    have = hidden_BLD.shape[1]
    if have < length:
        hidden_BLD = torch.cat(
            [memory_BMD[:, max(0, memory_BMD.shape[1] + have - length) :], hidden_BLD], dim=1
        )
        return hidden_BLD
    return hidden_BLD if have == length else hidden_BLD[:, have - length :].contiguous()

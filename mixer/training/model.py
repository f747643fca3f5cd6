"""The decoder that is trained: Llama's shape, from half a million parameters to billions.

RMSNorm before attention and SwiGLU, rotary positions, grouped queries, tied or untied embeddings. Rows hold
several documents, and attention stays inside them: `find_documents` says which document a position belongs to,
and every model here takes that beside the tokens. Given targets, a model gives losses instead of logits, so that
the logits of a whole batch need never exist at once (`loss_positions`), and so that wrappers that hook `forward`
(data parallel, sharded) see the one call they expect.

muP (Yang et al., 2203.03466, table 8, for Adam): relative to `mup.base_dim`, with m = dim / base_dim, hidden
matrices are initialised with std / sqrt(m) and learn at lr / m; embeddings, output weights and gains keep both;
logits are multiplied by 1 / m; attention scores by sqrt(base_head_dim) / head_dim. At m = 1 it is the standard
parametrization. Departures: weight decay is given back its strength where the rate is lowered (`optimizer.py`),
output weights start at std rather than zero, and the feed-forward and the heads are taken to grow with `dim`.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # its name everywhere
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from mixer.core.errors import ConfigError

IGNORED = -100  # the target of a position that has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Mup:
    """The width at which a scaled model is the unscaled one; learning rates found there hold at any width."""

    base_dim: int = 256
    base_head_dim: int = 64
    output_multiplier: float = 1.0  # of the logits, beside 1 / m

    def __post_init__(self) -> None:
        if min(self.base_dim, self.base_head_dim) < 1 or self.output_multiplier <= 0:
            raise ConfigError(f"{self} has values that are not positive. All must be.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderOptions:
    """A decoder's shape and parametrization; the vocabulary comes with the corpus."""

    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: dim / num_heads
    mlp_dim: int | None = None  # None: 8/3 dim, up to a multiple of 32
    tied: bool = True  # the output weights are the embeddings
    vocab_multiple: int = 64  # rows of the embeddings are filled up to one; the logits of the filling are left out
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    positions: Literal["document", "row"] = "document"  # where they start from 0
    attention: Literal["sdpa", "flex"] = "sdpa"  # flex: faster for long rows of many documents; on GPUs
    init_std: float = 0.02
    mup: Mup | None = None
    recompute: bool = False  # layers' activations in the backward pass, instead of keeping them
    loss_positions: int | None = None  # positions of a row whose logits exist at once; None: all

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.kv_heads}.")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ConfigError(
                f"dim={self.dim} is no multiple of num_heads={self.num_heads}. Change one, or set head_dim."
            )
        if self.head_size % 2 or self.head_size < 2:
            raise ConfigError(f"heads are {self.head_size} wide; rotary positions need an even number.")
        if self.init_std <= 0 or self.norm_eps <= 0 or self.rope_base <= 1:
            raise ConfigError("init_std and norm_eps must be positive, and rope_base above 1.")
        if self.loss_positions is not None and self.loss_positions < 1:
            raise ConfigError(f"loss_positions={self.loss_positions}; it must be at least 1, or null.")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else max(1, self.num_kv_heads)

    @property
    def head_size(self) -> int:
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        return -(-8 * self.dim // (3 * 32)) * 32 if self.mlp_dim is None else self.mlp_dim

    @property
    def width_ratio(self) -> float:
        """m: how much wider than the base; 1 without muP."""
        return 1.0 if self.mup is None else self.dim / self.mup.base_dim

    @property
    def attention_scale(self) -> float:
        return self.head_size**-0.5 if self.mup is None else self.mup.base_head_dim**0.5 / self.head_size


# --- documents ----------------------------------------------------------------------------------------


class Documents(NamedTuple):
    """By position of each row: the number of its document in the row, and how far into the document it lies.

    Text before the first start is document 0. Padding is a document of its own, so that no position is left
    with nothing to attend to.
    """

    document_bs: Tensor  # int32
    position_bs: Tensor  # int64


def find_documents(starts: Any, starts_offsets: Any, length: Any, row_tokens: int) -> Documents:
    """The documents of a `Batch`, from its fields of the same names."""
    starts, offsets, length = (torch.as_tensor(value).long() for value in (starts, starts_offsets, length))
    rows, at_s = len(length), torch.arange(row_tokens, device=length.device)
    row_n = torch.repeat_interleave(torch.arange(rows, device=length.device), offsets.diff(), output_size=len(starts))
    start_bs = torch.zeros(rows, row_tokens, dtype=torch.int32, device=length.device)
    start_bs[row_n, starts] = 1
    start_bs += at_s == length[:, None]  # the padding
    first_bs = torch.where(start_bs > 0, at_s, 0).cummax(1).values
    return Documents(start_bs.cumsum(1, dtype=torch.int32), at_s - first_bs)


def attention_mask(documents: Documents) -> Tensor:
    """(rows, 1, queries, keys): whether a position sees another: not later, and of the same document."""
    document_bs = documents.document_bs
    size = document_bs.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=document_bs.device).tril()
    return ((document_bs[:, :, None] == document_bs[:, None, :]) & causal)[:, None]


def _block_mask(documents: Documents) -> Any:
    document_bs = documents.document_bs

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document_bs[b, q] == document_bs[b, k])

    rows, size = document_bs.shape
    return create_block_mask(sees, rows, None, size, size, device=str(document_bs.device))


# --- losses -------------------------------------------------------------------------------------------


class TokenLosses(NamedTuple):
    """By position, in float32, and 0 where the target is IGNORED: minus the log of the target's probability, and
    log Z, the log of the sum of the exponentiated logits."""

    loss_bs: Tensor
    log_z_bs: Tensor


def token_losses(logits_bsv: Tensor, target_bs: Tensor) -> TokenLosses:
    logits = logits_bsv.float()
    log_z = torch.logsumexp(logits, -1)
    chosen = logits.gather(-1, target_bs.clamp_min(0)[..., None])[..., 0]
    has_target = target_bs >= 0
    zero = torch.zeros((), device=logits.device)
    return TokenLosses(torch.where(has_target, log_z - chosen, zero), torch.where(has_target, log_z, zero))


def losses_by_parts(
    head: Callable[[Tensor], Tensor], hidden_bsd: Tensor, target_bs: Tensor, positions: int | None
) -> TokenLosses:
    """`token_losses` of head(hidden), whose logits exist for so many positions of each row at once."""
    if positions is None or positions >= hidden_bsd.shape[1]:
        return token_losses(head(hidden_bsd), target_bs)

    def part(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(token_losses(head(hidden), target))  # pyright: ignore[reportReturnType]  # a pair

    pieces = zip(hidden_bsd.split(positions, 1), target_bs.split(positions, 1), strict=True)
    parts = [checkpoint(part, hidden, target, use_reentrant=False) for hidden, target in pieces]
    return TokenLosses(*(torch.cat(side, 1) for side in zip(*parts, strict=True)))


# --- the decoder --------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


def rotate(x_bshe: Tensor, cos_bse: Tensor, sin_bse: Tensor) -> Tensor:
    """Rotary positions: pairs (e, e + half) turned by the position's angle."""
    first, second = x_bshe.float().chunk(2, -1)
    cos, sin = cos_bse[:, :, None], sin_bse[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_bshe.dtype)


class Attention(nn.Module):
    def __init__(self, options: DecoderOptions) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = options.num_heads, options.kv_heads
        self.head_size, self.scale = options.head_size, options.attention_scale
        self.query = nn.Linear(options.dim, self.num_heads * self.head_size, bias=False)
        self.key = nn.Linear(options.dim, self.kv_heads * self.head_size, bias=False)
        self.value = nn.Linear(options.dim, self.kv_heads * self.head_size, bias=False)
        self.output = nn.Linear(self.num_heads * self.head_size, options.dim, bias=False)
        self._flex: Callable[..., Any] = flex_attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        rows, size, _ = x.shape
        query = rotate(self.query(x).view(rows, size, self.num_heads, self.head_size), cos, sin).transpose(1, 2)
        key = rotate(self.key(x).view(rows, size, self.kv_heads, self.head_size), cos, sin).transpose(1, 2)
        value = self.value(x).view(rows, size, self.kv_heads, self.head_size).transpose(1, 2)
        # Heads are repeated here: the kernels that take a mask do not group queries.
        key, value = (self._repeat(tensor) for tensor in (key, value))
        if isinstance(mask, BlockMask):
            out = self._flex_for(x)(query, key, value, block_mask=mask, scale=self.scale)
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale
            )
        return self.output(out.transpose(1, 2).reshape(rows, size, -1))

    def _repeat(self, x: Tensor) -> Tensor:
        return x if self.kv_heads == self.num_heads else x.repeat_interleave(self.num_heads // self.kv_heads, 1)

    def _flex_for(self, x: Tensor) -> Callable[..., Any]:
        """FlexAttention is fast only when compiled; inside a compiled model it already is."""
        if x.is_cuda and not torch.compiler.is_compiling() and self._flex is flex_attention:
            self._flex = torch.compile(flex_attention)
        return self._flex


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, options: DecoderOptions) -> None:
        super().__init__()
        self.gate = nn.Linear(options.dim, options.mlp_size, bias=False)
        self.up = nn.Linear(options.dim, options.mlp_size, bias=False)
        self.output = nn.Linear(options.mlp_size, options.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, options: DecoderOptions) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(options.dim, options.norm_eps)
        self.attention = Attention(options)
        self.mlp_norm = RMSNorm(options.dim, options.norm_eps)
        self.mlp = FeedForward(options)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Tokens to logits, or with targets to `TokenLosses`. `layers` are the units to shard, compile and recompute.

    Without `documents` a row is one text.
    """

    def __init__(self, options: DecoderOptions, vocab_size: int, *, seed: int = 0) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ConfigError(f"vocab_size={vocab_size}; it must be at least 1.")
        self.options, self.vocab_size = options, vocab_size
        filled = -(-vocab_size // options.vocab_multiple) * options.vocab_multiple
        self.embedding = nn.Embedding(filled, options.dim)
        self.layers = nn.ModuleList(Layer(options) for _ in range(options.num_layers))
        self.norm = RMSNorm(options.dim, options.norm_eps)
        self.head = None if options.tied else nn.Linear(options.dim, filled, bias=False)
        output = 1.0 if options.mup is None else options.mup.output_multiplier
        self.logit_scale = output / options.width_ratio
        self.initialise(seed)

    def forward(
        self, tokens_bs: Tensor, documents: Documents | None = None, target_bs: Tensor | None = None
    ) -> Tensor | TokenLosses:
        options = self.options
        mask: Any = None
        if documents is not None:
            # FlexAttention has no backward pass on a CPU.
            flex = options.attention == "flex" and (tokens_bs.is_cuda or not torch.is_grad_enabled())
            mask = _block_mask(documents) if flex else attention_mask(documents)
        cos, sin = self._angles(tokens_bs, documents)
        x = self.embedding(tokens_bs)
        for layer in self.layers:
            if options.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask)
        x = self.norm(x)
        if target_bs is None:
            return self._logits(x)
        return losses_by_parts(self._logits, x, target_bs, options.loss_positions)

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(x * self.logit_scale, weight)[..., : self.vocab_size]

    def _angles(self, tokens_bs: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
        options = self.options
        half = options.head_size // 2
        device = tokens_bs.device
        rate_e = torch.exp(-math.log(options.rope_base) / half * torch.arange(half, device=device).float())
        if documents is None or options.positions == "row":
            position = torch.arange(tokens_bs.shape[1], device=device)[None]
        else:
            position = documents.position_bs
        angle_bse = position[..., None].float() * rate_e
        return angle_bse.cos(), angle_bse.sin()

    # ---- parametrization ---------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Weights that depend on the seed and each parameter's name only, on any device.

        Gains are 1; matrices normal with `init_std`, those that write to the residual stream with
        1 / sqrt(2 layers) of it, hidden ones by muP narrower still.
        """
        hidden = set(self._hidden())
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            elif not parameter.is_meta:
                std = self.options.init_std / (math.sqrt(self.options.width_ratio) if name in hidden else 1.0)
                if name.endswith(".output.weight"):
                    std /= math.sqrt(2 * self.options.num_layers)
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                source = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=source))

    def _hidden(self) -> list[str]:
        """Matrices whose both sides grow with `dim`."""
        return [name for name, weight in self.named_parameters() if weight.ndim == 2 and name.startswith("layers.")]

    def rate_scales(self) -> dict[str, float]:
        """Learning rate of each parameter, by name, as a multiple of the run's."""
        scales = dict.fromkeys((name for name, _ in self.named_parameters()), 1.0)
        return scales | dict.fromkeys(self._hidden(), 1.0 / self.options.width_ratio)

    # ---- counts ------------------------------------------------------------------------------------

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, row_tokens: int) -> float:
        """Of forward and backward pass: 6 a weight that multiplies (the output's, not the embeddings'), and
        12 layers x heads' width x row_tokens of attention. As is usual, the causal half and the borders of
        documents are not taken off, nor recomputation added."""
        options = self.options
        matrices = sum(weight.numel() for layer in self.layers for weight in layer.parameters() if weight.ndim == 2)
        matrices += self.embedding.weight.numel()  # the output's are as many
        return 6.0 * matrices + 12.0 * options.num_layers * options.num_heads * options.head_size * row_tokens

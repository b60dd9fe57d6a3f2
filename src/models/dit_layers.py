"""Layers of the latent diffusion transformers. Sources: RAE (arXiv 2510.11690) and RAEv2 (arXiv 2605.18324).

Legend: B batch, C latent channels, p patch, N tokens, D width, H heads.
Parameter names match the released files, and each layer is initialised as in the published code. No layer draws random
numbers in its forward pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.recompute import recomputed

LABEL_STD = 0.02
"""Standard deviation of the label table's initial values."""


@dataclass(frozen=True)
class LayerOptions:
    """Options shared by all blocks of a model."""

    mlp_ratio: float = 4.0
    qknorm: bool = False
    """Normalise q and k over the head width."""
    swiglu: bool = True
    """False: two linear layers with tanh-GELU."""
    rmsnorm: bool = True
    """False: LayerNorm without affine parameters."""
    rope: bool = True
    v2: bool = False
    """RAEv2's layout: separate q, k, v and SwiGLU halves, and its own names for the modulation and the last norm."""

    @property
    def modulation(self) -> str:
        return "adaln_modulation" if self.v2 else "adaLN_modulation"

    @property
    def last_norm(self) -> str:
        return "norm" if self.v2 else "norm_final"

    def norm(self, width: int) -> nn.Module:
        return RMSNorm(width) if self.rmsnorm else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def head_norm(self, width: int) -> nn.Module:
        if not self.qknorm:
            return nn.Identity()
        return RMSNorm(width) if self.rmsnorm else nn.LayerNorm(width, eps=1e-5)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension: x / sqrt(mean(x^2) + 1e-6) * weight. Half precision accumulates in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, None, 1e-6).to(x.dtype) * self.weight


class Rotary(nn.Module):
    """2-D rotary embedding: rotates each pair (a, b) of adjacent channels to (a cos - b sin, b cos + a sin).

    The angle depends on the row in the first half of the channels, on the column in the second. The `extra` tokens after
    the grid are not rotated. The tables are N x head width and stay float32 when the model is cast to half precision.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_width: int, grid: int, extra: int = 0) -> None:
        super().__init__()
        half = head_width // 2
        frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        axis = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # grid, half/2
        row, column = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
        angles = torch.cat([row, column], dim=-1).flatten(0, 1).repeat_interleave(2, dim=1)  # N head_width
        angles = F.pad(angles, (0, 0, 0, extra))
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x, B H N D/H -> same shape and dtype."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        quarter_turn = torch.stack([-b, a], dim=-1).flatten(-2)
        return (x * self.freqs_cos + quarter_turn * self.freqs_sin).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        tables = {"freqs_cos": self.freqs_cos, "freqs_sin": self.freqs_sin}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            moved = getattr(self, name)
            if moved.dtype != table.dtype:
                setattr(self, name, table.to(moved.device))
        return self


class Attention(nn.Module):
    """Self-attention over all tokens, B N D -> B N D."""

    def __init__(self, width: int, heads: int, options: LayerOptions) -> None:
        super().__init__()
        self.heads = heads
        self.split = options.v2
        if self.split:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (options.head_norm(width // heads) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the projections of x, B N D: (q, k, v) if split, else one fused tensor."""
        if not self.split:
            return (self.qkv(x),)
        return self.q(x), self.k(x), self.v(x)

    def mix(self, projected: tuple[Tensor, ...], rope: Rotary | None) -> Tensor:
        parts = projected if self.split else projected[0].chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # B H N D/H

        def norm_and_rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            q, k = self.q_norm(q), self.k_norm(k)
            if rope is not None:
                q, k = rope(q), rope(k)
            return q.to(v.dtype), k.to(v.dtype)

        q, k = norm_and_rope(q, k) if isinstance(self.q_norm, nn.Identity) else recomputed(norm_and_rope, q, k)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """contract(widen(x)) = w3(silu(a) * b), with a and b from w12, or from w1 and w2 if `split` (RAEv2)."""

    def __init__(self, width: int, hidden: int, split: bool) -> None:
        super().__init__()
        self.split = split
        if split:
            self.w1, self.w2 = (nn.Linear(width, hidden) for _ in range(2))
        else:
            self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def widen(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.split:
            return self.w12(x).chunk(2, dim=-1)
        return self.w1(x), self.w2(x)

    def contract(self, a: Tensor, b: Tensor) -> Tensor:
        return self.w3(F.silu(a) * b)


class MLP(nn.Module):
    """contract(widen(x)) = fc2(gelu(fc1(x))), with tanh-GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def widen(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.fc1(x),)

    def contract(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(hidden, approximate="tanh"))


def feed_forward(width: int, options: LayerOptions) -> nn.Module:
    """Return the MLP of a block. A SwiGLU gets 2/3 of the hidden width, so that it costs the same as the plain MLP.

    RAEv2 rounds once, RAE twice: the two can differ by 1 if mlp_ratio * width is not an integer.
    """
    hidden = int(options.mlp_ratio * width)
    if not options.swiglu:
        return MLP(width, hidden)
    return SwiGLU(width, int(2 / 3 * width * options.mlp_ratio) if options.v2 else hidden * 2 // 3, split=options.v2)


class Modulation(nn.ModuleDict):
    """The linear layer of adaLN. Its key is "1" because the released files have a SiLU in front of it, as "0"."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__({"1": zero_linear(width, parts * width)})
        self.parts = parts

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self["1"](condition).chunk(self.parts, dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block, with adaLN (Peebles & Xie, arXiv 2212.09748) if `modulated`."""

    def __init__(self, width: int, heads: int, options: LayerOptions, modulated: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = (options.norm(width) for _ in range(2))
        self.attn = Attention(width, heads, options)
        self.mlp = feed_forward(width, options)
        self.modulation = options.modulation if modulated else None
        if self.modulation:
            self.add_module(self.modulation, Modulation(width, 6))

    def forward(self, x: Tensor, condition: Tensor | None, rope: Rotary | None) -> Tensor:
        """Apply the block to x, B N D. `condition`, after SiLU: B 1 D (all tokens), B N D (per token), None (not modulated)."""
        # The backward pass recomputes norms, modulation and activations, but no matrix products.
        if self.modulation is None:
            x = x + self.attn.mix(self._project(self.attn.project, self.norm1, x), rope)
            return x + recomputed(self.mlp.contract, *self._project(self.mlp.widen, self.norm2, x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = getattr(self, self.modulation)(condition)
        projected = self._project(self.attn.project, lambda x: self.norm1(x) * (1 + scale_a) + shift_a, x)
        x = x + gate_a * self.attn.mix(projected, rope)
        wide = self._project(self.mlp.widen, lambda x: self.norm2(x) * (1 + scale_m) + shift_m, x)
        return x + gate_m * recomputed(self.mlp.contract, *wide)

    def _project(self, product: Callable[[Tensor], Any], before: Callable[[Tensor], Tensor], x: Tensor) -> Any:
        """Return product(before(x)), recomputing `before` in the backward pass; split layers share its one saved result."""
        if self.attn.split:
            return product(recomputed(lambda x: autocast_once(before(x)), x))
        return recomputed(lambda x: product(before(x)), x)


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer to patches: B N D -> B N (p*p*C). Zero-initialised."""

    def __init__(self, width: int, outputs: int, options: LayerOptions) -> None:
        super().__init__()
        self.last_norm, self.modulation = options.last_norm, options.modulation
        self.add_module(self.last_norm, options.norm(width))
        self.linear = zero_linear(width, outputs)
        self.add_module(self.modulation, Modulation(width, 2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the patches B N (p*p*C) for x, B N D; `condition` as in `Block`."""
        shift, scale = getattr(self, self.modulation)(condition)
        return self.linear(getattr(self, self.last_norm)(x) * (1 + scale) + shift)


def autocast_once(x: Tensor) -> Tensor:
    """Cast the shared input of several linear layers to the autocast dtype, so that autocast keeps one copy, not several."""
    kind = x.device.type
    # Not `is_autocast_available`, which covers every device: it breaks the graph of torch.compile in torch 2.11.
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if on else x


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class PatchEmbed(nn.Module):
    """Patch embedding, B C g g -> B N D, tokens in row-major order."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimeEmbedder(nn.Module):
    """Random Fourier features of t in [0, 1], then an MLP: (B,) -> B D. The frequencies W are trained.

    `tokens`: number of learned vectors (tokens x D), which RAEv2 adds to the embedding.
    """

    def __init__(self, width: int, tokens: int = 0) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(256))
        first, last = nn.Linear(512, width), nn.Linear(width, width)
        for linear in (first, last):
            nn.init.normal_(linear.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)
        if tokens:
            self.learnable_tokens = learned_tokens(tokens, width)

    def forward(self, t: Tensor) -> Tensor:
        wide = torch.promote_types(t.dtype, torch.float32)
        angles = 2 * math.pi * t[:, None].to(wide) * self.W  # B 256
        features = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.mlp(features.to(self.W.dtype))


class LabelEmbedder(nn.Module):
    """Label embedding, (B,) -> B D. `tokens` as in `TimeEmbedder`."""

    def __init__(self, rows: int, width: int, tokens: int = 0) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)
        nn.init.normal_(self.embedding_table.weight, std=LABEL_STD)
        if tokens:
            self.learnable_tokens = learned_tokens(tokens, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def learned_tokens(number: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(number, width) * width**-0.5)

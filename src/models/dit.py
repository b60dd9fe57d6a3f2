"""Latent diffusion transformers: LightningDiT and DiT^DH of RAE (arXiv 2510.11690), and RAEv2's model (arXiv 2605.18324).

`model(x, t, y)`: noisy latents x B C g g, times t (B,) in [0, 1] (1 is noise), labels y (B,) in 0..K-1 or the null label
K -> velocity, same shape as x. The models draw no random numbers and behave the same in train and eval mode: for label
dropout, the trainer writes K into y.

Legend: B batch, C latent channels, g latent grid side, p patch, N = (g/p)^2 tokens, D encoder width, W head width,
K classes.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.core.errors import UserError
from src.core.settings import Size, check_keys, checked
from src.core.text import typed
from src.models import flops
from src.models.decoder import sincos_positions, unpatchify
from src.models.dit_layers import Block, FinalLayer, LabelEmbedder, LayerOptions, PatchEmbed, Rotary, TimeEmbedder

Pair = Annotated[
    Sequence[Size], Field(min_length=2, max_length=2, description="two whole numbers of at least 1, [encoder, head]")
]
Share = Annotated[float, Field(ge=0, lt=1)]


class Part(NamedTuple):
    """A stack of blocks of the same width."""

    width: int
    depth: int
    heads: int


class LatentTransformer(nn.Module):
    """Base class of the three models: checked sizes, blocks and final layer."""

    latent_shape: tuple[int, int, int]
    """C, g, g"""
    null_label: int | None
    """The label that means "no class": K, or None if it was not trained."""

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        patch_size: int,
        num_classes: int,
        class_dropout_prob: float,
        parts: Sequence[Part],
        options: LayerOptions,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        if latent_shape[1] % patch_size:
            raise self._error(f"input_size={latent_shape[1]} is not a multiple of patch_size={patch_size}.")
        for part in parts:
            self._check_part(part, options)
        self.latent_shape = latent_shape
        self.patch_size = patch_size
        self.grid = latent_shape[1] // patch_size
        self.num_classes = num_classes
        self.null_label = num_classes if class_dropout_prob > 0 else None
        self.table_rows = num_classes + (self.null_label is not None)
        self.activation_checkpointing = activation_checkpointing
        self.encoder_depth = parts[0].depth
        self.blocks = nn.ModuleList(
            Block(part.width, part.heads, options, modulated=part is parts[-1] or not options.v2)
            for part in parts
            for _ in range(part.depth)
        )
        self.final_layer = self._final_layer(parts[-1].width, options)

    @property
    def label_table(self) -> nn.Parameter:
        """The embedding table, one row per label, the null label's last."""
        return getattr(self, "ctx_embedder" if hasattr(self, "ctx_embedder") else "y_embedder").embedding_table.weight

    def known(self, labels: Tensor) -> Tensor:
        """Return labels (B,), on the CPU, with the null label for negative ones (no class). Raises UserError if it is missing."""
        if self.null_label is not None:
            return torch.where(labels < 0, self.null_label, labels)
        if (labels < 0).any():
            raise UserError(
                "The data has images without a class (label -1), but a model with model.label_dropout=0 has no null label for "
                "them. Remove them, or train with a label_dropout above 0."
            )
        return labels

    def _final_layer(self, width: int, options: LayerOptions) -> FinalLayer:
        return FinalLayer(width, self.patch_size**2 * self.latent_shape[0], options)

    def _positions(self, width: int) -> nn.Parameter:
        if width % 4:
            raise self._error(f"hidden_size={width}: sin-cos positions need a multiple of 4.")
        return nn.Parameter(sincos_positions(width, self.grid)[None, 1:])  # 1 N D

    def _run(self, blocks: Iterable[nn.Module], x: Tensor, condition: Tensor | None, rope: Rotary | None) -> Tensor:
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, condition, rope)
        return x

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.latent_shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected B x {' x '.join(map(str, self.latent_shape))}.")
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"t and y have shapes {tuple(t.shape)} and {tuple(y.shape)}; expected ({len(x)},) each.")

    def _check_part(self, part: Part, options: LayerOptions) -> None:
        width, _, heads = part
        if width % heads:
            raise self._error(f"hidden_size={width} is not a multiple of num_heads={heads}.")
        if options.rope and width // heads % 4:
            raise self._error(
                f"hidden_size={width} with num_heads={heads} makes heads {width // heads} wide; rotary positions need a "
                "multiple of 4."
            )
        if int(options.mlp_ratio * width) < 2:
            raise self._error(f"mlp_ratio={options.mlp_ratio} leaves no hidden width in the MLP of width {width}.")

    @classmethod
    def _error(cls, text: str) -> UserError:
        return UserError(f"{cls.__name__}: {text}")


@checked("model.network")
class LightningDiT(LatentTransformer):
    """RAE's plain DiT: adaLN blocks of one width."""

    def __init__(
        self,
        input_size: Size,
        patch_size: Literal[1, 2] = 1,
        *,
        in_channels: Size,
        hidden_size: Size,
        depth: Size,
        num_heads: Size,
        mlp_ratio: float = 4.0,
        class_dropout_prob: Share = 0.1,
        num_classes: Size = 1000,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rmsnorm: bool = True,
        use_rope: bool = True,
        use_pos_embed: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            input_size: side of the latent grid.
            mlp_ratio: hidden width of the MLP / width; a SwiGLU gets two thirds of it.
            class_dropout_prob: fraction of labels that the trainer replaces with the null label K. Above 0 the label table
                has K + 1 rows, at 0 it has K.
            activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.

        Raises:
            UserError: sizes that don't fit.
        """
        shape, parts = (in_channels, input_size, input_size), [Part(hidden_size, depth, num_heads)]
        options = LayerOptions(mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm, use_rope)
        super().__init__(shape, patch_size, num_classes, class_dropout_prob, parts, options, activation_checkpointing)
        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(self.table_rows, hidden_size)
        self.pos_embed = self._positions(hidden_size) if use_pos_embed else None
        self.feat_rope = Rotary(hidden_size // num_heads, self.grid) if use_rope else None
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if name.startswith("blocks.") and options.modulation not in name:
                    nn.init.xavier_uniform_(module.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self._check_inputs(x, t, y)
        condition = F.silu(self.t_embedder(t) + self.y_embedder(y))[:, None]  # B 1 D
        tokens = self.x_embedder(x)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        tokens = self._run(self.blocks, tokens, condition, self.feat_rope)
        return unpatchify(self.final_layer(tokens, condition), self.patch_size)


@checked("model.network")
class DiTDH(LatentTransformer):
    """DiT^DH: an encoder whose output tokens condition a wide, shallow head on the same latent.

    The last `depth[1]` of `blocks` are the head.
    """

    def __init__(
        self,
        input_size: Size,
        patch_size: Literal[1] = 1,
        *,
        in_channels: Size,
        hidden_size: Pair,
        depth: Pair,
        num_heads: Pair,
        mlp_ratio: float = 4.0,
        class_dropout_prob: Share = 0.1,
        num_classes: Size = 1000,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rmsnorm: bool = True,
        use_rope: bool = True,
        use_pos_embed: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            hidden_size, depth, num_heads: [encoder, head] each.
            mlp_ratio, class_dropout_prob, activation_checkpointing: as in `LightningDiT`.

        Raises:
            UserError: sizes that don't fit.
        """
        shape = (in_channels, input_size, input_size)
        encoder, head = parts = [Part(*sizes) for sizes in zip(hidden_size, depth, num_heads, strict=True)]
        options = LayerOptions(mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm, use_rope)
        super().__init__(shape, patch_size, num_classes, class_dropout_prob, parts, options, activation_checkpointing)
        self.s_embedder = PatchEmbed(in_channels, patch_size, encoder.width)
        self.x_embedder = PatchEmbed(in_channels, patch_size, head.width)
        self.t_embedder = TimeEmbedder(encoder.width)
        self.y_embedder = LabelEmbedder(self.table_rows, encoder.width)
        self.s_projector = projector(encoder.width, head.width)
        self.pos_embed = self._positions(encoder.width) if use_pos_embed else None
        self.enc_feat_rope = Rotary(encoder.width // encoder.heads, self.grid) if use_rope else None
        self.dec_feat_rope = Rotary(head.width // head.heads, self.grid) if use_rope else None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self._check_inputs(x, t, y)
        time = self.t_embedder(t)[:, None]  # B 1 D
        # SiLU twice, as in the published model: once on the condition, once before each modulation.
        condition = F.silu(F.silu(time + self.y_embedder(y)[:, None]))
        tokens = self.s_embedder(x)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        tokens = self._run(self.blocks[: self.encoder_depth], tokens, condition, self.enc_feat_rope)  # B N D
        condition = F.silu(self.s_projector(F.silu(time + tokens)))  # B N W
        tokens = self._run(self.blocks[self.encoder_depth :], self.x_embedder(x), condition, self.dec_feat_rope)
        return unpatchify(self.final_layer(tokens, condition), self.patch_size)


@checked("model.network")
class RAEv2DiT(LatentTransformer):
    """RAEv2's model: time and class are tokens in the encoder's sequence; the head is that of DiT^DH.

    With `base_model_depth`, the tokens after that many blocks give a second output: `model(x, t, y)` -> (full, base).
    The label table always has K + 1 rows.
    """

    def __init__(
        self,
        input_size: Size,
        patch_size: Literal[1, 2],
        in_channels: Size,
        hidden_size: Pair,
        depth: Pair,
        num_heads: Pair,
        num_classes: Size,
        base_model_depth: int | None = None,
        mlp_ratio: float = 4.0,
        num_t_tokens: Size = 4,
        num_c_tokens: Size = 8,
        activation_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            hidden_size, depth, num_heads: [encoder, head] each.
            base_model_depth: number of encoder blocks before the base output; None: no base output.
            num_t_tokens, num_c_tokens: number of time and of class tokens.
            mlp_ratio, activation_checkpointing: as in `LightningDiT`.

        Raises:
            UserError: sizes that don't fit.
        """
        shape = (in_channels, input_size, input_size)
        encoder, head = parts = [Part(*sizes) for sizes in zip(hidden_size, depth, num_heads, strict=True)]
        options = LayerOptions(mlp_ratio, qknorm=True, v2=True)
        super().__init__(shape, patch_size, num_classes, 0.1, parts, options, activation_checkpointing)
        if base_model_depth is not None and base_model_depth not in range(1, encoder.depth + 1):
            raise self._error(
                f"base_model_depth={base_model_depth}: expected 1 to {encoder.depth} (the encoder), or null."
            )
        self.base_model_depth = base_model_depth
        self.s_embedder = PatchEmbed(in_channels, patch_size, encoder.width)
        self.x_embedder = PatchEmbed(in_channels, patch_size, head.width)
        self.t_embedder = TimeEmbedder(encoder.width, num_t_tokens)
        self.ctx_embedder = LabelEmbedder(self.table_rows, encoder.width, num_c_tokens)
        self.s_projector = projector(encoder.width, head.width)
        self.enc_rope = Rotary(encoder.width // encoder.heads, self.grid, num_t_tokens + num_c_tokens)
        self.dec_rope = Rotary(head.width // head.heads, self.grid)
        if base_model_depth is not None:
            self.base_final_layer = self._final_layer(encoder.width, options)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self._check_inputs(x, t, y)
        patches = self.grid**2
        time = self.t_embedder(t)[:, None]  # B 1 D
        time_tokens = time + self.t_embedder.learnable_tokens  # B 4 D
        class_tokens = self.ctx_embedder(y)[:, None] + self.ctx_embedder.learnable_tokens  # B 8 D
        tokens = torch.cat([self.s_embedder(x), time_tokens, class_tokens], dim=1)  # B N+12 D
        below = self.base_model_depth or 0
        tokens = self._run(self.blocks[:below], tokens, None, self.enc_rope)
        base_tokens = tokens[:, :patches]
        tokens = self._run(self.blocks[below : self.encoder_depth], tokens, None, self.enc_rope)
        condition = F.silu(self.s_projector(F.silu(time + tokens[:, :patches])))  # B N W
        tokens = self._run(self.blocks[self.encoder_depth :], self.x_embedder(x), condition, self.dec_rope)
        full = unpatchify(self.final_layer(tokens, condition), self.patch_size)
        if self.base_model_depth is None:
            return full
        base_tokens = F.silu(time + base_tokens)
        return full, unpatchify(self.base_final_layer(base_tokens, F.silu(base_tokens)), self.patch_size)


def projector(width: int, head_width: int) -> nn.Module:
    """Return the projection from encoder width to head width; the identity if they are equal."""
    return nn.Linear(width, head_width) if width != head_width else nn.Identity()


def forward_flops(model: LatentTransformer, batch_size: int = 1) -> int:
    """Return the FLOPs of one forward pass; see `src/models/flops.py`."""
    dtype = next(model.parameters()).dtype
    x = torch.empty(batch_size, *model.latent_shape, device="meta", dtype=dtype)
    t = torch.empty(batch_size, device="meta", dtype=dtype)
    return flops.forward_flops(model, x, t, torch.empty(batch_size, device="meta", dtype=torch.long))


NETWORKS: dict[str, type[LatentTransformer]] = {cls.__name__: cls for cls in (LightningDiT, DiTDH, RAEv2DiT)}


def build_network(
    config: Mapping[str, Any], latent_shape: tuple[int, int, int], num_classes: int, label_dropout: float, seed: int
) -> LatentTransformer:
    """Build a transformer with random weights drawn from `seed`.

    Args:
        config: `name` and arguments of the class; the sizes of latents and label table are filled in.

    Raises:
        UserError: an unknown class or argument, sizes that don't fit.
    """
    cls = NETWORKS.get(str(config.get("name")))
    if cls is None:
        raise UserError(f"model.network.name={typed(config.get('name'))}: expected one of {', '.join(NETWORKS)}.")
    channels, grid, _ = latent_shape
    derived: dict[str, Any] = {"input_size": grid, "in_channels": channels, "num_classes": num_classes}
    known = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    derived |= {"class_dropout_prob": label_dropout} if "class_dropout_prob" in known else {}
    arguments = {name: value for name, value in config.items() if name != "name"}
    check_keys(arguments, known - derived.keys(), "model.network")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = cls(**derived, **arguments)
    if label_dropout == 0:
        network.null_label = None  # RAEv2's table still has the row, but it is never trained
    return network

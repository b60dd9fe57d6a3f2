"""What a checkpoint says about itself, and whether it belongs to a model. Plain values and tensors only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from src.core.errors import UserError
from src.models.frozen_encoder import identity_differences

FORMAT_VERSION = 1


@dataclass(frozen=True)
class RAESettings:
    """Arguments of `RAE`, by the same names."""

    encoder_cls: str
    encoder_config_path: str
    encoder_params: Mapping[str, Any]
    encoder_input_size: int | None
    image_size: int
    decoder_config_path: str
    decoder_patch_size: int
    decoder_denormalize: bool
    pretrained_decoder_path: str | None
    normalization_stat_path: str | None
    noise_tau: float
    train_positions: bool
    activation_checkpointing: bool


def trained_state(module: nn.Module, frozen: tuple[str, ...], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The state dict without what starts with one of `frozen`."""
    state = nn.Module.state_dict(module, *args, **kwargs)
    return {name: value for name, value in state.items() if not name.startswith(frozen)}


def describe(module: Any) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "config": module.run_config,
        "processes": module.trainer.world_size,
        "encoder": module.encoder_identity,
        "architecture": architecture(module),
    }


def architecture(module: Any) -> dict[str, Any]:
    """The sizes that two models must share for one's checkpoint to make sense in the other."""
    geometry, decoder = module.rae.geometry, module.rae.decoder
    return {
        "data.image_size": geometry.image_size,
        "model.decoder_patch_size": geometry.decoder_patch,
        "encoder patch": geometry.encoder_patch,
        "latent channels": module.rae.latent_shape[0],
        "model.decoder_denormalize": module.rae.decoder_denormalize,
        "model.train_positions": decoder.decoder_pos_embed.requires_grad,
        **{f"decoder config: {name}": value for name, value in vars(decoder.config).items()},
        "discriminator": None if module.discriminator is None else module.settings.disc_arch.arch["recipe"],
    }


def verify(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Raises UserError with every difference where the checkpoint is of another model."""
    version = checkpoint.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"The checkpoint's format_version is {version}, this program reads {FORMAT_VERSION}. It is either not a "
            "checkpoint of this trainer (weights of others go into model.pretrained_decoder_path) or of another release."
        )
    differing = [
        f"  {name}: checkpoint {checkpoint[part].get(name)!r}, model {own[name]!r}"
        for part, own in (("architecture", architecture(module)), ("encoder", module.encoder_identity))
        for name in identity_differences(checkpoint[part], own)
    ]
    if differing:
        raise UserError(
            "The checkpoint is of another model:\n" + "\n".join(differing) + "\nResume with the experiment and the "
            "overrides of the run that wrote it, or start a new run from its decoder: export it with src/export.py and "
            "set model.pretrained_decoder_path."
        )


def rescale(loops: dict[str, Any], was: int, now: int) -> None:
    """Rewrites a checkpoint's count of micro-batches for another number of them in an update, in place.

    A checkpoint lies between two updates, so the count divides by `was`.
    """
    current = loops["fit_loop"]["epoch_loop.batch_progress"]["current"]
    for name in current:
        current[name] = current[name] // was * now

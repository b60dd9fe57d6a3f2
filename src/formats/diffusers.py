"""Write and read diffusers' `AutoencoderRAE` folders without diffusers. Tested against diffusers 0.42.1.

    config.json                              sizes, preprocessing, latent statistics as lists
    diffusion_pytorch_model.safetensors      encoder.*, decoder.*, encoder_mean, encoder_std, _latents_mean, _latents_std

diffusers divides latents by (std + 1e-5), the official code by sqrt(var + 1e-5); std = sqrt(var + 1e-5) - 1e-5 makes the
two equal. Positions are not stored: diffusers computes sin-cos ones that equal ours only for a 16 x 16 grid.

Legend: C latent channels, h = w latent grid.
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.files import write_safetensors
from src.core.key_mapping import below
from src.core.weights import freeze, read
from src.formats import diffusers_layout
from src.formats.checkpoint import LoadedModel
from src.formats.decoder_files import STATISTICS, read_record
from src.formats.diffusers_layout import FAMILIES, HEAD_WIDTH, Family
from src.models.decoder import are_fixed
from src.models.encoder_presets import source_key
from src.models.frozen_encoder import FrozenEncoder, is_untrained
from src.models.rae import RAE

log = logging.getLogger(__name__)

GRID = 16
"""The only latent grid for which diffusers' positions are those of the recipe."""
VERSION = "0.42.1"


# -- writing


def obstacles(rae: RAE) -> list[str]:
    """Return the reasons why diffusers can't represent this model; empty if it can."""
    encoder, grid = rae.encoder, rae.geometry.grid
    family = next((f for f in FAMILIES if f.encoder_cls == type(encoder).__name__), None)
    found = []
    if grid != GRID:
        found.append(
            f"its grid is {grid} x {grid}; except at 16 x 16, diffusers {VERSION} computes other positions than the "
            "decoder was trained with"
        )
    elif not are_fixed(rae.decoder.decoder_pos_embed):
        found.append("its positions were trained; diffusers does not store positions and would use others")
    if rae.decoder.config.layer_norm_eps != 1e-12:
        found.append(f"its decoder has layer_norm_eps={rae.decoder.config.layer_norm_eps}; diffusers fixes 1e-12")
    if not rae.decoder_denormalize:
        found.append("decoder_denormalize=false; diffusers always multiplies by the encoder's std and adds its mean")
    if encoder.layers != (encoder.depth - 1,):
        found.append(f"its latent is taken from the blocks {list(encoder.layers)}; diffusers only uses the last one")
    if family is None:
        return [*found, f"diffusers has no {type(encoder).__name__}, only {', '.join(f.name for f in FAMILIES)}"]
    if choices := [choice for choice in encoder.other_choices if not choice.startswith("statistics")]:
        found.append(f"its encoder is used with {', '.join(choices)}; diffusers has no such option")
    config = encoder.model.config
    if config.model_type != family.model_type:
        return [*found, f"its encoder is a {config.model_type}; diffusers expects {family.model_type}"]
    if config.num_attention_heads * HEAD_WIDTH != config.hidden_size:
        found.append(
            f"its attention heads are {config.hidden_size / config.num_attention_heads:g} wide; diffusers fixes "
            f"{HEAD_WIDTH}"
        )
    differing = [
        f"{key}={getattr(config, key)} (diffusers: {value})"
        for key, value in family.fixed.items()
        if getattr(config, key) != value
    ]
    if differing:
        found.append(
            f"diffusers builds the {family.name} encoder with fixed sizes, and this one differs in "
            f"{', '.join(differing)}"
        )
    if family.name == "siglip2" and not any(name.startswith("head.") for name in encoder.model.state_dict()):
        found.append("its SigLIP tower has no pooling head, which diffusers' has")
    return found


def write_diffusers(
    rae: RAE, folder: str | Path, dtype: torch.dtype = torch.float32, published_names: bool = False
) -> list[str]:
    """Write `config.json` and the weights into an existing folder; return remarks for its users.

    Args:
        dtype: of encoder and decoder; statistics and preprocessing stay float32.
        published_names: name the encoder's parameters as in the hub's files (transformers 4) instead of as in the
            installed transformers. SigLIP2 always has the published names: diffusers loads it only with transformers 4.

    Raises:
        UserError: diffusers can't represent the model; lists all reasons.
    """
    if reasons := obstacles(rae):
        raise UserError(
            "diffusers' AutoencoderRAE can't represent this model:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
            + "\nExport with --format official or --format folder."
        )
    family = next(f for f in FAMILIES if f.encoder_cls == type(rae.encoder).__name__)
    published_names = published_names or family.name == "siglip2"
    encoder = _encoder_out(rae.encoder, family, published_names)
    decoder = {diffusers_layout.DECODER.theirs(name): value for name, value in rae.decoder.state_dict().items()}
    del decoder["decoder_pos_embed"]
    state = {f"encoder.{name}": value.to(dtype) for name, value in encoder.items()}
    state |= {f"decoder.{name}": value.to(dtype) for name, value in decoder.items()}
    mean, std = _statistics_out(rae)
    plain = {"encoder_mean": rae.image_mean, "encoder_std": rae.image_std, "_latents_mean": mean, "_latents_std": std}
    state |= {name: value.float() for name, value in plain.items()}
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_safetensors(Path(folder) / diffusers_layout.WEIGHTS, state, {"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(_config_out(rae, family), indent=1) + "\n")
    return _remarks(family, published_names)


def _config_out(rae: RAE, family: Family) -> dict[str, Any]:
    mean, std = _statistics_out(rae)
    config, decoder = rae.encoder.model.config, rae.decoder.config
    return {
        "_class_name": diffusers_layout.CLASS,
        "_diffusers_version": VERSION,
        "encoder_type": family.name,
        "encoder_hidden_size": config.hidden_size,
        "encoder_patch_size": config.patch_size,
        "encoder_num_hidden_layers": config.num_hidden_layers,
        "decoder_hidden_size": decoder.decoder_hidden_size,
        "decoder_num_hidden_layers": decoder.decoder_num_hidden_layers,
        "decoder_num_attention_heads": decoder.decoder_num_attention_heads,
        "decoder_intermediate_size": decoder.decoder_intermediate_size,
        "patch_size": rae.geometry.decoder_patch,
        "encoder_input_size": rae.geometry.encoder_input_size,
        "image_size": rae.geometry.image_size,
        "num_channels": 3,
        "encoder_norm_mean": rae.image_mean.flatten().tolist(),
        "encoder_norm_std": rae.image_std.flatten().tolist(),
        "latents_mean": mean.tolist() if rae.has_statistics else None,
        "latents_std": std.tolist() if rae.has_statistics else None,
        "noise_tau": 0.0,  # diffusers adds noise in train mode; a trained decoder needs none
        "reshape_to_2d": True,
        "use_encoder_loss": False,
        "scaling_factor": 1.0,
    }


def _encoder_out(encoder: FrozenEncoder, family: Family, published_names: bool) -> dict[str, Tensor]:
    state = {}
    for name, value in encoder.model.state_dict().items():
        published = family.names.theirs(name)
        if not published.startswith(family.unused_norm + "."):
            state[published if published_names else name] = value
    return state


def _statistics_out(rae: RAE) -> tuple[Tensor, Tensor]:
    """Return mean and std, C x h x w, such that (z - mean) / (std + 1e-5) is the official normalisation."""
    if not rae.has_statistics:  # std + 1e-5 is 1; diffusers' default of 1 divides by 1.00001
        return torch.zeros(1), torch.full((1,), 1 - diffusers_layout.STD_EPS)
    mean = torch.zeros(rae.latent_shape) if rae.latent_mean is None else rae.latent_mean.float().cpu()
    var = torch.ones(rae.latent_shape) if rae.latent_var is None else rae.latent_var
    return mean, diffusers_layout.std_from_var(var)


def _remarks(family: Family, published_names: bool) -> list[str]:
    if family.name == "siglip2":
        return [
            f"diffusers {VERSION} can't load SigLIP2 with transformers 5 (SiglipVisionModel lost `vision_model`). The files are "
            "correct: load them with transformers 4, or with a newer diffusers that supports transformers 5."
        ]
    names = "transformers 4 and the hub's files" if published_names else "the installed transformers"
    other = "" if published_names else " For diffusers with transformers 4 or 5.17 export with --published_names."
    return [f"The encoder's parameters are named as in {names}; diffusers does not translate them.{other}"]


# -- reading


def read_diffusers(folder: str | Path) -> LoadedModel:
    """Load a frozen RAE, encoder included, from an `AutoencoderRAE` folder with parameter names of transformers 4 or 5.

    Raises:
        UserError: no such folder, another class, unreadable or incomplete files, options that our RAE does not support.
    """
    folder = Path(folder)
    config = diffusers_layout.read_config(folder)
    family = next((f for f in FAMILIES if f.name == config["encoder_type"]), None)
    if family is None:
        raise UserError(
            f"{folder}: encoder_type={config['encoder_type']!r}; known: {', '.join(f.name for f in FAMILIES)}."
        )
    state = read(folder / diffusers_layout.WEIGHTS)
    with tempfile.TemporaryDirectory(prefix="rae_encoder_") as place:
        _write_encoder(Path(place), family, config, state)
        rae = RAE(
            encoder_cls=family.encoder_cls,
            encoder_config_path=place,
            encoder_params={source_key(family.encoder_cls): place},
            decoder_config_path=diffusers_layout.decoder_config(config),
            decoder_patch_size=config["patch_size"],
            encoder_input_size=config["encoder_input_size"],
            pretrained_decoder_path=folder,
            noise_tau=config["noise_tau"],
        )
    rae.encoder.source = str(folder)
    freeze(rae)
    if (statistics := _statistics_in(folder, state)) is not None:
        rae.set_statistics(*(v if v is None else v.expand(rae.latent_shape).clone() for v in statistics))
    record = read_record(folder)
    encoder = record.get("encoder") or rae.encoder.identity()
    rae.encoder.untrained = is_untrained(encoder)
    return LoadedModel.of(rae, folder, encoder, record)


def _statistics_in(folder: Path, state: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None] | None:
    """Return mean and var: the exact ones from `stats.pt` if it exists and agrees with the rounded ones in the weights."""
    found = diffusers_layout.statistics(state, folder)
    if found is None or not (folder / STATISTICS).is_file():
        return found
    exact = read(folder / STATISTICS)
    mean, var = (exact.get("mean"), exact.get("var")) if isinstance(exact, Mapping) else ((), ())
    if not isinstance(mean, Tensor | None) or not isinstance(var, Tensor | None):
        raise UserError(
            f"{folder / STATISTICS} is damaged: expected `mean` and `var`, each a tensor or None. Export again, or delete it: the "
            "weights hold the same statistics, rounded."
        )
    rounded = (
        torch.zeros_like(found[0]) if mean is None else mean.float(),
        diffusers_layout.std_from_var(torch.ones_like(found[1]) if var is None else var),
    )
    if not torch.equal(rounded[0], found[0]) or not torch.equal(rounded[1], state["_latents_std"]):
        log.warning("%s: %s does not match the weights beside it and is ignored.", folder, STATISTICS)
        return found
    return mean, var


def _write_encoder(place: Path, family: Family, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write the encoder as a folder that transformers can load, since our encoder classes load weights that way."""
    width = config["encoder_hidden_size"]
    names = family.names
    # to the hub's names, from those of transformers 4 or 5
    found = {names.theirs(names.ours(name)): value for name, value in below(state, "encoder.").items()}
    found[family.unused_norm + ".weight"], found[family.unused_norm + ".bias"] = torch.ones(width), torch.zeros(width)
    write_safetensors(place / "model.safetensors", found, {"format": "pt"})
    transformers = {
        "model_type": family.model_type,
        "hidden_size": width,
        "patch_size": config["encoder_patch_size"],
        "num_hidden_layers": config["encoder_num_hidden_layers"],
        "num_attention_heads": width // HEAD_WIDTH,
        **family.fixed,
    }
    (place / "config.json").write_text(json.dumps(transformers))
    means = {"image_mean": config["encoder_norm_mean"], "image_std": config["encoder_norm_std"]}
    (place / "preprocessor_config.json").write_text(json.dumps(means))

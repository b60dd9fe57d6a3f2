"""Tiny models for the tests of exports, statistics and reconstruction."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from src.core.weights import PROJECT_ROOT, freeze
from src.formats.checkpoint import FORMAT_VERSION, LoadedModel, RAESettings
from src.formats.export import write_own_statistics
from src.formats.folder import write_folder
from src.models.encoder_presets import source_key
from src.models.rae import RAE

WIDTH = 64
_ENCODERS = {
    "dinov2": ("Dinov2withNorm", "dinov2_path", {"model_type": "dinov2_with_registers", "image_size": 518, "patch_size": 14}),
    "mae": ("MAEwNorm", "model_name", {"model_type": "vit_mae", "image_size": 224, "patch_size": 16, "intermediate_size": 3072}),
    "siglip2": ("SigLIP2wNorm", "model_name", {"model_type": "siglip_vision_model", "image_size": 256, "patch_size": 16, "intermediate_size": 3072}),
    "dinov3": ("DINOv3wNorm", "model_name", {"model_type": "dinov3_vit", "image_size": 64, "patch_size": 16, "intermediate_size": 128, "num_register_tokens": 4}),
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64,
    "layer_norm_eps": 1e-12,
}  # fmt: skip


def tiny_rae(folder: Path, family="dinov2", image_size=64, statistics=False, encoder=None, **options) -> RAE:
    """Build an RAE with random weights, also in biases and norms. `encoder` overrides keys of the encoder's config."""
    cls, key, config = _ENCODERS[family]
    config = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 1, **config, **(encoder or {})}
    place = folder / f"encoder_{family}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    (folder / "decoder.json").write_text(json.dumps(DECODER))
    params = {key: str(place), "weights": "untrained", **options.pop("encoder_params", {})}
    rae = RAE(cls, str(place), params, folder / "decoder.json", 16, image_size, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in rae.decoder.named_parameters():
        if name != "decoder_pos_embed":
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if statistics:
        mean = torch.randn(rae.latent_shape, generator=generator)
        rae.set_statistics(mean, 0.01 + torch.rand(rae.latent_shape, generator=generator))
    freeze(rae)
    return rae


def loaded(rae: RAE, **description) -> LoadedModel:
    params = {source_key(type(rae.encoder).__name__): rae.encoder.source, "weights": "untrained"}
    values = {
        "source": "somewhere.ckpt", "weights": "ema", "step": 7, "epoch": 1, "encoder": rae.encoder.identity(), "config": None,
        "encoder_params": params,
    }  # fmt: skip
    return LoadedModel(rae, values | description)


def exported(rae: RAE, out: Path) -> Path:
    """Write an export folder as `src/export.py` does, with `stats.pt` if the model has statistics."""
    out.mkdir()
    write_folder(loaded(rae), out)
    write_own_statistics(rae, out, rae.encoder.identity())
    return out


def stir(network: nn.Module) -> None:
    """Add noise to every weight: near initialization a transformer hardly depends on its labels."""
    rng = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)


def equal_decoders(a: RAE, b: RAE) -> bool:
    ours, theirs = a.decoder.state_dict(), b.decoder.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def write_checkpoint(
    file: Path, rae: RAE, decoder: str | Path, config: dict, online=lambda weights: weights + 1, **model
) -> Path:
    """Write a checkpoint as training does, without optimizers and losses. `online` computes the online weights from the EMA's."""
    cls, source = type(rae.encoder).__name__, rae.encoder.source
    settings = dict.fromkeys(RAESettings.model_fields) | {
        "encoder_cls": cls, "encoder_config_path": source, "image_size": rae.geometry.image_size, "decoder_config_path": str(decoder),
        "encoder_params": {source_key(cls): source, "weights": "untrained", "layers": list(rae.encoder.layers)},
        "decoder_patch_size": rae.geometry.decoder_patch, "decoder_denormalize": rae.decoder_denormalize, "noise_tau": 0.8,
        "train_positions": False, "activation_checkpointing": False, **model,
    }  # fmt: skip
    average = rae.decoder.state_dict()
    state = {f"ema_decoder.{name}": value for name, value in average.items()}
    state |= {f"rae.decoder.{name}": online(value) for name, value in average.items()}
    state |= {
        f"rae.{name}": value for name in ("latent_mean", "latent_var") if (value := getattr(rae, name)) is not None
    }
    sizes = {f"decoder config: {name}": value for name, value in vars(rae.decoder.config).items()}
    content = {
        "format_version": FORMAT_VERSION, "config": {"model": settings, **config}, "encoder": rae.encoder.identity(), "global_step": 12,
        "epoch": 3, "state_dict": state, "architecture": {"model.decoder_denormalize": rae.decoder_denormalize, **sizes},
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


def checkpoint(folder: Path, statistics: bool = False, **options) -> Path:
    """Write a run folder with run.json and a checkpoint; return the checkpoint."""
    rae = tiny_rae(folder, statistics=statistics, **options)
    losses = {"optimizer": {"lr": 2e-4}, "ema_decay": 0.9978, "perceptual_weight": 1.0, "disc_weight": 0.75, "disc_start_epoch": 8,
              "lpips_arch": {"vgg_path": None, "linear_path": None, "weights": "tiny"}}  # fmt: skip
    config = {"data": {"data_dir": "/private/place/imagenet_hf", "batch_size": 8, "hf_split": "train", "train_split": 1.0},
              "trainer": {"accumulate_grad_batches": 4, "precision": 16}}  # fmt: skip
    file = write_checkpoint(folder / "run/checkpoints/last.ckpt", rae, folder / "decoder.json", config, **losses)
    record = {"experiment_name": "rae_tiny", "status": "finished", "started": "then", "ended": "now", "git": {"commit": "c0ffee", "clean": True}, "processes": 2,
              "device": "CPU", "data": {"train": 1234, "validation": 56, "fingerprint": "f00d"}, "result": {"val/psnr": 18.25, "rfid/score": 0.57, "rfid/images": 1000}}  # fmt: skip
    (folder / "run/run.json").write_text(json.dumps(record))
    return file


def photos(folder: Path, count: int = 6) -> Path:
    """Write PNG files of several sizes in two class folders."""
    generator = np.random.default_rng(0)
    for i in range(count):
        place = folder / ("cats" if i % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (70 + 10 * i, 90 + 5 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def two_processes(*words, code: int = 0) -> str:
    """Run a script on two ranks as torchrun does, without torchrun's start-up time; return both stdouts, or stderrs if it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = str(torch.get_num_threads())
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    started = [
        subprocess.Popen([sys.executable, *map(str, words)], cwd=PROJECT_ROOT, env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]  # fmt: skip
    ends = [(process.communicate(timeout=300), process.returncode) for process in started]
    assert all(found == code for _, found in ends), ends
    return "".join(said[bool(code)] for said, _ in ends)

"""The model card (README.md) of an export: what it is, how to use it, how good it is, where it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from src.formats.checkpoint import LoadedModel

_SCORE_NAMES = ("rfid", "rfid_untrained", "psnr", "ssim", "lpips", "lpips_untrained")
_USE = {
    "official": """`model.pt` is a state dict with the parameter names of the official RAE code. In this trainer:

    from src.models.rae import RAE
    rae = RAE(..., pretrained_decoder_path="model.pt")        # with the encoder and sizes named above""",
    "diffusers": """    from diffusers import AutoencoderRAE
    rae = AutoencoderRAE.from_pretrained("THIS_FOLDER")
    latents = rae.encode(images).latent                       # images: B x 3 x H x W, float in [0, 1]
    images = rae.decode(latents).sample

Latents are divided by (std + 1e-5) there and by sqrt(var + 1e-5) in the official code; `latents_std` is
sqrt(var + 1e-5) - 1e-5, so that both give the same numbers.""",
    "folder": """    from src.formats.folder import read_folder
    rae = read_folder("THIS_FOLDER").rae
    latents = rae.encode(images)                              # images: B x 3 x H x W, float in [0, 1]
    images = rae.decode(latents)

`model.pretrained_decoder_path` and `model.normalization_stat_path` of the trainer take this folder too.""",
}


def model_card(
    loaded: LoadedModel,
    fmt: str,
    dtype: str,
    facts: Mapping[str, Any],
    remarks: Sequence[str],
    hashes: Mapping[str, str],
) -> str:
    """Markdown. `facts` as `provenance` makes them; `hashes` sha256 by file name."""
    name = ((facts.get("run") or {}).get("experiment_name")) or "rae"
    parts = [
        _front_matter(fmt),
        f"# Representation autoencoder `{name}`",
        (
            "A frozen image encoder and a ViT decoder that turns its patch tokens back into the image (RAE stage 1, "
            "arXiv 2510.11690)."
        ),
        _warning(facts["untrained"]),
        "## Model\n\n" + _table(_model_rows(loaded, dtype, facts)),
        "## Use\n\n" + _USE[fmt] + "".join(f"\n\n{remark}" for remark in remarks),
        "## Scores\n\n" + _scores(facts),
        "## Training\n\n" + _training(facts),
        "## Files\n\n" + _table([(f"`{file}`", f"`{sha}`") for file, sha in hashes.items()], ("file", "sha256")),
        f"Written {facts['created']} by commit {_commit(facts['exporter'].get('git'))} from `{facts['source']}`"
        + (f" (sha256 `{facts['source_sha256']}`)." if facts.get("source_sha256") else "."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(fmt: str) -> str:
    library = "\nlibrary_name: diffusers" if fmt == "diffusers" else ""
    return f"---\ntags:\n- representation-autoencoder\n- rae\n- image-reconstruction{library}\n---"


def _warning(untrained: Sequence[str]) -> str:
    if not untrained:
        return ""
    consequence = "Random weights, asked for by name. Figures made with this model say nothing of the method."
    return f"> **UNTRAINED: {', '.join(untrained)}.** {consequence}"


def _model_rows(loaded: LoadedModel, dtype: str, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rae, encoder = loaded.rae, facts["encoder"]
    geometry, decoder = rae.geometry, rae.decoder.config
    channels, grid, _ = rae.latent_shape
    parameters = sum(p.numel() for p in rae.decoder.parameters()) / 1e6
    layers = encoder.get("layers")
    normalised = "as the encoder gives them" if rae.latent_mean is None else "normalised by per-element statistics"
    return [
        ("encoder", f"{encoder['class']} from `{encoder['source']}`, blocks {layers} ({encoder.get('layer_fusion')})"),
        ("encoder weights", f"digest {encoder['weights']}, config {encoder['config']}"),
        ("decoder", f"ViT, width {decoder.decoder_hidden_size}, {decoder.decoder_num_hidden_layers} blocks, "
         f"{decoder.decoder_num_attention_heads} heads, MLP {decoder.decoder_intermediate_size}; {parameters:.1f} M parameters"),
        ("image", f"{geometry.image_size} px, float in [0, 1]; encoder input {geometry.encoder_input_size} px"),
        ("latents", f"{channels} x {grid} x {grid}; {normalised}"),
        ("decoder output", "times the encoder's std plus its mean" if rae.decoder_denormalize else "the image itself"),
        ("latent noise in training", f"tau {rae.noise_tau:g}"),
        ("weights", f"{facts['weights']}, {dtype}"),
    ]  # fmt: skip


def _scores(facts: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str, str]] = []
    run = facts.get("run") or {}
    result, data = run.get("result") or {}, run.get("data") or {}
    held_out = data.get("validation")
    for name, value in sorted(result.items()):
        if name in ("val/psnr", "val/ssim", "val/lpips"):
            untrained = (
                " (UNTRAINED features)"
                if name == "val/lpips" and any(part.startswith("LPIPS") for part in facts["untrained"])
                else ""
            )
            rows.append((name + untrained, _number(value), f"{held_out} held-out images, EMA weights, no latent noise"))
        elif name.startswith("rfid") and name.split("/")[1] not in ("images", "seconds"):
            count = result.get(f"{name.split('/')[0]}/images")
            rows.append((name, _number(value), f"{count:,.0f} images, during training" if count else "during training"))
    for entry in facts.get("scores") or []:
        for name, value, protocol in _score_entry(entry):
            rows.append((name, value, protocol))
    if not rows:
        return "None are known: measure them with `python src/eval_rfid.py --decoder THIS_EXPORT --data_dir IMAGES`."
    return _table(rows, ("score", "value", "protocol"))


def _score_entry(entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, protocol) from what src/eval_rfid.py writes with --json."""
    shared = ", ".join(
        f"{name} {entry[name]}" for name in ("features", "quantization", "exif", "precision") if entry.get(name)
    )
    rows = []
    for result in entry["results"]:
        text = f"{result['images']:,} images, {result.get('split')} of `{result.get('data_dir')}`, {shared}"
        if result.get("layers") or result.get("noise_sigma"):
            text += f", blocks {result.get('layers') or 'as trained'}, latent noise {result.get('noise_sigma')}"
        rows += [(name, _number(result[name]), text) for name in _SCORE_NAMES if name in result]
    return rows


def _training(facts: Mapping[str, Any]) -> str:
    run, config = facts.get("run") or {}, facts.get("config") or {}
    data, model = run.get("data") or {}, config.get("model") or {}
    rows = [("steps", f"{facts['step']:,} (epoch {facts['epoch']})")] if facts.get("step") is not None else []
    if data:
        name = (config.get("data") or {}).get("data_dir", "unknown")
        rows.append(("data", f"`{name}`, {data.get('train'):,} training images, fingerprint {data.get('fingerprint')}"))
    if config:
        batch = (
            config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"] * (run.get("processes") or 1)
        )
        rows.append(("global batch", f"{batch} ({run.get('processes') or '?'} processes)"))
        rows.append(
            (
                "optimiser",
                (
                    f"AdamW, lr {model['optimizer']['lr']}, EMA {model['ema_decay']}, precision "
                    f"{config['trainer']['precision']}"
                ),
            )
        )
        rows.append(
            (
                "losses",
                (
                    f"L1 + {model['perceptual_weight']} LPIPS; GAN weight {model['disc_weight']} from epoch "
                    f"{model['disc_start_epoch']}"
                ),
            )
        )
    if run:
        rows.append(("commit", _commit(run.get("git"))))
        rows.append(("device", str(run.get("device"))))
        rows.append(("run", f"{run.get('started')} to {run.get('ended')}, {run.get('status')}"))
    return _table(rows) if rows else "The source says nothing about its training."


def _commit(git: Mapping[str, Any] | None) -> str:
    return "unknown" if not git else f"`{git['commit']}`" + ("" if git["clean"] else " with local changes")


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] | None = None) -> str:
    head = head or ("",) * len(rows[0])
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)

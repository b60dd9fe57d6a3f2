"""Write the model card (README.md) of an export: what the model is, how to use it, its scores and its origin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment

from src.models.encoder_presets import PRESETS
from src.models.rae import RAE

_SCORES = ("rfid", "rfid_untrained", "psnr", "ssim", "lpips", "lpips_untrained")


def model_card(rae: RAE, facts: Mapping[str, Any]) -> str:
    """Return the model card as Markdown. `facts`: the contents of `rae_export.json` (`src/formats/provenance.py`)."""
    source = Path(__file__).with_suffix(".md.j2").read_text(encoding="utf-8")
    template = Environment(undefined=ChainableUndefined, keep_trailing_newline=True).from_string(source)
    parameters = sum(p.numel() for p in rae.decoder.parameters())
    facts = {**facts, "run": facts.get("run") or {}, "config": facts.get("config") or {}, "scores": _scores(facts)}
    licences = {preset.hub_id: preset.licence for preset in PRESETS.values()}
    return template.render(rae=rae, decoder=rae.decoder.config, parameters=parameters, licences=licences, **facts)


def _scores(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, value, protocol) from the run record and from the output of `src/eval_rfid.py --json`."""
    rows: list[tuple[str, str, str]] = []
    run = facts.get("run") or {}
    result = run.get("result") or {}
    when = f"by the end of the run, step {result.get('step')}"  # the exported weights may be from an earlier step
    for name, value in sorted(result.items()):
        group, _, kind = name.partition("/")
        if name in ("val/psnr", "val/ssim", "val/lpips"):
            random = name == "val/lpips" and any(part.startswith("LPIPS") for part in facts["untrained"])
            held_out = (
                f"{(run.get('data') or {}).get('validation')} held-out images, EMA weights, no latent noise, {when}"
            )
            rows.append((name + " (UNTRAINED features)" * random, _number(value), held_out))
        elif group.startswith("rfid") and kind not in ("images", "seconds"):
            count = result.get(f"{group}/images")
            of = f"{count:,.0f} images, " if isinstance(count, float | int) and 0 < count < 1e15 else ""
            rows.append((name, _number(value), f"{of}EMA weights, {when}"))
    for entry in facts.get("scores") or []:
        keys = ("weights", "step", "features", "quantization", "exif", "precision")
        known = {**model, **entry} if isinstance(model := entry.get("model"), dict) else entry
        shared = ", ".join(f"{key} {known[key]}" for key in keys if known.get(key))
        for score in entry["results"]:
            text = f"{score['images']:,} images, {score.get('split')} of `{score.get('data_dir')}`, {shared}"
            if score.get("layers") or score.get("noise_sigma"):
                text += f", blocks {score.get('layers') or 'as trained'}, latent noise {score.get('noise_sigma')}"
            if entry.get("models"):
                text += f", of `{Path(score['model']).name}`"
            rows += [(name, _number(score[name]), text) for name in _SCORES if name in score]
    return rows


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)

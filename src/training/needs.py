"""Check that the weights a run needs are on this machine, before anything large is loaded."""

import shlex
from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig

from src.callbacks.gfid_callback import GFIDCallback
from src.callbacks.rfid_callback import RFIDCallback
from src.core.download import present, why_unreachable
from src.core.errors import UserError
from src.core.requirements import requirements
from src.core.weights import PROJECT_ROOT, resolve
from src.formats.checkpoint import stored
from src.models.encoder_presets import hub_assets, with_places


def require_weights(config: Mapping[str, Any], ask: bool) -> None:
    """Raise UserError listing every missing file and encoder, with the command that downloads them.

    ask: if only encoders are missing, ask the hub for each once; those it does not provide count as missing. False: skip
    missing encoders then, so that the hub is only asked after all other checks.
    """
    config = {**config, "model": with_places(config["model"])}
    if stored(config, "model.autoencoder.encoder") and not stored(config, "model.autoencoder.decoder"):
        return  # stage 2 without its autoencoder: opening it raises the error
    wanted = requirements(config, resolve(config["paths"]["weights_dir"]), PROJECT_ROOT)
    missing = [asset for asset in wanted if not present(asset)]
    reasons: dict[str, str] = {}
    if all(asset.path is None for asset in missing):
        reasons = {asset.name: why_unreachable(asset.name) for asset in missing} if ask else {}
        missing = [asset for asset in missing if reasons.get(asset.name)]
    if not any(asset.sources or asset.path is None for asset in missing):
        return  # the user's own files: reading them raises the error
    known = {asset.name: asset for asset in hub_assets().values()}
    lines = [
        f"  {asset.path or asset.name}: {known.get(asset.name, asset).what}{_alternative(asset.name, config)}"
        for asset in missing
    ]
    if reasons:
        lines += [f"  The hub did not provide it. {reason}" for reason in dict.fromkeys(reasons.values()) if reason]
    hydra = HydraConfig.get()
    experiment = hydra.runtime.choices.get("experiment")
    overrides = [word for word in hydra.overrides.task if word.startswith(("model", "callbacks", "paths.weights_dir="))]
    names = ["--experiment", experiment, *overrides] if experiment else [asset.name for asset in missing]
    raise UserError(
        f"{len(missing)} missing file(s) or encoder(s) that this run needs:\n"
        + "\n".join(lines)
        + f"\nDownload them with:\n  {shlex.join(['python', 'scripts/download_weights.py', *names])}\n"
        "If huggingface.co can't be reached, set a mirror with HF_ENDPOINT=https://…; for a machine without a connection see "
        "docs/weights.md."
    )


def _alternative(name: str, config: Mapping[str, Any]) -> str:
    """Return how to run without the file called `name`; empty if it is always needed."""
    scores = [kind.off for kind in (RFIDCallback, GFIDCallback) if kind.score in (config.get("callbacks") or {})]
    words = {
        "inception": "".join(scores[:1]),
        "discriminator": "model.disc_weight=0",
        **dict.fromkeys(("vgg16", "lpips"), "model.perceptual_weight=0"),
    }.get(name)
    return f"; not needed with {words}" if words else ""

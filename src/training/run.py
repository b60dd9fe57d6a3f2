"""A training run from its configuration to its record."""

import logging
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.callbacks.checkpoint import RunCheckpoint
from src.callbacks.startup import StartupTable, device_name
from src.core.errors import UserError
from src.core.launch import Launch
from src.models.encoder_presets import expand_encoder
from src.training import logs
from src.training.folder import run_folder
from src.training.geometry_check import check_geometry
from src.training.record import RunRecord
from src.training.resume import announce_resume, find_checkpoint
from src.training.settings import check_keys
from src.training.summary import summary
from src.training.trainer import build_trainer

log = logging.getLogger(__name__)

KNOWN_KEYS = frozenset(
    ("data", "model", "callbacks", "logger", "trainer", "paths", "experiment_name", "seed", "ckpt_path", "preflight")
)
"""Of `configs/train.yaml`."""
KNOWN_CALLBACKS = frozenset(("rfid", "checkpoint", "throughput", "samples", "progress"))
"""Those whose settings may stay where the callback itself is left out."""


def run(config: DictConfig) -> float | None:
    """Train. Mistakes of the user end with one message and status 1, everything else with its traceback."""
    try:
        return _run(config)
    except UserError as error:
        if not error.reported:
            _say(error)
        raise SystemExit(1) from None
    except OmegaConfBaseException as error:
        _say(UserError(f"Configuration: {str(error).strip()}"))
        raise SystemExit(1) from None


def _run(config: DictConfig) -> float | None:
    launch = Launch.detect()
    logs.set_up(None, launch.main)
    refuse_unknown(config)
    _require_given(config)
    check_geometry(OmegaConf.to_container(config.model, resolve=True))  # type: ignore[arg-type]
    checkpoint = find_checkpoint(config.ckpt_path, config.paths.log_dir, config.experiment_name)
    if config.preflight:
        return _preflight(config, launch)
    folder = run_folder(config.paths.log_dir, _wanted_folder(config), launch)
    config.paths.run_dir = str(folder)
    warnings = logs.set_up(folder, launch.main)
    record = RunRecord(folder, config.experiment_name, launch.main)
    if launch.main:
        _save_config(config, folder)
        record.update({})
    if checkpoint is not None:
        log.info("Resuming from %s", checkpoint)
        record.update({"resumed_from": str(checkpoint)})
    built = None
    try:
        built = build_run(config, launch)
        result = fit(built, checkpoint, record)
    except BaseException as error:
        status = {SystemExit: "terminated", KeyboardInterrupt: "interrupted"}.get(type(error), "failed")
        reason = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception_only(error)).strip()
        if isinstance(error, UserError) and launch.main:
            log.error("%s", reason)
            error.reported = True
        record.finish(status, warnings.messages, error=reason)
        if built is not None and status == "failed":
            end_children(built.trainer)
        raise
    record.finish("finished", warnings.messages, result=result)
    return result.get("val/loss")


def refuse_unknown(config: DictConfig) -> None:
    """Hydra checks what is overridden; what an experiment file or a `+` adds at the top or as a callback, nobody else does."""
    check_keys(config, KNOWN_KEYS, set(), "configuration")
    check_keys(config.callbacks or {}, KNOWN_CALLBACKS | _with_target(config.callbacks), set(), "callbacks")


def _with_target(group: DictConfig | None) -> set[str]:
    return {str(name) for name, node in (group or {}).items() if node and "_target_" in node}


def _require_given(config: DictConfig) -> None:
    """An experiment may leave a place to the user. (`???` can't: it gives way to the null of the model's config.)"""
    if config.model.pretrained_decoder_path == "required":
        raise UserError(
            f"{config.experiment_name} starts from a decoder: add model.pretrained_decoder_path=PATH to the command. PATH is a "
            "decoder file with the official names (model.pt), a folder that src/export.py wrote, a diffusers AutoencoderRAE "
            "folder, or a .ckpt of a run."
        )


def _preflight(config: DictConfig, launch: Launch) -> None:
    from src.training.preflight import preflight

    logs.set_up(None, launch.main)
    run = build_run(config, launch, bare=True)
    preflight(run)


@dataclass(frozen=True)
class Run:
    """Everything that a configuration stands for, built and not yet started."""

    trainer: pl.Trainer
    module: pl.LightningModule
    datamodule: pl.LightningDataModule
    config: dict[str, Any]


def build_run(config: DictConfig, launch: Launch, bare: bool = False) -> Run:
    """Cheap mistakes are found first. `bare`: without loggers and callbacks, so that nothing is written."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    plain["model"] = expand_encoder(plain["model"])  # a checkpoint keeps what a preset stood for
    pl.seed_everything(config.seed, workers=False, verbose=False)
    datamodule = build(config.data, "data")
    callbacks = [] if bare else [StartupTable(), *build_all(config.callbacks, "callbacks")]
    loggers = build_all(config.logger, "logger") if launch.main and not bare else []
    trainer = build_trainer(
        plain["trainer"], launch, callbacks, loggers, plain["paths"]["run_dir"] or plain["paths"]["log_dir"]
    )
    datamodule.trainer = trainer
    if trainer.is_global_zero:
        datamodule.prepare_data()
        datamodule.setup()
        _ = datamodule.order  # too few images are noticed before large weights are read
    module = build(config.model, "model")
    module.run_config = plain
    for logger in loggers:
        logger.log_hyperparams(plain)
    return Run(trainer, module, datamodule, plain)


def fit(run: Run, checkpoint: Path | None, record: RunRecord) -> dict[str, Any]:
    trainer, datamodule = run.trainer, run.datamodule
    record.update({"device": device_name(trainer.strategy.root_device), "processes": trainer.world_size})
    for callback in trainer.callbacks:
        if isinstance(callback, RunCheckpoint):
            callback.resumed_from = checkpoint
    if checkpoint is not None and trainer.is_global_zero:
        announce_resume(checkpoint, run.config, trainer.world_size)
    try:
        trainer.fit(run.module, datamodule=datamodule, ckpt_path=checkpoint)
    finally:  # Lightning leaves this out on the way of an exception, and loading processes would outlive their use
        datamodule.teardown("fit")
    record.update(
        {
            "data": {
                "fingerprint": datamodule.fingerprint,
                "train": datamodule.train_size,
                "validation": datamodule.val_size,
            }
        }
    )
    return summary(trainer, run.module)


def end_children(trainer: pl.Trainer) -> None:
    """Of a run that failed here: the processes that Lightning started would wait for this one and hold their GPUs. The
    last thing to do, since Lightning ends this process too when it sees one of them fail."""
    kill = getattr(trainer.strategy.launcher, "kill", None)
    if kill is not None:
        kill(signal.SIGKILL)


def build_all(group: DictConfig | None, key: str) -> list[Any]:
    """Nodes without a `_target_` are settings for a part that this run leaves out."""
    return [build(node, f"{key}.{name}") for name, node in (group or {}).items() if node and "_target_" in node]


def build(node: DictConfig, key: str) -> Any:
    """Instantiate a config node; keys that its class does not know are the user's mistake."""
    try:
        return instantiate(node, _recursive_=False, _convert_="all")
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, TypeError) and "argument" in str(cause):
            raise UserError(
                f"{key}: {cause}. The keys that {node._target_} takes are in configs/{key.split('.')[0]}/."
            ) from cause
        if isinstance(cause, ModuleNotFoundError):
            raise UserError(f"{key}: {cause}. Install it, or choose another config for this group.") from cause
        raise


def _wanted_folder(config: DictConfig) -> str | None:
    if config.paths.run_dir:
        return str(config.paths.run_dir)
    hydra = HydraConfig.get()
    return str(hydra.runtime.output_dir) if hydra.mode == RunMode.MULTIRUN else None


def _save_config(config: DictConfig, folder: Path) -> None:
    """The three files that Hydra users expect in .hydra/."""
    target = folder / ".hydra"
    target.mkdir(exist_ok=True)
    hydra = HydraConfig.get()
    OmegaConf.save(config, target / "config.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": OmegaConf.to_container(hydra, resolve=False)}), target / "hydra.yaml")
    OmegaConf.save(OmegaConf.create(list(hydra.overrides.task)), target / "overrides.yaml")


def _say(error: UserError) -> None:
    print(f"\nError: {error}", file=sys.stderr)

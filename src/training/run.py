"""Run training: check the configuration, build all parts, fit, write the record."""

import logging
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from src.callbacks.metrics_csv import MetricsCsv
from src.callbacks.progress import StartupTable, device_name
from src.core.distributed import Launch
from src.core.errors import UserError, lacks_memory
from src.core.files import DISK_ERRORS, disk_message
from src.core.folder_lock import take_lock
from src.core.json_files import read_json
from src.core.settings import Settings, check_keys, class_at
from src.core.stopping import KILL, STOP, end_with_parent, listening, signal_name, status_of
from src.core.text import flat, masked, table, typed
from src.core.weights import resolve
from src.models.encoder_presets import expand_encoder
from src.training import logs
from src.training.module import StageModule
from src.training.needs import require_weights
from src.training.preflight import preflight
from src.training.record import RunRecord, make_folder, save_config, summary
from src.training.resume import announce_resume, find_checkpoint
from src.training.trainer import TrainerSettings, build_trainer

log = logging.getLogger(__name__)

KNOWN_CALLBACKS = frozenset(("rfid", "gfid", "checkpoint", "samples", "progress"))
"""Callbacks whose settings may remain in the config when the callback itself is left out."""

_INCOMPATIBLE = {
    "StochasticWeightAveraging": "Set model.ema_decay.",
    "WeightAveraging": "Set model.ema_decay.",
    "GradientAccumulationScheduler": "Set trainer.accumulate_grad_batches.",
    "LearningRateFinder": "Try several values: -m model.optimizer.lr=1e-4,2e-4",
    "BatchSizeFinder": "preflight=true checks whether data.batch_size fits.",
}
"""Lightning callbacks that have no effect here, fail, or write checkpoints that do not resume; with the alternative."""


class PathSettings(Settings):
    """The node `paths:`."""

    log_dir: str
    weights_dir: str
    run_dir: str | None


class RunSettings(Settings):
    """The whole configuration, `configs/train.yaml`. Nodes of type Mapping are checked by the classes they configure."""

    experiment_name: str
    tags: list[str]
    optimized_metric: str
    seed: int = Field(ge=0, lt=2**32)
    ckpt_path: str | None
    preflight: bool
    paths: PathSettings
    trainer: TrainerSettings
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    callbacks: Mapping[str, Mapping[str, Any] | None] | None
    logger: Mapping[str, Mapping[str, Any] | None] | None


JOBS: list[tuple[str, str, str]] = []
"""Jobs of this sweep so far: overrides, `finished` or `failed`, and `optimized_metric` or the reason."""


def run(config: DictConfig) -> float | None:
    """Train. A user error ends with one message and exit code 1, any other error with its traceback.

    A sweep continues with its next job after an error (see `sweep_status`), but not after a signal. Returns the last value
    of `optimized_metric`; None if it was not logged or the job failed.
    """
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN and "BasicLauncher" in str(HydraConfig.get().launcher._target_)
    try:
        with _process_state(), listening() as stop, ExitStack() as held:
            result = _run(config, held).get(config.optimized_metric)
            late = stop.code
        if sweep and late >= 128:  # the signal came after this job, but stops the next
            raise SystemExit(late)
        if sweep:
            value = "was not logged" if result is None else f"{result:.4f}"
            JOBS.append((_swept_values(), "finished", f"{config.optimized_metric} {value}"))
        return result
    except Exception as error:
        text = _message(error)
        if text is None and not sweep:
            raise
        log.error("%s", text or traceback.format_exc().strip())
        if not sweep:
            raise SystemExit(1) from None
        JOBS.append((_swept_values(), "failed", " ".join((text or repr(error)).split())[:300]))
        return None


def _message(error: Exception) -> str | None:
    """Return the message shown instead of a traceback; None for an unexpected error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (error.errno in DISK_ERRORS or "tfevents" in str(error.filename)):
        return disk_message(error)  # TensorBoard also fails if the run folder was removed
    known = str(error).lstrip().startswith(("Early stopping conditioned on", "`val_check_interval`"))
    if isinstance(error, MisconfigurationException | ModuleNotFoundError) or known:
        return " ".join(str(error).split())  # Lightning's message for a user error, or a missing package of a callback
    if isinstance(error, OmegaConfBaseException):
        return f"Configuration: {str(error).strip()}"
    first_line = (str(error) or "for Python objects").splitlines()[0].rstrip(".")
    if "Too many open files" in str(error):
        return f"Too many open files: {first_line}. Raise the limit with `ulimit -n 4096` in the shell, or lower data.num_workers."
    if isinstance(error, RuntimeError) and re.search("Connection (reset|closed) by peer", str(error)):  # gloo's
        return (
            f"Another process of this run is gone ({first_line}). See its own messages or the kernel's "
            "(`dmesg`) for the reason; saved checkpoints are intact, resume with ckpt_path=last."
        )
    if lacks_memory(error):
        return (
            f"Not enough memory: {first_line}. Lower data.batch_size "
            "(and raise trainer.accumulate_grad_batches to match), model.loss_chunk_size, data.image_size, or use smaller "
            "networks; see docs/troubleshooting.md, CUDA out of memory. preflight=true checks this before a run."
        )
    return None


def _swept_values() -> str:
    """Return the swept values of this job, as typed."""
    task = list(HydraConfig.get().overrides.task)
    swept = [word.split("=", 1)[0] for word in sys.argv[1:] if re.search("[,(]", word) and word not in task]
    swept += list(HydraConfig.get().sweeper.get("params") or {})
    return " ".join(word for word in task if word.split("=", 1)[0] in swept) or f"job {HydraConfig.get().job.num}"


def sweep_status() -> int:
    """Print a table of the sweep's jobs and return the exit code: 1 if any of them failed."""
    if JOBS:
        rows = [(point, f"{status:<8}  {value}") for point, status, value in JOBS]
        print(f"The sweep, {len(JOBS)} jobs:\n{table(rows)}", file=sys.stderr)  # logging belongs to Hydra here
    return int(any(status == "failed" for _, status, _ in JOBS))


def _run(config: DictConfig, held: ExitStack) -> dict[str, Any]:
    """Train and return the final metrics by logged name. `held`: resources released when the run ends."""
    launch, sweep = Launch.detect(), HydraConfig.get().mode == RunMode.MULTIRUN
    STOP.loud = launch.main
    logs.set_up(None, launch.main)
    _depend_on_parent(launch, config.ckpt_path)
    check_config(config)
    checkpoint = find_checkpoint(config.ckpt_path, config.paths.log_dir, config.experiment_name)
    if launch.main:
        require_weights(_plain(without_starting_weights(config) if checkpoint else config), ask=False)
    if sweep:  # processes started by Lightning must get the command line of this job, not of the sweep
        words = [word for word in sys.argv[1:] if word not in ("-m", "--multirun")]
        flags = [word for word in words if word.startswith("-") or not ("=" in word or word.startswith("~"))]
        sys.argv[1:] = [*flags, *HydraConfig.get().overrides.task]
    folder, fresh = None, list[Path]()
    if launch.main and not config.preflight:
        own = sweep or HydraConfig.get().run.dir != "."  # "." is the default in configs/hydra/default.yaml
        wanted = config.paths.run_dir or (HydraConfig.get().runtime.output_dir if own else None)
        existed = wanted and resolve(wanted).exists()
        folder = make_folder(config.paths.log_dir, wanted, checkpoint)
        fresh = [] if existed else [folder] if wanted else [folder, folder.parent]
        held.enter_context(take_lock(folder))
        config.paths.run_dir = str(folder)
        save_config(config, folder)
    warnings = logs.set_up(folder, launch.main)
    record = RunRecord(folder, config.experiment_name)
    STOP.before_exit = lambda code: record.finish(
        status_of(code), warnings.messages, error=f"ended at once by {signal_name(code)}"
    )
    record.update({"tags": list(config.tags), **({"resumed_from": str(checkpoint)} if checkpoint else {})})
    built = None
    try:
        built = build_run(config, launch, checkpoint, bare=config.preflight)
        if config.preflight:
            preflight(built)
            return {}
        result = fit(built, checkpoint, record)
    except BaseException as error:
        status = status_of(STOP.code) if isinstance(error, SystemExit) else "failed"
        reason = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception_only(error)).strip()
        with suppress(OSError):  # report the first error, not this one
            record.finish(status, warnings.messages, error=signal_name(STOP.code) if status != "failed" else reason)
        if fresh and isinstance(error, UserError) and (built is None or not built.module.train_terms):
            logs.set_up(None, launch.main)  # closes run.log
            held.close()
            _remove(fresh)
        if built and status == "failed":
            _kill_children(built.trainer)
        raise
    record.finish("finished", warnings.messages, result=result)
    return result


def _depend_on_parent(launch: Launch, ckpt_path: str | None) -> None:
    """Make this process end with its parent. Raises UserError if torchrun restarted the run without `ckpt_path`."""
    if launch.kind == "child":  # without rank 0 nothing can be saved
        end_with_parent(KILL)
    elif "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun forwards the first Ctrl-C and is ended by the second
        end_with_parent(signal.SIGINT)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and ckpt_path is None:
        raise UserError(
            "Restarted by torchrun (--max-restarts), this run would begin again at step 0. Use ckpt_path=last, so that "
            "restarts resume, or --max-restarts=0."
        )


def _remove(fresh: list[Path]) -> None:
    """Remove the new run folder, and its parent if that is empty."""
    shutil.rmtree(fresh[0], ignore_errors=True)
    for day in fresh[1:]:
        with suppress(OSError):  # it holds other runs
            day.rmdir()


def _kill_children(trainer: pl.Trainer) -> None:
    """Kill the processes that Lightning started: they would wait for this one and hold their GPUs."""
    children = getattr(trainer.strategy.launcher, "procs", [])
    while children:  # pop first: if a listed process fails, Lightning kills this one before the error is shown
        children.pop().kill()


@contextmanager
def _process_state() -> Iterator[None]:
    """Restore the process for the next job of a sweep: Lightning leaves ranks, a process group and thread counts."""
    environment, arguments, threads = dict(os.environ), list(sys.argv), torch.get_num_threads()
    code = 1
    try:
        yield
        code = 0
    finally:
        if wandb := sys.modules.get("wandb"):  # else the next job would continue this one's W&B run
            wandb.finish(exit_code=code)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:] = arguments
        torch.set_num_threads(threads)


def check_config(config: DictConfig) -> None:
    """Check what needs neither data nor weights: unknown keys, sizes that don't fit, values an experiment leaves to the user.

    Hydra only checks overrides, not the keys that an experiment file or a `+` adds. Raises UserError.
    """
    plain = _plain(config)
    if empty := [key for key, value in flat(plain).items() if value == "" and not key.startswith("logger.")]:
        raise UserError(
            f"No value after {', '.join(f'{key}=' for key in empty)}: give a value, or null for none. Is a shell "
            "variable unset?"
        )
    RunSettings.parse(plain, "")
    callbacks = plain["callbacks"] or {}
    check_keys(callbacks, KNOWN_CALLBACKS | _active_nodes(callbacks).keys(), "callbacks")
    model = plain["model"]
    if "_target_" not in model:
        name = HydraConfig.get().runtime.choices.get("model")
        raise UserError(
            f"configs/model/{name}.yaml lacks most keys because it has no base. Put at its top\n"
            "    defaults:\n      - base\n(dit_base for stage 2), or copy configs/model/rae.yaml."
        )
    _check_part(plain["data"], "data", pl.LightningDataModule)
    for name, node in _active_nodes(callbacks).items():
        _check_part(node, f"callbacks.{name}", pl.Callback)
    for name, node in _active_nodes(plain["logger"]).items():
        _check_part(node, f"logger.{name}", pl.loggers.Logger)
        if not isinstance(given := node.get("name"), str | None):  # Lightning would fail at the first logged value
            raise UserError(f"logger.{name}.name={typed(given)}: expected text or null.")
    _check_part(plain["model"], "model", StageModule)


def _check_part(node: Mapping[str, Any], key: str, base: type) -> None:
    """Check the class of a node and, for classes with `check_arguments`, its arguments; others fail when they are built."""
    cls = class_at(node.get("_target_"), base, f"{key}._target_")
    if instead := next((_INCOMPATIBLE[part.__name__] for part in cls.__mro__ if part.__name__ in _INCOMPATIBLE), None):
        raise UserError(
            f"{key}: {cls.__name__} is not compatible with the manual optimisation and checkpoints here. {instead}"
        )
    if check := getattr(cls, "check_arguments", None):
        check({name: value for name, value in node.items() if name != "_target_"})


@dataclass(frozen=True)
class Run:
    """All parts built from a configuration, not yet started."""

    trainer: pl.Trainer
    module: pl.LightningModule
    datamodule: pl.LightningDataModule
    config: dict[str, Any]
    callbacks: list[pl.Callback]
    """Callbacks of the configuration, also when the trainer is bare."""


def build_run(config: DictConfig, launch: Launch, checkpoint: Path | None = None, bare: bool = False) -> Run:
    """Build all parts, the quickest to fail first.

    `checkpoint`: the run resumes from it. `bare`: build the trainer without loggers and callbacks, so that it writes nothing.
    """
    plain, needed = _plain(config), without_starting_weights(config) if checkpoint else config
    plain["model"] = expand_encoder(plain["model"])  # checkpoints store the expanded preset
    pl.seed_everything(config.seed, workers=False, verbose=False)
    datamodule = build(config.data, "data")
    callbacks = [build(node, f"callbacks.{name}") for name, node in _active_nodes(config.callbacks).items()]
    writes = launch.main and not bare
    loggers = build_loggers(config.logger, plain["paths"]["run_dir"], checkpoint) if writes else []
    root = plain["paths"]["run_dir"] or plain["paths"]["log_dir"]
    used = [] if bare else [StartupTable(), *callbacks]
    trainer = build_trainer(plain["trainer"], launch, used, loggers, root)
    datamodule.trainer = trainer
    datamodule.same_epoch = bool(config.trainer.overfit_batches)
    if trainer.is_global_zero:
        datamodule.prepare_data()
        datamodule.setup()
        _ = datamodule.order  # notice too few images before loading large weights
        require_weights(_plain(needed), ask=True)
    module = build(needed.model, "model")
    kept = masked(plain)
    module.run_config = kept
    for logger in loggers:
        try:
            logger.log_hyperparams(kept)
        except Exception as error:
            if not type(error).__module__.startswith("wandb."):
                raise
            raise UserError(
                f"Weights & Biases: {' '.join(str(error).split())} Without an account or a connection: WANDB_MODE=offline, or "
                "logger.wandb.offline=true."
            ) from error
    return Run(trainer, module, datamodule, kept, callbacks)


def without_starting_weights(config: DictConfig) -> DictConfig:
    """Return `config` for a resume, which takes its weights from the checkpoint: the files may be gone."""
    started = {key: None for key in ("pretrained_decoder_path", "pretrained_path") if key in config.model}
    return OmegaConf.merge(config, {"model": started})  # type: ignore[return-value]


def _plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def fit(run: Run, checkpoint: Path | None, record: RunRecord) -> dict[str, Any]:
    """Train, resuming from `checkpoint` if given, and return the final metrics by logged name."""
    trainer, data = run.trainer, run.datamodule
    if trainer.is_global_zero:
        sizes = {"fingerprint": data.fingerprint, "train": data.train_size, "validation": data.val_size}
        device = device_name(trainer.strategy.root_device)
        record.update({"device": device, "processes": trainer.world_size, "data": sizes})
        if at_wandb := [found.version for found in trainer.loggers if isinstance(found, WandbLogger)]:
            record.update({"wandb_run": at_wandb[0]})
        if checkpoint is not None:
            log.info("Resuming from %s", checkpoint)
            announce_resume(checkpoint, run.config, trainer.world_size)
    try:
        trainer.fit(run.module, datamodule=data, ckpt_path=checkpoint)
    finally:  # Lightning skips this after an exception, which would leave workers running
        data.teardown("fit")
    return summary(trainer, run.module)


def build(node: DictConfig, key: str) -> Any:
    """Instantiate a config node. Raises UserError for keys or values that its class refuses."""
    try:
        return instantiate(node, _recursive_=False, _convert_="all")
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, ModuleNotFoundError):
            raise UserError(f"{key}: {cause}. Install it, or choose another config for this group.") from cause
        if not str(node._target_).startswith("src."):
            group = key.split(".")[0]
            raise UserError(f"{key}: {node._target_} refuses its arguments, see configs/{group}/: {cause}") from cause
        raise cause from None


def build_loggers(group: DictConfig | None, folder: str, checkpoint: Path | None) -> list[Any]:
    """Return the loggers of a run in `folder`. Continues the Weights & Biases run of `checkpoint`, if it has one."""
    parts = _active_nodes(group)
    for name, node in parts.items():
        if checkpoint and "id" in node and node.id is None:  # Weights & Biases
            with suppress(UserError):  # written with another logger, or by an older version
                before = read_json(checkpoint.parents[1] / "run.json", wandb_run=str)["wandb_run"]
                parts[name] = OmegaConf.merge({**node}, {"id": before})
    return [*(build(node, f"logger.{name}") for name, node in parts.items()), MetricsCsv(folder)]


def _active_nodes(group: DictConfig | None) -> dict[str, DictConfig]:
    """Return the nodes with a `_target_`; the others are settings for parts that this run leaves out."""
    return {str(name): node for name, node in (group or {}).items() if node and "_target_" in node}

"""Build a Lightning Trainer from the node `trainer:`."""

import logging
import os
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import ConfigDict, Field
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from src.callbacks.checkpoint import AtomicCheckpointIO
from src.core.distributed import Launch
from src.core.errors import UserError
from src.core.settings import Settings

log = logging.getLogger(__name__)

TAKEN_OVER = ("accumulate_grad_batches", "gradient_clip_val", "max_skipped_steps", "overfit_batches")
"""Keys handled by the training module, since Lightning refuses them under manual optimisation."""
_PRECISION = {
    "32": "32-true", "32-true": "32-true", "fp32": "32-true",
    "16": "16-mixed", "16-mixed": "16-mixed", "fp16": "16-mixed",
    "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed",
}  # fmt: skip
_REFUSED = {
    "callbacks": "use the config group callbacks: +callbacks.NAME._target_=CLASS, ~callbacks.NAME",
    "default_root_dir": "set paths.log_dir (a folder for all runs) or paths.run_dir",
    "enable_checkpointing": "callbacks=no_checkpoint disables checkpoints",
    "enable_model_summary": "+callbacks.layers._target_=pytorch_lightning.callbacks.ModelSummary shows one",
    "enable_progress_bar": "the bar is only shown on a terminal; 2>FILE hides it",
    "gradient_clip_algorithm": "gradients are clipped by norm, to trainer.gradient_clip_val",
    "logger": "use the config group logger: logger=csv only writes metrics.csv",
    "plugins": "they follow from trainer.precision, trainer.strategy and SLURM's variables",
    "use_distributed_sampler": "the data module sets the order of the images",
}
"""Arguments of Lightning's Trainer that are refused, with what to use instead."""

Count = Annotated[int, Field(ge=1)]
Devices = (
    Annotated[int, Field(ge=1, le=1024)] | Annotated[list[Annotated[int, Field(ge=0, le=1024)]], Field(min_length=1)]
)


class TrainerSettings(Settings):
    """The node `trainer:`. Other arguments of Lightning's Trainer may be added with `+`; Lightning checks them.

    The `TAKEN_OVER` keys are checked with the module's settings.
    """

    model_config = ConfigDict(extra="allow")

    target: Literal["pytorch_lightning.Trainer"] = Field(alias="_target_")
    accelerator: Literal["auto", "gpu", "cuda", "cpu", "mps"]
    devices: Literal["auto", -1] | Devices = Field(
        description="auto, a number of devices (up to 1024; -1: all GPUs), or a list of device numbers from 0"
    )
    num_nodes: Annotated[int, Field(ge=1, le=65536)]
    strategy: Literal["auto", "ddp"] = Field(
        description="auto or ddp. Sharded strategies are not offered: the frozen networks and the decoder fit one GPU, and the "
        "adaptive weight needs whole gradients (docs/distributed.md)"
    )
    precision: Literal[16, 32, *_PRECISION] = Field(description="32, 16 or bf16")  # type: ignore[valid-type]
    float32_matmul_precision: Literal["highest", "high"]
    max_epochs: Count
    max_steps: Literal[-1] | Count = Field(description="a number of updates, or -1 for no limit besides max_epochs")
    limit_train_batches: Count | Annotated[float, Field(gt=0, le=1)] = Field(
        description="a number of batches of at least 1, or a share of an epoch as a decimal, above 0 and up to 1.0"
    )
    limit_val_batches: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] = Field(
        description="a number of batches, 0 for no validation, or a share as a decimal up to 1.0"
    )
    check_val_every_n_epoch: Count | None
    num_sanity_val_steps: Annotated[int, Field(ge=-1)]
    overfit_batches: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] = Field(
        description="a number of batches, 0: off, or a share as a decimal up to 1.0"
    )
    fast_dev_run: bool | Count = Field(description="true, false or a number of updates")
    profiler: Literal["simple", "advanced", "pytorch"] | None
    detect_anomaly: bool
    deterministic: bool | Literal["warn"] = Field(description="true, false or warn")


def build_trainer(
    config: dict[str, Any], launch: Launch, callbacks: list[Any], loggers: list[Any], root: str
) -> pl.Trainer:
    """Return the trainer. `root`: the run folder. Raises UserError for values that this machine or Lightning can't use."""
    for key in _REFUSED.keys() & config.keys():
        raise UserError(f"trainer.{key} is not passed on to Lightning: {_REFUSED[key]}.")
    settings = {key: value for key, value in config.items() if key not in (*TAKEN_OVER, "_target_")}
    accelerator = _accelerator(settings["accelerator"])
    on_gpu = accelerator == "gpu"
    distributed = settings["strategy"] == "ddp" or launch.world > 1 or _has_several_devices(settings["devices"])
    settings["accelerator"] = accelerator
    if launch.kind == "torchrun":
        settings |= _torchrun_devices(settings["devices"], settings["num_nodes"], launch)
    else:
        settings["devices"] = _devices(settings["devices"], on_gpu, distributed, launch)
    settings["precision"] = precision(settings["precision"], on_gpu)
    if accelerator == "mps" and settings["precision"] != "32-true":
        raise UserError("trainer.accelerator=mps: only trainer.precision=32 is offered there.")
    if config["overfit_batches"]:
        settings["limit_train_batches"] = settings["limit_val_batches"] = config["overfit_batches"]
    if config["fast_dev_run"]:
        settings["fast_dev_run"] = int(config["fast_dev_run"]) * config["accumulate_grad_batches"]
        callbacks = [c for c in callbacks if not isinstance(c, pl.callbacks.Checkpoint)]
    settings["profiler"] = _profiler(settings["profiler"], root) if launch.main else None
    matmul_precision = settings.pop("float32_matmul_precision")
    if on_gpu:
        torch.set_float32_matmul_precision(matmul_precision)
    if on_gpu and matmul_precision == "highest" and settings["precision"] == "32-true":
        log.info(
            "float32 matrix products run in full precision: trainer.float32_matmul_precision=high (TF32) or trainer.precision=bf16 "
            "is faster."
        )
    # Every trained parameter gets a gradient in the one backward pass, so there are no unused ones to find; there are no
    # buffers to synchronise; gradients as bucket views save a copy of the model.
    ddp = DDPStrategy(find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True)
    environment = _environment(launch, settings["devices"])
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that slows down `deterministic`
    try:
        trainer = pl.Trainer(
            **{**settings, "strategy": ddp if distributed else "auto"},
            callbacks=callbacks,
            logger=loggers,
            plugins=[AtomicCheckpointIO(), *environment],
            default_root_dir=root,
            use_distributed_sampler=False,  # the data module sets the order; Lightning's sampler would shuffle evaluation
            enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            enable_progress_bar=any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks),
            enable_model_summary=False,
        )
        trainer._signal_connector.register_signal_handlers = lambda: None  # src/core/stopping.py handles them
        return trainer
    except Exception as error:  # Lightning's own checks raise many types
        raise UserError(
            f"trainer: {str(error).rstrip('.')}. Keys are listed in configs/trainer/default.yaml."
        ) from error


def _environment(launch: Launch, devices: Any) -> list[Any]:
    """Return the cluster environment plugin; empty if Lightning detects it or starts the processes itself. Raises UserError for a
    SLURM job that does not set its number of tasks per node."""
    if launch.kind == "torchrun":
        os.environ.setdefault("LOCAL_RANK", str(launch.rank % devices))
        return [TorchElasticEnvironment()]
    if not SLURMEnvironment.detect():
        return []
    if int(tasks := os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"This SLURM job has {tasks} tasks by --ntasks alone, which does not set the number per machine. Pass "
            f"--nodes and --ntasks-per-node to sbatch and srun, such as --nodes=1 --ntasks-per-node={tasks}."
        )
    return [SLURMEnvironment(auto_requeue=False)]  # Lightning's requeue would start from scratch


def _profiler(name: str | None, folder: str) -> pl.profilers.Profiler | None:
    """Return Lightning's profiler, which writes its table (pytorch: also a trace) to `folder`."""
    kinds = {"simple": "SimpleProfiler", "advanced": "AdvancedProfiler", "pytorch": "PyTorchProfiler"}
    if name is None:
        return None
    log.info("Profile: %s", os.path.join(folder, "fit-profile.txt"))
    return getattr(pl.profilers, kinds[name])(dirpath=folder, filename="profile")


def precision(wanted: Any, on_gpu: bool) -> str:
    """Return Lightning's name for `trainer.precision`; fp16 on a CPU becomes bf16."""
    name = _PRECISION[str(wanted).removesuffix(".0")]
    if name == "16-mixed" and not on_gpu:
        log.info(
            "trainer.precision=16: a CPU has no fp16 training, so bf16 is used. On a CPU without bf16 instructions "
            "trainer.precision=32 is faster."
        )
        name = "bf16-mixed"
    return name


def _accelerator(wanted: str) -> str:
    """Return Lightning's accelerator name: gpu (CUDA), mps or cpu. Raises UserError if it is not available."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted in ("gpu", "cuda") and not cuda:
        raise UserError(
            f"trainer.accelerator={wanted}, but no CUDA device is visible. Use trainer=cpu, or check CUDA_VISIBLE_DEVICES and "
            f"nvidia-smi.{' On this Mac trainer.accelerator=mps is available.' * mps}"
        )
    if wanted == "mps" and not mps:
        raise UserError(
            "trainer.accelerator=mps, but this torch has no MPS: it needs a Mac with Apple silicon. Use trainer=cpu."
        )
    return "mps" if wanted == "mps" else "gpu" if cuda and wanted != "cpu" else "cpu"


def _has_several_devices(devices: Any) -> bool:
    """Return whether there are several devices, for which Lightning would choose DDP with its own settings."""
    count = len(devices) if isinstance(devices, list) else devices
    return {"auto": 1, -1: torch.cuda.device_count()}.get(count, count) > 1


def _torchrun_devices(devices: Any, nodes: int, launch: Launch) -> dict[str, int]:
    """Return devices and num_nodes of processes started by torchrun. Without LOCAL_WORLD_SIZE, which other launchers may not set,
    num_nodes gives the processes per node. Raises UserError if nodes have different numbers."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", max(launch.world // nodes, 1)))
    found = {"devices": here, "num_nodes": launch.world // here}
    for (key, started), wanted in zip(found.items(), (devices, nodes), strict=True):
        if wanted not in ("auto", 1, started, str(started)):
            log.warning("trainer.%s=%s is ignored: torchrun started %d.", key, wanted, started)
    if here * found["num_nodes"] != launch.world:
        raise UserError(
            f"{launch.world} processes, {here} on this machine: start equally many on each (--nproc_per_node)."
        )
    return found


def _devices(wanted: Any, on_gpu: bool, distributed: bool, launch: Launch) -> Any:
    if wanted != "auto":
        return wanted
    if launch.kind == "slurm":
        return int(os.environ.get("SLURM_NTASKS_PER_NODE", "1") or 1)
    return (torch.cuda.device_count() if on_gpu else 1) if distributed else 1

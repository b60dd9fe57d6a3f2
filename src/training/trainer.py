"""Build a Lightning Trainer from the node `trainer:`: devices, strategy and precision as users write them."""

import logging
import os
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy

from src.callbacks.checkpoint import AtomicCheckpointIO
from src.core.distributed import Launch
from src.core.errors import UserError

log = logging.getLogger(__name__)

TAKEN_OVER = ("accumulate_grad_batches", "gradient_clip_val", "max_skipped_steps", "overfit_batches")
"""Keys that the training module handles, since Lightning refuses them under manual optimisation."""
_PRECISION = {
    "32": "32-true", "32-true": "32-true", "fp32": "32-true",
    "16": "16-mixed", "16-mixed": "16-mixed", "fp16": "16-mixed",
    "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed",
}  # fmt: skip


def build_trainer(
    config: dict[str, Any], launch: Launch, callbacks: list[Any], loggers: list[Any], root: str
) -> pl.Trainer:
    """Return the trainer. `root`: the run's folder. Raises UserError for values that don't fit this machine or Lightning."""
    settings = {key: value for key, value in config.items() if key not in (*TAKEN_OVER, "_target_")}
    accelerator = _accelerator(settings["accelerator"])
    on_gpu = accelerator == "gpu"
    distributed = _is_ddp(settings["strategy"]) or launch.world > 1
    settings["accelerator"] = accelerator
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
    _set_float32_products(settings.pop("float32_matmul_precision"), on_gpu, settings["precision"])
    # Every trained parameter gets a gradient in the one backward pass, so nothing has to search for unused ones; there
    # are no buffers to exchange; gradients that are views of the buckets save a copy of the model.
    ddp = DDPStrategy(find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if launch.kind != "torchrun" and SLURMEnvironment.detect():  # Lightning's own requeue would start from scratch
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        trainer = pl.Trainer(
            **{**settings, "strategy": ddp if distributed else "auto"},
            callbacks=callbacks,
            logger=loggers,
            plugins=plugins,
            default_root_dir=root,
            use_distributed_sampler=False,  # the data module's own order; Lightning's would shuffle evaluation
            enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            enable_progress_bar=any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks),
            enable_model_summary=False,
        )
        trainer._signal_connector.register_signal_handlers = lambda: None  # src/core/stopping.py handles them
        return trainer
    except TypeError as error:
        raise UserError(f"trainer: {error}. Keys are listed in configs/trainer/default.yaml.") from error
    except (ValueError, pl.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"trainer: {error}") from error


def _profiler(name: str | None, folder: str) -> pl.profilers.Profiler | None:
    """Return Lightning's profiler, which leaves its table (pytorch: a trace too) in `folder`. Raises UserError."""
    known = {
        "simple": pl.profilers.SimpleProfiler,
        "advanced": pl.profilers.AdvancedProfiler,
        "pytorch": pl.profilers.PyTorchProfiler,
    }
    if name is None:
        return None
    if name not in known:
        raise UserError(f"trainer.profiler={name}: expected {', '.join(known)} or null.")
    log.info("Profile: %s", os.path.join(folder, "fit-profile.txt"))
    return known[name](dirpath=folder, filename="profile")


def precision(wanted: Any, on_gpu: bool) -> str:
    """Return Lightning's name of `trainer.precision`; fp16 on a CPU becomes bf16. Raises UserError."""
    name = _PRECISION.get(str(wanted))
    if name is None:
        raise UserError(f"trainer.precision={wanted}: expected 32, 16 or bf16.")
    if name == "16-mixed" and not on_gpu:
        log.info("trainer.precision=16: a CPU has no fp16 training, so it runs in bf16.")
        name = "bf16-mixed"
    if name == "bf16-mixed" and not on_gpu and (ratio := bf16_slowdown_on_cpu()) > 1.2:
        log.warning(
            "This CPU takes %.3g times as long for a bf16 matrix product as for a float32 one: it has no instructions for "
            "it. trainer.precision=32 is faster here and more exact.",
            ratio,
        )
    return name


def bf16_slowdown_on_cpu(size: int = 256) -> float:
    """Return the time of a bf16 matrix product over that of a float32 one, measured in some tens of milliseconds."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype)
        taken = []
        for _ in range(4):
            began = time.perf_counter()
            a @ a
            taken.append(time.perf_counter() - began)
        return min(taken)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def _set_float32_products(wanted: Any, on_gpu: bool, precision_name: str) -> None:
    if wanted not in ("highest", "high"):
        raise UserError(f"trainer.float32_matmul_precision={wanted}: expected highest (float32) or high (TF32).")
    if not on_gpu:
        return
    torch.set_float32_matmul_precision(wanted)
    if wanted == "highest" and precision_name == "32-true":
        log.info(
            "Float32 throughout. On a GPU trainer.float32_matmul_precision=high (TF32) or trainer.precision=bf16 is faster."
        )


def _accelerator(wanted: str) -> str:
    """Return Lightning's name of what to train on: gpu (CUDA), mps or cpu. Raises UserError for what is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted in ("gpu", "cuda") and not cuda:
        raise UserError(
            f"trainer.accelerator={wanted}, but no CUDA device is visible. Use trainer=cpu, or check CUDA_VISIBLE_DEVICES and "
            f"nvidia-smi.{' On this Mac there is trainer.accelerator=mps.' * mps}"
        )
    if wanted == "mps" and not mps:
        raise UserError(
            "trainer.accelerator=mps, but this torch has no MPS: it needs a Mac with Apple silicon. Use trainer=cpu."
        )
    if wanted not in ("auto", "gpu", "cuda", "cpu", "mps"):
        raise UserError(f"trainer.accelerator={wanted}: expected auto, gpu, mps or cpu.")
    return "mps" if wanted == "mps" else "gpu" if cuda and wanted != "cpu" else "cpu"


def _is_ddp(strategy: Any) -> bool:
    if strategy not in ("auto", "ddp"):
        raise UserError(
            f"trainer.strategy={strategy}: expected auto or ddp. Sharded strategies are not offered: the frozen networks and "
            "the decoder fit one GPU, and the adaptive weight needs whole gradients (docs/distributed.md)."
        )
    return strategy == "ddp"


def _devices(wanted: Any, on_gpu: bool, distributed: bool, launch: Launch) -> Any:
    if launch.kind == "torchrun":
        started = int(os.environ.get("LOCAL_WORLD_SIZE", launch.world))
        if wanted not in ("auto", started, str(started)):
            log.warning(
                "trainer.devices=%s is ignored: torchrun started %d process(es) on this machine.", wanted, started
            )
        return started
    if wanted != "auto":
        return wanted
    if launch.kind == "slurm":
        return int(os.environ.get("SLURM_NTASKS_PER_NODE", "1") or 1)
    return (torch.cuda.device_count() if on_gpu else 1) if distributed else 1

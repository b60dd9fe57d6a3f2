"""Typed settings of the training module: what `configs/model/*.yaml` may say, checked where it enters the code."""

import difflib
from collections.abc import Mapping, Set
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from src.core.errors import UserError
from src.core.schedules import Schedule
from src.formats.checkpoint_content import RAESettings
from src.models.encoder_presets import expand_encoder
from src.training.stage1_step import StepSettings

T = TypeVar("T")

LEAST = {
    **dict.fromkeys(("noise_tau", "perceptual_weight", "disc_weight", "max_d_weight"), 0),
    **dict.fromkeys(("lpips_start_epoch", "disc_upd_start_epoch", "disc_start_epoch"), 0),
    "loss_chunk_size": 1,
}
"""Smallest allowed values of keys of `model:`; null passes where the key may be null."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float


@dataclass(frozen=True)
class SchedulerSettings:
    """In epochs; `at` turns it into steps."""

    type: Literal["cosine", "linear", "constant"]
    warmup_epochs: float
    decay_end_epoch: float
    base_lr: float
    final_lr: float
    warmup_from_zero: bool

    def at(self, steps_per_epoch: int) -> Schedule:
        return Schedule(
            kind=self.type,
            base_lr=self.base_lr,
            final_lr=self.final_lr,
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
            decay_steps=round(self.decay_end_epoch * steps_per_epoch),
            warmup_from_zero=self.warmup_from_zero,
        )


@dataclass(frozen=True)
class StartEpochs:
    """When each part of the loss begins, in epochs (fractions are rounded to a step)."""

    lpips_start_epoch: float
    disc_upd_start_epoch: float
    disc_start_epoch: float

    def steps(self, steps_per_epoch: int) -> dict[str, int]:
        return {
            "lpips": round(self.lpips_start_epoch * steps_per_epoch),
            "disc": round(self.disc_upd_start_epoch * steps_per_epoch),
            "gan": round(self.disc_start_epoch * steps_per_epoch),
        }


@dataclass(frozen=True)
class LayerSubset:
    """Random subsets of the encoder's chosen blocks during training (FuseReg, arXiv 2609.31620)."""

    kind: Literal["none", "uniform"]
    keep_probability: float
    """Of each block, before empty subsets are rejected; 0.5 makes all non-empty subsets equally likely."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "uniform"):
            raise UserError(f"model.layer_subset.kind={self.kind!r}: expected 'none' or 'uniform'.")
        if not 0 < self.keep_probability <= 1:
            raise UserError(
                f"model.layer_subset.keep_probability={self.keep_probability}: expected a number in (0, 1]."
            )


@dataclass(frozen=True)
class DiscriminatorSettings:
    """The node `model.disc_arch`: arguments of `DinoDiscriminator` and of `DiffAug`."""

    arch: Mapping[str, Any]
    augment: Mapping[str, Any]


@dataclass(frozen=True)
class LoopSettings:
    """What surrounds the step."""

    ema_decay: float
    disc_updates: int
    """Discriminator updates for each generator update."""
    disc_loss: str
    gen_loss: str
    sample_every: int
    """Generator steps between pictures; 0: none."""
    compile: bool
    seed: int
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    """Largest norm of the decoder's gradient; None: no clipping."""
    max_skipped_steps: int
    """Steps with non-finite numbers that are skipped before training stops; 0: stop at the first."""
    log_every_n_steps: int

    def __post_init__(self) -> None:
        for key, value, least in (
            ("trainer.accumulate_grad_batches", self.accumulate_grad_batches, 1),
            ("trainer.max_skipped_steps", self.max_skipped_steps, 0),
            ("trainer.log_every_n_steps", self.log_every_n_steps, 1),
            ("model.disc_updates", self.disc_updates, 1),
            ("model.sample_every", self.sample_every, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{key}={value}: expected a whole number of at least {least}.")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"model.ema_decay={self.ema_decay}: expected a number in [0, 1).")
        if self.gradient_clip_val is not None and self.gradient_clip_val <= 0:
            raise UserError(
                f"trainer.gradient_clip_val={self.gradient_clip_val}: expected a positive norm, or null for no clipping."
            )


@dataclass(frozen=True)
class ModelSettings:
    """The whole node `model:`. Flat keys are sorted into their groups; nested nodes keep their names."""

    rae: RAESettings
    step: StepSettings
    starts: StartEpochs
    loop: LoopSettings
    optimizer: OptimizerSettings
    scheduler: SchedulerSettings
    disc_optimizer: OptimizerSettings
    disc_scheduler: SchedulerSettings
    disc_arch: DiscriminatorSettings
    layer_subset: LayerSubset
    lpips_arch: Mapping[str, Any]
    """Arguments of `LPIPS`."""

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Self:
        config = expand_encoder(config)
        groups: dict[str, type] = {
            "rae": RAESettings,
            "step": StepSettings,
            "starts": StartEpochs,
            "loop": LoopSettings,
        }
        nodes: dict[str, type] = {
            "optimizer": OptimizerSettings,
            "scheduler": SchedulerSettings,
            "disc_optimizer": OptimizerSettings,
            "disc_scheduler": SchedulerSettings,
            "disc_arch": DiscriminatorSettings,
            "layer_subset": LayerSubset,
        }
        owner = {f.name: group for group, kind in groups.items() for f in fields(kind)}
        expected = owner.keys() | nodes.keys() | {"lpips_arch"}
        check_keys(config, expected, expected, "model")
        flat: dict[str, dict[str, Any]] = {group: {} for group in groups}
        for key, group in owner.items():
            flat[group][key] = config[key]
        for key, least in LEAST.items():
            value = config[key]
            if isinstance(value, (int, float)) and value < least:
                raise UserError(f"model.{key}={value}: expected at least {least}.")
        return cls(
            **{group: typed(kind, flat[group], "model") for group, kind in groups.items()},
            **{node: typed(kind, config[node], f"model.{node}") for node, kind in nodes.items()},
            lpips_arch=config["lpips_arch"],
        )


def typed(cls: type[T], values: Mapping[str, Any], key: str) -> T:
    """A settings object from a config node; missing and unknown keys are one error that lists both."""
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    check_keys(values, names, {f.name for f in fields(cls) if f.default is MISSING}, key)  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UserError(f"{key}.{name}={value!r}: expected {_in_words(hints[name])}.")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _fits(value: Any, kind: Any) -> bool:
    """Whether a config's value is of a field's type; types other than plain ones are left to their owners."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (bool, str, NoneType) else True


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_in_words(one) for one in get_args(kind))
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text", NoneType: "null"}[kind]


def check_keys(values: Mapping[str, Any], known: Set[str], required: Set[str], key: str) -> None:
    missing, unknown = sorted(required - values.keys()), sorted(values.keys() - known)
    if not missing and not unknown:
        return
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        parts.append(f"unknown: {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    raise UserError(f"{key}: {'; '.join(parts)}. Known keys: {', '.join(sorted(known))}.")

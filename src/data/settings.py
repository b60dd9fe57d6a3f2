"""Typed settings of the config node `data`, of each source and of each evaluation set.

`configs/data/imagenet.yaml` documents each key.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from src.core.errors import UserError
from src.core.geometry import Pixels
from src.core.settings import Settings
from src.core.text import typed
from src.data.dataset import TrainCrop
from src.data.decode import Exif
from src.data.mix import Unit

REMOVED_KEYS = {"prefetch_factor", "pin_memory", "worker_start", "val_batch_size"}
"""Keys in run configs of earlier versions; accepted and ignored."""
Count = Annotated[int, Field(ge=1)]


class _Common(Settings):
    """Keys that each source of a mix may set; the defaults are those of `data`."""

    use_hf_dataset: bool | None
    hf_split: str
    hf_validation_split: str | None
    train_split: float = Field(gt=0, le=1)
    image_column: str | None
    label: str | None
    train_crop: TrainCrop
    resize_shorter_px: Pixels | None
    exif: Exif
    max_megapixels: float = Field(gt=0)
    max_bad_share: float = Field(ge=0, le=1)


class SourceSettings(_Common):
    """One source. weight: in a mix."""

    data_dir: str
    weight: float = Field(default=1.0, gt=0)


class EvaluationSettings(Settings):
    """One evaluation set. split: null: its validation split, else its test split, else all images. reference: statistics of
    reference images for FID; null: the set's original images. num_samples: null: as many as rFID uses."""

    data_dir: str
    split: str | None = None
    reference: str | None = None
    num_samples: int | None = Field(default=None, ge=2)
    image_column: str | None = None
    label: str | None = None


class DataSettings(_Common):
    """The node `data`."""

    typed_as: ClassVar = {"seed": "seed", "accumulate": "trainer.accumulate_grad_batches"}
    data_dir: str | None
    sources: Mapping[str, Any] | None
    epoch_images: Count | None
    mix_unit: Unit
    evaluation: Mapping[str, Any] | None
    storage_options: Mapping[str, Any] | None
    cache_gb: float = Field(ge=0)
    image_size: Pixels
    batch_size: Count
    accumulate: Count
    seed: int
    allow_changed: bool
    num_workers: int = Field(ge=0, le=1024)
    worker_timeout_s: float = Field(default=0, ge=0, le=1e7)

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Self:
        """Parse and check the node. Raises UserError."""
        return cls.parse({key: value for key, value in node.items() if key not in REMOVED_KEYS}, "data")

    def parse_sources(self) -> dict[str, SourceSettings]:
        """Return the sources by name; a single dataset has an empty name.

        Raises:
            UserError: both or neither of `data_dir` and `sources`, an invalid name, or invalid keys or values.
        """
        if (self.data_dir is None) == (self.sources is None):
            raise UserError(
                f"data.data_dir={typed(self.data_dir)} and data.sources={'null' if self.sources is None else 'set'}: expected "
                f"one of them. Set data.data_dir={'PATH' if self.sources is None else 'null'}."
            )
        common = {key: getattr(self, key) for key in _Common.model_fields}
        if self.sources is None:
            if self.epoch_images is not None:
                raise UserError(
                    f"data.epoch_images={self.epoch_images} goes with data.sources: without it, an epoch is all of data_dir."
                )
            return {"": SourceSettings.model_construct(data_dir=str(self.data_dir), **common)}
        found = {}
        for name, values in _named(self.sources, "data.sources").items():
            given = {**common, **values}
            if values.get("train_crop", "random") != "random" and "resize_shorter_px" not in values:
                given["resize_shorter_px"] = None  # the common value is for random crops
            found[name] = SourceSettings.parse(given, f"data.sources.{name}")
        return found

    def parse_evaluation(self) -> dict[str, EvaluationSettings]:
        """Return the settings of the evaluation sets by name. Raises UserError."""
        sets = {} if self.evaluation is None else _named(self.evaluation, "data.evaluation")
        return {name: EvaluationSettings.parse(values, f"data.evaluation.{name}") for name, values in sets.items()}


def first_source(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a run's `data` node as that of a single dataset: for a mix, with the values of its first source."""
    sources = node.get("sources")
    return {**node, **next(iter(sources.values()))} if sources else node


def _named(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Check and return a node that maps names to settings. Raises UserError."""
    if not node:
        raise UserError(
            f"{key}={node}: expected a name for each, as `{key}: {{imagenet: {{data_dir: ...}}}}`, or null."
        )
    for name, values in node.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"{key}: {name!r} is not a valid name; expected letters, digits and _.")
        if not isinstance(values, Mapping) or "data_dir" not in values:
            raise UserError(f"{key}.{name}={values}: expected keys that include data_dir.")
    return node

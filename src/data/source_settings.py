"""What `data.sources` and `data.evaluation` may say of each source and each evaluation set."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from src.core.errors import UserError
from src.core.geometry import Pixels
from src.core.settings import Settings
from src.data.dataset import TrainCrop
from src.data.decode import Exif

Count = Annotated[int, Field(ge=1)]
TrainShare = Annotated[float, Field(gt=0, le=1)]
BadShare = Annotated[float, Field(ge=0, le=1)]
Megapixels = Annotated[float, Field(gt=0)]


class SourceSettings(Settings):
    """One source of a mix. What is left out is as in `data` itself."""

    data_dir: str
    weight: float = Field(default=1.0, gt=0)
    use_hf_dataset: bool | None = None
    hf_split: str = "train"
    hf_validation_split: str | None = None
    train_split: TrainShare = 1.0
    image_column: str | None = None
    label: str | None = None
    train_crop: TrainCrop = "random"
    resize_shorter_px: Pixels | None = None
    exif: Exif = "apply"
    max_megapixels: Megapixels = 80.0
    max_bad_share: BadShare = 0.01


class EvaluationSettings(Settings):
    """One evaluation set. split: null: its validation split, else its test split, else all of it. reference: statistics of
    reference images for FID, null: the originals of the set. num_samples: null: as many as rFID takes."""

    data_dir: str
    split: str | None = None
    reference: str | None = None
    num_samples: int | None = Field(default=None, ge=2)
    image_column: str | None = None


def parse_sources(node: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, SourceSettings]:
    """Check `data.sources`; `common`: the values of `data` for what a source leaves out.

    Raises:
        UserError: none, a name that can't be one, or wrong keys and values.
    """
    _check_names(node, "data.sources")
    known = SourceSettings.field_names()
    defaults = {key: value for key, value in common.items() if key in known and key != "data_dir"}
    found = {}
    for name, values in node.items():
        own = dict(values)
        if own.get("train_crop", "random") != "random" and "resize_shorter_px" not in own:
            own["resize_shorter_px"] = None  # the common one is for random crops
        found[name] = SourceSettings.parse(defaults | own, f"data.sources.{name}")
    return found


def parse_evaluation(node: Mapping[str, Any]) -> dict[str, EvaluationSettings]:
    """Check `data.evaluation`. Raises UserError."""
    _check_names(node, "data.evaluation")
    return {name: EvaluationSettings.parse(dict(values), f"data.evaluation.{name}") for name, values in node.items()}


def first_source(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the node `data:` of a run as one of a single data set: of a mix, with what its first source says."""
    sources = node.get("sources")
    return {**node, **next(iter(sources.values()))} if sources else node


def _check_names(node: Any, key: str) -> None:
    if not isinstance(node, Mapping) or not node:
        raise UserError(
            f"{key}={node}: expected a name for each, as `{key}: {{imagenet: {{data_dir: ...}}}}`, or null."
        )
    for name, values in node.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"{key}: {name!r} is no name; expected letters, digits and _.")
        if not isinstance(values, Mapping) or "data_dir" not in values:
            raise UserError(f"{key}.{name}={values}: expected keys with data_dir among them.")

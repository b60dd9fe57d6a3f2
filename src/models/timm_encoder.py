"""Use any plain ViT of timm as a frozen encoder: Perception Encoder, EUPE, EVA-02, TIPSv2, MoCo v3 and others.

timm is an optional extra (`pip install -e ".[timm]"`): it needs torchvision, which is not available for every torch build.
Legend: B batch, N patch tokens, C channels.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.json_files import read_json
from src.models.encoder_files import PixelStatistics, checked_statistics
from src.models.frozen_encoder import FrozenEncoder, check_source, local_place

FREE = {"num_classes", "dynamic_img_size", "in_chans", "global_pool", "img_size"}
"""Architecture arguments that affect the patch tokens, if at all, only through the shapes of parameters."""
HEADS = ("norm.", "fc_norm.", "attn_pool.", "head.")


class TimmViT(FrozenEncoder):
    """A timm ViT whose token grid is the same in all blocks; timm resamples the positions for other image sizes.

    `model_name` is a hub id (`timm/vit_pe_core_large_patch14_336.fb`), a folder written by timm's `save_for_hf`
    (config.json, model.safetensors), or, for untrained weights, the name of an architecture.
    """

    final_norm = "norm"

    @classmethod
    def read_config(cls, source: str) -> Any:
        timm = _timm()
        check_source(cls.__name__, source)
        _, architecture, arguments = cls._description(source)
        arguments = {**arguments, "num_classes": 0, "dynamic_img_size": True}
        try:
            with torch.device("meta"):
                model = timm.create_model(architecture, **arguments)
        except Exception as error:
            raise UserError(
                f"{source}: timm can't build {architecture!r} for images of any size: {error}. TimmViT supports plain ViTs "
                "(timm's VisionTransformer and Eva classes)."
            ) from error
        stages = list(model.feature_info)
        if len({(stage["reduction"], stage["num_chs"]) for stage in stages}) != 1:
            grids = sorted({stage["reduction"] for stage in stages})
            raise UserError(
                f"{source}: {architecture!r} does not keep the same grid of patch tokens in all blocks: its stages reduce "
                f"the image by factors of {', '.join(map(str, grids))}."
            )
        return SimpleNamespace(
            architecture=architecture,
            arguments=arguments,
            hidden_size=stages[0]["num_chs"],
            patch_size=stages[0]["reduction"],
            num_hidden_layers=len(stages),
            to_diff_dict=lambda: {
                "architecture": architecture,
                **{k: v for k, v in arguments.items() if k not in FREE},
            },
        )

    @classmethod
    def read_statistics(cls, source: str) -> PixelStatistics:
        pixels = cls._description(source)[0]
        return checked_statistics(pixels.get("mean"), pixels.get("std"), f"{source}, pretrained_cfg")

    @classmethod
    def build(cls, config: Any) -> nn.Module:
        return _timm().create_model(config.architecture, **config.arguments)

    @classmethod
    def load(cls, config: Any, source: str) -> nn.Module:
        try:
            return _timm().create_model(_name(source), pretrained=True, **config.arguments)
        except Exception as error:
            raise UserError(f"{cls.__name__} can't be loaded from {source!r}: {error}") from error

    def states(self, images: Tensor, chosen: Sequence[int]) -> Iterator[Tensor]:
        yield from self.model.forward_intermediates(
            images, indices=list(chosen), norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
        )

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        tokens = self.model.forward_features(images)
        return tokens[:, 0] if self.prefix_tokens else tokens.mean(dim=1)

    @property
    def prefix_tokens(self) -> int:
        return self.model.num_prefix_tokens

    @property
    def norm_module(self) -> nn.Module | None:
        """The final norm, or None if the model has none; `plain` is a LayerNorm without affine parameters either way."""
        return None if isinstance(self.model.norm, nn.Identity) else self.model.norm

    def parameters_in_use(self) -> Iterable[nn.Parameter]:
        heads = HEADS[1:] if self.norm == "affine" else HEADS
        return (parameter for name, parameter in self.model.named_parameters() if not name.startswith(heads))

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        _timm().models.save_for_hf(copy.deepcopy(self.model).to(dtype), str(folder), safe_serialization=True)

    @classmethod
    def _description(cls, source: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Return timm's pretrained config of `source` (mean, std, ...), its architecture and the architecture's arguments."""
        from transformers.utils import cached_file

        name = _name(source)
        try:
            if ":" not in name:
                return _timm().models.get_pretrained_cfg(name).to_dict(), name.split(".")[0], {}
            config = read_json(str(cached_file(name.split(":", 1)[1], "config.json")), architecture=str)
            return config.get("pretrained_cfg", config), config["architecture"], config.get("model_args", {})
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{cls.__name__} can't read {source!r}: {error}. Expected a hub id like "
                "timm/vit_pe_core_large_patch14_336.fb, a folder written by timm's save_for_hf, or a model name of timm."
            ) from error


def _name(source: str) -> str:
    place = local_place(source)
    return f"local-dir:{place}" if Path(place).is_dir() else f"hf-hub:{source}" if "/" in source else source


def _timm() -> ModuleType:
    try:
        import timm
    except Exception as error:  # without a matching torchvision, importing timm fails in several ways
        raise UserError(
            f"encoder_cls=TimmViT needs timm, which can't be imported here: {error}. Install it with "
            "`pip install -e '.[timm]'`, and the torchvision of your torch from https://pytorch.org: not every torchvision on "
            "PyPI fits every build of torch."
        ) from error
    return timm

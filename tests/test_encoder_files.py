"""Encoder folders: broken downloads, pixel statistics from their files, and configs that must not load code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from src.core.errors import UserError
from src.core.weights import read
from src.models.encoder_files import STATISTICS
from src.models.encoders import ENCODERS, DINOv3wNorm
from tests.conftest import TINY_ENCODERS, make_rae


def saved(folder: Path) -> None:
    """Save a complete encoder of two blocks in `folder`."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes)).save_pretrained(folder)


NUMBERS = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'


def test_pixel_statistics_come_from_the_option_then_the_file_then_the_family(tmp_path):
    def statistics(name: str, **options: Any) -> Any:
        encoder = ENCODERS[name](**TINY_ENCODERS[name], weights="untrained", **options)
        return encoder.pixel_statistics(str(tmp_path))

    assert statistics("SigLIP2wNorm") == STATISTICS["half"]
    assert statistics("DINOv3wNorm") == STATISTICS["imagenet"]
    (tmp_path / "preprocessor_config.json").write_text(NUMBERS)
    assert statistics("DINOv3wNorm") == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert statistics("DINOv3wNorm", statistics="clip") == STATISTICS["clip"]
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, ' + NUMBERS[1:])
    assert statistics("DINOv3wNorm") == STATISTICS["none"]
    rae = make_rae("SigLIP2wNorm", encoder_params={"statistics": "imagenet", "resize": "bilinear"})
    assert torch.equal(rae.image_mean.flatten(), torch.tensor(STATISTICS["imagenet"][0]))
    images = torch.rand(1, 3, 64, 64)
    resized = F.interpolate(images, size=(56, 56), mode="bilinear", align_corners=False)
    assert torch.equal(rae.encode_raw(images), rae.encode_raw(resized))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 346292\n"
PAGE = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"


@pytest.mark.parametrize(("file", "content", "message"), [
    ("model.safetensors", POINTER, "git-lfs pointer, not the file itself. Run `git lfs pull`"),
    ("model.safetensors", PAGE, "HTML page.*HF_TOKEN"),
    ("model.safetensors", b"", "is empty"),
    ("model.safetensors", b"PK\x03\x04 no header", "is cut short or no safetensors file"),
    ("model.safetensors", (4).to_bytes(8, "little") + b"[[]]", "no safetensors file"),
    ("model.safetensors", -1, r"[\d,]+ bytes\) is cut short"),
    ("model.safetensors", 100, "is cut short or no safetensors file"),
    ("pytorch_model.bin", POINTER, "git-lfs pointer"),
    ("pytorch_model.bin", b"half a zip", "cut short or no file of torch"),
    ("config.json", POINTER, "git-lfs pointer"),
    ("config.json", PAGE, "HTML page"),
    ("config.json", b'{"hidden_size": 3', "not readable as JSON"),
    ("config.json", b"[]", "expected an object"),
    ("config.json", b'{"model_type": "dinov3_vit", "hidden_size": "wide"}', "can't be loaded"),
    ("config.json", b'{"model_type": "dinov3_vit", "patch_size": [14, 16]}', "patch_size.*expected whole numbers"),
    ("config.json", b'{"model_type": "dinov3_vit", "num_attention_heads": 7, "hidden_size": 32}', "can't be loaded"),
    ("config.json", b'{"model_type": "dinov3_vit", "quantization_config": {"quant_method": "x"}}', "quantised"),
    ("adapter_config.json", b'{"base_model_name_or_path": "org/repo"}', "PEFT adapter"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "model-1.safetensors"}}', "lacks model-1.safetensors"),
    ("preprocessor_config.json", POINTER, "git-lfs pointer"),
    ("preprocessor_config.json", b'{"image_mean": 0.5}', "image_mean is 0.5; expected three finite numbers"),
    ("preprocessor_config.json", b'{"image_std": [1, 0, 1]}', "image_std is .*above 0"),
    ("preprocessor_config.json", b'{"image_mean": ["a", 1, 2]}', "image_mean"),
    ("preprocessor_config.json", b'{"image_mean": [NaN, 1, 2]}', "image_mean"),
    ("preprocessor_config.json", b"\xff\xfe", "not readable as JSON"),
])  # fmt: skip
def test_broken_downloads_are_named(file, content, message, tmp_path):
    saved(tmp_path)
    if isinstance(content, int):
        content = (tmp_path / file).read_bytes()[:content]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        DINOv3wNorm(str(tmp_path)).pixel_statistics(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1200


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize(("content", "message"), [(POINTER, "git-lfs pointer"), (PAGE, "HTML page"), (b"", "is empty")])
def test_broken_weight_files_are_named(file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / file)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_config_can_not_load_code_from_the_hub(key, tmp_path):
    saved(tmp_path)
    images, expected = torch.randn(1, 3, 64, 64), DINOv3wNorm(str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "org/repo", "auto_map": {"AutoModel": "a--b.C"}}))
    found = DINOv3wNorm(str(tmp_path))
    assert found.model.config._attn_implementation == "sdpa"
    assert torch.equal(found(images), expected(images))

"""Feature networks by name: pooled features of frozen encoders, preprocessing, distances, references of other networks."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from src import eval_rfid, make_reference
from src.core.errors import UserError
from src.evaluation.networks import EncoderFeatures, load_features, resize_pillow
from src.models.encoders import Dinov2withNorm, SigLIP2wNorm
from tests.test_eval_rfid import QUICK, write_checkpoint, write_images


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """Save a DINOv2 with random weights; return its folder."""
    folder = tmp_path_factory.mktemp("dinov2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def pictures(count, side=64, seed=0):
    coarse = torch.randint(0, 256, (count, 3, 5, 5), generator=torch.Generator().manual_seed(seed)).float()
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


def test_pooled_is_the_cls_token_after_the_whole_final_norm(dinov2):
    images = torch.randn(2, 3, 518, 518, generator=torch.Generator().manual_seed(1))
    model = Dinov2Model.from_pretrained(dinov2).eval()
    for options in ({}, {"position_offset": 0.1}):  # at its own size there is nothing to resample
        pooled = Dinov2withNorm(str(dinov2), layers=[0], **options).pooled(images)
        with torch.no_grad():
            torch.testing.assert_close(pooled, model(images).last_hidden_state[:, 0], rtol=1e-5, atol=1e-5)


def test_positions_at_another_size_are_those_of_the_authors_code(dinov2):
    """Measured: with the offset our features equal those of facebookresearch/dinov2 at b8931f7 for equal weights; without it
    they differ by 2.5 % of the largest value."""
    encoder = Dinov2withNorm(str(dinov2), position_offset=0.1)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    tokens, _ = encoder.embed(images)
    parts = encoder.model.embeddings
    grid = parts.position_embeddings[:, 1:].transpose(1, 2).unflatten(2, (37, 37))
    grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, 1:], parts.patch_embeddings(images) + grid)
    plain = Dinov2withNorm(str(dinov2))
    assert (plain.pooled(images) - encoder.pooled(images)).abs().max() > 1e-4 and "0.1" in encoder.identity()["config"]


def test_families_without_cls_take_the_mean():
    encoder = SigLIP2wNorm("configs/encoder/siglip_tiny", weights="untrained", norm="affine")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.pooled(images), encoder(images).mean(dim=1))


@pytest.mark.parametrize("side", [64, 300])
def test_images_are_resized_as_pillow_does_it(side):
    images = pictures(3, side)
    expected = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC) for i in images]
    found = resize_pillow(images.float(), 224).permute(0, 2, 3, 1).numpy()
    difference = np.abs(found - np.stack([np.asarray(i, np.float32) for i in expected]))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02


def test_features_are_pooled_of_normalised_images(dinov2):
    network, images = EncoderFeatures("dinov2", str(dinov2)), pictures(3, 224)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(network(images), network.encoder.pooled((images / 255 - mean) / std))
    assert network(images).shape == (3, 32)


def test_networks_are_loaded_by_name(dinov2, caplog):
    inception = {"path": None, "weights": "tiny", "key": "KEY", "width": None}
    found = load_features(["inception", f"dinov2={dinov2}"], **inception)
    assert found[0].space == "inception" and found[1].name.startswith("dinov2-") and "another size" in caplog.text
    with pytest.raises(UserError, match="dinov2=nowhere: no such folder.*download_weights.py facebook/dinov2-large"):
        load_features(["dinov2=nowhere"], **inception)
    for wrong in (["clip"], ["inception", "inception"]):
        with pytest.raises(UserError, match="expected one or more of inception, dinov2, each once"):
            load_features(wrong, **inception)


def test_references_and_scores_of_two_feature_spaces(dinov2, tmp_path, capsys):
    data = write_images(tmp_path / "pictures", 7)
    model = f"--checkpoint {write_checkpoint(tmp_path / 'best.ckpt', data)} --data_dir {data} --split all"

    def evaluate(line, code=0):
        words = f"{QUICK} {model} --json {tmp_path}/a.json {line}"
        assert eval_rfid.main(shlex.split(words)) == code
        return json.loads((tmp_path / "a.json").read_text())["results"][0] if code == 0 else capsys.readouterr().err

    def reference(features):
        words = f"{QUICK} --data_dir {data} --split all --image_size 64 --features {features} --output {tmp_path}/r.npz"
        assert make_reference.main(shlex.split(words)) == 0
        with np.load(tmp_path / "r.npz") as archive:
            return set(archive.files)

    both, alone = evaluate(f"--features inception dinov2={dinov2}"), evaluate("")
    assert both["rfid_untrained"] == alone["rfid_untrained"] and both["rfd_dinov2"] > 0
    assert "rFD dinov2: " in capsys.readouterr().out
    assert not {"mu_s", "sigma_s"} & reference(f"dinov2={dinov2}")
    against = evaluate(f"--features dinov2={dinov2} --reference {tmp_path}/r.npz")
    assert against["rfd_dinov2"] == pytest.approx(both["rfd_dinov2"], rel=1e-5) and "rfid_untrained" not in against
    message = evaluate(f"--reference {tmp_path}/r.npz", code=1)
    assert "'dinov2-" in message and "'inception-untrained" in message and "--features" in message
    assert {"mu", "sigma", "mu_s", "sigma_s", "features", "count"} <= reference("inception")
    message = evaluate(f"--features dinov2={dinov2} --reference {tmp_path}/r.npz", code=1)
    assert "'dinov2-" in message and "'inception-untrained" in message

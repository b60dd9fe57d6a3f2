"""Fine-tuning a decoder on latents that were noised and then denoised by a sampler."""

import itertools

import numpy as np
import pytest
import torch

from src.core import random_streams as streams
from src.core.errors import UserError
from src.core.random_streams import Purpose
from src.core.weights import read
from src.training.generated_latents import GeneratedLatents
from src.training.settings import GeneratedLatentsSettings
from tests.tiny_models import stir
from tests.training import last, same, train


def generated(run, checkpoint, **changed):
    settings = GeneratedLatentsSettings(**{"checkpoint": str(checkpoint), "t0": 0.5, "steps": 3} | changed)
    return GeneratedLatents(settings, run.module.rae, seed=0)


def near(found, expected):
    return (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_generated_latents_are_denoised_from_t0_for_each_image_by_itself(stage2_run):
    folder, run = stage2_run
    rae, module = run.module.rae, generated(run, last(folder))
    stir(module.network)
    raw = rae.encode_raw(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3)))
    batch = {"epoch": 1, "position": np.array([5, 2, 9, 7]), "label": np.array([0, 2, -1, 1])}
    made = module(rae, raw, batch)
    part = module(rae, raw[1:3], {name: v if name == "epoch" else v[1:3] for name, v in batch.items()})
    assert made.shape == raw.shape and near(part, made[1:3])
    unlabelled = module(rae, raw, {"epoch": 1, "position": batch["position"]})
    assert near(unlabelled[2], made[2]), "an image of no class has the null label"

    noise = streams.normals(0, Purpose.GENERATED_NOISE, 1, [5, 2, 9, 7], rae.latent_shape, torch.device("cpu"))
    x, labels = 0.5 * rae.normalize(raw) + 0.5 * noise, torch.tensor([0, 2, 3, 1])
    shift = module.sampler.shift
    u0 = 0.5 / (shift - (shift - 1) * 0.5)
    times = [shift * u / (1 + (shift - 1) * u) for u in (u0, u0 * 2 / 3, u0 / 3, 0.0)]
    settings, flow = run.module.settings.sampler, run.module.settings.flow
    assert (settings.method, settings.cfg, settings.internal, flow.prediction) == ("euler", 1, 1, "velocity")
    for t, end in itertools.pairwise(times):
        x = x + (end - t) * module.network(x, torch.full((4,), t), labels)
    assert near(rae.denormalize(x), made)
    assert torch.allclose(generated(run, last(folder), t0=1e-6)(rae, raw, batch), raw, atol=1e-3)


def test_decoder_is_fine_tuned_on_generated_latents_and_resumes_exactly(stage2_run, autoencoder, tmp_path, caplog):
    folder, _ = stage2_run
    encoder = autoencoder.parent / "encoder_dinov2"
    options = [
        "data.image_size=64", f"model.encoder_config_path={encoder}", f"model.normalization_stat_path={autoencoder}",
        f"model.generated.checkpoint={last(folder)}", "model.generated.steps=2", "model.noise_tau=0",
    ]  # fmt: skip
    one = train(tmp_path / "one", *options, "trainer.max_epochs=1")
    train(tmp_path / "first", *options, "trainer.max_epochs=1", "trainer.max_steps=2")
    two = train(tmp_path / "two", *options, "trainer.max_epochs=1", checkpoint=last(tmp_path / "first"))
    assert same(one.module.state_dict(), two.module.state_dict())
    assert not any(name.startswith("generated") for name in one.module.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in one.module.generated.parameters())
    assert "model.generated.checkpoint was of step" not in caplog.text
    later = read(last(folder)) | {"global_step": 99}
    torch.save(later, tmp_path / "later.ckpt")
    own = f"model.generated.checkpoint={tmp_path}/later.ckpt"
    train(tmp_path / "changed", *options, own, "trainer.max_epochs=1", checkpoint=last(tmp_path / "first"))
    assert "model.generated.checkpoint was of step 6 and is now of step 99" in caplog.text
    without = train(tmp_path / "without", *options, "model.generated.checkpoint=null", "trainer.max_epochs=1")
    assert not same(one.module.state_dict(), without.module.state_dict())
    with pytest.raises(
        UserError, match="its statistics: model.normalization_stat_path.*statistics: .* there, None here"
    ):
        train(tmp_path / "odd", *options, "model.normalization_stat_path=null")

"""Training steps and sampling on the `meta` device, whose tensors hold no values: reading one fails, as do most operations that
mix it with the CPU. Code that passes here makes the host wait for a GPU only when metrics are logged."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.core import random_streams as streams
from src.core.ema import EMA
from src.core.images import unit_to_bytes
from src.core.nonfinite import NonFiniteCounter
from src.core.random_streams import Purpose
from src.evaluation import sampling
from src.evaluation.sampling import Guidance
from src.losses.flow_matching import FlowSettings, quartile_sums, sampling_grid
from src.models.dit import build_network
from src.training.settings import LatentNoiseSettings, LayerSubset
from src.training.stage1_step import Phase
from src.training.stage2_step import FlowDraws, FlowStep
from src.training.step_noise import StepNoise
from tests.conftest import make_rae
from tests.test_step_parity import make_pair

META = torch.device("meta")
LEVELS = LatentNoiseSettings(level="uniform", mu=0, s=1, per="token")
ALL_BLOCKS = LayerSubset(kind="none", keep_probability=0.5)
BATCH = {"epoch": np.array(0), "position": np.arange(3)}
SHAPE = (64, 4, 4)
SIZES = {"patch_size": 1, "hidden_size": [32, 48], "depth": [2, 1], "num_heads": [2, 2], "base_model_depth": 1}


class WhatMetaAllows(TorchDispatchMode):
    """Reject masks as indices, for which the host waits while a GPU counts, and float64, which MPS lacks."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_) else []
        assert all(index is None or index.dtype != torch.bool for index in indices), "a mask as index"
        made = function(*args, **(kwargs or {}))
        assert not any(
            isinstance(t, torch.Tensor) and (t.device, t.dtype) == (META, torch.float64) for t in tree_leaves(made)
        )
        return made


@pytest.fixture(autouse=True)
def _meta_knows_neither_autocast_nor_generators(monkeypatch):
    def normals(seed, purpose, epoch, positions, shape, device):
        return torch.empty(len(positions), *shape, device=device)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(streams, "normals", normals)
    with WhatMetaAllows():
        yield


@pytest.mark.parametrize("options", [{}, {"disc_fake": "reuse", "loss_chunk_size": 2, "disc_updates": 2}], ids=str)
@pytest.mark.parametrize("gan", [False, True])
def test_step_of_stage_1(gan, options):
    _, step, draws = make_pair(statistics=True, **options)
    noise = StepNoise(step.rae, step.augment, LEVELS, ALL_BLOCKS, seed=0)
    for module in (step.rae, step.lpips, step.discriminator):
        module.to(META)
    step.rae.noise_tau = 0.8
    images = draws.images.to(META)

    def augment(label, number, update):
        return replace(noise.augment(Purpose.AUGMENT_FAKE, BATCH, number, update, META), translation=True, colour=True)

    result = step.generator(images, noise.latents(BATCH, META), augment("", 0, 0), Phase(True, gan, True))
    counter = NonFiniteCounter(0)
    counter.observe(0, result.terms)
    for terms in step.discriminator_updates([unit_to_bytes(images)], [result.fake_source], augment):
        counter.observe(0, terms)
    EMA(step.rae.decoder, 0.99).update()
    trained = [*step.rae.decoder.parameters(), *step.discriminator.heads.parameters()]
    assert all(p.grad.device == META for p in trained if p.requires_grad)


def test_step_of_stage_2():
    rae = make_rae().to(META)
    network = build_network({"name": "RAEv2DiT", **SIZES}, rae.latent_shape, 3, 0.1, 0).to(META)
    flow = {"prediction": "x", "t_eps": 0.05, "time": "logit_normal", "time_mu": 0, "time_sigma": 1, "base_weight": 1}
    step = FlowStep(rae, FlowSettings(**flow, shift=1), 3, 0.1, 0.5)
    draws = FlowDraws.at(0, BATCH, rae.latent_shape, META, training=True)
    latents = step.latents({"image": torch.empty(3, 3, 64, 64, dtype=torch.uint8, device=META)}, draws, training=True)
    terms = step.losses(network, latents, step.dropped(torch.zeros(3, dtype=torch.long, device=META), draws), draws)
    quartile_sums(terms["loss"].detach(), draws.time)
    terms["loss"].mean().backward()
    assert all(p.grad.device == META for p in network.parameters())


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_guided_sampling(method):
    network = build_network({"name": "RAEv2DiT", **SIZES}, SHAPE, 3, 0.1, 0).to(META)
    between = Guidance(1.5, 0.2, 0.8)
    plain = sampling.conditional(network, "velocity")
    internal = sampling.internal_guidance(network, "velocity", between, null_label=3, null_scale=1.2)
    run = sampling.autoguidance(internal, plain, between)
    field = sampling.for_labels(
        sampling.classifier_free(run, 3, between), torch.zeros(2, dtype=torch.long, device=META)
    )
    assert (
        sampling.solve(field, torch.empty(2, *SHAPE, device=META), sampling_grid(4, 1.0, "rae"), method).device == META
    )

"""The step of `src/training/stage1_step.py` against the published one, written plainly, from equal states and draws."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.plain_step import PlainStep
from src.core.ema import EMA
from src.core.images import unit_to_signed
from src.losses.diffaug import UNIFORMS_PER_BATCH, UNIFORMS_PER_SAMPLE, DiffAug
from src.losses.gan import discriminator_loss, generator_loss
from src.losses.lpips import LPIPS
from src.models.discriminator import DinoDiscriminator
from src.training.stage1_step import NoiseDraws, Phase, StepSettings, TrainingStep
from tests.conftest import make_rae

TOLERANCE = 1e-5
BATCH = 3
FULL = Phase(lpips=True, gan=True, disc=True)


def make_pair(train_positions=False, statistics=False, augment_prob=1.0, **settings):
    """(plain, ours) from one state, and the draws of a step."""
    rae = make_rae(train_positions=train_positions)
    # At its initial 0 the cls token meets LayerNorms of eps 1e-12, which blow rounding up by 1e6. One step later it is over.
    torch.nn.init.normal_(rae.decoder.trainable_cls_token, generator=torch.Generator().manual_seed(5))
    if statistics:
        rng = torch.Generator().manual_seed(3)
        rae.set_statistics(
            torch.randn(rae.latent_shape, generator=rng), torch.rand(rae.latent_shape, generator=rng) + 0.1
        )
    lpips = LPIPS(None, None, weights="untrained", channels=(4, 8, 8, 16, 16))
    disc = DinoDiscriminator(
        None, ks=5, key_depths=(1, 3), norm_type="bn", using_spec_norm=True, recipe="tiny", weights="untrained"
    )
    augment = DiffAug(prob=augment_prob, cutout=0.3)
    weights = {"perceptual_weight": 0.7, "disc_weight": 0.75, "max_d_weight": 1e4}
    plain = PlainStep(deepcopy(rae), lpips, deepcopy(disc), augment, **weights)
    fixed = {"adaptive_weight": "global", "disc_fake": "fresh", "loss_chunk_size": None}
    ours = TrainingStep(
        rae,
        lpips,
        disc,
        augment,
        discriminator_loss("hinge"),
        generator_loss("hinge"),
        StepSettings(**{**weights, **fixed, **settings}),
    )
    rng = torch.Generator().manual_seed(7)
    draws = SimpleNamespace(
        images=torch.randint(0, 256, (BATCH, 3, 64, 64), generator=rng).float() / 255,
        noise=NoiseDraws(torch.rand(BATCH, generator=rng), torch.randn(BATCH, *rae.latent_shape, generator=rng)),
        augment=[
            augment.draw(
                torch.rand(UNIFORMS_PER_BATCH, generator=rng), torch.rand(BATCH, UNIFORMS_PER_SAMPLE, generator=rng)
            )
            for _ in range(3)
        ],
    )
    return plain, ours, draws


def run_generator(plain, ours, draws, phase, noise=True):
    noise_draws = draws.noise if noise else None
    expected = plain.generator(draws.images, noise_draws, draws.augment[0], phase)
    result = ours.generator(
        draws.images, noise_draws, draws.augment[0], phase, backward=lambda output, gradient: output.backward(gradient)
    )
    return expected, result


def assert_gradients_equal(ours, plain):
    """Each below 1e-5, and to 0.1 % of its own largest entry. Biases that softmax or a norm ignores have no gradient but rounding."""
    compared = 0
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            difference, largest = (mine.grad - theirs.grad).abs().max(), theirs.grad.abs().max()
            assert largest > 0, name
            assert difference < TOLERANCE, f"{name}: {difference}"
            assert difference < 1e-3 * largest or name.endswith(("key.bias", "first.bias", "second.bias")), (
                f"{name}: {difference} of {largest}"
            )
            compared += 1
    assert compared


@pytest.mark.parametrize(
    "phase", [Phase(False, False, False), Phase(True, False, False), FULL], ids=["l1", "lpips", "gan"]
)
@pytest.mark.parametrize("options", [
    {}, {"train_positions": True}, {"statistics": True}, {"augment_prob": 0.0}, {"loss_chunk_size": 2}, {"loss_chunk_size": 1},
], ids=str)  # fmt: skip
def test_generator_terms_and_every_decoder_gradient(phase, options):
    plain, ours, draws = make_pair(**options)
    expected, result = run_generator(plain, ours, draws, phase)
    assert result.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(result.terms[name] - value) < TOLERANCE * max(1, abs(value)), name
    assert_gradients_equal(ours.rae.decoder, plain.rae.decoder)
    trained = ours.rae.decoder.decoder_pos_embed.grad is not None
    assert trained == options.get("train_positions", False)


def test_noise_off_and_on_differ_and_both_agree():
    losses = []
    for noise in (False, True):
        plain, ours, draws = make_pair()
        expected, result = run_generator(plain, ours, draws, FULL, noise=noise)
        assert abs(result.terms["loss"] - expected["loss"]) < TOLERANCE
        assert_gradients_equal(ours.rae.decoder, plain.rae.decoder)
        losses.append(float(expected["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-4


def test_checkpointed_activations_change_nothing():
    plain, ours, draws = make_pair()
    ours.rae.decoder.activation_checkpointing = True
    run_generator(plain, ours, draws, FULL)
    assert_gradients_equal(ours.rae.decoder, plain.rae.decoder)


def test_discriminator_gradients_and_state():
    plain, ours, draws = make_pair()
    _, result = run_generator(plain, ours, draws, FULL)
    expected = plain.discriminate(draws.images, draws.augment[1], draws.augment[2])
    terms = discriminate(ours, result, draws)
    assert abs(terms["loss"] - expected["loss"]) < TOLERANCE
    for name in ("logits_fake", "logits_real"):
        assert abs(terms[name] - expected[name]) < TOLERANCE
    assert_gradients_equal(ours.discriminator.heads, plain.discriminator.heads)
    for mine, theirs in zip(ours.discriminator.buffers(), plain.discriminator.buffers(), strict=True):
        assert (mine - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2])
def test_discriminator_in_chunks(chunk):
    plain, ours, draws = make_pair()
    _, result = run_generator(plain, ours, draws, FULL)
    expected = plain.discriminate(draws.images, draws.augment[1], draws.augment[2])
    ours.settings = replace(ours.settings, loss_chunk_size=chunk)
    terms = discriminate(ours, result, draws)
    assert abs(terms["loss"] - expected["loss"]) < TOLERANCE
    assert_gradients_equal(ours.discriminator.heads, plain.discriminator.heads)


def test_the_generator_step_leaves_the_discriminator_alone():
    _, ours, draws = make_pair()
    before = deepcopy(ours.discriminator.state_dict())
    run_generator(*make_pair()[:1], ours, draws, FULL)
    assert all(torch.equal(before[name], value) for name, value in ours.discriminator.state_dict().items())
    assert all(p.grad is None for p in ours.discriminator.parameters())


def test_several_steps_end_at_the_same_weights_and_averages():
    """SGD rather than Adam, which turns rounding into steps where a gradient is zero."""
    plain, ours, draws = make_pair()
    sides = []
    for step in (plain, ours):
        decoder, heads = step.rae.decoder, step.discriminator.heads
        optimizers = [
            torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (decoder, heads)
        ]
        sides.append((EMA(decoder, 0.9), optimizers))
    for _ in range(4):
        _, result = run_generator(plain, ours, draws, FULL)
        for ema, (optimizer, _) in sides:
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
        plain.discriminate(draws.images, draws.augment[1], draws.augment[2])
        discriminate(ours, result, draws)
        for _, (_, optimizer) in sides:
            optimizer.step()
            optimizer.zero_grad()
    pairs = [
        (ours.rae.decoder, plain.rae.decoder),
        (ours.discriminator.heads, plain.discriminator.heads),
        (sides[1][0].average, sides[0][0].average),
    ]
    for mine, theirs in pairs:
        for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert (a - b).abs().max() < TOLERANCE, name


def test_reuse_judges_the_generators_own_images():
    _, ours, draws = make_pair(disc_fake="reuse")
    _, result = run_generator(*make_pair()[:1], ours, draws, FULL)
    grid = (ours.fake(result) + 1) * 127.5
    assert torch.allclose(grid, grid.round(), atol=1e-3)
    assert (ours.fake(result) - (result.reconstruction.clamp(0, 1) * 2 - 1)).abs().max() <= 1 / 255 + 1e-6


def discriminate(ours, result, draws):
    terms = {}
    for images, augment, label in (
        (ours.fake(result), draws.augment[1], "fake"),
        (unit_to_signed(draws.images), draws.augment[2], "real"),
    ):
        ours.discriminator.power_iteration()
        values = ours.discriminate(images, augment, label, backward=lambda loss, weight: loss.backward(weight))
        for name, value in values.items():
            terms[name] = terms.get(name, 0) + value
    return terms

"""The step of `src/training/stage1_step.py` matches the published one, written plainly, from equal states and draws.

The two differ by rounding (2e-7 in attention), and by more where a loss has a kink: |x| at 0, ReLU. One pixel or unit in
100,000 on the other side of a kink moves gradients by 1 %, and which one depends on the CPU. So the losses are smooth here.
"""

import weakref
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.plain_step import PlainStep, step_settings
from src.core.ema import EMA
from src.core.images import bytes_to_signed, bytes_to_unit, unit_to_bytes
from src.losses.diffaug import UNIFORMS_PER_BATCH, UNIFORMS_PER_SAMPLE, DiffAug
from src.losses.lpips import LPIPS
from src.models.discriminator import DinoDiscriminator
from src.training.stage1_step import LatentNoise, Phase, TrainingStep
from tests.conftest import make_rae

TERMS, GRADIENTS = 1e-5, 1e-4
"""Relative to the largest entry. Measured over seeds and versions: 4e-7; 3e-6 in the decoder and 1.4e-5 in the heads."""
BATCH = 3
FULL = Phase(lpips=True, gan=True, disc=True)


@pytest.fixture(autouse=True)
def _no_kink_in_the_heads(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "leaky_relu", lambda x, *_, **__: torch.nn.functional.gelu(x))


def make_pair(train_positions=False, statistics=False, augment_prob=1.0, **settings):
    """Return (plain, ours) with equal states, and the draws of a step."""
    rae = make_rae(train_positions=train_positions)
    # At its initial 0 the cls token meets LayerNorms of eps 1e-12, which amplify rounding by 1e6. One step later that is over.
    torch.nn.init.normal_(rae.decoder.trainable_cls_token, generator=torch.Generator().manual_seed(5))
    rng = torch.Generator().manual_seed(3)
    if statistics:
        shape = rae.latent_shape
        rae.set_statistics(torch.randn(shape, generator=rng), torch.rand(shape, generator=rng) + 0.1)
    lpips = LPIPS(None, None, "tiny")
    for number, layer in enumerate(lpips.vgg.features):
        if isinstance(layer, torch.nn.ReLU):
            lpips.vgg.features[number] = torch.nn.Softplus()
    disc = DinoDiscriminator(None, 5, (1, 3), "bn", using_spec_norm=True, recipe="S_8", weights="tiny")
    augment = DiffAug(prob=augment_prob, cutout=0.3)
    weights = {"perceptual_weight": 0.7, "disc_weight": 0.75, "max_d_weight": 1e4}
    plain = PlainStep(deepcopy(rae), lpips, deepcopy(disc), augment, **weights)
    ours = TrainingStep(rae, lpips, disc, augment, step_settings(**weights, **settings))

    def uniform(*shape):
        return torch.rand(*shape, generator=rng)

    # -1 or 2: no output is near them, so |x| has no kink
    images = torch.randint(0, 2, (BATCH, 3, 64, 64), generator=rng) * 3.0 - 1
    noise = LatentNoise(uniform(BATCH, 1, 1, 1), torch.randn(BATCH, *rae.latent_shape, generator=rng))
    sizes = (UNIFORMS_PER_BATCH,), (BATCH, UNIFORMS_PER_SAMPLE)
    drawn = {name: augment.draw(*(uniform(*size) for size in sizes)) for name in ("generator", "fake", "real")}
    return plain, ours, SimpleNamespace(images=images, noise=noise, augment=drawn)


def run_generator(plain, ours, draws, phase):
    """Return (plain terms, our result); both decoders have gradients afterwards."""
    expected = plain.generator(draws.images, draws.noise, draws.augment["generator"], phase)
    return expected, ours.generator(draws.images, draws.noise, draws.augment["generator"], phase)


def run_discriminator(plain, ours, draws, result):
    """Return (plain terms, our terms); both heads have gradients afterwards. Both see the same fakes: on the 8-bit grid,
    different rounding in attention moves one of 36,864 pixels to the next level, and D's gradient by 2e-4."""
    real, fake = unit_to_bytes(draws.images), ours.fake(result.fake_source)
    expected = plain.discriminate(
        bytes_to_unit(real), bytes_to_signed(fake.pixels), draws.augment["fake"], draws.augment["real"]
    )
    (terms,) = ours.discriminator_updates([real], [fake], lambda label, *_: draws.augment[label])
    return expected, terms


def assert_close(mine, theirs, name):
    assert (mine - theirs).abs().max() <= TERMS * theirs.detach().abs().max(), name


def assert_gradients_equal(ours, plain):
    """Compare relative to each gradient's largest entry; biases that softmax or a norm cancels, to the largest of all."""
    pairs = [(n, p.grad, q.grad) for (n, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True)]
    largest = {name: theirs.abs().max() for name, _, theirs in pairs if theirs is not None}
    of_all = max(largest.values())
    for name, mine, theirs in pairs:
        assert (mine is None) == (theirs is None), name
        if mine is None:
            continue
        scale = of_all if name.endswith(("key.bias", "first.bias", "second.bias")) else largest[name]
        difference = (mine - theirs).abs().max()
        assert difference < GRADIENTS * scale, f"{name}: {difference} of {scale}"


@pytest.mark.parametrize("term", ["perceptual_weight", "disc_weight"])
def test_loss_weight_that_is_one_per_cent_off_is_detected(term):
    plain, ours, draws = make_pair()
    plain = replace(plain, **{term: 1.01 * getattr(plain, term)})
    run_generator(plain, ours, draws, FULL)
    with pytest.raises(AssertionError, match=" of "):
        assert_gradients_equal(ours.rae.decoder, plain.rae.decoder)


@pytest.mark.parametrize(
    "phase", [Phase(False, False, False), Phase(True, False, False), FULL], ids=["l1", "lpips", "gan"]
)
@pytest.mark.parametrize("options", [
    {}, {"train_positions": True}, {"statistics": True}, {"augment_prob": 0.0}, {"loss_chunk_size": 2}, {"loss_chunk_size": 1},
    {"noise": False}, {"activation_checkpointing": True},
], ids=str)  # fmt: skip
def test_generator_terms_and_every_decoder_gradient(phase, options):
    options = dict(options)
    noise, checkpointing = options.pop("noise", True), options.pop("activation_checkpointing", False)
    plain, ours, draws = make_pair(**options)
    ours.rae.decoder.activation_checkpointing = checkpointing
    draws.noise = draws.noise if noise else None
    before = deepcopy(ours.discriminator.state_dict())
    expected, result = run_generator(plain, ours, draws, phase)
    assert result.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(result.terms[name], value, name)
    assert_gradients_equal(ours.rae.decoder, plain.rae.decoder)
    trained = ours.rae.decoder.decoder_pos_embed.grad is not None
    assert trained == options.get("train_positions", False)
    # and D is left alone
    assert all(torch.equal(before[name], value) for name, value in ours.discriminator.state_dict().items())
    assert all(p.grad is None for p in ours.discriminator.parameters())


def test_shares_of_micro_batches_add_up_at_any_loss_scale():
    plain, ours, draws = make_pair()
    expected = plain.generator(draws.images, draws.noise, draws.augment["generator"], FULL)
    for scale in (1.0, 1024.0):
        arguments = (draws.images, draws.noise, draws.augment["generator"], FULL)
        terms = ours.generator(*arguments, loss_scale=scale, share=0.5).terms
        assert_close(terms["loss"], expected["loss"], "loss")
    assert_gradients_equal(ours.rae.decoder, plain.rae.decoder)


def test_smaller_last_chunk_causes_no_recompilation():
    _, ours, draws = make_pair(loss_chunk_size=2)
    sizes = set()

    def backend(graph, inputs):
        sizes.update(len(tensor) for tensor in inputs if getattr(tensor, "ndim", 0) == 4 and tensor.shape[-1] == 64)
        return graph.forward

    ours.lpips.vgg.compile(backend=backend)
    ours.generator(draws.images, None, None, Phase(lpips=True, gan=False, disc=False))
    assert BATCH == 3 and sizes == {2}
    assert ours.rae.decoder.decoder_pred.weight.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_discriminator_gradients_and_state(chunk):
    plain, ours, draws = make_pair(loss_chunk_size=chunk)
    _, result = run_generator(plain, ours, draws, FULL)
    expected, terms = run_discriminator(plain, ours, draws, result)
    assert abs(terms["accuracy"] - expected.pop("accuracy")) < 0.01  # a logit may round to the other side of 0
    for name, value in expected.items():
        assert_close(terms[name], value, name)
    assert_gradients_equal(ours.discriminator.heads, plain.discriminator.heads)
    for mine, theirs in zip(ours.discriminator.buffers(), plain.discriminator.buffers(), strict=True):
        assert_close(mine, theirs, "power iteration")


def test_fakes_are_new_noiseless_reconstructions_on_the_8_bit_grid():
    plain, ours, draws = make_pair()
    _, result = run_generator(plain, ours, draws, FULL)
    for step in (plain, ours):
        with torch.no_grad():
            step.rae.decoder.decoder_pred.bias += 0.1  # an update in between
    fake = ours.fake(result.fake_source)
    assert fake.nan_flag == 0
    steps = ((bytes_to_signed(fake.pixels) - plain.fake(draws.images)) * 127.5).abs()
    assert steps.max() < 1.01 and steps.mean() < 1e-3  # rounding moves a few pixels to the next level


def test_reuse_takes_the_generators_own_images():
    plain, ours, draws = make_pair(disc_fake="reuse")
    _, result = run_generator(plain, ours, draws, FULL)
    with torch.no_grad():
        noisy = torch.addcmul(ours.rae.encode_raw(draws.images), draws.noise.normal, draws.noise.sigma)
        expected = ours.rae.decode_raw(noisy).clamp(0, 1) * 255
        ours.rae.decoder.decoder_pred.bias += 0.1
    assert (ours.fake(result.fake_source).pixels - expected).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("disc_fake", ["fresh", "reuse"])
def test_non_finite_fake_spoils_the_discriminators_loss_and_gradient(disc_fake):
    """Bytes can't hold a NaN, so it is passed beside them: the update is skipped, whoever scales gradients."""
    _, ours, draws = make_pair(disc_fake=disc_fake)
    if disc_fake == "reuse":
        ours.rae.decoder.decoder_pred.bias.data[0] = torch.inf
    result = ours.generator(draws.images, draws.noise, draws.augment["generator"], FULL)
    ours.rae.decoder.decoder_pred.bias.data[0] = torch.inf
    updates = ours.discriminator_updates(
        [unit_to_bytes(draws.images)], [result.fake_source], lambda label, *_: draws.augment[label]
    )
    assert next(updates)["loss"].isnan()
    assert all(not p.grad.isfinite().any() for p in ours.discriminator.heads.parameters())


def test_latents_are_freed_once_decoded_and_each_fake_is_decoded_once():
    _, ours, draws = make_pair(disc_updates=2)
    results = [ours.generator(draws.images, draws.noise, draws.augment["generator"], FULL) for _ in range(2)]
    sources, real = [result.fake_source for result in results], [unit_to_bytes(draws.images)] * 2
    latents, made = [weakref.ref(source) for source in sources], []
    del results
    decode, ours.rae.decode_raw = (
        ours.rae.decode_raw,
        lambda z: (made.append([ref() is None for ref in latents]), decode(z))[1],
    )
    assert len(list(ours.discriminator_updates(real, sources, lambda label, *_: draws.augment[label]))) == 2
    assert made == [[False, False], [True, False]]
    assert all(ref() is None for ref in latents) and all(source.pixels.dtype == torch.uint8 for source in sources)


def test_inputs_of_other_terms_are_freed_before_the_gan_term():
    """The GAN term is the memory peak of a step."""
    _, ours, draws = make_pair()
    given = [draws.images.clone(), draws.noise._replace(normal=draws.noise.normal.clone())]
    seen, gan = [weakref.ref(given[0]), weakref.ref(given[1].normal)], ours.gan_gradient
    ours.gan_gradient = lambda *given: gan(*given) if all(ref() is None for ref in seen) else None
    ours.generator(given.pop(0), given.pop(0), draws.augment["generator"], FULL)


def test_several_steps_move_weights_and_averages_alike():
    """SGD rather than Adam, which turns the rounding error of a zero gradient into a full step."""
    plain, ours, draws = make_pair()
    trained = [(step.rae.decoder, step.discriminator.heads) for step in (plain, ours)]
    start = [deepcopy(module) for module in (*trained[0], trained[0][0])]
    averages = [EMA(decoder, 0.9) for decoder, _ in trained]
    optimizers = [[torch.optim.SGD(module.parameters(), 1.0) for module in modules] for modules in trained]
    for _ in range(4):
        _, result = run_generator(plain, ours, draws, FULL)
        for average, (optimizer, _) in zip(averages, optimizers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            average.update()
        run_discriminator(plain, ours, draws, result)
        for _, optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    theirs, mine = ((*modules, ema.average) for modules, ema in zip(trained, averages, strict=True))
    for before, a, b in zip(start, mine, theirs, strict=True):
        before, a, b = (torch.nn.utils.parameters_to_vector(module.parameters()) for module in (before, a, b))
        assert (a - b).norm() < GRADIENTS * (b - before).norm()

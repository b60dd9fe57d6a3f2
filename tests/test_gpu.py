"""Tests that need a GPU; all are skipped without one."""

import os
from dataclasses import replace

import pytest
import torch

from benchmarks.train_step import autocast
from src.core.images import unit_to_bytes
from src.core.precision import cast_frozen, full_float32
from src.metrics.generation import precision_recall
from src.metrics.inception import InceptionFeatures
from src.metrics.reconstruction import ReconstructionScore
from tests.conftest import make_rae
from tests.test_step_parity import FULL, make_pair
from tests.training import same, train, train_stage2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]
QUIET = ["~callbacks.rfid", "logger=csv", "trainer.accelerator=gpu"]
GPU = torch.device("cuda")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_whole_run(tmp_path, precision):
    run = train(tmp_path, *QUIET, f"trainer.precision={precision}")
    assert run.trainer.global_step == 6
    assert all(value.isfinite().all() for value in run.module.state_dict().values())
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def terms(run):
    return {name: float(value) for name, value in run.module.train_terms.items()}


def test_compiled_run_gives_the_same_losses_with_gan(tmp_path):
    """Losses of the third update, when D has been trained once."""
    eager, compiled = (
        terms(train(tmp_path / name, *QUIET, "trainer.max_steps=3", f"model.compile={name}"))
        for name in ("false", "true")
    )
    assert "train/gan" in eager and "disc/loss" in eager
    assert compiled == pytest.approx(eager, rel=5e-2, abs=1e-2)  # mean logits are near 0
    assert compiled["train/l1"] == pytest.approx(eager["train/l1"], rel=1e-3)


def test_nccl_with_one_process_changes_nothing(tmp_path):
    single = terms(train(tmp_path / "single", *QUIET, "trainer.max_steps=3"))
    try:
        ddp = train(tmp_path / "ddp", *QUIET, "trainer.max_steps=3", "trainer.strategy=ddp", "trainer.devices=1")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert ddp.trainer.strategy.process_group_backend == "nccl"
    assert terms(ddp) == pytest.approx(single, rel=5e-3, abs=1e-3)  # kernels with atomic sums differ from run to run


@pytest.fixture
def deterministic():
    yield ["trainer.deterministic=true"]
    torch.use_deterministic_algorithms(False)


def test_deterministic_runs_are_bit_equal_and_so_is_a_resumed_one(tmp_path, deterministic):
    whole, again, half = (
        train(tmp_path / name, *QUIET, *deterministic, f"trainer.max_steps={steps}")
        for name, steps in (("whole", 6), ("again", 6), ("half", 3))
    )
    assert half.trainer.global_step == 3
    checkpoint = tmp_path / "half/checkpoints/last.ckpt"
    resumed = train(tmp_path / "resumed", *QUIET, *deterministic, "trainer.max_steps=6", checkpoint=checkpoint)
    assert same(whole.module.state_dict(), again.module.state_dict())
    assert same(whole.module.state_dict(), resumed.module.state_dict())


@pytest.mark.parametrize("words", [
    ["trainer.precision=bf16"], ["trainer.precision=16", "model.optimizer.name=muon"], ["trainer.deterministic=true"],
], ids=str)  # fmt: skip
def test_run_of_stage_2_and_guided_samples(tmp_path, autoencoder, deterministic, words):
    run = train_stage2(tmp_path, autoencoder, "trainer.accelerator=gpu", "model.sampler.cfg=2", *words)
    assert all(value.isfinite().all() for value in run.module.state_dict().values())
    rows = run.module.to(GPU).sample_rows(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=GPU))
    assert {row.device.type for row in rows} == {GPU.type}


def test_precision_and_recall_of_a_deterministic_run(deterministic):
    torch.use_deterministic_algorithms(True)
    features = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    assert precision_recall(*features.to(GPU)) == precision_recall(*features)


def on_gpu(step, draws):
    for module in (step.rae, step.lpips, step.discriminator):
        module.to(GPU)
    draws.images = draws.images.to(GPU)
    draws.augment = {name: replace(draw, samples=draw.samples.to(GPU)) for name, draw in draws.augment.items()}
    return step, draws


def generator_gradients(step, draws, **options):
    step.rae.decoder.zero_grad()
    step.generator(draws.images, None, draws.augment["generator"], FULL, **options)
    # A copy: a module that moves later takes its gradients along.
    return {name: p.grad.clone().cpu() for name, p in step.rae.decoder.named_parameters() if p.grad is not None}


def assert_near(found, expected, share):
    """Compare up to a share of each gradient's largest entry. Gradients of key biases, which softmax cancels, are only rounding."""
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        if not name.endswith("key.bias"):
            assert (found[name] - gradient).abs().max() < share * gradient.abs().max(), name


@pytest.fixture
def _no_kink_in_the_heads(monkeypatch):
    """Smooth, as in tests/test_step_parity.py: on which side of the kink a unit near 0 falls depends on the device."""
    monkeypatch.setattr(torch.nn.functional, "leaky_relu", lambda x, *_, **__: torch.nn.functional.gelu(x))


@pytest.mark.usefixtures("_no_kink_in_the_heads")
def test_gradients_equal_those_of_a_cpu():
    _, ours, draws = make_pair()
    expected = generator_gradients(ours, draws)
    with full_float32(GPU):
        assert_near(generator_gradients(*on_gpu(ours, draws)), expected, 1e-3)


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.3), ("fp16", 0.1)])
def test_gradients_in_half_precision(precision, share):
    _, ours, draws = make_pair()
    on_gpu(ours, draws)
    with full_float32(GPU):
        expected = generator_gradients(ours, draws)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    cast_frozen(ours.rae.encoder, dtype)
    cast_frozen(ours.discriminator.trunk, dtype)
    scale = 2.0**10 if precision == "fp16" else 1.0

    def backward(output, gradient):
        output.backward(gradient * scale)

    with autocast(GPU, precision):
        found = generator_gradients(ours, draws, backward=backward, loss_scale=scale)
    whole, exact = (torch.cat([gradient.flatten() for gradient in side.values()]) for side in (found, expected))
    assert (whole / scale - exact).norm() < share * exact.norm()


def test_scores_equal_those_of_a_cpu():
    scores, rng = [], torch.Generator().manual_seed(0)
    images, other = (torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=rng) for _ in range(2))
    for device in (torch.device("cpu"), GPU):
        rae, inception = make_rae().to(device), InceptionFeatures(None, weights="tiny").to(device)
        score = ReconstructionScore([inception], 4, make_pair()[1].lpips.to(device))
        with torch.no_grad(), full_float32(device):
            decoded = rae.decode(rae.encode(images.to(device)))
            score.update(images, 0.5 * decoded.clamp(0, 1) + 0.5 * other.to(device) / 255)
        scores.append(score.compute(warn_of_few=False))
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_host_never_waits_inside_a_step(precision):
    _, ours, draws = make_pair()
    step, draws = on_gpu(ours, draws)
    real = [unit_to_bytes(draws.images)]

    def once() -> None:
        with autocast(GPU, precision):
            result = step.generator(draws.images, None, draws.augment["generator"], FULL)
            list(step.discriminator_updates(real, [result.fake_source], lambda label, *_: draws.augment[label]))

    once()  # libraries initialize at first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")

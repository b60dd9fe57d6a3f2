"""What only a GPU can show. Without one, all of it is skipped."""

from dataclasses import replace

import pytest
import torch

from benchmarks.train_step import autocast
from tests.test_step_parity import FULL, make_pair
from tests.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]
QUIET = ["~callbacks.rfid", "logger=csv", "trainer.accelerator=gpu"]
GPU = torch.device("cuda")


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_a_whole_run(tmp_path, precision):
    run = train(tmp_path, *QUIET, f"trainer.precision={precision}")
    assert run.trainer.global_step == 6
    assert all(value.isfinite().all() for value in run.module.state_dict().values())
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_a_compiled_run_gives_the_same_first_losses(tmp_path):
    losses = [
        float(train(tmp_path / name, *QUIET, "trainer.max_steps=1", *extra).module.train_terms["train/loss"])
        for name, extra in (("eager", []), ("compiled", ["model.compile=true"]))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def on_gpu(step, draws):
    for module in (step.rae, step.lpips, step.discriminator):
        module.to(GPU)
    draws.images = draws.images.to(GPU)
    draws.augment = {name: replace(draw, samples=draw.samples.to(GPU)) for name, draw in draws.augment.items()}
    return step, draws


def generator_gradients(step, draws):
    step.generator(draws.images, None, draws.augment["generator"], FULL)
    return {name: p.grad.cpu() for name, p in step.rae.decoder.named_parameters() if p.grad is not None}


def test_gradients_equal_those_of_a_cpu():
    _, ours, draws = make_pair()
    expected = generator_gradients(ours, draws)
    ours.rae.decoder.zero_grad()
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = generator_gradients(*on_gpu(ours, draws))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-4 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_never_waits_inside_a_step(precision):
    _, ours, draws = make_pair()
    step, draws = on_gpu(ours, draws)

    def once() -> None:
        with autocast(GPU, precision):
            result = step.generator(draws.images, None, draws.augment["generator"], FULL)
            list(step.discriminator_updates([result], lambda label, *_: draws.augment[label]))

    once()  # libraries are set up at first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")

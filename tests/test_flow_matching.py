"""Times, paths and losses of flow matching, against numbers worked out by hand or a second formula."""

import math

import pytest
import torch

from src.core.errors import UserError
from src.losses import flow_matching as fm

SHAPE = (4, 3, 3)


def latents(seed=0, batch=4):
    rng = torch.Generator().manual_seed(seed)
    x, noise, output = (torch.randn(batch, *SHAPE, generator=rng) for _ in range(3))
    return x, noise, output, torch.tensor([0.0, 0.02, 0.4, 1.0])[:batch]


@pytest.mark.parametrize(("shape", "s"), [
    ((768, 16, 16), 6.928), ((768, 32, 32), 13.856), ((1024, 16, 16), 8), ((384, 16, 16), 4.899), ((16, 16, 16), 1),
])  # fmt: skip
def test_time_shift(shape, s):
    assert fm.time_shift(shape) == pytest.approx(s, abs=1e-3)


def test_time_shift_below_one_is_rejected():
    with pytest.raises(UserError, match=r"16 x 8 x 8 = 1024 numbers give a time shift of 0\.500"):
        fm.time_shift((16, 8, 8))


def test_shifted_times():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = fm.shift_time(t, 6.928)
    assert torch.allclose(shifted, 6.928 * t / (1 + 5.928 * t), rtol=1e-12)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert fm.shift_time(0.5, 6.928) == pytest.approx(0.874, abs=1e-3)  # half of the draws lie above
    assert torch.equal(fm.shift_time(t, 1.0), t)


@pytest.mark.parametrize(("steps", "kind", "message"), [
    (1, "rae", "num_steps=1: a rae grid needs at least 2"), (0, "raev2", "at least 1"), (5, "RAE", "kind='RAE': expected rae or"),
])  # fmt: skip
def test_invalid_grids_are_rejected(steps, kind, message):
    with pytest.raises(UserError, match=message):
        fm.sampling_grid(steps, 2.0, kind)
    assert [fm.sampling_grid(2, 1.0, "rae")[0], *fm.sampling_grid(1, 1.0, "raev2")] == [1, 1, 0]  # the smallest ones


def draw_times(time: str, uniforms: torch.Tensor, mu: float = 0.0, sigma: float = 1.0) -> torch.Tensor:
    values = {"prediction": "velocity", "t_eps": 0.0, "shift": None, "base_weight": 1.0}
    return fm.FlowSettings(time=time, time_mu=mu, time_sigma=sigma, **values).draw_time(uniforms, 1.0)


def test_uniform_times():
    assert torch.allclose(draw_times("uniform", torch.tensor([0.0, 0.5])), torch.tensor([0.0, 0.4995]))


@pytest.mark.parametrize("last", [0.999, None])
@pytest.mark.parametrize(("mu", "sigma"), [(0.0, 1.0), (2.0, 1.5), (-0.8, 0.8)])
def test_logit_normal_times(mu, sigma, last):
    """The share of draws below t is Phi(logit t), divided by Phi(logit .999) where the distribution ends there."""
    u = torch.linspace(0, 1, 20001)[:-1]
    t = draw_times("logit_normal" if last is None else "truncated_logit_normal", u, mu, sigma)
    assert t.dtype == u.dtype and t[0] < (0.01 if last is None else 1e-12) and (t.diff() >= 0).all()
    assert (t.max() > 0.9) if last is None else (0.9 < t.max() <= last)

    def phi(at):
        return 0.5 * (1 + math.erf((math.log(at / (1 - at)) - mu) / sigma / math.sqrt(2)))

    for at in (0.1, 0.5, 0.9, 0.99):
        assert (t < at).double().mean() == pytest.approx(phi(at) / (1 if last is None else phi(last)), abs=2e-4)


def test_path_and_velocity_agree():
    x, noise, _, t = latents()
    x_t = fm.interpolate(x, noise, t)
    assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[3], noise[3])
    assert torch.allclose(x_t[2], 0.6 * x[2] + 0.4 * noise[2])
    v = noise - x
    assert fm.velocity(v, x_t, t, "velocity") is v
    from_x = fm.velocity(x, x_t, t, "x")
    assert torch.allclose(from_x[2:], v[2:], atol=1e-5)  # t >= .05
    assert torch.allclose(from_x[1], v[1] * 0.02 / 0.05, atol=1e-5)
    with pytest.raises(UserError, match="prediction='noise': expected velocity or x"):
        fm.velocity(x, x_t, t, "noise")


@pytest.mark.parametrize("prediction", ["velocity", "x"])
def test_loss_of_raev2(prediction):
    """Squared difference of two velocities, each (x_t - x) / max(t, .05); with a base output the sum of both losses."""
    x, noise, output, t = latents()
    x_t = fm.interpolate(x, noise, t)
    target = (x_t - x) / t.clamp(min=0.05).reshape(-1, 1, 1, 1)
    expected = [
        (fm.velocity(part, x_t, t, prediction) - target).square().mean((1, 2, 3)) for part in (output, output * 0.3)
    ]
    loss = fm.flow_matching_loss((output, output * 0.3), x, noise, t, prediction, 0.05)
    assert torch.allclose(loss["full"], expected[0], rtol=1e-4)
    assert torch.allclose(loss["base"], expected[1], rtol=1e-4)
    assert torch.allclose(loss["loss"], expected[0] + expected[1], rtol=1e-4)
    if prediction == "x":
        weight = 1 / t.clamp(min=0.05).square()
        assert torch.allclose(loss["full"], (output - x).square().mean((1, 2, 3)) * weight, rtol=1e-5)
        with pytest.raises(UserError, match="t_eps=0"):
            fm.flow_matching_loss(output, x, noise, t, prediction, 0.0)


def test_losses_of_half_precision_outputs_are_float32():
    x, noise, output, t = latents()
    for prediction, t_eps in (("velocity", 0.0), ("velocity", 0.05), ("x", 0.05)):
        assert fm.flow_matching_loss(output.bfloat16(), x, noise, t, prediction, t_eps)["loss"].dtype == torch.float32


def test_losses_by_quartile_add_up():
    uniforms = torch.tensor([0.0, 0.1, 0.25, 0.74, 0.75, 1.0])
    losses = torch.tensor([1.0, 2, 4, 8, 16, 32])
    sums = fm.quartile_sums(losses, uniforms)
    assert sums.tolist() == [3, 4, 8, 48, 2, 1, 1, 2]
    assert torch.equal(sum(fm.quartile_sums(losses[part], uniforms[part]) for part in (slice(0, 2), slice(2, 6))), sums)
    with torch.autocast("cpu", torch.bfloat16):  # in training
        assert fm.quartile_sums(losses + 1 / 1024, uniforms)[0] == 3 + 2 / 1024

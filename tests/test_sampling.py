"""Solvers on equations with known solutions, and guidance on models that record their calls."""

import builtins
import math
from itertools import pairwise

import pytest
import torch

from src.core.errors import UserError
from src.evaluation.sampler import Sampler, SamplerSettings
from src.evaluation.sampling import (
    Guidance,
    autoguidance,
    classifier_free,
    conditional,
    for_labels,
    guide,
    internal_guidance,
    solve,
)  # fmt: skip
from src.losses.flow_matching import FlowSettings, sampling_grid

NULL = 9


def noise(dtype=torch.float64, batch=2):
    return torch.randn(batch, 2, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)


class Model(torch.nn.Module):
    """Output a + y/10 + t on all channels, optionally a base output twice as large; record the labels of each call."""

    def __init__(self, a=1.0, base=False):
        super().__init__()
        self.a, self.base, self.calls = a, base, []

    def forward(self, x, t, y):
        self.calls.append(y.tolist())
        output = torch.zeros_like(x) + (self.a + y.to(x.dtype) / 10 + t).reshape(-1, 1, 1, 1)
        return (output, 2 * output) if self.base else output


def cosine(x, t):
    """dx/dt = cos(3t) x, so x(0) = x(1) exp(-sin(3)/3)."""
    return torch.cos(3 * t).reshape(-1, 1, 1, 1) * x


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    z = noise()
    exact = z * math.exp(-math.sin(3) / 3)
    errors = [(solve(cosine, z, sampling_grid(n, 2.0, "raev2"), method) - exact).abs().max() for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_calls_of_the_solvers():
    grid = sampling_grid(5, 2.0, "rae")
    for method, expected in (
        ("euler", grid[:-1].tolist()),
        ("heun", [t for a, b in pairwise(grid) for t in (a, b)]),
    ):
        times = []

        def field(x, t, times=times):
            assert t.shape == (2,) and t.dtype == torch.float32 and t[0] == t[1]
            times.append(t[0].item())
            return torch.ones_like(x).bfloat16()

        result = solve(field, noise(torch.float32), grid, method)
        assert result.dtype == torch.float32
        assert times == pytest.approx([float(t) for t in expected])
    with pytest.raises(UserError, match="method='heun2': expected euler, heun or dopri5"):  # torchdiffeq's name
        solve(cosine, noise(), grid, "heun2")


def test_dopri5_names_the_missing_package(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install torchdiffeq"):
        solve(lambda x, t: x, noise(), sampling_grid(5, 1.0, "rae"), "dopri5")


def test_dopri5():
    pytest.importorskip("torchdiffeq")
    z = noise()
    result = solve(cosine, z, sampling_grid(5, 2.0, "raev2"), "dopri5")
    assert result.dtype == z.dtype and torch.allclose(result, z * math.exp(-math.sin(3) / 3), rtol=1e-2)


def test_guide():
    strong, weak = noise(batch=4), 3 * noise(batch=4)
    t = torch.tensor([0.1, 0.5, 0.9, 0.95])
    guided = guide(strong, weak, 1.5, t, 0.1, 0.9)
    assert torch.allclose(guided[:3], (1.5 * strong - 0.5 * weak)[:3]) and torch.equal(guided[3], strong[3])
    assert torch.equal(guide(strong, weak, 1.5, 0.05, 0.1, 0.9), strong)
    assert torch.allclose(guide(strong, weak, 1.0, 0.9, 0.1, 0.9), strong)
    assert torch.allclose(guide(strong, weak, 0.0, 0.1, 0.1, 0.9), weak)
    assert torch.allclose(guide(strong, strong, 7.0, t, 0.0, 1.0), strong)
    per_image = guide(strong, weak, torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64), 0.5, 0.0, 1.0)
    assert torch.allclose(per_image[0], weak[0]) and torch.allclose(per_image[2], (2 * strong - weak)[2])


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_classifier_free():
    model, y = Model(), torch.tensor([1, 2])
    guided = classifier_free(conditional(model, "velocity"), NULL, Guidance(2.0, 0.2, 0.8))
    inside = guided(noise(), times(0.2, 0.8), y)
    # 2 (1 + y/10 + t) - (1 + .9 + t)
    assert torch.allclose(inside[:, 0, 0, 0], times(0.5, 1.3)) and model.calls == [[1, 2, NULL, NULL]]
    outside = guided(noise(), times(0.9, 0.9), y)
    assert torch.allclose(outside[:, 0, 0, 0], times(2.0, 2.1)) and model.calls[1:] == [[1, 2]]
    mixed = guided(noise(), times(0.2, 0.9), y)
    assert torch.allclose(mixed[:, 0, 0, 0], times(0.5, 2.1))
    classifier_free(conditional(model, "velocity"), NULL, Guidance(1.0))(noise(), times(0.5, 0.5), y)
    assert model.calls[-1] == [1, 2]  # a scale of 1 costs nothing
    with pytest.raises(UserError, match="null label"):
        classifier_free(conditional(model, "velocity"), None, Guidance(2.0))


def test_autoguidance_runs_the_weak_model_inside_only():
    strong, weak, y = Model(), Model(0.5), torch.tensor([1, 2])
    guided = autoguidance(conditional(strong, "velocity"), conditional(weak, "velocity"), Guidance(1.42, 0.0, 0.5))
    inside = guided(noise(), times(0.5, 0.5), y)
    assert torch.allclose(inside[:, 0, 0, 0], times(1.6, 1.7) + 0.42 * 0.5)
    outside = guided(noise(), times(0.6, 0.6), y)
    assert torch.allclose(outside[:, 0, 0, 0], times(1.7, 1.8))
    assert strong.calls == [[1, 2]] * 2 and weak.calls == [[1, 2]]


def test_internal_guidance_is_one_forward():
    model, y, x = Model(base=True), torch.tensor([1, 2]), noise()
    guided = internal_guidance(model, "x", Guidance(1.78, 0.1, 1.0))
    for t, factor in ((times(0.5, 0.5), 2 - 1.78), (times(0.05, 0.05), 1)):
        clean = factor * (1 + y / 10 + t).reshape(2, 1, 1, 1)
        assert torch.allclose(guided(x, t, y), (x - clean) / t.reshape(2, 1, 1, 1))
    assert model.calls == [[1, 2]] * 2
    full = conditional(model, "velocity")(x, times(0.5, 0.5), y)
    assert torch.allclose(full[:, 0, 0, 0], times(1.6, 1.7))


@pytest.mark.parametrize(("change", "message"), [
    ({"cfg": 0.5}, "sampler.cfg=0.5: expected at least 1"), ({"t_min": 0.8, "t_max": 0.2}, "t_min=0.8 exceeds t_max=0.2"),
])  # fmt: skip
def test_invalid_guidance_is_rejected(change, message):
    scales = {"cfg": 1.0, "internal": 1.0, "auto": 1.0}
    values = {"num_steps": 5, "grid": "rae", "method": "euler", **scales, "t_min": 0.0, "t_max": 1.0}
    with pytest.raises(UserError, match=message):
        SamplerSettings.parse(values | change, "sampler")


def test_sampler_nests_the_guidance_of_its_settings():
    flow, interval = (
        {"time": "uniform", "time_mu": 0.0, "time_sigma": 1.0, "shift": 2.0, "base_weight": 1.0},
        (0.1, 0.9),
    )
    flows = [FlowSettings(prediction=kind, t_eps=eps, **flow) for kind, eps in (("x", 0.3), ("velocity", 0.0))]
    networks = model, weaker = Model(base=True), Model(2.0)
    for network in networks:
        network.latent_shape, network.null_label, network.num_classes, network.base_model_depth = (2, 3, 3), NULL, 9, 1
    scales = {"cfg": 1.5, "internal": 1.7, "auto": 1.3, "t_min": 0.1, "t_max": 0.9}
    settings = SamplerSettings(num_steps=9, grid="rae", method="heun", **scales)
    x, y = noise(), torch.tensor([1, 2])
    found = Sampler(model, settings, flows[0], 0, (weaker, flows[1]))
    run = internal_guidance(model, "x", Guidance(1.7, *interval), 0.3)
    run = autoguidance(run, conditional(weaker, "velocity"), Guidance(1.3, *interval))
    run = classifier_free(run, NULL, Guidance(1.5, *interval))
    expected = solve(for_labels(run, y), x, sampling_grid(9, 2.0, "rae"), "heun")
    assert torch.equal(found.integrate(x, y, found.grid), expected)


def test_half_precision_outputs_are_guided_in_float32():
    class Half(Model):
        def forward(self, x, t, y):
            return super().forward(x, t, y).bfloat16()

    guided = classifier_free(conditional(Half(), "velocity"), NULL, Guidance(4.0))
    assert guided(noise(torch.float32), torch.tensor([0.5, 0.5]), torch.tensor([1, 2])).dtype == torch.float32

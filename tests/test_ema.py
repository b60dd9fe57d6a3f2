"""EMA: averages trained weights by its formula and shares fixed ones."""

import torch
from torch import nn

from src.core.ema import EMA


def test_average_follows_its_formula_for_trained_weights_only():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    ema = EMA(module, 0.9)
    expected = module[1].weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        ema.update()
        expected = 0.9 * expected + 0.1 * module[1].weight.detach()
    assert torch.allclose(ema.average[1].weight, expected, atol=1e-6)
    assert ema.average[0].bias.data_ptr() == module[0].bias.data_ptr()
    assert not any(p.requires_grad for p in ema.average.parameters())

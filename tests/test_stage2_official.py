"""Stage 2 against values that the official code computed at toy sizes: bytetriper/RAE @a4d18c4 and nanovisionx/RAEv2
@8a0d238, float32 on a CPU, every weight and input a function of its name and index.

Values of a latent: its mean square, then its elements 37 and 200. Of the gradients: the norm of all, then the sum of the
parameters' norms.
"""

import zlib

import numpy as np
import pytest
import torch

from src.core.errors import UserError
from src.core.weights import read
from src.evaluation.sampling import (
    Guidance,
    autoguidance,
    classifier_free,
    conditional,
    for_labels,
    internal_guidance,
    solve,
)  # fmt: skip
from src.export import main as export
from src.formats.stage2 import averaged_weights, open_generator
from src.losses.flow_matching import flow_matching_loss, interpolate, sampling_grid
from src.models.dit import DiTDH, LightningDiT, RAEv2DiT
from tests.training import last, same, train_stage2

TOLERANCE = 1e-4
SIZES = {"input_size": 4, "in_channels": 5, "num_classes": 3}
TWO = {"hidden_size": [16, 24], "num_heads": [2, 2], **SIZES}
NULL = 3
SHIFT = 2.5
INSIDE = 0.2, 0.8


def named_values(name, shape):
    """Return numbers in [-1, 1) that depend on the name and the index (splitmix64)."""
    index = np.arange(int(np.prod(shape)), dtype=np.uint64)
    z = index + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    with np.errstate(over="ignore"):
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy(2 * ((z >> np.uint64(11)).astype(np.float64) / 2**53) - 1).reshape(shape)


def filled(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = named_values(name, parameter.shape)
            if "norm" in name and name.endswith("weight"):
                values = 1 + 0.3 * values
            elif parameter.ndim > 1:
                values = 1.5 * values / parameter[0].numel() ** 0.5
            else:
                values = 0.5 * values
            parameter.copy_(values)
    return model.eval()


def ditdh(depth=(2, 2)):
    return filled(DiTDH(depth=depth, **TWO))


PATCH_2 = {"patch_size": 2, "use_swiglu": False, "use_qknorm": True, "use_rmsnorm": False}
MODELS = {
    "lightning": lambda **options: filled(LightningDiT(hidden_size=24, depth=2, num_heads=2, **SIZES, **options)),
    "lightning_patch_2": lambda: MODELS["lightning"](**PATCH_2),
    "ditdh": ditdh,
    "raev2": lambda: filled(RAEv2DiT(patch_size=1, depth=[3, 2], base_model_depth=2, **TWO)),
}
OFFICIAL = {
    "lightning": {
        "forward": [1.235642, -0.1244406, 0.4727196], "loss": [2.915207, 4.241402, 3.23363], "gradients": [7.54861, 30.47194],
        "euler": [2.507472, 2.525566, -0.5182828], "heun": [2.48811, 2.535614, -0.5336926],
    },
    "lightning_patch_2": {
        "forward": [1.143451, -0.4867631, 0.3339741], "loss": [3.366544, 3.357535, 3.627574], "gradients": [4.468782, 18.80175],
        "euler": [2.240917, 1.533614, -0.6753911], "heun": [2.24076, 1.418271, -0.6842408],
    },
    "ditdh": {
        "forward": [1.172546, -1.024509, 0.2587629], "loss": [3.737029, 4.108451, 4.218576], "gradients": [6.953357, 36.29348],
        "euler": [2.369913, 1.98054, -1.665454], "heun": [2.364584, 1.902721, -1.584625],
        "cfg": [2.362452, 1.943115, -1.760824], "autoguidance": [2.587394, 1.986514, -1.892167],
    },
    "raev2": {
        "forward": [2.095655, -0.001377881, -2.609259], "base": [0.8356418, -1.378676, -1.097303], "loss": [107.674, 15.28075, 7.56685],
        "gradients": [199.1973, 1471.049], "euler": [3.254701, 0.3799176, 0.1780517],
        "internal": [45.84694, 10.10242, 8.771222], "internal_cfg": [118.0778, 17.40269, 14.06516],
    },
}  # fmt: skip


def latent_values(latent):
    return [latent.square().mean().item(), *latent.flatten()[[37, 200]].tolist()]


def values_of(name):
    model = MODELS[name]()
    x, noise = (1.7 * named_values(key, (3, 5, 4, 4)).float() for key in ("x", "noise"))
    t, labels = torch.tensor([0.2, 0.6, 0.9]), torch.tensor([0, 2, 1])
    prediction, t_eps, kind = ("x", 0.05, "raev2") if name == "raev2" else ("velocity", 0.0, "rae")
    with torch.no_grad():
        outputs = model(x, t, torch.tensor([0, 2, NULL]))
    result = dict(zip(("forward", "base"), map(latent_values, outputs if name == "raev2" else [outputs]), strict=False))

    outputs = model(interpolate(x, noise, t), t, torch.tensor([0, 2, NULL]))
    loss = flow_matching_loss(outputs, x, noise, t, prediction, t_eps)["loss"]
    loss.mean().backward()
    norms = torch.stack([parameter.grad.norm() for parameter in model.parameters()])
    result |= {"loss": loss.tolist(), "gradients": [norms.norm().item(), norms.sum().item()]}

    def sample(field, method="euler"):
        return latent_values(solve(for_labels(field, labels), noise, sampling_grid(8, SHIFT, kind), method))

    plain = conditional(model, prediction)
    result["euler"] = sample(plain)
    if name == "raev2":
        guidance = Guidance(2.3, *INSIDE)
        nested = internal_guidance(model, "x", guidance, null_label=NULL, null_scale=1.3)
        result["internal"] = sample(internal_guidance(model, "x", guidance))
        result["internal_cfg"] = sample(classifier_free(nested, NULL, Guidance(1.7, 0.1, 0.95)))
    else:
        result["heun"] = sample(plain, "heun")
    if name == "ditdh":
        weak = conditional(ditdh(depth=(1, 1)), "velocity")
        result["cfg"] = sample(classifier_free(plain, NULL, Guidance(2.3, *INSIDE)))
        result["autoguidance"] = sample(autoguidance(plain, weak, Guidance(1.42, *INSIDE)))
    return result


@pytest.mark.parametrize("name", MODELS)
def test_values_match_the_official_code(name):
    ours = values_of(name)
    assert ours.keys() == OFFICIAL[name].keys()
    for key, official in OFFICIAL[name].items():
        assert ours[key] == pytest.approx(official, rel=TOLERANCE, abs=TOLERANCE * max(map(abs, official))), key


def test_official_grids():
    rae, raev2 = sampling_grid(50, 6.928203, "rae"), sampling_grid(100, 8.0, "raev2")
    assert (rae.shape, raev2.shape, rae.dtype, raev2.dtype) == ((50,), (101,), torch.float64, torch.float64)
    assert rae[[0, 1, 25, 48, 49]].tolist() == pytest.approx([1, 0.997005, 0.8695312, 0.1315051, 0.006887285], abs=3e-7)
    assert raev2[[0, 1, 50, 99, 100]].tolist() == pytest.approx([1, 0.9987389, 0.8888889, 0.07476635, 0], abs=3e-7)


def test_raev2_rounds_the_width_of_its_mlp_once():
    v2 = RAEv2DiT(patch_size=1, depth=[1, 1], mlp_ratio=3.1, **TWO)
    rae = DiTDH(depth=[1, 1], mlp_ratio=3.1, **TWO)
    assert v2.blocks[0].mlp.w1.out_features == 33  # int(2/3 * 16 * 3.1)
    assert rae.blocks[0].mlp.w3.in_features == 32  # int(2/3 * int(16 * 3.1))


# -- official files


def test_official_files_load_strictly_and_a_checkpoint_without_ema_is_rejected(stage2_run, tmp_path):
    folder, run = stage2_run
    state = {name: value.clone() for name, value in run.module.ema_network.state_dict().items()}
    assert same(averaged_weights({"ema": {f"module.{k}": v for k, v in state.items()}, "model": {}}, "f"), state)
    with pytest.raises(UserError, match=r"has `model` and no `ema`"):
        averaged_weights({"model": state}, "f")
    torch.save(state, tmp_path / "stage2_model.pt")
    with pytest.raises(UserError, match="--model"):
        open_generator(tmp_path / "stage2_model.pt")
    with pytest.raises(UserError, match="does not fit DiTDH"):
        open_generator(tmp_path / "stage2_model.pt", "ditdh_s", loaded=run.module.autoencoder)
    own = open_generator(last(folder))
    assert same(dict(own.network.state_dict()), state) and own.rae.has_statistics


@pytest.mark.parametrize("kind", ["DiTDH", "RAEv2DiT"])
def test_export_is_the_official_file_and_loads_bit_equal(stage2_run, autoencoder, tmp_path, kind, capsys):
    folder, _ = stage2_run
    if kind == "RAEv2DiT":
        folder, flow = tmp_path / "run", ["model.flow.prediction=x", "model.flow.t_eps=0.05", "trainer.max_steps=1"]
        network = ["model.network.name=RAEv2DiT", "+model.network.base_model_depth=1"]
        train_stage2(folder, autoencoder, *network, *flow)
    out = tmp_path / "out"
    words = ["--checkpoint", str(last(folder)), "--output", str(out)]
    assert export([*words, "--format", "official"]) == 0
    own = read(last(folder))["state_dict"]
    own = {name.removeprefix("ema_network."): value for name, value in own.items() if name.startswith("ema_network.")}
    content = read(out / ("checkpoint.pt" if kind == "RAEv2DiT" else "stage2_model.pt"))
    assert same(content["ema"] if kind == "RAEv2DiT" else content, own)
    back = open_generator(next(out.glob("*.pt")), autoencoder=str(autoencoder))
    assert same(dict(back.network.state_dict()), own) and type(back.network).__name__ == kind
    assert "UNTRAINED" in (out / "README.md").read_text() and str(folder) not in (out / "rae_export.json").read_text()
    assert export([*words, "--format", "folder", "--overwrite"]) == 1
    assert "exported, with --format official" in capsys.readouterr().err
    assert export([*words, "--format", "official", "--overwrite", "--scores", "s.json"]) == 1
    assert "options are --dtype, --output" in capsys.readouterr().err

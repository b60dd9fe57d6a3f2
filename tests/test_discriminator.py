"""The DINO discriminator matches a plain formulation in PyTorch, and changes state only where it should."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from src.core.errors import UserError
from src.models.dino import RECIPES, TINY, DinoTrunk
from src.models.discriminator import DinoDiscriminator, DiscriminatorSettings
from src.models.spectral_norm import SpectralWeights

DEPTHS = (1, 3)
ARCH = {"ks": 5, "key_depths": DEPTHS, "norm_type": "bn", "using_spec_norm": True, "recipe": "S_8", "weights": "tiny"}


def make_file(folder: Path, **extra: Tensor) -> tuple[Path, dict[str, Tensor]]:
    """Write a tiny trunk laid out like the released files, with the last LayerNorm. `plain_trunk` uses the same names."""
    rng = torch.Generator().manual_seed(2)
    shapes = {name: value.shape for name, value in DinoTrunk(TINY, None, "tiny").state_dict().items()}
    shapes |= {"norm.weight": (TINY.width,), "norm.bias": (TINY.width,)}
    state = {name: torch.randn(shape, generator=rng) * shape[-1] ** -0.5 for name, shape in shapes.items()} | extra
    torch.save(state, folder / "dino.pth")
    return folder / "dino.pth", state


def make(**changes: object) -> DinoDiscriminator:
    return DinoDiscriminator(None, **(ARCH | changes))  # type: ignore[arg-type]


def images(count: int = 2, size: int = 48, dtype: torch.dtype = torch.float32) -> Tensor:
    return (
        torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(8), dtype=torch.float64) * 2 - 1
    ).to(dtype)


def plain_trunk(state: Mapping[str, Tensor], x: Tensor, depths: tuple[int, ...]) -> list[Tensor]:
    """Compute the feature maps from the file's tensors, with attention and input normalization written out."""
    w = {name: value.to(x.dtype) for name, value in state.items()}
    x = F.interpolate(x, size=(TINY.image_size,) * 2, mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v, dtype=x.dtype)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((x + 1) / 2 - mean) / std
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=TINY.patch).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), 1, -1), x], 1) + w["pos_embed"]
    width, heads, maps = TINY.width, TINY.heads, []
    for i in range(TINY.depth):
        b = f"blocks.{i}."
        bias = w[b + "attn.qkv.bias"].clone()
        bias[width : 2 * width] = 0
        y = F.layer_norm(x, (width,), w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
        q, k, v = F.linear(y, w[b + "attn.qkv.weight"], bias).split(width, dim=-1)
        q, k, v = (z.view(len(x), -1, heads, width // heads).transpose(1, 2) for z in (q, k, v))
        y = (q @ k.mT / math.sqrt(width / heads)).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).reshape(x.shape), w[b + "attn.proj.weight"], w[b + "attn.proj.bias"])
        y = F.layer_norm(x, (width,), w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
        y = F.linear(y, w[b + "mlp.fc1.weight"], w[b + "mlp.fc1.bias"])
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + F.linear(y, w[b + "mlp.fc2.weight"], w[b + "mlp.fc2.bias"])
        if i in depths:
            maps.append(x[:, 1:])
    return maps


class SampleNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(2, keepdim=True), x.var(2, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * self.weight[:, None] + self.bias[:, None]


class PlainHead(nn.Module):
    """A head with PyTorch's hook-based spectral norm, one module per convolution, and the weights of our head `number`."""

    def __init__(self, model: DinoDiscriminator, number: int, ks: int, norm_type: str, spectral: bool) -> None:
        super().__init__()
        wrap, width = (lambda m: spectral_norm(m, eps=1e-12)) if spectral else (lambda m: m), TINY.width
        self.first = wrap(nn.Conv1d(width, width, 1))
        self.second = wrap(nn.Conv1d(width, width, ks, padding=ks // 2, padding_mode="circular"))
        self.last = wrap(nn.Conv1d(width, 1, 1))
        norm = (lambda: SampleNorm(width)) if norm_type == "bn" else (lambda: nn.GroupNorm(32, width, eps=1e-6))
        self.first_norm, self.second_norm = norm(), norm()
        self.double()
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            tensor.data.copy_(ours(model, name)[number])

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first_norm(self.first(x)), 0.2)
        x = (F.leaky_relu(self.second_norm(self.second(x)), 0.2) + x) / math.sqrt(2)
        return self.last(x).flatten(1)


def ours(model: DinoDiscriminator, name: str) -> Tensor:
    """Return our stacked tensor that holds a plain head's `name`."""
    layer, kind = name.split(".")
    tensors = dict(model.heads.named_parameters()) | dict(model.heads.named_buffers())
    return tensors.get(f"{layer}.{kind}", tensors.get(f"{layer}.weights.{kind}"))


@pytest.mark.parametrize("size", [48, 64])
def test_trunk_equals_plain_attention(tmp_path: Path, size: int) -> None:
    path, state = make_file(tmp_path)
    x, y = images(size=size).requires_grad_(), images(size=size).requires_grad_()
    got, wanted = DinoTrunk(TINY, path)(x, DEPTHS), plain_trunk(state, y, DEPTHS)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == (2, TINY.tokens, TINY.width)
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    weight = torch.randn(wanted[-1].shape, generator=torch.Generator().manual_seed(1))
    (gx,), (gy,) = (torch.autograd.grad((m[-1] * weight).mean(), image) for m, image in ((got, x), (wanted, y)))
    assert (gx - gy).abs().max() < 1e-4 * gy.abs().max()


@pytest.mark.parametrize(("norm_type", "spectral", "ks"), [("bn", True, 5), ("gn", True, 1), ("bn", False, 9)])
def test_training_step_equals_hook_based_spectral_norm(norm_type: str, spectral: bool, ks: int) -> None:
    """Logits, gradients of all weights, u and v after D(fake), D(real); then the generator's gradient, in float64."""
    model = make(norm_type=norm_type, using_spec_norm=spectral, ks=ks).double()
    rng = torch.Generator().manual_seed(4)
    for parameter in (*model.heads.first_norm.parameters(), *model.heads.second_norm.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    heads = [PlainHead(model, number, ks, norm_type, spectral) for number in range(3)]
    fake, real = images(dtype=torch.float64), images(3, 64, torch.float64)

    def plain(x: Tensor) -> Tensor:
        maps = model.trunk(x, (1, 3))
        return torch.cat([head(m.mT) for head, m in zip(heads, (maps[1], maps[0], maps[1]), strict=True)], 1)

    model.train()
    model.power_iteration()
    logits_fake = model(fake)
    model.power_iteration()
    logits_real = model(real)
    plain_fake, plain_real = plain(fake), plain(real)
    assert logits_fake.shape == (2, 3 * TINY.tokens)
    torch.testing.assert_close(logits_fake, plain_fake, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits_real, plain_real, rtol=0, atol=1e-10)
    (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()).backward()
    (F.relu(1 - plain_real).mean() + F.relu(1 + plain_fake).mean()).backward()
    for i, head in enumerate(heads):
        for name, parameter in head.named_parameters():
            torch.testing.assert_close(ours(model, name).grad[i], parameter.grad, rtol=0, atol=1e-10)
        for name, buffer in head.named_buffers():
            torch.testing.assert_close(ours(model, name)[i], buffer, rtol=0, atol=1e-12)
        head.eval()
    model.eval()
    x, y = fake.clone().requires_grad_(), fake.clone().requires_grad_()
    with model.heads_frozen():
        logits = model(x)
    torch.testing.assert_close(
        *(torch.autograd.grad(-z.mean(), image)[0] for z, image in ((logits, x), (plain(y), y))), rtol=0, atol=1e-10
    )


def test_last_map_also_comes_first_and_each_is_computed_once() -> None:
    maps = make().features(images())
    assert len(maps) == 3 and maps[0] is maps[2] and not torch.equal(maps[0], maps[1])
    shallow = make(key_depths=(0, 1)).features(images())
    torch.testing.assert_close(shallow[0], maps[0])  # the trunk's last map, as published, for any key_depths
    torch.testing.assert_close(shallow[2], maps[1])
    trunk, ran = DinoTrunk(TINY, None, "tiny"), []
    for i, block in enumerate(trunk.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    trunk(images(), (0, 1))
    assert ran == [0, 1]  # blocks after the last one needed are not run


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_no_state_and_chunks_equal_the_whole(training: bool) -> None:
    model = make().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = images(4)
    whole = model(x)
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), whole)
    torch.testing.assert_close(model.heads(model.features(x)), whole)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.power_iteration()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith(("weight_u", "weight_v")) for name in changed)


def test_sigma_at_construction_is_near_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    raw = torch.randn(2, 6, 5, 3)
    largest = torch.linalg.matrix_norm(raw.flatten(2), ord=2)
    for weight, matrix, sigma in zip(SpectralWeights(raw.clone())(), raw, largest, strict=True):
        torch.testing.assert_close(weight, matrix / sigma, rtol=0.05, atol=0.01)


def test_gradients_reach_the_heads_or_the_image_and_never_the_trunk() -> None:
    model = make().train()
    assert model.training and not any(m.training for m in model.trunk.modules())
    model(images()).mean().backward()
    assert all(
        (p.grad is not None) == name.startswith("heads.") == p.requires_grad for name, p in model.named_parameters()
    )
    model.zero_grad()
    model.heads.last.bias.requires_grad_(False)
    x = images().requires_grad_()
    with model.heads_frozen():
        logits = model(x)
    logits.mean().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.heads.named_parameters() if not p.requires_grad] == ["last.bias"]  # flags restored


@pytest.mark.parametrize(("dtype", "whole_trunk"), [(torch.bfloat16, True), (torch.float16, False)])
def test_half_precision_is_near(dtype: torch.dtype, whole_trunk: bool) -> None:
    model = make()
    exact = model(images())
    if whole_trunk:
        model.trunk.to(dtype)
    x = images().requires_grad_()
    with torch.autocast("cpu", dtype):
        model.power_iteration()
        rough = model(x).float()
    assert F.cosine_similarity(rough.flatten(), exact.flatten(), dim=0) > 0.98
    rough.mean().backward()
    assert x.grad.isfinite().all()
    assert model.heads.second.weights.weight_u.dtype == torch.float32


def test_loading_is_strict_except_for_known_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "S_8", TINY)
    path, state = make_file(tmp_path, **{"head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)})
    model = DinoDiscriminator(path, **(ARCH | {"weights": "pretrained"}))  # type: ignore[arg-type]
    assert not model.untrained and not any(name.startswith("norm") for name in model.trunk.state_dict())
    width = TINY.width
    bias = model.trunk.state_dict()["blocks.2.attn.qkv.bias"]
    assert bias[width : 2 * width].eq(0).all() and bias[:width].equal(state["blocks.2.attn.qkv.bias"][:width])
    without = {k: v for k, v in state.items() if k != "blocks.1.norm2.bias"}
    for content, recipe, said in (
        (state | {"stray": torch.zeros(1)}, TINY, "unexpected.*stray"),
        (without, TINY, "missing.*blocks.1.norm2.bias"),
        (state, RECIPES["S_16"], "wrong shape"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=said):
            DinoTrunk(recipe, path)
    for place, said in ((Path("nowhere.pth"), "nowhere.pth"), (None, "dino_ckpt_path.*untrained")):
        with pytest.raises(UserError, match=said):
            DinoTrunk(TINY, place)


def test_state_of_the_heads_round_trips() -> None:
    model, other = make(), make(seed=1)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("trunk.")}
    assert set(state) == {
        *(f"heads.{c}.{k}" for c in ("first", "second", "last") for k in ("weights.weight_orig", "bias")),
        *(f"heads.{c}.weights.weight_{k}" for c in ("first", "second", "last") for k in "uv"),
        *(f"heads.{n}_norm.{k}" for n in ("first", "second") for k in ("weight", "bias")),
    }
    other.load_state_dict(state, strict=False)
    other.trunk.load_state_dict(model.trunk.state_dict())
    assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize(("changes", "said"), [
    ({"norm_type": "sbn"}, "norm_type='sbn': expected bn or gn"),
    ({"recipe": "S_9"}, "recipe='S_9': expected S_8, S_16, B_16"),
    ({"ks": 0}, "ks=0: expected at least 1"),
    ({"ks": 4}, "ks=4: expected an odd number up to 129"),
    ({"ks": 131}, "ks=131.*129"),
    ({"ks": 131, "weights": "untrained"}, None),
    ({"key_depths": [1, 4]}, "from 0 to 3"),
    ({"key_depths": [1, 11], "weights": "untrained"}, None),
    ({"key_depths": [-1, 1]}, "from 0"),
    ({"key_depths": [3, 1]}, "ascending"),
    ({"key_depths": [1, 1]}, "distinct"),
    ({"key_depths": []}, "key_depths"),
    ({"weights": "random"}, "weights='random': expected pretrained, untrained or tiny"),
    ({"kernel": 3}, "unknown key D.kernel"),
])  # fmt: skip
def test_settings_are_checked(changes: dict[str, object], said: str | None) -> None:
    values = ARCH | {"key_depths": [1, 3], "dino_ckpt_path": None} | changes
    if said is None:
        assert DiscriminatorSettings.parse(values, "D")
        return
    with pytest.raises(UserError, match=said):
        DiscriminatorSettings.parse(values, "D")


@pytest.mark.parametrize("name", ["S_8", "S_16", "B_16"])
def test_published_sizes(name: str) -> None:
    recipe = RECIPES[name]
    with torch.device("meta"):
        trunk = DinoTrunk(recipe, None, "untrained")
    parameters = sum(p.numel() for p in trunk.parameters())
    wanted = {"S_8": 21_670_272, "S_16": 21_665_664, "B_16": 85_798_656}  # the released files
    assert parameters == wanted[name] - 2 * recipe.width  # whose last LayerNorm is left out

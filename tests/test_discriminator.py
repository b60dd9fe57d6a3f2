"""The DINO discriminator against a plain formulation made of PyTorch's own parts, and its discipline about state."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from src.core.errors import UserError
from src.models.dino import RECIPES, DinoTrunk
from src.models.discriminator import DinoDiscriminator
from src.models.spectral_norm import SpectralWeights

TINY = RECIPES["tiny"]
DEPTHS = (1, 3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_file(folder: Path, **extra: Tensor) -> tuple[Path, dict[str, Tensor]]:
    """A trunk under the names of the released DINO files."""
    rng = torch.Generator().manual_seed(2)
    width, patch = TINY.width, TINY.patch
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, TINY.tokens + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(TINY.depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = (rows, columns), (rows,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = shapes[f"blocks.{i}.{name}.bias"] = (width,)
    state = {name: torch.randn(shape, generator=rng) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    state |= extra
    path = folder / "dino.pth"
    torch.save(state, path)
    return path, state


def make(path: Path | None = None, **changes: object) -> DinoDiscriminator:
    arguments = {"ks": 5, "key_depths": DEPTHS, "norm_type": "bn", "using_spec_norm": True, "recipe": "tiny"} | changes
    return DinoDiscriminator(path, weights="pretrained" if path else "untrained", **arguments)  # type: ignore[arg-type]


def images(count: int = 2, size: int = 48, dtype: torch.dtype = torch.float32) -> Tensor:
    return (
        torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(8), dtype=torch.float64) * 2 - 1
    ).to(dtype)


def plain_trunk(state: Mapping[str, Tensor], x: Tensor, depths: tuple[int, ...]) -> list[Tensor]:
    """Attention written out, normalisation before the embedding, all from the file's tensors."""
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
            maps.append(x[:, 1:].mT)
    return maps


class SampleNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(2, keepdim=True), x.var(2, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * self.weight[:, None] + self.bias[:, None]


class PlainHead(nn.Module):
    """PyTorch's hook form of the spectral norm, one module per convolution."""

    def __init__(self, width: int, ks: int, norm_type: str, spectral: bool) -> None:
        super().__init__()
        wrap = (lambda m: spectral_norm(m, eps=1e-12)) if spectral else (lambda m: m)
        self.first = wrap(nn.Conv1d(width, width, 1))
        self.second = wrap(nn.Conv1d(width, width, ks, padding=ks // 2, padding_mode="circular"))
        self.last = wrap(nn.Conv1d(width, 1, 1))
        norm = (lambda: SampleNorm(width)) if norm_type == "bn" else (lambda: nn.GroupNorm(32, width, eps=1e-6))
        self.first_norm, self.second_norm = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first_norm(self.first(x)), 0.2)
        x = (F.leaky_relu(self.second_norm(self.second(x)), 0.2) + x) / math.sqrt(2)
        return self.last(x).flatten(1)

    def take(self, model: DinoDiscriminator, head: int) -> None:
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            tensor.data.copy_(ours(model, name)[head])


def ours(model: DinoDiscriminator, name: str) -> Tensor:
    """The stacked tensor that holds a plain head's `name`."""
    layer, kind = name.split(".")
    tensors = dict(model.heads.named_parameters()) | dict(model.heads.named_buffers())
    return tensors.get(f"{layer}.{kind}", tensors.get(f"{layer}.weights.{kind}"))


def plain_heads(model: DinoDiscriminator, ks: int = 5, norm_type: str = "bn", spectral: bool = True) -> list[PlainHead]:
    rng = torch.Generator().manual_seed(4)
    for norms in (model.heads.first_norm, model.heads.second_norm):
        for parameter in norms.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    heads = []
    for i in range(len(model.map_depths)):
        head = PlainHead(TINY.width, ks, norm_type, spectral).to(model.heads.first.bias.dtype)
        head.take(model, i)
        heads.append(head)
    return heads


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("size", [48, 64])
def test_trunk_equals_plain_attention(tmp_path: Path, dtype: torch.dtype, bound: float, size: int) -> None:
    path, state = make_file(tmp_path)
    trunk = DinoTrunk(TINY, path)
    # The fold into the embedding is rounded to float32 at load; undo that to see the mathematics in float64.
    x, y = images(size=size, dtype=dtype).requires_grad_(), images(size=size, dtype=dtype).requires_grad_()
    trunk.to(dtype)
    if dtype == torch.float64:
        mean, std = (
            torch.tensor(v, dtype=dtype)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        weight = state["patch_embed.proj.weight"].double()
        trunk.patch_embed["proj"].weight.copy_(weight * 0.5 / std)
        trunk.patch_embed["proj"].bias.copy_(
            state["patch_embed.proj.bias"] + (weight * (0.5 - mean) / std).sum((1, 2, 3))
        )
    got, wanted = trunk(x, DEPTHS), plain_trunk(state, y, DEPTHS)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == (2, TINY.width, TINY.tokens)
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
    weight = torch.randn(wanted[-1].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (gx,) = torch.autograd.grad((got[-1] * weight).mean(), x)
    (gy,) = torch.autograd.grad((wanted[-1] * weight).mean(), y)
    assert gy.abs().max() > 1e-6
    torch.testing.assert_close(gx, gy, rtol=0, atol=bound)


@pytest.mark.parametrize(("norm_type", "spectral", "ks"), [("bn", True, 5), ("gn", True, 1), ("bn", False, 9)])
def test_a_training_step_equals_the_hook_form(norm_type: str, spectral: bool, ks: int) -> None:
    """Logits, gradients of all weights, u and v after D(fake), D(real); then the generator's gradient, in float64."""
    model = make(norm_type=norm_type, using_spec_norm=spectral, ks=ks).double()
    heads = plain_heads(model, ks, norm_type, spectral)
    fake, real = images(dtype=torch.float64), images(3, 64, torch.float64)

    def plain(x: Tensor) -> Tensor:
        maps = model.trunk(x, (1, 3))
        return torch.cat([head(m) for head, m in zip(heads, (maps[1], maps[0], maps[1]), strict=True)], 1)

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


def test_float32_logits_are_within_1e_5_of_the_hook_form() -> None:
    model = make()
    heads = [head.eval() for head in plain_heads(model)]
    maps = model.features(images())
    wanted = torch.cat([head(m) for head, m in zip(heads, maps, strict=True)], 1)
    torch.testing.assert_close(model(images()), wanted, rtol=0, atol=1e-5)


def test_the_last_map_stands_in_front_too_and_is_computed_once() -> None:
    maps = make().features(images())
    assert len(maps) == 3 and maps[0] is maps[2] and not torch.equal(maps[0], maps[1])
    shallow = make(key_depths=(0, 1)).features(images())
    torch.testing.assert_close(shallow[0], maps[0])  # the trunk's last, as published, whatever is chosen
    torch.testing.assert_close(shallow[2], maps[1])


def test_blocks_after_the_last_one_needed_are_not_run() -> None:
    trunk = DinoTrunk(TINY, None, "untrained")
    ran = []
    for i, block in enumerate(trunk.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    trunk(images(), (0, 1))
    assert ran == [0, 1]


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_changes_no_state_and_chunks_add_up(training: bool) -> None:
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


def test_the_trunk_is_frozen_whatever_is_asked() -> None:
    model = make().train()
    assert model.training and model.heads.training
    assert not any(m.training for m in model.trunk.modules())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("heads.") for name in trained)
    model(images()).mean().backward()
    assert all(p.grad is None for p in model.trunk.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())


def test_the_generators_graph_leaves_the_heads_alone_and_gives_their_flags_back() -> None:
    model = make()
    model.heads.last.bias.requires_grad_(False)
    x = images().requires_grad_()
    with model.heads_frozen():
        logits = model(x)
    logits.mean().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in model.heads.parameters())
    assert [n for n, p in model.heads.named_parameters() if not p.requires_grad] == ["last.bias"]


@pytest.mark.parametrize("whole_trunk", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(whole_trunk: bool, dtype: torch.dtype) -> None:
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


def test_loading_is_strict_and_extras_are_known_by_name(tmp_path: Path) -> None:
    path, state = make_file(tmp_path, **{"head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)})
    model = make(path)
    assert not model.untrained and not any(name.startswith("norm") for name in model.trunk.state_dict())
    width = TINY.width
    bias = model.trunk.state_dict()["blocks.2.attn.qkv.bias"]
    assert bias[width : 2 * width].eq(0).all() and bias[:width].equal(state["blocks.2.attn.qkv.bias"][:width])
    path, _ = make_file(tmp_path, stray=torch.zeros(1))
    with pytest.raises(UserError, match="unexpected.*stray"):
        make(path)
    torch.save({k: v for k, v in state.items() if k != "blocks.1.norm2.bias"}, path)
    with pytest.raises(UserError, match="missing.*blocks.1.norm2.bias"):
        make(path)
    make_file(tmp_path)
    with pytest.raises(UserError, match="other shape"):
        make(path, recipe="S_16", key_depths=(2, 5, 8, 11))
    with pytest.raises(UserError, match="nowhere.pth"):
        make(Path("nowhere.pth"))
    with pytest.raises(UserError, match="untrained"):
        DinoDiscriminator(None, 9, (2, 5), "bn", True, "S_16")


def test_state_of_the_heads_is_clean_and_returns() -> None:
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


def test_untrained_is_named_seeded_and_leaves_the_generator_alone(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.untrained and "untrained" in caplog.text
    assert torch.equal(a(images()), b(images())) and not torch.equal(a(images()), c(images()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "sbn"}, "norm_type=sbn.*bn, gn"),
        ({"recipe": "S_9"}, "recipe=S_9.*S_8, S_16, B_16, tiny"),
        ({"ks": 4}, "ks=4.*odd"),
        ({"ks": 131}, "ks=131.*129"),
        ({"key_depths": (1, 4)}, "from 0 to 3"),
        ({"key_depths": (3, 1)}, "ascending"),
        ({"key_depths": (1, 1)}, "none twice"),
        ({"key_depths": ()}, "key_depths"),
    ],
)
def test_bad_values_are_told(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(**changes)


@pytest.mark.parametrize("name", ["S_8", "S_16", "B_16"])
def test_published_sizes(name: str) -> None:
    recipe = RECIPES[name]
    with torch.device("meta"):
        trunk = DinoTrunk(recipe, None, "untrained")
    parameters = sum(p.numel() for p in trunk.parameters())
    wanted = {"S_8": 21_670_272, "S_16": 21_665_664, "B_16": 85_798_656}  # the released files
    assert parameters == wanted[name] - 2 * recipe.width  # whose last LayerNorm is left out

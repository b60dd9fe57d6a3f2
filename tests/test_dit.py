"""The diffusion transformers match a plain implementation: explicit softmax, rotation by complex numbers.

The plain one runs in float64 with the model's own weights, the model in float32.
"""

import math

import pytest
import torch

from src.core.errors import UserError
from src.models.dit import DiTDH, LightningDiT, RAEv2DiT, build_network, forward_flops

TOLERANCE = 1e-5
CLASSES = 3
CHANNELS = 5


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def norm(p, name, x, rms, eps=1e-6):
    if rms:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * p[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"] if f"{name}.weight" in p else scaled


def token_angles(grid, head_width, extra=0):
    """Return one angle per pair of channels: row * f, then column * f."""
    d = head_width // 2
    f = [10000 ** (-2 * j / d) for j in range(d // 2)]
    tokens = [[row * w for w in f] + [column * w for w in f] for row in range(grid) for column in range(grid)]
    return torch.tensor(tokens + [[0.0] * d] * extra, dtype=torch.float64)


def rotate(x, angles):
    pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)
    return torch.stack([pairs.real, pairs.imag], dim=-1).flatten(-2)


def attention(p, name, x, heads, angles, rms):
    if f"{name}.qkv.weight" in p:
        mixed = linear(p, f"{name}.qkv", x).split(x.shape[-1], dim=-1)
    else:
        mixed = [linear(p, f"{name}.{part}", x) for part in "qkv"]
    q, k, v = (part.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for part in mixed)  # B heads N h
    if f"{name}.q_norm.weight" in p:
        q, k = (norm(p, f"{name}.{n}_norm", part, rms, 1e-6 if rms else 1e-5) for n, part in (("q", q), ("k", k)))
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    weights = torch.exp(q @ k.mT / math.sqrt(q.shape[-1]))
    mixed = weights / weights.sum(-1, keepdim=True) @ v
    return linear(p, f"{name}.proj", torch.cat(mixed.unbind(1), dim=-1))


def feed_forward(p, name, x):
    if f"{name}.fc1.weight" in p:
        u = linear(p, f"{name}.fc1", x)
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        return linear(p, f"{name}.fc2", u)
    if f"{name}.w12.weight" in p:
        both = linear(p, f"{name}.w12", x)
        half = both.shape[-1] // 2
        a, b = both[..., :half], both[..., half:]
    else:
        a, b = linear(p, f"{name}.w1", x), linear(p, f"{name}.w2", x)
    return linear(p, f"{name}.w3", silu(a) * b)


def six(p, name, c):
    """Return the parts of the modulation. `c`: B N D, always one condition per token."""
    spelling = "adaLN_modulation" if f"{name}.adaLN_modulation.1.weight" in p else "adaln_modulation"
    m = linear(p, f"{name}.{spelling}.1", silu(c))
    width = c.shape[-1]
    return [m[..., i * width : (i + 1) * width] for i in range(m.shape[-1] // width)]


def block(p, name, x, c, heads, angles, rms):
    if c is None:
        x = x + attention(p, f"{name}.attn", norm(p, f"{name}.norm1", x, rms), heads, angles, rms)
        return x + feed_forward(p, f"{name}.mlp", norm(p, f"{name}.norm2", x, rms))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six(p, name, c)
    y = norm(p, f"{name}.norm1", x, rms) * (1 + scale_a) + shift_a
    x = x + gate_a * attention(p, f"{name}.attn", y, heads, angles, rms)
    y = norm(p, f"{name}.norm2", x, rms) * (1 + scale_m) + shift_m
    return x + gate_m * feed_forward(p, f"{name}.mlp", y)


def final(p, name, x, c, rms):
    shift, scale = six(p, name, c)
    which = "norm_final" if f"{name}.adaLN_modulation.1.weight" in p else "norm"
    return linear(p, f"{name}.linear", norm(p, f"{name}.{which}", x, rms) * (1 + scale) + shift)


def patches(p, name, x, patch):
    cuts = x.unfold(2, patch, patch).unfold(3, patch, patch)  # B C row column p p
    tokens = torch.einsum("bcyxrs,dcrs->byxd", cuts, p[f"{name}.proj.weight"]) + p[f"{name}.proj.bias"]
    return tokens.flatten(1, 2)


def to_latents(tokens, like, patch):
    image, side = torch.zeros_like(like), like.shape[-1] // patch
    for r in range(patch):
        for c in range(patch):
            start = (r * patch + c) * CHANNELS
            image[:, :, r::patch, c::patch] = tokens[..., start : start + CHANNELS].mT.unflatten(2, (side, side))
    return image


def time(p, t):
    a = 2 * math.pi * t[:, None] * p["t_embedder.W"][None]
    hidden = silu(linear(p, "t_embedder.mlp.0", torch.cat([torch.sin(a), torch.cos(a)], dim=1)))
    return linear(p, "t_embedder.mlp.2", hidden)


def per_token(c, tokens):
    return torch.stack([c] * tokens, dim=1)


def plain_dit(p, x, t, y, patch, depth, heads, rms, rope):
    side = x.shape[-1] // patch
    tokens = patches(p, "x_embedder", x, patch)
    c = per_token(time(p, t) + p["y_embedder.embedding_table.weight"][y], side**2)
    angles = token_angles(side, tokens.shape[-1] // heads) if rope else None
    tokens = tokens + p["pos_embed"] if "pos_embed" in p else tokens
    for i in range(depth):
        tokens = block(p, f"blocks.{i}", tokens, c, heads, angles, rms)
    return to_latents(final(p, "final_layer", tokens, c, rms), x, patch)


def plain_dh(p, x, t, y, patch, depth, heads, rms, rope):
    side = x.shape[-1]
    T = per_token(time(p, t), side**2)
    c = silu(T + per_token(p["y_embedder.embedding_table.weight"][y], side**2))
    s, h = patches(p, "s_embedder", x, 1), patches(p, "x_embedder", x, 1)
    angles = [token_angles(side, z.shape[-1] // n) if rope else None for z, n in zip((s, h), heads, strict=True)]
    s = s + p["pos_embed"] if "pos_embed" in p else s
    for i in range(depth[0]):
        s = block(p, f"blocks.{i}", s, c, heads[0], angles[0], rms)
    s = silu(T + s)
    s = linear(p, "s_projector", s) if "s_projector.weight" in p else s
    for i in range(depth[0], sum(depth)):
        h = block(p, f"blocks.{i}", h, s, heads[1], angles[1], rms)
    return to_latents(final(p, "final_layer", h, s, rms), x, 1)


def plain_v2(p, x, t, y, patch, depth, heads, base_depth, t_tokens=4, c_tokens=8):
    side = x.shape[-1] // patch
    n = side**2
    T = time(p, t)
    own = [T + p["t_embedder.learnable_tokens"][i] for i in range(t_tokens)]
    row = p["ctx_embedder.embedding_table.weight"][y]
    own += [row + p["ctx_embedder.learnable_tokens"][i] for i in range(c_tokens)]
    s, h = patches(p, "s_embedder", x, patch), patches(p, "x_embedder", x, patch)
    s = torch.cat([s, torch.stack(own, dim=1)], dim=1)
    angles = token_angles(side, s.shape[-1] // heads[0], t_tokens + c_tokens)
    base = None
    for i in range(depth[0]):
        s = block(p, f"blocks.{i}", s, None, heads[0], angles, True)
        if i + 1 == base_depth:
            b = silu(per_token(T, n) + s[:, :n])
            base = to_latents(final(p, "base_final_layer", b, b, True), x, patch)
    s = silu(per_token(T, n) + s[:, :n])
    s = linear(p, "s_projector", s) if "s_projector.weight" in p else s
    for i in range(depth[0], sum(depth)):
        h = block(p, f"blocks.{i}", h, s, heads[1], token_angles(side, h.shape[-1] // heads[1]), True)
    full = to_latents(final(p, "final_layer", h, s, True), x, patch)
    return full if base is None else (full, base)


def lightning(**changes):
    sizes = {"input_size": 4, "in_channels": CHANNELS, "hidden_size": 24, "depth": 2, "num_heads": 2}
    return LightningDiT(**{**sizes, "num_classes": CLASSES, **changes})


def ditdh(**changes):
    sizes = {"input_size": 4, "in_channels": CHANNELS, "hidden_size": [16, 24], "depth": [2, 2], "num_heads": [2, 2]}
    return DiTDH(**{**sizes, "num_classes": CLASSES, **changes})


def raev2(**changes):
    sizes = {"input_size": 4, "patch_size": 1, "in_channels": CHANNELS, "hidden_size": [16, 24], "depth": [3, 2]}
    return RAEv2DiT(**{**sizes, "num_heads": [2, 2], "num_classes": CLASSES, **changes})


MAKERS = [lightning, ditdh, raev2]


def randomised(model, seed=0):
    """Move every weight off its initial 0 or 1, where much of the network is switched off."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            value = torch.randn(parameter.shape, generator=rng) / math.sqrt(fan_in)
            parameter.copy_(1 + 0.3 * value if "norm" in name and name.endswith("weight") else value * 0.5)
    return model


def batch(model, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, *model.latent_shape, generator=rng)
    return x, torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 2, model.null_label or 1])


def weights_of(model):
    return {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}


def compare(model, plain):
    """Compare outputs and all gradients, for equal weights and one random weighted sum of the outputs."""
    x, t, y = batch(model)
    p = weights_of(model)
    outputs, expected = model(x, t, y), plain(p, x.double(), t.double(), y)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(outputs) == len(expected)
    rng = torch.Generator().manual_seed(2)
    sums = [0.0, 0.0]
    for mine, theirs in zip(outputs, expected, strict=True):
        assert mine.shape == x.shape
        assert (mine - theirs).abs().max() < TOLERANCE * theirs.abs().max()
        factor = torch.randn(x.shape, generator=rng)
        sums = [sums[0] + (mine * factor).sum(), sums[1] + (theirs * factor).sum()]
    sums[0].backward()
    sums[1].backward()
    largest_of_all = max(value.grad.abs().max() for value in p.values())
    for name, parameter in model.named_parameters():
        wanted = p[name].grad
        # The gradient of a bias that softmax cancels is only rounding.
        limit = TOLERANCE * max(wanted.abs().max(), 1e-2 * largest_of_all)
        assert (parameter.grad - wanted).abs().max() < limit, name
    assert (model.t_embedder.W.grad != 0).any()


VARIANTS = [
    {}, {"use_qknorm": True}, {"use_swiglu": False}, {"use_rmsnorm": False}, {"use_qknorm": True, "use_rmsnorm": False},
    {"use_rope": False}, {"use_pos_embed": False}, {"class_dropout_prob": 0.0}, {"mlp_ratio": 3.0}, {"input_size": 3},
]  # fmt: skip


@pytest.mark.parametrize("options", [*VARIANTS, {"patch_size": 2}, {"patch_size": 2, "input_size": 6}], ids=str)
def test_lightning_dit_and_its_gradients(options):
    model = randomised(lightning(**options))
    rms, rope = options.get("use_rmsnorm", True), options.get("use_rope", True)
    compare(model, lambda p, x, t, y: plain_dit(p, x, t, y, model.patch_size, 2, 2, rms, rope))


@pytest.mark.parametrize(
    "options", [*VARIANTS, {"hidden_size": [24, 24]}, {"depth": [1, 3], "num_heads": [4, 3]}], ids=str
)
def test_ditdh_and_its_gradients(options):
    model = randomised(ditdh(**options))
    rms, rope = options.get("use_rmsnorm", True), options.get("use_rope", True)
    depth, heads = options.get("depth", [2, 2]), options.get("num_heads", [2, 2])
    compare(model, lambda p, x, t, y: plain_dh(p, x, t, y, 1, depth, heads, rms, rope))


@pytest.mark.parametrize("options", [
    {}, {"base_model_depth": 2}, {"base_model_depth": 3}, {"patch_size": 2, "base_model_depth": 1}, {"hidden_size": [24, 24]},
    {"num_t_tokens": 1, "num_c_tokens": 2},
], ids=str)  # fmt: skip
def test_raev2_and_its_gradients(options):
    model = randomised(raev2(**options))
    tokens = options.get("num_t_tokens", 4), options.get("num_c_tokens", 8)
    base = options.get("base_model_depth")
    compare(model, lambda p, x, t, y: plain_v2(p, x, t, y, model.patch_size, [3, 2], [2, 2], base, *tokens))


@pytest.mark.parametrize("make", MAKERS)
def test_checkpointed_activations_change_nothing(make):
    kept, recomputed = (randomised(make(activation_checkpointing=on)) for on in (False, True))
    for model in (kept, recomputed):
        model(*batch(model)).square().sum().backward()
    for (name, a), b in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max(), name


@pytest.mark.parametrize("make", MAKERS)
def test_blocks_compile_without_graph_breaks(make):
    """A graph break would split a block into parts, each with its own tensors in memory."""
    model = randomised(make())
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(*batch(model))
    assert sum(output.float().sum() for output in outputs).isfinite()


def names_of(model):
    return set(model.state_dict())


def tables(*ropes):
    return {f"{rope}.freqs_{kind}" for rope in ropes for kind in ("cos", "sin")}


def test_names_of_buffers_and_of_optional_parts():
    """tests/test_stage2_official.py covers all other names: it fills each parameter by its name."""
    for model, ropes in (
        (lightning(), ["feat_rope"]),
        (ditdh(), ["enc_feat_rope", "dec_feat_rope"]),
        (raev2(), ["enc_rope", "dec_rope"]),
    ):
        assert names_of(model) - {name for name, _ in model.named_parameters()} == tables(*ropes)
    plain = names_of(lightning())
    assert plain - names_of(lightning(use_pos_embed=False)) == {"pos_embed"}
    assert plain - names_of(lightning(use_rope=False)) == tables("feat_rope")
    norms = {f"blocks.{i}.attn.{part}_norm.weight" for i in range(2) for part in "qk"}
    assert names_of(lightning(use_qknorm=True)) - plain == norms
    projector = {"s_projector.weight", "s_projector.bias"}
    assert names_of(ditdh()) - names_of(ditdh(hidden_size=[24, 24])) == projector


@pytest.mark.parametrize(("make", "shapes"), [
    (lightning, {"pos_embed": (1, 16, 24), "t_embedder.W": (256,), "feat_rope.freqs_cos": (16, 12), "y_embedder.embedding_table.weight": (4, 24)}),
    (ditdh, {"pos_embed": (1, 16, 16), "dec_feat_rope.freqs_sin": (16, 12), "y_embedder.embedding_table.weight": (4, 16)}),
    (raev2, {"enc_rope.freqs_cos": (28, 8), "dec_rope.freqs_cos": (16, 12), "ctx_embedder.learnable_tokens": (8, 16)}),
])  # fmt: skip
def test_shapes_and_trained_parameters(make, shapes):
    model = make()
    state = model.state_dict()
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_no_row_for_the_null_label_without_dropout():
    for make in (lightning, ditdh):
        model = make(class_dropout_prob=0.0)
        assert model.null_label is None and len(model.y_embedder.embedding_table.weight) == CLASSES
        assert make().null_label == CLASSES
    config = {"name": "RAEv2DiT", "patch_size": 1, "hidden_size": [16, 16], "depth": [1, 1], "num_heads": [2, 2]}
    assert build_network(config, (5, 4, 4), CLASSES, 0.0, 0).null_label is None  # the row exists, but nothing trains it
    assert raev2().null_label == CLASSES and len(raev2().ctx_embedder.embedding_table.weight) == CLASSES + 1


def test_forward_uses_the_buffers_of_the_state_dict():
    model = randomised(ditdh())
    before = model(*batch(model))
    for name in ("pos_embed", "enc_feat_rope.freqs_cos"):
        model.state_dict()[name].zero_()
        after = model(*batch(model))
        assert not torch.allclose(before, after)
        before = after


@pytest.mark.parametrize("make", MAKERS)
def test_half_precision_keeps_the_rotary_tables(make):
    model = randomised(make())
    tables = {name: value.clone() for name, value in model.named_buffers()}
    expected = model(*batch(model))
    half = model.bfloat16()
    for name, value in half.named_buffers():
        assert value.dtype == torch.float32 and torch.equal(value, tables[name])
    x, t, y = batch(half)
    output = half(x.bfloat16(), t, y)
    assert output.dtype == torch.bfloat16
    assert (output - expected).square().mean() < 0.01 * expected.square().mean()


@pytest.mark.parametrize("make", MAKERS)
def test_train_and_eval_mode_agree_and_draw_nothing(make):
    model = randomised(make())
    state = torch.get_rng_state()
    assert torch.equal(model.train()(*batch(model)), model.eval()(*batch(model)))
    assert torch.equal(state, torch.get_rng_state())


def test_positions_and_initial_values():
    torch.manual_seed(0)
    model = ditdh(input_size=3)
    for row in range(3):
        for column in range(3):
            wanted = [f(at * 10000 ** (-k / 4)) for at in (column, row) for f in (math.sin, math.cos) for k in range(4)]
            assert torch.allclose(model.pos_embed[0, row * 3 + column], torch.tensor(wanted), atol=1e-6)
    for embed in (model.s_embedder, model.x_embedder):
        bound = math.sqrt(6 / (embed.proj.out_channels + CHANNELS))
        assert 0.8 * bound < embed.proj.weight.abs().max() <= bound and not embed.proj.bias.any()
    for layer in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        assert layer.weight.detach().std() == pytest.approx(0.02, rel=0.3)
    assert model.t_embedder.W.detach().std() == pytest.approx(1, rel=0.2) and model.t_embedder.mlp[0].bias.any()
    qkv = model.blocks[0].attn.qkv  # PyTorch's default: uniform up to 1 / sqrt(16)
    assert 0.9 * 0.25 < qkv.weight.abs().max() <= 0.25 and qkv.bias.any()
    assert raev2(hidden_size=[64, 24]).ctx_embedder.learnable_tokens.detach().std() == pytest.approx(1 / 8, rel=0.2)


def test_lightning_dit_starts_xavier_with_zero_biases():
    model = lightning()
    qkv = model.blocks[0].attn.qkv.weight
    bound = math.sqrt(6 / sum(qkv.shape))
    assert 0.9 * bound < qkv.abs().max() <= bound
    assert all(not value.any() for name, value in model.named_parameters() if name.endswith("bias"))
    assert not model.blocks[1].adaLN_modulation["1"].weight.any()
    assert model.t_embedder.mlp[2].weight.detach().std() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("make", MAKERS)
def test_untrained_output_is_zero(make):
    model = make(base_model_depth=2) if make is raev2 else make()
    output = model(*batch(model))
    assert not any(part.any() for part in (output if make is raev2 else (output,)))


def test_flops_leave_the_weights_alone():
    model = randomised(lightning())
    before = model(*batch(model))
    assert forward_flops(model, 2) == 2 * forward_flops(model)
    assert torch.equal(model(*batch(model)), before)


@pytest.mark.parametrize(("make", "changes", "message"), [
    (lightning, {"patch_size": 4}, "patch_size=4: expected 1 or 2"),
    (ditdh, {"patch_size": 2}, "model.network.patch_size=2: expected 1"),
    (lightning, {"patch_size": 2, "input_size": 5}, "input_size=5 is not a multiple of patch_size=2"),
    (lightning, {"hidden_size": 25}, "hidden_size=25 is not a multiple of num_heads=2"),
    (lightning, {"hidden_size": 20}, "heads 10 wide"),
    (lightning, {"hidden_size": 18, "use_rope": False}, "hidden_size=18"),
    (lightning, {"hidden_size": [16, 16]}, r"hidden_size=\[16, 16\]: expected a whole number"),
    (lightning, {"depth": 0}, "depth=0"),
    (lightning, {"num_classes": 0}, "num_classes=0"),
    (lightning, {"class_dropout_prob": 1.5}, "class_dropout_prob=1.5"),
    (lightning, {"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
    (ditdh, {"hidden_size": 16}, r"hidden_size=16: expected two whole numbers of at least 1, \[encoder, head\]"),
    (ditdh, {"depth": [2, 2, 2]}, r"depth=\[2, 2, 2\]"),
    (ditdh, {"hidden_size": [16, 28]}, "hidden_size=28 with num_heads=2 makes heads 14 wide"),
    (raev2, {"base_model_depth": 4}, "base_model_depth=4: expected 1 to 3"),
    (raev2, {"num_t_tokens": 0}, "num_t_tokens=0"),
])  # fmt: skip
def test_invalid_sizes_are_rejected(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


@pytest.mark.parametrize("make", MAKERS)
def test_inputs_of_other_shapes_are_rejected(make):
    model = make()
    x, t, y = batch(model)
    with pytest.raises(ValueError, match=r"\(3, 5, 4, 3\); expected B x 5 x 4 x 4"):
        model(x[..., :3], t, y)
    with pytest.raises(ValueError, match=r"\(1,\) and \(3,\); expected \(3,\) each"):
        model(x, t[:1], y)

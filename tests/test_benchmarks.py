"""The benchmark scripts run on tiny networks. No test checks a speed."""

import argparse
import json
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import dit_step, memory, runners, train_step
from benchmarks.plain_step import published_layers
from src.models import decoder, dit_layers
from src.models.decoder import DecoderConfig
from src.models.dit_layers import LayerOptions

TINY = ["--encoder", "tiny", "--decoder", "tiny", "--image_size", "64"]


@pytest.mark.slow
def test_step_benchmark_reports_time_and_memory(monkeypatch, tmp_path, capsys):
    out = tmp_path / "result.json"
    options = ["--batch", "2", "--repeats", "1", "--phases", "gan", "--scratch", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [train_step.__file__, *TINY, *options])
    train_step.main()
    rows = json.loads(out.read_text())["results"]["fp32/gan"]
    for name in ("plain", "ours"):
        assert rows[name]["seconds"] > 0 and rows[name]["peak_memory_gb"] > 0
        assert {"encode", "decode", "lpips", "gan", "backward", "disc", "optimizer", "ema"} <= rows[name]["ms"].keys()
    assert rows["ours"]["gflop_per_image"] < rows["plain"]["gflop_per_image"]
    assert "ours / plain" in capsys.readouterr().out


def test_models_are_built_entirely_on_the_device(monkeypatch, tmp_path):
    """On the meta device, which every machine has: mixing its tensors with CPU tensors is an error too."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not supported on meta
    sizes = argparse.Namespace(encoder="tiny", decoder="tiny", disc="S_8", image_size=64, scratch=str(tmp_path))
    models = runners.build_models(sizes, torch.device("meta"))
    for module in (models.rae, models.lpips, models.discriminator):
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Accessing the data pointer")  # users would take it for a bug
def test_peak_memory_is_computed_and_the_step_reads_no_value():
    """Fake tensors hold no values: a step that reads one (`item`, `if tensor`, boolean indexing) fails here."""
    options = argparse.Namespace(
        encoder="tiny", decoder="tiny", disc="S_8", image_size=64, precision="bf16", phase="gan",
        activation_checkpointing=False, loss_chunk_size=None, disc_fake="fresh",
    )  # fmt: skip
    (held, plain), (_, ours), (_, twice) = (
        memory.peak_bytes(options, variant, batch) for variant, batch in (("plain", 8), ("ours", 8), ("ours", 16))
    )
    assert held < ours < plain and ours < twice < 2 * ours
    two, three = (memory.peak_bytes(options, "ours", 8, accumulate)[1] for accumulate in (2, 3))
    latents = 8 * 192 * 16 * 2  # bytes, in bf16: all that each further micro-batch keeps, apart from scalars
    assert latents <= three - two < 1.5 * latents


def test_largest_batch(monkeypatch):
    arguments = argparse.Namespace(fit=[12], phase="gan", accumulate=[1])
    monkeypatch.setattr(memory, "peak_bytes", lambda _, variant, batch, accumulate: (0, (2 + batch) * memory.GIB))
    found = memory.largest_batches(arguments, "ours", 4, 6 * memory.GIB)
    assert found == {"gib_per_image": 1.0, "batch_in_12_gib": 8}  # 1.5 GiB are reserved (memory.OVERHEAD)


@contextmanager
def kept_for_backward():
    """Collect what autograd keeps for the backward pass, as data pointer -> bytes."""
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def test_decoder_block_keeps_less_memory_and_gives_the_same_result():
    """The GELU output, B N 4D, is not kept, and no matrix product is recomputed for it."""
    torch.manual_seed(0)
    config = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    block = decoder.Block(DecoderConfig(**config, decoder_intermediate_size=128, layer_norm_eps=1e-12))
    x = torch.randn(2, 5, 32, requires_grad=True)

    def run() -> tuple[list[torch.Tensor], int, int]:
        block.zero_grad()
        x.grad = None
        with FlopCounterMode(display=False) as flops, kept_for_backward() as kept:
            y = block(x)
            y.square().sum().backward()
        results = [y.detach(), x.grad, *(p.grad for p in block.parameters())]
        return [t.clone() for t in results], sum(kept.values()), flops.get_total_flops()

    ours, kept, flops = run()
    with published_layers():
        theirs, kept_plain, flops_plain = run()
    largest = max(plain.abs().max() for plain in theirs)  # the key bias has only rounding: softmax cancels it
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5 * float(max(plain.abs().max(), 1e-2 * largest)))
    assert kept <= kept_plain - 2 * 5 * 128 * 4
    attention = 6 * (2 * 2 * 2 * 5 * 5 * 16)  # products over B, heads, N, N, D/A, which the counter misses in ours
    assert flops == flops_plain - attention


def test_stage2_benchmark_runs_without_published_code_and_names_what_is_missing(monkeypatch, capsys):
    options = ["--network", "tiny", "raev2_tiny", "--shape", "64", "8", "8", "--computed"]
    monkeypatch.setattr(sys, "argv", [dit_step.__file__, *options])
    dit_step.main()
    torch.distributions.Distribution.set_default_validate_args(True)
    out = capsys.readouterr().out
    assert "tiny: the published step is left out; missing: --rae CHECKOUT" in out and "--raev2 CHECKOUT" in out
    assert "raev2_tiny, ours: between_steps_gib" in out


@pytest.mark.parametrize(("words", "said"), [
    (["--device", "gpu"], "argument --device: --device gpu: expected cpu, cuda or cuda:N"),
    (["--device", "cuda"], "--device cuda, but no CUDA device is visible"),
    (["--precision", "bf16"], "--precision bf16 is for --device cuda"),
])  # fmt: skip
def test_unavailable_device_is_an_error(monkeypatch, capsys, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    programs = [dit_step] if "--precision" in words else [dit_step, train_step]
    for program in programs:
        monkeypatch.setattr(sys, "argv", [program.__file__, *words])
        with pytest.raises(SystemExit):
            program.main()
        assert said in capsys.readouterr().err


def test_stage2_step_is_timed_on_a_device():
    sizes = {"shape": (64, 8, 8), "batch": 2, "warm": 0, "repeats": 1}
    arguments = argparse.Namespace(device=torch.device("cpu"), precision="bf16", **sizes)
    found = dit_step.measure_on_gpu(arguments, "tiny", dit_step.Ours, False)
    assert found["seconds"] > 0 and found["peak_gb"] > 0


@pytest.mark.parametrize("options", [LayerOptions(), LayerOptions(qknorm=True), LayerOptions(qknorm=True, v2=True)])
def test_transformer_block_keeps_no_norm_silu_or_product_and_gives_the_same_result(options):
    torch.manual_seed(0)
    block, hidden = dit_layers.Block(64, 2, options), 170
    torch.nn.init.normal_(getattr(block, options.modulation)["1"].weight, std=0.1)
    x, condition = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 1, 64, requires_grad=True)

    def run() -> tuple[list[torch.Tensor], int]:
        with kept_for_backward() as kept:
            y = block(x, condition, None)
        for weight in block.parameters():
            kept.pop(weight.data_ptr(), None)
        return [y, *torch.autograd.grad(y.square().sum(), [x, condition, *block.parameters()])], sum(kept.values())

    ours, kept = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit_layers, "recomputed", lambda function, *x: function(*x))
        plain, kept_plain = run()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    # SiLU and product; two norms, each before and after its modulation; those of q and k
    channels = 2 * hidden + 4 * 64 + 2 * 64 * options.qknorm
    assert kept <= kept_plain - 2 * 5 * 4 * channels

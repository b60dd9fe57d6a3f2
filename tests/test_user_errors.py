"""User errors end with one message that says what came, what was expected and what to type; no traceback."""

import logging
import subprocess

import pytest
import torch

from src.callbacks.samples import SampleImages
from src.core.compose import quoting_hint
from src.core.errors import UserError
from src.core.text import hydra_quoted, masked
from src.formats.checkpoint import load_trained
from src.training import logs
from src.training.run import _message as message_of
from src.training.run import check_config, run
from tests.training import QUIET, SMALL, composed, last, python, train


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.encoder_input_size=224"], ["encoder_input_size=224", "56", "null"]),
        (["model.encoder_params.dinov2_path=configs/encoder/nowhere"], ["configs/encoder/nowhere"]),
        (["model.decoder_config_path=configs/decoder/ViTXXL"], ["ViTXXL", "ViTXL", "ViTB"]),
        (["model.lpips_arch.weights=pretrained", "model.lpips_arch.vgg_path=nowhere.pth", "model.lpips_arch.linear_path=nowhere.pth"], ["nowhere.pth", "download_weights.py"]),
        (["model.pretrained_decoder_path=nowhere.pt"], ["nowhere.pt"]),
        (["model.normalization_stat_path=nowhere.pt"], ["nowhere.pt"]),
        (["trainer.precision=8"], ["trainer.precision=8", "bf16"]),
        (["trainer.accelerator=gpu"], ["gpu", "trainer=cpu"]),
        (["trainer.strategy=fsdp"], ["fsdp", "ddp"]),
        (["+trainer.foo=1"], ["foo", "trainer"]),
        (["+trainer.logger=false"], ["trainer.logger", "logger=csv"]),
        (["+trainer.gradient_clip_algorithm=value"], ["trainer.gradient_clip_algorithm", "trainer.gradient_clip_val"]),
        (["+callbacks.swa._target_=pytorch_lightning.callbacks.StochasticWeightAveraging"], ["callbacks.swa", "model.ema_decay"]),
        (["+callbacks.ema._target_=pytorch_lightning.callbacks.EMAWeightAveraging"], ["callbacks.ema", "model.ema_decay"]),
        (["trainer.float32_matmul_precision=low"], ["low", "highest", "high"]),
        (["trainer.accumulate_grad_batches=4"], ["3 micro-batch(es)", "an update takes 4", "nothing would be trained"]),
        (["model.encoder_config_path=/data/nowhere/dinov2"], ["no folder /data/nowhere/dinov2", "save_pretrained"]),
        (["model.encoder_config_path=a:b", "model.encoder_params.dinov2_path=configs/encoder/dinov2_tiny"], ["model.encoder_config_path=a:b"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)  # fmt: skip
def test_invalid_overrides_end_in_one_message(tmp_path, overrides, said):
    if overrides == ["trainer.accelerator=gpu"] and torch.cuda.is_available():
        pytest.skip("a GPU is available")
    with pytest.raises(UserError) as caught:
        train(tmp_path, *QUIET, *overrides)
    message = str(caught.value)
    for words in said:
        assert words in message, message


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("+batch_size=64", "batch_size"),
        ("+callbacks.rfd.rfid_every_n_steps=5", "rfd (did you mean rfid?)"),
        ("+trainr.devices=1", "trainr (did you mean trainer?)"),
        (
            "ckpt_path=",
            "No value after ckpt_path=: give a value, or null",
        ),  # an unset $CHECKPOINT would start over
    ],
)
def test_unknown_keys_that_hydra_accepts_are_rejected(added, said):
    with pytest.raises(UserError) as caught:
        check_config(composed(["experiment=rae_dummy", added]))
    assert said in str(caught.value)


def test_error_of_another_models_checkpoint_names_every_difference(tmp_path, stage1_run):
    other = ["data.image_size=128", "model.decoder_denormalize=false", "model.disc_weight=0"]
    with pytest.raises(UserError) as caught:
        train(tmp_path, *QUIET, *other, checkpoint=last(stage1_run[0]))
    differences = "image_size: checkpoint 64, model 128", "denormalize: checkpoint True, model False"
    assert all(words in str(caught.value) for words in (*differences, "discriminator: ", "pretrained_decoder"))


@pytest.mark.parametrize(
    "value", ["/数据/imagenet_hf", "/x/epoch=9.ckpt", "/a [1]/b", "/a{b}", "it's", "/a,b", "a(b)", r"C:\data\imagenet"],
)  # fmt: skip
def test_values_that_hydra_can_not_parse_are_shown_quoted(value):
    hint = quoting_hint(["experiment=rae_dummy", f"data.data_dir={value}", "-m"])
    shown = hydra_quoted(value)
    assert not hint or hint.endswith(f"data.data_dir={shown}")
    typed = subprocess.run(["bash", "-c", f"printf %s data.data_dir={shown}"], capture_output=True, text=True).stdout
    assert composed(["experiment=rae_dummy", typed]).data.data_dir == value
    assert quoting_hint(["experiment=rae_dummy", typed]) == ""


@pytest.mark.parametrize(
    ("typed", "end"),
    [
        ("ckpt_path=/x/epoch=9.ckpt", "ckpt_path=\"'/x/epoch=9.ckpt'\""),
        ("trainer.max_epoch=4", "unknown key trainer.max_epoch (did you mean max_epochs?)."),
        ("experimint=rae_dummy", "unknown key experimint (did you mean experiment?)."),
        ("callbacks.best.monitor=val/psnr", "To append to your config use +callbacks.best.monitor=val/psnr"),
        ("--experiment=rae_dummy", "experiment=NAME"),
        ("-m paths.log_dir=/proc", "set it to a folder that can be written."),
        ("hydra.run.dir=/proc/x", "a run to hydra.run.dir if given: set it to a folder that can be written."),
        ("-m trainer.max_epoch=4,5", "unknown key trainer.max_epoch (did you mean max_epochs?)."),  # -m in between
        ("--info trainer.max_epoch=4", "unknown key trainer.max_epoch (did you mean max_epochs?)."),
        ("model=rea", "provider=schema, path=structured://"),  # after the list of those available
    ],
)
def test_last_line_for_an_override_that_hydra_rejects(typed, end):
    assert python("src/train.py", "experiment=rae_dummy", *typed.split(), code=1).rstrip().endswith(end)


def test_secrets_are_masked_and_nothing_else():
    for key in ("token", "hf_token", "logger.wandb.api_key", "a.password", "my_secret", "SECRET_KEY"):
        typed = [f"+{key}=xyz", f"a={{b: 1, {key}: xyz}}", "data.storage_options.key=xyz", "data.batch_size=4"]
        hidden = {"a": {key.rsplit(".", 1)[-1]: "xyz"}, "list": typed, "override_dirname": ",".join(typed)}
        assert "xyz" not in str(masked(hidden)) and "data.batch_size=4" in masked(hidden)["list"], key
    config = {"data": {"storage_options": {"key": "xyz", "client_kwargs": {"a": "xyz"}}, "data_dir": "s3://b"}}
    assert "xyz" not in str(masked(config)) and masked(config)["data"]["data_dir"] == "s3://b"
    plain = {
        "num_tokens": 256,
        "token": None,
        "seed": 0,
        "tokens": [1],
        "list": ["num_tokens=256", "token", "d={e: f}"],
    }
    assert masked(plain) == plain


def test_secrets_are_in_no_file_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "+trainer_token=xyzzy", "data.storage_options={key: xyzzy}"])
    config = composed([*SMALL, *QUIET, "logger=tensorboard", "model.disc_weight=0", "trainer.max_steps=1", f"paths.run_dir={tmp_path}", "experiment_name=seen"])  # fmt: skip
    from omegaconf import open_dict

    with open_dict(config):
        config.data.pin_memory = {"hf_token": "xyzzy"}  # a key of older runs, which accepts anything
    run(config)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"xyzzy" in file.read_bytes()]
    assert "***" in (tmp_path / "run.json").read_text()


@pytest.mark.parametrize("count", [-1, "many", 1.5, True])
def test_invalid_sample_counts_are_rejected(count):
    with pytest.raises(UserError, match="callbacks.samples.count"):
        SampleImages(count)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n 4096"),
        (OSError(24, "Too many open files"), "ulimit -n 4096"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 TB"),
            "Not enough memory",
        ),
        (MemoryError(), "Not enough memory"),
        (ModuleNotFoundError("`DeviceStatsMonitor` needs `psutil`"), "needs `psutil`"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), "Not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "data.batch_size"),
        (
            ValueError(" `val_check_interval` (100) must be less than the batches (8)."),
            "must be less than",
        ),  # Lightning's
        (RuntimeError("a defect of ours"), None),
    ],
)
def test_limits_of_the_machine_end_in_a_message(error, said):
    found = message_of(error)
    assert said in found if said else found is None


def test_sample_count_of_zero_writes_no_images(tmp_path):
    train(tmp_path, *QUIET, "callbacks.samples.count=0", "trainer.max_steps=1", "model.disc_weight=0")
    assert not (tmp_path / "samples").exists()


def test_rfid_samples_follow_log_dir():
    config = composed(["experiment=rae_dummy", "paths.log_dir=/elsewhere"])
    assert config.callbacks.rfid.rfid_output_dir == "/elsewhere/rfid_samples"


def test_restart_by_torchrun_does_not_start_over(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit):
        run(composed([*SMALL, *QUIET, f"paths.log_dir={tmp_path}"]))
    assert "ckpt_path=last" in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_checkpoint_in_the_working_directory_is_pointed_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.ckpt").touch()
    with pytest.raises(UserError, match=f"project root: give {tmp_path}/mine.ckpt"):
        load_trained("mine.ckpt")


def test_launcher_that_can_not_start_ends_in_one_message(tmp_path):
    """As Hydra's launcher for SLURM does on a machine without it."""
    plugin = tmp_path / "hydra_plugins/absent.py"
    plugin.parent.mkdir()
    plugin.write_text(
        "from hydra.plugins.launcher import Launcher\n\n\nclass Absent(Launcher):\n"
        "    def setup(self, **_):\n        pass\n\n"
        "    def launch(self, *_, **__):\n        raise RuntimeError('Could not detect \"srun\"')\n"
    )
    words = "-m", "experiment=rae_dummy", "hydra.launcher._target_=hydra_plugins.absent.Absent", "seed=1,2"
    said = python("src/train.py", *words, f"paths.log_dir={tmp_path}", code=1, PYTHONPATH=str(tmp_path))
    assert said.splitlines()[-1] == 'Hydra failed: Could not detect "srun".'


def test_file_names_can_not_forge_log_entries(tmp_path):
    logs.set_up(tmp_path, True)
    forged = "2026-01-01 00:00:00,000 ERROR root: forged"
    for end in ("\n", "\r", "\r\n", "\u2028", "\x85"):
        logging.getLogger("src").warning("Bad image %s: cut", f"a{end}{forged}.jpg")
    logging.getLogger("src").info("a table:\n  of two\n  rows")
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith(forged)]
    assert lines[-2:] == ["  of two", "  rows"]

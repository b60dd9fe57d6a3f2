"""First commands of a new user, behind a firewall or with their own configs, end in one message that says what to type."""

import huggingface_hub
import pytest
from omegaconf import OmegaConf, open_dict

from src.core import compose as composing
from src.core.compose import compose
from src.core.download import cached_encoder
from src.core.errors import UserError
from src.core.requirements import requirements
from src.core.weights import PROJECT_ROOT
from src.models.encoders import Dinov2withNorm
from src.models.frozen_encoder import local_place
from src.training import needs
from src.training.run import check_config
from src.training.run import run as program
from tests.test_download import DEAD, hub_at
from tests.training import SMALL, composed

HUB_ID = "facebook/dinov2-with-registers-base"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Start with an empty cache and a hub that does not answer. Return the list of names that it is asked for."""
    asked, ask = [], needs.why_unreachable
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", f"{tmp_path}/hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub_at(DEAD, monkeypatch)
    huggingface_hub.close_session()
    monkeypatch.setattr(needs, "why_unreachable", lambda name: (asked.append(name), ask(name))[1])
    return asked


def refused(capfd, folder, *words):
    """Return the error message of a run; nothing may be left of the run."""
    with pytest.raises(SystemExit) as ended:
        program(composed([*words, f"paths.log_dir={folder}/logs"]))
    assert ended.value.code == 1 and not list(folder.glob("logs/runs/*"))
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said


def test_all_missing_files_are_listed_at_once_with_the_command(tmp_path, capfd, empty_cache):
    words = [f"paths.weights_dir={tmp_path}/weights", "data.data_dir=data/nowhere"]
    said = refused(capfd, tmp_path, "experiment=rae_dino", *words)
    for name in (HUB_ID, "vgg16-397923af.pth", "lpips_vgg", "pt_inception", "discs/dino_vit_small"):
        assert said.count(name) == 1, name
    assert f"scripts/download_weights.py --experiment rae_dino paths.weights_dir={tmp_path}/weights\n" in said
    assert "HF_ENDPOINT" in said and not empty_cache


ONLINE = [*SMALL, "~callbacks.rfid", "logger=csv", f"model.encoder_config_path={HUB_ID}", "model.encoder_params.weights=pretrained"]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("data.data_dir=data/nowhere", "create_hf_test_data.py"),
        ("data.image_size=100", "data.image_size=100 is not a multiple"),
        ("ckpt_path=nowhere.ckpt", "no such file"),
    ],
)
def test_data_sizes_and_checkpoint_are_checked_before_the_hub(tmp_path, capfd, empty_cache, wrong, message):
    assert message in refused(capfd, tmp_path, *ONLINE, wrong) and not empty_cache


RELEASED = [
    "experiment=ditdh_s", "trainer=cpu", "logger=csv", "data.data_dir=data/dummy_dataset_hf", "model.autoencoder.decoder=README.md",
]  # fmt: skip


@pytest.mark.parametrize("words", [ONLINE, RELEASED], ids=["stage 1", "stage 2"])
def test_hub_is_asked_once_and_no_line_is_repeated(tmp_path, capfd, empty_cache, words):
    said = refused(capfd, tmp_path, *words)
    assert empty_cache == [HUB_ID] and DEAD in said and "HF_ENDPOINT" in said and "download_weights.py" in said
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == len(set(lines)) < 12


def test_encoder_that_is_not_cached_names_the_hub():
    with pytest.raises(UserError, match=f"can't be loaded from '{HUB_ID}': {DEAD}: "):
        Dinov2withNorm(HUB_ID)


def test_cached_encoder_is_not_asked_for_again(tmp_path):
    place = tmp_path / f"hub/models--{HUB_ID.replace('/', '--')}"
    snapshot = place / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs/main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert cached_encoder(HUB_ID) is None and local_place(HUB_ID) == HUB_ID  # no weights yet
    (snapshot / "model.safetensors").write_bytes(b"x")
    assert local_place(HUB_ID) == str(snapshot)


def test_parts_that_a_run_leaves_out_need_no_files(tmp_path):
    off = ["model.disc_weight=0", "model.perceptual_weight=0", "callbacks=no_checkpoint"]
    config = compose(["experiment=rae_dino", *off])
    config["callbacks"]["rfid"] |= {"rfid_every_n_steps": 0, "rfid_every_epoch": False}
    assert [asset.name for asset in requirements(config, tmp_path, PROJECT_ROOT)] == [HUB_ID]
    decoder = "weights/decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
    released = {"encoder": HUB_ID, "decoder": decoder, "statistics": "s.pt"}
    found = requirements({"model": {"autoencoder": released}}, PROJECT_ROOT / "weights", PROJECT_ROOT)
    assert [asset.name for asset in found] == [HUB_ID, "decoder-dinov2", "model.autoencoder.statistics"]


def test_model_config_without_its_base_is_rejected():
    config = composed(["experiment=rae_dummy"])
    with open_dict(config):
        config.model = OmegaConf.create({"encoder_cls": "Dinov2withNorm"})
    with pytest.raises(UserError, match=r"configs/model/rae_dummy.yaml[\s\S]*- base") as caught:
        check_config(config)
    assert len(str(caught.value).splitlines()) < 6


AS_PRINTED = """defaults:
  - model: rae
  - data: imagenet
  - trainer: default
"""


def test_experiment_as_printed_in_the_users_guide(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(AS_PRINTED)
    monkeypatch.setattr(composing, "_CONFIGS", tmp_path)
    said = composing.problem(["experiment=mine"])
    assert "mine.yaml" in said and "# @package _global_" in said and "- override /model: …" in said
    monkeypatch.undo()
    for file in (PROJECT_ROOT / "configs/experiment").glob("*.yaml"):
        assert not composing.problem([f"experiment={file.stem}"])

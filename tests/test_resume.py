"""A resumed run is the run that was never interrupted: the same weights, moments, averages and batches, bit for bit."""

import shutil

import pytest
import torch

from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT, read
from src.training.stage1 import RAEModule
from tests.training import same, train

QUIET = ["~callbacks.rfid", "logger=csv"]
EVERY_STEP = ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_epochs=-1"]
COMPARED = ("state_dict", "optimizer_states", "global_step", "loops")


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six updates in two epochs, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, *QUIET, *EVERY_STEP)
    return folder


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_stopped_after_any_step_and_resumed(whole, tmp_path, stop):
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, *QUIET, *EVERY_STEP, f"trainer.max_steps={stop}")
    assert read(last(first))["global_step"] == stop
    train(second, *QUIET, *EVERY_STEP, checkpoint=last(first))
    assert_equal_ends(whole, second)


@pytest.mark.parametrize(
    "changes",
    [
        ["data.num_workers=2"],
        ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=6"],
    ],
    ids=["workers", "accumulation"],
)
def test_resumed_otherwise(whole, tmp_path, changes):
    """Other workers change nothing; two micro-batches of two differ from one of four by the adaptive weight alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, *QUIET, *EVERY_STEP, *changes, "trainer.max_steps=2")
    train(second, *QUIET, *EVERY_STEP, *changes, checkpoint=last(first))
    if changes == ["data.num_workers=2"]:
        assert_equal_ends(whole, second)
    else:
        reference = tmp_path / "reference"
        train(reference, *QUIET, *EVERY_STEP, *changes)
        assert_equal_ends(reference, second)


@pytest.mark.parametrize("saves", ["default", "no_checkpoint"])
def test_resumed_with_another_number_of_micro_batches(whole, tmp_path, saves):
    """The global batch is the same, so the images are those that would have come, each once."""
    halves = ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=6"]
    train(tmp_path / "first", *QUIET, *EVERY_STEP, *halves, "trainer.max_steps=2")
    seen = []
    original = RAEModule.training_step

    def training_step(self, batch, batch_idx):
        seen.extend(batch["position"].tolist())
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RAEModule, "training_step", training_step)
        saving = ["callbacks=no_checkpoint"] if saves == "no_checkpoint" else EVERY_STEP
        run = train(tmp_path / "second", *QUIET, *saving, checkpoint=last(tmp_path / "first"))
    assert run.trainer.global_step == 6
    assert seen == [*range(8, 12), *range(12)]  # the third update of the first epoch, and the second epoch


def test_a_checkpoint_behind_the_end_of_a_shorter_epoch_is_refused(tmp_path):
    train(tmp_path / "first", *QUIET, *EVERY_STEP, "trainer.max_steps=2")
    with pytest.raises(UserError, match=r"stands behind micro-batch 2.*now has 1"):
        train(tmp_path / "second", *QUIET, "trainer.limit_train_batches=1", checkpoint=last(tmp_path / "first"))


def test_the_same_encoder_may_lie_elsewhere(whole, tmp_path):
    shutil.copytree(PROJECT_ROOT / "configs/encoder/dinov2_tiny", tmp_path / "moved")
    run = train(
        tmp_path / "run", *QUIET, f"model.encoder_config_path={tmp_path / 'moved'}", "trainer.max_epochs=3",
        checkpoint=last(whole),
    )  # fmt: skip
    assert run.trainer.global_step == 9


def test_a_finished_run_ends_well_again_and_goes_on_with_more_epochs(whole, tmp_path):
    run = train(tmp_path / "again", *QUIET, checkpoint=last(whole))
    assert run.trainer.global_step == 6
    longer = train(tmp_path / "longer", *QUIET, "trainer.max_epochs=3", checkpoint=last(whole))
    assert longer.trainer.global_step == 9


def test_interrupting_changes_what_a_test_would_see(whole, tmp_path):
    """The comparison can fail: another seed ends elsewhere."""
    train(tmp_path / "other", *QUIET, "seed=1")
    assert not same(read(last(whole))["state_dict"], read(last(tmp_path / "other"))["state_dict"])


def test_the_checkpoint_holds_plain_values_only_and_no_frozen_weights(whole):
    content = torch.load(last(whole), weights_only=True)
    names = content["state_dict"].keys()
    assert not [n for n in names if n.startswith(("rae.encoder", "lpips", "discriminator.trunk"))]
    assert any(n.startswith("rae.decoder.") for n in names) and any(n.startswith("ema_decoder.") for n in names)
    assert content["format_version"] == 1 and content["config"]["model"]["encoder_cls"] == "Dinov2withNorm"


def assert_equal_ends(expected, actual):
    a, b = read(last(expected)), read(last(actual))
    for part in COMPARED:
        assert same(a[part], b[part]), part


def test_a_resume_says_what_makes_it_another_run(whole, tmp_path, caplog):
    changes = ["model.optimizer.lr=5e-4", "data.batch_size=2", "data.num_workers=1", "trainer.limit_train_batches=3"]
    train(tmp_path / "changed", *QUIET, *changes, "trainer.max_epochs=3", checkpoint=last(whole))
    said = "\n".join(record.getMessage() for record in caplog.records)
    for words in (
        "max_epochs was 2 and is now 3",
        "model.optimizer.lr was 0.001 and is now 0.0005",
        "global batch was 4 and is now 2",
    ):
        assert words in said
    assert "num_workers was" not in said and "data.batch_size was" not in said


def test_an_unchanged_resume_is_silent(tmp_path, caplog):
    train(tmp_path / "first", *QUIET, "trainer.max_steps=2")
    caplog.clear()
    train(tmp_path / "second", *QUIET, checkpoint=last(tmp_path / "first"))
    assert not [r.getMessage() for r in caplog.records if " is now " in r.getMessage()]

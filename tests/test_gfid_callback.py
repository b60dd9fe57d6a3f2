"""gFID during training: equal to `sample.py` and `eval_generation.py` to the last digit; its schedule and invalid settings."""

import json
import math
import signal

import numpy as np
import pytest

from src import eval_generation, sample
from src.callbacks import gfid_callback, scores
from src.core.errors import UserError
from src.core.stopping import STOP
from src.core.weights import read
from tests.test_eval_generation import as_folder, as_npz, pictures
from tests.tiny_models import two_processes
from tests.training import SMALL_STAGE2, assert_equal_ends, last, logged, train_stage2


def gfid(place, **options):
    values = {"every_n_epochs": 1, "num_images": 10, "batch_size": 4, "decode_batch": 3, "inception_weights": "tiny", "seed": 5,
              "sampler.cfg": 1.5, "sampler.t_min": 0.2, "reference": place} | options  # fmt: skip
    return [f"callbacks.gfid.{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return as_npz(tmp_path_factory.mktemp("reference") / "r.npz", pictures(9, 2))


def offline(checkpoint, reference, folder):
    common = "--device cpu --batch_size 4"
    drawn = f"--checkpoint {checkpoint} --num_images 10 --decode_batch 3 --seed 5 --cfg 1.5 --interval 0.2:1 --output {folder}/s.npz"
    assert sample.main([*common.split(), *drawn.split()]) == 0
    scored = f"--samples {folder}/s.npz --reference {reference} --inception_weights tiny --num_workers 0 --json {folder}/s.json"
    assert eval_generation.main([*common.split(), *scored.split()]) == 0
    return json.loads((folder / "s.json").read_text())["results"][0]


def test_online_and_offline_scores_are_equal_and_training_is_not_disturbed(
    autoencoder, stage2_run, reference, tmp_path
):
    train_stage2(tmp_path / "with", autoencoder, *gfid(reference, every_n_steps=4, every_n_epochs=2))
    assert_equal_ends(tmp_path / "with", stage2_run[0])
    scores = logged(tmp_path / "with", "gfid_untrained/score")
    assert sorted(scores) == [4, 6]  # 6 is the end of the second epoch
    found = offline(last(tmp_path / "with"), reference, tmp_path)
    names = {name: f"{name}_untrained" for name in ("sfid", "inception_score", "precision", "recall")}
    for name, key in {"score": "gfid_untrained", "images": "images", **names}.items():
        assert logged(tmp_path / "with", f"gfid_untrained/{name}")[6] == found[key], name
    state = next(v for k, v in read(last(tmp_path / "with"))["callbacks"].items() if "RunCheckpoint" in k)
    assert state["monitor"] == "gfid_untrained/score" and state["best"] == min(scores.values())


def test_long_evaluation_is_skipped_once_the_run_is_asked_to_stop(autoencoder, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "GRACE_S", 0.0)
    drawn, original = [], gfid_callback.draw

    def draw(*arguments):
        drawn.append(len(drawn))
        STOP.ask(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(gfid_callback, "draw", draw)
    with pytest.raises(SystemExit):
        train_stage2(tmp_path / "run", autoencoder, *gfid(reference, every_n_steps=2))
    assert drawn == [0] and read(last(tmp_path / "run"))["global_step"] == 2


def test_non_finite_samples_have_no_score_and_training_continues(autoencoder, reference, tmp_path, caplog):
    thirds = ["trainer.max_epochs=3", "trainer.limit_train_batches=2"]
    run = train_stage2(
        tmp_path / "run", autoencoder, *thirds, *gfid(reference, every_n_epochs=3, **{"sampler.cfg": 1e38})
    )
    assert run.trainer.global_step == 6 and "of 10 samples hold NaN or infinity" in caplog.text
    scores = logged(tmp_path / "run", "gfid_untrained/score")
    assert list(scores) == [6] and math.isnan(scores[6])


@pytest.mark.slow
def test_two_processes_give_the_score_of_one(autoencoder, reference, tmp_path):
    words = [*SMALL_STAGE2, f"model.autoencoder={autoencoder}", "data.batch_size=4", *gfid(reference, every_n_epochs=2)]
    two_processes("src/train.py", *words, f"paths.run_dir={tmp_path}/run", f"paths.log_dir={tmp_path}")
    found = offline(last(tmp_path / "run"), reference, tmp_path)
    for name, key in (("score", "gfid_untrained"), ("sfid", "sfid_untrained"), ("precision", "precision_untrained")):
        assert logged(tmp_path / "run", f"gfid_untrained/{name}")[6] == pytest.approx(found[key], rel=1e-5)
    assert logged(tmp_path / "run", "gfid_untrained/images") == {6: 10}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "null"}, "callbacks.gfid.reference=null: expected an npz"),
        ({"num_images": 1}, "callbacks.gfid.num_images=1: expected at least 2"),
        ({"num_images": 10**12}, "expected at most 10000000|1e.07"),
        ({"sampler.cfg": 0.5}, "callbacks.gfid.sampler.cfg"),
        ({"labels": "7"}, "callbacks.gfid.labels=7: .* classes 0 to 2"),
        ({"labels": "maybe"}, "callbacks.gfid.labels=maybe: expected equal"),
        ({"features": "[dinov2]"}, "expected inception among them"),
        ({"inception_weights": "pretrained", "inception_path": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_invalid_settings_are_rejected_before_training(autoencoder, reference, tmp_path, options, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        train_stage2(tmp_path / "run", autoencoder, *gfid(reference, **options))


def test_unsuitable_reference_is_rejected_before_training(autoencoder, tmp_path):
    small = as_npz(tmp_path / "small.npz", np.ascontiguousarray(pictures(5, 1, 48)))
    one = as_folder(tmp_path / "one", pictures(1, 1))
    for place, message in ((small, "48 x 48 px, this evaluation has 64 x 64 px"), (one, "has 1 image: 2 or more")):
        with pytest.raises(UserError, match=message):
            train_stage2(tmp_path / "run", autoencoder, *gfid(place))

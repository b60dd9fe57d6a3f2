"""Odd values of every key of the composed configs end in a run or in one message; new keys are covered automatically."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from scripts.odd_values import ODD, QUICK, STAGES, keys
from src.core.distributed import Launch
from src.core.errors import UserError
from src.core.options import ModelOptions
from src.core.text import flat
from src.formats.opening import open_autoencoder
from src.training.record import RunRecord
from src.training.run import build_run, check_config, fit
from tests.training import composed

VALUES = {kind: OverridesParser.create().parse_override(f"a={text}").value() for kind, text in ODD.items()}
NONSENSE = [
    "data.use_hf_dataset=maybe", "trainer.limit_train_batches=0", "model.scheduler.warmup_epochs=-3", "seed=-1", "model.optimizer.lr=-1",
    "model.optimizer.betas=[1]", "trainer.max_epochs=1.5", "ckpt_path=5", "data.image_size=100000", "model.disc_start_epoch=nan",
    "callbacks.rfid=maybe", "callbacks.samples._target_=maybe", "data._target_=src.training.stage1.RAEModule", "trainer._target_=maybe",
    "logger.tensorboard.name=1.5", "trainer.devices=0", "trainer.max_steps=0", "callbacks.checkpoint.keep_epochs=-2", "paths.log_dir=null", "preflight=2",
]  # fmt: skip


@contextmanager
def changed(config: DictConfig, key: str, value: object) -> Iterator[DictConfig]:
    """Set a value of `config` temporarily: copies would take longer than the tests themselves."""
    parent, _, name = key.rpartition(".")
    content = (OmegaConf.select(config, parent) if parent else config)._content  # type: ignore[union-attr]
    before = content.pop(name)
    with open_dict(config):
        OmegaConf.update(config, key, value, merge=False)
    try:
        yield config
    finally:
        content[name] = before


PYDANTIC = re.compile("Input should|should have|valid [a-z]+$", re.MULTILINE)
"""Words of pydantic's own messages, which users must not see."""


def base(stage: int) -> DictConfig:
    return composed([*STAGES[stage], *QUICK, *(["model.autoencoder=a.ckpt"] if stage == 2 else [])])


@pytest.fixture(scope="module")
def accepted() -> dict[int, list[tuple[str, object]]]:
    """Return the (key, value) that validation accepts, by stage, and messages under 0. Any other exception fails here."""
    found: dict[int, list[tuple[str, object]]] = {0: [], 1: [], 2: []}
    seen = set[str]()
    for stage in STAGES:
        config = base(stage)
        for key in list(dict.fromkeys(keys(OmegaConf.to_container(config)))):
            if key in seen and not key.startswith("model"):
                continue  # as in stage 1
            seen.add(key)
            for value in VALUES.values():
                with changed(config, key, value), suppress(OmegaConfBaseException):
                    try:
                        check_config(config)
                        found[stage].append((key, value))
                    except UserError as error:
                        found[0].append((key, str(error)))
    return found


def test_validation_accepts_or_ends_in_a_message(accepted):
    assert len(accepted[1]) > 100 and len(accepted[2]) > 30
    assert not [text for _, text in accepted[0] if PYDANTIC.search(str(text))]


@pytest.fixture(scope="module")
def small() -> DictConfig:
    return base(1)


@pytest.mark.parametrize("override", NONSENSE)
def test_nonsense_is_rejected(small, override):
    parsed = OverridesParser.create().parse_override(override)
    key, value = parsed.key_or_group, parsed.value()
    with changed(small, key, value), pytest.raises(UserError, match=key):
        check_config(small)


def test_every_odd_value_of_an_autoencoder_is_rejected():
    """As the whole value, under each key of a mapping, and under an unknown key."""
    names = [field.name for field in fields(ModelOptions) if field.name != "stats"]
    for value in [*VALUES.values(), {1: 2}]:
        for where in [
            value,
            *({"encoder": "dinov2-b", "decoder": "a.pt", name: value} for name in [*names, "statistics", "odd"]),
        ]:
            with pytest.raises(UserError, match="model.autoencoder"):
                open_autoencoder(where)


LEFT_OUT = ("trainer.max_steps", "trainer.fast_dev_run", "model.autoencoder", "model.compile")
"""The first two never end; no autoencoder; a minute of compilation. `scripts/odd_values.py` tries them too."""
GROUPS = [(1, "trainer"), (1, "data"), (1, "callbacks"), (1, "model"), (2, "model"), (2, "callbacks")]


@pytest.mark.parametrize(("stage", "group"), GROUPS)
def test_accepted_values_run_for_one_step(accepted, autoencoder, tmp_path, stage, group):
    """Set all odd values of a group at once, one per key; drop those that an error names, and try again."""
    files = [f"model.autoencoder='{autoencoder}'"] if stage == 2 else []
    config = composed([*STAGES[stage], *QUICK, *files, f"paths.run_dir='{tmp_path}'"])
    leaves = flat(OmegaConf.to_container(config, resolve=False))
    odd = {}
    for key, value in accepted[stage]:
        if key.startswith(group) and key in leaves and value != leaves[key] and key not in LEFT_OUT:
            odd.setdefault(key, value)
    while odd:
        with ExitStack() as stack:
            for key, value in odd.items():
                stack.enter_context(changed(config, key, value))
            try:
                check_config(config)
                fit(build_run(config, Launch(0, 1, "single")), None, RunRecord(None, "odd"))
                return
            except UserError as error:
                said = str(error)
        left = {k: v for k, v in odd.items() if k not in said and k.rpartition(".")[2] not in said}
        assert left != odd, said
        odd = left
    raise AssertionError("nothing was left to try")

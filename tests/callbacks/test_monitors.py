"""A callback that waits for a metric which nothing logs is told before the run, not after its first epoch."""

from __future__ import annotations

import logging

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from training import make_data, make_module, make_trainer

NONE = {"strict": False, "mode": "max"}


@pytest.mark.parametrize(
    ("callback", "data", "line"),
    [
        (EarlyStopping("val_reward", **NONE), {}, "EarlyStopping(monitor='val_reward'): RLHFModule logs 'val/reward'"),
        (ModelCheckpoint(monitor="train/rewards"), {}, "ModelCheckpoint(monitor='train/rewards'): RLHFModule logs"),
        (EarlyStopping("val/reward", **NONE), {"val": None}, "(monitor='val/reward'): there are no validation data"),
        (EarlyStopping("val/reward", **NONE), {}, None),
        (EarlyStopping("train/reward/even_digits", **NONE), {}, None),
        (EarlyStopping("mine", **NONE), {}, None),
    ],
)
def test_names_like_those_that_are_logged(tmp_path, caplog, callback, data, line):
    with caplog.at_level(logging.WARNING, "lightrft_lightning.callbacks.monitors"):
        make_trainer(tmp_path, callbacks=[callback], max_epochs=0).fit(make_module(), make_data(**data))
    told = [r.getMessage() for r in caplog.records if r.name.endswith("monitors")]
    assert len(told) == (line is not None) and (line or "") in "".join(told)

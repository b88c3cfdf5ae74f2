from __future__ import annotations

import re
from itertools import pairwise

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from lightrft_lightning.callbacks import ProgressLine
from lightrft_lightning.callbacks.progress import planned_iterations

LINE = re.compile(
    r"^ *(?P<label>\d+(/\d+)?|val)  reward +(?P<reward>-?\d+\.\d{3}|n/a)(?: \((?P<change>[+-]\d+\.\d{3})\))? +"
    r"length +(?P<length>\d+\.\d) +(?P<seconds>\d+\.\d) s  elapsed (?P<elapsed>\d+:\d\d)"
)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def parse(text):
    lines = [line for line in text.splitlines() if "elapsed" in line]
    return [match.groupdict() for match in map(LINE.match, lines) if match] if lines else []


def test_one_line_an_iteration_and_a_validation(fit, capsys):
    trainer, _ = fit(ProgressLine(), max_epochs=2, limit_train_batches=2)
    text = capsys.readouterr().out
    lines = parse(text)
    assert [line["label"] for line in lines] == ["val", "1/4", "2/4", "val", "3/4", "4/4", "val"]
    assert text.count("(before training)") == 1
    assert "\x1b" not in text
    assert float(lines[-1]["reward"]) == pytest.approx(float(trainer.callback_metrics["val/reward"]), abs=6e-4)
    assert float(lines[-2]["length"]) == pytest.approx(float(trainer.callback_metrics["train/length"]), abs=0.06)
    assert re.search(r"4/4 .* \d+ tok/s  \(rollout \d+\.\d s, update \d+\.\d s\)$", text, re.M)


def test_change_is_against_the_line_of_the_same_kind(fit, capsys):
    fit(ProgressLine(), max_epochs=2, limit_train_batches=2)
    lines = parse(capsys.readouterr().out)
    for kind in (["val"], ["1/4", "2/4", "3/4", "4/4"]):
        own = [line for line in lines if line["label"] in kind]
        assert own[0]["change"] is None
        for before, after in pairwise(own):
            change = float(after["reward"]) - float(before["reward"])
            assert float(after["change"]) == pytest.approx(change, abs=2e-3)


def test_every_n_and_the_last(fit, capsys):
    fit(ProgressLine(every_n=3), num_sanity_val_steps=0, limit_val_batches=0, limit_train_batches=7)
    assert [line["label"] for line in parse(capsys.readouterr().out)] == ["3/7", "6/7", "7/7"]


def test_reward_that_failed_is_not_the_one_of_before(fit, capsys):
    calls = []

    def fails_later(completion):
        calls.append(completion)
        if len(calls) > 8:
            raise RuntimeError
        return 1.0

    fit(ProgressLine(), rewards=fails_later, limit_val_batches=0)
    assert [line["reward"] for line in parse(capsys.readouterr().out)] == ["1.000", "1.000", "n/a", "n/a"]


def test_iterations_that_make_no_step_do_not_count_for_max_steps(fit, capsys):
    calls = []

    def equal_at_first(completion):
        calls.append(completion)
        return len(calls) if len(calls) > 8 else 0.0

    fit(ProgressLine(), rewards=equal_at_first, max_epochs=-1, max_steps=2, limit_val_batches=0)
    assert [line["label"] for line in parse(capsys.readouterr().out)] == ["1/3", "2/4", "3/4", "4/4"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_line_fits_the_terminal(fit, terminal, width):
    out = terminal(width)
    fit(ProgressLine(), max_epochs=12, limit_train_batches=1, limit_val_batches=0)
    assert "\x1b[1m" in out.getvalue()
    lines = [line for line in ANSI.sub("", out.getvalue()).splitlines() if "reward" in line]
    assert len(lines) == 12
    assert max(map(len, lines)) <= width
    assert all(("elapsed" in line) == (width >= 80) for line in lines)
    assert all(line.endswith((" s", " tok/s", ")")) or re.search(r"elapsed \d+:\d\d$", line) for line in lines)
    assert all(("rollout" in line) == (width >= 120) for line in lines)


def test_only_fit_is_reported(fit, capsys):
    trainer, module = fit(ProgressLine())
    capsys.readouterr()
    trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    assert parse(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("settings", "steps", "planned"),
    [
        ({"max_epochs": 3, "limit_train_batches": 4}, 1, 12),
        ({"max_epochs": -1, "max_time": "00:00:00:01"}, 1, None),
        ({"max_epochs": 3, "limit_train_batches": 4, "max_steps": 9}, 2, 5),
        ({"max_epochs": -1, "max_steps": 6}, 3, 2),
    ],
)
def test_planned_iterations(fit, settings, steps, planned):
    class Planned(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.planned = planned_iterations(trainer, pl_module)

    callback = Planned()
    fit(callback, limit_val_batches=0, module_settings={"steps_per_epoch": steps}, **settings)
    assert callback.planned == planned


def test_needs_an_rlhf_module(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[ProgressLine()], default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match="ProgressLine works with an RLHFModule, got BoringModel"):
        trainer.fit(BoringModel())


def test_bad_setting():
    with pytest.raises(ValueError, match=r"every_n=0\): must be at least 1"):
        ProgressLine(every_n=0)

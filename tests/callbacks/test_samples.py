from __future__ import annotations

import re

import pytest

from lightrft_lightning import Completion, Prompt, Trajectory
from lightrft_lightning.callbacks import SampleTable
from lightrft_lightning.callbacks.samples import printable, shortened

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def sample(prompt, text, reward=0.5, reason="eos"):
    return Trajectory(Prompt((1,), prompt), Completion((2,), (0.0,), reason), group=0, text=text, reward=reward)


def test_comes_after_the_first_and_every_nth_iteration(fit, capsys):
    _, module = fit(SampleTable(every_n=3, rows=3), limit_train_batches=7, limit_val_batches=0)
    text = capsys.readouterr().out
    assert re.findall(r"samples of iteration (\d+)", text) == ["1", "3", "6"]
    assert text.count("length") + text.count("eos") == 9  # three rows each
    assert module.last_trajectories[0].prompt.text.endswith("=")


def test_shows_training_samples_not_those_of_a_validation(fit, capsys):
    _, module = fit(SampleTable(every_n=1, rows=8), limit_train_batches=1)
    shown = set(re.findall(r"\d\+\d=", capsys.readouterr().out))
    validated = {t.prompt.text for t in module.last_trajectories}
    assert shown and shown.isdisjoint(validated)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[red]x[/red]", "[red]x[/red]"),
        ("[/] [bold]", "[/] [bold]"),
        ("[link=http://x]y[/]", "[link=http://x]y[/]"),
        (":smile:", ":smile:"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x07\r\n\t\x9b", r"\x07\r\n\t\x9b"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800", r"\ud800"),
    ],
)
def test_nothing_a_model_writes_is_obeyed(terminal, written, shown):
    out = terminal(120)
    SampleTable().show([sample(written, written)])
    assert "\x1b[31m" not in out.getvalue()
    row = next(line for line in ANSI.sub("", out.getvalue()).splitlines() if "eos" in line)
    assert row.count(shown) == 2


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_table_fits_the_terminal_however_long_the_texts(terminal, width):
    out = terminal(width)
    SampleTable(rows=2).show([sample("q" * 5000, "字" * 5000, None), sample("short", "", -0.5, "length")], "title")
    plain = ANSI.sub("", out.getvalue())
    lines = plain.splitlines()
    assert max(len(line) + line.count("字") for line in lines) <= width
    assert len(lines) < 20
    assert "failed" in plain and "-0.50" in plain and "…" in plain


def test_fewer_samples_than_rows(capsys):
    SampleTable(rows=10).show([sample("a", "b"), sample("c", "d")])
    assert capsys.readouterr().out.count("eos") == 2


def test_rows_are_spread_over_the_groups(capsys):
    SampleTable(rows=4).show([sample(f"prompt{i // 8}.", "x") for i in range(32)])
    assert re.findall(r"prompt(\d)\.", capsys.readouterr().out) == ["0", "1", "2", "3"]


def test_shortened_keeps_the_end_where_the_question_is():
    assert shortened("a" * 100 + "question", 20, keep_end=0.9).endswith("question")
    assert len(shortened("x" * 100, 20, keep_end=0.4)) == 20
    assert shortened("exactly20characters!", 20, keep_end=0.5) == "exactly20characters!"


def test_printable_keeps_all_scripts():
    assert printable("naïve 数 🙂") == "naïve 数 🙂"


@pytest.mark.parametrize("setting", ["every_n", "rows"])
def test_bad_setting(setting):
    with pytest.raises(ValueError, match=f"{setting}=0"):
        SampleTable(**{setting: 0})

"""What checksums of SGLang's processes prove; see test_sglang_real.py for those of the real one."""

from __future__ import annotations

import pytest
import torch

from lightrft_lightning.engines.sglang_checksums import Changes, fingerprints

WIDE, NORM = "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"
HEAD = "lm_head.weight"


def wrong(name, before, after, moved, vocabulary=None):
    """What is named after an update of a tensor, when the checksums of these of two processes move."""
    sums = {(0, rank, name): "old" for rank in range(2)}
    changes = Changes({name: fingerprints(before, 2, vocabulary)}, sums)
    now = {name: fingerprints(after, 2, vocabulary)}
    changes.sent(now, {})
    changes.finish(now, sums | {(0, rank, name): "new" for rank in moved})
    return changes.wrong


@pytest.mark.parametrize("shape", [(6, 4), (4,), (3, 2, 2)])
def test_what_changes_in_all_of_its_parts_has_to_change_in_every_process(shape):
    before, after = torch.zeros(shape), torch.ones(shape)
    assert wrong(WIDE, before, after, moved=(0, 1)) == set()
    for moved in ((0,), (1,), ()):
        assert wrong(WIDE, before, after, moved) == {WIDE}
    assert wrong(WIDE, before, before, moved=(1,)) == {WIDE} and wrong(WIDE, before, before, moved=()) == set()


@pytest.mark.parametrize("part", [slice(2), (slice(None), slice(2))])
def test_what_changes_in_one_part_may_stay_in_the_process_that_holds_the_other(part):
    before, after = torch.zeros(4, 4), torch.zeros(4, 4)
    after[part] = 1
    assert wrong(WIDE, before, after, moved=(0,)) == set() == wrong(WIDE, before, after, moved=(0, 1))
    assert wrong(WIDE, before, after, moved=()) == {WIDE}


def test_a_process_may_hold_only_padding_of_a_small_vocabulary():
    assert wrong(HEAD, torch.zeros(16, 4), torch.ones(16, 4), moved=(0,), vocabulary=16) == set()
    assert wrong(HEAD, torch.zeros(1000, 4), torch.ones(1000, 4), moved=(0,), vocabulary=1000) == {HEAD}


def test_two_replicas_move_together():
    sums = {(replica, 0, NORM): "old" for replica in range(2)}
    for moved, named in (((0, 1), set()), ((0,), {NORM}), ((), {NORM})):
        changes = Changes({NORM: fingerprints(torch.zeros(4), 1, None)}, sums)
        now = {NORM: fingerprints(torch.ones(4), 1, None)}
        changes.sent(now, {})
        changes.finish(now, sums | {(replica, 0, NORM): "new" for replica in moved})
        assert changes.wrong == named

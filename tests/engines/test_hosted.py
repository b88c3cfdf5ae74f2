"""What ``lightrft serve`` hosts, without the server."""

from __future__ import annotations

from lightrft_lightning import SamplingParams
from lightrft_lightning.engines._hosted import TransformersCopy


def test_groups_leave_before_the_others_are_generated(model_folder):
    engine = TransformersCopy({"max_batch_size": 2})
    engine.start(str(model_folder))
    steps, seen = [], []
    engine._model.register_forward_pre_hook(lambda *_: steps.append(None))
    for position, _ in engine.stream([[5], [6], [7]], SamplingParams(n=2, max_new_tokens=8, seed=1)):
        seen.append((position, len(steps)))
    assert sorted(position for position, _ in seen) == [0, 1, 2]
    assert seen[0][1] < seen[-1][1] <= len(steps)

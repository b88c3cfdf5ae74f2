"""Sampling one batch ahead on several ranks, with one server for all of them; see checks.py.

Arguments: folder, strategy.
"""

from __future__ import annotations

from functools import partial

import checks
from algorithms_trainer import assert_independent_of_ranks

from lightrft_lightning import RemoteRollout

SERVER = partial(RemoteRollout, engine="transformers", deadline=60.0)


class Killed(RemoteRollout):
    """Its server dies before the second rollout."""

    asked = 0

    def _ask(self, *arguments):
        self.asked += 1
        if self.asked == 2:
            self._server._process.kill()
            self._server._process.wait(10)
        yield from super()._ask(*arguments)


def check_the_updates_are_those_of_one_process():
    assert_independent_of_ranks(staleness=1, engine=SERVER, iterations=3)


def check_a_server_that_died_is_asked_again_by_all_ranks():
    assert_independent_of_ranks(staleness=1, engine=partial(Killed, engine="transformers", deadline=60.0), iterations=3)


if __name__ == "__main__":
    checks.run(dict(globals()))

"""Which optimizers can be given rows of elements in place of parameters."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lightrft_lightning.strategies.elementwise import check_elementwise

OF_ELEMENTS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "ASGD"]


@pytest.fixture
def weight():
    return nn.Parameter(torch.ones(3, 2))


@pytest.mark.parametrize("name", OF_ELEMENTS)
def test_an_optimizer_of_elements_passes_and_is_as_before(weight, name):
    optimizer = getattr(torch.optim, name)([weight], lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step)  # wraps `step` of the instance
    check_elementwise(optimizer)
    assert not optimizer.state and optimizer.param_groups[0]["params"] == [weight] and weight.eq(1).all()
    assert schedule.last_epoch == 0 and not torch.equal(torch.rand(1), torch.rand(1))


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_an_optimizer_that_looks_at_shapes_is_refused(weight, name):
    with pytest.raises(ValueError, match=f"{name} looks at the shape of parameters"):
        check_elementwise(getattr(torch.optim, name)([weight], lr=0.1))


class Lamb(torch.optim.SGD):
    """Steps as long as the parameter is, as LAMB makes them."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * p.norm() / p.grad.norm(), alpha=0.1)


def test_so_is_one_that_nobody_has_heard_of(weight):
    with pytest.raises(ValueError, match="Lamb looks at the shape of parameters"):
        check_elementwise(Lamb([weight], lr=0.1))


def test_one_that_cannot_be_tried_is_taken_as_it_is(weight, caplog):
    class Needs(torch.optim.SGD):
        def step(self, closure):
            return closure()

    with caplog.at_level(logging.INFO, "lightrft_lightning"):
        check_elementwise(Needs([weight], lr=0.1))
    assert "Needs could not be tried" in caplog.text

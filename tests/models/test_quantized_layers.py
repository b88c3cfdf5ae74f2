from __future__ import annotations

import peft

from lightrft_lightning.models.quantized import is_quantized
from lightrft_lightning.models.tiny import tiny_llama


def test_a_look_for_weights_in_four_bits_computes_none(monkeypatch):
    """A wrapper of PEFT's computes its `weight`, which is slow, and fails where parameters are sharded."""
    settings = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(seed=0, layers=1), settings)

    def computed(*args):
        raise AssertionError("computed")

    monkeypatch.setattr(peft.tuners.trainable_tokens.TrainableTokensLayer, "get_merged_weights", computed)
    assert not is_quantized(model)

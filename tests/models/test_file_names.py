import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch.distributed.fsdp import FSDPModule

from lightrft_lightning.models.file_names import as_in_files
from lightrft_lightning.models.merging import plain_tensors


@pytest.mark.parametrize("family", ["mixtral", "hrm_text", "gpt_neox", "llama"])
def test_tensors_are_those_of_the_file_that_transformers_writes(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    found = dict(as_in_files(model, ((n, p) for n, p in model.named_parameters())))
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())


def test_names_depend_neither_on_adapters_nor_on_a_class_that_was_made_for_sharding():
    model = tiny_model("gpt_neox")
    plain = {n for n, _ in as_in_files(model, model.named_parameters())}
    sharded = copy.deepcopy(model)
    sharded.__class__ = type("FSDP" + type(model).__name__, (FSDPModule, type(model)), {})
    assert {n for n, _ in as_in_files(sharded, sharded.named_parameters())} == plain
    peft = get_peft_model(model, LoraConfig(target_modules=["query_key_value"]))
    merged = plain_tensors(peft, peft.named_parameters())
    assert {n for n, _ in as_in_files(peft, merged)} == plain

"""Models with one number as output: loading, the head, values at the right positions."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightrft_lightning.experience.packing import pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.scalar import completion_scores, completion_values, load_scalar_model
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

SMALL = {"name": "tiny-llama", "layers": 2, "width": 32, "heads": 2}


def trajectory(prompt, tokens, group, mask=()):
    completion = Completion(tuple(tokens), (0.0,) * len(tokens), "eos")
    return Trajectory(Prompt(tuple(prompt), ""), completion, group, mask=mask)


def model_with_a_random_head():
    model = load_scalar_model(SMALL)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    return model


def test_a_new_head_says_zero_and_the_backbone_is_the_language_models():
    model = load_scalar_model({**SMALL, "seed": 3})
    ids = torch.tensor([[3, 4, 5, 6]])
    assert model(input_ids=ids).logits.tolist() == [[0.0]]
    expected = tiny_llama(3, layers=2, width=32, heads=2).model(ids).last_hidden_state
    torch.testing.assert_close(model.model(ids).last_hidden_state, expected)


def test_values_are_those_of_each_state_alone():
    model = model_with_a_random_head()
    trajectories = [
        trajectory([3, 4, 5], [6, 7, 8, 2], 0),
        trajectory([3, 4, 5], [9, 2], 0),
        trajectory([10, 3], [4, 5, 5, 6, 2], 1, mask=(True, False, False, True, True)),
    ]
    for shared in (True, False):
        (batch,) = pack(trajectories, 64, share_prompts=shared)
        values = completion_values(model, batch)
        for value, i, position in zip(values, batch.trajectory, batch.position, strict=True):
            t = trajectories[int(i)]
            before = [*t.prompt.token_ids, *t.completion.token_ids[: int(position)]]
            alone = model.score(model.model(torch.tensor([before])).last_hidden_state[0, -1])
            torch.testing.assert_close(value, alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", [0, 2, None])
@pytest.mark.parametrize("shared", [True, False])
def test_scores_are_those_of_hugging_face_for_each_text_alone(shared, pad):
    """Also where the padding token is the end token (2), or occurs in the text."""
    model = model_with_a_random_head()
    model.config.pad_token_id = pad
    trajectories = [
        trajectory([3, 4, 5], [6, 7, 8, 2], 0),
        trajectory([3, 4, 5], [2], 0),
        trajectory([3, 4, 5], [9, 2, 2], 0),
        trajectory([10, 3], [4, 0, 5, 6, 2], 1, mask=(True, False, False, True, False)),
        trajectory([10, 3], [7, 0], 1),
        trajectory([4], [9, 9], 2),
    ]
    seen = []
    for batch in pack(trajectories, 12, share_prompts=shared):
        scores, index = completion_scores(model, batch)
        for score, i in zip(scores, index.tolist(), strict=True):
            t = trajectories[i]
            alone = model(input_ids=torch.tensor([[*t.prompt.token_ids, *t.completion.token_ids]])).logits[0, 0]
            torch.testing.assert_close(score, alone, atol=1e-5, rtol=1e-5)
            seen.append(i)
    assert sorted(seen) == list(range(6))


def test_gradients_reach_backbone_and_head():
    model = model_with_a_random_head()
    (batch,) = pack([trajectory([3, 4], [5, 6, 2], 0)], 64)
    completion_values(model, batch).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.layers.parameters())
    assert model.score.weight.grad.abs().sum() > 0


def test_a_folder_of_either_kind(tmp_path):
    causal = tiny_llama(1, layers=2, width=32, heads=2)
    causal.save_pretrained(tmp_path / "causal")
    char_tokenizer().save_pretrained(tmp_path / "causal")
    fresh = load_scalar_model(tmp_path / "causal")
    assert not fresh.score.weight.any()
    torch.testing.assert_close(fresh.model.norm.weight, causal.model.norm.weight)
    torch.nn.init.normal_(fresh.score.weight)
    fresh.save_pretrained(tmp_path / "reward")
    again = load_scalar_model(tmp_path / "reward")
    torch.testing.assert_close(again.score.weight, fresh.score.weight)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(theirs(ids).logits, again(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "causal").pad_token_id == again.config.pad_token_id


def test_several_labels_are_refused(tmp_path):
    config = tiny_llama(1, layers=1, width=32, heads=2).config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 labels"):
        load_scalar_model(tmp_path)


def test_a_file_without_the_weights_is_refused(tmp_path):
    import safetensors.torch

    load_scalar_model(SMALL).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["score.weight"], tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds no weights for 2 parameters"):
        load_scalar_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_scalar_model(tmp_path / "nothing")


def test_another_kind_of_model_has_no_values():
    (batch,) = pack([trajectory([3, 4], [5, 2], 0)], 64)
    with pytest.raises(TypeError, match="no linear `score` head"):
        completion_values(tiny_llama(layers=1, width=32, heads=2), batch)

"""The reward `judge`: a server that speaks OpenAI's protocol, and an engine of this process."""

from __future__ import annotations

import re
import time

import pytest

from lightrft_lightning import TransformersRollout
from lightrft_lightning.rewards import Judge, RewardReport, Rewards

TEMPLATE = "Is {completion} the answer to {prompt}? It is {answer}."


def says(text):
    """A judge that answers by what it reads."""

    def answer(body):
        asked = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        said = text(asked) if callable(text) else text
        return {"choices": [{"message": {"content": said}, "text": said}]}

    return answer


@pytest.fixture
def score(samples):
    def run(texts, **options):
        batch = samples(texts)
        report = Rewards({"name": "judge", "template": TEMPLATE, "model": "m", "backoff": 0.01, **options}).score(batch)
        return [t.reward for t in batch], report

    return run


def test_chat_and_plain_completions(serve, score):
    server = serve(says("I would say 7."))
    assert score(["a"], url=f"{server.url}/v1", max_new_tokens=9)[0] == [7]
    path, _, body = server.requests[0]
    asked = "Is a the answer to prompt 0? It is 0."
    assert path == "/v1/chat/completions" and body == {
        "model": "m", "temperature": 0, "max_tokens": 9, "messages": [{"role": "user", "content": asked}],
    }  # fmt: skip
    assert score(["a"], url=f"{server.url}/v1/", chat=False)[0] == [7]
    path, _, body = server.requests[1]
    assert path == "/v1/completions" and body["prompt"] == asked


def test_grades_are_not_mixed_up(serve, score):
    server = serve(says(lambda asked: asked.split()[1]))
    texts = [str(i) for i in range(60)]
    assert score(texts, url=[server.url, serve(server.answer).url])[0] == list(range(60))


def test_many_requests_at_a_time(serve, score):
    server = serve(lambda body: time.sleep(0.5) or says("1")(body))
    start = time.monotonic()
    assert score(["a"] * 32, url=server.url, concurrency=16)[0] == [1] * 32
    assert 1 <= time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("said", "options", "expected"),
    [
        ("first 3, then -4.5", {}, -4.5), ("1,000", {}, 1000), ("8/10", {"pattern": r"(\d+)/10"}, 8),
        ("Grade: 2. No, Grade: 4.", {"pattern": r"Grade: (\d)"}, 4), ("3", {"scale": (1, 5)}, 0.5),
        ("5", {"scale": [1, 5]}, 1), ("good", {}, None), ("", {}, None), ("6", {"scale": (1, 5)}, None),
        ("8 of 10", {"pattern": r"(\d+)/10"}, None), ("Grade: A", {"pattern": "Grade: (.)"}, None), (None, {}, None),
    ],
)  # fmt: skip
def test_grades(serve, score, said, options, expected, caplog):
    rewards, report = score(["a"], url=serve(says(said)).url, **options)
    assert rewards == [expected] and report.failed == (expected is None)
    assert expected is not None or re.search("no grade|not on the scale|no text", caplog.text)


def test_one_unreadable_grade_costs_one_sample(serve, score):
    server = serve(says(lambda asked: "?" if "1 the" in asked else "2"))
    rewards, report = score(["0", "1", "2"], url=server.url)
    assert rewards == [2, None, 2] and report == RewardReport(3, failed=1) and len(server.requests) == 3


def test_failures_of_the_server_are_tried_again(serve, score):
    answers = iter([500, 429])
    server = serve(lambda body: next(answers, None) or says("1")(body))
    assert score(["a"], url=server.url)[0] == [1]
    assert score(["a"], url=serve(lambda body: {"choices": []}).url)[1].failed == 1


def test_an_engine_of_this_process(samples, tiny_model, tiny_tokenizer):
    engine = TransformersRollout()
    engine.connect(tiny_model, tiny_tokenizer)
    judge = Judge("{completion}=", engine=engine, max_new_tokens=8, pattern=r"(\d)")
    batch = samples([f"{i}+{i}" for i in range(5)])
    Rewards(judge).score(batch)
    for t in batch:
        ids = tiny_tokenizer(f"{t.text}=", return_tensors="pt").input_ids
        continued = tiny_model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        digits = re.findall(r"\d", tiny_tokenizer.decode(continued, skip_special_tokens=True))
        assert t.reward == (float(digits[-1]) if digits else None)
    assert any(t.reward is not None for t in batch)


def test_an_engine_with_a_chat_template(samples, tiny_model, tiny_tokenizer):
    class Canned(TransformersRollout):
        def generate(self, prompts, sampling, streams=None):
            self.seen = [tiny_tokenizer.decode(ids) for ids in prompts]
            return super().generate(prompts, sampling, streams)

    engine = Canned()
    engine.connect(tiny_model, tiny_tokenizer)
    tiny_tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}"
    try:
        Rewards(Judge("{completion}", engine=engine, max_new_tokens=2)).score(samples(["1+1"]))
    finally:
        tiny_tokenizer.chat_template = None
    assert engine.seen == ["1+1="]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "reward 'judge' needs the option 'template'"),
        ({"template": TEMPLATE}, "give either url=... and model=..., or engine=..."),
        ({"template": TEMPLATE, "url": "http://x"}, "needs model="),
        ({"template": "x", "url": "http://x", "model": "m"}, "must have {completion} in it"),
        ({"template": TEMPLATE, "url": "http://x", "model": "m", "pattern": "("}, "is no regular expression"),
        ({"template": TEMPLATE, "url": "http://x", "model": "m", "pattern": "1"}, "must have one group, it has 0"),
        ({"template": TEMPLATE, "url": "http://x", "model": "m", "scale": [5, 1]}, "lowest and the highest grade"),
        ({"template": TEMPLATE, "url": "http://x", "model": "m", "retrys": 1}, "Did you mean 'retries'"),
        ({"template": TEMPLATE, "engine": object(), "model": "m"}, "belong to url=..., not to engine=..."),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Rewards({"name": "judge", **options})


def test_an_answer_longer_than_what_was_asked_for_is_not_searched(serve, score, caplog):
    server = serve(says("1," * 2_000_000))
    assert score(["a"], url=server.url, max_new_tokens=9)[0] == [None]
    assert "the answer has 4000000 characters, asked for at most 9 tokens" in caplog.text


@pytest.mark.parametrize("field", ["{image.__init__.__globals__}", "{completion._x}", "{a[0]._b.c}"])
def test_a_template_does_not_reach_into_objects(field):
    with pytest.raises(ValueError, match=r"is a private attribute, leave it out"):
        Judge("{completion}" + field, url="http://localhost:1", model="m")

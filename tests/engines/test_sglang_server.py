"""Arguments become the command line that gives exactly them."""

from __future__ import annotations

import argparse

import pytest

from lightrft_lightning.engines._sglang_server import options


@pytest.fixture
def parser():
    """With each kind of option that SGLang has."""
    parser = argparse.ArgumentParser(prog="sglang serve")
    parser.add_argument("--model-path", "--model", type=str)
    parser.add_argument("--port", type=int, default=1)
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--log-requests", action="store_true")
    parser.add_argument("--radix", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--bucket-times", nargs="+", type=float)
    parser.add_argument("--lora-paths", nargs="*", type=str)
    parser.add_argument("--model-override", type=str, default="{}")
    parser.add_argument("--tensor-parallel-size", "--tp-size", "--tp", dest="tp_size", type=int)
    return parser


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"model_path": "-model"}, {"model_path": "-model"}),
        ({"model": "--port=3"}, {"model_path": "--port=3", "port": 1}),
        ({"model-path": ""}, {"model_path": ""}),
        ({"model_path": "a b'\"\n"}, {"model_path": "a b'\"\n"}),
        ({"port": -1, "mem_fraction_static": 0.3}, {"port": -1, "mem_fraction_static": 0.3}),
        ({"log_requests": True}, {"log_requests": True}),
        ({"log_requests": False, "port": None}, {"log_requests": False, "port": 1}),
        ({"radix": True}, {"radix": True}),
        ({"radix": False}, {"radix": False}),
        ({"bucket_times": [1.5, -2.0]}, {"bucket_times": [1.5, -2.0]}),
        ({"bucket_times": [-2.0]}, {"bucket_times": [-2.0]}),
        ({"lora_paths": []}, {"lora_paths": []}),
        ({"lora_paths": ["-one"]}, {"lora_paths": ["-one"]}),
        ({"model_override": {"a": [1, None]}}, {"model_override": '{"a": [1, null]}'}),
        ({"tp": 2}, {"tp_size": 2}),
        ({"tp_size": 2}, {"tp_size": 2}),
    ],
    ids=str,
)
def test_each_value_comes_back(parser, arguments, expected):
    found = vars(parser.parse_args(options(arguments, parser)))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prot": 1}, "engine_args: SGLang's server has no argument 'prot', did you mean 'port'?"),
        ({"mem_fraction": 0.3}, "no argument 'mem_fraction', did you mean 'mem_fraction_static'"),  # no abbreviation
        ({"help": True}, "no argument 'help'"),
        ({"tp": 1, "tp_size": 2}, "'tp' and 'tp_size' are the same argument"),
        ({"model-path": "a", "model_path": "b"}, "'model-path' and 'model_path' are the same argument"),
        ({"log_requests": "yes"}, r"engine_args\['log_requests'\]='yes': must be true or false"),
        ({"radix": 1}, r"engine_args\['radix'\]=1: must be true or false"),
        ({"lora_paths": ["a", "-b"]}, r"\['a', '-b'\]: SGLang takes '-b' for an option in a list"),
    ],
    ids=str,
)
def test_what_no_command_line_gives_is_refused(parser, arguments, message):
    with pytest.raises(ValueError, match=message):
        options(arguments, parser)

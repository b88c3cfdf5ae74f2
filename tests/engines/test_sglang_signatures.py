"""Whatever `SGLangRollout` says to a server is compared with the source of the real SGLang: names and types.

The calls are those that it makes to the stand-in in fake_sglang, whose answers test_sglang_real.py compares with a
running server's: on a CPU, with the settings that run there. The source knows the others too.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from lightrft_lightning import FakeStrategy, SamplingParams, SGLangRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

FAKE = Path(__file__).parent / "fake_sglang"


@pytest.fixture(scope="module")
def source(sglang_environment):
    """The real package's source, as a function from a file's name to its text."""
    return lambda name: Path(sglang_environment[0], "sglang", name).read_text()


class Read(dict):
    """Notes what is looked up, and what was there."""

    seen: ClassVar[dict[str, object]] = {}

    def get(self, name, default=None):
        self.seen[name] = super().get(name, default)
        return self.seen[name]

    def __getitem__(self, name):
        return self.get(name)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Everything that the adapter does: the settings that the server was started with, and all calls with answers."""
    record = tmp_path_factory.mktemp("record") / "calls.jsonl"
    tokenizer, model, strategy = char_tokenizer(), tiny_llama(seed=0, width=32, layers=2), FakeStrategy()
    prompts = [tokenizer("1+1=")["input_ids"], tokenizer("22+3=")["input_ids"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAKE))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("FAKE_SGLANG_RECORD", str(record))
        check = SGLangRollout._check_server
        patch.setattr(SGLangRollout, "_check_server", lambda self, url, info: check(self, url, Read(info)))
        engine = SGLangRollout({"context_length": 64}, sleep_level=1, verify="all", deadline=60.0)
        strategy.setup_inference_engine(engine_type=engine, actor=model, tokenizer=tokenizer)
        engine._info = Read(engine._info)
        settings = json.loads(Path(engine._folder.name, "sglang.json").read_text())
        for sampling in (
            SamplingParams(n=2, max_new_tokens=4, stop=("3",)),
            SamplingParams(max_new_tokens=4, temperature=0.0),
            SamplingParams(n=2, max_new_tokens=4, top_k=3, top_p=0.9),
        ):
            engine.generate(prompts, sampling)
        picture = Image.new("RGB", (4, 4))
        engine.takes_images = True  # the stand-in's model does not
        engine.generate(prompts, SamplingParams(n=2, max_new_tokens=4), images=[[picture, picture], [picture]])
        strategy.update_engine_weights(model)
        engine.sleep(1)
        engine.wake_up()
        engine.close()
    return settings, [json.loads(line) for line in record.read_text().splitlines()]


# -------------------------------------------------------------------- reading the source


def classes_of(text):
    return {node.name: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)}


def fields_of(classes, name):
    """Type of each of a class's fields, those of its bases included, and whether it has a default."""
    node, fields = classes[name], {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            fields |= fields_of(classes, base.id)
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            fields[item.target.id] = item.annotation, item.value is not None
    return fields


JSON = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict, "list": list, "None": type(None)}


def fits(value, kind, known):
    """Whether a value is of a type as it is written down; `known` are other names for types, and classes of fields."""
    if isinstance(kind, ast.Subscript):
        inner = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
        return fits_one_of(value, ast.unparse(kind.value), inner, known)
    name = ast.unparse(kind)
    if isinstance(known.get(name), ast.ClassDef):
        fields = fields_of(known, name)
        return set(value) == set(fields) and all(fits(value[field], fields[field][0], known) for field in fields)
    if name in known:
        return fits(value, known[name], known)
    return name == "Any" or (
        name in JSON and isinstance(value, JSON[name]) and (name == "bool" or not isinstance(value, bool))
    )


def fits_one_of(value, outer, inner, known):
    match outer:
        case "Optional" | "Union":
            return (outer == "Optional" and value is None) or any(fits(value, kind, known) for kind in inner)
        case "Annotated" | "A":
            return fits(value, inner[0], known)
        case "Literal":
            return value in [ast.literal_eval(choice) for choice in inner]
        case "List" | "Set":
            return isinstance(value, list) and all(fits(item, inner[0], known) for item in value)
        case "Dict":
            pairs = value.items() if isinstance(value, dict) else [(None, None)]
            return all(fits(name, inner[0], known) and fits(item, inner[1], known) for name, item in pairs)
    raise AssertionError(f"{outer}: what is this?")


@pytest.mark.parametrize(
    ("value", "kind", "right"),
    [
        (1, "int", True), (True, "int", False), (1, "bool", False), (1, "float", True), ("1", "float", False),
        (None, "Optional[str]", True), (None, "Union[str, int]", False), ([[1]], "Optional[List[List[int]]]", True),
        ([[1.0]], "List[List[int]]", False), ({"a": 1}, "Dict[str, int]", True), ({"a": "b"}, "Dict[str, int]", False),
        ([1], "Set[int]", True), ("x", "Literal['x', 'y']", True), ("z", "Literal['x', 'y']", False),
        ([1], "Alias", True), (1, "Gone", False), ({"a": 1}, "Known", True), ({"a": "1"}, "Known", False),
        ({"a": 1, "b": 1}, "Known", False),
    ],
)  # fmt: skip
def test_types_are_told_apart(value, kind, right):
    known = {**classes_of("class Known:\n    a: int"), "Alias": ast.parse("List[int]", mode="eval").body}
    assert fits(value, ast.parse(kind, mode="eval").body, known) is right


def routes_of(text):
    """The handler of each method and path."""
    routes = {}
    for node in ast.parse(text).body:
        for decorator in getattr(node, "decorator_list", []):
            if not (isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute)):
                continue
            if not (decorator.args and isinstance(decorator.args[0], ast.Constant)):
                continue
            kind = decorator.func.attr
            listed = [ast.literal_eval(k.value) for k in decorator.keywords if k.arg == "methods"]
            for method in listed[0] if listed else [kind.upper()]:
                routes[method, decorator.args[0].value] = node
    return routes


NAMESPACES = (
    *("device", "disagg", "exec_", "lora", "memory", "mm", "model", "observability", "parallel", "schedule"),
    *("serving", "spec"),
)


def server_args_of(source):
    """Type of each field of `ServerArgs`, as it is written down."""
    types = {}
    for name in NAMESPACES:
        for node in ast.walk(ast.parse(source(f"srt/arg_groups/fields/{name}.py"))):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("A["):
                types[node.target.id] = node.annotation.slice.elts[0]
    return types


@pytest.fixture(scope="module")
def requests(source):
    """Classes, and other names for types."""
    text = source("srt/managers/io_struct.py")
    named = [node for node in ast.parse(text).body if isinstance(node, ast.Assign) and len(node.targets) == 1]
    return {ast.unparse(node.targets[0]): node.value for node in named} | classes_of(text)


@pytest.fixture(scope="module")
def routes(source):
    return routes_of(source("srt/entrypoints/http_server.py"))


def loaded(source, name, tmp_path):
    """A file of the real package, run on its own."""
    path = tmp_path / "module.py"
    path.write_text(source(name))
    spec = importlib.util.spec_from_file_location("real_sglang_api", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------- what is sent


def test_everything_was_said(said):
    _, calls = said
    assert {call["path"] for call in calls} == {
        "/ready", "/server_info", "/model_info", "/update_weight_version", "/update_weights_from_disk", "/flush_cache",
        "/weights_checker", "/generate", "/release_memory_occupation", "/resume_memory_occupation",
        "/pause_generation", "/continue_generation",
    }  # fmt: skip


def test_settings_are_server_args(said, source):
    settings, types = said[0], server_args_of(source)
    assert len(types) > 300
    assert {"load_format", "tp_size", "enable_deterministic_inference"} <= set(settings)
    for name, value in settings.items():
        written = types[name.replace("-", "_")]
        assert fits(value, written, {}), (name, value, ast.unparse(written))


def test_the_command_is_sglangs(source):
    main = source("launch_server.py")
    assert 'if __name__ == "__main__":' in main and "prepare_server_args(sys.argv[1:])" in main
    assert "def add_cli_args(parser" in source("srt/server_args.py")


def test_routes_exist(said, routes):
    for call in said[1]:
        handler = routes[call["method"], call["path"]]
        assert set(call["query"]) <= {argument.arg for argument in handler.args.args}, call["path"]


def test_bodies_fit_the_requests(said, routes, requests):
    checked = set()
    for call in said[1]:
        handler = routes[call["method"], call["path"]]
        annotated = [ast.unparse(a.annotation) for a in handler.args.args if a.arg == "obj"]
        if not annotated:
            assert call["body"] is None, call["path"]
            continue
        (name,) = [
            name
            for name, node in requests.items()
            if isinstance(node, ast.ClassDef)
            and name in annotated[0].replace("[", " ").replace(",", " ").replace("]", " ").split()
        ]
        fields = fields_of(requests, name)
        body = call["body"]
        assert set(body) <= set(fields), call["path"]
        assert {field for field, (_, default) in fields.items() if not default} <= set(body) | {"rid"}, call["path"]
        for field, value in body.items():
            assert fits(value, fields[field][0], requests), (name, field, value, ast.unparse(fields[field][0]))
        checked.add(name)
    assert len(checked) == 8


def test_sampling_parameters_exist(said, source):
    known = fields_of(classes_of(source("srt/sampling/sampling_params.py")), "SamplingParams")
    seen = set()
    for call in said[1]:
        if call["path"] == "/generate":
            params = call["body"]["sampling_params"]
            for one in params if isinstance(params, list) else [params]:
                for name, value in one.items():
                    assert fits(value, known[name][0], {}), (name, value, ast.unparse(known[name][0]))
                seen |= set(one)
    assert {"sampling_seed", "no_stop_trim", "max_new_tokens", "top_k"} <= seen


def test_sglangs_own_check_of_requests_takes_them(said, source, tmp_path):
    """And its reader of answers the stand-in's."""
    pytest.importorskip("msgspec", reason="comes with vLLM")
    real = loaded(source, "api/v1/api_types.py", tmp_path)
    for call in said[1]:
        if call["path"] == "/generate":
            real.GenerateRequest.from_json_value(call["body"])
            answers = call["answer"] if isinstance(call["answer"], list) else [call["answer"]]
            for answer in answers:
                read = real.GenerateResponse.from_json_value(answer)
                assert list(read.output_ids) == answer["output_ids"]
                assert read.meta_info.weight_version == answer["meta_info"]["weight_version"]
                assert read.meta_info.finish_reason is not None
    with pytest.raises(real.JsonContractError):
        real.GenerateRequest.from_json_value({"input_ids": "1 2 3", "sampling_params": 3})


# -------------------------------------------------------------------- what is read in the answers


def test_what_is_read_about_an_aborted_request_is_written_there(source):
    reasons = source("srt/managers/schedule_batch.py")
    assert '"type": "abort"' in reasons and '"message": self.message' in reasons


def test_what_is_read_about_the_server_is_a_setting_of_it(said, source, routes):
    about, types = ast.unparse(routes["GET", "/model_info"]), server_args_of(source)
    of_the_model = {name for name in ("weight_version", "has_image_understanding") if f"'{name}': " in about}
    assert len(of_the_model) == 2
    assert {"dtype", "sampling_mask_max_tokens", "disable_radix_cache"} <= set(Read.seen)
    for name in set(Read.seen) - of_the_model:
        assert fits(Read.seen[name], types[name], {}), (name, Read.seen[name], ast.unparse(types[name]))
    assert "build_server_info(server_args" in ast.unparse(routes["GET", "/server_info"])


def test_checksums_are_of_the_types_that_are_read(said, requests):
    answers = [call["answer"] for call in said[1] if call["path"] == "/weights_checker" and "ranks" in call["answer"]]
    assert answers
    for rank in answers[0]["ranks"]:
        assert fits(rank, ast.Name("ChecksumInfo"), requests), rank


def test_seeds_need_the_option_that_is_set(source):
    """Otherwise they would be dropped without a word."""
    text = source("srt/sampling/sampling_batch_info.py")
    start = text.index("sampling_seed = (")
    assert "if enable_deterministic" in text[start : start + 700]


def test_fused_layers_are_named_as_is_supposed(source):
    for model in ("llama", "qwen2", "qwen3", "gemma3_causal"):
        text = source(f"srt/models/{model}.py")
        assert '"qkv_proj"' in text and '"gate_up_proj"' in text, model

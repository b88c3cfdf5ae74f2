"""Whatever `SGLangRollout` says to a server is compared with the source of the real SGLang, which cannot run here.

The calls are those that it makes to the stand-in in fake_sglang, and the stand-in's answers are compared as well.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from lightrft_lightning import FakeStrategy, SamplingParams, SGLangRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

VERSION = "0.5.23"
FAKE = Path(__file__).parent / "fake_sglang"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightrft_lightning"


@pytest.fixture(scope="module")
def source():
    """The real package's source, as a function from a file's name to its text."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (wheels := list(CACHE.glob(f"sglang-{VERSION}-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(CACHE)]
        run = subprocess.run([*command, f"sglang=={VERSION}"], capture_output=True, text=True, timeout=250)
        wheels = list(CACHE.glob(f"sglang-{VERSION}-*.whl"))
        if run.returncode or not wheels:
            reason = f"SGLANG'S CALLS ARE NOT CHECKED: its wheel cannot be downloaded: {run.stderr.strip()[-300:]}"
            warnings.warn(reason, stacklevel=1)
            pytest.skip(reason)
    with zipfile.ZipFile(wheels[0]) as wheel:
        yield lambda name: wheel.read(f"sglang/{name}").decode()


class Read(dict):
    """Notes what is looked up."""

    names: ClassVar[set[str]] = set()

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


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
        settings = json.loads(Path(engine._folder.name, "sglang.yaml").read_text())
        for sampling in (
            SamplingParams(n=2, max_new_tokens=4, stop=("3",)),
            SamplingParams(max_new_tokens=4, temperature=0.0),
            SamplingParams(n=2, max_new_tokens=4, top_k=3, top_p=0.9),
        ):
            engine.generate(prompts, sampling)
        picture = Image.new("RGB", (4, 4))
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
    """Names of a class's fields, those of its bases included, and whether each has a default."""
    node, fields = classes[name], {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            fields |= fields_of(classes, base.id)
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            fields[item.target.id] = item.value is not None
    return fields


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
                types[node.target.id] = ast.unparse(node.annotation.slice.elts[0])
    return types


@pytest.fixture(scope="module")
def requests(source):
    return classes_of(source("srt/managers/io_struct.py"))


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
    }  # fmt: skip


def test_settings_are_server_args(said, source):
    settings, types = said[0], server_args_of(source)
    assert len(types) > 300
    assert {"api-key", "load-format", "tp-size", "enable-deterministic-inference"} <= set(settings)
    for name, value in settings.items():
        written = types[name.replace("-", "_")]
        assert type(value).__name__ in written or (isinstance(value, str) and "str" in written), (name, written)
    choices = source("srt/arg_groups/choices.py")
    assert '"dummy"' in choices and '"safetensors"' in choices


def test_the_command_is_sglangs(source):
    main = source("launch_server.py")
    assert 'if __name__ == "__main__":' in main and "prepare_server_args(sys.argv[1:])" in main
    assert '"--config" in argv' in source("srt/server_args.py")


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
            for name in requests
            if name in annotated[0].replace("[", " ").replace(",", " ").replace("]", " ").split()
        ]
        fields = fields_of(requests, name)
        body = call["body"]
        assert set(body) <= set(fields), call["path"]
        assert {field for field, has_default in fields.items() if not has_default} <= set(body) | {"rid"}, call["path"]
        checked.add(name)
    assert len(checked) == 6


def test_sampling_parameters_exist(said, source):
    known = fields_of(classes_of(source("srt/sampling/sampling_params.py")), "SamplingParams")
    seen = set()
    for call in said[1]:
        if call["path"] == "/generate":
            params = call["body"]["sampling_params"]
            for one in params if isinstance(params, list) else [params]:
                assert set(one) <= set(known)
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


def test_what_is_read_about_a_completion_is_written_there(source):
    manager, reasons = source("srt/managers/tokenizer_manager.py"), source("srt/managers/schedule_batch.py")
    for name in ("finish_reason", "weight_version", "output_token_logprobs", "output_token_sampling_logprobs"):
        assert f'meta_info["{name}"]' in manager or f'"{name}": ' in manager, name
    for name in ("output_ids", "meta_info"):
        assert f'"{name}": ' in manager, name
    for kind in ("stop", "length", "abort"):
        assert f'"type": "{kind}"' in reasons, kind
    assert '"matched": self.matched' in reasons and '"message": self.message' in reasons


def test_what_is_read_about_the_server_is_written_there(said, source, routes):
    about = ast.unparse(routes["GET", "/model_info"])
    of_the_model = {name for name in ("weight_version", "has_image_understanding") if f"'{name}': " in about}
    assert len(of_the_model) == 2
    assert {"dtype", "sampling_mask_max_tokens", "disable_radix_cache"} <= Read.names
    assert Read.names - of_the_model <= set(server_args_of(source))
    assert "build_server_info(server_args" in ast.unparse(routes["GET", "/server_info"])


def test_checksums_are_where_they_are_looked_for(said, requests, source, routes):
    answers = [call["answer"] for call in said[1] if call["path"] == "/weights_checker" and "ranks" in call["answer"]]
    assert answers
    for rank in answers[0]["ranks"]:
        assert set(rank) == set(fields_of(requests, "ChecksumInfo"))
        for place in rank["parallelism_info"]:
            assert set(place) == set(fields_of(requests, "ParallelismInfo"))
    assert "body['ranks'] = ranks" in ast.unparse(routes["POST", "/weights_checker"])
    checker = source("srt/utils/weight_checker.py")
    assert 'action == "checksum"' in checker and 'action == "reset_tensors"' in checker
    for path in ("/update_weights_from_disk", "/update_weight_version", "/weights_checker"):
        assert "'success': " in ast.unparse(routes["POST", path]), path


def test_seeds_need_the_option_that_is_set(source):
    """Otherwise they would be dropped without a word."""
    text = source("srt/sampling/sampling_batch_info.py")
    start = text.index("sampling_seed = (")
    assert "if enable_deterministic" in text[start : start + 700]


def test_fused_layers_are_named_as_is_supposed(source):
    for model in ("llama", "qwen2", "qwen3", "gemma3_causal"):
        text = source(f"srt/models/{model}.py")
        assert '"qkv_proj"' in text and '"gate_up_proj"' in text, model

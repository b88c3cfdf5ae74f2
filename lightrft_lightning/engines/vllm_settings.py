"""Arguments of vLLM's engine: what is set here, and what a user may set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightrft_lightning._errors import import_extra, unknown_name

OURS = {
    *("model", "tokenizer", "tensor_parallel_size", "worker_extension_cls", "distributed_executor_backend"),
    "logprobs_mode",
}
"""Engine arguments that follow from the model, the ranks, the weight sync or what a completion is."""

OTHER_PARALLELISM = (
    *("pipeline_parallel_size", "data_parallel_size"),
    *("prefill_context_parallel_size", "decode_context_parallel_size"),
)
"""Engine arguments that would put layers or requests where no weights are sent to."""

GPU_DEFAULTS = {"gpu_memory_utilization": 0.3}
CPU_DEFAULTS = {
    "kv_cache_memory_bytes": 1 << 30,
    "block_size": 32,  # in place of 128: only whole blocks of a prompt are shared by its completions
    "enable_chunked_prefill": False,  # half a prompt, drawn with a seed, raises in vLLM's CPU build
}

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, next to the weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise it would bind the threads that train
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def check_engine_args(given: Mapping[str, Any], more_of_ours: Iterable[str] = ()) -> None:
    """Raise ValueError for an argument that is none of vLLM's, or not the user's to set: `OURS`, or one of more."""
    vllm, ours = import_extra("vllm", "vllm"), OURS.union(more_of_ours)
    known = {field.name for field in dataclasses.fields(vllm.EngineArgs)} - ours
    for name, value in given.items():
        if name in ours:
            raise ValueError(f"engine_args[{name!r}]={value!r}: VLLMRollout sets this itself, leave it out")
        if name not in known:
            raise ValueError(f"engine_args: {unknown_name('argument of vLLM', name, known)}")
        if name in OTHER_PARALLELISM and value not in (None, 1):
            raise ValueError(f"engine_args[{name!r}]={value!r}: must be 1; share an engine by tensor_parallel_size")
        if name == "speculative_config" and value is not None:
            raise ValueError(
                f"engine_args[{name!r}]={value!r}: with it vLLM reports log-probabilities of another distribution than "
                "the tokens are drawn from, leave it out"
            )


def check_start(given: Mapping[str, Any], gpu: bool, empty: bool) -> None:
    """Raise ValueError for an argument that does not go with the machine, or with an engine without weights.

    Args:
        given: the user's engine arguments.
        gpu: whether there is one.
        empty: whether the weights come from a trainer.
    """
    if empty and "load_format" in given:
        raise ValueError(
            f"engine_args['load_format']={given['load_format']!r}: the trainer sends the weights, leave it out"
        )
    if not gpu and given.get("enable_chunked_prefill"):
        raise ValueError(
            f"engine_args['enable_chunked_prefill']={given['enable_chunked_prefill']!r}: vLLM's CPU build cannot draw "
            "with a seed then, leave it out"
        )


@contextmanager
def refusals_in_a_line(given: Mapping[str, Any]) -> Iterator[None]:
    """What vLLM has to say against the user's engine arguments is told in one line, together with them."""
    try:
        yield
    except (TypeError, ValueError) as err:  # it compares some arguments before it looks at their types
        shown = {name: _shown(name, value) for name, value in given.items()}
        told = "; ".join(_told(one) for one in err.errors()) if hasattr(err, "errors") else str(err)
        raise ValueError(f"engine_args={shown!r}: vLLM refuses: {' '.join(told.split())}") from err


def _told(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors."""
    where = ".".join(map(str, error["loc"]))
    if not where:
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{where}={_shown(where, error['input'])!r}: {error['msg']}"


def _shown(name: str, value: Any) -> Any:
    """The value of an argument, unless it may be a secret: ``hf_token``."""
    secret = name.partition(".")[0].endswith(("token", "key", "password", "secret"))
    return "..." if secret and not (value is None or isinstance(value, bool)) else value

"""The engines that ``lightrft serve`` can host, by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from typing_extensions import override

from lightrft_lightning._errors import import_extra, unknown_name
from lightrft_lightning.engines._wire import HOSTED
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.transformers import TransformersRollout
from lightrft_lightning.engines.weight_sync import Bucket, EngineWithCopy, Held, Part, as_matrix, digest, listed
from lightrft_lightning.experience.trajectory import Completion, SamplingParams
from lightrft_lightning.models.layers import decoder_layers
from lightrft_lightning.models.loading import load_config, load_model, load_tokenizer, with_right_kernel
from lightrft_lightning.models.remote_code import code_refused

if TYPE_CHECKING:
    from lightrft_lightning.engines.vllm_hosted import VLLMCopy

HostedEngine: TypeAlias = "TransformersCopy | VLLMCopy"
FLOATS = ("F64", "F32", "F16", "BF16")
"""In safetensors files. Copied into a weight, a bool or a complex number would become some other number."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def create_hosted(name: str, engine_args: Mapping[str, Any], sleep_level: int = 0) -> HostedEngine:
    """An engine that is not started yet.

    Args:
        name: ``vllm`` or ``transformers``.
        engine_args: its arguments; vLLM takes `tensor_parallel_size` as well.
        sleep_level: deepest sleep that clients may ask for.

    Raises:
        ValueError: an unknown engine or argument.
        ImportError: the engine's package is not installed.
    """
    if name == "transformers":
        return TransformersCopy(engine_args, sleep_level=sleep_level)
    if name == "vllm":
        from lightrft_lightning.engines.vllm_hosted import VLLMCopy

        return VLLMCopy(engine_args, sleep_level=sleep_level)
    raise ValueError(unknown_name("engine", name, HOSTED))


def load_bucket(engine: HostedEngine, path: Path) -> None:
    """Put the tensors of a safetensors file in place.

    Raises:
        ValueError: it is no such file, or holds something else than numbers with a fraction.
    """
    try:
        _check_dtypes(path)
        engine.load_file(path)
    except import_extra("safetensors", "hf").SafetensorError as err:
        raise ValueError(f"the weights are no safetensors file: {err}") from err


def _check_dtypes(path: Path) -> None:
    with import_extra("safetensors", "hf").safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            dtype = file.get_slice(name).get_dtype()
            if dtype not in FLOATS:
                raise ValueError(f"{name} has the dtype {dtype}: weights must have one of {', '.join(FLOATS)}")


def vocab_size(folder: str) -> int:
    """Number of token ids of the model in a folder."""
    return int(load_config(folder).get_text_config(decoder=True).vocab_size)


class TransformersCopy(EngineWithCopy):
    """The embedded engine with a model of its own, for a server.

    Args:
        engine_args: ``dtype`` (default ``float32``), ``attn_implementation`` and ``max_batch_size``, see
            `TransformersRollout`.
        settings: see `EngineWithCopy`.

    Raises:
        ValueError: an unknown argument or type.
    """

    knows_files = False
    ARGUMENTS = ("dtype", "attn_implementation", "max_batch_size")

    def __init__(self, engine_args: Mapping[str, Any], **settings: Any) -> None:
        super().__init__(**settings)
        for name in engine_args:
            if name not in self.ARGUMENTS:
                raise ValueError(f"engine_args: {unknown_name('argument', name, self.ARGUMENTS)}")
        dtype = engine_args.get("dtype", "float32")
        if dtype not in DTYPES:
            raise ValueError(f"engine_args: {unknown_name('dtype', dtype, DTYPES)}")
        self.dtype = DTYPES[dtype]
        self._attention = engine_args.get("attn_implementation")
        self._generator = TransformersRollout(engine_args.get("max_batch_size"))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = None
        self._given: set[torch.nn.Parameter] = set()
        """What the update under way has brought."""

    def start(self, folder: str, load_format: str = "auto") -> None:
        """Build the model of a Hugging Face folder.

        Args:
            folder: with a configuration and a tokenizer, and weights unless
            load_format: is ``dummy``.
        """
        assert self.dtype is not None
        if load_format == "dummy":
            self._model = _without_weights(folder, self.dtype, self._attention)
        else:
            self._model = load_model(folder, dtype=self.dtype, attn_implementation=self._attention)
        self._model.to(self._device).requires_grad_(False)
        self.tokenizer = load_tokenizer(folder)
        self._generator.connect(self._model, self.tokenizer)
        self._generator.settle()  # not in the time of the first call
        for module in (self._model, *decoder_layers(self._model)):  # a prompt alone may take long
            module.register_forward_pre_hook(self._check_call)

    def _check_call(self, *_: Any) -> None:
        if self.check_call is not None:
            self.check_call()

    def load_file(self, path: Path) -> None:
        """Put the tensors of a safetensors file in place."""
        self._load(list(import_extra("safetensors.torch", "hf").load_file(path).items()))

    @override
    def connect(self, model: Any, tokenizer: Any) -> None:
        raise EngineError("TransformersCopy has a model of its own: in the training process, use TransformersRollout")

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        return self._generator.generate(prompts, sampling, streams)

    @override
    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, streams: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        return self._generator.stream(prompts, sampling, streams)

    @override
    def sleep(self, level: int = 1) -> None:
        self._model.to("cpu")

    @override
    def wake_up(self) -> None:
        self._model.to(self._device)

    @override
    def close(self) -> None:
        self._model = None
        self._generator.close()

    @override
    def _begin_update(self) -> None:
        self._given = set()

    @override
    def _load(self, bucket: Bucket) -> None:
        parameters = dict(self._parameters())
        for name, tensor in bucket:
            if name not in parameters:
                raise ValueError(f"the server's model: {unknown_name('parameter', name, parameters)}")
            if parameters[name].shape != tensor.shape:
                ours = list(parameters[name].shape)
                raise ValueError(f"{name} has the shape {ours} in the server's model, got {list(tensor.shape)}")
            parameters[name].copy_(tensor)
            self._given.add(parameters[name])

    @override
    def _end_update(self, version: int) -> None:
        lacking = [name for name, parameter in self._parameters() if parameter not in self._given]
        if lacking:
            raise ValueError(f"the update lacks {listed(lacking)}: send every parameter of the model, under any name")

    @override
    def _read_back(self, wanted: Mapping[str, tuple[int, int]], names: Sequence[str] | None) -> Held:
        parameters = dict(self._parameters())
        held = Held()
        for name, (first, step) in wanted.items():
            if name not in parameters:
                held.unreadable.append(name)
                continue
            matrix = as_matrix(parameters[name])
            rows, columns = matrix.shape
            held.parts[name] = [Part((0, rows), (0, columns), digest(matrix[:, first::step]))]
        if names is not None:
            given = {parameters[name] for name in names if name in parameters}
            held.unnamed = [name for name, parameter in parameters.items() if parameter not in given]
        return held

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self._model.named_parameters(remove_duplicate=False)


def _without_weights(folder: str, dtype: torch.dtype, attn_implementation: str | None) -> Any:
    transformers = import_extra("transformers", "hf")
    named = {"dtype": dtype, "attn_implementation": attn_implementation}
    with code_refused(folder):
        config = load_config(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False, **named)
    if (saved := Path(folder, "generation_config.json")).is_file():  # its end-of-sequence tokens
        model.generation_config = transformers.GenerationConfig.from_dict(json.loads(saved.read_text()))
    return with_right_kernel(model, attn_implementation)

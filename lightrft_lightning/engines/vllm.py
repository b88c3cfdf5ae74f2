"""vLLM in the training processes: every rank, or every group of `tensor_parallel_size` ranks, has an engine."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightrft_lightning._errors import import_extra
from lightrft_lightning.engines import vllm_adapter, vllm_requests
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.shared_memory import of_this_run
from lightrft_lightning.engines.vllm_process import ends_if_hung, groups_kept, process_group_kept, quiet, threads_kept
from lightrft_lightning.engines.vllm_settings import (
    CPU_DEFAULTS,
    ENVIRONMENT,
    GPU_DEFAULTS,
    check_engine_args,
    check_start,
    refusals_in_a_line,
)
from lightrft_lightning.engines.weight_sync import (
    Bucket,
    EngineWithCopy,
    Held,
    PolicyWeights,
    Verify,
    WeightMismatchError,
    listed,
    memory_reported,
    merged,
)
from lightrft_lightning.experience.trajectory import Completion, SamplingParams
from lightrft_lightning.models.export import save_without_weights
from lightrft_lightning.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

START = 1800.0
"""Seconds that the engine's start may take at least."""

_running: weakref.WeakSet[VLLMRollout] = weakref.WeakSet()
"""Rollouts with an engine in this process: they share vLLM's process groups, which go with the last of them."""

_Request = tuple[Sequence[int], int, Sequence[Any]]  # token ids, stream, images


class VLLMRollout(EngineWithCopy):
    """Generates with vLLM, in the training processes (`RemoteRollout` has the engine elsewhere).

    The engine starts with empty weights and gets the trainer's before the first rollout, so whatever `RLHFModule` can
    train can be generated with: a folder, a GGUF file, a resumed checkpoint, a LoRA model (sent merged).

    Sequence j of a prompt has a seed of its own, fixed by `sampling.seed`, the prompt's stream and j. The
    log-probabilities are those of the distribution that a token was drawn from (after temperature, top-k and top-p);
    greedy decoding reports the plain softmax.

    Example:
        >>> trainer = Trainer(callbacks=[VLLMRollout(engine_args={"max_model_len": 4096})])  # doctest: +SKIP

    Args:
        engine_args: arguments of `vllm.EngineArgs`, passed on untouched. By default the data type is the trainer's,
            and the engine takes 30 % of a GPU's memory, or 1 GiB for its cache on a CPU.
        tensor_parallel_size: ranks that share an engine; it must divide the number of ranks on a node.
        lora: how a LoRA model's weights are sent: ``merged`` into all others at every update, or the others once and
            then the ``adapter`` alone (a hundredth of the bytes, and a slower engine).
        verify: what is compared after each update, see `EngineWithCopy`.
        bucket_mb: the most MiB of tensors on their way at once in an update.
        sleep_level: 1 or 2: between rollouts the engine gives its GPU memory back (2: the weights as well, instead of
            moving them to the CPU); 0: it stays awake.
        deadline: seconds that one rollout or update may take; a call that hangs in native code ends the process a
            minute later, with a traceback.
        drift_warning: mean difference in nats between the engine's and the trainer's log-probabilities above which a
            warning is logged; None: never.
        drift_limit: the same above which training stops.

    Raises:
        ValueError: an argument is out of range, or is none of vLLM's.
        ImportError: vLLM is not installed.
    """

    max_temperature = 2.0

    def __init__(
        self,
        engine_args: Mapping[str, Any] | None = None,
        tensor_parallel_size: int = 1,
        lora: Literal["merged", "adapter"] = "merged",
        verify: Verify = "sample",
        bucket_mb: int = 256,
        sleep_level: int = 0,
        deadline: float = 1800.0,
        drift_warning: float | None = 0.1,
        drift_limit: float | None = None,
    ) -> None:
        super().__init__(
            verify=verify,
            bucket_mb=bucket_mb,
            sleep_level=sleep_level,
            deadline=deadline,
            drift_warning=drift_warning,
            drift_limit=drift_limit,
        )
        if tensor_parallel_size < 1:
            raise ValueError(f"VLLMRollout(tensor_parallel_size={tensor_parallel_size}): must be at least 1")
        if lora not in ("merged", "adapter"):
            raise ValueError(f"VLLMRollout(lora={lora!r}): must be 'merged' or 'adapter'")
        if lora == "adapter" and tensor_parallel_size > 1:
            raise ValueError(f"VLLMRollout(lora='adapter', tensor_parallel_size={tensor_parallel_size}): use 'merged'")
        self.engine_args = dict(engine_args or {})
        self.tensor_parallel_size = tensor_parallel_size
        self._engine: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.lora = lora
        self._adapter: Any = None
        self._requests = 0
        self._asleep = self._owns_group = False
        self._unusable = ""
        check_engine_args(self.engine_args, vllm_adapter.OURS if lora == "adapter" else ())

    # ---------------------------------------------------------------- life

    @override
    def connect(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if self._engine is not None:
            return
        defaults = vllm_adapter.engine_arguments(model) if self.lora == "adapter" else {}
        self.tokenizer = tokenizer
        self._folder = tempfile.TemporaryDirectory(prefix="lightrft_vllm_")
        save_without_weights(model, tokenizer, self._folder.name)
        dtype = getattr(self.strategy, "compute_dtype", torch.float32)
        self.start(self._folder.name, dtype=str(dtype).removeprefix("torch."), load_format="dummy", **defaults)
        self._unusable = "it has no weights yet"

    def start(self, folder: str, **defaults: Any) -> None:
        """Start vLLM on a Hugging Face folder.

        Args:
            folder: with a configuration and a tokenizer, and weights unless ``load_format="dummy"``.
            defaults: engine arguments that the user's own replace.
        """
        os.environ.update({k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()})
        vllm = import_extra("vllm", "vllm")
        gpu = torch.cuda.is_available()
        check_start(self.engine_args, gpu, empty="load_format" in defaults)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks % self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} must divide the number of ranks, {ranks}"
            )
        arguments = {
            **(GPU_DEFAULTS if gpu else CPU_DEFAULTS),
            "seed": 0,
            "trust_remote_code": False,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "enable_sleep_mode": bool(self.sleep_level) and gpu,
            "tensor_parallel_size": self.tensor_parallel_size,  # a server has as many workers as it is told to
            **defaults,
            **self.engine_args,
            "model": folder,
            "worker_extension_cls": "lightrft_lightning.engines._vllm_worker.WeightSyncWorker",
        }
        if ranks > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
            os.environ.setdefault("RANK", str(dist.get_rank()))  # Lightning's own launcher does not set it
        self._owns_group = not dist.is_initialized()
        engine_args = vllm.EngineArgs(**arguments)
        import_extra("vllm.logger", "vllm").configure_logging_if_needed(engine_args.create_logging_config())
        # It seeds all random generators, and may be started while Lightning evaluates.
        shared = not gpu and self.tensor_parallel_size > 1 and ranks > 1
        memory = of_this_run() if shared else contextlib.nullcontext()
        surroundings = (isolate_rng(), torch.inference_mode(False), threads_kept(), quiet(gpu), memory)
        with contextlib.ExitStack() as stack:
            for context in (
                refusals_in_a_line(self.engine_args),
                ends_if_hung(max(self.deadline, START)),
                *surroundings,
            ):
                stack.enter_context(context)
            self._engine = vllm.LLMEngine.from_engine_args(engine_args)
        _running.add(self)
        self.dtype = self._engine.model_config.dtype
        self.know_tokens(folder, load_tokenizer(folder) if self.tokenizer is None else self.tokenizer)

    @override
    def close(self) -> None:
        if self._engine is None:
            return
        others = [other for other in _running if other is not self and other._engine is not None]
        if others and self._owns_group:
            others[0]._owns_group, self._owns_group = True, False
        with contextlib.ExitStack() as stack:
            stack.enter_context(ends_if_hung(self.deadline))
            if others:
                stack.enter_context(groups_kept())
            elif not self._owns_group:
                stack.enter_context(process_group_kept())
            self._engine.engine_core.shutdown()
            self._engine = self._adapter = None  # its finalizer shuts down once more
        if self._folder is not None:
            self._folder.cleanup()

    # ---------------------------------------------------------------- generation

    @property
    def takes_images(self) -> bool:  # type: ignore[override]
        """Whether the model does."""
        return self._engine is not None and bool(self._engine.model_config.is_multimodal_model)

    @override
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        streams: Sequence[int] | None = None,
        images: Sequence[Sequence[Any]] | None = None,
    ) -> list[list[Completion]]:
        """As in `RolloutEngine`.

        Args:
            prompts: see there; each image of a prompt has one placeholder token in it.
            sampling: see there.
            streams: see there.
            images: for each prompt its images, as PIL images; for models that take them.

        Raises:
            EngineError: it takes longer than `deadline`, or vLLM returns something else than asked for.
            ValueError: a prompt is empty, or too long for the engine together with `max_new_tokens`.
        """
        groups = dict(self.stream(prompts, sampling, streams, images))
        return [groups[i] for i in range(len(prompts))]

    @override
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        streams: Sequence[int] | None = None,
        images: Sequence[Sequence[Any]] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As `generate`, group by group."""
        if self._engine is None:
            raise RuntimeError("VLLMRollout has no engine yet: call connect(model, tokenizer) before generate()")
        if self._unusable:
            raise RuntimeError(f"VLLMRollout: {self._unusable}: call update_weights before generate()")
        self._check(prompts, sampling)
        self._check_idle("generate")
        self.check_ids(prompts, images is not None and any(images))
        seen = [()] * len(prompts) if images is None else images
        mine = list(zip(prompts, range(len(prompts)) if streams is None else streams, seen, strict=True))
        first, everyones = 0, mine
        if self.tensor_parallel_size > 1:  # the ranks of a group run the same requests in step
            group = self._of_group(mine)
            first = sum(map(len, group[: self._place_in_group]))
            everyones = [request for requests in group for request in requests]
        # vLLM draws from the global generator for all rows, and then once more for those that have a seed.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            for i, completions in self._run(everyones, sampling):
                if first <= i < first + len(mine):
                    yield i - first, completions

    @property
    def _place_in_group(self) -> int:
        assert self.strategy is not None
        return self.strategy.global_rank % self.tensor_parallel_size

    def _of_group(self, value: Any) -> list[Any]:
        """The values of the ranks that share this engine."""
        assert self.strategy is not None
        leader = self.strategy.global_rank - self._place_in_group
        return self.strategy.gather_objects(value)[leader : leader + self.tensor_parallel_size]

    def _run(self, requests: Sequence[_Request], sampling: SamplingParams) -> Iterator[tuple[int, list[Completion]]]:
        engine, end = self._engine, time.monotonic() + self.deadline
        open_requests: dict[str, int] = {}
        try:
            with ends_if_hung(self.deadline):
                for i, (prompt, stream, images) in enumerate(requests):
                    self._requests += 1
                    name = str(self._requests)
                    shown = {"multi_modal_data": {"image": list(images)}} if images else {}
                    (rendered,) = engine.renderer.render_cmpl([{"prompt_token_ids": list(prompt), **shown}])
                    engine.add_request(
                        name,
                        rendered,
                        vllm_requests.sampling_params(sampling, stream, self.end_ids),
                        lora_request=self._adapter,
                    )
                    open_requests[name] = i
            while open_requests:
                if self.check_call is not None:
                    self.check_call()
                if time.monotonic() > end:
                    raise EngineError(
                        f"VLLMRollout: {len(open_requests)} of {len(requests)} prompts are not finished after "
                        f"deadline={self.deadline} s"
                    )
                with torch.inference_mode(False), ends_if_hung(end - time.monotonic()):
                    outputs = engine.step()
                for output in outputs:
                    if output.finished:
                        yield open_requests.pop(output.request_id), vllm_requests.completions(output, sampling)
        finally:
            if open_requests:
                with ends_if_hung(self.deadline):
                    engine.abort_request(list(open_requests))

    def _check_idle(self, call: str) -> None:
        """Refuse a call between the groups of a stream: that would go on with other weights, and be mixed up."""
        if self._engine is not None and self._engine.has_unfinished_requests():
            raise RuntimeError(
                f"VLLMRollout.{call}: a stream() of this engine is not finished: go through it, or close() it, first"
            )

    def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        if 0 < sampling.temperature < 0.01:
            raise ValueError(f"temperature={sampling.temperature}: vLLM would draw at 0.01; use 0 (greedy), or 0.01")
        if sampling.temperature > self.max_temperature:
            raise ValueError(f"temperature={sampling.temperature}: vLLM takes at most {self.max_temperature:g}")
        limit = self._engine.model_config.max_model_len
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} is empty: it needs at least one token")
            if len(prompt) + sampling.max_new_tokens > limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, with max_new_tokens={sampling.max_new_tokens} that is more "
                    f"than the engine's max_model_len={limit}: shorten them, or raise engine_args['max_model_len']"
                )

    # ---------------------------------------------------------------- weights

    @override
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As in `EngineWithCopy`; with ``lora="adapter"`` the weights must be `PolicyWeights`."""
        self._check_idle("update_weights")
        if self.lora == "adapter" and not isinstance(named_tensors, PolicyWeights):
            raise TypeError(f"lora='adapter' needs PolicyWeights(strategy, model), got {type(named_tensors).__name__}")
        self._unusable = "the last update of its weights failed"
        if self.lora == "adapter" and isinstance(named_tensors, PolicyWeights):
            self._update_adapter(named_tensors, version)
        else:
            super().update_weights(named_tensors, version)
        self._unusable = ""

    def _update_adapter(self, named_tensors: PolicyWeights, version: int) -> None:
        if self._adapter is None:
            base = PolicyWeights(named_tensors.strategy, named_tensors.model, adapter=False)
            super().update_weights(base, version)
        self._set_adapter(named_tensors, version)
        self.version = version

    def _set_adapter(self, weights: PolicyWeights, version: int) -> None:
        from vllm.lora.request import LoRARequest

        tensors = weights.adapter()
        before, number = self._adapter, 1 if self._adapter is None else self._adapter.lora_int_id + 1
        with tempfile.TemporaryDirectory(prefix="lightrft_adapter_") as folder:
            vllm_adapter.save(weights.model, tensors, folder)
            self._adapter = LoRARequest(f"policy-{version}", number, folder)
            with ends_if_hung(self.deadline), torch.inference_mode(False), torch.no_grad():
                if before is not None:
                    self._engine.remove_lora(before.lora_int_id)
                self._engine.add_lora(self._adapter)
        self._forget_prefixes()
        if self.verify != "off":
            self._compare_adapter(weights.model, tensors, version)

    def _compare_adapter(self, model: Any, tensors: Mapping[str, Tensor], version: int) -> None:
        assert self.dtype is not None
        expected, ranks = vllm_adapter.expected(model, tensors, self.dtype)
        (held,) = self._call("lightrft_read_adapter", self._adapter.lora_int_id, ranks)
        if wrong := [n for n, value in expected.items() if held.get(n) != value]:
            raise WeightMismatchError(
                f"VLLMRollout: after the update to version {version} the engine does not hold the trainer's "
                f"{listed(wrong)}"
            )

    @override
    def _begin_update(self) -> None:
        self._call("lightrft_begin_update")

    @override
    def _load(self, bucket: Bucket) -> None:
        self._call("lightrft_load", bucket)

    @override
    def _end_update(self, version: int) -> None:
        self._call("lightrft_end_update")
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        with ends_if_hung(self.deadline):
            if not self._engine.reset_prefix_cache():
                raise EngineError("VLLMRollout: vLLM keeps what it has computed of prompts with the weights before")

    @override
    def _read_back(self, wanted: Mapping[str, tuple[int, int]], names: Sequence[str] | None) -> Held:
        held = merged(self._call("lightrft_read_back", wanted, names))
        return merged(self._of_group(held)) if self.tensor_parallel_size > 1 else held

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of `WeightSyncWorker` in every worker of this process."""
        if self._engine is None:
            raise RuntimeError("VLLMRollout has no engine yet: call connect(model, tokenizer) first")
        with ends_if_hung(self.deadline):
            results: list[Any] = self._engine.collective_rpc(method, args=args)
        return results

    # ---------------------------------------------------------------- memory

    @override
    def sleep(self, level: int = 1) -> None:
        if self._engine is not None and not self._asleep and torch.cuda.is_available():
            self._check_idle("sleep")
            with memory_reported(f"VLLMRollout.sleep({level})"), ends_if_hung(self.deadline):
                self._engine.sleep(level)
            self._asleep = True

    @override
    def wake_up(self) -> None:
        if self._engine is not None and self._asleep:
            with memory_reported("VLLMRollout.wake_up()"), ends_if_hung(self.deadline):
                self._engine.wake_up()
            self._asleep = False

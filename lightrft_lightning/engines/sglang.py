"""SGLang, as a server process of its own: one that is started here, or one that runs already."""

from __future__ import annotations

import importlib.util
import logging
import math
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightrft_lightning._errors import import_extra
from lightrft_lightning._seeds import derive_seed
from lightrft_lightning.engines._client import Hanging, Refusal, ServerFault, Unreachable, Unsure
from lightrft_lightning.engines._served import START, Request, ServedRollout
from lightrft_lightning.engines._wire import shortened
from lightrft_lightning.engines.base import EngineError
from lightrft_lightning.engines.expected_tensors import ExpectedTensors, expected_tensors
from lightrft_lightning.engines.sglang_checksums import Changes, Digests, Sums, fingerprints, parse_sums, skipped
from lightrft_lightning.engines.sglang_client import SGLangClient, encoded
from lightrft_lightning.engines.sglang_process import DEFAULTS, OURS, SGLangProcess, free_port
from lightrft_lightning.engines.weight_sync import (
    Bucket,
    Expected,
    Held,
    WeightMismatchError,
    folder_in_memory,
    listed,
)
from lightrft_lightning.experience.trajectory import Completion, FinishReason, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
KNOWN = ("has_image_understanding", "sampling_mask_max_tokens", "disable_radix_cache", "dp_size", "tp_size")
"""What is kept of what the server tells about itself: its key is among it."""
CHECKSUM = {"action": "checksum", "selector": "target"}
ASLEEP = "/asleep"
"""Behind the name of weights: a trainer that finds it there must wake the server, which cannot be asked."""
FLUSH = 60.0
"""Seconds that the server may wait for other clients' requests before it empties its cache."""


class SGLangRollout(ServedRollout):
    """Generates with SGLang, which runs as a server in a process of its own and is spoken to over HTTP.

    Without `url`, rank 0 starts SGLang on its node's GPUs: `tensor_parallel_size` of them for each replica, as many
    replicas as there are training processes for. It starts with empty weights and gets the trainer's before the first
    rollout. SGLang is not imported in the training process, where it would change transformers.

    Sequence j of a prompt has a seed of its own, fixed by `sampling.seed`, the prompt's stream and j (SGLang looks at
    seeds only with ``enable_deterministic_inference``, which is on by default here). The log-probabilities are those of
    the distribution that a token was drawn from, after temperature and top-k; `top_p` below 1 needs a `top_k`, because
    SGLang can tell the mass of a nucleus only then. Greedy decoding reports the plain softmax.

    Weights go through a folder that trainer and server both see, a bucket at a time. SGLang shows checksums of its own
    layout instead of values, so it is verified in two ways: after the first update its weights are overwritten with
    random numbers and everything is sent once more, which must give the same checksums, so nothing that it computes
    with is left out; after each further update exactly those checksums must have changed whose tensors did.
    ``verify="all"`` does the former every time. Every completion must name the weights that were sent last.

    After a fault: as in `RemoteRollout`.

    Example:
        >>> trainer = Trainer(callbacks=[SGLangRollout({"context_length": 4096})])  # doctest: +SKIP

    Args:
        engine_args: arguments of SGLang's server by the names of `sglang.ServerArgs`, passed on untouched; a wrong one
            is refused by SGLang, before it loads anything. By default the data type is the trainer's and SGLang takes
            30 % of a GPU's memory.
        tensor_parallel_size: GPUs that share a replica.
        url: of a server that runs already, started with ``--api-key`` and ``--dtype``.
        key: the server's; default: the environment variable ``LIGHTRFT_KEY``, or a new one for a server of its own.
        port: that a server of its own listens on; 0: a free one.
        log_file: gets the output of a server of its own.
        exchange: folder for the weights; default: a new one in memory. A server on another machine needs one on a
            common file system.
        retries: how often a call is repeated.
        settings: see `EngineWithCopy`. `deadline` is for each HTTP call as a whole; a server of its own has at least
            five minutes to start. For a `sleep_level` above 0, a server that runs already must have been started with
            ``--enable-memory-saver``, for 1 with ``--enable-weights-cpu-backup`` as well.

    Raises:
        ValueError: an argument is out of range, or does not go with the others.
        ImportError: SGLang is not installed, and there is no `url`.
    """

    def __init__(
        self,
        engine_args: Mapping[str, Any] | None = None,
        tensor_parallel_size: int = 1,
        url: str | None = None,
        key: str | None = None,
        port: int = 0,
        log_file: str | Path | None = None,
        exchange: str | Path | None = None,
        retries: int = 3,
        **settings: Any,
    ) -> None:
        super().__init__(url, key, "sglang", engine_args, port, log_file, retries, **settings)
        if tensor_parallel_size < 1:
            raise ValueError(f"SGLangRollout(tensor_parallel_size={tensor_parallel_size}): must be at least 1")
        if exchange is not None and not Path(exchange).is_dir():
            raise ValueError(f"SGLangRollout(exchange={str(exchange)!r}): there is no such folder")
        for name, value in self.engine_args.items():
            if name.replace("-", "_") in OURS:
                raise ValueError(f"engine_args[{name!r}]={value!r}: SGLangRollout sets this itself, leave it out")
        if url is None and importlib.util.find_spec("sglang") is None:
            import_extra("sglang", "sglang")
        self.tensor_parallel_size, self.exchange = tensor_parallel_size, exchange
        self._info: dict[str, Any] = {}
        self._digests: dict[str, Digests] = {}  # of the tensors of this update
        self._before: tuple[dict[str, Digests], Sums] | None = None  # digests and checksums of the last one
        self._changes: Changes | None = None  # from that one to this one
        self._expected: ExpectedTensors | None = None

    # ---------------------------------------------------------------- life

    @override
    def connect(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().connect(model, tokenizer)
        self._expected = expected_tensors(model, self.knows_files)
        self.takes_images = self._on_rank_0(lambda: bool(self._info.get("has_image_understanding")))

    @override
    def _reach(self) -> str | None:
        url, patience = self.url, self.deadline if self.url is not None else max(START, self.deadline)
        end, server = time.monotonic() + patience, None
        if url is None:
            assert self._folder is not None
            port = self.port or free_port()
            server = SGLangProcess(self._arguments(port), self._folder.name, self._key, self.log_file)
            self._server, url = server, f"http://127.0.0.1:{port}"
        self._client = client = SGLangClient(url, self._key)
        self._wait_until_ready(server, end)
        end = min(end, time.monotonic() + self.deadline)
        info = client.call("GET", "/server_info", None, end - time.monotonic())
        model = client.call("GET", "/model_info", None, end - time.monotonic())
        self._check_server(url, info)
        self._info = {name: value for name, value in {**model, **info}.items() if name in KNOWN}
        self._before, self._server_sleeps = None, False
        self._held = str(model.get("weight_version"))
        self._wake()  # a trainer before may have left it asleep
        return str(info["dtype"])

    def _wait_until_ready(self, server: SGLangProcess | None, end: float) -> None:
        client, noted = self._of_rank_0(), server is None
        while True:
            try:
                client.text("GET", "/ready", None, end - time.monotonic())
                break
            except Unreachable as err:
                if server is None:
                    raise
                if not server.alive(0.2):
                    raise Unreachable(f"the server ended at its start with exit code {server.exit_code()}") from err
                if isinstance(err, Hanging) or time.monotonic() > end:
                    raise Hanging("the server did not start in time") from err
                noted = noted or server.note_files()
        if server is not None:
            server.note_files()  # all of them

    def _check_server(self, url: str, info: Mapping[str, Any]) -> None:
        wanted = {1: ("enable_memory_saver", "enable_weights_cpu_backup"), 2: ("enable_memory_saver",)}
        missing = [f"--{n.replace('_', '-')}" for n in wanted.get(self.sleep_level, ()) if not info.get(n)]
        if missing:
            raise EngineError(f"{url}: for sleep_level={self.sleep_level}, start SGLang with {' '.join(missing)}")
        if info.get("dtype") not in DTYPES:
            raise EngineError(
                f"{url}: its data type is {info.get('dtype')!r}: start SGLang with --dtype and one of "
                f"{', '.join(DTYPES)}, so that weights can be sent and verified in it"
            )
        if int(info.get("pp_size") or 1) > 1:
            raise EngineError(
                f"{url}: pp_size={info['pp_size']}: processes of later stages do not say what they hold: start SGLang "
                "with --tp-size or --dp-size alone"
            )
        if not info.get("enable_deterministic_inference"):
            log.warning(
                "SGLangRollout: %s runs without --enable-deterministic-inference, so seeds have no effect: a run "
                "that is resumed draws other completions",
                url,
            )

    def _arguments(self, port: int) -> dict[str, Any]:
        """Of a server of its own."""
        assert self._folder is not None
        ranks = min(self._ranks()[1], max(1, torch.cuda.device_count()))
        return {
            "dtype": str(getattr(self.strategy, "compute_dtype", torch.float32)).removeprefix("torch."),
            "dp_size": max(1, ranks // self.tensor_parallel_size),
            **DEFAULTS,
            **{name.replace("-", "_"): value for name, value in self.engine_args.items()},
            "model_path": self._folder.name,
            "load_format": "dummy",
            "tp_size": self.tensor_parallel_size,
            "host": "127.0.0.1",
            "port": port,
            "enable_memory_saver": self.sleep_level > 0,
            "enable_weights_cpu_backup": self.sleep_level == 1,
        }

    # ---------------------------------------------------------------- generation

    @override
    def _ask(
        self, wanted: Mapping[int, Request], sampling: SamplingParams, end: float
    ) -> Iterator[tuple[int, list[Completion]]]:
        self._check_sampling(sampling)
        client = self._of_rank_0()
        bodies = {i: self._bodies(request, sampling) for i, request in wanted.items()}
        with closing(client.groups(bodies, end - time.monotonic())) as answers:
            for i, answer in answers:
                try:
                    yield i, self._completions(answer, sampling)
                except (AttributeError, IndexError, KeyError, TypeError, ValueError) as err:
                    raise EngineError(
                        f"{client.url}: POST /generate: malformed answer {shortened(answer)} ({err!r})"
                    ) from err

    def _check_sampling(self, sampling: SamplingParams) -> None:
        most = int(self._info.get("sampling_mask_max_tokens") or 0)
        if sampling.temperature and sampling.top_p < 1 and not sampling.top_k:
            raise ValueError(
                f"top_p={sampling.top_p}: SGLang tells log-probabilities under top-p only if top_k is set as well "
                f"(at most {most})"
            )
        if sampling.temperature and sampling.top_k > most:
            raise ValueError(
                f"top_k={sampling.top_k}: SGLang tells log-probabilities under top-k up to {most}; raise it with "
                "engine_args={'sampling_mask_max_tokens': ...}"
            )

    def _bodies(self, request: Request, sampling: SamplingParams) -> list[dict[str, Any]]:
        """What to send for a prompt, one after the other."""
        prompt, stream, images = request
        ids = list(map(int, prompt))
        greedy = sampling.temperature == 0
        wanted = 1 if greedy else sampling.n  # greedy completions are all the same
        seed = derive_seed(sampling.seed, stream)
        common = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if greedy else sampling.top_p,
            "top_k": -1 if greedy else sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(self.end_ids),
            "no_stop_trim": True,
        }
        body: dict[str, Any] = {
            "input_ids": [ids] * wanted,
            # With n > 1 in one request, SGLang would draw all of them with the same seed.
            "sampling_params": [{**common, "sampling_seed": (seed + j) % (1 << 63)} for j in range(wanted)],
            "return_logprob": True,
        }
        if sampling.top_k and not greedy:
            body["return_sampling_mask"] = True
        if images:
            body["image_data"] = [[encoded(image) for image in images]] * wanted
        if wanted == 1 or self._info.get("disable_radix_cache"):
            return [body]
        # The prompt alone first, as SGLang does for n > 1: the completions then find it in the cache.
        first = {**body, "input_ids": ids, "sampling_params": {**common, "max_new_tokens": 0}, "return_logprob": False}
        first.pop("return_sampling_mask", None)
        if images:
            first["image_data"] = body["image_data"][0]
        return [first, body]

    def _completions(self, answer: Any, sampling: SamplingParams) -> list[Completion]:
        wanted = sampling.n if sampling.temperature else 1
        if not isinstance(answer, list) or len(answer) != wanted:
            found = len(answer) if isinstance(answer, list) else shortened(answer)
            raise EngineError(f"asked for {wanted} completions, SGLang returned {found}")
        return [self._completion(sample, sampling) for sample in answer] * (sampling.n // wanted)

    def _completion(self, sample: Mapping[str, Any], sampling: SamplingParams) -> Completion:
        about = sample["meta_info"]
        ended = about["finish_reason"]
        if ended["type"] not in ("stop", "length"):
            raise EngineError(f"SGLang ended a completion with {ended['type']!r}: {ended.get('message')}")
        if isinstance(ended.get("matched"), str) and ended["matched"] not in sampling.stop:
            raise EngineError(f"SGLang ended a completion with {ended['matched']!r}")  # e.g. "NaN happened"
        if self._sent is not None and about["weight_version"] != self._sent:
            raise EngineError(
                f"SGLang answered with the weights {about['weight_version']!r}, not with {self._sent!r}, which it got "
                "last: does another trainer use this server?"
            )
        ids, given = [int(token) for token in sample["output_ids"]], about["output_token_logprobs"]
        if not 0 < len(ids) <= sampling.max_new_tokens or [int(token) for _, token, *_ in given] != ids:
            raise ValueError(f"{len(ids)} token ids and {len(given)} log-probabilities")
        if sampling.top_k and sampling.temperature:
            logprobs = [float(value) for value in about["output_token_sampling_logprobs"]]
        else:
            logprobs = [float(value) for value, *_ in given]
        if len(logprobs) != len(ids) or not all(map(math.isfinite, logprobs)):
            raise ValueError(f"log-probabilities {shortened(logprobs)}")
        reason: FinishReason = "length" if ended["type"] == "length" else "eos"
        return Completion(tuple(ids), tuple(logprobs), "stop" if isinstance(ended.get("matched"), str) else reason)

    # ---------------------------------------------------------------- weights

    @override
    def _begin_update(self) -> None:
        self._on_rank_0(self._start)

    def _start(self) -> None:
        # After an attempt that failed half way, or when the weights are lost, nobody knows what has changed.
        self._digests, before, self._before = {}, self._before, None
        known = before is not None and self.verify == "sample" and not self._weights_are_lost()
        self._changes = Changes(*before) if before is not None and known else None
        self._name_weights(f"incomplete-{secrets.token_hex(8)}")

    def _name_weights(self, name: str) -> None:
        self._held = None  # nobody knows before it is answered
        self._post("/update_weight_version", {"new_version": name, "abort_all_requests": False})
        self._held = name

    @override
    def _load(self, bucket: Bucket) -> None:
        self._on_rank_0(partial(self._write, dict(bucket)))

    @override
    def _checked(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        return named_tensors if self._expected is None else self._expected.checked(named_tensors)

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        digests = self._fingerprints(tensors) if self.verify == "sample" else {}
        self._digests |= digests
        if self._changes is None:
            return self._hand_over(tensors)
        for wave in self._changes.waves(tensors):
            self._hand_over(wave)
            fused = self._changes.fused(wave)
            sums = self._checksums(fused) if fused else {}
            self._changes.sent({name: digests[name] for name in wave}, sums)

    def _fingerprints(self, tensors: Mapping[str, Tensor]) -> dict[str, Digests]:
        ranks = self._processes()
        return {name: fingerprints(tensor, ranks, self.vocabulary_size) for name, tensor in tensors.items()}

    def _processes(self) -> int:
        """Of a replica."""
        return int(self._info.get("tp_size") or 1)

    def _hand_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Have SGLang load a folder that looks like a checkpoint with these tensors."""
        needed = sum(tensor.nbytes for tensor in tensors.values())
        folder = folder_in_memory("lightrft_sglang_", 2 * needed) if self.exchange is None else self._new_folder()
        try:
            safetensors = import_extra("safetensors.torch", "hf")
            safetensors.save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
            body = {"model_path": str(folder), "load_format": "safetensors", "flush_cache": False}
            self._post("/update_weights_from_disk", body)
            if self._processes() > 1:  # the first one has answered, others may still have to read
                self._post("/weights_checker", {**CHECKSUM, "skip_tensor_list": [""]})  # which waits for all
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="lightrft_sglang_", dir=self.exchange))

    @override
    def _end_update(self, version: int) -> None:
        self._sent = self._on_rank_0(partial(self._finish, version))

    def _finish(self, version: int) -> str:
        self._of_rank_0().text("POST", f"/flush_cache?timeout={FLUSH}", None, self.deadline)
        self._name_weights(f"lightrft-{version}-{secrets.token_hex(8)}")
        assert self._held is not None
        return self._held

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._of_rank_0().call("POST", path, body, self.deadline)
        if answer.get("success") is not True:
            raise EngineError(f"{self._of_rank_0().url}: POST {path}: {answer.get('message', shortened(answer))}")
        return answer

    # ---------------------------------------------------------------- verification

    @override
    def _compare(self, expected: Expected, names: Sequence[str] | None = None) -> None:
        if self._on_rank_0(lambda: self._changes is not None):
            self._refuse(self._on_rank_0(self._lost), expected.version)
        elif self._source is None:
            log.warning("SGLangRollout: weights from an iterator cannot be sent twice, so they are not verified")
        else:
            self._compare_all(self._source, expected.version)
        if self._source is not None:
            self._on_rank_0(self._remember)

    def _remember(self) -> None:
        self._before = self._digests, self._checksums()

    def _lost(self) -> list[str]:
        """What does not hold what was sent in this update."""
        assert self._changes is not None
        self._changes.finish(self._digests, self._checksums())
        return sorted(self._changes.wrong)

    @override
    def _compare_all(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        before = self._on_rank_0(self._checksums)
        self._begin_update()
        reset = {"action": "reset_tensors", "selector": "target"}
        self._on_rank_0(partial(self._post, "/weights_checker", reset))
        for bucket in self._buckets(named_tensors):
            self._load(bucket)
        self._end_update(version)
        after = self._on_rank_0(self._checksums)
        self._refuse(sorted({at[2] for at in before if after.get(at) != before[at]}), version)

    def _refuse(self, wrong: Sequence[str], version: int) -> None:
        if wrong:
            self._held = self._before = None  # so that all are sent again before anything is generated
            raise WeightMismatchError(
                f"SGLangRollout: after the update to version {version} the engine does not hold the trainer's weights "
                f"in its {listed(wrong)}"
            )

    def _checksums(self, wanted: Collection[str] | None = None) -> Sums:
        """Of all tensors, or at least of the wanted ones."""
        body: dict[str, Any] = dict(CHECKSUM)
        if wanted is not None:
            assert self._changes is not None
            body["skip_tensor_list"] = skipped(wanted, self._changes.names)
        answer = self._post("/weights_checker", body)
        try:
            return parse_sums(answer["ranks"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as err:
            url = self._of_rank_0().url
            raise EngineError(f"{url}: POST /weights_checker: malformed answer {shortened(answer)}") from err

    @override
    def _read_back(self, wanted: Mapping[str, tuple[int, int]], names: Sequence[str] | None) -> Held | None:
        raise NotImplementedError("SGLang shows checksums only, see _compare")

    # ---------------------------------------------------------------- memory

    @override
    def _send_to_sleep(self, level: int) -> None:
        """SGLang ends if it is busy then, or is told so twice: what runs ends first, and what comes later waits."""
        client, held = self._of_rank_0(), self._named()
        if held.endswith(ASLEEP):
            raise EngineError(f"{client.url}: another client has put this server to sleep")
        try:
            client.text("POST", f"/flush_cache?timeout={min(FLUSH, self.deadline / 2):g}", None, self.deadline)
        except Refusal as err:
            raise EngineError(f"{err}. Other clients use this server: set sleep_level=0, or have one alone") from err
        with self._once():
            self._text("/pause_generation", {"mode": "retract"})
            self._text("/release_memory_occupation", {})
            # On level 2, the weights are not kept, and sent again before anything is generated.
            self._name_weights((held if level == 1 else f"lost-{secrets.token_hex(8)}") + ASLEEP)

    @override
    def _wake(self) -> None:
        held = self._named()
        if held.endswith(ASLEEP):  # otherwise it was started again, by somebody else
            with self._once():
                self._text("/resume_memory_occupation", {})
                self._text("/continue_generation", {})
                self._name_weights(held.removesuffix(ASLEEP))
        else:
            self._held = held

    def _named(self) -> str:
        """The name of the server's weights."""
        return str(self._of_rank_0().call("GET", "/model_info", None, self.deadline).get("weight_version"))

    def _text(self, path: str, body: dict[str, Any]) -> None:
        self._of_rank_0().text("POST", path, body, self.deadline)

    @contextmanager
    def _once(self) -> Iterator[None]:
        """Calls that end SGLang if they come twice: they are not repeated unless the server is a new one."""
        try:
            yield
        except (Unreachable, ServerFault) as err:
            if self.url is None:
                raise Unsure(str(err)) from err
            raise EngineError(f"{err}. Nobody knows whether the server sleeps now: start it again") from err

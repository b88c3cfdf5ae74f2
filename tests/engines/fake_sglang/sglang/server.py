"""A server with the routes, answers and errors of SGLang 0.5.23, and a small transformers model behind them.

As there: the checkpoint's q, k and v come together in one tensor, gate and up in another, a tied head is no tensor of
its own, unknown tensors are skipped without a word, only full checksums can be had. What it is asked is written down
(`FAKE_SGLANG_RECORD`), to be compared with the real SGLang's signatures. ``POST /fault`` makes it misbehave.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
NO_MASK = (
    "return_sampling_mask requires top_k=1 for greedy sampling or finite 1 < top_k <= {0}; got top_k={1}. Lower top_k "
    "or increase --sampling-mask-max-tokens."
)
TOO_LONG = (
    "Requested token count exceeds the model's maximum context length of {0} tokens. You requested a total of {1} "
    "tokens: {2} tokens from the input messages and {3} tokens for the completion. Please reduce the number of tokens "
    "in the input messages or the completion to fit within the limit."
)
WHEN_BUSY = "(When there are running or waiting requests, the operation will not be performed.)\n"


class Fault(Exception):
    """An answer with this status and message."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status, self.message = status, message


class Server:
    def __init__(self, settings):
        self.settings, self.faults, self.version, self.asleep = settings, {}, "default", False
        config = AutoConfig.from_pretrained(settings["model-path"])
        self.config, self.tokenizer = config, AutoTokenizer.from_pretrained(settings["model-path"])
        if settings["load-format"] == "dummy":
            torch.manual_seed(settings["random-seed"] or 0)
            self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings["dtype"]))
        else:
            self.model = AutoModelForCausalLM.from_pretrained(settings["model-path"], dtype="auto")
        self.model.requires_grad_(False)
        self.cached = []
        self.record = os.environ.get("FAKE_SGLANG_RECORD")

    def app(self):
        post = {
            "/generate": self.generate, "/update_weights_from_disk": self.update, "/flush_cache": self.flush,
            "/update_weight_version": self.rename, "/weights_checker": self.check,
            "/release_memory_occupation": self.release, "/resume_memory_occupation": self.resume,
            "/pause_generation": self.pause, "/continue_generation": self.go_on,
        }  # fmt: skip
        get = {"/ready": self.ready, "/server_info": self.server_info, "/model_info": self.model_info}
        routes = [Route(path, self.guarded(handler), methods=["POST"]) for path, handler in post.items()]
        routes += [Route(path, self.guarded(handler), methods=["GET"]) for path, handler in get.items()]
        routes.append(Route("/fault", self.fault, methods=["POST"]))
        return Starlette(routes=routes, exception_handlers={404: lambda *_: JSONResponse({"detail": "Not Found"}, 404)})

    def guarded(self, handler):
        async def handle(request: Request):
            path = request.url.path
            if path != "/ready" and request.headers.get("authorization") != f"Bearer {self.settings['api-key']}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            text = await request.body()
            body = json.loads(text) if text else None
            kind = self.fault_for(path)
            if kind == "hang":
                await asyncio.sleep(3600)
            if kind == "die":
                os._exit(9)
            if kind == "500":
                return PlainTextResponse("Internal Server Error", 500)
            if kind == "503":
                return Response(status_code=503)
            if kind == "malformed":
                return PlainTextResponse("<html>")
            try:
                answer = handler(body or {}, request.query_params, kind)
            except Fault as err:
                return JSONResponse({"error": {"message": err.message}}, err.status)
            if kind == "lost":
                return Response(headers={"content-length": "5"})  # done, but the connection breaks off
            if self.record:
                entry = {"method": request.method, "path": path, "query": dict(request.query_params), "body": body}
                entry["answer"] = None if isinstance(answer, Response) else answer
                with Path(self.record).open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            return answer if isinstance(answer, Response) else JSONResponse(answer)

        return handle

    def fault_for(self, path):
        kind, times = self.faults.get(path, (None, 0))
        if times:
            self.faults[path] = (kind, times - 1)
            return kind
        return None

    async def fault(self, request: Request):
        wanted = await request.json()
        self.faults[wanted["path"]] = (wanted["kind"], wanted.get("times", 1))
        return JSONResponse({})

    # ---------------------------------------------------------------- about

    def ready(self, body, query, kind):
        return Response(status_code=200)

    def server_info(self, body, query, kind):
        return {name.replace("-", "_"): value for name, value in self.settings.items()} | {"version": "0.5.23"}

    def model_info(self, body, query, kind):
        return {"weight_version": self.version, "has_image_understanding": False, "model_path": "..."}

    # ---------------------------------------------------------------- generation

    def generate(self, body, query, kind):
        ids, params = body["input_ids"], body["sampling_params"]
        if isinstance(ids[0], int):
            self.cached.append(tuple(ids))
            return self.one(ids, params, body)
        samples = [self.one(i, p, body) for i, p in zip(ids, params, strict=True)]
        if kind == "too few":
            samples.pop()
        if kind == "nan":
            samples[0]["meta_info"]["output_token_logprobs"][0][0] = None
        if kind == "nan stop":
            samples[0]["meta_info"]["finish_reason"] = {"type": "stop", "matched": "NaN happened"}
        if kind == "abort":
            samples[0]["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory"}
        if kind == "short logprobs":
            samples[0]["meta_info"]["output_token_logprobs"].pop()
        return samples

    def one(self, ids, params, body):
        limit, most = self.settings["context-length"], self.settings["sampling-mask-max-tokens"]
        masked, total = body.get("return_sampling_mask"), len(ids) + params["max_new_tokens"]
        greedy = params["temperature"] < 1e-6
        if masked and not greedy and not 1 <= params["top_k"] <= most:
            raise Fault(400, NO_MASK.format(most, params["top_k"] if params["top_k"] > 0 else 1 << 30))
        if total > limit:
            raise Fault(400, TOO_LONG.format(limit, total, len(ids), params["max_new_tokens"]))
        if not ids or any(not 0 <= token < self.config.vocab_size for token in ids):
            os._exit(9)  # its scheduler fails, and it ends itself
        temperature = 1.0 if greedy else params["temperature"]
        seed = params.get("sampling_seed", 42) if self.settings["enable-deterministic-inference"] else None
        drawn, behind, logprobs, chosen, ended = (
            list(ids),
            [],
            [],
            [],
            {"type": "length", "length": params["max_new_tokens"]},
        )
        while len(behind) < params["max_new_tokens"]:
            logits = self.model(torch.tensor([drawn])).logits[0, -1].float() / temperature
            whole = logits.log_softmax(-1)
            support = whole.clone()
            if greedy:
                support = torch.full_like(whole, -math.inf).scatter(0, whole.argmax()[None], 0.0)
            elif params["top_k"] > 0:
                kept = whole.topk(min(params["top_k"], len(whole)))
                mass = kept.values.exp()  # of the whole distribution
                inside = mass.cumsum(-1) - mass <= params["top_p"]
                support = torch.full_like(whole, -math.inf).scatter(0, kept.indices[inside], kept.values[inside])
            support = support.log_softmax(-1)
            number = int.from_bytes(hashlib.sha256(f"{seed} {len(drawn)}".encode()).digest()[:7], "big")
            generator = torch.Generator().manual_seed(number) if seed is not None else None
            token = int(torch.multinomial(support.exp(), 1, generator=generator))
            drawn.append(token)
            behind.append(token)
            logprobs.append([float(whole[token]), token, None])
            chosen.append(float(support[token]))
            if token == self.config.eos_token_id or token in (params.get("stop_token_ids") or []):
                ended = {"type": "stop", "matched": token}
                break
            text = self.tokenizer.decode(behind)
            if found := [stop for stop in params.get("stop") or [] if stop in text]:
                ended = {"type": "stop", "matched": found[0]}
                break
        text = self.tokenizer.decode(behind, skip_special_tokens=True)
        if isinstance(ended.get("matched"), str) and not params.get("no_stop_trim"):
            text = text[: text.index(ended["matched"])]
        about = {"id": "x", "finish_reason": ended, "prompt_tokens": len(ids), "completion_tokens": len(behind)}
        about |= {"weight_version": self.version, "cached_tokens": 0}
        if body.get("return_logprob"):
            about["output_token_logprobs"] = logprobs
        if masked:
            about["output_token_sampling_logprobs"] = chosen
        return {"text": text, "output_ids": behind, "meta_info": about}

    # ---------------------------------------------------------------- weights

    def update(self, body, query, kind):
        if kind == "refuse":
            return JSONResponse({"success": False, "message": "Failed to update weights: no room"}, 400)
        if body["load_format"] not in ("auto", "safetensors"):
            return JSONResponse({"success": False, "message": "Failed to get model loader: DummyModelLoader"}, 400)
        folder = Path(body["model_path"])
        if not (files := sorted(folder.glob("*.safetensors"))):
            cause = (
                f"Cannot find any model weights with `{folder}`"
                if folder.is_dir()
                else f"Invalid HF URI 'hf://{folder}'"
            )
            return JSONResponse({"success": False, "message": f"Failed to get weights iterator: {cause}."}, 400)
        parameters = dict(self.model.named_parameters())  # a tied head has no name here
        for file in files:
            for name, tensor in load_file(file).items():
                if name in parameters and kind != f"lose {name}":
                    parameters[name].copy_(tensor)
        if kind and kind.startswith("lose "):
            self.faults["/update_weights_from_disk"] = (kind, 99)
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def rename(self, body, query, kind):
        self.version = body["new_version"]
        return {"success": True, "message": f"Weight version updated to {self.version}", "new_version": self.version}

    def flush(self, body, query, kind):
        if kind == "busy":
            return PlainTextResponse("Timed out waiting for idle state.", 400)
        self.cached.clear()
        return PlainTextResponse("Cache flushed.\nPlease check backend logs for more details. " + WHEN_BUSY)

    def tensors(self):
        parameters = dict(self.model.named_parameters())
        for name in list(parameters):
            for fused, members in FUSED.items():
                if f".{members[0]}." in name:
                    parts = [parameters.pop(name.replace(members[0], member)) for member in members]
                    parameters[name.replace(members[0], fused)] = torch.cat(parts)
        return parameters

    def check(self, body, query, kind):
        if body["action"] == "reset_tensors":
            for parameter in self.model.parameters():
                parameter.uniform_()
            return {"success": True, "message": "Success."}
        if body["action"] != "checksum":
            return JSONResponse({"success": False, "message": f"Unsupported action={body['action']!r}"}, 400)
        skipped = body.get("skip_tensor_list") or []
        checksums = {
            name: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
            for name, value in self.tensors().items()
            if not any(part in name for part in skipped)
        }
        place = {"role": "target", "tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1}
        info = {"checksums": checksums, "per_gpu_checksum": "0", "parallelism_info": [{**place, "rank": 0, "size": 1}]}
        return {"success": True, "message": "Success.", "ranks": [info], "per_engine_checksum": "0"}

    # ---------------------------------------------------------------- memory

    def pause(self, body, query, kind):
        return {"message": "Generation paused successfully.", "status": "ok"}

    def go_on(self, body, query, kind):
        return {"message": "Generation continued successfully.", "status": "ok"}

    def release(self, body, query, kind):
        if self.asleep:
            os._exit(9)  # SGLang reads buffers that are not there
        if not self.settings["enable-weights-cpu-backup"]:
            for parameter in self.model.parameters():
                parameter.fill_(math.nan)
        self.asleep = True
        return None

    def resume(self, body, query, kind):
        if not self.asleep:
            os._exit(9)  # KeyError in its scheduler
        self.asleep = False
        return None

"""What vLLM's engine would do to the process that it runs in, and what is done about it."""

from __future__ import annotations

import faulthandler
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

HUNG = 60.0
"""Seconds after its deadline that a call inside vLLM is taken for hung."""


@contextmanager
def ends_if_hung(deadline: float) -> Iterator[None]:
    """Ends the process, with a traceback, if vLLM's native code has not come back long after the deadline.

    Nothing else can end a call that hangs inside a kernel and holds the interpreter lock.
    """
    faulthandler.dump_traceback_later(min(max(deadline, 0) + HUNG, threading.TIMEOUT_MAX), exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def process_group_kept() -> Iterator[None]:
    """Closing an engine destroys the default process group, also one that it found, which the trainer still needs."""
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: None if group is None else destroy(group)
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def groups_kept() -> Iterator[None]:
    """Closing an engine destroys all of vLLM's process groups, also those that another engine here computes with."""
    from vllm.v1.engine import core

    cleanup = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda: None
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = cleanup


@contextmanager
def quiet(gpu: bool) -> Iterator[None]:
    """On a CPU, vLLM starts with a dozen warnings that a user can do nothing about."""
    logger = logging.getLogger("vllm")
    level = logger.level
    quiet_updates()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if not gpu:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def quiet_updates() -> None:
    """At each update vLLM names the tables of rotary embeddings, which no checkpoint holds.

    What is really missing is found when the weights are read back.
    """
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


@contextmanager
def threads_kept() -> Iterator[None]:
    """On a CPU, vLLM sets the number of threads and forbids to set it again: take both back."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)

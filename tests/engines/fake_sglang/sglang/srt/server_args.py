"""The options of the stand-in's server: a few of SGLang's."""

from __future__ import annotations

import argparse

FLAGS = (
    "enable-memory-saver", "enable-weights-cpu-backup", "enable-deterministic-inference", "disable-radix-cache",
    "sleep-on-idle", "trust-remote-code",
)  # fmt: skip
VALUES = {
    "sampling-mask-max-tokens": 4096, "mem-fraction-static": 0.9, "random-seed": 0, "context-length": 256,
    "dp-size": 1, "tp-size": 1, "pp-size": 1, "model-path": "", "load-format": "auto", "host": "127.0.0.1",
    "port": 30000, "api-key": "", "dtype": "auto",
}  # fmt: skip


class ServerArgs:
    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        for name in FLAGS:
            parser.add_argument(f"--{name}", action="store_true")
        for name, value in VALUES.items():
            parser.add_argument(f"--{name}", type=type(value), default=value)

"""Starts the stand-in's server as SGLang starts its own: ``python -m sglang.launch_server --config settings.yaml``."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

FLAGS = (
    "enable-memory-saver", "enable-weights-cpu-backup", "enable-deterministic-inference", "disable-radix-cache",
    "trust-remote-code",
)  # fmt: skip
VALUES = {
    "sampling-mask-max-tokens": 4096, "mem-fraction-static": None, "random-seed": None, "context-length": 256,
    "dp-size": 1, "tp-size": 1, "dtype": "auto", "model-path": None, "load-format": "auto", "host": "127.0.0.1",
    "port": 30000, "api-key": None,
}  # fmt: skip


def settings_from(path):
    """As SGLang's parser: an unknown option ends the program."""
    settings = dict(VALUES) | dict.fromkeys(FLAGS, False)
    for name, value in yaml.safe_load(Path(path).read_text()).items():
        if name not in settings:
            sys.exit(f"sglang serve: error: unrecognized arguments: --{name} {value}")
        settings[name] = value
    return settings


if __name__ == "__main__":
    assert sys.argv[1] == "--config"
    settings = settings_from(sys.argv[2])
    import uvicorn

    from sglang.server import Server

    app = Server(settings).app()
    print("The server is fired up and ready to roll!", flush=True)
    uvicorn.run(app, host=settings["host"], port=settings["port"], log_level="warning")

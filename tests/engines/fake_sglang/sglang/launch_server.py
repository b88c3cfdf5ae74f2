"""Starts the stand-in's server as SGLang starts its own: ``python -m sglang.launch_server --model-path ...``."""

from __future__ import annotations

import argparse

import uvicorn

from sglang.server import Server
from sglang.srt.server_args import ServerArgs

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    settings = {name.replace("_", "-"): value for name, value in vars(parser.parse_args()).items()}
    app = Server(settings).app()
    print(f"server_args={settings}", flush=True)  # with the key, as SGLang does
    print("The server is fired up and ready to roll!", flush=True)
    uvicorn.run(app, host=settings["host"], port=settings["port"], log_level="warning")

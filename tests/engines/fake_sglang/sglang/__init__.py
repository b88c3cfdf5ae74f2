"""Stands in for SGLang, which needs a GPU: its server's routes and answers, see launch_server.py."""

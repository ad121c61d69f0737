"""A hub on this machine for the tests: the few endpoints that huggingface_hub uses, over files in memory."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHA = "a" * 40
"""The commit of every repository."""


class Server(http.server.ThreadingHTTPServer):
    """`datasets` and `models`: repository → file → content; `gated`: repositories that want a token. `asked` lists the
    files whose content was sent."""

    daemon_threads = True

    def __init__(self, datasets, models, gated):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {"datasets": datasets, "models": models}
        self.gated, self.asked = gated, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        status, data, headers = self.find(self.path.partition("?")[0], body)
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def find(self, path, body):
        json_type = {"Content-Type": "application/json"}
        if match := re.fullmatch(rf"/api/(datasets|models)/([^/]+/[^/]+)(/(?:revision|tree)/(?:main|{SHA}))?", path):
            kind, repo, what = match.groups()
            files = self.server.repositories[kind].get(repo)
            if repo in self.server.gated:
                return 403, b"", {"X-Error-Code": "GatedRepo"}
            if files is None:
                return 404, b"", {"X-Error-Code": "RepoNotFound"}
            if what and what.startswith("/tree"):
                found = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            else:
                found = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
            return 200, json.dumps(found).encode(), json_type
        if match := re.fullmatch(rf"/(datasets/)?([^/]+/[^/]+)/resolve/(?:main|{SHA})/(.+)", path):
            kind, repo, file = match.groups()
            files = self.server.repositories["datasets" if kind else "models"].get(repo)
            if repo in self.server.gated:
                return 403, b"", {"X-Error-Code": "GatedRepo"}
            if files is not None and file in files:
                if body:
                    self.server.asked.append(f"{repo}/{file}")
                etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
                return 200, files[file], {"ETag": etag, "X-Repo-Commit": SHA}
            return 404, b"", {"X-Error-Code": "RepoNotFound" if files is None else "EntryNotFound"}
        return 404, b"", {"X-Error-Code": "RepoNotFound"}

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(datasets=None, models=None, gated=()):
    """A running server."""
    server = Server(datasets or {}, models or {}, gated)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(home, endpoint: str, **more: str) -> dict[str, str]:
    """Of a process that is to use this hub, and whose downloads are kept in `home`: huggingface_hub reads its
    environment when it is imported, so it takes a new process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return env | {"PYTHONPATH": str(ROOT), **more}

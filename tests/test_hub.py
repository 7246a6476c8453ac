"""Checkpoints by their name on Hugging Face's hub, from a small server on this machine that answers as the hub does."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import safetensors.numpy
from vit_arrays import random_arrays

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architecture": "vit_tiny",
    "model_args": {"num_heads": 3},
    "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3},
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": safetensors.numpy.save(random_arrays()),
    "README.md": b"not asked for",
}
LOAD = """
import sys
from compo_jax import models
for name in sys.argv[1:]:
    try:
        made = models.backbone(name)
        print(made.description, made.model.heads, made.model.width, made.pixels.mean)
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """A repository `owner/name` with a branch `main` and a tag `v1`; the paths asked for are listed in `asked`."""

    asked = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path)
        file = path.rsplit("/", 1)[1]
        if re.fullmatch(r"/api/models/owner/name/revision/(main|v1)", path):
            siblings = [{"rfilename": file} for file in FILES]
            self._answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            listed = [{"type": "file", "path": name, "size": len(x), "oid": etag(x)} for name, x in FILES.items()]
            self._answer(json.dumps(listed).encode())
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/") and file in FILES:
            self._answer(FILES[file], {"ETag": f'"{etag(FILES[file])}"', "X-Repo-Commit": COMMIT})
        else:
            missing = "RevisionNotFound" if path.startswith("/api/models/owner/name") else "RepoNotFound"
            self._answer(b"{}", {"X-Error-Code": missing}, 404)

    do_HEAD = do_GET

    def _answer(self, content, headers=None, status=200):
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": len(content),
            **(headers or {}),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def etag(content):
    return hashlib.sha1(content).hexdigest()


def run(*names, home, **environment):
    """What is printed of each name by a process of its own: the hub's address is read when its package is imported."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_name_of_the_hub_is_fetched_kept_and_served_without_a_network(tmp_path):
    Hub.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        names = ["hf:owner/name", "hf:owner/name@v1", "hf:owner/name@v2", "hf:owner/other"]
        here = run(*names, home=tmp_path, HF_ENDPOINT=address)
        server.shutdown()
    assert here[0] == "hf:owner/name 3 24 (0.1, 0.1, 0.1)"
    assert here[1] == "hf:owner/name@v1 3 24 (0.1, 0.1, 0.1)"
    assert re.match(r"FileNotFoundError hf:owner/name@v2 is not on the hub, .*check the name and the revision", here[2])
    assert re.match(r"FileNotFoundError hf:owner/other is not on the hub", here[3])
    fetched = [path for path in Hub.asked if "/resolve/" in path]
    assert {path.rsplit("/", 1)[1] for path in fetched} == {"config.json", "model.safetensors"}
    away = run("hf:owner/name", "hf:owner/other", home=tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert away[0] == here[0]
    assert re.match(r"ConnectionError hf:owner/other can't be fetched and is in no cache .*give its path", away[1])

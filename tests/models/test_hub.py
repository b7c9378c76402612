"""Hub ids: fetched from HF_ENDPOINT, cached under HF_HOME, and refused in one sentence within seconds."""

import hashlib
import http.server
import json
import threading
import time

import huggingface_hub.constants
import pytest
import torch

from finerank.errors import ModelError
from finerank.models.find import fetch_from_hub
from finerank.models.load import load_model
from finerank.models.settings import ModelSettings
from tiny import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def hub(tiny_folder, monkeypatch):
    """A small hub with the one model `tiny/llama`; yields the list of paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            asked.append(self.path)
            self.answer(body=True)

        def answer(self, *, body):
            path = self.path.split("?")[0]
            names = [p.name for p in tiny_folder.iterdir()] + ["original/consolidated.00.pth", "pytorch_model.bin"]
            if path == "/api/models/tiny/llama/revision/main":
                siblings = [{"rfilename": name} for name in names]
                content = json.dumps({"id": "tiny/llama", "sha": COMMIT, "siblings": siblings}).encode()
                return self.reply(200, content, body, {})
            if path == f"/api/models/tiny/llama/tree/{COMMIT}":  # newer clients list the files this way
                files = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
                return self.reply(200, json.dumps(files).encode(), body, {})
            if path.startswith("/api/models/tiny/llama/revision"):
                return self.reply(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            if path.startswith("/api/models/gated/model"):
                return self.reply(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
            if path.startswith(f"/tiny/llama/resolve/{COMMIT}/") and (tiny_folder / path.split("/")[-1]).is_file():
                content = (tiny_folder / path.split("/")[-1]).read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                return self.reply(200, content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            return self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

        def reply(self, status, content, body, headers):
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_fetched_then_loaded_offline(hub, hub_cache, monkeypatch):
    settings = ModelSettings(load="tiny/llama", dtype="fp32", device="cpu")
    loaded = load_model(settings)
    assert loaded.source.name == "tiny/llama" and hub_cache in loaded.source.path.parents
    assert all(torch.equal(v, tiny_model().state_dict()[n]) for n, v in loaded.model.state_dict().items())
    assert not [path for path in hub if path.endswith((".bin", ".pth"))], "safetensors are there: no pickle is fetched"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub)
    assert load_model(settings).source == loaded.source and len(hub) == asked


@pytest.mark.parametrize(
    ("name", "revision", "sentence"),
    [
        ("tiny/lama", None, "no folder and no hub model tiny/lama"),
        ("smollm-135m", None, "no folder and no hub model smollm-135m"),
        ("tiny/llama", "v9", "has no revision 'v9'"),
        ("gated/model", None, "is gated: accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, name, revision, sentence):
    with pytest.raises(ModelError, match=sentence) as caught:
        fetch_from_hub(name, revision)
    assert "\n" not in str(caught.value)


def test_no_network_and_offline_are_told_within_seconds(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    start = time.monotonic()
    with pytest.raises(ModelError, match="the hub cannot be reached; check the network and HF_ENDPOINT"):
        fetch_from_hub("some/model", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set while it is not in the hub cache"):
        fetch_from_hub("some/model", None)
    assert time.monotonic() - start < 10

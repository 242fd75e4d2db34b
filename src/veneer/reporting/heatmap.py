"""The ranks of an adapter, layer × module, as a picture in the terminal and as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from veneer.files import atomic_file
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.peft_config import name_and_rank
from veneer.updates.select import layer_number

NO_LAYER = -1
# From an empty cell to the largest rank; the ends of matplotlib's Blues, so that both pictures look alike.
_LIGHT, _DARK = (247, 251, 255), (8, 81, 156)


def ranks_of(shapes: Mapping[str, Sequence[int]], config: LoRA | AdaLoRA | None = None) -> dict[str, int]:
    """Module → rank of an adapter file's tensors, by their names and shapes; layer 10 after layer 9.

    ``config``: the file's, by which the updates of experts are known.
    """
    ranks = dict(
        name_and_rank(key.removeprefix("base_model.model.").partition(".lora_")[0], next(iter(shape), 0), config)
        for key, shape in shapes.items()
        if ".lora_A" in key or ".lora_embedding_A" in key
    )
    return dict(sorted(ranks.items(), key=lambda item: _natural(item[0])))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


@dataclass(frozen=True)
class RankMap:
    """``cells``: (layer, kind of module) → rank; a module outside the numbered layers has the layer −1."""

    layers: list[int]
    kinds: list[str]
    cells: dict[tuple[int, str], int]

    @classmethod
    def of(cls, ranks: dict[str, int]) -> RankMap:
        """The map of module names and their ranks, in their order."""
        kinds = _kinds(list(ranks))
        cells = {(_layer(path), kinds[path]): rank for path, rank in ranks.items()}
        return cls(sorted({layer for layer, _ in cells}), list(dict.fromkeys(kinds.values())), cells)

    @property
    def largest(self) -> int:
        return max(self.cells.values(), default=0)

    def lines(self) -> list[Text]:
        """For the terminal: a line a layer, each rank in its number and its colour."""
        widths = [max(len(kind), 3) + 2 for kind in self.kinds]
        head = Text("layer ", style="dim")
        for kind, width in zip(self.kinds, widths, strict=True):
            head.append(kind.rjust(width))
        lines = [head]
        for layer in self.layers:
            line = Text(f"{'–' if layer == NO_LAYER else layer:>5} ", style="dim")
            for kind, width in zip(self.kinds, widths, strict=True):
                rank = self.cells.get((layer, kind))
                line.append(" " * width if rank is None else str(rank).rjust(width), style=self._style(rank))
            lines.append(line)
        return lines

    def _style(self, rank: int | None) -> str:
        if rank is None:
            return ""
        share = rank / max(self.largest, 1)
        colour = ",".join(str(round(low + (high - low) * share)) for low, high in zip(_LIGHT, _DARK, strict=True))
        return f"{'white' if share > 0.5 else 'black'} on rgb({colour})"

    def write_png(self, path: str | Path, title: str) -> None:
        """The same as a picture. Raises OSError."""
        from matplotlib.figure import Figure  # a second to import, so only where a picture is asked for

        rows = [[self.cells.get((layer, kind), float("nan")) for kind in self.kinds] for layer in self.layers]
        figure = Figure(figsize=(1.5 + 0.8 * len(self.kinds), 1.5 + 0.3 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=max(self.largest, 1), aspect="auto")
        axes.set_xticks(range(len(self.kinds)), self.kinds, rotation=45, ha="right")
        axes.set_yticks(range(len(self.layers)), ["–" if layer == NO_LAYER else str(layer) for layer in self.layers])
        axes.set_ylabel("layer")
        axes.set_title(title, fontsize="medium")
        for y, row in enumerate(rows):
            for x, rank in enumerate(row):
                if rank == rank:  # no number where a layer has no such module
                    colour = "white" if rank > self.largest / 2 else "black"
                    axes.text(x, y, f"{rank:g}", ha="center", va="center", color=colour, fontsize="small")
        figure.colorbar(image, label="rank")
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def _layer(path: str) -> int:
    number = layer_number(path)
    return NO_LAYER if number is None else number


def _kinds(paths: list[str]) -> dict[str, str]:
    """Module name → the shortest end of it, without its layer's number, that no other module of its layer has: c_proj,
    or mlp.c_proj, or all of it where an encoder and a decoder have the same."""
    within = {path: _within_layer(path) for path in paths}
    kinds: dict[str, str] = {}
    for length in range(1, max(map(len, within.values())) + 1):
        ends = {path: ".".join(filter(None, parts[-length:])) for path, parts in within.items()}
        seen: dict[tuple[int, str], list[str]] = {}
        for path, end in ends.items():
            seen.setdefault((_layer(path), end), []).append(path)
        clashing = {end for (_, end), those in seen.items() if len(those) > 1}
        for path, end in ends.items():
            if path not in kinds and end not in clashing:
                kinds[path] = end
    return kinds


def _within_layer(path: str) -> list[str]:
    """The parts of a module's name: first of all what comes before its layer's number, as one, then those after it."""
    parts = path.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return parts
    return [".".join(parts[:number]), "", *parts[number + 1 :]]  # nothing between: those after it may be enough

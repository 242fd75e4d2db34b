"""Every kernel of every variant with tensors that end or begin at a page that nobody may touch.

    make guards                     1,000 random arguments of each
    python tests/fuzz/guards.py 50
    python tests/fuzz/guards.py avx2:veneer::rotate:17      one case again, in this process

Bad is: the end of the process, as at a read or a write beyond a tensor; other numbers than the definition's; bytes
written that are no result's; an exception; a hang. The kernels run in a process of their own, and where it ends, in
another one from the next case on.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from fuzz.guard_cases import CASES, Draw
from guarded import Guarded, GuardedResults
from veneer.kernels.coded import CodedWeight
from veneer.kernels.extension import VARIANTS
from veneer.kernels.serving import on_cpu

SECONDS = 60
BAD = ("ended", "wrong", "written beside", "exception", "hang")


def kernels_of(variant: str) -> dict[str, Callable[..., Any]]:
    return {kernel.name: kernel.run for kernel in on_cpu(variant).kernels()}


def outcome(variant: str, name: str, number: int) -> str:
    """ "right", or one of BAD and what happened."""
    case, draw = CASES[name], Draw(f"{name} {number}")
    given = case.arguments(draw)
    at_start, threads = draw.yes(), draw.one_of(1, 1, 2, 3)
    laid: list[Guarded] = []
    now = tuple(_laid(value, at_start, laid) for value in given)
    flat = [part for value in now for part in (value if isinstance(value, CodedWeight) else (value,))]
    torch.set_num_threads(threads)
    results = GuardedResults(at_start=at_start)
    try:
        with results:
            found = kernels_of(variant)[name](*flat)
    except Exception as error:
        return f"exception: {type(error).__name__} {str(error)[:200]}"
    if not all(room.intact() for room in (*laid, *results.made)):
        return "written beside"
    for place, (before, after) in enumerate(zip(given, now, strict=True)):
        if place not in case.written and not _equal(before, after):
            return f"written beside: argument {place}"
    try:
        case.check(found, given, now)
    except AssertionError as error:
        return f"wrong: {str(error)[:200]}"
    return "right"


def _laid(value: Any, at_start: bool, laid: list[Guarded]) -> Any:
    if isinstance(value, CodedWeight):
        return CodedWeight(*(_laid(part, at_start, laid) for part in value))
    if not isinstance(value, Tensor):
        return value
    laid.append(Guarded(value, at_start=at_start))
    return laid[-1].copy


def _equal(before: Any, after: Any) -> bool:
    if isinstance(before, CodedWeight):
        return all(_equal(*pair) for pair in zip(before, after, strict=True))
    return torch.equal(before, after) if isinstance(before, Tensor) else bool(before == after)


Question = tuple[str, str, int]  # variant, kernel, number of the case


def outcomes(
    questions: Iterable[Question], ask: Callable[[str, str, int], str] = outcome
) -> list[tuple[Question, str]]:
    """What ``ask`` finds, in a process that is begun anew where it ends."""
    left, found = list(questions), []
    context = multiprocessing.get_context("spawn")
    while left:
        pipe, other = context.Pipe()
        process = context.Process(target=_answer, args=(other, left, ask), daemon=True)
        process.start()
        other.close()
        try:
            while left:
                said = pipe.recv() if pipe.poll(SECONDS) else "hang"
                found.append((left.pop(0), said))
                if said == "hang":
                    break
        except EOFError:
            process.join()
            found.append((left.pop(0), f"ended: with {process.exitcode}"))
        process.kill()
        process.join()
    return found


def _answer(pipe: Any, questions: list[Question], ask: Callable[[str, str, int], str]) -> None:
    for question in questions:
        pipe.send(ask(*question))


def questions(count: int, *, first: int = 0) -> list[Question]:
    every = [(variant, name) for variant in VARIANTS for name in kernels_of(variant)]
    return [(*which, number) for which in every for number in range(first, first + count)]


def main(arguments: list[str]) -> int:
    if arguments and ":" in arguments[0]:
        variant, _, rest = arguments[0].partition(":")
        name, _, number = rest.rpartition(":")
        print(outcome(variant, name, int(number)))
        return 0
    found = outcomes(questions(int(arguments[0]) if arguments else 1000))
    print(f"| variant | kernels | cases | right | {' | '.join(BAD)} |")
    print("|---" * (4 + len(BAD)) + "|")
    for variant in VARIANTS:
        said = Counter(result.partition(":")[0] for (of, _, _), result in found if of == variant)
        numbers = [len(kernels_of(variant)), said.total(), *(said[name] for name in ("right", *BAD))]
        print(f"| {variant} | {' | '.join(map(str, numbers))} |")
    bad = [(question, result) for question, result in found if result != "right"]
    for question, result in bad[:50]:
        print(f"{':'.join(map(str, question))} {result}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

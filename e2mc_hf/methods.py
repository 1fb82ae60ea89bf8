"""METHODS.md, made from the code: `python -m e2mc_hf.methods > e2mc_hf/METHODS.md`."""

import inspect
from collections.abc import Iterable

from e2mc_hf.objectives.registry import OBJECTIVES
from e2mc_hf.regularizers.registry import REGULARIZERS

_INTRODUCTION = """\
# Methods

Made from the code by `python -m e2mc_hf.methods > e2mc_hf/METHODS.md`; a test compares. N counts the samples of all
processes, D the dimensions of the embeddings. Options are given as `--objective_args key=value` and
`--regularizer_args key=value`; their meaning is in the file named.
"""


def methods_text() -> str:
    """Tables of all objectives and regularizers: name, file, paper, defaults."""
    objectives = (
        (name, _file(kind), kind.paper, _views(kind.default_small_views), _defaults(kind, skip=1))
        for name, kind in sorted(OBJECTIVES.items())
    )
    regularizers = (
        (name, _file(kind), kind.paper, kind.cost, _defaults(kind)) for name, kind in sorted(REGULARIZERS.items())
    )
    return "\n".join(
        [
            _INTRODUCTION,
            "## Objectives\n",
            *_table(("objective", "file", "paper", "views", "defaults"), objectives),
            "\n## Regularizers\n",
            *_table(("regularizer", "file", "paper", "cost", "defaults"), regularizers),
            "",
        ]
    )


def _file(kind: type) -> str:
    path = "/".join(kind.__module__.split(".")[1:]) + ".py"
    return f"[{path.split('/')[-1]}]({path})"


def _views(small: int) -> str:
    return f"2 + {small} small" if small else "2"


def _defaults(kind: type, skip: int = 0) -> str:
    parameters = list(inspect.signature(kind).parameters.values())[skip:]
    return ", ".join(f"{own.name}={own.default!r}" for own in parameters)


def _table(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [names, ("---",) * len(names), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    print(methods_text(), end="")

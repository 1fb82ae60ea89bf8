"""Configuration files of `accelerate launch` that come with the package, found by name.

python -m e2mc_hf.launch_files ddp       prints the path of one: accelerate launch --config_file "$(...)" SCRIPT ...
python -m e2mc_hf.launch_files           lists them
"""

import sys
from pathlib import Path

from e2mc_hf.errors import UsageError
from e2mc_hf.options import suggestion

_FOLDER = Path(__file__).parent / "launch"


def shipped_launch_files() -> dict[str, Path]:
    """Files of the shipped configurations, by name, in order."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def find_launch_file(name: str) -> Path:
    """Find a shipped configuration by its name, with or without `.yaml`.

    Raises:
        UsageError: If there is none of that name.
    """
    shipped = shipped_launch_files()
    stem = name.removesuffix(".yaml")
    if stem not in shipped:
        raise UsageError(
            f"`launch_file` must be the name of a shipped configuration, got {name!r}. {suggestion(stem, shipped)}"
        )
    return shipped[stem]


def main(argv: list[str] | None = None) -> None:
    """Print the path of the configuration named, or the names of all."""
    words = sys.argv[1:] if argv is None else argv
    try:
        print("\n".join([str(find_launch_file(word)) for word in words] or shipped_launch_files()))
    except UsageError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

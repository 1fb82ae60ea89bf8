"""Recipes that come with the package, found by name."""

from pathlib import Path

from e2mc_hf.errors import UsageError
from e2mc_hf.options import suggestion

_FOLDER = Path(__file__).parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Files of the shipped recipes, by name, in order."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name_or_path: str) -> Path:
    """Find a recipe: a file there is, or else a shipped one by its name, with or without `.yaml`.

    Raises:
        UsageError: If there is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    name = name_or_path.removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    raise UsageError(
        f"`recipe` must be a YAML file or the name of a shipped recipe, got {name_or_path!r}. "
        f"{suggestion(path.stem if path.suffix == '.yaml' else path.name, shipped)}"
    )

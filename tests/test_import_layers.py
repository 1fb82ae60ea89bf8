import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "e2mc_hf"
FOUNDATION = {
    "errors",
    "arguments",
    "option_fields",
    "image_arguments",
    "options",
    "command_line",
    "distributed",
    "progress",
    "recipe_files",
    "launch_files",
    "modes",
}
LEVELS = dict.fromkeys(FOUNDATION, 0) | {
    "regularizers": 1,
    "data": 1,
    "metrics": 1,
    "objectives": 2,
    "models": 3,
    "methods": 3,
    "evaluation": 3,
    "training": 4,
    "publishing": 5,
    "__init__": 6,  # the public names
}
LIBRARIES = {"regularizers": {"torch", "numpy", "jaxtyping"}}
INSTANT = {
    "arguments",
    "image_arguments",
    "option_fields",
    "errors",
    "options",
    "command_line",
    "recipe_files",
    "launch_files",
    "progress",
}
SLOW = {"torch", "transformers", "yaml", "timm", "datasets", "numpy"}


def imports_of(source: str, *, nested: bool = True) -> set[str]:
    """Dotted names of all imports, or of those that run when the file is imported."""
    pending: list[ast.AST] = [ast.parse(source)]
    names = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            names |= {f"{origin}.{alias.name}" for alias in node.names}
        if nested or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return names


def room_of(name: str) -> str:
    """Room of a file's path inside the package, or of a dotted import from it."""
    return name.removeprefix("e2mc_hf.").replace("/", ".").split(".")[0]


def violations(path: str, source: str) -> list[str]:
    """Imports of a file that its room does not allow; `path` is relative to the package."""
    room = room_of(path)
    allowed = {other for other in LEVELS if other == room or LEVELS[other] < LEVELS[room]}
    allowed |= FOUNDATION if room in FOUNDATION else set()
    found = []
    for name in sorted(imports_of(source)):
        library = name.split(".")[0]
        if library == "e2mc_hf":
            broken = room_of(name) not in allowed
        else:
            is_standard = library in sys.stdlib_module_names
            broken = library in ("", "scripts") or not (is_standard or library in LIBRARIES.get(room, {library}))
        if broken:
            found.append(f"{path} imports {name}")
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_a_file_imports_only_from_lower_levels_or_its_own_room(path):
    assert room_of(path) in LEVELS, f"{path} is in a room without a level"
    assert violations(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize("room", sorted(INSTANT))
def test_the_files_behind_help_import_nothing_slow(room):
    imported = imports_of((PACKAGE / f"{room}.py").read_text(), nested=False)
    assert {name.split(".")[0] for name in imported} & SLOW == set()


def test_every_room_with_a_level_is_there():
    assert {room_of(path) for path in FILES} == set(LEVELS)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/views.py", "from e2mc_hf.objectives.vicreg import VICReg"),
        ("data/views.py", "import e2mc_hf.models.backbone"),
        ("data/views.py", "def late():\n    from e2mc_hf.training import trainer"),
        ("data/views.py", "from e2mc_hf import regularizers"),
        ("data/views.py", "from e2mc_hf import E2MCTrainer"),
        ("data/views.py", "from .views import draw"),
        ("evaluation/knn.py", "from e2mc_hf.models.loading import load_backbone"),
        ("evaluation/knn.py", "from e2mc_hf.training.trainer import E2MCTrainer"),
        ("models/loading.py", "from e2mc_hf.evaluation.knn import knn_predict"),
        ("training/trainer.py", "from e2mc_hf.publishing.encoder import export_encoder"),
        ("regularizers/e2mc.py", "import scipy.special"),
        ("regularizers/e2mc.py", "from transformers import Trainer"),
        ("regularizers/e2mc.py", "from e2mc_hf.data.seeds import permutation"),
        ("publishing/encoder.py", "from scripts.evaluate import run"),
        ("options.py", "from e2mc_hf.data.seeds import permutation"),
        ("options.py", "if True:\n    import e2mc_hf.metrics"),
    ],
)
def test_a_forbidden_import_is_seen(path, source):
    assert len(violations(path, f"import math\n{source}\n")) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("options.py", "from e2mc_hf.errors import UsageError"),
        ("regularizers/e2mc.py", "import math, torch\nfrom e2mc_hf.distributed import all_gather"),
        ("regularizers/e2mc.py", "from e2mc_hf.regularizers.entropy import marginal_entropy"),
        ("objectives/vicreg.py", "from e2mc_hf.regularizers.covariance import off_diagonal_covariance"),
        ("publishing/encoder.py", "from e2mc_hf.models.loading import load_backbone"),
        ("__init__.py", "from e2mc_hf.training.trainer import E2MCTrainer as E2MCTrainer"),
    ],
)
def test_an_allowed_import_is_not_reported(path, source):
    assert violations(path, source) == []


def test_imports_inside_functions_are_told_from_those_that_run_at_once():
    source = "try:\n    import yaml\nexcept ImportError:\n    pass\nclass A:\n    def f(self):\n        import torch\n"
    assert imports_of(source) == {"yaml", "torch"}
    assert imports_of(source, nested=False) == {"yaml"}

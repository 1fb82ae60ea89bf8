from pathlib import Path

import pytest

import e2mc_hf
from e2mc_hf.arguments import ObjectiveArguments, RegularizerArguments
from e2mc_hf.methods import methods_text
from e2mc_hf.objectives.registry import OBJECTIVES
from e2mc_hf.regularizers.registry import REGULARIZERS

DOCUMENT = Path(e2mc_hf.__file__).parent / "METHODS.md"


def test_the_table_of_methods_is_what_the_code_says():
    assert DOCUMENT.read_text() == methods_text(), "run: python -m e2mc_hf.methods > e2mc_hf/METHODS.md"


@pytest.mark.parametrize("kind", [*OBJECTIVES.values(), *REGULARIZERS.values()])
def test_every_method_names_its_paper_and_a_link(kind):
    assert "https://" in kind.paper


def test_every_file_in_the_table_is_there():
    for kind in (*OBJECTIVES.values(), *REGULARIZERS.values()):
        path = "/".join(kind.__module__.split(".")[1:]) + ".py"
        assert f"]({path})" in DOCUMENT.read_text()
        assert (DOCUMENT.parent / path).is_file()


@pytest.mark.parametrize(
    ("kind", "name", "names"),
    [(ObjectiveArguments, "objective", OBJECTIVES), (RegularizerArguments, "regularizer", REGULARIZERS)],
)
def test_the_help_of_the_option_lists_every_method(kind, name, names):
    help_text = kind.__dataclass_fields__[name].metadata["help"]
    listed = {word.strip(",;.") for word in help_text.split()}
    assert set(names) <= listed

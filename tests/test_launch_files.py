import subprocess
import sys

import pytest

from e2mc_hf.errors import UsageError
from e2mc_hf.launch_files import find_launch_file, main, shipped_launch_files

NAMES = ["cpu-2", "ddp", "deepspeed-zero2", "fsdp2", "multi-node"]


def test_shipped_configurations_are_files_by_name_in_order():
    shipped = shipped_launch_files()
    assert list(shipped) == NAMES
    assert all(path.is_file() and path.name == f"{name}.yaml" for name, path in shipped.items())


@pytest.mark.parametrize("name", ["ddp", "ddp.yaml"])
def test_a_configuration_is_found_by_name_with_or_without_the_ending(name):
    assert find_launch_file(name) == shipped_launch_files()["ddp"]


def test_a_name_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"^`launch_file` must be .*, got 'fsdp'\. Did you mean 'fsdp2'\?$"):
        find_launch_file("fsdp")


def test_the_command_prints_the_path_of_one_alone(tmp_path):
    command = [sys.executable, "-m", "e2mc_hf.launch_files", "cpu-2"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert answer.stdout == f"{shipped_launch_files()['cpu-2']}\n"


def test_the_command_lists_all_without_a_name_and_refuses_a_wrong_one(capsys):
    main([])
    assert capsys.readouterr().out.split() == NAMES
    with pytest.raises(SystemExit, match="`launch_file` must be the name of a shipped configuration"):
        main(["tpu"])

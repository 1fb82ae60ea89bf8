import os
import subprocess
import sys
from pathlib import Path

import pytest

from e2mc_hf.errors import UsageError
from e2mc_hf.launch_files import find_launch_file
from e2mc_hf.training import launch as launch_module
from e2mc_hf.training.launch import Asked, asked_of_launcher, check_world

ACCELERATE = [
    ["/venv/bin/python3.11", "/venv/bin/accelerate", "launch"],
    ["/venv/bin/python3.11", "/venv/bin/accelerate-launch"],
    ["/usr/bin/python3", "-m", "accelerate.commands.launch"],
    ["accelerate", "launch"],
]
TORCHRUN = [
    ["/venv/bin/python3.11", "/venv/bin/torchrun"],
    ["/usr/bin/python3", "-m", "torch.distributed.run"],
    ["torchrun"],
]
SCRIPT = ["scripts/continue_pretrain.py", "recipe.yaml", "--num_views", "3"]
ROOT = Path(__file__).parents[2]
SHELL = ["bash", "-c", "accelerate launch --num_processes 5 scripts/continue_pretrain.py"]


@pytest.fixture(autouse=True)
def no_default_file(tmp_path, monkeypatch):
    """A machine on which `accelerate config` was never run."""
    monkeypatch.setattr(launch_module, "default_config_file", str(tmp_path / "default_config.yaml"))


@pytest.mark.parametrize("launcher", ACCELERATE)
@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--num_processes", "2"], 2),
        (["--num_processes=2"], 2),
        (["--num-processes", "4"], 4),
        (["--cpu", "--num_processes", "16", "--num_machines", "2"], 16),
        ([], None),
        (["--cpu"], None),
    ],
)
def test_accelerate_is_asked_for_the_processes_on_all_machines(launcher, flags, asked):
    assert asked_of_launcher([[*launcher, *flags, *SCRIPT]]) == Asked(asked)


@pytest.mark.parametrize("launcher", TORCHRUN)
@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--nproc_per_node", "2"], 2),
        (["--nproc-per-node", "2"], 2),
        (["--nproc_per_node=2"], 2),
        (["--nproc-per-node=2", "--standalone"], 2),
        (["--nnodes", "2", "--nproc_per_node", "4"], 8),
        (["--nnodes=3", "--nproc-per-node=2"], 6),
        (["--nnodes", "1:4", "--nproc_per_node", "2"], 2),
        (["--nproc_per_node", "auto"], None),
        (["--nproc_per_node", "gpu", "--nnodes", "2"], None),
        (["--nnodes", "2"], None),
        ([], None),
    ],
)
def test_torchrun_is_asked_for_processes_on_each_of_the_nodes(launcher, flags, asked):
    assert asked_of_launcher([[*launcher, *flags, *SCRIPT]]) == Asked(asked)


@pytest.mark.parametrize(
    "command_lines",
    [
        [],
        [[]],
        [["python", *SCRIPT]],
        [["python", "-m", "pytest", "--num_processes", "2"], ["bash"], ["/sbin/init"]],
        [["accelerate", "env", "--num_processes", "2"]],
        [["python", "/home/someone/accelerate/examples/launch.py", "--num_processes", "2"]],
        [SHELL],
    ],
)
def test_without_a_launcher_nothing_was_asked(command_lines):
    assert asked_of_launcher(command_lines) == Asked()


@pytest.mark.parametrize("launcher", ACCELERATE)
@pytest.mark.parametrize(
    ("name", "flags", "asked"),
    [
        ("cpu-2", [], Asked(2, on_cpu=True)),
        ("cpu-2", ["--num_processes", "3"], Asked(3, on_cpu=True)),
        ("ddp", [], Asked(None, on_cpu=False)),
        ("multi-node", ["--num_processes=16"], Asked(16, on_cpu=False)),
    ],
)
def test_accelerate_is_asked_by_its_configuration_file_too(launcher, name, flags, asked):
    path = str(find_launch_file(name))
    for words in (["--config_file", path], [f"--config_file={path}"], ["--config-file", path]):
        assert asked_of_launcher([[*launcher, *words, *flags, *SCRIPT]]) == asked


def test_accelerate_is_asked_by_its_default_file_unless_another_or_the_cpu_is_named(tmp_path):
    (tmp_path / "default_config.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    launcher = ["accelerate", "launch"]
    assert asked_of_launcher([[*launcher, *SCRIPT]]) == Asked(4, on_cpu=False)
    assert asked_of_launcher([[*launcher, "--num_processes", "2", *SCRIPT]]) == Asked(2, on_cpu=False)
    assert asked_of_launcher([[*launcher, "--cpu", *SCRIPT]]) == Asked()
    assert asked_of_launcher([[*launcher, "--config_file", str(find_launch_file("cpu-2")), *SCRIPT]]) == Asked(2, True)
    assert asked_of_launcher([["torchrun", *SCRIPT]]) == Asked()


def test_the_nearest_launcher_counts():
    near, far = ["torchrun", "--nproc_per_node", "2"], ["accelerate", "launch", "--num_processes", "8"]
    assert asked_of_launcher([["bash"], near, far]).num_processes == 2
    assert asked_of_launcher([SHELL, far, near]).num_processes == 8


def test_a_flag_at_the_very_end_has_no_number():
    assert asked_of_launcher([["torchrun", "--nproc_per_node"]]) == Asked()


def test_started_processes_that_do_not_train_together_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UsageError, match=r"^`use_cpu` must be given .*: 2 processes were started.*torchrun --nproc_per"
    ):
        check_world(1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_world_as_large_as_was_started_is_accepted(monkeypatch, world_size):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    check_world(world_size)


def test_one_process_without_a_launcher_is_accepted(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_world(1)


def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UsageError, match=r"^`srun` started 8 tasks .*, got a world of 1: each would train alone\."):
        check_world(1)


@pytest.mark.parametrize(
    ("environment", "world_size"),
    [
        ({"SLURM_NTASKS": "8"}, 1),  # the body of a batch script, which has the whole allocation to itself
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16"}, 16),  # torchrun in one task a node
        ({"SLURM_STEP_NUM_TASKS": "8", "WORLD_SIZE": "8"}, 8),  # tasks that were told their places
        ({"SLURM_STEP_NUM_TASKS": "2"}, 2),  # an MPI that tells them
    ],
)
def test_tasks_of_slurm_that_train_together_are_accepted(monkeypatch, environment, world_size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_world(world_size)


def test_a_file_that_asks_for_the_cpu_needs_the_script_to_be_told_so(monkeypatch):
    words = ["accelerate", "launch", "--config_file", str(find_launch_file("cpu-2")), *SCRIPT]
    monkeypatch.setattr(launch_module, "_ancestors", lambda: [words])
    check_world(2, on_cpu=True)
    with pytest.raises(UsageError, match=r"^`use_cpu` must be given as well: .*, got False\. Pass --use_cpu, or"):
        check_world(2, on_cpu=False)


def launch(tmp_path, *launcher: str) -> str:
    """Output of a script that checks for a world of one process, under a launcher."""
    script = tmp_path / "script.py"
    script.write_text("from e2mc_hf.training.launch import check_world\ncheck_world(1)\nprint('trained alone')\n")
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    answer = subprocess.run(
        [sys.executable, *launcher, str(script)],
        capture_output=True,
        text=True,
        env=environment | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    return answer.stdout + answer.stderr


def test_accelerate_that_starts_one_process_of_two_is_refused(tmp_path):
    output = launch(tmp_path, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    assert "`num_processes` must be what was asked for: 2, got 1." in output
    assert "trained alone" not in output


def test_accelerate_that_starts_one_process_of_two_in_its_default_file_is_refused(tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(
        "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\n"
    )
    output = launch(tmp_path, "-m", "accelerate.commands.launch")
    assert "`num_processes` must be what was asked for: 2, got 1." in output
    assert "trained alone" not in output


def test_torchrun_with_two_processes_of_which_each_trains_alone_is_refused(tmp_path):
    output = launch(tmp_path, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0")
    assert "`use_cpu` must be given for several processes on the CPU: 2 processes were started" in output
    assert "trained alone" not in output

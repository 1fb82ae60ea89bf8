"""The shipped configuration files of `accelerate launch`, as accelerate itself reads them.

tests/integration/test_launch.py trains two processes that `cpu-2.yaml` starts.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import ComputeEnvironment, DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from e2mc_hf.launch_files import find_launch_file, shipped_launch_files

ROOT = Path(__file__).parents[2]
ONE_MACHINE = {"num_machines": 1, "main_process_port": 0}
UNSAID = -1  # accelerate then asks for --num_processes
PROMISES: dict[str, dict[str, Any]] = {
    "cpu-2": ONE_MACHINE | {"distributed_type": DistributedType.MULTI_GPU, "use_cpu": True, "num_processes": 2},
    "ddp": ONE_MACHINE
    | {"distributed_type": DistributedType.MULTI_GPU, "use_cpu": False, "num_processes": UNSAID, "gpu_ids": "all"},
    "fsdp2": ONE_MACHINE
    | {"distributed_type": DistributedType.FSDP, "use_cpu": False, "num_processes": UNSAID, "gpu_ids": "all"},
    "deepspeed-zero2": ONE_MACHINE
    | {"distributed_type": DistributedType.DEEPSPEED, "use_cpu": False, "num_processes": UNSAID, "gpu_ids": "all"},
    "multi-node": {
        "distributed_type": DistributedType.MULTI_GPU,
        "use_cpu": False,
        "num_processes": UNSAID,
        "gpu_ids": "all",
        "num_machines": 2,
        "main_process_ip": None,
    },
}


def launched(name: str, *flags: str) -> Any:
    """Arguments of the launcher, completed from a file as `accelerate launch` completes them."""
    words = ["--config_file", str(find_launch_file(name)), *flags, "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.mark.parametrize("name", shipped_launch_files())
def test_a_file_says_what_it_promises(name):
    config = load_config_from_file(str(find_launch_file(name)))
    assert isinstance(config, ClusterConfig)
    assert {field: getattr(config, field) for field in PROMISES[name]} == PROMISES[name]
    assert config.compute_environment is ComputeEnvironment.LOCAL_MACHINE
    assert config.mixed_precision == "no"
    assert config.dynamo_config == {}
    assert bool(config.fsdp_config) == (name == "fsdp2")
    assert bool(config.deepspeed_config) == (name == "deepspeed-zero2")


@pytest.mark.parametrize("name", [name for name in PROMISES if name != "cpu-2"])
def test_how_many_gpus_there_are_must_be_said(name):
    with pytest.raises(ValueError, match="You need to manually pass in `--num_processes`"):
        launched(name)


@pytest.mark.parametrize("name", ["cpu-2", "ddp", "fsdp2"])
def test_a_launcher_leaves_precision_and_compilation_to_the_script(name):
    environment = prepare_multi_gpu_env(launched(name, "--num_processes", "2"))
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment["ACCELERATE_DYNAMO_BACKEND"] == "NO"
    assert ("ACCELERATE_USE_FSDP" in environment) == (name == "fsdp2")


def test_the_launcher_asks_for_the_fsdp_that_was_tried():
    environment = prepare_multi_gpu_env(launched("fsdp2", "--num_processes", "8"))
    assert {key: value for key, value in environment.items() if "FSDP" in key}.items() >= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    }.items()
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment


def test_the_launcher_asks_for_zero_of_stage_2_without_offloading():
    args = launched("deepspeed-zero2", "--num_processes", "8")
    args.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(args)
    assert {key: value for key, value in environment.items() if "DEEPSPEED" in key}.items() >= {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }.items()
    assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "1"


def test_machines_meet_at_the_first_one():
    flags = ["--num_processes", "16", "--machine_rank", "1"]
    args = launched("multi-node", *flags, "--main_process_ip", "node-0", "--main_process_port", "29511")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert (args.rdzv_endpoint, args.rdzv_backend) == ("node-0:29511", "static")


@pytest.mark.slow
def test_two_machines_train_together(tmp_path):
    """Both are this one: the launcher does not know."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    accelerate = str(Path(sys.executable).parent / "accelerate")
    launcher = [accelerate, "launch", "--config_file", str(find_launch_file("multi-node"))]
    meeting = ["--num_processes", "2", "--main_process_ip", "localhost", "--main_process_port", port]
    script = [str(ROOT / "scripts" / "continue_pretrain.py"), "--model", "test_resnet", "--from_scratch", "--use_cpu"]
    options = ["--image_size", "32", "--objective_args", "projector_dim=8", "--max_samples", "64", "--max_steps", "2"]
    more = ["--per_device_train_batch_size", "16", "--logging_steps", "1", "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    machines = [
        subprocess.Popen(
            [*launcher, *meeting, "--machine_rank", str(number), *script, *options, *more],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [machine.communicate(timeout=500)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()

"""docker-compose.yml and the Dockerfile, as far as no engine is needed: what a service with a GPU gets."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from common.settings.config import NodeSettings, load

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
GPU_SERVICES = ("prefill-gpu", "decode-gpu")


@functools.cache
def composed(**variables: str) -> dict[str, Any]:
    """The services, with everything filled in, as compose itself reads the file."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
        asked = [*command, "--profile", "gpu", "config"]
        done = subprocess.run(asked, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            services: dict[str, Any] = yaml.safe_load(done.stdout)["services"]
            return services
    pytest.skip("there is neither `docker compose` nor `docker-compose` that reads profiles")


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in service["environment"].items() if value is not None}


def test_every_gpu_service_sees_all_gpus_and_any_number_of_replicas_can_run() -> None:
    """CUDA IPC needs both GPUs in both processes, and common namespaces; a lease says whose is which."""
    services = composed()
    for name in GPU_SERVICES:
        service = services[name]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert str(device["count"]) in ("all", "-1")
        assert "device_ids" not in device
        assert (service["ipc"], service["pid"]) == ("host", "host")
        assert not {"container_name", "ports", "hostname"} & service.keys()
        settings = load(NodeSettings, service["command"][3:], environment_of(service))
        assert settings.engine.device == "cuda"
        assert settings.engine.gpu_memory_utilization == 0.9


def test_settings_of_a_gpu_and_what_is_visible_come_from_the_shell() -> None:
    given = {
        "PDQ_GPU_MEMORY_UTILIZATION": "0.4",
        "PDQ_SHARE_GPU": "true",
        "PDQ_GPU_NODES": "2",
        "PDQ_ENFORCE_EAGER": "1",
        "PDQ_MAX_NUM_BATCHED_TOKENS": "4096",
        "PDQ_DEVICE": "cuda:1",
    }
    for name in GPU_SERVICES:
        environ = environment_of(composed(**given, CUDA_VISIBLE_DEVICES="2,3")[name])
        settings = load(NodeSettings, [], environ)
        engine = settings.engine
        assert (engine.device, engine.gpu_memory_utilization, settings.gpu_nodes) == ("cuda:1", 0.4, 2)
        assert (engine.share_gpu, engine.enforce_eager, engine.max_num_batched_tokens) == (True, True, 4096)
        assert environ["CUDA_VISIBLE_DEVICES"] == "2,3"
        # An empty variable would hide all of them.
        assert "CUDA_VISIBLE_DEVICES" not in environment_of(composed()[name])


def test_the_cuda_build_of_torch_is_one_variable() -> None:
    index = "https://download.pytorch.org/whl/cu126"
    services = composed(TORCH_INDEX=index)
    for name in GPU_SERVICES:
        arguments = services[name]["build"]["args"]
        assert (arguments["DEVICE"], arguments["TORCH_INDEX"]) == ("cuda", index)
    arguments = services["decode"]["build"]["args"]
    assert (arguments["DEVICE"], arguments["TORCH_INDEX"]) == ("cpu", "https://download.pytorch.org/whl/cpu")
    assert re.findall(r"^ARG (\w+)", DOCKERFILE, re.M)[1:4] == ["DEVICE", "TORCH_INDEX", "DEVICE"]


def test_all_that_is_compiled_on_a_gpu_lies_in_the_volume() -> None:
    places = dict(re.findall(r"((?:TRITON|CUDA)_CACHE_(?:DIR|PATH))=(\S+)", DOCKERFILE))
    assert set(places) == {"TRITON_CACHE_DIR", "CUDA_CACHE_PATH"}
    for name in GPU_SERVICES:
        mounted = [volume for volume in composed()[name]["volumes"] if _source(volume) == "cache"]
        targets = [PurePosixPath(_target(volume)) for volume in mounted]
        for place in places.values():
            assert any(PurePosixPath(place).is_relative_to(target) for target in targets)


def _source(volume: Any) -> str:
    return str(volume["source"] if isinstance(volume, dict) else volume.split(":")[0])


def _target(volume: Any) -> str:
    return str(volume["target"] if isinstance(volume, dict) else volume.split(":")[1])

"""The devices there are, and the one place where one of them is chosen."""

from __future__ import annotations

from common.engine.devices.cpu.device import CpuDevice
from common.engine.devices.cuda.device import CudaDevice
from common.engine.devices.device import Device
from common.errors import ConfigError
from common.settings.config import EngineSettings

# By their names in the settings; `auto` is the first that this machine has.
DEVICES: dict[str, type[Device]] = {"cuda": CudaDevice, "cpu": CpuDevice}


def choose_device(settings: EngineSettings) -> Device:
    """The device that all parts of one engine use. `ConfigError` where the machine lacks it."""
    name = settings.device.partition(":")[0]
    if name == "auto":
        kind = next(kind for kind in DEVICES.values() if kind.is_present())
    elif name in DEVICES:
        kind = DEVICES[name]
    else:
        raise ConfigError(f"device {name!r} is none of auto, {', '.join(DEVICES)}", param="device")
    if not kind.is_present():
        raise ConfigError(
            f"device {settings.device} is set, but torch finds no {name.upper()} device", param="device"
        )
    return kind(settings)

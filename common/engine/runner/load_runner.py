"""Which runner an engine has: one that waits for its device, or one for a device with a queue."""

from __future__ import annotations

from common.engine.devices.choice import choose_device
from common.engine.runner.loaded_model import Storage
from common.engine.runner.model_runner import ModelRunner
from common.engine.runner.queue_runner import QueueRunner
from common.settings.config import EngineSettings


def load_runner(settings: EngineSettings, *, storage: Storage | None = None) -> ModelRunner | QueueRunner:
    """By the thread that will submit steps. Raises `ModelError`, `ConfigError` or `InsufficientMemory`."""
    device = choose_device(settings)
    queue = device.queue()
    if queue is None:
        return ModelRunner(settings, storage=storage, device=device)
    return QueueRunner(settings, device, queue, storage=storage)

"""What a site does with a model: load it, train it, give the update, keep the state. On one device, or on several."""

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.engine.device import Devices
from fomoe_flwr.engine.local import Engine, EngineState, Report
from fomoe_flwr.engine.optimizer import Moments
from fomoe_flwr.model.spec import Residents

__all__ = ["Engine", "EngineState", "Moments", "Report", "engine_on"]


def engine_on(devices: Devices, model: ModelConfig, residents: Residents, routing: str) -> Engine:
    """An engine with these residents.

    Raises:
        ConfigError: devices that cannot be divided into such domains.
        WorkerError: the processes of several devices do not start.
    """
    if devices.number == 1:
        return Engine(model, residents, routing, devices.device)
    # Only here: a site with one device need not wait for PyTorch's distributed part.
    from fomoe_flwr.engine.several import Member
    from fomoe_flwr.engine.team import team_of

    team = team_of(devices.number, devices.device)
    return Member(model, residents, routing, devices.parallel, devices.domain, team=team)

"""What a site does with a model: load it, train it, give the update, keep the state. One device."""

from fomoe_flwr.engine.adamw import Moments
from fomoe_flwr.engine.local import Engine, EngineState, Report

__all__ = ["Engine", "EngineState", "Moments", "Report"]

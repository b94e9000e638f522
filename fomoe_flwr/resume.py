"""`resume=RUN_DIR_OR_CHECKPOINT`: the overrides of that run, the new ones on top, in that run's directory."""

from __future__ import annotations

from collections.abc import Sequence

from fomoe_flwr.checkpoint import resume_from
from fomoe_flwr.compose import Composed, compose, merge_overrides


def resumed_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides as they are, or completed by those of the run that `resume=` names.

    Raises:
        CheckpointError: nothing there to resume from.
    """
    where = next((item.partition("=")[2] for item in overrides if item.startswith("resume=")), "null")
    if where in ("null", ""):
        return list(overrides)
    run_dir, checkpoint = resume_from(where)
    merged = merge_overrides(checkpoint.manifest["overrides"], overrides)
    if not any(item.startswith("hydra.run.dir=") for item in merged):
        merged.append(f"hydra.run.dir={run_dir}")
    return merged


def compose_run(overrides: Sequence[str]) -> Composed:
    """`compose`, with `resume=` followed."""
    return compose(resumed_overrides(overrides))

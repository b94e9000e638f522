"""From Hydra overrides to a checked configuration: the one way in for `fomoe train`, `flwr run` and sweeps."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fomoe_flwr.checks import check_combinations, check_fields, check_outer, expand_sites
from fomoe_flwr.config import REMOVED, FederationConfig, RunConfig, SiteConfig
from fomoe_flwr.errors import ConfigError


@dataclass(frozen=True)
class Composed:
    """What `compose` returns: the configuration, where the run lives, and the overrides that made it."""

    config: RunConfig
    run_dir: Path
    sweep_dir: Path  # of a multirun
    overrides: tuple[str, ...]  # without resume= and those of Hydra itself


def conf_dir() -> Path:
    """Where the YAML files are: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(
        f"conf/config.yaml is neither in {package} nor beside it; the installation is incomplete"
    )


def register_schema() -> None:
    """Make the dataclasses known to Hydra; `conf/config.yaml` names them in its defaults list."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)


def compose(overrides: Sequence[str]) -> Composed:
    """Compose, check and complete the configuration from Hydra override strings.

    Raises:
        ConfigError: one line naming the key, the value and what is allowed.
    """
    register_schema()
    for item in overrides:
        if item in ("hydra.run.dir=", "hydra.sweep.dir="):
            raise ConfigError(f"{item} is empty; give a path, or leave the key out")
    overrides = rewrite_federation_file(overrides)
    GlobalHydra.instance().clear()  # a process may compose more than once (tests, sweeps)
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            tree = hydra_compose("config", list(overrides), return_hydra_config=True)
            run_dir, sweep_dir = Path(str(tree.hydra.run.dir)), Path(str(tree.hydra.sweep.dir))
            config = from_tree(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    except (ValueError, AssertionError) as error:  # Hydra's own, of `model=1` and `+=`
        raise ConfigError(f"{' '.join(overrides)}: {one_line(error) or 'not an override'}") from error
    return Composed(config, run_dir.absolute(), sweep_dir.absolute(), task_overrides(overrides))


def task_overrides(overrides: Iterable[str]) -> tuple[str, ...]:
    """What a later `resume=` needs to compose this configuration again."""
    return tuple(item for item in overrides if not item.lstrip("+~").startswith(("hydra.", "resume=")))


def from_tree(tree: DictConfig, saved: bool = False) -> RunConfig:
    """A checked `RunConfig` from the tree that Hydra composed.

    Args:
        saved: it was written by a run, perhaps of an earlier version, whose keys may be gone (`REMOVED`).

    Raises:
        ConfigError: an impossible value or combination.
    """
    task = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
    # Merged once more into the bare schema, as plain values: `+key=value` gets past Hydra, but not past this.
    values: dict[str, Any] = OmegaConf.to_container(task, resolve=True)  # type: ignore[assignment]
    if saved:
        _renew(values)
    merged = OmegaConf.merge(OmegaConf.structured(RunConfig), values)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RunConfig)
    check_fields(config, names=not saved)
    if config.federation.path is not None:
        num_sites = config.federation.num_sites
        config.federation = _read_federation(config.federation.path)
        if num_sites is not None:  # given beside the file; a list of sites in it must agree
            config.federation.num_sites = num_sites
        check_fields(config, names=not saved)
    config.federation.sites = expand_sites(config.federation)
    config.federation.num_sites = len(config.federation.sites)
    check_combinations(config)
    if not saved:  # earlier versions took keys that they did not use
        check_outer(config.strategy)
    return config


def earlier_placement(values: Mapping[str, Any]) -> str | None:
    """strategy.placement of a run whose version said by plan.policy of which kind its plan was; else None."""
    plan, strategy = values.get("plan"), values.get("strategy")
    if not isinstance(plan, dict) or not isinstance(strategy, dict) or strategy.get("placement") != "planned":
        return None
    return None if plan.get("policy") in (None, "solver") else str(plan["policy"])


def _renew(values: dict[str, Any]) -> None:
    """Take out what earlier versions had in a run's config.yaml (`REMOVED`)."""
    if (placement := earlier_placement(values)) is not None:
        values["strategy"]["placement"] = placement
    for section, _, name in (key.partition(".") for key in REMOVED):
        if isinstance(values.get(section), dict):
            values[section].pop(name, None)


def _read_federation(path: str) -> FederationConfig:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"federation.path={path}: no such file")
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(FederationConfig), OmegaConf.load(file))
        federation = OmegaConf.to_object(loaded)
    except OmegaConfBaseException as error:
        raise ConfigError(f"federation.path={path}: {one_line(error)}") from error
    except (YAMLError, OSError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"federation.path={path}: not a YAML file ({one_line(error)})") from error
    assert isinstance(federation, FederationConfig)
    # From here on the sites themselves are the configuration.
    federation.name, federation.path = file.stem, None
    return federation


def rewrite_federation_file(overrides: Sequence[str]) -> list[str]:
    """Let `federation=some/file.yaml` mean a file of the user's, which a Hydra group alone cannot name."""
    rewritten: list[str] = []
    for item in overrides:
        key, _, value = item.partition("=")
        if key == "federation" and value.endswith((".yaml", ".yml")):
            rewritten += ["federation=file", f"federation.path={value}"]
        else:
            rewritten.append(item)
    return rewritten


def merge_overrides(saved: Sequence[str], new: Sequence[str]) -> list[str]:
    """The saved overrides of a run with the user's new ones on top.

    Of one key the new one stays; and a new choice of a group (`federation=uniform`) replaces what was saved
    within that group (`federation.path=…`).
    """

    def key(item: str) -> str:
        return item.partition("=")[0].lstrip("+~")

    saved = [item for item in saved if key(item) not in REMOVED]
    replaced = {key(item) for item in new}
    groups = tuple(f"{name}." for name in replaced if "." not in name)
    return [item for item in saved if key(item) not in replaced and not key(item).startswith(groups)] + list(
        new
    )


def split_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The single jobs of a multirun, as Hydra's basic sweeper will make them.

    Raises:
        ConfigError: an override that Hydra cannot parse.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(one_line(error)) from error
    batches: list[list[list[str]]] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [job for batch in batches for job in batch]


# ----- errors


def known_keys(config_type: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, dotted."""
    for spec in dataclasses.fields(config_type):
        yield prefix + spec.name
        section: Any = spec.default_factory
        if dataclasses.is_dataclass(section):
            yield from known_keys(section, f"{prefix}{spec.name}.")  # type: ignore[arg-type]


def one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's many-line messages as one line with key, value and what is allowed."""
    causes: list[str] = []
    current: BaseException | None = error
    while current is not None:
        causes.append(str(current))
        current = current.__cause__
    text = "\n".join(causes)
    if match := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"{match[1]}={match[2]}: no such option; allowed are {', '.join(sorted(options))}"
    overridden = re.search(r"Could not override '([^']+)'", text)
    unknown = re.search(r"Key '[^']+' (?:is )?not in[\s\S]*?full_key: (\S+)", text) or overridden
    if unknown:
        key = unknown[1]
        if key in REMOVED:
            instead = f"; use {REMOVED[key]}" if REMOVED[key] else ""
            return f"{key}: unknown key, removed in this version{instead}"
        # A key of one of the sites comes without the list it stands in.
        within = f"{overridden[1]}: " if overridden and overridden[1] != key else ""
        close = difflib.get_close_matches(key, [*known_keys(), *known_keys(SiteConfig)], n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{within}{key}: unknown key{hint}"
    full_key = re.search(r"full_key: (\S+)", text)
    mistyped = re.search(r"Value '([^\n]*)' of type '[^\n]*' could not be converted to (\w+)", text)
    if full_key and mistyped:
        wanted = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
        return f"{full_key[1]}={mistyped[1]}: must be {wanted.get(mistyped[2], mistyped[2])}"
    if full_key:  # Hydra names key and value, the last cause says in its first line what is wrong with them
        merging = re.search(r"Error merging override ([^\n]+)", text)
        return f"{merging[1] if merging else full_key[1]}: {causes[-1].splitlines()[0]}"
    return " ".join(causes[0].split())

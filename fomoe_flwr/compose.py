"""From Hydra overrides to a checked configuration: the one way in for `fomoe train`, `flwr run` and sweeps."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from fomoe_flwr.checks import (
    check_combinations,
    check_fields,
    check_outer,
    check_schedule,
    check_source,
    expand_sites,
)
from fomoe_flwr.config import (
    PLANNED,
    REMOVED,
    FederationConfig,
    ModelConfig,
    RunConfig,
    SiteConfig,
    absolute,
    path_keys,
    schema,
)
from fomoe_flwr.errors import ConfigError, DataError
from fomoe_flwr.files import expanded
from fomoe_flwr.overrides import check_single, keys_of, literal, read_overrides, task_overrides, texts


@dataclass(frozen=True)
class Composed:
    """What `compose` returns: the configuration, where the run lives, and the overrides that made it."""

    config: RunConfig
    run_dir: Path
    sweep_dir: Path  # of a multirun
    overrides: tuple[str, ...]  # see `task_overrides`
    asked: frozenset[str] = frozenset()  # keys that the command itself gave, and not the run that it resumes


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


def compose(overrides: Sequence[str | Override]) -> Composed:
    """Compose, check and complete the configuration from Hydra overrides, read or not.

    Raises:
        ConfigError: one line naming the key, the value and what is allowed.
    """
    given = read_overrides(overrides)
    with _composing(given) as tree:
        run_dir, sweep_dir = Path(str(tree.hydra.run.dir)), Path(str(tree.hydra.sweep.dir))
        config = from_tree(tree, given=keys_of(given))
    return Composed(config, run_dir.absolute(), sweep_dir.absolute(), task_overrides(given, tree))


def as_in_conf(overrides: Sequence[Override]) -> dict[str, Any]:
    """What the files of `conf/` make of these overrides, by section: neither checked nor completed.

    Raises:
        ConfigError: see `compose`.
    """
    with _composing(overrides) as tree:
        task = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
        values: dict[str, Any] = OmegaConf.to_container(task, resolve=False)  # type: ignore[assignment]
    return values


@contextmanager
def _composing(given: Sequence[Override]) -> Iterator[DictConfig]:
    """What Hydra composes, while it can be resolved."""
    register_schema()
    check_single(given)
    GlobalHydra.instance().clear()  # a process may compose more than once (tests, sweeps)
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            yield hydra_compose("config", texts(given), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    except (ValueError, AssertionError) as error:  # Hydra's own, of `model=1` and `+=`
        raise ConfigError(f"{' '.join(texts(given))}: {one_line(error) or 'not an override'}") from error


def from_tree(tree: DictConfig, saved: bool = False, given: Collection[str] = ()) -> RunConfig:
    """A checked `RunConfig` from the tree that Hydra composed.

    Args:
        saved: it was written by a run, perhaps of an earlier version, whose keys may be gone (`REMOVED`), perhaps
            on another machine: what looks like an interpolation is text.
        given: keys that the user gave; the others may follow from them.

    Raises:
        ConfigError: an impossible value or combination.
    """
    task = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
    # Merged once more into the bare schema, as plain values: `+key=value` gets past Hydra, but not past this.
    values: dict[str, Any] = OmegaConf.to_container(task, resolve=not saved)  # type: ignore[assignment]
    if saved:
        _renew(values)
    else:
        _make_absolute(values)
    merged = OmegaConf.merge(OmegaConf.structured(RunConfig), _literally(values))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RunConfig)
    check_fields(config, names=not saved)
    if not saved:
        if config.init_from is not None and config.resume is None:
            # It imports PyTorch.
            from fomoe_flwr.init_from import take_model

            take_model(config, given)
        _complete_model(config, given)
        _find_document_end(config, given)
    if config.federation.path is not None:
        num_sites = config.federation.num_sites
        config.federation = _read_federation(config.federation.path)
        if num_sites is not None:  # given beside the file; a list of sites in it must agree
            config.federation.num_sites = num_sites
        check_fields(config, names=not saved)
    config.federation.sites = expand_sites(config.federation)
    config.federation.num_sites = len(config.federation.sites)
    if not saved and "model.standins" not in given and not _may_have_standins(config):
        config.model.standins = 0
    strategy = config.strategy
    if strategy.down == "topk" and strategy.down_density is None:
        strategy.down_density = min(strategy.density * len(config.federation.sites), 1.0)
    check_combinations(config)
    if not saved:  # earlier versions took keys that they did not use
        check_outer(config.strategy)
        check_source(config.data)
        check_schedule(config.train)
    return config


def _find_document_end(config: RunConfig, given: Collection[str]) -> None:
    """Of data.document_mask.

    Raises:
        ConfigError: it is given, or the tokenizer cannot be read.
    """
    model, data = config.model, config.data
    if "model.document_end" in given:
        raise ConfigError(
            f"model.document_end={model.document_end}: follows from data.tokenizer with data.document_mask=true; "
            "leave it out"
        )
    model.document_end = None
    if data.document_mask:
        # It imports PyTorch.
        from fomoe_flwr.data.tokenizer import load_tokenizer

        try:
            model.document_end = load_tokenizer(data.tokenizer).eos_id
        except DataError as error:
            raise ConfigError(f"data.document_mask=true: {error}") from error


def _may_have_standins(config: RunConfig) -> bool:
    """Whether the default of model=hf says something: of ghosts that were trained before, and that a router asks."""
    strategy = config.strategy
    ghosts = strategy.placement in PLANNED or config.overlap < len(config.federation.sites)
    return config.trained_before and strategy.routing == "skip" and ghosts


def _complete_model(config: RunConfig, given: Collection[str]) -> None:
    """Of an architecture of transformers, read what describes it, and take the sizes from there.

    Raises:
        ConfigError: there is none, it is not known, or something is given that follows from it or that it lacks.
    """
    model = config.model
    if model.init == "checkpoint":
        if model.path is None:
            raise ConfigError("model.path=null: model.init=checkpoint (model=hf) needs model.path=FOLDER")
        if "data.tokenizer" not in given:
            # With another one its embeddings mean nothing. Whoever reads text says it if this is not there.
            config.data.tokenizer = str(Path(model.path) / "tokenizer.json")
    # A run that goes on has all of it in its overrides, and the folder may be gone.
    goes_on = config.resume is not None and model.hf
    if model.path is not None and not goes_on:
        _read_path(model, model.path, given)
    if not model.hf:
        if model.expert_layers is not None:
            raise ConfigError(
                f"model.expert_layers={model.expert_layers}: follows from model.hf, which is empty; leave it out"
            )
        return
    # Slow to import.
    from fomoe_flwr.model.stock import is_key, sizes_of

    for key in given:
        # A file of somebody else's may have keys that transformers does not know, an override must not.
        name = key.removeprefix("model.hf.")
        rest = {other: value for other, value in model.hf.items() if other != name}
        if name not in (key, "model_type") and not is_key(rest, name):
            raise ConfigError(f"{key}: unknown key of {model.hf.get('model_type')}")
    usual = ModelConfig()
    for key, size in sizes_of(model.hf).items():
        value = getattr(model, key)
        if value != size and (value != getattr(usual, key) or f"model.{key}" in given):
            raise ConfigError(f"model.{key}={value}: follows from model.hf, which has {size}; leave it out")
        setattr(model, key, size)
    check_fields(model, "model.")


def _read_path(model: ModelConfig, path: str, given: Collection[str]) -> None:
    """Take the architecture from the folder, what is given on top of it.

    Raises:
        ConfigError: its weights would not be read though nobody said so, or do not fit what is given.
    """
    # Slow to import.
    from fomoe_flwr.hf_files import read_architecture
    from fomoe_flwr.model.stock import other_shape

    if model.init == "random" and "model_type" in model.hf:
        raise ConfigError(
            f"model.path={path}: not read, for model={model.name} has an architecture of its own; to go on from a "
            "checkpoint give model=hf"
        )
    if model.init == "random" and "model.init" not in given:
        raise ConfigError(
            f"model.path={path}: its weights would not be read; to go on from them give model=hf, to begin its "
            "architecture anew model.init=random"
        )
    there = read_architecture(Path(path), f"model.path={path}")
    if model.init == "checkpoint" and (other := other_shape(there, model.hf)):
        key, has = other
        instead = "leave it out, or begin anew with model.init=random"
        if f"model.hf.{key}" not in given:
            instead = f"it comes with model={model.name}; give model=hf"
        raise ConfigError(
            f"model.hf.{key}={model.hf[key]!s:.80}: the checkpoint in model.path has {has!s:.80}; {instead}"
        )
    model.hf = there | model.hf


def _make_absolute(values: dict[str, Any]) -> None:
    """Paths as they are kept (`absolute`); what is no text is told by the schema."""
    for key in path_keys():
        *sections, name = key.split(".")
        within: Any = values
        for section in sections:
            within = within.get(section) if isinstance(within, dict) else None
        if isinstance(within, dict) and isinstance(within.get(name), str):
            within[name] = absolute(key, within[name])


def _literally(value: Any) -> Any:
    """The values as they are, with nothing left to resolve."""
    if isinstance(value, dict):
        return {key: _literally(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literally(item) for item in value]
    return literal(value) if isinstance(value, str) else value


def renamed(values: Mapping[str, Any]) -> dict[str, str]:
    """Today's keys for what a run of an earlier version said by others, and their values."""
    plan, strategy = values.get("plan"), values.get("strategy")
    found = {}
    if isinstance(strategy, dict):
        policy = plan.get("policy") if isinstance(plan, dict) else None
        if strategy.get("placement") == "planned" and policy not in (None, "solver"):
            found["strategy.placement"] = str(policy)
        if (dtype := strategy.get("wire_dtype")) is not None:
            found |= {"strategy.up": str(dtype), "strategy.down": str(dtype)}
    return found


def _renew(values: dict[str, Any]) -> None:
    """Take out what earlier versions had in a run's config.yaml (`REMOVED`)."""
    for key, value in renamed(values).items():
        section, _, name = key.partition(".")
        values[section][name] = value
    for section, _, name in (key.partition(".") for key in REMOVED):
        if isinstance(values.get(section), dict):
            values[section].pop(name, None)


class _AsWritten(get_yaml_loader()):  # type: ignore[misc]
    """YAML in which only null is no text: the schema makes the numbers, so that a site may be called 1e5 or no."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own
        first: [pair for pair in pairs if pair[0].endswith((":null", ":merge"))]
        for first, pairs in get_yaml_loader().yaml_implicit_resolvers.items()
    }


def _read_federation(path: str) -> FederationConfig:
    file = expanded(path)
    if not file.is_file():
        raise ConfigError(f"federation.path={path}: no such file")
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(FederationConfig), _load_yaml(file))
        federation = OmegaConf.to_object(loaded)
    except OmegaConfBaseException as error:
        raise ConfigError(f"federation.path={path}: {one_line(error)}") from error
    except (yaml.YAMLError, OSError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"federation.path={path}: not a YAML file ({one_line(error)})") from error
    assert isinstance(federation, FederationConfig)
    # From here on the sites themselves are the configuration.
    federation.name, federation.path = file.stem, None
    return federation


def _load_yaml(file: Path) -> Any:
    with file.open(encoding="utf-8") as stream:
        return OmegaConf.create(yaml.load(stream, Loader=_AsWritten) or {})


# ----- errors


def one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's many-line messages as one line with key, value and what is allowed."""
    causes: list[str] = []
    current: BaseException | None = error
    while current is not None:
        causes.append(str(current))
        current = current.__cause__
    text = "\n".join(causes)
    if match := re.search(r"Could not find '([^']+)/([^'/]*)'", text):
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
        known = [name for name, _ in (*schema(), *schema(SiteConfig))]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
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

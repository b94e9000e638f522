"""The typed schema of `conf/`, and the one `compose()` behind every way into the program.

Defaults live here, once, beside their meaning; the YAML files in `conf/` hold only what differs. Hydra merges
them into these dataclasses, so an unknown key or a wrong type stops before anything starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.placement import check_overlap

T = TypeVar("T")


def choice(default: str, *allowed: str) -> Any:
    """A string field that takes one of `allowed` (OmegaConf has no Literal)."""
    return field(default=default, metadata={"allowed": allowed})


def at_least(default: Any, minimum: float) -> Any:
    """A number with a lower bound; an optional one may also be null."""
    return field(default=default, metadata={"minimum": minimum})


@dataclass
class ModelConfig:
    """Sizes of the model (FoMoE, appendix B). `base_*` are those of the model whose lr was tuned (CompleteP)."""

    name: str = "tiny"
    vocab_size: int = at_least(264, 2)
    d_model: int = at_least(128, 8)
    num_layers: int = at_least(4, 1)
    num_heads: int = at_least(2, 1)
    num_experts: int = at_least(16, 1)  # N_e, routed experts in a layer
    d_expert: int = at_least(128, 8)  # width of one expert
    top_k: int = at_least(2, 1)  # experts chosen for a token
    num_shared_experts: int = at_least(0, 0)  # always on, synchronised as dense
    rope_theta: float = at_least(10_000.0, 1.0)
    norm_eps: float = at_least(1e-5, 0.0)
    init_std: float = at_least(0.02, 0.0)  # of the embedding; the other weights are scaled by fan-in
    base_d_model: int = at_least(256, 1)
    base_num_layers: int = at_least(4, 1)
    base_d_expert: int = at_least(128, 1)
    load_balance: float = at_least(0.01, 0.0)  # coefficient of the load-balancing loss
    experts_impl: str = choice("grouped", "grouped", "loop")


@dataclass
class SiteConfig:
    """One site, or `count` equal ones. What is null is unknown and not used."""

    name: str = "site"
    count: int = at_least(1, 1)
    memory_gib: float | None = at_least(None, 0.0)  # accelerator memory, GiB
    device: str | None = None  # overrides train.device: auto, cpu, cuda, cuda:1
    up_mbps: float | None = at_least(None, 0.0)  # link to the server, Mbit/s
    down_mbps: float | None = at_least(None, 0.0)
    latency_ms: float | None = at_least(None, 0.0)
    speed: float = at_least(1.0, 0.0)  # relative to the others
    domain: str | None = None  # data domain, for data.partition=domain


@dataclass
class FederationConfig:
    """Who takes part: `num_sites` equal sites, or `sites` one by one."""

    name: str = "uniform"
    path: str | None = None  # YAML file with the keys of this section, for federation=FILE
    num_sites: int | None = at_least(None, 1)  # M
    sites: list[SiteConfig] = field(default_factory=list)


@dataclass
class StrategyConfig:
    """Who holds what, what is averaged, and how the average is applied."""

    name: str = "fomoe"
    overlap: int | None = at_least(None, 1)  # O_e, sites holding each expert; null: all of them
    routing: str = choice("skip", "skip", "partitioned")
    placement: str = choice("fixed", "fixed", "random")
    reshuffle_every: int = at_least(1, 1)  # T, rounds between two random placements
    wire_dtype: str = choice("bf16", "bf16", "fp32")
    inner: str = choice("adamw", "adamw", "gradient")  # gradient: send the mean gradient of the K batches
    keep_moments: bool = True  # the inner optimizer's moments survive the round
    outer: str = choice("nesterov", "nesterov", "local_adamw", "average", "adamw")
    outer_lr: float = at_least(0.7, 0.0)  # nesterov
    outer_momentum: float = at_least(0.9, 0.0)  # nesterov
    expert_weighting: str = choice("tokens", "tokens", "routed")  # routed: by tokens the expert really got
    fraction_train: float = at_least(1.0, 0.0)  # share of the sites asked to train in a round
    fraction_evaluate: float = at_least(0.0, 0.0)  # share of the sites asked to evaluate their shard
    min_train_nodes: int = at_least(1, 1)
    min_evaluate_nodes: int = at_least(1, 0)
    min_available_nodes: int | None = at_least(None, 1)  # nodes to wait for; null: all sites
    min_replies: int = at_least(1, 1)  # a round with fewer good replies ends the run
    timeout_s: float = at_least(3600.0, 0.0)  # longest wait for a round's replies


@dataclass
class TrainConfig:
    """The local loop (FoMoE, algorithm 2) and the evaluation on the server."""

    rounds: int = at_least(10, 0)
    local_steps: int = at_least(20, 1)  # K
    batch_size: int = at_least(8, 1)  # sequences a step and site
    seq_len: int = at_least(256, 2)
    # Of the base model (CompleteP). The paper's 0.01 is for 2 M tokens a batch; this suits thousands.
    lr: float = at_least(0.003, 0.0)
    beta1: float = at_least(0.9, 0.0)
    beta2: float = at_least(0.95, 0.0)
    eps: float = at_least(1e-8, 0.0)
    weight_decay: float = at_least(0.0, 0.0)
    grad_clip: float = at_least(1.0, 0.0)  # global norm; 0: off
    # Warm-up is counted in steps and not as a share of the run (the paper: 25 %), so that a run that is
    # prolonged or resumed begins exactly as the shorter one did. warmup_fraction, if set, takes its place.
    warmup_steps: int = at_least(50, 0)
    warmup_fraction: float | None = at_least(None, 0.0)
    expert_warmup_steps: int = at_least(20, 0)  # for an expert new to a site
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: str = choice("fp32", "fp32", "bf16")  # of the matrix products; weights stay fp32
    compile: bool = False  # torch.compile
    threads: int = at_least(1, 0)  # CPU threads a site; 0: PyTorch's default
    eval_batches: int = at_least(16, 0)  # validation batches on the server after a round; 0: off
    eval_every: int = at_least(1, 1)  # rounds


@dataclass
class DataConfig:
    """The corpus, its tokens, and how documents are dealt to sites."""

    name: str | None = None  # data=huggingface: name of the data set
    source: str = choice("stdlib", "stdlib", "text", "jsonl", "parquet", "huggingface")
    path: str | None = None  # file or folder
    config_name: str | None = None  # data=huggingface: configuration of the data set
    split: str = "train"  # data=huggingface: which split to read
    text_key: str = "text"  # field with the text (jsonl, parquet, huggingface)
    domain_key: str | None = None  # field with the domain
    max_documents: int | None = at_least(None, 1)
    tokenizer: str = "bytes"  # or the path of a tokenizer.json
    partition: str = choice("iid", "iid", "domain", "dirichlet")
    dirichlet_alpha: float = at_least(0.5, 0.0)
    val_fraction: float = at_least(0.05, 0.0)  # share of documents kept for validation
    cache_dir: str | None = None  # token cache; null: $FOMOE_CACHE or ~/.cache/fomoe-flwr


@dataclass
class RuntimeConfig:
    """What carries the messages when `fomoe train` starts the run (`flwr run` brings its own)."""

    name: str = choice("flower", "flower", "local")
    workers: int | None = at_least(None, 1)  # local: sites at a time; null: one a core, one on a GPU
    cpus_per_site: int = at_least(1, 1)  # flower: resources of a simulated site
    gpus_per_site: float = at_least(0.0, 0.0)


@dataclass
class CheckpointConfig:
    """When the run is saved and how much of it is kept."""

    every: int = at_least(1, 0)  # rounds; 0: only the last round
    keep: int = at_least(3, 1)  # checkpoints kept, on the server and of each site's state


@dataclass
class WandbConfig:
    """Weights & Biases. Offline writes into the run directory and needs no account."""

    mode: str = choice("offline", "offline", "online", "disabled")
    project: str = "fomoe-flwr"
    entity: str | None = None
    group: str | None = None


@dataclass
class RunConfig:
    """Everything a run needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    seed: int = at_least(42, 0)
    resume: str | None = None  # a run directory or one of its checkpoints

    @property
    def overlap(self) -> int:
        """O_e with null resolved to all sites."""
        return self.strategy.overlap or len(self.federation.sites)

    @property
    def warmup_steps(self) -> int:
        """Length of the linear warm-up in global steps."""
        train = self.train
        if train.warmup_fraction is None:
            return train.warmup_steps
        return round(train.warmup_fraction * train.rounds * train.local_steps)


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


def from_tree(tree: DictConfig) -> RunConfig:
    """A checked `RunConfig` from the tree that Hydra composed.

    Raises:
        ConfigError: an impossible value or combination.
    """
    task = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
    # Merged once more into the bare schema, as plain values: `+key=value` gets past Hydra, but not past this.
    merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.to_container(task, resolve=True))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RunConfig)
    if config.federation.path is not None:
        num_sites = config.federation.num_sites
        config.federation = _read_federation(config.federation.path)
        if num_sites is not None:  # given beside the file; a list of sites in it must agree
            config.federation.num_sites = num_sites
    check_fields(config)
    config.federation.sites = expand_sites(config.federation)
    config.federation.num_sites = len(config.federation.sites)
    check_combinations(config)
    return config


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


def expand_sites(federation: FederationConfig) -> list[SiteConfig]:
    """One entry per site: `count` unrolled to name-0, name-1, …; `num_sites` alone gives site-0, site-1, …

    Raises:
        ConfigError: no site, two of one name, or a `num_sites` that contradicts the list.
    """
    if not federation.sites:
        if federation.num_sites is None:
            raise ConfigError(
                "federation.num_sites=null: give a number of sites or list them in federation.sites"
            )
        return [SiteConfig(name=f"site-{index}") for index in range(federation.num_sites)]
    sites = []
    for site in federation.sites:
        names = [site.name] if site.count == 1 else [f"{site.name}-{index}" for index in range(site.count)]
        sites += [dataclasses.replace(site, name=name, count=1) for name in names]
    names = [site.name for site in sites]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"federation.sites: two sites are named {min(duplicates)!r}; names must differ")
    if federation.num_sites not in (None, len(sites)):
        raise ConfigError(f"federation.num_sites={federation.num_sites}: the list has {len(sites)} sites")
    return sites


def check_fields(config: Any, prefix: str = "") -> None:
    """Hold every field against the choices and bounds in its metadata.

    Raises:
        ConfigError: the first value that is not allowed.
    """
    for spec in dataclasses.fields(config):
        key, value = f"{prefix}{spec.name}", getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{key}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    check_fields(item, f"{key}[{index}].")
        elif value is not None:
            allowed, minimum = spec.metadata.get("allowed"), spec.metadata.get("minimum")
            if allowed and value not in allowed:
                raise ConfigError(f"{key}={value}: allowed are {', '.join(allowed)}")
            if minimum is not None and not value >= minimum:  # written so that nan fails too
                raise ConfigError(f"{key}={value}: must be at least {minimum:g}")


def check_combinations(config: RunConfig) -> None:
    """What no single field can say.

    Raises:
        ConfigError: the first impossible combination.
    """
    model, strategy, train, data = config.model, config.strategy, config.train, config.data
    num_sites = len(config.federation.sites)
    check_overlap(num_sites, model.num_experts, config.overlap)
    if model.d_model % model.num_heads or (model.d_model // model.num_heads) % 2:
        raise ConfigError(
            f"model.num_heads={model.num_heads}: must divide d_model={model.d_model} into heads of even width"
        )
    for key in ("d_model", "d_expert"):
        if getattr(model, key) % 8:
            raise ConfigError(
                f"model.{key}={getattr(model, key)}: must be a multiple of 8 (grouped_mm strides)"
            )
    if model.top_k > model.num_experts:
        raise ConfigError(f"model.top_k={model.top_k}: at most model.num_experts={model.num_experts}")
    for key in ("fraction_train", "fraction_evaluate"):
        if getattr(strategy, key) > 1:
            raise ConfigError(f"strategy.{key}={getattr(strategy, key)}: a share, at most 1")
    if not 0 < data.val_fraction < 1:
        raise ConfigError(f"data.val_fraction={data.val_fraction}: must lie between 0 and 1")
    for key, value in (("train.beta1", train.beta1), ("train.beta2", train.beta2)):
        if value >= 1:
            raise ConfigError(f"{key}={value}: must be below 1")
    if strategy.outer == "local_adamw" and strategy.inner != "adamw":
        raise ConfigError(
            f"strategy.inner={strategy.inner}: strategy.outer=local_adamw averages AdamW's moments"
        )
    for key, device in (
        ("train.device", train.device),
        *((f"{s.name}.device", s.device) for s in config.federation.sites),
    ):
        if device is not None and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ConfigError(f"{key}={device}: allowed are auto, cpu, cuda, cuda:N")
    if data.source in ("text", "jsonl", "parquet") and data.path is None:
        raise ConfigError(f"data.path=null: data={data.source} needs data.path=FILE_OR_FOLDER")
    if data.source == "huggingface" and data.name is None:
        raise ConfigError("data.name=null: data=huggingface needs data.name=NAME")


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
    """The saved overrides of a run with the user's new ones on top: of one key, the new one stays."""
    replaced = {item.partition("=")[0].lstrip("+~") for item in new}
    return [item for item in saved if item.partition("=")[0].lstrip("+~") not in replaced] + list(new)


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


def to_json(config: Any) -> str:
    """A configuration dataclass as JSON text, the form in which it travels to a site."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True, separators=(",", ":"))


def from_dict(config_type: type[T], values: dict[str, Any]) -> T:
    """The inverse of `dataclasses.asdict` for a section without nested sections (a site's part).

    Raises:
        ConfigError: a key this version does not know.
    """
    known = {spec.name for spec in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise ConfigError(
            f"{config_type.__name__}.{unknown[0]}: unknown key; server and site differ in version"
        )
    return config_type(**values)

"""What a configuration must satisfy beyond the types of its fields. Each error is one line: key, value, allowed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from fomoe_flwr.codecs import LOSSY
from fomoe_flwr.config import (
    DEVICE_RULE,
    DEVICES_RULE,
    NAME_RULE,
    PLANNED,
    DataConfig,
    FederationConfig,
    RunConfig,
    SiteConfig,
    StrategyConfig,
    TrainConfig,
    is_device,
    is_devices,
    is_name,
)
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.placement import check_overlap
from fomoe_flwr.schedule import lr_schedule
from fomoe_flwr.turns import count_layers
from fomoe_flwr.untrusted import one_line

STORES = ("file", "s3", "gs", "az")
MOST_PARTS = 1000  # of a mixture, so that each has some of its 10,000 sequences
FILE_SOURCES = ("text", "jsonl", "parquet", "tokens")
# So that a slip of the finger does not fill the memory, or end in a crash of PyTorch.
MOST_SITES = 100_000
MOST_THREADS = 1024
# A step moves an average by (1 - beta) of what it differs from the gradient. Of less than half of bf16's last bit
# nothing is left: of a difference of 20 % with this, of 39 % with 0.99.
MOST_BETA_IN_BF16 = 0.98


def expand_sites(federation: FederationConfig) -> list[SiteConfig]:
    """One entry per site: `count` unrolled to name-0, name-1, …; `num_sites` alone gives site-0, site-1, …

    Raises:
        ConfigError: no site, two of one name, or a `num_sites` that contradicts the list.
    """
    wanted = sum(site.count for site in federation.sites) or federation.num_sites or 0
    if wanted > MOST_SITES:
        key = "count" if federation.sites else "num_sites"
        raise ConfigError(f"federation.{key}: {wanted} sites; at most {MOST_SITES} are allowed")
    if not federation.sites:
        if federation.num_sites is None:
            raise ConfigError(
                "federation.num_sites=null: give a number of sites or list them in federation.sites"
            )
        return [SiteConfig(name=f"site-{index}") for index in range(federation.num_sites)]
    sites = []
    for site in federation.sites:
        if site.count > 1 and site.data_path is not None:
            raise ConfigError(
                f"federation.sites: data_path={site.data_path} of {site.count} sites {site.name}: text of its own is "
                "one site's; list the sites one by one"
            )
        names = [site.name] if site.count == 1 else [f"{site.name}-{index}" for index in range(site.count)]
        sites += [dataclasses.replace(site, name=name, count=1) for name in names]
    names = [site.name for site in sites]
    if duplicates := {name for name, times in Counter(names).items() if times > 1}:
        raise ConfigError(f"federation.sites: two sites are named {min(duplicates)!r}; names must differ")
    if federation.num_sites not in (None, len(sites)):
        raise ConfigError(f"federation.num_sites={federation.num_sites}: the list has {len(sites)} sites")
    return sites


def check_fields(config: Any, prefix: str = "", names: bool = True) -> None:
    """Hold every field against the choices and bounds in its metadata.

    Args:
        names: False for a run that is there already: earlier versions took any name of a site, and empty values.

    Raises:
        ConfigError: the first value that is not allowed.
    """
    for spec in dataclasses.fields(config):
        key, value = f"{prefix}{spec.name}", getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{key}.", names)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    check_fields(item, f"{key}[{index}].", names)
        elif value is not None:
            kind = spec.metadata.get("kind")
            if kind == "name" and names and not is_name(value):
                raise ConfigError(f"{key}={value!r:.80}: a name has {NAME_RULE}")
            if kind == "path" and not value.strip():
                raise ConfigError(f"{key}= is empty; give a path, or leave the key out")
            if names and isinstance(value, str) and not value.strip():
                raise ConfigError(f"{key}= is empty; give a value, or leave the key out")
            allowed, minimum = spec.metadata.get("allowed"), spec.metadata.get("minimum")
            maximum = spec.metadata.get("maximum")
            if allowed and value not in allowed:
                raise ConfigError(f"{key}={value}: allowed are {', '.join(allowed)}")
            if minimum is not None and not (value >= minimum and math.isfinite(value)):  # nan fails too
                raise ConfigError(f"{key}={value}: must be at least {minimum:g}")
            if maximum is not None and value > maximum:
                raise ConfigError(f"{key}={value!s:.40}: at most {maximum} are allowed")
            above = spec.metadata.get("above")
            if above is not None and not (value > above and math.isfinite(value)):
                raise ConfigError(f"{key}={value}: must be above {above:g}")


def check_combinations(config: RunConfig) -> None:
    """What no single field can say.

    Raises:
        ConfigError: the first impossible combination.
    """
    model, strategy, train, data = config.model, config.strategy, config.train, config.data
    num_sites = len(config.federation.sites)
    if strategy.placement not in ("planned", "memory"):
        check_overlap(num_sites, model.num_experts, config.overlap)
    elif config.overlap > num_sites:
        raise ConfigError(f"strategy.overlap={config.overlap}: at most the number of sites, {num_sites}")
    if not model.hf and (model.d_model % model.num_heads or (model.d_model // model.num_heads) % 2):
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
    _check_routing(config)
    if config.store != "flower":
        check_store(config.store)
    if model.hf:
        _check_stock(config, model.hf)
    if strategy.sole_every > 1 and config.overlap > 1 and strategy.placement not in ("planned", "memory"):
        raise ConfigError(
            f"strategy.sole_every={strategy.sole_every}: of experts that one site alone holds; here each has "
            f"{config.overlap} holders; give strategy.overlap=1, or leave it out"
        )
    if strategy.fragments > 1 and strategy.fragments > (layers := count_layers(model, strategy.routing)):
        raise ConfigError(
            f"strategy.fragments={strategy.fragments}: at most the number of layers, {layers}, of which each fragment "
            "has at least one"
        )
    for key in ("fraction_train", "fraction_evaluate", "quorum", "expert_quorum"):
        if getattr(strategy, key) > 1:
            raise ConfigError(f"strategy.{key}={getattr(strategy, key)}: a share, at most 1")
    if 0 < strategy.clip < 1:
        raise ConfigError(f"strategy.clip={strategy.clip}: must be 0 (off) or at least 1")
    for key, share in (("skip_price", config.skip_price), ("mfu", config.plan.mfu)):
        if share > 1:
            raise ConfigError(f"plan.{key}={share}: a share, at most 1")
    if strategy.placement == "affine" and strategy.routing == "partitioned" and not config.trained_before:
        raise ConfigError(
            "strategy.placement=affine: needs strategy.routing=skip, where a router can ask for any expert, or "
            "model.init=checkpoint, or init_from"
        )
    for key in ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes"):
        if (getattr(strategy, key) or 0) > num_sites:
            raise ConfigError(
                f"strategy.{key}={getattr(strategy, key)}: at most the number of sites, {num_sites}"
            )
    if config.plan.holders > num_sites:
        raise ConfigError(f"plan.holders={config.plan.holders}: at most the number of sites, {num_sites}")
    if config.checkpoint.state == "files" and (strategy.inner, strategy.outer) == ("gradient", "adamw"):
        raise ConfigError(
            "checkpoint.state=files: not with strategy.inner=gradient strategy.outer=adamw, which clips the gradients "
            "of the whole model at once; use memory"
        )
    if not 0 < data.val_fraction < 1:
        raise ConfigError(f"data.val_fraction={data.val_fraction}: must lie between 0 and 1")
    least = min(
        [train.batch_size, *(site.batch_size or train.batch_size for site in config.federation.sites)]
    )
    if train.micro_batches > least:
        raise ConfigError(
            f"train.micro_batches={train.micro_batches}: at most the sequences of a step, {least} (train.batch_size, "
            "or a site's own)"
        )
    if train.threads > MOST_THREADS:
        raise ConfigError(f"train.threads={train.threads}: at most {MOST_THREADS}")
    for key, value in (("train.beta1", train.beta1), ("train.beta2", train.beta2)):
        if value >= 1:
            raise ConfigError(f"{key}={value}: must be below 1")
        if train.moments == "bf16" and value > MOST_BETA_IN_BF16:
            raise ConfigError(
                f"{key}={value}: at most {MOST_BETA_IN_BF16} with train.moments=bf16, in which an average that moves "
                "less in a step does not move at all"
            )
    if strategy.outer == "local_adamw" and strategy.inner != "adamw":
        raise ConfigError(
            f"strategy.inner={strategy.inner}: strategy.outer=local_adamw averages AdamW's moments"
        )
    for key, usual in (("optimizer", "adamw"), ("moments", "fp32"), ("weights", "fp32")):
        if (value := getattr(train, key)) == usual:
            continue
        if strategy.inner == "gradient":
            raise ConfigError(
                f"train.{key}={value}: not with strategy.inner=gradient, where sites take no steps; allowed is {usual}"
            )
        if strategy.outer == "local_adamw" and key != "weights":
            raise ConfigError(
                f"train.{key}={value}: not with strategy.outer=local_adamw, which averages AdamW's moments; allowed is "
                f"{usual}"
            )
    if train.weights == "bf16" and train.dtype != "bf16":
        raise ConfigError(f"train.weights=bf16: needs train.dtype=bf16; here it is {train.dtype}")
    if strategy.delay and model.balance == "global":
        raise ConfigError(
            "strategy.delay=1: not with model.balance=global, which goes by the federation's load of the round before; "
            "allowed is local"
        )
    for key, device in (
        ("train.device", train.device),
        *((f"{s.name}.device", s.device) for s in config.federation.sites),
    ):
        if device is not None and not is_device(device):
            raise ConfigError(f"{key}={device:.80}: allowed are {DEVICE_RULE}")
    _check_devices(config)
    check_mix(data)
    shared = data.partition != "own" and any(site.data_path is None for site in config.federation.sites)
    if data.source in FILE_SOURCES and data.path is None and (shared or train.eval_batches):
        raise ConfigError(
            f"data.path=null: data={data.source} needs data.path=FILE_OR_FOLDER, for "
            + (
                "the sites without data_path"
                if shared
                else "the server's validation (or train.eval_batches=0)"
            )
        )
    for site in config.federation.sites:
        if site.data_path is not None:
            check_own_source(data, f"federation.sites: data_path={site.data_path} of site {site.name}")
    if data.source == "huggingface" and data.name is None and data.path is None:
        raise ConfigError(
            "data.name=null: data=huggingface needs data.name=NAME, or data.path=FOLDER for one of save_to_disk"
        )


def check_schedule(train: TrainConfig) -> None:
    """Whether the decay lies within the steps that are given for it, and uses what is given.

    Raises:
        ConfigError: the first key that would do nothing, or another thing than its name says.
    """
    if train.final_lr > 1:
        raise ConfigError(f"train.final_lr={train.final_lr:g}: a share of train.lr, at most 1")
    for key, shapes in (("decay_until", ("cosine", "wsd")), ("decay_steps", ("wsd",))):
        if (value := getattr(train, key)) is not None and train.schedule not in shapes:
            raise ConfigError(f"train.{key}={value}: needs train.schedule={' or '.join(shapes)}")
    schedule = lr_schedule(train)
    if train.schedule != "constant" and train.rounds and schedule.decay_from < schedule.warmup_steps:
        raise ConfigError(
            f"train.decay_steps={schedule.decay_until - schedule.decay_from}: the decay would begin at step "
            f"{schedule.decay_from}, in the warm-up of {schedule.warmup_steps} (train.warmup_steps)"
        )
    if train.schedule == "cosine" and train.rounds and schedule.decay_until <= schedule.warmup_steps:
        raise ConfigError(
            f"train.decay_until={schedule.decay_until}: must be after the warm-up of {schedule.warmup_steps} steps "
            "(train.warmup_steps)"
        )


def check_source(data: DataConfig) -> None:
    """Whether the source reads what is named.

    Raises:
        ConfigError: the first key that would do nothing, so that another text would be taken.
    """
    if data.path is not None and data.source == "stdlib":
        raise ConfigError(
            f"data.path={data.path}: data.source=stdlib reads no path; give data=text (or jsonl, parquet, tokens, "
            "huggingface)"
        )
    if data.stream:
        usual = DataConfig()
        if data.source != "huggingface":
            raise ConfigError(
                f"data.stream=true: needs data=huggingface; data.source={data.source} is read whole"
            )
        for key in ("partition", "mix", "max_documents", "domain_key"):
            if (value := getattr(data, key)) != getattr(usual, key):
                raise ConfigError(
                    f"data.stream=true: not with data.{key}={value}, for which all is read before"
                )
    for key in ("name", "config_name"):
        if (value := getattr(data, key)) is not None and data.source != "huggingface":
            raise ConfigError(
                f"data.{key}={value}: data.source={data.source} has none; give data=huggingface"
            )


def check_mix(data: DataConfig) -> None:
    """Whether the weights of domains are weights.

    Raises:
        ConfigError: the first that is none, or too many.
    """
    for domain, weight in data.mix.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(
                f"data.mix: {domain:.80}={weight}: must be above 0; leave out what is not wanted"
            )
    if len(data.mix) > MOST_PARTS:
        raise ConfigError(f"data.mix: {len(data.mix)} domains; at most {MOST_PARTS}")


def check_outer(strategy: StrategyConfig) -> None:
    """Whether inner and outer optimizer fit each other, and use what is given for them.

    Raises:
        ConfigError: the first key that would do nothing, or another thing than its name says.
    """
    inner, outer = strategy.inner, strategy.outer
    if inner == "gradient" and outer != "adamw":
        raise ConfigError(
            f"strategy.inner=gradient: strategy.outer={outer} would take gradients for differences of parameters; "
            "allowed is strategy.outer=adamw"
        )
    has_lr = outer == "nesterov" or (outer == "adamw" and inner == "adamw")
    if strategy.outer_lr is not None and not has_lr:
        instead = "whose learning rate is train.lr" if outer == "adamw" else "which has no learning rate"
        raise ConfigError(
            f"strategy.outer_lr={strategy.outer_lr:g}: must be null with strategy.inner={inner} and "
            f"strategy.outer={outer}, {instead}"
        )
    if strategy.outer_momentum is not None and outer != "nesterov":
        raise ConfigError(
            f"strategy.outer_momentum={strategy.outer_momentum:g}: must be null with strategy.outer={outer}; "
            "only nesterov has it"
        )
    for key in ("up", "down"):
        if getattr(strategy, key) in LOSSY and outer == "local_adamw":
            raise ConfigError(
                f"strategy.{key}={getattr(strategy, key)}: not with strategy.outer=local_adamw, whose moments it would "
                "spoil; allowed are bf16, fp32"
            )
    if strategy.down in LOSSY and inner == "gradient":
        raise ConfigError(
            f"strategy.down={strategy.down}: not with strategy.inner=gradient, whose gradients would be of another "
            "model than the one that is stepped; allowed are bf16, fp32"
        )
    if strategy.delay and inner == "gradient":
        raise ConfigError(
            "strategy.delay=1: not with strategy.inner=gradient, whose gradients would be of another model than the "
            "one that is stepped; allowed is adamw"
        )
    if strategy.delay and outer not in ("nesterov", "average"):
        raise ConfigError(
            f"strategy.delay=1: not with strategy.outer={outer}, where what a site's own update does to the model does "
            "not follow from the update alone; allowed are nesterov, average"
        )
    for key in ("fragments", "sole_every"):
        if getattr(strategy, key) == 1:
            continue
        if inner == "gradient":
            raise ConfigError(
                f"strategy.{key}={getattr(strategy, key)}: not with strategy.inner=gradient, where a site takes no "
                "step of its own with a tensor that rests; allowed is adamw"
            )
        if outer not in ("nesterov", "average"):
            raise ConfigError(
                f"strategy.{key}={getattr(strategy, key)}: not with strategy.outer={outer}, whose moments are of all "
                "tensors in each round; allowed are nesterov, average"
            )
    if strategy.down == "topk" and strategy.up != "topk":
        raise ConfigError(
            f"strategy.down=topk: not with strategy.up={strategy.up}, by which every number changes in each round, and "
            "what is not sent piles up; allowed is strategy.up=topk"
        )
    if strategy.down == "topk" and not (
        outer == "average" or (outer == "nesterov" and strategy.outer_momentum == 0)
    ):
        raise ConfigError(
            f"strategy.down=topk: not with strategy.outer={outer} and momentum, by which every number changes in each "
            "round, and what is not sent piles up; allowed are strategy.outer=average and strategy.outer_momentum=0"
        )
    usual, topk = StrategyConfig(), "topk" in (strategy.up, strategy.down)
    for key, used, of in (
        ("density", topk, "strategy.up=topk"),
        ("down_density", strategy.down == "topk", "strategy.down=topk"),
        ("value_bits", topk, "strategy.up=topk and strategy.down=topk"),
        ("feedback", strategy.up in LOSSY, f"strategy.up={' or '.join(LOSSY)}"),
    ):
        if (value := getattr(strategy, key)) != getattr(usual, key) and not used:
            raise ConfigError(
                f"strategy.{key}={value:g}: has an effect only with {of}; here it is up={strategy.up} and "
                f"down={strategy.down}"
            )
    for key in ("density", "down_density", "feedback"):
        if ((value := getattr(strategy, key)) or 0) > 1:
            raise ConfigError(f"strategy.{key}={value:g}: a share, at most 1")
    if not strategy.keep_moments and (outer == "local_adamw" or inner == "gradient"):
        kept = "averages the moments" if outer == "local_adamw" else "keeps them on the server"
        raise ConfigError(
            f"strategy.keep_moments=false: strategy.inner={inner} with strategy.outer={outer} {kept}; leave it true"
        )


def check_shared_step(name: str, train: TrainConfig, sequences: int, devices: int, parallel: str) -> None:
    """Whether several devices of a site can share its steps.

    Args:
        name: of the site.
        sequences: of its steps.

    Raises:
        ConfigError: they cannot.
    """
    if sequences % (train.micro_batches * devices):
        raise ConfigError(
            f"site {name}: train.devices={devices}: must divide its {sequences} sequences a step"
            + (f", in train.micro_batches={train.micro_batches} pieces" if train.micro_batches > 1 else "")
        )
    if train.weights != "fp32":
        raise ConfigError(
            f"site {name}: train.weights={train.weights}: on one device only, here are {devices}; allowed is fp32"
        )
    if train.compile and parallel != "ddp":
        raise ConfigError(f"train.compile=true: not with train.parallel={parallel}; allowed is ddp")


def check_domain(devices: int, parallel: str, domain: str) -> None:
    """Raises ConfigError for domains that devices cannot be divided into."""
    if parallel == "ep" and domain != "auto" and devices % int(domain):
        raise ConfigError(f"train.ep_domain={domain}: must divide train.devices={devices}")


def _check_devices(config: RunConfig) -> None:
    """What is known of the sites' devices before they are there."""
    train = config.train
    for key, devices in (
        ("train.devices", train.devices),
        *((f"{s.name}.devices", s.devices) for s in config.federation.sites),
    ):
        if devices is not None and not is_devices(devices):
            raise ConfigError(f"{key}={devices:.80}: allowed are {DEVICES_RULE}")
    if not is_devices(train.ep_domain):
        raise ConfigError(f"train.ep_domain={train.ep_domain:.80}: allowed are {DEVICES_RULE}")
    for site in config.federation.sites:
        number, parallel = site.devices or train.devices, site.parallel or train.parallel
        if number not in ("1", "auto"):
            check_shared_step(site.name, train, site.batch_size or train.batch_size, int(number), parallel)
            check_domain(int(number), parallel, train.ep_domain)


def check_store(url: str) -> None:
    """Whether this can be an object store.

    Raises:
        ConfigError: it cannot. The line shows no password.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"store: no URL ({error})") from None
    if parts.scheme not in STORES or "@" in parts.netloc or parts.query or parts.fragment:
        # The rest of it may be a password.
        shown = f"{parts.scheme}:…" if parts.scheme else one_line(parts.path, 80)
        raise ConfigError(
            f"store={shown}: needs flower, file:///…, s3://bucket/…, gs://bucket/… or az://account/container/…, "
            "without a password or options: credentials are taken from the environment"
        )
    if parts.scheme in ("s3", "gs", "az") and not parts.netloc:
        raise ConfigError(f"store={url:.200}: names no bucket; needs {parts.scheme}://…/")
    if parts.scheme == "file":
        path = unquote(parts.path)
        if parts.netloc or not path.startswith("/") or not path.strip("/") or "\0" in path:
            raise ConfigError(f"store={url:.200}: needs an absolute path, file:///…")


def check_own_source(data: DataConfig, given: str) -> None:
    """Whether a site's own text can be read as data.source says.

    Args:
        given: the key and its value.

    Raises:
        ConfigError: the source reads no files.
    """
    if data.source not in FILE_SOURCES:
        raise ConfigError(
            f"{given}: needs data.source={', '.join(FILE_SOURCES)} to say how it is read; data.source={data.source} "
            "reads no files"
        )


def _check_routing(config: RunConfig) -> None:
    """What the router, locality and the capacity floor need of each other and of the sizes."""
    model, strategy = config.model, config.strategy
    if strategy.routing == "partitioned":
        for key, usual in (("router", "linear"), ("locality", "off"), ("balance", "local")):
            if getattr(model, key) != usual:
                raise ConfigError(
                    f"model.{key}={getattr(model, key)}: needs strategy.routing=skip, where every site has the "
                    "whole router"
                )
    if model.standins and strategy.routing != "skip":
        raise ConfigError(
            f"model.standins={model.standins}: needs strategy.routing=skip; with {strategy.routing} no ghost is asked"
        )
    if model.standins % 8 or model.standins > model.d_model:
        raise ConfigError(
            f"model.standins={model.standins}: must be a multiple of 8 (grouped_mm strides), at most "
            f"model.d_model={model.d_model}"
        )
    if model.router == "orthogonal" and model.num_experts > model.d_model:
        raise ConfigError(
            f"model.router=orthogonal: model.num_experts={model.num_experts} rows cannot be orthogonal in "
            f"model.d_model={model.d_model} dimensions; at most d_model are allowed"
        )
    if model.router == "grap" and model.d_model % model.num_experts:
        raise ConfigError(
            f"model.router=grap: model.num_experts={model.num_experts} must divide model.d_model={model.d_model}"
        )
    if model.locality == "bias":
        _check_target(config)
    for key, share in (
        ("model.locality_epsilon", model.locality_epsilon),
        ("strategy.capacity_floor", strategy.capacity_floor),
        ("strategy.capacity_delta", strategy.capacity_delta),
    ):
        if share >= 1:
            raise ConfigError(f"{key}={share}: must be below 1")


def _check_stock(config: RunConfig, hf: Mapping[str, Any]) -> None:
    """What an architecture of transformers cannot do."""
    # Slow to import.
    from fomoe_flwr.model.families import family_of
    from fomoe_flwr.model.stock import stock_config

    model, family, settings = config.model, family_of(hf), stock_config(hf)
    if model.router != "linear":
        raise ConfigError(f"model.router={model.router}: of the σ-MoE; {family.model_type} has its own")
    if model.locality == "bias" and not family.by_logits(settings):
        raise ConfigError(
            f"model.locality=bias: {family.model_type} does not choose by the logits alone; use model.locality=loss"
        )
    for key in ("attention_dropout", "router_jitter_noise"):
        if noise := getattr(settings, key, None):
            raise ConfigError(
                f"model.hf.{key}={noise:g}: must be 0.0; it draws from no seed, so that a run could neither be "
                "repeated nor go on as if nothing had happened"
            )
    if (most := settings.max_position_embeddings) < config.train.seq_len:
        raise ConfigError(f"train.seq_len={config.train.seq_len}: this model has at most {most} positions")
    held = model.num_experts * config.overlap // len(config.federation.sites)
    drawn = config.strategy.placement not in PLANNED  # a plan sees to it itself
    if drawn and config.strategy.routing == "partitioned" and held < family.fewest:
        raise ConfigError(
            f"strategy.overlap={config.overlap}: with strategy.routing=partitioned {family.model_type} needs at least "
            f"{family.fewest} experts a layer at each site"
        )


def _check_target(config: RunConfig) -> None:
    model, target = config.model, config.model.locality_target
    if target is None:
        raise ConfigError("model.locality_target=null: model.locality=bias needs the share to reach, up to 1")
    most = 1.0
    if config.strategy.placement not in PLANNED:  # there a site may hold any number
        held = model.num_experts * config.overlap // len(config.federation.sites)
        most = min(1.0, held / model.top_k)
    if target > most:
        raise ConfigError(f"model.locality_target={target}: a share, here at most {most:g}")

"""The configuration: every key can be set from the command line, and what is wrong is said in one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fomoe_flwr.compose import (
    compose,
    conf_dir,
    from_tree,
)
from fomoe_flwr.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SiteConfig,
    StrategyConfig,
    TrainConfig,
    from_dict,
)
from fomoe_flwr.deploy.supernode import parse
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.overrides import known_keys, merge_overrides, read_overrides, split_sweep, texts


def config_of(*overrides: str) -> RunConfig:
    return compose(overrides).config


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def refusal(*overrides: str) -> str:
    """What the error says, which must be one line."""
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    text = str(error.value)
    assert text.strip()
    assert len(text.splitlines()) == 1
    return text


# -- what can be set -----------------------------------------------------------------------------------------


def test_without_overrides_it_is_a_small_run_for_a_laptop() -> None:
    config = config_of()
    assert (config.model.name, config.strategy.name, config.data.source) == ("tiny", "fomoe", "stdlib")
    assert (len(config.federation.sites), config.overlap) == (4, 2)
    assert config.seed == 42
    assert config.wandb.mode == "offline"


def test_what_the_yaml_files_leave_out_is_the_schemas_default() -> None:
    config = config_of()
    assert config.model == ModelConfig()
    assert config.train == TrainConfig()
    assert config.data == DataConfig()
    assert config.strategy == StrategyConfig(overlap=2)


# Every key with a value that is not its default. These can be set together, the others need company or are alone.
TOGETHER = {
    "model.name": "mine",
    "model.vocab_size": 300,
    "model.d_model": 64,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.num_experts": 32,
    "model.d_expert": 64,
    "model.top_k": 4,
    "model.num_shared_experts": 1,
    "model.rope_theta": 500000.0,
    "model.norm_eps": 1e-6,
    "model.init_std": 0.01,
    "model.base_d_model": 128,
    "model.base_num_layers": 2,
    "model.base_d_expert": 64,
    "model.base_top_k": 4,
    "model.router": "orthogonal",
    "model.load_balance": 0.0,
    "model.balance": "global",
    "model.locality_coefficient": 0.1,
    "model.locality_epsilon": 0.05,
    "model.experts_impl": "loop",
    "federation.name": "mine",
    "federation.num_sites": 8,
    "train.optimizer": "muon",
    "strategy.name": "mine",
    "strategy.overlap": 1,
    "strategy.placement": "random",
    "strategy.reshuffle_every": 3,
    "strategy.up": "fp32",
    "strategy.down": "fp32",
    "strategy.keep_moments": False,
    "strategy.outer_lr": 1.0,
    "strategy.outer_momentum": 0.0,
    "strategy.expert_weighting": "routed",
    "strategy.capacity_floor": 0.95,
    "strategy.capacity_delta": 0.05,
    "strategy.fraction_train": 0.5,
    "strategy.fraction_evaluate": 1.0,
    "strategy.min_train_nodes": 2,
    "strategy.min_evaluate_nodes": 2,
    "strategy.quorum": 0.7,
    "strategy.expert_quorum": 0.7,
    "strategy.max_discarded": 5,
    "strategy.connect_s": 7.0,
    "strategy.timeout_floor_s": 5.0,
    "strategy.timeout_factor": 2.0,
    "strategy.norm_bound": 3.0,
    "strategy.clip": 2.0,
    "strategy.mean": "trimmed",
    "strategy.timeout_s": 5.0,
    "train.rounds": 3,
    "train.local_steps": 7,
    "train.batch_size": 2,
    "train.seq_len": 32,
    "train.lr": 0.001,
    "train.beta1": 0.8,
    "train.beta2": 0.99,
    "train.eps": 1e-6,
    "train.weight_decay": 0.1,
    "train.grad_clip": 0.0,
    "train.warmup_steps": 0,
    "train.warmup_fraction": 0.25,
    "train.schedule": "wsd",
    "train.decay_until": 300,
    "train.decay_steps": 100,
    "train.final_lr": 0.2,
    "train.expert_warmup_steps": 0,
    "train.device": "cpu",
    "train.devices": "auto",
    "train.parallel": "ep",
    "train.ep_domain": "2",
    "train.dtype": "bf16",
    "train.compile": True,
    "train.micro_batches": 2,
    "train.recompute": "full",
    "train.threads": 0,
    "train.eval_batches": 0,
    "train.eval_every": 2,
    "train.final_eval_batches": 0,
    "data.source": "huggingface",
    "data.name": "a/set",
    "data.config_name": "en",
    "data.split": "validation",
    "data.text_key": "content",
    "data.domain_key": "source",
    "data.max_documents": 10,
    "data.tokenizer": "/some/tokenizer.json",
    "data.val_fraction": 0.1,
    "data.cache_dir": "/cache",
    "plan.demand_every": 3,
    "plan.holders": 2,
    "plan.skip_price": 0.0,
    "plan.max_steps_ratio": 2.0,
    "plan.tflops": 312.0,
    "plan.mfu": 0.5,
    "plan.bytes_per_parameter": 16.0,
    "plan.assumed_mbps": 100.0,
    "plan.assumed_latency_ms": 0.0,
    "plan.server_mbps": 1e4,
    "runtime.name": "local",
    "runtime.cpus_per_site": 2,
    "runtime.gpus_per_site": 0.5,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "checkpoint.state": "files",
    "wandb.mode": "disabled",
    "wandb.project": "mine",
    "wandb.entity": "us",
    "wandb.group": "sweep",
    "seed": 7,
}
ALONE = [
    ("model.locality", "loss", []),
    ("model.locality_target", 0.75, ["model.locality=bias"]),
    # A run that goes on has its architecture already.
    ("model.path", "/some/where", ["model=olmoe_tiny", "resume=/runs/before"]),
    ("strategy.routing", "partitioned", []),
    ("model.standins", 16, []),
    ("strategy.density", 0.05, ["strategy.up=topk"]),
    (
        "strategy.down_density",
        0.05,
        ["strategy.up=topk", "strategy.down=topk", "strategy.outer=average"],
    ),
    ("strategy.value_bits", 4, ["strategy.up=topk"]),
    ("strategy.feedback", 0.5, ["strategy.up=int4"]),
    ("strategy.delay", 1, []),
    ("strategy.fragments", 2, []),
    ("strategy.sole_every", 2, ["strategy.overlap=1"]),
    ("strategy.inner", "gradient", ["strategy.outer=adamw"]),
    ("strategy.outer", "local_adamw", []),
    ("train.moments", "bf16", []),
    ("train.weights", "bf16", ["train.dtype=bf16"]),
    ("strategy.min_available_nodes", 3, []),
    ("data.path", "/some/where", ["data=text"]),
    ("data.partition", "domain", []),
    ("data.stream", True, ["data=huggingface", "data.name=a/set"]),
    ("data.dirichlet_alpha", 0.1, []),
    ("data.document_mask", True, []),
    ("plan.measured", "/runs/before", []),
    ("runtime.workers", 2, []),
    ("resume", "/runs/before", []),
]


def check_set(config: RunConfig, key: str, value: Any) -> None:
    assert value_at(config, key) == value, key
    assert type(value_at(config, key)) is type(value), key
    # So the override did it.
    assert value_at(RunConfig(), key) != value, key


def test_keys_can_be_set_together() -> None:
    texts = [str(value).lower() if isinstance(value, bool) else value for value in TOGETHER.values()]
    config = config_of(*(f"{key}={text}" for key, text in zip(TOGETHER, texts, strict=True)))
    for key, value in TOGETHER.items():
        check_set(config, key, value)


@pytest.mark.parametrize(("key", "value", "company"), ALONE, ids=[key for key, _, _ in ALONE])
def test_a_key_can_be_set(key: str, value: Any, company: list[str]) -> None:
    text = str(value).lower() if isinstance(value, bool) else value
    check_set(config_of(f"{key}={text}", *company), key, value)


def test_no_key_is_left_out_of_the_tables_above() -> None:
    sections = {field.name for field in dataclasses.fields(RunConfig)} - {"seed", "resume"}
    tested_below = {"federation.path", "federation.sites", "model.hf", "model.expert_layers", "model.init"}
    tested_below |= {"data.mix", "model.document_end"}
    assert set(known_keys()) - sections - tested_below == {*TOGETHER, *(key for key, _, _ in ALONE)}


def test_what_ends_a_document_follows_from_the_tokenizer() -> None:
    assert config_of("data.document_mask=true").model.document_end == 256
    assert config_of().model.document_end is None
    line = refusal("model.document_end=3")
    assert "model.document_end=3: follows from data.tokenizer with data.document_mask=true" in line
    line = refusal("data.document_mask=true", "data.tokenizer=/no/where.json")
    assert "data.document_mask=true: data.tokenizer=/no/where.json: no such file" in line


def test_a_mixture_is_weights_by_domain() -> None:
    assert config_of("data.mix={web: 3, the_code: 0.5}").data.mix == {"web": 3.0, "the_code": 0.5}
    assert config_of().data.mix == {}
    for weight in ("0", "-1", "nan", "inf"):
        assert f"data.mix: web={float(weight)}: must be above 0" in refusal(f"data.mix={{web: {weight}}}")
    refusal("data.mix={web: much}")
    refusal("data.mix=[web]")
    many = ",".join(f"d{index}: 1" for index in range(1001))
    assert "1001 domains; at most 1000" in refusal(f"data.mix={{{many}}}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data=stdlib", "data.stream=true: needs data=huggingface"),
        ("data.partition=dirichlet", "not with data.partition=dirichlet"),
        ("data.mix={web: 1}", "not with data.mix="),
        ("data.max_documents=3", "not with data.max_documents=3"),
        ("data.domain_key=lang", "not with data.domain_key=lang"),
    ],
)
def test_a_stream_has_only_what_can_be_known_of_it(override: str, said: str) -> None:
    assert said in refusal("data=huggingface", "data.name=a/set", "data.stream=true", override)


def test_an_architecture_of_transformers_says_its_sizes_itself() -> None:
    model = config_of("model=qwen3_moe_tiny", "model.hf.hidden_size=64", "model.hf.mlp_only_layers=[1]").model
    assert (model.d_model, model.num_layers, model.num_experts, model.top_k) == (64, 3, 16, 4)
    assert (model.d_expert, model.vocab_size, model.num_heads, model.num_shared_experts) == (64, 264, 4, 0)
    assert model.expert_layers == [0, 2, 3]
    assert config_of().model.hf == {}


def test_a_checkpoint_goes_on_with_its_own_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmoe", "num_hidden_layers": 3}')
    given = ["model=hf", f"model.path={tmp_path}", "model.init=checkpoint", "model.hf.num_experts_per_tok=4"]
    assert config_of(*given, "data.tokenizer=bytes").data.tokenizer == "bytes"
    assert config_of(*given).data.tokenizer == str(tmp_path / "tokenizer.json")
    assert config_of(*given, "data.tokenizer=/other.json").data.tokenizer == "/other.json"
    model = config_of(*given).model
    assert (model.init, model.num_layers, model.num_experts, model.top_k) == ("checkpoint", 3, 64, 4)


def test_the_architecture_of_a_checkpoint_can_be_begun_anew(tmp_path: Path) -> None:
    """Other sizes on top, and no stand-ins for experts that have learned nothing."""
    (tmp_path / "config.json").write_text('{"model_type": "olmoe", "num_hidden_layers": 3}')
    given = [f"model.path={tmp_path}", "model.init=random"]
    anew = config_of("model=hf", *given, "model.hf.num_experts=8")
    assert (anew.model.init, anew.model.num_layers, anew.model.num_experts) == ("random", 3, 8)
    assert (anew.model.standins, anew.data.tokenizer) == (0, "bytes")
    assert config_of(*given).model.num_layers == 3
    partitioned = ["strategy.routing=partitioned", "strategy.placement=affine"]
    assert "strategy.placement=affine: needs" in refusal("model=hf", *given, *partitioned)


def test_ghosts_of_a_checkpoint_have_stand_ins_where_they_can_be_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmoe", "num_hidden_layers": 3}')
    given = ["model=hf", f"model.path={tmp_path}"]
    assert config_of(*given).model.standins == 8
    assert config_of(*given, "strategy.routing=partitioned").model.standins == 0
    everywhere = ["federation.num_sites=2", "strategy.overlap=2"]
    assert config_of(*given, *everywhere).model.standins == 0
    assert config_of(*given, *everywhere, "model.standins=8").model.standins == 8
    said = refusal(*given, "strategy.routing=partitioned", "model.standins=8")
    assert said == "model.standins=8: needs strategy.routing=skip; with partitioned no ghost is asked"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["model=olmoe_tiny"],
            ": not read, for model=olmoe_tiny has an architecture of its own; to go on from",
        ),
        ([], ": its weights would not be read; to go on from them give model=hf"),
        (
            ["model=hf", "model.hf.num_experts=8"],
            "model.hf.num_experts=8: the checkpoint in model.path has 64; leave it out, or begin anew",
        ),
        (
            ["model=olmoe_tiny", "model.init=checkpoint"],
            "model.hf.vocab_size=264: the checkpoint in model.path has 50304; it comes with model=olmoe_tiny; give",
        ),
    ],
)
def test_weights_that_would_not_be_read_are_refused(overrides: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmoe", "num_hidden_layers": 3}')
    assert said in refusal(f"model.path={tmp_path}", *overrides)


@pytest.mark.parametrize("model", ["tiny", "proxy", "medium", "large", "xl", "xxl"])
def test_the_papers_sizes(model: str) -> None:
    """Head width 64 and N_e = 4·d_model/128 everywhere (appendix B); tiny is ours, for a laptop, and has more."""
    config = config_of(f"model={model}").model
    assert config.name == model
    assert config.d_model // config.num_heads == 64
    assert config.d_expert == 128
    if model != "tiny":
        assert config.num_experts == 4 * config.d_model // 128
        assert config.top_k == config.num_experts // 4
        assert config.vocab_size == 200_019


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("fomoe", {"overlap": 2, "inner": "adamw", "outer": "nesterov", "keep_moments": True}),
        ("diloco", {"overlap": None, "inner": "adamw", "outer": "nesterov", "keep_moments": True}),
        ("local_adamw", {"overlap": None, "inner": "adamw", "outer": "local_adamw", "keep_moments": True}),
        ("fedavg", {"overlap": None, "inner": "adamw", "outer": "average", "keep_moments": False}),
        ("ddp", {"overlap": None, "inner": "gradient", "outer": "adamw"}),
    ],
)
def test_strategies(strategy: str, expected: dict[str, Any]) -> None:
    config = config_of(f"strategy={strategy}", "federation.num_sites=8")
    assert config.strategy.name == strategy
    assert {key: getattr(config.strategy, key) for key in expected} == expected
    assert config.overlap == (expected["overlap"] or 8)  # null: every site holds every expert


def test_data_parallel_synchronises_every_step() -> None:
    assert config_of("strategy=ddp").train.local_steps == 1
    assert config_of("strategy=ddp", "train.local_steps=4").train.local_steps == 4


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "tokens"])
def test_corpora_on_disk(source: str) -> None:
    assert config_of(f"data={source}", "data.path=x").data.source == source


def test_the_other_groups() -> None:
    assert config_of("data=huggingface", "data.name=a/b").data.source == "huggingface"
    assert config_of("data=stdlib").data.source == "stdlib"
    assert config_of("runtime=local").runtime.name == "local"
    assert config_of("runtime=flower").runtime.name == "flower"


@pytest.mark.parametrize("group", ["model", "federation", "strategy", "data", "runtime"])
def test_each_option_in_conf_is_a_valid_one(group: str, tmp_path: Path) -> None:
    """With the least that an option says it needs."""
    needs = {
        "text": ["data.path=x"],
        "jsonl": ["data.path=x"],
        "parquet": ["data.path=x"],
        "tokens": ["data.path=x"],
        "huggingface": ["data.name=x"],
        "hf": [f"model.path={tmp_path}"],
        "file": [f"federation.path={tmp_path / 'sites.yaml'}"],
    }
    (tmp_path / "sites.yaml").write_text("num_sites: 4\n")
    (tmp_path / "config.json").write_text('{"model_type": "olmoe", "num_hidden_layers": 1}')
    options = sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
    assert options
    for option in options:
        compose([f"{group}={option}", *needs.get(option, [])])


def test_where_the_run_lives(tmp_path: Path) -> None:
    composed = compose([f"hydra.run.dir={tmp_path / 'run'}", "seed=3", f"hydra.sweep.dir={tmp_path}/sweep"])
    assert (composed.run_dir, composed.sweep_dir) == (tmp_path / "run", tmp_path / "sweep")
    assert compose(["hydra.run.dir=here"]).run_dir == Path.cwd() / "here"


def test_what_a_resume_needs_is_kept_and_hydras_own_is_not() -> None:
    overrides = ["seed=3", "hydra.run.dir=x", "++hydra.sweep.dir=y", "resume=z", "model=tiny"]
    assert compose(overrides).overrides == ("seed=3", "model=tiny")


def test_composing_twice_is_composing_the_second() -> None:
    compose(["seed=1", "model=proxy"])
    assert (config_of().seed, config_of().model.name) == (42, "tiny")


# -- sites ---------------------------------------------------------------------------------------------------


def test_a_number_of_sites_names_them() -> None:
    federation = config_of("federation.num_sites=2").federation
    assert federation.sites == [SiteConfig(name="site-0"), SiteConfig(name="site-1")]
    assert federation.num_sites == 2


def test_sites_listed_one_by_one() -> None:
    federation = config_of("federation=labs").federation
    assert [site.name for site in federation.sites] == ["datacentre", "lab-0", "lab-1", "workstation"]
    assert federation.num_sites == 4
    assert federation.sites[1] == dataclasses.replace(federation.sites[2], name="lab-0")  # of `count: 2`
    assert (federation.sites[0].memory_gib, federation.sites[0].up_mbps) == (80.0, 10_000.0)


def test_sites_listed_on_the_command_line() -> None:
    config = config_of(
        "federation.num_sites=null",
        "federation.sites=[{name: a, speed: 2}, {name: b, device: 'cuda:1'}]",
    )
    assert config.federation.sites == [SiteConfig(name="a", speed=2.0), SiteConfig(name="b", device="cuda:1")]


@pytest.fixture
def sites_file(tmp_path: Path) -> Path:
    file = tmp_path / "my sites.yaml"
    file.write_text("sites:\n  - {name: big, memory_gib: 80}\n  - {name: small, count: 3, up_mbps: 100}\n")
    return file


def test_sites_in_a_file_of_the_users(sites_file: Path) -> None:
    composed = compose([f"federation={sites_file}", "strategy.overlap=4"])
    federation = composed.config.federation
    assert [site.name for site in federation.sites] == ["big", "small-0", "small-1", "small-2"]
    assert (federation.name, federation.path) == ("my sites", None)
    assert config_of(*composed.overrides) == composed.config  # what a resume would compose


def test_a_number_of_sites_beside_a_file_must_agree_with_it(sites_file: Path, tmp_path: Path) -> None:
    assert config_of(f"federation={sites_file}", "federation.num_sites=4").federation.num_sites == 4
    assert "federation.num_sites=3: the list has 4 sites" in refusal(
        f"federation={sites_file}", "federation.num_sites=3"
    )
    (tmp_path / "number.yaml").write_text("num_sites: 4\n")
    assert (
        len(config_of(f"federation={tmp_path}/number.yaml", "federation.num_sites=2").federation.sites) == 2
    )


def test_in_a_file_of_sites_text_is_text(tmp_path: Path) -> None:
    file = tmp_path / "sites.yaml"
    file.write_text(
        "sites:\n"
        "  - {name: 1e5, speed: 2, domain: 2024_10, up_mbps: 1e3}\n"
        "  - {name: no, count: 1, memory_gib: 0.5, domain: null}\n"
        "  - {name: 0x10, domain: ~}\n"
        "  - {name: 1_000, domain: 'null'}\n"
    )
    sites = config_of(f"federation={file}").federation.sites
    assert [(site.name, site.domain) for site in sites] == [
        ("1e5", "2024_10"),
        ("no", None),
        ("0x10", None),
        ("1_000", "null"),
    ]
    assert (sites[0].speed, sites[0].up_mbps, sites[1].memory_gib) == (2.0, 1000.0, 0.5)
    file.write_text("num_sites: 2\nnum_sites: 3\n")
    assert "duplicate key" in refusal(f"federation={file}")


def test_only_a_federation_is_rewritten() -> None:
    overrides = ["federation=labs", "data.path=x.yaml", "seed=1"]
    assert texts(read_overrides(overrides)) == overrides
    overrides = ["data.path=x.yaml", "federation=a/b.yml", "seed=1"]
    assert texts(read_overrides(overrides)) == [
        "data.path=x.yaml",
        "federation=file",
        "federation.path=a/b.yml",
        "seed=1",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"sites: [a: {", "not a YAML file"),
        (b"\xff\xfe\x00\x80", "not a YAML file"),
        (b"- 1\n- 2\n", "Cannot merge DictConfig with ListConfig"),
        (b"sites: [{name: a, memroy_gib: 4}]", "memroy_gib: unknown key; did you mean memory_gib?"),
        (b"sites: [{name: a, memory_gib: lots}]", "memory_gib=lots: must be a number"),
        (b"num_stes: 4", "num_stes: unknown key"),
        (b"num_sites: ${nope}", "Interpolation key 'nope' not found"),
    ],
)
def test_a_bad_file_of_sites_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "sites.yaml"
    file.write_bytes(content)
    text = refusal(f"federation={file}")
    assert text.startswith(f"federation.path={file}: ")
    assert said in text


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        # unknown keys and options
        (["train.learning_rate=1"], "train.learning_rate: unknown key"),
        (["train.lrr=1"], "train.lrr: unknown key; did you mean train.lr?"),
        (["nope=1"], "nope: unknown key"),
        (["+train.lrr=1"], "train.lrr: unknown key; did you mean train.lr?"),
        (["++nope.nope=1"], "nope: unknown key"),
        (["hydra.nope=1"], "hydra.nope: unknown key"),
        (
            ["model=huge"],
            "model=huge: no such option; allowed are hf, large, medium, olmoe_tiny, proxy, qwen3_moe_tiny, tiny, ",
        ),
        (
            ["strategy=sgd"],
            "strategy=sgd: no such option; allowed are ddp, diloco, fedavg, fomoe, local_adamw",
        ),
        (["federation.sites=[{nme: a}]"], "federation.sites: nme: unknown key; did you mean name?"),
        # wrong types
        (["train.lr=fast"], "train.lr=fast: must be a number"),
        (["train.rounds=1.5"], "train.rounds=1.5: must be an integer"),
        (["train.batch_size=true"], "train.batch_size=True: must be an integer"),
        (["train.compile=perhaps"], "train.compile=perhaps: Value 'perhaps' is not a valid bool"),
        (["model.d_model=null"], "model.d_model=null: field 'model.d_model' is not Optional"),
        (["train.lr=[1]"], "train.lr=[1]: must be a number"),
        (["train=3"], "train=3: "),
        (["federation.sites=3"], "federation.sites=3: "),
        (["federation.sites=[3]"], "federation.sites=[3]: "),
        (["~train.lr"], "~train.lr: "),
        (["model=1"], "model=1: "),
        (
            ["model="],
            "model=: no such option; allowed are hf, large, medium, olmoe_tiny, proxy, qwen3_moe_tiny, tiny, xl, xxl",
        ),
        (["hydra/launcher=joblib"], "hydra/launcher=joblib: no such option; allowed are basic"),
        # out of bounds
        (["model=hf"], "model.path=null: model.init=checkpoint (model=hf) needs model.path=FOLDER"),
        (["model=hf", "model.path=/nowhere"], "model.path=/nowhere: no such folder"),
        (
            ["model.expert_layers=[1]"],
            "model.expert_layers=[1]: follows from model.hf, which is empty; leave it out",
        ),
        (
            ["model=olmoe_tiny", "model.d_model=512"],
            "model.d_model=512: follows from model.hf, which has 128; leave it out",
        ),
        (
            ["model=olmoe_tiny", "model.hf.model_type=llama"],
            "model.hf.model_type=llama: allowed are olmoe, qwen3_moe, mixtral, deepseek_v2, deepseek_v3, gpt_oss",
        ),
        (
            ["model=olmoe_tiny", "model.hf.hidden_size=wide"],
            "model.hf.hidden_size=wide: from 8 to 1048576 are allowed",
        ),
        (
            ["model=olmoe_tiny", "model.hf.norm_topk_prob=2"],
            "model.hf.norm_topk_prob: transformers refuses it: TypeError: Field 'norm_topk_prob' expected bool",
        ),
        (
            ["model=olmoe_tiny", "model.hf.rope_parameters.rope_theta=1"],
            "model.hf.rope_parameters.rope_theta: only whole keys of config.json can be given, "
            "model.hf.rope_parameters={",
        ),
        (["model=olmoe_tiny", "model.hf.hidden_sise=64"], "model.hf.hidden_sise: unknown key of olmoe"),
        (["model.hf.hidden_size=64"], "model.hf.model_type=None: allowed are olmoe"),
        (
            ["model=olmoe_tiny", "model.top_k=2"],
            "model.top_k=2: follows from model.hf, which has 4; leave it out",
        ),
        (["model=olmoe_tiny", "model.hf.model_type=[1]"], "model.hf.model_type=[1]: allowed are olmoe"),
        (
            ["model=olmoe_tiny", "model.hf.num_attention_heads=0"],
            "model.hf.num_attention_heads=0: from 1 to ",
        ),
        (["model=olmoe_tiny", "model.hf.hidden_size=-128"], "model.hf.hidden_size=-128: from 8 to 1048576"),
        (["model=olmoe_tiny", "model.hf.hidden_size=1000000000000"], "from 8 to 1048576 are allowed"),
        (
            ["model=olmoe_tiny", "model.hf.num_hidden_layers=1000000"],
            "model.hf.num_hidden_layers=1000000: from 1 to 1024 are allowed",
        ),
        (
            ["model=olmoe_tiny", "model.hf.num_experts=1000000"],
            "model.hf.num_experts=1000000: from 1 to 16384 are allowed",
        ),
        (
            ["model=olmoe_tiny", "model.hf.attention_dropout=0.1"],
            "model.hf.attention_dropout=0.1: must be 0.0; it draws from no seed",
        ),
        (["model.num_layers=1000000"], "model.num_layers=1000000: at most 1024 are allowed"),
        (
            ["train.batch_size=100000000000000000000"],
            "train.batch_size=100000000000000000000: at most 1000000000 are allowed",
        ),
        (["model=olmoe_tiny", "model.router=grap"], "model.router=grap: of the σ-MoE; olmoe has its own"),
        (
            ["model=olmoe_tiny", "train.seq_len=4097"],
            "train.seq_len=4097: this model has at most 4096 positions",
        ),
        (
            ["strategy.routing=hash"],
            "strategy.routing=hash: allowed are skip, skip_renormalised, partitioned",
        ),
        (["model.router=hash"], "model.router=hash: allowed are linear, orthogonal, grap"),
        (["model.locality=near"], "model.locality=near: allowed are off, bias, loss"),
        (["model.balance=both"], "model.balance=both: allowed are local, global"),
        (["model.locality_epsilon=0"], "model.locality_epsilon=0.0: must be above 0"),
        (["model.locality_epsilon=1"], "model.locality_epsilon=1.0: must be below 1"),
        (["strategy.capacity_floor=1"], "strategy.capacity_floor=1.0: must be below 1"),
        (["strategy.capacity_delta=1"], "strategy.capacity_delta=1.0: must be below 1"),
        (["model.experts_impl=cuda"], "model.experts_impl=cuda: allowed are grouped, loop"),
        (["wandb.mode=on"], "wandb.mode=on: allowed are offline, online, disabled"),
        (["train.lr=-1"], "train.lr=-1.0: must be at least 0"),
        (["train.lr=nan"], "train.lr=nan: must be at least 0"),
        (["train.decay_until=9"], "train.decay_until=9: needs train.schedule=cosine or wsd"),
        (["train.schedule=cosine", "train.decay_steps=9"], "train.decay_steps=9: needs train.schedule=wsd"),
        (
            ["train.schedule=cosine", "train.decay_until=50"],
            "train.decay_until=50: must be after the warm-up of 50",
        ),
        (
            ["train.schedule=wsd", "train.decay_steps=199"],
            "train.decay_steps=199: the decay would begin at step 1, in",
        ),
        (["train.schedule=wsd", "train.final_lr=2"], "train.final_lr=2: a share of train.lr, at most 1"),
        (["train.warmup_fraction=-0.1"], "train.warmup_fraction=-0.1: must be at least 0"),
        (["model.vocab_size=1"], "model.vocab_size=1: must be at least 2"),
        (["seed=-1"], "seed=-1: must be at least 0"),
        (["federation.num_sites=0"], "federation.num_sites=0: must be at least 1"),
        (["checkpoint.keep=0"], "checkpoint.keep=0: must be at least 1"),
        (["checkpoint.state=disk"], "checkpoint.state=disk: allowed are memory, files"),
        (
            ["strategy=ddp", "checkpoint.state=files"],
            "checkpoint.state=files: not with strategy.inner=gradient strategy.outer=adamw, which clips the gradients "
            "of the whole model at once; use memory",
        ),
        (
            ["federation.num_sites=null", "federation.sites=[{name: a, count: 0}]"],
            "federation.sites[0].count=0: must be at least 1",
        ),
        (["train.devices=0"], "train.devices=0: allowed are auto or a number from 1 to 1024"),
        (["train.devices=all"], "train.devices=all: allowed are auto or a number from 1 to 1024"),
        (["train.ep_domain=-1"], "train.ep_domain=-1: allowed are auto or a number from 1 to 1024"),
        (
            ["train.devices=3", "federation.num_sites=1", "strategy.overlap=1"],
            "site site-0: train.devices=3: must divide its 8 sequences a step",
        ),
        (
            ["train.devices=4", "train.micro_batches=4", "federation.num_sites=1", "strategy.overlap=1"],
            "site site-0: train.devices=4: must divide its 8 sequences a step, in train.micro_batches=4 pieces",
        ),
        (
            ["train.devices=4", "train.parallel=ep", "train.ep_domain=3"],
            "train.ep_domain=3: must divide train.devices=4",
        ),
        (
            ["train.devices=2", "train.parallel=fsdp", "train.compile=true"],
            "train.compile=true: not with train.parallel=fsdp; allowed is ddp",
        ),
        (["train.parallel=tp"], "train.parallel=tp: allowed are ddp, fsdp, ep"),
        (["train.device=tpu"], "train.device=tpu: allowed are auto, cpu, cuda, cuda:N"),
        (["train.device='c\npu'"], "train.device=c pu: allowed are auto, cpu, cuda, cuda:N"),
        # impossible combinations
        (["strategy.overlap=5"], "strategy.overlap=5: between 1 and the number of sites, 4"),
        (
            ["model.router=orthogonal", "model.num_experts=256"],
            "model.router=orthogonal: model.num_experts=256 rows cannot be orthogonal in model.d_model=128",
        ),
        (
            ["model.standins=4"],
            "model.standins=4: must be a multiple of 8 (grouped_mm strides), at most model.d_",
        ),
        (
            ["model.standins=136"],
            "model.standins=136: must be a multiple of 8 (grouped_mm strides), at most model",
        ),
        (
            ["strategy.density=0.1"],
            "strategy.density=0.1: has an effect only with strategy.up=topk; here it is up=bf16 and down=bf16",
        ),
        (
            ["strategy.up=topk", "strategy.down_density=0.1"],
            "strategy.down_density=0.1: has an effect only with strategy.down=topk; here it is up=topk and down=bf16",
        ),
        (
            ["strategy.up=int4", "strategy.down=topk", "strategy.outer=average"],
            "strategy.down=topk: not with strategy.up=int4, by which every number changes in each round",
        ),
        (
            ["strategy.up=topk", "strategy.down=topk"],
            "strategy.down=topk: not with strategy.outer=nesterov and momentum, by which every number changes",
        ),
        (
            ["strategy.feedback=0.5"],
            "strategy.feedback=0.5: has an effect only with strategy.up=int8 or int4 or topk or sign; here it is "
            "up=bf16 and down=bf16",
        ),
        (["strategy.up=sign", "strategy.feedback=1.5"], "strategy.feedback=1.5: a share, at most 1"),
        (
            ["strategy.up=int4", "strategy.outer=local_adamw"],
            "strategy.up=int4: not with strategy.outer=local_adamw, whose moments it would spoil; allowed are bf16",
        ),
        (
            ["strategy.down=topk", "strategy.outer=local_adamw"],
            "strategy.down=topk: not with strategy.outer=local_adamw, whose moments it would spoil; allowed are bf16",
        ),
        (
            ["strategy=ddp", "strategy.down=int8"],
            "strategy.down=int8: not with strategy.inner=gradient, whose gradients would be of another model than the",
        ),
        (["strategy.delay=2"], "strategy.delay=2: at most 1 are allowed"),
        (
            ["strategy=ddp", "strategy.delay=1"],
            "strategy.delay=1: not with strategy.inner=gradient, whose gradients would be of another model than the",
        ),
        (
            ["train.optimizer=muon", "strategy=ddp"],
            "train.optimizer=muon: not with strategy.inner=gradient, where sites take no steps; allowed is adamw",
        ),
        (
            ["train.moments=bf16", "train.beta2=0.99"],
            "train.beta2=0.99: at most 0.98 with train.moments=bf16, in which an average that moves less in a step",
        ),
        (
            ["train.moments=bf16", "train.beta1=0.99"],
            "train.beta1=0.99: at most 0.98 with train.moments=bf16",
        ),
        (["train.weights=bf16"], "train.weights=bf16: needs train.dtype=bf16; here it is fp32"),
        (
            ["train.weights=bf16", "train.dtype=bf16", "strategy=ddp"],
            "train.weights=bf16: not with strategy.inner=gradient, where sites take no steps; allowed is fp32",
        ),
        (
            ["train.moments=bf16", "strategy=local_adamw"],
            "train.moments=bf16: not with strategy.outer=local_adamw, which averages AdamW's moments; allowed is fp32",
        ),
        (
            ["train.optimizer=muon", "strategy=local_adamw"],
            "train.optimizer=muon: not with strategy.outer=local_adamw, which averages AdamW's moments; allowed is ",
        ),
        (
            ["strategy=local_adamw", "strategy.delay=1"],
            "strategy.delay=1: not with strategy.outer=local_adamw, where what a site's own update does to the model",
        ),
        (
            ["strategy.outer=adamw", "strategy.delay=1"],
            "strategy.delay=1: not with strategy.outer=adamw, where what a site's own update does to the model does",
        ),
        (
            ["model.balance=global", "strategy.delay=1"],
            "strategy.delay=1: not with model.balance=global, which goes by the federation's load of the round before",
        ),
        (
            ["strategy.fragments=5"],
            "strategy.fragments=5: at most the number of layers, 4, of which each fragment has at least one",
        ),
        (["strategy.fragments=0"], "strategy.fragments=0: must be at least 1"),
        (
            ["strategy.sole_every=4", "federation.num_sites=4", "strategy.overlap=2"],
            "strategy.sole_every=4: of experts that one site alone holds; here each has 2 holders; give "
            "strategy.overlap=1, or leave it out",
        ),
        (["strategy.sole_every=0"], "strategy.sole_every=0: must be at least 1"),
        (
            ["strategy=ddp", "strategy.fragments=2"],
            "strategy.fragments=2: not with strategy.inner=gradient, where a site takes no step of its own with a "
            "tensor that rests; allowed is adamw",
        ),
        (
            ["strategy=local_adamw", "strategy.sole_every=3", "strategy.overlap=1"],
            "strategy.sole_every=3: not with strategy.outer=local_adamw, whose moments are of all tensors in each "
            "round; allowed are nesterov, average",
        ),
        (
            ["strategy.outer=adamw", "strategy.fragments=2"],
            "strategy.fragments=2: not with strategy.outer=adamw, whose moments are of all tensors in each round",
        ),
        (["strategy.down=sign"], "strategy.down=sign: allowed are bf16, fp32, int8, int4, topk"),
        (
            ["model.router=grap", "model.num_experts=12"],
            "model.router=grap: model.num_experts=12 must divide model.d_model=128",
        ),
        (
            ["model.router=grap", "strategy.routing=partitioned"],
            "model.router=grap: needs strategy.routing=skip",
        ),
        (
            ["model.router=orthogonal", "strategy.routing=partitioned"],
            "model.router=orthogonal: needs strategy.routing=skip",
        ),
        (
            ["model.locality=loss", "strategy.routing=partitioned"],
            "model.locality=loss: needs strategy.routing=skip",
        ),
        (
            ["model.balance=global", "strategy.routing=partitioned"],
            "model.balance=global: needs strategy.routing=skip",
        ),
        (["model.locality=bias"], "model.locality_target=null: model.locality=bias needs the share to reach"),
        (
            ["model.locality=bias", "model.locality_target=1.1"],
            "model.locality_target=1.1: a share, here at most 1",
        ),
        (  # of 16 experts 8 are at a site, of which a token may choose 16
            ["model.locality=bias", "model.locality_target=0.6", "model.top_k=16"],
            "model.locality_target=0.6: a share, here at most 0.5",
        ),
        (
            ["strategy.overlap=1", "federation.num_sites=17"],
            "strategy.overlap=1: 16 experts (model.num_experts) x 1 holders are fewer than 17 sites "
            "(federation.num_sites), and each needs one; overlap must be at least 2",
        ),
        (["model.num_heads=3"], "model.num_heads=3: must divide d_model=128"),
        (["model.num_heads=128"], "model.num_heads=128: must divide d_model=128 into heads of even width"),
        (["model.d_model=132", "model.num_heads=2"], "model.d_model=132: must be a multiple of 8"),
        (["model.d_expert=20"], "model.d_expert=20: must be a multiple of 8"),
        (["model.top_k=17"], "model.top_k=17: at most model.num_experts=16"),
        (["strategy.fraction_train=1.5"], "strategy.fraction_train=1.5: a share, at most 1"),
        (["data.val_fraction=0"], "data.val_fraction=0.0: must lie between 0 and 1"),
        (["train.beta2=1"], "train.beta2=1.0: must be below 1"),
        (
            ["strategy=local_adamw", "strategy.inner=gradient"],
            "strategy.inner=gradient: strategy.outer=local_adamw averages AdamW's moments",
        ),
        # keys that would do nothing
        (
            ["strategy=diloco", "strategy.inner=gradient"],
            "strategy.inner=gradient: strategy.outer=nesterov would take",
        ),
        (
            ["strategy=fedavg", "strategy.inner=gradient"],
            "strategy.inner=gradient: strategy.outer=average would take",
        ),
        (["strategy=fedavg", "strategy.outer_lr=0.5"], "strategy.outer_lr=0.5: must be null with"),
        (["strategy=ddp", "strategy.outer_lr=0.5"], "strategy.outer=adamw, whose learning rate is train.lr"),
        (
            ["strategy=local_adamw", "strategy.outer_momentum=0"],
            "strategy.outer_momentum=0: must be null with",
        ),
        (
            ["strategy.outer=adamw", "strategy.outer_momentum=0.5"],
            "strategy.outer_momentum=0.5: must be null with",
        ),
        (
            ["strategy=local_adamw", "strategy.keep_moments=false"],
            "strategy.keep_moments=false: strategy.inner=adamw",
        ),
        (
            ["strategy=ddp", "strategy.keep_moments=false"],
            "strategy.keep_moments=false: strategy.inner=gradient",
        ),
        (["data=text"], "data.path=null: data=text needs data.path=FILE_OR_FOLDER"),
        (["data=huggingface"], "data.name=null: data=huggingface needs data.name=NAME"),
        # sites
        (["federation=/nowhere.yaml"], "federation.path=/nowhere.yaml: no such file"),
        (["federation.num_sites=null"], "federation.num_sites=null: give a number of sites"),
        (["federation=labs", "federation.num_sites=9"], "federation.num_sites=9: the list has 4 sites"),
        (
            ["federation.num_sites=null", "federation.sites=[{name: a}, {name: a}]"],
            "federation.sites: two sites are named 'a'",
        ),
        (
            ["federation.num_sites=null", "federation.sites=[{name: a, count: 2}, {name: a-1}]"],
            "federation.sites: two sites are named 'a-1'",
        ),
        (
            ["federation.num_sites=null", "strategy.overlap=1", "federation.sites=[{name: a, devices: 0}]"],
            "a.devices=0: allowed are auto or a number from 1 to 1024",
        ),
        (
            ["federation.num_sites=null", "strategy.overlap=1", "federation.sites=[{name: a, device: tpu}]"],
            "a.device=tpu: allowed are auto, cpu, cuda, cuda:N",
        ),
        # not overrides at all
        (["model proxy"], "model proxy"),
        (["train.lr=${"], "train.lr=${"),
        (["data.path=[1"], "[1"),
        (["train.lr=${nope}"], "train.lr: Interpolation key 'nope' not found"),
        (["train.lr=0.1,0.2"], "train.lr=0.1,0.2"),
        (["+="], "'+=': not an override"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_with_key_and_value(overrides: list[str], said: str) -> None:
    assert said in refusal(*overrides)


values = st.sampled_from(
    [
        "",
        "1",
        "-1",
        "null",
        "nan",
        "inf",
        "[]",
        "{}",
        "{a: 1}",
        "[1",
        "${x}",
        "true",
        "'a'",
        '"',
        "1,2",
        "a b",
        "???",
    ]
)


def test_a_run_that_has_keys_it_did_not_use_can_be_read() -> None:
    """Earlier versions wrote them with their defaults, whatever the outer step."""
    tree = OmegaConf.structured(config_of("strategy=local_adamw"))
    tree.strategy.outer_lr, tree.strategy.outer_momentum, tree.strategy.keep_moments = 0.7, 0.9, False
    assert from_tree(tree, saved=True).strategy.outer_lr == 0.7
    with pytest.raises(ConfigError, match=r"strategy\.outer_lr=0\.7"):
        from_tree(tree)


@pytest.mark.parametrize(
    "key",
    [
        "data.path",
        "data.tokenizer",
        "data.cache_dir",
        "plan.measured",
        "resume",
        "federation.path",
        "hydra.run.dir",
    ],
)
def test_an_empty_path_is_not_the_current_folder(key: str) -> None:
    """What an unset variable of a shell leaves."""
    assert refusal(f"{key}=").startswith(f"{key}= is empty")
    if key != "hydra.run.dir":
        assert refusal(f"{key}=' '").startswith(f"{key}= is empty")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["federation.num_sites=100000000"], "federation.num_sites: 100000000 sites; at most 100000"),
        (
            ["federation.sites=[{name:a,count:100000000}]"],
            "federation.count: 100000000 sites; at most 100000",
        ),
        (["train.threads=1000000"], "train.threads=1000000: at most 1024"),
        (
            ["train.micro_batches=9"],
            "train.micro_batches=9: at most the sequences of a step, 8 (train.batch_size, or a site's own)",
        ),
        (["train.recompute=some"], "train.recompute=some: allowed are none, selective, full"),
    ],
)
def test_a_slip_of_the_finger_does_not_take_the_machine_down(overrides: list[str], told: str) -> None:
    """Of the memory for so many sites, or of so many threads, a process is killed without a word."""
    assert refusal(*overrides).startswith(told)


@pytest.mark.parametrize(
    "key", ["data.name", "data.text_key", "data.domain_key", "wandb.project", "wandb.entity"]
)
def test_an_empty_text_is_not_a_value(key: str) -> None:
    """The same of what is no path; a site's domain, too."""
    assert refusal(f"{key}=") == f"{key}= is empty; give a value, or leave the key out"
    assert refusal(f"{key}=' '").startswith(f"{key}= is empty")
    assert refusal("federation.sites=[{name:a,domain:''}]").startswith("federation.sites[0].domain= is empty")


@pytest.mark.parametrize(
    "name", ["", " ", "..", ".", "a/b", "../../esc", "MIT lab", "-rf", "a" * 65, "a\nb", "[bold]lab"]
)
def test_a_name_that_cannot_be_a_folder_is_refused_at_every_door(name: str, tmp_path: Path) -> None:
    file = tmp_path / "sites.yaml"
    file.write_text(json.dumps({"sites": [{"name": "good"}, {"name": name}]}))
    assert refusal(f"federation={file}").startswith(f"federation.sites[1].name={name!r:.80}: a name has")
    with pytest.raises(ConfigError, match="--name"):
        parse(["--superlink", "127.0.0.1:1", "--insecure", f"--name={name}"])


def test_a_run_of_an_earlier_version_may_have_any_name() -> None:
    """It is only read; to go on with it is refused."""
    config = config_of("federation.num_sites=2")
    config.federation.sites[1].name = "MIT lab"
    tree = OmegaConf.create(dataclasses.asdict(config))
    assert from_tree(tree, saved=True) == config
    tree.data.path = "${oc.env:HOME}/text"
    # The configuration of a run may be somebody else's.
    assert from_tree(tree, saved=True).data.path == "${oc.env:HOME}/text"
    with pytest.raises(ConfigError, match="a name has"):
        from_tree(tree)


@pytest.mark.parametrize("name", ["a", "MIT-lab_2.x", "Universität", "site-0"])
def test_names_that_may_be(name: str, tmp_path: Path) -> None:
    file = tmp_path / "sites.yaml"
    file.write_text(json.dumps({"sites": [{"name": "good"}, {"name": name}]}))
    assert config_of(f"federation={file}").federation.sites[1].name == name
    assert parse(["--superlink", "127.0.0.1:1", "--insecure", f"--name={name}"]).name == name


@pytest.mark.parametrize("key", ["min_available_nodes", "min_train_nodes", "min_evaluate_nodes"])
def test_more_sites_than_there_are_would_be_waited_for_in_vain(key: str) -> None:
    assert refusal(f"strategy.{key}=9") == f"strategy.{key}=9: at most the number of sites, 4"


@settings(max_examples=40)
@given(
    st.sampled_from(["", "+", "~", "++"]),
    st.sampled_from([*sorted(known_keys()), "", "nope", "..", "model@x"]),
    values,
)
def test_no_override_ends_in_a_traceback(prefix: str, key: str, value: str) -> None:
    lines = 1
    try:
        compose([f"{prefix}{key}={value}"])
    except ConfigError as error:
        lines = len(str(error).splitlines())
    assert lines == 1


def test_every_section_stops_at_an_unknown_key() -> None:
    for field in dataclasses.fields(RunConfig):
        if field.name not in ("seed", "resume", "init_from", "store"):
            assert refusal(f"{field.name}.nope=1").startswith(f"{field.name}.nope: unknown key")


# -- overrides of a resumed run and of a sweep ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "new", "merged"),
    [
        ([], ["a=1"], ["a=1"]),
        (["a=1"], [], ["a=1"]),
        (["a=1", "b=2"], ["a=3"], ["b=2", "a=3"]),
        (["model=tiny", "model.d_model=64"], ["model=proxy"], ["model=proxy"]),
        (["+a=1", "b=2"], ["a=3"], ["b=2", "a=3"]),
        (["a.b='x=y'"], ["a.b='z=w'"], ["a.b='z=w'"]),
        # Keys of earlier versions, which this one has no more.
        (["strategy.moves=full", "a=1"], [], ["a=1"]),
        (["++plan.policy=memory"], ["a=1"], ["a=1"]),
    ],
)
def test_of_one_key_the_new_override_stays(
    saved: Sequence[str], new: Sequence[str], merged: list[str]
) -> None:
    assert texts(merge_overrides(saved, new)) == merged


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        (["seed=1"], [["seed=1"]]),
        (["seed=1,2"], [["seed=1"], ["seed=2"]]),
        (
            ["strategy.overlap=1,2", "seed=1", "train.lr=0.1,0.2"],
            [
                ["strategy.overlap=1", "seed=1", "train.lr=0.1"],
                ["strategy.overlap=1", "seed=1", "train.lr=0.2"],
                ["strategy.overlap=2", "seed=1", "train.lr=0.1"],
                ["strategy.overlap=2", "seed=1", "train.lr=0.2"],
            ],
        ),
        (["seed=range(0,3)"], [["seed=0"], ["seed=1"], ["seed=2"]]),
        (["model=choice(tiny,proxy)"], [["model=tiny"], ["model=proxy"]]),
    ],
)
def test_a_sweep_is_the_product_of_its_choices(overrides: list[str], jobs: list[list[str]]) -> None:
    assert split_sweep(overrides) == jobs
    for job in jobs:
        compose(job)


def test_a_sweep_that_cannot_be_parsed_is_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        split_sweep(["seed=[1"])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "config", [ModelConfig(d_model=64), TrainConfig(lr=0.1), StrategyConfig(overlap=3), SiteConfig()]
)
def test_a_section_comes_back_from_its_json(config: Any) -> None:
    assert from_dict(type(config), json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.path=/text"], "data.path=/text: data.source=stdlib reads no path; give data=text"),
        (
            ["data=text", "data.path=/text", "data.name=c4"],
            "data.name=c4: data.source=text has none; give",
        ),
        (["data.config_name=en"], "data.config_name=en: data.source=stdlib has none"),
    ],
)
def test_a_text_that_is_named_and_would_not_be_read_is_refused(given: list[str], said: str) -> None:
    assert said in refusal(*given)


def test_a_path_is_kept_absolute_and_names_the_same_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the configuration and in what a resume composes it from."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "labs=2.yaml").write_text("sites: [{name: a}, {name: b, data_path: text}]\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    given = [
        "data=text",
        "data.path=corpus",
        "data.cache_dir='~/cache'",
        "federation='labs=2.yaml'",
        "data.tokenizer=bytes",
    ]
    first = compose([*given, "strategy.overlap=1", "plan.measured=runs/one"])
    monkeypatch.chdir(tmp_path / "there")
    for composed in (first, compose(first.overrides)):
        found = composed.config.data
        assert (found.path, found.cache_dir) == (str(tmp_path / "here" / "corpus"), str(tmp_path / "cache"))
        assert found.tokenizer == "bytes"
        assert composed.config.plan.measured == str(tmp_path / "here" / "runs" / "one")
        # A site's own text is on the site's machine.
        assert [site.data_path for site in composed.config.federation.sites] == [None, "text"]

"""The typed schema of `conf/`: every key with its default, its meaning and its bounds.

The YAML files in `conf/` hold only what differs. Hydra merges them into these dataclasses, so an unknown key or a
wrong type stops before anything starts (`compose.py`); `checks.py` does what no single type can.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.files import expanded

T = TypeVar("T")

# Keys of earlier versions, which a run of theirs may still have in its config.yaml or its checkpoint, and what to use
# instead (`compose.py`).
REMOVED = {
    "strategy.moves": "",
    "strategy.move_ratio": "",
    "plan.policy": "strategy.placement",
    "strategy.wire_dtype": "strategy.up and strategy.down",
}

# strategy.outer_lr where it is null. AdamW's is of pseudo-gradients: see docs/method.md.
OUTER_LR = {"nesterov": 0.7, "adamw": 0.003}
# strategy.outer_momentum where it is null.
OUTER_MOMENTUM = 0.9

# train.recompute: the further on, the less memory and the more work.
RECOMPUTE = ("none", "selective", "full")

# The values of strategy.placement that go by a plan, which is made anew when sites leave or return.
PLANNED = ("planned", "memory", "affine", "equal")


def choice(default: str | None, *allowed: str) -> Any:
    """A string field that takes one of `allowed` (OmegaConf has no Literal), or null where that is the default."""
    return field(default=default, metadata={"allowed": allowed})


# So that a slip of the finger does not fill the memory, take for ever, or leave the 64 bits of an integer.
MOST = 10**9
MOST_LAYERS = 1024
MOST_EXPERTS = 16384
MOST_VOCABULARY = 2**24
MOST_WIDTH = 2**20


def at_least(default: Any, minimum: float, maximum: int | None = None) -> Any:
    """A number with a lower bound, or two; an optional one may also be null."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def above(default: Any, bound: float) -> Any:
    """A number that must be greater than `bound`; an optional one may also be null."""
    return field(default=default, metadata={"above": bound})


def a_name(default: str) -> Any:
    """A string that may become the name of a file or folder (`is_name`)."""
    return field(default=default, metadata={"kind": "name"})


def a_path(default: str | None = None) -> Any:
    """A path, kept absolute. An empty one, as an unset variable of a shell leaves it, is not the current folder."""
    return field(default=default, metadata={"kind": "path"})


NAME_RULE = "1 to 64 letters, digits, '_', '-' and '.', beginning with a letter, a digit or '_'"


DEVICE_RULE = "auto, cpu, cuda, cuda:N"
DEVICES_RULE = "auto or a number from 1 to 1024"


def is_device(text: str) -> bool:
    """Whether this names a device of any machine; `engine.device` knows whether it is there."""
    return re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text, re.ASCII) is not None


def is_devices(text: str) -> bool:
    """Whether this says how many devices a site has."""
    return text == "auto" or (re.fullmatch(r"\d{1,4}", text, re.ASCII) is not None and 1 <= int(text) <= 1024)


def is_name(text: str) -> bool:
    """Whether this may be the name of a site or a run, wherever it is given."""
    return re.fullmatch(r"\w[\w.-]{0,63}", text) is not None


@dataclass
class ModelConfig:
    """Sizes of the model (FoMoE, appendix B). `base_*` are those of the model whose lr was tuned (CompleteP)."""

    name: str = "tiny"  # as it is called in tables; model=NAME chooses all of this
    # Empty: the σ-MoE. Else an architecture of transformers, by the keys of its config.json, from which the sizes below
    # follow. model=hf takes them from the config.json in model.path; what is given here comes on top.
    hf: dict[str, Any] = field(default_factory=dict)
    path: str | None = a_path()  # with model.hf: a checkpoint of Hugging Face, a folder
    init: str = choice(
        "random", "random", "checkpoint"
    )  # the weights at step 0; checkpoint: those in model.path
    # Null: all. With model.hf those that have experts; the others are dense.
    expert_layers: list[int] | None = None
    vocab_size: int = at_least(
        264, 2, MOST_VOCABULARY
    )  # rows of the embedding; at least the ids of data.tokenizer
    d_model: int = at_least(128, 8, MOST_WIDTH)  # width; a multiple of 8 and of 2 num_heads
    num_layers: int = at_least(4, 1, MOST_LAYERS)  # those with experts; in the σ-MoE all have
    num_heads: int = at_least(2, 1, MOST_WIDTH)  # of attention
    num_experts: int = at_least(16, 1, MOST_EXPERTS)  # N_e, routed experts in a layer
    d_expert: int = at_least(128, 8, MOST_WIDTH)  # width of one expert
    top_k: int = at_least(2, 1)  # experts chosen for a token
    num_shared_experts: int = at_least(0, 0, MOST_EXPERTS)  # always on, synchronised as dense
    rope_theta: float = at_least(10_000.0, 1.0)  # base of the rotary position embedding
    norm_eps: float = at_least(1e-5, 0.0)  # added to a variance before its root
    init_std: float = at_least(0.02, 0.0)  # of the embedding; the other weights are scaled by fan-in
    base_d_model: int = at_least(256, 1)  # of the model whose learning rate was tuned
    base_num_layers: int = at_least(4, 1)  # the same
    base_d_expert: int = at_least(128, 1)  # the same
    base_top_k: int = at_least(2, 1)  # the same
    # orthogonal: cosines with orthonormal rows; grap: means of slices of the token, no parameters. Skip mode only.
    router: str = choice("linear", "linear", "orthogonal", "grap")
    # Rank of a ghost's stand-in, an affine map that all sites hold (skip mode only; a multiple of 8). 0: ghosts are
    # skipped.
    standins: int = at_least(0, 0)
    # Coefficient of the load-balancing loss; null: 0.01, with model.hf what its family has.
    load_balance: float | None = at_least(None, 0.0)
    # Whose load that loss evens out: the site's own batch's, or the federation's (skip mode only). Local needs no
    # memory and no news from others; global lets sites with other data, or with locality, use other experts.
    balance: str = choice("local", "local", "global")
    # Prefer residents (skip mode only). bias: a number of the site's own, added to their logits when experts are
    # chosen, such that they get a share locality_target of the assignments. loss: locality_coefficient times
    # the divergence of the mean gate shares from 1 - locality_epsilon on the residents.
    locality: str = choice("off", "off", "bias", "loss")
    locality_target: float | None = above(None, 0.0)  # with locality=bias: the share to reach
    locality_coefficient: float = at_least(0.01, 0.0)  # with locality=loss: of that loss
    locality_epsilon: float = above(0.1, 0.0)  # with locality=loss: the share that ghosts may keep
    # With data.document_mask: the token that ends a document, to which attention keeps. Follows from data.tokenizer.
    document_end: int | None = at_least(None, 0, MOST_VOCABULARY)
    experts_impl: str = choice("grouped", "grouped", "loop")  # loop: one expert at a time, the slow reference


@dataclass(
    unsafe_hash=True
)  # a site caches its corpus and its part of it under these two; nobody changes them
class SiteConfig:
    """One site, or `count` equal ones. What is null is unknown and not used."""

    name: str = a_name("site")  # of the site: fomoe site --name
    count: int = at_least(1, 1)  # so many sites NAME-0, NAME-1, ...
    memory_gib: float | None = above(None, 0.0)  # accelerator memory, GiB
    device: str | None = None  # overrides train.device: auto, cpu, cuda, cuda:1
    devices: str | None = None  # overrides train.devices
    parallel: str | None = choice(None, "ddp", "fsdp", "ep")  # overrides train.parallel
    up_mbps: float | None = above(None, 0.0)  # link to the server, Mbit/s
    down_mbps: float | None = above(None, 0.0)  # from the server, Mbit/s
    latency_ms: float | None = at_least(None, 0.0)  # of a message, one way
    speed: float = above(1.0, 0.0)  # relative to the others
    batch_size: int | None = at_least(None, 1, MOST)  # overrides train.batch_size
    domain: str | None = None  # data domain, for data.partition=domain
    # Text of its own, instead of a share of the common corpus: all of it is used. Read as data.source says (text, jsonl
    # or parquet), and at the site only.
    data_path: str | None = a_path()


@dataclass
class FederationConfig:
    """Who takes part: `num_sites` equal sites, or `sites` one by one."""

    name: str = "uniform"  # as it is called in tables
    path: str | None = a_path()  # YAML file with the keys of this section, for federation=FILE
    num_sites: int | None = at_least(None, 1)  # M
    sites: list[SiteConfig] = field(default_factory=list)


@dataclass
class StrategyConfig:
    """Who holds what, what is averaged, and how the average is applied."""

    name: str = "fomoe"  # as it is called in tables; strategy=NAME chooses all of this
    overlap: int | None = at_least(None, 1)  # O_e, sites holding each expert; null: all of them
    # skip: choose among all experts and skip those that are not held; skip_renormalised: the same, and those held weigh
    # what all chosen ones would; partitioned: choose among those held.
    routing: str = choice("skip", "skip", "skip_renormalised", "partitioned")
    # Who holds how many experts, and which. fixed: equal shares, drawn once; random: drawn anew every T rounds;
    # planned: how many experts and local steps suit each site; memory: shares by memory; affine: equal shares, of
    # the experts that a site's own tokens ask for; equal: equal shares. The last four go by a plan, which is made
    # anew when sites leave or return. overlap says how many copies there are (planned: how much work a round does).
    placement: str = choice("fixed", "fixed", "random", *PLANNED)
    reshuffle_every: int = at_least(1, 1)  # T, rounds between two random placements
    # What a site's update travels as. int8, int4: whole numbers and a scale for each 64; sign: signs and a scale for
    # each 256; topk: the largest of each 4096, a share density of them, in value_bits each. What these four lose is
    # kept at the site, and a share feedback of it is added to the next update (null: 0.95).
    up: str = choice("bf16", "bf16", "fp32", "int8", "int4", "topk", "sign")
    # What a shard travels as. int8, int4, topk: as its difference to what the site was sent in the last round that
    # counts, as above; what they lose is in the next difference. Whole, in bf16, where the site has not got that.
    down: str = choice("bf16", "bf16", "fp32", "int8", "int4", "topk")
    density: float = above(1 / 64, 0.0)  # with up=topk
    # With down=topk; null: density times the number of sites, so that all is sent that they sent together.
    down_density: float | None = above(None, 0.0)
    value_bits: int = at_least(2, 2, 8)  # with up=topk or down=topk
    feedback: float | None = at_least(None, 0.0)  # with up=int8, int4, topk or sign
    # 1: a site begins a round from what it was sent for the round before and its own last update, so that it need not
    # wait for the others'; 0: from what it is sent for the round.
    delay: int = at_least(0, 0, 1)
    # P: tensors are dealt into so many fragments, by layers, and a round synchronises one of them; the others go on at
    # their sites until it is their turn. So a round has about a P-th of the bytes. 1: all tensors in every round.
    fragments: int = at_least(1, 1, MOST_LAYERS)
    # T: an expert that only one site holds is synchronised in every T-th turn of its fragment, and before it moves.
    sole_every: int = at_least(1, 1, MOST)
    inner: str = choice("adamw", "adamw", "gradient")  # gradient: send the mean gradient of the K batches
    keep_moments: bool = True  # the inner optimizer's moments survive the round
    # The outer step. nesterov: DiLoCo; local_adamw: means of parameters and AdamW's moments, three times the bytes;
    # average: FedAvg; adamw: FedAdam, or with inner=gradient the only optimizer (data parallel).
    outer: str = choice("nesterov", "nesterov", "local_adamw", "average", "adamw")
    # Null: as in OUTER_LR, by outer. With outer=adamw and inner=adamw how far a weight of the base model goes in a
    # round; with inner=gradient train.lr says it. The others have none.
    outer_lr: float | None = at_least(None, 0.0)
    outer_momentum: float | None = at_least(None, 0.0)  # nesterov; null: 0.9
    expert_weighting: str = choice("tokens", "tokens", "routed")  # routed: by tokens the expert really got
    # An expert that got too few tokens in a round, over all sites, is held back. Enough are so many that with this
    # confidence one of them has a cosine above capacity_delta with its router row (LocMoE). 0: off.
    capacity_floor: float = at_least(0.0, 0.0)
    capacity_delta: float = above(0.03, 0.0)  # see capacity_floor
    fraction_train: float = at_least(1.0, 0.0)  # share of the sites asked to train in a round
    fraction_evaluate: float = at_least(0.0, 0.0)  # share of the sites asked to evaluate their shard
    min_train_nodes: int = at_least(1, 1)  # asked to train, at least
    min_evaluate_nodes: int = at_least(
        1, 0
    )  # asked to evaluate, at least, where fraction_evaluate is above 0
    min_available_nodes: int | None = at_least(None, 1)  # nodes to wait for; null: all sites
    # A round is committed if this share of the sites gave a good reply, an expert if this share of its holders
    # did (at least one of each); below the first the round is discarded whole.
    quorum: float = at_least(0.5, 0.0)
    expert_quorum: float = at_least(0.5, 0.0)  # see quorum
    max_discarded: int = at_least(3, 1)  # so many discarded rounds in a row end the run
    connect_s: float = at_least(3600.0, 0.0)  # longest wait for enough sites to be connected
    # A round's replies are waited for timeout_factor times as long as rounds usually take (and their spread), at
    # least timeout_floor_s, at most timeout_s.
    timeout_s: float = at_least(3600.0, 0.0)
    timeout_floor_s: float = at_least(60.0, 0.0)  # see timeout_s
    timeout_factor: float = at_least(3.0, 1.0)  # see timeout_s
    norm_bound: float = at_least(10.0, 0.0)  # refuse updates so many times the others' median; 0: off
    # Scale a tensor that is so many times as large as its holders' median down to that median; 0: off.
    clip: float = at_least(3.0, 0.0)
    # How a tensor with at least three holders is averaged. median and trimmed are coordinate-wise and unweighted, and
    # bear with a minority of sites that lie; trimmed leaves out the largest and smallest quarter, at least one.
    mean: str = choice("mean", "mean", "median", "trimmed")


@dataclass
class TrainConfig:
    """The local loop (FoMoE, algorithm 2) and the evaluation on the server."""

    rounds: int = at_least(10, 0, MOST)  # of the run, those before a resume included
    local_steps: int = at_least(20, 1, MOST)  # K
    batch_size: int = at_least(8, 1, MOST)  # sequences a step and site
    seq_len: int = at_least(256, 2, MOST)  # tokens of a sequence
    # Of what takes the local steps. muon: the matrices within layers, experts' among them, by Muon, which keeps one
    # moment of each instead of two; the rest by AdamW.
    optimizer: str = choice("adamw", "adamw", "muon")
    # Of the base model (CompleteP). The paper's 0.01 is for 2 M tokens a batch; this suits thousands.
    lr: float = at_least(0.003, 0.0)
    # Type in which the optimizer's moments are kept; a step is computed in fp32.
    moments: str = choice("fp32", "fp32", "bf16")
    beta1: float = at_least(0.9, 0.0)  # of AdamW, first moment
    beta2: float = at_least(0.95, 0.0)  # of AdamW, second moment
    eps: float = at_least(1e-8, 0.0)  # of AdamW
    weight_decay: float = at_least(0.0, 0.0)  # of the base model; norms have none
    grad_clip: float = at_least(1.0, 0.0)  # global norm; 0: off
    # Warm-up is counted in steps and not as a share of the run (the paper: 25 %), so that a run that is
    # prolonged or resumed begins exactly as the shorter one did. warmup_fraction, if set, takes its place.
    warmup_steps: int = at_least(50, 0, MOST)
    warmup_fraction: float | None = at_least(None, 0.0)  # share of the run; in place of warmup_steps
    expert_warmup_steps: int = at_least(20, 0, MOST)  # for an expert new to a site
    # After the warm-up. cosine: down to final_lr at decay_until; wsd: constant, and over the last decay_steps before it
    # linear down to final_lr. Steps are nominal ones, local_steps a round.
    schedule: str = choice("constant", "constant", "cosine", "wsd")
    # Null: the run's last step; then a run that is prolonged goes up again, and says so.
    decay_until: int | None = at_least(None, 1)
    decay_steps: int | None = at_least(None, 1)  # with schedule=wsd; null: a fifth of decay_until
    final_lr: float = at_least(0.1, 0.0)  # with cosine and wsd: share of lr at the end
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    devices: str = "1"  # of a site, one process for each; auto: all GPUs that it sees
    # How a site's devices share its work. ddp: each has the whole model; fsdp: each a part of every tensor; ep: each
    # has the whole dense part and some of the experts.
    parallel: str = choice("ddp", "ddp", "fsdp", "ep")
    # With parallel=ep: within domains of so many devices experts travel, between them tokens; a divisor of devices.
    # auto: as fast as it can be, by a model of what is measured when the site's model is built.
    ep_domain: str = "auto"
    dtype: str = choice("fp32", "fp32", "bf16")  # of the matrix products
    # Type in which the model has the matrices within its layers. bf16 (with dtype=bf16, on one device): they are
    # rounded once a step and not in each product; the optimizer keeps the exact ones.
    weights: str = choice("fp32", "fp32", "bf16")
    compile: bool = False  # torch.compile
    # A step's batch is worked on in so many pieces, one after the other; its gradient is their mean. So a step needs
    # the memory of one piece's activations. Routers balance each piece by itself.
    micro_batches: int = at_least(1, 1, MOST)
    # What is computed once more in the backward pass instead of being kept: selective: experts; full: attention, too.
    recompute: str = choice(RECOMPUTE[0], *RECOMPUTE)
    threads: int = at_least(1, 0)  # CPU threads a site; 0: PyTorch's default
    eval_batches: int = at_least(16, 0, MOST)  # validation batches on the server after a round; 0: off
    eval_every: int = at_least(1, 1)  # rounds
    # Validation batches for the figures at the end of a run (evaluation.json); 0, or eval_batches=0: off.
    final_eval_batches: int = at_least(4, 0, MOST)


@dataclass(unsafe_hash=True)
class DataConfig:
    """The corpus, its tokens, and how documents are dealt to sites."""

    name: str | None = None  # data=huggingface: name of the data set
    # stdlib: the source text of Python's standard library, for trying out.
    # tokens: ids of data.tokenizer, in .npy as OLMo writes them or .bin with .idx as Megatron does; they are not copied
    source: str = choice("stdlib", "stdlib", "text", "jsonl", "parquet", "tokens", "huggingface")
    path: str | None = a_path()  # file or folder
    config_name: str | None = None  # data=huggingface: configuration of the data set
    stream: bool = (
        False  # data=huggingface: read it as it comes, in its own order; nothing is downloaded before
    )
    split: str = "train"  # data=huggingface: which split to read
    text_key: str = "text"  # field with the text (jsonl, parquet, huggingface)
    domain_key: str | None = None  # field with the domain; where it is null, the domain is that of the file
    max_documents: int | None = at_least(None, 1)  # the first so many
    tokenizer: str = a_path("bytes")  # or the path of a tokenizer.json
    # How the common corpus is dealt to the sites; own: there is none, every site has text of its own.
    partition: str = choice("iid", "iid", "domain", "dirichlet", "own")
    dirichlet_alpha: float = at_least(0.5, 0.0)  # with partition=dirichlet: the smaller, the more uneven
    # Weights by domain, {web: 3, code: 1}: sequences are drawn from these domains alone, by these weights. Empty: from
    # all, as much as there is of each.
    mix: dict[str, float] = field(default_factory=dict, hash=False)
    # Attention keeps to its own document; otherwise a sequence, which is cut from documents laid end to end, is one.
    document_mask: bool = False
    val_fraction: float = at_least(0.05, 0.0)  # share of each domain's bytes kept for validation
    cache_dir: str | None = a_path()  # token cache; null: $FOMOE_CACHE or ~/.cache/fomoe-flwr


# By routing, benchmarks/skip_price.py: skipped work is lost for the most part, a choice among fewer experts is not.
# skip_renormalised and stock architectures were not measured: the former is taken for skip, whose ghosts it skips, too.
SKIP_PRICES = {"skip": 0.9, "skip_renormalised": 0.9, "partitioned": 0.2}


@dataclass
class PlanConfig:
    """What `fomoe plan` and a planned placement go by, beside the federation's sites."""

    # placement planned and affine: after so many rounds look which experts the sites' tokens ask for (skip mode),
    # and move what pays for itself; 0: never.
    demand_every: int = at_least(10, 0)
    holders: int = at_least(1, 1)  # sites that hold each expert, at least
    # What a token is worth less at a site that holds no expert; null: as measured, see SKIP_PRICES.
    skip_price: float | None = at_least(None, 0.0)
    max_steps_ratio: float = at_least(4.0, 1.0)  # of a site's local steps to train.local_steps, at most
    measured: str | None = a_path()  # a run directory, whose speeds are used instead of tflops and mfu
    tflops: float = above(989.0, 0.0)  # peak of the device of a site with speed 1 (H100, dense bf16), Tflop/s
    mfu: float = above(0.4, 0.0)  # share of the peak that training reaches
    # Of weights, gradients, moments and the shard as it was sent, instead of what this program takes; activations come
    # on top. Null: as it is, see docs/sites.md.
    bytes_per_parameter: float | None = above(None, 0.0)
    assumed_mbps: float = above(1000.0, 0.0)  # of links that are not given
    assumed_latency_ms: float = at_least(50.0, 0.0)  # of links that are not given
    server_mbps: float | None = above(None, 0.0)  # the server's own link each way, shared by the sites


@dataclass
class RuntimeConfig:
    """What carries the messages when `fomoe train` starts the run (`flwr run` brings its own)."""

    # flower: Flower's simulation engine (Ray); local: this process.
    name: str = choice("flower", "flower", "local")
    workers: int | None = at_least(None, 1)  # local: sites at a time; null: one a core, one on a GPU
    cpus_per_site: int = at_least(1, 1)  # flower: resources of a simulated site
    # flower: the same; null: one where sites compute on a GPU, else none
    gpus_per_site: float | None = at_least(None, 0.0)


@dataclass
class CheckpointConfig:
    """When the run is saved and how much of it is kept."""

    every: int = at_least(1, 0)  # rounds; 0: only the last round
    # Newest checkpoints kept, on the server and of each site's state; the server also keeps that of lowest loss.
    keep: int = at_least(3, 1)
    # Where the server's model and its outer optimizer lie while it runs; files: in the run directory, where a server
    # with less memory works on them a piece at a time.
    state: str = choice("memory", "memory", "files")


@dataclass
class WandbConfig:
    """Weights & Biases. Offline writes into the run directory and needs no account."""

    mode: str = choice("offline", "offline", "online", "disabled")  # wandb; disabled: nothing
    project: str = "fomoe-flwr"  # of wandb
    entity: str | None = None  # of wandb: whose project
    group: str | None = None  # of wandb: runs that belong together


@dataclass
class RunConfig:
    """Everything a run needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    # What bundles travel through. flower: its messages; else an object store, file:///…, s3://bucket/…, gs://bucket/…
    # or az://account/container/…, whose credentials the server alone has, in its environment.
    store: str = "flower"
    seed: int = at_least(42, 0)  # of weights, placement, deal of the text and order of batches
    resume: str | None = a_path()  # a run directory or one of its checkpoints
    # The same, of an earlier run, with whose model a new one begins at step 0. Sizes, strategy.routing and
    # data.tokenizer are those of that run.
    init_from: str | None = a_path()

    @property
    def trained_before(self) -> bool:
        """Whether the weights at step 0 are those of a checkpoint."""
        return self.init_from is not None or self.model.init == "checkpoint"

    @property
    def overlap(self) -> int:
        """O_e with null resolved to all sites."""
        return self.strategy.overlap or len(self.federation.sites)

    @property
    def skip_price(self) -> float:
        """What a token is worth less at a site that holds no expert, by the routing where it is not given."""
        given = self.plan.skip_price
        return SKIP_PRICES[self.strategy.routing] if given is None else given


# What a run that `init_from` begins takes from the checkpoint where the user gives nothing else.
TAKEN = (
    *(
        f"model.{spec.name}"
        for spec in dataclasses.fields(ModelConfig)
        if spec.name not in ("hf", "path", "init", "document_end")
    ),
    "strategy.routing",
    "data.tokenizer",
)


def schema(config_type: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key, dotted, with its field."""
    for spec in dataclasses.fields(config_type):
        yield prefix + spec.name, spec
        section: Any = spec.default_factory
        if dataclasses.is_dataclass(section):
            yield from schema(section, f"{prefix}{spec.name}.")  # type: ignore[arg-type]


def path_keys() -> list[str]:
    """The keys that name something on the machine that composes the configuration."""
    return [key for key, spec in schema() if spec.metadata.get("kind") == "path"]


def absolute(key: str, value: str) -> str:
    """A path as it is kept, so that it names the same wherever a run goes on. `~` is the user's home."""
    if key == "data.tokenizer" and value == "bytes":
        return value
    return str(expanded(value).absolute()) if value.strip() else value


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

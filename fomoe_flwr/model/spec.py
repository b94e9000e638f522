"""The one table of a model's tensors, and all that follows from it: names, shapes, counts, learning rates, FLOPs.

Every tensor has one name everywhere (wire, checkpoints, exports, logs), in Hugging Face's form:

    model.layers.3.self_attn.q_proj.weight            dense
    model.layers.3.mlp.gate.weight                    the router in skip mode: dense, [N_e, d_model]
    model.layers.3.mlp.experts.7.up_proj.weight       an expert, [d_expert, d_model]
    model.layers.3.mlp.experts.7.gate.weight          its router row in partitioned mode, [d_model]

No PyTorch here, so that planning does not wait for it.

CompleteP (arXiv 2505.01618, table 1, alpha = 1) makes initialisation, learning rates and weight decay transfer across
width and depth, relative to the base model of `ModelConfig.base_*`: hidden weights start with variance 1/fan_in, learn
at lr·(base fan_in / fan_in) and decay at weight_decay·(fan_in / base fan_in), so that lr times decay is the same at
every width; embedding and norms learn at lr, and norms do not decay; each branch is multiplied by base depth / depth
and the logits by base width / width. Where that paper also scales AdamW's epsilon, this project keeps it fixed.

The fan-in of a layer's down-projections is that of their sum: top_k·d_expert of routed experts (docs/method.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fomoe_flwr.config import ModelConfig, TrainConfig

FLOPS_PER_PARAMETER = 6  # of a matrix and token: 2 in the forward pass, 4 in the backward pass

# So many digits and no more: a name may come from anybody.
_EXPERT = re.compile(r"model\.layers\.(\d{1,9})\.mlp\.experts\.(\d{1,9})\.", re.ASCII)

_STANDINS = "model.layers.{layer}.mlp.standins"

# LocalAdamW also averages AdamW's moments; each travels under its parameter's name with one of these in front.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Param(NamedTuple):
    """A row of the table: one tensor, or one for each layer, or one for each expert of each layer."""

    name: str  # with {layer} and {expert} where there are several
    shape: tuple[int, ...]
    kind: str  # dense, router, expert or standin (dense, too, but of no use to one who has all experts)
    init_std: float | None  # of the normal distribution it is drawn from; None: ones
    lr: float  # factor of the learning rate
    decay: float  # factor of the weight decay
    flops: int  # of one token that passes it, forward and backward
    path: str = ""  # of the module's parameter that it is, or a slot of; "": its name
    stacked: bool = False  # whether it is one slot of that parameter
    muon: float = 1.0  # factor of Muon's learning rate; weights decay as they do with AdamW

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def per_expert(self) -> bool:
        """Whether it goes with an expert, to that expert's holders alone."""
        return "{expert}" in self.name

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it maps one hidden state of a layer to another: neither embedding nor head, nor a router's rows."""
        inside = self.kind in ("dense", "expert") and self.name.startswith("model.layers.")
        return inside and len(self.shape) == 2


def table(model: ModelConfig, routing: str) -> list[Param]:
    """Every tensor of the model: the σ-MoE with Peri-LN (FoMoE, appendix B), or with `model.hf` a stock architecture.

    Args:
        routing: in `partitioned` mode the router's rows go with the experts, else it is one dense tensor a layer.
    """
    if model.hf:
        # Its table is read off the stock class, which needs PyTorch and transformers.
        from fomoe_flwr.model.stock import stock_table

        return stock_table(model, routing)
    d, h = model.d_model, model.d_expert
    base_d, base_h = model.base_d_model, model.base_d_expert
    chosen = model.top_k / model.base_top_k
    layer, mlp = "model.layers.{layer}.", "model.layers.{layer}.mlp."

    def matrix(
        name: str,
        shape: tuple[int, int],
        base: tuple[int, int],
        kind: str = "dense",
        stack: str = "",
        terms: float = 1.0,
    ) -> Param:
        """`base`: its shape in the base model. `terms`: an output is the sum of so many times as many products."""
        lr, muon = base[1] / shape[1] / terms, reach(base) / reach(shape) / terms
        flops = FLOPS_PER_PARAMETER * math.prod(shape)
        return Param(name, shape, kind, shape[1] ** -0.5, lr, 1 / lr, flops, stack, bool(stack), muon)

    def gain(name: str) -> Param:
        return Param(name, (d,), "dense", None, 1.0, 0.0, 0)

    rows = [
        # Looked up at the input, multiplied by at the output: the two are tied.
        matrix("model.embed_tokens.weight", (model.vocab_size, d), (model.vocab_size, d))._replace(
            init_std=model.init_std
        ),
        gain("model.embed_norm.weight"),
        gain("model.norm.weight"),
    ]
    rows += [
        gain(f"{layer}{norm}_layernorm.weight")
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    ]
    rows += [matrix(f"{layer}self_attn.{p}_proj.weight", (d, d), (base_d, base_d)) for p in "qkvo"]
    if shared := model.num_shared_experts * h:
        # One matrix sums over all shared experts; the base model has one.
        rows.append(matrix(f"{mlp}shared_experts.up_proj.weight", (shared, d), (base_h, base_d)))
        rows.append(matrix(f"{mlp}shared_experts.down_proj.weight", (d, shared), (base_d, base_h)))
    if model.router != "grap":
        if routing != "partitioned":
            shape = model.num_experts, d
            rows.append(matrix(f"{mlp}gate.weight", shape, (model.num_experts, base_d), "router"))
        else:
            name = f"{mlp}experts.{{expert}}.gate.weight"
            row = matrix(name, (1, d), (1, base_d), "router", f"{mlp}gate.weight")
            rows.append(row._replace(shape=(d,)))
    up, down = f"{mlp}experts.{{expert}}.up_proj.weight", f"{mlp}experts.{{expert}}.down_proj.weight"
    rows.append(matrix(up, (h, d), (base_h, base_d), "expert", f"{mlp}experts.up_EHD"))
    row = matrix(down, (d, h), (base_d, base_h), "expert", f"{mlp}experts.down_EDH", chosen)
    rows.append(row._replace(init_std=(h * chosen) ** -0.5))
    return rows + standin_rows(model, routing, d**-0.5, base_d / d)


def reach(shape: tuple[int, int]) -> float:
    """By how much a step of Muon changes what a matrix gives, up to a factor that is the same for all.

    The step makes a vector longer by √(the longer side) (`engine/muon.py`). What comes in, with entries of size 1, has
    length √fan_in, and of what comes out, entries of size 1 have length √rows. (A step of AdamW, whose entries all pull
    the same way, changes it by fan_in.)
    """
    rows, fan_in = shape
    return math.sqrt(max(shape) * fan_in / rows)


def standin_rows(model: ModelConfig, routing: str, std: float, lr: float, module: str = "") -> list[Param]:
    """The stand-ins of ghosts (`model/standins.py`), which begin as zero: dense tensors of a layer, of all its experts.

    What they compute is next to nothing beside an expert, and is not counted.

    Args:
        std: of the matrix that is not zero.
        lr: its factor of the learning rate.
        module: its path, if not the name of its tensors.
    """
    # A partitioned router asks for no ghost.
    if not model.standins or routing == "partitioned":
        return []
    e, d, rank = model.num_experts, model.d_model, model.standins
    of = {"down": ((e, rank, d), std, lr, "down_ERD"), "up": ((e, d, rank), 0.0, 1.0, "up_EDR"),
          "bias": ((e, d), 0.0, 1.0, "bias_ED")}  # fmt: skip
    return [
        Param(
            f"{_STANDINS}.{part}",
            shape,
            "standin",
            start,
            factor,
            0.0,
            0,
            f"{module or _STANDINS}.{parameter}",
        )
        for part, (shape, start, factor, parameter) in of.items()
    ]


def by_muon(param: Param, train: TrainConfig) -> bool:
    """Whether Muon steps this tensor, and not AdamW."""
    return train.optimizer == "muon" and param.is_hidden_matrix


def moment_bytes(param: Param, train: TrainConfig) -> int:
    """Bytes that a site's optimizer keeps for each number of this tensor: one moment with Muon, else two."""
    return (2 if train.moments == "bf16" else 4) * (1 if by_muon(param, train) else 2)


def weight_bytes(param: Param, train: TrainConfig) -> int:
    """Bytes of each number of this tensor in a site's steps; with train.weights=bf16 the exact one and the rounded."""
    return 4 + 2 if train.weights == "bf16" and param.is_hidden_matrix else 4


def gradient_bytes(param: Param, train: TrainConfig) -> int:
    """Bytes of its gradient; of several pieces of a batch they are added up in fp32."""
    rounded = train.weights == "bf16" and param.is_hidden_matrix and train.micro_batches == 1
    return 2 if rounded else 4


def state_bytes(param: Param, train: TrainConfig) -> int:
    """Bytes that a site holds for each number of this tensor in its steps: value, gradient, moments.

    What was sent, the round's start, comes on top; on several devices, each device holds so much of what it has.
    """
    return weight_bytes(param, train) + gradient_bytes(param, train) + moment_bytes(param, train)


Residents = Sequence[Sequence[int]]  # the experts held, one list a layer


def parameters(model: ModelConfig, residents: Residents, routing: str) -> dict[str, Param]:
    """The shard of a site with these residents: each tensor by its name, layer by layer."""
    return {name: param for name, param, _ in slots(model, residents, routing)}


def slots(model: ModelConfig, residents: Residents, routing: str) -> Iterator[tuple[str, Param, str]]:
    """Name, row of the table, and path of the module's parameter (`Param.path`), of every tensor of a shard.

    The slots of a stack come in the order of the residents.
    """
    for param in table(model, routing):
        if "{layer}" not in param.name:
            yield param.name, param, param.path or param.name
            continue
        for layer, held in zip(expert_layers(model), residents, strict=False):
            path = (param.path or param.name).format(layer=layer)
            if not param.per_expert:
                yield param.name.format(layer=layer), param, path
                continue
            for expert in held:
                yield param.name.format(layer=layer, expert=expert), param, path


def parameter_shapes(model: ModelConfig, residents: Residents, routing: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in the shard of a site with these residents."""
    return {name: param.shape for name, param in parameters(model, residents, routing).items()}


# ----- names


def expert_layers(model: ModelConfig) -> Sequence[int]:
    """The numbers, as they stand in names, of the layers that have experts.

    Tables of experts (who holds what, loads, ages) have a row for each of these and none for a dense layer.
    """
    return range(model.num_layers) if model.expert_layers is None else model.expert_layers


def expert_name(layer: int, expert: int, part: str) -> str:
    """Name of an expert's tensor; `part` is up_proj, down_proj or gate."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"


def standin_name(layer: int, part: str) -> str:
    """Name of a layer's stand-ins of ghosts; `part` is down, up or bias."""
    return f"{_STANDINS.format(layer=layer)}.{part}"


def routing_in_words(model: ModelConfig, routing: str) -> str:
    """strategy.routing, and what computes in the place of ghosts."""
    return f"{routing}, stand-ins of rank {model.standins}" if model.standins else routing


def is_standin(name: str) -> bool:
    """Whether a tensor or moment belongs to the stand-ins of ghosts, which no export has."""
    return ".mlp.standins." in name


def gate_name(layer: int) -> str:
    """Name of a layer's whole router (skip mode)."""
    return f"model.layers.{layer}.mlp.gate.weight"


def expert_of(name: str) -> tuple[int, int] | None:
    """(layer, expert) of an expert's tensor or moment, as its name has them; None for a dense one."""
    match = _EXPERT.search(name)
    return (int(match[1]), int(match[2])) if match else None


def place_of(model: ModelConfig, name: str) -> tuple[int, int] | None:
    """Row and column of an expert's tensor or moment in tables of experts (`expert_layers`); None for a dense one."""
    found = expert_of(name)
    if found is None or model.expert_layers is None:
        return found
    return model.expert_layers.index(found[0]), found[1]


def moment_name(moment: str, name: str) -> str:
    """Name under which a moment of parameter `name` travels."""
    return f"{moment}.{name}"


def is_moment(name: str) -> bool:
    """Whether a name is a moment's and not a parameter's."""
    return name.startswith(("exp_avg.", "exp_avg_sq."))


# ----- multipliers


def depth_multiplier(model: ModelConfig) -> float:
    """Factor of each residual branch."""
    return model.base_num_layers / model.num_layers


def logit_multiplier(model: ModelConfig) -> float:
    """Factor of the logits."""
    return model.base_d_model / model.d_model


# ----- counts


class ParameterCounts(NamedTuple):
    """Numbers of parameters of the whole model, and of what stands in for its experts."""

    dense: int  # embedding, attention, norms, shared experts
    router: int  # dense in skip mode; a row goes with each expert in partitioned mode
    experts: int  # all routed experts of all layers
    standins: int = 0  # of all experts of all layers, at every site

    @property
    def total(self) -> int:
        """Of the model itself."""
        return self.dense + self.router + self.experts


class TokenFlops(NamedTuple):
    """Training FLOPs of one token (forward and backward), whole model."""

    dense: float  # attention, unembedding, shared experts
    experts: float  # the k chosen experts of every layer
    router: float  # the full router of every layer


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Parameters of the whole model by class, without building it."""
    counts = {"dense": 0, "router": 0, "expert": 0, "standin": 0}
    for param in table(model, "skip"):
        counts[param.kind] += param.numel * how_many(model, param, model.num_experts)
    return ParameterCounts(counts["dense"], counts["router"], counts["expert"], counts["standin"])


def expert_parameters(model: ModelConfig) -> int:
    """Parameters of one expert, without its router row."""
    return sum(param.numel for param in table(model, "skip") if param.kind == "expert")


def token_flops(model: ModelConfig, seq_len: int) -> TokenFlops:
    """`F_dense`, `sum_l F_FFN` and `sum_l F_gate` (FoMoE, compute model of section 4).

    A matrix costs 6 FLOPs a parameter; attention scores and values 12·T·d a layer, half of it masked away. Looking the
    embedding up, norms and activations are left out.
    """
    flops = {"dense": 0, "router": 0, "expert": 0, "standin": 0}
    for param in table(model, "skip"):
        flops[param.kind] += param.flops * how_many(model, param, model.top_k)
    return TokenFlops(flops["dense"] + attention_flops(model, seq_len), flops["expert"], flops["router"])


def attention_flops(model: ModelConfig, seq_len: int) -> int:
    """Scores and values of one token in all layers; as much again is masked away."""
    if model.hf:
        from fomoe_flwr.model.stock import stock_attention_flops

        return stock_attention_flops(model, seq_len)
    return model.num_layers * 6 * seq_len * model.d_model


def how_many(model: ModelConfig, param: Param, experts: Any) -> Any:
    """Tensors of this row in a model with so many experts a layer; a number, or an array of them."""
    if "{layer}" not in param.name:
        return 1
    return model.num_layers * (experts if param.per_expert else 1)

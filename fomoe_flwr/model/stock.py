"""A stock class of transformers as a site's model: residents only in its stacks, its own router among all experts.

Two modules of each block are exchanged: the experts by `StockExperts`, which drops ghosts before anything is
dispatched, and the router by one that lets it choose, and counts (`StockRouter`). All else is the library's.
What a family does in its own way is said in `families/`.

Names are those of a checkpoint of Hugging Face, an expert at a time; where that has other names (Mixtral, gpt-oss), the
family translates:

    model.layers.3.mlp.gate.weight                    the router, dense
    model.layers.3.mlp.experts.7.gate_proj.weight     an expert, [d_expert, d_model]; also up_proj and down_proj
    model.layers.3.mlp.experts.7.gate.weight          its router row in partitioned mode, [d_model]

Letters: B sequences, S positions, T tokens, D d_model, C candidates of the router, K experts a token, E resident
experts, H d_expert, P token-expert pairs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_flwr.config import MOST, MOST_EXPERTS, MOST_LAYERS, MOST_VOCABULARY, MOST_WIDTH, ModelConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.model.base import LanguageModel, MoELayer
from fomoe_flwr.model.documents import added, allowed, documents_of
from fomoe_flwr.model.experts import (
    LINEARS,
    SWIGLU,
    Projections,
    compute_dtype,
    grouped_linear,
    rows_of,
)
from fomoe_flwr.model.families import FAMILIES, family_of
from fomoe_flwr.model.families.family import Family, gated
from fomoe_flwr.model.moe import Reach, Router, Routing, routed, router_losses, slots_of
from fomoe_flwr.model.recompute import kept_or_again
from fomoe_flwr.model.spec import FLOPS_PER_PARAMETER, Param, Residents, standin_rows
from fomoe_flwr.model.standins import standins_of

_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
)
_WIDTHS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "q_lora_rank",
    "kv_lora_rank",
)
_FACTORS = (
    "router_aux_loss_coef",
    "aux_loss_alpha",
    "routed_scaling_factor",
    "initializer_range",
    "swiglu_limit",
    "swiglu_alpha",
)
# From what to what a number of config.json may go: transformers itself lets pass what no model can be made of.
_BOUNDS = {
    "vocab_size": (2, MOST_VOCABULARY),
    # Files on the hub have -1 for none.
    "pad_token_id": (-1, MOST_VOCABULARY),
    "num_hidden_layers": (1, MOST_LAYERS),
    "first_k_dense_replace": (0, MOST_LAYERS),
    "decoder_sparse_step": (1, MOST_LAYERS),
    "n_shared_experts": (0, MOST_EXPERTS),
    "max_position_embeddings": (1, MOST),
    "sliding_window": (1, MOST),
    "rms_norm_eps": (0, 1),
    "attention_dropout": (0, 1),
    "router_jitter_noise": (0, 1),
    **dict.fromkeys(_COUNTS, (1, MOST_EXPERTS)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), (8, MOST_WIDTH)),
    **dict.fromkeys(_WIDTHS, (1, MOST_WIDTH)),
    **dict.fromkeys(_FACTORS, (0, MOST)),
}
# Read by classes of transformers, or by a family, only where config.json has them.
_READ_TOO = {"head_dim": tuple(FAMILIES), "aux_loss_alpha": ("deepseek_v2", "deepseek_v3")}
_STACKS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


# ----- the stock class


def stock_config(hf: Mapping[str, Any]) -> Any:
    """The configuration object of transformers.

    Raises:
        ConfigError: transformers is not installed, or a value is none that a model can be made of.
    """
    family = family_of(hf)
    try:
        from transformers import AutoConfig
        from transformers.activations import ACT2FN
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    except ImportError as error:
        raise ConfigError(
            f"model.hf.model_type={family.model_type}: needs transformers; pip install 'fomoe-flwr[hf]'"
        ) from error
    # Before transformers sees them: it logs some, and divides by others.
    _check_numbers(hf)
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key)
        given = rope if isinstance(rope, dict) else {}
        kind = str(given.get("rope_type", given.get("type", "default")))
        if kind not in (known := ("default", *ROPE_INIT_FUNCTIONS)):
            raise ConfigError(f"model.hf.{key}: rope_type={kind:.80}: allowed are {', '.join(known)}")
    try:
        config = AutoConfig.for_model(**hf)
    except Exception as error:  # of many kinds, some of huggingface_hub's own
        raise _refused(error) from error
    if config.hidden_act not in ACT2FN:
        raise ConfigError(f"model.hf.hidden_act={config.hidden_act:.80}: allowed are {', '.join(ACT2FN)}")
    _check_division(config, family)
    return config


def _check_numbers(hf: Mapping[str, Any]) -> None:
    for key, (least, most) in _BOUNDS.items():
        value = hf.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # NaN is between no two numbers.
        if value is not None and not (number and least <= value <= most):
            raise ConfigError(f"model.hf.{key}={value!s:.40}: from {least} to {most} are allowed")
    size, padding = hf.get("vocab_size"), hf.get("pad_token_id")
    if size is not None and padding is not None and padding >= size:
        raise ConfigError(f"model.hf.pad_token_id={padding}: null or below vocab_size={size} is allowed")


def _check_division(config: Any, family: Family) -> None:
    """Sizes of which one must divide the other."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ConfigError(
            f"model.hf.num_attention_heads={heads}: must divide hidden_size={config.hidden_size}"
        )
    if heads % (shared or heads):
        raise ConfigError(f"model.hf.num_key_value_heads={shared}: must divide num_attention_heads={heads}")
    groups, experts = getattr(config, "n_group", None) or 1, getattr(config, "n_routed_experts", None) or 0
    if experts and (experts % groups or experts // groups < family.fewest):
        raise ConfigError(
            f"model.hf.n_group={groups}: must divide n_routed_experts={experts} into groups of {family.fewest} or more"
        )
    if (chosen := getattr(config, "topk_group", None) or 1) > groups:
        raise ConfigError(f"model.hf.topk_group={chosen}: at most n_group={groups}")


def _refused(error: Exception) -> ConfigError:
    text = " ".join(str(error).split())
    field = re.match(r"Validation error for field '(\w{1,64})': ", text)
    key, text = (f"model.hf.{field[1]}", text[field.end() :]) if field else ("model.hf", text)
    return ConfigError(f"{key}: transformers refuses it: {text[:300]}")


def _stock_class(config: Any) -> nn.Module:
    """An instance without memory.

    Raises:
        ConfigError: sizes that do not fit each other.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            stock: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a class of somebody else's says of sizes
        raise _refused(error) from error
    return stock


def _blocks(stock: nn.Module) -> dict[int, Any]:
    """The blocks of experts, by the number of their layer."""
    layers = enumerate(stock.model.layers)  # type: ignore[union-attr, arg-type]
    return {number: layer.mlp for number, layer in layers if hasattr(layer.mlp, "experts")}


@functools.lru_cache(maxsize=8)
def _read(text: str) -> tuple[Any, nn.Module]:
    config = stock_config(json.loads(text))
    return config, _stock_class(config)


def _described(hf: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    """Configuration and an instance to look at, without memory; nobody changes them."""
    return _read(json.dumps(hf, sort_keys=True))


def class_name(hf: Mapping[str, Any]) -> str:
    """Of the stock class, as config.json has it in `architectures`."""
    _, stock = _described(hf)
    return type(stock).__name__


def sizes_of(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `ModelConfig` that follow from config.json.

    Raises:
        ConfigError: an architecture that is not known, values that it refuses, or no layer with experts.
    """
    config, stock = _described(hf)
    family, blocks = family_of(hf), _blocks(stock)
    if not blocks:
        raise ConfigError("model.hf: no layer has experts")
    block = next(iter(blocks.values()))
    router = getattr(block, family.router)
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_layers": len(blocks),
        "expert_layers": list(blocks),
        "num_heads": config.num_attention_heads,
        "num_experts": router.num_experts,
        "d_expert": _d_expert(config),
        "top_k": router.top_k,
        "num_shared_experts": getattr(config, "n_shared_experts", None) or 0,
        "norm_eps": config.rms_norm_eps,
    }


def is_key(hf: Mapping[str, Any], name: str) -> bool:
    """Whether the architecture has a key of this name."""
    # Of the architecture as it is by default: other keys must not matter.
    return hasattr(stock_config({"model_type": hf.get("model_type")}), name) or hf.get(
        "model_type"
    ) in _READ_TOO.get(name, ())


def other_shape(hf: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first of these changes that a checkpoint of this architecture cannot follow, and what it has itself.

    Raises:
        ConfigError: see `sizes_of`.
    """

    def shapes(values: Mapping[str, Any]) -> tuple[Any, ...]:
        rows = _table(json.dumps(values, sort_keys=True), "skip")
        return sizes_of(values)["expert_layers"], [(row.name, row.shape) for row in rows]

    changed = {key: value for key, value in changes.items() if value != hf.get(key)}
    if not changed or shapes({**hf, **changed}) == shapes(hf):
        return None
    for key, value in changed.items():
        if shapes({**hf, key: value}) != shapes(hf):
            return key, getattr(stock_config(hf), key, None)
    return next(iter(changed)), None


def drops_groups(hf: Mapping[str, Any]) -> bool:
    """Whether a partitioned router, which chooses without groups (DeepSeek), chooses among other experts."""
    config = stock_config(hf)
    groups = getattr(config, "n_group", None) or 1
    return (getattr(config, "topk_group", None) or 1) < groups and not family_of(hf).by_logits(config)


def _d_expert(config: Any) -> int:
    return int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)


# ----- the table of its tensors


def stock_table(model: ModelConfig, routing: str) -> list[Param]:
    """`spec.table`. Every weight learns at lr; norms, biases and what is no matrix do not decay.

    At random every matrix is drawn with `initializer_range`, as transformers does.
    """
    std = _described(model.hf)[0].initializer_range
    rows = _table(json.dumps(model.hf, sort_keys=True), routing)
    return [*rows, *standin_rows(model, routing, std, 1.0, "stock.model.layers.{layer}.mlp.experts.standins")]


@functools.lru_cache(maxsize=16)
def _table(text: str, routing: str) -> tuple[Param, ...]:
    config, stock = _read(text)
    family, blocks = family_of(json.loads(text)), _blocks(stock)
    inside = [f"model.layers.{layer}.mlp.{part}." for layer in blocks for part in ("experts", family.router)]
    tied = stock.lm_head.weight is stock.model.embed_tokens.weight  # type: ignore[union-attr]
    std = config.initializer_range

    def row(name: str, shape: Sequence[int], kind: str, path: str, stacked: bool = False) -> Param:
        matrix = len(shape) == 2
        looked_up = name == "model.embed_tokens.weight" and not tied
        numel = torch.Size(shape).numel()
        # A router's row is one of a matrix.
        flops = (
            FLOPS_PER_PARAMETER * numel if (matrix or name.endswith("gate.weight")) and not looked_up else 0
        )
        init = None if "norm" in name else 0.0 if name.endswith("bias") else std
        return Param(name, tuple(shape), kind, init, 1.0, float(matrix), flops, f"stock.{path}", stacked)

    rows = [
        row(name, parameter.shape, "dense", name)
        for name, parameter in stock.named_parameters()
        if not name.startswith(tuple(inside))
    ]
    mlp, block = "model.layers.{layer}.mlp.", next(iter(blocks.values()))
    router = getattr(block, family.router)
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        path = f"{mlp}{family.router}.router.stock.{name}"
        if routing == "partitioned":
            rows.append(row(f"{mlp}experts.{{expert}}.gate.{name}", tensor.shape[1:], "router", path, True))
        else:
            rows.append(row(f"{mlp}gate.{name}", tensor.shape, "router", path))
    h, d = _d_expert(config), config.hidden_size
    shapes = {"gate_proj": (h, d), "up_proj": (h, d), "down_proj": (d, h)}
    for part, shape in shapes.items():
        name, path = f"{mlp}experts.{{expert}}.{part}", f"{mlp}experts.{_STACKS[part]}"
        rows.append(row(f"{name}.weight", shape, "expert", path, True))
        if family.biases:
            rows.append(row(f"{name}.bias", shape[:1], "expert", f"{path}_bias", True))
    return tuple(rows)


def stock_attention_flops(model: ModelConfig, seq_len: int) -> int:
    """`spec.attention_flops`: by head widths that may differ, over the positions that a layer looks back to."""
    config, _ = _described(model.hf)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "qk_nope_head_dim", None)
    keys = width if keys is None else keys + config.qk_rope_head_dim
    widths = keys + (getattr(config, "v_head_dim", None) or width)
    total = 0.0
    for kind in getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers:
        window = seq_len
        if kind == "sliding_attention" and config.sliding_window:
            window = min(seq_len, config.sliding_window)
        # The first positions look back to less than the window.
        mean = window - window**2 / (2 * seq_len)
        total += 6 * mean * config.num_attention_heads * widths
    return round(total)


def stock_settings(model: ModelConfig) -> Any:
    """The configuration object of transformers; nobody changes it."""
    return _described(model.hf)[0]


def block_shapes(model: ModelConfig) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the dense parameters of each block, by their names within it."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for row in _table(json.dumps(model.hf, sort_keys=True), "skip"):
        if match := re.match(r"model\.layers\.(\d+)\.", row.name):
            found.setdefault(int(match[1]), {})[row.name[match.end() :]] = row.shape
    return [found[layer] for layer in sorted(found)]


# ----- the modules that are exchanged


class StockRouter(Router):
    """The stock router, counted, balanced and made local like ours.

    In partitioned mode it has the residents' rows alone; groups of experts (DeepSeek) are of all of them, so among some
    it chooses without groups. Whoever holds all has the stock model.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: Any,
        stock: nn.Module,
        candidates: Sequence[int],
        residents: Sequence[int] | None,
    ) -> None:
        super().__init__(model, len(candidates), residents)
        self.settings, self.stock, self.family = config, stock, family_of(model.hf)
        for name, tensor in (*stock.named_parameters(), *stock.named_buffers()):
            # A buffer is told by name and sent like a parameter, but no gradient trains it.
            trained = isinstance(tensor, nn.Parameter)
            stock._buffers.pop(name, None)
            rows = torch.empty(len(candidates), *tensor.shape[1:], dtype=torch.float32)
            setattr(stock, name, nn.Parameter(rows, requires_grad=trained))
        if len(candidates) < model.num_experts:
            sizes = {"num_experts": len(candidates), "top_k": self.top_k, "num_group": 1, "topk_group": 1}
            for name, size in sizes.items():
                if hasattr(stock, name):
                    setattr(stock, name, size)

    @property
    def weight(self) -> nn.Parameter:
        """Its rows, weight_CD."""
        rows: nn.Parameter = self.stock.weight  # type: ignore[assignment]
        return rows

    def judge(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        bias_C = getattr(self.stock, "bias", None)
        logits_TC = F.linear(x_TD, self.weight.to(x_TD.dtype), bias_C)
        return logits_TC, self.family.scores(logits_TC)

    def choose(self, x_TD: Tensor, scores_TC: Tensor) -> tuple[Tensor, Tensor]:
        _, weights_TK, chosen_TK = self.stock(x_TD)
        return weights_TK, chosen_TK

    def weigh(self, logits_TC: Tensor, scores_TC: Tensor, chosen_TK: Tensor) -> Tensor:
        return self.family.weigh(self.settings, logits_TC, scores_TC, chosen_TK)


class StockGate(nn.Module):
    """What a stock block calls for its choice; keeps the last one, for its losses."""

    def __init__(self, router: StockRouter) -> None:
        super().__init__()
        self.router, self.routing = router, Routing(*[torch.empty(0)] * 4)

    def forward(self, x: Tensor) -> tuple[None, Tensor, Tensor]:
        self.routing = self.router(x.flatten(0, -2))
        return None, self.routing.weights_TK, self.routing.chosen_TK


class StockExperts(nn.Module):
    """Gated experts, residents only, behind the call that a stock block makes."""

    slot_C: Tensor

    def __init__(
        self,
        model: ModelConfig,
        config: Any,
        residents: Sequence[int],
        candidates: Sequence[int],
        routing: str,
    ) -> None:
        super().__init__()
        self.settings, self.family, self.routing = config, family_of(model.hf), routing
        e, h, d = len(residents), model.d_expert, model.d_model
        for part, (rows, columns) in (("gate", (h, d)), ("up", (h, d)), ("down", (d, h))):
            setattr(self, part, nn.Parameter(torch.empty(e, rows, columns)))
            if self.family.biases:
                setattr(self, f"{part}_bias", nn.Parameter(torch.empty(e, rows)))
        self.num_slots, self.slots = e, slots_of(residents, candidates)
        self.register_buffer("slot_C", torch.tensor(self.slots), persistent=False)
        self.linear = LINEARS[model.experts_impl]
        self.reach = Reach()
        self.standins = standins_of(model, residents)
        self.again = False  # whether to compute them again in the backward pass

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD: Tensor = kept_or_again(
            self.again,
            routed,
            x_TD,
            weights_TK,
            chosen_TK,
            self.slot_C,
            self.num_slots,
            self.routing,
            self.compute,
            self.projections,
            self.standins,
        )
        return y_TD

    @property
    def projections(self) -> Projections | None:
        """For `experts_of_tokens`, where they are SwiGLU without biases; None: they are not."""
        usual = self.family.activation is gated and self.settings.hidden_act in ("silu", "swish")
        apart = self.linear is not grouped_linear or self.reach.exchange is not None
        if self.family.biases or not usual or apart:
            return None
        gate_EHD, up_EHD, down_EDH = (self._weight(part) for part in ("gate", "up", "down"))
        return Projections(SWIGLU, down_EDH, [gate_EHD, up_EHD])

    def _weight(self, part: str) -> Tensor:
        return self.reach.gather(self.get_parameter(part))

    def compute(self, x_PD: Tensor, offsets_E: Tensor) -> Tensor:
        """Outputs of the rows by their experts, wherever these are."""
        return self.reach.through(self._compute, x_PD, offsets_E)

    def _compute(self, x_PD: Tensor, offsets_E: Tensor) -> Tensor:
        def project(part: str, x: Tensor) -> Tensor:
            y = self.linear(x, self._weight(part), offsets_E)
            if self.family.biases:
                y = y + rows_of(self._weight(f"{part}_bias"), offsets_E, len(x)).to(y.dtype)
            return y

        hidden_PH = self.family.activation(self.settings, project("gate", x_PD), project("up", x_PD))
        return project("down", hidden_PH)


class StockModel(LanguageModel):
    """A causal language model of transformers with these residents."""

    def __init__(self, model: ModelConfig, residents: Residents, routing: str) -> None:
        super().__init__(model, residents, routing)
        config, family = stock_config(model.hf), family_of(model.hf)
        stock: Any = _stock_class(config)
        self.stock, self._layers = stock, []
        whole = routing != "partitioned"
        for held, block in zip(self.resident_experts, _blocks(self.stock).values(), strict=True):
            candidates = list(range(model.num_experts)) if whole else held
            router = StockRouter(
                model, config, getattr(block, family.router), candidates, held if whole else None
            )
            setattr(block, family.router, StockGate(router))
            experts = block.experts = StockExperts(model, config, held, candidates, routing)
            layer = MoELayer(router, model.num_experts, held, candidates, experts.compute, experts.reach)
            self._layers.append((block, layer))
        self._family = family
        # Wrapped once: what is computed again may change from round to round.
        self._attention_again = False
        for layer in stock.model.layers:
            layer.self_attn.forward = functools.partial(self._attend, layer.self_attn.forward)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.stock.model.layers)

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [layer for _, layer in self._layers]

    def _attend(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return kept_or_again(self._attention_again, forward, *args, **kwargs)

    def recompute(self, what: str) -> None:
        self._attention_again = what == "full"
        for block, _ in self._layers:
            block.experts.again = what != "none"

    def finish_building(self, device: str) -> None:
        # Emptying gives each of two tied names memory of its own.
        self.stock.tie_weights()
        for module in self.stock.modules():
            if "RotaryEmbedding" in type(module).__name__:
                self.stock._init_weights(module)
            if isinstance(module, StockExperts):
                module.slot_C.copy_(torch.tensor(module.slots, device="cpu"))
                if module.standins is not None:
                    module.standins.reset_buffers()
            if isinstance(module, StockRouter):
                module.reset_buffers()

    def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        x_BSD = self.stock.model(
            input_ids=tokens_BS, attention_mask=self._mask(tokens_BS), use_cache=False
        ).last_hidden_state
        routings = [getattr(block, self._family.router).routing for block, _ in self._layers]
        coefficient = config.load_balance
        if coefficient is None:
            coefficient = self._family.balance(self.stock.config)
        balance, locality = router_losses([layer.gate for _, layer in self._layers], routings)
        loss = coefficient * balance
        if config.locality == "loss":
            loss = loss + config.locality_coefficient * locality
        return x_BSD, loss

    def _mask(self, tokens_BS: Tensor) -> Any:
        """What the library takes as it is, where it would make one itself otherwise; so windows are part of it."""
        if self.config.document_end is None:
            return None
        settings = self.stock.config
        document_BS = documents_of(tokens_BS, self.config.document_end)
        dtype = compute_dtype(self.stock.lm_head.weight)
        window = getattr(settings, "sliding_window", None)
        near = added(allowed(document_BS, window), dtype)
        if getattr(settings, "layer_types", None) is None:
            return near
        return {"full_attention": added(allowed(document_BS), dtype), "sliding_attention": near}

    def head(self) -> tuple[Tensor, float]:
        # No family has a bias there.
        return self.stock.lm_head.weight, 1.0

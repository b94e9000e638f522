"""What a training step keeps from its forward pass for its backward pass, in bytes: by formula, layer by layer.

Each formula says which tensors the code of `model/` (and, of stock architectures, the library's classes) leaves for the
backward pass; tests/plan/test_activations.py holds them against the tensors that are really alive between the two.
Parameters are not among them, but what autocast makes of them is: with train.dtype=bf16 each matrix once more in bf16.

Counted is what PyTorch keeps without train.compile; compiled, a step may keep less. Sums over a head's width and the
like, of a few bytes each, are left out.

Letters: T tokens of a piece of the batch (train.micro_batches), S positions, D d_model, N heads, C candidates of a
router, K experts a token, P token-expert pairs that are computed, E resident experts, H d_expert, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.plan.system import Amounts

FP32, BF16, INT64, INT32 = 4, 2, 8, 4


class Piece(NamedTuple):
    """What a forward pass works on, and how."""

    rows: int  # sequences
    seq_len: int
    low: bool  # matrix products in bf16 (train.dtype)
    recompute: str  # train.recompute
    gpu: bool  # autocast and the dispatcher do some things otherwise there

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def width(self) -> int:
        """Bytes of a number that goes into a matrix product."""
        return BF16 if self.low else FP32


class Kept(NamedTuple):
    """Bytes of activations, all layers together, by what they are of."""

    residual: float  # the stream that the blocks add to
    norms: float
    attention: float
    router: float
    experts: Any  # Amounts: grows with the residents
    dense: float  # dense layers and shared experts
    head: float  # gradients of hidden states and head, which the loss makes on its way forward

    @property
    def total(self) -> Any:
        """Of all."""
        return sum(self)


class Held(NamedTuple):
    """What a site has of the experts, and how its router chooses; numbers, or arrays of many cases at once."""

    residents: Any  # Amounts: a layer
    candidates: Any  # of its router
    chosen: Any  # candidates of a token
    share: Any  # of its router's choices that are residents


def held(model: ModelConfig, routing: str, residents: Amounts, share: Amounts) -> Held:
    """At a site with so many residents a layer.

    Args:
        share: of its router's choices that are residents, where it also chooses ghosts.
    """
    if routing != "partitioned":
        return Held(residents, model.num_experts, model.top_k, share)
    chosen = (residents + model.top_k - abs(residents - model.top_k)) / 2  # the smaller of the two
    return Held(residents, residents, chosen, 1.0)


def rows_of(piece: Piece, site: Held) -> Any:
    """Token-expert pairs of a layer for which there are rows.

    Ghosts are dropped on a CPU. On a GPU their rows are there, at the end, for nobody waits to know how many they are.
    """
    return piece.tokens * site.chosen * (1.0 if piece.gpu else site.share)


def kept(model: ModelConfig, routing: str, piece: Piece, site: Held) -> Kept:
    """Of one piece of a batch."""
    return (_stock if model.hf else _sigma)(model, routing, piece, site)


# ----- the σ-MoE


def _sigma(model: ModelConfig, routing: str, piece: Piece, site: Held) -> Kept:
    t, d, w, low = piece.tokens, model.d_model, piece.width, piece.low
    layers, heads = model.num_layers, model.num_heads
    again = piece.recompute == "full"
    # Mean and deviation of each token, fp32; what goes into a norm, or comes out of it. What attention gives is
    # normalised as it is; on a GPU autocast has norms work in fp32, on a copy. The first norm is part of what is
    # computed again with attention, and attention keeps its output only where it works on it itself.
    first = 0 if again else 2 * t * FP32 + (0 if low else t * d * FP32)
    after = FP32 if piece.gpu else w
    norms = layers * (first + 3 * 2 * t * FP32 + t * d * (after + 2 * FP32)) + 2 * 2 * t * FP32
    # Cosines and sines of positions.
    rope = 2 * piece.seq_len * (d // heads // 2)
    attention = 0 if low and not again else rope * FP32
    attention += _mask(model, piece)
    if not again:
        # Queries, keys, values; the result, and once more with a token's heads side by side. In bf16 three copies of
        # the input, one for each projection.
        attention += layers * (t * d * w * (5 + 3 * low) + heads * t * FP32)
        attention += layers * low * BF16 * (4 * d * d + 2 * rope)
    shared = model.num_shared_experts * model.d_expert
    dense = layers * bool(shared) * (2 * t * shared * w + low * BF16 * (t * d + 2 * d * shared))
    return Kept(
        residual=(2 + 2 * layers) * t * d * FP32,
        norms=norms,
        attention=attention,
        router=layers * _sigma_router(model, piece, site),
        experts=layers * _experts(model, routing, piece, site, 1, False),
        dense=dense,
        head=_head(model, piece),
    )


def _mask(model: ModelConfig, piece: Piece) -> int:
    """Of documents, one for all layers. (FlexAttention, on a GPU, has less.)"""
    return 0 if model.document_end is None else piece.tokens * piece.seq_len * piece.width


def _sigma_router(model: ModelConfig, piece: Piece, site: Held) -> Any:
    t, d = piece.tokens, model.d_model
    bytes_ = (t + 1) * site.candidates * FP32 + t * site.chosen * (INT64 + FP32) + t * FP32
    if model.router == "orthogonal":
        # Tokens of length 1, and their lengths.
        bytes_ = bytes_ + (t + site.candidates) * (d + 2) * FP32
    return bytes_


# ----- what all have


def _experts(
    model: ModelConfig, routing: str, piece: Piece, site: Held, projections: int, apart: bool
) -> Any:
    """Of a layer.

    Args:
        projections: of an expert before its activation.
        apart: experts of no usual form, which PyTorch's operators compute one after the other (gpt-oss).
    """
    t, d, h, w, low = piece.tokens, model.d_model, model.d_expert, piece.width, piece.low
    if piece.recompute != "none":
        return 0.0
    residents, chosen, rows = site.residents, site.chosen, rows_of(piece, site)
    # The order of all pairs, also of those that are dropped.
    bytes_ = t * chosen * INT64 + residents * INT32 + low * BF16 * (1 + projections) * residents * d * h
    if routing == "skip_renormalised":
        # A router whose weights are its scores need not keep them a second time.
        numbers = 3 if model.hf and not apart else 2
        bytes_ = bytes_ + t * model.top_k * numbers * FP32 + t * (3 * FP32 + 1)
    if apart:
        # Never padded. Gathered rows (in bf16 one copy for each projection), outputs, and outputs times weights.
        rows = t * chosen * site.share
        bytes_ = bytes_ + rows * (d * (2 * BF16 + BF16 + FP32 if low else 3 * FP32) + 7 * h * w + 6 * INT32)
    else:
        bytes_ = bytes_ + rows * projections * h * w
    if model.standins and routing != "partitioned":
        ghosts, rank = t * model.top_k * (1 - site.share), model.standins
        wide = 2 * BF16 + FP32 if low else 3 * FP32
        bytes_ = bytes_ + ghosts * (d * wide + rank * w + 4 * INT32) + t * model.top_k * INT64
        bytes_ = bytes_ + model.num_experts * (INT32 + low * BF16 * 2 * d * rank)
    return bytes_


def _head(model: ModelConfig, piece: Piece) -> float:
    return (piece.tokens + model.vocab_size) * model.d_model * FP32


# ----- stock architectures


def _stock(model: ModelConfig, routing: str, piece: Piece, site: Held) -> Kept:
    from fomoe_flwr.model.stock import block_shapes, stock_settings

    config = stock_settings(model)
    t, d, w, low = piece.tokens, model.d_model, piece.width, piece.low
    again = piece.recompute == "full"
    norms, attention, dense = t * (d + 1) * FP32, 0.0, 0.0
    for shapes in block_shapes(model):
        inner = "mlp.up_proj.weight" in shapes
        # Normalised tokens and by what each was divided. The first norm's output is kept where attention works on
        # it itself or is computed again, the second's by experts, which begin from fp32.
        outputs = bool(again or not low) + bool(not inner or not low)
        norms += t * (2 * (d + 1) + outputs * d) * FP32
        if not again:
            attention += _stock_attention(config, shapes, piece, model.document_end is not None)
        for part in ("mlp.", "mlp.shared_experts."):
            if (shape := shapes.get(f"{part}up_proj.weight")) is not None:
                dense += 4 * t * shape[0] * w + low * BF16 * (2 * t * d + 3 * d * shape[0])
    # Angles of positions, and with recompute=full the positions; the masks of an architecture that goes without
    # PyTorch's attention.
    rope = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
    rope = rope or d // config.num_attention_heads
    half = config.model_type in ("deepseek_v2", "gpt_oss")
    attention += 2 * piece.seq_len * rope * FP32 / (1 + half) + again * piece.seq_len * INT64
    mask = _mask(model, piece)
    if _eager(config):
        attention += again * 2 * (mask or t * piece.seq_len * FP32)
    elif again or not hasattr(config, "kv_lora_rank"):
        attention += mask
    return Kept(
        residual=(1 + 2 * config.num_hidden_layers) * t * d * FP32,
        norms=norms,
        attention=attention,
        router=model.num_layers * _stock_router(config, piece, site),
        experts=model.num_layers * _experts(model, routing, piece, site, 2, _eager(config)),
        dense=dense,
        head=_head(model, piece),
    )


def _eager(config: Any) -> bool:
    """gpt-oss: attention with sinks, which transformers computes with all scores side by side, and experts of a form
    of their own."""
    return bool(config.model_type == "gpt_oss")


def _stock_attention(config: Any, shapes: dict[str, tuple[int, ...]], piece: Piece, masked: bool) -> float:
    """Of a block.

    Args:
        shapes: of its parameters, by name within the block.
        masked: by documents; then keys and values are repeated for each head.
    """
    t, w, low = piece.tokens, piece.width, piece.low
    heads: int = config.num_attention_heads
    bytes_: float

    def width(name: str) -> int:
        return shapes[f"self_attn.{name}.weight"][0]

    matrices = [shape for name, shape in shapes.items() if name.startswith("self_attn.") and len(shape) == 2]
    bytes_ = low * BF16 * sum(rows * columns for rows, columns in matrices)
    d = shapes["self_attn.o_proj.weight"][0]
    result = shapes["self_attn.o_proj.weight"][1]
    if "self_attn.kv_b_proj.weight" in shapes:
        # Compressed keys and values (DeepSeek): norms of what is compressed, then queries, keys and values.
        lora, both = shapes["self_attn.kv_b_proj.weight"][1], width("kv_a_proj_with_mqa")
        bytes_ += low * 2 * t * d * BF16
        bytes_ += t * FP32 + t * (lora * (FP32 + 2 * BF16) if low else (both + 2 * lora) * FP32)
        keys: int = width("kv_b_proj") - result + heads * config.qk_rope_head_dim
        if "self_attn.q_a_proj.weight" in shapes:
            compressed = width("q_a_proj")
            bytes_ += t * FP32 + t * compressed * (FP32 + 2 * BF16 if low else 3 * FP32)
        if piece.gpu:
            return bytes_ + t * w * (2 * keys + 2 * result) + heads * t * FP32
        # Heads for keys are wider than those for values: a CPU has no fast kernel for that, and keeps all scores.
        return bytes_ + t * (2 * keys + result) * FP32 + heads * t * piece.seq_len * FP32 + t * result * w
    queries, keys = width("q_proj"), width("k_proj")
    bytes_ += low * 3 * t * d * BF16
    if _eager(config):
        # Keys and values are repeated for each head.
        scores = heads * t * ((piece.seq_len + 1) * FP32 + INT64 + low * piece.seq_len * BF16)
        return bytes_ + 4 * t * queries * w + scores
    for name, wide in (("q_norm", queries), ("k_norm", keys)):
        if (shape := shapes.get(f"self_attn.{name}.weight")) is not None:
            # Normalised over a head, or over all of them at once.
            bytes_ += t * (wide * (FP32 + w) + wide // shape[0] * FP32)
    return bytes_ + t * w * (queries + 2 * (queries if masked else keys) + result) + heads * t * FP32


def _stock_router(config: Any, piece: Piece, site: Held) -> Any:
    t, kind = piece.tokens, config.model_type
    # The library's router computes its scores, and ours the same ones for the balance loss. gpt-oss has scores of the
    # chosen only.
    scores = 1 if kind == "gpt_oss" else 2
    numbers = 1
    if kind == "mixtral" or (kind != "deepseek_v2" and getattr(config, "norm_topk_prob", False)):
        numbers = 2
    return (
        # The stock block's gate keeps how its last batch was spread, too.
        (t * scores + 3) * site.candidates * FP32
        + t * site.chosen * (INT64 + numbers * FP32)
        + t * numbers * FP32
    )

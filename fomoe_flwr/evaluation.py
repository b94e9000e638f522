"""The loss of a model on a text: with all experts, with each site's residents only, and routing necessity.

Routing necessity is the loss with random routing minus the loss with the learned router.

Random routing draws k experts for each token, uniformly and without replacement among the router's candidates. A
drawn expert is weighted as the learned router would weigh it if it had chosen it. So only the choice is replaced, and
the figure says what the choice is worth. NumPy makes the draws, so that they are the same on every device.

Letters: B sequences, T tokens of a sequence with its first, P predicted tokens, C candidates, K experts a token,
D domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fomoe_flwr.config import DataConfig, ModelConfig
from fomoe_flwr.data import LabelledBatch, TokenCorpus, labelled_batches
from fomoe_flwr.engine.device import autocast
from fomoe_flwr.model.base import LanguageModel
from fomoe_flwr.model.build import build
from fomoe_flwr.model.moe import Routing
from fomoe_flwr.model.spec import expert_layers, parameter_shapes
from fomoe_flwr.model.standins import Sample, as_tensors
from fomoe_flwr.placement import full_residents
from fomoe_flwr.units import finite

FILE = "evaluation.json"  # in the run directory
DRAWS = 3  # of random routing; necessity is their mean
# At the end of a run there is little time. One draw over more text has less noise than three draws over less text.
FINAL_DRAWS = 1
_LOGITS_AT_ONCE = 2**26  # 256 MB; larger logits are computed in pieces

Residents = Sequence[Sequence[int]]  # the experts held, one list a layer
Figures = dict[str, Any]  # JSON values, except that some may be infinite


# ----- the model and the text


@dataclass(frozen=True)
class Judged:
    """A model, and which site holds which experts of it."""

    model: ModelConfig
    routing: str  # strategy.routing
    state: Mapping[str, Tensor]  # all parameters by name
    placement: Mapping[str, Residents]  # by site

    @property
    def everything(self) -> Residents:
        """Residents of a holder of the whole model."""
        return full_residents(self.model.num_layers, self.model.num_experts)

    def module(self, residents: Residents, device: str) -> LanguageModel:
        """The model with these experts only.

        Raises:
            WireError: the state does not fit such a model.
        """
        names = parameter_shapes(self.model, residents, self.routing)
        shard = {name: self.state[name] for name in names if name in self.state}
        return build(self.model, residents, self.routing, shard, device)


@dataclass(frozen=True)
class Text:
    """Tokens to predict, and how many bytes they stand for."""

    batches: Callable[[], Iterable[LabelledBatch]]  # the same at every call
    domains: Sequence[str]
    token_bytes: NDArray[np.int32]  # [vocab_size], see TokenCorpus


def text_of(
    corpus: TokenCorpus, documents: NDArray[np.int64], seq_len: int, batch_size: int, num_batches: int | None
) -> Text:
    """Documents of a corpus: all of their text, or `num_batches` batches of it (see `data.labelled_batches`)."""
    return Text(
        lambda: labelled_batches(corpus, documents, seq_len, batch_size, num_batches),
        corpus.domains,
        corpus.token_bytes,
    )


def describe_text(
    data: DataConfig, part: str, corpus: TokenCorpus, documents: NDArray[np.int64]
) -> dict[str, Any]:
    """Which text it was, as JSON values. `part` is validation or whole."""
    place = data.path or data.name
    return {
        "name": f"{data.source} {place}" if place else data.source,
        "part": part,
        "documents": len(documents),
        "tokens": int(corpus.doc_lengths[documents].sum()) - 1,  # the first is not predicted
    }


# ----- loss


def evaluate(module: LanguageModel, batches: Iterable[Tensor], dtype: str, device: str) -> tuple[float, int]:
    """Mean cross-entropy (nats a token) and number of predicted tokens: the validation loss of a round."""
    total_D, tokens_D, _ = _sums(module, ((tokens_BT, None) for tokens_BT in batches), dtype, device)
    return float(total_D[0]) / max(int(tokens_D[0]), 1), int(tokens_D[0])


class Survey(NamedTuple):
    """What a site says before round 1."""

    loss: float  # nats a token
    tokens: int  # predicted
    load_LE: list[list[int]]  # how often the routers chose each expert, ghosts too: what this text asks for
    standins: dict[
        str, Tensor
    ]  # by name, fitted to the residents; zeros for ghosts, and for what no token chose


def survey(
    module: LanguageModel, batches: Iterable[Tensor], num_batches: int, dtype: str, device: str
) -> Survey:
    """`evaluate`, and what the routers choose and the residents compute.

    Behind a layer whose ghosts are missing the tokens are not quite those of the whole model, so deeper layers' choices
    are near to its own and not equal.
    """
    samples = [Sample(num_batches) for _ in module.moe_layers]
    load_LE = torch.zeros(len(module.moe_layers), module.config.num_experts, dtype=torch.int64)

    def counting(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Routing], None]:
        def hook(_: nn.Module, x: tuple[Tensor, ...], routing: Routing) -> None:
            if module.config.standins:
                samples[layer].add(x[0], routing.chosen_TK)
            chosen = routing.chosen_TK.flatten().cpu()
            load_LE[layer] += torch.bincount(chosen, minlength=load_LE.shape[1])

        return hook

    handles = [moe.gate.register_forward_hook(counting(layer)) for layer, moe in enumerate(module.moe_layers)]
    try:
        loss, tokens = evaluate(module, batches, dtype, device)
    finally:
        for handle in handles:
            handle.remove()
    return Survey(loss, tokens, load_LE.tolist(), _fitted(module, samples))


@torch.no_grad()
def _fitted(module: LanguageModel, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stand-ins by name; none where the model has none."""
    model, tensors = module.config, dict[str, Tensor]()
    if model.standins:
        for layer, moe, sample in zip(expert_layers(model), module.moe_layers, samples, strict=True):
            found = sample.fit(moe.experts, moe.resident_experts, model.standins)
            tensors |= as_tensors(layer, found, model.num_experts)
    return tensors


def evaluate_text(module: LanguageModel, text: Text, dtype: str) -> Figures:
    """Loss on a text, whole and by domain, with the experts that the module holds.

    A token belongs to the domain of its document. Bits per byte can be compared between tokenizers: the bytes are those
    of the tokens that are predicted. End tokens and tokens for unknown text cost bits and have no bytes.

    Args:
        dtype: of the matrix products, fp32 or bf16.
    """
    device = str(next(module.parameters()).device)
    total_D, tokens_D, bytes_D = _sums(
        module, text.batches(), dtype, device, len(text.domains), text.token_bytes
    )
    figures = _figures(total_D.sum(), tokens_D.sum(), bytes_D.sum())
    figures["by_domain"] = {
        name: _figures(total_D[index], tokens_D[index], bytes_D[index])
        for index, name in enumerate(text.domains)
        if tokens_D[index]
    }
    return figures


def _figures(total: float, tokens: int, num_bytes: float) -> Figures:
    loss = float(total) / max(int(tokens), 1)
    return {
        "loss": loss,  # mean cross-entropy, nats a token
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": float(total) / math.log(2) / num_bytes if num_bytes else math.inf,
        "tokens": int(tokens),  # predicted
    }


@torch.no_grad()
def _sums(
    module: LanguageModel,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    dtype: str,
    device: str,
    num_domains: int = 1,
    token_bytes: NDArray[np.int32] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Sum of the losses, number of predicted tokens and of their bytes of text, by domain.

    Args:
        batches: tokens, and the domain of each token; None: all tokens belong to domain 0, and no bytes are counted.
    """
    module.eval()
    total_D, tokens_D, bytes_D = (
        np.zeros(num_domains),
        np.zeros(num_domains, dtype=np.int64),
        np.zeros(num_domains),
    )
    for tokens_BT, domain_BT in batches:
        with autocast(device, dtype):
            if domain_BT is None:
                # As in training: the mean of the batch.
                count = tokens_BT[:, 1:].numel()
                total_D[0] += float(module(tokens_BT.to(device)).cross_entropy) * count
                tokens_D[0] += count
                continue
            losses_P = token_losses(module, tokens_BT.to(device))
        # Summed on the CPU in fp64, so that batch size and device do not change the result.
        domain_P = domain_BT[:, 1:].flatten().numpy()
        total_D += np.bincount(domain_P, losses_P.cpu().numpy(), num_domains)
        tokens_D += np.bincount(domain_P, minlength=num_domains)
        if token_bytes is not None:
            bytes_D += np.bincount(domain_P, token_bytes[tokens_BT[:, 1:].flatten().numpy()], num_domains)
    return total_D, tokens_D, bytes_D


@torch.no_grad()
def token_losses(module: LanguageModel, tokens_BT: Tensor) -> Tensor:
    """Cross-entropy of each predicted token in nats, fp32: losses_P, in the order of tokens_BT[:, 1:]."""
    hidden_PD = module.hidden(tokens_BT[:, :-1])[0].flatten(0, 1)
    rows = max(1, _LOGITS_AT_ONCE // module.config.vocab_size)
    pieces = zip(torch.split(hidden_PD, rows), torch.split(tokens_BT[:, 1:].flatten(), rows), strict=True)
    return torch.cat(
        [F.cross_entropy(module.logits(h).float(), targets, reduction="none") for h, targets in pieces]
    )


def evaluate_residents(judged: Judged, text: Text, dtype: str, device: str) -> dict[str, Figures | None]:
    """Loss at each site with its residents only; None for a site that has no expert in some layer.

    As in training: in skip mode the router chooses among all experts and an expert that is not held contributes
    nothing; in partitioned mode it chooses among the residents. The bias of model.locality=bias is not used.
    """
    # Sites with the same residents have the same figures and are evaluated once.
    measured: dict[tuple[tuple[int, ...], ...], Figures] = {}
    figures: dict[str, Figures | None] = {}
    for site, residents in judged.placement.items():
        if not all(residents):
            figures[site] = None
            continue
        held = tuple(tuple(experts) for experts in residents)
        if held not in measured:
            measured[held] = evaluate_text(judged.module(residents, device), text, dtype)
        figures[site] = measured[held]
    return figures


# ----- routing necessity


@contextmanager
def random_routing(module: LanguageModel, seed: int, layers: Collection[int] | None = None) -> Iterator[None]:
    """Let the routers of these layers (None: of all) choose at random.

    A hook replaces what the router returns, so this works with every kind of router. The draws of a layer depend
    on the seed and the layer, not on which other layers are random.
    """
    handles = [
        moe.gate.register_forward_hook(_redraw(np.random.default_rng([seed, layer])))
        for layer, moe in enumerate(module.moe_layers)
        if layers is None or layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _redraw(rng: np.random.Generator) -> Callable[[nn.Module, tuple[Any, ...], Routing], Routing]:
    def hook(router: Any, arguments: tuple[Any, ...], routing: Routing) -> Routing:
        (x_TD,) = arguments
        # The places of the k largest of equally distributed numbers: each set of k places is equally likely.
        noise_TC = torch.from_numpy(rng.random((len(x_TD), router.num_candidates)))
        drawn_TK = noise_TC.topk(routing.chosen_TK.shape[1]).indices.to(x_TD.device)
        return routing._replace(weights_TK=router.weights(x_TD, drawn_TK), chosen_TK=drawn_TK)

    return hook


def necessity(
    module: LanguageModel, text: Text, dtype: str, draws: int = DRAWS, learned: Figures | None = None
) -> Figures:
    """Routing necessity of a module that holds all experts, nats a token. 0: any expert is as good.

    `necessity` is the mean over the draws, with random routing in all layers. `necessity_by_layer` has it with
    random routing in one layer only; these need not add up to it.

    Takes draws · (1 + layers) passes over the text, and one more where `learned` (the figures with the learned
    router) is not given. Draw i has seed i, so the result is always the same.
    """
    learned = learned or evaluate_text(module, text, dtype)

    def loss_more(seed: int, layers: Collection[int] | None = None) -> float:
        with random_routing(module, seed, layers):
            return float(evaluate_text(module, text, dtype)["loss"] - learned["loss"])

    by_draw = [loss_more(seed) for seed in range(draws)]
    by_layer = [
        sum(loss_more(seed, [layer]) for seed in range(draws)) / draws
        for layer in range(len(module.moe_layers))
    ]
    return {
        "necessity": sum(by_draw) / draws,
        "necessity_by_layer": by_layer,
        "necessity_by_draw": by_draw,
        "learned_loss": learned["loss"],
        "tokens": learned["tokens"],
    }


def evaluate_model(
    judged: Judged, text: Text, dtype: str, device: str, draws: int = DRAWS, sample: Text | None = None
) -> Figures:
    """All figures, infinity as null; one model is on the device at a time.

    Args:
        sample: a part of the text for necessity, which takes many passes; None: all of it.

    Raises:
        WireError: the state does not fit the model.
    """
    module = judged.module(judged.everything, device)
    all_experts = evaluate_text(module, text, dtype)
    routing = necessity(module, sample or text, dtype, draws, None if sample else all_experts)
    del module
    residents = evaluate_residents(judged, text, dtype, device)
    content: Figures = finite({"all_experts": all_experts, "residents": residents, "routing": routing})
    return content

"""A model judged on a text: with all experts, with each site's residents only, and what its router is worth.

The definitions are the project's (issue 5, part 3); what they leave open is ours and said where it is decided.

Random routing: k experts a token, drawn uniformly without replacement among the router's candidates, instead of
the k that it would choose. A drawn expert is weighted by the learned router's own score of it, which is what it
would contribute had it been chosen: so the choice alone is replaced, and the figure says what the choice is
worth. The alternative, the weights of the chosen dealt to the drawn, weighs an expert by the router's trust in
another one, which is a model that nobody trained. (How large the weights are together hardly counts: the norm
behind the experts takes it out again.) Draws come from NumPy, so that they are the same on every device.

Letters: B sequences, T tokens of a sequence with its first, P predicted tokens, C candidates, K experts a token.
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
from fomoe_flwr.model.moe import Routing
from fomoe_flwr.model.sigma_moe import Transformer, build
from fomoe_flwr.model.spec import parameter_shapes
from fomoe_flwr.placement import full_residents
from fomoe_flwr.units import finite

DRAWS = 3  # of random routing, over which necessity is averaged
# At the end of a run, which should not be long: where passes are few, more text says more than more draws of it.
FINAL_DRAWS = 1
_LOGITS_AT_ONCE = 2**26  # more numbers than this are computed in pieces: 256 MB

Residents = Sequence[Sequence[int]]  # the experts held, one list a layer


# ----- what is judged, and by what


@dataclass(frozen=True)
class Judged:
    """A model and who held which part of it."""

    model: ModelConfig
    routing: str  # skip or partitioned
    state: Mapping[str, Tensor]  # all parameters by name
    placement: Mapping[str, Residents]  # by site

    @property
    def everything(self) -> Residents:
        """The residents of whoever holds the whole model."""
        return full_residents(self.model.num_layers, self.model.num_experts)

    def module(self, residents: Residents, device: str) -> Transformer:
        """The model with these experts alone.

        Raises:
            WireError: the state is not that of such a model.
        """
        names = parameter_shapes(self.model, residents, self.routing)
        shard = {name: self.state[name] for name in names if name in self.state}
        return build(self.model, residents, self.routing, shard, device)


@dataclass(frozen=True)
class Text:
    """Tokens to predict, and the bytes they stand for."""

    batches: Callable[[], Iterable[LabelledBatch]]  # the same at every call
    domains: Sequence[str]
    bytes_per_token: float
    bytes_per_token_by_domain: Sequence[float]


def text_of(
    corpus: TokenCorpus, documents: NDArray[np.int64], seq_len: int, batch_size: int, num_batches: int | None
) -> Text:
    """Documents of a corpus, whole or `num_batches` of them (`data.labelled_batches`)."""

    def ratio(chosen: NDArray[np.int64]) -> float:
        return float(corpus.doc_bytes[chosen].sum() / max(corpus.doc_lengths[chosen].sum(), 1))

    domain = corpus.doc_domain[documents]
    return Text(
        lambda: labelled_batches(corpus, documents, seq_len, batch_size, num_batches),
        corpus.domains,
        ratio(documents),
        [ratio(documents[domain == index]) for index in range(len(corpus.domains))],
    )


# ----- loss


class Figures(NamedTuple):
    """How well a text was predicted."""

    loss: float  # mean cross-entropy, nats a token
    tokens: int  # predicted
    bits_per_byte: (
        float  # of the text, so that tokenizers can be compared; end tokens cost bits, and have no bytes
    )
    by_domain: dict[str, Figures]  # where the corpus has domains; a token belongs to its document's

    @property
    def perplexity(self) -> float:
        """exp(loss): as unsure as between so many equally likely tokens."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(module: Transformer, batches: Iterable[Tensor], dtype: str, device: str) -> tuple[float, int]:
    """Mean cross-entropy (nats a token) and number of tokens."""
    module.eval()
    total, tokens = 0.0, 0
    for tokens_BT in batches:
        count = tokens_BT[:, 1:].numel()
        with autocast(device, dtype):
            total += float(module(tokens_BT.to(device)).cross_entropy) * count
        tokens += count
    return total / max(tokens, 1), tokens


@torch.no_grad()
def token_losses(module: Transformer, tokens_BT: Tensor) -> Tensor:
    """Cross-entropy of each predicted token in nats, fp32: losses_P, in the order of tokens_BT[:, 1:]."""
    hidden_PD = module.hidden(tokens_BT[:, :-1])[0].flatten(0, 1)
    rows = max(1, _LOGITS_AT_ONCE // module.config.vocab_size)
    pieces = zip(torch.split(hidden_PD, rows), torch.split(tokens_BT[:, 1:].flatten(), rows), strict=True)
    return torch.cat(
        [F.cross_entropy(module.logits(h).float(), targets, reduction="none") for h, targets in pieces]
    )


def evaluate_all(module: Transformer, text: Text, dtype: str) -> Figures:
    """Loss with the experts that the module holds: with all of them, what a user deploys (issue 5).

    Args:
        dtype: of the matrix products, fp32 or bf16.
    """
    module.eval()
    device = str(next(module.parameters()).device)
    number = len(text.domains)
    total_D, tokens_D = np.zeros(number), np.zeros(number, dtype=np.int64)
    for tokens_BT, domain_BT in text.batches():
        with autocast(device, dtype):
            losses_P = token_losses(module, tokens_BT.to(device))
        # Summed on the CPU in fp64: the same whatever the device's order of addition and the batches' sizes.
        domain_P = domain_BT[:, 1:].flatten().numpy()
        total_D += np.bincount(domain_P, losses_P.cpu().numpy(), number)
        tokens_D += np.bincount(domain_P, minlength=number)
    by_domain = {
        name: _figures(total_D[index], tokens_D[index], text.bytes_per_token_by_domain[index])
        for index, name in enumerate(text.domains)
        if tokens_D[index]
    }
    return _figures(total_D.sum(), tokens_D.sum(), text.bytes_per_token, by_domain)


def _figures(
    total: float, tokens: int, bytes_per_token: float, by_domain: dict[str, Figures] | None = None
) -> Figures:
    loss = float(total) / max(int(tokens), 1)
    bits_per_byte = loss / math.log(2) / bytes_per_token if bytes_per_token else math.inf
    return Figures(loss, int(tokens), bits_per_byte, by_domain or {})


def evaluate_residents(judged: Judged, text: Text, dtype: str, device: str) -> dict[str, Figures | None]:
    """Loss at each site with its residents only: what a site sees (issue 5). None: it holds no experts.

    As in training: in skip mode the router chooses among all experts and a ghost contributes nothing, in
    partitioned mode it chooses among the residents. Without the bias of model.locality=bias, which is a site's own
    and works in training alone.
    """
    measured: dict[tuple[tuple[int, ...], ...], Figures] = {}  # sites of full replicas all hold the same
    figures: dict[str, Figures | None] = {}
    for site, residents in judged.placement.items():
        if not all(residents):
            figures[site] = None
            continue
        held = tuple(tuple(experts) for experts in residents)
        if held not in measured:
            measured[held] = evaluate_all(judged.module(residents, device), text, dtype)
        figures[site] = measured[held]
    return figures


# ----- routing necessity


class Necessity(NamedTuple):
    """Loss with random routing minus loss with the learned router, nats a token (issue 5). 0: any expert will do."""

    overall: float  # random in every layer; mean over the draws
    by_layer: list[float]  # random in that layer alone; they need not add up to `overall`
    by_draw: list[float]  # `overall` of each draw
    learned_loss: float
    tokens: int

    def share_of(self, reference: Necessity) -> float | None:
        """As a share of a centralised run's; None where that is not positive."""
        return self.overall / reference.overall if reference.overall > 0 else None


@contextmanager
def random_routing(module: Transformer, seed: int, layers: Collection[int] | None = None) -> Iterator[None]:
    """Within it, the routers of these layers (None: of all) choose at random; see the top of the file.

    A hook on the router replaces its answer, so the router may be of any kind that can score its candidates. A
    layer's draws depend on the seed and the layer alone, not on which others are random.
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
        scores_TC = router.scores(*arguments)
        # The places of the k largest of equally distributed numbers are k different places, each set as likely.
        noise_TC = torch.from_numpy(rng.random(scores_TC.shape))
        drawn_TK = noise_TC.topk(routing.chosen_TK.shape[1]).indices.to(scores_TC.device)
        return routing._replace(weights_TK=scores_TC.gather(1, drawn_TK), chosen_TK=drawn_TK)

    return hook


def necessity(
    module: Transformer, text: Text, dtype: str, draws: int = DRAWS, learned: Figures | None = None
) -> Necessity:
    """Routing necessity of a module that holds all experts, over the text.

    Passes over the text: draws · (1 + layers), and one for the learned router's figures where they are not known
    yet. Deterministic: draw i comes from seed i.
    """
    learned = learned or evaluate_all(module, text, dtype)

    def loss_more(seed: int, layers: Collection[int] | None = None) -> float:
        with random_routing(module, seed, layers):
            return evaluate_all(module, text, dtype).loss - learned.loss

    by_draw = [loss_more(seed) for seed in range(draws)]
    by_layer = [
        sum(loss_more(seed, [layer]) for seed in range(draws)) / draws
        for layer in range(len(module.moe_layers))
    ]
    return Necessity(sum(by_draw) / draws, by_layer, by_draw, learned.loss, learned.tokens)


# ----- all of it


class Evaluation(NamedTuple):
    """The whole table."""

    all_experts: Figures
    residents: dict[str, Figures | None]  # by site
    necessity: Necessity


def evaluate_model(
    judged: Judged, text: Text, dtype: str, device: str, draws: int = DRAWS, sample: Text | None = None
) -> Evaluation:
    """Everything at once; one model is on the device at a time.

    Args:
        sample: a part of the text for necessity, which takes many passes; None: all of it.

    Raises:
        WireError: the state is not that of such a model.
    """
    module = judged.module(judged.everything, device)
    all_experts = evaluate_all(module, text, dtype)
    needed = necessity(module, sample or text, dtype, draws, None if sample else all_experts)
    del module
    return Evaluation(all_experts, evaluate_residents(judged, text, dtype, device), needed)


def describe_text(
    data: DataConfig, part: str, corpus: TokenCorpus, documents: NDArray[np.int64]
) -> dict[str, Any]:
    """Which text it was, as JSON values. `part` is validation or whole; the tokens are those of all of it."""
    place = data.path or data.name
    return {
        "name": f"{data.source} {place}" if place else data.source,
        "part": part,
        "documents": len(documents),
        "tokens": int(corpus.doc_lengths[documents].sum()) - 1,  # the first is not predicted
    }


def as_json(evaluation: Evaluation, reference: Necessity | None = None) -> dict[str, Any]:
    """The figures for a program; `routing.necessity` is the overall one, and null stands for infinity."""
    needed = evaluation.necessity
    routing: dict[str, Any] = {
        "necessity": needed.overall,
        "necessity_by_layer": needed.by_layer,
        "necessity_by_draw": needed.by_draw,
        "learned_loss": needed.learned_loss,
        "tokens": needed.tokens,
    }
    if reference is not None:
        routing["reference_necessity"] = reference.overall
        routing["necessity_share"] = needed.share_of(reference)
        routing["reference_necessity_by_layer"] = reference.by_layer
    content = {
        "all_experts": _figures_as_json(evaluation.all_experts),
        "residents": {
            site: None if figures is None else _figures_as_json(figures)
            for site, figures in evaluation.residents.items()
        },
        "routing": routing,
    }
    return {key: finite(value) for key, value in content.items()}


def _figures_as_json(figures: Figures) -> dict[str, Any]:
    content: dict[str, Any] = {
        "loss": figures.loss,
        "perplexity": figures.perplexity,
        "bits_per_byte": figures.bits_per_byte,
        "tokens": figures.tokens,
    }
    if figures.by_domain:
        content["by_domain"] = {name: _figures_as_json(part) for name, part in figures.by_domain.items()}
    return content

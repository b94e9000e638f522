"""A site's model on several devices: the same verbs, and the same numbers but for rounding.

Every device runs `Member`, and all go through the same verbs at once: the first is called by the site and tells the
others (`engine.team`). The first has what comes and goes, and a site's state on its disk is what one device would have
kept. Three ways (train.parallel):

ddp   each device has the whole model and a share of each batch; gradients are averaged (DistributedDataParallel).
fsdp  each device has a share of the rows of every tensor, of stacks whole experts; a block's are gathered while it is
      computed (fully_shard).
ep    as ddp, but each device has a share of the experts; tokens travel, or experts do (`model.exchange`).
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from fomoe_flwr.checks import check_domain, check_shared_step
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.engine.device import use_cpu
from fomoe_flwr.engine.domain import best_size, measured
from fomoe_flwr.engine.local import Engine, EngineState, Report
from fomoe_flwr.engine.optimizer import Moments, Piece, Schedule, StackedOptimizer, local, moments_dtype
from fomoe_flwr.engine.team import Team, is_current, together
from fomoe_flwr.messages import Task
from fomoe_flwr.model.base import LanguageModel, Losses, NamedView, check_shard, named_views
from fomoe_flwr.model.build import build
from fomoe_flwr.model.exchange import Domains, Gathering, domains_of, exchanged
from fomoe_flwr.model.moe import Reach
from fomoe_flwr.model.shared_batch import averaged
from fomoe_flwr.model.spec import Residents, expert_layers, is_moment, parameter_shapes, slots
from fomoe_flwr.plan.hybridep import ExchangeCase
from fomoe_flwr.units import in_bytes

log = logging.getLogger("fomoe.site")


class _Part(NamedTuple):
    """A parameter, and which of its rows (of a stack: experts) each device has."""

    parameter: nn.Parameter
    views: list[NamedView]  # of the whole
    ends: list[int] | None  # of each device's rows; None: each has all

    def rows(self, rank: int) -> slice:
        ends = cast(list[int], self.ends)
        return slice(ends[rank - 1] if rank else 0, ends[rank])


class _Age(NamedTuple):
    """Of moments, what is no tensor."""

    step: int
    reset_at: int
    has_square: bool

    @classmethod
    def of(cls, moments: Moments) -> _Age:
        return cls(moments.step, moments.reset_at, moments.exp_avg_sq is not None)


def shares(rows: int, devices: int) -> list[int]:
    """End of each device's rows: equal shares, the last may be smaller (as fully_shard has it)."""
    share = -(-rows // devices)
    return [min(share * (rank + 1), rows) for rank in range(devices)]


class Member(Engine):
    """The engine on one of several devices of a site.

    Args:
        parallel: ddp, fsdp or ep.
        domain: with ep, devices of a domain, or `auto`.

    Raises:
        ConfigError: domains of another size than the devices can be divided into.
    """

    def __init__(
        self,
        model: ModelConfig,
        residents: Residents,
        routing: str,
        parallel: str,
        domain: str,
        *,
        team: Team,
    ) -> None:
        self.team, self.device, self.devices, self.parallel = team, team.device, team.size, parallel
        self._config = model, residents, routing
        self._optimizer: StackedOptimizer | None = None
        self._exact = {}
        self._handed: dict[str, Moments] = {}
        self._here: dict[str, Moments] | None = None
        self.domains: Domains | None = None
        self._gatherings: list[Gathering] = []
        self._hooks: list[RemovableHandle] = []
        self._choose = parallel == "ep" and domain == "auto"
        check_domain(team.size, parallel, domain)
        if not team.busy.locked():
            team.engine = self
        with self.all_do("build", model, residents, routing, parallel, domain):
            self.module = build(model, residents, routing, None, self.device, self._divide)
            for moe in self.module.moe_layers:
                moe.gate.devices = dist.group.WORLD
            if parallel == "ep":
                self.divide_domains(1 if self._choose else int(domain))
            self._parts = self._divided()
            self._runner: nn.Module = self.module
            if parallel != "fsdp":
                self._runner = self._replicated()

    @property
    def usable(self) -> bool:  # type: ignore[override]
        """Whether the other devices are still there."""
        return is_current(self.team)

    # ----- how the model is divided

    @property
    def _stacks(self) -> set[str]:
        """Paths of the experts' stacks."""
        return {path for _, param, path in slots(*self._config) if param.stacked and param.kind == "expert"}

    def _divide(self, module: LanguageModel) -> None:
        if self.parallel == "ep":
            for path in self._stacks:
                place, _, name = path.rpartition(".")
                whole = module.get_parameter(path)
                ends = shares(len(whole), self.devices)
                own = ends[self.team.rank] - (ends[self.team.rank - 1] if self.team.rank else 0)
                setattr(
                    module.get_submodule(place), name, nn.Parameter(whole.new_empty(own, *whole.shape[1:]))
                )
        elif self.parallel == "fsdp":
            mesh = init_device_mesh(self.team.kind, (self.devices,))
            # What has no numbers cannot be divided.
            empty = {parameter for parameter in module.parameters() if not parameter.numel()}
            for part in (*module.blocks, module):
                fully_shard(part, mesh=mesh, ignored_params=empty)

    def _divided(self) -> list[_Part]:
        views: dict[int, list[NamedView]] = {}
        for view in named_views(self.module):
            views.setdefault(id(view.parameter), []).append(view)
        stacks = self._stacks if self.parallel == "ep" else set()
        parts = []
        for path, parameter in self.module.named_parameters():
            own = views.get(id(parameter), [])
            ends = None
            if path in stacks:
                ends = shares(len(own), self.devices)
            elif self.parallel == "fsdp" and parameter.numel():
                ends = shares(len(parameter), self.devices)
            parts.append(_Part(parameter, own, ends))
        return parts

    def divide_domains(self, size: int) -> None:
        """From now on have domains of so many devices (with ep). All devices must call it."""
        for hook in self._hooks:
            hook.remove()
        self.domains = domains_of(self.team.rank, self.devices, size)
        self._gatherings, self._hooks = [], []
        stacks = {id(self.module.get_parameter(path)) for path in self._stacks}
        blocks = [self.module.blocks[layer] for layer in expert_layers(self._config[0])]
        for block, moe in zip(blocks, self.module.moe_layers, strict=True):
            ends = shares(len(moe.resident_experts), self.devices)
            moe.reach.gather, moe.reach.exchange = Reach().gather, None
            weights = [parameter for parameter in block.parameters() if id(parameter) in stacks]
            exchange = partial(exchanged, domains=self.domains, ends=ends)
            if size == 1:
                # Of the sum over the tokens of all devices' means.
                self._hooks += [weight.register_hook(self._of_the_mean) for weight in weights]  # type: ignore[no-untyped-call]
            else:
                gathering = Gathering(self.domains, weights, ends)
                moe.reach.gather, exchange = gathering, partial(exchange, then=gathering.bring_back)
                self._gatherings.append(gathering)
                self._hooks.append(block.register_forward_pre_hook(partial(_begin, gathering)))
            if size < self.devices:
                moe.reach.exchange = exchange

    def exchange_case(self, task: Task) -> ExchangeCase:
        """What HybridEP's model wants to know of this model on these devices, while each is its own domain."""
        assert self.domains is not None
        experts = sum(self.module.get_parameter(path).numel() for path in self._stacks)
        return measured(self.module, task, self.domains, self.device, experts)

    def _choose_domain(self, task: Task) -> None:
        case = self.exchange_case(task)
        size = best_size(case)
        log.info(
            "site %s: domains of %d of %d devices: a layer sends %s of tokens or gathers %s of experts, at %s/s, "
            "%.2f ms before the experts",
            task.name,
            size,
            self.devices,
            in_bytes(case.dispatch_bytes),
            in_bytes(case.expert_bytes),
            in_bytes(case.bandwidth_bytes_per_s),
            1e3 * case.pre_expert_s,
        )
        self.divide_domains(size)

    def _replicated(self) -> nn.Module:
        """The module, whose gradients are averaged but for those of experts that are held once."""
        divided = {id(part.parameter) for part in self._parts if part.ends is not None}
        ignored = []
        for path, parameter in self.module.named_parameters():
            if id(parameter) in divided or not parameter.numel():
                ignored.append(path)
        # What a router counts or goes by is the same on all devices.
        ignored += [path for path, _ in self.module.named_buffers()]
        # Its name begins with an underscore, and it is what PyTorch's documentation tells to use.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.module, ignored)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(self.module, init_sync=False, gradient_as_bucket_view=True)

    def _of_the_mean(self, gradient: Tensor) -> Tensor:
        return gradient / self.devices

    # ----- verbs

    def all_do(self, *work: Any) -> AbstractContextManager[None]:
        """Around a verb: all devices do it."""
        if self.team.rank:
            return nullcontext()
        return self._told(work)

    @contextmanager
    def _told(self, work: tuple[Any, ...]) -> Iterator[None]:
        with together(self.team, self):
            self.team.tell(*work)
            yield

    def load(
        self, task: Task, shard: Mapping[str, Tensor], state: EngineState, again: bool | None = None
    ) -> None:
        """As `Engine.load`.

        Args:
            shard, state: with their tensors at the first device.
            again: the moments are those of the last round here, which are still in their places. The first sees that.

        Raises:
            ConfigError: a batch that cannot be shared, or torch.compile.
        """
        if again is None:
            check_shared_step(task.name, task.train, task.train.batch_size, self.devices, self.parallel)
            parameters = {name: value for name, value in shard.items() if not is_moment(name)}
            check_shard(parameter_shapes(*self._config), parameters)
            again = bool(state.moments) and state.moments is self._handed and self._optimizer is not None
        self._handed = {}
        with self.all_do("load", task, {}, EngineState({}, state.bias, state.load), again):
            if self.team.rank:
                use_cpu(task.train.threads)
            self._here = self._optimizer.moments() if again and self._optimizer is not None else None
            super().load(task, shard, state)
            if self._choose:
                self._choose = False
                self._choose_domain(task)

    def loaded(self) -> dict[str, Tensor]:
        with self.all_do("loaded"):
            return super().loaded()

    def train(self, batches: Iterable[Tensor], keep: Collection[str] = ()) -> Report:
        with self.all_do("train", (), list(keep)):
            return super().train(self._shared(batches), keep)

    def update(self) -> dict[str, Tensor]:
        with self.all_do("update"):
            return super().update()

    def state(self) -> EngineState:
        with self.all_do("state"):
            state = super().state()
        self._handed = state.moments
        return state

    def evaluator(self, shard: Mapping[str, Tensor]) -> LanguageModel:
        """A model of its own on the first device alone; the other devices wait."""
        return build(*self._config, shard, self.device)

    # ----- there and back

    def _put(self, shard: Mapping[str, Tensor]) -> None:
        for part in self._parts:
            self._deal(part, local(part.parameter.data), shard, [view.name for view in part.views])

    def _deal(
        self, part: _Part, target: Tensor, values: Mapping[str, Tensor], names: Collection[str]
    ) -> None:
        """Values of a parameter from the first device to the rows of each.

        Args:
            target: the rows here.
            values: by name, at the first.
        """
        for view in part.views:
            if view.name not in names:
                continue
            value = values.get(view.name)
            if part.ends is None:
                if value is not None:
                    view.of(target).copy_(value)
                dist.broadcast(view.of(target), src=0)
            elif view.slot is not None:
                owner = bisect_right(part.ends, view.slot)
                own = part.rows(owner)
                if owner == self.team.rank:
                    self._receive(target[view.slot - own.start], value)
                elif value is not None:
                    self._send(value, owner, target.dtype)
            else:
                for rank in range(self.devices):
                    rows = part.rows(rank)
                    if rows.start == rows.stop:
                        continue
                    if rank == self.team.rank:
                        self._receive(target, None if value is None else value[rows])
                    elif value is not None:
                        self._send(value[rows], rank, target.dtype)

    def _send(self, value: Tensor, rank: int, dtype: torch.dtype) -> None:
        dist.send(value.to(self.device, dtype).contiguous(), rank)

    def _receive(self, target: Tensor, value: Tensor | None) -> None:
        """From the first device, or at the first itself."""
        if value is None:
            dist.recv(target, 0)
        else:
            target.copy_(value)

    def _whole(self, part: _Part, own: Tensor) -> Tensor | None:
        """All rows of a parameter (or what is as large) at the first device; None at the others.

        Args:
            own: the rows here.
        """
        if part.ends is None:
            return None if self.team.rank else own
        if self.team.rank:
            if own.numel():
                dist.send(own.contiguous(), 0)
            return None
        whole = torch.empty(part.ends[-1], *own.shape[1:], dtype=own.dtype)
        for rank in range(self.devices):
            rows = whole[part.rows(rank)]
            if not rows.numel():
                continue
            if rank == 0:
                rows.copy_(own)
            elif self.team.kind == "cpu":
                dist.recv(rows, rank)
            else:
                came = torch.empty_like(rows, device=self.device)
                dist.recv(came, rank)
                rows.copy_(came)
        return whole

    def _named(self, of: Callable[[_Part], Tensor]) -> dict[str, Tensor]:
        """By name at the first device, what `of` gives of each parameter's rows here."""
        named: dict[str, Tensor] = {}
        for part in self._parts:
            named |= self._named_of(part, of(part))
        return named

    def _named_of(self, part: _Part, own: Tensor) -> dict[str, Tensor]:
        whole = self._whole(part, own)
        return {} if whole is None else {view.name: view.of(whole) for view in part.views}

    def _shared(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches, which the first has, at every device."""
        if self.team.rank == 0:
            for tokens_BT in batches:
                self._tell_batch(torch.tensor(tokens_BT.shape))
                dist.broadcast(tokens_BT.contiguous(), src=0, group=self.team.control)
                yield tokens_BT
            self._tell_batch(torch.zeros(2, dtype=torch.int64))
            return
        while (shape := self._tell_batch(torch.zeros(2, dtype=torch.int64))) != [0, 0]:
            tokens_BT = torch.empty(shape, dtype=torch.int64)
            dist.broadcast(tokens_BT, src=0, group=self.team.control)
            yield tokens_BT

    def _tell_batch(self, shape: Tensor) -> list[int]:
        dist.broadcast(shape, src=0, group=self.team.control)
        found: list[int] = shape.tolist()
        return found

    # ----- in another way than on one device

    @property
    def _model(self) -> Callable[[Tensor], Losses]:
        return self._runner

    def _read(self) -> dict[str, Tensor]:
        return self._named(lambda part: local(part.parameter.data))

    def _new_optimizer(self, schedule: Schedule, moments: dict[str, Moments]) -> StackedOptimizer:
        pieces = [self._piece(part) for part in self._parts]
        if self._here is not None:
            moments.clear()
            own, self._here = self._here, None
        else:
            own = self._own_moments(moments)
        return StackedOptimizer(self.module, self._task.train, schedule, own, True, pieces)

    def _piece(self, part: _Part) -> Piece:
        views = part.views
        if part.ends is not None and views and views[0].slot is not None:
            rows = part.rows(self.team.rank)
            views = [view._replace(slot=slot) for slot, view in enumerate(views[rows])]
        return Piece(part.parameter, views)

    def _own_moments(self, moments: dict[str, Moments]) -> dict[str, Moments]:
        """Of moments that are at the first device, the rows of this one; they are taken out of there."""
        told: list[Any] = [{name: _Age.of(own) for name, own in moments.items()}]
        dist.broadcast_object_list(told, src=0, group=self.team.control)
        ages: dict[str, _Age] = told[0]
        found: dict[str, Moments] = {}
        for part in self._parts:
            names = [view.name for view in part.views if view.name in ages]
            if not names:
                continue
            like, dtype = local(part.parameter.data), moments_dtype(self._task.train)
            average, square = (torch.zeros_like(like, dtype=dtype) for _ in range(2))
            with_square = [name for name in names if ages[name].has_square]
            own = {name: moments.pop(name) for name in names if name in moments}
            self._deal(part, average, {name: moment.exp_avg for name, moment in own.items()}, names)
            squares = {n: moment.exp_avg_sq for n, moment in own.items() if moment.exp_avg_sq is not None}
            self._deal(part, square, squares, with_square)
            for view in self._piece(part).views:
                if (age := ages.get(view.name)) is not None:
                    second = view.of(square) if age.has_square else None
                    found[view.name] = Moments(view.of(average), second, age.step, age.reset_at)
        return found

    def _moments(self) -> dict[str, Moments]:
        if self._optimizer is None:
            return {}
        own = self._optimizer.moments()
        ages: list[Any] = [None] * self.devices
        mine = {name: _Age.of(moment) for name, moment in own.items()}
        dist.all_gather_object(ages, mine, group=self.team.control)
        known: dict[str, _Age] = {name: age for member in ages for name, age in member.items()}
        average, square = dict[str, Tensor](), dict[str, Tensor]()
        for part, (first, second) in zip(self._parts, self._optimizer.averages, strict=True):
            average |= self._named_of(part, first)
            # All devices must see alike whether there is one; those that have no slot of a stack do not know.
            if any(view.name in known and known[view.name].has_square for view in part.views):
                square |= self._named_of(part, first if second is None else second)
        return {
            name: Moments(value, square.get(name), known[name].step, known[name].reset_at)
            for name, value in average.items()
            if name in known
        }

    def _rows(self, piece_BT: Tensor) -> Tensor:
        return piece_BT.chunk(self.devices)[self.team.rank]

    @contextmanager
    def _of_a_piece(self, is_last: bool) -> Iterator[None]:
        # Gradients of all pieces are averaged together.
        waits = isinstance(self._runner, DistributedDataParallel) and not is_last
        with self._runner.no_sync() if waits else nullcontext():  # type: ignore[operator]
            yield
        for gathering in self._gatherings:
            gathering.finish(self.devices)

    def _averaged(self, loss: Tensor) -> Tensor:
        return averaged(loss, dist.group.WORLD)

    @torch.no_grad()
    def _clip(self, most: float) -> None:
        norms: dict[bool, list[Tensor]] = {True: [], False: []}
        gradients = []
        for part in self._parts:
            if part.parameter.grad is not None and local(part.parameter.grad).numel():
                gradients.append(local(part.parameter.grad))
                norms[part.ends is not None].append(gradients[-1])
        squares = [
            torch.stack([*torch._foreach_norm(found)]).square().sum()
            if found
            else torch.zeros((), device=self.device)
            for found in (norms[False], norms[True])
        ]
        dist.all_reduce(squares[1])
        norm = (squares[0] + squares[1]).sqrt()
        # As torch.nn.utils.clip_grad_norm_.
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))

    def _gradients(self) -> dict[str, Tensor]:
        own = {}
        for part in self._parts:
            gradient = part.parameter.grad
            value = local(part.parameter.data)
            own[id(part.parameter)] = torch.zeros_like(value) if gradient is None else local(gradient)
        self.module.zero_grad(set_to_none=True)
        return self._named(lambda part: own[id(part.parameter)])

    def _largest(self, number: int) -> int:
        most = torch.tensor(number)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.team.control)
        return int(most)


def _begin(gathering: Gathering, *_: Any) -> None:
    gathering.begin()

"""An in-process Grid: the same ServerApp and ClientApp without Ray, sockets or polling.

A message is a function call on a thread. Flower has no public way to run an app like this, so two names are
taken from inside it: `TaskIdentity` and `Run` (flwr 1.41 and 1.42).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from strategies.nodes import exchange

log = logging.getLogger("fomoe")

RUN_ID = 1
SERVER_NODE_ID = 1
_CLIENT_APP_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION


class LocalGrid(Grid):
    """A Grid over `num_nodes` nodes of one ClientApp, `workers` of which work at a time.

    Node `100 + i` has partition-id i, as in Flower's simulation; `node_configs` adds to that.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        workers: int = 1,
        node_configs: Mapping[int, Mapping[str, str]] | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, 1
        self._client_app = client_app
        self._run = Run.create_empty(RUN_ID)
        self._contexts: dict[int, Context] = {}
        for index in range(num_nodes):
            config: UserConfig = {
                "partition-id": index,
                "num-partitions": num_nodes,
                **(node_configs or {}).get(index, {}),
            }
            node_id = 100 + index
            self._contexts[node_id] = Context(RUN_ID, node_id, config, RecordDict(), {})
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="site")
        self._replies: dict[str, tuple[Message, float]] = {}  # and until when each may be fetched
        self._lock = threading.Lock()
        self._busy = {node: threading.Lock() for node in self._contexts}  # a node does one thing at a time
        self._sent = 0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand each message to a thread; returns at once."""
        ids = []
        now = time.monotonic()
        with self._lock:
            self._replies = {key: reply for key, reply in self._replies.items() if reply[1] > now}
        for message in messages:
            self._sent += 1
            message_id = str(self._sent)
            message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do
            self._pool.submit(self._serve, message, now + message.metadata.ttl)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there; each is handed out once."""
        with self._lock:
            return [self._replies.pop(key)[0] for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Flower's barrier, for strategies that use it."""
        longest = math.inf if timeout is None else timeout
        return [reply for _, reply in exchange(self, list(messages), longest)]

    def close(self) -> None:
        """Let running sites finish and end the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _serve(self, message: Message, expires: float) -> None:
        node = message.metadata.dst_node_id
        with self._busy[node]:
            if time.monotonic() > expires:
                return  # as in Flower, nobody works on what nobody waits for any more
            reply = self._answer(message, self._contexts[node])
        with self._lock:
            self._replies[message.metadata.message_id] = (reply, expires)

    def _answer(self, message: Message, context: Context) -> Message:
        try:
            return self._client_app(message, context)
        except Exception as error:
            log.debug("node %d raised", message.metadata.dst_node_id, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(code=_CLIENT_APP_RAISED, reason=reason), reply_to=message)

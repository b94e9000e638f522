"""An in-process Grid: the same ServerApp and ClientApp without Ray, sockets or polling.

A message is a function call on a thread. Flower has no public way to run an app like this, so two names are
taken from inside it: `TaskIdentity` and `Run` (flwr 1.41 and 1.42).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

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
        self._replies: dict[str, Message] = {}
        self._lock = threading.Lock()
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
        for message in messages:
            self._sent += 1
            message_id = str(self._sent)
            message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do
            self._pool.submit(self._serve, message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there; each is handed out once."""
        with self._lock:
            return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Flower's barrier, for strategies that use it."""
        from strategies.exchange import exchange

        return [reply for _, reply in exchange(self, list(messages), timeout)]

    def close(self) -> None:
        """Let running sites finish and end the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _serve(self, message: Message) -> None:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._client_app(message, context)
        except Exception as error:
            log.debug("node %d raised", message.metadata.dst_node_id, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(code=_CLIENT_APP_RAISED, reason=reason), reply_to=message)
        with self._lock:
            self._replies[message.metadata.message_id] = reply

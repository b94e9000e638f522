"""The replies of the round in progress, on disk: collect first, decide then, fold last.

What a reply is worth (is it an outlier? are there enough?) is known only when all are in, and the mean must not
depend on the order in which the network delivers them. So they wait here, as the bytes that arrived, and the
server's memory does not grow with the number of sites. They also outlive the server: a run that is killed before
it has taken the outer step finds them again and asks only the sites that have not answered.
"""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundles import as_array, blobs_of


class Inbox:
    """One round's good replies below `folder`, each in a folder of its own that is whole or not there.

    Nothing is flushed: what the machine loses with its power is found out by the reply's own digests.
    """

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._folder = folder / "none"
        self._readers: dict[int, list[_Reader]] = {}

    def begin(self, round_: int) -> list[int]:
        """Open a round and drop every other; returns the sites whose replies are here from before a crash."""
        self.close()
        self._folder = self._root / f"round_{round_:05d}"
        for path in self._root.glob("*"):
            if path != self._folder:
                shutil.rmtree(path, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        for partial in self._folder.glob("*.partial"):
            shutil.rmtree(partial)
        return sorted(int(path.name) for path in self._folder.iterdir())

    def put(self, site: int, arrays: ArrayRecord, metrics: MetricRecord, facts: ConfigRecord) -> None:
        """Keep a reply."""
        partial = self._folder / f"{site}.partial"
        partial.mkdir()
        index: dict[str, Any] = {}
        for number, (key, blob) in enumerate(blobs_of(arrays).items()):
            (partial / f"bundle-{number}").write_bytes(blob)
            index[key] = f"bundle-{number}"
        (partial / "bundles.json").write_text(json.dumps(index))
        for name, record in (("metrics", metrics), ("config", facts)):
            (partial / name).write_bytes(record.deflate())
        partial.rename(self._folder / str(site))

    def get(self, site: int, keys: Sequence[str]) -> RecordDict:
        """A reply as it arrived, under the strategy's keys of its ArrayRecord and ConfigRecord.

        Raises:
            Exception: whatever reading a damaged file raises; use `drop` then.
        """
        folder = self._folder / str(site)
        index = json.loads((folder / "bundles.json").read_text())
        arrays = {key: as_array((folder / file).read_bytes()) for key, file in index.items()}
        return RecordDict(
            {
                keys[0]: ArrayRecord(arrays),
                "metrics": MetricRecord.inflate((folder / "metrics").read_bytes()),
                keys[1]: ConfigRecord.inflate((folder / "config").read_bytes()),
            }
        )

    def drop(self, site: int) -> None:
        """Throw a reply away."""
        shutil.rmtree(self._folder / str(site))

    def tensors(self, site: int, names: Collection[str]) -> dict[str, Tensor]:
        """Those of the tensors that this site's reply has, as read-only views of its files."""
        if site not in self._readers:
            folder = self._folder / str(site)
            files: Sequence[str] = list(json.loads((folder / "bundles.json").read_text()).values())
            self._readers[site] = [_Reader(folder / file) for file in files]
        found: dict[str, Tensor] = {}
        for reader in self._readers[site]:
            found.update(reader.tensors(names))
        return found

    def release(self, site: int) -> None:
        """Give back the memory of what was read of a site's reply so far; it can be read again."""
        for reader in self._readers[site]:
            reader.release()

    def close(self) -> None:
        """Close the files of the round; the replies stay."""
        self._readers.clear()

    def clear(self) -> None:
        """The run is over, or another one begins here: nothing stays."""
        self.close()
        shutil.rmtree(self._root, ignore_errors=True)


class _Reader:
    """A bundle's file, mapped: its tensors are read where they lie, and only when somebody adds them up."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._entries = {entry.name: entry for entry in wire.read_header(self._map)}

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            if (entry := self._entries.get(name)) is not None:
                yield name, wire.view(self._map, entry)

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # Linux; elsewhere the system finds out by itself
            self._map.madvise(mmap.MADV_DONTNEED)

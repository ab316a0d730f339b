"""Let one step of a stream work ahead of the next, in a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], ahead: int = 2) -> Generator[Item, None, None]:
    """Run an iterator in a thread, up to `ahead` items before they are asked for.

    An error in the thread is raised where its item would have come. The thread ends with the
    iteration, also when that is given up early. Items must not be `None`.
    """
    waiting: deque[Future[Item | None]] = deque()
    items = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        try:
            waiting.extend(pool.submit(next, items, None) for _ in range(ahead))
            while (item := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, items, None))
                yield item
        finally:
            for future in waiting:
                future.cancel()

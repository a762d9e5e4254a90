"""Stand-ins for Serve's handles: calls that a test answers, fails or watches being cancelled."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

Answer = Callable[..., Awaitable[Any]]


class FakeResponse:
    """What `handle.method.remote()` returns: awaitable and cancellable."""

    def __init__(self, work: Awaitable[Any]) -> None:
        self._task = asyncio.ensure_future(work)
        self.is_cancelled = False

    def __await__(self) -> Any:
        return asyncio.shield(self._task).__await__()

    def cancel(self) -> None:
        self.is_cancelled = True
        self._task.cancel()


class FakeMethod:
    """One method of a deployment; remembers its calls."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.calls: list[tuple[Any, ...]] = []
        self.responses: list[FakeResponse] = []

    def remote(self, *arguments: Any) -> FakeResponse:
        self.calls.append(arguments)
        response = FakeResponse(self._answer(*arguments))
        self.responses.append(response)
        return response


class FakeHandle:
    """A handle with the methods that the test gives it."""

    def __init__(self, **answers: Answer) -> None:
        for name, answer in answers.items():
            setattr(self, name, FakeMethod(answer))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def options(self, **options: Any) -> "FakeHandle":
        del options
        return self


def answering(*results: Any) -> Answer:
    """Return an answer that gives `results` in turn, the last for ever; errors are raised."""
    left = list(results)

    async def answer(*arguments: Any) -> Any:
        del arguments
        result = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(result, Exception):
            raise result
        return result

    return answer

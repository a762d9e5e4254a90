"""Calls through Serve handles: cancellation is forwarded, Ray's errors become ImpetusErrors."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from core.errors import EngineFailed, ImpetusError, QueueFull, Unavailable
from deployments.serve.message_size import size_error

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

Handle: TypeAlias = "DeploymentHandle[Any]"


def direct(handle: Handle) -> Handle:
    """Return a handle whose calls go over gRPC instead of the object store.

    Saves two milliseconds a call; `_by_reference` is an underscore option of Serve's public
    `options()`, so it is named here only.
    """
    return handle.options(_by_reference=False)


async def call(response: Any) -> Any:
    """Await a handle call's response; cancel it on the replica when this task is cancelled.

    Raises the ImpetusError of the other side, or ReplicaDied if its process is gone.
    """
    try:
        result = await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as problem:
        ours = unwrap(problem)
        if ours is problem:
            raise
        raise ours from problem
    if isinstance(result, ImpetusError):
        raise result
    return result


class ReplicaDied(EngineFailed):
    """The process that ran the request is gone; another attempt may find a new one.

    `is_bystander`: it died during a load, but of something else, or it was the scheduler's.
    """

    is_bystander = False


def unwrap(problem: BaseException) -> BaseException:
    """Convert an error of a handle call to an ImpetusError; errors that are not Ray's are kept."""
    if isinstance(problem, ImpetusError) and not isinstance(problem, RayTaskError):
        return problem
    if isinstance(problem, RayTaskError):
        cause = problem.cause
        return unwrap(cause) if isinstance(cause, BaseException) else problem
    if isinstance(problem, RayActorError | ActorUnavailableError):
        return ReplicaDied("The engine's process died while it ran this request.", retry_after_s=2)
    if isinstance(problem, BackPressureError):
        return QueueFull("Too many requests wait for this model.", retry_after_s=2)
    if isinstance(problem, DeploymentUnavailableError):
        return Unavailable("This model's format cannot be served now.", retry_after_s=5)
    return size_error(str(problem)) or problem


def returning_errors(
    method: Callable[Parameters, Awaitable[Result]],
) -> Callable[Parameters, Awaitable[Result | ImpetusError]]:
    """Let a replica's method return an ImpetusError instead of raising it.

    Serve logs a raised error with its traceback as a failure of the replica; these are expected
    answers.  `call` raises it again on the other side.
    """

    @wraps(method)
    async def guarded(
        *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> Result | ImpetusError:
        try:
            return await method(*arguments, **options)
        except ImpetusError as problem:
            return problem

    return guarded

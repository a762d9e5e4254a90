"""Turns whatever a request's processing raises into the error that ends that request alone."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import EngineFailed, ImpetusError, RequestFailed

logger = logging.getLogger(__name__)


class RuntimeLost(EngineFailed):
    """The process that computes for a model has ended, so its engine can do nothing more.

    It ends the engine whatever was being done, unlike other errors outside of a step.
    """


def request_error(problem: BaseException, activity: str, who: str) -> ImpetusError:
    """Return the error of a request during whose `activity` `problem` was raised.

    An unexpected exception is logged with its traceback; `who` names the request there.
    """
    if isinstance(problem, ImpetusError):
        return problem
    logger.error("%s failed during %s", who, activity, exc_info=problem)
    return RequestFailed.during(activity, problem)


@contextmanager
def failing_alone(activity: str, who: str) -> Iterator[None]:
    """Raise RequestFailed for an unexpected exception in the body; see `request_error`."""
    try:
        yield
    except ImpetusError:
        raise
    except Exception as problem:
        raise request_error(problem, activity, who) from problem

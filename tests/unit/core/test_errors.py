"""Tests of the error classes: documented, picklable, with complete messages."""

import pickle

import pytest

from core import errors
from core.errors import ContextLengthExceeded, ImpetusError, ModelNotFound, is_panic


def tree(cls: type[ImpetusError]) -> list[type[ImpetusError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in tree(child))]


CLASSES = [cls for cls in tree(ImpetusError) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", CLASSES)
def test_error_survives_pickling(cls: type[ImpetusError]) -> None:
    problem = cls("what to do")
    problem.param, problem.retry_after_s = "model", 7
    copy = pickle.loads(pickle.dumps(problem))
    assert type(copy) is cls
    assert copy.envelope() == problem.envelope()
    assert copy.retry_after_s == 7


def test_context_error_keeps_its_numbers_when_pickled() -> None:
    copy = pickle.loads(pickle.dumps(ContextLengthExceeded.of(90, 80)))
    assert (copy.prompt_tokens, copy.context_tokens) == (90, 80)


@pytest.mark.parametrize("cls", CLASSES)
def test_error_is_drawn_in_the_module_docstring(cls: type[ImpetusError]) -> None:
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__
    assert cls.code in errors.__doc__


def test_context_length_error_has_both_numbers() -> None:
    message = ContextLengthExceeded.of(9000, 8192).message
    assert "9000" in message
    assert "8192" in message


def test_model_not_found_cuts_long_names() -> None:
    assert len(ModelNotFound.of("x" * 10_000, []).message) < 300


def test_only_exceptions_of_native_libraries_are_panics() -> None:
    class PanicException(BaseException):
        pass

    assert is_panic(PanicException())
    for problem in (ValueError(), KeyboardInterrupt(), SystemExit(), GeneratorExit()):
        assert not is_panic(problem)

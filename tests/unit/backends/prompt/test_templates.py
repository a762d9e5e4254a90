"""Templates render as apply_chat_template renders them, and hostile ones harm nobody."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from backends.cancellation import Cancelled, cancelled_by
from backends.prompt import templates
from backends.prompt.templates import MAX_WORKERS, TemplateRenderer
from core.errors import BrokenModel, EngineFailed, RequestError, TemplateRefused
from core.types import JsonValue

ECHO = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


class Renderers:
    """Makes renderers and closes them all."""

    def __init__(self) -> None:
        self.made: list[TemplateRenderer] = []

    def __call__(self, template: str) -> TemplateRenderer:
        self.made.append(TemplateRenderer(template))
        return self.made[-1]


@pytest.fixture
def make() -> Iterator[Renderers]:
    renderers = Renderers()
    yield renderers
    for renderer in renderers.made:
        renderer.close()


def user(content: JsonValue, **more: JsonValue) -> dict[str, JsonValue]:
    return {"messages": [{"role": "user", "content": content}], "tools": None, **more}


def worker_id(renderer: TemplateRenderer) -> int:
    (worker,) = renderer._idle
    return worker.pid


def test_template_renders_variables(make: Renderers) -> None:
    assert make(ECHO + "{{ extra }}").render(user("hi", extra=3)) == "<user>hi3"


def test_template_environment_is_that_of_hugging_face(make: Renderers) -> None:
    renderer = make(
        "{% for m in messages %}\n"
        "    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y') | length }}{{ none is none }}{{ missing }}"
    )
    assert renderer.render(user({"é": "<'&"})) == '{"é": "<\'&"}4True'


@pytest.mark.parametrize(
    "text", ["\0", "\u2028\u202e", "😀" * 3, "a\nb\r\n", "{{ 1 }}", "x" * 300_000]
)
def test_template_text_passes_unchanged(make: Renderers, text: str) -> None:
    assert make(ECHO).render(user(text)) == f"<user>{text}"


def test_template_lone_surrogate_becomes_the_replacement_character(make: Renderers) -> None:
    renderer = make(ECHO)
    assert renderer.render(user("a\ud800")) == "<user>a\ufffd"
    assert renderer.render(user("b")) == "<user>b"


def test_template_refusal_is_the_requests_error(make: Renderers) -> None:
    renderer = make("{{ raise_exception('No system role!') }}")
    with pytest.raises(TemplateRefused, match=r"^No system role!$"):
        renderer.render(user("a"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|immutable"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ open('/tmp/x', 'w') }}", "undefined"),
        ("{{ 'x' * 9000000 }}", "8 MiB"),
        ("{{ ('x' * 9000000) * 200 }}", "memory"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[7].content.x }}", "no element 7"),
    ],
)
def test_template_that_fails_is_a_broken_model(make: Renderers, template: str, reason: str) -> None:
    renderer = make(template)
    for _ in range(2):
        with pytest.raises(BrokenModel, match=reason):
            renderer.render(user("a"))


def test_template_that_takes_too_much_memory_is_killed_where_the_system_has_no_limit(
    make: Renderers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def footprint(pid: int) -> int:
        return 6 * int(psutil.Process(pid).memory_info().rss)

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("core.process_memory.footprint_bytes", footprint)
    monkeypatch.setattr(templates, "RENDER_LIMIT_S", 60.0)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    renderer = make(f"{{% if bad %}}{{% set a = 'x' * bad %}}{endless}{{% endif %}}ok")
    assert renderer.render(user("a", bad=False)) == "ok"
    first = worker_id(renderer)
    with pytest.raises(BrokenModel, match="needs more memory than the limit"):
        renderer.render(user("a", bad=250_000_000))
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert renderer.render(user("a", bad=False)) == "ok"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ 7 ** 99999999 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}",
    ],
)
def test_template_that_hangs_is_killed_and_the_next_render_works(
    make: Renderers, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = make("{% if bad %}" + attack.replace("7", "(7 + messages|length)") + "{% endif %}ok")
    assert renderer.render(user("a", bad=False)) == "ok"
    first = worker_id(renderer)
    with monkeypatch.context() as patch:
        patch.setattr(templates, "RENDER_LIMIT_S", 0.5)
        with pytest.raises(BrokenModel):
            renderer.render(user("a", bad=True))
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert renderer.render(user("a", bad=False)) == "ok"


def test_template_that_hangs_when_compiled_is_a_broken_model(
    make: Renderers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RENDER_LIMIT_S", 0.3)
    with pytest.raises(BrokenModel, match=r"the model's chat template took longer than 0.3 s"):
        make("{{ 7 ** 99999999 }}").render(user("a"))


def test_template_slow_render_of_long_messages_is_the_requests_fault(
    make: Renderers, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = make("{% if slow %}{{ base ** 99999999 }}{% endif %}ok")
    assert renderer.render(user("a", slow=False)) == "ok"
    monkeypatch.setattr(templates, "RENDER_LIMIT_S", 0.3)
    with pytest.raises(BrokenModel, match=r"took longer than 0.3 s"):
        renderer.render(user("a", slow=True, base=7))
    with pytest.raises(RequestError, match=r"prompt of .* took longer than 0.3 s"):
        renderer.render(user("a" * 300_000, slow=True, base=7))


def test_template_long_messages_are_the_requests_fault(make: Renderers) -> None:
    with pytest.raises(RequestError, match="8 MiB"):
        make(ECHO).render(user("x" * 9_000_000))


def test_template_too_deep_variables_are_refused(make: Renderers) -> None:
    deep: JsonValue = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="deep"):
        make(ECHO).render(user(deep))
    assert make(ECHO).render(user("a")) == "<user>a"


def test_renderer_survives_the_death_of_its_worker(make: Renderers) -> None:
    renderer = make(ECHO)
    renderer.render(user("a"))
    os.kill(worker_id(renderer), signal.SIGKILL)
    assert renderer.render(user("c")) == "<user>c"


def test_renderer_is_thread_safe(make: Renderers) -> None:
    renderer = make(ECHO)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda i: renderer.render(user(str(i))), range(40)))
    assert texts == [f"<user>{i}" for i in range(40)]


def test_renderer_close_ends_the_worker_and_may_be_repeated(make: Renderers) -> None:
    renderer = make(ECHO)
    renderer.render(user("a"))
    process = worker_id(renderer)
    renderer.close()
    renderer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    with pytest.raises(EngineFailed):
        renderer.render(user("b"))


def test_renderer_close_ends_a_hanging_render(
    make: Renderers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RENDER_LIMIT_S", 60.0)
    renderer = make("{% if bad %}{{ (7 + messages|length) ** 99999999 }}{% endif %}")
    renderer.render(user("a", bad=False))
    errors: list[BaseException] = []
    begun = threading.Event()

    def hang() -> None:
        begun.set()
        try:
            renderer.render(user("a", bad=True))
        except EngineFailed as error:
            errors.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    begun.wait()
    renderer.close()
    thread.join()
    assert len(errors) == 1


def test_worker_ends_with_its_parents_pipe(make: Renderers) -> None:
    renderer = make(ECHO)
    renderer.render(user("a"))
    (worker,) = renderer._idle
    worker.close_input()
    assert worker.wait(20) == 0


def test_worker_sees_no_environment(make: Renderers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_API_KEY", "secret-canary")
    renderer = make(ECHO)
    renderer.render(user("a"))
    environment = Path(f"/proc/{worker_id(renderer)}/environ")
    if not environment.exists():
        pytest.skip("needs /proc")
    assert b"secret-canary" not in environment.read_bytes()


def test_a_slow_render_delays_no_other_one(
    make: Renderers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RENDER_LIMIT_S", 60.0)
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    renderer = make(f"{{% if bad %}}{endless}{{% endif %}}ok")
    renderer.render(user("a", bad=False))
    with ThreadPoolExecutor(MAX_WORKERS) as pool:
        slow = [pool.submit(renderer.render, user("a", bad=True)) for _ in range(MAX_WORKERS - 1)]
        while len(renderer._busy) < MAX_WORKERS - 1:
            assert not any(each.done() for each in slow)
        for _ in range(5):
            assert renderer.render(user("a", bad=False)) == "ok"
        assert not any(each.done() for each in slow)
        renderer.close()
        for each in slow:
            assert isinstance(each.exception(60), EngineFailed)


def test_only_one_idle_worker_is_kept(make: Renderers) -> None:
    renderer = make(ECHO)
    with ThreadPoolExecutor(MAX_WORKERS) as pool:
        list(pool.map(lambda _: renderer.render(user("x" * 100_000)), range(20)))
    assert not renderer._busy
    assert len(renderer._idle) == 1


def test_a_worker_that_cannot_be_started_is_no_fault_of_the_model(
    make: Renderers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    renderer = make(ECHO)
    with monkeypatch.context() as patch:
        patch.setattr(templates, "Child", refuse)
        with pytest.raises(EngineFailed, match="did not start"):
            renderer.render(user("a"))
    assert renderer.render(user("a")) == "<user>a"


def test_template_waiting_for_other_renders_ends_with_its_request(make: Renderers) -> None:
    renderer, gone = make(ECHO), threading.Event()

    def render() -> str:
        with cancelled_by(gone):
            return renderer.render(user("a"))

    for _ in range(MAX_WORKERS):
        renderer._slots.acquire()
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(render)
            assert not waiting.done()
            gone.set()
            try:
                assert isinstance(waiting.exception(30), Cancelled)
            finally:
                renderer._slots.release()
    finally:
        for _ in range(MAX_WORKERS - 1):
            renderer._slots.release()
    assert renderer.render(user("b")) == "<user>b"


def test_template_of_a_cancelled_request_is_not_rendered(make: Renderers) -> None:
    renderer, gone = make(ECHO), threading.Event()
    gone.set()
    for _ in range(MAX_WORKERS + 1):
        with cancelled_by(gone), pytest.raises(Cancelled):
            renderer.render(user("a"))
    assert not renderer._idle
    assert renderer.render(user("b")) == "<user>b"

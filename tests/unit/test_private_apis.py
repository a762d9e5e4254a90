"""Private and unstable parts of other packages that the sources build on; see docs/upgrading.md."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from backends.mlx.model import import_runtime

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "upgrading.md"


def table_rows() -> list[list[str]]:
    """Return the cells of the page's table, without its head."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_names_files_and_tests_that_exist() -> None:
    missing = []
    for row in table_rows():
        for path, name in re.findall(
            r"`([\w/]+\.(?:py|yaml)|scripts/env)(?:::(\w+))?`", " ".join(row)
        ):
            file = ROOT / path
            if not file.is_file() or (name and f"def {name}(" not in file.read_text()):
                missing.append(f"{path}::{name}")
    assert missing == []


def test_every_row_names_a_source_and_a_test() -> None:
    for package, relied_on, sources, tests in table_rows():
        assert relied_on
        assert "`" in sources, package
        assert "`tests/" in tests, package


def test_the_packages_of_the_page_are_bounded_from_above() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [Requirement(text) for group in groups for text in group]
    bounded = {
        requirement.name
        for requirement in wanted
        if any(one.operator in ("<", "<=", "==") for one in requirement.specifier)
    }
    packages = {row[0].strip("`") for row in table_rows()}
    # Installed by scripts/install.py at the exact version of scripts/constraints.txt.
    assert packages - bounded - {"apple-fm-sdk"} == set()


def test_serve_still_has_the_names_of_its_controller() -> None:
    from ray.serve._private import constants

    from deployments.serve import status

    assert status._CONTROLLER == constants.SERVE_CONTROLLER_NAME
    assert status._NAMESPACE == constants.SERVE_NAMESPACE


def test_serve_handles_still_take_calls_by_value() -> None:
    from ray.serve.handle import DeploymentHandle

    assert "_by_reference" in inspect.signature(DeploymentHandle.options).parameters


def test_ray_still_has_its_internal_store() -> None:
    from ray.experimental import internal_kv

    put = inspect.signature(internal_kv._internal_kv_put).parameters
    assert list(put)[:3] == ["key", "value", "overwrite"]
    assert next(iter(inspect.signature(internal_kv._internal_kv_get).parameters)) == "key"


def test_serve_still_asks_a_request_router_for_ranks_of_replicas() -> None:
    from ray.serve.request_router import RequestRouter

    parameters = inspect.signature(RequestRouter.choose_replicas).parameters
    assert list(parameters) == ["self", "candidate_replicas", "pending_request"]
    assert callable(RequestRouter.initialize_state)


def test_serve_still_reads_the_settings_of_scripts_env() -> None:
    from ray.serve._private import constants

    names = re.findall(r"^(RAY_SERVE_\w+)=", (ROOT / "scripts" / "env").read_text(), re.MULTILINE)
    source = Path(constants.__file__).read_text()
    assert len(names) >= 3
    assert [name for name in names if f'"{name}"' not in source] == []


def test_ray_still_takes_loopback_as_its_node_address() -> None:
    from ray._private import ray_constants

    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR == "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    code = "import ray; print(ray.util.get_node_ip_address())"
    environment = {**os.environ, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "127.0.0.1\n"


def test_serves_replica_still_binds_by_the_function_that_is_replaced() -> None:
    replica: Any = importlib.import_module("ray.serve._private.replica")
    assert callable(replica.add_port_to_grpc_server)
    started = inspect.getsource(replica.Replica._on_initialized)
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in started
    initialize = inspect.getsource(replica.Replica.initialize)
    assert initialize.index("initialize_callable") < initialize.index("_on_initialized")


def test_ray_still_says_whether_it_wants_a_token() -> None:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    assert isinstance(is_token_auth_enabled(), bool)


def test_mlx_lm_still_has_the_generator_that_batches_build_on() -> None:
    import_runtime(1)
    # `mlx_lm.generate` is also the name of a function that the package exports.
    generate = importlib.import_module("mlx_lm.generate")
    utils = importlib.import_module("mlx_lm.utils")
    cache = importlib.import_module("mlx_lm.models.cache")
    parameters = set(inspect.signature(generate.BatchGenerator.__init__).parameters)
    wanted = {"completion_batch_size", "prefill_batch_size", "prefill_step_size", "sampler"}
    assert wanted <= parameters
    for name in ("insert", "next", "remove", "extract_cache", "close"):
        assert callable(getattr(generate.BatchGenerator, name)), name
    assert "_generation_batch" in inspect.getsource(generate.BatchGenerator)
    batch = inspect.getsource(generate.GenerationBatch)
    parts = "_current_tokens _current_logprobs _next_tokens _next_logprobs _num_tokens"
    assert [name for name in parts.split() if name not in batch] == []
    assert callable(generate.GenerationBatch._step)
    assert callable(generate.GenerationBatch.empty)
    assert hasattr(generate, "generation_stream")
    assert callable(utils._get_classes)
    assert callable(cache.make_prompt_cache)
    assert callable(cache.trim_prompt_cache)
    assert callable(cache.can_trim_prompt_cache)


def test_mlx_lm_still_changes_metals_memory_by_the_functions_that_are_replaced() -> None:
    import_runtime(1)
    generate = importlib.import_module("mlx_lm.generate")
    source = inspect.getsource(generate)
    assert "= maybe_set_recommended_wired_limit()" in inspect.getsource(generate.BatchGenerator)
    assert callable(generate.maybe_set_recommended_wired_limit)
    # By the module's attribute, so that a replaced one is called.
    assert "import mlx.core as mx" in source
    assert "mx.clear_cache()" in source
    assert "import clear_cache" not in source


def test_mlx_lm_still_lowers_the_limit_of_open_files() -> None:
    """While it does, its import is guarded; once it does not, the guard can go."""
    code = (
        "import resource\n"
        "before = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "calls = []\n"
        "resource.setrlimit = lambda *limits: calls.append(limits)\n"
        "import mlx_lm.generate\n"
        "assert any(kind == resource.RLIMIT_NOFILE for kind, _ in calls), calls\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_transformers_still_takes_attention_functions() -> None:
    from transformers import AttentionInterface

    assert callable(AttentionInterface.register)
    assert list(inspect.signature(AttentionInterface.register).parameters)[:2] == ["key", "value"]


def test_llama_cpp_still_has_every_function_that_is_called() -> None:
    import llama_cpp

    names: set[str] = set()
    for path in (ROOT / "backends" / "gguf").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and re.match(r"(llama|ggml)_", node.attr):
                names.add(node.attr)
    used = {name for name in names if not name.startswith("llama_cpp")}
    assert len(used) > 30
    assert sorted(name for name in used if not hasattr(llama_cpp, name)) == []


def test_llama_cpp_still_has_the_fields_that_are_set() -> None:
    import llama_cpp

    context = {name for name, _ in llama_cpp.llama_context_params._fields_}
    wanted = "n_ctx n_batch n_ubatch n_seq_max n_threads n_threads_batch embeddings kv_unified"
    assert set(wanted.split()) <= context
    batch = {name for name, _ in llama_cpp.llama_batch._fields_}
    assert {"n_tokens", "token", "pos", "n_seq_id", "seq_id", "logits"} <= batch


def test_llguidance_still_has_the_calls_that_grammars_use() -> None:
    from llguidance import LLMatcher, LLParserLimits, TokenizerWrapper, regex_to_lark

    assert callable(regex_to_lark)
    assert LLParserLimits(verbose_errors=False)
    assert callable(LLMatcher.grammar_from_lark)
    assert callable(TokenizerWrapper)

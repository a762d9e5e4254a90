"""Server settings: `IMPETUS_…` environment variables, `settings.json`, `serve_config.yaml`."""

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from platformdirs import user_data_path
from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from core.child import SERVER_ID
from core.errors import RequestError
from core.units import parse_bytes

SettingSource: TypeAlias = Literal["environment", "stored", "configuration", "default"]

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
# Where the stored settings are, and a secret, which belongs in no file of settings.
NOT_STORED = frozenset({"home", "api_key"})
# Programs whose model folders can be found.
DISCOVERED = ("huggingface", "lmstudio", "ollama", "llama.cpp")
_PREFIX = "IMPETUS_"
_INTERNAL = (SERVER_ID,)
# Larger waits overflow the timers of threads and event loops.
_MOST_SECONDS = 1e9
_MOST_INTEGER = 2**63 - 1


def _check_seconds(value: float) -> float:
    if value > _MOST_SECONDS:
        raise ValueError(f"must be at most {_MOST_SECONDS:g} seconds")
    return value


ByteCount = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, AllowInfNan(False), AfterValidator(_check_seconds)]


def _split_paths(value: Any) -> Any:
    if isinstance(value, str):
        return [part for part in value.split(os.pathsep) if part]
    return value


def _split_commas(value: Any) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


class Settings(BaseSettings):
    """The server's settings.

    Environment variables override stored settings (`deployments.stored_settings`), and these the
    configuration file.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    _arguments: dict[str, Any] = PrivateAttr(default_factory=dict)
    _stored: frozenset[str] = PrivateAttr(default_factory=frozenset)

    home: Path = Field(
        default_factory=lambda: user_data_path("impetus"),
        description="Data folder: catalog, converted models, caches and logs.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on; an address other than loopback requires an API key.",
    )
    port: int = Field(default=8000, ge=1, le=65535, description="Port of the HTTP API.")
    models_path: Annotated[list[Path], NoDecode, BeforeValidator(_split_paths)] = Field(
        default_factory=list,
        description="Additional folders to scan for models, separated as in PATH.",
    )
    discover: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default=[*DISCOVERED],
        description="Programs whose model folders are scanned as well and used in place: "
        "huggingface, lmstudio, ollama, llama.cpp, separated by commas; empty: none.",
    )
    download_hosts: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default_factory=list,
        description="Hosts of this machine or of private networks, such as nas.local:8080, from "
        "whose addresses models may be downloaded, separated by commas; others are refused.",
    )
    browse_path: Annotated[list[Path] | None, NoDecode, BeforeValidator(_split_paths)] = Field(
        default=None,
        description="Folders from which models may be chosen and imported, besides the scanned "
        "ones, separated as in PATH; unset: the user's Downloads and Models; empty: none.",
    )
    starters: bool = Field(default=True, description="Serve the embedded starter models.")
    formats: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default=[
            *("gguf", "mlx", "safetensors", "pytorch", "onnx", "coreml", "apple-foundation"),
            "echo",
        ],
        description="Model formats to serve, separated by commas.",
    )
    auto_convert: bool = Field(
        default=False,
        description="Convert a model that cannot run on this machine when it is first requested; "
        "otherwise its requests get 400 conversion_needed, which says how to convert it.",
    )
    conversion_disk: ByteCount = Field(
        default=100 * 1024**3,
        ge=0,
        description="Disk space for all converted models together; 0 forbids conversions.",
    )
    memory_budget: ByteCount | None = Field(
        default=None,
        gt=0,
        description="Memory that all loaded models may use together, such as 12GiB; unset: "
        "the machine's usable memory, less a margin; on a Mac also what other applications leave.",
    )
    context_length: int | None = Field(
        default=None,
        ge=16,
        le=2**31 - 1,
        description="Maximum context of every model, in tokens; unset: the model's own.",
    )
    max_sequences: int = Field(
        default=16,
        ge=1,
        le=256,
        description="Maximum concurrent sequences per model.",
    )
    max_waiting: int = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description="Maximum waiting requests per model; further ones get 429 queue_full.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="CPU threads per engine; unset: one per performance core.",
    )
    prefill_chunk_tokens: int = Field(
        default=512,
        ge=16,
        le=8192,
        description="Maximum prompt tokens per engine step; fewer after more than 32,768 tokens.",
    )
    default_model: str = Field(
        default="",
        max_length=512,
        description="Id or alias of the model for requests that name none; empty: the only "
        "loaded model that can answer them.",
    )
    continue_answers: bool = Field(
        default=False,
        description="Continue the last message of a chat where it is the assistant's (prefill) if "
        "the request does not say; false answers after it.",
    )
    truncate_inputs: bool = Field(
        default=True,
        description="Cut inputs of embeddings and reranking over the model's limit if the request "
        "does not say; false refuses them with 400.",
    )
    request_timeout_s: Seconds = Field(
        default=3600.0,
        gt=0,
        description="Deadline of a request in seconds; after it the request ends with timed_out.",
    )
    step_limit_s: Seconds = Field(
        default=120.0,
        ge=1,
        description="Seconds after which an engine step counts as hung and its process is "
        "replaced.",
    )
    load_limit_s: Seconds = Field(
        default=120.0,
        ge=1,
        description="Seconds after which the load of a model counts as hung and its process is "
        "replaced, plus one second for every 10 MiB of the model's files and, in Core ML on macOS, "
        "half an hour for its first compilation.",
    )
    drain_limit_s: Seconds = Field(
        default=30.0,
        ge=0,
        description="Grace period for running requests at shutdown, in seconds.",
    )
    scan_interval_s: Seconds = Field(
        default=60.0,
        gt=0,
        description="Interval between scans of the model folders, in seconds; of folders that the "
        "system watches for changes only additions are looked for, and all is scanned every hour.",
    )
    prefix_ram: ByteCount = Field(
        default=512 * 1024**2,
        description="RAM for cached prefixes of unloaded models, across all formats; 0 disables "
        "it.",
    )
    prefix_disk: ByteCount = Field(
        default=4 * 1024**3,
        description="Disk space for cached prefixes, which survive a restart, in files under "
        "cache/prefixes that only their owner can read; 0 disables it.",
    )
    stable_prompts: bool = Field(
        default=True,
        description="Normalize prompts to reuse more computed prefixes: sort tools and remove the "
        "billing headers that clients put before system prompts.",
    )
    max_body: ByteCount = Field(default=16 * 1024**2, description="Maximum size of a request body.")
    stored_responses: int = Field(
        default=1000,
        ge=0,
        le=1_000_000,
        description="Maximum /v1/responses answers kept in memory for previous_response_id, and "
        "as many /v1/messages conversations for thread; 0 keeps none.",
    )
    stored_responses_bytes: ByteCount = Field(
        default=64 * 1024**2,
        description="Maximum memory for stored responses, and again for conversations of thread.",
    )
    api_key: SecretStr | None = Field(
        default=None, description="API key that every request must send; unset: no key is needed."
    )
    allowed_hosts: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default_factory=list,
        description="Additional accepted Host header names, separated by commas.",
    )
    allowed_origins: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default_factory=list,
        description="Web origins whose pages may call the API, separated by commas.",
    )
    rate_limit_requests: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Maximum inference requests per minute of each API key, or of each address "
        "without one; unset: no limit.",
    )
    rate_limit_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Maximum tokens of prompts and answers per minute of each API key, or of each "
        "address without one; unset: no limit.",
    )
    thermal_file: Path | None = Field(
        default=None,
        description="File with a thermal state (nominal, fair, serious, critical) to use "
        "instead of the machine's sensors; unset: the sensors are read.",
    )
    keep_awake: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: a Mac does not sleep by itself while requests, conversions or downloads "
        "run, and for a minute after, except on battery with 20 % or less; never: it may.",
    )
    keep_alive_s: Seconds | None = Field(
        default=None,
        ge=0,
        description="Seconds after which an idle model is unloaded; unset: only to free memory.",
    )

    format_idle_s: Seconds = Field(
        default=300.0,
        gt=0,
        description="Seconds after which an on-demand format's process exits if none of its models "
        "was used and none is pinned or has a keep-alive.",
    )
    max_replicas: int = Field(
        default=1,
        ge=1,
        le=16,
        description="Maximum processes per format; more than one only helps on a multi-machine Ray "
        "cluster.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _value_is_plausible(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject `true` as a number, integers that no machine word holds, and empty paths."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if annotation in (Path, Path | None) and (
            not isinstance(value, str | Path | None) or value == ""
        ):
            raise ValueError("must be the path of a file or folder")
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError(f"must not be {str(value).lower()}")
        if isinstance(value, int) and abs(value) > _MOST_INTEGER:
            raise ValueError("the number is too large")
        return value

    @field_validator("host")
    @classmethod
    def _host_is_named(cls, value: str) -> str:
        if not value.strip() or "\0" in value:
            raise ValueError("must be an address or a host name, such as 127.0.0.1")
        return value.strip()

    @field_validator("formats")
    @classmethod
    def _formats_are_named(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("must name at least one format, such as gguf")
        return value

    @field_validator("discover")
    @classmethod
    def _programs_are_known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in DISCOVERED:
                raise ValueError(f"{name[:50]!r} is not one of {', '.join(DISCOVERED)}")
        return value

    @field_validator("home", "thermal_file", "models_path", "browse_path")
    @classmethod
    def _paths_are_complete(cls, value: Any) -> Any:
        """Replace a leading `~` by the user's folder; a relative path counts from the start."""
        if isinstance(value, list):
            return [_complete(path) for path in value]
        return None if value is None else _complete(value)

    @field_validator("api_key")
    @classmethod
    def _key_is_valid(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not (
            value.get_secret_value().isascii() and value.get_secret_value()
        ):
            raise ValueError("must be ASCII and not empty; unset it to run without a key")
        return value

    @classmethod
    def merged(cls, arguments: Mapping[str, Any], stored: Mapping[str, Any]) -> "Settings":
        """Return the settings for the configuration file's `args` and the stored ones.

        Raises ValidationError.
        """
        settings = cls.model_validate({**arguments, **stored})
        settings._arguments = {key: arguments[key] for key in arguments if key not in NOT_STORED}
        settings._stored = frozenset(stored)
        return settings

    def next_with(self, stored: Mapping[str, Any]) -> "Settings":
        """Return the settings of the next start in this environment, with other stored ones.

        Raises RequestError naming every setting that is invalid.
        """
        found = load_settings(self._arguments, stored)
        return found.model_copy(update={name: getattr(self, name) for name in NOT_STORED})

    def source_of(self, name: str) -> SettingSource:
        """Return where a setting's value comes from."""
        if variable_of(name) is not None:
            return "environment"
        if name in self._stored:
            return "stored"
        return "configuration" if name in self.model_fields_set else "default"

    @property
    def is_public(self) -> bool:
        """Whether the server listens on an address other than loopback."""
        return self.host not in LOOPBACK_HOSTS

    @property
    def catalog_file(self) -> Path:
        """Path of the SQLite catalog."""
        return self.home / "catalog.sqlite"

    @property
    def key_database(self) -> Path:
        """Path of the SQLite database of API keys and sessions."""
        return self.home / "keys" / "api_keys.sqlite"

    @property
    def prefix_folder(self) -> Path:
        """Folder of the files of computed prefixes."""
        return self.home / "cache" / "prefixes"

    @property
    def trial_folder(self) -> Path:
        """Folder of what trials of models found."""
        return self.home / "cache" / "trials"

    @property
    def compiled_folder(self) -> Path:
        """Folder of what Core ML compiled of models."""
        return self.home / "cache" / "coreml"

    @property
    def base_url(self) -> str:
        """The base URL that users enter in their client."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Give environment variables precedence over the configuration file's args."""
        return env_settings, init_settings


def _complete(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("must be the path of a file or folder")
    try:
        return path.expanduser().absolute()
    except (RuntimeError, OSError) as problem:
        raise ValueError(
            f"the folder of the user in {str(path)!r} is unknown; write the whole path"
        ) from problem


def load_settings(arguments: object, stored: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings for the configuration file's `args` and this process' environment.

    `stored` are settings that were changed through the API.  Raises RequestError with one sentence
    that names every setting that is invalid.
    """
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise RequestError("args must be a list of `name: value` lines, such as `port: 8000`.")
    try:
        return Settings.merged(arguments, stored or {})
    except ValidationError as problem:
        raise _invalid(problem) from None


def variable_of(name: str) -> str | None:
    """Return the variable of the environment that determines a setting, if one does."""
    wanted = f"{_PREFIX}{name.upper()}"
    return next((one for one in os.environ if one.upper() == wanted), None)


def _invalid(problem: ValidationError) -> RequestError:
    faults = " ".join(dict.fromkeys(map(_describe, problem.errors())))
    first = str(next(iter(problem.errors()))["loc"][0])
    return RequestError(f"Invalid settings: {faults}", param=first)


def unknown_variables() -> Iterator[str]:
    """Yield a sentence for each IMPETUS_ variable of the environment that is not a setting."""
    known = [f"{_PREFIX}{name.upper()}" for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith(_PREFIX) and name.upper() not in (*known, *_INTERNAL):
            yield f"{name} is not a setting and has no effect{_nearest(name.upper(), known)}"


def _describe(fault: ErrorDetails) -> str:
    name = ".".join(map(str, fault["loc"]))
    setting = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        return f"{name} is not a setting{_nearest(setting, list(Settings.model_fields))}"
    variable = f"{_PREFIX}{setting.upper()}"
    source = f" ({variable})" if variable in os.environ else ""
    return f"{name}{source}: {fault['msg'].removeprefix('Value error, ')}."


def _nearest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {found[0]}?" if found else "."

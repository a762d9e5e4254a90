"""Every setting of the server, from `serve_config.yaml`'s args and from the environment."""

import os
from pathlib import Path
from typing import Annotated, Any

from platformdirs import user_data_path
from pydantic import AllowInfNan, BeforeValidator, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from core.units import parse_bytes

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

ByteCount = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, AllowInfNan(False)]


def _split_paths(value: Any) -> Any:
    if isinstance(value, str):
        return [part for part in value.split(os.pathsep) if part]
    return value


def _split_commas(value: Any) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


class Settings(BaseSettings):
    """The server's settings; the environment wins over the configuration file."""

    model_config = SettingsConfigDict(
        env_prefix="IMPETUS_", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    home: Path = Field(
        default_factory=lambda: user_data_path("impetus"),
        description="Folder of the catalog, models, caches and logs.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on; other than loopback only together with an API key.",
    )
    port: int = Field(default=8000, ge=1, le=65535, description="Port of the OpenAI API.")
    models_path: Annotated[list[Path], NoDecode, BeforeValidator(_split_paths)] = Field(
        default_factory=list,
        description="More folders to scan for models, separated like PATH.",
    )
    starters: bool = Field(default=True, description="Offer the embedded starter models.")
    formats: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default=[
            *("gguf", "mlx", "safetensors", "pytorch", "onnx", "coreml", "apple-foundation"),
            "echo",
        ],
        description="Model formats to serve, separated by commas.",
    )
    auto_convert: bool = Field(
        default=True,
        description="Convert a model that cannot run on this machine as it is, when asked for it.",
    )
    memory_budget: ByteCount | None = Field(
        default=None,
        gt=0,
        description="Bytes that models may use together, as 12GiB or a number; "
        "unset: what the machine can give less a margin.",
    )
    context_length: int | None = Field(
        default=None,
        ge=16,
        description="Upper bound of every model's context in tokens; unset: the model's own.",
    )
    max_sequences: int = Field(
        default=16, ge=1, le=256, description="Sequences one model generates at the same time."
    )
    max_waiting: int = Field(
        default=256, ge=1, description="Requests that may wait for one model before 429."
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="CPU threads of one engine; unset: the machine's performance cores.",
    )
    prefill_chunk_tokens: int = Field(
        default=512, ge=16, le=8192, description="Most prompt tokens that one step computes."
    )
    request_timeout_s: Seconds = Field(
        default=3600.0, gt=0, description="Seconds after which a request is ended."
    )
    step_limit_s: Seconds = Field(
        default=120.0,
        ge=1,
        description="Seconds after which a step of an engine counts as hung and its process is "
        "replaced.",
    )
    drain_limit_s: Seconds = Field(
        default=30.0,
        ge=0,
        description="Seconds that running requests may go on after the server was told to stop.",
    )
    scan_interval_s: Seconds = Field(
        default=60.0, gt=0, description="Seconds between two scans of the model folders."
    )
    prefix_ram: ByteCount = Field(
        default=512 * 1024**2,
        description="Bytes of RAM that keep computed prefixes of unloaded models, all formats "
        "together; 0: none.",
    )
    prefix_disk: ByteCount = Field(
        default=4 * 1024**3,
        description="Bytes of files under cache/prefixes that keep computed prefixes of prompts "
        "over a restart, readable by their owner only; 0: none are written.",
    )
    stable_prompts: bool = Field(
        default=True,
        description="Show tools to models in one order, and leave out billing headers that "
        "clients put before system prompts, so that equal prompts are computed once.",
    )
    max_body: ByteCount = Field(default=16 * 1024**2, description="Largest accepted request body.")
    stored_responses: int = Field(
        default=1000,
        ge=0,
        description="Answers of /v1/responses that are kept in memory to be followed.",
    )
    stored_responses_bytes: ByteCount = Field(
        default=64 * 1024**2, description="Memory of those answers and their conversations."
    )
    api_key: SecretStr | None = Field(
        default=None, description="Key that every request must carry; unset: none is asked for."
    )
    allowed_hosts: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default_factory=list,
        description="More Host header names that are answered, separated by commas.",
    )
    allowed_origins: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default_factory=list,
        description="Web origins whose pages may call the API, separated by commas.",
    )
    thermal_file: Path | None = Field(
        default=None,
        description="File that holds a thermal state's name (nominal, fair, serious, critical) "
        "and stands for the machine's sensors; unset: the sensors are read.",
    )
    keep_alive_s: Seconds | None = Field(
        default=None,
        ge=0,
        description="Seconds after which an idle model is unloaded; unset: never while there is "
        "room.",
    )

    format_idle_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds after which the process of a format that starts on demand ends, "
        "when none of its models was used and none is pinned or has a keep-alive.",
    )
    max_replicas: int = Field(
        default=1,
        ge=1,
        le=16,
        description="Most processes of one format; more than one helps only where the Ray cluster "
        "has more machines.",
    )

    @field_validator("api_key")
    @classmethod
    def _key_is_valid(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not (
            value.get_secret_value().isascii() and value.get_secret_value()
        ):
            raise ValueError("must be non-empty ASCII")
        return value

    @property
    def is_public(self) -> bool:
        """Whether the listener is reachable from other machines."""
        return self.host not in LOOPBACK_HOSTS

    @property
    def catalog_file(self) -> Path:
        """The SQLite catalog."""
        return self.home / "catalog.sqlite"

    @property
    def prefix_folder(self) -> Path:
        """The files of computed prefixes."""
        return self.home / "cache" / "prefixes"

    @property
    def base_url(self) -> str:
        """What users put into their client."""
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
        """Let the environment win over the configuration file's args."""
        return env_settings, init_settings

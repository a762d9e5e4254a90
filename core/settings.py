"""Server settings, read from `IMPETUS_…` environment variables and `serve_config.yaml`."""

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
    """The server's settings; environment variables override the configuration file."""

    model_config = SettingsConfigDict(
        env_prefix="IMPETUS_", extra="forbid", frozen=True, hide_input_in_errors=True
    )

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
    starters: bool = Field(default=True, description="Serve the embedded starter models.")
    formats: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        default=[
            *("gguf", "mlx", "safetensors", "pytorch", "onnx", "coreml", "apple-foundation"),
            "echo",
        ],
        description="Model formats to serve, separated by commas.",
    )
    auto_convert: bool = Field(
        default=True,
        description="Convert a model that cannot run on this machine when it is first requested.",
    )
    memory_budget: ByteCount | None = Field(
        default=None,
        gt=0,
        description="Memory that all loaded models may use together, such as 12GiB; unset: "
        "the machine's usable memory, less a margin.",
    )
    context_length: int | None = Field(
        default=None,
        ge=16,
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
        description="Maximum prompt tokens per engine step.",
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
    drain_limit_s: Seconds = Field(
        default=30.0,
        ge=0,
        description="Grace period for running requests at shutdown, in seconds.",
    )
    scan_interval_s: Seconds = Field(
        default=60.0, gt=0, description="Interval between scans of the model folders, in seconds."
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
        description="Maximum /v1/responses answers kept in memory for previous_response_id; 0 "
        "keeps none.",
    )
    stored_responses_bytes: ByteCount = Field(
        default=64 * 1024**2,
        description="Maximum memory for stored responses and conversations.",
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
    thermal_file: Path | None = Field(
        default=None,
        description="File with a thermal state (nominal, fair, serious, critical) to use "
        "instead of the machine's sensors; unset: the sensors are read.",
    )
    keep_alive_s: Seconds | None = Field(
        default=None,
        ge=0,
        description="Seconds after which an idle model is unloaded; unset: only to free memory.",
    )

    format_idle_s: float = Field(
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

    @field_validator("api_key")
    @classmethod
    def _key_is_valid(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not (
            value.get_secret_value().isascii() and value.get_secret_value()
        ):
            raise ValueError("must be ASCII and not empty; unset it to run without a key")
        return value

    @property
    def is_public(self) -> bool:
        """Whether the server listens on an address other than loopback."""
        return self.host not in LOOPBACK_HOSTS

    @property
    def catalog_file(self) -> Path:
        """Path of the SQLite catalog."""
        return self.home / "catalog.sqlite"

    @property
    def prefix_folder(self) -> Path:
        """Folder of the files of computed prefixes."""
        return self.home / "cache" / "prefixes"

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

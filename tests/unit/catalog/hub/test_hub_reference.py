"""What users paste, and what of it is refused (D10)."""

import pytest

from catalog.hub.reference import HubReference, check_path, parse_reference
from core.errors import RequestError

NAME = "bartowski/Llama-3.2-1B-Instruct-GGUF"
FILE = "Llama-3.2-1B-Instruct-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NAME, HubReference(NAME)),
        (f"  `{NAME}` ", HubReference(NAME)),
        (f"{NAME}:Q4_K_M", HubReference(NAME, quantization="Q4_K_M")),
        (f"{NAME}:latest", HubReference(NAME)),
        (f"{NAME}@v1.0", HubReference(NAME, "v1.0")),
        (f"{NAME}/{FILE}", HubReference(NAME, file=FILE)),
        (f"hf.co/{NAME}:Q8_0", HubReference(NAME, quantization="Q8_0")),
        (f"ollama run hf.co/{NAME}:Q8_0", HubReference(NAME, quantization="Q8_0")),
        (f"hf download {NAME} {FILE} --local-dir .", HubReference(NAME, file=FILE)),
        (f"huggingface-cli download {NAME} --include x", HubReference(NAME)),
        (f"git clone https://huggingface.co/{NAME}.git", HubReference(NAME)),
        (f"https://huggingface.co/{NAME}", HubReference(NAME)),
        (f"https://huggingface.co/{NAME}/discussions/3", HubReference(NAME)),
        (f"https://www.huggingface.co/{NAME}/tree/main", HubReference(NAME, "main")),
        (f"https://huggingface.co/{NAME}/tree/main/onnx", HubReference(NAME, "main", "onnx")),
        (f"https://huggingface.co/{NAME}/blob/v2/{FILE}", HubReference(NAME, "v2", FILE)),
        (
            f"https://huggingface.co/{NAME}/resolve/main/a/{FILE}?download=true",
            HubReference(NAME, "main", f"a/{FILE}"),
        ),
        (
            f"https://huggingface.co/{NAME}/blob/refs%2Fpr%2F4/{FILE}",
            HubReference(NAME, "refs/pr/4", FILE),
        ),
        (
            f"https://huggingface.co/{NAME}/tree/refs/pr/4/sub",
            HubReference(NAME, "refs/pr/4", "sub"),
        ),
        (
            "https://huggingface.co/gpt2/blob/main/config.json",
            HubReference("gpt2", "main", "config.json"),
        ),
        (f"hf://{NAME}@v1/{FILE}", HubReference(NAME, "v1", FILE)),
        (f"hf://models/{NAME}@refs/pr/4/{FILE}", HubReference(NAME, "refs/pr/4", FILE)),
        (f"http://mirror.test:8080/hub/{NAME}/tree/main", HubReference(NAME, "main")),
        # Without the host, as after a copy of a part of an address.
        (f"{NAME}/tree/main", HubReference(NAME, "main")),
        (f"{NAME}/blob/main/a/{FILE}", HubReference(NAME, "main", f"a/{FILE}")),
        (
            f"{NAME}/resolve/refs%2Fpr%2F4/{FILE}?download=true",
            HubReference(NAME, "refs/pr/4", FILE),
        ),
        (f"models/{NAME}", HubReference(NAME)),
        ("models/name", HubReference("models/name")),
        # As LocalAI writes them.
        (f"huggingface://{NAME}/{FILE}", HubReference(NAME, file=FILE)),
        (f"llama-cli -hf {NAME}:Q8_0 -p hello", HubReference(NAME, quantization="Q8_0")),
        (f"llama-server --hf-repo {NAME} --hf-file {FILE}", HubReference(NAME, file=FILE)),
    ],
)
def test_hub_reference_is_understood(text: str, expected: HubReference) -> None:
    assert parse_reference(text, "http://mirror.test:8080/hub") == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "OWNER/NAME"),
        ("llama", "OWNER/NAME"),
        ("https://huggingface.co/", "names no repository"),
        ("https://huggingface.co/datasets/org/name", "is a dataset"),
        ("hf://spaces/org/name", "is a space"),
        ("datasets/org/name", "is a dataset"),
        ("spaces/org/name", "is a space"),
        ("http://mirror.test:8080/hubble/org/name", "is not the Hugging Face Hub"),
        ("https://evil.test/org/name", "evil.test is not the Hugging Face Hub"),
        ("https://huggingface.co@evil.test/org/name", "evil.test is not the Hugging Face Hub"),
        ("ftp://huggingface.co/org/name", "is not the Hugging Face Hub"),
        ("http://[::1/org/name", "is not a valid address"),
        ("http://huggingface.co:99999/org/name", "is not a valid address"),
        ("../etc/passwd", "is not the name of a repository"),
        ("org/na--me", "is not the name of a repository"),
        ("org/name:a,b", "is not a quantization"),
        ("org/name:../x", "is not the name of a repository"),
        ("org/name@a..b", "is not a revision"),
        ("org/na\0me", "is not the name of a repository"),
        ("org/" + "x" * 3000, "longer than 2,048 characters"),
    ],
)
def test_hub_reference_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as problem:
        parse_reference(text, "http://mirror.test:8080/hub")
    assert len(problem.value.message) < 400


@pytest.mark.parametrize(
    "path", ["../../x", "/etc/passwd", "a\\..\\b", "a/../b", "a/./b", "x\0", "C:/x", "a\nb"]
)
def test_hub_file_outside_its_repository_is_refused(path: str) -> None:
    with pytest.raises(RequestError, match="is not the path of a file in a repository"):
        check_path(path)
    if "\n" not in path:
        with pytest.raises(RequestError):
            parse_reference(f"hf://org/name@main/{path}")

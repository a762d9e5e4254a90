"""A conversion's tokenizer, templates and settings are the source's own bytes."""

from pathlib import Path

from catalog.convert.sidecars import copy_sidecars, sidecar_files

KEPT = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "tekken.json",
    "generation_config.json", "modules.json", "LICENSE", "README.md",
    "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json",
    "2_Dense/model.safetensors",
)  # fmt: skip
LEFT = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "modeling_x.py",
    "optimizer.pt", "provenance.json", "additional_chat_templates/x.py", "1_Pooling/x.py",
    "checkpoint-10/tokenizer.json", ".cache/tokenizer.json", "1_Pooling/._config.json",
    "additional_chat_templates/._tool_use.jinja", "._tokenizer.json",
)  # fmt: skip


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f'{{ "{name}":1}}\r\n'.encode())


def test_all_that_the_answers_depend_on_is_kept_byte_for_byte(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    output.mkdir()
    write(source, *KEPT, *LEFT)
    assert {str(name) for name in sidecar_files(source)} == set(KEPT)
    copy_sidecars(source, output)
    made = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert made == set(KEPT)
    for name in KEPT:
        assert (output / name).read_bytes() == (source / name).read_bytes()


def test_what_an_exporter_saved_again_is_replaced(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    write(source, "tokenizer.model", "generation_config.json")
    write(output, "config.json", "genai_config.json", "model.onnx")
    exported = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                "chat_template.jinja", "generation_config.json",
                "additional_chat_templates/x.jinja")  # fmt: skip
    write(output, *exported)
    (output / "generation_config.json").write_text("changed")
    copy_sidecars(source, output)
    made = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert made == {
        "config.json", "genai_config.json", "model.onnx", "tokenizer.model",
        "generation_config.json",
    }  # fmt: skip
    kept = (output / "generation_config.json").read_bytes()
    assert kept == (source / "generation_config.json").read_bytes()


def test_links_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    write(blobs, "0123")
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    (snapshot / "vocab.json").symlink_to("../../blobs/gone")
    output = tmp_path / "output"
    output.mkdir()
    copy_sidecars(snapshot, output)
    assert [path.name for path in output.iterdir()] == ["tokenizer.json"]
    assert not (output / "tokenizer.json").is_symlink()
    assert (output / "tokenizer.json").read_bytes() == (blobs / "0123").read_bytes()

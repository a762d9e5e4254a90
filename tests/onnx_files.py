"""Tiny ONNX models: decoders in plain operators and with GroupQueryAttention, and an encoder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 64
WIDTH = 32
HEADS = 2
HEAD_DIM = 16
LAYERS = 2
POSITIONS = 128

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "intermediate_size": WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "eos_token_id": 1,
}
ENCODER_CONFIG = {
    **CONFIG,
    "model_type": "bert",
    "architectures": ["BertModel"],
}


class GraphBuilder:
    """Nodes and weights of one graph, random but always the same."""

    def __init__(self, dtype: str) -> None:
        from onnx import TensorProto

        self.random = np.random.default_rng(7)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.dtype = np.dtype(dtype)
        self.float_type = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
        self.integer_type = TensorProto.INT64

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node with one output; return the output's name."""
        from onnx import helper

        outputs = attributes.pop("outputs", None) or [f"{operator}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, **attributes))
        return str(outputs[0])

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """Append a weight; return its name."""
        from onnx import numpy_helper

        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def matrix(self, rows: int, columns: int, name: str = "", scale: float = 0.15) -> str:
        """Append a random weight; return its name."""
        from onnx import numpy_helper

        name = name or f"matrix_{len(self.weights)}"
        values = (self.random.standard_normal((rows, columns)) * scale).astype(self.dtype)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def size(self, name: str, axis: int) -> str:
        """Return the name of one dimension's size, a scalar."""
        return self.add("Gather", [self.add("Shape", [name]), self.constant(axis)], axis=0)

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Return the whole ModelProto."""
        from onnx import helper

        graph = helper.make_graph(self.nodes, "tiny", list(inputs), list(outputs), self.weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def decoder(
    *, attention: str = "plain", dtype: str = "float32", extras: Sequence[str] = ("position_ids",)
) -> Any:
    """Return a decoder as ModelProto; `attention` is "plain" or "grouped", `extras` more inputs."""
    from onnx import TensorProto, helper

    build = GraphBuilder(dtype)
    value = helper.make_tensor_value_info
    rows_tokens = ["batch", "tokens"]
    inputs = [
        value("input_ids", build.integer_type, rows_tokens),
        value("attention_mask", build.integer_type, ["batch", "total"]),
    ]
    shapes: dict[str, tuple[int, list[Any]]] = {
        "position_ids": (build.integer_type, rows_tokens),
        "cache_position": (build.integer_type, ["tokens"]),
        "num_logits_to_keep": (build.integer_type, []),
        "use_cache_branch": (TensorProto.BOOL, [1]),
        "pixel_values": (build.float_type, rows_tokens),
    }
    inputs += [value(name, *shapes[name]) for name in extras]
    outputs = [value("logits", build.float_type, ["batch", "kept", VOCABULARY])]
    hidden = build.add("Gather", [build.matrix(VOCABULARY, WIDTH, "embed", 1.0), "input_ids"])
    if "position_ids" in extras:
        positions = build.matrix(POSITIONS, WIDTH, "positions", 1.0)
        hidden = build.add("Add", [hidden, build.add("Gather", [positions, "position_ids"])])
    layer = _plain_layer if attention == "plain" else _grouped_layer
    shared = _mask(build, extras) if attention == "plain" else _lengths(build)
    for index in range(LAYERS):
        heads = HEADS if attention == "plain" else 1
        for kind in ("key", "value"):
            inputs.append(
                value(
                    f"past_key_values.{index}.{kind}",
                    build.float_type,
                    ["batch", heads, "past", HEAD_DIM],
                )
            )
            outputs.append(
                value(
                    f"present.{index}.{kind}", build.float_type, ["batch", heads, "all", HEAD_DIM]
                )
            )
        mixed = layer(build, hidden, index, shared, extras)
        mixed = build.add("MatMul", [mixed, build.matrix(WIDTH, WIDTH)])
        hidden = build.add("Add", [hidden, mixed])
    if "num_logits_to_keep" in extras:
        axes = build.constant([1])
        start = build.add(
            "Neg", [build.add("Unsqueeze", ["num_logits_to_keep", build.constant([0])])]
        )
        hidden = build.add("Slice", [hidden, start, build.constant([10_000]), axes])
    build.add("MatMul", [hidden, build.matrix(WIDTH, VOCABULARY, "head")], outputs=["logits"])
    return build.model(inputs, outputs)


def _mask(build: GraphBuilder, extras: Sequence[str]) -> tuple[str, ...]:
    """Return what is added to scores: (batch, 1, tokens, total)."""
    total, tokens = build.size("attention_mask", 1), build.size("input_ids", 1)
    zero, one = build.constant(0), build.constant(1)
    if "cache_position" in extras:
        query = "cache_position"
    else:
        query = build.add("Range", [build.add("Sub", [total, tokens]), total, one])
    key = build.add("Range", [zero, total, one])
    column = build.add("Unsqueeze", [query, build.constant([1])])
    causal = build.add("LessOrEqual", [key, column])
    wide = build.add("Unsqueeze", ["attention_mask", build.constant([1, 2])])
    seen = build.add("And", [causal, build.add("Greater", [wide, zero])])
    free, hidden = build.constant(0, build.dtype), build.constant(-1e4, build.dtype)
    return (build.add("Where", [seen, free, hidden]),)


def _past(build: GraphBuilder, name: str, extras: Sequence[str]) -> str:
    """Return the past, taken through a branch as merged exports do."""
    if "use_cache_branch" not in extras:
        return name
    from onnx import helper

    value = helper.make_tensor_value_info
    branches = []
    for label in ("then", "else"):
        made = f"{name}.{label}"
        node = helper.make_node("Identity", [name], [made])
        if label == "else":
            ends = [build.constant([0]), build.constant([0]), build.constant([2])]
            node = helper.make_node("Slice", [name, *ends], [made])
        output = value(made, build.float_type, ["batch", "heads", "past", "width"])
        branches.append(helper.make_graph([node], label, [], [output]))
    return build.add("If", ["use_cache_branch"], then_branch=branches[0], else_branch=branches[1])


def _heads(build: GraphBuilder, hidden: str) -> str:
    flat = build.add("MatMul", [hidden, build.matrix(WIDTH, WIDTH)])
    split = build.add("Reshape", [flat, build.constant([0, 0, HEADS, HEAD_DIM])])
    return build.add("Transpose", [split], perm=[0, 2, 1, 3])


def _plain_layer(
    build: GraphBuilder, hidden: str, index: int, shared: tuple[str, ...], extras: Sequence[str]
) -> str:
    query, key, value = (_heads(build, hidden) for _ in range(3))
    keys, values = (
        build.add(
            "Concat",
            [_past(build, f"past_key_values.{index}.{kind}", extras), new],
            axis=2,
            outputs=[f"present.{index}.{kind}"],
        )
        for kind, new in (("key", key), ("value", value))
    )
    turned = build.add("Transpose", [keys], perm=[0, 1, 3, 2])
    scores = build.add("Add", [build.add("MatMul", [query, turned]), shared[0]])
    mixed = build.add("MatMul", [build.add("Softmax", [scores], axis=-1), values])
    joined = build.add("Transpose", [mixed], perm=[0, 2, 1, 3])
    return build.add("Reshape", [joined, build.constant([0, 0, WIDTH])])


def _lengths(build: GraphBuilder) -> tuple[str, ...]:
    """Return each row's last index, the longest row's length, and the rotary tables."""
    from onnx import TensorProto

    sums = build.add("ReduceSum", ["attention_mask", build.constant([1])], keepdims=0)
    last = build.add("Sub", [sums, build.constant(1)])
    total = build.size("attention_mask", 1)
    angles = np.arange(POSITIONS)[:, None] / 100 ** (np.arange(HEAD_DIM // 2) / HEAD_DIM)
    return (
        build.add("Cast", [last], to=TensorProto.INT32),
        build.add("Cast", [total], to=TensorProto.INT32),
        build.constant(np.cos(angles), build.dtype),
        build.constant(np.sin(angles), build.dtype),
    )


def _grouped_layer(
    build: GraphBuilder, hidden: str, index: int, shared: tuple[str, ...], extras: Sequence[str]
) -> str:
    del extras
    query, key, value = (
        build.add("MatMul", [hidden, build.matrix(WIDTH, columns)])
        for columns in (WIDTH, HEAD_DIM, HEAD_DIM)
    )
    past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
    present = [f"present.{index}.{kind}" for kind in ("key", "value")]
    return build.add(
        "GroupQueryAttention",
        [query, key, value, *past, *shared],
        outputs=[f"mixed_{index}", *present],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=1,
        do_rotary=1,
    )


def encoder(output: str = "last_hidden_state", *, inputs: Sequence[str] = ()) -> Any:
    """Return an encoder of single tokens' vectors; `sentence_embedding` is their mean."""
    from onnx import helper

    build = GraphBuilder("float32")
    value = helper.make_tensor_value_info
    names = inputs or ("input_ids", "attention_mask")
    given = [value(name, build.integer_type, ["batch", "tokens"]) for name in names]
    table = build.matrix(VOCABULARY, WIDTH, "embed")
    if output == "sentence_embedding":
        hidden = build.add("Gather", [table, "input_ids"])
        seen = build.add("Cast", ["attention_mask"], to=build.float_type)
        column = build.add("Unsqueeze", [seen, build.constant([2])])
        axis = build.constant([1])
        kept = build.add("Mul", [hidden, column])
        total = build.add("ReduceSum", [kept, axis], keepdims=0)
        count = build.add("ReduceSum", [column, axis], keepdims=0)
        build.add("Div", [total, count], outputs=[output])
        shape: list[Any] = ["batch", WIDTH]
    else:
        build.add("Gather", [table, "input_ids"], outputs=[output])
        shape = ["batch", "tokens", WIDTH]
    return build.model(given, [value(output, build.float_type, shape)])


def write(folder: Path, model: Any, *, name: str = "model.onnx", external: bool = False) -> Path:
    """Write a model's file, its weights into one beside it if `external`."""
    import onnx

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=external,
        location=f"{name.rsplit('/', 1)[-1]}_data",
        size_threshold=0,
    )
    return path


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token for each of `VOCABULARY` words `t0`, `t1`, …"""
    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def write_folder(folder: Path, model: Any, *, config: Any = None, name: str = "model.onnx") -> Path:
    """Write a model with its descriptions; return the graph's path."""
    path = write(folder, model, name=name)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    write_tokenizer(folder)
    return path

"""benchmark.py: operations as computed by hand, and the paper's protocol."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from scaledown import ScaleDownConfig
from scaledown.benchmark.arguments import parse_arguments
from scaledown.benchmark.configurations import SHAPES, build_config, load_shape
from scaledown.benchmark.flops import count_compression, count_generation, count_rows
from scaledown.benchmark.run import main
from scaledown.benchmark.workload import Workload
from scaledown.common.tracing import build_on_meta

WIDTH, INNER, LAYERS, HEADS, GROUPS, VOCABULARY = 32, 48, 3, 4, 2, 100
HEAD = WIDTH // HEADS
KEYS_AND_VALUES = 2 * WIDTH * GROUPS * HEAD
LAYER = 2 * WIDTH * WIDTH + KEYS_AND_VALUES + 3 * WIDTH * INNER


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=512,
    )


def assert_attention(found: int, expected: int, length: int):
    """Some versions of transformers compute rotary angles as a product of positions and frequencies."""
    assert 0 <= found - expected <= HEAD * length


@pytest.mark.parametrize("new_tokens", [1, 2, 5])
def test_generation_of_a_tiny_shape_by_hand(new_tokens):
    with torch.device("meta"):
        generator = AutoModelForCausalLM.from_config(llama(), attn_implementation="sdpa").eval()
    prompt = 20
    found = count_generation(generator, prompt, new_tokens)
    read = prompt + new_tokens - 1
    assert found.weights == 2 * (LAYERS * LAYER * read + WIDTH * VOCABULARY * new_tokens)
    pairs = prompt * prompt + sum(prompt + step for step in range(1, new_tokens))
    assert_attention(found.attention, 2 * LAYERS * 2 * WIDTH * pairs, read)


def test_compression_of_a_tiny_shape_by_hand():
    model = (
        build_on_meta(
            ScaleDownConfig(
                generator_config=llama(),
                num_compressor_layers=2,
                num_memory_tokens=4,
                chunk_length=32,
                max_query_length=8,
            )
        )
        .to(torch.bfloat16)
        .eval()
    )
    workload = Workload(num_documents=3, document_length=32, compression_rate=8)
    length, read = 32 + 4 + 1, 4 + 1
    whole = count_compression(model, workload, whole=True)
    assert whole.weights == 2 * 3 * 2 * LAYER * length
    assert_attention(whole.attention, 2 * 3 * 2 * 2 * WIDTH * length * length, length)
    pruned = count_compression(model, workload)
    # The few positions' own keys and values are computed and not used.
    assert pruned.weights == 2 * 3 * (LAYER * length + LAYER * read + KEYS_AND_VALUES * length)
    assert_attention(pruned.attention, 2 * 3 * 2 * WIDTH * (length * length + read * length), length)


@pytest.mark.parametrize(
    ("generator", "least", "within"),
    [
        ("llama-3.2-1b", {"5": 2.5}, 0.06),
        pytest.param("mistral-7b", {"5": 3.3, "8": 2.6, "modernbert-base": 5}, 0.03, marks=pytest.mark.slow),
    ],
)
def test_the_papers_table_and_the_projects_targets(generator, least, within):
    rows = {row.compressor: row for row in count_rows(generator, [*least], Workload())}
    assert all(rows[name].ratio >= ratio for name, ratio in least.items())
    for row in rows.values():
        assert all(abs(deviation or 0) < within for deviation in row.deviations())
    # All of one layer but its keys and values is saved, of five.
    assert 0.17 < 1 - rows["5"].compression.total / rows["5"].whole_compression.total < 0.2


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_models(name):
    millions = {
        "mistral-7b": 7242,
        "mistral-24b": 23572,
        "llama-3.2-1b": 1236,
        "qwen2-7b": 7616,
        "qwen2.5-0.5b": 494,
        "modernbert-base": 149,
        "minilm-l6": 23,
        "modernbert-30m": 37,
        "xlm-roberta-large": 560,
        "mbert-base": 178,
        "bert-base": 109,
        "deberta-v3-base": 184,
        "deberta-v3-large": 434,
    }
    config = load_shape(name)
    with torch.device("meta"):
        causal = config.model_type in ("llama", "mistral", "qwen2")
        model = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions[name]


def test_a_compressor_is_told_by_its_name():
    assert build_config("qwen2.5-0.5b", "5").num_compressor_layers == 5
    assert build_config("qwen2.5-0.5b", "minilm-l6").compressor_type == "modernbert"
    assert build_config("mistral-7b", "llama-3.2-1b").compressor_type == "llm"


@pytest.mark.slow
def test_flops_are_written_as_json_and_table(tmp_path, capsys):
    folder = tmp_path / "flops"
    command = ["--generator", "qwen2.5-0.5b", "--compressors", "2,minilm-l6", "--output_dir", str(folder)]
    assert main([*command, "--num_documents", "3", "--new_tokens", "4"]) == 0
    table = capsys.readouterr().out
    assert table == (folder / "flops.md").read_text()
    assert "| qwen2.5-0.5b | 2 layers |" in table
    results = json.loads((folder / "flops.json").read_text())
    assert [row["compressor"] for row in results["results"]] == [None, "2", "minilm-l6"]
    assert (
        results["results"][0]["total"]
        == results["results"][0]["generation"]["weights"] + (results["results"][0]["generation"]["attention"])
    )
    assert results["settings"]["num_documents"] == 3
    assert main([*command]) == 2
    assert "already exists" in capsys.readouterr().err


SPEED = ["--mode", "speed", "--generator", "qwen2.5-0.5b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new_tokens", "0"], "new_tokens is 0, expected at least 1"),
        (["--query_length", "-1"], "query_length is -1"),
        (["--seed", "-1"], "seed is -1"),
        ([*SPEED, "--threads", "0"], "threads is 0, expected at least 1"),
        (["--mode", "speed"], "mode speed needs a generator"),
        ([*SPEED, "--sweep", "layers=1"], "sweep holds 'layers=1'"),
        ([*SPEED, "--sweep", "batch_size=0"], "sweep holds 'batch_size=0'"),
        ([*SPEED, "--compressors", ","], "expected at least one"),
        (["--compressors", "3"], "mode flops without a generator does not read compressors=3"),
        (["--batch_size", "8"], "does not read batch_size=8"),
        ([*SPEED, "--rivals", "true", "--mixed_lengths", "true"], "rivals are timed on documents of one length"),
        ([*SPEED, "--rivals", "true", "--compile", "true"], "not the models of rivals"),
        ([*SPEED, "--rivals", "true", "--prompt_length", "1"], "prompt_length is 1; pass at least 2"),
        ([*SPEED, "--output_dir", f"{__file__}/out"], "cannot be made in"),
        (["--mode", "train", "--generator", "x", "--sweep", "batch_size=4"], "mode train does not read sweep"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(options)


def test_an_unknown_shape_is_told(capsys):
    assert main(["--generator", "no-such-shape"]) == 2
    assert "none of the shapes known here" in capsys.readouterr().err


def test_a_sweep_changes_one_setting_at_a_time():
    arguments = parse_arguments([*SPEED, "--sweep", "batch_size=1,8", "num_documents=50"])
    found = [(workload.num_documents, batch) for workload, batch in arguments.settings]
    assert found == [(10, 1), (10, 8), (50, 1)]

"""Two-stage training: the cache holds what the frozen compressor gives, and everything behind it learns."""

import copy
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from combinations import combinations
from safetensors.torch import load
from tiny_training import rows, training_arguments

from folders import (
    TRAINING_SETTINGS,
    from_backbones,
    load_silently,
    outputs,
    save_backbones,
    save_generator,
    train_with_two_processes,
    write_rows,
)
from scaledown import ScaleDownModel
from scaledown.data.records import load_records
from scaledown.training import cache, compression
from scaledown.training.arguments import DataArguments, ModelArguments
from scaledown.training.build import build_model
from scaledown.training.cache import CachedDataset, CacheError, missing_shards, open_plan, parse_size
from scaledown.training.collators import GenerationCollator, JointCollator
from scaledown.training.compression import cache_fingerprint, compress_records
from scaledown.training.run import compress, run
from tiny import QUESTIONS
from tiny import build_model as build_tiny_model

KINDS = ("n_layers", "modernbert", "llm")
ORIGINS = ("backbones", "checkpoint")
FAST = [("n_layers", "checkpoint"), ("modernbert", "checkpoint"), ("llm", "backbones")]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records with and without scores, one without documents, in a file."""
    listed = rows(repeat=3)
    listed[4:4] = [{"query": "Who wrote Waverley?", "documents": [], "answer": "Scott"}]
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", listed)


def model_arguments(backbones, kind, **settings) -> ModelArguments:
    generator, compressor = backbones[kind]
    compressor = str(compressor) if compressor is not None else None
    names = {"generator_name_or_path": str(generator), "compressor_name_or_path": compressor, "compressor_type": kind}
    return ModelArguments(**{**TRAINING_SETTINGS, **names, **settings})


def data_arguments(data, **settings) -> DataArguments:
    return DataArguments(train_file=str(data), **{"max_shard_size": "2KB", "cache_dtype": "float32", **settings})


def checkpoint(backbones, kind, folder, **settings):
    """A model as joint training leaves it, with embeddings of its own."""
    torch.manual_seed(7)
    from_backbones(backbones[kind], **settings).save_pretrained(folder)
    return {"generator_name_or_path": None, "compressor_name_or_path": None, "model_name_or_path": str(folder)}


def cached(backbones, kind, data, folder, stage="generate", **settings):
    """Model of stage 2, and the cache that stage 1 wrote."""
    arguments = model_arguments(backbones, kind, **settings)
    args = training_arguments(folder, stage="compress")
    compress(arguments, data_arguments(data), args)
    args.stage = stage
    torch.manual_seed(0)
    model = build_model(arguments, args, with_backbone=False)
    records = load_records(data)
    index = json.loads((folder / "cache" / "train" / "index.json").read_text(encoding="utf-8"))
    plan = open_plan(folder / "cache" / "train", index["fingerprint"])
    return model, CachedDataset(folder / "cache" / "train", plan, records), records, (arguments, args)


# -- what is cached ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        *combinations(
            KINDS,
            ("span_mean", "memory_tokens"),
            fast=[("n_layers", "span_mean"), ("modernbert", "memory_tokens"), ("llm", "span_mean")],
        ),
        ("n_layers", "span_attention"),
    ],
)
def test_the_cache_gives_the_losses_of_the_whole_model(backbones, kind, pooling, data, tmp_path):
    settings = {}
    if pooling != "span_mean":  # which needs no checkpoint
        settings = checkpoint(backbones, kind, tmp_path / "trained", slot_pooling=pooling)
    model, dataset, records, (arguments, args) = cached(backbones, kind, data, tmp_path, **settings)
    assert model.compressor.backbone is None
    assert len(dataset.plan.shards) > 2
    whole = build_model(arguments, args)
    assert whole.config.slot_pooling == pooling
    whole.load_state_dict(model.state_dict(), strict=False)
    listed = list(range(len(records)))
    listed = [*listed[5:], *listed[:5]]  # in another order than the cache's
    with torch.no_grad():
        behind = model.eval()(**GenerationCollator(model.processor)([dataset[i] for i in listed]))
        through = whole.eval()(**JointCollator(whole.processor)([records[i] for i in listed]))
    torch.testing.assert_close(behind.generation_loss, through.generation_loss)
    torch.testing.assert_close(behind.reranking_loss, through.reranking_loss)
    torch.testing.assert_close(behind.memory_embeddings, through.memory_embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_span_means_are_means_of_the_backbones_own_states(kind):
    model = build_tiny_model(kind, slot_pooling="span_mean")
    assert model.compressor.memory_embeddings is None and model.compressor.rerank_embedding is None
    batch = model.processor(QUESTIONS[:1], [["Ivanhoe is a novel by Walter Scott of 1819."]])
    memory, mask, rerank = model.compressor.hidden_states(
        batch["compressor_input_ids"],
        batch["compressor_attention_mask"],
        batch["chunk_slots"],
        batch["compressor_document_mask"],
    )
    states = model.compressor.backbone(input_ids=batch["compressor_input_ids"]).last_hidden_state[0]
    own = states[batch["compressor_document_mask"][0]]
    slots = int(batch["chunk_slots"][0])
    assert slots > 1
    spans = [[] for _ in range(slots)]
    for i, state in enumerate(own):
        spans[i * slots // len(own)].append(state)
    expected = torch.stack([torch.stack(span).mean(dim=0) for span in spans])
    torch.testing.assert_close(memory[0], expected)
    torch.testing.assert_close(rerank[0], states[0 if kind == "modernbert" else -1])
    assert mask.all()


@pytest.mark.parametrize("kind", KINDS)
def test_span_means_do_not_depend_on_the_batch(kind):
    model = build_tiny_model(kind, slot_pooling="span_mean")
    documents = [["A heron is a bird."], ["The Loire rises in the Cévennes. " * 9, "Storks."], ["Cranes lift."]]
    whole = model.compress(QUESTIONS, documents)
    alone = [model.compress(q, d) for q, d in zip(QUESTIONS, documents, strict=True)]
    for name in ("memory_embeddings", "reranking_scores"):
        parts = [getattr(part, name) for part in alone]
        if name == "memory_embeddings":
            parts = [torch.nn.functional.pad(p, (0, 0, 0, whole[name].shape[1] - p.shape[1])) for p in parts]
        torch.testing.assert_close(whole[name], torch.cat(parts), rtol=1e-4, atol=1e-5)
    assert model.answer(QUESTIONS[0], documents[0], max_new_tokens=3, do_sample=False) is not None
    with pytest.raises(ValueError, match="compressor_document_mask"):
        batch = model.processor(QUESTIONS, documents)
        model.get_memory_embeddings(batch["compressor_input_ids"], batch["compressor_attention_mask"])


# -- what is learned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "origin"), combinations(KINDS, ORIGINS, fast=FAST))
def test_two_stages_give_one_ordinary_model_that_learned_all_behind_the_cache(backbones, kind, origin, data, tmp_path):
    settings = checkpoint(backbones, kind, tmp_path / "trained") if origin == "checkpoint" else {}
    arguments = model_arguments(backbones, kind, merge_lora=False, **settings)
    args = training_arguments(tmp_path / "out", two_stage=True, save_strategy="steps", save_steps=2, weight_decay=0.0)
    args.warmup_steps = 0
    torch.manual_seed(args.seed)
    args.stage = "generate"
    before = build_model(arguments, args).state_dict()
    run(arguments, data_arguments(data, eval_file=str(data)), args)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        model = load_silently(folder)
        after = model.state_dict()
        assert after.keys() == before.keys()
        for name, value in after.items():
            learns = "lora_" in name or name.startswith(("compressor.projector.", "compressor.reranking_head."))
            if not learns:
                assert torch.equal(value, before[name]), name
            elif "lora_A" not in name and origin == "checkpoint":  # what is new is drawn anew each time
                assert not torch.equal(value, before[name]), name
        assert torch.isfinite(outputs(model)["logits"]).all()


def test_stage_2_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(backbones, data, tmp_path):
    arguments = model_arguments(backbones, "modernbert", merge_lora=False)
    settings = {"two_stage": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run(arguments, data_arguments(data), training_arguments(tmp_path / "whole", **settings))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    run(arguments, data_arguments(data), training_arguments(tmp_path / "stopped", **settings))
    expected = load_silently(tmp_path / "whole").state_dict()
    for name, value in load_silently(tmp_path / "stopped").state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_each_stage_holds_its_own_side_only(backbones, data, tmp_path, monkeypatch):
    loaded = []
    original = ScaleDownModel.from_backbones.__func__

    def spy(cls, *args, **kwargs):
        loaded.append((kwargs["with_generator"], kwargs["with_backbone"]))
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(ScaleDownModel, "from_backbones", classmethod(spy))
    run(model_arguments(backbones, "llm"), data_arguments(data), training_arguments(tmp_path, two_stage=True))
    # Settings alone, compressor alone, generator alone, and the backbone again, to be saved.
    assert loaded == [(False, False), (True, False)[::-1], (True, False), (False, True)]


def test_a_second_run_over_the_same_data_compresses_nothing(backbones, data, tmp_path, monkeypatch):
    arguments, settings = model_arguments(backbones, "n_layers"), {"cache_dir": str(tmp_path / "cache")}
    run(arguments, data_arguments(data, **settings), training_arguments(tmp_path / "a", two_stage=True))
    monkeypatch.setattr(compression, "_compress", None)
    run(arguments, data_arguments(data, **settings), training_arguments(tmp_path / "b", two_stage=True))


def test_memory_embeddings_that_never_learned_are_refused(backbones, data, tmp_path):
    arguments = model_arguments(backbones, "n_layers", slot_pooling="memory_tokens")
    with pytest.raises(ValueError, match="memory or reranking embeddings"):
        run(arguments, data_arguments(data), training_arguments(tmp_path, two_stage=True))


def test_stage_2_without_a_cache_says_how_to_make_one(backbones, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage compress"):
        run(
            model_arguments(backbones, "n_layers"), data_arguments(data), training_arguments(tmp_path, stage="generate")
        )


# -- the cache as a thing on disk --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(backbones, data, tmp_path_factory):
    """A cache of the records, to be copied."""
    folder = tmp_path_factory.mktemp("written")
    settings = {"cache_dir": str(folder / "cache")}
    args = training_arguments(folder, stage="compress")
    compress(model_arguments(backbones, "n_layers"), data_arguments(data, **settings), args)
    return folder / "cache"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_missing_is_made_again_and_nothing_else(backbones, data, tmp_path, monkeypatch):
    arguments, args = model_arguments(backbones, "modernbert"), training_arguments(tmp_path, stage="compress")
    compress(arguments, data_arguments(data), args)
    folder = tmp_path / "cache" / "train"
    expected = contents(folder)
    (folder / "shard-00001.safetensors").unlink()
    whole = folder / "shard-00002.safetensors"
    whole.write_bytes(whole.read_bytes()[:-8])  # as after a copy that was cut short
    written = []
    original = compression.write_shard
    monkeypatch.setattr(compression, "write_shard", lambda *args: (written.append(args[2].file), original(*args)))
    compress(arguments, data_arguments(data), args)
    assert written == ["shard-00001.safetensors", "shard-00002.safetensors"]
    assert contents(folder) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"compression_rate": 16}, "compression_rate was 8 and is 16"),
        ({"enable_reranking": False}, "enable_reranking was true and is false"),
        ({"generator_name_or_path": "other"}, "weights was"),
        ({"cache_dtype": "bfloat16"}, 'dtype was "float32" and is "bfloat16"'),
        ({"train_file": "changed"}, "data was"),
        ({"max_train_examples": 3}, "records was 10 and is 3"),
    ],
)
def test_a_cache_for_something_else_is_refused_by_either_stage(backbones, data, written, tmp_path, change, message):
    settings = {"cache_dir": str(shutil.copytree(written, tmp_path / "cache"))}
    if change.get("train_file"):
        path = tmp_path / "changed.jsonl"
        path.write_text(data.read_text(encoding="utf-8").replace("Rob Roy", "x").replace("1819", "1820"), "utf-8")
        change = {"train_file": str(path)}
    if change.get("generator_name_or_path"):
        change = {"generator_name_or_path": str(save_generator(tmp_path / "other", seed=99))}
    names = DataArguments.__dataclass_fields__
    data_change = {name: value for name, value in change.items() if name in names}
    model_change = {name: value for name, value in change.items() if name not in names}
    changed = DataArguments(
        **{"train_file": str(data), "max_shard_size": "2KB", "cache_dtype": "float32", **settings, **data_change}
    )
    for stage in ("compress", "generate"):
        with pytest.raises(CacheError, match=message):
            run(
                model_arguments(backbones, "n_layers", **model_change),
                changed,
                training_arguments(tmp_path / "out2", stage=stage),
            )


def test_other_answers_and_scores_leave_the_cache_valid(backbones, data, written, tmp_path):
    path = tmp_path / "answers.jsonl"
    listed = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({**row, "answer": "another"}) + "\n" for row in listed), encoding="utf-8")
    settings = {"cache_dir": str(shutil.copytree(written, tmp_path / "cache"))}
    run(
        model_arguments(backbones, "n_layers"),
        data_arguments(path, **settings),
        training_arguments(tmp_path / "out", stage="generate"),
    )


def test_a_partial_cache_is_not_learned_from(backbones, data, tmp_path):
    _, dataset, _, (arguments, args) = cached(backbones, "n_layers", data, tmp_path)
    (dataset.folder / dataset.plan.shards[1].file).unlink()
    assert [shard.file for shard in missing_shards(dataset.folder, dataset.plan)] == ["shard-00001.safetensors"]
    with pytest.raises(CacheError, match=r"lacks 1 of \d+ shards .*shard-00001"):
        run(arguments, data_arguments(data), args)


def test_a_damaged_index_is_told_apart(backbones, data, tmp_path):
    _, dataset, _, (arguments, args) = cached(backbones, "n_layers", data, tmp_path)
    (dataset.folder / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(CacheError, match=r"index\.json is damaged"):
        run(arguments, data_arguments(data), args)


def test_a_disk_too_small_is_told_before_anything_is_computed(backbones, data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(compression, "_compress", None)
    with pytest.raises(CacheError, match=r"needs \d+\.\d KB, but .* has 1\.0 KB free"):
        compress(
            model_arguments(backbones, "n_layers"), data_arguments(data), training_arguments(tmp_path, stage="compress")
        )


def test_a_disk_that_fills_up_leaves_whole_shards_only(backbones, data, tmp_path, monkeypatch):
    original, calls = cache.save_file, []

    def save_file(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    arguments, args = model_arguments(backbones, "n_layers"), training_arguments(tmp_path, stage="compress")
    monkeypatch.setattr(cache, "save_file", save_file)
    with pytest.raises(CacheError, match=r"No space left on device.*run the same command again"):
        compress(arguments, data_arguments(data), args)
    names = sorted(path.name for path in (tmp_path / "cache" / "train").iterdir())
    assert names == ["index.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    monkeypatch.undo()
    compress(arguments, data_arguments(data), args)


@pytest.mark.parametrize("size, expected", [("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), (4096, 4096)])
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["many", "-1MB", "0", "MB"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="expected a size such as 500MB"):
        parse_size(size)


def test_bytes_are_announced_as_they_come_out(backbones, data, tmp_path):
    _, dataset, _, _ = cached(backbones, "n_layers", data, tmp_path)
    for shard in dataset.plan.shards:
        size = (dataset.folder / shard.file).stat().st_size
        assert 0 < size - dataset.plan.num_bytes(shard) < 1000  # the header
        assert dataset.plan.num_bytes(shard) <= 2000 or shard.end - shard.start == 1


@pytest.mark.parametrize("num_processes", [1, 3])
def test_processes_share_the_work(backbones, data, tmp_path, num_processes):
    expected = cached(backbones, "llm", data, tmp_path / "one")[1].folder
    arguments, args = model_arguments(backbones, "llm"), training_arguments(tmp_path, stage="compress")
    model = build_model(arguments, args, with_generator=False)
    records = load_records(data)
    index = json.loads((expected / "index.json").read_text(encoding="utf-8"))
    fingerprint = cache_fingerprint(
        records, model.processor, model.config, index["fingerprint"]["weights"], index["fingerprint"]["dtype"]
    )
    assert fingerprint == index["fingerprint"]
    for name, value in {"compressor_max_length": 48, "keep_final_norm": False}.items():
        other = copy.deepcopy(model.config)
        setattr(other, name, value)
        where = index["fingerprint"]["weights"], index["fingerprint"]["dtype"]
        assert cache_fingerprint(records, model.processor, other, *where) == {**fingerprint, name: value}
    barrier = threading.Barrier(num_processes)

    def process(index):
        return compress_records(
            lambda: model,
            model.processor,
            model.config,
            records,
            tmp_path / "shared",
            fingerprint,
            "2KB",
            batch_size=3,
            process_index=index,
            num_processes=num_processes,
            wait_for_everyone=barrier.wait,
        )

    with ThreadPoolExecutor(num_processes) as pool:
        list(pool.map(process, range(num_processes)))
    files = contents(tmp_path / "shared")
    assert files.keys() == contents(expected).keys()
    for name in files:
        if name.endswith(".safetensors"):
            one, shared = load(contents(expected)[name]), load(files[name])
            for key, value in one.items():
                torch.testing.assert_close(shared[key], value, rtol=1e-4, atol=1e-5)


def test_workers_read_the_cache(backbones, data, tmp_path):
    settings = {"two_stage": True, "dataloader_num_workers": 2}
    run(model_arguments(backbones, "n_layers"), data_arguments(data), training_arguments(tmp_path, **settings))


@pytest.mark.slow
def test_two_processes_run_both_stages(backbones, data, tmp_path):
    generator, _ = backbones["n_layers"]
    arguments = {
        **TRAINING_SETTINGS,
        "generator_name_or_path": generator,
        "train_file": data,
        "max_shard_size": "2KB",
        "two_stage": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": tmp_path / "out",
    }
    train_with_two_processes(arguments, tmp_path)
    load_silently(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "model_settings", "error", "message"),
    [
        ({"eval_strategy": "steps", "eval_steps": 1}, {}, ValueError, "set eval_file"),
        ({"resume_from_checkpoint": "nothere"}, {}, FileNotFoundError, "nothere is not a folder"),
        ({}, {"lora_target_modules": "no_such_layer"}, ValueError, "no_such_layer"),
        ({}, {"lora_name_or_path": "nothere"}, ValueError, "nothere holds no adapter_config.json"),
        ({"finished": True}, {}, FileExistsError, "holds a finished model"),
    ],
)
def test_what_stops_the_second_stage_is_found_before_the_first(
    backbones, data, tmp_path, monkeypatch, settings, model_settings, error, message
):
    monkeypatch.setattr("scaledown.training.run.compress_records", lambda *args, **kwargs: pytest.fail("compressed"))
    if settings.pop("finished", False):
        (tmp_path / "all_results.json").write_text("{}")
    args = training_arguments(tmp_path, two_stage=True, **settings)
    with pytest.raises(error, match=message):
        run(model_arguments(backbones, "llm", **model_settings), data_arguments(data), args)

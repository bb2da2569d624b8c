"""Reference log-probabilities: what is computed, in which batches, and what is found again on the disk."""

import json
import logging
import os
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from memory import peak_bytes
from ranks import PASSED, run_on_ranks
from safetensors.torch import save_file
from test_pieces import documents, sums_by_hand
from test_training import CPU, config, examples  # noqa: F401, the fixture

from simnpo.attached_model import attach
from simnpo.config import UnlearnConfig
from simnpo.data import IGNORE_INDEX, Example
from simnpo.model import add_lora
from simnpo.pieces import pieces, split
from simnpo.training import disk, forward, reference, reference_cache
from simnpo.training.forward import Collator, token_batches
from simnpo.training.loop import unlearn
from simnpo.training.reference import reference_logps, with_reference
from simnpo.training.reference_cache import (
    cache_folder,
    cache_key,
    model_digest,
    read_references,
    weights_digest,
    write_references,
)

COLLATOR = Collator(True, 256, CPU, None)


@pytest.fixture
def settings(config, tmp_path):  # noqa: F811
    """Makes a configuration of NPO with a cache of its own."""

    def make(**changes: object) -> UnlearnConfig:
        made = config(**{"method": "npo", "reference_cache": str(tmp_path / "cache")} | changes)
        made.output_dir().mkdir(exist_ok=True)
        return made

    return make


def counted(model):
    """The attached model, and a list that grows with every forward of its body."""
    calls = []
    attach(model).get_decoder().register_forward_pre_hook(lambda *args: calls.append(None))
    return model, calls


def forget_examples():
    return [*examples("f", tuple(range(1, 12))), *documents()]


def references(settings, model, *, collator=COLLATOR, forget=None) -> dict:
    forget = forget_examples() if forget is None else forget
    found = with_reference(settings, Accelerator(cpu=True), model, model_digest(model), collator, forget, reload=False)
    return found.ref_token_logps or found.ref_logps


# What is computed


@pytest.mark.parametrize("packed", [True, False])
def test_references_are_sums_over_the_pieces_by_hand(settings, packed):
    forget, model = forget_examples(), attach(make_model())
    collator = COLLATOR._replace(packed=packed)
    sums = references(settings(), model, collator=collator)
    tokens = references(settings(method="tnpo"), model, collator=collator)
    for example in forget:
        with torch.no_grad():
            expected = sum(sums_by_hand(model, example)).item()
        assert sums[example.id] == pytest.approx(expected, rel=1e-5)
        # one for each token of the document, on the position that predicts it
        ours = tokens[example.id]
        assert sum(ours) == pytest.approx(expected, rel=1e-5)
        assert [logp != 0 for logp in ours] == [label != IGNORE_INDEX for label in [*example.labels[1:], IGNORE_INDEX]]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 100), st.booleans())
def test_batches_keep_to_the_tokens_and_lose_nothing(lengths, max_tokens, packed):
    batches = token_batches(lengths, max_tokens, packed=packed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[i] for i in batch]
        assert (sum(own) if packed else max(own) * len(own)) <= max_tokens or len(batch) == 1
    assert [max(lengths[i] for i in batch) for batch in batches] == sorted(
        (max(lengths[i] for i in batch) for batch in batches), reverse=True
    )


def test_no_forward_is_longer_than_the_budget_or_the_longest_piece(settings, monkeypatch):
    monkeypatch.setattr(forward, "MAX_TOKENS", 40)
    seen, model = [], attach(make_model())
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"].shape[1], torch.is_grad_enabled())),
        with_kwargs=True,
    )
    forget = forget_examples()
    assert max(len(example.input_ids) for example in forget) > 80
    references(settings(), model)
    assert len(seen) > 10
    longest = max(len(piece.input_ids) for example in forget for piece in pieces(example))
    assert all(size <= max(40, longest) and not gradient for size, gradient in seen)


def test_memory_does_not_grow_with_the_document(settings, monkeypatch):
    monkeypatch.setattr(forward, "MAX_TOKENS", 64)
    model = attach(make_model())

    def peak(num_tokens: int) -> int:
        ids = [(31 * i) % 250 for i in range(num_tokens)]
        long = split(Example("d:1", "", "x", ids, ids), 48, 32)
        one = Accelerator(cpu=True)
        return peak_bytes(lambda: reference_logps(settings(), one, model, COLLATOR, [long], per_token=False))

    # beside the tensors of a forward there is one number a piece
    assert peak(1600) < 1.02 * peak(400)


def test_progress_in_lines_where_there_is_no_terminal(settings, monkeypatch, capsys):
    monkeypatch.setattr(reference, "PLAIN_SECONDS", 0.0)
    references(settings(), attach(make_model()))
    assert "reference log-probabilities: 19/19 sequences" in capsys.readouterr().err


# What is found again


@pytest.mark.parametrize("method", ["npo", "tnpo", "dpo"])
def test_the_second_run_has_the_same_bits_without_a_forward(settings, tmp_path, method, capsys):
    forget = forget_examples()
    if method == "dpo":
        forget = [replace(e, alternate=o) for e, o in zip(forget, examples("a", tuple(range(2, 16))), strict=True)]
    uncached = settings(method=method, reference_cache=str(tmp_path / "another"))
    plain = references(uncached, attach(make_model()), forget=forget)
    first, calls = counted(make_model())
    assert references(settings(method=method), first, forget=forget) == plain
    assert calls
    second, calls = counted(make_model())
    renamed = [replace(example, id=f"other {example.id}") for example in forget]
    assert list(references(settings(method=method), second, forget=renamed).values()) == list(plain.values())
    assert not calls
    assert "reference log-probabilities: from" in capsys.readouterr().err
    [file] = (tmp_path / "cache").iterdir()
    assert file.suffix == ".safetensors"


def test_anything_that_changes_the_numbers_misses(settings):
    forget, base = forget_examples(), make_model()
    base = attach(base)
    keys = [cache_key(settings(), base, model_digest(base), COLLATOR, forget, per_token=False)]

    def add(model=base, collator=COLLATOR, some=forget, *, per_token=False, **changes):
        model = attach(model)
        keys.append(cache_key(settings(**changes), model, model_digest(model), collator, some, per_token=per_token))

    add(precision="bf16")
    add(per_token=True)
    add(collator=COLLATOR._replace(packed=False))
    add(make_model(attn_implementation="eager"))
    add(make_model(rms_norm_eps=1e-3))
    add(base.to(torch.bfloat16))
    changed = make_model()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[-1, -1] += 1e-3
    add(changed)
    add(add_lora(attach(make_model()), 4, 8.0))
    add(make_model(), some=forget[1:])
    add(make_model(), some=[replace(forget[0], labels=[IGNORE_INDEX, *forget[0].labels[1:-1], IGNORE_INDEX])])
    add(make_model(), some=[replace(forget[0], alternate=forget[1])])
    add(make_model(), some=pieces(forget[-1]))
    assert len(set(keys)) == len(keys)
    base = attach(make_model())
    again = cache_key(settings(chunk_tokens=7, seed=3), base, model_digest(base), COLLATOR, forget, per_token=False)
    assert again == keys[0]


def test_digest_is_of_names_shapes_and_contents():
    def digest(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor, persistent=name != "unsaved")
        return weights_digest(module)

    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    modules = [
        {"a": a}, {"b": a}, {"a": b}, {"a": a, "b": a}, {"a": a, "b": b}, {"a": b, "b": a}, {"unsaved": b},
        {"a": a.view(2, 3)}, {"a": a.view(2, 3).T}, {"a": a.to(torch.bfloat16)}, {"a": a[0]}, {"a": a[:0]},
    ]  # fmt: skip
    different = [digest(**tensors) for tensors in modules]
    assert len(set(different)) == len(different)
    assert digest(a=a.view(2, 3).T) == digest(a=a.view(2, 3).T.contiguous())


def test_a_weight_of_many_blocks_is_read_whole(monkeypatch):
    model = make_model()
    whole = weights_digest(model)
    monkeypatch.setattr(reference_cache, "BLOCK", 7)
    assert weights_digest(model) == whole


def damage(path):
    """Files that are not what was written, each with what the warning says of it."""
    data = path.read_bytes()
    yield data[:-3], "cannot be used"
    at = 8 + int.from_bytes(data[:8], "little") + 3  # within the numbers, which come first after the header
    yield data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "damaged"
    yield b"", "cannot be used"
    yield b"{}", "cannot be used"
    save_file({"logps": torch.zeros(2)}, path)
    yield path.read_bytes(), "it holds ['logps'], which are not this run's"
    write_references(path, [-1.0, -2.0], per_token=False)
    yield path.read_bytes(), "not the 14 expected"
    write_references(path.with_name("other.safetensors"), [-1.0] * 14, per_token=False)
    yield path.with_name("other.safetensors").read_bytes(), "which are not this run's"


def test_a_damaged_or_foreign_file_is_reported_and_computed_again(settings, tmp_path, caplog):
    plain = references(settings(), attach(make_model()))
    [file] = (tmp_path / "cache").iterdir()
    sound = file.read_bytes()
    for data, message in damage(file):
        file.write_bytes(data)
        caplog.clear()
        model, calls = counted(make_model())
        assert references(settings(), model) == plain
        assert calls
        assert message in caplog.text
        assert file.read_bytes() == sound


def test_a_folder_that_cannot_be_written_is_a_warning(settings, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        caplog.clear()
        assert len(references(settings(reference_cache=str(folder)), attach(make_model()))) == 14
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert "are not kept for other runs" in record.message


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path, caplog):
    path, size = tmp_path / "key.safetensors", 20_000
    write_references(path, [0.0] * size, per_token=False)

    def write(value: float) -> None:
        for _ in range(20):
            write_references(path, [value] * size, per_token=False)

    writers = [threading.Thread(target=write, args=(float(i),)) for i in (1, 2, 3)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        values = read_references(path, None, size)
        assert values is not None
        assert values == [values[0]] * size
        seen.add(values[0])
    for writer in writers:
        writer.join()
    assert len(seen) > 1
    assert not caplog.records
    assert [file.name for file in tmp_path.iterdir()] == ["key.safetensors"]


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path):
    old, fresh = (tmp_path / f"{disk.TEMPORARY}{name}" for name in ("old", "fresh"))
    for leftover in (old, fresh):
        leftover.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    write_references(tmp_path / "key.safetensors", [-1.0], per_token=False)
    assert (old.exists(), fresh.exists()) == (False, True)


def test_where_the_cache_is(settings, monkeypatch, tmp_path):
    assert cache_folder(settings()) == tmp_path / "cache"
    default = settings(reference_cache=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(default) == tmp_path / "xdg/simnpo/references"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(default) == tmp_path / ".cache/simnpo/references"


# Whole runs


def test_runs_share_references_and_end_with_the_same_bits(settings, monkeypatch, tmp_path):
    outputs = []
    for name, cache in (("one", "cache"), ("two", "cache"), ("three", "other")):
        if name == "two":
            monkeypatch.delattr(reference, "reference_logps")
        options = {"output": str(tmp_path / name), "reference_cache": str(tmp_path / cache)}
        outputs.append(unlearn(settings(max_steps=2, **options)))
        monkeypatch.undo()
    for name in ("reference.json", "model/model.safetensors"):
        assert len({(output / name).read_bytes() for output in outputs}) == 1


def test_a_run_goes_on_without_the_cache(settings, tmp_path):
    whole = settings(max_steps=2)
    references(whole, attach(make_model()))
    kept = (whole.output_dir() / "reference.json").read_text()
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    model, calls = counted(make_model())
    collator = with_reference(whole, Accelerator(cpu=True), model, "any", COLLATOR, forget_examples(), reload=True)
    assert collator.ref_logps == json.loads(kept)
    assert not calls


def test_methods_without_a_reference_read_no_weights(settings, monkeypatch):
    monkeypatch.delattr(reference, "cache_key")
    assert references(settings(method="simnpo"), attach(make_model())) is None


def check_ranks_share_the_work():
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    accelerator, folder = Accelerator(cpu=True), os.environ["REFERENCE_FOLDER"]
    options = {"model": "m", "forget": "f", "precision": "fp32", "reference_cache": f"{folder}/cache"}
    forward.MAX_TOKENS = 40
    forget, found, forwards = forget_examples(), [], []
    for name in ("first", "second"):
        settings = UnlearnConfig(**options, method="npo", output=f"{folder}/{name}")
        settings.output_dir().mkdir(exist_ok=True)
        model, calls = counted(make_model())
        found.append(
            with_reference(settings, accelerator, model, model_digest(model), COLLATOR, forget, reload=False).ref_logps
        )
        forwards.append(len(calls))
    assert forwards[0] > 3
    assert forwards[1] == 0
    assert found[0] == found[1] == json.loads(os.environ["REFERENCE_ALONE"])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def one_thread():
    """As every rank has: sums in another order round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_ranks_share_the_work_and_get_the_same_bits(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(forward, "MAX_TOKENS", 40)
    forget, accelerator = forget_examples(), Accelerator(cpu=True)
    alone = reference_logps(settings(), accelerator, attach(make_model()), COLLATOR, forget, per_token=False)
    monkeypatch.setenv("REFERENCE_ALONE", json.dumps(dict(zip([e.id for e in forget], alone))))
    monkeypatch.setenv("REFERENCE_FOLDER", str(tmp_path))
    assert run_on_ranks(2, [check_ranks_share_the_work], tmp_path) == {"check_ranks_share_the_work": PASSED}

"""shards.py: what is written equals what training makes from the text itself, whoever writes it;
what is missing or damaged is named; the order of many windows is a permutation, entry by entry."""
import inspect
import json
import math
import re
import subprocess
import sys
import time
import tracemalloc
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TOKENIZER
from tiny_runs import prepared

import corpus
import data
import evaluate
import readers
import shards
import train_denoise
import train_pretrain
from plumbing.options import build
from tokenizer import SPECIAL_TOKENS, Tokenizer
from world.world import World

ROOT = Path(__file__).resolve().parents[1]


def write_corpus(path, n=300, longer=1):
    """n documents of very different lengths as JSONL; every tenth or so is held out."""
    rng = np.random.default_rng(0)
    words = "the bear ate red berries wärmt Öl and slept".split()
    rows = [" ".join(rng.choice(words, longer * rng.integers(1, 60))) + f" {i}." for i in range(n)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def written(tmp_path, **options):
    """The folder and the index of a small corpus in shards of 1,000 tokens."""
    source = options.pop("data", None) or write_corpus(tmp_path / "rows.jsonl")
    cfg = shards.Config(**{"data": source, "out": str(tmp_path / "shards"), "tokenizer": "bytes",
                           "workers": 1, "shard_tokens": 1000} | options)
    return Path(cfg.out), shards.main(cfg)


# ---------------------------------------------------------------------- writing

def test_the_ids_are_those_of_the_documents_of_each_split(tmp_path):
    folder, index = written(tmp_path)
    assert index["dtype"] == "uint16" and index["vocab_size"] == TOKENIZER.vocab_size
    assert json.loads((folder / "index.json").read_text()) == index
    for split in ("train", "heldout"):
        documents = list(readers.read_documents(index["source"], split=split))
        expected = data.tokenize_documents(documents, TOKENIZER)
        files = sorted(folder.glob(f"{split}_*.bin"))
        assert len(files) == math.ceil(len(expected) / 1000) > 1
        assert {file.stat().st_size for file in files[:-1]} == {2000}
        raw = b"".join(file.read_bytes() for file in files)
        assert np.array_equal(np.frombuffer(raw, "<u2"), expected)
        entry = index["splits"][split]
        assert entry["tokens"] == len(expected) and entry["documents"] == len(documents)
        assert entry["bytes"] == sum(len(text.encode()) for text in documents)
    assert shards.verify(folder) == index


def test_the_number_of_workers_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 500)                       # many chunks for each worker
    source = write_corpus(tmp_path / "rows.jsonl")
    for workers in (1, 2):
        written(tmp_path, data=source, workers=workers, out=str(tmp_path / f"by{workers}"),
                tokenizer="bpe", vocab_size=300)
    files = sorted(file.name for file in (tmp_path / "by1").iterdir())
    assert len(files) > 8
    assert sorted(file.name for file in (tmp_path / "by2").iterdir()) == files
    for name in files:
        assert (tmp_path / "by2" / name).read_bytes() == (tmp_path / "by1" / name).read_bytes()


def test_chunks_hold_all_documents_in_order_and_are_bounded(monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 100)
    documents = [str(i) * (1 + i % 7) for i in range(1000)] + ["x" * 1000, "end"]
    chunks = list(shards.chunked(iter(documents)))
    assert [text for chunk in chunks for text in chunk] == documents
    assert all(sum(map(len, chunk[:-1])) < 100 for chunk in chunks)


def test_no_more_chunks_are_read_ahead_than_are_under_way(monkeypatch):
    class Pool:
        def submit(self, work, folder, chunk):
            return type("Done", (), {"result": lambda self: chunk})()

    read = []
    chunks = (read.append(i) or [i] for i in range(50))
    for done, result in enumerate(shards.in_order(Pool(), "", chunks, ahead=4)):
        assert result == [done] and len(read) - done <= 4
    assert done == 49


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    letters = [bytes([a, b]) for a in range(256) for b in range(256)]
    ranks = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + letters)}
    Tokenizer(ranks).save(tmp_path / "large")
    folder, index = written(tmp_path, tokenizer=str(tmp_path / "large"))
    assert index["dtype"] == "uint32"
    tokens, tokenizer = shards.open_tokens(folder, "train"), Tokenizer.load(folder)
    assert tokens.dtype == np.uint32
    text = next(readers.read_documents(index["source"], split="train"))
    ids = [*tokenizer.encode(text), tokenizer.endoftext]
    assert tokens[:len(ids)].tolist() == ids and max(ids) > 65536


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 20_000)
    peaks, sizes = [], []
    for n in (100, 800):
        source = write_corpus(tmp_path / f"{n}.jsonl", n, longer=10)
        tracemalloc.start()
        _, index = written(tmp_path, data=source, out=str(tmp_path / str(n)), shard_tokens=10**9)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(index["splits"]["train"]["bytes"])
    assert sizes[1] > 7 * sizes[0] > 700_000
    digests = 150 * 800                # each document's, to find duplicates by, in Python's set
    assert peaks[1] < 1.2 * peaks[0] + 100_000 + digests < sizes[1]


def test_a_world_is_cut_off_and_a_file_read_whole(tmp_path):
    _, index = written(tmp_path, data="world", max_bytes=30_000)
    assert 30_000 <= index["splits"]["train"]["bytes"] < 32_000
    assert 1_500 <= index["splits"]["heldout"]["bytes"] < 3_500
    (tmp_path / "text.txt").write_text("0123456789" * 100)
    _, index = written(tmp_path, data=str(tmp_path / "text.txt"), out=str(tmp_path / "of_text"))
    assert [index["splits"][split]["bytes"] for split in ("train", "heldout")] == [900, 100]


# ---------------------------------------------------------------------- interrupted, in the way

def test_an_interrupted_run_does_not_look_complete_and_can_be_started_again(tmp_path, monkeypatch):
    def power_cut(file):
        if (folder / "train_00007.bin.tmp").exists():
            raise KeyboardInterrupt

    folder = tmp_path / "shards"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards.os, "fsync", power_cut)
        written(tmp_path)
    assert (folder / "train_00007.bin.tmp").exists() and not (folder / "index.json").exists()
    with pytest.raises(ValueError, match="no index.json, so these shards are not complete"):
        shards.open_tokens(folder, "train")
    with pytest.raises(ValueError, match="no index.json, so these shards are not complete"):
        prepared(train_pretrain.Config(data=str(folder), tokenizer="bytes"))
    _, index = written(tmp_path)
    assert shards.verify(folder) == index and not list(folder.glob("*.tmp"))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_killed_run_leaves_neither_processes_nor_what_looks_complete(tmp_path):
    source, folder = write_corpus(tmp_path / "rows.jsonl", 2000), tmp_path / "shards"
    (tmp_path / "many.jsonl").write_text(Path(source).read_text() * 100)        # ten seconds
    run = subprocess.Popen([sys.executable, "shards.py", "--data", str(tmp_path / "many.jsonl"),
                            "--tokenizer", "bytes", "--out", str(folder), "--workers", "2",
                            "--shard_tokens", "10000"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: list(folder.glob("heldout_*.bin")))
        children = [child for task in Path(f"/proc/{run.pid}/task").iterdir()
                    for child in (task / "children").read_text().split()]
        assert len(children) >= 2
    finally:
        run.kill()
        run.wait()
    wait_until(lambda: not any(alive(child) for child in children))
    assert not (folder / "index.json").exists() and shards.found(folder)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_is_one_line_and_earlier_shards_stay(tmp_path, monkeypatch):
    folder, index = written(tmp_path)
    in_order = shards.in_order

    def killed(pool, *args, **options):
        results = in_order(pool, *args, **options)
        yield next(results)
        for worker in list(pool._processes.values()):
            worker.kill()
            worker.join()
        yield from results
    monkeypatch.setattr(shards, "in_order", killed)
    monkeypatch.setattr(shards, "CHUNK", 500)                       # many chunks for each worker
    with pytest.raises(OSError, match="a worker was killed.*fewer --workers"):
        written(tmp_path, workers=2, overwrite=True)
    assert shards.verify(folder) == index
    monkeypatch.setattr(shards, "in_order", in_order)
    assert written(tmp_path, workers=2, overwrite=True)[1]["splits"] == index["splits"]


def test_a_bad_row_stops_before_training_shards_are_written(tmp_path):
    source = Path(write_corpus(tmp_path / "rows.jsonl"))
    source.write_text(source.read_text() + "{broken\n")
    for workers in (1, 2):
        with pytest.raises(ValueError, match="rows.jsonl:301: broken JSON"):
            written(tmp_path, data=str(source), workers=workers)
    assert not list((tmp_path / "shards").glob("train_*"))


def test_finished_shards_are_overwritten_only_when_asked_and_foreign_files_never(tmp_path):
    folder, index = written(tmp_path)
    with pytest.raises(ValueError, match="holds finished shards.*--overwrite"):
        written(tmp_path)
    with pytest.raises(ValueError, match="nowhere.jsonl: not found"):
        written(tmp_path, data="nowhere.jsonl", overwrite=True)
    assert shards.verify(folder) == index                            # still there
    broken = Path(write_corpus(tmp_path / "broken.jsonl"))
    broken.write_text(broken.read_text() + "{broken\n")
    for workers in (1, 2):
        with pytest.raises(ValueError, match="broken.jsonl:301: broken JSON"):
            written(tmp_path, data=str(broken), workers=workers, overwrite=True)
        assert shards.verify(folder) == index                        # a bad row may be the last
    _, fewer = written(tmp_path, shard_tokens=5000, overwrite=True)
    assert shards.verify(folder) == fewer and not (tmp_path / "shards.new").exists()
    assert len(list(folder.glob("train_*"))) == len(fewer["splits"]["train"]["shards"]) < 10
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt does not belong"):
        written(tmp_path, overwrite=True)
    assert shards.verify(folder) == fewer
    (tmp_path / "shards.new").mkdir()
    (folder / "notes.txt").rename(tmp_path / "shards.new" / "train_00000.bin")
    with pytest.raises(ValueError, match="shards.new: train_00000.bin does not belong"):
        written(tmp_path, overwrite=True)
    for options in ({"workers": 0}, {"shard_tokens": 0}):
        with pytest.raises(ValueError, match="both must be at least 1"):
            written(tmp_path, out=str(tmp_path / "new"), **options)


# ---------------------------------------------------------------------- reading

def test_windows_across_shards_read_like_one_array(tmp_path):
    folder, _ = written(tmp_path, shard_tokens=97)
    tokens = shards.open_tokens(folder, "train")
    tokens.shard = lru_cache(maxsize=3)(tokens.map_shard)             # more shards than stay mapped
    whole = np.concatenate([np.fromfile(f, "<u2") for f in sorted(folder.glob("train_*.bin"))])
    assert len(tokens) == len(whole) > 50 * 97 and tokens.dtype == np.uint16
    rng = np.random.default_rng(0)
    for shape in ((5,), (4, 300), (2, 3, 7), (0,), ()):
        at = rng.integers(0, len(whole), shape)
        assert np.array_equal(tokens[at], whole[at]) and tokens[at].dtype == np.uint16
    for part in (slice(None), slice(90, 210), slice(None, 10**9), slice(5, 5)):
        assert np.array_equal(tokens[part], whole[part])
    assert tokens[96] == whole[96] and tokens[97] == whole[97]
    assert np.array_equal(np.bincount(tokens), np.bincount(whole))
    assert np.asarray(tokens, np.int64).dtype == np.int64
    for outside in ([-1], [len(whole)]):
        with pytest.raises(IndexError, match=f"not all in 0 .. {len(whole) - 1}"):
            tokens[np.array(outside)]
    ours, theirs = (data.TokenStream(t, 130, 3, TOKENIZER.endoftext) for t in (tokens, whole))
    for step in range(5):
        a, b = ours.batch(step, 6), theirs.batch(step, 6)
        assert all(torch.equal(getattr(a, name), getattr(b, name))
                   for name in ("tokens", "loss_mask", "documents", "positions", "index"))


def damaged(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name, change, said", [
    ("train_00002.bin", None, r"train_00002.bin is missing; index.json counts 1,000 tokens"),
    ("train_00002.bin", lambda raw: raw[:-3], r"has 1,997 bytes; 1,000 tokens take 2,000"),
    ("tokenizer.json", lambda raw: raw.replace(b"pad", b"bad"), "tokenizer.json: special tokens"),
    ("tokenizer.json", lambda raw: raw + b" ", "tokenizer.json is not the one these shards"),
    ("index.json", lambda raw: raw[:-9], "index.json is damaged .JSONDecodeError"),
    ("index.json", lambda raw: raw.replace(b'"tokens": 1000', b'"tokens": 999'), "do not add up"),
    ("index.json", lambda raw: b"[]", "index.json is damaged"),
    ("index.json", lambda raw: raw.replace(b"tokenizer_sha256", b"tokenizer"),
     "index.json is damaged .KeyError: .tokenizer_sha256"),
])
def test_what_is_missing_or_damaged_is_named(tmp_path, name, change, said):
    folder, _ = written(tmp_path)
    if change:
        damaged(folder, name, change)
    else:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=said):
        shards.open_tokens(folder, "train")


def test_flipped_bits_are_found_by_their_checksum_and_impossible_ids_by_reading(tmp_path,
                                                                               monkeypatch):
    folder, _ = written(tmp_path)
    damaged(folder, "train_00001.bin", lambda raw: raw[:8] + bytes([raw[8] ^ 1]) + raw[9:])
    with pytest.raises(ValueError, match="train_00001.bin is damaged .its checksum differs"):
        shards.open_tokens(folder, "train")
    monkeypatch.setattr(shards, "CHECKED", 1000)           # as if they were gigabytes
    tokens = shards.open_tokens(folder, "train")
    assert tokens[1000:1010].max() < TOKENIZER.vocab_size
    with pytest.raises(ValueError, match="train_00001.bin is damaged .its checksum differs"):
        shards.main(shards.Config(verify=str(folder)))
    damaged(folder, "train_00001.bin", lambda raw: raw[:8] + b"\xff\xff" + raw[10:])
    with pytest.raises(ValueError, match="train_00001.bin: damaged: it holds the id 65535, the "
                                         f"vocabulary has {TOKENIZER.vocab_size}"):
        shards.open_tokens(folder, "train")[1000:1010]


# ---------------------------------------------------------------------- training from shards

def pretrain_config(tmp_path, source, **changes):
    return build(train_pretrain.Config, {
        "out": str(tmp_path / "base"), "data": str(source), "d_model": 32, "n_layers": 1,
        "n_heads": 2, "context_length": 32, "steps": 3, "eval_windows": 8,
        "device": "cpu", "dtype": "float32", "log_every": 1} | changes)


def test_training_from_shards_equals_training_from_the_text(tmp_path):
    source = write_corpus(tmp_path / "rows.jsonl")
    folder, _ = written(tmp_path, data=source, tokenizer="bpe", vocab_size=300, max_bytes=40_000)
    results = [train_pretrain.main(pretrain_config(tmp_path, where, tokenizer=tokenizer,
                                                   max_bytes=40_000, out=str(tmp_path / name)))
               for name, where, tokenizer in (("text", source, str(folder)),
                                              ("same", folder, "bpe"))]
    for result in results:
        del result["minutes"], result["tokens_per_s"]
    assert results[0] == results[1]            # losses, bits per byte and baselines, bit by bit
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("text", "same"))
    assert a == b
    assert Tokenizer.load(tmp_path / "same") == Tokenizer.load(folder)


def test_duplicates_and_empty_documents_are_dropped_as_from_text(tmp_path):
    clean = Path(write_corpus(tmp_path / "rows.jsonl"))
    lines = clean.read_text().splitlines(keepends=True)
    empty = [json.dumps({"text": text}) + "\n" for text in ("", "\n", "* * *")]
    dirty = tmp_path / "dirty.jsonl"
    dirty.write_text("".join([*lines[:40], *empty, *lines, *lines[20:30], *empty]))
    of_clean, _ = written(tmp_path, data=str(clean))
    for workers in (1, 2):
        folder, index = written(tmp_path, data=str(dirty), out=str(tmp_path / f"dirty{workers}"),
                                workers=workers)
        assert {f.name: f.read_bytes() for f in folder.glob("*.bin")} == \
            {f.name: f.read_bytes() for f in of_clean.glob("*.bin")}
    streams = [prepared(pretrain_config(tmp_path, source, tokenizer="bytes")).streams
               for source in (dirty, folder)]
    for split in ("train", "heldout"):
        from_text, from_shards = streams[0][str(dirty), split], streams[1][str(folder), split]
        assert np.array_equal(from_text.tokens, from_shards.tokens[:])
        assert from_text[1:] == from_shards[1:]                  # documents and bytes
        assert index["splits"][split]["documents"] == from_text.n_documents


def test_a_tokenizer_that_is_not_the_shards_own_is_refused(tmp_path):
    folder, _ = written(tmp_path, tokenizer="bpe", vocab_size=300)
    with pytest.raises(ValueError, match=r"another vocabulary \(300 tokens\) than the one given "
                                         r"\(272 tokens\).*shards.py --tokenizer"):
        prepared(pretrain_config(tmp_path, folder, tokenizer="bytes"))
    tokenizer = Tokenizer.load(folder)
    assert prepared(pretrain_config(tmp_path, folder), tokenizer).tokenizer == tokenizer
    more = Tokenizer(tokenizer.ranks, tokenizer.pattern, [*SPECIAL_TOKENS, "<|mask|>"])
    assert len(shards.open_tokens(folder, "train", more)) > 1000     # no special token is in there


def test_the_baselines_are_counted_on_a_bounded_part(tmp_path, monkeypatch):
    folder, _ = written(tmp_path)
    tokens = [shards.open_tokens(folder, split) for split in ("train", "heldout")]
    first = [part[:2000] for part in tokens]
    monkeypatch.setattr(shards.ShardedTokens, "__array__", None)       # never as a whole
    assert evaluate.ngram_losses(*tokens, TOKENIZER.vocab_size, at_most=2000) == \
        evaluate.ngram_losses(*first, TOKENIZER.vocab_size)
    at_most = inspect.signature(evaluate.ngram_losses).parameters["at_most"].default
    assert at_most <= 50_000_000


# ---------------------------------------------------------------------- the order of many windows

def test_scattered_is_a_permutation_for_every_n():
    for n in [*range(1, 70), 255, 256, 257, 1000, 4095, 4096, 4097, 65537, data.LISTED + 1]:
        entries = data.scattered(np.arange(n), n, seed=1, epoch=2)
        assert entries.dtype == np.int64 and np.array_equal(np.sort(entries), np.arange(n))


def test_scattered_needs_no_neighbours_and_no_memory():
    n = 10**15 + 7
    places = np.random.default_rng(0).integers(0, n, (3, 5))
    entries = data.scattered(places, n, 0, 0)
    for i, j in np.ndindex(3, 5):
        assert data.scattered(places[i:i + 1, j], n, 0, 0) == entries[i, j]
    assert entries.min() >= 0 and entries.max() < n and len(np.unique(entries)) == 15


def test_scattered_is_the_same_everywhere_and_differs_with_seed_and_epoch():
    n = 10_000_019
    first = data.scattered(np.arange(6), n, 0, 0)
    assert first.tolist() == [9178653, 3977951, 2735386, 8341036, 2635452, 4178853]
    others = [data.scattered(np.arange(1000), n, seed, epoch)
              for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))]
    for i, a in enumerate(others):
        for b in others[:i]:                                # 1000 / n equal entries expected
            assert (a == b).sum() <= 1


def chi_square_excess(counts, expected):
    """(chi^2 - its mean) / its standard deviation: a standard normal for many cells."""
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_scattered_looks_like_a_random_permutation():
    """Each statistic of one permutation stays within five standard deviations of what uniformly
    drawn ones give; a chance of 6e-7 each, and the seeds are fixed."""
    n = data.LISTED + 12345
    for seed in range(3):
        p, k = data.scattered(np.arange(n), n, seed, 0), np.arange(n)
        # where neighbourhoods of places go: 64 x 64 cells
        cells = np.bincount((k * 64 // n) * 64 + p * 64 // n, minlength=4096)
        assert abs(chi_square_excess(cells, n / 4096)) < 5
        # steps from an entry to the next, as parts of n
        steps = np.bincount((np.diff(p) % n) * 1024 // n, minlength=1024)
        assert abs(chi_square_excess(steps, (n - 1) / 1024)) < 5
        # displacement: mean n / 3, variance n^2 / 18 an entry
        assert abs(np.abs(p - k).mean() - n / 3) < 5 * n / math.sqrt(18 * n)
        # ascents: (n - 1) / 2, variance (n + 1) / 12
        assert abs((np.diff(p) > 0).sum() - (n - 1) / 2) < 5 * math.sqrt((n + 1) / 12)
        # fixed points and successors: Poisson with mean 1
        assert (p == k).sum() <= 8 and (np.diff(p) == 1).sum() <= 8
        # every low bit and every parity of place and entry
        assert abs(((p ^ k) & 1).mean() - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_a_place_goes_anywhere_over_the_epochs():
    n = data.LISTED + 1
    entries = np.array([data.scattered(np.array([0, 1, n - 1]), n, 0, epoch)
                        for epoch in range(1000)])
    for place in entries.T:
        assert abs(chi_square_excess(np.bincount(place * 25 // n, minlength=25), 40)) < 5


def test_small_corpora_keep_the_order_they_had():
    n = 1000
    expected = [np.random.default_rng((7, k // n)).permutation(n)[k % n] for k in range(990, 1010)]
    assert data.shuffled(range(990, 1010), n, 7).tolist() == expected
    assert data.shuffled(range(5), data.LISTED, 7).tolist() == \
        np.random.default_rng((7, 0)).permutation(data.LISTED)[:5].tolist()
    assert data.shuffled(range(5), data.LISTED + 1, 7).tolist() == \
        data.scattered(np.arange(5), data.LISTED + 1, 7, 0).tolist()


@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (3, 2), (2, 5)])
def test_ranks_together_see_every_window_of_a_large_corpus_once_an_epoch(world_size, batch_size,
                                                                         monkeypatch):
    monkeypatch.setattr(data, "LISTED", 50)
    stream, taken = data.TokenStream(np.arange(701, dtype=np.uint16), 10, 0, 60000), []
    assert len(stream) == 70 > data.LISTED
    for step in range(300 // (world_size * batch_size)):
        for rank in range(world_size):
            taken += stream.batch(step, batch_size, rank, world_size).index.tolist()
    epochs = [taken[k:k + 70] for k in range(0, 280, 70)]
    assert all(sorted(epoch) == list(range(70)) for epoch in epochs) and epochs[0] != epochs[1]


# ---------------------------------------------------------------------- reading line by line

def test_jsonl_is_read_line_by_line_with_the_same_line_numbers_and_offsets(tmp_path):
    path, long = tmp_path / "rows.jsonl", json.dumps({"text": "x" * 1_000_000}).encode() + b"\n"
    path.write_bytes(long * 20 + b"\r\n" + b'{"text": "caf\xe9"}\n')
    documents = readers.read_documents(path)
    assert next(documents) == "x" * 1_000_000
    offset = 20 * len(long) + 2 + len(b'{"text": "caf')
    with pytest.raises(ValueError, match=re.escape(f"{path}:22: not UTF-8: byte 0xe9 at byte "
                                                   f"offset {offset} of the file")):
        list(documents)
    path.write_bytes(b'\xef\xbb\xbf{"text": "marked"}\r\n{"text": "no newline at the end"}')
    assert list(readers.read_documents(path)) == ["marked", "no newline at the end"]
    path.write_bytes(b'{"text": "a"}\n{"text": "b"')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: broken JSON at column 13"):
        list(readers.read_documents(path))


def test_the_command_line_writes_shards_that_training_reads(tmp_path):
    source = tmp_path / "rows.jsonl"
    documents = World(0).documents()
    source.write_text("".join(json.dumps({"text": next(documents)}) + "\n" for _ in range(100)))
    done = subprocess.run([sys.executable, "shards.py", "--data", str(source), "--workers", "1",
                           "--vocab_size", "320", "--out", str(tmp_path / "out")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"train: \d+ documents, [\d,]+ bytes, [\d,]+ tokens in 1 shards", done.stdout)
    read = prepared(pretrain_config(tmp_path, tmp_path / "out"))
    [bytes_per_token] = corpus.bytes_per_token(read.streams).values()
    assert read.tokenizer.vocab_size == 320 and 1.2 < bytes_per_token < 6


@pytest.mark.parametrize("option, changes", [
    ("next_sentence", {"objective": "mlm", "next_sentence": True}),
    ("new_words", {"new_words": 5, "init": "base"})])
def test_what_reads_text_is_refused_on_shards(tmp_path, option, changes):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    cfg = train_denoise.Config(data=str(tmp_path / "shards"), **changes)
    with pytest.raises(ValueError, match=f"--{option} reads text, and .*holds shards"):
        train_pretrain.check(cfg)
        train_denoise.with_architecture(cfg)

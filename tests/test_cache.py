"The store against a model of it, under faults, with several processes and kills."

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
from collections import OrderedDict
from contextlib import closing, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt_nb import cache as cache_module
from truthgpt_nb.cache import CacheManager, clear_cache
from truthgpt_nb.core import CacheError, ConfigError

fork = multiprocessing.get_context("fork")


def value_of(worker, number):
    return {"worker": worker, "number": number, "text": f"{worker}-{number} " * 20}


# --- the store against a model of it ---------------------------------------------------------------------------------


class Model:
    "What one tier should do: least recently used out first, sizes of keys and JSON."

    def __init__(self, limit):
        self.limit, self.entries = limit, OrderedDict()

    @property
    def bytes(self):
        return sum(len(key) + len(value) + 2 for key, value in self.entries.items())

    def put(self, key, value):
        self.entries.pop(key, None)
        if len(key) + len(value) + 2 <= self.limit:
            self.entries[key] = value
        while self.bytes > self.limit:
            self.entries.popitem(last=False)

    def get(self, key):
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)


steps = st.lists(
    st.tuples(st.sampled_from(["put", "get", "clear"]), st.sampled_from("abcdefgh"), st.integers(0, 60)), max_size=60
)


@settings(max_examples=60, deadline=None)
@given(steps=steps, limit=st.integers(1, 200))
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_each_tier_does_what_its_model_does(tmp_path_factory, tier, steps, limit):
    folder = tmp_path_factory.mktemp("cache")
    limits = {"memory_bytes": limit, "disk_bytes": 0} if tier == "memory" else {"memory_bytes": 0, "disk_bytes": limit}
    model = Model(limit)
    with CacheManager(folder, **limits) as cache:
        for action, key, length in steps:
            if action == "clear" and length < 3:
                cache.clear()
                model.entries.clear()
            elif action == "put":
                cache.put(key, "x" * length)
                model.put(key, "x" * length)
            else:
                hit = cache.get(key)
                assert (hit.value if hit else None) == model.get(key)
            stats = cache.stats().to_dict()
            assert stats[f"bytes_{tier}"] == model.bytes
            assert stats[f"entries_{tier}"] == len(model.entries)


def test_statistics_add_up(tmp_path):
    with CacheManager(tmp_path, memory_bytes=100, disk_bytes=250) as cache:
        for number in range(10):
            cache.put(f"key{number}", "x" * 40, seconds=2.0)  # 46 bytes each
        assert cache.get("key9").where == "memory" and cache.get("key7").where == "disk" and cache.get("key0") is None
        stats = cache.stats()
        assert (stats.hits_memory, stats.hits_disk, stats.misses, stats.puts) == (1, 1, 1, 10)
        assert (stats.entries_memory, stats.bytes_memory, stats.entries_disk, stats.bytes_disk) == (2, 92, 5, 230)
        assert (stats.evicted_memory, stats.evicted_disk, stats.seconds_saved) == (9, 5, 4.0)
        assert stats.to_dict()["file_bytes"] >= 4096 and "2 hits of 3" in repr(stats)
        assert "<table>" in stats._repr_html_()


def test_use_is_remembered_across_managers_and_decides_eviction(tmp_path):
    with CacheManager(tmp_path) as cache:
        for key in "abc":
            cache.put(key, "x" * 97)  # 100 bytes
        cache.get("a")
    with CacheManager(tmp_path, disk_bytes=200) as cache:
        assert [bool(cache.get(key)) for key in "abc"] == [True, False, True]


def test_a_hit_writes_nothing(tmp_path):
    with CacheManager(tmp_path, memory_bytes=0) as cache:
        cache.put("a", 1)
        with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as watcher:
            before = watcher.execute("PRAGMA data_version").fetchone()
            for _ in range(50):
                assert cache.get("a").where == "disk"
            assert watcher.execute("PRAGMA data_version").fetchone() == before
            cache.put("b", 1)
            assert watcher.execute("PRAGMA data_version").fetchone() != before


def test_age_is_a_limit_on_disk_too(tmp_path):
    with CacheManager(tmp_path, memory_bytes=0, max_age_seconds=0.2) as cache:
        cache.put("old", 1)
        time.sleep(0.21)
        cache.put("new", 2)  # old entries leave with the next put
        assert cache.stats().entries_disk == 1 and cache.stats().expired == 1
        time.sleep(0.21)
        assert cache.get("new") is None and cache.stats().entries_disk == 0


def test_the_file_shrinks_after_clear_and_its_pages_are_used_again(tmp_path):
    with CacheManager(tmp_path, memory_bytes=0, disk_bytes=2_000_000) as cache:
        for number in range(100):
            cache.put(f"{number}", "x" * 50_000)
        assert (tmp_path / "cache.sqlite").stat().st_size < 4_000_000  # 5 MB went in; evicted pages made room
        cache.clear()
        assert (tmp_path / "cache.sqlite").stat().st_size < 100_000 and cache.stats().file_bytes < 200_000


def test_too_large_for_everything_leaves_nothing_stale(tmp_path):
    with CacheManager(tmp_path, memory_bytes=50, disk_bytes=100) as cache:
        cache.put("a", "old")
        cache.put("a", "x" * 1000)
        assert cache.get("a") is None and cache.stats().too_large == 1 and cache.stats().entries_disk == 0


def test_memory_only_touches_no_folder(tmp_path):
    with CacheManager(tmp_path / "not" / "made", disk_bytes=0) as cache:
        cache.put("a", [1, {"b": None}])
        assert cache.get("a").value == [1, {"b": None}] and cache.verify().rows == []
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    "wrong", [{"memory_bytes": -1}, {"disk_bytes": "1"}, {"max_age_seconds": 0.0}, {"cache_dir": ""}, {"cache_dir": 3}]
)
def test_limits_are_validated(wrong, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CacheManager(**{"cache_dir": str(tmp_path), **wrong})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    whole = (torch.randn(6, 4) * 10).to(dtype)
    parts = {"t": whole.t(), "row": whole[0], "scalar": whole[0, 0], "empty": whole[:0], "same": whole[0]}
    with CacheManager(tmp_path, memory_bytes=0) as cache:
        cache.put("a", parts)
        found = cache.get("a").value
    assert found.keys() == parts.keys() and all(torch.equal(found[name], parts[name]) for name in parts)
    assert all(found[name].dtype == dtype and found[name].shape == parts[name].shape for name in parts)
    found["row"].zero_()  # writable


# --- threads and processes -------------------------------------------------------------------------------------------


def put_and_get(folder, worker, count):
    with CacheManager(folder, memory_bytes=0) as cache:
        for number in range(count):
            cache.put(f"{worker}/{number}", value_of(worker, number))
            other = random.randrange(number + 1)
            assert cache.get(f"{worker}/{other}").value == value_of(worker, other)


def test_eight_processes_at_once(tmp_path):
    workers = [fork.Process(target=put_and_get, args=(tmp_path, worker, 100)) for worker in range(8)]
    for worker in workers:
        worker.start()  # they also race to make the database
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 8
    with CacheManager(tmp_path) as cache:
        for worker in range(8):
            for number in range(100):
                assert cache.get(f"{worker}/{number}").value == value_of(worker, number)
        assert cache.stats().entries_disk == 800 and cache.stats().broken == 0
        assert {row["state"] for row in cache.verify().rows} == {"intact"}


def test_threads_share_a_manager(tmp_path):
    failures = []
    with CacheManager(tmp_path, memory_bytes=5_000) as cache:

        def work(worker):
            try:
                for number in range(100):
                    cache.put(f"{worker}/{number}", value_of(worker, number), seconds=1)
                    assert cache.get(f"{worker}/{number}").value == value_of(worker, number)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        stats = cache.stats()
        assert not failures
        assert (stats.hits_memory + stats.hits_disk, stats.misses, stats.puts, stats.entries_disk) == (600, 0, 600, 600)


def use_after_fork(cache, worker):
    assert cache.stats().puts == 0  # statistics are those of one process
    assert cache.get("before").where == "disk"
    for number in range(50):
        cache.put(f"{worker}/{number}", value_of(worker, number))
    cache.close()


def test_a_manager_survives_fork_with_threads_at_work(tmp_path):
    cache, stop = CacheManager(tmp_path), threading.Event()

    def keep_busy():
        while not stop.is_set():
            cache.put("busy", "x")
            cache.get("busy")

    cache.put("before", 1)
    thread = threading.Thread(target=keep_busy)
    thread.start()
    children = [fork.Process(target=use_after_fork, args=(cache, worker)) for worker in range(4)]
    for child in children:
        child.start()
    stop.set()
    thread.join()
    cache.close()  # must not take the write-ahead log away from under the children
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    with CacheManager(tmp_path) as cache:
        assert all(cache.get(f"{w}/{n}").value == value_of(w, n) for w in range(4) for n in range(50))


def write_until_killed(folder, turn, pipe):
    cache = CacheManager(folder, memory_bytes=0)
    for number in range(1_000_000):
        cache.put(f"{turn}/{number}", {"text": f"{turn}-{number} " * 500})
        os.write(pipe, b"x")  # said only once it is committed


def test_sigkill_loses_nothing_committed(tmp_path):
    chance = random.Random(7)
    committed = {}
    for turn in range(12):
        reading, writing = os.pipe()
        child = fork.Process(target=write_until_killed, args=(tmp_path, turn, writing))
        child.start()
        os.close(writing)
        first = os.read(reading, 1)  # it is at work
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        committed[turn] = len(first)
        while chunk := os.read(reading, 65536):
            committed[turn] += len(chunk)
        os.close(reading)
    with CacheManager(tmp_path) as cache:
        for turn, count in committed.items():
            assert count >= 1
            for number in range(count):
                assert cache.get(f"{turn}/{number}").value == {"text": f"{turn}-{number} " * 500}
        stats = cache.stats()
        assert stats.broken == 0 and 0 <= stats.entries_disk - sum(committed.values()) <= len(committed)
        assert {row["state"] for row in cache.verify().rows} == {"intact"}


# --- damage ----------------------------------------------------------------------------------------------------------

tampering = {
    "value": "UPDATE payloads SET value = x'22' || value || x'22' WHERE id = 1",
    "one byte": "UPDATE payloads SET value = CAST('\"aab\"' AS BLOB) WHERE id = 1",
    "payload gone": "DELETE FROM payloads WHERE id = 1",
    "payload of another": "UPDATE payloads SET value = (SELECT value FROM payloads WHERE id = 2) WHERE id = 1",
    "text for bytes": "UPDATE payloads SET value = 'text' WHERE id = 1",
    "kind": "UPDATE entries SET kind = 'tensors' WHERE id = 1",
    "key": "UPDATE entries SET key = 'moved' WHERE id = 1",
    "seconds": "UPDATE entries SET seconds = 1e9 WHERE id = 1",
    "created": "UPDATE entries SET created = 'never' WHERE id = 1",
    "checksum": "UPDATE entries SET checksum = x'00' WHERE id = 1",
    "size": "UPDATE entries SET bytes = 1 WHERE id = 1",
}


@pytest.mark.parametrize("how", tampering)
def test_a_broken_entry_is_a_miss_is_set_aside_and_counted(tmp_path, how):
    with CacheManager(tmp_path) as cache:
        cache.put("first", "aaa")
        cache.put("second", "ccc")
    with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as raw, raw:
        raw.execute(tampering[how])
    key = "moved" if how == "key" else "first"
    with CacheManager(tmp_path) as cache:
        assert cache.get(key) is None
        assert cache.get("second").value == "ccc"
        stats = cache.stats()
        assert (stats.broken, stats.set_aside, stats.misses, stats.entries_disk) == (1, 1, 1, 1)
        cache.put(key, "new")
        assert cache.get(key).value == "new"
        assert cache.stats().broken == 1
        cache.clear()
        assert cache.stats().set_aside == 0


def test_verify_finds_what_nobody_asked_for(tmp_path):
    with CacheManager(tmp_path) as cache:
        for key in "abc":
            cache.put(key, key)
        with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as raw, raw:
            raw.execute("UPDATE payloads SET value = x'00' WHERE id = 2")
        table = cache.verify()
        assert [row["state"] for row in table.rows] == ["intact", "set aside", "intact"]
        assert table.title == "3 entries, 1 broken" and cache.verify().title == "2 entries, 0 broken"


def filled(folder, entries=40):
    with CacheManager(folder) as cache:
        for number in range(entries):
            cache.put(f"{number}", f"{number} " * 1000)
    return folder / "cache.sqlite"


@contextmanager
def refused(folder, rule):
    "The block raises a CacheError that names folder and next step, and leaves every file as it was."
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CacheError, match=rule) as caught:
        yield
    assert caught.value.argument == "cache_dir" and str(folder) in str(caught.value.value) and caught.value.next_step
    for path, content in before.items():
        assert path.read_bytes() == content


def test_not_a_database(tmp_path):
    (tmp_path / "cache.sqlite").write_bytes(os.urandom(20_000))
    with refused(tmp_path, "must hold an undamaged database"):
        CacheManager(tmp_path)


def test_a_truncated_database(tmp_path):
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[:-30_000])
    with refused(tmp_path, "must hold an undamaged database"):
        CacheManager(tmp_path)


def read_damaged(folder):
    "Ask for every entry: how many were served, refused and broken; none may be wrong."
    served = refusals = 0
    with CacheManager(folder) as cache:
        for number in range(40):
            try:
                hit = cache.get(f"{number}")
            except CacheError as error:
                assert error.rule == "must hold an undamaged database"  # noqa: PT017
                refusals += 1
            else:
                assert hit is None or hit.value == f"{number} " * 1000
                served += hit is not None
        return served, refusals, cache.stats().broken


def test_garbage_in_the_middle_is_never_served(tmp_path):
    whole, outcomes = filled(tmp_path / "whole").read_bytes(), []
    for start in range(4096, len(whole) - 6000, 12_000):
        folder = tmp_path / f"{start}"
        folder.mkdir()
        garbage = random.Random(start).randbytes(6000)
        (folder / "cache.sqlite").write_bytes(whole[:start] + garbage + whole[start + 6000 :])
        try:
            served, refusals, broken = read_damaged(folder)
        except CacheError as error:  # the constructor, or a write, met the damage
            assert error.rule == "must hold an undamaged database"  # noqa: PT017
            outcomes.append("refused")
        else:
            assert served < 40
            outcomes.append("broken" if broken else "refused" if refusals else "missed")
    assert len(outcomes) > 10 and {"broken", "refused"} <= set(outcomes)


def test_a_database_of_somebody_else_or_of_the_future(tmp_path):
    with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as raw, raw:
        raw.execute("CREATE TABLE recipes(name)")
    with refused(tmp_path, "must hold a database of this package"):
        CacheManager(tmp_path)
    newer = tmp_path / "newer"
    with closing(sqlite3.connect(filled(newer))) as raw, raw:
        raw.execute("PRAGMA user_version = 99")
    with refused(newer, "version 1 or older.*version 99.*Update truthgpt_nb"):
        CacheManager(newer)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with refused(tmp_path, "must be a folder, not a file"):
        CacheManager(tmp_path / "notes")
    with refused(tmp_path, "must be a folder, not a file"):
        CacheManager(tmp_path / "notes" / "below")
    (tmp_path / "odd" / "cache.sqlite").mkdir(parents=True)
    with refused(tmp_path / "odd", "must be a folder that can be written to"):
        CacheManager(tmp_path / "odd")


@contextmanager
def as_nobody():
    "For root, whom no permission stops: another user for the block."
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_folder(tmp_path):
    kept, empty = tmp_path / "kept", tmp_path / "empty"
    filled(kept)
    empty.mkdir()
    (kept / "cache.sqlite").chmod(0o444)
    for folder in (kept, empty):
        folder.chmod(0o555)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    with as_nobody():
        for folder in (kept, empty):
            with refused(folder, "must be a folder that can be written to"):
                CacheManager(folder)
        with pytest.raises(CacheError, match="must be a folder that can be written to"):
            CacheManager(empty / "below")
    kept.chmod(0o755)
    (kept / "cache.sqlite").chmod(0o644)
    with CacheManager(kept) as cache:
        assert cache.get("7").value == "7 " * 1000


def test_a_full_disk_keeps_what_is_there(tmp_path):
    with CacheManager(tmp_path) as cache:
        cache.put("before", 1)
        with cache._disk.reading() as db:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(CacheError, match=r"cache_dir must have room.*Free some space"):
            cache.put("large", "x" * 100_000)
        assert cache.get("large") is None and cache.get("before").value == 1
        assert cache.stats().entries_disk == 1 and cache.stats().puts == 1
        with cache._disk.reading() as db:
            db.execute("PRAGMA max_page_count = 1000000")
        cache.put("large", "x" * 100_000)  # room again
        assert cache.get("large").value == "x" * 100_000


def test_a_lock_that_is_held_for_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_BUSY_SECONDS", 0.2)
    path = filled(tmp_path)
    with CacheManager(tmp_path) as cache, closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(CacheError, match=r"must be free within 0.2 s"):
            cache.put("a", 1)
        with pytest.raises(CacheError, match=r"must be free within 0.2 s"):
            CacheManager(tmp_path)
        assert cache.get("7").value == "7 " * 1000  # readers go on
        holder.execute("ROLLBACK")
        cache.put("a", 1)
        assert cache.get("a").value == 1


def test_clear_cache_deletes_nothing_that_it_cannot_read(tmp_path):
    path = filled(tmp_path)
    assert clear_cache(tmp_path).startswith("Removed 40 entries")
    path.write_bytes(b"notes " * 1000)
    assert "aside" in clear_cache(tmp_path)
    assert [file.read_bytes() for file in tmp_path.glob("*unreadable*")] == [b"notes " * 1000]
    assert not path.exists() and "no cache" in clear_cache(tmp_path)

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bilevel import lock
from bilevel.errors import InputError, RunError
from bilevel.lock import Owner, owned

HOLD = "import sys, time; from pathlib import Path; from bilevel.lock import owned\nwith owned(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock of tmp_path / "out"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "STALE", 0.2)
    monkeypatch.setattr(lock, "POLL", 0.02)


def leave(where: Path, owner: Owner | str) -> Path:
    """The lock of an owner who is not here."""
    (where / ".lock").mkdir(parents=True)
    text = owner if isinstance(owner, str) else json.dumps(asdict(owner))
    (where / ".lock" / "owner-0").write_text(text)
    return where / ".lock" / "owner-0"


def test_a_second_process_is_told_who_holds_a_directory_until_that_one_is_killed(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    with (
        pytest.raises(InputError, match=rf"out is in use by process {holder.pid} on \S+ since 20\d\d-.* UTC; wait"),
        owned(tmp_path / "out"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with owned(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert not list((tmp_path / "out").iterdir())


def test_who_takes_a_directory_removes_the_locks_below_it_of_those_who_are_gone(tmp_path: Path) -> None:
    gone = replace(Owner.me(), began=1)
    leave(tmp_path / "out" / "cell", gone)
    leave(tmp_path / "out" / "cell" / "tuned", gone).parent.rename(tmp_path / "out" / "cell" / ".mix.jsonl.lock")
    with owned(tmp_path / "out" / "alive"), owned(tmp_path / "out"):
        assert [path.parent.name for path in sorted((tmp_path / "out").rglob("*.lock"))] == ["out", "alive"]


def test_a_process_id_that_another_process_has_now_does_not_hold_a_lock(tmp_path: Path) -> None:
    leave(tmp_path, replace(Owner.me(), began=1))
    with owned(tmp_path):
        pass


def test_the_owner_may_ask_again_and_another_thread_may_not(tmp_path: Path) -> None:
    refused = []

    def ask() -> None:
        try:
            with owned(tmp_path):
                pass
        except InputError as error:
            refused.append(error)

    with owned(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()  # nothing was written there
    with owned(tmp_path), owned(tmp_path):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_machine_is_kept_while_it_is_touched_and_taken_over_when_it_is_not(
    tmp_path: Path, quick: None
) -> None:
    file = leave(tmp_path, replace(Owner.me(), host="elsewhere", pid=1))
    end = threading.Event()

    def beat() -> None:
        for i in range(10_000):
            if end.wait(0.01):
                return
            os.utime(file, (i, i))  # the clock of the other machine is far behind

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(InputError, match="in use by process 1 on elsewhere"), owned(tmp_path):
        pass
    end.set()
    thread.join()
    started = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - started > 0.2


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "null"])
def test_a_damaged_lock_is_taken_over_when_nobody_touches_it(tmp_path: Path, quick: None, content: str) -> None:
    leave(tmp_path, content)
    with owned(tmp_path):
        pass


def test_who_has_lost_the_lock_writes_no_more(tmp_path: Path, quick: None) -> None:
    with owned(tmp_path) as held:
        held.require()
        (file,) = (tmp_path / ".lock").iterdir()
        file.rename(file.with_name("owner-of-another"))  # as one does who takes over
        time.sleep(0.2)
        with pytest.raises(RunError, match="taken over by another process"):
            held.require()


@pytest.mark.soak
def test_of_many_processes_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    leave(tmp_path / "out", replace(Owner.me(), began=1))
    go = f"import time; time.sleep(max(0, {time.time() + 2} - time.time()))\n"
    processes = [
        subprocess.Popen([sys.executable, "-c", go + HOLD.replace("60", "6"), tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]  # fmt: skip
    said = [process.communicate() for process in processes]
    assert [out for out, _ in said].count("held\n") == 1
    assert sum(bool(re.search("InputError: .* is in use by process", error)) for _, error in said) == 3


def test_the_lock_of_a_file_is_beside_it_and_waits_if_asked(tmp_path: Path, quick: None) -> None:
    file = tmp_path / "cache" / "model"
    order = []

    def later() -> None:
        with owned(file, file=True, wait=True):
            order.append("second")

    with owned(file, file=True):
        assert [path.name for path in file.parent.iterdir()] == [".model.lock"]
        thread = threading.Thread(target=later)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]

"""Runs Python programs as forks of a process that has everything imported: `server.py SOCKET MODULES`; `client.py` asks for one.

Forks share nothing: no program meets what an earlier one left behind. The server has one thread, and computes nothing. It ends,
and all programs with it, when its stdin is closed.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
import warnings
from typing import NoReturn


def main() -> None:
    address, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what all forks have in common is not looked through, and so not copied, by any of them
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    ended, ending = os.pipe()
    os.set_blocking(ending, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ending, warn_on_full_buffer=False)
    clients: dict[int, socket.socket] = {}
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([sys.stdin, listener, ended, *clients.values()], [], [])
        closed = sys.stdin in ready
        for pid, client in clients.items():
            if closed or client in ready:  # a client that lives says nothing more
                os.kill(pid, signal.SIGKILL)
        if closed:
            shutil.rmtree(os.path.dirname(address))
            return
        if ended in ready:
            os.read(ended, 512)
            tell_of_ends(clients)
        if listener in ready:
            client, _ = listener.accept()
            _, streams, _, _ = socket.recv_fds(client, 1, 3)
            with client.makefile() as sent:
                order = json.loads(sent.readline())
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for kept in (listener, client, *clients.values()):
                    kept.close()
                os.close(ended)
                os.close(ending)
                leave(code_of(streams, **order))
            for stream in streams:
                os.close(stream)
            clients[pid] = client
            tell(client, pid)


def tell_of_ends(clients: dict[int, socket.socket]) -> None:
    for pid in list(clients):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with clients.pop(pid) as client:
                tell(client, os.waitstatus_to_exitcode(status))


def tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # of a client that is gone
        client.sendall(f"{number}\n".encode())


def code_of(streams: list[int], words: list[str], folder: str, environment: dict[str, str]) -> int:
    """Be the interpreter that was given these words: `-m MODULE ARGUMENTS` or `FILE ARGUMENTS`, after `-u` or not."""
    os.setsid()  # what is sent to the server's group is not for this process
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for action in filter(None, environment.get("PYTHONWARNINGS", "").split(",")):
        warnings.simplefilter(action)  # type: ignore[arg-type]
    if words[0] == "-u":  # as torchrun starts its processes
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        words = words[1:]
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], folder
            sys.modules.pop(words[1], None)  # it may be imported, and is to be executed
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End as an interpreter does, but do not take all modules apart, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

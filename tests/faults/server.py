"""Runs commands with faults: everything is imported once, and each command is a fork of this process.

A line of JSON on stdin, {"words", "root", "how", "at"}, is answered by one on stdout: {"code", "changes", "said"}. The code is
that of the process, or minus the signal that ended it.
"""

import ctypes
import importlib
import json
import os
import sys
import tempfile
import traceback

HOWS = ("count", "kill", "tear", "full")


def child(words: list[str], root: str, how: str, at: int, said: str, changes: str) -> None:
    import bilevel.cli

    stream = os.open(said, os.O_WRONLY)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = ["bilevel", *words]
    disk = ctypes.CDLL(None)
    disk.disk_arm(root.encode(), HOWS.index(how), ctypes.c_long(at))
    code = 0
    try:
        bilevel.cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    with open(changes, "w") as file:
        file.write(str(disk.disk_changes()))
    os._exit(code)


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    print("ready", flush=True)
    with tempfile.TemporaryDirectory() as where:
        said, changes = os.path.join(where, "said"), os.path.join(where, "changes")
        for line in sys.stdin:
            order = json.loads(line)
            for file in (said, changes):
                open(file, "w").close()
            pid = os.fork()
            if not pid:
                child(**order, said=said, changes=changes)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with open(said, errors="replace") as text, open(changes) as number:
                answer = {"code": status, "changes": int(number.read() or 0), "said": text.read()}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

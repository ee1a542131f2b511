"""Install into this interpreter's environment, with uv in place of pip: several times as fast, from where pip would take it.

    .venv/bin/python .ci/install.py -c constraints.txt -e '.[dev]'

Arguments are those of `uv pip install`. uv does not read pip's settings (files, and PIP_ variables): what they say of where
packages are, and which ones are allowed, is handed on.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec

LISTS = {  # a setting of pip that may have several values -> uv's variable, and what stands between them there
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}
VALUES = {
    "index-url": ("UV_DEFAULT_INDEX",),
    "cert": ("SSL_CERT_FILE",),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "default-timeout": ("UV_HTTP_TIMEOUT",),
    "proxy": ("HTTP_PROXY", "HTTPS_PROXY"),
}


def main() -> None:
    """Become uv."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if find_spec("uv") is None:
        subprocess.run([*pip, "install", "--quiet", "-c", "constraints.txt", "uv"], check=True)
    settings = settings_of(subprocess.run([*pip, "config", "list"], check=True, capture_output=True, text=True).stdout)
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    # pip takes the best version that any index has; uv would look no further than the first index that knows the package
    command += ["--index-strategy", "unsafe-best-match"]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        command.append("--no-index")
    os.execve(sys.executable, [*command, *sys.argv[1:]], {**variables(settings), **os.environ})


def settings_of(listed: str) -> dict[str, str]:
    """The settings that hold for `pip install`, of the lines of `pip config list`, such as "global.timeout='60'"."""
    found: dict[str, tuple[int, str]] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in (order := ("global", "install", ":env:")):  # a later one outdoes an earlier one
            found[key] = max(found.get(key, (-1, "")), (order.index(section), str(ast.literal_eval(value))))
    return {key: value for key, (_, value) in found.items()}


def variables(settings: dict[str, str]) -> dict[str, str]:
    """What uv is told."""
    told = {name: between.join(settings[key].split()) for key, (name, between) in LISTS.items() if key in settings}
    return told | {name: settings[key] for key, names in VALUES.items() if key in settings for name in names}


if __name__ == "__main__":
    main()

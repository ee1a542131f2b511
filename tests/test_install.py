"""The installer asks for packages where pip is told to."""

import runpy
from pathlib import Path

INSTALL = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "install.py"))

LISTED = """:env:.find-links='/wheels /more'
global.cert='/certificates.pem'
global.extra-index-url='file:///a/simple\\nfile:///b/simple'
global.find-links='/elsewhere'
global.index-url='https://one/simple'
install.index-url='https://two/simple'
download.index-url='https://three/simple'
"""


def test_settings_of_pip_are_those_of_an_installation_and_variables_outdo_files() -> None:
    assert INSTALL["settings_of"](LISTED) == {
        "find-links": "/wheels /more",
        "cert": "/certificates.pem",
        "extra-index-url": "file:///a/simple\nfile:///b/simple",
        "index-url": "https://two/simple",
    }


def test_uv_is_told_where_packages_are() -> None:
    assert INSTALL["variables"](INSTALL["settings_of"](LISTED)) == {
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/certificates.pem",
        "UV_INDEX": "file:///a/simple file:///b/simple",
        "UV_DEFAULT_INDEX": "https://two/simple",
    }


def test_without_settings_uv_is_told_nothing() -> None:
    assert INSTALL["variables"](INSTALL["settings_of"]("")) == {}

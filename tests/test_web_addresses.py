"""Addresses that servers and people give and that are none of the web: a sentence, and nothing is opened."""

import re
import urllib.error

import pytest
from fake_web import fake_web, page, redirect_to, whole

from moco.download import download
from moco.errors import UserError
from moco.web import new_opener


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def refused(url, folder, reason):
    def never(part):
        raise AssertionError("it was taken for the file")

    with pytest.raises(UserError, match=reason) as raised:  # pause: a second try would take a minute
        download(url, folder / "model.pth", tries=4, pause=60, timeout=5, verify=never)
    sentence = str(raised.value)
    assert "\n" not in sentence and f"{folder} as model.pth" in sentence
    assert list(folder.iterdir()) == []


ADDRESSES = {
    "http://[bad/x": "Invalid IPv6 URL",
    "http://127.0.0.1:x/": "Port could not",
    "http://:80/x": "names no host",
    "ftp://127.0.0.1/x": "not one that starts with http",
    "file:///etc/passwd": "not one that starts with http",
    "data:text/plain,x": "not one that starts with http",
}


@pytest.mark.parametrize(("address", "reason"), ADDRESSES.items())
def test_redirects_and_forms(tmp_path, address, reason):
    form = f'<form id="download-form" action="{address}"></form>'
    for answer in (redirect_to(address), page(form)):
        with fake_web(answer, whole(b"data")) as web:
            reason_here = f"127.0.0.1 refers to the address '{re.escape(address)}', .*followed: .*{reason}"
            refused(f"{web.url}/x", tmp_path, reason_here)
            assert len(web.requests) == 1


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        *ADDRESSES.items(),
        ("http:///x", "names no host"),
        ("http://127.0.0.1:99999/", "Port out of range"),
        ("http://127.0.0.1:9/é", "letters other than ASCII"),
        ("http://127.0.0.1:9/a b", "spaces"),
        ("http://a..b/", "label"),
        ("http://user:word@127.0.0.1/", "nonnumeric port"),
    ],
)
def test_what_a_person_names(tmp_path, address, reason):
    refused(address, tmp_path, f"is not a usable address: .*{reason}")


def test_a_form_with_letters_that_need_encoding(tmp_path):
    with fake_web(page('<form id="download-form" action="/é"></form>'), whole(b"data")) as web:
        refused(f"{web.url}/x", tmp_path, "letters other than ASCII")


def test_a_redirect_is_still_followed_and_its_letters_are_encoded(tmp_path):
    with fake_web(redirect_to("/a b\xe9?c=%20"), whole(b"data")) as web:
        download(f"{web.url}/x", tmp_path / "model.pth")
        assert web.requests[1][0] == "/a%20b%E9?c=%20"
    assert (tmp_path / "model.pth").read_bytes() == b"data"


def test_the_opener_opens_nothing_of_this_machine(tmp_path):
    (tmp_path / "secret").touch()
    for url in (f"file://{tmp_path}/secret", "data:text/plain,x", "ftp://127.0.0.1/x"):
        with pytest.raises(urllib.error.URLError, match="unknown url type"):
            new_opener().open(url, timeout=5)


def test_a_page_that_the_parser_does_not_bear(tmp_path):
    with fake_web(page("<title>Busy</title><![foo bar]><p>Try later</p>")) as web:
        refused(f"{web.url}/x", tmp_path, 'a web page came instead of the file, with the title "Busy"')

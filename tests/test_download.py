"""Downloads are whole or absent: every way in which a server is known to fail, played by one on 127.0.0.1."""

import random
import resource
import socket
import ssl
import urllib.error

import pytest
from fake_web import (
    QUOTA_PAGE,
    fake_web,
    google_drive,
    hang,
    page,
    redirect,
    status,
    virus_scan_page,
    whole,
)

from moco.download import download
from moco.errors import UserError
from moco.web import RefusedError, network_errors

DATA = random.Random(0).randbytes(3_000_000)
OTHER = random.Random(1).randbytes(3_000_000)
LINK = "https://example.org/by-hand"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def get(web, folder, **options):
    options = {"link": LINK, "timeout": 5, "tries": 3, "pause": 0.01, **options}
    return download(f"{web.url}/model.pth", folder / "model.pth", **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def ranges(web):
    return [headers.get("Range") for _, headers in web.requests]


@pytest.mark.parametrize(
    "answers",
    [
        [whole(DATA, etag='"1"')],
        [whole(DATA, length=False)],
        [redirect("/elsewhere"), whole(DATA)],
        [google_drive(whole(DATA))],
        [status(500), status(429), whole(DATA)],
        [hang, whole(DATA)],
        [redirect("/elsewhere"), google_drive(whole(DATA))],
    ],
    ids=["plain", "no length", "redirect", "virus scan", "5xx", "timeout", "redirect and virus scan"],
)
def test_the_file_arrives(tmp_path, answers):
    seen = []

    def verify(part):
        seen.append((part.read_bytes(), names(tmp_path)))

    with fake_web(*answers) as web:
        path = get(web, tmp_path, timeout=0.5, verify=verify)
    assert path.read_bytes() == DATA and names(tmp_path) == ["model.pth"]
    [(checked, present)] = seen
    assert checked == DATA and "model.pth" not in present  # it was checked before it got its name


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([status(404)], "127.0.0.1 answers 404 Not Found"),
        ([page(QUOTA_PAGE)], "quota of this file is used up"),
        ([page(QUOTA_PAGE, code=403)], "quota of this file is used up"),
        (
            [page("<html><title>Oh\n no</title>")],
            'a web page came instead of the file, with the title "Oh no"',
        ),
        ([whole(b"\n<!DOCTYPE html><title>Hidden</title>")], 'a web page .* "Hidden"'),
        ([page("Sorry, try later")], "a web page came instead of the file; try again later"),
        ([redirect("/login"), page("<title>Sign in</title>")], 'a web page .* "Sign in"'),
        ([virus_scan_page], "confirmation again and again"),
        ([redirect("/")], "answers 302 Found again and again"),
        ([status(503)], r"answers 503 Service Unavailable \(3 times in a row\)"),
        ([whole(DATA, stop_after=0)], r"ended after 0.0 of 3.0 MB \(3 times in a row\)"),
        ([hang], r"127.0.0.1 does not answer \(3 times in a row\)"),
        ([whole(DATA, pace=30)], r"127.0.0.1 does not answer .*, and the 3 MB that have arrived are kept"),
    ],
)
def test_a_failure_is_a_sentence_and_leaves_no_file(tmp_path, answers, reason):
    with fake_web(*answers) as web, pytest.raises(UserError, match=reason) as raised:
        get(web, tmp_path, timeout=0.3)
    check_sentence(str(raised.value), tmp_path)


def check_sentence(sentence, folder):
    assert LINK in sentence and f"{folder} as model.pth" in sentence and "\n" not in sentence
    assert set(names(folder)) in (set(), {"model.pth.part", "model.pth.part.json"})


def test_no_network(tmp_path, monkeypatch, free_port):
    with pytest.raises(UserError, match=r"127.0.0.1 cannot be reached \(.*refused\)") as raised:
        download(f"http://127.0.0.1:{free_port}/x", tmp_path / "model.pth", link=LINK, tries=2, pause=0)
    check_sentence(str(raised.value), tmp_path)

    def no_name_server(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_name_server)
    with pytest.raises(
        UserError, match=r"host.invalid cannot be reached .*, is this machine online\?"
    ) as raised:
        download("http://host.invalid/x", tmp_path / "model.pth", link=LINK, tries=2, pause=0)
    check_sentence(str(raised.value), tmp_path)
    assert names(tmp_path) == []


def test_a_wrong_certificate_is_not_tried_again():
    error = ssl.SSLCertVerificationError()
    error.verify_message = "self-signed certificate"
    with (
        pytest.raises(RefusedError, match="certificate of x.org is not valid"),
        network_errors("https://x.org/f"),
    ):
        raise urllib.error.URLError(error)


@pytest.mark.parametrize("etag", ['"1"', None], ids=["etag", "only a size"])
def test_a_dropped_connection_is_continued(tmp_path, etag):
    with fake_web(whole(DATA, etag, stop_after=1_200_000), whole(DATA, etag)) as web:
        assert get(web, tmp_path).read_bytes() == DATA
    assert ranges(web) == [None, "bytes=1200000-"] and names(tmp_path) == ["model.pth"]


def test_drops_do_not_count_while_the_file_grows(tmp_path):
    with fake_web(
        *[whole(DATA, stop_after=1_100_000)] * 2, *[whole(DATA, stop_after=9)] * 2, whole(DATA)
    ) as web:
        assert get(web, tmp_path, tries=4).read_bytes() == DATA
    assert ranges(web)[1:] == [f"bytes={n}-" for n in (1_100_000, 2_200_000, 2_200_009, 2_200_018)]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"1"', whole(OTHER, '"2"'), OTHER),
        ('"1"', whole(OTHER, '"2"', if_range=False), OTHER),
        ('"1"', whole(OTHER, ranges=False), OTHER),
        (None, whole(OTHER + b"more", if_range=False), OTHER + b"more"),
        (None, whole(OTHER[:900], if_range=False), OTHER[:900]),
        ('"1"', whole(DATA, '"1"'), DATA),
    ],
    ids=["If-Range", "another ETag", "no ranges", "another size", "shorter than the part", "the same"],
)
def test_only_the_same_version_is_continued(tmp_path, old, new, expected):
    with fake_web(whole(DATA, old, stop_after=1_500_000), status(404)) as web:
        with pytest.raises(UserError):
            get(web, tmp_path)
        assert (tmp_path / "model.pth.part").read_bytes() == DATA[:1_500_000]  # waits for the next call
        web.requests.clear()
        web.answers = [new]
        assert get(web, tmp_path).read_bytes() == expected
    assert ranges(web)[0] == "bytes=1500000-" and web.requests[0][1].get("If-Range") == old
    assert names(tmp_path) == ["model.pth"]


def test_a_part_of_which_nothing_is_known_is_not_continued(tmp_path):
    (tmp_path / "model.pth.part").write_bytes(b"of another program")
    (tmp_path / "model.pth.part.json").write_text('{"url": "http://127.0.0.1/other", "size": 3000000}')
    with fake_web(whole(DATA)) as web:
        assert get(web, tmp_path).read_bytes() == DATA
    assert ranges(web) == [None]


def test_a_refused_file_is_removed_and_fetched_anew(tmp_path):
    def refuse(part):
        assert part.read_bytes() == DATA
        raise UserError("its md5 is wrong")

    with fake_web(whole(DATA, '"1"')) as web:
        with pytest.raises(UserError, match=r"refused and removed \(its md5 is wrong\)") as raised:
            get(web, tmp_path, verify=refuse)
        check_sentence(str(raised.value), tmp_path)
        assert names(tmp_path) == []
        assert get(web, tmp_path).read_bytes() == DATA
    assert ranges(web) == [None, None]


def test_an_existing_file_is_kept_without_force(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"old")
    with fake_web(whole(DATA)) as web:
        assert get(web, tmp_path).read_bytes() == b"old" and not web.requests
        web.answers = [status(404)]
        with pytest.raises(UserError):
            get(web, tmp_path, force=True)
        assert (tmp_path / "model.pth").read_bytes() == b"old"
        web.answers = [whole(DATA)]
        assert get(web, tmp_path, force=True).read_bytes() == DATA


def test_a_full_disk_and_an_impossible_folder(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with fake_web(whole(DATA)) as web:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            with pytest.raises(
                UserError, match=r"cannot write model.pth into the folder .* \(File too large\)"
            ):
                get(web, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "model.pth.part").stat().st_size == 1_000_000 and not (
            tmp_path / "model.pth"
        ).exists()
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot write .* choose another folder"):
            get(web, tmp_path / "file")

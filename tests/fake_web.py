"""A web server on 127.0.0.1 that behaves as a test tells it: well, or like the servers that break downloads.

    with fake_web(whole(data)) as web:            # every request is answered by whole(data)
        web.answers = [status(500), whole(data)]  # the first by 500, all later ones by the file
        ... web.url ... web.requests ...          # what was asked: (path with query, headers)

An answer is a function that is given the request's handler and writes the response.
"""

import contextlib
import http.server
import os
import re
import threading


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        web = self.server
        with web.lock:
            web.requests.append((self.path, dict(self.headers)))
            answer = web.answers.pop(0) if len(web.answers) > 1 else web.answers[0]
        with contextlib.suppress(ConnectionError):
            answer(self)
        self.close_connection = True

    def start(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def fake_web(*answers):
    """Serve `answers`, one per request, the last one for good; gives the server, with its `url`."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    web.answers, web.requests, web.lock, web.closing = list(answers), [], threading.Lock(), threading.Event()
    web.url = f"http://127.0.0.1:{web.server_port}"
    web.block_on_close = web.daemon_threads = True
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield web
    finally:
        web.closing.set()  # wakes the answers that hang
        web.shutdown()
        thread.join()
        web.server_close()


def whole(data, etag=None, ranges=True, if_range=True, length=True, stop_after=None, pace=None):
    """The file `data`, or the rest that the request's Range asks for.

    ranges=False: always all of it. if_range=False: the header If-Range is ignored. length=False: its size is
    not told. stop_after: the connection is dropped after so many bytes. pace: seconds of waiting before the
    last byte.
    """

    def answer(handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if if_range and handler.headers.get("If-Range", etag) != etag:
            asked = None
        start = int(asked[1]) if asked and ranges else 0
        if start >= len(data):
            return handler.start(416, Content_Range=f"bytes */{len(data)}", Content_Length=0)
        headers = {"Content_Type": "application/octet-stream"} | ({"ETag": etag} if etag else {})
        if length:
            headers["Content_Length"] = len(data) - start
        if asked and ranges:
            handler.start(206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **headers)
        else:
            handler.start(200, **headers)
        body = data[start:][:stop_after]
        handler.wfile.write(body[:-1])
        if pace:
            handler.server.closing.wait(pace)
        return handler.wfile.write(body[-1:])

    return answer


def file_on_disk(path):
    """The file at `path`, sent by the kernel without passing through this process's memory."""

    def answer(handler):
        size = os.path.getsize(path)
        handler.start(200, Content_Type="application/octet-stream", Content_Length=size)
        with open(path, "rb") as file:
            handler.connection.sendfile(file)

    return answer


def page(html, code=200):
    """A web page."""

    def answer(handler):
        body = html.encode()
        handler.start(code, Content_Type="text/html; charset=utf-8", Content_Length=len(body))
        handler.wfile.write(body)

    return answer


def status(code):
    """An error without a page."""
    return lambda handler: handler.start(code, Content_Length=0)


def redirect(path):
    """Elsewhere on the same server."""
    return lambda handler: handler.start(302, Location=handler.server.url + path, Content_Length=0)


def redirect_to(address):
    """Elsewhere, to an address that is given as it stands."""
    return lambda handler: handler.start(302, Location=address, Content_Length=0)


def hang(handler):
    """Nothing, until the server is closed."""
    handler.server.closing.wait(30)


def virus_scan_page(handler):
    """Google Drive's question before a large file, with the form that says yes."""
    page(
        "<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>"
        '<form action="/search"><input type="hidden" name="wrong" value="1"></form>'
        "<p>Google Drive can&#39;t scan this file for viruses.</p>"
        f'<form id="download-form" action="{handler.server.url}/download?at=x&amp;confirm=n" method="get">'
        '<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="1kNj">'
        '<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="1b2c-3d">'
        "</form></body></html>"
    )(handler)


def google_drive(answer):
    """Google Drive before a large file: its question, and `answer` once the form has been sent back."""

    def drive(handler):
        confirmed = handler.path == "/download?at=x&confirm=t&id=1kNj&uuid=1b2c-3d"
        return (answer if confirmed else virus_scan_page)(handler)

    return drive


QUOTA_PAGE = (
    "<html><head><title>Google Drive - Quota exceeded</title></head><body><p>Sorry, you "
    "can't view or download this file at this time.</p><p>Too many users have viewed or downloaded this file "
    "recently. Please try accessing the file again later.</p></body></html>"
)

"""A web server on 127.0.0.1 that answers as a test wants: well, or like the servers that break downloads.

    with fake_web(whole(data)) as web:            # every request is answered by whole(data)
        web.answers = [status(500), whole(data)]  # the first by 500, all later ones by the file
        ... web.url ... web.requests ...          # what was asked: paths with their queries

An answer is a function that is given the request's handler and writes the response.
"""

import contextlib
import http.server
import threading


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        web = self.server
        with web.lock:
            web.requests.append(self.path)
            answer = web.answers.pop(0) if len(web.answers) > 1 else web.answers[0]
        with contextlib.suppress(ConnectionError):
            answer(self)

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


def whole(data, length=True, stop_after=None, pace=None):
    """The file `data`.

    length=False: without Content-Length. stop_after: the connection is dropped after so many bytes. pace:
    seconds of waiting before the last byte.
    """

    def answer(handler):
        size = {"Content_Length": len(data)} if length else {}
        handler.start(200, Content_Type="application/octet-stream", **size)
        body = data[:stop_after]
        handler.wfile.write(body[:-1])
        if pace:
            handler.server.closing.wait(pace)
        handler.wfile.write(body[-1:])

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


def hang(handler):
    """Nothing, until the server is closed."""
    handler.server.closing.wait(30)

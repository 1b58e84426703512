"""Ask a web server for a file, and put into words what comes instead of it.

Google Drive is asked directly, with the standard library. Two maintained packages know Drive: gdown, and
torchvision's `download_file_from_google_drive`, which is gdown and an md5 check. Naming a released model has
to work with nothing but the packages that training needs, so gdown cannot be required; and a second path that
is taken only where gdown happens to be installed would be the one that nobody tests. (gdown 6.5 also waits
without end and does not try again, unless told to, and it continues the partial file of an earlier run
without asking whether the server still has the same version.)

Drive answers with the file; or, for a file that is too large for its virus scan, with a page whose form
`download-form` has to be sent back with its hidden fields; or with a page that says that too many people have
downloaded the file, that one has to sign in, or that there is no such file, some of them with status 200.
"""

import contextlib
import html.parser
import http.client
import re
import ssl
import string
import urllib.error
import urllib.parse
import urllib.request

PAGE_BYTES = 1 << 20  # the most that is read of a web page
HEADERS = {"User-Agent": "Mozilla/5.0 (moco.zoo)", "Accept-Language": "en"}  # the pages are read in English
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that a later request may not meet again


class RefusedError(Exception):
    """Asking again does not help. The message says what happened."""


class BrokenError(Exception):
    """The connection failed; asking again may help. The message says what happened."""


class RangeError(BrokenError):
    """The server has no bytes from where the request wanted to continue: the file there is another one."""


def new_opener():
    """What sends the requests of one download: it follows redirects and keeps the server's cookies.

    build_opener would add handlers that open files of this machine (file:), data: and ftp: addresses too.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPCookieProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Says which address it does not go to; the one of urllib ends in a ValueError or follows to ftp:."""

    def http_error_302(self, request, response, code, message, headers):
        target = headers.get("Location") or headers.get("URI") or ""
        quoted = urllib.parse.quote(target, string.punctuation, "iso-8859-1")  # as the inherited method does
        try:
            _join(request.full_url, quoted)
        except RefusedError:
            response.close()
            raise
        return super().http_error_302(request, response, code, message, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def address_fault(url):
    """What keeps `url` from being an address of the web that can be asked; None when nothing does."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port  # the port is looked at only when it is asked for
    except ValueError as error:
        return str(error)
    if not url.lower().startswith(("http://", "https://")):
        return "it is not one that starts with http:// or https://"
    if not host:
        return "it names no host"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "it holds spaces or letters other than ASCII, which have to be written as %20, %C3%A9 ..."
    return None


def _join(url, target):
    """The address that a page or an answer from `url` sends us to. Raises RefusedError if it is not one."""
    try:
        address = urllib.parse.urljoin(url, target)
        fault = address_fault(address)
    except ValueError as error:
        fault = str(error)
    if fault:
        host = urllib.parse.urlsplit(url).hostname
        raise RefusedError(f"{host} refers to the address {target[:200]!r}, which is not followed: {fault}")
    return address


def open_file(opener, url, headers, timeout):
    """Ask for the file at `url`; return the response (http.client.HTTPResponse) whose body is the file.

    When Google Drive asks whether to go on with a file that it has not scanned for viruses, we say yes.
    `timeout` is in seconds without a byte. Raises RefusedError (a web page instead of a file, 404, quota used
    up), BrokenError (no network, timeout, 5xx) and RangeError (416).
    """
    if fault := address_fault(url):
        raise RefusedError(f"{url} is not a usable address: {fault}")
    for _ in range(3):
        with network_errors(url):
            request = urllib.request.Request(url, headers={**HEADERS, **headers})
            response = opener.open(request, timeout=timeout)
            # The middle of a file may begin with anything, its start never with "<": zip and pickle do not.
            is_page = response.headers.get_content_type() == "text/html" or (
                response.status == 200 and response.peek(64).lstrip().startswith(b"<")
            )
            if not is_page:
                return response
            with response:
                page = WebPage(response.read(PAGE_BYTES))
        if page.action is None:
            raise RefusedError(page.complaint())
        url = page.confirmation(response.url)
    raise RefusedError("Google Drive asks for its confirmation again and again")


@contextlib.contextmanager
def network_errors(url):
    """Turn what urllib, http.client and sockets raise into a RefusedError or BrokenError in plain words."""
    host = urllib.parse.urlsplit(url).hostname
    try:
        yield
    except urllib.error.HTTPError as error:
        raise _status_error(error, host) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # URLError wraps what happened
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise RefusedError(f"the certificate of {host} is not valid ({reason.verify_message})") from None
        if isinstance(reason, TimeoutError):
            raise BrokenError(f"{host} does not answer") from None
        if isinstance(error, urllib.error.URLError):
            raise BrokenError(f"{host} cannot be reached ({reason}), is this machine online?") from None
        if isinstance(error, http.client.InvalidURL):
            raise RefusedError(f"{url} is not a usable address: {error}") from None
        raise BrokenError(f"the connection broke ({str(reason) or type(reason).__name__})") from None
    except ValueError as error:  # from the encoding of a host's name, such as with two dots in a row
        raise RefusedError(f"{url} is not a usable address: {error}") from None


def _status_error(error, host):
    page = b""
    with error, contextlib.suppress(OSError, http.client.HTTPException):
        page = error.read(PAGE_BYTES)
    page = WebPage(page)
    if page.quota:
        return RefusedError(page.complaint())
    kind = RangeError if error.code == 416 else BrokenError if error.code in PASSING else RefusedError
    again = " again and again" if error.code < 400 else ""  # redirects are followed, up to ten
    return kind(f"{host} answers {error.code} {http.client.responses.get(error.code, '')}{again}")


class WebPage(html.parser.HTMLParser):
    """A page that came instead of a file: its `title`, whether it is Google Drive's about a used-up `quota`,
    and the `action` and `fields` of Google Drive's form that asks for confirmation (action None: no form).
    """

    def __init__(self, body):
        super().__init__()
        self.title, self.action, self.fields = "", None, {}
        self._inside = None
        text = body.decode("utf-8", "replace")
        self.quota = re.search("quota exceeded|too many users have viewed", text, re.IGNORECASE) is not None
        with contextlib.suppress(AssertionError):  # what the parser raises at a declaration like <![x y]>
            self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "title" or (tag == "form" and attrs.get("id") == "download-form"):
            self._inside = tag
        if tag == self._inside == "form":
            self.action = attrs.get("action") or ""
        elif tag == "input" and self._inside == "form" and attrs.get("type") == "hidden":
            self.fields[attrs.get("name")] = attrs.get("value") or ""

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data):
        if self._inside == "title":
            self.title += data

    def confirmation(self, url):
        """The address that a browser goes to when it sends the form of the page at `url`.

        Raises RefusedError when the form leads to none of the web.
        """
        parts = urllib.parse.urlsplit(_join(url, self.action))
        fields = {**dict(urllib.parse.parse_qsl(parts.query)), **self.fields}
        return parts._replace(query=urllib.parse.urlencode(fields)).geturl()

    def complaint(self):
        """Why there is no file, in words."""
        if self.quota:
            return "Google Drive's download quota of this file is used up, which can last a day"
        title = " ".join(self.title.split())
        return "a web page came instead of the file" + (f', with the title "{title}"' if title else "")

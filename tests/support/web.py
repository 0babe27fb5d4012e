"""A web server on loopback that shows a folder, in a thread."""

import threading
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from html import escape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import quote


class _Handler(SimpleHTTPRequestHandler):
    """Shows files; ``listing`` is what it shows of a folder: a page, or a status."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, listing, etags, **kwargs):
        self.listing, self.etags = listing, etags
        super().__init__(*args, **kwargs)

    def log_message(self, *args):
        self.server.asked.append((self.command, self.path))

    def send_head(self):
        # a page for each name below "again", without end
        if self.listing == "loop" and "/again/" in f"{self.path}/":
            return self.list_directory(None)
        return super().send_head()

    def list_directory(self, path):
        if isinstance(self.listing, int):
            self.send_error(self.listing)
            return None
        inside = sorted(Path(path or "/nowhere").glob("*"))
        if self.listing == "some":
            links = [p.name + "/" * p.is_dir() for p in inside if p.name in ("zarr.json", "a")]
        elif self.listing == "no slash":
            links = [quote(p.name) for p in inside]
        elif self.listing == "escaped":
            links = [f"./{escape(quote(p.name, safe=':&'))}{'/' * p.is_dir()}" for p in inside]
        elif self.listing == "absolute":
            top = self.path.rstrip("/")
            links = [f"{top}/{quote(p.name)}{'/' * p.is_dir()}" for p in inside]
        elif self.listing == "page":
            links = ["https://example.invalid/help", "/imprint", "?C=M;O=D"]
        elif self.listing == "loop":
            top = self.path.rstrip("/")
            links = [f"{top}/", "./", "../", "../../", f"http://{self.headers['Host']}{top}/"]
            links += ["again/", *(p.name + "/" * p.is_dir() for p in inside)]
        else:
            return super().list_directory(path)
        page = "".join(f'<a href="{link}">{link}</a>' for link in links).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        return BytesIO(page)

    def end_headers(self):
        path = Path(self.translate_path(self.path))
        if self.etags and path.is_file():
            self.send_header("ETag", f'"{sha256(path.read_bytes()).hexdigest()}"')
        super().end_headers()


@contextmanager
def web(folder, listing="links", etags=False):
    """URL of a server that shows a folder.

    Its listings are links to what is there ("links", "escaped", "absolute"), to folders as to
    files ("no slash"), to "a" only ("some"), a page without any ("page"), links that lead in
    circles and ever deeper ("loop"), or an error of a status.
    """
    handler = partial(_Handler, directory=str(folder), listing=listing, etags=etags)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""Chunked bodies that we frame ourselves are what h11's own client reads."""

import h11
import pytest

from receptance.server.protocol import Connection

PIECES = [b"data: {}\n\n", b"", b"x" * 70_000, b"\r\n0\r\n\r\n", b"end"]


@pytest.mark.parametrize("method", ["POST", "HEAD"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("told", [False, True])
def test_bodies_in_pieces_are_read_whole(method, version, told):
    """told: the answer says its length."""
    pieces = [b"" if method == "HEAD" else piece for piece in PIECES]
    server, client = Connection(h11.SERVER), h11.Connection(h11.CLIENT)
    server.receive_data(f"{method} / HTTP/{version}\r\nHost: a\r\n\r\n".encode())
    assert [type(server.next_event()) for _ in range(2)] == [h11.Request, h11.EndOfMessage]
    headers = [("content-length", str(sum(map(len, pieces))))] if told else []
    events = [h11.Response(status_code=200, headers=headers), *(h11.Data(data=x) for x in pieces), h11.EndOfMessage()]
    written = b"".join(server.send(event) or b"" for event in events)
    assert (b"transfer-encoding: chunked" in written.lower()) == (version == "1.1" and not told)

    client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(written)
    client.receive_data(b"")
    body = b""
    while not isinstance(event := client.next_event(), h11.EndOfMessage):
        body += event.data if isinstance(event, h11.Data) else b""
    assert body == b"".join(pieces)

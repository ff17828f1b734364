"""HTTP/1.1 as uvicorn speaks it, with a bound on how long a request's head may take (uvicorn itself waits for ever)
and a short way for the pieces of a stream."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD = 64 << 10  # bytes of a request line with its headers


class Connection(h11.Connection):
    """Frames the pieces of a chunked body itself: h11 takes longer for one than all of ours does for a token."""

    _is_chunked = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        if isinstance(event, h11.Data) and self._is_chunked and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        data = super().send(event)
        if isinstance(event, h11.Response):
            self._is_chunked = data is not None and b"\r\ntransfer-encoding: chunked\r\n" in data.lower()
        return data


def protocol(header_seconds: float) -> type[H11Protocol]:
    """For `uvicorn.Config(http=…)`: a connection whose request line and headers take longer is closed with 408.

    It counts from the connection's opening, and after an answer from the first byte of the next request; between them
    uvicorn's `timeout_keep_alive` holds.
    """

    class Protocol(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def __init__(self, *arguments: Any, **more: Any):
            super().__init__(*arguments, **more)
            self.conn = Connection(h11.SERVER, HEAD)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._late = self.loop.call_later(header_seconds, self._give_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._late is None:
                self._late = self.loop.call_later(header_seconds, self._give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _give_up(self) -> None:
            self._late = None
            if not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                self.transport.close()

    return Protocol

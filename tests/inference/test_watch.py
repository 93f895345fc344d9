"""Live sources: what is dropped, opened again and said, and how late decisions are."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from stvit_video import predict
from stvit_video.data import live
from stvit_video.data.streams import read_ahead
from stvit_video.inference.prediction import Window
from stvit_video.inference.watch import Watched
from tests.conftest import numbered_frames


class Unsteady(SimpleHTTPRequestHandler):
    """Serves files, but not to the first requests, and says nothing of their length."""

    refuses = 2
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if Unsteady.refuses:
            Unsteady.refuses -= 1
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        content = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def unsteady(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(live, "LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(Unsteady, "refuses", 2)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Unsteady, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("is_live", [True, False])
def test_the_oldest_of_what_waits_is_dropped_of_a_live_source(is_live: bool) -> None:
    """The reader is not held up: it reads all while the first piece is worked on."""
    ended = threading.Event()

    def read(source: str) -> Iterator[int]:
        yield from range(10)
        ended.set()

    pieces = read_ahead(["camera"], read, 1, lambda piece: is_live)
    found = [next(pieces)]
    assert ended.wait(60) if is_live else not ended.wait(0.2)
    found += pieces
    numbers = [piece for _, piece in found[:-1]]
    assert found[-1] == (0, None)
    assert numbers[-2:] == [8, 9]
    assert len(numbers) <= 3 if is_live else numbers == [*range(10)]


def test_an_address_is_opened_again(
    trained: Path, write_clip: Callable[..., Path], unsteady: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twice it answers with an error, once with the stream, and then with the stream once more."""
    write_clip(numbered_frames(50, 72, 96), "stream.mkv")
    words = [f"{unsteady}/stream.mkv", "--checkpoint", str(trained), "--window", "1", "--output", f"{tmp_path}/x.json"]
    assert predict.main([*words, "--reconnect", "1"]) == 1
    assert "cannot be read as a stream" in json.loads((tmp_path / "x.json").read_text())[0]["error"]
    Unsteady.refuses = 2
    capfd.readouterr()
    code, said = predict.main([*words, "--reconnect", "3"]), capfd.readouterr()
    assert code == 0, said
    assert said.err.count("opened again in") == 3
    assert said.err.count(f"{unsteady}/stream.mkv ended; opened again") == 1
    (found,) = json.loads((tmp_path / "x.json").read_text())
    spans = [(row["start"], row["end"]) for row in found["timeline"]]
    assert spans[:2] == [(0, 1), (1, 2)]
    assert len(spans) == 4
    assert spans[2][0] > 0
    assert spans[3][1] - spans[2][0] == pytest.approx(2)
    assert 0 < found["latency"]["p50"] <= found["latency"]["p95"]
    assert found["dropped"] == 0
    assert "latency from a window's last frame to its result: " in said.out


def test_a_pipe_that_is_silent_is_said_once_and_waited_for(
    trained: Path,
    write_clip: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(live, "TIMEOUT_S", 0.2)
    content = write_clip(numbered_frames(50, 72, 96), "stream.mkv").read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def fill() -> None:
        with open(pipe, "wb") as file:
            time.sleep(1.5)
            file.write(content)

    threading.Thread(target=fill, daemon=True).start()
    assert predict.main([str(pipe), "--checkpoint", str(trained), "--window", "1"]) == 0
    said = capfd.readouterr()
    assert said.err.count(f"no frame of {pipe} for 0.2 s") == 1
    assert "0:01.0 to    0:02.0" in said.out


def test_decisions_are_counted_and_kept_only_where_they_are_written() -> None:
    for kept in (False, True):
        result = Watched("0", ["a"], kept=kept)
        assert result.describe() == ""
        for number in (0, 1, 5):
            arrived = time.monotonic() - 100
            result.add(Window(np.array([]), None, 0.5, 0.25, is_short=True, arrived=arrived, number=number))
        assert len(result.windows) == (3 if kept else 0)
        assert (result.count, result.short, result.dropped) == (3, 3, 3)
        assert (result.decode_s, result.model_s) == (1.5, 0.75)
        assert "3 windows dropped, as the network is slower: raise --step" in result.describe()
        assert result.figures()["latency"]["p50"] == pytest.approx(100, abs=50)


def test_only_addresses_are_opened_again(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (str(tmp_path / "pipe"), "video.mp4"):
        assert predict.main([name, "--checkpoint", str(trained), "--reconnect", "2"]) == 2
        assert "--reconnect 2 opens a camera or address again" in capfd.readouterr().err

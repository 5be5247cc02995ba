import hashlib
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxnets import errors
from jaxnets.data.download import download

CONTENT = np.random.default_rng(0).bytes(1_000_000)


def fetch(urls, target, content=CONTENT, **options):
    """Download with the right size and digest, quickly and silently."""
    options = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "progress": False,
        "pause_s": 0.001,
        "timeout_s": 5,
    } | options
    return download(urls, target, **options)


def left_in(folder):
    """The files there, but for locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_downloads_into_a_new_folder(serve, tmp_path):
    server = serve(CONTENT)
    target = tmp_path / "new" / "folder" / "file.bin"
    assert fetch(f"{server.url}/good", target) == target
    assert target.read_bytes() == CONTENT
    assert left_in(target.parent) == ["file.bin"]
    assert server.requests == [("/good", None)]


def test_asks_for_nothing_when_it_is_there(serve, tmp_path):
    server = serve(CONTENT)
    target = tmp_path / "file.bin"
    target.write_bytes(CONTENT)  # put there by hand
    fetch(f"{server.url}/good", target)
    assert server.requests == []


@pytest.mark.parametrize("there", [b"something else", CONTENT[:-1] + b"x"])
def test_never_overwrites_a_file_that_is_there(serve, tmp_path, there):
    server = serve(CONTENT)
    target = tmp_path / "file.bin"
    target.write_bytes(there)
    with pytest.raises(errors.DataError, match=r"file\.bin: it.*expected.*remove it") as error:
        fetch(f"{server.url}/good", target)
    message(error)
    assert target.read_bytes() == there
    assert server.requests == []


def test_resumes_by_range(serve, tmp_path):
    server = serve(CONTENT)
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:300_000])
    fetch(f"{server.url}/good", tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [("/good", "bytes=300000-")]


def test_a_whole_part_is_only_checked(serve, tmp_path):
    server = serve(CONTENT)
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    fetch(f"{server.url}/good", tmp_path / "file.bin")
    assert left_in(tmp_path) == ["file.bin"]
    assert server.requests == []


@pytest.mark.parametrize("kind", ["no-range", "416", "other-range"])
def test_starts_over_when_the_server_will_not_resume(serve, tmp_path, kind):
    server = serve(CONTENT)
    (tmp_path / "file.bin.part").write_bytes(b"?" * 300_000)  # would spoil it, if it were kept
    fetch(f"{server.url}/{kind}", tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests[0] == (f"/{kind}", "bytes=300000-")


def test_a_part_that_is_too_long_is_thrown_away(serve, tmp_path):
    server = serve(CONTENT)
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    fetch(f"{server.url}/good", tmp_path / "file.bin")
    assert server.requests == [("/good", None)]


@pytest.mark.parametrize("kind", ["cut/400000", "no-length/0"])
def test_goes_on_after_a_cut_connection(serve, tmp_path, kind):
    server = serve(CONTENT)
    fetch(f"{server.url}/{kind}", tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    if kind.startswith("cut"):
        assert [wanted for _, wanted in server.requests] == [
            None,
            "bytes=400000-",
            "bytes=800000-",
        ]


def test_gives_up_after_some_cuts_and_keeps_what_came(serve, tmp_path):
    server = serve(CONTENT)
    with pytest.raises(errors.DataError, match=r"after 30,000 of 1,000,000.*3 times") as error:
        fetch(f"{server.url}/cut/10000", tmp_path / "file.bin", num_tries=3)
    assert str(tmp_path) in message(error)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:30_000]
    assert left_in(tmp_path) == ["file.bin.part"]
    fetch(f"{server.url}/good", tmp_path / "file.bin")
    assert server.requests[-1] == ("/good", "bytes=30000-")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_wrong_bytes_are_removed(serve, tmp_path):
    server = serve(CONTENT)
    with pytest.raises(errors.DataError, match=r"SHA-256 is .* expected") as error:
        fetch(f"{server.url}/wrong", tmp_path / "file.bin")
    assert server.sha256 in message(error)
    assert left_in(tmp_path) == []


def test_a_part_of_another_file_is_found_out(serve, tmp_path):
    server = serve(CONTENT)
    (tmp_path / "file.bin.part").write_bytes(b"?" * 300_000)
    with pytest.raises(errors.DataError, match="SHA-256"):
        fetch(f"{server.url}/good", tmp_path / "file.bin")
    assert left_in(tmp_path) == []
    fetch(f"{server.url}/good", tmp_path / "file.bin")  # "try again", as the message says


def test_a_file_of_another_length_is_not_fetched(serve, tmp_path):
    server = serve(CONTENT)
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:300_000])
    with pytest.raises(errors.DataError, match=r"has 999,999 bytes, expected 1,000,000"):
        fetch(f"{server.url}/short", tmp_path / "file.bin")
    assert len(server.requests) == 1
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:300_000]  # for another mirror


def test_not_found_is_not_asked_for_again(serve, tmp_path):
    server = serve(CONTENT)
    with pytest.raises(errors.DataError, match="HTTP 404") as error:
        fetch(f"{server.url}/404", tmp_path / "file.bin")
    text = message(error)
    assert f"{server.url}/404" in text
    assert f"into {tmp_path} by hand" in text
    assert "--data-dir" in text
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(serve, tmp_path):
    server = serve(CONTENT)
    fetch(f"{server.url}/503", tmp_path / "file.bin")
    assert len(server.requests) == 2


def test_a_server_that_falls_silent_is_left(serve, tmp_path):
    server = serve(CONTENT)
    server.content = CONTENT[:100_000]
    # It says nothing of its length, sends a part and then keeps the line open.
    with pytest.raises(errors.DataError, match="timed out"):
        fetch(f"{server.url}/hang", tmp_path / "file.bin", timeout_s=0.2, num_tries=1)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:100_000]


def test_mirrors_are_tried_in_turn(serve, tmp_path, closed_port_url):
    server = serve(CONTENT)
    urls = [closed_port_url, f"{server.url}/404", f"{server.url}/wrong", f"{server.url}/good"]
    fetch(urls, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/404", "/wrong", "/good"]


def test_a_mirror_goes_on_where_another_was_cut(serve, tmp_path):
    server = serve(CONTENT)
    urls = [f"{server.url}/cut/250000", f"{server.url}/good"]
    fetch(urls, tmp_path / "file.bin", num_tries=1)
    assert server.requests[-1] == ("/good", "bytes=250000-")


@pytest.mark.parametrize("why", ["refused", "not known"])
def test_no_network(tmp_path, closed_port_url, monkeypatch, why):
    if why == "not known":

        def look_up(*_, **__):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(errors.DataError, match=rf"no connection: .*{why}") as error:
        fetch(closed_port_url, tmp_path / "file.bin", pause_s=100)  # and isn't waited for
    assert closed_port_url in message(error)
    assert left_in(tmp_path) == []


def test_progress_is_reported_from_where_it_resumes(serve, tmp_path):
    server = serve(CONTENT)
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:300_000])
    seen = []
    fetch(
        f"{server.url}/good",
        tmp_path / "file.bin",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[0] == (300_000, 1_000_000)
    assert seen[-1] == (1_000_000, 1_000_000)
    assert seen == sorted(seen)
    fetch(f"{server.url}/good", tmp_path / "file.bin", progress=lambda *_: pytest.fail("idle"))


def test_progress_without_a_terminal_is_two_lines(serve, tmp_path, capsys):
    server = serve(CONTENT)
    fetch(f"{server.url}/good", tmp_path / "file.bin", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["downloading file.bin (1.0 MB)", "downloaded file.bin"]
    fetch(f"{server.url}/good", tmp_path / "file.bin", progress=True)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(serve, tmp_path, capsys, monkeypatch):
    server = serve(CONTENT)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fetch(f"{server.url}/good", tmp_path / "file.bin", progress=True)
    shown = capsys.readouterr().err
    assert "file.bin" in shown
    assert "1.0/1.0 MB" in shown


def test_an_interrupt_keeps_what_came(serve, tmp_path):
    server = serve(CONTENT)

    def interrupt(done, total):
        if done > 400_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server.url}/good", tmp_path / "file.bin", progress=interrupt)
    part = (tmp_path / "file.bin.part").read_bytes()
    assert len(part) > 400_000
    assert CONTENT.startswith(part)


def test_two_processes_fetch_it_once(serve, tmp_path):
    server = serve(CONTENT)
    target = tmp_path / "file.bin"
    code = textwrap.dedent(f"""
        from pathlib import Path
        from jaxnets.data.download import download
        download({server.url + "/slow"!r}, Path({str(target)!r}), size={len(CONTENT)},
                 sha256={server.sha256!r}, progress=False)
        print(Path({str(target)!r}).stat().st_size)
    """)
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [(process.communicate(timeout=20)[0], process.returncode) for process in processes]
    assert results == [(f"{len(CONTENT)}\n", 0)] * 2
    assert target.read_bytes() == CONTENT
    assert left_in(tmp_path) == ["file.bin"]
    assert server.requests == [("/slow", None)]


def test_a_folder_that_cannot_be_written(tmp_path, as_nobody):
    tmp_path.chmod(0o755)
    report = as_nobody(
        f"""
        from pathlib import Path
        from jaxnets import errors
        from jaxnets.data.download import download
        for folder in ({str(tmp_path)!r}, {str(tmp_path / "new")!r}):
            try:
                download("http://nowhere.invalid/x", Path(folder) / "x", size=1, sha256="")
            except errors.DataError as error:
                print(error)
        """
    )
    lines = report.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "can't write in the data folder" in line
        assert "Permission denied" in line
        assert "--data-dir" in line
    assert os.listdir(tmp_path) == []


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.DataError, match="can't write in the data folder") as error:
        fetch("http://nowhere.invalid/x", tmp_path / "file" / "below" / "x")
    message(error)

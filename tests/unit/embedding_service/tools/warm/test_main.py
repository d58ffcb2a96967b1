"""The whole of `embedding-warm` against a real HTTP server on loopback."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedding_service.tools.warm import __main__ as warm_cache
from tests.support.embedding_server import refusal, told, warm

if TYPE_CHECKING:
    from tests.support.embedding_server import FakeService


# --- the main job


def test_a_second_run_is_answered_from_the_cache(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert warm(service, corpus, "--json") == 0
    first = told(capsys)
    assert warm(service, corpus, "--json") == 0
    second = told(capsys)
    assert (first["texts"], first["cached"], first["computed"], first["failed"]) == (100, 0, 100, 0)
    assert (second["texts"], second["cached"], second["computed"], second["failed"]) == (100, 100, 0, 0)


def test_the_final_line_tells_texts_seconds_rate_and_where_they_came_from(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warm(service, corpus)
    line = capsys.readouterr().out
    assert line.startswith("100 texts in ")
    assert line.endswith("texts/s: from cache 0 (0.0%), computed 100, failed 0\n")


def test_every_text_is_sent_once_in_bulk_and_without_out_only_one_component_is_asked_for(
    service: FakeService, corpus: Path
) -> None:
    warm(service, corpus, "--batch", "7")
    assert sorted(service.texts_sent) == sorted(corpus.read_text().splitlines())
    assert {len(request["texts"]) for request in service.requests} == {7, 100 % 7}
    assert {request["dimensions"] for request in service.requests} == {1}
    assert service.priorities == {"bulk"}


def test_options_reach_the_request(service: FakeService, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDING_API_KEY", "secret")
    warm(service, corpus, "--model", "m", "--prompt-name", "query", "--ttl", "60", "--priority", "interactive")
    first = service.requests[0]
    assert (first["model_id"], first["prompt_name"], first["cache_ttl_seconds"]) == ("m", "query", 60)
    assert service.priorities == {"interactive"}
    assert service.authorization == "Bearer secret"


@pytest.mark.parametrize("told_by", ["option", "variable"])
def test_a_key_is_read_from_a_file(
    service: FakeService, corpus: Path, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    keys = corpus.with_name("keys")
    keys.write_text("first-key,second-key\n")
    if told_by == "variable":
        monkeypatch.setenv("EMBEDDING_API_KEY_FILE", str(keys))
    warm(service, corpus, *(["--api-key-file", str(keys)] if told_by == "option" else []))
    assert service.authorization == "Bearer first-key"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), (" \n", "is empty"), ("secr\u00e9t", "printable ASCII")]
)
def test_a_key_file_that_cannot_be_used_is_told_in_one_line_without_the_key(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    keys = corpus.with_name("keys")
    if content is not None:
        keys.write_text(content)
    with pytest.raises(SystemExit) as ended:
        warm(service, corpus, "--api-key-file", str(keys))
    line = capsys.readouterr().err
    assert (ended.value.code, line.count("\n")) == (2, 1)
    assert message in line
    assert "secr" not in line


def test_an_empty_file_is_no_error(service: FakeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").touch()
    assert warm(service, tmp_path / "empty.txt", "--json", "--out", str(tmp_path / "x.npy")) == 0
    assert told(capsys)["texts"] == 0
    assert np.load(tmp_path / "x.npy").shape == (0, 0)


def test_a_finished_run_leaves_no_progress_file(service: FakeService, corpus: Path) -> None:
    warm(service, corpus, "--out", str(corpus.with_name("x.npy")))
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["corpus.txt", "x.npy"]


# --- lines that cannot be read


def test_unreadable_lines_are_named_counted_as_failed_and_passed_over(
    service: FakeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mixed.txt"
    file.write_bytes(b"good\n\nbad \xff byte\n   \nalso good\n")
    assert warm(service, file, "--json") == 1
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["texts"], summary["failed"], summary["blank_lines"]) == (3, 1, 2)
    assert "line 3: not UTF-8: byte 0xff at column 5" in err
    assert service.texts_sent == ["good", "also good"]


def test_strict_stops_at_the_first_text_that_fails(
    service: FakeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text('"a"\nnonsense\n"b"\n')
    assert warm(service, file, "--strict", "--batch", "1") == 1
    assert "line 2: not JSON" in capsys.readouterr().err
    assert (tmp_path / "mixed.jsonl.warm_cache.json").exists()


def test_many_failures_are_counted_not_printed(
    service: FakeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("nonsense\n" * 100)
    assert warm(service, file, "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"] == 100
    assert len(err.splitlines()) == warm_cache.MAX_REPORTED_FAILURES + 1


# --- resuming


def stop_half_way(service: FakeService, corpus: Path) -> None:
    service.misbehave = lambda request: refusal(503, "gone") if "text number 50" in request["texts"] else None
    assert warm(service, corpus, "--batch", "10", "--patience", "0.001") == 1
    service.misbehave = lambda _: None
    service.requests.clear()


def test_restart_begins_at_the_first_line(service: FakeService, corpus: Path) -> None:
    stop_half_way(service, corpus)
    assert warm(service, corpus, "--restart") == 0
    assert len(service.texts_sent) == 100


def test_a_changed_file_starts_over(service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_half_way(service, corpus)
    corpus.write_text(corpus.read_text().replace("number 1", "number one"))
    assert warm(service, corpus) == 0
    assert len(service.texts_sent) == 100
    assert "starting over" in capsys.readouterr().err


def test_other_settings_start_over(service: FakeService, corpus: Path) -> None:
    stop_half_way(service, corpus)
    assert warm(service, corpus, "--prompt-name", "query") == 0
    assert len(service.texts_sent) == 100


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b'{"key": 1}', b'{"key": {}, "progress": {"x": 1}}'])
def test_a_damaged_progress_file_starts_over(service: FakeService, corpus: Path, content: bytes) -> None:
    corpus.with_name("corpus.txt.warm_cache.json").write_bytes(content)
    assert warm(service, corpus) == 0
    assert len(service.texts_sent) == 100


def test_failures_of_the_first_part_still_count_in_the_exit_code(service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text("nonsense\n" + "".join(f'"text number {i}"\n' for i in range(100)))
    stop_half_way(service, file)
    assert warm(service, file) == 1


# --- streams, signals, mistakes


SCRIPT = Path(__file__).resolve().parents[5] / "scripts" / "warm_cache.py"


def start(service: FakeService, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SCRIPT, "--url", service.url, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_standard_input_is_read_and_the_bar_stays_out_of_a_log(service: FakeService) -> None:
    out, err = start(service, "-", "--json").communicate("one\ntwo\n", timeout=30)
    assert (json.loads(out)["texts"], err) == (2, "")
    assert service.texts_sent == ["one", "two"]


def test_ctrl_c_while_standard_input_is_silent_leaves_cleanly_with_what_was_done(service: FakeService) -> None:
    seen = threading.Event()
    service.misbehave = lambda _: seen.set()
    with start(service, "-", "--batch", "1") as process:
        assert process.stdin is not None
        process.stdin.write("one\n")
        process.stdin.flush()
        assert seen.wait(30)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stdout is not None
        assert process.stderr is not None
        assert "stopped after line" in process.stdout.read()
        assert process.stderr.read() == ""


def test_ctrl_c_keeps_what_is_done_in_order_for_the_next_run(service: FakeService, corpus: Path) -> None:
    reached, release = threading.Event(), threading.Event()

    def hold(request: dict[str, Any]) -> None:
        if "text number 30" in request["texts"]:
            reached.set()
            service._lock.release()
            release.wait(30)
            service._lock.acquire()

    service.misbehave = hold
    with start(service, str(corpus), "--batch", "10", "--concurrency", "1", "--json") as process:
        assert reached.wait(30)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        release.set()
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["line"] == 30
    service.misbehave = lambda _: None
    assert warm(service, corpus) == 0
    assert not corpus.with_name("corpus.txt.warm_cache.json").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param(["missing.txt"], "no such file or directory", id="file"),
        pytest.param(["/"], "is a directory", id="directory"),
        pytest.param(["-", "--state", "x"], "standard input cannot be resumed", id="state of a stream"),
        pytest.param(["x", "--out", "x.csv"], "must end in .npy or .jsonl", id="output format"),
        pytest.param(["x", "--out", "/nowhere/x.npy"], "no place for a file", id="output folder"),
        pytest.param(["x", "--dimensions", "3"], "name --out too", id="dimensions"),
        pytest.param(["x.jsonl", "--out", "./x.jsonl"], "must be different files", id="output over input"),
        pytest.param(["x", "--state", "x"], "must be different files", id="state over input"),
        pytest.param(["x", "--url", "localhost:8888"], "is no http:// URL", id="url"),
        pytest.param(["x", "--batch", "0"], "whole number above 0", id="batch"),
        pytest.param(["x", "--patience", "nan"], "seconds above 0", id="seconds"),
        pytest.param([], "required: FILE", id="nothing"),
    ],
)
def test_a_mistake_is_one_clear_line(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = warm_cache.main(options)
    except SystemExit as exited:
        code = int(exited.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert reason in err
    assert err.count("\n") == 1


def test_a_url_that_does_not_answer_is_reported_at_once(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warm_cache.main([str(corpus), "--url", "http://127.0.0.1:1"], program="warm_cache.py") == 2
    assert capsys.readouterr().err == (
        "warm_cache.py: nothing answers at http://127.0.0.1:1: is the service up? (--url names another)\n"
    )


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_request_the_service_refuses_as_such_stops_the_run(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    service.misbehave = lambda _: refusal(status, "model_id: 'x' is not served here", "model_id")
    assert warm(service, corpus) == 2
    assert f"status {status}: model_id: 'x' is not served here" in capsys.readouterr().err


def test_a_folder_that_cannot_hold_the_progress_file_is_said_before_the_work(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert warm(service, corpus, "--state", str(corpus / "x")) == 2
    assert "--state puts the progress file elsewhere" in capsys.readouterr().err
    assert service.requests == []


def test_a_progress_file_is_never_written_over_a_device(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert warm(service, corpus, "--state", "/dev/null") == 2
    assert "/dev/null: not a regular file" in capsys.readouterr().err


# --- what a person sees


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_rate_and_share_from_the_cache(
    service: FakeService, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    warm(service, corpus)
    assert "100%" in terminal.getvalue()
    assert "texts/s, 0.0% from cache" in terminal.getvalue()


def test_without_rich_one_line_says_how_to_get_the_bar(
    service: FakeService, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert warm(service, corpus) == 0
    assert terminal.getvalue() == "no progress bar without rich: pip install 'rich>=13.9'\n"


def test_help_explains_and_the_script_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        warm_cache.main(["--help"])
    assert exited.value.code == 0
    assert "resuming:" in capsys.readouterr().out
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize(
    ("option", "printed"), [("--help", "usage: embedding-warm "), ("--version", "embedding-warm ")]
)
def test_the_command_is_named_as_it_is_installed(option: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        warm_cache.main([option])
    assert exited.value.code == 0
    assert capsys.readouterr().out.startswith(printed)


def test_the_script_runs_in_any_folder_and_without_the_package_installed(tmp_path: Path) -> None:
    hidden = (
        "import importlib.metadata as m, runpy, sys\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.distribution = missing\n"
        f"sys.argv = ['warm_cache.py', '--version']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    for command in ([SCRIPT, "--version"], ["-c", hidden]):
        run = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert run.stdout.startswith("warm_cache.py ")
    assert run.stdout == "warm_cache.py (not installed)\n"

"""veneer chat in a terminal: what is typed while an answer is printed. The rest of it is in test_generate.py."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time

import pytest

pytestmark = pytest.mark.unit

# A chat whose answers begin, wait until the terminal has more, and repeat the question.
SLOW = """
import select, sys, time
from veneer.commands import chat
def said(opened, turns, name, asked):
    yield "Well"
    if turns[-1]["content"] == "first":
        select.select([sys.stdin], [], [], 30)
        time.sleep(0.3)
    if turns[-1]["content"] == "broken":
        raise KeyboardInterrupt
    yield f", {turns[-1]['content']}."
chat.open_named, chat.sides, chat.said = (lambda source, compute, device: None), (lambda opened, asked: ["model"]), said
chat.say_what_is_not_followed = lambda opened, asked: None
try:
    chat.talk("x")
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.fixture
def terminal():
    """A chat in a terminal of its own: what it shows, up to a text, and what is typed."""
    own, its = pty.openpty()
    # A session of its own, whose terminal this is; a plain one, whose line editor moves no cursor.
    command = [sys.executable, "-c", f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{SLOW}"]
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, start_new_session=True, env={**os.environ, "TERM": "dumb"}
    )

    def until(text):
        seen, end = "", time.monotonic() + 60
        while not seen.endswith(text):
            assert time.monotonic() < end, seen
            if select.select([own], [], [], 0.2)[0]:
                seen += os.read(own, 4096).decode().replace("\r", "")
        return seen

    yield until, lambda text: os.write(own, text.encode()), its
    process.kill()
    process.wait()
    os.close(own)
    os.close(its)


def test_what_is_typed_during_an_answer_is_the_next_question_and_not_amid_the_answer(terminal):
    until, type_, _ = terminal
    assert until("you> ").startswith("An empty line or Ctrl-D ends")
    type_("first\n")
    assert until("Well") == "first\nmodel> Well"
    type_("second\nthird\nunfini")
    assert until("unfini") == (
        ", first.\nyou> second\nmodel> Well, second.\nyou> third\nmodel> Well, third.\nyou> unfini"
    )
    type_("shed\n")
    assert until("you> ") == "shed\nmodel> Well, unfinished.\nyou> "


def test_a_chat_that_is_stopped_leaves_a_terminal_that_echoes(terminal):

    until, type_, its = terminal
    until("you> ")
    type_("broken\n")
    until("stopped\n")
    assert termios.tcgetattr(its)[3] & termios.ECHO

"""Bytes that nobody wrote on purpose, and a watch over what reads them: mutations of files, of JSON, and limits."""

import contextlib
import copy
import json
import os
import pathlib
import re
import resource
import signal
import sys

import numpy as np
from hypothesis import strategies as st

SECONDS = 10  # of the processor, for one small file
ROOM = 2**32  # bytes that a reader may take on top of what the process has
HUGE = (2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 2**24)
DEEP = 100_000  # brackets

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 2**31, 2**53, -(2**63), 10**30, 10**400]),
    st.sampled_from([-0.5, 1.5, 1e308, float("inf"), float("nan")]),
    st.sampled_from(["", "x", "\0", "../secret", "/secret", "\ud800", "[", "{% for %}", "nan", "name(a=1)"]),
    st.sampled_from([[], [[]], [1], ["x", 1], [None], [{}], {}, {"": None}, {"x": {"y": []}}, {"content": 3}]),
)


@st.composite
def of_bytes(draw, content):
    """Draws a mutation of some bytes, or bytes that have nothing to do with them."""
    kind = draw(st.sampled_from(["flip", "flip", "size", "size", "cut", "cut", "repeat", "drop", "insert", "random"]))
    if kind == "random" or not content:
        return draw(st.binary(max_size=200))
    data = bytearray(content)
    place = draw(st.integers(0, len(data) - 1))
    if kind == "flip":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif kind == "size":
        width, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
        data[place : place + width] = (draw(st.sampled_from(HUGE)) % 256**width).to_bytes(width, order)
    elif kind == "cut":
        del data[place:]
    else:
        end = min(len(data), place + draw(st.integers(1, 64)))
        if kind == "repeat":
            data[place:end] = bytes(data[place:end]) * draw(st.sampled_from([2, 3, 1000]))
        elif kind == "drop":
            del data[place:end]
        else:
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
    return bytes(data)


def nodes(value, path=()):
    """Yields the paths of everything inside a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from nodes(item, (*path, key))


@st.composite
def of_json(draw, value):
    """Draws JSON text with another value, no value, or nothing but brackets at some place."""
    path = draw(st.sampled_from(list(nodes(value))))
    kind = draw(st.sampled_from(["other", "other", "other", "gone", "deep", "copied"]))
    mark = "\ufdd0 here"
    whole = {"": copy.deepcopy(value)}
    here, key = whole, ""
    for part in path:
        here, key = here[key], part
    if kind == "gone":
        del here[key]
    elif kind == "copied":
        here[key] = draw(st.sampled_from([[here[key]], {"x": here[key]}, [here[key]] * 3]))
    else:
        here[key] = mark if kind == "deep" else draw(VALUES)
    text = json.dumps(whole.get(""))
    return text.replace(json.dumps(mark), "[" * DEEP + "]" * DEEP).encode()


def of_lines(lines):
    """Draws JSON lines of which one is other JSON, or bytes."""

    def joined(choice):
        number, line = choice
        return b"\n".join([json.dumps(x).encode() for x in lines[:number]] + [line, b""]) + b"\n".join(
            json.dumps(x).encode() for x in lines[number + 1 :]
        )

    places = st.integers(0, len(lines) - 1)
    one = places.flatmap(lambda i: st.tuples(st.just(i), of_json(lines[i]) | of_bytes(json.dumps(lines[i]).encode())))
    return one.map(joined)


def padded(header):
    """Draws `.npy` files of another header and of 64 bytes."""

    def made(text):
        body = text.encode("latin1", "replace")[:60_000]
        return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + bytes(64)

    def swapped(choice):
        word, value = choice
        return re.sub(re.escape(word), lambda _: value, header, count=1)

    values = ["-1", "0", str(2**62), "1e9", "True", "'O'", "'|V0'", "'<f4,(1,2)O'", "[", "(" * 150, "-" * 9000, "{}"]
    values += ["'<f4'", "[('a', 'O')]", "[('a', '<f4', (99999, 99999))]", "'<M8[999999999999s]'", "\0", "'<f16'"]
    words = re.findall(r"'[^']*'|\d+|False", header)
    return st.tuples(st.sampled_from(words), st.sampled_from(values)).map(swapped).map(made)


DONE = []  # what the watched code has done that reading a file never does
WATCHED = {"pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"}
WATCHED |= {"socket.connect", "socket.getaddrinfo", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}
_watching = [False]


def _audit(event, arguments):
    if not _watching[0]:
        return
    if event in WATCHED:
        DONE.append((event, str(arguments)))
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
        if os.path.basename(path) == "secret" or flags & (os.O_WRONLY | os.O_RDWR):
            DONE.append((event, path))


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched():
    """Bounds memory and processor time of a block, and notes what it does that reading never does; not nested."""

    def late(*_):
        raise AssertionError(f"a small file took more than {SECONDS} s of the processor")

    mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    _watching[0] = True
    try:
        yield
    finally:
        _watching[0] = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, before)
    done, DONE[:] = DONE[:], []
    assert not done, done


def arrays(**columns):
    """Returns the bytes of an `.npz`."""
    import io

    out = io.BytesIO()
    np.savez(out, **columns)
    return out.getvalue()

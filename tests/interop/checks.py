"""Python and Rust call each other over a real broker: each check is one promise of docs/wire.md. `run` starts this."""

import argparse
import contextlib
import json
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid

import pika
from pika.exceptions import ChannelClosedByBroker

import wire
from client import EXCHANGES, Client, Fault, NoService, ServiceError, Timeout, encode
from server import Group, Server
from wire import CBOR, JSON, RAW, Frame

# Nothing here takes long. This only makes a hang a failure.
PATIENCE = 60
DEMO, PYSERV, GROUP = "demo.v1", "pyserv.v1", "interop"
CHECKS = {"rust server": [], "python server": [], "group": []}


def check(side):
    def note(function):
        CHECKS[side].append(function)
        return function

    return note


class Process:
    """A program that was started, and the lines it prints."""

    def __init__(self, *command, **options):
        self.command = command[0]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def line(self, start):
        """The rest of the next line that begins with `start`."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                line = self.lines.get(timeout=max(0, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line `{start}...` from {self.command}") from None
            assert line is not None, f"{self.command} ended before a line `{start}...`"
            if line.startswith(start):
                return line[len(start) :].strip()

    def terminate(self):
        """Stops the program and returns its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def kill(self):
        self.process.kill()
        self.process.wait()


class Bench:
    """What the checks of one direction need."""

    def __init__(self, url, client, process, hopline):
        self.url, self.client, self.process, self.hopline = url, client, process, hopline
        self.instance = process.line("ready ")

    def cli(self, target, arguments, *options):
        command = [self.hopline, "call", target, json.dumps(arguments), "--url", self.url, *options]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)

    def until_taken(self):
        """Waits until the queue of calls is empty, because a consumer has its messages."""
        until = time.monotonic() + PATIENCE
        while self.client.channel.queue_declare("hopline.demo.v1.calls", passive=True).method.message_count:
            assert time.monotonic() < until, "the calls stay in their queue"

    def one_letter(self, name):
        """Gets the next message of a queue."""
        channel = self.client.connection.channel()
        for delivery, properties, body in channel.consume(name, inactivity_timeout=PATIENCE):
            assert delivery, f"no message in {name}"
            channel.basic_ack(delivery.delivery_tag)
            break
        channel.close()
        return properties, body


@contextlib.contextmanager
def raises(kind, status=None):
    try:
        yield
    except kind as error:
        assert status is None or error.status == status, f"{error} is not {status}"
    else:
        raise AssertionError(f"no {kind.__name__}")


def equal(left, right):
    assert left == right, f"{left!r} is not {right!r}"


# ----------------------------------------------------------------- the Python client and the Rust server


@check("rust server")
def a_result_comes_back_in_every_serialization(bench):
    equal(bench.client.call(DEMO, "fib", 10), 89)
    equal(bench.client.call(DEMO, "fib", 10, serialization=JSON), 89)
    id = bench.client.start(DEMO, "echo", b"\x00\xff", serialization=RAW)
    reply = bench.client.wait(id, PATIENCE)
    equal((reply.serialization, reply.payload), (RAW, b"\x00\xff"))
    frame = bench.client.frame(wire.REQUEST, "add", None, wire.MESSAGE_PACK)
    frame.payload = bytes.fromhex("92 02 03")
    bench.client.request(frame, "hopline.rpc", DEMO, f"{DEMO}.add", PATIENCE)
    reply = bench.client.wait(frame.id, PATIENCE)
    equal((reply.serialization, reply.status, reply.payload), (wire.MESSAGE_PACK, "OK", b"\x05"))


@check("rust server")
def a_record_is_a_map_by_names(bench):
    reply = bench.client.call(DEMO, "exp", 2, 10)
    equal((reply["value"], set(reply)), (1024, {"value", "cost_nanos"}))


@check("rust server")
def no_arguments_are_an_empty_array_and_no_result_is_null(bench):
    equal(bench.client.call(DEMO, "whoami"), bench.instance)
    equal(bench.client.call(DEMO, "sleep", 0), None)


@check("rust server")
def a_reply_names_its_instance_and_how_long_it_took(bench):
    reply = bench.client.wait(bench.client.start(DEMO, "sleep", 20), PATIENCE)
    equal(reply.metadata[wire.INSTANCE], bench.instance)
    assert 20_000 <= reply.metadata[wire.HANDLER_TIME_US] < PATIENCE * 1_000_000


@check("rust server")
def an_instance_can_be_addressed(bench):
    equal(bench.client.call(DEMO, "whoami", instance=bench.instance), bench.instance)
    with raises(NoService):
        bench.client.call(DEMO, "whoami", instance="nobody")


@check("rust server")
def an_unknown_method_is_unimplemented(bench):
    with raises(Fault, "UNIMPLEMENTED"):
        bench.client.call(DEMO, "nonsense")


@check("rust server")
def arguments_that_do_not_fit_are_invalid(bench):
    for arguments in ([], ["ten"], [1, 2], [-1]):
        for serialization in (CBOR, JSON):
            with raises(Fault, "INVALID_ARGUMENT"):
                bench.client.call(DEMO, "fib", *arguments, serialization=serialization)
    with raises(Fault, "INVALID_ARGUMENT"):
        bench.client.call(DEMO, "fib", b"raw", serialization=RAW)


@check("rust server")
def what_nobody_serves_is_returned(bench):
    with raises(NoService):
        bench.client.call("interop-nobody.v1", "fib", 10)
    with raises(NoService):
        bench.client.call("demo.v999", "fib", 10)
    with raises(NoService):
        bench.client.broadcast("interop-nobody.v1", "fib", 10)
    equal((bench.client.is_served(DEMO), bench.client.is_served("interop-nobody.v1")), (True, False))


@check("rust server")
def a_methods_own_error_is_typed(bench):
    for serialization in (CBOR, JSON):
        try:
            bench.client.call(DEMO, "div", 1, 0, serialization=serialization)
            raise AssertionError("no error")
        except ServiceError as error:
            equal(error.args[0], "DivisionByZero")
    reply = bench.client.wait(bench.client.start(DEMO, "div", 1, 0), PATIENCE)
    equal((reply.status, reply.flags), ("UNKNOWN", wire.SERVICE_ERROR))


@check("rust server")
def a_panic_is_internal_and_the_server_goes_on(bench):
    with raises(Fault, "INTERNAL"):
        bench.client.call(DEMO, "panic")
    equal(bench.client.call(DEMO, "add", 2, 3), 5)


@check("rust server")
def a_oneway_call_runs(bench):
    line = f"grüße {uuid.uuid4()}"
    bench.client.oneway(DEMO, "note", line)
    equal(bench.process.line("note:"), line)


@check("rust server")
def a_retried_call_is_answered_once(bench):
    retried_calls_run_once(bench, DEMO)


def retried_calls_run_once(bench, service):
    client, line, last = bench.client, f"once {uuid.uuid4()}", f"last {uuid.uuid4()}"
    call = client.start(service, "note", line)
    ran = client.wait(call, PATIENCE)
    equal((ran.status, wire.HANDLER_TIME_US in ran.metadata), ("OK", True))
    # Another attempt has its own id, and so has its reply. No handler ran for it.
    retry = client.start(service, "note", line, again=call)
    assert retry != call
    told = client.wait(retry, PATIENCE)
    equal((told.id, told.status, told.payload), (retry, "OK", ran.payload))
    assert wire.HANDLER_TIME_US not in told.metadata, told.metadata
    equal(bench.process.line("note:"), line)
    # A oneway call with the same id as a request is a different call. It is not repeated either.
    client.oneway(service, "note", line, again=call)
    equal(bench.process.line("note:"), line)
    client.oneway(service, "note", line, again=call)
    client.oneway(service, "note", last)
    equal(bench.process.line("note:"), last)


@check("rust server")
def a_broadcast_reaches_the_instance(bench):
    equal(bench.client.broadcast(DEMO, "whoami"), {bench.instance: bench.instance})


@check("rust server")
def every_instance_tells_what_it_serves(bench):
    equal(bench.client.discover("hopline.ping"), {bench.instance: None})
    info = bench.client.discover("hopline.info")[bench.instance]
    equal((next(iter(info)), info["type"]), ("type", "hopline.v1.info"))
    equal((info["service"], info["instance"]), (DEMO, bench.instance))
    methods = {method["name"]: method["idempotent"] for method in info["methods"]}
    equal((methods["fib"], methods["add"], list(methods)), (True, False, sorted(methods)))
    stats = bench.client.discover("hopline.stats")[bench.instance]
    equal((stats["service"], stats["running"]), (DEMO, 0))
    equal((next(iter(stats)), stats["type"]), ("type", "hopline.v1.stats"))
    assert stats["finished"] > 0, stats
    of = {method["name"]: method for method in stats["methods"]}
    assert of["fib"]["finished"] > 0 and of["fib"]["faults"]["INVALID_ARGUMENT"] > 0, of["fib"]
    equal((of["div"]["service_errors"], of["panic"]["faults"]), (3, {"INTERNAL": 1}))
    for times in (of["fib"]["handler_time"], of["fib"]["queue_time"]):
        assert times["count"] == sum(times["buckets"]) > 0 and len(times["buckets"]) == 17, times


@check("rust server")
def two_frames_of_one_body_have_two_replies(bench):
    frames = [bench.client.frame(wire.REQUEST, "add", pair, CBOR) for pair in ([2, 3], [4, 5])]
    bench.client.replies |= {frame.id: [] for frame in frames}
    bench.client.publish("hopline.rpc", DEMO, *frames, reply_to=bench.client.reply_queue)
    results = [bench.client.wait(frame.id, PATIENCE).payload for frame in frames]
    equal(results, [encode(CBOR, 5), encode(CBOR, 9)])


@check("rust server")
def a_deadline_that_passes_while_it_runs_is_answered(bench):
    frame = bench.client.frame(wire.REQUEST, "sleep", [600_000], CBOR)
    frame.metadata[wire.REMAINING_MS] = 2000
    bench.client.request(frame, "hopline.rpc", DEMO, f"{DEMO}.sleep", PATIENCE)
    equal(bench.client.wait(frame.id, PATIENCE).status, "DEADLINE_EXCEEDED")


@check("rust server")
def a_cancel_ends_a_call_that_runs_and_one_that_waits(bench):
    # The server was started with a prefetch of 1: while one call runs, it gets no other.
    runs = bench.client.start(DEMO, "sleep", 600_000, timeout=1200)
    with raises(Timeout):
        bench.client.call(DEMO, "add", 2, 3, timeout=0.3)
    waits = bench.client.start(DEMO, "sleep", 600_000, timeout=1200)
    bench.client.cancel(waits, DEMO, seconds_left=1200)
    bench.client.cancel(runs, DEMO, seconds_left=1200)
    equal(bench.client.call(DEMO, "add", 2, 3, timeout=PATIENCE), 5)


@check("rust server")
def a_redelivered_request_is_aborted_unless_it_is_idempotent(bench):
    blocker = bench.client.start(DEMO, "sleep", 600_000, timeout=1200)
    bench.until_taken()  # While it runs, the server gets nothing else.
    calls = [bench.client.start(DEMO, method, *arguments) for method, arguments in (("add", [2, 3]), ("fib", [10]))]
    channel = bench.client.connection.channel()
    taken = channel.consume("hopline.demo.v1.calls", inactivity_timeout=PATIENCE)
    bodies = [next(taken)[2] for _ in calls]
    assert all(bodies), "the requests are not in the queue"
    channel.close()  # Both are requeued, and marked as redelivered.
    bench.client.cancel(blocker, DEMO, seconds_left=1200)
    aborted, ran = (bench.client.wait(id, PATIENCE) for id in calls)
    equal((aborted.status, ran.status, ran.payload), ("ABORTED", "OK", encode(CBOR, 89)))


@check("rust server")
def garbage_is_answered_where_it_names_a_queue_and_an_id(bench):
    client, id = bench.client, uuid.uuid4()
    good = Frame(wire.REQUEST, id=id, metadata={wire.METHOD: "whoami"}, payload=b"\x80").encode()
    for body, status in [
        (b"garbage", "INVALID_ARGUMENT"),
        (b"", "INVALID_ARGUMENT"),
        (good[:30], "INVALID_ARGUMENT"),
        (good[:2] + b"\x02" + good[3:], "UNIMPLEMENTED"),
        (good[:32] + b"\xff" + good[33:], "INVALID_ARGUMENT"),
    ]:
        client.replies[id] = []
        properties = pika.BasicProperties(reply_to=client.reply_queue, correlation_id=str(id))
        client.publish_body("hopline.rpc", DEMO, body, properties)
        reply = client.wait(id, PATIENCE)
        equal((reply.status, reply.payload), (status, b""))


@check("rust server")
def garbage_is_kept_as_a_dead_letter_where_it_names_none(bench):
    client = bench.client
    client.publish_body("hopline.rpc", DEMO, b"garbage", pika.BasicProperties())
    properties, body = bench.one_letter("hopline.demo.v1.dead")
    equal((body, properties.delivery_mode), (b"garbage", 2))
    headers = properties.headers
    assert "magic" in headers["x-hopline-reason"], headers
    equal(headers["x-hopline-instance"], bench.instance)
    equal((headers["x-hopline-exchange"], headers["x-hopline-key"]), ("hopline.rpc", DEMO))


@check("rust server")
def a_request_without_a_reply_queue_is_kept_as_a_dead_letter(bench):
    frame = bench.client.frame(wire.REQUEST, "add", [2, 3], CBOR)
    bench.client.publish("hopline.rpc", DEMO, frame)
    _, body = bench.one_letter("hopline.demo.v1.dead")
    equal(list(wire.decode(body)), [frame])


@check("rust server")
def a_oneway_call_that_cannot_be_read_is_kept_as_a_dead_letter(bench):
    bench.client.oneway(DEMO, "note", 1, 2)
    properties, _ = bench.one_letter("hopline.demo.v1.dead")
    assert "note" in properties.headers["x-hopline-reason"], properties.headers


@check("rust server")
def a_long_reason_fits_into_its_reply_and_its_dead_letter(bench):
    # The reason quotes the argument. In full it would not fit into metadata, nor headers into a frame of AMQP.
    with raises(Fault, "INVALID_ARGUMENT"):
        bench.client.call(DEMO, "fib", "x" * 65_500)
    oneway = bench.client.frame(wire.ONEWAY, "fib", ["x" * 65_500], CBOR)
    bench.client.publish("", "hopline.demo.v1.work", oneway)
    bench.one_letter("hopline.demo.v1.dead")


@check("rust server")
def compressed_arguments_are_read_and_bombs_are_refused(bench):
    client, arguments = bench.client, encode(CBOR, [list(b"hopline " * 1000)])

    def sent(compression, payload):
        frame = client.frame(wire.REQUEST, "echo", None, CBOR)
        frame.flags, frame.payload = compression, payload
        client.request(frame, "hopline.rpc", DEMO, f"{DEMO}.echo", PATIENCE)
        return client.wait(frame.id, PATIENCE)

    reply = sent(wire.LZ4, wire.compressed(wire.LZ4, arguments))
    equal((reply.status, reply.plain()), ("OK", arguments[1:]))
    assert reply.metadata[wire.ACCEPTS] & 0b10, reply.metadata
    bomb = wire.compressed(wire.LZ4, bytes(17 * 1024 * 1024))
    equal(sent(wire.LZ4, bomb).status, "RESOURCE_EXHAUSTED")
    equal(sent(wire.LZ4, bomb[:100]).status, "RESOURCE_EXHAUSTED")
    equal(sent(wire.LZ4, b"\x00\x00\xff\x00" + bomb[4:100]).status, "INVALID_ARGUMENT")
    # It is built in or not.
    status = "OK" if reply.metadata[wire.ACCEPTS] & 0b01 else "UNIMPLEMENTED"
    equal(sent(wire.ZSTD, wire.compressed(wire.ZSTD, arguments)).status, status)


@check("rust server")
def headers_of_many_bytes_harm_nobody(bench):
    frame = bench.client.frame(wire.REQUEST, "add", [2, 3], CBOR)
    bench.client.replies[frame.id] = []
    bench.client.publish("hopline.rpc", DEMO, frame, reply_to=bench.client.reply_queue, headers={"x": "y" * 60_000})
    equal(bench.client.wait(frame.id, PATIENCE).payload, encode(CBOR, 5))


@check("rust server")
def the_declarations_of_the_document_are_those_of_the_server(bench):
    # Declaring again with other arguments would be refused with 406.
    twin = Server(bench.url, DEMO, {})
    twin.connection.close()


@check("rust server")
def a_server_that_is_told_to_end_drains(bench):
    # It waits for running calls. A call that was cancelled is not running.
    id = bench.client.start(DEMO, "sleep", 300)
    bench.until_taken()
    bench.client.broadcast(DEMO, "whoami")
    equal(bench.process.terminate(), 0)
    equal(bench.client.wait(id, PATIENCE).status, "OK")


# ----------------------------------------------------------------- the Rust client and the Python server


@check("python server")
def rust_gets_a_result(bench):
    done = bench.cli("pyserv.add", [2, 3])
    equal((done.stdout, done.returncode), ("5\n", 0))


@check("python server")
def rust_gets_a_typed_error(bench):
    done = bench.cli("pyserv.fail", [])
    equal((done.stdout, done.returncode), ("", 1))
    assert '{"Refused":{"why":"as asked"}}' in done.stderr, done.stderr


@check("python server")
def rust_reads_a_compressed_result(bench):
    done = bench.cli("pyserv.repeat", ["hopline ", 1000])
    equal((done.stdout, done.returncode), (json.dumps("hopline " * 1000) + "\n", 0))


@check("python server")
def rust_hears_of_an_unknown_method(bench):
    done = bench.cli("pyserv.nonsense", [])
    equal(done.returncode, 64 + 12)
    assert "UNIMPLEMENTED" in done.stderr, done.stderr


@check("python server")
def rust_hears_of_arguments_that_do_not_fit(bench):
    done = bench.cli("pyserv.add", [2])
    equal(done.returncode, 64 + 3)
    assert "INVALID_ARGUMENT" in done.stderr, done.stderr


@check("python server")
def rust_reaches_one_instance(bench):
    equal(bench.cli("pyserv.add", [2, 3], "--to", bench.instance).stdout, "5\n")
    done = bench.cli("pyserv.add", [2, 3], "--to", "nobody")
    equal(done.returncode, 1)
    assert "no instance `nobody` of `pyserv.v1`" in done.stderr, done.stderr


@check("python server")
def rust_does_not_wait_longer_than_its_deadline(bench):
    done = bench.cli("pyserv.slow", [3_600_000], "--timeout", "5s")
    equal(done.returncode, 1)
    assert "no reply within 5s" in done.stderr, done.stderr


@check("python server")
def python_serves_python(bench):
    client = bench.client
    equal(client.call(PYSERV, "add", 2, 3), 5)
    client.oneway(PYSERV, "note", "hello")
    equal(bench.process.line("note:"), "hello")
    id = client.start(PYSERV, "slow", 600_000, timeout=1200)
    client.cancel(id, PYSERV, seconds_left=1200)
    equal(bench.process.line("cancelled"), "slow")
    client.publish_body("hopline.rpc", PYSERV, b"garbage", pika.BasicProperties())
    equal(bench.one_letter("hopline.pyserv.v1.dead")[1], b"garbage")


@check("python server")
def python_answers_a_retried_call_once(bench):
    retried_calls_run_once(bench, PYSERV)


@check("python server")
def a_oneway_call_is_delivered_twenty_times(bench):
    bench.client.oneway(PYSERV, "fail")
    properties, _ = bench.one_letter("hopline.pyserv.v1.dead")
    assert "x-death" in properties.headers, properties.headers
    attempts = [bench.process.line("failed") for _ in range(20)]
    equal((attempts, bench.process.lines.empty()), (["fail"] * 20, True))


@check("python server")
def the_python_server_drains(bench):
    equal(bench.process.terminate(), 0)


# ----------------------------------------------------------------- a group of Rust and Python


@contextlib.contextmanager
def member(bench, handler, **options):
    """An instance of the group, in Python, until the end of the block."""
    group = Group(bench.url, GROUP, "demo.*", handler, **options)
    thread = threading.Thread(target=group.run)
    thread.start()
    try:
        yield group
    finally:
        group.stop()
        thread.join(PATIENCE)
    assert not thread.is_alive(), "it does not drain"


@check("group")
def rust_and_python_share_the_events_of_a_group_and_handle_each_once(bench):
    heard = {"rust": [], "python": []}
    with member(bench, lambda _, number: heard["python"].append(number)):
        for number in range(40):
            bench.client.event("demo.number", number)
        until = time.monotonic() + PATIENCE
        while len(heard["rust"]) + len(heard["python"]) < 40:
            assert time.monotonic() < until, heard
            with contextlib.suppress(queue.Empty):
                line = bench.process.lines.get(timeout=0.05)
                heard["rust"].append(int(line.removeprefix("event: demo.number ")))
    equal(sorted(heard["rust"] + heard["python"]), list(range(40)))
    assert heard["rust"] and heard["python"], f"one of them got nothing: {heard}"


@check("group")
def an_event_that_fails_in_python_is_a_dead_letter_that_rust_replays(bench):
    equal(bench.process.terminate(), 0)
    attempts, repaired, done = [], threading.Event(), queue.Queue()

    def handler(_, number):
        attempts.append(number)
        if not repaired.is_set():
            raise Fault("UNAVAILABLE", "not repaired yet")
        done.put(number)

    def dead(*words):
        command = [bench.hopline, "dead", *words, "--url", bench.url]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout

    with member(bench, handler, attempts=3, pause_ms=20):
        bench.client.event("demo.number", 7)
        until = time.monotonic() + PATIENCE
        while not json.loads(letters := dead("ls", f"group:{GROUP}", "--json")):
            assert time.monotonic() < until, "no dead letter"
        equal(attempts, [7, 7, 7])
        assert "not repaired yet" in letters, letters
        assert f"group:{GROUP}" in dead("ls"), "the catalogue has the group"
        repaired.set()
        dead("replay", f"group:{GROUP}", "--all", "--yes")
        equal(done.get(timeout=PATIENCE), 7)


# ----------------------------------------------------------------- running them


class Names:
    """What the checks declare on the broker. At the end it removes what was not there before."""

    def __init__(self, client):
        self.client = client
        self.mine = []
        exchanges = [("exchange", f"hopline.{name}") for name in EXCHANGES]
        for service in (DEMO, PYSERV):
            self.mine += [("queue", f"hopline.{service}.{name}") for name in ("calls", "work", "dead")]
        self.mine += [("queue", f"hopline.group:{GROUP}.{name}") for name in ("work", "retry", "dead")]
        self.mine = [name for name in self.mine if not self.consumers(*name)[0]]
        # The client has declared the shared exchanges. They are deleted only if nothing is bound to them.
        self.mine += exchanges

    def consumers(self, kind, name):
        """Whether the exchange or queue exists, and how many consumers it has."""
        channel = self.client.connection.channel()
        try:
            if kind == "exchange":
                channel.exchange_declare(name, passive=True)
                consumers = 0
            else:
                consumers = channel.queue_declare(name, passive=True).method.consumer_count
        except ChannelClosedByBroker:
            return False, 0
        channel.close()
        return True, consumers

    def remove(self):
        for kind, name in self.mine:
            channel = self.client.connection.channel()
            with contextlib.suppress(ChannelClosedByBroker):
                if kind == "exchange":
                    channel.exchange_delete(name, if_unused=True)
                elif self.consumers(kind, name)[1] == 0:
                    channel.queue_delete(name)
            if channel.is_open:
                channel.close()


def run_checks(side, bench):
    failed = 0
    for function in CHECKS[side]:
        name = function.__name__.replace("_", " ")
        try:
            function(bench)
            print(f"ok      {side}: {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {side}: {name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
    return len(CHECKS[side]) - failed, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, help="the example server of Hopline, built")
    parser.add_argument("--hopline", required=True, help="Hopline's command, built")
    parser.add_argument("url", help="the broker's")
    options = parser.parse_args()
    # So that `finally` runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    url, here = options.url, pathlib.Path(__file__).parent
    client = Client(url)
    names = Names(client)
    for service in (DEMO, PYSERV):
        if names.consumers("queue", f"hopline.{service}.calls")[1]:
            sys.exit(f"somebody serves {service} on this broker: the checks would get its answers")
    started, totals = [], []
    try:
        # A prefetch of 1 shows whether a call still runs: while it does, no other is delivered.
        environment = {"PREFETCH": "1", "RUST_LOG": "off"}
        for side, command, more in [
            ("rust server", [options.server, url], {"env": environment}),
            ("python server", [sys.executable, str(here / "server.py"), url], {}),
            ("group", [options.server, url], {"env": environment | {"GROUP": GROUP}}),
        ]:
            started.append(Process(*command, **more))
            totals.append(run_checks(side, Bench(url, client, started[-1], options.hopline)))
    finally:
        for process in started:
            process.kill()
        names.remove()
        client.close()
    passed, failed = map(sum, zip(*totals))
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""RPC with aio-pika as its documentation does it: `aio_pika.patterns.RPC`, which pickles what it carries."""

import argparse
import asyncio
import json
import signal
import sys
import time

from aio_pika import connect_robust
from aio_pika.patterns import RPC

METHOD = "compare.aio_pika.echo"
# As all contenders that have it from their users.
PREFETCH = 64
WARM_UP = 1.0


async def echo(*, payload):
    return payload


async def serve(url):
    connection = await connect_robust(url)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=PREFETCH)
    # A run that was killed may have left its backlog.
    await channel.queue_delete(METHOD)
    rpc = await create(channel)
    await rpc.register(METHOD, echo, durable=True)
    print("serving", flush=True)
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told_to_stop.set)
    await told_to_stop.wait()
    await connection.close()


async def create(channel):
    # RabbitMQ 4.3 refuses queues that are neither durable nor exclusive, which are aio-pika's default.
    return await RPC.create(channel, exclusive=True)


class Run:
    """What the callers of a load share."""

    def __init__(self, rpc, size):
        self.rpc = rpc
        self.size = size
        self.latencies = []
        self.errors = 0
        self.measuring = False
        self.over = False

    async def calls(self, number):
        payload = payload_of(number, self.size)
        while not self.over:
            sent = time.perf_counter()
            try:
                right = await self.rpc.call(METHOD, {"payload": payload}) == payload
            except Exception as error:
                right = False
                self.failed(repr(error))
            else:
                if not right:
                    self.failed("the reply is not what was sent")
            if right and self.measuring:
                self.latencies.append(time.perf_counter() - sent)

    def failed(self, why):
        # Of many errors, the first tells the most.
        if self.errors == 0:
            print(f"a call failed: {why}", file=sys.stderr)
        self.errors += 1

    def micros(self, part):
        last = len(self.latencies) - 1
        return round(self.latencies[min(last, int(part * len(self.latencies)))] * 1e6) if last >= 0 else None


def payload_of(number, size):
    """Different for each caller, so that a reply that went to another one is seen."""
    stamp = number.to_bytes(8, "little")
    return bytes(stamp[i % 8] ^ (i * 31 & 255) for i in range(size))


async def call(url, concurrency, seconds, size):
    connection = await connect_robust(url)
    rpc = await create(await connection.channel())
    probe = payload_of(0, size)
    if await asyncio.wait_for(rpc.call(METHOD, {"payload": probe}), 10) != probe:
        raise SystemExit("the first reply is not what was sent")

    run = Run(rpc, size)
    callers = [asyncio.create_task(run.calls(number)) for number in range(concurrency)]
    await asyncio.sleep(WARM_UP)
    began, cpu_before = time.perf_counter(), time.process_time()
    run.measuring = True
    print("measuring", flush=True)
    await asyncio.sleep(seconds)
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu_before
    run.measuring, run.over = False, True
    print("measured", flush=True)

    # Each caller finishes its last call: its reply is looked at as well.
    await asyncio.gather(*callers)
    await connection.close()
    run.latencies.sort()
    calls = len(run.latencies)
    report = {
        "calls_per_s": calls / elapsed,
        "p50_us": run.micros(0.5),
        "p99_us": run.micros(0.99),
        "p999_us": run.micros(0.999),
        "calls": calls,
        "errors": run.errors,
        "concurrency": concurrency,
        "size": size,
        "cpu_us_per_call": cpu * 1e6 / calls if calls else None,
    }
    print(json.dumps(report), flush=True)


def main():
    parser = argparse.ArgumentParser(description="RPC with aio-pika")
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("serve").add_argument("--url", required=True)
    caller = roles.add_parser("call")
    caller.add_argument("--url", required=True)
    caller.add_argument("--concurrency", type=int, default=64)
    caller.add_argument("--seconds", type=float, default=5)
    caller.add_argument("--size", type=int, default=64)
    caller.add_argument("--style", choices=["call"], default="call")
    told = parser.parse_args()
    if told.role == "serve":
        asyncio.run(serve(told.url))
    else:
        asyncio.run(call(told.url, told.concurrency, told.seconds, told.size))


main()

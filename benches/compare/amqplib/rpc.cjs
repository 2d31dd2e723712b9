// RPC with amqplib as its tutorial 6 does it: a queue of replies for the client alone, and a map of who waits for which.

'use strict';

const { parseArgs } = require('node:util');
const { setTimeout: sleep } = require('node:timers/promises');
const amqplib = require('amqplib');

const REQUESTS = 'compare.amqplib.requests';
// As all contenders that have it from their users. The tutorial's 1 would serve one call at a time.
const PREFETCH = 64;
const WARM_UP_MS = 1000;
const FIRST_CALL_WITHIN_MS = 10_000;

// Without it each lone call waits 40 ms for Nagle's algorithm.
const SOCKET = { noDelay: true };

async function serve(url) {
  const connection = await amqplib.connect(url, SOCKET);
  const channel = await connection.createChannel();
  // A run that was killed may have left its backlog.
  await channel.deleteQueue(REQUESTS);
  // RabbitMQ 4.3 refuses the tutorial's queue, which is neither durable nor exclusive.
  await channel.assertQueue(REQUESTS, { durable: true });
  await channel.prefetch(PREFETCH);
  await channel.consume(REQUESTS, (request) => {
    const { replyTo, correlationId } = request.properties;
    channel.sendToQueue(replyTo, request.content, { correlationId });
    channel.ack(request);
  });
  console.log('serving');
  for (const name of ['SIGTERM', 'SIGINT']) process.once(name, () => process.exit());
}

/** Makes calls: a message there, a message back. */
async function client(url) {
  const connection = await amqplib.connect(url, SOCKET);
  const channel = await connection.createChannel();
  const { queue: replyTo } = await channel.assertQueue('', { exclusive: true });
  const waiting = new Map();
  let nextId = 0;
  const answered = (reply) => {
    const { correlationId } = reply.properties;
    waiting.get(correlationId)?.(reply.content);
    waiting.delete(correlationId);
  };
  // A reply that is lost with this client would find nobody waiting: nothing to acknowledge.
  await channel.consume(replyTo, answered, { noAck: true });
  return (payload) =>
    new Promise((resolve) => {
      const correlationId = String(nextId++);
      waiting.set(correlationId, resolve);
      channel.sendToQueue(REQUESTS, payload, { correlationId, replyTo });
    });
}

async function call(url, { concurrency, seconds, size }) {
  const send = await client(url);
  const probe = payloadOf(0, size);
  const late = sleep(FIRST_CALL_WITHIN_MS, undefined, { ref: false }).then(() => {
    throw new Error('the first call was not answered');
  });
  const reply = await Promise.race([send(probe), late]);
  if (!probe.equals(reply)) throw new Error('the first reply is not what was sent');

  const latencies = [];
  let errors = 0;
  let measuring = false;
  let over = false;
  const calls = async (number) => {
    const payload = payloadOf(number, size);
    while (!over) {
      const sent = performance.now();
      const reply = await send(payload);
      const took = performance.now() - sent;
      if (!payload.equals(reply)) errors++;
      else if (measuring) latencies.push(took * 1000);
    }
  };
  const callers = Array.from({ length: concurrency }, (_, number) => calls(number));
  await sleep(WARM_UP_MS);
  const began = performance.now();
  const cpuBefore = process.cpuUsage();
  measuring = true;
  console.log('measuring');
  await sleep(seconds * 1000);
  const elapsed = (performance.now() - began) / 1000;
  const cpu = process.cpuUsage(cpuBefore);
  measuring = false;
  over = true;
  console.log('measured');

  // Each caller finishes its last call: its reply is looked at as well.
  await Promise.all(callers);
  const sorted = Float64Array.from(latencies).sort();
  const micros = (part) => (sorted.length ? Math.round(sorted[Math.floor(part * sorted.length)]) : null);
  const report = {
    calls_per_s: sorted.length / elapsed,
    p50_us: micros(0.5),
    p99_us: micros(0.99),
    p999_us: micros(0.999),
    calls: sorted.length,
    errors,
    concurrency,
    size,
    cpu_us_per_call: sorted.length ? (cpu.user + cpu.system) / sorted.length : null,
  };
  console.log(JSON.stringify(report));
  process.exit();
}

/** Different for each caller, so that a reply that went to another one is seen. */
function payloadOf(number, size) {
  const stamp = Buffer.alloc(8);
  stamp.writeUInt32LE(number);
  return Buffer.from(Uint8Array.from({ length: size }, (_, i) => stamp[i % 8] ^ (i * 31)));
}

async function main() {
  const options = {
    url: { type: 'string' },
    concurrency: { type: 'string', default: '64' },
    seconds: { type: 'string', default: '5' },
    size: { type: 'string', default: '64' },
    style: { type: 'string', default: 'call' },
  };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  const { url, concurrency, seconds, size, style } = values;
  if (style !== 'call') throw new Error(`this has no --style ${style}`);
  if (positionals[0] === 'serve') await serve(url);
  else await call(url, { concurrency: Number(concurrency), seconds: Number(seconds), size: Number(size) });
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});

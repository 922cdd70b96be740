/** BullMQ: a queue of tasks for each token, one of results, pub/sub for the rest, keys that say who is alive. */

import { randomBytes } from "node:crypto";
import { createRequire } from "node:module";
import { hostname } from "node:os";
import { Queue, UnrecoverableError, WaitingError, Worker as BullWorker, type Job } from "bullmq";
import { Redis } from "ioredis";
import { redisControl } from "../control.js";
import { descriptorHash } from "../descriptor.js";
import type { WorkerDescriptor } from "../messages.js";
import * as names from "../names.js";
import { sleep, type Host, type Transport } from "./transport.js";

const BEAT_MS = 10_000;
const CLOSE_MS = 2_000;
const BEAT_EXPIRES = 35;
const GIVEN_UP = { removeOnComplete: true, removeOnFail: true };
const { version } = createRequire(import.meta.url)("../../../package.json") as { version: string };

export interface BullMQOptions {
  /** `redis://…`; localhost where there is none. */
  url?: string;
  prefix?: string;
  namespace?: string;
  /** Seconds a job stays ours without a sign of life. */
  lock?: number;
}

export function bullmq(options: BullMQOptions = {}): Transport {
  const url = options.url ?? "redis://127.0.0.1:6379";
  const prefix = names.effectivePrefix(options.prefix, options.namespace);
  const lockDuration = (options.lock ?? 30) * 1_000;
  const instance = `node-${hostname().replace(/[^A-Za-z0-9.-]/g, "-")}-${process.pid}-${randomBytes(3).toString("hex")}`;
  const held = new Map<string, AbortController>();
  const workers: BullWorker[] = [];
  let connection: Redis;
  let answers: { results: Queue; decisions: Queue };
  let beating: NodeJS.Timeout | undefined;
  let keys: string[] = [];

  async function work(host: Host, job: Job, token: string): Promise<void> {
    const lost = new AbortController();
    const key = `${job.queueName}:${job.id}`;
    held.set(key, lost);
    // Unless it was answered it stays as it is: its lock runs out, and BullMQ gives it to the next.
    let end: Error | undefined = new WaitingError();
    try {
      await host.take({
        read: () => job.data as unknown,
        signal: lost.signal,
        async answer(answer) {
          if ("result" in answer) await answers.results.add("result", answer.result, GIVEN_UP);
          else await answers.decisions.add("decision", answer.decision, GIVEN_UP);
          end = undefined;
        },
        async giveBack() {
          await job.moveToWait(token);
        },
        async refuse(why) {
          end = new UnrecoverableError(why); // it stays for a day among the failed ones, with the reason
        },
      });
    } finally {
      held.delete(key);
    }
    if (end) throw end;
  }

  function begin(host: Host, token: string): BullWorker {
    const worker = new BullWorker(names.tasks(prefix, token), (job: Job, key?: string) => work(host, job, key ?? ""), {
      connection,
      concurrency: host.concurrency,
      lockDuration,
      stalledInterval: lockDuration,
      autorun: false,
      removeOnComplete: { count: 0 },
      removeOnFail: { age: 86_400 },
    });
    let complained = false;
    worker.on("error", (error) => {
      if (!complained) host.log("warn", `queue ${worker.name}: ${error.message}; tried again until it works`);
      complained = true;
    });
    worker.on("active", () => (complained = false));
    worker.on("lockRenewalFailed", (ids) => {
      for (const id of ids) held.get(`${worker.name}:${id}`)?.abort();
    });
    return worker;
  }

  async function beat(descriptor: WorkerDescriptor, host: Host): Promise<void> {
    const value = JSON.stringify({
      ts: Date.now(),
      status: { underWay: held.size, concurrency: host.concurrency },
      descriptorHash: descriptorHash(descriptor),
    });
    const said = connection.pipeline();
    for (const token of host.tokens) {
      said.set(names.workerHeartbeat(prefix, token, instance), value, "EX", BEAT_EXPIRES);
      said.set(names.workerDescriptor(prefix, token, instance), JSON.stringify(descriptor), "EX", BEAT_EXPIRES);
    }
    await said.exec();
  }

  return {
    maxMessage: (1 << 20) + (256 << 10),
    control: redisControl(options),

    async start(host) {
      connection = new Redis(url, { maxRetriesPerRequest: null, lazyConnect: true });
      connection.on("error", () => {}); // workers say it
      try {
        await connection.connect();
      } catch (error) {
        connection.disconnect();
        throw new Error(`Redis at ${url} cannot be reached: ${String(error)}. Check the URL, and that it is up.`);
      }
      answers = {
        results: new Queue(names.results(prefix), { connection }),
        decisions: new Queue(names.decisions(prefix), { connection }),
      };
      const descriptor: WorkerDescriptor = {
        instanceId: instance,
        runtime: "node",
        sdk: { name: "durable-worker", version },
        protocol: { version: 1, range: [1, 1] },
        capabilities: ["cancel", "heartbeats", "progress"],
        workflows: [],
        steps: host.steps,
        startedAt: Date.now(),
        ...(host.partition && { partition: host.partition }),
        ...(options.namespace && { namespace: options.namespace }),
      };
      keys = host.tokens.flatMap((token) => [
        names.workerHeartbeat(prefix, token, instance),
        names.workerDescriptor(prefix, token, instance),
      ]);
      await beat(descriptor, host);
      beating = setInterval(() => void beat(descriptor, host).catch(() => {}), BEAT_MS);
      for (const token of host.tokens) {
        const worker = begin(host, token);
        workers.push(worker);
        await worker.waitUntilReady();
        void worker.run().catch((error: unknown) => host.log("error", `queue ${worker.name}: ${String(error)}`));
      }
    },

    async stop() {
      await Promise.all(workers.map((worker) => worker.pause(true)));
    },

    async close() {
      clearInterval(beating);
      // Jobs that were answered a moment ago are still being marked as done: else they would come again.
      const done = new AbortController();
      const closed = Promise.all(workers.map((worker) => worker.close())).then(() => done.abort());
      await Promise.race([closed.catch(() => {}), sleep(CLOSE_MS, done.signal)]);
      await Promise.all(workers.map((worker) => worker.close(true)));
      await connection.del(...keys).catch(() => {}); // they expire by themselves
      await Promise.all([answers.results.close(), answers.decisions.close()]);
      connection.disconnect();
    },

    async heartbeat(beat) {
      await connection.publish(names.heartbeat(prefix), JSON.stringify(beat));
    },
  };
}

/** A worker process for the conformance tests: steps that show what a worker must do. Set up by the environment. */

import { appendFileSync } from "node:fs";
import { NonRetryable, redisControl, RetryAfter, Worker, type Step, type Transport } from "../src/index.js";
import { bullmq } from "../src/transports/bullmq.js";
import { postgres } from "../src/transports/postgres.js";
import { sqs } from "../src/transports/sqs.js";

const { TRANSPORT, URL: url = "", PREFIX: prefix = "", DIARY = "", CONTROL_URL } = process.env;
const transports: Record<string, () => Transport> = {
  bullmq: () => bullmq({ url, prefix, lock: 1 }),
  sqs: () => sqs({ endpoint: url, prefix, visibility: 2, wait: 1 }),
  postgres: () => postgres({ url, prefix, lease: 2 }),
};

/** What happened here, for the test to read. */
const note = (what: string, step: Step) => appendFileSync(DIARY, `${what} ${step.stepId} ${step.attempt}\n`);
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

const worker = new Worker({
  transport: transports[TRANSPORT ?? ""]!(),
  ...(CONTROL_URL && { control: redisControl({ url: CONTROL_URL, prefix }) }),
  steps: {
    "ts.double": (input: { n: number }) => ({ n: input.n * 2 }),
    "ts.who": (_input, { stepId, idempotencyKey, attempt, name, traceparent }) => ({
      stepId,
      idempotencyKey,
      attempt,
      name,
      traceparent,
    }),
    "ts.flaky": (_input, step) => {
      if (step.attempt < 2) throw new Error("not yet");
      return step.attempt;
    },
    "ts.later": (_input, step) => {
      if (step.attempt < 2) throw new RetryAfter("come back", 0.05);
      return step.attempt;
    },
    "ts.decline": () => {
      throw new NonRetryable("card declined", { code: "card_declined", details: { limit: 5 } });
    },
    "ts:large": (input: { text: string }) => input.text.toUpperCase(),
    "ts.too_large": () => "x".repeat(2 << 20),
    "ts.talk": (_input, step) => {
      step.log("begun", { part: 1 });
      step.log("slow", undefined, "warn");
      return null;
    },
    "ts.until_aborted": async (_input, step) => {
      note("started", step);
      await new Promise<void>((resolve) => step.signal.addEventListener("abort", () => resolve()));
      note("aborted", step);
    },
    /** Stuck the first time it is begun, wherever that is. */
    "ts.stuck_once": async (input: { again: string }, step) => {
      note("started", step);
      const { existsSync } = await import("node:fs");
      if (!existsSync(input.again)) await new Promise((resolve) => setTimeout(resolve, 1e8));
      return step.attempt;
    },
    "ts.slow": async (input: { until: string }, step) => {
      note("started", step);
      const { existsSync } = await import("node:fs");
      while (!existsSync(input.until)) await pause(10);
      return "finished";
    },
  },
});

await worker.run();

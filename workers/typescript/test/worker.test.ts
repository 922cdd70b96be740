/** The worker over a transport in memory: what is answered, when it is acknowledged, and how it leaves. */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  NonRetryable,
  RetryAfter,
  Worker,
  type Answer,
  type Control,
  type Delivery,
  type Host,
  type Transport,
  type WorkerOptions,
} from "../src/index.js";
import type { ControlMessage, StepResult } from "../src/messages.js";
import { Unreadable } from "../src/read.js";

class Memory implements Transport {
  maxMessage = 4_000;
  host!: Host;
  /** What happened, in order. */
  readonly said: string[] = [];
  readonly answers: Answer[] = [];
  broken = 0;

  async start(host: Host): Promise<void> {
    this.host = host;
  }
  async stop(): Promise<void> {}
  async close(): Promise<void> {}

  /** Deliver a message and wait until it is settled. */
  deliver(message: unknown, lost = new AbortController()): Promise<void> {
    const delivery: Delivery = {
      signal: lost.signal,
      read: () => {
        if (message === "garbage") throw new Unreadable("it is not JSON");
        return message;
      },
      answer: async (answer) => {
        if (this.broken-- > 0) throw new Error("away");
        this.answers.push(answer);
        this.said.push("answered", "acknowledged");
      },
      giveBack: async () => void this.said.push("given back"),
      refuse: async () => void this.said.push("put away"),
    };
    return this.host.take(delivery);
  }

  result(at = -1): StepResult {
    const answer = this.answers.at(at);
    assert.ok(answer && "result" in answer);
    return answer.result;
  }
}

class Plane implements Control {
  heard: (message: ControlMessage) => void = () => {};
  readonly told: ControlMessage[] = [];
  async start(heard: (message: ControlMessage) => void): Promise<void> {
    this.heard = heard;
  }
  publish(message: ControlMessage): void {
    this.told.push(message);
  }
  async close(): Promise<void> {}
}

const task = (name: string, more: object = {}) => ({
  runId: "r",
  seq: 3,
  stepId: "r:3",
  name,
  group: name,
  input: { n: 2 },
  attempt: 2,
  token: "t",
  ...more,
});

async function working(steps: WorkerOptions["steps"], more: Partial<WorkerOptions> = {}) {
  const transport = new Memory();
  const worker = new Worker({ transport, steps, log: () => {}, drainTimeout: 0.05, ...more });
  await worker.start();
  return { transport, worker };
}

test("a handler's value is the output, and attempt and token are echoed", async () => {
  const { transport } = await working({ double: (input: { n: number }) => ({ n: input.n * 2 }) });
  await transport.deliver(task("double"));
  const { startedAt, ...rest } = transport.result();
  assert.ok(startedAt);
  assert.deepEqual(rest, { runId: "r", seq: 3, stepId: "r:3", attempt: 2, token: "t", status: "completed", output: { n: 4 } });
  assert.deepEqual(transport.said, ["answered", "acknowledged"]);
});

test("nothing returned is null", async () => {
  const { transport } = await working({ nothing: async () => {} });
  await transport.deliver(task("nothing"));
  assert.equal(transport.result().output, null);
});

test("the handler is told who it works for", async () => {
  const seen: unknown[] = [];
  const { transport } = await working({
    look: (_input, step) => {
      seen.push(step.idempotencyKey, step.attempt, step.runId, step.name, step.traceparent, step.context);
    },
  });
  await transport.deliver(task("look", { traceparent: "00-a-b-01", context: { tenant: "acme" } }));
  assert.deepEqual(seen, ["r:3", 2, "r", "look", "00-a-b-01", { tenant: "acme" }]);
});

test("errors say whether and when to try again", async () => {
  const { transport } = await working({
    plain: () => {
      throw new TypeError("broken");
    },
    final: () => {
      throw new NonRetryable("declined", { code: "card_declined", details: { limit: 5 } });
    },
    later: () => {
      throw new RetryAfter("busy", 2.5);
    },
    odd: () => {
      throw "just words";
    },
  });
  const error = async (name: string) => {
    await transport.deliver(task(name, { stepId: "r:3" }));
    const { stack: _stack, ...rest } = transport.result().error!;
    return rest;
  };
  assert.deepEqual(await error("plain"), { message: "broken", code: "error", type: "TypeError", retryable: true });
  assert.deepEqual(await error("final"), {
    message: "declined",
    code: "card_declined",
    type: "NonRetryable",
    retryable: false,
    details: { limit: 5 },
  });
  assert.deepEqual(await error("later"), {
    message: "busy",
    code: "retry_after",
    type: "RetryAfter",
    retryable: true,
    retryAfter: 2.5,
  });
  assert.deepEqual(await error("odd"), { message: "just words", code: "error", retryable: true });
});

test("an unknown name is answered for good, also one that objects have", async () => {
  const { transport } = await working({ known: () => 1 });
  for (const name of ["other", "toString"]) {
    await transport.deliver(task(name));
    assert.equal(transport.result().status, "failed");
    assert.deepEqual(transport.result().error, { message: `no handler for ${name}`, code: "unknown_step", retryable: false });
  }
});

test("a turn is answered: no workflow is hosted here", async () => {
  const { transport } = await working({ known: () => 1 });
  const turn = { taskId: "r:wf:0a", runId: "r", workflow: "w", workflowVersion: "1", input: 1, history: [], group: "w", attempt: 1 };
  await transport.deliver(turn);
  const error = { message: "no handler for w", code: "unknown_step", retryable: false };
  assert.deepEqual(transport.answers, [{ decision: { taskId: "r:wf:0a", runId: "r", status: "failed", commands: [], error } }]);
});

test("a message that cannot be read is put away, and the next is served", async () => {
  const { transport } = await working({ known: () => 1 });
  await transport.deliver("garbage");
  await transport.deliver(task("known", { stepId: "another:3" }));
  await transport.deliver(task("known"));
  assert.deepEqual(transport.said, ["put away", "put away", "answered", "acknowledged"]);
});

test("what no wire carries fails the step for good", async () => {
  const { transport } = await working({ large: () => "x".repeat(5_000), big: () => 1n });
  await transport.deliver(task("large"));
  assert.deepEqual([transport.result().error?.code, transport.result().error?.retryable], ["payload_too_large", false]);
  await transport.deliver(task("big"));
  assert.deepEqual([transport.result().error?.code, transport.result().error?.retryable], ["payload_type", false]);
});

test("lines, details and stack are left out before an answer is too large", async () => {
  const { transport } = await working({
    talk: (_input, step) => {
      step.log("x".repeat(5_000));
      return 1;
    },
    fail: () => {
      throw new NonRetryable("declined", { code: "card_declined", details: "x".repeat(5_000) });
    },
  });
  await transport.deliver(task("talk"));
  assert.deepEqual([transport.result().output, transport.result().events], [1, undefined]);
  await transport.deliver(task("fail", { attempt: 3 }));
  const error = { message: "declined", code: "card_declined", type: "NonRetryable", retryable: false };
  assert.deepEqual(transport.result().error, error);
});

test("lines are numbered, told at once and kept with the answer", async () => {
  const control = new Plane();
  const { transport } = await working(
    {
      talk: (_input, step) => {
        step.log("begun", { part: 1 });
        step.log("odd", 1n, "warn");
      },
    },
    { control },
  );
  await transport.deliver(task("talk"));
  const lines = transport.result().events!.map(({ at: _at, ...line }) => line);
  assert.deepEqual(lines, [
    { level: "info", message: "begun", index: 0, data: { part: 1 } },
    { level: "warn", message: "odd", index: 1, data: "1" },
  ]);
  const [told] = control.told;
  assert.deepEqual({ ...told?.event, event: 0, at: 0 }, {
    type: "step.progress", runId: "r", seq: 3, stepId: "r:3", attempt: 2, name: "talk", event: 0, at: 0,
  });
});

/** A handler that goes on until it is aborted. */
const untilAborted = (_input: unknown, { signal }: { signal: AbortSignal }) =>
  new Promise((resolve) => signal.addEventListener("abort", () => resolve("late")));

test("a cancelled run's and a cancelled step's handlers are aborted, and answered so", async () => {
  const messages: ControlMessage[] = [
    { from: "e", kind: "cancel", runId: "r" },
    { from: "e", kind: "event", event: { type: "step.cancel", runId: "r", stepId: "r:3", at: 1 } },
    { from: "e", kind: "event", event: { type: "step.cancel", runId: "r", stepId: "r:3", attempt: 2, at: 1 } },
  ];
  for (const message of messages) {
    const control = new Plane();
    const { transport } = await working({ long: untilAborted }, { control });
    const settled = transport.deliver(task("long"));
    control.heard({ from: "e", kind: "cancel", runId: "another" });
    control.heard({ from: "e", kind: "enqueued", runId: "r" });
    control.heard({ from: "e", kind: "event", event: { type: "step.cancel", runId: "r", stepId: "r:3", attempt: 1, at: 1 } });
    await new Promise(setImmediate);
    assert.deepEqual(transport.said, []);
    control.heard(message);
    await settled;
    assert.deepEqual([transport.result().status, transport.result().error?.code], ["failed", "step_cancelled"]);
    assert.deepEqual(transport.said, ["answered", "acknowledged"]);
  }
});

test("a task that was taken away is neither answered nor acknowledged", async () => {
  const { transport } = await working({ long: untilAborted });
  const lost = new AbortController();
  const settled = transport.deliver(task("long"), lost);
  lost.abort();
  await settled;
  assert.deepEqual(transport.said, []);
});

test("a task that comes twice is done once, and both deliveries are answered", async () => {
  let calls = 0;
  const { transport } = await working({ count: async () => ++calls });
  await Promise.all([transport.deliver(task("count")), transport.deliver(task("count"))]);
  await transport.deliver(task("count"));
  assert.equal(calls, 1);
  assert.deepEqual(transport.answers.map((answer) => "result" in answer && answer.result.output), [1, 1, 1]);
  await transport.deliver(task("count", { attempt: 3 }));
  assert.equal(calls, 2);
});

test("a failure is not remembered", async () => {
  let calls = 0;
  const { transport } = await working({
    fail: () => {
      calls += 1;
      throw new Error("no");
    },
  });
  await transport.deliver(task("fail"));
  await transport.deliver(task("fail"));
  assert.equal(calls, 2);
});

test("an answer that cannot be handed over is tried again, and the body is not", async () => {
  let calls = 0;
  const { transport } = await working({ count: () => ++calls });
  transport.broken = 2;
  await transport.deliver(task("count"));
  assert.equal(calls, 1);
  assert.deepEqual(transport.said, ["answered", "acknowledged"]);
});

test("a worker that stops lets a task finish", async () => {
  const { transport, worker } = await working(
    { slow: () => new Promise((resolve) => setTimeout(resolve, 30, "done")) },
    { drainTimeout: 5 },
  );
  void transport.deliver(task("slow"));
  await worker.stop();
  assert.equal(transport.result().output, "done");
});

test("a worker that has waited long enough gives back what does not end", async () => {
  const { transport, worker } = await working({ never: () => new Promise(() => {}) });
  void transport.deliver(task("never"));
  await worker.stop();
  assert.deepEqual(transport.said, ["given back"]);
});

test("no more are taken than there is room for", async () => {
  const { transport } = await working({ long: untilAborted }, { concurrency: 1 });
  assert.equal(await transport.host.room(), 1);
  const lost = new AbortController();
  const settled = transport.deliver(task("long"), lost);
  let room = 0;
  void transport.host.room().then((free) => (room = free));
  await new Promise(setImmediate);
  assert.equal(room, 0);
  lost.abort();
  await settled;
  await new Promise(setImmediate);
  assert.equal(room, 1);
});

test("a worker without steps is refused", () => {
  assert.throws(() => new Worker({ transport: new Memory(), steps: {} }), /at least one step/);
});

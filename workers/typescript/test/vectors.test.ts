/** Every golden message is read and written as `protocol/vectors` says, every name and every hash is the same. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { canonical, descriptorHash, fnv1a64 } from "../src/descriptor.js";
import * as messages from "../src/messages.js";
import * as names from "../src/names.js";
import { Unreadable, type Read } from "../src/read.js";

const PROTOCOL = process.env.PROTOCOL_FOLDER ?? fileURLToPath(new URL("../../../../protocol", import.meta.url));
const load = (path: string) => JSON.parse(readFileSync(join(PROTOCOL, "vectors", path), "utf8"));

const READERS: Record<string, Read<unknown>> = {
  "remote-task.json": messages.readRemoteTask,
  "step-result.json": messages.readStepResult,
  "heartbeat.json": messages.readHeartbeat,
  "control-message.json": messages.readControlMessage,
  "workflow-task.json": messages.readWorkflowTask,
  "workflow-decision.json": messages.readWorkflowDecision,
  "workflow-step-event.json": messages.readWorkflowStepEvent,
  "start-run.json": messages.readStartRun,
  "worker-heartbeat.json": messages.readWorkerHeartbeat,
  "worker-descriptor.json": messages.readWorkerDescriptor,
};

interface Vector {
  name: string;
  why: string;
  message: unknown;
  read?: unknown;
}

const files = readdirSync(join(PROTOCOL, "vectors"))
  .filter((path) => path.endsWith(".json"))
  .map((path) => load(path) as { schema?: string; valid: Vector[]; invalid: Vector[] })
  .filter(({ schema }) => schema);

test("there are vectors for every message", () => {
  assert.deepEqual(files.map(({ schema }) => schema).sort(), Object.keys(READERS).sort());
});

for (const { schema, valid, invalid } of files) {
  const read = READERS[schema ?? ""]!;
  for (const vector of valid) {
    test(`${schema}: ${vector.name} is read, and written back`, () => {
      const written: unknown = JSON.parse(JSON.stringify(read(vector.message, "it")));
      assert.deepEqual(withoutDefaults(written), withoutDefaults(vector.read ?? vector.message));
      assert.deepEqual(read(written, "it"), read(vector.message, "it"));
    });
  }
  for (const vector of invalid) {
    test(`${schema}: ${vector.name} is refused`, () => {
      assert.throws(() => read(vector.message, "it"), Unreadable);
    });
  }
}

/** An error that says its defaults says nothing more than one that leaves them out. */
function withoutDefaults(value: unknown): unknown {
  const result = value as { error?: { code?: string; type?: string; retryable?: boolean } };
  if (!result || typeof result !== "object" || !result.error) return value;
  const { code, type, retryable, ...error } = result.error;
  return {
    ...result,
    error: {
      ...error,
      ...(code !== "error" && { code }),
      ...(type && { type }),
      ...(retryable === false && { retryable }),
    },
  };
}

test("a turn is told from a step's task by its shape", () => {
  for (const { schema, valid } of files) {
    for (const { message } of valid) {
      if (schema === "remote-task.json") assert.ok("step" in messages.readTask(message));
      if (schema === "workflow-task.json") assert.ok("turn" in messages.readTask(message));
    }
  }
});

test("routing tokens are spelled as everywhere", () => {
  const { tokens } = load("routing.json") as { tokens: { name: string; partition: string | null; token: string }[] };
  for (const { name, partition, token } of tokens) assert.equal(names.routingToken(name, partition), token);
});

test("queues, keys and tables are named as everywhere", () => {
  for (const { given, ...golden } of load("names.json").names) {
    const prefix = names.effectivePrefix(given.prefix, given.namespace);
    const token = names.routingToken(given.name, given.partition);
    const built: Record<string, string> = {
      prefix,
      token,
      tasks: names.tasks(prefix, token),
      results: names.results(prefix),
      decisions: names.decisions(prefix),
      control: names.control(prefix),
      heartbeat: names.heartbeat(prefix),
      workerHeartbeat: names.workerHeartbeat(prefix, token, given.instanceId),
      workerDescriptor: names.workerDescriptor(prefix, token, given.instanceId),
      tasksTable: names.tasksTable(prefix),
      resultsTable: names.resultsTable(prefix),
    };
    for (const [what, name] of Object.entries(built)) assert.equal(name, golden[what], what);
  }
});

test("names for SQS are spelled as everywhere", () => {
  for (const { name, sqs } of load("names.json").sqs) assert.equal(names.sqsName(name), sqs);
  assert.deepEqual(names.sqsNames("durable-results"), ["durable-results"]);
  assert.deepEqual(names.sqsNames("a.b"), ["a.b", "a_x2E_b"]);
  assert.deepEqual(names.sqsNames("a_x2E_b"), ["a_x5F_x2E_b"]);
});

test("a prefix that no queue can bear is refused", () => {
  for (const prefix of ["", "a:b", "a b"]) assert.throws(() => names.effectivePrefix(prefix), /prefix/);
});

test("descriptors have the hash they have everywhere", () => {
  const { texts, descriptors } = load("descriptor-hash.json");
  for (const { text, hash } of texts) assert.equal(fnv1a64(text), hash);
  for (const vector of descriptors) {
    assert.equal(canonical(vector.descriptor), vector.canonical, vector.name);
    assert.equal(descriptorHash(vector.descriptor), vector.hash, vector.name);
  }
});

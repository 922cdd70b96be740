/** The hash of a worker's descriptor: the same in every language. */

import type { WorkerDescriptor } from "./messages.js";

/** 64-bit FNV-1a over UTF-16 code units: xor the low byte, xor the high byte, multiply once. 16 hex digits. */
export function fnv1a64(text: string): string {
  let hash = 0xcbf29ce484222325n;
  for (let at = 0; at < text.length; at++) {
    const unit = text.charCodeAt(at);
    hash = BigInt.asUintN(64, (hash ^ BigInt((unit & 0xff) ^ (unit >> 8))) * 0x100000001b3n);
  }
  return hash.toString(16).padStart(16, "0");
}

const set = (words: string[]) => [...new Set(words)].sort();

/** What is hashed: compact JSON in a fixed order. */
export function canonical(descriptor: WorkerDescriptor): string {
  const { instanceId, runtime, sdk, protocol, partition, namespace, startedAt, registrations } = descriptor;
  const each = registrations?.map(({ name, version, group, requires, origin }) =>
    JSON.stringify({
      name,
      version: version ?? null,
      group: group ?? null,
      requires: requires ? set(requires) : null,
      origin: origin ?? null,
    }),
  );
  return JSON.stringify({
    instanceId,
    runtime,
    sdk: { name: sdk.name, version: sdk.version },
    protocol: { version: protocol.version, range: protocol.range },
    capabilities: set(descriptor.capabilities),
    workflows: set(descriptor.workflows),
    steps: set(descriptor.steps),
    ...(each && { registrations: set(each).map((text) => JSON.parse(text) as unknown) }),
    partition: partition ?? null,
    namespace: namespace ?? null,
    startedAt,
  });
}

export const descriptorHash = (descriptor: WorkerDescriptor): string => fnv1a64(canonical(descriptor));

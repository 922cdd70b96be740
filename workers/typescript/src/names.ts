/** How queues, channels, keys and tables are called. `protocol/vectors/names.json` pins each: a wrong name is a silent hole. */

const said = (word: string | null | undefined): word is string => Boolean(word) && word !== "default";

/** Where tasks of a name wait. */
export function routingToken(name: string, partition?: string | null): string {
  return name.replaceAll(":", "-") + (said(partition) ? `@${partition}` : "");
}

/** What all names begin with. Throws for one that no queue can bear. */
export function effectivePrefix(prefix = "durable", namespace?: string | null): string {
  const whole = said(namespace) ? `${prefix}-${namespace}` : prefix;
  if (!prefix || /[:\s]/.test(whole)) {
    throw new Error(`A prefix is a text without colons and spaces, not ${JSON.stringify(whole)}.`);
  }
  return whole;
}

export const tasks = (prefix: string, token: string) => `${prefix}-tasks-${token}`;
export const results = (prefix: string) => `${prefix}-results`;
export const decisions = (prefix: string) => `${prefix}-decisions`;
export const control = (prefix: string) => `${prefix}-control`;
export const heartbeat = (prefix: string) => `${prefix}-heartbeat`;
export const workerHeartbeat = (prefix: string, token: string, instance: string) =>
  `${prefix}-worker-heartbeat:${token}:${instance}`;
export const workerDescriptor = (prefix: string, token: string, instance: string) =>
  `${prefix}-worker-descriptor:${token}:${instance}`;
export const tasksTable = (prefix: string) => `${prefix}_transport_tasks`;
export const resultsTable = (prefix: string) => `${prefix}_transport_results`;

const MISLEADING = /_(?=x[0-9A-F]{2}(?:_|[^A-Za-z0-9_-]))/gu;
const FOREIGN = /[^A-Za-z0-9_-]/gu;

/** A name as SQS takes it. */
export function sqsName(name: string): string {
  const escape = (character: string) =>
    [...Buffer.from(character)].map((byte) => `_x${byte.toString(16).toUpperCase().padStart(2, "0")}_`).join("");
  return name.replace(MISLEADING, "_x5F_").replace(FOREIGN, escape);
}

/** What a queue may be called there, in the order to look: the plain name first, where it does not read as another's. */
export function sqsNames(name: string): string[] {
  const spelled = sqsName(name);
  return spelled === name || name.match(MISLEADING) ? [spelled] : [name, spelled];
}

/** Errors that a handler throws to say more than "failed", and any error as data. */

import type { ErrorData } from "./messages.js";
import { kept } from "./step.js";

const MESSAGE_MAX = 4_000;
const STACK_MAX = 8_000;

/** This failure is final: the step is not tried again. */
export class NonRetryable extends Error {
  override name = "NonRetryable";
  constructor(
    message: string,
    readonly more: { code?: string; details?: unknown; cause?: unknown } = {},
  ) {
    super(message, { cause: more.cause });
  }
}

/** Try again, but not before `seconds` have passed. */
export class RetryAfter extends Error {
  override name = "RetryAfter";
  constructor(
    message: string,
    readonly seconds: number,
    readonly more: { code?: string; details?: unknown; cause?: unknown } = {},
  ) {
    super(message, { cause: more.cause });
  }
}

/** What anything thrown says on the wire. Whatever it is, it becomes an answer. */
export function describe(thrown: unknown): ErrorData {
  if (!(thrown instanceof Error)) {
    return { message: String(thrown).slice(0, MESSAGE_MAX), code: "error", retryable: true };
  }
  const ours = thrown instanceof NonRetryable || thrown instanceof RetryAfter;
  const given = ours ? thrown.more.code : (thrown as { code?: unknown }).code;
  const code = thrown instanceof NonRetryable ? "non_retryable" : thrown instanceof RetryAfter ? "retry_after" : "error";
  return {
    message: (thrown.message || thrown.name).slice(0, MESSAGE_MAX),
    code: typeof given === "string" ? given : code,
    type: thrown.name,
    retryable: !(thrown instanceof NonRetryable),
    ...(thrown instanceof RetryAfter && { retryAfter: thrown.seconds }),
    ...(ours && thrown.more.details !== undefined && { details: kept(thrown.more.details) }),
    ...(thrown.stack && { stack: thrown.stack.slice(0, STACK_MAX) }),
  };
}

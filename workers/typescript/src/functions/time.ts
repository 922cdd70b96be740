/** Lengths of time, and moments. */

import { NonRetryable } from "../errors.js";

/** Seconds, or a text like `3 days`, `90 min`, `200ms`. */
export type Duration = number | string;

const UNITS: Record<string, number> = {
  ms: 1, millisecond: 1, s: 1e3, sec: 1e3, second: 1e3, m: 6e4, min: 6e4, minute: 6e4,
  h: 36e5, hour: 36e5, d: 864e5, day: 864e5, w: 6048e5, week: 6048e5,
};
const LONGEST = 100 * 366 * 864e5;

/** Milliseconds. */
export function milliseconds(time: Duration): number {
  const [, count = "", word = ""] = typeof time === "string" ? (/^\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*$/i.exec(time) ?? []) : [];
  const unit = word.toLowerCase();
  const found = typeof time === "number" ? time * 1e3 : Number(count) * (UNITS[unit] ?? UNITS[unit.replace(/s$/, "")] ?? NaN);
  if (!(found >= 0 && found <= LONGEST)) {
    throw new NonRetryable(`${JSON.stringify(time)} is no length of time: write seconds, or "3 days".`, { code: "bad_duration" });
  }
  return Math.ceil(found);
}

export const after = (time: Duration): string => iso(new Date(Date.now() + milliseconds(time)));

/** UTC, as the wire has it. */
export function iso(moment: Date | string): string {
  const date = new Date(moment);
  if (Number.isNaN(date.getTime())) throw new NonRetryable(`${String(moment)} is no time.`, { code: "bad_time" });
  return date.toISOString();
}

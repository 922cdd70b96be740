/** `x-durable-signature`: HMAC-SHA256 of the raw body with the workspace's key, in hex. */

import { createHmac, timingSafeEqual } from "node:crypto";

export const HEADER = "x-durable-signature";
export const APP_HEADER = "x-durable-app";
export const TIMESTAMP = "x-durable-timestamp";
/** Milliseconds by which the time of a manifest's request may be off. */
export const WINDOW = 300_000;

export function sign(body: Uint8Array | string, key: string): string {
  return createHmac("sha256", key).update(body).digest("hex");
}

/** The key that has signed it; undefined: none of them. `keys`: two live while one is changed. */
export function signer(body: Uint8Array | string, given: string | undefined, keys: readonly string[]): string | undefined {
  const said = Buffer.from(given ?? "", "latin1");
  let found: string | undefined;
  for (const key of keys) {
    const right = Buffer.from(sign(body, key), "latin1");
    if (right.length === said.length && timingSafeEqual(right, said)) found ??= key;
  }
  return found;
}

/** Whether a time in milliseconds is now, give or take the window. */
export function isNow(milliseconds: string | undefined): boolean {
  return /^\d{1,15}$/.test(milliseconds ?? "") && Math.abs(Number(milliseconds) - Date.now()) <= WINDOW;
}

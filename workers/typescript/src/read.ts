/** Readers: from whatever came over a wire to a value of a known shape. Unknown fields are dropped, and null is absent. */

export class Unreadable extends Error {
  override name = "Unreadable";
}

export type Read<T> = (value: unknown, at: string) => T;
type Readers = Record<string, Read<unknown>>;
type Shape<R extends Readers> = { [K in keyof R]: ReturnType<R[K]> };

function refuse(at: string, what: string): never {
  throw new Unreadable(`${at} is not ${what}`);
}

/** Any JSON, null included. */
export const anything: Read<unknown> = (value) => value;

/** Any JSON where null says nothing. */
export const detail: Read<unknown> = (value) => value;

export const text: Read<string> = (value, at) => (typeof value === "string" ? value : refuse(at, "a text"));

export const flag: Read<boolean> = (value, at) => (typeof value === "boolean" ? value : refuse(at, "true or false"));

export const number: Read<number> = (value, at) =>
  typeof value === "number" && Number.isFinite(value) ? value : refuse(at, "a number");

/** A whole number, not below `least`. */
export function whole(least = -Infinity): Read<number> {
  return (value, at) =>
    typeof value === "number" && Number.isInteger(value) && value >= least ? value : refuse(at, "such a whole number");
}

export function word<W extends string>(...words: W[]): Read<W> {
  return (value, at) => words.find((each) => each === value) ?? refuse(at, words.join(" or "));
}

export function list<T>(item: Read<T>): Read<T[]> {
  return (value, at) =>
    Array.isArray(value) ? value.map((each, index) => item(each, `${at}[${index}]`)) : refuse(at, "a list");
}

/** An object with whatever keys. */
export function map<T>(item: Read<T>): Read<Record<string, T>> {
  return (value, at) =>
    Object.fromEntries(Object.entries(entries(value, at)).map(([key, each]) => [key, item(each, `${at}.${key}`)]));
}

/** An object of these fields, in this order. */
export function object<R extends Readers, O extends Readers>(
  required: R,
  optional: O,
): Read<Shape<R> & Partial<Shape<O>>> {
  return (value, at) => {
    const given = entries(value, at);
    const found: Record<string, unknown> = {};
    for (const [key, read] of Object.entries(required)) {
      if (!Object.hasOwn(given, key)) refuse(`${at}.${key}`, "there");
      found[key] = read(given[key], `${at}.${key}`);
    }
    for (const [key, read] of Object.entries(optional)) {
      const field = given[key];
      if (field === undefined || (field === null && read !== anything)) continue;
      found[key] = read(field, `${at}.${key}`);
    }
    return found as Shape<R> & Partial<Shape<O>>;
  };
}

/** What to take where a field is absent. */
export function withDefaults<T extends object, D extends Partial<T>>(read: Read<T>, defaults: () => D): Read<T & D> {
  return (value, at) => ({ ...defaults(), ...read(value, at) });
}

function entries(value: unknown, at: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) refuse(at, "an object");
  return value as Record<string, unknown>;
}

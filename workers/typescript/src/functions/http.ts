/** An app behind Node's own server, and behind anything that speaks `Request` and `Response`. */

import type { IncomingMessage, ServerResponse } from "node:http";
import type { Answered, Asked } from "./app.js";
import { BODY_MAX } from "./wire.js";

type Answer = (asked: Asked) => Promise<Answered>;
export type NodeHandler = (request: IncomingMessage, response: ServerResponse) => void;

export async function handleNode(answer: Answer, request: IncomingMessage, response: ServerResponse): Promise<void> {
  try {
    const body = await read(request);
    const headers: Asked["headers"] = {};
    // A header that comes twice is none: which one counts is nobody's guess.
    for (const [name, values] of Object.entries(request.headersDistinct)) headers[name] = values?.length === 1 ? values[0] : undefined;
    const { status, headers: said, body: text } = await answer({ method: request.method ?? "", headers, body });
    response.writeHead(status, { ...said, ...(body.length > BODY_MAX && { connection: "close" }) });
    response.end(text);
  } catch {
    response.destroy(); // who asked is gone
  }
}

export async function handleFetch(answer: Answer, request: Request): Promise<Response> {
  const body = request.body ? await read(request.body as unknown as AsyncIterable<Uint8Array>) : new Uint8Array();
  const { status, headers, body: text } = await answer({
    method: request.method,
    headers: Object.fromEntries(request.headers),
    body,
  });
  return new Response(text, { status, headers });
}

/** To its end, or to where it is too large. */
export async function read(stream: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const parts: Uint8Array[] = [];
  let size = 0;
  for await (const part of stream) {
    parts.push(part);
    size += part.length;
    if (size > BODY_MAX) break;
  }
  return Buffer.concat(parts);
}

/** What is asked of the server. Whatever goes wrong is a Failure whose message is a sentence. */

const KEY = "kt.key";

/** `status`: of HTTP; 0 where nothing answered. */
export class Failure extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

// ---- the API key: only as long as the tab is open -------------------------------------------------------

let held = "";

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? held;
  } catch {
    return held;
  }
}

export function setApiKey(key) {
  held = key;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // the browser keeps nothing: `held` does, until the page is left
  }
}

// ---- requests -------------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /header/i.test(error.message)) {
      throw new Failure("The API key has characters that no header can carry. Enter it again.", 401);
    }
    throw new Failure("The server does not answer. See whether it is running, then try again.");
  }
  if (!response.ok) throw new Failure(await sentence(response), response.status);
  return response;
}

/** What the server says is wrong, or what its status says. */
async function sentence(response) {
  try {
    const { error } = await response.json();
    if (typeof error.message === "string" && error.message) return error.message;
  } catch {
    // no error object: something else on the way answered
  }
  return `The server answered with status ${response.status}, and no reason.`;
}

export async function getJson(path) {
  try {
    return await (await ask(path)).json();
  } catch (error) {
    if (error instanceof SyntaxError) throw new Failure(`${path}: the answer is no JSON.`);
    throw error;
  }
}

/** The chunks of a streamed answer to a chat. Throws Failure, and AbortError once `signal` says so. */
export async function* chunks(body, signal) {
  const response = await ask("./v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new Failure(chunk.error.message ?? "The answer failed, and no reason was given.", 500);
    yield chunk;
  }
  throw new Failure("The connection ended before the answer did.");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failure("The server sent an event that is no JSON.");
  }
}

/** The data of each server-sent event in a stream of bytes. Comments are passed over. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let left = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (left + decoder.decode(value, { stream: true })).split("\n");
      left = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure("The connection was lost before the answer ended.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Conversations, kept in the browser: one entry of localStorage each, so that an answer writes no other. What cannot be
 * kept (storage full or forbidden) stays in memory, and `onProblem` gets a sentence about it. No imports.
 *
 * A conversation: {id, title, updated, messages}. A message: {role, content} and, of answers, what chat.js adds.
 */

const PREFIX = "kt.conversation.";
const SETTINGS = "kt.settings";

export class Store {
  constructor(storage, onProblem = () => {}) {
    this.storage = storage;
    this.onProblem = onProblem;
    this.all = new Map();
    this.told = false;
    for (const key of this.keys()) this.take(key);
  }

  keys() {
    try {
      return Object.keys(this.storage).filter((key) => key.startsWith(PREFIX));
    } catch {
      return [];
    }
  }

  /** Read an entry again, such as one that another tab wrote. What is damaged is passed over, not deleted. */
  take(key) {
    const id = key.slice(PREFIX.length);
    const conversation = checked(this.read(key), id);
    if (conversation) this.all.set(id, conversation);
    else this.all.delete(id);
  }

  /** Whether a key of the storage is one of a conversation. */
  isOurs(key) {
    return key?.startsWith(PREFIX) ?? false;
  }

  /** The last one first. */
  list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.all.get(id);
  }

  /** A new one, kept once something is in it. */
  create() {
    const random = crypto.getRandomValues(new Uint32Array(2)); // randomUUID is for https alone
    const id = Date.now().toString(36) + [...random].map((n) => n.toString(36)).join("");
    return { id, title: "", updated: Date.now(), messages: [] };
  }

  save(conversation) {
    this.all.set(conversation.id, conversation);
    this.write(PREFIX + conversation.id, conversation);
  }

  remove(id) {
    this.all.delete(id);
    try {
      this.storage.removeItem(PREFIX + id);
    } catch {
      // it was never kept
    }
    this.told = false; // there is room again
  }

  settings() {
    const found = this.read(SETTINGS);
    return found && typeof found === "object" && !Array.isArray(found) ? found : {};
  }

  saveSettings(settings) {
    this.write(SETTINGS, settings);
  }

  read(key) {
    try {
      return JSON.parse(this.storage.getItem(key));
    } catch {
      return null;
    }
  }

  write(key, value) {
    try {
      this.storage.setItem(key, JSON.stringify(value));
      this.told = false;
    } catch (error) {
      if (!this.told) this.onProblem(problem(error));
      this.told = true; // once, not at every word of an answer
    }
  }
}

function problem(error) {
  const isFull = error instanceof DOMException && /quota/i.test(error.name);
  const what = isFull ? "The browser's storage for this page is full" : "The browser lets this page keep nothing";
  const step = isFull ? "Export this conversation, or delete others." : "Export this conversation before you leave.";
  return `${what}, so new messages are gone once the page is closed. ${step}`;
}

/** A conversation as it must be, or null. */
function checked(found, id) {
  if (!found || typeof found !== "object" || !Array.isArray(found.messages)) return null;
  const isMessage = (one) => one && ["user", "assistant", "tool"].includes(one.role) && typeof one.content === "string";
  if (!found.messages.every(isMessage)) return null;
  return { ...found, id, title: String(found.title ?? ""), updated: Number(found.updated) || 0 };
}

// ---- export ----------------------------------------------------------------------------------------------

const NAMES = { user: "You", assistant: "Answer", tool: "Tool" };

/** A conversation as one Markdown file. */
export function asMarkdown(conversation) {
  const parts = conversation.messages.map((message) => {
    const called = (message.calls ?? []).map((call) => `\n\n\`${call.name}\`: \`${call.arguments}\``).join("");
    return `## ${NAMES[message.role]}\n\n${message.content}${called}`;
  });
  return [`# ${conversation.title || "Conversation"}`, ...parts].join("\n\n") + "\n";
}

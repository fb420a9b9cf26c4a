/** The conversation in view: what is sent, the answer as it comes, stop, retry, edit. */

import { chunks } from "./api.js";
import { byId, el, say } from "./dom.js";
import { MessageView } from "./messages.js";

const SAVE_EVERY = 2000; // milliseconds, while an answer is written
const NEAR_END = 60; // pixels

export class Chat {
  /** `hooks`: changed() when a conversation's title, age or work did; keyNeeded(); model(), the one to ask. */
  constructor(store, settings, hooks) {
    Object.assign(this, { store, settings, hooks });
    this.runs = new Map(); // conversation's id -> {controller, message, begun}
    this.gone = new WeakSet(); // conversations that were deleted
    this.views = [];
    this.editing = false;
    this.atEnd = true;
    this.place = byId("messages");
    this.text = byId("text");
    this.listen();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("cancel").addEventListener("click", () => this.edit(false));
    this.text.addEventListener("input", () => this.fit());
    this.text.addEventListener("keydown", (event) => this.key(event));
    this.place.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.place;
      this.atEnd = scrollHeight - scrollTop - clientHeight < NEAR_END;
    });
    setInterval(() => this.run && this.draw(), 1000); // the seconds that are shown
    addEventListener("pageshow", () => (this.leaving = false));
    addEventListener("pagehide", () => {
      this.leaving = true; // connections end now, which is nobody's fault
      for (const id of this.runs.keys()) this.store.save(this.store.get(id));
    });
  }

  key(event) {
    const touch = matchMedia("(pointer: coarse)").matches; // there Enter is the only way to begin a line
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && this.text.value === "" && !this.run) {
      event.preventDefault();
      this.edit(true);
    }
  }

  /** Esc, wherever the focus is. Whether it meant something. */
  escape() {
    if (this.run) this.stop();
    else if (this.editing) this.edit(false);
  }

  get run() {
    return this.runs.get(this.conversation?.id);
  }

  /** Height of the field by its text. */
  fit() {
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight + 2}px`;
  }

  // ---- what is shown ----------------------------------------------------------------------------------

  open(conversation) {
    this.conversation = conversation;
    this.views = [];
    this.place.replaceChildren();
    this.atEnd = true;
    this.edit(false);
    this.draw();
  }

  /** Bring what is shown in line with the conversation. */
  draw() {
    const { messages } = this.conversation;
    this.place.querySelector(".welcome")?.remove();
    while (this.views.length > 0 && this.views.at(-1).message !== messages[this.views.length - 1]) {
      this.views.pop().node.remove();
    }
    for (const message of messages.slice(this.views.length)) {
      const view = new MessageView(message, { retry: () => this.retry(), edit: () => this.edit(true) });
      this.views.push(view);
      this.place.append(view.node);
    }
    const lastUser = messages.findLastIndex((message) => message.role === "user");
    this.views.forEach((view, i) => {
      const isLast = i === messages.length - 1 || i === lastUser;
      const run = this.run?.message === view.message ? this.run : null;
      if (run || view.seen !== isLast || view.wasRunning) view.update(run, isLast && !this.run);
      view.seen = this.run ? null : isLast;
      view.wasRunning = Boolean(run);
    });
    if (messages.length === 0) this.place.append(welcome());
    this.drawComposer();
    if (this.atEnd) this.place.scrollTop = this.place.scrollHeight;
  }

  drawComposer() {
    byId("send").hidden = Boolean(this.run);
    byId("stop").hidden = !this.run;
    const call = this.openCall();
    byId("mode").hidden = !this.editing && !call;
    byId("cancel").hidden = !this.editing;
    byId("mode-text").textContent = this.editing ? "You are changing your last message; what came after it goes." : "";
    if (call && !this.editing) byId("mode-text").textContent = `The model waits for what ${call.name} returns. Write it here.`;
    this.text.placeholder = call ? `Result of ${call.name}` : "Ask something";
  }

  /** Draw before the next picture, however many words have come. */
  drawSoon() {
    if (this.planned) return;
    this.planned = requestAnimationFrame(() => {
      this.planned = 0;
      this.draw();
    });
  }

  // ---- what people do ---------------------------------------------------------------------------------

  send() {
    const content = this.text.value;
    if (!content.trim() || this.run) return;
    const { messages } = this.conversation;
    if (this.editing) messages.splice(messages.findLastIndex((message) => message.role === "user"));
    const call = this.openCall();
    messages.push(call ? { role: "tool", tool_call_id: call.id, content } : { role: "user", content });
    this.conversation.title ||= titleOf(content);
    this.text.value = "";
    this.fit();
    this.edit(false);
    this.atEnd = true;
    this.answer();
  }

  stop() {
    this.run?.controller.abort();
    this.text.focus();
  }

  /** The last answer once more. */
  retry() {
    const { messages } = this.conversation;
    if (this.run || messages.length === 0) return;
    if (messages.at(-1).role === "assistant") messages.pop();
    this.atEnd = true;
    this.answer();
  }

  /** Have the last message in the field, or not any more. */
  edit(on) {
    const last = this.conversation.messages.findLast((message) => message.role === "user");
    if (on && !last) return;
    if (on || this.editing) this.text.value = on ? last.content : "";
    this.editing = on;
    this.fit();
    this.drawComposer();
    if (on) this.text.focus();
  }

  /** The first call of the last answer without a result. */
  openCall() {
    const { messages } = this.conversation;
    const at = messages.findLastIndex((message) => message.role === "assistant");
    if (at < 0 || this.run || this.editing) return undefined;
    const answered = new Set(messages.slice(at + 1).map((message) => message.tool_call_id));
    if (messages.slice(at + 1).some((message) => message.role === "user")) return undefined;
    return messages[at].calls?.find((call) => !answered.has(call.id));
  }

  // ---- an answer --------------------------------------------------------------------------------------

  /** Ask for one, and show it as it comes. It goes on while another conversation is in view. */
  async answer() {
    const { conversation } = this;
    if (this.openCall()) {
      this.save(conversation);
      this.draw();
      return;
    }
    const body = { ...this.settings.request(), messages: [...this.settings.system(), ...asked(conversation.messages)] };
    if (this.hooks.model()) body.model = this.hooks.model();
    const message = { role: "assistant", content: "" };
    conversation.messages.push(message);
    const run = { controller: new AbortController(), message, begun: Date.now() };
    this.runs.set(conversation.id, run);
    this.save(conversation);
    this.draw();
    await this.receive(conversation, run, body);
    this.runs.delete(conversation.id);
    this.save(conversation);
    this.draw();
    say(message.error ?? "The answer is complete.");
  }

  async receive(conversation, { controller, message }, body) {
    let saved = Date.now();
    try {
      for await (const chunk of chunks(body, controller.signal)) {
        take(message, chunk);
        if (this.conversation === conversation) this.drawSoon();
        if (Date.now() - saved > SAVE_EVERY && !this.gone.has(conversation)) {
          this.store.save(conversation);
          saved = Date.now();
        }
      }
    } catch (error) {
      if (controller.signal.aborted) message.finish = "stopped";
      else if (!this.leaving) message.error = error.message;
      if (error.status === 401) this.hooks.keyNeeded();
    }
  }

  /** Delete a conversation, and end what is being written to it. */
  forget(conversation) {
    this.runs.get(conversation.id)?.controller.abort();
    this.gone.add(conversation);
    this.store.remove(conversation.id);
  }

  save(conversation) {
    if (this.gone.has(conversation)) return;
    conversation.updated = Date.now();
    this.store.save(conversation);
    this.hooks.changed();
  }
}

/** Messages as the server wants them: without answers that failed before they began. */
function asked(messages) {
  return messages.filter((one) => one.role !== "assistant" || one.content || one.calls).map((one) => {
    const { role, content, tool_call_id, calls } = one;
    if (role === "tool") return { role, content, tool_call_id };
    if (!calls) return { role, content };
    const called = calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
    return { role, content, tool_calls: called };
  });
}

/** Add a chunk to an answer. */
function take(message, chunk) {
  for (const { delta = {}, finish_reason } of chunk.choices ?? []) {
    message.content += delta.content ?? "";
    if (delta.reasoning_content) message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
    for (const call of delta.tool_calls ?? []) takeCall(message, call);
    if (finish_reason) message.finish = finish_reason;
  }
  if (chunk.usage) message.stats = statsOf(chunk);
}

function takeCall(message, { index = 0, id, function: called = {} }) {
  message.calls ??= [];
  const call = (message.calls[index] ??= { id: "", name: "", arguments: "" });
  if (id) call.id = id;
  if (called.name) call.name = called.name;
  call.arguments += called.arguments ?? "";
}

function statsOf({ usage, kt = {} }) {
  return {
    tokens: usage.completion_tokens, rate: kt.tokens_per_second ?? null, prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0, wait: kt.seconds_to_first_token ?? null,
  };
}

function titleOf(text) {
  const line = text.trim().split("\n")[0].trim();
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

function welcome() {
  const text = "What you write goes to this server and nowhere else.";
  return el("div", { class: "welcome" }, el("h1", {}, "What shall it be?"), el("p", { class: "muted" }, text));
}

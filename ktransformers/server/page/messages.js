/** How one message looks, and how it changes while it is written. */

import { copyButton, el } from "./dom.js";
import { render } from "./markdown_view.js";

const WHO = { user: "You", assistant: "Answer", tool: "Result of a tool" };
const ENDS = {
  length: "It ended at the most tokens that were allowed.",
  stopped: "You stopped it.",
  content_filter: "It was cut off.",
};

/** `actions`: retry() and edit(), for the last messages. */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = el("div", { class: "body" });
    this.foot = el("div", { class: "foot" });
    this.node = el("article", { class: `message ${message.role}`, "aria-label": WHO[message.role] }, this.body, this.foot);
    if (message.role === "assistant") this.buildAnswer();
  }

  buildAnswer() {
    this.reasoning = el("div", { class: "markdown" });
    this.summary = el("summary", {}, "Reasoning");
    this.details = el("details", { class: "reasoning", hidden: true }, this.summary, this.reasoning);
    this.content = el("div", { class: "markdown" });
    this.calls = el("div", { class: "calls" });
    this.note = el("p", { class: "note", hidden: true });
    this.body.append(this.details, this.content, this.calls, this.note);
  }

  /** Show the message as it is now. `run`: {begun} while it is being written; `isLast`: of its role. */
  update(run, isLast) {
    if (this.message.role === "assistant") this.updateAnswer(run);
    else this.body.textContent = this.message.content;
    this.node.classList.toggle("running", Boolean(run));
    this.node.setAttribute("aria-busy", String(Boolean(run)));
    this.updateFoot(run, isLast);
  }

  updateAnswer(run) {
    const { content, reasoning, calls = [] } = this.message;
    this.details.hidden = !reasoning;
    this.summary.textContent = run && !content ? `Reasoning… ${secondsOf(run)} s` : "Reasoning";
    render(this.reasoning, reasoning ?? "");
    render(this.content, content);
    while (this.calls.children.length > calls.length) this.calls.lastChild.remove();
    calls.forEach((call, i) => {
      const shown = callElement(call);
      if (!this.calls.children[i]) this.calls.append(shown);
      else if (this.calls.children[i].textContent !== shown.textContent) this.calls.children[i].replaceWith(shown);
    });
    this.updateNote(run);
  }

  updateNote(run) {
    const { content, reasoning, calls, error, finish } = this.message;
    let text = error ?? ENDS[finish] ?? "";
    if (run) text = content || reasoning || calls ? "" : `The prompt is being read… ${secondsOf(run)} s`;
    else if (!error && !finish) text = "The page was left before it ended.";
    else if (!text && !content && !calls) text = "The answer is empty.";
    this.note.textContent = text;
    this.note.hidden = text === "";
    this.note.classList.toggle("error", Boolean(error));
  }

  updateFoot(run, isLast) {
    const key = JSON.stringify([Boolean(run), isLast, this.message.stats ?? null, Boolean(this.message.content)]);
    if (key === this.footKey) return;
    this.footKey = key;
    this.foot.replaceChildren(...(run ? [] : this.footItems(isLast)));
  }

  footItems(isLast) {
    const { role, content, stats } = this.message;
    const button = (text, act) => el("button", { type: "button", class: "small", onclick: act }, text);
    const items = content ? [copyButton(() => this.message.content)] : [];
    if (role === "assistant" && isLast) items.push(button("Retry", this.actions.retry));
    if (role === "user" && isLast) items.push(button("Edit", this.actions.edit));
    if (stats) items.push(el("span", { class: "stats muted" }, statsText(stats)));
    return items;
  }
}

const secondsOf = (run) => Math.floor((Date.now() - run.begun) / 1000);

function callElement({ name, arguments: given }) {
  return el("details", { class: "call", open: true }, el("summary", {}, "Calls ", el("code", {}, name || "…")), el("pre", { tabindex: 0 }, pretty(given)));
}

/** JSON with lines and indents, or the text that is not JSON yet. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** {tokens, rate, prompt, cached, wait} in words. */
export function statsText({ tokens, rate, prompt, cached, wait }) {
  const parts = [`${number(tokens)} token${tokens === 1 ? "" : "s"}`];
  if (rate) parts.push(`${number(rate)} tokens/s`);
  parts.push(`prompt ${number(prompt)}${cached ? `, ${number(cached)} of them cached` : ", none cached"}`);
  if (wait != null) parts.push(`first after ${wait < 10 ? wait.toFixed(2) : Math.round(wait)} s`);
  return parts.join(" · ");
}

const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 1 : 0 });

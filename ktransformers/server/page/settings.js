/** The settings: fields in a dialog, kept by the store, and what they add to a request. */

import { byId, el } from "./dom.js";

const MOST = 2147483647;
const FIELDS = [
  { name: "system", label: "System prompt", kind: "text" },
  { name: "temperature", label: "Temperature", min: 0, max: 100, step: 0.05 },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", min: -1, max: MOST, step: 1 },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Most tokens of an answer", min: 1, max: MOST, step: 1, empty: "as many as fit" },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, empty: "another each time" },
  { name: "reasoning_effort", label: "Reasoning", options: ["", "none", "low", "medium", "high"] },
  { name: "tools", label: "Tools", kind: "text", check: toolsProblem, hint: "a JSON list, as OpenAI has it; you give their results" },
];
const NUMBERS = FIELDS.filter((field) => "step" in field).map((field) => field.name);

export class Settings {
  constructor(store) {
    this.store = store;
    this.values = store.settings();
    byId("fields").append(...FIELDS.map((field) => this.field(field)));
    const dialog = byId("settings");
    byId("open-settings").addEventListener("click", () => dialog.showModal());
    byId("close-settings").addEventListener("click", () => dialog.close());
    byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }

  field(field) {
    const { name, label, hint } = field;
    const id = `setting-${name}`;
    const control = controlOf(field, id);
    control.value = String(this.values[name] ?? "");
    const wrong = el("span", { class: "wrong", id: `${id}-wrong`, role: "alert" });
    control.setAttribute("aria-describedby", wrong.id);
    control.addEventListener("input", () => this.take(field, control, wrong));
    const told = hint && el("span", { class: "muted small-text" }, ` ${hint}`);
    return el("div", { class: "field" }, el("label", { for: id }, label, told), control, wrong);
  }

  /** Keep what is in a field, where it makes sense. */
  take(field, control, wrong) {
    const text = control.value.trim();
    const problem = control.validity.badInput ? "This is no number." : problemOf(field, text);
    wrong.textContent = problem;
    control.setAttribute("aria-invalid", String(Boolean(problem)));
    if (problem) return;
    if (text === "") delete this.values[field.name];
    else this.values[field.name] = "step" in field ? Number(text) : text;
    this.store.saveSettings(this.values);
  }

  /** What a request says, but for its messages and model. */
  request() {
    const { tools, reasoning_effort } = this.values;
    const body = {};
    for (const name of NUMBERS) if (typeof this.values[name] === "number") body[name] = this.values[name];
    if (reasoning_effort) body.reasoning_effort = reasoning_effort;
    if (tools && !toolsProblem(tools)) body.tools = JSON.parse(tools);
    return body;
  }

  /** The system prompt as messages: one or none. */
  system() {
    const { system } = this.values;
    return system ? [{ role: "system", content: String(system) }] : [];
  }
}

function controlOf({ kind, options, min, max, step, empty = "the model's" }, id) {
  if (options) return el("select", { id }, options.map((value) => el("option", { value }, value || "as the model does")));
  if (kind === "text") return el("textarea", { id, rows: 3, spellcheck: "false" });
  const inputmode = step === 1 ? "numeric" : "decimal";
  return el("input", { id, type: "number", min, max, step, inputmode, placeholder: empty });
}

function problemOf({ min, max, step, check }, text) {
  if (text === "") return "";
  if (check) return check(text);
  if (step === undefined) return "";
  const value = Number(text);
  if (step === 1 && !Number.isInteger(value)) return "Give a whole number.";
  return value >= min && value <= max ? "" : `Give a number from ${min} to ${max}.`;
}

function toolsProblem(text) {
  try {
    const found = JSON.parse(text);
    const isTool = (one) => one?.type === "function" && typeof one.function?.name === "string";
    return Array.isArray(found) && found.every(isTool) ? "" : 'Give a list of {"type": "function", "function": {"name": …}}.';
  } catch {
    return "This is no JSON yet.";
  }
}

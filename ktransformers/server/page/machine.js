/** The machine tab: load, memory, where layers live, which rule took which module, use of experts. */

import { getJson } from "./api.js";
import { el } from "./dom.js";
import { HeatMap } from "./heatmap.js";

const EVERY = 3000; // milliseconds between two looks

export class MachineView {
  constructor(place, onKeyNeeded) {
    this.onKeyNeeded = onKeyNeeded;
    this.facts = null;
    this.watched = false;
    const part = (title, ...children) => el("section", { class: "card" }, el("h2", {}, title), ...children);
    this.problem = el("p", { class: "banner", hidden: true });
    this.about = el("dl", { class: "facts" });
    this.load = el("dl", { class: "facts" });
    this.memory = el("div", { class: "memory" });
    this.layers = el("div", { class: "layers" });
    this.experts = el("div");
    this.modules = new Modules();
    place.append(
      this.problem, part("Model", this.about), part("Load", this.load), part("Memory", this.memory),
      part("Where layers live", this.layers), part("Use of experts", this.experts),
      part("Modules and rules", this.modules.node),
    );
  }

  /** Look at the machine every few seconds, or not any more. */
  watch(on) {
    this.watched = on;
    clearTimeout(this.timer);
    if (on) this.refresh();
  }

  async refresh() {
    if (!this.watched) return;
    clearTimeout(this.timer);
    try {
      if (!document.hidden) this.draw(await getJson("./kt/machine"));
      this.problem.hidden = true;
    } catch (error) {
      if (error.status === 401) return this.onKeyNeeded();
      this.problem.textContent = error.message;
      this.problem.hidden = false;
    }
    if (this.watched) this.timer = setTimeout(() => this.refresh(), EVERY);
  }

  draw({ placement, devices, load, experts }) {
    const homes = Object.keys({ ...placement.layers, ...placement.experts });
    const names = [...new Set([...devices.map((device) => device.device), ...homes])];
    this.about.replaceChildren(...aboutRows(this.facts ?? {}));
    this.load.replaceChildren(...this.loadRows(load));
    this.memory.replaceChildren(...devices.map((device) => memoryOf(device, names)));
    this.drawExperts(experts, placement);
    if (this.drawn) return; // the plan does not change
    this.drawn = true;
    this.layers.replaceChildren(...layersOf(placement, names));
    this.modules.draw(placement, names);
  }

  loadRows(load) {
    const now = performance.now();
    const seconds = this.before ? (now - this.before.now) / 1000 : 0;
    const rate = seconds > 0 ? (load.new_tokens - this.before.new_tokens) / seconds : 0;
    this.before = { now, new_tokens: load.new_tokens };
    const limit = load.cache_limit ? ` of ${bytes(load.cache_limit)}` : "";
    return [
      ["Running", count(load.running)], ["Waiting", count(load.waiting)], ["Tokens/s now", rate.toFixed(1)],
      ["Keys and values", bytes(load.cache_bytes) + limit], ["Tokens written", count(load.new_tokens)],
      ["Prompt tokens computed", count(load.prompt_tokens)], ["Prompt tokens from a cache", count(load.cached_tokens)],
      ["Answers put aside for a while", count(load.preemptions)],
    ].map(pair);
  }

  drawExperts(experts, placement) {
    if (!experts) {
      const has = Object.keys(placement.experts ?? {}).length > 0;
      const how = ["Nobody counts. Start the server with ", el("code", {}, "--count-experts"), " to see it here; answers are then slower, as layers are computed part by part."];
      this.experts.replaceChildren(el("p", { class: "muted" }, has ? how : "This model has no routed experts."));
      return;
    }
    if (!this.heat) {
      this.heat = new HeatMap();
      this.experts.replaceChildren(this.heat.node);
    }
    this.heat.draw(experts);
  }
}

// ---- small parts -----------------------------------------------------------------------------------------

const count = (value) => value.toLocaleString("en");
const pair = ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value));

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; value >= 1024 && at < units.length - 1; at += 1) value /= 1024;
  return `${value.toFixed(at === 0 || value >= 100 ? 0 : 1)} ${units[at]}`;
}

function aboutRows(facts) {
  const { threads, isa } = facts.machine ?? {};
  return [
    ["Family", facts.model_type], ["Rules", facts.rule], ["Numbers", facts.dtype], ["Keys and values", facts.cache ?? facts.dtype],
    ["Context", facts.context && `${count(facts.context)} tokens`], ["CPU", isa && `${isa}, ${threads} threads`],
    ["Version", facts.version],
  ].filter(([, value]) => value).map(pair);
}

/** A class for the colour of a device: each keeps its own on the whole tab. */
const colour = (device, names) => `device-${Math.max(0, names.indexOf(device)) % 8}`;

const chip = (device, names, text = device) => el("span", { class: `chip ${colour(device, names)}` }, text);

function memoryOf({ device, name, total, free, process, weights, adapters }, names) {
  const said = [`${bytes(weights)} of weights`];
  if (adapters) said.push(`${bytes(adapters)} of adapters`);
  if (process != null) said.push(`${bytes(process)} held by the server`);
  if (total != null) said.push(`${bytes(total - free)} of ${bytes(total)} in use`);
  const head = el("div", { class: "row between" }, chip(device, names), el("span", { class: "muted ellipsis" }, name === device ? "" : name));
  const bar = total != null && meter((total - free) / total, `Memory of ${device} in use`, colour(device, names));
  return el("div", { class: "device" }, head, bar, el("p", { class: "small-text" }, said.join(" · ")));
}

/** A bar that is filled by a share, 0 to 1. */
function meter(share, label, name) {
  const filled = el("div", { class: name });
  filled.style.width = `${100 * share}%`;
  const range = { role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share) };
  return el("div", { class: "meter", ...range }, filled);
}

// ---- where layers live -----------------------------------------------------------------------------------

/** "0-2,5" as numbers. */
function numbers(text) {
  return text.split(",").filter(Boolean).flatMap((span) => {
    const [first, last = first] = span.split("-").map(Number);
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  });
}

function layersOf({ layers = {}, experts = {} }, names) {
  const depth = 1 + Math.max(-1, ...Object.values({ ...layers }).flatMap(numbers));
  if (depth === 0) return [el("p", { class: "muted" }, "The plan is not known.")];
  return [["Layers", layers], ["Their routed experts", experts]]
    .filter(([, homes]) => Object.keys(homes).length > 0)
    .map(([title, homes]) => strip(title, homes, depth, names));
}

function strip(title, homes, depth, names) {
  const homeOf = new Map(Object.entries(homes).flatMap(([device, text]) => numbers(text).map((number) => [number, device])));
  const cells = Array.from({ length: depth }, (_, number) => {
    const device = homeOf.get(number);
    return el("span", { class: device ? colour(device, names) : "none", title: `layer ${number}: ${device ?? "none"}` });
  });
  const words = Object.entries(homes).map(([device, text]) => `${text} on ${device}`).join(", ");
  const legend = Object.entries(homes).map(([device, text]) => chip(device, names, `${device}: ${text}`));
  return el("div", {}, el("div", { class: "row wrap" }, el("span", {}, title), legend), el("div", { class: "strip", role: "img", "aria-label": `${title}: ${words}` }, cells));
}

// ---- modules ---------------------------------------------------------------------------------------------

/** The plan: a line for the same module of all layers, which opens to say why. */
class Modules {
  constructor() {
    this.all = el("input", { type: "checkbox", id: "all-modules", onchange: () => this.list() });
    this.filter = el("input", { type: "search", id: "filter-modules", placeholder: "Name, class, operator, device", oninput: () => this.list() });
    this.lines = el("div", { class: "modules" });
    this.count = el("span", { class: "muted small-text", role: "status" });
    const head = el("div", { class: "row wrap" }, el("label", { for: "filter-modules", class: "offscreen" }, "Filter modules"), this.filter, el("label", { class: "check" }, this.all, " modules that no rule takes, too"), this.count);
    this.node = el("div", {}, head, this.lines);
  }

  draw(placement, names) {
    Object.assign(this, { placement, names });
    this.list();
  }

  list() {
    const { groups = [], rules = [] } = this.placement ?? {};
    const wanted = this.filter.value.trim().toLowerCase();
    const text = (group) => [group.pattern, group.class, group.operator, ...devicesOf(group)].join(" ").toLowerCase();
    const seen = groups.filter((group) => (this.all.checked || group.rule != null || group.owns) && text(group).includes(wanted));
    this.count.textContent = `${seen.length} of ${groups.length}`;
    const where = new Map(rules.map((rule) => [rule.rule, rule.where]));
    this.lines.replaceChildren(...seen.map((group) => this.line(group, where)));
  }

  line(group, where) {
    const many = group.count > 1 && el("span", { class: "muted" }, `×${group.count}`);
    const summary = el(
      "summary", {}, el("code", {}, group.pattern, " ", many), el("span", { class: "becomes" }, group.operator ?? "as it is"),
      el("span", { class: "muted" }, group.rule != null ? where.get(group.rule) ?? `rule ${group.rule}` : "no rule"),
      el("span", { class: "row wrap" }, devicesOf(group).map((device) => chip(device, this.names))),
    );
    return el("details", {}, summary, el("div", { class: "why" }, why(group, where)));
  }
}

const devicesOf = (group) => Object.keys(group.devices.device ?? {});

function why(group, where) {
  const label = (number) => `rule ${number} (${where.get(number)})`;
  const kwargs = Object.entries(group.kwargs).map(([name, value]) => `${name}: ${value}`);
  const places = Object.entries(group.devices).flatMap(([kwarg, found]) =>
    Object.entries(found).map(([device, layers]) => `${kwarg} ${device}${layers ? ` in layers ${layers}` : ""}`),
  );
  const verdict = group.hidden ? `No rule is asked: ${group.hidden}.`
    : group.rule == null ? "No rule takes it: it stays as it is, where such modules go."
    : group.operator ? `${label(group.rule)} takes it: it becomes ${group.operator}.`
    : `${label(group.rule)} places it as it is.`;
  const rows = [`A ${group.class}.`, verdict, places.join("; "), kwargs.join(", ")].filter(Boolean);
  const others = group.others.map((other) => el("li", {}, `${label(other.rule)}: ${other.reason}`));
  return [...rows.map((row) => el("p", {}, row)), others.length > 0 && el("p", { class: "muted" }, "Why not the others:"), el("ul", {}, others)];
}

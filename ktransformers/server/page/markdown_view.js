/** The trees of markdown.js as elements. */

import { copyButton, el } from "./dom.js";
import { parse } from "./markdown.js";

const PLAIN = new Set(
  "p ul ol li blockquote hr thead tbody tr th td strong em del br code h1 h2 h3 h4 h5 h6".split(" "),
);
const shown = new WeakMap(); // element -> its blocks, as JSON

/** Make the elements of `text` all that `place` holds. Those of blocks that are as before are kept, selection and all. */
export function render(place, text) {
  const blocks = parse(text);
  const keys = blocks.map((block) => JSON.stringify(block));
  const before = shown.get(place) ?? [];
  let same = 0;
  while (same < keys.length && keys[same] === before[same]) same += 1;
  while (place.childNodes.length > same) place.lastChild.remove();
  place.append(...blocks.slice(same).map(element));
  shown.set(place, keys);
}

function element(item) {
  if (typeof item === "string") return document.createTextNode(item);
  if (item.tag === "pre") return codeBlock(item);
  if (item.tag === "a") return link(item);
  const children = item.children.map(element);
  if (item.tag === "table") return el("div", { class: "scroll", tabindex: 0 }, el("table", {}, children));
  if (!PLAIN.has(item.tag)) return el("span", {}, children);
  const start = Number.isSafeInteger(item.start) ? item.start : null;
  return el(item.tag, { start, class: item.side ? `to-${item.side}` : null }, children);
}

function link(item) {
  const rel = "noopener noreferrer nofollow";
  return el("a", { href: item.href, target: "_blank", rel, title: item.href }, item.children.map(element));
}

function codeBlock(item) {
  const text = item.children.join("");
  const head = el("div", { class: "code-head" }, el("span", {}, item.language || "code"), copyButton(() => text));
  return el("div", { class: "code" }, head, el("pre", { tabindex: 0 }, el("code", {}, text)));
}

/** The list of conversations: open one; rename, export, delete the one in view. */

import { download, el } from "./dom.js";
import { asMarkdown } from "./store.js";

const RENAME = "rename";

/** `on`: {store, chat, open(conversation), remove(conversation)}. */
export function drawList(place, on) {
  const found = on.store.list();
  if (!found.includes(on.chat.conversation) && on.chat.conversation) found.unshift(on.chat.conversation);
  const focused = place.contains(document.activeElement) ? document.activeElement.dataset.name : null;
  if (focused === RENAME) return; // what is being typed is not taken away
  place.replaceChildren(...found.map((one) => item(one, on)));
  if (focused) [...place.querySelectorAll("button")].find((one) => one.dataset.name === focused)?.focus();
  titled(on);
}

function titled(on) {
  document.title = `${nameOf(on.chat.conversation)} · KTransformers`;
}

const nameOf = (conversation) => conversation.title || "New conversation";

function item(conversation, on) {
  const isOpen = conversation === on.chat.conversation;
  const dot = on.chat.runs.has(conversation.id) && el("span", { class: "dot", title: "An answer is being written" });
  const open = el(
    "button",
    { type: "button", class: "title", "data-name": conversation.id, "aria-current": isOpen ? "true" : null, onclick: () => on.open(conversation) },
    dot, el("span", { class: "ellipsis" }, nameOf(conversation)),
  );
  const made = el("li", { class: isOpen ? "open" : null }, open);
  if (isOpen && conversation.messages.length > 0) made.append(actions(conversation, made, on));
  return made;
}

function actions(conversation, place, on) {
  const button = (text, label, act) => el("button", { type: "button", class: "small", "aria-label": label, "data-name": text, onclick: act }, text);
  const file = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation";
  return el(
    "div", { class: "actions" },
    button("Rename", "Rename this conversation", () => rename(conversation, place, on)),
    button("Export", "Export this conversation as Markdown", () => download(`${file}.md`, asMarkdown(conversation), "text/markdown")),
    button("JSON", "Export this conversation as JSON", () => download(`${file}.json`, JSON.stringify(conversation, null, 2), "application/json")),
    button("Delete", "Delete this conversation", () => on.remove(conversation)),
  );
}

/** A field in place of the title: Enter keeps what it holds, Esc what was. */
function rename(conversation, place, on) {
  const field = el("input", { class: "rename", "data-name": RENAME, "aria-label": "Title", maxlength: 200, onkeydown: key, onblur: keep });
  field.value = conversation.title;
  place.replaceChildren(field);
  field.select();

  function key(event) {
    if (event.key === "Escape") field.value = conversation.title;
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    field.blur();
  }

  function keep() {
    const title = field.value.trim();
    if (title && title !== conversation.title) {
      conversation.title = title;
      on.store.save(conversation);
    }
    place.replaceWith(item(conversation, on)); // this line alone: a click on another one is under way
    titled(on);
  }
}

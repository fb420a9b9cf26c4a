/** Puts the page together: the list of conversations, the two views, the server's name and its key. */

import { getJson, setApiKey } from "./api.js";
import { Chat } from "./chat.js";
import { byId, say } from "./dom.js";
import { drawList } from "./list.js";
import { MachineView } from "./machine.js";
import { Settings } from "./settings.js";
import { Store } from "./store.js";

const AGAIN = 2000; // milliseconds until a server that is not ready is asked once more

const store = new Store(storage(), (text) => say(text, true));
const settings = new Settings(store);
const machine = new MachineView(byId("machine"), needKey);
const chat = new Chat(store, settings, { changed: list, keyNeeded: needKey, model: () => byId("model").value });

/** localStorage, or nothing where even to look at it is forbidden. */
function storage() {
  try {
    return localStorage;
  } catch {
    return null;
  }
}

// ---- conversations ---------------------------------------------------------------------------------------

function list() {
  drawList(byId("conversations"), { store, chat, open, remove });
}

function open(conversation) {
  chat.open(conversation);
  drawer(false);
  show("chat");
  list();
}

function remove(conversation) {
  if (!confirm(`Delete “${conversation.title || "this conversation"}”? It is not kept anywhere else.`)) return;
  chat.forget(conversation);
  if (chat.conversation === conversation) open(store.list()[0] ?? store.create());
  else list();
}

function drawer(isOpen) {
  document.body.classList.toggle("drawer", isOpen);
  byId("veil").hidden = !isOpen;
  byId("menu").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) byId("new").focus();
  else if (byId("side").contains(document.activeElement)) byId("menu").focus();
}

// ---- views -----------------------------------------------------------------------------------------------

function show(name) {
  for (const view of ["chat", "machine"]) {
    const tab = byId(`tab-${view}`);
    tab.setAttribute("aria-selected", String(view === name));
    tab.tabIndex = view === name ? 0 : -1;
    byId(view).hidden = view !== name;
  }
  machine.watch(name === "machine");
}

function tabKey(event) {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const other = event.target.id === "tab-chat" ? "machine" : "chat";
  show(other);
  byId(`tab-${other}`).focus();
}

// ---- the server ------------------------------------------------------------------------------------------

/** Ask who answers, until somebody does. */
async function connect() {
  try {
    const facts = await getJson("./props");
    byId("key-form").hidden = true;
    name(facts.names);
    machine.facts = facts;
  } catch (error) {
    if (error.status === 401) return needKey();
    byId("model-name").textContent = error.status === 503 ? "the model is being loaded…" : error.message;
    setTimeout(connect, AGAIN);
  }
}

function name(names) {
  const select = byId("model");
  select.replaceChildren(...names.map((one) => new Option(one, one)));
  byId("model-label").hidden = names.length < 2;
  byId("model-name").hidden = names.length >= 2;
  byId("model-name").textContent = names[0];
}

function needKey() {
  byId("model-name").textContent = "waits for an API key";
  byId("key-form").hidden = false;
  byId("key").focus();
}

async function useKey(event) {
  event.preventDefault();
  setApiKey(byId("key").value.trim());
  byId("key").value = "";
  await connect();
  if (byId("key-form").hidden && chat.conversation.messages.at(-1)?.error) chat.retry();
  else if (!byId("key-form").hidden) say("The server does not know this key. Enter another.", true);
  machine.refresh();
}

// ---- start -----------------------------------------------------------------------------------------------

byId("new").addEventListener("click", () => {
  open(store.create());
  byId("text").focus();
});
byId("menu").addEventListener("click", () => drawer(!document.body.classList.contains("drawer")));
byId("veil").addEventListener("click", () => drawer(false));
byId("dismiss").addEventListener("click", () => (byId("notice").hidden = true));
byId("key-form").addEventListener("submit", useKey);
for (const view of ["chat", "machine"]) {
  byId(`tab-${view}`).addEventListener("click", () => show(view));
  byId(`tab-${view}`).addEventListener("keydown", tabKey);
}
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("settings").open || event.defaultPrevented) return;
  if (document.body.classList.contains("drawer")) drawer(false);
  else chat.escape();
});
addEventListener("storage", (event) => {
  if (!store.isOurs(event.key)) return;
  const before = chat.conversation;
  if (chat.run && event.key.endsWith(before.id)) return; // what is being written here is newer
  store.take(event.key);
  if (event.key.endsWith(before.id) && store.get(before.id)) chat.open(store.get(before.id));
  list();
});

open(store.list()[0] ?? store.create());
connect();
if (!matchMedia("(pointer: coarse)").matches) byId("text").focus();

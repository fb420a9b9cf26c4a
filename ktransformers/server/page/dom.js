/** How elements are made here: text stays text, whatever is in it. Nothing on this page is ever read as HTML. */

/**
 * An element. `props`: attributes; functions under "onclick" and the like are listeners; false and null are left out.
 * `children`: elements and texts; null and false are left out.
 */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child != null && child !== false));
  return made;
}

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** Say something to people who listen instead of looking, and to all where `shown`. */
export function say(text, shown = false) {
  byId("spoken").textContent = text;
  if (shown) {
    byId("notice-text").textContent = text;
    byId("notice").hidden = false;
  }
}

/** Put text on the clipboard; whether that worked. Pages that did not come by https have only the old way. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { class: "offscreen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** A button that copies what `text()` gives, and says so for a moment. */
export function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button", class: "small", onclick: act }, label);
  async function act() {
    button.textContent = (await copy(text())) ? "Copied" : "The browser does not let us";
    setTimeout(() => (button.textContent = label), 1500);
  }
  return button;
}

/** Have the browser save a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

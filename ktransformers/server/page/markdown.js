/**
 * Markdown as models write it, as a tree: strings, and {tag, children} with a few attributes. Nothing is HTML.
 *
 * Headings, paragraphs, lists, quotes, tables, fenced code; bold, italic, struck, code, links. What is none of these is
 * text, and of HTML only <br> is known. Each step is linear in the text, and nesting has an end: a model may write
 * anything. A text that has only half arrived is a tree too. No imports: tests run this file alone.
 */

const DEEPEST = 12;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

/** Blocks of a text, one after the other. */
export function parse(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

const node = (tag, children, more = {}) => ({ tag, children, ...more });

// ---- blocks ----------------------------------------------------------------------------------------------

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])([ \t]+|$)/;

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

function blocks(lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    found.push(block);
    at = next;
  }
  return found;
}

/** The block that begins in line `at`, and the line after it. */
function blockAt(lines, at, depth) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) return fenced(lines, at, match);
  if ((match = HEADING.exec(line))) return [node(`h${match[1].length}`, inline(headingText(line, match))), at + 1];
  if (RULE.test(line)) return [node("hr", []), at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at);
}

function fenced(lines, at, [, indent, fence, info]) {
  const code = [];
  let next = at + 1;
  const isEnd = (text) => text.startsWith(fence) && text.split("").every((c) => c === fence[0]);
  while (next < lines.length && !isEnd(lines[next].trim())) {
    code.push(lines[next].slice(Math.min(indent.length, indentOf(lines[next]))));
    next += 1;
  }
  const language = info.trim().split(/\s/)[0];
  return [node("pre", [code.join("\n")], { language, open: next === lines.length }), next + 1];
}

function headingText(line, match) {
  const text = line.slice(match[0].length).trim();
  let end = text.length;
  while (end > 0 && text[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(text[end - 1]) ? text.slice(0, end).trim() : text;
}

function quote(lines, at, depth) {
  const inner = [];
  let next = at;
  for (; next < lines.length && !isBlank(lines[next]); next += 1) {
    if (!QUOTE.test(lines[next]) && interrupts(lines[next])) break;
    inner.push(lines[next].replace(QUOTE, ""));
  }
  return [node("blockquote", blocks(inner, depth + 1)), next];
}

/** Whether a line begins something else in the middle of a paragraph. */
function interrupts(line) {
  const item = ITEM.exec(line);
  const isItem = item && item[3] !== "" && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
  return Boolean(isItem) || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

function paragraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && !isBlank(lines[next]) && !interrupts(lines[next]) && !isTable(lines, next)) next += 1;
  const text = lines.slice(at, next).map((line) => line.trim());
  return [node("p", inline(text.join("\n"))), next];
}

// ---- lists -----------------------------------------------------------------------------------------------

const isOrdered = (marker) => /\d/.test(marker);

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = isOrdered(first[2]);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const match = ITEM.exec(lines[next]);
    if (!match || isOrdered(match[2]) !== ordered || match[1].length > first[1].length + 3) break;
    if (match[1].length < first[1].length || RULE.test(lines[next])) break;
    const [item, after] = itemAt(lines, next, match, depth);
    items.push(item);
    next = after;
  }
  const start = ordered ? parseInt(first[2], 10) : 1;
  return [node(ordered ? "ol" : "ul", items, start === 1 ? {} : { start }), next];
}

function itemAt(lines, at, match, depth) {
  const least = match[1].length + 2; // models indent by two, three or four
  const inner = [lines[at].slice(match[0].length)];
  let next = at + 1;
  let blank = false;
  for (; next < lines.length; next += 1) {
    const line = lines[next];
    if (!isBlank(line) && indentOf(line) < least && (blank || interrupts(line) || ITEM.test(line))) break;
    blank = isBlank(line);
    inner.push(line);
  }
  const children = blocks([inner[0], ...dedented(inner.slice(1), match[0].length)], depth + 1);
  const task = /^\[([ xX])\]\s/.exec(inner[0]);
  return [node("li", task ? ticked(unwrapped(children), task[1] !== " ") : unwrapped(children)), lastOf(lines, next)];
}

/** `next`, or the lines before it that are blank and followed by no item. */
function lastOf(lines, next) {
  return next < lines.length && ITEM.test(lines[next]) ? next : next - Number(isBlank(lines[next - 1] ?? "x"));
}

function dedented(lines, offset) {
  const filled = lines.filter((line) => !isBlank(line));
  const least = Math.min(offset, ...filled.map(indentOf).filter((indent) => indent >= 2));
  return lines.map((line) => line.slice(Math.min(least, indentOf(line))));
}

/** An item's only paragraph, or its first before a list, needs no space around. */
function unwrapped(children) {
  const paragraphs = children.filter((child) => child.tag === "p").length;
  return paragraphs === 1 && children[0].tag === "p" ? [...children[0].children, ...children.slice(1)] : children;
}

function ticked(children, done) {
  const [first, ...rest] = children;
  const text = typeof first === "string" ? first.replace(/^\[[ xX]\]\s/, "") : first;
  return [done ? "☑ " : "☐ ", text, ...rest];
}

// ---- tables ----------------------------------------------------------------------------------------------

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !/^[\s|:-]+$/.test(lines[at + 1])) return false;
  const marks = cells(lines[at + 1]);
  return marks.every((mark) => /^:?-+:?$/.test(mark)) && marks.length === cells(lines[at]).length;
}

/** The texts between the pipes of a line; a pipe in code, or after a backslash, is none. */
function cells(line) {
  const found = [""];
  let code = false;
  for (let at = 0; at < line.length; at += 1) {
    if (line[at] === "\\" && line[at + 1] === "|") {
      found[found.length - 1] += "|";
      at += 1;
    } else if (line[at] === "|" && !code) {
      found.push("");
    } else {
      code = line[at] === "`" ? !code && line.includes("`", at + 1) : code;
      found[found.length - 1] += line[at];
    }
  }
  const texts = found.map((text) => text.trim());
  if (texts.length > 1 && texts[0] === "") texts.shift();
  if (texts.length > 1 && texts[texts.length - 1] === "") texts.pop();
  return texts;
}

const SIDES = { "::": "center", ":-": "left", "-:": "right" };

function table(lines, at) {
  const sides = cells(lines[at + 1]).map((mark) => SIDES[mark[0] + mark[mark.length - 1]]);
  const row = (line, tag) => {
    const texts = cells(line);
    return node("tr", sides.map((side, i) => node(tag, inline(texts[i] ?? ""), side ? { side } : {})));
  };
  let next = at + 2;
  while (next < lines.length && lines[next].includes("|") && !interrupts(lines[next])) next += 1;
  const body = lines.slice(at + 2, next).map((line) => row(line, "td"));
  return [node("table", [node("thead", [row(lines[at], "th")]), node("tbody", body)]), next];
}

// ---- inside a line ---------------------------------------------------------------------------------------

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const ADDRESS = /https?:\/\/[^\s<>"'`|\\[\]]{1,2000}/iy;
const WORD = /[\p{L}\p{N}_]/u;

/** Text, code, links, and runs of * _ ~ in their order; then the runs are paired. */
function inline(text, depth = 0, links = true) {
  const tokens = [];
  const scan = { text, depth, links, brackets: closingBrackets(text), unclosed: new Set() };
  let plain = "";
  for (let at = 0; at < text.length; ) {
    const [token, next] = tokenAt(scan, at) ?? [text[at], at + 1];
    if (typeof token === "string") {
      plain += token;
    } else {
      if (plain) tokens.push(plain);
      plain = "";
      tokens.push(token);
    }
    at = next;
  }
  if (plain) tokens.push(plain);
  return paired(tokens);
}

/** What begins at `at`, and where it ends; nothing where that is an ordinary character. */
function tokenAt(scan, at) {
  const { text } = scan;
  switch (text[at]) {
    case "\\":
      if (text[at + 1] === "\n") return [node("br", []), at + 2];
      return PUNCTUATION.test(text[at + 1] ?? "") ? [text[at + 1], at + 2] : null;
    case "\n":
      return [node("br", []), at + 1];
    case "`":
      return code(scan, at);
    case "*":
    case "_":
    case "~":
      return run(text, at);
    case "[":
      return link(scan, at, at);
    case "!":
      return text[at + 1] === "[" ? link(scan, at + 1, at) : null;
    case "<":
      return tag(scan, at);
    case "&":
      return entity(text, at);
    case "h":
    case "H":
      return address(scan, at);
    default:
      return null;
  }
}

function code({ text, unclosed }, at) {
  let end = at;
  while (text[end] === "`") end += 1;
  const fence = end - at;
  for (let next = end; !unclosed.has(fence) && next < text.length; ) {
    next = text.indexOf("`", next);
    if (next < 0) break;
    let after = next;
    while (text[after] === "`") after += 1;
    if (after - next === fence) {
      const inner = text.slice(end, next).replaceAll("\n", " ");
      const padded = inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ") && !isBlank(inner);
      return [node("code", [padded ? inner.slice(1, -1) : inner]), after];
    }
    next = after;
  }
  unclosed.add(fence);
  return [text.slice(at, end), end];
}

function tag(scan, at) {
  const known = /^<br\s{0,3}\/?>/i.exec(scan.text.slice(at, at + 10));
  if (known) return [node("br", []), at + known[0].length];
  ADDRESS.lastIndex = at + 1;
  const found = scan.links && ADDRESS.exec(scan.text);
  const end = found ? ADDRESS.lastIndex : at;
  return found && scan.text[end] === ">" && isSafe(found[0]) ? [anchor(found[0], [found[0]]), end + 1] : null;
}

function entity(text, at) {
  const known = /^&([a-z]{2,4});/.exec(text.slice(at, at + 6));
  return known && Object.hasOwn(ENTITIES, known[1]) ? [ENTITIES[known[1]], at + known[0].length] : null;
}

// ---- links -----------------------------------------------------------------------------------------------

/** Only the web's own addresses lead anywhere. */
function isSafe(href) {
  try {
    return /^https?:\/\//i.test(href) && ["http:", "https:"].includes(new URL(href).protocol);
  } catch {
    return false;
  }
}

const anchor = (href, children) => node("a", children, { href });

/** Place of each [ -> place of its ]. */
function closingBrackets(text) {
  const ends = new Map();
  const open = [];
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length) ends.set(open.pop(), at);
  }
  return ends;
}

/** [text](address "title"), or an image, which is a link to it here: pages that models name are not asked for. */
function link(scan, bracket, at) {
  const { text, brackets, depth, links } = scan;
  const close = brackets.get(bracket);
  if (!links || depth >= DEEPEST || close === undefined || text[close + 1] !== "(") return null;
  const target = targetAt(text, close + 1);
  if (!target || !isSafe(target.href)) return null;
  const label = inline(text.slice(bracket + 1, close), depth + 1, false);
  return [anchor(target.href, label.length ? label : [target.href]), target.end];
}

const TITLE = /\s{0,9}(?:\s(?:"[^"\n]{0,500}"|'[^'\n]{0,500}')\s{0,9})?\)/y;
const MOST_PARENTHESES = 32;

/** (address "title"), with pairs of parentheses in the address. */
function targetAt(text, at) {
  let depth = 0;
  let end = at + 1;
  for (; end < text.length && !/[\s<>]/.test(text[end]); end += 1) {
    if (text[end] === ")" && depth === 0) break;
    depth += Number(text[end] === "(") - Number(text[end] === ")");
    if (depth > MOST_PARENTHESES) return null;
  }
  TITLE.lastIndex = end;
  return depth === 0 && TITLE.test(text) ? { href: text.slice(at + 1, end), end: TITLE.lastIndex } : null;
}

/** An address in plain sight, without the punctuation of the sentence around it. */
function address({ text, links }, at) {
  if (!links || (at > 0 && WORD.test(text[at - 1]))) return null;
  ADDRESS.lastIndex = at;
  const found = ADDRESS.exec(text);
  if (!found) return null;
  let end = found[0].length;
  let surplus = count(found[0], ")") - count(found[0], "(");
  for (; end > 0; end -= 1) {
    const last = found[0][end - 1];
    if (last === ")" && surplus > 0) surplus -= 1;
    else if (!".,;:!?*_~".includes(last)) break;
  }
  const href = found[0].slice(0, end);
  return isSafe(href) ? [anchor(href, [href]), at + end] : null;
}

const count = (text, c) => text.split(c).length - 1;

// ---- bold, italic, struck --------------------------------------------------------------------------------

/** A run of one of * _ ~, and whether something may begin or end with it. */
function run(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  const before = text[at - 1] ?? " ";
  const after = text[end] ?? " ";
  const space = /\s/;
  const mark = (c) => PUNCTUATION.test(c);
  const left = !space.test(after) && (!mark(after) || space.test(before) || mark(before));
  const right = !space.test(before) && (!mark(before) || space.test(after) || mark(after));
  const inWord = text[at] === "_" && WORD.test(before) && WORD.test(after);
  if (inWord || (text[at] === "~" && end - at !== 2)) return [text.slice(at, end), end];
  return [{ run: text[at], length: end - at, opens: left, closes: right }, end];
}

const TAGS = { 1: "em", 2: "strong" };

function paired(tokens) {
  const out = [];
  const floor = {}; // mark -> place in `out` below which none opens
  for (const token of tokens) {
    if (token.run && token.closes) close(out, token, floor);
    if (!token.run || token.length > 0) out.push(token);
  }
  return settled(out);
}

/** Pair a closing run with those that opened before it. */
function close(out, closer, floor) {
  const mark = closer.run;
  while (closer.length > 0) {
    let at = out.length - 1;
    while (at >= (floor[mark] ?? 0) && !(out[at].run === mark && out[at].opens)) at -= 1;
    if (at < (floor[mark] ?? 0)) {
      floor[mark] = out.length;
      return;
    }
    const opener = out[at];
    const used = Math.min(2, opener.length, closer.length);
    const made = node(mark === "~" ? "del" : TAGS[used], settled(out.splice(at + 1)));
    opener.length -= used;
    closer.length -= used;
    if (opener.length === 0) out.pop();
    out.push(made);
    for (const key of Object.keys(floor)) floor[key] = Math.min(floor[key], at);
  }
}

/** Runs that found no partner are text; neighbouring texts are one. */
function settled(tokens) {
  const found = [];
  for (const token of tokens) {
    const item = token.run ? token.run.repeat(token.length) : token;
    const last = found.length - 1;
    if (typeof item === "string" && typeof found[last] === "string") found[last] += item;
    else if (item !== "") found.push(item);
  }
  return found;
}

/** How often each expert of each layer was chosen, as a picture: a row a layer, a column an expert. */

import { el } from "./dom.js";

const SHADES = 256;

/** `use`: {layers, counts, tokens}. Arrow keys and the pointer choose a cell, which is told in words below. */
export class HeatMap {
  constructor() {
    this.canvas = el("canvas", { role: "img", tabindex: 0, onkeydown: (event) => this.key(event), onpointermove: (event) => this.point(event), onpointerdown: (event) => this.point(event) });
    this.cursor = el("div", { class: "cursor", hidden: true });
    this.words = el("p", { class: "small-text cell", role: "status" }, "Point at a cell, or use the arrow keys.");
    this.summary = el("p", { class: "small-text muted" });
    this.scale = el("p", { class: "scale small-text muted" }, "never", el("span", { class: "ramp" }), "most");
    this.node = el("div", { class: "heat" }, this.summary, el("div", { class: "picture" }, this.canvas, this.cursor), this.words, this.scale);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.use && this.draw(this.use));
  }

  draw(use) {
    this.use = use;
    this.rows = use.counts.length;
    this.columns = Math.max(...use.counts.map((counts) => counts.length));
    this.most = Math.max(1, ...use.counts.map((counts) => Math.max(...counts)));
    Object.assign(this.canvas, { width: this.columns, height: this.rows });
    this.canvas.style.height = `${this.rows * Math.min(24, Math.max(4, Math.round(360 / this.rows)))}px`;
    this.paint(shades(this.canvas));
    this.summary.textContent = summaryOf(use, this.columns);
    this.canvas.setAttribute("aria-label", `Use of experts. ${this.summary.textContent}`);
    if (this.cell) this.choose(...this.cell);
  }

  paint(colours) {
    const picture = new ImageData(this.columns, this.rows);
    this.use.counts.forEach((counts, row) =>
      counts.forEach((count, column) => {
        const shade = Math.round(Math.sqrt(count / this.most) * (SHADES - 1)); // the root: few choices are seen too
        picture.data.set(colours[shade], 4 * (row * this.columns + column));
      }),
    );
    this.canvas.getContext("2d").putImageData(picture, 0, 0);
  }

  point({ offsetX, offsetY }) {
    const { clientWidth, clientHeight } = this.canvas;
    this.choose(Math.floor((offsetY / clientHeight) * this.rows), Math.floor((offsetX / clientWidth) * this.columns));
  }

  key(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const [row, column] = this.cell ?? [-step[0], -step[1]];
    this.choose(row + step[0], column + step[1]);
  }

  /** Mark a cell and tell of it. */
  choose(row, column) {
    row = Math.min(this.rows - 1, Math.max(0, row));
    column = Math.min(this.use.counts[row].length - 1, Math.max(0, column));
    this.cell = [row, column];
    const { layers, counts } = this.use;
    const count = counts[row][column];
    const all = counts[row].reduce((sum, n) => sum + n, 0);
    const share = all ? ((100 * count) / all).toFixed(1) : "0.0";
    this.words.textContent = `Layer ${layers[row]}, expert ${column}: chosen ${count.toLocaleString("en")} times, ${share} % of its layer's choices.`;
    const { style } = this.cursor;
    this.cursor.hidden = false;
    style.left = `${(100 * column) / this.columns}%`;
    style.top = `${(100 * row) / this.rows}%`;
    style.width = `${100 / this.columns}%`;
    style.height = `${100 / this.rows}%`;
  }
}

function summaryOf({ tokens, counts }, columns) {
  const all = counts.flat().sort((a, b) => b - a);
  const sum = all.reduce((total, n) => total + n, 0);
  const sizes = `${counts.length} layers of ${columns} experts`;
  if (sum === 0) return `${sizes}. No token has come yet.`;
  const top = all.slice(0, Math.max(1, Math.round(all.length / 10))).reduce((total, n) => total + n, 0);
  const unused = all.filter((n) => n === 0).length;
  const never = unused ? `${unused} of ${all.length} were never chosen` : "each was chosen at least once";
  return `${sizes}, ${tokens.toLocaleString("en")} tokens. The most used tenth takes ${Math.round((100 * top) / sum)} % of the choices; ${never}.`;
}

/** From the colour of nothing to that of the most, as CSS has them, in light or in dark. */
function shades(element) {
  const style = getComputedStyle(element);
  const [from, middle, to] = ["--heat-0", "--heat-1", "--heat-2"].map((name) => rgb(style.getPropertyValue(name).trim()));
  return Array.from({ length: SHADES }, (_, i) => {
    const at = (2 * i) / (SHADES - 1);
    const [a, b, part] = at <= 1 ? [from, middle, at] : [middle, to, at - 1];
    return [...a.map((value, k) => Math.round(value + (b[k] - value) * part)), 255];
  });
}

/** #rrggbb as numbers. */
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

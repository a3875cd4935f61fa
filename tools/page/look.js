"use strict";
// What both pages share: the tokens of an answer, and a panel with the five most probable tokens and the heat map.
// A record comes from record() in tools/look.py. All texts are set as text, never as HTML.

function el(name, attributes, ...children) {
  const e = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {}))
    if (value !== null && value !== false) e.setAttribute(key, value);
  e.append(...children);
  return e;
}

const percent = p => p > 0 && p < 0.001 ? "< 0.1 %" : (100 * p).toFixed(1) + " %";
const visible = text => text.replace(/\n/g, "↵\n");

const SHADES = "The darker a token is shaded, the less probable it was. Point at a token, or tap it.";

function promptView(record) {
  const view = el("div", {class: "prompt"});
  for (const [kind, text] of record.prompt) view.append(kind === "text" ? text : el("span", {class: kind}, text));
  return el("details", {}, el("summary", {}, "the prompt as the model sees it"), view);
}

// The panel shows one token of one record at a time.
class Panel {
  constructor(element, layer) {
    this.element = element;
    this.layer = layer;          // from 1; 0 = the last
    this.kind = "relative";
    this.clear();
  }

  clear() {
    this.record = null;
    this.element.replaceChildren(el("p", {class: "quiet"}, "Point at a token of an answer, or tap it."));
  }

  show(record, t) {
    this.t = t;
    if (record !== this.record) this.build(record);
    this.draw();
  }

  build(record) {
    this.record = record;
    this.title = el("h2");
    this.top = el("div", {class: "top"});
    this.element.replaceChildren(this.title, this.top);
    this.canvases = [];
    if (record.no_map) {
      if (record.images.length) this.element.append(el("p", {class: "quiet note"}, record.no_map));
      return;
    }
    this.maps = {};
    for (const kind of ["relative", "raw"])
      this.maps[kind] = Uint8Array.from(atob(record[kind].values), c => c.charCodeAt(0));
    const layers = el("select", {}), kinds = el("select", {});
    for (let i = 1; i <= record.layers; i++) layers.append(el("option", {value: i}, i));
    if (!(this.layer >= 1 && this.layer <= record.layers)) this.layer = record.layers;
    layers.value = this.layer;
    kinds.append(el("option", {value: "relative"}, "relative to a neutral question"),
                 el("option", {value: "raw"}, "raw"));
    kinds.value = this.kind;
    layers.onchange = () => { this.layer = +layers.value; this.draw(); };
    kinds.onchange = () => { this.kind = kinds.value; this.draw(); };
    this.peak = el("p", {class: "quiet"});
    this.element.append(el("h2", {}, "attention over the image"),
      el("div", {class: "controls"}, el("label", {}, "layer ", layers), el("label", {}, kinds)));
    for (const source of record.images) {
      const image = el("img", {src: source, alt: "the image as the model sees it"});
      const box = el("div", {class: "picture"}, image);
      image.onload = () => box.classList.toggle("tiny", image.naturalWidth <= 160);
      const canvas = el("canvas", {width: record.side, height: record.side,
                                   style: `width: ${100 * record.covered}%; height: ${100 * record.covered}%`});
      box.append(canvas);
      this.canvases.push(canvas);
      this.element.append(box);
    }
    this.element.append(this.peak);
  }

  draw() {
    const record = this.record, token = record.tokens[this.t], n = record.side;
    this.title.textContent = `token ${this.t + 1} of ${record.tokens.length}, probability ${percent(token.p)}`;
    this.top.replaceChildren();
    for (const [text, p, own] of token.top)
      this.top.append(el("span", {class: own ? "name own" : "name"}, visible(text)),
        el("span", {class: "bar", style: `width: ${100 * p}%`}), el("span", {class: "share"}, percent(p)));
    if (record.no_map) return;
    const l = this.layer - 1, R = record.tokens.length, I = record.images.length, values = this.maps[this.kind];
    this.canvases.forEach((canvas, i) => {
      const context = canvas.getContext("2d"), pixels = context.createImageData(n, n);
      const at = ((l * R + this.t) * I + i) * n * n;
      for (let j = 0; j < n * n; j++) pixels.data.set([8, 10, 24, 0.78 * (255 - values[at + j])], 4 * j);
      context.putImageData(pixels, 0, 0);
    });
    const peak = record[this.kind].peak[l][this.t];
    this.peak.textContent = "Brightest place: " + (this.kind === "raw" ? percent(peak) + " of the token's attention"
      : (peak < 9.5 ? peak.toPrecision(2) : Math.round(peak)) + " times the attention of the neutral question") + ", mean over heads.";
  }
}

// -> an element with the tokens of the answer; they are shaded where they were improbable
function answerView(record, panel) {
  const view = el("div", {class: "answer"});
  let chosen = null;
  record.tokens.forEach((token, t) => {
    const text = token.end ? "end" : visible(t ? token.text : token.text.trimStart() || token.text);
    const span = el("span", {class: token.end ? "token end" : "token", style: `--p: ${token.p}`, tabindex: 0,
                             role: "button"}, text);
    span.onclick = () => {
      document.querySelectorAll(".token.chosen").forEach(other => other.classList.remove("chosen"));
      span.classList.add("chosen");
      chosen = t;
      panel.show(record, t);
    };
    span.onmouseenter = () => panel.show(record, t);
    span.onfocus = () => panel.show(record, t);
    span.onkeydown = event => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      span.click();
    };
    view.append(span);
  });
  view.onmouseleave = () => { if (chosen !== null && view.querySelector(".chosen")) panel.show(record, chosen); };
  return view;
}

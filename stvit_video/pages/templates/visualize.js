"use strict";
// State lives in the address (#layer=owners&frame=3&token=12), so that a view can be linked to.
const $ = (id) => document.getElementById(id);
const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const clamp = (number, most) => Math.min(Math.max(number || 0, 0), most);
const first = DATA.layers.find((layer) => layer.key === DATA.first);
const layers = [first, ...DATA.layers.filter((layer) => layer !== first)];
if (DATA.tokens) layers.splice(3, 0, Object.assign(DATA.tokens, { key: "token" }));
const byKey = new Map(layers.map((layer) => [layer.key, layer]));
const start = new URLSearchParams(location.hash.slice(1));
const state = {
  layer: byKey.has(start.get("layer")) ? start.get("layer") : DATA.first,
  frame: clamp(parseInt(start.get("frame")), DATA.labels.length - 1),
  token: DATA.tokens ? clamp(parseInt(start.get("token") ?? DATA.tokens.first), DATA.tokens.count - 1) : 0,
};
let timer = null, paintToken = null;

function colour(rgb) { return "rgb(" + rgb.join(",") + ")"; }

function drawScale(scale) {
  const stops = scale.colours.map(colour).join(",");
  const ticks = scale.ticks.map(([place, label]) => {
    const tick = make("span", { textContent: label });
    tick.style.left = 100 * place + "%";
    return tick;
  });
  const colours = make("div", { className: "colours" });
  colours.style.background = "linear-gradient(to right," + stops + ")";
  return make("div", { className: "scale" }, scale.unit, colours, make("div", { className: "ticks" }, ...ticks));
}

function drawRegions() {
  const squares = DATA.regions.flat().map((rgb) => {
    const square = make("span", {});
    square.style.background = colour(rgb);
    return square;
  });
  const map = make("span", { className: "regions" }, ...squares);
  map.style.gridTemplateColumns = "repeat(" + DATA.regions[0].length + ",auto)";
  return make("p", { className: "small soft" }, map, "\u2002where each colour's token starts");
}

function keyOf(layer) {
  if (layer.scale) return drawScale(layer.scale);
  return layer.regions ? drawRegions() : make("span", {});
}

function show() {
  const layer = byKey.get(state.layer);
  $("view").src = layer === DATA.tokens ? paintToken() : layer.frames[state.frame];
  $("frame").value = state.frame;
  $("moment").textContent = "frame " + (state.frame + 1) + " of " + DATA.labels.length + " \u00b7 " + DATA.labels[state.frame];
  if ($("title").textContent !== layer.title) {
    $("title").textContent = layer.title;
    $("caption").textContent = layer.caption;
    $("key").replaceChildren(keyOf(layer));
    document.querySelector('[name="layer"][value="' + state.layer + '"]').checked = true;
    if (DATA.tokens) $("chooser").hidden = layer !== DATA.tokens;
  }
  const words = new URLSearchParams({ layer: state.layer, frame: state.frame });
  if (DATA.tokens) words.set("token", state.token);
  try { history.replaceState(null, "", "#" + words); } catch { /* a page inside a frame may not */ }
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => { state.frame = (state.frame + 1) % DATA.labels.length; show(); }, DATA.milliseconds) : null;
  $("play").textContent = on ? "\u275a\u275a" : "\u25b6";
  $("play").setAttribute("aria-label", on ? "pause" : "play");
}

function buildViewer() {
  for (const layer of layers) {
    const choice = make("input", { type: "radio", name: "layer", value: layer.key, onchange: () => { state.layer = layer.key; show(); } });
    $("layers").append(make("label", {}, choice, layer === first ? "where it looked" : layer.short));
  }
  $("frame").oninput = () => { play(false); state.frame = Number($("frame").value); show(); };
  $("play").onclick = () => play(timer === null);
  $("play").hidden = $("frame").hidden = DATA.labels.length === 1;
}

function buildFilms() {
  for (const layer of DATA.layers) {
    const film = make("div", { className: "scroll film" });
    layer.frames.forEach((source, i) => {
      const picture = make("img", { src: source, alt: layer.title + ", " + DATA.labels[i], loading: "lazy" });
      picture.onclick = () => { state.layer = layer.key; state.frame = i; show(); $("view").scrollIntoView({ block: "center" }); };
      film.append(make("figure", {}, picture, DATA.labels[i]));
    });
    const words = [make("h3", { textContent: layer.title }), make("p", { className: "small", textContent: layer.caption })];
    $("films").append(make("div", { className: "layer" }, ...words, film));
  }
}

function buildTokens() {
  const { slots, grid, ramp, maps, room } = DATA.tokens;
  const drawn = unpack(maps), owners = DATA.tokens.owners, columns = DATA.regions[0].length;
  const perSlot = DATA.regions.flat().length, perFrame = grid[1] * grid[2], size = grid[0] * perFrame;
  slots.forEach((label, slot) => {
    const map = make("div", {});
    map.style.gridTemplateColumns = "repeat(" + columns + ",auto)";
    DATA.regions.flat().forEach((rgb, i) => {
      const number = slot * perSlot + i;
      // The slider below is the way for the keyboard.
      const button = make("button", { type: "button", tabIndex: -1, title: "token " + (number + 1), onclick: () => choose(number) });
      button.setAttribute("aria-label", "token " + (number + 1));
      button.style.background = colour(rgb);
      map.append(button);
    });
    $("tokens").append(make("div", { className: "slot" }, label, map));
  });
  const load = (source) => make("img", { src: source, onload: () => { if (state.layer === "token") show(); } });
  const [frames, textures] = [DATA.tokens.frames.map(load), DATA.tokens.texture.map(load)];
  const canvas = make("canvas", { width: DATA.width, height: DATA.height }), brush = canvas.getContext("2d");
  const moment = () => Math.floor(state.frame * grid[0] / DATA.labels.length);

  paintToken = () => {
    const frame = frames[state.frame], texture = textures[state.frame];
    if (!frame.complete || !texture.complete) return frame.src;
    // A square is its colour plus the texture, whose mean is ``room``; both parts are added.
    brush.globalCompositeOperation = "copy";
    brush.drawImage(texture, 0, 0);
    const edge = (step, steps, length) => Math.ceil(step * length / steps);
    for (let place = 0; place < perFrame; place++) {
      const level = drawn[state.token * size + moment() * perFrame + place];
      const [row, column] = [Math.floor(place / grid[2]), place % grid[2]];
      const [top, left] = [edge(row, grid[1], canvas.height), edge(column, grid[2], canvas.width)];
      const box = [left, top, edge(column + 1, grid[2], canvas.width) - left, edge(row + 1, grid[1], canvas.height) - top];
      brush.globalCompositeOperation = level ? "lighter" : "source-over";
      brush.fillStyle = colour(ramp[level].map((part) => part - room));
      if (level) brush.fillRect(...box);
      else brush.drawImage(frame, ...box, ...box);
    }
    return canvas.toDataURL();
  };

  function describe(number) {
    const [slot, place] = [Math.floor(number / perSlot), number % perSlot], part = DATA.tokens.parts?.[number];
    const adds = part === undefined ? "" : ". It adds " + (part < 0 ? "" : "+") + part.toPrecision(3) + " to the score of \u201c" + DATA.tokens.explained
      + "\u201d (the mean of all tokens is " + DATA.tokens.mean.toPrecision(3) + ")";
    return "Token " + (number + 1) + " of " + DATA.tokens.count + " starts in row " + (Math.floor(place / columns) + 1)
      + ", column " + (place % columns + 1) + " at " + slots[slot] + ". It draws " + DATA.tokens.drawn[number]
      + " % from image tokens and the rest from semantic tokens; of the former, " + DATA.tokens.own[number]
      + " % is from its own frames" + adds + ".";
  }

  function choose(number) {
    state.token = number;
    $("number").value = number;
    document.querySelectorAll(".slot button").forEach((button, i) => button.setAttribute("aria-pressed", i === number));
    $("token").textContent = describe(number);
  }

  $("number").oninput = () => { choose(Number($("number").value)); show(); };
  $("tokens").onclick = show;
  $("view").classList.add("choosing");
  $("view").onclick = (event) => {
    const box = $("view").getBoundingClientRect();
    const [row, column] = [(event.clientY - box.top) / box.height * grid[1], (event.clientX - box.left) / box.width * grid[2]];
    choose(owners[moment() * perFrame + clamp(Math.floor(row), grid[1] - 1) * grid[2] + clamp(Math.floor(column), grid[2] - 1)]);
    state.layer = "token";
    show();
  };
  choose(state.token);
}

buildViewer();
buildFilms();
if (DATA.tokens) buildTokens();
show();
document.documentElement.dataset.ready = "yes";

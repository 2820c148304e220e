"use strict";
// The report's script: sorts and filters the table of cases, and draws one case at a time. Its pictures are loaded when
// it is looked at. Slices of a layer lie side by side in one picture, the atlas; see regpipe/views.py.

const byId = (id) => document.getElementById(id);
const controls = byId("controls");
const rows = [...document.querySelectorAll("#cases tbody tr")];
const NAMES = { fixed: "fixed", before: "moving, before", warped: "moving, after" };
const COLOURS = { fixed: "rgb(230, 159, 0)", moving: "rgb(86, 180, 233)" };
const MAPS = ["grid", "jacobian", "uncertainty"]; // views that compare no images
const GAP = 16; // pixels between planes, as in the style sheet
const state = { index: 0, case: null, pictures: new Map(), planes: [], second: false, timer: 0 };

// ------------------------------------------------------------------------------------------- table

const column = (row, i) => row.children[i].dataset.value ?? row.children[i].textContent.trim();

function compare(a, b, i, sign) {
  const [x, y] = [column(a, i), column(b, i)];
  if ((x === "") !== (y === "")) return x === "" ? 1 : -1; // what has no value comes last either way
  const numbers = [x, y].every((text) => text !== "" && !Number.isNaN(Number(text)));
  return sign * (numbers ? x - y : x.localeCompare(y, undefined, { numeric: true }));
}

function sortBy(head) {
  const ascending = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  rows.sort((a, b) => compare(a, b, head.cellIndex, ascending ? 1 : -1));
  document.querySelector("#cases tbody").append(...rows);
}

function filter() {
  const form = byId("filter");
  const [status, name] = [form.elements.status.value, form.elements.name.value.toLowerCase()];
  for (const row of rows)
    row.hidden = !row.querySelector("a").textContent.toLowerCase().includes(name) || !["", row.dataset.status].includes(status);
  byId("shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} cases`;
}

// ---------------------------------------------------------------------------------------- one case

function choose(index) {
  state.index = index;
  state.case = JSON.parse(byId(`data-${index}`).textContent);
  state.pictures.clear();
  const { name, status, landmarks, warnings } = state.case;
  for (const row of rows) row.removeAttribute("aria-current");
  rowOf(index).setAttribute("aria-current", "true");
  byId("case-name").textContent = name;
  Object.assign(byId("case-status"), { textContent: status, className: `mark ${status}` });
  byId("warnings").replaceChildren(...warnings.map((line) => element("li", { textContent: line })));
  byId("warnings").hidden = warnings.length === 0;
  fill("#numbers tbody", state.case.numbers.map((n) => [n.unit ? `${n.title}, ${n.unit}` : n.title, n.before, n.value, n.limits, n.step]));
  fill("#points tbody", landmarks.map((point, i) => [i + 1, point.errors[0].toFixed(2), point.errors[1].toFixed(2)]));
  byId("points").hidden = landmarks.length === 0;
  build();
  update();
}

const rowOf = (index) => rows.find((row) => row.querySelector("a").hash === `#case-${index}`);

function fill(where, lines) {
  const body = document.querySelector(where);
  body.replaceChildren(...lines.map((cells) => {
    const line = document.createElement("tr");
    cells.forEach((text, i) => {
      const cell = line.appendChild(document.createElement(i === 0 ? "th" : "td"));
      if (i === 0) cell.scope = "row";
      else if (i < 4) cell.className = "number";
      else if (text) cell.className = text;
      cell.textContent = text;
    });
    return line;
  }));
}

// A figure per plane: caption, canvas with the letters of its sides, slider.
function build() {
  const { planes, pictures } = state.case;
  const holder = byId("planes");
  holder.replaceChildren();
  state.planes = planes.map((plane) => {
    const figure = holder.appendChild(element("figure"));
    const caption = figure.appendChild(element("figcaption"));
    caption.append(element("strong", { textContent: plane.name }), element("span"));
    const stage = figure.appendChild(element("div", { className: "stage" }));
    const canvas = stage.appendChild(element("canvas", { tabIndex: 0 }));
    canvas.setAttribute("role", "img");
    for (const [i, place] of ["left", "right", "top", "bottom"].entries())
      if (plane.letters) stage.append(element("span", { className: place, textContent: plane.letters[i] }));
    stage.append(element("span", { className: "one" }), element("span", { className: "two" }));
    const slider = element("input", { type: "range", min: 0, max: plane.slices.length - 1 });
    slider.value = Math.floor(plane.slices.length / 2);
    slider.setAttribute("aria-label", `${plane.name} slice`);
    slider.hidden = plane.slices.length < 2;
    figure.append(slider);
    const view = { ...plane, figure, canvas, slider, stage, caption: caption.lastChild };
    slider.addEventListener("input", () => draw(view));
    listen(view);
    return view;
  });
  const textContent = "This case has no pictures to scroll through: register it again. ";
  Object.assign(byId("missing"), { hidden: planes.length > 0, textContent });
  if (planes.length === 0 && pictures["sheet.png"])
    holder.append(element("img", { src: pictures["sheet.png"], alt: "Contact sheet of this case", style: "max-width: 100%" }));
  byId("sizes").hidden = planes.length < 2;
}

const element = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);

// Keys and pointer on a picture: up and down scroll, left and right and dragging move the divider. The wheel scrolls
// a picture that has the focus; else it scrolls the page.
function listen(view) {
  const { canvas, slider } = view;
  const scroll = (by) => { slider.value = Number(slider.value) + by; draw(view); };
  const divide = (to) => { controls.elements.divider.value = to; update(); };
  canvas.addEventListener("keydown", (event) => {
    const at = Number(controls.elements.divider.value);
    const actions = { ArrowUp: () => scroll(1), ArrowDown: () => scroll(-1), ArrowLeft: () => divide(at - 2), ArrowRight: () => divide(at + 2) };
    if (actions[event.key]) event.preventDefault();
    actions[event.key]?.();
  });
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas || view.slices.length < 2) return;
    event.preventDefault();
    scroll(event.deltaY < 0 ? 1 : -1);
  }, { passive: false });
  const drag = (event) => {
    if (event.buttons !== 1 || mode() !== "swipe") return;
    const box = canvas.getBoundingClientRect();
    divide((100 * (event.clientX - box.left)) / box.width);
  };
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); drag(event); });
  canvas.addEventListener("pointermove", drag);
}

// ----------------------------------------------------------------------------------------- drawing

const mode = () => controls.elements.mode.value;
const side = () => controls.elements.side.value;

function picture(plane, layer) {
  const name = `${plane.name}_${state.case.layers[layer]}`;
  if (!state.pictures.has(name)) {
    const image = new Image();
    const owner = state.case;
    image.onload = () => { if (state.case === owner) draw(plane); };
    image.onerror = () => complain(name);
    if (state.case.pictures[name]) image.src = state.case.pictures[name];
    else complain(name);
    state.pictures.set(name, image);
  }
  return state.pictures.get(name);
}

function complain(name) {
  const textContent = `A picture is missing: ${name}. Copy the whole folder, or register the case again.`;
  Object.assign(byId("missing"), { hidden: false, textContent });
}

function paint(pen, view, layer, smooth = true) {
  const image = picture(view, layer);
  if (!image.complete || !image.naturalWidth) return;
  const [width, height] = layer.startsWith("outline") || layer === "grid" ? view.fine : view.tile;
  const at = Number(view.slider.value);
  const [x, y] = [(at % view.columns) * width, Math.floor(at / view.columns) * height];
  pen.imageSmoothingEnabled = smooth;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, x, y, width, height, 0, 0, view.canvas.width, view.canvas.height);
}

function clipped(pen, shape, paintIt) {
  pen.save();
  pen.beginPath();
  shape();
  pen.clip();
  paintIt();
  pen.restore();
}

const LOOKS = {
  swipe(pen, view, width, height) {
    const at = (width * controls.elements.divider.value) / 100;
    paint(pen, view, "fixed");
    clipped(pen, () => pen.rect(at, 0, width - at, height), () => paint(pen, view, side()));
    pen.fillStyle = "#fff";
    pen.fillRect(at - 1, 0, 2, height);
    return [NAMES.fixed, NAMES[side()]];
  },
  checkerboard(pen, view, width, height) {
    const edge = width / controls.elements.squares.value;
    const squares = () => {
      for (let row = 0; row * edge < height; row++)
        for (let i = (row + 1) % 2; i * edge < width; i += 2) pen.rect(i * edge, row * edge, edge, edge);
    };
    paint(pen, view, "fixed");
    clipped(pen, squares, () => paint(pen, view, side()));
    return [`${NAMES.fixed} / ${NAMES[side()]}`, ""];
  },
  flicker(pen, view) {
    const shown = state.second ? side() : "fixed";
    paint(pen, view, shown);
    return [NAMES[shown], ""];
  },
  grid(pen, view, width, height) {
    paint(pen, view, "before");
    pen.fillStyle = "rgba(0, 0, 0, 0.35)";
    pen.fillRect(0, 0, width, height);
    paint(pen, view, "grid");
    return [NAMES.before, ""];
  },
  jacobian(pen, view) {
    paint(pen, view, "jacobian", false);
    return ["Jacobian determinant", ""];
  },
  uncertainty(pen, view) {
    paint(pen, view, "uncertainty", false);
    return ["expected error", ""];
  },
};

function draw(view) {
  const { canvas, stage } = view;
  if (view.figure.hidden) return;
  const width = Math.max(1, Math.round(stage.clientWidth * devicePixelRatio));
  const height = Math.max(1, Math.round((width * view.mm[1]) / view.mm[0]));
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, width, height);
  const texts = LOOKS[mode()](pen, view, width, height);
  const compared = !MAPS.includes(mode());
  if (compared && has("outline") && controls.elements.outlines.checked) {
    paint(pen, view, "outline_fixed");
    paint(pen, view, `outline_${side()}`);
  }
  if (compared && controls.elements.landmarks.checked) arrows(pen, view, width, height);
  [".one", ".two"].forEach((place, i) => { stage.querySelector(place).textContent = texts[i]; });
  const at = Number(view.slider.value);
  view.caption.textContent = view.slices.length < 2 ? "" : `slice ${at + 1} of ${view.slices.length} (voxel ${view.slices[at]})`;
  const told = `${view.name}, ${view.caption.textContent || "whole"}; ${mode()}: ${texts.filter(Boolean).join(" and ")}`;
  canvas.setAttribute("aria-label", told);
  view.slider.setAttribute("aria-valuetext", `slice ${at + 1} of ${view.slices.length}`);
}

// Landmarks whose slice this is: a ring at the fixed one, an arrow to where the moving one comes to lie.
function arrows(pen, view, width, height) {
  const [a, b] = view.axes;
  const upright = view.across === null;
  const place = (voxel) => [[a, width, 0], [b, height, 1]].map(([axis, length, i]) => {
    const share = (voxel[axis] + 0.5) / view.shape[i];
    return length * (upright ? share : 1 - share);
  });
  const here = Number(view.slider.value);
  const nearest = (voxel) => view.slices.reduce((best, slice, i) =>
    Math.abs(slice - voxel) < Math.abs(view.slices[best] - voxel) ? i : best, 0);
  pen.lineWidth = 2 * devicePixelRatio;
  for (const point of state.case.landmarks) {
    if (!upright && nearest(point.fixed[view.across]) !== here) continue;
    const [from, to] = [place(point.fixed), place(point[side()])];
    pen.strokeStyle = COLOURS.fixed;
    pen.beginPath();
    pen.arc(...from, 4 * devicePixelRatio, 0, 2 * Math.PI);
    pen.stroke();
    pen.strokeStyle = COLOURS.moving;
    arrow(pen, from, to);
  }
}

function arrow(pen, from, to) {
  const angle = Math.atan2(to[1] - from[1], to[0] - from[0]);
  const head = Math.min(7 * devicePixelRatio, Math.hypot(to[0] - from[0], to[1] - from[1]));
  const ends = [2.6, -2.6].map((turn) => [to[0] + head * Math.cos(angle + turn), to[1] + head * Math.sin(angle + turn)]);
  pen.beginPath();
  for (const end of [from, ...ends]) {
    pen.moveTo(...to);
    pen.lineTo(...end);
  }
  pen.stroke();
}

// What the state of the controls means for what is shown; then everything is drawn.
const has = (what) => what === "landmarks" ? state.case.landmarks.length > 0 : Boolean(state.case.layers[`${what}_fixed`]);

function update() {
  byId("error").hidden = !state.case.layers.uncertainty;
  if (byId("error").hidden && mode() === "uncertainty") controls.elements.mode.value = "swipe";
  const compared = !MAPS.includes(mode());
  for (const part of controls.querySelectorAll("[data-modes]")) part.hidden = !part.dataset.modes.split(" ").includes(mode());
  for (const part of controls.querySelectorAll("[data-needs]")) part.hidden = !has(part.dataset.needs);
  byId("overlays").hidden = !compared || !(has("outline") || has("landmarks"));
  for (const part of document.querySelectorAll("[data-legend]")) {
    const what = part.dataset.legend;
    const box = controls.elements[what === "outline" ? "outlines" : "landmarks"];
    part.hidden = MAPS.includes(what) ? mode() !== what : !compared || !has(what) || !box.checked;
  }
  for (const [name, unit] of Object.entries({ divider: " %", squares: "", seconds: " s" }))
    controls.elements[name].nextElementSibling.textContent = controls.elements[name].value + unit;
  if (mode() !== "flicker") play(false);
  const one = controls.elements.plane.value;
  for (const view of state.planes) view.figure.hidden = state.planes.length > 1 && one !== "" && one !== view.name;
  fit();
}

// All planes at one scale, side by side where they fit, and not higher than the window.
function fit() {
  const shown = state.planes.filter((view) => !view.figure.hidden);
  if (!shown.length) return;
  const holder = byId("planes");
  const stacked = innerWidth < 700;
  const [wide, high] = [0, 1].map((i) => shown.map((view) => view.mm[i]));
  const total = stacked ? Math.max(...wide) : wide.reduce((sum, mm) => sum + mm);
  const free = holder.clientWidth - (stacked ? 0 : GAP * (shown.length - 1));
  const scale = Math.min(free / total, Math.max(240, (shown.length > 1 ? 0.72 : 0.88) * innerHeight) / Math.max(...high));
  for (const view of shown) {
    view.figure.style.width = `${Math.floor(scale * view.mm[0])}px`;
    draw(view);
  }
}

function play(on) {
  const button = byId("play");
  button.setAttribute("aria-pressed", String(on));
  button.textContent = on ? "Pause" : "Play";
  clearInterval(state.timer);
  if (on) state.timer = setInterval(() => { state.second = !state.second; state.planes.forEach(draw); }, 1000 * controls.elements.seconds.value);
}

// -------------------------------------------------------------------------------------------- start

function step(by) {
  const shown = rows.filter((row) => !row.hidden);
  const next = shown[shown.indexOf(rowOf(state.index)) + by];
  if (next) location.hash = next.querySelector("a").hash;
}

// The case that the address names; on opening the first one, if it names none. The skip link names none either.
function follow(event) {
  const named = location.hash.match(/^#case-(\d+)$/);
  const index = Number(named?.[1] ?? 0);
  if ((event && !named) || !byId(`data-${index}`)) return;
  choose(index);
  if (named) byId("case-name").focus({ preventScroll: true });
}

for (const head of document.querySelectorAll("#cases thead th")) head.querySelector("button").addEventListener("click", () => sortBy(head));
byId("filter").addEventListener("input", filter);
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
controls.addEventListener("input", (event) => { update(); if (event.target.name === "seconds") play(true); });
byId("play").addEventListener("click", () => play(byId("play").getAttribute("aria-pressed") !== "true"));
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
addEventListener("hashchange", follow);
for (const moment of ["resize", "beforeprint"]) addEventListener(moment, fit);
filter();
follow();

"use strict";
// The viewer's page. Everything comes from this server; what stands in the address after # can be shared.

const $ = id => document.getElementById(id);
const state = { about: null, rows: [], slide: null, panes: [], leader: null, shown: true, asked: 0, picked: 0 };
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const narrow = matchMedia("(max-width: 900px)");

// --- asking the server ----------------------------------------------------------------------------------------------

const path = (slide, rest, query = {}) => {
  const words = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value != null));
  return `api/slides/${encodeURIComponent(slide)}/${rest}${words.size ? `?${words}` : ""}`;
};

async function ask(address) {
  for (let again = 0; ; again++) {
    let answer;
    try {
      answer = await fetch(address, { credentials: "same-origin" });
    } catch {
      throw new Error("The viewer does not answer: was it ended?");
    }
    if (answer.status === 503 && again < 5) {
      await new Promise(done => setTimeout(done, 400 * 2 ** again));
      continue;
    }
    const content = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(content.error || `The viewer answered ${answer.status}.`);
    return content;
  }
}

function complain(error) {
  $("alert").textContent = error ? String(error.message || error) : "";
  $("alert").hidden = !error;
  if (error) say("");
}

const say = text => { $("status").textContent = text; };

function make(tag, given = {}, ...children) {
  const element = Object.assign(document.createElement(tag), given);
  element.append(...children);
  return element;
}

const number = value => {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(2) : value.toFixed(size < 10 ? 3 : 1);
  return text.replace("-", "−");
};

// --- the list of slides ---------------------------------------------------------------------------------------------

const MOST_ROWS = 300;

async function list() {
  const found = await ask("api/slides");
  state.rows = found.slides;
  drawList();
  if (found.waiting) setTimeout(() => list().catch(complain), 1500);
}

function told(row) {
  if (row.width === undefined) return "…";
  const parts = [`${row.width} × ${row.height} px`, `${Number(row.mpp.toPrecision(3))} µm`];
  parts.push(row.patches == null ? "no features" : `${row.patches} patches`);
  return parts.join(" · ");
}

function drawList() {
  const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = row => `${row.name} ${Object.values(row.table).join(" ")}`.toLowerCase();
  const found = state.rows.filter(row => words.every(word => text(row).includes(word)));
  const bad = state.rows.filter(row => row.error).length;
  $("count").textContent = `${state.rows.length}${bad ? `, ${bad} not readable` : ""}`;
  const focused = document.activeElement?.dataset?.slide;
  const items = found.slice(0, MOST_ROWS).map(row => {
    if (row.error) return make("li", {}, make("div", { className: "broken", textContent: row.error }));
    const button = make("button", { type: "button", title: Object.entries(row.table).map(pair => pair.join(": ")).join("\n") },
      make("img", { loading: "lazy", alt: "", src: path(row.name, "thumbnail.jpg") }),
      make("b", { textContent: row.name }), make("small", { textContent: told(row) }));
    button.dataset.slide = row.name;
    button.setAttribute("aria-current", String(row.name === state.slide?.name));
    button.addEventListener("click", () => { open(row.name); if (narrow.matches) $("drawer").open = false; });
    return make("li", {}, button);
  });
  if (found.length > MOST_ROWS) items.push(make("li", { className: "soft", textContent: `and ${found.length - MOST_ROWS} more: type to find` }));
  if (!found.length) items.push(make("li", { className: "soft", textContent: state.rows.length ? "no slide of this name" : "…" }));
  $("slides").replaceChildren(...items);
  if (focused) [...$("slides").querySelectorAll("button")].find(button => button.dataset.slide === focused)?.focus();
}

function step(by) {
  const good = state.rows.filter(row => !row.error);
  const at = good.findIndex(row => row.name === state.slide?.name);
  const next = good[at + by];
  if (next) open(next.name);
}

// --- panes: one or two deep zooms that move together ----------------------------------------------------------------

function pane() {
  const view = make("div", { className: "view" });
  const caption = make("figcaption");
  const figure = make("figure", { className: "pane" }, view, caption);
  $("panes").append(figure);
  const viewer = OpenSeadragon({
    element: view, drawer: "canvas", showNavigationControl: false, maxZoomPixelRatio: 4, visibilityRatio: 0.4,
    animationTime: calm ? 0 : 0.5, imageLoaderLimit: 6, tileRetryMax: 4, tileRetryDelay: 700,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true }, gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true },
  });
  const own = { figure, view, caption, viewer, overlay: null, map: null, mark: null };
  const lead = () => { state.leader = own; };
  view.addEventListener("pointerdown", lead, true);
  view.addEventListener("wheel", lead, { capture: true, passive: true });
  view.addEventListener("keydown", lead, true);
  viewer.addHandler("viewport-change", () => { if (state.leader === own) follow(own); ruler(); });
  viewer.addHandler("canvas-click", event => { if (event.quick) pick(own, viewer.viewport.pointFromPixel(event.position)); });
  viewer.addHandler("canvas-key", event => {
    const key = event.originalEvent.key;
    if (key === "Enter") pick(own, viewer.viewport.getCenter(true));
    if (/^[a-zA-Z]$/.test(key)) event.preventDefaultAction = true;  // turning and flipping would part the map from its words
  });
  return own;
}

function follow(leader) {
  const center = leader.viewer.viewport.getCenter(true), zoom = leader.viewer.viewport.getZoom(true);
  for (const other of state.panes) if (other !== leader && other.viewer.isOpen()) {
    other.viewer.viewport.zoomTo(zoom, null, true);
    other.viewer.viewport.panTo(center, true);
  }
}

function wantPanes(count) {
  while (state.panes.length > count) {
    const last = state.panes.pop();
    last.viewer.destroy();
    last.figure.remove();
  }
  const opening = [];
  while (state.panes.length < count) {
    const next = pane();
    const view = state.panes[0]?.viewer.isOpen() ? state.panes[0] : null;
    state.panes.push(next);
    if (state.slide) opening.push(show(next).then(() => { if (view) { state.leader = view; follow(view); } }));
  }
  state.leader = state.panes[0];
  return Promise.all(opening);
}

function show(own) {
  const row = state.slide;
  own.overlay = own.map = own.mark = null;
  own.caption.replaceChildren();
  own.figure.setAttribute("aria-busy", "true");
  return new Promise((done, failed) => {
    own.viewer.addOnceHandler("open", () => {
      own.viewer.canvas.setAttribute("role", "application");
      own.viewer.canvas.setAttribute("aria-label", `Slide ${row.name}. Arrows pan, plus and minus zoom, 0 shows all, Enter the patch in the middle.`);
      own.figure.setAttribute("aria-busy", "false");
      done();
    });
    own.viewer.addOnceHandler("open-failed", event => failed(new Error(event.message)));
    own.viewer.open({
      width: row.width, height: row.height, tileSize: row.tile, tileOverlap: 0, minLevel: row.first, maxLevel: row.last,
      getTileUrl: (level, x, y) => path(row.name, `tiles/${level}/${x}_${y}.jpg`),
    });
  });
}

async function open(name) {
  complain(null);
  try {
    const row = await ask(path(name, "").replace(/\/$/, ""));
    state.slide = row;
    state.picked++;
    $("subject").textContent = `${row.name} · ${told(row)}${row.broken ? " · hatched: cannot be decoded" : ""}`;
    for (const id of ["top", "patch", "downloads", "outcome", "look"]) $(id).hidden = true;
    $("hint").hidden = false;
    remember();
    drawList();
    await wantPanes(Math.max(state.panes.length, 1));
    await Promise.all(state.panes.map(show));
    ruler();
    if (!row.models.length) say("No features of this slide: maps need those that medclip extract writes.");
    else if ($("prompt").value.trim() || takesNoText()) await draw();
    else say("");
  } catch (error) {
    complain(error);
  }
}

// A round length in µm or mm, as long as it is on the screen.
function ruler() {
  const own = state.panes[0];
  if (!state.slide || !own?.viewer.isOpen()) return;
  const pixel = state.slide.width * state.slide.mpp / (own.viewer.viewport.getZoom(true) * own.viewer.viewport.getContainerSize().x);
  const raw = pixel * 110, power = 10 ** Math.floor(Math.log10(raw));
  const length = [1, 2, 5, 10].map(n => n * power).filter(n => n <= raw * 1.001).pop() || power;
  const bar = make("i");
  bar.style.width = `${length / pixel}px`;
  $("ruler").replaceChildren(bar, length >= 1000 ? `${length / 1000} mm` : `${Number(length.toPrecision(2))} µm`);
}

// --- maps -----------------------------------------------------------------------------------------------------------

const kindOf = name => state.about.models.find(model => model.name === name)?.kind;
const takesNoText = () => kindOf($("model").value) === "attention";

function wanted() {
  const prompt = $("prompt").value.trim(), second = $("second").value.trim();
  const model = $("model").value, other = $("other").value, mode = $("mode").value;
  const query = (name, text, against) => kindOf(name) === "attention" ? { model: name } : { model: name, prompt: text, against };
  if (mode === "models") return [query(model, prompt), query(other, prompt)];
  if (mode === "prompts") return [query(model, prompt), query(model, second)];
  if (mode === "difference") return [query(model, prompt, second)];
  return [query(model, prompt)];
}

function fields() {
  const mode = $("mode").value, two = mode === "difference" || mode === "prompts";
  $("second-field").hidden = !two;
  $("second-name").textContent = mode === "difference" ? "Minus the text" : "Second text";
  $("other-field").hidden = mode !== "models";
  $("prompt").required = !wanted().every(query => query.prompt === undefined);
  $("second").required = two && !takesNoText();
}

async function draw() {
  const queries = wanted();
  if (!state.slide || queries.some(query => query.prompt === "")) return;  // a text is still being typed
  const turn = ++state.asked, slide = state.slide, begun = performance.now();
  complain(null);
  say("Looking…");
  try {
    await wantPanes(queries.length);
    const maps = await Promise.all(queries.map(query => ask(path(slide.name, "map", query))));
    if (turn !== state.asked || slide !== state.slide) return;
    await Promise.all(maps.map((map, i) => lay(state.panes[i], map, path(slide.name, "map.png", queries[i]))));
    if (turn !== state.asked || slide !== state.slide) return;
    $("look").hidden = false;
    $("hint").hidden = $("patch").hidden = true;
    findings(maps, queries);
    say(`${maps[0].patches} patches, ${Math.round(performance.now() - begun)} ms`);
    remember();
  } catch (error) {
    if (turn === state.asked) complain(error);
  }
}

function lay(own, map, url) {
  const width = state.slide.width, item = own.viewer.world;
  own.map = map;
  legend(own);
  return new Promise((done, failed) => own.viewer.addSimpleImage({
    url, x: map.x / width, y: map.y / width, width: map.width / width, opacity: strength(),
    success: event => {
      if (own.overlay) item.removeItem(own.overlay);
      own.overlay = event.item;
      done();
    },
    error: () => failed(new Error("The map's picture did not arrive: ask again.")),
  }));
}

function legend(own) {
  const map = own.map, bar = make("div", { className: "bar" });
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `Colours from ${number(map.low)} to ${number(map.high)}, ${map.unit}`);
  bar.style.background = `linear-gradient(to right, ${map.stops.join(", ")})`;
  own.caption.replaceChildren(make("b", { textContent: map.title }), bar, make("div", { className: "ends", title: map.scale },
    make("span", { textContent: number(map.low) }), make("span", { textContent: map.unit }), make("span", { textContent: number(map.high) })));
}

const strength = () => state.shown ? $("opacity").value / 100 : 0;

function fade() {
  for (const own of state.panes) own.overlay?.setOpacity(strength());
  $("toggle").textContent = state.shown ? "Map shown" : "Map hidden";
  $("toggle").setAttribute("aria-pressed", String(state.shown));
}

function toggle() { state.shown = !state.shown; fade(); }

function findings(maps, queries) {
  const several = maps.length > 1;
  const name = (map, i) => several && queries[0].model !== queries[1].model ? `${map.title} · ${queries[i].model}` : map.title;
  if (several) maps.forEach((map, i) => { state.panes[i].caption.querySelector("b").textContent = name(map, i); });
  $("top").hidden = false;
  $("top").querySelector("div").replaceChildren(...maps.flatMap((map, i) => [
    ...(several ? [make("h3", { textContent: name(map, i) })] : []), gallery(map.top)]));
  const outcome = maps.flatMap(map => Object.entries(map.outcome));
  $("outcome").hidden = !outcome.length;
  $("outcome").querySelector("dl").replaceChildren(...outcome.flatMap(([key, value]) =>
    [make("dt", { textContent: key }), make("dd", { textContent: number(value) })]));
  $("downloads").hidden = false;
  $("downloads").querySelector("ul").replaceChildren(...maps.flatMap((map, i) => state.about.downloads.map(kind =>
    make("li", {}, make("a", { href: path(state.slide.name, "download", { ...queries[i], kind }), download: "",
      textContent: `${several ? `${i + 1}: ` : ""}${kind}` })))));
}

function gallery(hits) {
  return make("ul", { className: "gallery" }, ...hits.map(hit => {
    const elsewhere = hit.slide !== state.slide.name;
    const image = make("img", { loading: "lazy", alt: "", src: path(hit.slide, "patch.jpg", { x: hit.x, y: hit.y, side: Math.round(hit.side) }) });
    const button = make("button", { type: "button", title: elsewhere ? hit.slide : "" }, image, make("span", { textContent: number(hit.score) }),
      ...(elsewhere ? [make("span", { className: "soft", textContent: hit.slide })] : []));
    button.setAttribute("aria-label", `Patch at ${hit.x}, ${hit.y}${elsewhere ? ` of ${hit.slide}` : ""}, ${number(hit.score)}: go there`);
    button.addEventListener("click", () => visit(hit));
    return make("li", {}, button);
  }));
}

async function visit(hit) {
  if (hit.slide !== state.slide.name) await open(hit.slide);
  if (hit.slide !== state.slide.name) return;
  const width = state.slide.width, room = 5 * hit.side / width;
  const rect = new OpenSeadragon.Rect((hit.x + hit.side / 2) / width - room / 2, (hit.y + hit.side / 2) / width - room / 2, room, room);
  state.leader = state.panes[0];
  state.panes[0].viewer.viewport.fitBounds(rect, calm);
  mark(hit);
  if (narrow.matches) $("stage").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
  say(`Patch at ${hit.x}, ${hit.y}`);
}

function mark(hit) {
  const width = state.slide.width;
  for (const own of state.panes) {
    if (own.mark) own.viewer.removeOverlay(own.mark);
    own.mark = make("div", { className: "mark" });
    own.viewer.addOverlay({ element: own.mark, location: new OpenSeadragon.Rect(hit.x / width, hit.y / width, hit.side / width, hit.side / width) });
  }
}

// --- a patch and what is like it ------------------------------------------------------------------------------------

async function pick(own, point) {
  const row = state.slide, at = state.panes.indexOf(own), turn = ++state.picked;
  if (!row?.models.length) return;
  const model = $("mode").value === "models" && at === 1 ? $("other").value : $("model").value;
  const x = Math.floor(point.x * row.width), y = Math.floor(point.y * row.width);
  try {
    const found = await ask(path(row.name, "near", { model, x, y }));
    if (turn !== state.picked || row !== state.slide) return;
    complain(null);
    mark(found.patch);
    const parts = [make("div", { className: "chosen" },
      make("img", { alt: "The chosen patch", src: path(row.name, "patch.jpg", { x: found.patch.x, y: found.patch.y, side: Math.round(found.patch.side) }) }),
      make("p", { textContent: `x ${found.patch.x}, y ${found.patch.y}, ${Math.round(found.patch.side * row.mpp)} µm a side` }))];
    if (found.captions.length) parts.push(make("h3", { textContent: "Captions nearest to it" }),
      make("ol", { className: "captions" }, ...found.captions.map(([text, score]) => make("li", { textContent: `${text} (${number(score)})` }))));
    if (found.here.length) parts.push(make("h3", { textContent: "Most like it on this slide" }), gallery(found.here));
    if (found.of > 1) {
      const searched = found.searched < found.of ? ` (${found.searched} of ${found.of} slides searched so far)` : "";
      parts.push(make("h3", { textContent: `Most like it on other slides${searched}` }), gallery(found.cohort));
    }
    $("patch").querySelector("div").replaceChildren(...parts);
    $("patch").hidden = false;
    $("hint").hidden = true;
    $("results").scrollTop = 0;
    say(`Patch at ${found.patch.x}, ${found.patch.y}`);
  } catch (error) {
    if (turn === state.picked) say(error.message);
  }
}

// --- what can be shared, keys, start --------------------------------------------------------------------------------

const KEPT = { prompt: "prompt", second: "second", mode: "mode", model: "model", other: "other" };

function remember() {
  const words = new URLSearchParams({ slide: state.slide?.name ?? "" });
  for (const [key, id] of Object.entries(KEPT)) if ($(id).value && !$(id).closest("[hidden]")) words.set(key, $(id).value);
  history.replaceState(null, "", `${location.pathname}#${words}`);
}

function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const [key, id] of Object.entries(KEPT)) {
    const value = words.get(key), box = $(id);
    if (value !== null && (box.tagName !== "SELECT" || [...box.options].some(option => option.value === value))) box.value = value;
  }
  return words.get("slide");
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open || !$("single").checked) return;
  if (event.target.closest("input, select, textarea")) return;
  const does = {
    "/": () => $("prompt").focus(), v: () => state.panes[0]?.viewer.canvas.focus(), n: () => step(1), p: () => step(-1), m: toggle,
    "[": () => { $("opacity").value = +$("opacity").value - 10; fade(); }, "]": () => { $("opacity").value = +$("opacity").value + 10; fade(); },
    "?": () => $("keys").showModal(),
  }[event.key];
  if (does) { event.preventDefault(); does(); }
}

function zoom(factor) {
  const own = state.panes[0];
  if (!own?.viewer.isOpen()) return;
  state.leader = own;
  if (factor) own.viewer.viewport.zoomBy(factor).applyConstraints(); else own.viewer.viewport.goHome(calm);
}

async function start() {
  // The token came in the address, and is a cookie now: it need not stay where shoulders and screenshots see it.
  if (location.search) history.replaceState(null, "", location.pathname + location.hash);
  state.about = await ask("api/about");
  const models = state.about.models;
  for (const id of ["model", "other"]) $(id).replaceChildren(...models.map(model => new Option(model.name)));
  $("other").selectedIndex = Math.min(1, models.length - 1);
  $("model-field").hidden = models.length < 2;
  $("mode").querySelector("[value=models]").disabled = models.length < 2;
  $("prompt").maxLength = $("second").maxLength = state.about.prompt;
  const slide = recall();
  if (narrow.matches) $("drawer").open = false;
  fields();
  $("ask").addEventListener("submit", event => { event.preventDefault(); draw(); });
  for (const id of ["mode", "model", "other"]) $(id).addEventListener("change", fields);
  $("find").addEventListener("input", drawList);
  $("opacity").addEventListener("input", fade);
  $("toggle").addEventListener("click", toggle);
  $("help").addEventListener("click", () => $("keys").showModal());
  $("in").addEventListener("click", () => zoom(1.6));
  $("out").addEventListener("click", () => zoom(1 / 1.6));
  $("home").addEventListener("click", () => zoom(0));
  document.addEventListener("keydown", keys);
  await list();
  const first = state.rows.find(row => row.name === slide) || state.rows.find(row => !row.error && row.models.length) || state.rows.find(row => !row.error);
  if (first) await open(first.name);
  else complain("No slide can be read: the list says why.");
}

window.medclip = state;  // for who looks under the hood
start().catch(complain);

"use strict";
// `page` is what Python wrote. `state` is what the reader decided, kept in the browser: by image id
// { seen: when it was first shown (1, 2, ...), part, done, answers: { class name: answer } }, where
// an answer ("yes", "no", "unsure") is there only if it differs from what was shown at first.
const byId = (id) => document.getElementById(id);
const make = (tag, text, cls) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (cls) node.className = cls;
  return node;
};
const svgNode = (tag, values) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
  return node;
};
const page = JSON.parse(byId("review-data").textContent);
const images = page.images.map(([id, drawn, width, height, rows]) => ({
  id, width, height, part: drawn ? "random" : "uncertain",
  rows: rows.map(([number, p, box, said]) => ({ name: page.classes[number], p, box, said })),
}));
const POSITIVE = 0, UNDECIDED = 1;
const key = `hts-review/${page.run}/${page.pseudo_labels}`;
let current = -1, kept = true, unsaved = false;

// What the browser keeps.

const load = () => {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? {};
  } catch { // refused for pages opened from a file, or in private windows
    kept = false;
    return {};
  }
};
const keep = () => {
  unsaved = true;
  try {
    if (kept) localStorage.setItem(key, JSON.stringify(state));
  } catch {
    kept = false;
  }
  if (!kept) notify("This browser keeps nothing for this page: save before you close it, and go on from the saved file (Help).");
};
const notify = (text) => {
  byId("notice").hidden = !text;
  if (byId("notice").textContent !== text) byId("notice").textContent = text;
};
const state = { seen: 0, keys: true, images: {}, ...load() };

const recordOf = (image) => {
  const record = state.images[image.id] ??= { seen: null, part: image.part, done: false, answers: {} };
  if (record.part !== image.part) { // of an earlier page: a drawn image has to be looked at in full
    record.done &&= image.part !== "random";
    record.part = image.part;
  }
  return record;
};

// What was decided of one image.

const firstAnswer = (row) => (row.said === POSITIVE ? "yes" : "no");
const answerOf = (image, row) => recordOf(image).answers[row.name] ?? firstAnswer(row);
const rowsOf = (image) => {
  const listed = new Set(image.rows.map((row) => row.name));
  const added = Object.keys(recordOf(image).answers).filter((name) => !listed.has(name));
  return [...image.rows, ...added.map((name) => ({ name, p: null, box: null, said: null }))];
};
const wordOf = (row, answer) => {
  if (answer === "unsure") return "unsure";
  if (row.said === POSITIVE) return answer === "yes" ? "right" : "wrong";
  return answer === "yes" ? "missing" : "absent";
};
const shownWord = { right: "right", wrong: "wrong", missing: "missing", absent: "absent", unsure: "can't tell" };
const isChanged = (image) => image.id in state.images && rowsOf(image).some(
  (row) => ["wrong", "missing", "unsure"].includes(wordOf(row, answerOf(image, row))));
const decide = (image, row, answer) => {
  const record = recordOf(image);
  if (answer === firstAnswer(row) && row.said !== null) delete record.answers[row.name];
  else record.answers[row.name] = answer;
  keep();
};

// The file that is saved, and read again here or by `hts import-labels`.

const WORDS = ["right", "wrong", "missing", "absent", "unsure"];
const entryOf = (image) => {
  const { seen, done } = recordOf(image);
  const entry = { image_id: image.id, part: image.part, seen, done };
  if (!done) return entry;
  for (const word of WORDS) entry[word] = [];
  for (const row of rowsOf(image)) entry[wordOf(row, answerOf(image, row))].push(row.name);
  return entry;
};
const save = () => {
  const { images: _, ...head } = page;
  const file = { ...head, saved_at: new Date().toISOString(), images: images.map(entryOf) };
  const name = `review-${page.run.replace(/[^\w.-]+/g, "_")}-${page.pseudo_labels.split("-")[1]}.json`;
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  unsaved = false;
  byId("saved-name").textContent = name;
  byId("command").textContent = byId("command").dataset.command.replace("FILE", name);
  byId("saved").hidden = false;
  say(`Saved ${name}: ${countText()}`);
};
const read = async (file) => {
  let found;
  try {
    found = JSON.parse(await file.text());
  } catch {
    return notify(`${file.name} is not complete JSON: take another copy of it.`);
  }
  if (found.format !== page.format || found.pseudo_labels !== page.pseudo_labels) {
    return notify(`${file.name} is not of this page: it is of ${found.pseudo_labels ?? "something else"}.`);
  }
  const byName = new Map(images.map((image) => [image.id, image]));
  for (const entry of found.images) {
    const image = byName.get(entry.image_id);
    if (!image) continue;
    const record = recordOf(image);
    record.seen ??= entry.seen;
    state.seen = Math.max(state.seen, entry.seen ?? 0);
    if (!entry.done) continue;
    record.done = entry.part === image.part || image.part !== "random";
    record.answers = {};
    const rows = new Map(image.rows.map((row) => [row.name, row]));
    for (const word of WORDS) {
      const answer = { right: "yes", missing: "yes", unsure: "unsure" }[word] ?? "no";
      for (const name of entry[word] ?? []) decide(image, rows.get(name) ?? { name, said: null }, answer);
    }
  }
  keep();
  notify("");
  show(current);
  return say(`Read ${file.name}: ${countText()}`);
};

// One image, large.

const say = (text) => { byId("said").textContent = text; };
const percent = (p) => (p === null ? "" : `${(p * 100).toFixed(p >= 0.0995 || p === 0 ? 0 : 1)} %`);
const doneCount = () => images.filter((image) => state.images[image.id]?.done).length;
const countText = () => `${doneCount()} of ${images.length} done`;
const source = (place) => `data:image/jpeg;base64,${byId(`image-${place}`).textContent}`;

const show = (place) => {
  const image = images[place], record = recordOf(image), moved = place !== current;
  const inside = byId("one").contains(document.activeElement);
  current = place;
  if (!record.seen) {
    record.seen = state.seen += 1;
    keep();
  }
  byId("image").src = source(place);
  byId("image").alt = `Image ${image.id}`;
  byId("name").textContent = image.id;
  byId("where").textContent = `Image ${place + 1} of ${images.length}`;
  byId("badge").textContent = image.part === "random" ? "drawn at random" : "uncertain";
  byId("badge").className = `badge ${image.part}`;
  byId("rule").textContent = image.part === "random"
    ? "Tick everything that is in the image: what is left unticked counts as absent."
    : "Only the classes that are listed here count; the others stay open.";
  drawRows(image);
  drawProgress();
  if (moved) {
    const where = `${byId("where").textContent}, ${byId("badge").textContent}${record.done ? ", done" : ""}`;
    // Focus goes to the heading when what had it is gone; buttons keep it.
    if (inside && !byId("one").querySelector(".steps").contains(document.activeElement)) {
      byId("where").focus({ preventScroll: true });
    }
    say(where);
    byId("saved").hidden = true;
    document.querySelector(".classes").scrollTop = 0;
    if (byId("one").getBoundingClientRect().top < 0) byId("one").scrollIntoView();
  }
};

const drawRows = (image) => {
  const rows = rowsOf(image);
  byId("machine").replaceChildren();
  byId("others").replaceChildren();
  rows.forEach((row, index) => {
    byId(row.said === POSITIVE ? "machine" : "others").append(makeRow(image, row, index));
  });
  byId("no-label").hidden = byId("machine").children.length > 0;
  byId("badge").dataset.done = recordOf(image).done;
  drawBoxes(image);
};
const makeRow = (image, row, index) => {
  const answer = answerOf(image, row), item = make("li"), label = make("label"), tick = make("input");
  item.className = `row ${wordOf(row, answer)}`;
  tick.type = "checkbox";
  tick.checked = answer === "yes";
  tick.indeterminate = answer === "unsure";
  tick.addEventListener("change", () => change(image, row, tick.checked ? "yes" : "no"));
  const note = row.said === UNDECIDED ? "undecided" : row.said === null ? "added by you" : "";
  const name = make("span", row.name, "class");
  label.append(make("kbd", index < 9 ? index + 1 : ""), tick, name);
  label.firstChild.setAttribute("aria-hidden", "true");
  if (note) name.append(make("small", note));
  const share = make("span", percent(row.p), "share");
  share.style.setProperty("--p", row.p ?? 0);
  label.append(share, make("span", shownWord[wordOf(row, answer)], "word"));
  const unsure = make("label", undefined, "unsure-choice"), other = make("input");
  other.type = "checkbox";
  other.checked = answer === "unsure";
  other.setAttribute("aria-label", `Can't tell: ${row.name}`);
  other.addEventListener("change", () => change(image, row, other.checked ? "unsure" : firstAnswer(row)));
  unsure.title = "Nobody can tell";
  unsure.append(other, make("span", "?"));
  item.append(label, unsure);
  for (const event of ["pointerenter", "focusin"]) item.addEventListener(event, () => drawBoxes(image, row));
  item.addEventListener("pointerleave", () => drawBoxes(image));
  return item;
};
const change = (image, row, answer) => {
  const focused = document.activeElement?.closest?.(".row");
  const place = focused ? allRows().indexOf(focused) : -1;
  const second = document.activeElement?.parentElement?.className === "unsure-choice";
  decide(image, row, answer);
  drawRows(image);
  drawProgress();
  if (place >= 0) allRows()[place]?.querySelectorAll("input")[+second].focus();
  say(`${row.name}: ${shownWord[wordOf(row, answer)]}`);
};
const allRows = () => [...document.querySelectorAll("#machine .row, #others .row")];

// The regions of what is ticked; that of the pointed row stands out.
const drawBoxes = (image, pointed) => {
  const svg = byId("boxes"), { width, height } = image, unit = Math.max(width, height) / 100;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const box = (row) => row.box ?? [0, 0, width, height];
  if (pointed?.box) {
    const [x, y, w, h] = box(pointed);
    const d = `M0 0h${width}v${height}h-${width}z M${x} ${y}h${w}v${h}h-${w}z`;
    svg.append(svgNode("path", { class: "veil", "fill-rule": "evenodd", d }));
  }
  const corners = new Map();
  rowsOf(image).forEach((row, index) => {
    const shown = row.said !== null && (row.name === pointed?.name
      || (row.said === POSITIVE && answerOf(image, row) === "yes"));
    if (!shown || index > 8) return;
    const [x, y, w, h] = box(row), corner = `${x},${y}`, taken = corners.get(corner) ?? 0;
    corners.set(corner, taken + 1);
    const group = svgNode("g", { class: row.name === pointed?.name ? "on" : "" });
    group.append(svgNode("rect", { x, y, width: w, height: h, class: "dark" }), svgNode("rect", { x, y, width: w, height: h }));
    const side = 3.6 * unit, left = Math.min(x + taken * side, width - side);
    group.append(svgNode("rect", { class: "flag", x: left, y, width: side, height: side }));
    const text = svgNode("text", { x: left + side / 2, y: y + 0.74 * side, "font-size": 0.7 * side });
    text.textContent = index + 1;
    group.append(text);
    svg.append(group);
  });
};

const drawProgress = () => {
  const changed = images.filter(isChanged).length;
  byId("progress").value = doneCount();
  byId("count").textContent = `${countText()}, ${changed} corrected`;
  const drawn = images.filter((image) => image.part === "random");
  const firstOpen = drawn.findIndex((image) => !state.images[image.id]?.done);
  const counting = firstOpen < 0 ? drawn.length : firstOpen;
  const later = firstOpen >= 0 && drawn.slice(firstOpen).some((image) => state.images[image.id]?.done);
  byId("counting").textContent = `${counting} of ${drawn.length} so far`;
  byId("first-open").hidden = !later;
  if (later) {
    const place = images.indexOf(drawn[firstOpen]);
    byId("first-open").textContent = `Image ${place + 1} is still open: those after it do not count.`;
    byId("first-open").onclick = () => show(place);
  }
};

const finish = () => {
  recordOf(images[current]).done = true;
  keep();
  const isOpen = (image) => !state.images[image.id]?.done;
  const after = images.findIndex((image, place) => place > current && isOpen(image));
  const next = after >= 0 ? after : images.findIndex(isOpen);
  if (next >= 0) return show(next);
  show(current);
  notify(`All ${images.length} images are done: save, and import the file.`);
  return say(byId("notice").textContent);
};
const step = (by) => show(Math.min(Math.max(current + by, 0), images.length - 1));

// The search for a class to add.

const search = byId("search"), found = byId("found");
let active = 0, matches = [];
const drawFound = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const image = images[current];
  const here = new Set(rowsOf(image).filter((row) => answerOf(image, row) === "yes").map((row) => row.name));
  const starts = (name) => !name.toLowerCase().startsWith(words[0]);
  matches = !words.length ? [] : page.classes
    .filter((name) => !here.has(name) && words.every((word) => name.toLowerCase().includes(word)))
    .sort((a, b) => starts(a) - starts(b)).slice(0, 8);
  active = Math.min(active, Math.max(matches.length - 1, 0));
  found.replaceChildren(...matches.map((name, index) => {
    const option = make("li", name);
    option.id = `found-${index}`;
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", index === active);
    option.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // the field keeps the focus
      add(name);
    });
    return option;
  }));
  if (words.length && !matches.length) found.append(make("li", "No such class", "soft"));
  found.hidden = !words.length;
  search.setAttribute("aria-expanded", String(!found.hidden));
  if (matches.length) search.setAttribute("aria-activedescendant", `found-${active}`);
  else search.removeAttribute("aria-activedescendant");
};
const closeSearch = () => {
  search.value = "";
  active = 0;
  drawFound();
  byId("where").focus({ preventScroll: true });
};
const add = (name) => {
  const image = images[current];
  const row = image.rows.find((entry) => entry.name === name) ?? { name, said: null };
  closeSearch();
  change(image, row, "yes");
};
search.addEventListener("input", () => { active = 0; drawFound(); });
search.addEventListener("blur", () => { found.hidden = true; });
search.addEventListener("focus", drawFound);
search.addEventListener("keydown", (event) => {
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (move && matches.length) active = (active + move + matches.length) % matches.length;
  else if (event.key === "Enter" && matches.length) add(matches[active]);
  else if (event.key === "Escape") closeSearch();
  else return;
  event.preventDefault();
  event.stopPropagation();
  if (move) drawFound();
});

// All images, small. A picture is made when it comes near the screen and given up when it leaves.

const cards = [];
const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const picture = target.querySelector("img");
    if (isIntersecting) picture.src = source(cards.indexOf(target));
    else picture.removeAttribute("src");
  }
}, { rootMargin: "400px" });
const drawCards = () => {
  if (!cards.length) {
    images.forEach((image, place) => {
      const card = make("li"), button = make("button"), picture = make("img");
      button.type = "button";
      picture.alt = "";
      button.append(picture, make("span"));
      button.addEventListener("click", () => { toggleGallery(false); show(place); });
      card.append(button);
      cards.push(card);
      near.observe(card);
    });
    byId("cards").append(...cards);
  }
  const wanted = document.querySelector("[name=show]:checked").value;
  let shown = 0;
  images.forEach((image, place) => {
    const done = state.images[image.id]?.done ?? false, changed = isChanged(image);
    const kind = changed ? "changed" : done ? "done" : "open";
    const card = cards[place], button = card.firstChild;
    card.className = kind;
    card.hidden = Boolean(wanted) && !{ open: !done, done, changed }[wanted];
    shown += !card.hidden;
    const text = `${changed ? "✎" : done ? "✓" : ""} ${place + 1}`;
    button.lastChild.textContent = text.trim();
    button.setAttribute("aria-label", `Image ${place + 1}, ${done ? "done" : "open"}${changed ? ", corrected" : ""}`);
    if (place === current) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  byId("none").hidden = shown > 0;
};
const toggleGallery = (open) => {
  byId("all").hidden = !open;
  byId("one").hidden = open;
  byId("gallery-button").setAttribute("aria-pressed", String(open));
  if (!open) return byId("where").focus({ preventScroll: true });
  drawCards();
  cards[current].scrollIntoView({ block: "center" });
  return cards[current].firstChild.focus({ preventScroll: true });
};
for (const radio of document.querySelectorAll("[name=show]")) radio.addEventListener("change", drawCards);

// Buttons and keys.

const press = {
  Enter: finish,
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
  ArrowUp: () => focusRow(-1),
  ArrowDown: () => focusRow(1),
  "/": () => search.focus(),
};
const everywhere = {
  g: () => toggleGallery(byId("all").hidden),
  s: save,
  "?": () => byId("help").showModal(),
};
const focusRow = (by) => {
  const rows = allRows(), place = rows.indexOf(document.activeElement?.closest?.(".row"));
  const next = place < 0 ? (by > 0 ? 0 : rows.length - 1) : place + by;
  rows[Math.min(Math.max(next, 0), rows.length - 1)]?.querySelector("input").focus();
};
const digit = (event) => {
  const number = /^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1];
  const image = images[current], row = number && rowsOf(image)[number - 1];
  if (!row) return false;
  const answer = answerOf(image, row);
  if (event.shiftKey) change(image, row, answer === "unsure" ? firstAnswer(row) : "unsure");
  else change(image, row, answer === "yes" ? "no" : "yes");
  return true;
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat && event.key === "Enter") return;
  if (byId("help").open || event.target === search) return;
  if (event.target.closest?.("button") && ["Enter", " "].includes(event.key)) return;
  if (event.target.type === "radio" && event.key.startsWith("Arrow")) return;
  if (!state.keys && event.key !== "Enter") return;
  const action = everywhere[event.key] ?? (byId("one").hidden ? undefined : press[event.key]);
  if (!action && (byId("one").hidden || !digit(event))) return;
  event.preventDefault();
  action?.();
});
const buttons = {
  done: finish, back: () => step(-1), pass: () => step(1), save,
  "help-button": everywhere["?"], "gallery-button": everywhere.g,
};
for (const [id, action] of Object.entries(buttons)) {
  byId(id).addEventListener("click", (event) => {
    action();
    // After a click of the mouse, Enter should go on and not press the button again.
    if (event.detail && !byId("one").hidden && !byId("help").open) byId("where").focus({ preventScroll: true });
  });
}
byId("keys").checked = state.keys;
byId("keys").addEventListener("change", () => { state.keys = byId("keys").checked; keep(); });
byId("open").addEventListener("change", () => {
  const [file] = byId("open").files;
  byId("help").close();
  if (file) read(file);
});
addEventListener("storage", (event) => {
  if (event.key === key) notify("This page is open in another tab too: close one of them, the last one to decide wins.");
});
addEventListener("beforeunload", (event) => { if (unsaved && !kept) event.preventDefault(); });

const start = images.findIndex((image) => !state.images[image.id]?.done);
show(Math.max(start, 0));

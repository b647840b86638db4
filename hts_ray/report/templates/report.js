"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);
const make = (tag, text, cls) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (cls) node.className = cls;
  return node;
};

// The table of classes: sorted by any column, searched by words.
const setUpTable = (table) => {
  const body = table.tBodies[0], rows = [...body.rows];
  const heads = all("thead th", table);
  const keyOf = (row, column) => {
    const text = row.cells[column].textContent;
    if (!column) return text;
    const digits = text.replace(/[^\d.-]/g, "");
    return digits === "" ? null : Number(digits);
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    // Numbers start with the largest, names with A: what a reader looks for first.
    const first = column ? "descending" : "ascending";
    const other = column ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((entry) => entry.setAttribute("aria-sort", entry === head ? order : "none"));
    const sign = order === "ascending" ? 1 : -1;
    const keyed = rows.map((row) => [keyOf(row, column), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
    });
    body.append(...keyed.map(([, row]) => row));
  }));
  const search = byId("class-search");
  const find = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const row of rows) {
      const name = row.cells[0].textContent.toLowerCase();
      row.hidden = !words.every((word) => name.includes(word));
      found += !row.hidden;
    }
    byId("class-count").textContent = words.length ? `${found} of ${rows.length}` : "";
  };
  search.addEventListener("input", find);
  find(); // browsers may restore a search after a reload
};

// Precision over recall: the mean is drawn already, a chosen class takes its lines' place.
const setUpCurves = (figure) => {
  const curves = JSON.parse(byId("curve-data").textContent);
  const svg = figure.querySelector("svg"), choice = byId("curve-class");
  const title = figure.querySelector("small"), notes = all(".keys .soft", figure);
  const [left, top, width, height] = svg.dataset.plot.split(" ").map(Number);
  const lines = all("[data-mark]", svg)
    .sort((a, b) => a.dataset.mark - b.dataset.mark).map((mark) => mark.querySelector("path"));
  const mean = {
    title: title.textContent, label: svg.getAttribute("aria-label"),
    paths: lines.map((line) => line.getAttribute("d")), notes: notes.map((note) => note.textContent),
  };
  const pathOf = (curve) => curve.map((value, place) => {
    const x = left + width * place / (curve.length - 1), y = top + height * (1 - value / 1000);
    return `${place ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`;
  }).join("");
  const show = () => {
    const chosen = curves[choice.value];
    const name = chosen && choice.selectedOptions[0].textContent;
    const ap = chosen && chosen.map((curve) =>
      curve ? `${(curve.reduce((sum, value) => sum + value, 0) / curve.length / 10).toFixed(1)} %` : "–");
    lines.forEach((line, place) => {
      line.setAttribute("d", !chosen ? mean.paths[place] : chosen[place] ? pathOf(chosen[place]) : "M0 0");
    });
    notes.forEach((note, place) => { note.textContent = chosen ? ap[place] : mean.notes[place]; });
    title.textContent = chosen ? `Interpolated precision over recall: ${name}` : mean.title;
    svg.setAttribute("aria-label", chosen ? `Precision over recall of ${name}. AP: ${ap.join(", ")}` : mean.label);
  };
  choice.addEventListener("change", show);
  show();
};

// The gallery. A card gets its regions when it comes near the screen or into focus.
const setUpGallery = (data) => {
  const { texts, images } = JSON.parse(data.textContent);
  const cards = all(".card"), numberOf = new Map(cards.map((card, index) => [card, index]));
  const labelsOf = cards.map((card) => all(".labels [data-c]", card).map(
    (label) => [label.dataset.c, label.classList[1]]));
  const svgNode = (tag, values) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
    return node;
  };
  const percent = (p) => `${(p * 100).toFixed(p >= 0.1 || p === 0 ? 0 : 1)} %`;

  const shows = new Map();
  const showOf = (card) => {
    if (!shows.has(card)) shows.set(card, setUpCard(card, ...images[numberOf.get(card)]));
    return shows.get(card);
  };

  const setUpCard = (card, width, height, regions) => {
    if (!regions.length) return null;
    const svg = svgNode("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const rects = regions.map(([, , [x, y, w, h]], index) =>
      svgNode("rect", { x, y, width: w, height: h, "data-r": index }));
    // Large ones first, so that small ones lie on top and can be pointed at.
    const area = (rect) => rect.getAttribute("width") * rect.getAttribute("height");
    svg.append(...[...rects].sort((a, b) => area(b) - area(a)));
    card.querySelector(".picture").append(svg);
    const chips = all(".labels [data-r]", card);
    const panel = make("div", undefined, "region"), step = make("div", undefined, "step");
    const where = make("output"), best = make("ul", undefined, "best");
    const said = make("p", undefined, "said");
    let current = 0, marked = false;
    for (const [text, label, move] of [["←", "Previous region", -1], ["→", "Next region", 1]]) {
      const button = make("button", text);
      button.type = "button";
      button.tabIndex = -1; // the arrow keys do the same on the focused image
      button.setAttribute("aria-label", label);
      button.addEventListener("click", () => show(current + move, true));
      step.append(button);
    }
    step.lastChild.before(where);
    panel.append(step, best, said);
    card.querySelector("figcaption").append(panel);
    const veil = svgNode("path", { class: "veil", "fill-rule": "evenodd" });

    const show = (region, mark) => {
      current = (region + regions.length) % regions.length;
      marked = mark;
      const [kind, caption, [x, y, w, h], classes] = regions[current];
      const name = texts[kind] ? `, ${texts[kind]}` : "";
      where.textContent = `Region ${current + 1} of ${regions.length}${name}`;
      best.replaceChildren(...classes.map(([number, p]) => {
        const row = make("li");
        row.style.setProperty("--w", `${p * 100}%`);
        row.title = texts[number];
        row.append(make("span", texts[number]), make("span", percent(p)));
        return row;
      }));
      said.textContent = texts[caption] ? `“${texts[caption]}”` : "";
      said.hidden = !texts[caption];
      chips.forEach((chip) => chip.classList.toggle("hit", mark && +chip.dataset.r === current));
      rects.forEach((rect, index) => rect.classList.toggle("on", mark && index === current));
      veil.remove();
      if (!mark) return;
      veil.setAttribute("d", `M0 0h${width}v${height}h-${width}z M${x} ${y}h${w}v${h}h-${w}z`);
      svg.append(veil, rects[current]);
    };
    const point = (event) => {
      const target = event.target.closest("[data-r]");
      if (target) show(+target.dataset.r, true);
    };
    card.addEventListener("pointerover", point);
    card.addEventListener("click", point);
    card.addEventListener("pointerleave", () => {
      if (document.activeElement !== card) show(0, false);
    });
    card.addEventListener("focus", () => where.setAttribute("aria-live", "polite"));
    card.addEventListener("blur", () => {
      where.removeAttribute("aria-live");
      show(0, false);
    });
    show(0, false);
    return (move) => show(marked ? current + move : current, true);
  };

  const nearScreen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      showOf(entry.target);
      nearScreen.unobserve(entry.target);
    }
  }, { rootMargin: "600px" });
  cards.forEach((card) => nearScreen.observe(card));

  // One card is in the tab order; the arrow keys move on from it.
  const gallery = document.querySelector(".cards");
  const enter = (card) => {
    cards.forEach((entry) => { entry.tabIndex = entry === card ? 0 : -1; });
  };
  gallery.addEventListener("focusin", (event) => {
    if (numberOf.has(event.target)) {
      showOf(event.target);
      enter(event.target);
    }
  });
  gallery.addEventListener("keydown", (event) => {
    const card = event.target;
    if (!numberOf.has(card)) return;
    const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const visible = cards.filter((entry) => !entry.hidden), place = visible.indexOf(card);
    const next = {
      ArrowUp: visible[place - 1], ArrowDown: visible[place + 1],
      Home: visible[0], End: visible[visible.length - 1],
    }[event.key];
    if (!sideways && !next) return;
    event.preventDefault();
    if (sideways) showOf(card)?.(sideways);
    else next.focus();
  });

  const choice = byId("gallery-class");
  const filter = () => {
    const verdict = document.querySelector("[name=verdict]:checked").value;
    let found = 0, first = null;
    cards.forEach((card, index) => {
      card.hidden = (verdict || choice.value) && !labelsOf[index].some(([id, kind]) =>
        (!verdict || kind === verdict) && (!choice.value || id === choice.value));
      found += !card.hidden;
      if (!card.hidden && !first) first = card;
    });
    enter(first);
    const all = cards.length.toLocaleString("en"), some = found.toLocaleString("en");
    byId("gallery-count").textContent = found === cards.length
      ? `${all} image${found === 1 ? "" : "s"}` : `${some} of ${all} images`;
    byId("gallery-none").hidden = found > 0;
  };
  all("[name=verdict]").forEach((input) => input.addEventListener("change", filter));
  choice.addEventListener("change", filter);
  // A class in the table leads to its images.
  all("[data-show]").forEach((link) => link.addEventListener("click", () => {
    document.querySelector("[name=verdict][value='']").checked = true;
    choice.value = link.dataset.show;
    filter();
  }));
  filter();
};

if (byId("class-table")) setUpTable(byId("class-table"));
if (byId("curve-data")) setUpCurves(byId("curve-chart"));
if (byId("gallery-data")) setUpGallery(byId("gallery-data"));

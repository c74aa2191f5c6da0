"use strict";
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const shared = JSON.parse(one("#shared").textContent);
  const colours = Object.fromEntries(Object.entries(shared.colours).map(([name, text]) => [name, bytes(text)]));
  const place = Object.fromEntries(shared.metrics.map((metric, index) => [metric.key, index]));

  function shown(value, metric) {
    if (value === null || value === undefined) return "–";
    const text = metric.percent ? (100 * value).toFixed(1) : value.toFixed(3);
    return /^-[0.]+$/.test(text) ? text.slice(1) : text;
  }

  // Maps ---------------------------------------------------------------------------------------------------------

  async function greyOf(map) {
    if (map.bytes !== undefined) return { grey: bytes(map.bytes), rows: map.size[0], columns: map.size[1] };
    const image = new Image();
    image.src = map.jpeg;
    await image.decode();
    const canvas = make("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const grey = new Uint8Array(canvas.width * canvas.height);
    for (let i = 0; i < grey.length; i++) grey[i] = pixels[4 * i];
    return { grey, rows: canvas.height, columns: canvas.width };
  }

  // Cell and weight of the two neighbours of each pixel, with pixel centres at halves.
  function steps(cells, pixels) {
    return Array.from({ length: pixels }, (_, pixel) => {
      const at = Math.min(Math.max(((pixel + 0.5) * cells) / pixels - 0.5, 0), cells - 1);
      const low = Math.floor(at);
      return [low, Math.min(low + 1, cells - 1), at - low];
    });
  }

  // Bilinear, then coloured: as Python's `visual.overlay`.
  async function paint(canvas, map, side) {
    const { grey, rows, columns } = await greyOf(map);
    const table = colours[map.colours];
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d");
    const picture = context.createImageData(side, side);
    const across = steps(columns, side);
    steps(rows, side).forEach(([top, bottom, down], y) => {
      across.forEach(([left, right, along], x) => {
        const upper = grey[top * columns + left] * (1 - along) + grey[top * columns + right] * along;
        const lower = grey[bottom * columns + left] * (1 - along) + grey[bottom * columns + right] * along;
        const colour = 3 * Math.round(upper * (1 - down) + lower * down);
        const at = 4 * (y * side + x);
        picture.data.set([table[colour], table[colour + 1], table[colour + 2], 255], at);
      });
    });
    context.putImageData(picture, 0, 0);
  }

  function stack(view, run, map, side) {
    const input = one(".input img", view.article).src;
    const both = make("span", { class: "stack" }, make("img", { src: run.input ?? input, alt: "", decoding: "async" }));
    if (map.colours) {
      const canvas = make("canvas", { "aria-hidden": "true" });
      if (map.jpeg) both.append(make("img", { src: map.jpeg, alt: "" })); // until it is coloured, as in print
      both.append(canvas);
      paint(canvas, map, side);
    }
    return both;
  }

  // Images -------------------------------------------------------------------------------------------------------

  const views = all("#views > .view").map((article, order) => ({
    article,
    order,
    classes: JSON.parse(article.dataset.classes),
    right: all(".run", article).map(run => run.dataset.right ?? ""),
    runs: all(".run", article).map(run => run.dataset.run),
    confidence: all(".run", article).map(run => (run.dataset.confidence ? Number(run.dataset.confidence) : null)),
  }));
  const dataOf = view => JSON.parse(one(".data", view.article).textContent);
  const hidden = new Set();

  // Every picture of a run, in the order of the card: what is drawn, its name and its remark.
  function picturesOf(run) {
    const found = [];
    for (const map of run.maps) {
      if (hidden.has(map.explainer)) continue;
      const remark = (first, own) => [first, own].filter(text => text).join(", ");
      found.push({ name: map.explainer, remark: remark(map.label && "predicted class", map.remark), map, scores: map });
      if (!map.label) continue;
      const label = { remark: remark("true class", map.label.remark), map: map.label, scores: null };
      found.push({ name: map.explainer, ...label });
    }
    for (const panel of run.panels) found.push({ name: panel.name, remark: panel.remark, uri: panel.uri });
    return found;
  }

  function fill(view) {
    const data = dataOf(view);
    all(".run", view.article).forEach((container, index) => {
      const run = data.runs[index];
      const figures = picturesOf(run).map((picture, number) => {
        const drawn = picture.uri
          ? make("img", { src: picture.uri, alt: "", decoding: "async" })
          : stack(view, run, picture.map, 112);
        const name = `${picture.name} of ${run.run} on ${data.id}`;
        const button = make("button", { type: "button", class: "open", "aria-label": `Enlarge ${name}` }, drawn);
        button.addEventListener("click", () => zoom(view, index, number));
        const caption = make("figcaption", {}, picture.name);
        if (picture.remark) caption.append(" ", make("small", {}, picture.remark));
        return make("figure", picture.uri ? { class: "panel" } : {}, button, caption);
      });
      one(".maps", container).replaceChildren(...figures);
    });
    view.filled = true;
  }

  function empty(view) {
    all(".maps", view.article).forEach(maps => {
      maps.style.minHeight = `${maps.offsetHeight}px`; // the page must not jump
      maps.replaceChildren();
    });
    view.filled = false;
  }

  const watcher = new IntersectionObserver(
    entries => {
      for (const entry of entries) {
        const view = views.find(each => each.article === entry.target);
        if (entry.isIntersecting && !view.filled) fill(view);
        if (!entry.isIntersecting && view.filled) empty(view);
      }
    },
    { rootMargin: "1200px" },
  );
  views.forEach(view => watcher.observe(view.article));
  addEventListener("beforeprint", () => views.forEach(view => view.filled || view.article.hidden || fill(view)));
  addEventListener("afterprint", () => {
    watcher.disconnect();
    views.filter(view => view.filled).forEach(empty);
    views.forEach(view => watcher.observe(view.article)); // fills those near the window again
  });

  // Filters ------------------------------------------------------------------------------------------------------

  const filters = one("#filters");
  const field = name => filters.elements[name];
  const options = (select, values) => select.append(...values.map(value => make("option", { value }, value)));

  // What sorting needs of every image: scores and how alike maps and metrics are, of each run.
  function facts(view) {
    view.facts ??= dataOf(view).runs.map(run => ({
      explainers: run.maps.map(map => map.explainer),
      scores: run.maps.map(map => map.scores),
      alike: run.alike,
      agreement: run.agreement,
    }));
    return view.facts;
  }

  const known = values => values.filter(value => value !== null && value !== undefined);
  const mean = values => (known(values).length ? known(values).reduce((a, b) => a + b) / known(values).length : null);

  // Place of a pair in the upper triangle, row by row.
  function pairOf(run, first, second) {
    const [a, b] = [first, second].map(name => run.explainers.indexOf(name)).sort((x, y) => x - y);
    if (a < 0 || a === b) return null;
    return run.alike[a * run.explainers.length - (a * (a + 1)) / 2 + (b - a - 1)];
  }

  // The number that a view is sorted by, smallest first; null comes last.
  function sortKey(view, runs) {
    const kind = field("sort").value;
    if (kind === "unsure") return mean(runs.map(run => view.confidence[run]));
    if (kind === "sure") return -mean(runs.map(run => view.confidence[run]));
    if (kind === "") return view.order;
    const own = runs.map(run => facts(view)[run]);
    if (kind === "maps") return mean(own.map(run => mean(run.alike)));
    if (kind === "metrics") return mean(own.map(run => run.agreement));
    if (kind === "pair") return mean(own.map(run => pairOf(run, field("first").value, field("second").value)));
    const metric = place[field("metric").value];
    const scores = own.map(run => run.scores[run.explainers.indexOf(field("first").value)]?.[metric]);
    const score = mean(scores);
    return score === null ? null : shared.metrics[metric].higher ? score : -score;
  }

  function apply() {
    const [wanted, right, run] = ["class", "right", "run"].map(name => field(name).value);
    const kind = field("sort").value;
    all(".of-pair, .of-score", filters).forEach(label => (label.hidden = !label.classList.contains(`of-${kind}`)));
    const kept = [];
    for (const view of views) {
      const runs = view.runs.flatMap((name, index) => (run === "" || name === run ? [index] : []));
      const fits =
        (wanted === "" || view.classes.includes(wanted)) && (right === "" || runs.some(i => view.right[i] === right));
      view.article.hidden = !fits || !runs.length;
      all(".run", view.article).forEach((element, index) => (element.hidden = !runs.includes(index)));
      if (!view.article.hidden) kept.push([sortKey(view, runs), view]);
    }
    kept.sort(([a, x], [b, y]) => (a === null) - (b === null) || a - b || x.order - y.order);
    one("#views").append(...kept.map(([, view]) => view.article));
    one("output", filters).textContent = `${kept.length} of ${views.length} images`;
  }

  if (views.length) {
    const several = (select, values) => (options(select, values), values.length > 1);
    field("class").closest("label").hidden = !several(field("class"), [...new Set(views.flatMap(v => v.classes))].sort());
    field("run").closest("label").hidden = !several(field("run"), [...new Set(views.flatMap(view => view.runs))]);
    field("right").closest("label").hidden = !views.some(view => view.right.some(value => value));
    options(field("first"), shared.explainers);
    options(field("second"), shared.explainers);
    if (shared.explainers.length > 1) field("second").selectedIndex = 1;
    shared.metrics.forEach(metric => field("metric").append(make("option", { value: metric.key }, metric.label)));
    for (const explainer of shared.explainers) {
      const box = make("input", { type: "checkbox", checked: "", value: explainer });
      box.addEventListener("change", () => {
        box.checked ? hidden.delete(explainer) : hidden.add(explainer);
        all(".maps").forEach(maps => (maps.style.minHeight = ""));
        views.filter(view => view.filled).forEach(fill);
      });
      one("#shown").append(make("label", {}, box, ` ${explainer}`));
    }
    filters.hidden = false;
    filters.addEventListener("change", event => event.target.closest("select") && apply());
    filters.addEventListener("submit", event => event.preventDefault());
    apply();
  }

  const sliders = all("input[name=mix]");
  const mix = value => {
    document.documentElement.style.setProperty("--mix", value / 100);
    sliders.forEach(slider => (slider.value = value));
    one("[name=alone]").setAttribute("aria-pressed", Number(value) === 100);
  };
  sliders.forEach(slider => slider.addEventListener("input", () => mix(slider.value)));

  // Zoom ---------------------------------------------------------------------------------------------------------

  const dialog = one("#zoom");
  let current = null;

  function zoom(view, run, number) {
    const data = dataOf(view);
    const pictures = picturesOf(data.runs[run]);
    const at = (number + pictures.length) % pictures.length;
    const picture = pictures[at];
    current = { view, run, number: at };
    one("#zoom-title").textContent = `${picture.name}${picture.remark ? ` (${picture.remark})` : ""} · ${data.id}`;
    const large = picture.uri
      ? make("img", { src: picture.uri, alt: picture.name })
      : stack(view, data.runs[run], picture.map, 448);
    one(".large", dialog).replaceChildren(large);
    const beside = [make("h4", {}, data.runs[run].run), one(".run:nth-child(" + (run + 1) + ") p", view.article).cloneNode(true)];
    if (picture.scores) beside.push(scoreTable(picture.scores), ...charts(data.runs[run], picture.name));
    one(".beside", dialog).replaceChildren(...beside);
    if (!dialog.open) dialog.showModal();
  }

  function scoreTable(map) {
    const rows = shared.metrics.map((metric, index) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, `${metric.label} ${metric.higher ? "↑" : "↓"}`),
        make("td", {}, shown(map.scores[index], metric)),
      ),
    );
    const head = make("tr", {}, make("th", { scope: "col" }, "Metric"), make("th", { scope: "col" }, "This image"));
    return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  // The curves of this image: that of the explainer shown, and those of the others in grey.
  function charts(run, explainer) {
    const keys = [...new Set(run.maps.flatMap(map => Object.keys(map.curves ?? {})))];
    return keys.map(key => {
      const lines = run.maps.filter(map => map.curves?.[key]);
      lines.sort((a, b) => (a.explainer === explainer) - (b.explainer === explainer));
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("viewBox", "0 0 300 130");
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", `${key} of ${explainer} and of the others`);
      const draw = (tag, attributes, text = "") => {
        const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
        for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
        element.textContent = text;
        svg.append(element);
      };
      draw("text", { x: 26, y: 12, class: "name" }, shared.metrics[place[key]]?.label ?? key);
      draw("path", { d: "M26 20V112H296", class: "axis" });
      draw("text", { x: 22, y: 24, class: "row" }, "1");
      draw("text", { x: 22, y: 114, class: "row" }, "0");
      for (const map of lines) {
        const { from, to, scores } = map.curves[key];
        const values = [...bytes(scores)];
        const x = i => 26 + 270 * (values.length < 2 ? to : from + ((to - from) * i) / (values.length - 1));
        const path = values.map((value, i) => `${x(i).toFixed(1)} ${(112 - (92 * value) / 255).toFixed(1)}`).join("L");
        draw("path", { d: `M${path}`, class: map.explainer === explainer ? "this" : "other" });
      }
      return svg;
    });
  }

  const step = by => current && zoom(current.view, current.run, current.number + by);
  one("[name=before]", dialog).addEventListener("click", () => step(-1));
  one("[name=after]", dialog).addEventListener("click", () => step(1));
  let mixed = 50;
  one("[name=alone]", dialog).addEventListener("click", () => {
    const alone = sliders[0].value === "100";
    if (!alone) mixed = sliders[0].value;
    mix(alone ? mixed : 100);
  });
  dialog.addEventListener("keydown", event => {
    if (event.target.matches("input")) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("click", event => event.target === dialog && dialog.close());

  // Tables -------------------------------------------------------------------------------------------------------

  function sortTable(heading) {
    const column = [...heading.parentElement.children].indexOf(heading);
    const down = heading.getAttribute("aria-sort") === "ascending";
    all("th", heading.parentElement).forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    for (const body of heading.closest("table").tBodies) {
      const rows = all("tr:not(.title)", body);
      const value = row => row.children[column].dataset.value ?? (column ? null : "");
      const number = text => (text === null ? NaN : Number(text));
      const numeric = column > 0; // the first column has names, which may look like numbers
      const compare = numeric
        ? (a, b) => number(value(a)) - number(value(b))
        : (a, b) => (value(a) ?? "").localeCompare(value(b) ?? "");
      const [there, missing] = [rows.filter(row => value(row) !== null), rows.filter(row => value(row) === null)];
      there.sort((a, b) => (down ? compare(b, a) : compare(a, b)));
      body.append(...there, ...missing);
    }
  }
  all(".sortable thead button").forEach(button => button.addEventListener("click", () => sortTable(button.closest("th"))));

  all(".families input").forEach(box =>
    box.addEventListener("change", () => {
      const table = box.closest("fieldset").nextElementSibling;
      all(`[data-family="${box.value}"]`, table).forEach(cell => (cell.hidden = !box.checked));
    }),
  );

  all(".exports button").forEach(button =>
    button.addEventListener("click", () => {
      const text = JSON.parse(button.nextElementSibling.textContent);
      const link = make("a", { download: `${button.dataset.name.replace(/[^\w.-]+/g, "-")}.${button.dataset.ending}` });
      link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }),
  );

  all(".explainers input").forEach(box => {
    const show = () =>
      all(".curve", box.closest("fieldset").nextElementSibling)
        .filter(curve => curve.dataset.explainer === box.value)
        .forEach(curve => curve.classList.toggle("off", !box.checked));
    box.addEventListener("change", show);
    show();
  });
})();

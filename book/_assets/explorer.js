// The explorer: what is chosen -> curves (drawn by Vega-Lite), a table, and the link that keeps the choice.
// The numbers are written by `lthlib/book/explorer.py`, which says what form they have.
(() => {
  "use strict";
  const data = window.explorerData;
  const page = document.getElementById("explore");
  const part = (name) => page.querySelector(`[data-part="${name}"]`);
  const choices = Object.fromEntries(["study", "dimension", "metric", "shift"].map((name) => [name, part(name)]));
  const TITLES = {
    dimension: (name) => data.dimensions[name],
    metric: (name) => data.metrics[name].label,
    shift: (name) => data.shifts[name],
  };
  const DASHES = { kept: [1, 0], "": [1, 0], "not shown": [8, 3, 2, 3], lost: [5, 4], collapsed: [1.5, 3] };
  const HALF = "M-1,0A1,1,0,0,0,1,0Z"; // the lower half of a mark
  let points = [], at = -1, drawn = Promise.resolve(null);

  // --- what is chosen ----------------------------------------------------------------------------------------------

  const study = () => data.studies[choices.study.value];
  const boxes = () => [...part("methods").querySelectorAll("input")];
  const methods = () => boxes().filter((box) => box.checked).map((box) => box.value);

  /** Return the study's cases that agree with some of the choices. */
  const cases = (names) => study().cases.filter((one) => names.every((name) => one[name] === choices[name].value));

  /** Offer values in a choice: the wanted one is chosen, else the one that was, else the first. */
  function offer(choice, values, title, wanted) {
    const chosen = [wanted, choice.value].find((value) => values.includes(value)) ?? values[0];
    choice.replaceChildren(...values.map((value) => new Option(title(value), value, false, value === chosen)));
  }

  /** Offer what there is, each choice among what the ones before it leave. */
  function fill(wanted = {}) {
    offer(choices.study, Object.keys(data.studies), (name) => data.studies[name].title, wanted.study);
    Object.keys(TITLES).forEach((name, i, names) => {
      const left = cases(names.slice(0, i)).map((one) => one[name]);
      offer(choices[name], [...new Set(left)], TITLES[name], wanted[name]);
    });
    const known = Object.keys(study().methods), asked = wanted.methods?.split(",");
    const off = asked ? known.filter((name) => !asked.includes(name))
      : boxes().filter((box) => !box.checked).map((box) => box.value);
    part("methods").replaceChildren(...known.map((name) => {
      const label = document.createElement("label"), box = document.createElement("input");
      Object.assign(box, { type: "checkbox", value: name, checked: !off.includes(name) });
      label.style.setProperty("--colour", data.methods[name].colour);
      label.append(box, data.methods[name].title);
      return label;
    }));
  }

  /** Write the choice into the address. */
  function keep() {
    const said = Object.entries(choices).map(([name, choice]) => [name, choice.value]);
    if (boxes().some((box) => !box.checked)) said.push(["methods", methods().join(",")]);
    history.replaceState(null, "", "#" + String(new URLSearchParams(said)).replace(/%2[CF]/g, decodeURIComponent));
  }

  /** Take the choice from the address; that of a heading changes nothing. */
  function follow() {
    fill(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
    show();
  }

  // --- its numbers -------------------------------------------------------------------------------------------------

  const between = (low, high) => (low < high ? `${low} to ${high}` : "");
  const bracketed = (low, high) => (low < high ? ` (${between(low, high)})` : "");

  /** Return the points of a case, method by method, and its dense parents, in the unit that is drawn. */
  function measured(one) {
    const scaled = (value) => (value === null ? null : Number((value * data.metrics[one.metric].factor).toPrecision(5)));
    const [dense, low, high] = one.dense.map(scaled);
    const lines = methods().filter((method) => method in one.methods).flatMap((method) => {
      const [means, lows, highs, codes] = one.methods[method], { title, colour } = data.methods[method];
      return study().rounds.map((round, i) => ({
        method, title, colour, round, ...(data.outcomes[codes[i]] ?? { name: "", mark: "" }),
        sparsity: Number((100 * study().methods[method][i]).toPrecision(4)),
        mean: scaled(means[i]), low: scaled(lows[i]), high: scaled(highs[i]),
      })).filter((point) => point.mean !== null);
    });
    lines.forEach((p, id) => Object.assign(p, { id,
      says: `${p.title}, ${p.sparsity} %: ${p.mean}${bracketed(p.low, p.high)}${p.name && `, ${p.name}`}` }));
    return { lines, dense: dense === null ? [] : [{ dense, low, high, says: `dense: ${dense}${bracketed(low, high)}` }] };
  }

  // --- curves ------------------------------------------------------------------------------------------------------

  function picture({ lines, dense }, title) {
    const look = getComputedStyle(document.documentElement);
    const [text, paper] = ["text-base", "background"].map((name) => look.getPropertyValue(`--pst-color-${name}`).trim());
    const marks = lines.map((p) => ({ ...p, fill: ["kept", ""].includes(p.name) ? p.colour : paper }));
    const pieces = lines.filter((p, i) => lines[i - 1]?.method === p.method) // each has the look of its later point
      .map((p) => ({ ...p, x: lines[p.id - 1].round, y: lines[p.id - 1].mean }));
    const labels = JSON.stringify(Object.fromEntries(study().rounds.map((n, i) => [n, study().ladder[i]])));
    const axis = { values: study().rounds, grid: false, labelOverlap: true, labelExpr: `(${labels})[datum.value]` };
    const scale = { zero: false, nice: false, padding: 16 };
    const x = (field) => ({ field, type: "quantitative", title: "sparsity [%]", scale, axis });
    const y = (field) => ({ field, type: "quantitative", title, scale: { zero: false } });
    const own = (field) => ({ field, type: "nominal", scale: null, legend: null });
    const tooltip = { field: "says", type: "nominal" };
    const point = { x: x("round"), y: y("mean"), tooltip,
      size: { condition: { test: "datum.id === at", value: 220 }, value: 60 } };
    const dash = { field: "name", type: "nominal", legend: null,
      scale: { domain: Object.keys(DASHES), range: Object.values(DASHES) } };
    const layer = (values, mark, encoding) => ({ data: { values }, mark: { opacity: 1, ...mark }, encoding });
    return {
      width: "container", height: 340, autosize: { type: "fit", contains: "padding" }, background: null,
      params: [{ name: "at", value: -1 }],
      layer: [
        layer(dense, { type: "rect", color: text, opacity: 0.12 }, { y: y("low"), y2: { field: "high" } }),
        layer(lines, { type: "area", opacity: 0.15 }, { x: x("round"), y: y("low"), y2: { field: "high" },
          color: own("colour"), detail: { field: "method" } }),
        layer(dense, { type: "rule", color: text, strokeDash: [6, 4], strokeWidth: 2 }, { y: y("dense"), tooltip }),
        layer(pieces, { type: "rule", strokeWidth: 2 }, { x: x("x"), x2: { field: "round" }, y: y("y"),
          y2: { field: "mean" }, color: own("colour"), strokeDash: dash }),
        layer(marks, { type: "point", strokeWidth: 2 }, { ...point, stroke: own("colour"), fill: own("fill") }),
        layer(marks.filter((p) => p.name === "not shown"), { type: "point", shape: HALF, strokeWidth: 0 },
          { ...point, fill: own("colour") }),
      ],
      config: { aria: false, view: { stroke: null }, axis: { labelColor: text, titleColor: text, domainColor: text,
        tickColor: text, gridColor: text, gridOpacity: 0.15, labelFontSize: 12, titleFontSize: 13 } },
    };
  }

  function draw(found, title) {
    const theme = document.documentElement.dataset.theme === "dark" ? "dark" : "light";
    drawn = drawn.then(async (old) => {
      old?.finalize();
      const options = { mode: "vega-lite", actions: false, renderer: "svg", tooltip: { theme } };
      const made = await window.vegaEmbed(part("chart"), picture(found, title), options);
      part("chart").querySelector("svg").setAttribute("aria-hidden", "true"); // its points are said one by one
      return made;
    });
  }

  /** Go through the points by keyboard: along a method, or to another method at the same sparsity. */
  function walk(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !points.length) return;
    event.preventDefault();
    const here = points[at], across = ["ArrowDown", "ArrowUp"].includes(event.key);
    const track = points.filter((p) => !here || p[across ? "round" : "method"] === here[across ? "round" : "method"]);
    const next = here ? track[(track.indexOf(here) + step + track.length) % track.length] : points[0];
    at = next.id;
    part("says").textContent = next.says;
    drawn.then(({ view }) => view.signal("at", at).runAsync());
  }

  // --- all together ------------------------------------------------------------------------------------------------

  function row(p) {
    const line = document.createElement("tr");
    [p.title, p.sparsity, p.mean, between(p.low, p.high) || "–", `${p.mark} ${p.name}`].forEach((text, i) => {
      const cell = document.createElement(i ? "td" : "th");
      cell.textContent = text;
      if (!i) cell.scope = "row";
      line.append(cell);
    });
    return line;
  }

  function show() {
    const [one] = cases(Object.keys(TITLES)), found = measured(one), label = TITLES.metric(one.metric);
    points = found.lines;
    at = -1;
    const what = label + (one.shift === "none" ? "" : `, ${TITLES.shift(one.shift)}`);
    const seeds = one.seeds === 1 ? "one seed each, so no intervals" : `means over ${one.seeds} seeds`;
    part("caption").textContent = `${what}. Sparse networks: ${points.length}, ${seeds}; cases measured: ${one.images}; `
      + (found.dense[0]?.says ?? "dense: not measured") + ".";
    part("chart").setAttribute("aria-label", `Curves of ${what}. Arrow keys go through the points.`);
    part("says").textContent = "";
    part("rows").replaceChildren(...points.map(row));
    draw(found, label);
  }

  if (!Object.keys(data.studies).length) {
    page.textContent = "No study of this book compares a sparse network with a dense one yet.";
    return;
  }
  const changed = () => { fill(); keep(); show(); };
  page.addEventListener("change", changed);
  part("every").addEventListener("click", () => {
    const on = boxes().some((box) => !box.checked);
    boxes().forEach((box) => { box.checked = on; });
    changed();
  });
  part("chart").addEventListener("keydown", walk);
  window.addEventListener("hashchange", follow);
  new MutationObserver(show).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  follow();
})();

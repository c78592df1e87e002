// The explorer's controls: what is chosen -> curves (Vega-Lite), table, and the link that keeps the choice.
// The numbers are those of `lthlib/book/explorer.py`, whose docstring has their form.
(() => {
  "use strict";
  const data = window.explorerData;
  const page = document.getElementById("explorer");
  const part = (name) => page.querySelector(`[data-part="${name}"]`);
  const choices = Object.fromEntries(["study", "dimension", "metric", "shift"].map((name) => [name, part(name)]));
  const DASHES = { kept: [1, 0], "not shown": [8, 3, 2, 3], lost: [5, 4], collapsed: [1.5, 3] };
  const HALF = "M-1,0A1,1,0,0,0,1,0Z"; // the lower half of a mark that is not shown
  let view = null, points = [], at = -1, drawing = 0;

  // --- what is chosen --------------------------------------------------------------------------------------------

  const study = () => data.studies[choices.study.value];
  const unique = (values) => [...new Set(values)];

  /** The study's cases of what is chosen, down to one choice. */
  const casesOf = (...names) =>
    study().cases.filter((found) => names.every((name) => found[name] === choices[name].value));

  /** Offer some values in a choice; choose the wanted one, else the one that was chosen, else the first. */
  function offer(choice, values, title, wanted) {
    const chosen = [wanted, choice.value, values[0]].find((value) => values.includes(value));
    choice.replaceChildren(...values.map((value) => new Option(title(value), value, false, value === chosen)));
  }

  /** Offer what the study has, where `wanted` has room for it; the rest stays as it was. */
  function fill(wanted = {}) {
    offer(choices.study, Object.keys(data.studies), (name) => data.studies[name].title, wanted.study);
    const offered = [];
    for (const [name, title] of [
      ["dimension", (value) => data.dimensions[value]],
      ["metric", (value) => data.metrics[value].label],
      ["shift", (value) => data.shifts[value]],
    ]) {
      offer(choices[name], unique(casesOf(...offered).map((found) => found[name])), title, wanted[name]);
      offered.push(name);
    }
    const known = Object.keys(study().methods);
    const before = [...part("methods").querySelectorAll("input")];
    const off = "methods" in wanted
      ? known.filter((name) => !wanted.methods.split(",").includes(name))
      : before.filter((box) => !box.checked).map((box) => box.value);
    part("methods").replaceChildren(...known.map((name) => {
      const label = document.createElement("label"), box = document.createElement("input");
      Object.assign(box, { type: "checkbox", value: name, checked: !off.includes(name) });
      label.style.setProperty("--colour", data.methods[name].colour);
      label.append(box, data.methods[name].title);
      return label;
    }));
  }

  const boxes = () => [...part("methods").querySelectorAll("input")];
  const methods = () => boxes().filter((box) => box.checked).map((box) => box.value);

  function keep() {
    const said = Object.entries(choices).map(([name, choice]) => [name, choice.value]);
    if (boxes().some((box) => !box.checked)) said.push(["methods", methods().join(",")]);
    history.replaceState(null, "", "#" + new URLSearchParams(said));
  }

  /** Take the choice from the link; another link to a heading of this page chooses nothing. */
  function follow() {
    const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    fill("study" in asked || "metric" in asked ? asked : {});
    show();
  }

  // --- numbers ---------------------------------------------------------------------------------------------------

  /** The points of what is chosen, method by method, in the units that are drawn. */
  function measured(found) {
    const scale = (value) => (value === null ? null : Number((value * data.metrics[found.metric].factor).toPrecision(5)));
    const [dense, low, high] = found.dense.map(scale);
    const lines = methods().filter((name) => name in found.methods).flatMap((name) => {
      const [means, lows, highs, codes] = found.methods[name];
      return study().rounds.map((round, i) => ({
        method: name, title: data.methods[name].title, colour: data.methods[name].colour, round,
        sparsity: Number((100 * study().methods[name][i]).toPrecision(4)),
        mean: scale(means[i]), low: scale(lows[i]), high: scale(highs[i]),
        outcome: (data.outcomes[codes[i]] || { name: "" }).name, mark: (data.outcomes[codes[i]] || { mark: "" }).mark,
      })).filter((point) => point.mean !== null);
    });
    lines.forEach((point, id) => {
      const fill = { kept: point.colour, "": point.colour }[point.outcome];
      Object.assign(point, { id, fill: fill || "var(--pst-color-background)", says: sentence(point) });
    });
    return { lines, dense: dense === null ? [] : [{ dense, low, high, says: `dense: ${dense}${between(low, high)}` }] };
  }

  const between = (low, high) => (low < high ? ` (${low} to ${high})` : "");
  const sentence = (p) =>
    `${p.title}, ${p.sparsity} %: ${p.mean}${between(p.low, p.high)}${p.outcome && `, ${p.outcome}`}`;

  // --- curves ----------------------------------------------------------------------------------------------------

  function drawing_of({ lines, dense }, label) {
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const text = colour("--pst-color-text-base") || "#222", paper = colour("--pst-color-background") || "#fff";
    lines.forEach((point) => { if (point.fill.startsWith("var")) point.fill = paper; });
    const pieces = lines.flatMap((p, i) => { // a piece of a line has the look of the point it leads to
      const from = lines[i - 1];
      return from && from.method === p.method ? [{ ...p, x: from.round, y: from.mean }] : [];
    });
    const own = (channel) => ({ field: channel, type: "nominal", scale: null, legend: null });
    const x = { field: "round", type: "quantitative", title: "sparsity [%]", scale: { zero: false, nice: false, padding: 16 },
      axis: { values: study().rounds, grid: false, labelOverlap: true,
        labelExpr: `(${JSON.stringify(Object.fromEntries(study().rounds.map((n, i) => [n, study().ladder[i]])))})[datum.value]` } };
    const y = (field) => ({ field, type: "quantitative", title: label, scale: { zero: false } });
    const marks = { x, y: y("mean"), tooltip: { field: "says", type: "nominal" } };
    const picked = { condition: { test: "datum.id === at", value: 220 }, value: 60 };
    return {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json", // a name, which nobody loads
      width: "container", height: 340, autosize: { type: "fit", contains: "padding" }, background: null,
      params: [{ name: "at", value: -1 }],
      layer: [
        { data: { values: dense }, mark: { type: "rect", color: text, opacity: 0.12 }, encoding: { y: y("low"), y2: { field: "high" } } },
        { data: { values: lines }, mark: { type: "area", opacity: 0.15 },
          encoding: { x, y: y("low"), y2: { field: "high" }, color: own("colour"), detail: { field: "method" } } },
        { data: { values: dense }, mark: { type: "rule", color: text, strokeDash: [6, 4], strokeWidth: 2 },
          encoding: { y: y("dense"), tooltip: { field: "says", type: "nominal" } } },
        { data: { values: pieces }, mark: { type: "rule", strokeWidth: 2 },
          encoding: { x: { ...x, field: "x" }, x2: { field: "round" }, y: y("y"), y2: { field: "mean" }, color: own("colour"),
            strokeDash: { field: "outcome", type: "nominal", legend: null,
              scale: { domain: [...Object.keys(DASHES), ""], range: [...Object.values(DASHES), [1, 0]] } } } },
        { data: { values: lines }, mark: { type: "point", strokeWidth: 2, opacity: 1 },
          encoding: { ...marks, stroke: own("colour"), fill: own("fill"), size: picked } },
        { data: { values: lines.filter((p) => p.outcome === "not shown") }, mark: { type: "point", shape: HALF, strokeWidth: 0, opacity: 1 },
          encoding: { ...marks, fill: own("colour"), size: picked } },
      ],
      config: { aria: false, view: { stroke: null }, font: "inherit",
        axis: { labelColor: text, titleColor: text, domainColor: text, tickColor: text, gridColor: text, gridOpacity: 0.15,
          labelFontSize: 12, titleFontSize: 13 } },
    };
  }

  async function draw(found, label) {
    const mine = ++drawing, dark = document.documentElement.dataset.theme === "dark";
    const drawn = await window.vegaEmbed(part("chart"), drawing_of(found, label),
      { actions: false, renderer: "svg", tooltip: { theme: dark ? "dark" : "light" } });
    if (mine === drawing) view = drawn.view;
  }

  /** Go through the points by keyboard: along a method, or to the next method at the same sparsity. */
  function walk(event) {
    const here = points[at], step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !points.length) return;
    event.preventDefault();
    const across = event.key === "ArrowDown" || event.key === "ArrowUp";
    const track = here && across ? points.filter((p) => p.round === here.round) : points;
    const next = here ? track[(track.indexOf(here) + step + track.length) % track.length] : points[0];
    at = next.id;
    part("says").textContent = next.says;
    if (view) view.signal("at", at).runAsync();
  }

  // --- all together ----------------------------------------------------------------------------------------------

  function table(lines) {
    part("rows").replaceChildren(...lines.map((p) => {
      const row = document.createElement("tr");
      const cells = [p.title, p.sparsity, p.mean, p.low < p.high ? `${p.low} to ${p.high}` : "–", `${p.mark} ${p.outcome}`];
      row.append(...cells.map((text, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (!i) cell.scope = "row";
        cell.textContent = text;
        return cell;
      }));
      return row;
    }));
  }

  function show() {
    const found = casesOf("dimension", "metric", "shift")[0];
    const all = measured(found), label = data.metrics[found.metric].label;
    points = all.lines;
    at = -1;
    const seeds = found.seeds === 1 ? "one seed, so no intervals" : `${found.seeds} seeds`;
    const dense = all.dense.length ? all.dense[0].says : "dense: not measured";
    part("caption").textContent = `${label}, shift ${data.shifts[found.shift]}: ${points.length} sparse networks in `
      + `means over seeds (${seeds}; ${found.images} images); ${dense}.`;
    part("chart").setAttribute("aria-label", `Curves of ${label} against sparsity. Arrow keys go through the points; the table below has all.`);
    part("says").textContent = "";
    table(points);
    return draw(all, label);
  }

  const changed = () => { fill(); keep(); show(); };
  if (!Object.keys(data.studies).length) {
    page.textContent = "No study of this book compares a sparse network with a dense one yet.";
    return;
  }
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

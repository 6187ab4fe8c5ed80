"use strict";
// The chart tooltips and the rollout browser of a report. Everything shown is set as text, never as markup.

const PAGE_SIZE = 10; // groups
const SVG = "http://www.w3.org/2000/svg";

// What a token can be coloured by: its value, the bounds of its shades (ascending), and how it is written.
const QUANTITIES = {
  probability: { value: (c, i) => exp(c.sampler[i]), shade: (v) => 7 - count([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99], v) },
  difference: { value: difference, shade: (v) => (v === 0 ? 0 : 1 + count([1e-6, 1e-4, 1e-3, 0.01, 0.05, 0.5], Math.abs(v))) },
  entropy: { value: (c, i) => c.entropies[i] ?? null, shade: (v) => count([0.01, 0.1, 0.3, 0.6, 1, 2, 3], v) },
  advantage: { value: (c) => c.advantage, shade: (v) => count([1e-9, 0.25, 0.5, 0.75, 1, 1.5, 2], Math.abs(v)) },
};

const OUTCOMES = {
  all: () => true,
  "reward above 0": (c) => c.reward !== null && c.reward > 0,
  "reward 0 or less": (c) => c.reward !== null && c.reward <= 0,
  "no reward": (c) => c.reward === null,
  "cut off": (c) => c.finish === "length",
  "tokens that differ": (c) => c.trainer !== null,
  "several policy versions": (c) => c.versions.length > 1,
};

function exp(logProb) {
  return logProb === null || logProb === undefined ? null : Math.exp(logProb);
}

function trainerLogProb(completion, index) {
  return (completion.trainer ?? completion.sampler)[index] ?? null;
}

function difference(completion, index) {
  const sampler = completion.sampler[index] ?? null;
  const trainer = trainerLogProb(completion, index);
  return sampler === null || trainer === null ? null : trainer - sampler;
}

function count(bounds, value) {
  return bounds.filter((bound) => value >= bound).length;
}

function shadeOf(name, completion, index) {
  const value = QUANTITIES[name].value(completion, index);
  return value === null ? 0 : QUANTITIES[name].shade(value);
}

function shown(value, digits) {
  return value === null || value === undefined ? "not recorded" : String(Number(value.toPrecision(digits)));
}

function element(name, { css = "", text = "", children = [] } = {}) {
  const made = document.createElement(name);
  if (css) made.className = css;
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

// Text with every occurrence of the query marked.
function marked(name, text, query, css = "") {
  const made = element(name, { css });
  const lower = text.toLowerCase();
  let from = 0;
  // Lower case may be longer, as that of İ is; then places do not match and nothing is marked.
  let at = query && lower.length === text.length ? lower.indexOf(query) : -1;
  for (; at >= 0; at = lower.indexOf(query, from)) {
    made.append(text.slice(from, at), element("mark", { text: text.slice(at, at + query.length) }));
    from = at + query.length;
  }
  made.append(text.slice(from));
  return made;
}

// One row of the strips: a path for each shade, a unit wide for each token.
function strip(name, completion) {
  const svg = document.createElementNS(SVG, "svg");
  const length = completion.tokens.length;
  svg.setAttribute("viewBox", `0 0 ${length} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const paths = new Map();
  for (let index = 0; index < length; index += 1) {
    const shade = shadeOf(name, completion, index);
    paths.set(shade, `${paths.get(shade) ?? ""}M${index} 0h1v1h-1z`);
  }
  for (const [shade, d] of paths) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    path.setAttribute("class", `q${shade}${name === "advantage" && completion.advantage < 0 ? " low" : ""}`);
    svg.append(path);
  }
  return element("div", { css: `strip ${name}`, children: [element("span", { text: name }), svg] });
}

function numbersOf(completion, index) {
  const version = completion.versions[completion.versions.length > 1 ? index : 0];
  return [
    `token ${index} ${JSON.stringify(completion.tokens[index])}  probability ${shown(exp(completion.sampler[index]), 4)}`,
    `log-prob: sampler ${shown(completion.sampler[index], 9)}, trainer ${shown(trainerLogProb(completion, index), 9)}, difference ${shown(difference(completion, index), 9)}`,
    `entropy ${shown(completion.entropies[index], 4)}, advantage ${shown(completion.advantage, 4)}, policy version ${shown(version, 9)}`,
  ].join("\n");
}

// The strips, the numbers of one token, and the tokens themselves; one token is current in all three.
function tokenView(completion, quantity) {
  const names = Object.keys(QUANTITIES);
  const strips = element("div", { css: "strips", children: names.map((name) => strip(name, completion)) });
  const needle = element("div", { css: "needle" });
  const numbers = element("output", { css: "numbers" });
  const tokens = element("p", { css: `tokens ${quantity}` });
  const last = completion.tokens.length - 1;
  let current = 0;
  completion.tokens.forEach((text, index) => {
    const low = quantity === "advantage" && completion.advantage < 0 ? " low" : "";
    const unequal = difference(completion, index) ? " unequal" : "";
    tokens.append(element("span", { css: `q${shadeOf(quantity, completion, index)}${low}${unequal}`, text }));
  });

  function choose(index) {
    tokens.children[current].classList.remove("at");
    current = Math.max(0, Math.min(last, index));
    tokens.children[current].classList.add("at");
    numbers.textContent = numbersOf(completion, current);
    const track = strips.querySelector("svg");
    needle.hidden = false;
    const box = track.getBoundingClientRect();
    const left = box.left - strips.getBoundingClientRect().left;
    needle.style.left = `${left + ((current + 0.5) / (last + 1)) * box.width}px`;
    strips.setAttribute("aria-valuenow", String(current));
    strips.setAttribute("aria-valuetext", numbers.textContent);
  }

  function chooseAt(event) {
    const box = strips.querySelector("svg").getBoundingClientRect();
    choose(Math.floor(((event.clientX - box.left) / box.width) * (last + 1)));
  }

  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };
  strips.addEventListener("keydown", (event) => {
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(current + moves[event.key]);
  });
  strips.addEventListener("pointermove", chooseAt);
  strips.addEventListener("pointerdown", chooseAt);
  for (const kind of ["pointerover", "pointerdown"]) {
    tokens.addEventListener(kind, (event) => {
      if (event.target.parentNode === tokens) choose([...tokens.children].indexOf(event.target));
    });
  }
  const slider = { role: "slider", tabindex: "0", "aria-label": "Token", "aria-valuemin": "0", "aria-valuemax": String(last) };
  for (const [name, value] of Object.entries(slider)) strips.setAttribute(name, value);
  needle.hidden = true;
  strips.append(needle);
  numbers.textContent = "Point at a token, or focus the strips and use the arrow keys.";
  return [strips, numbers, tokens];
}

function completionBody(completion, query, quantity) {
  const body = element("div", { css: "body", children: [marked("pre", completion.text, query)] });
  if (completion.tokens.length) body.append(...tokenView(completion, quantity));
  if (completion.tokens.length < completion.count) {
    const text = `The first ${completion.tokens.length} of ${completion.count.toLocaleString("en")} tokens.`;
    body.append(element("p", { css: "soft", text }));
  }
  return body;
}

function completionHead(completion, query) {
  const reward = completion.reward === null ? "no reward" : `reward ${shown(completion.reward, 4)}`;
  const components = Object.entries(completion.components).map(([name, value]) => `${name} ${value === null ? "-" : shown(value, 3)}`);
  const versions = [...new Set(completion.versions)].filter((version) => version !== null);
  const parts = [
    element("b", { text: reward }),
    ...(components.length ? [element("span", { text: components.join("  ") })] : []),
    marked("span", completion.reason, query),
    element("span", { children: ["answer ", marked("code", completion.extracted ?? "-", query)] }),
    element("span", { text: `advantage ${shown(completion.advantage, 3)}` }),
    element("span", { text: `${completion.count.toLocaleString("en")} tokens, ${completion.finish}` }),
    ...(completion.trainer === null ? [] : [element("span", { css: "bad", text: "differs" })]),
    ...(versions.length ? [element("span", { text: `policy ${versions.join(", ")}` })] : []),
  ];
  return element("summary", { children: parts });
}

function completionView(completion, query, quantity, open) {
  const details = element("details", { css: "completion", children: [completionHead(completion, query)] });
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(completionBody(completion, query, quantity));
  });
  details.open = open;
  return details;
}

function groupView({ group, completions }, query, quantity, open) {
  const head = element("p", {
    css: "soft",
    children: [
      element("span", { css: "tag", text: `step ${group.step}` }),
      " prompt ",
      marked("span", group.id, query),
      " · gold answer ",
      marked("code", group.gold, query),
      ` · ${completions.length} of ${group.count} completions shown`,
    ],
  });
  const views = completions.map((completion, index) => completionView(completion, query, quantity, open && index === 0));
  return element("article", { css: "card group", children: [head, marked("pre", group.prompt, query), ...views] });
}

function browser(groups) {
  const controls = Object.fromEntries(["search", "step", "outcome", "quantity"].map((id) => [id, document.getElementById(id)]));
  const [list, more, counted] = ["groups", "more", "count"].map((id) => document.getElementById(id));
  const option = (text) => element("option", { text });
  controls.step.append(...[...new Set(groups.map((group) => String(group.step)))].map(option));
  controls.outcome.append(...Object.keys(OUTCOMES).map(option));
  controls.quantity.append(...Object.keys(QUANTITIES).map(option));
  let found = [];
  let drawn = 0;

  function text(group, completion) {
    completion.words ??= [group.prompt, group.id, group.gold, completion.text, completion.reason, completion.extracted ?? ""].join("\n").toLowerCase();
    return completion.words;
  }

  function drawMore() {
    const query = controls.search.value.toLowerCase();
    const next = found.slice(drawn, drawn + PAGE_SIZE);
    list.append(...next.map((each, index) => groupView(each, query, controls.quantity.value, drawn + index === 0)));
    drawn += next.length;
    more.hidden = drawn >= found.length;
  }

  function draw() {
    const query = controls.search.value.toLowerCase();
    const fits = OUTCOMES[controls.outcome.value];
    const steps = groups.filter((group) => !controls.step.value || String(group.step) === controls.step.value);
    found = steps
      .map((group) => ({ group, completions: group.completions.filter((each) => fits(each) && text(group, each).includes(query)) }))
      .filter(({ completions }) => completions.length);
    const total = found.reduce((sum, { completions }) => sum + completions.length, 0);
    counted.textContent = `${total} completions in ${found.length} groups`;
    list.replaceChildren();
    drawn = 0;
    drawMore();
  }

  const form = document.getElementById("controls");
  form.hidden = false;
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", drawMore);
  draw();
}

// A chart's tooltips, which without a script are the browser's own, open at once, by touch and with the arrow keys too.
function tooltips(svg, tip) {
  const places = [...svg.querySelectorAll(".hit")];
  if (!places.length) return;
  const texts = places.map((place) => {
    const title = place.querySelector("title");
    title.remove();
    return title.textContent;
  });
  let current = -1;

  function show(index) {
    hide();
    current = Math.max(0, Math.min(places.length - 1, index));
    places[current].classList.add("on");
    tip.textContent = texts[current];
    tip.hidden = false;
    const place = places[current].getBoundingClientRect();
    const left = place.left + place.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(8, svg.getBoundingClientRect().top - tip.offsetHeight - 4)}px`;
  }

  function hide() {
    if (current >= 0) places[current].classList.remove("on");
    tip.hidden = true;
  }

  const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(current + moves[event.key]);
  });
  for (const kind of ["pointerover", "pointerdown"]) {
    svg.addEventListener(kind, (event) => {
      const index = places.indexOf(event.target);
      if (index >= 0) show(index);
    });
  }
  // A finger leaves with every tap, and its tooltip stays until the next one.
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  svg.addEventListener("blur", hide);
}

const tip = document.getElementById("tip");
document.querySelectorAll("figure svg").forEach((svg) => tooltips(svg, tip));
document.addEventListener("scroll", () => (tip.hidden = true), { passive: true });
const groups = JSON.parse(document.getElementById("rollout-data").textContent);
if (groups.length) browser(groups);

"use strict";
// Draws the difference between two neighbouring snapshots. Text reaches the page through textContent only.
const GRAPHS = JSON.parse(document.getElementById("differences").textContent);
const CONTEXT = 2;  // unchanged nodes that are shown around a change

for (const list of document.querySelectorAll(".steps")) {
  const graph = GRAPHS[Number(list.dataset.graph)];
  const panel = list.parentElement.querySelector(".difference");
  const search = panel.querySelector("input[type=search]");
  const whole = panel.querySelector(".whole");
  let step = null;
  const draw = () => drawDifference(panel, graph, step, search.value.trim().toLowerCase(), whole.checked);
  search.addEventListener("input", draw);
  whole.addEventListener("change", draw);
  for (const button of list.querySelectorAll("button[data-step]")) {
    button.addEventListener("click", () => {
      step = Number(button.dataset.step);
      for (const other of list.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
      panel.hidden = false;
      draw();
    });
  }
  const first = list.querySelector("button[data-step]");
  if (first) first.click();
}

// Blocks of {kind, before, after}: numbers of lines that stand beside each other.
function blocksOf(graph, step) {
  const before = graph.steps[step - 1].lines, after = graph.steps[step].lines;
  return graph.steps[step].changes.map(([kind, i1, i2, j1, j2]) => (
    {kind: kind, before: before.slice(i1, i2), after: after.slice(j1, j2)}));
}

function drawDifference(panel, graph, step, query, whole) {
  const blocks = blocksOf(graph, step);
  const count = side => blocks.reduce((sum, block) => sum + (block.kind === "equal" ? 0 : block[side].length), 0);
  const hit = number => hasText(graph.lines[number], query);
  panel.querySelector(".title").textContent = graph.steps[step].name;
  const place = panel.querySelector(".rows");
  place.replaceChildren();
  if (query) {
    let found = 0;
    for (const block of blocks) {
      const kept = {kind: block.kind, before: block.before.filter(hit), after: block.after.filter(hit)};
      found += Math.max(kept.before.length, kept.after.length);
      if (kept.before.length + kept.after.length) place.append(drawBlock(graph, kept, query));
    }
    panel.querySelector(".figures").textContent = `${found} nodes with “${query}”`;
    return;
  }
  panel.querySelector(".figures").textContent = `${count("before")} nodes removed, ${count("after")} added`;
  blocks.forEach((block, i) => {
    if (whole || block.kind !== "equal") {
      place.append(drawBlock(graph, block, query));
      return;
    }
    const size = block.after.length;
    const head = i > 0 ? Math.min(CONTEXT, size) : 0;
    const tail = Math.max(i < blocks.length - 1 ? size - CONTEXT : size, head);
    place.append(...[part(block, 0, head)].filter(notEmpty).map(shown => drawBlock(graph, shown, query)));
    if (tail > head) place.append(drawGap(graph, part(block, head, tail)));
    place.append(...[part(block, tail, size)].filter(notEmpty).map(shown => drawBlock(graph, shown, query)));
  });
}

function part(block, from, to) {
  return {kind: block.kind, before: block.before.slice(from, to), after: block.after.slice(from, to)};
}

function notEmpty(block) {
  return block.after.length > 0;
}

function drawGap(graph, block) {
  const gap = document.createElement("button"), size = block.after.length;
  gap.type = "button";
  gap.className = "gap";
  gap.textContent = `⋯ ${size} unchanged ${size === 1 ? "node" : "nodes"}`;
  gap.addEventListener("click", () => gap.replaceWith(drawBlock(graph, block, "")));
  return gap;
}

function drawBlock(graph, block, query) {
  const element = document.createElement("div"), equal = block.kind === "equal";
  element.className = `block ${equal ? "same" : "different"}`;
  for (const [side, kind] of [["before", "removed"], ["after", "added"]]) {
    const column = document.createElement("div");
    column.className = side;
    for (const number of block[side]) column.append(drawCell(graph, number, equal ? "same" : kind, query));
    element.append(column);
  }
  return element;
}

function drawCell(graph, number, kind, query) {
  const cell = document.createElement("div");
  cell.className = `cell ${kind}`;
  const [text, madeBy, where] = graph.lines[number];
  appendMarked(cell, text, query);
  const origin = [madeBy, query ? where : where.split("/").slice(-2).join("/")].filter(Boolean).join("  ");
  if (origin && (kind !== "same" || query)) {
    const small = document.createElement("small");
    small.title = where;
    appendMarked(small, origin, query);
    cell.append(small);
  }
  return cell;
}

function hasText(line, query) {
  return line.some(part => part.toLowerCase().includes(query));
}

function appendMarked(element, text, query) {
  const lower = text.toLowerCase();
  let at = 0;
  for (let hit = query ? lower.indexOf(query) : -1; hit >= 0; hit = lower.indexOf(query, at)) {
    const mark = document.createElement("mark");
    mark.textContent = text.slice(hit, hit + query.length);
    element.append(text.slice(at, hit), mark);
    at = hit + query.length;
  }
  element.append(text.slice(at));
}
